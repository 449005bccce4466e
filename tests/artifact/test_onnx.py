"""An ONNX file holds exactly the policy's codes, computes what the model does, and runs on integer kernels."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from autocompress import ArtifactError, Batch, LayerChoice, Policy, Workbench, compress
from autocompress.artifact import onnx as artifact
from autocompress.artifact import onnx_graph
from autocompress.artifact.onnx import MASK_BYTES, About, Candidate, Exporter
from autocompress.errors import ExportError
from autocompress.policy import BITS
from autocompress.runtime import RuntimeModel, device, session
from autocompress.stored import Full, Quantised, round_to_half
from autocompress.task import call, tensors

ABOUT = About("task", "accuracy", "0123456789abcdef", 0.5)


class Residual(nn.Module):
    """A convolution with a norm, two grouped ones, a depthwise one, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.conv, self.free, self.fc = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 12, 3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        y = torch.relu(self.depthwise(torch.relu(self.grouped(x))))
        x = torch.relu(self.free(torch.relu(self.conv(y) + x)))
        return self.fc(x.mean(dim=(2, 3)))


class Sequence(nn.Module):
    """An embedding, layers on three dimensions (their weights are transposed in the file), and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(20, 12), nn.Linear(12, 16)
        self.extra, self.mix = nn.Linear(4, 16), nn.Linear(16, 16, bias=False)
        self.kind, self.mean = nn.Linear(16, 5), nn.Linear(16, 1)

    def forward(self, tokens: Tensor, extra: Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.mix(torch.relu(self.hidden(self.embed(tokens)))))
        pooled = hidden.mean(dim=1) + self.extra(extra)
        return {"outputs": (self.kind(pooled), self.mean(pooled)), "steps": 1, "none": None}


TURNED = ("hidden.weight", "mix.weight")
"""Weights that are transposed in the file."""


LAST = ("fc", "kind", "mean")
"""Linear layers whose outputs the network returns."""


class Wave(nn.Module):
    """Convolutions in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 6, 3, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.a(x))
        return self.b(y), y.mean(dim=2)


class Tied(nn.Module):
    """A head that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(x))))


class Baked(nn.Module):
    """A number of channels that the exporter writes into the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.b(torch.relu(self.a(x))))
        return self.fc(y.view(x.shape[0], self.b.weight.shape[0], -1).mean(dim=2))


class Alike(nn.Module):
    """Layers with equal tensors, as of a network that starts from copies."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        for layer in self.layers:
            layer.load_state_dict(self.layers[0].state_dict())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Derived(nn.Module):
    """A weight that is computed from another tensor: the exporter puts the result into the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.direction, self.fc = nn.Parameter(torch.randn(8, 6)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(F.linear(x, self.direction / self.direction.norm())))


class Depthwise(nn.Module):
    """Its depthwise convolution narrows with the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16)
        self.c, self.fc = nn.Conv2d(16, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        return self.fc(x.mean(dim=(2, 3)))


class Shortcut(nn.Module):
    """Shortcuts without parameters around strided blocks, on odd sizes; returns a map and a classification."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a1, self.a2 = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3, 2, 1), nn.Conv2d(8, 32, 3, 1, 1)
        self.b1, self.b2, self.fc = nn.Conv2d(32, 16, 3, 3, 1), nn.Conv2d(16, 36, 1), nn.Linear(36, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.stem(x))  # 13x9 pixels
        y = self.a2(torch.relu(self.a1(x)))
        x = torch.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))  # 7x5
        y = self.b2(torch.relu(self.b1(x)))
        x = y + F.pad(x[:, :, ::3, ::3], (0, 0, 0, 0, 0, 4))  # 3x2
        return x, self.fc(torch.relu(x).mean(dim=(2, 3)))


class Bordered(nn.Module):
    """Padding that is no shortcut's, of a map that is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.c(torch.relu(self.b(F.pad(x, (1, 1, 1, 1))) + x))


LATE = ("tied", "baked", "alike", "wave", "depthwise", "bordered")
"""Networks whose every width is left to the whole run: an export and forty sessions take seconds."""
Inputs = Callable[[int], Any]
CASES: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "residual": (Residual, lambda n: torch.randn(n, 3, 6, 6)),
    "sequence": (Sequence, lambda n: {"tokens": torch.randint(0, 20, (n, 5)), "extra": torch.randn(n, 4)}),
    "wave": (Wave, lambda n: (torch.randn(n, 2, 9),)),
    "tied": (Tied, lambda n: torch.randint(0, 16, (n, 5))),
    "baked": (Baked, lambda n: torch.randn(n, 3, 6, 6)),
    "depthwise": (Depthwise, lambda n: torch.randn(n, 3, 6, 6)),
    "alike": (Alike, lambda n: torch.randn(n, 6)),
    "shortcut": (Shortcut, lambda n: torch.randn(n, 3, 15, 11)),
    "bordered": (Bordered, lambda n: torch.randn(n, 3, 6, 6)),
}


class AnyTask:
    """A model and inputs of any form; what it is trained for does not matter."""

    name, metric, direction = "any", "error", "min"

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self._model, self.inputs = model.eval(), inputs

    def model(self) -> nn.Module:
        return copy.deepcopy(self._model)

    def batches(self, split: str, seed: int) -> Iterator[Batch]:  # noqa: ARG002
        yield Batch(self.inputs, torch.zeros(8))

    def loss(self, outputs: Any, batch: Batch) -> Tensor:  # noqa: ARG002
        return sum((t.square().mean() for t in tensors(outputs)), torch.zeros(()))

    def score(self, model: nn.Module, split: str) -> float:
        return float(next(self.loss(call(model, batch.inputs), batch) for batch in self.batches(split, 0)))


@dataclass(frozen=True, eq=False)
class Case:
    """A network that was exported."""

    bench: Workbench
    exporter: Exporter
    inputs: Any

    def candidate(self, policy: Policy) -> Candidate:
        return candidate(self.bench, policy)

    def build(self, policy: Policy) -> tuple[bytes, Candidate]:
        made = self.candidate(policy)
        return self.exporter.build(made, ABOUT), made

    def uniform(self, bits: int, sparsity: float = 0.0, scheme: Any = "symmetric", activations: int = 32) -> Policy:
        choice = LayerChoice(bits, sparsity, scheme)
        return Policy({layer.name: choice for layer in self.bench.graph.layers}, activations=activations)


def candidate(bench: Workbench, policy: Policy) -> Candidate:
    made = compress(bench, policy)
    return Candidate(made.tensors, bench.realise(made), bench.graph.architecture(policy), policy.activations)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """No two channels alike, statistics included."""
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
    return model


def opened(model: nn.Module, inputs: Any) -> Case:
    bench = Workbench(AnyTask(model, inputs))
    return Case(bench, Exporter(bench.graph.layers, candidate(bench, Policy()), [inputs]), inputs)


@cache
def case(name: str) -> Case:
    make, inputs = CASES[name]
    return opened(seeded(make), inputs(8))


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return [value.clone() for value in tensors(call(model, inputs))]


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference, of the largest value."""
    assert [x.shape for x in a] == [y.shape for y in b]
    return max(float((x - y).abs().max() / y.abs().max().clamp_min(1e-30)) for x, y in zip(a, b, strict=True))


# --- what it computes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow if x in LATE else ()) for x in CASES])
def test_float_file_of_every_width_computes_what_the_model_does(name: str) -> None:
    known = case(name)
    for bits, scheme, sparsity in itertools.product(BITS, ("symmetric", "asymmetric"), (0.0, 0.6)):
        content, made = known.build(known.uniform(bits, sparsity, scheme))
        ran = known.exporter.module(session(content))
        assert gap(outputs(ran, known.inputs), outputs(made.model, known.inputs)) < 2e-6, (bits, scheme, sparsity)


def test_file_returns_what_the_model_returns_and_takes_any_batch_and_order_of_names() -> None:
    known = case("sequence")
    content, made = known.build(known.uniform(4))
    ran = known.exporter.module(session(content))
    for count in (1, 3, 11):
        inputs = CASES["sequence"][1](count)
        found, wanted = call(ran, inputs), call(made.model, inputs)
        assert (found["steps"], found["none"], list(found)) == (1, None, list(wanted))
        assert isinstance(found["outputs"], tuple)
        swapped = dict(reversed(inputs.items()))
        assert gap(outputs(ran, swapped), outputs(ran, inputs)) == 0
        assert gap(outputs(ran, (inputs["tokens"], inputs["extra"])), outputs(made.model, inputs)) < 2e-6


class Wrapped(nn.Module):
    """Passes on whatever it is given by name, as wrappers of library models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Sequence()

    def forward(self, **inputs: Tensor) -> Any:
        return self.inner(**inputs)["outputs"]


def test_arguments_that_are_only_passed_on_are_inputs_of_any_batch() -> None:
    draw = CASES["sequence"][1]
    known = opened(seeded(Wrapped), draw(8))
    content, made = known.build(known.uniform(4))
    ran = known.exporter.module(session(content))
    for count in (1, 3, 11):
        inputs = draw(count)
        assert gap(outputs(ran, dict(reversed(inputs.items()))), outputs(made.model, inputs)) < 2e-6


def quantiser(low: float, high: float) -> Callable[[Tensor], Tensor]:
    """Rounds to unsigned bytes between `low` and `high`."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    return lambda x: ((x / step + zero).round().clamp(0, 255) - zero) * step


def simulated(known: Case, made: Candidate) -> nn.Module:
    """The model in floats with rounded inputs and outputs of every layer: an independent account of integer kernels.

    Linear layers that make the network's outputs give them as floats.
    """
    model, ranges = copy.deepcopy(made.model), {}
    layers = [layer.name for layer in known.bench.graph.layers if layer.kind != "embedding"]

    def watch(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> None:
            ranges[name] = [(float(value.min()), float(value.max())) for value in (given[0], found)]

        return hook

    def around(name: str) -> Any:
        before, after = (quantiser(*found) for found in ranges[name])
        return lambda _, given: (before(given[0]),), lambda _, __, found: after(found)

    dense = copy.deepcopy(known.candidate(Policy()).model)
    for name in layers:
        dense.get_submodule(name).register_forward_hook(watch(name))
    outputs(dense, known.inputs)
    for name in layers:
        before, after = around(name)
        model.get_submodule(name).register_forward_pre_hook(before)
        if name not in LAST:
            model.get_submodule(name).register_forward_hook(after)
    return model


def saturates(made: Candidate) -> bool:
    """Without VNNI, the sum of two products of an unsigned and a signed byte has 16 bits only."""
    codes = [t.codes.int() - t.zero.reshape(-1, *[1] * (t.codes.ndim - 1)).int() for t in made.tensors.values()
             if isinstance(t, Quantised)]  # fmt: skip
    return "vnni" not in device() and any(int(c.abs().max()) * 255 * 2 >= 2**15 for c in codes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "sequence", "wave", "baked", "alike", "bordered"])
def test_integer_file_is_a_few_steps_from_a_simulation(name: str) -> None:
    known = case(name)
    dense = outputs(known.candidate(Policy()).model, known.inputs)
    for bits, scheme, sparsity in itertools.product((1, 2, 3, 4, 5, 6, 7, 8), ("symmetric", "asymmetric"), (0.0, 0.6)):
        if (bits, scheme) == (8, "asymmetric"):  # such codes are no signed bytes: float kernels
            continue
        content, made = known.build(known.uniform(bits, sparsity, scheme, activations=8))
        wanted = outputs(simulated(known, made), known.inputs)
        found = outputs(known.exporter.module(session(content)), known.inputs)
        for f, w, d in zip(found, wanted, dense, strict=True):
            step = float(d.max().clamp_min(0) - d.min().clamp_max(0)) / 255
            assert saturates(made) or float((f - w).abs().max()) <= 3 * step + 1e-6, (bits, scheme, sparsity)


# --- what it holds ----------------------------------------------------------------------------------------


class Reader:
    """A second, independent decoder of a file's constants."""

    def __init__(self, content: bytes) -> None:
        self.proto = onnx.load_from_string(content)
        self.arrays = {t.name: numpy_helper.to_array(t) for t in self.proto.graph.initializer}
        self.makers = {name: node for node in self.proto.graph.node for name in node.output}
        self.calls = [node for node in self.proto.graph.node if node.op_type in ("D", "S")]

    def attributes(self, node: onnx.NodeProto) -> dict[str, Any]:
        return {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def plane_bytes(self) -> list[int]:
        return [self.arrays[node.input[0]].nbytes for node in self.calls]

    def codes(self, node: onnx.NodeProto) -> np.ndarray[Any, Any]:
        """One number after the other, bit by bit."""
        given, planes = self.attributes(node), self.arrays[node.input[0]]
        low = np.atleast_1d(self.arrays[node.input[1]]).reshape(-1)
        size = math.prod(given["shape"])
        stays = [True] * size
        if node.op_type == "S":
            mask = self.arrays[node.input[2]].reshape(-1)
            stays = [bool(mask[i // 8] >> (7 - i % 8) & 1) for i in range(size)]
        assert sum(stays) == given["count"][0]
        per_row, found, n = size // given["shape"][0], [], 0
        for i in range(size):
            value = 0
            if stays[i]:
                bits = [int(plane[n // 8]) >> (7 - n % 8) & 1 for plane in planes]
                value = sum(power * bit for power, bit in zip(given["powers"], bits, strict=True))
                value += int(low[i // per_row % len(low)])
                n += 1
            found.append(value)
        return np.array(found).reshape(given["shape"])

    def value(self, name: str) -> np.ndarray[Any, Any]:
        """What the runtime makes of a constant."""
        if name in self.arrays:
            return self.arrays[name]
        node = self.makers[name]
        if node.op_type in ("D", "S"):
            return self.codes(node)
        given, inputs = self.attributes(node), [self.value(n) for n in node.input if n]
        if node.op_type == "H":
            return inputs[0].astype(np.float32) * np.float32(given["unit"])
        if node.op_type == "DequantizeLinear":
            shape = [1] * inputs[0].ndim
            shape[given.get("axis", 1)] = -1
            return inputs[0].astype(np.float32) * inputs[1].reshape(shape)
        simple: dict[str, Callable[[], Any]] = {
            "Z": lambda: np.zeros(inputs[0].shape, np.int8),
            "Cast": lambda: inputs[0].astype(np.float32),
            "Reshape": lambda: inputs[0].reshape(inputs[1]),
            "Mul": lambda: inputs[0] * inputs[1],
            "Transpose": lambda: inputs[0].transpose(given["perm"]),
        }
        return simple[node.op_type]()

    def weight(self, number: int) -> np.ndarray[Any, Any]:
        """What the node with this name computes with."""
        (node,) = [node for node in self.proto.graph.node if node.name == str(number)]
        return self.value(node.input[1])


@pytest.mark.parametrize("name", ["residual", "sequence", "wave"])
@pytest.mark.parametrize("activations", [8, 32])
def test_weights_in_the_file_are_exactly_the_codes(name: str, activations: int) -> None:
    known = case(name)
    for bits, scheme, sparsity in itertools.product((1, 2, 3, 5, 7, 8, 16, 32), ("symmetric", "asymmetric"), (0, 0.7)):
        content, made = known.build(known.uniform(bits, float(sparsity), scheme, activations))
        file = Reader(content)
        for number, weight in enumerate(known.exporter.computed):
            wanted = made.tensors[weight].dense().numpy()
            found = file.weight(number)
            assert np.array_equal(found.T if weight in TURNED else found, wanted), (weight, bits, scheme, sparsity)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7])
def test_planes_take_the_policys_bits(bits: int) -> None:
    known = case("residual")
    content, made = known.build(known.uniform(bits))
    counts = [t.codes.numel() for t in made.tensors.values() if isinstance(t, Quantised)]
    assert sorted(Reader(content).plane_bytes()) == sorted(bits * math.ceil(n / 8) for n in counts)
    content, made = known.build(known.uniform(bits, 0.8, activations=8))
    file = Reader(content)
    for node in file.calls:
        kept = math.prod(file.attributes(node)["shape"])
        if node.op_type == "S":
            kept -= LayerChoice(bits, 0.8).zeros(kept)
        assert file.arrays[node.input[0]].nbytes == bits * math.ceil(kept / 8)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_get_a_mask_only_where_that_saves_bytes(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    known = case("residual")
    lengths: dict[bool, list[int]] = {True: [], False: []}
    for percent in range(0, 100, 9):
        policy = replace(known.uniform(bits), layers={"free": LayerChoice(bits, percent / 100)})
        content, made = known.build(policy)
        monkeypatch.setattr(artifact, "MASK_BYTES", 10**9)
        plain, _ = known.build(policy)
        monkeypatch.setattr(artifact, "MASK_BYTES", MASK_BYTES)
        masked = any(node.op_type == "S" for node in Reader(content).calls)
        size = made.tensors["free.weight"].dense().numel()
        kept = size - LayerChoice(bits, percent / 100).zeros(size)
        saved = (bits - 1) * math.ceil(size / 8) - bits * math.ceil(kept / 8)
        assert masked == (saved > MASK_BYTES)
        lengths[masked].append(len(content) - len(plain) + saved)
    assert lengths[False], "both ways were seen"
    overhead = lengths[True]  # the nodes, and the function in place of the other one, which is in the file once
    assert max(overhead) - min(overhead) <= 4


@pytest.mark.slow
def test_tied_weight_is_in_the_file_once() -> None:
    content, made = case("tied").build(case("tied").uniform(32))
    sizes = [array.nbytes for array in Reader(content).arrays.values()]
    assert sizes.count(made.tensors["embed.weight"].dense().numel() * 4) == 1
    assert len(content) < sum(t.dense().numel() * 4 for t in made.tensors.values()) + 1500


# --- how it runs ------------------------------------------------------------------------------------------


def optimised(content: bytes, folder: Path) -> onnx.ModelProto:
    """The graph that the runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")


def kernels(proto: onnx.ModelProto) -> Counter[Any]:
    """Operators and the types and shapes of the constants that they take."""
    shapes = {t.name: (t.data_type, tuple(t.dims)) for t in proto.graph.initializer}
    return Counter((node.op_type, *(shapes.get(name) for name in node.input)) for node in proto.graph.node)


@pytest.mark.parametrize("name", ["residual", "sequence", "wave"])
def test_planes_run_on_the_kernels_of_plain_bytes(name: str, tmp_path: Path) -> None:
    """Equal kernels on equal shapes take equal times; how equal is measured by `benchmarks/latency.py`."""
    known = case(name)
    plain = kernels(optimised(known.build(known.uniform(8, activations=8))[0], tmp_path))
    for bits, scheme, sparsity in [*itertools.product((2, 3, 4, 5, 6, 7), ("symmetric", "asymmetric"), (0.0, 0.7))]:
        content, _ = known.build(known.uniform(bits, sparsity, scheme, activations=8))
        graph = optimised(content, tmp_path)
        operators = {node.op_type for node in graph.graph.node}
        assert operators & {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"}
        assert not operators & {"Conv", "FusedConv", "Gemm", "BitShift", "BitwiseAnd", "ReduceSum", "CumSum", "D", "S"}
        weights = {t.name for t in graph.graph.initializer if len(t.dims) > 1}
        assert not [n for n in graph.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in weights]
        embedded = Counter({k: n for k, n in kernels(graph).items() if "Gather" in k[0]})
        assert kernels(graph) - embedded == plain - Counter({k: n for k, n in plain.items() if "Gather" in k[0]})


def test_float_kernels_get_floats_when_the_file_is_loaded(tmp_path: Path) -> None:
    content, _ = case("residual").build(case("residual").uniform(3, 0.7))
    assert {node.op_type for node in optimised(content, tmp_path).graph.node} <= {
        "Conv", "FusedConv", "Gemm", "ReduceMean", "ReorderInput", "ReorderOutput", "Relu", "Add", "Reshape",
    }  # fmt: skip


def test_layers_without_a_grid_stay_floats_among_integer_ones(tmp_path: Path) -> None:
    known = case("residual")
    policy = known.uniform(4, activations=8)
    layers = {**policy.layers, "conv": LayerChoice(32), "fc": LayerChoice(16), "stem": LayerChoice(8, 0, "asymmetric")}
    content, made = known.build(replace(policy, layers=layers))
    operators = Counter(node.op_type for node in optimised(content, tmp_path).graph.node)
    assert (operators["QLinearConv"], operators["QGemm"]) == (3, 0), "the runtime makes integers of some on its own"
    assert known.exporter.kernels(made) != known.exporter.kernels(known.candidate(policy))
    found = outputs(known.exporter.module(session(content)), known.inputs)
    assert gap(found, outputs(made.model, known.inputs)) < 0.1


def test_kernels_are_told_apart_by_shapes_and_precision_alone() -> None:
    known = case("residual")
    key = {
        what: known.exporter.kernels(known.candidate(policy))
        for what, policy in {
            "4": known.uniform(4, activations=8),
            "7": known.uniform(7, 0.5, "asymmetric", activations=8),
            "float": known.uniform(4),
            "narrow": replace(known.uniform(4, activations=8), keep={"free": 0.5}),
        }.items()
    }
    assert key["4"] == key["7"]
    assert len(set(key.values())) == 3


@cache
def before() -> Case:
    """A network of shortcuts as it is exported."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(artifact, "rewrite", lambda _: None)
        return opened(seeded(Shortcut), case("shortcut").inputs)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 7])
def test_rewritten_integers_are_those_of_the_graph_before(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a linear layer returns is not rounded to bytes any more, nor cut off at the dense model's range."""
    known, policy = case("shortcut"), case("shortcut").uniform(bits, activations=8)
    exact = outputs(known.exporter.module(session(known.build(policy)[0])), known.inputs)
    for name in ("align_inputs", "float_outputs", "pool_means"):
        monkeypatch.setattr(onnx_graph, name, lambda *_: {})
    plain = outputs(known.exporter.module(session(before().build(policy)[0])), known.inputs)
    assert torch.equal(exact[0], plain[0])
    dense = outputs(known.candidate(Policy()).model, known.inputs)[1]
    step = float(dense.max().clamp_min(0) - dense.min().clamp_max(0)) / 255
    inside = (exact[1] < dense.max()) & (exact[1] > dense.min())
    assert 0.1 * step < float((exact[1] - plain[1])[inside].abs().max()) < 0.51 * step


def test_shortcuts_and_means_stay_integers_between_the_ends(tmp_path: Path) -> None:
    policy = case("shortcut").uniform(4, activations=8)
    found = Counter(node.op_type for node in optimised(case("shortcut").build(policy)[0], tmp_path).graph.node)
    assert (found["QLinearConv"], found["QLinearGlobalAveragePool"], found["QGemm"]) == (5 + 2, 1, 1)
    assert not found.keys() & {"Slice", "ReduceMean", "Conv", "Gemm", "Flatten"}
    assert (found["QuantizeLinear"], found["DequantizeLinear"], found["Pad"]) == (1, 1, 1), "the ends' alone"


def test_float_shortcuts_are_convolutions_whose_weight_is_made_when_the_file_is_loaded(tmp_path: Path) -> None:
    content, _ = case("shortcut").build(case("shortcut").uniform(4))
    operations = {node.op_type for node in optimised(content, tmp_path).graph.node}
    assert not operations & {"Slice", "Pad", "ConstantOfShape", "EyeLike", "Unsqueeze"}
    assert len(content) <= len(before().build(case("shortcut").uniform(4))[0]), "no weight of zeros and ones"


def test_three_colours_are_four_where_there_are_enough_output_channels(tmp_path: Path) -> None:
    for name, channels in (("shortcut", 4), ("bordered", 3)):
        proto = optimised(case(name).build(case(name).uniform(4, activations=8))[0], tmp_path)
        shapes = {tensor.name: tensor.dims for tensor in proto.graph.initializer}
        first = next(node for node in proto.graph.node if node.op_type == "QLinearConv")
        assert shapes[first.input[3]][1] == channels


@pytest.mark.parametrize("name", ["shortcut", "bordered", "residual", "wave"])
@pytest.mark.parametrize("activations", [8, 32])
def test_every_node_of_a_file_is_read(name: str, activations: int) -> None:
    graph = onnx.load_from_string(case(name).build(case(name).uniform(4, activations=activations))[0]).graph
    read = {name for node in graph.node for name in node.input} | {port.name for port in graph.output}
    assert [node.op_type for node in graph.node if not read.intersection(node.output)] == []


# --- narrower networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "exports"), [("residual", 0), ("sequence", 0), ("depthwise", 0), ("shortcut", 0), ("baked", 1)]
)
def test_narrow_candidate_is_exported_again_only_where_the_graph_holds_sizes(
    name: str, exports: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, count = case(name), []
    plain = artifact.export
    monkeypatch.setattr(artifact, "export", lambda *given: count.append(1) or plain(*given))
    for activations in (32, 8):
        half = replace(
            known.uniform(4, 0.5, activations=activations), keep={g.name: 0.5 for g in known.bench.graph.prunable}
        )
        content, made = known.build(half)
        found = outputs(known.exporter.module(session(content)), known.inputs)
        assert gap(found, outputs(made.model, known.inputs)) < (2e-6 if activations == 32 else 0.4)
        assert any(made.tensors[x.weight].dense().shape != x.shape for x in known.bench.graph.layers)
    assert len(count) == exports


# --- tensors that are hard --------------------------------------------------------------------------------


def test_equal_tensors_of_the_dense_model_are_not_taken_for_one() -> None:
    """The exporter stores equal constants once; candidates need not have equal ones in these places."""
    known = case("alike")
    policy = known.uniform(4)
    layers = {name: LayerChoice(bits) for name, bits in zip(policy.layers, (2, 5, 32), strict=True)}
    content, made = known.build(replace(policy, layers=layers))
    assert gap(outputs(known.exporter.module(session(content)), known.inputs), outputs(made.model, known.inputs)) < 2e-6


@pytest.mark.slow
def test_model_that_computes_with_its_tensors_is_exported_for_each_candidate() -> None:
    known = opened(seeded(Derived), torch.randn(8, 6))
    made = known.candidate(known.uniform(4))
    moved = {**made.tensors, "direction": Full(torch.randn(8, 6))}
    other = copy.deepcopy(made.model)
    with torch.no_grad():
        other.direction.copy_(moved["direction"].dense())
    one = Candidate(moved, other, made.architecture)
    found = outputs(known.exporter.module(session(known.exporter.build(one, ABOUT))), known.inputs)
    assert gap(found, outputs(one.model, known.inputs)) < 2e-6


def changed(made: Candidate, weights: Mapping[str, Quantised | Full]) -> Candidate:
    """The candidate with some other tensors."""
    model = copy.deepcopy(made.model)
    model.load_state_dict({name: stored.dense() for name, stored in weights.items()}, strict=False)
    return Candidate({**made.tensors, **weights}, model, made.architecture, made.activations)


@pytest.mark.parametrize("activations", [32, 8])
@pytest.mark.parametrize("faint", [0.0, 1e-9])
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_silent_rows_stay_silent_and_keep_their_bias(activations: int, faint: float, sparsity: float) -> None:
    known = case("wave")
    made = known.candidate(known.uniform(4, sparsity, activations=activations))
    rows = made.tensors["b.weight"]
    assert isinstance(rows, Quantised)
    scale = rows.scale.clone()
    scale[1::2] *= faint
    silent = changed(made, {"b.weight": replace(rows, scale=round_to_half(scale))})
    content = known.exporter.build(silent, ABOUT)
    found = outputs(known.exporter.module(session(content)), known.inputs)
    wanted = outputs(silent.model, known.inputs)
    assert gap(found, wanted) < (2e-6 if activations == 32 else 0.05)


@pytest.mark.parametrize("factor", [1e-36, 1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("bits", [3, 16])
def test_huge_and_tiny_weights_survive(factor: float, bits: int) -> None:
    known = case("wave")
    made = known.candidate(known.uniform(bits))
    weight = made.tensors["a.weight"]
    scaled: Any = Full(round_to_half(weight.dense() * factor))
    if isinstance(weight, Quantised):
        scaled = replace(weight, scale=round_to_half(weight.scale * factor))
    quiet = {"a.bias": Full(made.tensors["a.bias"].dense() * factor), "b.bias": Full(torch.zeros(6))}
    huge = changed(made, {"a.weight": scaled, **quiet})
    content = known.exporter.build(huge, ABOUT)
    found, wanted = outputs(known.exporter.module(session(content)), known.inputs), outputs(huge.model, known.inputs)
    assert all(bool(t.isfinite().all()) and float(t.abs().max()) > 0 for t in wanted)
    assert gap(found, wanted) < 1e-5


# --- what is refused --------------------------------------------------------------------------------------


class Decomposed(nn.Module):
    """An operator that ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(self.fc(x))


class TwoFaced(nn.Module):
    """What is exported is not what is run."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y + 0.1 if torch.compiler.is_exporting() else y


class Fixed(TwoFaced):
    """The batch size is a number in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).reshape(len(x), 2, 2)


class Packed(TwoFaced):
    """Returns an object."""

    def forward(self, x: Tensor) -> Any:
        return {"x": self.fc(x), "set": {1, 2}}


@pytest.mark.parametrize(
    ("make", "inputs", "words"),
    [
        (Decomposed, torch.randn(2, 5, 4), ("linalg_svd", "packed artifact")),
        (TwoFaced, torch.randn(2, 4), ("differ", "0.001", "packed artifact")),
        (Fixed, torch.randn(2, 4), ("x.shape[0]", "packed artifact")),
        (Packed, torch.randn(2, 4), ("returns a set", "packed artifact")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_model_without_an_export_is_refused_by_name(make: Any, inputs: Any, words: tuple[str, ...]) -> None:
    model = make().eval()
    state = {name: Full(value) for name, value in model.state_dict().items()}
    with pytest.raises(ExportError) as error:
        Exporter((), Candidate(state, model, 0), [inputs])
    assert [word for word in words if word not in str(error.value)] == []


# --- the file's metadata ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written() -> bytes:
    return case("wave").build(case("wave").uniform(4, 0.6, activations=8))[0]


@pytest.mark.parametrize(
    "about",
    [ABOUT, About('a "quoted" näme\n', "µ", "", -1e308), About("t", "m", "k"), About("t", "m", "k", math.inf)],
)
def test_metadata_comes_back(about: About, tmp_path: Path) -> None:
    made = case("wave").candidate(case("wave").uniform(4))
    (tmp_path / "m.onnx").write_bytes(case("wave").exporter.build(made, about))
    found, content = About.read(tmp_path / "m.onnx")
    assert repr(found) == repr(about)
    assert content == (tmp_path / "m.onnx").read_bytes()


def test_length_does_not_depend_on_the_quality() -> None:
    made = case("wave").candidate(case("wave").uniform(4))
    files = [case("wave").exporter.build(made, replace(ABOUT, quality=q)) for q in (0, 1 / 3, -1e-300, math.nan)]
    assert len({len(content) for content in files}) == 1
    assert len(set(files)) == 4


def test_equal_candidates_give_equal_files(written: bytes) -> None:
    assert case("wave").build(case("wave").uniform(4, 0.6, activations=8))[0] == written


def test_file_is_an_ordinary_onnx_model(written: bytes) -> None:
    onnx.checker.check_model(onnx.load_from_string(written), full_check=True)
    assert {port.name for port in onnx.load_from_string(written).graph.input} == {"x"}


def resealed(content: bytes, change: Callable[[onnx.ModelProto], object]) -> bytes:
    """What somebody would write who knows how files are sealed."""
    proto = onnx.load_from_string(content)
    del proto.metadata_props[:]
    change(proto)
    return ABOUT.sealed(proto.SerializeToString())


def elsewhere(tensor: TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret.bin")


def nested(proto: onnx.ModelProto) -> None:
    """In the branch of a condition."""
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "away")
    elsewhere(tensor)
    branch = helper.make_graph([], "b", [], [helper.make_tensor_value_info("away", 1, [4])], [tensor])
    proto.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=branch, else_branch=branch))


def in_function(proto: onnx.ModelProto) -> None:
    node = next(n for f in proto.functions for n in f.node if n.op_type == "Constant" and n.attribute[0].HasField("t"))
    elsewhere(node.attribute[0].t)


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda c: b"",  # noqa: ARG005
    "garbage": lambda c: random.Random(0).randbytes(len(c)),
    "text": lambda c: b"not a model\n" * 9,  # noqa: ARG005
    "another model": lambda c: onnx.helper.make_model(onnx.load_from_string(c).graph).SerializeToString(),
    "one byte more": lambda c: c + b"\0",
    "another field": lambda c: c + onnx.ModelProto(doc_string="x").SerializeToString(),
    "metadata twice": lambda c: c + onnx.ModelProto(
        metadata_props=[onnx.StringStringEntryProto(key="autocompress", value='["a", "b", "c", "d", "e"]')]
    ).SerializeToString(),
    "external tensor": lambda c: resealed(c, lambda p: elsewhere(p.graph.initializer[0])),
    "external tensor in a branch": lambda c: resealed(c, nested),
    "external tensor in a function": lambda c: resealed(c, in_function),
}  # fmt: skip


@pytest.mark.parametrize("name", list(HOSTILE))
def test_foreign_and_changed_files_are_refused(name: str, written: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(HOSTILE[name](written))
    with pytest.raises(ArtifactError, match=r"m\.onnx"):
        About.read(path)


@pytest.mark.parametrize(
    "value", ["", "{}", "[]", "null", '["a"]', "[1, 2, 3, 4, 5]", "[" * 5000, '["","","","zz",""]']
)
def test_wrong_metadata_is_refused(value: str, written: bytes, tmp_path: Path) -> None:
    proto = onnx.load_from_string(written)
    proto.metadata_props[0].value = value
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ArtifactError, match=r"m\.onnx"):
        About.read(tmp_path / "m.onnx")


def test_truncated_and_flipped_files_are_refused(written: bytes, tmp_path: Path) -> None:
    path, draw = tmp_path / "m.onnx", random.Random(0)
    cuts = [written[: draw.randrange(len(written))] for _ in range(60)]
    flips = []
    for _ in range(200):
        at = draw.randrange(len(written))
        flips.append(written[:at] + bytes([written[at] ^ 1 << draw.randrange(8)]) + written[at + 1 :])
    for content in (*cuts, *flips):
        path.write_bytes(content)
        with pytest.raises(ArtifactError):
            About.read(path)


def test_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "no.onnx", tmp_path):
        with pytest.raises(ArtifactError, match="cannot read"):
            About.read(path)


def test_runtime_errors_are_export_errors(written: bytes) -> None:
    ran = RuntimeModel(session(written))
    with pytest.raises(ExportError, match="does not run"):
        ran(torch.randn(2, 3, 9))
    with pytest.raises(ExportError, match="reads 1 tensors and is given 2"):
        ran(torch.randn(2, 2, 9), torch.randn(2))
    with pytest.raises(ExportError, match="does not take"):
        session(b"nonsense")


def test_metadata_is_json(written: bytes) -> None:
    (entry,) = onnx.load_from_string(written).metadata_props
    assert json.loads(entry.value)[:3] == [ABOUT.task, ABOUT.metric, ABOUT.key]
