"""Losses that pull a compressed model toward its teacher. Trains nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.policy import Recovery
from autocompress.task import Batch, Task, divergence


class Features:
    """While open, records the outputs of the named modules of `model` during each forward pass."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.values: dict[str, Tensor] = {}
        self._model, self._names = model, names
        self._handles: list[Any] = []

    def __enter__(self) -> Features:
        for name in self._names:
            module = self._model.get_submodule(name)
            self._handles.append(module.register_forward_hook(self._recorder(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, given: Any, output: Any) -> None:  # noqa: ARG001
            if isinstance(output, Tensor):
                self.values[name] = output

        return record


def hint_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Tensor:
    """Mean over hint layers of |student - teacher|^2 / |teacher|^2 (FitNets, 1412.6550, equation 3).

    A pruned layer is compared with the teacher's channels that it kept (`kept[name]`), so no projection has to be
    learnt. Channels run along dimension 1, or the last for a linear layer over positions: the one that shrank.
    """
    terms = []
    for name, value in student.items():
        target = teacher[name].detach()
        if name in kept:
            shrunk = 1 if value.shape[1] != target.shape[1] else -1
            target = target.index_select(shrunk, kept[name].to(target.device))
        terms.append((value - target).square().sum() / target.square().sum().clamp_min(1e-12))
    return torch.stack(terms).mean()


def recovery_loss(
    task: Task, recovery: Recovery, outputs: Any, teacher: Any, batch: Batch, hint: Tensor | None
) -> Tensor:
    """(1 - a) task loss + a soft-target divergence + b hint loss (Hinton et al. 2015, section 2)."""
    weight = recovery.distill_weight
    total = torch.zeros((), device=hint.device if hint is not None else None)
    if weight < 1:
        total = total + (1 - weight) * task.loss(outputs, batch)
    if weight > 0:
        total = total + weight * divergence(task, outputs, teacher, recovery.temperature)
    if hint is not None:
        total = total + recovery.hint_weight * hint
    return total
