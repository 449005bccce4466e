"""What goes wrong in a process that the harness started, and how it is brought about there."""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import resource
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any


def carry_out(plan: Mapping[str, Any]) -> None:
    """Prepare the process for the fault that `harness.Plan` describes; without a kind nothing happens.

    At the `call`-th call of the function `at` (module:name or module:class.name) the process dies before or after it
    (`kill-before`, `kill-after`), or the call raises (`no-space`, `broken-disk`, `no-memory`), or it never returns
    (`hang`). For all of the process: files cannot grow beyond some bytes (`short`), fsync fails (`no-sync`), the
    process may no more than an ordinary one (`ordinary`), the clock is off by some seconds and jumps (`clock`).
    """
    if plan["kind"]:
        _PLANS[plan["kind"]](plan)


def _wrap(plan: Mapping[str, Any], act: Callable[[Callable[[], Any]], Any]) -> None:
    """Let `act(call)` stand for the call that the plan names."""
    module, _, path = plan["at"].partition(":")
    *owners, name = path.split(".")
    holder: Any = importlib.import_module(module)
    for owner in owners:
        holder = getattr(holder, owner)
    whole, calls = getattr(holder, name), 0

    def wrapped(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == plan["call"]:
            return act(lambda: whole(*given, **named))
        return whole(*given, **named)

    setattr(holder, name, wrapped)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_before(plan: Mapping[str, Any]) -> None:
    _wrap(plan, lambda call: (_die(), call()))


def _kill_after(plan: Mapping[str, Any]) -> None:
    _wrap(plan, lambda call: (call(), _die()))


def _raises(make: Callable[[], BaseException]) -> Callable[[Mapping[str, Any]], None]:
    def carry(plan: Mapping[str, Any]) -> None:
        def act(call: Callable[[], Any]) -> Any:
            del call
            raise make()

        _wrap(plan, act)

    return carry


def _hang(plan: Mapping[str, Any]) -> None:
    _wrap(plan, lambda call: (time.sleep(3600), call()))


def _short(plan: Mapping[str, Any]) -> None:
    """The system cuts a write off at the limit, and refuses the next: for SQLite's files too."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (plan["options"]["bytes"], resource.RLIM_INFINITY))


def _no_sync(plan: Mapping[str, Any]) -> None:
    del plan

    def fails(handle: int) -> None:  # noqa: ARG001
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.fsync = fails


def _ordinary(plan: Mapping[str, Any]) -> None:
    """Permissions hold for root too, once it has given up its capabilities (capset(2), version 3)."""
    del plan
    libc = ctypes.CDLL(None, use_errno=True)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def _clock(plan: Mapping[str, Any]) -> None:
    """The wall clock goes wrong; the monotonic one does not, the system promises that."""
    real, calls = time.time, 0

    def skewed() -> float:
        nonlocal calls
        calls += 1
        return real() + plan["options"]["seconds"] * (-1) ** calls

    time.time = skewed


_PLANS: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "kill-before": _kill_before,
    "kill-after": _kill_after,
    "no-space": _raises(lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "broken-disk": _raises(lambda: OSError(errno.EIO, os.strerror(errno.EIO))),
    "no-memory": _raises(lambda: MemoryError("no memory is left")),
    "hang": _hang,
    "short": _short,
    "no-sync": _no_sync,
    "ordinary": _ordinary,
    "clock": _clock,
}
