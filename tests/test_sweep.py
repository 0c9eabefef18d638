"""The sweep of heads: each head is the one that main.py trains alone, val picks, and the best is an ordinary run."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume import Killed, killed_after

import inference
import main
import runs
import score
import sweep_heads
import train_code
from checkpoint import RUN_FILES, list_runs
from config import ROOT, Config, parse
from script import read_rows

NAME = "timesformer_fvbb_sweep"
GRID = ["--heads", "linear", "attentive", "--learning_rates", "3e-4", "0.1", "--weight_decays", "0.5"]


def common(dataset: Path, folder: Path) -> list[str]:
    """Options that differ from their defaults, so that one that is not passed on shows. Dropout is high, so that
    another random stream shows."""
    flags = ["--data_dir", str(dataset), "--output_dir", str(folder), "--num_workers", "0", "--epochs", "4"]
    flags += ["--dropout", "0.4", "--seed", "5", "--label_smoothing", "0.1", "--class_balance", "True"]
    return [*flags, "--patience", "1", "--batch_size", "3", "--gradient_accumulation_steps", "2"]


def sweep(dataset: Path, folder: Path, *flags: str) -> int:
    return sweep_heads.main([*common(dataset, folder), *GRID, *flags])


@pytest.fixture(scope="module")
def swept(dataset, tmp_path_factory) -> tuple[Path, list[sweep_heads.Candidate], list[str]]:
    """(the folder of the finished run, all heads, the splits that were evaluated, in order)."""
    folder, heads, splits = tmp_path_factory.mktemp("sweep"), [], []
    keep_best, evaluate = sweep_heads.keep_best, train_code.evaluate

    def noted(model, loader, accelerator, desc="val"):
        splits.append(desc)
        return evaluate(model, loader, accelerator, desc)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_heads, "keep_best", lambda found, *rest: (heads.extend(found), keep_best(found, *rest)))
        patch.setattr(train_code, "evaluate", noted)
        assert sweep(dataset, folder) == 0
    return folder / NAME, heads, splits


@pytest.mark.parametrize("head", ["linear", "attentive"])
@pytest.mark.parametrize("rate", [3e-4, 0.1])
def test_each_head_is_the_one_that_main_trains_alone(swept, dataset, tmp_path, head, rate):
    """Same initial weights, dropout, order of clips, schedule, clipping, best epoch and patience."""
    flags = ["--freeze_visionbackbone", "True", "--run_name", "alone", "--head", head, "--weight_decay", "0.5"]
    assert main.main([*common(dataset, tmp_path), *flags, "--learning_rate", str(rate)]) == 0
    (found,) = [c for c in swept[1] if (c.run.config.head, c.run.config.learning_rate) == (head, rate)]

    alone = load_file(tmp_path / "alone" / "model.safetensors")
    assert found.best.keys() == alone.keys()
    assert all(torch.allclose(found.best[name], tensor, rtol=0, atol=1e-5) for name, tensor in alone.items())
    columns = ("epoch", "step", "best", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
    for own, row in zip(found.engine.progress.log, read_rows(tmp_path / "alone" / "log.jsonl"), strict=True):
        assert [own[c] for c in columns] == pytest.approx([row[c] for c in columns], abs=1e-5)


def test_the_best_on_val_is_kept_and_it_alone_is_scored_on_test(swept):
    folder, heads, splits = swept
    best = max(heads, key=lambda c: max((row["val_accuracy"], -row["val_loss"]) for row in c.engine.progress.log))
    kept = load_file(folder / "model.safetensors")
    assert all(torch.equal(best.best[name], tensor) for name, tensor in kept.items())
    assert splits.count("test") == 1 and splits.index("test") > len(heads)

    # the table lists every head, with the scores of the run for the first
    rows, metrics = (json.loads((folder / name).read_text()) for name in ("sweep.json", "metrics.json"))
    assert [row["val_accuracy"] for row in rows] == sorted((row["val_accuracy"] for row in rows), reverse=True)
    names = ("head", "learning_rate", "weight_decay")
    assert {tuple(row[name] for name in names) for row in rows} == {
        (head, rate, 0.5) for head in ("linear", "attentive") for rate in (3e-4, 0.1)
    }
    assert tuple(rows[0][name] for name in names) == tuple(getattr(best.run.config, name) for name in names)
    assert rows[0]["epoch"] == metrics["best_epoch"] and rows[0]["val_accuracy"] == metrics["val"]["accuracy"]
    assert [rows[0]["low"], rows[0]["high"]] == metrics["val"]["intervals"]["accuracy"]
    with (folder / "sweep.csv").open(newline="") as file:
        assert [row | {} for row in csv.DictReader(file)] == [{k: str(v) for k, v in row.items()} for row in rows]


def test_the_best_head_is_an_ordinary_run(swept, dataset, tmp_path, capsys):
    folder, *_ = swept
    assert {path.name for path in folder.iterdir()} <= RUN_FILES
    output = tmp_path / "out.jsonl"
    argv = ["--checkpoint", str(folder), "--video_dir", str(dataset / "test"), "--output", str(output)]
    assert inference.main(argv) == 0
    predicted = {Path(row["file"]).parts[-2:]: row for row in read_rows(output)}
    expected = {Path(row["file"]).parts[-2:]: row for row in read_rows(folder / "predictions_test.jsonl")}
    assert predicted.keys() == expected.keys() and len(expected) == 6
    for name, row in expected.items():
        assert predicted[name]["label"] == row["label"]
        assert predicted[name]["score"] == pytest.approx(row["score"], abs=2e-3)  # cached features are fp16

    # score.py finds the same scores, and from the same features
    before = json.loads((folder / "metrics.json").read_text())["test"]
    capsys.readouterr()
    assert score.main(["--checkpoint", str(folder), "--num_workers", "0"]) == 0
    after = json.loads((folder / "metrics.json").read_text())["test"]
    assert after["accuracy"] == before["accuracy"] and after["loss"] == pytest.approx(before["loss"], abs=1e-6)
    assert "feature cache: 9 of 9 videos" in capsys.readouterr().out


def test_a_head_that_diverges_loses_and_the_others_go_on(dataset, tmp_path, capsys):
    flags = ["--heads", "linear", "--learning_rates", "1e38", "1e-3", "--run_name", "r"]
    assert sweep_heads.main([*common(dataset, tmp_path), *flags, "--weight_decays", "0"]) == 0
    assert "1e+38             0   diverged" in capsys.readouterr().out
    rows = json.loads((tmp_path / "r" / "sweep.json").read_text())
    assert [row["learning_rate"] for row in rows] == [1e-3, 1e38] and rows[1]["val_accuracy"] is None
    flags = ["--heads", "linear", "--learning_rates", "1e38", "--run_name", "other"]
    assert sweep_heads.main([*common(dataset, tmp_path), *flags]) == 2
    assert "every head has diverged: lower --learning_rates" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_an_interrupted_sweep_leaves_nothing_or_the_run_that_was_there(dataset, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        killed_after(patch, 5)
        with pytest.raises(Killed):
            sweep(dataset, tmp_path)
        assert not (tmp_path / NAME).exists()
    with monkeypatch.context() as patch:
        patch.setattr(train_code, "evaluate_epoch", interrupted)
        assert sweep(dataset, tmp_path) == 130 and not (tmp_path / NAME).exists()
    assert sweep(dataset, tmp_path, "--heads", "linear") == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / NAME).iterdir() if path.is_file()}
    assert sweep(dataset, tmp_path) == 2
    with monkeypatch.context() as patch:
        patch.setattr(train_code, "evaluate_epoch", interrupted)
        assert sweep(dataset, tmp_path, "--overwrite", "True") == 130
    assert files == {path.name: path.read_bytes() for path in (tmp_path / NAME).iterdir() if path.is_file()}


def test_a_sweep_that_stops_while_it_writes_is_unfinished_and_main_can_resume_it(swept, dataset, tmp_path, monkeypatch):
    """Its folder holds the options of the best head, so that main.py trains the same head again."""

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(runs, "finish", killed)
        with pytest.raises(Killed):
            sweep(dataset, tmp_path)
    assert not (tmp_path / NAME / "metrics.json").exists()
    assert main.main(["--resume", "True", "--run_name", NAME, "--output_dir", str(tmp_path)]) == 0
    weights = (swept[0] / "model.safetensors").read_bytes()
    assert (tmp_path / NAME / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_killed_sweep_can_be_started_again(dataset, tmp_path):
    argv = [sys.executable, "sweep_heads.py", *common(dataset, tmp_path), *GRID, "--epochs", "100000"]
    process = subprocess.Popen([*argv, "--patience", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert any(line.startswith("epoch 2/") for line in process.stdout)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list_runs(tmp_path) and (tmp_path / NAME / "config.yaml").exists()
    assert sweep(dataset, tmp_path) == 0 and len(list_runs(tmp_path)) == 1


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--use_vlm", "True"], "leave out --use_vlm: a sweep trains heads of video classifiers"),
        (["--use_lora_vision", "True"], "leave out --use_lora_vision: "),
        (["--augment", "light"], "leave out --augment: "),
        (["--cache_features", "False"], "leave out --cache_features: "),
        (["--resume", "True"], "leave out --resume: "),
        (["--freeze_visionbackbone", "False"], "of a frozen backbone"),
        (["--head", "linear"], "--head: use --heads"),
        (["--learning_rate", "1e-3"], "--learning_rate: use --learning_rates"),
        (["--heads", "linear", "conv"], "each linear or attentive, not 'linear conv'"),
        (["--learning_rates", "1e-3", "0"], "each a number above 0, not '1e-3 0'"),
        (["--learning_rates", "1e-3,1e-4"], "one or more values with spaces between them"),
        (["--weight_decays"], "expected at least one argument"),
        (["--top_k", "3"], "is an option of inference.py, not of sweep_heads.py"),
        (["--data_dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(flags, words, dataset, tmp_path, capsys):
    assert sweep_heads.main([*common(dataset, tmp_path / "runs"), *flags]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_several_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sweep_heads.main([]) == 2
    assert "start it without torchrun" in capsys.readouterr().err


def test_lists_come_from_flags_or_a_yaml_file(tmp_path):
    (tmp_path / "c.yaml").write_text("heads: linear\nlearning_rates: 1e-3 1e-3 3e-3\n")
    config, _ = parse(["--config", str(tmp_path / "c.yaml"), "--weight_decays", "0", "0.1"], "sweep_heads")
    assert (config.heads, config.learning_rates, config.weight_decays) == ("linear", "0.001 0.003", "0.0 0.1")
    assert parse([], "sweep_heads")[0] == Config()
