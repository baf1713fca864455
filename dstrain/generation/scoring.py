"""Forced scoring: log-probabilities of targets, token by token, and raw logits.

One forward pass over whole sequences instead of a search; a target's score is the one that search gives to the same tokens. The
vocabulary projection runs over slices of the real positions, so memory stays at `POSITIONS` x vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dstrain.data.batching.collate import Collator, Ragged
from dstrain.generation.candidates import to_log_probs
from dstrain.generation.config import BeamSearchConfig, SamplingConfig
from dstrain.generation.constraints import SpecialIds
from dstrain.generation.hypothesis import Hypothesis
from dstrain.protocols import TeacherForced

POSITIONS = 1024


@torch.inference_mode()
def score_targets(
    model: TeacherForced,
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    config: BeamSearchConfig | SamplingConfig,
    ids: SpecialIds,
    device: torch.device | str = "cpu",
) -> list[Hypothesis]:
    """Each target as a hypothesis of its source.

    sources, targets: ids ending in EOS; a language model reads a lone EOS as the source. Temperature, penalties and normalization
    follow `config`, as in a search.
    """
    examples = [(np.array(source), np.array(target)) for source, target in zip(sources, targets, strict=True)]
    batch = Collator(model.kind, pad_id=ids.pad, eos_id=ids.eos)(examples, np.arange(len(examples))).to(torch.device(device))
    hidden = model(batch.source, batch.target).hidden.flatten(0, 1)[batch.targets.index]  # (n, D)
    labels = batch.targets.labels
    parts = []
    for features, tokens in zip(torch.split(hidden, POSITIONS), torch.split(labels, POSITIONS), strict=True):
        log_probs = to_log_probs(model.project(features), config.temperature)
        parts.append(log_probs.gather(1, tokens[:, None])[:, 0] - config.unk_penalty * (tokens == ids.unk))
    token_scores = torch.split(torch.cat(parts), [len(target) for target in targets])
    scored = []
    for target, values in zip(targets, token_scores, strict=True):
        length = len(target) ** config.length_penalty if config.score == "normalized" else 1.0
        scored.append(Hypothesis(list(target), float(values.sum()) / length, values.tolist()))
    return scored


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
