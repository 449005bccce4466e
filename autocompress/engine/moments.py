"""What each layer of a model sees in calibration, as the second moments of its inputs.

A weight's rows (out, d) are multiplied with columns x (d,); H = sum of x x^T says what a change of the rows does to
the outputs. An embedding multiplies nothing: how often each of its rows is looked up takes the place of H. Knows
nothing about pruning or grids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.graph import Graph
from autocompress.task import Batch, call, first_input, to_device

COLUMNS_PER_INPUT = 300
"""Output positions that are sampled for each row of H: many times its rank."""
MOST_COLUMNS = 100_000
"""Output positions that are sampled for one H, however large."""
CHUNK_BYTES = 64 * 2**20
"""Columns that are unfolded at a time."""
DAMPING = 0.01
"""Share of the mean diagonal that is added to H (GPTQ, 2210.17323, section 3.3)."""

_PADDING = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def patches(module: nn.Module, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """What the rows of a weight are multiplied with: (groups, row length, columns).

    A column per output position of each example, or only the `chosen` ones (columns,).
    """
    windows, positions = _windows(module, x)
    picked = (
        windows.flatten(0, positions - 1) if chosen is None else windows[_unravel(chosen, windows.shape[:positions])]
    )
    groups = getattr(module, "groups", 1)
    return picked.reshape(len(picked), groups, -1).permute(1, 2, 0)


def _windows(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """A view (n, output positions ..., channels, kernel ...) and how many dimensions are positions."""
    if isinstance(module, nn.Linear):
        return x, x.ndim - 1
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=_PADDING[module.padding_mode])
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), 2
    ):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x.movedim(1, x.ndim // 2), x.ndim // 2


def _unravel(index: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.unravel_index(index, shape))


def moments(model: nn.Module, graph: Graph, batches: Iterable[Batch], seed: int) -> dict[str, Tensor]:
    """H of every layer that the model calls, damped, float64: (groups, d, d), and (rows,) of an embedding.

    A random sample of positions stands for all of them, scaled to their number.
    """
    found: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    batches = list(batches)
    handles = [
        model.get_submodule(layer.name).register_forward_pre_hook(
            _recorder(layer.name, found, generator, len(batches)), with_kwargs=True
        )
        for layer in graph.layers
    ]
    try:
        device = next(model.parameters()).device
        with torch.no_grad():
            for batch in batches:
                call(model, to_device(batch.inputs, device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: damped(value) for name, value in found.items()}


def _recorder(name: str, found: dict[str, Tensor], generator: torch.Generator, batches: int) -> Callable[..., None]:
    def record(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = first_input(given, named).detach()
        if isinstance(module, nn.Embedding):
            seen = torch.bincount(x.flatten(), minlength=module.num_embeddings).double().cpu()
        else:
            seen = _products(module, x.float(), generator, batches)
        found[name] = found[name] + seen if name in found else seen

    return record


def _products(module: nn.Module, x: Tensor, generator: torch.Generator, batches: int) -> Tensor:
    """Sum of x x^T (groups, d, d) float64 over a sample of this batch's columns, scaled to all of them."""
    windows, positions = _windows(module, x)
    total = windows.shape[:positions].numel()
    d = windows.shape[positions:].numel() // int(getattr(module, "groups", 1))
    limit = min(COLUMNS_PER_INPUT * d, MOST_COLUMNS) // batches + 1
    chosen = torch.randint(0, total, (limit,), generator=generator) if total > limit else torch.arange(total)
    summed = torch.zeros((), dtype=torch.float64)
    for part in torch.split(chosen, max(1, CHUNK_BYTES // (4 * windows.shape[positions:].numel()))):
        columns = patches(module, x, part.to(x.device))
        summed = summed + (columns @ columns.transpose(1, 2)).double().cpu()
    return summed * (total / len(chosen))


def damped(h: Tensor) -> Tensor:
    """H with a share of its mean diagonal added, or an embedding's counts with a share of their mean."""
    if h.ndim == 1:
        return h + (h.mean() * DAMPING).clamp_min(1e-12)
    diagonal = h.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(dim=1, keepdim=True).clamp_min(1e-12)
    return h + torch.diag_embed(torch.ones_like(diagonal) * mean * DAMPING)
