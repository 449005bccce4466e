"""The task's metric and the distance to the dense model, both from one pass over a split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.channels_last import bears_channels_last, channels_last
from autocompress.task import Batch, Split, Task, arguments, divergence, length, tensors
from autocompress.views import Views, mean, others

MEMORY = 512 * 2**20
"""Bytes of dense outputs that are kept for comparison; what comes after them is not compared."""


@dataclass(frozen=True, slots=True)
class Quality:
    """`score` is the task's metric; `loss` is the mean divergence from the dense model's outputs.

    `teacher_loss` is that from the dense model's mean over `VIEWS` views of each input; NaN where they were not asked.
    """

    score: float
    loss: float
    teacher_loss: float = math.nan


VIEWS = 2
"""Enough to tell who learned from several: the teacher of recipes with more is nearer to this one than to one view."""


SCREEN_INPUTS = 1024
"""Inputs that a candidate is screened on. On 256 a search learns the inputs; from 1,000 on it learns the model."""
LARGE = 1.5
"""A split this many times larger is screened first; a smaller one is always scored whole."""


def screening(
    task: Task, dense: nn.Module, inputs: int = SCREEN_INPUTS, *, views: Views | None = None
) -> QualityMeter | None:
    """A meter on `screening_part`; None if there is none."""
    part = screening_part(task, inputs)
    return None if part is None else QualityMeter(task, dense, part=part, views=views)


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

    def __init__(
        self,
        task: Task,
        dense: nn.Module,
        split: Split = "val",
        part: Sequence[Batch] | None = None,
        views: Views | None = None,
    ) -> None:
        """`part` holds the batches to score on instead of all of `split`; the task must have `score_batches`.

        A part is scored channels last where the dense model bears it, all of a split as the model is. With `views` the
        dense model is asked about another version of each input as well, once.
        """
        self._task, self._split, self.part, self._views = task, split, part, views
        self._reference: list[tuple[Any, Any]] = []  # outputs, and their mean over views
        self._bytes, self._full = 0, False
        self.channels_last = part is not None and bears_channels_last(dense, part[0].inputs)
        handle = dense.register_forward_hook(self._record, with_kwargs=True)
        try:
            self.dense = self._score(dense)
        finally:
            handle.remove()

    def _score(self, model: nn.Module) -> float:
        if self.part is None:
            return float(self._task.score(model, self._split))
        with channels_last(model, wanted=self.channels_last):
            return float(self._task.score_batches(model, self.part))  # type: ignore[attr-defined]  # optional member

    def _record(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], outputs: Any) -> None:
        size = (1 if self._views is None else 2) * sum(t.numel() * t.element_size() for t in tensors(outputs))
        # the first batch always, then all up to the first that does not fit: batches are compared in order
        self._full = self._full or (bool(self._reference) and self._bytes + size > MEMORY)
        if not self._full:
            self._bytes += size
            self._reference.append((_detached(outputs), self._told(module, (given, named), outputs)))

    def _told(self, module: nn.Module, asked: tuple[tuple[Any, ...], dict[str, Any]], outputs: Any) -> Any:
        """The mean of `outputs` and those for other versions of the inputs; None without views."""
        if self._views is None:
            return None
        given, named = asked
        answers = []
        for version in others(self._views, named or (given[0] if len(given) == 1 else given), VIEWS - 1):
            positional, keywords = arguments(version)
            answers.append(module.forward(*positional, **keywords))  # not a call, which would come here again
        return _detached(mean([*answers, outputs]))

    def __call__(self, model: nn.Module) -> Quality:
        """One pass: the metric, and the divergences accumulated as the outputs go by.

        Raises `FloatingPointError` when one of them is not a number.
        """
        total, taught, count = 0.0, 0.0, 0

        def compare(module: nn.Module, given: Any, outputs: Any) -> None:  # noqa: ARG001
            nonlocal total, taught, count
            if count < len(self._reference):
                own = _detached(outputs)
                dense, told = self._reference[count]
                with torch.no_grad():
                    total += float(divergence(self._task, own, dense))
                    taught += math.nan if told is None else float(divergence(self._task, own, told))
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
        return Quality(score, loss, taught / count if count else math.nan)


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
