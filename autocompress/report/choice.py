"""Why a trial is the one to take, in words, and a walk along the front in a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autocompress.front import Trial, Wish, feasible
from autocompress.report.tables import Run, recipe_text, size_text

MOVES = "s smaller, l larger, a trial's number, p its policy, q take it"


def explain(run: Run, chosen: Trial, wish: Wish) -> list[str]:
    """Sentences: by what rule it was chosen, and what each neighbour on the front would give and cost instead."""
    said = [_rule(run, chosen, wish)]
    better = _dominating(run, chosen)
    if better is not None:
        said.append(f"It is not on the front: trial {better.number} is {_against(run, better, chosen)}.")
    smaller, larger = neighbours(run, chosen)
    if smaller is not None:
        said.append(f"Not trial {smaller.number}, the next smaller: it is {_against(run, smaller, chosen)}.")
    if larger is not None:
        why = _excluded(larger, wish)
        said.append(f"Not trial {larger.number}, the next larger: it is {_against(run, larger, chosen)}{why}.")
    elif better is None:
        said.append("No larger file within the budget is better." if smaller else "It is the only member of the front.")
    return said


def neighbours(run: Run, chosen: Trial) -> tuple[Trial | None, Trial | None]:
    """The next smaller and the next larger member of the front."""
    smaller = [t for t in run.front if t.measured.bytes < chosen.measured.bytes]
    larger = [t for t in run.front if t.measured.bytes > chosen.measured.bytes]
    return smaller[-1] if smaller else None, larger[0] if larger else None


def _rule(run: Run, chosen: Trial, wish: Wish) -> str:
    fits = len(feasible(run.trials, run.budget))
    limits = _limits(run, wish)
    if wish.trial is not None:
        fit = "within" if run.budget.excess(chosen.measured) <= 0 else "over"
        return f"Trial {chosen.number} was asked for; it is {fit} {run.budget}."
    if wish.knee:
        return (
            f"Of {len(run.front)} members of the front it is the knee: up to here quality is cheap, from here on dear."
        )
    if wish.min_quality is not None and not wish.best and wish.max_size is None and wish.max_latency is None:
        return f"It is the smallest of {fits} feasible trials with {limits}."
    best = "highest" if run.direction == "max" else "lowest"
    return f"It has the {best} {run.metric} of {fits} feasible trials{' with ' + limits if limits else ''}."


def _limits(run: Run, wish: Wish) -> str:
    least = "at least" if run.direction == "max" else "at most"
    parts = [
        f"at most {wish.max_size:,} bytes" if wish.max_size is not None else "",
        f"at most {wish.max_latency:.4g} ms" if wish.max_latency is not None else "",
        f"{run.metric} {least} {wish.min_quality:g}" if wish.min_quality is not None else "",
    ]
    return " and ".join(part for part in parts if part)


def _dominating(run: Run, chosen: Trial) -> Trial | None:
    """A front member that is at least as small and as good, if `chosen` is not on the front itself."""
    if chosen.number in {t.number for t in run.front}:
        return None
    sign = 1.0 if run.direction == "max" else -1.0
    m = chosen.measured
    found = [t for t in run.front if t.measured.bytes <= m.bytes and sign * (t.measured.quality - m.quality) >= 0]
    return max(found, key=lambda t: sign * t.measured.quality, default=None)


def _against(run: Run, other: Trial, chosen: Trial) -> str:
    """How `other` differs: `5,278 bytes (7.4%) smaller, but 0.0028 worse in accuracy`."""
    a, b = other.measured, chosen.measured
    size = a.bytes - b.bytes
    gain = (a.quality - b.quality) * (1 if run.direction == "max" else -1)
    words = [
        f"{abs(size):,} bytes ({abs(size) / b.bytes:.1%}) {'smaller' if size < 0 else 'larger'}"
        if size
        else "of the same size"
    ]
    quality = (
        f"{abs(gain):.4f} {'better' if gain > 0 else 'worse'} in {run.metric}" if gain else f"equal in {run.metric}"
    )
    words.append(quality)
    if run.budget.ms is not None:
        ms = a.latency_ms - b.latency_ms
        words.append(f"{abs(ms):.3g} ms {'faster' if ms < 0 else 'slower'}")
    return ", ".join(words)


def _excluded(other: Trial, wish: Wish) -> str:
    m = other.measured
    if wish.max_size is not None and m.bytes > wish.max_size:
        return f", but over {wish.max_size:,} bytes"
    if wish.max_latency is not None and m.latency_ms > wish.max_latency:
        return f", but over {wish.max_latency:.4g} ms"
    return ""


# --- the walk -------------------------------------------------------------------------------------------


def walk(run: Run, chosen: Trial, console: Console, ask: Callable[[str], str]) -> Trial:
    """Move along the front by what `ask` answers, until it says `q`, nothing, or ends; the trial to take."""
    while True:
        console.print(front_table(run, chosen))
        for sentence in explain(run, chosen, Wish(trial=chosen.number))[1:]:
            console.print(sentence, markup=False)
        try:
            answer = ask(f"{MOVES}: ").strip().lower()
        except EOFError:
            return chosen
        if answer in ("", "q"):
            return chosen
        if answer == "p":
            console.print(policy_table(run, chosen))
            continue
        moved = _moved(run, chosen, answer)
        if moved is None:
            what = f"trial {answer} on the front" if answer.isdigit() else f"move {answer!r}"
            console.print(f"There is no {what}: {MOVES}.", markup=False)
        else:
            chosen = moved


def _moved(run: Run, chosen: Trial, answer: str) -> Trial | None:
    if answer.isdigit():
        return next((t for t in run.front if t.number == int(answer)), None)
    if answer not in ("s", "l"):
        return None
    smaller, larger = neighbours(run, chosen)
    return (smaller if answer == "s" else larger) or chosen


def front_table(run: Run, current: Trial | None = None) -> Table:
    """The front as a table for a terminal; an arrow marks `current`."""
    title = f"Front of {run.task} under {run.budget}" if run.picked else f"Nothing fits {run.budget}"
    shown = Table(title=escape(title), title_justify="left")
    timed = run.budget.ms is not None
    names = ["trial", f"{escape(run.metric)} val", "test", "bytes", "of original", "ms"]
    for name in (*names, *(["predicted", "speed-up"] if timed else []), "before recovery"):
        shown.add_column(name, justify="right")
    for t in run.front:
        here = current is not None and t.number == current.number
        shown.add_row(*_front_row(run, t, here=here, timed=timed), style="bold" if here else None)
    return shown


def _front_row(run: Run, t: Trial, *, here: bool, timed: bool) -> Iterator[str]:
    m, before = t.measured, run.row(t)["quality_before"]
    yield f"{'> ' if here else ''}{t.number}"
    yield f"{m.quality:.4f}"
    yield "–" if math.isnan(t.quality_test) else f"{t.quality_test:.4f}"
    yield f"{m.bytes:,}"
    yield f"{m.bytes / run.dense.bytes:.1%}"
    yield f"{m.latency_ms:.3g}"
    if timed:
        yield f"{m.predicted_ms:.3g}"
        yield f"{run.dense.latency_ms / m.latency_ms:.2f}x"
    yield "" if math.isnan(before) else f"{before:.4f}"


def policy_table(run: Run, trial: Trial) -> Table:
    """Bits, zeros and channel groups of each layer, in network order."""
    policy = trial.evaluation.policy
    recovery = f"; {recipe_text(policy.recovery)}" if policy.recovery.epochs else ""
    shown = Table("layer", "bits", "", "zeros", "channels kept", "original", title_justify="left")
    shown.title = escape(f"Trial {trial.number}{recovery}")
    for layer in run.layers:
        choice = policy.choice(layer["name"])
        narrow = [f"{g} {policy.keep[g]:.0%}" for g in layer.get("groups", ()) if policy.keep.get(g, 1.0) < 1]
        bar = "█" * round(min(choice.bits, 16))
        zeros = f"{choice.sparsity:.0%}" if choice.sparsity else ""
        shown.add_row(
            escape(layer["name"]), str(choice.bits), bar, zeros, escape(", ".join(narrow)), size_text(layer["bytes"])
        )
    return shown
