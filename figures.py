"""One function per picture. Rows are those of predictions_{val,test}.jsonl, scores those of metrics.json."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metrics import rouge_l, words
from script import printable, replace_file

SHEET_WIDTH = 1600  # pixels, of a contact sheet at most
NAMED = 30  # classes that a picture names; with more, the confusion matrix has no names, the bars are the worst ones
STRIPS = 8  # clips on a sheet
LONGEST_LABEL, LONGEST_TITLE = 60, 400  # characters
COLOUR, SECOND = "#33638d", "#d1603d"


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a `$` in a name is a `$`
    from matplotlib import pyplot as plt

    return plt


def label_text(name: str) -> str:
    """A name as a picture shows it."""
    return printable(name)[:LONGEST_LABEL]


def plot_curves(log: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss, and where there is one accuracy, over the epochs of log.jsonl, as a PNG."""
    from matplotlib.ticker import MaxNLocator

    plt = pyplot()
    epochs = [row["epoch"] for row in log]
    best = [row for row in log if row["best"]][-1]  # the last that beat all before it
    panels = ["loss"] + ["accuracy"] * ("val_accuracy" in log[0])
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], panels, strict=True):
        for split, style in (("train", "--"), ("val", "-")):
            if f"{split}_{name}" in log[0]:
                axis.plot(epochs, [row[f"{split}_{name}"] for row in log], style, marker="o", ms=3, label=split)
        axis.axvline(best["epoch"], color="0.7", lw=1, zorder=0, label="best on val")
        axis.set(xlabel="epoch", ylabel="loss (nats)" if name == "loss" else "accuracy (share)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name == "accuracy":
            axis.set_ylim(0, 1.02)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(label_text(title), fontsize=9)
    save(figure, path)


def plot_clips(clips: list[tuple[Any, str]], path: Path) -> Path:
    """A contact sheet as a PNG: one row per clip, uint8 [T, C, H, W], its frames side by side under its title."""
    from PIL import Image, ImageDraw, ImageFont

    times, _, height, width = clips[0][0].shape
    scale = min(SHEET_WIDTH / (times * width), 2.0)
    height, width = max(1, int(height * scale)), max(1, int(width * scale))
    font = ImageFont.load_default(13)
    line = 22
    sheet = Image.new("RGB", (max(times * (width + 2), 640), len(clips) * (height + line)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (clip, title) in enumerate(clips):
        top = row * (height + line)
        draw.text((2, top + 3), printable(title)[:LONGEST_TITLE], fill="black", font=font)
        for column, frame in enumerate(clip):
            image = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(image, (column * (width + 2), top + line))
    replace_file(path, sheet.save)
    return path


# -- what a model answers -----------------------------------------------------------------------------


def draw_labels(
    rows: list[dict], scores: dict[str, Any], display: dict[str, str], clip: Callable[[int], Any], folder: Path
) -> list[Path]:
    """The pictures of a classifier on one split; clip(place) reads a clip, uint8 [T, C, H, W]."""
    recalls = {n: (c["recall"], c["interval"]) for n, c in scores["classes"].items() if c["count"]}
    worst = dict(sorted(recalls.items(), key=lambda item: item[1][0])[:NAMED]) if len(recalls) > NAMED else recalls
    sheet = [(clip(place), title) for place, title in worst_clips(rows, display)]
    return [
        plot_confusion(scores["classes"], display, folder / "confusion.png"),
        plot_bars(worst, f"recall, 95 % intervals, n = {scores['count']}", folder / "classes.png", display=display),
        plot_reliability(scores["calibration"], scores["calibration_error"], folder / "reliability.png"),
        plot_clips(sheet, folder / "worst.png"),
    ]


def draw_captions(rows: list[dict], scores: dict[str, Any], clip: Callable[[int], Any], folder: Path) -> list[Path]:
    """The pictures of a captioner on one split: the captions that share least with a reference, by ROUGE-L, and
    captions that share all; attributes where they are known."""
    shared = [rouge_l(words(row["caption"]), [words(r) for r in row["references"]]) for row in rows]
    order = sorted(range(len(rows)), key=lambda place: shared[place])
    exact = [place for place in order if rows[place]["caption"] in rows[place]["references"]]
    worst = [place for place in order if rows[place]["caption"] not in rows[place]["references"]][: STRIPS // 2]
    sheet = [(clip(p), caption_title(rows[p])) for p in [*worst, *exact[: STRIPS // 2]]]
    drawn = [plot_clips(sheet, folder / "captions.png")]
    if "attributes" in scores:
        values = {n: v for n, v in scores["attributes"].items() if n != "intervals"}
        bars = {n: (v, scores["attributes"]["intervals"][n]) for n, v in values.items()}
        drawn.append(
            plot_bars(bars, f"share named rightly, 95 % intervals, n = {len(rows)}", folder / "attributes.png")
        )
    return drawn


def worst_clips(rows: list[dict], display: dict[str, str]) -> list[tuple[int, str]]:
    """(place, title) of the clips that went worst: wrong ones by confidence, then right ones by the lack of it."""

    def wrongness(row: dict) -> float:
        return row["score"] if row["label"] != row["truth"] else -row["score"]

    order = sorted(range(len(rows)), key=lambda i: -wrongness(rows[i]))[:STRIPS]
    return [(place, label_title(rows[place], display)) for place in order]


def clip_name(file: str | Path) -> str:
    """A video by its folder, which often is its class, and its name."""
    return "/".join(Path(file).parts[-2:])


def label_title(row: dict[str, Any], display: dict[str, str]) -> str:
    mark = "right" if row["label"] == row["truth"] else f"in truth {display[row['truth']]}"
    return f"{clip_name(row['file'])}: {display[row['label']]} {100 * row['score']:.0f} %, {mark}"


def caption_title(row: dict[str, Any]) -> str:
    equal = row["caption"] in row["references"]
    mark = "equals a reference" if equal else f"reference: {row['references'][0]}"
    return f"{clip_name(row['file'])}: {row['caption']}  |  {mark}"


def plot_confusion(classes: dict[str, Any], display: dict[str, str], path: Path) -> Path:
    """How often each class (rows) is taken for each (columns), as shares of its clips."""
    plt = pyplot()
    names = [*classes]
    shares = [[c["predicted"].get(n, 0) / max(1, c["count"]) for n in names] for c in classes.values()]
    named = len(names) <= NAMED
    side = min(3 + 0.38 * len(names), 12) if named else 8
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axis.set(xlabel="predicted", ylabel="truth")
    if named:
        labels = [label_text(display[n]) for n in names]
        axis.set_xticks(range(len(names)), labels, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(
            range(len(names)),
            [f"{label} ({c['count']})" for label, c in zip(labels, classes.values(), strict=True)],
            fontsize=8,
        )
        for i, row in enumerate(shares):
            for j, share in enumerate(row):
                if share:
                    colour = "white" if share > 0.5 else "black"
                    axis.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axis, label="share of the class's clips", shrink=0.8)
    return save(figure, path)


def plot_bars(
    values: dict[str, tuple[float, list[float]]],
    title: str,
    path: Path,
    zoom: bool = False,
    display: dict[str, str] | None = None,
) -> Path:
    """Shares with their intervals: a bar each, or with `zoom` a point each on an axis that begins below the least.
    `display` may give names other names, several the same one too."""
    plt = pyplot()
    places = range(len(values))
    figure, axis = plt.subplots(figsize=(6.5, 1.0 + 0.26 * len(values)), layout="constrained")
    shares, spans = [v for v, _ in values.values()], [span for _, span in values.values()]
    errors = [
        [max(0.0, v - low) for v, (low, _) in zip(shares, spans, strict=True)],
        [max(0.0, high - v) for v, (_, high) in zip(shares, spans, strict=True)],
    ]
    if zoom:
        axis.errorbar(shares, places, xerr=errors, fmt="o", ms=4, color=COLOUR, ecolor=SECOND, capsize=3)
        axis.set_xlim(max(0.0, min(low for low, _ in spans) - 0.02), 1.005)
        axis.set_ylim(-0.6, len(values) - 0.4)
        axis.grid(axis="y", color="0.9")
    else:
        axis.barh(places, shares, xerr=errors, color=COLOUR, ecolor=SECOND, capsize=3, height=0.7)
        axis.set_xlim(0, 1.02)
    axis.set_yticks(places, [label_text((display or {}).get(name, name)) for name in values])
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9)
    axis.tick_params(axis="y", labelsize=8)
    return save(figure, path)


def plot_reliability(bins: list[tuple[int, float, float]], error: float, path: Path) -> Path:
    """Accuracy over confidence, in bins of equal width; the area of a point is its number of clips."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(4.2, 4), layout="constrained")
    axis.plot([0, 1], [0, 1], color="0.7", lw=1, label="as sure as right")
    most = max(count for count, _, _ in bins)
    sizes = [12 + 150 * count / most for count, _, _ in bins]
    axis.scatter(
        [c for _, c, _ in bins], [a for _, _, a in bins], s=sizes, color=COLOUR, alpha=0.8, label="bins of clips"
    )
    axis.set(xlim=(0, 1.04), ylim=(-0.02, 1.04), xlabel="confidence", ylabel="accuracy (share)")
    axis.set_title(f"expected calibration error {error:.3f}, n = {sum(count for count, _, _ in bins)}", fontsize=9)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    return save(figure, path)


def plot_occlusion(maps: list[tuple[Any, Any, dict]], display: dict[str, str], path: Path) -> Path:
    """Each clip's frames, and below them where covering a cell makes the model least sure of its answer (red)."""
    from torch.nn import functional as F

    clips = []
    for clip, fall, row in maps:
        times, _, height, width = clip.shape
        scale = fall.clamp(min=0) / fall.max().clamp(min=1e-6)
        heat = F.interpolate(scale[None, None], size=(times, height, width), mode="nearest")[0, 0]  # (T, H, W)
        red = clip.new_tensor([255, 0, 0])[:, None, None]
        alpha = 0.7 * heat[:, None]
        clips.append((clip, caption_title(row) if "caption" in row else label_title(row, display)))
        told = f"red: where the clip's background over a cell makes it less sure of its answer, by {float(fall.max()):.2f} nats at most"
        clips.append(((clip * (1 - alpha) + red * alpha).to(clip.dtype), told))
    return plot_clips(clips, path)


def save(figure: Any, path: Path) -> Path:
    """Writes the figure; what matplotlib cannot draw, such as letters that its font lacks, is no news to the user."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            replace_file(path, lambda p: figure.savefig(p, dpi=130))
    finally:
        pyplot().close(figure)
    return path
