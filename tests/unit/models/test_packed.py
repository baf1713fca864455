"""Packed sequences compute what padded ones do, whatever the model: positions restart and attention stays within a sequence."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from dstrain.batch import Batch
from dstrain.data.batching.collate import Collator, PackedSize, TokenBlock
from dstrain.data.batching.plan import StepPlan, evaluation_batches, micro_batches
from dstrain.data.config import BatchingConfig
from dstrain.data.lengths import StoredLengths
from dstrain.errors import DataError
from dstrain.models.config import DecoderOnlyConfig, EncoderDecoderConfig
from dstrain.models.factory import Model
from dstrain.nn.checkpointing import checkpoint_layers
from dstrain.nn.dropout import seed_masks
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.cross_entropy import target_hidden
from dstrain.objectives.train_module import TrainModule
from tests.batches import EOS, PAD, collate
from tests.unit.adapters.adapted import adapted, lora
from tests.unit.models.build import random_config, small_model

CONFIGS = [random_config(seed) for seed in range(213)]
PACKED = PackedSize(multiple=32)
"""So there is padding after the last sequence, on both sides."""


def pairs() -> list[tuple[list[int], list[int]]]:
    """Lengths on both sides of 4, 5 and 8, from which on the scalings of `random_config` change the frequencies."""
    generator = torch.Generator().manual_seed(5)

    def sentence(length: int) -> list[int]:
        return [*torch.randint(4, 41, (length,), generator=generator).tolist(), EOS]

    return [(sentence(source), sentence(target)) for source, target in ((8, 3), (0, 6), (4, 10), (11, 0), (2, 7), (5, 1))]


def name_of(config: EncoderDecoderConfig | DecoderOnlyConfig) -> str:
    position = config.position
    return f"{config.kind}-{position.kind}" + (f"-{position.scaling.kind}" if position.kind == "rotary" else "")


def chosen() -> list[EncoderDecoderConfig | DecoderOnlyConfig]:
    """One model for each kind and way to give positions, whatever its other parts."""
    return list({name_of(config): config for config in CONFIGS}.values())


def both(model: Model) -> tuple[Batch, Batch]:
    """The same examples padded and packed."""
    return collate(pairs(), kind=model.kind), collate(pairs(), kind=model.kind, packed=PACKED)


def gradients(module: TrainModule, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To 1e-6 of the largest number."""
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("config", chosen(), ids=name_of)
@pytest.mark.parametrize("average", ["tokens", "sentences"])
def test_losses_and_gradients_equal_the_padded_ones(config: EncoderDecoderConfig | DecoderOnlyConfig, average: str) -> None:
    model = small_model(config.model_copy(update={"dropout": 0.0})).double()
    module = TrainModule(model, build_cross_entropy(CrossEntropyConfig(average=average, chunk_tokens=8)))
    padded, packed = both(model)
    assert packed.target.tokens.ndim == 1 and len(packed.target.tokens) > packed.target.lengths.sum()
    assert_close(target_hidden(model, packed), target_hidden(model, padded))
    outputs = [module(batch) for batch in (packed, padded)]
    assert outputs[0].size == outputs[1].size
    assert_close(outputs[0].loss_sum, outputs[1].loss_sum)
    assert_close(outputs[0].metrics.sums["nll"], outputs[1].metrics.sums["nll"])
    found, expected = (gradients(module, output.loss_sum) for output in outputs)
    for name, gradient in expected.items():
        assert_close(found[name], gradient)


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_adapters_and_checkpointing_take_packed_sequences(kind: str) -> None:
    config = next(config for config in CONFIGS if config.kind == kind and config.position.kind == "rotary")
    model = adapted(lora("*"), config.model_copy(update={"dropout": 0.0})).double().train()
    module = TrainModule(model.requires_grad_(True), build_cross_entropy(CrossEntropyConfig()))
    padded, packed = both(model)
    expected = gradients(module, module(padded).loss_sum)
    for mode in ("none", "selective", "full"):
        checkpoint_layers(model, mode)
        found = gradients(module, module(packed).loss_sum)
        for name, gradient in expected.items():
            if not name.endswith("k_proj.bias"):  # no key bias moves a softmax: its gradient is rounding
                assert_close(found[name], gradient)


def test_every_way_to_give_positions_is_covered() -> None:
    kinds = ("sinusoidal", "learned", "none", "alibi")
    scalings = ("none", "linear", "dynamic_ntk", "yarn", "dynamic_yarn")
    names = {*kinds, *(f"rotary-{scaling}" for scaling in scalings)}
    assert {name_of(config) for config in chosen()} == {
        f"{model}-{name}" for model in ("encoder_decoder", "decoder_only") for name in names
    }


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_a_step_has_the_losses_of_its_padded_examples_whatever_shares_a_micro_batch(kind: str) -> None:
    """With counted dropout; both are cut as training cuts them."""
    config = next(config for config in CONFIGS if config.kind == kind and config.position.kind == "rotary")
    model = small_model(config.model_copy(update={"dropout": 0.3})).train()
    lengths = np.array([[len(source), len(target)] for source, target in pairs()]).T
    losses: list[dict[tuple[int, int], float]] = []
    counts = []
    for packed in (None, PACKED):
        groups = micro_batches(np.arange(len(pairs())), *lengths, 40, 1, kind=model.kind, packed=packed is not None)
        counts.append(len(groups))
        seed_masks(1, 3)
        of_token: dict[tuple[int, int], float] = {}
        for group in groups:
            batch = collate([pairs()[row] for row in group], kind=model.kind, ids=group.tolist(), packed=packed)
            log_probs = model.project(target_hidden(model, batch)).log_softmax(-1)
            nll = -log_probs.gather(1, batch.targets.labels[:, None])[:, 0]
            keys = zip(batch.targets.example_id.tolist(), batch.targets.position.tolist(), strict=True)
            of_token.update(zip(keys, nll.tolist(), strict=True))
        losses.append(of_token)
    assert counts[1] < counts[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(losses[0]) == lengths[1].sum()


def test_the_documents_of_a_block_see_themselves_only_or_the_whole_block() -> None:
    config = next(config for config in CONFIGS if config.kind == "decoder_only" and config.position.kind == "rotary")
    model = small_model(config.model_copy(update={"dropout": 0.0})).double()
    texts = [target for _, target in pairs()]
    labels = np.concatenate(texts)
    alone = target_hidden(model, collate([([EOS], text) for text in texts], kind=model.kind))
    inputs = np.concatenate([[EOS, *text[:-1]] for text in texts])
    for packed in (None, PACKED):
        collator = Collator(model.kind, pad_id=PAD, eos_id=EOS, packed=packed)
        apart = collator([TokenBlock(0, inputs, labels, np.array(list(map(len, texts))))], np.array([0]))
        whole = collator([TokenBlock(0, inputs, labels, np.array([len(labels)]))], np.array([0]))
        assert_close(target_hidden(model, apart), alone)
        hidden = target_hidden(model, whole)
        assert_close(hidden, target_hidden(model, collate([([EOS], labels.tolist())], kind=model.kind)))
        assert_close(hidden[: len(texts[0])], alone[: len(texts[0])])
        assert not torch.allclose(hidden[len(texts[0]) :], alone[len(texts[0]) :], rtol=1e-2)


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_another_sequence_changes_nothing(kind: str) -> None:
    model = small_model(next(config for config in CONFIGS if config.kind == kind))
    first, *rest = pairs()
    own = collate([first, *rest], kind=model.kind, packed=PACKED)
    others = collate([first, *(([*source[::-1][1:], EOS], target) for source, target in rest)], kind=model.kind, packed=PACKED)
    with torch.no_grad():
        mine = [target_hidden(model, batch)[batch.targets.segment == 0] for batch in (own, others)]
        theirs = [target_hidden(model, batch)[batch.targets.segment == 2] for batch in (own, others)]
    assert torch.equal(*mine)
    assert not torch.allclose(*theirs)


def test_only_one_side_packed_is_refused() -> None:
    model = small_model()
    padded, packed = both(model)
    with pytest.raises(ValueError, match="source and target must both be packed, or neither"):
        model(padded.source, packed.target)


def test_learned_positions_end_with_the_longest_example_not_with_the_longest_source_and_target_of_two() -> None:
    """7 + 2 - 1 and 2 + 7 - 1 inputs fit 8 positions, in a batch of training and of evaluation; 8 + 2 - 1 do not."""
    config = next(c for c in CONFIGS if c.kind == "decoder_only" and c.position.kind == "learned")
    model = small_model(config.model_copy(update={"max_target_length": 8}))
    long_source, long_target = ([*range(4, 10), EOS], [5, EOS]), ([5, EOS], [*range(4, 10), EOS])
    lengths = np.array([[len(source), len(target)] for source, target in (long_source, long_target)]).T
    batching = BatchingConfig(tokens_per_step=16, max_tokens=16)
    (step,) = islice(StepPlan(StoredLengths(*lengths), batching, 1, kind=model.kind).epoch(1), 1)
    (trained,) = micro_batches(step.examples, *lengths[:, step.examples], 16, 1, kind=model.kind)
    (evaluated,) = evaluation_batches(*lengths, 16, kind=model.kind)
    for examples in (trained, evaluated):
        batch = collate([(long_source, long_target)[example] for example in examples], kind=model.kind)
        assert batch.target.tokens.shape == (2, 8)
        for training in (True, False):
            assert target_hidden(model.train(training), batch).isfinite().all()
    with pytest.raises(DataError, match="9 tokens is longer than the 8 learned positions"):
        target_hidden(model, collate([([4, *long_source[0]], [5, EOS])], kind=model.kind))
