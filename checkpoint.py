"""Saves a run, finds it again, and rebuilds its model from the folder alone.

    checkpoints/<run>/model.safetensors   exactly the trained tensors (its header: epoch, step, val metrics)
                      config.yaml         every option, resolved
                      metadata.json       task, classes, backbones with fingerprints, preprocessing, versions
                      vision/ language/   configuration and tokenizer of a backbone that was trained in full
                      log.jsonl metrics.json predictions_{val,test}.jsonl *.png
                      state/                what --resume needs, until the run is finished

Loading is strict both ways, and no pickle is ever read.
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
#: all that a run writes into its folder; --overwrite removes this and nothing else
RUN_FILES = {WEIGHTS, CONFIG_YAML, METADATA, METRICS, "log.jsonl", "predictions_val.jsonl", "predictions_test.jsonl"}
RUN_FILES |= {"state", "vision", "language", "tensorboard", "CARD.md", *(f"{name}.png" for name in PICTURES)}
PROVIDED = ROOT / "checkpoints" / "provided"


# -- saving -----------------------------------------------------------------------------------------


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """A run's metrics.json; {} where its training is not finished."""
    file = run_dir / METRICS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


# -- a run's folder ---------------------------------------------------------------------------------


@contextmanager
def claimed_run(config: Config, typed: Set[str], first: bool) -> Generator[tuple[Path, Config]]:
    """The folder of a new run, or with --resume of one to continue, and the options in force; this process alone has
    it until the end of the block. Only the `first` of several processes takes the lock and writes.

    The options are written at once, so that a run can be resumed whenever it is killed. A new run that ends before
    write_run_files() leaves nothing behind.

    Raises UserError if another process has the folder, or it does not hold what it should.
    """
    run_dir = Path(config.output_dir) / run_name(config)
    if run_dir.resolve().is_relative_to(PROVIDED.resolve()):
        raise UserError(f"{PROVIDED} holds the provided checkpoints and is never written; choose another --output_dir")
    if config.resume and not run_dir.is_dir():
        raise UserError(f"{run_dir} is no run of this program: there is no such folder")
    if not first:
        yield run_dir, resumed_options(run_dir, config, typed) if config.resume else config
        return
    new_parent = not run_dir.parent.exists()
    lock, fresh = lock_run(run_dir, None if config.resume else config), False
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
    finally:
        unused = fresh and not (run_dir / METADATA).exists()
        if unused:
            clear_run(run_dir)
        lock.release()
        with contextlib.suppress(OSError):  # a link, or claimed by somebody else by now
            if unused:
                run_dir.rmdir()
                if new_parent:
                    run_dir.parent.rmdir()


def lock_run(run_dir: Path, config: Config | None = None) -> FileLock:
    """Makes the folder where there is none, with the options of a new run in it, and locks it.

    Raises UserError naming the process that has it.
    """
    make_folder(run_dir.parent)
    if config is not None and not os.path.lexists(run_dir):
        lock = make_run(run_dir, config)
        if lock is not None:
            return lock
    for _ in range(100):
        make_folder(run_dir)
        try:
            return FileLock(run_dir / LOCK, str(run_dir))
        except FileNotFoundError:  # its last holder removed the folder just now
            continue
    raise UserError(f"cannot lock {run_dir}: the folder keeps disappearing")


def make_run(run_dir: Path, config: Config) -> FileLock | None:
    """A new run's folder: it appears at once, locked and with the options. None if another process was faster."""
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
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_free(run_dir: Path, overwrite: bool) -> bool:
    """Whether the folder is free; False where --overwrite replaces the run in it. Raises UserError if no new run may
    be written there."""
    if (run_dir / METADATA).exists():
        read_run(run_dir)
        if not overwrite:
            raise UserError(
                f"the run {run_dir} exists: add --resume True to continue it, --overwrite True to replace it, "
                "or --run_name <another name>"
            )
        return False
    if not is_unstarted(run_dir):
        raise UserError(f"{run_dir} is not empty and no run of this program; choose another --run_name")
    return True


def is_unstarted(run_dir: Path) -> bool:
    """Whether the folder is empty, or what a run leaves that was killed before metadata.json was there."""
    names = {p.name for p in run_dir.iterdir() if p.name != LOCK and not is_temporary(p)}
    if not names or CONFIG_YAML not in names or foreign_files(run_dir):
        return not names
    with contextlib.suppress(UserError):
        return bool(read_yaml(run_dir / CONFIG_YAML))
    return False


def foreign_files(run_dir: Path) -> list[Path]:
    """What lies in a run's folder that no run writes."""
    ours = RUN_FILES | {LOCK}
    return [p for p in run_dir.iterdir() if p.name not in ours and not p.match("evaluation_*") and not is_temporary(p)]


def clear_run(run_dir: Path, config: Config | None = None) -> None:
    """Removes what a run writes, and nothing else; the options of the run to come replace the old ones."""
    (run_dir / METADATA).unlink(missing_ok=True)  # first: the rest alone is no run, whenever this is killed
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
    """Writes metrics.json, which makes a run finished; then there is nothing to resume."""
    write_json(metrics, run_dir / METRICS)
    shutil.rmtree(run_dir / STATE.parent, ignore_errors=True)


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


def run_metadata(
    model: VideoModel, config: Config, class_names: list[str], display: dict[str, str], data: str
) -> dict[str, Any]:
    """metadata.json: what the run is, in readable form; `data` identifies what it was trained on."""
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


def write_run_files(run_dir: Path, model: VideoModel, config: Config, metadata: dict[str, Any]) -> None:
    """Writes all that does not change while the run trains."""
    for name, mode in training_mode(config).items():
        if mode == "full":
            save_backbone_files(model, name, run_dir / name)
    replace_file(run_dir / CONFIG_YAML, lambda p: write_yaml(asdict(config), p))
    write_json(metadata, run_dir / METADATA)


def save_backbone_files(model: VideoModel, name: str, folder: Path) -> None:
    """What rebuilds a backbone around the checkpoint's tensors: its published configuration, and its
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
    save_tensors({name: p.detach() for name, p in trained_tensors(model).items()}, facts, run_dir / WEIGHTS)


def save_tensors(tensors: dict[str, torch.Tensor], facts: dict[str, Any], file: Path) -> None:
    """Writes a safetensors file with `facts` (JSON) and a digest of it all in its header."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    facts = facts | {"digest": tensor_digest(tensors, facts)}
    header = {"facts": json.dumps(facts)}  # one key: with two, equal runs could differ in their order
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
    random: dict[int, torch.Tensor],
) -> None:
    """Trained tensors, optimizer and the state of every process's random generator in one file; `progress` (JSON)
    in its header."""
    tensors = {f"model.{name}": p.detach().cpu() for name, p in trained_tensors(model).items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value.detach().cpu() for name, value in slots.items()}
    tensors |= {f"rng.cpu.{process}": state for process, state in random.items()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    make_folder((run_dir / STATE).parent)
    save_tensors(tensors, progress, run_dir / STATE)


def load_state(
    run_dir: Path, model: VideoModel, optimizer: torch.optim.Optimizer, process: int = 0, processes: int = 1
) -> dict[str, Any]:
    """Restores what save_state saved, with the random generator of this `process`, and returns the progress.

    Raises:
        UserError: the file is damaged or another model's, or another number of processes wrote it.
    """
    file = run_dir / STATE
    tensors, progress = read_tensors(file)
    groups: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}, "rng": {}}
    try:
        for name, tensor in tensors.items():
            kind, rest = name.split(".", 1)
            groups[kind][rest] = tensor
        copy_tensors(model, groups["model"], file)
        load_optimizer(optimizer, groups["optimizer"])
        random = {int(n.removeprefix("cpu.")): t for n, t in groups["rng"].items() if n.startswith("cpu.")}
        if len(random) != processes:
            raise UserError(f"{run_dir} was stopped with {len(random)} processes, this is {processes}: use as many")
        torch.set_rng_state(random[process])
        if "cuda" in groups["rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(groups["rng"]["cuda"])
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{file} holds no state of this run: {' '.join(str(error).split())}") from None
    return progress


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restores the slots, named `<parameter's number>.<slot>`. Raises ValueError unless they fit the parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, slot = name.split(".")
        if int(index) >= len(parameters) or (slot != "step" and tensor.shape != parameters[int(index)].shape):
            raise ValueError(f"optimizer.{name} fits no parameter")
        slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})


def resumed_options(run_dir: Path, config: Config, typed: Set[str]) -> Config:
    """The options of the run to resume, machine options taken from `config`; without `resume` where it was killed
    before it started to train.

    Raises:
        UserError: no such run, it is finished, or a typed option is not the run's own.
    """
    started = (run_dir / METADATA).exists()
    if not started and not (is_unstarted(run_dir) and (run_dir / CONFIG_YAML).exists()):
        raise UserError(f"{run_dir} is no run of this program: it has no {METADATA}")
    saved = read_run(run_dir)[0] if started else Config(**read_yaml(run_dir / CONFIG_YAML))
    if (run_dir / METRICS).is_file() and started:
        if (run_dir / LOCK).exists():  # this process has it
            shutil.rmtree(run_dir / STATE.parent, ignore_errors=True)  # what a kill at the very end left
            remove_leftovers(run_dir, owned=True)
        raise UserError(f"{run_dir} is finished: nothing to resume; --overwrite True trains it again")
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
    """Raises UserError unless a run to resume has the data and the backbones that it was started with."""
    _, metadata = read_run(run_dir)
    check_preprocessing(run_dir, metadata, model)
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


def check_preprocessing(run_dir: Path, metadata: dict[str, Any], model: VideoModel) -> None:
    """Raises UserError unless clips are prepared as they were in training."""
    used = json.loads(json.dumps(asdict(model.vision_encoder.preprocessing)))
    wrong = [name for name, value in used.items() if metadata["preprocessing"].get(name) != value]
    if wrong:
        raise UserError(
            f"{run_dir} was trained with another {wrong[0]} ({shown(metadata['preprocessing'].get(wrong[0]))}) than "
            f"{model.sources['vision'].path}/preprocessor_config.json gives ({shown(used[wrong[0]])})"
        )


# -- loading ----------------------------------------------------------------------------------------


def load_weights(run_dir: Path, model: VideoModel) -> dict[str, Any]:
    """Copies the checkpoint's tensors into the model and returns the facts saved with them.

    Raises:
        UserError: the file is missing or damaged, or its tensors are not exactly the model's trained ones.
    """
    file = run_dir / WEIGHTS
    if not file.exists():
        raise UserError(f"{run_dir} has no {WEIGHTS}: its training did not finish an epoch")
    tensors, facts = read_tensors(file)
    copy_tensors(model, tensors, file)
    return facts


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and facts of a file that save_tensors wrote.

    Raises UserError if it is damaged: cut short, or its contents do not match its digest. Files written before there
    were digests have none.
    """
    if not file.is_file():  # a FIFO would be waited for
        raise UserError(f"{file} is not a file")
    try:
        with safe_open(str(file), framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, no mapping
            header = stored.metadata() or {}
        facts = json.loads(header.get("facts") or header.get("progress") or "{}")  # states once had `progress`
        digest = facts.pop("digest", None)
    except (SafetensorError, OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is no whole safetensors file: {error}") from None
    if digest is not None and digest != tensor_digest(tensors, facts):
        raise UserError(f"{file} is damaged: its contents do not match its digest")
    return tensors, facts


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
    """A run's options and metadata. Raises UserError if the folder is no run, damaged, or of a later format."""
    try:
        metadata = json.loads((run_dir / METADATA).read_text(encoding="utf-8"))
        version = metadata["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{run_dir} is no run of this program: it has no readable {METADATA}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{run_dir} has checkpoint format {shown(version)}; this program reads {FORMAT_VERSION}")
    config = Config(**read_yaml(run_dir / CONFIG_YAML))
    wrong = wrong_metadata(metadata, {"vision", "language"} if config.use_vlm else {"vision"})
    if wrong:
        raise UserError(f"{run_dir / METADATA} is damaged: {wrong}")
    return config, metadata


def wrong_metadata(metadata: dict[str, Any], parts: set[str]) -> str:
    """What is wrong with the contents of a metadata.json, "" if nothing; `parts` are the run's backbones."""
    names, display, backbones = (metadata.get(key) for key in ("class_names", "display_names", "backbones"))
    if not isinstance(metadata.get("task"), str) or not isinstance(metadata.get("data"), str):
        return "no task or data"
    if not isinstance(metadata.get("preprocessing"), dict):
        return "no preprocessing"
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return "class_names is no list of names"
    if not isinstance(display, dict) or not all(isinstance(display.get(name), str) for name in names):
        return "display_names lacks a class"
    if not isinstance(backbones, dict) or backbones.keys() != parts:
        return f"backbones are not {' and '.join(sorted(parts))}"
    for name, facts in backbones.items():
        if not isinstance(facts, dict) or not isinstance(facts.get("in_checkpoint"), bool):
            return f"the {name} backbone is not described"
        if not isinstance(facts.get("fingerprint"), str) or not facts["fingerprint"]:
            return f"the {name} backbone has no fingerprint"
    return ""


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
    for name in options_with("names_run"):
        if name not in typed or (name == "use_text" and saved.captioning):
            continue
        mine, its = getattr(config, name), getattr(saved, name)
        moved = name in ("vision_model", "language_model") and Path(str(mine)).is_dir()  # its fingerprint decides
        if mine != its and not moved:
            wrong.append(f"--{name} {mine} (it has {its})")
    if wrong:
        raise UserError(f"{run_dir} was trained with other flags: {', '.join(wrong)}")


def backbone_source(
    name: str, option: str, run_dir: Path, metadata: dict, config: Config, typed: Set[str], saved: Config
) -> Source:
    """Where a backbone of a run comes from: the run's own folder, the named folder, or where it came from."""
    if metadata["backbones"][name]["in_checkpoint"]:
        return Source(str(run_dir / name), weights=False, fingerprint=metadata["backbones"][name]["fingerprint"])
    named = getattr(config, option)
    if option in typed and Path(str(named)).is_dir():
        return Source(named)
    return locate(getattr(saved, option), saved.weights)


def load_run(
    run_dir: Path, config: Config = Config(), typed: Set[str] = frozenset()
) -> tuple[VideoModel, Config, dict[str, Any]]:
    """(model in eval mode, options, metadata) of a run.

    The run's options decide what the model is; `config` gives the inference and machine options, and
    the folder of a backbone that moved.

    Raises:
        UserError: no run, a contradicting flag, another backbone than it was trained on, other tensors.
    """
    saved, metadata = read_run(run_dir)
    check_typed(config, typed, saved, run_dir)
    sources = {
        name: backbone_source(name, f"{name}_model", run_dir, metadata, config, typed, saved)
        for name in metadata["backbones"]
    }
    model = build_model(saved, len(metadata["class_names"]), sources.get("vision"), sources.get("language"))
    check_fingerprints(run_dir, metadata, sources)
    check_preprocessing(run_dir, metadata, model)
    load_weights(run_dir, model)
    here = {n: getattr(config, n) for n, f in FIELDS.items() if f.metadata["group"] in ("inference", "run and machine")}
    return model.eval(), replace(saved, **here), metadata
