"""Whether lowering what a search lowers also raises the accuracy on `test`.

    python benchmarks/objective.py RUN --data DIR --checkpoint resnet20_cifar10.pt

Takes the screened one-shot candidates of a finished run whose files lie within `NEAR` of its byte budget, evenly from
the least to the most screened loss, and scores each on all of `val` and on `test`. These are the policies that a search
really visits, where a cheap objective is easily fooled. Prints a table and ends with one JSON line: Spearman's rank
correlation of the screened loss, of the loss on all of `val`, and of the accuracy on `val`, with the accuracy on
`test`, all signed so that 1 is best; and the mean accuracy on `test` of the half with less screened loss, less that of
the other half.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from autocompress import load_task
from autocompress.evaluate import Evaluator
from autocompress.report.tables import Run

NEAR = 0.03


def main() -> None:
    """Parse, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--policies", type=int, default=20)
    given = parser.parse_args()
    run = Run.read(given.run)
    limit = run.budget.bytes or run.dense.bytes
    near = [
        t
        for t in run.trials
        if t.evaluation.screened and t.evaluation.status == "ok" and limit * (1 - NEAR) <= t.measured.bytes <= limit
    ]
    near.sort(key=lambda t: t.measured.loss)
    count = min(given.policies, len(near))
    chosen = [near[round(i * (len(near) - 1) / max(1, count - 1))] for i in range(count)]
    task = load_task("cifar10", data=given.data, checkpoint=given.checkpoint)
    evaluator = Evaluator(task)
    rows = []
    print("| trial | screened loss | loss on val | accuracy on val | on test |\n|---|---:|---:|---:|---:|")
    for trial in chosen:
        _, model = evaluator.build(trial.evaluation.policy)
        quality = evaluator.quality(model)
        rows.append((trial.measured.loss, quality.loss, quality.score, task.score(model, "test")))
        print(
            f"| {trial.number} | {rows[-1][0]:.4f} | {rows[-1][1]:.4f} | {rows[-1][2]:.4f} | {rows[-1][3]:.4f} |",
            flush=True,
        )
    found = pd.DataFrame(rows, columns=["screened_loss", "val_loss", "val_accuracy", "test"])
    ranks = found.rank().corr()["test"]
    half = count // 2
    print(
        json.dumps(
            {
                "policies": count,
                "spearman_screened_loss": round(-float(ranks["screened_loss"]), 3),
                "spearman_val_loss": round(-float(ranks["val_loss"]), 3),
                "spearman_val_accuracy": round(float(ranks["val_accuracy"]), 3),
                "test_gain_of_lower_half": round(float(found["test"][:half].mean() - found["test"][half:].mean()), 4),
            }
        )
    )


if __name__ == "__main__":
    main()
