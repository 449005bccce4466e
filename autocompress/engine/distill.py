"""The teacher's answers, and losses that pull a compressed model toward them. Trains nothing itself."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.engine.precision import Precision
from autocompress.policy import Recovery
from autocompress.task import Batch, Task, call, divergence, to_device
from autocompress.views import Views, changed, mean, others

TEACHER_BYTES = 256 * 2**20
"""Most memory for the teacher's answers."""


def in_single_precision(outputs: Any) -> Any:
    """Outputs whose halves of either kind are float32: what losses are computed in."""
    return changed(outputs, lambda t: t.float() if t.dtype in (torch.bfloat16, torch.float16) else t)


class Teacher:
    """The dense model, asked again and again about the same batches: what it said is remembered while there is room.

    Training draws the batches of an epoch from its number, so every later candidate brings the same ones.
    """

    def __init__(
        self,
        model: nn.Module,
        limit: int = TEACHER_BYTES,
        views: Views | None = None,
        quick: nn.Module | None = None,
    ) -> None:
        """`limit` in bytes. `model` must stay as it is, in evaluation mode. `views` gives other versions of inputs.

        `quick` computes the same sooner; it answers where nobody looks inside.
        """
        self.model, self.quick = model, model if quick is None else quick
        self._limit, self._bytes, self._views = limit, 0, views
        self._said: OrderedDict[bytes, tuple[Any, int, int]] = OrderedDict()
        self._training = 0

    def begin(self) -> None:
        """A new training starts: what only earlier ones asked for may be forgotten."""
        self._training += 1

    def __call__(self, inputs: Any, precision: Precision, *, remember: bool = True, views: int = 1) -> Any:
        """Outputs for the inputs of a batch, in single precision, without gradient.

        With more `views` the mean of what the model says of so many versions of the inputs, themselves included.
        Without `remember` the model really runs, on the inputs themselves last, for hooks that look at it. Raises
        `TaskError` if there are not so many views.
        """
        key = _fingerprint(inputs, precision, views) if remember else None
        if key is None:
            return self._run(self.quick if remember else self.model, inputs, precision, views)
        if key not in self._said:
            return self._keep(key, self._run(self.quick, inputs, precision, views))
        outputs, size, _ = self._said.pop(key)
        self._said[key] = outputs, size, self._training
        return outputs

    def _run(self, model: nn.Module, inputs: Any, precision: Precision, views: int) -> Any:
        device = next(model.parameters()).device
        answers = []
        for version in (*others(self._views, inputs, views - 1), inputs):
            placed = to_device(version, device)
            with torch.no_grad(), precision.computing():
                answers.append(in_single_precision(call(model, precision.laid_out(placed))))
        return mean(answers)

    def _keep(self, key: bytes, outputs: Any) -> Any:
        """Remember `outputs` at the cost of earlier trainings' alone: a cycle longer than the memory would get none."""
        sizes: list[int] = []

        def copied(value: Tensor) -> Tensor:  # a model may use the memory of its outputs again
            sizes.append(value.numel() * value.element_size())
            return value.clone()

        own = changed(outputs, copied)
        size = sum(sizes)
        while self._said and self._bytes + size > self._limit:
            oldest = next(iter(self._said))
            if self._said[oldest][2] == self._training:
                return outputs
            self._bytes -= self._said.pop(oldest)[1]
        if size <= self._limit:
            self._said[key] = own, size, self._training
            self._bytes += size
        return outputs


def _fingerprint(inputs: Any, precision: Precision, views: int) -> bytes | None:
    """Stands for the content of inputs; None if they hold anything but tensors, numbers and texts."""
    found = hashlib.blake2b(repr((precision, views)).encode(), digest_size=16)
    for part in _parts(inputs):
        if isinstance(part, Tensor):
            value = part.detach().cpu().contiguous()
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.flatten().view(torch.uint8).numpy().data)
        elif part is None or isinstance(part, str | int | float | bool):
            found.update(repr(part).encode())
        else:
            return None
        found.update(b"|")
    return found.digest()


def _parts(value: Any) -> Iterator[Any]:
    """All that is in inputs, in order, with the names and counts that give it its structure."""
    if isinstance(value, Mapping):
        yield f"mapping of {len(value)}"
        for key, item in value.items():
            yield str(key)
            yield from _parts(item)
    elif isinstance(value, tuple | list):
        yield f"sequence of {len(value)}"
        for item in value:
            yield from _parts(item)
    else:
        yield value


class Features:
    """While open, records the outputs of the named modules of `model` during each forward pass."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.values: dict[str, Tensor] = {}
        self._model, self.names = model, names
        self._handles: list[Any] = []

    def __enter__(self) -> Features:
        for name in self.names:
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
    for name, features in student.items():
        value, target = features.float(), teacher[name].detach().float()
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
