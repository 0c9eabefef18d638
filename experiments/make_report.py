"""Trains the missing runs of the grid in experiments/ and writes the study: report.pdf and RESULTS.md.

python -m experiments.make_report             all rows, three seeds; can be stopped and resumed
python -m experiments.make_report --pack      also packs the finished runs into --predictions
python -m experiments.make_report --provide   also writes checkpoints/provided/

A run is missing if it has neither a folder nor packed predictions; to train all of them again, give --predictions an
empty folder. Every number is read from the runs. A row that is not trained is shown as "not run".
"""

import argparse
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from config import BACKBONES, ROOT, Config
from experiments.findings import all_findings, listed, percent
from experiments.grid import EXPERIMENTS, NAMES, NOT_RUN, read_grid, train_missing
from experiments.intervals import DRAWS
from experiments.pictures import draw_all
from experiments.results import Clips, Result, pack, read_clips
from experiments.scores import Study, read_study
from experiments.tables import HEADS, all_tables
from experiments.trials import STUDY, SWEEP_SHARE, read_trials
from metrics import BINS
from script import UserError, counted, replace_file, script

PREDICTIONS = EXPERIMENTS / "predictions"


# -- report.json ------------------------------------------------------------------------------------


def collect(study: Study, seeds: int, data_dir: Path, names: dict[str, str]) -> dict[str, Any]:
    """report.json without its pictures: everything in the report that depends on the runs, as strings to print.

    Raises UserError if the runs contradict a sentence of the report.
    """
    from heads import NUM_QUERIES, WORD_LOSS

    results = [result for row in study.rows for result in row.results.values()]
    single = int(study.clips.single.sum())
    counts = {split: count_clips(data_dir / split) for split in ("train", "val", "test")}
    return {
        "seeds": ", ".join(map(str, range(seeds))),
        "runs": f"{len(results)} of {sum(len(row.dirs) for row in study.rows)}",
        "sizes": {split: str(count) for split, count in counts.items()} | {"classes": str(len(names))},
        "single": str(single),
        "double": str(len(study.clips) - single),
        "rank": str(Config().lora_r),
        "queries": str(NUM_QUERIES),
        "word_loss": str(WORD_LOSS),
        "dropout": str(Config().dropout),
        "decay": str(Config().weight_decay),
        "level": "95 %",
        "clip": clip_cells(data_dir, study.clips),
        "bins": str(BINS),
        "share": f"{SWEEP_SHARE} %",
        "val_error": f"{100 * (0.5 / counts['val'] ** 0.5):.1f}",
        "cost_devices": devices([row.first for row in study.rows if row.results]),
        "shares": listed([f"{share} %" for share in sorted({t["share"] for t in study.trials} - {100})] or [NOT_RUN]),
        "draws": f"{DRAWS:,}",
        "devices": devices(results),
        "backbones": [backbone_cells(name) for name, backbone in BACKBONES.items() if backbone.tiny],
        "heads": HEADS,
        "tables": all_tables(study),
        "findings": all_findings(study, names),
    }


def count_clips(folder: Path) -> int:
    """The number of rows of a split's metadata.jsonl."""
    return sum(bool(line.strip()) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").split("\n"))


def devices(results: list[Result]) -> str:
    """`60 runs on 1 CPU thread and 12 runs on NVIDIA H200`"""
    counts = Counter(result.metrics["device"] for result in results).most_common()
    return listed([f"{counted(n, 'run')} on {device}" for device, n in counts]) if counts else NOT_RUN


def clip_cells(data_dir: Path, clips: Clips) -> dict[str, str]:
    """The size of a clip, and how many of the training clips have no text."""
    from readers import open_video

    video = open_video(data_dir / "test" / clips.files[0])
    side = video.frames(np.array([0])).shape[-1]
    train = read_clips(data_dir, "train").rows
    textless = sum(not row["text"] for row in train) / len(train)
    return {"frames": str(len(video)), "side": str(side), "textless": percent(textless)}


def backbone_cells(name: str) -> list[str]:
    """Name, parameters, size, input, and what pretraining saw, which is the second paragraph of the backbone's card
    without the sizes."""
    from safetensors import safe_open

    folder = ROOT / "backbones" / f"{name}-tiny"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with safe_open(str(folder / "model.safetensors"), framework="np") as stored:
        # a predictor or a classifier was used by pretraining alone
        keys = [key for key in stored.keys() if not key.startswith(("predictor.", "classifier."))]  # noqa: SIM118, not a dict
        count = sum(stored.get_tensor(key).size for key in keys)

    def first(*keys: str) -> Any:
        return next((config[key] for key in keys if key in config), None)

    width, depth = first("hidden_size", "n_embd"), first("num_hidden_layers", "n_layer")
    heads = first("num_attention_heads", "n_head")
    reads = f"vocabulary of {config.get('vocab_size')}"
    if frames := first("num_frames", "frames_per_clip"):
        patch = f"{config['patch_size']} × {config['patch_size']}"
        tubelet = f" × {config['tubelet_size']}" if "tubelet_size" in config else ""
        reads = f"{frames} × {first('image_size', 'crop_size')}² pixels, patch {patch}{tubelet}"
    card = (folder / "CARD.md").read_text(encoding="utf-8").split("\n\n")
    saw = re.sub(r"(Patch|Width) \d[^.]*\. ?", "", " ".join(card[2].split())).strip()
    return [NAMES[name], f"{count / 1e6:.2f} M", f"{width} / {depth} / {heads}", reads, saw]


# -- RESULTS.md and report.pdf ----------------------------------------------------------------------


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results_text(data: dict[str, Any]) -> str:
    """RESULTS.md. No result is written here."""
    tables, sizes = data["tables"], data["sizes"]
    return f"""# Results

Synthetic dataset ({sizes["classes"]} classes; {sizes["train"]} training, {sizes["val"]} val, {sizes["test"]} test
videos, {data["single"]} of them with one object and {data["double"]} with two), tiny backbones, options of
[experiments/](experiments), seeds {data["seeds"]}. "In full", "LoRA" and "frozen" describe how the last backbone named
is trained; rows with a language model always use a frozen vision backbone. In brackets: 95 % intervals of the
bootstrap over seeds and test videos, Wilson's at 0 and 100 %.

## Classifiers

Accuracy in %, and the expected calibration error ({data["bins"]} bins). {data["findings"]["best"]}

{markdown(HEADS["labels"], tables["labels"])}

What an ideal observer reaches with less than video and text, in %:

{markdown(HEADS["ceilings"], tables["ceilings"])}

## Captioners

Right: size, colour, shape and motion of every object, in %. Size to motion: captions that get this attribute of every
object right, over all clips, in %. CIDEr is from 0 to 10.

{markdown(HEADS["captions"], tables["captions"])}

## Differences

Paired differences of right answers, in points; n = {sizes["test"]}. p, over all clips: McNemar's exact test for each pair
of seeds, the largest of them. {data["findings"]["significance"]}

{markdown(HEADS["differences"], tables["differences"])}

## Controls

The same models on inputs where they should fail, and two baselines. Accuracy in %; for captioners, captions with the
right motions in %. "The other's text" has the clips of "two objects", with the text of the other object. Controls read
the videos, other scores cached 16-bit features: "as it is" may differ by a video.

{markdown(HEADS["controls"], tables["controls"] + tables["caption_controls"])}

## Options and cost

The best epoch of each seed, peak learning rates, and the tokens of a time step (a grid of N × N):

{markdown(HEADS["options"], tables["options"])}

Trained parameters, checkpoint, memory and time of seed 0. With a frozen vision backbone, the time to compute its features
is not included.

{markdown(HEADS["cost"], tables["cost"])}

Hardware: {data["devices"]}. [report.pdf](report.pdf) explains the method and discusses the results.
`make report` writes both from the runs or from [experiments/predictions/](experiments/predictions).
"""


def write_text(path: Path, text: str) -> None:
    """Writes the file completely or not at all."""
    replace_file(path, lambda p: p.write_text(text, encoding="utf-8"))


def compile_pdf(data: dict[str, Any], folder: Path, output: Path) -> None:
    """Writes report.pdf from experiments/report.typ. `folder` has the pictures; report.json is written there too.

    Raises UserError if typst is not installed.
    """
    try:
        import typst
    except ImportError:
        raise UserError("report.pdf needs typst: pip install -r requirements-extra.txt") from None

    # typst reads only below the template's folder, so the template moves to the pictures
    write_text(folder / "report.json", json.dumps(data, indent=1, ensure_ascii=False))
    template = Path(shutil.copy(EXPERIMENTS / "report.typ", folder / "report.typ"))
    shutil.copy(EXPERIMENTS / "references.yml", folder / "references.yml")
    typst.compile(str(template), output=str(output / "report.pdf"))


# -- the script -------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.make_report",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds per row")
    parser.add_argument("--jobs", type=int, default=2, help="runs to train at the same time; they share the cores")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="train only the rows whose names match; if none does, only write"
    )
    parser.add_argument(
        "--data_dir", type=Path, default=Path("synthetic_dataset"), help="it is drawn if it does not exist"
    )
    parser.add_argument("--runs", type=Path, default=EXPERIMENTS / "runs", help="folder of the runs")
    parser.add_argument("--predictions", type=Path, default=PREDICTIONS, help="folder of the packed runs")
    parser.add_argument("--study", type=Path, default=STUDY, help="trials of make_study")
    parser.add_argument("--output", type=Path, default=ROOT, help="folder for report.pdf and RESULTS.md")
    parser.add_argument("--pack", action="store_true", help="also pack the finished runs into --predictions")
    parser.add_argument("--provide", action="store_true", help="also write the runs of seed 0 to checkpoints/provided/")
    return parser


def draw_dataset_once(data_dir: Path) -> None:
    """Draws the dataset if the folder does not exist."""
    if not data_dir.is_dir():
        import dummy_data

        dummy_data.main(["--output", str(data_dir)])


@script
def main(argv: list[str] | None = None) -> None:
    """Trains the missing runs and writes the study.

    Raises UserError for wrong options, for failed runs, and for runs that contradict a sentence of the report.
    """
    args = build_parser().parse_args(argv)
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    trials = read_trials(args.study)
    draw_dataset_once(args.data_dir)

    # --only limits what is trained, never what is reported
    rows = read_grid(args.runs, args.predictions, args.seeds)
    chosen = {row.name for row in read_grid(args.runs, args.predictions, args.seeds, args.only)}
    train_missing([row for row in rows if row.name in chosen], args.data_dir, args.jobs, folders=args.provide)
    if args.pack:
        for row in rows:
            for seed, result in row.results.items():
                pack(result, row.packed[seed])

    # numbers, then pictures, then text: each step needs the one before
    from VLoader import read_display_names

    study = read_study(rows, args.data_dir, args.runs, args.predictions, trials)
    names = read_display_names(args.data_dir, sorted({*study.clips.labels}))
    data = collect(study, args.seeds, args.data_dir, names)
    pictures = args.runs / "report"
    data["pictures"] = draw_all(study, names, args.data_dir, pictures)
    write_text(args.output / "RESULTS.md", results_text(data))
    compile_pdf(data, pictures, args.output)
    print(f"{data['runs']} runs finished; wrote {args.output / 'report.pdf'} and {args.output / 'RESULTS.md'}")

    # provided checkpoints come from seed 0 only
    if args.provide:
        from checkpoint import PROVIDED
        from experiments.provide import LEFT_OUT, provide

        ready = [row for row in rows if row.name not in LEFT_OUT and (row.dirs[0] / "metrics.json").is_file()]
        size = sum(provide(row, PROVIDED, args.data_dir) for row in ready)
        print(f"{counted(len(ready), 'checkpoint')}, {size / 1e6:.1f} MB in {PROVIDED}")


if __name__ == "__main__":
    sys.exit(main())
