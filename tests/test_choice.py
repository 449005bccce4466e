"""Why a trial, the walk along the front, comparisons of runs, and the copy for Optuna."""

from __future__ import annotations

import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import optuna
import pytest
from fakes import FakeTask, World
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rich.console import Console

from autocompress.errors import AutocompressError, RunError
from autocompress.front import Wish, feasible
from autocompress.optuna_export import STORAGE, export_study, serve
from autocompress.report.choice import explain, neighbours, policy_table, walk
from autocompress.report.compare import compare, compare_table, read_runs, write_comparison
from autocompress.report.tables import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With a front of at least three members, and trials behind it."""
    with pytest.MonkeyPatch.context() as patch:
        world = World(tmp_path_factory.mktemp("choice")).install(patch)
        world.search(controller="solver", trials=30, epochs=2, recoveries=4)
        found = Run.read(world.run)
        assert len(found.front) >= 3
        return found


# --- why ---


def test_neighbours_are_told_with_what_they_save_and_cost(run: Run) -> None:
    smaller, chosen, larger = run.front[:3]
    said = explain(run, chosen, Wish(trial=chosen.number))
    assert said[0] == f"Trial {chosen.number} was asked for; it is within {run.budget}."
    saved, lost = chosen.measured.bytes - smaller.measured.bytes, chosen.measured.quality - smaller.measured.quality
    assert f"Not trial {smaller.number}, the next smaller: it is {saved:,} bytes" in said[1]
    assert f"smaller, {lost:.4f} worse in accuracy" in said[1]
    gain = larger.measured.quality - chosen.measured.quality
    assert f"Not trial {larger.number}, the next larger" in said[2]
    assert f"larger, {gain:.4f} better in accuracy" in said[2]


def test_the_rule_is_named(run: Run) -> None:
    first, last, count = run.front[0], run.front[-1], len(feasible(run.trials, run.budget))
    assert explain(run, last, Wish())[0] == f"It has the highest accuracy of {count} feasible trials."
    assert explain(run, last, Wish())[-1] == "No larger file within the budget is better."
    limited = explain(run, first, Wish(max_size=first.measured.bytes))
    assert f"with at most {first.measured.bytes:,} bytes" in limited[0]
    assert f"but over {first.measured.bytes:,} bytes" in limited[-1]
    assert "smallest of" in explain(run, first, Wish(min_quality=0.1))[0]
    assert "knee" in explain(run, run.front[1], Wish(knee=True))[0]
    alone = replace(run, trials=[first])
    assert explain(alone, first, Wish())[-1] == "It is the only member of the front."


def test_a_trial_behind_the_front_is_told_what_is_better(run: Run) -> None:
    members = {t.number for t in run.front}
    behind = next(t for t in feasible(run.trials, run.budget) if t.number not in members)
    said = explain(run, behind, Wish(trial=behind.number))
    assert "It is not on the front: trial" in said[1]


def test_where_less_is_better_the_lowest_is_the_best(world: World) -> None:
    world.task = FakeTask(direction="min", metric="perplexity")
    world.search()
    found = Run.read(world.run)
    assert found.picked is not None
    assert "lowest perplexity" in explain(found, found.picked, Wish())[0]
    smaller, _ = neighbours(found, found.picked)
    if smaller is not None:
        assert "worse in perplexity" in explain(found, found.picked, Wish())[1]


# --- the walk ---


def walked(run: Run, start: int, *answers: str) -> tuple[int, str]:
    """Where a walk ends and what it showed."""
    console, waiting = Console(file=StringIO(), width=120, highlight=False), list(answers)

    def ask(prompt: str) -> str:
        console.print(prompt, markup=False)
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    end = walk(run, run.front[start], console, ask)
    assert isinstance(console.file, StringIO)
    return end.number, console.file.getvalue()


def test_the_walk_goes_along_the_front_and_stops_at_its_ends(run: Run) -> None:
    numbers = [t.number for t in run.front]
    last = len(numbers) - 1
    assert walked(run, last, "s", "s", "q")[0] == numbers[last - 2]
    assert walked(run, 0, "l", "")[0] == numbers[1]
    assert walked(run, 0, "s", "S ", "q")[0] == numbers[0]
    assert walked(run, last, "l", "q")[0] == numbers[last]
    assert walked(run, 0, str(numbers[-1]), "q")[0] == numbers[-1]
    assert walked(run, 1)[0] == numbers[1]  # the input ended


def test_the_walk_shows_the_policy_and_says_what_it_does_not_know(run: Run) -> None:
    end, shown = walked(run, 1, "p", "up", "99999", "q")
    assert end == run.front[1].number
    assert "channels kept" in shown
    assert "There is no move 'up': s smaller" in shown
    assert "There is no trial 99999 on the front" in shown
    assert f"> {end}" in shown
    assert policy_table(run, run.front[1]).row_count == len(run.layers)


# --- several runs ---


@pytest.fixture
def two(world: World, tmp_path: Path) -> list[Path]:
    folders = [tmp_path / "solver", tmp_path / "random"]
    for folder, controller in zip(folders, ("solver", "random"), strict=True):
        world.search(folder=folder, controller=controller, trials=16, epochs=0)
    return folders


def test_runs_are_compared_in_one_box_and_under_one_limit(two: list[Path], tmp_path: Path) -> None:
    runs = read_runs(two)
    rows = compare(runs)
    assert [row["name"] for row in rows] == ["solver", "random"]
    assert all(0 < row["hypervolume"] <= 1 for row in rows)
    alike = compare([runs[0], replace(runs[0], folder=tmp_path / "copy")])
    assert alike[0]["hypervolume"] == alike[1]["hypervolume"]
    for row, found in zip(rows, runs, strict=True):
        assert row["best"]["quality_val"] == max(t.measured.quality for t in feasible(found.trials, found.budget))
    console = Console(file=StringIO(), width=80)
    console.print(compare_table(runs, rows))
    assert isinstance(console.file, StringIO)
    assert "…" not in console.file.getvalue()  # it fits a narrow terminal
    write_comparison(runs, rows, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("plotly.js v") == 1
    assert '"name":"solver"' in page


def test_runs_that_cannot_be_compared_are_refused(two: list[Path], world: World, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="2 to 6 runs, not 1"):
        read_runs(two[:1])
    with pytest.raises(RunError, match="named twice"):
        read_runs([two[0], two[0]])
    world.task = FakeTask(metric="recall")
    world.search(folder=tmp_path / "other", trials=2, epochs=0)
    with pytest.raises(RunError, match="its metric is 'recall', not 'accuracy'"):
        read_runs([two[0], tmp_path / "other"])
    world.task = FakeTask()
    world.fault = lambda *_: "raise"
    world.search(folder=tmp_path / "broken", trials=2, epochs=0)
    with pytest.raises(RunError, match="no measured trial"):
        read_runs([two[0], tmp_path / "broken"])


# --- Optuna ---


@pytest.mark.filterwarnings("ignore:Some regimes for parameter:UserWarning")  # a run of few trials has few recipes
def test_the_export_holds_every_trial_with_its_policy(run: Run, tmp_path: Path) -> None:
    path = tmp_path / STORAGE
    assert export_study(run, path) == export_study(run, path) == len(run.trials)
    study = optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(path))))
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]
    assert len(study.trials) == len(run.trials)
    for ours, theirs in zip(run.trials, study.trials, strict=True):
        measured, policy = ours.evaluation.measurement, ours.evaluation.policy
        if ours.evaluation.status != "ok" or measured is None:
            assert theirs.state.name == "FAIL"
            continue
        assert theirs.values == [measured.quality, measured.bytes, measured.latency_ms]
        assert theirs.params["bits/conv1"] == policy.layers["conv1"].bits
        assert theirs.params["channels/conv1"] == policy.keep["conv1"]
        assert ("recovery/lr" in theirs.params) == bool(policy.recovery.epochs)
    with pytest.warns(UserWarning, match="low `target` values"):
        assert optuna.importance.get_param_importances(study, target=lambda t: -t.values[0])


def test_a_failed_trial_is_exported_as_failed(world: World, tmp_path: Path) -> None:
    world.fault = lambda *_: "raise"
    world.search(trials=3, epochs=0)
    export_study(Run.read(world.run), tmp_path / STORAGE)
    study = optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(tmp_path / STORAGE))))
    assert {t.state.name for t in study.trials} == {"FAIL"}
    assert "made to fail" in study.trials[0].user_attrs["error"]


def test_without_the_dashboard_the_message_names_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    with pytest.raises(AutocompressError, match=r"pip install 'autocompress\[dashboard\]'"):
        serve(tmp_path / STORAGE, 8080, browser=False, say=print)
