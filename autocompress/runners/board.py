"""A search's notice board in a database: jobs, for whom they are, and what came out.

The database is an Optuna storage: SQLite, PostgreSQL, MySQL, or its gRPC proxy. A study in it, named as the search,
holds one trial for each job, which is for one worker: no database must decide between two. What is on it may get lost,
and nothing but the trials in flight with it: the driver's journal is the truth.
"""

from __future__ import annotations

import base64
import contextlib
import math
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from autocompress.errors import AutocompressError, RunError
from autocompress.evaluate import Job
from autocompress.policy import Policy
from autocompress.trial import Evaluation

BUSY = 60.0
"""Seconds for which an SQLite file may be held by another process."""
OUTAGE, AGAIN, SELDOM = 300.0, 0.5, 10.0
"""Seconds for which a database that does not answer is asked again, and between two tries: at first, and at most."""
PIECE = 2**20
"""Characters of an artifact that travel at once: a gRPC server takes messages of 4 MB."""
KINDS = {"sqlite": "", "postgresql": "psycopg", "mysql": "MySQLdb", "grpc": "grpc"}
"""Kinds of storage, and the module each needs beyond Optuna."""

T = TypeVar("T")


def connect(url: str) -> BaseStorage:
    """The storage at `url`. Raises `RunError` if it is none, lacks a module, or does not answer."""
    kind = re.split(r"[+:]", url, maxsplit=1)[0]
    if kind not in KINDS or "://" not in url:
        raise RunError(
            "--storage takes sqlite:///FILE, postgresql://USER@HOST/NAME, mysql://USER@HOST/NAME or grpc://HOST:PORT "
            "(of Optuna's storage proxy)"
        )
    if KINDS[kind] and "+" not in url.partition("://")[0] and find_spec(KINDS[kind]) is None:
        raise RunError(f"--storage {kind}:// needs the module {KINDS[kind]}: pip install 'autocompress[storage]'")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    error: Exception | None = None
    for _ in range(3):  # two that make the tables of a new database at once are in each other's way
        try:
            return _grpc(url) if kind == "grpc" else _database(url)
        except RunError:
            raise
        except ImportError as raised:
            raise RunError(f"--storage {kind}:// needs a module that is not installed: {one_line(raised)}") from raised
        except Exception as raised:  # whatever a database's module raises
            error = raised
            time.sleep(AGAIN)
    raise RunError(f"the storage {hidden(url)} cannot be used: {one_line(error)}") from error


def _database(url: str) -> BaseStorage:
    waiting: dict[str, Any] = {"connect_args": {"timeout": BUSY}} if url.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True, **waiting})


def _grpc(url: str) -> BaseStorage:
    host, _, port = url.removeprefix("grpc://").rstrip("/").rpartition(":")
    if not host or not port.isdigit():
        raise RunError(f"{url} names no storage proxy: give grpc://HOST:PORT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        found = optuna.storages.GrpcStorageProxy(host=host, port=int(port))
    found.wait_server_ready(timeout=5)
    return found


def hidden(text: str) -> str:
    """`text` without the passwords of addresses in it."""
    return re.sub(r"(\w://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)


def one_line(error: object) -> str:
    """What an error says, short and without passwords."""
    return hidden(" ".join(str(error).split()))[:300] or type(error).__name__


class Offer(NamedTuple):
    """A job as it stands in the database: for whom it is, and what came out, once that is known.

    `artifact` is a file's content in base64.
    """

    number: int
    worker: str
    outcome: dict[str, Any] | None
    artifact: str | None


@dataclass(frozen=True, slots=True)
class Address:
    """A search's name in a storage."""

    url: str
    name: str

    def board(self) -> Board | None:
        """What is there, or None. Raises `RunError`."""
        storage = connect(self.url)
        try:
            return Board(storage, storage.get_study_id_from_name(self.name), self)
        except KeyError:
            return None

    def create(self) -> Board | None:
        """A new search of that name; None if somebody was faster. Raises `RunError`."""
        storage = connect(self.url)
        with contextlib.suppress(DuplicatedStudyError):
            directions = [StudyDirection.MINIMIZE, StudyDirection.MINIMIZE]  # loss and bytes
            return Board(storage, storage.create_new_study(directions, self.name), self)
        return None


class Board:
    """A search in a storage. Whatever it does is tried again for a while where the database does not answer."""

    def __init__(self, storage: BaseStorage, study: int, address: Address) -> None:
        self._storage, self._study, self.address = storage, study, address

    def _insist(self, call: Callable[[], T]) -> T:
        end, pause = time.monotonic() + OUTAGE, AGAIN
        while True:
            try:
                return call()
            except (UpdateFinishedTrialError, KeyError):
                raise
            except Exception as error:
                grpc = type(error).__module__.startswith("grpc")
                if not (grpc or isinstance(error, StorageInternalError | OSError)):
                    raise
                if time.monotonic() > end:
                    raise RunError(
                        f"the storage {hidden(self.address.url)} has not answered for {OUTAGE:.0f} s: "
                        f"{one_line(error)}; what was finished is in the driver's journal: continue it with --resume"
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, SELDOM)

    # facts

    def fact(self, name: str) -> Any:
        """What was said last under this name, or None."""
        return self.facts().get(name)

    def facts(self) -> dict[str, Any]:
        """All that was said."""
        return self._insist(lambda: self._storage.get_study_user_attrs(self._study))

    def say(self, name: str, value: Any) -> None:
        """Replaces what was said under this name; `value` is JSON."""
        self._insist(lambda: self._storage.set_study_user_attr(self._study, name, value))

    # the driver's side

    def post(self, job: Job, worker: str) -> int:
        """Give a job to a worker; its id."""
        told = {
            "policy": job.policy.to_json(),
            "rung": job.rung,
            "screen": job.screen,
            "number": job.number,
            "keep": job.keep is not None,
        }
        trial = create_trial(state=TrialState.WAITING, user_attrs={"job": told, "worker": worker})
        return self._insist(lambda: self._storage.create_new_trial(self._study, trial))

    def offers(self) -> list[Offer]:
        """Jobs that nobody has ended."""
        return [_offer(trial) for trial in self._trials(TrialState.WAITING, TrialState.RUNNING)]

    def end(self, trial: int, evaluation: Evaluation | None = None) -> None:
        """Of this job nothing more is wanted; its artifact goes."""
        found = None if evaluation is None else evaluation.measurement
        values = None if found is None else [found.loss, float(found.bytes)]
        if values is None or not all(map(math.isfinite, values)):
            values = None
        state = TrialState.FAIL if values is None else TrialState.COMPLETE

        def finish() -> None:
            with contextlib.suppress(UpdateFinishedTrialError):
                for name in self._storage.get_trial(trial).user_attrs:
                    if name.startswith("artifact-"):
                        self._storage.set_trial_user_attr(trial, name, "")
                self._storage.set_trial_state_values(trial, state, values)

        self._insist(finish)

    def clear(self) -> None:
        """Nothing that was offered is wanted any more."""
        for offer in self.offers():
            self.end(offer.number)

    # a worker's side

    def claim(self, worker: str) -> tuple[int, Any] | None:
        """Take the oldest job that is for this worker: its id, and what `job_of` reads; None if there is none."""
        for trial in self._trials(TrialState.WAITING):
            number = trial._trial_id
            if trial.user_attrs.get("worker") == worker:
                with contextlib.suppress(UpdateFinishedTrialError):  # taken back just now
                    self._insist(partial(self._storage.set_trial_state_values, number, TrialState.RUNNING))
                    return number, trial.user_attrs.get("job")
        return None

    def answer(self, trial: int, outcome: dict[str, Any], artifact: bytes | None = None) -> None:
        """What came out. The driver may have given it up meanwhile: then nobody hears it."""
        text = "" if artifact is None else base64.b64encode(artifact).decode()
        pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
        told = outcome | {"pieces": None if artifact is None else len(pieces)}
        with contextlib.suppress(UpdateFinishedTrialError):
            for i, piece in enumerate(pieces):
                self._insist(partial(self._storage.set_trial_user_attr, trial, f"artifact-{i}", piece))
            self._insist(lambda: self._storage.set_trial_user_attr(trial, "outcome", told))

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._insist(lambda: self._storage.get_all_trials(self._study, deepcopy=False, states=states))


def _offer(trial: FrozenTrial) -> Offer:
    told, artifact = trial.user_attrs, None
    outcome = told["outcome"] if isinstance(told.get("outcome"), dict) else None
    if outcome is not None and isinstance(outcome.get("pieces"), int):
        artifact = "".join(str(told.get(f"artifact-{i}", "")) for i in range(min(outcome["pieces"], len(told))))
    return Offer(trial._trial_id, str(told.get("worker")), outcome, artifact)


def job_of(told: Any) -> tuple[Job, bool]:
    """A job, and whether it leaves an artifact; where, the other machine's paths do not say.

    Raises `RunError` for what is none.
    """
    try:
        number, rung, keep = int(told["number"]), int(told["rung"]), told["keep"] is True
        return Job(Policy.from_json(told["policy"]), rung, screen=told["screen"] is True, number=number), keep
    except (KeyError, TypeError, ValueError, AttributeError, AutocompressError) as error:
        raise RunError(f"the storage offers something that is no job: {one_line(error)}") from error
