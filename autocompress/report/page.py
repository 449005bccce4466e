"""`report.html`: one self-contained page. What is shown comes from `series` and `plots`; this puts it together.

All data is in the page once, as JSON in which no tag can begin; the page's script moves between trials with it.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.io import to_json
from plotly.offline import get_plotlyjs

from autocompress.artifact.packed import read
from autocompress.errors import ArtifactError
from autocompress.front import Trial
from autocompress.policy import Policy
from autocompress.report.plots import (
    BLUE,
    GREY,
    ORANGE,
    PURPLE,
    Bars,
    curve_style,
    curves_figure,
    details_figure,
    front_figure,
    importance_figure,
    policy_figure,
    predicted_figure,
    progress_figure,
    sensitivity_figure,
)
from autocompress.report.series import (
    Importance,
    box_of,
    choice_importance,
    level_text,
    measured_trials,
    predictions,
    progress,
    recipe_importance,
    sensitivity,
    thinned,
)
from autocompress.report.tables import Run, plain, recipe_text, size_text

POLICY_NUMBERS = 500_000
"""Numbers (trials times layers) that the policies in a page take at most; the front's come first."""
SHOWN_CURVES = 40
SHOWN_DETAILS = 20


def render(run: Run) -> str:
    """The page, self-contained: Plotly is in it once, and every text from the run is text."""
    shown = run.picked or run.nearest
    layers = Layers(run)
    figures, notes = _figures(run, shown, layers) if shown is not None else ({}, {})
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            shown=run.row(shown) if shown else None,
            answer=_answer(run, shown) if shown else [],
            rows=[run.row(trial) for trial in run.front] if shown else [],
            figures=figures,
            notes=notes,
            data=island({"figures": figures, **_data(run, shown, layers)}) if shown else "",
            script=source("report.js"),
            **assets(),
            failures=[t for t in run.trials if t.evaluation.status == "failed"],
            config=json.dumps(run.config, indent=2),
            packages=" ".join(f"{name}=={version}" for name, version in _installable(run).items()),
        )
    )


def environment(*, autoescape: bool = True) -> Environment:
    """Templates of the package, with every text escaped as HTML unless the template does that itself."""
    found = Environment(
        loader=PackageLoader("autocompress", "report"), autoescape=autoescape, trim_blocks=True, lstrip_blocks=True
    )
    found.filters |= {
        "size": size_text,
        "quality": quality_text,
        "recipe": recipe_text,
        "quoted": lambda path: shlex.quote(str(path)),
    }
    return found


def quality_text(value: float | None) -> str:
    """Four digits, or a dash for what is not known."""
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"


@lru_cache
def _plotly() -> Markup:
    return Markup(get_plotlyjs())


def assets() -> dict[str, Markup]:
    """What every page has in it."""
    return {"style": source("report.css"), "charts": source("charts.js"), "plotly": _plotly()}


def source(name: str) -> Markup:
    """A file beside this one, as it is."""
    return Markup((resources.files("autocompress") / "report" / name).read_text(encoding="utf-8"))


def island(data: dict[str, Any]) -> Markup:
    """JSON inside a script element: without `<`, nothing in it ends that element or begins another."""
    text = json.dumps(plain(data), separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _installable(run: Run) -> dict[str, str]:
    versions = dict(run.config.get("versions", {}))
    versions.pop("python", None)
    return {name: str(v).split("+")[0] for name, v in versions.items()}


def _answer(run: Run, trial: Trial) -> list[tuple[str, str, str, str, str]]:
    """(what, trial, original, change, budget) of the answer's table."""
    m, dense, limit = trial.measured, run.dense, run.budget
    smaller, lighter = (
        f"{own / of:.1%} of it" if of else "–" for own, of in ((m.bytes, dense.bytes), (m.macs, dense.macs))
    )

    def kept(value: float, bound: float | None, text: str) -> str:
        return "none" if bound is None else f"{text}: {value / bound:.1%} used"

    faster = f"{dense.latency_ms / m.latency_ms:.2f}x as fast" if m.latency_ms > 0 else "–"
    size = "" if limit.bytes is None else size_text(limit.bytes)
    ms = "" if limit.ms is None else f"{limit.ms:.4g} ms"
    macs = "" if limit.macs is None else f"{limit.macs:,}"
    gained = f"{m.quality - dense.quality:+.4f}"
    return [
        (f"{run.metric} on val", quality_text(m.quality), quality_text(dense.quality), gained, "none"),
        (f"{run.metric} on test", quality_text(trial.quality_test), "–", "", "none"),
        ("file", size_text(m.bytes), size_text(dense.bytes), smaller, kept(m.bytes, limit.bytes, size)),
        ("latency", f"{m.latency_ms:.3g} ms", f"{dense.latency_ms:.3g} ms", faster, kept(m.latency_ms, limit.ms, ms)),
        ("MACs", f"{m.macs:,}", f"{dense.macs:,}", lighter, kept(m.macs, limit.macs, macs)),
    ]  # fmt: skip


# --- policies as numbers --------------------------------------------------------------------------------


class Layers:
    """Per layer: what each choice takes, by the profile or by arithmetic, and which channel groups narrow it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.names = [str(layer["name"]) for layer in run.layers]
        self.groups = [list(layer.get("groups", ())) for layer in run.layers]
        self.weights = [math.prod(layer["shape"]) for layer in run.layers]
        self._levels: dict[str, dict[tuple[float, float], int]] = {}
        for layer in run.levels.layers if run.levels is not None else ():
            self._levels[layer.name] = {(x.choice.bits, x.choice.sparsity): x.bytes for x in layer.levels}
        self.choices: dict[tuple[float, float], int] = {}

    def index(self, policy: Policy) -> list[int]:
        """For each layer, the number of its choice in `choices`."""
        found = []
        for name in self.names:
            choice = policy.choice(name)
            found.append(self.choices.setdefault((choice.bits, choice.sparsity), len(self.choices)))
        return found

    def takes(self, layer: int, choice: tuple[float, float]) -> int:
        """About how many bytes a layer takes with all its channels."""
        known = self._levels.get(self.names[layer], {}).get(choice)
        bits, zeros = choice
        return known if known is not None else round(self.weights[layer] * bits * (1 - zeros) / 8)

    def table(self) -> list[list[int]]:
        """`takes` for each layer and each of `choices`."""
        return [[self.takes(i, choice) for choice in self.choices] for i in range(len(self.names))]

    def share(self, layer: int, policy: Policy) -> float:
        """The share of a layer's weights that channel pruning leaves."""
        return math.prod(policy.keep.get(group, 1.0) for group in self.groups[layer])

    def bars(self, trial: Trial) -> Bars:
        """What `policy_figure` draws; bytes from the artifact where there is one, else about."""
        policy, sizes = trial.evaluation.policy, self.sizes(trial)
        shares = [self.share(i, policy) for i in range(len(self.names))]
        chosen = [policy.choice(name) for name in self.names]
        about = [round(self.takes(i, (c.bits, c.sparsity)) * shares[i]) for i, c in enumerate(chosen)]
        return Bars(
            [c.bits if share else 0 for c, share in zip(chosen, shares, strict=True)],
            [100 * c.sparsity if share else 0.0 for c, share in zip(chosen, shares, strict=True)],
            [100 * share for share in shares],
            [*(about if sizes is None else sizes)],
        )

    def sizes(self, trial: Trial) -> list[int] | None:
        """Bytes of each layer's weight in the trial's packed file; None without one."""
        if not trial.artifact.endswith(".acz"):
            return None
        try:
            header = read(self.run.folder / "artifacts" / Path(trial.artifact).name).header
        except ArtifactError:  # moved away by the user; sizes are estimated then
            return None
        known = {entry.name: entry.nbytes for entry in header.entries}
        return [known.get(f"{name}.weight", known.get(name, 0)) for name in self.names]  # or a recurrent parameter

    def level(self, trial: Trial) -> list[str]:
        """The level of each layer, as the heat map names it."""
        policy = trial.evaluation.policy
        chosen = [policy.choice(name) for name in self.names]
        return [level_text(c.bits, c.sparsity) for c in chosen]


def _data(run: Run, chosen: Trial | None, layers: Layers) -> dict[str, Any]:
    """What the script needs beside the figures: every shown trial as numbers, and the words around them."""
    shown, _ = thinned(run)
    members = {t.number for t in run.front}
    budget = POLICY_NUMBERS // max(1, len(layers.names))
    ordered = sorted(shown, key=lambda t: (t.number not in members, -t.number))
    with_policy = {t.number for t in ordered[:budget]} | ({chosen.number} if chosen else set())
    whole = {t.evaluation.policy.key(): t.number for t in reversed(measured_trials(run)) if not t.evaluation.screened}
    points = [
        _point(run, t, layers, policy=t.number in with_policy, exact=t.number in members, whole=whole) for t in shown
    ]
    folder = shlex.quote(str(run.folder))
    return {
        "points": points,
        "front": [t.number for t in run.front],
        "chosen": chosen.number if chosen else None,
        "picked": run.picked.number if run.picked else None,
        "choices": [[bits, zeros, level_text(bits, zeros)] for bits, zeros in layers.choices],
        "takes": layers.table(),
        "groups": layers.groups,
        "dense": {"q": run.dense.quality, "b": run.dense.bytes, "ms": run.dense.latency_ms, "macs": run.dense.macs},
        "budget": {"b": run.budget.bytes, "ms": run.budget.ms, "macs": run.budget.macs},
        "metric": run.metric,
        "rising": run.direction == "max",
        "commands": {
            "pick": f"autocompress pick {folder} --trial ",
            "export": f"autocompress export {folder} --format {run.settings.format} --trial ",
        },
        "details": run.details,
        "styles": [curve_style(False), curve_style(True)],
        "most_details": SHOWN_DETAILS,
    }


def _point(
    run: Run, trial: Trial, layers: Layers, *, policy: bool, exact: bool, whole: dict[str, int]
) -> dict[str, Any]:
    m, e = trial.measured, trial.evaluation
    parent = run.parent(trial)
    found: dict[str, Any] = {"n": trial.number, "q": m.quality, "b": m.bytes, "ms": m.latency_ms, "macs": m.macs}
    found |= {"fits": run.budget.excess(m) <= 0, "loss": m.loss}
    if not math.isnan(trial.quality_test):
        found["qt"] = trial.quality_test
    if e.screened:
        found |= {"part": True, "whole": whole.get(e.policy.key())}
    if e.policy.recovery.epochs:
        found |= {"recipe": f"{e.policy.recovery.epochs} epoch(s): {recipe_text(e.policy.recovery)}"}
        found |= {"before": [parent.number, parent.measured.quality, parent.measured.bytes] if parent else None}
    if policy:
        found |= {"c": layers.index(e.policy), "keep": {k: v for k, v in e.policy.keep.items() if v < 1}}
        found["by"] = e.policy.criterion
        if exact and (sizes := layers.sizes(trial)) is not None:
            found["sizes"] = sizes
    return found


# --- figures --------------------------------------------------------------------------------------------


def _figures(run: Run, shown: Trial, layers: Layers) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures as Plotly's JSON by name, and what the page says of some of them; absent where there is nothing."""
    found = {"size": front_figure(run), "latency": front_figure(run, "latency_ms")}
    found["policy"] = policy_figure(run, layers.bars(shown))
    notes: dict[str, Any] = {}
    if (known := sensitivity(run)) is not None and any(not math.isnan(v) for row in known.loss for v in row):
        levels = {level_text(*level) for level in known.levels}
        chosen = dict(zip(layers.names, layers.level(shown), strict=True))
        marks = [chosen.get(name) if chosen.get(name) in levels else None for name in known.layers]
        found["sensitivity"] = sensitivity_figure(run, known, marks)
    runs = [run, *([run.random] if run.random is not None and run.random.front else [])]
    box = box_of(runs)
    lines = [(line, GREY if line.screened else BLUE) for line in progress(run, box)]
    for other in runs[1:] if lines else []:
        lines += [(line, PURPLE) for line in progress(other, box) if not line.screened]
    for x in ("evaluations", "seconds"):
        found[f"progress_{x}"] = progress_figure(lines, x)
    trained = _with_curves(run)
    if trained:
        found["curves"] = curves_figure(trained, shown.number)
        notes["curves"] = len(trained)
    for name, importance, colour in (
        ("choices", choice_importance(run), BLUE),
        ("recipes", recipe_importance(run), ORANGE),
    ):
        if importance is not None and importance.shares:
            found[name], notes[name] = importance_figure(importance, colour), _trust(importance)
    for unit, pairs in predictions(run).items():
        if pairs:
            found[f"predicted_{unit}"] = predicted_figure(pairs, unit)
            off = sorted(abs(m / p - 1) for _, p, m in pairs)
            notes[f"predicted_{unit}"] = {"median": median(off), "worst": off[-1], "count": len(off)}
    details = _details_of(run, shown)
    if details:
        found["details"] = details_figure(details[:SHOWN_DETAILS], shown.number)
    return as_json(found), notes


def as_json(figures: dict[str, Any]) -> dict[str, Any]:
    """Plotly's own JSON of each figure."""
    return {name: json.loads(to_json(figure, validate=False)) for name, figure in figures.items()}


def _with_curves(run: Run) -> list[Trial]:
    """Trained trials that have a curve: the front's, then the latest."""
    members = {t.number for t in run.front}
    trained = [t for t in measured_trials(run) if t.evaluation.curve is not None and t.evaluation.curve.step]
    return sorted(trained, key=lambda t: (t.number not in members, -t.number))[:SHOWN_CURVES]


def _trust(found: Importance) -> dict[str, Any]:
    return {"trials": found.trials, "explained": found.explained, "weak": found.explained < 0.3}


def _details_of(run: Run, trial: Trial) -> Sequence[tuple[str, float, float]]:
    """(name, original, trial) by what changed most; of the trial that is shown, or of the first that is known."""
    if run.details is None:
        return []
    trials, dense = run.details.get("trials", {}), run.details.get("dense", {})
    own: dict[str, float] = trials.get(str(trial.number)) or next(iter(trials.values()), {})
    rows = [(name, dense[name], own[name]) for name in dense if name in own]
    return sorted(rows, key=lambda row: -abs(row[2] - row[1]))
