"""The example of a library's model: dictionaries in and out, and heads that go whole."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from example_files import example

from autocompress.engine import Workbench, compress
from autocompress.policy import LayerChoice, Policy, Recovery

pytestmark = pytest.mark.slow  # importing transformers alone takes ten seconds


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("transformers")
    return example("library", monkeypatch)


def test_batches_are_dictionaries_and_splits_do_not_overlap(library: ModuleType) -> None:
    parts = library.splits()
    assert {name: len(y) for name, (_, y) in parts.items()} == {"train": 1078, "val": 359, "test": 360}
    batch = next(iter(library.Digits(library.network, **parts).batches("val")))
    assert set(batch.inputs) == {"pixel_values"}
    assert batch.inputs["pixel_values"].shape[1:] == (1, 8, 8)


def test_heads_go_whole_and_what_is_left_learns(library: ModuleType) -> None:
    torch.manual_seed(0)
    model = library.network().eval()
    bench = Workbench(library.Digits(model, **library.splits(), batch_size=64))
    heads = [g for g in bench.graph.prunable if "attention" in g.name]
    assert len(heads) == 4
    keep = dict.fromkeys([group.name for group in heads], 0.5)
    layers = {layer.name: LayerChoice(4) for layer in bench.graph.layers}
    recovery = Recovery(epochs=1, lr=0.05, optimizer="adam", distill_weight=0.0)
    trained = compress(bench, Policy(layers, keep, recovery=recovery, solver="database"))
    assert trained.curve.loss[-1] < trained.curve.loss[0]
    kept = bench.realise(trained)
    assert sum(p.numel() for p in kept.parameters()) < sum(p.numel() for p in model.parameters())
    assert kept(torch.zeros(2, 1, 8, 8)).logits.shape == (2, 10)
