from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn

from autocompress.engine.distill import Features, Teacher, hint_loss, in_single_precision, recovery_loss
from autocompress.engine.precision import Precision
from autocompress.policy import Recovery
from autocompress.task import Batch, divergence, soft_target_divergence, squared_error_divergence
from autocompress.views import changed

BATCH = Batch(torch.zeros(2, 2), torch.zeros(2))


def logits(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def task_of(loss: float, distance: float) -> Any:
    """A task whose loss and divergence are the given numbers; the temperature is written down."""
    heard: list[float] = []

    def diverge(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        assert outputs is not teacher
        heard.append(temperature)
        return torch.tensor(distance)

    def lose(outputs: Tensor, batch: Batch) -> Tensor:
        assert batch is BATCH
        return torch.tensor(loss) + 0 * outputs.sum()

    return SimpleNamespace(loss=lose, divergence=diverge, heard=heard)


# --- soft targets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3, 4)])
def test_soft_targets_are_scipys_relative_entropy_times_squared_temperature(
    temperature: float, shape: tuple[int, ...]
) -> None:
    student, teacher = logits(0, shape), logits(1, shape)
    p, q = (scipy.special.softmax(x.double().numpy() / temperature, axis=1) for x in (teacher, student))
    expected = scipy.stats.entropy(p, q, axis=1).mean() * temperature**2
    assert float(soft_target_divergence(student, teacher, temperature)) == pytest.approx(expected, rel=2e-5)


def test_equal_logits_diverge_by_nothing() -> None:
    assert float(soft_target_divergence(logits(0, (4, 3)), logits(0, (4, 3)) + 7.0, 2.0)) == pytest.approx(0, abs=1e-6)


def test_a_task_without_its_own_divergence_gets_the_relative_squared_error() -> None:
    student, teacher = (logits(0, (4, 3)), logits(1, (4, 2))), (logits(2, (4, 3)), logits(3, (4, 2)))
    shares = [
        np.square(a.numpy() - b.numpy()).mean() / np.square(b.numpy()).mean()
        for a, b in zip(student, teacher, strict=True)
    ]
    task: Any = SimpleNamespace()
    assert float(divergence(task, student, teacher, 3.0)) == pytest.approx(np.mean(shares), rel=1e-5)
    assert float(squared_error_divergence(teacher, teacher)) == 0.0


# --- hints ----------------------------------------------------------------------------------------------


def test_hints_average_the_relative_squared_distance_over_layers() -> None:
    student = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[0.0, 0.0]])}
    teacher = {"a": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([[5.0, 1.0]])}
    assert float(hint_loss(student, teacher, {})) == pytest.approx(((4 + 4) / 25 + 1) / 2)


def test_a_pruned_layer_is_compared_with_the_channels_it_kept() -> None:
    teacher = {"a": logits(0, (2, 4, 3, 3))}
    student = {"a": teacher["a"][:, [1, 3]] + 0.5}
    exact = teacher["a"].numpy()[:, [1, 3]]
    found = hint_loss(student, teacher, {"a": torch.tensor([1, 3])})
    assert float(found) == pytest.approx(0.25 * exact.size / np.square(exact).sum(), rel=1e-5)


def test_hints_pull_only_the_student() -> None:
    student, teacher = torch.ones(1, 2, requires_grad=True), torch.full((1, 2), 3.0, requires_grad=True)
    hint_loss({"a": student}, {"a": teacher}, {}).backward()
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), [[2 * -2 / 18] * 2], rtol=1e-6)
    assert teacher.grad is None


def test_a_silent_teacher_layer_gives_a_finite_hint() -> None:
    assert torch.isfinite(hint_loss({"a": torch.zeros(1, 2)}, {"a": torch.zeros(1, 2)}, {}))


# --- the mixture ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("hint_weight", [0.0, 0.5, 3.0])
def test_the_loss_mixes_task_teacher_and_hint(share: float, hint_weight: float) -> None:
    task = task_of(loss=2.0, distance=10.0)
    recovery = Recovery(distill_weight=share, temperature=6.0, hint_weight=hint_weight)
    found = recovery_loss(task, recovery, torch.zeros(2), torch.ones(2), BATCH, torch.tensor(7.0))
    assert float(found) == pytest.approx((1 - share) * 2 + share * 10 + hint_weight * 7)
    assert task.heard == ([6.0] if share > 0 else [])


def test_no_hint_adds_nothing() -> None:
    recovery = Recovery(distill_weight=0.5, hint_weight=100.0)
    found = recovery_loss(task_of(2.0, 10.0), recovery, torch.zeros(2), torch.ones(2), BATCH, None)
    assert float(found) == pytest.approx(6.0)


# --- recording ------------------------------------------------------------------------------------------


def test_features_are_the_outputs_of_the_named_modules() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    inputs = logits(0, (5, 3))
    with Features(model, ("0", "2")) as features:
        outputs = model(inputs)
    assert set(features.values) == {"0", "2"}
    assert torch.equal(features.values["0"], model[0](inputs))
    assert features.values["2"] is outputs


def test_hooks_are_gone_after_the_context_even_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with Features(model, ("0",)):
        assert len(model[0]._forward_hooks) == 1
    assert not model[0]._forward_hooks
    with pytest.raises(ZeroDivisionError), Features(model, ("0",)):
        raise ZeroDivisionError
    assert not model[0]._forward_hooks


# --- the teacher's memory -------------------------------------------------------------------------------

PLAIN, HALF = Precision(), Precision(autocast=True)


class Counted(nn.Module):
    """Answers in a structure of the test's choice and counts how often it runs; its output's memory is used again."""

    def __init__(self, structure: Callable[[Tensor], Any] = lambda t: t) -> None:
        super().__init__()
        self.inner, self.structure, self.runs = nn.Linear(3, 2), structure, 0
        self.memory = torch.empty(0)

    def forward(self, x: Tensor, flag: Any = None) -> Any:  # noqa: ARG002
        self.runs += 1
        self.memory = torch.zeros(len(x), 2) if len(self.memory) != len(x) else self.memory
        return self.structure(self.memory.copy_(self.inner(x)))


class Answer(OrderedDict[str, Any]):
    """A mapping with attributes, as the outputs of language models are."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Record:
    value: Tensor
    name: str = "n"


STRUCTURES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda t: t,
    "dict": lambda t: {"a": t, "b": [t + 1, "text"]},
    "mapping": lambda t: Answer(logits=t),
    "named tuple": lambda t: Pair(t, t + 1),
    "list": lambda t: [t, (t + 1, None)],
    "dataclass": lambda t: Record(t),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_answer_that_is_remembered_is_the_one_that_was_given(structure: str) -> None:
    model = Counted(STRUCTURES[structure])
    teacher, inputs = Teacher(model), [logits(i, (4, 3)) for i in range(3)]
    for x in inputs:
        teacher(x, PLAIN)
    for x in inputs:
        said, meant = teacher(x.clone(), PLAIN), STRUCTURES[structure](model.inner(x))
        assert type(said) is type(meant)
        assert repr(said) == repr(changed(meant, lambda t: t.detach()))
    assert model.runs == 3


def test_a_mapping_keeps_its_attributes_in_single_precision() -> None:
    said = in_single_precision(Answer(logits=torch.ones(2).bfloat16(), count=torch.arange(2)))
    assert said.logits.dtype == torch.float32
    assert said["count"].dtype == torch.int64


def test_other_content_types_shapes_and_names_are_asked_for_anew() -> None:
    model = Counted()
    teacher, x = Teacher(model), torch.arange(12.0).reshape(4, 3)
    different = [x, x.reshape(2, 6)[:, :3], x + 1, (x,), (x, 1), (x, 2), (x, "1"), {"x": x}, {"x": x, "flag": x}]
    for inputs in different:
        teacher(inputs, PLAIN)
    assert model.runs == len(different)
    teacher(x, HALF)
    assert model.runs == len(different) + 1
    for inputs in different:
        teacher(inputs, PLAIN)
    assert model.runs == len(different) + 1


def test_inputs_that_cannot_be_compared_are_never_remembered() -> None:
    model = Counted()
    teacher = Teacher(model)
    for _ in range(2):
        teacher((torch.ones(1, 3), object()), PLAIN)
    assert model.runs == 2


def test_hooks_see_the_model_run_even_when_it_has_answered_before() -> None:
    model = Counted()
    teacher = Teacher(model)
    for _ in range(2):
        teacher(torch.ones(1, 3), PLAIN, remember=False)
    assert model.runs == 2


def test_a_quicker_model_answers_unless_somebody_looks_inside() -> None:
    asked: list[str] = []

    def named(name: str, value: float) -> nn.Module:
        class Said(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                asked.append(name)
                return x + value

        return Said()

    module = nn.Linear(1, 1)  # whose device the answers come from
    slow, quick = nn.Sequential(named("slow", 1.0)), nn.Sequential(named("quick", 1.0))
    for model in (slow, quick):
        model.register_parameter("place", module.weight)
    teacher = Teacher(slow, quick=quick, views=lambda x: [-x])
    inputs = torch.ones(2, 3)
    assert torch.equal(teacher(inputs, Precision(), views=2), inputs * 0 + 1)
    assert asked == ["quick", "quick"]
    teacher(inputs, Precision(), remember=False)
    assert asked == ["quick", "quick", "slow"]


def test_the_memory_is_bounded_and_a_long_epoch_keeps_its_first_answers() -> None:
    model = Counted()
    one = 4 * 2 * 4  # bytes of an answer
    teacher, inputs = Teacher(model, limit=3 * one), [logits(i, (4, 3)) for i in range(5)]
    for training, runs in ((1, 5), (2, 5 + 2), (3, 7 + 2)):
        teacher.begin()
        for x in inputs:
            teacher(x, PLAIN)
        assert model.runs == runs, training
    teacher.begin()
    for x in inputs[3:]:  # another order: what no longer is asked for makes room
        teacher(x, PLAIN)
        teacher(x, PLAIN)
    assert model.runs == 9 + 2


def test_an_answer_larger_than_the_memory_is_given_all_the_same() -> None:
    model = Counted()
    teacher = Teacher(model, limit=1)
    assert torch.equal(teacher(torch.ones(1, 3), PLAIN), teacher(torch.ones(1, 3), PLAIN))
    assert model.runs == 2


def test_answers_in_bfloat16_are_given_in_single_precision() -> None:
    model = nn.Linear(3, 2)
    said = Teacher(model)(logits(0, (4, 3)), HALF)
    assert said.dtype == torch.float32
    assert torch.equal(said, said.bfloat16().float())
    torch.testing.assert_close(said, model(logits(0, (4, 3))).detach(), rtol=0.05, atol=0.05)
