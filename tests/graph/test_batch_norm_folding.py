from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_checks import Net, assert_same, check, conv, folded, images, outputs, pool, settle
from torch import Tensor, nn

from autocompress.graph import Graph
from autocompress.policy import Policy, Recovery
from autocompress.trace import trace


def norm_of(graph: Graph) -> dict[str, str | None]:
    return {layer.name: layer.batch_norm for layer in graph.layers}


def network(forward: Any, **layers: nn.Module) -> nn.Module:
    return settle(Net(forward, **layers, head=nn.Linear(6, 3)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_after_a_convolution_is_folded(bias: bool, affine: bool) -> None:
    model = settle(
        nn.Sequential(
            conv(3, 6, bias=bias), nn.BatchNorm2d(6, affine=affine), nn.ReLU(), nn.Flatten(), nn.Linear(384, 3)
        )
    )
    graph = check(model, images())
    assert norm_of(graph) == {"0": "1", "4": None}
    assert {"0.bias"} <= set(graph.contents(Policy()))
    assert not any(name.startswith("1.") for name in graph.contents(Policy()))


def test_a_policy_may_leave_norms_alone() -> None:
    model = settle(nn.Sequential(conv(3, 6, bias=False), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(384, 3)))
    contents = trace(model, images()).contents(Policy(recovery=Recovery(fold_bn=False)))
    assert {"1.weight", "1.bias", "1.running_mean", "1.running_var"} <= set(contents)
    assert "0.bias" not in contents
    assert "1.num_batches_tracked" not in contents


def test_a_norm_after_a_linear_layer_is_folded() -> None:
    graph = check(
        settle(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))), torch.randn(4, 5)
    )
    assert norm_of(graph) == {"0": "1", "3": None}


def test_several_norms_are_folded_each_into_its_own_layer() -> None:
    layers = [conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 6, bias=False), nn.BatchNorm2d(6), nn.Flatten()]
    assert norm_of(check(settle(nn.Sequential(*layers, nn.Linear(384, 3))), images())) == {
        "0": "1",
        "3": "4",
        "6": None,
    }


def test_a_folded_norm_may_have_several_readers() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.norm(net.stem(x)))
        return net.head(pool(net.one(y) + net.two(y)))

    model = network(forward, stem=conv(3, 5), norm=nn.BatchNorm2d(5), one=conv(5, 6), two=conv(5, 6))
    assert norm_of(check(model, images()))["stem"] == "norm"


def test_a_norm_shared_by_two_layers_is_not_folded() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(pool(F.relu(net.norm(net.one(x))) + F.relu(net.norm(net.two(x)))))

    model = network(forward, one=conv(3, 6), two=conv(3, 6), norm=nn.BatchNorm2d(6))
    assert set(norm_of(check(model, images())).values()) == {None}


def test_two_norms_of_one_layer_are_not_folded() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.stem(x)
        return net.head(pool(F.relu(net.one(y)) + F.relu(net.two(y))))

    model = network(forward, stem=conv(3, 6), one=nn.BatchNorm2d(6), two=nn.BatchNorm2d(6))
    assert norm_of(check(model, images()))["stem"] is None


def test_a_layer_whose_raw_output_is_also_read_keeps_its_norm() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.stem(x)
        return net.head(pool(F.relu(net.norm(y)) + y))

    model = network(forward, stem=conv(3, 6), norm=nn.BatchNorm2d(6))
    assert norm_of(check(model, images()))["stem"] is None


def test_only_the_inexact_one_of_several_norms_stays() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.first(x)
        y = F.relu(net.raw(y)) + y
        return net.head(pool(F.relu(net.norm(net.second(y)))))

    layers = {"first": conv(3, 6), "raw": nn.BatchNorm2d(6), "second": conv(6, 6), "norm": nn.BatchNorm2d(6)}
    assert norm_of(check(network(forward, **layers), images())) == {"first": None, "second": "norm", "head": None}


def test_a_norm_before_the_activation_of_the_next_layer_is_not_folded() -> None:
    """Pre-activation blocks: the stream is read raw by the shortcut and normalised by the block."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = x + net.second(F.relu(net.norm2(net.first(F.relu(net.norm1(x))))))
        return net.head(pool(F.relu(net.last(x))))

    layers = {"stem": conv(3, 6), "first": conv(6, 5), "second": conv(5, 6)}
    norms = {"norm1": nn.BatchNorm2d(6), "norm2": nn.BatchNorm2d(5), "last": nn.BatchNorm2d(6)}
    graph = check(network(forward, **layers, **norms), images())
    assert norm_of(graph) == {"stem": None, "first": "norm2", "second": None, "head": None}


@pytest.mark.parametrize("between", [nn.ReLU(), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Hardtanh(inplace=True)])
def test_anything_between_layer_and_norm_prevents_folding(between: nn.Module) -> None:
    model = settle(
        nn.Sequential(conv(3, 6), between, nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    )
    assert norm_of(check(model, images()))["0"] is None


def test_an_in_place_activation_after_the_norm_does_not_prevent_folding() -> None:
    model = settle(nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(384, 3)))
    assert norm_of(check(model, images()))["0"] == "1"


def test_a_norm_with_batch_statistics_is_not_folded() -> None:
    model = settle(
        nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), nn.Linear(6, 3))
    )
    graph = trace(model, torch.randn(4, 5))
    assert norm_of(graph)["0"] is None


def test_a_norm_over_steps_of_a_sequence_is_not_folded() -> None:
    """Linear runs along the last dimension, BatchNorm1d along the second."""
    model = settle(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(7), nn.Flatten(), nn.Linear(42, 3)))
    assert norm_of(check(model, torch.randn(4, 7, 5)))["0"] is None


def test_a_norm_over_as_many_steps_as_features_is_not_folded() -> None:
    model = settle(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Flatten(), nn.Linear(49, 3)))
    assert norm_of(check(model, torch.randn(4, 7, 5)))["0"] is None


@pytest.mark.parametrize("words", [9, 6])
def test_a_norm_after_an_embedding_is_not_folded(words: int) -> None:
    model = settle(nn.Sequential(nn.Embedding(words, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))
    assert norm_of(check(model, torch.tensor([0, 1, 2, 3])))["0"] is None


def test_a_norm_that_is_called_by_keyword() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(pool(F.relu(net.norm(input=net.stem(input=x)))))

    model = network(forward, stem=conv(3, 6), norm=nn.BatchNorm2d(6))
    graph = trace(model, images())
    assert_same(outputs(folded(model, graph), images()), outputs(model, images()))


def test_a_norm_that_wipes_a_channel_out_is_folded() -> None:
    model = settle(nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(384, 3)))
    with torch.no_grad():
        model[1].weight[:2] = 0.0
        model[1].running_var[0] = 0.0
    assert norm_of(check(model, images()))["0"] == "1"
