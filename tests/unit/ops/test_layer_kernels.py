"""Layers in one call of C++ beside torch in float64: a step of a decoder, and whole sentences of an encoder."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from dstrain.nn.cache import LONG, KeyValueCache
from dstrain.nn.rotary import Rotation
from dstrain.ops.activation import ACTIVATIONS, identity
from dstrain.ops.bias import Alibi, causal_bias, padding_bias
from dstrain.ops.decoding_layers import DecodingStep
from dstrain.ops.encoding_layers import RowContext
from dstrain.ops.kernels import DECODING_LAYERS, ENCODING_LAYERS
from dstrain.ops.layer_parts import AttentionParts, FixedMap, LayerParts, NetworkParts
from dstrain.ops.norm import NormWeights
from dstrain.ops.rotary import CosSin
from tests.kernels import NEEDS_COMPILER

pytestmark = NEEDS_COMPILER
PLAIN = {"model_dim": 24, "heads": 3, "key_heads": 3, "head_dim": 8, "ffn_dim": 33, "activation": "relu", "gated": False}
SHAPES = {
    "odd": {**PLAIN, "model_dim": 5, "heads": 1, "key_heads": 1, "head_dim": 7},
    "16": {**PLAIN, "model_dim": 48, "heads": 2, "key_heads": 1, "head_dim": 16},
    "32": {**PLAIN, "model_dim": 128, "heads": 4, "key_heads": 4, "head_dim": 32, "ffn_dim": 256},
    "64": {**PLAIN, "model_dim": 64, "heads": 4, "key_heads": 2, "head_dim": 64},
    "128": {**PLAIN, "model_dim": 30, "heads": 2, "key_heads": 2, "head_dim": 128},
    **{name: {**PLAIN, "activation": name, "gated": index % 2 == 0} for index, name in enumerate(ACTIVATIONS)},
    "gated_relu": {**PLAIN, "gated": True},
    "large enough for a team of threads": {**PLAIN, "model_dim": 320, "heads": 5, "key_heads": 5, "head_dim": 64},
}


@pytest.fixture(params=[1, 4], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of both kinds of kernel."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Draw:
    """Weights of float64 that float32 holds exactly."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).double()

    def map(self, outputs: int, inputs: int, bias: bool) -> FixedMap:
        return FixedMap(self.normal(outputs, inputs, scale=inputs**-0.5), self.normal(outputs) if bias else None)

    def norm(self, kind: str, size: int) -> NormWeights | type[identity]:
        if kind == "none":
            return identity
        centered = kind == "layer_norm"
        return NormWeights(1 + self.normal(size, scale=0.1), self.normal(size) if centered else None, 1e-5, centered)

    def layer(self, shape: dict, *, norm: str, pre_norm: bool, source: bool, bias: bool) -> LayerParts:
        size, head_dim, heads, key_heads = (shape[name] for name in ("model_dim", "head_dim", "heads", "key_heads"))

        def attention(input_heads: int) -> AttentionParts:
            maps = self.map(input_heads * head_dim, size, bias), self.map(size, heads * head_dim, bias)
            return AttentionParts(self.norm(norm, size), *maps, key_heads, head_dim)

        first = self.map(shape["ffn_dim"] * (2 if shape["gated"] else 1), size, bias)
        last = self.map(size, shape["ffn_dim"], bias)
        activation = ACTIVATIONS[shape["activation"]]
        network = NetworkParts(self.norm(norm, size), first, last, activation, shape["gated"])
        return LayerParts(attention(heads + 2 * key_heads), attention(heads) if source else None, network, pre_norm)


def to_float(part: object) -> object:
    """The same in float32."""
    if isinstance(part, Tensor):
        return part.float()
    return type(part)(*map(to_float, part)) if isinstance(part, tuple) else part


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def rotation(draw: Draw, rows: int | None, width: int, pairs: int, layout: str) -> Rotation:
    """rows: None if all are rotated alike."""
    angles = draw.normal(*([] if rows is None else [rows, 1]), width, pairs)
    return Rotation(CosSin(angles.cos().float().double(), angles.sin().float().double()), layout)


def as_float(of: Rotation | None) -> Rotation | None:
    return None if of is None else Rotation(CosSin(*(part.float() for part in of.cos_sin)), of.layout)


def step_of(layers: list[LayerParts], kernel: str, x: Tensor, shape: dict, case: dict) -> list[Tensor]:
    """Three steps, with rows that change places between them; the hidden states after each."""
    cache = KeyValueCache(
        depth=len(layers),
        num_rows=len(x),
        num_heads=shape["key_heads"],
        max_length=case["max_length"],
        head_dim=shape["head_dim"],
        like=x[:, 0],
    )
    with DECODING_LAYERS.forced(kernel):
        run = DECODING_LAYERS.choose(x.device, x.dtype)(layers)
    hidden = []
    for at in range(3):
        bias = None if case["bias"] is None else case["bias"][..., : at + 1].to(x.dtype)
        turned = case["rotation"] and case["rotation"][at]
        turned = as_float(turned) if x.dtype == torch.float32 else turned
        source = [tuple(part.to(x.dtype) for part in pair) for pair in case["source"]]
        step = DecodingStep(cache, turned, cache.block_bias(bias), source, case["source_bias"].to(x.dtype))
        hidden.append(run(x[:, at].clone(), step))
        cache.advance(1)
        cache.select(torch.arange(len(x)).roll(1))
    return hidden


@pytest.mark.parametrize("rows_per_sentence", [1, 5, 37])
@pytest.mark.parametrize("max_length", [20, LONG + 1])
@pytest.mark.parametrize("name", SHAPES)
def test_a_step_of_a_decoder(name: str, max_length: int, rows_per_sentence: int) -> None:
    shape, draw, sentences, number = SHAPES[name], Draw(), 2, list(SHAPES).index(name)
    rows = sentences * rows_per_sentence
    norm, bias = ("layer_norm", "rms_norm", "none")[number % 3], bool(number % 2)
    layer, other = (draw.layer(shape, norm=norm, pre_norm=number % 4 < 2, source=number % 5 > 0, bias=bias) for _ in range(2))
    layers, key_heads, head_dim = [layer, other, layer], shape["key_heads"], shape["head_dim"]
    source = [draw.normal(2, sentences, key_heads, 16, head_dim).unbind(0) for _ in layers] if number % 5 > 0 else []
    layout = ("half_split", "interleaved")[number % 2]
    pairs = max(head_dim // 4, 1)
    case = {
        "max_length": max_length,
        "bias": draw.normal(rows, shape["heads"], 1, 3) if number % 3 == 1 else None,
        "rotation": [rotation(draw, rows if number % 3 else None, 1, pairs, layout) for _ in range(3)] if number % 4 else None,
        "source": source,
        "source_bias": draw.normal(sentences * key_heads, 1, 16) if number % 2 else torch.zeros(1, 1, 1),
    }
    x = draw.normal(rows, 3, shape["model_dim"])
    expected = step_of(layers, "composed", x, shape, case)
    found = step_of([to_float(each) for each in (layer, other)] + [to_float(layer)], "native", x.float(), shape, case)
    for ours, exact in zip(found, expected, strict=True):
        near(ours, exact)


@pytest.mark.parametrize("kind", ["plain", "padded", "causal", "alibi", "of each row"])
@pytest.mark.parametrize("name", SHAPES)
def test_sentences_of_an_encoder(name: str, kind: str) -> None:
    shape, draw, number = SHAPES[name], Draw(), list(SHAPES).index(name)
    norm = ("rms_norm", "none", "layer_norm")[number % 3]
    layers = [draw.layer(shape, norm=norm, pre_norm=number % 4 < 2, source=False, bias=bool(number % 2)) for _ in range(2)]
    sentences, width, heads = 3, 11, shape["heads"]
    lengths, positions = torch.tensor([11, 1, 6]), torch.arange(width)
    bias = {
        "plain": None,
        "causal": None,
        "padded": padding_bias(lengths, width, torch.float64),
        "alibi": Alibi(tuple(0.5**h for h in range(1, heads + 1))).bias(positions, positions, torch.float64),
        "of each row": draw.normal(sentences, heads, width, width) + causal_bias(width, width, torch.float64, lengths.device),
    }[kind]
    layout = ("half_split", "interleaved")[number % 2]
    turned = rotation(draw, sentences if number % 4 == 2 else None, width, max(shape["head_dim"] // 4, 1), layout)
    context = RowContext(bias, kind == "causal", turned if number % 4 else None)
    x = draw.normal(sentences, width, shape["model_dim"])
    with ENCODING_LAYERS.forced("composed"):
        expected = ENCODING_LAYERS.choose(x.device, x.dtype)(layers)(x.clone(), context)
    low = None if bias is None else bias.float().clamp_min(torch.finfo(torch.float32).min)
    with ENCODING_LAYERS.forced("native"):
        run = ENCODING_LAYERS.choose(x.device, torch.float32)([to_float(each) for each in layers])
    near(run(x.float(), RowContext(low, context.causal, as_float(context.rotation))), expected)


def test_a_step_beyond_the_cache_is_an_error() -> None:
    layer = to_float(Draw().layer(PLAIN, norm="layer_norm", pre_norm=True, source=False, bias=True))
    cache = KeyValueCache(depth=1, num_rows=2, num_heads=3, max_length=16, head_dim=8, like=torch.empty(0))
    cache.length = 16
    with DECODING_LAYERS.forced("native"):
        run = DECODING_LAYERS.choose(torch.device("cpu"), torch.float32)([layer])
    with pytest.raises(IndexError, match="position 16 of a cache of 16"):
        run(torch.zeros(2, 24), DecodingStep(cache, None, torch.zeros(1, 1, 17), [], torch.zeros(1, 1, 1)))


@pytest.mark.parametrize("name", ["32", "large enough for a team of threads"])
def test_a_row_is_the_same_in_any_batch(name: str, threads: int) -> None:
    """To the last bit, by any number of threads."""
    shape, draw = SHAPES[name], Draw()
    layers = [to_float(draw.layer(shape, norm="layer_norm", pre_norm=True, source=False, bias=True)) for _ in range(2)]
    x, case = draw.normal(70, 3, shape["model_dim"]).float(), {"max_length": 9, "bias": None, "rotation": None, "source": []}
    case["source_bias"] = torch.zeros(1, 1, 1)
    run = partial(step_of, layers, "native", shape=shape, case=case)
    alone = [run(x[row : row + 1])[0] for row in (0, 7, 69)]
    few, all_rows = run(x[:9])[0], run(x)[0]
    torch.set_num_threads(1)
    assert torch.equal(all_rows, run(x)[0])
    assert torch.equal(all_rows[:9], few)
    assert [torch.equal(all_rows[row], found[0]) for row, found in zip((0, 7, 69), alone, strict=True)] == [True] * 3


def test_what_is_not_a_number_stays_so() -> None:
    """In its own row only."""
    draw = Draw()
    layer = to_float(draw.layer(PLAIN, norm="layer_norm", pre_norm=True, source=False, bias=True))
    x = draw.normal(3, 4, 24).float()
    with ENCODING_LAYERS.forced("native"):
        run = ENCODING_LAYERS.choose(x.device, x.dtype)([layer])
    expected = run(x.clone(), RowContext(None, False, None))
    x[1, 2, 3] = torch.nan
    found = run(x, RowContext(None, False, None))
    assert torch.isnan(found[1]).all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
