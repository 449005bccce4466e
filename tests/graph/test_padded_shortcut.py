from math import prod

import pytest
import torch
from graph_checks import check, check_graph, group, prunable, settle
from torch import nn

from autocompress.errors import PolicyError
from autocompress.graph import Graph
from autocompress.policy import Policy
from autocompress.tasks.cifar10 import BasicBlock, architecture
from autocompress.trace import trace

INNER = {f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)}


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return settle(architecture(20))


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def graph(resnet: nn.Module, inputs: torch.Tensor) -> Graph:
    return trace(resnet, inputs)


def test_only_the_widths_inside_blocks_are_prunable(graph: Graph) -> None:
    assert {g.name for g in graph.prunable} == prunable(graph) == INNER


def test_the_stage_widths_are_frozen_because_of_the_padding(graph: Graph) -> None:
    stream = group(graph, "conv1")
    assert stream == group(graph, "layer1.0.conv2") == group(graph, "layer3.2.conv2")
    assert "the model uses them elsewhere too" in stream.frozen


def test_the_pruned_resnet_is_what_the_graph_predicts(graph: Graph, resnet: nn.Module, inputs: torch.Tensor) -> None:
    check_graph(resnet, inputs, graph, ratio=0.3)


def test_every_norm_follows_one_convolution_and_is_folded(graph: Graph) -> None:
    assert len(graph.folded(Policy())) == 19
    assert {layer.name.replace("conv", "bn") for layer in graph.layers[:-1]} == set(graph.folded(Policy()))


def test_resnet20_has_its_published_cost(graph: Graph, resnet: nn.Module) -> None:
    """0.27 million parameters (He et al. 2015, table 6) and 41 million multiply-accumulates."""
    learned = {name for name, _ in resnet.named_parameters()}
    assert sum(prod(shape) for name, (shape, _) in graph.tensors.items() if name in learned) == 269_722
    assert graph.dense_macs == 40_551_040


def test_pruning_a_frozen_group_is_refused_with_its_reason(graph: Graph) -> None:
    stream = group(graph, "conv1")
    with pytest.raises(PolicyError, match=rf"{stream.name}.*cannot be pruned: the model uses them elsewhere"):
        graph.check(Policy(keep={stream.name: 0.5}))
    graph.check(Policy(keep={stream.name: 1.0}))


@pytest.mark.parametrize("pad_first", [True, False])
def test_a_padded_block_next_to_a_plain_one(pad_first: bool) -> None:
    blocks = [BasicBlock(8, 12, 2), BasicBlock(12, 12, 1)] if pad_first else [BasicBlock(8, 8, 1), BasicBlock(8, 12, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)]
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, *head))
    assert prunable(check(model, torch.randn(4, 3, 8, 8))) == {"1.conv1", "2.conv1"}
