"""Compiled layers over a tensor group: the gradients that its ranks share."""

from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from dstrain.models.config import ModelConfig
from dstrain.models.factory import build_model
from dstrain.nn.compiling import compile_layers
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.parallel.mesh import Mesh, build_mesh
from tests.batches import collate
from tests.parallel.setting import VOCABULARY, packed_on, sentences
from tests.parallel.tensor_parallel import MODELS


def compiled_layers(mesh: Mesh, *, model: str, tensor: int, sequence: int) -> dict[str, Any]:
    """The largest differences of loss and gradients to plain layers, and the largest gradient, by parameter."""
    shaped = build_mesh("cpu", tensor=tensor, sequence=sequence)
    config: ModelConfig = TypeAdapter(ModelConfig).validate_python(MODELS[model])

    def outcome(backend: str | None) -> dict[str, Tensor]:
        built = build_model(config, VOCABULARY, seed=1, tensor=shaped.tensor, sequence=shaped.sequence).train()
        if backend is not None:
            compile_layers(built, "layers", backend=backend)
        batch = collate(sentences(3), kind=built.kind, packed=packed_on(shaped))
        batch = batch.share(shaped.sequence.rank, shaped.sequence.size)
        for _ in range(2):  # the first time nothing is compiled
            built.zero_grad()
            loss = build_cross_entropy(CrossEntropyConfig())(built, batch).loss_sum
            loss.backward()
        return {"loss": loss.detach(), **{name: value.grad for name, value in built.named_parameters() if value.grad is not None}}

    plain, compiled = outcome(None), outcome("aot_eager")
    assert plain.keys() == compiled.keys()
    return {name: [float((value - compiled[name]).abs().max()), float(value.abs().max())] for name, value in plain.items()}
