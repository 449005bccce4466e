from math import prod

import pytest
import torch
import torch.nn.functional as F
from graph_checks import Net, check, conv, group, images, macs_by_hooks, pool, prunable, settle
from torch import Tensor, nn

from autocompress.engine import Workbench, compress
from autocompress.policy import LayerChoice, Policy
from autocompress.task import ClassificationTask
from autocompress.trace import trace


def tied_linears() -> nn.Module:
    layers = {"stem": nn.Linear(4, 8), "one": nn.Linear(8, 8), "two": nn.Linear(8, 8), "head": nn.Linear(8, 3)}
    net = Net(lambda net, x: net.head(F.relu(net.two(F.relu(net.one(F.relu(net.stem(x))))))), **layers)
    net.two.weight = net.one.weight
    return settle(net)


def tied_embedding() -> nn.Module:
    layers = {"embed": nn.Embedding(20, 8), "hidden": nn.Linear(8, 8), "head": nn.Linear(8, 20, bias=False)}
    net = Net(lambda net, x: net.head(F.relu(net.hidden(net.embed(x)))).mean(dim=1), **layers)
    net.head.weight = net.embed.weight
    return settle(net)


def called_twice() -> nn.Module:
    layers = {"stem": nn.Linear(4, 8), "again": nn.Linear(8, 8), "wide": nn.Linear(8, 6), "head": nn.Linear(6, 3)}
    return settle(
        Net(lambda net, x: net.head(F.relu(net.wide(F.relu(net.again(F.relu(net.again(net.stem(x)))))))), **layers)
    )


def two_scales(net: Net, x: Tensor) -> Tensor:
    x = net.stem(x)
    return net.head(pool(net.shared(x)) + pool(net.shared(F.max_pool2d(x, 2))))


def test_tied_weights_are_one_layer_and_one_tensor() -> None:
    graph = trace(tied_linears(), torch.randn(4, 4))
    assert [layer.name for layer in graph.layers] == ["stem", "one", "head"]
    assert "one.weight" in graph.tensors
    assert "two.weight" not in graph.tensors
    assert {"one.bias", "two.bias"} <= set(graph.tensors)


def test_channels_along_tied_weights_are_frozen() -> None:
    graph = trace(tied_linears(), torch.randn(4, 4))
    assert prunable(graph) == set()
    for name in ("stem", "one", "two"):
        assert "is shared with another layer" in group(graph, name).frozen


def test_tied_weights_are_counted_at_every_use() -> None:
    for model, inputs in ((tied_linears(), torch.randn(4, 4)), (tied_embedding(), torch.randint(0, 20, (4, 7)))):
        assert trace(model, inputs).dense_macs == macs_by_hooks(model, inputs, 4)


def test_tied_weights_are_in_the_dense_size_once() -> None:
    graph = trace(tied_embedding(), torch.randint(0, 20, (4, 7)))
    assert graph.dense_bytes == 4 * sum(prod(shape) for shape, _ in graph.tensors.values())


def test_a_decoder_tied_to_its_embedding_is_frozen() -> None:
    graph = trace(tied_embedding(), torch.randint(0, 20, (4, 7)))
    assert [layer.name for layer in graph.layers] == ["embed", "hidden"]
    assert group(graph, "hidden").frozen == "head.weight is shared with another layer"


def test_tied_layers_stay_tied_after_compression() -> None:
    data = torch.randn(8, 4), torch.randint(0, 3, (8,))
    bench = Workbench(ClassificationTask(tied_linears(), data, data, data))
    model = bench.realise(compress(bench, Policy({"one": LayerChoice(bits=4)})))
    assert model.two.weight is model.one.weight
    assert not torch.equal(model.one.weight, bench.teacher.one.weight)
    assert len(model.one.weight[0].unique()) <= 16


def test_a_module_that_is_called_twice_is_frozen_with_its_neighbours() -> None:
    graph = check(called_twice(), torch.randn(4, 4))
    assert prunable(graph) == {"wide"}
    assert group(graph, "stem") == group(graph, "again")
    assert group(graph, "again").frozen == "again is used 2 times in one forward pass"


def test_a_module_that_is_called_twice_costs_twice() -> None:
    graph = trace(called_twice(), torch.randn(4, 4))
    assert {layer.name: layer.positions for layer in graph.layers} == {"stem": 1, "again": 2, "wide": 1, "head": 1}


def test_calls_at_different_sizes_cost_their_own_sizes() -> None:
    model = settle(Net(two_scales, stem=conv(3, 6), shared=conv(6, 8), head=nn.Linear(8, 3)))
    graph = check(model, images())
    assert graph.layers[1].positions == 64 + 16
    assert group(graph, "shared").frozen == "shared is used 2 times in one forward pass"


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_a_norm_that_is_called_twice_freezes_its_channels(kind: type[nn.Module]) -> None:
    layers = {"one": conv(3, 6), "two": conv(3, 6), "norm": kind(6, affine=True), "head": nn.Linear(6, 3)}
    model = settle(Net(lambda net, x: net.head(pool(F.relu(net.norm(net.one(x))) + net.norm(net.two(x)))), **layers))
    graph = check(model, images())
    assert group(graph, "one").frozen == "norm is used 2 times in one forward pass"


def test_a_shared_block_under_two_names_is_one_layer() -> None:
    block = nn.Linear(8, 8)
    net = settle(nn.Sequential(nn.Linear(4, 8), block, nn.ReLU(), block, nn.Linear(8, 3)))
    graph = check(net, torch.randn(4, 4))
    assert [layer.name for layer in graph.layers] == ["0", "1", "4"]
    assert prunable(graph) == set()
