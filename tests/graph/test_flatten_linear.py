import torch
import torch.nn.functional as F
from graph_checks import Net, check, conv, group, images, prunable, settle
from torch import Tensor, nn


def network(*, size: int = 8, norm: bool = False) -> nn.Module:
    layers = [conv(3, 8), nn.ReLU(), conv(8, 6), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.ReLU()]
    return settle(nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * size**2, 7), nn.ReLU(), nn.Linear(7, 5)))


def test_a_channel_owns_all_its_pixels_in_the_flattened_map() -> None:
    graph = check(network(), images())
    assert prunable(graph) == {"0", "2", "6"}
    (reader,) = group(graph, "2").consumers
    assert reader.tensor == "6.weight"
    assert reader.per_channel == 64
    assert reader.index[1] == tuple(range(64, 128))


def test_a_norm_before_the_flattening_goes_along() -> None:
    graph = check(network(norm=True), images(), ratio=0.2)
    assert prunable(graph) == {"0", "2", "6"}


def test_odd_sizes_and_rectangles() -> None:
    model = settle(nn.Sequential(conv(1, 5), nn.ReLU(), nn.MaxPool2d((2, 1)), nn.Flatten(), nn.Linear(5 * 21, 4)))
    graph = check(model, torch.randn(4, 1, 7, 7))
    assert group(graph, "0").consumers[0].per_channel == 21


def test_a_view_by_the_batch_size_is_prunable() -> None:
    model = Net(lambda net, x: net.head(F.relu(net.stem(x)).view(len(x), -1)), stem=conv(3, 8), head=nn.Linear(512, 5))
    assert prunable(check(settle(model), images())) == {"stem"}


def hard_coded_view(net: Net, x: Tensor) -> Tensor:
    return net.head(F.relu(net.last(F.relu(net.stem(x)))).view(-1, 6 * 64))


def hard_coded_mean(net: Net, x: Tensor) -> Tensor:
    return net.head(F.relu(net.last(F.relu(net.stem(x)))).view(len(x), 6, 64).mean(dim=2))


def test_a_size_written_down_in_a_view_freezes_only_its_own_channels() -> None:
    model = settle(Net(hard_coded_view, stem=conv(3, 8), last=conv(8, 6), head=nn.Linear(6 * 64, 5)))
    graph = check(model, images())
    assert prunable(graph) == {"stem"}
    assert group(graph, "last").frozen.startswith("the model breaks when they are removed (")


def test_a_size_written_down_before_a_mean_freezes_too() -> None:
    model = settle(Net(hard_coded_mean, stem=conv(3, 8), last=conv(8, 6), head=nn.Linear(6, 5)))
    graph = check(model, images())
    assert prunable(graph) == {"stem"}
    assert "shape '[4, 6, 64]' is invalid" in group(graph, "last").frozen


def test_pixels_before_channels_are_not_mixed_up() -> None:
    """Flattened the other way round, a channel owns every sixth column."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(F.relu(net.stem(x)).permute(0, 2, 3, 1).flatten(1))

    graph = check(settle(Net(forward, stem=conv(3, 6), head=nn.Linear(6 * 64, 5))), images())
    stem = group(graph, "stem")
    assert stem.frozen or stem.consumers[0].index[1] == tuple(range(1, 384, 6))


def test_flattened_sequences_of_features() -> None:
    model = settle(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Flatten(), nn.Linear(42, 3)))
    graph = check(model, torch.randn(4, 7, 5))
    assert "0" in prunable(graph)
