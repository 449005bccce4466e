"""The report of a run in any state: complete, self-contained, and with the run's names as mere text."""

from __future__ import annotations

import base64
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeTask, World, make_graph

from autocompress.artifact.packed import read
from autocompress.baselines import Baseline
from autocompress.errors import AutocompressError
from autocompress.front import Trial
from autocompress.journal import Journal
from autocompress.policy import Recovery
from autocompress.report.page import Layers
from autocompress.report.plots import front_figure, front_picture, policy_figure
from autocompress.report.tables import COLUMNS, Run, recipe_text, summary, table
from autocompress.report.write import summary_text, write_report
from autocompress.trial import Budget

FILES = ("report.html", "front.png", "front.svg", "front.csv", "trials.csv", "summary.md")
SCRIPT = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Attributes of all tags, text outside and inside scripts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts = "", [""]
        self._in = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        del tag
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts[-1] += data
        else:
            self.text += data


def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with its report; to be read only."""
    with pytest.MonkeyPatch.context() as patch:
        world = World(tmp_path_factory.mktemp("finished")).install(patch)
        world.search()
        return write_report(world.run)


def figures_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The figures that the page holds, by name."""
    found = [script for script in page(folder).scripts if script.startswith('{"figures":')]
    assert len(found) == 1
    return dict(json.loads(found[0])["figures"])


def trace(figure: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [t for t in figure["data"] if t["name"] == name]
    return dict(found)


def numbers(value: Any) -> list[float]:
    """Plotly writes long arrays in base 64."""
    if isinstance(value, dict):
        return np.frombuffer(base64.b64decode(value["bdata"]), np.dtype(value["dtype"])).tolist()
    return list(value)


def test_removed_layers_have_no_bits_and_no_bytes(finished: Run) -> None:
    assert [layer["groups"] for layer in finished.layers] == [["conv1"], ["conv1", "conv2"], ["conv2"]]
    trial = replace(finished.front[0], artifact="")
    policy = replace(trial.evaluation.policy, keep={"conv1": 0.0})
    gone = replace(trial, evaluation=replace(trial.evaluation, policy=policy))
    for one, removed in ((trial, [False] * 3), (gone, [True, True, False])):
        bars = Layers(finished).bars(one)
        drawn = {t.name: list(t.y) for t in policy_figure(finished, bars).data}
        assert list(policy_figure(finished, bars).data[0].x) == ["conv1", "conv2", "fc"]
        for name in ("bits", "channels", "after"):
            assert [value == 0 for value in drawn[name]] == removed


def test_bars_are_those_of_the_file(finished: Run) -> None:
    trial = finished.front[0]
    bars = Layers(finished).bars(trial)
    header = read(finished.folder / trial.artifact).header
    assert bars.after == [
        next(e.nbytes for e in header.entries if e.name == f"{n}.weight") for n in ("conv1", "conv2", "fc")
    ]
    policy = trial.evaluation.policy
    assert bars.bits == [policy.layers[name].bits for name in ("conv1", "conv2", "fc")]
    assert bars.channels == [
        100 * policy.keep["conv1"],
        100 * policy.keep["conv1"] * policy.keep["conv2"],
        100 * policy.keep["conv2"],
    ]


# --- any state of a run ---


def test_finished_run_gets_every_file(finished: Run) -> None:
    assert all((finished.folder / name).stat().st_size > 0 for name in FILES)
    assert (finished.folder / "front.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert finished.picked is not None
    text = page(finished.folder).text
    assert f"Trial {finished.picked.number}" in text
    assert f"{finished.picked.measured.bytes:,} bytes" in text


def test_no_temporary_file_is_left(finished: Run) -> None:
    assert not [path for path in finished.folder.iterdir() if path.name.startswith(".") and path.name != ".lock"]


def test_running_run_is_reported_while_its_process_holds_it(world: World) -> None:
    world.killed(7)  # trial 7 is still marked as running
    with Journal.writing(world.run):
        run = write_report(world.run)
    assert run.evaluations == 7
    assert len(rows_of(world.run / "trials.csv")) == 7
    assert all((world.run / name).exists() for name in FILES)


def test_run_without_trials_is_reported(world: World) -> None:
    world.killed(0)
    run = write_report(world.run)
    assert (run.front, run.picked, run.nearest) == ([], None, None)
    assert "No trial has been measured yet" in page(world.run).text
    assert rows_of(world.run / "front.csv") == []
    json.dumps(summary(run), allow_nan=False)


def test_run_whose_trials_all_failed_is_reported(world: World) -> None:
    world.fault = lambda *_: "raise"
    world.search(trials=5)
    run = write_report(world.run)
    text = page(world.run).text
    assert "5 failed" in text
    assert "made to fail" in text
    assert summary(run)["failed"] == 5


def test_run_in_which_nothing_fits_names_the_nearest(world: World) -> None:
    world.search(budgets=("1us",))
    run = write_report(world.run)
    assert run.picked is None
    assert run.nearest is not None
    assert f"Nearest: trial {run.nearest.number}" in page(world.run).text
    assert run.front
    assert not any(r["feasible"] for r in summary(run)["front"])
    assert summary(run)["picked"] is None
    assert (world.run / "front.png").exists()


def test_metric_to_minimise_is_reported(world: World) -> None:
    world.task = FakeTask(direction="min", metric="perplexity")
    world.search()
    run = write_report(world.run)
    assert run.picked is not None
    assert run.picked.measured.quality == min(t.measured.quality for t in run.front)
    assert "perplexity" in page(world.run).text


def test_run_of_one_trial_is_reported(world: World) -> None:
    world.search(trials=1, epochs=0)
    assert len(write_report(world.run).front) == 1


def test_run_that_ended_before_its_facts_were_written_says_how_to_go_on(world: World) -> None:
    world.killed(0)
    for path in world.run.glob("journal*"):
        path.unlink()
    with Journal.writing(world.run):
        pass
    with pytest.raises(AutocompressError, match=f"--resume {world.run}"):
        write_report(world.run)


def test_damaged_artifact_does_not_spoil_the_report(world: World) -> None:
    world.search()
    for path in (world.run / "artifacts").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    write_report(world.run)
    assert (world.run / "report.html").exists()


def test_report_is_the_same_when_written_again(finished: Run) -> None:
    before = {name: (finished.folder / name).read_bytes() for name in ("front.csv", "trials.csv")}
    write_report(finished.folder)
    assert before == {name: (finished.folder / name).read_bytes() for name in before}


def test_summary_says_what_the_page_says(finished: Run) -> None:
    text = (finished.folder / "summary.md").read_text(encoding="utf-8")
    assert finished.picked is not None
    assert f"**Trial {finished.picked.number}**: {finished.picked.measured.bytes:,} bytes" in text
    rows = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(rows) == len(finished.front)
    for line, trial in zip(rows, finished.front, strict=True):
        assert (
            f"| {trial.number} | {trial.measured.quality:.4f} | {trial.quality_test:.4f} | {trial.measured.bytes:,} |"
            in line
        )


def test_pictures_are_the_same_when_made_again(finished: Run) -> None:
    for form in ("png", "svg"):
        assert front_picture(finished, form) == front_picture(finished, form)


def test_baselines_stand_in_picture_page_and_summary(finished: Run) -> None:
    known = [Baseline("uniform 4 bits", replace(finished.dense, bytes=900, quality=finished.dense.quality - 0.01))]
    beside = replace(finished, baselines=known)
    drawn = trace(json.loads(front_figure(beside).to_json()), "baselines")
    assert drawn["text"] == ["uniform 4 bits"]
    assert (drawn["x"], drawn["y"]) == ([900], [known[0].measurement.quality])
    assert "| uniform 4 bits | " in summary_text(beside)
    assert front_picture(beside, "svg") != front_picture(finished, "svg")


# --- tables ---


def test_front_csv_equals_the_json_rows(finished: Run) -> None:
    found = rows_of(finished.folder / "front.csv")
    assert (finished.folder / "front.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    expected = summary(finished)["front"]
    assert len(found) == len(expected) > 1
    for a, b in zip(found, expected, strict=True):
        assert list(b) == list(COLUMNS)
        for name, kind in COLUMNS.items():
            if b[name] is None:  # a packed file has no predicted latency, a one-shot policy no parent
                assert name in ("predicted_ms", "parent", "quality_before", "bytes_before")
                assert a[name] == ""
                continue
            value = float(a[name]) if kind.lower() in ("int64", "float64") else a[name]
            assert value == (str(b[name]) if kind in ("bool", "str") else b[name]), name


def test_trials_csv_has_every_measured_trial(finished: Run) -> None:
    measured = [t.number for t in finished.trials if t.evaluation.status == "ok"]
    assert [int(r["trial"]) for r in rows_of(finished.folder / "trials.csv")] == measured


def test_tables_are_typed_even_when_empty() -> None:
    empty = table([], Budget(), {})
    assert list(empty.columns) == list(COLUMNS)
    assert [str(kind) for kind in empty.dtypes[["trial", "quality_val", "feasible"]]] == ["int64", "float64", "bool"]


def test_unknown_test_quality_is_empty_in_csv_and_null_in_json(world: World) -> None:
    world.killed(7)
    run = write_report(world.run)
    assert all(r["quality_test"] == "" for r in rows_of(world.run / "front.csv"))
    assert all(r["quality_test"] is None for r in summary(run)["front"])


def test_feasible_says_whether_the_budget_holds(world: World) -> None:
    world.search(budgets=("1.2ms",))
    run = write_report(world.run)

    def fits(trial: Trial) -> bool:
        return bool(run.row(trial)["feasible"])

    ok = [t for t in run.trials if t.evaluation.status == "ok"]
    assert [fits(t) for t in ok] == [t.measured.latency_ms <= 1.2 for t in ok]


# --- before and after recovery ---


@pytest.fixture(scope="module")
def climbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with three rungs; to be read only."""
    with pytest.MonkeyPatch.context() as patch:
        world = World(tmp_path_factory.mktemp("climbed")).install(patch)
        world.search(trials=40, epochs=4)
        return write_report(world.run)


def test_trained_trial_stands_beside_the_one_shot_trial_that_it_began_as(climbed: Run) -> None:
    rows = {r["trial"]: r for r in map(climbed.row, (t for t in climbed.trials if t.evaluation.status == "ok"))}
    trained = [t for t in climbed.trials if t.evaluation.rung and t.evaluation.status == "ok"]
    assert {t.evaluation.rung for t in trained} == {1, 2, 3}
    for t in trained:
        found = rows[t.number]
        parent = climbed.trials[found["parent"]]
        assert parent.evaluation.policy == t.evaluation.policy.without_recovery()
        assert (found["quality_before"], found["bytes_before"]) == (parent.measured.quality, parent.measured.bytes)
        assert found["quality_val"] > found["quality_before"]
        assert found["epochs"] == {1: 1, 2: 2, 3: 4}[found["rung"]]
    shots = [r for r in rows.values() if not r["rung"]]
    assert all(r["parent"] is None and r["recipe"] == "" and r["epochs"] == 0 for r in shots)


def test_figure_leads_from_before_to_after_recovery(climbed: Run) -> None:
    (lines,) = [trace for trace in front_figure(climbed).data if trace.name == "recovery"]
    drawn = list(zip(lines.x, lines.y, strict=True))
    trained = [r for r in map(climbed.row, climbed.front) if r["rung"]]
    expected = [
        ((r["bytes_before"], r["quality_before"]), (r["bytes"], r["quality_val"]), (None, None)) for r in trained
    ]
    assert drawn == [point for points in expected for point in points]


def test_page_names_recipe_rung_and_the_quality_before(climbed: Run) -> None:
    text = page(climbed.folder).text
    trained = [r for r in map(climbed.row, climbed.front) if r["rung"]]
    assert trained
    for r in trained:
        assert r["recipe"] in text
        assert f"{r['quality_before']:.4f}" in text


def test_recipe_says_what_is_used_and_leaves_out_the_rest() -> None:
    plain = recipe_text(Recovery(epochs=1, distill_weight=0.0, decay="constant"))
    assert plain == "rate 0.02, constant"
    used = Recovery(2, 0.1, "step", 0.5, 0.5, 1, 0.8, 3.0, 0.25, "clip", False, scales="learned", ema=0.9, warmup=0.1)
    found = recipe_text(used)
    for text in ("0.1, step to 0.5", "10% warm-up", "x0.5 on a plateau", "0.80 at temperature 3", "hints 0.25", "clip"):
        assert text in found
    assert "learned scales" in found
    assert "0.9" in found.split("mean of weights")[1]


# --- the page is self-contained ---


def test_page_loads_nothing(finished: Run) -> None:
    for tag, attributes in page(finished.folder).tags:
        assert tag not in ("link", "iframe", "img", "object", "embed"), tag
        assert not {"src", "srcset", "href"} & set(attributes), (tag, attributes)


def test_page_holds_plotly_once(finished: Run) -> None:
    assert sum("plotly.js v" in script for script in page(finished.folder).scripts) == 1
    assert (finished.folder / "report.html").stat().st_size < 6_000_000


# --- names are text ---


def strings(value: Any) -> Iterator[str]:
    """Every text inside JSON, keys left out."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(part)


def hostile(world: World, text: str) -> Run:
    """A finished run whose every name is `text`."""
    world.task = FakeTask(name=text, metric=text, graph=make_graph(lambda name: f"{name}{text}".replace(".", "")))
    world.search(task=text, trials=12)
    return write_report(world.run)


NASTY = SCRIPT + '"><img src=x onerror=alert(1)></script><b>x</b>{{ 7 * 7 }} &lt;'


def test_names_are_escaped_in_the_page_and_in_the_figures(world: World) -> None:
    """Plotly shows a few tags of its texts as markup, so `<` must reach it as an entity."""
    hostile(world, NASTY)
    found = page(world.run)
    source = (world.run / "report.html").read_text(encoding="utf-8")
    assert SCRIPT not in source
    assert found.text.count(NASTY) >= 3  # title, heading, sentence
    assert not {"img", "b"} & {tag for tag, _ in found.tags}
    texts = list(strings(figures_of(world.run)))
    shown = [text for text in texts if "x</b>" in text or "&lt;/b&gt;" in text]
    assert shown
    assert not any(tag in text for text in texts for tag in ("<script", "<img", "<b>x"))
    assert any("onerror" in text for text in texts)  # the end of a layer's name, as text


@pytest.mark.slow
@pytest.mark.parametrize("text", ["$x$", "$\\frac{$", "$", "a_b^{c", "\\", "{}%s%", "\u6570\u5b57"])
def test_names_are_mere_text_in_the_picture(world: World, text: str) -> None:
    world.task = FakeTask(name=text, metric=text)
    world.search(task=text, trials=3, epochs=0)
    run = Run.read(world.run)
    assert front_picture(run).startswith(b"\x89PNG")
    assert b"</svg>" in front_picture(run, "svg")


def test_names_do_not_become_formulas_in_csv(world: World) -> None:
    hostile(world, "=cmd()")
    for name in ("front.csv", "trials.csv"):
        assert {r["metric"] for r in rows_of(world.run / name)} == {"'=cmd()"}
        for found in rows_of(world.run / name):
            for column, value in found.items():
                if COLUMNS[column] == "str":
                    assert not value.startswith(("=", "+", "-", "@")), (name, column)


@pytest.mark.parametrize("text", [NASTY, "a|b", "`x`", "[x](javascript:alert(1))", "# x", "x\n\n# y", "$x$"])
def test_names_are_mere_text_in_markdown(world: World, text: str) -> None:
    world.task = FakeTask(name=text, metric=text)
    world.search(task=text, trials=3, epochs=0)
    found = (write_report(world.run).folder / "summary.md").read_text(encoding="utf-8")
    before, _, _ = found.rpartition("\n    ")  # the command stands in a block of code
    assert not re.search(r"(?<!\\)[`\[]|<", before)
    assert sum(line.startswith("# ") for line in found.splitlines()) == 1
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in found.splitlines() if line.startswith("|")}
    assert widths == {9}


def test_error_texts_are_escaped(world: World) -> None:
    world.fault = lambda *_: "raise"
    world.task = FakeTask(name=SCRIPT)
    world.search(trials=3)
    with Journal.writing(world.run) as journal:
        number = len(journal.trials())
        failed = journal.trials()[0].evaluation
        journal.begin(number, failed.policy, 0)
        journal.finish(number, type(failed)(failed.policy, 0, 0, "failed", error=SCRIPT))
    write_report(world.run)
    assert SCRIPT not in (world.run / "report.html").read_text()
    assert SCRIPT in page(world.run).text
