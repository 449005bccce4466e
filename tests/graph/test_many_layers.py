"""Deep models: few runs find out about all groups at once, and one bad coupling does not spoil the others."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_checks import Net, check, check_graph, conv, images, pool, prunable, settle
from torch import Tensor, nn

from autocompress.trace import trace


def deep(net: Net, x: Tensor) -> Tensor:
    x = net.stem(x)
    for block in net.blocks:  # type: ignore[union-attr]
        x = x + 0.5 * block(x)
    return net.head(pool(x))


def with_blocks(count: int) -> nn.Module:
    blocks = [nn.Sequential(conv(8, 16), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 8)) for _ in range(count)]
    return settle(Net(deep, stem=conv(3, 8), blocks=nn.Sequential(*blocks), head=nn.Linear(8, 5)))


def runs(model: nn.Module, inputs: Any) -> int:
    count = 0

    def record(*_: Any) -> None:
        nonlocal count
        count += 1

    model.register_forward_hook(record)
    trace(model, inputs)
    return count


def test_a_deeper_model_is_not_run_more_often() -> None:
    assert runs(with_blocks(2), images()) == runs(with_blocks(16), images())


def test_a_chain_of_layers_is_not_run_for_each_that_must_stay() -> None:
    def chain(count: int) -> nn.Module:
        layers = [nn.Linear(6 if i == 0 else 16, 16) for i in range(count)]
        return settle(nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())), nn.Linear(16, 3)))

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    assert runs(chain(3), x) == runs(chain(12), x)
    assert not any(group.removable for group in trace(chain(12), x).groups)


def test_every_group_of_a_deep_model_is_right() -> None:
    graph = check(with_blocks(6), images())
    assert len(graph.prunable) == 7
    assert sum(group.removable for group in graph.groups) == 6


def coupled(net: Net, x: Tensor) -> Tensor:
    x = net.stem(x)
    for block in net.blocks:  # type: ignore[union-attr]
        x = x + 0.5 * block(x)
    a, b = F.relu(net.a(x)), F.relu(net.b(x))
    beside = (a * b).detach().mean(dim=(1, 2, 3))  # one more coupling, which no gradient shows
    return net.head(pool(net.c(a) + net.d(b))) + beside[:, None]


def with_hidden_coupling(width: int) -> nn.Module:
    blocks = [nn.Sequential(conv(8, 16), nn.ReLU(), conv(16, 8)) for _ in range(5)]
    layers = {"a": conv(8, width), "b": conv(8, width), "c": conv(width, 6), "d": conv(width, 6)}
    return settle(Net(coupled, stem=conv(3, 8), blocks=nn.Sequential(*blocks), **layers, head=nn.Linear(6, 5)))


@pytest.mark.parametrize("width", [2, 8, 32])
def test_a_coupling_that_the_tracer_cannot_see_freezes_its_two_groups_alone(width: int) -> None:
    model = with_hidden_coupling(width)
    graph = trace(model, images())
    frozen = {group.name for group in graph.groups if group.frozen and group.consumers}
    assert frozen == {"a", "b"}
    assert {f"blocks.{i}.0" for i in range(5)} <= prunable(graph)
    check_graph(model, images(), graph)


def test_a_model_is_what_it_was_after_its_trace() -> None:
    model = with_blocks(2).train()
    model.stem.weight.requires_grad_(False)  # type: ignore[union-attr]
    before = copy.deepcopy(model.state_dict())
    addresses = [p.data_ptr() for p in model.parameters()]
    trace(model, images())
    assert all(module.training for module in model.modules())
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert [p.requires_grad for p in model.parameters()] == [n != "stem.weight" for n, _ in model.named_parameters()]
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
