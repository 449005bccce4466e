"""Runs a real search in a process of its own, breaks it, lets it go on, and checks that nothing was lost or torn.

    python -m tests.faults.harness --kills 200 --seed 1

kills searches at random moments until so many kills were made, each search until it ends, and prints one JSON line.
The harness knows nothing of how a search works: it looks at the run folder from outside, decides dominance by its own
loop, and compares with a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from autocompress.artifact import packed
from autocompress.errors import RunError
from autocompress.front import Trial
from autocompress.journal import FILE, Journal

TASK = """
import multiprocessing
import pathlib
import time

import torch
from torch import nn

from autocompress import ClassificationTask


def task():
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(700, 1, 8, 8, generator=draw)
    targets = (images.flatten(1) @ torch.randn(64, 4, generator=draw)).argmax(dim=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4),
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[:400]), targets[:400]).backward()
            optimizer.step()
    splits = [(images[part], targets[part]) for part in (slice(400), slice(400, 550), slice(550, 700))]
    return ClassificationTask(model.eval(), *splits, name="small", batch_size=100)


def slow():
    made = task()
    score = made.score
    made.score = lambda model, split: time.sleep(0.03) or score(model, split)
    return made


def hanging():
    made, flag, calls = slow(), pathlib.Path("hang"), []
    score = made.score

    def stuck(model, split):
        calls.append(split)
        if multiprocessing.parent_process() and len(calls) > 4 and flag.exists():
            flag.unlink()
            time.sleep(3600)
        return score(model, split)

    made.score = stuck
    return made
"""
"""A task file: a small convolutional network; `slow` leaves a fault time to strike within a trial; `hanging` never
ends, in a process beside the driver, where it finds the file `hang`, which it removes first."""
STARTER = """
import json, os, sys
import sklearn.ensemble
import autocompress.report.page, autocompress.report.write
from autocompress import cli, engine, study
from autocompress.engine.precision import PLAIN
engine.quickest = lambda model, inputs: PLAIN
sys.path.insert(0, sys.argv[1])
from faults import plans

study.Settings("small.py:task").evaluator()
print("ready", flush=True)
for line in sys.stdin:
    log, arguments, plan = json.loads(line)
    child = os.fork()
    if child == 0:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        plans.carry_out(plan)
        sys.argv = ["autocompress", *arguments]
        cli.main()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Forks a process for each command that it reads, so that libraries are imported, and the tracer warm, once.

In what arithmetic training is fastest is left out: on a busy machine a run that dies before that is written down may
find another answer the next time.
"""
LIMIT = 600.0
"""Seconds after which a process that should have got somewhere is taken for hung."""
MAX_ATTEMPTS = 2
"""A trial that takes its process down so often is written off, as it should: the harness stops before."""


@dataclass(frozen=True)
class Plan:
    """What goes wrong in a process: see `faults.plans`. Nothing without a `kind`."""

    kind: str = ""
    at: str = ""
    call: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


class Starter:
    """Starts `autocompress` in processes of their own, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._starts = folder, 0
        self._child = 0
        (folder / "small.py").write_text(TASK)
        self._process = subprocess.Popen(
            [sys.executable, "-c", STARTER, str(Path(__file__).parents[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=os.environ | {"AUTOCOMPRESS_CACHE": str(folder / "cache")},
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, *arguments: object, plan: Plan | None = None) -> int:
        """The new process's id."""
        assert self._process.stdin is not None
        self._starts += 1
        command = [str(self._log(self._starts)), [str(a) for a in arguments], vars(plan or Plan())]
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        self._child = int(self._line())
        return self._child

    def search(self, run: str | Path, *options: object, plan: Plan | None = None) -> int:
        """Start the search, or go on with it; `options` (name, value, ...) beside the usual ones, and `task`."""
        if (self.folder / run / "config.json").exists():
            return self.start("search", "--resume", run, *_lasting(options), plan=plan)
        usual: dict[object, object] = {"--budget": "size=60%", "--trials": 18, "--epochs": 2, "--seed": 5}
        usual |= dict(zip(options[::2], options[1::2], strict=True))
        task = usual.pop("task", "slow")
        flat = [item for pair in usual.items() for item in pair]
        return self.start("search", f"small.py:{task}", "--fresh", "--out", run, *flat, plan=plan)

    def ended(self) -> int:
        """Wait for the process; its exit code, negative for a signal. One that hangs is killed."""
        watch = threading.Timer(LIMIT, os.kill, (self._child, signal.SIGKILL))
        watch.start()
        try:
            return int(self._line())
        finally:
            watch.cancel()

    def _log(self, start: int) -> Path:
        return self.folder / f"log-{start}"

    def said(self) -> str:
        """What the last process printed."""
        return self._log(self._starts).read_text()

    def all_said(self) -> str:
        """What all of them printed."""
        return "\n".join(self._log(start).read_text() for start in range(1, self._starts + 1))

    def close(self) -> None:
        """End the process that forks."""
        self._process.communicate()


def _lasting(options: Sequence[object]) -> list[object]:
    """Options that hold for one start of a run only."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return [item for pair in pairs if pair[0] in ("--workers", "--trial-timeout") for item in pair]


# --- what a run folder says -----------------------------------------------------------------------------


def trials(folder: Path) -> list[Trial]:
    """Finished trials so far."""
    try:
        with Journal.reading(folder) as journal:
            return journal.trials()
    except RunError:  # not made yet
        return []


def essence(found: Sequence[Trial]) -> list[tuple[int, str, str, int, str]]:
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


def front_by_hand(found: Sequence[Trial], budget: int) -> list[int]:
    """Numbers of the trials that fit and that no other one beats in bytes or quality; the first of equals."""
    fits = [
        t for t in found if t.evaluation.status == "ok" and t.measured.bytes <= budget and not t.evaluation.screened
    ]
    points = {t.number: (t.measured.bytes, -t.measured.quality) for t in fits}
    kept = []
    for number, own in points.items():
        better = any(
            (p[0] <= own[0] and p[1] <= own[1]) and (p != own or n < number) for n, p in points.items() if n != number
        )
        if not better:
            kept.append(number)
    return sorted(kept)


def check_at_rest(folder: Path, whole: Sequence[Trial]) -> list[Trial]:
    """What holds after any fault: rows are those of the undisturbed run, once each, and no artifact is torn."""
    found = trials(folder)
    assert [t.number for t in found] == list(range(len(found))), "a finished trial is missing"
    assert essence(found) == essence(whole)[: len(found)], "a finished trial is another one than undisturbed"
    if (folder / FILE).exists():
        with closing(sqlite3.connect(folder / FILE)) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    sizes = {t.number: t.measured.bytes for t in found if t.evaluation.status == "ok"}
    for path in folder.glob("artifacts/trial-*"):
        artifact = packed.read(path)  # raises if it is torn
        number = int(path.stem.removeprefix("trial-"))
        assert artifact.bytes == sizes.get(number, artifact.bytes), f"{path.name} is not what was measured"
    for path in folder.glob("policies/trial-*"):
        json.loads(path.read_text())
    return found


def check_ended(folder: Path, reference: Path, *, same_as: Sequence[Trial] | None = None) -> None:
    """What holds once a run has ended: it is the `reference` run, bit for bit, and its front is the journal's."""
    whole = trials(reference) if same_as is None else same_as
    found = check_at_rest(folder, whole)
    assert essence(found) == essence(whole)
    assert [t.quality_test for t in found if t.artifact] == [t.quality_test for t in whole if t.artifact]
    with Journal.reading(folder) as journal:
        budget = journal.fact("budget")["bytes"]
    front = front_by_hand(found, budget)
    assert [t.number for t in found if t.artifact] == front
    assert sorted(pd.read_csv(folder / "front.csv")["trial"]) == front
    for name, suffix in (("artifacts", "acz"), ("policies", "json")):
        files = {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        assert sorted(files) == sorted(f"trial-{number}.{suffix}" for number in front), "a file too many or too few"
        assert files == {path.name: path.read_bytes() for path in (reference / name).iterdir()}
    assert (folder / "report.html").is_file()


# --- killing at random ----------------------------------------------------------------------------------


def kill_when_fair(process: int, folder: Path) -> bool:
    """Kill the process, unless a trial would then have taken it down too often to be tried again, or it has ended."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGSTOP)  # so that what is read here is what is killed
        fair = _attempts(folder) < MAX_ATTEMPTS
        os.kill(process, signal.SIGKILL if fair else signal.SIGCONT)
        return fair
    return False


def _attempts(folder: Path) -> int:
    """How often the trial that runs has begun."""
    if not (folder / FILE).exists():
        return 0
    try:
        with closing(sqlite3.connect(f"{(folder / FILE).as_uri()}?mode=ro", uri=True)) as database:
            found = database.execute("SELECT MAX(attempts) FROM trials WHERE state = 'running'").fetchone()
        return int(found[0] or 0)
    except sqlite3.Error:  # its tables are not made yet, or it is held
        return 0


@dataclass
class Tally:
    """What the long run did; an undisturbed search takes so many `seconds`."""

    seconds: float = 3.0
    kills: int = 0
    runs: int = 0
    trials: int = 0
    at: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return json.dumps({"kills": self.kills, "runs": self.runs, "trials": self.trials, "killed_in": dict(self.at)})


def kill_at_random(
    starter: Starter, run: str, reference: Path, kills: int, draw: random.Random, tally: Tally, *options: object
) -> None:
    """Kill a run up to `kills` times, wherever it is, letting it go on each time, and then to its end; check it."""
    folder, whole = starter.folder / run, trials(reference)
    done = 0
    while done < kills:
        process = starter.search(run, *options)
        killed = _killed(process, folder, draw.choice((0.05, 0.1, 0.2, 0.6)) * draw.random() * tally.seconds)
        code = starter.ended()
        assert code in ((-signal.SIGKILL,) if killed else (0,)), f"exit code {code}"
        found = check_at_rest(folder, whole)
        if not killed:
            break
        done += 1
        tally.kills += 1
        tally.at[_stage(folder, found)] += 1
    else:
        starter.search(run, *options)
        assert starter.ended() == 0
    check_ended(folder, reference)
    tally.runs += 1
    tally.trials += len(whole)


def _killed(process: int, folder: Path, after: float) -> bool:
    """Whether the process was killed, `after` seconds from now or as soon after that as is fair."""
    time.sleep(after)
    end = time.monotonic() + LIMIT
    while _lives(process):
        if kill_when_fair(process, folder):
            return True
        assert time.monotonic() < end, "the process hangs"
        time.sleep(0.01)
    return False


def _lives(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def _stage(folder: Path, found: Sequence[Trial]) -> str:
    """Where a run was killed, roughly."""
    if not (folder / "config.json").exists():
        return "before its config"
    if not found:
        return "before its first trial"
    if any(t.artifact for t in found):
        return "writing artifacts"
    return "recovery" if any(t.evaluation.rung for t in found) else "one-shot"


def main() -> None:
    """The long run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--trials", type=int, default=18, help="one-shot trials of each run")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp(prefix="autocompress-faults-"))
    starter, tally, draw = Starter(folder), Tally(), random.Random(given.seed)
    begun = time.monotonic()
    try:
        starter.search("whole", "--trials", given.trials)
        assert starter.ended() == 0
        tally.seconds = time.monotonic() - begun
        while tally.kills < given.kills:
            left, name = given.kills - tally.kills, f"run-{tally.runs}"
            kill_at_random(starter, name, folder / "whole", left, draw, tally, "--trials", given.trials)
        assert "Traceback" not in starter.all_said()
    finally:
        starter.close()
    found = json.loads(str(tally)) | {"seed": given.seed, "seconds": round(time.monotonic() - begun, 1), "lost": 0}
    print(json.dumps(found | {"front": "identical"}))
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
