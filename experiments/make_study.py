"""Tunes and sweeps the rows of the grid in experiments/, and trains them on a part of the training clips.

python -m experiments.make_study                                    the whole plan: `make study`
python -m experiments.make_study --sweep learning_rate=x0.3,x1,x3 --rows gpt2     tune an option of some rows
python -m experiments.make_study --sweep dropout=0,0.2 --train_share 20           the same with a fifth of the clips
python -m experiments.make_study --train_share 5,20 --rows '^videomae' --seeds 3  learning curves

Every finished trial is added to experiments/study.json at once, and is never trained again: stop with Ctrl-C and give
the same command to continue. A value like x3 is three times the row's own value. Options are chosen on val alone.
"""

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from config import FIELDS, Config
from experiments.grid import EXPERIMENTS, Row, in_parallel, read_grid, train_run
from experiments.make_report import PREDICTIONS, draw_dataset_once
from experiments.results import KEPT, read_clips
from experiments.trials import STUDY, SWEEP_SHARE, Trial, add_trial, matters, own_value, read_trials
from script import UserError, make_folder, script, write_rows

MAX_EPOCHS = 4  # with fewer clips, a run has at most this many times the row's epochs
# (rows, --sweep, --train_share, --seeds): the same three rates for every row, then the sweeps of the report
PLAN = (
    ("", "learning_rate=x0.3,x1,x3", str(SWEEP_SHARE), 1),
    ("loravision", "lora_r=4,16,64", str(SWEEP_SHARE), 1),
    ("(text|gpt2_caption)_fvbb_lorallm", "token_grid=1,2,4", str(SWEEP_SHARE), 1),
    ("^(timesformer|videomae)(_loravision)?$|^(timesformer|videomae|vjepa2)_fvbb$", "head=linear,attentive", "", 1),
    ("^(timesformer|videomae|vjepa2)(_loravision|_fvbb)?$", "", "5,20", 3),
)


# -- what to train ----------------------------------------------------------------------------------


def swept_values(text: str, row: Row) -> list[dict[str, Any]]:
    """The options of each trial of `OPTION=a,b,c` for a row. Raises UserError for an impossible one."""
    option, _, values = text.partition("=")
    if option not in KEPT or not values:
        raise UserError(f"--sweep {text}: expected OPTION=a,b,c with an option of main.py that changes the training")
    found = []
    for value in values.split(","):
        try:
            factor = float(value[1:]) if value.startswith("x") else None
            text = value if factor is None else f"{own_value(option, row) * factor:g}"
            found.append({option: FIELDS[option].metadata["convert"](text)})
        except (ValueError, TypeError) as error:
            raise UserError(f"--sweep {text}: {value} is not a value of {option} for {row.name}: {error}") from None
    return found


def changes(options: dict[str, Any], row: Row) -> dict[str, Any]:
    """The options without those that have the row's own value."""
    return {name: value for name, value in options.items() if value != own_value(name, row)}


def planned(rows: Sequence[Row], sweep: str, shares: Sequence[int], seeds: int) -> list[Trial]:
    """The trials for these rows: those of the sweep, by default with all clips, or of learning curves if there is no
    sweep.

    A row's own value is not trained again: it is the learning curve's trial or, with all clips, the final run. Raises
    UserError if there are no trials.
    """
    if sweep:
        option = sweep.partition("=")[0]
        rows = [row for row in rows if matters(option, row)]
        cases = [
            (row, changes(o, row), share) for row in rows for o in swept_values(sweep, row) for share in shares or [100]
        ]
    else:
        cases = [(row, {}, share) for row in rows for share in shares]
    cases = [(row, options, share) for row, options, share in cases if options or share < 100]
    trials = [Trial(row.name, options, share, seed) for row, options, share in cases for seed in range(seeds)]
    if not trials:
        raise UserError("nothing to train: no row matches --rows, or nothing changes in those that do")
    return trials


def as_shares(text: str) -> list[int]:
    """`5,20,100` as numbers. Raises UserError."""
    try:
        shares = [int(part) for part in filter(None, text.split(","))]
    except ValueError:
        shares = [0]
    if not all(1 <= share <= 100 for share in shares):
        raise UserError(f"--train_share {text}: expected whole numbers from 1 to 100, in percent, as in 5,20,100")
    return shares


# -- a share of the training clips ------------------------------------------------------------------


def write_share(data_dir: Path, share: int, folder: Path) -> Path:
    """A dataset with `share` percent of the training clips of each class, and all of val and test.

    The clips are chosen by a hash of their names, so a smaller share is a part of every larger one. The folder holds
    only metadata: its rows name the videos of the original dataset, so no video is copied.
    """
    for split in ("train", "val", "test"):
        clips = read_clips(data_dir, split)
        rows = chosen_rows(clips.rows, share) if split == "train" else clips.rows
        make_folder(folder / split)
        path = os.path.relpath(data_dir / split, folder / split)
        named = [
            row | {"file_name": Path(path, row["file_name"]).as_posix(), "label": row["file_name"].split("/")[0]}
            for row in rows
        ]
        write_rows(named, folder / split / "metadata.jsonl")
    for name in ("classes.json", "lexicon.json"):
        shutil.copy(data_dir / name, folder / name)
    return folder


def chosen_rows(rows: list[dict[str, Any]], share: int) -> list[dict[str, Any]]:
    """`share` percent of the rows of each class, at least one of each, in their order."""
    by_class: dict[str, list[str]] = {}
    for row in rows:
        by_class.setdefault(row["file_name"].split("/")[0], []).append(row["file_name"])
    kept: set[str] = set()
    for files in by_class.values():
        ranked = sorted(files, key=lambda file: hashlib.sha256(file.encode()).hexdigest())
        kept |= {*ranked[: max(1, round(share / 100 * len(files)))]}
    return [row for row in rows if row["file_name"] in kept]


def epochs_for(config: Config, share: int) -> dict[str, Any]:
    """More epochs for few clips, because a small share would hardly be trained otherwise. `auto` already does this."""
    if share == 100 or not isinstance(config.epochs, int):
        return {}
    return {"epochs": round(config.epochs * min(100 / share, MAX_EPOCHS))}


# -- training ---------------------------------------------------------------------------------------


def train_trial(
    trial: Trial, row: Row, data_dir: Path, runs: Path, file: Path, lock: Lock, environment: dict[str, str]
) -> str:
    """Trains a trial, adds its scores to the file, removes its weights. Returns a line to print."""
    from checkpoint import read_metrics

    options = trial.options | epochs_for(row.config, trial.share)
    flags = ["--config", str(row.file), "--seed", str(trial.seed)]
    flags += [text for option, value in options.items() for text in (f"--{option}", str(value))]
    run_dir = runs / trial.name
    line = train_run(run_dir, flags, data_dir, environment, controls=False)
    metrics = read_metrics(run_dir)
    scores = {"val": right(metrics["val"]), "val_loss": metrics["val"]["loss"], "test": right(metrics["test"])}
    with lock:
        add_trial(trial, scores | {"seconds": metrics["seconds"], "best_epoch": metrics["best_epoch"]}, file)
    for name in ("model.safetensors", "vision", "language"):
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return f"{line}, {100 * scores['val']:.1f} % on val"


def right(scores: dict[str, Any]) -> float:
    """A classifier's accuracy, or the fraction of a captioner's captions that are entirely right."""
    return scores["accuracy"] if "accuracy" in scores else scores["attributes"]["all"]


def train_all(trials: Sequence[Trial], rows: dict[str, Row], args: argparse.Namespace) -> None:
    """Trains the trials that are not in the file yet. Raises UserError if one fails."""
    done = {Trial(t["row"], t["options"], t["share"], t["seed"]).name for t in read_trials(args.study)}
    todo = [trial for trial in trials if trial.name not in done]
    folders = {
        share: write_share(args.data_dir, share, args.runs / f"data_{share}") if share < 100 else args.data_dir
        for share in {trial.share for trial in todo}
    }
    lock = Lock()

    def call(trial: Trial) -> Callable[[dict[str, str]], str]:
        where = (folders[trial.share], args.runs, args.study, lock)
        return lambda environment: train_trial(trial, rows[trial.row], *where, environment)

    print(f"{len(trials) - len(todo)} trials are in {args.study}; {len(todo)} to train")
    in_parallel([call(trial) for trial in todo], args.jobs)


def print_best(trials: Sequence[Trial], rows: dict[str, Row], file: Path) -> None:
    """For each row, share and option of these trials the mean score on val of every value, and the best one."""
    wanted, table = {trial.name for trial in trials}, {}
    found = [t for t in read_trials(file) if Trial(t["row"], t["options"], t["share"], t["seed"]).name in wanted]
    for t in found:
        for option, value in t["options"].items():
            values = table.setdefault((t["row"], t["share"], option), {})
            values.setdefault(value, {})[t["seed"]] = t["val"]

    # a trial without changed options has the row's own value of every option
    for (row, share, option), values in table.items():
        seeds = {seed for scores in values.values() for seed in scores}
        own = [t for t in found if (t["row"], t["share"], t["options"]) == (row, share, {}) and t["seed"] in seeds]
        values |= {own_value(option, rows[row]): {t["seed"]: t["val"] for t in own}} if own else {}
        means = {value: sum(scores.values()) / len(scores) for value, scores in values.items()}
        in_order = sorted(means, key=lambda value: (isinstance(value, str), value))  # `auto` after the numbers
        shown = ", ".join(f"{value}: {100 * means[value]:.1f} %" for value in in_order)
        best, note = max(means, key=lambda v: means[v]), "" if own else "; the row's own value is not among them"
        print(f"{row} with {share} % of the clips: {option} {best} is best on val ({shown}{note})")


# -- the script -------------------------------------------------------------------------------------


@script
def main(argv: list[str] | None = None) -> None:
    """Trains what is missing of a sweep, of learning curves, or of the whole plan. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.make_study",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sweep", metavar="OPTION=a,b,c", default="", help="values of an option of main.py to compare")
    parser.add_argument("--train_share", metavar="5,20,100", default="", help="shares of the training clips in percent")
    parser.add_argument("--rows", metavar="REGEX", default="", help="only the rows whose names match")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each trial")
    parser.add_argument("--jobs", type=int, default=2, help="trials to train at the same time; they share the cores")
    parser.add_argument(
        "--data_dir", type=Path, default=Path("synthetic_dataset"), help="it is drawn if it does not exist"
    )
    parser.add_argument("--runs", type=Path, default=EXPERIMENTS / "runs" / "study", help="folder of the runs")
    parser.add_argument("--study", type=Path, default=STUDY, help="json file of the finished trials")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")

    if (args.rows or args.seeds > 1) and not (args.sweep or args.train_share):
        raise UserError("--rows and --seeds need --sweep or --train_share")

    # without a sweep or shares, all of the plan
    plan = [(args.rows, args.sweep, args.train_share, args.seeds)] if args.sweep or args.train_share else PLAN
    rows = {row.name: row for row in read_grid(args.runs, PREDICTIONS, 1)}
    trials = []
    for only, sweep, shares, seeds in plan:
        chosen = read_grid(args.runs, PREDICTIONS, 1, only)
        trials += planned(chosen, sweep, as_shares(shares), seeds)
    trials = [*{trial.name: trial for trial in trials}.values()]  # the own value of a row is in several sweeps
    draw_dataset_once(args.data_dir)
    make_folder(args.runs)
    train_all(trials, rows, args)
    print_best(trials, rows, args.study)


if __name__ == "__main__":
    sys.exit(main())
