from __future__ import annotations

import pytest
import torch
from torch import nn

from autocompress.engine.muon import Muon, orthogonal


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(4, 30), (30, 4), (8, 8), (1, 9)])
def test_all_directions_become_about_as_long(shape: tuple[int, int]) -> None:
    u, s, v = torch.linalg.svd(draw(*shape), full_matrices=False)
    matrix = u @ torch.diag(s * torch.logspace(0, -1.5, len(s))) @ v  # some directions thirty times shorter
    found = torch.linalg.svdvals(orthogonal(matrix))
    assert found.min() > 0.5
    assert found.max() < 1.3
    ways = torch.linalg.svd(orthogonal(matrix), full_matrices=False)
    turned = (ways[0] @ ways[2]) - (u @ v)  # the same singular vectors: only their lengths changed
    assert turned.abs().max() < 1e-3


def test_the_transposed_matrix_gives_the_transposed_step() -> None:
    assert torch.allclose(orthogonal(draw(5, 12)), orthogonal(draw(5, 12).T).T)


def test_zeros_stay() -> None:
    assert not orthogonal(torch.zeros(3, 5)).any()


def stepped(start: torch.Tensor, gradients: list[torch.Tensor], **settings: float) -> torch.Tensor:
    p = nn.Parameter(start.clone())
    optimizer = Muon([p], **settings)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (8, 4, 3, 3)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_step_is_a_share_of_the_weight_whatever_the_gradient(shape: tuple[int, ...], size: float) -> None:
    start, gradient = size * draw(*shape), draw(*shape, seed=1)
    moved = stepped(start, [gradient], lr=0.01) - start
    share = float(moved.square().mean().sqrt() / start.square().mean().sqrt())
    assert 0.006 < share < 0.0125
    again = stepped(start, [1e4 * gradient], lr=0.01) - start
    assert torch.allclose(moved, again, rtol=1e-3, atol=1e-6 * size)


def test_weights_of_a_shape_do_not_mix() -> None:
    starts, gradients = (
        [draw(6, 20), draw(6, 5, 2, 2, seed=2), draw(20, 6)],
        [draw(6, 20, seed=3), draw(6, 5, 2, 2), draw(20, 6)],
    )
    together = [nn.Parameter(start.clone()) for start in starts]
    for p, gradient in zip(together, gradients, strict=True):
        p.grad = gradient.clone()
    Muon(together, lr=0.01).step()
    for p, start, gradient in zip(together, starts, gradients, strict=True):
        assert torch.allclose(p.detach(), stepped(start, [gradient], lr=0.01), atol=1e-6)


def test_it_descends() -> None:
    start, gradient = draw(8, 4, 3, 3), draw(8, 4, 3, 3, seed=1)
    assert float(((stepped(start, [gradient], lr=0.01) - start) * gradient).sum()) < 0


def test_biases_and_norms_move_as_with_sgd() -> None:
    start, gradients = draw(7), [draw(7, seed=seed) for seed in range(1, 6)]
    p = nn.Parameter(start.clone())
    sgd = torch.optim.SGD([p], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for gradient in gradients:
        p.grad = gradient.clone()
        sgd.step()
    found = stepped(start, gradients, lr=0.1, momentum=0.9, weight_decay=0.01)
    assert torch.allclose(found, p.detach(), atol=1e-6)


def test_what_has_no_elements_or_no_gradient_stays() -> None:
    empty, still = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(draw(2, 2))
    empty.grad = torch.zeros(0, 3)
    before = still.detach().clone()
    Muon([empty, still], lr=0.1).step()
    assert torch.equal(still.detach(), before)
