"""The matrices of `nn.MultiheadAttention` are layers like all others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress import ClassificationTask, LayerChoice, Policy, Recovery, Workbench, compress
from autocompress.artifact import packed
from autocompress.attention import attention_columns
from autocompress.evaluate import Evaluator
from autocompress.stored import Quantised
from autocompress.task import Task
from autocompress.trace import trace

WIDTH, HEADS = 32, 4


class Encoder(nn.Module):
    """An embedding, two layers of torch's own encoder, a mean over positions, five answers."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, 0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.encoder(self.embed(tokens)).mean(dim=1))


class Cross(nn.Module):
    """Queries of one kind, keys and values of another, which are not the same either."""

    def __init__(self, apart: bool = False) -> None:
        super().__init__()
        sizes = {"kdim": 6, "vdim": 10} if apart else {}
        self.key, self.value = (nn.Linear(8, sizes.get(name, WIDTH)) for name in ("kdim", "vdim"))
        self.query = nn.Linear(8, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **sizes)
        self.out = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(self.query(x), self.key(x[:, 1:]), self.value(x[:, 1:]), need_weights=False)
        return self.out(mixed.mean(dim=1))


def seeded(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def task_of(model: nn.Module, *, tokens: bool) -> ClassificationTask:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randint(0, 40, (64, 7), generator=draw) if tokens else torch.randn(64, 7, 8, generator=draw)
    with torch.no_grad():
        labels = seeded(model)(inputs).argmax(dim=1)
    data = inputs, labels
    return ClassificationTask(model, data, data, data, name="attention", batch_size=16)


KINDS: dict[str, Any] = {
    "encoder": lambda: task_of(Encoder(), tokens=True),
    "norms first": lambda: task_of(Encoder(norm_first=True), tokens=True),
    "cross": lambda: task_of(Cross(), tokens=False),
    "apart": lambda: task_of(Cross(apart=True), tokens=False),
}


def by_hand(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, masked: Tensor | None) -> Tensor:
    """(examples, positions, width): softmax(q k^T / sqrt(d)) v for each head (Vaswani et al. 2017, 1706.03762)."""
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    assert module.in_proj_bias is not None
    heads = []
    for x, weight, bias in zip((query, key, value), weights, module.in_proj_bias.chunk(3), strict=True):
        heads.append((x @ weight.T + bias).unflatten(-1, (HEADS, -1)).transpose(1, 2))  # (examples, heads, n, d)
    q, k, v = heads
    scores = q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS)
    if masked is not None:
        scores = scores.masked_fill(masked, -math.inf)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding", "causal"])
@pytest.mark.parametrize("layout", ["batch first", "positions first", "one example"])
def test_columns_are_what_the_formula_multiplies(layout: str, mask: str, apart: bool) -> None:
    sizes = {"kdim": 6, "vdim": 10} if apart else {}
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=layout == "batch first", **sizes)
    seeded(module)
    count = 1 if layout == "one example" else 3
    query, key, value = (torch.randn(count, 5, sizes.get(name, WIDTH)) for name in ("", "kdim", "vdim"))
    masked, given = None, {}
    if mask == "padding":
        padding = torch.arange(5).expand(count, 5) > 2
        masked, given = padding[:, None, None], {"key_padding_mask": padding[0] if count == 1 else padding}
    elif mask == "causal":
        masked = torch.ones(5, 5, dtype=torch.bool).triu(1)
        given = {"attn_mask": masked}
    turned = [query, key, value]
    if layout == "positions first":
        turned = [x.transpose(0, 1) for x in turned]
    elif layout == "one example":
        turned = [x[0] for x in turned]
    call = tuple(turned), given
    with torch.no_grad():
        found = dict(attention_columns(module, call, module(*turned, **given)))
        wanted = by_hand(module, query, key, value, masked)
    if layout == "positions first":
        wanted = wanted.transpose(0, 1)
    torch.testing.assert_close(found.pop("out_proj.weight")[0], wanted.flatten(0, 1), rtol=1e-4, atol=1e-5)
    flat = [x.reshape(-1, x.shape[-1]) for x in turned]
    parts = [x for parts in found.values() for x in parts]
    assert list(found) == (["q_proj_weight", "k_proj_weight", "v_proj_weight"] if apart else ["in_proj_weight"])
    assert all(torch.equal(a, b) for a, b in zip(parts, flat, strict=True))


def test_a_subclass_that_computes_something_else_is_rounded_to_nearest() -> None:
    class Scaled(nn.MultiheadAttention):
        def forward(self, *given: Any, **named: Any) -> Any:
            mixed, weights = super().forward(*given, **named)
            return 2 * mixed, weights

    model = Cross()
    model.attention = Scaled(WIDTH, HEADS, batch_first=True)
    bench = Workbench(task_of(model, tokens=False))
    with pytest.warns(UserWarning, match="rounded to nearest: its outputs are not those of attention"):
        assert bench.database is not None
    made = compress(bench, Policy({"attention.in_proj_weight": LayerChoice(4)}, solver="database"))
    assert made.tensors["attention.in_proj_weight"].dense().shape == (3 * WIDTH, WIDTH)


def test_a_subclass_that_takes_one_input_is_solved_as_any_other() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x, x, x, need_weights=False)[0]

    model = nn.Sequential(Own(WIDTH, HEADS, batch_first=True), nn.Flatten(), nn.Linear(3 * WIDTH, 5))
    draw = torch.randn(16, 3, WIDTH), torch.arange(16) % 5
    bench = Workbench(ClassificationTask(seeded(model), draw, draw, draw, name="own", batch_size=8))
    assert [layer.positions for layer in bench.graph.layers] == [3, 3, 1]
    assert all(bench.database.knows(layer) for layer in bench.graph.layers)


def test_attention_alone_is_a_model() -> None:
    module = seeded(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    x = torch.randn(4, 7, WIDTH)
    graph = trace(module, {"query": x, "key": x, "value": x})
    assert [(x.name, x.weight, x.positions) for x in graph.layers] == [
        ("in_proj_weight", "in_proj_weight", 7), ("out_proj.weight", "out_proj.weight", 7)
    ]  # fmt: skip
    assert graph.biases == {"in_proj_weight": "in_proj_bias", "out_proj.weight": "out_proj.bias"}


def test_layers_of_an_encoder() -> None:
    graph = trace(seeded(Encoder()), torch.randint(0, 40, (4, 7)))
    found = {layer.name: (layer.kind, layer.weight, layer.groups) for layer in graph.layers}
    for block in ("encoder.layers.0", "encoder.layers.1"):
        inner, outer = f"{block}.self_attn.in_proj_weight", f"{block}.self_attn.out_proj.weight"
        assert found[inner] == ("attention", inner, 1)
        assert found[outer] == ("attention", outer, 1)
    assert {layer.positions for layer in graph.layers if layer.kind == "attention"} == {7}
    attention = "encoder.layers.0.self_attn"
    assert graph.biases[f"{attention}.in_proj_weight"] == f"{attention}.in_proj_bias"
    assert graph.biases[f"{attention}.out_proj.weight"] == f"{attention}.out_proj.bias"
    assert [group.name for group in graph.prunable] == ["encoder.layers.1.linear1", "encoder.layers.0.linear1"]
    assert not graph.notes


@pytest.mark.parametrize(("apart", "names"), [(False, {"in_proj_weight": 3}), (True, {"q": 1, "k": 1, "v": 1})])
def test_queries_keys_and_values_have_moments_of_their_own(apart: bool, names: dict[str, int]) -> None:
    bench = Workbench(task_of(Cross(apart), tokens=False))
    model, batches = bench.teacher, [bench.example.inputs]
    layers = {layer.name: layer for layer in bench.graph.layers}
    x = torch.cat([bench.example.inputs for _ in batches])
    with torch.no_grad():
        met = model.query(x), model.key(x[:, 1:]), model.value(x[:, 1:])  # type: ignore[operator]
    found = [f"attention.{n}_proj_weight" if apart else f"attention.{n}" for n in names]
    assert [layers[name].groups for name in found] == list(names.values())
    shapes = [h.shape[-1] for h in met]
    statistics = [bench.database.statistics(layers[name]) for name in found]
    assert all(h is not None for h in statistics)
    assert [d for h in statistics for d in [h.shape[-1]] * len(h)] == shapes  # type: ignore[union-attr,arg-type]
    assert layers["attention.in_proj_weight" if not apart else "attention.k_proj_weight"].positions in (6, 19 // 3)


@pytest.mark.parametrize("kind", KINDS)
def test_solved_matrices_lose_less_than_rounded_ones(kind: str) -> None:
    bench = Workbench(KINDS[kind]())
    for layer in bench.graph.layers:
        if layer.kind == "attention":
            lost = [bench.database.error(layer, bench.level(layer, LayerChoice(3, 0.3), s)) for s in SOLVERS]
            assert lost[0] < lost[1], layer.name


SOLVERS: tuple[Any, ...] = ("database", "nearest")


@pytest.mark.parametrize("kind", KINDS)
def test_file_is_the_scored_model(kind: str, tmp_path: Path) -> None:
    task: Task = KINDS[kind]()
    evaluator = Evaluator(task, dense_ms=1.0)
    layers = {layer.name: LayerChoice(2.5, 0.2, "entropy") for layer in evaluator.graph.layers}
    policy = Policy(layers, solver="database")
    found = evaluator(policy, keep=tmp_path / "model.acz")
    assert found.measurement is not None, found.error
    assert found.measurement.bytes == (tmp_path / "model.acz").stat().st_size == evaluator.predict(policy).bytes
    model = packed.load(tmp_path / "model.acz", task)
    assert task.score(model, "val") == found.measurement.quality
    assert found.measurement.bytes < 0.3 * evaluator.graph.dense_bytes


def test_recovery_trains_them_on_their_grids() -> None:
    bench = Workbench(KINDS["encoder"]())
    recovery = Recovery(epochs=3, lr=0.1, hint_weight=1.0, scales="learned")
    policy = Policy({layer.name: LayerChoice(3, 0.3) for layer in bench.graph.layers}, recovery=recovery)
    before, after = compress(bench, Policy(policy.layers)), compress(bench, policy)
    for name in ("encoder.layers.0.self_attn.in_proj_weight", "encoder.layers.1.self_attn.out_proj.weight"):
        own, old = after.tensors[name], before.tensors[name]
        assert isinstance(own, Quantised)
        assert isinstance(old, Quantised)
        assert not torch.equal(own.dense(), old.dense())
        assert old.mask is not None
        assert (own.dense()[~old.mask] == 0).all()
    assert after.curve is not None
    assert math.isfinite(after.curve.loss[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_file_computes_what_the_model_does(kind: str) -> None:
    evaluator = Evaluator(KINDS[kind](), format="onnx")
    packed_one = Evaluator(KINDS[kind](), dense_ms=1.0)
    found = []
    for bits in (32, 4):
        policy = Policy({layer.name: LayerChoice(bits) for layer in evaluator.graph.layers})
        one, other = evaluator(policy), packed_one(policy)
        assert one.measurement is not None, one.error
        assert other.measurement is not None, other.error
        assert one.measurement.loss == pytest.approx(other.measurement.loss, abs=1e-4)
        found.append(one.measurement.bytes)
    weights = sum(math.prod(layer.shape) for layer in evaluator.graph.layers)
    assert found[0] - found[1] > weights * (4 - 0.5) - 600 * len(evaluator.graph.layers), "some is there as floats"
