"""Runs trials in processes of this machine, each with a resident model and a pipe.

A process that dies takes its trial with it and nothing else: another one takes its place. They are spawned, never
forked, since threads do not survive a fork. Layer solutions are shared through the cache on disk.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import connection, get_context
from multiprocessing import process as processes
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from autocompress.errors import AutocompressError, RunError
from autocompress.evaluate import Job
from autocompress.runners.base import Build, Result, Steps, keep_busy, unwatched
from autocompress.trial import Evaluation

STARTS = 3
"""Processes in a row that may end while they load the task."""
EVERY = 0.5
"""Seconds between the training steps that a process tells of."""
GRACE = 5.0
"""Seconds that idle processes get to end by themselves."""
T = TypeVar("T")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class ProcessRunner:
    """Up to `workers` processes, started when there is work for them. See `Runner`.

    One whose job takes longer than `limit` seconds is ended, and lost.
    """

    isolated = True

    def __init__(self, build: Build, workers: int, limit: float = math.inf) -> None:
        if workers < 1:
            raise RunError(f"--workers is {workers}; it must be 1 or more")
        self._build, self.workers, self._limit = build, workers, limit
        self._threads = max(1, cores() // workers)
        self._idle: list[_Worker] = []
        self._busy: dict[Connection, tuple[_Worker, Job]] = {}
        self._failed = 0
        self._steps: Steps = unwatched

    def run(self, jobs: Iterable[Job | None], steps: Steps = unwatched) -> Generator[Result]:
        """See `Runner`. Raises `AutocompressError` where processes cannot load the task."""
        self._steps = steps
        try:
            yield from keep_busy(jobs, lambda: self.workers, self._start, self._wait)
        finally:
            for worker, _ in self._busy.values():
                worker.kill()
            self._busy.clear()

    def close(self) -> None:
        """See `Runner`."""
        for worker in self._idle:
            worker.pipe.close()
        for worker in self._idle:
            worker.process.join(GRACE)
            worker.kill()
        self._idle.clear()

    def _start(self, job: Job) -> None:
        worker = self._idle.pop() if self._idle else _Worker(self._build, self._threads)
        try:
            worker.pipe.send(job.to_json())
        except OSError:  # it died while it was idle: that is not the job's fault
            worker.kill()
            self._start(job)
            return
        worker.since = time.monotonic() if worker.ready else math.inf
        self._busy[worker.pipe] = worker, job

    def _wait(self) -> Result:
        """The next result. Of several that are there one is taken, the others wait in their pipes."""
        while True:
            if (late := self._late()) is not None:
                return late
            for pipe in connection.wait(list(self._busy), self._patience()):
                assert isinstance(pipe, Connection)
                worker, job = self._busy[pipe]
                try:
                    kind, *values = pipe.recv()
                except (EOFError, OSError):
                    del self._busy[pipe]
                    worker.kill()
                    if worker.ready:
                        return Result(job, None)
                    self._did_not_start(worker, job)
                    continue
                if kind == "done":
                    del self._busy[pipe]
                    self._idle.append(worker)
                    return Result(job, Evaluation.from_json(job.policy, values[0]))
                self._hear(worker, job, kind, values)

    def _hear(self, worker: _Worker, job: Job, kind: str, values: list[Any]) -> None:
        if kind == "ready":
            worker.ready, worker.since, self._failed = True, time.monotonic(), 0
        elif kind == "step":
            self._steps(job, *values)
        else:
            raise values[0]

    def _patience(self) -> float | None:
        """Seconds until the first job has had its time; None where none can run out."""
        end = min(worker.since for worker, _ in self._busy.values()) + self._limit
        return None if end == math.inf else max(0.0, end - time.monotonic())

    def _late(self) -> Result | None:
        """A job that has had its time, which starts once the task is loaded; its process is ended."""
        for pipe, (worker, job) in self._busy.items():
            if time.monotonic() - worker.since >= self._limit:
                del self._busy[pipe]
                worker.kill()
                return Result(job, None, f"stopped after {self._limit:g} s, its --trial-timeout")
        return None

    def _did_not_start(self, worker: _Worker, job: Job) -> None:
        self._failed += 1
        if self._failed >= STARTS:
            raise RunError(
                f"worker processes end while they load the task (exit code {worker.process.exitcode}): there may be "
                f"too little memory for {self.workers} of them; give fewer --workers"
            )
        self._start(job)


class _Worker:
    """A process and this end of its pipe; `ready` once it has loaded the task, busy `since` then or its job came."""

    def __init__(self, build: Build, threads: int) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.ready, self.since = False, math.inf
        self.process = context.Process(target=_serve, args=(build, theirs, threads), daemon=True)
        with numeric_threads(threads):
            self.process.start()
        theirs.close()  # or its end would not be noticed

    def kill(self) -> None:
        """End it at once, if it lives."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def cores() -> int:
    """Cores that this process may use, and no more than the user allows it threads."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return min(found, int(allowed)) if allowed.isdigit() and int(allowed) else found


@contextlib.contextmanager
def numeric_threads(threads: int) -> Iterator[None]:
    """What a new process must find before it imports numerical libraries."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# --- in the process -------------------------------------------------------------------------------------


def _serve(build: Build, pipe: Connection, threads: int) -> None:
    """Evaluate what comes through the pipe until it closes."""
    with contextlib.suppress(EOFError, OSError):  # the driver is gone, or needs nothing more
        evaluate = loaded(build, pipe, threads)
        if evaluate is None:
            return
        pipe.send(("ready",))
        while True:
            job = Job.from_json(pipe.recv())
            try:
                evaluation = evaluate(job, _Teller(pipe))
            except AutocompressError as error:  # no fault of the job's: the search ends, as it would in one process
                pipe.send(("broken", type(error)(str(error))))
                return
            pipe.send(("done", evaluation.to_json()))


def loaded(build: Callable[[], T], pipe: Connection, threads: int) -> T | None:
    """What `build` makes, in a process that ends with the one that started it; None if it said why that fails."""
    import signal

    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        return build()
    except AutocompressError as error:
        pipe.send(("broken", type(error)(str(error))))
    except Exception as error:
        pipe.send(("broken", RunError(f"a worker process cannot load the task: {type(error).__name__}: {error}")))
    return None


def _follow_parent() -> None:
    """A process whose driver was killed ends too, in the middle of a training if need be."""
    parent = processes.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


class _Teller:
    """Tells the driver of training steps, now and then."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._last = pipe, 0.0

    def __call__(self, step: int, total: int) -> None:
        if time.monotonic() - self._last >= EVERY:
            self._last = time.monotonic()
            self._pipe.send(("step", step, total))
