"""A task without labels: the compressed model should go on giving what the trained one gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from autocompress.errors import TaskError
from autocompress.task import (
    ArrayTask,
    Batch,
    Direction,
    Split,
    first_output,
    length,
    rows,
    soft_target_divergence,
    squared_error_divergence,
)

Closeness = Literal["cosine", "rank", "agreement"]
MOST_RANKED = 2000
"""Inputs whose pairs `rank` compares: two million pairs."""

Inputs = Any
"""A tensor or array, or a tuple or dictionary of them as arguments of the model, all as long as there are inputs."""


class OutputsTask(ArrayTask):
    """Inputs alone; what the trained model gives for them is what is wanted.

    The metric says how near the outputs stay, 1 being equal: `cosine`, their mean cosine similarity; `rank`, for
    embeddings, the rank correlation (Spearman) of the similarities of all pairs of inputs; `agreement`, for
    classifiers, the share of inputs whose largest logit, along dimension 1, is the same. Of several outputs the first
    floating-point tensor counts.
    """

    direction: Direction = "max"

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        train: Inputs | Callable[[], Inputs],
        val: Inputs | Callable[[], Inputs],
        test: Inputs | Callable[[], Inputs],
        *,
        metric: Closeness = "cosine",
        name: str = "outputs",
        batch_size: int = 32,
    ) -> None:
        """`model` is a trained module or a function that builds one; a split is its inputs or a function giving them.

        Raises `TaskError` for an unknown metric.
        """
        if metric not in get_args(Closeness):
            raise TaskError(f"metric is {metric!r}; it must be one of {', '.join(get_args(Closeness))}")
        super().__init__(model, train, val, test, name=name, batch_size=batch_size)
        self.metric: str = metric

    def split(self, split: Split) -> tuple[Inputs, Tensor]:
        """All inputs of `split`, and what the trained model gives for them, in memory after the first call."""
        if split not in self._loaded:
            source = self._sources[split]
            inputs = _as_tensors(source() if callable(source) else source)
            lengths = {len(t) for t in _flat(inputs)}
            if len(lengths) != 1 or 0 in lengths:
                said = ", ".join(map(str, sorted(lengths))) or "no"
                raise TaskError(
                    f"split {split!r} of task {self.name!r} has tensors of {said} inputs; "
                    "all must have as many, at least one"
                )
            self._loaded[split] = inputs, self._given(inputs)
        return self._loaded[split]

    def _given(self, inputs: Inputs) -> Tensor:
        parts = torch.split(torch.arange(length(inputs)), self.batch_size)
        return self.outputs(self.model(), (Batch(rows(inputs, part), part) for part in parts))[0].clone()

    def prepare(self, inputs: Inputs) -> Inputs:
        """Inputs are what the model takes."""
        return inputs

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Distance from what the trained model gave."""
        return self._distance(first_output(outputs), batch.target, 1.0)

    def divergence(self, outputs: Any, teacher: Any, temperature: float = 1.0) -> Tensor:
        """Softened Kullback-Leibler divergence of logits, squared error over power of anything else."""
        return self._distance(first_output(outputs), first_output(teacher), temperature)

    def _distance(self, found: Tensor, wanted: Tensor, temperature: float) -> Tensor:
        wanted = wanted.to(found.device)
        if self.metric == "agreement":
            return soft_target_divergence(found, wanted, temperature)
        return squared_error_divergence(found, wanted)

    def score_batches(self, model: nn.Module, batches: Iterable[Batch]) -> float:
        """The metric on `batches`."""
        return closeness(*self.outputs(model, batches), self.metric)


def closeness(found: Tensor, wanted: Tensor, metric: str) -> float:
    """How near outputs (n, ...) are to those wanted, by a metric of `OutputsTask`."""
    if metric == "agreement":
        return float((found.argmax(dim=1) == wanted.argmax(dim=1)).double().mean())
    a, b = (F.normalize(t.flatten(1).double(), dim=1) for t in (found, wanted))
    if metric == "cosine":
        return float((a * b).sum(dim=1).mean())
    if len(a) < 3:
        raise TaskError(f"the metric rank compares pairs of inputs: {len(a)} are too few, give 3 or more")
    mine, theirs = _similarities(a[:MOST_RANKED]), _similarities(b[:MOST_RANKED])
    if np.ptp(theirs) == 0:
        raise TaskError("all inputs are alike to the trained model: there are no ranks to keep")
    return float(spearmanr(mine, theirs).statistic) if np.ptp(mine) > 0 else 0.0


def _similarities(rows: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of all pairs of unit rows."""
    found: np.ndarray[Any, np.dtype[np.float64]] = (rows @ rows.T).numpy()
    return found[np.triu_indices(len(rows), k=1)]


def _as_tensors(value: Any) -> Inputs:
    if isinstance(value, Mapping):
        return {str(key): _as_tensors(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_as_tensors(item) for item in value)
    found = torch.as_tensor(value)
    return found.float() if isinstance(value, np.ndarray) and found.dtype == torch.float64 else found


def _flat(value: Inputs) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value
    return [t for item in items for t in _flat(item)]
