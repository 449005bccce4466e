"""Widths keep to multiply-accumulates and milliseconds, at the least loss that a greedy can find."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from fakes import GRAPH, SPACE_TEXT

from autocompress.controllers.widths import MARGIN, Keep, Widths
from autocompress.policy import Policy
from autocompress.space import Space, parse_space
from autocompress.trial import Budget

SPACE = Space(parse_space(SPACE_TEXT.replace("[0.5, 0.75, 1.0]", "[0.25, 0.5, 0.75, 1.0]"), "x.toml"), GRAPH)
GROUPS = list(SPACE.keep)
LOSSES: Mapping[str, Sequence[float]] = {"conv1": [0.9, 0.3, 0.1, 0.0], "conv2": [0.5, 0.25, 0.2, 0.0]}
Times = Callable[[Policy], float]


def ratios(policy: Policy) -> tuple[float, ...]:
    return tuple(policy.keep[name] for name in GROUPS)


def proportional(policy: Policy) -> float:
    return 10.0 * GRAPH.macs(policy) / GRAPH.dense_macs


def stepped(policy: Policy) -> float:
    """Three quarters of the channels are slower than all of them, as odd widths are; half are much faster."""
    cost = {1.0: 4.0, 0.75: 5.0, 0.5: 1.5, 0.25: 1.4}
    return sum(cost[ratio] for ratio in ratios(policy))


def widths(budget: Budget, times: Times | None = None, losses: Mapping[str, Sequence[float]] = LOSSES) -> Widths:
    return Widths(SPACE, budget, losses, times)


def every() -> list[Keep]:
    return list(itertools.product(range(4), repeat=len(GROUPS)))


def loss(keep: Keep) -> float:
    return sum(LOSSES[name][i] for name, i in zip(GROUPS, keep, strict=True))


def macs(keep: Keep) -> int:
    return GRAPH.macs(widths(Budget()).policy(keep))


def test_fake_network_has_two_groups() -> None:
    assert list(LOSSES) == GROUPS


@pytest.mark.parametrize("budget", [Budget(), Budget(bytes=10)])
def test_without_limits_on_widths_all_channels_stay(budget: Budget) -> None:
    found = widths(budget, stepped)
    assert not found.limited
    assert found.choose(None, 32) == found.choose(np.random.default_rng(0), 32) == found.whole == (3, 3)


@pytest.mark.parametrize("share", [0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2])
def test_multiply_accumulates_alone_are_met_about_as_well_as_by_trying_everything(share: float) -> None:
    limit = int(share * GRAPH.dense_macs)
    found = widths(Budget(macs=limit)).choose(None, 32)
    assert found is not None
    assert macs(found) <= limit
    best = min(loss(keep) for keep in every() if macs(keep) <= limit)
    neighbours = [keep for keep in every() if loss(keep) < loss(found) and macs(keep) <= limit]
    assert loss(found) == pytest.approx(best) or min(map(loss, neighbours)) > 0.5 * loss(found)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
def test_a_group_that_must_not_be_narrowed_is_left_alone_while_another_can_be(share: float) -> None:
    losses = {"conv1": [9.0, 9.0, 9.0, 0.0], "conv2": LOSSES["conv2"]}
    limit = int(share * GRAPH.dense_macs)
    found = widths(Budget(macs=limit), losses=losses).choose(None, 32)
    assert found is not None
    assert macs(found) <= limit
    assert (found[0] == 3) == any(macs((3, i)) <= limit for i in range(4))


def test_multiply_accumulates_that_nothing_reaches_give_none() -> None:
    assert widths(Budget(macs=1)).choose(None, 32) is None
    assert widths(Budget(macs=1, ms=100.0), proportional).choose(None, 32) is None


@pytest.mark.parametrize("ms", [9.0, 7.0, 5.0, 3.0, 2.0])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_milliseconds_are_met_with_a_margin(ms: float, seed: int | None) -> None:
    draw = None if seed is None else np.random.default_rng(seed)
    found = widths(Budget(ms=ms), proportional)
    keep = found.choose(draw, 32)
    assert keep is not None
    assert proportional(found.policy(keep)) <= MARGIN * ms


@pytest.mark.parametrize("ms", [7.9, 6.0, 5.0, 3.2])
def test_a_width_that_is_slower_than_a_wider_one_is_jumped_over(ms: float) -> None:
    found = widths(Budget(ms=ms), stepped)
    keep = found.choose(None, 32)
    assert keep is not None
    assert stepped(found.policy(keep)) <= MARGIN * ms
    assert 0.75 not in ratios(found.policy(keep))


def test_both_limits_hold_together() -> None:
    limit = int(0.6 * GRAPH.dense_macs)
    for ms in (8.0, 6.0, 4.0):
        found = widths(Budget(macs=limit, ms=ms), stepped)
        keep = found.choose(None, 32)
        assert keep is not None
        assert macs(keep) <= limit
        assert stepped(found.policy(keep)) <= MARGIN * ms


def test_latency_that_nothing_reaches_gives_the_fastest() -> None:
    for times in (stepped, proportional):
        found = widths(Budget(ms=0.01), times)
        keep = found.choose(None, 32)
        assert keep is not None
        assert times(found.policy(keep)) == min(times(found.policy(other)) for other in every())


def test_moves_stay_within_the_limits_and_move() -> None:
    draw = np.random.default_rng(0)
    found = widths(Budget(ms=6.0, macs=int(0.8 * GRAPH.dense_macs)), stepped)
    keep = found.choose(None, 32)
    assert keep is not None
    seen = set()
    for _ in range(60):
        keep = found.moved(keep, draw, 32)
        assert stepped(found.policy(keep)) <= MARGIN * 6.0
        assert macs(keep) <= int(0.8 * GRAPH.dense_macs)
        assert all(0 <= i <= 3 for i in keep)
        seen.add(keep)
    assert len(seen) > 1


def test_draws_differ_and_repeat() -> None:
    found = widths(Budget(ms=5.0), proportional)
    drawn = [found.choose(np.random.default_rng(seed), 32) for seed in range(30)]
    assert len(set(drawn)) > 1
    assert drawn == [found.choose(np.random.default_rng(seed), 32) for seed in range(30)]


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_measured_latencies_correct_the_table(factor: float) -> None:
    """The machine is slower, or faster, than the table says."""
    found = widths(Budget(ms=6.0), proportional)
    before = found.choose(None, 32)
    assert before is not None
    for keep in (before, (1, 1), (2, 3)):
        policy = found.policy(keep)
        found.learn(policy, macs(keep), factor * proportional(policy))
    keep = found.choose(None, 32)
    assert keep is not None
    assert factor * proportional(found.policy(keep)) <= MARGIN * 6.0
    assert (loss(keep) < loss(before)) == (factor < 1)


def test_without_a_table_measured_latencies_tell_how_long_widths_take() -> None:
    def real(keep: Keep) -> float:
        return 1.0 + 9.0 * macs(keep) / GRAPH.dense_macs

    found = widths(Budget(ms=5.0))
    assert found.choose(None, 32) == found.whole, "nothing is known yet"
    for keep in (found.whole, (1, 1), (0, 3)):
        found.learn(found.policy(keep), macs(keep), real(keep))
    keep = found.choose(None, 32)
    assert keep is not None
    assert real(keep) <= MARGIN * 5.0 + 1e-9


def test_failed_measurements_teach_nothing() -> None:
    found = widths(Budget(ms=6.0), proportional)
    before = found.choose(None, 32)
    found.learn(found.policy(found.whole), GRAPH.dense_macs, float("nan"))
    assert found.choose(None, 32) == before


def test_times_are_asked_for_the_kernels_that_run() -> None:
    asked: list[tuple[int, set[int]]] = []

    def times(policy: Policy) -> float:
        asked.append((policy.activations, {choice.bits for choice in policy.layers.values()}))
        return 1.0 if policy.activations == 8 else 10.0

    found = widths(Budget(ms=5.0), times)
    assert found.choose(None, 8) == found.whole
    assert asked == [(8, {8})]
    keep = found.choose(None, 32)
    assert keep == found.whole, "no width helps"
    assert asked[-1] == (32, set())
    count = len(asked)
    found.choose(None, 32)
    assert len(asked) == count, "each is asked once"


def test_times_that_know_nothing_of_a_tiny_model_are_not_corrected() -> None:
    found = widths(Budget(ms=1.0), lambda _: 0.0)
    found.learn(found.policy(found.whole), GRAPH.dense_macs, 0.5)
    assert found.choose(None, 32) == found.whole
