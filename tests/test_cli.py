"""The command line: help, one-line errors, JSON, and a real search of a small network from start to artifact."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import typer.main
from fakes import BLOBS

from autocompress import cli, study
from autocompress.journal import FILE, SCHEMA, Journal
from autocompress.report.tables import COLUMNS

VERBS = ("search", "ablate", "report", "pick", "compare", "dashboard", "export", "verify", "profile", "init")
BROKEN = """
import torch
from torch import nn

from autocompress import ClassificationTask


class Fussy(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        raise ValueError("I do not like this input")


def make(model):
    split = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    return ClassificationTask(model, split, split, split, name="broken")


def with_nan():
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    return make(model)


def raises():
    raise KeyError("no such file in the archive")


def fails():
    return make(Fussy())


def wrong_inputs():
    return make(nn.Linear(5, 2))


def empty():
    split = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    return ClassificationTask(nn.Linear(4, 2), split, split, split, name="empty")


number = 7
"""


@dataclass
class Result:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of the output, which must be the only one that is a JSON object."""
        *before, last = self.out.rstrip("\n").split("\n")
        assert not any(line.startswith("{") for line in before)
        return dict(json.loads(last))

    @property
    def error(self) -> str:
        """The one error line."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in self.err + self.out
        return line


def run(*arguments: object) -> Result:
    """The entry point, in this process."""
    out, err, before = StringIO(), StringIO(), sys.argv
    sys.argv = ["autocompress", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    return Result(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def refused(*arguments: object, code: int = 2) -> str:
    """The error line of a command whose input is wrong, or (3) asks for what nothing reaches."""
    result = run(*arguments)
    assert result.code == code, result
    return result.error


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with task files in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "blobs.py").write_text(BLOBS)
    (tmp_path / "broken.py").write_text(BROKEN)
    return tmp_path


@dataclass
class Searched:
    """A finished run of the small network."""

    folder: Path
    task: str
    result: Result


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    folder = tmp_path_factory.mktemp("searched")
    (folder / "blobs.py").write_text(BLOBS)
    task = f"{folder / 'blobs.py'}:task"
    arguments = ("--budget", "size=60%", "--trials", 20, "--epochs", 1, "--seed", 3, "--json")
    return Searched(folder / "run", task, run("search", task, "--out", folder / "run", *arguments))


# --- help ---


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example_and_every_option(verb: str) -> None:
    result = run(verb, "--help")
    assert result.code == 0
    assert "Example" in result.out
    assert f"autocompress {verb}" in result.out.split("Example")[1]
    command = typer.main.get_command(cli.app).commands[verb]  # type: ignore[attr-defined]
    for parameter in command.params:
        for name in parameter.opts:
            if name.startswith("--"):
                assert name in result.out


def test_help_lists_every_verb_and_the_exit_codes() -> None:
    result = run("--help")
    assert result.code == 0
    assert all(verb in result.out for verb in VERBS)
    assert "3 nothing fits" in result.out


def test_version_is_shown() -> None:
    assert run("--version").out.strip() == cli.version("autocompress")


# --- wrong input ---

SEARCH = ("search", "blobs.py:task", "--trials", "2")
WRONG: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((*SEARCH, "--budget", "4 bananas"), ("'4 bananas'", "4MB")),
    ((*SEARCH, "--budget", "-1MB"), ("positive", "4MB")),
    ((*SEARCH, "--budget", "0"), ("'0'", "4MB")),
    ((*SEARCH, "--budget", "0MB"), ("positive", "4MB")),
    ((*SEARCH, "--budget", "5 parsecs"), ("'5 parsecs'", "5ms")),
    ((*SEARCH, "--budget", "size=5ms"), ("size=5ms", "size=25%")),
    ((*SEARCH, "--budget", "50%"), ("'50%'", "size=25%")),
    ((*SEARCH, "--trials", "0"), ("--trials is 0", "1 or more")),
    ((*SEARCH, "--epochs", "-1"), ("--epochs is -1", "0 or more")),
    ((*SEARCH, "--seed", "-1"), ("--seed is -1", "0 or more")),
    ((*SEARCH, "--seed", str(2**70)), ("--seed",)),
    ((*SEARCH, "--timeout", "abc"), ("'abc'", "90s")),
    ((*SEARCH, "--timeout", "0s"), ("'0s'", "90s")),
    ((*SEARCH, "--timeout", "nan"), ("'nan'", "90s")),
    ((*SEARCH, "--controller", "magic"), ("'magic'", "solver, tpe, nsga2, gp, random")),
    ((*SEARCH, "--data", "there"), ("--data", "cifar10")),
    ((*SEARCH, "--space", "missing.toml"), ("'missing.toml'", "default", "tiny")),
    ((*SEARCH, "--out", "taken"), ("taken already exists", "--resume taken", "--out")),
    ((*SEARCH, "--resume", "nowhere"), ("nowhere is not a run folder",)),
    ((*SEARCH, "--resume", "taken"), ("taken is not a run folder",)),
    ((*SEARCH, "--resume", "taken", "--out", "new"), ("--resume", "--out")),
    (("search", "mnist"), ("'mnist'", "digits", "my_task.py:NAME", "autocompress init")),
    (("search", "nowhere.py:task"), ("nowhere.py", "autocompress init nowhere.py")),
    (("search", "no.such.module:task"), ("no.such.module:task", "No module named")),
    (("search", "blobs.py:tsk"), ("'tsk'", "task")),
    (("search", "broken.py:raises"), ("raised KeyError", "no such file in the archive", "broken.py, line")),
    (("search", "broken.py:number"), ("int, not a task", "model")),
    (("search", "broken.py:fails"), ("ValueError", "I do not like this input")),
    (("search", "broken.py:wrong_inputs"), ("forward", "mat1 and mat2")),
    (("search", "broken.py:with_nan"), ("weight", "NaN", "checkpoint")),
    (("search", "broken.py:empty"), ("empty", "at least one")),
    (("profile", "blobs.py:task", "--bits", "11"), ("11", "2, 3, 4")),
    (("profile", "mnist"), ("'mnist'", "digits")),
    ((*SEARCH, "--recoveries", "0"), ("--recoveries is 0", "1 or more")),
    (("report", "nowhere"), ("nowhere is not a run folder",)),
    (("ablate", "nowhere", "--trial", "3"), ("nowhere is not a run folder",)),
    (("pick", "nowhere"), ("nowhere is not a run folder",)),
    (("export", "nowhere"), ("nowhere is not a run folder",)),
    (("verify", "nowhere.acz"), ("nowhere.acz", "No such file")),
    (("verify", "blobs.py"), ("blobs.py is not an autocompress artifact",)),
    (("init", "task.txt"), ("task.txt must end in .py",)),
    (("init", "no/such/folder/task.py"), ("cannot write", "No such file or directory")),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=lambda value: " ".join(value)[-40:])
def test_wrong_input_is_one_line_that_names_the_fix(
    here: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (here / "taken").mkdir()
    (here / "taken" / "file").write_text("mine")
    before = contents(here)
    error = refused(*arguments)
    assert [word for word in words if word not in error] == []
    assert contents(here) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[layers]\nbitz = [4]", ("layers.bitz", "did you mean 'bits'", "sparsity")),
        ("[layer]\nbits = [4]", ("'layer'", "did you mean 'layers'")),
        ("[layers]\nbits = []", ("layers.bits",)),
        ("[layers]\nbits = [9]", ("layers.bits", "9 is not among")),
        ("[layers]\nsparsity = [1.0]", ("layers.sparsity", "less than 1")),
        ("[recovery]\nlr = [0.1, 0.01]", ("recovery.lr", "low <= high")),
        ('[[override]]\nmatch = "conv*"\nbits = [4]', ("conv*", "matches no layer", "names here")),
        ("[layers", ("space.toml is not TOML",)),
        ("\x00", ("space.toml is not TOML",)),
    ],
)
def test_wrong_space_file_is_one_line_that_names_the_key(here: Path, text: str, words: tuple[str, ...]) -> None:
    (here / "space.toml").write_text(text)
    before = contents(here)
    error = refused(*SEARCH, "--space", "space.toml")
    assert [word for word in words if word not in error] == []
    assert contents(here) == before


@pytest.mark.usefixtures("here")
def test_out_under_a_file_is_refused() -> None:
    assert "blobs.py" in refused(*SEARCH, "--budget", "5kB", "--out", "blobs.py/run")


@pytest.mark.parametrize(
    "arguments",
    [("search", "--trials", "many"), ("search", "--nonsense"), ("pick",), ("export", "x", "--format", "zip"), ("fly",)],
    ids=" ".join,
)
@pytest.mark.usefixtures("here")
def test_unusable_arguments_are_one_error_line_and_json_too(arguments: tuple[str, ...]) -> None:
    result = run(*arguments, "--json")
    assert result.code == 2
    assert result.error
    assert result.json["exit_code"] == 2


def test_error_with_json_is_one_json_line(here: Path) -> None:
    result = run(*SEARCH, "--budget", "4 bananas", "--json")
    assert result.code == 2
    assert result.json == {"error": result.error.removeprefix("error: "), "exit_code": 2}
    assert result.out.count("\n") == 1
    assert contents(here).keys() == {"blobs.py", "broken.py"}


def test_budget_below_the_smallest_reachable_names_it(here: Path) -> None:
    result = run(*SEARCH, "--budget", "10B", "--json")
    assert result.code == 3
    (smallest,) = [word for word in result.error.split() if word.replace(",", "").isdigit() and word != "10"][:1]
    assert result.json["exit_code"] == 3
    assert contents(here).keys() == {"blobs.py", "broken.py"}
    given = "--budget", f"{smallest.replace(',', '')}B", "--trials", 1, "--epochs", 0, "--out", "run", "--json"
    fits = run("search", "blobs.py:task", *given)
    assert fits.code == 0
    assert fits.json["picked"]["bytes"] <= int(smallest.replace(",", ""))


@pytest.mark.slow
def test_latency_that_nothing_reaches_ends_with_the_nearest(here: Path) -> None:
    given = "--budget", "0.001us", "--epochs", 0, "--out", "run", "--format", "packed", "--json"
    result = run(*SEARCH, *given)
    assert result.code == 3
    assert "nothing fits" in result.err
    assert result.json["picked"] is None
    assert result.json["nearest"]["feasible"] is False
    assert (here / "run" / "report.html").is_file()


@pytest.mark.usefixtures("here")
def test_debug_shows_the_traceback() -> None:
    with pytest.raises(cli.AutocompressError):
        run(*SEARCH, "--budget", "4 bananas", "--debug")


@pytest.mark.usefixtures("here")
def test_a_bug_is_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr(study, "search", broken)
    result = run(*SEARCH, "--json")
    assert result.code == 1
    assert result.error == "error: unexpected ZeroDivisionError: oh no (this is a bug; --debug shows where)"
    assert result.json["exit_code"] == 1


@pytest.mark.usefixtures("here")
def test_second_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "search", interrupted)
    result = run(*SEARCH, "--json")
    assert result.code == 130
    assert "--resume" in result.error
    assert result.json["exit_code"] == 130


# --- from search to artifact ---


def test_search_ends_with_the_contract_as_json(searched: Searched) -> None:
    assert searched.result.code == 0
    assert "Traceback" not in searched.result.err
    found = searched.result.json
    assert {"run", "evaluations", "seconds", "front", "picked"} <= set(found)
    assert found["run"] == str(searched.folder)
    assert found["evaluations"] >= 20
    assert found["failed"] == 0
    assert found["seconds"] > 0
    keys = {"trial", "quality_val", "quality_test", "bytes", "latency_ms", "feasible"}
    assert found["front"]
    for member in [*found["front"], found["picked"]]:
        assert keys <= set(member)
        assert all(member[key] is not None for key in keys)
        assert member["feasible"] is True
        assert member["bytes"] == (searched.folder / member["artifact"]).stat().st_size
    assert found["picked"] in found["front"]
    assert found["picked"]["quality_val"] == max(member["quality_val"] for member in found["front"])


def test_search_prints_no_warning(searched: Searched) -> None:
    assert searched.result.json["warnings"] == []
    assert "arning" not in searched.result.err


def test_search_writes_its_files(searched: Searched) -> None:
    reports = ("report.html", "summary.md", "front.png", "front.svg", "front.csv", "trials.csv", "baselines.json")
    for name in ("config.json", FILE, *reports):
        assert (searched.folder / name).stat().st_size > 0, name
    with (searched.folder / "front.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        assert [int(r["trial"]) for r in reader] == [m["trial"] for m in searched.result.json["front"]]
        assert reader.fieldnames == list(COLUMNS)


def test_report_says_the_same_again(searched: Searched) -> None:
    result = run("report", searched.folder, "--json")
    assert result.code == 0
    assert result.json == searched.result.json


def test_uniform_policies_are_measured_beside_the_search(searched: Searched) -> None:
    names = [row["name"] for row in json.loads((searched.folder / "baselines.json").read_text())]
    assert {"uniform 8 bits", "uniform 4 bits", "uniform 2 bits"} <= set(names)
    assert "uniform 4 bits" in (searched.folder / "summary.md").read_text()


@pytest.mark.slow
def test_report_measures_a_random_search_to_compare_with(searched: Searched, tmp_path: Path) -> None:
    folder = shutil.copytree(searched.folder, tmp_path / "run")
    for _ in range(2):  # the second time there is nothing left to do
        result = run("report", folder, "--baselines")
        assert result.code == 0
    assert len(json.loads((folder / "baselines.json").read_text())) > 2
    with Journal.reading(folder / "random-search") as journal:
        assert journal.fact("schema") == SCHEMA
    assert "random search" in (folder / "report.html").read_text()


def test_pick_says_why_and_walks(searched: Searched, monkeypatch: pytest.MonkeyPatch) -> None:
    members = front(searched)
    result = run("pick", searched.folder)
    assert "It has the highest accuracy of" in result.out
    answers = iter([str(members[0]["trial"]), "q"])
    monkeypatch.setattr(cli.Console, "input", lambda *_, **__: next(answers))
    result = run("pick", searched.folder, "--interactive", "--json")
    assert result.json["trial"] == members[0]["trial"]


def test_compare_and_dashboard_write_their_files(searched: Searched, tmp_path: Path) -> None:
    other = shutil.copytree(searched.folder, tmp_path / "other")
    page = tmp_path / "page.html"
    result = run("compare", searched.folder, other, "--out", page, "--json")
    assert result.code == 0
    assert [row["name"] for row in result.json["runs"]] == [searched.folder.name, "other"]
    assert page.stat().st_size > 1_000_000
    assert "must end in .html" in refused("compare", searched.folder, other, "--out", tmp_path / "page.pdf")
    assert "2 to 6 runs" in refused("compare", other, "--out", page)
    result = run("dashboard", other, "--export-only", "--json")
    assert result.json["trials"] >= searched.result.json["evaluations"]
    assert Path(result.json["storage"]).is_file()


def front(searched: Searched) -> list[dict[str, Any]]:
    return list(searched.result.json["front"])


Selector = Callable[[list[dict[str, Any]]], tuple[tuple[object, ...], set[int]]]
"""Front, smallest first -> options of `pick` and the trials that are right."""
SELECTORS: dict[str, Selector] = {
    "nothing": lambda f: ((), {f[-1]["trial"]}),
    "--best": lambda f: (("--best",), {f[-1]["trial"]}),
    "--max-size": lambda f: (("--max-size", f"{f[0]['bytes']}B"), {f[0]["trial"]}),
    "--max-size share": lambda f: (("--max-size", "size=59.9%"), {m["trial"] for m in f}),
    "--max-latency": lambda f: (("--max-latency", "latency=10000%"), {f[-1]["trial"]}),
    "--min-quality": lambda f: (("--min-quality", f[0]["quality_val"]), {f[0]["trial"]}),
    "--min-quality and --best": lambda f: (("--min-quality", f[0]["quality_val"], "--best"), {f[-1]["trial"]}),
    "--min-quality and --max-size": lambda f: (
        ("--min-quality", f[0]["quality_val"], "--max-size", f"{f[-1]['bytes']}B"),
        {f[-1]["trial"]},
    ),
    "--knee": lambda f: (("--knee",), {m["trial"] for m in f}),
    "--trial": lambda f: (("--trial", f[0]["trial"]), {f[0]["trial"]}),
}


@pytest.mark.parametrize("name", list(SELECTORS))
def test_pick_by_every_selector(searched: Searched, name: str) -> None:
    options, right = SELECTORS[name](front(searched))
    result = run("pick", searched.folder, *options, "--json")
    assert result.code == 0
    assert result.json["trial"] in right
    assert f"autocompress export {searched.folder} --trial {result.json['trial']}" in result.out
    assert "policy_json" in result.json


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--knee", "--best"), ("--knee", "--best", "--trial")),
        (("--best", "--trial", 1), ("--knee", "--best", "--trial")),
        (("--max-size", "5ms"), ("--max-size takes bytes",)),
        (("--max-latency", "5kB"), ("--max-latency takes time",)),
        (("--max-size", "much"), ("'much'", "4MB")),
        (("--trial", 99999), ("trial 99999",)),
    ],
)
def test_pick_refuses_what_cannot_be(searched: Searched, options: tuple[object, ...], words: tuple[str, ...]) -> None:
    error = refused("pick", searched.folder, *options)
    assert [word for word in words if word not in error] == []


@pytest.mark.parametrize("options", [("--max-size", "1B"), ("--min-quality", "2")])
def test_pick_says_what_is_reachable_where_nothing_fits(searched: Searched, options: tuple[str, str]) -> None:
    error = refused("pick", searched.folder, *options, code=3)
    assert f"no trial is within {options[0]} {options[1][0]}" in error
    assert "what remains reaches" in error


@pytest.fixture(scope="module")
def artifact(searched: Searched, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("exported") / "model.acz"
    result = run("export", searched.folder, "--output", target, "--json")
    assert result.code == 0
    picked = searched.result.json["picked"]
    assert result.json == {
        "file": str(target),
        "bytes": picked["bytes"],
        "trial": picked["trial"],
        "format": "packed",
    }
    assert target.stat().st_size == picked["bytes"]
    return target


def test_exported_file_is_verified(searched: Searched, artifact: Path) -> None:
    result = run("verify", artifact, "--task", searched.task, "--budget", "size=60%", "--json")
    assert result.code == 0
    found, picked = result.json, searched.result.json["picked"]
    assert {"ok", "bytes", "quality", "latency_ms"} <= set(found)
    assert found["ok"] is True
    assert found["bytes"] == picked["bytes"]
    assert found["quality"] == pytest.approx(picked["quality_val"], abs=1e-9)
    assert found["latency_ms"] > 0


def test_verify_with_a_budget_that_does_not_hold_exits_with_1(searched: Searched, artifact: Path) -> None:
    result = run("verify", artifact, "--task", searched.task, "--budget", "100B", "--json")
    assert result.code == 1
    assert result.json["ok"] is False
    assert result.json["within_budget"] is False
    assert "NOT within" in result.out


def test_verify_without_the_task_of_a_custom_file_names_the_option(artifact: Path) -> None:
    error = refused("verify", artifact)
    assert "blobs" in error
    assert "--task" in error


@pytest.mark.parametrize("change", ["truncated", "one byte more", "one bit changed", "empty"])
def test_verify_refuses_a_damaged_file(searched: Searched, artifact: Path, here: Path, change: str) -> None:
    content = artifact.read_bytes()
    middle = len(content) // 2
    changed = {
        "truncated": content[:middle],
        "one byte more": content + b"\0",
        "one bit changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "empty": b"",
    }[change]
    (here / "damaged.acz").write_bytes(changed)
    assert "damaged.acz" in refused("verify", "damaged.acz", "--task", searched.task)


def test_verify_refuses_the_file_of_another_model(artifact: Path, here: Path) -> None:
    (here / "other.py").write_text(BLOBS.replace("nn.Linear(16, 32)", "nn.Linear(16, 24)").replace("32, 32", "24, 24"))
    text = (here / "other.py").read_text().replace("nn.Linear(32, 4)", "nn.Linear(24, 4)")
    (here / "other.py").write_text(text)
    refused("verify", artifact, "--task", "other.py:task")


def test_export_does_not_overwrite_without_force(searched: Searched, here: Path) -> None:
    (here / "model.acz").write_text("mine")
    arguments = ("export", searched.folder, "--output", "model.acz")
    assert "--force" in refused(*arguments)
    assert (here / "model.acz").read_text() == "mine"
    assert run(*arguments, "--force").code == 0
    assert (here / "model.acz").read_bytes().startswith(b"ACZ1")


def test_export_onto_a_folder_is_refused_even_with_force(searched: Searched, here: Path) -> None:
    (here / "folder").mkdir()
    assert "folder" in refused("export", searched.folder, "--output", "folder", "--force")


def test_export_names_its_file_after_run_and_trial(searched: Searched, here: Path) -> None:
    number = front(searched)[0]["trial"]
    assert run("export", searched.folder, "--trial", number).code == 0
    assert (here / f"run-trial-{number}.acz").is_file()


def test_export_of_a_damaged_run_is_refused(searched: Searched, here: Path) -> None:
    copy = here / "copy"
    for name, content in contents(searched.folder).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    kept = copy / searched.result.json["picked"]["artifact"]
    kept.write_bytes(kept.read_bytes()[:-1])
    assert "cut short" in refused("export", copy, "--output", "model.acz")
    assert not (here / "model.acz").exists()


def test_export_of_a_trial_off_the_front_makes_it_again(searched: Searched, here: Path) -> None:
    kept = {member["trial"] for member in front(searched)}
    with Journal.reading(searched.folder) as journal:
        others = [t for t in journal.trials() if t.evaluation.status == "ok" and t.number not in kept]
    for rung in (0, 1):
        chosen = [t for t in others if t.evaluation.rung == rung][:1]
        for trial in chosen:
            result = run("export", searched.folder, "--trial", trial.number, "--output", f"{rung}.acz", "--json")
            assert result.json["bytes"] == trial.measured.bytes
            assert run("verify", f"{rung}.acz", "--task", searched.task).code == 0
    assert list(here.glob("*.acz"))


RESUMED: dict[str, tuple[tuple[object, ...], str]] = {
    "another space": (("--space", "tiny"), "--space"),
    "another task": (("digits",), "task"),
    "another budget": (("--budget", "4kB"), "--budget"),
    "another seed": (("--seed", 4), "--seed"),
    "another controller": (("--controller", "random"), "--controller"),
    "other epochs": (("--epochs", 2), "--epochs"),
}


@pytest.mark.parametrize("what", list(RESUMED))
def test_resume_with_other_settings_is_refused_and_changes_nothing(searched: Searched, what: str) -> None:
    options, word = RESUMED[what]
    before = contents(searched.folder)
    error = refused("search", *options, "--resume", searched.folder)
    assert word in error
    assert "--out" in error
    assert {name: c for name, c in contents(searched.folder).items() if FILE not in name} == {
        name: c for name, c in before.items() if FILE not in name
    }


def test_resume_of_a_finished_run_gives_the_same(searched: Searched) -> None:
    result = run("search", "--resume", searched.folder, "--json")
    assert result.code == 0
    assert result.json["front"] == searched.result.json["front"]
    assert result.json["evaluations"] == searched.result.json["evaluations"]


@pytest.mark.slow
def test_equal_seeds_give_equal_searches(searched: Searched, here: Path) -> None:
    arguments = ("--budget", "size=60%", "--trials", 12, "--epochs", 1, "--seed", 3, "--fresh", "--json")
    found = [run("search", searched.task, "--out", name, *arguments) for name in ("a", "b")]
    rows = []
    for name in ("a", "b"):
        with Journal.reading(here / name) as journal:
            rows.append(
                [(t.number, t.evaluation.policy.key(), t.measured.bytes, t.measured.quality) for t in journal.trials()]
            )
    assert repr(rows[0]) == repr(rows[1])
    assert [r.code for r in found] == [0, 0]


# --- recovery ---


def test_search_says_what_recovery_takes_and_what_each_front_member_was_before(searched: Searched) -> None:
    (line,) = [line for line in searched.result.err.splitlines() if line.startswith("recovery: ")]
    assert re.fullmatch(r"recovery: 2 trainings of 1 epoch: about \d+ s", line)
    trained = [r for r in searched.result.json["front"] if r["rung"]]
    assert trained
    for r in trained:
        assert f"{r['quality_before']:.4f}" in searched.result.out
    assert "before recovery" in searched.result.out


@pytest.mark.slow
def test_ablation_continues_and_ends_with_its_table_as_json(searched: Searched) -> None:
    trial = next(r["trial"] for r in searched.result.json["front"] if r["rung"])
    first = run("ablate", searched.folder, "--trial", trial, "--seeds", 1)
    assert first.code == 0
    assert "ablating" in first.err
    kept = json.loads((searched.folder / f"ablation-trial-{trial}.json").read_text())["results"]
    result = run("ablate", searched.folder, "--trial", trial, "--seeds", 2, "--json")
    assert result.code == 0
    rows = {r["variant"]: r for r in result.json["rows"]}
    assert {"full recipe", "no distillation", "constant rate"} <= set(rows)
    assert all(r["n"] == 2 and r["std"] is not None for r in rows.values())
    after = json.loads((searched.folder / f"ablation-trial-{trial}.json").read_text())["results"]
    assert after[: len(kept)] == kept  # what was known is not trained again
    assert len(after) == 2 * len(kept)
    page = run("report", searched.folder)
    assert page.code == 0
    assert "What each ingredient is worth" in (searched.folder / "report.html").read_text()


def test_full_recipe_with_the_seed_of_the_run_gives_the_quality_of_the_trial(searched: Searched) -> None:
    best = next(r for r in searched.result.json["front"] if r["rung"])
    run("ablate", searched.folder, "--trial", best["trial"], "--seeds", 1)
    data = json.loads((searched.folder / f"ablation-trial-{best['trial']}.json").read_text())
    (full,) = [r for r in data["results"] if r["key"] == data["variants"]["full recipe"] and r["seed"] == 3]
    assert full["quality"] == best["quality_val"]


def test_ablation_of_a_trial_without_training_names_those_with(searched: Searched) -> None:
    error = refused("ablate", searched.folder, "--trial", 0)
    assert all(str(r["trial"]) in error for r in searched.result.json["front"] if r["rung"])


@pytest.mark.slow
def test_resume_from_another_folder_finds_the_task(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run was started with a relative path."""
    assert run(*SEARCH, "--budget", "5kB", "--epochs", 0, "--out", "run").code == 0
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert run("search", "--resume", here / "run", "--trials", 3).code == 0


def test_default_folder_is_named_after_the_task(here: Path) -> None:
    result = run(*SEARCH, "--budget", "5kB", "--epochs", 0, "--json")
    assert result.code == 0
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith("blobs-")
    assert result.json["run"] == f"runs/{folder.name}"


# --- in ONNX Runtime ---


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """A finished run under a latency budget, which a network this small keeps only if it is generous."""
    folder = tmp_path_factory.mktemp("timed")
    (folder / "blobs.py").write_text(BLOBS)
    task = f"{folder / 'blobs.py'}:task"
    arguments = ("--budget", "latency=900%", "--budget", "size=80%", "--trials", 3, "--epochs", 0, "--json")
    return Searched(folder / "run", task, run("search", task, "--out", folder / "run", *arguments))


@pytest.fixture(scope="module")
def model(timed: Searched) -> Path:
    """The file that the run picked."""
    return timed.folder / timed.result.json["picked"]["artifact"]


def test_latency_budget_ends_with_onnx_files(timed: Searched) -> None:
    assert timed.result.code == 0
    found = timed.result.json
    assert found["front"]
    for member in found["front"]:
        assert member["artifact"].endswith(".onnx")
        assert member["bytes"] == (timed.folder / member["artifact"]).stat().st_size
        assert member["latency_ms"] <= found["budget"]["latency_ms"]
    assert f"--trial {found['picked']['trial']} --format onnx" in timed.result.out
    assert "timing layers" in timed.result.err


def test_pick_names_the_format_that_was_measured(timed: Searched) -> None:
    assert run("pick", timed.folder).out.rstrip().endswith("--format onnx")


def test_onnx_file_is_verified_and_timed_again(timed: Searched, model: Path) -> None:
    arguments = ("--task", timed.task, "--budget", "latency=900%", "--threads", 1, "--batch", 2, "--json")
    result = run("verify", model, *arguments)
    assert result.code == 0, result
    found = result.json
    assert found["ok"] is True
    assert found["bytes"] == model.stat().st_size
    assert found["quality"] == timed.result.json["picked"]["quality_val"]
    low, high = found["latency_quartiles_ms"]
    assert 0 < low <= found["latency_ms"] <= high
    assert found["latency_runtime"] == "onnxruntime"


def test_onnx_file_over_the_budget_does_not_hold(timed: Searched, model: Path) -> None:
    result = run("verify", model, "--task", timed.task, "--budget", "100B", "--json")
    assert (result.code, result.json["ok"]) == (1, False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--threads", 0), ("--threads is 0", "1 or more")),
        (("--batch", -1), ("--batch is -1", "1 or more")),
        (("--batch", 10**6), ("--batch 1000000", "100")),
        (("--budget", "macs=50%"), (".onnx", "bytes or time")),
    ],
)
def test_verify_refuses_what_an_onnx_file_cannot_answer(
    timed: Searched, model: Path, options: tuple[object, ...], words: tuple[str, ...]
) -> None:
    error = refused("verify", model, "--task", timed.task, *options)
    assert [word for word in words if word not in error] == []


@pytest.mark.parametrize("option", ["--threads", "--batch"])
def test_threads_and_batch_are_not_for_packed_files(searched: Searched, artifact: Path, option: str) -> None:
    assert ".onnx" in refused("verify", artifact, "--task", searched.task, option, 2)


@pytest.mark.parametrize("change", ["truncated", "one byte more", "one bit changed", "empty", "garbage"])
def test_verify_refuses_a_damaged_onnx_file(timed: Searched, model: Path, here: Path, change: str) -> None:
    content = model.read_bytes()
    middle = len(content) // 2
    changed = {
        "truncated": content[:middle],
        "one byte more": content + b"\0",
        "one bit changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "empty": b"",
        "garbage": b"garbage" * 100,
    }[change]
    (here / "damaged.onnx").write_bytes(changed)
    assert "damaged.onnx" in refused("verify", "damaged.onnx", "--task", timed.task)


def test_verify_refuses_the_onnx_file_of_another_model(model: Path, here: Path) -> None:
    text = BLOBS.replace("16, 32)", "12, 32)").replace("(700, 16,", "(700, 12,").replace("randn(16, 4", "randn(12, 4")
    (here / "other.py").write_text(text)
    assert "do not belong together" in refused("verify", model, "--task", "other.py:task")


def test_export_of_a_damaged_onnx_file_is_refused(timed: Searched, here: Path) -> None:
    copy = here / "copy"
    for name, content in contents(timed.folder).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    kept = copy / timed.result.json["picked"]["artifact"]
    kept.write_bytes(kept.read_bytes()[:-1])
    assert "trial-" in refused("export", copy, "--output", "model.onnx")
    assert not (here / "model.onnx").exists()


@pytest.mark.slow
def test_run_in_one_format_is_exported_in_the_other(timed: Searched, searched: Searched, here: Path) -> None:
    for source, form, suffix in ((timed, "packed", "acz"), (searched, "onnx", "onnx")):
        result = run("export", source.folder, "--format", form, "--output", f"m.{suffix}", "--json")
        assert (result.code, result.json["format"]) == (0, form)
        assert f"on val as {form}" in result.out
        assert result.json["bytes"] == (here / f"m.{suffix}").stat().st_size
        again = run("verify", f"m.{suffix}", "--task", source.task, "--json")
        assert (again.code, again.json["ok"]) == (0, True), again


def test_export_copies_the_file_that_was_measured(timed: Searched, model: Path, here: Path) -> None:
    assert run("export", timed.folder).code == 0
    (found,) = here.glob("*.onnx")
    assert found.read_bytes() == model.read_bytes()


@pytest.mark.slow
def test_latency_that_no_policy_reaches_names_the_fastest(here: Path) -> None:
    result = run(*SEARCH, "--budget", "latency=0.1%", "--epochs", 0, "--out", "run", "--json")
    assert result.code == 3
    assert "nothing fits" in result.err
    assert re.search(r"the fastest policy of the space .* takes [\d.]+ ms \(the original [\d.]+ ms\)", result.err)
    with Journal.reading(here / "run") as journal:  # before the search
        assert journal.trials() == []


def test_model_without_an_export_names_the_operator_and_the_way_out(here: Path) -> None:
    text = BLOBS.replace("nn.ReLU(), nn.Linear(32, 4)", "Odd(), nn.Linear(32, 4)").replace(
        "def task", "class Odd(nn.Module):\n    def forward(self, x):\n        return x + torch.linalg.svdvals("
        "x.reshape(-1, 8, 4)).sum()\n\n\ndef task"
    )  # fmt: skip
    (here / "odd.py").write_text(text)
    before = contents(here)
    error = refused("search", "odd.py:task", "--budget", "latency=60%", "--trials", 2)
    assert "svd" in error
    assert "packed artifact" in error
    assert contents(here) == before


@pytest.mark.slow
def test_search_of_digits_under_a_latency_budget(here: Path) -> None:
    arguments = ("--space", "tiny", "--budget", "latency=60%", "--trials", 3, "--epochs", 0, "--json")
    found = run("search", "digits", "--out", "run", *arguments)
    assert found.code == 0, found
    (file,) = {here / "run" / found.json["picked"]["artifact"]}
    assert file.suffix == ".onnx"
    assert run("verify", file, "--json").json["ok"] is True


# --- profile and init ---


def test_profile_shows_layers_and_what_cannot_be_pruned(here: Path) -> None:
    result = run("profile", "blobs.py:task", "--json")
    assert result.code == 0
    found = result.json
    assert {"task", "bytes", "macs", "quality", "latency_ms", "layers", "groups", "notes"} <= set(found)
    assert found["bytes"] == 4 * (16 * 32 + 32 + 32 * 32 + 32 + 32 * 4 + 4)
    assert found["macs"] == 16 * 32 + 32 * 32 + 32 * 4
    assert [layer["shape"] for layer in found["layers"]] == [[32, 16], [32, 32], [4, 32]]
    keys = {"name", "kind", "shape", "weights", "bytes", "macs", "loss", "quality", "groups"}
    assert all(keys <= set(layer) for layer in found["layers"])
    assert any(group["frozen"] for group in found["groups"])
    assert contents(here).keys() == {"blobs.py", "broken.py"}


def test_init_does_not_overwrite(here: Path) -> None:
    (here / "my_task.py").write_text("mine")
    assert "my_task.py already exists" in refused("init")
    assert (here / "my_task.py").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_init_writes_a_file_that_search_accepts_as_it_stands() -> None:
    assert run("init", "fresh.py").code == 0
    result = run("search", "fresh.py:task", "--budget", "100kB", "--trials", 4, "--epochs", 0, "--json")
    assert result.code == 0
    assert result.json["picked"]["bytes"] <= 100_000
    assert result.json["picked"]["quality_test"] > 0.8


# --- as a process of its own ---


def process(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "autocompress", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=os.environ)


@pytest.mark.slow
def test_fresh_process_verifies_what_another_exported(searched: Searched, artifact: Path, here: Path) -> None:
    found = process("verify", artifact, "--task", searched.task, "--json", folder=here)
    assert found.returncode == 0
    assert found.stderr == ""
    assert json.loads(found.stdout.splitlines()[-1])["ok"] is True


@pytest.mark.slow
def test_wrong_input_as_a_process(here: Path) -> None:
    found = process(*SEARCH, "--budget", "4 bananas", folder=here)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert found.stderr.startswith("error: cannot read the unit of the budget '4 bananas'")
    assert found.stdout == ""


@pytest.mark.slow
def test_help_does_not_load_torch(here: Path) -> None:
    code = (
        "import sys; sys.argv = ['autocompress', 'search', '--help']\n"
        "from autocompress.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert found.stderr.strip() == "False"
