"""One run: data -> model -> folder -> training -> report."""

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

import figures
import train_code
from build_model import VideoModel, build_model, parameter_table
from checkpoint import check_same, claimed_run, clear_run, finish_run, git_commit, run_metadata, write_run_files
from config import BACKBONES, Config, as_flags, default_rates, fill_auto, training_mode
from controls import control_line, control_scores, occlusion_maps
from scan import prepare_data
from script import UserError, is_main, printable, read_rows
from train_code import build_accelerator, build_loaders
from VLoader import SPLITS, Splits, check_samples, fingerprint_data, read_display_names, read_splits


@dataclass
class Run:
    """What the parts of a run share. `config` has no `auto` that depends on the model."""

    config: Config
    model: VideoModel
    splits: Splits
    display_names: dict[str, str]
    accelerator: Any
    folder: Path  # where it writes
    features: dict[str, Any] | None = None  # of the splits that are read from the feature cache

    def loaders(self, *names: str) -> dict[str, Any]:
        """The loaders of these splits, by default of all."""
        kept = self.splits if not names else only(self.splits, *names)
        return build_loaders(self.model, self.config, kept, self.features, self.accelerator)


def only(splits: Splits, *names: str) -> Splits:
    """The splits with the others emptied."""
    return replace(splits, **{name: [] for name in SPLITS if name not in names})


def prepare(config: Config, folder: Path) -> Run:
    """Reads what the data folder holds and builds the model. Raises UserError if either is not usable."""
    # what is wrong with the data is found before the model is built, which takes longer
    data_dir = Path(config.data_dir)
    splits = read_splits(data_dir)
    check_samples(splits, config.captioning, config.use_text)

    # the seed is set right before the new layers are drawn
    accelerator = build_accelerator(config)
    set_seed(config.seed)
    model = build_model(config, len(splits.class_names))
    vision = model.vision_encoder
    config = fill_auto(config, vision.config.num_frames, vision.preprocessing.image_size)
    return Run(config, model, splits, read_display_names(data_dir, splits.class_names), accelerator, folder)


def train_run(config: Config, typed: set[str]) -> int:
    """Trains a new run, or with --resume continues one; returns the exit status."""
    with claimed_run(config, typed, is_main()) as (folder, config):
        run = prepare(config, folder)
        print_backbones(run)
        print_hints(run)

        # every video is read once: by the feature cache, or else by the scan
        run.splits, run.features = prepare_data(run.splits, run.config, run.model, run.accelerator)
        write_or_compare(run)
        if run.accelerator.process_index > 0:
            set_seed(run.config.seed + run.accelerator.process_index)  # dropout of its own in every process
        print_data(run)
        print_settings(run)
        return fit(run)


def write_or_compare(run: Run) -> None:
    """Writes the files of a new run that training does not change; compares them where a run is resumed."""
    data = fingerprint_data(run.splits, Path(run.config.data_dir))
    if run.config.resume:
        check_same(run.folder, run.model, data)
    elif run.accelerator.is_main_process:
        clear_run(run.folder, run.config)
        metadata = run_metadata(run.model, run.config, run.splits.class_names, run.display_names, data)
        write_run_files(run.folder, run.model, run.config, metadata)


def fit(run: Run) -> int:
    """Trains, reports, draws; metrics.json comes last and makes the run finished. Returns the exit status."""
    # any of these may fail or be killed; --resume then continues, because metrics.json is not there yet
    loaders = run.loaders()
    try:
        with memory_advice():
            metrics = train_code.train(run.model, loaders, run.config, run.accelerator, run.folder)
            log = metrics.pop("log")
            if run.accelerator.is_main_process:
                figures.plot_curves(log, run.folder / "curves.png", run.folder.name)
            report(run, metrics)
            if run.accelerator.is_main_process:
                finish_run(run.folder, metrics)

    # Ctrl-C and SIGTERM: the exit status is the shell's own for that signal
    except train_code.Stopped as stopped:
        print(f"{stopped}; its state is saved. To continue: {resume_command(run.config)}")
        return 128 + stopped.number
    finally:
        for loader in loaders.values():
            loader.close()
        run.accelerator.end_training()
    print_end(run)
    return 0


@contextlib.contextmanager
def memory_advice() -> Generator[None]:
    """Turns running out of memory into a UserError that names the ways out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "allocate memory" not in str(error):  # torch's message on a CPU
            raise
        raise UserError(
            "out of memory: lower --batch_size (--gradient_accumulation_steps makes up for it), --num_frames or "
            "--image_size; or --gradient_checkpointing True, --freeze_visionbackbone True, --mixed_precision bf16"
        ) from None


# -- the report -------------------------------------------------------------------------------------


def report(run: Run, metrics: dict[str, Any]) -> None:
    """Prints the result, adds the controls if asked for, draws the pictures."""
    print(printable(result_line(metrics)))
    if run.config.controls:
        metrics["controls"] = control_scores(run.model, run.splits, run.config, run.accelerator)
        print(control_line(metrics["controls"]))
    if run.accelerator.is_main_process:
        draw_pictures(run, metrics)


def draw_pictures(run: Run, metrics: dict[str, Any]) -> None:
    """The pictures of a scored run, of its test split or else of val."""
    # pictures show single clips, also if the scores are averages over several views
    split = "test" if "test" in metrics else "val"
    rows = read_rows(run.folder / f"predictions_{split}.jsonl")
    one_view = replace(run.config, test_clips=1, test_crops=1)
    loader = build_loaders(run.model, one_view, only(run.splits, split))[split]

    def clip(index: int) -> Any:
        return loader.dataset[(0, index)]["video"]  # [T, C, H, W]

    if run.config.captioning:
        drawn = figures.draw_captions(rows, metrics[split], clip, run.folder)
    else:
        drawn = figures.draw_labels(rows, metrics[split], run.display_names, clip, run.folder)
    if run.config.controls:
        maps = occlusion_maps(run.model, loader, rows, run.accelerator)
        drawn.append(figures.plot_occlusion(maps, run.display_names, run.folder / "occlusion.png"))
    print(f"pictures of {split} in {run.folder}/: {', '.join(path.name for path in drawn)}")


def result_line(metrics: dict[str, Any]) -> str:
    """The scores on test, or without one on val, in one line."""
    split = "test" if "test" in metrics else "val"
    scores = metrics[split]
    views = scores.get("views", {"clips": 1, "crops": 1})
    each = "" if set(views.values()) == {1} else f", {views['clips']} clips x {views['crops']} crops of each"
    parts = [f"{split} of epoch {metrics['best_epoch']} on {scores['count']} videos{each}: loss {scores['loss']:.3f}"]
    if "accuracy" in scores:
        low, high = scores["intervals"]["accuracy"]
        parts.append(f"accuracy {100 * scores['accuracy']:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f})")
    if "CIDEr" in scores:
        low, high = scores["intervals"]["CIDEr"]
        parts.append(f"CIDEr {scores['CIDEr']:.3f} (95 %: {low:.3f} to {high:.3f})")
        parts.append(f"exact match {100 * scores['exact_match']:.1f} %")
    attributes = scores.get("attributes", {})
    parts += [f"{name} {100 * value:.1f} %" for name, value in attributes.items() if name != "intervals"]
    return ", ".join(parts)


# -- what a run prints ------------------------------------------------------------------------------


def print_backbones(run: Run) -> None:
    """One line per backbone: its name, the data it was trained on, its size."""
    vision = run.model.vision_encoder
    for part, backbone in run.model.backbones().items():
        name = getattr(run.config, f"{part}_model")
        size = sum(p.numel() for n, p in backbone.named_parameters() if ".lora_" not in n) / 1e6
        facts = [f"{size:.1f} M parameters"]
        if part == "vision":
            facts.append(f"{vision.preprocessing.image_size}², {vision.config.num_frames} frames")
        hint = ""
        if name in BACKBONES and run.config.weights == "tiny":
            facts.insert(0, "synthetic shapes" if part == "vision" else "captions of synthetic shapes")
            name += "-tiny"
            hint = "; for real videos add --weights hub" if part == "vision" else ""
        else:
            name = run.model.sources[part].path
        print(f"{part}: {name} ({', '.join(facts)}){hint}")


def print_hints(run: Run) -> None:
    """Advice on combinations that work but are rarely meant."""
    config = run.config
    if config.use_vlm and training_mode(config)["vision"] == "full":
        print(
            "hint: the vision backbone is trained in full next to a language model; "
            "--freeze_visionbackbone True saves memory and time"
        )
    if config.captioning and not config.use_text:
        print("note: captions are the training targets with or without --use_text; both train the same model")
    if config.weights == "tiny" and config.vision_model in BACKBONES and run.splits.lexicon is None:
        print(
            "warning: the tiny backbones have seen synthetic shapes only, and this data set looks like your own "
            "videos; add --weights hub"
        )


def print_data(run: Run) -> None:
    splits = run.splits
    sizes = ", ".join(f"{len(getattr(splits, name))} {name}" for name in ("train", "val", "test"))
    print(f"data: {sizes} videos, {len(splits.class_names)} classes in {run.config.data_dir}")
    if splits.note:
        print(splits.note)
    if note := run.model.truncation_note([*splits.train, *splits.val, *splits.test]):
        print(note)


def print_settings(run: Run) -> None:
    """Machine, batch, learning rates, and how much of each part is trained."""
    config = run.config
    accumulated = f" x {config.gradient_accumulation_steps}" if config.gradient_accumulation_steps > 1 else ""
    print(
        f"{run.model.task} on {run.accelerator.device.type}, precision {run.accelerator.mixed_precision}, "
        f"batch {config.batch_size}{accumulated}, {rates_line(config)}, {config.epochs} epochs, seed {config.seed}, "
        f"commit {git_commit()}"
    )
    print(f"{'part':<16}{'trained':>12}{'total':>12}")
    for name, trained, total in parameter_table(run.model):
        print(f"{name:<16}{trained:>12,}{total:>12,}")


def rates_line(config: Config) -> str:
    """The peak learning rate of every part that is trained."""
    _, scales = default_rates(config)
    trained = [part for part, mode in training_mode(config).items() if mode != "frozen"]
    rates = [f"{part} {config.learning_rate * scales[part]:g}" for part in (*trained, "new layers")]
    return f"learning rate {config.learning_rate:g} ({', '.join(rates)})"


def print_end(run: Run) -> None:
    print(f"run: {run.folder}/ (model.safetensors, config.yaml, metadata.json, log.jsonl, metrics.json, predictions)")
    flags = [as_flags(run.config) if run.config.run_name is None else f"--checkpoint {run.folder}"]
    flags += ["--video_dir <video, frame folder, or a folder of them>"]
    flags += ["--text_input '...'"] if run.model.text_field == "text" else []
    print("next: python inference.py", *filter(None, flags))


def resume_command(config: Config) -> str:
    flags = as_flags(config) if config.run_name is None else f"--run_name {config.run_name}"
    folder = "" if config.output_dir == Config().output_dir else f"--output_dir {config.output_dir}"
    return " ".join(filter(None, ["python main.py --resume True", flags, folder]))
