"""A real search that is killed again and again ends like one that never was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fakes import BLOBS

from autocompress.errors import RunError
from autocompress.front import Trial
from autocompress.journal import Journal

pytestmark = pytest.mark.slow

SLOW = f"""{BLOBS}

import time

quick = task


def slow():
    made = quick()
    score = made.score
    made.score = lambda model, split: time.sleep(0.03) or score(model, split)
    return made
"""
STARTER = """
import json, os, sys
import autocompress.evaluate, autocompress.report.write, autocompress.study
from autocompress import cli

print("ready", flush=True)
for line in sys.stdin:
    log, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = ["autocompress", *arguments]
        cli.main()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Forks a process for each command that it reads, so that PyTorch is imported once."""
LIMIT = 60.0


class Starter:
    """Starts `autocompress` in processes of their own, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "blobs.py").write_text(SLOW)
        self._process = subprocess.Popen(
            [sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, *arguments: object) -> int:
        """The new process's id."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(self.log), [str(a) for a in arguments]]) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def search(self, run: str) -> int:
        """Start the search, or go on with it."""
        if (self.folder / run / "config.json").exists():
            return self.start("search", "--resume", run)
        options = ("--budget", "size=60%", "--trials", 18, "--epochs", 2, "--seed", 5, "--fresh", "--out", run)
        return self.start("search", "blobs.py:slow", *options)

    def ended(self) -> int:
        """Wait for the process; its exit code, negative for a signal."""
        return int(self._line())

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    found = Starter(tmp_path_factory.mktemp("killed"))
    yield found
    found.close()


def trials(folder: Path) -> list[Trial]:
    """Finished trials so far."""
    try:
        with Journal.reading(folder) as journal:
            return journal.trials()
    except RunError:  # not made yet
        return []


def essence(found: list[Trial]) -> list[tuple[int, str, str, int, str]]:
    """Everything that may not depend on the clock."""
    return [
        (
            t.number,
            t.evaluation.policy.key(),
            t.evaluation.status,
            0 if t.evaluation.measurement is None else t.measured.bytes,
            repr(None if t.evaluation.measurement is None else t.measured.quality),
        )
        for t in found
    ]


@pytest.fixture(scope="module")
def whole(starter: Starter) -> list[Trial]:
    """The trials of a run that nobody disturbed."""
    starter.search("whole")
    assert starter.ended() == 0
    found = trials(starter.folder / "whole")
    assert sum(t.evaluation.rung for t in found) >= 2
    return found


def wait_for(folder: Path, count: int) -> None:
    """Until the run has finished `count` trials."""
    end = time.monotonic() + LIMIT
    while len(trials(folder)) < count:
        assert time.monotonic() < end
        time.sleep(0.03)


def test_killed_at_random_moments_it_ends_like_an_undisturbed_run(starter: Starter, whole: list[Trial]) -> None:
    """Two trials are let through after each start: one that dies twice with its process is given up, as it should."""
    draw, run = random.Random(0), "killed"
    folder, before = starter.folder / run, 0
    for _ in range(4):
        process = starter.search(run)
        wait_for(folder, min(before + draw.randint(2, 5), len(whole) - 1))
        time.sleep(draw.uniform(0.0, 0.12))
        with suppress(ProcessLookupError):  # it was quicker
            os.kill(process, signal.SIGKILL)
        assert starter.ended() in (-signal.SIGKILL, 0)
        found = trials(folder)
        assert essence(found) == essence(whole)[: len(found)]
        assert len(found) >= before
        before = len(found)
    starter.search(run)
    assert starter.ended() == 0
    found = trials(folder)
    assert [t.number for t in found] == list(range(len(whole)))
    assert essence(found) == essence(whole)
    assert [t.quality_test for t in found if t.artifact] == [t.quality_test for t in whole if t.artifact]
    for name in ("artifacts", "policies"):
        assert {p.name for p in (folder / name).glob("trial-*")} == {
            p.name for p in (starter.folder / "whole" / name).glob("trial-*")
        }
    for path in (folder / "artifacts").glob("trial-*"):
        assert path.read_bytes() == (starter.folder / "whole" / "artifacts" / path.name).read_bytes()


def test_interrupted_once_it_reports_and_can_be_continued(starter: Starter, whole: list[Trial]) -> None:
    folder = starter.folder / "interrupted"
    process = starter.search("interrupted")
    wait_for(folder, 8)
    os.kill(process, signal.SIGINT)
    assert starter.ended() == 0
    found = trials(folder)
    assert 8 <= len(found) < len(whole)
    assert essence(found) == essence(whole)[: len(found)]
    assert (folder / "report.html").is_file()
    assert list((folder / "artifacts").glob("*.acz"))
    assert "ending after what is in flight" in starter.log.read_text()
    starter.search("interrupted")
    assert starter.ended() == 0
    assert essence(trials(folder)) == essence(whole)


def test_interrupted_twice_it_stops_at_once_and_can_be_continued(starter: Starter, whole: list[Trial]) -> None:
    folder = starter.folder / "twice"
    process = starter.search("twice")
    wait_for(folder, 5)
    os.kill(process, signal.SIGINT)
    time.sleep(0.02)
    os.kill(process, signal.SIGINT)
    assert starter.ended() == 130
    found = trials(folder)
    assert essence(found) == essence(whole)[: len(found)]
    starter.search("twice")
    assert starter.ended() == 0
    assert essence(trials(folder)) == essence(whole)


def test_log_holds_no_traceback(starter: Starter, whole: list[Trial]) -> None:
    assert whole
    assert "Traceback" not in starter.log.read_text()
