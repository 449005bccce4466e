"""Fits the layers of a narrower model one after the other to the dense model's outputs, given what each really sees.

Fits to the dense model's inputs leave errors that add up from layer to layer; here each layer makes up for those before
it. One forward pass does it: every layer is fitted when its input arrives, before it answers. Knows nothing about
which channels stay, zeros or grids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.engine.moments import damped, patches
from autocompress.engine.recalibrate import norms
from autocompress.graph import Graph, Layer
from autocompress.task import Batch, call, first_input, head, length, to_device

INPUTS = 512
"""Examples in the pass, as many of them as `ACTIVATION_BYTES` allow."""
ACTIVATION_BYTES = 2**28
"""Most memory for the largest output of a layer."""
COLUMNS_PER_INPUT = 32
"""Output positions that are sampled for each row of H."""
LEAST_COLUMNS = 4096


@dataclass(frozen=True, eq=False)
class Fitted:
    """A layer of the narrower model: `weight`, damped `h` (groups, d, d) of its inputs, and `bias` if it has one."""

    weight: Tensor
    h: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class _Target:
    """Output positions (columns,) of a layer, and the dense model's outputs there, without bias (out, columns).

    `mean` (out,) is that over all positions.
    """

    chosen: Tensor
    outputs: Tensor
    mean: Tensor


class Reconstruction:
    """The dense model's outputs, which narrower models are fitted to.

    Layers that are called twice in one pass, or share their weight, are left alone.
    """

    def __init__(self, teacher: nn.Module, graph: Graph, batches: Sequence[Batch], seed: int) -> None:
        """Runs the dense model on as many of the calibration inputs as fit."""
        largest = max(layer.positions * layer.shape[0] for layer in graph.layers)
        self._inputs = merged(batches, max(1, min(INPUTS, ACTIVATION_BYTES // (4 * max(1, largest)))))
        uses = Counter(id(module._parameters.get("weight")) for module in teacher.modules())
        modules = {layer.name: teacher.get_submodule(layer.name) for layer in graph.layers if layer.is_affine}
        self._layers = [x for x in graph.layers if x.is_affine and uses[id(modules[x.name].weight)] == 1]
        self._targets: dict[str, _Target] = {}
        generator, calls = torch.Generator().manual_seed(seed), Counter[str]()

        def record(layer: Layer) -> Callable[..., None]:
            def hook(module: nn.Module, _given: Any, output: Tensor) -> None:
                calls[layer.name] += 1
                if calls[layer.name] == 1:
                    self._targets[layer.name] = _target(module, output.detach(), layer, generator)
                else:
                    self._targets.pop(layer.name, None)

            return hook

        handles = [modules[layer.name].register_forward_hook(record(layer)) for layer in self._layers]
        _run(teacher, self._inputs, handles)

    def mean(self, layer: Layer) -> Tensor | None:
        """Mean (out,) of the dense layer's outputs without bias; None for a layer that is left alone."""
        return self._targets[layer.name].mean if layer.name in self._targets else None

    def fit(self, student: nn.Module, rows: Mapping[str, Tensor], norm: Mapping[str, bool]) -> dict[str, Fitted]:
        """Fit layers of `student` in place, starting from the weights it has, and give what they became.

        `rows` names the output channels that stay where not all do. `norm` names the layers to fit, and says whether a
        batch norm whose statistics are estimated anew takes away the mean of their outputs; norms use this pass's then.
        """
        found: dict[str, Fitted] = {}

        def hook(layer: Layer, target: _Target) -> Callable[..., None]:
            def fit(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
                x = patches(module, first_input(given, named).detach().float(), target.chosen)
                wanted = target.outputs[rows[layer.name]] if layer.name in rows else target.outputs
                found[layer.name] = _fit(module, x.cpu(), wanted, norm[layer.name])

            return fit

        handles = [
            student.get_submodule(layer.name).register_forward_pre_hook(
                hook(layer, self._targets[layer.name]), with_kwargs=True
            )
            for layer in self._layers
            if layer.name in self._targets and layer.name in norm
        ]
        if any(norm.values()) and length(self._inputs) > 1:
            for module in norms(student).values():
                module.train()
        try:
            _run(student, self._inputs, handles)
        finally:
            student.eval()
        return found


def _run(model: nn.Module, inputs: Any, handles: Sequence[Any]) -> None:
    try:
        with torch.no_grad():
            call(model, to_device(inputs, next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()


def _target(module: nn.Module, output: Tensor, layer: Layer, generator: torch.Generator) -> _Target:
    """A sample of the outputs: many times the rank of H."""
    flat = output.movedim(-1 if isinstance(module, nn.Linear) else 1, -1).flatten(0, -2).float().cpu()  # (columns, out)
    if module.bias is not None:
        flat = flat - module.bias.detach().float().cpu()  # type: ignore[operator]
    limit = max(LEAST_COLUMNS, COLUMNS_PER_INPUT * prod(layer.shape[1:]))
    every = torch.arange(len(flat))
    chosen = torch.randperm(len(flat), generator=generator)[:limit].sort().values if len(flat) > limit else every
    return _Target(chosen, flat[chosen].T.contiguous(), flat.double().mean(dim=0).float())


def _fit(module: nn.Module, x: Tensor, wanted: Tensor, normed: bool) -> Fitted:
    """Fit `module` to outputs `wanted` (out, n) on its columns `x` (groups, d, n), starting from what it is."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    seen = (x @ x.transpose(1, 2)).double()  # (groups, d, d)
    rows = weight.detach().float().cpu().reshape(len(x), -1, x.shape[1])  # (groups, out / groups, d)
    gap = wanted.reshape(len(x), -1, x.shape[2]) - rows @ x
    step = _step(x, gap, seen, affine=normed or bias is not None)
    if bool(torch.isfinite(step).all()):
        weight.detach().copy_((rows + step).reshape(weight.shape))
        if bias is not None:
            bias.detach().add_((gap - step @ x).mean(dim=2).flatten().to(bias.device, bias.dtype))
    kept = None if bias is None else bias.detach().cpu().clone()
    return Fitted(weight.detach().cpu().clone(), damped(seen).float(), kept)


def _step(x: Tensor, gap: Tensor, seen: Tensor, *, affine: bool) -> Tensor:
    """Change (groups, out / groups, d) of the rows that takes most of `gap` away; with a free offset if `affine`.

    `seen` is the sum of x x^T over the inputs `x` (groups, d, n). Damped, so that directions that they hardly have keep
    what the weight was fitted to before.
    """
    along = (x @ gap.transpose(1, 2)).double()  # (groups, d, out / groups)
    if affine:
        total, missing = x.sum(dim=2, keepdim=True).double(), gap.sum(dim=2, keepdim=True).double()
        seen = seen - total @ total.transpose(1, 2) / x.shape[2]
        along = along - total @ missing.transpose(1, 2) / x.shape[2]
    step: Tensor = torch.linalg.solve(damped(seen), along)
    return step.transpose(1, 2).float()


def merged(batches: Sequence[Batch], count: int) -> Any:
    """The first `count` inputs of the batches as one; of the first batch alone if the batches do not go together."""
    taken, total = [], 0
    for batch in batches:
        if total < count:
            taken.append(batch.inputs)
            total += length(batch.inputs)
    try:
        return head(_joined(taken), count)
    except (RuntimeError, ValueError):
        return head(taken[0], count)


def _joined(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts)) if first.ndim else first
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple | list):
        return tuple(_joined(items) for items in zip(*parts, strict=True))
    return first
