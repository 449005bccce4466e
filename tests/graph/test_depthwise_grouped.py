import torch
import torch.nn.functional as F
from graph_checks import Net, check, conv, group, images, pool, prunable, readers, settle
from torch import Tensor, nn

from autocompress.policy import Policy


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """MobileNet's: a depthwise convolution and a 1x1 convolution, each with its norm."""
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
    pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
    return nn.Sequential(
        depthwise, nn.BatchNorm2d(inputs), nn.ReLU6(), pointwise, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True)
    )


def mobile() -> nn.Module:
    stem = nn.Sequential(conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return settle(
        nn.Sequential(stem, block(8, 12), block(12, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    )


def inverted(net: Net, x: Tensor) -> Tensor:
    x = net.stem(x)
    y = net.project(F.relu6(net.depthwise(F.relu6(net.expand(x)))))
    return net.head(pool(x + y))


def grouped(groups: int = 2, **options: int) -> nn.Module:
    middle = conv(8, options.get("outputs", 8), groups=groups)
    layers = {"stem": conv(3, 8), "middle": middle, "last": conv(options.get("outputs", 8), 6)}
    return settle(
        Net(
            lambda net, x: net.head(pool(F.relu(net.last(F.relu(net.middle(F.relu(net.stem(x)))))))),
            **layers,
            head=nn.Linear(6, 5),
        )
    )


def test_a_depthwise_layer_belongs_to_the_channels_that_pass_it() -> None:
    graph = check(mobile(), images())
    assert prunable(graph) == {"0.0", "1.0", "1.3", "2.0", "2.3"}
    assert len(graph.prunable) == 3
    assert group(graph, "0.0") == group(graph, "1.0")
    assert readers(group(graph, "1.0")) == {"1.3.weight"}


def test_a_mobile_network_prunes_to_one_channel() -> None:
    graph = check(mobile(), images(), ratio=0.01)
    policy = Policy(keep={g.name: 0.01 for g in graph.prunable})
    assert set(graph.kept(policy).values()) == {1}


def test_an_inverted_residual_has_a_stream_and_a_free_width() -> None:
    layers = {"stem": conv(3, 6), "expand": conv(6, 18, 1), "depthwise": conv(18, 18, groups=18)}
    model = settle(Net(inverted, **layers, project=conv(18, 6, 1), head=nn.Linear(6, 5)))
    graph = check(model, images())
    assert group(graph, "expand") == group(graph, "depthwise")
    assert group(graph, "stem") == group(graph, "project")
    assert len(graph.prunable) == 2


def test_channels_around_a_grouped_convolution_are_frozen() -> None:
    graph = check(grouped(), images())
    assert prunable(graph) == {"last"}
    assert group(graph, "stem").frozen == "it passes through middle (Conv2d)"
    assert [g.frozen for g in graph.groups if g.name == "middle"] == ["it passes through middle (Conv2d)"]


def test_a_grouped_convolution_is_a_compressible_layer() -> None:
    graph = check(grouped(), images())
    layer = next(layer for layer in graph.layers if layer.name == "middle")
    assert (layer.kind, layer.groups, layer.shape, layer.positions) == ("conv2d", 2, (8, 4, 3, 3), 64)


def test_a_depth_multiplier_is_traced_and_frozen() -> None:
    graph = check(grouped(groups=8, outputs=16), images())
    assert prunable(graph) == {"last"}
    assert group(graph, "stem").frozen


def test_a_depth_multiplier_before_a_norm_is_folded() -> None:
    model = settle(
        Net(
            lambda net, x: net.head(pool(F.relu(net.norm(net.middle(F.relu(net.stem(x))))))),
            stem=conv(3, 8),
            middle=conv(8, 16, groups=8, bias=False),
            norm=nn.BatchNorm2d(16),
            head=nn.Linear(16, 5),
        )
    )
    graph = check(model, images())
    assert next(layer for layer in graph.layers if layer.name == "middle").batch_norm == "norm"


def test_depthwise_convolution_of_sequences() -> None:
    layers = [nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv1d(8, 6, 1), nn.ReLU()]
    model = settle(nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3)))
    assert prunable(check(model, torch.randn(4, 4, 16))) == {"0", "1", "3"}
