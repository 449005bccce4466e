"""Feeds readers with hostile files: guided by coverage (atheris, the extra `fuzz`), or nearly sound ones at random.

    python -m tests.fuzz.run --runs 10000 --plain        # every reader, seeded, no extra needed
    python -m tests.fuzz.run --runs 1000000 --seconds 600 "packed, checksum right"

Prints one JSON line per reader. The first input that breaks a reader ends it and is kept in `--keep`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
SEED = 8
MARK = "counted "
"""Before the counts that a child prints."""


def main() -> None:
    """All readers, or those that are named, each in a process of its own."""
    given = _parser().parse_args()
    if given.child:
        child(given)
        return
    broken = 0
    for name in given.readers or _names():
        found = one(name, given)
        broken += not found["sound"]
        print(json.dumps(found), flush=True)
    sys.exit(1 if broken else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", help="names as the JSON lines have them; all without one")
    parser.add_argument("--runs", type=int, default=10_000, help="inputs per reader")
    parser.add_argument("--seconds", type=int, default=3600, help="at most so long per reader")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--plain", action="store_true", help="random changes, without atheris")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where inputs that break a reader go")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def _names() -> list[str]:
    from fuzz.readers import readers

    with tempfile.TemporaryDirectory() as folder:
        return [reader.name for reader in readers(Path(folder))]


def one(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """What became of a reader: inputs, how many gave a value and how many an error, and the slowest."""
    command = [sys.executable, "-m", "tests.fuzz.run", name, "--child"]
    for option in ("runs", "seconds", "seed", "keep"):
        command += [f"--{option}", str(getattr(given, option))]
    start = time.monotonic()
    done = subprocess.run(
        [*command, *(["--plain"] if given.plain else [])], capture_output=True, text=True, cwd=TESTS.parent
    )
    counts = re.findall(rf"^{MARK}(.*)$", done.stdout, re.M)
    found = json.loads(counts[-1]) if counts else {"inputs": 0}
    sound = done.returncode == 0
    if not sound:
        sys.stderr.write(done.stdout[-2000:] + done.stderr[-4000:])
    about = {"reader": name, "engine": "plain" if given.plain else "atheris", "sound": sound}
    return about | found | {"seconds": round(time.monotonic() - start, 1)}


# --- in the child ---------------------------------------------------------------------------------------


def child(given: argparse.Namespace) -> None:
    """Feed one reader."""
    if not given.plain:
        guided(given)
    from fuzz.mutate import mutated
    from fuzz.readers import Judge, readers

    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        reader = next(r for r in readers(Path(folder)) if r.name == given.readers[0])
        judge, draw, end = Judge(reader), random.Random(given.seed), time.monotonic() + given.seconds
        for _ in range(given.runs):
            content = mutated(draw, reader.seeds)
            _judged(judge, content, given.keep)
            if time.monotonic() > end:
                break
        print(MARK + json.dumps(_counts(judge)), flush=True)


def guided(given: argparse.Namespace) -> None:
    """Let atheris choose inputs that reach code which none has reached; does not return."""
    import atheris

    with atheris.instrument_imports(include=["autocompress", "tomllib", "json", "pickle", "zipfile"]):
        from fuzz.mutate import mutated
        from fuzz.readers import Judge, readers
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        reader = next(r for r in readers(Path(folder)) if r.name == given.readers[0])
        judge, told = Judge(reader), time.monotonic()
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for i, seed in enumerate(reader.seeds):
            (corpus / str(i)).write_bytes(seed)

        def feed(content: bytes) -> None:
            nonlocal told
            _judged(judge, content, given.keep)
            done = judge.read + judge.refused
            if done >= given.runs - 1 or time.monotonic() > told + 5:
                told = time.monotonic()
                print(MARK + json.dumps(_counts(judge)), flush=True)

        def change(content: bytes, largest: int, seed: int) -> bytes:
            """Every other input by atheris' own changes, the others by ours, which know JSON."""
            if seed % 2:
                return bytes(atheris.Mutate(content, largest))
            return mutated(random.Random(seed), [content, *reader.seeds])[:largest]

        options = [f"-runs={given.runs}", f"-max_total_time={given.seconds}", f"-seed={given.seed}"]
        options += ["-max_len=65536", "-timeout=60", "-rss_limit_mb=4096", "-print_final_stats=0"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], feed, custom_mutator=change)
        atheris.Fuzz()


def _judged(judge: Any, content: bytes, keep: Path) -> None:
    try:
        judge(content)
    except BaseException:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{time.time_ns()}.bin").write_bytes(content)
        raise


def _counts(judge: Any) -> dict[str, Any]:
    done = judge.read + judge.refused
    return {"inputs": done, "read": judge.read, "refused": judge.refused, "slowest_s": round(judge.slowest, 3)}


def _memory() -> str | None:
    """A folder in memory, where there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    main()
