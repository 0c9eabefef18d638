"""One function per picture. `rows` come from predictions_{val,test}.jsonl, `scores` from metrics.json."""

import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from extras.multilabel import labels_of
from metrics import generated, rouge_l, words
from script import gc_disabled, printable, replace_file

SHEET_WIDTH = 1600  # largest width of a contact sheet, in pixels
MAX_NAMES = 30  # with more classes, the confusion matrix has no names, and only the worst classes get a bar
MAX_CLIPS = 8  # on a contact sheet
MAX_RECORDINGS = 20  # with their segments in one picture
MAX_LABEL = 60  # characters
COLOUR, ERROR_COLOUR = "#33638d", "#d1603d"


@gc_disabled()
def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of this size in inches. Not pyplot's, which would keep it until it is closed."""
    # imported late: it takes a third of a second, and not every script draws
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a `$` in a name does not start a formula
    figure = Figure((width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def label_text(name: str) -> str:
    """A class name as pictures show it."""
    return printable(name)[:MAX_LABEL]


def plot_curves(log: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws loss and, for classifiers, accuracy or mAP over the epochs of log.jsonl."""
    steps = max(1, log[-1]["step"]) / log[-1]["epoch"]  # per epoch
    epochs = [row["step"] / steps for row in log]
    best = [epoch for epoch, row in zip(epochs, log, strict=True) if row["best"]][-1]
    # a captioner has no accuracy while it trains: captions are generated at the end only
    panels = ["loss", *(name for name in ("accuracy", "mAP") if f"val_{name}" in log[0])]

    # train and val in one panel show where they diverge: overfitting
    figure = new_figure(4.2 * len(panels), 3.2)
    from matplotlib.ticker import MaxNLocator  # after new_figure(), which loads the rest without garbage collection

    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, name in zip(axes[0], panels, strict=True):
        for split, style in (("train", "--"), ("val", "-")):
            if f"{split}_{name}" in log[0]:
                axis.plot(epochs, [row[f"{split}_{name}"] for row in log], style, marker="o", ms=3, label=split)
        axis.axvline(best, color="0.7", lw=1, zorder=0, label="best on val (kept)")
        axis.set(xlabel="epoch", ylabel="loss (nats)" if name == "loss" else name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name != "loss":
            axis.set_ylim(0, 1.02)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(label_text(title), fontsize=9)
    save(figure, path)


def plot_clips(clips: list[tuple[Any, str]], path: Path, heading: str = "") -> Path:
    """Draws a contact sheet: a line with the heading, then one row per (clip uint8 [T, C, H, W], title), with the title
    above the frames side by side."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    # small frames are enlarged, but no more than twice
    times, _, height, width = clips[0][0].shape
    scale = min(SHEET_WIDTH / (times * width), 2.0)
    height, width = max(1, int(height * scale)), max(1, int(width * scale))

    # titles that are wider than the frames continue on a second line
    font, line = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 11), 17
    across = max(times * (width + 2), 640)
    letters = int(across / font.getlength("n"))
    titles = [textwrap.wrap(printable(title), letters, max_lines=2, placeholder=" …") for _, title in clips]

    top = 5 + line if heading else 0
    sheet = Image.new("RGB", (across, top + sum(height + 5 + line * len(lines) for lines in titles)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((2, 3), heading, fill="black", font=font, stroke_width=0.3)
    for (clip, _), lines in zip(clips, titles, strict=True):
        draw.multiline_text((2, top + 3), "\n".join(lines), fill="black", font=font, spacing=2)
        top += 5 + line * len(lines)
        for column, frame in enumerate(clip):
            image = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(image, (column * (width + 2), top))
        top += height
    # zlib's run-length strategy is fast, and noisy frames compress no better with a slower one
    replace_file(path, lambda p: sheet.save(p, compress_type=3))
    return path


# -- what a model predicts --------------------------------------------------------------------------


def draw_classifier(
    rows: list[dict],
    scores: dict[str, Any],
    display_names: dict[str, str],
    read_clip: Callable[[int], Any],
    folder: Path,
) -> list[Path]:
    """Draws all pictures of a classifier on one split. read_clip(index) gives a clip, uint8 [T, C, H, W]."""
    if "mAP" in scores:
        return draw_multi_label(rows, scores, display_names, read_clip, folder)
    recalls = {n: (c["recall"], c["interval"]) for n, c in scores["classes"].items() if c["count"]}
    title = f"recall per class, 95 % intervals, n = {scores['count']}"
    if len(recalls) > MAX_NAMES:
        title = f"recall of the {MAX_NAMES} worst classes, 95 % intervals, n = {scores['count']}"
        recalls = dict(sorted(recalls.items(), key=lambda item: item[1][0])[:MAX_NAMES])
    sheet = [(read_clip(index), text) for index, text in worst_clips(rows, display_names)]
    heading = f"worst {len(sheet)} of n = {len(rows)}: the surest wrong answers, then the least sure right ones"
    pictures = [
        plot_confusion(scores["classes"], display_names, folder / "confusion.png"),
        plot_bars(recalls, title, folder / "classes.png", display_names=display_names),
        plot_reliability(scores["calibration"], scores["calibration_error"], folder / "reliability.png"),
        plot_clips(sheet, folder / "worst.png", heading),
    ]
    if "reject" in scores:
        pictures.append(plot_risk_coverage(scores["reject"], scores["count"], folder / "risk.png"))
    return pictures


def draw_multi_label(
    rows: list[dict],
    scores: dict[str, Any],
    display_names: dict[str, str],
    read_clip: Callable[[int], Any],
    folder: Path,
) -> list[Path]:
    """Draws all pictures of a classifier with several labels per clip: see draw_classifier()."""
    found = {name: c for name, c in scores["classes"].items() if c["count"]}
    kept = sorted(found, key=lambda name: found[name]["average_precision"])[:MAX_NAMES]
    which = "per class" if len(found) <= MAX_NAMES else f"of the {MAX_NAMES} worst classes"
    bars = {n: (c["average_precision"], c["interval"]) for n, c in found.items() if n in kept}
    chance = [found[name]["share"] for name in bars]
    title = f"average precision {which}, 95 % intervals, n = {scores['count']}; black: at random"

    # clips with the fewest right labels come first
    def jaccard_index(row: dict) -> float:
        predicted, true = labels_of(row), {*row["truth"]}
        return len(predicted & true) / len(predicted | true) if predicted | true else 1.0

    order = sorted(range(len(rows)), key=lambda index: jaccard_index(rows[index]))[:MAX_CLIPS]
    sheet = [(read_clip(index), label_title(rows[index], display_names)) for index in order]
    heading = f"worst {len(sheet)} of n = {len(rows)}: the smallest share of right labels"
    return [
        plot_bars(bars, title, folder / "classes.png", display_names=display_names, marks=chance),
        plot_clips(sheet, folder / "worst.png", heading),
    ]


def draw_captioner(
    rows: list[dict], scores: dict[str, Any], read_clip: Callable[[int], Any], folder: Path
) -> list[Path]:
    """Draws all pictures of a captioner on one split: a sheet with the captions that are furthest from their
    references, by ROUGE-L, and with exact ones; bars for attributes, if the dataset has a lexicon."""
    # half of the sheet shows failures, the other half what success looks like
    overlaps = [rouge_l(words(generated(row)), [words(r) for r in row["references"]]) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: overlaps[index])
    exact = [index for index in order if generated(rows[index]) in rows[index]["references"]]
    worst = [index for index in order if generated(rows[index]) not in rows[index]["references"]]
    chosen = [*worst[: MAX_CLIPS // 2], *exact[: MAX_CLIPS // 2]]
    heading = f"captions furthest from their references (lowest ROUGE-L), then exact ones, n = {len(rows)}"
    sheet = [(read_clip(index), caption_title(rows[index])) for index in chosen]
    pictures = [plot_clips(sheet, folder / "captions.png", heading)]

    # the scores hold a value and an interval for every attribute
    if "attributes" in scores:
        values = {n: v for n, v in scores["attributes"].items() if n != "intervals"}
        bars = {n: (v, scores["attributes"]["intervals"][n]) for n, v in values.items()}
        count = sum("caption" in row for row in rows)
        title = f"captions with the right attribute, 95 % intervals, n = {count}"
        pictures.append(plot_bars(bars, title, folder / "attributes.png"))
    return pictures


def worst_clips(rows: list[dict], display_names: dict[str, str]) -> list[tuple[int, str]]:
    """(index, title) of the worst predictions: wrong ones, most confident first, then right ones, least confident
    first."""

    def wrongness(row: dict) -> float:
        return row["score"] if row["label"] != row["truth"] else -row["score"]

    order = sorted(range(len(rows)), key=lambda index: -wrongness(rows[index]))[:MAX_CLIPS]
    return [(index, label_title(rows[index], display_names)) for index in order]


def clip_name(file: str | Path, start: float | None = None, end: float | None = None) -> str:
    """The name of a video with its folder, which often is its class; for a segment with its times in seconds."""
    times = "" if start is None else f" {start:g}-{end:g} s"
    return f"{'/'.join(Path(file).parts[-2:])}{times}"


def label_title(row: dict[str, Any], display_names: dict[str, str]) -> str:
    """The title of a classified clip: file, predicted class or classes with scores, and the truth if it differs."""
    answers, truth = row.get("labels", [row]), [row["truth"]] if "label" in row else row["truth"]
    wrong = f"wrong, truth: {', '.join(display_names[name] for name in truth) or 'no label'}"
    mark = "right" if {answer["label"] for answer in answers} == {*truth} else wrong
    name = clip_name(row["file"], row.get("start"), row.get("end"))
    text = ", ".join(f"{display_names[answer['label']]} {100 * answer['score']:.0f} %" for answer in answers)
    return f"{name}: {text or 'no label'}, {mark}"


def caption_title(row: dict[str, Any]) -> str:
    """The title of a captioned clip: file, question if it has one, caption or answer, and a reference unless
    it equals one."""
    text, question = generated(row), f"{row['question']} " if "question" in row else ""
    mark = "equals a reference" if text in row["references"] else f"reference: {row['references'][0]}"
    name = clip_name(row["file"], row.get("start"), row.get("end"))
    return f"{name}: {question}{text}  |  {mark}"


def plot_confusion(classes: dict[str, Any], display_names: dict[str, str], path: Path) -> Path:
    """Draws the confusion matrix: each row is a true class, as fractions of its clips."""
    # fractions, not counts: rare classes would be invisible
    names = [*classes]
    fractions = [[c["predicted"].get(n, 0) / max(1, c["count"]) for n in names] for c in classes.values()]
    named = len(names) <= MAX_NAMES
    side = min(3 + 0.38 * len(names), 12) if named else 8
    figure = new_figure(side + 1, side)
    axis = figure.subplots()
    image = axis.imshow(fractions, vmin=0, vmax=1, cmap="Blues")
    axis.set(xlabel="predicted class", ylabel="true class (clips)" if named else "true class")

    # names and numbers, as long as they can be read
    if named:
        labels = [label_text(display_names[n]) for n in names]
        axis.set_xticks(range(len(names)), labels, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(
            range(len(names)),
            [f"{label} ({c['count']})" for label, c in zip(labels, classes.values(), strict=True)],
            fontsize=8,
        )
        for i, row in enumerate(fractions):
            for j, fraction in enumerate(row):
                if fraction:
                    colour = "white" if fraction > 0.5 else "black"
                    axis.text(j, i, f"{100 * fraction:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_title(f"confusion matrix, n = {sum(c['count'] for c in classes.values())}", fontsize=9)
    figure.colorbar(image, ax=axis, label="fraction of the true class (numbers: %)", shrink=0.8)
    return save(figure, path)


def plot_bars(
    values: dict[str, tuple[float, list[float]]],
    title: str,
    path: Path,
    display_names: dict[str, str] | None = None,
    marks: list[float] | None = None,
) -> Path:
    """Draws fractions as bars with their intervals, {name: (fraction, [low, high])}. `marks` are black lines across the
    bars. Two names may have the same display name."""
    positions = range(len(values))
    figure = new_figure(6.5, 1.0 + 0.26 * len(values))
    axis = figure.subplots()
    fractions, intervals = [v for v, _ in values.values()], [interval for _, interval in values.values()]
    # matplotlib takes the lengths of both sides of an interval
    errors = [
        [max(0.0, v - low) for v, (low, _) in zip(fractions, intervals, strict=True)],
        [max(0.0, high - v) for v, (_, high) in zip(fractions, intervals, strict=True)],
    ]
    axis.barh(positions, fractions, xerr=errors, color=COLOUR, ecolor=ERROR_COLOUR, capsize=3, height=0.7)
    axis.set_xlim(0, 1.02)
    if marks:
        axis.scatter(marks, positions, marker="|", s=120, color="black", zorder=3)

    # the first name on top
    axis.set_yticks(positions, [label_text((display_names or {}).get(name, name)) for name in values])
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9)
    axis.tick_params(axis="y", labelsize=8)
    return save(figure, path)


def plot_reliability(bins: list[tuple[int, float, float]], error: float, path: Path) -> Path:
    """Draws accuracy over confidence, one point per bin of (clips, mean confidence, accuracy)."""
    # the area of a point grows with its number of clips: small bins are noise
    figure = new_figure(4.2, 4)
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="0.7", lw=1, label="perfect calibration")
    most = max(count for count, _, _ in bins)
    sizes = [12 + 150 * count / most for count, _, _ in bins]
    confidences, accuracies = [c for _, c, _ in bins], [a for _, _, a in bins]
    label = "clips of similar confidence\n(larger: more clips)"
    axis.scatter(confidences, accuracies, s=sizes, color=COLOUR, alpha=0.8, label=label)
    axis.set(xlim=(0, 1.04), ylim=(-0.02, 1.04), xlabel="confidence", ylabel="accuracy")
    axis.set_title(f"expected calibration error {error:.3f}, n = {sum(count for count, _, _ in bins)}", fontsize=9)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    return save(figure, path)


def plot_risk_coverage(scores: dict[str, Any], count: int, path: Path) -> Path:
    """Draws how many answers are wrong over how many of the `count` clips are answered, and where the threshold of
    --reject is. `scores` are those of extras.reject.reject_scores."""
    figure = new_figure(4.6, 3.6)
    axis = figure.subplots()
    coverages, risks = zip(*scores["curve"], strict=True)
    axis.plot(coverages, risks, color=COLOUR, label=f"area under the curve {scores['AURC']:.4f}")

    # without any answer there is no error to show
    if scores["error"] is not None:
        low, high = scores["intervals"]["error"]
        errors = [[max(0.0, scores["error"] - low)], [max(0.0, high - scores["error"])]]
        point = {"fmt": "o", "color": ERROR_COLOUR, "capsize": 3, "label": "threshold, 95 % interval"}
        axis.errorbar([scores["coverage"]], [scores["error"]], yerr=errors, **point)
    axis.set(xlim=(0, 1.02), ylim=(0, None), xlabel="fraction of clips answered", ylabel="of these, fraction wrong")
    axis.set_title(f"risk and coverage, n = {count}", fontsize=9)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    return save(figure, path)


def plot_occlusion(maps: list[tuple[Any, Any, dict]], display_names: dict[str, str], path: Path) -> Path:
    """Draws the frames of each clip, and below, in red, how much the answer's log odds drop when a cell is covered.
    `maps` come from extras.controls.occlusion_maps."""
    from torch.nn import functional as F

    clips = []
    for clip, drop, row in maps:
        # every map is scaled to its own maximum, so the maximum goes into the title
        times, _, height, width = clip.shape
        scaled = drop.clamp(min=0) / drop.max().clamp(min=1e-6)
        heat = F.interpolate(scaled[None, None], size=(times, height, width), mode="nearest")[0, 0]  # (T, H, W)
        alpha = 0.7 * heat[:, None]  # (T, 1, H, W)
        red = clip.new_tensor([255, 0, 0])[:, None, None]  # (C, 1, 1)
        clips.append((clip, caption_title(row) if "references" in row else label_title(row, display_names)))
        scores = "caption's log probability" if "references" in row else "answer's log odds"
        title = f"red: covering this cell with background lowers the {scores}, by up to {float(drop.max()):.2f} nats"
        clips.append(((clip * (1 - alpha) + red * alpha).to(clip.dtype), title))
    return plot_clips(clips, path)


def plot_timelines(recordings: list[Any], path: Path) -> Path:
    """Draws the true segments of each recording above the predicted ones, a colour for each label. `recordings` are
    those of extras/segments.py."""
    shown = recordings[:MAX_RECORDINGS]
    labels = sorted({event.label for r in shown for event in r.truth + r.predicted})
    figure = new_figure(9, 1.2 + 0.5 * len(shown))
    axis = figure.subplots()
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    colours = {label: colormaps["tab20"](number % 20) for number, label in enumerate(labels)}
    for row, recording in enumerate(shown):
        for events, bottom in ((recording.truth, row - 0.38), (recording.predicted, row + 0.02)):
            spans = [(event.start, event.end - event.start) for event in events]
            axis.broken_barh(spans, (bottom, 0.36), facecolors=[colours[e.label] for e in events], edgecolor="white")
    axis.set_yticks(range(len(shown)), [label_text(Path(r.name).name) for r in shown], fontsize=8)
    axis.set(xlabel="seconds", ylim=(len(shown) - 0.5, -0.5), xlim=(0, max(r.seconds for r in shown)))
    axis.set_title(f"truth above prediction, {len(shown)} of n = {len(recordings)} recordings", fontsize=9)
    patches = [Patch(color=colours[label], label=label_text(label)) for label in labels[:MAX_NAMES]]
    axis.legend(handles=patches, frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return save(figure, path)


def save(figure: Any, path: Path) -> Path:
    """Writes a figure as a PNG. matplotlib's warnings, for example of letters that its font lacks, are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")  # savefig would draw everything once more, only to lay it out
        replace_file(path, figure.savefig)
    return path
