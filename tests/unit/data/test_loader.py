import signal
import subprocess
import sys
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.batch import Batch, ModelKind
from dstrain.data.batching.collate import Collator, Ids, PackedSize
from dstrain.data.batching.loader import TrainLoader, evaluation_loader
from dstrain.data.batching.permutation import IntArray
from dstrain.data.batching.plan import PlannedStep, StepPlan
from dstrain.data.config import BatchingConfig
from dstrain.data.lengths import StoredLengths
from dstrain.errors import DataError
from tests.batches import EOS, PAD, labels_of
from tests.paths import ROOT

COLLATOR = Collator("encoder_decoder", pad_id=PAD, eos_id=EOS)
CONFIG = BatchingConfig(tokens_per_step=60, max_tokens=70, shuffle_window=100)


class Corpus:
    """Pairs whose ids tell the row; `broken` is a row that cannot be read."""

    def __init__(self, size: int, broken: int | None = None) -> None:
        random = np.random.default_rng(size)
        self.source_lengths, self.target_lengths = random.integers(1, 20, (2, size)).astype(np.int32)
        self.lengths = StoredLengths(self.source_lengths, self.target_lengths)
        self._broken = broken

    def __getitem__(self, index: int) -> tuple[Ids, Ids]:
        if index == self._broken:
            raise DataError(f"row {index} cannot be read")
        sides = (np.full(lengths[index], index + 4) for lengths in (self.source_lengths, self.target_lengths))
        source, target = sides
        source[-1] = target[-1] = EOS
        return source, target

    def read(self, epoch: int, rows: IntArray) -> list[tuple[Ids, Ids]]:
        return [self[row] for row in rows]

    def plan(self) -> StepPlan:
        return StepPlan(self.lengths, CONFIG, seed=1)


def loader(corpus: Corpus, *, rank: int = 0, world_size: int = 1, start: tuple[int, int] = (0, 0)) -> TrainLoader:
    return TrainLoader(corpus, corpus.plan(), COLLATOR, data_rank=rank, data_size=world_size, start=start)


def rows(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in batch.examples.ids.tolist()]


def read(
    corpus: Corpus, num_steps: int, *, rank: int = 0, world_size: int = 1, start: tuple[int, int] = (0, 0)
) -> list[list[Batch]]:
    with loader(corpus, rank=rank, world_size=world_size, start=start) as steps:
        return [batches for _, batches in islice(steps, num_steps)]


def test_batches_for_a_gpu_are_pinned_by_the_thread_that_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []

    def pinned(batch: Batch, rank: int, size: int) -> Batch:
        assert (rank, size) == (1, 2)
        calls.append(("pinned", threading.current_thread().name))
        return batch

    monkeypatch.setattr(Batch, "pinned", pinned)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append((str(device), threading.current_thread().name)))
    corpus = Corpus(20)
    with TrainLoader(corpus, corpus.plan(), COLLATOR, device=torch.device("cuda", 3), sequence_rank=1, sequence_size=2) as steps:
        next(steps)
    assert calls[0][0] == "cuda:3", "before the first pinned memory, which else is that of GPU 0"
    assert calls[1][0] == "pinned"
    assert {thread for _, thread in calls} == {"dstrain-prefetch"}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_every_step_of_the_plan(world_size: int) -> None:
    corpus = Corpus(150)
    planned = [*corpus.plan().epoch(0), *corpus.plan().epoch(1)]
    of_rank = [read(corpus, len(planned), rank=rank, world_size=world_size) for rank in range(world_size)]
    for number, step in enumerate(planned):
        shares = [batches[number] for batches in of_rank]
        assert len({len(share) for share in shares}) == 1, "ranks run different numbers of micro-batches"
        assert sorted(row for share in shares for row in rows(share)) == sorted(step.examples)
        assert sum(batch.num_targets for share in shares for batch in share) == step.num_targets


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_packing_moves_no_step_and_fills_micro_batches_by_their_tokens(kind: ModelKind) -> None:
    corpus = Corpus(150)
    config = BatchingConfig(tokens_per_step=150, max_tokens=50)
    plan = StepPlan(corpus.lengths, config, seed=1, kind=kind)
    steps: list[list[tuple[PlannedStep, list[Batch]]]] = []
    for packed in (None, PackedSize()):
        with TrainLoader(corpus, plan, Collator(kind, pad_id=PAD, eos_id=EOS, packed=packed)) as loaded:
            steps.append(list(islice(loaded, 20)))
    for (planned, padded), (other, filled) in zip(*steps, strict=True):
        assert planned.examples.tolist() == other.examples.tolist() and (planned.epoch, planned.index) == (
            other.epoch,
            other.index,
        )
        assert all(batch.reading.tokens.numel() <= config.max_tokens for batch in padded)
        for batch in filled:
            sides = batch.reading.tokens, batch.target.tokens
            assert max(map(len, sides)) <= config.max_tokens
    padded_batches, filled_batches = (sum(len(batches) for _, batches in each) for each in steps)
    assert filled_batches < padded_batches


def test_more_ranks_than_sentences() -> None:
    corpus = Corpus(1)
    shares = [read(corpus, 1, rank=rank, world_size=4)[0] for rank in range(4)]
    assert [rows(share) for share in shares] == [[0], [], [], []]
    assert [share[0].num_targets for share in shares] == [int(corpus.target_lengths[0]), 0, 0, 0]


def test_batches_hold_the_ids_of_their_rows() -> None:
    corpus = Corpus(40)
    for batches in read(corpus, 8):
        for batch in batches:
            assert batch.source is not None
            labels = labels_of(batch)
            for row, number in enumerate(batch.examples.ids.tolist()):
                source, target = corpus[number]
                assert batch.source.tokens[row, : len(source)].tolist() == source.tolist()
                assert labels[row, : len(target)].tolist() == target.tolist()
            padded = max(batch.source.tokens.numel(), batch.target.tokens.numel())
            assert padded <= CONFIG.max_tokens


@settings(max_examples=20, deadline=None)
@given(skipped=st.integers(0, 60))
def test_a_loader_started_later_goes_on_as_the_first_would_have(skipped: int) -> None:
    """Also at an epoch's end, said either way: as the next epoch's first step or as one past the last."""
    corpus = Corpus(120)
    with loader(corpus) as steps:
        whole = list(islice(steps, 70))
    starts = [(whole[skipped][0].epoch, whole[skipped][0].index)]
    if skipped and whole[skipped - 1][0].last_of_epoch:
        starts.append((whole[skipped - 1][0].epoch, whole[skipped - 1][0].index + 1))
    for start in starts:
        with loader(corpus, start=start) as steps:
            for (step, batches), (expected_step, expected_batches) in zip(steps, whole[skipped:], strict=False):
                assert (step.epoch, step.index) == (expected_step.epoch, expected_step.index)
                assert len(batches) == len(expected_batches)
                for batch, expected in zip(batches, expected_batches, strict=True):
                    assert torch.equal(labels_of(batch), labels_of(expected))
                    assert torch.equal(batch.examples.ids, expected.examples.ids)


def test_a_start_beyond_the_epoch_is_an_error() -> None:
    with loader(Corpus(20), start=(0, 10_000)) as steps, pytest.raises(DataError, match="epoch 0 has 4 steps, not 10000"):
        next(steps)


def test_an_unreadable_row_is_reported_by_its_own_error() -> None:
    with loader(Corpus(20, broken=3)) as steps, pytest.raises(DataError, match=r"^row 3 cannot be read$"):
        list(islice(steps, 100))


def test_ctrl_c_ends_a_waiting_process_at_once() -> None:
    code = """
import threading
from tests.unit.data.test_loader import Corpus, loader
class Stuck(Corpus):
    def __getitem__(self, index):
        print("waiting", flush=True)
        threading.Event().wait(300)
        return super().__getitem__(index)
with loader(Stuck(50)) as steps:
    for _ in steps: pass
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode != 0


@pytest.mark.parametrize("size", [1, 5, 21, 150])
@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_evaluation_sees_every_example_once_over_the_ranks(size: int, world_size: int) -> None:
    corpus = Corpus(size)
    of_rank = [list(evaluation_loader(corpus, 70, COLLATOR, data_rank=rank, data_size=world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in of_rank}) == 1
    assert sorted(row for batches in of_rank for row in rows(batches)) == list(range(size))
    assert sum(batch.num_targets for batches in of_rank for batch in batches) == corpus.target_lengths.sum()


def test_evaluation_of_nothing_is_nothing() -> None:
    assert list(evaluation_loader(Corpus(0), 70, COLLATOR, data_size=2)) == []
