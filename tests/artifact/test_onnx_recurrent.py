"""Recurrent weights are stored at their own width, each by itself, and ONNX Runtime's operators compute with them."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest
import torch
from torch import Tensor, nn

from autocompress import ClassificationTask, LayerChoice, Policy, Workbench, compress
from autocompress.artifact import onnx as artifact
from autocompress.artifact.onnx import About, Candidate, Exporter
from autocompress.artifact.onnx_graph import operators
from autocompress.errors import ExportError
from autocompress.runtime import session

ABOUT = About("task", "accuracy", "0123456789abcdef", 0.5)


class Classifier(nn.Module):
    """Classes of sequences (examples, steps, 5), from the states of all steps."""

    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.rnn, self.head = recurrent, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(dim=1))


class Stepped(Classifier):
    """The same with a cell, and of the last state."""

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.rnn(step, state)
        assert state is not None
        return self.head(state[0])


BUILD: dict[str, Callable[[], nn.Module]] = {
    "GRU": lambda: Classifier(nn.GRU(5, 24, num_layers=2, bidirectional=True, batch_first=True), 48),
    "LSTM": lambda: Classifier(nn.LSTM(5, 48, batch_first=True, bias=False), 48),
    "RNN": lambda: Classifier(nn.RNN(5, 24, batch_first=True), 24),
    "projected": lambda: Classifier(nn.LSTM(5, 24, batch_first=True, proj_size=7), 7),
    "cell": lambda: Stepped(nn.LSTMCell(5, 24), 24),
}


def opened(kind: str) -> tuple[Workbench, Exporter, Tensor]:
    torch.manual_seed(0)
    data = torch.randn(8, 6, 5), torch.arange(8) % 3
    bench = Workbench(ClassificationTask(BUILD[kind](), data, data, data))
    return bench, Exporter(bench.graph.layers, candidate(bench, Policy()), [data[0]]), data[0]


def candidate(bench: Workbench, policy: Policy) -> Candidate:
    made = compress(bench, policy)
    return Candidate(made.tensors, bench.realise(made), bench.graph.architecture(policy), policy.activations)


def policy(bench: Workbench, bits: int, sparsity: float, activations: int) -> Policy:
    return Policy({x.name: LayerChoice(bits, sparsity) for x in bench.graph.layers}, activations=activations)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_a_projection_which_the_operator_does_not_know_is_refused() -> None:
    with pytest.raises(ExportError, match="LSTM"):
        opened("projected")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN", "cell"])
def test_a_file_computes_what_the_model_does_with_each_matrix_stored_small(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, exporter, inputs = opened(kind)
    monkeypatch.setattr(artifact, "export", lambda *_: pytest.fail("the exported graph did not fit"))
    sizes = {}
    for bits, sparsity, activations in ((32, 0.0, 32), (8, 0.0, 8), (4, 0.0, 32), (2, 0.75, 8)):
        made = candidate(bench, policy(bench, bits, sparsity, activations))
        content = exporter.build(made, ABOUT)
        ran = exporter.module(session(content))
        with torch.no_grad():
            found, wanted = ran(inputs), made.model(inputs)
        tolerance = 1e-5 if activations == 32 else 0.05  # the classifier's integer kernel rounds its inputs
        assert float((found - wanted).abs().max()) < tolerance * float(wanted.abs().max().clamp_min(0.1))
        sizes[bits] = len(content)
        assert operators(onnx.load_from_string(content))[kind] == {"GRU": 2, "LSTM": 1}.get(kind, 0)
    if kind not in ("GRU", "LSTM"):  # a node for each step
        return
    weights = sum(layer.shape[0] * layer.shape[1] for layer in bench.graph.layers)
    assert sizes[32] - sizes[8] > 2.5 * weights  # a scale for each row, and a few nodes for each matrix
    assert sizes[8] - sizes[4] > 0.3 * weights
    assert sizes[4] - sizes[2] > 0.1 * weights
