"""Layer solutions against calibration statistics: found once, reused by every candidate and by later runs.

For each (zeros, bits) of a layer the weight that changes the layer's outputs least, given what it sees, and how much
it loses. A solution is a function of weight, statistics and choice alone, so it is kept on disk under the digest of
these. Chooses no levels.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import prod

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

from autocompress.engine.cache import Cache, digest
from autocompress.engine.channels import Reader, refit, removal_ranks
from autocompress.engine.compensate import Factor, factorise, ranked, refit_scale, removal_order, solve, times
from autocompress.engine.moments import moments, statistics_room
from autocompress.engine.prune import Slice, magnitude_mask
from autocompress.engine.quantize import Grid, grid_of, parts, quantise
from autocompress.graph import Graph, Layer, Member, Shape
from autocompress.memory import trim
from autocompress.policy import LayerChoice
from autocompress.stored import Full, Half, Quantised, Stored, round_to_half
from autocompress.task import Batch

VERSION = 2
"""Raise when statistics, orders or solutions change, so that older ones on disk are not read."""
FACTOR_BYTES = 64 * 2**20
"""Factors of H that stay in memory for the next level of the same layers."""
STATISTICS_BYTES = 64 * 2**20
"""Normalised H that stay in memory: levels of one layer are solved one after the other."""
ROWWISE_BYTES = 16 * 2**20
"""Groups are solved at once if a coupling for each of their rows takes no more, else one after the other."""
LARGE_STATISTICS = 2**22
"""Numbers in an H whose inversion leaves much memory behind."""
SMALL = 2 * 10**8
REFITS = 3
"""Rounds of scale and codes for rows whose weights are independent."""

Entry = Mapping[str, Tensor]


# --- statistics on disk ---------------------------------------------------------------------------------


def remembered_moments(
    cache: Cache, model: nn.Module, graph: Graph, batches: Sequence[Batch], seed: int
) -> Mapping[str, Tensor]:
    """`moments` in single precision, from the cache if this model has seen these batches before."""
    inputs = _leaves([batch.inputs for batch in batches])
    key = digest(VERSION, seed, graph.layers, _code(model), *_leaves(model.state_dict()), *inputs)
    keys = {layer.name: f"moments-{digest(key, layer.name)}" for layer in graph.layers}
    found = statistics_room(graph, 4)
    for layer in graph.layers:
        h = _statistics(cache, keys[layer.name], layer)
        if h is None:
            break
        if h.numel():
            found[layer.name] = h
    else:
        return found
    seen, found = moments(model, graph, batches, seed), statistics_room(graph, 4)
    for name, entry in keys.items():  # an empty one says that the model never calls this layer
        h = seen[name].float() if name in seen else torch.zeros(0)
        cache.write(entry, {"h": h})
        if name in seen:
            found[name] = h
    return found


def _leaves(value: object) -> list[object]:
    """Every tensor, number and text in a state dict or a batch's inputs."""
    if isinstance(value, Mapping):
        return [part for name in value for part in (str(name), *_leaves(value[name]))]
    if isinstance(value, tuple | list):
        return [part for item in value for part in _leaves(item)]
    return [value] if isinstance(value, Tensor | str | int | float) else []


def _code(model: nn.Module) -> list[str]:
    """What a model does beside its tensors: its structure and the source of its modules, where there is any."""
    found = [repr(model)]
    for kind in sorted({type(module) for module in model.modules()}, key=lambda kind: kind.__qualname__):
        with contextlib.suppress(OSError, TypeError):
            found.append(inspect.getsource(kind))
    return found


def _statistics(cache: Cache, key: str, layer: Layer) -> Tensor | None:
    """The layer's statistics under `key`, empty if it is known to have none."""
    entry = cache.read(key)
    if entry is None:
        return None
    d = prod(layer.shape[1:])
    shape = layer.shape[:1] if layer.kind == "embedding" else (layer.groups, d, d)
    h = entry.get("h")
    if h is not None and h.dtype == torch.float32 and tuple(h.shape) in ((0,), shape):
        return h
    cache.refuse(key, "it holds no statistics of this layer")
    return None


def _normalised(name: str, h: Tensor) -> Tensor | None:
    """H scaled to a mean diagonal of 1, which changes no solution; None, with a warning, where it is of no use."""
    mean = (h if h.ndim == 1 else h.diagonal(dim1=1, dim2=2)).double().mean()
    scaled = (h.to(torch.float64, copy=True).div_(mean)).float()
    usable = bool(torch.isfinite(scaled).all())
    if usable and h.ndim == 1:
        usable = bool((scaled > 0).all())
    elif usable:
        usable = bool((torch.linalg.cholesky_ex(scaled.double()).info == 0).all())
    if usable:
        return scaled
    warnings.warn(f"layer {name} is rounded to nearest: what it sees in calibration is not usable", stacklevel=2)
    return None


# --- solutions on disk ----------------------------------------------------------------------------------


def _entry(values: Tensor, grid: Grid | None, mask: Tensor, choice: LayerChoice) -> dict[str, Tensor]:
    """Plain tensors of a solution whose `values` are codes if there is a grid."""
    packed = torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))
    if grid is None:
        return {"values": round_to_half(values) if choice.bits == 16 else values, "mask": packed}
    scale = round_to_half(grid.scale)
    return {"codes": values.to(torch.uint8), "scale": scale, "zero": grid.zero.to(torch.uint8), "mask": packed}


def _stored(entry: Entry, layer: Layer, choice: LayerChoice) -> Stored:
    """The solution that an entry holds. Raises `ValueError` if it is not one of this layer and choice."""
    count = prod(layer.shape)
    bits = _checked(entry, "mask", torch.uint8, ((count + 7) // 8,))
    flat = torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).bool()
    if int(flat.sum()) != count - choice.zeros(count):
        raise ValueError("its mask has another number of zeros")
    mask = None if choice.zeros(count) == 0 else flat.reshape(layer.shape)
    if choice.bits >= 16:
        values = _checked(entry, "values", torch.float32, layer.shape)
        if mask is not None and bool(values[~mask].any()):
            raise ValueError("pruned weights are not zero")
        return Half(values, mask) if choice.bits == 16 else Full(values, mask)
    codes = _checked(entry, "codes", torch.uint8, layer.shape)
    scale = _checked(entry, "scale", torch.float32, layer.shape[:1])
    zero = _checked(entry, "zero", torch.uint8, layer.shape[:1])
    top = max(2, 2**choice.width - 1)  # one bit is a sign, and 1 between its codes 0 and 2 is zero
    if int(codes.max()) > top or int(zero.max()) > top:
        raise ValueError(f"codes or zero points are beyond {choice.width} bits")
    if choice.symmetric and bool((zero != 2 ** (choice.width - 1)).any()):
        raise ValueError("a symmetric grid has its zero elsewhere")
    if mask is not None and bool((codes != zero.reshape(-1, *[1] * (codes.ndim - 1)))[~mask].any()):
        raise ValueError("pruned weights are not zero")
    found = Quantised(codes, scale, zero, choice.width, choice.symmetric, mask)
    return (found.narrowed() if choice.entropy else found).with_length()


def _checked(entry: Entry, name: str, kind: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    value = entry.get(name)
    if value is None or value.dtype != kind or tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} is not {kind} of shape {tuple(shape)}")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} is not finite")
    return value


# --- layers ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _threads(size: int) -> Iterator[None]:
    """One thread for layers of up to `SMALL` rows * d * d: two pools of threads wait for each other."""
    if size > SMALL:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _pools().limit(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()


def _level_key(key: str, choice: LayerChoice) -> str:
    return f"level-{digest(key, choice)}"


class LayerDatabase:
    """Solutions of one model's layers, each found on first use."""

    def __init__(self, state: Mapping[str, Tensor], h: Mapping[str, Tensor], cache: Cache | None = None) -> None:
        """`h` as `moments` gives it; layers without a usable one are rounded to nearest."""
        self._state, self._given, self._cache = state, h, cache
        self._h: OrderedDict[str, Tensor | None] = OrderedDict()
        self._known: dict[str, bool] = {}
        self._keys: dict[str, str] = {}
        self._ranks: dict[str, Tensor] = {}
        self._factors: OrderedDict[tuple[str, int], Factor] = OrderedDict()
        self._errors: dict[tuple[str, LayerChoice], float] = {}
        self._powers: dict[str, float] = {}

    def knows(self, layer: Layer) -> bool:
        """Whether there are usable statistics for this layer."""
        if layer.name not in self._known:
            self._known[layer.name] = self.statistics(layer) is not None
        return self._known[layer.name]

    def solve(self, layer: Layer, choice: LayerChoice) -> Stored:
        """The layer's weight under `choice`."""
        weight, h = self._state[layer.weight], self.statistics(layer)
        count = choice.zeros(weight.numel())
        if h is None or (choice.bits >= 16 and not count):
            return quantise(weight, choice, magnitude_mask(weight, count))
        if h.ndim == 1:
            found = _by_frequency(layer, weight, h, choice)
            self._errors[layer.name, choice] = self.error(layer, found)
            return found
        key = _level_key(self._key(layer), choice)
        stored = self._read(key, layer, choice)
        if stored is None:
            with _threads(weight.numel() * h.shape[-1]):
                entry = self._solved(layer, h, choice)
                stored = _stored(entry, layer, choice)
                self._errors[layer.name, choice] = self.error(layer, stored)
            self._write(key, {**entry, "error": torch.tensor([self._errors[layer.name, choice]], dtype=torch.float64)})
        return stored

    def release(self) -> None:
        """Forget what is only kept in memory for the next level of the same layer."""
        self._h.clear()
        self._factors.clear()

    def packed(self, levels: Iterable[tuple[Layer, LayerChoice]], limit: int) -> dict[str, bytes]:
        """Files of these levels' solutions and of all that was used, up to `limit` bytes: see `Cache.pack`."""
        known = ((layer, choice) for layer, choice in levels if self.knows(layer))
        keys = [_level_key(self._key(layer), choice) for layer, choice in known]
        return {} if self._cache is None else self._cache.pack(keys, limit)

    def narrowed(self, layer: Layer, part: Slice) -> tuple[Layer, Tensor, Tensor]:
        """The layer, weight and statistics when only `part` of this one stays.

        The weight is fitted by least squares to the inputs that stay. The layer must have usable statistics.
        """
        weight, h = self._state[layer.weight], self.statistics(layer)
        assert h is not None, "only layers that the database knows can be narrowed"
        if part.rows is not None:
            rows = torch.tensor(part.rows)
            weight = weight[rows]
            h = h[rows] if layer.groups > 1 else h  # depthwise: no other grouped layer loses channels
        if part.inputs is not None and h.ndim == 1:
            weight = weight[:, torch.tensor(part.inputs)]
        elif part.inputs is not None:
            kept = columns_of(layer.shape, torch.tensor(part.inputs)).flatten()
            fitted = refit(weight.flatten(1), h[0], kept)
            weight = fitted.to(weight.dtype).reshape(len(weight), len(part.inputs), *layer.shape[2:])
            h = h[:, kept][:, :, kept]
        groups = layer.groups if part.rows is None else len(h) if h.ndim == 3 else 1
        return replace(layer, shape=tuple(weight.shape), groups=groups), weight, h

    def beside(self, state: Mapping[str, Tensor], h: Mapping[str, Tensor]) -> LayerDatabase:
        """A database of other tensors with the same folder."""
        return LayerDatabase(state, h, self._cache)

    def channel_ranks(self, readers: Sequence[tuple[Layer, Member]]) -> Tensor:
        """Rank (channels,) of each channel of a group: the k of highest rank cost its `readers` least to be left with.

        Readers without usable statistics see all inputs alike and unrelated.
        """
        found = []
        for layer, member in readers:
            rows, h = self._state[layer.weight].flatten(1), self.statistics(layer)
            index = torch.tensor(member.index)  # (channels, per channel)
            found.append(Reader(rows, torch.eye(rows.shape[1]) if h is None else h[0], columns_of(layer.shape, index)))
        key = f"channels-{digest(VERSION, *(part for r in found for part in (r.rows, r.h, r.columns)))}"
        entry = None if self._cache is None else self._cache.read(key)
        if entry is not None and self._cache is not None:
            ranks = entry.get("ranks")
            if ranks is not None and ranks.dtype == torch.int32 and ranks.ndim == 1 and _is_order(ranks):
                return ranks
            self._cache.refuse(key, "it is no order of these channels")
        ranks = removal_ranks(found).int()
        self._write(key, {"ranks": ranks})
        return ranks

    def error(self, layer: Layer, stored: Stored) -> float:
        """Share of the layer's outputs on calibration data that `stored` loses: tr(E H E^T) / tr(W H W^T).

        E is its difference from the dense weight W. Rows of an embedding count as often as they are looked up; without
        statistics all weights count alike. 0 for a weight that is all zeros.
        """
        weight = self._state[layer.weight].float()
        if layer.name not in self._powers:
            self._powers[layer.name] = self._power(layer, weight)
        power = self._powers[layer.name]
        gap = stored.dense()
        gap = gap.sub_(weight) if isinstance(stored, Quantised) else gap - weight
        return self._power(layer, gap) / power if power > 0 else 0.0

    def error_of(self, layer: Layer, choice: LayerChoice) -> float:
        """`error` of `solve(layer, choice)`, remembered with the solution."""
        if (layer.name, choice) not in self._errors:
            stored = self.solve(layer, choice)
            if (layer.name, choice) not in self._errors:
                self._errors[layer.name, choice] = self.error(layer, stored)
        return self._errors[layer.name, choice]

    def _power(self, layer: Layer, weight: Tensor) -> float:
        """tr(W H W^T), in single precision but for the last sum."""
        h, rows = self.statistics(layer), weight.flatten(1)
        if h is None or h.ndim == 1:
            weighs = torch.ones(1).expand(len(rows)) if h is None else h
            some = (
                (part.square() * weighs[start:end, None]).sum(dtype=torch.float64) for start, end, part in parts(rows)
            )
            return math.fsum(map(float, some))
        return max(0.0, float((times(rows, h) * rows).sum(dtype=torch.float64)))

    def statistics(self, layer: Layer) -> Tensor | None:
        """Normalised H (groups, d, d) float32, an embedding's frequencies (rows,), or None."""
        if layer.name not in self._h:
            given = self._given.get(layer.name)
            self._h[layer.name] = None if given is None else _normalised(layer.name, given)
            if given is not None and given.numel() > LARGE_STATISTICS:
                trim()
            while sum(h.nbytes for h in self._h.values() if h is not None) > STATISTICS_BYTES and len(self._h) > 1:
                self._h.popitem(last=False)
        self._h.move_to_end(layer.name)
        return self._h[layer.name]

    def _solved(self, layer: Layer, h: Tensor, choice: LayerChoice) -> dict[str, Tensor]:
        rows = self._state[layer.weight].flatten(1).float()
        mask = self._mask(layer, rows, h, choice.zeros(rows.numel()))
        at_once = 1 if 4 * rows.numel() * rows.shape[1] <= ROWWISE_BYTES else layer.groups
        parts = [
            solve(some, _matrix(part), on, choice, self._factor(layer, index, part) if choice.bits < 16 else None)
            for index, (some, part, on) in enumerate(
                zip(rows.chunk(at_once), h.chunk(at_once), mask.chunk(at_once), strict=True)
            )
        ]
        values = torch.cat([part for part, _ in parts]).reshape(layer.shape)
        grids = [grid for _, grid in parts if grid is not None]
        if not grids:
            return _entry(values, None, mask, choice)
        scale, zero = torch.cat([grid.scale for grid in grids]), torch.cat([grid.zero for grid in grids])
        return _entry(values, replace(grids[0], scale=scale, zero=zero), mask, choice)

    def _factor(self, layer: Layer, index: int, h: Tensor) -> Factor:
        key = layer.name, index
        if key not in self._factors:
            self._factors[key] = factorise(_matrix(h))
            if h.numel() > LARGE_STATISTICS:
                trim()
            while sum(4 * f.lower.numel() for f in self._factors.values()) > FACTOR_BYTES and len(self._factors) > 1:
                self._factors.popitem(last=False)
        self._factors.move_to_end(key)
        return self._factors[key]

    def _mask(self, layer: Layer, rows: Tensor, h: Tensor, zeros: int) -> Tensor:
        if zeros == 0:
            return torch.ones_like(rows, dtype=torch.bool)
        if layer.name not in self._ranks:
            self._ranks[layer.name] = self._order(layer, rows, h)
        return self._ranks[layer.name] >= zeros

    def _order(self, layer: Layer, rows: Tensor, h: Tensor) -> Tensor:
        key = f"order-{self._key(layer)}"
        entry = None if self._cache is None else self._cache.read(key)
        if entry is not None and self._cache is not None:
            ranks = entry.get("ranks")
            if ranks is not None and ranks.dtype == torch.int32 and ranks.shape == rows.shape and _is_order(ranks):
                return ranks
            self._cache.refuse(key, "it is no order of this layer's weights")
        ranks = removal_order(rows, _matrix(h)).int()
        self._write(key, {"ranks": ranks})
        return ranks

    def _key(self, layer: Layer) -> str:
        """Stands for all that decides this layer's order and, with the choice, its solutions."""
        if layer.name not in self._keys:
            weight = self._state[layer.weight]
            self._keys[layer.name] = digest(VERSION, weight, self.statistics(layer), layer.groups, layer.kind)
        return self._keys[layer.name]

    def _read(self, key: str, layer: Layer, choice: LayerChoice) -> Stored | None:
        entry = None if self._cache is None else self._cache.read(key)
        if entry is None or self._cache is None:
            return None
        try:
            stored = _stored(entry, layer, choice)
            self._errors[layer.name, choice] = float(_checked(entry, "error", torch.float64, (1,)))
        except ValueError as error:
            self._cache.refuse(key, str(error))
            return None
        return stored

    def _write(self, key: str, entry: Entry) -> None:
        if self._cache is not None:
            self._cache.write(key, entry)


def columns_of(shape: Shape, inputs: Tensor) -> Tensor:
    """Columns of a weight's rows that belong to input channels: (..., n) to (..., n * kernel positions)."""
    size = prod(shape[2:])
    return (inputs.unsqueeze(-1) * size + torch.arange(size)).flatten(-2)


def _matrix(h: Tensor) -> Tensor:
    """H (d, d) of a single group, else (groups, d, d)."""
    return h[0] if len(h) == 1 else h


def _is_order(ranks: Tensor) -> bool:
    flat = ranks.flatten().long()
    inside = int(flat.min()) >= 0 and int(flat.max()) < flat.numel()
    return inside and bool((flat.bincount(minlength=flat.numel()) == 1).all())


def _by_frequency(layer: Layer, weight: Tensor, frequency: Tensor, choice: LayerChoice) -> Stored:
    """An embedding: what a row loses counts as often as it is looked up (rows,), and no other can make up for it.

    The least frequency * w^2 go. One row has one grid, so frequencies do not matter for it: scale and codes in turn.
    """
    mask, zeros = torch.ones_like(weight, dtype=torch.bool), choice.zeros(weight.numel())
    if zeros:
        mask = ranked((weight.double().square() * frequency[:, None]).flatten()).reshape(weight.shape) >= zeros
    if choice.bits >= 16:
        return quantise(weight, choice, mask if zeros else None)
    kept = weight.float() * mask if zeros else weight.float()
    grid = grid_of(kept, choice)
    settled = [
        _settled(part, mask[start:end], replace(grid, scale=grid.scale[start:end], zero=grid.zero[start:end]))
        for start, end, part in parts(kept)
    ]
    codes, scale = (torch.cat(values) for values in zip(*settled, strict=True))
    return _stored(_entry(codes, replace(grid, scale=scale), mask, choice), layer, choice)


def _settled(rows: Tensor, mask: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes (out, n) uint8 and scale (out,) of rows whose weights are independent, each the best for the other."""
    for _ in range(REFITS):
        codes = torch.where(mask, grid.encode(rows), grid.zero[:, None])
        grid = refit_scale(codes, rows, None, grid)
    return torch.where(mask, grid.encode(rows), grid.zero[:, None]).to(torch.uint8), grid.scale
