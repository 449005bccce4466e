"""What large and deep models cost: memory and seconds of an encoder's way to a policy, seconds of a deep trace.

    python benchmarks/scale.py

`encoder` is a BERT of random weights (base: 12 layers, width 768, 109 million parameters), trained on nothing and fed
random tokens: what is measured does not depend on what it says. It goes from model to evaluated policy as a search does
it: `trace` (the whole workbench), `moments` (statistics of every layer's inputs), `profile` (four levels of every
layer, and an evaluation of each layer), `solve` (the knapsack, and the solution built and evaluated). Each size runs in
a fresh process of one thread with an empty cache. Memory is what the process held at its peak, VmHWM, above what it
held after its imports; the kernel's mark is reset between stages, so each has its own. `deep` are two networks of 3x3
convolutions whose batch norms have real statistics: `residual` blocks of two, and a `plain` chain without shortcuts.

Exponents are slopes of least squares through the logarithms of four or more sizes. Ends with one JSON line:
`peak_over_model` and `seconds` of the base encoder, `trace_500_s` (the slower of the two; wall time, and that of the
processor, which other work on the machine hardly moves and whose exponents are given), the exponents.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress import Budget, Space, load_space
from autocompress.controllers.registry import make_controller
from autocompress.evaluate import Evaluator
from autocompress.profile import measure
from autocompress.tasks.outputs import OutputsTask
from autocompress.trace import trace
from autocompress.trial import Limit

TOKENS, WORDS = 32, 30522
INPUTS = {"train": 256, "val": 32, "test": 32}
BASE = 768, 12
WIDTHS = 128, 192, 256, 384
"""Of encoders of four layers, for the exponent of cost against parameters."""
DEPTHS = 1, 2, 4, 8
"""Layers of encoders of width 256."""
DEEP = 61, 121, 251, 501
"""Convolutions, and one linear layer."""
BITS = [2.0, 3.0, 4.0, 6.0]
"""Of the space `large`; it has twice as many, which take twice as long."""
SHARE = 0.125
"""Bytes of the solved policy, of the dense model's."""

# --- an encoder -----------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """Gives what the first position became, so that every layer takes part."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, **inputs: Tensor) -> Tensor:
        """(n, width)."""
        pooled: Tensor = self.encoder(**inputs).pooler_output
        return pooled


def encoder(width: int, layers: int) -> nn.Module:
    """A BERT of random weights, seed 0, with a head for every 64 channels."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        attn_implementation="eager",
    )
    return Pooled(BertModel(config)).eval()


def task_of(width: int, layers: int) -> OutputsTask:
    """Keep the outputs for random tokens."""
    draw = torch.Generator().manual_seed(0)

    def inputs(split: str) -> dict[str, Tensor]:
        tokens = torch.randint(0, WORDS, (INPUTS[split], TOKENS), generator=draw)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    splits = {split: inputs(split) for split in INPUTS}
    return OutputsTask(lambda: encoder(width, layers), **splits, name="encoder")  # type: ignore[arg-type]


def memory(key: str) -> int:
    """Bytes of this process: VmRSS is now, VmHWM the most since the last reset."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


class Stages:
    """Seconds and peak memory of what runs one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._imported = memory("VmRSS")

    def __call__(self, name: str, run: Callable[[], Any]) -> Any:
        """What `run` gives."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        start = perf_counter()
        found = run()
        self.seconds[name] = round(perf_counter() - start, 2)
        self.peaks[name] = memory("VmHWM") - self._imported
        print(f"{name}: {self.seconds[name]} s, {self.peaks[name] / 1e6:.0f} MB", file=sys.stderr, flush=True)
        return found


def through(width: int, layers: int) -> dict[str, Any]:
    """One encoder from model to evaluated policy."""
    encoder(64, 1)  # so that all that transformers imports then counts among the imports
    task, stages = task_of(width, layers), Stages()
    evaluator: Evaluator = stages("trace", lambda: Evaluator(task))
    large = load_space("large")
    few = large.model_copy(update={"layers": large.layers.model_copy(update={"bits": BITS})})
    space = Space(few, evaluator.graph)
    stages("moments", lambda: evaluator.bench.database)
    profile = stages("profile", lambda: measure(evaluator, space, "scale", lambda *_: None, perf_counter))
    budget = Budget.resolve([Limit.parse(f"size={SHARE:.1%}")], evaluator.dense)

    def solve() -> Any:
        controller = make_controller("solver", space, budget, evaluator.predict, 0, profile)
        return evaluator(controller.ask())

    evaluation = stages("solve", solve)
    if evaluation.status != "ok":
        raise RuntimeError(f"the solved policy was not evaluated: {evaluation.error}")
    model = evaluator.graph.dense_bytes
    return {
        "parameters": model // 4,
        "layers": len(evaluator.graph.layers),
        "levels": sum(len(layer.levels) for layer in profile.layers),
        "seconds": stages.seconds,
        "peaks_over_model": {name: round(peak / model, 3) for name, peak in stages.peaks.items()},
        "peak_over_model": round(max(stages.peaks.values()) / model, 3),
        "bytes_over_dense": round(evaluation.measurement.bytes / model, 4),
    }


# --- deep networks --------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, height, width of the image)."""
        inner = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(x + self.norms[1](self.second(inner)))


def residual(convolutions: int) -> nn.Module:
    """16 channels."""
    blocks = [Block(16) for _ in range((convolutions - 1) // 2)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *blocks, *_head(16))


def plain(convolutions: int) -> nn.Module:
    """32 channels; kernels near the identity, without which nothing of the input is left after so many."""
    layers: list[nn.Module] = []
    for i in range(convolutions):
        layer = nn.Conv2d(32 if i else 3, 32, 3, padding=1, bias=False)
        if i:
            with torch.no_grad():
                layer.weight.mul_(0.05).add_(nn.init.dirac_(torch.empty_like(layer.weight)))
        layers += [layer, nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, *_head(32))


def _head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]


KINDS = {"residual": residual, "plain": plain}


def traced(kind: str, convolutions: int) -> dict[str, Any]:
    """Seconds of one trace."""
    torch.manual_seed(0)
    model, images = KINDS[kind](convolutions), torch.randn(8, 3, 16, 16)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    with torch.no_grad():
        model.train()(images)  # batch norms take these statistics
    start, processor = perf_counter(), process_time()
    graph = trace(model.eval(), images)
    seconds, own = perf_counter() - start, process_time() - processor
    return {
        "layers": len(graph.layers),
        "groups": len(graph.prunable),
        "seconds": round(seconds, 2),
        "processor_seconds": round(own, 2),
    }


# --- all of it ------------------------------------------------------------------------------------------


def apart(*arguments: object) -> dict[str, Any]:
    """What this file finds for `arguments` in a fresh process of one thread, whose cache is empty."""
    with tempfile.TemporaryDirectory() as cache:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        given = {**os.environ, **threads, "AUTOCOMPRESS_CACHE": cache}
        command = [sys.executable, __file__, *map(str, arguments)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=given)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(" ".join(map(str, arguments)), json.dumps(found), flush=True)
    return found


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost over log size."""
    return round(float(np.polyfit(np.log(sizes), np.log(costs), 1)[0]), 2)


def exponents(found: Sequence[dict[str, Any]], size: str) -> dict[str, float]:
    """Of each stage's seconds, and of all."""
    sizes = [float(one[size]) for one in found]
    stages = {name: exponent(sizes, [one["seconds"][name] for one in found]) for name in found[0]["seconds"]}
    return {**stages, "all": exponent(sizes, [math.fsum(one["seconds"].values()) for one in found])}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=int, nargs=2, metavar=("WIDTH", "LAYERS"), help="one encoder, as JSON")
    parser.add_argument("--deep", nargs=2, metavar=("KIND", "CONVOLUTIONS"), help="one trace, as JSON")
    parser.add_argument("--only", default="base,deep,exponents", help="parts, separated by commas")
    given = parser.parse_args()
    if given.encoder:
        print(json.dumps(through(*given.encoder)))
        return
    if given.deep:
        print(json.dumps(traced(given.deep[0], int(given.deep[1]))))
        return
    result: dict[str, Any] = {}
    if "base" in given.only:
        base = apart("--encoder", *BASE)
        result |= {key: base[key] for key in ("parameters", "peak_over_model", "peaks_over_model", "seconds")}
    if "deep" in given.only:
        for kind in KINDS:
            found = [apart("--deep", kind, count) for count in DEEP]
            result[f"trace_{kind}_exponent"] = exponent(
                [f["layers"] for f in found], [f["processor_seconds"] for f in found]
            )
            for key, unit in (("trace_500_s", "seconds"), ("trace_500_processor_s", "processor_seconds")):
                result[key] = max(result.get(key, 0.0), found[-1][unit])
    if "exponents" in given.only:
        result["parameters_exponents"] = exponents([apart("--encoder", w, 4) for w in WIDTHS], "parameters")
        result["layers_exponents"] = exponents([apart("--encoder", 256, n) for n in DEPTHS], "layers")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
