from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from autocompress.engine.schedules import DECAYS, Plateau, learning_rate
from autocompress.policy import Decay, Recovery

TOTALS = (1, 2, 4, 30, 101)
RATES = (1.0, 0.5, 0.01, 1e-3)


def optimizer() -> torch.optim.SGD:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


def rates_of(schedule: Callable[[torch.optim.SGD], Any], steps: int) -> list[float]:
    sgd = optimizer()
    scheduler = schedule(sgd)
    found = []
    for _ in range(steps):
        found.append(float(sgd.param_groups[0]["lr"]))
        sgd.step()
        scheduler.step()
    return found


def torch_rates(decay: Decay, total: int, rate: float) -> list[float]:
    if decay == "constant":
        return rates_of(lambda o: lr_scheduler.ConstantLR(o, factor=1.0), total)
    if decay == "step":
        return rates_of(lambda o: lr_scheduler.StepLR(o, math.ceil(total / 3), gamma=math.sqrt(rate)), total)
    if decay == "exponential":
        return rates_of(lambda o: lr_scheduler.ExponentialLR(o, rate ** (1 / total)), total + 1)
    if decay == "cosine":
        return rates_of(lambda o: lr_scheduler.CosineAnnealingLR(o, total, eta_min=rate), total + 1)
    parabola = rates_of(lambda o: lr_scheduler.PolynomialLR(o, total, power=2), total + 1)
    return [rate + (1 - rate) * share for share in parabola]


@pytest.mark.parametrize("decay", list(DECAYS))
@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("rate", RATES)
def test_decays_follow_torch_at_every_step(decay: Decay, total: int, rate: float) -> None:
    expected = torch_rates(decay, total, rate)
    found = [DECAYS[decay](step, total, rate) for step in range(len(expected))]
    assert found == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("decay", list(DECAYS))
def test_decays_start_at_one_and_never_rise(decay: Decay) -> None:
    factors = [DECAYS[decay](step, 30, 0.05) for step in range(30)]
    assert factors[0] == 1.0
    assert factors == sorted(factors, reverse=True)
    assert min(factors) >= 0.05 - 1e-15


@pytest.mark.parametrize("decay", ["exponential", "cosine", "polynomial"])
def test_smooth_decays_reach_their_rate_at_the_end(decay: Decay) -> None:
    assert DECAYS[decay](30, 30, 0.05) == pytest.approx(0.05, rel=1e-12)


def test_the_step_decay_spends_its_last_third_at_its_rate() -> None:
    assert [DECAYS["step"](step, 30, 0.25) for step in (0, 9, 10, 19, 20, 29)] == pytest.approx(
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    )


NEARLY_EQUAL = st.sampled_from((1.0, 1 - 1e-4, 1 - 0.99e-4, 1 - 1.01e-4, 0.5, 0.25, 0.0, -1.0))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-2, 10, allow_nan=False) | NEARLY_EQUAL | st.just(math.inf), max_size=40),
    st.floats(0.01, 0.99),
    st.integers(0, 4),
)
def test_the_plateau_follows_torch_on_any_sequence(values: list[float], factor: float, patience: int) -> None:
    sgd = optimizer()
    expected = lr_scheduler.ReduceLROnPlateau(
        sgd, mode="min", factor=factor, patience=patience, threshold=1e-4, threshold_mode="rel", eps=0.0
    )
    plateau = Plateau(factor, patience)
    for value in values:
        sgd.step()
        expected.step(value)
        plateau.report(value)
        assert plateau.scale == pytest.approx(float(sgd.param_groups[0]["lr"]), rel=1e-12)


def test_a_plateau_factor_of_one_never_changes_anything() -> None:
    plateau = Plateau(1.0, 0)
    for value in (1.0, 2.0, 3.0, 4.0):
        plateau.report(value)
    assert plateau.scale == 1.0


def test_the_learning_rate_is_peak_times_decay_times_adjustment() -> None:
    plateau = Plateau(0.5, 0)
    plateau.report(1.0)
    plateau.report(1.0)
    plateau.report(1.0)
    recovery = Recovery(lr=0.3, decay="exponential", decay_rate=0.01)
    assert learning_rate(recovery, 5, 10, plateau) == pytest.approx(0.3 * 0.1 * 0.25, rel=1e-12)
