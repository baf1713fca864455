"""What the tables of context extension share: verbs, extended bundles, and a table whose cells are kept.

A table goes on where an earlier call ended: prepared data, trainings, bundles and cells that are there are not made again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from dstrain.api import ExtendOptions, extend
from dstrain.checkpoint.bundle import find_bundle, save_bundle

KINDS: tuple[Literal["linear", "ntk", "yarn"], ...] = ("linear", "ntk", "yarn")


def dstrain(*words: str | Path) -> None:
    """One verb, whose output goes to stderr: stdout is the table's."""
    subprocess.run([sys.executable, "-m", "dstrain", *map(str, words)], check=True, stdout=sys.stderr)


def overrides(*keys: str) -> list[str]:
    """`--set` for each `KEY=VALUE`."""
    return [word for key in keys for word in ("--set", key)]


def extended(base: Path, kind: Literal["none", "linear", "ntk", "yarn"], length: int, trained: int, output: Path) -> Path:
    """The bundle that reads `length` tokens after a training with `trained`; of kind none, by the same positions."""
    if output.exists():
        return output
    if kind != "none":
        extend(ExtendOptions(bundle=base, output=output, kind=kind, factor=length / trained, original_length=trained))
        return output
    stored = find_bundle(base)
    model = stored.description.model
    limits = dict.fromkeys({"max_source_length", "max_target_length"} & model.model_dump().keys(), length)
    save_bundle(
        output,
        model_config=model.model_copy(update=limits),
        vocabulary=stored.description.vocabulary,
        weights={name: stored.read(name) for name in stored.names()},
        tokenizers=stored.tokenizers(),
        recipe=stored.recipe(),
    )
    return output


class Table:
    """Rows of figures by column, kept in a file and printed row by row.

    sizes: what the figures depend on. A file of other sizes ends the program, for its cells would be those of another table.
    """

    def __init__(self, path: Path, head: str, columns: Sequence[int], sizes: Mapping[str, Any]) -> None:
        self._path = path
        self.columns = columns
        self._kept: dict[str, Any] = {"sizes": dict(sizes), "rows": {}}
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["sizes"] != self._kept["sizes"]:
                sys.exit(f"{path} is a table of other sizes, {kept['sizes']}; give the same, or name another directory")
            self._kept = kept
        print(f"| {head} | {' | '.join(f'{column:,}' for column in columns)} |\n|{'---|' * (len(columns) + 1)}", flush=True)

    @property
    def rows(self) -> dict[str, dict[str, float]]:
        """Cells by name of the row and column."""
        return self._kept["rows"]  # type: ignore[no-any-return]

    def row(self, name: str, longest: int, figure: Callable[[int], float]) -> None:
        """Print the figure of each column up to `longest`; those that are kept are not taken again."""
        cells = self.rows.setdefault(name, {})
        for column in self.columns:
            if column <= longest and str(column) not in cells:
                cells[str(column)] = figure(column)
                self._path.write_text(json.dumps(self._kept, indent=1))
        shown = [f"{cells[str(column)]:.1f}" if str(column) in cells else "" for column in self.columns]
        print(f"| {name} | {' | '.join(shown)} |", flush=True)

    def picture(self, output: Path, *, xlabel: str, ylabel: str, yscale: str) -> None:
        """The rows as curves, if matplotlib is installed: a color for a kind, a marker for a length, solid after tuning."""
        if find_spec("matplotlib") is None:
            return
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, ScalarFormatter

        axes = (figure := Figure(figsize=(8, 4))).subplots()
        parts = {name: name.removesuffix(", tuned").partition(", ")[::2] for name in self.rows}
        kinds, lengths = (list(dict.fromkeys(part[place] for part in parts.values())) for place in (0, 1))
        for name, cells in self.rows.items():
            kind, length = parts[name]
            axes.plot(
                [int(column) for column in cells],
                list(cells.values()),
                color=f"C{kinds.index(kind)}",
                marker="os^Dv"[lengths.index(length) % 5],
                linestyle="-" if name.endswith("tuned") else "--",
                label=name,
            )
        axes.set(xscale="log", yscale=yscale, xlabel=xlabel, ylabel=ylabel, xticks=self.columns, xticklabels=self.columns)
        if yscale == "log":
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()  # those of a logarithm have labels of their own
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(output, bbox_inches="tight")
