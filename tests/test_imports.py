"""The arrows between modules: who may know of whom. Checked on the source, without importing anything."""

import ast
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import autocompress

ROOT = Path(autocompress.__file__).parent
MODULES = {
    ".".join(("autocompress", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def at_module_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run on import: not those inside functions, nor under `if TYPE_CHECKING`."""
    found: list[ast.stmt] = []
    waiting = list(tree.body)
    while waiting:
        statement = waiting.pop()
        found.append(statement)
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            waiting += statement.orelse
            continue
        for field in ("body", "orelse", "finalbody", "handlers"):
            waiting += [s for s in getattr(statement, field, []) if isinstance(s, ast.stmt)]
            waiting += [s for h in getattr(statement, "handlers", []) for s in h.body]
    return found


def named(statement: ast.AST) -> set[str]:
    """Full names of the modules that an import statement reads."""
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names}
    if isinstance(statement, ast.ImportFrom):
        assert statement.level == 0, "imports are absolute"
        submodules = {f"{statement.module}.{alias.name}" for alias in statement.names}
        return {str(statement.module)} | (submodules & set(MODULES))
    return set()


@cache
def imports(module: str, everywhere: bool = False) -> frozenset[str]:
    """What `module` imports when it is imported, or (`everywhere`) also later, inside functions."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    statements = ast.walk(tree) if everywhere else at_module_level(tree)
    return frozenset(name for statement in statements for name in named(statement))


def reached(module: str) -> dict[str, str]:
    """Everything that importing `module` imports, with the module of ours that does."""
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        for name in imports(current):
            if name not in found:
                found[name] = current
                if name in MODULES and name != "autocompress":
                    waiting.append(name)
    return found


def direct(module: str) -> set[str]:
    """Modules of ours that `module` reads anywhere, without the prefix."""
    return {n.removeprefix("autocompress.") for n in imports(module, everywhere=True) if n.startswith("autocompress.")}


def of(package: str) -> list[str]:
    return sorted(name for name in MODULES if name == package or name.startswith(f"{package}."))


@pytest.mark.parametrize(
    "module",
    [
        "errors",
        "policy",
        "trial",
        "front",
        "space",
        "graph",
        "profile",
        "rungs",
        "lessons",
        "controllers.base",
        "controllers.surrogate",
        "controllers.knapsack",
    ],
)
def test_plain_modules_reach_no_torch(module: str) -> None:
    found = reached(f"autocompress.{module}")
    heavy = {n: by for n, by in found.items() if n.split(".")[0] in ("torch", "torch_pruning", "safetensors", "optuna")}
    assert not heavy


@pytest.mark.parametrize("module", ["artifact.layout", "measure.size", "journal"])
def test_arithmetic_and_bookkeeping_reach_no_torch(module: str) -> None:
    assert not {name for name in reached(f"autocompress.{module}") if name.split(".")[0] == "torch"}


def test_only_samplers_the_export_and_the_board_know_optuna() -> None:
    users = {m for m in MODULES if any(n.split(".")[0] == "optuna" for n in imports(m, everywhere=True))}
    samplers = {"autocompress.controllers.optuna_samplers", "autocompress.controllers.recovery"}
    assert users == samplers | {"autocompress.optuna_export", "autocompress.runners.board"}


def test_only_the_coding_knows_the_coder() -> None:
    users = {m for m in MODULES if any(n.split(".")[0] == "constriction" for n in imports(m, everywhere=True))}
    assert users == {"autocompress.coding"}


def test_only_the_tracer_knows_torch_pruning() -> None:
    users = {m for m in MODULES if any(n.split(".")[0] == "torch_pruning" for n in imports(m, everywhere=True))}
    assert users == {"autocompress.trace"}


def test_passes_know_one_another_only_where_they_must() -> None:
    allowed = {
        "compensate": {"quantize"},
        "database": {"cache", "channels", "compensate", "moments", "prune", "quantize"},
        "checkpoint": {"cache"},
        "constraint": {"quantize"},
        "distill": {"precision"},
        "moments": {"recurrence"},
        "finetune": {"checkpoint", "constraint", "distill", "held", "muon", "precision", "schedules"},
        "held": {"constraint"},
        "recalibrate": {"quantize"},
        "reconstruct": {"moments", "recalibrate"},
    }
    for module in of("autocompress.engine"):
        name = module.rpartition(".")[2]
        if name != "engine":
            passes = {n.removeprefix("engine.") for n in direct(module) if n.startswith("engine")}
            assert passes <= allowed.get(name, set()), module


FORBIDDEN = {
    "engine": ["study", "report", "cli", "controllers", "artifact", "runners", "journal", "space", "evaluate"],
    "report": ["engine", "measure", "controllers", "cli"],
    "controllers": ["engine", "study", "report", "cli", "artifact", "runners", "evaluate", "task"],
    "artifact": ["engine", "study", "report", "cli", "controllers", "runners", "evaluate"],
    "measure": ["engine", "study", "report", "cli", "controllers", "runners"],
    "tasks": ["engine", "study", "report", "cli", "controllers", "artifact", "graph", "policy"],
    "task": ["engine", "study", "report", "cli", "controllers", "artifact", "graph", "policy"],
    "surgery": ["engine", "study", "report", "cli", "artifact", "policy", "task"],
    "trace": ["engine", "study", "report", "cli", "artifact", "policy"],
    "views": ["engine", "study", "report", "cli", "controllers", "artifact", "graph", "policy", "measure"],
    "stored": ["engine", "artifact", "policy", "graph"],
}


@pytest.mark.parametrize(("package", "forbidden"), FORBIDDEN.items())
def test_lower_layers_do_not_know_the_upper_ones(package: str, forbidden: list[str]) -> None:
    for module in of(f"autocompress.{package}"):
        wrong = {name for name in direct(module) if name.split(".")[0] in forbidden}
        assert not wrong, module


def test_rungs_and_lessons_know_nobody_who_proposes_trains_or_drives() -> None:
    assert direct("autocompress.rungs") <= {"front", "policy", "trial"}
    assert direct("autocompress.lessons") <= {"errors", "files", "policy"}


def test_nothing_imports_the_command_line() -> None:
    users = {m for m in MODULES if any(n.startswith("autocompress.cli") for n in imports(m, everywhere=True))}
    assert users <= {"autocompress.__main__"}


def test_modules_do_not_import_in_circles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for name in sorted(imports(module) & set(MODULES) - {"autocompress"}):
                visit(name, (*path, module))
            done.add(module)

    for module in sorted(MODULES):
        visit(module, ())


def test_the_public_names_are_these() -> None:
    assert autocompress.__all__ == [
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
    for name in autocompress.__all__:
        assert getattr(autocompress, name) is not None


def test_the_package_is_marked_as_typed() -> None:
    assert (ROOT / "py.typed").is_file()
    assert find_spec("autocompress") is not None


def test_the_command_line_starts_without_torch() -> None:
    """`autocompress --help` answers at once."""
    code = "import sys, autocompress.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
