"""Several processes feed one search through a database: who drives, who may join, and what a killed driver loses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faults.harness import TASK

from autocompress import join
from autocompress.errors import RunError
from autocompress.join import Guest, guest_of, meet, on_storage
from autocompress.journal import Journal
from autocompress.runners import storage
from autocompress.runners.board import Address
from autocompress.study import Settings, Setup

IDENTITY = {"task": "t", "graph": "g", "weights": "w", "dense_quality": 0.9}


@pytest.fixture
def address(tmp_path: Path) -> Address:
    return Address(f"sqlite:///{tmp_path}/meet.db", "pets")


@pytest.fixture
def evaluator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An evaluator of which only its identity matters."""
    monkeypatch.setattr(join, "identity_of", lambda found: found.identity)
    return SimpleNamespace(identity=dict(IDENTITY), run=lambda *_: None)


def offered(evaluator: Any, address: Address, limit: float = 60.0, **settings: Any) -> dict[str, Any]:
    """What others hear of a search with these settings."""
    board, drives = meet(address, resume=False)
    assert drives
    setup = Setup(Settings("/home/me/pets.py:task", ("4MB",), data="/data", **settings), 1.5)
    on_storage(board, 2, limit)(evaluator, setup).close()
    told = board.fact("search")
    assert isinstance(told, dict)
    return told


def test_the_first_drives_the_others_join_and_nobody_joins_what_has_ended(address: Address) -> None:
    board, drives = meet(address, resume=False)
    assert drives
    assert not meet(address, resume=False)[1]
    board.say("ended", True)
    with pytest.raises(RunError, match="has ended"):
        meet(address, resume=False)
    assert meet(address, resume=True)[1]


def test_nobody_takes_over_what_is_driven(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PULSE", 0.05)
    board, _ = meet(address, resume=False)
    with storage.Driver(board), pytest.raises(RunError, match="is driven from"):
        meet(address, resume=True)
    assert meet(address, resume=True)[1]


def test_a_guest_has_the_drivers_settings_and_its_own_task(evaluator: Any, address: Address) -> None:
    told = offered(evaluator, address, seed=3, epochs=2)
    assert "/home/me" not in json.dumps(told)
    assert "/data" not in json.dumps(told)
    guest, limit = guest_of(told, {"task": "mine.py:task", "data": "/here", "budgets": ("4MB",), "seed": 3})
    assert limit == 60.0
    assert guest.setup.dense_ms == 1.5
    assert guest.setup.busy
    settings = guest.setup.settings
    assert settings == Settings("mine.py:task", ("4MB",), seed=3, epochs=2, data="/here")


@pytest.mark.parametrize(
    ("given", "flag"), [({"budgets": ("5MB",)}, "--budget"), ({"seed": 4}, "--seed"), ({"trials": 9}, "--trials")]
)
def test_a_guest_that_wants_something_else_is_refused(
    evaluator: Any, address: Address, given: dict[str, Any], flag: str
) -> None:
    with pytest.raises(RunError, match=flag):
        guest_of(offered(evaluator, address), given)


@pytest.mark.parametrize(
    "change",
    [
        {"version": "0.0.1"},
        {"settings": {}},
        {"settings": None},
        {"precision": {"x": 1}},
        {"table": []},
        {"limit": "x"},
        {"identity": {}},
        {"identity": 3},
        {"dense_ms": None},
    ],
)
def test_what_is_no_search_is_refused(evaluator: Any, address: Address, change: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=r"cannot be read|install the same"):
        guest_of(offered(evaluator, address) | change, {})


@pytest.mark.parametrize(
    ("change", "word"),
    [({"weights": "v"}, "weights"), ({"dense_quality": 0.8}, "dense quality"), ({"graph": "h"}, "graph")],
)
def test_a_guest_with_another_model_is_refused(
    evaluator: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], word: str
) -> None:
    monkeypatch.setattr(Setup, "evaluator", lambda _: evaluator)
    guest = Guest(Setup(Settings("t"), 1.0), IDENTITY)
    assert guest() is evaluator.run
    evaluator.identity["dense_quality"] += 0.001  # the last bits of another machine's arithmetic
    assert guest() is evaluator.run
    evaluator.identity |= change
    with pytest.raises(RunError, match=f"its {word}"):
        guest()


def test_latencies_of_busy_workers_are_refused(evaluator: Any, address: Address) -> None:
    board, _ = meet(address, resume=False)
    with pytest.raises(RunError, match="--latency-table"):
        on_storage(board, 1, 60.0)(evaluator, Setup(Settings("t", ("5ms",)), 1.0))


# --- real processes --------------------------------------------------------------------------------------


def start(folder: Path, *options: object) -> subprocess.Popen[str]:
    """A process of the command line, with the small task of the fault harness."""
    command = [sys.executable, "-m", "autocompress", "search", *map(str, options)]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"AUTOCOMPRESS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(folder: Path) -> int:
    """Trials that the run's journal holds."""
    try:
        with Journal.reading(folder) as journal:
            return len(journal.told())
    except RunError:
        return 0


def until(reached: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
    """Wait for something that these processes do."""
    end = time.monotonic() + 300
    while not reached():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes), [p.communicate()[0] for p in processes]
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_driver_goes_on_and_who_joined_works_on(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(TASK)
    place = ("--storage", f"sqlite:///{tmp_path}/meet.db", "--join", "pets")
    search = ("small.py:slow", "--budget", "size=60%", "--fresh", "--epochs", 1, "--trials", 5000, "--seed", 5)
    driver = start(tmp_path, *search, *place, "--out", "run")
    until(lambda: finished(tmp_path / "run") > 0, driver)
    guest = start(tmp_path, "small.py:slow", *place, "--json")
    other = start(tmp_path, "small.py:task", "--budget", "1MB", *place)
    assert other.communicate()[0].strip().endswith("leave it out to join")
    assert other.returncode == 2
    board = Address(f"sqlite:///{tmp_path}/meet.db", "pets").board()
    assert board is not None
    until(lambda: len(storage.workers_of(board.facts())) == 2, driver, guest)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    before = finished(tmp_path / "run")
    again = start(tmp_path, "--resume", "run", "--trials", before + 40, *place)
    said, heard = again.communicate()[0], guest.communicate()[0]
    assert again.returncode == 0, said
    assert guest.returncode == 0, heard
    found = json.loads(heard.strip().splitlines()[-1])
    assert found["joined"] == "pets"
    assert found["evaluated"] > 2
    with Journal.reading(tmp_path / "run") as journal:
        told = journal.told()
    assert len(told) > before
    assert max(Counter(trial.number for trial in told).values()) == 1
    assert sorted(trial.number for trial in told) == list(range(len(told)))
    assert sum(t.evaluation.rung == 0 and t.evaluation.status == "ok" for t in told) >= before + 35
    trained = [t for t in told if t.evaluation.rung and t.evaluation.status == "ok"]
    assert trained
    for trial in told:
        if trial.artifact:
            assert (tmp_path / "run" / trial.artifact).stat().st_size == trial.measured.bytes
