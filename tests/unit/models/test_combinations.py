"""Random combinations of all parts: what must hold of every model holds of each of them.

Step by step = at once, for beams that move and sentences that leave; padding and other rows change no row; later tokens change no
earlier ones; fused = separate projections; saved = loaded. The seeds are fixed, so a failure repeats.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dstrain.batch import Sequences
from dstrain.checkpoint.bundle import load_bundle, save_bundle
from dstrain.models.config import DecoderOnlyConfig, EncoderDecoderConfig
from dstrain.models.factory import Model, build_model
from dstrain.models.weights import TensorSource, load_canonical, to_canonical
from dstrain.ops.kernels import kernels_by_name
from dstrain.protocols import Generative
from tests.batches import decoder_hidden
from tests.kernels import kernels_here
from tests.unit.models.build import VOCABULARY, random_config, sequences, small_model

SOURCE = sequences(9, 1, 5, 6, seed=8)
CONFIGS = [random_config(seed) for seed in range(60)]


def name_of(config: EncoderDecoderConfig | DecoderOnlyConfig) -> str:
    position = config.position
    scaling = f"-{position.scaling.kind}" if position.kind == "rotary" else ""
    return f"{config.kind}-{position.kind}{scaling}-{config.embedding.kind}-{config.embedding.tie}-{config.norm.kind}"


def logits(model: Model, source: Sequences, target: Sequences) -> Tensor:
    with torch.no_grad():
        return model.project(decoder_hidden(model, source, target))


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest logit: rounding grows with the numbers that are summed."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def assert_as_exact(found: Tensor, like: Tensor, exact: Tensor) -> None:
    """To 1e-5 of the largest logit, or twice as far from float64 as `like`: some models multiply what rounding does."""
    distance, limit = (float((each - exact).abs().max()) for each in (found, like))
    assert distance <= max(1e-5 * float(exact.abs().max()), 2 * limit)


def prepared_by(model: Model) -> Callable[[str], Generative]:
    """Layers by the kernels of this name."""

    def prepare(name: str) -> Generative:
        with kernels_by_name({"decoding_layers": name, "encoding_layers": name}, "cpu", torch.float32):
            return model.prepared()

    return prepare


def of_rows(source: Sequences, rows: Tensor) -> Sequences:
    return Sequences(source.tokens[rows], source.lengths[rows])


def whole(tokens: Tensor) -> Sequences:
    return Sequences(tokens, torch.full((len(tokens),), tokens.shape[1]))


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_step_by_step(config: EncoderDecoderConfig | DecoderOnlyConfig) -> None:
    """By the modules beside the whole forward; by the kernels, which round in their own way, beside that in float64."""
    generator = torch.Generator().manual_seed(4)
    model, exact, beams = small_model(config), small_model(config).double(), 2
    sentences = torch.arange(4)
    history = torch.full((4 * beams, 1), 2)
    decoders = [model, *map(prepared_by(model), kernels_here("decoding_layers"))]
    states = [each.start(SOURCE, num_sentences=4, rows_per_sentence=beams, max_length=9) for each in decoders]
    for step in range(9):
        inputs = of_rows(SOURCE, sentences.repeat_interleave(beams)), whole(history)
        expected = logits(model, *inputs)[:, -1]
        steps = [each.step(history[:, -1:], state)[:, 0] for each, state in zip(decoders, states, strict=True)]
        assert_close(steps[0], expected)
        for found in steps[1:]:
            assert_as_exact(found, expected, logits(exact, *inputs)[:, -1])
        within = torch.randint(0, beams, (len(sentences), beams), generator=generator)
        rows = (torch.arange(len(sentences))[:, None] * beams + within).flatten()
        history = torch.cat([history[rows], torch.randint(4, 41, (len(rows), 1), generator=generator)], dim=1)
        for state in states:
            state.reorder(rows)
        if step == 4:
            staying = torch.tensor([0, 2, 3])
            for state in states:
                state.keep(staying)
            sentences = sentences[staying]
            history = history.view(-1, beams, history.shape[1])[staying].flatten(0, 1)


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_padding_and_other_rows_do_not_change_a_row(config: EncoderDecoderConfig | DecoderOnlyConfig) -> None:
    model = small_model(config)
    target = sequences(3, 7, 1, 5, seed=2)
    together = logits(model, SOURCE, target)
    for row in range(4):
        length = int(target.lengths[row])
        source = Sequences(SOURCE.tokens[row : row + 1, : int(SOURCE.lengths[row])], SOURCE.lengths[row : row + 1])
        alone = logits(model, source, Sequences(target.tokens[row : row + 1, :length], target.lengths[row : row + 1]))
        assert_close(together[row, :length], alone[0])


@pytest.mark.parametrize("config", CONFIGS[:30], ids=name_of)
def test_later_tokens_do_not_change_earlier_ones(config: EncoderDecoderConfig | DecoderOnlyConfig) -> None:
    model = small_model(config)
    target = sequences(6, 6, 6, 6, seed=2)
    other = target.tokens.clone()
    other[:, 4:] = 5
    before, after = logits(model, SOURCE, target), logits(model, SOURCE, Sequences(other, target.lengths))
    assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("config", CONFIGS[:30], ids=name_of)
def test_fused_and_separate_projections_are_one_model(config: EncoderDecoderConfig | DecoderOnlyConfig) -> None:
    fused = small_model(config)
    separate = build_model(config, VOCABULARY, projections="separate", seed=None).eval()
    load_canonical(separate, TensorSource(to_canonical(fused)))
    target = sequences(3, 7, 1, 5, seed=2)
    assert_close(logits(separate, SOURCE, target), logits(fused, SOURCE, target))


@pytest.mark.parametrize("config", CONFIGS[:30], ids=name_of)
def test_a_bundle_holds_the_model(config: EncoderDecoderConfig | DecoderOnlyConfig, tmp_path: Path) -> None:
    model, target = small_model(config), sequences(3, 7, 1, 5, seed=2)
    weights = to_canonical(model)
    save_bundle(tmp_path / "bundle", model_config=config, vocabulary=VOCABULARY, weights=weights, tokenizers=None, recipe=None)
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.model_config == config
    assert torch.equal(logits(bundle.model, SOURCE, target), logits(model, SOURCE, target))


@pytest.mark.parametrize("config", CONFIGS[:30], ids=name_of)
def test_every_weight_learns(config: EncoderDecoderConfig | DecoderOnlyConfig) -> None:
    model = small_model(config).train()
    target = sequences(3, 7, 1, 5, seed=2)
    model.project(decoder_hidden(model, SOURCE, target)).log_softmax(-1)[..., 7].sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_the_draw_covers_every_kind() -> None:
    seen = {name_of(config).split("-")[1] for config in CONFIGS}
    assert seen == {"sinusoidal", "learned", "none", "alibi", "rotary"}
    scalings = {config.position.scaling.kind for config in CONFIGS if config.position.kind == "rotary"}
    assert scalings == {"none", "linear", "dynamic_ntk", "yarn", "dynamic_yarn"}
    assert {config.kind for config in CONFIGS} == {"encoder_decoder", "decoder_only"}
