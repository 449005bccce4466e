"""Runs trials in this process, one after another."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from functools import partial

from autocompress.evaluate import Evaluate, Job
from autocompress.runners.base import Result, Steps, unwatched


class LocalRunner:
    """One worker: this process."""

    isolated, workers = False, 1

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate

    def run(self, jobs: Iterable[Job | None], steps: Steps = unwatched) -> Generator[Result]:
        """See `Runner`."""
        for job in jobs:
            if job is None:
                return
            yield Result(job, self._evaluate(job, partial(steps, job)))

    def close(self) -> None:
        """Nothing to give back."""
