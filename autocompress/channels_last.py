"""Convolutions in the memory layout that processors are quicker in, where a model bears it.

Outputs differ from the usual layout's in their last bits, so this is for statistics and for screening, where all
models are treated alike; what is reported is scored in the layout that the user's model has. Knows nothing about tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autocompress.task import call, few, tensors

MOST_DIFFERENCE = 1e-3
"""Of the largest output: far above rounding, far below what a misread layout does."""


def _convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@contextmanager
def channels_last(model: nn.Module, *, wanted: bool) -> Iterator[None]:
    """If `wanted`, weights of 2-d convolutions lie channels last inside, and so does what they output.

    Afterwards every weight has the memory that it had before: inside, none may be changed.
    """
    before = [(module.weight, module.weight.data) for module in _convolutions(model)] if wanted else []
    try:
        for weight, data in before:
            weight.data = data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight, data in before:
            weight.data = data


def bears_channels_last(model: nn.Module, inputs: Any) -> bool:
    """Whether `model` has convolutions, lives on the CPU and gives the same outputs for `inputs` in either layout.

    A `view` of activations does not: it raises, or mixes up what it reads.
    """
    if not _convolutions(model) or any(p.device.type != "cpu" for p in model.parameters()):
        return False
    some = few(model, inputs, 2)
    try:
        with torch.inference_mode():
            usual = tensors(call(model, some))
            with channels_last(model, wanted=True):
                other = tensors(call(model, some))
            pairs = list(zip(usual, other, strict=True))
            return all(bool((a - b).abs().max() <= MOST_DIFFERENCE * a.abs().max()) for a, b in pairs if a.numel())
    except Exception:  # whatever a model raises when a layout does not suit it
        return False
