"""plan.py: what its trials measure, the commands it prints, and trials that fail."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest

import plan
from config import ROOT, Config, parse, training_mode
from script import UserError


@pytest.mark.parametrize("in_file", ["", "freeze_visionbackbone: true", "use_lora_vision: true"])
def test_the_commands_train_in_their_mode_with_the_other_flags_as_typed(tmp_path, in_file):
    (tmp_path / "c.yaml").write_text(in_file)
    argv = ["--data_dir", "my clips", "--use_lora_vision", "True", "--freeze_visionbackbone", "--epochs=3", "--use_vlm"]
    argv += ["--config", str(tmp_path / "c.yaml")]
    for mode, expected in (("frozen", "frozen"), ("LoRA", "lora"), ("in full", "full")):
        program, script, *flags = shlex.split(plan.command(argv, mode))
        assert (program, script) == ("python", "main.py")
        config, _ = parse(flags, "main")
        assert training_mode(config)["vision"] == expected
        assert (config.data_dir, config.epochs, config.use_vlm) == ("my clips", 3, True)


@pytest.mark.parametrize("mode", ["frozen", "in full"])
def test_a_trial_makes_steps_of_the_real_training_and_leaves_nothing(dataset, tmp_path, monkeypatch, mode):
    import train_code

    sizes = []
    step = train_code.train_step
    monkeypatch.setattr(train_code, "train_step", lambda *args: sizes.append(len(args[1][0]["index"])) or step(*args))
    monkeypatch.setattr(plan, "TRIAL_SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)
    config = Config(data_dir=str(dataset), epochs=7, batch_size=4, num_workers=0)
    found = plan.try_training(replace(config, **plan.MODES[mode]), time.time())
    assert found.epochs == 7 and found.videos == "9 train, 3 val, 6 test"
    assert found.total == pytest.approx(found.once + 7 * found.epoch + found.scores)
    assert {*sizes} == {4, 1}  # 9 videos
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["frozen", "in full"])
def test_a_trial_treats_an_unreadable_video_as_a_run_does(dataset, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(plan, "TRIAL_SECONDS", 0.1)
    data = shutil.copytree(dataset, tmp_path / "data")
    damaged = min((data / "val").rglob("*.pt"))
    damaged.write_bytes(b"damaged")
    config = replace(Config(data_dir=str(data), batch_size=4, num_workers=0), **plan.MODES[mode])
    with pytest.raises(UserError, match=damaged.name):
        plan.try_training(config, time.time())
    assert plan.try_training(replace(config, skip_unreadable=True), time.time()).videos == "9 train, 3 val, 6 test"


def die(config, started, sender):
    """Stands in for a trial that the system stops."""
    os._exit(9)


def test_a_trial_that_is_killed_says_so(monkeypatch):
    monkeypatch.setattr(plan, "send_trial", die)
    assert "killed (exit status 9)" in plan.try_in_process(Config())


def test_what_does_not_fit_is_said_and_gets_no_command(monkeypatch, capsys):
    def estimate(config: Config) -> plan.Estimate | str:
        memory = {"frozen": 100.0, "lora": 3000.0}.get(training_mode(config)["vision"])
        if memory is None:
            return "out of memory: lower --batch_size"
        return plan.Estimate(10, "9 train, 3 val, 6 test", memory, 2000.0, 5.0, 2.0, 1.0, 30.0)

    monkeypatch.setattr(plan, "try_in_process", estimate)
    assert plan.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    (frozen,), (lora,), (full,) = ([x for x in lines if x.startswith(f"{mode} ")] for mode in plan.MODES)
    assert frozen.split() == ["frozen", "0.10", "GB", "yes", "30", "5.0", "s", "2.0", "s", "10", "26", "s"]
    assert " no " in lora and full.endswith("out of memory: lower --batch_size")
    assert [x for x in lines if "main.py" in x] == ["frozen: python main.py --freeze_visionbackbone True"]


def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    def refuse(config: Config) -> str:
        with pytest.raises(UserError) as error:
            plan.try_training(config, time.time())
        return str(error.value)

    monkeypatch.setattr(plan, "try_in_process", refuse)
    assert plan.main(["--data_dir", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: no data folder {tmp_path / 'nothing'}"


@pytest.mark.slow
def test_the_memory_is_that_of_a_run(dataset, tmp_path):
    flags = ["--data_dir", str(dataset), "--num_workers", "0", "--epochs", "2", "--vision_model", "videomae"]
    for mode, options in plan.MODES.items():
        config, _ = parse(flags, "plan")
        found = plan.try_in_process(replace(config, **options))
        assert isinstance(found, plan.Estimate), found
        command = shlex.split(plan.command(flags, mode))[1:]
        runs = ["--output_dir", str(tmp_path), "--run_name", mode]
        subprocess.run([sys.executable, *command, *runs], cwd=ROOT, check=True, capture_output=True)
        measured = json.loads((tmp_path / mode / "metrics.json").read_text())["peak_mb"]
        assert found.memory == pytest.approx(measured, rel=0.1), mode
