"""Runs trials in processes that meet at a `Board`: other machines join a search without a cluster.

The driver gives each of those who joined one job after another, and reads results; they evaluate on a model that stays,
and show signs of life meanwhile. One of whom nothing is heard for a while has lost its job.
"""

from __future__ import annotations

import base64
import contextlib
import math
import os
import socket
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from autocompress.errors import AutocompressError, RunError
from autocompress.evaluate import Evaluate, Job
from autocompress.files import write
from autocompress.runners.base import Build, Result, Steps, keep_busy, unwatched
from autocompress.runners.board import Address, Board, Offer, job_of, one_line
from autocompress.runners.processes import STARTS, cores, loaded, numeric_threads
from autocompress.trial import Evaluation

SHORTEST, LONGEST = 0.02, 0.25
"""Seconds between looks at the board: doubled while nothing happens."""
PULSE = 2.0
"""Seconds between signs of life."""
LOST = 60.0
"""Seconds without a sign of life, by the clock of who waits for it, after which a worker counts as lost."""


class Signs:
    """Who shows signs of life: counts that change, seen by one's own clock, since clocks of machines differ."""

    def __init__(self, known: dict[str, Any]) -> None:
        """Those `known` from before count once they move."""
        self._last = {name: (told, -math.inf) for name, told in known.items()}

    def look(self, told: dict[str, Any]) -> None:
        """What everyone says now."""
        now = time.monotonic()
        for name, sign in told.items():
            if name not in self._last or self._last[name][0] != sign:
                self._last[name] = sign, -math.inf if sign.get("gone") else now

    def alive(self, name: str) -> bool:
        """Whether it said something lately."""
        return name in self._last and time.monotonic() - self._last[name][1] < LOST

    def gone(self, name: str) -> bool:
        """Whether it said that it will say no more."""
        return name in self._last and bool(self._last[name][0].get("gone"))

    def working_on(self, name: str) -> Any:
        """The id of the job that it said it works on, or None."""
        return self._last[name][0].get("trial")

    def living(self) -> list[str]:
        """All who are alive."""
        return [name for name in self._last if self.alive(name)]


def workers_of(facts: dict[str, Any]) -> dict[str, Any]:
    """The signs of workers among a search's facts."""
    return {name: told for name, told in facts.items() if name.startswith("worker-") and isinstance(told, dict)}


# --- the driver ---------------------------------------------------------------------------------------------


class Driver:
    """Says that somebody drives a search, while it is entered."""

    def __init__(self, board: Board) -> None:
        self.board, self._over = board, threading.Event()
        self._thread = threading.Thread(target=self._show_life, daemon=True)

    def __enter__(self) -> Driver:
        self.board.say("ended", False)
        self._say()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(RunError):
            self.board.say("ended", True)

    def _say(self) -> None:
        self.board.say("driver", {"host": socket.gethostname(), "sign": uuid.uuid4().hex})

    def _show_life(self) -> None:
        while not self._over.wait(PULSE):
            with contextlib.suppress(RunError):  # the study hears of it when it looks for results
                self._say()


def driven_from(board: Board) -> str | None:
    """The machine of a driver that shows signs of life, or None; takes some seconds."""
    first = board.facts()
    if first.get("ended") or "driver" not in first:
        return None
    time.sleep(3 * PULSE)
    now = board.fact("driver")
    return str(now.get("host")) if now != first["driver"] else None


@dataclass
class StorageRunner:
    """Jobs for all who joined the search, `workers` processes of this machine among them. See `Runner`.

    What takes longer than `limit` seconds is given up by its worker.
    """

    isolated = True

    board: Board
    build: Build
    here: int = 1
    limit: float = math.inf
    _flying: dict[int, Job] = field(default_factory=dict, init=False)
    _steps: dict[int, tuple[int, int]] = field(default_factory=dict, init=False)
    _given: dict[int, tuple[str, float]] = field(default_factory=dict, init=False)
    _posted: set[int] = field(default_factory=set, init=False)
    _found: deque[Result] = field(default_factory=deque, init=False)

    def __post_init__(self) -> None:
        self.board.clear()
        self._signs = Signs(workers_of(self.board.facts()))
        self._crew = Crew(self.board, self.build, self.here, self.limit)

    @property
    def workers(self) -> int:
        """Processes that show signs of life, those of this machine at least."""
        return max(self.here, len(self._signs.living()))

    def run(self, jobs: Iterable[Job | None], steps: Steps = unwatched) -> Generator[Result]:
        """See `Runner`. Raises `RunError` where the storage does not answer, or processes here cannot load the task."""
        try:
            yield from keep_busy(jobs, lambda: self.workers, partial(self._start, steps), partial(self._wait, steps))
        finally:
            for trial in self._flying:
                self.board.end(trial)
            for known in (self._flying, self._steps, self._given, self._found):
                known.clear()

    def close(self) -> None:
        """See `Runner`. Who joined may leave."""
        self._crew.close()
        with contextlib.suppress(RunError):
            self.board.say("ended", True)

    def _start(self, steps: Steps, job: Job) -> None:
        self._until(steps, lambda: self._free() is not None)
        worker = self._free()
        assert worker is not None
        trial = self.board.post(job, worker)
        self._flying[trial], self._given[trial] = job, (worker, time.monotonic())
        self._posted.add(trial)

    def _free(self) -> str | None:
        """Somebody without a job; one that works on a former driver's is heard of when that is done."""
        busy = {worker for worker, _ in self._given.values()}
        return next((name for name in self._signs.living() if name not in busy and not self._is_elsewhere(name)), None)

    def _is_elsewhere(self, name: str) -> bool:
        """Whether it works on a job that another driver gave it."""
        trial = self._signs.working_on(name)
        return trial is not None and not (isinstance(trial, int) and trial in self._posted)

    def _wait(self, steps: Steps) -> Result:
        self._until(steps, lambda: bool(self._found))
        return self._found.popleft()

    def _until(self, steps: Steps, reached: Callable[[], bool]) -> None:
        pause = SHORTEST
        while not reached():
            self._crew.look()
            self._look(steps)
            if not reached():
                time.sleep(pause)
                pause = min(2 * pause, LONGEST)

    def _look(self, steps: Steps) -> None:
        offers = self.board.offers()
        signs = workers_of(self.board.facts())
        self._signs.look(signs)
        for offer in offers:
            job = self._flying.get(offer.number)
            if job is None:
                continue
            step = _step(offer.number, offer.outcome or signs.get(offer.worker, {}))
            if step is not None and step != self._steps.get(offer.number):
                self._steps[offer.number] = step
                steps(job, *step)
            if offer.outcome is not None:
                self._end(offer.number, _result(job, offer))
            elif self._is_lost(offer.number):
                self._end(offer.number, Result(job, None))

    def _is_lost(self, trial: int) -> bool:
        """Its worker is gone, or silent for a while."""
        name, since = self._given[trial]
        return self._signs.gone(name) or (not self._signs.alive(name) and time.monotonic() - since > LOST)

    def _end(self, trial: int, result: Result) -> None:
        for known in (self._flying, self._steps, self._given):
            known.pop(trial, None)
        self._found.append(result)
        self.board.end(trial, result.evaluation)


def _step(trial: int, told: dict[str, Any]) -> tuple[int, int] | None:
    """How far a worker says that this trial's training is."""
    step = told.get("step") if told.get("trial") == trial else None
    known = isinstance(step, list) and len(step) == 2 and all(isinstance(i, int) for i in step)
    return (step[0], step[1]) if known and step is not None else None


def _result(job: Job, offer: Offer) -> Result:
    """What a worker answered. Whatever is in a database is data: what makes no sense is no result."""
    outcome = offer.outcome or {}
    if "evaluation" not in outcome:
        return Result(job, None, str(outcome.get("lost", "")))
    try:
        evaluation = Evaluation.from_json(job.policy, outcome["evaluation"])
        artifact = None if offer.artifact is None else base64.b64decode(offer.artifact, validate=True)
    except (KeyError, TypeError, ValueError, AttributeError, AutocompressError) as error:
        return Result(job, None, f"its worker's answer cannot be read: {one_line(error)}")
    if artifact is not None and job.keep is not None:
        write(job.keep, artifact)
    return Result(job, evaluation)


# --- workers ------------------------------------------------------------------------------------------------


class Crew:
    """Processes of this machine that take jobs of a search; one that dies is replaced.

    `done` counts what they evaluated.
    """

    def __init__(self, board: Board, build: Build, workers: int, limit: float = math.inf) -> None:
        self._board, self._build, self._limit = board, build, limit
        self._threads, self._context = max(1, cores() // workers), get_context("spawn")
        self._leaving = self._context.Event()
        self._hands: list[_Hand | None] = [None] * workers
        self._failed = self.done = 0

    def look(self) -> bool:
        """Start and replace processes, unless they leave; whether any is there. Raises what keeps them from loading."""
        for i, hand in enumerate(self._hands):
            if hand is not None and not self._is_well(hand):
                self._bury(hand)
                self._hands[i] = hand = None
            if hand is None and not self._leaving.is_set():
                self._hands[i] = _Hand(self, self._context)
        return any(hand is not None for hand in self._hands)

    def stop(self) -> None:
        """Take no more jobs; `look` says when what is in flight has ended."""
        self._leaving.set()

    def close(self) -> None:
        """End them, whatever they do."""
        self._leaving.set()
        for hand in filter(None, self._hands):
            hand.process.kill()
            self._bury(hand)
        self._hands = [None] * len(self._hands)

    def _is_well(self, hand: _Hand) -> bool:
        """Hear what it says. Raises what it could not load."""
        try:
            while hand.pipe.poll():
                kind, *values = hand.pipe.recv()
                if kind == "broken":
                    raise values[0]
                hand.ready, self._failed = True, 0
                self.done += kind == "done"
        except (EOFError, OSError):
            return False
        return bool(hand.process.is_alive())

    def _bury(self, hand: _Hand) -> None:
        hand.process.join()
        hand.pipe.close()
        self._board.say(hand.name, {"gone": True})
        self._failed += not hand.ready and not self._leaving.is_set()
        if self._failed >= STARTS:
            raise RunError(
                f"worker processes end while they load the task (exit code {hand.process.exitcode}): there may be too "
                f"little memory for {len(self._hands)} of them; give fewer --workers"
            )


class _Hand:
    """A process, the name it signs with, and this end of its pipe."""

    def __init__(self, crew: Crew, context: Any) -> None:
        self.name, self.ready = f"worker-{socket.gethostname()}-{uuid.uuid4().hex[:8]}", False
        self.pipe, theirs = context.Pipe(duplex=False)
        given = crew._board.address, self.name, crew._build, theirs, crew._leaving, crew._threads, crew._limit
        self.process = context.Process(target=_serve, args=given, daemon=True)
        with numeric_threads(crew._threads):
            self.process.start()
        theirs.close()  # or its end would not be noticed


def _serve(
    address: Address, name: str, build: Build, pipe: Connection, leaving: Any, threads: int, limit: float
) -> None:
    """Evaluate what is offered until told to leave."""
    seated = loaded(partial(_seated, address, build), pipe, threads)
    if seated is None:
        return
    board, evaluate = seated
    pipe.send(("ready",))
    worker = _Worker(board, name, limit)
    pause = SHORTEST
    while not leaving.is_set():
        claimed = board.claim(name)
        if claimed is None:
            leaving.wait(pause)
            pause = min(2 * pause, LONGEST)
            continue
        pause = SHORTEST
        trial, told = claimed
        try:
            with worker.at(trial), _somewhere(*job_of(told)) as job:
                evaluation = evaluate(job, worker.follow)
                content = job.keep.read_bytes() if job.keep is not None and job.keep.exists() else None
        except AutocompressError as error:  # no fault of the job's: this process is of no use
            board.answer(trial, {"lost": str(error)})
            pipe.send(("broken", type(error)(str(error))))
            return
        board.answer(trial, {"evaluation": evaluation.to_json(), **worker.place(trial)}, content)
        pipe.send(("done",))


def _seated(address: Address, build: Build) -> tuple[Board, Evaluate]:
    """What a worker needs. Raises `RunError` if the search is gone, or as `build` does."""
    board = address.board()
    if board is None:
        raise RunError(f"there is no search {address.name!r} in the storage any more")
    return board, build()


class _Worker:
    """Shows signs of life beside an evaluation, with its steps, and ends the process if that takes too long."""

    def __init__(self, board: Board, name: str, limit: float) -> None:
        self._board, self._name, self._limit = board, name, limit
        self._trial: int | None = None
        self._since, self._step = math.inf, (0, 0)
        self._sign = 0
        self._say()
        threading.Thread(target=self._show_life, daemon=True).start()

    @contextlib.contextmanager
    def at(self, trial: int) -> Iterator[None]:
        """While it evaluates this."""
        self._trial, self._since, self._step = trial, time.monotonic(), (0, 0)
        try:
            yield
        finally:
            self._trial, self._since = None, math.inf

    def follow(self, step: int, total: int) -> None:
        """A training's step."""
        self._step = step, total

    def place(self, trial: int | None) -> dict[str, Any]:
        """How far a training is."""
        return {"trial": trial, "step": list(self._step) if self._step[0] else None}

    def _say(self) -> None:
        self._sign += 1
        self._board.say(self._name, {"sign": self._sign, **self.place(self._trial)})

    def _show_life(self) -> None:
        while True:
            time.sleep(PULSE)
            trial = self._trial
            if trial is not None and time.monotonic() - self._since >= self._limit:
                self._board.answer(trial, {"lost": f"stopped after {self._limit:g} s, its --trial-timeout"})
                os._exit(1)
            self._say()


@contextlib.contextmanager
def _somewhere(job: Job, keep: bool) -> Iterator[Job]:
    """The job with a place of its own for the artifact that it leaves, if it does."""
    if not keep:
        yield job
        return
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        yield job._replace(keep=Path(folder) / "trial")
