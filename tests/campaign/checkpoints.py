"""Damaged and crafted checkpoints, states, caches and backbones: a one-line error, or the right answer.

Each case damages one file (of a backbone, a LoRA run on it, a run trained in full, a cached run or a run stopped half
way) and uses it. No code in these files may run: it would leave a file named canary.
"""

import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign import common
from tests.campaign.common import Process, script

FLAGS = f"{common.TINY} --output_dir out --num_workers 0 --epochs 2"
LORA = f"{FLAGS} --vision_model backbone --use_lora_vision True"
CACHED = f"{FLAGS} --vision_model backbone --freeze_visionbackbone True"
EVIL = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoImageProcessor": "evil.Evil"}
NAN = float("nan")
EDITS = {  # edits of JSON files: (key, value); with None as key, the value replaces the whole file
    "config.json": [
        ("auto_map", EVIL),
        ("model_type", "evil"),
        ("model_type", None),
        ("_attn_implementation", "org/name"),
        ("num_hidden_layers", 3),
        ("hidden_size", 63),
        ("hidden_size", "x"),
        ("num_attention_heads", 0),
        ("image_size", -1),
        ("patch_size", 0),
        ("num_frames", None),
        ("architectures", ["Evil"]),
        ("dtype", "float99"),
        ("attention_type", "x"),
        ("layer_norm_eps", NAN),
        ("hidden_act", "evil"),
    ],
    "preprocessor_config.json": [
        ("auto_map", EVIL),
        ("image_processor_type", "Evil"),
        ("image_mean", "abc"),
        ("image_mean", None),
        ("image_mean", [1]),
        ("image_std", [0, 0, 0]),
        ("image_mean", [NAN] * 3),
        ("size", 0),
        ("size", -1),
        ("size", 10**6),
        ("size", {"longest_edge": 5}),
        ("size", "x"),
        ("crop_size", 0),
        ("resample", None),
        ("rescale_factor", "x"),
        ("do_normalize", "maybe"),
        ("image_mean", [0.1, 0.1, 0.1]),
    ],
    "metadata.json": [
        ("backbones", {}),
        ("backbones", {"vision": {}}),
        ("backbones", {"language": {}}),
        ("backbones", None),
        ("class_names", []),
        ("class_names", "x"),
        ("class_names", [1, 2, 3]),
        ("class_names", None),
        ("display_names", {}),
        ("display_names", None),
        ("task", None),
        ("format_version", 99),
        ("format_version", None),
        ("preprocessing", None),
        ("preprocessing", {}),
        ("data", None),
        ("versions", None),
    ],
}
TEXTS = ("", "{", "[]", "null", "[" * 100_000, '{"a": 1', "\0", '"x"')


class Payload:
    """A pickle that would write a canary file if it were loaded."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch canary",)


# -- damage: each changes a file and says how -------------------------------------------------------


def damage_any(path: Path, rng: random.Random) -> str:
    """Damage that any file can suffer."""
    import torch

    data = path.read_bytes()
    path.unlink()
    kinds: dict[str, Callable[[], Any]] = {
        "pickle": lambda: path.write_bytes(pickle.dumps(Payload())),
        "zip": lambda: torch.save(Payload(), path),
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "dangling": lambda: path.symlink_to("nowhere"),
        "zero": lambda: path.symlink_to("/dev/zero"),
        "lacking": lambda: None,
        "empty": path.touch,
        "junk": lambda: path.write_bytes(rng.randbytes(len(data))),
    }
    kind = rng.choice(list(kinds))
    kinds[kind]()
    return kind


def damage_bytes(path: Path, rng: random.Random) -> str:
    """Flipped bits anywhere or in the header, lost or added pieces."""
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
        return f"bit at {at} of {len(data)}"
    parts = [data[:header], data[header:]] if rng.random() < 0.5 else [data]
    parts[0] = common.mutate(parts[0], rng, [b"0"])
    path.write_bytes(b"".join(parts))
    return f"{len(parts)} parts, {len(data)} bytes, now {path.stat().st_size}"


def damage_tensors(path: Path, rng: random.Random) -> str:
    """Tensors with other names, types, shapes, values or offsets, or another header."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    alike = [n for n in tensors if tensors[n].shape == tensor.shape and tensors[n].dtype == tensor.dtype and n != name]
    kinds: dict[str, Callable[[], Any]] = {
        "half": lambda: tensors.update({n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}),
        "double": lambda: tensors.update({name: tensor.double()}),
        "integer": lambda: tensors.update({name: tensor.long()}),
        "flat": lambda: tensors.update({name: tensor.flatten()}),
        "rank": lambda: tensors.update({name: tensor[None]}),
        "short": lambda: tensors.update({name: tensor[:-1]}),
        "one": lambda: tensors.update({name: tensor.flatten()[:1].reshape(1)}),
        "nan": lambda: tensors.update({n: t * NAN if t.is_floating_point() else t for n, t in tensors.items()}),
        "one inf": lambda: tensor.flatten()[:1].fill_(float("inf") if tensor.is_floating_point() else 99),
        "rows": lambda: tensors.update({name: tensor.flip(0).contiguous()}),
        "double values": lambda: tensors.update({name: tensor * 2}),
        "swapped": lambda: tensors.update({name: tensors[alike[0]].clone(), alike[0]: tensor} if alike else {}),
        "dropped": lambda: tensors.pop(name),
        "added": lambda: tensors.update({"optimizer.9999.step": torch.zeros(1)}),
        "renamed": lambda: tensors.update({f"{name}.x": tensors.pop(name)}),
        "no header": header.clear,
        "text": lambda: header.update({k: rng.choice(TEXTS[:4]) for k in header}),
        "progress": lambda: header.update(odd_facts(header, rng)),
    }
    kind = rng.choice(list(kinds))
    kinds[kind]()
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path, metadata=header)
    return f"{kind} {name}"


def odd_facts(header: dict[str, str], rng: random.Random) -> dict[str, str]:
    """The JSON header with one changed field."""
    changed = {}
    for key, text in header.items():
        if text.startswith("{"):
            facts = json.loads(text)
            fact = rng.choice(list(facts))
            changed[key] = json.dumps(facts | {fact: rng.choice((-1, 10**6, "x", None, [], {}, 1.5))})
    return changed


def damage_json(path: Path, rng: random.Random) -> str:
    if rng.random() < 0.2:
        path.write_text(rng.choice(TEXTS))
        return "another text"
    key, value = rng.choice(EDITS[path.name])
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    return f"{key} = {value}"


def damage(path: Path, rng: random.Random) -> str:
    if rng.random() < 0.15:
        return damage_any(path, rng)
    if path.suffix == ".safetensors":
        return rng.choice((damage_bytes, damage_tensors))(path, rng)
    return damage_json(path, rng)


def add_evil(folder: Path) -> str:
    """Adds files that a library might execute or unpickle."""
    (folder / "evil.py").write_text("open('canary', 'w')\nclass Evil: pass\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("open('canary', 'w')\n")
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload()))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "evil"}')
    return " next to evil files"


# -- cases: each damages a copy of the world, uses it, and says whether that gave the right answer ----------------


class World:
    def __init__(self, work: Path):
        self.data, self.folder = common.tiny_data(work / "data", per_class=4), work / "world"
        shutil.copytree(common.ROOT / "backbones" / "timesformer-tiny", self.folder / "backbone")
        for name, flags in (("lora", LORA), ("full", FLAGS), ("cached", CACHED)):
            common.finished("main", f"{flags} --data_dir {self.data} --run_name {name}", self.folder)
        self.runs = {name: common.contents(self.folder / "out" / name) for name in ("lora", "cached")}
        process = Process(script("main", f"{LORA} --data_dir {self.data} --run_name half --save_every 1"), self.folder)
        process.wait(until=(self.folder / "out" / "half" / "state" / "state.safetensors").exists)
        process.close()
        self.answers = {name: self.answer(name, self.folder)[1] for name in ("lora", "full")}

    def answer(self, name: str, folder: Path) -> tuple[Process, list[dict]]:
        """A run's predictions for the test videos."""
        flags = f"--checkpoint out/{name} --video_dir {self.data / 'test'} --output a.jsonl --num_workers 0"
        process = Process(script("inference", flags), folder).wait(120)
        rows = (folder / "a.jsonl").read_text().splitlines() if (folder / "a.jsonl").exists() else []
        (folder / "a.jsonl").unlink(missing_ok=True)
        return process, [{k: v for k, v in json.loads(row).items() if k != "run"} for row in rows]


Used = tuple[str, Process, bool]  # (what was damaged, the process that used it, whether its answer is right)


def weights(world: World, folder: Path, rng: random.Random) -> Used:
    """Damages the weights of a finished run."""
    name = rng.choice(("lora", "full"))
    what = damage(folder / "out" / name / "model.safetensors", rng)
    process, rows = world.answer(name, folder)
    return f"{name} {what}", process, rows == world.answers[name]


def description(world: World, folder: Path, rng: random.Random) -> Used:
    name = rng.choice(("lora", "full"))
    file = rng.choice(
        ("metadata.json", *2 * ("vision/config.json", "vision/preprocessor_config.json") * (name == "full"))
    )
    what = damage(folder / "out" / name / file, rng)
    process, rows = world.answer(name, folder)
    return f"{name}/{file} {what}", process, rows == world.answers[name]


def state(world: World, folder: Path, rng: random.Random) -> Used:
    what = damage(folder / "out" / "half" / "state" / "state.safetensors", rng)
    process = Process(script("main", "--resume True --run_name half --output_dir out"), folder).wait(120)
    wrong = common.differences(folder / "out" / "half", world.runs["lora"]) if process.status == 0 else []
    return what, process, "other model.safetensors" not in wrong


def cache(world: World, folder: Path, rng: random.Random) -> Used:
    what = damage(rng.choice(sorted((folder / "out" / ".features").rglob("*.safetensors"))), rng)
    process = Process(script("main", f"{CACHED} --data_dir {world.data} --run_name again"), folder).wait(120)
    wrong = common.differences(folder / "out" / "again", world.runs["cached"]) if process.status == 0 else []
    return what, process, not wrong


def backbone(world: World, folder: Path, rng: random.Random) -> Used:
    """Damages the backbone of a finished LoRA run."""
    file = rng.choice(("model.safetensors", "config.json", "preprocessor_config.json"))
    what = damage(folder / "backbone" / file, rng)
    process, rows = world.answer("lora", folder)
    return f"{file} {what}", process, rows == world.answers["lora"]


def new_run(world: World, folder: Path, rng: random.Random) -> Used:
    """Trains a new run on a crafted backbone: any result counts as right."""
    file = rng.choice(("model.safetensors", *2 * ("config.json", "preprocessor_config.json")))
    what = damage(folder / "backbone" / file, rng) + (add_evil(folder / "backbone") if rng.random() < 0.5 else "")
    process = Process(script("main", f"{LORA} --data_dir {world.data} --run_name new --epochs 1"), folder).wait(120)
    return f"{file} {what}", process, True


CASES = (weights, state, cache, description, backbone, new_run)


def judge(world: World, case: Callable, folder: Path, rng: random.Random) -> tuple[str, str]:
    shutil.copytree(world.folder, folder, symlinks=True)
    what, process, right = case(world, folder, rng)
    process.close()
    text = f"{case.__name__}: {what}\n{process.status}\n{process.err}\n{process.out[-2000:]}"
    if any(folder.rglob("canary")):
        return "code run", text
    bad = common.unwanted(process.status, process.out, process.err)
    if bad or process.status == 2:
        return bad or "refused", text
    return ("right" if right else "silently wrong"), text


def main(argv: list[str] | None = None) -> int:
    tally = common.Tally(__doc__, 200, argv)
    common.warm_up()
    with common.scratch() as work:
        world = World(work)
        for number in range(tally.total):
            case = CASES[number % len(CASES)]
            verdict, text = judge(world, case, work / "case", tally.rng(number))
            tally.add(verdict, text, f"{number} {case.__name__}", bad=verdict not in ("right", "refused"))
            shutil.rmtree(work / "case")
            if tally.time_is_up():
                break
    return tally.finish("right", "refused", "silently wrong", "code run", "traceback", "hang")


if __name__ == "__main__":
    sys.exit(main())
