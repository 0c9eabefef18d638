"""Damaged texts: flags, settings, metadata, class names, annotations, runs' descriptions, captions to score. Every script
answers, or refuses in one line.

The scripts run in-process, many cases a fork. No step is trained: train_code.lr_at, asked before each, raises UserError.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.campaign import common

LIMIT, MEMORY_MB = 60, 3072
VALUES = (
    None, True, False, -1, 0, 1, 2.7, 1e308, float("inf"), float("nan"), 10**30, "", " ", "x" * 5000, "x" * 300, "\x1b[31m\x07", "\x00",
    "a\u2028b", "\x85", "\ud800", "\ufeff", "²", "①", "$_$", "$\\frac{$", "%s", "{0}", "../x", "http:/x", "-", "--epochs", "'\"", "a\nb",
    [], {}, [[]], [1], ["a", None], {"a": 1}, {"a": {"b": []}}, "class_0", "auto", "True", "1e-3", "2001-99-99", "nan", "facebook/x",
)  # fmt: skip
PIECES = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", "\u2028".encode(), b"\x1b[31m", b"\x07", b"[" * 100_000, b'{"a":' * 2000, b"9" * 5000, b"1e999",
    b"NaN", b"null", b"-1", b"!!python/object/apply:os.system ['touch canary']", b"!!timestamp x", b"!!int x", b"!!bool x", b"2001-99-99",
    b"&a [*a]", b"*a", b"12:30:45", b"<<: {a: 1}", b"\r", b"\n\n", b"\t", b'"', b"'", b"#", b"|", b",", b": ", b"\\u0000", b"\\ud800",
)  # fmt: skip
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join(9 * ['*' + b])}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True)
)
ANNOTATIONS = {
    "list": ("train.csv", "path,label,caption,split\nv0.pt,jump,a jump,train\nv1.pt,run,a run,test\n"),
    "ucf101": ("trainlist01.txt", "jump/v0.pt 1\nrun/v1.pt 2\n"), "hmdb51": ("jump_test_split1.txt", "v0.pt 1\nv1.pt 2\nv2.pt 0\n"),
    "kinetics": ("x.csv", "label,youtube_id,time_start,time_end,split\njump,v0,0,10,train\nrun,v1,0,10,val\n"),
    "ssv2": ("train.json", json.dumps([{"id": f"v{i}", "label": "a b", "template": "[x] b"} for i in range(3)])),
    "msrvtt": ("x.json", json.dumps({"videos": [{"video_id": "v0", "split": "train"}], "sentences": [{"video_id": "v0", "caption": "a b"}]})),
    "msvd": ("train.txt", "v0 a man runs\nv1 a dog\nv1 the dog\n"), "vatex": ("test.csv", "v0|a man|a dog\nv1|b\n"),
    "frames": ("train.txt", "f0 1 3 jump\nf0 4 run\n"),
    "chat": ("train.json", json.dumps([{"messages": [{"role": "user", "content": "<video>what?"}, {"role": "assistant", "content": "a"}],
                                        "videos": ["v0.pt"]}])),
}  # fmt: skip


def make_base(folder: Path) -> None:
    """A data folder, a run trained on it, videos to convert."""
    from PIL import Image

    data = common.tiny_data(folder / "data", per_class=3)
    flags = ["--data_dir", data, "--output_dir", "out", "--run_name", "r", "--epochs", "1", "--num_workers", "0"]
    common.train(folder, *common.TINY, *flags)
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
        return rng.choice(
            (value[:at] + value[at + 1 :], [*value, value[at]], [*value[:at], twist(value[at], rng), *value[at + 1 :]])
        )
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


def cut_and_paste(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, pieces cut out, doubled, moved or put in."""
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + int(len(data) ** rng.random()))
    kind = rng.randrange(6)
    if kind == 0 and data:
        changed = bytearray(data)
        for _ in range(int(20 ** rng.random())):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    middle = (
        data[start:end],
        b"",
        2 * data[start:end],
        rng.choice(PIECES),
        rng.choice(PIECES) + data[start:end],
        data[end:],
    )[kind]
    return data[:start] + middle + data[end:]


def damaged(text: str | bytes, rng: random.Random) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    if rng.random() < 0.5:
        return twisted(data, rng)
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = cut_and_paste(data, rng)
    return data


# -- cases: each writes its files below `folder` and gives (script, argv); paths in it are relative to that ---------

HERE = ["--output_dir", "out", "--num_workers", "0"]


def flags(base: Path, folder: Path, rng: random.Random) -> tuple[str, list[str]]:
    from config import FIELDS

    infer = rng.random() < 0.4
    clip = base / "data" / "test" / "class_0"
    argv = (
        ["--checkpoint", base / "out" / "r", "--video_dir", clip]
        if infer
        else [*common.TINY, "--data_dir", base / "data"]
    )
    argv = [*map(str, argv), *HERE]
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        name = rng.choice(list(FIELDS))
        value = rng.choice(
            (*VALUES, *2 * ("True", "False"), FIELDS[name].default, "bert", "gpt2", "videomae", "strong", "3", "0.5")
        )
        if name != "doctor":  # it trains
            argv += rng.choice(([f"--{name}", str(value)], [f"--{name}={value}"], [f"--{name}"], [str(value)]))
    return ("inference" if infer else "main"), [word.replace("\0", "") for word in argv]


def settings(base: Path, folder: Path, rng: random.Random) -> tuple[str, list[str]]:
    from config import CONFIG_FILE

    text = CONFIG_FILE.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if rng.random() < 0.3 or line.startswith("image_size")]
    laughing = rng.random() < 0.02
    text = LAUGHS + "epochs: *i\n" if laughing else damaged("\n".join(lines) + "\nimage_size: 32\nnum_frames: 4\n", rng)
    (folder / "x.yaml").write_bytes(text.encode() if laughing else text)
    return "main", ["--config", "x.yaml", "--data_dir", str(base / "data"), *HERE]


def metadata(base: Path, folder: Path, rng: random.Random, file: str = "metadata.jsonl") -> tuple[str, list[str]]:
    for split in ("train", "test"):
        (folder / "d" / split).mkdir(parents=True)
        for path in (base / "data" / split).iterdir():
            if path.is_dir():
                (folder / "d" / split / path.name).symlink_to(path)
            else:
                (folder / "d" / split / path.name).write_bytes(path.read_bytes())
    (folder / "d" / "classes.json").write_bytes((base / "data" / "classes.json").read_bytes())
    target = folder / "d" / ("classes.json" if file == "classes.json" else f"{rng.choice(('train', 'test'))}/{file}")
    target.write_bytes(damaged(target.read_bytes(), rng))
    captions = ["--use_vlm", "True", "--captioning", "True"]
    texts = ["--use_vlm", "True", "--use_text", "True"]
    if file != "classes.json" and rng.random() < 0.3:
        return "inference", [
            "--checkpoint",
            str(base / "out" / "r"),
            "--video_dir",
            str(target.parent.relative_to(folder)),
            *HERE,
        ]
    return "main", [*common.TINY, "--data_dir", "d", *HERE, *rng.choice(([], captions, texts))]


def classes(base: Path, folder: Path, rng: random.Random) -> tuple[str, list[str]]:
    return metadata(base, folder, rng, "classes.json")


def annotations(base: Path, folder: Path, rng: random.Random) -> tuple[str, list[str]]:
    form = rng.choice(list(ANNOTATIONS))
    name, text = ANNOTATIONS[form]
    (folder / name).write_bytes(damaged(text, rng))
    argv = ["--format", form, "--annotations", name, "--videos", str(base / "videos"), "--output", "out", "--no_scan"]
    if rng.random() < 0.2:
        suffix, text = rng.choice(((".txt", "1 jump\n2 run\n"), (".json", '{"jump": 1, "run": 2}')))
        (folder / f"names{suffix}").write_bytes(damaged(text, rng))
        argv += ["--class_names", f"names{suffix}"]
    return "convert_dataset", argv


def run(base: Path, folder: Path, rng: random.Random) -> tuple[str, list[str]]:
    (folder / "out" / "r").mkdir(parents=True)
    for path in (base / "out" / "r").iterdir():
        if path.name not in ("config.yaml", "metadata.json"):
            (folder / "out" / "r" / path.name).symlink_to(path)
    names = ["config.yaml", "metadata.json"]
    broken = rng.choice(names)
    for name in names:
        data = (base / "out" / "r" / name).read_bytes()
        (folder / "out" / "r" / name).write_bytes(damaged(data, rng) if name == broken else data)
    if rng.random() < 0.3:
        return "main", ["--resume", "True", "--run_name", "r", *HERE]
    return "inference", ["--checkpoint", "out/r", "--video_dir", str(base / "data" / "test" / "class_0"), *HERE]


def captions(base: Path, folder: Path, rng: random.Random) -> tuple[str, list[str]]:
    texts = {
        "r.json": '{"a": ["x y", "x"], "b": ["z"]}',
        "p.json": '{"a": "x y", "b": "z"}',
        "q.json": '{"a": "z", "b": "z"}',
    }
    if rng.random() < 0.4:
        texts["p.json"] = '{"file": "a.mp4", "caption": "x y"}\n{"file": "b.mp4", "caption": "z"}\n'
    broken = rng.choice(list(texts))
    for name, text in texts.items():
        (folder / name).write_bytes(damaged(text, rng) if name == broken else text.encode())
    return "metrics", ["--references", "r.json", "--predictions", "p.json", *rng.choice(([], ["--compare", "q.json"]))]


CASES: dict[Callable, int] = {flags: 4, settings: 4, metadata: 3, classes: 1, annotations: 4, run: 3, captions: 1}


def judge(base: Path, rng: random.Random) -> tuple[str, str]:
    import train_code
    from script import UserError

    def no_step(*_: object) -> float:
        raise UserError("stopped before the first step")

    train_code.lr_at = no_step
    (case,) = rng.choices(list(CASES), [*CASES.values()])
    name, argv = case(base, Path.cwd(), rng)
    status, out, err = common.run_here(name, argv)
    bad = common.unwanted(status, out, err)
    if Path("canary").exists():
        bad = "code run"
    if bad:
        return bad, f"{case.__name__}\n{name}.py {argv}\n{err[-9000:]}\n{out[-3000:]}"
    return "refused" if status == 2 else "ok", ""


def keep(base: Path, rng: random.Random, folder: Path) -> None:
    (case,) = rng.choices(list(CASES), [*CASES.values()])
    name, argv = case(base, folder, rng)
    (folder / "command.txt").write_text(f"{name}.py {argv}", encoding="utf-8", errors="backslashreplace")


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
                keep(base, tally.rng(case), folder)
    return tally.finish(
        ["ok", "refused", "traceback", "control characters", "long message", "hang", "memory", "code run"]
    )


if __name__ == "__main__":
    sys.exit(main())
