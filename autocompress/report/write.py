"""Writes every file of the report into a run folder."""

from __future__ import annotations

from pathlib import Path

from autocompress.files import write
from autocompress.report.page import render
from autocompress.report.plots import front_png
from autocompress.report.tables import Run, csv_bytes, table


def write_report(folder: Path) -> Run:
    """Write every file of the report; works on a finished, running or interrupted run. Raises `RunError`."""
    run = Run.read(folder)
    for name, trials in (("front.csv", run.front), ("trials.csv", run.trials)):
        write(folder / name, csv_bytes(table(trials, run.budget, run.parents, run.metric)))
    if run.front:
        write(folder / "front.png", front_png(run))
    write(folder / "report.html", render(run).encode())
    return run
