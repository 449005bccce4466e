"""What one candidate costs, part by part, against a forward pass and against the usual way of doing it.

    python benchmarks/candidate_cost.py --data DIR --checkpoint resnet20_cifar10.pt

A candidate is stitched from solved levels into a resident model, its batch-norm statistics are re-estimated, and it is
screened. `forward` is one pass of the dense model, as the task gives it, over the same screening inputs; `folded` the
same as candidates are screened: its batch norms folded, its convolutions channels last. The usual way (`naive`) copies
the model, compresses every layer anew with the layer database's own solver, its statistics given, and validates on all
of `val`; `naive, rounding` does it with magnitude pruning and plain rounding, which is quicker and worse. Every
repetition takes another policy; the parts alternate, so that a busy machine slows all alike. Wall seconds, median with
least and most. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from autocompress import Space, load_space, load_task
from autocompress.channels_last import channels_last
from autocompress.engine import Workbench, compress
from autocompress.engine.compensate import removal_order, solve
from autocompress.engine.prune import magnitude_mask
from autocompress.engine.quantize import quantise
from autocompress.evaluate import Evaluator
from autocompress.measure.quality import QualityMeter
from autocompress.policy import Policy
from autocompress.surgery import install
from autocompress.task import call

Seconds = dict[str, list[float]]


def timed(found: Seconds, name: str, run: Callable[[], object]) -> None:
    """Append the seconds that `run` takes."""
    start = perf_counter()
    run()
    found.setdefault(name, []).append(perf_counter() - start)


def policies(space: Space, count: int, levels: int) -> list[Policy]:
    """Random policies of `levels` different choices per layer, so that few levels need solving beforehand."""
    draw = random.Random(0)
    base = space.uniform(bits=3, sparsity=0.5)
    choices = [(2, 0.5), (3, 0.5), (4, 0.3), (3, 0.7)][:levels]
    found = []
    for _ in range(count):
        layers = {}
        for name, choice in base.layers.items():
            bits, zeros = draw.choice(choices)
            layers[name] = replace(choice, bits=bits, sparsity=zeros)
        found.append(replace(base, layers=layers))
    return found


def forward(model: torch.nn.Module, meter: QualityMeter, *, screened: bool) -> None:
    """One pass over the meter's inputs, nothing else; in the layout of a screened model or as the model is."""
    with torch.inference_mode(), channels_last(model, wanted=screened):
        for batch in meter.part or ():
            call(model, batch.inputs)


def naive(bench: Workbench, policy: Policy, meter: QualityMeter, *, database: bool) -> None:
    """Deep copy, recompress, validate."""
    model = copy.deepcopy(bench.teacher)
    weights = {}
    for layer, choice in bench.graph.choices(policy):
        weight = bench.state[layer.weight]
        if database:
            h = bench.database.statistics(layer)
            assert h is not None
            rows = weight.flatten(1)
            mask = removal_order(rows, h[0]) >= choice.zeros(weight.numel())
            codes, grid = solve(rows, h[0], mask, choice)
            assert grid is not None
            weights[layer.weight] = grid.decode(codes).reshape(weight.shape)
        else:
            mask = magnitude_mask(weight, choice.zeros(weight.numel()))
            weights[layer.weight] = quantise(weight, choice, mask).dense()
    install(model, weights)
    meter(model)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=9)
    given = parser.parse_args()
    evaluator = Evaluator(load_task("cifar10", data=given.data, checkpoint=given.checkpoint))
    bench, screen = evaluator.bench, evaluator.screen
    assert screen is not None
    space = Space(load_space("default"), bench.graph)
    drawn = policies(space, given.repetitions + 1, 4)
    evaluator(drawn[0], screen=True)  # solves nothing twice: all levels are found before the clock runs
    for policy in drawn:
        bench.one_shot(policy)
    dense = bench.realise(compress(bench, space.only({})))
    found: Seconds = {}
    meter = evaluator.quality
    for policy in drawn[1:]:
        timed(found, "forward", lambda: forward(bench.teacher, screen, screened=False))
        timed(found, "candidate", lambda p=policy: evaluator(p, screen=True))  # type: ignore[misc]
        one_shot = bench.one_shot(policy)
        state = {**one_shot.state, **{name: stored.dense() for name, stored in one_shot.weights.items()}}
        timed(found, "re-estimate", lambda s=state: bench.statistics(s))  # type: ignore[misc]
        still = replace(policy, recovery=replace(policy.recovery, reestimate_bn=False))
        timed(found, "stitch", lambda p=still: bench.realise(compress(bench, p)))  # type: ignore[misc]
        model = bench.realise(compress(bench, policy))
        timed(found, "score", lambda m=model: screen(m))  # type: ignore[misc]
        timed(found, "folded", lambda: forward(dense, screen, screened=screen.channels_last))
        timed(found, "naive, rounding", lambda p=policy: naive(bench, p, meter, database=False))  # type: ignore[misc]
        timed(found, "naive", lambda p=policy: naive(bench, p, meter, database=True))  # type: ignore[misc]
    print(f"| part | median s | least | most |\n|---|---:|---:|---:|   n = {given.repetitions}")
    for name, seconds in found.items():
        print(f"| {name} | {median(seconds):.4f} | {min(seconds):.4f} | {max(seconds):.4f} |")
    pairs = list(zip(found["candidate"], found["forward"], found["folded"], found["naive"], strict=True))
    result = {
        "inputs": sum(len(b.inputs) for b in screen.part or ()),
        "over_forward": round(median(c / f for c, f, _, _ in pairs), 3),
        "over_folded_forward": round(median(c / f for c, _, f, _ in pairs), 3),
        "naive_over": round(median(n / c for c, _, _, n in pairs), 2),
        "naive_rounding_over": round(
            median(n / c for n, c in zip(found["naive, rounding"], found["candidate"], strict=True)), 2
        ),
        "seconds": {name: round(median(seconds), 4) for name, seconds in found.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
