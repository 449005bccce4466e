"""A real cluster of raylets on this machine, and what goes wrong with one."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakes
import pytest
from fakes import BLOBS, fake_worker, lacking_worker, make_space

from autocompress.errors import RunError
from autocompress.evaluate import Job
from autocompress.journal import FILE, Journal
from autocompress.runners.base import Cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray leaves sockets and processes to the end of the session
]
TESTS = Path(fakes.__file__).parent
LIMIT = 400.0


@pytest.fixture
def runner(cluster: Any) -> Iterator[Any]:
    from autocompress.runners.ray_tune import RayRunner

    found = RayRunner(fake_worker, Cluster(cluster.address), code=TESTS)
    yield found
    found.close()


def jobs_that(what: str, folder: Path, count: int) -> list[Job]:
    """Jobs whose workers do something to themselves first."""
    policies = list(make_space().baselines())
    found = []
    for i in range(count):
        (folder / f"do-{i}").write_text(what)
        found.append(Job(policies[i % len(policies)], 1, folder / f"trial-{i}.acz", number=i))
    return found


def until_done(runner: Any, jobs: list[Job], during: Any) -> dict[int, list[bool]]:
    """Whether each job's results were evaluations; one whose worker was lost runs again, as a study does it."""
    waiting, open_jobs, found = list(jobs), len(jobs), dict[int, list[bool]]()

    def source() -> Iterator[Job | None]:
        while open_jobs:
            yield waiting.pop(0) if waiting else None

    for job, evaluation, _ in runner.run(source()):
        found.setdefault(job.number, []).append(evaluation is not None)
        if evaluation is None:
            waiting.append(job)
        else:
            open_jobs -= 1
        during(found)
    return found


def test_trials_run_on_all_nodes_and_a_new_node_gets_work(cluster: Any, runner: Any, tmp_path: Path) -> None:
    added: list[Any] = []

    def grow(found: dict[int, list[bool]]) -> None:
        if len(found) == 4 and not added:
            added.append(cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20))

    try:
        found = until_done(runner, jobs_that("where sleep=1", tmp_path, 90), grow)
        assert found == {i: [True] for i in range(90)}
        nodes = Counter((tmp_path / f"ran-{i}").read_text() for i in range(90))
        assert len(nodes) == 3
    finally:
        cluster.remove_node(added[0])


def test_trials_of_a_removed_node_run_again_elsewhere(cluster: Any, runner: Any, tmp_path: Path) -> None:
    extra = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()

    def shrink(_: dict[int, list[bool]]) -> None:
        ran = {path.read_text() for path in tmp_path.glob("ran-*")}
        if extra.node_id in ran and extra in cluster.worker_nodes:
            cluster.remove_node(extra, allow_graceful=False)

    found = until_done(runner, jobs_that("where sleep=1", tmp_path, 30), shrink)
    assert extra not in cluster.worker_nodes
    assert sorted(found) == list(range(30))
    assert all(results[-1] for results in found.values())
    lost = [number for number, results in found.items() if results != [True]]
    assert len(lost) <= 1


def test_full_object_store_stops_nothing(runner: Any, tmp_path: Path) -> None:
    import numpy as np
    import ray

    assert len(until_done(runner, jobs_that("", tmp_path, 2), lambda _: None)) == 2
    held = [ray.put(np.ones(30 * 2**20, dtype=np.uint8)) for _ in range(6)]  # nearly twice what the head holds
    found = until_done(runner, jobs_that("", tmp_path, 10), lambda _: None)
    assert len(held) == 6
    assert list(found.values()) == [[True]] * 10


def test_module_that_a_worker_lacks_is_named_with_the_fix(cluster: Any, tmp_path: Path) -> None:
    from autocompress.runners.ray_tune import RayRunner

    runner = RayRunner(lacking_worker, Cluster(cluster.address), code=TESTS)
    try:
        with pytest.raises(RunError, match=r"on node .*'not_on_this_node'; install that module on the node"):
            list(runner.run(jobs_that("", tmp_path, 2)))
    finally:
        runner.close()


def test_no_cluster_is_said_with_the_fix() -> None:
    pytest.importorskip("ray")
    from autocompress.runners.ray_tune import RayRunner

    runner = RayRunner(fake_worker, Cluster("127.0.0.1:1"))
    with pytest.raises(RunError, match=r"no Ray cluster at '127.0.0.1:1'.*ray start --head"):
        list(runner.run([Job(next(iter(make_space().baselines())), 0)]))


# --- a driver, as people start it ---


def search(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "autocompress", "search", *map(str, arguments)],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def states(run: Path) -> Counter[str]:
    if not (run / FILE).exists():
        return Counter()
    database = sqlite3.connect(run / FILE)
    try:
        return Counter(dict(database.execute("SELECT state, COUNT(*) FROM trials GROUP BY state")))
    except sqlite3.Error:  # it is being made
        return Counter()
    finally:
        database.close()


def test_killed_driver_goes_on_and_tells_each_trial_once(cluster: Any, tmp_path: Path) -> None:
    """Its task file imports a neighbour, and is not where workers look before it is shipped."""
    (tmp_path / "blobs.py").write_text("from neighbour import task\n")
    (tmp_path / "neighbour.py").write_text(BLOBS)
    run = tmp_path / "runs" / "one"
    options = ("--budget", "size=60%", "--trials", 40, "--epochs", 1, "--controller", "random", "--fresh")
    process = search(tmp_path, "blobs.py:task", *options, "--out", run, "--ray", cluster.address)
    end = time.monotonic() + LIMIT
    while states(run)["ok"] < 8:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with Journal.reading(run) as journal:
        before = journal.told()
    process = search(tmp_path, "--resume", run, "--ray", cluster.address, "--json")
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, said
    with Journal.reading(run) as journal:
        after = journal.told()
        assert journal.untold() == []
    assert [(t.number, t.evaluation) for t in after[: len(before)]] == [(t.number, t.evaluation) for t in before]
    assert sorted(t.number for t in after) == list(range(len(after)))
    assert sum(t.evaluation.status == "ok" and not t.evaluation.rung for t in after) >= 40
    assert any(t.evaluation.rung for t in after)
    assert list((run / "artifacts").iterdir())
