"""What every runner promises: evaluations in order, taken lazily, with failures as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import FakeEvaluator, Killed, make_space

from autocompress.evaluate import Evaluate, Job
from autocompress.runners.local import LocalRunner, Runner

RUNNERS: dict[str, Callable[[Evaluate], Runner]] = {"local": LocalRunner}


@pytest.fixture(params=list(RUNNERS))
def make(request: pytest.FixtureRequest) -> Callable[[Evaluate], Runner]:
    return RUNNERS[request.param]


def some_jobs() -> list[Job]:
    return [Job(policy, i % 2) for i, policy in enumerate(make_space().baselines())]


def test_evaluations_come_in_the_order_of_the_jobs(make: Callable[[Evaluate], Runner]) -> None:
    jobs = some_jobs()
    found = list(make(FakeEvaluator().run).run(jobs))
    assert [(e.policy, e.rung) for e in found] == [(policy, rung) for policy, rung, *_ in jobs]


def test_next_job_is_taken_after_the_last_evaluation_was_consumed(make: Callable[[Evaluate], Runner]) -> None:
    events: list[str] = []

    def jobs() -> Iterator[Job]:
        for i, job in enumerate(some_jobs()[:3]):
            events.append(f"taken {i}")
            yield job

    for i, _ in enumerate(make(FakeEvaluator().run).run(jobs())):
        events.append(f"consumed {i}")
    assert events == [f"{word} {i}" for i in range(3) for word in ("taken", "consumed")]


def test_nothing_runs_before_an_evaluation_is_wanted(make: Callable[[Evaluate], Runner]) -> None:
    evaluator = FakeEvaluator()
    make(evaluator.run).run(some_jobs())
    assert evaluator.calls == []


def test_a_failure_is_data_and_the_rest_goes_on(make: Callable[[Evaluate], Runner]) -> None:
    jobs = some_jobs()
    evaluator = FakeEvaluator(fault=lambda policy, _: "raise" if policy == jobs[1][0] else None)
    found = list(make(evaluator.run).run(jobs))
    assert [e.status for e in found] == ["ok", "failed", *["ok"] * (len(jobs) - 2)]
    assert "made to fail" in found[1].error


def test_artifact_is_kept_where_the_job_says(make: Callable[[Evaluate], Runner], tmp_path: Path) -> None:
    policy, path = some_jobs()[0][0], tmp_path / "artifacts" / "trial-0.acz"
    (found,) = make(FakeEvaluator().run).run([Job(policy, 1, path)])
    assert found.measurement is not None
    assert path.stat().st_size == found.measurement.bytes


def test_no_jobs_give_no_evaluations(make: Callable[[Evaluate], Runner]) -> None:
    assert list(make(FakeEvaluator().run).run(iter(()))) == []


def test_local_runner_dies_with_its_process() -> None:
    with pytest.raises(Killed):
        list(LocalRunner(FakeEvaluator(kill_at=0)).run(some_jobs()))
