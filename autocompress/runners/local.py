"""Runs trials in this process, one after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from autocompress.evaluate import Evaluate, Job
from autocompress.trial import Evaluation


class Runner(Protocol):
    """Policies in, evaluations out."""

    def run(self, jobs: Iterable[Job]) -> Iterator[Evaluation]:
        """Evaluate each job; the next is taken only after the last evaluation has been consumed."""
        ...


class LocalRunner:
    """One worker: this process."""

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate

    def run(self, jobs: Iterable[Job]) -> Iterator[Evaluation]:
        """See `Runner`."""
        for job in jobs:
            yield self._evaluate(job)
