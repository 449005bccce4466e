import torch
import torch.nn.functional as F
from graph_checks import Net, check, conv, group, images, pool, prunable, readers, settle
from torch import Tensor, nn

from autocompress.tasks.digits import Residual


def plain_shortcut(net: Net, x: Tensor) -> Tensor:
    x = F.relu(net.stem(x))
    y = net.second(F.relu(net.norm(net.first(x))))
    return net.head(pool(F.relu(x + y)))


def projected_shortcut(net: Net, x: Tensor) -> Tensor:
    x = F.relu(net.stem(x))
    y = net.second(F.relu(net.first(x)))
    return net.head(pool(F.relu(net.project(x) + y)))


def squeeze_and_excite(net: Net, x: Tensor) -> Tensor:
    x = F.relu(net.stem(x))
    gate = torch.sigmoid(net.up(F.relu(net.down(x.mean(dim=(2, 3), keepdim=True)))))
    return net.head(pool(F.relu(net.last(x * gate))))


def with_plain_shortcut() -> nn.Module:
    layers = {"stem": conv(3, 8), "first": conv(8, 6, bias=False), "norm": nn.BatchNorm2d(6), "second": conv(6, 8)}
    return settle(Net(plain_shortcut, **layers, head=nn.Linear(8, 5)))


def with_projection() -> nn.Module:
    layers = {"stem": conv(3, 8), "first": conv(8, 6), "second": conv(6, 10), "project": conv(8, 10, 1)}
    return settle(Net(projected_shortcut, **layers, head=nn.Linear(10, 5)))


def test_a_plain_shortcut_ties_the_stream_together() -> None:
    graph = check(with_plain_shortcut(), images())
    assert prunable(graph) == {"stem", "first", "second"}
    assert group(graph, "stem") == group(graph, "second")
    assert readers(group(graph, "stem")) == {"first.weight", "head.weight"}


def test_inside_the_block_the_width_is_free() -> None:
    graph = check(with_plain_shortcut(), images())
    inner = group(graph, "first")
    assert inner.channels == 6
    assert {m.tensor for m in inner.members if m.dim == 0} == {
        "first.weight",
        *(f"norm.{key}" for key in ("weight", "bias", "running_mean", "running_var")),
    }
    assert readers(inner) == {"second.weight"}


def test_a_projection_separates_the_widths_before_and_after() -> None:
    graph = check(with_projection(), images())
    assert prunable(graph) == {"stem", "first", "second", "project"}
    assert group(graph, "project") == group(graph, "second") != group(graph, "stem")
    assert readers(group(graph, "stem")) == {"first.weight", "project.weight"}


def test_the_output_layer_is_frozen_because_nothing_reads_it() -> None:
    graph = check(with_projection(), images())
    assert group(graph, "head").frozen == "no layer reads its channels: they are the model's output"


def test_a_gate_is_pruned_with_the_channels_it_gates() -> None:
    layers = {"stem": conv(3, 8), "down": conv(8, 4, 1), "up": conv(4, 8, 1), "last": conv(8, 6)}
    graph = check(settle(Net(squeeze_and_excite, **layers, head=nn.Linear(6, 5))), images())
    assert prunable(graph) == {"stem", "down", "up", "last"}
    assert group(graph, "stem") == group(graph, "up")
    assert readers(group(graph, "stem")) == {"down.weight", "last.weight"}


def test_stages_with_stride_and_projection_prune_at_every_ratio() -> None:
    stages = nn.Sequential(conv(3, 8), Residual(8, 8, 1), Residual(8, 12, 2))
    model = settle(nn.Sequential(stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)))
    for ratio in (0.1, 0.5, 0.9):
        graph = check(model, images(), ratio)
        assert len(graph.prunable) == 4


def test_a_layer_that_is_called_for_the_block_and_for_the_shortcut_is_frozen() -> None:
    model = settle(
        Net(
            lambda net, x: net.head(pool(net.stem(x) + net.last(F.relu(net.stem(x))))),
            stem=conv(3, 8),
            last=conv(8, 8),
            head=nn.Linear(8, 5),
        )
    )
    graph = check(model, images())
    assert group(graph, "stem").frozen == "stem is used 2 times in one forward pass"
