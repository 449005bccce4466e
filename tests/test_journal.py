"""The ledger: rows survive, are finished once, and are whole after any death of the process."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import evaluation

from autocompress.errors import RunError
from autocompress.front import Trial
from autocompress.journal import FILE, Journal
from autocompress.policy import LayerChoice, Policy
from autocompress.trial import Evaluation, Measurement

POLICY = Policy({"conv1": LayerChoice(4, 0.5)}, {"conv1": 0.75})


def fill(folder: Path, count: int) -> list[Evaluation]:
    """Write `count` finished trials of every kind."""
    kinds = [
        evaluation(0.9, 1000, 1.5),
        evaluation(status="failed"),
        Evaluation(POLICY, 0, 0, "infeasible", Measurement(99, 7)),
        evaluation(0.8, 900, rung=1, copy_of=0),
    ]
    written = [kinds[i % len(kinds)] for i in range(count)]
    with Journal.writing(folder) as journal:
        for number, e in enumerate(written):
            journal.begin(number, e.policy, e.rung)
            journal.finish(number, e)
    return written


def same(a: Evaluation, b: Evaluation) -> bool:
    return a.policy == b.policy and a.to_json() == b.to_json()  # NaN is null there, and so equal


def test_rows_survive_reopening(tmp_path: Path) -> None:
    written = fill(tmp_path, 8)
    for opened in (Journal.reading, Journal.writing):
        with opened(tmp_path) as journal:
            found = journal.trials()
        assert [t.number for t in found] == list(range(8))
        assert all(same(t.evaluation, e) for t, e in zip(found, written, strict=True))


def test_facts_survive_and_are_replaced(tmp_path: Path) -> None:
    with Journal.writing(tmp_path) as journal:
        assert journal.fact("dense") is None
        journal.set_fact("dense", {"bytes": 1})
        journal.set_fact("dense", {"bytes": 2})
    with Journal.reading(tmp_path) as journal:
        assert journal.fact("dense") == {"bytes": 2}


def test_test_quality_and_artifact_are_written_once_known(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    with Journal.writing(tmp_path) as journal:
        journal.finalise(0, 0.87, "artifacts/trial-0.acz")
    with Journal.reading(tmp_path) as journal:
        first, second = journal.trials()
    assert (first.quality_test, first.artifact) == (0.87, "artifacts/trial-0.acz")
    assert second.quality_test != second.quality_test
    assert second.artifact == ""


def test_trial_is_finished_once(tmp_path: Path) -> None:
    written = fill(tmp_path, 1)
    with Journal.writing(tmp_path) as journal:
        with pytest.raises(RunError, match="trial 0 is already finished"):
            journal.finish(0, evaluation(0.1))
        with pytest.raises(RunError, match="trial 0 is already finished"):
            journal.begin(0, POLICY, 0)
        assert same(journal.trials()[0].evaluation, written[0])


def test_trial_that_never_began_cannot_finish(tmp_path: Path) -> None:
    with Journal.writing(tmp_path) as journal:
        with pytest.raises(RunError):
            journal.finish(5, evaluation())
        assert journal.trials() == []


def test_running_row_is_no_trial_yet(tmp_path: Path) -> None:
    with Journal.writing(tmp_path) as journal:
        journal.begin(0, POLICY, 0)
        assert journal.trials() == []


def test_running_row_of_a_dead_process_is_taken_over_and_counted(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        with Journal.writing(tmp_path) as journal:
            assert journal.begin(0, POLICY, 0) == attempt
    with Journal.writing(tmp_path) as journal:
        assert journal.begin(0, evaluation().policy, 1) == 1  # another policy starts afresh
        journal.finish(0, evaluation())
        assert [t.number for t in journal.trials()] == [0]


HOLD = """
import sys, time
from pathlib import Path
from autocompress.journal import Journal
with Journal.writing(Path(sys.argv[1])):
    print("holding", flush=True)
    time.sleep(60)
"""
LOOP = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fakes import evaluation
from autocompress.journal import Journal
with Journal.writing(Path(sys.argv[1])) as journal:
    for number in range(10**6):
        e = evaluation(number / 10**6, 1000 + number, bits=(2, 3, 4, 8)[number % 4])
        journal.begin(number, e.policy, 0)
        journal.finish(number, e)
        if number == 0:
            print("writing", flush=True)
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() in ("holding", "writing")
    return process


def kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_second_writer_is_locked_out_but_may_read_and_follows_a_dead_one(tmp_path: Path) -> None:
    process = start(HOLD, str(tmp_path))
    try:
        with pytest.raises(RunError, match="in use by another autocompress process"), Journal.writing(tmp_path):
            pass
        with Journal.reading(tmp_path) as journal:
            assert journal.trials() == []
    finally:
        kill(process)
    with Journal.writing(tmp_path) as journal:
        assert journal.begin(0, POLICY, 0) == 1


@pytest.mark.slow
def test_killed_while_writing_every_finished_row_is_whole(tmp_path: Path) -> None:
    process = start(LOOP, str(tmp_path), str(Path(__file__).parent))
    time.sleep(0.3)
    kill(process)
    with Journal.writing(tmp_path) as journal:
        found = journal.trials()
        next_attempt = journal.begin(len(found), POLICY, 0)
    assert len(found) > 1
    assert next_attempt == 1  # absent, or of another policy
    for number, trial in enumerate(found):
        assert trial.number == number
        expected = evaluation(number / 10**6, 1000 + number, bits=(2, 3, 4, 8)[number % 4])
        assert same(trial.evaluation, expected)


def test_writers_in_one_process_exclude_each_other_too(tmp_path: Path) -> None:
    with Journal.writing(tmp_path), pytest.raises(RunError, match="in use"), Journal.writing(tmp_path):
        pass


def test_failed_writer_releases_the_run(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Journal.writing(tmp_path):
        raise ZeroDivisionError
    with Journal.writing(tmp_path) as journal:
        assert journal.trials() == []


def test_reading_while_writing_sees_finished_rows(tmp_path: Path) -> None:
    with Journal.writing(tmp_path) as writer:
        writer.begin(0, evaluation().policy, 0)
        writer.finish(0, evaluation())
        writer.begin(1, POLICY, 0)
        with Journal.reading(tmp_path) as reader:
            assert [t.number for t in reader.trials()] == [0]


def test_reading_an_absent_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"), Journal.reading(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def read_all(folder: Path) -> list[Trial]:
    with Journal.reading(folder) as journal:
        journal.fact("dense")
        return journal.trials()


@pytest.mark.parametrize("content", [b"", b"not a database at all", bytes(range(256)) * 64])
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(RunError, match=r"journal|ended before its first trial"):
        read_all(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    fill(tmp_path, 60)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(RunError):
        read_all(tmp_path)
    with pytest.raises(RunError), Journal.writing(tmp_path) as journal:
        journal.trials()


def test_schema_of_another_version_is_refused(tmp_path: Path) -> None:
    with Journal.writing(tmp_path) as journal:
        journal.set_fact("schema", 999)
    for opened in (Journal.reading, Journal.writing):
        with pytest.raises(RunError, match=r"a newer version of autocompress \(schema 999.*upgrade"), opened(tmp_path):
            pass


@pytest.mark.parametrize("schema", [2, 3])
def test_schemas_before_this_one_are_read_and_continued(tmp_path: Path, schema: int) -> None:
    """Rows of schema 2 have no seconds and predicted bytes; neither 2 nor 3 knows when trials began and were told."""
    written = fill(tmp_path, 4)
    if schema == 2:
        gone = "UPDATE trials SET evaluation = json_remove(evaluation, '$.at', '$.measurement.predicted_bytes')"
        spoil(tmp_path, gone)
    for column in ("screened", "asked", "told"):
        spoil(tmp_path, f"ALTER TABLE trials DROP COLUMN {column}")
    spoil(tmp_path, "UPDATE facts SET value = ? WHERE name = 'schema'", str(schema))
    trials = read_all(tmp_path)
    assert all(same(t.evaluation, e) for t, e in zip(trials, written, strict=True))
    assert all(math.isnan(t.at) == (schema == 2) for t in trials)
    with Journal.writing(tmp_path) as journal:
        journal.begin(4, POLICY, 0)
        journal.finish(4, Evaluation(POLICY, 0, 0, "infeasible"), 12.5)
        assert journal.fact("schema") == 4
        assert [t.number for t in journal.told()] == [0, 1, 2, 3, 4]
        assert [(b.number, b.asked) for b in journal.begun()] == [(i, i) for i in range(5)]
    assert read_all(tmp_path)[4].at == 12.5


def spoil(folder: Path, statement: str, *values: str) -> None:
    database = sqlite3.connect(folder / FILE)
    database.execute(statement, values)
    database.commit()
    database.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{",
        "{}",
        json.dumps({"measurement": {"bytes": 1}}),
        json.dumps(evaluation().to_json() | {"measurement": [1, 2]}),
        json.dumps(evaluation().to_json() | {"surprise": 1}),
    ],
)
def test_row_that_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    fill(tmp_path, 1)
    spoil(tmp_path, "UPDATE trials SET evaluation = ?", text)
    with pytest.raises(RunError):
        read_all(tmp_path)


def test_policy_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    spoil(tmp_path, "UPDATE trials SET policy = ?", '{"layers": {"a": {"bits": 99}}}')
    with pytest.raises(RunError):
        read_all(tmp_path)


def test_fact_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with Journal.writing(tmp_path) as journal:
        journal.set_fact("dense", {})
    spoil(tmp_path, "UPDATE facts SET value = ? WHERE name = 'dense'", "{torn")
    with pytest.raises(RunError):
        read_all(tmp_path)


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"), Journal.writing(tmp_path / "file"):
        pass


def test_trials_end_in_any_order_and_the_order_of_tells_is_kept(tmp_path: Path) -> None:
    with Journal.writing(tmp_path) as journal:
        for number in range(4):
            journal.begin(number, POLICY, 0, screened=number == 1)
        for number in (2, 0):
            journal.finish(number, Evaluation(POLICY, 0, 0, "failed", error=str(number)))
        journal.arrive(3, Evaluation(POLICY, 0, 0, "failed", error="waits"))
    with Journal.writing(tmp_path) as journal:
        assert [t.number for t in journal.told()] == [2, 0]
        assert [t.number for t in journal.trials()] == [0, 2]
        first, second = journal.untold()
        assert (first.number, first.screened, first.evaluation) == (1, True, None)
        assert second.number == 3
        assert second.evaluation is not None
        assert second.evaluation.error == "waits"
        assert journal.next_number() == 4
        journal.finish(3, second.evaluation)
        journal.begin(4, POLICY, 0)
        assert [t.number for t in journal.told()] == [2, 0, 3]
        assert [(b.number, b.asked) for b in journal.begun()] == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 3)]


def test_try_that_does_not_count_takes_the_place_of_the_last(tmp_path: Path) -> None:
    with Journal.writing(tmp_path) as journal:
        found = [journal.begin(0, POLICY, 0, counted=counted) for counted in (True, False, True, False)]
    assert found == [1, 1, 2, 2]
