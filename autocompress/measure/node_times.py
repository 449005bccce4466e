"""What ONNX Runtime's profile says of each layer of a file.

Nodes of compressible layers are named by their number; the runtime renames, fuses and adds nodes. Knows no tensors and
no policy.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx

SUFFIX = "_kernel_time"
NCHWC = "_nchwc"
FUSED = ("Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh")
"""Activations that the runtime computes inside the convolution before them."""


def layer_times(profile: bytes, content: bytes, rounds: Sequence[int]) -> dict[int, float]:
    """Milliseconds per numbered node of the file `content`, from the runtime's profile of the runs `rounds`.

    What the runtime does between two numbered nodes counts to the first: it reorders, requantises, adds and pools that
    layer's output. -1 is what comes before all of them. The mean of a node's middle half of runs, since durations are
    whole microseconds and some runs are interrupted.
    """
    tensors = _tensors(content)
    every = list(_runs(profile))
    runs = [_by_layer(every[i], tensors) for i in rounds]
    found: dict[int, float] = {}
    for number in sorted({number for run in runs for number in run}):
        times = np.sort([run.get(number, 0.0) for run in runs])
        cut = len(times) // 4
        found[number] = float(times[cut : len(times) - cut].mean()) / 1e3
    return found


def _runs(profile: bytes) -> Iterator[Sequence[tuple[str, float]]]:
    """(node, microseconds) in the order of execution, for each run of the model."""
    events = [e for e in json.loads(profile) if e.get("cat") == "Node" and e["name"].endswith(SUFFIX)]
    events.sort(key=lambda event: event["ts"])
    timed = [(event["name"].removesuffix(SUFFIX), float(event["dur"])) for event in events]
    starts = [i for i, (name, _) in enumerate(timed) if name == timed[0][0]]
    for start, end in itertools.pairwise([*starts, len(timed)]):
        yield timed[start:end]


def _by_layer(run: Sequence[tuple[str, float]], tensors: Mapping[str, int]) -> dict[int, float]:
    """Microseconds per numbered node of one run, with what follows each."""
    found: dict[int, float] = {}
    current = -1
    for name, duration in run:
        number = _number(name, tensors)
        current = current if number is None else number
        found[current] = found.get(current, 0.0) + duration
    return found


def _number(name: str, tensors: Mapping[str, int]) -> int | None:
    """The number of the node that the runtime calls `name`: fused nodes get other endings, blocked ones other names."""
    if name.endswith(NCHWC):
        return tensors.get(name.removesuffix(NCHWC))
    found = re.match(r"(?:fused )?(\d+)(?:$|[_/ ])", name)
    return int(found[1]) if found else None


def _tensors(content: bytes) -> dict[str, int]:
    """Outputs of numbered nodes, and of an activation right after: blocked convolutions are named by their output."""
    graph = onnx.load_from_string(content).graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[str, int] = {}
    for node in graph.node:
        if not node.name.isdecimal():
            continue
        following: onnx.NodeProto | None = node
        while following is not None:
            output = following.output[0]
            found[output] = int(node.name)
            after = readers.get(output, [])
            following = after[0] if len(after) == 1 and after[0].op_type in FUSED else None
    return found
