"""A real search that is killed again and again ends like one that never was."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from faults.harness import (
    LIMIT,
    Plan,
    Starter,
    Tally,
    check_at_rest,
    check_ended,
    essence,
    kill_at_random,
    trials,
)

from autocompress.front import Trial

pytestmark = pytest.mark.slow


def wait_for(folder: Path, count: int) -> None:
    """Until the run has finished `count` trials."""
    end = time.monotonic() + LIMIT
    while len(trials(folder)) < count:
        assert time.monotonic() < end
        time.sleep(0.03)


def test_killed_at_random_moments_it_ends_like_an_undisturbed_run(starter: Starter, reference: Path) -> None:
    tally = Tally()
    kill_at_random(starter, "killed", reference, 8, random.Random(0), tally)
    assert tally.kills == 8


JOURNAL, STUDY, TRAINING = (
    "autocompress.journal:Journal",
    "autocompress.study",
    "autocompress.engine.finetune:_Training",
)
CHAINS = {
    "before its first trial": (
        Plan("kill-before", f"{JOURNAL}.set_fact"),
        Plan("kill-after", f"{JOURNAL}.set_fact", 3),
        Plan("kill-before", f"{STUDY}:_write_config"),
        Plan("kill-after", f"{STUDY}:_write_config"),
        Plan("kill-before", f"{STUDY}:measure"),
        Plan("kill-before", f"{JOURNAL}.begin"),
    ),
    "between and within trials": (
        Plan("kill-after", f"{JOURNAL}.begin", 4),
        Plan("kill-after", f"{JOURNAL}._write", 2),
        Plan("kill-after", f"{JOURNAL}.finish", 3),
        Plan("kill-before", "autocompress.engine:Workbench.realise", 2),
        Plan("kill-before", f"{JOURNAL}._write", 2),
    ),
    "in recovery training": (
        Plan("kill-before", f"{TRAINING}._learn", 3),
        Plan("kill-before", "autocompress.evaluate:write"),
        Plan("kill-after", "autocompress.evaluate:write", 2),
        Plan("kill-after", "autocompress.engine.checkpoint:Checkpoint.save"),
    ),
    "at the end": (
        Plan("kill-before", f"{JOURNAL}.finalise"),
        Plan("kill-after", f"{JOURNAL}.finalise", 1),
        Plan("kill-before", f"{STUDY}:Study._remove_stale"),
        Plan("kill-before", "autocompress.report.write:write", 2),
    ),
}
"""One run each, killed at these points one after another."""


@pytest.mark.parametrize("name", CHAINS)
def test_killed_at_chosen_points_it_ends_like_an_undisturbed_run(
    starter: Starter, reference: Path, whole: list[Trial], name: str
) -> None:
    shutil.rmtree(starter.folder / "cache" / "profiles", ignore_errors=True)
    for plan in CHAINS[name]:
        starter.search(name, plan=plan)
        assert starter.ended() == -signal.SIGKILL, f"{plan} was never reached"
        check_at_rest(starter.folder / name, whole)
    starter.search(name)
    assert starter.ended() == 0
    check_ended(starter.folder / name, reference)


def test_trial_that_takes_its_process_down_twice_is_given_up(starter: Starter, whole: list[Trial]) -> None:
    folder, plan = starter.folder / "fatal", Plan("kill-before", "autocompress.engine:Workbench.realise", 1)
    starter.search("fatal", plan=Plan("kill-after", "autocompress.journal:Journal.begin", 4))
    assert starter.ended() == -signal.SIGKILL
    starter.search("fatal", plan=plan)
    assert starter.ended() == -signal.SIGKILL
    starter.search("fatal")
    assert starter.ended() == 0
    found = trials(folder)
    assert [t.number for t in found if t.evaluation.status == "failed"] == [3]
    assert "its process ended 2 times" in found[3].evaluation.error
    assert essence(found)[:3] == essence(whole)[:3]


def test_interrupted_once_it_reports_and_can_be_continued(
    starter: Starter, reference: Path, whole: list[Trial]
) -> None:
    folder = starter.folder / "interrupted"
    process = starter.search("interrupted")
    wait_for(folder, 8)
    os.kill(process, signal.SIGINT)
    assert starter.ended() == 0
    found = check_at_rest(folder, whole)
    assert 8 <= len(found) < len(whole)
    assert (folder / "report.html").is_file()
    assert list((folder / "artifacts").glob("*.acz"))
    assert "ending after what is in flight" in starter.said()
    starter.search("interrupted")
    assert starter.ended() == 0
    check_ended(folder, reference)


def test_interrupted_twice_it_stops_at_once_and_can_be_continued(
    starter: Starter, reference: Path, whole: list[Trial]
) -> None:
    folder = starter.folder / "twice"
    process = starter.search("twice")
    wait_for(folder, 5)
    os.kill(process, signal.SIGINT)
    time.sleep(0.02)
    os.kill(process, signal.SIGINT)
    assert starter.ended() == 130
    check_at_rest(folder, whole)
    starter.search("twice")
    assert starter.ended() == 0
    check_ended(folder, reference)


def test_log_holds_no_traceback(starter: Starter, reference: Path) -> None:
    assert reference.is_dir()
    assert "Traceback" not in starter.all_said()
