from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn

from autocompress.engine.distill import Features, hint_loss, recovery_loss
from autocompress.policy import Recovery
from autocompress.task import Batch, divergence, soft_target_divergence, squared_error_divergence

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
