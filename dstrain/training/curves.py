"""Pictures of a run, drawn from its event file only: RUN/report.png and RUN/report.html, a page without links.

Matplotlib's figures need no display here; the page holds the picture as base64, so that one file can be sent around.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dstrain.errors import TrainingError
from dstrain.extras import import_extra
from dstrain.storage.atomic import write_file
from dstrain.storage.document import read_mapping
from dstrain.storage.outputs import check_output_file
from dstrain.storage.parsing import dump_yaml
from dstrain.training.events import read_events

Events = Sequence[Mapping[str, Any]]

SCORES = ("bleu", "chrf", "rouge_1", "rouge_2", "rouge_l")
"""Of generated text; the higher, the better."""
PANELS = (
    ("loss, nats per target token", (("train", "loss"), ("train", "nll"), ("valid", "loss"), ("valid", "nll"))),
    ("divergence of two passes, nats per target token", (("train", "kl"),)),
    ("losses on labels and teacher", (("train", "hard"), ("train", "kd"), ("train", "on_policy_kd"))),
    (
        "agreement with the teacher, tokens selected",
        (("train", "agreement"), ("train", "on_policy_agreement"), ("train", "selected")),
    ),
    ("validation scores", tuple(("valid", name) for name in SCORES)),
    ("validation perplexity", (("valid", "perplexity"),)),
    ("learning rate", (("train", "learning_rate"),)),
    ("gradient norm", (("train", "grad_norm"),)),
    ("target tokens per second", (("train", "tokens_per_second"),)),
)


def write_report(run: Path, output: Path, *, overwrite: bool = False) -> tuple[Path, Path]:
    """Draw the curves of `run` into `output`; returns the PNG and the HTML file.

    Raises TrainingError if there is no run or it has not reported a step yet; StorageError if the files exist outside the run,
    where they are not the run's own, without `overwrite`.
    """
    png, page = output / "report.png", output / "report.html"
    for path in (png, page):
        check_output_file(path, {}, overwrite=overwrite or output.resolve() == run.resolve())
    events = read_events(run / "events.jsonl")
    if not any(event["kind"] in {"train", "valid"} for event in events):
        raise TrainingError(f"{run} has reported no step yet; wait for the first `reporting.log_every` steps")
    recipe = run / "recipe.yaml"
    remedy = "restore it, or remove it to draw the curves without it"
    tree = read_mapping(recipe, error=TrainingError, remedy=remedy) if recipe.exists() else {}
    picture = plot(events, title=run.resolve().name)
    output.mkdir(parents=True, exist_ok=True)
    write_file(png, picture)
    write_file(page, render_page(run.resolve().name, events, tree, picture).encode())
    return png, page


def plot(events: Events, title: str) -> bytes:
    """A PNG with one panel per quantity that the run has reported. Raises ExtraError without Matplotlib."""
    library = import_extra("matplotlib.figure", extra="plots", purpose="drawing the curves of a run")
    ticker = import_extra("matplotlib.ticker", extra="plots", purpose="drawing the curves of a run")
    panels = _panels(events)
    rows = -(-len(panels) // 2)
    figure = library.Figure(figsize=(12, 3.2 * rows), layout="constrained")
    figure.suptitle(title)
    for number, (name, curves) in enumerate(panels):
        axes = figure.add_subplot(rows, 2, number + 1)
        for kind, field in curves:
            steps, values = series(events, kind, field)
            if steps:
                axes.plot(
                    steps, values, marker="o" if kind == "valid" or len(steps) < 3 else None, ms=3, lw=1, label=f"{kind} {field}"
                )
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize=8)
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=110)
    return memory.getvalue()


def _panels(events: Events) -> list[tuple[str, Sequence[tuple[str, str]]]]:
    trained = (event for event in events if event["kind"] == "train")
    features = sorted({field for event in trained for field in event if field.startswith("feature_")})
    panels = (*PANELS, ("distances from inside the teacher", [("train", field) for field in features]))
    return [(name, curves) for name, curves in panels if any(series(events, *curve)[0] for curve in curves)]


def series(events: Events, kind: str, field: str) -> tuple[list[int], list[float]]:
    """Steps and values of one curve; events without the field, or with one that is not finite, are left out."""
    points = [(event["step"], event[field]) for event in events if event["kind"] == kind and event.get(field) is not None]
    return [step for step, _ in points], [value for _, value in points]


def summary(events: Events) -> dict[str, str]:
    """The summary of a run: how far, how good, how fast, and how it ended."""
    trained = [event for event in events if event["kind"] == "train"]
    validated = [event for event in events if event["kind"] == "valid"]
    summary: dict[str, str] = {}
    if trained:
        seconds = sum(event["seconds"] for event in trained)
        targets = sum(event["num_targets"] for event in trained)
        summary |= {
            "last step": f"{trained[-1]['step']:,} (epoch {trained[-1]['epoch']})",
            "target tokens": f"{targets:,}",
            "target tokens per second": f"{targets / seconds:,.0f}" if seconds else "",
        }
    _, norms = series(events, "train", "grad_norm")
    if norms:
        summary["gradient norm"] = f"last {norms[-1]:.3g}, largest {max(norms):.3g}"
    for name, best in (("loss", min), ("perplexity", min), *((name, max) for name in SCORES)):
        steps, values = series(validated, "valid", name)
        if values:
            value = best(values)
            summary[f"best validation {name}"] = f"{value:.4g} at step {steps[values.index(value)]:,}, last {values[-1]:.4g}"
    if validated and "signatures" in validated[-1]:
        summary |= {f"signature of {name}": text for name, text in validated[-1]["signatures"].items()}
    ends = [event for event in events if event["kind"] in {"end", "failure"}]
    summary["resumes"] = str(sum(event["kind"] == "resume" for event in events))
    summary["ended by"] = str(ends[-1].get("reason", ends[-1].get("message"))) if ends else "still running, or killed"
    return summary


def render_page(name: str, events: Events, recipe: Any, picture: bytes) -> str:
    """One HTML page that needs nothing beside it."""
    rows = "\n".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in summary(events).items()
    )
    titles = "; ".join(name for name, _ in _panels(events))
    tree = html.escape(dump_yaml(recipe)) if recipe else "(no recipe.yaml)"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse }} th, td {{ text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #ddd }}
th {{ font-weight: 600 }} img {{ max-width: 100% }} pre {{ background: #f6f6f6; padding: 1rem; overflow: auto; font-size: 13px }}
</style></head><body>
<h1>{html.escape(name)}</h1>
<table>
{rows}
</table>
<p><img alt="curves over the steps: {titles}" src="data:image/png;base64,{base64.b64encode(picture).decode()}"></p>
<h2>Recipe</h2>
<pre>{tree}</pre>
</body></html>
"""
