"""How good a front each controller finds in how many evaluations, all with the same evaluator.

    python benchmarks/search_efficiency.py                                                # synthetic and digits
    python benchmarks/search_efficiency.py --data DIR --checkpoint resnet20_cifar10.pt    # and ResNet-20
    python benchmarks/search_efficiency.py --only synthetic --names solver --seeds 8      # a change of the solver

The hypervolume is the area under the best quality within each number of bytes, from chance to the largest possible
quality and from the smallest file of the space to a quarter of the dense bytes on a log scale, as a share of that
rectangle. `solver` is told the upper end as its budget. `tpe`, `nsga2` and `random` are told nothing; `plain` means
without the uniform policies that `--controller` starts them with, which is how these samplers are usually run. Every
evaluation counts; the profile, which the solver needs once per model, is listed beside. `--points` keeps what was
measured: a run that is found there is not repeated. Prints a table per problem and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

from synthetic import Synthetic

from autocompress import Space, load_space, load_task
from autocompress.controllers.optuna_samplers import OptunaController, Predict
from autocompress.controllers.registry import make_controller
from autocompress.evaluate import Evaluator
from autocompress.measure.quality import screening
from autocompress.policy import Policy
from autocompress.profile import Measures, Profile, measure
from autocompress.task import Task
from autocompress.trial import Budget, Evaluation

RIVALS = ("tpe", "nsga2", "random")
EVALUATIONS = 400
MARKS = (5, 10, 20, 50, 100, 200, 400)
SCREEN_INPUTS = 1024
HIGH = 0.25


@dataclass(frozen=True)
class Problem:
    """What is searched: the same `evaluate` for all controllers, and the rectangle of the hypervolume."""

    name: str
    space: Space
    evaluate: Callable[[Policy], Evaluation]
    predict: Predict
    profile: Profile
    dense_bytes: int
    low: float
    high: float
    chance: float


Points = list[tuple[int, float]]


def area(problem: Problem, points: Points) -> float:
    """Share of the rectangle under the best quality within each size."""
    low, high = problem.low * problem.dense_bytes, problem.high * problem.dense_bytes
    inside = sorted((max(size, low), quality) for size, quality in points if size <= high)
    total, best = 0.0, problem.chance
    ends = [size for size, _ in inside[1:]] + [high]
    for (size, quality), nxt in zip(inside, ends, strict=False):
        best = max(best, quality)
        total += (best - problem.chance) * math.log(nxt / size)
    return total / ((1 - problem.chance) * math.log(high / low))


def volumes_of(problem: Problem, points: Points) -> list[float]:
    """The hypervolume after every evaluation."""
    return [area(problem, points[: i + 1]) for i in range(len(points))]


def run(problem: Problem, name: str, seed: int, evaluations: int) -> Points:
    """What every evaluation measured."""
    plain = name.endswith("-plain")
    budget = Budget(bytes=int(problem.high * problem.dense_bytes)) if name == "solver" else Budget()
    controller = make_controller(
        name.removesuffix("-plain"), problem.space, budget, problem.predict, seed, problem.profile
    )
    if plain:
        _forget_baselines(controller)
    points: Points = []
    start = perf_counter()
    for i in range(evaluations):
        evaluation = problem.evaluate(controller.ask())
        controller.tell(evaluation)
        measured = evaluation.measurement
        points.append((problem.dense_bytes, 0.0) if measured is None else (measured.bytes, measured.quality))
        if (i + 1) in MARKS:
            print(
                f"  {problem.name} {name} {seed}: {i + 1} {area(problem, points):.4f} {perf_counter() - start:.0f} s",
                flush=True,
            )
    return points


def _forget_baselines(controller: OptunaController) -> None:
    controller._baselines.clear()


def profile_of(measures: Measures, space: Space) -> Profile:
    """Measured anew, so that its cost can be stated; its solutions may come from the cache."""
    return measure(measures, space, "benchmark", lambda *_: None, perf_counter)


def smallest(space: Space, predict: Predict, profile: Profile) -> int:
    """Bytes of the smallest file."""
    layers = {layer.name: min(layer.levels, key=lambda level: level.bytes).choice for layer in profile.layers}
    return predict(replace(space.smallest(), layers=layers)).bytes


def synthetic(seed: int) -> Problem:
    """Sixty layers."""
    made = Synthetic(seed=seed)
    profile = profile_of(made, made.space)
    return Problem(
        f"synthetic-{seed}",
        made.space,
        made,
        made.predict,
        profile,
        made.graph.dense_bytes,
        smallest(made.space, made.predict, profile) / made.graph.dense_bytes,
        HIGH,
        0.1,
    )


class Screened:
    """One-shot evaluations of a task on its first `SCREEN_INPUTS` of `val`, each policy measured once."""

    def __init__(self, task: Task) -> None:
        self.evaluator = Evaluator(task)
        self.evaluator.screen = screening(task, self.evaluator.bench.teacher, SCREEN_INPUTS)
        self._known: dict[str, Evaluation] = {}

    def __call__(self, policy: Policy) -> Evaluation:
        key = policy.key()
        if key not in self._known:
            self._known[key] = self.evaluator(policy, screen=True)
        return self._known[key]


def real(name: str, task: Task) -> Problem:
    """A task, in the layer choices of the default space."""
    screened = Screened(task)
    evaluator = screened.evaluator
    file = load_space("default")
    channels = file.channels.model_copy(update={"keep": [1.0]})
    space = Space(file.model_copy(update={"channels": channels}), evaluator.graph)
    profile = profile_of(evaluator, space)
    print(f"{name}: profile of {profile.evaluations} evaluations in {profile.seconds:.0f} s", flush=True)
    dense = evaluator.graph.dense_bytes
    low = smallest(space, evaluator.predict, profile) / dense
    return Problem(name, space, screened, evaluator.predict, profile, dense, low, HIGH, 0.1)


class Known:
    """Runs that were measured before, in files of one JSON object per line; new ones are added to the first file."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        lines = [line for path in files if path.is_file() for line in path.read_text().splitlines()]
        self._runs = {
            (r["problem"], r["name"], r["seed"], len(r["points"])): r["points"] for r in map(json.loads, lines)
        }

    def points(self, problem: Problem, name: str, seed: int, evaluations: int) -> Points:
        """Of one run, from the files or measured now."""
        key = problem.name, name, seed, evaluations
        if key not in self._runs:
            self._runs[key] = run(problem, name, seed, evaluations)
            if self._files:
                entry = {"problem": problem.name, "name": name, "seed": seed, "points": self._runs[key]}
                with self._files[0].open("a") as file:
                    file.write(json.dumps(entry) + "\n")
        return [(int(size), float(quality)) for size, quality in self._runs[key]]


def compare(problems: list[Problem], seeds: list[int], counts: dict[str, int], known: Known) -> dict[str, object]:
    """Table and figures of problems of one kind: medians over problems and seeds."""
    volumes = {
        name: [volumes_of(p, known.points(p, name, s, count)) for p in problems for s in seeds]
        for name, count in counts.items()
    }
    marks = [m for m in MARKS if m <= max(counts.values())]
    print("| controller | " + " | ".join(f"{m}" for m in marks) + " | least to most at the end |")
    print("|---|" + "---:|" * (len(marks) + 1))
    for name, runs in volumes.items():
        at = [f"{median(v[m - 1] for v in runs):.3f}" if m <= counts[name] else "" for m in marks]
        ends = [v[-1] for v in runs]
        print(f"| {name} | " + " | ".join(at) + f" | {min(ends):.3f} to {max(ends):.3f} |", flush=True)
    end = {name: median(v[-1] for v in runs) for name, runs in volumes.items()}
    found: dict[str, object] = {"runs": len(problems) * len(seeds), "final": end}
    if "solver" not in volumes:
        return found
    fifty = median(v[min(49, len(v) - 1)] for v in volumes["solver"])
    found["hv50"] = fifty
    for kind in ("", "-plain"):
        rivals = {n: v for n, v in end.items() if n != "solver" and n.endswith("-plain") == bool(kind)}
        if f"tpe{kind}" not in rivals:
            continue
        suffix = "" if kind else "_with_baselines"
        goal = end[f"tpe{kind}"]
        beaten = [next((i + 1 for i, x in enumerate(v) if x > goal), None) for v in volumes["solver"]]
        found[f"evals_to_beat_tpe400{suffix}"] = max((b if b is not None else 10**9) for b in beaten)
        found[f"hv50_over_best400{suffix}"] = fifty / max(rivals.values())
    return found


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the synthetic problem and of digits (default 3)")
    parser.add_argument("--only", choices=["synthetic", "digits", "cifar10"], help="one problem alone")
    parser.add_argument("--points", type=Path, nargs="*", default=[], help="files of what was measured")
    parser.add_argument(
        "--names", nargs="*", help="these controllers alone; of ResNet-20 for --points, without a table"
    )
    parser.add_argument("--solver-evaluations", type=int, help="ResNet-20: fewer for the solver, which needs few")
    parser.add_argument("--baselines", action="store_true", help="ResNet-20 also for rivals with baselines (slow)")
    given = parser.parse_args()
    seeds = list(range(given.seeds))
    both = ["solver", *(f"{n}-plain" for n in RIVALS), *RIVALS]
    known = Known(given.points)
    results: dict[str, object] = {"evaluations": given.evaluations}
    if given.only in (None, "synthetic"):
        problems = [synthetic(seed) for seed in seeds]
        results["synthetic"] = compare(problems, [0], dict.fromkeys(given.names or both, given.evaluations), known)
    if given.only in (None, "digits"):
        problem = real("digits", load_task("digits"))
        results["digits"] = compare([problem], seeds, dict.fromkeys(given.names or both, given.evaluations), known)
    if given.data is not None and given.only in (None, "cifar10"):
        task = load_task("cifar10", data=given.data, checkpoint=given.checkpoint)
        problem = real("cifar10", task)
        names = ["solver", *(f"{n}-plain" for n in RIVALS), *(RIVALS if given.baselines else ())]
        if given.names:
            for name in given.names:
                known.points(problem, name, 0, given.evaluations)
            return
        counts = dict.fromkeys(names, given.evaluations) | {"solver": given.solver_evaluations or given.evaluations}
        cost = {
            "profile_evaluations": problem.profile.evaluations,
            "profile_seconds": round(problem.profile.seconds, 1),
        }
        found = compare([problem], [0], counts, known) | cost
        results |= {"cifar10": found} | {k: v for k, v in found.items() if k.startswith(("evals_", "hv50_over"))}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
