"""A disk that is full, tears or does not sync, a folder that is closed, a wrong clock, no memory, a trial that hangs.

The search says so and ends, or goes on without; nothing that was finished is lost, nothing on disk is torn, and what
goes on ends like a run that nobody disturbed.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.harness import Plan, Starter, Tally, check_at_rest, check_ended, essence, kill_at_random, trials

from autocompress.front import Trial

pytestmark = pytest.mark.slow
YEARS = 10 * 365 * 86_400


def broken_then_whole(
    starter: Starter, reference: Path, run: str, plans: list[Plan], words: str, codes: tuple[int, ...] = (2,)
) -> None:
    """Each plan ends the run with a line of these `words`; then it goes on, and ends as if nothing had been."""
    for plan in plans:
        starter.search(run, plan=plan)
        assert starter.ended() in codes, plan
        assert words in starter.said(), plan
        assert "Traceback" not in starter.said()
        check_at_rest(starter.folder / run, trials(reference))
    starter.search(run)
    assert starter.ended() == 0
    check_ended(starter.folder / run, reference)


def test_no_space_for_a_file_ends_the_search_and_it_goes_on_later(starter: Starter, reference: Path) -> None:
    plans = [
        Plan("no-space", "autocompress.study:write"),
        Plan("no-space", "autocompress.evaluate:write"),
        Plan("broken-disk", "autocompress.evaluate:write"),
        Plan("no-space", "autocompress.study:write", 3),
        Plan("no-space", "autocompress.report.write:write", 2),
    ]
    broken_then_whole(starter, reference, "no space", plans, "error:")


def test_no_space_for_what_can_be_made_again_is_no_obstacle(starter: Starter, reference: Path) -> None:
    for i, at in enumerate(("autocompress.engine.checkpoint:write", "autocompress.engine.cache:write")):
        shutil.rmtree(starter.folder / "cache" / "levels", ignore_errors=True)
        starter.search(f"spared {i}", plan=Plan("no-space", at))
        assert starter.ended() == 0
        check_ended(starter.folder / f"spared {i}", reference)


@pytest.mark.parametrize("size", [3_000, 40_000, 90_000])
def test_files_that_the_system_cuts_off(starter: Starter, reference: Path, size: int) -> None:
    """Writes beyond the limit are short, and then fail: those of the journal's log as well."""
    run, folder = f"short {size}", starter.folder / f"short {size}"
    starter.search(run, plan=Plan("short", options={"bytes": size}))
    assert starter.ended() == 2
    assert "error:" in starter.said()
    assert "Traceback" not in starter.said()
    check_at_rest(folder, trials(reference))
    starter.search(run)
    assert starter.ended() == 0
    check_ended(folder, reference)


@pytest.fixture
def small_disk(starter: Starter) -> Iterator[Path]:
    """A file system of 400 kB in memory."""
    folder = starter.folder / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_disk_that_is_full(starter: Starter, reference: Path, small_disk: Path) -> None:
    for room in (24_000, 80_000, 160_000):
        filler = small_disk / "filler"
        filler.write_bytes(bytes(room))  # so much is free once it is gone
        rest = os.statvfs(small_disk)
        (small_disk / "rest").write_bytes(bytes(rest.f_bavail * rest.f_frsize))
        filler.unlink()
        starter.search(small_disk / "run")
        assert starter.ended() in (1, 2)
        assert "error:" in starter.said()
        assert "Traceback" not in starter.said()
        (small_disk / "rest").unlink()
        check_at_rest(small_disk / "run", trials(reference))
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    starter.search(small_disk / "run")
    assert starter.ended() == 0
    check_ended(small_disk / "run", reference)


def test_disk_that_does_not_sync_takes_no_file(starter: Starter, reference: Path) -> None:
    broken_then_whole(starter, reference, "no sync", [Plan("no-sync")], "error:")


@pytest.fixture
def closed(starter: Starter, reference: Path) -> Iterator[Path]:
    """A copy of the run in a folder where nobody may write."""
    outer = starter.folder / "closed"
    shutil.copytree(reference, outer / "run")
    inside = [outer, *outer.rglob("*")]
    for path in inside:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield outer / "run"
    for path in inside:
        path.chmod(0o755)
    shutil.rmtree(outer)


def test_folder_that_is_closed_is_named_and_left_alone(starter: Starter, closed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in closed.parent.rglob("*")}
    for run in (closed, closed.parent / "fresh"):
        starter.search(run, plan=Plan("ordinary"))
        assert starter.ended() == 2
        assert re.search(f"error: .*{run}.*[Pp]ermission denied", starter.said())
    assert {path: path.stat().st_mtime_ns for path in closed.parent.rglob("*")} == before


def test_folder_that_is_closed_can_be_read(starter: Starter, closed: Path) -> None:
    starter.start("pick", closed, "--best", plan=Plan("ordinary"))
    assert starter.ended() == 0
    assert "Trial" in starter.said()


@pytest.mark.parametrize("seconds", [-YEARS, YEARS])
def test_clock_that_is_wrong_and_jumps_changes_nothing(starter: Starter, reference: Path, seconds: int) -> None:
    run = f"clock {seconds}"
    starter.search(run, plan=Plan("clock", options={"seconds": seconds}))
    assert starter.ended() == 0
    check_ended(starter.folder / run, reference)


def test_trial_without_memory_fails_and_the_search_goes_on(starter: Starter, whole: list[Trial]) -> None:
    starter.search("no memory", plan=Plan("no-memory", "autocompress.engine:Workbench.realise", 12))
    assert starter.ended() == 0
    found = trials(starter.folder / "no memory")
    (failed,) = [t for t in found if t.evaluation.status == "failed"]
    assert "MemoryError: no memory is left" in failed.evaluation.error
    assert essence(found)[: failed.number] == essence(whole)[: failed.number]
    check_ended(starter.folder / "no memory", starter.folder / "no memory")


# --- with processes beside ------------------------------------------------------------------------------

SIDE_BY_SIDE = ("--deterministic", 2, "--trials", 10)


@pytest.fixture(scope="module")
def in_pairs(starter: Starter) -> Path:
    """An undisturbed run of one process that tells in pairs."""
    starter.search("pairs", *SIDE_BY_SIDE, "task", "hanging")
    assert starter.ended() == 0
    return starter.folder / "pairs"


def test_trial_that_hangs_is_stopped_and_tried_again(starter: Starter, in_pairs: Path) -> None:
    (starter.folder / "hang").touch()
    starter.search("hangs", *SIDE_BY_SIDE, "--workers", 2, "--trial-timeout", "8s", "task", "hanging")
    assert starter.ended() == 0
    assert not (starter.folder / "hang").exists()
    check_ended(starter.folder / "hangs", in_pairs)


def test_driver_of_processes_is_killed(starter: Starter, in_pairs: Path) -> None:
    tally = Tally(seconds=20.0)
    options = (*SIDE_BY_SIDE, "--workers", 2, "task", "hanging")
    kill_at_random(starter, "driver", in_pairs, 3, random.Random(1), tally, *options)
    assert tally.runs == 1


def test_full_disk_of_a_process_beside_ends_the_search(starter: Starter, in_pairs: Path) -> None:
    """The limit of the driver holds for its processes too."""
    options = (*SIDE_BY_SIDE, "--workers", 2, "task", "hanging")
    starter.search("beside", *options, plan=Plan("short", options={"bytes": 60_000}))
    assert starter.ended() == 2
    check_at_rest(starter.folder / "beside", trials(in_pairs))
    starter.search("beside", *options)
    assert starter.ended() == 0
    check_ended(starter.folder / "beside", in_pairs)
