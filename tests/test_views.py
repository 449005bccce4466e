"""Views of inputs: who answers for several versions of an input, and who is compared with that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from autocompress import ClassificationTask, Evaluator, LayerChoice, Policy, TaskError, Workbench, compress
from autocompress.engine.distill import Teacher
from autocompress.engine.precision import PLAIN
from autocompress.measure.quality import QualityMeter, screening
from autocompress.policy import Recovery
from autocompress.task import soft_target_divergence
from autocompress.trial import Measurement
from autocompress.views import changed, mean, others, views_of


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def mirrored(inputs: Tensor) -> Iterator[Tensor]:
    yield inputs.flip(-1)
    yield -inputs


def data(count: int = 64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(count, 6, generator=draw), torch.randint(0, 3, (count,), generator=draw)


def task(views: Any = mirrored, count: int = 64, batch_size: int = 16) -> ClassificationTask:
    return ClassificationTask(model(), data(), data(count), data(), batch_size=batch_size, views=views)


# --- versions and means ---


class Pair(NamedTuple):
    logits: Tensor
    counts: Tensor


@dataclass
class Record:
    logits: Tensor
    note: str


def test_means_are_those_of_floats_in_the_structure_of_the_last() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 8.0])
    assert torch.equal(mean([a, b]), torch.tensor([2.0, 5.0]))
    assert mean([a]) is a
    found = mean([{"x": [a, (b, "text")], "n": None}, {"x": [b, (a, "last")], "n": None}])
    assert repr(found) == repr({"x": [(a + b) / 2, ((a + b) / 2, "last")], "n": None})
    pair = mean([Pair(a, torch.tensor([1])), Pair(b, torch.tensor([5])), Pair(b, torch.tensor([7]))])
    assert isinstance(pair, Pair)
    torch.testing.assert_close(pair.logits, (a + 2 * b) / 3)
    assert pair.counts.tolist() == [7]  # a count has no mean that were a count
    record = mean([Record(a, "first"), Record(b, "second")])
    assert (record.note, record.logits.tolist()) == ("second", [2.0, 5.0])


def test_the_answers_themselves_stay_as_they_were() -> None:
    answers = [{"x": torch.ones(2)}, {"x": torch.zeros(2)}]
    mean(answers)
    assert [a["x"].tolist() for a in answers] == [[1, 1], [0, 0]]
    assert changed(answers[0], lambda t: t + 1)["x"].tolist() == [2, 2]


def test_as_many_versions_as_are_wanted_or_an_error_that_says_who_lacks_them() -> None:
    x = data()[0]
    assert others(None, x, 0) == []
    assert [torch.equal(a, b) for a, b in zip(others(mirrored, x, 2), (x.flip(-1), -x), strict=True)] == [True, True]
    assert len(others(mirrored, x, 1)) == 1
    for views, count in ((None, 1), (mirrored, 3)):
        with pytest.raises(TaskError, match=rf"asks for {count + 1} views .* `views\(inputs\)` yield more"):
            others(views, x, count)


def test_a_task_may_have_views_by_an_argument_or_as_a_method() -> None:
    class Own(ClassificationTask):
        def views(self, inputs: Tensor) -> list[Tensor]:  # type: ignore[override]
            return [inputs * self.factor]

        factor = 2

    assert views_of(task()) is mirrored
    assert views_of(task(None)) is None
    own = views_of(Own(model(), data(), data(), data()))
    assert own is not None
    assert torch.equal(next(iter(own(torch.ones(2)))), torch.full((2,), 2.0))


# --- the teacher ---


class Counting(nn.Module):
    """Answers with its input's sum, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.asked = nn.Linear(1, 1), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x)
        return x[:, :1] + 10 * x[:, 1:2]


def test_the_teacher_answers_with_the_mean_and_looks_at_the_input_last() -> None:
    asked = Counting()
    teacher, x = Teacher(asked, views=mirrored), torch.tensor([[1.0, 2.0]])
    assert teacher(x, PLAIN).tolist() == [[21.0]]
    assert teacher(x, PLAIN, views=2).tolist() == [[(21 + 12) / 2]]
    assert teacher(x, PLAIN, views=3).tolist() == [[(21 + 12 - 21) / 3]]
    assert [t.tolist() for t in asked.asked[-3:]] == [[[2.0, 1.0]], [[-1.0, -2.0]], [[1.0, 2.0]]]


def test_what_was_said_of_other_numbers_of_views_is_no_answer_but_the_same_is() -> None:
    asked = Counting()
    teacher, x = Teacher(asked, views=mirrored), torch.tensor([[1.0, 2.0]])
    for _ in range(2):
        for views in (1, 2, 3):
            teacher(x, PLAIN, views=views)
    assert len(asked.asked) == 1 + 2 + 3


def trained(views: int, task_: ClassificationTask, **recovery: Any) -> dict[str, Tensor]:
    bench = Workbench(task_)
    layers = {layer.name: LayerChoice(4) for layer in bench.graph.layers}
    policy = Policy(layers, recovery=Recovery(epochs=2, lr=0.05, views=views, **recovery))
    return {name: stored.dense() for name, stored in compress(bench, policy).tensors.items()}


def test_a_student_learns_what_the_teacher_says_of_its_views() -> None:
    """Without views the student may stay what it is; with -x among them it is told to ignore the sign."""

    def signs(inputs: Tensor) -> list[Tensor]:
        return [-inputs]

    bench, x = Workbench(task(signs)), data()[0]
    layers = {layer.name: LayerChoice(8) for layer in bench.graph.layers}

    def gap(views: int) -> float:
        policy = Policy(layers, recovery=Recovery(epochs=30, lr=0.1, distill_weight=1.0, views=views))
        found = bench.realise(compress(bench, policy))
        with torch.no_grad():
            return float((found(x) - found(-x)).square().mean())

    before = float((bench.teacher(x) - bench.teacher(-x)).square().mean())
    assert gap(1) > 0.8 * before
    assert gap(2) < 0.5 * before


def test_views_change_nothing_where_nothing_is_distilled() -> None:
    one, two = (trained(views, task(), distill_weight=0.0, hint_weight=0.5) for views in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_hints_are_about_the_input_itself() -> None:
    """Versions whose outputs are the input's own: only hidden features could tell them apart."""

    def same(inputs: Tensor) -> list[Tensor]:
        return [inputs.clone()]

    one, two = (trained(views, task(same), hint_weight=1.0) for views in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = trained(2, task(), hint_weight=1.0)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_recipe_with_views_that_the_task_has_not_fails_and_says_so() -> None:
    evaluator = Evaluator(task(None))
    policy = Policy({"0": LayerChoice(4)}, recovery=Recovery(epochs=1, views=2))
    found = evaluator(policy, 1)
    assert found.status == "failed"
    assert "asks for 2 views of an input" in found.error


# --- what candidates are compared with ---


def test_the_teacher_loss_is_the_divergence_from_the_mean_over_two_views() -> None:
    task_, student = task(), nn.Sequential(model(), nn.Linear(3, 3)).eval()
    found = QualityMeter(task_, task_.model(), views=mirrored)(student)
    dense, losses, taught = task_.model(), [], []
    with torch.no_grad():
        for batch in task_.batches("val"):
            out, own = student(batch.inputs), dense(batch.inputs)
            losses.append(float(soft_target_divergence(out, own, 1.0)))
            told = (own + dense(batch.inputs.flip(-1))) / 2
            taught.append(float(soft_target_divergence(out, told, 1.0)))
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.teacher_loss == pytest.approx(sum(taught) / len(taught), rel=1e-5)
    assert found.loss != pytest.approx(found.teacher_loss, rel=0.01)
    plain = QualityMeter(task_, task_.model())(student)
    assert math.isnan(plain.teacher_loss)
    assert plain.loss == found.loss


class Keywords(nn.Module):
    """Takes two inputs, by name or by place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model()

    def forward(self, x: Tensor, bias: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x) + bias}


@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_inputs_of_any_form_reach_the_views_as_the_task_gives_them(form: str) -> None:
    heard: list[Any] = []

    class Several(ClassificationTask):
        def prepare(self, inputs: Tensor) -> Any:
            bias = torch.zeros(len(inputs), 3)
            return {"x": inputs, "bias": bias} if form == "dict" else (inputs, bias)

        def views(self, inputs: Any) -> list[Any]:  # type: ignore[override]
            heard.append(inputs)
            if form == "dict":
                return [{**inputs, "x": -inputs["x"]}]
            return [(-inputs[0], inputs[1])]

    task_ = Several(Keywords().eval(), data(), data(), data(), batch_size=16)
    found = QualityMeter(task_, task_.model(), views=task_.views)(task_.model())
    assert found.loss == pytest.approx(0, abs=1e-6)
    assert found.teacher_loss > 0.001
    assert {type(inputs).__name__ for inputs in heard} == {form}


def test_a_part_of_val_is_compared_with_its_own_views() -> None:
    task_ = task(count=200)
    meter = screening(task_, task_.model(), inputs=32, views=mirrored)
    assert meter is not None
    assert meter(task_.model()).teacher_loss > 0.001


def test_an_evaluation_holds_the_teacher_loss_where_the_task_has_views() -> None:
    policy = Policy({"0": LayerChoice(3)})
    measured = [Evaluator(*args, **kw)(policy).measurement for args, kw in (((task(),), {}), ((task(None),), {}))]
    assert [m is not None and math.isfinite(m.teacher_loss) for m in measured] == [True, False]
    quiet = Evaluator(task(), recovers=False)(policy).measurement
    assert quiet is not None
    assert math.isnan(quiet.teacher_loss)


def test_a_measurement_with_and_without_it_is_read_again() -> None:
    for value in (0.25, math.nan):
        given = Measurement(10, 20, 0.5, 0.1, teacher_loss=value)
        assert repr(Measurement.from_json(given.to_json())) == repr(given)
    old = {name: v for name, v in Measurement(10, 20, 0.5).to_json().items() if name != "teacher_loss"}
    assert math.isnan(Measurement.from_json(old).teacher_loss)


@pytest.mark.slow
def test_a_search_tries_views_where_the_task_has_some(tmp_path: Path) -> None:
    from autocompress import Settings, search
    from autocompress.journal import Journal

    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nfrom torch import nn\nfrom autocompress import ClassificationTask\n"
        "torch.manual_seed(0)\n"
        "x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))\n"
        "def task(views=lambda x: [-x]):\n"
        "    torch.manual_seed(0)\n"
        "    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()\n"
        "    return ClassificationTask(model, (x, y), (x, y), (x, y), batch_size=16, views=views)\n"
        "def plain():\n    return task(None)\n"
    )
    found = {}
    for name in ("task", "plain"):
        search(Settings(f"{file}:{name}", ("size=80%",), trials=8, epochs=1, fresh=True), tmp_path / name)
        with Journal.reading(tmp_path / name) as journal:
            trained_ = [t for t in journal.trials() if t.evaluation.policy.recovery.epochs]
        found[name] = {t.evaluation.policy.recovery.views for t in trained_}
        assert {math.isfinite(t.measured.teacher_loss) for t in trained_} == {name == "task"}
    assert 2 in found["task"]
    assert found["plain"] == {1}
