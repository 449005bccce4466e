"""Recurrent matrices are solved, trained and stored as other weights are, whatever module holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from autocompress import ClassificationTask, LayerChoice, Policy, Recovery, Workbench, compress
from autocompress.artifact.packed import build, pack, unpack
from autocompress.measure.size import Size
from autocompress.stored import Quantised


class Classifier(nn.Module):
    """Classes of sequences (examples, steps, 4), from the states of all steps."""

    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.stem, self.rnn, self.head = nn.Linear(4, 6), recurrent, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(torch.relu(self.stem(x)))[0].mean(dim=1))


class Stepped(Classifier):
    """The same with a cell."""

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in torch.relu(self.stem(x)).unbind(1):
            state = self.rnn(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Packed(Classifier):
    """The same with sequences of several lengths."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = 3 + torch.arange(len(x)) % 5
        packed = pack_padded_sequence(torch.relu(self.stem(x)), lengths, batch_first=True, enforce_sorted=False)
        last = self.rnn(packed)[1]
        return self.head(last.transpose(0, 1).flatten(1))


BUILD: dict[str, Callable[[], nn.Module]] = {
    "gru": lambda: Classifier(nn.GRU(6, 8, num_layers=2, bidirectional=True, batch_first=True), 16),
    "lstm": lambda: Classifier(nn.LSTM(6, 8, batch_first=True, bias=False), 8),
    "projected": lambda: Classifier(nn.LSTM(6, 8, batch_first=True, proj_size=5), 5),
    "rnn": lambda: Classifier(nn.RNN(6, 8, nonlinearity="relu", batch_first=True), 8),
    "packed": lambda: Packed(nn.GRU(6, 8, batch_first=True, bidirectional=True), 16),
    "lstm cell": lambda: Stepped(nn.LSTMCell(6, 8), 8),
    "gru cell": lambda: Stepped(nn.GRUCell(6, 8), 8),
    "rnn cell": lambda: Stepped(nn.RNNCell(6, 8, bias=False), 8),
}

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


def data(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    targets = torch.arange(64) % 3
    patterns = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(9))
    return patterns[targets] + torch.randn(64, 7, 4, generator=draw), targets


def bench_of(model: nn.Module) -> Workbench:
    return Workbench(ClassificationTask(model, data(0), data(1), data(2), batch_size=16, name="sequences"))


def built(kind: str) -> Workbench:
    torch.manual_seed(0)
    return bench_of(BUILD[kind]())


def policy_of(bench: Workbench, **recovery: Any) -> Policy:
    layers = {layer.name: LayerChoice(4, 0.25) for layer in bench.graph.layers}
    return Policy(layers, solver="database", recovery=Recovery(**recovery))


def matrices(bench: Workbench) -> list[str]:
    return [layer.name for layer in bench.graph.layers if layer.kind == "recurrent"]


@pytest.mark.parametrize("kind", list(BUILD))
def test_the_database_solves_every_matrix_better_than_rounding(kind: str) -> None:
    bench, choice = built(kind), LayerChoice(3, 0.5)
    for layer in bench.graph.layers:
        assert bench.compensates(layer, "database"), layer.name
        solved, rounded = (bench.level(layer, choice, solver) for solver in ("database", "nearest"))
        assert isinstance(solved, Quantised)
        assert int((~solved.mask).sum()) == choice.zeros(solved.codes.numel())
        assert bench.database.error(layer, solved) < bench.database.error(layer, rounded), layer.name


@pytest.mark.parametrize("kind", list(BUILD))
def test_what_is_scored_is_what_is_loaded(kind: str) -> None:
    bench = built(kind)
    compressed = compress(bench, policy_of(bench, epochs=0))
    assert all(isinstance(compressed.tensors[name], Quantised) for name in matrices(bench))
    outputs = bench.realise(compressed)(data(1)[0])
    size = Size(bench.graph, bench.task.name, bench.task.metric)
    header = size.header(compressed.policy, compressed.codings())
    content = pack(header, compressed.tensors, 0.5, compressed.policy.key())
    assert torch.equal(build(unpack(content), bench.task.model())(data(1)[0]), outputs)
    assert len(content) == size(compressed.policy, compressed.codings())


@pytest.mark.parametrize("kind", ["gru", "projected", "packed", "lstm cell"])
@pytest.mark.parametrize("scales", ["fixed", "learned"])
def test_recovery_moves_codes_of_recurrent_weights_on_their_grids(kind: str, scales: Any) -> None:
    bench = built(kind)
    before = compress(bench, policy_of(bench, epochs=0))
    after = compress(bench, policy_of(bench, epochs=4, lr=0.5, scales=scales))
    moved = 0
    for name in matrices(bench):
        old, new = before.tensors[name], after.tensors[name]
        assert isinstance(old, Quantised)
        assert isinstance(new, Quantised)
        assert torch.equal(old.mask, new.mask)
        assert torch.equal(old.scale, new.scale) == (scales == "fixed")
        moved += int((old.codes != new.codes).sum())
    assert moved
    loss = nn.functional.cross_entropy
    losses = [float(loss(bench.realise(each)(data(0)[0]), data(0)[1])) for each in (before, after)]
    assert losses[1] < losses[0]


def test_a_recurrence_of_its_own_is_rounded_with_a_warning() -> None:
    class Doubled(nn.GRU):
        def forward(self, *given: Any) -> Any:
            outputs, last = super().forward(*given)
            return outputs * 2, last

    torch.manual_seed(0)
    bench = bench_of(Classifier(Doubled(6, 8, batch_first=True), 8))
    with pytest.warns(UserWarning, match="rnn.weight_ih_l0, rnn.weight_hh_l0 are rounded to nearest"):
        compressed = compress(bench, policy_of(bench, epochs=0))
    plain = compress(bench, Policy(policy_of(bench).layers, solver="nearest"))
    for name in matrices(bench):
        assert torch.equal(compressed.tensors[name].dense(), plain.tensors[name].dense())


def test_a_model_that_is_nothing_but_a_recurrent_module() -> None:
    class Bare(nn.GRU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[1][0]

    torch.manual_seed(0)
    bench = bench_of(Bare(4, 3, batch_first=True))
    assert [(x.name, x.weight, x.module) for x in bench.graph.layers] == [
        ("weight_ih_l0", "weight_ih_l0", ""),
        ("weight_hh_l0", "weight_hh_l0", ""),
    ]
    with pytest.warns(UserWarning, match="rounded to nearest"):  # its output is not that of a GRU
        assert compress(bench, policy_of(bench, epochs=1)).tensors["weight_hh_l0"].dense().shape == (9, 3)
