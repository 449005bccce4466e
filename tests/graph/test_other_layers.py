"""Weights of kinds that are not compressed are named, with their share."""

from __future__ import annotations

import torch
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


def test_a_recurrent_layer_is_named() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(3, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gru(x)[0][:, -1])

    notes = trace(Recurrent().eval(), torch.randn(4, 6, 3)).notes
    assert [note.split()[0] for note in notes if "stays at 16 bits" in note] == ["gru.weight_ih_l0", "gru.weight_hh_l0"]
