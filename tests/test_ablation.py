"""An ablation trains what it says, resumes, reads no test data, and its arithmetic is that of the textbook."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import Killed, World

from autocompress.ablation import FULL, ablate, fill, markdown, read_ablation, summarise, variants
from autocompress.errors import AutocompressError
from autocompress.policy import LayerChoice, Policy, Recovery
from autocompress.report.tables import Run
from autocompress.report.write import write_report
from autocompress.study import Progress
from autocompress.trial import Evaluation, Measurement

EVERYTHING = Recovery(
    epochs=2,
    hint_weight=0.2,
    adjust_factor=0.5,
    gradient="clip",
    warmup=0.1,
    scales="learned",
    ema=0.99,
    optimizer="muon",
    views=2,
)


def policy(recovery: Recovery) -> Policy:
    return Policy({"conv1": LayerChoice(4)}, recovery=recovery)


# --- what is left out ---


def test_each_ingredient_is_left_out_alone() -> None:
    found = {name: p.recovery for name, p in variants(policy(EVERYTHING)).items()}
    assert found.pop(FULL) == EVERYTHING
    off = {
        "no distillation": {"distill_weight": 0.0},
        "constant rate": {"decay": "constant"},
        "one view for the teacher": {"views": 1},
        "no hints": {"hint_weight": 0.0},
        "no warm-up": {"warmup": 0.0},
        "no plateau adjustment": {"adjust_factor": 1.0},
        "plain gradients": {"gradient": "none"},
        "SGD in place of Muon": {"optimizer": "sgd"},
        "fixed scales": {"scales": "fixed"},
        "last weights, not their mean": {"ema": 0.0},
        "trained batch-norm statistics": {"reestimate_bn": False},
    }
    assert found == {name: replace(EVERYTHING, **change) for name, change in off.items()}


def test_only_what_is_used_is_left_out_but_distillation_and_decay_always() -> None:
    plain = Recovery(epochs=1, distill_weight=0.0, decay="constant", reestimate_bn=False)
    found = variants(policy(plain))
    assert list(found) == [FULL, "no distillation", "constant rate"]
    assert len({p.key() for p in found.values()}) == 1


# --- trainings ---


class Lab:
    """Trains by a formula, and remembers what it was asked."""

    def __init__(self, quality: Callable[[Policy, int], float | None]) -> None:
        self.quality, self.asked, self.kill_at = quality, [], -1  # type: ignore[var-annotated]

    def __call__(self, trained: Policy, seed: int, progress: Callable[[int, int], None]) -> Evaluation:
        if len(self.asked) == self.kill_at:
            raise Killed
        self.asked.append((trained.key(), seed))
        progress(1, 2)
        quality = self.quality(trained, seed)
        if quality is None:
            return Evaluation(trained, seed, 1, "failed", error="Traceback\nFloatingPointError: nan", seconds=1.0)
        return Evaluation(trained, seed, 1, "ok", Measurement(100, 10, quality, 1 - quality, 1.0), seconds=1.0)


def asked_for(recovery: Recovery, seeds: list[int]) -> dict[str, Any]:
    return {
        "trial": 7, "task": "t", "metric": "accuracy", "direction": "max", "dense_quality": 0.9, "quality_before": 0.5,
        "epochs": recovery.epochs, "seeds": seeds, "results": [],
        "variants": {name: p.key() for name, p in variants(policy(recovery)).items()},
    }  # fmt: skip


def quality_of(trained: Policy, seed: int) -> float:
    r = trained.recovery
    return 0.6 + 0.1 * r.distill_weight + (0.05 if r.decay != "constant" else 0.0) + 0.01 * seed**2


def test_every_recipe_is_trained_once_with_every_seed(tmp_path: Path) -> None:
    lab, data, path = Lab(quality_of), asked_for(EVERYTHING, [3, 4, 5]), tmp_path / "a.json"
    fill(data, variants(policy(EVERYTHING)), lab, path, lambda _: None)
    expected = {(p.key(), seed) for p in variants(policy(EVERYTHING)).values() for seed in (3, 4, 5)}
    assert len(lab.asked) == len(expected) == 36
    assert set(lab.asked) == expected
    assert [seed for _, seed in lab.asked] == [3] * 12 + [4] * 12 + [5] * 12  # one whole table after another


def test_recipes_that_are_the_same_are_trained_once(tmp_path: Path) -> None:
    plain = Recovery(epochs=1, distill_weight=0.0, reestimate_bn=False)
    lab, data = Lab(quality_of), asked_for(plain, [0, 1])
    fill(data, variants(policy(plain)), lab, tmp_path / "a.json", lambda _: None)
    assert len(lab.asked) == 4
    rows = {r["variant"]: r for r in summarise(data)["rows"]}
    assert rows["no distillation"]["mean"] == rows[FULL]["mean"]
    assert rows["no distillation"]["difference"] == 0.0


@pytest.mark.parametrize("at", [0, 1, 7, 14])
def test_killed_ablation_goes_on_where_it_was(tmp_path: Path, at: int) -> None:
    path, wanted = tmp_path / "a.json", variants(policy(Recovery(epochs=1)))
    whole, lab = asked_for(Recovery(epochs=1), [0, 1, 2, 3]), Lab(quality_of)
    fill(whole, wanted, lab, tmp_path / "whole.json", lambda _: None)
    killed = Lab(quality_of)
    killed.kill_at = at
    with pytest.raises(Killed):
        fill(asked_for(Recovery(epochs=1), [0, 1, 2, 3]), wanted, killed, path, lambda _: None)
    known = read_ablation(path)
    data = asked_for(Recovery(epochs=1), [0, 1, 2, 3]) | {"results": known["results"] if known else []}
    later = Lab(quality_of)
    fill(data, wanted, later, path, lambda _: None)
    assert killed.asked + later.asked == lab.asked
    assert summarise(data) == summarise(whole)


def test_progress_counts_up_to_all_trainings(tmp_path: Path) -> None:
    seen: list[Progress] = []
    data = asked_for(Recovery(epochs=1), [0])
    fill(data, variants(policy(Recovery(epochs=1))), Lab(quality_of), tmp_path / "a.json", seen.append)
    assert [p.done for p in seen] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert {p.total for p in seen} == {4}
    assert seen[1].detail == f"{FULL}, seed 0"


# --- arithmetic ---


def test_means_spreads_and_paired_differences(tmp_path: Path) -> None:
    data, seeds = asked_for(EVERYTHING, [0, 1, 5]), np.array([0, 1, 5])
    fill(data, variants(policy(EVERYTHING)), Lab(quality_of), tmp_path / "a.json", lambda _: None)
    rows = {r["variant"]: r for r in summarise(data)["rows"]}
    full = 0.6 + 0.09 + 0.05 + 0.01 * seeds**2
    assert rows[FULL]["mean"] == pytest.approx(full.mean())
    assert rows[FULL]["std"] == pytest.approx(full.std(ddof=1))
    assert rows[FULL]["difference"] is None
    assert rows["no distillation"]["difference"] == pytest.approx(-0.09)
    assert rows["no distillation"]["difference_std"] == pytest.approx(0.0, abs=1e-9)
    assert rows["constant rate"]["difference"] == pytest.approx(-0.05)
    assert all(r["n"] == 3 for r in rows.values())
    assert "| no distillation | 3 | 0 |" in markdown(summarise(data))
    assert "-0.0900" in markdown(summarise(data))


def test_failed_trainings_are_counted_and_left_out_of_the_mean(tmp_path: Path) -> None:
    def some(trained: Policy, seed: int) -> float | None:
        return None if seed == 1 or trained.recovery.decay == "constant" else 0.7

    data = asked_for(Recovery(epochs=1), [0, 1])
    fill(data, variants(policy(Recovery(epochs=1))), Lab(some), tmp_path / "a.json", lambda _: None)
    rows = {r["variant"]: r for r in summarise(data)["rows"]}
    assert (rows[FULL]["n"], rows[FULL]["failed"], rows[FULL]["mean"], rows[FULL]["std"]) == (1, 1, 0.7, None)
    assert (rows["constant rate"]["n"], rows["constant rate"]["failed"]) == (0, 2)
    assert rows["constant rate"]["mean"] is rows["constant rate"]["difference"] is None
    assert "| constant rate | 0 | 2 |  |  |  |  |" in markdown(summarise(data))


# --- a run ---


@pytest.fixture
def trained(world: World) -> tuple[World, int]:
    """A finished run and its first trained trial."""
    found = world.search(epochs=1)
    return world, next(t.number for t in found.trials if t.evaluation.rung)


def test_ablation_of_a_run_is_written_and_shown(trained: tuple[World, int]) -> None:
    world, number = trained
    tested, calls = world.task.count("test"), len(world.calls)
    found = ablate(world.run, number, seeds=2)
    assert world.task.count("test") == tested  # `val` only
    assert len(world.calls) - calls == 2 * len(found["rows"])
    assert {seed for e in world.evaluators[1:] for seed, _ in e.trained_with} == {0, 1}
    assert found["quality_before"] == Run.read(world.run).row(world.trials()[number])["quality_before"]
    assert (world.run / f"ablation-trial-{number}.md").read_text() == markdown(found)
    assert Run.read(world.run).ablations == [found]
    write_report(world.run)
    page = (world.run / "report.html").read_text()
    assert f"What each ingredient is worth to trial {number}" in page
    assert "constant rate" in page
    ablate(world.run, number, seeds=2)
    assert len(world.calls) - calls == 2 * len(found["rows"])  # all known


def test_more_seeds_and_other_epochs_add_to_what_is_known(trained: tuple[World, int], tmp_path: Path) -> None:
    world, number = trained
    first = ablate(world.run, number, seeds=1)
    calls = len(world.calls)
    more = ablate(world.run, number, seeds=2, out=tmp_path / "table.md")
    assert len(world.calls) - calls == len(first["rows"])
    assert (tmp_path / "table.md").read_text() == markdown(more)
    longer = ablate(world.run, number, seeds=1, epochs=3)
    assert {p.recovery.epochs for p, _, _ in world.calls[calls + len(first["rows"]) :]} == {3}
    assert longer["epochs"] == 3
    again = ablate(world.run, number, seeds=2)
    assert again == more


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"results": 3}', '{"results": [], "variants": {}}', "null"])
def test_file_that_cannot_be_read_is_begun_anew_and_not_shown(trained: tuple[World, int], text: str) -> None:
    world, number = trained
    (world.run / f"ablation-trial-{number}.json").write_text(text)
    assert Run.read(world.run).ablations == []
    assert ablate(world.run, number, seeds=1)["rows"][0]["n"] == 1


def test_wrong_wishes_name_what_is_allowed(trained: tuple[World, int]) -> None:
    world, number = trained
    names = [str(t.number) for t in world.trials() if t.evaluation.rung]
    with pytest.raises(AutocompressError, match=f"trial 0 has no recovery training.*{', '.join(names)}"):
        ablate(world.run, 0)
    with pytest.raises(AutocompressError, match="--seeds is 0"):
        ablate(world.run, number, seeds=0)
    with pytest.raises(AutocompressError, match="--epochs is 0"):
        ablate(world.run, number, epochs=0)
    assert not list(world.run.glob("ablation*"))
    assert json.loads((world.run / "config.json").read_text())
