"""A task without labels: its metrics against other libraries, and a search that keeps what a model gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor, nn

from autocompress import OutputsTask, Policy, TaskError
from autocompress.evaluate import Evaluator
from autocompress.policy import LayerChoice, Recovery
from autocompress.task import Task, length, probe
from autocompress.tasks.outputs import closeness

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(90, 6, generator=DRAW)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 5))


class Named(nn.Module):
    """Takes keyword arguments, gives a dictionary whose first tensor is of integers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 4)

    def forward(self, tokens: Tensor, weight: Tensor) -> dict[str, Tensor]:
        return {"tokens": tokens, "logits": self.head((self.table(tokens) * weight.unsqueeze(-1)).mean(dim=1))}


class Same(nn.Module):
    """Gives the same for all inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.own.expand(len(x), 3)


def outputs(**options: Any) -> OutputsTask:
    return OutputsTask(**({"model": network(), "train": X[:50], "val": X[50:70], "test": X[70:]} | options))


def test_it_is_a_task_that_the_dense_model_solves() -> None:
    for metric in ("cosine", "rank", "agreement"):
        task = outputs(metric=metric)
        assert isinstance(task, Task)
        model, batch = probe(task)
        assert length(batch.inputs) == 20
        assert float(task.loss(model(batch.inputs).detach(), batch)) == pytest.approx(0.0, abs=1e-6)
        for split in ("train", "val", "test"):
            assert task.score(model, split) == pytest.approx(1.0)


def test_metrics_are_those_of_other_libraries() -> None:
    draw = np.random.default_rng(0)
    found, wanted = draw.normal(size=(2, 40, 7))
    a, b = torch.from_numpy(found), torch.from_numpy(wanted)
    similar = np.diag(cosine_similarity(found, wanted))
    assert closeness(a, b, "cosine") == pytest.approx(similar.mean())
    pairs = np.triu_indices(40, 1)
    expected = spearmanr(cosine_similarity(found)[pairs], cosine_similarity(wanted)[pairs]).statistic
    assert closeness(a, b, "rank") == pytest.approx(expected)
    assert closeness(a, b, "agreement") == np.mean(found.argmax(1) == wanted.argmax(1))


def test_ranks_do_not_depend_on_scale_or_rotation() -> None:
    a = torch.randn(30, 5, generator=DRAW)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=DRAW)).Q
    assert closeness(3 * a @ turn, a, "rank") == pytest.approx(1.0)
    assert closeness(3 * a @ turn, a, "cosine") < 0.9


def test_outputs_that_are_all_alike_keep_no_ranks() -> None:
    assert closeness(torch.ones(20, 3), torch.randn(20, 3, generator=DRAW), "rank") == 0.0


def test_training_batches_are_shuffled_together_with_what_is_wanted() -> None:
    task = outputs(batch_size=16)
    assert len(task.batches("train", 1)) == 4
    one, again, other = (torch.cat([b.inputs for b in task.batches("train", seed)]) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one.sort(dim=0).values, X[:50].sort(dim=0).values)
    model = task.model()
    for batch in task.batches("train", 3):
        torch.testing.assert_close(batch.target, model(batch.inputs).detach())
    assert torch.equal(torch.cat([b.inputs for b in task.batches("val", 5)]), X[50:70])


def test_inputs_may_be_dictionaries_tuples_arrays_and_functions() -> None:
    tokens, weight = torch.randint(0, 11, (24, 5), generator=DRAW), np.ones((24, 5))
    given = {"tokens": tokens, "weight": weight}
    task = OutputsTask(Named, given, lambda: given, (tokens, weight), batch_size=10)
    model, batch = probe(task)
    assert set(batch.inputs) == {"tokens", "weight"}
    assert batch.inputs["weight"].dtype == torch.float32
    assert batch.target.shape == (10, 4)
    assert task.score(model, "val") == task.score(model, "test") == pytest.approx(1.0)


def test_a_compressed_model_is_nearer_with_more_bits_and_after_training() -> None:
    draw = torch.Generator().manual_seed(1)
    train, val = torch.randn(512, 6, generator=draw), torch.randn(200, 6, generator=draw)
    evaluator = Evaluator(OutputsTask(network, train, val, val))

    def loss(bits: int, epochs: int = 0) -> float:
        choice = LayerChoice(bits)
        found = evaluator(Policy({"0": choice, "2": choice}, recovery=Recovery(epochs=epochs, distill_weight=0.5)))
        assert found.measurement is not None, found.error
        return found.measurement.loss

    assert loss(8) < loss(4) < loss(2)
    assert loss(2, epochs=4) < 0.8 * loss(2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metric": "accuracy"}, "metric is 'accuracy'; it must be one of cosine, rank, agreement"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"val": X[:0]}, "split 'val' of task 'outputs' has tensors of 0 inputs"),
        ({"val": (X[:3], X[:4])}, "has tensors of 3, 4 inputs"),
        ({"val": {}}, "has tensors of no inputs"),
        ({"val": X[:2], "metric": "rank"}, "2 are too few"),
        ({"model": Same, "metric": "rank"}, "all inputs are alike"),
        ({"model": nn.Flatten(0).to(torch.float32), "val": torch.arange(5)}, "no floating-point tensor"),
    ],
)
def test_what_cannot_be_is_named(options: dict[str, Any], said: str) -> None:
    def used() -> None:
        task = outputs(**options)
        task.score(task.model(), "val")

    with pytest.raises(TaskError, match=said):
        used()
