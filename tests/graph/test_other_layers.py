"""Weights of kinds that are not compressed are named, with their share."""

from __future__ import annotations

import torch
from graph_checks import check, prunable
from torch import Tensor, nn

from autocompress.trace import trace


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.ConvTranspose1d(2, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x).mean(dim=2))


def test_a_transposed_convolution_is_named_with_its_share() -> None:
    graph = trace(Mixed().eval(), torch.randn(4, 2, 5))
    assert [layer.name for layer in graph.layers] == ["head"]
    total = 2 * 4 * 3 + 4 + 4 * 2 + 2
    note = f"up.weight stays at 16 bits ({24 / total:.1%} of the weights): ConvTranspose1d is not compressed"
    assert graph.notes == (note,)


class Recurrent(nn.Module):
    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.stem, self.rnn, self.head = nn.Conv1d(3, 6, 1), recurrent, nn.Linear(width, 2)
        self.wide = nn.Conv1d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.stem(x).relu())
        return self.head(self.rnn(x.transpose(1, 2))[0].mean(dim=1))


def test_each_matrix_of_a_recurrent_module_is_a_layer() -> None:
    lstm = nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True, proj_size=3)
    graph = trace(Recurrent(lstm, 6).eval(), torch.randn(4, 3, 7))
    found = {layer.name: layer for layer in graph.layers if layer.kind == "recurrent"}
    matrices = {f"rnn.{name}": tuple(p.shape) for name, p in lstm.named_parameters() if p.ndim == 2}
    assert {name: layer.shape for name, layer in found.items()} == matrices
    assert len(matrices) == 12
    assert {(layer.weight, layer.module, layer.positions) for layer in found.values()} == {
        (name, "rnn", 7) for name in matrices
    }
    assert graph.notes == ()


def test_channels_before_a_recurrent_module_can_be_pruned() -> None:
    graph = check(Recurrent(nn.GRU(4, 5, batch_first=True), 5).eval(), torch.randn(4, 3, 7))
    assert prunable(graph) == {"stem"}
    assert {g.name: g.frozen for g in graph.groups if g.name != "stem"} == {
        "wide": "recurrent units are not pruned",
        "rnn": "recurrent units are not pruned",
        "head": "no layer reads its channels: they are the model's output",
    }


def test_units_of_a_recurrent_module_that_reads_the_inputs_are_a_group_too() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 5, batch_first=True, bidirectional=True), nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0].mean(dim=1))

    graph = check(First().eval(), torch.randn(4, 6, 3))
    assert {g.name: g.channels for g in graph.groups} == {"rnn": 10, "head": 2}
    assert {g.name: g.frozen for g in graph.groups}["rnn"] == "recurrent units are not pruned"


def test_cells_are_called_once_a_step() -> None:
    class Stepped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.LSTMCell(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state[0])

    graph = check(Stepped().eval(), torch.randn(4, 6, 3))
    assert {layer.name: layer.positions for layer in graph.layers} == {
        "cell.weight_ih": 6,
        "cell.weight_hh": 6,
        "head": 1,
    }
    assert all(g.frozen for g in graph.groups)


def test_a_normalised_recurrent_weight_is_named() -> None:
    gru = torch.nn.utils.parametrizations.weight_norm(nn.GRU(4, 5, batch_first=True), "weight_hh_l0")
    graph = trace(Recurrent(gru, 5).eval(), torch.randn(4, 3, 7))
    assert [layer.name for layer in graph.layers if layer.kind == "recurrent"] == ["rnn.weight_ih_l0"]
    assert graph.notes[0].startswith("rnn is left as it is: its weight_hh_l0 is computed by a parametrization")
