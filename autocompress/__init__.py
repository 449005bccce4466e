"""autocompress: search compression policies for PyTorch models under a size or latency budget."""

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
from autocompress.trial import Budget, Evaluation, Limit, Measurement

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
