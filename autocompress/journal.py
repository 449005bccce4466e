"""The one truth about a run: a SQLite ledger, one row per trial, each committed to disk before anything else happens.

A killed process loses at most the trials in flight, whose rows say `running`; results that wait for their turn to be
told say `evaluated`. Knows nothing about what the rows mean.
"""

from __future__ import annotations

import json
import math
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from autocompress.errors import AutocompressError, RunError
from autocompress.front import Trial
from autocompress.policy import Policy
from autocompress.trial import Evaluation

SCHEMA = 4
READABLE = (2, 3, 4)
"""Rows of schema 2 lack the seconds at which they were finished, the curves of trainings and predicted bytes; 2 and 3
knew one trial at a time: rows were told in the order of their numbers."""
FILE = "journal.sqlite"
_TABLES = """
CREATE TABLE IF NOT EXISTS trials (
    number INTEGER PRIMARY KEY, state TEXT NOT NULL, rung INTEGER NOT NULL, key TEXT NOT NULL,
    policy TEXT NOT NULL, evaluation TEXT, attempts INTEGER NOT NULL DEFAULT 1,
    quality_test REAL, artifact TEXT, final_ms REAL, finished TEXT,
    screened INTEGER NOT NULL DEFAULT 0, asked INTEGER NOT NULL DEFAULT 0, told INTEGER);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


_ADDED = f"""
ALTER TABLE trials ADD COLUMN screened INTEGER NOT NULL DEFAULT 0;
ALTER TABLE trials ADD COLUMN asked INTEGER NOT NULL DEFAULT 0;
ALTER TABLE trials ADD COLUMN told INTEGER;
UPDATE trials SET asked = number;
UPDATE trials SET told = number WHERE state != 'running';
UPDATE facts SET value = {SCHEMA} WHERE name = 'schema';
"""


class Row(NamedTuple):
    """A trial that was not told yet: it runs, was running when its process died, or waits with its result."""

    number: int
    policy: Policy
    rung: int
    screened: bool
    evaluation: Evaluation | None


class Begun(NamedTuple):
    """When a trial began: after `asked` others had been told."""

    number: int
    rung: int
    screened: bool
    asked: int


@contextmanager
def _malformed() -> Iterator[None]:
    """What Python raises of damaged files beside the database's own errors."""
    try:
        yield
    except UnicodeDecodeError as error:  # the message of an error that quotes the schema
        raise sqlite3.DatabaseError(f"malformed schema: {error}") from error
    except MemoryError as error:  # a row that announces more than it has
        raise sqlite3.DatabaseError("malformed row, or no memory is left") from error


class _Cursor(sqlite3.Cursor):
    def fetchone(self) -> Any:
        with _malformed():
            return super().fetchone()

    def fetchall(self) -> list[Any]:
        with _malformed():
            return super().fetchall()


class _Connection(sqlite3.Connection):
    def execute(self, *given: Any) -> sqlite3.Cursor:
        with _malformed():
            return self.cursor(_Cursor).execute(*given)


class Journal:
    """Rows of a run folder's ledger. Open it to write through `writing`, to look through `reading`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection
        self._told = 0

    @classmethod
    @contextmanager
    def writing(cls, folder: Path) -> Iterator[Journal]:
        """Hold the ledger of `folder` alone; it is made if absent. Raises `RunError` if another process holds it."""
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"{folder} is in use by another autocompress process; wait for it or use another --out"
            ) from None
        except OSError as error:
            raise RunError(f"cannot write in {folder}: {error.strerror}") from None
        try:
            with cls._open(folder, "rwc") as journal:
                journal._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;" + _TABLES)
                if journal.fact("schema") is None:
                    journal.set_fact("schema", SCHEMA)
                journal._check_schema(folder)
                if journal.fact("schema") != SCHEMA:  # older versions cannot read what is written from now on
                    journal._db.executescript(f"BEGIN;{_ADDED}COMMIT;")
                journal._told = journal._db.execute("SELECT COALESCE(MAX(told), -1) + 1 FROM trials").fetchone()[0]
                yield journal
        finally:
            lock.release()

    @classmethod
    @contextmanager
    def reading(cls, folder: Path) -> Iterator[Journal]:
        """Look at the ledger of a finished, running or killed run."""
        if not (folder / FILE).is_file():
            raise RunError(f"{folder} is not a run folder: it has no {FILE}")
        with cls._open(folder, "rw") as journal:
            if not journal._has_tables():
                raise RunError(f"{folder} ended before its first trial; continue it with --resume {folder}")
            journal._check_schema(folder)
            yield journal

    @classmethod
    @contextmanager
    def _open(cls, folder: Path, mode: str) -> Iterator[Journal]:
        if mode == "rw" and not os.access(folder, os.W_OK):
            mode = "ro&immutable=1"  # nobody can write there, and the database's own side files cannot be made
        uri = (folder / FILE).resolve().as_uri() + f"?mode={mode}"
        try:
            connection = sqlite3.connect(uri, uri=True, isolation_level=None, factory=_Connection)
            try:
                yield cls(connection)
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise RunError(f"the journal in {folder} cannot be used: {error}") from error

    def _has_tables(self) -> bool:
        found = self._db.execute("SELECT COUNT(*) FROM sqlite_master WHERE name IN ('trials', 'facts')").fetchone()
        return bool(found[0] == 2)

    def _check_schema(self, folder: Path) -> None:
        written = self.fact("schema")
        if written not in READABLE:
            newer = isinstance(written, int) and written > SCHEMA
            raise RunError(
                f"{folder} was written by {'a newer' if newer else 'another'} version of autocompress (schema "
                f"{written}, this one reads {' and '.join(map(str, READABLE))}): "
                f"{'upgrade autocompress' if newer else 'use that version'}"
            )

    # --- facts: small values about the whole run ---

    def fact(self, name: str, make: Callable[[Any], Any] = lambda value: value) -> Any:
        """What `make` makes of the value of a fact, or None. Raises `RunError` where it cannot be read or made."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        try:
            value = None if row is None else json.loads(row[0])
            return None if value is None else make(value)
        except (*_SENSELESS, AutocompressError) as error:
            raise RunError(f"the journal's fact {name!r} cannot be read: {error}") from error

    def set_fact(self, name: str, value: Any) -> None:
        """Write a fact, replacing its former value."""
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    # --- trials ---

    def begin(self, number: int, policy: Policy, rung: int, *, screened: bool = False, counted: bool = True) -> int:
        """Write that trial `number` is about to run; how often that has been tried, this time included.

        A row that a dead process left `running` under this number is taken over. A try that is not `counted` takes the
        place of the last one: what ended that one had nothing to do with the trial.
        """
        row = self._db.execute(
            "INSERT INTO trials (number, state, rung, key, policy, screened, asked) "
            "VALUES (?, 'running', ?, ?, ?, ?, ?) "
            "ON CONFLICT (number) DO UPDATE SET rung = excluded.rung, policy = excluded.policy, "
            "attempts = CASE WHEN key = excluded.key THEN attempts + ? ELSE 1 END, key = excluded.key, "
            "screened = excluded.screened WHERE state = 'running' RETURNING attempts",
            (number, rung, policy.key(), json.dumps(policy.to_json()), screened, self._told, counted),
        ).fetchone()
        if row is None:
            raise RunError(f"trial {number} is already finished")
        return int(row[0])

    def release(self) -> None:
        """Take back the last try of the trials that run: what ends this process is not their fault."""
        self._db.execute("UPDATE trials SET attempts = attempts - 1 WHERE state = 'running'")

    def arrive(self, number: int, evaluation: Evaluation) -> None:
        """Write what became of a trial that is told later: a process that dies before need not run it again."""
        self._write(number, evaluation.to_json(), "evaluated", None)

    def finish(self, number: int, evaluation: Evaluation, seconds: float = 0.0) -> None:
        """Write what became of a trial, that it is told next, and the run's seconds so far; it is finished once."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._write(number, evaluation.to_json() | {"at": round(seconds, 3)}, evaluation.status, self._told)
            self.set_fact("seconds", seconds)
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
        self._told += 1

    def _write(self, number: int, evaluation: dict[str, Any], state: str, told: int | None) -> None:
        done = self._db.execute(
            "UPDATE trials SET state = ?, evaluation = ?, told = ?, finished = datetime('now') "
            "WHERE number = ? AND state IN ('running', 'evaluated')",
            (state, json.dumps(evaluation), told, number),
        )
        if done.rowcount != 1:
            raise RunError(f"trial {number} is already finished")

    def finalise(self, number: int, quality_test: float, artifact: str, final_ms: float = math.nan) -> None:
        """Write the test quality, artifact name and last timing of a front member."""
        self._db.execute(
            "UPDATE trials SET quality_test = ?, artifact = ?, final_ms = ? WHERE number = ?",
            (_null(quality_test), artifact, _null(final_ms), number),
        )

    def dates(self) -> tuple[str, str] | None:
        """When the first and the last trial were finished, in UTC; None before there is one."""
        first, last = self._db.execute(_DATES).fetchone()
        return None if first is None else (str(first), str(last))

    def trials(self) -> list[Trial]:
        """Finished trials, in order of their numbers."""
        return self._finished("number")

    def told(self) -> list[Trial]:
        """Finished trials, in the order in which they were told."""
        return self._finished("told")

    def _finished(self, order: str) -> list[Trial]:
        rows = self._db.execute(
            "SELECT number, policy, evaluation, quality_test, artifact, final_ms FROM trials "
            f"WHERE state NOT IN ('running', 'evaluated') ORDER BY {order}"
        ).fetchall()
        with _sense():
            return [_trial(*row) for row in rows]

    def untold(self) -> list[Row]:
        """Trials that a dead process left running, or evaluated and not told, in order of their numbers."""
        rows = self._db.execute(
            "SELECT number, policy, rung, screened, evaluation FROM trials "
            "WHERE state IN ('running', 'evaluated') ORDER BY number"
        ).fetchall()
        with _sense():
            return [_row(*row) for row in rows]

    def begun(self) -> list[Begun]:
        """All trials, in the order in which they began."""
        rows = self._db.execute("SELECT number, rung, screened, asked FROM trials ORDER BY asked, number").fetchall()
        with _sense():
            return [Begun(int(number), int(rung), bool(screened), int(asked)) for number, rung, screened, asked in rows]

    def next_number(self) -> int:
        """The number of the first trial that never began."""
        return int(self._db.execute("SELECT COALESCE(MAX(number), -1) + 1 FROM trials").fetchone()[0])


_SENSELESS = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


@contextmanager
def _sense() -> Iterator[None]:
    """`RunError` for rows that make none."""
    try:
        yield
    except (*_SENSELESS, AutocompressError) as error:
        raise RunError(f"the journal holds a row that cannot be read: {error}") from error


def _row(number: int, policy: str, rung: int, screened: int, evaluation: str | None) -> Row:
    known = Policy.from_json(json.loads(policy))
    result = None if evaluation is None else Evaluation.from_json(known, json.loads(evaluation))
    return Row(number, known, int(rung), bool(screened), result)


_DATES = "SELECT MIN(finished), MAX(finished) FROM trials WHERE finished IS NOT NULL"


_ARTIFACT = re.compile(r"artifacts/trial-\d+\.(acz|onnx)")
"""Files that a trial may name: none outside the run folder."""


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _trial(number: int, policy: str, evaluation: str, *final: Any) -> Trial:
    data = json.loads(evaluation)
    at = float(data.pop("at", math.nan))
    known = Evaluation.from_json(Policy.from_json(json.loads(policy)), data)
    if known.status == "ok" and known.measurement is None:
        raise ValueError("a measured trial has no measurement")
    quality_test, artifact, final_ms = final
    if artifact and not _ARTIFACT.fullmatch(artifact):
        raise ValueError(f"{artifact!r} is no artifact of a run")
    nan = math.nan
    return Trial(
        number,
        known,
        nan if quality_test is None else float(quality_test),
        artifact or "",
        nan if final_ms is None else float(final_ms),
        at,
    )
