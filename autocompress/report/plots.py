"""Pictures of a run: the front for paper (`front.png`, matplotlib) and for the browser (Plotly figures)."""

from __future__ import annotations

import html
import io
import math
import warnings
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from autocompress.artifact.layout import Header
from autocompress.front import Trial
from autocompress.report.tables import Run, size_text

# Okabe and Ito's colours, which colour-blind readers can tell apart
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"


def _ok(run: Run) -> list[Trial]:
    return [t for t in run.trials if t.evaluation.status == "ok"]


def _quality_range(run: Run) -> tuple[float, float]:
    """Limits that show the dense model and the front as far as anyone would use it; weak trials may fall outside."""
    dense, values = run.dense.quality, [t.measured.quality for t in run.front]
    if run.direction == "max":
        low, high = max(min(values), dense - 0.1 * abs(dense)), max(*values, dense)
    else:
        low, high = min(*values, dense), min(max(values), dense + abs(dense))
    low, high = min(low, dense), max(high, dense)
    margin = max((high - low) * 0.1, abs(high) * 1e-3, 1e-9)
    return low - margin, high + margin


def front_png(run: Run, width: float = 7.0, height: float = 4.4, dpi: int = 150) -> bytes:
    """The front as a PNG image."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ok, front = _ok(run), run.front
    low, high = _quality_range(run)
    shown = [t for t in ok if low <= t.measured.quality <= high]
    axes.scatter(
        [t.measured.bytes for t in shown],
        [t.measured.quality for t in shown],
        s=14,
        color=GREY,
        alpha=0.5,
        linewidths=0,
    )
    axes.plot([t.measured.bytes for t in front], [t.measured.quality for t in front], "-", color=BLUE, lw=1.6, zorder=3)
    for trained, marker in ((False, "o"), (True, "D")):
        members = [t for t in front if bool(t.evaluation.rung) == trained]
        axes.plot(
            [t.measured.bytes for t in members],
            [t.measured.quality for t in members],
            marker,
            ms=5.5,
            color=BLUE,
            mec="white",
            mew=0.6,
            zorder=4,
        )
    axes.plot(run.dense.bytes, run.dense.quality, "*", ms=13, color=GREEN, zorder=4)
    axes.annotate(
        "original",
        (run.dense.bytes, run.dense.quality),
        xytext=(-6, -13),
        textcoords="offset points",
        ha="right",
        color=GREEN,
    )
    if run.budget.bytes is not None:
        axes.axvline(run.budget.bytes, color=RED, lw=1, ls="--")
        axes.annotate(
            f"budget {size_text(run.budget.bytes)}",
            (run.budget.bytes, low),
            xytext=(-4, 4),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="bottom",
            color=RED,
        )
    if run.picked is not None:
        chosen = run.picked.measured
        axes.plot(chosen.bytes, chosen.quality, "o", ms=13, mfc="none", mec=ORANGE, mew=2, zorder=5)
        axes.annotate(
            f"picked: {size_text(chosen.bytes)}, {chosen.quality:.4g}",
            (chosen.bytes, chosen.quality),
            xytext=(0, 11),
            textcoords="offset points",
            ha="center",
            color="#A06000",
        )
    axes.set(
        xscale="log",
        ylim=(low, high + 0.08 * (high - low)),
        xlabel="file size",
        ylabel=f"{_safe(run.metric)} on val",
        title=f"{_safe(run.task)}: smaller and better is {'up' if run.direction == 'max' else 'down'} and left",
    )
    left, right = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if right / left > 10 else tuple(range(1, 10))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: size_text(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, which="both")
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name in a script that the font lacks shows as boxes
        figure.savefig(out, format="png")
    return out.getvalue()


def _safe(text: str) -> str:
    """A user's text as text: no mathtext."""
    return text.replace("$", r"\$")


# --- the browser ----------------------------------------------------------------------------------------


def _hover(trial: Trial, run: Run) -> str:
    measured, policy = trial.measured, trial.evaluation.policy
    bits = [choice.bits for choice in policy.layers.values()]
    test = "" if math.isnan(trial.quality_test) else f"<br>on test {trial.quality_test:.4f}"
    trained = f"<br>recovered for {policy.recovery.epochs} epoch(s)" if policy.recovery.epochs else ""
    return (
        f"trial {trial.number}<br>{html.escape(run.metric)} {measured.quality:.4f}{test}<br>{measured.bytes:,} bytes"
        f"<br>{measured.latency_ms:.3g} ms<br>mean {sum(bits) / max(1, len(bits)):.1f} bits{trained}"
    )


def _scatter(trials: Sequence[Trial], run: Run, name: str, x: str, **style: Any) -> go.Scatter:
    return go.Scatter(
        x=[getattr(t.measured, x) for t in trials],
        y=[t.measured.quality for t in trials],
        text=[_hover(t, run) for t in trials],
        hoverinfo="text",
        name=name,
        **style,
    )


def _gains(front: Sequence[Trial], run: Run, x: str) -> go.Scatter:
    """Lines from what trained members of the front were as one-shot policies."""
    ends: list[Trial | None] = []
    for trial in front:
        parent = run.parent(trial)
        ends += [parent, trial, None] if parent is not None else []
    return go.Scatter(
        x=[None if t is None else getattr(t.measured, x) for t in ends],
        y=[None if t is None else t.measured.quality for t in ends],
        mode="lines",
        line={"color": ORANGE, "width": 1.5, "dash": "dot"},
        name="recovery",
        hoverinfo="skip",
    )


def front_figure(run: Run, x: str = "bytes") -> go.Figure:
    """Quality against bytes or `latency_ms`, every trial with a short hover."""
    figure = go.Figure()
    figure.add_trace(
        _scatter(_ok(run), run, "all trials", x, mode="markers", marker={"color": GREY, "size": 6, "opacity": 0.45})
    )
    front = sorted(run.front, key=lambda t: getattr(t.measured, x))
    figure.add_trace(_gains(front, run, x))
    mode = "lines+markers" if x == "bytes" else "markers"
    figure.add_trace(
        _scatter(
            front,
            run,
            "front",
            x,
            mode=mode,
            line={"color": BLUE},
            marker={"color": BLUE, "size": 9, "symbol": ["diamond" if t.evaluation.rung else "circle" for t in front]},
        )
    )
    figure.add_trace(
        go.Scatter(
            x=[getattr(run.dense, x)],
            y=[run.dense.quality],
            mode="markers+text",
            text=["original"],
            textposition="bottom center",
            name="original",
            hoverinfo="x+y",
            marker={"color": GREEN, "size": 14, "symbol": "star"},
        )
    )
    if run.picked is not None:
        figure.add_trace(
            _scatter(
                [run.picked],
                run,
                "picked",
                x,
                mode="markers",
                marker={"color": ORANGE, "size": 18, "symbol": "circle-open", "line": {"width": 3}},
            )
        )
    limit = run.budget.bytes if x == "bytes" else run.budget.ms
    if limit is not None:
        figure.add_vline(x=limit, line={"color": RED, "dash": "dash"}, annotation_text="budget")
    titles = {"bytes": "file size, bytes", "latency_ms": "latency, ms"}
    figure.update_xaxes(type="log", title=titles[x])
    figure.update_yaxes(title=f"{html.escape(run.metric)} on val", range=list(_quality_range(run)))
    return _styled(figure, 460)


def policy_figure(run: Run, trial: Trial, header: Header | None) -> go.Figure:
    """Bits, zeros and bytes per layer of one trial, in network order. Removed layers have none, and say so."""
    names = [layer["name"] for layer in run.layers]
    policy = trial.evaluation.policy
    removed = [any(policy.keep.get(group) == 0 for group in layer.get("groups", ())) for layer in run.layers]
    chosen = [None if gone else policy.layers.get(name) for name, gone in zip(names, removed, strict=True)]
    labels = [html.escape(name) + " (removed)" * gone for name, gone in zip(names, removed, strict=True)]
    bits = [0 if gone else c.bits if c else 32 for c, gone in zip(chosen, removed, strict=True)]
    figure = go.Figure()
    figure.add_trace(go.Bar(x=labels, y=bits, name="bits", marker_color=BLUE))
    figure.add_trace(
        go.Bar(
            x=labels,
            y=[100 * c.sparsity if c else 0 for c in chosen],
            name="zeros, %",
            marker_color=ORANGE,
            visible="legendonly",
        )
    )
    dense = [layer["bytes"] for layer in run.layers]
    if header is not None:
        sizes = {entry.name: entry.nbytes for entry in header.entries}
        figure.add_trace(
            go.Bar(
                x=labels,
                y=[sizes.get(f"{name}.weight", 0) for name in names],
                name="bytes after",
                marker_color=GREEN,
                visible="legendonly",
            )
        )
    figure.add_trace(go.Bar(x=labels, y=dense, name="bytes before", marker_color=GREY, visible="legendonly"))
    figure.update_layout(barmode="group")
    figure.update_yaxes(title="bits (click the legend for zeros and bytes)")
    return _styled(figure, 380)


def progress_figure(run: Run) -> go.Figure:
    """Best feasible quality over evaluations."""
    better = max if run.direction == "max" else min
    x, y, best, count = [], [], math.nan, 0
    for trial in run.trials:
        if trial.evaluation.status == "infeasible" or trial.evaluation.copy_of is not None:
            continue
        count += 1
        if trial.evaluation.status == "ok" and run.budget.excess(trial.measured) <= 0:
            best = trial.measured.quality if math.isnan(best) else better(best, trial.measured.quality)
        x.append(count)
        y.append(None if math.isnan(best) else best)
    figure = go.Figure(go.Scatter(x=x, y=y, mode="lines", line={"color": BLUE, "shape": "hv"}, name="best"))
    figure.update_xaxes(title="evaluations")
    figure.update_yaxes(title=f"best {html.escape(run.metric)} within the budget")
    return _styled(figure, 300)


def _styled(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 20, "t": 20, "b": 60},
        template="plotly_white",
        legend={"orientation": "h", "y": 1.08},
        paper_bgcolor="rgba(0,0,0,0)",
    )
    return figure
