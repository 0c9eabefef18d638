"""One run from start to end: data -> model -> folder -> train -> report. Start reading at train_run()."""

import contextlib
import shlex
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
from config import Config, as_flags, default_rates, fill_epochs, is_non_commercial, is_tiny, training_mode
from extras.controls import control_line, control_scores, occlusion_maps
from extras.groups import shared_recordings
from extras.multilabel import labels_line, resolve_labels, scores_text
from extras.reject import check_val, lacks_threshold, reject_line
from extras.segments import add_background
from extras.shards import data_folder
from pretrained import licence_of, warn_of_tiny
from scan import prepare_data
from script import UserError, counted, freeze_objects, gc_disabled, is_main, printable, read_rows
from train_code import build_accelerator, build_loaders, cast_frozen
from VLoader import SPLITS, Splits, check_samples, distinct, fingerprint_data, read_display_names, read_splits


@dataclass
class Run:
    """What the steps of a run share. In `config`, every `auto` that depends on the model is filled in."""

    config: Config
    model: VideoModel
    splits: Splits
    display_names: dict[str, str]
    accelerator: Any
    folder: Path  # where the run writes
    features: dict[str, Any] | None = None  # cached features by split; other splits are read as pixels
    frames: dict[str, Any] | None = None  # stored frames by split; the videos of other splits are decoded

    def loaders(self, *names: str) -> dict[str, Any]:
        """The loaders of these splits, by default of all."""
        splits = only(self.splits, *names or SPLITS)
        return build_loaders(self.model, self.config, splits, self.features, self.accelerator, self.frames)


def only(splits: Splits, *names: str) -> Splits:
    """The splits of these names; the others are emptied."""
    return replace(splits, **{name: [] for name in SPLITS if name not in names})


def train_run(config: Config, typed_flags: set[str]) -> int:
    """Trains a new run, or with --resume continues one. `typed_flags` are the names of the flags on the command line.

    Returns the exit status. Raises UserError for anything that the user can fix.
    """
    # the folder comes first, and locked, so that two processes never write the same run
    with claimed_run(config, typed_flags, is_main()) as (folder, config):
        run = prepare(config, folder)
        freeze_objects()
        cast_frozen(run.model, run.config, run.accelerator)
        print_backbones(run)
        print_hints(run)

        # read every video once, so that an unreadable one stops the run now and not hours later
        run.splits, run.features, run.frames = prepare_data(run.splits, run.config, run.model, run.accelerator)
        write_or_compare(run)

        # the same weights in every process, but different dropout
        if run.accelerator.process_index > 0:
            set_seed(run.config.seed + run.accelerator.process_index)
        print_data(run)
        print_settings(run)
        return fit(run)


@gc_disabled()  # reading many rows makes many objects, and the collector would visit all of torch each time
def prepare(config: Config, folder: Path) -> Run:
    """Reads what the data folder holds and builds the model. Raises UserError if either cannot be used."""
    # data first: it takes less time than the model, and fails more often
    data_dir = data_folder(config.data_dir, config.output_dir)
    splits = read_splits(data_dir, None, config.captioning, config.group_by)
    splits, config = resolve_labels(splits, config)
    splits = add_background(splits, config.background)
    check_samples(splits, config.captioning, config.use_text)
    check_val(splits.val, config.reject)

    # seed right before the model, so that nothing else changes the random weights of its new layers
    accelerator = build_accelerator(config)
    set_seed(config.seed)
    model = build_model(config, len(splits.class_names))

    # the backbone's own frames and size are known only now
    config = fill_epochs(model.vision_encoder.fill_auto(config), len(splits.train))
    return Run(config, model, splits, read_display_names(data_dir, splits.class_names), accelerator, folder)


def write_or_compare(run: Run) -> None:
    """Writes config.yaml, metadata.json and backbone files of a new run. When a run is resumed, checks instead that
    data and model are still the ones it was started with."""
    data = fingerprint_data(run.splits, data_folder(run.config.data_dir, run.config.output_dir))
    if run.config.resume:
        check_same(run.folder, run.model, data)
    elif run.accelerator.is_main_process:
        clear_run(run.folder, run.config)
        metadata = run_metadata(run.model, run.config, run.splits.class_names, run.display_names, data)
        if share := share_of_questions(run.splits):
            metadata["questions"] = share  # inference refuses questions without it
        write_run_files(run.folder, run.model, run.config, metadata)


def share_of_questions(splits: Splits) -> str:
    """Whether "all" or "some" of the training samples have a question, or "" if none has."""
    asked = [bool(sample.question) for sample in splits.train]
    return "all" if all(asked) else "some" if any(asked) else ""


def fit(run: Run) -> int:
    """Trains, scores, draws, and writes metrics.json. Returns the exit status."""
    # metrics.json marks a run as finished, so it comes last: --resume repairs whatever fails or is killed before it
    loaders = run.loaders()
    try:
        with memory_advice():
            metrics = train_code.train(run.model, loaders, run.config, run.accelerator, run.folder)
            finish(run, metrics)

    # Ctrl-C and SIGTERM; shells use 128 + number as exit status
    except train_code.Stopped as stopped:
        print(
            f"{stopped}; the state is saved. To continue: {resume_command(run.config, run.accelerator.num_processes)}"
        )
        return 128 + stopped.number
    finally:
        for loader in loaders.values():
            loader.close()
        run.accelerator.end_training()
    print_end(run)
    return int(lacks_threshold(metrics))


def finish(run: Run, metrics: dict[str, Any]) -> None:
    """Reports on a trained run, and marks it as finished. `metrics` are as train() returns them, with the log."""
    log = metrics.pop("log")
    if run.accelerator.is_main_process:
        figures.plot_curves(log, run.folder / "curves.png", run.folder.name)
    report(run, metrics)
    if run.accelerator.is_main_process:
        finish_run(run.folder, metrics, run.model.thresholds)


@contextlib.contextmanager
def memory_advice() -> Generator[None]:
    """Turns running out of memory into a UserError that says what to try."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "allocate memory" not in str(error):  # what torch raises on a CPU
            raise
        raise UserError(
            "out of memory: lower --batch_size (and raise --gradient_accumulation_steps as much), --num_frames or "
            "--image_size; or try --gradient_checkpointing True, --freeze_visionbackbone True or --mixed_precision bf16"
        ) from None


# -- the report -------------------------------------------------------------------------------------


def report(run: Run, metrics: dict[str, Any]) -> None:
    """Prints the result, adds the controls if --controls is True, draws the pictures."""
    print(printable(result_line(metrics)))
    if "reject" in metrics:
        print(reject_line(metrics))
    if run.config.controls:
        metrics["controls"] = control_scores(run.model, run.splits, run.config, run.accelerator)
        print(control_line(metrics["controls"]))
    if run.accelerator.is_main_process:
        draw_pictures(run, metrics)


def draw_pictures(run: Run, metrics: dict[str, Any]) -> None:
    """Draws the pictures of a scored run: of its test split or, without one, of val."""
    # a picture shows one clip of each video, even if the scores are averages over several
    split = "test" if "test" in metrics else "val"
    rows = read_rows(run.folder / f"predictions_{split}.jsonl")
    one_view = replace(run.config, test_clips=1, test_crops=1)
    loader = build_loaders(run.model, one_view, only(run.splits, split))[split]

    def clip(index: int) -> Any:
        grey = torch.full((run.config.num_frames, 3, 64, 64), 128, dtype=torch.uint8)  # for a video that is not here
        return loader.dataset[(0, index)].get("video", grey)  # [T, C, H, W]

    if run.config.captioning:
        pictures = figures.draw_captioner(rows, metrics[split], clip, run.folder)
    else:
        pictures = figures.draw_classifier(rows, metrics[split], run.display_names, clip, run.folder)

    # 144 forward passes per clip, so only with the controls
    if run.config.controls:
        maps = occlusion_maps(run.model, loader, rows, run.accelerator)
        pictures.append(figures.plot_occlusion(maps, run.display_names, run.folder / "occlusion.png"))
    print(f"pictures of {split} in {run.folder}/: {', '.join(path.name for path in pictures)}")


def result_line(metrics: dict[str, Any]) -> str:
    """The scores on test, or without a test split on val, in one line."""
    # which epoch, how many videos, and how many views of each
    split = "test" if "test" in metrics else "val"
    scores = metrics[split]
    views = scores.get("views", {"clips": 1, "crops": 1})
    each = ""
    if set(views.values()) != {1}:
        each = f", {counted(views['clips'], 'clip')} x {counted(views['crops'], 'crop')} of each"
    videos = counted(scores["count"], "video")
    if "recordings" in scores:
        videos += f" of {counted(scores['recordings'], 'recording')}"
    parts = [f"{split} of epoch {metrics['best_epoch']} on {videos}{each}: loss {scores['loss']:.3f}"]

    # a score without its interval says little on a small test split
    if "accuracy" in scores:
        low, high = scores["intervals"]["accuracy"]
        parts.append(f"accuracy {100 * scores['accuracy']:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f})")
    if "mAP" in scores:
        parts.append(scores_text(scores))
    if "CIDEr" in scores:
        low, high = scores["intervals"]["CIDEr"]
        parts.append(f"CIDEr {scores['CIDEr']:.3f} (95 %: {low:.3f} to {high:.3f})")
        parts.append(f"exact match {100 * scores['exact_match']:.1f} %")
    attributes = scores.get("attributes", {})
    parts += [f"{name} {100 * value:.1f} %" for name, value in attributes.items() if name != "intervals"]
    if "answers" in scores:
        answers = scores["answers"]
        low, high = answers["interval"]
        right = f"{100 * answers['accuracy']:.1f} % of {counted(answers['count'], 'answer')} right"
        parts.append(f"{right} (95 %: {100 * low:.1f} to {100 * high:.1f})")
        parts += [f"{kind} {100 * row['accuracy']:.1f} %" for kind, row in answers["kinds"].items()]
    return ", ".join(parts)


# -- what a run prints ------------------------------------------------------------------------------


def print_backbones(run: Run) -> None:
    """Prints one line per backbone: its name, its size, its licence and, for the tiny ones, what they were trained on;
    a warning if the licence forbids commercial use; and which frames of a video make a clip."""
    vision = run.model.vision_encoder
    for part, backbone in run.model.backbones().items():
        size = sum(p.numel() for n, p in backbone.named_parameters() if ".lora_" not in n) / 1e6
        text = f"{size:.1f} M parameters"
        if part == "vision":
            text += f", {vision.preprocessing.image_size}², {counted(vision.num_frames, 'frame')}"
            text += f", layer {vision.layer} of {vision.depth}" if vision.layer < vision.depth else ""
        source = run.model.sources[part]
        licence = licence_of(source)
        text += f", licence {licence}"

        # the tiny ones work on nothing but the synthetic data: say so in every run
        name = getattr(run.config, f"{part}_model")
        if not is_tiny(run.config, part):
            print(f"{part}: {source.path} ({text})")
        elif part == "vision":
            print(f"{part}: {name}-tiny (synthetic shapes, {text}); for real videos add --weights hub")
        else:
            print(f"{part}: {name}-tiny (captions of synthetic shapes, {text})")
        if is_non_commercial(licence):
            print(f"warning: {source.path} and models trained from it are not for commercial use ({licence})")
    print(frames_line(run.config))


def frames_line(config: Config) -> str:
    """Which frames of a video make a clip, in one line."""
    stride = abs(config.frame_stride)
    if stride == 0:
        return "frames: spread over the whole video"
    window = (config.num_frames - 1) * stride + 1
    short = "a shorter video repeats its last frame" if config.frame_stride > 0 else "or spread over a shorter video"
    return f"frames: one in {stride}, from a window of {window} frames; {short}"


def print_hints(run: Run) -> None:
    """Warns of combinations that work but are rarely what the user wants."""
    config = run.config
    if config.use_vlm and training_mode(config)["vision"] == "full":
        print(
            "hint: the vision backbone is trained in full together with a language model; "
            "--freeze_visionbackbone True saves memory and time"
        )
    if config.captioning and not config.use_text:
        print("note: --use_text has no effect on captioners; captions are the targets with and without it")
    warn_of_tiny(config, run.splits.lexicon)


def print_data(run: Run) -> None:
    """Prints what the run trains on: the sizes of the splits, how val was made, and how many texts are cut."""
    splits = run.splits
    sizes = ", ".join(f"{len(distinct(getattr(splits, name)))} {name}" for name in SPLITS)
    classes = counted(len(splits.class_names), "class", "classes")
    print(f"videos: {sizes}; {classes} in {run.config.data_dir}")
    if run.model.multi_label:
        print(labels_line(splits.train))
    questions = {name: sum(bool(s.question) for s in getattr(splits, name)) for name in SPLITS}
    if any(questions.values()):
        print(f"questions: {', '.join(f'{count} {name}' for name, count in questions.items())}")
    if splits.note:
        print(splits.note)
    for places, recordings in shared_recordings(splits).items():
        count = counted(len(recordings), "recording")
        print(printable(f"warning: {count} in {places}, so these splits are not independent; first: {recordings[0]}"))
    if run.model.text_field == "text" and (without := texts_missing(splits)):
        print(f"note: {without} have no text; the model reads an empty one")
    if note := run.model.truncation_note([*splits.train, *splits.val, *splits.test]):
        print(note)


def texts_missing(splits: Splits) -> str:
    """How many videos of each split have no text, or "" if all have one."""
    counts = {name: [s.text is None for s in distinct(getattr(splits, name))] for name in SPLITS}
    return ", ".join(
        f"{sum(missing)} of {len(missing)} {name} videos" for name, missing in counts.items() if any(missing)
    )


def print_settings(run: Run) -> None:
    """Prints how the run trains: device, batch, learning rates, and how many parameters of each part are trained."""
    config = run.config
    accumulated = f" x {config.gradient_accumulation_steps}" if config.gradient_accumulation_steps > 1 else ""
    epochs = counted(config.epochs, "epoch")
    print(
        f"{run.model.task} on {run.accelerator.device.type}, precision {run.accelerator.mixed_precision}, "
        f"batch {config.batch_size}{accumulated}, {rates_line(config)}, {epochs}, seed {config.seed}, "
        f"commit {git_commit()}"
    )
    print(f"{'part':<16}{'trained':>12}{'total':>12}")
    for name, trained, total in parameter_table(run.model):
        print(f"{name:<16}{trained:>12,}{total:>12,}")


def rates_line(config: Config) -> str:
    """The peak learning rates, in one line: overall, and of every part that is trained."""
    _, scales = default_rates(config)
    trained = [part for part, mode in training_mode(config).items() if mode != "frozen"]
    rates = [f"{part} {config.learning_rate * scales[part]:g}" for part in (*trained, "new layers")]
    return f"learning rate {config.learning_rate:g} ({', '.join(rates)})"


def print_end(run: Run) -> None:
    """Prints where the results are, and the command that uses them."""
    print(f"run: {run.folder}/ (model.safetensors, config.yaml, metadata.json, log.jsonl, metrics.json, predictions)")
    flags = [as_flags(run.config) if run.config.run_name is None else f"--checkpoint {shlex.quote(str(run.folder))}"]
    flags += ["--video_dir <video, frame folder, or a folder of them>"]
    reads_text = run.model.text_field == "text" or share_of_questions(run.splits) == "all"
    flags += ["--text_input '...'"] if reads_text else []
    print("next: python inference.py", *filter(None, flags))


def resume_command(config: Config, processes: int = 1) -> str:
    """The command that continues this run; all other options are read from its folder."""
    # the shortest flags that lead to the same folder
    start = "python" if processes == 1 else f"torchrun --standalone --nproc_per_node {processes}"
    flags = as_flags(config) if config.run_name is None else f"--run_name {shlex.quote(config.run_name)}"
    changed = config.output_dir != Config().output_dir
    folder = f"--output_dir {shlex.quote(str(config.output_dir))}" if changed else ""
    return " ".join(filter(None, [start, "main.py --resume True", flags, folder]))
