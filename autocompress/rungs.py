"""Who is trained next, and for how many epochs: successive halving over the front, as plain data.

A member climbs a rung when the same policy and recipe are trained anew, from the one-shot solution, with the next
rung's epochs. Everything is a function of the members so far, so a search that was interrupted goes on with the same
decision. Knows nothing of models, Optuna or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import median

from autocompress.front import Point, Trial, feasible, front_of, hypervolume, non_dominated, objectives
from autocompress.policy import Policy
from autocompress.trial import Budget

SAME_SIZE = math.log(1.1)
"""Sizes closer than this (log of the ratio) are one place on the budget axis: of two, one is promoted first."""
NEAR_SIZE, NEAR_LOSS = 0.03, 1.05
"""A neighbour of a front member: its bytes within this share, its loss within this factor."""
STAYS = 0.5
"""Share of first trainings that take the front member itself, where it has neighbours."""
TRAINING_ROOM = 0.003
"""Share of a byte budget that who is trained first leaves free, where the front has such members.

Codes change, and how short they are is held in the large alone (`engine.held`)."""
MARGIN = 0.1
"""How far beyond the worst members the reference point of the hypervolume lies, in spans of each objective."""


def ladder(epochs: int) -> tuple[int, ...]:
    """Epochs of each rung: the last has all of `epochs`, each earlier one half, rounded down; none for 0."""
    found = []
    while epochs > 0:
        found.append(epochs)
        epochs //= 2
    return tuple(reversed(found))


def counts(first: int, rungs: int) -> tuple[int, ...]:
    """Trainings of each rung when the first has `first`: half of each, rounded up, climbs on."""
    found = [first] * min(rungs, 1)
    while len(found) < rungs:
        found.append(math.ceil(found[-1] / 2))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Member:
    """A policy on a rung (from 1).

    `point` is what its training measured, lower-better: quality, bytes and perhaps milliseconds; None if it failed,
    is over the budget, or still runs (`done` is false).
    """

    policy: Policy
    rung: int
    point: Point | None = None
    done: bool = True

    @property
    def identity(self) -> str:
        """Equal for the same policy and recipe on all rungs."""
        return at_epochs(self.policy, 1).key()


@dataclass(frozen=True, slots=True)
class Step:
    """What to train next: on rung 1 a policy that the caller chooses, above it `policy` of the rung below."""

    rung: int
    policy: Policy | None = None


def at_epochs(policy: Policy, epochs: int) -> Policy:
    """The same policy and recipe, trained for `epochs`."""
    return replace(policy, recovery=replace(policy.recovery, epochs=epochs))


def next_step(members: Sequence[Member], rungs: int, starts: int) -> Step | None:
    """What to train next, without waiting for a rung to fill (in the manner of ASHA, Li et al. 2020, 1810.05934).

    `starts` is how many trainings may still begin on the first rung. They go before promotions, so that one worker
    compares whole rungs; a worker that finds none left promotes among those that are done. None: nothing to do now.
    """
    if starts > 0 and rungs:
        return Step(1)
    for rung in range(1, rungs):
        chosen = promotable(members, rung)
        if chosen is not None:
            return Step(rung + 1, chosen.policy)
    return None


def promotable(members: Sequence[Member], rung: int) -> Member | None:
    """Who climbs from `rung` next: half may, rounded up; while some still run, half of those done, rounded down.

    First the best quality, which is what a search is asked for. Then the lowest non-dominated rank, and of equals the
    largest hypervolume contribution; but of members of about the same size only one climbs before those of other sizes
    did.
    """
    here = [m for m in members if m.rung == rung]
    climbed = {m.identity for m in members if m.rung == rung + 1}
    done = [m for m in here if m.done]
    complete = all(m.done for m in members if m.rung <= rung)
    if len(climbed) >= (math.ceil(len(done) / 2) if complete else len(done) // 2):
        return None
    fit = [(m, m.point) for m in done if m.point is not None]
    merits = _merits([point for _, point in fit])
    sizes = [point[1] for m, point in fit if m.identity in climbed]
    best = min((point for _, point in fit), default=None)
    waiting = [
        (point != best, _crowd(point[1], sizes), *merit, i)
        for i, ((m, point), merit) in enumerate(zip(fit, merits, strict=True))
        if m.identity not in climbed
    ]
    return fit[min(waiting)[-1]][0] if waiting else None


def _crowd(size: float, sizes: Sequence[float]) -> int:
    return sum(abs(math.log(size / other)) < SAME_SIZE for other in sizes)


def _merits(points: Sequence[Point]) -> list[tuple[int, float]]:
    """Per point its non-dominated rank, and minus the hypervolume that only it adds to its rank."""
    found = [(0, 0.0)] * len(points)
    left, rank = list(range(len(points))), 0
    scaled = _scaled(points)
    while left:
        layer = [left[i] for i in non_dominated([points[i] for i in left])]
        whole = hypervolume([scaled[i] for i in layer], _reference(scaled))
        for i in layer:
            without = hypervolume([scaled[j] for j in layer if j != i], _reference(scaled))
            found[i] = rank, -round(whole - without, 12)
        left, rank = [i for i in left if i not in layer], rank + 1
    return found


def _scaled(points: Sequence[Point]) -> list[Point]:
    """Quality as it is, sizes and times as logarithms, each divided by its span."""
    logs = [(p[0], *(math.log(max(x, 1e-12)) for x in p[1:])) for p in points]
    spans = [max(axis) - min(axis) or 1.0 for axis in zip(*logs, strict=True)]
    return [tuple(x / span for x, span in zip(p, spans, strict=True)) for p in logs]


def _reference(scaled: Sequence[Point]) -> Point:
    return tuple(max(axis) + MARGIN for axis in zip(*scaled, strict=True))


# --- who starts -----------------------------------------------------------------------------------------


def next_start(sizes: Sequence[int], started: Sequence[int]) -> int:
    """Index of the largest size, and every other time of that farthest, as a ratio, from every started one.

    So half of the trainings begin near the budget, which is what was asked for, and the others at the other end and in
    the gaps between.
    """
    if len(started) % 2 == 0:
        return max(range(len(sizes)), key=lambda i: (sizes[i], -i))
    gaps = [min(abs(math.log(size / other)) for other in started) for size in sizes]
    return max(range(len(sizes)), key=lambda i: (round(gaps[i], 9), sizes[i], -i))


def shifted(member: Trial, others: Sequence[Trial], seed: int) -> Trial:
    """`member`, or a policy measured near it on the front: a function of `seed`.

    Which of near-equal policies is best after training is not known before, so not only the front gets a chance.
    """
    size, loss = member.measured.bytes, member.measured.loss
    near = [
        t
        for t in others
        if t.number != member.number
        and abs(t.measured.bytes / size - 1) <= NEAR_SIZE
        and t.measured.loss <= NEAR_LOSS * loss
    ]
    draw = Random(seed)
    return member if not near or draw.random() < STAYS else draw.choice(near)


# --- time -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of one epoch, and of everything else that a training takes."""

    epoch: float
    fixed: float = 0.0

    def of(self, epochs: int) -> float:
        """Seconds of one training of `epochs`."""
        return self.fixed + epochs * self.epoch

    def total(self, trainings: Sequence[int], epochs: Sequence[int]) -> float:
        """Seconds of all `trainings`, per rung, of `epochs` each."""
        return sum(count * self.of(e) for count, e in zip(trainings, epochs, strict=True))


def affordable(first: int, made: Sequence[int], epochs: Sequence[int], pace: Pace, left: float) -> int:
    """The largest first rung, of at most `first`, whose members can all climb as far as they may in `left` seconds.

    `made` trainings of each rung need no more time. At least what was made, and 1.
    """
    while first > max(1, made[0]):
        waiting = [max(0, n - m) for n, m in zip(counts(first, len(epochs)), made, strict=True)]
        if pace.total(waiting, epochs) <= left:
            break
        first -= 1
    return first


def plan_text(trainings: Sequence[int], epochs: Sequence[int], seconds: float) -> str:
    """`recovery: 6 trainings of 1 epoch, then 3 of 2: about 12 min`."""
    (first, e), *rest = zip(trainings, epochs, strict=True)
    said = f"{first} training{'s' * (first != 1)} of {e} epoch{'s' * (e != 1)}"
    said += "".join(f", then {count} of {more}" for count, more in rest)
    return f"recovery: {said}: about {duration_text(seconds)}"


def duration_text(seconds: float) -> str:
    """Seconds, minutes or hours, as people say them."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# --- a run ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Climb:
    """The rungs of a run, as far as its `trials` tell of them; these may grow meanwhile.

    `epochs` are those of each rung, `first` the trainings that the first may get. `timed` stands for the pace while no
    training has told it. `running` are policies that train now, with their rungs, on `workers` that share the work.
    """

    trials: Sequence[Trial]
    budget: Budget
    direction: str
    epochs: tuple[int, ...]
    first: int
    timed: Pace | None = None
    left: float = math.inf
    running: Sequence[tuple[Policy, int]] = ()
    workers: int = 1

    def next_step(self, left: float) -> Step | None:
        """What to train next with `left` seconds; None if nothing is left, or not enough time for it."""
        self.left = left
        step, pace = next_step(self.members(), len(self.epochs), self.starts()), self.pace()
        if step is None:
            return None
        return step if (pace.of(self.epochs[step.rung - 1]) if pace else 0.0) <= left else None

    def parent(self, seed: int) -> Policy:
        """Who starts next: an untried member of the front at the budget or far from those that did, or a near equal."""
        untried = self.untried()
        sizes = [t.measured.bytes for t in untried]
        chosen = untried[next_start(sizes, [t.measured.bytes for t in self._started()])]
        return shifted(chosen, self._near_front(), seed).evaluation.policy

    def members(self) -> list[Member]:
        """Everyone who was trained, in order."""
        latency = self.budget.ms is not None
        found = []
        for t in self.trials:
            e = t.evaluation
            if e.rung:
                fits = e.status == "ok" and self.budget.excess(t.measured) <= 0
                point = objectives(t, self.direction, latency=latency) if fits else None
                found.append(Member(e.policy, e.rung, point))
        return found + [Member(policy, rung, done=False) for policy, rung in self.running]

    def starts(self) -> int:
        """How many more may start: of those asked for, who can climb to the last rung in the time that is left."""
        made, pace, first = self._made(), self.pace(), self.first
        if pace is not None and made:
            first = affordable(first, made, self.epochs, pace, self.workers * self.left)
        return max(0, min(first - sum(made[:1]), len(self.untried())))

    def _made(self) -> list[int]:
        """Trainings of each rung so far, those that run included."""
        rungs = [m.rung for m in self.members()]
        return [rungs.count(rung) for rung in range(1, len(self.epochs) + 1)]

    def untried(self) -> list[Trial]:
        """Members of the front that no training started from."""
        started = {t.number for t in self._started()}
        return [t for t in self._front() if t.number not in started]

    def _shots(self) -> list[Trial]:
        return [t for t in feasible(self.trials, self.budget) if not t.evaluation.rung]

    def _front(self) -> list[Trial]:
        """The one-shot front, those with some room, if there are any."""
        members = front_of(self._shots(), self.direction, latency=self.budget.ms is not None)
        return [t for t in members if self._has_room(t)] or members

    def _has_room(self, trial: Trial) -> bool:
        limit = self.budget.bytes
        return limit is None or trial.measured.bytes <= (1 - self.room()) * limit

    def room(self) -> float:
        """Share of a byte budget that who is trained leaves free: the most that trainings of this run have added."""
        sizes = {t.evaluation.policy.key(): t.measured.bytes for t in self._shots()}
        pairs = [
            (t.measured.bytes, sizes[parent])
            for t in self.trials
            if t.evaluation.rung
            and t.evaluation.status == "ok"
            and (parent := t.evaluation.policy.without_recovery().key()) in sizes
        ]
        return max((max(0.0, after / before - 1) for after, before in pairs), default=TRAINING_ROOM)

    def _started(self) -> list[Trial]:
        keys = {m.policy.without_recovery().key() for m in self.members()}
        return [t for t in self._shots() if t.evaluation.policy.key() in keys]

    def _near_front(self) -> list[Trial]:
        """Policies off the front that no training started from."""
        taken = {t.evaluation.policy.key() for t in (*self._started(), *self._front())}
        return [t for t in self._shots() if t.evaluation.policy.key() not in taken and self._has_room(t)]

    def planned(self) -> tuple[int, ...]:
        """Trainings of each rung, those that were made included."""
        return counts(sum(self._made()[:1]) + self.starts(), len(self.epochs))

    def state(self, running: int = 0) -> tuple[int, int, float | None]:
        """Trainings done, trainings in all, and seconds that what is left takes, less the one `running` on a rung.

        None where the pace is not known.
        """
        made, pace = self._made(), self.pace()
        left = [max(0, n - m) for n, m in zip(self.planned(), made, strict=True)]
        seconds = None if pace is None else pace.total(left, self.epochs)
        if seconds is not None and pace is not None and running:
            seconds = max(0.0, seconds - pace.of(self.epochs[running - 1]))
        done = sum(made) - len(self.running)
        return done, sum(made) + sum(left), None if seconds is None else seconds / self.workers

    def pace(self) -> Pace | None:
        """What the trainings of this run took, at first what was `timed`."""
        trained = [e for e in (t.evaluation for t in self.trials) if e.rung and e.status == "ok" and e.copy_of is None]
        if not trained:
            return self.timed
        fixed = self.fixed()
        return Pace(median(max(0.0, e.seconds - fixed) / e.policy.recovery.epochs for e in trained), fixed)

    def fixed(self) -> float:
        """Seconds of an evaluation without training."""
        shots = [t.evaluation.seconds for t in self._shots() if t.evaluation.copy_of is None]
        return median(shots) if shots else 0.0
