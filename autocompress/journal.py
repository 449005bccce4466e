"""The one truth about a run: a SQLite ledger, one row per trial, each committed to disk before anything else happens.

A killed process loses at most the trial in flight, whose row says `running`. Knows nothing about what the rows mean.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from autocompress.errors import AutocompressError, RunError
from autocompress.front import Trial
from autocompress.policy import Policy
from autocompress.trial import Evaluation

SCHEMA = 3
READABLE = (2, 3)
"""Rows of schema 2 lack the seconds at which they were finished, the curves of trainings and predicted bytes."""
FILE = "journal.sqlite"
_TABLES = """
CREATE TABLE IF NOT EXISTS trials (
    number INTEGER PRIMARY KEY, state TEXT NOT NULL, rung INTEGER NOT NULL, key TEXT NOT NULL,
    policy TEXT NOT NULL, evaluation TEXT, attempts INTEGER NOT NULL DEFAULT 1,
    quality_test REAL, artifact TEXT, final_ms REAL, finished TEXT);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class Journal:
    """Rows of a run folder's ledger. Open it to write through `writing`, to look through `reading`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

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
                journal.set_fact("schema", SCHEMA)  # what is written from now on, older versions cannot read
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
            connection = sqlite3.connect(uri, uri=True, isolation_level=None)
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

    def fact(self, name: str) -> Any:
        """The value of a fact, or None."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        try:
            return None if row is None else json.loads(row[0])
        except ValueError as error:
            raise RunError(f"the journal's fact {name!r} cannot be read: {error}") from error

    def set_fact(self, name: str, value: Any) -> None:
        """Write a fact, replacing its former value."""
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    # --- trials ---

    def begin(self, number: int, policy: Policy, rung: int) -> int:
        """Write that trial `number` is about to run; how often that has been tried, this time included.

        A row that a dead process left `running` under this number is taken over.
        """
        row = self._db.execute(
            "INSERT INTO trials (number, state, rung, key, policy) VALUES (?, 'running', ?, ?, ?) "
            "ON CONFLICT (number) DO UPDATE SET rung = excluded.rung, policy = excluded.policy, "
            "attempts = CASE WHEN key = excluded.key THEN attempts + 1 ELSE 1 END, key = excluded.key "
            "WHERE state = 'running' RETURNING attempts",
            (number, rung, policy.key(), json.dumps(policy.to_json())),
        ).fetchone()
        if row is None:
            raise RunError(f"trial {number} is already finished")
        return int(row[0])

    def finish(self, number: int, evaluation: Evaluation, seconds: float = 0.0) -> None:
        """Write what became of a trial, and the run's seconds so far; a trial is finished once."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._finish(number, evaluation.to_json() | {"at": round(seconds, 3)}, evaluation.status)
            self.set_fact("seconds", seconds)
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _finish(self, number: int, evaluation: dict[str, Any], status: str) -> None:
        done = self._db.execute(
            "UPDATE trials SET state = ?, evaluation = ?, finished = datetime('now') "
            "WHERE number = ? AND state = 'running'",
            (status, json.dumps(evaluation), number),
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
        """Finished trials, in order."""
        rows = self._db.execute(
            "SELECT number, policy, evaluation, quality_test, artifact, final_ms FROM trials "
            "WHERE state != 'running' ORDER BY number"
        ).fetchall()
        try:
            return [_trial(*row) for row in rows]
        except (KeyError, TypeError, ValueError, AttributeError, AutocompressError) as error:
            raise RunError(f"the journal holds a row that cannot be read: {error}") from error


_DATES = "SELECT MIN(finished), MAX(finished) FROM trials WHERE finished IS NOT NULL"


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _trial(number: int, policy: str, evaluation: str, *final: Any) -> Trial:
    data = json.loads(evaluation)
    at = float(data.pop("at", math.nan))
    known = Evaluation.from_json(Policy.from_json(json.loads(policy)), data)
    quality_test, artifact, final_ms = final
    nan = math.nan
    return Trial(
        number,
        known,
        nan if quality_test is None else quality_test,
        artifact or "",
        nan if final_ms is None else final_ms,
        at,
    )
