"""One function per picture."""

from pathlib import Path
from typing import Any

SHEET_WIDTH = 1600  # pixels, of a contact sheet at most


def plot_curves(log: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss, and where there is one accuracy, over the epochs of log.jsonl, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

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
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_clips(clips: list[tuple[Any, str]], path: Path) -> None:
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
        draw.text((2, top + 3), title.replace("\n", " "), fill="black", font=font)
        for column, frame in enumerate(clip):
            image = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(image, (column * (width + 2), top + line))
    sheet.save(path)
