"""The command line: verbs, progress and `--json`. Behaviour lives elsewhere."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from autocompress.errors import AutocompressError, BudgetError, RunError
from autocompress.live import LOG_EVERY, watching

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none of it
    from autocompress.evaluate import Evaluator
    from autocompress.front import Trial, Wish
    from autocompress.measure.latency import Latency
    from autocompress.report.tables import Run
    from autocompress.runners.board import Board
    from autocompress.runners.storage import Crew
    from autocompress.space import Space
    from autocompress.study import Progress, Settings, Study
    from autocompress.task import Task
    from autocompress.trial import Measurement

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Search how to compress a PyTorch model under a size or latency budget, and take the smaller model away.",
    epilog="Exit codes: 0 found, 1 a check failed, 2 wrong input, 3 nothing fits. `--debug` anywhere shows tracebacks.",
)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="End with one line that is a JSON object.")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder, finished or not.", metavar="RUN")]
TaskSpec = Annotated[
    str,
    typer.Argument(
        help="digits, cifar10, my_task.py:NAME, package.module:NAME, hf:MODEL or timm:MODEL.", metavar="TASK"
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="cifar10: the folder of cifar-10-batches-py/. hf: texts (.txt) or inputs (.safetensors). timm: inputs.",
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads of ONNX Runtime when it is timed.  [default: 1]")]
BatchSize = Annotated[int | None, typer.Option("--batch", help="Inputs at once when it is timed.  [default: 1]")]
Checkpoint = Annotated[Path | None, typer.Option("--checkpoint", help="cifar10 only: state dict of a CIFAR ResNet.")]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--budget", help="Hard limit: 4MB, 900KiB, 5ms, 800us, size=25%, latency=40%. May be given more than once."
    ),
]


Workers = Annotated[
    int,
    typer.Option(
        min=1,
        help="Processes of this machine that evaluate at once, each with a model of its own; they share the cores.",
    ),
]
TrialTimeout = Annotated[
    str | None,
    typer.Option(
        help="Give a trial up that takes longer, its recovery training included, and try it once more: 90s, 10m. "
        "Trials then run in processes beside this one. It should be far above what a trial takes.",
        metavar="TIME",
    ),
]
Deterministic = Annotated[
    int | None,
    typer.Option(
        help="Trials at a time, told in order: the same search for any number of workers; they wait for the slowest of "
        "each N.  [default: 0, each is told as it comes]",
        metavar="N",
    ),
]


RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Evaluate on a Ray cluster: auto (this node's), HOST:PORT, or local (one is started here). "
        "Needs `pip install 'autocompress[ray]'`; see docs/cluster.md.",
        metavar="ADDRESS",
    ),
]
CpusPerTrial = Annotated[float, typer.Option(help="With --ray: CPUs, and threads, of each trial.")]
GpusPerTrial = Annotated[float, typer.Option(help="With --ray: GPUs of each trial; shares are allowed.")]
MaxConcurrent = Annotated[
    int | None, typer.Option(help="With --ray: trials at once.  [default: as many as the cluster holds]")
]
LatencyNode = Annotated[
    str | None,
    typer.Option(
        help="With --ray: the resource of the node where latencies are measured, and where this command runs.",
        metavar="LABEL",
    ),
]


Storage = Annotated[
    str | None,
    typer.Option(
        envvar="AUTOCOMPRESS_STORAGE",
        help="With --join: a database that all machines reach: postgresql://USER@HOST/NAME, mysql://..., "
        "grpc://HOST:PORT (Optuna's proxy), or sqlite:///FILE on one machine. See docs/cluster.md.",
        metavar="URL",
    ),
]
Join = Annotated[
    str | None,
    typer.Option(
        help="Take part in the search of this name, or begin it: the first to come proposes and writes the run folder, "
        "the others evaluate for it. Give each the same command.",
        metavar="NAME",
    ),
]


class Format(StrEnum):
    """Artifact formats."""

    packed = "packed"
    onnx = "onnx"


def _examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"`{line}`" for line in lines)


def _print_json(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data, allow_nan=False) + "\n")
    sys.stdout.flush()


# --- search ---------------------------------------------------------------------------------------------


@app.command(
    epilog=_examples(
        "autocompress search --budget 4MB",
        "autocompress search my_task.py:task --budget 2ms --threads 1",
        "autocompress search my_task.py:task --budget size=10% --space tiny --epochs 3",
        "autocompress search cifar10 --data DIR --checkpoint resnet20.pt --budget size=8% --trials 40",
        "autocompress search --resume runs/digits-20260101-120000 --trials 200",
        "autocompress search my_task.py:task --budget 4MB --workers 4",
        "autocompress search my_task.py:task --budget 4MB --ray auto --cpus-per-trial 2",
        "autocompress search my_task.py:task --budget 4MB --storage postgresql://me@host/db --join pets",
    )
)
def search(
    task: Annotated[
        str | None,
        typer.Argument(help="digits (the default), cifar10, my_task.py:NAME or package.module:NAME.", metavar="[TASK]"),
    ] = None,
    budget: Budgets = None,
    space: Annotated[
        str | None, typer.Option(help="A shipped search space or a .toml file.  [default: default]")
    ] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Run folder.  [default: runs/TASK-DATE]")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.", metavar="DIR")] = None,
    trials: Annotated[int | None, typer.Option(help="One-shot evaluations.  [default: 60]")] = None,
    timeout: Annotated[
        str | None, typer.Option(help="Stop after this time, the profile included: 90s, 30m, 2h.")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Epochs of recovery training on the last rung; 0 is one-shot only.  [default: 1]"),
    ] = None,
    recoveries: Annotated[
        int | None,
        typer.Option(
            help="Members of the front that start recovery training; the better half climbs on each time, to twice the "
            "epochs.  [default: one for ten trials, at least 2]"
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Do not start from what earlier searches of this model learned about recovery."),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(help="Equal seeds give equal searches, where recovery is trained with --fresh.  [default: 0]"),
    ] = None,
    controller: Annotated[
        str | None, typer.Option(help="Who proposes: solver, tpe, nsga2, gp or random.  [default: solver]")
    ] = None,
    format_: Annotated[
        Format | None,
        typer.Option(
            "--format", help="What ships: packed (PyTorch) or onnx.  [default: onnx with a latency budget, else packed]"
        ),
    ] = None,
    threads: Threads = None,
    batch: BatchSize = None,
    latency_table: Annotated[
        Path | None,
        typer.Option(
            "--latency-table",
            help="Latencies of another machine, from `autocompress profile --latency-table` there.",
            metavar="FILE",
        ),
    ] = None,
    workers: Workers = 1,
    trial_timeout: TrialTimeout = None,
    deterministic: Deterministic = None,
    ray: RayAddress = None,
    cpus_per_trial: CpusPerTrial = 1.0,
    gpus_per_trial: GpusPerTrial = 0.0,
    max_concurrent: MaxConcurrent = None,
    latency_node: LatencyNode = None,
    storage: Storage = None,
    join: Join = None,
    data: DataDir = None,
    checkpoint: Checkpoint = None,
    as_json: Json = False,
) -> None:
    """Search compression policies and write the front, a report and the artifacts.

    Every feasible member of the front is a file that was written, read back and scored. A killed search continues
    with --resume; Ctrl-C ends it after the trials in flight, twice at once.
    """
    from autocompress.baselines import read_baselines
    from autocompress.join import on_storage
    from autocompress.report.write import write_report
    from autocompress.runners.base import Cluster
    from autocompress.runners.board import hidden
    from autocompress.runners.storage import Driver
    from autocompress.space import load_space
    from autocompress.study import Settings, Study, in_processes, on_ray, read_config
    from autocompress.study import search as run_search

    given: dict[str, Any] = {
        "task": task,
        "budgets": tuple(budget) if budget else None,
        "space": space,
        "controller": controller,
        "trials": trials,
        "epochs": epochs,
        "recoveries": recoveries,
        "fresh": fresh or None,
        "seed": seed,
        "format": format_.value if format_ else None,
        "threads": threads,
        "batch": batch,
        "latency_table": str(latency_table.resolve()) if latency_table else None,
        "deterministic": deterministic,
        "data": str(data.resolve()) if data else None,
        "checkpoint": str(checkpoint.resolve()) if checkpoint else None,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    if resume is not None and out_dir is not None and out_dir != resume:
        raise RunError("give either --resume or --out: a resumed run stays in its folder")
    settings = replace(read_config(resume)[0], **chosen) if resume else Settings(**({"task": "digits"} | chosen))
    insisted = load_space(space) if space is not None else None
    folder = resume or out_dir or _default_folder(settings)
    seconds = math.inf if timeout is None else parse_time(timeout)
    command = hidden(shlex.join(["autocompress", *sys.argv[1:]]))
    wanted = (cpus_per_trial, gpus_per_trial, max_concurrent, latency_node)
    if ray is not None and workers > 1:
        raise RunError("give either --workers or --ray: a cluster's workers are as many as it has room for")
    if ray is None and wanted != (1.0, 0.0, None, None):
        raise RunError(
            "--cpus-per-trial, --gpus-per-trial, --max-concurrent and --latency-node are about a Ray cluster: give "
            "--ray too"
        )
    if ray is not None and trial_timeout is not None:
        raise RunError("--trial-timeout is about processes of this machine: leave it out with --ray")
    limit = math.inf if trial_timeout is None else parse_time(trial_timeout)
    board = _board(storage, join, resume=resume is not None, ray=ray)
    if board is not None and not board[1]:
        _take_part(board[0], chosen, workers, as_json=as_json)
        return
    make_runner = in_processes(workers, limit) if ray is None else on_ray(Cluster(ray, *wanted))
    driving: AbstractContextManager[object] = nullcontext()
    if board is not None:
        make_runner, driving = on_storage(board[0], workers, limit), Driver(board[0])
    with watching(err) as watch, _graceful() as interrupt, driving:
        run_search(
            settings,
            folder,
            resume=resume is not None,
            space=insisted,
            timeout=seconds,
            command=command,
            watch=watch,
            started=interrupt.arm,
            make_runner=make_runner,
        )
        study = interrupt.running
        if isinstance(study, Study) and not read_baselines(folder):
            _measure_uniform(study.evaluator, folder, watch, lambda: study.over)
    run = write_report(folder)
    _conclude(run, as_json=as_json)


def _board(storage: str | None, join: str | None, *, resume: bool, ray: str | None) -> tuple[Board, bool] | None:
    """The search to take part in, and whether to drive it; None without --join."""
    if (storage is None) != (join is None) and not (join is None and "AUTOCOMPRESS_STORAGE" in os.environ):
        raise RunError("--storage and --join go together: the database, and the name that the search has there")
    if storage is None or join is None:
        return None
    if ray is not None:
        raise RunError("give either --join or --ray: machines meet in a database or in a cluster")
    from autocompress.join import meet
    from autocompress.runners.board import Address

    return meet(Address(storage, join), resume=resume)


def _take_part(board: Board, chosen: dict[str, Any], workers: int, *, as_json: bool) -> None:
    """Evaluate for a search that another process drives, until it ends or Ctrl-C."""
    from autocompress.join import take_part

    last = "", -math.inf

    def say(text: str) -> None:
        nonlocal last
        status.update(escape(text))
        if not err.is_terminal and text != last[0] and time.monotonic() - last[1] >= LOG_EVERY:
            last = text, time.monotonic()
            err.print(text, markup=False, soft_wrap=True)

    with err.status("joining") as status, _graceful() as interrupt:
        done = take_part(board, chosen, workers, say, interrupt.arm)
    err.print(f"{board.address.name}: evaluated here: {done}", markup=False)
    if as_json:
        _print_json({"joined": board.address.name, "evaluated": done})


def _measure_uniform(
    evaluator: Evaluator, folder: Path, watch: Callable[[Progress], None], stopped: Callable[[], bool] = lambda: False
) -> None:
    """Uniform policies, measured beside a run for its report to compare with; they are no trials of it."""
    from autocompress.baselines import measure_baselines
    from autocompress.space import Space
    from autocompress.study import Progress, read_config

    settings, file, _ = read_config(folder)
    space, begun = Space(file, evaluator.graph, integers=settings.format == "onnx"), time.monotonic()

    def follow(done: int, total: int, name: str) -> None:
        watch(Progress("comparing", done, total, done, 0, None, time.monotonic() - begun, None, name))

    measure_baselines(evaluator, space, folder, follow, stopped)


def _default_folder(settings: Settings) -> Path:
    name = Path(settings.task.rpartition(":")[0]).stem if ":" in settings.task else settings.task
    return Path("runs") / f"{name}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"


def parse_time(text: str) -> float:
    """Seconds of `90s`, `30m`, `2h` or plain seconds."""
    scale = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        seconds = float(text if scale is None else text[:-1]) * (scale or 1)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise BudgetError(f"cannot read the time {text!r}: use 90s, 30m or 2h")
    return seconds


def _conclude(run: Run, *, as_json: bool) -> None:
    from autocompress.report.choice import front_table
    from autocompress.report.tables import size_text, summary

    out.print(front_table(run))
    picked, nearest = run.picked, run.nearest
    if picked is not None:
        m = picked.measured
        out.print(
            f"[bold]Picked trial {picked.number}[/]: {m.bytes:,} bytes ({m.bytes / run.dense.bytes:.1%} of the "
            f"original's {size_text(run.dense.bytes)}), {escape(run.metric)} {m.quality:.4f} on val and "
            f"{picked.quality_test:.4f} on test (original {run.dense.quality:.4f} on val), {m.latency_ms:.3g} ms."
        )
        out.print(
            f"{run.evaluations} evaluations in {run.seconds:.0f} s. Report: {run.folder / 'report.html'}",
            soft_wrap=True,
        )
        out.print(
            f"Take it away: autocompress export {shlex.quote(str(run.folder))} --trial {picked.number} "
            f"--format {run.settings.format}",
            soft_wrap=True,
        )
    if run.profile is not None:
        evaluations, seconds = run.profile["evaluations"], run.profile["seconds"]
        if run.profile["reused"]:
            out.print(
                f"Solved from the profile of an earlier search ({evaluations} evaluations, {seconds:.0f} s saved)."
            )
        else:
            out.print(f"Profile: {evaluations} evaluations in {seconds:.0f} s; later searches of this model reuse it.")
    if run.latency_table is not None:
        told = run.latency_table
        off = told["error"] if told["error_on_trials"] is None else told["error_on_trials"]
        where = f"{run.settings.threads} thread(s), batch {run.settings.batch}, on {told['device']}"
        out.print(
            f"Latency: {run.config['latency_runtime']}, {where}; layer times predict it to within {off:.1%} (median).",
            soft_wrap=True,
            markup=False,
        )
    if run.lessons:
        out.print(
            f"Recovery began with what {run.lessons} trainings of earlier searches had taught (--fresh does not)."
        )
    for warning in run.warnings:
        err.print(f"[yellow]warning:[/] {escape(warning)}")
    failed = [t for t in run.trials if t.evaluation.status == "failed"]
    if failed:
        last = failed[-1].evaluation.error.strip().splitlines()[-1]
        err.print(f"{len(failed)} of {run.evaluations} evaluations failed, the last with: {last}", markup=False)
    if nearest is not None and picked is None:
        err.print(
            f"[red]nothing fits[/] {run.budget}: the nearest of {run.evaluations} evaluations is trial "
            f"{nearest.number} with {nearest.measured.bytes:,} bytes and {nearest.measured.latency_ms:.3g} ms",
            soft_wrap=True,
        )
    elif picked is None:
        err.print(f"[red]no evaluation succeeded[/]; see {run.folder / 'report.html'}", soft_wrap=True)
    if as_json:
        _print_json(summary(run))
    if picked is None:
        raise typer.Exit(3 if nearest is not None else 1)


class _Interrupt:
    """What Ctrl-C does to a search, or to who takes part: first it ends after the trials in flight, then at once."""

    def __init__(self) -> None:
        self.running: Study | Crew | None = None

    def arm(self, running: Study | Crew) -> None:
        """From now on, Ctrl-C is about `running`."""
        self.running = running
        signal.signal(signal.SIGINT, self._first)

    def _first(self, number: int, frame: object) -> None:  # noqa: ARG002
        err.print("\nending after what is in flight; Ctrl-C again stops at once")
        assert self.running is not None
        self.running.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _graceful() -> Iterator[_Interrupt]:
    """Inside, Ctrl-C may be armed; afterwards it is as it was."""
    previous = signal.getsignal(signal.SIGINT)
    try:
        yield _Interrupt()
    finally:
        signal.signal(signal.SIGINT, previous)


# --- ablate, report, pick, export -------------------------------------------------------------------------------


@app.command(
    epilog=_examples(
        "autocompress ablate runs/NAME --trial 12", "autocompress ablate runs/NAME --trial 12 --seeds 5 --epochs 2"
    )
)
def ablate(
    run_folder: RunFolder,
    trial: Annotated[int, typer.Option("--trial", help="A trial with recovery training.", metavar="N")],
    seeds: Annotated[int, typer.Option(help="Trainings of each recipe, with different seeds.")] = 3,
    epochs: Annotated[int | None, typer.Option(help="Epochs of each training.  [default: those of the trial]")] = None,
    output: Annotated[
        Path | None, typer.Option("--out", help="The Markdown table.  [default: RUN/ablation-trial-N.md]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a trial again with one ingredient of its recovery off at a time, with several seeds: what is each worth?

    Always trains without distillation and at a constant rate as well. Every training is kept, so the same command
    continues one that was interrupted. Reads val only; the report shows the table.
    """
    from autocompress.ablation import ablate as run_ablation
    from autocompress.report.tables import plain

    with watching(err) as watch:
        found = run_ablation(run_folder, trial, seeds=seeds, epochs=epochs, out=output, watch=watch)
    out.print(_ablation_table(found))
    out.print(f"Written: {output or run_folder / f'ablation-trial-{trial}.md'}", soft_wrap=True, markup=False)
    if as_json:
        _print_json(plain({"run": str(run_folder), **found}))


def _ablation_table(found: dict[str, Any]) -> Table:
    title = f"Trial {found['trial']}, {found['epochs']} epoch(s): {found['metric']} on val"
    shown = Table(title=escape(title), title_justify="left")
    for name in ("recipe", "n", "failed", "mean", "std", "against full", "std"):
        shown.add_column(name, justify="left" if name == "recipe" else "right")
    for r in found["rows"]:
        numbers = [r[name] for name in ("mean", "std", "difference", "difference_std")]
        shown.add_row(r["variant"], str(r["n"]), str(r["failed"]), *("" if x is None else f"{x:.4f}" for x in numbers))
    return shown


@app.command(epilog=_examples("autocompress report runs/NAME", "autocompress report runs/NAME --baselines"))
def report(
    run_folder: RunFolder,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="First measure what to compare with: uniform policies, and a random search of as many trials.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write report.html, summary.md, front.png, front.svg, front.csv and trials.csv, even while a search runs."""
    from autocompress.report.choice import front_table
    from autocompress.report.tables import summary
    from autocompress.report.write import write_report

    if baselines:
        _measure_baselines(run_folder)
    run = write_report(run_folder)
    out.print(front_table(run))
    out.print(f"Report: {run_folder / 'report.html'}", soft_wrap=True)
    if as_json:
        _print_json(summary(run))


def _measure_baselines(folder: Path) -> None:
    """Uniform policies again, and the random search beside a run, which goes on where it was."""
    from autocompress.baselines import RANDOM
    from autocompress.study import CONFIG, measuring, read_config
    from autocompress.study import search as run_search

    settings, file, _ = read_config(folder)
    plain = replace(settings, controller="random", epochs=0)
    with watching(err) as watch:
        _measure_uniform(measuring(settings, folder), folder, watch)
        resume = (folder / RANDOM / CONFIG).is_file()
        run_search(plain, folder / RANDOM, resume=resume, space=None if resume else file, watch=watch)


@app.command(
    epilog=_examples(
        "autocompress compare runs/A runs/B", "autocompress compare runs/solver runs/tpe runs/random --out compare.html"
    )
)
def compare(
    run_folders: Annotated[list[Path], typer.Argument(help="Run folders of the same model.", metavar="RUN...")],
    output: Annotated[Path, typer.Option("--out", help="The page to write.", metavar="FILE")] = Path("compare.html"),
    as_json: Json = False,
) -> None:
    """Lay the fronts of several runs of the same model over each other: which search found more, in what time?"""
    from autocompress.report.compare import compare as compare_runs
    from autocompress.report.compare import compare_table, read_runs, write_comparison

    if output.suffix not in (".html", ".htm"):
        raise RunError(f"{output} must end in .html")
    runs = read_runs(run_folders)
    rows = compare_runs(runs)
    out.print(compare_table(runs, rows))
    write_comparison(runs, rows, output)
    out.print(f"Written: {output}", soft_wrap=True, markup=False)
    if as_json:
        _print_json({"page": str(output), "runs": rows})


@app.command(epilog=_examples("autocompress dashboard runs/NAME", "autocompress dashboard runs/NAME --export-only"))
def dashboard(
    run_folder: RunFolder,
    port: Annotated[int, typer.Option(help="Port of this machine.", min=1, max=65535)] = 8080,
    browser: Annotated[bool, typer.Option(help="Open the page in the default browser.")] = True,
    export_only: Annotated[
        bool, typer.Option("--export-only", help="Write the Optuna storage, and show nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Export a run to an Optuna storage and open optuna-dashboard on it. Ctrl-C ends it.

    Needs the extra `dashboard`: pip install 'autocompress[dashboard]'. The storage is a copy: the run stays as it is.
    """
    from autocompress.optuna_export import STORAGE, export_study, serve
    from autocompress.report.tables import Run

    path = run_folder / STORAGE
    count = export_study(Run.read(run_folder), path)
    out.print(f"{path}: {count} trials; optuna.load_study reads it with a JournalStorage", soft_wrap=True, markup=False)
    if as_json:
        _print_json({"storage": str(path), "trials": count})
    if not export_only:
        serve(path, port, browser=browser, say=lambda text: err.print(text, markup=False, soft_wrap=True))


MaxSize = Annotated[str | None, typer.Option(help="At most this size: 1MB, 900KiB, size=10%.")]
MaxLatency = Annotated[str | None, typer.Option(help="At most this latency: 2ms, latency=50%.")]
MinQuality = Annotated[float | None, typer.Option(help="At least this quality on val; alone, the smallest such file.")]
Knee = Annotated[bool, typer.Option("--knee", help="Where the front bends: past it, bytes cost more quality.")]
Best = Annotated[bool, typer.Option("--best", help="The best quality within all limits (the default).")]
TrialNumber = Annotated[int | None, typer.Option("--trial", help="This trial.", metavar="N")]


def _choose(
    run: Run,
    max_size: str | None,
    max_latency: str | None,
    min_quality: float | None,
    knee: bool,
    best: bool,
    trial: int | None,
) -> tuple[Trial, Wish]:
    """The trial that the options of `pick` and `export` name, and what they ask for."""
    from autocompress.front import Wish, pick
    from autocompress.trial import Budget, Limit

    if sum((knee, best, trial is not None)) > 1:
        raise AutocompressError("give only one of --knee, --best and --trial")
    if trial is not None and any(limit is not None for limit in (max_size, max_latency, min_quality)):
        raise AutocompressError(
            "--trial names one trial already: leave out --max-size, --max-latency and --min-quality"
        )
    limits = [Limit.parse(text) for text in (max_size, max_latency) if text is not None]
    budget = Budget.resolve(limits, run.dense)
    if (max_size is not None) != (budget.bytes is not None) or (max_latency is not None) != (budget.ms is not None):
        raise BudgetError("--max-size takes bytes and --max-latency takes time")
    wish = Wish(budget.bytes, budget.ms, min_quality, best, knee, trial)
    return pick(run.trials, run.direction, wish, run.budget), wish


@app.command(
    name="pick",
    epilog=_examples(
        "autocompress pick runs/NAME --max-size 1MB --min-quality 0.90",
        "autocompress pick runs/NAME --knee",
        "autocompress pick runs/NAME --interactive",
    ),
)
def pick_(
    run_folder: RunFolder,
    max_size: MaxSize = None,
    max_latency: MaxLatency = None,
    min_quality: MinQuality = None,
    knee: Knee = False,
    best: Best = False,
    trial: TrialNumber = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Walk along the front from there.")] = False,
    as_json: Json = False,
) -> None:
    """Choose one trial of a run by limits; say why it and not its neighbours, and how to export it."""
    from autocompress.report.choice import explain, walk
    from autocompress.report.tables import Run, plain

    run = Run.read(run_folder)
    chosen, wish = _choose(run, max_size, max_latency, min_quality, knee, best, trial)
    if interactive:
        chosen = walk(run, chosen, out, lambda prompt: out.input(prompt, markup=False))
        wish = replace(wish, trial=chosen.number)
    m = chosen.measured
    out.print(
        f"[bold]Trial {chosen.number}[/]: {m.bytes:,} bytes ({m.bytes / run.dense.bytes:.1%} of the original), "
        f"{escape(run.metric)} {m.quality:.4f} on val (original {run.dense.quality:.4f}), {m.latency_ms:.3g} ms "
        f"(original {run.dense.latency_ms:.3g})."
    )
    for sentence in explain(run, chosen, wish):
        out.print(sentence, soft_wrap=True, markup=False)
    command = f"autocompress export {shlex.quote(str(run_folder))} --trial {chosen.number}"
    out.print(f"{command} --format {run.settings.format}", soft_wrap=True)
    if as_json:
        _print_json(
            plain({"run": str(run_folder), **run.row(chosen), "policy_json": chosen.evaluation.policy.to_json()})
        )


@app.command(
    epilog=_examples(
        "autocompress export runs/NAME --trial 12 --format packed --output model.acz",
        "autocompress export runs/NAME --max-size 500kB",
    )
)
def export(
    run_folder: RunFolder,
    max_size: MaxSize = None,
    max_latency: MaxLatency = None,
    min_quality: MinQuality = None,
    knee: Knee = False,
    best: Best = False,
    trial: TrialNumber = None,
    format_: Annotated[
        Format | None,
        typer.Option("--format", help="packed: the .acz file; onnx: the .onnx file.  [default: what the run measured]"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write.  [default: RUN-trial-N here]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output file.")] = False,
    as_json: Json = False,
) -> None:
    """Write the artifact of one trial; without a choice, of the run's pick."""
    from autocompress.files import write
    from autocompress.report.tables import Run

    run = Run.read(run_folder)
    chosen, _ = _choose(run, max_size, max_latency, min_quality, knee, best, trial)
    form = format_.value if format_ else run.settings.format
    suffix = {"packed": ".acz", "onnx": ".onnx"}[form]
    target = output or Path(f"{run_folder.resolve().name}-trial-{chosen.number}{suffix}")
    if target.is_dir():
        raise RunError(f"{target} is a folder: give a file name with --output")
    if target.exists() and not force:
        raise RunError(f"{target} already exists: use --force to overwrite it, or --output")
    kept = run_folder / "artifacts" / Path(chosen.artifact).name
    if form == run.settings.format and chosen.artifact and kept.is_file():
        _check_artifact(kept)
        size = write(target, kept.read_bytes())
    else:
        size = write(target, _rebuild(run, chosen, form))
    out.print(f"{target}: {size:,} bytes ({form})", soft_wrap=True)
    if as_json:
        _print_json({"file": str(target), "bytes": size, "trial": chosen.number, "format": form})


def _check_artifact(kept: Path) -> None:
    """Raise `ArtifactError` if the file was damaged since it was written."""
    from autocompress.artifact import onnx, packed

    if kept.suffix == ".onnx":
        onnx.About.read(kept)
    else:
        packed.read(kept)


def _rebuild(run: Run, trial: Trial, form: str) -> bytes:
    """The artifact of a trial whose file was not kept, or is of the other format.

    The same policy and seed give the same file. What another format computes is scored, and said if it differs.
    """
    from autocompress.study import measuring

    policy = trial.evaluation.policy
    if policy.recovery.epochs:
        err.print(f"trial {trial.number} has recovery training, and its file is not here: training it again")
    other = form != run.settings.format
    settings = replace(run.settings, format=form, latency_table=None)
    if form == "packed":
        policy = replace(policy, activations=32)
    evaluator = measuring(settings, run.folder, timed=not other)
    compressed, model = evaluator.build(policy)
    quality = trial.measured.quality
    if other:
        quality = evaluator.quality(evaluator.target.ship(compressed, model).model).score
        out.print(
            f"{run.metric} {quality:.4f} on val as {form} ({trial.measured.quality:.4f} as {run.settings.format})",
            markup=False,
        )
    return evaluator.pack(compressed, quality)


# --- verify, profile, init ------------------------------------------------------------------------------


@app.command(
    epilog=_examples(
        "autocompress verify model.acz --task my_task.py:task --budget 4MB", "autocompress verify digits.acz"
    )
)
def verify(
    file: Annotated[Path, typer.Argument(help="An exported artifact.", metavar="FILE")],
    task: Annotated[str | None, typer.Option(help="Task to score on.  [default: the built-in one it names]")] = None,
    budget: Budgets = None,
    tolerance: Annotated[float, typer.Option(help="Relative difference in quality that still counts as equal.")] = 1e-3,
    threads: Threads = None,
    batch: BatchSize = None,
    data: DataDir = None,
    checkpoint: Checkpoint = None,
    as_json: Json = False,
) -> None:
    """Reload an artifact in this fresh process; weigh, score and time it again. Exit code 1 if it does not hold."""
    from autocompress.report.tables import plain
    from autocompress.trial import Budget, Limit

    inspect = _inspect_onnx if file.suffix == ".onnx" else _inspect_packed
    wanted = [Limit.parse(text) for text in budget or []]
    if file.suffix == ".onnx" and any(limit.quantity == "macs" for limit in wanted):
        raise BudgetError("an .onnx file does not say how many channels were removed: give a budget of bytes or time")
    for name, value in (("threads", threads), ("batch", batch)):
        if value is not None and value < 1:
            raise AutocompressError(f"--{name} is {value}; it must be 1 or more")
    found = inspect(file, task, data, checkpoint, threads or 1, batch or 1)
    dense, measured, timed = found.dense, found.measured, found.timed
    limits = Budget.resolve(wanted, dense)
    same = math.isclose(measured.quality, found.recorded, rel_tol=tolerance, abs_tol=1e-9)
    fits = limits.excess(measured) <= 0
    out.print(
        f"{file}: {measured.bytes:,} bytes, {escape(found.metric)} {measured.quality:.4f} on val "
        f"({'as' if same else 'NOT as'} recorded, {found.recorded:.4f}), {timed.ms:.3g} ms "
        f"[{timed.low:.3g}, {timed.high:.3g}] in {found.runtime} (original {dense.latency_ms:.3g} ms)",
        soft_wrap=True,
        markup=False,
    )
    if budget:
        out.print(f"{'within' if fits else 'NOT within'} {limits}")
    if limits.ms is not None and timed.low < limits.ms < timed.high:
        err.print(
            f"this machine is too noisy to be sure: {limits.ms:.4g} ms lies between the quartiles of {timed.samples} "
            "runs; repeat it when nothing else runs",
            soft_wrap=True,
        )
    if as_json:
        _print_json(
            plain(
                {
                    "ok": same and fits,
                    "bytes": measured.bytes,
                    "quality": measured.quality,
                    "latency_ms": timed.ms,
                    "latency_quartiles_ms": [timed.low, timed.high],
                    "latency_runtime": found.runtime,
                    "recorded_quality": found.recorded,
                    "dense_quality": dense.quality,
                    "dense_latency_ms": dense.latency_ms,
                    "within_budget": fits,
                }
            )
        )
    if not (same and fits):
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Inspected:
    """What `verify` finds in a file, and of the dense model beside it."""

    metric: str
    runtime: str
    recorded: float
    measured: Measurement
    timed: Latency
    dense: Measurement


def _task_of(file: Path, known: str, task: str | None, data: Path | None, checkpoint: Path | None) -> Task:
    """The task to score a file on: the one that is named, or the built-in one that it was made for."""
    from autocompress.task import load_task

    if task is None and known != "digits" and not known.startswith("cifar10-"):
        raise AutocompressError(f"{file} was made for task {known!r}: name it with --task my_task.py:NAME")
    spec = task or ("cifar10" if known.startswith("cifar10-") else known)
    return load_task(spec, data=data, checkpoint=checkpoint)


def _inspect_packed(
    file: Path, task: str | None, data: Path | None, checkpoint: Path | None, threads: int, batch: int
) -> _Inspected:
    from autocompress.artifact.packed import build, read
    from autocompress.measure.latency import RUNTIME, LatencyMeter
    from autocompress.measure.quality import QualityMeter
    from autocompress.task import call, probe
    from autocompress.trace import trace
    from autocompress.trial import Measurement

    if (threads, batch) != (1, 1):
        raise AutocompressError("--threads and --batch are about .onnx files; a packed one is timed with one of each")
    artifact = read(file)
    loaded = _task_of(file, artifact.header.task, task, data, checkpoint)
    dense, example = probe(loaded)
    model = build(artifact, loaded.model())
    call(model, example.inputs)
    quality, latency = QualityMeter(loaded, dense), LatencyMeter(dense, example.inputs)
    found, timed = quality(model), latency(model)
    graph = trace(dense, example.inputs)
    macs = graph.macs(artifact.header.policy)
    return _Inspected(
        loaded.metric,
        RUNTIME,
        artifact.quality,
        Measurement(artifact.bytes, macs, found.score, found.loss, timed.ms),
        timed,
        Measurement(graph.dense_bytes, graph.dense_macs, quality.dense, 0.0, latency.dense),
    )


def _inspect_onnx(
    file: Path, task: str | None, data: Path | None, checkpoint: Path | None, threads: int, batch: int
) -> _Inspected:
    from autocompress.artifact.onnx import About
    from autocompress.evaluate import Evaluator
    from autocompress.target import Place
    from autocompress.trial import Measurement

    notes, _ = About.read(file)
    loaded = _task_of(file, notes.task, task, data, checkpoint)
    evaluator = Evaluator(loaded, format="onnx", place=Place(threads, batch))
    artifact = evaluator.reload(file)
    found, timed = evaluator.quality(artifact.model), evaluator.target.retime(file)
    measured = Measurement(artifact.bytes, evaluator.graph.dense_macs, found.score, found.loss, timed.ms)
    return _Inspected(loaded.metric, evaluator.target.runtime, artifact.quality, measured, timed, evaluator.dense)


@app.command(
    epilog=_examples(
        "autocompress profile my_task.py:task",
        "autocompress profile digits --bits 2",
        "autocompress profile my_task.py:task --latency-table board.json --device 'kitchen board'",
    )
)
def profile(
    task: TaskSpec = "digits",
    bits: Annotated[int, typer.Option(help="Sensitivity: the loss with one layer alone at this width.")] = 4,
    sensitivity: Annotated[bool, typer.Option(help="Evaluate each layer alone (one pass over val per layer).")] = True,
    latency_table: Annotated[
        Path | None,
        typer.Option(
            "--latency-table",
            help="Write this machine's layer times here; `search --latency-table FILE` uses them anywhere.",
            metavar="OUT",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="What to call this machine in that file.")] = None,
    space: Annotated[str, typer.Option(help="The search space whose widths are timed.")] = "default",
    threads: Threads = None,
    batch: BatchSize = None,
    data: DataDir = None,
    checkpoint: Checkpoint = None,
    as_json: Json = False,
) -> None:
    """Show layers, channel groups, bytes, latency and how sensitive each layer is; what cannot be pruned, and why."""
    from autocompress.evaluate import Evaluator
    from autocompress.policy import LayerChoice, Policy, Recovery
    from autocompress.report.tables import plain, size_text
    from autocompress.space import Space, load_space
    from autocompress.target import Place
    from autocompress.task import load_task

    LayerChoice(bits)  # a wrong width fails before the work
    file, place = load_space(space), Place(threads or 1, batch or 1)
    form = "packed" if latency_table is None else "onnx"
    evaluator = Evaluator(load_task(task, data=data, checkpoint=checkpoint), format=form, place=place)
    if latency_table is not None:
        _write_table(evaluator, Space(file, evaluator.graph, integers=True), device, latency_table)
    graph, dense = evaluator.graph, evaluator.dense
    layers = []
    for layer in graph.layers:
        size = math.prod(layer.shape)
        entry: dict[str, Any] = {
            "name": layer.name,
            "kind": layer.kind,
            "shape": list(layer.shape),
            "weights": size,
            "bytes": 4 * size,
            "macs": layer.positions * size,
            "folds": layer.batch_norm,
            "groups": [g.name for g in graph.groups if any(m.tensor == layer.weight for m in g.members)],
        }
        if sensitivity:
            alone = Policy({layer.name: LayerChoice(bits)}, recovery=Recovery(reestimate_bn=False))
            measured = evaluator(alone).measurement
            entry |= {"loss": measured.loss if measured else None, "quality": measured.quality if measured else None}
        layers.append(entry)
    out.print(
        f"{escape(evaluator.task.name)}: {size_text(dense.bytes)}, {dense.macs:,} MACs, "
        f"{escape(evaluator.task.metric)} {dense.quality:.4f} on val, {dense.latency_ms:.3g} ms"
    )
    shown = Table(
        Column("layer", overflow="fold"),
        "kind",
        "shape",
        "share",
        "MACs",
        "channel groups",
        f"loss at {bits} bits",
        title_justify="left",
    )
    for entry in layers:
        loss = entry.get("loss")
        shown.add_row(
            escape(entry["name"]),
            entry["kind"],
            "x".join(map(str, entry["shape"])),
            f"{entry['bytes'] / dense.bytes:.1%}",
            f"{entry['macs']:,}",
            escape(", ".join(entry["groups"])),
            "" if loss is None else f"{loss:.2e}",
        )
    out.print(shown)
    groups = Table(Column("channel group", overflow="fold"), "channels", "can be pruned")
    for group in graph.groups:
        groups.add_row(
            escape(group.name), str(group.channels), "yes" if not group.frozen else f"no: {escape(group.frozen)}"
        )
    out.print(groups)
    for note in graph.notes:
        out.print(escape(note))
    if as_json:
        _print_json(
            plain(
                {
                    "task": evaluator.task.name,
                    "bytes": dense.bytes,
                    "macs": dense.macs,
                    "quality": dense.quality,
                    "latency_ms": dense.latency_ms,
                    "layers": layers,
                    "notes": list(graph.notes),
                    "groups": [
                        {"name": g.name, "channels": g.channels, "frozen": g.frozen or None} for g in graph.groups
                    ],
                }
            )
        )


def _write_table(evaluator: Evaluator, space: Space, device: str | None, path: Path) -> None:
    """Time this machine, and write what was found where another machine can read it."""
    from autocompress.files import write
    from autocompress.target import OnnxTarget

    target = evaluator.target
    assert isinstance(target, OnnxTarget)
    with err.status("timing layers") if err.is_terminal else nullcontext():
        table = target.measure_table(space.keep)
    if device is not None:
        table = replace(table, deployment=replace(table.deployment, device=device))
    write(path, (json.dumps(table.to_json(), indent=1) + "\n").encode())
    out.print(
        f"{path}: layer times of {table.deployment.device} from {table.runs} runs in {table.seconds:.0f} s; they "
        f"predict these runs to within {table.error:.1%} (median)",
        soft_wrap=True,
        markup=False,
    )


@app.command(epilog=_examples("autocompress init", "autocompress init detector.py"))
def init(
    file: Annotated[Path, typer.Argument(help="Task file to write.", metavar="[FILE]")] = Path("my_task.py"),
    as_json: Json = False,
) -> None:
    """Write a commented task file to start from. It runs as it stands."""
    if file.suffix != ".py":
        raise RunError(f"{file} must end in .py")
    template = (resources.files("autocompress") / "tasks" / "template.py.txt").read_text(encoding="utf-8")
    try:
        with file.open("x", encoding="utf-8") as handle:
            handle.write(template.replace("{file}", file.name).replace("{name}", file.stem))
    except FileExistsError:
        raise RunError(f"{file} already exists; choose another name") from None
    except OSError as error:
        raise RunError(f"cannot write {file}: {error.strerror}") from None
    out.print(f"Wrote {file}. Try it: autocompress search {shlex.quote(f'{file}:task')} --budget 100kB", soft_wrap=True)
    if as_json:
        _print_json({"file": str(file)})


# --- the process ----------------------------------------------------------------------------------------


def _version(wanted: bool) -> None:
    if wanted:
        out.print(version("autocompress"))
        raise typer.Exit


@app.callback()
def _options(
    show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del show


def main() -> None:
    """Entry point: one line for each expected error, a traceback only with --debug."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if debug:
            raise
        _fail(*_explain(error))
    if code == 130:
        _fail("interrupted; a search continues with --resume and its folder", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> tuple[str, int]:
    """One line and an exit code for whatever a verb raised."""
    if isinstance(error, AutocompressError):
        return str(error), error.exit_code
    if hasattr(error, "format_message"):  # a wrong option or argument, found by the parser
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return f"{error.format_message()}{hint}", 2
    if isinstance(error, OSError):
        return f"{error.filename or 'the system'}: {error.strerror or error}", 2
    return f"unexpected {type(error).__name__}: {error} (this is a bug; --debug shows where)", 1


def _fail(message: str, code: int) -> NoReturn:
    line = " ".join(message.split())
    err.print(f"error: {line}", markup=False, soft_wrap=True)
    if "--json" in sys.argv:
        _print_json({"error": line, "exit_code": code})
    sys.exit(code)
