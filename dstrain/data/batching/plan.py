"""Which examples make up each optimizer step, and how a step is cut into micro-batches.

Choice: a step is a number of target tokens, whatever the number of devices. An epoch takes the examples in a computed
random order (`order.py`), window by window. Within a window the examples are sorted by their longer side, then by how much
longer the source is than the target, and cut into buckets of sentences of similar lengths, all about equally full; a step takes
`tokens_per_step / bucket_tokens` of them, drawn at random from as many ranges of length, so that every step holds short and long
sentences and its micro-batches little padding. A step of one bucket holds one length only, and the length of what such a model
writes swings from step to step; a moving average of the weights (training.ema) stills that. The steps are shuffled. A
window is used up before the next begins: no example is dropped, none waits, and no step is a mere remainder.
The steps depend on (seed, epoch, order, lengths, tokens_per_step, bucket_tokens, shuffle_window) only; the number of ranks and
`max_tokens` only decide how each is cut into micro-batches.

Cost: the memory of one window, however long the corpus, and about 0.1 s per million examples. Nothing here reads a text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from dstrain.batch import ModelKind, Size
from dstrain.data.batching.order import Order, ShuffledOrder
from dstrain.data.batching.permutation import IntArray, Permutation
from dstrain.data.config import BatchingConfig
from dstrain.data.lengths import ExampleLengths, Lengths, Side
from dstrain.errors import DataError
from dstrain.seeding import derive_seed

GroupCost = Callable[[int, int], int]
"""Tokens that a micro-batch of the sorted examples start..end-1 takes; grows with `end`."""


@dataclass(frozen=True, eq=False, slots=True)
class PlannedStep:
    """One optimizer step of all ranks together.

    index: in the epoch, from 0. examples: (n,) int64, lines of the data set. num_targets: their target tokens.
    last_of_epoch: whether the epoch ends here.
    """

    epoch: int
    index: int
    examples: IntArray
    num_targets: int
    last_of_epoch: bool

    @property
    def size(self) -> Size:
        """What all ranks hold of it together."""
        return Size(self.num_targets, len(self.examples))


def window_capacity(config: BatchingConfig) -> int:
    """Most examples of a window: several steps' worth even if `shuffle_window` is less than that."""
    return max(config.shuffle_window, config.tokens_per_step)


class StepPlan:
    """The steps of every epoch.

    lengths: of all examples. kind: of the model, decides what fits into a micro-batch, not the steps. order: of the examples;
    None = each once an epoch, all at random.
    Raises `DataError` if there is no example at all, or one that no micro-batch can hold.
    """

    def __init__(
        self,
        lengths: ExampleLengths,
        config: BatchingConfig,
        seed: int,
        *,
        kind: ModelKind = "encoder_decoder",
        order: Order | None = None,
    ) -> None:
        self.lengths = lengths
        self.config = config
        self.seed = seed
        self.kind = kind
        self._check()
        self._order = order or ShuffledOrder([range(len(lengths))], window_capacity(config), seed)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[PlannedStep]:
        """The steps of an epoch from number `start` on; none if it has just so many. Raises `DataError` if it has fewer."""
        index = 0
        for window in range(self._order.num_windows):
            key = self._order.key(window)
            seed = derive_seed(self.seed, "buckets", epoch, key)
            steps = self._steps_of_window(epoch, self._order.window(epoch, window), seed)
            order_of_steps = Permutation(len(steps), derive_seed(self.seed, "steps", epoch, key))
            final = index + len(steps) - 1 if window == self._order.num_windows - 1 else None
            for number in order_of_steps.elements(0, order_of_steps.size):
                if index >= start:
                    examples = steps[number]
                    num_targets = int(self.lengths.of(epoch, examples)[1].sum(dtype=np.int64))
                    yield PlannedStep(epoch, index, examples, num_targets, last_of_epoch=index == final)
                index += 1
        if start > index:
            raise DataError(
                f"epoch {epoch} has {index} steps, not {start}: data or batching have changed since the run was saved"
            )

    def steps_per_epoch(self) -> int:
        """Exact if an epoch is one window; else about 1 % too low: by its first window's share of the target tokens."""
        window = self._order.window(1, 0)
        steps = len(self._steps_of_window(1, window, seed=0))
        if self._order.num_windows == 1:
            return steps
        num_targets = int(self.lengths.of(1, window)[1].sum(dtype=np.int64))
        return max(steps, steps * self._order.num_targets(self.lengths) * 99 // (num_targets * 100))

    def sample(self, number: int) -> tuple[Lengths, Lengths]:
        """Lengths of some examples at random, of sources and targets; (n,) each, at most `number` and one window of them."""
        return self.lengths.of(1, self._order.window(1, 0)[:number])

    def _steps_of_window(self, epoch: int, examples: IntArray, seed: int) -> list[IntArray]:
        """The steps that the examples of a window, given in random order, make."""
        if not len(examples):
            return []
        sources, targets = self.lengths.of(epoch, examples)
        order = _sorted_by(sources.astype(np.int64) - targets, np.maximum(sources, targets))
        examples, targets = examples[order], targets[order]
        totals = np.concatenate(([0], np.cumsum(targets, dtype=np.int64)))
        num_buckets = -(-self.config.tokens_per_step // self.config.bucket_tokens)
        per_step = max(1, min(num_buckets, self.config.tokens_per_step // int(targets.max())))
        cuts = _cut_evenly(totals, self.config.tokens_per_step // per_step)
        buckets = [examples[start:end] for start, end in pairwise(cuts)]
        return buckets if per_step == 1 else [np.concatenate(step) for step in _deal(buckets, per_step, seed)]

    def _check(self) -> None:
        if not len(self.lengths):
            raise DataError("the training split holds no example; see the counts of dropped pairs in its manifest")
        limit = self.config.max_tokens
        read: tuple[Side, ...] = ("source and target",) if self.kind == "decoder_only" else ("source", "target")
        for side in read:
            row, tokens = self.lengths.longest(side)
            if tokens > limit:
                key = "target" if self.kind == "decoder_only" else side
                raise DataError(
                    f"training example {row} has {tokens} {side} tokens, over batching.max_tokens {limit}; raise that, "
                    f"or lower data.filter.max_{key}_length and prepare again"
                )


def micro_batches(
    step_examples: IntArray,
    source_lengths: Lengths,
    target_lengths: Lengths,
    max_tokens: int,
    num_ranks: int,
    *,
    kind: ModelKind = "encoder_decoder",
    packed: bool = False,
) -> list[IntArray]:
    """Cut one step for `num_ranks` ranks, of which rank r takes `[r::num_ranks]`.

    source_lengths, target_lengths: (n,) of the step's examples. packed: whether the sequences of a group are packed, or padded.
    Returns a multiple of `num_ranks` groups of similar lengths, as few as `max_tokens` allows, the costliest as cheap as can be:
    the ranks wait for one another. A padded group costs rows x (its longest source or target), a packed one the sum of its
    sources or of its targets, whichever is more; for a decoder-only model an example is as long as its source and target
    concatenated, which share an EOS. Groups are empty only if there are fewer examples than groups. Every example must fit into
    `max_tokens` by itself, which `StepPlan` has checked.
    """
    order, cost = _sort_by_width(source_lengths, target_lengths, kind, packed=packed)
    examples, size = step_examples[order], len(order)
    count = -(-len(_fill(cost, size, max_tokens)) // num_ranks) * num_ranks
    low, high = max(cost(row, row + 1) for row in range(size)), max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_fill(cost, size, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    ends = _fill(cost, size, high, at_least=count)
    groups = [examples[start:end] for start, end in pairwise([0, *ends])]
    return groups + [examples[:0]] * (count - len(groups))


def evaluation_batches(
    source_lengths: Lengths, target_lengths: Lengths, max_tokens: int, *, kind: ModelKind = "encoder_decoder"
) -> list[IntArray]:
    """Every example once, in batches of similar lengths that cost at most `max_tokens`; a longer example is its own batch.

    They are filled as if they were padded, whatever they are: scores do not depend on how a training lays out its batches.
    """
    examples, cost = _sort_by_width(source_lengths, target_lengths, kind, packed=False)
    return [examples[start:end] for start, end in pairwise([0, *_fill(cost, len(examples), max_tokens)])]


def batches_by_length(lengths: Sequence[int], rows: Iterable[int], max_tokens: int) -> list[list[int]]:
    """`rows` in batches of similar lengths that cost at most `max_tokens`, the longest first; a longer row is a batch of its own.

    lengths: of every row, by its number. The longest come first so that a batch that does not fit into memory fails at once.
    """
    ordered = sorted(rows, key=lambda row: -lengths[row])
    ends = _fill(_padded_cost([lengths[row] for row in ordered]), len(ordered), max_tokens)
    return [ordered[start:end] for start, end in pairwise([0, *ends])]


def _cut_evenly(totals: IntArray, capacity: int) -> list[int]:
    """Bounds of the fewest pieces of at most `capacity`, each as near to an even share of the rest as that allows.

    totals: (n + 1,) running sums, from 0, of ascending numbers; a number above `capacity` is a piece of its own. Filling pieces
    from the right end backwards gives their number, and how far left each may begin at most so that the rest still fits.
    """
    size = len(totals) - 1
    leftmost = [size]
    while leftmost[-1] > 0:
        end = leftmost[-1]
        leftmost.append(min(int(totals.searchsorted(totals[end] - capacity)), end - 1))
    leftmost.reverse()
    middles = totals[:-1] + totals[1:]  # twice the point from which on the next bound is nearer
    cuts = [0]
    for pieces, least in zip(range(len(leftmost) - 1, 0, -1), leftmost[1:], strict=True):
        here = int(totals[cuts[-1]])
        nearest = int(middles.searchsorted(2 * here + 2 * (int(totals[-1]) - here) // pieces))
        farthest = max(int(totals.searchsorted(here + capacity, "right")) - 1, cuts[-1] + 1)
        cuts.append(min(max(nearest, least), farthest))
    return cuts


def _deal(buckets: list[IntArray], per_step: int, seed: int) -> list[list[IntArray]]:
    """Steps of `per_step` buckets, one from each range of length; if the buckets do not go round, steps lack one in turn.

    buckets: by length.
    """
    count = -(-len(buckets) // per_step)
    steps: list[list[IntArray]] = [[] for _ in range(count)]
    end = 0
    for number in range(per_step):
        start, end = end, end + len(range(number, len(buckets), per_step))
        receivers = [step for step in range(count) if end - start == count or step != number % count]
        shuffled = Permutation(end - start, derive_seed(seed, "range", number))
        for step, index in zip(receivers, shuffled.elements(0, shuffled.size), strict=True):
            steps[step].append(buckets[start + index])
    return steps


def _sort_by_width(
    source_lengths: Lengths, target_lengths: Lengths, kind: ModelKind, *, packed: bool
) -> tuple[IntArray, GroupCost]:
    """The order of examples by ascending width of their row, and what groups of them cost in this order."""
    sources, targets = (lengths.astype(np.int64) for lengths in (source_lengths, target_lengths))
    read = [sources, targets] if kind == "encoder_decoder" else [sources + targets - 1]
    widths = np.maximum.reduce(read)
    order = np.lexsort((sources, targets, widths))
    return order, _packed_cost([side[order] for side in read]) if packed else _padded_cost(widths[order].tolist())


def _padded_cost(widths: Sequence[int]) -> GroupCost:
    """Rows x widest. widths: ascending or descending."""
    return lambda start, end: (end - start) * max(widths[start], widths[end - 1])


def _packed_cost(sides: Sequence[IntArray]) -> GroupCost:
    """All tokens of the longer side. sides: (n,) lengths of what each stack reads."""
    totals = [np.concatenate(([0], np.cumsum(lengths))).tolist() for lengths in sides]
    return lambda start, end: max(total[end] - total[start] for total in totals)


def _fill(cost: GroupCost, size: int, capacity: int, at_least: int = 0) -> list[int]:
    """Ends of groups of `size` sorted rows, filled one after the other up to cost <= capacity, or with one row that costs more.

    The groups are kept small enough to be `at_least` so many, if there are as many rows.
    """
    ends: list[int] = []
    start = 0
    while start < size:
        ends_after = range(start + 1, size + 1)
        fitting = bisect_right(ends_after, capacity, key=partial(cost, start))
        spare = size - start - (at_least - len(ends) - 1)
        start += max(min(fitting, spare), 1)
        ends.append(start)
    return ends


def _sorted_by(*keys: Lengths) -> IntArray:
    """The stable order by the last key, then by the one before: `np.lexsort`, but fast if the numbers fit into 16 bits."""
    order: IntArray = np.arange(len(keys[0]))
    for key in keys:
        low, high = int(key.min()), int(key.max())
        narrow = (key - low).astype(np.uint16) if high - low < 2**16 else key
        order = order[np.argsort(narrow[order], kind="stable")]
    return order
