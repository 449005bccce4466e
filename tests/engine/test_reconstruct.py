"""The pass that fits one layer after the other, against numpy on what the layers of the finished model really see."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress.engine import moments, reconstruct
from autocompress.engine.moments import patches
from autocompress.engine.reconstruct import Fitted, Reconstruction, merged
from autocompress.surgery import install
from autocompress.task import Batch
from autocompress.trace import trace


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(moments, "DAMPING", 1e-7)


def convolutions() -> nn.Sequential:
    """A norm after the first convolution, a bias in the second, a depthwise one between them."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = randn(6).mul(0.3)
            module.running_var = randn(6).square() + 0.5
    return model.eval()


ROWS = {"0": torch.tensor([0, 2, 3, 5]), "3": torch.tensor([0, 2, 3, 5])}
BATCHES = [Batch(randn(8, 2, 6, 6, seed=s), None) for s in (1, 2)]


def narrow(model: nn.Sequential) -> nn.Module:
    """Two of the six channels are gone, as plain slices."""
    small, kept, state = copy.deepcopy(model), ROWS["0"], model.state_dict()
    cut = {f"{name}.{key}": state[f"{name}.{key}"][kept] for name in "03" for key in ("weight",)}
    cut |= {f"1.{key}": state[f"1.{key}"][kept] for key in ("weight", "bias", "running_mean", "running_var")}
    install(small, {**cut, "3.bias": state["3.bias"][kept], "5.weight": state["5.weight"][:, kept]})
    return small.eval()


def fitted(
    model: nn.Sequential, norm: dict[str, bool], batches: list[Batch] = BATCHES
) -> tuple[nn.Module, dict[str, Fitted]]:
    small = narrow(model)
    found = Reconstruction(model, trace(model, batches[0].inputs), batches, 0).fit(small, ROWS, norm)
    return small, found


def seen_by(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """What a layer's rows are multiplied with (groups, d, columns)."""
    got: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, given: got.append(given[0]))
    model(x)
    handle.remove()
    return patches(model.get_submodule(name), got[0].detach())


X = torch.cat([batch.inputs for batch in BATCHES])


def model_inputs(model: nn.Module) -> Tensor:
    return model[:5](X).detach()  # type: ignore[index,no-any-return]


def test_the_last_layer_is_the_best_affine_fit_to_what_the_finished_layers_before_it_give() -> None:
    model = convolutions()
    small, found = fitted(model, {"3": False, "5": False})
    inputs, dense = (seen_by(m, "5", X)[0].double().numpy() for m in (small, model))
    wanted = model[5].weight.detach().flatten(1).double().numpy() @ dense + model[5].bias.detach().numpy()[:, None]
    with_ones = np.concatenate([inputs, np.ones((1, inputs.shape[1]))])
    best, *_ = np.linalg.lstsq(with_ones.T, wanted.T, rcond=None)
    outputs = small[5](model_inputs(small)).detach().movedim(1, 0).flatten(1)
    np.testing.assert_allclose(outputs.numpy(), best.T @ with_ones, atol=1e-4)
    assert torch.equal(small[5].weight, found["5"].weight)
    assert torch.equal(small[5].bias, found["5"].bias)
    np.testing.assert_allclose(found["5"].h[0].numpy(), inputs @ inputs.T, rtol=1e-3, atol=1e-3)


def test_each_group_is_fitted_to_its_own_inputs() -> None:
    model = convolutions()
    small, found = fitted(model, {"0": False, "3": False})
    inputs, dense = (seen_by(m, "3", X).double().numpy() for m in (small, model))
    for place, channel in enumerate(ROWS["3"].tolist()):
        wanted = model[3].weight[channel].detach().flatten().double().numpy() @ dense[channel]
        with_ones = np.concatenate([inputs[place], np.ones((1, inputs.shape[2]))])
        best, *_ = np.linalg.lstsq(with_ones.T, wanted, rcond=None)
        np.testing.assert_allclose(found["3"].weight[place].flatten().numpy(), best[:-1], atol=2e-3)


def test_a_layer_before_a_renewed_norm_need_not_meet_the_mean() -> None:
    model = convolutions()
    start = narrow(model)
    start[0].weight.detach().mul_(0.5)  # a wrong start that the fit has to leave
    base = Reconstruction(model, trace(model, X), BATCHES, 0)
    found = base.fit(start, ROWS, {"0": True})["0"]
    torch.testing.assert_close(found.weight, model[0].weight[ROWS["0"]], atol=1e-3, rtol=0)
    assert found.bias is None
    assert not start.training
    assert not start[1].training


def test_only_named_layers_are_fitted_and_no_hooks_stay() -> None:
    model = convolutions()
    small, found = fitted(model, {"5": False})
    assert set(found) == {"5"}
    assert torch.equal(small[0].weight, model[0].weight[ROWS["0"]])
    for module in (*small.modules(), *model.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_sampled_positions_are_the_same_ones_in_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "LEAST_COLUMNS", 100)
    monkeypatch.setattr(reconstruct, "COLUMNS_PER_INPUT", 1)
    model = convolutions()
    same, found = copy.deepcopy(model), {}
    base = Reconstruction(model, trace(model, X), BATCHES, 0)
    found = base.fit(same, {}, {"0": False, "3": False, "5": False})
    for name, layer in found.items():
        torch.testing.assert_close(layer.weight, model.get_submodule(name).weight, atol=1e-4, rtol=0)


class Twice(nn.Module):
    """One layer is called twice, two others share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(torch.relu(self.again(x)))
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))  # type: ignore[no-any-return]


def test_layers_that_are_called_twice_or_share_a_weight_are_left_alone() -> None:
    model, x = Twice().eval(), randn(32, 4)
    graph = trace(model, x)
    found = Reconstruction(model, graph, [Batch(x, None)], 0).fit(
        copy.deepcopy(model), {}, {layer.name: False for layer in graph.layers}
    )
    assert set(found) == {"last"}


def test_a_value_that_is_not_finite_leaves_the_layer_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    broken = copy.deepcopy(model)
    broken[0].weight.detach()[0, 0] = torch.inf
    x = randn(16, 3)
    found = Reconstruction(model, trace(model, x), [Batch(x, None)], 0).fit(broken, {}, {"1": False})
    assert torch.equal(found["1"].weight, model[1].weight)


@pytest.mark.parametrize(
    ("parts", "count", "expected"),
    [
        ([torch.zeros(2, 3), torch.ones(2, 3)], 3, torch.tensor([[0.0] * 3, [0.0] * 3, [1.0] * 3])),
        ([{"x": torch.zeros(2, 1), "n": 4}, {"x": torch.ones(2, 1), "n": 4}], 4, torch.tensor([[0.0], [0], [1], [1]])),
        ([(torch.zeros(2, 1),), (torch.ones(2, 1),)], 8, torch.tensor([[0.0], [0], [1], [1]])),
        ([torch.zeros(2, 3), torch.ones(2, 4)], 4, torch.zeros(2, 3)),
    ],
    ids=["tensors", "mappings", "tuples", "lengths-that-differ"],
)
def test_batches_are_joined_where_they_go_together(parts: list[Any], count: int, expected: Tensor) -> None:
    found = merged([Batch(part, None) for part in parts], count)
    value = found["x"] if isinstance(found, dict) else found[0] if isinstance(found, tuple) else found
    assert torch.equal(value, expected)
