"""Freed memory goes back to the system."""

import platform
import subprocess
import sys

import pytest

from autocompress import memory

PROGRAM = """
import sys
import torch
from autocompress.memory import give_back

def resident():
    with open("/proc/self/statm") as file:
        return 4096 * int(file.read().split()[1])

torch.ones(1)
if sys.argv[1] == "yes":
    give_back()
kept, before = [], resident()
for _ in range(3):
    large = []
    for _ in range(20):
        large.append(torch.ones(2**21))  # 8 MiB, and after each a small block that stays
        kept.append(torch.ones(1000))
    del large
print(resident() - before)
"""


def left(asked: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, asked], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_blocks_between_small_ones_go_back() -> None:
    assert left("yes") < 2**25
    assert left("no") > 2**26  # so it is this that gives them back


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    memory.trim()
    memory.give_back()
