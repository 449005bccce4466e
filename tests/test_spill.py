"""Tensors that are read back are those that were stored, in memory or not."""

from pathlib import Path

import pytest
import torch

from autocompress.spill import Spill, limit_beside


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


@pytest.mark.parametrize(
    ("model", "limit"), [(0, 64 * 2**20), (10**8, 64 * 2**20), (4 * 10**8, 10**8), (10**10, 512 * 2**20)]
)
def test_beside_a_model_stays_what_is_small_for_it(model: int, limit: int) -> None:
    assert limit_beside(model) == limit


def test_the_limit_decides_what_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path))
    value = torch.ones(3)
    for expected, inside in ((1000, True), (1001, False)):
        spill = Spill(expected, limit=1000)
        spill["a"] = value
        assert (spill["a"] is value) == inside


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
