"""The numbers behind the charts of a report: progress, importances, sensitivity, thinning. Draws nothing."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autocompress.front import Trial
from autocompress.report.tables import Run

SHOWN_TRIALS = 2_000
"""Up to so many trials each is a point of its own in the page."""
CELLS = (64, 40)
"""Beyond that the page shows one trial for each cell of this grid (log bytes, quality), and every front member."""
FEWEST_FOR_IMPORTANCE = 12
"""Trials below which nothing is said about what matters."""
FOREST_TRIALS = 1_000


def measured_trials(run: Run) -> list[Trial]:
    """`ok` trials that were really measured, in order."""
    return [t for t in run.trials if t.evaluation.status == "ok" and t.evaluation.copy_of is None]


def quality_range(run: Run) -> tuple[float, float]:
    """Limits that show the dense model and the front as far as anyone would use it; weak trials may fall outside."""
    dense, values = run.dense.quality, [t.measured.quality for t in run.front]
    if run.direction == "max":
        low, high = max(min(values), dense - 0.1 * abs(dense)), max(*values, dense)
    else:
        low, high = min(*values, dense), min(max(values), dense + abs(dense))
    low, high = min(low, dense), max(high, dense)
    margin = max((high - low) * 0.1, abs(high) * 1e-3, 1e-9)
    return low - margin, high + margin


def thinned(run: Run) -> tuple[list[Trial], dict[int, int]]:
    """The trials that a page shows, and for each how many it stands for where that is more than itself.

    Of the trials in one cell of a grid the last stands for all; members of the front stand for themselves.
    """
    trials = measured_trials(run)
    if len(trials) <= SHOWN_TRIALS:
        return trials, {}
    members = {t.number for t in run.front}
    rest = [t for t in trials if t.number not in members]
    sizes = np.log([max(1, t.measured.bytes) for t in rest])
    quality = np.nan_to_num([t.measured.quality for t in rest])
    low, high = quality_range(run)
    cells = _cells(sizes, CELLS[0]) * CELLS[1] + _cells(np.clip(quality, low, high), CELLS[1])
    last: dict[int, int] = {}
    counts: dict[int, int] = {}
    for i, cell in enumerate(cells.tolist()):
        last[cell] = i
        counts[cell] = counts.get(cell, 0) + 1
    chosen = {rest[i].number: counts[cell] for cell, i in last.items()}
    shown = [t for t in trials if t.number in members or t.number in chosen]
    return shown, {number: count for number, count in chosen.items() if count > 1}


def _cells(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    low, span = float(values.min()), float(np.ptp(values)) or 1.0
    return np.minimum(((values - low) / span * count).astype(np.int64), count - 1)


# --- progress -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Hypervolume after every evaluation that made it grow, and after the last. `screened`: scored on a part of val."""

    name: str
    evaluations: list[int]
    seconds: list[float]
    volume: list[float]
    screened: bool = False


class Box(NamedTuple):
    """Where hypervolume is counted: log bytes from `left` to `right`, quality (higher-better) from `low` to `high`."""

    left: float
    right: float
    low: float
    high: float


def box_of(runs: Sequence[Run]) -> Box:
    """From the smallest file to the byte budget (or the original), from the chart's worst quality to the best."""
    trials = [t for run in runs for t in measured_trials(run)]
    first = runs[0]
    sign = 1.0 if first.direction == "max" else -1.0
    limits = [quality_range(run) for run in runs if run.front]
    worst = min(sign * (low if sign > 0 else high) for low, high in limits)
    best = max([sign * first.dense.quality, *(sign * t.measured.quality for t in trials)])
    right = max(run.dense.bytes if run.budget.bytes is None else run.budget.bytes for run in runs)
    left = min(t.measured.bytes for t in trials)
    return Box(math.log(left), math.log(max(right, left + 1)), worst, max(best, worst + 1e-9))


class Area:
    """Share of a box that a growing set of (log bytes, quality) points dominates."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self._sizes: list[float] = []  # rising, with rising quality: the front
        self._qualities: list[float] = []
        self.value = 0.0

    def add(self, size: float, quality: float) -> bool:
        """Whether the point, with its log bytes, made the area larger."""
        box = self._box
        size, quality = max(size, box.left), min(quality, box.high)
        if not (size < box.right and quality > box.low):
            return False
        at = bisect_left(self._sizes, size)
        if at and self._qualities[at - 1] >= quality:
            return False
        if at < len(self._sizes) and self._sizes[at] == size and self._qualities[at] >= quality:
            return False
        end = at
        while end < len(self._sizes) and self._qualities[end] <= quality:
            end += 1
        self._sizes[at:end], self._qualities[at:end] = [size], [quality]
        ends = [*self._sizes[1:], box.right]
        area = sum(
            (right - left) * (q - box.low) for left, right, q in zip(self._sizes, ends, self._qualities, strict=True)
        )
        self.value = area / ((box.right - box.left) * (box.high - box.low))
        return True


def progress(run: Run, box: Box) -> list[Progress]:
    """Hypervolume over the run of what fits the budget (of all where nothing does), as it was measured.

    Screened candidates are a line of their own: their quality is of a part of `val`.
    """
    counted = _counted(run)
    sign = 1.0 if run.direction == "max" else -1.0
    lines: dict[bool, tuple[Area, Progress]] = {}
    count, clock = 0, 0.0
    start = run.profile["seconds"] if run.profile is not None and not run.profile["reused"] else 0.0
    for t in run.trials:
        evaluation = t.evaluation
        if evaluation.status == "infeasible" or evaluation.copy_of is not None:
            continue
        count += 1
        clock = clock + evaluation.seconds if math.isnan(t.at) else t.at
        if t.number not in counted:
            continue
        if evaluation.screened not in lines:
            name = "screened on a part of val" if evaluation.screened else run.settings.controller
            lines[evaluation.screened] = Area(box), Progress(name, [], [], [], evaluation.screened)
        area, line = lines[evaluation.screened]
        if area.add(math.log(max(1, t.measured.bytes)), sign * t.measured.quality) or not line.volume:
            _extend(line, count, start + clock, area.value)
    for screened, (area, line) in lines.items():
        if not screened or len(lines) == 1:
            _extend(line, count, start + clock, area.value)
    return [line for _, line in lines.values()]


def _extend(line: Progress, evaluations: int, seconds: float, volume: float) -> None:
    line.evaluations.append(evaluations)
    line.seconds.append(round(seconds, 2))
    line.volume.append(volume)


def _counted(run: Run) -> set[int]:
    trials = measured_trials(run)
    fits = {t.number for t in trials if run.budget.excess(t.measured) <= 0}
    return fits or {t.number for t in trials}


# --- what matters ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Importance:
    """What a forest says that a number depended on: (choice, share) with the largest first, and how far to trust it.

    `explained` is R^2 on trials that a tree has not seen.
    """

    trials: int
    explained: float
    shares: list[tuple[str, float]]


def choice_importance(run: Run) -> Importance | None:
    """Of each layer's and group's choice for log(loss) of one-shot trials; None where too few differ."""
    trials = [t for t in measured_trials(run) if not t.evaluation.rung and t.measured.loss > 0]
    columns: dict[str, list[float]] = {}
    groups = sorted({name for t in trials for name in t.evaluation.policy.keep})
    policies = [t.evaluation.policy for t in trials]
    for layer in run.layers:
        name = layer["name"]
        columns[f"bits of {name}"] = [float(p.choice(name).bits) for p in policies]
        columns[f"zeros of {name}"] = [p.choice(name).sparsity for p in policies]
    for group in groups:
        columns[f"channels of {group}"] = [p.keep.get(group, 1.0) for p in policies]
    return _forest(columns, [math.log(t.measured.loss) for t in trials])


def recipe_importance(run: Run) -> Importance | None:
    """Of each ingredient for log(loss after / before recovery training); None where too few differ."""
    pairs = [(t, run.parent(t)) for t in measured_trials(run) if t.evaluation.policy.recovery.epochs]
    known = [(t, p) for t, p in pairs if p is not None and t.measured.loss > 0 and p.measured.loss > 0]
    recipes = [t.evaluation.policy.recovery for t, _ in known]
    columns: dict[str, list[float]] = {}
    for name in sorted(recipes[0].__dataclass_fields__) if recipes else ():
        values = [getattr(r, name) for r in recipes]
        ranks = {value: float(i) for i, value in enumerate(sorted(set(values)))}
        columns[name.replace("_", " ")] = [ranks[v] if isinstance(v, str) else float(v) for v in values]
    return _forest(columns, [math.log(t.measured.loss / p.measured.loss) for t, p in known])


def _forest(columns: dict[str, list[float]], target: list[float]) -> Importance | None:
    varied = {name: values for name, values in columns.items() if len(set(values)) > 1}
    if len(target) < FEWEST_FOR_IMPORTANCE or not varied or len(set(target)) < 2:
        return None
    from sklearn.ensemble import RandomForestRegressor  # takes a second to import

    step = -(-len(target) // FOREST_TRIALS)
    x, y = np.array(list(varied.values())).T[::step], np.array(target)[::step]  # (trials, choices)
    forest = RandomForestRegressor(100, min_samples_leaf=2, max_features=0.5, oob_score=True, random_state=0)
    forest.fit(x, y)
    shares = sorted(zip(varied, forest.feature_importances_.tolist(), strict=True), key=lambda pair: -pair[1])
    return Importance(len(y), float(forest.oob_score_), [(name, share) for name, share in shares if share > 0])


# --- sensitivity ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sensitivity:
    """Loss of the model if one layer alone has a level: `loss[layer][level]`, NaN where no search would use it."""

    layers: list[str]
    levels: list[tuple[float, float]]
    loss: list[list[float]]


def sensitivity(run: Run) -> Sensitivity | None:
    """From the run's profile; None for controllers that need none."""
    if run.levels is None:
        return None
    levels = sorted({(x.choice.bits, x.choice.sparsity) for layer in run.levels.layers for x in layer.levels})
    rows = []
    for layer in run.levels.layers:
        known = {(x.choice.bits, x.choice.sparsity): loss for x, loss in zip(layer.levels, layer.losses(), strict=True)}
        rows.append([known.get(level, math.nan) for level in levels])
    return Sensitivity([layer.name for layer in run.levels.layers], levels, rows)


def level_text(bits: float, sparsity: float) -> str:
    """`3 bits, 50% zeros`."""
    return f"{bits} bit{'s' * (bits != 1)}" + (f", {sparsity:.0%} zeros" if sparsity else "")


def predictions(run: Run) -> dict[str, list[tuple[Trial, float, float]]]:
    """(trial, predicted, measured) of `bytes` and `ms`, where a prediction was made before measuring.

    Older runs know no predicted bytes; there the one-shot size stands for what was told of a trained policy.
    """
    found: dict[str, list[tuple[Trial, float, float]]] = {"bytes": [], "ms": []}
    for t in measured_trials(run):
        told, parent = t.measured.predicted_bytes, run.parent(t)
        if math.isnan(told) and parent is not None:
            told = float(parent.measured.bytes)
        if told > 0:
            found["bytes"].append((t, told, float(t.measured.bytes)))
        if t.measured.predicted_ms > 0 and t.measured.latency_ms > 0:
            found["ms"].append((t, t.measured.predicted_ms, t.measured.latency_ms))
    return found
