"""A large `val` is screened in part; what is promoted, picked and reported was scored on all of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from fakes import FakeEvaluator, Killed, World, evaluation
from torch import nn

from autocompress import ClassificationTask, RegressionTask, study
from autocompress.controllers.registry import CONTROLLERS
from autocompress.errors import RunError
from autocompress.front import Trial, feasible, front_of, nearest, scored
from autocompress.journal import Journal
from autocompress.measure.quality import QualityMeter, screening
from autocompress.policy import Policy
from autocompress.report.tables import Run, summary
from autocompress.study import Study
from autocompress.trial import Budget, Evaluation

FAST = [name for name in CONTROLLERS if name != "gp"]


@pytest.fixture
def large(world: World) -> World:
    world.task.screens = True
    return world


# --- the meter ---


def classification(val: int) -> ClassificationTask:
    draw = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(val, 5, generator=draw), torch.randint(0, 3, (val,), generator=draw)
    pair = inputs, targets
    return ClassificationTask(nn.Linear(5, 3), pair, pair, pair, name="linear", batch_size=16)


def test_part_is_the_beginning_of_val_and_scores_as_val_would() -> None:
    task = classification(200)
    model = task.model()
    meter = screening(task, model, inputs=64)
    assert meter is not None
    assert [len(batch.inputs) for batch in meter.part or ()] == [16] * 4
    inputs, targets = task.split("val")
    with torch.no_grad():
        right = (model(inputs[:64]).argmax(dim=1) == targets[:64]).double().mean()
    assert meter(model).score == pytest.approx(float(right))
    assert meter(model).loss == pytest.approx(0.0, abs=1e-7)


def test_screen_sees_how_far_another_model_is() -> None:
    task = classification(200)
    meter = screening(task, task.model(), inputs=64)
    assert meter is not None
    other = task.model()
    nn.init.zeros_(other.weight)  # type: ignore[arg-type]
    assert meter(other).loss > 0.01


@pytest.mark.parametrize("val", [20, 64, 95])
def test_val_that_is_hardly_larger_is_always_scored_whole(val: int) -> None:
    assert screening(classification(val), classification(val).model(), inputs=64) is None


def test_task_that_cannot_score_a_part_is_always_scored_whole() -> None:
    task = classification(200)

    class Plain:
        name, metric, direction = task.name, task.metric, task.direction
        model, batches, loss, score = task.model, task.batches, task.loss, task.score

    assert screening(Plain(), task.model(), inputs=64) is None


def test_both_array_tasks_score_all_batches_like_the_split() -> None:
    task = classification(50)
    model = task.model()
    assert task.score_batches(model, task.batches("val")) == task.score(model, "val")
    inputs = torch.randn(40, 5)
    pair = inputs, inputs @ torch.randn(5, 2)
    regression = RegressionTask(nn.Linear(5, 2), pair, pair, pair, name="r", batch_size=7)
    found = regression.score_batches(regression.model(), regression.batches("val"))
    assert found == regression.score(regression.model(), "val")


def test_whole_meter_has_no_part() -> None:
    task = classification(20)
    assert QualityMeter(task, task.model()).part is None


# --- what counts as scored ---


def screened(number: int, quality: float, size: int) -> Trial:
    known = evaluation(quality, size)
    return Trial(number, Evaluation(known.policy, 0, 0, "ok", known.measurement, screened=True))


def test_front_pick_and_feasible_leave_screened_trials_out() -> None:
    trials = [screened(0, 0.99, 500), Trial(1, evaluation(0.9, 1000)), Trial(2, evaluation(0.8, 900))]
    budget = Budget(bytes=2000)
    assert [t.number for t in scored(trials)] == [1, 2]
    assert {t.number for t in feasible(trials, budget)} == {1, 2}
    assert [t.number for t in front_of(trials, "max")] == [2, 1]
    found = nearest(trials, Budget(bytes=10))
    assert found is not None
    assert found.number == 2


def test_while_nothing_else_is_there_screened_trials_stand_in() -> None:
    trials = [screened(0, 0.9, 500), screened(1, 0.8, 400)]
    assert [t.number for t in feasible(trials, Budget(bytes=450))] == [1]


def test_evaluation_remembers_that_it_was_screened_and_old_ones_were_not() -> None:
    known = screened(0, 0.9, 500).evaluation
    data = json.loads(json.dumps(known.to_json()))
    assert Evaluation.from_json(known.policy, data) == known
    del data["screened"]
    assert not Evaluation.from_json(known.policy, data).screened


# --- the search ---


@pytest.mark.parametrize("controller", FAST)
def test_candidates_are_screened_and_the_best_promoted(large: World, controller: str) -> None:
    found = large.search(controller=controller, trials=20, epochs=0)
    parts = [t for t in found.trials if t.evaluation.screened and t.evaluation.copy_of is None]
    whole = [t for t in found.trials if t.evaluation.status == "ok" and not t.evaluation.screened]
    assert len(parts) == 20
    assert 6 <= len(whole) < 20
    assert found.evaluations == 20 + len(whole)
    least = min((t for t in parts if t.measured.bytes <= 1500), key=lambda t: t.measured.loss)
    assert least.evaluation.policy.key() in {t.evaluation.policy.key() for t in whole}
    assert found.picked is not None
    assert all(not t.evaluation.screened and t.artifact for t in found.front)
    assert large.task.quality_of(found.picked.evaluation.policy) == pytest.approx(found.picked.measured.quality)


def test_recovery_starts_from_promoted_members(large: World) -> None:
    found = large.search(controller="solver", trials=12, epochs=1)
    whole = {t.evaluation.policy.key() for t in found.trials if not t.evaluation.screened and not t.evaluation.rung}
    trained = [t for t in found.trials if t.evaluation.rung == 1]
    assert trained
    assert all(t.evaluation.policy.without_recovery().key() in whole for t in trained)
    assert not any(t.evaluation.screened for t in trained)


@pytest.mark.parametrize("controller", FAST)
@pytest.mark.parametrize("at", [3, 11, 14])
def test_killed_while_screening_or_promoting_it_ends_as_if_uninterrupted(
    large: World, tmp_path: Path, controller: str, at: int
) -> None:
    settings = {"controller": controller, "trials": 12, "epochs": 1}
    large.search(folder=tmp_path / "whole", **settings)
    large.killed(at, **settings)
    large.search(resume=True, **settings)
    assert large.rows() == large.rows(tmp_path / "whole")


def test_report_of_a_killed_search_shows_what_was_screened(large: World) -> None:
    large.killed(8, controller="solver", trials=12)
    run = Run.read(large.run)
    assert run.front
    assert all(t.evaluation.screened for t in run.front)


# --- the profile ---


class Watched(FakeEvaluator):
    """Counts what a profile asks."""

    asked = 0

    def loss(self, policy: Policy) -> float:
        Watched.asked += 1
        return super().loss(policy)


@pytest.fixture
def watched(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fakes.FakeEvaluator", Watched)
    Watched.asked = 0
    return world


def test_profile_serves_a_later_search_with_another_budget(watched: World, tmp_path: Path) -> None:
    watched.search(controller="solver", epochs=0)
    first = Watched.asked
    assert first == len(watched.task.graph.layers)
    other = tmp_path / "other"
    watched.search(folder=other, controller="solver", epochs=0, budgets=("1.2kB",))
    assert Watched.asked == first
    assert [summary(Run.read(folder))["profile"]["reused"] for folder in (watched.run, other)] == [False, True]


def test_budget_of_time_adds_the_channel_groups_to_a_known_profile(watched: World, tmp_path: Path) -> None:
    watched.search(controller="solver", epochs=0)
    before = Watched.asked
    watched.search(
        folder=tmp_path / "timed", controller="solver", epochs=0, budgets=("1.5kB", "1.5ms"), format="packed"
    )
    assert Watched.asked == before + 4  # two groups, each at its two widths below the whole one
    assert summary(Run.read(tmp_path / "timed"))["profile"]["evaluations"] == before + 4


def test_damaged_profile_is_measured_again(watched: World, tmp_path: Path) -> None:
    watched.search(controller="solver", epochs=0)
    first = Watched.asked
    (stored,) = (tmp_path / "cache" / "profiles").iterdir()
    stored.write_text('{"key": "')
    watched.search(folder=tmp_path / "again", controller="solver", epochs=0)
    assert Watched.asked == 2 * first


def test_resumed_search_keeps_its_own_profile(watched: World, tmp_path: Path) -> None:
    watched.killed(3, controller="solver", epochs=0)
    for path in (tmp_path / "cache" / "profiles").iterdir():
        path.unlink()
    before = Watched.asked
    watched.search(resume=True, controller="solver", epochs=0)
    assert Watched.asked == before


def test_other_controllers_measure_no_profile(watched: World) -> None:
    watched.search(controller="random", epochs=0)
    assert Watched.asked == 0
    assert summary(Run.read(watched.run))["profile"] is None
    with Journal.reading(watched.run) as journal:
        assert journal.fact("profile") is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_cache_only_costs_the_reuse(watched: World, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.warns(UserWarning, match="not kept"):
        assert watched.search(controller="solver", epochs=0).picked is not None


# --- what goes wrong ---


@pytest.mark.parametrize(("val", "batch_size"), [(200, 200), (200, 100), (150, 100), (130, 65)])
def test_large_batches_do_not_make_the_part_all_of_val(val: int, batch_size: int) -> None:
    task = classification(val)
    task.batch_size = batch_size
    meter = screening(task, task.model(), inputs=64)
    assert meter is None or 1.5 * sum(len(batch.inputs) for batch in meter.part or ()) <= val


def fails_when_promoted(large: World) -> None:
    def fault(policy: Policy, rung: int) -> str | None:
        del policy
        return "raise" if rung == 0 and not large.evaluators[-1].screened[-1] else None

    large.fault = fault


@pytest.mark.parametrize("controller", ["solver", "random", "nsga2"])
def test_failed_promotion_is_not_tried_again_and_counts_as_no_candidate(large: World, controller: str) -> None:
    settings = {"controller": controller, "epochs": 0}
    fails_when_promoted(large)
    large.search(trials=10, **settings)
    before = large.rows()
    assert any(row["status"] == "failed" and not row["screened"] for row in before)
    large.search(trials=10, resume=True, **settings)
    assert large.rows() == before
    large.fault = None
    later = large.search(trials=14, resume=True, **settings)
    assert sum(t.evaluation.screened and t.evaluation.status == "ok" for t in later.trials) >= 14
    assert later.front


@pytest.mark.parametrize("controller", FAST)
@pytest.mark.parametrize("at", [4, 13, *(pytest.param(x, marks=pytest.mark.slow) for x in (10, 19))])
def test_killed_among_failures_it_ends_as_if_uninterrupted(
    large: World, tmp_path: Path, controller: str, at: int
) -> None:
    def fault(policy: Policy, rung: int) -> str | None:
        whole = rung == 0 and not large.evaluators[-1].screened[-1]
        return "raise" if (int(policy.key()[:2], 16) + 3 * whole) % 6 == 0 else None

    large.fault = fault
    settings = {"controller": controller, "trials": 12, "epochs": 1}
    large.search(folder=tmp_path / "whole", **settings)
    assert len({row["screened"] for row in large.rows(tmp_path / "whole") if row["status"] == "failed"}) == 2
    large.killed(at, **settings)
    large.search(resume=True, **settings)
    assert large.rows() == large.rows(tmp_path / "whole")


def test_promotion_that_killed_its_process_twice_is_written_off(large: World) -> None:
    settings = {"controller": "solver", "trials": 10, "epochs": 0}
    victim: list[str] = []

    def deadly(policy: Policy, rung: int) -> str | None:
        del rung
        if not large.evaluators[-1].screened[-1] and not victim:
            victim.append(policy.key())
        return "kill" if victim == [policy.key()] and not large.evaluators[-1].screened[-1] else None

    large.fault = deadly
    for resume in (False, True):
        with pytest.raises(Killed):
            large.search(resume=resume, **settings)
    found = large.search(resume=True, **settings)
    (lost,) = [t for t in found.trials if t.evaluation.status == "failed"]
    assert (lost.evaluation.policy.key(), lost.evaluation.screened) == (victim[0], False)
    assert found.front
    before = large.rows()
    large.search(resume=True, **settings)
    assert large.rows() == before


def test_stopped_search_promotes_what_it_has(large: World) -> None:
    running: list[Study] = []

    def stop(policy: Policy, rung: int) -> None:
        del policy, rung
        if len(large.calls) == 5:
            running[0].stop()

    large.fault = stop
    found = large.search(controller="solver", started=running.append)
    assert large.evaluators[0].screened.count(True) == 6
    assert {rung for _, rung, _ in large.calls} == {0}
    assert found.front
    assert not any(t.evaluation.screened for t in found.front)


def test_search_stopped_among_promotions_ends_after_the_one_in_flight(large: World) -> None:
    running: list[Study] = []

    def stop(policy: Policy, rung: int) -> None:
        del policy, rung
        if large.evaluators[0].screened.count(False) == 3:
            running[0].stop()

    large.fault = stop
    found = large.search(controller="solver", started=running.append)
    assert large.evaluators[0].screened.count(False) == 3
    assert len([t for t in found.trials if t.evaluation.status == "ok" and not t.evaluation.screened]) == 3
    assert found.picked is not None


def test_search_stopped_while_screening_promotes_the_best_alone(large: World) -> None:
    running: list[Study] = []

    def stop(policy: Policy, rung: int) -> None:
        del policy, rung
        if len(large.calls) == 5:
            running[0].stop()

    large.fault = stop
    found = large.search(controller="solver", started=running.append)
    (whole,) = [t for t in found.trials if t.evaluation.status == "ok" and not t.evaluation.screened]
    fits = [t for t in found.trials if t.evaluation.screened and found.budget.excess(t.measured) <= 0]
    best = min(fits, key=lambda t: t.measured.loss)
    assert whole.evaluation.policy.key() == best.evaluation.policy.key()


def test_stopped_promotions_are_made_up_for_on_resume(large: World, tmp_path: Path) -> None:
    settings = {"controller": "solver", "trials": 12, "epochs": 0}
    large.search(folder=tmp_path / "whole", **settings)
    running: list[Study] = []

    def stop(policy: Policy, rung: int) -> None:
        del policy, rung
        if large.evaluators[-1].screened.count(False) == 2:
            running[0].stop()

    large.fault = stop
    large.search(started=running.append, **settings)
    large.fault = None
    large.search(resume=True, **settings)
    plain = [[{**row, "artifact": "", "test": ""} for row in large.rows(f)] for f in (large.run, tmp_path / "whole")]
    assert plain[0] == plain[1]


def test_timeout_is_honoured_among_promotions(large: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(study.time, "monotonic", lambda: clock[0])

    def slow(policy: Policy, rung: int) -> None:
        del policy, rung
        clock[0] += 1.0 if large.evaluators[0].screened[-1] else 3.0

    large.fault = slow
    found = large.search(controller="solver", trials=1000, epochs=0, timeout=20)
    assert large.evaluators[0].screened.count(True) == 16
    assert large.evaluators[0].screened.count(False) == 2
    assert found.picked is not None


def test_profiling_counts_as_time_and_ends_with_what_to_do(watched: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(study.time, "monotonic", lambda: clock[0])
    plain = Watched.loss

    def slow(evaluator: Watched, policy: Policy) -> float:
        clock[0] += 4.0
        return plain(evaluator, policy)

    monkeypatch.setattr(Watched, "loss", slow)
    with pytest.raises(RunError, match=r"--timeout ran out while profiling.*--resume"):
        watched.search(controller="solver", epochs=0, timeout=7)
    assert Watched.asked == 2
    watched.fault = lambda *_: clock.__setitem__(0, clock[0] + 1.0)
    found = watched.search(controller="solver", epochs=0, timeout=17, resume=True)
    assert found.evaluations == 5  # of 17 seconds the profile of three layers took 12
    assert found.picked is not None


def test_time_that_ends_before_the_first_evaluation_is_said(world: World) -> None:
    found = world.search(timeout=1e-9, epochs=0)
    assert found.evaluations == 0
    assert any("--timeout" in text for text in found.warnings)
    assert not any("--timeout" in text for text in world.search(resume=True, epochs=0).warnings)


def test_screening_leaves_time_to_promote(large: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(study.time, "monotonic", lambda: clock[0])

    def slow(policy: Policy, rung: int) -> None:
        del policy, rung
        clock[0] += 1.0

    large.fault = slow
    found = large.search(controller="solver", trials=1000, epochs=0, timeout=10)
    assert large.evaluators[0].screened.count(True) == 8
    assert found.picked is not None
    assert not found.picked.evaluation.screened


def test_more_candidates_on_resume_are_promoted_too(large: World) -> None:
    large.search(controller="solver", trials=8, epochs=0)
    later = large.search(controller="solver", trials=20, epochs=0, resume=True)
    assert sum(t.evaluation.screened and t.evaluation.copy_of is None for t in later.trials) == 20
    whole = [
        t.evaluation.policy.key() for t in later.trials if t.evaluation.status == "ok" and not t.evaluation.screened
    ]
    assert len(set(whole)) == len(whole)
    screened = [t for t in later.trials if t.evaluation.screened and t.measured.bytes <= 1500]
    assert min(screened, key=lambda t: t.measured.loss).evaluation.policy.key() in whole


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "null", "\x00"])
def test_cached_profile_that_is_none_is_measured_again(watched: World, tmp_path: Path, content: str) -> None:
    watched.search(controller="solver", epochs=0, trials=2)
    first = Watched.asked
    (stored,) = (tmp_path / "cache" / "profiles").iterdir()
    stored.write_text(content)
    watched.search(folder=tmp_path / "again", controller="solver", epochs=0, trials=2)
    assert Watched.asked == 2 * first


@pytest.mark.parametrize("layers", [0, 1])
def test_cached_profile_that_misses_layers_is_measured_again(watched: World, tmp_path: Path, layers: int) -> None:
    watched.search(controller="solver", epochs=0, trials=2)
    first = Watched.asked
    (stored,) = (tmp_path / "cache" / "profiles").iterdir()
    data = json.loads(stored.read_text())
    stored.write_text(json.dumps(data | {"layers": data["layers"][:layers]}))
    watched.search(folder=tmp_path / "again", controller="solver", epochs=0, trials=2)
    assert Watched.asked == 2 * first


def test_search_killed_while_profiling_ends_as_if_uninterrupted(
    watched: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> float:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Watched, "loss", die)
        with pytest.raises(Killed):
            watched.search(controller="solver", epochs=0, trials=5)
    watched.search(resume=True, controller="solver", epochs=0, trials=5)
    watched.search(folder=tmp_path / "whole", controller="solver", epochs=0, trials=5)
    assert watched.rows() == watched.rows(tmp_path / "whole")
