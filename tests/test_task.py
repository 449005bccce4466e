import copy
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, r2_score
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from autocompress.errors import TaskError
from autocompress.task import (
    Batch,
    ClassificationTask,
    RegressionTask,
    Task,
    arguments,
    better,
    call,
    head,
    length,
    load_task,
    probe,
    tensors,
    to_device,
)

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(20) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def classification(**options: Any) -> ClassificationTask:
    given = {"model": network(), "train": (X, Y), "val": (X[:7], Y[:7]), "test": (X[7:], Y[7:]), "batch_size": 6}
    return ClassificationTask(**(given | options))


def regression(targets: Tensor, width: int = 1) -> RegressionTask:
    data = X, targets
    return RegressionTask(nn.Linear(4, width), data, data, data, batch_size=7)


TEXT = """
    import torch
    from torch import nn
    from autocompress import ClassificationTask

    data = torch.randn(8, 4), torch.arange(8) % 3
    number = 5
    _hidden = 1

    def task():
        return ClassificationTask(nn.Linear(4, 3), data, data, data, name="mine")

    ready = task()
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write_file(text: str = TEXT, name: str = "my_task.py") -> str:
        (tmp_path / name).write_text(textwrap.dedent(text))
        return str(tmp_path / name)

    return write_file


def complaint(spec: str, then: Callable[[Task], Any] = lambda task: task) -> str:
    """The message with which loading (and then using) the task fails."""
    with pytest.raises(TaskError) as caught:
        then(load_task(spec))
    assert len(str(caught.value).splitlines()) == 1, "the command line shows it as one line"
    return str(caught.value)


# --- loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["task", "ready"])
def test_a_task_is_an_object_or_a_function_in_a_file(write: Callable[..., str], name: str) -> None:
    task = load_task(f"{write()}:{name}")
    assert task.name == "mine"
    assert probe(task)[1].inputs.shape == (8, 4)


def test_a_task_may_be_a_class(write: Callable[..., str]) -> None:
    text = """
        import torch
        from torch import nn

        class Mine:
            name, metric, direction = "mine", "error", "min"
            def model(self): return nn.Linear(4, 3)
            def batches(self, split, seed): return [(torch.randn(8, 4), torch.randn(8, 3))]
            def loss(self, outputs, batch): return (outputs - batch.target).square().mean()
            def score(self, model, split): return 0.0
    """
    task = load_task(f"{write(text)}:Mine")
    assert isinstance(probe(task)[0], nn.Module)


def test_a_task_is_found_in_a_package(write: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(write(name="a_module_of_mine.py")).parent))
    assert load_task("a_module_of_mine:task").name == "mine"


def test_a_task_file_may_import_its_neighbours(write: Callable[..., str]) -> None:
    write("WIDTH = 3\n", "neighbour_of_my_task.py")
    path = write(TEXT.replace("import torch\n", "import torch, neighbour_of_my_task\n", 1))
    assert load_task(f"{path}:task").name == "mine"


def test_a_changed_file_is_read_again(write: Callable[..., str]) -> None:
    assert load_task(f"{write()}:task").name == "mine"
    assert load_task(f"{write(TEXT.replace('mine', 'yours!'))}:task").name == "yours!"


@pytest.mark.parametrize("spec", ["cifar", "my_task.py", "my_task.py:", ":task", ":", ""])
def test_a_name_that_is_no_task_lists_what_is(spec: str) -> None:
    message = complaint(spec)
    assert (
        f"no task {spec!r}: use digits, cifar10, hf:MODEL, timm:MODEL, my_task.py:NAME or package.module:NAME"
        in message
    )
    assert "autocompress init" in message


def test_a_missing_file_names_the_command_that_writes_one(tmp_path: Path) -> None:
    path = tmp_path / "absent.py"
    message = complaint(f"{path}:task")
    assert message == f"no task file {path}: check the path, or write one with `autocompress init absent.py`"


def test_a_missing_name_lists_the_present_ones(write: Callable[..., str]) -> None:
    path = write()
    assert (
        complaint(f"{path}:taks") == f"{path} has no 'taks'; it defines: ClassificationTask, data, number, task, ready"
    )
    assert complaint(f"{write('')}:task").endswith("it defines: nothing")


def test_a_missing_package_is_named() -> None:
    assert "no_such_package_anywhere" in complaint("no_such_package_anywhere.tasks:task")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("1 / 0\n", ["ZeroDivisionError", "division by zero", "my_task.py, line 1"]),
        ("x = 1\nimport no_such_module\n", ["ModuleNotFoundError", "no_such_module", "my_task.py, line 2"]),
        ("def task(:\n", ["SyntaxError", "my_task.py, line 1"]),
        ("raise ValueError('two\\nlines')\n", ["ValueError", "two", "my_task.py, line 1"]),
        ("raise SystemExit('no data')\n", ["SystemExit", "no data"]),
        ("def task():\n    return {}['data']\n", ["KeyError", "'data'", "my_task.py, line 2"]),
        ("def task(size):\n    return size\n", ["TypeError", "size"]),
        ("from autocompress import TaskError\ndef task():\n    raise TaskError('get the data')\n", ["get the data"]),
    ],
)
def test_a_file_that_raises_is_named_with_its_line(write: Callable[..., str], text: str, named: list[str]) -> None:
    message = complaint(f"{write(text)}:task")
    for part in named:
        assert part in message


@pytest.mark.parametrize("value", ["5", "None", "'digits'", "lambda: 5", "{'name': 'mine'}"])
def test_a_thing_that_is_no_task_is_told_what_it_lacks(write: Callable[..., str], value: str) -> None:
    message = complaint(f"{write(f'task = {value}')}:task")
    assert "not a task: it lacks" in message
    assert "metric, direction, model, batches, loss, score" in message


def test_a_direction_is_max_or_min(write: Callable[..., str]) -> None:
    path = write(TEXT + "    ready.direction = 'up'\n")
    assert complaint(f"{path}:ready") == f"{path}:ready: direction is 'up'; it must be 'max' or 'min'"


def test_data_and_checkpoint_belong_to_cifar10(tmp_path: Path) -> None:
    for options in ({"data": tmp_path}, {"checkpoint": tmp_path}):
        with pytest.raises(
            TaskError, match="--data and --checkpoint belong to cifar10, hf: and timm:, not to 'digits'"
        ):
            load_task("digits", **options)
    with pytest.raises(TaskError, match=r"cifar10 needs --data DIR .* and --checkpoint FILE"):
        load_task("cifar10")


# --- the first look at a task ---------------------------------------------------------------------------------


def refusal(**options: Any) -> str:
    methods = {name: options.pop(name) for name in ("batches", "loss") if name in options}
    task = classification(**options)
    for name, method in methods.items():
        setattr(task, name, method)
    with pytest.raises(TaskError) as caught:
        probe(task)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_sound_task_gives_its_model_and_a_batch() -> None:
    model, batch = probe(classification(model=network().train()))
    assert not model.training
    assert isinstance(batch, Batch)
    assert torch.equal(batch.inputs, X[:6])
    assert torch.equal(batch.target, Y[:6])


def test_a_model_function_that_fails_is_named() -> None:
    def broken() -> nn.Module:
        raise FileNotFoundError("weights.pt")

    assert "task: model() raised FileNotFoundError: weights.pt (test_task.py, line" in refusal(model=broken)


def test_a_model_must_be_a_module() -> None:
    task = classification()
    task.model = lambda: "resnet"  # type: ignore[assignment, method-assign, return-value]
    with pytest.raises(TaskError, match=r"model\(\) returned str, not a torch\.nn\.Module"):
        probe(task)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = value
    assert "weight '2.weight' holds NaN or infinity; load a sound checkpoint" in refusal(model=model)


def test_statistics_that_are_not_finite_are_noticed() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), network())
    model[0].running_var.fill_(torch.nan)
    assert "the dense model's loss is nan; check the checkpoint" in refusal(model=model)


def test_a_forward_that_fails_is_named() -> None:
    message = refusal(model=nn.Linear(5, 3))
    assert "task: the model's forward raised RuntimeError: mat1 and mat2 shapes cannot be multiplied" in message


def test_a_loss_that_fails_is_named() -> None:
    assert "task: loss() raised" in refusal(train=(X, Y + 5), val=(X, Y + 5))


def test_an_error_of_several_lines_becomes_one() -> None:
    def broken(*_: object) -> Tensor:
        raise ValueError("first\nsecond")

    assert "loss() raised ValueError: first" in refusal(loss=broken)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    def infinite(*_: object) -> Tensor:
        return torch.tensor(torch.inf)

    assert "the dense model's loss is inf; check the checkpoint and the inputs' scale" in refusal(loss=infinite)


def test_an_empty_split_is_refused() -> None:
    message = refusal(val=(X[:0], Y[:0]))
    assert "split 'val' of task 'task' has 0 inputs and 0 targets" in message


def test_batches_of_nothing_are_refused() -> None:
    assert refusal(batches=lambda *_: []) == "task: batches('val') is empty"


@pytest.mark.parametrize("batch", [X, (X,), (X, Y, Y), {"inputs": X, "target": Y}, "ab", None])
def test_a_batch_must_be_a_pair(batch: Any) -> None:
    message = refusal(batches=lambda *_: [batch])
    assert "task: batches('val') must yield (inputs, target) pairs, not" in message or "is empty" in message


def test_batches_that_fail_are_named() -> None:
    def broken(*_: object) -> Any:
        raise OSError("disk")
        yield

    assert "batches('val') raised OSError: disk" in refusal(batches=broken)


# --- ready-made tasks -----------------------------------------------------------------------------------------


class Pairs(Dataset[Any]):
    """A data set of NumPy images and plain numbers, as torchvision's are."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index >= 20:
            raise IndexError
        return X[index].numpy(), int(Y[index])


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        [X, Y],
        (X.numpy(), Y.numpy()),
        (X.numpy(), Y.numpy().astype(np.uint8)),
        (X.tolist(), Y.tolist()),
        lambda: (X, Y),
        lambda: Pairs(),
        Pairs(),
        TensorDataset(X, Y),
        (X.double().numpy(), Y.numpy()),
    ],
    ids=["tensors", "list", "arrays", "uint8", "lists", "function", "maker", "dataset", "tensor dataset", "float64"],
)
def test_data_may_come_in_every_usual_form(data: Any) -> None:
    task = classification(train=data, val=data, test=data, batch_size=20)
    model, batch = probe(task)
    torch.testing.assert_close(batch.inputs, X)
    assert batch.target.tolist() == Y.tolist()
    assert batch.target.dtype == torch.int64
    assert task.score(model, "test") == accuracy_score(Y, model(X).argmax(1))


def test_a_function_is_asked_for_its_data_once() -> None:
    asked = []
    task = classification(val=lambda: asked.append(1) or (X, Y))
    assert not asked
    for _ in range(3):
        list(task.batches("val"))
    assert asked == [1]


@pytest.mark.parametrize("data", [X, (X,), (X, Y, Y), 5, {"x": X, "y": Y}, np.zeros((2, 3))])
def test_data_of_another_form_is_refused(data: Any) -> None:
    with pytest.raises(TaskError, match=r"split 'val' must be a pair \(inputs, targets\), not"):
        classification(val=data).split("val")


def test_inputs_and_targets_must_be_as_many() -> None:
    with pytest.raises(TaskError, match="split 'train' of task 'task' has 20 inputs and 19 targets"):
        classification(train=(X, Y[:19])).split("train")


def test_classes_must_be_whole_numbers() -> None:
    with pytest.raises(TaskError, match=r"must be class numbers, not torch\.float32"):
        classification(val=(X, Y.float())).split("val")


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_holds_at_least_one(size: int) -> None:
    with pytest.raises(TaskError, match=f"batch_size is {size}; it must be 1 or more"):
        classification(batch_size=size)


def test_every_model_is_a_fresh_copy_in_evaluation_mode() -> None:
    task = classification(model=network().train())
    one, two = task.model(), task.model()
    with torch.no_grad():
        one[0].weight.zero_()
    assert not two.training
    assert two[0].weight.abs().sum() > 0
    assert not classification(model=lambda: network().train()).model().training


def test_bytes_become_floats_and_words_stay_numbers() -> None:
    task = classification()
    assert task.prepare(torch.tensor([255], dtype=torch.uint8)).dtype == torch.float32
    assert task.prepare(torch.tensor([7])).dtype == torch.int64


# --- batches --------------------------------------------------------------------------------------------------


def jitter(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs + torch.rand(inputs.shape, generator=generator)


def stacked(task: ClassificationTask, split: Any, seed: int = 0) -> tuple[list[list[float]], list[int]]:
    batches = list(task.batches(split, seed))
    return torch.cat([b.inputs for b in batches]).tolist(), torch.cat([b.target for b in batches]).tolist()


@pytest.mark.parametrize("augment", [None, jitter])
def test_training_batches_are_decided_by_the_seed(augment: Any) -> None:
    task = classification(augment=augment)
    assert stacked(task, "train", 1) == stacked(task, "train", 1)
    assert stacked(task, "train", 1) != stacked(task, "train", 2)


def test_training_batches_do_not_depend_on_or_change_the_global_seed() -> None:
    task = classification(augment=jitter)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = stacked(task, "train", 3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert stacked(task, "train", 3) == first


def test_training_batches_hold_every_example_once_with_its_target() -> None:
    inputs, targets = stacked(classification(), "train", 5)
    order = [X.tolist().index(x) for x in inputs]
    assert sorted(order) == list(range(20)) != order
    assert targets == Y[order].tolist()


@pytest.mark.parametrize("split", ["val", "test"])
def test_other_batches_are_in_order_and_not_augmented(split: Any) -> None:
    task = classification(augment=jitter)
    inputs, targets = task.split(split)
    for seed in (0, 1):
        assert stacked(task, split, seed) == (inputs.tolist(), targets.tolist())


def test_an_epoch_knows_its_length_and_can_be_read_twice() -> None:
    epoch = classification().batches("train", 0)
    assert len(epoch) == 4
    assert [len(b.target) for b in epoch] == [6, 6, 6, 2]
    assert [b.target.tolist() for b in epoch] == [b.target.tolist() for b in epoch]


def test_augmenting_does_not_change_the_data() -> None:
    def spoil(inputs: Tensor, _: torch.Generator) -> Tensor:
        return inputs.zero_()

    task = classification(augment=spoil)
    list(task.batches("train", 0))
    assert torch.equal(task.split("train")[0], X)


# --- metrics and losses -----------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(2, 5), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_accuracy_is_scikit_learns(count: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    task = ClassificationTask(nn.Identity(), *[(logits, labels)] * 3, batch_size=7)
    assert task.score(nn.Identity(), "val") == pytest.approx(accuracy_score(labels, logits.argmax(1)))


@given(st.integers(2, 40), st.integers(1, 3), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_r2_is_scikit_learns(count: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(count, width, generator=generator) * 3 + 1
    predicted = targets + torch.randn(count, width, generator=generator)
    task = RegressionTask(nn.Identity(), *[(predicted, targets)] * 3, batch_size=7)
    expected = r2_score(targets, predicted, multioutput="variance_weighted")
    assert task.score(nn.Identity(), "test") == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("shape", [(20,), (20, 1)])
def test_r2_does_not_mind_a_trailing_dimension(shape: tuple[int, ...]) -> None:
    task = regression(torch.linspace(0, 1, 20).reshape(shape))
    model, batch = probe(task)
    assert task.score(model, "val") == pytest.approx(r2_score(torch.linspace(0, 1, 20), model(X).detach()), rel=1e-4)
    expected = (model(batch.inputs).flatten() - batch.target.flatten()).square().mean()
    assert task.loss(model(batch.inputs), batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_r2_is_one_for_the_truth_and_zero_for_the_mean() -> None:
    class Answer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :1]

    for inputs, expected in ((X[:, :1], 1.0), (X[:, :1].mean().expand(20, 1), 0.0)):
        task = RegressionTask(Answer(), *[(inputs, X[:, 0])] * 3)
        assert task.score(Answer(), "val") == pytest.approx(expected, abs=1e-6)


def test_whole_number_targets_are_taken_by_a_regression() -> None:
    assert regression(torch.arange(20)).split("val")[1].dtype == torch.float32


def test_the_first_tensor_of_several_outputs_counts() -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"label": x.argmax(1), "logits": x, "more": -x}

    task = ClassificationTask(Several(), *[(torch.eye(3), torch.arange(3))] * 3)
    assert task.score(Several(), "val") == 1.0
    assert probe(task)[1].target.tolist() == [0, 1, 2]


def test_scoring_leaves_no_gradients() -> None:
    task = classification()
    model = task.model()
    task.score(model, "val")
    assert all(p.grad is None for p in model.parameters())


def test_better_follows_the_direction() -> None:
    up, down = classification(), classification()
    down.direction = "min"
    assert better(up, 2, 1)
    assert better(down, 1, 2)
    assert not better(up, 1, 1)
    assert not better(down, 1, 1)


def test_ready_made_tasks_keep_to_the_protocol() -> None:
    assert isinstance(classification(), Task)
    assert isinstance(regression(X[:, 0]), Task)
    assert isinstance(copy.deepcopy(classification()), Task)


# --- inputs of every form -----------------------------------------------------------------------------------------


def test_inputs_are_passed_by_their_form() -> None:
    def keywords(**named: int) -> dict[str, int]:
        return named

    assert arguments(X) == ((X,), {})
    assert arguments((1, 2)) == arguments([1, 2]) == ((1, 2), {})
    assert arguments({"a": 1}) == ((), {"a": 1})
    assert call(keywords, {"a": 1}) == {"a": 1}  # type: ignore[arg-type]


NESTED = {"image": torch.ones(5, 2), "more": (torch.zeros(5), [torch.arange(5), "text"]), "scale": torch.tensor(2.0)}


def test_float_tensors_are_found_in_order() -> None:
    assert [t.shape for t in tensors(NESTED)] == [(5, 2), (5,), ()]
    assert tensors("text") == tensors(None) == tensors(torch.arange(3)) == []


def test_the_first_examples_of_nested_inputs() -> None:
    few = head(NESTED, 2)
    assert few["image"].shape == (2, 2)
    assert few["more"][1][0].tolist() == [0, 1]
    assert few["more"][1][1] == "text"
    assert few["scale"] == 2.0
    assert length(NESTED) == length((X[:5], 3)) == 5
    assert length(few) == 2


def test_everything_moves_to_a_device() -> None:
    moved = to_device(NESTED, torch.device("meta"))
    assert {t.device.type for t in tensors(moved)} == {"meta"}
    assert moved["more"][1][1] == "text"
