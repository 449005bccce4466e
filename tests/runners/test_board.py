"""The notice board in a database: a job is taken once, and what comes out is heard once; what is no board says so."""

from __future__ import annotations

import math
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from fakes import fake_worker, make_space
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from autocompress.errors import RunError
from autocompress.evaluate import Job
from autocompress.policy import Policy
from autocompress.runners import board as boards
from autocompress.runners import storage
from autocompress.runners.board import Address, Board, connect, hidden, job_of
from autocompress.runners.storage import Signs, StorageRunner, driven_from

JOB = Job(next(iter(make_space().baselines())), 1, Path("/secret/run/artifacts/trial-3.acz"), True, number=3)


@pytest.fixture
def address(tmp_path: Path) -> Address:
    return Address(f"sqlite:///{tmp_path}/meet.db", "pets")


@pytest.fixture
def board(address: Address) -> Board:
    found = address.create()
    assert found is not None
    return found


def states(board: Board) -> list[TrialState]:
    return [trial.state for trial in board._storage.get_all_trials(board._study)]


def test_only_one_creates_a_search_and_all_find_it(address: Address) -> None:
    assert address.board() is None
    assert address.create() is not None
    assert address.create() is None
    found = address.board()
    assert found is not None
    found.say("word", {"a": 1})
    assert found.fact("word") == {"a": 1}
    assert found.fact("other") is None


def test_a_job_goes_to_one_worker_and_its_answer_to_the_driver(address: Address, board: Board) -> None:
    number = board.post(JOB, "worker-a")
    other = address.board()
    assert other is not None
    assert other.claim("worker-b") is None
    claimed = other.claim("worker-a")
    assert claimed is not None
    assert other.claim("worker-a") is None
    trial, told = claimed
    job, keep = job_of(told)
    assert (trial, keep) == (number, True)
    assert job == replace_paths(JOB)
    (offer,) = board.offers()
    assert (offer.number, offer.worker, offer.outcome) == (number, "worker-a", None)
    other.answer(trial, {"evaluation": {"x": 1}}, b"content")
    (offer,) = board.offers()
    assert offer.outcome is not None
    assert offer.outcome["evaluation"] == {"x": 1}
    board.end(number)
    assert board.offers() == []


def replace_paths(job: Job) -> Job:
    return job._replace(keep=None, checkpoint=None)


def test_many_that_reach_at_once_get_their_own_jobs_in_order(address: Address, board: Board) -> None:
    names = [f"worker-{i}" for i in range(4)]
    given = {name: [board.post(JOB, name) for _ in range(3)] for name in names}
    taken: dict[str, list[int]] = {name: [] for name in names}

    def reach(name: str) -> None:
        own = address.board()
        assert own is not None
        while (claimed := own.claim(name)) is not None:
            taken[name].append(claimed[0])

    threads = [threading.Thread(target=reach, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == given


def test_no_path_of_one_machine_reaches_another(board: Board) -> None:
    board.post(JOB, "worker-a")
    assert "secret" not in repr(board._storage.get_all_trials(board._study))


def test_an_artifact_travels_in_pieces_and_is_not_kept(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "PIECE", 100)
    number, content = board.post(JOB, "worker-a"), os.urandom(1000)
    assert board.claim("worker-a") is not None
    evaluation = fake_worker()(replace_paths(JOB), lambda *_: None)
    board.answer(number, {"evaluation": evaluation.to_json()}, content)
    (offer,) = board.offers()
    trial = board._storage.get_trial(number)
    assert sum(name.startswith("artifact-") for name in trial.user_attrs) == 14
    written: dict[Path, bytes] = {}
    monkeypatch.setattr(storage, "write", written.__setitem__)
    result = storage._result(JOB, offer)
    assert written == {JOB.keep: content}
    assert result.evaluation is not None
    board.end(number, result.evaluation)
    trial = board._storage.get_trial(number)
    assert {value for name, value in trial.user_attrs.items() if name.startswith("artifact-")} == {""}
    assert trial.state is TrialState.COMPLETE
    assert trial.values == [result.evaluation.measurement.loss, result.evaluation.measurement.bytes]  # type: ignore[union-attr]


def test_a_job_that_was_given_up_hears_no_answer(board: Board) -> None:
    number = board.post(JOB, "worker-a")
    assert board.claim("worker-a") is not None
    board.end(number)
    board.answer(number, {"evaluation": {}}, b"late")
    assert "outcome" not in board._storage.get_trial(number).user_attrs
    assert states(board) == [TrialState.FAIL]


def test_a_new_driver_clears_what_the_last_one_offered(board: Board) -> None:
    board.post(JOB, "worker-a")
    board.post(JOB, "worker-a")
    board.claim("worker-a")
    StorageRunner(board, fake_worker).close()
    assert states(board) == [TrialState.FAIL] * 2
    assert board.claim("worker-a") is None


@pytest.mark.parametrize(
    "told", [{}, {"policy": 3}, {"policy": {}, "rung": "x", "screen": True, "number": 1, "keep": True}, 7, None]
)
def test_what_is_no_job_is_refused(told: Any) -> None:
    with pytest.raises(RunError, match="no job"):
        job_of(told)


@pytest.mark.parametrize(
    "outcome",
    [{"evaluation": None}, {"evaluation": 3}, {"evaluation": {"status": "odd"}}, {"evaluation": {}, "pieces": 10**12}],
)
def test_an_answer_that_makes_no_sense_is_no_result(board: Board, outcome: dict[str, Any]) -> None:
    number = board.post(JOB, "worker-a")
    board.claim("worker-a")
    board._storage.set_trial_user_attr(number, "outcome", outcome)
    (offer,) = board.offers()
    result = storage._result(JOB, offer)
    assert result.evaluation is None
    assert "cannot be read" in result.reason


# --- signs of life ----------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])
    return now


def test_who_says_something_new_is_alive_for_a_while(clock: list[float]) -> None:
    signs = Signs({"old": {"sign": 1}})
    signs.look({"old": {"sign": 1}, "new": {"sign": 1}})
    assert [signs.alive(name) for name in ("old", "new", "nobody")] == [False, True, False]
    assert signs.living() == ["new"]
    signs.look({"old": {"sign": 2}, "new": {"sign": 1}})
    assert signs.alive("old")
    clock[0] += storage.LOST
    assert not signs.alive("new")
    signs.look({"new": {"sign": 2}})
    assert signs.alive("new")
    signs.look({"new": {"gone": True}})
    assert not signs.alive("new")
    assert signs.gone("new")


def give(runner: StorageRunner, number: int) -> None:
    """As if the runner had given it to worker-a."""
    runner._flying[number], runner._given[number] = JOB, ("worker-a", storage.time.monotonic())


def test_a_job_of_a_worker_that_falls_silent_is_lost(board: Board, clock: list[float]) -> None:
    runner = StorageRunner(board, fake_worker)
    number = board.post(JOB, "worker-a")
    give(runner, number)
    board.say("worker-a", {"sign": 1, "trial": number, "step": [2, 6]})
    board.claim("worker-a")
    steps: list[tuple[int, int]] = []

    def look() -> None:
        runner._look(lambda _, step, total: steps.append((step, total)))

    look()
    look()
    assert steps == [(2, 6)]
    clock[0] += storage.LOST - 1
    board.say("worker-a", {"sign": 2, "trial": number, "step": ["x"]})
    look()
    clock[0] += storage.LOST - 1
    look()
    assert not runner._found
    clock[0] += 2
    look()
    assert [(r.job.number, r.evaluation) for r in runner._found] == [(3, None)]
    assert states(board) == [TrialState.FAIL]


def test_a_job_of_a_worker_that_said_goodbye_is_lost_at_once(board: Board) -> None:
    runner = StorageRunner(board, fake_worker)
    give(runner, board.post(JOB, "worker-a"))
    board.say("worker-a", {"sign": 1})
    board.claim("worker-a")
    board.say("worker-a", {"gone": True})
    runner._look(lambda *_: None)
    assert len(runner._found) == 1


def test_who_works_for_a_former_driver_gets_nothing_before_that_is_done(board: Board) -> None:
    runner = StorageRunner(board, fake_worker)
    runner._signs.look({"worker-a": {"sign": 7, "trial": 99}})
    assert runner._free() is None
    runner._signs.look({"worker-a": {"sign": 8, "trial": None}})
    assert runner._free() == "worker-a"
    number = board.post(JOB, "worker-a")
    give(runner, number)
    assert runner._free() is None
    runner._posted.add(number)
    runner._signs.look({"worker-a": {"sign": 9, "trial": number}})
    runner._end(number, storage.Result(JOB, None))
    assert runner._free() == "worker-a"


def test_a_driver_is_seen_while_it_drives(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PULSE", 0.05)
    assert driven_from(board) is None
    with storage.Driver(board):
        assert driven_from(board) is not None
    assert board.fact("ended") is True
    board.say("ended", False)  # as if it had been killed
    assert driven_from(board) is None


# --- databases that are none, or do not answer -----------------------------------------------------------


class Flaky:
    """A storage that does not answer so many times."""

    def __init__(self, real: Any, failures: float) -> None:
        self.real, self.failures = real, failures

    def __getattr__(self, name: str) -> Any:
        if self.failures > 0:
            self.failures -= 1
            raise StorageInternalError("connection to me:secret@host lost")
        return getattr(self.real, name)


def test_a_database_that_is_away_for_a_moment_is_asked_again(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "AGAIN", 0.001)
    board._storage = Flaky(board._storage, 3)  # type: ignore[assignment]
    board.say("word", 1)
    assert board.fact("word") == 1


def test_one_that_stays_away_ends_the_search_with_advice(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "AGAIN", 0.001)
    monkeypatch.setattr(boards, "OUTAGE", 0.05)
    board._storage = Flaky(board._storage, math.inf)  # type: ignore[assignment]
    with pytest.raises(RunError, match="--resume"):
        board.say("word", 1)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("meet.db", "takes sqlite"),
        ("redis://host", "takes sqlite"),
        ("grpc://host", "HOST:PORT"),
        ("sqlite:////nowhere/at/all/meet.db", "cannot be used"),
        ("mysql://me:secret@host/db", "pip install"),
    ],
)
def test_what_is_no_storage_says_what_one_is(url: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "AGAIN", 0.0)
    monkeypatch.setitem(boards.KINDS, "mysql", "no_such_module")
    with pytest.raises(RunError, match=why) as raised:
        connect(url)
    assert "secret" not in str(raised.value)


def test_passwords_are_not_shown() -> None:
    text = "autocompress search --storage postgresql://me:pa55@host/db --budget 4MB"
    assert hidden(text) == "autocompress search --storage postgresql://me:***@host/db --budget 4MB"
    assert hidden("sqlite:///a.db and me@host:7") == "sqlite:///a.db and me@host:7"


def test_the_proxy_of_a_storage_serves_as_well(tmp_path: Path) -> None:
    """Many machines behind one gRPC server."""
    grpc = pytest.importorskip("grpc", reason="needs grpcio: pip install 'autocompress[storage]'")
    from optuna.storages._grpc import server

    real = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/meet.db")
    with __import__("socket").create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    serving = server.make_server(real, "localhost", port)
    serving.start()
    try:
        board = Address(f"grpc://localhost:{port}", "pets").create()
        assert board is not None
        number = board.post(JOB, "worker-a")
        claimed = board.claim("worker-a")
        assert claimed is not None
        assert job_of(claimed[1])[0].policy == JOB.policy
        board.answer(number, {"evaluation": {}}, bytes(5 * 2**20))
        (offer,) = board.offers()
        assert offer.artifact is not None
        assert len(offer.artifact) == 4 * math.ceil(5 * 2**20 / 3)
        board.end(number)
        board.answer(number, {"evaluation": {}})
        assert states(board) == [TrialState.FAIL]
        assert Address(f"grpc://localhost:{port}", "nobody").board() is None
    finally:
        serving.stop(None)
    assert grpc is not None


def test_policies_survive(board: Board) -> None:
    """What a worker reads is what was proposed, recovery and all."""
    for policy in (*make_space().baselines(), Policy()):
        board.post(replace_paths(JOB)._replace(policy=replace(policy, activations=8)), "worker-a")
        claimed = board.claim("worker-a")
        assert claimed is not None
        assert job_of(claimed[1])[0].policy == replace(policy, activations=8)
