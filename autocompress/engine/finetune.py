"""Recovery training: the compressed weights learn again, on their grid and under their masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from autocompress.engine.distill import Features, hint_loss, recovery_loss
from autocompress.engine.quantize import Grid
from autocompress.engine.schedules import Plateau, learning_rate
from autocompress.policy import Gradient, Recovery
from autocompress.task import Batch, Task, arguments, call, length, to_device

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
REPORTS_PER_EPOCH = 4
"""How often the plateau adjustment hears the mean recovery loss since its last report."""


@dataclass(frozen=True)
class Constraint:
    """What a weight must stay true to while it trains: its pruning mask and, below 16 bits, its grid."""

    mask: Tensor | None
    grid: Grid | None

    def apply(self, weight: Tensor) -> Tensor:
        """The weight as it will be stored; the gradient passes straight through rounding (1308.3432, section 4)."""
        pruned = weight if self.mask is None else weight * self.mask.to(weight.device)
        if self.grid is None:
            return pruned
        stored = self.grid.decode(self.grid.encode(pruned))
        if self.mask is not None:  # a grid of 1 bit has no code for zero
            stored = stored * self.mask.to(weight.device)
        return pruned + (stored - pruned).detach()


@dataclass(frozen=True)
class Hints:
    """Layers whose outputs are compared with the teacher's, and the channels that a pruned one kept."""

    layers: tuple[str, ...] = ()
    kept: Mapping[str, Tensor] = field(default_factory=dict)


def normalise_gradients(parameters: Iterable[Tensor], kind: Gradient) -> None:
    """Rewrite the gradients of weights with two or more dimensions in place.

    `centralise` removes each output row's mean (Yong et al., 2004.01461, equation 1). `standardise` gives each
    tensor's gradient mean 0 and standard deviation 1, times the weight's root mean square, so that the learning
    rate becomes the relative change per step (in the manner of LARS, 1708.03888).
    """
    if kind == "none":
        return
    for p in parameters:
        if p.grad is None or p.ndim < 2:
            continue
        if kind == "centralise":
            p.grad -= p.grad.mean(dim=tuple(range(1, p.ndim)), keepdim=True)
        else:
            spread = p.grad.std(unbiased=False)
            spread = spread.clamp_min(1e-6 * float(p.grad.abs().max())).clamp_min(1e-12)  # a constant has none
            p.grad = (p.grad - p.grad.mean()) / spread * p.detach().square().mean().sqrt()


def train(
    student: nn.Module,
    teacher: nn.Module,
    task: Task,
    recovery: Recovery,
    constraints: Mapping[str, Constraint],
    hints: Hints,
    *,
    steps_per_epoch: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train `student` in place for `recovery.epochs`; `constraints` maps weight names to what they must obey.

    Batches of epoch e come from `task.batches("train", seed + e)`. `progress(step, total)` is called after each
    step. Raises `FloatingPointError` when the loss is not finite.
    """
    trained = [p.requires_grad_() for p in student.parameters() if p.is_floating_point()]
    optimizer = torch.optim.SGD(trained, lr=recovery.lr, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    plateau = Plateau(recovery.adjust_factor, recovery.adjust_patience)
    total, interval = recovery.epochs * steps_per_epoch, max(1, steps_per_epoch // REPORTS_PER_EPOCH)
    layers = hints.layers if recovery.hint_weight > 0 else ()
    recent: list[float] = []
    student.train()
    with torch.random.fork_rng(devices=[]), Features(student, layers) as own, Features(teacher, layers) as given:
        torch.manual_seed(seed)
        for step, pair in enumerate(_epochs(task, recovery.epochs, seed)):
            batch = Batch(*pair)
            outputs = _outputs(student, batch, constraints)
            if outputs is not None:
                target = _told(teacher, batch) if recovery.distill_weight > 0 or layers else None
                hint = hint_loss(own.values, given.values, hints.kept) if layers else None
                loss = recovery_loss(task, recovery, outputs, target, batch, hint)
                recent.append(float(loss.detach()))
                if not math.isfinite(recent[-1]):
                    raise FloatingPointError(f"the recovery loss became {recent[-1]} at step {step} of {total}")
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recovery, min(step, total), total, plateau)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                normalise_gradients(trained, recovery.gradient)
                optimizer.step()
            if (step + 1) % interval == 0 and recent:
                plateau.report(sum(recent) / len(recent))
                recent.clear()
            if progress is not None:
                progress(step + 1, total)
    student.eval()
    for p in trained:
        p.requires_grad_(False)


def _epochs(task: Task, epochs: int, seed: int) -> Iterator[Any]:
    """Training batches of all epochs, one after another."""
    for epoch in range(epochs):
        yield from task.batches("train", seed + epoch)


def _outputs(student: nn.Module, batch: Batch, constraints: Mapping[str, Constraint]) -> Any:
    """What the constrained student says; None for a lone example that a batch norm cannot train on."""
    inputs = to_device(batch.inputs, next(student.parameters()).device)
    weights = {name: c.apply(student.get_parameter(name)) for name, c in constraints.items()}
    positional, named = arguments(inputs)
    try:
        return functional_call(student, weights, positional, named)
    except ValueError:
        if length(inputs) > 1:
            raise
        return None


def _told(teacher: nn.Module, batch: Batch) -> Any:
    """What the teacher says."""
    with torch.no_grad():
        return call(teacher, to_device(batch.inputs, next(teacher.parameters()).device))
