"""Small models of every variant, their batches, and the storages that live while they run."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dstrain.batch import Batch
from dstrain.data.batching.collate import PackedSize
from dstrain.engine.construction import COMPUTE_DTYPES
from dstrain.estimate.workload import ParallelLayout, Sharding, Workload
from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.models.factory import Model, build_model
from dstrain.nn.checkpointing import checkpoint_layers, tile_feed_forward
from dstrain.nn.dropout import seed_masks
from dstrain.nn.position import SinusoidalPositions
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.cross_entropy import CrossEntropy
from tests.batches import EOS, collate

STACK: dict[str, Any] = {"depth": 2, "num_heads": 4, "ffn_dim": 256}
GATED = {**STACK, "feed_forward": "gated", "num_kv_heads": 2}
PAIR: dict[str, Any] = {
    "kind": "encoder_decoder",
    "model_dim": 64,
    "encoder": STACK,
    "decoder": STACK,
    "dropout": 0.0,
    "embedding": {"kind": "plain", "tie": "all"},
}
SINGLE: dict[str, Any] = {
    "kind": "decoder_only",
    "model_dim": 64,
    "decoder": STACK,
    "dropout": 0.0,
    "norm_order": "pre",
    "embedding": {"kind": "plain", "tie": "decoder"},
}
ROTARY, RMS = {"position": {"kind": "rotary"}}, {"norm": {"kind": "rms_norm"}, "activation": "silu"}
MODELS: dict[str, dict[str, Any]] = {
    "post-norm": PAIR,
    "pre-norm, dropout": {**PAIR, "norm_order": "pre", "dropout": 0.1},
    "gelu, all dropouts": {**PAIR, "activation": "gelu", "dropout": 0.1, "activation_dropout": 0.1, "attention_dropout": 0.1},
    "rotary, gated, grouped heads, RMSNorm": {**SINGLE, **ROTARY, **RMS, "decoder": GATED},
    "the same with an encoder": {
        **{**PAIR, **ROTARY, **RMS},
        "encoder": GATED,
        "decoder": {**GATED, "num_cross_kv_heads": 1},
    },
    "half rotary, gated relu": {
        **SINGLE,
        "position": {"kind": "rotary", "fraction": 0.5},
        "decoder": {**STACK, "feed_forward": "gated"},
    },
    "alibi": {**PAIR, "position": {"kind": "alibi"}},
    "factorized": {
        **PAIR,
        "embedding": {"kind": "factorized", "tie": "all", "dim": 16, "activation": "gelu"},
        "decoder": {**STACK, "output_activation": "tanh"},
    },
    "untied, output_dim, embedding norm": {
        **PAIR,
        "position": {"kind": "learned"},
        "embedding": {"kind": "plain", "tie": "none", "output_dim": 32, "norm": True},
    },
    "recurrent, layer drop": {**PAIR, "encoder": {**STACK, "unique_layers": 1, "layer_drop": 0.1}},
    "linear activation": {**PAIR, "activation": "linear", "decoder": {**STACK, "feed_forward": "gated"}},
}
VOCABULARY = VocabularySizes(source=1000, target=1000)
CHUNK = 64
NO_SHARDING = Sharding("zero0", 0, 4, 4, 0, False, 0, 0, 0, 0, False, False, True)


class LiveStorages(TorchDispatchMode):
    """Counts bytes of the storages that operations make while they live. ignored: data pointers, such as of parameters."""

    def __init__(self, ignored: set[int]) -> None:
        super().__init__()
        self.ignored = ignored
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for storage in (each.untyped_storage() for each in tree_leaves(result) if isinstance(each, Tensor)):
            if storage.data_ptr() not in self.ignored:
                self._storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    @property
    def bytes(self) -> int:
        self._storages = {key: each for key, each in self._storages.items() if not each[0].expired()}
        return sum(size for _, size in self._storages.values())


class Case:
    """A model in training mode with a batch of equal sentences, and the workload and the layout that describe them."""

    def __init__(
        self,
        name: str,
        precision: Any,
        *,
        rows: int,
        source: int,
        target: int,
        checkpointing: Any = "none",
        packed: bool = False,
        tiles: int = 1,
    ) -> None:
        config: Any = TypeAdapter(ModelConfig).validate_python(MODELS[name])
        source = source if config.kind == "encoder_decoder" else 1
        self.model: Model = build_model(config, VOCABULARY, seed=1).train().to(COMPUTE_DTYPES[precision])
        checkpoint_layers(self.model, checkpointing)
        pair = ([7] * (source - 1) + [EOS], [8] * (target - 1) + [EOS])
        self.batch: Batch = collate([pair] * rows, kind=config.kind, packed=PackedSize() if packed else None)
        self.objective = CrossEntropy(CrossEntropyConfig(chunk_tokens=CHUNK))
        self.workload = Workload(config, VOCABULARY, precision, "cross_entropy", CHUNK, 10**9, source, target)
        tile_feed_forward(self.model, tiles)
        self.layout = ParallelLayout(1, 1, 1, rows * self.workload.row_length, checkpointing, NO_SHARDING, "cpu", packed, tiles)

    def loss(self) -> Tensor:
        seed_masks(1, 0)
        return self.objective(self.model, self.batch).loss_sum

    @property
    def own(self) -> set[int]:
        """Data pointers of what stays from one forward pass to the next: parameters, gradients, tables."""
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        positions = [module for module in self.model.modules() if isinstance(module, SinusoidalPositions)]
        tables = [table for module in positions for table in module._tables.values()]
        return {each.untyped_storage().data_ptr() for each in (*self.model.parameters(), *gradients, *tables)}


def saved_bytes(case: Case) -> int:
    """Bytes of the distinct storages that autograd saves in a forward pass, without parameters."""
    own, saved, alive = case.own, {}, []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.loss()
    return sum(saved.values())
