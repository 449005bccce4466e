from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress import ClassificationTask, LayerChoice, Policy, Recovery, Workbench, compress
from autocompress.engine import precision
from autocompress.engine.precision import PLAIN, Precision, quickest

IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
BOTH = Precision(True, True)


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 4)
    return nn.Sequential(*layers).eval()


class Viewing(nn.Module):
    """Works in the usual layout only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).view(len(x), -1)


class Delicate(nn.Module):
    """bfloat16 has too few digits for the difference of large numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(108, 4)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1) + 300.0
        return self.inner(flat) - self.inner(torch.full_like(flat, 300.0))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Precision]]:
    """Steps take the seconds that the test says, and are really made."""

    def install(seconds: dict[Precision, float]) -> list[Precision]:
        monkeypatch.setattr(precision, "_decided", {})
        made: list[Precision] = []
        step = precision._step

        def timed(model: nn.Module, inputs: Any, which: Precision) -> float:
            step(model, inputs, which)
            made.append(which)
            return seconds[which]

        monkeypatch.setattr(precision, "_step", timed)
        return made

    return install


def seconds(plain: float, half: float, last: float, both: float) -> dict[Precision, float]:
    return {PLAIN: plain, Precision(True, False): half, Precision(False, True): last, BOTH: both}


@pytest.mark.parametrize(
    ("took", "best"),
    [
        (seconds(1.0, 0.5, 0.9, 0.3), BOTH),
        (seconds(1.0, 0.5, 0.9, 0.6), Precision(True, False)),
        (seconds(1.0, 9.0, 0.5, 9.0), Precision(False, True)),
        (seconds(1.0, 9.0, 0.95, 9.0), PLAIN),
        (seconds(0.001, 0.0005, 0.0009, 0.0001), PLAIN),  # so little that it does not matter
    ],
)
def test_the_fastest_step_wins_if_it_is_clearly_faster(
    clock: Callable[..., list[Precision]], took: dict[Precision, float], best: Precision
) -> None:
    clock(took)
    assert quickest(convolutions(), IMAGES) == best


def test_a_process_decides_once_for_each_shape(clock: Callable[..., list[Precision]]) -> None:
    made = clock(seconds(1.0, 0.5, 0.9, 0.3))
    quickest(convolutions(), IMAGES)
    count = len(made)
    assert quickest(convolutions(), IMAGES) == BOTH
    assert len(made) == count
    quickest(convolutions(), IMAGES[:3])
    assert len(made) > count


def test_what_is_hopeless_is_tried_once(clock: Callable[..., list[Precision]]) -> None:
    made = clock(seconds(1.0, 10.0, 0.5, 10.0))
    quickest(convolutions(), IMAGES)
    assert made.count(BOTH) == made.count(Precision(True, False)) == 1


@pytest.mark.parametrize(("model", "best"), [(Viewing(), Precision(True, False)), (Delicate(), PLAIN)])
def test_what_changes_the_outputs_is_no_choice(
    clock: Callable[..., list[Precision]], model: nn.Module, best: Precision
) -> None:
    clock(seconds(1.0, 0.5, 0.5, 0.3))
    assert quickest(model.eval(), IMAGES) == best


def test_probing_leaves_the_model_and_the_random_numbers_alone(clock: Callable[..., list[Precision]]) -> None:
    clock(seconds(1.0, 0.5, 0.9, 0.3))
    model = nn.Sequential(convolutions(), nn.Dropout(0.5)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    quickest(model, IMAGES)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def bench() -> Workbench:
    draw = torch.Generator().manual_seed(1)
    data = torch.randn(64, 3, 6, 6, generator=draw), torch.randint(0, 4, (64,), generator=draw)
    return Workbench(ClassificationTask(convolutions(), data, data, data, batch_size=16))


def trained(given: Precision) -> list[Tensor]:
    made = bench()
    made.precision = given
    recovery = Recovery(epochs=1, scales="learned", hint_weight=0.3, reestimate_bn=False)
    policy = Policy({"0": LayerChoice(4, 0.3), "3": LayerChoice(16)}, recovery=recovery)
    compressed = compress(made, policy)
    layouts = [p.is_contiguous() for model in (made.teacher, made._student) for p in model.parameters()]
    assert all(layouts)
    return [stored.dense() for stored in compressed.tensors.values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_workbench_trains_in_the_precision_that_it_was_given() -> None:
    plain = trained(PLAIN)
    for other in (Precision(True, False), BOTH):
        found = trained(other)
        assert not same(found, plain)
        assert same(found, trained(other))
        assert all(t.dtype == torch.float32 for t in found)
        for a, b in zip(found, plain, strict=True):
            assert (a - b).norm() < 0.2 * b.norm() + 1e-3


def test_scoring_ignores_the_precision() -> None:
    scores = []
    for given in (PLAIN, BOTH):
        made = bench()
        made.precision = given
        scores.append(made.realise(compress(made, Policy({"0": LayerChoice(4)})))(IMAGES))
    assert torch.equal(*scores)


def test_small_models_train_in_plain_single_precision() -> None:
    assert bench().precision == PLAIN
