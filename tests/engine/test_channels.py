"""Channels that go, and the readers that make up for them, against brute force and numpy."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress import ClassificationTask, Evaluator, LayerChoice, Policy, Recovery, Workbench, compress
from autocompress.engine import NARROW_MODELS, channels, database
from autocompress.engine.cache import Cache
from autocompress.engine.channels import Reader, refit, removal_ranks
from autocompress.engine.database import LayerDatabase
from autocompress.engine.prune import Slice, sliced
from autocompress.graph import Graph, Layer, Member
from autocompress.policy import Criterion, Solver
from autocompress.task import divergence


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(d: int, n: int = 200, seed: int = 0) -> Tensor:
    """Columns (d, n) that share directions, so that they can stand for one another."""
    return (randn(d, d, seed=seed).double() @ torch.diag(torch.linspace(2, 0.1, d).double())) @ randn(
        d, n, seed=seed + 1
    ).double()


def best_fit(rows: Tensor, x: Tensor, kept: list[int]) -> np.ndarray:
    """Rows on the `kept` inputs, by numpy, on the inputs themselves."""
    found, *_ = np.linalg.lstsq(x[kept].T.numpy(), (rows.double() @ x).T.numpy(), rcond=None)
    return found.T


# --- readers --------------------------------------------------------------------------------------------


def test_a_refitted_reader_is_numpys_least_squares_on_the_inputs_that_stay() -> None:
    rows, x, kept = randn(3, 8), inputs(8), [0, 2, 3, 7]
    found = refit(rows, x @ x.T, torch.tensor(kept))
    np.testing.assert_allclose(found.numpy(), best_fit(rows, x, kept), rtol=1e-6)


def test_a_reader_of_all_inputs_stays_as_it_is() -> None:
    rows, x = randn(3, 5), inputs(5)
    torch.testing.assert_close(refit(rows, x @ x.T, torch.arange(5)), rows.double())


# --- which channels -------------------------------------------------------------------------------------


def lost(rows: Tensor, x: Tensor, kept: list[int]) -> float:
    """Share of the outputs' power that the best fit to the `kept` inputs loses."""
    target = (rows.double() @ x).numpy()
    left = best_fit(rows, x, kept) @ x[kept].numpy() if kept else 0.0
    return float(((target - left) ** 2).sum() / (target**2).sum())


def test_channels_go_in_the_order_of_brute_force_over_all_readers() -> None:
    columns = [torch.arange(12).reshape(6, 2), torch.tensor([5, 3, 1, 0, 2, 4]).reshape(6, 1)]
    rows, x = [randn(4, 12, seed=1), randn(2, 6, seed=2)], [inputs(12, seed=3), inputs(6, seed=4)]
    ranks = removal_ranks([Reader(r, v @ v.T, c) for r, v, c in zip(rows, x, columns, strict=True)])
    left = list(range(6))
    for rank in range(6):
        costs = {
            gone: sum(
                lost(r, v, c[[i for i in left if i != gone]].flatten().tolist())
                for r, v, c in zip(rows, x, columns, strict=True)
            )
            for gone in left
        }
        gone = min(left, key=costs.__getitem__)
        assert ranks[gone] == rank
        left.remove(gone)


def test_a_redundant_channel_makes_its_twin_indispensable() -> None:
    x = inputs(6)
    x[4] = x[1]  # louder than the others, and seen twice
    x[[1, 4]] *= 5
    ranks = removal_ranks([Reader(randn(3, 6), x @ x.T + 1e-6 * torch.eye(6), torch.arange(6).reshape(6, 1))])
    first, second = sorted((int(ranks[1]), int(ranks[4])))
    assert first == 0
    assert second > 1


def test_many_channels_go_several_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rows = inputs(24, 400), randn(5, 24)
    reader = Reader(rows, x @ x.T, torch.arange(24).reshape(12, 2))
    slow = removal_ranks([reader])
    monkeypatch.setattr(channels, "ROUNDS", 4)
    fast = removal_ranks([reader])
    assert sorted(fast.tolist()) == list(range(12))
    kept = [(ranks >= 6).nonzero().flatten() for ranks in (slow, fast)]
    errors = [lost(rows, x, reader.columns[k].flatten().tolist()) for k in kept]
    assert errors[1] < 2 * errors[0]


# --- narrowed layers ------------------------------------------------------------------------------------

CHOICES = [LayerChoice(32), LayerChoice(16), LayerChoice(4), LayerChoice(3, 0.5), LayerChoice(32, 0.5)]


def dense_error(dense: Tensor, found: Tensor, h: Tensor, kept: list[int]) -> float:
    """What the outputs of rows `found` on `kept` differ from those of `dense`."""
    gap = dense.double().clone()
    gap[:, kept] -= found.double()
    return float(((gap @ h) * gap).sum())


def narrowed(whole: LayerDatabase, layer: Layer, part: Slice) -> tuple[LayerDatabase, Layer]:
    """The database of the part that stays."""
    small, weight, h = whole.narrowed(layer, part)
    return whole.beside({layer.weight: weight}, {layer.name: h}), small


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_narrowed_layer_is_solved_as_a_fresh_one_with_the_fitted_weight(choice: LayerChoice) -> None:
    layer, weight, x = Layer("a", "conv2d", (6, 4, 2, 1)), randn(6, 4, 2, 1), inputs(8)
    h = (x @ x.T).unsqueeze(0)
    rows, kept = [0, 2, 5], [2, 3, 6, 7]  # input channels 1 and 3 with two kernel positions each
    base, small = narrowed(LayerDatabase({"a.weight": weight}, {"a": h}), layer, Slice((0, 2, 5), (1, 3)))
    fitted = torch.from_numpy(best_fit(weight.flatten(1)[rows], x, kept)).float().reshape(3, 2, 2, 1)
    fresh = LayerDatabase({"a.weight": fitted}, {"a": h[:, kept][:, :, kept]})
    assert small == Layer("a", "conv2d", (3, 2, 2, 1))
    torch.testing.assert_close(base.solve(small, choice).dense(), fresh.solve(small, choice).dense())


def test_solving_after_the_fit_loses_less_than_fitting_alone_or_solving_alone() -> None:
    layer, weight, x = Layer("a", "linear", (6, 16)), randn(6, 16), inputs(16)
    h, kept, choice = x @ x.T, list(range(0, 16, 2)), LayerChoice(3, 0.3)
    whole = LayerDatabase({"a.weight": weight}, {"a": h.unsqueeze(0)})
    base, small = narrowed(whole, layer, Slice(None, tuple(kept)))
    sliced = LayerDatabase({"a.weight": weight[:, kept]}, {"a": h[kept][:, kept].unsqueeze(0)})
    errors = [dense_error(weight, d.solve(small, choice).dense(), h, kept) for d in (base, sliced)]
    assert errors[0] < 0.9 * errors[1]


def test_a_depthwise_layer_keeps_the_statistics_of_the_channels_that_stay() -> None:
    layer, weight = Layer("a", "conv2d", (4, 1, 3, 1), groups=4), randn(4, 1, 3, 1)
    h = torch.stack([inputs(3, seed=s) @ inputs(3, seed=s).T for s in range(4)])
    whole = LayerDatabase({"a.weight": weight}, {"a": h})
    base, small = narrowed(whole, layer, Slice((1, 3), None))
    assert small == Layer("a", "conv2d", (2, 1, 3, 1), groups=2)
    fresh = LayerDatabase({"a.weight": weight[[1, 3]]}, {"a": h[[1, 3]]})
    for choice in CHOICES:
        torch.testing.assert_close(base.solve(small, choice).dense(), fresh.solve(small, choice).dense())


def test_an_embedding_loses_columns_and_keeps_its_frequencies() -> None:
    layer, weight, seen = Layer("a", "embedding", (5, 6)), randn(5, 6), torch.tensor([9.0, 1.0, 4.0, 1.0, 2.0])
    base, small = narrowed(LayerDatabase({"a.weight": weight}, {"a": seen}), layer, Slice(None, (0, 4)))
    assert small.shape == (5, 2)
    assert torch.equal(base.solve(small, LayerChoice(32)).dense(), weight[:, [0, 4]])
    fresh = LayerDatabase({"a.weight": weight[:, [0, 4]]}, {"a": seen})
    choice = LayerChoice(4, 0.3)
    assert torch.equal(base.solve(small, choice).dense(), fresh.solve(small, choice).dense())


def test_a_later_run_reads_narrowed_solutions_and_ranks_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, layer = inputs(6), Layer("a", "linear", (3, 6))
    member = Member("a.weight", 1, tuple((i,) for i in range(6)), reads=True)

    def run(folder: Path) -> tuple[Tensor, Tensor]:
        whole = LayerDatabase({"a.weight": randn(3, 6)}, {"a": (x @ x.T).unsqueeze(0)}, Cache(folder))
        base, small = narrowed(whole, layer, Slice((0, 2), (1, 2, 5)))
        return base.solve(small, LayerChoice(3)).dense(), whole.channel_ranks([(layer, member)])

    first = run(tmp_path / "levels")

    def fail(*_: object) -> None:
        raise AssertionError("solved again")

    monkeypatch.setattr(database, "solve", fail)
    monkeypatch.setattr(database, "removal_ranks", fail)
    assert all(torch.equal(a, b) for a, b in zip(first, run(tmp_path / "levels"), strict=True))
    with pytest.raises(AssertionError, match="solved again"):
        run(tmp_path / "elsewhere")


# --- through the engine ---------------------------------------------------------------------------------


class Branches(nn.Module):
    """A residual stream with an inner width, a depthwise layer, a concatenation and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.side, self.body = nn.Conv2d(8, 6, 1), nn.Conv2d(14, 10, 3, stride=2)
        self.hidden, self.head = nn.Linear(10 * 4, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.outer(torch.relu(self.inner(x)))
        x = torch.cat([torch.relu(self.deep(x)), torch.relu(self.side(x))], dim=1)
        x = torch.relu(self.body(x)).flatten(1)
        return self.head(torch.relu(self.hidden(x)))  # type: ignore[no-any-return]


def data(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 4, (128,), generator=draw)
    return randn(4, 3, 6, 6, seed=100)[targets] + torch.randn(128, 3, 6, 6, generator=draw), targets


@pytest.fixture(scope="module")
def judge() -> Evaluator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Branches()
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data(0)[0]), data(0)[1]).backward()
        optimizer.step()
    return Evaluator(ClassificationTask(model.eval(), data(0), data(1), data(2), batch_size=32), dense_ms=1.0)


def narrow(
    graph: Graph,
    choice: LayerChoice | None = None,
    solver: Solver = "database",
    criterion: Criterion = "reconstruction",
    epochs: int = 0,
) -> Policy:
    """Half of the channels everywhere."""
    layers = {layer.name: choice for layer in graph.layers} if choice else {}
    keep = {group.name: 0.5 for group in graph.prunable}
    return Policy(layers, keep, criterion, Recovery(epochs=epochs), solver)


def gap(bench: Workbench, policy: Policy) -> float:
    outputs = bench.realise(compress(bench, policy))(data(1)[0])
    return float(divergence(bench.task, outputs, bench.teacher(data(1)[0])))


def test_the_network_has_a_stream_an_inner_width_a_concatenation_and_flat_maps(judge: Evaluator) -> None:
    groups = {group.name: len(group.consumers) for group in judge.graph.prunable}
    assert len(groups) == 5
    assert 3 in groups.values()


def test_fitted_readers_are_closer_to_the_teacher_and_the_greedy_choice_closer_still(judge: Evaluator) -> None:
    cut, fitted = (gap(judge.bench, narrow(judge.graph, solver=s, criterion="l1")) for s in ("nearest", "database"))
    assert fitted < 0.7 * cut
    assert gap(judge.bench, narrow(judge.graph)) < fitted


def test_layers_that_make_up_for_those_before_them_are_closer_than_separate_fits(
    judge: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, policy = judge.bench, narrow(judge.graph)
    in_turn = gap(bench, policy)
    monkeypatch.setattr(bench, "_narrow", OrderedDict())
    monkeypatch.setattr(bench, "_layers", OrderedDict())
    monkeypatch.setattr(bench.reconstruction, "fit", lambda *_: {})
    assert in_turn < 0.9 * gap(bench, policy)


def test_biases_follow_the_mean_of_what_was_removed(judge: Evaluator) -> None:
    parent = judge.bench.one_shot(narrow(judge.graph))
    assert not torch.equal(parent.state["head.bias"], judge.bench.state["head.bias"])
    plain = judge.bench.one_shot(narrow(judge.graph, solver="nearest"))
    assert torch.equal(plain.state["head.bias"], judge.bench.state["head.bias"])


def test_few_narrow_models_stay_in_memory_and_the_others_come_out_alike(judge: Evaluator) -> None:
    bench, group = judge.bench, judge.graph.prunable[1]
    policies = [
        Policy(keep={group.name: count / group.channels}, criterion="reconstruction", solver="database")
        for count in range(2, group.channels)
    ]
    first = [bench.one_shot(policy).state for policy in policies]
    assert len(bench._narrow) == NARROW_MODELS < len(policies)
    for policy, state in zip(policies, first, strict=True):
        again = bench.one_shot(policy).state
        assert all(torch.equal(state[name], again[name]) for name in again)


def test_nothing_is_fitted_to_weigh_a_model_without_codes(judge: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("fitted")

    monkeypatch.setattr(judge.bench, "narrow", fail)
    assert judge.predict(narrow(judge.graph, LayerChoice(16, 0.5))).bytes > 0


def test_every_layer_that_lost_channels_comes_from_the_database(judge: Evaluator) -> None:
    parent = judge.bench.one_shot(narrow(judge.graph, LayerChoice(4, 0.3)))
    assert parent.compensated == {layer.weight for layer in judge.graph.layers}
    for layer in judge.graph.layers:
        assert parent.weights[layer.weight].dense().shape == parent.state[layer.weight].shape


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("choice", [None, LayerChoice(4, 0.5), LayerChoice(3, 0.0, "asymmetric")], ids=str)
def test_narrow_files_are_as_long_as_predicted_and_read_back(
    judge: Evaluator, choice: LayerChoice | None, epochs: int, tmp_path: Path
) -> None:
    policy = narrow(judge.graph, choice, epochs=epochs)
    found = judge(policy, keep=tmp_path / "file")
    assert found.status == "ok", found.error
    assert found.measurement is not None
    assert (tmp_path / "file").stat().st_size == found.measurement.bytes <= judge.bound(policy).bytes
    if epochs == 0:  # training changes codes, and so their length
        assert found.measurement.bytes == judge.predict(policy).bytes
    model = judge.reload(tmp_path / "file").model
    torch.testing.assert_close(model(data(1)[0]), judge.build(policy)[1](data(1)[0]), rtol=0, atol=1e-5)


def test_training_starts_from_the_fitted_weights(judge: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Tensor] = {}

    def remember(student: nn.Module, teacher: Any, constraints: Any, course: Any) -> Any:  # noqa: ARG001
        started.update({name: value.clone() for name, value in student.state_dict().items()})
        return constraints

    monkeypatch.setattr("autocompress.engine.train", remember)
    policy = narrow(judge.graph, epochs=1)
    compress(judge.bench, policy)
    parent = judge.bench.one_shot(policy)
    for layer in judge.graph.layers:
        assert torch.equal(started[layer.weight], parent.weights[layer.weight].dense())
    assert not torch.equal(started["outer.weight"], sliced(judge.bench.state, parent.stays)["outer.weight"])


def test_a_group_is_ranked_by_all_that_read_it(judge: Evaluator) -> None:
    bench = judge.bench
    stream = next(group for group in judge.graph.prunable if len(group.consumers) == 3)
    layers = {layer.weight: layer for layer in judge.graph.layers}
    readers = [(layers[m.tensor], m) for m in stream.consumers]
    alone = [bench.database.channel_ranks([reader]).tolist() for reader in readers]
    both = bench.importance.scores("reconstruction")[stream.name].tolist()
    assert both == bench.database.channel_ranks(readers).tolist()
    assert sorted(both) == list(range(stream.channels))
    assert alone[0] != alone[1]


def test_a_reader_without_statistics_is_judged_by_its_weights_alone() -> None:
    layer, weight = Layer("a", "linear", (3, 6)), randn(3, 6)
    whole = LayerDatabase({"a.weight": weight}, {})
    assert not whole.knows(layer)
    member = Member("a.weight", 1, tuple((i,) for i in range(6)), reads=True)
    ranks = whole.channel_ranks([(layer, member)])
    assert torch.equal(ranks.argsort(), weight.square().sum(dim=0).argsort())
