"""scikit-learn's 1,797 handwritten digits and a residual network of 4.7 MB: real, offline, ready in seconds."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from autocompress.task import ClassificationTask
from autocompress.tasks.trained import trained as kept

SEED = 0
EPOCHS = 8
VERSION = 1  # raise when the network or its training changes, so that an old cache is not read


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, section 3); 1x1 convolution where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """Inputs (n, 1, 8, 8) in [0, 1]; logits (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 64, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(64)
        self.stages = nn.Sequential(Residual(64, 64, 1), Residual(64, 128, 2), Residual(128, 256, 2))
        self.classifier = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.bn(self.conv(x))))
        return self.classifier(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def shift(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to one pixel both ways, edges filled with zeros."""
    padded = F.pad(inputs, (1, 1, 1, 1))
    size = inputs.shape[-1]
    corner = torch.randint(0, 3, (len(inputs), 2), generator=generator)
    rows = corner[:, :1] + torch.arange(size)  # (n, size)
    columns = corner[:, 1:] + torch.arange(size)
    index = torch.arange(len(inputs))[:, None, None]
    return padded[index, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def splits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (n, 1, 8, 8) in [0, 1]: 60% train, 20% val, 20% test, each with the same mix of digits."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    train_x, rest_x, train_y, rest_y = train_test_split(
        images, labels, test_size=0.4, random_state=SEED, stratify=labels
    )
    val_x, test_x, val_y, test_y = train_test_split(rest_x, rest_y, test_size=0.5, random_state=SEED, stratify=rest_y)
    return {"train": (train_x, train_y), "val": (val_x, val_y), "test": (test_x, test_y)}


def digits() -> ClassificationTask:
    """The built-in task; the first call trains the network and caches it."""
    data = splits()
    return ClassificationTask(
        trained, data["train"], data["val"], data["test"], name="digits", batch_size=32, augment=shift
    )


def architecture() -> nn.Module:
    """The network without trained weights."""
    return DigitsNet().eval()


def trained() -> nn.Module:
    """The trained network, from the cache or trained now (seeded, a few seconds)."""
    return kept(f"digits-v{VERSION}", architecture, _train, SEED)


def _train(model: nn.Module) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
    data = splits()
    task = ClassificationTask(model, data["train"], data["val"], data["test"], batch_size=64, augment=shift)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    model.train()
    for epoch in range(EPOCHS):
        for batch in task.batches("train", SEED + epoch):
            optimizer.zero_grad()
            task.loss(model(batch.inputs), batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    model.eval()
