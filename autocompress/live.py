"""What a terminal shows while something runs: a live view where there is one, plain lines in a log. Decides nothing."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from autocompress.study import Progress

LOG_EVERY = 10.0
"""Seconds between two lines of the same stage in a log."""
WINDOW = 30.0
"""Seconds over which the pace is measured."""
COLUMNS = 24
BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-~+*%@"


class Pace:
    """Evaluations a second, over the last half minute of this call: what an earlier part of a run did is no pace."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, seconds: float, evaluations: int) -> None:
        """So many evaluations after so many seconds."""
        if self._seen and evaluations < self._seen[-1][1]:
            self._seen.clear()  # another stage counts anew
        self._seen.append((seconds, evaluations))
        while len(self._seen) > 2 and seconds - self._seen[1][0] > WINDOW:
            self._seen.popleft()

    def __str__(self) -> str:
        (since, before), (now, done) = (self._seen[0], self._seen[-1]) if self._seen else ((0.0, 0), (0.0, 0))
        if now <= since or done <= before:
            return ""
        rate = (done - before) / (now - since)
        return f"{rate:.1f} evaluations/s" if rate >= 1 else f"{1 / rate:.1f} s an evaluation"


def sparkline(points: Sequence[tuple[int, float]], *, rising: bool = True, plain: bool = False) -> str:
    """The best quality within each of some sizes, from the smallest file to the largest, on a log scale.

    `points` are (bytes, quality); `rising` says that more is better, so that up always is.
    """
    if not points:
        return ""
    blocks, ordered = ASCII if plain else BLOCKS, sorted(points)
    logs = [math.log(max(1, size)) for size, _ in ordered]
    values = [quality if rising else -quality for _, quality in ordered]
    low, span = min(values), max(values) - min(values)
    columns = COLUMNS if logs[-1] > logs[0] else 1
    found = []
    for column in range(columns):
        limit = logs[0] + (logs[-1] - logs[0]) * column / max(1, columns - 1) + 1e-9
        best = max(value for at, value in zip(logs, values, strict=True) if at <= limit)
        found.append(blocks[round((best - low) / span * (len(blocks) - 1)) if span else -1])
    return "".join(found)


def duration(seconds: float) -> str:
    """`45 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _best(p: Progress) -> str:
    if p.best is None:
        return "none yet"
    return f"{p.best.measured.quality:.4f} at {p.best.measured.bytes:,} bytes"


def line(p: Progress, pace: str = "") -> str:
    """A glance in one line, for logs."""
    detail = f" ({p.detail})" if p.detail else ""
    left = "" if p.left is None else f" | about {duration(p.left)} left"
    if p.stage in ("ablating", "comparing"):
        return f"{p.stage} {p.done}/{p.total}{detail} | {duration(p.seconds)}{left}"
    return (
        f"{p.stage} {p.done}/{p.total}{detail} | {p.evaluations} evaluations, {duration(p.seconds)}"
        f"{f', {pace}' if pace else ''} | best in budget: {_best(p)} | front {p.front}{left}"
    )


class View:
    """The last glance as a few lines, drawn anew several times a second."""

    def __init__(self) -> None:
        self.pace = Pace()
        self._last: Progress | None = None
        self._at = time.monotonic()
        self._spinner = Spinner("dots")

    def update(self, progress: Progress) -> None:
        """Show this from now on."""
        self._last, self._at = progress, time.monotonic()
        self.pace.note(progress.seconds, progress.evaluations)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        p = self._last
        if p is None:
            self._spinner.text = Text("loading the task")
            yield self._spinner
            return
        waited = time.monotonic() - self._at
        left = "" if p.left is None else f"about {duration(max(0.0, p.left - waited))} left"
        self._spinner.text = Text(p.stage, style="bold")
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(1, p.total), completed=p.done, width=min(30, max(8, options.max_width - 50)))
        head.add_row(self._spinner, bar, f"{p.done}/{p.total}", f"{duration(p.seconds + waited)}", left)
        yield head
        rows = Table.grid(padding=(0, 2))
        if p.detail:
            rows.add_row("", Text(p.detail, style="dim", overflow="ellipsis", no_wrap=True))
        if p.stage not in ("ablating", "comparing", "profiling", "timing layers"):
            told = f"{p.evaluations} evaluation{'s' * (p.evaluations != 1)}" + (
                f", {self.pace}" if str(self.pace) else ""
            )
            rows.add_row("", told)
            rows.add_row("best in budget", Text(_best(p), style="bold green" if p.best is not None else ""))
            rows.add_row(f"front of {p.front}", self._front(p, plain=options.ascii_only))
        yield rows

    def _front(self, p: Progress, *, plain: bool) -> Text:
        if not p.points:
            return Text("")
        first, last = min(p.points), max(p.points)
        drawn = sparkline(p.points, rising=p.rising, plain=plain)
        found = Text(drawn, style="cyan")
        found.append(f"  {first[1]:.4f} at {first[0]:,} bytes", style="dim")
        if len(p.points) > 1:
            found.append(f" to {last[1]:.4f} at {last[0]:,}", style="dim")
        return found


@contextmanager
def watching(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A live view on a terminal; otherwise a plain line at most every ten seconds and at each change of stage."""
    if console.is_terminal and not console.is_dumb_terminal:
        view = View()
        with Live(view, console=console, refresh_per_second=8, transient=True) as live:

            def show(progress: Progress) -> None:
                if progress.note:
                    live.console.print(progress.note, markup=False, soft_wrap=True)
                view.update(progress)

            yield show
        return
    console.print("loading the task")
    last: tuple[str, float] = ("", -math.inf)
    pace = Pace()

    def log(progress: Progress) -> None:
        nonlocal last
        if progress.note:
            console.print(progress.note, markup=False, soft_wrap=True)
        pace.note(progress.seconds, progress.evaluations)
        if progress.stage != last[0] or time.monotonic() - last[1] >= LOG_EVERY:
            last = progress.stage, time.monotonic()
            console.print(escape(line(progress, str(pace))), soft_wrap=True)

    yield log
