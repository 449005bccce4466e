"""Layers that a model calls by keyword are compressed like any others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autocompress import ClassificationTask, LayerChoice, Policy, Recovery, Workbench, compress


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(input=torch.relu(self.norm(input=self.first(input=x))))


@pytest.fixture(scope="module")
def bench() -> Workbench:
    torch.manual_seed(0)
    data = torch.randn(64, 6), torch.arange(64) % 3
    return Workbench(ClassificationTask(Named().eval(), data, data, data, batch_size=16))


def test_a_norm_called_by_keyword_is_folded(bench: Workbench) -> None:
    assert [layer.batch_norm for layer in bench.graph.layers] == ["norm", None]


@pytest.mark.parametrize("criterion", ["entropy", "gini"])
def test_activations_of_keyword_calls_rank_channels(bench: Workbench, criterion: str) -> None:
    found = compress(bench, Policy(keep={"first": 0.5}, criterion=criterion))  # type: ignore[arg-type]
    assert found.tensors["second.weight"].dense().shape == (3, 4)


def test_the_database_sees_keyword_calls(bench: Workbench) -> None:
    recovery = Recovery(reestimate_bn=False, fold_bn=False)
    layers = {"first": LayerChoice(2), "second": LayerChoice(2)}
    solved = compress(bench, Policy(layers, recovery=recovery, solver="database")).tensors
    rounded = compress(bench, Policy(layers, recovery=recovery)).tensors
    assert all(not torch.equal(solved[n].dense(), rounded[n].dense()) for n in ("first.weight", "second.weight"))
