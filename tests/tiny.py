"""The smallest model that has every kind of tensor a file can hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autocompress import ClassificationTask, Workbench


class Tiny(nn.Module):
    """Few bytes, every kind of tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1))
        self.fc = nn.Linear(4, 3)
        self.register_buffer("steps", torch.tensor([3, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(torch.relu(self.bn(self.conv(x)))).mean(dim=(2, 3)))


def tiny_workbench() -> tuple[Workbench, Tiny]:
    """Of a model that is the same each time, and that model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = torch.randn(8, 1, 5, 5), torch.arange(8) % 3
        model = Tiny()
    return Workbench(ClassificationTask(model, data, data, data, name="tiny")), model
