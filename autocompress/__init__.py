"""autocompress: search compression policies for PyTorch models under a size or latency budget.

The names below are the public interface. They are loaded on first use, so that `autocompress --help` does not wait
for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocompress.artifact.packed import load
    from autocompress.engine import Compressed, Workbench, compress
    from autocompress.errors import (
        ArtifactError,
        AutocompressError,
        BudgetError,
        NothingFits,
        PolicyError,
        RunError,
        SpaceError,
        TaskError,
    )
    from autocompress.evaluate import Evaluator
    from autocompress.policy import LayerChoice, Policy, Recovery
    from autocompress.space import Space, load_space
    from autocompress.study import Settings, Study, search
    from autocompress.task import Batch, ClassificationTask, RegressionTask, Task, load_task
    from autocompress.tasks.outputs import OutputsTask
    from autocompress.trial import Budget, Evaluation, Limit, Measurement

_HOMES = {
    "artifact.packed": ("load",),
    "engine": ("Compressed", "Workbench", "compress"),
    "errors": (
        "ArtifactError",
        "AutocompressError",
        "BudgetError",
        "NothingFits",
        "PolicyError",
        "RunError",
        "SpaceError",
        "TaskError",
    ),
    "evaluate": ("Evaluator",),
    "policy": ("LayerChoice", "Policy", "Recovery"),
    "space": ("Space", "load_space"),
    "study": ("Settings", "Study", "search"),
    "task": ("Batch", "ClassificationTask", "RegressionTask", "Task", "load_task"),
    "tasks.outputs": ("OutputsTask",),
    "trial": ("Budget", "Evaluation", "Limit", "Measurement"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ArtifactError",
    "AutocompressError",
    "Batch",
    "Budget",
    "BudgetError",
    "ClassificationTask",
    "Compressed",
    "Evaluation",
    "Evaluator",
    "LayerChoice",
    "Limit",
    "Measurement",
    "NothingFits",
    "OutputsTask",
    "Policy",
    "PolicyError",
    "Recovery",
    "RegressionTask",
    "RunError",
    "Settings",
    "Space",
    "SpaceError",
    "Study",
    "Task",
    "TaskError",
    "Workbench",
    "compress",
    "load",
    "load_space",
    "load_task",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'autocompress' has no attribute {name!r}")
    return getattr(importlib.import_module(f"autocompress.{_HOME[name]}"), name)
