"""Draws the first training clips as the model will see them; takes the flags of main.py.

python preview.py --data_dir my_clips --augment light --count 12
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import parse, run_name
from script import UserError, counted, leave, make_folder, script

if TYPE_CHECKING:
    from runs import Run


@script
def main(argv: list[str] | None = None) -> int:
    """Writes preview_<run name>.png to --output_dir; trains nothing."""
    config, _ = parse(argv, "preview")
    from figures import plot_clips
    from runs import prepare

    path = Path(config.output_dir) / f"preview_{run_name(config)}.png"
    make_folder(path.parent)
    run = prepare(config, path.parent)
    clips = training_clips(run, config.count)
    plot_clips(clips, path)
    print(f"wrote {path}: {counted(len(clips), 'training clip')}, {counted(run.config.num_frames, 'frame')} each")
    return 0


def training_clips(run: "Run", count: int) -> list[tuple[Any, str]]:
    """(clip uint8 [T, C, H, W], title) of the first clips of the first epoch, augmented as in training."""
    from extras.augment import Augment
    from train_code import to_device

    # the same loader and augmentation as in training; a batch is None if none of its videos can be read
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
    if not clips:
        raise UserError(f"no training video can be read; the first error: {min(loader.skipped)}")
    return clips[:count]


def clip_titles(batch: dict[str, Any], run: "Run") -> list[str]:
    """The titles of a batch's clips: folder and file, label, and the text or caption that the model reads. A mixed clip
    has two labels with weights."""
    from figures import clip_name

    # the text is decoded from the ids, so that a cut or a wrong tokenizer shows
    names = [run.display_names[name] for name in run.splits.class_names]
    titles = []
    for row, index in enumerate(batch["index"].tolist()):
        sample = run.splits.train[index]
        parts = [clip_name(sample.path, **sample.times)]
        if "labels" in batch:
            parts.append(label_names(batch["labels"][row], names))
        if "mix" in batch:
            weight = float(batch["mix"][row])
            parts[-1] = f"{weight:.2f} {parts[-1]} + {1 - weight:.2f} {label_names(batch['mixed_labels'][row], names)}"
        if "input_ids" in batch:
            ids = batch["input_ids"][row][batch["attention_mask"][row] == 1]
            parts.append(repr(run.model.tokenizer.decode(ids, skip_special_tokens=True).strip()))
        titles.append("  |  ".join(parts))
    return titles


def label_names(target: Any, names: list[str]) -> str:
    """The name of a class, or the names of several: `target` is its number, or (K,) bool."""
    if target.ndim == 0:
        return names[target]
    return ", ".join(names[k] for k in target.nonzero().flatten()) or "no label"


if __name__ == "__main__":
    leave(main())
