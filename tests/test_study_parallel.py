"""Several trials in flight: what is told, once, in which order, and what a killed driver leaves behind."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fakes import TINY_SPACE_TEXT, Killed, Row, ScriptedRunner, World

from autocompress.evaluate import Job
from autocompress.journal import FILE, Journal
from autocompress.rungs import at_epochs
from autocompress.runners.base import Result
from autocompress.study import MakeRunner, Study


class Crew:
    """Makes scripted runners, and remembers them."""

    def __init__(self, workers: int, seed: int = 0, **given: Any) -> None:
        self.workers, self.seed, self.given = workers, seed, given
        self.runners: list[ScriptedRunner] = []

    def make(self) -> MakeRunner:
        def made(evaluator: Any, setup: Any) -> ScriptedRunner:
            del setup
            self.runners.append(ScriptedRunner(evaluator.run, self.workers, random.Random(self.seed), **self.given))
            return self.runners[-1]

        return made  # type: ignore[return-value]


def told(folder: Path) -> list[int]:
    with Journal.reading(folder) as journal:
        return [trial.number for trial in journal.told()]


def attempts(folder: Path) -> dict[int, int]:
    database = sqlite3.connect(folder / FILE)
    try:
        return dict(database.execute("SELECT number, attempts FROM trials"))
    finally:
        database.close()


def plain(rows: list[Row]) -> list[Row]:
    return [{**row, "artifact": "", "test": ""} for row in rows]


@pytest.mark.parametrize("name", ["random", "tpe", "nsga2", "solver"])
def test_as_many_as_wanted_are_in_flight_and_each_is_told_once(world: World, name: str) -> None:
    crew = Crew(5)
    found = world.search(controller=name, epochs=2, trials=30, make_runner=crew.make())
    (runner,) = crew.runners
    assert runner.most == 5
    assert runner.closed
    assert runner.ended != sorted(runner.ended)
    assert Counter(told(world.run)) == Counter(range(len(found.trials)))
    assert [t.number for t in found.trials] == list(range(len(found.trials)))
    shots = [t for t in found.trials if not t.evaluation.rung and t.evaluation.copy_of is None]
    assert sum(t.evaluation.status != "infeasible" for t in shots) == 30
    assert len(world.calls) == found.evaluations == len(runner.ended)


def test_one_worker_writes_the_same_journal_wherever_it_is(world: World, tmp_path: Path) -> None:
    world.search(epochs=2, trials=30, controller="solver")
    world.search(epochs=2, trials=30, controller="solver", make_runner=Crew(1).make(), folder=tmp_path / "other")
    assert world.rows() == world.rows(tmp_path / "other")


def test_policy_in_flight_is_not_run_beside_itself(world: World) -> None:
    world.space.write_text(TINY_SPACE_TEXT)
    found = world.search(trials=7, epochs=0, make_runner=Crew(4).make())
    keys = [policy.key() for policy, _, _ in world.calls]
    assert len(keys) == len(set(keys)) == 7
    originals = {t.number: t for t in found.trials}
    copies = [t for t in found.trials if t.evaluation.copy_of is not None]
    assert copies
    for copy in copies:
        assert originals[copy.evaluation.copy_of or 0].measured == copy.measured


def test_members_climb_only_when_trained_and_all_who_may_do(world: World) -> None:
    found = world.search(trials=60, epochs=4, make_runner=Crew(3).make())
    order = told(world.run)
    by_number = {t.number: t.evaluation for t in found.trials}
    done: set[str] = set()
    for number in order:
        evaluation = by_number[number]
        if evaluation.rung > 1:
            below = at_epochs(evaluation.policy, evaluation.policy.recovery.epochs // 2)
            assert below.key() in done
        done.add(evaluation.policy.key())
    counts = Counter(e.rung for e in by_number.values())
    assert (counts[1], counts[2], counts[3]) == (6, 3, 2)


def test_promotion_of_what_was_screened_runs_beside_itself_too(world: World) -> None:
    world.task.screens = True
    crew = Crew(4)
    found = world.search(trials=30, epochs=1, make_runner=crew.make())
    promoted = [t for t in found.trials if not t.evaluation.rung and not t.evaluation.screened]
    assert sum(t.evaluation.status == "ok" for t in promoted) >= 6
    assert found.picked is not None
    assert not found.picked.evaluation.screened


def test_stop_ends_after_all_trials_in_flight(world: World) -> None:
    running: list[Study] = []
    crew = Crew(4, lost=lambda job: job.number == 9 and running[0].stop())  # type: ignore[func-returns-value]
    found = world.search(started=running.append, make_runner=crew.make())
    assert set(crew.runners[0].ended) == {t.number for t in found.trials if t.evaluation.status != "infeasible"}
    assert found.evaluations < 20
    assert {t.evaluation.rung for t in found.trials} == {0}


# --- lost workers ---


def test_trial_of_a_lost_worker_runs_once_more(world: World) -> None:
    lost: list[int] = []

    def first_time(job: Job) -> bool:
        if job.number in (3, 8, 21) and job.number not in lost:
            lost.append(job.number)
            return True
        return False

    found = world.search(make_runner=Crew(3, lost=first_time).make())
    assert sorted(lost) == [3, 8, 21]
    assert {n: a for n, a in attempts(world.run).items() if a != 1} == {3: 2, 8: 2, 21: 2}
    by_number = {t.number: t.evaluation.status for t in found.trials}
    assert [by_number[n] for n in lost] == ["ok"] * 3
    assert Counter(told(world.run)) == Counter(range(len(found.trials)))


def test_trial_that_takes_two_workers_down_has_failed(world: World) -> None:
    victim: list[int] = []

    def sixth(job: Job) -> bool:
        if not victim and len(world.calls) == 5:
            victim.append(job.number)
        return job.number in victim

    found = world.search(make_runner=Crew(3, lost=sixth).make())
    evaluation = next(t.evaluation for t in found.trials if t.number == victim[0])
    assert evaluation.status == "failed"
    assert "its process ended 2 times" in evaluation.error
    assert found.evaluations >= 20


# --- in order ---


@pytest.mark.parametrize(
    "name", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("random", "tpe", "nsga2")), "solver"]
)
def test_in_order_the_search_depends_on_neither_speed_nor_number_of_workers(
    world: World, tmp_path: Path, name: str
) -> None:
    given: dict[str, Any] = {"controller": name, "deterministic": 4, "trials": 24, "epochs": 2}
    world.search(**given)
    for i, workers in enumerate((2, 4, 7)):
        crew = Crew(workers, seed=i)
        world.search(**given, make_runner=crew.make(), folder=tmp_path / str(workers))
        assert crew.runners[0].most == min(workers, 4)
        assert plain(world.rows(tmp_path / str(workers))) == plain(world.rows())


# --- killed drivers ---


def killed(world: World, at: int, crew: Crew, **given: Any) -> list[int]:
    """A part of a run whose driver dies at the end of its `at`-th evaluation; the trials that it had finished."""
    world.kill_at = at
    with pytest.raises(Killed):
        world.search(make_runner=crew.make(), **given)
    world.kill_at = None
    return told(world.run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deterministic", "name"), [(0, "solver"), (4, "solver"), (4, "tpe"), (4, "nsga2"), (4, "random")]
)
def test_driver_killed_again_and_again_finishes_each_trial_once(
    world: World, tmp_path: Path, deterministic: int, name: str
) -> None:
    given: dict[str, Any] = {"controller": name, "deterministic": deterministic, "trials": 24, "epochs": 2}
    world.search(**given, make_runner=Crew(3).make(), folder=tmp_path / "whole")
    finished: list[int] = []
    for i, at in enumerate((4, 7, 1, 6, 2)):
        before = finished
        finished = killed(world, at, Crew(3, seed=i), resume=i > 0, **given)
        assert finished[: len(before)] == before
    found = world.search(resume=True, make_runner=Crew(3).make(), **given)
    assert told(world.run)[: len(finished)] == finished
    assert Counter(told(world.run)) == Counter(range(len(found.trials)))
    assert max(attempts(world.run).values()) == 1  # no trial took its process down
    if deterministic:
        assert plain(world.rows()) == plain(world.rows(tmp_path / "whole"))
    assert Counter(t.evaluation.rung for t in found.trials)[1] == 2


def test_results_that_wait_for_their_turn_are_not_measured_again(world: World) -> None:
    given: dict[str, Any] = {"deterministic": 8, "trials": 24, "epochs": 0}
    done = killed(world, 5, Crew(8), **given)
    measured = {policy.key() for policy, _, _ in world.calls[:5]}
    assert len(done) < 5
    world.evaluators.clear()
    world.search(resume=True, make_runner=Crew(8).make(), **given)
    assert not measured & {policy.key() for policy, _, _ in world.calls}


def test_trial_that_is_given_up_says_why_its_worker_was_stopped(world: World) -> None:
    class Late(ScriptedRunner):
        def _end(self) -> Result:
            job, evaluation, _ = super()._end()
            return Result(job, evaluation, "" if evaluation else "stopped after 3 s, its --trial-timeout")

    def made(evaluator: Any, setup: Any) -> Late:
        del setup
        return Late(evaluator.run, 2, random.Random(0), lost=lambda job: job.number == 4)

    world.search(make_runner=made)  # type: ignore[arg-type]
    evaluation = world.trials()[4].evaluation
    assert evaluation.error == "its process ended 2 times while it ran: stopped after 3 s, its --trial-timeout"
