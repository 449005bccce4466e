"""Writes every file of the report into a run folder."""

from __future__ import annotations

from pathlib import Path

from autocompress.files import write
from autocompress.report.page import environment, render
from autocompress.report.plots import front_picture
from autocompress.report.tables import Run, csv_bytes, markdown, table


def write_report(folder: Path) -> Run:
    """Write every file of the report; works on a finished, running or interrupted run. Raises `RunError`."""
    run = Run.read(folder)
    for name, trials in (("front.csv", run.front), ("trials.csv", run.trials)):
        write(folder / name, csv_bytes(table(trials, run.budget, run.parents, run.metric)))
    for form in ("png", "svg") if run.front else ():
        write(folder / f"front.{form}", front_picture(run, form))
    write(folder / "summary.md", summary_text(run).encode())
    write(folder / "report.html", render(run).encode())
    return run


def summary_text(run: Run) -> str:
    """`summary.md`: the answer, the front, and how it was run, as text that no name can turn into something else."""
    shown = run.picked or run.nearest
    found = environment(autoescape=False)
    found.filters["md"] = markdown
    return (
        found.get_template("summary.md.j2").render(
            run=run,
            shown=run.row(shown) if shown else None,
            rows=[run.row(trial) for trial in run.front] if shown else [],
            failed=sum(t.evaluation.status == "failed" for t in run.trials),
        )
        + "\n"
    )
