"""The task's metric and the distance to the dense model, both from one pass over a split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.channels_last import bears_channels_last, channels_last
from autocompress.task import Batch, Split, Task, divergence, length, tensors

MEMORY = 512 * 2**20
"""Bytes of dense outputs that are kept for comparison; what comes after them is not compared."""


@dataclass(frozen=True, slots=True)
class Quality:
    """`score` is the task's metric; `loss` is the mean divergence from the dense model's outputs."""

    score: float
    loss: float


SCREEN_INPUTS = 1024
"""Inputs that a candidate is screened on. On 256 a search learns the inputs; from 1,000 on it learns the model."""
LARGE = 1.5
"""A split this many times larger is screened first; a smaller one is always scored whole."""


def screening(task: Task, dense: nn.Module, inputs: int = SCREEN_INPUTS) -> QualityMeter | None:
    """A meter on `screening_part`; None if there is none."""
    part = screening_part(task, inputs)
    return None if part is None else QualityMeter(task, dense, part=part)


def screening_part(task: Task, inputs: int = SCREEN_INPUTS) -> list[Batch] | None:
    """The first batches of `val` that hold `inputs`; None if `val` is hardly larger than they are.

    None as well if the task cannot score a part.
    """
    if not hasattr(task, "score_batches"):
        return None
    part: list[Batch] = []
    taken, count = 0, 0
    for batch in task.batches("val", 0):
        count += length(batch[0])
        if taken < inputs:
            part.append(Batch(*batch))
            taken = count
        if count >= LARGE * max(taken, inputs):
            return part
    return None


class QualityMeter:
    """Scores candidates on one split, or a part of it. The dense model's outputs are recorded at construction."""

    def __init__(self, task: Task, dense: nn.Module, split: Split = "val", part: Sequence[Batch] | None = None) -> None:
        """`part` holds the batches to score on instead of all of `split`; the task must have `score_batches`.

        A part is scored channels last where the dense model bears it, all of a split as the model is.
        """
        self._task, self._split, self.part = task, split, part
        self._reference: list[Any] = []
        self._bytes, self._full = 0, False
        self.channels_last = part is not None and bears_channels_last(dense, part[0].inputs)
        handle = dense.register_forward_hook(self._record)
        try:
            self.dense = self._score(dense)
        finally:
            handle.remove()

    def _score(self, model: nn.Module) -> float:
        if self.part is None:
            return float(self._task.score(model, self._split))
        with channels_last(model, wanted=self.channels_last):
            return float(self._task.score_batches(model, self.part))  # type: ignore[attr-defined]  # optional member

    def _record(self, module: nn.Module, given: Any, outputs: Any) -> None:  # noqa: ARG002
        size = sum(t.numel() * t.element_size() for t in tensors(outputs))
        # the first batch always, then all up to the first that does not fit: batches are compared in order
        self._full = self._full or (bool(self._reference) and self._bytes + size > MEMORY)
        if not self._full:
            self._bytes += size
            self._reference.append(_detached(outputs))

    def __call__(self, model: nn.Module) -> Quality:
        """One pass: the metric, and the divergence accumulated as the outputs go by.

        Raises `FloatingPointError` when either is not a number.
        """
        total, count = 0.0, 0

        def compare(module: nn.Module, given: Any, outputs: Any) -> None:  # noqa: ARG001
            nonlocal total, count
            if count < len(self._reference):
                with torch.no_grad():
                    total += float(divergence(self._task, _detached(outputs), self._reference[count]))
                count += 1

        handle = model.register_forward_hook(compare)
        try:
            score = self._score(model)
        finally:
            handle.remove()
        gap = self.dense - score if self._task.direction == "max" else score - self.dense
        loss = total / count if count else gap  # a score that never calls the model leaves nothing to compare
        if not (math.isfinite(score) and math.isfinite(loss)):
            raise FloatingPointError(f"{self._task.metric} is {score} and the divergence from the dense model {loss}")
        return Quality(score, loss)


def _detached(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.detach().cpu().clone()  # clone: a model may reuse its output's memory
    if isinstance(outputs, dict):
        return {key: _detached(value) for key, value in outputs.items()}
    if isinstance(outputs, tuple | list):
        return tuple(_detached(value) for value in outputs)
    if hasattr(outputs, "items"):
        return {key: _detached(value) for key, value in outputs.items()}
    return outputs
