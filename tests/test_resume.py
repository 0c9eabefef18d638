"""A resumed run ends like an uninterrupted one, and an interrupted save leaves the old checkpoint intact."""

import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import resolved

import checkpoint
import main
import readers
import train_code
from config import ROOT
from script import UserError

JOBS = {
    "classifier": ["--use_lora_vision", "True"],  # adapters have dropout
    "captioner": ["--use_vlm", "--captioning", "--freeze_visionbackbone", "True"],
}


def flags(dataset: Path, runs: Path, *more: str) -> list[str]:
    fixed = [
        "--data_dir",
        str(dataset),
        "--output_dir",
        str(runs),
        "--run_name",
        "r",
        "--epochs",
        "4",
        "--batch_size",
        "4",
    ]
    fixed += ["--image_size", "32", "--num_frames", "4"]  # fast
    return [*fixed, "--dropout", "0.3", "--learning_rate", "1e-3", *more]


def outcome(run: Path) -> tuple[list[dict], bytes, dict]:
    """Log and metrics without times and memory, and the bytes of the weights."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    metrics = json.loads((run / "metrics.json").read_text())
    for row in [*log, metrics]:
        for key in [k for k in row if "second" in k or k == "peak_mb"]:
            del row[key]
    return log, (run / "model.safetensors").read_bytes(), metrics


def assert_same(one: Path, other: Path) -> None:
    (log, weights, metrics), (log2, weights2, metrics2) = outcome(one), outcome(other)
    assert log == log2 and metrics == metrics2 and weights == weights2


class Killed(BaseException):
    """Simulates the end of the process: nothing catches it."""


def killed_after(monkeypatch, steps: int) -> None:
    """Ends the run after `steps` optimizer steps from now, before anything more is saved."""
    count = {"steps": 0}
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        count["steps"] += 1
        if count["steps"] > steps:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


def assert_resumed_exactly(dataset: Path, folder: Path, monkeypatch, more: list[str], *stops: int) -> None:
    """A run in folder/stopped, ended after so many steps and then resumed, equals one in folder/whole."""
    assert main.main(flags(dataset, folder / "whole", *more)) == 0
    argv, resume = flags(dataset, folder / "stopped", *more), ["--resume", "True"]
    for number, steps in enumerate(stops):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_after(patch, steps)
            main.main([*argv, *resume] if number else argv)
    assert main.main([*argv, *resume]) == 0
    assert_same(folder / "whole" / "r", folder / "stopped" / "r")


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    "workers, stop_after, save_every",
    [
        pytest.param("0", 6, "0", marks=pytest.mark.slow),
        pytest.param("0", 5, "2", marks=pytest.mark.slow),
        ("2", 8, "3"),
    ],
)
def test_resumed_equals_uninterrupted(dataset, tmp_path, monkeypatch, job, workers, stop_after, save_every):
    """9 training clips in batches of 4: 3 steps per epoch, 12 in total, stopped twice."""
    more = [*JOBS[job], "--num_workers", workers, "--save_every", save_every]
    assert_resumed_exactly(dataset, tmp_path, monkeypatch, more, stop_after, 2)
    assert not (tmp_path / "stopped" / "r" / "state").exists()


def test_the_time_of_a_resumed_run_includes_that_before_it_stopped(dataset, tmp_path, monkeypatch):
    argv = flags(dataset, tmp_path, *JOBS["classifier"], "--num_workers", "0")
    clock = itertools.count(time.perf_counter(), 100.0)  # every look at it takes 100 seconds
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_code.time, "perf_counter", lambda: next(clock))
        killed_after(patch, 4)  # in the second of four epochs
        main.main(argv)
    assert main.main([*argv, "--resume", "True"]) == 0
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["seconds"] > 100


def test_a_run_may_be_evaluated_within_epochs_too(dataset, tmp_path, monkeypatch):
    """An evaluation after every second step, 3 steps in an epoch: training goes on as before it, and can be resumed."""
    train, train_one_epoch = train_code.train, train_code.train_one_epoch

    def train_with_more(model, loaders, config, accelerator, run_dir):
        def after_step(engine, save) -> None:
            if engine.progress.step % 2 == 0:
                train_code.evaluate_and_log(model, loaders, engine, config, run_dir)
                assert model.training
            save()

        def epoch(model, loader, engine) -> None:
            save = engine.after_step
            engine.after_step = lambda: after_step(engine, save)
            train_one_epoch(model, loader, engine)
            engine.after_step = save

        monkeypatch.setattr(train_code, "train_one_epoch", epoch)
        return train(model, loaders, config, accelerator, run_dir)

    monkeypatch.setattr(train_code, "train", train_with_more)
    more = [*JOBS["classifier"], "--num_workers", "0", "--save_every", "1", "--epochs", "2"]
    assert_resumed_exactly(dataset, tmp_path, monkeypatch, more, 4)
    log, _, metrics = outcome(tmp_path / "whole" / "r")
    assert [(row["epoch"], row["step"]) for row in log] == [(1, 2), (1, 3), (2, 4), (2, 6), (2, 6)]
    assert metrics["best_epoch"] == [row["epoch"] for row in log if row["best"]][-1]


def test_resuming_keeps_count_of_skipped_videos_and_of_empty_batches(dataset, tmp_path, monkeypatch):
    """Batches of one video, two of which are unreadable in training, so whole batches are skipped."""
    import VLoader

    broken = [s.path for s in VLoader.read_splits(dataset).train[:2]]
    original = VLoader.ClipDataset.pixels

    def pixels(self, sample, rng):
        if sample.path in broken:
            raise readers.ReadError(sample.path, "a bad frame")
        return original(self, sample, rng)

    monkeypatch.setattr(VLoader.ClipDataset, "pixels", pixels)
    more = [
        "--skip_unreadable",
        "True",
        "--batch_size",
        "1",
        "--epochs",
        "2",
        "--save_every",
        "1",
        "--num_workers",
        "0",
    ]
    assert main.main(flags(dataset, tmp_path / "whole", *more)) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 6)  # of 7 in an epoch of 9
        main.main(flags(dataset, tmp_path / "stopped", *more))
    assert main.main([*flags(dataset, tmp_path / "stopped", *more), "--resume", "True"]) == 0
    assert_same(tmp_path / "whole" / "r", tmp_path / "stopped" / "r")
    log, _, metrics = outcome(tmp_path / "whole" / "r")
    assert log[0]["skipped"] == len(metrics["skipped"]) == 2 and log[-1]["step"] == 14


def start(argv: list[str]) -> subprocess.Popen:
    env = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "main.py", *argv], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(file: Path, process: subprocess.Popen) -> None:
    """Waits until the process has written the file."""
    deadline = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_signal_and_then_resume(dataset, tmp_path, number):
    more = [*JOBS["classifier"], "--num_workers", "0"]
    assert main.main(flags(dataset, tmp_path / "whole", *more, "--epochs", "8")) == 0
    argv = flags(dataset, tmp_path / "stopped", *more, "--epochs", "8", "--save_every", "1")
    process = start(argv)
    wait_for(tmp_path / "stopped" / "r" / "state" / "state.safetensors", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number and "Traceback" not in err
        assert f"python main.py --resume True --run_name r --output_dir {tmp_path / 'stopped'}" in out
    assert not (tmp_path / "stopped" / "r" / "metrics.json").exists()
    assert main.main(["--resume", "True", "--run_name", "r", "--output_dir", str(tmp_path / "stopped")]) == 0
    assert_same(tmp_path / "whole" / "r", tmp_path / "stopped" / "r")


@pytest.fixture(scope="module")
def stopped_once(dataset, tmp_path_factory) -> Path:
    """The folder of a run that was stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 4)
        main.main(flags(dataset, folder, *JOBS["classifier"], "--num_workers", "0"))
    return folder / "r"


@pytest.fixture
def stopped(dataset, tmp_path, stopped_once) -> list[str]:
    """The flags of a copy of it."""
    shutil.copytree(stopped_once, tmp_path / "r")
    return flags(dataset, tmp_path, *JOBS["classifier"], "--num_workers", "0")


@pytest.mark.parametrize(
    "more, message",
    [
        (["--epochs", "5"], "--epochs 5 (it has 4)"),
        (["--learning_rate", "0.1"], "--learning_rate 0.1 (it has 0.001)"),
        (["--run_name", "other"], "is not a vidtune run"),
        (["--data_dir", "nowhere"], "no data folder"),
    ],
)
def test_resuming_with_other_options_is_refused(stopped, capsys, more, message):
    capsys.readouterr()
    assert main.main([*stopped, "--resume", "True", *more]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_resuming_on_other_data_is_refused(stopped, dataset, tmp_path, capsys):
    shutil.copytree(dataset, tmp_path / "data")
    (tmp_path / "data" / "train" / "class_0" / "video_0.pt").rename(tmp_path / "data" / "train" / "class_1" / "new.pt")
    metadata = tmp_path / "data" / "train" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"class_0/video_0.pt"', '"class_1/new.pt"'))
    assert main.main([*stopped, "--resume", "True", "--data_dir", str(tmp_path / "data")]) == 2
    assert "have changed since" in capsys.readouterr().err


def test_a_finished_run_is_not_resumed(stopped, tmp_path, capsys):
    assert main.main([*stopped, "--resume", "True"]) == 0
    (tmp_path / "r" / "state").mkdir()  # a kill at the very end
    assert main.main([*stopped, "--resume", "True"]) == 2
    assert "is finished" in capsys.readouterr().err
    assert not (tmp_path / "r" / "state").exists()


@pytest.mark.parametrize("damage", ["digest", "progress", "nothing", "optimizer", "processes"])
def test_a_damaged_or_foreign_state_is_refused(stopped, tmp_path, capsys, damage):
    file = tmp_path / "r" / checkpoint.STATE
    tensors, facts = checkpoint.read_tensors(file)
    if damage == "digest":
        content = bytearray(file.read_bytes())
        content[-1000] ^= 4
        file.write_bytes(content)
    elif damage == "progress":
        checkpoint.save_tensors(tensors, facts | {"groups": 10**6}, file)
    elif damage == "nothing":
        checkpoint.save_tensors(tensors, {}, file)
    elif damage == "optimizer":
        checkpoint.save_tensors(tensors | {"optimizer.9999.exp_avg": torch.zeros(3)}, facts, file)
    else:
        checkpoint.save_tensors(tensors | {"rng.cpu.1": torch.get_rng_state()}, facts, file)
    capsys.readouterr()
    assert main.main([*stopped, "--resume", "True"]) == 2
    err = capsys.readouterr().err
    told = {"digest": "do not match its digest", "processes": "used 2 processes; resume it with the same number"}
    assert told.get(damage, "does not hold a state of this run") in err and err.count("\n") == 1


def test_every_process_continues_its_own_random_numbers_on_its_gpu(tmp_path, monkeypatch):
    """With a false GPU in each of two processes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    saved = {}
    for process in range(2):
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda p=process: torch.tensor([p], dtype=torch.uint8))
        saved |= checkpoint.random_states(process)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save_state(tmp_path, model, optimizer, {}, saved)
    for process in range(2):
        restored = []
        monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
        checkpoint.load_state(tmp_path, model, optimizer, process, 2)
        assert [state.tolist() for state in restored] == [[process]]


def test_a_state_without_digests_is_accepted(stopped, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "r" / checkpoint.STATE
    tensors, progress = checkpoint.read_tensors(file)
    save_file(tensors, file, metadata={"progress": json.dumps(progress)})
    assert main.main([*stopped, "--resume", "True"]) == 0


# -- interrupted saves ------------------------------------------------------------------------------

OPERATIONS = [
    ("checkpoint.save_file", "before"),
    ("checkpoint.save_file", "after"),
    ("os.fsync", "before"),
    ("os.replace", "before"),
]


@pytest.mark.parametrize(
    "fault",
    [Killed, pytest.param(OSError(28, "No space left on device"), marks=pytest.mark.slow)],
    ids=["killed", "full disk"],
)
@pytest.mark.parametrize("operation, when", OPERATIONS)
def test_a_save_interrupted_at_any_operation_leaves_the_old_file_intact(
    stopped, tmp_path, monkeypatch, fault, operation, when
):
    run = tmp_path / "r"
    before = {name: (run / name).read_bytes() for name in ("model.safetensors", "state/state.safetensors")}
    module, name = operation.split(".")
    owner = checkpoint if module == "checkpoint" else os
    original = getattr(owner, name)

    def fail(*args, **kwargs):
        if when == "after":
            original(*args, **kwargs)
        raise fault

    from build_model import build_model

    config, _ = checkpoint.read_run(run)
    model = build_model(config, 3)
    optimizer = train_code.build_optimizer(model, resolved(config, model))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        for save in (
            lambda: checkpoint.save_weights(run, model, {}),
            lambda: checkpoint.save_state(run, model, optimizer, {}, {0: torch.get_rng_state()}),
        ):
            with pytest.raises(Killed if fault is Killed else UserError) as caught:
                save()
            if fault is not Killed:
                assert "safetensors: No space left on device" in str(caught.value)
    assert before == {name: (run / name).read_bytes() for name in before}
    assert main.main([*stopped, "--resume", "True"]) == 0  # leftovers of a killed save do no harm
    assert not list(run.rglob("*tmp*"))


def test_a_full_disk_is_named(tmp_path):
    """/dev/full refuses every byte: a real ENOSPC."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    folder = tmp_path / f".x.json.{platform.node()}.{os.getpid()}.tmp"
    folder.mkdir()
    (folder / "x.json").symlink_to("/dev/full")
    (tmp_path / "x.json").write_text("old")
    with pytest.raises(UserError, match=r"cannot write .*x\.json: No space left on device"):
        checkpoint.write_json({"a": 1}, tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text() == "old"


def test_processes_that_write_one_file_leave_it_intact(tmp_path):
    """As two runs do that share the records of the scan."""
    script = "import sys; from pathlib import Path; from script import replace_file\n"
    script += "for _ in range(300): replace_file(Path(sys.argv[1]), lambda p: p.write_text(1000 * sys.argv[2]))"
    command = [sys.executable, "-c", script, str(tmp_path / "file")]
    processes = [subprocess.Popen([*command, letter], cwd=ROOT, stderr=subprocess.PIPE, text=True) for letter in "abc"]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert errors == ["", "", ""]
    assert (tmp_path / "file").read_text() in {1000 * letter for letter in "abc"}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
