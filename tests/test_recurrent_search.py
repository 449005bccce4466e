"""A whole search over a recurrent network: what it writes is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

import autocompress
from autocompress import load_task
from autocompress.artifact.packed import read
from autocompress.report.page import Layers
from autocompress.report.tables import Run
from autocompress.study import Settings, search

SOURCE = """
import torch
from torch import nn
from autocompress import ClassificationTask

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(4, 24, batch_first=True, bidirectional=True), nn.Linear(48, 3)

    def forward(self, x):
        return self.head(self.gru(x)[0].mean(dim=1))

def task():
    torch.manual_seed(0)
    target = torch.arange(96) % 3
    inputs = torch.randn(3, 5, 4)[target] + torch.randn(96, 5, 4)
    parts = [(inputs[i::3], target[i::3]) for i in range(3)]
    return ClassificationTask(Net(), *parts, batch_size=16, name="tones")
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "tones.py").write_text(SOURCE, encoding="utf-8")
    return f"{tmp_path / 'tones.py'}:task"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_packed_front_is_scored_as_it_is_loaded(spec: str, tmp_path: Path) -> None:
    outcome = search(Settings(spec, ("size=40%",), trials=4, epochs=1), tmp_path / "run")
    task, run = load_task(spec), Run.read(tmp_path / "run")
    assert outcome.front
    for trial in run.front:
        path = tmp_path / "run" / trial.artifact
        assert task.score(autocompress.load(path, task), "val") == trial.measured.quality
        sizes = {entry.name: entry.nbytes for entry in read(path).header.entries}
        weights = [name for name in sizes if "weight" in name]
        layers = Layers(run)
        assert len(weights) == len(layers.names) == 5
        assert layers.sizes(trial) == [sizes[name if name in sizes else f"{name}.weight"] for name in layers.names]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_onnx_front_is_timed_and_scored_as_it_is_loaded(spec: str, tmp_path: Path) -> None:
    outcome = search(Settings(spec, ("size=60%",), trials=4, epochs=0, format="onnx"), tmp_path / "run")
    run = Run.read(tmp_path / "run")
    assert outcome.front
    assert all(trial.measured.latency_ms > 0 for trial in run.front)
    assert all((tmp_path / "run" / t.artifact).stat().st_size == t.measured.bytes for t in run.front)
