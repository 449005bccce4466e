"""The multiple-choice knapsack against brute force, at its edges, and within its limits by true costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from autocompress.controllers.knapsack import (
    MOST_COST,
    Menu,
    Solution,
    bound,
    efficient,
    front,
    greedy,
    hull,
    prepare,
    solve,
    sweep,
)

Levels = list[tuple[int, float]]
"""Cost and loss of every level."""


def menu(levels: Sequence[tuple[int, float]]) -> Menu:
    costs, losses = zip(*levels, strict=True)
    return Menu(np.array(costs, dtype=np.int64), np.array(losses, dtype=np.float64))


def totals(menus: Sequence[Menu], levels: Sequence[int]) -> tuple[int, float]:
    """True cost and loss, summed in plain Python."""
    chosen = list(zip(menus, levels, strict=True))
    return sum(int(m.costs[i]) for m, i in chosen), math.fsum(float(m.losses[i]) for m, i in chosen)


def brute_force(menus: Sequence[Menu], budgets: Sequence[int]) -> list[float | None]:
    """Least loss within every budget, over all choices."""
    points = [list(zip(m.costs.tolist(), m.losses.tolist(), strict=True)) for m in menus]
    sums = {(sum(c for c, _ in choice), sum(x for _, x in choice)) for choice in itertools.product(*points)}
    return [min((loss for cost, loss in sums if cost <= budget), default=None) for budget in budgets]


def check(menus: Sequence[Menu], solution: Solution, capacity: int) -> None:
    """What it says of itself is so, and it fits."""
    cost, loss = totals(menus, solution.levels)
    assert solution.cost == cost <= capacity
    assert solution.loss == pytest.approx(loss, abs=1e-9)


def random_menus(layers: int, levels: int, seed: int = 0) -> list[Menu]:
    """Layers of very different sizes; loss falls with bytes, with noise, from just below zero."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(layers):
        share = rng.uniform(0.05, 1.0, levels)
        costs = (math.exp(rng.uniform(6, 12)) * share).astype(np.int64)
        found.append(Menu(costs, rng.lognormal() * np.exp(-5 * share) * rng.lognormal(0, 0.2, levels) - 0.01))
    return found


# a coarse grid, so that equal costs, equal losses, zero costs and dominated levels are common
LEVELS = st.lists(st.tuples(st.integers(0, 12), st.integers(-3, 9).map(float)), min_size=1, max_size=5)
MENUS = st.lists(LEVELS.map(menu), min_size=1, max_size=4)


@given(MENUS)
@settings(max_examples=100, deadline=None)
def test_a_table_is_optimal_for_every_budget(menus: list[Menu]) -> None:
    most = sum(int(m.costs.max()) for m in menus) + 1
    table = solve(menus, most)
    assert table.exact
    budgets = range(-1, most + 1)
    for budget, best in zip(budgets, brute_force(menus, budgets), strict=True):
        solution = table.choose(budget)
        if best is None:
            assert solution is None
        else:
            assert solution is not None
            check(menus, solution, budget)
            assert solution.loss == pytest.approx(best, abs=1e-9)


def least_by_integer_programming(menus: Sequence[Menu], budget: int) -> float:
    """Least loss within the budget by branch and cut: one binary variable a level, one level a layer."""
    sizes = [len(m.costs) for m in menus]
    one_each = np.zeros((len(menus), sum(sizes)))
    for layer, end in enumerate(itertools.accumulate(sizes)):
        one_each[layer, end - sizes[layer] : end] = 1
    costs, losses = (np.concatenate([getattr(m, name) for m in menus]) for name in ("costs", "losses"))
    within = [LinearConstraint(one_each, 1, 1), LinearConstraint(costs[None].astype(float), -np.inf, budget)]
    found = milp(losses, constraints=within, integrality=np.ones(len(losses)), bounds=Bounds(0, 1), options=TIGHT)
    assert found.success, found.message
    return float(found.fun)


TIGHT = {"mip_rel_gap": 0.0}


@pytest.mark.parametrize("seed", range(6))
def test_a_table_is_what_integer_programming_finds_where_brute_force_cannot(seed: int) -> None:
    menus = [Menu(m.costs // 64, m.losses) for m in random_menus(25, 8, seed)]
    least, most = (sum(int(pick(m.costs)) for m in menus) for pick in (np.min, np.max))
    table = solve(menus, most)
    assert table.exact
    for share in (0.05, 0.2, 0.5):
        budget = int(least + share * (most - least))
        solution = table.choose(budget)
        assert solution is not None
        check(menus, solution, budget)
        assert solution.loss == pytest.approx(least_by_integer_programming(menus, budget), abs=1e-6)


@given(MENUS, st.integers(1, 6), st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_coarse_cells_and_greedy_fit_by_true_costs_and_lie_between_the_bound_and_the_start(
    menus: list[Menu], cells: int, budget: int
) -> None:
    instance, (best,) = prepare(menus), brute_force(menus, [budget])
    found = [solve(menus, 60, cells).choose(budget), greedy(instance, budget)]
    if best is None:
        assert found == [None, None]
        assert bound(instance, budget) == math.inf
        return
    assert bound(instance, budget) <= best + 1e-9
    for solution in found:
        assert solution is not None
        check(menus, solution, budget)
        assert solution.loss >= best - 1e-9
        assert solution.loss <= sum(float(m.losses[m.costs == m.costs.min()].min()) for m in menus) + 1e-9


@given(MENUS)
@settings(max_examples=100, deadline=None)
def test_efficient_levels_are_those_that_nothing_dominates(menus: list[Menu]) -> None:
    for m in menus:
        points = list(zip(m.costs.tolist(), m.losses.tolist(), strict=True))
        kept = [points[i] for i in efficient(m)]
        assert kept == sorted({p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)})


@given(MENUS)
@settings(max_examples=100, deadline=None)
def test_the_hull_is_convex_and_below_every_efficient_level(menus: list[Menu]) -> None:
    for m in menus:
        on, kept = hull(m), efficient(m)
        assert {*on.tolist()} <= {*kept.tolist()}
        assert on[0] == kept[0]
        assert m.losses[on[-1]] == m.losses[kept[-1]]
        slopes = np.diff(m.losses[on]) / np.diff(m.costs[on])
        assert (np.diff(slopes) >= -1e-9).all()
        below = np.interp(m.costs[kept], m.costs[on], m.losses[on])
        assert (below <= m.losses[kept] + 1e-9).all()


def test_a_hull_level_between_two_others_is_left_out_when_it_lies_above_them() -> None:
    steps = menu([(0, 10.0), (4, 9.0), (6, 2.0), (6, 5.0), (9, 2.0)])
    assert efficient(steps).tolist() == [0, 1, 2]
    assert hull(steps).tolist() == [0, 2]


def test_the_table_finds_what_greedy_cannot() -> None:
    """One large step that fills the budget beats the many efficient ones that greedy takes first."""
    menus = [menu([(0, 10.0), (10, 0.0)]), menu([(0, 1.2), (1, 0.0)]), menu([(0, 5.0), (6, 0.5)])]
    solution = solve(menus, 10).choose(10)
    assert solution is not None
    assert solution.levels == (1, 0, 0)


def test_greedy_goes_on_past_a_step_that_does_not_fit() -> None:
    menus = [menu([(0, 100.0), (50, 0.0)]), *[menu([(0, 1.0), (1, 0.0)]) for _ in range(9)]]
    solution = greedy(prepare(menus), 9)
    assert solution is not None
    assert solution.levels == (0, *[1] * 9)


def test_greedy_swaps_a_wrong_start_away() -> None:
    menus = [menu([(0, 3.0), (2, 0.0)]), menu([(0, 10.0), (10, 0.0)])]
    solution = greedy(prepare(menus), 10)  # the first layer's step is the most efficient
    assert solution is not None
    assert solution.levels == (0, 1)


def test_levels_are_indices_into_the_menu_as_given() -> None:
    menus = [menu([(9, 0.0), (1, 5.0), (5, 2.0)]), menu([(3, 1.0)])]
    table = solve(menus, 20)
    assert [table.choose(b) for b in (3, 4, 8, 20)] == [
        None,
        Solution((1, 0), 4, 6.0),
        Solution((2, 0), 8, 3.0),
        Solution((0, 0), 12, 1.0),
    ]


@pytest.mark.parametrize("capacity", [0, 7, 10**15])
def test_levels_of_no_cost_are_free(capacity: int) -> None:
    menus = [menu([(0, 2.0), (0, 1.0), (0, 3.0)])] * 3
    for solution in (solve(menus, capacity).choose(capacity), greedy(prepare(menus), capacity)):
        assert solution == Solution((1, 1, 1), 0, 3.0)


def test_more_than_enough_gives_every_layer_its_least_loss() -> None:
    menus = random_menus(40, 12)
    for solution in (solve(menus, 10**9).choose(10**9), greedy(prepare(menus), 10**9)):
        assert solution is not None
        assert solution.levels == tuple(int(m.losses.argmin()) for m in menus)


def test_exactly_the_least_fits_and_one_byte_less_does_not() -> None:
    menus = random_menus(40, 12)
    least = sum(int(m.costs.min()) for m in menus)
    table = solve(menus, 10**7, cells=100)
    cheapest = table.choose(least)
    assert cheapest is not None
    assert cheapest.cost == least
    assert table.choose(least - 1) is None
    assert greedy(prepare(menus), least - 1) is None
    assert solve(menus, least - 1).choose(least - 1) is None


def test_costs_in_steps_need_no_more_cells_than_steps() -> None:
    menus = [menu([(1000 + 4096 * i, float((8 - i) ** 2)) for i in range(9)]) for _ in range(3)]
    table = solve(menus, 10**6, cells=24)
    assert table.exact
    assert table.cell == 4096
    solution = table.choose(3000 + 4096 * 12)
    assert solution is not None
    assert solution.loss == 48.0


def test_a_table_that_is_too_coarse_is_near_the_exact_one_all_the_same() -> None:
    menus = [Menu(m.costs // 16, m.losses) for m in random_menus(12, 10)]
    most = sum(int(m.costs.max()) for m in menus)
    exact, coarse = solve(menus, most), solve(menus, most, cells=most // 40)
    assert exact.exact
    assert not coarse.exact
    for budget in np.linspace(most * 0.2, most * 0.9, 8).astype(int).tolist():
        best, found = exact.choose(budget), coarse.choose(budget)
        assert best is not None
        assert found is not None
        check(menus, found, budget)
        assert best.loss - 1e-9 <= found.loss <= best.loss + 0.02 * abs(best.loss)


def test_a_front_falls_with_the_budget_and_keeps_the_order_of_the_budgets() -> None:
    menus = random_menus(60, 10)
    least, most = (sum(int(c) for c in (pick(m.costs) for m in menus)) for pick in (np.min, np.max))
    budgets = [least - 1, *np.linspace(least, most, 30).astype(int).tolist()]
    found = front(menus, budgets)
    assert found[0] is None
    losses = []
    for budget, solution in zip(budgets[1:], found[1:], strict=True):
        assert solution is not None
        check(menus, solution, budget)
        losses.append(solution.loss)
    assert losses == sorted(losses, reverse=True)
    assert front(menus, budgets[::-1]) == found[::-1]
    assert front(menus, []) == []


def test_a_thousand_layers_of_a_hundred_levels_come_near_the_relaxation() -> None:
    menus = random_menus(1000, 100)
    instance = prepare(menus)
    budget = int(instance.costs[0].max(axis=1).sum() * 0.3)
    for solution in (solve(menus, budget, cells=1000).choose(budget), greedy(instance, budget)):
        assert solution is not None
        check(menus, solution, budget)
        assert solution.loss - bound(instance, budget) <= 1e-3 * abs(bound(instance, budget))


def test_other_losses_give_what_new_menus_would() -> None:
    menus = [menu([(1, 5.0), (4, 1.0)]), menu([(2, 3.0), (3, 1.5), (7, 0.0)])]
    changed = [menu([(1, 5.0), (4, 4.5)]), menu([(2, 3.0), (3, 2.9), (7, -2.0)])]
    again = prepare(menus).with_losses(np.array([[5.0, 4.5, 99.0], [3.0, 2.9, -2.0]]))  # 99 is padding
    for budget in range(13):
        assert greedy(again, budget) == greedy(prepare(changed), budget)


def test_an_answer_is_the_same_every_time() -> None:
    menus = random_menus(80, 10, seed=3)
    budget = sum(int(m.costs.max()) for m in menus) // 3
    times = [m.costs[::-1] * 1e-3 for m in menus]
    assert len({solve(menus, budget, 5000).choose(budget) for _ in range(3)}) == 1
    assert len({greedy(prepare(menus), budget) for _ in range(3)}) == 1
    assert len({sweep(prepare(menus, times), (budget, budget / 500)) for _ in range(3)}) == 1


# --- two constraints ------------------------------------------------------------------------------------

TIMED = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.integers(-3, 9), st.integers(0, 9)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def best_within(levels: list[list[tuple[int, int, int]]], limits: tuple[int, int]) -> int | None:
    """Least loss of (cost, loss, time) levels by brute force."""
    sums = [tuple(map(sum, zip(*choice, strict=True))) for choice in itertools.product(*levels)]
    return min((loss for cost, loss, time in sums if cost <= limits[0] and time <= limits[1]), default=None)


@given(TIMED, st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_a_sweep_keeps_both_limits_and_is_never_better_than_the_best(
    levels: list[list[tuple[int, int, int]]], most_bytes: int, most_time: int
) -> None:
    menus = [menu([(c, float(loss)) for c, loss, _ in layer]) for layer in levels]
    times = [np.array([t / 8 for _, _, t in layer]) for layer in levels]  # eighths add up without rounding
    solution = sweep(prepare(menus, times), (most_bytes, most_time / 8))
    best = best_within(levels, (most_bytes, most_time))
    if solution is None:
        return
    check(menus, solution, most_bytes)
    assert sum(t[i] for t, i in zip(times, solution.levels, strict=True)) * 8 <= most_time
    assert best is not None
    assert solution.loss >= best - 1e-9


def two_cost_layers(layers: int, seed: int) -> list[list[tuple[int, int, int]]]:
    """Levels that trade bytes for time at equal loss, as dense low-bit against sparse high-bit weights do."""
    rng = np.random.default_rng(seed)
    return [
        [(int(rng.integers(1, 40)), int(rng.integers(0, 60)), int(rng.integers(1, 40))) for _ in range(5)]
        for _ in range(layers)
    ]


@pytest.mark.slow
def test_a_sweep_is_near_the_best_where_a_brute_force_can_tell() -> None:
    gaps = []
    for seed in range(12):
        levels = two_cost_layers(7, seed)
        menus = [menu([(c, float(loss)) for c, loss, _ in layer]) for layer in levels]
        instance = prepare(menus, [np.array([float(t) for _, _, t in layer]) for layer in levels])
        worst = max(sum(loss for _, loss, _ in layer) for layer in levels)
        best = best_within(levels, (120, 120))
        found = sweep(instance, (120, 120))
        assert best is not None
        assert found is not None
        gaps.append((found.loss - best) / worst)
    assert np.median(gaps) <= 0.02
    assert max(gaps) <= 0.2


def test_a_loose_second_limit_changes_nothing() -> None:
    menus = random_menus(30, 10)
    budget = sum(int(m.costs.max()) for m in menus) // 4
    times = [np.ones(m.costs.size) for m in menus]
    one = greedy(prepare(menus), budget)
    two = sweep(prepare(menus, times), (budget, math.inf))
    assert one is not None
    assert two is not None
    assert two.loss <= one.loss


def test_a_sweep_finds_the_only_mix_that_fits() -> None:
    """Bytes alone and milliseconds alone each choose a level that breaks the other limit."""
    levels = [(0, 1.0), (1, 1.0), (100, 1.0)]
    instance = prepare([menu(levels)] * 4, [[100.0, 1.0, 0.0]] * 4)
    solution = sweep(instance, (4, 4.0))
    assert solution is not None
    assert solution.levels == (1, 1, 1, 1)
    assert sweep(instance, (3, 3.0)) is None
    assert sweep(instance, (-1, 400.0)) is None


# --- what is wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("costs", "losses", "says"),
    [
        ([], [], "one of each per level"),
        ([1], [1.0, 2.0], "one of each per level"),
        ([[1]], [[1.0]], "one of each per level"),
        ([-1], [1.0], "from 0 to"),
        ([MOST_COST + 1], [1.0], "from 0 to"),
        ([1], [math.nan], "not finite"),
        ([1], [math.inf], "not finite"),
    ],
)
def test_a_wrong_menu_says_what_it_wants(costs: list[int], losses: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Menu(np.array(costs, dtype=np.int64), np.array(losses, dtype=np.float64))


def test_wrong_calls_say_what_they_want() -> None:
    menus = [menu([(1, 1.0), (2, 0.0)])]
    instance = prepare(menus)
    with pytest.raises(ValueError, match="give int64 bytes"):
        Menu(np.array([1.5]), np.array([1.0]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one for every layer"):
        prepare([])
    with pytest.raises(ValueError, match="at least one"):
        solve(menus, 5, cells=0)
    with pytest.raises(ValueError, match="a capacity of 6"):
        solve(menus, 5).choose(6)
    with pytest.raises(ValueError, match="prepared with times"):
        sweep(instance, (1, 1.0))
    with pytest.raises(ValueError, match="each of 2 levels"):
        prepare(menus, [[1.0, -1.0]])
    with pytest.raises(ValueError, match="pad to that"):
        instance.with_losses(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="not finite"):
        instance.with_losses(np.array([[0.0, np.nan]]))
