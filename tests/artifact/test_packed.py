"""What is predicted, scored, written and read back is one and the same model."""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autocompress
from autocompress import (
    ArtifactError,
    ClassificationTask,
    Evaluator,
    LayerChoice,
    Policy,
    Recovery,
    Space,
    TaskError,
    Workbench,
    compress,
    files,
    load_space,
)
from autocompress.artifact import layout, packed
from autocompress.measure.size import Size
from autocompress.policy import BITS
from autocompress.space import Categorical, Ordered
from autocompress.stored import Half, Quantised, round_to_half
from autocompress.tasks import digits


class Small(nn.Module):
    """A residual network on 6 x 6 images with a branch that cannot be pruned and one that can."""

    def __init__(self, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        y = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(y)) + x)
        return self.fc(x.mean(dim=(2, 3)))


def task_of(model: nn.Module, shape: tuple[int, ...] = (3, 6, 6), name: str = "small") -> ClassificationTask:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(16, *shape, generator=generator), torch.arange(16) % 4
    return ClassificationTask(model, data, data, data, name=name, batch_size=8)


def trained(width: int = 8) -> nn.Module:
    """Weights and statistics as after training: no two channels alike."""
    torch.manual_seed(0)
    model = Small(width)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def task() -> ClassificationTask:
    return task_of(trained())


@pytest.fixture(scope="module")
def evaluator(task: ClassificationTask) -> Evaluator:
    return Evaluator(task, dense_ms=1.0)


def random_policies(space: Space, count: int, seed: int = 0) -> Iterator[Policy]:
    draw = random.Random(seed)
    for _ in range(count):
        point: dict[str, Any] = {}
        for parameter in space.policy_parameters:
            if isinstance(parameter, Ordered):
                point[parameter.name] = draw.randrange(len(parameter.values))
            elif isinstance(parameter, Categorical):
                point[parameter.name] = draw.choice(parameter.values)
        yield space.decode(point)


def written(evaluator: Evaluator, policy: Policy) -> tuple[bytes, nn.Module]:
    compressed, model = evaluator.build(policy)
    return evaluator.pack(compressed, 0.5), model


def same_outputs(evaluator: Evaluator, content: bytes, model: nn.Module) -> bool:
    again = packed.build(packed.unpack(content), evaluator.task.model())
    inputs = evaluator.bench.example.inputs
    with torch.no_grad():
        return torch.equal(again(inputs), model(inputs))


# --- size and contents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "tiny", "mixed-precision", "prune-only", "structured"])
def test_predicted_length_is_the_files_and_reload_is_the_scored_model(evaluator: Evaluator, name: str) -> None:
    space = Space(load_space(name), evaluator.graph)
    for i, policy in enumerate(random_policies(space, 40)):
        content, model = written(evaluator, policy)
        assert len(content) == evaluator.predict(policy).bytes <= evaluator.bound(policy).bytes, policy
        if i % 4 == 0:
            assert same_outputs(evaluator, content, model), policy


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("reestimate", [True, False])
def test_every_width_and_batch_norm_handling_reloads_exactly(
    evaluator: Evaluator, reestimate: bool, fold: bool
) -> None:
    recovery = Recovery(reestimate_bn=reestimate, fold_bn=fold)
    names = [layer.name for layer in evaluator.graph.layers]
    for bits in BITS:
        for scheme in ("symmetric", "asymmetric"):
            policy = Policy({name: LayerChoice(bits, 0.6, scheme) for name in names}, recovery=recovery)
            content, model = written(evaluator, policy)
            assert len(content) == evaluator.predict(policy).bytes <= evaluator.bound(policy).bytes
            assert same_outputs(evaluator, content, model)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_length_is_predicted_without_building_and_below_the_bound(
    task: ClassificationTask, bits: int, sparsity: float
) -> None:
    evaluator = Evaluator(task, dense_ms=1.0)
    layers = {layer.name: LayerChoice(bits, sparsity) for layer in evaluator.graph.layers}
    half = {group.name: 0.5 for group in evaluator.graph.prunable}
    for policy in (Policy(layers), Policy(layers, half), Policy(layers, solver="database")):
        predicted, bound = evaluator.predict(policy), evaluator.bound(policy)
        content, model = written(evaluator, policy)
        assert same_outputs(evaluator, content, model)
        coded = [entry for entry in packed.unpack(content).header.entries if entry.coding == "entropy"]
        assert len(content) == predicted.bytes <= bound.bytes - layout.WORTHWHILE // 2 * len(coded)
        assert predicted.macs == bound.macs
        assert coded or sparsity < 0.9, "untrained weights are spread evenly"


def test_length_of_a_trained_model_is_predicted_from_its_parent_and_measured_exactly(
    evaluator: Evaluator, tmp_path: Path
) -> None:
    layers = {"conv1": LayerChoice(3, 0.6), "conv2": LayerChoice(1, 0.5), "fc": LayerChoice(4)}
    policy = Policy(layers, recovery=Recovery(epochs=2, lr=0.5))
    assert evaluator.predict(policy) == evaluator.predict(policy.without_recovery())
    found = evaluator(policy, keep=tmp_path / "m.acz")
    assert found.measurement is not None
    assert found.measurement.bytes == (tmp_path / "m.acz").stat().st_size != evaluator.predict(policy).bytes


def test_model_that_recovered_reloads_exactly(evaluator: Evaluator) -> None:
    layers = {"conv1": LayerChoice(3, 0.5, "asymmetric"), "conv2": LayerChoice(16, 0.9), "fc": LayerChoice(4)}
    policy = Policy(layers, {group.name: 0.5 for group in evaluator.graph.prunable}, recovery=Recovery(epochs=1))
    content, model = written(evaluator, policy)
    assert len(content) <= evaluator.bound(policy).bytes
    assert same_outputs(evaluator, content, model)


@pytest.mark.parametrize("bits", BITS)
def test_layer_is_written_in_its_shortest_coding(evaluator: Evaluator, bits: int) -> None:
    shape = (16, 8, 3, 3)
    count = prod(shape)
    codings: set[str] = set()
    for sparsity in (0.0, 0.02, 0.05, 0.1, 0.3, 0.5, 0.55, 0.9):
        policy = Policy({"conv1": LayerChoice(bits, sparsity)})
        kept = count - LayerChoice(bits, sparsity).zeros(count)
        compressed, _ = evaluator.build(policy)
        header = packed.unpack(evaluator.pack(compressed, 0.5)).header
        entry = next(entry for entry in header.entries if entry.name == "conv1.weight")
        plain = next(entry for entry in evaluator.target.size.header(policy).entries if entry.name == "conv1.weight")
        dense, masked = -(-count * bits // 8), -(-count // 8) + -(-kept * bits // 8)
        ternary = bits == 1 and kept < count
        assert plain.coding == ("bitmask" if masked < dense or ternary else "dense")
        assert plain.count == (count if plain.coding == "dense" else kept)
        _, coded = compressed.codings().get("conv1.weight", (bits, math.inf))
        if coded + layout.WORTHWHILE <= (dense if plain.coding == "dense" else masked):
            assert (entry.coding, entry.count, entry.coded) == ("entropy", count, coded)
        else:
            assert entry == plain
        codings |= {plain.coding, entry.coding}
    assert codings == {"dense", "bitmask"} | ({"entropy"} if bits <= 8 else set())


def test_tied_weights_are_stored_once_and_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 8)
            self.head = nn.Linear(8, 16, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x).mean(dim=1))

    data = torch.arange(48).reshape(8, 6) % 16, torch.arange(8) % 4
    evaluator = Evaluator(ClassificationTask(Tied(), data, data, data), dense_ms=1.0)
    content, model = written(evaluator, Policy({"embed": LayerChoice(4, 0.5)}))
    artifact = packed.unpack(content)
    assert list(artifact.tensors) == ["embed.weight"]
    again = packed.build(artifact, evaluator.task.model())
    assert again.head.weight is again.embed.weight
    assert torch.equal(again(data[0]), model(data[0]))


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(torch.arange(5), id="int64"),
        pytest.param(torch.tensor([True, False]), id="bool"),
        pytest.param(torch.zeros(0, 3), id="empty-float"),
        pytest.param(torch.zeros(0, dtype=torch.int64), id="empty-int64"),
        pytest.param(torch.tensor(0.1), id="single"),
        pytest.param(torch.randn(3).double(), id="float64"),
        pytest.param(torch.randn(3).bfloat16(), id="bfloat16"),
        pytest.param(torch.tensor([0.99999, 2.0**-39]), id="largest-rounds-up-to-a-power-of-two"),
    ],
)
def test_every_buffer_survives_as_the_scored_model_had_it(extra: Tensor) -> None:
    model = trained()
    model.register_buffer("extra", extra)
    evaluator = Evaluator(task_of(model), dense_ms=1.0)
    content, scored = written(evaluator, Policy())
    assert len(content) == evaluator.predict(Policy()).bytes
    again = packed.build(packed.unpack(content), evaluator.task.model())
    assert again.extra.dtype == extra.dtype
    assert torch.equal(again.extra, scored.extra)


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(torch.ones(3, dtype=torch.uint16), id="uint16"),
        pytest.param(torch.ones(3, dtype=torch.complex64), id="complex64"),
        pytest.param(torch.tensor([0.0, -torch.inf]), id="attention-mask-of-infinity"),
        pytest.param(torch.tensor([0.0, torch.finfo(torch.float32).min]), id="attention-mask-of-the-least-float"),
    ],
)
def test_buffer_that_halves_cannot_hold_is_refused_at_once_or_survives(extra: Tensor) -> None:
    model = trained()
    model.register_buffer("extra", extra)
    try:
        evaluator = Evaluator(task_of(model), dense_ms=1.0)
    except TaskError:
        return
    content, _ = written(evaluator, Policy())
    assert len(content) == evaluator.predict(Policy()).bytes
    again = packed.build(packed.unpack(content), evaluator.task.model())
    torch.testing.assert_close(again.extra, extra, rtol=2**-11, atol=0)


def test_batch_norm_registered_under_two_names_reloads() -> None:
    class Aliased(Small):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(self.stem, self.bn)

    evaluator = Evaluator(task_of(Aliased()), dense_ms=1.0)
    content, model = written(evaluator, Policy())
    assert same_outputs(evaluator, content, model)


@pytest.mark.parametrize("values", [[0.99999, 2.0**-39], [1e-30, 3e-38], [1.0, -0.5], [0.0, 0.0], [6e4, 7e-7]])
def test_rounding_to_the_files_halves_twice_changes_nothing(values: list[float]) -> None:
    once = round_to_half(torch.tensor(values))
    assert torch.equal(round_to_half(once), once)


# --- loading --------------------------------------------------------------------------------------------


def test_load_rebuilds_the_pruned_architecture(task: ClassificationTask, evaluator: Evaluator, tmp_path: Path) -> None:
    policy = Policy(keep={group.name: 0.5 for group in evaluator.graph.prunable})
    content, scored = written(evaluator, policy)
    files.write(tmp_path / "m.acz", content)
    model = autocompress.load(tmp_path / "m.acz", task)
    dense = task.model()
    assert policy.keep
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters()) / 1.9
    assert (model.conv1.in_channels, model.conv1.out_channels) == tuple(model.conv1.weight.shape[1::-1])
    assert isinstance(model.bn1, nn.Identity)
    inputs = evaluator.bench.example.inputs
    assert torch.equal(model(inputs), scored(inputs))
    assert torch.equal(dense(inputs), task.model()(inputs)), "the task's own model was changed"


def test_loaded_model_shares_nothing_with_another(
    task: ClassificationTask, evaluator: Evaluator, tmp_path: Path
) -> None:
    files.write(tmp_path / "m.acz", written(evaluator, Policy())[0])
    a, b = (autocompress.load(str(tmp_path / "m.acz"), task) for _ in range(2))
    with torch.no_grad():
        for parameter in a.parameters():
            parameter.zero_()
    assert bool((b.fc.weight != 0).any())


def test_digits_loads_by_name_without_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr(digits, "_train", refuse)
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    bench = Workbench(task_of(digits.architecture(), (1, 8, 8), name="digits"))
    policy = Policy(keep={group.name: 0.25 for group in bench.graph.prunable})
    compressed = compress(bench, policy)
    header = Size(bench.graph, "digits", "accuracy").header(policy)
    files.write(tmp_path / "digits.acz", packed.pack(header, compressed.tensors, 0.5, compressed.policy.key()))
    inputs = bench.example.inputs
    assert torch.equal(autocompress.load(tmp_path / "digits.acz")(inputs), bench.realise(compressed)(inputs))
    assert not (tmp_path / "cache").exists()


def test_artifact_of_another_task_is_refused(evaluator: Evaluator, tmp_path: Path) -> None:
    files.write(tmp_path / "m.acz", written(evaluator, Policy())[0])
    with pytest.raises(ArtifactError, match="'small'"):
        autocompress.load(tmp_path / "m.acz", task_of(nn.Sequential(nn.Conv2d(3, 4, 3)), name="other"))
    with pytest.raises(ArtifactError, match=r"do not belong together"):
        autocompress.load(tmp_path / "m.acz", task_of(Small(width=4), name="narrow"))
    with pytest.raises(ArtifactError, match="pass that task"):
        autocompress.load(tmp_path / "m.acz")


@pytest.mark.parametrize("name", ["absent.acz", "."])
def test_file_that_cannot_be_opened_is_an_artifact_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="cannot read"):
        autocompress.load(tmp_path / name)


# --- writing --------------------------------------------------------------------------------------------


def test_write_makes_folders_and_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "m.acz"
    assert files.write(path, b"old one") == 7
    assert files.write(path, b"new") == 3
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["m.acz"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "m.acz"
    files.write(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="No space"):
        files.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.acz"]


def test_section_is_as_long_as_its_entry_says() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    zero = torch.tensor([1, 2], dtype=torch.uint8)
    codes = torch.where(mask, 3, zero[:, None]).to(torch.uint8)
    for bits in range(2, 9):
        stored = Quantised(codes, torch.ones(2), zero, bits, symmetric=False, mask=mask).with_length()
        for entry in (
            layout.Entry("w", "quantised", (2, 3), bits, "dense", 6, symmetric=False),
            layout.Entry("w", "quantised", (2, 3), bits, "bitmask", 3, symmetric=False),
            layout.Entry("w", "quantised", (2, 3), bits, "entropy", 6, symmetric=False, coded=stored.coded or 0),
        ):
            section = packed.write_section(entry, stored)
            assert len(section) == entry.nbytes
            again = packed.read_section(entry, memoryview(section))
            assert torch.equal(again.dense(), stored.dense())
    half = Half(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([True, False, True]))
    assert len(packed.write_section(layout.Entry("w", "half", (3,), 16, "bitmask", 2), half)) == 2 + 1 + 4


# --- nothing is executed --------------------------------------------------------------------------------


def test_no_pickle_is_needed_to_write_and_load(
    task: ClassificationTask, evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("pickle.loads", "pickle.load", "pickle.dumps", "torch.load", "torch.save"):
        monkeypatch.setattr(name, refuse)
    files.write(tmp_path / "m.acz", written(evaluator, Policy())[0])
    assert isinstance(autocompress.load(tmp_path / "m.acz", task), Small)


@pytest.mark.parametrize(
    "module", ["artifact/layout.py", "artifact/packed.py", "stored.py", "surgery.py", "evaluate.py", "policy.py"]
)
def test_sources_do_not_mention_pickle(module: str) -> None:
    source = (Path(autocompress.__file__).parent / module).read_text()
    assert not re.search(r"pickle|torch\.load|torch\.save|(?<![.\w])(eval|exec)\(|marshal|shelve", source)
