"""Draws what the model will see of the first training clips; takes the flags of main.py.

python preview.py --data_dir my_clips --augment light --count 12
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import parse, run_name
from script import leave, make_folder, run_script

if TYPE_CHECKING:
    from runs import Run


def run(argv: list[str] | None) -> int:
    config, _ = parse(argv, "preview")
    from figures import plot_clips
    from runs import prepare

    path = Path(config.output_dir) / f"preview_{run_name(config)}.png"
    make_folder(path.parent)
    run = prepare(config, path.parent)
    clips = training_clips(run, config.count)
    plot_clips(clips, path)
    print(f"wrote {path}: {len(clips)} training clips, {run.config.num_frames} frames each")
    return 0


def training_clips(run: "Run", count: int) -> list[tuple[Any, str]]:
    """(uint8 [T, C, H, W], title) of the first clips of the first epoch, augmented as in training."""
    from augment import Augment
    from train_code import to_device

    augment = Augment(run.config.augment, run.config.flip)
    loader = run.loaders("train")["train"]
    clips: list[tuple[Any, str]] = []
    for batch in loader:
        if batch is not None:
            batch = augment(to_device(batch, run.accelerator.device))
            clips += zip(batch["video"].cpu(), clip_titles(batch, run), strict=True)
        if len(clips) >= count:
            break
    loader.close()
    return clips[:count]


def clip_titles(batch: dict[str, Any], run: "Run") -> list[str]:
    """Folder and file, label (of a mixed clip both, with their weights), and the text or caption that the model reads."""
    from figures import clip_name

    names = [run.display_names[name] for name in run.splits.class_names]
    titles = []
    for row, index in enumerate(batch["index"].tolist()):
        parts = [clip_name(run.splits.train[index].path)]
        if "labels" in batch:
            parts.append(names[batch["labels"][row]])
        if "mix" in batch:
            weight = float(batch["mix"][row])
            parts[-1] = f"{weight:.2f} {parts[-1]} + {1 - weight:.2f} {names[batch['mixed_labels'][row]]}"
        if "input_ids" in batch:
            ids = batch["input_ids"][row][batch["attention_mask"][row] == 1]
            parts.append(repr(run.model.tokenizer.decode(ids, skip_special_tokens=True).strip()))
        titles.append("  |  ".join(parts))
    return titles


def main(argv: list[str] | None = None) -> int:
    return run_script(run, argv)


if __name__ == "__main__":
    leave(main())
