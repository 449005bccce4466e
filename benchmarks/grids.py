"""What equal steps and entropy coding save: error of layer outputs at equal bytes, against a best grid for each row.

    python benchmarks/grids.py --data DIR --checkpoint resnet20_cifar10.pt

Each layer is solved from the layer database on both kinds of grid, at all bits and zeros of two spaces. The lower
convex hull of rates (bytes of codes, in bits a weight) and logarithms of errors is what a search can mix from. At some
rates the errors on the two hulls are compared. Prints a row per layer of 1,000 weights or more, and ends with one JSON
line: the geometric mean over layers, each counted by its weights.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np

from autocompress import Workbench, load_task
from autocompress.graph import Layer
from autocompress.policy import LayerChoice, Scheme

RATES = (0.8, 1.2, 1.6, 2.0, 2.5, 3.0)
BITS: dict[Scheme, Sequence[float]] = {
    "symmetric": (2, 3, 4, 5, 6, 8),
    "entropy": (0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6),
}
ZEROS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.78, 0.85, 0.9, 0.95)
LEAST = 1000
"""Weights of a layer that is compared: smaller ones are a small part of any file."""


def curve(bench: Workbench, layer: Layer, scheme: Scheme) -> tuple[list[float], list[float]]:
    """Rates in bits a weight, rising, and logarithms of errors, falling."""
    points = []
    for bits in BITS[scheme]:
        for zeros in ZEROS:
            choice = LayerChoice(bits, zeros, scheme)
            coding = bench.level(layer, choice, "database").coding()  # type: ignore[union-attr]  # all have codes
            assert coding is not None
            points.append((8 * coding[1] / prod(layer.shape), math.log(bench.database.error_of(layer, choice))))
    hull: list[tuple[float, float]] = []
    for point in sorted(points):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and not _bends(*hull[-2:], point):
            hull.pop()
        hull.append(point)
    rates, errors = zip(*hull, strict=True)
    return list(rates), list(errors)


def _bends(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies below the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) < (c[1] - a[1]) * (b[0] - a[0])


def ratios(bench: Workbench, layer: Layer) -> list[float]:
    """At each rate the error on entropy coded grids, where that of a grid for each row is 1."""
    entropy, symmetric = curve(bench, layer, "entropy"), curve(bench, layer, "symmetric")
    return [math.exp(float(np.interp(r, *entropy)) - float(np.interp(r, *symmetric))) for r in RATES]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    given = parser.parse_args()
    bench = Workbench(load_task("cifar10", data=given.data, checkpoint=given.checkpoint))
    layers = [layer for layer in bench.graph.layers if prod(layer.shape) >= LEAST]
    print("| layer | weights |" + "".join(f" {rate:g} |" for rate in RATES))
    print("|---|---:|" + "---:|" * len(RATES))
    found = []
    for layer in layers:
        found.append(ratios(bench, layer))
        values = "".join(f" {value:.2f} |" for value in found[-1])
        print(f"| {layer.name} | {prod(layer.shape):,} |{values}", flush=True)
    mean = np.exp(np.average(np.log(found), axis=0, weights=[prod(layer.shape) for layer in layers]))
    print(json.dumps({"error_ratio": {f"{r:g}": round(float(m), 3) for r, m in zip(RATES, mean, strict=True)}}))


if __name__ == "__main__":
    main()
