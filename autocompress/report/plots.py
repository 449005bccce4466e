"""Pictures of a run: the front for paper (matplotlib) and for the browser (Plotly figures)."""

from __future__ import annotations

import html
import io
import math
import warnings
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import plotly.graph_objects as go
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from autocompress.front import Trial
from autocompress.policy import Policy
from autocompress.report.series import Importance, Progress, Sensitivity, level_text, quality_range, thinned
from autocompress.report.tables import Run, size_text

# Okabe and Ito's colours, which colour-blind readers can tell apart
BLUE, ORANGE, GREEN, RED, GREY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999", "#CC79A7"

COLOURS = (BLUE, RED, GREEN, PURPLE, "#56B4E9", ORANGE)
"""For several runs on one chart, in this order."""


class Bars(NamedTuple):
    """A number a layer, in network order: bits (0 where it is gone), % zeros, % of channels, bytes in the file."""

    bits: list[float]
    zeros: list[float]
    channels: list[float]
    after: list[float | None]


def front_picture(run: Run, form: str = "png", width: float = 7.0, height: float = 4.4, dpi: int = 200) -> bytes:
    """The front for paper, `png` or `svg`; sizes in inches. The same run gives the same bytes."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, high = quality_range(run)
    _paper_points(axes, run, low, high)
    _paper_marks(axes, run, low)
    axes.set(
        xscale="log",
        ylim=(low, high + 0.08 * (high - low)),
        xlabel="file size (log scale)",
        ylabel=f"{_safe(run.metric)} on val",
        title=f"{_safe(run.task)}: smaller and better is {'up' if run.direction == 'max' else 'down'} and left",
    )
    left, right = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if right / left > 10 else tuple(range(1, 10))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: size_text(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, which="both")
    out = io.BytesIO()
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "autocompress"}):
        warnings.simplefilter("ignore", UserWarning)  # a name in a script that the font lacks shows as boxes
        figure.savefig(out, format=form, metadata={"Date": None} if form == "svg" else None)
    return out.getvalue()


def _paper_points(axes: Axes, run: Run, low: float, high: float) -> None:
    """Trials, the front with what it began from, and the uniform policies."""

    def dots(trials: Sequence[Trial], marker: str, **style: Any) -> None:
        axes.plot([t.measured.bytes for t in trials], [t.measured.quality for t in trials], marker, **style)

    shown, _ = thinned(run)
    near = [t for t in shown if low <= t.measured.quality <= high]
    dots(near, "o", ms=3.5, color=GREY, alpha=0.5, mew=0, rasterized=True)
    for t in run.front:
        if (parent := run.parent(t)) is not None:
            dots([parent, t], ":", color=ORANGE, lw=1.2, zorder=2)
    dots(run.front, "-", color=BLUE, lw=1.6, zorder=3)
    if run.counted and run.front:
        sizes, qualities = ([getattr(t.measured, name) for t in run.front] for name in ("bytes", "quality"))
        errors = [run.error(quality) for quality in qualities]
        axes.errorbar(sizes, qualities, errors, fmt="none", ecolor=BLUE, elinewidth=0.8, alpha=0.6, zorder=3)
    for trained, marker in ((False, "o"), (True, "D")):
        members = [t for t in run.front if bool(t.evaluation.rung) == trained]
        dots(members, marker, ms=5.5, color=BLUE, mec="white", mew=0.6, zorder=4)
    names = baseline_names(run)
    for baseline in run.baselines:
        m = baseline.measurement
        if low <= m.quality <= high:
            axes.plot(m.bytes, m.quality, "s", ms=5, color=PURPLE, zorder=3)
            above = 6 if "zeros" in baseline.name else -13
            _beside(axes, names[baseline.name], (m.bytes, m.quality), (0, above), PURPLE, fontsize=8)


def _paper_marks(axes: Axes, run: Run, low: float) -> None:
    """The original, the budget, and what was picked."""
    axes.plot(run.dense.bytes, run.dense.quality, "*", ms=13, color=GREEN, zorder=4)
    _beside(axes, "original", (run.dense.bytes, run.dense.quality), (0, -15), GREEN)
    if run.budget.bytes is not None:
        axes.axvline(run.budget.bytes, color=RED, lw=1, ls="--")
        text = f"budget {size_text(run.budget.bytes)}"
        _beside(axes, text, (run.budget.bytes, low), (4, 4), RED, ha="left", rotation=90, fontsize=9)
    if run.picked is not None:
        chosen = run.picked.measured
        axes.plot(chosen.bytes, chosen.quality, "o", ms=13, mfc="none", mec=ORANGE, mew=2, zorder=5)
        text = f"picked: {size_text(chosen.bytes)}, {chosen.quality:.4g}"
        least, most = min(t.measured.bytes for t in run.front), max(run.dense.bytes, chosen.bytes)
        room = math.log(chosen.bytes / least) > 0.3 * math.log(most / least)  # for the words on its left
        offset, side = ((-6, 9), "right") if room else ((6, 9), "left")
        _beside(axes, text, (chosen.bytes, chosen.quality), offset, "#A06000", ha=side)


def _beside(axes: Axes, text: str, at: tuple[float, float], offset: tuple[int, int], colour: str, **more: Any) -> None:
    """Words at a place, moved by `offset` points."""
    shown: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom", "color": colour, **more}
    axes.annotate(_safe(text), at, xytext=offset, **shown)


def baseline_names(run: Run) -> dict[str, str]:
    """What baselines are called on a chart: only the largest says that it is uniform."""
    largest = max(run.baselines, key=lambda b: b.measurement.bytes, default=None)
    return {b.name: b.name if b is largest else b.name.removeprefix("uniform ") for b in run.baselines}


def _safe(text: str) -> str:
    """A user's text as text: no mathtext."""
    return text.replace("$", r"\$")


# --- the browser ----------------------------------------------------------------------------------------

SHORT = 26
"""Characters of a layer's name on an axis; its end tells layers apart."""


def _hover(trial: Trial, run: Run, stands_for: int = 1) -> str:
    measured, policy = trial.measured, trial.evaluation.policy
    test = "" if math.isnan(trial.quality_test) else f", {trial.quality_test:.4f} on test"
    part = " on a part of val" if trial.evaluation.screened else ""
    trained = f"<br>recovery training: {policy.recovery.epochs} epoch(s)" if policy.recovery.epochs else ""
    others = f"<br>one of {stands_for:,} trials about here" if stands_for > 1 else ""
    return (
        f"<b>trial {trial.number}</b><br>{html.escape(run.metric)} {measured.quality:.4f}{part}{test}"
        f"<br>{measured.bytes:,} bytes, {measured.latency_ms:.3g} ms<br>{policy_text(policy)}{trained}{others}"
    )


def policy_text(policy: Policy) -> str:
    """Bits, zeros and channels in a few words."""
    choices = list(policy.layers.values())
    if not choices:
        return "dense"
    bits = [c.bits for c in choices]
    span = f"{min(bits)}" if min(bits) == max(bits) else f"{min(bits)} to {max(bits)}, mean {fmean(bits):.1f},"
    zeros = fmean(c.sparsity for c in choices)
    narrow = [ratio for ratio in policy.keep.values() if ratio < 1]
    channels = f"; {len(narrow)} channel groups narrowed" if narrow else ""
    return f"{span} bits; {zeros:.0%} zeros in the mean layer{channels}"


def _figure(height: int, **layout: Any) -> go.Figure:
    """An empty figure without a template: the page gives colours for light and dark."""
    figure = go.Figure(layout={"template": None})
    figure.update_layout(
        height=height,
        margin={"l": 62, "r": 16, "t": 22, "b": 48},
        showlegend=False,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"align": "left"},
        **layout,
    )
    return figure


def _label(figure: go.Figure, x: float | str, y: float, text: str, colour: str, **more: Any) -> None:
    """Words beside what they are about, in its colour; `x` and `y` as Plotly wants them (log10 on log axes)."""
    shown = {"showarrow": False, "font": {"color": colour, "size": 12}, "xanchor": "left", "yanchor": "bottom"}
    figure.add_annotation(x=x, y=y, text=text, **(shown | more))


def front_figure(run: Run, x: str = "bytes") -> go.Figure:
    """Quality against bytes or `latency_ms` on a log axis: all trials, front, baselines, budget, and what is picked.

    Each point's `customdata` is its trial. The trace `selected` is the page's to move.
    """
    figure = _figure(470, hovermode="closest", clickmode="event")
    shown, counts = thinned(run)
    if run.random is not None:
        _cloud(figure, run.random, x)
    taken = {(getattr(t.measured, x), t.measured.quality) for t in run.front}  # a click there means the front's
    shown = [t for t in shown if (getattr(t.measured, x), t.measured.quality) not in taken]
    _points(
        figure, run, shown, x, "all trials", mode="markers",
        marker={"color": GREY, "size": [5 + 2 * math.log10(counts.get(t.number, 1)) for t in shown], "opacity": 0.45},
        text=[_hover(t, run, counts.get(t.number, 1)) for t in shown],
    )  # fmt: skip
    front = sorted(run.front, key=lambda t: getattr(t.measured, x))
    figure.add_trace(_gains(front, run, x))
    _points(
        figure, run, front, x, "front", mode="lines+markers" if x == "bytes" else "markers",
        line={"color": BLUE, "width": 2},
        marker={
            "color": BLUE, "size": 10, "line": {"color": "white", "width": 1},
            "symbol": ["diamond" if t.evaluation.rung else "circle" for t in front],
        },
        **_error_bars(run, front),
    )  # fmt: skip
    _baseline_points(figure, run, x)
    _original(figure, run, x)
    chosen = run.picked or run.nearest
    _points(
        figure, run, [] if chosen is None else [chosen], x, "selected", mode="markers+text", hoverinfo="skip",
        text=[] if chosen is None else [f"trial {chosen.number}"], textposition="top center",
        textfont={"color": ORANGE, "size": 13},
        marker={"color": ORANGE, "size": 20, "symbol": "circle-open", "line": {"width": 3}},
    )  # fmt: skip
    limit = run.budget.bytes if x == "bytes" else run.budget.ms
    if limit is not None:
        text = f"budget {size_text(limit) if x == 'bytes' else f'{limit:.3g} ms'}"
        figure.add_vline(x=limit, line={"color": RED, "dash": "dash", "width": 1.5})
        _label(figure, math.log10(limit), 0, text, RED, yref="paper", textangle=-90)
    figure.update_xaxes(**_COST_AXES[x])
    figure.update_yaxes(title=_axis_name(run), range=list(quality_range(run)))
    return figure


def _error_bars(run: Run, trials: Sequence[Trial]) -> dict[str, Any]:
    """A standard error up and down, where it is known."""
    if not run.counted:
        return {}
    errors = [run.error(t.measured.quality) for t in trials]
    return {"error_y": {"type": "data", "array": errors, "color": BLUE, "thickness": 1, "width": 0}}


_SIZE_TICKS = {"tickformat": "~s", "dtick": "D2"}
_COST_AXES: dict[str, dict[str, Any]] = {
    "bytes": {"type": "log", "title": "file size, bytes (log)", **_SIZE_TICKS},
    "latency_ms": {"type": "log", "title": "latency, ms (log)"},
}


def _axis_name(run: Run) -> str:
    better = "higher" if run.direction == "max" else "lower"
    return f"{html.escape(_shortened(run.metric))} on val ({better} is better)"


def fronts_figure(runs: Sequence[Run], names: Sequence[str], x: str = "bytes") -> go.Figure:
    """The fronts of several runs of a model, each named at its best member, in its colour."""
    figure = _figure(470, hovermode="closest")
    for run, name, colour in zip(runs, names, COLOURS, strict=False):
        front = sorted(run.front, key=lambda t: getattr(t.measured, x))
        shown = html.escape(_shortened(name, end=True))
        _points(
            figure, run, front, x, shown, mode="lines+markers" if x == "bytes" else "markers",
            line={"color": colour, "width": 2}, marker={"color": colour, "size": 8},
            text=[f"{shown}<br>{_hover(t, run)}" for t in front], hoverinfo="text",
        )  # fmt: skip
        end = front[-1].measured
        side = {"xanchor": "left", "yanchor": "bottom" if run.direction == "max" else "top"}
        _label(figure, math.log10(getattr(end, x)), end.quality, shown, colour, **side)
    _original(figure, runs[0], x)
    limits = {run.budget.bytes if x == "bytes" else run.budget.ms for run in runs}
    for limit in sorted(limit for limit in limits if limit is not None):
        figure.add_vline(x=limit, line={"color": GREY, "dash": "dash", "width": 1})
    ranges = [quality_range(run) for run in runs]
    figure.update_xaxes(**_COST_AXES[x])
    figure.update_yaxes(title=_axis_name(runs[0]), range=[min(r[0] for r in ranges), max(r[1] for r in ranges)])
    return figure


def _points(figure: go.Figure, run: Run, trials: Sequence[Trial], x: str, name: str, **style: Any) -> None:
    told: dict[str, Any] = {"text": [_hover(t, run) for t in trials], "hoverinfo": "text"}
    told = {} if "hoverinfo" in style else told
    figure.add_trace(
        go.Scatter(
            x=[getattr(t.measured, x) for t in trials],
            y=[t.measured.quality for t in trials],
            customdata=[t.number for t in trials],
            name=name,
            **(told | style),
        )
    )


def _cloud(figure: go.Figure, other: Run, x: str) -> None:
    """The front of the random search beside this run."""
    front = sorted(other.front, key=lambda t: getattr(t.measured, x))
    if not front:
        return
    figure.add_trace(
        go.Scatter(
            x=[getattr(t.measured, x) for t in front],
            y=[t.measured.quality for t in front],
            mode="lines+markers",
            name="random search",
            line={"color": PURPLE, "width": 1.5, "dash": "dot"},
            marker={"color": PURPLE, "size": 5},
            text=[f"random search, {other.evaluations} evaluations<br>{_hover(t, other)}" for t in front],
            hoverinfo="text",
        )
    )
    last = front[-1].measured
    _label(figure, math.log10(getattr(last, x)), last.quality, "random search", PURPLE, yanchor="top")


def _baseline_points(figure: go.Figure, run: Run, x: str) -> None:
    low, high = quality_range(run)
    sign = 1 if run.direction == "max" else -1
    known = [b for b in run.baselines if getattr(b.measurement, x) > 0]
    names = [html.escape(b.name) for b in known]
    short = baseline_names(run)
    inside = [low <= b.measurement.quality <= high for b in known]
    edge = low if sign > 0 else high
    figure.add_trace(
        go.Scatter(
            x=[getattr(b.measurement, x) for b in known],
            y=[b.measurement.quality if fits else edge for b, fits in zip(known, inside, strict=True)],
            mode="markers+text",
            name="baselines",
            text=[
                html.escape(short[b.name]) + ("" if fits else " (off the chart)")
                for b, fits in zip(known, inside, strict=True)
            ],
            textposition=["top center" if "zeros" in b.name else "bottom center" for b in known],
            textfont={"color": PURPLE, "size": 11},
            marker={"color": PURPLE, "size": 9, "symbol": ["square" if fits else "triangle-down" for fits in inside]},
            hovertext=[
                f"{n}<br>{html.escape(run.metric)} {b.measurement.quality:.4f}<br>{b.measurement.bytes:,} bytes, "
                f"{b.measurement.latency_ms:.3g} ms"
                for n, b in zip(names, known, strict=True)
            ],
            hoverinfo="text",
            cliponaxis=False,
        )
    )


def _original(figure: go.Figure, run: Run, x: str) -> None:
    figure.add_trace(
        go.Scatter(
            x=[getattr(run.dense, x)],
            y=[run.dense.quality],
            mode="markers+text",
            text=["original"],
            textposition="bottom center",
            textfont={"color": GREEN},
            name="original",
            hovertext=f"original<br>{run.dense.quality:.4f}<br>{run.dense.bytes:,} bytes",
            hoverinfo="text",
            marker={"color": GREEN, "size": 14, "symbol": "star"},
        )
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


def layer_names(run: Run) -> list[str]:
    """Names for an axis, as text: the ends of long ones, all different."""
    names = [str(layer["name"]) for layer in run.layers]
    short = [_shortened(name, end=True) for name in names]
    return [html.escape(s if short.count(s) == 1 else n) for n, s in zip(names, short, strict=True)]


def _shortened(name: str, *, end: bool = False) -> str:
    if len(name) <= SHORT:
        return name
    return "…" + name[-SHORT:] if end else name[:SHORT] + "…"


POLICY_ROWS = ("bits a weight", "zeros, % of weights", "channels kept, %", "bytes (log): grey before, blue after")


def policy_figure(run: Run, bars: Bars) -> go.Figure:
    """Bits, zeros, channels and bytes per layer of one trial, in network order; `bars` holds a number a layer.

    A removed layer has no bits. The page replaces `y` of the traces by name when another trial is selected.
    """
    names = layer_names(run)
    figure = _figure(640, bargap=0.25, barmode="overlay")
    series: list[tuple[str, Sequence[float | None], str, int]] = [
        ("bits", bars.bits, BLUE, 1),
        ("zeros", bars.zeros, ORANGE, 2),
        ("channels", bars.channels, GREEN, 3),
    ]
    series += [("before", [layer["bytes"] for layer in run.layers], GREY, 4), ("after", bars.after, BLUE, 4)]
    for name, values, colour, row in series:
        unit = {"bits": " bits", "before": " bytes before", "after": " bytes after"}.get(name, f"% {name}")
        axis = {"yaxis": "y" if row == 1 else f"y{row}", "xaxis": "x"}
        hover = "%{x}<br>%{y:,.3~f}" + unit + "<extra></extra>"
        figure.add_trace(go.Bar(x=names, y=values, name=name, marker_color=colour, hovertemplate=hover, **axis))
    for row, title in enumerate(POLICY_ROWS, 1):
        top = 1 - (row - 1) * 0.26
        key = "yaxis" if row == 1 else f"yaxis{row}"
        more: dict[str, Any] = (
            {"type": "log", "tickformat": "~s", "ticksuffix": "B"} if row == 4 else {"rangemode": "tozero"}
        )
        more |= {"range": [0, 105]} if row in (2, 3) else {}
        figure.update_layout({key: {"domain": [top - 0.18, top], "anchor": "x", "nticks": 4, **more}})
        _label(figure, 0, top, title, "", xref="paper", yref="paper", font={"size": 12})
    figure.update_layout(xaxis={"anchor": "y4", "tickangle": -60, "automargin": True, "tickfont": {"size": 10}})
    return figure


def sensitivity_figure(run: Run, found: Sensitivity, chosen: Sequence[str | None]) -> go.Figure:
    """Layers down, levels across, the loss of the whole model as colour; squares mark what `chosen` names a layer."""
    short = {str(layer["name"]): name for layer, name in zip(run.layers, layer_names(run), strict=True)}
    names = [short.get(name, html.escape(name)) for name in found.layers]
    levels = [level_text(*level) for level in found.levels]
    figure = _figure(150 + 19 * len(names))
    logs = [[None if math.isnan(v) else math.log10(max(v, 1e-9)) for v in row] for row in found.loss]
    text = [[None if math.isnan(v) else f"{n}<br>{level}<br>loss {v:.2g}" for v, level in zip(row, levels, strict=True)]
            for n, row in zip(names, found.loss, strict=True)]  # fmt: skip
    ticks = list(range(math.floor(_least(logs)), math.ceil(_most(logs)) + 1))
    bar = {"title": {"text": "loss", "side": "top"}, "tickvals": ticks, "ticktext": [f"1e{t}" for t in ticks]}
    figure.add_trace(
        go.Heatmap(
            x=levels, y=names, z=logs, text=text, hoverinfo="text", colorscale="Cividis", xgap=1, ygap=1,
            colorbar=bar | {"thickness": 12, "len": 1, "outlinewidth": 0}, name="sensitivity",
        )
    )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=list(chosen), y=names, mode="markers", name="chosen", hoverinfo="skip",
            marker={"symbol": "square-open", "size": 12, "color": "#ff5c39", "line": {"width": 2.5}},
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", automargin=True, tickfont={"size": 10}, showgrid=False, dtick=1)
    figure.update_xaxes(tickangle=-60, automargin=True, tickfont={"size": 10}, showgrid=False, type="category")
    figure.update_xaxes(categoryorder="array", categoryarray=levels)
    return figure


def _least(rows: Sequence[Sequence[float | None]]) -> float:
    return min((v for row in rows for v in row if v is not None), default=0.0)


def _most(rows: Sequence[Sequence[float | None]]) -> float:
    return max((v for row in rows for v in row if v is not None), default=1.0)


def progress_figure(lines: Sequence[tuple[Progress, str]], x: str) -> go.Figure:
    """Hypervolume over `evaluations` or `seconds`; a line each with its colour, named at its end."""
    figure = _figure(320)
    for line, colour in lines:
        xs = getattr(line, x)
        figure.add_trace(
            go.Scatter(
                x=xs, y=line.volume, mode="lines", name=html.escape(line.name),
                line={"color": colour, "shape": "hv", "width": 2},
                hovertemplate=f"{html.escape(line.name)}<br>%{{x:,.4~g}} {x}<br>%{{y:.3f}}<extra></extra>",
            )
        )  # fmt: skip
        _label(figure, xs[-1], line.volume[-1], html.escape(line.name), colour, xanchor="right")
    figure.update_xaxes(title="evaluations" if x == "evaluations" else "seconds of the search, its profile included")
    figure.update_yaxes(title="hypervolume, share of the box", rangemode="tozero")
    return figure


def curves_figure(trials: Sequence[Trial], selected: int) -> go.Figure:
    """Training loss and learning rate over the steps of each trial's recovery training; `selected` stands out.

    Each trace's `meta` is its trial.
    """
    figure = _figure(430, hovermode="closest")
    for t in trials:
        curve = t.evaluation.curve
        assert curve is not None
        style = curve_style(t.number == selected)
        for axis, values, what in (("y", curve.loss, "loss"), ("y2", curve.lr, "rate")):
            figure.add_trace(
                go.Scatter(
                    x=curve.step, y=values, yaxis=axis, mode="lines", name=f"trial {t.number}", meta=t.number,
                    hovertemplate=f"trial {t.number}, step %{{x}}<br>{what} %{{y:.3g}}<extra></extra>", **style,
                )
            )  # fmt: skip
    log = {"type": "log", "tickformat": "~g", "nticks": 5}
    figure.update_layout(yaxis={"domain": [0.5, 0.95], **log}, yaxis2={"domain": [0, 0.4], "anchor": "x", **log})
    figure.update_xaxes(title="training steps", anchor="y2")
    for y, text in ((0.95, "training loss (log)"), (0.4, "learning rate (log)")):
        _label(figure, 0, y, text, "", xref="paper", yref="paper", font={"size": 12})
    return figure


def curve_style(bold: bool) -> dict[str, Any]:
    """How a selected curve differs from the others."""
    return {"line": {"color": ORANGE if bold else GREY, "width": 2.5 if bold else 1}, "opacity": 1 if bold else 0.5}


def importance_figure(found: Importance, colour: str, top: int = 15) -> go.Figure:
    """Bars of the largest shares, each with its name on the bar's left."""
    shares = found.shares[:top][::-1]
    figure = _figure(90 + 22 * len(shares))
    parts = [name.partition(" of ") for name, _ in shares]
    names = [html.escape(f"{what}{of}{_shortened(layer, end=True)}") for what, of, layer in parts]
    bar = go.Bar(
        x=[share for _, share in shares], y=list(range(len(shares))), orientation="h", marker_color=colour,
        text=[f"{share:.0%}" for _, share in shares], textposition="outside", cliponaxis=False,
        hovertext=[html.escape(name) for name, _ in shares], hoverinfo="text",
    )  # fmt: skip
    figure.add_trace(bar)
    figure.update_yaxes(tickvals=list(range(len(shares))), ticktext=names, automargin=True, showgrid=False)
    figure.update_xaxes(title="share of what the forest explains", tickformat=".0%", rangemode="tozero")
    return figure


def predicted_figure(pairs: Sequence[tuple[Trial, float, float]], unit: str) -> go.Figure:
    """Measured against predicted with the line where both agree; circles are one-shot, diamonds trained."""
    figure = _figure(340, hovermode="closest")
    told, measured = [p for _, p, _ in pairs], [m for _, _, m in pairs]
    ends = [min(*told, *measured), max(*told, *measured)]
    line = {"color": GREY, "width": 1}
    figure.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=line, hoverinfo="skip", name="equal"))
    figure.add_trace(
        go.Scatter(
            x=told, y=measured, mode="markers", name="trials", customdata=[t.number for t, _, _ in pairs],
            marker={
                "color": [ORANGE if t.evaluation.rung else BLUE for t, _, _ in pairs], "size": 7, "opacity": 0.7,
                "symbol": ["diamond" if t.evaluation.rung else "circle" for t, _, _ in pairs],
            },
            text=[f"trial {t.number}<br>predicted {p:,.4g} {unit}<br>measured {m:,.4g}" for t, p, m in pairs],
            hoverinfo="text",
        )
    )  # fmt: skip
    _label(figure, math.log10(ends[1]), math.log10(ends[1]), "equal", GREY, xanchor="right")
    ticks = _SIZE_TICKS if unit == "bytes" else {}
    figure.update_xaxes(type="log", title=f"predicted, {unit} (log)", **ticks)
    figure.update_yaxes(type="log", title=f"measured, {unit} (log)", **ticks)
    return figure


def details_figure(rows: Sequence[tuple[str, float, float]], trial: int) -> go.Figure:
    """(name, original, trial): a grey dot and a blue one a row, joined."""
    figure = _figure(110 + 24 * len(rows))
    names = [html.escape(_shortened(name)) for name, _, _ in rows]
    places = list(range(len(rows)))
    joints_x = [v for _, a, b in rows for v in (a, b, None)]
    joints_y = [v for i in places for v in (i, i, None)]
    figure.add_trace(go.Scatter(x=joints_x, y=joints_y, mode="lines", name="change", hoverinfo="skip",
                                line={"color": GREY, "width": 2}))  # fmt: skip
    for name, colour, values in (("original", GREY, [a for _, a, _ in rows]), ("trial", BLUE, [b for *_, b in rows])):
        shown = "original" if name == "original" else f"trial {trial}"
        figure.add_trace(
            go.Scatter(
                x=values, y=places, mode="markers", name=name, marker={"color": colour, "size": 10},
                hovertemplate=f"{shown}: %{{x:.4~g}}<extra></extra>",
            )
        )  # fmt: skip
    figure.update_yaxes(tickvals=places, ticktext=names, autorange="reversed", automargin=True, showgrid=False)
    figure.update_xaxes(title="on val")
    return figure
