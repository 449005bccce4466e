"""Several runs of the same model side by side: their fronts on one chart, their progress in one box."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from autocompress.errors import RunError
from autocompress.files import write
from autocompress.front import Trial, Wish, feasible, pick
from autocompress.report.page import as_json, assets, environment, island
from autocompress.report.plots import COLOURS, fronts_figure, progress_figure
from autocompress.report.series import Progress, box_of, progress
from autocompress.report.tables import Run, plain, size_text


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs that can be compared. Raises `RunError` if they are of different models or metrics, too few or too many."""
    if not 2 <= len(folders) <= len(COLOURS):
        raise RunError(f"compare takes 2 to {len(COLOURS)} runs, not {len(folders)}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RunError("the same run is named twice: give different run folders")
    runs = [Run.read(folder) for folder in folders]
    first = runs[0]
    for run in runs:
        pairs: list[tuple[str, object, object]] = [("task", run.task, first.task), ("metric", run.metric, first.metric)]
        pairs += [
            ("direction", run.direction, first.direction),
            ("original's bytes", run.dense.bytes, first.dense.bytes),
        ]
        for what, own, other in pairs:
            if own != other:
                raise RunError(
                    f"{run.folder} cannot be compared with {first.folder}: its {what} is {own!r}, not {other!r}"
                )
        if not run.front:
            raise RunError(f"{run.folder} has no measured trial to compare: continue it with --resume")
    return runs


def names_of(runs: Sequence[Run]) -> list[str]:
    """The folders' names, with more of the path where two are alike."""
    short = [run.folder.resolve().name for run in runs]
    return [name if short.count(name) == 1 else str(run.folder) for name, run in zip(short, runs, strict=True)]


def compare(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a run: what it took, its share of the common box, and its best within the tightest of the budgets."""
    box = box_of(runs)
    limits = [run.budget.bytes for run in runs if run.budget.bytes is not None]
    tightest = min(limits, default=None)
    return [_row(run, name, progress(run, box), tightest) for run, name in zip(runs, names_of(runs), strict=True)]


def _row(run: Run, name: str, lines: Sequence[Progress], tightest: int | None) -> dict[str, Any]:
    best = _best(run, tightest)
    return dict(
        plain(
            {
                "run": str(run.folder),
                "name": name,
                "controller": run.settings.controller,
                "budget": str(run.budget),
                "evaluations": run.evaluations,
                "seconds": round(run.seconds, 3),
                "hypervolume": lines[-1].volume[-1] if lines else 0.0,
                "limit_bytes": tightest,
                "best": None if best is None else run.row(best),
            }
        )
    )


def _best(run: Run, limit: int | None) -> Trial | None:
    fits = [t for t in feasible(run.trials, run.budget) if limit is None or t.measured.bytes <= limit]
    return pick(fits, run.direction, Wish(), run.budget) if fits else None


def compare_table(runs: Sequence[Run], rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    limit = rows[0]["limit_bytes"]
    within = f"; the best within {limit:,} bytes" if limit is not None else ""
    shown = Table("run", "controller", title_justify="left")
    shown.title = escape(f"{runs[0].task}, {runs[0].metric} on val{within}")
    for name in ("evals", "s", "hypervolume", "best", "test", "bytes"):
        shown.add_column(name, justify="right")
    for row in rows:
        best = row["best"] or {}
        value, test = best.get("quality_val"), best.get("quality_test")
        shown.add_row(
            escape(row["name"]),
            row["controller"],
            str(row["evaluations"]),
            f"{row['seconds']:.0f}",
            f"{row['hypervolume']:.3f}",
            "none" if value is None else f"{value:.4f}",
            "–" if test is None else f"{test:.4f}",
            f"{best['bytes']:,}" if best else "",
        )
    return shown


def write_comparison(runs: Sequence[Run], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The page: fronts, progress over evaluations and seconds, and the table."""
    names, box = names_of(runs), box_of(runs)
    lines = [
        (replace(line, name=name + (": screened" if line.screened else "")), colour)
        for run, name, colour in zip(runs, names, COLOURS, strict=False)
        for line in progress(run, box)
    ]
    figures = {"size": fronts_figure(runs, names), "latency": fronts_figure(runs, names, "latency_ms")}
    figures |= {f"progress_{x}": progress_figure(lines, x) for x in ("evaluations", "seconds")}
    found = as_json(figures)
    page = environment().get_template("compare.html.j2").render(
        runs=runs, names=names, rows=rows, figures=found, data=island({"figures": found}), limit=rows[0]["limit_bytes"],
        size=size_text, escape=html.escape, **assets(),
    )  # fmt: skip
    write(path, page.encode())
