"""Every variant is built on the meta device, and what it computes depends on no default device or dtype of the moment."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.lora import inject
from dstrain.errors import BundleError
from dstrain.models.config import DecoderStackConfig, EncoderDecoderConfig, ModelConfig, StackConfig
from dstrain.models.factory import Model, Projections, build_model, initial_values
from dstrain.models.weights import TensorSource, load_canonical, to_canonical
from tests.unit.models.build import VOCABULARY, sequences, small_config, variants

SOURCE, TARGET = sequences(9, 6), sequences(8, 11)
ROTARY: list[dict[str, Any]] = [
    {},
    {"layout": "interleaved", "scaling": {"kind": "linear", "factor": 2.0}},
    {"scaling": {"kind": "yarn", "factor": 4.0, "original_length": 8}},
    {"scaling": {"kind": "dynamic_yarn", "factor": 1.0, "original_length": 4}},
    {"scaling": {"kind": "dynamic_ntk", "factor": 2.0, "original_length": 3}},
]
POSITIONS: list[dict[str, Any]] = [
    *({"kind": "rotary", **changes} for changes in ROTARY),
    {"kind": "alibi"},
    {"kind": "alibi", "encoder": "asymmetric"},
]
ALL: Any = TypeAdapter(ModelConfig)


def with_position(position: dict[str, Any]) -> EncoderDecoderConfig:
    """6 and 3 heads: ALiBi's slopes of 6 are no powers of two."""
    stacks = {
        "encoder": StackConfig(depth=2, num_heads=6, ffn_dim=40).model_dump(),
        "decoder": DecoderStackConfig(depth=2, num_heads=3, ffn_dim=56).model_dump(),
    }
    config: EncoderDecoderConfig = ALL.validate_python({**small_config().model_dump(), **stacks, "position": position})
    return config


FACTORIZED_AND_STACKED = small_config().model_dump() | {
    "embedding": {"kind": "factorized", "dim": 8},
    "encoder": StackConfig(depth=4, unique_layers=2, num_heads=3, ffn_dim=40, feed_forward="gated").model_dump(),
}
CONFIGS = [*variants()[::3], *map(with_position, POSITIONS), ALL.validate_python(FACTORIZED_AND_STACKED)]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As DeepSpeed's and Transformers' construction contexts set it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def filled(config: Any, projections: Projections = "fused") -> Model:
    """Built without memory, then filled tensor by tensor."""
    model = build_model(config, VOCABULARY, projections=projections, seed=None)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
    load_canonical(model, initial_values(model, VOCABULARY, 7))
    return model.eval()


@torch.no_grad()
def logits(model: Model) -> Tensor:
    """Of a padded batch."""
    result: Tensor = model.project(model(SOURCE, TARGET).hidden)
    return result


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.position.kind}-{config.embedding.kind}")
def test_defaults_of_the_moment_change_nothing(config: Any) -> None:
    plain = build_model(config, VOCABULARY, seed=7).eval()
    expected, weights = logits(plain), to_canonical(plain)
    for context in (nullcontext(), torch.device("meta"), default_dtype(torch.bfloat16), torch.inference_mode()):
        with context:
            model = filled(config)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in to_canonical(model).items())
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("position", POSITIONS[:3], ids=["plain", "linear", "yarn"])
def test_rotary_tables_are_exact_after_construction_in_bf16(position: dict[str, Any]) -> None:
    """The frequencies of bf16 construction would be 0.4 rad off at position 1,000."""
    like, tables = torch.zeros(1), []
    for dtype in (torch.float32, torch.bfloat16):
        with default_dtype(dtype), torch.device("meta"):
            bias = build_model(with_position(position), VOCABULARY, seed=None).source_attention_bias
        rotary = bias.rotary
        assert rotary is not None
        tables.append(rotary.rotation(0, 1001, lambda: torch.tensor([[1001]]), like).cos_sin)
    assert torch.equal(tables[0].cos, tables[1].cos)
    assert torch.equal(tables[0].sin, tables[1].sin)


@pytest.mark.parametrize("position", [{"kind": "rotary"}, {"kind": "sinusoidal"}, {"kind": "alibi"}], ids=lambda p: p["kind"])
def test_tables_made_under_inference_mode_serve_training(position: dict[str, Any]) -> None:
    model = filled(with_position(position)).train()
    with torch.inference_mode():
        model(SOURCE, TARGET)
    model.project(model(SOURCE, TARGET).hidden).sum().backward()


def test_ties_survive_the_meta_device() -> None:
    model = filled(small_config(embedding=small_config().embedding.model_copy(update={"tie": "all"})))
    assert model.projection.weight is model.target_embedding.tokens.weight


def test_an_adapter_over_a_meta_base_computes_what_the_base_does() -> None:
    config = with_position({"kind": "rotary"})
    base = build_model(config, VOCABULARY, projections="separate", seed=7).eval()
    model = build_model(config, VOCABULARY, projections="separate", seed=None).eval()
    adapter = LoraConfig(rank=3, alpha=6, targets=("*",), dora=True)
    load_canonical(model, inject(model, adapter, TensorSource(to_canonical(base)), seed=5))
    assert torch.equal(logits(model), logits(base))
    magnitudes = [name for name in to_canonical(model) if name.endswith("lora_magnitude")]
    assert magnitudes
    for name in magnitudes:
        weight = to_canonical(base)[name.replace("lora_magnitude", "weight")]
        assert torch.equal(to_canonical(model)[name], torch.linalg.vector_norm(weight, dim=1))


def test_a_source_may_be_read_again() -> None:
    model = build_model(small_config(), VOCABULARY, seed=None)
    source = initial_values(model, VOCABULARY, 3)
    for name in source.names():
        first = source.read(name)
        assert tuple(first.shape) == source.shape(name)
        assert torch.equal(first, source.read(name))


def test_a_source_of_another_model_fills_nothing() -> None:
    model = build_model(small_config(), VOCABULARY, seed=None)
    with pytest.raises(BundleError, match="the weights do not fit the model: missing: "):
        load_canonical(model, TensorSource({}))
    assert all(isinstance(parameter, nn.Parameter) and parameter.is_meta for parameter in model.parameters())
