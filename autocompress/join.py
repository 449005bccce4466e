"""Several machines feed one search without a cluster: who drives it, who takes part, and what they must agree on.

The first to come to a name in a storage drives: it proposes, and its run folder has the journal. All others evaluate
for it, each with the task file that its own user names: from the database come numbers and choices, never code or
paths.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from typing import Any

from pydantic import ValidationError

from autocompress.errors import AutocompressError, RunError
from autocompress.evaluate import Evaluate, Evaluator
from autocompress.measure.latency_table import LatencyTable
from autocompress.runners.base import Runner
from autocompress.runners.board import Address, Board
from autocompress.runners.storage import LONGEST, Crew, StorageRunner, driven_from
from autocompress.study import SETTINGS, MakeRunner, Settings, Setup, identity_of, needs_clock, precision_of

OWN = ("task", "data", "checkpoint", "latency_table")
"""Settings that each machine has for itself, or that travel otherwise."""
ABOUT = 0.005
"""Dense qualities of two machines may differ by so much: their arithmetic does in the last bits."""


def meet(address: Address, *, resume: bool) -> tuple[Board, bool]:
    """The search of that name, and whether it is this process's to drive: if nobody began it, or to `resume` it.

    Raises `RunError` if it has ended, or if it is driven from somewhere already.
    """
    board = address.board()
    if board is None:
        board = address.create()
        if board is not None:
            return board, True
        board = address.board()  # somebody was faster
    if board is None:
        raise RunError(f"the search {address.name!r} was deleted from the storage just now")
    if resume:
        if (host := driven_from(board)) is not None:
            raise RunError(f"the search {address.name!r} is driven from {host} now: join it without --resume")
        return board, True
    if board.fact("ended"):
        raise RunError(
            f"the search {address.name!r} of this storage has ended: give --join another name, or continue it where "
            "its run folder is, with --resume"
        )
    return board, False


def on_storage(board: Board, workers: int, limit: float) -> MakeRunner:
    """So many processes of this machine, and all that join. Trials have a `limit` in seconds."""

    def make(evaluator: Evaluator, setup: Setup) -> Runner:
        if needs_clock(setup.settings):
            raise RunError(
                "a latency that a busy worker measures means nothing: with --join, give a --latency-table of the device"
            )
        board.say("search", _told(evaluator, setup, limit))
        return StorageRunner(board, replace(setup, times=None, busy=True, levels=()), workers, limit)

    return make


def _told(evaluator: Evaluator, setup: Setup, limit: float) -> dict[str, Any]:
    """All that others must know; without paths, which mean nothing to them."""
    settings = replace(setup.settings, data=None, checkpoint=None, task="task")
    carried = setup.table is not None and settings.latency_table is not None
    return {
        "version": version("autocompress"),
        "host": socket.gethostname(),
        "settings": asdict(replace(settings, latency_table="table" if carried else None)),
        "dense_ms": setup.dense_ms,
        "precision": None if setup.precision is None else asdict(setup.precision),
        "table": setup.table.to_json() if carried and setup.table is not None else None,
        "identity": identity_of(evaluator),
        "limit": None if limit == math.inf else limit,
    }


@dataclass(frozen=True, slots=True)
class Guest:
    """Evaluates for a search that another machine drives. Calling it loads this machine's task."""

    setup: Setup
    identity: Mapping[str, Any]

    def __call__(self) -> Evaluate:
        """What evaluates. Raises `RunError` if the task is another than the driver's, and what loading it raises."""
        evaluator = self.setup.evaluator()
        own = identity_of(evaluator)
        for name, value in self.identity.items():
            same = abs(own[name] - value) <= ABOUT if name == "dense_quality" else own.get(name) == value
            if not same:
                raise RunError(
                    f"the task here is not the driver's: its {name.replace('_', ' ')} is {own.get(name)!r}, there it "
                    f"is {value!r}; give the same task file, data and checkpoint"
                )
        return evaluator.run


def guest_of(told: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[Guest, float]:
    """What takes part in the search of which this was `told`, and its seconds a trial.

    `given` are the settings of the command line here: those that differ from the search's are refused. Raises
    `RunError`.
    """
    if told.get("version") != version("autocompress"):
        raise RunError(
            f"that search is driven by autocompress {told.get('version')}, this is {version('autocompress')}: install "
            "the same"
        )
    try:
        settings = SETTINGS.validate_json(json.dumps(told["settings"]), strict=True)
        precision = None if told["precision"] is None else precision_of(told["precision"])
        table = None if told["table"] is None else LatencyTable.from_json(told["table"])
        limit = math.inf if told["limit"] is None else float(told["limit"])
        dense_ms, identity = float(told["dense_ms"]), dict(told["identity"])
        identity["dense_quality"] = float(identity["dense_quality"])
    except (KeyError, TypeError, ValueError, AttributeError, ValidationError, AutocompressError) as error:
        raise RunError(f"what the storage says of that search cannot be read: {error}") from error
    for field in fields(Settings):
        there = getattr(settings, field.name)
        if field.name not in OWN and given.get(field.name, there) != there:
            flag = "--budget" if field.name == "budgets" else f"--{field.name}"
            raise RunError(f"that search has {flag} {there!r}, not {given[field.name]!r}: leave it out to join")
    own = {name: given[name] for name in ("task", "data", "checkpoint") if name in given}
    settings = replace(settings, **{"task": "digits", **own})
    return Guest(Setup(settings, dense_ms, precision, table, busy=True), identity), limit


def take_part(
    board: Board,
    given: Mapping[str, Any],
    workers: int,
    say: Callable[[str], None],
    started: Callable[[Crew], None] = lambda _: None,
) -> int:
    """Evaluate for a search until it ends; how many trials that were. `started` gets what `stop` ends after those.

    Says what happens. Raises `RunError` as `guest_of` does, and what keeps processes from loading the task.
    """
    name = board.address.name
    while (told := board.fact("search")) is None and not board.fact("ended"):
        say(f"{name}: waiting until its driver has loaded and profiled the task")
        time.sleep(LONGEST)
    if told is None:
        return 0
    guest, limit = guest_of(told, given)
    crew = Crew(board, guest, workers, limit)
    started(crew)
    try:
        while not board.fact("ended") and crew.look():
            say(f"{name}: evaluated here for {told.get('host')}: {crew.done}")
            time.sleep(LONGEST)
        return crew.done
    finally:
        crew.close()
