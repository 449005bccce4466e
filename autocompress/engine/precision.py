"""In which arithmetic and memory layout recovery training runs fastest on this processor.

bfloat16 is several times faster where the processor has instructions for it and ten times slower where it has not, so
a few steps are timed. The answer is a value: whoever must get the same weights again keeps it. Never used for scoring.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.channels_last import bears_channels_last, channels_last
from autocompress.task import call, few, tensors, to_device

PROBE_INPUTS, PROBE_STEPS = 32, 5
LEAST_GAIN = 1.3
"""How much faster than plain single precision a step must be: less may be noise, and costs exactness."""
LEAST_SECONDS = 0.01
"""A plain step on the probe's inputs that takes less than this is left as it is."""
MOST_ERROR = 0.1
"""Share of the outputs' power that bfloat16 may be off."""

_decided: dict[Any, Precision] = {}


@dataclass(frozen=True, slots=True)
class Precision:
    """`autocast` computes in bfloat16 where torch knows that to be sound; `channels_last` is the layout of images."""

    autocast: bool = False
    channels_last: bool = False

    def laid_out(self, value: Any) -> Any:
        """Inputs, or a weight, in this layout: four-dimensional tensors change, whatever holds them."""
        if not self.channels_last:
            return value
        if isinstance(value, Tensor):
            return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
        if isinstance(value, dict):
            return {key: self.laid_out(item) for key, item in value.items()}
        return tuple(self.laid_out(item) for item in value) if isinstance(value, tuple | list) else value

    def computing(self) -> torch.autocast:
        """The context that a forward pass runs in."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast)


PLAIN = Precision()
"""Single precision in the layout of the user's model."""


def quickest(model: nn.Module, inputs: Any) -> Precision:
    """The precision of the fastest training step of `model` on a few of `inputs`; decided once in a process.

    Plain single precision if nothing is clearly faster, the model is small, not on the CPU, or does not bear it.
    """
    shapes = [tuple(p.shape) for p in model.parameters()], [tuple(t.shape) for t in tensors(inputs)]
    key = repr((shapes, torch.get_num_threads()))
    if key not in _decided:
        _decided[key] = _probe(model, inputs)
    return _decided[key]


def _probe(model: nn.Module, inputs: Any) -> Precision:
    if any(p.device.type != "cpu" for p in model.parameters()):
        return PLAIN
    some = few(model, to_device(inputs, torch.device("cpu")), PROBE_INPUTS)
    layouts = (False, True) if bears_channels_last(model, some) else (False,)
    trained = copy.deepcopy(model).train().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        try:
            first = min(_step(trained, some, PLAIN) for _ in range(2))  # the very first one also sets things up
        except Exception:  # whatever a model raises that trains only in its own way
            return PLAIN
        if first < LEAST_SECONDS:
            return PLAIN
        others = [Precision(autocast, layout) for layout in layouts for autocast in (False, True)][1:]
        bearable = [p for p in others if _bears(trained, some, p, 3 * first)]
        took = _fastest(trained, some, [PLAIN, *bearable])
    best = min(took, key=lambda p: took[p])
    return best if took[PLAIN] > LEAST_GAIN * took[best] else PLAIN


def _bears(model: nn.Module, inputs: Any, precision: Precision, limit: float) -> bool:
    """Whether a step works, ends within `limit` seconds, and gives nearly the same outputs."""
    try:
        if _step(model, inputs, precision) > limit:
            return False
        model.eval()
        with torch.no_grad():
            usual, other = tensors(call(model, inputs)), tensors(_outputs(model, inputs, precision))
        pairs = zip(usual, other, strict=True)
        return all(bool((a - b.float()).square().sum() <= MOST_ERROR * a.square().sum()) for a, b in pairs)
    except Exception:  # whatever a model raises when a type or layout does not suit it
        return False
    finally:
        model.train()


def _fastest(model: nn.Module, inputs: Any, candidates: Sequence[Precision]) -> dict[Precision, float]:
    """Least seconds of a step: what else runs on the machine only adds to it. In turn, so that it strikes all alike."""
    found: dict[Precision, list[float]] = {p: [] for p in candidates}
    for _ in range(PROBE_STEPS):
        for precision, seconds in found.items():
            seconds.append(_step(model, inputs, precision))
    return {precision: min(seconds) for precision, seconds in found.items()}


def _step(model: nn.Module, inputs: Any, precision: Precision) -> float:
    """Seconds of one forward and backward pass."""
    model.zero_grad()
    begun = time.perf_counter()
    with channels_last(model, wanted=precision.channels_last):
        outputs = tensors(_outputs(model, inputs, precision))
        torch.stack([t.float().square().mean() for t in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - begun


def _outputs(model: nn.Module, inputs: Any, precision: Precision) -> Any:
    with precision.computing():
        return call(model, precision.laid_out(inputs))
