"""How good a teacher the dense ResNet-20 is over several views of each image: what recovery distils from.

    python benchmarks/views.py --data DIR --checkpoint resnet20_cifar10.pt

Prints a table of accuracies by number of views, and ends with one JSON line. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import nn

from autocompress import load_task
from autocompress.views import mean, others, views_of


class Teacher(nn.Module):
    """Answers with the model's mean over `count` views of its inputs."""

    def __init__(self, model: nn.Module, views: Any, count: int) -> None:
        super().__init__()
        self.model, self._views, self._count = model, views, count

    def forward(self, inputs: Any) -> Any:
        """Logits (n, 10)."""
        versions = (*others(self._views, inputs, self._count - 1), inputs)
        return mean([self.model(version) for version in versions])


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 10])
    given = parser.parse_args()
    task = load_task("cifar10", data=given.data, checkpoint=given.checkpoint)
    found: dict[int, dict[str, float]] = {}
    print("| views | val | test |\n|---:|---:|---:|")
    for count in given.views:
        teacher = Teacher(task.model(), views_of(task), count).eval()
        found[count] = {split: task.score(teacher, split) for split in ("val", "test")}  # type: ignore[arg-type]
        print(f"| {count} | {found[count]['val']:.4f} | {found[count]['test']:.4f} |", flush=True)
    print(json.dumps({"accuracy": found}))


if __name__ == "__main__":
    main()
