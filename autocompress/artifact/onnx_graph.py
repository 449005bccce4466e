"""The ONNX graph of a compressed network: one exported skeleton, filled with each candidate's tensors.

Weights are stored at their own width as bit planes, and a few constant nodes turn them into what the runtime's kernels
take when the file is loaded; so the file is as small as the policy says and as fast as plain int8. Knows NumPy and
ONNX, but no torch, task or search.
"""

from __future__ import annotations

import itertools
import math
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocompress.artifact.onnx_rewrite import (
    align_inputs,
    float_outputs,
    integer_selections,
    pad_integers,
    pool_means,
    prune,
    selections,
)

Array = np.ndarray[Any, Any]
Range = tuple[float, float]

OPSET = 21
DOMAIN = "autocompress"
INTEGER_OPS = ("Conv", "Gemm", "MatMul")
"""What is computed with integers where its weight has a grid."""
FAINT = 16
"""Binary digits by which a row's grid may be finer than the coarsest, where kernels compute with integers."""
FOLLOWERS = (
    "Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool", "MaxPool", "Relu", "Reshape", "Resize",
    "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
"""Operators that pass integers on between them."""


@dataclass(frozen=True, slots=True)
class Place:
    """The initializer that holds a tensor of the model, `transposed` if its two dimensions are swapped there.

    The values of a vector are repeated over a map of size `spread`: a bias that is all that is left of a layer.
    """

    name: str
    transposed: bool = False
    spread: tuple[int, ...] = ()

    def shaped(self, values: Array) -> Array:
        """The tensor's values as they are there."""
        if self.transposed:
            return values.T
        return np.broadcast_to(values.reshape(*values.shape, *[1] * len(self.spread)), (*values.shape, *self.spread))


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A network in ONNX. `places` maps each state-dict name to its initializer, whose values do not matter.

    `weights` are the state-dict names of those that integer kernels may compute with, with their nodes, and `integer`
    those that do. `numbers` are the weights in whose order nodes are numbered, if not just these.
    """

    proto: onnx.ModelProto
    places: Mapping[str, Place]
    weights: Mapping[str, str]
    integer: frozenset[str] = frozenset()
    numbers: tuple[str, ...] = ()

    @property
    def numbered(self) -> dict[str, str]:
        """The name in a file of each node that computes with a weight."""
        order = {name: i for i, name in enumerate(self.numbers or self.weights)}
        return {node: str(order[name]) for name, node in self.weights.items()}


# --- what is stored ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """A weight on a grid: value = scale * unit * code. `codes` int16 (out, ...), `scale` float16 (out,), not 0.

    `low` int8, (1, ...) or (out, 1, ...), is the smallest code that `bits` bits hold, of all rows or of each; `step` is
    2 for a sign, whose codes are -1 and 1, else 1. `mask` is True where a weight stays, None if all do or if zeros are
    cheaper as codes.
    """

    codes: Array
    scale: Array
    unit: float
    bits: int
    low: Array
    step: int = 1
    mask: Array | None = None

    def unsigned(self) -> Array:
        """What the planes hold, int16 (n,): codes counted from the smallest, of the weights that stay."""
        counted = ((self.codes - self.low) // self.step).reshape(-1)
        return counted if self.mask is None else counted[self.mask.reshape(-1)]


@dataclass(frozen=True, slots=True, eq=False)
class Halves:
    """value = unit * values, float16."""

    values: Array
    unit: float


Filling = Codes | Halves | Array
"""What takes a tensor's place: codes, halves, or an array that is stored as it is."""


def planes(values: Array, bits: int) -> Array:
    """Unsigned values as `bits` planes of packed bits, highest first: (n,) to uint8 (bits, ceil(n / 8))."""
    split = np.unpackbits(values.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :]
    return np.packbits(split.T, axis=1)


# --- functions of the file: run once, when it is loaded -----------------------------------------------------


def _constant(name: str, **value: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], **value)


def _given(name: str, kind: str, attribute: str) -> onnx.NodeProto:
    """A constant whose value is an attribute of the function's call."""
    node = helper.make_node("Constant", [], [name])
    reference = node.attribute.add()
    reference.name, reference.ref_attr_name = kind, attribute
    reference.type = {"value_ints": onnx.AttributeProto.INTS, "value_int": onnx.AttributeProto.INT}.get(
        kind, onnx.AttributeProto.FLOAT
    )
    return node


def _node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), output.split(), **attributes)


def _bits() -> list[onnx.NodeProto]:
    """Planes `p` uint8 (b, m) to their bits `bits` int32 (b, 8 m)."""
    return [
        _constant("shifts", value=numpy_helper.from_array(np.arange(7, -1, -1, dtype=np.uint8))),
        _constant("one", value=numpy_helper.from_array(np.array(1, dtype=np.uint8))),
        _constant("last", value_ints=[-1]),
        _constant("first", value_ints=[0]),
        _constant("rows", value_ints=[0, -1]),
        _node("Unsqueeze", "p last", "p3"),
        _node("BitShift", "p3 shifts", "shifted", direction="RIGHT"),
        _node("BitwiseAnd", "shifted one", "split"),
        _node("Cast", "split", "split32", to=TensorProto.INT32),
        _node("Reshape", "split32 rows", "bits"),
    ]


def _values() -> list[onnx.NodeProto]:
    """Bits `bits` int32 (b, 8 m) to the first `count` codes from the smallest, `counted` int32 (count,)."""
    return [
        _given("powers64", "value_ints", "powers"),
        _given("count", "value_ints", "count"),
        _constant("column", value_ints=[-1, 1]),
        _node("Cast", "powers64", "powers32", to=TensorProto.INT32),
        _node("Reshape", "powers32 column", "powers"),
        _node("Mul", "bits powers", "weighed"),
        _node("ReduceSum", "weighed first", "sums", keepdims=0),
        _node("Slice", "sums first count", "counted"),
        _given("shape", "value_ints", "shape"),
        _node("Cast", "low", "low32", to=TensorProto.INT32),
    ]


def _dense() -> list[onnx.NodeProto]:
    """`counted` (n,) and the smallest code of each row to codes `w` int8."""
    return [
        _node("Reshape", "counted shape", "whole"),
        _node("Add", "whole low32", "codes"),
        _node("Cast", "codes", "w", to=TensorProto.INT8),
    ]


def _spread() -> list[onnx.NodeProto]:
    """The same for the weights that stay, where the mask's plane `m` has a bit; the others are 0."""
    marks = [
        deepcopy(node) for node in _bits() if node.op_type in ("Unsqueeze", "BitShift", "BitwiseAnd", "Cast", "Reshape")
    ]
    for node in marks:  # the same unpacking under other names
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = {"p": "m", "p3": "m3", "shifted": "m_shifted", "split": "m_split", "split32": "m32"}.get(
                    name, "marks2" if name == "bits" else name
                )
    return [
        *marks,
        _given("size", "value_ints", "size"),
        _constant("axis", value=numpy_helper.from_array(np.array(0, dtype=np.int32))),
        _constant("none", value=numpy_helper.from_array(np.zeros(1, dtype=np.int32))),
        _node("Reshape", "marks2 last", "marks8"),
        _node("Slice", "marks8 first size", "marks"),
        _node("CumSum", "marks axis", "nth"),
        _node("Mul", "nth marks", "places"),
        _node("Concat", "none counted", "choices", axis=0),
        _node("Gather", "choices places", "spread"),
        _node("Reshape", "spread shape", "whole"),
        _node("Reshape", "marks shape", "stays"),
        _node("Mul", "low32 stays", "lows"),
        _node("Add", "whole lows", "codes"),
        _node("Cast", "codes", "w", to=TensorProto.INT8),
    ]


def _function(name: str, inputs: str, outputs: str, nodes: list[onnx.NodeProto], attributes: str) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, name, inputs.split(), outputs.split(), nodes, opsets, attributes.split())


def _functions() -> dict[str, onnx.FunctionProto]:
    """D: planes to int8. S: the same where a mask says which weights stay. H: halves to floats.

    B: a bias to int32 on the grid of the products it is added to. Z: as many zeros int8 as there are scales.
    """
    scaled = [_given("unit", "value_float", "unit"), _node("Cast", "x", "f", to=TensorProto.FLOAT)]
    quantised = [
        _node("Mul", "ws xs", "s"),
        _node("Div", "b s", "exact"),
        _node("Round", "exact", "rounded"),
        _constant("least", value_float=-(2.0**31)),
        _constant("most", value_float=2.0**31 - 256),
        _node("Clip", "rounded least most", "clipped"),
        _node("Cast", "clipped", "q", to=TensorProto.INT32),
    ]
    zeros = [_node("Sub", "ws ws", "none"), _node("Cast", "none", "z", to=TensorProto.INT8)]
    found = [
        _function("D", "p low", "w", [*_bits(), *_values(), *_dense()], "powers count shape"),
        _function("S", "p low m", "w", [*_bits(), *_values(), *_spread()], "powers count shape size"),
        _function("H", "x", "y", [*scaled, _node("Mul", "f unit", "y")], "unit"),
        _function("B", "b ws xs", "q s", quantised, ""),
        _function("Z", "ws", "z", zeros, ""),
    ]
    return {function.name: function for function in found}


_FUNCTIONS = _functions()


# --- without branches -------------------------------------------------------------------------------------


def cut(skeleton: Skeleton, silent: Mapping[str, str]) -> Skeleton | None:
    """The skeleton without what computes the inputs of the weights `silent`, which map to their biases.

    Their layers' outputs become these biases, as a map where its size is known: kernels that repeat a vector's values
    themselves take longer than a convolution. None where something else than an addition to a tensor of the same shape
    takes such outputs.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(skeleton.proto)
    places = dict(skeleton.places)
    for weight, bias in silent.items():
        if weight not in skeleton.weights or bias not in places:
            return None
        place = _silence(proto.graph, skeleton, weight, bias)
        if place is None:
            return None
        places[bias] = place
    _drop_unused(proto.graph)
    left = {tensor.name for tensor in proto.graph.initializer}
    nodes = {node.name for node in proto.graph.node}
    return Skeleton(
        proto,
        {name: place for name, place in places.items() if place.name in left},
        {name: node for name, node in skeleton.weights.items() if node in nodes},
        numbers=skeleton.numbers or tuple(skeleton.weights),
    )


def _silence(graph: onnx.GraphProto, skeleton: Skeleton, weight: str, bias: str) -> Place | None:
    """Let the additions that read a layer's output take its bias instead; None if something else reads it."""
    node = next(node for node in graph.node if node.name == skeleton.weights[weight])
    source, output = skeleton.places[bias].name, node.output[0]
    if node.op_type == "MatMul":  # its bias is added behind it
        behind = [n for n in graph.node if output in n.input]
        if len(behind) != 1 or behind[0].op_type != "Add" or source not in behind[0].input:
            return None
        output = behind[0].output[0]
    elif len(node.input) < 3 or node.input[2] != source:
        return None
    shapes = {value.name: _dims(value) for value in graph.value_info}
    readers = [n for n in graph.node if output in n.input]
    if not readers or not all(_adds_alike(n, output, shapes) for n in readers):
        return None
    sizes = shapes[output][2:] if node.op_type == "Conv" else ()
    place = Place(f"{source}:map", spread=tuple(size if isinstance(size, int) and size else 1 for size in sizes))
    values = numpy_helper.to_array(next(tensor for tensor in graph.initializer if tensor.name == source))
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(place.shaped(values)), place.name))
    for reader in readers:
        reader.input[list(reader.input).index(output)] = place.name
    return place


def _adds_alike(node: onnx.NodeProto, name: str, shapes: Mapping[str, tuple[int | str, ...]]) -> bool:
    """Whether `node` adds `name` to another tensor, of the same shape."""
    other = [given for given in node.input if given != name]
    return node.op_type == "Add" and len(other) == 1 and shapes.get(other[0]) == shapes.get(name, ())


def _dims(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and initializers that no output depends on."""
    makers = {output: node for node in graph.node for output in node.output}
    needed: set[str] = set()
    left = [port.name for port in graph.output]
    while left:
        name = left.pop()
        if name not in needed:
            needed.add(name)
            left.extend(makers[name].input if name in makers else ())
    nodes = [node for node in graph.node if needed.intersection(node.output)]
    tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)


# --- from floats to integers ------------------------------------------------------------------------------


def quantised(skeleton: Skeleton, ranges: Mapping[str, Range], integer: Iterable[str]) -> Skeleton:
    """The skeleton with 8-bit activations around the layers of the weights `integer`.

    `ranges` gives each activation's least and largest value. Unsigned activations, signed weights per output channel:
    the pair that has fast kernels everywhere. Integers stay integers between such layers where operators allow.
    """
    chosen = frozenset(integer)
    if not chosen:
        return skeleton
    proto = _with_scales(skeleton, ranges, chosen)
    graph = proto.graph
    makers = {output: node for node in graph.node for output in node.output}
    added: list[onnx.NodeProto] = []
    for name in sorted(chosen):
        node = next(node for node in graph.node if node.name == skeleton.weights[name])
        source = skeleton.places[name].name
        weight, data = makers[node.input[1]], makers[node.input[0]]
        del weight.input[2:]
        weight.input[0], weight.input[1] = f"{source}:codes", f"{source}:scale"
        if node.op_type == "Gemm":  # whose integer kernel wants to see the zero points
            weight.input.append(f"{source}:zero")
            added.append(helper.make_node("Z", [f"{source}:scale"], [f"{source}:zero"], domain=DOMAIN))
        if len(node.input) > 2 and node.input[2] in makers:
            bias = makers[node.input[2]]
            given = bias.input[0].removesuffix("_quantized")
            del bias.input[2:]
            bias.input[0], bias.input[1] = f"{given}:codes", f"{given}:scale"
            bias.output[0] = node.input[2] = f"{given}:grid"
            added.append(helper.make_node("B", [given, f"{source}:scale", data.input[1]], [*bias.input], domain=DOMAIN))
    graph.node.extend([*added, *_dynamic(graph, skeleton)])
    names = {skeleton.weights[name] for name in chosen}
    graph.node.extend(list(_fenced(graph, names | integer_selections(graph))))
    pad_integers(graph)
    shapes = {tensor.name: tensor.dims for tensor in skeleton.proto.graph.initializer}
    align_inputs(graph, {skeleton.weights[name]: shapes[skeleton.places[name].name] for name in chosen})
    float_outputs(graph, names)
    prune(graph)
    return replace(skeleton, proto=proto, integer=chosen)


def _dynamic(graph: onnx.GraphProto, skeleton: Skeleton) -> Iterator[onnx.NodeProto]:
    """Integers of the other tensors that operators take, as the bias behind a MatMul: made when the file is loaded.

    The quantiser took those that the model was exported with.
    """
    names = {f"{place.name}_quantized": place.name for place in skeleton.places.values()}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in names:
            name = names.pop(node.input[0])
            del node.input[:]
            node.input.extend(f"{name}:{part}" for part in ("bytes", "step", "zero"))
            yield helper.make_node("DynamicQuantizeLinear", [name], [*node.input])


def _fenced(graph: onnx.GraphProto, integer: set[str]) -> Iterator[onnx.NodeProto]:
    """The maximum of a single tensor, which is the tensor, before float kernels among integer ones.

    ONNX Runtime makes a Conv or Gemm with floats between integers one with integers, of a single scale for the weight.
    """
    makers = {output: node.op_type for node in graph.node for output in node.output}
    for i, node in enumerate(graph.node):
        floats = node.op_type in ("Conv", "ConvTranspose", "Gemm") and node.name not in integer
        if floats and makers.get(node.input[0]) == "DequantizeLinear":
            given, node.input[0] = node.input[0], f"fenced:{i}"
            yield helper.make_node("Max", [given], [node.input[0]])


def _with_scales(skeleton: Skeleton, ranges: Mapping[str, Range], integer: frozenset[str]) -> onnx.ModelProto:
    """Pairs of QuantizeLinear and DequantizeLinear where ONNX Runtime's own quantiser puts them."""
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    exported = deepcopy(skeleton.proto)
    alike = pool_means(exported.graph) | {x.output[0]: x.input[0] for x in selections(exported.graph)}
    ranges = {**ranges, **{name: ranges[other] for name, other in alike.items()}}  # what only moves keeps its scale
    named = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    floats = [node for name, node in skeleton.weights.items() if name not in integer]
    unknown = [n.name for n in skeleton.proto.graph.node if n.op_type in INTEGER_OPS]
    others = [name for name in unknown if name not in set(skeleton.weights.values())]
    quantiser = QDQQuantizer(
        exported,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, named),
        nodes_to_quantize=[],
        nodes_to_exclude=[*floats, *others, *_unconditional(exported.graph)],
        op_types_to_quantize=[*INTEGER_OPS, *FOLLOWERS],
        extra_options={},
    )
    quantiser.quantize_model()
    proto: onnx.ModelProto = quantiser.model.model
    return proto


def _unconditional(graph: onnx.GraphProto) -> list[str]:
    """Nodes that depend on nothing but initializers: they run when the file is loaded, and give no activation."""
    known = {tensor.name for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.input and known.issuperset(node.input):
            known.update(node.output)
            found.append(node.name)
    return found


# --- filling ----------------------------------------------------------------------------------------------


SHORT, LONG, LONGEST = 0, 52, 52 * 53
"""Numbers of the first names with one, two and three letters."""


def filled(skeleton: Skeleton, fillings: Mapping[str, Filling], names: int = SHORT) -> onnx.ModelProto:
    """The skeleton with a filling for every place, short names, and no metadata.

    With `names`, those from this number on: so that graphs which need more of them take no more bytes for each.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(skeleton.proto)
    graph = proto.graph
    _regroup(graph, skeleton, fillings)
    taken = {skeleton.places[name].name for name in fillings}
    rest = [tensor for tensor in graph.initializer if tensor.name not in taken]
    parts = _Parts()
    for name, filling in fillings.items():
        parts.add(skeleton.places[name], filling, integer=name in skeleton.integer)
    nodes = [*parts.nodes, *graph.node]
    used = set(itertools.chain.from_iterable(node.input for node in nodes)) | {o.name for o in graph.output}
    del graph.initializer[:], graph.node[:], graph.value_info[:], proto.metadata_props[:]
    graph.initializer.extend(tensor for tensor in [*rest, *parts.tensors] if tensor.name in used)
    graph.node.extend(_sorted(nodes))
    called = {node.op_type for node in graph.node if node.domain == DOMAIN}
    del proto.functions[:], proto.opset_import[:]
    proto.functions.extend(function for name, function in _FUNCTIONS.items() if name in called)
    proto.opset_import.extend([helper.make_opsetid("", OPSET), *([helper.make_opsetid(DOMAIN, 1)] if called else [])])
    _compact(proto, skeleton.numbered, names)
    return proto


def _regroup(graph: onnx.GraphProto, skeleton: Skeleton, fillings: Mapping[str, Filling]) -> None:
    """As many groups as the rows of grouped convolutions ask for: depthwise ones are narrowed like any other."""
    nodes = {node.name: node for node in graph.node}
    before = {tensor.name.removesuffix("_quantized"): tensor.dims for tensor in graph.initializer}
    for name, node in skeleton.weights.items():
        filling, place = fillings.get(name), skeleton.places[name].name
        for attribute in nodes[node].attribute:
            if attribute.name == "group" and attribute.i > 1 and filling is not None and place in before:
                attribute.i = attribute.i * _rows(filling) // before[place][0]


def _rows(filling: Filling) -> int:
    if isinstance(filling, Codes):
        return len(filling.codes)
    return len(filling.values if isinstance(filling, Halves) else filling)


def cost(filling: Filling, *, integer: bool, names: int = LONG) -> tuple[int, frozenset[str]]:
    """Bytes that one tensor takes in a file with names from number `names` on, and the functions that it calls.

    Constants that several tensors share are there once.
    """
    parts = _Parts()
    parts.add(Place("w"), filling, integer=integer)
    proto = onnx.ModelProto(graph=helper.make_graph(parts.nodes, "g", [], [], parts.tensors))
    _compact(proto, {}, names)
    return proto.ByteSize(), frozenset(node.op_type for node in parts.nodes if node.domain == DOMAIN)


def functions_bytes(names: Iterable[str]) -> int:
    """Bytes of the functions called `names`."""
    return int(onnx.ModelProto(functions=[_FUNCTIONS[name] for name in names]).ByteSize())


class _Parts:
    """Initializers and nodes that give the skeleton its tensors."""

    def __init__(self) -> None:
        self.tensors: list[TensorProto] = []
        self.nodes: list[onnx.NodeProto] = []

    def add(self, place: Place, filling: Filling, *, integer: bool) -> None:
        """`place` is filled; with `integer`, by its codes and scales apart."""
        if isinstance(filling, Codes):
            codes, scale = f"{place.name}:codes", f"{place.name}:scale"
            self._codes(f"{codes}:t" if place.transposed else codes, filling)
            if place.transposed:
                self._call("Transpose", [f"{codes}:t"], codes, domain="", perm=[1, 0])
            self._halves(scale, Halves(_even(filling.scale) if integer else filling.scale, filling.unit))
            if not integer:
                self._floats(place, codes, scale, filling.codes.ndim)
        elif isinstance(filling, Halves):
            values = filling.values.T if place.transposed else filling.values
            self._halves(self._repeated(place), Halves(_column(values, place), filling.unit))
        else:
            self._tensor(self._repeated(place), _column(filling.T if place.transposed else filling, place))

    def _floats(self, place: Place, codes: str, scale: str, ndim: int) -> None:
        """Floats for kernels that know no integers."""
        shape = [1, -1] if place.transposed else [-1, *[1] * (ndim - 1)]
        self._tensor(f"{place.name}:shape", np.array(shape, dtype=np.int64))
        self._call("Cast", [codes], f"{codes}:f", domain="", to=TensorProto.FLOAT)
        self._call("Reshape", [scale, f"{place.name}:shape"], f"{scale}:r", domain="")
        self._call("Mul", [f"{codes}:f", f"{scale}:r"], place.name, domain="")

    def _repeated(self, place: Place) -> str:
        """The name under which a vector takes the place, repeated over the map if it is one."""
        if math.prod(place.spread) == 1:
            return place.name
        self._tensor(f"{place.name}:shape", np.array((1, *place.spread), dtype=np.int64))
        self._call("Expand", [f"{place.name}:vector", f"{place.name}:shape"], place.name, domain="")
        return f"{place.name}:vector"

    def _codes(self, name: str, filling: Codes) -> None:
        if filling.bits == 8 and filling.mask is None:
            self._tensor(name, filling.codes.astype(np.int8))
            return
        unsigned, shape = filling.unsigned(), filling.codes.shape
        self._tensor(f"{name}:p", planes(unsigned, filling.bits))
        self._tensor(f"{name}:low", filling.low)
        powers = [filling.step * 2**k for k in reversed(range(filling.bits))]
        given: dict[str, Any] = {"powers": powers, "count": [unsigned.size], "shape": shape}
        if filling.mask is None:
            self._call("D", [f"{name}:p", f"{name}:low"], name, **given)
            return
        self._tensor(f"{name}:m", np.packbits(filling.mask.reshape(-1))[None])
        self._call("S", [f"{name}:p", f"{name}:low", f"{name}:m"], name, **given, size=[filling.mask.size])

    def _halves(self, name: str, filling: Halves) -> None:
        self._tensor(f"{name}:h", filling.values)
        self._call("H", [f"{name}:h"], name, unit=filling.unit)

    def _tensor(self, name: str, values: Array) -> None:
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(values), name))

    def _call(self, op: str, inputs: Sequence[str], output: str, *, domain: str = DOMAIN, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, inputs, [output], domain=domain, **attributes))


def _column(values: Array, place: Place) -> Array:
    """A vector with the dimensions of the map that it is repeated over; anything else as it is."""
    return values.reshape(*values.shape, *[1] * len(place.spread))


def _even(scale: Array) -> Array:
    """Scales float16 (out,) without very fine ones.

    A bias is stored on the grid of its row's products, and in 32 bits of a very fine one a usual bias has no place.
    What that adds to such a row's outputs is less than the rounding of the outputs, whose grid all rows share.
    """
    size = np.abs(scale)
    least = size.max(initial=0) * np.float16(2.0**-FAINT)
    found: Array = np.where(size < least, np.copysign(least, scale), scale)
    return found


def _sorted(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Each node after those that make its inputs."""
    makers = {output: i for i, node in enumerate(nodes) for output in node.output}
    needs = {i: [makers[name] for name in node.input if name in makers] for i, node in enumerate(nodes)}
    return [nodes[i] for i in TopologicalSorter(needs).static_order()]


def _compact(proto: onnx.ModelProto, nodes: Mapping[str, str], first: int) -> None:
    """Short names for all that is not an input or output, equal constants once, no notes of the exporter.

    Names are those from number `first` on; `nodes` maps the names of nodes that keep one to the name they get.
    """
    graph = proto.graph
    names: dict[str, str] = {port.name: port.name for port in (*graph.input, *graph.output)}
    count = itertools.count(first)
    short = (text for n in count if (text := _base(n)) not in names)
    merged = _merged(graph)
    for node in graph.node:
        for ports in (node.input, node.output):
            for i, name in enumerate(ports):
                original = merged.get(name, name)
                if original:
                    ports[i] = names.get(original) or names.setdefault(original, next(short))
        node.name, node.doc_string = nodes.get(node.name, ""), ""
        del node.metadata_props[:]
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name) or names.setdefault(tensor.name, next(short))
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    for port in (*graph.input, *graph.output):
        port.doc_string = ""
        del port.metadata_props[:]
    graph.name, graph.doc_string, proto.doc_string = "g", "", ""
    del graph.metadata_props[:], graph.quantization_annotation[:]


def _merged(graph: onnx.GraphProto) -> dict[str, str]:
    """Initializers with equal content: name to the one that stays. The others are removed."""
    stays: dict[bytes, str] = {}
    merged = {}
    for tensor in list(graph.initializer):
        values = numpy_helper.to_array(tensor)
        if values.nbytes > 64:
            continue
        content = repr((values.dtype, values.shape)).encode() + values.tobytes()
        first = stays.setdefault(content, tensor.name)
        if first != tensor.name:
            merged[tensor.name] = first
            graph.initializer.remove(tensor)
    return merged


def _base(number: int) -> str:
    digits = string.ascii_letters
    text = ""
    while True:
        text = digits[number % len(digits)] + text
        number = number // len(digits) - 1
        if number < 0:
            return text


def operators(proto: onnx.ModelProto) -> Counter[str]:
    """How often each operator occurs."""
    return Counter(node.op_type for node in proto.graph.node)
