"""Saves a run, finds it again, and rebuilds its model from the folder alone.

    checkpoints/<run>/model.safetensors   exactly the trained tensors; epoch, step and val loss in the header
                      config.yaml         every option
                      metadata.json       task, classes, backbones with fingerprints, preprocessing, versions
                      vision/ language/   configuration and tokenizer of a backbone that was trained in full
                      log.jsonl metrics.json predictions_{val,test}.jsonl *.png
                      state/              what --resume needs, until the run is finished

Loading is strict: a missing tensor is an error, and so is a surplus one. No pickle is ever read.
"""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Generator, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from build_model import VideoModel, build_model, trained_tensors
from config import FIELDS, ROOT, Config, as_flags, options_with, read_yaml, run_name, training_mode, write_yaml
from extras.reject import rule_problem
from pretrained import Source, licence_of, locate, read_config
from script import (
    FileLock,
    UserError,
    counted,
    is_temporary,
    make_folder,
    remove_leftovers,
    replace_file,
    shown,
    temporary,
    write_json,
)
from vision import read_vision_config, vision_preprocessor

FORMAT_VERSION = 1  # of metadata.json; raise it when older programs could no longer load a run
WEIGHTS, CONFIG_YAML, METADATA = "model.safetensors", "config.yaml", "metadata.json"
METRICS, LOCK = "metrics.json", ".lock"
STATE = Path("state") / "state.safetensors"
PICTURES = ["curves", "confusion", "classes", "reliability", "worst", "captions", "attributes", "occlusion", "risk"]
#: everything a run writes into its folder; --overwrite removes these and nothing else
RUN_FILES = {WEIGHTS, CONFIG_YAML, METADATA, METRICS, "log.jsonl", "predictions_val.jsonl", "predictions_test.jsonl"}
RUN_FILES |= {"sweep.csv", "sweep.json"}
RUN_FILES |= {"state", "vision", "language", "tensorboard", "CARD.md", *(f"{name}.png" for name in PICTURES)}
PROVIDED = ROOT / "checkpoints" / "provided"


# -- a run's folder ---------------------------------------------------------------------------------


@contextmanager
def claimed_run(config: Config, typed_flags: Set[str], first: bool) -> Generator[tuple[Path, Config]]:
    """Yields the folder and the options of a new run, or with --resume of the run to continue.

    Until the end of the block this process holds a lock on the folder; of several processes, only the `first` does.
    The options are written at once, so that a run can be resumed whenever it is killed. A new run that ends before
    write_run_files() leaves nothing behind.

    Raises UserError if another process uses the folder, or if it holds anything but a run.
    """
    # refuse folders in which no run may be written
    run_dir = Path(config.output_dir) / run_name(config)
    if run_dir.resolve().is_relative_to(PROVIDED.resolve()):
        raise UserError(f"{PROVIDED} holds the provided checkpoints and is read-only; choose another --output_dir")
    if config.resume and not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a vidtune run: there is no such folder")
    if not first:
        yield run_dir, resumed_options(run_dir, config, typed_flags) if config.resume else config
        return

    # a new folder appears together with its lock and options; an existing one is locked before it is read
    new_parent = not run_dir.parent.exists()
    lock, fresh = lock_run(run_dir, None if config.resume else config), False

    # from here on no other process writes, so what is in the folder can be checked
    try:
        if config.resume:
            config = resumed_options(run_dir, config, typed_flags)
            remove_leftovers(run_dir, owned=True)
        else:
            fresh = check_free(run_dir, config.overwrite)
            if fresh:
                replace_file(run_dir / CONFIG_YAML, lambda p: write_yaml(asdict(config), p))
        remove_leftovers(run_dir.parent)
        yield run_dir, config

    # a run that fails before it starts, for example because there is no data, leaves no folder
    finally:
        unused = fresh and not (run_dir / METADATA).exists()
        if unused:
            clear_run(run_dir)
        lock.release()
        with suppress(OSError):  # it is a link, or another process has claimed it by now
            if unused:
                run_dir.rmdir()
                if new_parent:
                    run_dir.parent.rmdir()


def lock_run(run_dir: Path, config: Config | None = None) -> FileLock:
    """Locks a run's folder. If there is none, makes it first, with the options of the new run in it.

    Raises UserError naming the process that holds the lock.
    """
    # a new run's folder must never be seen without its options
    make_folder(run_dir.parent)
    if config is not None and not os.path.lexists(run_dir):
        lock = make_run(run_dir, config)
        if lock is not None:  # else another process was faster
            return lock

    # the process that held the lock may remove the folder between our two steps: try again
    for _ in range(100):
        make_folder(run_dir)
        try:
            return FileLock(run_dir / LOCK, str(run_dir))
        except FileNotFoundError:
            continue
    raise UserError(f"cannot lock {run_dir}: the folder keeps disappearing")


def make_run(run_dir: Path, config: Config) -> FileLock | None:
    """Makes a new run's folder under a temporary name and renames it, so that it appears locked and with its options.
    Returns None if another process was faster."""
    folder = temporary(run_dir)
    make_folder(folder)
    try:
        write_yaml(asdict(config), folder / CONFIG_YAML)
        lock = FileLock(folder / LOCK, str(run_dir))
        try:
            lock.move_with(folder, run_dir)
        except OSError:
            lock.release()
            return None
        return lock
    except OSError as error:  # a full disk
        raise UserError(f"cannot write {run_dir}: {error.strerror}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_free(run_dir: Path, overwrite: bool) -> bool:
    """Whether the folder is free for a new run; False if it holds a run that --overwrite replaces.

    Raises UserError if it holds a run that may not be replaced, or anything else.
    """
    if (run_dir / METADATA).exists():
        read_run(run_dir)
        if not overwrite:
            raise UserError(
                f"the run {run_dir} already exists: add --resume True to continue it, --overwrite True to replace it, "
                "or --run_name <another name>"
            )
        return False
    if not is_unstarted(run_dir):
        raise UserError(f"{run_dir} is not empty and not a vidtune run; choose another --run_name")
    return True


def is_unstarted(run_dir: Path) -> bool:
    """Whether the folder is empty, or was left by a run that was killed before it had written metadata.json."""
    # config.yaml alone is not enough: it is a common name in other people's folders
    names = {p.name for p in run_dir.iterdir() if p.name != LOCK and not is_temporary(p)}
    if not names:
        return True
    if CONFIG_YAML not in names or foreign_files(run_dir):
        return False
    with suppress(UserError):
        # a run writes every option; a shorter file is the user's own, perhaps the very one named by --config
        return read_yaml(run_dir / CONFIG_YAML).keys() == FIELDS.keys()
    return False


def foreign_files(run_dir: Path) -> list[Path]:
    """Files in a run's folder that no run writes. The user put them there, so they are never removed."""
    own = RUN_FILES | {LOCK}
    return [p for p in run_dir.iterdir() if p.name not in own and not p.match("evaluation_*") and not is_temporary(p)]


def clear_run(run_dir: Path, config: Config | None = None) -> None:
    """Removes what a run writes, and nothing else. With `config`, the options of a new run replace the old ones."""
    # metadata.json goes first: if this is killed, what remains is not taken for a run
    (run_dir / METADATA).unlink(missing_ok=True)
    if config is not None:
        replace_file(run_dir / CONFIG_YAML, lambda p: write_yaml(asdict(config), p))
    foreign = foreign_files(run_dir)
    for path in run_dir.iterdir():
        if path.name == LOCK or path in foreign or (path.name == CONFIG_YAML and config is not None):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def finish_run(run_dir: Path, metrics: dict[str, Any], thresholds: dict[str, float] | None = None) -> None:
    """Writes metrics.json, which marks a run as finished, and removes what --resume needs. The `thresholds` that were
    chosen on val go to metadata.json, since they belong to the model."""
    if thresholds is not None:
        write_json(read_run(run_dir)[1] | {"thresholds": thresholds}, run_dir / METADATA)
    # in this order: a kill in between leaves a finished run with leftover files, which --resume removes
    write_json(metrics, run_dir / METRICS)
    shutil.rmtree(run_dir / STATE.parent, ignore_errors=True)


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """The contents of a run's metrics.json; {} if its training is not finished."""
    file = run_dir / METRICS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


# -- saving -----------------------------------------------------------------------------------------


def git_commit() -> str | None:
    """The commit that this program runs from, or None if it is not a git checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def portable(path: str) -> str:
    """Makes a path inside this repository relative to it, so that a checkpoint loads elsewhere; leaves others as is."""
    return Path(path).relative_to(ROOT).as_posix() if Path(path).is_relative_to(ROOT) else path


def run_metadata(
    model: VideoModel, config: Config, class_names: list[str], display_names: dict[str, str], data: str
) -> dict[str, Any]:
    """The contents of metadata.json; `data` is the fingerprint of the training data."""
    # fingerprints of the backbones, so that a checkpoint is never loaded onto other weights
    modes = training_mode(config)
    backbones = {
        name: {
            "source": portable(source.path),
            "revision": source.revision,
            "licence": licence_of(source),
            "fingerprint": source.fingerprint,
            "in_checkpoint": modes[name] == "full",
        }
        for name, source in model.sources.items()
    }

    # the first group rebuilds the model; versions and commit tell a person where it comes from
    return {
        "format_version": FORMAT_VERSION,
        "task": model.task,
        "class_names": class_names,
        "display_names": display_names,
        "data": data,
        "backbones": backbones,
        "preprocessing": asdict(model.vision_encoder.preprocessing),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "commit": git_commit(),
    }


def write_run_files(run_dir: Path, model: VideoModel, config: Config, metadata: dict[str, Any]) -> None:
    """Writes the files that do not change while the run trains."""
    for name, mode in training_mode(config).items():
        if mode == "full":
            save_backbone_files(model, name, run_dir / name)
    replace_file(run_dir / CONFIG_YAML, lambda p: write_yaml(asdict(config), p))
    write_json(metadata, run_dir / METADATA)


def write_rule(run_dir: Path, rule: dict[str, Any] | None) -> None:
    """Writes the rule that says when a run answers (reject.Rule; None: always) to its metadata.json. Does nothing in a
    folder that only has scores."""
    if (run_dir / METADATA).exists():
        metadata = json.loads((run_dir / METADATA).read_text(encoding="utf-8"))
        if metadata.pop("reject", None) != rule:
            write_json(metadata | ({"reject": rule} if rule else {}), run_dir / METADATA)


def save_backbone_files(model: VideoModel, name: str, folder: Path) -> None:
    """Writes what is needed to rebuild a backbone around the checkpoint's tensors: its published configuration, and its
    preprocessor or tokenizer. The backbone itself is then no longer needed."""
    source = model.sources[name]
    read_config(source).save_pretrained(folder)
    if name == "vision":
        write_json(vision_preprocessor(source, read_vision_config(source)), folder / "preprocessor_config.json")
    else:
        model.tokenizer.save_pretrained(folder)


def save_weights(run_dir: Path, model: VideoModel, header: dict[str, Any]) -> None:
    """Writes the trained tensors, with epoch, step and val loss in the file's header."""
    save_tensors({name: p.detach() for name, p in trained_tensors(model).items()}, header, run_dir / WEIGHTS)


def save_tensors(tensors: dict[str, torch.Tensor], header: dict[str, Any], file: Path) -> None:
    """Writes a safetensors file, with `header` (values that JSON can hold) and a digest of everything in its header."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    header = header | {"digest": tensor_digest(tensors, header)}
    text = {"facts": json.dumps(header)}  # one key only: the order of several would vary between equal runs
    replace_file(file, lambda p: save_file(tensors, str(p), metadata=text))


def tensor_digest(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> str:
    """Detects damage: 32 hex digits of the header and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# -- what --resume needs ----------------------------------------------------------------------------


def save_state(
    run_dir: Path,
    model: VideoModel,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    generators: dict[str, torch.Tensor],
) -> None:
    """Writes what load_state restores: trained tensors, optimizer state, the `generators` of all processes as
    random_states() gives them, and, in the file's header, `progress`."""
    # flat names, <kind>.<rest>, because a safetensors file holds nothing but named tensors
    tensors = {f"model.{name}": p.detach().cpu() for name, p in trained_tensors(model).items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value.detach().cpu() for name, value in slots.items()}
    tensors |= {f"rng.{name}": state for name, state in generators.items()}
    make_folder((run_dir / STATE).parent)
    save_tensors(tensors, progress, run_dir / STATE)


def random_states(process: int) -> dict[str, torch.Tensor]:
    """The random generators of this process, named <device>.<process>."""
    states = {f"cpu.{process}": torch.get_rng_state()}
    return states | ({f"cuda.{process}": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def load_state(
    run_dir: Path, model: VideoModel, optimizer: torch.optim.Optimizer, process: int = 0, processes: int = 1
) -> dict[str, Any]:
    """Restores what save_state wrote, with the random generator of this `process`, and returns the progress.

    Raises UserError if the file is damaged, belongs to another model, or was written by another number of processes.
    """
    # sort the tensors by kind: model.*, optimizer.<index>.<slot>, rng.<device>.<process>
    file = run_dir / STATE
    tensors, progress = read_tensors(file)
    kinds: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}, "rng": {}}
    try:
        for name, tensor in tensors.items():
            kind, rest = name.split(".", 1)
            kinds[kind][rest] = tensor
        copy_tensors(model, kinds["model"], file)
        load_optimizer(optimizer, kinds["optimizer"])

        # every process has its own stream of random numbers and continues it
        generators = kinds["rng"]
        if (used := sum(name.startswith("cpu.") for name in generators)) != processes:
            raise UserError(f"{run_dir} used {counted(used, 'process', 'processes')}; resume it with the same number")
        torch.set_rng_state(generators[f"cpu.{process}"])
        if f"cuda.{process}" in generators and torch.cuda.is_available():
            torch.cuda.set_rng_state(generators[f"cuda.{process}"])
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{file} does not hold a state of this run: {' '.join(str(error).split())}") from None
    return progress


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restores the optimizer's tensors, named <index of the parameter>.<slot>. Raises ValueError unless each fits its
    parameter, which torch would not check."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, slot = name.split(".")
        if int(index) >= len(parameters) or (slot != "step" and tensor.shape != parameters[int(index)].shape):
            raise ValueError(f"optimizer.{name} does not fit a parameter")
        slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})


def resumed_options(run_dir: Path, config: Config, typed_flags: Set[str]) -> Config:
    """The options of the run to resume, changed by the typed ones that may change at resume. Their `resume` is False if
    the run was killed before it started to train.

    Raises UserError if there is no such run, it is finished, or a typed option contradicts it.
    """
    # a run that was killed before it had metadata.json starts from the beginning, with its own options
    started = (run_dir / METADATA).exists()
    if not started and not (is_unstarted(run_dir) and (run_dir / CONFIG_YAML).exists()):
        raise UserError(f"{run_dir} is not a vidtune run: it has no {METADATA}")
    saved = read_run(run_dir)[0] if started else Config(**read_yaml(run_dir / CONFIG_YAML))
    if (run_dir / METRICS).is_file() and started:
        if (run_dir / LOCK).exists():  # we hold the lock: remove what a kill at the very end may have left
            shutil.rmtree(run_dir / STATE.parent, ignore_errors=True)
            remove_leftovers(run_dir, owned=True)
        raise UserError(f"{run_dir} is finished: nothing to resume; --overwrite True trains it again")

    # machine and folders may change, but nothing that changes what is computed
    may_change = {*options_with("free_at_resume")}
    if wrong := contradictions(config, typed_flags - may_change, saved):
        raise UserError(f"{run_dir} was started with other options: {wrong}; leave these flags out")
    return replace(saved, **{n: getattr(config, n) for n in may_change & typed_flags} | {"resume": started})


def contradictions(config: Config, names: Set[str], saved: Config) -> str:
    """Lists those of the named options whose values differ from the run's own."""
    if saved.captioning:
        names = names - {"use_text"}  # it has no effect on captioners
    values = [(name, getattr(config, name), getattr(saved, name)) for name in sorted(names)]
    return ", ".join(f"--{name} {value} (it has {own})" for name, value, own in values if value not in (own, "auto"))


def check_same(run_dir: Path, model: VideoModel, data: str) -> None:
    """Raises UserError unless the run to resume was started with the same data, preprocessing and backbones."""
    _, metadata = read_run(run_dir)
    check_preprocessing(run_dir, metadata, model)
    if metadata["data"][:32] != data[:32]:
        raise UserError(f"the videos, labels or captions have changed since {run_dir} was started; restore them")
    if metadata["data"] not in (data, data[:32]):  # earlier versions did not compare contents
        raise UserError(f"the content of a video has changed since {run_dir} was started; restore it")
    check_fingerprints(run_dir, metadata, model.sources)


def check_fingerprints(run_dir: Path, metadata: dict[str, Any], sources: dict[str, Source]) -> None:
    """Raises UserError if a backbone's weights differ from those in training: adapters and heads would not fit them."""
    for name, source in sources.items():
        if source.fingerprint != metadata["backbones"][name]["fingerprint"]:
            raise UserError(
                f"{run_dir} was trained with a {name} backbone whose weights differ from those in {source.path}; "
                f"pass the folder of the right one with --{name}_model"
            )


def check_preprocessing(run_dir: Path, metadata: dict[str, Any], model: VideoModel) -> None:
    """Raises UserError unless clips are preprocessed as in training."""
    # through JSON and back, because metadata.json holds lists where the object has tuples
    used = json.loads(json.dumps(asdict(model.vision_encoder.preprocessing)))
    wrong = [name for name, value in used.items() if metadata["preprocessing"].get(name) != value]
    if wrong:
        raise UserError(
            f"{run_dir} was trained with {wrong[0]} {shown(metadata['preprocessing'].get(wrong[0]))}, but "
            f"{model.sources['vision'].path}/preprocessor_config.json gives {shown(used[wrong[0]])}"
        )


# -- loading ----------------------------------------------------------------------------------------


def load_weights(run_dir: Path, model: VideoModel) -> dict[str, Any]:
    """Copies the checkpoint's tensors into the model and returns the header saved with them. Raises UserError if the
    file is missing or damaged, or does not hold exactly the model's trained tensors."""
    file = run_dir / WEIGHTS
    if not file.exists():
        raise UserError(f"{run_dir} has no {WEIGHTS}: training stopped before the first epoch ended")
    tensors, header = read_tensors(file)
    copy_tensors(model, tensors, file)
    return header


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the header that save_tensors wrote. Raises UserError if the file is incomplete or does not match
    its digest. Files of earlier versions have no digest."""
    if not file.is_file():  # opening a named pipe would wait for its writer
        raise UserError(f"{file} is not a file")
    try:
        with safe_open(str(file), framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, not a dict
            texts = stored.metadata() or {}
        # earlier versions wrote the header of a state under "progress"
        header = json.loads(texts.get("facts") or texts.get("progress") or "{}")
        digest = header.pop("digest", None)
    except (SafetensorError, OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is not a complete safetensors file: {error}") from None
    if digest is not None and digest != tensor_digest(tensors, header):
        raise UserError(f"{file} is damaged: its contents do not match its digest")
    return tensors, header


def copy_tensors(model: VideoModel, tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Copies tensors into the model. Raises UserError unless they are exactly the trained ones, in name and shape."""
    # find all differences before anything is changed
    trained = trained_tensors(model)
    differences = [f"missing {n}" for n in trained.keys() - tensors.keys()]
    differences += [f"unexpected {n}" for n in tensors.keys() - trained.keys()]
    for name in trained.keys() & tensors.keys():
        if tensors[name].shape != trained[name].shape:
            differences.append(f"{name} is {list(tensors[name].shape)}, not {list(trained[name].shape)}")
    if differences:
        first = "; ".join(sorted(differences)[:4])  # there may be hundreds
        raise UserError(f"{file} does not fit the model ({counted(len(differences), 'tensor')}): {first}")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])


def read_run(run_dir: Path) -> tuple[Config, dict[str, Any]]:
    """A run's options and metadata. Raises UserError if the folder is not a run, is damaged, or has another format."""
    if not os.path.isdir(run_dir):
        raise UserError(f"{run_dir} is not a vidtune run: there is no such folder")
    try:
        metadata = json.loads((run_dir / METADATA).read_text(encoding="utf-8"))
        format_version = metadata["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{run_dir} is not a vidtune run: {METADATA} is missing or unreadable") from None
    if format_version != FORMAT_VERSION:
        raise UserError(f"{run_dir} has checkpoint format {shown(format_version)}; this program reads {FORMAT_VERSION}")
    values = read_yaml(run_dir / CONFIG_YAML)
    if values.get("head", "auto") == "auto":
        values["head"] = "linear"  # runs of earlier versions, which had no other or did not fill it in
    values = {"frame_stride": 0, "multi_label": "False"} | values  # what earlier versions did
    config = Config(**values)
    if problem := metadata_problem(metadata, {*training_mode(config)}):
        raise UserError(f"{run_dir / METADATA} is damaged: {problem}")
    return config, metadata


def metadata_problem(metadata: dict[str, Any], parts: set[str]) -> str:
    """What is wrong with the contents of a metadata.json, or "". `parts` are the backbones that the run must have.

    Checked here once, so that all code after it can rely on the types.
    """
    # task, data, preprocessing, classes
    names, display_names, backbones = (metadata.get(key) for key in ("class_names", "display_names", "backbones"))
    if not isinstance(metadata.get("task"), str) or not isinstance(metadata.get("data"), str):
        return "no task or data"
    if not isinstance(metadata.get("preprocessing"), dict):
        return "no preprocessing"
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return "class_names is not a list of names"
    if not isinstance(display_names, dict) or not all(isinstance(display_names.get(name), str) for name in names):
        return "a class has no display name"

    thresholds = metadata.get("thresholds", dict.fromkeys(names, 0.5))
    if not isinstance(thresholds, dict) or not all(isinstance(thresholds.get(n), int | float) for n in names):
        return "a class has no threshold"

    # a missing fingerprint would let any weights pass
    if not isinstance(backbones, dict) or backbones.keys() != parts:
        return f"backbones are not {' and '.join(sorted(parts))}"
    for name, backbone in backbones.items():
        if not isinstance(backbone, dict) or not isinstance(backbone.get("in_checkpoint"), bool):
            return f"the {name} backbone is not described"
        if not isinstance(backbone.get("fingerprint"), str) or not backbone["fingerprint"]:
            return f"the {name} backbone has no fingerprint"
    return rule_problem(metadata["reject"]) if "reject" in metadata else ""


def find_run(config: Config) -> Path:
    """The folder of the run to use: --checkpoint, or the run that the flags name, or the provided run of that name.

    Raises UserError listing the existing runs if there is no such run.
    """
    # the user's own run comes first; a provided one is used only if there is none, and never silently
    if config.checkpoint is not None:
        return Path(config.checkpoint)
    name = run_name(config)
    run_dir, provided = Path(config.output_dir) / name, PROVIDED / name
    if run_dir.is_dir():
        return run_dir
    if provided.is_dir():
        print(f"{run_dir} does not exist: using the provided checkpoint {provided}, trained on synthetic shapes only")
        return provided

    # most likely one of the flags differs: show the commands for the existing runs
    runs = list_runs(Path(config.output_dir)) + list_runs(PROVIDED)
    message = f"there is no run {run_dir}; to train it: python main.py {as_flags(config)}".rstrip()
    if not runs:
        raise UserError(message, [f"there are no runs in {config.output_dir}/ yet"])
    commands = [f"  {path}: python inference.py {as_flags(c)} --video_dir ..." for path, c in runs]
    raise UserError(message, ["existing runs:", *commands])


def list_runs(folder: Path) -> list[tuple[Path, Config]]:
    """Every readable run directly below a folder."""
    runs = []
    for path in sorted(folder.glob(f"*/{METADATA}")):
        with suppress(UserError):
            runs.append((path.parent, read_run(path.parent)[0]))
    return runs


def check_weights(model: VideoModel) -> None:
    """Raises UserError if a weight is not a finite number."""
    for name, parameter in model.named_parameters():
        if not all(extreme.isfinite() for extreme in parameter.detach().aminmax()):  # a NaN would be both extremes
            raise UserError(f"the weights are damaged: {name} holds numbers that are not finite; train the run again")


def load_run(
    run_dir: Path, config: Config = Config(), typed_flags: Set[str] = frozenset()
) -> tuple[VideoModel, Config, dict[str, Any]]:
    """Loads a run: the model in eval mode, its options, its metadata.

    The run's own options decide what the model is. `config` adds the options that inference reads, and the folders of
    backbones that were moved since.

    Raises UserError if the folder is not a run, a typed flag contradicts it, backbones or tensors are not the run's, or
    a weight is not a finite number.
    """
    # a moved backbone may be anywhere: its fingerprint is compared below
    saved, metadata = read_run(run_dir)
    own_options = {*options_with("names_run")}
    options = {part: f"{part}_model" for part in metadata["backbones"]}
    moved = {option for option in options.values() if option in typed_flags and Path(getattr(config, option)).is_dir()}
    if wrong := contradictions(config, typed_flags & own_options - moved, saved):
        raise UserError(f"{run_dir} was trained with other flags: {wrong}; leave these flags out")

    # where each backbone is now: in the run's own folder if it was trained in full, else where its name leads
    sources = {}
    for part, option in options.items():
        backbone = metadata["backbones"][part]
        if backbone["in_checkpoint"]:
            sources[part] = Source(str(run_dir / part), weights=False, fingerprint=backbone["fingerprint"])
        elif option in moved:
            sources[part] = Source(getattr(config, option))
        else:
            sources[part] = locate(getattr(saved, option), saved.weights)

    # rebuild the model, check that it is the one that was trained, then load the trained tensors
    model = build_model(saved, len(metadata["class_names"]), sources)
    check_fingerprints(run_dir, metadata, sources)
    check_preprocessing(run_dir, metadata, model)
    load_weights(run_dir, model)
    check_weights(model)
    model.thresholds = metadata.get("thresholds")
    of_inference = {name for name, f in FIELDS.items() if "inference" in f.metadata["scripts"]} - own_options
    return model.eval(), replace(saved, **{name: getattr(config, name) for name in of_inference}), metadata
