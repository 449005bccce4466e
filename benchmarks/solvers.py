"""One-shot accuracy of uniform policies under both solvers, on the first `test` inputs of CIFAR-10 or another task.

    python benchmarks/solvers.py --data DIR --checkpoint resnet20_cifar10.pt
    python benchmarks/solvers.py --task docs/examples/sequences.py:gru --seeds 5

Each seed draws other calibration batches. Prints a line for each policy, with median, least and largest accuracy over
seeds, and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from autocompress import ClassificationTask, Space, Workbench, compress, load_space, load_task

POLICIES = ((2, 0.0), (3, 0.5), (4, 0.8), (3, 0.9))
"""Bits and share of zeros, the same in every layer; all are in the space `tiny`."""


def accuracy(task: ClassificationTask, model: nn.Module, batches: int) -> float:
    """Share of right answers on the first `batches` of `test`."""
    with torch.no_grad():
        right = [model(b.inputs).argmax(dim=1) == b.target for b in islice(task.batches("test", 0), batches)]
    return float(torch.cat(right).double().mean())


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="cifar10", help="a classification task (default cifar10)")
    parser.add_argument("--data", type=Path, help="for cifar10")
    parser.add_argument("--checkpoint", type=Path, help="for cifar10")
    parser.add_argument("--batches", type=int, default=8, help="batches of test inputs (default 8)")
    parser.add_argument("--seeds", type=int, default=1, help="draws of calibration batches (default 1)")
    given = parser.parse_args()
    task = load_task(given.task, data=given.data, checkpoint=given.checkpoint)
    assert isinstance(task, ClassificationTask)
    benches = [Workbench(task, seed=seed) for seed in range(given.seeds)]
    space = Space(load_space("tiny"), benches[0].graph)
    dense = accuracy(task, benches[0].teacher, given.batches)
    found: dict[str, dict[str, list[float]]] = {"dense": {"none": [dense]}}
    for bits, sparsity in POLICIES:
        name = f"{bits} bits, {sparsity:.0%} zeros"
        found[name] = {}
        for solver in ("nearest", "database"):
            policy = replace(space.uniform(bits=bits, sparsity=sparsity), solver=solver)
            models = (bench.realise(compress(bench, policy)) for bench in benches)
            scores = [accuracy(task, model, given.batches) for model in models]
            found[name][solver] = [statistics.median(scores), min(scores), max(scores)]
        print(name, found[name], flush=True)
    inputs = min(task.batch_size * given.batches, len(task.split("test")[1]))
    print(json.dumps({"inputs": inputs, "seeds": given.seeds, "accuracy": found}))


if __name__ == "__main__":
    main()
