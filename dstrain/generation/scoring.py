"""Forced scoring: log-probabilities of targets, token by token, and raw logits.

One forward pass over whole sequences instead of a search; a target's score is the one that search gives to the same tokens,
without the penalties of diverse beam search, which are about other hypotheses. The vocabulary projection runs over slices of the
real positions, so memory stays at `POSITIONS` x vocabulary.

Under dynamic rotary scalings a long sequence changes what was computed for its earlier tokens. A search scores a token when the
sequence ends with it, one pass over the whole target scores it as part of the longer one. Such targets are scored as in the
search, one token after the other, at the cost of a forward pass for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dstrain.batch import Sequences
from dstrain.data.batching.collate import Collator
from dstrain.data.ragged import Ragged
from dstrain.generation.candidates import to_log_probs
from dstrain.generation.config import BeamSearchConfig, SamplingConfig
from dstrain.generation.constraints import SpecialIds
from dstrain.generation.hypothesis import Hypothesis
from dstrain.generation.padding import pad
from dstrain.protocols import Generative, TeacherForced

POSITIONS = 1024


class ScoringModel(TeacherForced, Generative, Protocol):
    """A model that reads whole targets, and decodes."""

    def invalidates_cache(self, length: int) -> bool:
        """Whether a sequence of `length` tokens changes the results of its earlier tokens."""
        ...


@torch.inference_mode()
def score_targets(
    model: ScoringModel,
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    config: BeamSearchConfig | SamplingConfig,
    ids: SpecialIds,
    device: torch.device | str = "cpu",
) -> list[Hypothesis]:
    """Each target as a hypothesis of its source.

    sources, targets: ids ending in EOS; a language model reads a lone EOS as the source. Temperature, penalties and normalization
    follow `config`, as in a search; a penalty of `<unk>` counts for beam search only, for samples have scores without it.
    """
    joint = model.kind == "decoder_only"
    lengths = [len(target) + joint * (len(source) - 1) for source, target in zip(sources, targets, strict=True)]
    score = _score_by_steps if model.invalidates_cache(max(lengths)) else _score_at_once
    penalty = config.unk_penalty if isinstance(config, BeamSearchConfig) else 0.0
    chosen = torch.device(device)
    parts = score(model, sources, targets, temperature=config.temperature, ids=ids, device=chosen)
    scored = []
    for target, log_probs in zip(targets, parts, strict=True):
        values = log_probs - penalty * (torch.tensor(target, device=chosen) == ids.unk)
        length = len(target) ** config.length_penalty if config.score == "normalized" else 1.0
        scored.append(Hypothesis(list(target), float(values.sum()) / length, values.tolist()))
    return scored


def _score_at_once(
    model: ScoringModel,
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    temperature: float,
    ids: SpecialIds,
    device: torch.device,
) -> Sequence[Tensor]:
    """The log-probabilities of each target's tokens, (T,) each, by one pass over whole sequences."""
    examples = [(np.array(source), np.array(target)) for source, target in zip(sources, targets, strict=True)]
    collator = Collator(model.kind, pad_id=ids.pad, eos_id=ids.eos, start_id=ids.start)
    batch = collator(examples, np.arange(len(examples))).to(device)
    hidden = model(batch.source, batch.target).hidden.flatten(0, 1)[batch.targets.index]  # (n, D)
    parts = []
    for features, tokens in zip(torch.split(hidden, POSITIONS), torch.split(batch.targets.labels, POSITIONS), strict=True):
        parts.append(to_log_probs(model.project(features), temperature).gather(1, tokens[:, None])[:, 0])
    return torch.split(torch.cat(parts), [len(target) for target in targets])


def _score_by_steps(
    model: ScoringModel,
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    temperature: float,
    ids: SpecialIds,
    device: torch.device,
) -> Sequence[Tensor]:
    """The same by decoding, each token as the last one of its sequence."""
    labels, lengths = (part.to(device) for part in pad(targets, ids.pad))  # (B, T), (B,)
    state = model.start(
        Sequences(*pad(sources, ids.pad)).to(device), num_sentences=len(targets), rows_per_sentence=1, max_length=labels.shape[1]
    )
    inputs = torch.cat([torch.full_like(labels[:, :1], ids.first), labels[:, :-1]], dim=1)
    columns = []
    for step in range(labels.shape[1]):
        log_probs = to_log_probs(model.step(inputs[:, step : step + 1], state)[:, -1], temperature)
        columns.append(log_probs.gather(1, labels[:, step, None])[:, 0])
    return [row[:length] for row, length in zip(torch.stack(columns, 1), lengths.tolist(), strict=True)]


@torch.inference_mode()
def teacher_forced_logits(
    model: TeacherForced,
    sources: Sequence[Sequence[int]],
    inputs: Sequence[Sequence[int]],
    *,
    collator: Collator,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Logits after each decoder input, padding left out: one float32 (T, V) a row.

    sources: ids ending in EOS. inputs: EOS, then target tokens.
    """
    reading = collator.read(Ragged.of(sources), Ragged.of(inputs))
    chosen, index = torch.device(device), torch.from_numpy(reading.target_index)
    source = None if reading.source is None else reading.source.to(chosen)
    hidden = model(source, reading.target.to(chosen)).hidden.flatten(0, 1)[index.to(chosen)]  # (n, D)
    logits = torch.cat([model.project(features).float() for features in torch.split(hidden, POSITIONS)])
    return list(torch.split(logits, [len(row) for row in inputs]))
