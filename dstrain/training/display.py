"""What a person sees of a training: its bar on a terminal, a line for each event in a log, and a line for each validation."""

from __future__ import annotations

import math
from contextlib import ExitStack

from dstrain.log import logger
from dstrain.progress import Progress, join_fitting, terminal_width
from dstrain.training.events import Event

TIME_WIDTH = 9
"""Columns of the time before a line of the log."""


class Display:
    """Takes the events of a run, and every step between them. total_steps: None if unknown."""

    def __init__(self, total_steps: int | None) -> None:
        self._bar = Progress("training", total_steps, "steps")
        self._notes: list[str] | None = None
        self._open = ExitStack()

    def write(self, event: Event) -> None:
        """Begin with the first event; then move the bar, or print a line."""
        match event["kind"]:
            case "start" | "resume":
                self._open.enter_context(self._bar)
                self._bar.move_to(event["step"])
            case "train":
                self._notes = train_notes(event)
                self._bar.move_to(event["step"], notes=self._notes, eta_seconds=event["eta_seconds"], say=True)
            case "valid":
                width = terminal_width()
                parts = [_validation(event), *valid_scores(event)]
                logger.info("%s", join_fitting(parts, None if width is None else width - TIME_WIDTH))

    def move_to(self, step: int, eta_seconds: float | None) -> None:
        """So many steps are done."""
        self._bar.move_to(step, notes=self._notes, eta_seconds=eta_seconds)

    def close(self) -> None:
        """Take the bar away."""
        self._open.close()


def train_notes(event: Event) -> list[str]:
    """The figures of a training event, the most important first."""
    notes = [_figure(event, "loss", "loss {:.3f}")]
    if event["skipped"]:
        notes.append(f"{event['skipped']} skipped")
    notes.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    if event.get("kd") is not None:
        notes += [f"kd {event['kd']:.3f} on {event['selected']:.0%}", f"agreement {event['agreement']:.1%}"]
    if event.get("on_policy_kd") is not None:
        notes += [f"on-policy kd {event['on_policy_kd']:.3f}", f"on-policy agreement {event['on_policy_agreement']:.1%}"]
    if event.get("on_policy") != 1:  # else there were no labels
        notes.append(_figure(event, "perplexity", "perplexity {:.4g}"))
    notes.append(f"epoch {event['epoch']}")
    return [*notes, _figure(event, "learning_rate", "lr {:.2e}"), _figure(event, "grad_norm", "norm {:.2f}")]


def valid_scores(event: Event) -> list[str]:
    """The scores of a validation event, the most important first."""
    forms = {"loss": "loss {:.3f}", "rouge_l": "rouge-l {:.2f}", "bleu": "bleu {:.2f}"}
    forms |= {"perplexity": "perplexity {:.4g}", "chrf": "chrf {:.2f}"}
    scores = [_figure(event, name, form) for name, form in forms.items() if name in event]
    return [*scores, f"epoch {event['epoch']}", f"{event['seconds']:.1f} s"]


def _validation(event: Event) -> str:
    about = ["EMA"] if event.get("weights") == "ema" else []
    about += ["best"] if event.get("best_step") == event["step"] else []
    return f"valid step {event['step']:,}" + (f" ({', '.join(about)})" if about else "")


def _figure(event: Event, name: str, form: str) -> str:
    return form.format(event[name]) if math.isfinite(event[name]) else f"{name.replace('_', ' ')} not finite"
