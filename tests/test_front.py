"""Dominance, hypervolume and knee against brute force and by hand; picking by every wish."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from fakes import evaluation
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import AutocompressError
from autocompress.front import (
    Archive,
    Point,
    Trial,
    Wish,
    dominates,
    feasible,
    front_of,
    hypervolume,
    knee,
    nearest,
    non_dominated,
    pick,
)
from autocompress.trial import Budget

GRID = 5


def clouds(dimensions: int, most: int = 9) -> st.SearchStrategy[list[Point]]:
    """Points on a coarse grid, so that ties and duplicates are common."""
    return st.lists(st.tuples(*[st.integers(0, GRID).map(float)] * dimensions), max_size=most)


ANY_CLOUD = st.sampled_from((2, 3)).flatmap(clouds)


def beats(a: Point, b: Point) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


@given(ANY_CLOUD)
def test_dominance_is_no_worse_everywhere_and_better_somewhere(points: list[Point]) -> None:
    for a, b in itertools.product(points, repeat=2):
        assert dominates(a, b) == beats(a, b)


@given(ANY_CLOUD)
def test_non_dominated_are_those_that_nothing_beats_each_once(points: list[Point]) -> None:
    expected = [i for i, p in enumerate(points) if not any(beats(q, p) for q in points) and p not in points[:i]]
    assert non_dominated(points) == expected


@given(ANY_CLOUD)
def test_non_dominated_of_a_front_is_the_front(points: list[Point]) -> None:
    front = [points[i] for i in non_dominated(points)]
    assert non_dominated(front) == list(range(len(front)))


def cells(points: Sequence[Point], reference: Point) -> int:
    """Unit cells below the reference that some point dominates."""
    corners = itertools.product(*[range(int(r)) for r in reference])
    return sum(any(all(x <= c for x, c in zip(p, corner, strict=True)) for p in points) for corner in corners)


@settings(max_examples=60)
@given(ANY_CLOUD)
def test_hypervolume_counts_the_dominated_cells(points: list[Point]) -> None:
    reference = (4.0,) * (len(points[0]) if points else 2)  # some points lie outside
    assert hypervolume(points, reference) == cells(points, reference)


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_hypervolume_is_that_of_an_independent_library(objectives: int) -> None:
    """`moocore`, by the authors of the dimension-sweep algorithms, in C."""
    moocore = pytest.importorskip("moocore")
    draw = random.Random(objectives)
    for count in (1, 2, 5, 20, 60):
        points = [tuple(draw.choice((draw.random(), 0.5, 1.5)) for _ in range(objectives)) for _ in range(count)]
        reference = (1.2,) * objectives
        expected = float(moocore.hypervolume(np.array(points), ref=np.array(reference)))
        assert hypervolume(points, reference) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=60)
@given(clouds(2), st.tuples(st.floats(-3, 3), st.floats(-3, 3)), st.sampled_from((0.5, 2.0, 1e6)))
def test_hypervolume_moves_and_scales_with_the_points(points: list[Point], by: Point, factor: float) -> None:
    moved = [tuple(factor * (x + d) for x, d in zip(p, by, strict=True)) for p in points]
    reference = tuple(factor * (6.0 + d) for d in by)
    expected = factor**2 * hypervolume(points, (6.0, 6.0))
    assert math.isclose(hypervolume(moved, reference), expected, rel_tol=1e-6, abs_tol=1e-6 * factor**2)


def test_hypervolume_of_nothing_is_zero() -> None:
    assert hypervolume([], (1.0, 1.0)) == 0.0
    assert hypervolume([(2.0, 2.0)], (1.0, 3.0)) == 0.0


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.0, 1.0), (0.1, 0.1), (1.0, 0.0)], 1),  # an L
        ([(0.0, 100.0), (0.2, 60.0), (0.3, 10.0), (1.0, 0.0)], 2),
        ([(1.0, 0.0), (0.3, 10.0), (0.0, 100.0)], 1),  # order does not matter
        ([(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)], 0),  # a straight line has no knee: the first
        ([(0.0, 1.0), (1.0, 0.0)], 0),
        ([(3.0, 3.0)], 0),
        ([(3.0, 3.0), (3.0, 3.0)], 0),
    ],
)
def test_knee_is_where_the_curve_bends(points: list[Point], expected: int) -> None:
    assert knee(points) == expected


# --- trials ---


def trials(*rows: tuple[float, int, float]) -> list[Trial]:
    """Trials from (quality, bytes, milliseconds)."""
    return [Trial(i, evaluation(*row)) for i, row in enumerate(rows)]


RUN = trials((0.90, 1000, 1.0), (0.95, 3000, 2.0), (0.80, 500, 3.0), (0.97, 9000, 2.5), (0.70, 4000, 0.5))


def numbers(found: Sequence[Trial]) -> list[int]:
    return [t.number for t in found]


def test_front_is_sorted_from_small_to_large() -> None:
    assert numbers(front_of(RUN, "max")) == [2, 0, 1, 3]


def test_front_with_latency_keeps_the_fast() -> None:
    assert numbers(front_of(RUN, "max", latency=True)) == [2, 0, 1, 4, 3]


def test_front_of_a_metric_to_minimise() -> None:
    assert numbers(front_of(RUN, "min")) == [2, 4]


def test_of_equal_trials_the_first_is_on_the_front() -> None:
    same = trials((0.9, 1000, 2.0), (0.9, 1000, 1.0), (0.9, 1000, 2.0))
    assert numbers(front_of(same, "max")) == [0]
    assert numbers(front_of(same, "max", latency=True)) == [1]


def test_only_measured_trials_count() -> None:
    refused = [Trial(0, evaluation(status="failed")), Trial(1, evaluation(math.nan, 1, math.nan, status="infeasible"))]
    assert front_of(refused, "max") == feasible(refused, Budget()) == []
    assert nearest(refused, Budget(bytes=1)) is None


def test_feasible_is_within_every_limit() -> None:
    assert numbers(feasible(RUN, Budget(bytes=3000, ms=2.0))) == [0, 1]
    assert numbers(feasible(RUN, Budget())) == [0, 1, 2, 3, 4]


ROWS = st.lists(
    st.tuples(
        st.integers(0, GRID).map(lambda n: n / GRID),
        st.integers(1, GRID).map(lambda n: 1000 * n),
        st.integers(1, GRID).map(float),
        st.sampled_from(("ok", "ok", "failed", "infeasible")),
        st.booleans(),
    ),
    max_size=12,
)


@given(ROWS, st.sampled_from(("max", "min")), st.booleans())
@settings(max_examples=200, deadline=None)
def test_archive_says_at_any_time_what_a_front_of_all_trials_says(
    rows: list[tuple[float, int, float, str, bool]], direction: str, latency: bool
) -> None:
    budget = Budget(bytes=4000, ms=4.0 if latency else None)
    archive, seen = Archive(direction, budget, latency=latency), list[Trial]()
    for i, (quality, size, ms, status, screened) in enumerate(rows):
        seen.append(Trial(i, replace(evaluation(quality, size, ms, status=status), screened=screened)))
        archive.add(seen[-1])
        assert archive.front() == front_of(feasible(seen, budget), direction, latency=latency)
        best = archive.best()
        if best is None:
            assert not feasible(seen, budget)
        else:
            expected = pick(seen, direction, Wish(), budget)  # which may take a faster one of equal quality and bytes
            assert (best.measured.quality, best.measured.bytes) == (expected.measured.quality, expected.measured.bytes)
            assert latency is False or best == expected


def test_nearest_misses_by_the_least_share() -> None:
    found = nearest(RUN, Budget(bytes=100, ms=0.75))  # shares missed: 9, 29, 4, 89, 39
    assert found is not None
    assert found.number == 2


@pytest.mark.parametrize(
    ("wish", "budget", "expected"),
    [
        (Wish(), Budget(), 3),
        (Wish(), Budget(bytes=3500), 1),
        (Wish(max_size=1000), Budget(), 0),
        (Wish(max_size=999), Budget(), 2),
        (Wish(max_latency=2.0), Budget(), 1),
        (Wish(max_latency=0.9), Budget(), 4),
        (Wish(min_quality=0.85), Budget(), 0),  # alone: the smallest such file
        (Wish(min_quality=0.96), Budget(), 3),
        (Wish(min_quality=0.85, max_size=5000), Budget(), 1),  # otherwise: the best within
        (Wish(min_quality=0.85, max_latency=1.5), Budget(), 0),
        (Wish(knee=True), Budget(), 0),
        (Wish(knee=True, max_size=700), Budget(), 2),
        (Wish(trial=4), Budget(), 4),
        (Wish(trial=3), Budget(bytes=3500), 3),  # asked for by number, even over budget
    ],
)
def test_pick_grants_every_wish(wish: Wish, budget: Budget, expected: int) -> None:
    assert pick(RUN, "max", wish, budget).number == expected


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (Wish(), 4),
        (Wish(max_size=2000), 2),
        (Wish(min_quality=0.92), 2),  # at least this good: at most this number
        (Wish(min_quality=0.75), 4),
        (Wish(max_latency=1.0), 4),
    ],
)
def test_pick_from_a_metric_to_minimise(wish: Wish, expected: int) -> None:
    assert pick(RUN, "min", wish, Budget()).number == expected


def test_knee_ignores_outliers_in_bytes_by_looking_at_their_logarithm() -> None:
    run = trials((0.10, 100, 1.0), (0.90, 1000, 1.0), (0.95, 10_000, 1.0), (0.951, 10_000_000, 1.0))
    assert pick(run, "max", Wish(knee=True), Budget()).number == 1


def test_equal_quality_goes_to_fewer_bytes_then_lower_latency_then_the_first() -> None:
    run = trials((0.9, 2000, 1.0), (0.9, 1000, 3.0), (0.9, 1000, 2.0), (0.9, 1000, 2.0))
    assert pick(run, "max", Wish(), Budget()).number == 2


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (Wish(max_size=400), ("--max-size 400", "500 bytes")),
        (Wish(max_latency=0.1), ("--max-latency 0.1", "0.5 ms")),
        (Wish(min_quality=0.99), ("--min-quality 0.99", "0.9700")),
        (Wish(max_size=600, min_quality=0.85), ("--min-quality 0.85", "0.8000")),  # names the limit that rules out
        (Wish(max_size=4000, max_latency=0.7), ("--max-latency 0.7", "1 ms")),
        (Wish(trial=17), ("trial 17",)),
    ],
)
def test_impossible_wish_says_what_is_reachable(wish: Wish, words: tuple[str, ...]) -> None:
    run = [*RUN[:4], Trial(4, evaluation(0.7, 4001, 0.5))]
    with pytest.raises(AutocompressError) as raised:
        pick(run, "max", wish, Budget())
    assert all(word in str(raised.value) for word in words)


def test_impossible_quality_to_minimise_names_the_lowest() -> None:
    with pytest.raises(AutocompressError, match=r"0\.7000"):
        pick(RUN, "min", Wish(min_quality=0.5), Budget())


def test_large_size_limit_is_named_in_full() -> None:
    run = trials((0.9, 5_000_000, 1.0))
    with pytest.raises(AutocompressError, match=r"1,?234,?567"):
        pick(run, "max", Wish(max_size=1_234_567), Budget())


def test_nothing_within_the_budget_names_the_budget() -> None:
    with pytest.raises(AutocompressError, match="10 bytes"):
        pick(RUN, "max", Wish(), Budget(bytes=10))


def test_failed_trial_cannot_be_picked() -> None:
    with pytest.raises(AutocompressError, match="trial 0"):
        pick([Trial(0, evaluation(status="failed")), *RUN[1:]], "max", Wish(trial=0), Budget())


@pytest.mark.parametrize(
    ("others", "fix"),
    [
        ([Trial(3, evaluation(0.89, 700))], "--trial 3"),
        ([Trial(3, evaluation(0.8, 600, bits=4)), Trial(5, evaluation(0.7, 500, bits=3))], "3, 5"),
        ([], "--resume"),
    ],
)
def test_screened_trial_cannot_be_picked_and_the_error_says_which_can(others: list[Trial], fix: str) -> None:
    screened = Trial(0, replace(evaluation(0.9, 700), screened=True))
    with pytest.raises(AutocompressError, match=f"trial 0 was scored on a part.*{fix}"):
        pick([screened, *others], "max", Wish(trial=0), Budget())


def test_a_front_that_bends_the_other_way_has_its_knee_at_the_best_quality() -> None:
    assert knee([(0.8, 1.0), (0.75, 2.0), (0.2, 3.0)]) == 2
