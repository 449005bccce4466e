"""What every controller promises: valid, budget-aware, reproducible proposals, and a past that can be told again."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import pytest
from fakes import GRAPH, TINY_SPACE_TEXT, FakeEvaluator, make_space
from optuna.trial import TrialState

from autocompress.controllers.optuna_samplers import SAMPLERS, OptunaController, make_controller
from autocompress.errors import AutocompressError
from autocompress.policy import Policy
from autocompress.trial import Budget, Evaluation

TIGHT = Budget(bytes=1500)
CUTS = (3, 17, 31, 46, 59)


@pytest.fixture(params=list(SAMPLERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def controller(name: str, budget: Budget = TIGHT, seed: int = 0, text: str | None = None) -> OptunaController:
    space = make_space() if text is None else make_space(text)
    return make_controller(name, space, budget, FakeEvaluator().predict, seed)


def outcome(policy: Policy, rung: int, budget: Budget) -> Evaluation:
    """What a study would tell; about one policy in five fails."""
    evaluator = FakeEvaluator(
        fault=lambda p, _: "raise" if hashlib.sha256(p.key().encode()).digest()[0] % 5 == 0 else None
    )
    predicted = evaluator.predict(policy)
    if budget.static().excess(predicted) > 0:
        return Evaluation(policy, 0, rung, "infeasible", predicted)
    return evaluator(policy, rung)


def go_on(proposer: OptunaController, history: list[Evaluation], count: int, budget: Budget = TIGHT) -> None:
    """Ask and tell until `history` has `count` evaluations; every eighth trains a parent of the past."""
    while len(history) < count:
        parents = [e.policy for e in history if e.status == "ok" and not e.policy.recovery.epochs]
        if len(history) % 8 == 7 and parents:
            policy, rung = proposer.ask(parents[len(history) % len(parents)], 2), 1
        else:
            policy, rung = proposer.ask(), 0
        history.append(outcome(policy, rung, budget))
        proposer.tell(history[-1])


def run(name: str, count: int, budget: Budget = TIGHT, seed: int = 0) -> tuple[OptunaController, list[Evaluation]]:
    proposer, history = controller(name, budget, seed), []
    go_on(proposer, history, count, budget)
    return proposer, history


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[OptunaController, list[Evaluation]]]:
    return {name: run(name, 60) for name in SAMPLERS}


@pytest.fixture(scope="module")
def histories(runs: dict[str, tuple[OptunaController, list[Evaluation]]]) -> dict[str, list[Evaluation]]:
    return {name: history for name, (_, history) in runs.items()}


def test_proposals_are_policies_of_the_space(name: str, histories: dict[str, list[Evaluation]]) -> None:
    space = make_space()
    for e in histories[name]:
        GRAPH.check(e.policy)
        assert space.decode(space.encode(e.policy), e.policy.recovery.epochs) == e.policy


def test_histories_hold_every_kind_of_trial(name: str, histories: dict[str, list[Evaluation]]) -> None:
    history = histories[name]
    assert {e.status for e in history} == {"ok", "infeasible", "failed"}
    assert {e.rung for e in history} == {0, 1}


def test_first_proposals_are_the_uniform_baselines_that_fit(name: str) -> None:
    evaluator = FakeEvaluator()
    expected = [p for p in make_space().baselines() if TIGHT.excess(evaluator.predict(p)) <= 0]
    proposer, found = controller(name), []
    for _ in expected:
        found.append(proposer.ask())
        proposer.tell(outcome(found[-1], 0, TIGHT))
    assert len(expected) >= 2
    assert found == expected


def test_proposal_over_budget_is_followed_by_one_that_fits(name: str, histories: dict[str, list[Evaluation]]) -> None:
    history, predict = histories[name], FakeEvaluator().predict
    repaired = [b for a, b in pairwise(history) if a.status == "infeasible" and b.rung == 0]
    assert repaired
    assert all(TIGHT.excess(predict(e.policy)) <= 0 for e in repaired)


def test_equal_seeds_propose_equally(name: str, histories: dict[str, list[Evaluation]]) -> None:
    again = run(name, 40)[1]
    assert [e.policy for e in again] == [e.policy for e in histories[name][:40]]


def test_other_seeds_propose_otherwise(name: str, histories: dict[str, list[Evaluation]]) -> None:
    other = run(name, 25, seed=1)[1]
    assert [e.policy for e in other] != [e.policy for e in histories[name][:25]]


@pytest.mark.parametrize("cut", CUTS)
def test_told_its_past_it_goes_on_as_if_uninterrupted(
    name: str, cut: int, histories: dict[str, list[Evaluation]]
) -> None:
    stored = [Evaluation.from_json(Policy.from_json(e.policy.to_json()), e.to_json()) for e in histories[name][:cut]]
    proposer = controller(name)
    proposer.restore(stored)
    go_on(proposer, stored, min(60, cut + 10))
    assert [e.policy for e in stored] == [e.policy for e in histories[name][: len(stored)]]


def test_restored_twice_it_still_goes_on_as_if_uninterrupted(name: str, histories: dict[str, list[Evaluation]]) -> None:
    history = histories[name][:12]
    for count in (20, 28):
        proposer, history = controller(name), list(history)
        proposer.restore(history)
        go_on(proposer, history, count)
    assert [e.policy for e in history] == [e.policy for e in histories[name][:28]]


def test_an_interrupted_ask_leaves_no_trace_after_restore(name: str, histories: dict[str, list[Evaluation]]) -> None:
    first = controller(name)
    first.restore(histories[name][:20])
    lost = first.ask()  # its process dies before it is told
    second = controller(name)
    second.restore(histories[name][:20])
    assert second.ask() == lost == histories[name][20].policy


def test_study_holds_each_trial_once(name: str, runs: dict[str, tuple[OptunaController, list[Evaluation]]]) -> None:
    proposer, history = runs[name]
    trials = proposer.study.trials
    assert len(trials) == len(history)
    assert all(t.state in (TrialState.COMPLETE, TrialState.FAIL) for t in trials)
    assert [t.user_attrs["policy"] for t in trials] == [e.policy.key() for e in history]
    assert [t.user_attrs["rung"] for t in trials] == [e.rung for e in history]
    assert [t.user_attrs["status"] for t in trials] == [e.status for e in history]


def test_parameters_are_named_per_layer(name: str, runs: dict[str, tuple[OptunaController, list[Evaluation]]]) -> None:
    proposer, history = runs[name]
    names = {p.name for p in make_space().policy_parameters}
    assert {"bits/conv1", "sparsity/fc", "keep/conv2", "scheme"} <= names
    for trial, e in zip(proposer.study.trials, history, strict=True):
        assert names <= set(trial.params)
        assert ("recovery/lr" in trial.params) == (e.rung == 1)


def test_constraint_is_recorded(name: str, runs: dict[str, tuple[OptunaController, list[Evaluation]]]) -> None:
    proposer, history = runs[name]
    for trial, e in zip(proposer.study.trials, history, strict=True):
        if e.status != "failed":
            (value,) = trial.constraints.values()
            assert (value > 0) == (e.status == "infeasible")


def test_failures_are_told_as_failed_and_asking_goes_on(name: str) -> None:
    proposer = controller(name)
    for _ in range(25):
        policy = proposer.ask()
        proposer.tell(Evaluation(policy, 0, 0, "failed", error="it broke"))
    assert {t.state for t in proposer.study.trials} == {TrialState.FAIL}
    assert isinstance(proposer.ask(), Policy)


def test_recovery_keeps_the_parents_compression(name: str) -> None:
    proposer, history = run(name, 5)
    parent = history[0].policy
    trained = proposer.ask(parent, 3)
    assert trained.recovery.epochs == 3
    assert (trained.layers, trained.keep, trained.criterion) == (parent.layers, parent.keep, parent.criterion)
    assert trained.recovery.reestimate_bn == parent.recovery.reestimate_bn


def test_latency_budget_adds_an_objective(name: str) -> None:
    budget = Budget(bytes=1500, ms=1.0)
    proposer, history = run(name, 30, budget)
    assert len(proposer.study.directions) == 3
    done = [(t, e) for t, e in zip(proposer.study.trials, history, strict=True) if e.status == "ok"]
    assert all(t.values == [e.measurement.loss, e.measurement.bytes, e.measurement.latency_ms] for t, e in done)
    slow = [t for t, e in done if e.measurement.latency_ms > 1.0]
    assert slow
    assert all(max(t.constraints.values()) > 0 for t in slow)


def test_without_latency_budget_time_does_not_steer(name: str) -> None:
    """Proposals must not depend on a timing, or no run could be repeated."""
    sequences = []
    for factor in (1.0, 3.7):
        proposer, found = controller(name), []
        for _ in range(25):
            found.append(proposer.ask())
            e = outcome(found[-1], 0, TIGHT)
            if e.measurement is not None and not math.isnan(e.measurement.latency_ms):
                slower = type(e.measurement)(
                    e.measurement.bytes,
                    e.measurement.macs,
                    e.measurement.quality,
                    e.measurement.loss,
                    e.measurement.latency_ms * factor,
                )
                e = Evaluation(e.policy, 0, 0, "ok", slower, seconds=factor)
            proposer.tell(e)
        sequences.append(found)
    assert sequences[0] == sequences[1]


def test_no_budget_at_all_still_proposes(name: str) -> None:
    assert len(run(name, 15, Budget())[1]) == 15


def test_space_without_choices_proposes_its_one_policy(name: str) -> None:
    text = "[layers]\nbits = [4]\n"
    proposer = controller(name, text=text)
    for _ in range(3):
        policy = proposer.ask()
        assert policy == make_space(text).smallest()
        proposer.tell(outcome(policy, 0, TIGHT))
    trained = proposer.ask(policy, 1)
    assert trained.recovery.epochs == 1


def test_tiny_space_is_proposed_in_full(name: str) -> None:
    proposer, found = controller(name, text=TINY_SPACE_TEXT), set()
    for _ in range(80):
        policy = proposer.ask()
        found.add(policy.key())
        proposer.tell(outcome(policy, 0, TIGHT))
    assert len(found) == 8


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(AutocompressError, match="tpe, nsga2, random"):
        controller("gradient-descent")


def test_asking_prints_nothing(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    run(name, 30)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
