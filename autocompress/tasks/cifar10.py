"""CIFAR-10 from a `cifar-10-batches-py/` folder, and the CIFAR ResNets of He et al. 2015, section 4.2."""

from __future__ import annotations

import io
import operator
import pickle
import pickletools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from autocompress.errors import TaskError
from autocompress.task import ClassificationTask

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEPTHS = (20, 32, 56)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; a parameter-free shortcut (option A: subsample, pad channels with zeros)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet(nn.Module):
    """Depth 6n + 2. Inputs (n, 3, 32, 32), normalised; logits (n, 10)."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.depth = depth
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def architecture(depth: int = 20) -> nn.Module:
    """A CIFAR ResNet without trained weights."""
    if depth not in DEPTHS:
        raise TaskError(f"CIFAR ResNet depth is {depth}; it must be one of {DEPTHS}")
    return ResNet(depth).eval()


CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Cifar10Task(ClassificationTask):
    """Images are kept as bytes and normalised per batch; `train` is cropped and flipped at random."""

    def prepare(self, inputs: Tensor) -> Tensor:
        """uint8 (n, 3, 32, 32) to normalised float32."""
        mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
        return (inputs.float() / 255 - mean) / std

    def class_name(self, number: int) -> str:
        """The class's name."""
        return CLASSES[number]


def crop_and_flip(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Pad by 4, crop back at a random corner, flip half of the images (He et al. 2015, section 4.2)."""
    n, channels, size, _ = inputs.shape
    padded = F.pad(inputs, (4, 4, 4, 4))
    corner = torch.randint(0, 9, (n, 2), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    steps = torch.arange(size)
    rows = corner[:, :1] + steps  # (n, size)
    columns = corner[:, 1:] + torch.where(flip[:, None], size - 1 - steps, steps)
    index = torch.arange(n)[:, None, None, None]
    return padded[index, torch.arange(channels)[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def mirrored_and_moved(inputs: Tensor) -> Iterator[Tensor]:
    """The mirrored images, then both moved by two pixels each way, edges filled as in training.

    ResNet-20's mean over an image and its mirror image is right for 0.9028 of `test`, over ten of these for 0.9064,
    where it is right for 0.8858 of the images alone.
    """
    yield inputs.flip(-1)
    padded, size = F.pad(inputs, (2, 2, 2, 2)), inputs.shape[-1]
    for row, column in ((0, 2), (4, 2), (2, 0), (2, 4)):
        moved = padded[:, :, row : row + size, column : column + size]
        yield moved.flip(-1)
        yield moved


def cifar10(data: Path | None, checkpoint: Path | None) -> ClassificationTask:
    """The task on a folder and a checkpoint.

    A checkpoint has usually seen all training images, so `val` is the first half of the test images and `test`
    the second half; `train` serves calibration and recovery.
    """
    if data is None or checkpoint is None:
        raise TaskError("cifar10 needs --data DIR (with cifar-10-batches-py/) and --checkpoint FILE (a state dict)")
    state = read_checkpoint(checkpoint)
    depth = 6 * len({key.split(".")[1] for key in state if key.startswith("layer1.")}) + 2
    if depth not in DEPTHS:
        raise TaskError(f"{checkpoint} is no CIFAR ResNet-20/32/56: its layer1 has {(depth - 2) // 6} blocks")
    model = architecture(depth)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = re.sub(r"\s+", " ", str(error))[:160]
        raise TaskError(f"{checkpoint} does not fit a CIFAR ResNet-{depth}: {first}") from None
    return on_images(model, data, f"cifar10-resnet{depth}")


def on_images(model: nn.Module, data: Path, name: str) -> ClassificationTask:
    """Any classifier of normalised (n, 3, 32, 32) images on the folder `data`: `val` is the first half of the test
    images, `test` the second half. Raises `TaskError`."""
    folder = _folder(data)
    train = [read_batch(folder / f"data_batch_{i}") for i in range(1, 6)]
    test_x, test_y = read_batch(folder / "test_batch")
    half = len(test_x) // 2
    return Cifar10Task(
        model,
        (np.concatenate([x for x, _ in train]), np.concatenate([y for _, y in train])),
        (test_x[:half], test_y[:half]),
        (test_x[half:], test_y[half:]),
        name=name,
        augment=crop_and_flip,
        views=mirrored_and_moved,
    )


def _folder(data: Path) -> Path:
    for folder in (data, data / "cifar-10-batches-py"):
        if (folder / "test_batch").is_file():
            return folder
    raise TaskError(f"{data} holds no cifar-10-batches-py/ folder with data_batch_1..5 and test_batch")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """A state dict from a `.safetensors` file or a `torch.save` file, which is read without unpickling code."""
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        said = str(error).splitlines() or [type(error).__name__]
        raise TaskError(f"cannot read the checkpoint {path}: {said[0]}") from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise TaskError(f"{path} is not a state dict: save one with torch.save(model.state_dict(), PATH)")
    return {key.removeprefix("module."): value for key, value in state.items()}


class _ArraysOnly(pickle.Unpickler):
    """The public data set comes as pickles; only what rebuilds NumPy arrays is let through."""

    _allowed = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.numeric", "_frombuffer"),
            ("numpy.core.numeric", "_frombuffer"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        if name == "ndarray":
            return _Marker
        return _empty if name == "_reconstruct" else super().find_class(module, name)


class _Marker:
    """Stands for `numpy.ndarray`, which, called with a shape from the file, would allocate it."""


def _empty(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """The empty array that a pickled one begins as; its bytes then say how large it is."""
    if kind is not _Marker or shape != (0,) or code != b"b":
        raise pickle.UnpicklingError("it asks for an array without giving its bytes")
    return np.ndarray((0,), np.int8)


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) of one file of the data set. Raises `TaskError`."""
    try:
        stored = path.read_bytes()
        for code, given, _ in pickletools.genops(stored):  # looks at each length before anything is allocated by it
            if "PUT" in code.name and isinstance(given, int) and given > len(stored):  # a table of so many entries
                raise pickle.UnpicklingError(f"it remembers {given} values")
        content = _ArraysOnly(io.BytesIO(stored), encoding="bytes").load()
        pixels, named = content[b"data"], content[b"labels"]
        if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and isinstance(named, list)):
            raise TypeError("its data is no array of bytes, or its labels are no list")
        images, labels = pixels.reshape(-1, 3, 32, 32), np.array([operator.index(label) for label in named], np.int64)
    except OSError as error:
        raise TaskError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise TaskError(f"{path} is not a CIFAR-10 batch file: {error}") from None
    if labels.shape != (len(images),) or labels.min(initial=0) < 0 or labels.max(initial=0) > 9:
        raise TaskError(f"{path}: its {len(images)} images do not have one label from 0 to 9 each")
    return images, labels
