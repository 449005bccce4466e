"""Recovery training: the compressed weights learn again, on their grid and under their masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

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
        return pruned + (self.grid.decode(self.grid.encode(pruned)) - pruned).detach()


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
            spread = p.grad.std(unbiased=False).clamp_min(1e-12)
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
    device = next(student.parameters()).device
    trained = [p.requires_grad_() for p in student.parameters() if p.is_floating_point()]
    optimizer = torch.optim.SGD(trained, lr=recovery.lr, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    plateau = Plateau(recovery.adjust_factor, recovery.adjust_patience)
    total, interval = recovery.epochs * steps_per_epoch, max(1, steps_per_epoch // REPORTS_PER_EPOCH)
    layers = hints.layers if recovery.hint_weight > 0 else ()
    student.train()
    step, recent = 0, 0.0
    with torch.random.fork_rng(devices=[]), Features(student, layers) as own, Features(teacher, layers) as given:
        torch.manual_seed(seed)
        for epoch in range(recovery.epochs):
            for given_batch in task.batches("train", seed + epoch):
                batch = Batch(*given_batch)
                if length(batch.inputs) < 2:  # batch norms cannot train on a single example
                    step += 1
                    continue
                inputs = to_device(batch.inputs, device)
                with torch.no_grad():
                    target = call(teacher, inputs) if recovery.distill_weight > 0 or layers else None
                weights = {name: c.apply(student.get_parameter(name)) for name, c in constraints.items()}
                positional, named = arguments(inputs)
                outputs = functional_call(student, weights, positional, named)
                hint = hint_loss(own.values, given.values, hints.kept) if layers else None
                loss = recovery_loss(task, recovery, outputs, target, batch, hint)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise FloatingPointError(f"the recovery loss became {value} at step {step} of {total}")
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recovery, min(step, total), total, plateau)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                normalise_gradients(trained, recovery.gradient)
                optimizer.step()
                step, recent = step + 1, recent + value
                if step % interval == 0:
                    plateau.report(recent / interval)
                    recent = 0.0
                if progress is not None:
                    progress(step, total)
    student.eval()
    for p in trained:
        p.requires_grad_(False)
