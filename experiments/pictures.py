"""The pictures of report.pdf: one function for each. Curves and points are SVG, frames of videos are JPEG."""

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np

import figures
from experiments.findings import GROUPS, groups_of, shown_rows, top_classifier, top_row
from experiments.grid import MODES, NAMES, Row
from experiments.intervals import estimate
from experiments.scores import Study
from experiments.trials import learning_curves, sweep_curves
from script import make_folder

COLOURS = {"full": "#b5452c", "lora": "#2f6b9a", "frozen": "#6b8e3d"}
# of vision backbones: none of them looks like a training mode
SHADES = {"timesformer": "#6a4c93", "videomae": "#c98a00", "vjepa2": "#1a8a8a"}
MARKERS = {"timesformer": "o", "videomae": "s", "vjepa2": "^"}
WIDTH = 6.6  # inches; the report's column, so that letters are printed in their own size
SHOWN_CLASSES = ("right", "clockwise", "reverses", "stops")  # in the picture of the dataset
WORST = 3  # clips on a sheet
# the dot of one seed, on top of means and lines, and small, so that it does not hide them
SEED = {"ls": "", "marker": "o", "ms": 2.2, "mfc": "black", "mec": "white", "mew": 0.4, "zorder": 4}


def panels(columns: int, height: float, width: float = WIDTH, **options: Any) -> tuple[Any, Any]:
    """A figure with panels side by side, in the small letters of a paper."""
    figure = figures.new_figure(width, height)
    matplotlib.rcParams |= {"font.size": 7.5, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False}
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


def draw_estimate(axis: Any, scores: np.ndarray, y: float, colour: str, proportion: bool = True) -> None:
    """The mean over seeds and clips with its interval, and a small dot for each seed, in percent."""
    value = estimate(scores, proportion)
    sides = [[100 * max(0.0, value.mean - value.low)], [100 * max(0.0, value.high - value.mean)]]
    axis.errorbar(100 * value.mean, y, xerr=sides, fmt="o", ms=5, color=colour, capsize=2, lw=1)
    axis.plot([100 * v for v in value.seeds], [y] * len(value.seeds), **SEED)


def draw_rows(study: Study, captioning: bool, columns: dict[str, str], path: Path) -> None:
    """Points of all rows and nearest neighbours, one panel for each {column of scores: title}. Lines: ceilings."""
    rows, nearest = study.finished(captioning), study.nearest[captioning]
    lines = [(row.title, study.scores[row.name], COLOURS[row.mode]) for row in rows]
    lines += [(f"nearest neighbour, {NAMES[model]}", scores, "0.35") for model, scores in nearest.items()]
    figure, axes = panels(len(columns), 0.95 + 0.145 * len(lines), sharey=True)
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        for y, (_, scores, colour) in enumerate(lines):
            draw_estimate(axis, scores.columns[column], y, colour)
        if column == "all" and not captioning:
            for style, name in (("--", "video without text"), ("-.", "frames in any order, without text")):
                axis.axvline(100 * study.ceilings[name], color="0.45", lw=0.9, ls=style, label=f"ideal: {name}")
        axis.set(title=title, xlabel="right answers, %", ylim=(len(lines) - 0.4, -0.6))
        axis.grid(axis="y", color="0.93")
    axes[0].set_yticks(range(len(lines)), [title for title, _, _ in lines])

    # one legend for all panels
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=COLOURS[mode], marker="o", ms=4, lw=1, label=MODES[mode]) for mode in COLOURS]
    handles += [Line2D([], [], **SEED, label="one seed"), *axes[0].get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=7)
    figures.save(figure, path)


def draw_errors(study: Study, path: Path) -> None:
    """Accuracy of the best rows by speed, size and number of objects."""
    rows = shown_rows(study)
    figure, axes = panels(len(GROUPS), 1.9, sharey=True)
    for axis, name in zip(axes, GROUPS, strict=True):
        groups = groups_of(study, name)
        for row in rows:
            values = [estimate(study.scores[row.name].right[:, mask]) for mask in groups.values()]
            means = [100 * v.mean for v in values]
            sides = [[100 * (v.mean - v.low) for v in values], [100 * (v.high - v.mean) for v in values]]
            model, text = row.config.vision_model, row.config.use_text
            style = {"marker": MARKERS[model], "ls": "-" if text else "--", "color": SHADES[model], "label": row.title}
            axis.errorbar(range(len(groups)), means, yerr=np.clip(sides, 0, None), ms=4, lw=1, capsize=2, **style)
        axis.set_xticks(range(len(groups)), [*groups])
        axis.set(title="number of objects" if name == "objects" else f"{name} of the named object")
        axis.margins(x=0.15)
    axes[0].set(ylabel="test accuracy, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=7)
    figures.save(figure, path)


def draw_confusions(study: Study, names: dict[str, str], path: Path) -> None:
    """Confusion matrices of the best row without text and of the best one with text, all seeds together."""
    chosen = [row for row in (top_classifier(study, text) for text in (False, True)) if row is not None]
    figure, axes = panels(len(chosen), 2.8, sharey=True)
    for axis, row in zip(axes, chosen, strict=True):
        matrix = confusion(study, row, [*names])
        axis.imshow(matrix, vmin=0, vmax=100, cmap="Blues")
        for (i, j), value in np.ndenumerate(matrix):
            if value >= 0.5:
                colour = "white" if value > 50 else "black"
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)
        ticks = range(len(names))
        axis.set_xticks(ticks, [*names.values()], rotation=50, ha="right", fontsize=6.5)
        axis.set_yticks(ticks, [*names.values()], fontsize=6.5)
        axis.set(title=row.title, xlabel="answer")
    axes[0].set(ylabel="truth")
    figures.save(figure, path)


def confusion(study: Study, row: Row, names: list[str]) -> np.ndarray:
    """How often each class (rows) is answered by each class (columns), in percent of its clips. (K, K)"""
    matrix = np.zeros((len(names), len(names)))
    for result in row.results.values():
        for answer in result.answers(study.clips):
            matrix[names.index(answer["truth"]), names.index(answer["label"])] += 1
    return 100 * matrix / matrix.sum(1, keepdims=True)


def draw_learning(study: Study, path: Path) -> None:
    """Test accuracy of the video classifiers over the share of training clips: one panel for each vision backbone."""
    curves = learning_curves(study)
    figure, axes = panels(len(curves), 1.9, sharey=True)
    for axis, (model, modes) in zip(axes, curves.items(), strict=True):
        for mode, curve in modes.items():
            means = [100 * mean(values) for values in curve.values()]
            axis.plot([*curve], means, color=COLOURS[mode], lw=1.2, label=MODES[mode])
            for share, values in curve.items():
                dots = SEED | {"ms": 4, "mfc": COLOURS[mode]}  # of the line's colour, because it may lie far from it
                axis.plot([share] * len(values), [100 * v for v in values], **dots)
        nearest = 100 * study.nearest[False][model].right.mean()
        axis.axhline(nearest, color="0.5", lw=0.8, ls=":", label="nearest neighbour, all clips")
        axis.set_xscale("log")
        axis.set_xticks([*next(iter(modes.values()))], [f"{share} %" for share in next(iter(modes.values()))])
        axis.minorticks_off()
        axis.set(title=NAMES[model], xlabel="share of the training clips")
    axes[0].set(ylabel="test accuracy, %")
    axes[-1].plot([], [], **SEED | {"ms": 4}, label="one seed")

    # not every panel has all modes while the study is unfinished
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines() if line.get_label()[0] != "_"}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False, fontsize=7)
    figures.save(figure, path)


def draw_sweeps(study: Study, path: Path) -> None:
    """Scores on val over the LoRA rank and over the token grid."""
    sweeps = {"lora_r": "LoRA rank", "token_grid": "token grid (N × N for each time step)"}
    curves = {option: sweep_curves(study, option) for option in sweeps}
    curves = {option: found for option, found in curves.items() if found}
    titles = {row.name: row.title for row in study.rows}
    figure, axes = panels(len(curves), 2.3)
    for axis, (option, found) in zip(axes, curves.items(), strict=True):
        for row, curve in found.items():
            axis.plot([*curve], [100 * v for v in curve.values()], ".-", lw=1, label=titles[row])
        values = sorted({value for curve in found.values() for value in curve})
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        axis.set(xlabel=sweeps[option], ylabel="right answers on val, %")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2, frameon=False, fontsize=7)
    figures.save(figure, path)


def draw_pareto(study: Study, path: Path) -> None:
    """Accuracy of the classifiers over what they cost."""
    costs = {
        "seconds of training": lambda r: r.first.metrics["seconds"],
        "peak memory, MB": lambda r: r.first.metrics["peak_mb"],
        "trained parameters": lambda r: next(iter(r.results.values())).parameters,
    }
    figure, axes = panels(len(costs), 2.3, sharey=True)
    for axis, (title, cost) in zip(axes, costs.items(), strict=True):
        for row in study.finished(captioning=False):
            kind = "text" if row.config.use_text else "BERT" if row.config.use_vlm else "video"
            filled = {"text": COLOURS[row.mode], "BERT": "none", "video": "0.8"}[kind]
            accuracy = 100 * study.scores[row.name].right.mean()
            axis.plot(
                *(cost(row), accuracy, MARKERS[row.config.vision_model]),
                **{"ms": 5, "mec": COLOURS[row.mode], "mfc": filled, "mew": 1},
            )
        if "MB" not in title:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axis.xaxis.set_minor_formatter(lambda value, _: "")
        axis.set(xlabel=title)
        axis.grid(color="0.94")
    axes[0].set(ylabel="test accuracy, %")
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, lw=3, label=MODES[mode]) for mode, colour in COLOURS.items()]
    handles += [Line2D([], [], ls="", marker=mark, color="0.4", label=NAMES[m]) for m, mark in MARKERS.items()]
    fills = {"with text": "0.3", "with BERT, no text": "none", "video classifier": "0.8"}
    handles += [Line2D([], [], ls="", marker="D", mec="0.3", mfc=fill, label=name) for name, fill in fills.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=7)
    figures.save(figure, path)


# -- frames of videos -------------------------------------------------------------------------------


def frames_of(data_dir: Path, file: str, count: int = 6) -> Any:
    """`count` evenly spaced frames of a test clip, uint8 [T, C, H, W]. With more, a sheet's titles are too small."""
    from readers import open_video

    video = open_video(data_dir / "test" / file)
    return video.frames(np.linspace(0, len(video) - 1, count).round().astype(int))


def sheet(clips: list[tuple[Any, str]], path: Path, heading: str = "") -> None:
    """A contact sheet as a JPEG: noisy frames make a PNG, and so the report, ten times as large."""
    from PIL import Image

    picture = figures.plot_clips(clips, path.with_suffix(".png"), heading)
    Image.open(picture).convert("RGB").save(path, quality=85)


def draw_dataset(study: Study, data_dir: Path, path: Path) -> None:
    """One clip with two objects for some of the classes, with its text, the text of the other object, and a caption."""
    clips = []
    for motion in SHOWN_CLASSES:
        rows = [row for row in study.clips.rows if row["objects"][0]["motion"] == motion and len(row["objects"]) == 2]
        for row in rows[:1]:
            shortest = min(row["caption"], key=len)
            title = f"text: {row['text']}  |  other text: {row['other_text']}  |  caption: {shortest}"
            clips.append((frames_of(data_dir, row["file_name"]), title))
    sheet(clips, path)


def draw_worst(study: Study, names: dict[str, str], data_dir: Path, path: Path) -> None:
    """The most confident wrong answers of the first run of the best classifier."""
    row = top_row(study, captioning=False)
    answers = next(iter(row.results.values())).answers(study.clips)
    clips = []
    for index, title in figures.worst_clips(answers, names)[:WORST]:
        text = f"  |  text: {study.clips.rows[index]['text']}" if row.config.use_text else ""
        clips.append((frames_of(data_dir, answers[index]["file"]), title + text))
    sheet(clips, path)


def draw_captions(study: Study, data_dir: Path, path: Path) -> None:
    """The first wrong and the first wholly right captions of two objects, of the first run of the best captioner."""
    row = top_row(study, captioning=True)
    seed, result = next(iter(row.results.items()))
    answers, right = result.answers(study.clips), study.scores[row.name].right[[*row.results].index(seed)]
    two = ~study.clips.single
    wrong, good = np.flatnonzero(two & ~right)[: WORST - 1], np.flatnonzero(two & right)[:1]
    clips = []
    for index in (*wrong, *good):
        answer = answers[index] | {"references": sorted(study.clips.rows[index]["caption"], key=len)}
        title = f"{'right' if right[index] else 'wrong'}: {answer['caption']}  |  reference: {answer['references'][0]}"
        clips.append((frames_of(data_dir, answer["file"]), title))
    sheet(clips, path)


def draw_all(study: Study, names: dict[str, str], data_dir: Path, folder: Path) -> dict[str, str]:
    """Draws the report's pictures into `folder`: {name in report.typ: file}. Pictures without runs are absent."""
    make_folder(folder)
    three = {"all": "all clips", "one": "one object", "two": "two objects"}
    whole = {"one": "one object: wholly right", "two": "two objects: both wholly right"}
    calls: dict[str, Any] = {"dataset.jpg": lambda path: draw_dataset(study, data_dir, path)}
    if study.finished(captioning=False):
        calls |= {
            "labels.svg": lambda path: draw_rows(study, False, three, path),
            "errors.svg": lambda path: draw_errors(study, path),
            "confusion.svg": lambda path: draw_confusions(study, names, path),
            "pareto.svg": lambda path: draw_pareto(study, path),
            "worst.jpg": lambda path: draw_worst(study, names, data_dir, path),
        }
    if study.finished(captioning=True):
        calls |= {
            "captions.svg": lambda path: draw_rows(study, True, whole, path),
            "caption_clips.jpg": lambda path: draw_captions(study, data_dir, path),
        }
    if learning_curves(study):
        calls["learning.svg"] = lambda path: draw_learning(study, path)
    if sweep_curves(study, "lora_r") or sweep_curves(study, "token_grid"):
        calls["sweeps.svg"] = lambda path: draw_sweeps(study, path)
    for name, draw in calls.items():
        draw(folder / name)
    return {Path(name).stem: name for name in calls}
