"""Successive halving as plain data: against simulations, brute force and arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from fakes import evaluation

from autocompress import rungs
from autocompress.front import Point, Trial, dominates
from autocompress.policy import LayerChoice, Policy, Recovery
from autocompress.rungs import (
    Climb,
    Member,
    Pace,
    Step,
    affordable,
    at_epochs,
    counts,
    duration_text,
    ladder,
    next_start,
    next_step,
    plan_text,
    promotable,
    shifted,
)
from autocompress.trial import Budget


def policy(number: int, epochs: int = 1) -> Policy:
    return Policy({"conv1": LayerChoice(8, number / 1000)}, recovery=Recovery(epochs=epochs))


def members(*points: Point | None, rung: int = 1, done: bool = True) -> list[Member]:
    return [Member(policy(i, 2 ** (rung - 1)), rung, point, done) for i, point in enumerate(points)]


# --- how many, and for how long ---


@pytest.mark.parametrize(
    ("epochs", "expected"), [(0, ()), (1, (1,)), (2, (1, 2)), (3, (1, 3)), (4, (1, 2, 4)), (10, (1, 2, 5, 10))]
)
def test_each_rung_has_half_of_the_epochs_above_it(epochs: int, expected: tuple[int, ...]) -> None:
    assert ladder(epochs) == expected


def test_half_of_each_rung_climbs() -> None:
    assert counts(6, 3) == (6, 3, 2)
    assert counts(1, 4) == (1, 1, 1, 1)
    assert counts(0, 2) == (0, 0)
    assert counts(5, 0) == ()


def test_first_rung_is_as_large_as_the_time_left_holds_with_all_that_follows() -> None:
    pace, epochs = Pace(10.0, 1.0), (1, 2, 4)
    costs = {n: sum(c * (1 + 10 * e) for c, e in zip(counts(n, 3), epochs, strict=True)) for n in range(1, 9)}
    for left in range(0, 500, 7):
        expected = max([n for n, cost in costs.items() if cost <= left], default=1)
        assert affordable(8, (0, 0, 0), epochs, pace, left) == expected
    assert affordable(8, (5, 0, 0), epochs, pace, 0.0) == 5  # what was made stays made
    assert affordable(6, (6, 3, 1), epochs, pace, 0.0) == 6
    assert affordable(8, (0, 0, 0), epochs, pace, math.inf) == 8


def test_plan_is_said_as_people_say_it() -> None:
    assert plan_text((6, 3), (1, 2), 720.0) == "recovery: 6 trainings of 1 epoch, then 3 of 2: about 12 min"
    assert plan_text((1,), (3,), 12.4) == "recovery: 1 training of 3 epochs: about 12 s"
    assert [duration_text(s) for s in (0.1, 89.0, 91.0, 5399.0, 5401.0)] == ["1 s", "89 s", "2 min", "90 min", "1.5 h"]


# --- who climbs ---


def climb(first: int, rungs_: int, measure: Callable[[int, int], Point | None]) -> list[tuple[int, int]]:
    """One worker until nothing is left: (rung, number of the policy) in order."""
    known: list[Member] = []
    order = []
    while (step := next_step(known, rungs_, first - sum(m.rung == 1 for m in known))) is not None:
        number = len(known) if step.policy is None else int(1000 * step.policy.layers["conv1"].sparsity + 0.5)
        known.append(Member(policy(number, step.rung), step.rung, measure(number, step.rung)))
        order.append((step.rung, number))
        assert len(order) < 100
    return order


def test_one_worker_fills_each_rung_before_the_next_and_ends() -> None:
    order = climb(6, 3, lambda n, rung: (float(n - rung), 100.0 * 2**n))
    assert [rung for rung, _ in order] == [1] * 6 + [2] * 3 + [3] * 2
    assert len(set(order)) == len(order)


def test_nobody_climbs_who_failed() -> None:
    order = climb(4, 2, lambda n, rung: None if n in (0, 1, 2) else (1.0, 100.0))  # noqa: ARG005
    assert order == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 3)]
    assert climb(3, 3, lambda n, rung: None) == [(1, 0), (1, 1), (1, 2)]  # noqa: ARG005


def test_no_member_that_another_dominates_climbs_before_one_of_the_front() -> None:
    draw = Random(0)
    for _ in range(50):
        points = [(draw.random(), math.exp(draw.uniform(0, 8))) for _ in range(9)]
        found = members(*points)
        chosen = promotable(found, 1)
        assert chosen is not None
        assert chosen.point is not None
        assert not any(dominates(p, chosen.point) for p in points)


def test_the_best_quality_climbs_first_and_then_the_largest_hypervolume_contribution() -> None:
    """Areas by hand: sizes double, so equal widths; the second one lowers the loss most."""
    points = [(1.0, 100.0), (0.2, 200.0), (0.15, 400.0), (0.1, 800.0)]
    here = members(*points)
    first = promotable(here, 1)
    assert first is not None
    assert first.point == points[3]
    second = promotable([*here, Member(at_epochs(first.policy, 2), 2, first.point)], 1)
    assert second is not None
    assert second.point == points[1]


def test_of_the_same_size_only_one_climbs_before_others_did() -> None:
    near = [(0.50, 1000.0), (0.49, 1010.0), (0.48, 1020.0), (0.47, 1030.0)]
    far = [(0.9, 1040.0), (0.95, 2000.0)]  # dominated by all the others
    here = members(*near, *far)
    first = promotable(here, 1)
    assert first is not None
    assert first.point in near
    climbed = [*here, Member(at_epochs(first.policy, 2), 2, first.point)]
    second = promotable(climbed, 1)
    assert second is not None
    assert second.point == far[1]  # the other size goes before a second one of the same
    third = promotable([*climbed, Member(at_epochs(second.policy, 2), 2, second.point)], 1)
    assert third is not None
    assert third.point in near


def test_another_worker_promotes_among_those_done_instead_of_waiting() -> None:
    running = Member(policy(9), 1, None, done=False)
    assert next_step([*members((0.5, 100.0), (0.4, 200.0)), running], 2, 1) == Step(1)
    step = next_step([*members((0.5, 100.0), (0.4, 200.0)), running], 2, 0)
    assert step is not None
    assert step.rung == 2
    assert next_step([*members((0.5, 100.0)), running], 2, 0) is None  # one of one is no half yet
    alone = next_step(members((0.5, 100.0)), 2, 0)
    assert alone is not None
    assert alone.rung == 2


def test_same_decision_whatever_the_recipe_of_the_rest() -> None:
    """A recipe is part of who a member is: the same policy with another recipe is another member."""
    a, b = policy(1), replace(policy(1), recovery=Recovery(epochs=1, lr=0.05))
    known = [Member(a, 1, (0.5, 100.0)), Member(b, 1, (0.4, 100.0)), Member(at_epochs(b, 2), 2, (0.3, 100.0))]
    assert promotable(known, 1) is None
    assert promotable([*known, Member(policy(2), 1, (0.6, 90.0))], 1) is not None


# --- who starts ---


def test_every_other_start_is_at_the_budget_and_the_others_fill_the_front() -> None:
    sizes = [100, 200, 300, 400, 800, 1600]
    started: list[int] = []
    while len(started) < len(sizes):
        waiting = [s for s in sizes if s not in started]
        started.append(waiting[next_start(waiting, started)])
    assert started == [1600, 100, 800, 300, 400, 200]


def trial(number: int, size: int, loss: float, rung: int = 0, status: str = "ok", **recovery: float) -> Trial:
    found = evaluation(1 - loss, size, rung=rung, status=status)
    trained = Recovery(epochs=rung, **recovery)  # type: ignore[arg-type]
    return Trial(number, replace(found, policy=replace(policy(number), recovery=trained)))


def test_near_equals_of_a_front_member_get_a_chance_as_the_seed_says() -> None:
    member = trial(0, 1000, 0.1)
    near, others = [trial(1, 1020, 0.104), trial(2, 980, 0.101)], [trial(3, 1100, 0.1), trial(4, 1000, 0.2)]
    drawn = [shifted(member, [*near, *others], seed) for seed in range(200)]
    assert drawn == [shifted(member, [*near, *others], seed) for seed in range(200)]
    assert {t.number for t in drawn} == {0, 1, 2}
    assert 60 < sum(t is member for t in drawn) < 140
    assert shifted(member, others, 1) is member


# --- a run ---


def test_rungs_of_a_run_are_told_by_its_trials() -> None:
    shots = [trial(i, 100 * 2**i, 0.5 - 0.1 * i) for i in range(4)]
    trained = [
        Trial(4 + i, replace(t.evaluation, rung=1, policy=at_epochs(t.evaluation.policy, 1), seconds=9.0))
        for i, t in enumerate(shots[1:])
    ]
    climbing = Climb([*shots, *trained], Budget(), "max", (1, 2), 4)
    assert [m.rung for m in climbing.members()] == [1, 1, 1]
    assert [t.number for t in climbing.untried()] == [0]
    assert climbing.planned() == (4, 2)
    assert climbing.pace() == Pace(9.0, 0.0)
    assert climbing.state() == (3, 6, 9.0 + 2 * 18.0)
    assert climbing.state(running=1) == (3, 6, 2 * 18.0)
    assert climbing.next_step(45.0) == Step(1)
    assert climbing.next_step(8.0) is None  # no time for anything
    unknown = Climb(shots, Budget(), "max", (1, 2), 4)
    assert unknown.next_step(0.1) == Step(1)
    assert unknown.next_step(-0.1) is None


def test_who_is_over_the_budget_or_failed_does_not_climb() -> None:
    shots = [trial(i, 100 * (i + 1), 0.5 - 0.1 * i) for i in range(3)]
    over = replace(trial(3, 301, 0.01, rung=1).evaluation, policy=at_epochs(shots[2].evaluation.policy, 1))
    lost = replace(
        trial(4, 100, 0.3, rung=1, status="failed").evaluation, policy=at_epochs(shots[0].evaluation.policy, 1)
    )
    fits = replace(trial(5, 200, 0.3, rung=1).evaluation, policy=at_epochs(shots[1].evaluation.policy, 1))
    trials = [*shots, *(Trial(3 + i, e) for i, e in enumerate((over, lost, fits)))]
    climbing = Climb(trials, Budget(bytes=300), "max", (1, 2), 3)
    assert [m.point is None for m in climbing.members()] == [True, True, False]
    assert climbing.next_step(math.inf) == Step(2, fits.policy)


def test_front_members_with_room_for_what_training_adds_go_first() -> None:
    shots = [trial(0, 100, 0.5), trial(1, 997, 0.3), trial(2, 998, 0.2)]
    climbing = Climb(shots, Budget(bytes=1000), "max", (1,), 5)
    assert [t.number for t in climbing.untried()] == [0, 1]
    full = Climb(shots[2:], Budget(bytes=1000), "max", (1,), 5)
    assert [t.number for t in full.untried()] == [2]
    assert rungs.TRAINING_ROOM == 0.003


@pytest.mark.parametrize(("after", "room", "waiting"), [(90, 0.0, [1, 2]), (104, 0.04, []), (101, 0.01, [1])])
def test_room_is_what_trainings_have_added(after: int, room: float, waiting: list[int]) -> None:
    shots = [trial(0, 100, 0.5), trial(1, 990, 0.3), trial(2, 998, 0.2)]
    done = replace(trial(3, after, 0.4, rung=1).evaluation, policy=at_epochs(shots[0].evaluation.policy, 1))
    climbing = Climb([*shots, Trial(3, done)], Budget(bytes=1000), "max", (1,), 5)
    assert climbing.room() == pytest.approx(room)
    assert [t.number for t in climbing.untried()] == waiting
