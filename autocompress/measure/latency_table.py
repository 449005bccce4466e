"""Milliseconds of a policy without building it: a table of layer times over widths and precisions.

The table is filled from the runtime's own profile of a handful of whole-model runs whose widths are chosen so that
every layer is seen in every shape that it can take, and scaled to end-to-end latencies by a fitted line. Times are
kept per shape and not interpolated over multiply-accumulates where one was measured: kernels work in blocks, and a
width between two blocks is slow. Plain data; knows no tensors, no runtime and no budget.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from autocompress.errors import LatencyError
from autocompress.graph import Graph, Layer
from autocompress.measure.timing import Latency, Traced, calmest
from autocompress.policy import LayerChoice, Policy, Recovery

VERSION = 1
PRECISIONS = (32, 8)
"""Bits of the activations: float kernels, or integer ones where the weight has a grid."""
MIN_RUNS, MAX_RUNS = 8, 16
"""Whole-model runs per precision; with more ratios than these can pair, the pairs left are estimated."""
MIXED_RUNS = 4
SHALLOW_RUNS = 3
SAMPLES = 24
ANCHOR_SAMPLES = 10

Widths = tuple[int, int]
FileOf = Callable[[Policy, int], bytes]
"""The `.onnx` file of a policy, with activations of so many bits."""


class Stopwatch(Protocol):
    """What a table is measured with; `latency.RuntimeMeter` is one."""

    dense: float
    threads: int
    batch: int

    def __call__(self, content: bytes, samples: int = ...) -> Latency:
        """Latency of a file."""
        ...

    def traced(self, content: bytes, samples: int = ...) -> Traced:
        """Latency of a file and of its layers."""
        ...

    def against(self, reference: bytes, dense_ms: float) -> Stopwatch:
        """The same with another reference."""
        ...


@dataclass(frozen=True, slots=True)
class Deployment:
    """Where the times hold. `device` is only named: a table may come from another machine than the search's."""

    fingerprint: str
    runtime: str
    runtime_version: str
    device: str
    threads: int = 1
    batch: int = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """Profiled milliseconds of a layer whose weight has `outputs` rows and `inputs` columns (of its own group)."""

    outputs: int
    inputs: int
    ms: float


@dataclass(frozen=True)
class Precision:
    """Layer times at one width of the activations: latency = `overhead` + `scale` * sum of the entries.

    The overhead is negative where tracing cost more than what the runtime does outside of nodes.
    """

    activations: int
    overhead: float
    scale: float
    layers: Mapping[str, tuple[Entry, ...]]

    @cached_property
    def _known(self) -> dict[str, dict[Widths, float]]:
        return {name: {(e.outputs, e.inputs): e.ms for e in entries} for name, entries in self.layers.items()}

    def ms(self, layer: str, widths: Widths) -> float:
        """What the layer adds to the latency; 0 for one that the runtime does not show."""
        known = self._known.get(layer)
        if known is None:
            return 0.0
        if widths not in known:
            known[widths] = _estimate(self.layers[layer], widths)
        return self.scale * known[widths]


@dataclass(frozen=True)
class LatencyTable:
    """Predicts latencies of one model. `error` is the median absolute one over the runs it was fitted to.

    A layer with float weights among integer ones takes its time with float kernels, `edge_layer` milliseconds more and
    `edge_element` per value that is converted. `dense` is the dense model's latency with float kernels.
    """

    deployment: Deployment
    dense: float
    precisions: tuple[Precision, ...]
    edge_layer: float = 0.0
    edge_element: float = 0.0
    error: float = 0.0
    runs: int = 0
    seconds: float = 0.0

    def precision(self, activations: int) -> Precision:
        """The times at a width of the activations. Raises `LatencyError` for one that was not measured."""
        for found in self.precisions:
            if found.activations == activations:
                return found
        raise LatencyError(f"the latency table holds no times for {activations}-bit activations; build it again")

    def layer_ms(self, layer: Layer, widths: Widths, integer: bool, activations: int) -> float:
        """What one layer adds to the latency of a network with such activations, in milliseconds.

        `widths` are the first two sizes of its weight; `integer` says whether its weight has a grid for the kernels.
        A removed layer, which has a width of 0, adds nothing.
        """
        if 0 in widths:
            return 0.0
        if activations == 32 or integer or layer.kind == "embedding":
            return self.precision(activations).ms(layer.name, widths)
        edge = self.edge_layer + self.edge_element * _converted(layer, widths)
        return self.precision(32).ms(layer.name, widths) + edge

    def predict(self, graph: Graph, policy: Policy, activations: int) -> float:
        """Milliseconds of `policy`. A search keeps a `Predictor`, which remembers what it asked."""
        return Predictor(self, graph)(policy, activations)

    def check(self, graph: Graph, runtime_version: str, threads: int, batch: int) -> None:
        """Raise `LatencyError` unless the table is of this model, runtime, thread count and batch size."""
        mine = self.deployment
        rebuild = "build the table again, or name none"
        if mine.fingerprint != graph.fingerprint:
            raise LatencyError(f"the latency table is of another model than the task's; {rebuild}")
        if mine.runtime_version != runtime_version:
            raise LatencyError(
                f"the latency table was measured with {mine.runtime} {mine.runtime_version}, and this is "
                f"{runtime_version}; {rebuild}"
            )
        if mine.threads != threads:
            raise LatencyError(f"the latency table is for {mine.threads} threads, not {threads}; {rebuild}")
        if mine.batch != batch:
            raise LatencyError(f"the latency table is for a batch size of {mine.batch}, not {batch}; {rebuild}")

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` gives an equal table back."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: Any) -> LatencyTable:
        """The table that `to_json` wrote. Raises `LatencyError` on anything else."""
        try:
            if data["version"] != VERSION:
                raise ValueError(f"it is of format {data['version']!r}, and this version reads {VERSION}")
            return cls(
                _deployment(data["deployment"]),
                _positive(data["dense"]),
                tuple(_precision(row) for row in data["precisions"]),
                _finite(data["edge_layer"]),
                _finite(data["edge_element"]),
                _finite(data["error"]),
                _count(data["runs"]),
                _finite(data["seconds"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise LatencyError(f"the latency table cannot be read: {error}; build it again") from None


def read_table(path: Path) -> LatencyTable:
    """The table in a file. Raises `LatencyError`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LatencyError(f"{path} cannot be read as a latency table: {error}") from None
    return LatencyTable.from_json(data)


def _deployment(row: Any) -> Deployment:
    fingerprint, runtime, version, device = (row[n] for n in ("fingerprint", "runtime", "runtime_version", "device"))
    if not all(isinstance(text, str) for text in (fingerprint, runtime, version, device)):
        raise ValueError("it does not name its model, runtime and device")
    return Deployment(fingerprint, runtime, version, device, _count(row["threads"], 1), _count(row["batch"], 1))


def _precision(row: Any) -> Precision:
    layers = {
        str(name): tuple(Entry(_count(e["outputs"]), _count(e["inputs"]), _finite(e["ms"])) for e in entries)
        for name, entries in row["layers"].items()
    }
    if not all(layers.values()):
        raise ValueError("a layer has no times")
    if row["activations"] not in PRECISIONS:
        raise ValueError(f"{row['activations']!r} is no width of activations")
    overhead = row["overhead"]
    sign = -1 if isinstance(overhead, float) and overhead < 0 else 1
    return Precision(row["activations"], sign * _finite(sign * overhead), _finite(row["scale"]), layers)


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is not a finite number of 0 or more")
    return float(value)


def _positive(value: Any) -> float:
    if _finite(value) <= 0:
        raise ValueError(f"{value!r} is not above 0")
    return float(value)


def _count(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 2**31:
        raise ValueError(f"{str(value)[:80]} is not a whole number of {least} or more, below 2^31")
    return value


def _converted(layer: Layer, widths: Sequence[int]) -> int:
    """Values that enter and leave the layer for one input, where it has as many positions on both sides."""
    return layer.positions * sum(widths[:2])


def _estimate(entries: Sequence[Entry], widths: Widths) -> float:
    """A shape that was not measured: a line over the product of its widths, times what each width does elsewhere."""
    outputs, inputs = widths
    areas = np.array([e.outputs * e.inputs for e in entries], dtype=float)
    times = np.array([e.ms for e in entries])
    base, slope = _line(areas, times)
    share = times / np.maximum(base + slope * areas, 1e-12)
    same = [[s for s, e in zip(share, entries, strict=True) if getattr(e, side) == width and s > 0]
            for side, width in (("outputs", outputs), ("inputs", inputs))]  # fmt: skip
    factor = math.prod(math.exp(float(np.mean(np.log(found)))) for found in same if found)
    return (base + slope * outputs * inputs) * factor


def _line(x: Any, y: Any) -> tuple[float, float]:
    """Intercept and slope, which is not negative, with the least squared relative error of y (n,) over x (n,)."""
    weight = 1 / np.maximum(y, 1e-9)
    if float(np.ptp(x)) > 1e-6 * float(np.max(np.abs(x))):
        base, slope = np.linalg.lstsq(np.stack([weight, x * weight], axis=1), y * weight, rcond=None)[0]
        if slope > 0:
            return float(base), float(slope)
    return 0.0, float((x * weight) @ (y * weight) / max((x * weight) @ (x * weight), 1e-12))


def _nonnegative(columns: Any, wanted: Any) -> tuple[float, float]:
    """Least squares with two coefficients that are not negative: columns (n, 2), wanted (n,)."""
    best, least = (0.0, 0.0), float(wanted @ wanted)
    for active in ([0], [1], [0, 1]):
        part, _, rank, _ = np.linalg.lstsq(columns[:, active], wanted, rcond=None)
        rest = wanted - columns[:, active] @ part
        if rank == len(active) and part.min() >= 0 and float(rest @ rest) < least:
            found = dict(zip(active, part.tolist(), strict=True))
            best, least = (found.get(0, 0.0), found.get(1, 0.0)), float(rest @ rest)
    return best


# --- what widths there are --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Side:
    """The group whose channels run along a dimension of a weight, and how many indices each channel has there."""

    group: str
    dim: int
    per_channel: int


class _Shapes:
    """Weights' widths by how many channels each group keeps."""

    def __init__(self, graph: Graph) -> None:
        self.sides = _sides(graph)
        self._channels = {group.name: group.channels for group in graph.prunable}

    def widths(self, layer: Layer, kept: Mapping[str, int]) -> Widths:
        """The first two sizes of the layer's weight."""
        sizes = [*layer.shape[:2], 1][:2]
        for side in self.sides[layer.name]:
            sizes[side.dim] -= (self._channels[side.group] - kept[side.group]) * side.per_channel
        return sizes[0], sizes[1]


class Predictor:
    """Predicts latencies of policies for one model: a few dictionary reads per layer."""

    def __init__(self, table: LatencyTable, graph: Graph) -> None:
        self._table, self._graph, self._shapes = table, graph, _Shapes(graph)
        self._groups = [(layer, tuple(s.group for s in self._shapes.sides[layer.name])) for layer in graph.layers]
        self._known: dict[tuple[Any, ...], float] = {}

    def __call__(self, policy: Policy, activations: int) -> float:
        """Milliseconds per batch. Raises `LatencyError` if the table has no times for these activations."""
        kept, known = self._graph.kept(policy), self._known
        total = self._table.precision(activations).overhead
        for layer, groups in self._groups:
            integer = layer.name not in policy.floats and fits_integers(policy.choice(layer.name))
            key = (layer.name, integer, activations, *[kept[group] for group in groups])
            if key not in known:
                known[key] = self._table.layer_ms(layer, self._shapes.widths(layer, kept), integer, activations)
            total += known[key]
        return total


def fits_integers(choice: LayerChoice) -> bool:
    """Whether integer kernels take the weight: codes counted from their zero point are signed bytes."""
    return choice.width < 8 or (choice.width == 8 and choice.symmetric)


def _sides(graph: Graph) -> dict[str, tuple[_Side, ...]]:
    """For each layer, the prunable groups along the first two dimensions of its weight."""
    found: dict[str, list[_Side]] = {layer.weight: [] for layer in graph.layers}
    for group in graph.prunable:
        for member in group.members:
            if member.tensor in found and member.dim < 2:
                found[member.tensor].append(_Side(group.name, member.dim, member.per_channel))
    return {layer.name: tuple(found[layer.weight]) for layer in graph.layers}


# --- which runs -------------------------------------------------------------------------------------------


def design(graph: Graph, keep: Mapping[str, Sequence[float]], seed: int = 0) -> tuple[Mapping[str, float], ...]:
    """Keep ratios of the runs: every shape that a layer can take occurs in one, if `MAX_RUNS` are enough.

    The first runs keep the same share everywhere, so that the latencies span what there is; each further one is put
    together group by group, from the ratios that show most of what no run showed yet. Where groups can be removed, a
    few more runs are without some or all of these, which says what else goes with their layers.
    """
    ratios = {g.name: sorted({r for r in keep.get(g.name, ()) if r} or {1.0}) for g in graph.prunable}
    longest = max((len(r) for r in ratios.values()), default=1)
    draw = random.Random(seed)
    runs = [{name: r[round(i * (len(r) - 1) / max(1, longest - 1))] for name, r in ratios.items()}
            for i in range(longest)][:MAX_RUNS]  # fmt: skip
    cover = _Cover(graph, ratios)
    for run in runs:
        cover.add(run)
    fewer = _shallower(sorted(name for name in ratios if 0.0 in keep.get(name, ())), random.Random(seed))
    if longest == 1:
        return (*runs, *runs, *fewer)
    while len(runs) < MAX_RUNS and (len(runs) < MIN_RUNS or not cover.complete):
        runs.append(cover.propose(draw))
        cover.add(runs[-1])
    return (*runs, *fewer)


def _shallower(removable: Sequence[str], draw: random.Random) -> list[dict[str, float]]:
    """Runs that keep the rest whole, without a third, two thirds and all of the `removable` groups."""
    counts = dict.fromkeys(math.ceil(len(removable) * step / SHALLOW_RUNS) for step in range(1, SHALLOW_RUNS + 1))
    return [dict.fromkeys(draw.sample(removable, count), 0.0) for count in counts if count]


class _Cover:
    """Which combinations of ratios each layer was seen with."""

    def __init__(self, graph: Graph, ratios: Mapping[str, Sequence[float]]) -> None:
        self._ratios = ratios
        groups = {layer: tuple(dict.fromkeys(s.group for s in sides)) for layer, sides in _sides(graph).items()}
        self._needs = sorted({names for names in groups.values() if names})
        self._seen: dict[tuple[Any, ...], int] = {}

    @property
    def complete(self) -> bool:
        """Whether every combination was seen."""
        wanted = sum(math.prod(len(self._ratios[n]) for n in names) for names in self._needs)
        return len(self._seen) >= wanted

    def add(self, run: Mapping[str, float]) -> None:
        """Take note of a run."""
        for names in self._needs:
            key = (names, *[run[n] for n in names])
            self._seen[key] = self._seen.get(key, 0) + 1

    def propose(self, draw: random.Random) -> dict[str, float]:
        """A run that shows what was seen least, as far as one group after the other can tell."""
        chosen: dict[str, float] = {}
        for name in draw.sample(sorted(self._ratios), len(self._ratios)):
            ratios = draw.sample(list(self._ratios[name]), len(self._ratios[name]))
            chosen[name] = max(ratios, key=lambda ratio: self._novelty(name, {**chosen, name: ratio}))
        return chosen

    def _novelty(self, name: str, chosen: Mapping[str, float]) -> float:
        return sum(
            0.01 ** self._seen.get((names, *[chosen[n] for n in names]), 0)
            if all(n in chosen for n in names)
            else 0.5 * self._open(names, chosen)
            for names in self._needs
            if name in names
        )

    def _open(self, names: Sequence[str], chosen: Mapping[str, float]) -> bool:
        """Whether no run showed some combination with what is chosen; looks at the first few of very many."""
        options = itertools.product(*[(chosen[n],) if n in chosen else self._ratios[n] for n in names])
        return any((tuple(names), *choice) not in self._seen for choice in itertools.islice(options, 64))


# --- measuring --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What a table is built for: the model, the keep ratios of each group, and a way to make a policy's file.

    `computed` are the weights that the files' named nodes compute with, in the order of their numbers.
    """

    graph: Graph
    keep: Mapping[str, Sequence[float]]
    computed: Sequence[str]
    file_of: FileOf


@dataclass(frozen=True)
class _Series:
    """Runs at one precision, on the scale of its own dense file, which `anchors` tie to the stopwatch's reference."""

    activations: int
    dense: bytes
    watch: Stopwatch
    anchors: list[Latency] = field(default_factory=list)
    runs: list[tuple[Policy, Latency, Mapping[int, float]]] = field(default_factory=list)

    @property
    def anchor(self) -> float:
        """Milliseconds of the dense file."""
        return calmest(self.anchors).ms

    def measured(self) -> list[tuple[Policy, float]]:
        """Milliseconds of each policy."""
        return [(policy, self.anchor * latency.ms) for policy, latency, _ in self.runs]


def build(model: Model, watch: Stopwatch, place: tuple[str, str, str], clock: Callable[[], float]) -> LatencyTable:
    """Measure a table. `place` names runtime, its version and the device; `clock` is in seconds.

    Each precision's runs are timed against its dense file, and that file against the reference between them: a busy
    machine slows the two precisions by different shares.
    """
    start = clock()
    series = [_opened(model, watch, activations) for activations in PRECISIONS]
    for keep in design(model.graph, model.keep):
        for one in series:
            one.anchors.append(watch(one.dense, ANCHOR_SAMPLES))
            policy = _policy(model.graph, keep, one.activations)
            traced = one.watch.traced(model.file_of(policy, one.activations), SAMPLES)
            one.runs.append((policy, traced.latency, traced.layers))
    table = LatencyTable(
        Deployment(model.graph.fingerprint, *place, watch.threads, watch.batch),
        watch.dense,
        tuple(_fitted(model, one) for one in series),
    )
    table = _with_edges(table, model, series[-1])
    errors = [
        abs(table.predict(model.graph, policy, one.activations) / ms - 1)
        for one in series
        for policy, ms in one.measured()
    ]
    return replace(table, error=median(errors), runs=len(errors), seconds=clock() - start)


def _opened(model: Model, watch: Stopwatch, activations: int) -> _Series:
    dense = model.file_of(_policy(model.graph, {}, activations), activations)
    return _Series(activations, dense, watch.against(dense, 1.0))


def _policy(graph: Graph, keep: Mapping[str, float], bits: int, floats: frozenset[str] = frozenset()) -> Policy:
    """The cheapest to build of the policies with these shapes and precisions."""
    layers = {layer.name: LayerChoice(32 if layer.name in floats else bits) for layer in graph.layers}
    return Policy(layers=layers, keep=keep, recovery=Recovery(reestimate_bn=False))


def _fitted(model: Model, one: _Series) -> Precision:
    """The entries, and the line from their sum to the latency."""
    layers = {layer.weight: layer for layer in model.graph.layers}
    shapes = _Shapes(model.graph)
    found: dict[str, dict[Widths, list[float]]] = {}
    for policy, _, times in one.runs:
        kept = model.graph.kept(policy)
        for number, weight in enumerate(model.computed):
            layer = layers[weight]
            widths = shapes.widths(layer, kept)
            if 0 not in widths:
                found.setdefault(layer.name, {}).setdefault(widths, []).append(one.anchor * times.get(number, 0.0))
    entries = {
        name: tuple(Entry(*widths, median(times)) for widths, times in sorted(seen.items()))
        for name, seen in found.items()
    }
    plain = LatencyTable(_NOWHERE, 1.0, (Precision(one.activations, 0.0, 1.0, entries),))
    measured = one.measured()
    sums = np.array([plain.predict(model.graph, policy, one.activations) for policy, _ in measured])
    overhead, scale = _line(sums, np.array([ms for _, ms in measured]))
    return Precision(one.activations, overhead, scale, entries)


_NOWHERE = Deployment("", "", "", "")


def _with_edges(table: LatencyTable, model: Model, one: _Series) -> LatencyTable:
    """The table with what a layer with float kernels costs among integer ones: some at random, in a few runs."""
    names = [layer.name for layer in model.graph.layers if layer.weight in set(model.computed)]
    draw = random.Random(0)
    rows, rest = [], []
    for i in range(MIXED_RUNS if len(names) > 1 else 0):
        floats = frozenset(draw.sample(names, max(1, len(names) * (i + 1) // (2 * MIXED_RUNS))))
        policy = _policy(model.graph, {}, one.activations, floats)
        latency = one.watch(model.file_of(policy, one.activations), SAMPLES)
        one.runs.append((policy, latency, {}))
        converted = [_converted(layer, layer.shape) for layer in model.graph.layers if layer.name in floats]
        rows.append([float(len(converted)), float(sum(converted))])
        rest.append(one.anchor * latency.ms - table.predict(model.graph, policy, one.activations))
    if not rows:
        return table
    columns = np.array(rows)
    size = columns.max(axis=0)
    layer, element = _nonnegative(columns / size, np.array(rest))
    return replace(table, edge_layer=layer / size[0], edge_element=element / size[1])
