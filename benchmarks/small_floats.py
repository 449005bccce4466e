"""What scales and biases of one byte in place of two cost and save.

    python benchmarks/small_floats.py --data DIR --checkpoint resnet20_cifar10.pt

ResNet-20 under uniform policies of one shot (bits that a weight takes, share of zeros), with halves and with bytes in
all layers: bytes of the file, divergence from the dense model and accuracy over all of `val` and `test`. Prints a table
and ends with one JSON line: divergence with bytes over divergence with halves, and the same for the file, by policy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from autocompress import LayerChoice, Policy, Workbench, compress, load_task
from autocompress import policy as policies
from autocompress.measure.size import Size
from autocompress.task import Batch

POLICIES = ((1, 0.5), (1.5, 0.4), (2, 0.3), (2.5, 0.0), (3, 0.0), (4, 0.0), (5, 0.0))


def outputs(model: torch.nn.Module, batches: list[Batch]) -> torch.Tensor:
    """Log probabilities (n, classes)."""
    with torch.no_grad():
        return torch.cat([model(batch.inputs).log_softmax(dim=1) for batch in batches])


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    given = parser.parse_args()
    task = load_task("cifar10", data=given.data, checkpoint=given.checkpoint)
    bench = Workbench(task)
    size = Size(bench.graph, task.name, task.metric)
    batches = [batch for split in ("val", "test") for batch in task.batches(split, 0)]
    dense, labels = outputs(bench.teacher, batches), torch.cat([batch.target for batch in batches])
    print("| bits, zeros | bytes, halves | bytes | divergence, halves | bytes | accuracy, halves | bytes |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    ratios = {}
    for bits, zeros in POLICIES:
        policy = Policy({x.name: LayerChoice(bits, zeros, "entropy") for x in bench.graph.layers}, solver="database")
        rows = []
        for limit in (0, policies.MOST_ENTROPY):
            policies.SMALL_FLOATS = limit
            made = compress(bench, policy)
            found = outputs(bench.realise(made), batches)
            divergence = float((dense.exp() * (dense - found)).sum(dim=1).mean())
            accuracy = float((found.argmax(dim=1) == labels).double().mean())
            rows.append((size(policy, made.codings()), divergence, accuracy))
        (wide, lost, right), (narrow, more, left) = rows
        print(f"| {bits}, {zeros:.0%} | {wide:,} | {narrow:,} | {lost:.5f} | {more:.5f} | {right:.4f} | {left:.4f} |")
        ratios[f"{bits}/{zeros}"] = {"divergence": round(more / lost, 3), "bytes": round(narrow / wide, 4)}
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
