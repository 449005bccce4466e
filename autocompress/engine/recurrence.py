"""What the matrices of a recurrent module are multiplied with: its recurrence once more, step by step.

Torch's kernels show outputs alone, not the hidden state between steps. Knows nothing about layers or moments.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

TOLERANCE = 0.01
"""Largest difference from the module's own outputs, as a share of the largest of them: of half precision's size."""

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


def columns(module: nn.RNNBase | nn.RNNCellBase, call: Call, output: Any) -> Iterator[tuple[str, Tensor]]:
    """What each matrix (out, d) of `module` was multiplied with in one call, (n, d), after the parameter's name.

    One after the other, as all of them may be large. `call` is what the module was called with, `output` what it gave,
    in evaluation mode. Raises `ValueError` in the end if that is not what its recurrence gives, as in a subclass that
    computes something else.
    """
    given = dict(zip(("input", "hx"), call[0], strict=False)) | dict(call[1])
    if isinstance(module, nn.RNNCellBase):
        yield from _of_cell(module, given["input"], given.get("hx"))
        return
    outputs = yield from _of_sequence(module, given["input"], given.get("hx"))
    wanted = torch.cat(_steps(module, output[0]))
    if not float((outputs - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max()):
        raise ValueError("its outputs are not those of its recurrence")


def _of_cell(cell: nn.RNNCellBase, x: Tensor, hx: Any) -> Iterator[tuple[str, Tensor]]:
    x = x.float().reshape(-1, cell.input_size)
    h = hx[0] if isinstance(hx, tuple | list) else hx
    hidden = x.new_zeros(len(x), cell.hidden_size) if h is None else h.float().reshape(-1, cell.hidden_size)
    yield "weight_ih", x
    yield "weight_hh", hidden


def _of_sequence(module: nn.RNNBase, x: Any, hx: Any) -> Generator[tuple[str, Tensor], None, Tensor]:
    """The columns; returns the outputs (rows, features), all examples of a step before those of the next."""
    steps = _steps(module, x)
    h0, c0 = _start(module, steps[0], hx, getattr(x, "sorted_indices", None))
    directions = ("", "_reverse") if module.bidirectional else ("",)
    for layer in range(module.num_layers):
        outputs = []
        for direction, suffix in enumerate(directions):
            at = layer * len(directions) + direction
            run = _Run(module, f"_l{layer}{suffix}")
            outputs.append(run.through(steps, h0[at], c0[at]))
            yield from run.columns()
        steps = [torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True)]
    return torch.cat(steps)


def _steps(module: nn.RNNBase, x: Any) -> list[Tensor]:
    """The inputs (examples, features) of each step; a packed sequence has fewer examples from step to step."""
    if isinstance(x, PackedSequence):
        return list(torch.split(x.data.float(), x.batch_sizes.tolist()))
    if x.ndim == 2:  # one example
        return list(x.float().unsqueeze(1))
    return list(x.float().unbind(1 if module.batch_first else 0))


def _start(module: nn.RNNBase, first: Tensor, hx: Any, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hidden and cell states (layers * directions, examples, features) before the first step."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = module.proj_size or module.hidden_size, module.hidden_size
    if hx is None:
        hidden, cell = (first.new_zeros(count, len(first), size) for size in sizes)
        return hidden, cell
    states = hx if isinstance(hx, tuple | list) else (hx, hx)
    wide = [s.float().reshape(count, -1, s.shape[-1]) for s in states]
    hidden, cell = (s if order is None else s[:, order] for s in wide)
    return hidden, cell


class _Run:
    """One layer of a module in one direction, and what its matrices met."""

    def __init__(self, module: nn.RNNBase, suffix: str) -> None:
        self._mode, self._suffix = module.mode, suffix
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        found = {name: getattr(module, name + suffix, None) for name in names}
        self._tensors = {name: None if value is None else value.detach().float() for name, value in found.items()}
        self._met: dict[str, list[Tensor]] = {name: [] for name in names if name.startswith("weight")}

    def through(self, steps: Sequence[Tensor], h0: Tensor, c0: Tensor) -> list[Tensor]:
        """The hidden states (examples, features) after each of `steps`, in their order."""
        backward = self._suffix.endswith("_reverse")
        h, c, found = h0[:0], c0[:0], list[Tensor]()
        for x in reversed(steps) if backward else steps:
            h = torch.cat([h[: len(x)], h0[len(h) : len(x)]])  # the last examples have ended, or begin only now
            c = torch.cat([c[: len(x)], c0[len(c) : len(x)]])
            self._met["weight_ih"].append(x)
            self._met["weight_hh"].append(h)
            h, c = self._step(x, h, c)
            found.append(h)
        return found[::-1] if backward else found

    def _step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The next hidden and cell state; the formulas are those of torch's documentation of the modules."""
        t = self._tensors
        assert t["weight_ih"] is not None
        assert t["weight_hh"] is not None
        by_input, by_state = F.linear(x, t["weight_ih"], t["bias_ih"]), F.linear(h, t["weight_hh"], t["bias_hh"])
        if self._mode == "GRU":
            (r, z, n), (r_state, z_state, n_state) = by_input.chunk(3, dim=1), by_state.chunk(3, dim=1)
            new = torch.tanh(n + torch.sigmoid(r + r_state) * n_state)
            share = torch.sigmoid(z + z_state)
            return (1 - share) * new + share * h, c
        if self._mode != "LSTM":
            return (torch.tanh if self._mode == "RNN_TANH" else torch.relu)(by_input + by_state), c
        i, f, g, o = (by_input + by_state).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        self._met["weight_hr"].append(h)
        return (h if t["weight_hr"] is None else F.linear(h, t["weight_hr"])), c

    def columns(self) -> Iterator[tuple[str, Tensor]]:
        """What was met by each parameter."""
        for name, met in self._met.items():
            if self._tensors[name] is not None:
                yield name + self._suffix, torch.cat(met)
