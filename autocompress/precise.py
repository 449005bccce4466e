"""Runs a model in double precision without a second copy of its weights. Knows nothing about compression."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_LOOK_UP = (F.embedding, torch.embedding)


class Doubles(TorchFunctionMode):
    """Inside, every function of torch gets its floating-point tensors as doubles, made for it alone and gone after it.

    What is written to keeps its type, and so does what a model asks to have in a type of its own. Looking up copies
    rows, so the table is left as it is. A model that compares types itself may refuse to run.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func` on wider arguments."""
        named, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__":  # shape, dtype and the like
            return func(*args, **named)
        if func in _LOOK_UP:
            return _as(torch.float64, func(*args, **named))
        target = named.get("out") if "out" in named else args[0] if args and _writes(name) else None
        if not isinstance(target, Tensor):
            return func(*_as(torch.float64, args), **_as(torch.float64, named))
        if not target.is_floating_point():
            return func(*args, **named)
        return func(*_as(target.dtype, args), **_as(target.dtype, named))


def _writes(name: str) -> bool:
    """Whether a function of this name changes its first argument: `add_`, `__iadd__`, `__setitem__`."""
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _as(dtype: torch.dtype, value: Any) -> Any:
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, value)
