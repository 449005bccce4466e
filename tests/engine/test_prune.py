from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor, nn
from torch.func import functional_call

from autocompress import ClassificationTask, Workbench, compress
from autocompress.engine.prune import (
    HISTOGRAM_BINS,
    Importance,
    entropy_importance,
    gini_importance,
    magnitude_mask,
    norm_importance,
    remove_channels,
    taylor_importance,
)
from autocompress.graph import Graph, Group, Member
from autocompress.policy import Criterion, Policy, Recovery
from autocompress.surgery import install
from autocompress.trace import trace

CRITERIA: tuple[Criterion, ...] = ("l1", "l2", "taylor", "entropy", "gini")


def randomise_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def flat_cnn() -> nn.Sequential:
    """Two convolutions and a classifier that reads four positions of each channel."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 3),
    )
    randomise_norms(model)
    return model


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 8, 3, padding=1)
        self.outer = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.outer(torch.relu(self.inner(x)))
        return self.head(x.mean((2, 3)))


class SumOfEmbeddingAndLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.linear = nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.linear(x.float()) + self.table(x).mean(1)))


def task_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> ClassificationTask:
    draw = torch.Generator().manual_seed(5)
    data = torch.randn(48, 2, 6, 6, generator=draw, dtype=dtype), torch.randint(0, 3, (48,), generator=draw)
    return ClassificationTask(model.to(dtype), data, data, data, batch_size=16)


def importance_of(task: ClassificationTask) -> tuple[Importance, Graph]:
    model = task.model()
    graph = trace(model, task.split("train")[0][:4])
    return Importance(task, model, graph, task.batches("train", 0), lambda group: -torch.arange(group.channels)), graph


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- masks ----------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=24), st.data())
def test_masks_remove_exactly_the_smallest_magnitudes_earlier_ties_first(
    values: list[int], data: st.DataObject
) -> None:
    removed = data.draw(st.integers(1, len(values)))
    expected = np.ones(len(values), dtype=bool)
    expected[np.argsort(np.abs(values), kind="stable")[:removed]] = False
    mask = magnitude_mask(torch.tensor(values, dtype=torch.float32), removed)
    assert mask is not None
    np.testing.assert_array_equal(mask.numpy(), expected)


@pytest.mark.parametrize("removed", [1, 7, 35, 72])
def test_a_mask_has_the_weights_shape_and_the_asked_number_of_zeros(removed: int) -> None:
    weight = torch.randn(4, 2, 3, 3)
    mask = magnitude_mask(weight, removed)
    assert mask is not None
    assert mask.shape == weight.shape
    assert int((~mask).sum()) == removed
    if removed < weight.numel():
        assert weight[mask].abs().min() >= weight[~mask].abs().max()


def test_removing_nothing_needs_no_mask() -> None:
    assert magnitude_mask(torch.zeros(3), 0) is None


# --- importance on hand-made groups ---------------------------------------------------------------------

STATE = {
    "a.weight": torch.tensor([[3.0, -4.0], [0.0, 1.0], [2.0, 2.0]]),
    "b.weight": torch.arange(-12.0, 12.0).reshape(6, 1, 2, 2),
    "norm.weight": torch.tensor([100.0, 200.0, 300.0]),
    "reader.weight": torch.full((2, 3), 1000.0),
}
GRADIENTS = {name: torch.from_numpy(np.random.default_rng(3).normal(size=v.shape)).float() for name, v in STATE.items()}
GROUP = Group(
    "a",
    3,
    (
        Member("a.weight", 0, ((2,), (0,), (1,))),
        Member("b.weight", 0, ((0, 1), (2, 3), (4, 5))),
        Member("norm.weight", 0, ((0,), (1,), (2,))),
        Member("reader.weight", 1, ((0,), (1,), (2,)), reads=True),
    ),
)
FILTERS = (([2], [0, 1]), ([0], [2, 3]), ([1], [4, 5]))
"""Rows of `a` and `b` that each channel of the group owns."""


@pytest.mark.parametrize("order", [1, 2])
def test_norms_add_up_over_the_filters_of_a_channel(order: int) -> None:
    a, b = STATE["a.weight"].numpy(), STATE["b.weight"].numpy().reshape(6, -1)
    expected = [
        sum(np.linalg.norm(row, ord=order) for row in (*a[own_a], *b[own_b].astype(np.float64)))
        for own_a, own_b in FILTERS
    ]
    np.testing.assert_allclose(norm_importance(STATE, GROUP, order).numpy(), expected, rtol=1e-6)


def test_taylor_is_the_squared_sum_of_weight_times_gradient_over_the_filters_of_a_channel() -> None:
    a, b = (STATE[k].numpy() * GRADIENTS[k].numpy() for k in ("a.weight", "b.weight"))
    expected = [(a[own_a].sum() + b[own_b].sum()) ** 2 for own_a, own_b in FILTERS]
    np.testing.assert_allclose(taylor_importance(STATE, GRADIENTS, GROUP).numpy(), expected, rtol=1e-5)


def histograms(activations: np.ndarray) -> list[np.ndarray]:
    return [np.histogram(column, bins=HISTOGRAM_BINS)[0] for column in activations.T]


def activations_like(kind: str) -> np.ndarray:
    draw = np.random.default_rng(7)
    columns = {"normal": draw.normal(size=(300, 5)), "sparse": np.maximum(draw.normal(size=(300, 5)) - 1, 0)}
    return columns[kind]


@pytest.mark.parametrize("kind", ["normal", "sparse"])
def test_entropy_is_scipys_of_the_histogram(kind: str) -> None:
    activations = activations_like(kind)
    expected = [scipy.stats.entropy(counts) for counts in histograms(activations)]
    np.testing.assert_allclose(entropy_importance(torch.from_numpy(activations)).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["normal", "sparse"])
def test_gini_is_the_impurity_of_a_scikit_learn_tree_root(kind: str) -> None:
    activations = activations_like(kind)
    expected = []
    for column in activations.T:
        labels = np.digitize(column, np.histogram_bin_edges(column, bins=HISTOGRAM_BINS)[1:-1])
        tree = DecisionTreeClassifier(criterion="gini", max_depth=1).fit(np.zeros((len(labels), 1)), labels)
        expected.append(tree.tree_.impurity[0])
    np.testing.assert_allclose(gini_importance(torch.from_numpy(activations)).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("measure", [entropy_importance, gini_importance])
def test_a_channel_that_never_changes_carries_no_information(measure: Callable[[Tensor], Tensor]) -> None:
    activations = torch.stack([torch.full((40,), 2.5), torch.linspace(0, 1, 40)], dim=1)
    found = measure(activations)
    assert float(found[0]) == 0.0
    assert float(found[1]) > 0.5


# --- importance of a model ------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [flat_cnn, Residual])
def test_taylor_scores_are_finite_differences_of_the_loss(build: Callable[[], nn.Module]) -> None:
    task = task_of(build(), torch.float64)
    importance, graph = importance_of(task)
    model, batches, step = task.model(), list(task.batches("train", 0)), 1e-5

    def loss(group: Group, channel: int, factor: float) -> np.ndarray:
        weights = {}
        for member in group.producers:
            weight = model.get_parameter(member.tensor).detach().clone()
            if weight.ndim > 1:
                weight[list(member.index[channel])] *= factor
                weights[member.tensor] = weight
        return np.array([float(task.loss(functional_call(model, weights, (b.inputs,)), b).detach()) for b in batches])

    assert graph.prunable
    for group in graph.prunable:
        slopes = [(loss(group, c, 1 + step) - loss(group, c, 1 - step)) / (2 * step) for c in range(group.channels)]
        expected = np.square(slopes).mean(axis=1)
        np.testing.assert_allclose(importance.scores("taylor")[group.name].numpy(), expected, rtol=1e-4)


def test_taylor_leaves_the_models_gradients_and_flags_alone() -> None:
    task = task_of(flat_cnn())
    model = task.model()
    model[0].weight.requires_grad_(False)
    graph = trace(model, task.split("train")[0][:4])
    flags = [p.requires_grad for p in model.parameters()]
    Importance(task, model, graph, task.batches("train", 0), lambda group: -torch.arange(group.channels)).scores(
        "taylor"
    )
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("criterion", ["entropy", "gini"])
def test_activation_scores_pool_what_the_reader_sees(criterion: Criterion) -> None:
    task = task_of(flat_cnn())
    importance, _ = importance_of(task)
    inputs = task.split("train")[0]
    model = task.model()
    with torch.no_grad():
        seen = {"0": model[:3](inputs).mean((2, 3)), "3": model[:7](inputs).mean((2, 3))}
    for name, values in seen.items():
        counts = np.stack(histograms(values.numpy())) / len(inputs)
        expected = scipy.stats.entropy(counts, axis=1) if criterion == "entropy" else 1 - np.square(counts).sum(1)
        np.testing.assert_allclose(importance.scores(criterion)[name].numpy(), expected, rtol=1e-9)
    assert not any(module._forward_pre_hooks for module in importance._model.modules())


def ranked_by_reference(task: ClassificationTask, criterion: Criterion) -> np.ndarray:
    """Scores of the first convolution's channels, without the package."""
    model, (inputs, _) = task.model(), task.split("train")
    filters = model[0].weight.detach().numpy().reshape(6, -1)
    if criterion in ("l1", "l2"):
        return np.linalg.norm(filters, ord=int(criterion[1]), axis=1)
    if criterion == "taylor":
        squares = []
        for batch in task.batches("train", 0):
            gate = torch.ones(6, 1, 1, 1, requires_grad=True)
            outputs = functional_call(model, {"0.weight": model[0].weight * gate}, (batch.inputs,))
            nn.functional.cross_entropy(outputs, batch.target).backward()
            squares.append(np.square(gate.grad.flatten().numpy()))
        return np.mean(squares, axis=0)
    with torch.no_grad():
        counts = np.stack(histograms(model[:3](inputs).mean((2, 3)).numpy())) / len(inputs)
    return scipy.stats.entropy(counts, axis=1) if criterion == "entropy" else 1 - np.square(counts).sum(1)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_each_criterion_keeps_the_channels_that_its_reference_ranks_highest(criterion: Criterion) -> None:
    task = task_of(flat_cnn())
    recovery = Recovery(reestimate_bn=False, fold_bn=False)
    found = compress(Workbench(task), Policy(keep={"0": 0.5}, criterion=criterion, recovery=recovery)).tensors
    stay = np.sort(np.argsort(-ranked_by_reference(task, criterion), kind="stable")[:3])
    dense = task.model()
    np.testing.assert_array_equal(found["0.weight"].dense().numpy(), dense[0].weight.detach().numpy()[stay])
    np.testing.assert_array_equal(found["3.weight"].dense().numpy(), dense[3].weight.detach().numpy()[:, stay])


def test_criteria_disagree_on_what_to_keep() -> None:
    importance, _ = importance_of(task_of(flat_cnn()))
    orders = {c: tuple(importance.scores(c)["0"].argsort().tolist()) for c in CRITERIA}
    assert len(set(orders.values())) >= 4


def test_an_embedding_counts_among_the_producers_of_its_channels() -> None:
    model = SumOfEmbeddingAndLinear()
    with torch.no_grad():
        model.table.weight[:, 5] *= 100
        model.linear.weight[5] *= 0.01
    inputs = torch.randint(0, 20, (32, 5))
    data = inputs, torch.zeros(32, dtype=torch.long)
    importance, graph = importance_of(ClassificationTask(model.eval(), data, data, data))
    (group,) = graph.prunable
    assert int(importance.scores("l2")[group.name].argmax()) == 5


def test_equal_scores_keep_the_earlier_channels() -> None:
    model = flat_cnn()
    nn.init.constant_(model[0].weight, 0.5)
    importance, _ = importance_of(task_of(model))
    assert importance.kept(Policy(keep={"0": 0.5}))["0"].tolist() == [0, 1, 2]


def test_a_group_keeps_at_least_one_channel_and_whole_groups_are_absent() -> None:
    importance, _ = importance_of(task_of(flat_cnn()))
    kept = importance.kept(Policy(keep={"0": 0.01, "3": 1.0}))
    assert len(kept["0"]) == 1
    assert "3" not in kept


# --- removal --------------------------------------------------------------------------------------------


def silenced_outputs(model: nn.Module, readers: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """Outputs when each named reader sees zeros in place of the channels that are not kept."""
    handles = []
    for name, kept in readers.items():

        def silence(_: nn.Module, args: tuple[Tensor], kept: Tensor = kept) -> Tensor:
            share = torch.zeros(args[0].shape[1])
            share[kept] = 1
            return args[0] * share.reshape(1, -1, *[1] * (args[0].ndim - 2))

        handles.append(model.get_submodule(name).register_forward_pre_hook(silence))
    with torch.no_grad():
        outputs = model(inputs)
    for handle in handles:
        handle.remove()
    return outputs


def pruned_model(task: ClassificationTask, graph: Graph, kept: dict[str, Tensor]) -> nn.Module:
    model = task.model()
    install(model, remove_channels(model.state_dict(), graph, kept))
    return model


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_removed_channels_never_reach_the_output() -> None:
    task = task_of(flat_cnn())
    _, graph = importance_of(task)
    inputs = task.split("val")[0]
    kept = {"0": torch.tensor([1, 2, 5]), "3": torch.tensor([0, 3])}
    positions = torch.cat([torch.arange(4 * c, 4 * c + 4) for c in (0, 3)])
    small = pruned_model(task, graph, kept)
    expected = silenced_outputs(task.model(), {"3": kept["0"], "8": positions}, inputs)
    torch.testing.assert_close(small(inputs), expected, rtol=1e-4, atol=1e-5)
    assert size(small) == (3 * 18 + 3) + 2 * 3 + (2 * 27 + 2) + 2 * 2 + (3 * 8 + 3)


def test_channels_of_a_residual_stream_leave_all_its_layers_together() -> None:
    task = task_of(Residual())
    _, graph = importance_of(task)
    stream = next(g for g in graph.prunable if any(m.tensor == "head.weight" for m in g.members))
    inner = next(g for g in graph.prunable if g is not stream)
    kept = {stream.name: torch.tensor([0, 4]), inner.name: torch.tensor([1, 2, 7])}
    inputs = task.split("val")[0]
    small = pruned_model(task, graph, kept)
    readers = {"inner": kept[stream.name], "head": kept[stream.name], "outer": kept[inner.name]}
    expected = silenced_outputs(task.model(), readers, inputs)
    torch.testing.assert_close(small(inputs), expected, rtol=1e-4, atol=1e-5)
    assert size(small) == (2 * 18 + 2) + (3 * 2 * 9 + 3) + (2 * 3 * 9 + 2) + (3 * 2 + 3)


def test_tensors_outside_the_pruned_groups_are_the_given_ones() -> None:
    task = task_of(flat_cnn())
    _, graph = importance_of(task)
    state = {name: value.clone() for name, value in task.model().state_dict().items()}
    before = {name: value.clone() for name, value in state.items()}
    small = remove_channels(state, graph, {"3": torch.tensor([1])})
    changed = {name for name in state if small[name] is not state[name]}
    assert changed == {"3.weight", "3.bias", "8.weight", *(f"4.{k}" for k in ("weight", "bias"))} | {
        "4.running_mean",
        "4.running_var",
    }
    assert all(torch.equal(state[name], before[name]) for name in state)
