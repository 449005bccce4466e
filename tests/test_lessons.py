"""What trainings were worth survives on disk, and nothing that is found there can hurt."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from autocompress.errors import PolicyError
from autocompress.lessons import KEPT, Lesson, keep_lessons, read_lessons
from autocompress.policy import Recovery


def lesson(i: int) -> Lesson:
    return Lesson(Recovery(epochs=1, lr=0.001 * (i + 1), decay="step"), 0.04, -0.1 * i)


def test_lessons_come_back_in_order_without_repeats(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    keep_lessons(path, [lesson(0), lesson(1), lesson(0)])
    keep_lessons(path, [lesson(1), lesson(2)])
    assert read_lessons(path) == [lesson(0), lesson(1), lesson(2)]


def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    keep_lessons(tmp_path / "file.json", [])
    assert list(tmp_path.iterdir()) == []


def test_only_the_latest_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    keep_lessons(path, [lesson(i) for i in range(KEPT)])
    keep_lessons(path, [lesson(KEPT)])
    found = read_lessons(path)
    assert (len(found), found[0], found[-1]) == (KEPT, lesson(1), lesson(KEPT))


def test_rows_that_are_no_lessons_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    good = lesson(0).to_json()
    bad = [None, 3, [], {}, good | {"gain": "x"}, good | {"gain": math.nan}, good | {"share": 0.0}]
    bad += [good | {"recovery": {"speed": 1}}, good | {"recovery": {"lr": 99.0}}, good | {"recovery": None}]
    bad += [good | {"gain": 10**400}]
    path.write_text(json.dumps([*bad, good]))
    assert read_lessons(path) == [lesson(0)]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"7", b"[" * 100_000])
def test_file_that_cannot_be_read_teaches_nothing_and_is_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    assert read_lessons(path) == []
    keep_lessons(path, [lesson(0)])
    assert read_lessons(path) == [lesson(0)]


@pytest.mark.parametrize(("share", "gain"), [(0.0, 0.0), (math.nan, 0.0), (0.1, math.inf)])
def test_lesson_that_says_nothing_is_refused(share: float, gain: float) -> None:
    with pytest.raises(PolicyError, match="finite"):
        Lesson(Recovery(epochs=1), share, gain)
