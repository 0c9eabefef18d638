"""Which epoch of a run to keep, by three rules, measured on the logs of finished runs.

python -m experiments.epochs experiments/runs/*

The program keeps the epoch with the best accuracy on val, and of equally good ones that with the lowest loss.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from script import UserError, read_rows, script

Log = list[dict[str, Any]]  # the rows of a log.jsonl


def chosen_epochs(log: Log, count: int) -> dict[str, dict[str, Any]]:
    """The row of the log that each rule chooses, after `count` val clips were scored in each of its rows.

    One standard error: of all epochs whose accuracy is within one standard error of the best one, that with the lowest
    loss (Breiman et al. 1984, section 3.4.3, who take the simplest model).
    """
    best = max(row["val_accuracy"] for row in log)
    error = math.sqrt(best * (1 - best) / count)
    close = [row for row in log if row["val_accuracy"] >= best - error]
    return {
        "best accuracy": max(log, key=lambda row: (row["val_accuracy"], -row["val_loss"])),
        "lowest loss": min(log, key=lambda row: row["val_loss"]),
        "one standard error": min(close, key=lambda row: row["val_loss"]),
    }


def compared_rules(logs: Sequence[tuple[Log, int]]) -> dict[str, dict[str, float]]:
    """{rule: mean val "accuracy", "loss" and "epoch" of its choices} over the (log, number of val clips) of runs."""
    chosen = [chosen_epochs(log, count) for log, count in logs]
    columns = {"accuracy": "val_accuracy", "loss": "val_loss", "epoch": "epoch"}
    return {
        rule: {name: mean(rows[rule][column] for rows in chosen) for name, column in columns.items()}
        for rule in chosen[0]
    }


@script
def main(argv: list[str] | None = None) -> None:
    """Prints what each rule chooses in each run, and the means. Raises UserError if there is no classifier's run."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.epochs",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    args = parser.parse_args(argv)

    # captioners have no accuracy while they train
    logs = {}
    for run in args.runs:
        if (run / "metrics.json").is_file() and (run / "log.jsonl").is_file():
            log = read_rows(run / "log.jsonl")
            if "val_accuracy" in log[0]:
                logs[run.name] = log, json.loads((run / "metrics.json").read_text(encoding="utf-8"))["val"]["count"]
    if not logs:
        raise UserError("none of these folders holds a finished run of a classifier")
    for name, (log, count) in logs.items():
        shown = [
            f"{rule}: epoch {row['epoch']}, {100 * row['val_accuracy']:.1f} %, loss {row['val_loss']:.3f}"
            for rule, row in chosen_epochs(log, count).items()
        ]
        print(f"{name}: {'; '.join(shown)}")
    for rule, values in compared_rules([*logs.values()]).items():
        shown = f"{100 * values['accuracy']:.2f} %, loss {values['loss']:.4f}, epoch {values['epoch']:.1f}"
        print(f"mean of {len(logs)} runs, {rule}: {shown}")


if __name__ == "__main__":
    sys.exit(main())
