"""Seconds, memory and quality of the multiple-choice knapsack, from 10 to 1,000 layers of 10 to 100 levels.

    python benchmarks/solver_scale.py

Every size runs in a process of its own, on random layer profiles. `profile` is the bookkeeping from a profile's arrays
to padded menus; `front` is the table and the solutions for 16 budgets; `greedy` is one budget with changed losses, as
one proposal needs. Times are medians with the least and the most of the repetitions, in one thread; MiB is the peak
that tracemalloc sees while the front is solved once more. The gap is how far the loss is above the lower bound of the
linear relaxation, in % of what the budget wins over the cheapest choice: median and worst of the budgets. Prints a
table and ends with one JSON line: `solve_s` and `solve_mib` of 1,000 layers x 50 levels, `greedy_ms` of 60 layers x 20,
`proposal_ms` of the whole controller (60 layers, 25 levels each, pairwise interactions, after 1,000 evaluations).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from synthetic import Synthetic

from autocompress.controllers.knapsack import Menu, Solution, bound, front, greedy, prepare
from autocompress.controllers.registry import make_controller
from autocompress.profile import measure as measure_profile
from autocompress.trial import Budget

LAYERS = (10, 30, 60, 100, 300, 1000)
LEVELS = (10, 20, 50, 100)
BUDGETS = 16

Profile = list[tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Bytes and losses of every level, layer by layer."""


def random_profile(layers: int, levels: int) -> Profile:
    """Layers of 2 kB to 3 MB, losses that fall exponentially with the bytes kept, with 10% noise; seed 0."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(layers):
        kept = rng.uniform(0.05, 1.0, levels)
        size = math.exp(rng.uniform(math.log(2e3), math.log(3e6)))
        found.append((size * kept, rng.lognormal(0, 1.5) * np.exp(-6 * kept) * rng.lognormal(0, 0.1, levels)))
    return found


def menus_of(profile: Profile) -> list[Menu]:
    """Whole bytes."""
    return [Menu(sizes.astype(np.int64), losses) for sizes, losses in profile]


def timed(run: Callable[[], object], repetitions: int) -> list[float]:
    """Median, least and most seconds, after one run that does not count."""
    seconds = []
    for _ in range(repetitions + 1):
        start = perf_counter()
        run()
        seconds.append(perf_counter() - start)
    return [median(seconds[1:]), min(seconds[1:]), max(seconds[1:])]


def peak(run: Callable[[], object]) -> float:
    """MiB."""
    tracemalloc.start()
    run()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / 2**20


def measure(layers: int, levels: int, repetitions: int) -> dict[str, Any]:
    """One size."""
    profile = random_profile(layers, levels)
    menus = menus_of(profile)
    instance = prepare(menus)
    least, most = (int(f(instance.costs[0], axis=1).sum()) for f in (np.min, np.max))
    budgets = [int(least + (most - least) * (i + 0.5) / BUDGETS) for i in range(BUDGETS)]
    start = greedy(instance, least)
    assert start is not None
    lower = [bound(instance, budget) for budget in budgets]

    def gaps(found: list[Solution | None]) -> list[float]:
        losses = [solution.loss for solution in found if solution is not None]
        shares = [100 * (x - low) / (start.loss - low) for x, low in zip(losses, lower, strict=True)]
        return [median(shares), max(shares)]

    return {
        "profile_s": timed(lambda: prepare(menus_of(profile)), repetitions),
        "front_s": timed(lambda: front(menus, budgets), repetitions),
        "front_mib": peak(lambda: front(menus, budgets)),
        "greedy_s": timed(lambda: greedy(instance.with_losses(instance.losses), budgets[4]), 20 * repetitions),
        "front_gap": gaps(front(menus, budgets)),
        "greedy_gap": gaps([greedy(instance, budget) for budget in budgets]),
    }


def proposals(evaluations: int = 1000, count: int = 100) -> dict[str, list[float]]:
    """Seconds of the whole controller's `ask` and `tell` at 60 layers, after so many evaluations."""
    problem = Synthetic(60)
    profile = measure_profile(problem, problem.space, "benchmark", lambda *_: None, perf_counter)
    budget = Budget(bytes=problem.graph.dense_bytes // 4)
    controller = make_controller("solver", problem.space, budget, problem.predict, 0, profile)
    asked, told = [], []
    for _ in range(evaluations + count):
        start = perf_counter()
        policy = controller.ask()
        middle = perf_counter()
        evaluation = problem(policy)
        end = perf_counter()
        controller.tell(evaluation)
        asked.append(middle - start)
        told.append(perf_counter() - end)
    return {name: [median(x), min(x), max(x)] for name, x in (("ask", asked[-count:]), ("tell", told[-count:]))}


def apart(layers: int, levels: int, repetitions: int) -> dict[str, Any]:
    """One size in a fresh process of one thread."""
    return alone("--one", str(layers), str(levels), "--repetitions", str(repetitions))


def alone(*arguments: str) -> dict[str, Any]:
    """What this file prints for `arguments` in a fresh process of one thread."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, env={**os.environ, **threads}
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def line(layers: int, levels: int, found: dict[str, Any]) -> str:
    """One row of the table."""
    profile, solved, proposal = (
        "{:.2f} ({:.2f} to {:.2f})".format(*(1e3 * x for x in found[f"{name}_s"]))
        for name in ("profile", "front", "greedy")
    )
    near, nearer = ("{:.4f} {:.4f}".format(*found[f"{name}_gap"]) for name in ("front", "greedy"))
    memory = f"{found['front_mib']:.1f}"
    return f"{layers:6} {levels:6} {profile:>24} {solved:>27} {memory:>7} {proposal:>24} {near:>16} {nearer:>16}"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="of profile and front; 20 times as many of greedy")
    parser.add_argument("--one", type=int, nargs=2, metavar=("LAYERS", "LEVELS"), help="measure one size, as JSON")
    parser.add_argument("--proposals", action="store_true", help="measure the controller's proposals, as JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], given.one[1], given.repetitions)))
        return
    if given.proposals:
        print(json.dumps(proposals()))
        return
    print(
        f"{'layers':>6} {'levels':>6} {'profile ms':>24} {'front ms':>27} {'MiB':>7} {'greedy ms':>24} "
        f"{'front gap %':>16} {'greedy gap %':>16}"
    )
    results: dict[tuple[int, int], dict[str, Any]] = {}
    for layers in LAYERS:
        for levels in LEVELS:
            results[layers, levels] = apart(layers, levels, given.repetitions)
            print(line(layers, levels, results[layers, levels]), flush=True)
    whole = alone("--proposals")
    for name, (middle, least, most) in whole.items():
        print(
            f"{name} of the solver controller, 60 layers, after 1,000 evaluations: {1e3 * middle:.2f} ms "
            f"({1e3 * least:.2f} to {1e3 * most:.2f}), n = 100"
        )
    large, usual = results[1000, 50], results[60, 20]
    summary = {
        "repetitions": given.repetitions,
        "budgets": BUDGETS,
        "solve_s": round(large["front_s"][0], 4),
        "solve_mib": round(large["front_mib"], 1),
        "profile_ms": round(1e3 * large["profile_s"][0], 2),
        "proposal_ms": round(1e3 * whole["ask"][0], 2),
        "tell_ms": round(1e3 * whole["tell"][0], 2),
        "greedy_ms": round(1e3 * usual["greedy_s"][0], 3),
        "gap_percent": round(large["front_gap"][1], 5),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
