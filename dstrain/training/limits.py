"""When training ends, and how long that will take."""

from __future__ import annotations

from dstrain.training.config import TrainingConfig, ValidationConfig
from dstrain.training.state import TrainingState


def reason_to_stop(config: TrainingConfig, validation: ValidationConfig, state: TrainingState) -> str | None:
    """Which limit ends training here, in words. Hours count over all resumes of a run, validation and saving included."""
    if config.max_steps is not None and state.step >= config.max_steps:
        return f"max_steps = {config.max_steps}"
    if config.max_epochs is not None and state.epoch > config.max_epochs:
        return f"max_epochs = {config.max_epochs}"
    if config.max_hours is not None and state.elapsed_seconds >= config.max_hours * 3600:
        return f"max_hours = {config.max_hours}"
    if validation.patience is not None and state.validations_without_improvement >= validation.patience:
        return f"patience = {validation.patience}: {validation.score_name} has not improved since step {state.best_step}"
    return None


def remaining_seconds(config: TrainingConfig, state: TrainingState) -> float | None:
    """Time until the first limit at the pace so far; None while it is unknown (epochs, before the first one ended)."""
    if state.step == 0:
        return None
    pace = state.elapsed_seconds / state.step
    guesses = []
    if config.max_steps is not None:
        guesses.append((config.max_steps - state.step) * pace)
    if config.max_epochs is not None and state.epoch > 1:
        steps_of_an_epoch = (state.step - state.step_in_epoch) / (state.epoch - 1)
        guesses.append((config.max_epochs * steps_of_an_epoch - state.step) * pace)
    if config.max_hours is not None:
        guesses.append(config.max_hours * 3600 - state.elapsed_seconds)
    return max(0.0, min(guesses)) if guesses else None
