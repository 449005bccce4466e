"""The report in a real browser, opened from disk with the network off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browser
from fakes import FakeTask, World, make_graph

from autocompress.files import write
from autocompress.front import Trial
from autocompress.journal import Journal
from autocompress.policy import LayerChoice, Policy
from autocompress.report.page import render
from autocompress.report.series import quality_range
from autocompress.report.tables import Run
from autocompress.report.write import write_report
from autocompress.trial import Evaluation, Measurement

CHARTS = ("size", "policy", "details", "sensitivity", "progress_evaluations", "progress_seconds", "curves", "choices")
NASTY = '<script>document.title="taken"</script><img src=x onerror="document.title=\'taken\'">'


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the solver with recovery training."""
    with pytest.MonkeyPatch.context() as patch:
        world = World(tmp_path_factory.mktemp("page")).install(patch)
        world.search(controller="solver", trials=30, epochs=2, recoveries=4)
        return write_report(world.run)


def opened(page: Browser, path: Path, **how: Any) -> Browser:
    page.errors.clear()
    page.open(path, **how)
    page.wait("!document.getElementById('data') || document.documentElement.dataset.ready !== undefined")
    return page


def point(page: Browser, name: str, index: int) -> tuple[float, float]:
    """Where the browser shows a point of a trace of the first chart."""
    return tuple(
        page.js(f"""(() => {{
        const chart = document.getElementById('chart-size'), t = chart._fullData.find((t) => t.name === '{name}');
        chart.scrollIntoView({{ block: 'center' }});
        const box = chart.getBoundingClientRect(), layout = chart._fullLayout;
        return [box.x + layout.xaxis._offset + layout.xaxis.d2p(t.x[{index}]),
                box.y + layout.yaxis._offset + layout.yaxis.d2p(t.y[{index}])];
    }})()""")
    )


def text(page: Browser, name: str) -> str:
    return str(page.js(f"document.getElementById('{name}').textContent"))


def bars(page: Browser, name: str) -> list[float]:
    return list(page.js(f"[...document.getElementById('chart-policy')._fullData.find((t) => t.name === '{name}').y]"))


def test_it_opens_from_disk_without_an_error_and_asks_for_nothing(page: Browser, run: Run) -> None:
    opened(page, run.folder / "report.html")
    for name in CHARTS:
        page.js(f"document.getElementById('chart-{name}').scrollIntoView()")
        page.wait(f"document.querySelector('#chart-{name} .main-svg') !== null")
    assert page.errors == []


def test_a_click_on_a_point_moves_the_page_to_its_trial(page: Browser, run: Run) -> None:
    assert run.picked is not None
    opened(page, run.folder / "report.html")
    page.js("document.getElementById('chart-policy').scrollIntoView()")
    page.wait("document.querySelector('#chart-policy .main-svg') !== null")
    assert text(page, "command-pick") == f"autocompress pick {run.folder} --trial {run.picked.number}"
    before = bars(page, "bits"), bars(page, "after")
    policies = {t.number: t.evaluation.policy for t in run.trials}
    names = [layer["name"] for layer in run.layers]
    others = [t for t in run.front if [policies[t.number].layers[n].bits for n in names] != before[0]]
    low, _ = quality_range(run)
    trial = next(t for t in others if t.measured.quality > low)  # where the chart shows it
    page.click(*point(page, "front", run.front.index(trial)))
    assert text(page, "command-pick") == f"autocompress pick {run.folder} --trial {trial.number}"
    assert text(page, "command-export") == f"autocompress export {run.folder} --format packed --trial {trial.number}"
    assert f"Trial {trial.number}" in text(page, "selected-title")
    assert f"{trial.measured.bytes:,} bytes" in text(page, "selected-numbers")
    policy = policies[trial.number]
    assert bars(page, "bits") == [policy.layers[n].bits for n in names]
    assert bars(page, "zeros") == pytest.approx([100 * policy.layers[n].sparsity for n in names])
    assert bars(page, "after") != before[1]
    assert page.js("document.querySelector('tr.current').dataset.trial") == str(trial.number)
    page.js("document.getElementById('back').click()")
    assert (bars(page, "bits"), bars(page, "after")) == before
    assert page.errors == []


def test_the_buttons_walk_along_the_front(page: Browser, run: Run) -> None:
    opened(page, run.folder / "report.html")
    front = [t.number for t in run.front]
    assert len(front) > 2
    page.js(f"document.querySelector('tr[data-trial=\"{front[0]}\"]').click()")
    seen = []
    while True:
        seen.append(int(text(page, "command-pick").rpartition(" ")[2]))
        if page.js("document.getElementById('larger').disabled"):
            break
        page.js("document.getElementById('larger').click()")
    assert seen == front


def test_latency_and_all_trials_are_a_button_away(page: Browser, run: Run) -> None:
    opened(page, run.folder / "report.html")
    near = page.js("document.getElementById('chart-size')._fullLayout.yaxis.range")
    page.js("document.querySelector('[data-zoom=all]').click()")
    wide = page.js("document.getElementById('chart-size')._fullLayout.yaxis.range")
    worst = min(t.measured.quality for t in run.trials if t.evaluation.status == "ok")
    assert wide[0] <= worst < near[0]
    page.js("document.querySelector('[data-axis=latency]').click()")
    assert page.js("document.querySelector('#chart-latency .main-svg') !== null")
    assert page.js("document.getElementById('chart-size').hidden")
    assert page.errors == []


@pytest.mark.parametrize(("width", "phone"), [(390, True), (1280, False)])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_a_desktop_by_day_and_by_night(
    page: Browser, run: Run, width: int, phone: bool, dark: bool
) -> None:
    opened(page, run.folder / "report.html", width=width, height=844, phone=phone, dark=dark)
    assert page.js("document.documentElement.scrollWidth") <= width
    shade = page.js("getComputedStyle(document.body).backgroundColor")
    assert (shade == "rgb(255, 255, 255)") != dark
    ink = page.js("document.getElementById('chart-size')._fullLayout.font.color")
    assert ink == ("#e8e8e8" if dark else "#1a1a1a")
    assert page.errors == []


@pytest.mark.slow
def test_names_run_nothing(page: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path).install(monkeypatch)
    world.task = FakeTask(name=NASTY, metric=NASTY, graph=make_graph(lambda name: f"{name}{NASTY}".replace(".", "")))
    world.search(task=NASTY, controller="solver", trials=14)
    write_report(world.run)
    opened(page, world.run / "report.html")
    for name in ("size", "policy", "sensitivity", "details", "choices"):
        page.js(f"document.getElementById('chart-{name}')?.scrollIntoView()")
        page.wait(f"!document.getElementById('chart-{name}') || document.querySelector('#chart-{name} .main-svg')")
    assert page.js("document.title") == f"autocompress: {NASTY}"
    assert page.js("document.querySelectorAll('img').length") == 0
    assert NASTY in text(page, "selected-numbers")
    assert page.errors == []


@pytest.mark.slow
@pytest.mark.parametrize("state", ["empty", "failed", "nothing fits", "one"])
def test_every_state_of_a_run_opens(page: Browser, world: World, state: str) -> None:
    if state == "empty":
        world.killed(0)
    elif state == "failed":
        world.fault = lambda *_: "raise"
        world.search(trials=4)
    else:
        world.search(trials=1, epochs=0, **({"budgets": ("1us",)} if state == "nothing fits" else {}))
    write_report(world.run)
    opened(page, world.run / "report.html")
    found = page.js("document.querySelector('.answer').textContent")
    words = {
        "empty": "No trial has been measured",
        "failed": "4 failed",
        "nothing fits": "Nearest: trial",
        "one": "Trial 0",
    }
    assert words[state] in found
    assert page.errors == []


# --- many trials ---


def crowded(run: Run, count: int) -> Run:
    """`run` with `count` one-shot trials on a wide front, of random policies."""
    import random

    draw = random.Random(0)
    trials = []
    for number in range(count):
        size = int(2 ** draw.uniform(8, 15))
        quality = 0.95 - 60 / size - draw.expovariate(8)
        layers = {layer["name"]: LayerChoice(draw.choice((2, 4, 8)), draw.choice((0.0, 0.5))) for layer in run.layers}
        measured = Measurement(size, 10_000, quality, 1 - quality, draw.uniform(1, 2))
        trials.append(Trial(number, Evaluation(Policy(layers), 0, 0, "ok", measured, seconds=0.1), at=number / 10))
    return replace(run, trials=trials, budget=replace(run.budget, bytes=20_000))


@pytest.mark.slow
def test_two_thousand_trials_take_an_element_or_so_each(page: Browser, run: Run, tmp_path: Path) -> None:
    """How long a page takes to open is measured in `benchmarks/page.py`; here what it depends on, on any machine."""
    elements = []
    for count in (200, 2000):
        write(tmp_path / "report.html", render(crowded(run, count)).encode())
        opened(page, tmp_path / "report.html")
        elements.append(page.js("document.querySelectorAll('*').length"))
    assert elements[1] - elements[0] < 1.5 * 1800
    assert page.js("document.getElementById('chart-size')._fullData[0].x.length") > 1900
    assert (tmp_path / "report.html").stat().st_size < 7_000_000


@pytest.mark.slow
def test_fifty_thousand_trials_stay_under_ten_megabytes(page: Browser, run: Run, tmp_path: Path) -> None:
    many = crowded(run, 50_000)
    content = render(many).encode()
    assert len(content) < 10_000_000
    write(tmp_path / "report.html", content)
    opened(page, tmp_path / "report.html")
    shown = set(page.js("JSON.parse(document.getElementById('data').textContent).points.map((p) => p.n)"))
    assert {t.number for t in many.front} <= shown
    assert page.errors == []


def test_a_run_that_is_being_written_can_be_looked_at(page: Browser, world: World) -> None:
    world.killed(7)
    with Journal.writing(world.run):
        write_report(world.run)
    opened(page, world.run / "report.html")
    assert page.errors == []
