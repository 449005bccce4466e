"""What every controller promises: valid, budget-aware, reproducible proposals, and a past that can be told again."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import pytest
from fakes import GRAPH, TINY_SPACE_TEXT, FakeEvaluator, make_profile, make_space
from optuna.trial import TrialState

from autocompress.controllers.optuna_samplers import SAMPLERS, OptunaController
from autocompress.controllers.registry import CONTROLLERS, make_controller
from autocompress.controllers.solver import group_losses
from autocompress.errors import AutocompressError
from autocompress.policy import Policy
from autocompress.profile import GroupProfile
from autocompress.trial import Budget, Evaluation, Measurement

TIGHT = Budget(bytes=1500)
CUTS = (3, 17, 31, 46, 59)


@pytest.fixture(params=[n for n in CONTROLLERS if n != "gp"])
def name(request: pytest.FixtureRequest) -> str:
    """A Gaussian process takes seconds a proposal: it has a shorter suite at the end."""
    return str(request.param)


def controller(name: str, budget: Budget = TIGHT, seed: int = 0, text: str | None = None) -> OptunaController:
    space = make_space() if text is None else make_space(text)
    return make_controller(name, space, budget, FakeEvaluator().predict, seed, make_profile(space))


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


def past(history: list[Evaluation], flying: tuple[Policy, ...] = ()) -> list[Policy | Evaluation]:
    """What was asked for and told when one at a time was in flight, and what is in flight still."""
    return [*(event for e in history for event in (e.policy, e)), *flying]


def run(name: str, count: int, budget: Budget = TIGHT, seed: int = 0) -> tuple[OptunaController, list[Evaluation]]:
    proposer, history = controller(name, budget, seed), []
    go_on(proposer, history, count, budget)
    return proposer, history


long_run = cache(lambda name: run(name, 60))
"""Sixty evaluations of a controller, made once; nothing may change them."""


@pytest.fixture
def history(name: str) -> list[Evaluation]:
    return list(long_run(name)[1])


samplers_only = pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "gp"])


def test_proposals_are_policies_of_the_space(history: list[Evaluation]) -> None:
    space = make_space()
    for e in history:
        GRAPH.check(e.policy)
        assert space.decode(space.encode(e.policy), e.policy.recovery.epochs) == e.policy


@samplers_only
def test_histories_hold_every_kind_of_trial(history: list[Evaluation]) -> None:
    assert {e.status for e in history} == {"ok", "infeasible", "failed"}
    assert {e.rung for e in history} == {0, 1}


@samplers_only
def test_first_proposals_are_the_uniform_baselines_that_fit(name: str) -> None:
    evaluator = FakeEvaluator()
    expected = [p for p in make_space().baselines() if TIGHT.excess(evaluator.predict(p)) <= 0]
    proposer, found = controller(name), []
    for _ in expected:
        found.append(proposer.ask())
        proposer.tell(outcome(found[-1], 0, TIGHT))
    assert len(expected) >= 2
    assert found == expected


@samplers_only
def test_proposal_over_budget_is_followed_by_one_that_fits(history: list[Evaluation]) -> None:
    predict = FakeEvaluator().predict
    repaired = [b for a, b in pairwise(history) if a.status == "infeasible" and b.rung == 0]
    assert repaired
    assert all(TIGHT.excess(predict(e.policy)) <= 0 for e in repaired)


def test_equal_seeds_propose_equally(name: str, history: list[Evaluation]) -> None:
    again = run(name, 40)[1]
    assert [e.policy for e in again] == [e.policy for e in history[:40]]


def test_other_seeds_propose_otherwise(name: str, history: list[Evaluation]) -> None:
    other = run(name, 25, seed=1)[1]
    assert [e.policy for e in other] != [e.policy for e in history[:25]]


@pytest.mark.parametrize("cut", CUTS)
def test_told_its_past_it_goes_on_as_if_uninterrupted(name: str, cut: int, history: list[Evaluation]) -> None:
    stored = [Evaluation.from_json(Policy.from_json(e.policy.to_json()), e.to_json()) for e in history[:cut]]
    proposer = controller(name)
    proposer.restore(past(stored))
    go_on(proposer, stored, min(60, cut + 10))
    assert [e.policy for e in stored] == [e.policy for e in history[: len(stored)]]


def test_told_its_past_with_others_in_flight_it_goes_on_as_if_uninterrupted(
    name: str, history: list[Evaluation]
) -> None:
    """Three are asked for at once, and told in another order; its process may end between any two of these."""
    events: list[Policy | Evaluation] = list(past(history[:20]))
    proposer = controller(name)
    proposer.restore(events)
    flying: list[Policy] = []
    for i in range(24):
        if i % 6 < 3:
            flying.append(proposer.ask())
            events.append(flying[-1])
        else:
            events.append(outcome(flying.pop((i * 7) % len(flying)), 0, TIGHT))
            proposer.tell(events[-1])
    expected = proposer.ask()
    for cut in (40, 41, 42, 45, 47, 52, 57, 62):
        again = controller(name)
        again.restore(events[:cut])
        for event in events[cut:]:
            if isinstance(event, Policy):
                assert again.ask() == event
            else:
                again.tell(event)
        assert again.ask() == expected


def test_restored_twice_it_still_goes_on_as_if_uninterrupted(name: str, history: list[Evaluation]) -> None:
    known = history[:12]
    for count in (20, 28):
        proposer, known = controller(name), list(known)
        proposer.restore(past(known))
        go_on(proposer, known, count)
    assert [e.policy for e in known] == [e.policy for e in history[:28]]


def test_an_interrupted_ask_leaves_no_trace_after_restore(name: str, history: list[Evaluation]) -> None:
    first = controller(name)
    first.restore(past(history[:20]))
    lost = first.ask()  # its process dies before it is told
    second = controller(name)
    second.restore(past(history[:20]))
    assert second.ask() == lost == history[20].policy


def test_study_holds_each_trial_once(name: str) -> None:
    proposer, history = long_run(name)
    trials = proposer.study.trials
    assert len(trials) == len(history)
    assert all(t.state in (TrialState.COMPLETE, TrialState.FAIL) for t in trials)
    assert [t.user_attrs["policy"] for t in trials] == [e.policy.key() for e in history]
    assert [t.user_attrs["rung"] for t in trials] == [e.rung for e in history]
    assert [t.user_attrs["status"] for t in trials] == [e.status for e in history]


def test_parameters_are_named_per_layer(name: str) -> None:
    proposer, history = long_run(name)
    names = {p.name for p in make_space().policy_parameters}
    assert {"bits/conv1", "sparsity/fc", "keep/conv2", "scheme"} <= names
    for trial, e in zip(proposer.study.trials, history, strict=True):
        assert names <= set(trial.params)
        assert ("recovery/lr" in trial.params) == (e.rung == 1)


def test_constraint_is_recorded(name: str) -> None:
    proposer, history = long_run(name)
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
    with pytest.raises(AutocompressError, match="solver, tpe, nsga2, gp, random"):
        controller("gradient-descent")


def test_asking_prints_nothing(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    run(name, 30)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


# --- the solver's own promises ---


@pytest.mark.parametrize("limits", [TIGHT, Budget(bytes=1000), Budget(macs=12_000), Budget(bytes=1200, macs=14_000)])
def test_solver_proposes_nothing_over_budget(limits: Budget) -> None:
    proposer, history = run("solver", 40, limits)
    assert not [e for e in history if e.status == "infeasible"]
    shots = [t for t, e in zip(proposer.study.trials, history, strict=True) if e.rung == 0 and e.status == "ok"]
    assert all(max(t.constraints.values()) <= 0 for t in shots)


def test_solver_proposes_nothing_twice_while_something_is_new() -> None:
    shots = [e.policy for e in long_run("solver")[1] if e.rung == 0]
    assert len({p.key() for p in shots}) == len(shots)


def test_first_proposal_of_the_solver_is_the_best_that_fits_as_predicted() -> None:
    """Against every policy of a small space, with the losses that the profile predicts."""
    text = "[layers]\nbits = [2, 4, 8]\nsparsity = [0.0, 0.5]\n"
    space, predict = make_space(text), FakeEvaluator().predict
    profile = make_profile(space)
    losses = {
        (layer.name, level.choice): loss
        for layer in profile.layers
        for level, loss in zip(layer.levels, layer.losses(), strict=True)
    }
    choices = [[level.choice for level in layer.levels] for layer in profile.layers]
    names = [layer.name for layer in profile.layers]
    for limit in (900, 1200, 1500, 2200):
        found = controller("solver", Budget(bytes=limit), text=text).ask()
        rivals = [replace(found, layers=dict(zip(names, picked, strict=True))) for picked in product(*choices)]
        best = min(sum(losses[x] for x in p.layers.items()) for p in rivals if predict(p).bytes <= limit)
        assert sum(losses[item] for item in found.layers.items()) == pytest.approx(best, rel=0.02)


def test_solver_learns_where_the_profile_was_wrong() -> None:
    """A layer that matters a hundred times more than its profile says gets its bits back."""
    space, evaluator = make_space(), FakeEvaluator()
    profile = make_profile(space)
    wrong = tuple(replace(x, sensitivity=x.sensitivity * (0.05 if x.name == "conv2" else 1.0)) for x in profile.layers)
    proposer = make_controller("solver", space, TIGHT, evaluator.predict, 0, replace(profile, layers=wrong))
    losses = []
    for _ in range(40):
        policy = proposer.ask()
        proposer.tell(evaluator(policy))
        losses.append(evaluator.loss(policy))
    right = make_controller("solver", space, TIGHT, evaluator.predict, 0, profile)
    assert min(losses[8:]) < losses[0]
    assert min(losses) <= evaluator.loss(right.ask()) * 1.02


def test_solver_needs_a_profile() -> None:
    with pytest.raises(AutocompressError, match="profile"):
        make_controller("solver", make_space(), TIGHT, FakeEvaluator().predict, 0)


def test_latency_budget_makes_the_solver_remove_channels() -> None:
    budget = Budget(ms=1.2)
    history = run("solver", 30, budget)[1]
    shots = [e for e in history if e.status == "ok" and e.rung == 0]
    assert sum(e.measurement.latency_ms <= 1.2 for e in shots) >= len(shots) // 2


def test_losses_of_widths_pass_through_the_measured_ones_and_rise_as_channels_go() -> None:
    space = make_space("[layers]\nbits = [8]\n[channels]\nkeep = [0.125, 0.25, 0.5, 0.75, 0.875, 1.0]\n")
    measured = [("conv1", 0.25, 0.9), ("conv1", 0.75, 0.1), ("conv2", 0.25, 0.1), ("conv2", 0.5, 0.3)]
    profile = replace(make_profile(space), groups=tuple(GroupProfile(*row) for row in measured))
    found = group_losses(space, profile)
    (first, second, third, fourth, fifth, last) = found["conv1"]
    assert (second, fourth, last) == pytest.approx((0.9, 0.1, 0.0))
    assert third == pytest.approx(0.1 * 2**2)  # nine times as much for three times as many: a square here
    assert first == pytest.approx(0.9 * (0.875 / 0.75) ** 2)
    assert fifth == pytest.approx(0.1 / 4)
    assert found["conv2"][:3] == pytest.approx([0.3, 0.3, 0.3])  # noise: narrower is not better


def test_loss_of_a_removed_group_is_what_was_measured_alone() -> None:
    graph = replace(GRAPH, groups=tuple(replace(g, removable=g.name == "conv1") for g in GRAPH.groups))
    space = make_space("[layers]\nbits = [8]\n[channels]\nkeep = [0.0, 0.25, 0.5, 1.0]\n", graph)
    rows = [("conv1", 0.25, 0.9), ("conv1", 0.5, 0.1)]
    for removed in (0.2, 5.0):
        groups = tuple(GroupProfile(*row) for row in [*rows, ("conv1", 0.0, removed)])
        found = group_losses(space, replace(make_profile(space), groups=groups))
        assert found["conv1"] == pytest.approx([removed, 0.9, 0.1, 0.0])


def test_channels_go_first_where_the_measured_loss_per_operation_is_least() -> None:
    space = make_space("[layers]\nbits = [8]\n[channels]\nkeep = [0.25, 0.5, 0.75, 1.0]\n")
    for tough, soft in (("conv1", "conv2"), ("conv2", "conv1")):
        groups = (GroupProfile(tough, 0.5, 9.0), GroupProfile(soft, 0.5, 0.001))
        profile = replace(make_profile(space), groups=groups)
        budget = Budget(macs=int(0.8 * GRAPH.dense_macs))
        policy = make_controller("solver", space, budget, FakeEvaluator().predict, 0, profile).ask()
        assert GRAPH.macs(policy) <= 0.8 * GRAPH.dense_macs
        assert policy.keep[soft] < policy.keep[tough]


# --- the Gaussian process, in short ---


@pytest.mark.slow
def test_gaussian_process_keeps_the_promises_too() -> None:
    proposer, history = run("gp", 16)
    space = make_space()
    for e in history:
        assert space.decode(space.encode(e.policy), e.policy.recovery.epochs) == e.policy
    assert [t.user_attrs["policy"] for t in proposer.study.trials] == [e.policy.key() for e in history]
    resumed = controller("gp")
    known = list(history[:13])
    resumed.restore(past(known))
    go_on(resumed, known, 16)
    assert [e.policy for e in known] == [e.policy for e in history]


# --- the solver at the edges ---

EDGES = {
    "asymmetric": '[layers]\nbits = [2, 4, 8]\nsparsity = [0.0, 0.5]\nscheme = ["asymmetric"]\n',
    "channels": "[layers]\nbits = [4, 8]\n[channels]\nkeep = [0.25, 0.5, 1.0]\n",
    "one": "[layers]\nbits = [4]\n",
    "all": """
[layers]
bits = [2, 4, 8]
sparsity = [0.0, 0.5]
scheme = ["asymmetric", "symmetric"]
solver = ["nearest", "database"]
[channels]
keep = [0.5, 1.0]
criterion = ["l1", "l2", "taylor"]
[batch_norm]
reestimate = [false, true]
fold = [true, false]
""",
}


def edge_run(text: str, budget: Budget, change: str = "", count: int = 12) -> list[Evaluation]:
    """Evaluations of the solver in a space; `change` says what is unusual about the profile or the losses."""
    space, evaluator = make_space(text), FakeEvaluator()
    profile = make_profile(space)
    if change == "harmless":
        layers = tuple(replace(layer, sensitivity=0.0) for layer in profile.layers)
        profile = replace(profile, layers=layers, groups=tuple(replace(g, loss=0.0) for g in profile.groups))
    proposer = make_controller("solver", space, budget, evaluator.predict, 0, profile)
    history: list[Evaluation] = []
    for number in range(count):
        e = evaluator(proposer.ask())
        assert e.measurement is not None
        if change == "failing seeds" and number < 8:
            e = Evaluation(e.policy, 0, 0, "failed", error="it broke")
        elif change == "lossless":
            e = replace(e, measurement=replace(e.measurement, loss=0.0))
        history.append(e)
        proposer.tell(e)
    return history


@pytest.mark.parametrize(
    "change", ["", *(pytest.param(x, marks=pytest.mark.slow) for x in ("harmless", "failing seeds", "lossless"))]
)
@pytest.mark.parametrize("name", list(EDGES))
def test_solver_fits_the_tightest_budgets_of_unusual_spaces(name: str, change: str) -> None:
    space, predict = make_space(EDGES[name]), FakeEvaluator().predict
    least = predict(space.smallest())
    for budget in (Budget(bytes=least.bytes), Budget(macs=least.macs), Budget(bytes=least.bytes + 150, ms=1e-6)):
        history = edge_run(EDGES[name], budget, change)
        assert all(budget.static().excess(predict(e.policy)) <= 0 for e in history)
        assert all(space.decode(space.encode(e.policy)) == e.policy for e in history)


def test_solver_makes_use_of_a_budget_just_above_the_smallest_policy() -> None:
    space, predict = make_space(EDGES["asymmetric"]), FakeEvaluator().predict
    limit = int(1.03 * predict(space.smallest()).bytes)
    sizes = [predict(e.policy).bytes for e in edge_run(EDGES["asymmetric"], Budget(bytes=limit))]
    assert max(sizes) <= limit
    assert max(sizes) > predict(space.smallest()).bytes


def test_solver_explores_down_to_the_smallest_files_under_a_wide_budget() -> None:
    space, predict = make_space(EDGES["asymmetric"]), FakeEvaluator().predict
    least, budget = predict(space.smallest()).bytes, Budget(bytes=2 * predict(space.smallest()).bytes)
    sizes = [predict(e.policy).bytes for e in edge_run(EDGES["asymmetric"], budget, count=40)]
    assert min(sizes) <= 1.02 * least


def test_solver_without_anything_new_that_fits_asks_for_few_exact_sizes() -> None:
    """The exact size of new widths takes seconds in a real network."""
    space, evaluator, asked = make_space(EDGES["channels"]), FakeEvaluator(), []

    def predict(policy: Policy) -> Measurement:
        asked.append(policy)
        return evaluator.predict(policy)

    budget = Budget(bytes=evaluator.predict(space.smallest()).bytes)
    proposer = make_controller("solver", space, budget, predict, 0, make_profile(space))
    narrow = []
    for _ in range(6):
        asked.clear()
        proposer.tell(evaluator(proposer.ask()))
        narrow.append(len({p.key() for p in asked if p.keep}))
    assert max(narrow) <= 5  # four at random, and the smallest, which is known to fit


@pytest.mark.parametrize("budget", [Budget(bytes=1), Budget(macs=1)])
def test_solver_without_anything_that_fits_still_proposes(budget: Budget) -> None:
    for text in EDGES.values():
        assert {e.policy for e in edge_run(text, budget, count=3)}


def test_solver_tries_other_choices_without_an_order() -> None:
    space = make_space(EDGES["all"])
    points = [space.encode(e.policy) for e in edge_run(EDGES["all"], Budget(bytes=1500), count=60)]
    for parameter in space.policy_parameters:
        if "/" not in parameter.name or parameter.name.startswith("batch_norm"):
            assert {point[parameter.name] for point in points} == set(parameter.values), parameter.name


def test_solver_with_a_budget_of_operations_removes_channels_and_only_then() -> None:
    predict = FakeEvaluator().predict
    whole = predict(make_space(EDGES["channels"]).uniform()).macs
    narrow = edge_run(EDGES["channels"], Budget(macs=whole // 2))
    assert all(predict(e.policy).macs <= whole // 2 for e in narrow)
    assert len({e.policy for e in narrow}) == len(narrow)
    many = EDGES["channels"].replace("[4, 8]", "[2, 3, 4, 6, 8]")  # so many that it does not run out of widths
    assert all(set(e.policy.keep.values()) == {1.0} for e in edge_run(many, Budget(bytes=1500)))
