"""Tensors that are read back are those that were stored, in memory or not."""

from pathlib import Path

import pytest
import torch

from autocompress.spill import Spill


@pytest.mark.parametrize("expected", [0, 10**12])
def test_what_is_read_is_what_was_stored_last(expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    wanted = {str(i): torch.randn(i + 1, 2, dtype=(torch.float32, torch.float64)[i % 2]) for i in range(6)}
    spill = Spill(expected)
    for name, value in wanted.items():
        spill[name] = value.clone()
    spill["2"] = wanted["2"] = torch.randn(3, 2)
    spill["4"] = spill["4"].add_(1)
    wanted["4"] = wanted["4"] + 1
    assert list(spill) == list(wanted)
    for name, value in wanted.items():
        assert spill[name].dtype == value.dtype
        assert torch.equal(spill[name], value)
    del spill["3"]
    assert "3" not in spill
    assert len(spill) == 5
    with pytest.raises(KeyError):
        spill["3"]


def test_nothing_is_left_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path))
    spill = Spill(10**12)
    spill["a"] = torch.ones(1000)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "file" / "cache"))
    spill = Spill(10**12)
    spill["a"] = torch.ones(3)
    assert torch.equal(spill["a"], torch.ones(3))
