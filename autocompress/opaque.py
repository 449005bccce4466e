"""Makes recurrent modules single steps for the dependency tracer, which follows autograd and loses its way in loops.

Changes no result, and knows nothing about channel groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@contextmanager
def opaque(model: nn.Module) -> Iterator[set[type[nn.Module]]]:
    """Inside, recurrent modules are one node of the autograd graph each; gives their classes."""
    found = [module for module in model.modules() if isinstance(module, RECURRENT)]
    before = [vars(module).get("forward") for module in found]
    try:
        for module in found:
            module.forward = _as_one_node(module.forward, list(module.parameters()))
        yield {type(module) for module in found}
    finally:
        for module, own in zip(found, before, strict=True):
            del module.forward
            if own is not None:
                module.forward = own


def _as_one_node(forward: Callable[..., Any], own: list[nn.Parameter]) -> Callable[..., Any]:
    def run(*given: Any, **named: Any) -> Any:
        with torch.no_grad():
            leaves, structure = pytree.tree_flatten(forward(*given, **named))
        floats = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        inputs = [*own, *(leaf for leaf in pytree.tree_leaves((given, named)) if isinstance(leaf, Tensor))]
        outputs = _Node.apply(len(inputs), *inputs, *(leaves[i] for i in floats))  # type: ignore[no-untyped-call]
        for i, output in zip(floats, outputs, strict=True):
            leaves[i] = output
        return pytree.tree_unflatten(leaves, structure)

    return run


class _Node(torch.autograd.Function):
    """Gives its last arguments, as if made of the first `count`. Nothing is ever differentiated."""

    @staticmethod
    def forward(_ctx: Any, count: int, *tensors: Tensor) -> Any:
        return tuple(t.clone() for t in tensors[count:])
