"""What fairseq's `--arch` names stand for: values of the options that the command line does not give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstrain.errors import ImportFormatError, nearest
from dstrain.interop.fairseq.command_line.command import Command

Values = Mapping[str, Any]

DEFAULTS: Values = {
    "encoder-embed-dim": 512,
    "encoder-ffn-embed-dim": 2048,
    "encoder-layers": 6,
    "encoder-attention-heads": 8,
    "decoder-layers": 6,
    "decoder-attention-heads": 8,
    "encoder-layerdrop": 0.0,
    "decoder-layerdrop": 0.0,
    "dropout": 0.1,
    "attention-dropout": 0.0,
    "activation-dropout": 0.0,
    "activation-fn": "relu",
    "factorized-embed-activation-fn": "linear",
    "max-source-positions": 1024,
    "max-target-positions": 1024,
}
INHERITED = {
    "decoder-embed-dim": "encoder-embed-dim",
    "decoder-ffn-embed-dim": "encoder-ffn-embed-dim",
    "decoder-input-dim": "decoder-embed-dim",
    "decoder-output-dim": "decoder-embed-dim",
}


def _arch(layers: int, dim: int, ffn: int, heads: int, **more: Any) -> Values:
    sizes = {"encoder-embed-dim": dim, "encoder-ffn-embed-dim": ffn}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}-layers": layers, f"{side}-attention-heads": heads}
    return {**sizes, **{name.replace("_", "-"): value for name, value in more.items()}}


PRE_NORM: dict[str, Any] = {"encoder_normalize_before": True, "decoder_normalize_before": True}
IT2 = {**PRE_NORM, "activation_fn": "gelu"}
IT2_DIST = {**IT2, "layernorm_embedding": True, "share_decoder_input_output_embed": True}
BART: dict[str, Any] = {
    "encoder_learned_pos": True,
    "decoder_learned_pos": True,
    "activation_fn": "gelu",
    "layernorm_embedding": True,
    "share_all_embeddings": True,
}
ROTARY = {"rotary": True, "no_token_positional_embeddings": True}
ALIBI = {"alibi": True, "no_token_positional_embeddings": True}
LM = {"decoder_normalize_before": True}
GPT2 = {**LM, "activation_fn": "gelu", "attention_dropout": 0.1}
GPT3 = {**LM, "activation_fn": "gelu", "dropout": 0.0, "decoder_learned_pos": True, "share_decoder_input_output_embed": True}
WIKI103 = {**LM, "dropout": 0.3, "attention_dropout": 0.1, "activation_dropout": 0.1, "no_decoder_final_norm": True}

ARCHITECTURES: Mapping[str, Values] = {
    "transformer": {},
    "transformer_wmt_en_de": {},
    "transformer_align": {},
    "transformer_tiny": _arch(2, 64, 64, 2),
    "transformer_iwslt_de_en": _arch(6, 512, 1024, 4),
    "transformer_vaswani_wmt_en_de_big": _arch(6, 1024, 4096, 16, dropout=0.3),
    "transformer_vaswani_wmt_en_fr_big": _arch(6, 1024, 4096, 16, dropout=0.1),
    "transformer_wmt_en_de_big": _arch(6, 1024, 4096, 16, dropout=0.3, attention_dropout=0.1),
    "transformer_wmt_en_de_big_align": _arch(6, 1024, 4096, 16, dropout=0.3, attention_dropout=0.1),
    "transformer_wmt_en_de_big_t2t": _arch(
        6, 1024, 4096, 16, dropout=0.3, attention_dropout=0.1, activation_dropout=0.1, **PRE_NORM
    ),
    "transformer_IT2": _arch(18, 1024, 8192, 16, **IT2),
    "transformer_IT2_dist": _arch(18, 512, 2048, 8, **IT2_DIST),
    "roformer_IT2": _arch(18, 1024, 8192, 16, **IT2, **ROTARY),
    "roformer_IT2_dist": _arch(18, 512, 2048, 8, **IT2_DIST, **ROTARY),
    "aliformer_IT2": _arch(18, 1024, 8192, 16, **IT2, **ALIBI),
    "aliformer_IT2_dist": _arch(18, 512, 2048, 8, **IT2_DIST, **ALIBI),
    "transformer_18_18": _arch(18, 1024, 8192, 16, **PRE_NORM),
    "transformer_base18L": _arch(18, 512, 2048, 8, **PRE_NORM, layernorm_embedding=True),
    "transformer_2x": _arch(6, 1024, 4096, 16),
    "transformer_4x": _arch(6, 1536, 4096, 16),
    "transformer_9x": _arch(6, 2048, 8192, 16),
    "transformer_12e12d_9xeq": _arch(12, 1536, 4096, 16),
    "transformer_24_24": _arch(24, 1024, 8192, 16, **PRE_NORM),
    "bart_base": _arch(6, 768, 3072, 12, **BART, no_scale_embedding=True),
    "bart_large": _arch(12, 1024, 4096, 16, **BART, no_scale_embedding=True),
    "mbart_base": _arch(6, 768, 3072, 12, **BART),
    "mbart_large": _arch(12, 1024, 4096, 16, **BART),
    "mbart_base_wmt20": {**_arch(6, 768, 3072, 12, **BART), "layernorm-embedding": False},
    "transformer_lm": _arch(6, 512, 2048, 8),
    "transformer_lm_big": _arch(12, 1024, 4096, 16, **LM),
    "transformer_lm_wiki103": _arch(16, 1024, 4096, 8, **WIKI103),
    "transformer_lm_baevski_wiki103": _arch(16, 1024, 4096, 8, **WIKI103),
    "transformer_lm_gbw": _arch(12, 512, 4096, 16, **LM, no_decoder_final_norm=True),
    "transformer_lm_gpt": _arch(12, 768, 3072, 12, **GPT2),
    "transformer_lm_gpt2_tiny": _arch(2, 64, 64, 1, **GPT2),
    "transformer_lm_gpt2_small": _arch(24, 1024, 4096, 16, **GPT2),
    "transformer_lm_gpt2_medium": _arch(36, 1280, 5120, 20, **GPT2),
    "transformer_lm_gpt2_big": _arch(48, 1600, 6400, 25, **GPT2),
    "transformer_lm_gpt2_big_wide": _arch(24, 2048, 8192, 32, **GPT2),
    "transformer_lm_gpt2_bigger": _arch(48, 2048, 8192, 32, **GPT2),
    "transformer_lm_gpt3_small": _arch(12, 768, 3072, 12, **GPT3),
    "transformer_lm_gpt3_medium": _arch(24, 1024, 4096, 16, **GPT3),
    "transformer_lm_gpt3_large": _arch(24, 1536, 6144, 16, **GPT3),
    "transformer_lm_gpt3_xl": _arch(24, 2048, 8192, 32, **GPT3),
    "transformer_lm_gpt3_2_7": _arch(32, 2560, 10240, 32, **GPT3),
    "transformer_lm_gpt3_6_7": _arch(32, 4096, 16384, 32, **GPT3),
    "transformer_lm_gpt3_13": _arch(40, 5120, 20480, 40, **GPT3),
    "transformer_lm_gpt3_175": _arch(96, 12288, 49152, 96, **GPT3),
}
ARCHITECTURE_ALIASES = {"bart": "bart_large", "mbart": "mbart_large"}

_PLUG_IN = ("2x", "4x", "9x", "12e12d_9xeq", "18_18", "24_24", "base18L")
PRESETS_OF = {
    "transformer": "base",
    "transformer_wmt_en_de": "base",
    "transformer_vaswani_wmt_en_de_big": "big",
    "transformer_IT2": "it2",
    "transformer_IT2_dist": "it2_dist",
    "roformer_IT2": "roformer_it2",
    "roformer_IT2_dist": "roformer_it2_dist",
    "aliformer_IT2": "aliformer_it2",
    "aliformer_IT2_dist": "aliformer_it2_dist",
    **{f"transformer_{size}": f"transformer_{size}" for size in _PLUG_IN},
}
"""Architectures that are presets of dstrain's."""

REMARKS = {
    "transformer_align": "alignment heads have no counterpart: the model is without them",
    "transformer_wmt_en_de_big_align": "alignment heads have no counterpart: the model is without them",
    "roformer_IT2": "until 2024-06 this name gave no positions at all without --rope-args; dstrain rotates",
    "roformer_IT2_dist": "until 2024-06 this name gave no positions at all without --rope-args; dstrain rotates",
    "aliformer_IT2": "this name gave no positions at all without --alibi-args; dstrain applies ALiBi",
    "aliformer_IT2_dist": "this name gave no positions at all without --alibi-args; dstrain applies ALiBi",
    "transformer_lm_wiki103": "adaptive input and softmax have no counterpart: one matrix each instead",
    "transformer_lm_baevski_wiki103": "adaptive input and softmax have no counterpart: one matrix each instead",
    **{
        f"transformer_{size}": "this plug-in's name says nothing of activation and sharing: give them as the training did"
        for size in _PLUG_IN
    },
}


class Settings:
    """Options of the model: as given, else as the architecture says, else fairseq's defaults."""

    def __init__(self, command: Command) -> None:
        arch = command.text("arch")
        if arch is None:
            raise ImportFormatError(f"the command line names no --arch; known are {', '.join(ARCHITECTURES)}")
        self.arch = ARCHITECTURE_ALIASES.get(arch, arch)
        if self.arch not in ARCHITECTURES:
            raise ImportFormatError(f"--arch {arch} is not known; {nearest(arch, ARCHITECTURES)}")
        self.command = command
        self._arch = ARCHITECTURES[self.arch]

    @property
    def decoder_only(self) -> bool:
        """Whether this is a language model."""
        return self.arch.startswith("transformer_lm")

    def switch(self, name: str) -> bool:
        """Whether it is on."""
        return self.command.has(name) or bool(self._arch.get(name, False))

    def integer(self, name: str) -> int:
        """A whole number."""
        value = self.command.integer(name)
        return int(self._default(name, self.integer)) if value is None else value

    def number(self, name: str) -> float:
        """A number."""
        value = self.command.number(name)
        return float(self._default(name, self.number)) if value is None else value

    def text(self, name: str) -> str:
        """A word."""
        return self.command.text(name) or str(self._default(name, self.text))

    def _default(self, name: str, read: Any) -> Any:
        if name in self._arch:
            return self._arch[name]
        return read(INHERITED[name]) if name in INHERITED else DEFAULTS[name]
