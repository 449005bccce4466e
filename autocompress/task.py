"""What the user brings: a trained model, data in three splits, a loss and a metric.

`Task` is the contract. `ClassificationTask` and `RegressionTask` fill it from a model and arrays; any object
with the same members will do. Knows nothing about compression.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autocompress.errors import AutocompressError, TaskError

Split = Literal["train", "val", "test"]
Direction = Literal["max", "min"]


class Batch(NamedTuple):
    """One batch. `inputs` is a tensor, a tuple (several arguments) or a dict (keyword arguments)."""

    inputs: Any
    target: Any


@runtime_checkable
class Task(Protocol):
    """What a search needs to know of a model.

    `train` batches are drawn with the training augmentation and feed calibration and recovery; `val` selects;
    `test` is read once, for the report. `val` and `test` batches must come in the same order every time.
    A task may also have `divergence(outputs, teacher_outputs, temperature) -> Tensor`, the distance that
    distillation minimises; without it, `divergence` of this module uses the squared error. And it may have
    `score_batches(model, batches) -> float`, the metric on some batches: then a search screens candidates on a part
    of a large `val` and scores the best on all of it; without it, every candidate is scored on all of `val`. And
    `details(model, split) -> {name: number}`, such as the accuracy of each class, which the report compares with the
    original's. And `views(inputs) -> iterable of inputs`: other versions of a batch's inputs for which the right
    outputs are the same, such as mirrored images, the most useful first and the same ones every time; the mean over
    them makes the dense model a better teacher.
    """

    name: str
    metric: str
    direction: Direction

    def model(self) -> nn.Module:
        """A fresh trained copy; it is also the teacher."""
        ...

    def batches(self, split: Split, seed: int) -> Iterable[Batch]:
        """One epoch of `split`; `seed` decides order and augmentation of `train`."""
        ...

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Scalar training loss."""
        ...

    def score(self, model: nn.Module, split: Split) -> float:
        """The metric of `model` on all of `split`; `model` is in evaluation mode."""
        ...


# --- helpers that every stage uses ----------------------------------------------------------------------


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for the inputs of a batch, whatever their form."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def call(model: nn.Module, inputs: Any) -> Any:
    """Run `model` on the inputs of a batch."""
    positional, named = arguments(inputs)
    return model(*positional, **named)


def tensors(value: Any) -> list[Tensor]:
    """All floating-point tensors inside outputs or inputs, in a fixed order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [t for key in value for t in tensors(value[key])]
    if isinstance(value, tuple | list):
        return [t for item in value for t in tensors(item)]
    return []


def first_output(outputs: Any) -> Tensor:
    """The first floating-point tensor in outputs. Raises `TaskError` if there is none."""
    found = tensors(outputs)
    if not found:
        raise TaskError("the model's outputs hold no floating-point tensor")
    return found[0]


def first_input(positional: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """What a module was called with first, by position or by keyword; None if with nothing."""
    return next(iter((*positional, *named.values())), None)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Inputs with `change` made to every tensor in them: dictionaries stay such, sequences become tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(mapped(item, change) for item in value)
    return value


def head(value: Any, count: int) -> Any:
    """The first `count` examples of batched inputs: tensors as long as the batch are cut, others stay whole."""
    batch = length(value)
    return mapped(value, lambda item: item[:count] if item.ndim and len(item) == batch else item)


def few(model: nn.Module, inputs: Any, count: int) -> Any:
    """`head(inputs, count)` if `model` runs on that, else all inputs: not every model takes a smaller batch."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    smaller = to_device(head(inputs, count), device)
    try:
        with torch.no_grad():
            call(model, smaller)
        return smaller
    except Exception:  # whatever a model raises when shapes do not suit it
        return to_device(inputs, device)


def rows(value: Any, index: Tensor) -> Any:
    """Examples `index` of inputs whose tensors are all as long as there are examples."""
    return mapped(value, lambda item: item[index])


def length(inputs: Any) -> int:
    """Number of examples in the inputs of a batch: the length of its first tensor."""
    if isinstance(inputs, Tensor):
        return len(inputs) if inputs.ndim else 1
    if not isinstance(inputs, Mapping | tuple | list):
        return 1
    values = list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)
    nested = (value for value in values if isinstance(value, Tensor | Mapping | tuple | list))
    return next((length(value) for value in nested), 1)


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it on `device`."""
    return mapped(value, lambda item: item.to(device))


def soft_target_divergence(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || outputs) of temperature-softened classes along dimension 1 (Hinton et al. 2015, section 2)."""
    student = F.log_softmax(outputs.float() / temperature, dim=1)
    target = F.log_softmax(teacher.float() / temperature, dim=1)
    per_class = F.kl_div(student, target, reduction="none", log_target=True)
    return per_class.sum(dim=1).mean() * temperature**2


def squared_error_divergence(outputs: Any, teacher: Any) -> Tensor:
    """Squared error of all floating-point outputs over the teacher's power; 0 is equal, 1 is as far as zero."""
    pairs = [(a, b) for a, b in zip(tensors(outputs), tensors(teacher), strict=True) if b.numel()]
    if not pairs:
        raise TaskError("the model's outputs hold no floating-point tensor; give the task a `divergence` method")
    errors = [(a.float() - b.float()).square().mean() / b.float().square().mean().clamp_min(1e-12) for a, b in pairs]
    return torch.stack(errors).mean()


def divergence(task: Task, outputs: Any, teacher: Any, temperature: float = 1.0) -> Tensor:
    """How far outputs are from the teacher's, by the task's own measure if it has one; lower is closer."""
    own = getattr(task, "divergence", None)
    if own is not None:
        return cast(Tensor, own(outputs, teacher, temperature))
    return squared_error_divergence(outputs, teacher)


def details(task: Task, model: nn.Module, split: Split) -> dict[str, float]:
    """What the task says of `model` beyond its metric, finite numbers by name; empty if it says nothing."""
    own = getattr(task, "details", None)
    found = {} if own is None else {str(name): float(value) for name, value in own(model, split).items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def counted(task: Task, split: Split) -> int | None:
    """Over how many independent inputs the metric on `split` is a share of right answers; None if it is none.

    A task of your own may say so with a member `counted(split)`: then its metric has a standard error.
    """
    own = getattr(task, "counted", None)
    return None if own is None else own(split)


def better(task: Task, a: float, b: float) -> bool:
    """Whether quality `a` is strictly better than `b`."""
    return a > b if task.direction == "max" else a < b


# --- ready-made tasks -----------------------------------------------------------------------------------

Data = tuple[Any, Any] | Callable[[], tuple[Any, Any]] | torch.utils.data.Dataset[Any]


class ArrayTask:
    """Shared by the ready-made tasks: three splits in memory and a model that was trained on them."""

    views: Callable[[Any], Iterable[Any]] | None = None

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        train: Data,
        val: Data,
        test: Data,
        *,
        name: str = "task",
        batch_size: int = 128,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        views: Callable[[Any], Iterable[Any]] | None = None,
    ) -> None:
        """`model` is a trained module or a function that builds one; a split is `(inputs, targets)` as arrays
        or tensors, a function that returns them, or a `Dataset` of pairs. `augment(inputs, generator)` changes
        a batch of `train` inputs; `views(inputs)` gives other versions of a batch, see `Task`."""
        if batch_size < 1:
            raise TaskError(f"batch_size is {batch_size}; it must be 1 or more")
        self.name, self.batch_size, self.augment = name, batch_size, augment
        if views is not None:  # a subclass may have a method of that name
            self.views = views
        self._model = model
        self._sources: dict[Split, Data] = {"train": train, "val": val, "test": test}
        self._loaded: dict[Split, tuple[Any, Tensor]] = {}

    def model(self) -> nn.Module:
        """A fresh copy of the trained model in evaluation mode."""
        if isinstance(self._model, nn.Module):
            return copy.deepcopy(self._model).eval()
        return self._model().eval()

    def split(self, split: Split) -> tuple[Any, Tensor]:
        """All inputs and targets of `split`."""
        if split not in self._loaded:
            inputs, targets = _arrays(self._sources[split], split)
            if len(inputs) != len(targets) or len(inputs) == 0:
                raise TaskError(
                    f"split {split!r} of task {self.name!r} has {len(inputs)} inputs and "
                    f"{len(targets)} targets; it needs as many of each, and at least one"
                )
            self._loaded[split] = inputs, self._targets(targets)
        return self._loaded[split]

    def _targets(self, targets: Tensor) -> Tensor:
        return targets

    def batches(self, split: Split, seed: int = 0) -> _Epoch:
        """Batches of `split`: `train` shuffled and augmented by `seed`, the others in order."""
        return _Epoch(self, split, seed)

    def prepare(self, inputs: Any) -> Any:
        """From stored inputs to what the model takes; a subclass may normalise here."""
        return inputs.float() if inputs.dtype == torch.uint8 else inputs

    def outputs(self, model: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        """The model's first output tensor for all of `batches`, and the targets."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        found, targets = [], []
        with torch.inference_mode():
            for batch in batches:
                found.append(first_output(call(model, to_device(batch.inputs, device))).detach().cpu())
                targets.append(batch.target)
        return torch.cat(found), torch.cat(targets)

    def score(self, model: nn.Module, split: Split) -> float:
        """The metric on all of `split`."""
        return self.score_batches(model, self.batches(split))

    def score_batches(self, model: nn.Module, batches: Iterable[Batch]) -> float:
        """The metric on `batches`."""
        raise NotImplementedError


class _Epoch:
    """One pass over a split; its length is known without making the batches."""

    def __init__(self, task: ArrayTask, split: Split, seed: int) -> None:
        self._task, self._split, self._seed = task, split, seed

    def __len__(self) -> int:
        return -(-len(self._task.split(self._split)[1]) // self._task.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        task, (inputs, targets) = self._task, self._task.split(self._split)
        generator = torch.Generator().manual_seed(self._seed)
        shuffled = self._split == "train"
        order = torch.randperm(len(targets), generator=generator) if shuffled else torch.arange(len(targets))
        for index in torch.split(order, task.batch_size):
            batch = task.prepare(rows(inputs, index))
            if shuffled and task.augment is not None:
                batch = task.augment(batch, generator)
            yield Batch(batch, targets[index])


class ClassificationTask(ArrayTask):
    """A classifier whose outputs are logits with classes along dimension 1; the metric is accuracy in [0, 1]."""

    metric = "accuracy"
    direction: Direction = "max"

    def _targets(self, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            raise TaskError(f"targets of classification task {self.name!r} must be class numbers, not {targets.dtype}")
        return targets.long()

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross-entropy."""
        logits = first_output(outputs)
        return F.cross_entropy(logits, batch.target.to(logits.device))

    def score_batches(self, model: nn.Module, batches: Iterable[Batch]) -> float:
        """Share of inputs whose largest logit is the target."""
        logits, targets = self.outputs(model, batches)
        return float((logits.argmax(dim=1) == targets).double().mean())

    def counted(self, split: Split) -> int | None:
        """Inputs of `split`; None where a subclass scores otherwise, or an input has several targets."""
        own = type(self)
        plain = (own.score, own.score_batches) == (ClassificationTask.score, ClassificationTask.score_batches)
        targets = self.split(split)[1]
        return len(targets) if plain and targets.ndim == 1 else None

    def details(self, model: nn.Module, split: Split) -> dict[str, float]:
        """The share of each class's inputs whose largest logit is the target."""
        logits, targets = self.outputs(model, self.batches(split))
        right = (logits.argmax(dim=1) == targets).double()
        present = sorted(set(targets.tolist()))
        return {self.class_name(c): float(right[targets == c].mean()) for c in present}

    def class_name(self, number: int) -> str:
        """What the report calls a class."""
        return f"class {number}"

    def divergence(self, outputs: Any, teacher: Any, temperature: float = 1.0) -> Tensor:
        """Temperature-softened Kullback-Leibler divergence."""
        return soft_target_divergence(first_output(outputs), first_output(teacher), temperature)


class RegressionTask(ArrayTask):
    """A model that predicts numbers; the metric is R^2, the share of the targets' variance that is explained."""

    metric = "r2"
    direction: Direction = "max"

    def _targets(self, targets: Tensor) -> Tensor:
        return targets.float()

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Mean squared error."""
        predicted = first_output(outputs)
        return F.mse_loss(predicted, batch.target.to(predicted.device).reshape(predicted.shape))

    def score_batches(self, model: nn.Module, batches: Iterable[Batch]) -> float:
        """1 - residual power / variance of the targets."""
        predicted, targets = self.outputs(model, batches)
        residual = (predicted.reshape(targets.shape).double() - targets.double()).square().sum()
        spread = (targets.double() - targets.double().mean(dim=0)).square().sum().clamp_min(1e-12)
        return float(1 - residual / spread)


def _arrays(source: Data, split: Split) -> tuple[Tensor, Tensor]:
    data: Any = source() if callable(source) and not isinstance(source, torch.utils.data.Dataset) else source
    if isinstance(data, torch.utils.data.Dataset):
        items = [data[i] for i in range(len(data))]  # type: ignore[arg-type]
        arrays = isinstance(items[0][0], np.ndarray)
        inputs = np.stack([x for x, _ in items]) if arrays else torch.stack([torch.as_tensor(x) for x, _ in items])
        data = inputs, torch.as_tensor(np.asarray([y for _, y in items]))
    if not (isinstance(data, Sequence) and len(data) == 2):
        raise TaskError(f"split {split!r} must be a pair (inputs, targets), not {type(data).__name__}")
    inputs = torch.as_tensor(data[0])
    if isinstance(data[0], np.ndarray) and inputs.dtype == torch.float64:
        inputs = inputs.float()  # NumPy's default, not a wish for double precision
    return inputs, torch.as_tensor(data[1])


# --- loading --------------------------------------------------------------------------------------------

BUILTIN = ("digits", "cifar10")


def load_task(spec: str, *, data: Path | None = None, checkpoint: Path | None = None) -> Task:
    """The task that `spec` names: `digits`, `cifar10`, `path/to/file.py:name` or `package.module:name`.

    The named object is a task or a function without arguments that returns one. `hf:PATH_OR_NAME` and `timm:NAME` are
    models of transformers and timm. `data` and `checkpoint` belong to these and `cifar10`. Raises `TaskError` naming
    the fix.
    """
    if spec.startswith(("hf:", "timm:")):
        from autocompress.tasks.library import library_task

        return library_task(spec, data, checkpoint)
    if spec == "cifar10":
        from autocompress.tasks.cifar10 import cifar10

        return cifar10(data, checkpoint)
    if data is not None or checkpoint is not None:
        raise TaskError(f"--data and --checkpoint belong to cifar10, hf: and timm:, not to {spec!r}")
    if spec == "digits":
        from autocompress.tasks.digits import digits

        return digits()
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise TaskError(
            f"no task {spec!r}: use {', '.join(BUILTIN)}, hf:MODEL, timm:MODEL, my_task.py:NAME or package.module:NAME "
            "(`autocompress init` writes a file to start from)"
        )
    found = _guarded(spec, lambda: _import(where))
    if not hasattr(found, name):
        public = [
            key for key, value in vars(found).items() if not key.startswith("_") and not isinstance(value, type(sys))
        ]
        raise TaskError(f"{where} has no {name!r}; it defines: {', '.join(public) or 'nothing'}")
    return _as_task(spec, getattr(found, name))


def _as_task(spec: str, named: Any) -> Task:
    ready = isinstance(named, Task) and not isinstance(named, type)
    task = _guarded(spec, named) if not ready and callable(named) else named
    if isinstance(task, Task) and not isinstance(task, type):
        if task.direction not in ("max", "min"):
            raise TaskError(f"{spec}: direction is {task.direction!r}; it must be 'max' or 'min'")
        return task
    missing = [m for m in ("name", "metric", "direction", "model", "batches", "loss", "score") if not hasattr(task, m)]
    raise TaskError(f"{spec} is {type(task).__name__}, not a task: it lacks {', '.join(missing)}")


def _import(where: str) -> Any:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    path = Path(where).resolve()
    if not path.is_file():
        raise TaskError(f"no task file {where}: check the path, or write one with `autocompress init {path.name}`")
    name = f"autocompress_task_{path.stem}"  # its own name could be a library's
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise TaskError(f"cannot import {where} as Python")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # a task file may import its neighbours
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    module_spec.loader.exec_module(module)
    return module


def _guarded(spec: str, action: Callable[[], Any]) -> Any:
    """Run the user's code; whatever it raises becomes one line that says where."""
    try:
        return action()
    except AutocompressError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
        said = " ".join(str(error).split())
        raise TaskError(f"{spec} raised {type(error).__name__}: {said}{where}") from error


def eager(model: nn.Module) -> nn.Module:
    """`model` without `torch.compile`, in place: what that wraps has other names, and cannot be taken apart."""
    while "_orig_mod" in model._modules:
        model = cast(nn.Module, model._modules["_orig_mod"])
    for name, child in list(model._modules.items()):  # a shared one under each of its names
        inner = child if child is None else eager(child)
        if inner is not child:
            setattr(model, name, inner)
    if model._compiled_call_impl is not None:
        model._compiled_call_impl = None
    return model


def probe(task: Task) -> tuple[nn.Module, Batch]:
    """The dense model and one `val` batch, after checking that they work together. Raises `TaskError`."""
    model = _guarded(f"{task.name}: model()", task.model)
    if not isinstance(model, nn.Module):
        raise TaskError(f"{task.name}: model() returned {type(model).__name__}, not a torch.nn.Module")
    model = eager(model).eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise TaskError(
                f"{task.name}: {name!r} has no shape yet, as its module was built without input sizes: run one batch "
                "through the model before the task gives it away"
            )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise TaskError(f"{task.name}: weight {name!r} holds NaN or infinity; load a sound checkpoint")
    first = _guarded(f"{task.name}: batches('val')", lambda: next(iter(task.batches("val", 0)), None))
    if first is None:
        raise TaskError(f"{task.name}: batches('val') is empty")
    if not (isinstance(first, tuple | list) and len(first) == 2):
        raise TaskError(f"{task.name}: batches('val') must yield (inputs, target) pairs, not {type(first).__name__}")
    batch = Batch(*first)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        outputs = _guarded(f"{task.name}: the model's forward", lambda: call(model, to_device(batch.inputs, device)))
        loss = _guarded(f"{task.name}: loss()", lambda: float(task.loss(outputs, batch)))
    if not math.isfinite(loss):
        raise TaskError(f"{task.name}: the dense model's loss is {loss}; check the checkpoint and the inputs' scale")
    return model, batch
