"""An ONNX file without a branch lacks its nodes, and computes what the model without it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto
from test_onnx import ABOUT, Case, gap, kernels, opened, optimised, outputs, seeded
from torch import Tensor, nn

from autocompress import Policy
from autocompress.artifact import onnx as artifact
from autocompress.runtime import session


class Blocks(nn.Module):
    """Two branches of convolutions; what the second one gives is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.a1, self.a2, self.an = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b1, self.b2, self.bn = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.an(self.a2(torch.relu(self.a1(x)))))
        y = self.bn(self.b2(torch.relu(self.b1(x))))
        y += x
        return self.head(torch.relu(y).mean(dim=(2, 3)))


class Mixer(nn.Module):
    """Branches of linear layers on three dimensions and on two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.wide, self.back, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        x = torch.relu(x + self.down(torch.relu(self.up(x)))).mean(dim=1)
        return self.head(x + self.back(torch.relu(self.wide(x))))


class Wave(nn.Module):
    """A branch in one dimension that halves the stream, beside a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv1d(2, 8, 3, padding=1), nn.Linear(6, 4)
        self.first, self.second = nn.Conv1d(8, 8, 3, stride=2, padding=1), nn.Conv1d(8, 6, 3, padding=1)
        self.project = nn.Conv1d(8, 6, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head((self.project(x) + self.second(torch.relu(self.first(x)))).mean(dim=2))


class Gate(nn.Module):
    """A gate, which is no addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean(dim=(2, 3), keepdim=True)))))
        return self.head((x * gate).mean(dim=(2, 3)))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...], int]] = {
    "blocks": (Blocks, (3, 6, 6), ("a1", "b1"), 0),
    "mixer": (Mixer, (5, 6), ("up", "wide"), 0),
    "wave": (Wave, (2, 9), ("first",), 0),
    "gate": (Gate, (3, 6, 6), ("squeeze",), 1),
}
"""Model, shape of an input, groups that can go, and how often the model without them must be exported."""


@cache
def case(name: str) -> Case:
    make, shape, _, _ = CASES[name]
    return opened(seeded(make), torch.randn(8, *shape))


def without(known: Case, *groups: str, bits: int = 4, activations: int = 32) -> Policy:
    return replace(known.uniform(bits, activations=activations), keep=dict.fromkeys(groups, 0.0))


def computed(content: bytes) -> int:
    """Nodes that compute with weights."""
    return sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in onnx.load_from_string(content).graph.node)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_file_without_branches_is_smaller_and_computes_what_the_model_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, count = case(name), []
    groups, exports = CASES[name][2:]
    assert {g.name for g in known.bench.graph.groups if g.removable} == set(groups)
    plain = artifact.export
    monkeypatch.setattr(artifact, "export", lambda *given: count.append(1) or plain(*given))
    dense, _ = known.build(known.uniform(4))
    for bits in (4, 16, 32):
        content, made = known.build(without(known, *groups, bits=bits))
        ran = known.exporter.module(session(content))
        assert gap(outputs(ran, known.inputs), outputs(made.model, known.inputs)) < 2e-6
        for size in (1, 3):
            assert gap(outputs(ran, known.inputs[:size]), outputs(made.model, known.inputs[:size])) < 2e-6
        assert computed(content) == computed(dense) - 2 * len(groups)
    narrow = replace(known.uniform(4), keep={g.name: 0.0 if g.removable else 0.5 for g in known.bench.graph.prunable})
    content, made = known.build(narrow)
    assert gap(outputs(known.exporter.module(session(content)), known.inputs), outputs(made.model, known.inputs)) < 2e-6
    assert exports <= len(count) <= 2 * exports


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bits", [6, 7])
def test_integer_kernels_stay_near_the_model(name: str, bits: int) -> None:
    known = case(name)
    content, made = known.build(without(known, *CASES[name][2], bits=bits, activations=8))
    assert gap(outputs(known.exporter.module(session(content)), known.inputs), outputs(made.model, known.inputs)) < 0.05
    again, _ = known.build(known.uniform(bits, activations=8))
    assert len(content) < len(again)


def test_what_is_left_of_a_branch_is_added_among_integers(tmp_path: Path) -> None:
    known = case("blocks")
    whole, cut = (
        [key[0] for key, count in kernels(optimised(known.build(policy)[0], tmp_path)).items() for _ in range(count)]
        for policy in (known.uniform(7, activations=8), without(known, "a1", "b1", bits=7, activations=8))
    )
    assert Counter(whole) - Counter(cut) == {"QLinearConv": 4}
    assert not Counter(cut) - Counter(whole)


def test_the_constant_is_stored_once_per_channel() -> None:
    known = case("blocks")
    content, made = known.build(without(known, "a1", bits=7))
    tensors = onnx.load_from_string(content).graph.initializer
    sizes = sorted(int(torch.tensor(t.dims).prod()) for t in tensors if t.data_type == TensorProto.FLOAT16)
    assert made.tensors["a2.bias"].dense().shape == (8,)
    assert max(sizes) == 12  # the widest layer's bias; a map has 8 * 36 values


def test_nodes_keep_their_numbers() -> None:
    """Layer times are read from the runtime's profile by them."""
    known = case("blocks")
    names = {name for node in onnx.load_from_string(known.build(known.uniform(4))[0]).graph.node if (name := node.name)}
    left = {
        name for node in onnx.load_from_string(known.build(without(known, "a1"))[0]).graph.node if (name := node.name)
    }
    gone = {str(known.exporter.computed.index(f"{layer}.weight")) for layer in ("a1", "a2")}
    assert left == names - gone


def test_other_kernels_are_told_apart() -> None:
    known = case("blocks")
    keys: set[Any] = {known.exporter.kernels(known.candidate(without(known, *g))) for g in ((), ("a1",), ("a1", "b1"))}
    assert len(keys) == 3
    content, _ = known.build(without(known, "a1"))
    assert (
        known.build(without(known, "a1"))[0]
        == content
        == known.exporter.build(known.candidate(without(known, "a1")), ABOUT)
    )
