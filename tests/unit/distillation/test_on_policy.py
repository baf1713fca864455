"""Steps on the student's own samples: the draws against a plain loop, limits and cuts, ranks, which steps they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from dstrain.batch import Batch, ModelKind
from dstrain.data.batching.collate import Collator
from dstrain.data.batching.plan import PlannedStep
from dstrain.data.prepared.dataset import Example
from dstrain.distillation.config import OnPolicyConfig
from dstrain.distillation.on_policy import OnPolicySteps, OwnSamples, max_sample_length
from dstrain.models.config import DecoderOnlyConfig, DecoderOnlyStackConfig, LengthLimits, PlainEmbedding, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.position_config import LearnedPosition
from dstrain.protocols import Generative, Ranks
from dstrain.seeding import derive_seed
from tests.batches import collate
from tests.unit.checkpoint.ranks import ThreadRanks, on_ranks
from tests.unit.generation.toy import IDS, ToyModel, log_probs, random_sources
from tests.unit.training.fakes import ONE_PROCESS

SEED = 5
TYPES = 12
SOURCES = random_sources(9, TYPES)
NUMBERS = [40, 3, 11, 8, 9, 100, 7, 2, 60]
STEP = PlannedStep(2, 17, np.array(NUMBERS), 999, last_of_epoch=False)


def own_samples(
    model: object,
    *,
    ranks: object = ONE_PROCESS,
    max_length: int = 40,
    kind: ModelKind = "encoder_decoder",
    max_tokens: int = 40,
    **keys: Any,
) -> OwnSamples:
    return OwnSamples(
        config=OnPolicyConfig(**{"max_length_ratio": 1.0, "max_length_offset": 3, **keys}),
        student=lambda: nullcontext(cast("Generative", model)),
        ranks=cast("Ranks", ranks),
        sequence=cast("Ranks", ONE_PROCESS),
        ids=IDS,
        max_length=max_length,
        collator=Collator(kind, pad_id=IDS.pad, eos_id=IDS.eos),
        max_tokens=max_tokens,
        seed=SEED,
        device=torch.device("cpu"),
        beat=lambda phase: None,
    )


def batch_of(indices: Sequence[int], kind: ModelKind = "encoder_decoder", **options: Any) -> Batch:
    """Some of the sources with targets of no meaning; none makes the empty micro-batch."""
    pairs = [(SOURCES[index], [4, IDS.eos]) for index in indices]
    return collate(pairs, kind=kind, ids=[NUMBERS[index] for index in indices], **options)


def written(batches: Sequence[Batch]) -> dict[int, list[int]]:
    """The labels of each example; what the model reads must fit them."""
    found: dict[int, list[int]] = {}
    for batch in batches:
        assert batch.sampled
        for number, label in zip(batch.targets.example_id.tolist(), batch.targets.labels.tolist(), strict=True):
            found.setdefault(number, []).append(label)
        numbers = batch.examples.ids.tolist()
        pairs = [(SOURCES[NUMBERS.index(number)], found[number]) for number in numbers]
        expected = collate(pairs, kind=batch.kind, ids=numbers)
        assert torch.equal(batch.target.tokens, expected.target.tokens)
        assert torch.equal(batch.reading.tokens, expected.reading.tokens)
        assert torch.equal(batch.targets.index, expected.targets.index)
    return found


def plain_sample(model: ToyModel, source: list[int], number: int, limit: int, config: OnPolicyConfig) -> list[int]:
    """Token by token, each the first whose cumulative probability exceeds the uniform number; best first where some are out."""
    seed = derive_seed(derive_seed(SEED, "on-policy samples", STEP.epoch, STEP.index), "sampling", number)
    uniform = torch.rand(1, limit + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[0].tolist()
    tokens: list[int] = []
    while len(tokens) < limit and IDS.eos not in tokens:
        scores = log_probs(model, source, tokens, temperature=config.temperature)
        chances = [0.0 if token == IDS.pad else float(np.exp(score)) for token, score in enumerate(scores)]
        order = list(range(TYPES))
        if config.top_k is not None or config.top_p is not None:
            order = sorted(order, key=lambda token: -chances[token])[: config.top_k]
        if config.top_p is not None:
            whole, before = sum(chances[token] for token in order), 0.0
            for place, token in enumerate(order):
                if before > config.top_p * whole:
                    order = order[:place]
                    break
                before += chances[token]
        point = uniform[len(tokens)] * sum(chances[token] for token in order)
        for token in order:
            point -= chances[token]
            if point < 0:
                break
        tokens.append(token)
    return tokens


WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.4},
    {"top_k": 3},
    {"top_p": 0.6},
    {"top_k": 5, "top_p": 0.7},
    {"max_length_ratio": 0.5},
    {"max_length_offset": 6},
]


def test_every_example_gets_the_sample_of_a_plain_loop_and_every_key_acts() -> None:
    model = ToyModel(TYPES, seed=3, sharpness=0.5)
    drawn = []
    for keys in WAYS:
        work = own_samples(model, **keys)
        planned, batches = work(STEP, [batch_of([0, 1, 2, 3]), batch_of([4, 5, 6, 7, 8])])
        found, config = written(batches), work.config
        limits = [int(config.max_length_ratio * len(source)) + config.max_length_offset for source in SOURCES]
        for number, source, limit in zip(NUMBERS, SOURCES, limits, strict=True):
            assert found[number] == plain_sample(model, source, number, limit, config)
        assert planned.num_targets == planned.size.num_targets == sum(map(len, found.values()))
        assert (planned.epoch, planned.index, planned.size.num_sentences) == (2, 17, 9)
        drawn.append(tuple(map(tuple, found.values())))
    assert len(set(drawn)) == len(WAYS)
    assert {key for keys in WAYS for key in keys} | {"fraction"} == set(OnPolicyConfig.model_fields)
    assert len({tuple(source) for source in SOURCES}) > 1


def test_what_has_ended_has_an_eos_and_what_was_cut_has_none() -> None:
    found = written(own_samples(ToyModel(TYPES, seed=3, sharpness=0.5))(STEP, [batch_of(range(9))])[1])
    ended = [target[-1] == IDS.eos for target in found.values()]
    assert 0 < sum(ended) < 9
    for number, target in found.items():
        limit = len(SOURCES[NUMBERS.index(number)]) + 3
        assert IDS.eos not in target[:-1]
        assert target[-1] == IDS.eos or len(target) == limit


def test_a_sample_begins_with_the_start_token_of_its_example() -> None:
    """Written out: which token each decoder reads first; under another one other samples are drawn."""
    model, starts = ToyModel(TYPES, seed=3, sharpness=0.5), [7, None, 8]
    work = own_samples(model)
    examples = [Example(np.array(SOURCES[0]), np.array([4, IDS.eos]), start) for start in starts]
    _, (batch,) = work(STEP, [work.collator(examples, np.array([40, 40, 40]))])
    first = batch.target.tokens.flatten()[batch.targets.index[batch.targets.position == 0]]
    assert first.tolist() == [7, IDS.eos, 8]
    samples = [batch.targets.labels[batch.targets.segment == number].tolist() for number in range(3)]
    assert samples[1] == plain_sample(model, SOURCES[0], 40, len(SOURCES[0]) + 3, work.config)
    assert len({str(sample) for sample in samples}) > 1, "the draws are the same, the distributions differ"


class Endless(ToyModel):
    """Never ends of itself."""

    def project(self, hidden: Tensor) -> Tensor:
        logits = super().project(hidden)
        logits[..., IDS.eos] = -1e4
        return logits


def test_micro_batches_hold_max_tokens_however_long_the_samples_are() -> None:
    work = own_samples(Endless(TYPES, seed=3), max_length=24, max_tokens=24, max_length_offset=100)
    found = work(STEP, [batch_of(range(9))])[1]
    assert len(found) > 4
    assert all(max(batch.target.tokens.numel(), batch.reading.tokens.numel()) <= 24 for batch in found)
    assert {len(target) for target in written(found).values()} == {23}


@pytest.mark.parametrize(
    "shares", [[[0, 1, 2, 3], [4, 5, 6, 7, 8]], [[0, 1, 2, 3, 4, 5, 6, 7, 8], []], [[0], [1, 2, 3, 4, 5, 6, 7, 8]]]
)
def test_two_ranks_write_what_one_writes_in_equally_many_micro_batches(shares: list[range]) -> None:
    model = ToyModel(TYPES, seed=3, sharpness=0.5)
    alone, batches = own_samples(model)(STEP, [batch_of(range(9))])

    def run(ranks: ThreadRanks) -> tuple[PlannedStep, list[Batch]]:
        share = shares[ranks.rank]
        return own_samples(model, ranks=ranks, max_tokens=30)(STEP, [batch_of(share[:1]), batch_of(share[1:])])

    results = on_ranks(2, run)
    assert all(not isinstance(result, BaseException) for result in results), results
    (first, one), (second, other) = cast("list[tuple[PlannedStep, list[Batch]]]", results)
    assert len(one) == len(other) > 1
    assert first.num_targets == second.num_targets == alone.num_targets
    assert written(one) | written(other) == written(batches)


def test_no_model_reads_more_than_it_can() -> None:
    """Learned positions, so that one token too many is an error; source and target are read as one."""
    sizes = VocabularySizes(source=TYPES, target=TYPES)
    config = DecoderOnlyConfig(
        model_dim=16,
        decoder=DecoderOnlyStackConfig(depth=1, num_heads=2, ffn_dim=16),
        position=LearnedPosition(),
        embedding=PlainEmbedding(tie="decoder"),
        max_target_length=14,
    )
    student = build_model(config, sizes, seed=1).eval()
    longest_source = max(map(len, SOURCES))
    for max_tokens, teacher in ((1000, 14), (1000, 12), (11, 14)):
        limits = [config.limits, LengthLimits(teacher, teacher, joint=True)]
        longest = max_sample_length(limits, longest_source=longest_source, max_tokens=max_tokens)
        assert longest == min(max_tokens, teacher) - longest_source + 1
        work = own_samples(student, max_length=longest, kind="decoder_only", max_tokens=max_tokens, max_length_offset=50)
        batches = work(STEP, [batch_of(range(9), "decoder_only")])[1]
        for batch in batches:
            student(batch.source, batch.target)
            assert batch.target.tokens.shape[1] <= teacher
            assert batch.target.tokens.numel() <= max_tokens
        assert max(map(len, written(batches).values())) == longest - 1
    apart = [LengthLimits(20, 9, joint=False), LengthLimits(20, 8, joint=False)]
    assert max_sample_length(apart, longest_source=15, max_tokens=30) == 8
    assert max_sample_length(apart, longest_source=15, max_tokens=15) == 8
    assert max_sample_length(apart, longest_source=4, max_tokens=5) == 5


def test_if_nothing_fits_the_first_state_is_scored() -> None:
    found = written(own_samples(ToyModel(TYPES), max_length=1)(STEP, [batch_of(range(9))])[1])
    assert set(map(tuple, found.values())) == {(IDS.eos,)}


def test_a_prompt_is_gone_on_from() -> None:
    """A decoder-only student: equal to sampling sentence by sentence, in any batch."""
    sizes = VocabularySizes(source=TYPES, target=TYPES)
    config = DecoderOnlyConfig(
        model_dim=16, decoder=DecoderOnlyStackConfig(depth=2, num_heads=2, ffn_dim=16), embedding=PlainEmbedding(tie="decoder")
    )
    student = build_model(config, sizes, seed=1).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(3.0)
    work = own_samples(student, kind="decoder_only")
    together = written(work(STEP, [batch_of(range(9), "decoder_only")])[1])
    alone = [written(work(STEP, [batch_of([index], "decoder_only")])[1]) for index in range(9)]
    assert together == {number: target for found in alone for number, target in found.items()}
    assert len({tuple(target) for target in together.values()}) > 4


def test_a_broken_model_is_left_to_the_engine() -> None:
    model = ToyModel(TYPES)
    model.output[:] = torch.nan
    found = written(own_samples(model)(STEP, [batch_of(range(9))])[1])
    assert set(map(tuple, found.values())) == {(IDS.eos,)}


class Steps:
    """Twenty steps of one batch each."""

    def __init__(self) -> None:
        self.closed = False

    def __iter__(self) -> Iterator[tuple[PlannedStep, Sequence[Batch]]]:
        for index in range(20):
            yield PlannedStep(1, index, np.array(NUMBERS[:3]), 6, last_of_epoch=index == 19), [batch_of([0, 1, 2])]

    def close(self) -> None:
        self.closed = True


def test_some_steps_are_sampled_and_the_others_unchanged() -> None:
    work, steps = own_samples(ToyModel(TYPES, seed=3), fraction=0.4), Steps()
    mixed = OnPolicySteps(steps, work)
    found = list(mixed)
    due = [batches[0].sampled for _, batches in found]
    assert due == [work.is_due(planned) for planned, _ in found]
    assert 4 <= sum(due) <= 12
    assert all(planned.num_targets == 6 for (planned, _), sampled in zip(found, due, strict=True) if not sampled)
    assert [planned.index for planned, _ in found] == list(range(20))
    mixed.close()
    assert steps.closed


def test_which_steps_follows_from_the_seed_and_the_step_in_the_configured_share() -> None:
    places = [PlannedStep(epoch, index, np.array([0]), 1, last_of_epoch=False) for epoch in (1, 2) for index in range(2000)]
    for fraction in (0.1, 0.5, 0.9):
        due = [own_samples(None, fraction=fraction).is_due(place) for place in places]
        assert sum(due) / 4000 == pytest.approx(fraction, abs=0.03)
        assert due[:2000] != due[2000:]
    assert all(own_samples(None, fraction=1).is_due(place) for place in places)
