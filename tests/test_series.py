"""The numbers behind the charts, against brute force and hand-made runs."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import World, evaluation

from autocompress.front import Trial, hypervolume
from autocompress.policy import LayerChoice, Policy, Recovery
from autocompress.report.series import (
    SHOWN_TRIALS,
    Area,
    Box,
    box_of,
    choice_importance,
    level_text,
    predictions,
    progress,
    recipe_importance,
    sensitivity,
    thinned,
)
from autocompress.report.tables import Run
from autocompress.trial import Evaluation, Measurement


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        world = World(tmp_path_factory.mktemp("series")).install(patch)
        world.search(controller="solver", trials=40, epochs=2, recoveries=4)
        return Run.read(world.run)


def of(policy: Policy, loss: float, number: int, size: int = 1000) -> Trial:
    measured = Measurement(size, 10_000, 1 - loss, loss, 1.0)
    return Trial(number, Evaluation(policy, 0, 1 if policy.recovery.epochs else 0, "ok", measured))


# --- progress ---


def test_area_is_the_hypervolume_of_what_was_added() -> None:
    draw, box = random.Random(0), Box(2.0, 8.0, 0.5, 1.0)
    area, points = Area(box), []
    for _ in range(80):
        size, quality = draw.uniform(1, 9), draw.uniform(0.4, 1.05)
        before = area.value
        grew = area.add(size, quality)
        points.append((max(size, box.left), -min(quality, box.high)))
        exact = hypervolume(points, (box.right, -box.low)) / ((box.right - box.left) * (box.high - box.low))
        assert area.value == pytest.approx(exact)
        assert grew == (exact > before + 1e-12)


def test_progress_counts_every_evaluation_and_ends_at_the_whole_front(run: Run) -> None:
    (line,) = progress(run, box := box_of([run]))
    assert line.name == "solver"
    assert line.evaluations[-1] == run.evaluations
    assert line.evaluations == sorted(line.evaluations)
    assert line.volume == sorted(line.volume)
    points = [(math.log(t.measured.bytes), -t.measured.quality) for t in run.front]
    exact = hypervolume(points, (box.right, -box.low)) / ((box.right - box.left) * (box.high - box.low))
    assert line.volume[-1] == pytest.approx(exact)
    assert line.seconds == sorted(line.seconds)
    assert run.profile is not None
    assert line.seconds[-1] == pytest.approx(run.trials[-1].at + run.profile["seconds"], abs=0.02)


def test_screened_candidates_are_a_line_of_their_own(world: World) -> None:
    world.task.screens = True
    world.search(controller="solver", trials=20, epochs=0)
    found = Run.read(world.run)
    lines = progress(found, box_of([found]))
    assert [line.name for line in lines] == ["screened on a part of val", "solver"]
    assert lines[0].evaluations[-1] <= 20 < lines[1].evaluations[-1]


def test_runs_of_older_versions_count_the_seconds_of_their_trials(run: Run) -> None:
    timeless = [replace(t, at=math.nan, evaluation=replace(t.evaluation, seconds=2.0)) for t in run.trials]
    (line,) = progress(old := replace(run, trials=timeless, profile=None), box_of([old]))
    measured = [t for t in timeless if t.evaluation.status != "infeasible" and t.evaluation.copy_of is None]
    assert line.seconds[-1] == 2.0 * len(measured)


# --- thinning ---


def test_few_trials_are_all_shown(run: Run) -> None:
    shown, counts = thinned(run)
    assert counts == {}
    assert len(shown) == sum(t.evaluation.status == "ok" and t.evaluation.copy_of is None for t in run.trials)


def test_of_many_trials_the_front_and_one_for_each_place_are_shown(run: Run) -> None:
    draw = random.Random(1)
    trials = [
        replace(Trial(i, evaluation(0.9 - draw.expovariate(5), int(2 ** draw.uniform(8, 14)), 1.0)))
        for i in range(20_000)
    ]
    many = replace(run, trials=trials, budget=replace(run.budget, bytes=None))
    shown, counts = thinned(many)
    assert len(shown) <= SHOWN_TRIALS + len(many.front) + 600
    assert {t.number for t in many.front} <= {t.number for t in shown}
    alone = len(shown) - len(counts)
    assert alone + sum(counts.values()) == len(trials)


# --- what matters ---


def test_the_choice_that_decides_is_the_most_important(run: Run) -> None:
    draw, trials = random.Random(2), []
    for number in range(80):
        bits = {name: draw.choice((2, 4, 8)) for name in ("conv1", "conv2", "fc")}
        policy = Policy({name: LayerChoice(b) for name, b in bits.items()})
        trials.append(of(policy, 2.0 ** -bits["conv2"] * draw.uniform(0.95, 1.05), number))
    found = choice_importance(replace(run, trials=trials))
    assert found is not None
    assert found.shares[0][0] == "bits of conv2"
    assert found.shares[0][1] > 0.9
    assert found.explained > 0.9
    assert sum(share for _, share in found.shares) == pytest.approx(1)


def test_the_ingredient_that_decides_is_the_most_important(run: Run) -> None:
    draw, trials = random.Random(3), []
    for number in range(0, 120, 2):
        shot = Policy({"conv1": LayerChoice(4, number / 1000)})
        recovery = Recovery(
            1, lr=draw.choice((0.01, 0.1)), decay=draw.choice(("cosine", "step")), temperature=draw.uniform(1, 5)
        )
        gain = 0.2 if recovery.decay == "cosine" else 0.7
        trials += [of(shot, 0.5, number), of(replace(shot, recovery=recovery), 0.5 * gain, number + 1)]
    found = recipe_importance(replace(run, trials=trials))
    assert found is not None
    assert found.shares[0][0] == "decay"
    assert found.shares[0][1] > 0.8


def test_nothing_is_said_of_too_few_trials_or_of_equal_ones(run: Run) -> None:
    few = [of(Policy({"conv1": LayerChoice(b)}), 0.1 * b, b) for b in (2, 4, 8)]
    same = [of(Policy({"conv1": LayerChoice(4)}), 0.1 + i / 100, i) for i in range(30)]
    for trials in (few, same, []):
        assert choice_importance(replace(run, trials=trials)) is None
        assert recipe_importance(replace(run, trials=trials)) is None


# --- sensitivity and predictions ---


def test_sensitivity_is_the_profile(run: Run) -> None:
    found = sensitivity(run)
    assert found is not None
    assert run.levels is not None
    assert found.layers == [layer["name"] for layer in run.layers]
    for layer, row in zip(run.levels.layers, found.loss, strict=True):
        known = {(x.choice.bits, x.choice.sparsity): layer.sensitivity * x.error for x in layer.levels}
        for level, loss in zip(found.levels, row, strict=True):
            assert math.isnan(loss) if level not in known else loss == pytest.approx(known[level])
    assert sensitivity(replace(run, levels=None)) is None
    assert (level_text(1, 0.0), level_text(3, 0.5)) == ("1 bit", "3 bits, 50% zeros")


def test_predictions_are_what_was_told_before_measuring(run: Run) -> None:
    trained = [t for t in run.trials if t.evaluation.rung and t.evaluation.status == "ok"]
    pairs = {t.number: (told, found) for t, told, found in predictions(run)["bytes"]}
    assert trained
    for t in trained:  # an older journal: the one-shot policy's size
        parent = run.parent(t)
        assert parent is not None
        assert pairs[t.number] == (parent.measured.bytes, t.measured.bytes)
    timed = replace(trained[0].evaluation.measurement, predicted_bytes=77.0, predicted_ms=2.0, latency_ms=3.0)  # type: ignore[type-var]
    one = replace(trained[0], evaluation=replace(trained[0].evaluation, measurement=timed))
    found = predictions(replace(run, trials=[one]))
    assert [(told, real) for _, told, real in found["bytes"]] == [(77.0, one.measured.bytes)]
    assert [(told, real) for _, told, real in found["ms"]] == [(2.0, 3.0)]


def test_random_search_beside_a_run_is_read_with_it(world: World, tmp_path: Path) -> None:
    del tmp_path
    world.search(trials=10, epochs=0)
    world.search(folder=world.run / "random-search", trials=10, epochs=0, seed=3)
    found = Run.read(world.run).random
    assert found is not None
    assert found.settings.seed == 3
