"""The quicker memory layout: taken where a model bears it, undone afterwards, and never for what is reported."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autocompress import ClassificationTask
from autocompress.channels_last import bears_channels_last, channels_last
from autocompress.engine import Workbench
from autocompress.measure.quality import QualityMeter, screening


class Net(nn.Module):
    """Two convolutions; `head` turns their activations into rows."""

    def __init__(self, head: str = "mean") -> None:
        super().__init__()
        self.head = head
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.fc = nn.Conv2d(8, 8, 3), nn.LazyLinear(4)
        self.eval()(torch.zeros(1, 3, 8, 8))
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(torch.relu(self.bn(self.conv1(x))))
        if hasattr(self, "seen"):
            self.seen.append(not x.is_contiguous())
        if self.head == "view":
            x = x.view(len(x), -1)
        elif self.head == "strides":
            x = torch.as_strided(x, (len(x), x[0].numel()), (x[0].numel(), 1))
        else:
            x = x.mean(dim=(2, 3))
        return self.fc(x)  # type: ignore[no-any-return]


def net(head: str = "mean") -> Net:
    torch.manual_seed(0)
    return Net(head)


IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def task(model: nn.Module, val: int = 96) -> ClassificationTask:
    draw = torch.Generator().manual_seed(1)
    pair = torch.randn(val, 3, 8, 8, generator=draw), torch.randint(0, 4, (val,), generator=draw)
    return ClassificationTask(model, pair, pair, pair, name="net", batch_size=16)


def test_inside_activations_lie_channels_last_and_afterwards_the_weights_are_the_same_memory() -> None:
    model = net()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    model.seen.clear()
    with channels_last(model, wanted=True):
        model(IMAGES)
        assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    model(IMAGES)
    assert model.seen == [True, False]
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert model.conv1.weight.is_contiguous()


def test_weights_come_back_after_an_error_and_a_shared_one_comes_back_once() -> None:
    model = net()
    model.conv2.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
    twin = nn.Conv2d(8, 8, 3)
    twin.weight = model.conv2.weight
    model.add_module("twin", twin)
    pointer = model.conv2.weight.data_ptr()
    with pytest.raises(RuntimeError, match="broken"), channels_last(model, wanted=True):
        raise RuntimeError("broken")
    assert model.conv2.weight.data_ptr() == twin.weight.data_ptr() == pointer


def test_nothing_moves_unless_wanted() -> None:
    model = net()
    with channels_last(model, wanted=False):
        assert model.conv1.weight.is_contiguous()


@pytest.mark.parametrize(("head", "expected"), [("mean", True), ("view", False), ("strides", False)])
def test_models_that_read_the_memory_themselves_do_not_bear_it(head: str, expected: bool) -> None:
    model = net(head)
    assert bears_channels_last(model, IMAGES) is expected
    assert model.conv1.weight.is_contiguous()


def test_models_without_convolutions_have_no_use_for_it() -> None:
    assert not bears_channels_last(nn.Linear(3, 2), torch.randn(4, 3))


def test_a_part_is_scored_channels_last_and_all_of_val_is_not() -> None:
    model = net()
    whole = QualityMeter(task(model), model)
    part = screening(task(model), model, inputs=32)
    assert part is not None
    for meter, expected in ((part, True), (whole, False)):
        model.seen.clear()
        found = meter(model)
        assert set(model.seen) == {expected}
        assert found.loss == pytest.approx(0.0, abs=1e-7)


def test_screen_scores_the_same_in_a_layout_that_the_model_does_not_bear() -> None:
    plain, odd = net(), net("view")
    for model in (plain, odd):
        part = screening(task(model), model, inputs=32)
        assert part is not None
        inputs, targets = task(model).split("val")
        with torch.no_grad():
            right = float((model(inputs[:32]).argmax(dim=1) == targets[:32]).double().mean())
        assert part(model).score == pytest.approx(right)


def test_statistics_are_those_of_the_usual_layout_to_rounding() -> None:
    quick, usual = Workbench(task(net())), Workbench(task(net()))
    usual.__dict__["_channels_last"] = False
    found, expected = quick.dense_statistics, usual.dense_statistics
    assert quick._channels_last
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name
