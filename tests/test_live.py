"""What a terminal and a log see of a running search."""

from __future__ import annotations

from io import StringIO

import pytest
from fakes import World, evaluation
from rich.console import Console

from autocompress import live
from autocompress.front import Trial
from autocompress.live import ASCII, BLOCKS, Pace, View, duration, line, sparkline, watching
from autocompress.study import Progress

POINTS = ((1_000, 0.5), (10_000, 0.75), (100_000, 1.0))


def glance(**given: object) -> Progress:
    best = Trial(3, evaluation(0.9, 1234))
    plain = {"stage": "searching", "done": 5, "total": 60, "evaluations": 5, "front": 3, "best": best}
    return Progress(**(plain | {"seconds": 2.0, "left": 70.0, "points": POINTS} | given))  # type: ignore[arg-type]


def terminal(**given: object) -> Console:
    options = {"file": StringIO(), "force_terminal": True, "width": 100, "color_system": None, "highlight": False}
    return Console(**(options | {"_environ": {"TERM": "xterm"}} | given))  # type: ignore[arg-type]


def text(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_sparkline_rises_with_the_best_quality_within_each_size() -> None:
    drawn = sparkline(POINTS)
    assert len(drawn) == live.COLUMNS
    assert (drawn[0], drawn[-1]) == (BLOCKS[0], BLOCKS[-1])
    levels = [BLOCKS.index(block) for block in drawn]
    assert levels == sorted(levels)
    assert levels.count(levels[len(levels) // 2]) > 5  # a step where 10 kB begin, halfway on a log scale
    assert sparkline([(size, -quality) for size, quality in POINTS], rising=False) == drawn
    assert set(sparkline(POINTS, plain=True)) <= set(ASCII)
    assert (sparkline([]), len(sparkline(POINTS[:1]))) == ("", 1)


def test_pace_is_that_of_the_last_half_minute() -> None:
    pace = Pace()
    assert str(pace) == ""
    pace.note(0.0, 100)  # of an earlier part of the run
    assert str(pace) == ""
    pace.note(10.0, 120)
    assert str(pace) == "2.0 evaluations/s"
    for second in range(11, 80):
        pace.note(float(second), 120 + (second - 10) // 4)
    assert str(pace) == "4.3 s an evaluation" or str(pace).startswith(("3.", "4."))
    pace.note(80.0, 1)
    assert str(pace) == ""


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "0 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")]
)
def test_durations_are_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_view_shows_stage_pace_best_front_and_time_left() -> None:
    console, view = terminal(), View()
    console.print(view)
    view.update(glance(seconds=0.0, evaluations=1, left=None))
    view.update(glance(detail="[red]step 3[/]"))
    console.print(view)
    shown = text(console)
    for words in ("loading the task", "searching", "5/60", "5 evaluations, 2.0 evaluations/s", "about 1 min 10 s left"):
        assert words in shown
    assert "0.9000 at 1,234 bytes" in shown
    assert "front of 3" in shown
    assert sparkline(POINTS) in shown
    assert "0.5000 at 1,000 bytes to 1.0000 at 100,000" in shown
    assert "[red]step 3[/]" in shown  # a layer's name is text


@pytest.mark.parametrize("width", [30, 60, 200])
def test_view_fits_any_width(width: int) -> None:
    console, view = terminal(width=width), View()
    view.update(glance())
    console.print(view)
    assert max(len(row.rstrip()) for row in text(console).splitlines()) <= width


def test_log_has_a_line_for_each_stage_and_no_more_than_one_in_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    console, now = terminal(force_terminal=False), 0.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    with watching(console) as watch:
        for step in range(25):
            now = float(step)
            watch(glance(done=step, seconds=now, evaluations=step, note="planned: 4 trainings" if step == 3 else ""))
        watch(glance(stage="recovering"))
    rows = text(console).splitlines()
    assert [row for row in rows if row.startswith("searching")] == [
        row for row in rows if row.startswith(("searching 0/", "searching 10/", "searching 20/"))
    ]
    assert rows[0] == "loading the task"
    assert "planned: 4 trainings" in rows
    assert rows[-1].startswith("recovering")
    assert "\x1b" not in text(console)


def test_a_line_says_everything_that_the_view_does() -> None:
    said = line(glance(detail="step 1 of 34"), "2.0 evaluations/s")
    assert said == (
        "searching 5/60 (step 1 of 34) | 5 evaluations, 2 s, 2.0 evaluations/s | best in budget: 0.9000 at 1,234 bytes "
        "| front 3 | about 1 min 10 s left"
    )
    assert "evaluations" not in line(glance(stage="comparing"))


def test_a_search_tells_the_view_its_front(world: World) -> None:
    seen: list[Progress] = []
    found = world.search(watch=seen.append)
    assert seen[-1].points == tuple((t.measured.bytes, t.measured.quality) for t in found.front)
    console = terminal()
    with watching(console) as watch:
        for progress in seen:
            watch(progress)
    assert "searching" in text(console)
