"""What every runner promises: each job is a result once, failures and lost workers are data, and nothing goes on."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import fakes
import pytest
from fakes import FakeEvaluator, Killed, broken_worker, fake_worker, make_space

from autocompress.errors import AutocompressError
from autocompress.evaluate import Evaluate, Job
from autocompress.runners.base import Cluster, Runner
from autocompress.runners.board import Address
from autocompress.runners.local import LocalRunner
from autocompress.runners.processes import ProcessRunner
from autocompress.runners.storage import StorageRunner

Make = Callable[..., Runner]
TESTS = Path(fakes.__file__).parent
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'autocompress[ray]'")


def local(workers: int, build: Callable[[], Evaluate] = fake_worker) -> Runner:
    del workers
    return LocalRunner(build())


def spawned(workers: int, build: Callable[[], Evaluate] = fake_worker) -> Runner:
    return ProcessRunner(build, workers)


def on_ray(workers: int, build: Callable[[], Evaluate] = fake_worker) -> Runner:
    from autocompress.runners.ray_tune import RayRunner

    return RayRunner(build, Cluster(os.environ["RAY_ADDRESS"], max_concurrent=workers), code=TESTS)


NOTES = Path(tempfile.gettempdir()) / f"autocompress-notes-{os.getpid()}"
"""Names the folder with notes to workers that are not told where an artifact will lie."""


@dataclass(frozen=True)
class Noted:
    """Builds what `build` does, in a process that finds the notes to it."""

    build: Callable[[], Evaluate]
    notes: Path

    def __call__(self) -> Evaluate:
        fakes.NOTES = self.notes
        return self.build()


def on_storage(workers: int, build: Callable[[], Evaluate] = fake_worker) -> Runner:
    folder = Path(tempfile.mkdtemp())
    board = Address(f"sqlite:///{folder}/meet.db", "conformance").create()
    assert board is not None
    return StorageRunner(board, Noted(build, NOTES), workers)


RUNNERS: dict[str, Make] = {"local": local, "processes": spawned, "storage": on_storage, "ray": on_ray}
SLOW = [
    pytest.param("processes", marks=pytest.mark.slow),
    pytest.param("storage", marks=pytest.mark.slow),
    pytest.param("ray", marks=[pytest.mark.slow, needs_ray, pytest.mark.filterwarnings("ignore")]),
]


@pytest.fixture(scope="module")
def runners() -> Iterator[Callable[..., Runner]]:
    """Each kind of runner once, since workers start for seconds; all are closed in the end."""
    made: dict[tuple[object, ...], Runner] = {}

    def get(name: str, workers: int, build: Callable[[], Evaluate]) -> Runner:
        if name == "local":
            return local(workers, build)
        key = name, workers, build
        if name == "ray" and key not in made:  # the actors of one hold the whole cluster
            for other in [key for key in made if key[0] == "ray"]:
                made.pop(other).close()
        if key not in made:
            made[key] = RUNNERS[name](workers, build)
        return made[key]

    yield get
    for runner in made.values():
        runner.close()
    NOTES.unlink(missing_ok=True)


@pytest.fixture(params=["local", *SLOW])
def make(request: pytest.FixtureRequest, runners: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch) -> Make:
    """A runner with a number of workers."""

    NOTES.unlink(missing_ok=True)
    if request.param == "ray":
        monkeypatch.setenv("RAY_ADDRESS", request.getfixturevalue("cluster").address)

    def get(workers: int = 2, build: Callable[[], Evaluate] = fake_worker) -> Runner:
        return runners(request.param, workers, build)

    return get


def some_jobs(folder: Path | None = None, count: int = 6) -> list[Job]:
    policies = list(make_space().baselines())
    return [
        Job(policies[i % len(policies)], i % 2, None if folder is None else folder / f"trial-{i}.acz", number=i)
        for i in range(count)
    ]


def told(folder: Path, number: int, what: str) -> None:
    """What the worker does to itself when it evaluates this job."""
    (folder / f"do-{number}").write_text(what)
    NOTES.write_text(str(folder))


def test_every_job_is_a_result_once_and_as_if_evaluated_here(make: Make) -> None:
    jobs = some_jobs()
    found = list(make().run(jobs))
    assert Counter(result.job.number for result in found) == Counter(range(len(jobs)))
    here = fake_worker()
    for job, evaluation, _ in found:
        assert job == jobs[job.number]
        expected = here(job, lambda *_: None)
        assert evaluation is not None
        assert evaluation.to_json() | {"seconds": 0} == expected.to_json() | {"seconds": 0}
        assert evaluation.policy == job.policy


def test_one_worker_keeps_the_order_and_takes_the_next_job_after_the_last_result(make: Make) -> None:
    events: list[str] = []

    def jobs() -> Iterator[Job]:
        for job in some_jobs(count=3):
            events.append(f"taken {job.number}")
            yield job

    for job, *_ in make(1).run(jobs()):
        events.append(f"consumed {job.number}")
    assert events == [f"{word} {i}" for i in range(3) for word in ("taken", "consumed")]


def test_as_many_are_in_flight_as_there_are_workers(make: Make) -> None:
    runner = make()
    taken = consumed = 0

    def jobs() -> Iterator[Job]:
        nonlocal taken
        for job in some_jobs():
            taken += 1
            assert taken - consumed <= runner.workers
            yield job

    for _ in runner.run(jobs()):
        consumed += 1
    assert taken == consumed == 6


def test_told_to_wait_it_asks_again_after_the_next_result(make: Make) -> None:
    """Of two jobs the second may be taken only when the first is done."""
    first, second = some_jobs(count=2)
    done: list[int] = []

    def jobs() -> Iterator[Job | None]:
        yield first
        while not done:
            yield None
        yield second

    for result in make().run(jobs()):
        done.append(result.job.number)
    assert done == [0, 1]


def test_waiting_with_nothing_in_flight_ends(make: Make) -> None:
    assert list(make().run(iter([None]))) == []


def test_nothing_runs_before_a_result_is_wanted(make: Make, tmp_path: Path) -> None:
    make().run(some_jobs(tmp_path))
    time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_data_and_the_rest_goes_on(make: Make, tmp_path: Path) -> None:
    told(tmp_path, 1, "raise")
    found = {job.number: e for job, e, _ in make().run(some_jobs(tmp_path)) if e is not None}
    assert [found[i].status for i in range(6)] == ["ok", "failed", *["ok"] * 4]
    assert "made to fail" in found[1].error
    assert "Traceback" in found[1].error


def test_artifact_is_kept_where_the_job_says(make: Make, tmp_path: Path) -> None:
    for job, evaluation, _ in make().run(some_jobs(tmp_path, 3)):
        assert evaluation is not None
        assert evaluation.measurement is not None
        assert job.keep is not None
        assert job.keep.stat().st_size == evaluation.measurement.bytes


def test_steps_of_a_training_are_heard(make: Make) -> None:
    policy = make_space().with_recovery(next(iter(make_space().baselines())), {}, 3)
    heard: list[tuple[int, int, int]] = []
    list(make().run([Job(policy, 1, number=7)], lambda job, step, total: heard.append((job.number, step, total))))
    assert heard
    assert {(number, total) for number, _, total in heard} == {(7, 6)}
    assert [step for _, step, _ in heard] == sorted({step for _, step, _ in heard})


def test_no_jobs_give_no_results(make: Make) -> None:
    assert list(make().run(iter(()))) == []


def test_a_runner_runs_again_after_it_ended(make: Make) -> None:
    runner = make()
    assert len(list(runner.run(some_jobs()))) == 6
    assert len(list(runner.run(some_jobs(count=2)))) == 2


def test_ended_early_nothing_of_it_comes_later(make: Make, tmp_path: Path) -> None:
    told(tmp_path, 1, "sleep=0.3")
    runner = make()
    results = runner.run(some_jobs(tmp_path))
    next(results)
    results.close()
    again = [Job(job.policy, 0, number=100 + job.number) for job in some_jobs(count=3)]
    assert sorted(result.job.number for result in runner.run(again)) == [100, 101, 102]


def test_lost_worker_is_data_and_the_rest_goes_on(make: Make, tmp_path: Path) -> None:
    runner = make()
    if not runner.isolated:
        pytest.skip("its worker is this process")
    told(tmp_path, 1, "die")
    told(tmp_path, 4, "die")
    found = list(runner.run(some_jobs(tmp_path)))
    assert sorted(job.number for job, e, _ in found if e is None) == [1, 4]
    assert sorted(job.number for job, e, _ in found if e is not None) == [0, 2, 3, 5]


def test_job_of_a_lost_worker_may_be_run_again_at_once(make: Make, tmp_path: Path) -> None:
    runner = make()
    if not runner.isolated:
        pytest.skip("its worker is this process")
    told(tmp_path, 0, "die-once")
    waiting = some_jobs(tmp_path, 3)
    running = len(waiting)

    def jobs() -> Iterator[Job | None]:
        while running:
            yield waiting.pop(0) if waiting else None

    found = []
    for job, evaluation, _ in runner.run(jobs()):
        found.append((job.number, evaluation is None))
        if evaluation is None:
            waiting.append(job)
        else:
            running -= 1
    assert sorted(found) == [(0, False), (0, True), (1, False), (2, False)]


def test_worker_that_cannot_start_says_why(make: Make) -> None:
    with pytest.raises(AutocompressError, match="no such data"):
        list(make(2, broken_worker).run(some_jobs()))


def test_local_runner_dies_with_its_process() -> None:
    with pytest.raises(Killed):
        list(LocalRunner(FakeEvaluator(kill_at=0).run).run(some_jobs()))


@pytest.mark.slow
def test_job_that_takes_too_long_is_lost_with_a_reason_and_the_others_are_not(tmp_path: Path) -> None:
    jobs = some_jobs(tmp_path, 4)
    told(tmp_path, 1, "sleep=3600")
    runner = ProcessRunner(fake_worker, 2, limit=3.0)
    try:
        found = {result.job.number: result for result in runner.run(jobs)}
    finally:
        runner.close()
    assert set(found) == {0, 1, 2, 3}
    assert found[1].evaluation is None
    assert found[1].reason == "stopped after 3 s, its --trial-timeout"
    assert all(found[i].evaluation is not None and not found[i].reason for i in (0, 2, 3))
