"""What a search asks for and what it learns: budgets, measurements, evaluations. No tensors, no I/O."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from autocompress.errors import BudgetError
from autocompress.policy import Policy

Status = Literal["ok", "infeasible", "failed"]
Quantity = Literal["bytes", "ms", "macs"]

_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_MILLISECONDS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_MACS = {"macs": 1, "kmacs": 10**3, "mmacs": 10**6, "gmacs": 10**9}
_SHARES: dict[str, Quantity] = {"size": "bytes", "latency": "ms", "macs": "macs"}
_HELP = "use bytes (4MB, 900KiB), time (5ms, 800us) or a share of the dense model (size=25%, latency=40%)"


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a candidate measured. Quality is the task's own metric in its own direction; loss is lower-better.

    `teacher_loss` is the divergence from what recovery's best teacher says, NaN where that is the dense model alone.
    `predicted_ms` is what a table of per-layer times says of it, `predicted_bytes` what was told of its file before
    it was built, NaN where there is none.
    """

    bytes: int
    macs: int
    quality: float = math.nan
    loss: float = math.nan
    latency_ms: float = math.nan
    predicted_ms: float = math.nan
    predicted_bytes: float = math.nan
    teacher_loss: float = math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain data, NaN as null."""
        values = asdict(self).items()
        return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values}

    @classmethod
    def from_json(cls, data: Any) -> Measurement:
        """What `to_json` wrote. Raises `KeyError`, `TypeError`, `ValueError` or `OverflowError` on anything else."""
        counts = {name: _typed(name, data[name], int) for name in ("bytes", "macs")}
        rest: dict[str, Any] = {
            name: math.nan if value is None else float(_typed(name, value, int, float))
            for name, value in data.items()
            if name not in counts
        }
        if not all(0 <= count < 2**63 for count in counts.values()):
            raise ValueError(f"bytes and multiply-accumulates are {str(counts)[:80]}")
        return cls(**counts, **rest)


@dataclass(frozen=True, slots=True)
class Limit:
    """One `--budget`: an amount, or (`share`) a fraction of what the dense model needs."""

    quantity: Quantity
    amount: float
    share: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.amount) and self.amount > 0):
            raise BudgetError(f"a budget must be a positive amount, not {self.amount:g}: {_HELP}")

    @classmethod
    def parse(cls, text: str) -> Limit:
        """`4MB`, `900KiB`, `5ms`, `800us`, `20MMACs`, `size=25%`, `latency=40%` or `macs=50%`."""
        found = re.fullmatch(
            r"\s*(?:(size|latency|macs)\s*=\s*)?([-+]?[\d.]+(?:e[-+]?\d+)?)\s*([%a-zµ]*)\s*", text, re.I
        )
        if not found:
            raise BudgetError(f"cannot read the budget {text!r}: {_HELP}")
        name, digits, unit = (found[1] or "").lower(), found[2], found[3].lower()
        try:
            amount = float(digits)
        except ValueError:
            raise BudgetError(f"cannot read the number in the budget {text!r}: {_HELP}") from None
        if unit == "%" and name:
            return cls(_SHARES[name], amount / 100, share=True)
        return cls(*_amount(text, name, amount, unit))


def _amount(text: str, name: str, amount: float, unit: str) -> tuple[Quantity, float]:
    units: dict[Quantity, dict[str, Any]] = {"bytes": _BYTES, "ms": _MILLISECONDS, "macs": _MACS}
    for quantity, scales in units.items():
        if unit in scales and _SHARES.get(name, quantity) == quantity:
            return quantity, amount * scales[unit]
    raise BudgetError(f"cannot read the unit of the budget {text!r}: {_HELP}")


def _excess(value: float, limit: float) -> float:
    if math.isnan(value):
        return math.inf
    if limit == 0:
        return 0.0 if value == 0 else math.inf
    return value / limit - 1


@dataclass(frozen=True, slots=True)
class Budget:
    """Hard upper limits on the written artifact; None is no limit."""

    bytes: int | None = None
    ms: float | None = None
    macs: int | None = None

    @classmethod
    def resolve(cls, limits: Sequence[Limit], dense: Measurement) -> Budget:
        """Amounts for all `limits`; of several on one quantity the tightest holds."""
        tightest: dict[str, float] = {}
        reference = {"bytes": dense.bytes, "ms": dense.latency_ms, "macs": dense.macs}
        for limit in limits:
            amount = limit.amount * (reference[limit.quantity] if limit.share else 1)
            tightest[limit.quantity] = min(amount, tightest.get(limit.quantity, math.inf))
        return cls(
            bytes=math.floor(tightest["bytes"]) if "bytes" in tightest else None,
            ms=tightest.get("ms"),
            macs=math.floor(tightest["macs"]) if "macs" in tightest else None,
        )

    @classmethod
    def from_json(cls, data: Any) -> Budget:
        """What `asdict` gave. Raises `TypeError` or `AttributeError` on anything else."""
        kinds: dict[str, tuple[type, ...]] = {"bytes": (int,), "ms": (float, int), "macs": (int,)}
        return cls(**{name: _typed(name, value, *kinds.get(name, ()), type(None)) for name, value in data.items()})

    def excess(self, measured: Measurement) -> float:
        """The largest share by which a limit is passed; 0 or less fits. A missing latency does not fit."""
        pairs = [(measured.bytes, self.bytes), (measured.latency_ms, self.ms), (measured.macs, self.macs)]
        shares = [_excess(float(value), float(limit)) for value, limit in pairs if limit is not None]
        return max(shares, default=-1.0)

    def static(self) -> Budget:
        """The limits that are known exactly before a candidate is built: bytes and MACs."""
        return Budget(bytes=self.bytes, macs=self.macs)

    def __str__(self) -> str:
        parts = [
            f"{self.bytes:,} bytes" if self.bytes is not None else "",
            f"{self.ms:.4g} ms" if self.ms is not None else "",
            f"{self.macs:,} MACs" if self.macs is not None else "",
        ]
        return " and ".join(part for part in parts if part) or "no budget"


@dataclass(frozen=True, slots=True)
class Curve:
    """How a recovery training went, in a few dozen points.

    `loss` is the mean training loss of the steps since the point before, `lr` the learning rate at it; `heard` are
    (step, metric) as the plateau adjustment heard them, empty without one.
    """

    step: tuple[int, ...] = ()
    loss: tuple[float, ...] = ()
    lr: tuple[float, ...] = ()
    heard: tuple[tuple[int, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data with four digits."""
        rounded = {name: [_short(x) for x in getattr(self, name)] for name in ("loss", "lr")}
        return {"step": list(self.step), **rounded, "heard": [[step, _short(x)] for step, x in self.heard]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Curve:
        """The curve that `to_json` wrote."""
        heard = tuple((int(step), float(value)) for step, value in data["heard"])
        return cls(tuple(map(int, data["step"])), tuple(map(float, data["loss"])), tuple(map(float, data["lr"])), heard)


def _typed(name: str, value: Any, *kinds: type) -> Any:
    """`value`, of one of these types; a boolean is no number, and what is too large for a float neither."""
    if type(value) not in kinds or (type(value) is int and abs(value) >= 2**1000):
        raise TypeError(f"{name} is {str(value)[:80]!r}, which is no {kinds[0].__name__}")
    return value


def _short(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One candidate with what became of it.

    `infeasible` was refused before it was built, by its exact size. `copy_of` is the trial that measured the same
    policy before; nothing was measured again. `screened` says that quality and loss are, or would have been, of a part
    of `val` only. `curve` is that of its recovery training, if there was one.
    """

    policy: Policy
    seed: int
    rung: int
    status: Status
    measurement: Measurement | None = None
    error: str = ""
    seconds: float = 0.0
    copy_of: int | None = None
    screened: bool = False
    curve: Curve | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, NaN as null, without the policy (the journal stores it beside)."""
        return {
            "seed": self.seed,
            "rung": self.rung,
            "status": self.status,
            "measurement": None if self.measurement is None else self.measurement.to_json(),
            "error": self.error,
            "seconds": self.seconds,
            "copy_of": self.copy_of,
            "screened": self.screened,
        } | ({} if self.curve is None else {"curve": self.curve.to_json()})

    @classmethod
    def from_json(cls, policy: Policy, data: dict[str, Any]) -> Evaluation:
        """The evaluation that `to_json` wrote for `policy`. Raises as `Measurement.from_json` on anything else."""
        values = data["measurement"]
        measured = None if values is None else Measurement.from_json(values)
        curve = Curve.from_json(data["curve"]) if data.get("curve") is not None else None
        for name, kinds in _KINDS.items():
            if name in data:
                _typed(name, data[name], *kinds)
        if data["status"] not in get_args(Status):
            raise ValueError(f"the status is {str(data['status'])[:80]!r}; it must be one of {get_args(Status)}")
        return cls(**(data | {"policy": policy, "measurement": measured, "curve": curve}))


_KINDS: dict[str, tuple[type, ...]] = {
    "seed": (int,),
    "rung": (int,),
    "error": (str,),
    "seconds": (float, int),
    "copy_of": (int, type(None)),
    "screened": (bool,),
}
