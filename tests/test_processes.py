"""Two processes under torchrun (gloo, CPU) train like one process with the same batches."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main
from config import ROOT
from script import read_rows

LORA = ["--vision_model", "videomae", "--use_lora_vision", "True", "--lora_r", "2"]
TEXT = ["--use_vlm", "True", "--use_text", "True", "--freeze_llmbackbone", "True"]  # BERT in training has dropout
JOBS = {
    "full": [],
    "lora": LORA,
    "frozen": ["--freeze_visionbackbone", "True"],
    "pixels": ["--freeze_visionbackbone", "True", "--cache_features", "False"],
    "text": TEXT,
    "captioner": ["--use_vlm", "True", "--captioning", "True", "--freeze_visionbackbone", "True"],
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in JOBS if name != "captioner"]


def options(dataset: Path, runs: Path) -> list[str]:
    return f"--data_dir {dataset} --output_dir {runs} --num_workers 0 --batch_size 3 --dropout 0".split()


def start(processes: int, dataset: Path, runs: Path, *flags: str) -> subprocess.Popen:
    """Starts main.py under torchrun. Batches of 3 leave a last batch of one clip, so one process gets none."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(ROOT / "main.py"), *options(dataset, runs), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("job", ["captioner", *SLOW])
def test_two_processes_give_the_log_of_one(dataset, tmp_path, job, capsys):
    """Two batches per step, and a last batch that leaves one process without a clip: counts and accuracies are equal,
    losses agree to rounding, and only one process writes and prints."""
    runs = tmp_path / "runs"
    flags = [*JOBS[job], "--gradient_accumulation_steps", "2", "--epochs", "2", "--run_name"]
    assert main.main([*options(dataset, runs), *flags, "one"]) == 0
    one = capsys.readouterr().out
    two = finish(start(2, dataset, runs, *flags, "two"))
    rows = [log_of(runs / name) for name in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        assert a["step"] == b["step"] and a.get("val_accuracy") == b.get("val_accuracy")
        assert a.get("train_accuracy") == b.get("train_accuracy")
        assert [b["train_loss"], b["val_loss"]] == pytest.approx([a["train_loss"], a["val_loss"]], rel=1e-4)
    first, second = (json.loads((runs / name / "metrics.json").read_text()) for name in ("one", "two"))
    for split, count in (("val", 3), ("test", 6)):
        assert first[split]["count"] == second[split]["count"] == count
    said = [read_rows(runs / name / "predictions_test.jsonl") for name in ("one", "two")]
    assert [row["file"] for row in said[0]] == [row["file"] for row in said[1]]
    assert two.count("epoch 1/2") == one.count("epoch 1/2") == 1
    files = [sorted(p.name for p in (runs / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_stopped_run_of_two_processes_resumes_exactly(dataset, tmp_path):
    """The head has dropout, so the random generator of every process must be restored."""
    flags = [*LORA, "--dropout", "0.1", "--epochs", "8", "--save_every", "1", "--run_name"]
    finish(start(2, dataset, tmp_path, *flags, "whole"))
    process = start(2, dataset, tmp_path, *flags, "stopped")
    state = tmp_path / "stopped" / "state" / "state.safetensors"
    while process.poll() is None and not state.is_file():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert state.is_file() and not (tmp_path / "stopped" / "metrics.json").exists()
    finish(start(2, dataset, tmp_path, *flags, "stopped", "--resume", "True"))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_inference_refuses_several_processes(dataset, tmp_path):
    finish(start(1, dataset, tmp_path, "--epochs", "1", "--freeze_visionbackbone", "True", "--run_name", "r"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(ROOT / "inference.py"),
    ]
    argv = ["--checkpoint", str(tmp_path / "r"), "--video_dir", str(dataset / "test")]
    done = subprocess.run([*command, *argv], capture_output=True, text=True)
    assert done.returncode != 0 and "inference cannot use torchrun" in done.stderr
