"""Every error this package raises on purpose.

    AutocompressError            exit code 2: the input is wrong, the message names the fix
    ├── BudgetError              a budget that cannot be read
    ├── TaskError                a task that cannot be loaded, built or run
    ├── SpaceError               a search space file that is wrong
    ├── PolicyError              a policy that is malformed or does not belong to the model
    ├── RunError                 a run folder that is in the way, missing, locked or of another search
    ├── ArtifactError            a file that is torn, foreign or does not belong to the task
    ├── ExportError              a model that ONNX or its runtime does not take
    ├── LatencyError             a latency table that cannot be read, or is of another model or deployment
    └── NothingFits              exit code 3: no policy fits the budget; names the nearest reachable point

Anything else that escapes is a bug and is shown as one.
"""

from __future__ import annotations


class AutocompressError(Exception):
    """Base of the tree; `exit_code` is what the command line exits with."""

    exit_code = 2


class BudgetError(AutocompressError):
    """A budget text or value that cannot be used."""


class TaskError(AutocompressError):
    """The task could not be loaded, or its model or data do not work."""


class SpaceError(AutocompressError):
    """A search space file with an unknown key, an empty choice or a value out of range."""


class PolicyError(AutocompressError):
    """A policy that is malformed or names layers and groups that the model does not have."""


class RunError(AutocompressError):
    """A run folder that exists, is missing, is locked by another process, or belongs to another search."""


class ArtifactError(AutocompressError):
    """An artifact that is damaged, of another format, or of another architecture."""


class ExportError(AutocompressError):
    """A model that ONNX or its runtime does not take, or that computes something else there."""


class LatencyError(AutocompressError):
    """A latency table that cannot be read, or that belongs to another model, runtime, batch size or thread count."""


class NothingFits(AutocompressError):
    """No policy of the search space fits the budget."""

    exit_code = 3
