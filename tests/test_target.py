"""What a file takes is foretold, never too low and never far too high; equal kernels take equal times."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress import (
    ArtifactError,
    ClassificationTask,
    Evaluator,
    LayerChoice,
    Policy,
    Recovery,
    Workbench,
    compress,
)
from autocompress.artifact.onnx import About
from autocompress.errors import LatencyError
from autocompress.measure.latency import Latency, RememberedTimes
from autocompress.measure.latency_table import Deployment, Entry, LatencyTable, Precision
from autocompress.policy import BITS
from autocompress.runtime import device, version
from autocompress.target import OnnxTarget, PackedTarget, Place


class Small(nn.Module):
    """Norms, a residual connection, a depthwise convolution and two linear layers."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depth, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.point = nn.Conv2d(16, 16, 1)
        self.hidden, self.fc = nn.Linear(16, 40), nn.Linear(40, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.point(torch.relu(self.bn1(self.depth(x)))) + x)
        return self.fc(torch.relu(self.hidden(x.mean(dim=(2, 3)))))


class Hooked(ClassificationTask):
    """Counts what its metric sees, by a hook on the model that it scores."""

    seen = 0

    def score(self, model: nn.Module, split: Any) -> float:
        def count(_: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> None:
            assert len(given[0]) == len(found)
            self.seen += len(found)

        handle = model.register_forward_hook(count)
        try:
            next(model.parameters()).device  # noqa: B018
            return super().score(model, split)
        finally:
            handle.remove()


def make_task(model: nn.Module | None = None, kind: type[ClassificationTask] = ClassificationTask) -> Any:
    torch.manual_seed(0)
    data = torch.randn(24, 3, 6, 6), torch.arange(24) % 4
    return kind(model or Small().eval(), data, data, data, name="small", batch_size=8)


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(make_task(kind=Hooked))


@pytest.fixture(scope="module")
def target(bench: Workbench) -> OnnxTarget:
    """Two threads and three inputs are what it is asked for; an export takes a second, so there is one."""
    return OnnxTarget(bench, Place(threads=2, batch=3), dense_ms=1.0)


@pytest.fixture(scope="module")
def carried(bench: Workbench) -> OnnxTarget:
    """With a table of another machine, and a latency of the dense model that is not the table's."""
    return OnnxTarget(bench, Place(table=make_table(bench)), dense_ms=7.0)


def built(target: OnnxTarget | PackedTarget, bench: Workbench, policy: Policy, quality: float = 0.5) -> bytes:
    return target.pack(compress(bench, target.prepared(policy)), quality)


def random_policies(bench: Workbench, count: int) -> Iterator[Policy]:
    draw = random.Random(1)
    for _ in range(count):
        layers = {
            layer.name: LayerChoice(
                draw.choice(BITS), draw.choice((0.0, 0.2, 0.5, 0.9)), draw.choice(("symmetric", "asymmetric"))
            )
            for layer in bench.graph.layers
        }
        keep = {group.name: draw.choice((0.25, 0.5, 1.0)) for group in bench.graph.prunable}
        recovery = Recovery(fold_bn=draw.random() < 0.8)
        yield Policy(layers, keep, recovery=recovery, activations=draw.choice((8, 32)))


# --- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bound_is_never_too_low_and_close(bench: Workbench, target: OnnxTarget) -> None:
    assert any(policy.keep for policy in random_policies(bench, 1))
    for policy in random_policies(bench, 60):
        length = len(built(target, bench, policy))
        bound = target.bound(policy)
        floats = [c for c in policy.layers.values() if c.bits > 8 or (c.bits == 8 and c.scheme == "asymmetric")]
        conversions = 300 * len(floats) if policy.activations == 8 else 0  # which they do not need
        assert length <= bound.bytes <= 1.01 * length + 512 + conversions, policy
        assert bound == target.predict(policy) or math.isnan(bound.predicted_ms)
        assert bound.macs == bench.graph.macs(policy)


def test_weights_take_their_bits_and_little_else(bench: Workbench, target: OnnxTarget) -> None:
    weights = sum(math.prod(layer.shape) for layer in bench.graph.layers)
    rest = []
    for bits in BITS:
        policy = Policy({layer.name: LayerChoice(bits) for layer in bench.graph.layers})
        rest.append(len(built(target, bench, policy)) - weights * bits / 8)
    assert 0 < min(rest) <= max(rest) < 4500
    planes = rest[:7]
    assert max(planes) - min(planes) < 100


def test_level_bytes_rise_with_the_bits(bench: Workbench, target: OnnxTarget) -> None:
    for layer in bench.graph.layers:
        sizes = []
        for bits in (1, 2, 4, 8, 32):
            choice = LayerChoice(bits)
            stored = bench.level(layer, choice, "nearest")
            sizes.append(target.level_bytes(layer, choice, stored))
        assert sizes[:3] == sorted(sizes[:3])
        assert sizes[3] < sizes[4]


def test_packed_target_predicts_exactly_and_applies_policies_as_they_are(bench: Workbench) -> None:
    packed = PackedTarget(bench, dense_ms=1.0)
    for policy in random_policies(bench, 8):
        assert packed.prepared(policy) is policy
        length = len(built(packed, bench, policy))
        assert length == packed.predict(policy).bytes <= packed.bound(policy).bytes
        compressed = compress(bench, policy)
        assert packed.ship(compressed, bench.realise(compressed)).bytes == length
        assert math.isnan(packed.predicted_ms(policy))
    assert (packed.dense_ms, packed.suffix, packed.runtime) == (1.0, ".acz", "torch-eager")


# --- what ships -------------------------------------------------------------------------------------------


def test_norms_are_always_folded(bench: Workbench, target: OnnxTarget) -> None:
    policy = Policy(recovery=Recovery(fold_bn=False, reestimate_bn=False))
    assert target.prepared(policy).recovery == Recovery(fold_bn=True, reestimate_bn=False)
    compressed = compress(bench, target.prepared(policy))
    assert not [name for name in compressed.tensors if name.startswith("bn")]


@pytest.mark.parametrize("activations", [8, 32])
def test_shipped_model_is_scored_by_the_task_as_any_module(
    bench: Workbench, target: OnnxTarget, activations: int
) -> None:
    policy = Policy({layer.name: LayerChoice(6) for layer in bench.graph.layers}, activations=activations)
    compressed = compress(bench, target.prepared(policy))
    model = bench.realise(compressed)
    shipped = target.ship(compressed, model)
    task, before = bench.task, bench.task.seen  # type: ignore[attr-defined]
    score = task.score(shipped.model, "val")
    assert task.seen - before == 24  # type: ignore[attr-defined]
    assert score == pytest.approx(task.score(model, "val"), abs=0.1)
    assert shipped.bytes == len(target.pack(compressed, score))
    assert next(shipped.model.parameters()).device.type == "cpu"
    assert not shipped.model.training


def test_file_that_is_read_back_is_the_shipped_one(bench: Workbench, target: OnnxTarget, tmp_path: Path) -> None:
    policy = Policy({"hidden": LayerChoice(3, 0.5)}, activations=8)
    compressed = compress(bench, target.prepared(policy))
    shipped = target.ship(compressed, bench.realise(compressed))
    (tmp_path / "m.onnx").write_bytes(target.pack(compressed, 0.625))
    again = target.reload(tmp_path / "m.onnx")
    inputs = bench.example.inputs
    assert (again.bytes, again.quality) == (shipped.bytes, 0.625)
    assert torch.equal(again.model(inputs), shipped.model(inputs))


def test_file_of_another_model_or_none_is_refused(bench: Workbench, target: OnnxTarget, tmp_path: Path) -> None:
    other = Workbench(make_task(nn.Sequential(nn.Flatten(), nn.Linear(108, 7))))
    path = tmp_path / "m.onnx"
    path.write_bytes(built(OnnxTarget(other, dense_ms=1.0), other, Policy()))
    with pytest.raises(ArtifactError, match=r"m\.onnx.*'small'"):
        target.reload(path)
    about = About("small", "accuracy", "k", 0.5)
    for body in (b"", b"\x08\x0a", b"\x3a\x02\x12\x00"):
        path.write_bytes(about.sealed(body))
        with pytest.raises(ArtifactError, match=r"m\.onnx"):
            target.reload(path)
        with pytest.raises(ArtifactError, match=r"m\.onnx"):
            target.retime(path)
    path.write_bytes(built(target, bench, Policy())[:-1])
    with pytest.raises(ArtifactError, match=r"damaged|not an ONNX file"):
        target.retime(path)


# --- times ------------------------------------------------------------------------------------------------


def test_equal_kernels_are_timed_once(bench: Workbench, target: OnnxTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def meter(content: bytes) -> Latency:
        timed.append(len(content))
        return Latency(float(len(timed)), 0.5, 9.0, 3)

    monkeypatch.setattr(target, "meter", meter)
    monkeypatch.setattr(target, "times", RememberedTimes())

    def ms(bits: int, keep: float = 1.0, activations: int = 8) -> float:
        layers = {layer.name: LayerChoice(bits) for layer in bench.graph.layers}
        policy = Policy(layers, {group.name: keep for group in bench.graph.prunable}, activations=activations)
        compressed = compress(bench, target.prepared(policy))
        return target.ship(compressed, bench.realise(compressed)).time().ms

    assert ms(2) == ms(5) == ms(8) == 1.0
    assert ms(5, keep=0.5) == ms(3, keep=0.5) == 2.0
    assert ms(5, activations=32) == ms(16) == ms(32, activations=32) == 3.0
    assert len(timed) == 3


def make_table(bench: Workbench, **changes: Any) -> LatencyTable:
    """A table of another machine: a layer takes a millisecond per row and column, and half that with integers."""
    entries = {x.name: (Entry(*x.shape[:2], float(x.shape[0] * x.shape[1])),) for x in bench.graph.layers}
    where: dict[str, Any] = {
        "fingerprint": bench.graph.fingerprint,
        "runtime": "onnxruntime",
        "runtime_version": version(),
        "device": "board",
    }
    return LatencyTable(
        Deployment(**(where | changes)),
        5000.0,
        (Precision(32, 0.0, 1.0, entries), Precision(8, 0.0, 0.5, entries)),
    )


def test_table_of_another_machine_stands_for_timing(
    bench: Workbench, carried: OnnxTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carried, "meter", None)
    policy = Policy({layer.name: LayerChoice(4) for layer in bench.graph.layers}, activations=8)
    compressed = compress(bench, carried.prepared(policy))
    found = carried.ship(compressed, bench.realise(compressed)).time()
    expected = 0.5 * sum(x.shape[0] * x.shape[1] for x in bench.graph.layers)
    assert found == Latency(expected, expected, expected, 0)
    assert carried.predicted_ms(policy) == carried.bound(policy).predicted_ms == expected
    assert carried.predicted_ms(replace(policy, activations=32)) == 2 * expected
    assert carried.about()["device"] == "board"


def test_dense_latency_is_the_tables(carried: OnnxTarget) -> None:
    assert carried.dense_ms == 5000.0


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export takes long: what is wrong without one is said before it."""
    monkeypatch.setattr("autocompress.target.Exporter", None)


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fingerprint": "0"}, "another model"),
        ({"runtime_version": "0.1"}, "0.1"),
        ({"threads": 4}, "4 threads"),
        ({"batch": 2}, "batch size of 2"),
    ],
)
def test_table_of_another_deployment_is_refused(bench: Workbench, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LatencyError, match=words):
        OnnxTarget(bench, Place(table=make_table(bench, **changes)))


@pytest.mark.usefixtures("no_export")
def test_batch_that_the_task_does_not_have_is_refused(bench: Workbench) -> None:
    with pytest.raises(LatencyError, match=r"--batch 9.*8"):
        OnnxTarget(bench, Place(batch=9), dense_ms=1.0)


def test_place_is_written_down(target: OnnxTarget) -> None:
    about = target.about()
    assert about == {
        "latency_runtime": f"onnxruntime {version()}",
        "device": device(),
        "threads": 2,
        "batch": 3,
    }


def test_evaluator_measures_what_ships(tmp_path: Path) -> None:
    evaluator = Evaluator(make_task(), format="onnx", dense_ms=1.0)
    policy = Policy({"hidden": LayerChoice(4, 0.5)}, activations=8)
    found = evaluator(policy, keep=tmp_path / "m.onnx")
    assert found.status == "ok", found.error
    measured = found.measurement
    assert measured is not None
    assert measured.bytes == (tmp_path / "m.onnx").stat().st_size <= evaluator.bound(policy).bytes
    again = evaluator.reload(tmp_path / "m.onnx")
    assert again.quality == measured.quality == evaluator.task.score(again.model, "val")
    assert measured.latency_ms > 0
    assert math.isnan(measured.predicted_ms)
