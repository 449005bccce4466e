from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_checks import check, conv, settle
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from many import cases
from torch import Tensor, nn

WIDTHS = st.integers(2, 7)


class Plain(nn.Module):
    def __init__(self, inputs: int, width: int, norm: bool, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, 3, stride, 1, bias=not norm)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, inputs: int, width: int, norm: bool, projected: bool) -> None:
        super().__init__()
        self.width = width if projected else inputs
        self.first, self.second = Plain(inputs, width, norm, 1), conv(width, self.width)
        self.shortcut = conv(inputs, self.width, 1) if projected else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.second(self.first(x)))


class Depthwise(nn.Module):
    def __init__(self, inputs: int, width: int, norm: bool) -> None:
        super().__init__()
        self.each = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs)
        self.mix = Plain(inputs, width, norm, 1)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(F.relu(self.each(x)))


class Concat(nn.Module):
    def __init__(self, inputs: int, width: int, norm: bool) -> None:
        super().__init__()
        self.grow = Plain(inputs, width, norm, 1)
        self.width = inputs + width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.grow(x)], dim=1)


class Gate(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(inputs, width), nn.Linear(width, inputs)
        self.width = inputs

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean(dim=(2, 3))))))
        return x * gate[:, :, None, None]


class Split(nn.Module):
    """Two halves go two ways, and one of them is left as it is."""

    def __init__(self, inputs: int, width: int, norm: bool) -> None:
        super().__init__()
        self.widen = Plain(inputs, 2 * width, norm, 1)
        self.way = Plain(width, width, norm, 1)
        self.width = 2 * width

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.widen(x).chunk(2, dim=1)
        return torch.cat([left, self.way(right)], dim=1)


class Dense(nn.Module):
    """Each layer reads all before it."""

    def __init__(self, inputs: int, width: int, norm: bool, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Plain(inputs + i * width, width, norm, 1) for i in range(depth))
        self.width = inputs + depth * width

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return x


class Nested(nn.Module):
    """A shortcut around blocks that have shortcuts of their own."""

    def __init__(self, inputs: int, width: int, norm: bool, inner: str) -> None:
        super().__init__()
        kinds: dict[str, Any] = {
            "residual": lambda: Residual(inputs, width, norm, False),
            "depthwise": lambda: Depthwise(inputs, inputs, norm),
            "gate": lambda: Gate(inputs, width),
        }
        self.inside = nn.Sequential(kinds[inner](), Residual(inputs, width, norm, False))
        self.width = inputs

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.inside(x))


BLOCKS = st.one_of(
    st.tuples(st.just(Split), WIDTHS, st.booleans()),
    st.tuples(st.just(Dense), WIDTHS, st.booleans(), st.integers(1, 3)),
    st.tuples(st.just(Nested), WIDTHS, st.booleans(), st.sampled_from(["residual", "depthwise", "gate"])),
    st.tuples(st.just(Plain), WIDTHS, st.booleans(), st.sampled_from([1, 2])),
    st.tuples(st.just(Residual), WIDTHS, st.booleans(), st.booleans()),
    st.tuples(st.just(Depthwise), WIDTHS, st.booleans()),
    st.tuples(st.just(Concat), WIDTHS, st.booleans()),
    st.tuples(st.just(Gate), WIDTHS),
)


def network(stem: int, blocks: list[tuple[Any, ...]], flat: bool, seed: int) -> nn.Module:
    layers: list[Any] = [Plain(2, stem, True, 1)]
    size = 6
    for kind, *options in blocks:
        layers.append(kind(layers[-1].width, *options))
        size = -(-size // 2) if kind is Plain and options[-1] == 2 else size
    width = layers[-1].width
    end = nn.Identity() if flat else nn.AdaptiveAvgPool2d(1)
    return settle(nn.Sequential(*layers, end, nn.Flatten(), nn.Linear(width * (size**2 if flat else 1), 3)), seed)


@pytest.mark.slow
@settings(
    max_examples=cases(40),
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # the blocks are small enough to read, and shrinking takes minutes
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    stem=WIDTHS,
    blocks=st.lists(BLOCKS, min_size=1, max_size=3),
    flat=st.booleans(),
    ratio=st.sampled_from([0.01, 0.3, 0.5, 0.8]),
    seed=st.integers(0, 99),
)
def test_what_is_declared_prunable_is_and_sizes_are_as_predicted(
    stem: int, blocks: list[tuple[Any, ...]], flat: bool, ratio: float, seed: int
) -> None:
    model = network(stem, blocks, flat, seed)
    graph = check(model, torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(seed)), ratio, seed)
    if not any(kind in (Concat, Split, Dense) for kind, *_ in blocks):  # the tracer freezes some concatenations
        assert {g.frozen for g in graph.groups} <= {"", "no layer reads its channels: they are the model's output"}
