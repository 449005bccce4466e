"""Drives a search: controller and runner, journal and resume, budgets, rungs, and the final files of the front.

Rung 0 evaluates one-shot policies. On rung 1 members of its front, spread along it, get recovery training; the better
half climbs to the next rung, with twice the epochs, and so on. Then every feasible front member is written, read back,
scored again on `val`, and once on `test`.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import resource
import shutil
import sqlite3
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from autocompress.controllers.base import Controller
from autocompress.controllers.optuna_samplers import Predict, mix
from autocompress.controllers.registry import make_controller, needs_profile
from autocompress.controllers.widths import fastest_widths
from autocompress.engine.precision import Precision
from autocompress.errors import AutocompressError, NothingFits, RunError
from autocompress.evaluate import Evaluate, Evaluator, Job
from autocompress.files import cache_folder, write
from autocompress.flight import Flight
from autocompress.front import Archive, Trial, close_neighbours, non_dominated, standard_error
from autocompress.journal import FILE, Journal
from autocompress.lessons import Lesson, keep_lessons, lessons_of, read_lessons
from autocompress.measure.latency import Latency, RememberedTimes, alone, no_times
from autocompress.measure.latency_table import LatencyTable, read_table
from autocompress.measure.quality import VIEWS
from autocompress.policy import LayerChoice, Policy
from autocompress.profile import Profile, measure, profile_key, with_groups
from autocompress.rungs import TRAINING_ROOM, Climb, Pace, Step, at_epochs, ladder, plan_text
from autocompress.runners.base import Cluster, Runner
from autocompress.runners.local import LocalRunner
from autocompress.runners.processes import ProcessRunner
from autocompress.space import Space, SpaceFile, load_space
from autocompress.target import FORMATS, OnnxTarget, Place
from autocompress.task import Task, counted, details, load_task
from autocompress.trial import Budget, Evaluation, Limit, Measurement
from autocompress.views import views_of

CONFIG, FREEZE = "config.json", "freeze.txt"
MAX_ATTEMPTS = 2
"""How often a trial may take its process down before it is written off as failed."""
PATIENCE = 200
"""Proposals in a row that need no evaluation (known or over budget) after which the space counts as exhausted."""
PROMOTED_BEST = 6
"""Screened policies of least loss that are scored on all of `val`."""
TIMED_STEPS = 4
"""Training steps that are timed for the first estimate; the first step of them warms up."""
TOO_SLOW = 1.1
"""A latency budget is refused before the search if the fastest policy is slower by more than what timings vary by."""
REUSED = 1000
"""Evaluations on the same `val` from which on the best of many is noticeably the luckiest of many."""
NO_TIME = "the time ran out before the first evaluation: continue with --resume and a longer --timeout"
_OURS = re.compile(r"trial-\d+\.(acz|onnx|json)|\.trial-\d+\.(acz|onnx|json)\..*")
"""Files of a run folder that may be removed: finished ones, and temporary ones of `files.write`."""
_PACKAGES = ("autocompress", "torch", "torch-pruning", "optuna", "numpy", "scikit-learn")


@dataclass(frozen=True, slots=True)
class Settings:
    """All that determines a run, besides the task's code and data.

    `format` is what ships: with a latency budget `onnx`, else `packed`, unless it is given. ONNX files are timed with
    `threads` threads on `batch` inputs, or looked up in the `latency_table` of another machine. `epochs` are those of
    the last rung of recovery training, `recoveries` the trainings of the first (None: one for ten trials, at least 2);
    a `fresh` run learns nothing from what earlier ones of the same model found out about recovery training.
    `deterministic` trials at a time are told in order, so that the search does not depend on the number of workers; 0
    tells each as it comes.
    """

    task: str
    budgets: tuple[str, ...] = ()
    space: str = "default"
    controller: str = "solver"
    trials: int = 60
    epochs: int = 1
    recoveries: int | None = None
    fresh: bool = False
    seed: int = 0
    data: str | None = None
    checkpoint: str | None = None
    format: str = ""
    threads: int = 1
    batch: int = 1
    latency_table: str | None = None
    deterministic: int = 0

    def __post_init__(self) -> None:
        if self.format not in ("", *FORMATS):
            raise AutocompressError(f"--format is {self.format!r}; it must be one of {', '.join(FORMATS)}")
        lows = {"trials": 1, "epochs": 0, "recoveries": 1, "seed": 0, "threads": 1, "batch": 1, "deterministic": 0}
        for name, low in lows.items():
            value = getattr(self, name)
            if value is not None and not low <= value < 2**31:
                raise AutocompressError(f"--{name} is {value}; it must be {low} or more, and below 2^31")
        limits = [Limit.parse(text) for text in self.budgets]
        if not self.format:  # a latency that counts is that of a runtime which people deploy
            timed = any(limit.quantity == "ms" for limit in limits)
            object.__setattr__(self, "format", "onnx" if timed else "packed")
        if self.latency_table is not None and self.format != "onnx":
            raise AutocompressError("--latency-table is about .onnx files: give a latency budget, or --format onnx")
        where, colon, name = self.task.rpartition(":")
        if where.endswith(".py"):  # so that a run can be continued from any folder
            object.__setattr__(self, "task", f"{Path(where).resolve()}{colon}{name}")

    @property
    def first_rung(self) -> int:
        """Trainings of the first rung, if the front has as many members."""
        return max(2, self.trials // 10) if self.recoveries is None else self.recoveries

    def load_task(self) -> Task:
        """The task, from its built-in name, file or module."""
        return load_task(
            self.task,
            data=Path(self.data) if self.data else None,
            checkpoint=Path(self.checkpoint) if self.checkpoint else None,
        )

    def evaluator(self, dense_ms: float | None = None, table: LatencyTable | None = None) -> Evaluator:
        """What measures this run's candidates; `dense_ms` is what an earlier part of it measured.

        `table` is what is in the file `latency_table`, where that is not here.
        """
        carried = None if self.latency_table is None else table or read_table(Path(self.latency_table))
        place = Place(self.threads, self.batch, carried)
        recovers = self.epochs > 0
        return Evaluator(
            self.load_task(), seed=self.seed, format=self.format, place=place, dense_ms=dense_ms, recovers=recovers
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """A glance at a running search. `best` is the best feasible trial so far; `left` seconds, None if unknown.

    `note` is to be shown once, and to stay. `points` are (bytes, quality) of the front, `rising` if more is better.
    """

    stage: str
    done: int
    total: int
    evaluations: int
    front: int
    best: Trial | None
    seconds: float
    left: float | None
    detail: str = ""
    note: str = ""
    points: tuple[tuple[int, float], ...] = ()
    rising: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search found. `picked` is the best quality within the budget, None if nothing fits."""

    folder: Path
    budget: Budget
    dense: Measurement
    trials: tuple[Trial, ...]
    front: tuple[Trial, ...]
    picked: Trial | None
    evaluations: int
    seconds: float
    warnings: tuple[str, ...] = ()


Watch = Callable[[Progress], None]


class Study:
    """One search on an open journal. `stop()` ends it after the trials in flight."""

    def __init__(
        self,
        settings: Settings,
        evaluator: Evaluator,
        controller: Controller,
        runner: Runner,
        budget: Budget,
        journal: Journal,
        folder: Path,
        *,
        timeout: float = math.inf,
        watch: Watch | None = None,
    ) -> None:
        self.settings, self.evaluator, self.budget, self.folder = settings, evaluator, budget, folder
        self._controller, self._runner, self._journal = controller, runner, journal
        self._watch = watch or (lambda _: None)
        self._start, self._timeout = time.monotonic(), timeout
        self._stopped = False
        self._trained = 0.0
        self._recovering: dict[int, tuple[float, int, int, float]] = {}  # see `_began`
        self.trials: list[Trial] = []
        """In the order in which they were told."""
        self._flight = Flight(settings.deterministic)
        self._left, self._next = journal.untold(), journal.next_number()
        self._place: dict[int, int] = {}
        self._known: dict[tuple[str, bool], Trial] = {}
        self._evaluated = self._searched = 0
        self._archive = self._new_archive()
        self._drawn: tuple[list[Trial], tuple[tuple[int, float], ...], Trial | None] = [], (), None
        for trial in journal.told():
            self._remember(trial)
        self._before: float = journal.fact("seconds") or 0.0
        self.warnings: list[str] = list(journal.fact("warnings") or ())
        controller.restore(self._past())

    def _past(self) -> Iterator[Policy | Evaluation]:
        """What the controller was asked for and told before, in that order."""
        policies = {row.number: row.policy for row in self._left}
        policies |= {trial.number: trial.evaluation.policy for trial in self.trials}
        screens = self.evaluator.screens  # then what is not screened is a promotion
        begun = deque(b for b in self._journal.begun() if b.rung == 1 or (not b.rung and b.screened == screens))
        for told, trial in enumerate(self.trials):
            while begun and begun[0].asked <= told:
                yield policies[begun.popleft().number]
            yield trial.evaluation
        yield from (policies[b.number] for b in begun)

    # --- what every stage shares ---

    @property
    def total_seconds(self) -> float:
        """Wall time of the run, earlier parts included."""
        return self._before + self.seconds

    def stop(self) -> None:
        """End after the trials in flight."""
        self._stopped = True

    @property
    def over(self) -> bool:
        """Whether it was stopped, or its time is up."""
        return self._stopped or self.seconds > self._timeout

    @property
    def seconds(self) -> float:
        """Wall time of this call."""
        return time.monotonic() - self._start

    def evaluated(self) -> int:
        """Trials that were really measured, failures included."""
        return self._evaluated

    def front(self) -> list[Trial]:
        """Feasible non-dominated trials."""
        return [self._now(trial) for trial in self._archive.front()]

    def best(self) -> Trial | None:
        """Best feasible quality."""
        found = self._archive.best()
        return None if found is None else self._now(found)

    def _now(self, trial: Trial) -> Trial:
        """A trial with what became known of it since: the archive has it as it first came."""
        return self.trials[self._place[trial.number]]

    def _new_archive(self) -> Archive:
        """The front of nothing yet."""
        return Archive(self.evaluator.task.direction, self.budget, latency=self.budget.ms is not None)

    def training(self, job: Job, step: int, total: int) -> None:
        """Called after each step of a recovery training: says how far it is, at most once a second."""
        now = time.monotonic()
        if now - self._trained < 1.0 or job.number not in self._recovering:
            return
        self._trained = now
        begun, done, members, later = self._recovering[job.number]
        left = (now - begun) / step * (total - step) + later
        self._say("recovering", done, members, left, f"step {step} of {total}")

    def _say(self, stage: str, done: int, total: int, left: float | None, detail: str = "", *, note: str = "") -> None:
        """Tell the watcher; `left` seconds are bounded by the timeout."""
        left = None if left is None else min(left, max(0.0, self._timeout - self.seconds))
        front, rising = self._archive.front(), self.evaluator.task.direction == "max"
        if self._drawn[0] is not front:  # a long front is drawn anew only when it has changed
            points = tuple((t.measured.bytes, t.measured.quality) for t in front)
            self._drawn = front, points, self.best()
        _, points, best = self._drawn
        told = Progress(stage, done, total, self.evaluated(), len(front), best, self.seconds, left, detail, note)
        self._watch(replace(told, points=points, rising=rising))

    def _remember(self, trial: Trial) -> None:
        """Add a finished trial to what is known."""
        evaluation = trial.evaluation
        self._place[trial.number] = len(self.trials)
        self.trials.append(trial)
        measured = _measured(evaluation)
        self._evaluated += measured
        self._searched += measured and self._is_shot(evaluation)
        if evaluation.status != "ok":
            return
        self._known.setdefault((evaluation.policy.key(), evaluation.screened), trial)
        self._archive.add(trial)

    def _report(self, stage: str, done: int, total: int, since: float, before: int) -> None:
        pace = (time.monotonic() - since) / (done - before) if done > before else None
        self._say(stage, done, total, None if pace is None else pace * (total - done))

    def _settle(self, number: int, evaluation: Evaluation) -> None:
        """Write a result, then learn from it."""
        at = round(self.total_seconds, 3)
        self._journal.finish(number, evaluation, at)
        self._remember(Trial(number, evaluation, at=at))
        self._recovering.pop(number, None)
        if evaluation.rung:
            self._checkpoint(evaluation.policy).unlink(missing_ok=True)
        self._controller.tell(evaluation)

    def _excessive(self, policy: Policy) -> Measurement | None:
        """What `policy` takes if that is over the budget. Finds its layers' codes only where the bound is over it."""
        static = self.budget.static()
        if static.excess(self.evaluator.bound(policy)) <= 0:
            return None
        predicted = _predicted(self.evaluator, policy)
        return predicted if predicted is not None and static.excess(predicted) > 0 else None

    # --- what is in flight ---

    def _begin(self, policy: Policy, rung: int, *, screen: bool = False) -> Job | None:
        """Write that a trial starts; None if it needs no running."""
        self._next += 1
        return self._entered(self._next - 1, policy, rung, screen)

    def _entered(self, number: int, policy: Policy, rung: int, screen: bool, *, counted: bool = True) -> Job | None:
        """The job, in flight; None, and settled here, if the trial is over budget, known, or fatal to its process."""
        attempts = self._journal.begin(number, policy, rung, screened=screen, counted=counted)
        job = self._job(number, policy, rung, screen)
        if (policy.key(), screen) in self._known:
            known = self._known[policy.key(), screen]
            self._settle(number, replace(known.evaluation, copy_of=known.number, seconds=0.0, rung=rung))
        elif attempts > MAX_ATTEMPTS:
            self._settle(number, self._fatal(job))
        elif (excessive := self._excessive(policy)) is not None:
            self._settle(number, Evaluation(policy, self.settings.seed, rung, "infeasible", excessive))
        elif self._flight.enter(job):
            return job
        return None

    def _job(self, number: int, policy: Policy, rung: int, screen: bool) -> Job:
        if not rung:
            return Job(policy, rung, None, screen, number=number)
        return Job(policy, rung, self.folder / self._artifact(number), screen, self._checkpoint(policy), number)

    def _fatal(self, job: Job, reason: str = "") -> Evaluation:
        error = f"its process ended {MAX_ATTEMPTS} times while it ran" + (f": {reason}" if reason else "")
        return Evaluation(job.policy, self.settings.seed, job.rung, "failed", error=error, screened=job.screen)

    def _run(self, jobs: Iterable[Job | None], report: Callable[[], None]) -> None:
        """Run jobs until there are no more, and tell what became of them; one whose worker was lost runs once more."""
        with closing(self._runner.run(self._fed(jobs), self.training)) as results:
            for job, evaluation, reason in results:
                if evaluation is not None:
                    self._arrived(job, evaluation)
                elif self._journal.begin(job.number, job.policy, job.rung, screened=job.screen) > MAX_ATTEMPTS:
                    self._arrived(job, self._fatal(job, reason))
                else:
                    self._flight.again.append(job)
                report()

    def _fed(self, jobs: Iterable[Job | None]) -> Iterator[Job | None]:
        """What a runner gets: first what a dead process left, and always what must run again; None: not now."""
        flight, source = self._flight, iter(jobs)
        ended = False
        self._adopt()
        while True:
            if flight.again:
                yield flight.again.popleft()
                continue
            if not ended and not flight.full:
                job = next(source, _END)
                if isinstance(job, Job):
                    yield job
                    continue
                ended = job is _END
            if flight.running:
                yield None
            elif flight.jobs:
                self._tell(all_of_them=True)
            else:
                return

    def _adopt(self) -> None:
        """Trials of a process that died go on as they were: running, or waiting with their result."""
        left, self._left = self._left, []
        for row in left:
            if row.evaluation is not None:
                self._flight.enter(self._job(row.number, row.policy, row.rung, row.screened))
                self._flight.arrive(row.number, row.evaluation)
                continue
            job = self._entered(row.number, *row[1:4], counted=not self._runner.isolated)
            if job is not None:
                self._flight.again.append(job)
        self._tell()

    def _arrived(self, job: Job, evaluation: Evaluation) -> None:
        if self.settings.deterministic:
            self._journal.arrive(job.number, evaluation)
        self._flight.arrive(job.number, evaluation)
        self._tell()

    def _tell(self, *, all_of_them: bool = False) -> None:
        for number, evaluation, twins in self._flight.due(all_of_them=all_of_them):
            self._settle(number, evaluation)
            for twin in twins:
                self._settle(twin.number, replace(evaluation, copy_of=number, seconds=0.0))

    # --- rungs ---

    def one_shot(self) -> None:
        """Rung 0: ask, evaluate, tell, until enough trials were evaluated, time is up or the space is exhausted.

        Where `val` is large, on a part of it; `promote` then scores the best on all of it.
        """
        screen = self.evaluator.screens
        trains = self.settings.epochs and self.evaluator.bench.trainable
        limit = self._timeout * (0.5 if trains else 0.8 if screen else 1.0)
        self.warnings = [text for text in self.warnings if text != NO_TIME]
        since, before, total = time.monotonic(), self._searched, self.settings.trials

        def begun() -> int:
            flying = self._flight.jobs.values()
            return self._searched + sum(1 for job in flying if not job.rung and job.screen == screen)

        def jobs() -> Iterator[Job]:
            idle = self._idle()
            while begun() < total and self.seconds < limit and not self._stopped and idle < PATIENCE:
                idle += 1
                job = self._begin(self._controller.ask(), 0, screen=screen)
                if job is not None:
                    idle = 0
                    yield job
            if idle >= PATIENCE:
                self.warn(f"the search space is exhausted after {begun()} evaluations")

        self._report("searching", before, total, since, before)
        self._run(jobs(), lambda: self._report("searching", self._searched, total, since, before))
        if not self.trials and self.seconds >= limit:
            self.warn(NO_TIME)

    def _is_shot(self, evaluation: Evaluation) -> bool:
        """Whether the controller proposed it: where candidates are screened, what was scored whole is a promotion."""
        whole = self.evaluator.screens and not evaluation.screened and evaluation.status != "infeasible"
        return evaluation.rung == 0 and not whole

    def promote(self) -> None:
        """Score the best of what was screened on all of `val`: the least losses first, then members of the front.

        Without this a search would pick what suits the screened part by chance. So one candidate is promoted even if
        the search was stopped or its time is up; then these end it after the promotion in flight.
        """
        chosen = self._promising()
        since, total, before = time.monotonic(), len(chosen), len(self.trials)

        def jobs() -> Iterator[Job | None]:
            for policy in chosen:
                while self.over and self._flight.jobs:
                    yield None
                if self.over and self._has_whole():
                    return
                job = self._begin(policy, 0)
                if job is not None:
                    yield job

        self._run(jobs(), lambda: self._report("promoting", min(total, len(self.trials) - before), total, since, 0))

    def _has_whole(self) -> bool:
        """Whether a candidate within the budget was scored on all of `val`."""
        whole = [t for t in self.trials if t.evaluation.status == "ok" and not t.evaluation.screened]
        return any(self.budget.excess(t.measured) <= 0 for t in whole)

    def _promising(self) -> list[Policy]:
        """Screened policies to promote: the least losses within the budget, and members of the front of losses."""
        fits = [
            t for t in self.trials if t.evaluation.screened and t.evaluation.copy_of is None
            and t.evaluation.status == "ok" and self.budget.excess(t.measured) <= 0
        ]  # fmt: skip
        best = sorted(fits, key=lambda t: (t.measured.loss, t.number))[:PROMOTED_BEST]
        latency = self.budget.ms is not None
        points = [(t.measured.loss, float(t.measured.bytes), *([t.measured.latency_ms] * latency)) for t in fits]
        front = sorted((fits[i] for i in non_dominated(points)), key=lambda t: t.measured.bytes)
        count = min(len(front), max(PROMOTED_BEST, self.settings.trials // 5))
        spread = [front[i] for i in _spread(len(front), count)]
        promoted = {t.evaluation.policy.key(): t.evaluation.policy for t in (*best, *spread)}
        tried = {e.policy.key() for e in (t.evaluation for t in self.trials) if not e.rung and not e.screened}
        return [policy for key, policy in promoted.items() if key not in tried]

    def _idle(self) -> int:
        """Proposals since the last one-shot evaluation: how far an earlier part of the run had got to giving up."""
        shots = [t.evaluation for t in self.trials if self._is_shot(t.evaluation)]
        measured = [i for i, e in enumerate(shots) if _measured(e)]
        return len(shots) - 1 - measured[-1] if measured else len(shots)

    def warn(self, text: str) -> None:
        """Remember something that the user should hear, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def recover(self) -> None:
        """Recovery training: members of the one-shot front start on rung 1, and the better half climbs each time."""
        if not self.settings.epochs or self._stopped:
            return
        if not self.evaluator.bench.trainable:
            self.warn(f"one-shot only: the task has nothing to train on, {self.evaluator.bench.untrainable}")
            return
        climb = self._climb()

        def jobs() -> Iterator[Job | None]:
            while not self._stopped:
                flying = [(job.policy, job.rung) for job in self._flight.jobs.values() if job.rung]
                climb.running, climb.workers = flying, self._runner.workers
                step = climb.next_step(self._timeout - self.seconds)
                if step is not None:
                    job = self._begin(self._trained_policy(climb, step), step.rung)
                    if job is not None:
                        self._began(job, climb)
                        yield job
                elif self._flight.jobs:
                    yield None
                else:
                    return

        self._announce(climb)
        self._run(jobs(), lambda: self._say("recovering", *climb.state()))

    def _trained_policy(self, climb: Climb, step: Step) -> Policy:
        if step.policy is not None:
            return at_epochs(step.policy, climb.epochs[step.rung - 1])
        return self._controller.ask(climb.parent(mix(self.settings.seed, self._next)), climb.epochs[0])

    def _began(self, job: Job, climb: Climb) -> None:
        """Remember when a training began, trainings done then and in all, and the seconds of later ones."""
        done, total, left = climb.state(running=job.rung)
        self._recovering[job.number] = time.monotonic(), done, total, left or 0.0

    def _climb(self) -> Climb:
        """The rungs, with the time of a training step where no training of this run told it."""
        direction, settings = self.evaluator.task.direction, self.settings
        climb = Climb(self.trials, self.budget, direction, ladder(settings.epochs), settings.first_rung)
        if climb.pace() is None and self.seconds < self._timeout and (waiting := climb.untried()):
            climb.timed = _timed_pace(self.evaluator, waiting[-1].evaluation.policy, climb.fixed())
        return climb

    def _announce(self, climb: Climb) -> None:
        """Say what is planned, before the first training."""
        climb.next_step(self._timeout - self.seconds)
        done, total, left = climb.state()
        if total > done:
            note = "" if left is None or done else plan_text(climb.planned(), climb.epochs, left)
            self._say("recovering", done, total, left, note=note)

    def _checkpoint(self, policy: Policy) -> Path:
        """Where a training that is interrupted leaves its last epoch."""
        return self.folder / "checkpoints" / f"{policy.key()}.safetensors"

    # --- the end ---

    def finalise(self) -> Outcome:
        """Write, reload, time and score every feasible front member; `test` is read once for each, here.

        One that misses the latency budget now, alone on the machine, is no longer feasible, and others take its place.
        """
        since, done = time.monotonic(), 0
        while waiting := [t for t in self.front() if not self._is_final(t)]:
            total = done + len(waiting)
            for trial in waiting:
                self._report("writing", done, total, since, 0)
                self._finalise(trial)
                done += 1
        members = self.front()
        self._doubt([trial.measured.quality for trial in members])
        for trial in self.front():
            path = self.folder / "policies" / f"trial-{trial.number}.json"
            write(path, (json.dumps(trial.evaluation.policy.to_json(), indent=2) + "\n").encode())
        self._remove_stale()
        self._report("done", len(members), len(members), since, 0)
        return Outcome(
            self.folder,
            self.budget,
            self.evaluator.dense,
            tuple(sorted(self.trials, key=lambda trial: trial.number)),
            tuple(self.front()),
            self.best(),
            self.evaluated(),
            self.seconds,
            tuple(self.warnings),
        )

    def _doubt(self, qualities: Sequence[float]) -> None:
        """Warn if `val` was asked so often that small differences on the front are partly its noise."""
        inputs = counted(self.evaluator.task, "val")
        close = close_neighbours(qualities, inputs)
        if self.evaluated() < REUSED or not close:
            return
        best = max(qualities)
        self.warn(
            f"val was asked {self.evaluated():,} times, and {close} of {len(qualities) - 1} neighbours on the front "
            f"differ by less than a standard error of {self.evaluator.task.metric} on its {inputs:,} inputs "
            f"({standard_error(best, inputs):.2g} at {best:.4g}): which of them is better is partly chance; quote "
            "test, or give the task a larger val"
        )

    def _is_final(self, trial: Trial) -> bool:
        return bool(trial.artifact) and (self.folder / trial.artifact).is_file()

    def _finalise(self, trial: Trial) -> None:
        name = self._artifact(trial.number)
        path = self.folder / name
        policy, expected = trial.evaluation.policy, trial.measured
        if not (policy.recovery.epochs and path.is_file()):
            compressed, _ = self.evaluator.build(policy)
            write(path, self.evaluator.pack(compressed, expected.quality))
        artifact = self.evaluator.reload(path)
        here = self.settings.latency_table is None  # what is for another machine can't be timed on this one
        if self.budget.ms is not None and here and not self._holds(trial, path):
            return
        if math.isnan(trial.measured.latency_ms):  # its worker was too busy to measure it
            self._finish(replace(trial, final_ms=self.evaluator.target.retime(path).ms))
        found = self.evaluator.quality(artifact.model).score
        if artifact.bytes != expected.bytes or not math.isclose(found, expected.quality, rel_tol=1e-6, abs_tol=1e-9):
            self.warn(
                f"trial {trial.number} measured {expected.bytes:,} bytes and quality {expected.quality:.6f}, but its "
                f"file {artifact.bytes:,} and {found:.6f}: this machine or its libraries changed during the run"
            )
        trial, test = self._now(trial), trial.quality_test
        if math.isnan(test):
            test = float(self.evaluator.task.score(artifact.model, "test"))
        self._finish(replace(trial, quality_test=test, artifact=name))
        self._detail(trial.number, artifact.model)

    def _detail(self, number: int, model: nn.Module) -> None:
        """Write what the task says of a front member beyond its metric, and once of the original."""
        task, known = self.evaluator.task, self._journal.fact("details") or {"trials": {}}
        try:
            if found := details(task, model, "val"):
                if "dense" not in known:
                    known["dense"] = details(task, self.evaluator.bench.teacher, "val")
                known["trials"][str(number)] = found
                self._journal.set_fact("details", known)
        except Exception as error:  # whatever the user's code raises: the search does without
            self.warn(f"the task's details() raised {type(error).__name__}: {' '.join(str(error).split())}")

    def _holds(self, trial: Trial, path: Path) -> bool:
        """Time the file again, alone; whether it is still within the latency budget."""
        timed, limit = self.evaluator.target.retime(path), self.budget.ms
        assert limit is not None
        self._finish(replace(trial, final_ms=timed.ms))
        if not timed.decides(limit):
            self.warn(f"trial {trial.number}: {timed.doubt(limit)}")
        return timed.ms <= limit

    def _finish(self, trial: Trial) -> None:
        self._journal.finalise(trial.number, trial.quality_test, trial.artifact, trial.final_ms)
        place = self._place[trial.number]
        before, self.trials[place] = self.trials[place], trial
        if trial.measured != before.measured:  # one that no longer fits makes room for any other
            self._archive = self._new_archive()
            for known in self.trials:
                self._archive.add(known)

    def _artifact(self, number: int) -> str:
        return artifact_name(number, self.evaluator.target.suffix)

    def _remove_stale(self) -> None:
        """Files of trials that later ones dominate, and what a killed process left half written."""
        current = {trial.number for trial in self.front()}
        keep = {Path(self._artifact(number)).name for number in current} | {f"trial-{n}.json" for n in current}
        for folder in ("artifacts", "policies"):
            for path in (self.folder / folder).iterdir():
                if _OURS.fullmatch(path.name) and path.name not in keep:
                    path.unlink()
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        for trial in self.trials:
            if trial.artifact and trial.number not in current:
                self._finish(replace(trial, artifact=""))


_END = object()


class _Timed(Exception):
    """Ends a training whose steps were timed."""


def _timed_pace(evaluator: Evaluator, parent: Policy, fixed: float) -> Pace | None:
    """From a few steps of a training that is given up then; None if it fails, which the real one will say."""
    times: list[float] = []
    steps = 0

    def follow(step: int, total: int) -> None:
        nonlocal steps
        steps = total
        times.append(time.perf_counter())
        if step >= min(TIMED_STEPS, total):
            raise _Timed

    policy = replace(parent, recovery=replace(parent.recovery, epochs=1))
    try:
        evaluator.build(policy, follow)
    except _Timed:
        pass
    except Exception:
        return None
    if len(times) < 2:
        return None
    return Pace((times[-1] - times[0]) / (len(times) - 1) * steps, fixed)


def _measured(evaluation: Evaluation) -> bool:
    """Really measured, failures included: neither refused by its size nor a copy."""
    return evaluation.status != "infeasible" and evaluation.copy_of is None


def _spread(length: int, count: int) -> list[int]:
    """`count` of `length` indices, from first to last, evenly."""
    if count < 2:
        return list(range(length))[:count]
    return sorted({round(i * (length - 1) / (count - 1)) for i in range(count)})


def artifact_name(number: int, suffix: str = ".acz") -> str:
    """Where a trial's artifact lies in its run folder."""
    return f"artifacts/trial-{number}{suffix}"


# --- runs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setup:
    """All that a worker needs to evaluate as the driver would: plain data, which travels. Calling it loads the task.

    Workers of one machine measure latencies one at a time, and share what they measured in the folder `times`; `busy`
    ones measure none. A task file that was `shipped` is in the working folder. `levels` are layers' solutions that
    another machine should get.
    """

    settings: Settings
    dense_ms: float
    precision: Precision | None = None
    table: LatencyTable | None = None
    times: Path | None = None
    busy: bool = False
    shipped: bool = False
    levels: tuple[tuple[str, LayerChoice], ...] = ()

    def __call__(self) -> Evaluate:
        """What evaluates. Raises what loading the task raises."""
        return self.evaluator().run

    def evaluator(self) -> Evaluator:
        """See `__call__`."""
        settings = self.settings
        if self.shipped:
            settings = replace(settings, task=Path(settings.task).name)
        evaluator = settings.evaluator(self.dense_ms, self.table)
        if self.precision is not None:
            evaluator.bench.precision = self.precision
        if self.table is not None and isinstance(evaluator.target, OnnxTarget):
            evaluator.target.use(self.table)
        evaluator.target.times = no_times if self.busy else RememberedTimes(self.times)
        return evaluator

    def clock(self) -> Callable[[bytes], Latency]:
        """What times files, alone on its machine."""
        target = self.evaluator().target
        assert isinstance(target, OnnxTarget)

        def timed(content: bytes) -> Latency:
            with alone():
                return target.meter(content)

        return timed


def _setup(settings: Settings, evaluator: Evaluator, folder: Path, profile: Profile | None) -> Setup:
    trains = settings.epochs and evaluator.bench.trainable
    table = evaluator.target.table if isinstance(evaluator.target, OnnxTarget) else None
    precision = evaluator.bench.precision if trains else None
    levels = [(x.name, level.choice) for x in (profile.layers if profile else ()) for level in x.levels]
    return Setup(settings, evaluator.dense.latency_ms, precision, table, folder / ".times", levels=tuple(levels))


def needs_clock(settings: Settings) -> bool:
    """Whether latencies of this machine decide, which a busy worker cannot measure."""
    return not settings.latency_table and any(Limit.parse(text).quantity == "ms" for text in settings.budgets)


def on_ray(cluster: Cluster) -> MakeRunner:
    """Workers of a Ray cluster. Raises `RunError` where Ray is not installed."""
    if find_spec("ray") is None:
        raise RunError("--ray needs Ray Tune: pip install 'autocompress[ray]'")

    def make(evaluator: Evaluator, setup: Setup) -> Runner:
        from autocompress.runners.ray_tune import RayRunner

        settings, where = setup.settings, Path(setup.settings.task.rpartition(":")[0])
        timed = needs_clock(settings)
        if timed and (cluster.latency_node is None or settings.format != "onnx"):
            raise RunError(
                "a latency that a busy worker measures means nothing: name the node where latencies count with "
                "--latency-node LABEL (and ship --format onnx), or give a --latency-table of the device"
            )
        code = where.parent if where.suffix == ".py" else None
        layers = {layer.name: layer for layer in evaluator.graph.layers}
        solved = [(layers[name], choice) for name, choice in setup.levels]
        setup = replace(setup, times=None, shipped=code is not None, levels=())
        clock = setup.clock if timed else None
        pack = partial(evaluator.bench.database.packed, solved)
        return RayRunner(setup, cluster, code=code, build_clock=clock, levels=pack)

    return make


MakeRunner = Callable[[Evaluator, Setup], Runner]


def in_process(evaluator: Evaluator, setup: Setup) -> Runner:  # noqa: ARG001
    """One worker: this process, with the model that it holds already."""
    return LocalRunner(evaluator.run)


def in_processes(workers: int, limit: float = math.inf) -> MakeRunner:
    """So many processes of this machine, each with its own model; one is this process.

    Trials with a `limit` in seconds have a process beside this one, which can be ended.
    """
    if workers == 1 and limit == math.inf:
        return in_process
    return lambda _, setup: ProcessRunner(setup, workers, limit)


def search(
    settings: Settings,
    folder: Path,
    *,
    resume: bool = False,
    space: SpaceFile | None = None,
    timeout: float = math.inf,
    command: str = "",
    watch: Watch | None = None,
    started: Callable[[Study], None] | None = None,
    make_runner: MakeRunner = in_process,
) -> Outcome:
    """Run a search in `folder`, or continue the one that is there.

    `space` stands for `settings.space` if given; a resumed run keeps its own, and refuses another. `timeout` in
    seconds bounds this call, the profile included; what is in flight is not cut off. `started` gets the `Study` before
    its first trial, so that a signal handler can stop it. `make_runner` says where trials run. Raises `RunError` if the
    folder is in the way, absent or of another search, or the time ends before the profile does, `NothingFits` if no
    policy of the space can fit, and what loading the task and space raise.
    """
    begun = time.monotonic()
    if resume:
        file = check_resumable(folder, settings, space)
    else:
        _check_free(folder)
        file = space if space is not None else load_space(settings.space)
    dense_ms = _dense_latency(folder) if resume else None
    evaluator = settings.evaluator(dense_ms)
    limits = [Limit.parse(text) for text in settings.budgets]
    hurried = any(limit.quantity != "bytes" for limit in limits)
    onnx, views = settings.format == "onnx", views_of(evaluator.task) is not None
    choices = Space(file, evaluator.graph, integers=onnx, branches=hurried, views=views)
    budget = Budget.resolve(limits, evaluator.dense)
    with_profile = needs_profile(settings.controller)
    _refuse_unreachable(choices, evaluator, budget, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with Journal.writing(folder) as journal:
        if not resume:
            _check_free(folder)  # another process may have been faster
        _describe(journal, folder, evaluator, budget)
        _write_config(folder, settings, file, command, evaluator.target.about(), resume=resume)
        if settings.epochs:
            _set_precision(evaluator, journal)
        for name in ("artifacts", "policies"):
            (folder / name).mkdir(exist_ok=True)
        times = _times_of(evaluator, choices, budget, journal, watch)
        choices.floats = _floats_of(evaluator, choices, journal) if times is not None else ()
        _refuse_too_slow(choices, evaluator, budget, settings)
        profile = (
            _profile(evaluator, choices, budget, journal, _until(begun + timeout, watch)) if with_profile else None
        )
        timeout -= time.monotonic() - begun
        size = _size_of(evaluator)
        asked = _with_room(budget, settings)
        controller = make_controller(settings.controller, choices, asked, size, settings.seed, profile, times)
        learned = _lessons_of(evaluator)
        controller.recovery.earlier = _earlier_lessons(settings, learned, journal)

        with closing(make_runner(evaluator, _setup(settings, evaluator, folder, profile))) as runner:
            study = Study(
                settings, evaluator, controller, runner, budget, journal, folder, timeout=timeout, watch=watch
            )
            for note in evaluator.graph.notes:
                study.warn(note)
            if started is not None:
                started(study)
            with _released(journal):
                study.one_shot()
                study.promote()
                study.recover()
        _keep(lambda: keep_lessons(learned, controller.recovery.lessons), "what recovery training was worth")
        outcome = study.finalise()
        journal.set_fact("seconds", study.total_seconds)
        journal.set_fact("warnings", list(outcome.warnings))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10  # kB to MiB on Linux
        journal.set_fact("peak_memory_mib", max(peak, journal.fact("peak_memory_mib") or 0))
        return outcome


@contextmanager
def _released(journal: Journal) -> Iterator[None]:
    """A search that its user or a full disk ends in the middle of a trial does not hold that against the trial."""
    try:
        yield
    except (KeyboardInterrupt, OSError, RunError, sqlite3.Error):
        with suppress(sqlite3.Error):
            journal.release()
        raise


def _with_room(budget: Budget, settings: Settings) -> Budget:
    """What controllers keep to: before recovery training, a little less than all bytes if it can make files longer."""
    if budget.bytes is None or not settings.epochs or settings.format != "packed":
        return budget
    return replace(budget, bytes=math.floor((1 - TRAINING_ROOM) * budget.bytes))


def _check_free(folder: Path) -> None:
    """A journal without a config is what a process killed at its very start leaves; anything else is somebody's."""
    if folder.is_dir():
        taken = any(not path.name.startswith((".", FILE)) for path in folder.iterdir())
    else:
        taken = folder.exists()
    if taken:
        raise RunError(f"{folder} already exists: continue it with --resume {folder}, or give another --out")


def _describe(journal: Journal, folder: Path, evaluator: Evaluator, budget: Budget) -> None:
    """Write what the run is about; raise `RunError` if an earlier part was about another model."""
    identity = identity_of(evaluator)
    if journal.fact("identity") not in (None, identity):
        raise RunError(
            f"{folder} was searched with another model or data: its task {evaluator.task.name!r} now gives a different "
            "network, weights or validation quality; start a new run with --out"
        )
    layers = [
        {
            "name": x.name,
            "kind": x.kind,
            "shape": x.shape,
            "bytes": 4 * math.prod(x.shape),
            "groups": [g.name for g in evaluator.graph.prunable if any(m.tensor == x.weight for m in g.members)],
        }
        for x in evaluator.graph.layers
    ]
    facts = {"identity": identity, "dense": asdict(evaluator.dense), "budget": asdict(budget), "layers": layers}
    facts["counted"] = {split: counted(evaluator.task, split) for split in ("val", "test")}
    for name, value in facts.items():
        journal.set_fact(name, value)


def _size_of(evaluator: Evaluator) -> Predict:
    """What controllers are told of a policy's size: exact, and where its codes cannot be found at most."""

    def size(policy: Policy) -> Measurement:
        return _predicted(evaluator, policy) or evaluator.bound(policy)

    return size


def _times_of(
    evaluator: Evaluator, space: Space, budget: Budget, journal: Journal, watch: Watch | None
) -> Callable[[Policy], float] | None:
    """What controllers are told of a policy's latency: by the run's table of layer times, which is measured first."""
    target = evaluator.target
    if budget.ms is None or not isinstance(target, OnnxTarget):
        return None
    known = journal.fact("latency_table", LatencyTable.from_json)
    if known is not None:
        target.use(known)
    elif target.table is None:
        if watch is not None:
            watch(Progress("timing layers", 0, 1, 0, 0, None, 0.0, None))
        target.measure_table(space.keep)
    assert target.table is not None
    journal.set_fact("latency_table", target.table.to_json())
    return target.predicted_ms


def _floats_of(evaluator: Evaluator, space: Space, journal: Journal) -> tuple[str, ...]:
    """Layers that keep float kernels in this run, found once."""
    known = journal.fact("floats")
    target = evaluator.target
    if known is None:
        known = ()
        if 8 in space.activations and isinstance(target, OnnxTarget) and target.measures:
            known = target.faster_as_floats(replace(space.uniform(bits=8), activations=8))
        journal.set_fact("floats", list(known))
    return tuple(known)


def _predicted(evaluator: Evaluator, policy: Policy) -> Measurement | None:
    """The exact size; None if the codes cannot be found: the candidate fails when it is built, and is recorded so."""
    try:
        return evaluator.predict(policy)
    except Exception:  # whatever the building of a layer raises
        return None


def _until(deadline: float, watch: Watch | None) -> Watch:
    """`watch`, and `RunError` once the time of the monotonic clock is past `deadline`."""

    def follow(progress: Progress) -> None:
        if time.monotonic() > deadline and progress.done < progress.total:
            raise RunError(
                f"--timeout ran out while profiling, {progress.done} of {progress.total} steps done: continue with "
                "--resume and a longer --timeout (solved layers are kept), or start with --controller tpe, which "
                "needs no profile"
            )
        if watch is not None:
            watch(progress)

    return follow


def _profile(evaluator: Evaluator, space: Space, budget: Budget, journal: Journal, watch: Watch) -> Profile:
    """The profile of this run, of an earlier search of the same model and levels, or a new one, kept for later ones."""
    ships = {} if evaluator.format == "packed" else {"format": evaluator.format}  # levels take other bytes there
    key = profile_key(space, {**identity_of(evaluator), "seed": evaluator.seed, **ships})
    cached = cache_folder() / "profiles" / f"{key}.json"
    own = journal.fact("profile")
    known = (None if own is None else Profile.from_json(own), _read_profile(cached))
    profile = next(
        (p for p in known if p is not None and p.key == key and [x.name for x in p.layers] == list(space.bits)), None
    )
    groups = (budget.macs is not None or budget.ms is not None) and any(len(r) > 1 for r in space.keep.values())
    complete = profile is not None and (bool(profile.groups) or not groups)
    if own is None:
        journal.set_fact("profile_reused", complete)
    start = time.monotonic()

    def follow(done: int, total: int, detail: str) -> None:
        seconds = time.monotonic() - start
        left = seconds / done * (total - done) if done else None
        watch(Progress("profiling", done, total, 0, 0, None, seconds, left, detail))

    if profile is None:
        profile = measure(evaluator, space, key, follow, time.monotonic)
    if groups and not profile.groups:
        profile = with_groups(profile, evaluator, space, follow, time.monotonic)
    journal.set_fact("profile", profile.to_json())
    if not complete:
        _keep(lambda: write(cached, json.dumps(profile.to_json()).encode()), "the profile")
    return profile


def _keep(save: Callable[[], object], what: str) -> None:
    """Save something for later searches; this one does not need it."""
    try:
        save()
    except OSError as error:
        warnings.warn(f"{what} is not kept for later searches: {error}", stacklevel=3)


def _set_precision(evaluator: Evaluator, journal: Journal) -> None:
    """Train in what the run began with: what is fastest here may be found otherwise another time."""
    bench, known = evaluator.bench, journal.fact("precision", precision_of)
    if known is not None:
        bench.precision = known
    elif bench.trainable:
        journal.set_fact("precision", asdict(bench.precision))


def _lessons_of(evaluator: Evaluator) -> Path:
    """Where lessons about this model stay; gains against another teacher are other lessons."""
    views = {"views": VIEWS} if views_of(evaluator.task) is not None else {}
    return cache_folder() / "recovery" / f"{_digest_of(identity_of(evaluator) | views)}.json"


def _earlier_lessons(settings: Settings, learned: Path, journal: Journal) -> list[Lesson]:
    """What earlier searches of the same model learned about recovery training, as it was when this one began."""
    known = journal.fact("lessons")
    if known is None:
        wanted = settings.epochs and not settings.fresh
        known = [lesson.to_json() for lesson in read_lessons(learned)] if wanted else []
        journal.set_fact("lessons", known)
    return lessons_of(known)


def _read_profile(path: Path) -> Profile | None:
    """What `_profile` wrote, or None: a profile that cannot be read is measured again."""
    try:
        return Profile.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, RunError):
        return None


def _refuse_unreachable(space: Space, evaluator: Evaluator, budget: Budget, settings: Settings) -> None:
    smallest = evaluator.bound(space.smallest())
    for policy in (space.smallest(), space.sparsest()):  # entropy coding may make it fit, and many zeros most of all
        if budget.static().excess(smallest) > 0:
            smallest = min(smallest, evaluator.predict(policy), key=budget.static().excess)
    if budget.static().excess(smallest) > 0:
        raise NothingFits(
            f"nothing fits {budget}: the smallest policy of the space {settings.space!r} takes {smallest.bytes:,} "
            f"bytes and {smallest.macs:,} MACs; raise the budget to that, or give a --space with narrower choices"
            + "".join(f"; {note}" for note in evaluator.graph.notes[:3])
        )


def _refuse_too_slow(space: Space, evaluator: Evaluator, budget: Budget, settings: Settings) -> None:
    """Raise `NothingFits` if not even the fastest policies that the layer times tell of keep to the latency."""
    target = evaluator.target
    if budget.ms is None or not isinstance(target, OnnxTarget) or target.table is None:
        return
    fastest = min(
        (fastest_widths(space, target.predicted_ms, width) for width in space.activations), key=lambda f: f[1]
    )
    policy, told = fastest
    measured = told if settings.latency_table else target.time(policy).ms
    if min(told, measured) > TOO_SLOW * budget.ms:
        raise NothingFits(
            f"nothing fits {budget}: the fastest policy of the space {settings.space!r} takes {measured:.4g} ms "
            f"(the original {evaluator.dense.latency_ms:.4g} ms); raise the budget to that, or give a --space with "
            "narrower choices"
        )


def identity_of(evaluator: Evaluator) -> dict[str, Any]:
    """What must not change between the parts of a run, nor between those who take part in it."""
    task = evaluator.task
    return {
        "task": task.name,
        "metric": task.metric,
        "direction": task.direction,
        "graph": evaluator.graph.fingerprint,
        "weights": _digest(evaluator.bench.state),
        "dense_quality": round(evaluator.dense.quality, 4),
    }


def _digest_of(identity: Mapping[str, Any]) -> str:
    """Names files about the same model and data."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _digest(state: Mapping[str, Tensor]) -> str:
    """Equal for equal weights."""
    content = hashlib.sha256()
    for name, value in state.items():
        content.update(name.encode())
        content.update(value.contiguous().flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    return content.hexdigest()[:16]


def _write_config(
    folder: Path, settings: Settings, file: SpaceFile, command: str, timed: dict[str, Any], *, resume: bool
) -> None:
    """All that determines the run; a continued one keeps its command and may have new totals."""
    config = {
        "settings": asdict(settings) | {"budgets": list(settings.budgets)},
        "space": file.model_dump(mode="json"),
        **timed,
        "command": command if not resume else _config(folder).get("command", command),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "machine": {"system": platform.platform(), "processor": platform.machine()},
    }
    write(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    write(folder / FREEZE, "".join(f"{line}\n" for line in _installed()).encode())


def _installed() -> list[str]:
    """All packages of this environment as pip would take them: with the config they repeat the run elsewhere."""
    names = {d.metadata["Name"].lower(): d for d in reversed(list(distributions())) if d.metadata["Name"]}
    return [f"{name}=={found.version}" for name, found in sorted(names.items())]


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return dict(config)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunError(f"{folder} is not a run folder: {CONFIG} cannot be read ({error})") from None


def read_config(folder: Path) -> tuple[Settings, SpaceFile, dict[str, Any]]:
    """Settings, space and the whole of a run's `config.json`. Raises `RunError`."""
    config = _config(folder)
    try:
        values = dict(config["settings"])
        if unknown := set(values) - {field.name for field in fields(Settings)}:
            raise ValueError(f"it has the unknown setting {min(unknown)!r}")
        settings = SETTINGS.validate_json(json.dumps(values), strict=True)
        return settings, SpaceFile.model_validate(config["space"]), _described(config)
    except (KeyError, TypeError, ValueError, AutocompressError) as error:
        raise RunError(f"{folder / CONFIG} is damaged: {error}") from None


def _described(config: dict[str, Any]) -> dict[str, Any]:
    """`config`, of which reports show these texts. Raises `TypeError` where something else stands."""
    texts = [config.get(name, "") for name in ("command", "device", "latency_runtime")]
    for name in ("versions", "machine"):
        texts += dict(config.get(name, {})).values()
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("it describes its machine in something else than texts")
    return config


SETTINGS = TypeAdapter(Settings)
"""Reads settings from JSON."""


def check_resumable(folder: Path, wanted: Settings, space: SpaceFile | None = None) -> SpaceFile:
    """The space of the run in `folder`; `RunError` unless `wanted` continues it. Only totals may differ."""
    settings, file, _ = read_config(folder)
    fixed = ("task", "budgets", "controller", "epochs", "fresh", "seed", "data", "checkpoint", "format", "threads")
    for name in (*fixed, "batch", "latency_table", "deterministic"):
        before, now = getattr(settings, name), getattr(wanted, name)
        if before != now:
            flag = {"task": "task", "budgets": "--budget"}.get(name, f"--{name.replace('_', '-')}")
            raise RunError(
                f"{folder} was searched with {flag} {before!r}, not {now!r}: leave it out to continue, or "
                "start a new run with --out"
            )
    if space is not None and space != file:
        raise RunError(
            f"{folder} was searched with another space than {wanted.space!r} is now: leave --space out to "
            "continue, or start a new run with --out"
        )
    return file


def measuring(settings: Settings, folder: Path, *, timed: bool = True) -> Evaluator:
    """What measures candidates as the run in `folder` did, for whoever wants to know more of it later.

    Unless `timed`, the dense model's latency is not the run's: `settings` ask for another format.
    """
    with Journal.reading(folder) as journal:
        known, dense = journal.fact("precision", precision_of), journal.fact("dense", Measurement.from_json)
    evaluator = settings.evaluator(dense.latency_ms if timed and dense is not None else None)
    if known is not None:
        evaluator.bench.precision = known
    return evaluator


def _dense_latency(folder: Path) -> float | None:
    try:
        with Journal.reading(folder) as journal:
            dense = journal.fact("dense", Measurement.from_json)
    except RunError:  # killed before its journal was whole: nothing was measured yet
        return None
    return None if dense is None else float(dense.latency_ms)


def precision_of(data: Any) -> Precision:
    """What a journal or another machine says; raises `TypeError` or `ValueError` for what is none."""
    found = Precision(**data)
    if not all(isinstance(value, bool) for value in asdict(found).values()):
        raise ValueError(f"{data!r} is no precision")
    return found
