from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autocompress.engine.constraint import Constraint
from autocompress.engine.held import EVERY, PACE, SHARE, Held
from autocompress.engine.quantize import grid_of
from autocompress.policy import LayerChoice

CODED = LayerChoice(2, scheme="entropy")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def entropy(weight: Tensor, constraint: Constraint) -> float:
    """Bits of all codes, by counting them."""
    assert constraint.grid is not None
    _, counts = torch.unique(constraint.grid.encode(weight), return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * shares.log2()).sum() * weight.numel())


def walk(weights: dict[str, Tensor], constraints: dict[str, Constraint], steps: int = 300) -> Held:
    """Random steps of one hundredth of a standard deviation, as an optimizer's that knows no bits."""
    held = Held(weights, constraints)
    held.begin()
    for i in range(steps):
        for n, weight in enumerate(weights.values()):
            weight.add_(0.02 * draw(*weight.shape, seed=1000 * n + i + 1))
        held.stepped({})
    return held


def moved(held: Held, weight: Tensor, by: Tensor | float, scales: dict[str, Tensor] | None = None) -> None:
    """As many steps as go before a pull, which move `weight` by `by` together."""
    held.begin()
    weight.add_(by)
    for _ in range(EVERY):
        held.stepped(scales or {})


def layer(seed: int, shape: tuple[int, ...] = (32, 40)) -> tuple[Tensor, Constraint]:
    weight = draw(*shape, seed=seed)
    return weight, Constraint(None, grid_of(weight, CODED), coded=True)


def test_codes_stay_as_short_as_they_were() -> None:
    layers = {"a": layer(1), "b": layer(2, (16, 8, 3, 3))}
    constraints = {name: constraint for name, (_, constraint) in layers.items()}
    before = {name: entropy(weight, constraints[name]) for name, (weight, _) in layers.items()}
    free = {name: weight.clone() for name, (weight, _) in layers.items()}
    walk(free, {name: Constraint(None, c.grid) for name, c in constraints.items()})
    held = {name: weight.clone() for name, (weight, _) in layers.items()}
    walk(held, constraints)
    assert sum(entropy(free[name], c) for name, c in constraints.items()) > 1.02 * sum(before.values())
    after = sum(entropy(held[name], c) for name, c in constraints.items())
    assert after == pytest.approx(SHARE * sum(before.values()), rel=0.005)


def test_what_is_not_entropy_coded_moves_freely() -> None:
    weight, coded = layer(1)
    free, plain = weight.clone(), weight.clone()
    for i in range(20):
        plain.add_(0.02 * draw(*weight.shape, seed=i + 1))
    held = walk({"a": free}, {"a": Constraint(None, coded.grid)}, 20)
    assert torch.equal(free, plain)
    assert held.price == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_the_pull_leads_to_codes_that_cost_less(sign: int) -> None:
    weight, constraint = layer(3)
    assert constraint.grid is not None
    constraint.grid.scale.mul_(sign)
    held = Held({"a": weight}, {"a": constraint})
    held.price, held.limit = 1.0, 1.0  # far above
    before = weight.clone()
    moved(held, weight, 1e-3)
    pulled = weight - before - 1e-3
    far = before.abs() > 1.5 * constraint.grid.scale.abs().max()
    assert far.any()
    assert bool((torch.sign(pulled[far]) == -torch.sign(before[far])).all())
    assert pulled[far].abs().mean() > 5 * pulled[before.abs() < 0.4 * constraint.grid.scale.abs().max()].abs().mean()


def test_pruned_weights_are_left_alone() -> None:
    weight = draw(32, 40)
    mask = weight.abs() > 0.5
    constraint = Constraint(mask, grid_of(weight * mask, CODED), coded=True)
    held = Held({"a": weight}, {"a": constraint})
    held.price, held.limit = 1.0, 1.0
    before = weight.clone()
    moved(held, weight, 1e-3 * mask)
    assert torch.equal(weight[~mask], before[~mask])
    assert not torch.equal(weight[mask], before[mask] + 1e-3)


def test_the_price_falls_where_codes_are_short() -> None:
    weight, constraint = layer(4)
    held = Held({"a": weight}, {"a": constraint})
    held.price, held.limit = 0.3, 1e9
    moved(held, weight, 0.0)
    assert held.price == 0


def test_codes_of_learning_scales_are_counted_on_them() -> None:
    weight, constraint = layer(5)
    assert constraint.grid is not None
    prices = []
    for share in (4, 1, 0.5):  # coarser, as before, finer
        held = Held({"a": weight.clone()}, {"a": constraint})
        moved(held, weight, 0.0, {"a": share * constraint.grid.scale})
        prices.append(held.price)
    assert prices[0] == 0
    assert prices[1] == pytest.approx(PACE * (1 / SHARE - 1))
    assert prices[2] > 0.3 * PACE


@pytest.mark.parametrize("weight", [torch.zeros(4, 5), torch.zeros(0, 5)], ids=["all zero", "no elements"])
def test_a_layer_that_says_nothing(weight: Tensor) -> None:
    grid = grid_of(draw(4, 5) if weight.numel() else weight, CODED) if weight.numel() else None
    held = Held({"a": weight}, {"a": Constraint(None, grid, coded=True)})
    moved(held, weight, 0.0)
    assert held.price == 0
    assert not weight.any()
