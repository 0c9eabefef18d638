"""Saves a run, finds it again, and rebuilds its model from the folder alone.

    checkpoints/<run>/model.safetensors   exactly the trained tensors; epoch, step and val loss in the header
                      config.yaml         every option
                      metadata.json       task, classes, backbones with fingerprints, preprocessing, versions
                      vision/ language/   configuration and tokenizer of a backbone that was trained in full
                      log.jsonl metrics.json predictions_{val,test}.jsonl *.png
                      state/              what --resume needs, until the run is finished

Loading is strict: no tensor may be missing, none may be left over. No pickle is ever read.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Generator, Set
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from build_model import VideoModel, build_model, trained_tensors
from config import FIELDS, ROOT, Config, as_flags, options_with, read_yaml, run_name, training_mode, write_yaml
from pretrained import Source, load_preprocessor, locate, read_config
from script import (
    FileLock,
    UserError,
    is_temporary,
    make_folder,
    remove_leftovers,
    replace_file,
    shown,
    temporary,
    write_json,
)

FORMAT_VERSION = 1
WEIGHTS, CONFIG_YAML, METADATA = "model.safetensors", "config.yaml", "metadata.json"
METRICS, LOCK = "metrics.json", ".lock"
STATE = Path("state") / "state.safetensors"
PICTURES = ["curves", "confusion", "classes", "reliability", "worst", "captions", "attributes", "occlusion"]
#: everything a run writes into its folder; --overwrite removes these and nothing else
RUN_FILES = {WEIGHTS, CONFIG_YAML, METADATA, METRICS, "log.jsonl", "predictions_val.jsonl", "predictions_test.jsonl"}
RUN_FILES |= {"state", "vision", "language", "tensorboard", "CARD.md", *(f"{name}.png" for name in PICTURES)}
PROVIDED = ROOT / "checkpoints" / "provided"


# -- a run's folder ---------------------------------------------------------------------------------


@contextmanager
def claimed_run(config: Config, typed: Set[str], first: bool) -> Generator[tuple[Path, Config]]:
    """(folder, options) of a new run, or with --resume of the run to continue. The folder belongs to this process until
    the end of the block. Of several processes, only the `first` takes the lock and writes.

    The options are written at once, so that a run can be resumed whenever it is killed. A new run that ends before
    write_run_files() leaves nothing behind.

    Raises UserError if another process has the folder, or if it holds something else.
    """
    run_dir = Path(config.output_dir) / run_name(config)
    if run_dir.resolve().is_relative_to(PROVIDED.resolve()):
        raise UserError(f"{PROVIDED} holds the provided checkpoints and is never written; choose another --output_dir")
    if config.resume and not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a vidtune run: there is no such folder")
    if not first:
        yield run_dir, resumed_options(run_dir, config, typed) if config.resume else config
        return
    # a new folder appears with lock and options in it; an existing one is locked before anybody looks inside
    new_parent = not run_dir.parent.exists()
    lock, fresh = lock_run(run_dir, None if config.resume else config), False

    # from here on nobody else writes: check what is in the folder
    try:
        if config.resume:
            config = resumed_options(run_dir, config, typed)
            remove_leftovers(run_dir, owned=True)
        else:
            fresh = check_free(run_dir, config.overwrite)
            if fresh:
                replace_file(run_dir / CONFIG_YAML, lambda p: write_yaml(asdict(config), p))
        remove_leftovers(run_dir.parent)
        yield run_dir, config

    # a run that failed before it started, say for want of data, leaves no folder
    finally:
        unused = fresh and not (run_dir / METADATA).exists()
        if unused:
            clear_run(run_dir)
        lock.release()
        with contextlib.suppress(OSError):  # it is a link, or another process has claimed it by now
            if unused:
                run_dir.rmdir()
                if new_parent:
                    run_dir.parent.rmdir()


def lock_run(run_dir: Path, config: Config | None = None) -> FileLock:
    """Locks the folder, and makes it if there is none, with the options of a new run in it. Raises UserError naming the
    process that has it."""
    make_folder(run_dir.parent)
    if config is not None and not os.path.lexists(run_dir):
        lock = make_run(run_dir, config)
        if lock is not None:  # else another process was faster
            return lock
    for _ in range(100):
        make_folder(run_dir)
        try:
            return FileLock(run_dir / LOCK, str(run_dir))
        except FileNotFoundError:  # its last owner has just removed the folder
            continue
    raise UserError(f"cannot lock {run_dir}: the folder keeps disappearing")


def make_run(run_dir: Path, config: Config) -> FileLock | None:
    """Makes a new run's folder, which appears locked and with the options. None if another process was faster."""
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
    """True if the folder is free, False if --overwrite replaces the run in it. Raises UserError if no new run may be
    written there."""
    if (run_dir / METADATA).exists():
        read_run(run_dir)
        if not overwrite:
            raise UserError(
                f"the run {run_dir} exists: add --resume True to continue it, --overwrite True to replace it, "
                "or --run_name <another name>"
            )
        return False
    if not is_unstarted(run_dir):
        raise UserError(f"{run_dir} is not empty and not a vidtune run; choose another --run_name")
    return True


def is_unstarted(run_dir: Path) -> bool:
    """Whether the folder is empty, or left by a run that was killed before it had a metadata.json."""
    names = {p.name for p in run_dir.iterdir() if p.name != LOCK and not is_temporary(p)}
    if not names or CONFIG_YAML not in names or foreign_files(run_dir):
        return not names
    with contextlib.suppress(UserError):
        # a run writes every option; a shorter file is the user's own, perhaps the very one named by --config
        return read_yaml(run_dir / CONFIG_YAML).keys() == FIELDS.keys()
    return False


def foreign_files(run_dir: Path) -> list[Path]:
    """Files in a run's folder that no run writes."""
    ours = RUN_FILES | {LOCK}
    return [p for p in run_dir.iterdir() if p.name not in ours and not p.match("evaluation_*") and not is_temporary(p)]


def clear_run(run_dir: Path, config: Config | None = None) -> None:
    """Removes what a run writes, and nothing else. The options of a new run replace the old ones."""
    (run_dir / METADATA).unlink(missing_ok=True)  # first: without it the rest is not a run, if this is killed
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


def finish_run(run_dir: Path, metrics: dict[str, Any]) -> None:
    """Writes metrics.json, which marks a run as finished, and removes what --resume needs."""
    write_json(metrics, run_dir / METRICS)
    shutil.rmtree(run_dir / STATE.parent, ignore_errors=True)


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """A run's metrics.json; {} while its training is not finished."""
    file = run_dir / METRICS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


# -- saving -----------------------------------------------------------------------------------------


def git_commit() -> str | None:
    """The commit of this program, if it is a git checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def portable(path: str) -> str:
    """A path inside this repository relative to it, any other unchanged."""
    return Path(path).relative_to(ROOT).as_posix() if Path(path).is_relative_to(ROOT) else path


def run_metadata(
    model: VideoModel, config: Config, class_names: list[str], display_names: dict[str, str], data: str
) -> dict[str, Any]:
    """The contents of metadata.json; `data` is the fingerprint of the training data."""
    # the fingerprint of each backbone, so that a checkpoint is never loaded onto other weights
    modes = training_mode(config)
    backbones = {
        name: {
            "source": portable(source.path),
            "revision": source.revision,
            "fingerprint": source.fingerprint,
            "in_checkpoint": modes[name] == "full",
        }
        for name, source in model.sources.items()
    }

    # what inference needs to rebuild the model, and what a person wants to know
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


def save_backbone_files(model: VideoModel, name: str, folder: Path) -> None:
    """Writes what rebuilds a backbone around the checkpoint's tensors: its published configuration, and its
    preprocessor or tokenizer."""
    source = model.sources[name]
    hf_config = read_config(source)
    hf_config.save_pretrained(folder)
    if name == "vision":
        write_json(load_preprocessor(source, hf_config.model_type), folder / "preprocessor_config.json")
    else:
        model.tokenizer.save_pretrained(folder)


def save_weights(run_dir: Path, model: VideoModel, facts: dict[str, Any]) -> None:
    """Writes the trained tensors, with `facts` (epoch, step, val loss) in the file's header."""
    save_tensors({name: p.detach() for name, p in trained_tensors(model).items()}, facts, run_dir / WEIGHTS)


def save_tensors(tensors: dict[str, torch.Tensor], facts: dict[str, Any], file: Path) -> None:
    """Writes a safetensors file with `facts` (JSON) and a digest of tensors and facts in its header."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    facts = facts | {"digest": tensor_digest(tensors, facts)}
    header = {"facts": json.dumps(facts)}  # a single key: the order of several would vary between equal runs
    replace_file(file, lambda p: save_file(tensors, str(p), metadata=header))


def tensor_digest(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> str:
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
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
    generators: dict[int, torch.Tensor],
) -> None:
    """Writes trained tensors, optimizer and every process's random generator to one file, `progress` to its header."""
    tensors = {f"model.{name}": p.detach().cpu() for name, p in trained_tensors(model).items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value.detach().cpu() for name, value in slots.items()}
    tensors |= {f"rng.cpu.{process}": state for process, state in generators.items()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    make_folder((run_dir / STATE).parent)
    save_tensors(tensors, progress, run_dir / STATE)


def load_state(
    run_dir: Path, model: VideoModel, optimizer: torch.optim.Optimizer, process: int = 0, processes: int = 1
) -> dict[str, Any]:
    """Restores what save_state wrote, with the random generator of this `process`, and returns the progress.

    Raises UserError if the file is damaged, belongs to another model, or was written by another number of processes.
    """
    # names are <kind>.<rest>: model.*, optimizer.<index>.<slot>, rng.cpu.<process>, rng.cuda
    file = run_dir / STATE
    tensors, progress = read_tensors(file)
    groups: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}, "rng": {}}
    try:
        for name, tensor in tensors.items():
            kind, rest = name.split(".", 1)
            groups[kind][rest] = tensor
        copy_tensors(model, groups["model"], file)
        load_optimizer(optimizer, groups["optimizer"])
        # each process continues its own stream of random numbers
        generators = {int(n.removeprefix("cpu.")): t for n, t in groups["rng"].items() if n.startswith("cpu.")}
        if len(generators) != processes:
            raise UserError(f"{run_dir} was stopped with {len(generators)} processes; resume it with as many")
        torch.set_rng_state(generators[process])
        if "cuda" in groups["rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(groups["rng"]["cuda"])
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{file} does not hold a state of this run: {' '.join(str(error).split())}") from None
    return progress


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restores the slots, named `<parameter's index>.<slot>`. Raises ValueError unless they fit the parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, slot = name.split(".")
        if int(index) >= len(parameters) or (slot != "step" and tensor.shape != parameters[int(index)].shape):
            raise ValueError(f"optimizer.{name} does not fit a parameter")
        slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})


def resumed_options(run_dir: Path, config: Config, typed: Set[str]) -> Config:
    """The options of the run to resume, with typed ones from `config` that may change. `resume` is False if the run was
    killed before it started to train.

    Raises UserError if there is no such run, it is finished, or a typed option contradicts the run's own.
    """
    # a run that was killed before metadata.json starts from the beginning, with its own options
    started = (run_dir / METADATA).exists()
    if not started and not (is_unstarted(run_dir) and (run_dir / CONFIG_YAML).exists()):
        raise UserError(f"{run_dir} is not a vidtune run: it has no {METADATA}")
    saved = read_run(run_dir)[0] if started else Config(**read_yaml(run_dir / CONFIG_YAML))
    if (run_dir / METRICS).is_file() and started:
        if (run_dir / LOCK).exists():  # it is ours: remove what a kill at the very end left
            shutil.rmtree(run_dir / STATE.parent, ignore_errors=True)
            remove_leftovers(run_dir, owned=True)
        raise UserError(f"{run_dir} is finished: nothing to resume; --overwrite True trains it again")

    # what is computed must not change; machine and folders may
    free = {*options_with("free_at_resume")}
    wrong = [
        f"--{name} {getattr(config, name)} (it has {getattr(saved, name)})"
        for name in sorted(typed - free)
        if getattr(config, name) not in (getattr(saved, name), "auto") and not (name == "use_text" and saved.captioning)
    ]
    if wrong:
        raise UserError(f"{run_dir} was started with other options: {', '.join(wrong)}")
    return replace(saved, **{n: getattr(config, n) for n in free & typed} | {"resume": started})


def check_same(run_dir: Path, model: VideoModel, data: str) -> None:
    """Raises UserError unless data and backbones are those that the run to resume was started with."""
    _, metadata = read_run(run_dir)
    check_preprocessing(run_dir, metadata, model)
    if metadata["data"][:32] != data[:32]:
        raise UserError(f"the videos, labels or captions are not those that {run_dir} was started with")
    if metadata["data"] not in (data, data[:32]):  # earlier versions did not compare contents
        raise UserError(f"the content of a video has changed, under the same name, since {run_dir} was started")
    check_fingerprints(run_dir, metadata, model.sources)


def check_fingerprints(run_dir: Path, metadata: dict[str, Any], sources: dict[str, Source]) -> None:
    for name, source in sources.items():
        if source.fingerprint != metadata["backbones"][name]["fingerprint"]:
            raise UserError(
                f"{run_dir} was trained on another {name} backbone than the one in {source.path}; "
                f"name the folder of the right one with --{name}_model"
            )


def check_preprocessing(run_dir: Path, metadata: dict[str, Any], model: VideoModel) -> None:
    """Raises UserError unless clips are preprocessed as in training."""
    used = json.loads(json.dumps(asdict(model.vision_encoder.preprocessing)))
    wrong = [name for name, value in used.items() if metadata["preprocessing"].get(name) != value]
    if wrong:
        raise UserError(
            f"{run_dir} was trained with another {wrong[0]} ({shown(metadata['preprocessing'].get(wrong[0]))}) than "
            f"{model.sources['vision'].path}/preprocessor_config.json gives ({shown(used[wrong[0]])})"
        )


# -- loading ----------------------------------------------------------------------------------------


def load_weights(run_dir: Path, model: VideoModel) -> dict[str, Any]:
    """Copies the checkpoint's tensors into the model and returns the facts saved with them. Raises UserError if the
    file is missing or damaged, or does not hold exactly the model's trained tensors."""
    file = run_dir / WEIGHTS
    if not file.exists():
        raise UserError(f"{run_dir} has no {WEIGHTS}: training stopped before the first epoch ended")
    tensors, facts = read_tensors(file)
    copy_tensors(model, tensors, file)
    return facts


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and facts of a file that save_tensors wrote. Raises UserError if it is incomplete or does not match
    its digest; files of earlier versions have no digest."""
    if not file.is_file():  # reading a FIFO would wait for its writer
        raise UserError(f"{file} is not a file")
    try:
        with safe_open(str(file), framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, no mapping
            header = stored.metadata() or {}
        facts = json.loads(
            header.get("facts") or header.get("progress") or "{}"
        )  # `progress`: states of earlier versions
        digest = facts.pop("digest", None)
    except (SafetensorError, OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is not a complete safetensors file: {error}") from None
    if digest is not None and digest != tensor_digest(tensors, facts):
        raise UserError(f"{file} is damaged: its contents do not match its digest")
    return tensors, facts


def copy_tensors(model: VideoModel, tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Copies tensors into the model. Raises UserError unless they are exactly its trained ones."""
    trained = trained_tensors(model)
    differences = [f"missing {n}" for n in trained.keys() - tensors.keys()]
    differences += [f"unexpected {n}" for n in tensors.keys() - trained.keys()]
    for name in trained.keys() & tensors.keys():
        if tensors[name].shape != trained[name].shape:
            differences.append(f"{name} is {list(tensors[name].shape)}, not {list(trained[name].shape)}")
    if differences:
        first = "; ".join(sorted(differences)[:4])
        raise UserError(f"{file} does not fit the model ({len(differences)} tensors): {first}")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])


def read_run(run_dir: Path) -> tuple[Config, dict[str, Any]]:
    """A run's options and metadata. Raises UserError if the folder is not a run, damaged, or of a later format."""
    try:
        metadata = json.loads((run_dir / METADATA).read_text(encoding="utf-8"))
        version = metadata["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{run_dir} is not a vidtune run: {METADATA} is missing or unreadable") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{run_dir} has checkpoint format {shown(version)}; this program reads {FORMAT_VERSION}")
    config = Config(**read_yaml(run_dir / CONFIG_YAML))
    if problem := metadata_problem(metadata, {*training_mode(config)}):
        raise UserError(f"{run_dir / METADATA} is damaged: {problem}")
    return config, metadata


def metadata_problem(metadata: dict[str, Any], parts: set[str]) -> str:
    """What is wrong with the contents of a metadata.json, "" if nothing; `parts` are the run's backbones."""
    names, display_names, backbones = (metadata.get(key) for key in ("class_names", "display_names", "backbones"))
    if not isinstance(metadata.get("task"), str) or not isinstance(metadata.get("data"), str):
        return "no task or data"
    if not isinstance(metadata.get("preprocessing"), dict):
        return "no preprocessing"
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return "class_names is not a list of names"
    if not isinstance(display_names, dict) or not all(isinstance(display_names.get(name), str) for name in names):
        return "a class has no display name"
    if not isinstance(backbones, dict) or backbones.keys() != parts:
        return f"backbones are not {' and '.join(sorted(parts))}"
    for name, backbone in backbones.items():
        if not isinstance(backbone, dict) or not isinstance(backbone.get("in_checkpoint"), bool):
            return f"the {name} backbone is not described"
        if not isinstance(backbone.get("fingerprint"), str) or not backbone["fingerprint"]:
            return f"the {name} backbone has no fingerprint"
    return ""


def find_run(config: Config) -> Path:
    """The run's folder: --checkpoint, or the run that the flags name, or the provided one of that name.

    Raises UserError listing the existing runs if there is no such run.
    """
    if config.checkpoint is not None:
        return Path(config.checkpoint)
    name = run_name(config)
    run_dir, provided = Path(config.output_dir) / name, PROVIDED / name
    # the user's own run comes first; a provided one is used only if there is none, and never silently
    if run_dir.is_dir():
        return run_dir
    if provided.is_dir():
        print(f"{run_dir} does not exist: using the provided checkpoint {provided}, trained on synthetic shapes only")
        return provided
    runs = list_runs(Path(config.output_dir)) + list_runs(PROVIDED)
    message = f"no run {run_dir}; train it: python main.py {as_flags(config)}".rstrip()
    if not runs:
        raise UserError(message, [f"there are no runs in {config.output_dir}/ yet"])
    commands = [f"  {path}: python inference.py {as_flags(c)} --video_dir ..." for path, c in runs]
    raise UserError(message, ["existing runs:", *commands])


def list_runs(folder: Path) -> list[tuple[Path, Config]]:
    """Every readable run directly below a folder."""
    runs = []
    for path in sorted(folder.glob(f"*/{METADATA}")):
        with contextlib.suppress(UserError):
            runs.append((path.parent, read_run(path.parent)[0]))
    return runs


def load_run(
    run_dir: Path, config: Config = Config(), typed: Set[str] = frozenset()
) -> tuple[VideoModel, Config, dict[str, Any]]:
    """(model in eval mode, options, metadata) of a run.

    The run's own options say what the model is. `config` adds those that inference reads, and the folder of a backbone
    that was moved.

    Raises UserError if it is not a run, a typed flag contradicts it, or backbone or tensors are not the run's.
    """
    # rebuild the model from the folder alone
    saved, metadata = read_run(run_dir)
    check_typed(config, typed, saved, run_dir)
    sources = {part: backbone_source(part, run_dir, metadata, config, typed, saved) for part in metadata["backbones"]}
    model = build_model(saved, len(metadata["class_names"]), sources.get("vision"), sources.get("language"))

    # make sure that it is the same model, then fill in what was trained
    check_fingerprints(run_dir, metadata, sources)
    check_preprocessing(run_dir, metadata, model)
    load_weights(run_dir, model)
    of_inference = {name for name, f in FIELDS.items() if "inference" in f.metadata["scripts"]}
    of_inference -= {*options_with("names_run")}
    return model.eval(), replace(saved, **{name: getattr(config, name) for name in of_inference}), metadata


def check_typed(config: Config, typed: Set[str], saved: Config, run_dir: Path) -> None:
    """Raises UserError listing each typed flag that contradicts the run."""
    contradictions = []
    for name in typed & {*options_with("names_run")}:
        if name == "use_text" and saved.captioning:  # it has no effect there
            continue
        value, own = getattr(config, name), getattr(saved, name)
        moved = name in ("vision_model", "language_model") and Path(str(value)).is_dir()  # its fingerprint decides
        if value != own and not moved:
            contradictions.append(f"--{name} {value} (it has {own})")
    if contradictions:
        raise UserError(f"{run_dir} was trained with other flags: {', '.join(sorted(contradictions))}")


def backbone_source(
    part: str, run_dir: Path, metadata: dict[str, Any], config: Config, typed: Set[str], saved: Config
) -> Source:
    """Where to load a backbone of a run from: the run's own folder, a folder that was typed, or its original source."""
    if metadata["backbones"][part]["in_checkpoint"]:
        return Source(str(run_dir / part), weights=False, fingerprint=metadata["backbones"][part]["fingerprint"])
    option = f"{part}_model"
    if option in typed and Path(str(getattr(config, option))).is_dir():
        return Source(getattr(config, option))
    return locate(getattr(saved, option), saved.weights)
