"""A search problem without tensors: sixty convolutions whose levels cost analytic loss, with pairwise interactions.

`Synthetic` answers what a search asks of an evaluator, in microseconds: exact bytes, a loss that is not additive, and
what a profile is measured with. Shared by the benchmarks.
"""

from __future__ import annotations

import math
from math import prod

import numpy as np

from autocompress.graph import Graph, Layer
from autocompress.measure.size import Size
from autocompress.policy import LayerChoice, Policy
from autocompress.profile import Level
from autocompress.space import Space, parse_space, section_bytes
from autocompress.trial import Evaluation, Measurement

SPACE = """
[layers]
bits = [2, 3, 4, 6, 8]
sparsity = [0.0, 0.2, 0.4, 0.6, 0.8]
"""
NOISE = 0.01
"""Relative standard deviation of a measured loss, fixed for a policy."""


class Synthetic:
    """A chain of `count` convolutions; seeds give other widths, sensitivities and interactions."""

    def __init__(self, count: int = 60, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        widths = [int(16 * 2 ** draw.integers(0, 4)) for _ in range(count + 1)]
        shapes = [(widths[i + 1], widths[i], 3, 3) for i in range(count)]
        layers = tuple(Layer(f"conv{i}", "conv2d", shape, positions=64) for i, shape in enumerate(shapes))
        tensors = {layer.weight: (layer.shape, "float32") for layer in layers}
        self.graph = Graph(layers, (), tensors, 4 * sum(prod(shape) for shape in shapes))
        self.space = Space(parse_space(SPACE, "synthetic"), self.graph)
        self._size = Size(self.graph, "synthetic", "quality")
        self._sensitivity = draw.lognormal(-1.0, 1.0, count)
        self._curve = draw.lognormal(0.0, 0.3, (count, 2))
        near = [(i, i + 1) for i in range(count - 1)]
        far = [tuple(sorted(draw.choice(count, 2, replace=False))) for _ in range(count // 2)]
        self._pairs = np.array(near + far)
        self._coupling = draw.normal(0.15, 0.3, len(self._pairs))

    def error(self, index: int, choice: LayerChoice) -> float:
        """What a level loses: rounding falls by four a bit, pruning rises with the cube of the zeros."""
        rounding, pruning = self._curve[index]
        return float(rounding * 4.0**-choice.bits * (1 - choice.sparsity) + 0.3 * pruning * choice.sparsity**3)

    def level(self, layer: Layer, choice: LayerChoice, solver: str) -> Level:  # noqa: ARG002
        """Bytes and error of one layer's choice."""
        index = int(layer.name.removeprefix("conv"))
        return Level(choice, section_bytes(layer, layer.shape, choice), self.error(index, choice))

    def loss(self, policy: Policy) -> float:
        """Additive, plus what pairs of layers lose together or save, plus fixed noise."""
        choices = [policy.layers.get(layer.name) for layer in self.graph.layers]
        errors = np.array([0.0 if c is None else self.error(i, c) for i, c in enumerate(choices)])
        alone = self._sensitivity * errors
        pairs = np.sqrt(alone[self._pairs[:, 0]] * alone[self._pairs[:, 1]])
        total = max(1e-6, float(alone.sum() + (self._coupling * pairs).sum()))
        noise = np.random.default_rng(int(policy.key(), 16) % 2**63).normal(0.0, NOISE)
        return total * math.exp(noise)

    def predict(self, policy: Policy) -> Measurement:
        """Exact bytes."""
        return Measurement(self._size(policy), self.graph.macs(policy))

    def __call__(self, policy: Policy) -> Evaluation:
        """The measurement; quality falls from 1 with the loss."""
        loss, known = self.loss(policy), self.predict(policy)
        return Evaluation(policy, 0, 0, "ok", Measurement(known.bytes, known.macs, math.exp(-loss), loss, 1.0))
