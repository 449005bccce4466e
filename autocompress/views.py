"""Other versions of a batch's inputs, and the mean of what a model says of them. Knows nothing about compression."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from autocompress.errors import TaskError
from autocompress.task import Task

Views = Callable[[Any], Iterable[Any]]
"""Gives versions of inputs whose right outputs are the same, the most useful first; the inputs are not among them."""


def views_of(task: Task) -> Views | None:
    """The task's optional member `views`; None if it has none."""
    found: Views | None = getattr(task, "views", None)
    return found


def others(views: Views | None, inputs: Any, count: int) -> list[Any]:
    """`count` versions of `inputs` beside themselves. Raises `TaskError` if the task gives fewer."""
    found = [] if views is None or not count else list(islice(views(inputs), count))
    if len(found) < count:
        raise TaskError(
            f"the recovery asks for {count + 1} views of an input and the task gives {len(found)} beside the input "
            "itself: let its `views(inputs)` yield more, or ask for fewer"
        )
    return found


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Outputs of a model with `change` made to every tensor in them; their structure and types stay."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, MutableMapping):
        result = copy.copy(value)  # a mapping that also has attributes keeps both in step
        for key in value:
            result[key] = changed(value[key], change)
        return result
    if isinstance(value, tuple | list):
        items = [changed(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if hasattr(value, "__dataclass_fields__"):
        result = copy.copy(value)
        for name in value.__dataclass_fields__:
            object.__setattr__(result, name, changed(getattr(value, name), change))
        return result
    return value


def mean(answers: Sequence[Any]) -> Any:
    """The last of `answers`, outputs of one structure, with every floating-point tensor the mean over all of them."""
    if len(answers) == 1:
        return answers[0]
    columns: list[list[Tensor]] = []
    for answer in answers:
        columns.append([])
        changed(answer, lambda t, into=columns[-1]: into.append(t) or t)  # type: ignore[misc]
    means = iter(
        [torch.stack(ts).mean(0) if ts[0].is_floating_point() else ts[-1] for ts in zip(*columns, strict=True)]
    )
    return changed(answers[-1], lambda _: next(means))
