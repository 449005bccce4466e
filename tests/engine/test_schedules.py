from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from autocompress.engine.schedules import CYCLE_START, DECAYS, RISE, Plateau, factor, learning_rate
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


def one_cycle(sgd: torch.optim.SGD, total: int, rate: float, rise: float = RISE) -> lr_scheduler.OneCycleLR:
    return lr_scheduler.OneCycleLR(
        sgd,
        max_lr=1.0,
        total_steps=total,
        pct_start=rise,
        cycle_momentum=False,
        div_factor=1 / CYCLE_START,
        final_div_factor=CYCLE_START / rate,
    )


def torch_rates(decay: Decay, total: int, rate: float) -> list[float]:
    if decay == "one-cycle":
        return [*rates_of(lambda o: one_cycle(o, total, rate), total - 1), rate]
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


FALLING = [decay for decay in DECAYS if decay != "one-cycle"]


@pytest.mark.parametrize("decay", FALLING)
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
    st.integers(0, 4),
    st.booleans(),
)
def test_the_plateau_follows_torch_on_any_sequence(
    values: list[float], factor: float, patience: int, cooldown: int, rising: bool
) -> None:
    sgd = optimizer()
    expected = lr_scheduler.ReduceLROnPlateau(
        sgd,
        mode="max" if rising else "min",
        factor=factor,
        patience=patience,
        cooldown=cooldown,
        threshold=1e-4,
        threshold_mode="rel",
        eps=0.0,
    )
    plateau = Plateau(factor, patience, cooldown, rising)
    for value in values:
        sgd.step()
        expected.step(value)
        plateau.report(value)
        assert plateau.scale == pytest.approx(float(sgd.param_groups[0]["lr"]), rel=1e-12)


@pytest.mark.parametrize("rise", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("total", [7, 30, 101])
def test_a_one_cycle_rate_rises_during_the_warm_up(rise: float, total: int) -> None:
    recovery = Recovery(decay="one-cycle", decay_rate=0.02, warmup=rise)
    expected = [*rates_of(lambda o: one_cycle(o, total, 0.02, rise), total - 1), 0.02]
    found = [factor(recovery, step, total) for step in range(total)]
    assert found == pytest.approx(expected, rel=0, abs=1e-12)
    assert factor(recovery, total, total) == 0.02  # an epoch that was longer than the first


def decay_scheduler(decay: Decay, sgd: torch.optim.SGD, total: int, rate: float) -> Any:
    if decay == "constant":
        return lr_scheduler.ConstantLR(sgd, factor=1.0)
    if decay == "step":
        return lr_scheduler.StepLR(sgd, math.ceil(total / 3), gamma=math.sqrt(rate))
    if decay == "exponential":
        return lr_scheduler.ExponentialLR(sgd, rate ** (1 / total))
    if decay == "cosine":
        return lr_scheduler.CosineAnnealingLR(sgd, total, eta_min=rate)
    return lr_scheduler.LambdaLR(sgd, lambda step: rate + (1 - rate) * (1 - step / total) ** 2)


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR itself uses it
@pytest.mark.parametrize("decay", FALLING)
@pytest.mark.parametrize(("total", "warmup", "warm"), [(30, 0.1, 3), (30, 0.5, 15), (101, 0.25, 25), (4, 0.3, 1)])
def test_a_warm_up_goes_before_any_decay_as_in_torch(decay: Decay, total: int, warmup: float, warm: int) -> None:
    def sequence(sgd: torch.optim.SGD) -> Any:
        rising = lr_scheduler.LinearLR(sgd, start_factor=1 / (warm + 1), total_iters=warm)
        return lr_scheduler.SequentialLR(sgd, [rising, decay_scheduler(decay, sgd, total - warm, 0.05)], [warm])

    recovery = Recovery(decay=decay, decay_rate=0.05, warmup=warmup)
    found = [factor(recovery, step, total) for step in range(total)]
    assert found == pytest.approx(rates_of(sequence, total), rel=0, abs=1e-12)
    assert max(found) == 1.0


@pytest.mark.parametrize("decay", list(DECAYS))
@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_trainings_have_a_rate_at_every_step(decay: Decay, total: int) -> None:
    recovery = Recovery(decay=decay, decay_rate=0.05, warmup=0.5)
    assert all(0 < factor(recovery, step, total) <= 1 for step in range(total + 1))


@pytest.mark.parametrize("decay", ["constant", "step", "exponential"])
@pytest.mark.parametrize(("patience", "cooldown"), [(0, 0), (1, 0), (0, 2), (1, 1)])
def test_decay_and_adjustment_compose_as_torch_schedulers_do(decay: Decay, patience: int, cooldown: int) -> None:
    metric = [0.1, 0.3, 0.2, 0.2, 0.31, 0.3, 0.3, 0.3, 0.3, 0.3, 0.4, 0.1] * 2
    sgd = optimizer()
    decayed = decay_scheduler(decay, sgd, len(metric), 0.05)
    adjusted = lr_scheduler.ReduceLROnPlateau(
        sgd, mode="max", factor=0.5, patience=patience, cooldown=cooldown, threshold=1e-4, eps=0.0
    )
    recovery = Recovery(lr=1.0, decay=decay, decay_rate=0.05)
    plateau = Plateau(0.5, patience, cooldown, rising=True)
    for step, value in enumerate(metric):
        expected = float(sgd.param_groups[0]["lr"])
        assert learning_rate(recovery, step, len(metric), plateau) == pytest.approx(expected, rel=0, abs=1e-12)
        sgd.step()
        decayed.step()
        adjusted.step(value)
        plateau.report(value)
    assert plateau.scale < 1


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
