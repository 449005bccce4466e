"""The best of many on `val` is the luckiest of many; `test`, by which nothing is chosen, says what it is worth."""

from __future__ import annotations

import hashlib
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeTask, World
from torch import nn

from autocompress import ClassificationTask, study
from autocompress.front import close_neighbours, standard_error
from autocompress.report.tables import Run, summary
from autocompress.report.write import write_report
from autocompress.task import counted

MEAN, SPREAD = 0.5, 0.05
RUNS = 30


class Noise(FakeTask):
    """Every policy is worth the same; what a split measures of it is that and luck, the same each time."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def score(self, model: Any, split: str) -> float:
        digest = hashlib.sha256(f"{self.seed} {split} {model.policy.key()}".encode()).digest()
        luck = statistics.NormalDist().inv_cdf((int.from_bytes(digest[:6], "big") + 0.5) / 2**48)
        self.scored.append((split, model.policy.key()))
        return MEAN + SPREAD * luck


@pytest.mark.slow
def test_of_pure_noise_val_flatters_and_test_does_not(world: World, tmp_path: Path) -> None:
    picked = []
    for seed in range(RUNS):
        world.task = Noise(seed)
        found = world.search(folder=tmp_path / str(seed), seed=seed, epochs=0, trials=12).picked
        assert found is not None
        picked.append(found)
    error = SPREAD / math.sqrt(RUNS)
    val = statistics.fmean(t.measured.quality for t in picked)
    test = statistics.fmean(t.quality_test for t in picked)
    assert val > MEAN + 4 * error, "if luck did not pay on val, this test could not fail"
    assert abs(test - MEAN) < 3 * error


def test_test_is_read_once_for_each_member_of_the_front_and_for_nothing_else(world: World) -> None:
    world.task = Noise(0)
    outcome = world.search(epochs=0)
    assert sorted(key for split, key in world.task.scored if split == "test") == sorted(
        trial.evaluation.policy.key() for trial in outcome.front
    )


# --- how sure a quality is ------------------------------------------------------------------------------


def test_standard_error_is_that_of_draws() -> None:
    draws = torch.rand(20_000, 150, generator=torch.Generator().manual_seed(0)) < 0.8
    assert standard_error(0.8, 150) == pytest.approx(float(draws.double().mean(1).std()), rel=0.02)


@pytest.mark.parametrize(("share", "inputs"), [(0.5, None), (0.5, 0), (1.2, 10), (-0.1, 10), (math.nan, 10)])
def test_what_is_no_share_has_no_standard_error(share: float, inputs: int | None) -> None:
    assert math.isnan(standard_error(share, inputs))


def test_neighbours_within_an_error_are_counted() -> None:
    error = standard_error(0.8, 100)
    qualities = [0.8, 0.8 - 0.9 * error, 0.5, 0.1]
    assert close_neighbours(qualities, 100) == close_neighbours(qualities[::-1], 100) == 1
    assert close_neighbours(qualities, None) == 0
    assert close_neighbours([0.8], 100) == 0


class Weighted(ClassificationTask):
    def score_batches(self, model: nn.Module, batches: Any) -> float:
        return 2 * super().score_batches(model, batches)


def test_only_a_share_of_right_answers_is_counted() -> None:
    splits = [(torch.zeros(n, 2), torch.zeros(n, dtype=torch.long)) for n in (5, 6, 7)]
    assert [counted(ClassificationTask(nn.Linear(2, 2), *splits), s) for s in ("train", "val", "test")] == [5, 6, 7]
    assert counted(Weighted(nn.Linear(2, 2), *splits), "val") is None
    assert counted(FakeTask(), "val") is None


class Counted(FakeTask):
    """A fake whose quality counts as the share of so few inputs that all of its front is within an error."""

    def counted(self, split: str) -> int:
        return {"train": 9, "val": 4, "test": 3}[split]


def test_small_gaps_on_a_val_that_was_asked_often_are_warned_of(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.task = Counted()
    assert world.search(epochs=0).warnings == ()
    monkeypatch.setattr(study, "REUSED", 20)
    (warning,) = world.search(epochs=0, folder=world.run.parent / "again").warnings
    assert warning.startswith("val was asked 20 times, and ")
    assert "neighbours on the front differ by less than a standard error of accuracy on its 4 inputs (0." in warning
    assert "quote test" in warning


@pytest.mark.slow
def test_report_shows_the_error_where_it_is_known(world: World, tmp_path: Path) -> None:
    world.search(epochs=0, folder=tmp_path / "unknown")
    world.task = Counted()
    world.search(epochs=0)
    known, unknown = (write_report(folder) for folder in (world.run, tmp_path / "unknown"))
    assert known.picked is not None
    quality = known.picked.measured.quality
    assert summary(known)["standard_error"] == pytest.approx(math.sqrt(quality * (1 - quality) / 4))
    assert summary(unknown)["standard_error"] is None
    assert Run.read(world.run).error(0.5, "test") == pytest.approx(math.sqrt(0.25 / 3))
    for folder, expected in ((world.run, True), (tmp_path / "unknown", False)):
        assert ("Bars: one standard error" in (folder / "report.html").read_text()) == expected
        assert ("standard error" in (folder / "summary.md").read_text()) == expected
    assert (world.run / "front.png").read_bytes() != (tmp_path / "unknown" / "front.png").read_bytes()
