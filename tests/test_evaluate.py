"""One policy in, one measurement out, for tasks of every form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autocompress
from autocompress import (
    ArtifactError,
    Batch,
    ClassificationTask,
    Evaluator,
    LayerChoice,
    Policy,
    PolicyError,
    Recovery,
    RegressionTask,
    TaskError,
)
from autocompress.errors import RunError
from autocompress.task import Task, call, tensors

SMALL = LayerChoice(4, 0.5)


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


def images(count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 6, 6, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def classification(model: nn.Module | None = None) -> ClassificationTask:
    data = images()
    return ClassificationTask(model or convolutional(), data, data, data, name="small", batch_size=8)


class TwoInputs(nn.Module):
    """Named inputs, nested and named outputs, and a number beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.dense = nn.Linear(3, 8)
        self.heads = nn.ModuleDict({"mean": nn.Linear(8, 1), "kind": nn.Linear(8, 4)})

    def forward(self, *, tokens: Tensor, extra: Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.embed(tokens).mean(dim=1) + self.dense(extra))
        return {"outputs": {name: head(hidden) for name, head in self.heads.items()}, "steps": 1}


class CustomTask:
    """Only what the contract asks for: no class of the package, no `divergence`, a metric that falls."""

    name, metric, direction = "custom", "error", "min"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.state = TwoInputs().state_dict()
        self.inputs = {"tokens": torch.randint(0, 20, (24, 5)), "extra": torch.randn(24, 3)}
        self.target = {"mean": torch.randn(24, 1), "kind": torch.randint(0, 4, (24,))}

    def model(self) -> nn.Module:
        model = TwoInputs()
        model.load_state_dict(self.state)
        return model.eval()

    def batches(self, split: str, seed: int) -> Iterator[Batch]:
        count = 24
        order = torch.arange(count)
        if split == "train":
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        for index in order.split(8):
            yield Batch({k: v[index] for k, v in self.inputs.items()}, {k: v[index] for k, v in self.target.items()})

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        found = outputs["outputs"]
        kind = F.cross_entropy(found["kind"], batch.target["kind"])
        return F.mse_loss(found["mean"], batch.target["mean"]) + kind

    def score(self, model: nn.Module, split: str) -> float:
        with torch.no_grad():
            losses = [float(self.loss(call(model, batch.inputs), batch)) for batch in self.batches(split, 0)]
        return sum(losses) / len(losses)


def regression() -> RegressionTask:
    torch.manual_seed(0)
    inputs = torch.randn(32, 6)
    target = inputs @ torch.randn(6, 1)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), target).backward()
        optimizer.step()
    data = inputs, target[:, 0]
    return RegressionTask(model, data, data, data, name="line", batch_size=8)


TASKS = {"classification": classification, "custom": CustomTask, "regression": regression}


def small_policy(evaluator: Evaluator, epochs: int = 0) -> Policy:
    return Policy(
        {layer.name: SMALL for layer in evaluator.graph.layers},
        {group.name: 0.5 for group in evaluator.graph.prunable},
        recovery=Recovery(epochs=epochs, lr=0.001),
    )


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("kind", TASKS)
def test_every_form_of_task_is_compressed_measured_written_and_read(kind: str, epochs: int, tmp_path: Path) -> None:
    task = TASKS[kind]()
    assert isinstance(task, Task)
    evaluator = Evaluator(task)
    policy = small_policy(evaluator, epochs)
    found = evaluator(policy, 2, tmp_path / "m.acz")
    assert (found.status, found.error, found.rung, found.policy) == ("ok", "", 2, policy)
    assert found.measurement is not None
    measured = found.measurement
    assert measured.bytes == (tmp_path / "m.acz").stat().st_size <= evaluator.bound(policy).bytes
    if epochs == 0:  # training changes codes, and so their length
        assert measured.bytes == evaluator.predict(policy).bytes
    assert measured.macs == evaluator.predict(policy).macs < evaluator.dense.macs
    assert measured.latency_ms > 0
    assert measured.loss > 0
    artifact = evaluator.reload(tmp_path / "m.acz")
    model = artifact.model
    assert artifact.quality == measured.quality == task.score(model, "val")
    loaded = autocompress.load(tmp_path / "m.acz", task)
    batch = next(iter(task.batches("val", 0)))
    with torch.no_grad():
        ours, theirs = (tensors(call(m, batch.inputs)) for m in (model, loaded))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", TASKS)
def test_policy_that_changes_nothing_keeps_the_quality(kind: str) -> None:
    evaluator = Evaluator(TASKS[kind](), dense_ms=1.0)
    found = evaluator(Policy(recovery=Recovery(reestimate_bn=False))).measurement
    assert found is not None
    assert found.quality == pytest.approx(evaluator.dense.quality, rel=1e-3)
    assert found.loss < 1e-4
    assert found.macs == evaluator.dense.macs


def test_dense_measurement_is_four_bytes_a_value_and_the_tasks_score() -> None:
    task = classification()
    dense = Evaluator(task, dense_ms=2.0).dense
    assert dense.bytes == 4 * sum(value.numel() for value in task.model().state_dict().values())
    assert dense.macs == 8 * 9 * 16 + 8 * 8 * 9 * 4 + 32 * 3
    assert (dense.quality, dense.loss, dense.latency_ms) == (task.score(task.model(), "val"), 0.0, 2.0)


def test_measurement_does_not_depend_on_what_was_evaluated_before() -> None:
    evaluator = Evaluator(classification(), dense_ms=1.0)
    policies = [small_policy(evaluator), Policy(), small_policy(evaluator, 1), Policy(recovery=Recovery(fold_bn=False))]

    def measure(evaluator: Evaluator, policy: Policy) -> tuple[float, float]:
        found = evaluator(policy).measurement
        assert found is not None
        return found.quality, found.loss

    fresh = [measure(Evaluator(classification(), dense_ms=1.0), policy) for policy in policies]
    assert [measure(evaluator, policy) for policy in policies] == fresh
    assert [measure(evaluator, policy) for policy in reversed(policies)] == fresh[::-1]


def test_depthwise_layer_comes_back_after_a_policy_left_it_one_channel() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    evaluator = Evaluator(classification(model), dense_ms=1.0)
    groups = [group.name for group in evaluator.graph.prunable]
    assert groups
    one_channel, whole = Policy(keep=dict.fromkeys(groups, 0.01)), Policy()
    for policy in (whole, one_channel, whole):
        assert evaluator(policy).error == ""


def test_model_that_is_a_single_layer_is_compressed() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(8, 5, generator=generator), torch.arange(8) % 3
    evaluator = Evaluator(ClassificationTask(nn.Linear(5, 3), data, data, data), dense_ms=1.0)
    assert evaluator(Policy()).error == ""


class ExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


@pytest.mark.parametrize(
    "last",
    [
        pytest.param(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 3)), id="weight-norm"),
        pytest.param(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(32, 3)), id="spectral-norm"),
        pytest.param(lambda: ExtraState(32, 3), id="extra-state"),
    ],
)
def test_layer_beyond_the_package_is_refused_at_once_or_carried_along(
    last: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = convolutional()
    model[6] = last()
    task = classification(model)
    try:
        evaluator = Evaluator(task, dense_ms=1.0)
    except TaskError:
        return
    assert evaluator(Policy(), 0, tmp_path / "m.acz").error == ""
    inputs = evaluator.bench.example.inputs
    with torch.no_grad():
        expected = evaluator.build(Policy())[1](inputs)
        assert torch.equal(autocompress.load(tmp_path / "m.acz", task)(inputs), expected)


# --- failures -------------------------------------------------------------------------------------------


class Unruly(ClassificationTask):
    """Does what the tests need it to do, once the evaluator is made."""

    armed = ""

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        if self.armed == "loss":
            raise ValueError("my loss is broken")
        return super().loss(outputs, batch) * (math.nan if self.armed == "nan loss" else 1.0)

    def score(self, model: nn.Module, split: Any) -> float:
        if self.armed == "score":
            raise MemoryError("out of memory")
        return math.nan if self.armed == "nan score" else super().score(model, split)


@pytest.mark.parametrize(
    ("armed", "words"),
    [
        ("loss", "ValueError: my loss is broken"),
        ("score", "MemoryError: out of memory"),
        ("nan loss", "FloatingPointError"),
        ("nan score", "FloatingPointError: accuracy is nan"),
    ],
)
def test_candidate_that_raises_is_failed_with_a_traceback_and_no_file(armed: str, words: str, tmp_path: Path) -> None:
    data = images()
    task = Unruly(convolutional(), data, data, data, batch_size=8)
    evaluator = Evaluator(task, seed=3, dense_ms=1.0)
    policy = small_policy(evaluator, epochs=1)
    task.armed = armed
    found = evaluator(policy, 1, tmp_path / "m.acz")
    assert (found.status, found.measurement, found.policy, found.seed, found.rung) == ("failed", None, policy, 3, 1)
    assert "Traceback" in found.error
    assert words in found.error
    assert list(tmp_path.iterdir()) == []
    task.armed = ""
    assert evaluator(policy).status == "ok"


def test_file_that_cannot_be_written_ends_the_search_and_is_not_the_candidates_fault(tmp_path: Path) -> None:
    evaluator = Evaluator(classification(), dense_ms=1.0)
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot write .*m\.acz.*continue with --resume"):
        evaluator(Policy(), 0, tmp_path / "folder" / "m.acz")


@pytest.mark.parametrize(
    "policy",
    [Policy({"conv": SMALL}), Policy(keep={"conv": 0.5}), Policy(keep={"6": 0.5})],
    ids=["layer", "group", "frozen"],
)
def test_policy_of_another_model_is_not_a_candidate(policy: Policy) -> None:
    evaluator = Evaluator(classification(), dense_ms=1.0)
    with pytest.raises(PolicyError):
        evaluator(policy)
    with pytest.raises(PolicyError):
        evaluator.predict(policy)


def test_interrupt_is_not_a_failed_candidate() -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    evaluator = Evaluator(classification(), dense_ms=1.0)
    with pytest.raises(KeyboardInterrupt):
        evaluator(small_policy(evaluator, epochs=1), progress=stop)


def test_progress_follows_recovery_to_its_end() -> None:
    seen: list[tuple[int, int]] = []
    evaluator = Evaluator(classification(), dense_ms=1.0)
    evaluator(small_policy(evaluator, epochs=2), progress=lambda step, total: seen.append((step, total)))
    assert seen[-1] == (6, 6)
    assert {total for _, total in seen} == {6}


def test_evaluator_does_not_change_the_tasks_model_or_its_own_teacher() -> None:
    task = classification()
    before = {name: value.clone() for name, value in task.model().state_dict().items()}
    evaluator = Evaluator(task, dense_ms=1.0)
    evaluator(small_policy(evaluator, epochs=1))
    for model in (task.model(), evaluator.bench.teacher):
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_file_of_another_task_is_refused(tmp_path: Path) -> None:
    evaluator = Evaluator(classification(), dense_ms=1.0)
    evaluator(Policy(), 0, tmp_path / "m.acz")
    with pytest.raises(ArtifactError):
        autocompress.load(tmp_path / "m.acz", CustomTask())


def test_files_differ_between_policies_only_by_what_the_policy_says(tmp_path: Path) -> None:
    evaluator = Evaluator(classification(), dense_ms=1.0)
    policy = small_policy(evaluator)
    evaluator(policy, 0, tmp_path / "a.acz")
    evaluator(replace(policy, criterion="l1"))
    evaluator(policy, 0, tmp_path / "b.acz")
    assert (tmp_path / "a.acz").read_bytes() == (tmp_path / "b.acz").read_bytes()


# --- screening, levels and losses -----------------------------------------------------------------------


def with_val(count: int, kind: type[ClassificationTask] = ClassificationTask) -> ClassificationTask:
    return kind(convolutional(), images(), images(count), images(), name="small", batch_size=128)


def test_large_val_is_screened_on_request_and_only_then() -> None:
    evaluator = Evaluator(with_val(2000), dense_ms=1.0)
    policy = small_policy(evaluator)
    part, whole = evaluator(policy, screen=True), evaluator(policy)
    assert evaluator.screens
    assert (part.screened, whole.screened) == (True, False)
    inputs, targets = evaluator.task.split("val")
    compressed, model = evaluator.build(policy)
    with torch.no_grad():
        right = (model(inputs).argmax(dim=1) == targets).double()
    assert compressed.policy == policy
    assert part.measurement is not None
    assert whole.measurement is not None
    assert part.measurement.quality == pytest.approx(float(right[:1024].mean()))
    assert whole.measurement.quality == pytest.approx(float(right.mean()))
    assert evaluator.loss(policy) == pytest.approx(part.measurement.loss) != whole.measurement.loss


def test_small_val_is_never_screened() -> None:
    evaluator = Evaluator(with_val(1200), dense_ms=1.0)
    policy = small_policy(evaluator)
    found = evaluator(policy, screen=True)
    assert not evaluator.screens
    assert not found.screened
    assert found.measurement is not None
    assert evaluator.loss(policy) == pytest.approx(found.measurement.loss)


def test_failure_remembers_whether_it_was_screened() -> None:
    task = with_val(2000, Unruly)
    evaluator = Evaluator(task, dense_ms=1.0)
    policy = small_policy(evaluator, epochs=1)
    task.armed = "loss"  # type: ignore[attr-defined]
    found = [evaluator(policy, screen=screen) for screen in (True, False)]
    assert [(e.status, e.screened) for e in found] == [("failed", True), ("failed", False)]


@pytest.mark.parametrize("solver", ["nearest", "database"])
def test_level_has_the_bytes_of_its_sections_and_the_error_that_its_solution_makes(solver: Any) -> None:
    evaluator = Evaluator(classification(), dense_ms=1.0)
    for layer in evaluator.graph.layers:
        choices = (LayerChoice(), LayerChoice(8), SMALL, LayerChoice(2, scheme="entropy"))
        levels = [evaluator.level(layer, choice, solver) for choice in choices]
        assert levels[0].error == pytest.approx(0.0, abs=1e-9)
        assert 0 < levels[1].error < levels[2].error < 1
        for level in levels:
            policy = Policy({layer.name: level.choice}, solver=solver)
            header = evaluator.target.header(evaluator.build(policy)[0])
            own = (layer.weight, layer.bias)
            assert sum(entry.nbytes for entry in header.entries if entry.name in own) == level.bytes


def test_dense_model_has_no_loss() -> None:
    evaluator = Evaluator(classification(), dense_ms=1.0)
    assert evaluator.loss(Policy(recovery=Recovery(fold_bn=False))) == pytest.approx(0.0, abs=1e-4)


# --- recovery training ----------------------------------------------------------------------------------


def weights_of(evaluator: Evaluator, policy: Policy, **more: Any) -> list[Tensor]:
    """What an evaluation leaves in the resident model."""
    assert evaluator(policy, 1, **more).status == "ok"
    (model,) = evaluator.bench._deployed.values()
    return [value.clone() for value in model.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


TRAINED = Policy({"0": SMALL}, recovery=Recovery(epochs=2, lr=0.1))


def test_an_evaluation_goes_on_with_a_training_that_was_interrupted(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def stop(step: int, total: int) -> None:
        if step == total - 1:
            raise Killed

    path = tmp_path / "training"
    evaluator = Evaluator(classification())
    whole = weights_of(evaluator, TRAINED)
    with pytest.raises(Killed):
        evaluator(TRAINED, 1, None, stop, checkpoint=path)
    heard: list[int] = []
    assert same(weights_of(evaluator, TRAINED, progress=lambda s, _: heard.append(s), checkpoint=path), whole)
    assert heard == [4, 5, 6]
    assert not path.exists()


def test_seeds_of_training_give_several_results_of_one_policy() -> None:
    evaluator = Evaluator(classification())
    own, other = weights_of(evaluator, TRAINED), weights_of(evaluator, TRAINED, seed=3)
    assert not same(own, other)
    assert same(weights_of(evaluator, TRAINED, seed=3), other)
    assert same(weights_of(evaluator, TRAINED), own)


def test_every_ingredient_of_recovery_works_on_a_task_of_any_form() -> None:
    recovery = Recovery(
        epochs=2,
        lr=0.01,
        decay="one-cycle",
        adjust_factor=0.5,
        adjust_patience=0,
        hint_weight=0.2,
        gradient="clip",
        scales="learned",
        ema=0.9,
    )
    evaluator = Evaluator(CustomTask())
    policy = Policy({layer.name: SMALL for layer in evaluator.graph.layers}, recovery=recovery)
    found = evaluator(policy, 1)
    assert found.status == "ok", found.error
    assert found.measurement is not None
    assert found.measurement.loss < evaluator(policy.without_recovery()).measurement.loss
