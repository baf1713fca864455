"""What a model thinks of given targets: their log-probabilities, token by token, and raw logits.

One forward pass over whole sequences instead of a search; a target's score is the one that search gives to the same tokens. The
vocabulary projection runs over slices of the real positions, so memory stays at `POSITIONS` x vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dstrain.batch import Sequences
from dstrain.generation.candidates import to_log_probs
from dstrain.generation.config import BeamSearchConfig, SamplingConfig
from dstrain.generation.constraints import SpecialIds
from dstrain.generation.hypothesis import Hypothesis
from dstrain.generation.padding import pad
from dstrain.protocols import TeacherForced

POSITIONS = 1024


@torch.inference_mode()
def score_targets(
    model: TeacherForced,
    source: Sequences | None,
    targets: Sequence[Sequence[int]],
    *,
    config: BeamSearchConfig | SamplingConfig,
    ids: SpecialIds,
    device: torch.device | str = "cpu",
) -> list[Hypothesis]:
    """Each target as a hypothesis of its source.

    targets: ids ending in EOS. Temperature, penalties and normalization follow `config`, as in a search.
    """
    inputs = Sequences(*pad([[ids.eos, *target[:-1]] for target in targets], ids.pad)).to(torch.device(device))
    labels = torch.tensor([token for target in targets for token in target], device=device)  # (M,)
    hidden = _real_positions(model(source, inputs).hidden, inputs.lengths)  # (M, D)
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
def teacher_forced_logits(model: TeacherForced, source: Sequences | None, inputs: Sequences) -> list[Tensor]:
    """Logits after each decoder input, padding left out: one float32 (T, V) a row."""
    hidden = _real_positions(model(source, inputs).hidden, inputs.lengths)
    logits = torch.cat([model.project(features).float() for features in torch.split(hidden, POSITIONS)])
    return list(torch.split(logits, inputs.lengths.tolist()))


def _real_positions(hidden: Tensor, lengths: Tensor) -> Tensor:
    """(B, T, D) -> (M, D), row by row."""
    return hidden[torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]]
