"""Gives recurrent ONNX operators the tensors of the model, where the exporter put them together as they take them.

A GRU or LSTM takes all directions in one tensor, its gates in another order than torch's, and both biases as one. Here
a few nodes make that of the model's own tensors, once, when the file is loaded, so that each is stored by itself.
Knows NumPy and ONNX, but no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]

GATES = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}
"""Torch's number of each of the operator's gates: reset, update, new; input, forget, cell, output."""
WEIGHTS, BIASES = (1, 2), 3
"""Inputs of the operators, (directions, gates * hidden, ...) and (directions, 2 * gates * hidden)."""


def take_apart(proto: onnx.ModelProto, state: Mapping[str, Array]) -> None:
    """Let the operators read the tensors of `state`, which differ from each other; what holds none is left as it is."""
    graph = proto.graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for number, node in enumerate([node for node in graph.node if node.op_type in GATES]):
        for place in (*WEIGHTS, BIASES):
            array = arrays.get(node.input[place]) if place < len(node.input) else None
            parts = None if array is None else _parts(array, GATES[node.op_type], state, 2 if place == BIASES else 1)
            if parts is not None:
                made = _Made(graph, state, f"recurrent:{number}:{place}", GATES[node.op_type])
                node.input[place] = made.joined(parts)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _parts(array: Array, gates: Sequence[int], state: Mapping[str, Array], count: int) -> list[list[str]] | None:
    """Names of the `count` tensors that make up each direction of `array`; None if some part of it is no tensor."""
    found = [[_named(part, gates, state) for part in np.split(own, count)] for own in array]
    names = [[name for name in own if name is not None] for own in found]
    return names if all(len(own) == count for own in names) else None


def _named(part: Array, gates: Sequence[int], state: Mapping[str, Array]) -> str | None:
    """The tensor whose gates (gates, hidden, ...), in the operator's order, are `part`."""
    for name, value in state.items():
        if value.shape == part.shape and np.array_equal(np.concatenate(_reordered(value, gates)), part):
            return name
    return None


def _reordered(value: Array, gates: Sequence[int]) -> list[Array]:
    blocks = np.split(value, len(gates))
    return [blocks[gate] for gate in gates]


class _Made:
    """Nodes that make one input of an operator."""

    def __init__(self, graph: onnx.GraphProto, state: Mapping[str, Array], name: str, gates: Sequence[int]) -> None:
        self._graph, self._state, self._name, self._gates = graph, state, name, gates
        self._count = 0

    def joined(self, parts: list[list[str]]) -> str:
        """The input's name: one or two tensors for each direction."""
        axis = f"{self._name}:axis"
        self._graph.initializer.append(numpy_helper.from_array(np.zeros(1, dtype=np.int64), axis))
        directions = []
        for own in parts:
            blocks = [block for name in own for block in self._blocks(name)]
            directions.append(self._add("Unsqueeze", [self._add("Concat", blocks, axis=0), axis]))
        return directions[0] if len(directions) == 1 else self._add("Concat", directions, axis=0)

    def _blocks(self, name: str) -> list[str]:
        """A tensor's gates in the operator's order."""
        if name not in {tensor.name for tensor in self._graph.initializer}:
            self._graph.initializer.append(numpy_helper.from_array(self._state[name], name))
        outputs = [f"{self._name}:{name}:{gate}" for gate in range(len(self._gates))]
        node = helper.make_node("Split", [name], outputs, f"{outputs[0]}:node", axis=0, num_outputs=len(outputs))
        self._graph.node.insert(0, node)
        self._count += 1
        return [outputs[gate] for gate in self._gates]

    def _add(self, op: str, inputs: list[str], **attributes: Any) -> str:
        output = f"{self._name}:{self._count}"
        node = helper.make_node(op, inputs, [output], f"{output}:node", **attributes)
        self._graph.node.insert(self._count, node)
        self._count += 1
        return output
