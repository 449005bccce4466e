"""Trials between their begin and their tell, as plain data. Knows nothing of journals, controllers and runners.

Results are told as they come, or (`batch`) in the order of their numbers once so many have come: then what is asked
and told does not depend on who is faster, nor on how many workers there are.
"""

from __future__ import annotations

from collections import deque

from autocompress.evaluate import Job
from autocompress.trial import Evaluation


class Flight:
    """`jobs` by number, in that order; `again` holds those whose worker, or whole process, was lost."""

    def __init__(self, batch: int = 0) -> None:
        """`batch` 0 tells each result at once."""
        self._batch = batch
        self.jobs: dict[int, Job] = {}
        self.again: deque[Job] = deque()
        self._results: dict[int, Evaluation] = {}
        self._twins: dict[int, list[Job]] = {}
        self._first: dict[tuple[str, bool], int] = {}

    @property
    def running(self) -> int:
        """How many have no result yet."""
        return len(self.jobs) - len(self._results)

    @property
    def full(self) -> bool:
        """Whether no more may begin before some were told."""
        return 0 < self._batch <= len(self.jobs)

    def enter(self, job: Job) -> bool:
        """Whether the job must run: one like it may be in flight, and then gets its result."""
        first = self._first.setdefault((job.policy.key(), job.screen), job.number)
        if first != job.number:
            self._twins.setdefault(first, []).append(job)
            return False
        self.jobs[job.number] = job
        return True

    def arrive(self, number: int, evaluation: Evaluation) -> None:
        """A result came."""
        self._results[number] = evaluation

    def due(self, *, all_of_them: bool = False) -> list[tuple[int, Evaluation, list[Job]]]:
        """Results to tell now, in order, each with the trials that take it over; they leave the flight."""
        if self._batch and (self.running or not (self.full or all_of_them)):
            return []
        found = sorted(self._results)
        told = [(number, self._results.pop(number), self._twins.pop(number, [])) for number in found]
        for number in found:
            job = self.jobs.pop(number)
            del self._first[job.policy.key(), job.screen]
        return told
