"""Trains the missing runs of the grid in experiments/ and writes the study: report.pdf and RESULTS.md.

python -m experiments.make_report               all rows, three seeds; can be stopped and resumed
python -m experiments.make_report --provide     also writes checkpoints/provided/

Every number is read from metrics.json and the predictions of a run. A missing run is shown as "not run".
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
from script import UserError, counted, make_folder, replace_file, script

EXPERIMENTS = ROOT / "experiments"
NAMES = {"timesformer": "TimeSformer", "videomae": "VideoMAE", "bert": "BERT", "gpt2": "GPT-2"}
TASKS = ("video classifier", "video + language classifier", "video captioner")
# key of metrics.json's controls -> column title, in the order of the columns
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
JOINT = ("colour", "shape", "motion")  # also scored jointly, without size, which captions get wrong most often


class Row:
    """One row of the grid: a yaml file of options, and one run folder per seed."""

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
        """`TimeSformer + BERT LoRA, text`: how a backbone is trained refers to the last one named."""
        config = self.config
        # with a language model, the vision backbone is frozen in every row, so only the other one is worth naming
        trained = "LoRA" if config.use_lora_vision else "frozen" if config.freeze_visionbackbone else "in full"
        if config.use_vlm:
            trained = "LoRA" if config.use_lora_llm else "frozen" if config.freeze_llmbackbone else "in full"
        names = [NAMES[config.vision_model]] + ([NAMES[config.language_model]] if config.use_vlm else [])
        return f"{' + '.join(names)} {trained}{', text' if config.use_text else ''}"

    def finished(self) -> list[Path]:
        """The folders of finished runs. Controls are written last, so a run that has them has everything else."""
        from checkpoint import read_metrics

        return [d for d in self.dirs if "controls" in read_metrics(d)]

    def results(self) -> list[dict[str, Any]]:
        from checkpoint import read_metrics

        return [read_metrics(d) for d in self.finished()]


def read_grid(runs: Path, seeds: int, only: str) -> list[Row]:
    """The rows whose file name matches the regex `only`, sorted by task, vision model, text and training mode."""
    # in full before LoRA before frozen: sorting by (is frozen, is LoRA, is in full) does that
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


# -- training the missing runs ------------------------------------------------------------------------


def train_missing(rows: list[Row], data_dir: Path, jobs: int) -> None:
    """Trains every unfinished run, `jobs` at a time, each in its own process. Raises UserError if one fails."""
    # together the processes use one thread per core: with more they would slow each other down
    todo = [(row, seed) for row in rows for seed, d in enumerate(row.dirs) if d not in row.finished()]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with ThreadPoolExecutor(jobs) as pool:
        runs = [
            pool.submit(train_one, row, seed, data_dir, os.environ | {"OMP_NUM_THREADS": threads}) for row, seed in todo
        ]
        try:
            for number, done in enumerate(as_completed(runs), start=1):
                print(f"{number}/{len(todo)} {done.result()}", flush=True)
        except BaseException:  # on Ctrl-C too: otherwise the pool would start all runs that are still queued
            pool.shutdown(cancel_futures=True)
            raise


def train_one(row: Row, seed: int, data_dir: Path, environment: dict[str, str]) -> str:
    """Starts a run, resumes a stopped one, or adds missing controls to a trained one. Returns a line to print.

    Raises UserError with the last line of stderr if the process fails.
    """
    # a run with metrics but no controls was killed between the two: evaluating it again is enough
    run_dir, start = row.dirs[seed], time.perf_counter()
    if (run_dir / "metrics.json").is_file():
        script, flags = "score.py", ["--checkpoint", str(run_dir), "--controls", "True"]
    else:
        script, flags = "main.py", ["--config", str(row.file), "--seed", str(seed), "--data_dir", str(data_dir)]
        flags += ["--controls", "True", "--output_dir", str(run_dir.parent), "--run_name", run_dir.name]
        flags += ["--resume", "True"] if (run_dir / "state").is_dir() else ["--overwrite", "True"]

    # the same commands that a user would type, so the study tests the scripts as well
    command = [sys.executable, str(ROOT / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{run_dir.name} failed: {done.stderr.strip().splitlines()[-1]}")
    return f"{run_dir.name}: {time.perf_counter() - start:.0f} s"


# -- numbers ------------------------------------------------------------------------------------------


def predictions(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of predictions_test.jsonl, one per test video, in the order of the split."""
    from script import read_rows

    return read_rows(run_dir / "predictions_test.jsonl")


def summary_of_run(row: Row, run_dir: Path) -> Summary:
    """A function from indices of test clips to scores, for the bootstrap. `JOINT` adds a score of its own."""
    rows = predictions(run_dir)
    if not row.config.captioning:
        return label_rows_summary(rows)

    # other datasets have no attributes in their captions: then only the usual caption scores are shown
    captions = [r["caption"] for r in rows]
    scores = caption_summary(captions, [r["references"] for r in rows])
    truths = [[attributes_in(part, LEXICON) for part in r["references"][0].split(";")] for r in rows]
    if any(None in item.values() for items in truths for item in items):
        return scores

    # attributes named in the generated captions, against those of the objects in the first reference
    attributes = attribute_summary(captions, truths, LEXICON)
    joint = attribute_summary(captions, [[{n: item[n] for n in JOINT} for item in items] for items in truths], LEXICON)
    return lambda indices: scores(indices) | attributes(indices) | {"+".join(JOINT): joint(indices)["all"]}


def row_scores(row: Row) -> dict[str, dict[str, Any]]:
    """{score: {"mean", "interval", "range"}} over the seeds, or {} if no run is finished.

    The interval is a 95 % percentile bootstrap over test clips of the mean over seeds. All seeds use the same draws,
    because they are tested on the same clips.
    """
    summaries = [summary_of_run(row, d) for d in row.finished()]
    if not summaries:
        return {}

    # all clips once give the mean and the range; random draws of clips give the interval
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
    """`98.5`, or `98.5 [97.0, 99.7]` with the interval."""
    if score is None:
        return NOT_RUN
    low, high = (f"{scale * v:.{digits}f}" for v in score["interval"])
    return f"{scale * score['mean']:.{digits}f}" + (f" [{low}, {high}]" if interval else "")


def span(score: dict[str, Any] | None, scale: float = 100, digits: int = 1) -> str:
    """`97.5 – 99.5`: the worst and the best seed."""
    return " – ".join(f"{scale * v:.{digits}f}" for v in score["range"]) if score else NOT_RUN


def trained_parameters(run_dir: Path) -> int:
    """The number of trained parameters: a checkpoint stores these and no others."""
    from checkpoint import WEIGHTS, read_tensors

    tensors, _ = read_tensors(run_dir / WEIGHTS)
    return sum(t.numel() for t in tensors.values())


def result_cells(row: Row, scores: dict[str, Any]) -> list[str]:
    """A row of the table of captioners or of classifiers. The cells match HEADS."""
    # BLEU and CIDEr are shown as papers do, all other scores in percent
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

    # the range shows the spread of training; the interval shows the spread of the test clips
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
    """A row of the table of controls: means over the seeds in percent, of the accuracy or, for captioners, of the
    captions with the right motion. A control that the task does not have is an empty cell."""
    # all seeds of a row have the same controls, so the first one decides which cells stay empty
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
    """A row of the table of costs: parameters, checkpoint size, time, and the peak memory of the worst seed."""
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


# column titles; the keys are the names of the tables in report.json
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
    "cost": ["model", "trained parameters", "checkpoint MB", "s per epoch", "total s", "peak MB"],
}


def collect(rows: list[Row], scores: dict[str, dict], seeds: int, data_dir: Path) -> dict[str, Any]:
    """report.json: everything in the report that depends on the runs, as strings ready to print."""
    from VLoader import read_splits

    # strings, not numbers: report.typ and RESULTS.md must round in the same way
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
    """The numbers that are quoted in the text of the report: {name: string}."""

    # smallest and largest value over all runs of a task, or one value if they are equal after rounding
    def value_range(task: str, control: str, score: str = "accuracy") -> str:
        tables = [m["controls"] for r in rows if r.task == task for m in r.results()]
        values = [table[control][score] for table in tables if control in table]
        ends = sorted({f"{100 * v:.1f}" for v in (min(values), max(values))}, key=float) if values else []
        return f"{'–'.join(ends)} %" if ends else NOT_RUN

    # rows with equal means share the first place
    def best(task: str, score: str) -> str:
        by_title = {r.title: scores[r.name][score] for r in rows if r.task == task and scores[r.name]}
        highest = max((s["mean"] for s in by_title.values()), default=None)
        titles = [title for title, s in by_title.items() if s["mean"] == highest]
        return f"{'; '.join(titles)} ({show(by_title[titles[0]], interval=True)} %)" if titles else NOT_RUN

    # task 2 is captioning, which has no accuracy
    quoted = {f"best_{i}": best(task, "colour+shape+motion" if i == 2 else "accuracy") for i, task in enumerate(TASKS)}
    for i, task in enumerate(TASKS):
        for control in ("as_it_is", *CONTROLS):
            quoted[f"{control}_{i}"] = value_range(task, control, "motion" if i == 2 else "accuracy")

    # how much the classifiers rely on their text: what they lose with another clip's text, what they do without video
    texts = [m["controls"] for r in rows if r.config.use_text and not r.config.captioning for m in r.results()]
    lost = [100 * (t["as_it_is"]["accuracy"] - t["text_shuffled"]["accuracy"]) for t in texts]
    quoted["text_cost"] = f"{round(mean(lost), 1) + 0.0:.1f} points" if texts else NOT_RUN  # + 0.0: never "-0.0"
    quoted["text_alone"] = f"{100 * mean(t['text_only']['accuracy'] for t in texts):.1f} %" if texts else NOT_RUN
    return quoted


def machine(rows: list[Row]) -> str:
    """The devices of all runs, and the torch version of this process."""
    import torch

    devices = sorted({m["device"] for row in rows for m in row.results()})
    return f"{' and '.join(devices) or NOT_RUN}, torch {torch.__version__.split('+')[0]}"


# -- pictures -----------------------------------------------------------------------------------------


def draw(rows: list[Row], scores: dict[str, dict], data_dir: Path, folder: Path) -> dict[str, str]:
    """Draws the report's pictures into `folder`: {name in report.typ: file name}. Pictures without a run are absent."""
    from figures import plot_bars, plot_clips
    from readers import open_video
    from VLoader import read_display_names, read_splits

    # the dataset at a glance: one training clip per class, with its caption and text
    make_folder(folder)
    splits = read_splits(data_dir)
    display_names = read_display_names(data_dir, splits.class_names)
    samples = [next(s for s in splits.train if s.label == name) for name in splits.class_names]
    clips = []
    for sample in samples:
        video = open_video(sample.path)
        frames = video.frames(np.linspace(0, len(video) - 1, 8).round().astype(int))  # (8, 3, H, W)
        caption = f"  |  caption: {sample.captions[0]}" if sample.captions else ""
        text = f"  |  text: {sample.text}" if sample.text else ""
        clips.append((frames, f"{display_names[sample.label]}{caption}{text}"))
    drawn = {"data": smaller(plot_clips(clips, folder / "data.png"), folder / "data.jpg").name}

    # a bar chart for the classifiers and one for the captioners
    for key, captioning, score in (("labels", False, "accuracy"), ("captions", True, "colour+shape+motion")):
        chosen = [r for r in rows if r.config.captioning == captioning and scores[r.name]]
        bars = {r.title: (scores[r.name][score]["mean"], scores[r.name][score]["interval"]) for r in chosen}
        if bars:
            title = f"{score.replace('+', ', ')}: share of the test videos"
            drawn[key] = plot_bars(bars, title, folder / f"{key}.png", zoom=True).name

        # the run pictures of the worst row: those of a perfect model would show nothing
        worst = min(chosen, key=lambda r: scores[r.name][score]["mean"], default=None)
        if worst:
            drawn[f"{key}_shown"] = worst.title
            for name in ("curves", "confusion", "reliability", "worst", "captions", "occlusion"):
                picture = worst.finished()[0] / f"{name}.png"
                if picture.is_file():
                    drawn[f"{key}_{name}"] = smaller(picture, folder / f"{key}_{name}.jpg").name
    return drawn


def smaller(picture: Path, path: Path) -> Path:
    """Converts the picture to JPEG. Noisy frames make a PNG, and so the report, ten times as large."""
    from PIL import Image

    Image.open(picture).convert("RGB").save(path, quality=88)
    return path


# -- RESULTS.md and report.pdf ------------------------------------------------------------------------


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results_text(data: dict[str, Any]) -> str:
    """RESULTS.md below its title."""
    # markdown with the tables filled in; no result is written here
    tables, classes, seeds = data["tables"], data["classes"], data["seeds"]
    train, val, test = (data["sizes"][split] for split in ("train", "val", "test"))
    return f"""\
| task | script | what it does |
|---|---|---|
| data | `dummy_data.py`, `create_dummy.py`, `convert_dataset.py` | generate data; extract frames; convert annotations |
| video classification | `main.py`, `inference.py` | TimeSformer or VideoMAE with a linear head |
| video + language classification | the same, with `--use_vlm True` | the encoders and BERT, with or without text |
| video captioning | the same, with `--use_vlm True --captioning True` | the encoders and GPT-2 |
| this study | `make report` | trains the grid in `experiments/`, writes report.pdf and these tables |

Synthetic dataset ({classes} classes; {train} training, {val} val, {test} test videos), tiny backbones, default options
({data["epochs"]} epochs), seeds {seeds}. Values are means over the seeds, with 95 % bootstrap intervals over the test
videos in brackets. "In full", "LoRA" and "frozen" describe how the last backbone named is trained. Rows with a
language model always use a frozen vision backbone.

{markdown(HEADS["labels"], tables["labels"])}

{markdown(HEADS["captions"], tables["captions"])}

Controls: the same models on inputs where they should fail (one frame repeated, frames shuffled or reversed, a grey
video, the text of another clip), and two baselines: the majority class, and the nearest neighbour on frozen features.
Accuracy in %; for captioners, captions with the right motion in %.

{markdown(HEADS["controls"], tables["controls"] + tables["caption_controls"])}

{markdown(HEADS["cost"], tables["cost"])}

Measured on {data["machine"]}. [report.pdf](report.pdf) explains the method and discusses the results.
"""


def write_text(path: Path, text: str) -> None:
    """Writes the file completely or not at all."""
    replace_file(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_results(data: dict[str, Any], output: Path) -> None:
    write_text(output / "RESULTS.md", "# Results\n\n" + results_text(data))


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
    typst.compile(str(template), output=str(output / "report.pdf"))


# -- provided checkpoints -------------------------------------------------------------------------------


def provide(row: Row, folder: Path, data_dir: Path) -> int:
    """Writes the run of seed 0 as a provided checkpoint and returns its size in bytes."""
    import torch

    from checkpoint import CONFIG_YAML, METADATA, WEIGHTS, read_run, read_tensors, save_tensors
    from script import write_json

    # weights, and what is needed to rebuild the model: pictures, logs and predictions stay behind
    run_dir, target = row.dirs[0], folder / row.name
    if target.is_dir():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for name in ("vision", "language"):
        if (run_dir / name).is_dir():
            shutil.copytree(run_dir / name, target / name)

    # no path of this machine is shipped, and the run's name follows from its flags again
    config, metadata = read_run(run_dir)
    config = replace(config, run_name=None, output_dir=Config().output_dir, data_dir=Config().data_dir, controls=False)
    write_yaml(asdict(config), target / CONFIG_YAML)
    write_json(metadata, target / METADATA)

    # bfloat16 halves the file; it is kept only if no score changes
    tensors, header = read_tensors(run_dir / WEIGHTS)
    save_tensors({name: t.to(torch.bfloat16) for name, t in tensors.items()}, header, target / WEIGHTS)
    before, scores, dtype = rescored(run_dir, data_dir), rescored(target, data_dir), "bfloat16"
    if before != scores:
        scores, dtype = before, "float32"
        save_tensors(tensors, header, target / WEIGHTS)

    # the card reports what the file in this folder scores, not what the run once scored
    count = sum(t.numel() for t in tensors.values())
    controls = control_table(target, data_dir, run_dir.parent)
    write_text(target / "CARD.md", card(row, config, scores, controls, dtype, count))
    return sum(p.stat().st_size for p in target.rglob("*") if p.is_file())


def card(row: Row, config: Config, scores: dict[str, float], table: dict[str, Any], dtype: str, parameters: int) -> str:
    """CARD.md. `scores` and the `table` of controls are those of the checkpoint in the same folder."""
    # as_flags is empty for a row of defaults, so the commands are joined from parts
    flags = as_flags(config).split()
    train, predict = (" ".join((script, *flags)) for script in ("main.py", "python inference.py"))
    controls = [f"{CONTROLS[n]} {show_all(v)}" for n, v in table.items() if n in CONTROLS]
    return f"""# {row.name}

{row.title}: a {row.task}, trained on the synthetic dataset (`python dummy_data.py`) with `{train}`,
seed {config.seed}, {config.epochs} epochs. It knows the nine motions of coloured circles and squares, and nothing else.

    {predict} --video_dir ./frames_see/

Contains the {parameters:,} trained parameters in {dtype}. All other weights come from [backbones](../../../backbones).

Scores of this checkpoint on the dataset's test videos: {show_all(scores)}.

Controls (inputs on which it should fail) and baselines (majority, nearest neighbour): {"; ".join(controls)}.

Licence: Apache-2.0.
"""


def show_all(scores: dict[str, float]) -> str:
    """`accuracy 98.5 %, macro_f1 98.5 %`; BLEU and CIDEr are not percentages."""
    plain = ("CIDEr", "Bleu_4")
    return ", ".join(f"{n} {v:.3f}" if n in plain else f"{n} {100 * v:.1f} %" for n, v in scores.items())


def rescored(run_dir: Path, data_dir: Path) -> dict[str, float]:
    """Test scores of a checkpoint, computed again from its files and rounded to the digits that the card shows."""
    import train_code
    from checkpoint import load_run
    from VLoader import read_splits

    # test only: nothing is trained or selected here
    model, config, _ = load_run(run_dir, Config(num_workers=0))
    config = model.vision_encoder.fill_auto(config)  # load_run leaves the batch size to its caller
    splits = replace(read_splits(data_dir), train=[], val=[])
    accelerator = train_code.build_accelerator(config)
    loader = train_code.build_loaders(model, config, splits)["test"]
    scores, _ = train_code.final_scores(model, loader, accelerator, config, "test")

    # the two scores of each task that papers report, and the attributes of captions
    names = ("accuracy", "macro_f1", "CIDEr", "Bleu_4")
    kept = {name: round(scores[name], 4) for name in names if name in scores}
    return kept | {n: round(v, 4) for n, v in scores.get("attributes", {}).items() if n != "intervals"}


def control_table(run_dir: Path, data_dir: Path, runs: Path) -> dict[str, Any]:
    """The controls of a checkpoint, computed again. Features are cached in the folder `runs`."""
    import train_code
    from checkpoint import load_run
    from controls import control_scores
    from VLoader import read_splits

    model, config, _ = load_run(run_dir, Config(num_workers=0, output_dir=str(runs)))
    config = model.vision_encoder.fill_auto(config)
    return control_scores(model, read_splits(data_dir), config, train_code.build_accelerator(config))


# -- the script -------------------------------------------------------------------------------------


@script
def main(argv: list[str] | None = None) -> None:
    """Trains the missing runs and writes the study. Raises UserError for wrong options and failed runs."""
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
        "--data_dir", type=Path, default=Path("synthetic_dataset"), help="written by dummy_data.py if it does not exist"
    )
    parser.add_argument("--runs", type=Path, default=EXPERIMENTS / "runs", help="folder of the runs")
    parser.add_argument("--output", type=Path, default=ROOT, help="folder for report.pdf and RESULTS.md")
    parser.add_argument("--provide", action="store_true", help="also write the runs of seed 0 to checkpoints/provided/")
    args = parser.parse_args(argv)

    # data and runs first; --only limits what is trained, never what is reported
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    if not args.data_dir.is_dir():
        import dummy_data

        dummy_data.main(["--output", str(args.data_dir)])
    train_missing(read_grid(args.runs, args.seeds, args.only), args.data_dir, args.jobs)

    # numbers, then pictures, then text: each step needs the one before
    rows = read_grid(args.runs, args.seeds, "")
    scores = {row.name: row_scores(row) for row in rows}
    data = collect(rows, scores, args.seeds, args.data_dir)
    pictures = args.runs / "report"
    data["pictures"] = draw(rows, scores, args.data_dir, pictures)
    write_results(data, args.output)
    compile_pdf(data, pictures, args.output)
    print(f"{data['runs']} runs finished; wrote {args.output / 'report.pdf'} and {args.output / 'RESULTS.md'}")

    # provided checkpoints come from seed 0 only
    if args.provide:
        from checkpoint import PROVIDED

        ready = [row for row in rows if row.dirs[0] in row.finished()]
        size = sum(provide(row, PROVIDED, args.data_dir) for row in ready)
        print(f"{counted(len(ready), 'checkpoint')}, {size / 1e6:.1f} MB in {PROVIDED}")


if __name__ == "__main__":
    sys.exit(main())
