from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autocompress.coding import coded_length
from autocompress.engine import quantize
from autocompress.engine.prune import magnitude_mask
from autocompress.engine.quantize import CLIPPING, Grid, fit_grid, grid_of, quantise, rescale
from autocompress.policy import LayerChoice, Scheme
from autocompress.stored import Full, Half, Quantised, Raw, round_to_half

WIDTHS = range(2, 9)
SCHEMES: tuple[Scheme, ...] = ("symmetric", "asymmetric")
EVERY_GRID = [(bits, scheme) for bits in WIDTHS for scheme in SCHEMES]


def weights(seed: int = 0, rows: int = 8, columns: int = 60) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def on_grid(weight: Tensor, bits: int, scheme: Scheme) -> Tensor:
    grid = fit_grid(weight, bits, symmetric=scheme == "symmetric")
    return grid.decode(grid.encode(weight))


def squared_error(found: Tensor | np.ndarray, weight: Tensor) -> float:
    return float(np.square(np.asarray(found, dtype=np.float64) - weight.double().numpy()).sum())


# --- codes ----------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32 - 1), st.sampled_from([(3, 5), (3, 2, 2, 2)]))
def test_codes_and_values_are_numpys(bits: int, seed: int, shape: tuple[int, ...]) -> None:
    draw = np.random.default_rng(seed)
    weight = (draw.normal(size=shape) * 3).astype(np.float32)
    scale = (draw.choice([-1, 1], 3) * draw.uniform(0.05, 1, 3)).astype(np.float32)
    zero = draw.integers(0, 2**bits, 3).astype(np.float32)
    rows = (3, *[1] * (len(shape) - 1))
    codes = np.clip(np.rint(weight / scale.reshape(rows)) + zero.reshape(rows), 0, 2**bits - 1)
    grid = Grid(torch.from_numpy(scale), torch.from_numpy(zero), bits, False)
    np.testing.assert_array_equal(grid.encode(torch.from_numpy(weight)).numpy(), codes)
    values = scale.reshape(rows) * (codes.astype(np.float32) - zero.reshape(rows))
    np.testing.assert_array_equal(grid.decode(torch.from_numpy(codes.astype(np.float32))).numpy(), values)


@pytest.mark.parametrize(("bits", "scheme"), EVERY_GRID)
def test_stored_codes_decode_to_the_grids_values(bits: int, scheme: Scheme) -> None:
    weight = weights().reshape(8, 5, 4, 3)
    stored = quantise(weight, LayerChoice(bits, scheme=scheme), None)
    assert isinstance(stored, Quantised)
    assert stored.codes.shape == weight.shape
    assert stored.codes.dtype == stored.zero.dtype == torch.uint8
    assert int(stored.codes.max()) < 2**bits
    assert torch.equal(stored.dense(), on_grid(weight, bits, scheme))
    assert len(torch.unique(stored.dense()[0])) <= 2**bits


# --- grids for entropy coded codes ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6])
def test_entropy_coded_normal_weights_take_about_the_bits_asked_for(bits: float) -> None:
    stored = quantise(weights(rows=64, columns=4000), LayerChoice(bits, scheme="entropy"), None)
    assert isinstance(stored, Quantised)
    assert stored.coded is not None
    _, counts = torch.unique(stored.codes, return_counts=True)
    shares = counts.double() / counts.sum()
    entropy = float(-(shares * shares.log2()).sum())
    assert entropy == pytest.approx(bits, abs=0.2 if bits > 1 else 0.4)
    assert 8 * stored.coded / stored.codes.numel() == pytest.approx(entropy, abs=0.02)


def test_entropy_grids_have_one_step_in_proportion_to_the_weight() -> None:
    weight, choice = weights(), LayerChoice(3, scheme="entropy")
    grid = grid_of(weight, choice)
    assert torch.equal(grid.scale, grid.scale[:1].expand(8))
    assert float(grid.scale[0]) == pytest.approx(float(weight.square().mean().sqrt()) / 2, rel=1e-3)
    assert torch.equal(grid_of(4 * weight, choice).scale, 4 * grid.scale)
    assert torch.equal(grid.zero, torch.full((8,), 128.0))


def test_entropy_grids_clip_nothing_and_codes_are_no_wider_than_the_largest_needs() -> None:
    """As the few huge weights of transformers need it."""
    weight = weights(rows=4, columns=5000)
    for largest, width in ((5.0, 4), (-60.0, 7)):
        weight[0, 0] = largest
        for bits in (1, 2, 3, 6):
            stored = quantise(weight, LayerChoice(bits, scheme="entropy"), None)
            assert isinstance(stored, Quantised)
            assert ((stored.dense() - weight).abs() <= 0.501 * stored.scale[:, None]).all()
            assert torch.equal(stored.zero, torch.full((4,), 2 ** (stored.bits - 1), dtype=torch.uint8))
            steps = stored.codes.int() - 2 ** (stored.bits - 1)
            assert not ((steps >= -(2 ** (stored.bits - 2))) & (steps < 2 ** (stored.bits - 2))).all()
            assert bits != 2 or stored.bits == width
        assert float(stored.scale[0] / stored.scale[1]) == pytest.approx(1.0 if largest == 5.0 else 7.5, rel=0.15)


def test_at_equal_length_an_entropy_grid_loses_less_where_some_weights_are_large() -> None:
    """A best grid per row clips them."""
    weight = torch.distributions.Laplace(0.0, 1.0).icdf(
        torch.rand(32, 2000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    )
    clipped = quantise(weight, LayerChoice(4), None)
    coded = quantise(weight, LayerChoice(3, scheme="entropy"), None)
    assert isinstance(clipped, Quantised)
    assert isinstance(coded, Quantised)
    assert coded.coded is not None
    assert clipped.coded is not None
    assert coded.coded < clipped.coded
    assert squared_error(coded.dense(), weight) < 0.9 * squared_error(clipped.dense(), weight)


def test_rows_of_greater_weight_get_finer_steps() -> None:
    weight, choice = weights(), LayerChoice(2, scheme="entropy")
    importance = torch.ones(8, 60)
    importance[0] = 16.0
    scale = grid_of(weight, choice, importance).scale
    assert float(scale[1] / scale[0]) == pytest.approx(4.0, rel=2e-3)
    assert torch.equal(grid_of(weight, choice, torch.rand(60)).scale, grid_of(weight, choice).scale)


def test_an_entropy_grid_of_zeros_is_zero() -> None:
    stored = quantise(torch.zeros(3, 5), LayerChoice(2, scheme="entropy"), None)
    assert torch.equal(stored.dense(), torch.zeros(3, 5))


# --- fitted grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "scheme"), EVERY_GRID)
def test_zero_is_exactly_on_every_grid(bits: int, scheme: Scheme) -> None:
    for shift in (-3.0, -0.5, 0.0, 0.5, 3.0):
        grid = fit_grid(weights() + shift, bits, symmetric=scheme == "symmetric")
        assert torch.equal(grid.decode(grid.encode(torch.zeros(8, 1))), torch.zeros(8, 1))
        assert torch.equal(grid.zero, grid.zero.round())
        assert ((grid.zero >= 0) & (grid.zero < 2**bits)).all()


@pytest.mark.parametrize(("bits", "scheme"), EVERY_GRID)
def test_without_clipping_no_weight_moves_by_more_than_half_a_step(
    bits: int, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "CLIPPING", (1.0,))
    for shift in (-3.0, 0.0, 0.3, 3.0):
        weight = weights() + shift
        grid = fit_grid(weight, bits, symmetric=scheme == "symmetric")
        moved = (grid.decode(grid.encode(weight)) - weight).abs()
        rounding_of_the_scale = 2.0**-11 * weight.abs().amax(dim=1, keepdim=True)
        assert (moved <= grid.scale.abs()[:, None] / 2 + rounding_of_the_scale).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_asymmetric_grids_span_the_channels_range_and_zero(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "CLIPPING", (1.0,))
    weight = torch.cat([weights(rows=4), weights(1, rows=4) + 2, weights(2, rows=4) - 2])
    grid = fit_grid(weight, bits, symmetric=False)
    ends = grid.decode(torch.tensor([[0.0, 2**bits - 1]]).expand(12, 2))
    step = grid.scale * (0.5 + 2.0**-11 * 2**bits)
    assert ((ends[:, 0] - weight.amin(dim=1).clamp(max=0)).abs() <= step).all()
    assert ((ends[:, 1] - weight.amax(dim=1).clamp(min=0)).abs() <= step).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_longer_side_of_a_symmetric_grid_takes_the_larger_weight(
    bits: int, sign: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "CLIPPING", (1.0,))
    weight = sign * torch.tensor([[-1.0, 0.25, 0.0]])
    assert float(on_grid(weight, bits, "symmetric")[0, 0]) == pytest.approx(-sign, rel=2.0**-11)
    grid = fit_grid(weight, bits, symmetric=True)
    assert float(grid.zero) == 2 ** (bits - 1)
    assert float(grid.encode(weight)[0, 0]) == 0


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_not_above_plain_absmax_scaling(bits: int, seed: int) -> None:
    weight = weights(seed, columns=1000)
    top = 2 ** (bits - 1) - 1
    scale = weight.double().abs().amax(dim=1, keepdim=True).numpy() / top
    absmax = scale * np.clip(np.rint(weight.double().numpy() / scale), -top, top)
    assert squared_error(on_grid(weight, bits, "symmetric"), weight) <= squared_error(absmax, weight)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_the_error_is_not_above_plain_minmax_scaling(bits: int, shift: float) -> None:
    weight = weights(columns=1000) + shift
    exact = weight.double().numpy()
    low, high = np.minimum(exact.min(1, keepdims=True), 0), np.maximum(exact.max(1, keepdims=True), 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.rint(-low / scale)
    minmax = scale * (np.clip(np.rint(exact / scale) + zero, 0, 2**bits - 1) - zero)
    assert squared_error(on_grid(weight, bits, "asymmetric"), weight) <= squared_error(minmax, weight) * 1.002


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_tried_share_of_the_range_beats_the_chosen_grid(bits: int) -> None:
    weight, half = weights(columns=1000), 2 ** (bits - 1)
    exact = weight.double().numpy()
    longer = np.where(np.abs(exact.min(1)) >= exact.max(1), 1.0, -1.0)
    shorter = np.minimum(-exact.min(1), exact.max(1))
    full = longer * np.maximum(np.abs(exact).max(1) / half, shorter / max(1, half - 1))
    tried = []
    for share in CLIPPING if bits < 8 else CLIPPING[:5]:
        scale = (full * share)[:, None]
        tried.append(np.square(scale * np.clip(np.rint(exact / scale), -half, half - 1) - exact).sum(1))
    chosen = np.square(on_grid(weight, bits, "symmetric").double().numpy() - exact).sum(1)
    np.testing.assert_allclose(chosen, np.min(tried, axis=0), rtol=5e-3)


def test_more_bits_never_lose_more() -> None:
    for scheme in SCHEMES:
        errors = [squared_error(on_grid(weights(), bits, scheme), weights()) for bits in WIDTHS]
        assert errors == sorted(errors, reverse=True)


def test_an_asymmetric_grid_suits_weights_of_one_sign() -> None:
    weight = weights().abs()
    for bits in WIDTHS:
        asymmetric, symmetric = (squared_error(on_grid(weight, bits, s), weight) for s in ("asymmetric", "symmetric"))
        assert asymmetric < symmetric


# --- channels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "scheme"), EVERY_GRID)
def test_a_channel_does_not_depend_on_the_others(bits: int, scheme: Scheme) -> None:
    weight, other = weights(), weights(9)
    other[3] = weight[3]
    a, b = (fit_grid(w, bits, symmetric=scheme == "symmetric") for w in (weight, other))
    assert a.scale[3] == b.scale[3]
    assert a.zero[3] == b.zero[3]
    assert torch.equal(a.encode(weight)[3], b.encode(other)[3])


@pytest.mark.parametrize(("bits", "scheme"), EVERY_GRID)
@pytest.mark.parametrize("power", [20, -26])
def test_huge_and_tiny_weights_get_the_codes_of_ordinary_ones(bits: int, scheme: Scheme, power: int) -> None:
    ordinary, moved = (
        quantise(weights() * factor, LayerChoice(bits, scheme=scheme), None) for factor in (1.0, 2.0**power)
    )
    assert isinstance(ordinary, Quantised)
    assert isinstance(moved, Quantised)
    assert torch.equal(moved.codes, ordinary.codes)
    assert torch.equal(moved.zero, ordinary.zero)
    assert torch.equal(moved.scale, ordinary.scale * 2.0**power)


@pytest.mark.parametrize(("bits", "scheme"), EVERY_GRID)
def test_an_all_zero_channel_stays_zero_beside_others(bits: int, scheme: Scheme) -> None:
    weight = weights()
    weight[2] = 0
    stored = quantise(weight, LayerChoice(bits, scheme=scheme), None)
    assert isinstance(stored, Quantised)
    assert torch.equal(stored.dense()[2], torch.zeros(60))
    assert (stored.codes[2] == stored.zero[2]).all()
    assert torch.isfinite(stored.dense()).all()
    rest = torch.cat([weight[:2], weight[3:]])
    assert torch.equal(torch.cat([stored.dense()[:2], stored.dense()[3:]]), on_grid(rest, bits, scheme))


@pytest.mark.parametrize(("bits", "scheme"), EVERY_GRID)
@pytest.mark.parametrize("value", [0.3, -0.3, 1e6, -1e-8])
def test_a_constant_channel_is_kept_to_eleven_bits(bits: int, scheme: Scheme, value: float) -> None:
    found = on_grid(torch.full((2, 9), value), bits, scheme)
    np.testing.assert_allclose(found.numpy(), value, rtol=2.0**-11)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_channel_too_small_for_the_shared_exponent_becomes_zeros_not_nan(bits: int, scheme: Scheme) -> None:
    weight = weights()
    weight[1] *= 1e-20
    weight[1, 0] = 0
    grid = fit_grid(weight, bits, symmetric=scheme == "symmetric")
    values = grid.decode(grid.encode(weight))
    assert torch.isfinite(values).all()
    assert values[1].abs().max() <= 1e-19


def test_a_pruned_weight_of_a_vanishing_channel_still_has_the_zero_points_code() -> None:
    weight = weights()
    weight[1] *= 1e-20
    stored = quantise(weight, LayerChoice(4), magnitude_mask(weight, 5))
    assert isinstance(stored, Quantised)
    assert stored.mask is not None
    assert (stored.codes[~stored.mask] == 8).all()


def test_an_all_zero_channel_does_not_coarsen_the_scales_of_tiny_ones() -> None:
    weight = torch.cat([torch.zeros(1, 60), weights() * 1e-9])
    found = on_grid(weight, 8, "symmetric")[1:]
    np.testing.assert_array_equal(found.numpy(), on_grid(weight[1:], 8, "symmetric").numpy())


# --- one bit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [0, 200])
def test_one_bit_is_a_sign_times_the_scale_of_least_error(removed: int) -> None:
    weight = weights() + 0.2
    mask = magnitude_mask(weight, removed)
    stored = quantise(weight, LayerChoice(1), mask)
    assert isinstance(stored, Quantised)
    on = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    mean = (weight.abs() * on).sum(dim=1) / on.sum(dim=1)
    assert torch.equal(stored.scale, round_to_half(mean))
    assert torch.equal(stored.dense(), torch.where(on, torch.sign(weight) * stored.scale[:, None], 0.0))
    assert torch.equal(stored.codes, (torch.where(on, torch.sign(weight), 0.0) + 1).to(torch.uint8))


def test_importance_weighs_the_scale_of_one_bit() -> None:
    grid = fit_grid(torch.tensor([[1.0, -4.0, 0.0]]), 1, symmetric=True, importance=torch.tensor([3.0, 1.0, 9.0]))
    assert grid.scale.tolist() == [1.75]


def test_one_bit_is_symmetric_whatever_was_asked_for() -> None:
    for scheme in SCHEMES:
        stored = quantise(weights().abs() + 1, LayerChoice(1, scheme=scheme), None)
        assert isinstance(stored, Quantised)
        assert stored.symmetric
        assert stored.zero.tolist() == [1] * 8
        assert torch.equal(stored.codes, torch.full((8, 60), 2, dtype=torch.uint8))


def test_one_bit_keeps_channels_of_zeros_and_of_extreme_magnitudes_finite() -> None:
    weight = torch.cat([weights(rows=1) * 1e37, torch.zeros(1, 60)])
    assert torch.equal(quantise(weight, LayerChoice(1), None).dense()[1], torch.zeros(60))
    for factor in (1e37, 1e-36):
        found = quantise(weights() * factor, LayerChoice(1), None).dense()
        torch.testing.assert_close(found / factor, quantise(weights(), LayerChoice(1), None).dense(), rtol=2e-3, atol=0)


@pytest.mark.parametrize(("bits", "scheme"), [(1, "symmetric"), *EVERY_GRID])
def test_symbols_count_from_the_zero_point(bits: int, scheme: Scheme) -> None:
    weight = weights() + 0.4
    stored = quantise(weight, LayerChoice(bits, scheme=scheme), magnitude_mask(weight, 200))
    assert isinstance(stored, Quantised)
    symbols, size = stored.symbols().long(), 3 if bits == 1 else 2**bits
    assert torch.equal((symbols == 0).reshape(weight.shape), stored.codes == stored.zero[:, None])
    assert torch.equal((symbols.reshape(weight.shape) + stored.zero[:, None]) % size, stored.codes.long())
    assert stored.coded == coded_length(symbols.numpy(), bits)


# --- quantise and rescale -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 5, 8, 16, 32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_pruned_weights_are_exact_zeros_at_every_width(bits: int, scheme: Scheme) -> None:
    weight = weights() + 0.4
    mask = magnitude_mask(weight, 200)
    assert mask is not None
    stored = quantise(weight, LayerChoice(bits, scheme=scheme), mask)
    assert not isinstance(stored, Raw)
    assert stored.mask is mask
    assert (stored.dense()[~mask] == 0).all()
    if isinstance(stored, Quantised):
        zeros = stored.zero[:, None].expand_as(mask)
        assert torch.equal(stored.codes[~mask], zeros[~mask])


def test_sixteen_bits_are_halves_and_thirty_two_are_exact() -> None:
    half, full = (quantise(weights(), LayerChoice(bits), None) for bits in (16, 32))
    assert isinstance(half, Half)
    assert isinstance(full, Full)
    assert torch.equal(half.dense(), round_to_half(weights()))
    assert torch.equal(full.dense(), weights())


def test_a_given_grid_is_used_as_it_is() -> None:
    grid = Grid(torch.full((8,), 0.25), torch.full((8,), 8.0), 4, True)
    stored = quantise(weights(), LayerChoice(4), None, grid)
    expected = 0.25 * np.clip(np.rint(weights().numpy() / 0.25), -8, 7)
    np.testing.assert_array_equal(stored.dense().numpy(), expected)


@pytest.mark.parametrize(("bits", "scheme"), [(1, "symmetric"), *EVERY_GRID])
def test_rescaling_keeps_codes_and_zero_points(bits: int, scheme: Scheme) -> None:
    factor = torch.linspace(-2, 3, 8)
    stored = quantise(weights(), LayerChoice(bits, scheme=scheme), magnitude_mask(weights(), 50))
    moved = rescale(stored, factor)
    assert isinstance(stored, Quantised)
    assert isinstance(moved, Quantised)
    assert torch.equal(moved.codes, stored.codes)
    assert torch.equal(moved.zero, stored.zero)
    assert moved.mask is stored.mask
    assert moved.coded == stored.coded == stored.with_length().coded
    np.testing.assert_allclose(moved.dense().numpy(), (stored.dense() * factor[:, None]).numpy(), rtol=2.0**-11)
    assert torch.equal(round_to_half(moved.scale), moved.scale)


@pytest.mark.parametrize("bits", [16, 32])
def test_rescaling_floats_multiplies_their_rows(bits: int) -> None:
    factor = torch.linspace(-2, 3, 8)
    stored = quantise(weights(), LayerChoice(bits), magnitude_mask(weights(), 50))
    moved = rescale(stored, factor)
    expected = stored.dense() * factor[:, None]
    assert type(moved) is type(stored)
    np.testing.assert_allclose(moved.dense().numpy(), expected.numpy(), rtol=2.0**-11 if bits == 16 else 0)


def test_integer_buffers_cannot_be_rescaled() -> None:
    with pytest.raises(TypeError, match="not rescaled"):
        rescale(Raw(torch.arange(3)), torch.ones(3))
