"""Writes `report.html`, `front.png`, `front.csv` and `trials.csv` into a run folder."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.io import to_html

from autocompress.artifact.layout import Header
from autocompress.artifact.packed import read
from autocompress.errors import ArtifactError
from autocompress.files import write
from autocompress.front import Trial
from autocompress.report.plots import front_figure, front_png, policy_figure, progress_figure
from autocompress.report.tables import Run, recipe_text, size_text, table


def write_report(folder: Path) -> Run:
    """Write every file of the report; works on a finished, running or interrupted run. Raises `RunError`."""
    run = Run.read(folder)
    write(folder / "front.csv", table(run.front, run.budget, run.parents).to_csv(index=False).encode())
    write(folder / "trials.csv", table(run.trials, run.budget, run.parents).to_csv(index=False).encode())
    if run.front:
        write(folder / "front.png", front_png(run))
    write(folder / "report.html", render(run).encode())
    return run


def render(run: Run) -> str:
    """The page, self-contained: Plotly is in it once, and every text from the run is escaped."""
    environment = Environment(
        loader=PackageLoader("autocompress", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "size": size_text,
        "quality": _quality,
        "recipe": recipe_text,
        "quoted": lambda path: shlex.quote(str(path)),
    }
    shown = run.picked or run.nearest
    figures = []
    if shown is not None:
        figures = [
            _embed(front_figure(run), first=True),
            _embed(front_figure(run, "latency_ms")),
            _embed(policy_figure(run, shown, _header(run, shown))),
            _embed(progress_figure(run)),
        ]
    return environment.get_template("report.html.j2").render(
        run=run,
        shown=run.row(shown) if shown else None,
        policy=shown.evaluation.policy if shown else None,
        rows=[run.row(trial) for trial in run.front],
        figures=figures,
        failures=[t for t in run.trials if t.evaluation.status == "failed"],
        config=json.dumps(run.config, indent=2),
    )


def _header(run: Run, trial: Trial) -> Header | None:
    if not trial.artifact:
        return None
    try:
        return read(run.folder / "artifacts" / Path(trial.artifact).name).header
    except ArtifactError:  # moved away by the user; the bars of bytes are left out
        return None


def _embed(figure: Any, *, first: bool = False) -> Markup:
    return Markup(
        to_html(figure, full_html=False, include_plotlyjs=first, config={"displaylogo": False, "displayModeBar": False})
    )


def _quality(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"
