"""Which groups can go as a whole, and what takes the place of their layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_checks import Net, assert_same, check_graph, conv, group, images, outputs, pool, settle, silenced
from test_residual import squeeze_and_excite, with_plain_shortcut, with_projection
from torch import Tensor, nn

from autocompress.engine.prune import remove_channels
from autocompress.errors import PolicyError
from autocompress.graph import Graph
from autocompress.policy import Policy
from autocompress.surgery import Removed, install
from autocompress.trace import trace

NONE = torch.zeros(0, dtype=torch.long)


def removable(graph: Graph) -> set[str]:
    return {g.name for g in graph.groups if g.removable}


def chain(net: Net, x: Tensor) -> Tensor:
    return net.head(pool(F.relu(net.second(F.relu(net.first(x))))))


def concatenated(net: Net, x: Tensor) -> Tensor:
    x = F.relu(net.stem(x))
    return net.head(pool(F.relu(net.last(torch.cat([x, F.relu(net.branch(x))], dim=1)))))


def two_branches(net: Net, x: Tensor) -> Tensor:
    return net.head(pool(F.relu(net.a2(F.relu(net.a1(x))) + net.b2(F.relu(net.b1(x))))))


def depthwise_block(net: Net, x: Tensor) -> Tensor:
    x = F.relu(net.stem(x))
    y = F.relu(net.norm(net.each(F.relu(net.expand(x)))))
    return net.head(pool(x + net.project(y)))


def halving_block(net: Net, x: Tensor) -> Tensor:
    x = F.relu(net.stem(x))
    y = net.second(F.relu(net.first(x)))
    y += net.project(x)  # in place: a constant must be a tensor of its own
    return net.head(pool(y))


def with_depthwise() -> nn.Module:
    layers = {"stem": conv(3, 8), "expand": conv(8, 12, 1), "each": conv(12, 12, groups=12), "norm": nn.BatchNorm2d(12)}
    return settle(Net(depthwise_block, **layers, project=conv(12, 8, 1), head=nn.Linear(8, 5)))


def with_halving() -> nn.Module:
    first = nn.Conv2d(8, 6, 5, stride=2, padding=(2, 1), dilation=(1, 2))
    layers = {"stem": conv(3, 8), "first": first, "second": nn.Conv2d(6, 10, (3, 2), padding="same", dilation=2)}
    project = nn.Conv2d(8, 10, 5, stride=2, padding=(2, 1), dilation=(1, 2))
    return settle(Net(halving_block, **layers, project=project, head=nn.Linear(10, 5)))


def with_gate() -> nn.Module:
    layers = {"stem": conv(3, 8), "down": conv(8, 4, 1), "up": conv(4, 8, 1), "last": conv(8, 6)}
    return settle(Net(squeeze_and_excite, **layers, head=nn.Linear(6, 5)))


CASES: dict[str, tuple[Any, set[str]]] = {
    "plain shortcut": (with_plain_shortcut, {"first"}),
    "projected shortcut": (with_projection, {"first"}),
    "depthwise block": (with_depthwise, {"each"}),
    "strided block, added in place": (with_halving, {"first"}),
    "gate": (with_gate, {"down"}),
    "perceptron": (lambda: settle(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())), set()),
    "chain": (lambda: settle(Net(chain, first=conv(3, 8), second=conv(8, 6), head=nn.Linear(6, 5))), set()),
    "concatenation": (
        lambda: settle(Net(concatenated, stem=conv(3, 8), branch=conv(8, 4), last=conv(12, 6), head=nn.Linear(6, 5))),
        set(),
    ),
}  # fmt: skip


def inputs_of(name: str) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1)) if name == "perceptron" else images()


@pytest.mark.parametrize("name", CASES)
def test_only_what_leaves_a_path_from_inputs_to_outputs_can_go(name: str) -> None:
    make, expected = CASES[name]
    assert removable(trace(make(), inputs_of(name))) == expected


def test_of_two_branches_that_are_all_there_is_one_stays() -> None:
    layers = {"a1": conv(3, 8), "a2": conv(8, 6), "b1": conv(3, 7), "b2": conv(7, 6)}
    graph = trace(settle(Net(two_branches, **layers, head=nn.Linear(6, 5))), images())
    assert len(removable(graph) & {"a1", "b1"}) == 1


@pytest.mark.parametrize("name", [name for name, (_, groups) in CASES.items() if groups])
def test_a_removed_branch_is_one_that_nothing_reads_and_sizes_are_as_predicted(name: str) -> None:
    model = CASES[name][0]()
    graph = trace(model, images())
    gone = dict.fromkeys(removable(graph), NONE)
    small = copy.deepcopy(model).double()
    install(small, remove_channels(small.state_dict(), graph, gone))
    assert_same(outputs(small, images()), silenced(model.double(), graph, gone, images().double()))
    policy = Policy(keep=dict.fromkeys(gone, 0.0))
    graph.check(policy)
    assert graph.shapes(policy) == {n: tuple(v.shape) for n, v in small.state_dict().items() if n in graph.tensors}
    check_graph(model.float(), images(), graph)


def test_removing_another_group_is_refused_by_name() -> None:
    graph = trace(with_plain_shortcut(), images())
    with pytest.raises(PolicyError, match=r"channel group 'second' cannot be removed: .*keep more than 0"):
        graph.check(Policy(keep={"second": 0.0}))
    with pytest.raises(PolicyError, match="channel group 'head' cannot be pruned"):
        graph.check(Policy(keep={"head": 0.0}))


def test_only_a_ratio_of_zero_keeps_nothing() -> None:
    graph = trace(with_plain_shortcut(), images())
    name = group(graph, "first").name
    assert [graph.kept(Policy(keep={name: ratio}))[name] for ratio in (0.0, 1e-9, 1.0)] == [0, 1, 6]
    assert graph.architecture(Policy(keep={name: 0.0})) != graph.architecture(Policy(keep={name: 1e-9}))
    dense = graph.dense_macs - sum(x.positions * 8 * 6 * 9 for x in graph.layers if x.name in ("first", "second"))
    assert graph.macs(Policy(keep={name: 0.0})) == dense


def test_channels_come_back_with_the_modules_that_had_them() -> None:
    model = with_depthwise()
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    expected = outputs(model, images())
    graph = trace(model, images())
    install(model, remove_channels(model.state_dict(), graph, {"each": NONE}))
    assert {type(model.get_submodule(n)) for n in ("expand", "each", "norm", "project")} == {Removed}
    assert list(model.state_dict()) == list(before)
    copied = copy.deepcopy(model).train()
    for net in (model, copied):
        install(net, before)
    assert {name: module is modules[name] for name, module in model.named_modules()} == dict.fromkeys(modules, True)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, images()), expected, strict=True))
    assert all(module.training for module in copied.modules())
    assert_same(outputs(copied.eval(), images()), expected)


def test_a_removed_layer_learns_its_constant() -> None:
    model = with_plain_shortcut()
    graph = trace(model, images())
    install(model, remove_channels(model.state_dict(), graph, {group(graph, "first").name: NONE}))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(images()).square().sum().backward()
    assert model.get_parameter("second.bias").grad is not None
    assert float(model.get_parameter("second.bias").grad.abs().min()) > 0  # type: ignore[union-attr]
    assert model.get_parameter("second.weight").shape == (8, 0, 3, 3)
