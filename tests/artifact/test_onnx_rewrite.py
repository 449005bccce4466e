"""Rewritten graphs compute what NumPy does, and what only looks like a pattern stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from autocompress.artifact.onnx_graph import OPSET, operators
from autocompress.artifact.onnx_rewrite import SELECTION_WEIGHTS, pool_means, prune, rewrite
from autocompress.runtime import session

Array = np.ndarray[Any, Any]
END = 2**63 - 1
Shape = Sequence[int | str]


def model(nodes: Sequence[onnx.NodeProto], shape: Shape, outputs: Sequence[str] = ("y",), **constants: Any) -> Any:
    """A graph from `x` to `outputs`, with the shapes of all tensors as exporters note them."""
    ports = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    found = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", ports, found, tensors)
    opset = [helper.make_opsetid("", OPSET)]
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opset, ir_version=10))


def ran(proto: onnx.ModelProto, x: Array) -> list[Array]:
    onnx.checker.check_model(proto, full_check=True)
    return session(proto.SerializeToString()).run(None, {"x": x})


def shortcut(steps: dict[int, int], pads: Sequence[int], shape: Shape, *, together: bool = False, **other: Any) -> Any:
    """Steps along axes, one Slice for each or one for all, and then a Pad; `other` replaces constants."""
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Any] = {}
    name = "x"
    groups = [list(steps.items())] if together else [[step] for step in steps.items()]
    for i, group in enumerate(groups):
        axes, strides = zip(*group, strict=True)
        given = {f"starts{i}": [0] * len(group), f"ends{i}": [END] * len(group), f"axes{i}": axes, f"steps{i}": strides}
        nodes.append(helper.make_node("Slice", [name, *given], [f"s{i}"]))
        constants |= given
        name = f"s{i}"
    nodes.append(helper.make_node("Pad", [name, "pads", "value"], ["y"], mode=other.pop("mode", "constant")))
    constants |= {"pads": pads, "value": np.float32(0), **other}
    arrays = {n: np.asarray(v, np.int64) if n != "value" else np.float32(v) for n, v in constants.items()}
    return model(nodes, shape, **arrays)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 2)])
@pytest.mark.parametrize(("steps", "ends"), [((2, 2), (4, 4)), ((3, 3), (2, 5)), ((2, 3), (0, 3)), ((1, 2), (5, 0))])
def test_subsampled_shortcut_becomes_one_convolution(
    steps: tuple[int, int], ends: tuple[int, int], size: tuple[int, int], together: bool
) -> None:
    pads = [0, ends[0], 0, 0, 0, ends[1], 0, 0]
    proto = shortcut({2: steps[0], -1: steps[1]}, pads, ["n", 6, *size], together=together)
    rewrite(proto)
    assert operators(proto) == {"ConstantOfShape": 1, "EyeLike": 1, "Unsqueeze": 1, "Conv": 1}
    x = np.random.default_rng(0).standard_normal((3, 6, *size)).astype(np.float32)
    wanted = np.pad(x[:, :, :: steps[0], :: steps[1]], ((0, 0), ends, (0, 0), (0, 0)))
    assert np.array_equal(ran(proto, x)[0], wanted)


def test_shortcut_of_one_and_three_dimensions_and_of_free_sizes() -> None:
    for rank, steps in ((3, {2: 2}), (5, {2: 2, 4: 3})):
        pads = [0, 2, *[0] * (rank - 2), 0, 1, *[0] * (rank - 2)]
        proto = shortcut(steps, pads, ["n", 4, *(f"d{i}" for i in range(rank - 2))])
        rewrite(proto)
        assert operators(proto)["Conv"] == 1
        x = np.random.default_rng(0).standard_normal((2, 4, *(7, 5, 6)[: rank - 2])).astype(np.float32)
        index = tuple(slice(None, None, steps.get(axis, 1)) for axis in range(rank))
        assert np.array_equal(ran(proto, x)[0], np.pad(x[index], ((0, 0), (2, 1), *[(0, 0)] * (rank - 2))))


CHANNELS = [0, 4, 0, 0, 0, 4, 0, 0]
BOTH = {2: 2, 3: 2}


@pytest.mark.parametrize(
    "proto",
    [
        shortcut(BOTH, CHANNELS, [2, 6, 8, 8], starts1=[1]),
        shortcut(BOTH, CHANNELS, [2, 6, 8, 8], ends1=[7]),
        shortcut(BOTH, CHANNELS, [2, 6, 8, 8], ends1=[-1]),
        shortcut({3: 2, 2: -1}, CHANNELS, [2, 6, 8, 8], starts1=[END], ends1=[-END]),
        shortcut({1: 2, 2: 2}, CHANNELS, [2, 6, 8, 8]),
        shortcut({0: 2, 2: 2}, CHANNELS, [2, 6, 8, 8]),
        shortcut({}, CHANNELS, [2, 6, 8, 8]),
        shortcut(BOTH, [0, 4, 1, 0, 0, 4, 0, 0], [2, 6, 8, 8]),
        shortcut(BOTH, [0, 4, 0, 0, 0, 4, 0, 1], [2, 6, 8, 8]),
        shortcut(BOTH, [1, 4, 0, 0, 0, 4, 0, 0], [2, 6, 8, 8]),
        shortcut(BOTH, [0, -1, 0, 0, 0, 4, 0, 0], [2, 6, 8, 8]),
        shortcut(BOTH, CHANNELS, [2, 6, 8, 8], value=1),
        shortcut(BOTH, CHANNELS, [2, 6, 8, 8], mode="edge"),
        shortcut(BOTH, [0, 60, 0, 0, 0, 60, 0, 0], [2, SELECTION_WEIGHTS // 128, 8, 8]),
    ],
)
def test_other_slices_and_pads_are_left(proto: onnx.ModelProto) -> None:
    before = proto.SerializeToString(deterministic=True)
    rewrite(proto)
    assert proto.SerializeToString(deterministic=True) == before


def test_what_else_is_read_stays() -> None:
    proto = shortcut(BOTH, CHANNELS, ["n", 6, 8, 8])
    proto.graph.output.append(helper.make_tensor_value_info("s1", TensorProto.FLOAT, ["n", 6, 4, 4]))
    rewrite(proto)
    assert operators(proto) == {"Slice": 2, "Pad": 1}
    proto = shortcut(BOTH, CHANNELS, ["n", 6, 8, 8])
    proto.graph.output.append(helper.make_tensor_value_info("s0", TensorProto.FLOAT, ["n", 6, 4, 8]))
    rewrite(proto)
    x = np.random.default_rng(0).standard_normal((2, 6, 8, 8)).astype(np.float32)
    found = ran(proto, x)
    assert np.array_equal(found[1], x[:, :, ::2])
    assert np.array_equal(found[0], np.pad(x[:, :, ::2, ::2], ((0, 0), (4, 4), (0, 0), (0, 0))))


def test_an_earlier_slice_of_another_kind_stays_before_the_convolution() -> None:
    proto = shortcut(BOTH, CHANNELS, ["n", 6, 8, 7], starts0=[1])
    rewrite(proto)
    assert (operators(proto)["Slice"], operators(proto)["Conv"]) == (1, 1)
    x = np.random.default_rng(0).standard_normal((2, 6, 8, 7)).astype(np.float32)
    assert np.array_equal(ran(proto, x)[0], np.pad(x[:, :, 1::2, ::2], ((0, 0), (4, 4), (0, 0), (0, 0))))


def test_free_channels_are_left() -> None:
    proto = shortcut(BOTH, CHANNELS, ["n", "c", 8, 8])
    rewrite(proto)
    assert operators(proto) == {"Slice": 2, "Pad": 1}


def mean(axes: Sequence[int] | None, shape: Shape, **attributes: int) -> Any:
    if axes is None:
        return model([helper.make_node("ReduceMean", ["x"], ["y"], **attributes)], shape)
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], **attributes)
    return model([node], shape, axes=np.array(axes, np.int64))


@pytest.mark.parametrize("keepdims", [0, 1, None])
@pytest.mark.parametrize(("axes", "rank"), [((2, 3), 4), ((-1, -2), 4), ((4, 2, -2), 5)])
def test_mean_over_space_becomes_pooling(axes: tuple[int, ...], rank: int, keepdims: int | None) -> None:
    given = {} if keepdims is None else {"keepdims": keepdims}
    proto = mean(axes, ["n", 6, *(7, 5, 3)[: rank - 2]], **given)
    pool_means(proto.graph)
    assert operators(proto) == {"GlobalAveragePool": 1, **({"Squeeze": 1} if keepdims == 0 else {})}
    x = np.random.default_rng(0).standard_normal((3, 6, *(7, 5, 3)[: rank - 2])).astype(np.float32)
    (found,) = ran(proto, x)
    wanted = x.mean(axis=axes, keepdims=keepdims != 0)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 1e-6


@pytest.mark.parametrize(
    ("axes", "rank"), [((1,), 4), ((2,), 4), ((3,), 4), ((1, 2, 3), 4), ((0, 2, 3), 4), (None, 4), ((2,), 3), ((1,), 2)]
)
def test_other_means_are_left(axes: tuple[int, ...] | None, rank: int) -> None:
    proto = mean(axes, [2, 6, 7, 5][:rank], keepdims=0)
    pool_means(proto.graph)
    assert operators(proto) == {"ReduceMean": 1}


def test_prune_takes_whole_chains_and_nothing_else() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Abs", ["b"], ["c"]),
        helper.make_node("Split", ["a"], ["y", "unread"], axis=1, num_outputs=2),
    ]
    proto = model(nodes, [2, 6])
    prune(proto.graph)
    assert operators(proto) == {"Relu": 1, "Split": 1}
