"""The default controller: a knapsack over the profile's levels, and a surrogate that learns from every evaluation.

Starts with the solver's policies for budgets along the front. Then alternates between solving for losses that are
sampled from the surrogate (Thompson sampling) and changing members of the front. Every proposal fits bytes and
multiply-accumulates by construction. Measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from autocompress.controllers.knapsack import Instance, Menu, efficient, greedy, prepare, solve
from autocompress.controllers.optuna_samplers import OptunaController, Predict, mix
from autocompress.controllers.surrogate import Floats, Ints, Surrogate
from autocompress.controllers.widths import Widths
from autocompress.policy import Policy
from autocompress.profile import LayerProfile, Profile
from autocompress.space import Categorical, Space, Value, section_bytes
from autocompress.trial import Budget, Evaluation

SEEDS = 8
"""Policies of the plain solver that come first, spread along the front from the budget down."""
SEED_ROUNDS = 4
HEADER_SLACK = 512
"""Bytes by which a file's header may come out shorter than that of the smallest policy."""
TRIES = 12
"""Proposals that are drawn before one that was evaluated already is returned."""
FITS = 4
"""Random models of new widths whose exact size is asked for, for one proposal: fitting each may take seconds."""
AT_BUDGET = 0.4
"""Share of the proposals aimed at the budget itself: that is what the user asked for."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A proposal: a level per layer (indices into the menus), a ratio index per group, values of the categoricals."""

    levels: tuple[int, ...]
    keep: tuple[int, ...]
    rest: tuple[tuple[str, Value], ...]


class SolverController(OptunaController):
    """See the module. Baselines are not proposed: the plain solver's policies are where it starts."""

    def __init__(
        self,
        space: Space,
        budget: Budget,
        predict: Predict,
        seed: int,
        profile: Profile,
        times: Callable[[Policy], float] | None = None,
    ) -> None:
        """`profile` must name every layer of `space`; `times` predicts a policy's milliseconds."""
        super().__init__("tpe", space, budget, predict, seed)
        self._baselines.clear()
        known = {layer.name: layer for layer in profile.layers}
        self._names = list(space.bits)
        self._layers = {layer.name: layer for layer in space.graph.layers}
        self._menus = [_Levels.of(known[name], space) for name in self._names]
        self._widths = Widths(space, budget, group_losses(space, profile), times)
        self._groups, self._whole = self._widths.groups, self._widths.whole
        self._rest = {p.name: p.values for p in space.policy_parameters if isinstance(p, Categorical)}
        self._usual = tuple((name, space.preferred(name)) for name in self._rest)
        self._menus_at = lru_cache(maxsize=64)(self._make_menus)
        self._instance = lru_cache(maxsize=64)(self._make_instance)
        self._surrogate = Surrogate(self._instance(self._whole)[0].losses)
        self._seen: set[str] = set()
        self._fits = lru_cache(maxsize=1024)(self._fitted)  # until something is learned, which it depends on
        self._front: list[tuple[int, float, Choice]] = []  # bytes, loss, choice; rising bytes, falling loss
        self._range = self._targets()

    # --- the problem ---

    def _make_menus(self, keep: tuple[int, ...]) -> list[Menu]:
        """What each layer's levels cost and lose when groups have the ratios `keep`."""
        point = {f"keep/{name}": index for name, index in zip(self._groups, keep, strict=True)}
        shapes = None if keep == self._whole else self._space.graph.shapes(self._space.decode(point))
        return [
            Menu(
                np.array(levels.costs if shapes is None else self._shaped(name, levels, shapes), dtype=np.int64),
                np.array(levels.losses),
            )
            for name, levels in zip(self._names, self._menus, strict=True)
        ]

    def _make_instance(self, keep: tuple[int, ...]) -> tuple[Instance, int]:
        """The knapsack of these menus, and the bytes of everything that is in no menu."""
        menus, cheapest = self._menus_at(keep), Choice(tuple(0 for _ in self._menus), keep, self._usual)
        file = self._predict(self._policy(cheapest)).bytes
        return prepare(menus), file - sum(int(menu.costs[0]) for menu in menus)

    def _shaped(self, name: str, levels: _Levels, shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
        """Bytes of each level once channels are gone; arithmetic, so never too few."""
        layer = self._layers[name]
        shape = shapes[layer.weight]
        if shape == layer.shape:
            return levels.costs
        return [  # by what sections of packed files would shrink: other files' parts do about alike
            math.ceil(size * section_bytes(layer, shape, choice) / section_bytes(layer, layer.shape, choice))
            for choice, size in zip(levels.choices, levels.costs, strict=True)
        ]

    def _targets(self) -> tuple[int, int]:
        """Least and largest number of bytes that proposals aim at: the smallest file, and the budget."""
        instance, fixed = self._instance(self._whole)
        costs = np.where(np.isinf(instance.losses), np.nan, instance.costs[0])
        low = int(fixed + np.nanmin(costs, axis=1).sum())
        high = int(fixed + np.nanmax(costs, axis=1).sum())
        limit = self._budget.bytes if self._budget.bytes is not None else high
        return min(low, limit), min(high, limit)

    def _policy(self, choice: Choice) -> Policy:
        return self._space.decode(self._point(choice))

    def _point(self, choice: Choice) -> dict[str, Value]:
        point: dict[str, Value] = dict(choice.rest)
        for name, levels, k in zip(self._names, self._menus, choice.levels, strict=True):
            point[f"bits/{name}"], point[f"sparsity/{name}"] = levels.indices[k]
        return point | {f"keep/{name}": i for name, i in zip(self._groups, choice.keep, strict=True)}

    # --- proposing ---

    def _needs_no_sampler(self, policy: Policy) -> bool:  # noqa: ARG002
        return True

    def _propose(self, number: int) -> Policy:
        """A policy that was not evaluated before, if one can be found."""
        draw = np.random.default_rng(mix(self._seed, number))
        policy = None
        for attempt in range(TRIES):
            choice = self._candidate(number, attempt, draw)
            policy = self._fits(choice) if choice is not None else None
            if policy is not None and not self._is_known(policy):
                return policy
        return self._anything(number) or policy or self._space.smallest()

    def _is_known(self, policy: Policy) -> bool:
        """Whether it was evaluated, or will be."""
        return policy.key() in self._seen or policy.key() in self._waiting

    def _candidate(self, number: int, attempt: int, draw: np.random.Generator) -> Choice | None:
        if number < SEEDS and not attempt:
            return self._first(number)
        if (number + attempt) % 2 and self._front:
            return self._mutated(draw)
        sampled = self._surrogate.sample(draw)
        keep = self._keep(draw)
        return self._solved(keep, self._target(draw), sampled)

    def _seed_target(self, number: int) -> int:
        """The budget first, then the middle of the front, and so on, evenly in log bytes (van der Corput).

        Of two halves the smaller sizes come first: there the front falls, so there a point is worth more.
        """
        low, high = self._range
        share, place, n = 0.0, 0.5, number
        while n:
            share, place, n = share + place * (n & 1), place / 2, n >> 1
        share = 1 - share if number else 0.0
        return int(high * (low / high) ** share)

    def _target(self, draw: np.random.Generator) -> int:
        """Bytes to aim at: the budget, or inside the gap of the front that holds most hypervolume.

        Evenly in log bytes while little is known: many workers ask before the first is told.
        """
        low, high = self._range
        if draw.random() < AT_BUDGET:
            return high
        if len(self._front) < 2:
            return int(min(high, max(low, math.exp(draw.uniform(math.log(low), math.log(high))))))
        sizes = np.log([low, *(size for size, _, _ in self._front), high])
        losses = np.array([loss for _, loss, _ in self._front])
        drops = np.maximum(-np.diff(losses, prepend=losses[0] * 1.5, append=losses[-1] * 0.9), 1e-12)
        gaps = np.maximum(np.diff(sizes), 1e-6) * drops
        i = int(draw.choice(len(gaps), p=gaps / gaps.sum()))
        return int(min(high, max(low, math.exp(draw.uniform(sizes[i], max(sizes[i], sizes[i + 1]))))))

    def _first(self, number: int) -> Choice | None:
        """The exact knapsack's answer; repeated with what the file really leaves, since its header varies."""
        target, keep = self._seed_target(number), self._keep(None)
        if keep is None:
            return None
        _, fixed = self._instance(keep)
        table = solve(self._menus_at(keep), max(0, target - fixed) + HEADER_SLACK)
        capacity, best = target - fixed, None
        for _ in range(SEED_ROUNDS):
            found = table.choose(min(capacity, target - fixed + HEADER_SLACK)) if capacity >= 0 else None
            if found is None:
                break
            choice = Choice(found.levels, keep, self._usual)
            left = target - self._predict(self._policy(choice)).bytes
            if left >= 0 and (best is None or found.loss < best[0]):
                best = found.loss, choice
            if left == 0:
                break
            capacity = found.cost + left
        return best[1] if best is not None else self._solved(keep, target, None)

    def _solved(self, keep: tuple[int, ...] | None, target: int, losses: Floats | None) -> Choice | None:
        """A knapsack within about `target` bytes, fast, for the `losses` (layers, levels) or the profile's."""
        if keep is None:
            return None
        instance, fixed = self._instance(keep)
        if losses is not None:
            instance = instance.with_losses(losses)
        found = greedy(instance, target - fixed) if target >= fixed else None
        return None if found is None else Choice(found.levels, keep, self._usual)

    def _mutated(self, draw: np.random.Generator) -> Choice | None:
        """A front member with one or two layers (or, rarely, a group or a categorical) changed, and room made for it.

        The member is drawn like a target, its size stays about the same: a swap.
        """
        target = self._target(draw)
        size, _, parent = min(self._front, key=lambda member: abs(math.log(member[0] / target)))
        target, keep, rest = max(size, target), parent.keep, parent.rest
        if self._rest and draw.random() < 0.1:
            rest = self._flipped(rest, draw)
        if self._widths.limited and draw.random() < 0.5:
            keep = self._widths.moved(keep, draw, self._wide(rest))
        instance, fixed = self._instance(keep)
        levels = np.array(parent.levels)
        changed = draw.choice(len(levels), size=min(len(levels), 1 + int(draw.integers(2))), replace=False)
        for i in changed:
            step = int(draw.integers(1, 3)) * (1 if draw.random() < 0.5 else -1)
            levels[i] = min(max(levels[i] + step, 0), len(self._menus[i].costs) - 1)
        settled = self._settle(instance, levels, target - fixed, set(changed.tolist()))
        return None if settled is None else Choice(tuple(settled.tolist()), keep, rest)

    def _settle(self, instance: Instance, levels: Ints, capacity: int, pinned: set[int]) -> Ints | None:
        """`levels` with the `pinned` layers held: the rest goes down where it costs least, then up."""
        losses, costs = self._surrogate.mean(), instance.costs[0]
        layers = np.arange(len(levels))
        free = np.array([i not in pinned for i in layers])
        counts = np.array([len(m.costs) for m in self._menus])
        spent = float(costs[layers, levels].sum())
        while spent > capacity:
            down = free & (levels > 0)
            if not down.any():
                return None
            below = np.maximum(levels - 1, 0)
            saved = costs[layers, levels] - costs[layers, below]
            price = np.where(
                down & (saved > 0), (losses[layers, below] - losses[layers, levels]) / np.maximum(saved, 1), np.inf
            )
            i = int(price.argmin())
            if not np.isfinite(price[i]):
                free &= ~down
                continue
            spent -= saved[i]
            levels[i] -= 1
        while True:
            above = np.minimum(levels + 1, counts - 1)
            extra = costs[layers, above] - costs[layers, levels]
            gain = losses[layers, levels] - losses[layers, above]
            fits = free & (above > levels) & (spent + extra <= capacity) & (gain > 0)
            if not fits.any():
                return levels
            i = int(np.where(fits, gain / np.maximum(extra, 1), -np.inf).argmax())
            spent += extra[i]
            levels[i] += 1

    def _flipped(self, rest: tuple[tuple[str, Value], ...], draw: np.random.Generator) -> tuple[tuple[str, Value], ...]:
        names = list(self._rest)
        name = names[int(draw.integers(len(names)))]
        others = [value for value in self._rest[name] if value != dict(rest)[name]]
        return tuple((n, others[int(draw.integers(len(others)))] if n == name else v) for n, v in rest)

    def _fitted(self, choice: Choice) -> Policy | None:
        """The policy of `choice`; with less room if its file is over the budget after all, since headers vary."""
        policy = self._policy(choice)
        for _ in range(4):
            known = self._predict(policy)
            excess = known.bytes - (math.inf if self._budget.bytes is None else self._budget.bytes)
            if excess <= 0:
                return policy if self._budget.static().excess(known) <= 0 else None
            instance, _ = self._instance(choice.keep)
            levels = np.array(choice.levels)
            room = int(instance.costs[0][np.arange(len(levels)), levels].sum() - excess)
            settled = self._settle(instance, levels, room, set())
            if settled is None:
                return None
            choice = Choice(tuple(settled.tolist()), choice.keep, choice.rest)
            policy = self._policy(choice)
        return None

    def _anything(self, number: int) -> Policy | None:
        """A random policy that fits and is new: what is left when the front has no new neighbours."""
        draw, fits = np.random.default_rng(mix(self._seed + 1, number)), 0
        for _ in range(10 * TRIES):
            levels = tuple(int(draw.integers(len(m.costs))) for m in self._menus)
            keep = tuple(int(draw.integers(n + 1)) for n in self._whole)
            rest = tuple((name, values[int(draw.integers(len(values)))]) for name, values in self._rest.items())
            if self._too_large(levels, keep):
                continue
            policy = self._policy(Choice(levels, keep, rest))
            if self._too_slow(policy) or self._is_known(policy):
                continue
            if self._excess(policy) <= 0:
                return policy
            fits += keep != self._whole
            if fits >= FITS:
                return None
        return None

    def _too_large(self, levels: tuple[int, ...], keep: tuple[int, ...]) -> bool:
        """Whether the layers alone are over the bytes."""
        menus = zip(self._menus_at(keep), levels, strict=True)
        return self._budget.bytes is not None and sum(int(m.costs[k]) for m, k in menus) > self._budget.bytes

    def _too_slow(self, policy: Policy) -> bool:
        """Whether the multiply-accumulates are over their limit."""
        return self._budget.macs is not None and self._space.graph.macs(policy) > self._budget.macs

    def _wide(self, rest: tuple[tuple[str, Value], ...]) -> int:
        """The width of the activations when the categoricals are `rest`."""
        return int(dict(rest).get("activations", self._space.preferred("activations")))

    def _keep(self, draw: np.random.Generator | None) -> tuple[int, ...] | None:
        """Widths within the limits on multiply-accumulates and time; None if there are none."""
        return self._widths.choose(draw, self._wide(self._usual))

    # --- learning ---

    def _learn(self, evaluation: Evaluation) -> None:
        """A one-shot policy's first measurement; later ones of the same policy saw other inputs."""
        key = evaluation.policy.key()
        measured = evaluation.measurement
        if evaluation.rung or key in self._seen:
            return
        self._seen.add(key)
        if evaluation.status != "ok" or measured is None or not math.isfinite(measured.loss):
            return
        self._widths.learn(evaluation.policy, measured.macs, measured.latency_ms)
        choice = self._choice(evaluation.policy)
        if choice is None:
            return
        if choice.keep == self._whole and choice.rest == self._usual:
            self._surrogate.observe(np.array(choice.levels), measured.loss)
            self._fits.cache_clear()
        if self._budget.excess(measured) <= 0:
            self._enter(measured.bytes, measured.loss, choice)

    def _enter(self, size: int, loss: float, choice: Choice) -> None:
        if any(s <= size and x <= loss for s, x, _ in self._front):
            return
        rest = [m for m in self._front if not (size <= m[0] and loss <= m[1])]
        self._front = sorted([*rest, (size, loss, choice)], key=lambda m: m[0])

    def _choice(self, policy: Policy) -> Choice | None:
        """The proposal that leads to `policy`; None if it is not made of the menus' levels."""
        point = self._space.encode(policy)
        levels = []
        for name, menu in zip(self._names, self._menus, strict=True):
            pair = (point.get(f"bits/{name}", 0), point.get(f"sparsity/{name}", 0))
            if pair not in menu.places:
                return None
            levels.append(menu.places[pair])
        keep = tuple(int(point.get(f"keep/{n}", whole)) for n, whole in zip(self._groups, self._whole, strict=True))
        return Choice(tuple(levels), keep, tuple((name, point[name]) for name in self._rest))


@dataclass(frozen=True)
class _Levels:
    """A layer's levels that nothing beats in both bytes and error, cheapest first. `indices` are (bits, sparsity)."""

    choices: list[Any]
    indices: list[tuple[int, int]]
    costs: list[int]
    losses: list[float]
    places: dict[tuple[Value, Value], int]

    @classmethod
    def of(cls, layer: LayerProfile, space: Space) -> _Levels:
        """Of a measured layer."""
        losses = layer.losses()
        costs = [level.bytes for level in layer.levels]
        kept = efficient(Menu(np.array(costs, dtype=np.int64), np.array(losses)))
        bits, zeros = space.bits[layer.name], space.sparsity[layer.name]
        choices = [layer.levels[i].choice for i in kept]
        indices = [(bits.index(c.bits), zeros.index(c.sparsity)) for c in choices]
        places: dict[tuple[Value, Value], int] = {pair: k for k, pair in enumerate(indices)}
        return cls(choices, indices, [costs[i] for i in kept], [losses[i] for i in kept], places)


def group_losses(space: Space, profile: Profile) -> dict[str, list[float]]:
    """Predicted loss of each keep ratio of each group; 0 for groups that were not measured."""
    measured: dict[str, dict[float, float]] = {}
    for group in profile.groups:
        measured.setdefault(group.name, {})[group.keep] = group.loss
    return {name: _width_losses(ratios, measured.get(name, {})) for name, ratios in space.keep.items()}


def _width_losses(ratios: Sequence[float], measured: Mapping[float, float]) -> list[float]:
    """A power law in the share that goes between two measured widths, a quadratic beyond; rising as they go.

    A removed group is fitted otherwise than a narrow one, so its loss is what was measured, and may be the lesser one.
    """
    if ratios and ratios[0] == 0:
        return [measured.get(0.0, 0.0), *_width_losses(ratios[1:], measured)]
    points = sorted((math.log(1 - keep), math.log(max(loss, 1e-9))) for keep, loss in measured.items() if 0 < keep < 1)
    if not points:
        return [0.0] * len(ratios)
    (low, first), (high, last) = points[0], points[-1]
    points = [(low - 1, first - 2), *points, (high + 1, last + 2)]
    gone, losses = np.array(points).T
    found = [0.0 if r == 1 else math.exp(float(np.interp(math.log(1 - r), gone, losses))) for r in ratios]
    return [max(found[i:]) for i in range(len(found))]
