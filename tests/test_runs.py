"""A run's folder belongs to one process, and a run killed at any moment can be resumed with the same result."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import in_full

import checkpoint
import main
import score
from config import ROOT
from script import FileLock, UserError

FLAGS = ["--freeze_visionbackbone", "True", "--epochs", "2", "--batch_size", "4", "--num_workers", "0"]


def flags(dataset: Path, runs: Path, *more: str) -> list[str]:
    return ["--data_dir", str(dataset), "--output_dir", str(runs), "--run_name", "r", *FLAGS, *more]


def contents(run: Path) -> dict[str, object]:
    """Every file of a run: its bytes, or its numbers without times and memory; pictures by name only."""
    found: dict[str, object] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = str(path.relative_to(run))
        if name in ("log.jsonl", "metrics.json"):
            rows = (
                [json.loads(line) for line in path.read_text().split("\n") if line]
                if "log" in name
                else [json.loads(path.read_text())]
            )
            found[name] = [{k: v for k, v in row.items() if "second" not in k and k != "peak_mb"} for row in rows]
        else:
            found[name] = None if path.suffix == ".png" or name == "config.yaml" else path.read_bytes()
    return found


# -- killed anywhere --------------------------------------------------------------------------------


def killed_at(argv: list[str], target: str, call: int = 1) -> None:
    """Runs main in a child process that is killed at the n-th call of a function."""
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        return
    try:
        run_until_killed(argv, target, call)
    finally:  # whatever happens, the child must not return into pytest and run the other tests
        os._exit(7)


def run_until_killed(argv: list[str], target: str, call: int) -> None:
    calls = {"left": call}
    module, name = target.rsplit(".", 1)
    owner = sys.modules[module]
    original = getattr(owner, name)

    def kill(*args, **kwargs):
        calls["left"] -= 1
        if calls["left"] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, kill)
    main.main(argv)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("whole")
    assert main.main(flags(dataset, runs, "--controls", "True")) == 0
    return runs / "r"


MOMENTS = [
    ("runs.prepare_data", 1),
    ("train_code.save_weights", 1),
    ("os.replace", 6),
    ("train_code.final_scores", 2),
    ("runs.finish_run", 1),
]
SELDOM = [
    ("checkpoint.write_json", 1),
    ("train_code.save_state", 1),
    ("runs.draw_pictures", 1),
    ("runs.write_run_files", 1),
    ("runs.run_metadata", 1),
    ("checkpoint.write_yaml", 2),
    ("train_code.train", 1),
    ("os.fsync", 7),
    ("train_code.score_splits", 1),
    ("figures.plot_curves", 1),
    ("runs.control_scores", 1),
    ("figures.plot_occlusion", 1),
]


@pytest.mark.parametrize("target, call", [*MOMENTS, *(pytest.param(*m, marks=pytest.mark.slow) for m in SELDOM)])
def test_a_run_killed_anywhere_resumes_to_the_same_result(dataset, tmp_path, whole, target, call):
    """Even before it has saved anything. Nothing is missing or left over at the end."""
    killed_at(flags(dataset, tmp_path, "--controls", "True"), target, call)
    assert main.main(["--resume", "True", "--run_name", "r", "--output_dir", str(tmp_path)]) == 0
    assert contents(tmp_path / "r") == contents(whole)
    assert not [p for p in tmp_path.rglob("*") if "tmp" in p.name or p.name == ".lock"]


def test_a_run_killed_before_it_started_can_be_started_again(dataset, tmp_path, whole):
    killed_at(flags(dataset, tmp_path), "checkpoint.write_json")
    assert (tmp_path / "r" / "config.yaml").exists() and not (tmp_path / "r" / "metadata.json").exists()
    assert main.main(flags(dataset, tmp_path, "--controls", "True")) == 0
    assert contents(tmp_path / "r") == contents(whole)


def test_a_picture_that_fails_does_not_finish_the_run(dataset, tmp_path, monkeypatch, whole, capsys):
    import figures

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "confusion.png")

    with monkeypatch.context() as patch:
        patch.setattr(figures, "plot_confusion", full)
        assert main.main(flags(dataset, tmp_path, "--controls", "True")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: confusion.png: No space left on device"
    assert main.main(["--resume", "True", "--run_name", "r", "--output_dir", str(tmp_path)]) == 0
    assert contents(tmp_path / "r") == contents(whole)


# -- one process at a time --------------------------------------------------------------------------


def start(argv: list[str]) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "main.py", *argv],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_running_run_is_left_alone_and_free_once_it_is_killed(dataset, tmp_path, capsys):
    """Its loader workers outlive it for a moment, but do not hold its lock."""
    more = ["--use_lora_vision", "True", "--epochs", "300", "--save_every", "1", "--num_workers", "2"]
    process = start(flags(dataset, tmp_path, *more))
    state, deadline = tmp_path / "r" / "state" / "state.safetensors", time.monotonic() + 120
    while not state.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    workers = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    for other in (["--resume", "True"], ["--overwrite", "True"], []):
        assert main.main(flags(dataset, tmp_path, *more, *other)) == 2
        err = capsys.readouterr().err
        assert f"r is in use by process {process.pid} on " in err and err.count("\n") == 1
    assert process.poll() is None
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # they cannot notice that the first process has ended
    process.kill()
    process.wait()
    try:
        assert main.main(flags(dataset, tmp_path, "--overwrite", "True")) == 0
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
    assert (tmp_path / "r" / "metrics.json").exists()


@pytest.mark.slow
def test_two_starts_at_once_make_one_run(dataset, tmp_path):
    processes = [start(flags(dataset, tmp_path, "--controls", "True", "--run_name", "r")) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert sorted(p.returncode for p in processes) == [0, 2]
    (loser,) = (e for e, p in zip(errors, processes, strict=True) if p.returncode)
    assert "is in use by process" in loser or "exists: add --resume True" in loser
    with in_full():
        assert main.main(flags(dataset, tmp_path / "whole", "--controls", "True")) == 0
    assert contents(tmp_path / "r") == contents(tmp_path / "whole" / "r")


def test_a_lock_is_refused_within_one_process_and_names_its_holder(tmp_path):
    with FileLock(tmp_path / "lock", "the file"):
        with pytest.raises(UserError, match="the file is in use by this process"):
            FileLock(tmp_path / "lock", "the file")
        code = (
            "import sys; from pathlib import Path; from script import FileLock; FileLock(Path(sys.argv[1]), 'the file')"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "lock")], cwd=ROOT, capture_output=True, text=True
        )
        assert f"the file is in use by process {os.getpid()} on " in done.stderr
    assert not list(tmp_path.iterdir())
    FileLock(tmp_path / "lock", "the file").release()


def test_a_full_disk_at_the_very_start_names_the_run_and_leaves_nothing(dataset, tmp_path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_yaml", full)
    assert main.main(flags(dataset, tmp_path / "runs")) == 2
    assert f"error: cannot write {tmp_path}/runs/r: No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "runs").iterdir())


# -- what is replaced -------------------------------------------------------------------------------


def test_overwriting_removes_only_files_that_a_run_writes(dataset, tmp_path, whole):
    run = tmp_path / "disk" / "r"
    shutil.copytree(whole, run)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "r").symlink_to(run)  # a folder on another disk
    (run / "notes.txt").write_text("mine")
    shutil.copytree(whole, run / "nested")
    (run / "evaluation_old").mkdir()
    assert main.main(flags(dataset, tmp_path / "runs")) == 2
    assert main.main(flags(dataset, tmp_path / "runs", "--controls", "True", "--overwrite", "True")) == 0
    assert (run / "notes.txt").read_text() == "mine" and contents(run / "nested") == contents(whole)
    (run / "notes.txt").unlink()
    shutil.rmtree(run / "nested")
    assert contents(run) == contents(whole)


@pytest.mark.parametrize(
    "files",
    [
        {"metadata.json": "{}"},
        {"config.yaml": "lr: 1", "x": ""},
        {"model.safetensors": ""},
        {"config.yaml": "a: 1"},
        {"config.yaml": "epochs: 1"},  # options of this program, but written by hand
    ],
)
def test_a_folder_that_is_not_a_run_is_never_touched(dataset, tmp_path, capsys, files):
    (tmp_path / "r").mkdir()
    for name, text in files.items():
        (tmp_path / "r" / name).write_text(text)
    for more in ([], ["--overwrite", "True"], ["--resume", "True"]):
        assert main.main(flags(dataset, tmp_path, *more)) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "not a vidtune run" in err
    assert {p.name: p.read_text() for p in (tmp_path / "r").iterdir()} == files


@pytest.mark.parametrize(
    "change",
    [
        {"backbones": {}},
        {"class_names": 3},
        {"display_names": {}},
        {"task": None},
        {"format_version": [2]},
        {"backbones": {"vision": {"in_checkpoint": True, "fingerprint": ""}}},
    ],
)
def test_metadata_of_another_shape_is_refused(dataset, tmp_path, whole, capsys, change):
    import inference

    shutil.copytree(whole, tmp_path / "r")
    values = json.loads((whole / "metadata.json").read_text())
    (tmp_path / "r" / "metadata.json").write_text(json.dumps(values | change))
    assert inference.main(["--checkpoint", str(tmp_path / "r"), "--video_dir", str(dataset / "test")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and ("is damaged" in err or "checkpoint format [2]" in err)


# -- damaged weights --------------------------------------------------------------------------------


def test_a_flipped_bit_in_the_weights_is_noticed(dataset, tmp_path, whole, capsys):
    import inference

    shutil.copytree(whole, tmp_path / "r")
    file = tmp_path / "r" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert inference.main(["--checkpoint", str(tmp_path / "r"), "--video_dir", str(dataset / "test")]) == 2
    assert "model.safetensors is damaged: its contents do not match its digest" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling"])
def test_weights_that_are_not_a_file_are_refused(dataset, tmp_path, whole, capsys, kind):
    import inference

    shutil.copytree(whole, tmp_path / "r")
    file = tmp_path / "r" / "model.safetensors"
    file.unlink()
    {"fifo": lambda: os.mkfifo(file), "folder": file.mkdir, "dangling": lambda: file.symlink_to("nowhere")}[kind]()
    assert inference.main(["--checkpoint", str(tmp_path / "r"), "--video_dir", str(dataset / "test")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "model.safetensors" in err


@pytest.fixture(scope="module")
def trained_in_full(dataset, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("full")
    flags = ["--data_dir", str(dataset), "--output_dir", str(runs), "--run_name", "r", "--epochs", "1"]
    assert main.main([*flags, "--image_size", "16", "--num_frames", "2", "--num_workers", "0"]) == 0
    return runs / "r"


@pytest.mark.parametrize("change", ["mean", "lacking", "fifo", "patch_size"])
def test_a_run_whose_backbone_files_changed_is_refused(dataset, tmp_path, trained_in_full, capsys, change):
    """Only its vision/ folder says how to build the model and prepare clips."""
    import inference

    shutil.copytree(trained_in_full, tmp_path / "r")
    file = tmp_path / "r" / "vision" / ("config.json" if change == "patch_size" else "preprocessor_config.json")
    values = json.loads(file.read_text())
    file.unlink()
    if change == "fifo":
        os.mkfifo(file)
    elif change != "lacking":
        changed = {"mean": {"image_mean": [0.1, 0.1, 0.1]}, "patch_size": {"patch_size": 0}}[change]
        file.write_text(json.dumps(values | changed))
    capsys.readouterr()
    assert inference.main(["--checkpoint", str(tmp_path / "r"), "--video_dir", str(dataset / "test")]) == 2
    err = capsys.readouterr().err
    told = {
        "mean": "was trained with mean",
        "lacking": "was trained with",
        "fifo": "is not a file",
        "patch_size": "config.json",
    }
    assert err.count("\n") == 1 and told[change] in err


# -- scoring into another folder --------------------------------------------------------------------


def test_scores_of_a_run_go_to_a_separate_folder(dataset, tmp_path, whole, capsys):
    before = contents(whole)
    argv = ["--checkpoint", str(whole), "--data_dir", str(dataset), "--output_dir", str(tmp_path)]
    assert score.main(argv) == 0
    assert contents(whole) == before
    scores = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert scores["test"] == json.loads((whole / "metrics.json").read_text())["test"]
    assert score.main(argv) == 0  # again
    shutil.copy(whole / "metadata.json", tmp_path / "r")
    assert score.main(argv) == 2
    assert "holds another run" in capsys.readouterr().err


def test_a_provided_run_is_scored_elsewhere(dataset, tmp_path, whole, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "PROVIDED", whole.parent)
    before = contents(whole)
    assert score.main(["--checkpoint", str(whole), "--data_dir", str(dataset)]) == 2
    assert "add --output_dir" in capsys.readouterr().err
    assert score.main(["--checkpoint", str(whole), "--data_dir", str(dataset), "--output_dir", str(tmp_path)]) == 0
    assert contents(whole) == before and (tmp_path / "r" / "predictions_test.jsonl").exists()
