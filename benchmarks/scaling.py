"""What a search costs beside its evaluations, and how it scales: on this machine, on Ray, and with 512 workers.

    python benchmarks/scaling.py                              # everything; ends with one JSON line
    python benchmarks/scaling.py --only overhead utilisation  # parts of it

`scaling`: candidates a second of two worker processes against one, each with one thread, in interleaved repetitions;
and what a worker process takes in memory beyond its first. `ray`: seconds of a trial on Ray beyond those on worker
processes, with an evaluation that takes no time. `overhead`: processor time of the driver per trial after `--trials`
finished ones, sixty layers, journal included, evaluation not; and how much its memory grows. `utilisation`: a
discrete-event simulation of 512 workers whose evaluations take 1 to 60 s, with the real controller, study and journal;
what these take of the processor passes on the simulated clock. `kills`: workers and drivers of a real run are killed
at random. Evaluations are synthetic but for `scaling`, which needs an idle machine with two cores.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
from search_efficiency import Problem, area, synthetic
from synthetic import Synthetic

from autocompress import Space, load_space
from autocompress.controllers.registry import make_controller
from autocompress.errors import RunError
from autocompress.evaluate import Evaluate, Job
from autocompress.front import Trial, feasible, front_of
from autocompress.journal import Journal
from autocompress.runners.base import Cluster, Result, Runner, Steps, keep_busy, unwatched
from autocompress.runners.local import LocalRunner
from autocompress.runners.processes import ProcessRunner
from autocompress.study import Settings, Setup, Study
from autocompress.trial import Budget, Evaluation, Measurement

WORKERS = 512
SHORTEST, LONGEST = 1.0, 60.0
"""Seconds of a simulated evaluation: log-normal with these as its 1st and 99th percentiles, and cut off there."""
PERCENTILE = 2.326
SLICE = 1000
"""Trials over which the overhead is taken, at the end."""
KILLS = 100
DRIVERS_SHARE = 0.3
"""Share of the kills that end the driver."""
DRIVEN_WORKERS = 2
PAUSE = 0.2
"""Seconds of an evaluation that may be killed."""
STARTING = 300.0
"""Seconds within which a driver makes progress, even on a very busy machine."""
ENDLESS = 10**6
REPEATS = 5
DISTINCT = 10
"""Policies that `scaling` evaluates in turn."""


# --- a study of the synthetic problem ---------------------------------------------------------------------


@contextmanager
def studying(
    problem: Problem, folder: Path, trials: int, make: Callable[[], Runner], name: str = "solver"
) -> Iterator[Study]:
    """A study with a real journal in `folder`, which may hold an earlier part of it."""
    made = problem.evaluate
    assert isinstance(made, Synthetic)
    evaluator: Any = SimpleNamespace(
        task=SimpleNamespace(direction="max"),
        screens=False,
        graph=made.graph,
        bench=SimpleNamespace(trainable=False),
        predict=made.predict,
        bound=made.predict,
    )
    budget = Budget(bytes=int(problem.high * problem.dense_bytes))
    settings = Settings(problem.name, controller=name, trials=trials, epochs=0)
    controller = make_controller(name, problem.space, budget, problem.predict, 0, problem.profile)
    with Journal.writing(folder) as journal, closing(make()) as runner:
        yield Study(settings, evaluator, controller, runner, budget, journal, folder)


def points_of(trials: Iterable[Trial]) -> list[tuple[int, float]]:
    """(bytes, quality), as they were told."""
    return [(t.measured.bytes, t.measured.quality) for t in trials if t.evaluation.status == "ok"]


# --- what a trial costs the driver --------------------------------------------------------------------------


@dataclass
class Meter:
    """The driver's processor and wall seconds and its memory after each trial, evaluations left out."""

    evaluate: Callable[[Any], Evaluation]
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    kib: list[float] = field(default_factory=list)
    _cpu: float = 0.0
    _wall: float = 0.0

    def __call__(self, job: Job, steps: Any) -> Evaluation:  # noqa: ARG002
        cpu, wall = time.process_time(), time.perf_counter()
        self.cpu.append(cpu - self._cpu)
        self.wall.append(wall - self._wall)
        self.kib.append(resident_kib())
        found = self.evaluate(job.policy)
        self._cpu += time.process_time() - cpu
        self._wall += time.perf_counter() - wall
        return found


def resident_kib() -> float:
    """Memory of a process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


def overhead(trials: int, name: str = "solver") -> dict[str, float]:
    """Milliseconds of the driver per trial over the last `SLICE` of `trials`, and KiB by which each makes it grow."""
    problem = synthetic(0)
    meter = Meter(problem.evaluate)
    with (
        tempfile.TemporaryDirectory() as folder,
        studying(problem, Path(folder), trials, lambda: LocalRunner(meter), name) as study,
    ):
        study.one_shot()
        front, written = len(study.front()), sum(p.stat().st_size for p in Path(folder).iterdir())
    last = min(SLICE, trials // 2)
    cpu, wall = (1e3 * (x[-1] - x[-1 - last]) / last for x in (meter.cpu, meter.wall))
    early = trials // 10
    grown = (meter.kib[-1] - meter.kib[early]) / (trials - 1 - early)
    print(
        f"overhead, {name}: {cpu:.2f} ms of processor and {wall:.2f} ms of wall time a trial over the last {last} of "
        f"{trials} (load {os.getloadavg()[0]:.1f}); {grown:.2f} KiB of memory and {written / trials / 1024:.2f} KiB of "
        f"journal a trial; front {front}",
        flush=True,
    )
    return {"overhead_ms_10k": round(cpu, 2), "memory_kb_per_trial": round(grown * 1.024, 2)}


# --- many simulated workers ---------------------------------------------------------------------------------


class SimulatedRunner:
    """`workers` on a simulated clock. What the driver takes of the processor between results passes there too."""

    isolated = True

    def __init__(self, evaluate: Callable[[Any], Evaluation], workers: int) -> None:
        self.workers, self._evaluate = workers, evaluate
        self.now = self.last_start = 0.0
        self._flying: list[tuple[float, int, Job]] = []
        self.spans: list[tuple[float, float]] = []
        self._awake = time.process_time()

    def run(self, jobs: Iterable[Job | None], steps: Steps = unwatched) -> Generator[Result]:
        """See `Runner`."""
        del steps
        self._awake = time.process_time()
        yield from keep_busy(jobs, lambda: self.workers, self._start, self._end)

    def _work(self) -> None:
        """The driver's own work since it was looked at last moves the clock."""
        now = time.process_time()
        self.now, self._awake = self.now + now - self._awake, now

    def _start(self, job: Job) -> None:
        self._work()
        end = self.now + seconds_of(job.number)
        self.spans.append((self.now, end))
        self.last_start = self.now
        heapq.heappush(self._flying, (end, job.number, job))

    def _end(self) -> Result:
        self._work()
        end, _, job = heapq.heappop(self._flying)
        self.now = max(self.now, end)
        found = self._evaluate(job.policy)
        self._awake = time.process_time()  # evaluations are the workers'
        return Result(job, found)

    def close(self) -> None:
        """Nothing to give back."""

    def utilisation(self, until: float) -> float:
        """Share of all workers' time until then in which they evaluated."""
        return sum(max(0.0, min(end, until) - start) for start, end in self.spans) / (self.workers * until)


def seconds_of(number: int) -> float:
    """How long a trial's evaluation takes: a function of its number."""
    middle = (math.log(SHORTEST) + math.log(LONGEST)) / 2
    sigma = (math.log(LONGEST) - math.log(SHORTEST)) / (2 * PERCENTILE)
    drawn = float(np.random.default_rng(number).lognormal(middle, sigma))
    return min(LONGEST, max(SHORTEST, drawn))


def utilisation(trials: int) -> dict[str, float]:
    """How busy the workers are until the last trial starts, and the hypervolume as a share of a sequential search's."""
    problem = synthetic(0)
    runner = SimulatedRunner(problem.evaluate, WORKERS)
    with tempfile.TemporaryDirectory() as folder, studying(problem, Path(folder), trials, lambda: runner) as study:
        study.one_shot()
        many = points_of(study.trials)
    alone = LocalRunner(lambda job, _: problem.evaluate(job.policy))
    with tempfile.TemporaryDirectory() as folder, studying(problem, Path(folder), trials, lambda: alone) as study:
        study.one_shot()
        one = points_of(study.trials)
    busy, whole = runner.utilisation(runner.last_start), runner.utilisation(runner.now)
    for count in (WORKERS, 2 * WORKERS, trials):
        print(
            f"hypervolume after {count} evaluations: {area(problem, many[:count]):.4f} with {WORKERS} workers, "
            f"{area(problem, one[:count]):.4f} with one",
            flush=True,
        )
    print(
        f"utilisation: {busy:.4f} until the last of {trials} evaluations started, {whole:.4f} until it ended, after "
        f"{runner.now:.0f} simulated seconds",
        flush=True,
    )
    ratio = area(problem, many) / area(problem, one)
    return {"utilisation_512": round(busy, 4), "hypervolume_512": round(ratio, 4)}


# --- kills ------------------------------------------------------------------------------------------------


def paused_worker(folder: Path) -> Evaluate:
    """What a worker of a run that is killed builds; from then on it may be killed."""
    made = Synthetic()
    (folder / f"ready-{os.getpid()}").touch()

    def evaluate(job: Job, steps: Any) -> Evaluation:  # noqa: ARG001
        time.sleep(PAUSE)
        return made(job.policy)

    return evaluate


class Heard:
    """A controller that writes down what it is told, in a file that outlives it."""

    def __init__(self, controller: Any, path: Path) -> None:
        self._controller, self._path = controller, path
        self.ask = controller.ask

    def tell(self, evaluation: Evaluation) -> None:
        """See `Controller`."""
        with self._path.open("a") as log:
            log.write(f"{evaluation.policy.key()} {evaluation.copy_of}\n")
        self._controller.tell(evaluation)


def drive(folder: Path, trials: int) -> None:
    """A driver that may be killed: continues the run in `folder` with worker processes."""
    make = partial(ProcessRunner, partial(paused_worker, folder), DRIVEN_WORKERS)
    with studying(synthetic(0), folder, trials, make) as study:
        study._controller = Heard(study._controller, folder / "told.log")
        if study.front() != front_of(feasible(study.trials, study.budget), "max"):
            (folder / f"changed-{len(study.trials)}").touch()
        study.one_shot()


def driver_of(folder: Path, trials: int) -> subprocess.Popen[bytes]:
    """A process that does so."""
    return subprocess.Popen([sys.executable, __file__, "--drive", str(folder), "--trials", str(trials)])


def is_alive(pid: int) -> bool:
    """Whether a process of this number runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def told_in(folder: Path) -> dict[int, Trial]:
    """Finished trials by number, as anybody may read them; none while the journal is being made."""
    try:
        with Journal.reading(folder) as journal:
            return {t.number: t for t in journal.told()}
    except RunError:
        return {}


def killed_once(folder: Path, driver: subprocess.Popen[bytes], draw: random.Random) -> str:
    """Kill the driver or a worker that has begun to evaluate, once more trials were told; which it was."""
    before, end = len(told_in(folder)), time.monotonic() + STARTING
    while len(told_in(folder)) <= before + draw.randrange(4):
        if driver.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the driver makes no progress (exit code {driver.poll()})")
        time.sleep(draw.uniform(0.0, 0.2))
    workers = [int(path.name.removeprefix("ready-")) for path in folder.glob("ready-*")]
    alive = [pid for pid in workers if is_alive(pid)]
    if alive and draw.random() > DRIVERS_SHARE:
        os.kill(draw.choice(alive), signal.SIGKILL)
        return "worker"
    driver.kill()
    driver.wait()
    return "driver"


def kills(count: int) -> dict[str, str]:
    """Finished trials lost / told twice / changed against the journal, when workers and drivers are killed."""
    draw, made, killed, lost = random.Random(0), Synthetic(), Counter[str](), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        driver, seen = driver_of(folder, ENDLESS), dict[int, Trial]()
        while sum(killed.values()) < count:
            killed[killed_once(folder, driver, draw)] += 1
            now = told_in(folder)
            lost += sum(now.get(number) != trial for number, trial in seen.items())
            seen = now
            if driver.poll() is not None:
                driver = driver_of(folder, ENDLESS)
                print(f"  {dict(killed)}, {len(seen)} trials", flush=True)
        driver.kill()
        driver.wait()
        if driver_of(folder, len(seen) + 20).wait():
            raise RuntimeError("the last driver failed")
        last = told_in(folder)
        lost += sum(last.get(number) != trial for number, trial in seen.items())
        heard = Counter((folder / "told.log").read_text().splitlines())
        twice = sum(times - 1 for line, times in heard.items() if line.endswith(" None"))
        changed = len(list(folder.glob("changed-*")))
    done = [t.evaluation for t in last.values() if t.evaluation.status == "ok"]
    changed += sum(e.measurement != made(e.policy).measurement for e in done)
    print(f"kills: {dict(killed)}; {len(last)} trials, {len(last) - len(done)} of them failed", flush=True)
    return {"kills": f"{lost}/{twice}/{changed}"}


# --- real workers -----------------------------------------------------------------------------------------


def scaling(jobs: int) -> dict[str, float]:
    """Candidates a second of two workers against one, one-shot evaluations of the digits task, one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    settings = Settings("digits", epochs=0)
    evaluator = settings.evaluator(1.0)
    controller = make_controller("random", Space(load_space("default"), evaluator.graph), Budget(), evaluator.bound, 0)
    policies = [controller.ask() for _ in range(DISTINCT)]  # each needs levels of its own, solved before the clock runs
    work = [Job(policies[i % DISTINCT], 0, number=i) for i in range(jobs)]
    rates: dict[int, list[float]] = {1: [], 2: []}
    with (
        closing(ProcessRunner(Setup(settings, 1.0), 1)) as one,
        closing(ProcessRunner(Setup(settings, 1.0), 2)) as two,
    ):
        for runner in (one, two):  # loads the task, and solves each layer's levels once, into the cache
            deque(runner.run(work), maxlen=0)
        for _ in range(REPEATS):
            for count, runner in ((1, one), (2, two)):
                start = time.perf_counter()
                deque(runner.run(work), maxlen=0)
                rates[count].append(jobs / (time.perf_counter() - start))
        alone = [private_mib(worker.process.pid) for worker in two._idle]
    ratios = [b / a for a, b in zip(rates[1], rates[2], strict=True)]
    model = sum(v.numel() * v.element_size() for v in evaluator.bench.state.values()) / 2**20
    print(
        f"scaling: {rates[1]} candidates/s with one worker, {rates[2]} with two, ratios {ratios} (load "
        f"{os.getloadavg()[0]:.1f}); private memory of the two {alone} MiB, the model {model:.2f}",
        flush=True,
    )
    return {"scaling_2": round(median(ratios), 3), "memory_per_worker_mib": round(median(alone) - model, 1)}


def private_mib(pid: int | None) -> float:
    """Memory of a process that no other has."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def instant_worker() -> Evaluate:
    """What a worker builds whose evaluations take no time."""
    return partial(_instant, Measurement(1000, 1000, 0.9, 0.1, 1.0))


def _instant(measured: Measurement, job: Job, steps: Any) -> Evaluation:  # noqa: ARG001
    return Evaluation(job.policy, 0, job.rung, "ok", measured)


def ray_overhead(jobs: int) -> dict[str, float]:
    """Milliseconds of a trial on Ray beyond those on worker processes, two of each; interleaved repetitions."""
    from autocompress.runners.ray_tune import RayRunner

    made = Synthetic()
    policies = list(made.space.baselines())
    work = [Job(policies[i % len(policies)], 0, number=i) for i in range(jobs)]
    took: dict[str, list[float]] = {"processes": [], "ray": []}
    here = RayRunner(instant_worker, Cluster("local", max_concurrent=2), code=Path(__file__).parent)
    with closing(ProcessRunner(instant_worker, 2)) as processes, closing(here) as on_ray:
        for runner in (processes, on_ray):
            deque(runner.run(work[:20]), maxlen=0)
        for _ in range(REPEATS):
            for kind, runner in (("processes", processes), ("ray", on_ray)):
                start = time.perf_counter()
                deque(runner.run(work), maxlen=0)
                took[kind].append(1e3 * (time.perf_counter() - start) / jobs)
    print(f"ray: {took} ms a trial, 2 workers, n={jobs} (load {os.getloadavg()[0]:.1f})", flush=True)
    return {"ray_overhead_ms": round(median(took["ray"]) - median(took["processes"]), 1)}


PARTS: dict[str, Callable[[argparse.Namespace], Mapping[str, Any]]] = {
    "scaling": lambda given: scaling(given.jobs),
    "ray": lambda given: ray_overhead(5 * given.jobs),
    "overhead": lambda given: overhead(given.trials, given.controller),
    "utilisation": lambda given: utilisation(given.evaluations),
    "kills": lambda given: kills(given.kills),
}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--trials", type=int, default=10_000, help="of `overhead`")
    parser.add_argument("--controller", default="solver", help="of `overhead`")
    parser.add_argument("--evaluations", type=int, default=8 * WORKERS, help="of `utilisation`")
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--jobs", type=int, default=60, help="of a repetition of `scaling`, a fifth of `ray`'s")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.drive is not None:
        drive(given.drive, given.trials)
        return
    found: dict[str, Any] = {}
    for name in given.only:
        found |= PARTS[name](given)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
