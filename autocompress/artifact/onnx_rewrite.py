"""Cheaper nodes for what an exporter or a quantiser writes: the same outputs from fewer or faster kernels.

Knows ONNX alone: no torch, no task, and not how a file stores its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]

SELECTION = "selection:"
"""How the names of convolutions begin that only choose and move channels: their weight is zeros and ones."""
SELECTION_WEIGHTS = 2**15
"""Weights of the largest selection: 128 to 256 channels. So far it was measured to be quicker than slices and pads."""
ENDLESS = 2**31 - 1
"""At least what exporters write for the end of a dimension."""
ALIGNED = 4
"""Input channels that the runtime's fast integer convolutions take at a time."""
FAST_ROWS = 16
"""Output channels that they make at a time. With fewer they are not used; large windows need more to be worth it."""


@dataclass(frozen=True, slots=True)
class _View:
    """What is known of a graph: constants, shapes of its float tensors (None: free), who makes and reads a tensor."""

    constants: Mapping[str, Array]
    shapes: Mapping[str, tuple[int | None, ...]]
    makers: Mapping[str, onnx.NodeProto]
    readers: Mapping[str, Sequence[onnx.NodeProto]]
    outputs: frozenset[str]

    @classmethod
    def of(cls, graph: onnx.GraphProto) -> _View:
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        ports = [*graph.input, *graph.value_info]
        floats = [port for port in ports if port.type.tensor_type.elem_type == TensorProto.FLOAT]
        return cls(
            {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer},
            {port.name: tuple(_sizes(port)) for port in floats if port.type.tensor_type.HasField("shape")},
            {output: node for node in graph.node for output in node.output},
            readers,
            frozenset(port.name for port in graph.output),
        )

    def sole_reader(self, name: str) -> onnx.NodeProto | None:
        """The node that reads `name`, if only one does and it is no output."""
        found = self.readers.get(name, ())
        return found[0] if len(found) == 1 and name not in self.outputs else None


def _sizes(port: onnx.ValueInfoProto) -> Iterator[int | None]:
    for dim in port.type.tensor_type.shape.dim:
        yield dim.dim_value if dim.HasField("dim_value") else None


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


# --- of floats, as they are exported ------------------------------------------------------------------------


def rewrite(proto: onnx.ModelProto) -> None:
    """Subsampled shortcuts become convolutions, in place: floats stay in the blocks that convolutions work on."""
    graph = proto.graph
    view = _View.of(graph)
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes, tensors = _selected(node, view) if node.op_type == "Pad" else ([], [])
        kept += nodes or [node]
        graph.initializer.extend(tensors)
    _set_nodes(graph, kept)
    prune(graph)


def _selected(pad: onnx.NodeProto, view: _View) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """A 1x1 convolution for steps through space and then zeros as channels (option A of arXiv 1512.03385).

    Its nodes, those that make its weight when the file is loaded, and their constants; nothing for other padding.
    Exact for finite numbers.
    """
    source, steps = _subsampled(pad.input[0], view)
    shape, ends = view.shapes.get(source, ()), _channel_padding(pad, view)
    inputs, space = shape[1] if len(shape) > 2 else None, range(2, len(shape))
    if ends is None or inputs is None or not steps or not set(steps) <= set(space):
        return [], []
    outputs, output = inputs + sum(ends), pad.output[0]
    if inputs * outputs > SELECTION_WEIGHTS:
        return [], []
    names = [f"{output}:{part}" for part in ("shape", "zeros", "ones", "axes", "weight")]
    strides = [steps.get(axis, 1) for axis in space]
    nodes = [
        helper.make_node("ConstantOfShape", names[:1], names[1:2]),
        helper.make_node("EyeLike", names[1:2], names[2:3], k=-ends[0]),
        helper.make_node("Unsqueeze", names[2:4], names[4:]),
        helper.make_node("Conv", [source, names[4]], [output], name=SELECTION + output, strides=strides),
    ]
    return nodes, [_integers(names[0], [outputs, inputs]), _integers(names[3], space)]


def _subsampled(name: str, view: _View) -> tuple[str, dict[int, int]]:
    """The tensor of which `name` is every so-manieth element, from the first on, and the step along each axis."""
    steps: dict[int, int] = {}
    while (node := view.makers.get(name)) is not None and node.op_type == "Slice" and len(node.input) == 5:
        starts, ends, axes, strides = (view.constants.get(given) for given in node.input[1:])
        shape = view.shapes.get(node.input[0])
        if starts is None or ends is None or axes is None or strides is None or shape is None:
            break
        sizes = [shape[axis] or ENDLESS for axis in axes]
        whole = all(end >= size for size, end in zip(sizes, ends, strict=True))
        found = {int(axis) % len(shape): int(step) for axis, step in zip(axes, strides, strict=True)}
        if starts.any() or not whole or strides.min() < 1 or found.keys() & steps or view.sole_reader(name) is None:
            break
        steps |= found
        name = node.input[0]
    return name, steps


def _channel_padding(pad: onnx.NodeProto, view: _View) -> tuple[int, int] | None:
    """Zeros before and behind the channels, if the node adds those and no other."""
    amounts = view.constants.get(pad.input[1])
    value = view.constants.get(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(())
    other_axes = len(pad.input) > 3 and pad.input[3]
    constant = _attribute(pad, "mode", b"constant") == b"constant"
    if amounts is None or value is None or value.any() or other_axes or not constant or amounts.min() < 0:
        return None
    before, behind = amounts.reshape(2, -1)
    if before[0] or behind[0] or before[2:].any() or behind[2:].any():
        return None
    return int(before[1]), int(behind[1])


# --- of integers, as they are quantised ---------------------------------------------------------------------


def pool_means(graph: onnx.GraphProto) -> dict[str, str]:
    """Means over space become pooling, which has an integer kernel; floats are no quicker by it.

    Names of the tensors in between, and of those that have the same values.
    """
    view = _View.of(graph)
    found = {node.output[0]: _pooled(node, view) for node in graph.node if node.op_type == "ReduceMean"}
    kept = [found.get(node.output[0]) or [node] for node in graph.node]
    _set_nodes(graph, [node for nodes in kept for node in nodes])
    return {nodes[0].output[0]: nodes[1].output[0] for nodes in found.values() if len(nodes) > 1}


def _pooled(node: onnx.NodeProto, view: _View) -> list[onnx.NodeProto]:
    """The mean over all dimensions but the first two of four or more; nothing for other means.

    With three dimensions it may be over the features of a sequence, which is no pooling to the quantiser.
    """
    rank = len(view.shapes.get(node.input[0], ()))
    axes = view.constants.get(node.input[1]) if len(node.input) > 1 else None
    if rank < 4 or axes is None or {int(axis) % rank for axis in axes.reshape(-1)} != set(range(2, rank)):
        return []
    output = node.output[0]
    if _attribute(node, "keepdims", 1):
        return [helper.make_node("GlobalAveragePool", [node.input[0]], [output])]
    return [
        helper.make_node("GlobalAveragePool", [node.input[0]], [f"{output}:pooled"]),
        helper.make_node("Squeeze", [f"{output}:pooled", node.input[1]], [output]),
    ]


def selections(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Convolutions that `rewrite` made of shortcuts."""
    return [node for node in graph.node if node.name.startswith(SELECTION)]


def integer_selections(graph: onnx.GraphProto) -> set[str]:
    """Names of the selections that compute between integers: these take a weight of integers, whose scale is 1."""
    view, found = _View.of(graph), set()
    for node in selections(graph):
        source, reader = view.makers.get(node.input[0]), view.sole_reader(node.output[0])
        if source is None or source.op_type != "DequantizeLinear" or reader is None:
            continue
        if reader.op_type == "QuantizeLinear":
            found.add(node.name)
            weight = node.input[1]
            names = [f"{weight}:codes", f"{weight}:scale", f"{weight}:grid"]
            graph.initializer.append(numpy_helper.from_array(np.ones((), np.float32), names[1]))
            graph.node.append(helper.make_node("Cast", [weight], names[:1], to=TensorProto.INT8))
            graph.node.append(helper.make_node("DequantizeLinear", names[:2], names[2:]))
            node.input[1] = names[2]
    return found


def pad_integers(graph: onnx.GraphProto) -> None:
    """Constant padding of integers instead of floats: DQ -> Pad -> Q -> DQ becomes Pad -> DQ.

    What is padded keeps its own scale, and the zero point is its zero.
    """
    view = _View.of(graph)
    for pad in [node for node in graph.node if node.op_type == "Pad"]:
        before = view.makers.get(pad.input[0])
        after = view.sole_reader(pad.output[0])
        constant = _attribute(pad, "mode", b"constant") == b"constant"
        plain = len(pad.input) == 2 or not pad.input[2]
        if not (constant and plain and before is not None and before.op_type == "DequantizeLinear"):
            continue
        if after is None or after.op_type != "QuantizeLinear":
            continue
        for last in view.readers.get(after.output[0], ()):
            last.input[0], last.input[1], last.input[2] = pad.output[0], before.input[1], before.input[2]
        graph.node.remove(after)
        pad.input[0] = before.input[0]
        del pad.input[2:]
        pad.input.append(before.input[2])


def align_inputs(graph: onnx.GraphProto, weights: Mapping[str, Sequence[int]]) -> None:
    """Channels of zeros on the network's input before integer convolutions: three colours are none of ALIGNED.

    `weights` are the shapes of the integer weights by the names of their nodes. They get as many zeros when the file is
    loaded.
    """
    view = _View.of(graph)
    ports = {port.name for port in graph.input}
    for node in [node for node in graph.node if node.name in weights and node.op_type == "Conv"]:
        rows, channels, *window = weights[node.name]
        floats, weight = (view.makers[name] for name in node.input[:2])
        made = view.makers.get(floats.input[0])
        if made is None or made.op_type != "QuantizeLinear" or made.input[0] not in ports:
            continue
        grouped, aligned = _attribute(node, "group", 1) > 1, channels % ALIGNED == 0
        if grouped or aligned or rows < max(FAST_ROWS, math.prod(window)):
            continue
        pads, codes, grid = (f"{node.input[0]}:{node.name}:{part}" for part in ("pads", "codes", "grid"))
        amounts = np.zeros((2, 2 + len(window)), dtype=np.int64)
        amounts[1, 1] = -channels % ALIGNED
        graph.initializer.append(_integers(pads, amounts.reshape(-1)))
        graph.node.append(helper.make_node("Pad", [made.output[0], pads, made.input[2]], [codes]))
        graph.node.append(helper.make_node("DequantizeLinear", [codes, *made.input[1:]], [grid]))
        graph.node.append(helper.make_node("Pad", [weight.input[0], pads], [f"{weight.input[0]}:wide"]))
        node.input[0], weight.input[0] = grid, f"{weight.input[0]}:wide"


def float_outputs(graph: onnx.GraphProto, names: Collection[str]) -> None:
    """The network's outputs are not rounded to bytes where an integer product `names` gives them as floats too."""
    view = _View.of(graph)
    for port in graph.output:
        floats = view.makers.get(port.name)
        codes = None if floats is None else view.makers.get(floats.input[0])
        product = None if codes is None else view.makers.get(codes.input[0])
        if floats is None or codes is None or product is None or view.readers.get(port.name):
            continue
        chain = floats.op_type, codes.op_type, product.op_type, product.name in names
        alone = view.sole_reader(product.output[0]), view.sole_reader(codes.output[0])
        if chain == ("DequantizeLinear", "QuantizeLinear", "Gemm", True) and None not in alone:
            product.output[0], floats.output[0] = port.name, f"{port.name}:rounded"


def prune(graph: onnx.GraphProto) -> None:
    """Without the nodes that no output depends on, which the runtime would run all the same."""
    while True:
        used = {name for node in graph.node for name in node.input} | {port.name for port in graph.output}
        kept = [node for node in graph.node if used.intersection(node.output)]
        if len(kept) == len(graph.node):
            return
        _set_nodes(graph, kept)


def _set_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _integers(name: str, values: Iterable[int]) -> TensorProto:
    return numpy_helper.from_array(np.array([*values], dtype=np.int64), name)
