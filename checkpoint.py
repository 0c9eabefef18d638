"""Saves a run, finds it again, and rebuilds its model from the folder alone.

    checkpoints/<run>/model.safetensors   exactly the trained tensors (its header: epoch, step, val metrics)
                      config.yaml         every option, resolved
                      metadata.json       task, classes, backbones with fingerprints, preprocessing, versions
                      vision/ language/   configuration and tokenizer of a tower that was trained in full
                      log.jsonl metrics.json predictions_{val,test}.jsonl *.png
                      state/                what --resume needs, until the run is finished

Loading is strict both ways, and no pickle is ever read.
"""

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Set
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from build_model import (
    Source,
    VideoModel,
    adapters,
    build_model,
    fully_trained,
    load_preprocessor,
    locate,
    lora_settings,
    merge_adapters,
    read_config,
    tower_body,
    trained_tensors,
)
from config import FIELDS, NAMING, ROOT, Config, as_flags, read_yaml, run_name, write_yaml
from script import UserError, make_folder, remove_leftovers, replace_file, write_json
from VLoader import Record

FORMAT_VERSION = 1
WEIGHTS, SETTINGS, METADATA = "model.safetensors", "config.yaml", "metadata.json"
STATE = Path("state") / "state.safetensors"
PROVIDED = ROOT / "checkpoints" / "provided"


# -- saving -----------------------------------------------------------------------------------------


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """A run's metrics.json; {} where its training is not finished."""
    file = run_dir / "metrics.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def free_run_dir(config: Config) -> Path:
    """Where a new run is to lie. Raises UserError if the run exists and --overwrite is not given."""
    run_dir = Path(config.output_dir) / run_name(config)
    if run_dir.resolve().is_relative_to(PROVIDED.resolve()):
        raise UserError(f"{PROVIDED} holds the provided checkpoints and is never written; choose another --output_dir")
    if run_dir.is_dir() and any(run_dir.iterdir()):
        if not (run_dir / METADATA).is_file():
            raise UserError(f"{run_dir} is not empty and no run of this program; choose another --run_name")
        if not config.overwrite:
            raise UserError(
                f"the run {run_dir} exists: add --resume True to go on with it, --overwrite True to replace it, "
                "or --run_name <another name>"
            )
    return run_dir


def make_run_dir(run_dir: Path) -> None:
    """An empty folder for a new run; an earlier run in it is removed."""
    if run_dir.is_dir():
        shutil.rmtree(run_dir)
    make_folder(run_dir)


def git_commit() -> str | None:
    """This program's commit, if it lies in a git checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def portable(path: str) -> str:
    """A path in this repository relative to it, any other as it is."""
    place = Path(path)
    return place.relative_to(ROOT).as_posix() if place.is_relative_to(ROOT) else path


def describe_run(
    model: VideoModel, config: Config, class_names: list[str], display: dict[str, str], data: str
) -> dict[str, Any]:
    """metadata.json: what the run is, in readable form; `data` identifies what it was trained on."""
    whole = fully_trained(config)
    backbones = {
        name: {"source": portable(source.path), "revision": source.revision, "fingerprint": source.fingerprint, "in_checkpoint": whole[name]}
        for name, source in model.sources.items()
    }  # fmt: skip
    return {
        "format_version": FORMAT_VERSION,
        "task": model.task,
        "class_names": class_names,
        "display_names": display,
        "data": data,
        "backbones": backbones,
        "preprocessing": asdict(model.vision_encoder.preprocessing),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "commit": git_commit(),
    }


def start_run(run_dir: Path, model: VideoModel, config: Config, metadata: dict[str, Any]) -> None:
    """Writes all that does not change while the run trains."""
    for name, whole in fully_trained(config).items():
        if whole and name in model.sources:
            save_tower_files(model, name, run_dir / name)
    replace_file(run_dir / SETTINGS, lambda p: write_yaml(asdict(config), p))
    write_json(metadata, run_dir / METADATA)


def save_tower_files(model: VideoModel, name: str, folder: Path) -> None:
    """What rebuilds a tower around the checkpoint's tensors: its published configuration, and its
    preprocessor or tokenizer."""
    source = model.sources[name]
    settings = read_config(source)
    settings.save_pretrained(folder)
    if name == "vision":
        values = load_preprocessor(source, settings.model_type)
        write_json(values, folder / "preprocessor_config.json")
    else:
        model.tokenizer.save_pretrained(folder)


def save_weights(run_dir: Path, model: VideoModel, facts: dict[str, Any]) -> None:
    """Writes the trained tensors, with `facts` (epoch, step, metrics) in the file's header."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in trained_tensors(model).items()}
    header = {"facts": json.dumps(facts)}  # one key: with two, equal runs could differ in their order
    replace_file(run_dir / WEIGHTS, lambda p: save_file(tensors, str(p), metadata=header))


def read_scan(file: Path) -> dict[str, Record]:
    """What earlier scans found, by absolute path; anything else that the file holds is passed over."""
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return {path: record for path, record in known.items() if is_record(record)} if isinstance(known, dict) else {}


def is_record(value: Any) -> bool:
    """Whether a value from a file is what a scan wrote of one video."""
    if not isinstance(value, dict) or value.keys() != {"stamp", "digest", "decoded"}:
        return False
    marks, decoded = (value["stamp"], value["digest"]), value["decoded"]
    sound = all(isinstance(mark, str) and re.fullmatch("[0-9a-f]{32}", mark) for mark in marks)
    return sound and isinstance(decoded, list) and all(isinstance(frames, str) for frames in decoded)


def write_scan(file: Path, found: dict[str, Record]) -> None:
    """Adds to what is remembered; other runs may have written since it was read."""
    make_folder(file.parent)
    remove_leftovers(file.parent)
    write_json(read_scan(file) | found, file)


# -- what --resume needs ----------------------------------------------------------------------------


def save_state(
    run_dir: Path, model: VideoModel, optimizer: torch.optim.Optimizer, progress: dict[str, Any], random: dict[int, torch.Tensor]
) -> None:  # fmt: skip
    """Trained tensors, optimizer and the state of every process's random generator in one file; `progress` (JSON)
    in its header."""
    tensors = {f"model.{name}": p.detach().cpu() for name, p in trained_tensors(model).items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value.detach().cpu() for name, value in slots.items()}
    tensors |= {f"rng.cpu.{process}": state for process, state in random.items()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    (run_dir / STATE).parent.mkdir(exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    replace_file(run_dir / STATE, lambda p: save_file(tensors, str(p), metadata={"progress": json.dumps(progress)}))


def load_state(run_dir: Path, model: VideoModel, optimizer: torch.optim.Optimizer, process: int = 0) -> dict[str, Any]:
    """Restores what save_state saved, with the random generator of this `process`, and returns the progress.

    Raises:
        UserError: there is nothing to resume, the file is damaged or another model's, or it was written by fewer
        processes.
    """
    file = run_dir / STATE
    if not file.is_file():
        raise UserError(f"{run_dir} was stopped before anything was saved: start it anew with --overwrite True")
    tensors, header = read_tensors(file)
    copy_tensors(model, {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}, file)
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".")
            slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
    if f"rng.cpu.{process}" not in tensors:
        raise UserError(f"{run_dir} was stopped with fewer processes; resume it with as many")
    torch.set_rng_state(tensors[f"rng.cpu.{process}"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return json.loads(header["progress"])


def resumable_run(config: Config, typed: Set[str]) -> tuple[Path, Config]:
    """The folder and options of the run to resume; machine options are taken from `config`.

    Raises:
        UserError: no such run, it is finished, or a typed option is not the run's own.
    """
    run_dir = Path(config.output_dir) / run_name(config)
    saved, _ = read_run(run_dir)
    if (run_dir / "metrics.json").is_file():
        raise UserError(f"{run_dir} is finished: nothing to resume; --overwrite True trains it anew")
    free = {
        "cache_dir",
        "controls",
        "data_dir",
        "device",
        "num_workers",
        "output_dir",
        "overwrite",
        "resume",
        "run_name",
        "save_every",
        "tensorboard",
    }
    wrong = [
        f"--{name} {getattr(config, name)} (it has {getattr(saved, name)})"
        for name in sorted(typed - free)
        if getattr(config, name) != getattr(saved, name) and not (name == "use_text" and saved.captioning)
    ]
    if wrong:
        raise UserError(f"{run_dir} was started with other options: {', '.join(wrong)}")
    for unfinished in run_dir.rglob("*.tmp"):  # what a killed process was writing
        unfinished.unlink(missing_ok=True)
    return run_dir, replace(saved, **{name: getattr(config, name) for name in free & typed})


def check_same(run_dir: Path, model: VideoModel, data: str) -> None:
    """Raises UserError unless a run to resume has the data and the backbones that it was started with."""
    _, metadata = read_run(run_dir)
    if metadata["data"][:32] != data[:32]:
        raise UserError(f"the videos, labels or captions are not those that {run_dir} was started with")
    if metadata["data"] not in (data, data[:32]):  # the short one was written before contents were compared
        raise UserError(f"the content of a video has changed, under the same name, since {run_dir} was started")
    check_fingerprints(run_dir, metadata, model.sources)


def check_fingerprints(run_dir: Path, metadata: dict[str, Any], sources: dict[str, Source]) -> None:
    for name, source in sources.items():
        if source.fingerprint != metadata["backbones"][name]["fingerprint"]:
            raise UserError(
                f"{run_dir} was trained on another {name} backbone than the one in {source.path}; "
                f"name the folder of the right one with --{name}_model"
            )


# -- loading ----------------------------------------------------------------------------------------


def load_weights(run_dir: Path, model: VideoModel) -> dict[str, Any]:
    """Copies the checkpoint's tensors into the model and returns the facts saved with them.

    Raises:
        UserError: the file is missing or damaged, or its tensors are not exactly the model's trained ones.
    """
    file = run_dir / WEIGHTS
    if not file.is_file():
        raise UserError(f"{run_dir} has no {WEIGHTS}: its training did not finish an epoch")
    tensors, header = read_tensors(file)
    copy_tensors(model, tensors, file)
    return json.loads(header.get("facts", "{}"))


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its header. Raises UserError if the file is damaged."""
    try:
        with safe_open(str(file), framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, no mapping
            return tensors, stored.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is no whole safetensors file: {error}") from None


def copy_tensors(model: VideoModel, tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Copies tensors into the model. Raises UserError unless they are exactly its trained ones."""
    wanted = trained_tensors(model)
    differences = [f"missing {n}" for n in wanted.keys() - tensors.keys()]
    differences += [f"unexpected {n}" for n in tensors.keys() - wanted.keys()]
    for name in wanted.keys() & tensors.keys():
        if tensors[name].shape != wanted[name].shape:
            differences.append(f"{name} is {list(tensors[name].shape)}, not {list(wanted[name].shape)}")
    if differences:
        shown = "; ".join(sorted(differences)[:4])
        raise UserError(f"{file} does not fit the model ({len(differences)} tensors): {shown}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


def read_run(run_dir: Path) -> tuple[Config, dict[str, Any]]:
    """A run's options and metadata. Raises UserError if the folder is no run or of a later format."""
    try:
        metadata = json.loads((run_dir / METADATA).read_text(encoding="utf-8"))
        version = metadata["format_version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{run_dir} is no run of this program: it has no readable {METADATA}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{run_dir} has checkpoint format {version}; this program reads {FORMAT_VERSION}")
    return Config(**read_yaml(run_dir / SETTINGS)), metadata


def list_runs(folder: Path) -> list[tuple[Path, Config]]:
    """Every readable run directly below a folder."""
    runs = []
    for path in sorted(folder.glob(f"*/{METADATA}")):
        try:
            runs.append((path.parent, read_run(path.parent)[0]))
        except UserError:
            continue
    return runs


def find_run(config: Config) -> Path:
    """The run's folder: --checkpoint, or the run that the flags name, or a provided one of that name.

    Raises UserError listing the runs there are if there is no such run.
    """
    if config.checkpoint is not None:
        return Path(config.checkpoint)
    name = run_name(config)
    run_dir = Path(config.output_dir) / name
    if run_dir.is_dir():
        return run_dir
    if (PROVIDED / name).is_dir():
        print(
            f"{run_dir} does not exist: using the provided checkpoint {PROVIDED / name}, which knows synthetic shapes only"
        )
        return PROVIDED / name
    runs = list_runs(Path(config.output_dir)) + list_runs(PROVIDED)
    lines = "".join(f"\n  {path}: python inference.py {as_flags(c)} --video_dir ..." for path, c in runs)
    raise UserError(
        f"no run {run_dir}; train it: python main.py {as_flags(config)}".rstrip()
        + (f"\nthe runs there are:{lines}" if runs else f"\nthere are no runs in {config.output_dir}/ yet")
    )


def check_typed(config: Config, typed: Set[str], saved: Config, run_dir: Path) -> None:
    """Raises UserError listing each typed flag that contradicts what the run was trained as."""
    wrong = []
    for name in NAMING:
        if name not in typed or (name == "use_text" and saved.captioning):
            continue
        mine, its = getattr(config, name), getattr(saved, name)
        moved = name in ("vision_model", "language_model") and Path(str(mine)).is_dir()  # its fingerprint decides
        if mine != its and not moved:
            wrong.append(f"--{name} {mine} (it has {its})")
    if wrong:
        raise UserError(f"{run_dir} was trained with other flags: {', '.join(wrong)}")


def tower_source(
    name: str, option: str, run_dir: Path, metadata: dict, config: Config, typed: Set[str], saved: Config
) -> Source:
    """Where a tower of a run comes from: the run's own folder, the named folder, or where it came from."""
    if metadata["backbones"][name]["in_checkpoint"]:
        return Source(str(run_dir / name), weights=False, fingerprint=metadata["backbones"][name]["fingerprint"])
    named = getattr(config, option)
    if option in typed and Path(str(named)).is_dir():
        return Source(named)
    return locate(getattr(saved, option), saved.weights)


def load_run(run_dir: Path, config: Config = Config(), typed: Set[str] = frozenset()) -> tuple[VideoModel, Config, dict[str, Any]]:  # fmt: skip
    """(model in eval mode, options, metadata) of a run.

    The run's options decide what the model is; `config` gives the inference and machine options, and
    the folder of a backbone that moved.

    Raises:
        UserError: no run, a contradicting flag, another backbone than it was trained on, other tensors.
    """
    saved, metadata = read_run(run_dir)
    check_typed(config, typed, saved, run_dir)
    sources = {
        name: tower_source(name, f"{name}_model", run_dir, metadata, config, typed, saved)
        for name in metadata["backbones"]
    }
    model = build_model(saved, len(metadata["class_names"]), sources.get("vision"), sources.get("language"))
    check_fingerprints(run_dir, metadata, sources)
    load_weights(run_dir, model)
    here = {n: getattr(config, n) for n, f in FIELDS.items() if f.metadata["group"] in ("inference", "run and machine")}
    return model.eval(), replace(saved, **here), metadata


# -- export -----------------------------------------------------------------------------------------


def export(run_dir: Path, model: VideoModel, config: Config, metadata: dict[str, Any], output: Path) -> float | None:
    """Writes a run for other programs: adapters as peft folders, a classifier as a merged Hugging Face folder.

        output/adapter_<tower>/   PeftModel.from_pretrained(AutoModel.from_pretrained(<backbone>), folder)
        output/                   AutoModelForVideoClassification.from_pretrained(output)

    Returns the largest difference between our logits and those of the reloaded folder, None if there is none.
    Changes the model: its adapters are merged.

    Raises:
        UserError: the output exists, or the run is of a kind that has nothing to export.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--export {output}: this folder exists already; choose another")
    lora = [name for name in model.sources if list(adapters(model.towers()[name]))]
    if config.use_vlm and not lora:
        raise UserError(f"--export: {run_dir} joins two models, which no Hugging Face class holds, and has no adapters")
    for name in lora:
        save_adapters(model, name, config, output / f"adapter_{name}")
    return None if config.use_vlm else export_classifier(model, metadata, output)


def save_adapters(model: VideoModel, name: str, config: Config, folder: Path) -> None:
    """A tower's adapters as a peft folder for the tower's AutoModel."""
    from peft import get_peft_model_state_dict

    body = tower_body(model.towers()[name])
    settings = lora_settings(body, config.lora_r)
    settings.base_model_name_or_path = model.sources[name].path
    settings.save_pretrained(folder)
    tensors = get_peft_model_state_dict(body)
    tensors = {f"base_model.model.{n}": t.detach().cpu().contiguous() for n, t in tensors.items()}
    replace_file(folder / "adapter_model.safetensors", lambda p: save_file(tensors, str(p), metadata={"format": "pt"}))


def export_classifier(model: VideoModel, metadata: dict[str, Any], output: Path) -> float:
    """The classifier as its published class, with adapters merged and the classes' names. Reloads and compares."""
    from transformers import AutoModelForVideoClassification

    vision = model.vision_encoder
    native_table = read_config(model.sources["vision"])
    own_size = (native_table.num_frames, native_table.image_size) == (
        vision.config.num_frames,
        vision.config.image_size,
    )
    if not vision.has_cls and not own_size:
        raise UserError(
            "--export: VideoMAE's class computes its position table and cannot hold the interpolated one of this run; "
            f"train with --num_frames {native_table.num_frames} --image_size {native_table.image_size} to export"
        )
    size = (2, vision.config.num_frames, 3, vision.config.image_size, vision.config.image_size)
    clips = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval()(clips)  # (2, K), through the adapters
    merge_adapters(model)
    names = [metadata["display_names"][name] for name in metadata["class_names"]]
    settings = copy.deepcopy(vision.config)
    settings.id2label, settings.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    native = AutoModelForVideoClassification.from_config(settings)
    native.base_model.load_state_dict(vision.backbone.state_dict())
    if vision.fc_norm is not None:
        native.fc_norm.load_state_dict(vision.fc_norm.state_dict())
    native.classifier.load_state_dict(model.head.state_dict())
    native.save_pretrained(output)
    write_json(vision.preprocessing.to_dict(), output / "preprocessor_config.json")
    reloaded = AutoModelForVideoClassification.from_pretrained(output).eval()
    with torch.no_grad():
        return float((reloaded(vision.preprocessing.normalise(clips)).logits - expected).abs().max())
