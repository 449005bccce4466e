"""The search loop on the fake network: what is evaluated, what is resumed, and which files the front leaves."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fakes import DENSE_MS, TINY_SPACE_TEXT, FakeEvaluator, FakeTask, Killed, Row, World, make_graph

from autocompress import rungs, study
from autocompress.engine.precision import Precision
from autocompress.errors import AutocompressError, NothingFits, RunError
from autocompress.front import feasible, front_of
from autocompress.journal import FILE, Journal
from autocompress.lessons import read_lessons
from autocompress.policy import Policy
from autocompress.study import Outcome, Progress, Settings, Study, search
from autocompress.trial import Measurement


def some_fail(policy: Policy, rung: int) -> str | None:
    draw = hashlib.sha256(f"{policy.key()}{rung}".encode()).digest()[0]
    return "raise" if draw % 8 == 0 else "nan" if draw % 8 == 1 else None


def sgd_fails(policy: Policy, rung: int) -> str | None:
    return "nan" if rung and policy.recovery.optimizer == "sgd" else None


# --- counting ---


def test_as_many_trials_are_evaluated_as_were_asked_for(world: World) -> None:
    found = world.search(epochs=0)
    assert len(world.calls) == found.evaluations == 20
    assert sum(t.evaluation.status == "ok" and t.evaluation.copy_of is None for t in found.trials) == 20


def test_failures_count_and_are_kept_with_their_reason(world: World) -> None:
    world.fault = some_fail
    found = world.search(epochs=0)
    failed = [t.evaluation for t in found.trials if t.evaluation.status == "failed"]
    assert failed
    assert len(world.calls) == found.evaluations == 20
    assert all("made to fail" in e.error or "accuracy is nan" in e.error for e in failed)


def test_over_budget_is_never_evaluated(world: World) -> None:
    found = world.search()
    refused = [t for t in found.trials if t.evaluation.status == "infeasible"]
    assert refused
    assert all(t.measured.bytes > 1500 for t in refused)
    evaluator = world.evaluators[0]
    assert all(evaluator.predict(policy).bytes <= 1500 for policy, _, _ in world.calls)


def bounded_loosely(patch: pytest.MonkeyPatch) -> None:
    """Make the arithmetic bound of every policy a megabyte more than what it takes."""
    exact = FakeEvaluator.predict

    def bound(evaluator: FakeEvaluator, policy: Policy) -> Measurement:
        known = exact(evaluator, policy)
        return replace(known, bytes=known.bytes + 10**6)

    patch.setattr(FakeEvaluator, "bound", bound)


def test_bound_over_the_budget_refuses_nothing_that_fits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bounded_loosely(monkeypatch)
    found = world.search(epochs=0, trials=1)
    assert [t.evaluation.status for t in found.trials] == ["ok"]
    assert found.picked is not None


def test_candidate_whose_size_cannot_be_found_is_a_failed_trial(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bounded_loosely(monkeypatch)
    exact, seen = FakeEvaluator.predict, []

    def predict(evaluator: FakeEvaluator, policy: Policy) -> Measurement:
        seen.append(policy)
        if len(seen) > 1:  # the first is asked for before the search begins
            raise ValueError("no codes")
        return exact(evaluator, policy)

    monkeypatch.setattr(FakeEvaluator, "predict", predict)
    found = world.search(epochs=0, trials=1)
    assert [t.evaluation.status for t in found.trials] == ["failed"]
    assert "no codes" in found.trials[0].evaluation.error


def test_no_policy_is_measured_twice(world: World) -> None:
    world.space.write_text(TINY_SPACE_TEXT)
    found = world.search(trials=7)
    keys = [policy.key() for policy, _, _ in world.calls]
    assert len(keys) == len(set(keys))
    copies = [t for t in found.trials if t.evaluation.copy_of is not None]
    assert copies
    for copy in copies:
        original = found.trials[copy.evaluation.copy_of or 0]
        assert original.evaluation.copy_of is None
        assert original.evaluation.policy == copy.evaluation.policy
        assert original.measured == copy.measured


def test_exhausted_space_ends_with_a_warning(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "PATIENCE", 60)
    world.space.write_text(TINY_SPACE_TEXT)
    found = world.search(trials=50, epochs=0)
    assert found.evaluations == 8
    assert any("exhausted after 8 evaluations" in text for text in found.warnings)


def test_all_failed_run_ends_without_a_pick(world: World) -> None:
    world.fault = lambda *_: "nan"
    found = world.search()
    assert (found.picked, found.front, found.evaluations) == (None, (), 20)
    assert world.task.count("test") == 0


def test_metric_to_minimise_is_minimised(world: World) -> None:
    world.task = FakeTask(direction="min")
    found = world.search(controller="tpe")
    assert found.picked is not None
    assert found.picked.measured.quality == min(t.measured.quality for t in found.front)
    ordered = [t.measured.quality for t in found.front]
    assert ordered == sorted(ordered, reverse=True)  # larger files are better


# --- ending early ---


def test_timeout_ends_the_search(world: World) -> None:
    found = world.search(timeout=1e-9)
    assert found.evaluations == 0
    assert (world.run / FILE).is_file()


def test_timeout_leaves_half_to_recovery_and_is_not_passed_by_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(study.time, "monotonic", lambda: clock[0])

    def slow(policy: Policy, rung: int) -> None:
        del policy
        clock[0] += 1.0 if rung == 0 else 4.0

    world.fault = slow
    found = world.search(trials=1000, timeout=20)
    rungs = [rung for _, rung, _ in world.calls]
    assert rungs.count(0) == 10
    assert 1 <= rungs.count(1) <= 3
    assert found.front


def test_stop_ends_after_the_trial_in_flight_and_writes_the_front(world: World) -> None:
    running: list[Study] = []

    def stop_at_five(policy: Policy, rung: int) -> None:
        del policy, rung
        if len(world.calls) == 4:  # the fifth is in flight
            running[0].stop()

    world.fault = stop_at_five
    found = world.search(started=running.append)
    assert found.evaluations == len(world.calls) == 5
    assert {rung for _, rung, _ in world.calls} == {0}
    assert found.front
    assert all((world.run / t.artifact).is_file() for t in found.front)


@pytest.mark.parametrize("calls", [4, 20], ids=["one-shot", "recovery"])
def test_stopped_run_continues_to_the_same_end(world: World, tmp_path: Path, calls: int) -> None:
    world.search(folder=tmp_path / "whole")
    world.evaluators.clear()
    running: list[Study] = []

    def stop(policy: Policy, rung: int) -> None:
        del policy, rung
        if len(world.calls) == calls:
            running[0].stop()

    world.fault = stop
    world.search(started=running.append)
    assert len(world.calls) == calls + 1
    world.search(resume=True)
    plain = [{**row, "artifact": "", "test": ""} for row in world.rows()]
    assert plain == [{**row, "artifact": "", "test": ""} for row in world.rows(tmp_path / "whole")]


# --- recovery ---


def parents_of(found: Outcome) -> list[str]:
    return [t.evaluation.policy.without_recovery().key() for t in found.trials if t.evaluation.rung == 1]


def neighbours_of_none(patch: pytest.MonkeyPatch) -> None:
    """Only members of the front are trained."""
    patch.setattr(rungs, "STAYS", 1.0)


def test_recovery_trains_front_members_from_the_budget_down_and_spread(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    neighbours_of_none(monkeypatch)
    found = world.search(trials=60, epochs=3)
    shots = [t for t in found.trials if t.evaluation.rung == 0]
    front = front_of(feasible(shots, found.budget), "max")
    sizes = {t.evaluation.policy.key(): t.measured.bytes for t in front}
    room = [t for t in front if t.measured.bytes <= (1 - rungs.TRAINING_ROOM) * 1500]
    parents = parents_of(found)
    assert len(parents) == min(6, len(room))
    assert [sizes[key] for key in parents[:2]] == [room[-1].measured.bytes, room[0].measured.bytes]
    trained = sorted(math.log(sizes[key]) for key in parents)
    span = trained[-1] - trained[0]
    assert max(b - a for a, b in pairwise(trained)) < 0.6 * span


def test_proposals_leave_room_where_training_follows_that_can_make_files_longer(world: World) -> None:
    def largest(epochs: int) -> int:
        found = world.search(folder=world.run / str(epochs), trials=60, epochs=epochs)
        return max(t.measured.bytes for t in found.trials if not t.evaluation.rung and t.evaluation.status == "ok")

    assert largest(epochs=1) <= (1 - rungs.TRAINING_ROOM) * 1500 < largest(epochs=0) <= 1500


def test_half_of_each_rung_climbs_with_the_same_recipe_and_more_epochs(world: World) -> None:
    found = world.search(trials=60, epochs=4)
    by_rung = {r: [t.evaluation.policy for t in found.trials if t.evaluation.rung == r] for r in (1, 2, 3)}
    assert [len(by_rung[r]) for r in (1, 2, 3)] == [6, 3, 2]
    assert [{p.recovery.epochs for p in by_rung[r]} for r in (1, 2, 3)] == [{1}, {2}, {4}]
    for below, above in pairwise((1, 2, 3)):
        assert {rungs.at_epochs(p, 1).key() for p in by_rung[above]} < {
            rungs.at_epochs(p, 1).key() for p in by_rung[below]
        }
    assert max(t.evaluation.rung for t in found.trials) == 3


def test_near_front_policies_are_trained_too_within_the_budget_and_with_room(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("STAYS", 0.0), ("NEAR_SIZE", 0.2), ("NEAR_LOSS", 1.6)):
        monkeypatch.setattr(rungs, name, value)
    found = world.search(trials=80, epochs=1)
    shots = [t for t in found.trials if t.evaluation.rung == 0]
    front = front_of(feasible(shots, found.budget), "max")
    by_key = {t.evaluation.policy.key(): t for t in feasible(shots, found.budget)}
    off = [by_key[key] for key in parents_of(found) if key not in {t.evaluation.policy.key() for t in front}]
    assert off
    for t in off:
        near = [m for m in front if abs(t.measured.bytes / m.measured.bytes - 1) <= 0.2]
        assert any(t.measured.loss <= 1.6 * m.measured.loss for m in near)
        assert t.measured.bytes <= (1 - rungs.TRAINING_ROOM) * 1500


def test_number_of_first_trainings_can_be_given_and_raised(world: World) -> None:
    first = world.search(trials=60, recoveries=2, epochs=2)
    assert [sum(t.evaluation.rung == r for t in first.trials) for r in (1, 2)] == [2, 1]
    later = world.search(trials=60, recoveries=4, epochs=2, resume=True)
    assert [sum(t.evaluation.rung == r for t in later.trials) for r in (1, 2)] == [4, 2]
    known = [t.evaluation for t in first.trials]
    assert [t.evaluation for t in later.trials[: len(known)]] == known


def test_recovery_says_what_it_plans_and_how_long_it_takes(world: World) -> None:
    seen: list[Progress] = []
    world.search(trials=60, epochs=2, watch=seen.append)
    notes = [p.note for p in seen if p.note]
    assert len(notes) == 1
    assert notes[0].startswith("recovery: 6 trainings of 1 epoch, then 3 of 2: about ")
    recovering = [p for p in seen if p.stage == "recovering"]
    assert seen[seen.index(recovering[0])].note == notes[0]  # before the first training
    assert (recovering[0].done, recovering[0].total) == (0, 9)
    assert (recovering[-1].done, recovering[-1].total) == (9, 9)


def test_no_training_starts_that_the_time_left_does_not_hold(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(study.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(study.time, "perf_counter", lambda: clock[0])
    build = FakeEvaluator.build

    def slow(evaluator: FakeEvaluator, policy: Policy, progress: Any = None) -> Any:
        def follow(step: int, total: int) -> None:
            clock[0] += 2.0  # two steps make an epoch of 4 s
            if progress is not None:
                progress(step, total)

        clock[0] += 0.1
        return build(evaluator, policy, follow)

    monkeypatch.setattr(FakeEvaluator, "build", slow)
    found = world.search(trials=60, epochs=2, timeout=40.0)
    trained = [t.evaluation for t in found.trials if t.evaluation.rung]
    # 30 s are left: 3 x 4 s, then 2 x 8 s; a fourth member could not climb to the end
    assert [sum(e.rung == r for e in trained) for r in (1, 2)] == [3, 2]


def test_task_without_training_data_is_one_shot_and_says_so_once(world: World) -> None:
    make = world.make

    def without(*given: Any, **named: Any) -> FakeEvaluator:
        evaluator = make(*given, **named)
        evaluator.bench.trainable, evaluator.bench.untrainable = False, "its batches('train') are empty"
        return evaluator

    world.make = without  # type: ignore[method-assign]
    found = world.search()
    again = world.search(resume=True)
    assert {t.evaluation.rung for t in found.trials} == {0}
    assert sum("one-shot only: the task has nothing to train on, its batches" in text for text in again.warnings) == 1


def test_training_goes_on_in_the_arithmetic_that_the_run_began_with(world: World) -> None:
    make, offered = world.make, [Precision(autocast=True), Precision(channels_last=True)]

    def machine(*given: Any, **named: Any) -> FakeEvaluator:
        evaluator = make(*given, **named)
        evaluator.bench.precision = offered.pop(0)
        return evaluator

    world.make = machine  # type: ignore[method-assign]
    world.search(trials=20)
    world.search(trials=40, resume=True)
    assert [e.bench.precision for e in world.evaluators] == [Precision(autocast=True)] * 2


def test_interrupted_training_keeps_its_last_epoch_in_the_run_folder_until_it_is_done(world: World) -> None:
    found = world.search(epochs=1)
    given = [c for e in world.evaluators for _, c in e.trained_with if c is not None]
    trained = [t.evaluation.policy.key() for t in found.trials if t.evaluation.rung]
    assert given == [world.run / "checkpoints" / f"{key}.safetensors" for key in trained]


def test_nothing_of_an_interrupted_training_is_left_in_the_end(world: World) -> None:
    world.killed(21)
    (world.run / "checkpoints").mkdir(exist_ok=True)
    (world.run / "checkpoints" / "0123456789abcdef.safetensors").write_bytes(b"x")
    world.search(resume=True)
    assert not (world.run / "checkpoints").exists()


@pytest.mark.slow
def test_diverged_training_narrows_the_learning_rates_of_later_ones(world: World) -> None:
    world.fault = lambda policy, rung: "nan" if rung == 1 and policy.recovery.lr > 0.012 else None
    found = world.search(trials=120)
    rates = [(t.evaluation.policy.recovery.lr, t.evaluation.status) for t in found.trials if t.evaluation.rung == 1]
    lowest = math.inf
    for rate, status in rates:
        assert rate <= lowest / 2
        lowest = min(lowest, rate) if status == "failed" else lowest
    assert any(status == "ok" for _, status in rates)
    assert any(status == "failed" for _, status in rates)


# --- what earlier runs learned ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "recovery"


@pytest.mark.slow
def test_later_run_of_the_same_model_starts_from_what_the_first_learned(
    world: World, cache: Path, tmp_path: Path
) -> None:
    first = world.search(trials=60, fresh=False)
    (file,) = cache.iterdir()
    kept = read_lessons(file)
    assert len(kept) == sum(t.evaluation.rung == 1 for t in first.trials) == 6
    world.search(trials=60, fresh=False, folder=tmp_path / "second")
    world.search(trials=60, fresh=True, folder=tmp_path / "fresh")
    recipes = [
        [t.evaluation.policy.recovery for t in world.trials(folder) if t.evaluation.rung]
        for folder in (world.run, tmp_path / "second", tmp_path / "fresh")
    ]
    assert recipes[0] == recipes[2]
    again = set(recipes[1]) & set(recipes[0])
    assert len(again) < 3  # known recipes need not be tried again, but the best for a size may be
    assert 6 < len(read_lessons(file)) <= 12  # the same training again teaches nothing new


def test_other_models_learn_nothing_from_it(world: World, cache: Path, tmp_path: Path) -> None:
    first = world.search(fresh=False)
    world.task = FakeTask(weights=0.25)
    other = world.search(fresh=False, folder=tmp_path / "other")
    assert len(list(cache.iterdir())) == 2
    assert [t.evaluation.policy for t in first.trials] == [t.evaluation.policy for t in other.trials]


@pytest.mark.parametrize("text", ["", "{", "{}", "[1, null, {}]", '[{"recovery": {"lr": -1}, "share": 1, "gain": 0}]'])
def test_unreadable_lessons_are_ignored(world: World, cache: Path, tmp_path: Path, text: str) -> None:
    first = world.search(fresh=False)
    (file,) = cache.iterdir()
    file.write_text(text)
    again = world.search(fresh=False, folder=tmp_path / "again")
    assert [t.evaluation.policy for t in first.trials] == [t.evaluation.policy for t in again.trials]
    assert len(read_lessons(file)) == 2


@pytest.mark.slow
def test_resumed_run_keeps_to_what_was_known_when_it_began(world: World, cache: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"fresh": False, "trials": 60, "epochs": 2}
    world.search(folder=tmp_path / "whole", **given)
    for file in cache.iterdir():
        file.unlink()
    world.killed(63, **given)
    world.search(folder=tmp_path / "between", **given)  # teaches the cache something meanwhile
    assert list(cache.iterdir())
    world.search(resume=True, **given)
    assert world.rows() == world.rows(tmp_path / "whole")


def test_no_parent_is_promoted_twice_even_over_resumes(world: World) -> None:
    world.search()
    for trials in (21, 40, 60):
        found = world.search(resume=True, trials=trials)
    parents = parents_of(found)
    assert len(parents) > 2
    assert len(parents) == len(set(parents))


def test_no_epochs_means_no_recovery(world: World) -> None:
    found = world.search(epochs=0)
    assert {t.evaluation.rung for t in found.trials} == {0}


def test_failed_recovery_is_not_tried_again(world: World) -> None:
    world.fault = lambda _, rung: "nan" if rung == 1 else None
    first = world.search()
    again = world.search(resume=True)
    assert len(first.trials) == len(again.trials)
    assert {t.evaluation.status for t in again.trials if t.evaluation.rung == 1} <= {"failed", "infeasible"}


# --- budgets ---


def test_unreachable_budget_names_the_smallest_and_writes_nothing(world: World) -> None:
    smallest = world.make(world.task, seed=0, dense_ms=None)
    bytes_ = smallest.predict(study.Space(study.load_space(str(world.space)), smallest.graph).smallest()).bytes
    with pytest.raises(NothingFits, match=f"{bytes_:,} bytes"):
        world.search(budgets=(f"{bytes_ - 1}B",))
    assert not world.run.exists()
    found = world.search(budgets=(f"{bytes_}B",), epochs=0, trials=1)
    assert found.picked is not None
    assert found.picked.measured.bytes == bytes_


def test_unreachable_macs_are_refused_too(world: World) -> None:
    with pytest.raises(NothingFits, match="MACs"):
        world.search(budgets=("1macs",))


def test_share_budgets_resolve_against_the_dense_model(world: World) -> None:
    found = world.search(budgets=("size=50%", "latency=60%"), epochs=0)
    assert found.budget.bytes == found.dense.bytes // 2
    assert found.budget.ms == pytest.approx(0.6 * DENSE_MS)


def test_slow_trials_are_not_feasible(world: World) -> None:
    found = world.search(budgets=("1.2ms",))
    slow = [t for t in found.trials if t.evaluation.status == "ok" and t.measured.latency_ms > 1.2]
    assert slow
    assert found.front
    assert all(t.measured.latency_ms <= 1.2 for t in found.front)
    assert not any(t.artifact for t in found.trials if t.number in {s.number for s in slow})


def test_files_that_miss_the_latency_budget_when_timed_alone_are_not_feasible(world: World) -> None:
    world.retimed = 1.2
    found = world.search(budgets=("1.2ms",), trials=40, epochs=0)
    retimed = [t for t in found.trials if not math.isnan(t.final_ms)]
    assert all(t.final_ms == pytest.approx(1.2 * t.evaluation.measurement.latency_ms) for t in retimed)  # type: ignore[union-attr]
    missed = [t for t in retimed if t.final_ms > 1.2]
    assert missed
    assert found.front
    assert not {t.number for t in missed} & {t.number for t in found.front}
    assert all(t.measured.latency_ms == t.final_ms <= 1.2 for t in found.front)
    assert all(math.isnan(t.quality_test) for t in missed)  # `test` is not read for what does not ship
    assert world.trials() == list(found.trials)


def test_a_limit_between_the_quartiles_of_the_last_timing_is_said_to_be_uncertain(world: World) -> None:
    found = world.search(budgets=("1.2ms",), trials=10, epochs=0)
    assert not any("noisy" in text for text in found.warnings)
    slowest = max(t.final_ms for t in found.front)
    again = world.search(budgets=(f"{slowest * 1.005:.6f}ms",), trials=10, epochs=0, folder=world.run.parent / "b")
    assert any("too noisy" in text for text in again.warnings)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"budgets": ("1.2ms",)}, "onnx"),
        ({"budgets": ("latency=60%", "1.5kB")}, "onnx"),
        ({"budgets": ("1.5kB",)}, "packed"),
        ({"budgets": ("1.2ms",), "format": "packed"}, "packed"),
        ({"budgets": ("1.5kB",), "format": "onnx"}, "onnx"),
    ],
)
def test_a_latency_budget_ships_what_the_runtime_takes(world: World, given: dict[str, Any], expected: str) -> None:
    world.search(epochs=0, trials=3, threads=2, batch=4, **given)
    assert world.evaluators[0].format == expected
    assert (world.places[0].threads, world.places[0].batch) == (2, 4)
    assert all(t.artifact.endswith({"onnx": ".onnx", "packed": ".acz"}[expected]) for t in world.trials() if t.artifact)


def test_latency_that_nothing_reaches_gives_an_empty_front(world: World) -> None:
    found = world.search(budgets=("1us",))
    assert (found.picked, found.front) == (None, ())
    assert found.evaluations == 20
    assert list((world.run / "artifacts").iterdir()) == []


# --- the end ---


def test_front_is_on_disk_exactly_and_readable(world: World) -> None:
    found = world.search(trials=40)
    names = {f"artifacts/{path.name}" for path in (world.run / "artifacts").iterdir()}
    assert names == {t.artifact for t in found.front}
    for t in found.front:
        artifact = world.evaluators[0].reload(world.run / t.artifact)
        assert artifact.bytes == (world.run / t.artifact).stat().st_size == t.measured.bytes
        assert artifact.quality == t.measured.quality
        assert artifact.model.policy == t.evaluation.policy


def test_files_of_trials_that_left_the_front_are_removed(world: World) -> None:
    first = world.search(trials=12)
    later = world.search(trials=60, resume=True)
    left = {t.number for t in first.front} - {t.number for t in later.front}
    assert left
    for folder, pattern in (("artifacts", "trial-*.acz"), ("policies", "trial-*.json")):
        numbers = {int(path.stem.removeprefix("trial-")) for path in (world.run / folder).glob(pattern)}
        assert numbers == {t.number for t in later.front}, folder


def test_half_written_file_of_a_killed_process_is_removed(world: World) -> None:
    world.killed(3)
    (world.run / "artifacts" / ".trial-2.acz.x1y2z3").write_bytes(b"ACZ1")
    found = world.search(resume=True)
    assert {path.name for path in (world.run / "artifacts").iterdir()} == {Path(t.artifact).name for t in found.front}


def test_row_of_a_removed_file_does_not_name_it(world: World) -> None:
    world.search(trials=12)
    later = world.search(trials=60, resume=True)
    assert {t.number for t in world.trials() if t.artifact} == {t.number for t in later.front}


def test_policies_of_the_front_are_written_as_json(world: World) -> None:
    for t in world.search().front:
        text = (world.run / "policies" / f"trial-{t.number}.json").read_text()
        assert Policy.from_json(json.loads(text)) == t.evaluation.policy


def test_lost_artifact_is_written_again(world: World) -> None:
    first = world.search()
    lost = world.run / first.front[0].artifact
    content = lost.read_bytes()
    lost.unlink()
    world.search(resume=True)
    assert lost.read_bytes() == content


def test_test_split_is_read_once_per_front_member_and_only_then(world: World) -> None:
    seen: list[tuple[str, int]] = []

    def watch(progress: Progress) -> None:
        seen.append((progress.stage, world.task.count("test")))

    found = world.search(watch=watch)
    assert all(count == 0 for stage, count in seen if stage in ("searching", "recovering"))
    tested = sorted(key for split, key in world.task.scored if split == "test")
    assert tested == sorted(t.evaluation.policy.key() for t in found.front)
    assert all(t.quality_test == pytest.approx(t.measured.quality - 0.01) for t in found.front)
    world.search(resume=True)
    assert world.task.count("test") == len(found.front)


def test_difference_between_trial_and_file_is_a_warning(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FakeTask.quality_of
    found: list[int] = []

    def drifts(self: FakeTask, policy: Policy) -> float:
        return whole(self, policy) + (0.001 if found else 0.0)

    def watch(progress: Progress) -> None:
        if progress.stage == "writing":
            found.append(1)

    monkeypatch.setattr(FakeTask, "quality_of", drifts)
    assert any("changed during the run" in text for text in world.search(watch=watch).warnings)


def test_progress_counts_up_to_its_total(world: World) -> None:
    seen: list[Progress] = []
    world.search(watch=seen.append)
    stages = list(dict.fromkeys(p.stage for p in seen))
    assert stages == ["searching", "recovering", "writing", "done"]
    for stage in stages:
        mine = [p.done for p in seen if p.stage == stage]
        assert mine == sorted(mine)
    assert [(p.done, p.total) for p in seen if p.stage == "searching"][-1] == (20, 20)
    assert seen[-1].best is not None


# --- resume ---


TRIALS = {"tpe": 24, "nsga2": 36, "random": 24}  # NSGA-II breeds only after a first generation of 20
WHOLE: dict[str, list[Row]] = {}
"""Rows of uninterrupted runs by controller."""


@pytest.mark.slow
@pytest.mark.parametrize("cut", [60, 62, 65, 67, 68, 70])
def test_run_resumed_between_the_rungs_equals_an_uninterrupted_one(world: World, tmp_path: Path, cut: int) -> None:
    """Six start, three and two climb; failures among them."""
    world.fault, given = sgd_fails, {"trials": 60, "epochs": 4}
    whole = world.search(folder=tmp_path / "whole", **given)
    assert {t.evaluation.rung for t in whole.trials} == {0, 1, 2, 3}
    assert any(t.evaluation.status == "failed" for t in whole.trials if t.evaluation.rung)
    world.killed(cut, **given)
    world.search(resume=True, **given)
    assert world.rows() == world.rows(tmp_path / "whole")


@pytest.mark.parametrize("name", list(TRIALS))
@pytest.mark.parametrize("share", [0.4, 1.0, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.0, 0.7))])
def test_resumed_run_equals_an_uninterrupted_one(world: World, tmp_path: Path, name: str, share: float) -> None:
    """The run dies after this share of its one-shot trials; 1 is in recovery."""
    world.fault, trials = some_fail, TRIALS[name]
    if name not in WHOLE:
        world.search(folder=tmp_path / "whole", controller=name, trials=trials)
        assert len(world.calls) > trials + 1
        WHOLE[name] = world.rows(tmp_path / "whole")
    world.killed(round(share * trials), controller=name, trials=trials)
    world.search(resume=True, controller=name, trials=trials)
    assert world.rows() == WHOLE[name]


def test_run_killed_many_times_equals_an_uninterrupted_one(world: World, tmp_path: Path) -> None:
    world.search(folder=tmp_path / "whole")
    world.killed(3)
    for _ in range(5):
        world.killed(2, resume=True)
    world.search(resume=True)
    assert world.rows() == world.rows(tmp_path / "whole")


@pytest.mark.parametrize("cut", [5, 8, 9])
def test_resumed_run_of_a_tiny_space_equals_an_uninterrupted_one(
    world: World, tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies refer to the original, and an exhausted space is not searched again: 8 one-shot policies are all."""
    monkeypatch.setattr(study, "PATIENCE", 40)
    world.space.write_text(TINY_SPACE_TEXT)
    world.search(folder=tmp_path / "whole", trials=12)
    world.killed(cut, trials=12)
    world.search(resume=True, trials=12)
    assert world.rows() == world.rows(tmp_path / "whole")


def test_finished_run_resumed_changes_nothing(world: World) -> None:
    world.search()
    before, calls = world.rows(), len(world.calls)
    world.search(resume=True)
    assert world.rows() == before
    assert len(world.calls) == calls


def test_more_trials_on_resume_continue(world: World) -> None:
    first = world.search(trials=10, epochs=0)
    later = world.search(trials=25, epochs=0, resume=True)
    assert (first.evaluations, later.evaluations) == (10, 25)
    assert world.rows()[:10] != []
    assert [t.evaluation.policy for t in later.trials[: len(first.trials)]] == [
        t.evaluation.policy for t in first.trials
    ]
    assert json.loads((world.run / "config.json").read_text())["settings"]["trials"] == 25


def test_trial_that_killed_its_process_twice_is_written_off(world: World) -> None:
    victim: list[str] = []

    def deadly(policy: Policy, rung: int) -> str | None:
        del rung
        if len(world.trials()) >= 5 and not victim:
            victim.append(policy.key())
        return "kill" if policy.key() in victim else None

    world.fault = deadly
    for resume in (False, True):
        with pytest.raises(Killed):
            world.search(resume=resume)
    found = world.search(resume=True)
    (lost,) = [t for t in found.trials if t.evaluation.policy.key() in victim]
    assert lost.evaluation.status == "failed"
    assert "its process ended 2 times" in lost.evaluation.error
    assert found.evaluations >= 20
    assert sum(policy.key() in victim for policy, _, _ in world.calls) == 2


def test_recovery_that_killed_its_process_twice_is_written_off(world: World) -> None:
    world.fault = lambda _, rung: "kill" if rung == 1 else None
    for _ in range(2 * 3):
        try:
            found = world.search(resume=world.run.exists())
            break
        except Killed:
            continue
    else:
        pytest.fail("never ended")
    assert {t.evaluation.status for t in found.trials if t.evaluation.rung == 1} == {"failed"}
    assert found.front


def test_run_killed_before_its_journal_was_made_can_be_resumed(world: World) -> None:
    world.killed(0)
    for path in world.run.glob(f"{FILE}*"):
        path.unlink()
    assert world.search(resume=True).evaluations > 0


def test_run_killed_before_its_config_was_written_can_be_started_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(study, "write", die)
        with pytest.raises(Killed):
            world.search()
    assert world.search().evaluations > 0


def test_run_killed_while_its_journal_was_made_can_be_resumed(world: World) -> None:
    world.killed(0)
    for path in world.run.glob(f"{FILE}*"):
        path.unlink()
    (world.run / FILE).touch()  # SQLite had made the file, but no table yet
    assert world.search(resume=True).evaluations > 0


def test_dense_latency_of_the_first_part_is_kept(world: World) -> None:
    first = world.search(trials=5)
    world.make = lambda task, *, seed, dense_ms, **_: FakeEvaluator(  # type: ignore[method-assign]
        task, seed=seed, dense_ms=99.0 if dense_ms is None else dense_ms
    )
    assert world.search(trials=8, resume=True).dense == first.dense


OTHER: dict[str, dict[str, Any]] = {
    "task": {"task": "another"},
    "--budget": {"budgets": ("1.4kB",)},
    "--seed": {"seed": 1},
    "--controller": {"controller": "tpe"},
    "--epochs": {"epochs": 2},
    "--fresh": {"fresh": False},
    "--data": {"data": "/elsewhere"},
    "space": {"space": "default"},
}


@pytest.mark.parametrize("what", list(OTHER))
def test_resume_with_other_settings_is_refused_and_changes_nothing(world: World, what: str) -> None:
    world.search(trials=3)
    before = snapshot(world.run)
    with pytest.raises(RunError, match=what):
        world.search(trials=5, resume=True, **OTHER[what])
    assert snapshot(world.run) == before


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files but the journal's (it is opened to look), and its rows."""
    files = {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and FILE not in p.name}
    with Journal.reading(folder) as journal:
        return files | {"rows": repr([t.evaluation.to_json() for t in journal.trials()]).encode()}


@pytest.mark.parametrize(
    "other", [FakeTask(graph=make_graph(str.upper)), FakeTask(direction="min"), FakeTask(weights=0.25)]
)
def test_resume_with_another_model_is_refused_and_changes_nothing(world: World, other: FakeTask) -> None:
    world.search(trials=3)
    before = snapshot(world.run)
    world.task = other
    with pytest.raises(RunError, match="another model or data"):
        world.search(trials=5, resume=True)
    assert snapshot(world.run) == before


def test_resume_while_another_process_searches_is_refused_and_changes_nothing(world: World) -> None:
    world.search(trials=3)
    before = snapshot(world.run)
    with Journal.writing(world.run), pytest.raises(RunError, match="in use"):
        world.search(trials=5, resume=True)
    assert snapshot(world.run) == before


def test_resume_does_not_need_the_space_file_any_more(world: World) -> None:
    """`config.json` holds the space; the command line passes on the settings that are there."""
    world.search(trials=3)
    world.space.unlink()
    assert search(study.read_config(world.run)[0], world.run, resume=True).front


def test_resume_with_an_edited_space_file_is_refused(world: World) -> None:
    world.search(trials=3)
    world.space.write_text(TINY_SPACE_TEXT)
    with pytest.raises(RunError, match="another space"):
        world.search(trials=5, resume=True, space=str(world.space))


def test_details_are_asked_once_for_each_front_member_and_for_the_original(world: World) -> None:
    front = world.search().front
    assert len(front) > 1
    asked = Counter(world.task.detailed)
    assert asked == Counter(["dense", *(t.evaluation.policy.key() for t in front)])
    with Journal.reading(world.run) as journal:
        known = journal.fact("details")
    assert known["dense"] == {"class 0 of fake": 0.95, "class 1 of val": 0.95**2}
    assert set(known["trials"]) == {str(t.number) for t in front}


def make_file(path: Path) -> None:
    path.write_text("mine")


def make_full(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("mine")


@pytest.mark.parametrize("make", [make_file, make_full])
def test_existing_folder_is_refused_and_untouched(world: World, make: Callable[[Path], None]) -> None:
    make(world.run)
    with pytest.raises(RunError, match=f"--resume {world.run}"):
        world.search()
    kept = world.run if world.run.is_file() else world.run / "file"
    assert kept.read_text() == "mine"
    assert world.run.is_file() or [p.name for p in world.run.iterdir()] == ["file"]
    assert world.evaluators == []  # refused before the work


def test_existing_run_is_refused(world: World) -> None:
    world.search(trials=3)
    before = snapshot(world.run)
    with pytest.raises(RunError, match="already exists"):
        world.search(trials=3)
    assert snapshot(world.run) == before


def test_empty_folder_is_used(world: World) -> None:
    world.run.mkdir()
    assert world.search(trials=3).front


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"settings": {}, "space": {}}', '{"settings": 3}'])
def test_resume_of_something_else_is_refused(world: World, text: str | None) -> None:
    world.run.mkdir()
    if text is not None:
        (world.run / "config.json").write_text(text)
    with pytest.raises(RunError, match=str(world.run)):
        world.search(resume=True)


@pytest.mark.parametrize(("name", "value"), [("trials", 0), ("epochs", -1), ("recoveries", 0), ("seed", -1)])
def test_settings_out_of_range_are_refused(name: str, value: int) -> None:
    with pytest.raises(AutocompressError, match=f"--{name} is {value}"):
        Settings("fake", **{name: value})


def test_config_holds_all_that_determines_the_run(world: World) -> None:
    world.search(trials=3)
    settings, file, config = study.read_config(world.run)
    assert settings == world.settings(trials=3)
    assert file == study.load_space(str(world.space))
    assert {"torch", "optuna", "python"} <= set(config["versions"])


@pytest.mark.parametrize("end", [KeyboardInterrupt(), RunError("no room"), OSError(28, "no room")], ids=repr)
def test_trial_is_not_given_up_for_what_ended_its_process_from_outside(world: World, end: BaseException) -> None:
    def fault(policy: Policy, rung: int) -> str | None:  # noqa: ARG001
        if len(world.evaluators[-1].calls) == 3:
            raise end
        return None

    whole = world.search(folder=world.run.parent / "whole")
    for again in (False, True, True, True):
        world.fault = fault
        with pytest.raises(type(end)):
            world.search(resume=again)
        world.fault = None
    world.search(resume=True)
    assert world.rows() == world.rows(whole.folder)
