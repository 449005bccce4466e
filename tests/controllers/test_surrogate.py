"""The surrogate starts as the profile says, moves towards what it is told, and never loses its shape."""

from __future__ import annotations

import numpy as np
import pytest

from autocompress.controllers import surrogate as module
from autocompress.controllers.surrogate import Surrogate

PRIOR = np.array([[0.4, 0.2, 0.1], [0.3, 0.1, np.inf], [0.2, 0.05, 0.01]])
KNOWN = np.where(np.isfinite(PRIOR), PRIOR, 0.0)


def truth(levels: np.ndarray, factors: np.ndarray) -> float:
    return float((KNOWN[np.arange(3), levels] * factors).sum())


def taught(factors: np.ndarray, count: int, prior: np.ndarray = PRIOR) -> Surrogate:
    draw, model = np.random.default_rng(0), Surrogate(prior)
    for _ in range(count):
        levels = np.array([draw.integers(3), draw.integers(2), draw.integers(3)])
        model.observe(levels, truth(levels, factors))
    return model


def test_knows_what_the_profile_says_before_it_learns() -> None:
    np.testing.assert_allclose(Surrogate(PRIOR).mean(), KNOWN)


def test_learns_which_layer_the_profile_got_wrong() -> None:
    mean = taught(np.array([3.0, 1.0, 1.0]), 60).mean()
    share = mean[:, 0] / KNOWN[:, 0]
    assert share[0] > 1.8 * share[1]
    assert share[0] > 1.8 * share[2]


def test_a_common_factor_changes_no_ranking() -> None:
    """Only ratios matter to the knapsack: the power law takes up what all layers share."""
    mean = taught(np.full(3, 5.0), 60).mean()
    share = mean[KNOWN > 0] / KNOWN[KNOWN > 0]
    assert share.max() / share.min() < 1.5


def test_samples_spread_around_the_mean_and_narrow_with_data() -> None:
    spreads = []
    for count in (0, 80):
        model = taught(np.ones(3), count)
        draws = np.array([model.sample(np.random.default_rng(i)) for i in range(200)])
        np.testing.assert_allclose(draws.mean(axis=0)[KNOWN > 0], model.mean()[KNOWN > 0], rtol=0.15)
        spreads.append(draws.std(axis=0)[0, 0] / KNOWN[0, 0])
    assert spreads[1] < 0.5 * spreads[0]


def test_equal_draws_give_equal_samples() -> None:
    model = taught(np.ones(3), 10)
    np.testing.assert_array_equal(model.sample(np.random.default_rng(7)), model.sample(np.random.default_rng(7)))


def test_incremental_updates_equal_a_fit_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_power_law", lambda *_: (0.0, 1.0))  # else the moment of the last fit would matter
    model = taught(np.array([2.0, 1.0, 0.5]), 37)
    before = model.mean()
    model._refit()
    np.testing.assert_allclose(model.mean(), before, rtol=1e-8)


@pytest.mark.parametrize("loss", [0.0, -0.1, float("nan"), float("inf")])
def test_a_loss_without_a_logarithm_is_left_out(loss: float) -> None:
    model = Surrogate(PRIOR)
    model.observe(np.array([0, 0, 0]), loss)
    np.testing.assert_allclose(model.mean(), KNOWN)


def test_losses_stay_positive_and_padding_stays_out() -> None:
    model = taught(np.array([0.001, 1.0, 1.0]), 60)
    for sampled in (model.mean(), model.sample(np.random.default_rng(0))):
        assert sampled.shape == PRIOR.shape
        assert (sampled[np.isfinite(PRIOR)] > 0).all()
        assert np.isfinite(sampled).all()


def test_many_layers_keep_one_correction_each() -> None:
    prior = np.tile([0.4, 0.2, 0.1], (module.MANY_LAYERS, 1))
    model = Surrogate(prior)
    draw = np.random.default_rng(0)
    for _ in range(5):
        model.observe(draw.integers(3, size=len(prior)), 20.0)
    assert model.sample(draw).shape == prior.shape


def test_power_law_is_found_where_losses_grow_faster_than_their_sum() -> None:
    sums = np.geomspace(0.01, 1.0, 60)
    offset, power = module._power_law(sums, 2.0 * sums**1.4)
    assert power == pytest.approx(1.4, abs=0.12)
    assert offset + power * np.log(0.1) == pytest.approx(np.log(2.0) + 1.4 * np.log(0.1), abs=0.1)
