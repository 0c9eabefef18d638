"""Scores a trained run again on val and test, with its own options or on other videos.

python score.py --checkpoint checkpoints/timesformer --controls True
python score.py --checkpoint checkpoints/timesformer --data_dir my_clips --output_dir scores

It also scores the segments of a timeline against the true ones:

python score.py --segments my_videos/test/metadata.jsonl timeline.jsonl
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import FIELDS, Config, parse, refuse_classifier_options
from extras.shards import data_folder
from script import Parser, UserError, is_main, leave, printable, script, write_json

if TYPE_CHECKING:
    from build_model import VideoModel
    from VLoader import Splits


@script
def main(argv: list[str] | None = None) -> int:
    """Scores a run again; metrics.json, predictions and pictures replace those in its folder, or go to another one."""
    argv = sys.argv[1:] if argv is None else argv
    if "--segments" in argv:
        return score_segments(argv)
    flags, typed_flags = parse(argv, "score")
    if flags.checkpoint is None:
        raise UserError("which run? add --checkpoint <run folder>")
    from checkpoint import lock_run, read_run

    # which options, which folder
    run_dir = Path(flags.checkpoint)
    saved, _ = read_run(run_dir)
    config = scoring_options(saved, flags, typed_flags)
    folder = scores_folder(run_dir, saved, config, typed_flags)

    # only one process writes there; of several, the main one holds the lock
    if not is_main():
        return score_run(run_dir, flags, typed_flags, config, folder)
    with lock_run(folder):
        return score_run(run_dir, flags, typed_flags, config, folder)


def score_segments(argv: list[str]) -> int:
    """Prints the scores of predicted segments as JSON, and draws them next to the file of the answers."""
    parser = Parser(prog="score.py", allow_abbrev=False)
    parser.add_argument("--segments", nargs=2, type=Path, metavar=("TRUTH", "ANSWERS"), required=True)
    truth, answers = parser.parse_args(argv).segments
    from extras.segments import read_recordings, segment_scores
    from figures import plot_timelines

    recordings = read_recordings(truth, answers)
    print(json.dumps(segment_scores(recordings), indent=1))
    picture = plot_timelines(recordings, answers.with_name(f"{answers.stem}.png"))
    print(printable(f"wrote {picture}"), file=sys.stderr)
    return 0


def scoring_options(saved: Config, flags: Config, typed_flags: set[str]) -> Config:
    """The run's own options, changed by the typed flags of this script.

    Raises UserError for a typed flag that this script does not read.
    """
    # flags that name the run only have to agree with it, which load_run checks
    read = {name for name, f in FIELDS.items() if "score" in f.metadata["scripts"]}
    if ignored := sorted(name for name in typed_flags - read if not FIELDS[name].metadata.get("names_run")):
        raise UserError(f"--{ignored[0]} has no effect here: score.py uses the run's own options")
    changed = {name for name in typed_flags & read if not FIELDS[name].metadata.get("names_run")} - {"checkpoint"}
    config = replace(saved, **{name: getattr(flags, name) for name in changed | {"controls", "reject"}})
    refuse_classifier_options(config)
    return config


def scores_folder(run_dir: Path, saved: Config, config: Config, typed_flags: set[str]) -> Path:
    """The run's own folder, or with --output_dir a folder of the same name in there. Scores on other videos get a
    folder evaluation_<name> in it.

    Raises UserError if it must not be written, because it holds a provided checkpoint or another run.
    """
    from checkpoint import METADATA, PROVIDED

    folder = Path(config.output_dir) / run_dir.resolve().name if "output_dir" in typed_flags else run_dir
    if folder.resolve().is_relative_to(PROVIDED.resolve()):
        raise UserError(f"{PROVIDED} is read-only: add --output_dir <a folder for the scores>")
    if folder.resolve() != run_dir.resolve() and (folder / METADATA).exists():
        raise UserError(f"{folder} holds another run; choose another --output_dir")
    data_dir = Path(config.data_dir).resolve()
    return folder if data_dir == Path(saved.data_dir).resolve() else folder / f"evaluation_{data_dir.name}"


def read_data(run_dir: Path, model: "VideoModel", metadata: dict[str, Any], config: Config) -> "Splits":
    """The splits to score, with the classes of the run. Raises UserError if the run or an option does not fit them."""
    from extras.multilabel import resolve_labels
    from extras.reject import check_val
    from extras.segments import BACKGROUND, add_background
    from runs import only
    from VLoader import check_samples, read_splits

    if config.background and not model.multi_label and BACKGROUND not in metadata["class_names"]:
        raise UserError(f"--background {config.background:g}: {run_dir} was trained without it and has no such class")
    data_dir = data_folder(config.data_dir, config.output_dir)
    splits = read_splits(data_dir, metadata["class_names"], "questions" in metadata, config.group_by)
    splits, _ = resolve_labels(splits, config)
    splits = add_background(splits, config.background)
    check_samples(splits, config.captioning, config.use_text)
    check_val(splits.val, config.reject)
    if config.controls and not splits.train:
        raise UserError(f"--controls True needs the training videos too, and {config.data_dir} has no train/")
    return splits if config.controls else only(splits, "val", "test")  # nearest_neighbour reads the training videos


def score_run(run_dir: Path, flags: Config, typed_flags: set[str], config: Config, folder: Path) -> int:
    """Scores the run with the options in `config`; metrics, predictions and pictures go to `folder`.

    `flags` are the options as typed, which may say where a backbone was moved to. Returns the exit status.
    """
    from checkpoint import METRICS, load_run, load_weights, read_metrics
    from extras.reject import Rule, lacks_threshold
    from pretrained import warn_of_tiny
    from runs import Run, memory_advice, report
    from scan import prepare_data
    from train_code import build_accelerator, cast_frozen, score_splits

    # the trained model, and data with the same classes
    model, _, metadata = load_run(run_dir, flags, typed_flags)
    splits = read_data(run_dir, model, metadata, config)
    warn_of_tiny(config, splits.lexicon)

    # as in training: read every video once, and use cached features
    accelerator = build_accelerator(config)
    cast_frozen(model, config, accelerator)
    splits, features, _ = prepare_data(splits, replace(config, preread="False"), model, accelerator)
    run = Run(config, model.to(accelerator.device), splits, metadata["display_names"], accelerator, folder, features)

    # keep what training measured, such as time and memory; the old controls belong to the old scores
    metrics: dict[str, Any] = read_metrics(folder) if folder.resolve() == run_dir.resolve() else {}
    for name in ("controls", "reject"):
        metrics.pop(name, None)
    metrics["best_epoch"] = load_weights(run_dir, model).get("epoch")
    loaders = run.loaders("val", "test")
    rule = None  # of --reject: as typed, or else the run's own
    if "reject" in metadata and "reject" not in typed_flags:
        rule = Rule(**metadata["reject"])
    try:
        with memory_advice():
            metrics |= score_splits(model, loaders, config, accelerator, folder, rule)
            if accelerator.is_main_process:  # the pictures of the old controls and of the old rule
                for name in ("occlusion.png", "risk.png"):
                    (folder / name).unlink(missing_ok=True)
            report(run, metrics)
    finally:
        for loader in loaders.values():
            loader.close()
        accelerator.end_training()
    if accelerator.is_main_process:
        write_json(metrics, folder / METRICS)
    print(f"wrote {folder}/{METRICS} and {folder}/predictions_*.jsonl")
    return int(lacks_threshold(metrics))


if __name__ == "__main__":
    leave(main())
