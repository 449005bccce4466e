"""What recurrent matrices meet, against sequences run one example and one step at a time by torch's own cells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from autocompress.engine import recurrence

CELLS = {nn.GRU: nn.GRUCell, nn.LSTM: nn.LSTMCell, nn.RNN: nn.RNNCell}
LENGTHS = [5, 2, 3]


def columns(module: Any, call: Any, output: Any) -> dict[str, Tensor]:
    return dict(recurrence.columns(module, call, output))


def sequences(features: int = 3) -> Tensor:
    """(examples, steps, features)."""
    return torch.randn(len(LENGTHS), max(LENGTHS), features, generator=torch.Generator().manual_seed(0))


def build(kind: type[nn.RNNBase], **options: Any) -> nn.RNNBase:
    torch.manual_seed(1)
    return kind(3, 4, batch_first=True, **options).eval()


def cell_of(module: nn.RNNBase, layer: int, suffix: str) -> nn.RNNCellBase:
    """Torch's cell with the weights of one layer and direction."""
    options = {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}
    size = module.input_size if layer == 0 else module.hidden_size * (2 if module.bidirectional else 1)
    cell = CELLS[type(module)](size, module.hidden_size, bias=module.bias, **options)
    for name, _ in list(cell.named_parameters()):
        setattr(cell, name, getattr(module, f"{name}_l{layer}{suffix}"))
    return cell


def unrolled(module: nn.RNNBase, examples: list[Tensor], start: Tensor | None = None) -> dict[str, list[Tensor]]:
    """Columns of each matrix, from the examples (steps, features) one by one; `start` (layers * directions, n, h)."""
    met: dict[str, list[Tensor]] = {}
    suffixes = ["", "_reverse"] if module.bidirectional else [""]
    for number, x in enumerate(examples):
        for layer in range(module.num_layers):
            outputs = []
            for direction, suffix in enumerate(suffixes):
                cell, found = cell_of(module, layer, suffix), [torch.empty(0)] * len(x)
                at = layer * len(suffixes) + direction
                h = torch.zeros(1, module.hidden_size) if start is None else start[at, number][None]
                state: Any = (h, torch.zeros_like(h)) if isinstance(module, nn.LSTM) else h
                for step in range(len(x))[:: -1 if suffix else 1]:
                    hidden = state[0] if isinstance(state, tuple) else state
                    met.setdefault(f"weight_ih_l{layer}{suffix}", []).append(x[step])
                    met.setdefault(f"weight_hh_l{layer}{suffix}", []).append(hidden[0])
                    state = cell(x[step][None], state)
                    found[step] = (state[0] if isinstance(state, tuple) else state)[0]
                outputs.append(torch.stack(found))
            x = torch.cat(outputs, dim=1)
    return met


def products(rows: Tensor) -> Tensor:
    return rows.T @ rows  # does not depend on the rows' order


def assert_met(found: dict[str, Tensor], expected: dict[str, list[Tensor]]) -> None:
    assert set(found) == set(expected)
    for name, rows in expected.items():
        assert len(found[name]) == len(rows)
        torch.testing.assert_close(products(found[name]), products(torch.stack(rows)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", list(CELLS))
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "num_layers": 2}],
    ids=["plain", "deep-and-both-ways", "without-bias"],
)
def test_every_step_of_every_layer_is_met(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    module, x = build(kind, **options), sequences()
    assert_met(columns(module, ((x,), {}), module(x)), unrolled(module, list(x)))


@torch.no_grad()
@pytest.mark.parametrize("kind", list(CELLS))
def test_packed_sequences_meet_no_padding(kind: type[nn.RNNBase]) -> None:
    module, x = build(kind, num_layers=2, bidirectional=True), sequences()
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
    examples = [example[:steps] for example, steps in zip(x, LENGTHS, strict=True)]
    assert_met(columns(module, ((), {"input": packed}), module(packed)), unrolled(module, examples))


@torch.no_grad()
def test_a_first_hidden_state_is_met_in_the_order_of_the_examples() -> None:
    module, x = build(nn.GRU, bidirectional=True), sequences()
    start = torch.randn(2, 3, 4)
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
    examples = [example[:steps] for example, steps in zip(x, LENGTHS, strict=True)]
    found = columns(module, ((packed,), {"hx": start}), module(packed, start))
    assert_met(found, unrolled(module, examples, start))


@torch.no_grad()
def test_steps_first_a_relu_and_a_lone_example() -> None:
    torch.manual_seed(0)
    module, x = nn.RNN(3, 4, nonlinearity="relu").eval(), sequences()
    assert_met(columns(module, ((x.transpose(0, 1),), {}), module(x.transpose(0, 1))), unrolled(module, list(x)))
    assert_met(columns(module, ((x[0],), {}), module(x[0])), unrolled(module, [x[0]]))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_a_projection_reads_what_the_gates_let_out() -> None:
    module, x = build(nn.LSTM, proj_size=2, num_layers=2), sequences()
    found = columns(module, ((x,), {}), module(x))
    assert {name: value.shape[1] for name, value in found.items()} == {
        "weight_ih_l0": 3, "weight_hh_l0": 2, "weight_hr_l0": 4,
        "weight_ih_l1": 2, "weight_hh_l1": 2, "weight_hr_l1": 4,
    }  # fmt: skip
    outputs = found["weight_hr_l1"] @ module.weight_hr_l1.T
    torch.testing.assert_close(outputs.reshape(5, 3, 2).transpose(0, 1), module(x)[0])


@torch.no_grad()
def test_cells_meet_their_inputs_and_states() -> None:
    cell, x, h = nn.LSTMCell(3, 4), torch.randn(6, 3), torch.randn(6, 4)
    found = columns(cell, ((x, (h, h)), {}), cell(x, (h, h)))
    assert torch.equal(found["weight_ih"], x)
    assert torch.equal(found["weight_hh"], h)
    assert not columns(cell, ((x,), {}), cell(x))["weight_hh"].any()


@torch.no_grad()
def test_another_recurrence_is_refused() -> None:
    class Scaled(nn.GRU):
        def forward(self, *given: Any) -> Any:
            outputs, last = super().forward(*given)
            return outputs * 2, last

    module, x = Scaled(3, 4, batch_first=True).eval(), sequences()
    with pytest.raises(ValueError, match="not those of its recurrence"):
        columns(module, ((x,), {}), module(x))
