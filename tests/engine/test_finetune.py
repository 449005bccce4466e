from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from autocompress import Batch, ClassificationTask, RegressionTask
from autocompress.engine import finetune
from autocompress.engine.constraint import Constraint
from autocompress.engine.distill import Teacher
from autocompress.engine.finetune import (
    ADAM_SHARE,
    BETAS,
    CURVE_POINTS,
    LARGEST_NORM,
    LEAST_SCALE,
    MOMENTUM,
    WEIGHT_DECAY,
    Course,
    Hints,
    Record,
    normalise_gradients,
    train,
)
from autocompress.engine.prune import magnitude_mask
from autocompress.engine.quantize import Grid, fit_grid, quantise
from autocompress.engine.schedules import factor
from autocompress.policy import Decay, Gradient, LayerChoice, Recovery

STEPS = 4


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(0.2), nn.Linear(10, 3)).eval()


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(16 * STEPS, 6, generator=draw), torch.randint(0, 3, (16 * STEPS,), generator=draw)


class Classification(ClassificationTask):
    def __init__(self) -> None:
        super().__init__(mlp, data(), data(), data(), batch_size=16)


class Undefined(Classification):
    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        return super().loss(outputs, batch) * float("nan")


class Unused(Classification):
    def loss(self, outputs: Any, batch: Batch) -> Tensor:  # noqa: ARG002
        raise AssertionError("the task's loss was asked for")


def teacher_of(task: Classification) -> nn.Module:
    return task.model().requires_grad_(False)


def trained(
    recovery: Recovery,
    constraints: dict[str, Constraint] | None = None,
    *,
    task: Classification | None = None,
    hints: Hints | None = None,
    seed: int = 0,
    **more: Any,
) -> nn.Module:
    task = task or Classification()
    student = task.model().requires_grad_(False)
    course = Course(task, recovery, STEPS, seed, hints or Hints(), **more)
    train(student, Teacher(teacher_of(task)), constraints or {}, course)
    return student


def test_the_curve_has_mean_losses_and_the_rates_that_were_used() -> None:
    recovery = Recovery(epochs=20, lr=0.05, decay="cosine", decay_rate=0.1, adjust_factor=0.5, distill_weight=0.0)
    record, total = Record(), 20 * STEPS
    trained(recovery, record=record, validate=lambda _: 0.5)
    curve = record.curve()
    width = -(-total // CURVE_POINTS)
    assert list(curve.step) == [*range(width, total, width), total]
    assert len(curve.step) == len(curve.loss) == len(curve.lr) <= CURVE_POINTS
    plain = [recovery.lr * factor(recovery, step - 1, total) for step in curve.step]
    halvings = [math.log2(b / a) for a, b in zip(curve.lr, plain, strict=True)]
    assert halvings[0] == 0
    assert halvings == pytest.approx([round(h) for h in sorted(halvings)], abs=1e-9)  # a plateau only halves it
    assert halvings[-1] > 0
    assert curve.loss[-1] < curve.loss[0]
    assert {value for _, value in curve.heard} == {0.5}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def rates() -> Iterator[list[float]]:
    """The learning rate of each optimizer step."""
    found: list[float] = []

    def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
        found.append(float(optimizer.param_groups[0]["lr"]))

    handle = register_optimizer_step_pre_hook(note)
    yield found
    handle.remove()


# --- gradients ------------------------------------------------------------------------------------------


def with_gradient(shape: tuple[int, ...]) -> nn.Parameter:
    draw = torch.Generator().manual_seed(3)
    parameter = nn.Parameter(torch.randn(shape, generator=draw))
    parameter.grad = torch.randn(shape, generator=draw) + 0.7
    return parameter


def gradient_after(parameter: nn.Parameter, kind: Gradient) -> np.ndarray:
    normalise_gradients([parameter], kind)
    assert parameter.grad is not None
    return parameter.grad.numpy()


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 2, 2)])
def test_centralised_rows_have_mean_zero(shape: tuple[int, ...]) -> None:
    parameter = with_gradient(shape)
    rows = parameter.grad.numpy().reshape(4, -1).copy()
    expected = (rows - rows.mean(axis=1, keepdims=True)).reshape(shape)
    np.testing.assert_allclose(gradient_after(parameter, "centralise"), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 2, 2)])
def test_standardised_gradients_have_the_weights_root_mean_square(shape: tuple[int, ...]) -> None:
    parameter = with_gradient(shape)
    gradient, weight = parameter.grad.double().numpy(), parameter.detach().double().numpy()
    expected = (gradient - gradient.mean()) / gradient.std() * np.sqrt(np.square(weight).mean())
    np.testing.assert_allclose(gradient_after(parameter, "standardise"), expected, atol=1e-6)


def test_clipping_shortens_the_gradient_of_all_parameters_together() -> None:
    parameters = [with_gradient((4, 5)), with_gradient((7,)), nn.Parameter(torch.ones(2))]
    before = [p.grad.double().numpy().copy() for p in parameters[:2]]
    norm = np.sqrt(sum(np.square(g).sum() for g in before))
    assert norm > LARGEST_NORM
    normalise_gradients(parameters, "clip")
    for p, g in zip(parameters, before, strict=False):
        np.testing.assert_allclose(p.grad.numpy(), g * LARGEST_NORM / norm, rtol=1e-5)
    short = [p.grad.clone() * 0.5 for p in parameters[:2]]
    for p, g in zip(parameters, short, strict=False):
        p.grad = g.clone()
    normalise_gradients(parameters, "clip")
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, short, strict=False))


@pytest.mark.parametrize("kind", ["none", "centralise", "standardise"])
def test_vectors_and_absent_gradients_are_left_alone(kind: Gradient) -> None:
    vector, absent = with_gradient((5,)), nn.Parameter(torch.ones(2, 2))
    before = vector.grad.clone()
    normalise_gradients([vector, absent], kind)
    assert torch.equal(vector.grad, before)
    assert absent.grad is None


def test_the_kind_none_changes_no_gradient() -> None:
    parameter = with_gradient((4, 5))
    before = parameter.grad.numpy().copy()
    np.testing.assert_array_equal(gradient_after(parameter, "none"), before)


# --- constraints ----------------------------------------------------------------------------------------


def test_the_gradient_passes_straight_through_rounding() -> None:
    weight = nn.Parameter(torch.linspace(-3, 3, 20).reshape(2, 10))
    grid = Grid(torch.tensor([0.2, -0.3]), torch.tensor([4.0, 4.0]), 3, True)
    arriving = torch.randn(2, 10)
    seen = Constraint(None, grid).apply(weight)
    assert not torch.equal(seen, weight)
    (seen * arriving).sum().backward()
    assert torch.equal(weight.grad, arriving)


@pytest.mark.parametrize("bits", [1, 4])
def test_the_gradient_stops_at_pruned_weights(bits: int) -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    mask = magnitude_mask(weight, 5)
    Constraint(mask, fit_grid(weight, bits, symmetric=True)).apply(weight).sum().backward()
    assert torch.equal(weight.grad, mask.float())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_what_the_forward_pass_sees_is_what_will_be_stored(bits: int, scheme: Any) -> None:
    weight = torch.randn(3, 40)
    mask, choice = magnitude_mask(weight, 30), LayerChoice(bits, scheme=scheme)
    grid = fit_grid(weight, bits, symmetric=scheme == "symmetric")
    seen = Constraint(mask, grid).apply(nn.Parameter(weight)).detach()
    assert torch.equal(seen, quantise(weight, choice, mask, grid).dense())


@pytest.mark.parametrize("gradient", ["none", "centralise", "standardise"])
def test_pruned_weights_never_reach_a_forward_pass_while_training(
    gradient: Gradient, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = magnitude_mask(mlp()[0].weight, 30)
    seen: list[Tensor] = []
    call = finetune.functional_call

    def spy(module: nn.Module, weights: dict[str, Tensor], *args: Any) -> Any:
        seen.append(weights["0.weight"].detach().clone())
        return call(module, weights, *args)

    monkeypatch.setattr(finetune, "functional_call", spy)
    trained(Recovery(epochs=2, gradient=gradient), {"0.weight": Constraint(mask, None)})
    assert len(seen) == 2 * STEPS
    assert all((weight[~mask] == 0).all() for weight in seen)
    assert not torch.equal(seen[0], seen[-1])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_trained_weights_are_on_their_constraints_grid(bits: int) -> None:
    weight = mlp()[0].weight.detach()
    mask, grid = magnitude_mask(weight, 20), fit_grid(weight, bits, symmetric=True)
    student = trained(Recovery(epochs=4, lr=0.3, distill_weight=0.0), {"0.weight": Constraint(mask, grid)})
    final = student[0].weight.detach()
    stored = quantise(final, LayerChoice(bits), mask, grid)
    codes = stored.dense().numpy() / grid.scale.numpy()[:, None]
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-6)
    assert np.abs(codes).max() <= 2 ** (bits - 1)
    assert (stored.dense()[~mask] == 0).all()
    assert torch.equal(quantise(stored.dense(), LayerChoice(bits), mask, grid).codes, stored.codes)
    assert not torch.equal(stored.codes, quantise(weight, LayerChoice(bits), mask, grid).codes)


# --- steps ----------------------------------------------------------------------------------------------


def test_steps_are_nesterov_momentum_with_weight_decay() -> None:
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(8, 3)).astype(np.float32), draw.normal(size=(8, 1)).astype(np.float32)
    model = nn.Linear(3, 1, bias=False)
    task = RegressionTask(model, (x, y), (x, y), (x, y), batch_size=8)
    student, w = task.model(), model.weight.detach().double().numpy().copy()
    recovery = Recovery(epochs=5, lr=0.1, decay="constant", distill_weight=0.0)
    train(student, Teacher(task.model()), {}, Course(task, recovery, 1))
    velocity = np.zeros_like(w)
    for _ in range(5):
        gradient = 2 * (x @ w.T - y).T @ x / len(x) + WEIGHT_DECAY * w
        velocity = MOMENTUM * velocity + gradient
        w -= 0.1 * (gradient + MOMENTUM * velocity)
    np.testing.assert_allclose(student.weight.detach().numpy(), w, rtol=1e-4, atol=1e-6)


def test_adam_takes_its_share_of_the_rate_and_decays_weights_apart() -> None:
    """Against Loshchilov & Hutter, 1711.05101, algorithm 2, written out."""
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(8, 3)).astype(np.float32), draw.normal(size=(8, 1)).astype(np.float32)
    model = nn.Linear(3, 1, bias=False)
    task = RegressionTask(model, (x, y), (x, y), (x, y), batch_size=8)
    student, w = task.model(), model.weight.detach().double().numpy().copy()
    recovery = Recovery(epochs=6, lr=0.5, decay="constant", distill_weight=0.0, optimizer="adam")
    train(student, Teacher(task.model()), {}, Course(task, recovery, 1))
    (first, second), lr = BETAS, 0.5 * ADAM_SHARE
    mean, square = np.zeros_like(w), np.zeros_like(w)
    for step in range(1, 7):
        gradient = 2 * (x @ w.T - y).T @ x / len(x)
        mean, square = first * mean + (1 - first) * gradient, second * square + (1 - second) * gradient**2
        w -= lr * WEIGHT_DECAY * w
        w -= lr * (mean / (1 - first**step)) / (np.sqrt(square / (1 - second**step)) + 1e-8)
    np.testing.assert_allclose(student.weight.detach().numpy(), w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("decay", "factors"),
    [
        ("constant", [1.0] * 8),
        ("step", [1.0] * 3 + [0.5] * 3 + [0.25] * 2),
        ("exponential", [0.25 ** (i / 8) for i in range(8)]),
        ("cosine", [0.25 + 0.75 * (1 + np.cos(np.pi * i / 8)) / 2 for i in range(8)]),
        ("polynomial", [0.25 + 0.75 * (1 - i / 8) ** 2 for i in range(8)]),
    ],
)
def test_the_optimizer_follows_the_decay(decay: Decay, factors: list[float], rates: list[float]) -> None:
    trained(Recovery(epochs=2, lr=0.04, decay=decay, decay_rate=0.25))
    assert rates == pytest.approx([0.04 * f for f in factors])


def test_the_plateau_hears_the_validation_metric_and_lowers_the_rate(
    rates: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.4, 0.6, 0.6])
    judged: list[tuple[bool, dict[str, Tensor]]] = []

    def validate(model: nn.Module) -> float:
        judged.append((model.training, state_of(model)))
        torch.rand(1)  # must not shift what training draws
        return next(scores)

    monkeypatch.setattr(finetune, "REPORTS_PER_EPOCH", 2)
    recovery = Recovery(epochs=2, lr=0.1, decay="constant", adjust_factor=0.5, adjust_patience=0)
    constraint = Constraint(None, fit_grid(mlp()[0].weight.detach(), 3, symmetric=True))
    trained(recovery, {"0.weight": constraint}, validate=validate)
    assert rates == pytest.approx([0.1] * 4 + [0.05] * 4)  # the last report comes too late for a step
    assert not any(training for training, _ in judged)
    for _, state in judged:  # the metric is that of the weights as they are stored
        assert torch.equal(constraint.stored(state["0.weight"]), state["0.weight"])


@pytest.mark.parametrize("score", [0.5, 0.0, float("nan")])
def test_a_constant_metric_is_a_plateau(score: float, rates: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "REPORTS_PER_EPOCH", STEPS)
    recovery = Recovery(epochs=2, lr=0.1, decay="constant", adjust_factor=0.5, adjust_patience=1, adjust_cooldown=1)
    trained(recovery, validate=lambda _: score)
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        sgd, mode="max", factor=0.5, patience=1, cooldown=1, threshold=1e-4
    )
    expected = []
    for _ in range(2 * STEPS):
        expected.append(float(sgd.param_groups[0]["lr"]))
        plateau.step(score)
    assert rates == pytest.approx(expected)
    assert rates[-1] < 0.1


def test_without_adjustment_nothing_is_validated() -> None:
    trained(Recovery(epochs=1), validate=lambda _: pytest.fail("validated"))


def test_validation_does_not_change_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "REPORTS_PER_EPOCH", 2)
    constraint = Constraint(None, fit_grid(mlp()[0].weight.detach(), 3, symmetric=True))
    rising = iter(range(1, 100))
    heard = Recovery(epochs=2, lr=0.1, adjust_factor=0.5, scales="learned", ema=0.9)
    a = trained(heard, {"0.weight": constraint}, validate=lambda _: float(next(rising)))
    b = trained(Recovery(epochs=2, lr=0.1, scales="learned", ema=0.9), {"0.weight": constraint})
    assert equal(state_of(a), state_of(b))


# --- averages and learned scales ------------------------------------------------------------------------


@pytest.fixture
def steps() -> Iterator[list[list[Tensor]]]:
    """The parameters after each optimizer step, scales last where they learn."""
    found: list[list[Tensor]] = []

    def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
        found.append([p.detach().clone() for group in optimizer.param_groups for p in group["params"]])

    handle = register_optimizer_step_post_hook(note)
    yield found
    handle.remove()


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_the_average_is_an_exponential_moving_one_of_weights_and_statistics(
    decay: float, steps: list[list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics: list[np.ndarray] = []
    average = finetune._Average.update

    def spy(self: Any) -> None:
        statistics.append(self._tensors[-1].double().numpy().copy())
        average(self)

    monkeypatch.setattr(finetune._Average, "update", spy)
    student = trained(Recovery(epochs=3, lr=0.1, ema=decay))
    start = mlp()
    weight, variance = start[0].weight.detach().double().numpy(), start[1].running_var.double().numpy()
    for n, (now, seen) in enumerate(zip(steps, statistics, strict=True), 1):
        share = min(decay, (1 + n) / (10 + n))
        weight = share * weight + (1 - share) * now[0].double().numpy()
        variance = share * variance + (1 - share) * seen
    np.testing.assert_allclose(student[0].weight.detach().numpy(), weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(student[1].running_var.numpy(), variance, rtol=1e-5)
    assert not np.allclose(student[0].weight.detach().numpy(), steps[-1][0].numpy(), atol=1e-4)


def test_constant_buffers_stay_as_they_are() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.register_buffer("mask", torch.tensor([0.0, -1e30, -torch.inf]).repeat(10, 1).T.contiguous())

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    task = Classification()
    task._model = Masked()
    student = trained(Recovery(epochs=2, ema=0.9), task=task)
    assert torch.equal(student.mask, task._model.mask)
    assert not torch.equal(student.inner[0].weight, task._model.inner[0].weight)


def test_the_average_is_put_on_the_average_of_the_grids(steps: list[list[Tensor]]) -> None:
    weight, decay = mlp()[0].weight.detach(), 0.9
    mask, grid = magnitude_mask(weight, 20), fit_grid(weight, 3, symmetric=True)
    task, recovery = Classification(), Recovery(epochs=3, lr=0.2, ema=decay, scales="learned")
    student = task.model()
    start = {"0.weight": Constraint(mask, grid)}
    final = train(student, Teacher(teacher_of(task)), start, Course(task, recovery, STEPS))["0.weight"]
    w, s = weight.double().numpy(), grid.scale.double().numpy()
    for n, now in enumerate(steps, 1):
        share = min(decay, (1 + n) / (10 + n))
        w = share * w + (1 - share) * now[0].double().numpy()
        s = share * s + (1 - share) * now[-1].double().numpy()
    np.testing.assert_allclose(final.grid.scale.numpy(), s, rtol=2e-3)  # 11 bits
    expected = quantise(torch.tensor(w).float(), LayerChoice(3), mask, final.grid)
    assert (expected.dense() != student[0].weight).float().mean() < 0.05  # ties of rounding
    assert torch.equal(final.stored(student[0].weight), student[0].weight)


def test_scales_do_not_decay_and_never_come_near_zero(steps: list[list[Tensor]]) -> None:
    class Still(Classification):
        """A loss that pulls at nothing: weight decay alone moves weights."""

        def loss(self, outputs: Any, batch: Batch) -> Tensor:  # noqa: ARG002
            return 0.0 * outputs.sum()

    weight = mlp()[0].weight.detach()
    constraint = {"0.weight": Constraint(None, fit_grid(weight, 4, symmetric=True))}
    trained(Recovery(epochs=1, lr=1.0, distill_weight=0.0, scales="learned"), constraint, task=Still())
    assert torch.equal(steps[-1][-1], constraint["0.weight"].grid.scale)
    assert not torch.equal(steps[-1][0], weight)


def test_a_scale_that_is_pushed_through_zero_stops_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "WEIGHT_DECAY", 0.0)

    class Shrinking(Classification):
        def loss(self, outputs: Any, batch: Batch) -> Tensor:  # noqa: ARG002
            return outputs.square().sum()

    weight = mlp()[4].weight.detach()
    grid = fit_grid(weight, 2, symmetric=True)
    assert (grid.scale < 0).any()
    assert (grid.scale > 0).any()
    task = Shrinking()
    student = task.model()
    recovery = Recovery(epochs=4, lr=0.5, decay="constant", distill_weight=0.0, scales="learned", gradient="clip")
    found = train(
        student, Teacher(teacher_of(task)), {"4.weight": Constraint(None, grid)}, Course(task, recovery, STEPS)
    )
    ratio = found["4.weight"].grid.scale / grid.scale
    assert float(ratio.min()) == pytest.approx(LEAST_SCALE, rel=1e-3)


def test_a_weight_that_is_not_finite_after_the_last_step_is_an_error() -> None:
    class Exploding(Classification):
        """One batch, whose loss is finite and whose gradient is not."""

        def batches(self, split: Any, seed: int = 0) -> Any:
            return list(super().batches(split, seed))[:1]

        def loss(self, outputs: Any, batch: Batch) -> Tensor:  # noqa: ARG002
            return torch.sqrt((outputs * 0).sum())

    with pytest.raises(FloatingPointError, match="not finite after the last step"):
        trained(Recovery(epochs=1, distill_weight=0.0), task=Exploding())


def test_progress_hears_every_step() -> None:
    heard: list[tuple[int, int]] = []
    trained(Recovery(epochs=3), progress=lambda step, total: heard.append((step, total)))
    assert heard == [(step, 3 * STEPS) for step in range(1, 3 * STEPS + 1)]


def test_each_epoch_draws_its_own_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    task, seeds = Classification(), []
    batches = task.batches

    def spy(split: Any, seed: int = 0) -> Any:
        seeds.append((split, seed))
        return batches(split, seed)

    monkeypatch.setattr(task, "batches", spy)
    trained(Recovery(epochs=3), task=task, seed=5)
    assert seeds == [("train", 5), ("train", 6), ("train", 7)]


def test_only_norms_are_in_training_mode_while_it_learns() -> None:
    """Dropout would be noise that the teacher's outputs do not have."""
    x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    task = ClassificationTask(model, (x, y), (x, y), (x, y), batch_size=8)
    student, seen = task.model(), set[tuple[str, bool]]()
    for module in student:
        module.register_forward_hook(lambda m, *_: seen.add((type(m).__name__, m.training)))
    train(student, Teacher(task.model()), {}, Course(task, Recovery(epochs=2, adjust_factor=0.5), 4))
    assert seen == {("Linear", False), ("BatchNorm1d", True), ("Dropout", False)}
    assert not any(module.training for module in student.modules())


def test_training_lowers_the_loss() -> None:
    task = Classification()
    batch = Batch(*data())
    student = trained(Recovery(epochs=20, lr=0.1, distill_weight=0.0), task=task)
    assert task.loss(student(batch.inputs), batch) < 0.8 * task.loss(task.model()(batch.inputs), batch)


def test_a_loss_that_is_not_finite_stops_training() -> None:
    with pytest.raises(FloatingPointError, match=r"nan at step 0 of 4, at learning rate 0\.02"):
        trained(Recovery(epochs=1, distill_weight=0.5), task=Undefined())


# --- purity ---------------------------------------------------------------------------------------------


def test_the_same_seed_gives_identical_weights_and_another_seed_does_not() -> None:
    first = state_of(trained(Recovery(epochs=2)))
    torch.manual_seed(99)
    again = state_of(trained(Recovery(epochs=2)))
    assert equal(first, again)
    assert not equal(first, state_of(trained(Recovery(epochs=2), seed=1)))


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    task = Classification()
    student, teacher = copy.deepcopy(mlp()), copy.deepcopy(mlp())
    torch.manual_seed(7)
    train(student, Teacher(teacher), {}, Course(task, Recovery(epochs=1), STEPS))
    assert not torch.equal(student[0].weight, teacher[0].weight)
    assert torch.equal(torch.rand(3), expected)


def test_the_teacher_never_changes() -> None:
    task = Classification()
    teacher = teacher_of(task)
    before = state_of(teacher)
    recovery = Recovery(epochs=2, lr=0.5, hint_weight=1.0)
    train(task.model(), Teacher(teacher), {}, Course(task, recovery, STEPS, hints=Hints(("0",))))
    assert equal(before, state_of(teacher))
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(module._forward_hooks for module in teacher.modules())


def test_a_trained_student_is_left_frozen_and_in_evaluation_mode() -> None:
    student = trained(Recovery(epochs=1, hint_weight=1.0), hints=Hints(("0",)))
    assert not any(module.training for module in student.modules())
    assert not any(p.requires_grad for p in student.parameters())
    assert not any(module._forward_hooks for module in student.modules())


def test_pure_distillation_never_asks_for_the_tasks_loss() -> None:
    trained(Recovery(epochs=1, distill_weight=1.0), task=Unused())
    with pytest.raises(AssertionError, match="was asked for"):
        trained(Recovery(epochs=1, distill_weight=0.9), task=Unused())


def test_training_without_distillation_never_runs_the_teacher() -> None:
    task, runs = Classification(), []
    teacher = teacher_of(task)
    teacher.register_forward_pre_hook(lambda *_: runs.append(1))
    for weight in (0.0, 0.1):
        recovery = Recovery(epochs=1, distill_weight=weight)
        train(task.model(), Teacher(teacher), {}, Course(task, recovery, STEPS))
    assert len(runs) == STEPS


def test_hints_without_weight_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "hint_loss", lambda *_: pytest.fail("hints were computed"))
    trained(Recovery(epochs=1, hint_weight=0.0), hints=Hints(("0",)))


# --- what a task may yield ------------------------------------------------------------------------------


def test_batches_may_be_plain_pairs() -> None:
    class Pairs(Classification):
        def batches(self, split: Any, seed: int = 0) -> Any:
            return [(batch.inputs, batch.target) for batch in super().batches(split, seed)]

    assert equal(state_of(trained(Recovery(epochs=1), task=Pairs())), state_of(trained(Recovery(epochs=1))))


def test_a_last_batch_of_one_example_trains() -> None:
    class Odd(Classification):
        def batches(self, split: Any, seed: int = 0) -> Any:
            *others, last = super().batches(split, seed)
            return [*others, Batch(last.inputs[:1], last.target[:1])]

    trained(Recovery(epochs=1), task=Odd())


class Singles(Classification):
    """One example a batch, and a network without batch norms."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.batch_size = 1
        self._model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))


def test_batches_of_one_example_train_a_network_that_allows_them() -> None:
    task, heard = Singles(), []
    student = task.model()
    recovery = Recovery(epochs=1, distill_weight=0.0)
    course = Course(task, recovery, 16 * STEPS, progress=lambda step, _: heard.append(step))
    train(student, Teacher(teacher_of(task)), {}, course)
    assert not equal(state_of(student), state_of(task.model()))
    assert heard == list(range(1, 16 * STEPS + 1))
