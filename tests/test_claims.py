"""Several processes share one job: nothing is lost or done twice, whoever is killed or stopped."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import counting_frames, write_video
from safetensors import safe_open

import answers
import extract
import feature_cache
import inference
import main
from checkpoint import PROVIDED
from config import ROOT
from extras import claims
from extras.claims import END, Pieces, join, share
from script import UserError, read_rows

FORK = multiprocessing.get_context("fork")
STARTED: list[multiprocessing.Process] = []
RUN = PROVIDED / "timesformer_fvbb"
NAMES = [str(number) for number in range(12)]


def start(body: Callable[[], int | None], log: Path | None = None) -> multiprocessing.Process:
    """A fork that runs body(); what it prints goes to `log`."""

    def child() -> None:
        os.environ["TQDM_DISABLE"] = "1"
        out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115, pytest's are not forked
        status = body() or 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    if log is not None:
        log.touch()
    process = FORK.Process(target=child, daemon=True)
    process.start()
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def kill_all():
    """Ends the processes that a failed test has left, also stopped ones."""
    yield
    while STARTED:
        STARTED.pop().kill()


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def end(*processes: multiprocessing.Process) -> list[int]:
    """The exit statuses."""
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


# -- claims -----------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path) -> Path:
    folder = tmp_path / "job"
    join(folder, "plan")
    return folder


@pytest.fixture
def clock(monkeypatch):
    """[the time], as extras/claims.py sees it."""
    now = [1000.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    return now


def worker(job: Path, before: Callable[[str], None] = lambda name: None, lease: float = 0.4) -> Callable[[], None]:
    """A body that shares the job of NAMES, which writes all results into result.json. Every call of work() leaves a
    file NAME-PROCESS in done/."""
    done = job.parent / "done"
    done.mkdir(exist_ok=True)

    def work(name: str) -> list[dict]:
        before(name)
        (done / f"{name}-{os.getpid()}").touch()
        return [{"square": int(name) ** 2}]

    def finish() -> Callable[[], object]:
        rows = [row for name in NAMES for row in read_rows(job / f"{name}.jsonl")]
        return lambda: (job.parent / "result.json").write_text(json.dumps([row["square"] for row in rows]))

    return lambda: share(job, NAMES, lease, work, finish) and None


def check(job: Path) -> list[str]:
    """Checks the result of worker(). Returns which pieces were done, with repetitions."""
    assert json.loads((job.parent / "result.json").read_text()) == [number**2 for number in range(12)]
    assert sorted(path.name for path in job.parent.iterdir()) == ["done", "result.json"]
    return [path.name.split("-")[0] for path in (job.parent / "done").iterdir()]


def test_every_piece_is_done_once_and_the_last_process_finishes(job):
    body = worker(job, lambda name: time.sleep(0.01), lease=60)
    assert end(*[start(body) for _ in range(4)]) == [0] * 4
    assert sorted(check(job)) == sorted(NAMES)


def test_a_late_process_helps(job):
    """The first process waits in its third piece until the second one has done one."""
    done = job.parent / "done"

    def wait_for_help(name: str) -> None:
        if len(own(first)) == 2:
            until(lambda: len(own(first)) < len([*done.iterdir()]))

    def own(process) -> list[Path]:
        return [*done.glob(f"*-{process.pid if process else os.getpid()}")]

    first = None
    first = start(worker(job, wait_for_help, lease=60))
    until(lambda: len(own(first)) == 2)
    second = start(worker(job, lease=60))
    assert end(first, second) == [0, 0]
    assert own(second) and sorted(check(job)) == sorted(NAMES)


def test_a_claim_expires_when_it_was_seen_unchanged_for_a_lease(job, clock):
    owner, observer = Pieces(job, 10), Pieces(job, 10)
    claim = owner.claim("0")
    os.write(claim, b"alive")
    assert observer.claim("0") is None
    clock[0] += 10
    assert observer.claim("0") is None  # not longer than the lease
    os.write(claim, b" and well")
    clock[0] += 1
    assert observer.claim("0") is None  # it has changed
    clock[0] += 10.5
    late = Pieces(job, 10)
    assert late.claim("0") is None  # whatever others saw, this one has just come
    assert observer.claim("0") is not None
    assert [path.name for path in sorted(job.iterdir())] == ["0.1", "0.2", "plan"]


def test_only_one_of_several_observers_takes_over(job, clock):
    Pieces(job, 10).claim("0")
    observers = [Pieces(job, 10) for _ in range(3)]
    assert [observer.claim("0") for observer in observers] == [None] * 3
    clock[0] += 11
    # all look before any of them claims
    states = [observer.state("0") for observer in observers]
    taken = []
    for observer, state in zip(observers, states, strict=True):
        observer.state = lambda name, state=state: state
        taken.append(observer.claim("0"))
    assert [claim is not None for claim in taken] == [True, False, False]


def test_an_owner_renews_its_claim(job):
    """A piece that takes far longer than the lease stays with its owner, and is done once."""
    # renewals are 0.5 s apart, so a busy machine may delay one by over a second
    waiting = worker(job, lambda name: time.sleep(5 if name == "0" else 0), lease=2)
    assert end(start(waiting), start(worker(job, lease=2))) == [0, 0]
    assert sorted(check(job)) == sorted(NAMES)


def test_a_process_that_fails_releases_its_claim(job):
    def fail(name: str) -> None:
        raise UserError("no memory")

    with pytest.raises(UserError, match="no memory"):
        worker(job, fail, lease=1000)()
    worker(job, lease=1000)()
    assert sorted(check(job)) == sorted(NAMES)


def test_a_stopped_process_loses_only_what_it_holds(job):
    """SIGSTOP in its first piece: the other one does all of the job. SIGCONT: it ends, and changes nothing."""

    def stop(name: str) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    stopped = start(worker(job, stop, lease=0.2))
    until(lambda: (job / "0.1").exists() and "T (stopped)" in Path(f"/proc/{stopped.pid}/status").read_text())
    assert end(start(worker(job, lease=0.2))) == [0]
    assert sorted(check(job)) == sorted(NAMES)
    os.kill(stopped.pid, signal.SIGCONT)
    assert end(stopped) == [0]
    assert sorted(check(job)) == sorted([*NAMES, "0"])


def test_a_stopped_process_keeps_its_claim_for_the_lease(job):
    stopped = start(worker(job, lambda name: name != "0" or os.kill(os.getpid(), signal.SIGSTOP), lease=1000))
    until(lambda: (job / "0.1").exists() and "T (stopped)" in Path(f"/proc/{stopped.pid}/status").read_text())
    log = job.parent / "log"
    other = start(worker(job, lease=1000), log)
    until(lambda: "waiting for 1 piece of other processes" in log.read_text())
    assert not (job / "0.jsonl").exists() and (job / "11.jsonl").exists()
    os.kill(stopped.pid, signal.SIGCONT)
    assert end(stopped, other) == [0, 0]
    log.unlink()
    assert sorted(check(job)) == sorted(NAMES)


@pytest.mark.parametrize("trials", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_a_killed_process_is_replaced(tmp_path, trials):
    """SIGKILL at random moments, also while the results are collected or the folder is removed. What is left then is
    temporary: the next job removes it."""
    for trial in range(trials):
        job = tmp_path / str(trial) / "job"
        join(job, "plan")
        body = worker(job, lambda name: time.sleep(0.01), lease=0.1)
        victim, other = start(body), start(body)
        time.sleep(random.Random(trial).uniform(0, 0.15))
        victim.kill()
        assert end(other, victim)[0] == 0
        join(job, "the next job")
        claims.remove_job(job)
        assert {*check(job)} == {*NAMES}


def test_a_process_that_wakes_up_late_leaves_the_next_job_alone(job):
    """Others have done its piece and finished the job, and the next job with the same pieces is in the same folder."""

    def work(name: str) -> list[dict]:
        share(job, ["0"], 0, lambda name: [{"from": "the helper"}], lambda: print)
        join(job, "the next job")
        return [{"from": "the late process"}]

    late = Pieces(job, 0.01)
    late.do_one("0", late.claim("0"), work)
    assert late.is_done("0") and not Pieces(job, 10).is_done("0")


@pytest.mark.parametrize("stage", ["before the result", "after the result"])
def test_a_process_that_is_late_at_the_end_leaves_the_next_job_alone(job, monkeypatch, stage):
    """It stops when only writing the result or removing the folder is left."""
    written = []

    def others() -> None:
        claims.remove_job(job)
        join(job, "the next job")

    def finish() -> Callable[[], None]:
        if stage == "before the result":
            others()
        return lambda: written.append(stage)

    if stage == "after the result":
        original = Pieces.do
        monkeypatch.setattr(
            Pieces, "do", lambda self, names, work: (original(self, names, work), names == [END] and others())
        )
    assert share(job, ["0"], 10, lambda name: [], finish) == bool(written) == (stage == "after the result")
    assert Pieces(job, 10).plan == "the next job"


def test_another_job_is_refused(job):
    join(job, "plan")
    with pytest.raises(UserError, match="with other videos, weights or options"):
        join(job, "another plan")


# -- inference and extraction -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """20 videos, the third of them unreadable."""
    folder = tmp_path_factory.mktemp("videos")
    for index in range(20):
        torch.save(torch.randint(0, 256, (8, 3, 24, 24 + index), dtype=torch.uint8), folder / f"{index}.pt")
    (folder / "2.pt").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def alone(videos, tmp_path_factory) -> bytes:
    """What one process writes."""
    output = tmp_path_factory.mktemp("alone") / "out.jsonl"
    assert inference.main(flags(videos, output)[:-4]) == 1
    return output.read_bytes()


def flags(videos: Path, output: Path, lease: float = 60) -> list[str]:
    argv = ["--checkpoint", str(RUN), "--video_dir", str(videos), "--output", str(output), "--num_workers", "0"]
    return [*argv, "--batch_size", "2", "--shared", "True", "--lease", str(lease)]


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of four videos. Every batch takes a little longer, so that a signal can hit it."""
    monkeypatch.setattr(answers, "PIECE", 4)
    monkeypatch.setattr(feature_cache, "SHARD", 4)
    for owner, name in ((feature_cache, "features_of"), (inference.Predictor, "answer")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, original=original: (time.sleep(0.03), original(*args))[1])


def test_two_inferences_write_what_one_writes(videos, alone, tmp_path, small_pieces):
    """The same file, byte for byte; the unreadable video is reported once."""
    output, logs = tmp_path / "out.jsonl", [tmp_path / "a", tmp_path / "b"]
    assert sorted(end(*[start(lambda: inference.main(flags(videos, output)), log) for log in logs])) == [0, 1]
    assert output.read_bytes() == alone
    said = [log.read_text() for log in logs]
    assert sum("1 of 20 could not be read" in text for text in said) == 1
    computed = [int(text.split("this process computed ")[1].split()[0]) for text in said]
    assert sum(computed) == 20 and min(computed) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out.jsonl"]


@pytest.mark.slow
def test_two_started_scripts_write_what_one_writes(videos, alone, tmp_path):
    """From the shell, on ten times as many videos, with the pieces that users get."""
    folder = tmp_path / "many"
    shutil.copytree(videos, folder)
    for index in range(20, 200):
        os.link(videos / f"{index % 20}.pt", folder / f"{index}.pt")
    output, single = tmp_path / "out.jsonl", tmp_path / "single.jsonl"
    command = [sys.executable, str(ROOT / "inference.py"), *flags(folder, output)]
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert sorted(process.wait(300) for process in started) == [0, 1]
    assert inference.main(flags(folder, single)[:-4]) == 1
    assert output.read_bytes() == single.read_bytes()


def test_a_shared_timeline_has_the_segments_of_one_process(tmp_path, small_pieces):
    """An error comes before the clips of its video: batches stay the same."""
    folder, single, output = tmp_path / "clips", tmp_path / "single.jsonl", tmp_path / "out.jsonl"
    folder.mkdir()
    for name, count in (("a", 40), ("c", 30)):
        write_video(folder / f"{name}.mkv", counting_frames(count))
    torch.save(torch.zeros(8, 3, 24, 24, dtype=torch.uint8), folder / "b.pt")  # it has no timestamps
    extra = ["--timeline", "1", "--timeline_stride", "0.5"]
    assert inference.main([*flags(folder, single)[:-4], *extra]) == 1
    argv = [*flags(folder, output), *extra]
    assert sorted(end(*[start(lambda: inference.main(argv)) for _ in range(2)])) == [0, 1]
    assert output.read_bytes() == single.read_bytes() and b'"segment": true' in output.read_bytes()


def test_sharing_continues_an_unfinished_file(videos, alone, tmp_path, small_pieces, monkeypatch):
    output = tmp_path / "out.jsonl"
    lines = alone.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:9]) + lines[9][:30])
    asked: list[str] = []
    original = inference.Predictor.predict_many
    monkeypatch.setattr(
        inference.Predictor,
        "predict_many",
        lambda self, samples: asked.extend(s.path.name for s in samples) or original(self, samples),
    )
    assert inference.main(flags(videos, output)) == 1
    assert output.read_bytes() == alone and asked == [f"{index}.pt" for index in range(9, 20)]


@pytest.mark.parametrize("before, after", [(9, 0), (0, 9)])
def test_parts_of_killed_processes_may_belong_to_another_unfinished_file(
    videos, alone, tmp_path, small_pieces, monkeypatch, before, after
):
    """The file was removed or put back since: no row is missing or written twice."""
    output, lines = tmp_path / "out.jsonl", alone.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:before]))

    def killed(*args) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answers, "replace_file", killed)
        assert inference.main(flags(videos, output)) == 130
    assert answers.parts_of(output).exists()
    output.write_bytes(b"".join(lines[:after]))
    assert inference.main(flags(videos, output)) == 1
    assert output.read_bytes() == alone


def test_sharing_and_a_single_process_exclude_each_other(videos, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert inference.main([*flags(videos, output)[:4], "--shared", "True"]) == 2
    assert "--shared True needs --output" in capsys.readouterr().err
    with answers.lock_output(output):
        assert inference.main(flags(videos, output)) == 2
    assert "is in use by this process" in capsys.readouterr().err
    join(answers.parts_of(output), "another plan")
    assert inference.main(flags(videos, output)[:-4]) == 2
    assert "add --shared True" in capsys.readouterr().err
    assert inference.main(flags(videos, output)) == 2
    assert "with other videos, weights or options" in capsys.readouterr().err
    assert not output.exists()


def extraction(data: Path, folder: Path, lease: float = 60) -> list[str]:
    argv = ["--data_dir", str(data), "--output_dir", str(folder), "--freeze_visionbackbone", "True"]
    return [*argv, "--num_workers", "0", "--batch_size", "2", "--lease", str(lease)]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(".features/*/*.safetensors")}


def stored(folder: Path) -> list[bytes]:
    """The ids of all features in the cache."""
    found = []
    for path in folder.glob(".features/*/*.safetensors"):
        with safe_open(path, framework="np") as shard:
            found += [row.tobytes() for row in shard.get_tensor("ids")]
    return found


def test_two_extractions_write_what_one_writes(dataset, tmp_path, small_pieces, capsys):
    """The same shards and records, byte for byte. The unreadable video is reported once. A run computes nothing."""
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    broken = data / "train" / "class_1" / "video_1.pt"
    broken.write_bytes(b"broken")
    one, two, logs = tmp_path / "one", tmp_path / "two", [tmp_path / "a", tmp_path / "b"]
    assert extract.main(extraction(data, one)) == 1
    out, err = capsys.readouterr()
    assert "computed 17 of 18 videos" in out and "1 video could not be read" in err and str(broken) in err
    assert sorted(end(*[start(lambda: extract.main(extraction(data, two)), log) for log in logs])) == [0, 1]
    assert shards(two) == shards(one) and len(stored(one)) == 17
    assert (two / ".videos.json").read_bytes() == (one / ".videos.json").read_bytes()
    said = [log.read_text() for log in logs]
    assert sum(text.count(str(broken)) for text in said) == 1
    computed = [int(text.split("this process computed ")[1].split()[0]) for text in said]
    assert sum(computed) == 17 and min(computed) > 0
    assert [path.name for path in two.glob(".features/*/*") if path.suffix != ".safetensors"] == ["about.json"]

    run = ["--epochs", "1", "--run_name", "r", "--skip_unreadable", "True"]
    assert main.main([*extraction(data, two)[:-2], *run]) == 0
    assert "17 of 18 videos in" in capsys.readouterr().out


def test_extraction_needs_a_frozen_backbone(dataset, tmp_path, capsys):
    argv = extraction(dataset, tmp_path)
    assert extract.main([flag if flag != "True" else "False" for flag in argv]) == 2
    assert "needs --freeze_visionbackbone True" in capsys.readouterr().err


@pytest.mark.parametrize("trials", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_inference_loses_no_row(videos, alone, tmp_path, small_pieces, trials):
    """SIGKILL of one of two at random moments."""
    for trial in range(trials):
        output = tmp_path / f"{trial}.jsonl"
        victim, other = (start(lambda: inference.main(flags(videos, output, lease=0.3))) for _ in range(2))  # noqa: B023
        time.sleep(random.Random(trial).uniform(0, 1))
        victim.kill()
        end(other)
        assert output.read_bytes() == alone
        assert not answers.parts_of(output).exists()


@pytest.mark.parametrize("trials", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_extraction_loses_no_video(dataset, tmp_path, small_pieces, trials):
    whole = tmp_path / "whole"
    assert extract.main(extraction(dataset, whole)) == 0
    for trial in range(trials):
        folder = tmp_path / str(trial)
        victim, other = (start(lambda: extract.main(extraction(dataset, folder, lease=0.3))) for _ in range(2))  # noqa: B023
        time.sleep(random.Random(trial).uniform(0, 1))
        victim.kill()
        assert end(other) == [0]
        assert shards(folder) == shards(whole) and len(stored(folder)) == len({*stored(folder)}) == 18
