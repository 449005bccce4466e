"""The length of a file is known before the file is built, for any policy."""

from __future__ import annotations

import random

import pytest
import torch
from many import cases
from torch import Tensor, nn

from autocompress import ClassificationTask, LayerChoice, Policy, Recovery
from autocompress.evaluate import Evaluator
from autocompress.policy import BITS


class Network(nn.Module):
    """A shortcut, a depthwise convolution, a concatenation and a classifier, each with rows of another length."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 5, 1)
        self.each = nn.Conv2d(13, 13, 3, padding=1, groups=13)
        self.mix, self.head = nn.Conv2d(13, 12, 1), nn.Linear(12, 4)
        self.register_buffer("steps", torch.tensor([1, 2]))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.cat([x + self.left(x), self.right(x)], dim=1)
        return self.head(torch.relu(self.mix(torch.relu(self.each(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def judge() -> Evaluator:
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(48, 2, 5, 5, generator=draw), torch.randint(0, 4, (48,), generator=draw)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network()
    return Evaluator(ClassificationTask(network, data, data, data, batch_size=16), dense_ms=1.0)


def any_policy(judge: Evaluator, draw: random.Random) -> Policy:
    """Every choice at random: widths, zeros, grids, channels, solver, norms."""
    database = draw.random() < 0.7  # its solutions are kept, so the same levels come again
    zeros = (0.0, 0.5, 0.8) if database else (0.0, draw.random(), 0.9)
    layers = {
        layer.name: LayerChoice(draw.choice(BITS), draw.choice(zeros), draw.choice(("symmetric", "asymmetric")))
        for layer in judge.graph.layers
        if draw.random() < 0.9
    }
    shares = (0.5,) if database else (0.25, 0.5, draw.random())
    keep = {g.name: draw.choice(shares) for g in judge.graph.prunable if draw.random() < 0.3}
    recovery = Recovery(reestimate_bn=draw.random() < 0.5, fold_bn=draw.random() < 0.5)
    criterion = draw.choice(("l1", "l2"))
    return Policy(layers, keep, criterion, recovery, "database" if database else "nearest")


@pytest.mark.slow
def test_files_are_as_long_as_predicted(judge: Evaluator) -> None:
    draw, seen = random.Random(0), set[str]()
    while len(seen) < cases(300):
        policy = any_policy(judge, draw)
        if policy.key() in seen:
            continue
        seen.add(policy.key())
        told, most = judge.predict(policy).bytes, judge.bound(policy).bytes
        compressed, _ = judge.build(policy)
        length = len(judge.pack(compressed, 0.5))
        assert told == length <= most, policy


@pytest.mark.slow
def test_the_same_policy_gives_the_same_bytes_and_the_same_score_to_the_bit(judge: Evaluator) -> None:
    draw = random.Random(1)
    policies = [any_policy(judge, draw) for _ in range(20)]
    policies += [Policy(p.layers, p.keep, recovery=Recovery(epochs=1)) for p in policies[:5]]

    def made(policy: Policy) -> tuple[bytes, float, float]:
        compressed, model = judge.build(policy)
        quality = judge.quality(model)
        return judge.pack(compressed, quality.score), quality.score, quality.loss

    first = [made(policy) for policy in policies]
    again = [made(policy) for policy in reversed(policies)]
    assert first == again[::-1]
