"""Weight and load time of `report.html` with many trials, in headless Chromium, from disk.

    python benchmarks/page.py [--trials 2000 50000] [--repeats 5]

The layers are those of the run in `reports/cifar10`, the trials random. `ready` is from the start of navigation until
the page can be used; `processor` is what its main thread worked until then, which other programs do not make longer.
The first opening, in which Chromium reads Plotly for the first time, stands beside the median of the others. Prints a
table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from autocompress.report.page import render
from autocompress.report.tables import Run

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser import Browser, browser  # noqa: E402
from test_page import crowded  # noqa: E402


def measured(page: Browser, run: Run, trials: int, repeats: int, folder: Path) -> dict[str, Any]:
    """One size of run."""
    start = time.perf_counter()
    content = render(crowded(run, trials)).encode()
    seconds = time.perf_counter() - start
    path = folder / "report.html"
    path.write_bytes(content)
    ready, worked = [], []
    for _ in range(repeats):
        page.open(path)
        page.wait("document.documentElement.dataset.ready !== undefined")
        ready.append(int(page.js("document.documentElement.dataset.ready")) / 1000)
        worked.append(round(page.worked(), 3))
    assert not page.errors, page.errors
    found = {"trials": trials, "bytes": len(content), "written_s": round(seconds, 1), "first_ready_s": ready[0]}
    return found | {"ready_s": median(ready[1:]), "first_processor_s": worked[0], "processor_s": median(worked[1:])}


def main() -> None:
    """Each size in a Chromium of its own, so that its first opening is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[2000, 50000])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    run, rows = Run.read(ROOT / "reports" / "cifar10"), []
    for trials in given.trials:
        with tempfile.TemporaryDirectory() as folder, browser(Path(folder)) as page:
            rows.append(measured(page, run, trials, max(2, given.repeats), Path(folder)))
    print("| " + " | ".join(rows[0]) + " |\n|" + " ---: |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{value:,}" for value in row.values()) + " |")
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}")
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
