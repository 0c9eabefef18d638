"""Videos in tar files: the same samples, pixels, scores and answers as from folders, and nothing else is opened."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import counting_frames, read_clip, write_video
from safetensors import safe_open

import extract
import feature_cache
import inference
import main
import score
from checkpoint import PROVIDED
from extras import shards
from extras.shards import find_member, open_member
from readers import ReadError, digest, find_videos, natural_key, open_video, stamp
from script import UserError, read_rows
from VLoader import hold_out, read_folder, read_splits

TIMING = {"seconds", "clips_per_second"}


def write_tar(shard: Path, files: dict[str, bytes], **options: Any) -> Path:
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w", **options) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return shard


def as_tars(folder: Path, target: Path, per_shard: int = 4) -> Path:
    """A dataset as WebDataset has it: what metadata.jsonl says of a video is in a .json beside it."""
    for split in ("train", "val", "test"):
        videos = sorted((folder / split).rglob("*.pt"), key=natural_key)
        rows = {row["file_name"]: row for row in read_rows(folder / split / "metadata.jsonl")}
        for number, first in enumerate(range(0, len(videos), per_shard)):
            files: dict[str, bytes] = {}
            for video in videos[first : first + per_shard]:
                name = video.relative_to(folder / split).as_posix()
                files[name] = video.read_bytes()
                files[name.removesuffix(".pt") + ".json"] = json.dumps(rows[name]).encode()
            write_tar(target / split / f"{number:06d}.tar", files)
    for name in ("classes.json", "lexicon.json"):
        shutil.copy(folder / name, target / name)
    return target


@pytest.fixture(scope="module")
def tars(dataset, tmp_path_factory) -> Path:
    return as_tars(dataset, tmp_path_factory.mktemp("tars") / "synthetic_dataset")


@pytest.fixture(autouse=True)
def nothing_is_mounted(monkeypatch):
    monkeypatch.setenv(shards.MOUNTED, "{}")


def log(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(run / "log.jsonl")]


def answers(output: Path) -> list[dict]:
    """The answers, without where the video is."""
    return [{k: v for k, v in row.items() if k not in ("file", "path")} for row in read_rows(output)]


# -- the same as from folders -----------------------------------------------------------------------


def test_samples_are_those_of_the_folders(dataset, tars):
    for name in ("train", "val", "test"):
        plain, packed = read_folder(dataset / name), read_folder(tars / name)
        assert len(plain) == len(packed) > 0
        for one, other in zip(plain, packed, strict=True):
            assert (one.label, one.captions, one.text, one.objects) == (
                other.label,
                other.captions,
                other.text,
                other.objects,
            )
            assert one.identity == other.identity


@pytest.mark.parametrize(
    "extra",
    [["--freeze_visionbackbone", "True"], ["--freeze_visionbackbone", "True", "--cache_features", "False"]],
    ids=["cached", "pixels"],
)
def test_training_and_answers_are_those_of_the_folders(dataset, tars, tmp_path, extra):
    for name, data in (("plain", dataset), ("packed", tars)):
        argv = ["--data_dir", str(data), "--output_dir", str(tmp_path / name), "--run_name", "r", "--num_workers", "0"]
        assert main.main([*argv, "--epochs", "1", "--batch_size", "4", *extra]) == 0
        argv = ["--checkpoint", str(tmp_path / name / "r"), "--video_dir", str(data / "test"), "--num_workers", "0"]
        assert inference.main([*argv, "--output", str(tmp_path / f"{name}.jsonl")]) == 0
    assert log(tmp_path / "packed" / "r") == log(tmp_path / "plain" / "r")
    assert answers(tmp_path / "packed.jsonl") == answers(tmp_path / "plain.jsonl")


def test_scores_are_those_of_the_folders(dataset, tars, tmp_path):
    for name, data in (("plain", dataset), ("packed", tars)):
        argv = ["--checkpoint", str(PROVIDED / "timesformer_fvbb"), "--data_dir", str(data), "--num_workers", "0"]
        assert score.main([*argv, "--output_dir", str(tmp_path / name)]) == 0
    found = [next((tmp_path / name).rglob("metrics.json")) for name in ("plain", "packed")]
    plain, packed = (json.loads(path.read_text()) for path in found)
    assert packed["test"] == plain["test"] and packed["test"]["count"] == 6


def test_features_of_files_serve_their_tars_and_the_other_way_round(dataset, tars, tmp_path, capsys):
    flags = ["--freeze_visionbackbone", "True", "--output_dir", str(tmp_path), "--num_workers", "0"]
    assert extract.main([*flags, "--data_dir", str(tars)]) == 0
    assert "computed 18 of 18" in capsys.readouterr().out
    assert extract.main([*flags, "--data_dir", str(dataset)]) == 0
    assert "computed 0 of 18" in capsys.readouterr().out
    assert extract.main([*flags, "--data_dir", str(tars)]) == 0
    assert "computed 0 of 18" in capsys.readouterr().out

    # and they travel without the tars
    pack = tmp_path / "pack"
    argv = ["pack", "--data_dir", str(tars), "--cache_dir", str(tmp_path / ".features"), "--output", str(pack)]
    assert feature_cache.main(argv) == 0
    alone, cache = tmp_path / "alone", tmp_path / "cache"
    assert feature_cache.main(["merge", str(pack), "--data_dir", str(alone), "--cache_dir", str(cache)]) == 0
    argv = ["--data_dir", str(alone), "--output_dir", str(tmp_path / "o"), "--cache_dir", str(cache), "--epochs", "1"]
    assert main.main([*argv, "--freeze_visionbackbone", "True", "--num_workers", "0"]) == 0


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".avi", ".gif"])
def test_pixels_are_those_of_the_file(tmp_path, suffix):
    """Also where the decoder must seek, open the file again, or read it twice."""
    codec = {".avi": "mpeg4", ".gif": "gif"}.get(suffix, "libx264")
    if codec == "gif":
        pytest.importorskip("PIL")
        from PIL import Image

        video = tmp_path / "a.gif"
        frames = [Image.fromarray(frame) for frame in counting_frames(12)]
        frames[0].save(video, save_all=True, append_images=frames[1:], duration=100)
    else:
        video = write_video(tmp_path / f"a{suffix}", counting_frames(40), codec)
    shard = write_tar(tmp_path / "0.tar", {"x.txt": b"before", f"v/a{suffix}": video.read_bytes(), "y.txt": b"after"})
    packed = shard / "v" / f"a{suffix}"
    assert find_videos(tmp_path) == sorted([packed, video], key=str)
    assert torch.equal(read_clip(packed, 8), read_clip(video, 8))
    assert torch.equal(
        read_clip(packed, 8, rng=np.random.default_rng(1)), read_clip(video, 8, rng=np.random.default_rng(1))
    )
    assert digest(packed) == digest(video)
    reader = open_video(packed)
    assert torch.equal(reader.frames([9, 2, 5]), open_video(video).frames([9, 2, 5]))


def test_real_clips_are_those_of_the_files(real_data, tmp_path):
    clips = [path for path in (real_data / "clips").iterdir() if path.suffix != ".pt"]
    files = {path.name: path.read_bytes() for path in clips}
    shard = write_tar(tmp_path / "0.tar", files)
    for path in clips:
        outcomes = []
        for place in (path, shard / path.name):
            try:
                outcomes.append(read_clip(place, 8))
            except ReadError as error:
                outcomes.append(str(error).replace(str(place), "FILE"))
        one, other = outcomes
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, path


def test_tar_itself_makes_shards(dataset, tmp_path):
    """tar -cf train/0.tar -C my_clips/train . : class folders in the tar, metadata.jsonl beside it."""
    for name in ("train", "val", "test"):
        (tmp_path / name).mkdir()
        command = [
            "tar",
            "--exclude=metadata.jsonl",
            "-C",
            str(dataset / name),
            "-cf",
            str(tmp_path / name / "0.tar"),
            ".",
        ]
        subprocess.run(command, check=True)
    plain, packed = read_splits(dataset), read_splits(tmp_path)
    assert [s.label for s in packed.train] == [s.label for s in plain.train] and packed.class_names == plain.class_names
    text = (dataset / "train" / "metadata.jsonl").read_text()
    (tmp_path / "train" / "metadata.jsonl").write_text(text.replace('"file_name": "', '"file_name": "0.tar/'))
    assert [s.captions for s in read_splits(tmp_path).train] == [s.captions for s in plain.train]


def test_the_held_out_val_is_that_of_the_folders(dataset, tars):
    plain, packed = (hold_out(read_folder(data / "train"), data / "train")[1] for data in (dataset, tars))
    assert [s.identity for s in plain] == [s.identity for s in packed]


# -- descriptions -----------------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path) -> bytes:
    torch.save(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), tmp_path / "clip.pt")
    content = (tmp_path / "clip.pt").read_bytes()
    (tmp_path / "clip.pt").unlink()
    return content


def test_labels_captions_and_segments_of_webdataset(tmp_path, clip):
    segments = [{"start": 0, "end": 1, "fps": 2, "label": "x"}, {"start": 1, "end": 2, "fps": 2, "label": "y"}]
    files = {
        "0.pt": clip, "0.cls": b"7\n",
        "1.pt": clip, "1.cls": b"run", "1.txt": "läuft\n".encode(), "1.json": b'{"text": "t", "group": "g", "caption": null}',
        "2.pt": clip, "2.json": json.dumps(segments).encode(), "2.cls": b"z",
        "3.pt": clip, "3.json": b'{"labels": ["a", "b"]}', "3.cls": b"a",
        "d/4.video.pt": clip, "d/4.json": b'{"caption": ["c", "d"], "file_name": "/etc/passwd", "video_digest": "' + b"0" * 32 + b'"}',
        "._5.pt": b"finder", "5.jpg": b"", ".hidden/6.pt": b"",
    }  # fmt: skip
    write_tar(tmp_path / "s" / "0.tar", files)
    found = read_folder(tmp_path / "s")
    assert [(s.path.name, s.label, s.captions, s.text, s.group) for s in found] == [
        ("0.pt", "7", (), None, None),
        ("1.pt", "run", ("läuft",), "t", "g"),
        ("2.pt", "x", (), None, None),
        ("2.pt", "y", (), None, None),
        ("3.pt", None, (), None, None),
        ("4.video.pt", "d", ("c", "d"), None, None),
    ]
    assert found[4].labels == ("a", "b") and found[2].segment.end == 1
    assert all(s.digest is None for s in found)  # not for a tar to say
    write_tar(tmp_path / "c" / "jump" / "0.tar", {"0.pt": clip, "1.pt": clip, "1.cls": b"run"})
    assert [s.label for s in read_folder(tmp_path / "c")] == ["jump", "run"]
    assert [s.label for s in read_folder(tmp_path / "s" / "0.tar")][:2] == ["7", "run"]  # as --video_dir


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", b"{", "a.json: not JSON"),
        ("a.json", b"[1]", "a.json: expected an object"),
        ("a.json", b"[" * 100_000, "a.json: not JSON"),
        ("a.json", b'{"label": 3}', "label must be a string"),
        ("a.json", b'{"start": 3}', "start"),
        ("a.txt", b"\xff", "cannot read {shard}/a.txt"),
        ("a.cls", b" " * (2**20 + 1), "at most 1048576"),
    ],
)
def test_a_bad_description_is_named(tmp_path, clip, name, content, problem):
    shard = write_tar(tmp_path / "0.tar", {"a.pt": clip, name: content})
    with pytest.raises(UserError) as error:
        read_folder(tmp_path)
    assert problem.format(shard=shard) in str(error.value) and "0.tar" in str(error.value)


# -- hostile tars -----------------------------------------------------------------------------------


def entry(name: str, size: int = 0, **facts: Any) -> bytes:
    """A header."""
    info = tarfile.TarInfo(name)
    info.size = size
    for fact, value in facts.items():
        setattr(info, fact, value)
    return info.tobuf(tarfile.GNU_FORMAT)


END = bytes(1024)


def pax(records: bytes) -> bytes:
    return entry("x", len(records), type=tarfile.XHDTYPE) + records.ljust(512, b"\0")


def record(key: str, value: str) -> bytes:
    text = f" {key}={value}\n"
    length = next(n for n in range(len(text), len(text) + 5) if len(str(n)) + len(text) == n)
    return f"{length}{text}".encode()


HOSTILE = {
    "empty": (b"", "no end mark"),
    "not a tar": (b"x" * 2048, "not an uncompressed tar"),
    "truncated": (entry("a.pt", 4000) + bytes(1000), "no end mark"),
    "no end": (entry("a.pt", 3) + bytes(512), "no end mark"),
    "huge size": (entry("a.pt", 2**40) + END, "no end mark"),
    "huger size": (pax(record("size", "9" * 20)) + entry("a.pt") + END, "no end mark"),
    "negative size": (entry("a.pt", -1024) + END, "damaged or sparse"),
    "negative size in pax": (pax(record("size", "-1024")) + entry("a.pt") + END, "damaged or sparse"),
    "huge header": (entry("x", 2**30, type=tarfile.XHDTYPE) + END, "a header of"),
    "bad pax": (pax(b"99999999999 path=x\n") + entry("a.pt") + END, "bad extended header"),
    "endless pax": (pax(b"0 path=x\n") + entry("a.pt") + END, "bad extended header"),
    "sparse": (entry("a.pt", type=tarfile.GNUTYPE_SPARSE) + END, "sparse"),
    "incremental": (entry("a", type=b"D") + END, "incremental tars cannot be read"),
    "sparse in pax": (pax(record("GNU.sparse.major", "1")) + entry("a.pt") + END, "sparse"),
    "damaged": (entry("a.pt") + b"y" * 512 + END, "damaged at byte 512"),
    "outside": (entry("../a.pt") + END, "outside"),
    "outside in pax": (pax(record("path", "x/../../a.pt")) + entry("a.pt") + END, "outside"),
    "absolute": (entry("/etc/a.pt") + END, "outside"),
    "NUL": (pax(record("path", "a\0b.pt")) + entry("a.pt") + END, "outside"),
    "twice": (entry("a.pt") + entry("./a.pt") + END, "appears twice"),
    "two videos": (entry("a.mp4") + entry("a.b.mp4") + END, "the same key"),
    "metadata": (entry("metadata.jsonl") + entry("a.mp4") + END, "put that beside it"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tar_is_an_error_of_one_line(tmp_path, capsys, case):
    content, problem = HOSTILE[case]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.tar").write_bytes(content)
    assert main.main(["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: cannot read") and err.count("\n") == 1 and problem in err and "0.tar" in err


def test_links_and_devices_are_ignored_and_named(tmp_path, clip, capsys):
    secret = tmp_path / "secret.pt"
    secret.write_bytes(clip)
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
    content = b"".join(entry(f"{n}.pt", type=kind, linkname=str(secret)) for n, kind in enumerate(kinds))
    content += entry("good.pt", len(clip)) + clip.ljust(-(-len(clip) // 512) * 512, b"\0") + END
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "0.tar").write_bytes(content)
    assert [s.path.name for s in read_folder(tmp_path / "s")] == ["good.pt"]
    assert "ignored in" in capsys.readouterr().out
    with pytest.raises(ReadError, match="no such file in"):
        open_video(tmp_path / "s" / "0.tar" / "0.pt")
    for path in ("../secret.pt", "../../secret.pt", str(secret).lstrip("/")):
        with pytest.raises(ReadError):
            open_video(tmp_path / "s" / "0.tar" / path)


def test_a_broken_video_in_a_tar_is_skipped_and_named(tars, tmp_path, capsys):
    shutil.copytree(tars, tmp_path / "data")
    with tarfile.open(tmp_path / "data" / "train" / "000009.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("class_0/empty.pt"))
    argv = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "o"), "--epochs", "1"]
    argv += ["--freeze_visionbackbone", "True", "--num_workers", "0", "--run_name", "r"]
    assert main.main(argv) == 2
    assert "000009.tar/class_0/empty.pt: the file is empty" in capsys.readouterr().err
    # a tar that was written again is read again
    before = stamp(tmp_path / "data" / "train" / "000000.tar" / "class_0" / "video_0.pt")
    os.utime(tmp_path / "data" / "train" / "000000.tar", (1, 1))
    assert stamp(tmp_path / "data" / "train" / "000000.tar" / "class_0" / "video_0.pt") != before


def test_a_playlist_in_a_tar_opens_nothing(tmp_path, monkeypatch):
    """FFmpeg would open the file that it names, in the working directory."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("secret.ts")
    opened: list[None] = []
    threading.Thread(target=lambda: opened.append(os.close(os.open("secret.ts", os.O_WRONLY))), daemon=True).start()
    shard = write_tar(tmp_path / "0.tar", {"a.mp4": b"ffconcat version 1.0\nfile secret.ts\nduration 1\n"})
    with pytest.raises(ReadError):
        open_video(shard / "a.mp4")
    time.sleep(0.1)
    assert not opened
    os.close(os.open("secret.ts", os.O_RDONLY | os.O_NONBLOCK))  # lets the thread end


def test_long_and_odd_names(tmp_path, clip):
    names = ["x" * 90 + "/" + "y" * 200 + ".pt", "ä ö/😀.pt", "a.tar/b.pt", "n\nl.pt"]
    for index, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        shard = write_tar(tmp_path / f"{index}.tar", dict.fromkeys(names, clip), format=form)
        assert {p.relative_to(shard).as_posix() for p in find_videos(shard)} == {*names}
        assert all(len(open_video(shard / name)) == 4 for name in names)
    (tmp_path / "d" / "old.tar").mkdir(parents=True)  # a folder, whatever its name
    (tmp_path / "d" / "old.tar" / "a.pt").write_bytes(clip)
    assert [s.label for s in read_folder(tmp_path / "d")] == ["old.tar"]


def test_a_slice_reads_like_the_file(tmp_path):
    content = bytes(range(256)) * 40
    shard = write_tar(tmp_path / "0.tar", {"a.bin": b"z" * 700, "b.bin": content, "c.bin": b"y"})
    with open_member(find_member(shard / "b.bin")) as file:
        assert file.read() == content and file.read(5) == b""
        assert file.seek(-6, os.SEEK_END) == len(content) - 6 and file.read(100) == content[-6:]
        assert file.seek(10) == 10 and file.read(5) == content[10:15]
        assert file.seek(3, os.SEEK_CUR) == 18 and file.read(2) == content[18:20]
        assert file.seek(len(content) + 9) and file.read(2) == b""


# -- remote folders ---------------------------------------------------------------------------------


@pytest.fixture
def remote(tars) -> Any:
    """The dataset at memory://data."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for path in tars.rglob("*.*"):
        system.pipe_file(f"/data/{path.relative_to(tars).as_posix()}", path.read_bytes())
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def remote_flags(folder: Path, url: str = "memory://data") -> list[str]:
    argv = ["--data_dir", url, "--output_dir", str(folder), "--run_name", "r", "--num_workers", "0", "--epochs", "1"]
    return [*argv, "--freeze_visionbackbone", "True"]


def test_a_remote_folder_trains_like_a_local_one(remote, tars, tmp_path, monkeypatch):
    fetched = count_fetches(remote, monkeypatch)
    assert main.main(remote_flags(tmp_path / "remote")) == 0
    assert main.main(remote_flags(tmp_path / "local", str(tars))) == 0
    assert log(tmp_path / "remote" / "r") == log(tmp_path / "local" / "r")
    assert len(fetched) == 2 * 18 + 6  # for the digests, for the features, and for worst.png
    (folder,) = (tmp_path / "remote" / ".shards").iterdir()
    packed = sum(path.stat().st_size for path in tars.rglob("*.tar"))
    assert sum(path.stat().st_blocks * 512 for path in folder.rglob("*.tar")) < packed / 10

    # another start reads only what has changed
    monkeypatch.setenv(shards.MOUNTED, "{}")
    opened: list[str] = []
    original = type(remote).open
    monkeypatch.setattr(
        type(remote), "open", lambda self, path, *a, **k: (opened.append(path), original(self, path, *a, **k))[1]
    )
    remote.pipe_file("/data/train/000000.tar", (tars / "train" / "000000.tar").read_bytes() + bytes(512))
    remote.rm("/data/test/000000.tar")
    assert main.main([*remote_flags(tmp_path / "remote"), "--overwrite", "True"]) == 0
    assert {*opened} == {"/data/train/000000.tar"}
    assert sorted(path.name for path in (folder / "test").glob("*.tar")) == ["000001.tar"]


def count_fetches(system: Any, monkeypatch) -> list[str]:
    fetched: list[str] = []
    original: Callable = type(system).cat_file
    monkeypatch.setattr(
        type(system), "cat_file", lambda self, path, **k: (fetched.append(path), original(self, path, **k))[1]
    )
    return fetched


def test_workers_and_processes_read_a_remote_folder(remote, tmp_path):
    argv = remote_flags(tmp_path)
    argv[argv.index("--num_workers") + 1] = "2"
    assert main.main([*argv, "--cache_features", "False"]) == 0


def test_only_a_typed_url_is_read(remote, tmp_path, capsys, monkeypatch, clip):
    fetched = count_fetches(remote, monkeypatch)
    argv = remote_flags(tmp_path / "r")
    assert main.main(argv) == 0
    capsys.readouterr()
    # a run's folder may come from others: its config.yaml names a URL that nobody typed
    monkeypatch.setenv(shards.MOUNTED, "{}")
    monkeypatch.setattr(shards, "TYPED", set())
    fetched.clear()
    assert score.main(["--checkpoint", str(tmp_path / "r" / "r")]) == 2
    assert (
        capsys.readouterr().err
        == "error: memory://data is only read when given as a flag: add --data_dir memory://data\n"
    )
    # so may metadata and tars
    for name in (
        "memory://data/train/000000.tar/class_0/video_0.pt",
        "memory:/data/train/000000.tar/class_0/video_0.pt",
    ):
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / "metadata.jsonl").write_text(json.dumps({"file_name": name, "label": "a"}))
        monkeypatch.chdir(tmp_path / "m")
        for folder in (Path(), tmp_path / "m"):
            with pytest.raises(UserError, match="missing file"):
                read_folder(folder)
    write_tar(tmp_path / "t" / "0.tar", {"memory:/data/a.pt": clip})
    assert len(open_video(read_folder(tmp_path / "t")[0].path)) == 4
    assert fetched == []


@pytest.mark.parametrize(
    ("url", "problem"),
    [("memory://nothing", "no tar files in memory://nothing"), ("s3://bucket/x", "needs another package")],
)
def test_a_remote_folder_that_cannot_be_read_is_one_line(remote, tmp_path, capsys, monkeypatch, url, problem):
    if url.startswith("s3"):
        monkeypatch.setitem(sys.modules, "s3fs", None)
    assert main.main(remote_flags(tmp_path, url)) == 2
    err = capsys.readouterr().err
    assert problem in err and err.splitlines()[-1].startswith("error: ")


def test_a_truncated_remote_tar_is_one_line(remote, tmp_path, capsys):
    remote.pipe_file("/data/test/000000.tar", remote.cat_file("/data/test/000000.tar")[:-11000])
    assert main.main(remote_flags(tmp_path)) == 2
    err = capsys.readouterr().err
    assert "no end mark" in err and err.count("\n") == 1
    assert not [*tmp_path.rglob("*.tmp")]


def test_features_of_a_remote_folder_are_those_of_the_local_one(remote, tars, tmp_path):
    """The job and its shards have the same names on every machine."""
    for name, url in (("remote", "memory://data"), ("local", str(tars))):
        argv = ["--freeze_visionbackbone", "True", "--output_dir", str(tmp_path / name), "--num_workers", "0"]
        assert extract.main([*argv, "--data_dir", url]) == 0
    paths = [{p.name: p for p in (tmp_path / name).glob(".features/*/*.safetensors")} for name in ("remote", "local")]
    assert paths[0].keys() == paths[1].keys()
    for name, path in paths[0].items():
        assert path.read_bytes() == paths[1][name].read_bytes()
        with safe_open(path, framework="np") as shard:
            assert len(shard.get_tensor("ids")) == 18
