"""fairseq's options that dstrain reads: kind and default of each, the values that an architecture sets, and inheritance.

Checkpoints hold these options in a namespace, command lines in words. `Settings` reads both, model.py converts both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dstrain.errors import ImportFormatError, nearest

Kind = type[int | float | str | bool | list | dict]  # type: ignore[type-arg]


@dataclass(frozen=True)
class Option:
    """kind: of its value; bool has none on the command line, dict is a JSON object. default: None if there is none."""

    kind: Kind
    default: Any = None


_NAMES: Mapping[Kind, str] = {
    int: """
        encoder_embed_dim=512 encoder_ffn_embed_dim=2048 encoder_layers=6 encoder_attention_heads=8 decoder_embed_dim
        decoder_ffn_embed_dim decoder_layers=6 decoder_attention_heads=8 decoder_input_dim decoder_output_dim
        encoder_kv_attention_heads decoder_kv_attention_heads encoder_recurrent_stacking decoder_recurrent_stacking
        encoder_factorized_embed_dim decoder_factorized_embed_dim max_source_positions=1024 max_target_positions=1024
        tokens_per_sample max_tokens batch_size distributed_world_size required_batch_size_multiple=8 warmup_updates
        total_num_update lr_period_updates force_anneal warmup_steps=0 hold_steps=0 decay_steps=0 fp16_scale_window max_update=0
        max_epoch=0 seed=1 ema_start_update=0 validate_interval=1 validate_interval_updates=0 save_interval=1
        save_interval_updates=0 keep_interval_updates=-1 keep_last_epochs=-1 keep_best_checkpoints=-1 patience=-1
        log_interval=100 replace_length=-1""",
    float: """
        encoder_layerdrop=0 decoder_layerdrop=0 dropout=0.1 attention_dropout=0 activation_dropout relu_dropout=0
        label_smoothing=0 rdrop_alpha=0 adam_eps=1e-8 weight_decay=0 warmup_init_lr=-1 end_learning_rate=0 power=1 min_lr=0 t_mult
        lr_shrink init_lr_scale=0.01 final_lr_scale=0.01 clip_norm=0 fp16_init_scale fp16_scale_tolerance min_loss_scale
        stop_time_hours=0 ema_decay=0.9999 mask=0 mask_random=0 insert=0 rotate=0.5 poisson_lambda=3 permute_sentences=-1""",
    str: """
        arch source_lang target_lang task bpe sentencepiece_model activation_fn=relu factorized_embed_activation_fn=linear
        decoder_output_activation_fn attn_implementation criterion=cross_entropy teacher_checkpoint_path language_tags
        optimizer=adam lr_scheduler=fixed ddp_backend zero_sharding best_checkpoint_metric=loss valid_subset=valid eval_bleu_detok
        eval_bleu_remove_bpe tensorboard_logdir wandb_project wandb_run_name mask_length=subword""",
    list: "lr=0.25 adam_betas=0.9,0.999 update_freq=1 phase_ratio",
    dict: "rope_args yarn_args alibi_args lora_args kd_args eval_bleu_args",
    bool: """
        adam_stable amp bf16 cpu_offload decoder_learned_pos decoder_normalize_before decoder_use_glu decoder_use_rmsnorm
        encoder_learned_pos encoder_normalize_before encoder_use_glu encoder_use_rmsnorm eval_bleu eval_tokenized_bleu fp16
        layernorm_embedding length_normalize_loss maximize_best_checkpoint_metric memory_efficient_bf16 memory_efficient_fp16
        no_decoder_final_norm no_epoch_checkpoints no_scale_embedding no_token_positional_embeddings run_sanity_validation_steps
        sentence_avg share_all_embeddings share_decoder_input_output_embed store_ema truncate_source use_native_attention""",
}


def _option(kind: Kind, default: str) -> Option:
    if kind is bool or not default:
        return Option(kind, False if kind is bool else None)
    convert: Callable[[str], Any] = (lambda text: [float(part) for part in text.split(",")]) if kind is list else kind
    return Option(kind, convert(default))


OPTIONS = {
    name.partition("=")[0]: _option(kind, name.partition("=")[2]) for kind, names in _NAMES.items() for name in names.split()
}
INHERITED = {
    "decoder_embed_dim": "encoder_embed_dim",
    "decoder_ffn_embed_dim": "encoder_ffn_embed_dim",
    "encoder_input_dim": "encoder_embed_dim",  # no option of fairseq; a checkpoint's weights may have such a map
    "decoder_input_dim": "decoder_embed_dim",
    "decoder_output_dim": "decoder_embed_dim",
    "activation_dropout": "relu_dropout",
}
"""Options that take another one's value when they are missing."""


@dataclass(frozen=True)
class Settings:
    """Options by name: as given, else as the architecture has them, else inherited, else fairseq's default.

    explicit: values of their option's kind, True for an option without a value; None and an empty text count as missing. words:
    the values as a command line has them. decoder_only: a language model.
    """

    explicit: Mapping[str, Any]
    decoder_only: bool
    arch: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    _read: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        for values in (self.explicit, self.arch):
            if values.get(name) not in (None, ""):
                return values[name]
        return self[INHERITED[name]] if name in INHERITED else OPTIONS[name].default

    def has(self, name: str) -> bool:
        """Whether the option is explicit, not the architecture's or a default."""
        self._read.add(name)
        return self.explicit.get(name) not in (None, "")

    def shown(self, name: str) -> str:
        """The option as a user writes it."""
        return f"{dashed(name)} {self.words.get(name, '')}".rstrip()

    def unread(self) -> Iterator[str]:
        """Explicit options that nothing has read."""
        return (name for name in self.explicit if name not in self._read)


def dashed(name: str) -> str:
    """`max_tokens` -> `--max-tokens`"""
    return f"--{name.replace('_', '-')}"


class SettingsReader:
    """How a checkpoint is read: as the code that trained it computed. A setting that a model here cannot have is an error.

    A command line is read in another way (command_line/notes.py): as the options say, with notes on all that differs.
    """

    faithful = True

    def refusal(self, name: str, value: object, reason: str) -> ImportFormatError:
        """The error for a setting that cannot be read."""
        return ImportFormatError(f"the checkpoint has {name} = {value!r}, which dstrain cannot import: {reason}")

    def unequal(self, name: str, settings: Settings, reason: str) -> None:
        """Report that encoder and decoder differ in an option that is one for both here. reason: which key that is."""
        raise self.refusal(
            f"decoder_{name}",
            settings[f"decoder_{name}"],
            f"it differs from encoder_{name} = {settings[f'encoder_{name}']!r}, and {reason}",
        )

    def ignored(self, name: str, value: Mapping[str, Any], known: set[str]) -> None:
        """Report keys of a JSON value that fairseq does not read."""

    def reads(self, option: str, remark: str, **values: object) -> None:
        """Say how an option was read."""

    def differ(self, option: str, remark: str, **values: object) -> None:
        """Note that fairseq computed something other than the option's meaning."""

    def lack(self, option: str, remark: str, **values: object) -> None:
        """Note an option that a recipe cannot express."""


def _arch(layers: int, dim: int, ffn: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"encoder_embed_dim": dim, "encoder_ffn_embed_dim": ffn}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": layers, f"{side}_attention_heads": heads}
    return {**sizes, **more}


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
ROTARY: dict[str, Any] = {"rope_args": {}, "no_token_positional_embeddings": True}
ALIBI: dict[str, Any] = {"alibi_args": {}, "no_token_positional_embeddings": True}
LM = {"decoder_normalize_before": True}
GPT2 = {**LM, "activation_fn": "gelu", "attention_dropout": 0.1}
GPT3 = {**LM, "activation_fn": "gelu", "dropout": 0.0, "decoder_learned_pos": True, "share_decoder_input_output_embed": True}
WIKI103 = {**LM, "dropout": 0.3, "attention_dropout": 0.1, "activation_dropout": 0.1, "no_decoder_final_norm": True}

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
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
    "mbart_base_wmt20": {**_arch(6, 768, 3072, 12, **BART), "layernorm_embedding": False},
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
"""Architectures that dstrain has as presets."""

ARCHITECTURE_REMARKS = {
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


def architecture(arch: str | None) -> tuple[str, Mapping[str, Any]]:
    """The full name of an architecture and the options that it sets. ImportFormatError if it is unknown."""
    if arch is None:
        raise ImportFormatError(f"the command line names no --arch; known are {', '.join(ARCHITECTURES)}")
    name = ARCHITECTURE_ALIASES.get(arch, arch)
    if name not in ARCHITECTURES:
        raise ImportFormatError(f"--arch {arch} is not known; {nearest(arch, ARCHITECTURES)}")
    return name, ARCHITECTURES[name]
