"""Trains a run: a video classifier, a video + language classifier, or a video captioner.

python main.py --vision_model timesformer
python main.py --help
"""

import contextlib
import os
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

from config import BACKBONES, NAMING, Config, as_flags, parse, run_name
from script import UserError, leave, make_folder, printable, run_script

LISTED = 20  # unreadable videos that an error names
SCAN_CACHE = ".videos.json"  # in the folder of runs: what was found of each video, until it changes


def resolve(config: Config, model: Any) -> Config:
    """Replaces every `auto` but device and precision by the value in force."""
    from train_code import default_rates

    rate, _ = default_rates(model, config)
    settings = model.vision_encoder.config
    return replace(
        config,
        num_frames=settings.num_frames,
        image_size=model.vision_encoder.preprocessing.image_size,
        batch_size=16 if config.batch_size == "auto" else config.batch_size,
        learning_rate=rate if config.learning_rate == "auto" else config.learning_rate,
    )


def print_towers(config: Config, model: Any) -> None:
    """One line per backbone: what it is and what it has seen."""
    vision = model.vision_encoder
    clips = f"{vision.preprocessing.image_size}², {vision.config.num_frames} frames"
    for option, tower in (("vision_model", vision), ("language_model", getattr(model, "language_model", None))):
        if tower is None:
            continue
        name = getattr(config, option)
        size = sum(p.numel() for n, p in tower.named_parameters() if ".lora_" not in n) / 1e6
        tiny = name in BACKBONES and config.weights == "tiny"
        seen = f"{BACKBONES[name].trained_on}, " if tiny else ""
        line = f"{name}-tiny" if tiny else model.sources["vision" if tower is vision else "language"].path
        line += f" ({seen}{size:.1f} M parameters{', ' + clips if tower is vision else ''})"
        hint = "; for real videos add --weights hub" if tiny and tower is vision else ""
        print(f"{option.split('_')[0]}: {line}{hint}")


def print_settings(config: Config, model: Any, accelerator: Any) -> None:
    from build_model import parameter_table
    from checkpoint import git_commit
    from train_code import rates_line

    print(
        f"{model.task} on {accelerator.device.type}, precision {accelerator.mixed_precision}, batch {config.batch_size}"
        f"{f' x {config.gradient_accumulation_steps}' if config.gradient_accumulation_steps > 1 else ''}, "
        f"{rates_line(model, config)}, {config.epochs} epochs, seed {config.seed}, commit {git_commit()}"
    )
    print(f"{'part':<16}{'trained':>12}{'total':>12}")
    for name, trained, total in parameter_table(model):
        print(f"{name:<16}{trained:>12,}{total:>12,}")


def print_hints(config: Config, splits: Any) -> None:
    if config.use_vlm and not (config.freeze_visionbackbone or config.use_lora_vision):
        print(
            "hint: the vision backbone is trained in full beside a language model; --freeze_visionbackbone True saves memory and time"
        )
    if config.captioning and not config.use_text:
        print("note: captions are the targets of training with --use_text False as with True; both train the same")
    synthetic = splits.train[0].attributes.keys() >= {"shape", "motion"}
    if config.weights == "tiny" and config.vision_model in BACKBONES and not synthetic:
        print(
            "warning: the tiny backbones know synthetic shapes only, and these look like videos of your own; add --weights hub"
        )


def result_line(metrics: dict[str, Any]) -> str:
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


def print_end(config: Config, model: Any, run_dir: Path) -> None:
    print(f"run: {run_dir}/ (model.safetensors, config.yaml, metadata.json, log.jsonl, metrics.json, predictions)")
    flags = [as_flags(config) if config.run_name is None else f"--checkpoint {run_dir}"]
    flags += ["--video_dir <video, frame folder, or a folder of them>"]
    flags += ["--text_input '...'"] if model.text_source == "text" else []
    print("next: python inference.py", *filter(None, flags))


def resume_command(config: Config) -> str:
    flags = as_flags(config) if config.run_name is None else f"--run_name {config.run_name}"
    place = "" if config.output_dir == Config().output_dir else f"--output_dir {config.output_dir}"
    return " ".join(filter(None, ["python main.py --resume True", flags, place]))


def train_run(
    config: Config, model: Any, splits: Any, features: Any, display: dict[str, str], accelerator: Any, run_dir: Path
) -> int:
    """Trains, reports, plots; metrics.json comes last and makes the run finished. Returns the exit status."""
    import train_code
    from checkpoint import finish_run
    from figures import plot_curves

    share = (accelerator.process_index, accelerator.num_processes)
    loaders = train_code.build_loaders(model, config, splits, features, share)
    try:
        with memory_advice():
            metrics = train_code.train(model, loaders, config, accelerator, run_dir)
            log = metrics.pop("log")
            if accelerator.is_main_process:
                plot_curves(log, run_dir / "curves.png", run_dir.name)
            report(metrics, model, splits, display, config, accelerator, run_dir)
            if accelerator.is_main_process:
                finish_run(run_dir, metrics)
    except train_code.Stopped as stopped:
        print(f"{stopped}; its state is saved. To go on: {resume_command(config)}")
        return 128 + stopped.number
    finally:
        for loader in loaders.values():
            loader.close()
    print_end(config, model, run_dir)
    return 0


@contextlib.contextmanager
def memory_advice() -> Generator[None]:
    """Running out of memory becomes a UserError that names the ways out."""
    from torch import OutOfMemoryError

    try:
        yield
    except (OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "allocate memory" not in str(error):  # what torch says on a CPU
            raise
        raise UserError(
            "out of memory: lower --batch_size (--gradient_accumulation_steps makes up for it), --num_frames or "
            "--image_size; or --gradient_checkpointing True, --freeze_visionbackbone True, --mixed_precision bf16"
        ) from None


def report(
    metrics: dict[str, Any],
    model: Any,
    splits: Any,
    display: dict[str, str],
    config: Config,
    accelerator: Any,
    folder: Path,
) -> None:
    """Prints the result, adds the controls where they are asked for, draws the pictures."""
    from controls import control_line, control_scores

    print(printable(result_line(metrics)))
    if config.controls:
        metrics["controls"] = control_scores(model, splits, config, accelerator)
        print(control_line(metrics["controls"]))
    if accelerator.is_main_process:
        draw_pictures(metrics, model, splits, display, config, accelerator, folder)


def draw_pictures(
    metrics: dict[str, Any],
    model: Any,
    splits: Any,
    display: dict[str, str],
    config: Config,
    accelerator: Any,
    folder: Path,
) -> None:
    """The pictures of a scored run, of its test split or else of val."""
    import figures
    from controls import occlusion_maps
    from script import read_rows
    from train_code import build_loaders

    split = "test" if "test" in metrics else "val"
    rows = read_rows(folder / f"predictions_{split}.jsonl")
    only = replace(splits, train=[], val=[], test=getattr(splits, split))
    loader = build_loaders(model, replace(config, test_clips=1, test_crops=1), only)["test"]

    def clip(place: int) -> Any:
        return loader.dataset[(0, place)]["pixel_values"]  # [T, C, H, W]

    if config.captioning:
        drawn = figures.draw_captions(rows, metrics[split], clip, folder)
    else:
        drawn = figures.draw_labels(rows, metrics[split], display, clip, folder)
    maps = occlusion_maps(model, loader, rows, accelerator)
    drawn.append(figures.plot_occlusion(maps, display, folder / "occlusion.png"))
    print(f"pictures of {split} in {folder}/: {', '.join(path.name for path in drawn)}")


# -- evaluating a run --------------------------------------------------------------------------------

#: what may be typed beside --evaluate; all else is the run's own
EVALUATION = {
    "evaluate",
    "controls",
    "data_dir",
    "output_dir",
    "cache_features",
    "cache_dir",
    "skip_unreadable",
    "batch_size",
    "test_clips",
    "test_crops",
    "max_new_tokens",
    "num_beams",
    "device",
    "mixed_precision",
    "num_workers",
}


def evaluate_run(given: Config, typed: set[str]) -> int:
    """Scores a run again on val and test, into its own folder or, with --output_dir, into one there of the same name."""
    from checkpoint import METADATA, PROVIDED, lock_run, read_run

    run_dir = Path(given.evaluate)
    other = sorted(typed - EVALUATION - set(NAMING))
    if other:
        raise UserError(f"--{other[0]} has no effect with --evaluate, which takes the run's own options")
    saved, _ = read_run(run_dir)
    folder = Path(given.output_dir) / run_dir.resolve().name if "output_dir" in typed else run_dir
    if folder.resolve().is_relative_to(PROVIDED.resolve()):
        raise UserError(f"{PROVIDED} is never written: add --output_dir <a folder for the scores>")
    if folder.resolve() != run_dir.resolve() and (folder / METADATA).exists():
        raise UserError(f"{folder} holds a run of its own; choose another --output_dir")
    config = replace(saved, **{name: getattr(given, name) for name in (typed & EVALUATION) | {"controls"}})
    data_dir = Path(config.data_dir)
    if data_dir.resolve() != Path(saved.data_dir).resolve():
        folder = folder / f"evaluation_{data_dir.resolve().name}"
    if not is_main():
        return score_run(run_dir, given, typed, config, folder)
    with lock_run(folder):
        return score_run(run_dir, given, typed, config, folder)


def score_run(run_dir: Path, given: Config, typed: set[str], config: Config, folder: Path) -> int:
    """Scores the run with the options in `config`; metrics, predictions and pictures go to `folder`."""
    import train_code
    from checkpoint import METRICS, load_run, load_weights, read_metrics
    from script import write_json
    from VLoader import check_samples, read_splits

    model, _, metadata = load_run(run_dir, given, typed)
    display, data_dir = metadata["display_names"], Path(config.data_dir)
    splits = read_splits(data_dir, metadata["class_names"])
    check_samples(splits, config.captioning, config.use_text)
    if config.controls and not splits.train:
        raise UserError(f"--controls True looks at training videos too, and {data_dir} has no train/")
    accelerator = train_code.build_accelerator(config)
    if not config.controls:  # these alone look at the training videos
        splits = replace(splits, train=[])
    splits, features = readable(splits, config, model, accelerator)
    share = (accelerator.process_index, accelerator.num_processes)
    loaders = train_code.build_loaders(model, config, replace(splits, train=[]), features, share)
    model.to(accelerator.device)
    # what training wrote stays, but for the controls: they belong to the scores of then
    metrics = {k: v for k, v in read_metrics(folder).items() if k != "controls"} if folder == run_dir else {}
    metrics["best_epoch"] = load_weights(run_dir, model).get("epoch")
    try:
        with memory_advice():
            metrics |= train_code.score_splits(model, loaders, config, accelerator, folder)
            report(metrics, model, splits, display, config, accelerator, folder)
    finally:
        for loader in loaders.values():
            loader.close()
    if accelerator.is_main_process:
        write_json(metrics, folder / METRICS)
    print(f"wrote {folder}/{METRICS} and {folder}/predictions_*.jsonl")
    return 0


# -- what can be read --------------------------------------------------------------------------------


def scanned(splits: Any, config: Config, cached: tuple[str, ...]) -> tuple[Any, dict[Path, str]]:
    """(the splits with the digest of every video, what is wrong with each unreadable one). Of the `cached` splits
    nothing is decoded yet."""
    from checkpoint import read_scan, write_scan
    from VLoader import identified, scan

    file = Path(config.output_dir) / SCAN_CACHE
    known = read_scan(file)
    frames = (config.num_frames, config.frame_stride, config.test_clips)
    bad, good = scan(splits, *frames, config.num_workers, known, cached)
    found = {os.path.abspath(path): record for path, record in good.items()}
    if is_main() and not found.items() <= known.items() and (not bad or config.skip_unreadable):
        write_scan(file, found)  # an error would be the end of this run: nothing is to be left behind
    return identified(splits, {path: record["digest"] for path, record in good.items()}), bad


def without_unreadable(splits: Any, bad: dict[Path, str], config: Config) -> Any:
    """The splits without these videos. Raises UserError listing them unless --skip_unreadable True."""
    from VLoader import leave_out

    if bad and not config.skip_unreadable:
        causes = "; ".join([*bad.values()][:LISTED]) + (f"; and {len(bad) - LISTED} more" if len(bad) > LISTED else "")
        raise UserError(f"{causes} -- mend or remove them, or add --skip_unreadable True to leave them out")
    if bad:
        splits = leave_out(splits, bad)
        first = printable(splits.unreadable[0])
        print(f"left out {len(bad)} unreadable videos (listed in metrics.json at the end), first: {first}")
    return splits


def readable(splits: Any, config: Config, model: Any, accelerator: Any) -> tuple[Any, dict[str, Any] | None]:
    """(the splits with what can be read, the features of those that are read from the cache). Every video is
    tried once: those that go into the cache by computing their features, the others by the scan."""
    from feature_cache import cached_splits, fill, open_store, read_features, use_cache

    cached = cached_splits(config) if use_cache(model, config) else ()
    with accelerator.main_process_first():  # what one process found the others need not try
        splits, bad = scanned(splits, config, cached)
    if not cached:
        return without_unreadable(splits, bad, config), None
    with accelerator.main_process_first():
        store = open_store(model, config)
    sound = {name: [s for s in getattr(splits, name) if s.path not in bad] for name in cached}
    bad |= fill(store, model, replace(splits, **sound), config, accelerator)
    splits = without_unreadable(splits, bad, config)
    return splits, read_features(store, splits, config)


def write_preview(config: Config, model: Any, splits: Any, accelerator: Any, display: dict[str, str]) -> None:
    """A picture of the first training clips of the first epoch, as the model will see them."""
    from augment import Augment
    from figures import plot_clips
    from train_code import build_loaders, to_device

    loader, augment = build_loaders(model, config, splits)["train"], Augment(config.augment, config.flip)
    clips: list[tuple[Any, str]] = []
    for batch in loader:
        if batch is not None and len(clips) < config.preview:
            batch = augment(to_device(batch, accelerator.device))
            texts = clip_titles(batch, model, splits, display)
            clips += zip(batch["pixel_values"].cpu(), texts, strict=True)
        if len(clips) >= config.preview:
            break
    path = Path(config.output_dir) / f"preview_{run_name(config)}.png"
    make_folder(path.parent)
    plot_clips(clips[: config.preview], path)
    print(f"wrote {path}: {min(len(clips), config.preview)} training clips, {config.num_frames} frames each")


def clip_titles(batch: dict[str, Any], model: Any, splits: Any, display: dict[str, str]) -> list[str]:
    """Folder and file, label (of a mixed clip both, with their shares), and the text or caption that the model reads."""
    from figures import clip_name

    names = [display[name] for name in splits.class_names]
    titles = []
    for row, index in enumerate(batch["index"].tolist()):
        parts = [clip_name(splits.train[index].path)]
        if "labels" in batch:
            parts.append(names[batch["labels"][row]])
        if "mix" in batch:
            share = float(batch["mix"][row])
            parts[-1] = f"{share:.2f} {parts[-1]} + {1 - share:.2f} {names[batch['mixed_labels'][row]]}"
        if "input_ids" in batch:
            ids = batch["input_ids"][row][batch["attention_mask"][row] == 1]
            parts.append(repr(model.tokenizer.decode(ids, skip_special_tokens=True).strip()))
        titles.append("  |  ".join(parts))
    return titles


def print_examination(config: Config, model: Any, splits: Any, accelerator: Any) -> int:
    """The doctor's table; returns 1 if a check failed, else 0."""
    from doctor import examine, table
    from train_code import build_loaders

    print_towers(config, model)
    findings = examine(model, build_loaders(model, config, splits), splits, config, accelerator.device)
    failed = sum(bool(f.advice) for f in findings)
    print(table(findings))
    print(f"{failed} of {len(findings)} checks failed" if failed else f"all {len(findings)} checks passed")
    return int(failed > 0)


def body(argv: list[str] | None) -> int:
    config, typed = parse(argv, "main")
    if config.evaluate is not None:
        return evaluate_run(config, typed)
    if config.doctor or config.preview:
        return run(config, None)
    from checkpoint import claimed_run

    with claimed_run(config, typed, is_main()) as (run_dir, config):
        return run(config, run_dir)


def run(config: Config, run_dir: Path | None) -> int:
    """Trains into `run_dir`, or with --doctor or --preview only looks; returns the exit status."""
    from accelerate.utils import set_seed

    from build_model import build_model
    from train_code import build_accelerator
    from VLoader import check_samples, read_display_names, read_splits

    data_dir = Path(config.data_dir)
    splits = read_splits(data_dir)
    check_samples(splits, config.captioning, config.use_text)
    accelerator = build_accelerator(config)
    set_seed(config.seed)
    model = build_model(config, len(splits.class_names))
    config = resolve(config, model)
    if config.doctor:
        return print_examination(config, model, splits, accelerator)
    display = read_display_names(data_dir, splits.class_names)
    if config.preview:
        write_preview(config, model, splits, accelerator, display)
        return 0
    print_towers(config, model)
    print_hints(config, splits)
    splits, features = readable(splits, config, model, accelerator)
    prepare_folder(run_dir, config, model, splits, display, accelerator)
    if accelerator.process_index > 0:
        set_seed(config.seed + accelerator.process_index)  # other dropout than the first process's
    sizes = ", ".join(f"{len(getattr(splits, name))} {name}" for name in ("train", "val", "test"))
    print(f"data: {sizes} videos, {len(splits.class_names)} classes in {data_dir}")
    if splits.note:
        print(splits.note)
    if note := model.cut_note([*splits.train, *splits.val, *splits.test]):
        print(note)
    print_settings(config, model, accelerator)
    return train_run(config, model, splits, features, display, accelerator, run_dir)


def prepare_folder(
    run_dir: Path, config: Config, model: Any, splits: Any, display: dict[str, str], accelerator: Any
) -> None:
    """Writes what does not change while a new run trains; compares it where a run is resumed."""
    from checkpoint import check_same, clear_run, describe_run, start_run
    from VLoader import fingerprint_data

    data = fingerprint_data(splits, Path(config.data_dir))
    if config.resume:
        check_same(run_dir, model, data)
    elif accelerator.is_main_process:
        clear_run(run_dir, config)
        start_run(run_dir, model, config, describe_run(model, config, splits.class_names, display, data))


def is_main() -> bool:
    """Whether this is the only process or the first that torchrun started."""
    return int(os.environ.get("RANK", 0)) == 0


def main(argv: list[str] | None = None) -> int:
    if is_main():
        return run_script(body, argv)
    os.environ["TQDM_DISABLE"] = "1"  # one process speaks
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        return run_script(body, argv)


if __name__ == "__main__":
    leave(main())
