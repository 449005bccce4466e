"""The seam between a study and where its trials run: jobs in, results out, several in flight.

A runner never decides what runs, what is repeated or what is written down: the study does, in one place for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from autocompress.errors import RunError
from autocompress.evaluate import Evaluate, Job
from autocompress.trial import Evaluation

Build = Callable[[], Evaluate]
"""What a worker calls first, to load the task. It must be picklable."""
Steps = Callable[[Job, int, int], None]
"""Hears of a job's training that it is at a step of so many."""


class Result(NamedTuple):
    """What became of a job; no evaluation if the worker that ran it was lost, and perhaps a `reason` for that."""

    job: Job
    evaluation: Evaluation | None
    reason: str = ""


class Runner(Protocol):
    """Runs jobs, up to `workers` at once.

    `isolated` says that a trial that takes its process down leaves this one alive. `close` stops what is in flight and
    gives everything back; a closed runner runs nothing more.
    """

    isolated: bool

    @property
    def workers(self) -> int:
        """How many jobs may be in flight now; a cluster may grow and shrink."""
        ...

    def run(self, jobs: Iterable[Job | None], steps: Steps = ...) -> Generator[Result]:
        """Results as they come. Takes a job whenever a worker is free, so each sees what was made of earlier results.

        None among the jobs: there is none before the next result. Ends when there are no more jobs and no more results,
        or if it is told to wait and nothing is in flight. If the caller ends it early, what is in flight is given up
        and never becomes a result, not of a later `run` either.
        """
        ...

    def close(self) -> None:
        """See the class."""
        ...


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where to run: `address` is `auto` (the cluster of this machine), HOST:PORT, or `local` for one of its own.

    `cpus` and `gpus` are those of a trial, `max_concurrent` bounds how many run at once. Latencies are measured on
    nodes that have the resource `latency_node`.
    """

    address: str = "auto"
    cpus: float = 1.0
    gpus: float = 0.0
    max_concurrent: int | None = None
    latency_node: str | None = None

    def __post_init__(self) -> None:
        if self.address.startswith("ray://"):
            raise RunError(
                "--ray takes no ray:// address: start the search on a node of the cluster with --ray auto (`ray job "
                "submit` or `ray exec` do), or give the address that `ray start` printed"
            )
        for name, value in (("cpus-per-trial", self.cpus), ("gpus-per-trial", self.gpus)):
            if not (math.isfinite(value) and value >= 0):
                raise RunError(f"--{name} is {value}; it must be 0 or more")
        if self.cpus == self.gpus == 0:
            raise RunError("--cpus-per-trial and --gpus-per-trial are both 0; a trial must take something")
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise RunError(f"--max-concurrent is {self.max_concurrent}; it must be 1 or more")


def unwatched(job: Job, step: int, total: int) -> None:
    """For who does not want to hear of steps."""


def keep_busy(
    jobs: Iterable[Job | None], workers: Callable[[], int], start: Callable[[Job], None], wait: Callable[[], Result]
) -> Generator[Result]:
    """Start jobs while workers are free, then wait for a result, and so on: the common part of `run`."""
    source, flying, ended = iter(jobs), 0, False
    while True:
        while not ended and flying < workers():
            try:
                job = next(source)
            except StopIteration:
                ended = True
                break
            if job is None:
                break
            start(job)
            flying += 1
        if not flying:
            return
        result = wait()
        flying -= 1
        yield result
