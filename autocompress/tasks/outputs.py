"""A task without labels: the compressed model should go on giving what the trained one gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from autocompress.errors import TaskError
from autocompress.task import (
    Batch,
    Direction,
    Split,
    call,
    length,
    soft_target_divergence,
    squared_error_divergence,
    tensors,
    to_device,
)

Closeness = Literal["cosine", "rank", "agreement"]
MOST_RANKED = 2000
"""Inputs whose pairs `rank` compares: two million pairs."""

Inputs = Any
"""A tensor or array, or a tuple or dictionary of them as arguments of the model, all as long as there are inputs."""


class OutputsTask:
    """Inputs alone; what the trained model gives for them is what is wanted.

    The metric says how near the outputs stay, 1 being equal: `cosine`, their mean cosine similarity; `rank`, for
    embeddings, the rank correlation (Spearman) of the similarities of all pairs of inputs; `agreement`, for
    classifiers, the share of inputs with the same largest logit. Of several outputs the first floating-point tensor
    counts.
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
        if batch_size < 1:
            raise TaskError(f"batch_size is {batch_size}; it must be 1 or more")
        self.metric: str = metric
        self.name, self.batch_size = name, batch_size
        self._model = model
        self._sources: dict[Split, Any] = {"train": train, "val": val, "test": test}
        self._inputs: dict[Split, Inputs] = {}
        self._wanted: dict[Split, Tensor] = {}

    def model(self) -> nn.Module:
        """A fresh copy of the trained model in evaluation mode."""
        if isinstance(self._model, nn.Module):
            return copy.deepcopy(self._model).eval()
        return self._model().eval()

    def features(self, outputs: Any) -> Tensor:
        """What is compared of a batch, (n, ...): the first output; a subclass may choose another."""
        found = tensors(outputs)
        if not found:
            raise TaskError(f"the outputs of task {self.name!r} hold no floating-point tensor to compare")
        return found[0]

    def inputs(self, split: Split) -> Inputs:
        """All inputs of a split."""
        if split not in self._inputs:
            source = self._sources[split]
            given = source() if callable(source) else source
            found = _as_tensors(given)
            lengths = {len(t) for t in _flat(found)}
            if len(lengths) != 1 or 0 in lengths:
                said = ", ".join(map(str, sorted(lengths))) or "no"
                raise TaskError(
                    f"split {split!r} of task {self.name!r} has tensors of {said} inputs; "
                    "all must have as many, at least one"
                )
            self._inputs[split] = found
        return self._inputs[split]

    def batches(self, split: Split, seed: int = 0) -> _Epoch:
        """Batches of inputs and what the trained model gives for them; `train` is shuffled by `seed`."""
        return _Epoch(self, split, seed)

    def wanted(self, split: Split) -> Tensor:
        """What the trained model gives for a split, in memory after the first call."""
        if split not in self._wanted:
            model, inputs = self.model(), self.inputs(split)
            index = torch.split(torch.arange(length(inputs)), self.batch_size)
            with torch.inference_mode():
                found = [self.seen(model, _rows(inputs, part)) for part in index]
            self._wanted[split] = torch.cat(found).clone()
        return self._wanted[split]

    def seen(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """What `model` gives for inputs, on the CPU in single precision."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        return self.features(call(model, to_device(inputs, device))).detach().float().cpu()

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Distance from what the trained model gave."""
        return self._distance(self.features(outputs), batch.target, 1.0)

    def divergence(self, outputs: Any, teacher: Any, temperature: float = 1.0) -> Tensor:
        """Softened Kullback-Leibler divergence of logits, squared error over power of anything else."""
        return self._distance(self.features(outputs), self.features(teacher), temperature)

    def _distance(self, found: Tensor, wanted: Tensor, temperature: float) -> Tensor:
        wanted = wanted.to(found.device)
        if self.metric == "agreement":
            return soft_target_divergence(found, wanted, temperature)
        return squared_error_divergence(found, wanted)

    def score(self, model: nn.Module, split: Split) -> float:
        """The metric on all of `split`."""
        return self.score_batches(model, self.batches(split))

    def score_batches(self, model: nn.Module, batches: Iterable[Batch]) -> float:
        """The metric on `batches`."""
        found, wanted = [], []
        with torch.inference_mode():
            for batch in batches:
                found.append(self.seen(model, batch.inputs))
                wanted.append(batch.target)
        return closeness(torch.cat(found), torch.cat(wanted), self.metric)


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


class _Epoch:
    """One pass over a split; its length is known without making the batches."""

    def __init__(self, task: OutputsTask, split: Split, seed: int) -> None:
        self._task, self._split, self._seed = task, split, seed

    def __len__(self) -> int:
        return -(-length(self._task.inputs(self._split)) // self._task.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        inputs, wanted = self._task.inputs(self._split), self._task.wanted(self._split)
        generator = torch.Generator().manual_seed(self._seed)
        order = torch.arange(len(wanted))
        if self._split == "train":
            order = torch.randperm(len(wanted), generator=generator)
        for index in torch.split(order, self._task.batch_size):
            yield Batch(_rows(inputs, index), wanted[index])


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


def _rows(value: Inputs, index: Tensor) -> Inputs:
    if isinstance(value, Mapping):
        return {key: _rows(item, index) for key, item in value.items()}
    return tuple(_rows(item, index) for item in value) if isinstance(value, tuple) else value[index]
