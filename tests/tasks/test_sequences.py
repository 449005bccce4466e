"""The example of sequences reads its data from a package's folder, and both networks are compressed as a whole."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from example_files import example

from autocompress import TaskError
from autocompress.trace import trace


@pytest.fixture
def sequences(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return example("sequences", monkeypatch)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package aeon whose import would fail, with forty recordings in each part: c + t / 100 in channel c, step t."""
    folder = tmp_path / "aeon" / "datasets" / "data" / "JapaneseVowels"
    folder.mkdir(parents=True)
    (tmp_path / "aeon" / "__init__.py").write_text("raise ImportError('not needed')", encoding="utf-8")
    for part, steps in (("TRAIN", 7), ("TEST", 29)):
        channels = [",".join(f"{c + t / 100}" for t in range(steps)) for c in range(1, 13)]
        lines = [":".join([*channels, str(1 + i % 9)]) for i in range(40)]
        text = "#about: a,b\n@classLabel true 1 2 3\n@data\n" + "\n".join(lines) + "\n"
        (folder / f"JapaneseVowels_{part}.ts").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("package")
def test_recordings_end_at_the_last_step(sequences: ModuleType) -> None:
    inputs, speakers = sequences.recordings()
    assert inputs.shape == (80, 29, 12)
    assert inputs.dtype == np.float32
    np.testing.assert_array_equal(speakers, [i % 9 for i in range(40)] * 2)
    long = np.arange(1, 13)[None] + np.arange(29)[:, None] / 100
    np.testing.assert_allclose(inputs[-1], long, rtol=1e-6)
    np.testing.assert_allclose(inputs[0, -7:], long[:7], rtol=1e-6)
    assert not inputs[0, :-7].any()


def test_a_package_that_is_missing_is_named(sequences: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(TaskError, match="pip install --no-deps aeon"):
        sequences.gru()


def test_noise_leaves_padding_alone(sequences: ModuleType) -> None:
    inputs = torch.zeros(5, 29, 12)
    inputs[:, 10:] = 3.0
    changed = sequences.noisy(inputs, torch.Generator().manual_seed(0))
    assert not changed[:, :10].any()
    assert bool((changed[:, 10:] != 3.0).all())
    assert float((changed[:, 10:] / 3 - 1).abs().max()) < 0.25


@pytest.mark.parametrize(("network", "kinds"), [("Recurrent", {"recurrent": 8, "linear": 1}),
                                                ("Convolutional", {"conv1d": 3, "linear": 1})])  # fmt: skip
def test_no_weight_of_the_networks_is_left_out(sequences: ModuleType, network: str, kinds: dict[str, int]) -> None:
    graph = trace(getattr(sequences, network)().eval(), torch.randn(4, 29, 12))
    found = [layer.kind for layer in graph.layers]
    assert {kind: found.count(kind) for kind in found} == kinds
    assert graph.notes == ()
