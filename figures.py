"""One function per picture."""

from pathlib import Path
from typing import Any


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
