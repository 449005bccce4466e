import pytest
import torch
import torch.nn.functional as F
from graph_checks import Net, check, group, prunable, readers, settle
from torch import Tensor, nn

from autocompress.engine.prune import Importance
from autocompress.policy import Criterion, Policy
from autocompress.task import ClassificationTask

WORDS = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(0))


def bag_of_words(net: Net, x: Tensor) -> Tensor:
    return net.head(F.relu(net.hidden(net.embed(x).mean(dim=1))))


def with_shortcut(net: Net, x: Tensor) -> Tensor:
    """The embedding's columns are the stream that the block writes to."""
    x = net.embed(x).mean(dim=1)
    return net.head(F.relu(x + net.write(F.relu(net.read(x)))))


def gated(net: Net, x: Tensor) -> Tensor:
    return net.head((net.write(F.relu(net.read(net.other(x)))) * net.embed(x)).mean(dim=1))


def test_convolutions_of_sequences() -> None:
    layers = [nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 5, stride=2), nn.PReLU(6)]
    model = settle(nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 5)))
    graph = check(model, torch.randn(4, 3, 20))
    assert prunable(graph) == {"0", "3"}
    assert [(layer.kind, layer.positions) for layer in graph.layers] == [("conv1d", 18), ("conv1d", 7), ("linear", 1)]
    assert graph.layers[0].batch_norm == "1"
    assert {m.tensor for m in group(graph, "3").members} >= {"4.weight"}


def test_convolutions_of_volumes() -> None:
    layers = [nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 6, 3), nn.ReLU()]
    model = settle(nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 5)))
    graph = check(model, torch.randn(4, 1, 6, 6, 6))
    assert prunable(graph) == {"0", "3"}
    assert [layer.kind for layer in graph.layers] == ["conv3d", "conv3d", "linear"]
    assert group(graph, "3").consumers[0].per_channel == 8


def test_an_embedding_multiplies_nothing_and_is_a_layer() -> None:
    layers = {"embed": nn.Embedding(20, 8), "hidden": nn.Linear(8, 6)}
    graph = check(settle(Net(bag_of_words, **layers, head=nn.Linear(6, 3))), WORDS)
    embed = graph.layers[0]
    assert (embed.kind, embed.shape, embed.positions, embed.has_bias) == ("embedding", (20, 8), 0, False)
    assert prunable(graph) >= {"hidden"}
    assert graph.dense_macs == 8 * 6 + 6 * 3


def test_columns_of_an_embedding_go_with_the_stream_they_start() -> None:
    layers = {"embed": nn.Embedding(20, 8), "read": nn.Linear(8, 5), "write": nn.Linear(5, 8)}
    graph = check(settle(Net(with_shortcut, **layers, head=nn.Linear(8, 3))), WORDS)
    stream = group(graph, "write")
    assert not stream.frozen
    assert ("embed.weight", 1) in {(m.tensor, m.dim) for m in stream.members}
    assert readers(stream) >= {"read.weight", "head.weight"}


@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor", "entropy", "gini"])
@pytest.mark.parametrize("forward", [with_shortcut, gated])
def test_every_importance_takes_an_embedding(forward: object, criterion: Criterion) -> None:
    layers = {"embed": nn.Embedding(20, 8), "read": nn.Linear(8, 5), "write": nn.Linear(5, 8)}
    model = settle(Net(forward, **layers, other=nn.Embedding(20, 8), head=nn.Linear(8, 3)))  # type: ignore[arg-type]
    graph = check(model, WORDS)
    data = WORDS, torch.tensor([0, 1, 2, 0])
    task = ClassificationTask(model, data, data, data)
    policy = Policy(keep={g.name: 0.5 for g in graph.prunable}, criterion=criterion)
    kept = Importance(task, model, graph, task.batches("val"), lambda group: -torch.arange(group.channels)).kept(policy)
    assert {name: len(index) for name, index in kept.items()} == graph.kept(policy)


def test_a_linear_layer_over_time_counts_every_step() -> None:
    model = settle(nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)))
    graph = check(model, WORDS)
    assert [layer.positions for layer in graph.layers] == [0, 7, 7]


def test_steps_merged_into_the_batch_are_counted() -> None:
    model = settle(
        Net(
            lambda net, x: net.head(F.relu(net.each(x.flatten(0, 1)))).view(len(x), 7, 3).mean(dim=1),
            each=nn.Linear(5, 8),
            head=nn.Linear(8, 3),
        )
    )
    graph = check(model, torch.randn(4, 7, 5))
    assert [layer.positions for layer in graph.layers] == [7, 7]
