"""The seam between a study and where its trials run: jobs in, results out, several in flight.

A runner never decides what runs, what is repeated or what is written down: the study does, in one place for all.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple, Protocol

from autocompress.evaluate import Job
from autocompress.trial import Evaluation

Steps = Callable[[Job, int, int], None]
"""Hears of a job's training that it is at a step of so many."""


class Result(NamedTuple):
    """What became of a job; no evaluation if the worker that ran it was lost."""

    job: Job
    evaluation: Evaluation | None


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
