"""Quality, latency and size of one model, against the task's own numbers and hand-made ones."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress import ClassificationTask, Policy, RegressionTask
from autocompress.artifact.layout import file_bytes
from autocompress.measure import latency as latency_module
from autocompress.measure import quality as quality_module
from autocompress.measure.latency import SAMPLES, WARM_UP, LatencyMeter
from autocompress.measure.quality import QualityMeter
from autocompress.measure.size import Size
from autocompress.trace import trace


def classifier(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3)).eval()


def classification(model: nn.Module, count: int = 20) -> ClassificationTask:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(count, 5, generator=generator), torch.randint(0, 3, (count,), generator=generator)
    return ClassificationTask(model, data, data, data, batch_size=8)


class Wrapped(nn.Module):
    """A classifier that hands its logits over in another form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.net, self.form = classifier(), form

    def forward(self, x: Tensor) -> Any:
        logits = self.net(x)
        if self.form == "dict":
            return {"logits": logits, "inputs": x}
        return (logits, {"hidden": x}, None, 3) if self.form == "tuple" else logits


def changed(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return model


# --- quality --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_dense_model_has_no_loss_and_its_own_score(form: str) -> None:
    task = classification(Wrapped(form))
    meter = QualityMeter(task, task.model())
    found = meter(task.model())
    assert found.loss == pytest.approx(0.0, abs=1e-7)
    assert found.score == meter.dense == task.score(task.model(), "val")


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_loss_is_the_mean_divergence_of_the_batches(form: str) -> None:
    task = classification(Wrapped(form))
    student = changed(task.model())
    found = QualityMeter(task, task.model())(student)
    inputs = task.split("val")[0]
    with torch.no_grad():
        p, q = (m.net(inputs).double().softmax(dim=1).numpy() for m in (task.model(), student))
    divergence = (p * np.log(p / q)).sum(axis=1)
    assert found.loss == pytest.approx(np.mean([divergence[i : i + 8].mean() for i in (0, 8, 16)]), rel=1e-4)
    assert found.loss > 1e-3
    assert found.score == task.score(student, "val")


def test_task_without_a_divergence_is_measured_by_relative_squared_error() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(12, 4)
    model = nn.Sequential(nn.Linear(4, 2))
    task = RegressionTask(model, (inputs, inputs[:, :2]), (inputs, inputs[:, :2]), (inputs, inputs[:, :2]))
    student = changed(model)
    found = QualityMeter(task, model.eval())(student)
    with torch.no_grad():
        a, b = student(inputs).numpy().astype(float), model(inputs).numpy().astype(float)
    assert found.loss == pytest.approx(((a - b) ** 2).mean() / (b**2).mean(), rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_numbers_raise(value: float) -> None:
    task = classification(classifier())
    broken = task.model()
    with torch.no_grad():
        broken[2].bias[0] = value
    with pytest.raises(FloatingPointError, match="divergence"):
        QualityMeter(task, task.model())(broken)


def test_score_that_is_not_a_number_raises() -> None:
    task = classification(classifier())
    meter = QualityMeter(task, task.model())
    task.score = lambda model, split: math.nan  # type: ignore[method-assign]  # noqa: ARG005
    with pytest.raises(FloatingPointError, match="accuracy is nan"):
        meter(task.model())


def test_hooks_are_removed_also_after_an_error() -> None:
    class Broken(nn.Module):
        def forward(self, *_: Tensor) -> Tensor:
            raise ValueError("broken")

    task = classification(classifier())
    dense, student, broken = task.model(), task.model(), Broken()
    meter = QualityMeter(task, dense)
    meter(student)
    with pytest.raises(ValueError, match="broken"):
        meter(broken)
    with pytest.raises(ValueError, match="broken"):
        QualityMeter(task, broken)
    assert not any(model._forward_hooks for model in (dense, student, broken))


def test_model_that_reuses_its_output_memory_is_compared_with_what_it_gave() -> None:
    class Reusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = classifier()
            self.memory = torch.zeros(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.memory[: len(x)] = self.net(x).detach()
            return self.memory[: len(x)]

    task = classification(Reusing(), 16)
    task.outputs(task.model(), task.batches("val"))
    assert QualityMeter(task, task.model())(task.model()).loss == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("batches", [1, 1.5, 2, 2.5, 3])
def test_outputs_beyond_the_memory_limit_are_left_out_of_the_comparison(
    batches: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = classification(classifier(), 20)  # batches of 8, 8 and 4
    monkeypatch.setattr(quality_module, "MEMORY", int(batches * 8 * 3 * 4))
    meter = QualityMeter(task, task.model())
    assert meter(task.model()).loss == pytest.approx(0.0, abs=1e-7)
    assert meter(changed(task.model())).loss > 1e-3


# --- latency --------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_equal_architectures_get_the_same_number() -> None:
    calls = 0

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return x

    meter = LatencyMeter(classifier(), torch.randn(4, 5))
    first = meter(Counting(), ("a", 1))
    assert calls == WARM_UP + SAMPLES
    assert meter(Counting(), ("a", 1)) is first
    assert calls == WARM_UP + SAMPLES
    meter(Counting(), ("b", 1))
    meter(Counting())
    meter(Counting())
    assert calls == 4 * (WARM_UP + SAMPLES)


def test_quartiles_are_in_order_and_in_units_of_the_dense_model() -> None:
    found = LatencyMeter(classifier(), torch.randn(4, 5), dense_ms=1000.0)(classifier())
    assert 0 < found.low <= found.ms <= found.high
    assert 100.0 < found.ms < 10_000.0
    assert found.samples == SAMPLES


def test_runs_in_which_the_clock_stands_still_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = itertools.cycle([0, 1_000_000, 2_000_000, 1_000_000, 0, 0])  # own and reference, three rounds
    ticks = itertools.accumulate(step for pair in zip(steps, itertools.repeat(0), strict=False) for step in pair[::-1])
    monkeypatch.setattr(latency_module.time, "thread_time_ns", lambda: next(ticks))
    found = LatencyMeter(classifier(), torch.randn(4, 5), dense_ms=1.0)(classifier())
    assert (found.low, found.ms, found.high) == (2.0, 2.0, 2.0)
    assert found.samples == SAMPLES // 3


def test_reference_of_an_earlier_run_is_kept() -> None:
    assert LatencyMeter(classifier(), torch.randn(4, 5), dense_ms=3.5).dense == 3.5
    assert LatencyMeter(classifier(), torch.randn(4, 5)).dense > 0


def test_wider_model_is_slower() -> None:
    def mlp(width: int) -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(3))).eval()

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(1024)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.repeat(1, 4))

    meter = LatencyMeter(mlp(256), torch.randn(2, 256))
    assert meter(Padded()).ms > 2 * meter(mlp(256)).ms


@pytest.mark.usefixtures("two_threads")
def test_one_thread_while_timing_and_the_old_number_after() -> None:
    seen = set()

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.add((torch.get_num_threads(), torch.is_grad_enabled(), len(x)))
            return x

    class Broken(nn.Module):
        def forward(self, *_: Tensor) -> Tensor:
            raise ValueError("broken")

    meter = LatencyMeter(classifier(), torch.randn(4, 5))
    meter(Watching())
    assert seen == {(1, False, 1)}
    with pytest.raises(ValueError, match="broken"):
        meter(Broken())
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("form", [dict, tuple])
def test_models_with_several_inputs_are_timed_on_one_example(form: type) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            assert len(x) == len(y) == 1
            return x + y

    x, y = torch.randn(4, 5), torch.randn(4, 5)
    inputs = {"x": x, "y": y} if form is dict else (x, y)
    assert LatencyMeter(Two(), inputs)(Two()).ms > 0


# --- size -----------------------------------------------------------------------------------------------


def test_size_is_the_length_of_the_file_with_its_header() -> None:
    size = Size(trace(classifier(), torch.randn(4, 5)), "task", "accuracy")
    header = size.header(Policy())
    assert size(Policy()) == file_bytes(header) == 36 + len(header.encode()) + 4 * (5 * 8 + 8 * 3) + (2 + 16) + (2 + 6)
    assert (header.task, header.metric, header.policy) == ("task", "accuracy", Policy())
    assert set(header.versions) == {"autocompress", "torch"}
