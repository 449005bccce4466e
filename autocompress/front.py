"""Dominance, hypervolume, knee, and picking from a front. Plain numbers; no tensors, no files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from autocompress.errors import AutocompressError, NothingFits
from autocompress.trial import Budget, Evaluation, Measurement

Point = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """An evaluation with its number in the run; `quality_test` and `artifact` once the run has finalised it.

    `final_ms` is its file's latency, timed again alone on the machine, if the run has a latency budget. `at` are the
    seconds of the search when it was finished.
    """

    number: int
    evaluation: Evaluation
    quality_test: float = math.nan
    artifact: str = ""
    final_ms: float = math.nan
    at: float = math.nan

    @property
    def measured(self) -> Measurement:
        """What it measured, its latency by the last timing; only `ok` trials have that."""
        found = self.evaluation.measurement
        if found is None:
            raise ValueError(f"trial {self.number} has no measurement")
        return found if math.isnan(self.final_ms) else replace(found, latency_ms=self.final_ms)


def dominates(a: Point, b: Point) -> bool:
    """Whether `a` is at least as low everywhere as `b` and lower somewhere."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def non_dominated(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates, in the given order; of equal points the first."""
    order = sorted(range(len(points)), key=lambda i: (points[i], i))
    front: list[int] = []
    for i in order:  # in lexicographic order nothing later dominates anything earlier
        rivals = front[-1:] if len(points[i]) == 2 else front  # of two objectives the last has the least second one
        if not any(points[j] == points[i] or dominates(points[j], points[i]) for j in rivals):
            front.append(i)
    return sorted(front)


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Volume that the points dominate below `reference`, lower-better, by slicing along the last objective.

    Exact for any number of objectives (While et al. 2006, HSO); two and three are what searches use.
    """
    inside = [p for p in points if all(x < r for x, r in zip(p, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(p[0] for p in inside)
    levels = sorted({p[-1] for p in inside})
    volume = 0.0
    for level, above in zip(levels, [*levels[1:], reference[-1]], strict=True):
        slab = [p[:-1] for p in inside if p[-1] <= level]
        volume += (above - level) * hypervolume(slab, reference[:-1])
    return volume


def standard_error(share: float, inputs: int | None) -> float:
    """That of a share of right answers over so many independent inputs (binomial); NaN for any other metric."""
    if not inputs or not 0 <= share <= 1:
        return math.nan
    return math.sqrt(share * (1 - share) / inputs)


def close_neighbours(qualities: Sequence[float], inputs: int | None) -> int:
    """How many neighbours in the order of quality differ by less than the standard error of the better of them."""
    pairs = itertools.pairwise(sorted(qualities, reverse=True))
    return sum(abs(a - b) < standard_error(a, inputs) for a, b in pairs)


def knee(points: Sequence[Point]) -> int:
    """Index of the two-objective point farthest below the line between the ends of the front, both axes to [0, 1].

    The Kneedle idea (Satopaa et al. 2011) on a non-dominated set; with fewer than three points the first.
    """
    low = [min(p[d] for p in points) for d in (0, 1)]
    span = [max(p[d] for p in points) - low[d] or 1.0 for d in (0, 1)]
    scaled = [((p[0] - low[0]) / span[0], (p[1] - low[1]) / span[1]) for p in points]
    below = [i for i in range(len(points)) if len(points) < 3 or scaled[i][0] + scaled[i][1] < 1 - 1e-9]
    if not below:  # the front bends the other way: the end of best quality
        return min(range(len(points)), key=lambda i: (points[i][0], i))
    return min(below, key=lambda i: (scaled[i][0] + scaled[i][1], i))


# --- trials ---------------------------------------------------------------------------------------------


def objectives(trial: Trial, direction: str, *, latency: bool) -> Point:
    """What a front of trials minimises: quality turned lower-better, bytes and, if asked for, milliseconds."""
    measured = trial.measured
    quality = -measured.quality if direction == "max" else measured.quality
    return (quality, float(measured.bytes), measured.latency_ms) if latency else (quality, float(measured.bytes))


def front_of(trials: Sequence[Trial], direction: str, *, latency: bool = False) -> list[Trial]:
    """Non-dominated `scored` trials, smallest first."""
    ok = scored(trials)
    chosen = non_dominated([objectives(trial, direction, latency=latency) for trial in ok])
    return sorted((ok[i] for i in chosen), key=lambda trial: (trial.measured.bytes, trial.number))


@dataclass(eq=False)
class _Members:
    """Non-dominated trials with their points (members, objectives), in the order in which they came."""

    trials: list[Trial] = field(default_factory=list)
    points: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)))

    def add(self, point: Point, trial: Trial) -> bool:
        """Whether it is one of them now."""
        new = np.array([point])  # (1, objectives)
        if not self.trials:
            self.trials, self.points = [trial], new
            return True
        if (self.points <= new).all(axis=1).any():
            return False
        stays = np.flatnonzero(~(new <= self.points).all(axis=1))
        self.trials = [*(self.trials[i] for i in stays), trial]
        self.points = np.concatenate([self.points[stays], new])
        return True


@dataclass(eq=False)
class Archive:
    """What `front_of` and `pick` say of all feasible trials, kept up as trials come one by one.

    Adding one costs time in the size of the front, whatever the number of trials before it.
    """

    direction: str
    budget: Budget
    latency: bool = False
    _whole: _Members = field(default_factory=_Members, init=False)
    _screened: _Members = field(default_factory=_Members, init=False)
    _any_whole: bool = field(default=False, init=False)
    _front: list[Trial] | None = field(default=None, init=False)  # as last asked for, while that is right

    def add(self, trial: Trial) -> None:
        """One more trial; of equal ones the first counts."""
        if trial.evaluation.status != "ok":
            return
        screened = trial.evaluation.screened
        if not (screened or self._any_whole):
            self._any_whole, self._front = True, None
        if self.budget.excess(trial.measured) <= 0:
            point = objectives(trial, self.direction, latency=self.latency)
            if (self._screened if screened else self._whole).add(point, trial):
                self._front = None

    def front(self) -> list[Trial]:
        """Non-dominated feasible trials, smallest first; screened ones count until one was scored on all of `val`."""
        if self._front is None:
            members = (self._whole if self._any_whole else self._screened).trials
            self._front = sorted(members, key=lambda trial: (trial.measured.bytes, trial.number))
        return self._front

    def best(self) -> Trial | None:
        """The best quality, if anything is feasible."""
        front = self.front()
        return _best(front, self.direction) if front else None


def scored(trials: Sequence[Trial]) -> list[Trial]:
    """`ok` trials that were scored on all of `val`; while there is none, those that were screened on a part of it."""
    ok = [trial for trial in trials if trial.evaluation.status == "ok"]
    return [trial for trial in ok if not trial.evaluation.screened] or ok


def feasible(trials: Sequence[Trial], budget: Budget) -> list[Trial]:
    """`scored` trials within every limit."""
    return [t for t in scored(trials) if budget.excess(t.measured) <= 0]


def nearest(trials: Sequence[Trial], budget: Budget) -> Trial | None:
    """The `ok` trial that misses the budget by the least share; of equals the smallest."""
    return min(scored(trials), key=lambda t: (budget.excess(t.measured), t.measured.bytes, t.number), default=None)


@dataclass(frozen=True, slots=True)
class Wish:
    """What `pick` was asked for; None and False ask for nothing."""

    max_size: int | None = None
    max_latency: float | None = None
    min_quality: float | None = None
    best: bool = False
    knee: bool = False
    trial: int | None = None


def pick(trials: Sequence[Trial], direction: str, wish: Wish, budget: Budget) -> Trial:
    """The trial that `wish` names, or the best quality within all limits and the run's `budget`.

    Equal quality goes to the fewer bytes, then the lower latency. Raises `NothingFits` that says which limit
    rules everything out.
    """
    if wish.trial is not None:
        return _named(trials, wish.trial)
    fits = feasible(trials, budget)
    if not fits:
        raise NothingFits(f"this run has no trial within {budget}")
    sign = 1.0 if direction == "max" else -1.0
    checks: list[tuple[float | None, str, Callable[[Trial], bool]]] = [
        (wish.max_size, "--max-size", lambda t: t.measured.bytes <= (wish.max_size or 0)),
        (wish.max_latency, "--max-latency", lambda t: t.measured.latency_ms <= (wish.max_latency or 0)),
        (wish.min_quality, "--min-quality", lambda t: sign * t.measured.quality >= sign * (wish.min_quality or 0)),
    ]
    for limit, text, holds in checks:
        if limit is None:
            continue
        remaining = [trial for trial in fits if holds(trial)]
        if not remaining:
            raise NothingFits(f"no trial is within {text} {limit:,}: {_reach(fits, direction)}")
        fits = remaining
    if wish.knee:
        candidates = front_of(fits, direction)
        points = [objectives(t, direction, latency=False) for t in candidates]
        return candidates[knee([(p[0], math.log(p[1])) for p in points])]
    if not wish.best and wish.min_quality is not None and wish.max_size is None and wish.max_latency is None:
        return min(fits, key=lambda t: (t.measured.bytes, -sign * t.measured.quality, t.number))
    return _best(fits, direction)


def _best(trials: Sequence[Trial], direction: str) -> Trial:
    sign = 1.0 if direction == "max" else -1.0
    return min(trials, key=lambda t: (-sign * t.measured.quality, t.measured.bytes, t.measured.latency_ms, t.number))


def _named(trials: Sequence[Trial], number: int) -> Trial:
    """The trial of this number, which must have been scored on all of `val`: nothing else says how good it is."""
    found = next((t for t in trials if t.number == number and t.evaluation.status == "ok"), None)
    if found is None:
        raise AutocompressError(f"trial {number} is not in this run or was not measured; see front.csv")
    if not found.evaluation.screened:
        return found
    key = found.evaluation.policy.key()
    whole = [t for t in trials if t.evaluation.status == "ok" and not t.evaluation.screened]
    same = next((t.number for t in whole if t.evaluation.policy.key() == key), None)
    if same is not None:
        fix = f"its policy was scored on all of it as trial {same}: use --trial {same}"
    elif whole:
        fix = f"choose one that was scored on all of it: {', '.join(str(t.number) for t in whole)}"
    else:
        fix = "continue the run with --resume, so that its best trials are scored on all of it"
    raise AutocompressError(f"trial {number} was scored on a part of val only; {fix}")


def _reach(fits: Sequence[Trial], direction: str) -> str:
    best = max if direction == "max" else min
    return (
        f"what remains reaches {min(t.measured.bytes for t in fits):,} bytes, "
        f"{min(t.measured.latency_ms for t in fits):.3g} ms and quality "
        f"{best(t.measured.quality for t in fits):.4f}"
    )
