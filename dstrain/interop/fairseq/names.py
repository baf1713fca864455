"""The key table: names of fairseq's weights and modules, those of its fork included -> canonical names.

Torch-free, because command lines name adapted modules, too.
"""

from __future__ import annotations

import re

LAYER_MODULES = {
    "self_attn": "self_attention",
    "self_attn_layer_norm": "self_attention_norm",
    "encoder_attn": "cross_attention",
    "encoder_attn_layer_norm": "cross_attention_norm",
    "fc1": "feed_forward.up_proj",
    "fc2": "feed_forward.down_proj",
    "glu": "feed_forward",
    "final_layer_norm": "feed_forward_norm",
}
"""Modules of a layer."""
_EMBEDDING_MODULES = {
    "embed_tokens": "tokens",
    "embed_tokens.emb": "tokens.table",
    "embed_tokens.m": "tokens.table",
    "embed_tokens.up": "tokens.up_proj",
    "project_in_dim": "tokens.up_proj",
    "embed_positions": "positions",
    "layernorm_embedding": "norm",
}
STACK_MODULES = {
    **{f"encoder.{theirs}": f"source_embedding.{ours}" for theirs, ours in _EMBEDDING_MODULES.items()},
    **{f"decoder.{theirs}": f"target_embedding.{ours}" for theirs, ours in _EMBEDDING_MODULES.items()},
    "encoder.layer_norm": "encoder.final_norm",
    "decoder.layer_norm": "decoder.final_norm",
    "decoder.project_out_dim": "projection.output_proj",
    "decoder.output_projection": "projection",
}
"""Modules outside the layers."""
FUSED = {
    "in_proj": ("q_proj", "k_proj", "v_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "kv_proj": ("k_proj", "v_proj"),
    "up_gate_proj": ("up_proj", "gate_proj"),
}
"""One matrix of several canonical ones, in row order. With grouped heads the blocks differ in size."""
OLD_NORMS = {
    "encoder": ("self_attn_layer_norm", "final_layer_norm"),
    "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}
"""Names of `layer_norms.0`, `layer_norms.1`, ..."""
TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")
"""Matrices that may be tied."""
SINUSOIDS = re.compile(r"(?:encoder|decoder)\.embed_positions\.(?:weights|_float_tensor)")
"""What sinusoidal positions leave in a checkpoint."""
_LEFT_OUT = {
    re.compile(r"(?:encoder|decoder)\.version"): "the version of the format; the weights show which norms there are",
    SINUSOIDS: "sinusoids are computed",
    re.compile(r"classification_heads\..+"): "a classifier of sentences, which writes no text",
}
_OTHER_MODELS = {
    re.compile(r"module\..+"): "a name that DistributedDataParallel gave; save model.module.state_dict() as `model`",
    re.compile(r"(?:.+\.)?flat_param_\d+"): "a shard of a model that FSDP cut; save it again as one",
    re.compile(r"(?:.+\.)?partitions\.\d+\..+"): "a stage of pipeline parallelism, named by number; import a model in one piece",
    re.compile(r".+\.sentence_encoder\..+"): "an encoder of masked language modeling (RoBERTa, XLM-R), which writes no text",
    re.compile(r".+\.(?:convolutions|conv|subsample)\..+"): "a convolution, which dstrain does not have; import a transformer",
    re.compile(
        r".+\.(?:lstm\.|layers\.\d+\.)weight_[ih]h.*"
    ): "a recurrent layer, which dstrain does not have; import a transformer",
    re.compile(r".+\.experts\..+"): "a mixture of experts, which dstrain does not have; import a dense model",
    re.compile(r".+\.(?:scale|zero_point|centroids|assignments|counts)"): "quantized; import the model from before quantization",
}
_TARGETS = {
    "fc1": ("*.feed_forward.up_proj",),
    "fc2": ("down_proj",),
    "self_attn": ("*.self_attention.*",),
    "encoder_attn": ("*.cross_attention.*",),
    "embed_tokens": ("tokens",),
    "emb": ("table",),
    "m": ("table",),
    "up": ("*.tokens.up_proj",),
    "project_in_dim": ("*.tokens.up_proj",),
    "project_out_dim": ("output_proj",),
    "output_projection": ("projection",),
    **FUSED,
    "up_gate_proj": ("*.feed_forward.up_proj", "gate_proj"),
}


def left_out_reason(name: str) -> str | None:
    """Why a tensor is no part of an imported model; None if it is."""
    return next((reason for pattern, reason in _LEFT_OUT.items() if pattern.fullmatch(name)), None)


def refusal_of_name(name: str) -> str | None:
    """What a tensor shows that its model is, with a remedy, if it is none of ours; None if it may be."""
    return next((reason for pattern, reason in _OTHER_MODELS.items() if pattern.fullmatch(name)), None)


def canonical_name(name: str) -> str:
    """`decoder.layers.3.encoder_attn.k_proj.weight` -> `decoder.layers.3.cross_attention.k_proj.weight`; others as they are."""
    layer = re.fullmatch(r"((?:encoder|decoder)\.layers\.\d+)\.(\w+)\.(.+)", name)
    if layer and layer[2] in LAYER_MODULES:
        return f"{layer[1]}.{LAYER_MODULES[layer[2]]}.{layer[3]}"
    module, _, kind = name.rpartition(".")
    return f"{STACK_MODULES.get(module, module)}.{kind}"


def current_name(name: str) -> str:
    """An old name of a weight -> fairseq's name of it today."""
    if name == "decoder.embed_out":
        return "decoder.output_projection.weight"
    norm = re.fullmatch(r"((encoder|decoder)\.layers\.\d+)\.layer_norms\.(\d)\.(weight|bias)", name)
    if norm:
        return f"{norm[1]}.{OLD_NORMS[norm[2]][int(norm[3])]}.{norm[4]}"
    return re.sub(r"\.in_proj_(weight|bias)$", r".in_proj.\1", name)


def target_patterns(name: str) -> tuple[str, ...]:
    """The name of an adapted module, or a part of its path -> our `adapter.targets`."""
    if "." in name:
        return (f"*{'.'.join(LAYER_MODULES.get(word, word) for word in name.split('.'))}*",)
    return _TARGETS.get(name, (name,))
