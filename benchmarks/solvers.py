"""One-shot accuracy of uniform policies under both solvers, on the first test images of CIFAR-10.

    python benchmarks/solvers.py --data DIR --checkpoint resnet20_cifar10.pt

Prints a line for each policy and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
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
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=8, help="batches of 128 test images (default 8)")
    given = parser.parse_args()
    task = load_task("cifar10", data=given.data, checkpoint=given.checkpoint)
    assert isinstance(task, ClassificationTask)
    bench = Workbench(task)
    space = Space(load_space("tiny"), bench.graph)
    found: dict[str, dict[str, float]] = {"dense": {"none": accuracy(task, bench.teacher, given.batches)}}
    for bits, sparsity in POLICIES:
        name = f"{bits} bits, {sparsity:.0%} zeros"
        found[name] = {}
        for solver in ("nearest", "database"):
            policy = replace(space.uniform(bits=bits, sparsity=sparsity), solver=solver)
            model = bench.realise(compress(bench, policy))
            found[name][solver] = accuracy(task, model, given.batches)
        print(name, found[name], flush=True)
    print(json.dumps({"images": 128 * given.batches, "accuracy": found}))


if __name__ == "__main__":
    main()
