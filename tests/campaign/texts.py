"""Damaged texts: flags, options, metadata, class names, annotations, run descriptions, captions to score. Every script
works, or refuses with one line.

The scripts run in-process, many cases per fork. Nothing is trained: train_code.lr_at, called before each step, raises
UserError.
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.campaign import common

LIMIT, MEMORY_MB = 300, 3072
VALUES = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2.7,
    1e308,
    float("inf"),
    float("nan"),
    10**30,
    "",
    " ",
    "x" * 5000,
    "x" * 300,
    "\x1b[31m\x07",
    "\x00",
    "a\u2028b",
    "\x85",
    "\ud800",
    "\ufeff",
    "²",
    "①",
    "$_$",
    "$\\frac{$",
    "%s",
    "{0}",
    "../x",
    "http:/x",
    "-",
    "--epochs",
    "'\"",
    "a\nb",
    [],
    {},
    [[]],
    [1],
    ["a", None],
    {"a": 1},
    {"a": {"b": []}},
    "class_0",
    "auto",
    "True",
    "1e-3",
    "2001-99-99",
    "nan",
    "facebook/x",
)
HERE = "--output_dir out --num_workers 0"
PIECES = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    "\u2028".encode(),
    b"\x1b[31m",
    b"\x07",
    b"[" * 100_000,
    b'{"a":' * 2000,
    b"9" * 5000,
    b"1e999",
    b"NaN",
    b"null",
    b"-1",
    b"!!python/object/apply:os.system ['touch canary']",
    b"!!timestamp x",
    b"!!int x",
    b"!!bool x",
    b"2001-99-99",
    b"&a [*a]",
    b"*a",
    b"12:30:45",
    b"<<: {a: 1}",
    b"\r",
    b"\n\n",
    b"\t",
    b'"',
    b"'",
    b"#",
    b"|",
    b",",
    b": ",
    b"\\u0000",
    b"\\ud800",
)
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n"
LAUGHS += "".join(f"{c}: &{c} [{','.join(9 * ['*' + b])}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True))
ANNOTATIONS = {
    "list": ("train.csv", "path,label,caption,split\nv0.pt,jump,a jump,train\nv1.pt,run,a run,test\n"),
    "ucf101": ("trainlist01.txt", "jump/v0.pt 1\nrun/v1.pt 2\n"),
    "hmdb51": ("jump_test_split1.txt", "v0.pt 1\nv1.pt 2\nv2.pt 0\n"),
    "kinetics": ("x.csv", "label,youtube_id,time_start,time_end,split\njump,v0,0,10,train\nrun,v1,0,10,val\n"),
    "ssv2": ("train.json", json.dumps([{"id": f"v{i}", "label": "a b", "template": "[x] b"} for i in range(3)])),
    "msrvtt": (
        "x.json",
        json.dumps(
            {"videos": [{"video_id": "v0", "split": "train"}], "sentences": [{"video_id": "v0", "caption": "a b"}]}
        ),
    ),
    "msvd": ("train.txt", "v0 a man runs\nv1 a dog\nv1 the dog\n"),
    "vatex": ("test.csv", "v0|a man|a dog\nv1|b\n"),
    "frames": ("train.txt", "f0 1 3 jump\nf0 4 run\n"),
    "chat": (
        "train.json",
        json.dumps(
            [
                {
                    "messages": [{"role": "user", "content": "<video>what?"}, {"role": "assistant", "content": "a"}],
                    "videos": ["v0.pt"],
                }
            ]
        ),
    ),
}


def make_base(folder: Path) -> None:
    """Makes a data folder, a run trained on it, and videos to convert."""
    from PIL import Image

    data = common.tiny_data(folder / "data", per_class=3)
    common.finished("main", f"{common.TINY} --data_dir {data} {HERE} --run_name r --epochs 1", folder)
    (folder / "videos" / "f0").mkdir(parents=True)
    for index in range(4):
        Image.new("RGB", (16, 16)).save(folder / "videos" / "f0" / f"{index}.png")
        video = (data / "train" / "class_0" / "video_0.pt").read_bytes()
        (folder / "videos" / f"v{index}.pt").write_bytes(video)
        (folder / "videos" / f"v{index}_000000_000010.pt").write_bytes(video)


# -- damage -----------------------------------------------------------------------------------------


def twist(value: Any, rng: random.Random) -> Any:
    """The value with one of its parts replaced, removed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        renamed = {str(rng.choice(VALUES)): value[key]}
        return rng.choice((rest, rest | renamed, value | renamed, *3 * [value | {key: twist(value[key], rng)}]))
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        new = rng.choice(([], [value[at]] * 2, [twist(value[at], rng)]))
        return [*value[:at], *new, *value[at + 1 :]]
    return rng.choice(VALUES)


def twisted(data: bytes, rng: random.Random) -> bytes:
    """JSON, lines of JSON, or yaml with a part of it changed; other texts with a word changed."""
    text = data.decode()
    lines = text.splitlines()
    try:
        if lines[0].startswith("{") and lines[0].endswith("}") and len(lines) > 1:
            at = rng.randrange(len(lines))
            lines[at] = json.dumps(twist(json.loads(lines[at]), rng), ensure_ascii=rng.random() < 0.5)
            changed = "\n".join(lines) + "\n"
        else:
            changed = json.dumps(twist(yaml.safe_load(text), rng), ensure_ascii=rng.random() < 0.5)
        if isinstance(json.loads(changed.splitlines()[0]), str):
            raise ValueError("no structure in this text")
    except (ValueError, IndexError, yaml.YAMLError):
        words = text.replace(",", " ").replace("|", " ").split()
        changed = text.replace(rng.choice(words), str(rng.choice(VALUES)), 1)
    return changed.encode("utf-8", "surrogatepass")


def damaged(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return twisted(data, rng)
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = common.mutate(data, rng, PIECES)
    return data


# -- cases: each writes its files below `folder` and gives (script, argv); paths in it are relative to that ---------


def infer(base: Path, run: object = "out/r", videos: object = None) -> tuple[str, str]:
    return "inference", f"--checkpoint {run} --video_dir {videos or base / 'data' / 'test' / 'class_0'} {HERE}"


def flags(base: Path, folder: Path, rng: random.Random) -> tuple[str, list[str]]:
    from config import FIELDS

    train = "main", f"{common.TINY} --data_dir {base / 'data'} {HERE}"
    name, text = rng.choice((train, train, infer(base, base / "out" / "r")))
    argv = text.split()
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        flag = rng.choice([f for f in FIELDS if f != "doctor"])  # because that one trains
        sensible = ("True", "True", "False", FIELDS[flag].default, "bert", "gpt2", "videomae", "strong", "3", "0.5")
        value = rng.choice((*VALUES, *sensible))
        argv += rng.choice(([f"--{flag}", str(value)], [f"--{flag}={value}"], [f"--{flag}"], [str(value)]))
    return name, [word.replace("\0", "") for word in argv]


def settings(base: Path, folder: Path, rng: random.Random) -> tuple[str, str]:
    from config import CONFIG_FILE

    lines = [line for line in CONFIG_FILE.read_text(encoding="utf-8").splitlines() if rng.random() < 0.3]
    text = "\n".join([*lines, "image_size: 32", "num_frames: 4"]) + "\n"
    data = damaged(text.encode(), rng) if rng.random() > 0.02 else (LAUGHS + "epochs: *i\n").encode()
    (folder / "x.yaml").write_bytes(data)
    return "main", f"--config x.yaml --data_dir {base / 'data'} {HERE}"


def data_folder(base: Path, folder: Path, rng: random.Random) -> tuple[str, str]:
    shutil.copytree(base / "data", folder / "d", copy_function=os.symlink)
    target = folder / "d" / rng.choice(("train/metadata.jsonl", "test/metadata.jsonl", "classes.json"))
    data = target.read_bytes()
    target.unlink()
    target.write_bytes(damaged(data, rng))
    if target.parent.name != "d" and rng.random() < 0.3:
        return infer(base, base / "out" / "r", f"d/{target.parent.name}")
    job = rng.choice(("", "--use_vlm True --captioning True", "--use_vlm True --use_text True"))
    return "main", f"{common.TINY} --data_dir d {HERE} {job}"


def annotations(base: Path, folder: Path, rng: random.Random) -> tuple[str, str]:
    form = rng.choice(list(ANNOTATIONS))
    name, text = ANNOTATIONS[form]
    (folder / name).write_bytes(damaged(text.encode(), rng))
    more = ""
    if rng.random() < 0.2:
        more, text = rng.choice((("names.txt", "1 jump\n2 run\n"), ("names.json", '{"jump": 1, "run": 2}')))
        (folder / more).write_bytes(damaged(text.encode(), rng))
        more = f"--class_names {more}"
    return (
        "convert_dataset",
        f"--format {form} --annotations {name} --videos {base / 'videos'} --output out --no_scan {more}",
    )


def run(base: Path, folder: Path, rng: random.Random) -> tuple[str, str]:
    shutil.copytree(base / "out" / "r", folder / "out" / "r", copy_function=os.symlink)
    target = folder / "out" / "r" / rng.choice(("config.yaml", "metadata.json"))
    data = target.read_bytes()
    target.unlink()
    target.write_bytes(damaged(data, rng))
    return rng.choice((infer(base), infer(base), ("main", f"--resume True --run_name r {HERE}")))


def captions(base: Path, folder: Path, rng: random.Random) -> tuple[str, str]:
    lines = '{"file": "a.mp4", "caption": "x y"}\n{"file": "b.mp4", "caption": "z"}\n'
    texts = {"r.json": '{"a": ["x y", "x"], "b": ["z"]}', "q.json": '{"a": "z", "b": "z"}'}
    texts["p.json"] = rng.choice((lines, '{"a": "x y", "b": "z"}'))
    broken = rng.choice(sorted(texts))
    for name, text in texts.items():
        (folder / name).write_bytes(damaged(text.encode(), rng) if name == broken else text.encode())
    return "metrics", f"--references r.json --predictions p.json {rng.choice(('', '--compare q.json'))}"


CASES = 4 * [flags] + 4 * [settings] + 4 * [data_folder] + 4 * [annotations] + 3 * [run] + [captions]


def judge(base: Path, rng: random.Random) -> tuple[str, str]:
    import train_code
    from script import UserError

    def no_step(*_: object) -> float:
        raise UserError("stopped before the first step")

    train_code.lr_at = no_step
    case = rng.choice(CASES)
    name, argv = case(base, Path.cwd(), rng)
    status, out, err = common.run_here(name, argv)
    bad = common.unwanted(status, out, err)
    if Path("canary").exists():
        bad = "code run"
    if bad:
        return bad, f"{case.__name__}\n{name}.py {argv}\n{err[-9000:]}\n{out[-3000:]}"
    return "refused" if status == 2 else "ok", ""


def main(argv: list[str] | None = None) -> int:
    tally = common.Tally(__doc__, 16_000, argv)
    common.warm_up()
    with common.scratch() as work:
        base = work / "base"
        make_base(base)
        judge_number = lambda number: judge(base, tally.rng(number))  # noqa: E731
        for case, verdict, text in common.judge_many(tally.total, judge_number, work / "cases", LIMIT, MEMORY_MB):
            folder = tally.add(verdict, text, str(case), bad=verdict not in ("ok", "refused"))
            if folder is not None:
                rng = tally.rng(case)
                rng.choice(CASES)(base, folder, rng)
            if tally.time_is_up():
                break
    return tally.finish(
        "ok", "refused", "traceback", "control characters", "long message", "hang", "memory", "code run"
    )


if __name__ == "__main__":
    sys.exit(main())
