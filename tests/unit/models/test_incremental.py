"""Step-by-step decoding equals the teacher-forced model: padding, other rows, beams, prefixes, reordering, finished sentences."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dstrain.batch import Sequences
from dstrain.models.config import DecoderStackConfig, EncoderDecoderConfig
from dstrain.models.encoder_decoder import EncoderDecoder
from dstrain.ops.activation import ACTIVATIONS
from dstrain.ops.kernels import FIXED_LINEAR, kernels_by_name
from tests.kernels import kernels_here
from tests.unit.models.build import name_of, sequences, small_config, small_model, variants

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SOURCE = sequences(9, 1, 5, 6, seed=8)


def full(model: EncoderDecoder, source: Sequences, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.project(model(source, Sequences(tokens, torch.full((len(tokens),), tokens.shape[1]))).hidden)


def of_rows(source: Sequences, sentences: Tensor) -> Sequences:
    return Sequences(source.tokens[sentences], source.lengths[sentences])


KERNELS = [
    {},
    {"decoding_layers": "composed", "encoding_layers": "composed", "decoding_attention": "scaled_dot_product_attention"},
    *(
        {"decoding_layers": "composed", "encoding_layers": "composed", "fixed_linear": name}
        for name in kernels_here("fixed_linear")
    ),
]


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: "-".join(kernels.values()))
@pytest.mark.parametrize("max_length", [33, 128])
def test_prepared_steps_over_several_blocks_of_keys(kernels: dict[str, str], max_length: int) -> None:
    """After 18 positions at once, in both layouts of the cache, and with rows that move and leave."""
    model = small_model()
    tokens = torch.cat([torch.full((4, 1), 2), torch.randint(4, 41, (4, 32), generator=torch.Generator().manual_seed(1))], dim=1)
    expected = full(model, SOURCE, tokens)
    with kernels_by_name(kernels, "cpu", torch.float32):
        decoder = model.prepared()
        state = decoder.start(SOURCE, num_sentences=4, rows_per_sentence=1, max_length=max_length)
        torch.testing.assert_close(decoder.step(tokens[:, :18], state), expected[:, :18], **CLOSE)
        for position in range(18, 33):
            found = decoder.step(tokens[:, position : position + 1], state)
            torch.testing.assert_close(found[:, 0], expected[:, position], **CLOSE)
            if position in (19, 30):
                state.keep(torch.arange(1, len(tokens)))
                tokens, expected = tokens[1:], expected[1:]


@pytest.mark.parametrize("linear", [name for name in kernels_here("fixed_linear") if name != "linear"])
def test_a_prepared_model_keeps_the_weights_of_that_moment(linear: str) -> None:
    """Of a copied matrix; plain ones are not copied. A model in training is not prepared: its dropout is on."""
    model = small_model()
    tokens = torch.full((4, 1), 2)
    with FIXED_LINEAR.forced(linear):
        decoder = model.prepared()
    before = decoder.step(tokens, decoder.start(SOURCE, num_sentences=4, rows_per_sentence=1, max_length=2))
    with torch.no_grad():
        model.projection.weight.zero_()
    assert before.any()
    assert not model.project(torch.ones(1, model.config.model_dim)).any()
    assert decoder.step(tokens, decoder.start(SOURCE, num_sentences=4, rows_per_sentence=1, max_length=2)).any()
    model.train()
    assert model.prepared() is model


@pytest.mark.parametrize("config", variants(), ids=name_of)
def test_beams_with_reordering_and_finished_sentences(config: EncoderDecoderConfig) -> None:
    """A made-up search: at every step rows continue other rows of their sentence, and now and then a sentence leaves."""
    generator = torch.Generator().manual_seed(4)
    model, beams = small_model(config), 3
    sentences = torch.arange(4)
    history = torch.full((4 * beams, 1), 2)
    state = model.start(SOURCE, num_sentences=4, rows_per_sentence=beams, max_length=12)
    for step in range(12):
        logits = model.step(history[:, -1:], state)
        expected = full(model, of_rows(SOURCE, sentences.repeat_interleave(beams)), history)
        torch.testing.assert_close(logits[:, 0], expected[:, -1], **CLOSE)
        within = torch.randint(0, beams, (len(sentences), beams), generator=generator)
        rows = (torch.arange(len(sentences))[:, None] * beams + within).flatten()
        state.reorder(rows)
        history = torch.cat([history[rows], torch.randint(4, 41, (len(rows), 1), generator=generator)], dim=1)
        if step in {3, 7}:
            staying = torch.tensor([0, 2, 3] if step == 3 else [1, 2])
            state.keep(staying)
            sentences = sentences[staying]
            history = history.view(-1, beams, history.shape[1])[staying].flatten(0, 1)


@pytest.mark.parametrize("chunks", [[6], [1, 5], [3, 1, 2], [2, 4]])
def test_several_positions_in_one_step(chunks: list[int]) -> None:
    model = small_model()
    tokens = torch.cat([torch.full((4, 1), 2), sequences(5, 5, 5, 5, seed=9).tokens], dim=1)
    state = model.start(SOURCE, num_sentences=4, rows_per_sentence=1, max_length=6)
    logits = torch.cat([model.step(part, state) for part in tokens.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(logits, full(model, SOURCE, tokens), **CLOSE)


def test_sources_without_padding() -> None:
    model = small_model()
    source, tokens = sequences(5, 5), sequences(4, 4, seed=3).tokens
    state = model.start(source, num_sentences=2, rows_per_sentence=1, max_length=4)
    state.keep(torch.tensor([1]))
    steps = [model.step(tokens[1:, t : t + 1], state) for t in range(4)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full(model, source, tokens)[1:], **CLOSE)


def test_the_source_is_kept_once_a_sentence() -> None:
    """Five beams cost no copies of the source's keys and values."""
    model = small_model()
    state = model.start(SOURCE, num_sentences=4, rows_per_sentence=5, max_length=4)
    assert [tuple(key.shape) for key, _ in state.source] == [(4, 4, 9, 6)] * 2
    state.keep(torch.tensor([0, 3]))
    assert [tuple(value.shape) for _, value in state.source] == [(2, 4, 9, 6)] * 2
    assert state.target.num_rows == 10


def test_identity_reordering_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    state = model.start(SOURCE, num_sentences=4, rows_per_sentence=1, max_length=4)
    moved = []
    monkeypatch.setattr(state.target, "select", moved.append)
    state.reorder(torch.arange(4))
    assert moved == []
    state.reorder(torch.tensor([0, 1, 3, 3]))
    assert len(moved) == 1


def test_no_graph_is_kept() -> None:
    model = small_model()
    state = model.start(SOURCE, num_sentences=4, rows_per_sentence=1, max_length=2)
    assert not model.step(torch.full((4, 1), 2), state).requires_grad


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_a_copy_of_a_model_generates_as_the_model(activation: str) -> None:
    """Of every activation, by the kernel of the table; one that the kernels do not know, and a network, are called."""
    model = small_model(small_config(activation=activation))
    copied, unknown = deepcopy(model), deepcopy(model)
    for layer in unknown.decoder.layers:
        known = layer.feed_forward.activation
        layer.feed_forward.activation = partial(lambda known, x: known(x), known)
        layer.feed_forward = nn.Sequential(layer.feed_forward)
    tokens, steps = torch.full((4, 1), 2), []
    for each in (model, copied, unknown):
        decoder = each.prepared()
        steps.append(decoder.step(tokens, decoder.start(SOURCE, num_sentences=4, rows_per_sentence=1, max_length=2)))
    assert torch.equal(steps[0], steps[1])
    torch.testing.assert_close(steps[2], steps[0], **CLOSE)


def test_depths_that_share_a_layer_share_the_keys_of_the_source() -> None:
    model = small_model(small_config(decoder=DecoderStackConfig(depth=4, unique_layers=2, num_heads=4, ffn_dim=56)))
    for each in (model, model.prepared()):
        state = each.start(SOURCE, num_sentences=4, rows_per_sentence=1, max_length=2)
        assert [id(pair) for pair in state.source] == [id(pair) for pair in state.source[:2]] * 2
