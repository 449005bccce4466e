"""Two more CIFAR-10 networks for the latency benchmark: a depthwise-separable one and an MLP.

    python benchmarks/networks.py --data DIR

A ResNet-20 is all dense 3x3 convolutions. These stand for the other two cases that a runtime meets: convolutions split
into depthwise and pointwise parts (MobileNet, arXiv 1704.04861, section 3.1), and matrix-vector products that wait for
their weights. Each is trained on first use and kept in the user's cache folder. Ends with one JSON line. Knows nothing
about compression. `CIFAR10=DIR autocompress search benchmarks/networks.py:depthwise` searches one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress import Workbench
from autocompress.errors import TaskError
from autocompress.files import cache_folder, write
from autocompress.task import ClassificationTask
from autocompress.tasks.cifar10 import on_images, read_checkpoint

# (channels in, channels out, stride) of each depthwise block
BLOCKS = ((64, 128, 1), (128, 256, 2), (256, 256, 1), (256, 256, 2), (256, 256, 1), (256, 256, 1))


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum and a one-cycle learning rate (Smith & Topin, arXiv 1708.07120, section 3)."""

    epochs: int
    peak: float
    small: int = 0  # of these epochs on images of 24x24 pixels, which cost half as much; only without a flatten
    weight_decay: float = 5e-4
    seed: int = 0


def normalised(layer: nn.Module, channels: int) -> list[nn.Module]:
    """A convolution, its batch norm and ReLU."""
    return [layer, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """3x3 depthwise, then 1x1 pointwise convolution."""
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
    pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
    return nn.Sequential(*normalised(depthwise, inputs), *normalised(pointwise, outputs))


class DepthwiseNet(nn.Module):
    """Inputs (n, 3, 32, 32), normalised; logits (n, 10)."""

    def __init__(self, blocks: tuple[tuple[int, int, int], ...] = BLOCKS) -> None:
        super().__init__()
        first, last = blocks[0][0], blocks[-1][1]
        self.stem = nn.Sequential(*normalised(nn.Conv2d(3, first, 4, 2, 1, bias=False), first))
        self.blocks = nn.Sequential(*(block(*shape) for shape in blocks))
        self.classifier = nn.Linear(last, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))  # (n, last, 4, 4)
        return self.classifier(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def mlp(widths: tuple[int, int] = (1024, 512)) -> nn.Module:
    """Inputs (n, 3, 32, 32), normalised; logits (n, 10). Batch norm folds away and dropout ends with training."""
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = 3 * 32 * 32
    for width in widths:
        layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 10))


def depthwise_task(data: Path) -> ClassificationTask:
    """The depthwise-separable network; the first call trains it (about 13 minutes of one core)."""
    return _task(DepthwiseNet, data, "cifar10-depthwise", Recipe(epochs=7, peak=0.2, small=5))


def mlp_task(data: Path) -> ClassificationTask:
    """The MLP; the first call trains it (about 4 minutes of one core)."""
    return _task(mlp, data, "cifar10-mlp", Recipe(epochs=8, peak=0.1))


def depthwise() -> ClassificationTask:
    """`depthwise_task` on the folder that the environment names."""
    return depthwise_task(Path(os.environ["CIFAR10"]))


def perceptron() -> ClassificationTask:
    """`mlp_task` on the folder that the environment names."""
    return mlp_task(Path(os.environ["CIFAR10"]))


def _task(build: Callable[[], nn.Module], data: Path, name: str, recipe: Recipe) -> ClassificationTask:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build()
        task = on_images(model, data, name)
        key = hashlib.sha256(repr((model, recipe)).encode()).hexdigest()[:12]
        path = cache_folder() / f"{name}-{key}.pt"
        try:
            model.load_state_dict(read_checkpoint(path))
        except (TaskError, RuntimeError):  # absent, torn or of another shape: make it again
            train(model, task, recipe)
            content = io.BytesIO()
            torch.save(model.state_dict(), content)
            write(path, content.getvalue())
    return task


def train(model: nn.Module, task: ClassificationTask, recipe: Recipe) -> None:
    """Train in place with the task's augmentation; progress goes to stderr."""
    steps = recipe.epochs * len(task.batches("train"))
    decay = recipe.weight_decay
    optimizer = torch.optim.SGD(model.parameters(), recipe.peak, momentum=0.9, weight_decay=decay, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.peak, total_steps=steps, cycle_momentum=False)
    start = perf_counter()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # quicker on a CPU
    for epoch in range(recipe.epochs):
        model.train()
        for batch in task.batches("train", recipe.seed + epoch):
            inputs = F.interpolate(batch.inputs, (24, 24), mode="area") if epoch < recipe.small else batch.inputs
            optimizer.zero_grad()
            task.loss(model(inputs), batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        model.eval()
        val, seconds = task.score(model, "val"), perf_counter() - start
        print(f"{task.name}: epoch {epoch + 1}/{recipe.epochs}, val {val:.4f}, {seconds:.0f} s", file=sys.stderr)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def measured(build: Callable[[Path], ClassificationTask], data: Path) -> dict[str, float]:
    """Size and accuracy of the trained network, and the seconds that making it took (few, if it was cached)."""
    start = perf_counter()
    task = build(data)
    seconds = perf_counter() - start
    model = task.model()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": Workbench(task).graph.dense_macs,
        "val": round(task.score(model, "val"), 4),
        "test": round(task.score(model, "test"), 4),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Train both, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    print(json.dumps({"depthwise": measured(depthwise_task, data), "mlp": measured(mlp_task, data)}))


if __name__ == "__main__":
    main()
