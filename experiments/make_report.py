"""Trains what is missing of the grid in experiments/, and writes the study: report.pdf and RESULTS.md.

python -m experiments.make_report               all rows, three seeds; resumable
python -m experiments.make_report --provide     then also writes checkpoints/provided/

Every number in them comes from the runs' metrics.json and predictions; a run that is not there is "not run".
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from config import ROOT, Config, as_flags, read_yaml, run_name, write_yaml
from dummy_data import LEXICON
from metrics import Summary, attribute_summary, attributes_in, bounds, caption_summary, label_rows_summary, resampled
from script import UserError, make_folder, replace_file, run_script

EXPERIMENTS = ROOT / "experiments"
NAMES = {"timesformer": "TimeSformer", "videomae": "VideoMAE", "bert": "BERT", "gpt2": "GPT-2"}
TASKS = ("video classifier", "video + language classifier", "video captioner")
CONTROLS = {
    "majority": "majority",
    "nearest_neighbour": "nearest neighbour",
    "one_frame": "one frame",
    "shuffled": "shuffled",
    "reversed": "reversed",
    "blank_video": "blank",
    "text_shuffled": "text shuffled",
}
NOT_RUN = "not run"
JOINT = ("colour", "shape", "motion")  # scored together too: size is named least reliably


class Row:
    """One line of the grid: its options, and the runs of its seeds that are finished."""

    def __init__(self, file: Path, runs: Path, seeds: int):
        self.file = file
        self.config = Config(**read_yaml(file))
        self.name = run_name(self.config)
        self.dirs = [runs / f"{self.name}_seed{seed}" for seed in range(seeds)]

    @property
    def task(self) -> str:
        return TASKS[self.config.use_vlm + self.config.captioning]

    @property
    def title(self) -> str:
        config = self.config
        trained = "LoRA" if config.use_lora_vision else "frozen" if config.freeze_visionbackbone else "in full"
        if config.use_vlm:
            trained = "LoRA" if config.use_lora_llm else "frozen" if config.freeze_llmbackbone else "in full"
        names = [NAMES[config.vision_model]] + ([NAMES[config.language_model]] if config.use_vlm else [])
        return f"{' + '.join(names)} {trained}{', text' if config.use_text else ''}"

    def finished(self) -> list[Path]:
        from checkpoint import read_metrics

        return [d for d in self.dirs if "controls" in read_metrics(d)]

    def results(self) -> list[dict[str, Any]]:
        from checkpoint import read_metrics

        return [read_metrics(d) for d in self.finished()]


def read_grid(runs: Path, seeds: int, only: str) -> list[Row]:
    """The rows in the order of tasks, vision models, text, and of what is trained."""
    rows = [Row(file, runs, seeds) for file in EXPERIMENTS.glob("*.yaml") if re.search(only, file.stem)]
    order = ("in full", "LoRA", "frozen")
    return sorted(
        rows,
        key=lambda r: (
            TASKS.index(r.task),
            r.config.vision_model,
            r.config.use_text,
            [t in r.title for t in order][::-1],
        ),
    )


# -- training what is missing -------------------------------------------------------------------------


def train_missing(rows: list[Row], data_dir: Path, jobs: int) -> None:
    """Trains every run that is not finished, `jobs` at a time, one process each. Raises UserError if one fails."""
    todo = [(row, seed) for row in rows for seed, d in enumerate(row.dirs) if d not in row.finished()]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))  # more than there are cores get in each other's way
    with ThreadPoolExecutor(jobs) as pool:
        started = [
            pool.submit(train_one, row, seed, data_dir, os.environ | {"OMP_NUM_THREADS": threads}) for row, seed in todo
        ]
        try:
            for number, done in enumerate(as_completed(started), start=1):
                print(f"{number}/{len(todo)} {done.result()}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def train_one(row: Row, seed: int, data_dir: Path, environment: dict[str, str]) -> str:
    """Starts a run, goes on with one that was stopped, or adds the controls of one that lacks them."""
    run_dir, start = row.dirs[seed], time.perf_counter()
    if (run_dir / "metrics.json").is_file():
        script, flags = "score.py", ["--checkpoint", str(run_dir), "--controls", "True"]
    else:
        script, flags = (
            "main.py",
            ["--config", str(row.file), "--seed", str(seed), "--data_dir", str(data_dir), "--controls", "True"],
        )
        flags += ["--output_dir", str(run_dir.parent), "--run_name", run_dir.name]
        flags += ["--resume", "True"] if (run_dir / "state").is_dir() else ["--overwrite", "True"]
    command = [sys.executable, str(ROOT / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{run_dir.name} failed: {done.stderr.strip().splitlines()[-1]}")
    return f"{run_dir.name}: {time.perf_counter() - start:.0f} s"


# -- numbers ------------------------------------------------------------------------------------------


def predictions(run_dir: Path) -> list[dict[str, Any]]:
    from script import read_rows

    return read_rows(run_dir / "predictions_test.jsonl")


def summary_of_run(row: Row, run_dir: Path) -> Summary:
    """A run's scores on any draw of its test clips."""
    rows = predictions(run_dir)
    if not row.config.captioning:
        return label_rows_summary(rows)
    captions = [r["caption"] for r in rows]
    scores = caption_summary(captions, [r["references"] for r in rows])
    truth = [attributes_in(r["references"][0], LEXICON) for r in rows]
    if any(None in t.values() for t in truth):
        return scores
    named = [attributes_in(c, LEXICON) for c in captions]
    attributes = attribute_summary(named, truth)
    joint = np.array([all(n[name] == t[name] for name in JOINT) for n, t in zip(named, truth, strict=True)])
    return lambda indices: scores(indices) | attributes(indices) | {"+".join(JOINT): float(joint[indices].mean())}


def row_scores(row: Row) -> dict[str, dict[str, Any]]:
    """score -> mean over the seeds, its 95 % interval (bootstrap over clips, the same for all seeds), and range."""
    summaries = [summary_of_run(row, d) for d in row.finished()]
    if not summaries:
        return {}
    count = len(predictions(row.finished()[0]))
    values, draws = [s(np.arange(count)) for s in summaries], resampled(summaries, count)
    return {
        name: {
            "mean": mean(v[name] for v in values),
            "interval": bounds(np.mean([d[name] for d in draws], axis=0)),
            "range": [min(v[name] for v in values), max(v[name] for v in values)],
        }
        for name in values[0]
    }


def show(score: dict[str, Any] | None, scale: float = 100, digits: int = 1, interval: bool = False) -> str:
    if score is None:
        return NOT_RUN
    low, high = (f"{scale * v:.{digits}f}" for v in score["interval"])
    return f"{scale * score['mean']:.{digits}f}" + (f" [{low}, {high}]" if interval else "")


def span(score: dict[str, Any] | None, scale: float = 100, digits: int = 1) -> str:
    return " – ".join(f"{scale * v:.{digits}f}" for v in score["range"]) if score else NOT_RUN


def trained_parameters(run_dir: Path) -> int:
    from checkpoint import WEIGHTS, read_tensors

    tensors, _ = read_tensors(run_dir / WEIGHTS)
    return sum(t.numel() for t in tensors.values())


def result_cells(row: Row, scores: dict[str, Any]) -> list[str]:
    seeds = f"{len(row.finished())} of {len(row.dirs)}"
    if row.config.captioning:
        return [
            row.title,
            seeds,
            show(scores.get("CIDEr"), 1, 2, True),
            show(scores.get("Bleu_4"), 1, 3),
            show(scores.get("ROUGE_L"), 1, 3),
            show(scores.get("exact_match")),
            show(scores.get("motion")),
            show(scores.get("colour+shape+motion"), interval=True),
            show(scores.get("all")),
        ]
    accuracy = scores.get("accuracy")
    return [
        row.title,
        seeds,
        show(accuracy, interval=True),
        span(accuracy),
        show(scores.get("mean_class_recall")),
        show(scores.get("macro_f1")),
        show(scores.get("calibration_error"), 1, 3),
    ]


def control_cells(row: Row) -> list[str]:
    """Means over the seeds, in percent: accuracy, for captioners the share with the motion right."""
    tables = [m["controls"] for m in row.results()]
    cells = [row.title]
    for name in ("as_it_is", *CONTROLS):
        if not tables:
            cells.append(NOT_RUN)
        elif name not in tables[0]:
            cells.append("")
        else:
            score = "motion" if row.config.captioning else "accuracy"
            cells.append(f"{100 * mean(t[name][score] for t in tables):.1f}")
    return cells


def cost_cells(row: Row) -> list[str]:
    results = row.results()
    if not results:
        return [row.title, *[NOT_RUN] * 5]
    weights = row.finished()[0] / "model.safetensors"
    return [
        row.title,
        f"{trained_parameters(row.finished()[0]):,}",
        f"{weights.stat().st_size / 1e6:.2f}",
        f"{mean(m['seconds_per_epoch'] for m in results):.1f}",
        f"{mean(m['seconds'] for m in results):.0f}",
        f"{max(m['peak_mb'] for m in results):.0f}",
    ]


HEADS = {
    "labels": ["model", "seeds", "accuracy % [95 %]", "range of seeds", "recall %", "macro-F1 %", "calibration error"],
    "captions": [
        "model",
        "seeds",
        "CIDEr [95 %]",
        "Bleu-4",
        "ROUGE-L",
        "exact %",
        "motion %",
        "all but size % [95 %]",
        "all four %",
    ],
    "controls": ["model", "as it is", *CONTROLS.values()],
    "cost": ["model", "trained parameters", "checkpoint MB", "s per epoch", "s in all", "peak MB"],
}


def collect(rows: list[Row], scores: dict[str, dict], seeds: int, data_dir: Path) -> dict[str, Any]:
    """All that the report says in numbers, as texts ready to print."""
    from VLoader import read_splits

    splits = read_splits(data_dir)
    labels = [row for row in rows if not row.config.captioning]
    captions = [row for row in rows if row.config.captioning]
    results = [m for row in rows for m in row.results()]
    return {
        "seeds": ", ".join(map(str, range(seeds))),
        "runs": f"{len(results)} of {sum(len(row.dirs) for row in rows)}",
        "sizes": {name: str(len(getattr(splits, name))) for name in ("train", "val", "test")},
        "classes": str(len(splits.class_names)),
        "epochs": str(Config().epochs),
        "level": "95 %",
        "tables": {
            "labels": [result_cells(row, scores[row.name]) for row in labels],
            "captions": [result_cells(row, scores[row.name]) for row in captions],
            "controls": [control_cells(row) for row in labels],
            "caption_controls": [control_cells(row) for row in captions],
            "cost": [cost_cells(row) for row in rows],
        },
        "heads": HEADS,
        "findings": findings(rows, scores),
        "machine": machine(rows),
    }


def findings(rows: list[Row], scores: dict[str, dict]) -> dict[str, str]:
    """What the text of the report says of the numbers."""

    def over(task: str, control: str, score: str = "accuracy") -> str:
        found = [
            m["controls"][control][score]
            for r in rows
            if r.task == task
            for m in r.results()
            if control in m["controls"]
        ]
        values = sorted({f"{100 * v:.1f}" for v in (min(found), max(found))}, key=float) if found else []
        return f"{'–'.join(values)} %" if values else NOT_RUN

    def best(task: str, score: str) -> str:
        found = {r.title: scores[r.name][score] for r in rows if r.task == task and scores[r.name]}
        most = max((f["mean"] for f in found.values()), default=None)
        titles = [title for title, f in found.items() if f["mean"] == most]
        return f"{'; '.join(titles)} ({show(found[titles[0]], interval=True)} %)" if titles else NOT_RUN

    said = {f"best_{i}": best(task, "colour+shape+motion" if i == 2 else "accuracy") for i, task in enumerate(TASKS)}
    for i, task in enumerate(TASKS):
        for control in ("as_it_is", *CONTROLS):
            said[f"{control}_{i}"] = over(task, control, "motion" if i == 2 else "accuracy")
    texts = [m["controls"] for r in rows if r.config.use_text and not r.config.captioning for m in r.results()]
    lost = [100 * (t["as_it_is"]["accuracy"] - t["text_shuffled"]["accuracy"]) for t in texts]
    said["text_cost"] = f"{round(mean(lost), 1) + 0.0:.1f} points" if texts else NOT_RUN  # no -0.0
    said["text_alone"] = f"{100 * mean(t['text_only']['accuracy'] for t in texts):.1f} %" if texts else NOT_RUN
    return said


def machine(rows: list[Row]) -> str:
    import torch

    devices = sorted({m["device"] for row in rows for m in row.results()})
    return f"{' and '.join(devices) or NOT_RUN}, torch {torch.__version__.split('+')[0]}"


# -- pictures -----------------------------------------------------------------------------------------


def draw(rows: list[Row], scores: dict[str, dict], data_dir: Path, folder: Path) -> dict[str, str]:
    """The report's pictures in `folder`: name -> file's name, where there is a run to draw it from."""
    from figures import plot_bars, plot_clips
    from readers import open_video
    from VLoader import read_display_names, read_splits

    make_folder(folder)
    splits = read_splits(data_dir)
    display = read_display_names(data_dir, splits.class_names)
    firsts = [next(s for s in splits.train if s.label == name) for name in splits.class_names]
    clips = []
    for sample in firsts:
        video = open_video(sample.path)
        frames = video.frames(np.linspace(0, len(video) - 1, 8).round().astype(int))
        said = f"  |  caption: {sample.captions[0]}" if sample.captions else ""
        clips.append((frames, f"{display[sample.label]}{said}" + (f"  |  text: {sample.text}" if sample.text else "")))
    drawn = {"data": smaller(plot_clips(clips, folder / "data.png"), folder / "data.jpg").name}
    for key, captioning, score in (("labels", False, "accuracy"), ("captions", True, "colour+shape+motion")):
        chosen = [r for r in rows if r.config.captioning == captioning and scores[r.name]]
        bars = {r.title: (scores[r.name][score]["mean"], scores[r.name][score]["interval"]) for r in chosen}
        if bars:
            title = f"{score.replace('+', ', ')}: share of the test videos"
            drawn[key] = plot_bars(bars, title, folder / f"{key}.png", zoom=True).name
        worst = min(chosen, key=lambda r: scores[r.name][score]["mean"], default=None)
        if worst:
            drawn[f"{key}_shown"] = worst.title
            for name in ("curves", "confusion", "reliability", "worst", "captions", "occlusion"):
                picture = worst.finished()[0] / f"{name}.png"
                if picture.is_file():
                    drawn[f"{key}_{name}"] = smaller(picture, folder / f"{key}_{name}.jpg").name
    return drawn


def smaller(picture: Path, path: Path) -> Path:
    """The picture as a JPEG: frames with noise make a PNG, and the report, ten times as large."""
    from PIL import Image

    Image.open(picture).convert("RGB").save(path, quality=88)
    return path


# -- what is written ----------------------------------------------------------------------------------


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results_text(data: dict[str, Any]) -> str:
    """RESULTS.md, and what README shows between its marks."""
    tables, sizes = data["tables"], data["sizes"]
    return f"""| task | script | what it does |
|---|---|---|
| data | `dummy_data.py`, `create_dummy.py`, `convert_dataset.py` | draw a synthetic dataset; turn test clips into folders of frames; read other annotation files |
| video classification | `main.py`, `inference.py` | TimeSformer or VideoMAE and a head |
| video + language classification | the same, `--use_vlm True` | the same encoders joined to BERT, with or without a text |
| video captioning | the same, `--use_vlm True --captioning True` | the same encoders joined to GPT-2 |
| this study | `make report` | trains the grid in `experiments/`, writes report.pdf and these tables |

The synthetic dataset ({sizes["train"]} training, {sizes["val"]} val and {sizes["test"]} test videos, {data["classes"]} classes), tiny backbones, defaults
({data["epochs"]} epochs), seeds {data["seeds"]}; means over the seeds, in brackets 95 % bootstrap intervals over the test videos. The language
models' rows have a frozen vision backbone; "in full", "LoRA" and "frozen" say how the last named backbone is trained.

{markdown(HEADS["labels"], tables["labels"])}

{markdown(HEADS["captions"], tables["captions"])}

Controls: accuracy in %, for captioners the share of captions with the motion right, of the same models when frames are repeated,
shuffled or reversed, when the video is grey, when texts are exchanged; and of the commonest training class, and of the nearest neighbour on
frozen features.

{markdown(HEADS["controls"], tables["controls"] + tables["caption_controls"])}

{markdown(HEADS["cost"], tables["cost"])}

Measured on {data["machine"]}; [report.pdf](report.pdf) says how, and what it means.
"""


def write_text(path: Path, text: str) -> None:
    replace_file(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_results(data: dict[str, Any], output: Path) -> None:
    write_text(output / "RESULTS.md", "# Results\n\n" + results_text(data))


def compile_pdf(data: dict[str, Any], folder: Path, output: Path) -> None:
    """report.pdf from experiments/report.typ; `folder` holds the pictures and gets the numbers."""
    try:
        import typst
    except ImportError:
        raise UserError("report.pdf needs typst: pip install -r requirements-extra.txt") from None
    write_text(folder / "report.json", json.dumps(data, indent=1, ensure_ascii=False))
    template = Path(shutil.copy(EXPERIMENTS / "report.typ", folder / "report.typ"))
    typst.compile(str(template), output=str(output / "report.pdf"))


# -- the provided checkpoints ---------------------------------------------------------------------------


def provide(row: Row, folder: Path, data_dir: Path) -> int:
    """Writes a row's first run as a provided checkpoint, in bf16 where that changes no score; returns its bytes."""
    import torch

    from checkpoint import CONFIG_YAML, METADATA, WEIGHTS, read_run, read_tensors, save_tensors
    from script import write_json

    run_dir, target = row.dirs[0], folder / row.name
    if target.is_dir():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for name in ("vision", "language"):
        if (run_dir / name).is_dir():
            shutil.copytree(run_dir / name, target / name)
    config, metadata = read_run(run_dir)
    config = replace(config, run_name=None, output_dir=Config().output_dir, data_dir=Config().data_dir, controls=False)
    write_yaml(asdict(config), target / CONFIG_YAML)
    write_json(metadata, target / METADATA)
    tensors, facts = read_tensors(run_dir / WEIGHTS)
    save_tensors({name: t.to(torch.bfloat16) for name, t in tensors.items()}, facts, target / WEIGHTS)
    before, scores, kind = rescored(run_dir, data_dir), rescored(target, data_dir), "bfloat16"
    if before != scores:
        scores, kind = before, "float32"
        save_tensors(tensors, facts, target / WEIGHTS)
    count = sum(t.numel() for t in tensors.values())
    write_text(
        target / "CARD.md", card(row, config, scores, control_table(target, data_dir, row.dirs[0].parent), kind, count)
    )
    return sum(p.stat().st_size for p in target.rglob("*") if p.is_file())


def card(row: Row, config: Config, scores: dict[str, float], table: dict[str, Any], kind: str, parameters: int) -> str:
    """CARD.md; `scores` and the `table` of controls are those of the file that lies beside it."""
    controls = [f"{CONTROLS[n]} {show_all(v)}" for n, v in table.items() if n in CONTROLS]
    return f"""# {row.name}

{row.title}: a {row.task}, trained on the synthetic dataset (`python dummy_data.py`) with `main.py {as_flags(config)}`,
seed {config.seed}, {config.epochs} epochs. It knows coloured circles and squares that move, and nothing else.

    python inference.py {as_flags(config)} --video_dir ./frames_see/

Holds the {parameters:,} trained parameters in {kind}; the other tensors are those of [backbones](../../../backbones).

On the dataset's test videos, this checkpoint: {show_all(scores)}.

The same checkpoint where it should fail: {"; ".join(controls)}.

Licence: Apache-2.0.
"""


def show_all(scores: dict[str, float]) -> str:
    """Shares in percent, Bleu and CIDEr as they are."""
    whole = ("CIDEr", "Bleu_4")
    return ", ".join(f"{n} {v:.3f}" if n in whole else f"{n} {100 * v:.1f} %" for n, v in scores.items())


def rescored(run_dir: Path, data_dir: Path) -> dict[str, float]:
    """The scores of a checkpoint on test, rounded as the card prints them."""
    import train_code
    from checkpoint import load_run
    from VLoader import read_splits

    model, config, _ = load_run(run_dir, Config(num_workers=0))
    splits = replace(read_splits(data_dir), train=[], val=[])
    accelerator = train_code.build_accelerator(config)
    loader = train_code.build_loaders(model, config, splits)["test"]
    scores, _ = train_code.final_scores(model, loader, accelerator, config, "test")
    names = ("accuracy", "macro_f1", "CIDEr", "Bleu_4")
    kept = {name: round(scores[name], 4) for name in names if name in scores}
    return kept | {n: round(v, 4) for n, v in scores.get("attributes", {}).items() if n != "intervals"}


def control_table(run_dir: Path, data_dir: Path, runs: Path) -> dict[str, Any]:
    """The controls of a checkpoint; features are cached in the folder of `runs`."""
    import train_code
    from checkpoint import load_run
    from controls import control_scores
    from VLoader import read_splits

    model, config, _ = load_run(run_dir, Config(num_workers=0, output_dir=str(runs)))
    return control_scores(model, read_splits(data_dir), config, train_code.build_accelerator(config))


# -- the script -------------------------------------------------------------------------------------


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.make_report",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, which share the cores")
    parser.add_argument("--only", default="", metavar="REGEX", help="only the rows whose names match; none: only write")
    parser.add_argument(
        "--data_dir", type=Path, default=Path("synthetic_dataset"), help="drawn by dummy_data.py if it is not there"
    )
    parser.add_argument("--runs", type=Path, default=EXPERIMENTS / "runs", help="folder of the runs")
    parser.add_argument("--output", type=Path, default=ROOT, help="where report.pdf and RESULTS.md go")
    parser.add_argument(
        "--provide", action="store_true", help="also write checkpoints/provided/ from the runs of seed 0"
    )
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    if not args.data_dir.is_dir():
        import dummy_data

        dummy_data.main(["--output", str(args.data_dir)])
    train_missing(read_grid(args.runs, args.seeds, args.only), args.data_dir, args.jobs)
    rows = read_grid(args.runs, args.seeds, "")
    scores = {row.name: row_scores(row) for row in rows}
    data = collect(rows, scores, args.seeds, args.data_dir)
    pictures = args.runs / "report"
    data["pictures"] = draw(rows, scores, args.data_dir, pictures)
    write_results(data, args.output)
    compile_pdf(data, pictures, args.output)
    print(f"{data['runs']} runs; wrote {args.output / 'report.pdf'} and {args.output / 'RESULTS.md'}")
    if args.provide:
        from checkpoint import PROVIDED

        ready = [row for row in rows if row.dirs[0] in row.finished()]
        size = sum(provide(row, PROVIDED, args.data_dir) for row in ready)
        print(f"{len(ready)} checkpoints, {size / 1e6:.1f} MB in {PROVIDED}")


def main(argv: list[str] | None = None) -> int:
    return run_script(run, argv)


if __name__ == "__main__":
    sys.exit(main())
