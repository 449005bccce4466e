"""Who said the vowel? A GRU and a 1-D convolutional network on 640 recordings that come with the package aeon.

    pip install --no-deps aeon==1.6.0
    autocompress search docs/examples/sequences.py:gru --budget size=10%

`:cnn` is the convolutional network. Nothing is downloaded and aeon is not imported: the data is a text file in its
folder. The first use trains the network (seeded, 20 seconds on one core) and keeps it in the user's cache folder.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from autocompress import ClassificationTask, TaskError
from autocompress.tasks.trained import trained

STEPS, CHANNELS, SPEAKERS = 29, 12, 9
SEED, EPOCHS, BATCH = 0, 60, 32
VERSION = 1  # raise when a network or its training changes, so that an old cache is not read


# --- data -----------------------------------------------------------------------------------------------------


def recordings() -> tuple[np.ndarray, np.ndarray]:
    """Japanese Vowels (Kudo et al. 1999): coefficients (640, 29, 12) of two vowels, and which of 9 men spoke them.

    Recordings have 7 to 29 steps; shorter ones begin with zeros, so that all end at the last step.
    """
    found = importlib.util.find_spec("aeon")
    if found is None or not found.submodule_search_locations:
        raise TaskError("the data comes with the package aeon, which is not installed: pip install --no-deps aeon")
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "JapaneseVowels"
    parts = ("TRAIN", "TEST")
    lines = [line for part in parts for line in _lines(folder / f"JapaneseVowels_{part}.ts")]
    return np.stack([_series(line) for line in lines]), np.array([int(line.rpartition(":")[2]) - 1 for line in lines])


def _lines(path: Path) -> list[str]:
    """The recordings of a `.ts` file: channels, each with its values, and the class, between colons."""
    _, _, body = path.read_text(encoding="utf-8").partition("@data")
    return body.split()


def _series(line: str) -> np.ndarray:
    channels = [[float(value) for value in channel.split(",")] for channel in line.split(":")[:-1]]
    padded = np.zeros((STEPS, CHANNELS), dtype=np.float32)
    padded[STEPS - len(channels[0]) :] = np.transpose(channels)
    return padded


def splits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """256 recordings to train on, 192 in `val` and 192 in `test`, each with the same mix of speakers.

    The data's own two parts are drawn anew: they leave no `val`.
    """
    x, y = recordings()
    train_x, rest_x, train_y, rest_y = train_test_split(x, y, test_size=384, random_state=SEED, stratify=y)
    val_x, test_x, val_y, test_y = train_test_split(rest_x, rest_y, test_size=192, random_state=SEED, stratify=rest_y)
    return {"train": (train_x, train_y), "val": (val_x, val_y), "test": (test_x, test_y)}


def noisy(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Each recording up to a tenth louder or softer, with noise where it is not padding."""
    loudness = 1 + 0.2 * (torch.rand(len(inputs), 1, 1, generator=generator) - 0.5)
    noise = 0.05 * torch.randn(inputs.shape, generator=generator)
    return loudness * inputs + noise * (inputs != 0)


# --- networks -------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Inputs (n, steps, 12); logits (n, 9) from the mean of a two-layer GRU's states in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(CHANNELS, 64, num_layers=2, batch_first=True, bidirectional=True, dropout=0.3)
        self.classifier = nn.Linear(128, SPEAKERS)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.gru(x)[0].mean(dim=1))


class Convolutional(nn.Module):
    """Inputs (n, steps, 12); logits (n, 9): fully convolutional as in Wang et al. 2016, 1611.06455, half as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_block(CHANNELS, 64, 7), _block(64, 128, 5), _block(128, 64, 3))
        self.classifier = nn.Linear(64, SPEAKERS)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x.transpose(1, 2)).mean(dim=2))


def _block(inputs: int, outputs: int, kernel: int) -> nn.Module:
    convolution = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm1d(outputs), nn.ReLU())


# --- tasks ----------------------------------------------------------------------------------------------------


def gru() -> ClassificationTask:
    """The recurrent network's task."""
    return _task("gru", Recurrent)


def cnn() -> ClassificationTask:
    """The convolutional network's task."""
    return _task("cnn", Convolutional)


def _task(name: str, network: Callable[[], nn.Module]) -> ClassificationTask:
    data = splits()
    return ClassificationTask(
        lambda: trained(f"vowels-{name}-v{VERSION}", network, _train, SEED),
        data["train"],
        data["val"],
        data["test"],
        name=f"vowels-{name}",
        batch_size=BATCH,
        augment=noisy,
    )


def _train(model: nn.Module) -> None:
    data = splits()
    task = ClassificationTask(model, data["train"], data["val"], data["test"], batch_size=BATCH, augment=noisy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    model.train()
    for epoch in range(EPOCHS):
        for batch in task.batches("train", SEED + epoch):
            optimizer.zero_grad()
            task.loss(model(batch.inputs), batch).backward()
            optimizer.step()
        schedule.step()
