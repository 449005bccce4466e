"""Layer solutions against references written another way: loops, brute force, numpy."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import make_space
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress import ClassificationTask, Evaluator, Workbench, compress
from autocompress.engine import compensate, database
from autocompress.engine import moments as statistics
from autocompress.engine.compensate import (
    descend,
    factorise,
    least_squares,
    refit_scale,
    removal_order,
    solve,
    with_feedback,
)
from autocompress.engine.database import LayerDatabase
from autocompress.engine.moments import damped, moments, patches
from autocompress.engine.prune import magnitude_mask
from autocompress.engine.quantize import Grid, fit_grid, quantise
from autocompress.graph import Graph, Layer
from autocompress.policy import LayerChoice, Policy, Recovery, Scheme, Solver
from autocompress.stored import Full, Half, Quantised, round_to_half
from autocompress.task import Batch, divergence

EVERY_GRID = [(bits, scheme) for bits in range(2, 9) for scheme in ("symmetric", "asymmetric")]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(d: int, seed: int = 0) -> Tensor:
    """An H whose inputs share a few directions."""
    mixing = randn(d, d, seed=1000 + seed).double() @ torch.diag(torch.linspace(2, 0.1, d).double())
    return mixing @ mixing.T + 0.01 * d * torch.eye(d).double()


def h_error(found: Tensor, weight: Tensor, h: Tensor) -> float:
    """What the outputs lose."""
    gap = (found - weight).double()
    return float(((gap @ h) * gap).sum())


def half_of(weight: Tensor, seed: int = 0) -> Tensor:
    """A random mask that keeps about half."""
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def everything(weight: Tensor) -> Tensor:
    return torch.ones(weight.shape, dtype=torch.bool)


# --- statistics -----------------------------------------------------------------------------------------

CONVOLUTIONS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(3, 4, 3), (2, 3, 9)),
    (nn.Conv1d(4, 6, 4, padding="same", dilation=2, groups=2), (2, 4, 11)),
    (nn.Conv1d(3, 4, 3, stride=2, padding=2, padding_mode="circular"), (2, 3, 9)),
    (nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 7, 6)),
    (nn.Conv2d(3, 4, (3, 5), padding="same"), (2, 3, 5, 6)),
    (nn.Conv2d(3, 4, (1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)), (2, 3, 5, 6)),
    (nn.Conv2d(4, 6, 3, padding="valid", groups=2), (2, 4, 5, 6)),
    (nn.Conv2d(4, 8, 3, padding=1, groups=4), (3, 4, 5, 5)),
    (nn.Conv3d(2, 3, (2, 3, 1)), (2, 2, 4, 5, 3)),
    (nn.Conv3d(4, 6, 3, stride=(1, 2, 1), padding=(1, 0, 2), dilation=(1, 1, 2), groups=2), (2, 4, 4, 6, 7)),
    (nn.Conv3d(2, 4, 2, padding="same", groups=2, padding_mode="replicate"), (2, 2, 3, 4, 5)),
    *((nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=m), (2, 2, 5, 6)) for m in ("circular", "reflect", "replicate")),
]


@pytest.mark.parametrize(("module", "shape"), CONVOLUTIONS, ids=str)
def test_rows_times_patches_are_a_convolutions_outputs(module: nn.Conv2d, shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    rows = module.weight.flatten(1).unflatten(0, (module.groups, -1))
    expected = (module(x) - module.bias.reshape(-1, *[1] * (x.ndim - 2))).transpose(0, 1).flatten(1)
    torch.testing.assert_close((rows @ patches(module, x)).flatten(0, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_rows_times_patches_are_a_linear_layers_outputs(shape: tuple[int, ...]) -> None:
    module, x = nn.Linear(6, 4), randn(*shape)
    expected = (module(x) - module.bias).flatten(0, -2).T
    torch.testing.assert_close(module.weight @ patches(module, x)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("module", "shape"), [*CONVOLUTIONS, (nn.Linear(6, 4), (2, 3, 6))], ids=str)
def test_chosen_patches_are_columns_of_all(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    whole = patches(module, x)
    chosen = torch.tensor([whole.shape[2] - 1, 0, 3, 3])
    assert torch.equal(patches(module, x, chosen), whole[:, :, chosen])


def small_model() -> tuple[nn.Sequential, Graph, list[Batch]]:
    """A grouped convolution and a linear layer, and two batches."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 4, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    layers = (Layer("0", "conv2d", (4, 2, 2, 2), groups=2), Layer("3", "linear", (3, 16)))
    return model, Graph(layers, (), {}, 0), [Batch(randn(3, 4, 3, 3, seed=s), None) for s in (0, 1)]


def test_moments_are_the_damped_sum_of_what_a_layer_sees() -> None:
    model, graph, batches = small_model()
    found = moments(model, graph, batches, 0)
    expected = {"0": np.zeros((2, 8, 8)), "3": np.zeros((1, 16, 16))}
    for image in torch.cat([batch.inputs for batch in batches]):
        for group, i, j in itertools.product(range(2), range(2), range(2)):
            seen = image[2 * group : 2 * group + 2, i : i + 2, j : j + 2].flatten().double().numpy()
            expected["0"][group] += np.outer(seen, seen)
        hidden = model[:3](image[None])[0].detach().double().numpy()
        expected["3"][0] += np.outer(hidden, hidden)
    assert set(found) == {"0", "3"}
    for name, sums in expected.items():
        damped = [h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h)) for h in sums]
        np.testing.assert_allclose(found[name].numpy(), damped, rtol=1e-5, atol=1e-5)


def test_sampled_moments_follow_the_seed_and_estimate_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, batches = small_model()
    whole = moments(model, graph, batches, 0)["0"]
    monkeypatch.setattr(statistics, "COLUMNS_PER_INPUT", 1)
    samples = [moments(model, graph, batches, seed)["0"] for seed in range(60)]
    assert torch.equal(samples[3], moments(model, graph, batches, 3)["0"])
    assert not torch.equal(samples[3], samples[4])
    assert float((torch.stack(samples).mean(dim=0) - whole).norm() / whole.norm()) < 0.15


def test_columns_are_summed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, batches = small_model()
    whole = moments(model, graph, batches, 0)
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 200)  # three columns of the convolution, three of the linear layer
    for name, h in moments(model, graph, batches, 0).items():
        torch.testing.assert_close(h, whole[name], rtol=1e-6, atol=1e-6)


def test_no_more_columns_are_sampled_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, batches = small_model()
    seen: list[int] = []
    original = statistics._picked

    def counted(windows: Tensor, positions: int, groups: int, chosen: Tensor) -> Tensor:
        seen.append(len(chosen))
        return original(windows, positions, groups, chosen)

    monkeypatch.setattr(statistics, "_picked", counted)
    monkeypatch.setattr(statistics, "MOST_COLUMNS", 4)
    moments(model, graph, batches, 0)
    assert set(seen) == {3}  # four over two batches, and one


def test_an_embeddings_statistics_are_how_often_each_row_is_looked_up() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).eval()
    graph = Graph((Layer("0", "embedding", (5, 3)), Layer("2", "linear", (2, 6))), (), {}, 0)
    batches = [Batch(torch.tensor([[1, 1], [4, 1]]), None), Batch(torch.tensor([[0, 4]]), None)]
    found = moments(model, graph, batches, 0)
    floor = 0.01 * 6 / 5
    torch.testing.assert_close(found["0"], torch.tensor([1, 3, 0, 0, 2]).double() + floor)
    assert found["2"].shape == (1, 6, 6)


def test_moments_leave_no_hooks_even_when_the_model_fails() -> None:
    model, graph, batches = small_model()
    moments(model, graph, batches, 0)
    with pytest.raises(RuntimeError, match="must match the size"):
        moments(model, graph, [*batches, Batch(randn(1, 4, 5, 5), None)], 0)
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- which weights go -----------------------------------------------------------------------------------


def loss_without(row: np.ndarray, h: np.ndarray, kept: list[int]) -> float:
    """The least output error of `row` on the columns `kept`, from the normal equations."""
    best = np.zeros_like(row)
    if kept:
        best[kept] = np.linalg.solve(h[np.ix_(kept, kept)], h[kept] @ row)
    return float((best - row) @ h @ (best - row))


def greedy(weight: Tensor, h: Tensor, count: int) -> list[tuple[int, int]]:
    """Weights in the order in which single best removals take them, each row re-fitted by brute force."""
    w, metric = weight.double().numpy(), h.numpy()
    kept = [list(range(w.shape[1])) for _ in w]
    order = []
    for _ in range(count):
        now = [loss_without(row, metric, columns) for row, columns in zip(w, kept, strict=True)]
        rises = {
            (r, c): loss_without(w[r], metric, [k for k in kept[r] if k != c]) - now[r]
            for r in range(len(w))
            for c in kept[r]
        }
        r, c = min(rises, key=rises.__getitem__)
        kept[r].remove(c)
        order.append((r, c))
    return order


@pytest.mark.parametrize("seed", range(3))
def test_weights_go_in_the_order_of_brute_force(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensate, "REMOVED_PER_ROUND", 1e-9)
    weight, h = randn(3, 6, seed=seed), correlated(6, seed)
    ranks = removal_order(weight, h)
    order = greedy(weight, h, 16)
    assert [int(ranks[place]) for place in order] == list(range(16))


@pytest.mark.parametrize("exact", [True, False])
def test_an_order_names_each_weight_once_and_the_cheapest_first(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exact:
        monkeypatch.setattr(compensate, "EXACT_BYTES", 0)
    weight, h = randn(5, 9), correlated(9)
    ranks = removal_order(weight, h)
    assert sorted(ranks.flatten().tolist()) == list(range(45))
    assert (ranks == 0).nonzero()[0].tolist() == list(greedy(weight, h, 1)[0])


def test_a_redundant_weight_makes_its_twin_indispensable() -> None:
    """Two inputs that are nearly the same: one weight goes early, the other, now alone, among the last."""
    x = randn(5, 200).double()
    x[1] = x[0] + 0.01 * x[1]
    ranks = removal_order(torch.tensor([[1.0, 1.0, 0.8, 0.8, 0.8]]), x @ x.T)[0]
    assert sorted((int(ranks[0]), int(ranks[1]))) == [0, 4]


def test_rows_compete_for_the_same_zeros() -> None:
    ranks = removal_order(torch.stack([randn(8), 100 * randn(8, seed=1).sign()]), correlated(8))
    assert int(ranks[0].max()) < 8


def test_removing_weights_leaves_the_inverse_of_the_kept_block_and_the_best_others() -> None:
    weight, h = randn(4, 7).double(), correlated(7)
    gone = torch.zeros(4, 7, dtype=torch.bool)
    gone[0, [1, 4, 6]] = gone[1, 2] = gone[3] = True
    w, inverses = weight.clone(), torch.linalg.inv(h).expand(4, 7, 7).clone()
    compensate._remove(w, inverses, gone)
    for row in range(4):
        kept = (~gone[row]).nonzero().flatten()
        block = torch.linalg.inv(h[kept][:, kept])
        torch.testing.assert_close(inverses[row][kept][:, kept], block, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(w, least_squares(weight, h, ~gone, tolerance=0), rtol=1e-6, atol=1e-9)


def test_least_squares_is_numpys_on_the_inputs() -> None:
    x, weight = randn(30, 8).double(), randn(5, 8)
    mask = half_of(weight)
    mask[1], mask[2] = False, True
    found = least_squares(weight, x.T @ x, mask, tolerance=0).numpy()
    for row, on, fitted in zip(weight.double().numpy(), mask.numpy(), found, strict=True):
        expected = np.zeros(8)
        expected[on] = np.linalg.lstsq(x.numpy()[:, on], x.numpy() @ row, rcond=None)[0]
        np.testing.assert_allclose(fitted, expected, rtol=0, atol=1e-8)


# --- rounding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "scheme"), EVERY_GRID)
def test_feedback_stays_on_grid_and_mask(bits: int, scheme: Scheme) -> None:
    weight, h = randn(6, 70), correlated(70)  # more columns than one block
    mask = half_of(weight)
    grid = fit_grid(weight * mask, bits, symmetric=scheme == "symmetric")
    codes = with_feedback(weight, factorise(h), mask, grid)
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    assert (grid.decode(codes)[~mask] == 0).all()


def test_feedback_loses_less_than_plain_rounding() -> None:
    ratios = []
    for seed in range(10):
        weight, h = randn(6, 24, seed=seed), correlated(24, seed)
        grid = fit_grid(weight, 3, symmetric=True)
        plain = grid.decode(grid.encode(weight))
        found = grid.decode(with_feedback(weight, factorise(h), everything(weight), grid))
        ratios.append(h_error(found, weight, h) / h_error(plain, weight, h))
    assert np.mean(ratios) < 0.7


def test_feedback_is_the_recursion_that_solves_the_rest_anew_for_each_column() -> None:
    """Fix the columns in turn; the free ones become their least-squares optimum given those that are fixed."""
    weight, h = randn(4, 9).double(), correlated(9)
    grid = fit_grid(weight.float(), 3, symmetric=True)
    order, target = h.diagonal().argsort(descending=True, stable=True), weight.clone()
    for k in range(9):
        target[:, order[k]] = grid.decode(grid.encode(target[:, order[k]].float())).double()
        fixed, free = order[: k + 1], order[k + 1 :]
        gap = (target - weight)[:, fixed]
        target[:, free] = weight[:, free] - gap @ h[fixed][:, free] @ torch.linalg.inv(h[free][:, free])
    found = with_feedback(weight.float(), factorise(h), everything(weight), grid)
    torch.testing.assert_close(grid.decode(found), target.float(), rtol=0, atol=1e-5)


def test_feedback_is_plain_rounding_where_inputs_are_unrelated() -> None:
    weight = randn(5, 12)
    mask, grid = half_of(weight), fit_grid(weight, 3, symmetric=False)
    found = with_feedback(weight, factorise(torch.diag(torch.linspace(1, 9, 12).double())), mask, grid)
    assert torch.equal(grid.decode(found), grid.decode(grid.encode(weight)) * mask)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.booleans(), st.sampled_from([(1, 1), (3, 7), (2, 70)]))
def test_descent_never_loses_more(seed: int, bits: int, symmetric: bool, shape: tuple[int, int]) -> None:
    weight, h = randn(*shape, seed=seed), correlated(shape[1], seed)
    mask, grid = half_of(weight, seed), fit_grid(weight, bits, symmetric=symmetric)
    codes = grid.encode(weight * mask)
    found = descend(codes, weight, h, mask, grid)
    before, after = (h_error(grid.decode(c), weight, h) for c in (codes, found))
    assert after <= before * (1 + 1e-4) + 1e-6
    assert (found[~mask] == grid.zero[:, None].expand(shape)[~mask]).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_descent_ends_where_no_single_code_helps(symmetric: bool) -> None:
    weight, h = randn(3, 8), correlated(8)
    mask, grid = half_of(weight), fit_grid(weight, 3, symmetric=symmetric)
    codes, previous = grid.encode(weight * mask), None
    while previous is None or not torch.equal(codes, previous):
        codes, previous = descend(codes, weight, h, mask, grid), codes
    reached = h_error(grid.decode(codes), weight, h)
    for row, column in mask.nonzero().tolist():
        for code in range(8):
            other = codes.clone()
            other[row, column] = code
            assert h_error(grid.decode(other), weight, h) >= reached * (1 - 1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_refitted_scale_is_the_best_on_a_fine_line(symmetric: bool) -> None:
    weight, h = randn(4, 10), correlated(10)
    grid = fit_grid(weight, 2, symmetric=symmetric)
    codes = grid.encode(weight)
    found = refit_scale(codes, weight, h, grid)
    for row in range(4):
        u = (codes[row] - grid.zero[row]).double()
        line = float(grid.scale[row]) * np.linspace(-1, 3, 40_001)
        gaps = line[:, None] * u.numpy() - weight[row].double().numpy()
        best = line[np.argmin(((gaps @ h.numpy()) * gaps).sum(axis=1))]
        assert float(found.scale[row]) == pytest.approx(best, rel=2e-3)
    assert torch.equal(found.scale, round_to_half(found.scale))
    assert torch.equal(found.zero, grid.zero)


def test_the_scale_of_a_row_without_weights_stays() -> None:
    grid = Grid(torch.tensor([0.5, 0.25]), torch.tensor([2.0, 2.0]), 2, True)
    codes = torch.tensor([[2.0, 2.0], [3.0, 2.0]])
    found = refit_scale(codes, torch.tensor([[0.1, 0.2], [1.0, 0.0]]), torch.eye(2).double(), grid)
    assert found.scale.tolist() == [0.5, 1.0]


# --- whole layers ---------------------------------------------------------------------------------------


def nearest_error(weight: Tensor, h: Tensor, choice: LayerChoice) -> float:
    mask = magnitude_mask(weight, choice.zeros(weight.numel()))
    return h_error(quantise(weight, choice, mask).dense(), weight, h)


@pytest.mark.parametrize(("bits", "scheme"), EVERY_GRID)
@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_a_solution_loses_less_than_rounding_to_nearest(bits: int, scheme: Scheme, zeros: float) -> None:
    weight, h, choice = randn(8, 20), correlated(20), LayerChoice(bits, zeros, scheme)
    codes, grid = solve(weight, h, removal_order(weight, h) >= choice.zeros(160), choice)
    assert grid is not None
    assert h_error(grid.decode(codes), weight, h) < 0.8 * nearest_error(weight, h, choice)


SHAPES = {
    "linear": Layer("linear", "linear", (6, 20)),
    "conv": Layer("conv", "conv2d", (5, 3, 3, 2)),
    "grouped": Layer("grouped", "conv1d", (6, 4, 3), groups=3),
    "depthwise": Layer("depthwise", "conv2d", (8, 1, 3, 3), groups=8),
}


def layer_database() -> tuple[LayerDatabase, dict[str, Tensor], dict[str, Tensor]]:
    state = {layer.weight: randn(*layer.shape, seed=i) for i, layer in enumerate(SHAPES.values())}
    h = {}
    for layer in SHAPES.values():
        d = state[layer.weight][0].numel()
        h[layer.name] = torch.stack([(1 + 4 * g) * correlated(d, g) for g in range(layer.groups)])
    return LayerDatabase(state, h), state, h


def layer_error(layer: Layer, dense: Tensor, weight: Tensor, h: Tensor) -> float:
    parts = zip(dense.flatten(1).chunk(layer.groups), weight.flatten(1).chunk(layer.groups), h, strict=True)
    return sum(h_error(*part) for part in parts)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("layer", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("choice", [LayerChoice(3, 0.45, "asymmetric"), LayerChoice(4), LayerChoice(16, 0.6)], ids=str)
def test_stored_solutions_fit_the_layer_and_beat_nearest(
    layer: Layer, choice: LayerChoice, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exact:
        monkeypatch.setattr(compensate, "EXACT_BYTES", 0)
    base, state, h = layer_database()
    weight, stored = state[layer.weight], base.solve(layer, choice)
    zeros = choice.zeros(weight.numel())
    assert stored.dense().shape == weight.shape
    assert (stored.mask is None) == (zeros == 0)
    if stored.mask is not None:
        assert stored.mask.shape == weight.shape
        assert int((~stored.mask).sum()) == zeros
        assert (stored.dense()[~stored.mask] == 0).all()
    if choice.bits < 16:
        assert isinstance(stored, Quantised)
        assert stored.scale.shape == stored.zero.shape == weight.shape[:1]
        assert (stored.codes.dtype, stored.zero.dtype) == (torch.uint8, torch.uint8)
        assert int(stored.codes.max()) < 2**choice.bits
        assert torch.equal(stored.scale, round_to_half(stored.scale))
    else:
        assert isinstance(stored, Half)
        assert torch.equal(stored.values, round_to_half(stored.values))
    nearest = quantise(weight, choice, magnitude_mask(weight, zeros)).dense()
    errors = [layer_error(layer, dense, weight, h[layer.name]) for dense in (stored.dense(), nearest)]
    if exact or choice.bits < 16:  # the shared inverse alone is better only on average
        assert errors[0] < 0.9 * errors[1]


def test_pruning_with_a_shared_inverse_beats_magnitudes_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensate, "EXACT_BYTES", 0)
    ratios, choice = [], LayerChoice(16, 0.5)
    for seed in range(10):
        weight, h = randn(8, 24, seed=seed), correlated(24, seed)
        found, grid = solve(weight, h, removal_order(weight, h) >= choice.zeros(192), choice)
        assert grid is None
        ratios.append(h_error(found, weight, h) / nearest_error(weight, h, choice))
    assert np.mean(ratios) < 0.95


def test_inverses_are_updated_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, h = randn(7, 10), correlated(10)
    weight[2] *= 1e-3  # goes at once
    whole = removal_order(weight, h)
    monkeypatch.setattr(compensate, "REMOVAL_BYTES", 1)
    assert torch.equal(removal_order(weight, h), whole)


@pytest.mark.parametrize("limit", [0, 2**29])
def test_groups_compete_for_zeros_each_with_its_own_statistics(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensate, "EXACT_BYTES", limit)
    h = torch.stack([1e6 * correlated(6), correlated(6, 1)])
    ranks = removal_order(randn(4, 6), h)
    assert sorted(ranks.flatten().tolist()) == list(range(24))
    assert int(ranks[2:].max()) < int(ranks[:2].min())


@pytest.mark.parametrize("choice", [LayerChoice(2, 0.3), LayerChoice(4), LayerChoice(5, 0.6)], ids=str)
@pytest.mark.parametrize("name", ["grouped", "depthwise"])
def test_groups_at_once_are_as_good_as_one_after_the_other(
    name: str, choice: LayerChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = []
    for limit in (0, 2**24):
        monkeypatch.setattr(database, "ROWWISE_BYTES", limit)
        base = layer_database()[0]
        errors.append(base.error(SHAPES[name], base.solve(SHAPES[name], choice)))
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_a_solution_of_one_bit_has_signs_and_zeros_only() -> None:
    weight, h = randn(6, 20), correlated(20)
    mask = half_of(weight)
    grid = Grid(weight.abs().mean(dim=1), torch.ones(6), 1, True)
    codes = with_feedback(weight, factorise(h), mask, grid)
    for _ in range(3):
        before = h_error(grid.decode(codes), weight, h)
        codes = descend(codes, weight, h, mask, grid)
        assert h_error(grid.decode(codes), weight, h) <= before * (1 + 1e-5)
        assert set(codes[mask].tolist()) == {0.0, 2.0}
        assert set(codes[~mask].tolist()) == {1.0}


def test_the_error_is_the_share_of_the_outputs_that_is_lost() -> None:
    base, state, h = layer_database()
    for layer in SHAPES.values():
        stored, weight = base.solve(layer, LayerChoice(3, 0.4)), state[layer.weight]
        dense = layer_error(layer, torch.zeros_like(weight), weight, h[layer.name])
        expected = layer_error(layer, stored.dense(), weight, h[layer.name]) / dense
        assert base.error(layer, stored) == pytest.approx(expected, rel=1e-4)
        assert base.error_of(layer, LayerChoice(3, 0.4)) == base.error(layer, stored)
        assert base.error(layer, Full(weight)) == 0.0


def test_the_error_without_statistics_is_that_of_the_weights() -> None:
    weight, layer = randn(4, 6), Layer("l", "linear", (4, 6))
    base = LayerDatabase({"l.weight": weight}, {})
    assert base.error(layer, Full(weight * 0.9)) == pytest.approx(0.01, rel=1e-4)
    assert LayerDatabase({"l.weight": torch.zeros(4, 6)}, {}).error(layer, Full(torch.zeros(4, 6))) == 0.0


TABLE = Layer("t", "embedding", (40, 8))


def test_rare_rows_of_an_embedding_lose_their_weights_first() -> None:
    weight, frequency = randn(40, 8), torch.ones(40).double()
    frequency[:20] = 100.0
    base = LayerDatabase({"t.weight": weight}, {"t": frequency})
    stored = base.solve(TABLE, LayerChoice(16, 0.25))
    saliency = (weight.square() * frequency[:, None]).float()
    assert isinstance(stored, Half)
    assert int((~stored.mask).sum()) == 80
    assert float(saliency[~stored.mask].max()) <= float(saliency[stored.mask].min())
    expected = float((saliency * ~stored.mask).sum() / saliency.sum())
    assert base.error(TABLE, stored) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("choice", [LayerChoice(2), LayerChoice(3, 0.6), LayerChoice(4, 0.3, "asymmetric")], ids=str)
def test_an_embedding_loses_less_than_rounded_to_nearest(choice: LayerChoice) -> None:
    weight, frequency = randn(40, 8), torch.logspace(0, 3, 40).double()
    base = LayerDatabase({"t.weight": weight}, {"t": frequency})
    nearest = quantise(weight, choice, magnitude_mask(weight, choice.zeros(320)))
    stored = base.solve(TABLE, choice)
    assert base.error(TABLE, stored) < base.error(TABLE, nearest)
    assert isinstance(stored, Quantised)
    assert (stored.mask is None) == (choice.sparsity == 0)
    if stored.mask is not None:
        assert int((~stored.mask).sum()) == choice.zeros(320)
        assert (stored.dense()[~stored.mask] == 0).all()


def test_each_group_is_solved_with_its_own_statistics() -> None:
    base, state, h = layer_database()
    layer, choice = SHAPES["grouped"], LayerChoice(3)
    found = base.solve(layer, choice).dense()
    for g in range(3):
        rows = slice(2 * g, 2 * g + 2)
        alone = LayerDatabase({"l.weight": state[layer.weight][rows]}, {"l": h["grouped"][g : g + 1]})
        assert torch.equal(alone.solve(Layer("l", "conv1d", (2, 4, 3)), choice).dense(), found[rows])


def test_a_layer_without_losses_keeps_its_weights() -> None:
    base, state, _ = layer_database()
    stored = base.solve(SHAPES["conv"], LayerChoice(32))
    assert isinstance(stored, Full)
    assert torch.equal(stored.dense(), state["conv.weight"])


def test_solutions_do_not_depend_on_what_was_solved_before() -> None:
    choices = [LayerChoice(3, 0.5), LayerChoice(2), LayerChoice(16, 0.9), LayerChoice(4, 0.2, "asymmetric")]
    pairs = list(itertools.product(list(SHAPES.values())[1:3], choices))
    one, two = layer_database()[0], layer_database()[0]
    first = [one.solve(*pair).dense() for pair in pairs]
    second = [two.solve(*pair).dense() for pair in reversed(pairs)][::-1]
    again = [one.solve(*pair).dense() for pair in pairs]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, again, strict=True))


def test_more_zeros_keep_a_subset() -> None:
    base = layer_database()[0]
    few, many = (base.solve(SHAPES["conv"], LayerChoice(4, zeros)).mask for zeros in (0.3, 0.7))
    assert not (many & ~few).any()


def test_an_input_that_is_never_seen_does_no_harm() -> None:
    h = torch.stack([torch.zeros(6, 6).double(), torch.diag(torch.tensor([0.0, 1, 2, 3, 0, 5]).double())])
    state = {"l.weight": randn(4, 6)}
    for choice in (LayerChoice(2, 0.5), LayerChoice(8, scheme="asymmetric"), LayerChoice(16, 0.9)):
        found = LayerDatabase(state, {"l": damped(h)}).solve(Layer("l", "linear", (4, 6), groups=2), choice)
        assert torch.isfinite(found.dense()).all()


# --- through the engine ---------------------------------------------------------------------------------


class Network(nn.Module):
    """Two convolutions, one of them depthwise, and a classifier; `odd` adds a 3-D convolution and an embedding."""

    def __init__(self, odd: bool = False) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.body = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 12, 3, stride=2)
        self.head = nn.Linear(12, 4)
        self.odd = nn.Conv3d(1, 1, 3, padding=1) if odd else nn.Identity()
        self.table = nn.Embedding(3, 4) if odd else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.odd(x.unsqueeze(1)).squeeze(1)
        x = torch.relu(self.body(torch.relu(self.deep(torch.relu(self.norm(self.stem(x)))))))
        x = self.head(x.mean((2, 3)))
        return x if self.table is None else x + self.table((x.sum(dim=1) > 0).long())


def data(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 4, (96,), generator=draw)
    return randn(4, 3, 6, 6, seed=100)[targets] + torch.randn(96, 3, 6, 6, generator=draw), targets


def evaluator(odd: bool = False) -> Evaluator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Network(odd)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1, momentum=0.9)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data(0)[0]), data(0)[1]).backward()
        optimizer.step()
    return Evaluator(ClassificationTask(model.eval(), data(0), data(1), data(2), batch_size=32), dense_ms=1.0)


@pytest.fixture(scope="module")
def judge() -> Evaluator:
    return evaluator()


def everywhere(bench: Workbench, choice: LayerChoice, solver: Solver, keep: float = 1.0, epochs: int = 0) -> Policy:
    layers = {layer.name: choice for layer in bench.graph.layers}
    groups = {group.name: keep for group in bench.graph.prunable}
    return Policy(layers, groups if keep < 1 else {}, solver=solver, recovery=Recovery(epochs=epochs))


def weights(bench: Workbench, policy: Policy) -> dict[str, Tensor]:
    return {name: stored.dense() for name, stored in compress(bench, policy).tensors.items()}


@pytest.mark.parametrize("choice", [LayerChoice(2), LayerChoice(32, 0.5), LayerChoice(4, 0.5)], ids=str)
def test_the_database_keeps_a_model_closer_to_its_teacher(judge: Evaluator, choice: LayerChoice) -> None:
    bench, inputs, distance = judge.bench, data(1)[0], {}
    for solver in ("nearest", "database"):
        outputs = bench.realise(compress(bench, everywhere(bench, choice, solver)))(inputs)
        distance[solver] = float(divergence(bench.task, outputs, bench.teacher(inputs)))
    assert 0 < distance["database"] < 0.9 * distance["nearest"]


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("choice", [LayerChoice(3, 0.5, "asymmetric"), LayerChoice(16, 0.3)], ids=str)
def test_files_are_as_long_as_predicted(judge: Evaluator, choice: LayerChoice, epochs: int, tmp_path: Path) -> None:
    policy = everywhere(judge.bench, choice, "database", epochs=epochs)
    found = judge(policy, keep=tmp_path / "file")
    assert found.status == "ok", found.error
    assert found.measurement is not None
    assert (tmp_path / "file").stat().st_size == found.measurement.bytes <= judge.bound(policy).bytes
    if epochs == 0:  # training changes codes, and so their length
        assert found.measurement.bytes == judge.predict(policy).bytes
    model = judge.reload(tmp_path / "file").model
    torch.testing.assert_close(model(data(1)[0]), judge.build(policy)[1](data(1)[0]), rtol=0, atol=1e-5)


def test_training_keeps_the_databases_grid_and_mask(judge: Evaluator) -> None:
    bench, choice = judge.bench, LayerChoice(3, 0.5)
    before, after = (compress(bench, everywhere(bench, choice, "database", epochs=e)).tensors for e in (0, 2))
    for name in ("deep.weight", "body.weight", "head.weight"):  # no norm is folded into these
        assert torch.equal(before[name].mask, after[name].mask)
        assert torch.equal(before[name].scale, after[name].scale)


def test_candidates_in_between_change_nothing(judge: Evaluator) -> None:
    policy = everywhere(judge.bench, LayerChoice(2, 0.3), "database")
    first = weights(judge.bench, policy)
    weights(judge.bench, everywhere(judge.bench, LayerChoice(2, 0.3), "nearest"))
    for bench in (judge.bench, evaluator().bench):
        assert all(torch.equal(value, first[name]) for name, value in weights(bench, policy).items())


def test_embeddings_and_3d_convolutions_are_solved_too() -> None:
    bench, base = evaluator(odd=True).bench, evaluator(odd=True).bench.database
    assert {layer.kind for layer in bench.graph.layers} == {"conv2d", "conv3d", "linear", "embedding"}
    for layer in bench.graph.layers:
        assert base.knows(layer), layer.name
        weight, choice = bench.state[layer.weight], LayerChoice(3, 0.4)
        nearest = quantise(weight, choice, magnitude_mask(weight, choice.zeros(weight.numel())))
        assert base.error_of(layer, choice) < base.error(layer, nearest)


# --- in a search space ----------------------------------------------------------------------------------


def test_a_space_with_one_solver_always_uses_it() -> None:
    space = make_space('[layers]\nbits = [2, 8]\nsolver = ["database"]\n')
    policy = space.decode({})
    assert policy.solver == space.smallest().solver == "database"
    assert {p.solver for p in space.baselines()} == {"database"}
    assert space.decode(space.encode(policy)) == policy
    assert "solver" not in space.encode(policy)


@pytest.mark.parametrize("solver", ["nearest", "database"])
def test_a_space_with_both_solvers_encodes_either(solver: Solver) -> None:
    space = make_space('[layers]\nbits = [2, 8]\nsolver = ["nearest", "database"]\n')
    policy = space.decode({"solver": solver})
    assert policy.solver == solver
    assert space.encode(policy)["solver"] == solver
    assert space.decode(space.encode(policy)) == policy
    assert Policy.from_json(policy.to_json()) == policy
