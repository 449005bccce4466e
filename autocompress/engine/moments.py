"""What each layer of a model sees in calibration, as the second moments of its inputs.

A weight's rows (out, d) are multiplied with columns x (d,); H = sum of x x^T says what a change of the rows does to
the outputs. An embedding multiplies nothing: how often each of its rows is looked up takes the place of H. Matrices of
recurrent modules meet the inputs and hidden states of every step. Knows nothing about pruning or grids.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.attention import attention_columns
from autocompress.engine.recurrence import columns
from autocompress.graph import PARAMETERS, Graph, Layer
from autocompress.spill import Spill, limit_beside
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
    return _picked(windows, positions, getattr(module, "groups", 1), chosen)


def _picked(windows: Tensor, positions: int, groups: int, chosen: Tensor | None) -> Tensor:
    found = (
        windows.flatten(0, positions - 1) if chosen is None else windows[_unravel(chosen, windows.shape[:positions])]
    )
    return found.reshape(len(found), groups, -1).permute(1, 2, 0)


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


def moments(model: nn.Module, graph: Graph, batches: Iterable[Batch], seed: int) -> Spill:
    """H of every layer that the model calls, damped, float64: (groups, d, d), and (rows,) of an embedding.

    A random sample of positions stands for all of them, scaled to their number. Matrices of a recurrent module that
    computes something of its own are left out, with a warning.
    """
    batches = list(batches)
    sums = _Sums(torch.Generator().manual_seed(seed), len(batches), graph)
    handles = [
        model.get_submodule(layer.name).register_forward_pre_hook(_recorder(layer.name, sums), with_kwargs=True)
        for layer in graph.layers
        if layer.kind not in PARAMETERS
    ]
    matrices: dict[str, dict[str, Layer]] = defaultdict(dict)
    for layer in graph.layers:
        if layer.kind in PARAMETERS:
            owner = layer.name.removesuffix("out_proj.weight").rpartition(".")[0]
            matrices[owner][layer.name.removeprefix(f"{owner}.")] = layer
    handles += [
        model.get_submodule(name).register_forward_hook(_matrix_recorder(layers, sums), with_kwargs=True)
        for name, layers in matrices.items()
    ]
    try:
        device = next(model.parameters()).device
        with torch.no_grad():
            for batch in batches:
                call(model, to_device(batch.inputs, device))
    finally:
        for handle in handles:
            handle.remove()
    for name in sums.found:
        sums.found[name] = damped(sums.found[name])
    return sums.found


def statistics_size(graph: Graph) -> int:
    """Numbers in the H of all layers, and in the frequencies of embeddings."""
    return sum(x.shape[0] if x.kind == "embedding" else x.groups * prod(x.shape[1:]) ** 2 for x in graph.layers)


def statistics_room(graph: Graph, width: int) -> Spill:
    """Where the H of all layers go, `width` bytes a number."""
    return Spill(width * statistics_size(graph), limit_beside(graph.dense_bytes))


class _Sums:
    """Sums over the batches, by layer."""

    def __init__(self, generator: torch.Generator, batches: int, graph: Graph) -> None:
        self._generator, self._batches = generator, batches
        self.found = statistics_room(graph, 8)

    def add(self, name: str, seen: Tensor) -> None:
        self.found[name] = self.found[name].add_(seen) if name in self.found else seen

    def products(self, windows: Tensor, positions: int, groups: int = 1) -> Tensor:
        """Sum of x x^T (groups, d, d) float64 over a sample of this batch's columns, scaled to all of them."""
        total = windows.shape[:positions].numel()
        d = windows.shape[positions:].numel() // groups
        limit = min(COLUMNS_PER_INPUT * d, MOST_COLUMNS) // self._batches + 1
        chosen = torch.arange(total)
        if total > limit:
            chosen = torch.randint(0, total, (limit,), generator=self._generator)
        summed = torch.zeros(groups, d, d, dtype=torch.float64)
        for part in torch.split(chosen, max(1, CHUNK_BYTES // (4 * windows.shape[positions:].numel()))):
            x = _picked(windows, positions, groups, part.to(windows.device))
            summed += (x @ x.transpose(1, 2)).cpu()
        return summed.mul_(total / len(chosen))


def _recorder(name: str, sums: _Sums) -> Callable[..., None]:
    def record(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = first_input(given, named).detach()
        if isinstance(module, nn.Embedding):
            sums.add(name, torch.bincount(x.flatten(), minlength=module.num_embeddings).double().cpu())
        else:
            groups = int(getattr(module, "groups", 1))
            sums.add(name, sums.products(*_windows(module, x.float()), groups))

    return record


def _matrix_recorder(layers: Mapping[str, Layer], sums: _Sums) -> Callable[..., None]:
    """Records a recurrent or attention module, whose parameters are the given layers."""

    def record(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        seen: dict[str, Tensor] = {}
        try:
            if isinstance(module, nn.MultiheadAttention):
                for name, parts in attention_columns(module, (given, named), output):
                    if name in layers:
                        distinct = parts[: layers[name].groups]
                        seen[layers[name].name] = torch.cat([sums.products(rows, 1) for rows in distinct])
            else:
                assert isinstance(module, nn.RNNBase | nn.RNNCellBase)
                met = columns(module, (given, named), output)
                seen |= {layers[name].name: sums.products(rows, 1) for name, rows in met if name in layers}
        except Exception as error:  # whatever comes of a subclass with a forward pass of its own
            names = ", ".join(layer.name for layer in layers.values())
            warnings.warn(f"layers {names} are rounded to nearest: {error}", stacklevel=2)
            return
        for name, products in seen.items():
            sums.add(name, products)

    return record


def damped(h: Tensor) -> Tensor:
    """H with a share of its mean diagonal added, or an embedding's counts with a share of their mean."""
    if h.ndim == 1:
        return h + (h.mean() * DAMPING).clamp_min(1e-12)
    diagonal = h.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(dim=1, keepdim=True).clamp_min(1e-12)
    found = h.clone()
    found.diagonal(dim1=1, dim2=2).add_(mean * DAMPING)
    return found
