"""An attention's heads go whole, and what the attention says of them follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from graph_checks import assert_same, check_graph, group, outputs, pruned, settle
from torch import Tensor, nn

from autocompress import OutputsTask
from autocompress.evaluate import Evaluator
from autocompress.graph import Graph
from autocompress.policy import Policy
from autocompress.surgery import lent
from autocompress.trace import trace

pytestmark = pytest.mark.slow  # importing transformers alone takes ten seconds

HEADS, SIZE = 4, 8
WIDTH = HEADS * SIZE


class Attention(nn.Module):
    """Counts its heads where it splits channels, as attentions mostly do."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.all_head_size = HEADS, WIDTH
        self.q, self.k, self.v = (nn.Linear(24, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, 24)

    def forward(self, x: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.view(*y.shape[:2], self.num_heads, y.shape[2] // self.num_heads).transpose(1, 2)

        weighs = (split(self.q(x)) @ split(self.k(x)).transpose(2, 3) / SIZE**0.5).softmax(dim=3)
        mixed = (weighs @ split(self.v(x))).transpose(1, 2)
        return self.out(mixed.reshape(*x.shape[:2], self.all_head_size))


class Encoder(nn.Module):
    """Two layers of attention and feed-forward units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 24)
        self.attentions = nn.ModuleList(Attention() for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(24, 20) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(20, 24) for _ in range(2))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for attention, up, down in zip(self.attentions, self.up, self.down, strict=True):
            x = x + attention(x)
            x = x + down(F.relu(up(x)))
        return self.head(x.mean(dim=1))


def encoder() -> nn.Module:
    return settle(Encoder())


def sequences() -> Tensor:
    return torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(1))


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=48,
        max_position_embeddings=16,
        attn_implementation="eager",
    )
    return settle(transformers.BertModel(config, add_pooling_layer=False))


def tokens(n: int = 4) -> dict[str, Tensor]:
    drawn = torch.randint(0, 40, (n, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": drawn, "attention_mask": torch.ones_like(drawn)}


def heads_of(graph: Graph) -> list[Any]:
    return [g for g in graph.groups if any("attention" in m.tensor and m.per_channel == SIZE for m in g.members)]


@pytest.mark.parametrize(("make", "inputs"), [(encoder, sequences), (bert, tokens)])
def test_heads_are_the_channels_of_a_group_that_is_right(make: Any, inputs: Any) -> None:
    model = make()
    graph = trace(model, inputs())
    found = heads_of(graph)
    assert [(g.channels, g.frozen) for g in found] == [(HEADS, "")] * 2
    assert all(len(g.producers) == 3 and len(g.consumers) == 1 for g in found)
    check_graph(model, inputs(), graph)


def test_an_attention_counts_the_heads_it_has() -> None:
    model = encoder()
    graph = trace(model, sequences())
    own = group(graph, "attentions.0.v")
    small = pruned(model, graph, {own.name: torch.tensor([0, 2, 3])})
    attention = small.attentions[0]  # type: ignore[index]
    assert (attention.num_heads, attention.all_head_size) == (3, 3 * SIZE)
    assert small.attentions[1].num_heads == HEADS  # type: ignore[index]
    assert attention.q.weight.shape == (3 * SIZE, 24)


def test_the_count_comes_back_with_the_heads() -> None:
    model = encoder()
    dense = outputs(model, sequences())
    keys = ("q", "k", "v")
    cut = {f"attentions.0.{key}.weight": torch.zeros(SIZE, 24) for key in keys}
    cut |= {f"attentions.0.{key}.bias": torch.zeros(SIZE) for key in keys}
    with lent(model, {**cut, "attentions.0.out.weight": torch.zeros(24, SIZE)}):
        assert model.attentions[0].num_heads == 1  # type: ignore[index]
        outputs(model, sequences())
    assert model.attentions[0].num_heads == HEADS  # type: ignore[index]
    assert_same(outputs(model, sequences()), dense)


def test_a_narrower_stream_leaves_the_heads_alone() -> None:
    model = encoder()
    graph = trace(model, sequences())
    stream = group(graph, "attentions.0.out")
    assert (stream.channels, stream.frozen) == (24, "")
    small = pruned(model, graph, {stream.name: torch.arange(16)})
    assert small.attentions[0].num_heads == HEADS  # type: ignore[index]


class Mixed(Attention):
    """Lets its heads talk to one another, so that they cannot go one by one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.roll(1, dims=2)) + self.v(x).roll(SIZE // 2, dims=2)[..., :24]


def test_heads_that_are_used_elsewhere_are_frozen_with_the_reason() -> None:
    model = encoder()
    model.attentions[0] = settle(Mixed())  # type: ignore[index,operator]
    graph = trace(model, sequences())
    assert group(graph, "attentions.0.v").frozen
    assert group(graph, "attentions.1.v").frozen == ""
    check_graph(model, sequences(), graph)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    splits = [tokens(n) for n in (64, 16, 16)]
    return Evaluator(OutputsTask(bert, *splits, name="heads"))


def fewer_heads(graph: Graph, keep: float = 0.5) -> Policy:
    return Policy(keep={g.name: keep for g in heads_of(graph)}, solver="nearest")


def test_a_file_with_fewer_heads_is_smaller_and_is_read_back(evaluator: Evaluator, tmp_path: Path) -> None:
    dense = evaluator(Policy())
    few = evaluator(fewer_heads(evaluator.graph), keep=tmp_path / "few.acz")
    assert few.measurement is not None, few.error
    assert dense.measurement is not None
    assert few.measurement.macs < dense.measurement.macs
    assert few.measurement.bytes < dense.measurement.bytes
    read = evaluator.reload(tmp_path / "few.acz").model
    attention = read.encoder.layer[0].attention.self  # type: ignore[union-attr,index]
    assert (attention.num_attention_heads, attention.all_head_size) == (2, 2 * SIZE)
    assert evaluator.task.score(read, "val") == pytest.approx(few.measurement.quality, abs=1e-9)


def test_a_whole_attention_can_go(evaluator: Evaluator) -> None:
    assert all(g.removable for g in heads_of(evaluator.graph))
    none = evaluator(fewer_heads(evaluator.graph, keep=0.0))
    assert none.measurement is not None, none.error


@pytest.mark.slow
def test_an_onnx_file_with_fewer_heads_computes_what_the_model_does(tmp_path: Path) -> None:
    splits = [tokens(n) for n in (64, 16, 16)]
    exported = Evaluator(OutputsTask(bert, *splits, name="heads"), format="onnx")
    policy = fewer_heads(exported.graph)
    found = exported(policy, keep=tmp_path / "few.onnx")
    assert found.measurement is not None, found.error
    _, model = exported.build(policy)
    session = onnxruntime.InferenceSession(tmp_path / "few.onnx")
    given = {i.name: tokens(2)[i.name].numpy() for i in session.get_inputs()}
    with torch.no_grad():
        expected = model(**tokens(2)).last_hidden_state
    torch.testing.assert_close(torch.from_numpy(session.run(None, given)[0]), expected, atol=1e-3, rtol=1e-3)
