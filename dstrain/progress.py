"""How far a verb is: bars on a terminal, a line of the log every minute everywhere else.

Bars of nested work stand below one another, as a validation below its training. Log lines, warnings and what libraries print
appear above them, since rich redirects `sys.stderr` meanwhile. Bars vanish at their end: the verb's last words say the result.
Cost: a thread that draws twice a second, on a terminal only.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from datetime import timedelta
from types import TracebackType
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from dstrain.log import logger

SECONDS_PER_LINE = 60.0
SEPARATOR = "  "
LEAST_BAR = 8
SECONDS_UNTIL_INNER_BAR = 0.5
"""Work within other work gets a bar of its own after so long; short work would only flicker."""
_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)


class _Items(Sized, Protocol[_T_co]):
    def __iter__(self) -> Iterator[_T_co]: ...


class Progress:
    """The progress of one piece of work, shown while it is entered.

    doing: one word. total: of `unit`, None if unknown. shown: False on ranks that stay silent.
    """

    def __init__(self, doing: str, total: int | None, unit: str, *, shown: bool = True) -> None:
        self.unit = unit
        self._doing, self._total = doing, total
        self._shown = shown
        self._bars = Bars(disable=True)
        self._notes: Sequence[str] | None = None
        self._eta: float | None = None

    def __enter__(self) -> Progress:
        self._start = self._last_line = time.monotonic()
        self._inner = terminal_width() is not None
        if self._shown:
            self._bars = _terminal.open() or self._bars
        self._id = self._bars.add_task(self._doing, total=self._total, progress=self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.remove_task(self._id)
        if not self._bars.disable:
            _terminal.close()

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        self._bars.advance(self._id, count)
        self._say_if_due()

    def move_to(
        self, completed: int, *, notes: Sequence[str] | None = None, eta_seconds: float | None = None, say: bool = False
    ) -> None:
        """So many are done.

        notes: instead of the rate, the most important first. eta_seconds: instead of a guess. say: draw, or write a line of the
        log, at once.
        """
        self._notes, self._eta = notes, eta_seconds
        self._bars.update(self._id, completed=completed)
        self._say_if_due(now=say)

    def is_visible(self) -> bool:
        """Whether it has a bar yet."""
        return not self._inner or time.monotonic() - self._start >= SECONDS_UNTIL_INNER_BAR

    def line(self, task: Task, width: int | None = None) -> str:
        """How many, what fits of the notes or the rate, and the time left. task: this one as the bars know it."""
        parts = [f"{task.completed:,.0f}{'' if task.total is None else f'/{task.total:,.0f}'} {self.unit}"]
        if self._notes is not None:
            parts += self._notes
        elif task.speed:
            parts.append(f"{task.speed:,.{0 if task.speed >= 10 else 1}f} {self.unit}/s")
        left = task.time_remaining if self._eta is None else self._eta
        end = "" if left is None else f"{SEPARATOR}ETA {timedelta(seconds=round(left))}"
        return join_fitting(parts, None if width is None else width - len(end)) + end

    def _say_if_due(self, *, now: bool = False) -> None:
        if now or time.monotonic() - self._last_line >= SECONDS_PER_LINE:
            self._last_line = time.monotonic()
            self._bars.refresh()
            if self._shown and self._bars.disable:
                logger.info("%s: %s", self._doing, self.line(self._bars.tasks[0]))


def with_progress(items: _Items[_T], doing: str, unit: str, *, shown: bool = True) -> Iterable[_T]:
    """The items, with their progress."""
    with Progress(doing, len(items), unit, shown=shown) as progress:
        for item in items:
            yield item
            progress.advance()


def terminal_width() -> int | None:
    """Columns of a line above the bars; None if there are none, and a line may be of any length."""
    return _terminal.width()


def join_fitting(parts: Sequence[str], width: int | None) -> str:
    """The first part, and those after it that fit into `width` columns; None: all of them."""
    line = parts[0]
    for part in parts[1:]:
        if width is not None and len(line) + len(SEPARATOR) + len(part) > width:
            break
        line += SEPARATOR + part
    return line


class _Console(Console):
    """Leaves the cursor alone: a process that is killed could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class _Words(ProgressColumn):
    """What fits beside a bar in so many columns."""

    width = 0

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        return Text(task.fields["progress"].line(task, self.width))


class _VisibleBars(Bars):
    """Those that are visible, over the whole width."""

    def __init__(self) -> None:
        self._words, self._terminal = _Words(), _Console(stderr=True)
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            self._words,
            console=self._terminal,
            expand=True,
            transient=True,
            refresh_per_second=2,
            redirect_stdout=sys.stdout.isatty(),  # what is piped elsewhere is no message
        )

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        visible = [task for task in tasks if task.fields["progress"].is_visible()]
        doing = max((len(task.description) for task in visible), default=0)
        self._words.width = self._terminal.width - doing - LEAST_BAR - 3
        return super().make_tasks_table(visible)


class _Terminal:
    """The bars on the terminal: drawn from the first that opens to the last that closes."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._opened = 0

    def open(self) -> Bars | None:
        """None if stderr is no terminal that can move its cursor."""
        if self._bars is None and sys.stderr.isatty() and os.environ.get("TERM") not in {"dumb", "unknown"}:
            self._bars = _VisibleBars()
            self._bars.start()
        self._opened += self._bars is not None
        return self._bars

    def close(self) -> None:
        self._opened -= 1
        if self._bars is not None and not self._opened:
            self._bars.stop()
            self._bars = None

    def width(self) -> int | None:
        """Columns of the terminal while bars are shown."""
        return None if self._bars is None else self._bars.console.width


_terminal = _Terminal()
