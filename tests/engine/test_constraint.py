from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress.engine.constraint import Constraint
from autocompress.engine.prune import magnitude_mask
from autocompress.engine.quantize import Grid, fit_grid, quantise
from autocompress.policy import LayerChoice
from autocompress.stored import round_to_half

GRIDS = [(1, "symmetric"), (2, "symmetric"), (3, "asymmetric"), (4, "symmetric"), (8, "asymmetric")]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grid_of(weight: Tensor, bits: int, scheme: str) -> Grid:
    """A grid on which some weights lie beyond the outermost codes; scales of both signs where it is symmetric."""
    weight = torch.cat([weight[: len(weight) // 2] + 0.3, weight[len(weight) // 2 :] - 0.3])
    grid = fit_grid(weight, bits, symmetric=scheme == "symmetric")
    return Grid(round_to_half(grid.scale * 0.7), grid.zero, bits, grid.symmetric)


def gradients(constraint: Constraint, weight: Tensor, scale: Tensor, arriving: Tensor) -> tuple[Tensor, Tensor]:
    w, s = nn.Parameter(weight.clone()), nn.Parameter(scale.clone())
    (constraint.apply(w, s) * arriving).sum().backward()
    assert w.grad is not None
    assert s.grad is not None
    return w.grad, s.grad


def limits(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Codes from zero at both ends of each row."""
    zero = grid.zero.double().numpy()[:, None]
    if grid.bits == 1:
        return -np.ones_like(zero), np.ones_like(zero)
    return -zero, 2**grid.bits - 1 - zero


def share(grid: Grid, mask: Tensor | None, shape: tuple[int, ...]) -> np.ndarray:
    """The paper's gradient scale of each row."""
    low, high = limits(grid)
    n = np.full(shape[0], np.prod(shape[1:])) if mask is None else mask.flatten(1).sum(1).numpy()
    return 1 / np.sqrt(n * np.maximum(-low, high)[:, 0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("bits", "scheme"), GRIDS)
def test_scales_learn_by_the_papers_formula(bits: int, scheme: str, masked: bool) -> None:
    weight, arriving = draw(0, 6, 5, 3, 3), draw(1, 6, 5, 3, 3)
    mask = magnitude_mask(weight, 100) if masked else None
    grid = grid_of(weight, bits, scheme)
    by_weight, by_scale = gradients(Constraint(mask, grid), weight, grid.scale, arriving)

    low, high = limits(grid)
    v = (weight if mask is None else weight * mask).double().numpy().reshape(6, -1)
    s = grid.scale.double().numpy()[:, None]
    x = v / s
    code = np.where(x >= 0, 1.0, -1.0) if bits == 1 else np.clip(np.rint(x), low, high)
    # equation 3: -v/s + round(v/s) inside, -Q_N below, Q_P above; equation 5: 1 inside, 0 outside
    inside = (x >= low) & (x <= high)
    expected = np.where(inside, code - x, np.where(x < low, low, high))
    kept = np.ones_like(v) if mask is None else mask.numpy().reshape(6, -1)
    g = arriving.double().numpy().reshape(6, -1) * kept
    assert (~inside & (kept > 0)).any()
    np.testing.assert_allclose(by_scale.numpy(), (g * expected).sum(1) * share(grid, mask, weight.shape), rtol=1e-4)
    np.testing.assert_allclose(by_weight.numpy().reshape(6, -1), g * inside, rtol=1e-6)


@pytest.mark.parametrize(("bits", "scheme"), GRIDS)
def test_gradients_are_those_of_a_grid_whose_rounding_is_frozen(bits: int, scheme: str) -> None:
    """Central differences of s (clip(w / s) + rounding error), whose rounding error stays what it was."""
    weight, arriving = draw(2, 4, 30), draw(3, 4, 30)
    grid = grid_of(weight, bits, scheme)
    by_weight, by_scale = gradients(Constraint(None, grid), weight, grid.scale, arriving)
    low, high = limits(grid)
    w, s, g = weight.double().numpy(), grid.scale.double().numpy()[:, None], arriving.double().numpy()
    stored = Constraint(None, grid).stored(weight).double().numpy()
    rounding = stored / s - np.clip(w / s, low, high)

    def loss(w: np.ndarray, s: np.ndarray) -> np.ndarray:
        return g * s * (np.clip(w / s, low, high) + rounding)

    step = 1e-6
    slope = (loss(w, s + step) - loss(w, s - step)).sum(1) / (2 * step)
    np.testing.assert_allclose(by_scale.numpy(), slope * share(grid, None, weight.shape), rtol=1e-3, atol=1e-5)
    slopes = (loss(w + step, s) - loss(w - step, s)) / (2 * step)
    np.testing.assert_allclose(by_weight.numpy(), slopes, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("bits", "scheme"), GRIDS)
def test_what_is_seen_with_a_learnt_scale_is_what_is_stored_on_it(bits: int, scheme: Any, masked: bool) -> None:
    weight = draw(4, 5, 2, 3, 3)
    mask = magnitude_mask(weight, 40) if masked else None
    constraint = Constraint(mask, grid_of(weight, bits, scheme))
    scale = constraint.grid.scale * torch.linspace(0.8, 1.3, 5)  # not a number of 16 bits
    seen = constraint.apply(nn.Parameter(weight), nn.Parameter(scale)).detach()
    final = constraint.rescaled(scale)
    stored = quantise(weight, LayerChoice(bits, scheme=scheme), mask, final.grid)
    assert torch.equal(stored.scale, round_to_half(scale))
    rows = (-1, 1, 1, 1)
    values = stored.scale.reshape(rows) * (stored.codes.float() - stored.zero.float().reshape(rows))
    assert torch.equal(seen, values)
    assert torch.equal(final.stored(final.stored(weight)), seen)


def test_halves_are_seen_as_they_are_stored() -> None:
    weight = nn.Parameter(draw(5, 4, 7))
    mask = magnitude_mask(weight, 9)
    seen = Constraint(mask, None, half=True).apply(weight)
    assert torch.equal(seen.detach(), quantise(weight, LayerChoice(16), mask).dense())
    assert not torch.equal(seen.detach(), weight.detach() * mask)
    seen.sum().backward()
    assert torch.equal(weight.grad, mask.float())


@pytest.mark.parametrize("bits", [1, 4])
def test_a_row_without_a_scale_stays_without(bits: int) -> None:
    weight = draw(6, 3, 8)
    weight[1] = 0
    grid = fit_grid(weight, bits, symmetric=True)
    assert grid.scale[1] == 0
    by_weight, by_scale = gradients(Constraint(None, grid), weight, grid.scale, draw(7, 3, 8))
    assert by_scale[1] == 0
    assert torch.isfinite(by_weight).all()
    assert torch.isfinite(by_scale).all()


def test_a_weight_on_its_outermost_code_still_moves() -> None:
    grid = Grid(torch.tensor([0.5]), torch.tensor([2.0]), 2, True)
    by_weight, _ = gradients(Constraint(None, grid), torch.tensor([[-1.0, 0.5, 0.6]]), grid.scale, torch.ones(1, 3))
    assert by_weight.tolist() == [[1.0, 1.0, 0.0]]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("bits", "scheme"), GRIDS)
def test_training_starts_on_the_stored_codes_but_nearer_to_the_dense_weight(
    bits: int, scheme: str, masked: bool
) -> None:
    dense = draw(3, 6, 5, 3, 3)
    constraint = Constraint(magnitude_mask(dense, 100) if masked else None, grid_of(dense, bits, scheme))
    stored = constraint.stored(dense + 0.5 * draw(4, 6, 5, 3, 3))  # as compensation moves codes away from the nearest
    start = constraint.toward(stored, dense)
    torch.testing.assert_close(constraint.stored(start), stored, rtol=0, atol=0)
    kept = torch.ones_like(dense, dtype=torch.bool) if constraint.mask is None else constraint.mask
    far = kept & ((dense - stored).abs() > 1e-6)
    assert bool(((start - dense).abs() < (stored - dense).abs())[far].all())
    assert bool((start == stored)[~kept].all())
    assert constraint.grid is not None
    near = far & ((dense - stored).abs() < 0.4 * constraint.rows(constraint.grid.scale.abs(), dense))
    torch.testing.assert_close(start[near], dense[near])


def test_training_starts_from_halves_as_they_are_stored() -> None:
    constraint = Constraint(None, None, half=True)
    stored = constraint.stored(draw(5, 4, 3))
    assert constraint.toward(stored, draw(5, 4, 3)) is stored
