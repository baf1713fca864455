"""Sampling: each hypothesis is an independent draw from the model, token by token.

The draws of a sentence are a function of the seed, the sentence's number and nothing else: all its uniform numbers come from one
generator of its own, and each picks a token by the inverse of the cumulative distribution. So a sample does not depend on batch
size, order or the other rows (beyond the rounding of the logits). It costs one pass over the vocabulary's cumulative sum a step.

Truncation applies to the allowed tokens, renormalized: first `top_k`, then `top_p`, the smallest set of best tokens with
more than that mass. Scores are log-probabilities of the whole distribution, at the given temperature, before constraints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dstrain.batch import Sequences
from dstrain.generation.candidates import to_log_probs
from dstrain.generation.config import SamplingConfig
from dstrain.generation.constraints import Constraints, SpecialIds
from dstrain.generation.finished import FinishedHypotheses
from dstrain.generation.hypothesis import Hypothesis
from dstrain.protocols import Generative
from dstrain.seeding import derive_seed


def truncated(log_probs: Tensor, *, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor | None]:
    """What may be drawn. (N, V) -> probabilities (N, k), 0 outside the set, and their tokens (N, k), None for 0, 1, 2, ..."""
    tokens = None
    if top_k is not None:
        log_probs, tokens = log_probs.topk(min(top_k, log_probs.shape[1]), dim=1)
    elif top_p is not None:
        log_probs, tokens = log_probs.sort(dim=1, descending=True)
    probs = log_probs.softmax(1)
    if top_p is not None:
        mass_before = probs.cumsum(1) - probs
        probs = probs.masked_fill(mass_before > top_p, 0)
    return probs, tokens


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """The column that each uniform number in [0, 1) picks, in proportion to `probs`. (N, k), (N,) -> (N,)"""
    cumulative = probs.double().cumsum(1)
    columns = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    last = probs.shape[1] - 1 - (probs.flip(1) > 0).int().argmax(1)  # rounding must not pass the last possible column
    return torch.minimum(columns, last)


def uniform_numbers(seed: int, sentences: Sequence[int], num_samples: int, max_lengths: Sequence[int]) -> Tensor:
    """One number per sentence, sample and step, from the seed and the sentence. (B, n, max(max_lengths) + 1) float64 in [0, 1)"""
    numbers = torch.zeros(len(sentences), num_samples, max(max_lengths) + 1, dtype=torch.float64)
    for row, (sentence, max_length) in enumerate(zip(sentences, max_lengths, strict=True)):
        generator = torch.Generator().manual_seed(derive_seed(seed, "sampling", sentence))
        drawn = torch.rand(num_samples, max_length + 1, generator=generator, dtype=torch.float64)
        numbers[row, :, : max_length + 1] = drawn
    return numbers


@torch.inference_mode()
def sample(
    model: Generative,
    source: Sequences | None,
    *,
    config: SamplingConfig,
    ids: SpecialIds,
    max_lengths: Sequence[int],
    sentences: Sequence[int],
    prefix: Tensor | None = None,
    starts: Sequence[int | None] | None = None,
) -> list[list[Hypothesis]]:
    """`num_best` samples of each sentence, sorted by score.

    sentences: a number for each sentence that decides its draws, for example its line. The rest as in `beam_search`.
    """
    anchor = prefix if source is None else source.tokens
    if anchor is None:
        raise ValueError("generation needs a source or a prefix")
    device, num_samples = anchor.device, config.num_best
    uniform = uniform_numbers(config.seed, sentences, num_samples, max_lengths).to(device)
    constraints = Constraints(config, ids, max_lengths=max_lengths, prefix=prefix, device=device)
    finished = FinishedHypotheses(
        config, num_sentences=len(max_lengths), capacity=num_samples, max_length=max(max_lengths) + 1, device=device
    )
    present = torch.arange(len(max_lengths), device=device)
    tokens = ids.beginnings(starts or [None] * len(max_lengths), num_samples, device)  # (b, n, 1 + t)
    totals = torch.zeros(len(max_lengths), num_samples, 0, device=device)  # (b, n, t)
    running = torch.ones(len(max_lengths), num_samples, dtype=torch.bool, device=device)
    state = model.start(source, num_sentences=len(max_lengths), rows_per_sentence=num_samples, max_length=max(max_lengths) + 1)
    while True:
        log_probs = to_log_probs(model.step(tokens[:, :, -1:].flatten(0, 1), state)[:, -1], config.temperature)
        allowed = log_probs.clone()
        constraints.apply(allowed, tokens.flatten(0, 1))
        probs, names = truncated(allowed, top_k=config.top_k, top_p=config.top_p)
        drawn = draw(probs, uniform[present, :, totals.shape[2]].flatten())
        drawn = drawn if names is None else names.gather(1, drawn[:, None])[:, 0]
        gained = log_probs.gather(1, drawn[:, None]).view(len(present), num_samples, 1)
        tokens = torch.cat([tokens, drawn.view_as(gained)], 2)
        totals = torch.cat([totals, gained if totals.shape[2] == 0 else totals[:, :, -1:] + gained], 2)
        ended = running & (tokens[:, :, -1] == ids.eos)
        finished.add(present, ended & totals[:, :, -1].isfinite(), tokens[:, :, 1:], totals)
        running = running & ~ended
        done = ~running.any(1) | constraints.at_end(totals.shape[2] - 1)
        if bool(done.all()):
            return finished.best()
        if bool(done.any()):
            staying = (~done).nonzero()[:, 0]
            present, tokens, totals, running = present[staying], tokens[staying], totals[staying], running[staying]
            constraints.keep(staying)
            state.keep(staying)
