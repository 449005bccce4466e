"""Layer solutions on disk: what is read back is what was found, and nothing else is ever believed."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autocompress import spill
from autocompress.engine import database
from autocompress.engine.cache import Cache, digest
from autocompress.engine.database import LayerDatabase, remembered_moments
from autocompress.graph import Graph, Layer
from autocompress.policy import LayerChoice
from autocompress.stored import Half, Quantised, Stored
from autocompress.task import Batch

CONV = Layer("conv", "conv2d", (6, 3, 3, 3))
GROUPED = Layer("grouped", "conv1d", (6, 4, 3), groups=3)
CHOICES = [LayerChoice(2), LayerChoice(3, 0.5, "asymmetric"), LayerChoice(16, 0.6), LayerChoice(32, 0.4)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state(seed: int = 0) -> dict[str, Tensor]:
    return {layer.weight: randn(*layer.shape, seed=seed + i) for i, layer in enumerate((CONV, GROUPED))}


def statistics() -> dict[str, Tensor]:
    inputs = {"conv": randn(1, 27, 40, seed=8).double(), "grouped": randn(3, 12, 40, seed=9).double()}
    return {name: x @ x.mT for name, x in inputs.items()}


def fresh(folder: Path, seed: int = 0) -> LayerDatabase:
    return LayerDatabase(state(seed), statistics(), Cache(folder))


def parts(stored: Stored) -> list[Tensor]:
    assert isinstance(stored, Quantised) or hasattr(stored, "values")
    found = [stored.codes, stored.scale, stored.zero] if isinstance(stored, Quantised) else [stored.values]
    return found if stored.mask is None else [*found, stored.mask]


def same(one: Stored, two: Stored) -> bool:
    pairs = zip(parts(one), parts(two), strict=True)
    return type(one) is type(two) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was worked out, in order."""
    calls: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(database, name)

        def call(*given: Any) -> Any:
            calls.append(name)
            return original(*given)

        return call

    for name in ("solve", "removal_order", "moments"):
        monkeypatch.setattr(database, name, counted(name))
    return calls


@pytest.mark.parametrize("layer", [CONV, GROUPED], ids=lambda layer: layer.name)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_second_run_reads_the_very_solution(
    layer: Layer, choice: LayerChoice, tmp_path: Path, solved: list[str]
) -> None:
    alone = LayerDatabase(state(), statistics()).solve(layer, choice)
    cold = fresh(tmp_path)
    first, error = cold.solve(layer, choice), cold.error_of(layer, choice)
    solved.clear()
    warm = fresh(tmp_path)
    assert same(first, warm.solve(layer, choice))
    assert same(first, alone)
    assert warm.error_of(layer, choice) == error == warm.error(layer, first)
    assert solved == []


def test_another_choice_shares_the_order_of_removal(tmp_path: Path, solved: list[str]) -> None:
    fresh(tmp_path).solve(CONV, LayerChoice(3, 0.5))
    fresh(tmp_path).solve(CONV, LayerChoice(3, 0.7))
    assert solved == ["removal_order", "solve", "solve"]


def test_another_weight_and_other_statistics_find_nothing(tmp_path: Path, solved: list[str]) -> None:
    choice, h = LayerChoice(3), statistics()
    fresh(tmp_path).solve(CONV, choice)
    fresh(tmp_path, seed=1).solve(CONV, choice)
    h["conv"][0, 0, 0] *= 1.01
    LayerDatabase(state(), h, Cache(tmp_path)).solve(CONV, choice)
    assert solved == ["solve"] * 3


def level(folder: Path) -> Path:
    (path,) = folder.glob("level-*.safetensors")
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    save_file({"codes": torch.zeros(3)}, path)


@pytest.mark.parametrize("damage", [cut, flip, empty, foreign])
def test_a_damaged_file_is_reported_solved_again_and_replaced(tmp_path: Path, damage: Any, solved: list[str]) -> None:
    first = fresh(tmp_path).solve(CONV, LayerChoice(3, 0.5))
    damage(level(tmp_path))
    with pytest.warns(UserWarning, match="is ignored and will be replaced"):
        assert same(fresh(tmp_path).solve(CONV, LayerChoice(3, 0.5)), first)
    solved.clear()
    assert same(fresh(tmp_path).solve(CONV, LayerChoice(3, 0.5)), first)
    assert solved == []


def beyond(entry: dict[str, Tensor]) -> None:
    entry["codes"][0, 0, 0, 0] = 8


def infinite(entry: dict[str, Tensor]) -> None:
    entry["scale"][1] = torch.inf


def unmasked(entry: dict[str, Tensor]) -> None:
    entry["mask"][0] ^= 255


def narrow(entry: dict[str, Tensor]) -> None:
    entry["codes"] = entry["codes"][:5]


def revived(entry: dict[str, Tensor]) -> None:
    entry["codes"][:] = 5


def shifted(entry: dict[str, Tensor]) -> None:
    entry["zero"] += 1


def incomplete(entry: dict[str, Tensor]) -> None:
    del entry["zero"]


def retyped(entry: dict[str, Tensor]) -> None:
    entry["scale"] = entry["scale"].double()


def unmeasured(entry: dict[str, Tensor]) -> None:
    entry["error"][0] = torch.nan


@pytest.mark.parametrize(
    "change", [beyond, infinite, unmasked, narrow, revived, shifted, incomplete, retyped, unmeasured]
)
def test_a_sound_file_with_wrong_contents_is_not_believed(tmp_path: Path, change: Any) -> None:
    first = fresh(tmp_path).solve(CONV, LayerChoice(3, 0.5))
    path = level(tmp_path)
    entry = {name: value.clone() for name, value in load_file(path).items()}
    change(entry)
    Cache(tmp_path).write(path.stem, entry)
    with pytest.warns(UserWarning, match="is ignored and will be replaced"):
        assert same(fresh(tmp_path).solve(CONV, LayerChoice(3, 0.5)), first)


@pytest.mark.parametrize("ranks", [torch.zeros(6, 27), torch.arange(162).reshape(6, 27), torch.zeros(6, 27).int()])
def test_a_wrong_order_is_not_believed(tmp_path: Path, ranks: Tensor) -> None:
    first = fresh(tmp_path).solve(CONV, LayerChoice(3, 0.5))
    (path,) = tmp_path.glob("order-*.safetensors")
    level(tmp_path).unlink()
    Cache(tmp_path).write(path.stem, {"ranks": ranks})
    with pytest.warns(UserWarning, match="no order of this layer"):
        assert same(fresh(tmp_path).solve(CONV, LayerChoice(3, 0.5)), first)


def test_a_folder_that_cannot_be_made_costs_only_the_cache_and_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    base = fresh(tmp_path / "file" / "levels")
    with pytest.warns(UserWarning, match="set AUTOCOMPRESS_CACHE to a folder that can be written") as caught:
        found = [base.solve(layer, LayerChoice(3, 0.5)) for layer in (CONV, GROUPED)]
    assert len(caught) == 1
    assert same(found[0], LayerDatabase(state(), statistics()).solve(CONV, LayerChoice(3, 0.5)))


def test_a_full_disk_costs_only_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_named: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("autocompress.engine.cache.write", full)
    with pytest.warns(UserWarning, match="No space left"):
        fresh(tmp_path).solve(CONV, LayerChoice(2))
    assert list(tmp_path.iterdir()) == []


def test_files_that_were_used_longest_ago_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=50_000)
    for age, name in enumerate("ab"):
        cache.write(name, {"x": torch.full((2500,), age)})  # 20 kB each: two fit
        os.utime(tmp_path / f"{name}.safetensors", (age, age))
    assert cache.read("a") is not None
    cache.write("c", {"x": torch.zeros(2500).long()})
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "c"}


def test_no_temporary_files_stay(tmp_path: Path) -> None:
    fresh(tmp_path).solve(CONV, LayerChoice(3, 0.5))
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {"level", "order"}


def in_another_process(folder: Path) -> list[Tensor]:
    torch.set_num_threads(1)
    return parts(fresh(folder).solve(CONV, LayerChoice(3, 0.5)))


@pytest.mark.slow
def test_processes_share_the_folder(tmp_path: Path, solved: list[str]) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        one, two = pool.map(in_another_process, [tmp_path] * 2)
    here = parts(fresh(tmp_path).solve(CONV, LayerChoice(3, 0.5)))
    assert solved == []
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(here, one, two, strict=True))


def test_a_digest_tells_shape_and_type_and_value() -> None:
    given = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(6).int(), torch.ones(6), torch.zeros(0)]
    assert len({digest(value) for value in given}) == len(given)
    assert digest("a", "b") != digest("ab")
    assert digest(randn(4, 3).T) == digest(randn(4, 3).T.contiguous())


# --- statistics -----------------------------------------------------------------------------------------


def model(activation: nn.Module | None = None) -> tuple[nn.Sequential, Graph]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = nn.Sequential(nn.Linear(4, 5), activation or nn.ReLU(), nn.Linear(5, 3)).eval()
    layers = Layer("0", "linear", (5, 4)), Layer("2", "linear", (3, 5))
    return found, Graph(layers, (), {}, 0)


def batches(seed: int = 0) -> list[Batch]:
    return [Batch(randn(6, 4, seed=seed + i), None) for i in range(2)]


def test_statistics_too_large_for_memory_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = remembered_moments(Cache(tmp_path / "a"), *model(), batches(), 0)
    monkeypatch.setattr(spill, "LIMIT_BYTES", 0)
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path))
    found = remembered_moments(Cache(tmp_path / "b"), *model(), batches(), 0)
    again = remembered_moments(Cache(tmp_path / "b"), *model(), batches(), 0)
    assert set(usual) == set(found) == set(again)
    for name, h in usual.items():
        assert torch.equal(found[name], h)
        assert torch.equal(again[name], h)
        assert found[name].data_ptr() != found[name].data_ptr()  # read anew each time


def test_the_calibration_pass_runs_once_for_the_same_model_and_inputs(tmp_path: Path, solved: list[str]) -> None:
    first = remembered_moments(Cache(tmp_path), *model(), batches(), 0)
    again = remembered_moments(Cache(tmp_path), *model(), batches(), 0)
    assert solved == ["moments"]
    assert set(first) == set(again) == {"0", "2"}
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_other_inputs_models_and_seeds_are_looked_at_anew(tmp_path: Path, solved: list[str]) -> None:
    remembered_moments(Cache(tmp_path), *model(), batches(), 0)
    remembered_moments(Cache(tmp_path), *model(), batches(5), 0)
    remembered_moments(Cache(tmp_path), *model(), batches(), 1)
    remembered_moments(Cache(tmp_path), *model(nn.Tanh()), batches(), 0)
    changed, graph = model()
    with torch.no_grad():
        changed[0].bias += 1
    remembered_moments(Cache(tmp_path), changed, graph, batches(), 0)
    assert solved == ["moments"] * 5


def test_a_layer_that_is_never_called_is_remembered_as_such(tmp_path: Path, solved: list[str]) -> None:
    class FirstOnly(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)

    whole, graph = model()
    for _ in range(2):
        assert set(remembered_moments(Cache(tmp_path), FirstOnly(*whole), graph, batches(), 0)) == {"0"}
    assert solved == ["moments"]


def test_foreign_statistics_are_gathered_again(tmp_path: Path, solved: list[str]) -> None:
    first = remembered_moments(Cache(tmp_path), *model(), batches(), 0)
    for path in tmp_path.glob("moments-*"):
        Cache(tmp_path).write(path.stem, {"h": torch.zeros(1, 9, 9)})
    with pytest.warns(UserWarning, match="no statistics of this layer"):
        again = remembered_moments(Cache(tmp_path), *model(), batches(), 0)
    assert solved == ["moments"] * 2
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_halves_read_back_are_halves(tmp_path: Path) -> None:
    for _ in range(2):
        assert isinstance(fresh(tmp_path).solve(CONV, LayerChoice(16, 0.5)), Half)
