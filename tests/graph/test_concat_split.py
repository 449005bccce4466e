import pytest
import torch
import torch.nn.functional as F
from graph_checks import Net, check, conv, group, images, pool, prunable, readers, settle
from torch import Tensor, nn


def dense_block(net: Net, x: Tensor) -> Tensor:
    x = net.stem(x)
    x = torch.cat([x, net.first(F.relu(net.norm1(x)))], dim=1)
    x = torch.cat([x, net.second(F.relu(net.norm2(x)))], dim=1)
    return net.head(pool(F.relu(x)))


def u_shape(net: Net, x: Tensor) -> Tensor:
    high = F.relu(net.down(x))
    low = F.relu(net.bottom(F.max_pool2d(high, 2)))
    return net.up(torch.cat([high, F.interpolate(low, scale_factor=2)], dim=1))


def test_concatenated_channels_are_removed_where_they_end_up() -> None:
    layers = {"stem": conv(3, 8), "first": conv(8, 6), "second": conv(14, 4)}
    norms = {"norm1": nn.BatchNorm2d(8), "norm2": nn.BatchNorm2d(14)}
    graph = check(settle(Net(dense_block, **layers, **norms, head=nn.Linear(18, 5))), images())
    assert prunable(graph) == {"stem", "first", "second"}
    assert readers(group(graph, "stem")) == {"first.weight", "second.weight", "head.weight"}
    assert readers(group(graph, "first")) == {"second.weight", "head.weight"}
    (at_head,) = (m for m in group(graph, "second").members if m.tensor == "head.weight")
    assert at_head.index == ((14,), (15,), (16,), (17,))


def test_a_skip_connection_across_scales_is_prunable() -> None:
    model = settle(Net(u_shape, down=conv(3, 8), bottom=conv(8, 6), up=conv(14, 2)))
    assert prunable(check(model, images())) == {"down", "bottom"}


def test_channels_that_are_concatenated_twice_leave_in_both_places() -> None:
    layers = {"stem": conv(3, 8), "last": conv(16, 6), "head": nn.Linear(6, 5)}
    model = settle(
        Net(lambda net, x: net.head(pool(F.relu(net.last(torch.cat([net.stem(x)] * 2, 1).relu())))), **layers)
    )
    graph = check(model, images())
    if not group(graph, "stem").frozen:
        (member,) = group(graph, "stem").consumers
        assert member.index == tuple((c, c + 8) for c in range(8))


@pytest.mark.parametrize("grown", [2, 5])
def test_a_concatenation_that_is_flattened_does_not_break_the_tracer(grown: int) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        return net.head(torch.cat([x, F.relu(net.first(x))], dim=1).flatten(1))

    layers = {"stem": conv(3, 2), "first": conv(2, grown), "head": nn.Linear((2 + grown) * 64, 5)}
    check(settle(Net(forward, **layers)), images())


@pytest.mark.parametrize("parts", [[4, 4], [3, 5]])
def test_split_channels_are_frozen(parts: list[int]) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        u, v = net.stem(x).split(parts, dim=1)
        return net.head(pool(F.relu(net.one(u)) + F.relu(net.two(v))))

    layers = {"stem": conv(3, 8), "one": conv(parts[0], 6), "two": conv(parts[1], 6)}
    graph = check(settle(Net(forward, **layers, head=nn.Linear(6, 5))), images())
    assert prunable(graph) == {"one", "two"}
    assert "its channels map unevenly onto" in group(graph, "stem").frozen


def test_a_gated_linear_unit_is_frozen() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        u, v = net.stem(x).chunk(2, dim=1)
        return net.head(pool(F.relu(net.last(u * torch.sigmoid(v)))))

    graph = check(settle(Net(forward, stem=conv(3, 8), last=conv(4, 6), head=nn.Linear(6, 5))), images())
    assert prunable(graph) == {"last"}
    assert "its channels map unevenly onto" in group(graph, "stem").frozen


def test_a_channel_shuffle_is_frozen() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.stem(x)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return net.head(pool(F.relu(net.last(y))))

    graph = check(settle(Net(forward, stem=conv(3, 8), last=conv(8, 6), head=nn.Linear(6, 5))), images())
    assert prunable(graph) == {"last"}
    assert group(graph, "stem").frozen


def test_a_weight_per_part_of_the_channels_is_frozen() -> None:
    """Removing every other channel leaves such a model right; removing any others does not."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.stem(x)
        n, _, h, w = y.shape
        y = (y.view(n, 2, -1, h, w) * torch.tensor([1.0, -3.0]).view(1, 2, 1, 1, 1)).flatten(1, 2)
        return net.head(pool(F.relu(net.last(y))))

    graph = check(settle(Net(forward, stem=conv(3, 8), last=conv(8, 6), head=nn.Linear(6, 5))), images())
    assert group(graph, "stem").frozen


def test_pixel_shuffle_freezes_the_layer_before_it() -> None:
    model = settle(
        Net(
            lambda net, x: net.head(pool(F.relu(net.last(F.pixel_shuffle(net.stem(x), 2))))),
            stem=conv(3, 8),
            last=conv(2, 6),
            head=nn.Linear(6, 5),
        )
    )
    graph = check(model, images())
    assert prunable(graph) == {"last"}
    assert group(graph, "stem").frozen


def test_attention_heads_are_frozen_and_its_neighbours_are_not() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        n, length, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(n, length, 2, -1).transpose(1, 2)

        y = F.scaled_dot_product_attention(heads(net.query(x)), heads(net.key(x)), heads(net.value(x)))
        return net.head(F.relu(net.out(y.transpose(1, 2).reshape(n, length, -1))).mean(dim=1))

    layers = {name: nn.Linear(8, 8) for name in ("query", "key", "value", "out")}
    graph = check(settle(Net(forward, **layers, head=nn.Linear(8, 3))), torch.randn(4, 7, 8))
    assert prunable(graph) == {"out"}
