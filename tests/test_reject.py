"""Rejection: the temperature, the threshold and its promise, and what runs, inference and exports make of them."""

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from conftest import in_full, write_video
from scipy.special import log_softmax, softmax

import doctor
import dummy_data
import figures
import inference
import main
import metrics
import score
from answers import answer_line, fingerprint_answers, is_right
from checkpoint import METADATA, read_run
from extras import reject
from extras.reject import (
    NONE,
    Rule,
    choose_threshold,
    fit_temperature,
    min_clips,
    reject_line,
    risk_coverage,
    upper_bound,
)
from extras.segments import merge_windows, read_recordings
from script import UserError
from VLoader import Sample


def noisy_logits(rng: np.random.Generator, count: int, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits of clips that are easy or hard, twice as large as they should be, and their true classes. (n, K), (n,)"""
    logits = rng.normal(size=(count, classes)) * rng.exponential(4, (count, 1))
    truth = (softmax(logits, 1).cumsum(1) > rng.random((count, 1))).argmax(1)
    return 2 * logits, truth


# -- temperature and threshold ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_temperature_is_that_of_a_grid_search(seed):
    logits, truth = noisy_logits(np.random.default_rng(seed), 400)
    grid = np.geomspace(0.5, 5, 2001)
    losses = [-log_softmax(logits / t, 1)[np.arange(len(truth)), truth].mean() for t in grid]
    found = fit_temperature(logits, truth)
    assert found == pytest.approx(grid[np.argmin(losses)], rel=2e-3) and found == pytest.approx(2, rel=0.2)
    assert (Rule(0.05, found).probabilities(logits).argmax(1) == logits.argmax(1)).all()


def test_temperatures_without_an_optimum_stay_finite():
    logits = np.random.default_rng(0).normal(size=(50, 3))
    assert fit_temperature(logits, logits.argmax(1)) == 1
    assert fit_temperature(logits, logits.argmin(1)) == pytest.approx(20)


def test_the_bound_is_that_of_clopper_and_pearson():
    for count in (1, 20, 59, 400, 20_000):
        for errors in {0, 1, count // 30, count // 2, count - 1, count}:
            expected = scipy.stats.beta.ppf(0.95, errors + 1, count - errors) if errors < count else 1.0
            assert upper_bound(errors, count) == pytest.approx(expected, abs=1e-9), (errors, count)
    assert [min_clips(share) for share in (0.5, 0.05, 0.01)] == [5, 59, 299]
    assert upper_bound(0, 59) < 0.05 < upper_bound(0, 58)


def test_the_promise_is_kept():
    """On 1,000 draws of val, temperature included, the true risk exceeds the share in at most 5 %, up to chance."""
    rng = np.random.default_rng(0)
    all_logits, all_truth = noisy_logits(rng, 150_000)
    others, _ = noisy_logits(rng, 2000)
    risks = 1 - softmax(others / 2, 1).max(1)  # the true probability of each answer to be wrong
    found, broken = 0, 0
    for logits, truth in zip(np.split(all_logits, 1000), np.split(all_truth, 1000), strict=True):
        rule = Rule(0.2)
        rule.fit(logits, truth)
        if rule.threshold is not None:
            found += 1
            broken += risks[rule.answers(rule.probabilities(others).max(1))].mean() > 0.2
    assert found > 500 and broken <= scipy.stats.binom.ppf(0.999, 1000, 0.05)
    assert broken > 5, "too careful: thresholds could be lower"


def test_taking_the_best_of_all_thresholds_would_break_the_promise():
    """Why they are tested in order, up to the first that fails."""
    rng, broken = np.random.default_rng(0), 0
    for _ in range(300):
        scores, wrong = rng.random(100), rng.random(100) < 0.2  # no threshold helps, and the risk is at the limit
        errors = wrong[np.argsort(-scores)].cumsum()
        broken += any(reject.binomial_tail(int(errors[n - 1]), n, 0.2) <= 0.05 for n in range(14, 101))
    assert broken > 0.1 * 300


def test_the_threshold_is_the_last_one_that_passes():
    """59 clips without an error are enough for 5 %, 58 are not; equal scores are answered together."""
    scores, wrong = np.linspace(0.9, 0.5, 59), np.zeros(59, bool)
    assert choose_threshold(scores, wrong, 0.05) == 0.5 and choose_threshold(scores[1:], wrong[1:], 0.05) is None
    wrong[30] = True
    assert choose_threshold(scores, wrong, 0.05) is None

    # 100 right answers, then wrong ones: the test fails when scipy's bound of one more error is too high
    scores, wrong = np.linspace(0.9, 0.5, 120), np.arange(120) >= 100
    allowed = max(n for n in range(20) if scipy.stats.beta.ppf(0.95, n + 1, 100) < 0.05)
    assert choose_threshold(scores, wrong, 0.05) == scores[99 + allowed]
    scores[99 : 101 + allowed] = scores[99]
    assert choose_threshold(scores, wrong, 0.05) == scores[98]


@pytest.mark.parametrize("decimals", [16, 1])
def test_the_curve_is_that_of_a_direct_computation(decimals):
    """With decimals 1, many scores are equal."""
    rng = np.random.default_rng(1)
    scores = rng.random(300).round(decimals)
    wrong = rng.random(300) > scores
    pairs = [((scores >= s).mean(), wrong[scores >= s].mean()) for s in sorted(scores, reverse=True)]
    assert np.stack(risk_coverage(scores, wrong), 1) == pytest.approx(np.array(pairs))
    found = reject.reject_scores(scores, wrong, scores >= 0.4)
    assert found["AURC"] == pytest.approx(np.mean([risk for _, risk in pairs]))
    assert found["error"] == wrong[scores >= 0.4].mean() and found["coverage"] == (scores >= 0.4).mean()
    assert found["intervals"]["error"] == metrics.wilson(found["wrong"], found["answered"])
    nothing = reject.reject_scores(scores, wrong, scores > 1)
    assert nothing["coverage"] == 0 and nothing["error"] is None and "error" not in nothing["intervals"]


def test_intervals_draw_recordings(monkeypatch):
    """Ten clips of each recording say no more than one, if they are the same."""
    monkeypatch.setattr(metrics, "RESAMPLES", 1000)
    rng = np.random.default_rng(2)
    scores = rng.random(60)
    wrong = rng.random(60) > scores
    alone = reject.reject_scores(scores, wrong, scores >= 0.4, [str(i) for i in range(60)])
    assert alone == reject.reject_scores(scores, wrong, scores >= 0.4)
    several, names = (scores.repeat(10), wrong.repeat(10)), [str(i // 10) for i in range(600)]
    found = reject.reject_scores(*several, several[0] >= 0.4, names)
    narrow = reject.reject_scores(*several, several[0] >= 0.4)
    for name in ("coverage", "error", "AURC"):
        width, too_narrow = (np.diff(row["intervals"][name]) for row in (found, narrow))
        assert found["intervals"][name] == pytest.approx(alone["intervals"][name], abs=0.04) and width > 2 * too_narrow
    certain = reject.reject_scores(*several, (several[0] >= 0.4) & ~several[1], names)
    assert certain["intervals"]["error"] == metrics.wilson(0, int(((scores >= 0.4) & ~wrong).sum()))


def test_metrics_scores_rejected_answers_by_their_best_class(tmp_path, capsys):
    best = [{"label": "a", "name": "a", "score": 0.3}, {"label": "b", "name": "b", "score": 0.2}]
    rows = [{"file": "x.mp4", **best[0], "top_k": best}, {"file": "y.mp4", **best[0], "top_k": best}]
    rows[1] |= {"label": None, "name": NONE}
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "truth.json").write_text('{"x": "b", "y": "a"}')
    argv = ["--references", str(tmp_path / "truth.json"), "--predictions", str(tmp_path / "answers.jsonl")]
    assert metrics.main(argv) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 0.5


# -- runs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three classes, with 20 clips of val and 10 of test each."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    few = ["--videos_per_class", "24", "--val_per_class", "20", "--test_per_class", "10"]
    assert dummy_data.main(["--classes", "3", *few, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def train(data, tmp_path_factory) -> Callable[..., tuple[int, Path]]:
    """train(name, *flags) -> (exit status, folder) of a run."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--data_dir", str(data), "--output_dir", str(folder), "--num_workers", "0", "--freeze_visionbackbone"]

    def trained(name: str, *more: str) -> tuple[int, Path]:
        return main.main([*flags, "--run_name", name, *more]), folder / name

    return trained


@pytest.fixture(scope="module")
def run(train) -> Path:
    """A run that rejects: half of its answers may be wrong."""
    status, folder = train("rejecting", "--epochs", "8", "--reject", "0.5")
    assert status == 0
    return folder


def test_a_run_rejects_and_says_so(run, capsys):
    """metrics.json agrees with the rows, in which test keeps the best class of every clip."""
    scores = json.loads((run / "metrics.json").read_text())
    rule = Rule(**read_run(run)[1]["reject"])
    assert scores["reject"] == vars(rule) and rule.share == 0.5 and rule.threshold
    assert scores["val"]["reject"]["upper_bound"] < 0.5
    for split in ("val", "test"):
        rows = [json.loads(line) for line in (run / f"predictions_{split}.jsonl").read_text().splitlines()]
        answered = np.array([row["answered"] for row in rows])
        wrong = np.array([row["label"] != row["truth"] for row in rows])
        assert scores[split]["reject"]["coverage"] == answered.mean()
        assert scores[split]["reject"]["error"] == wrong[answered].mean()
        assert scores[split]["accuracy"] == pytest.approx(1 - wrong.mean())
        assert all(row["answered"] == (row["score"] >= rule.threshold - 1e-4) for row in rows)
        (again,) = [metrics.with_intervals(metrics.label_rows_summary(rows), len(rows))]
        assert again["calibration_error"] == pytest.approx(scores[split]["calibration_error"], abs=1e-3)


def with_rule(run: Path, folder: Path, **changes: float) -> Path:
    """A copy of the run with another threshold or temperature."""
    shutil.copytree(run, folder)
    metadata = json.loads((folder / METADATA).read_text())
    metadata["reject"] |= changes
    (folder / METADATA).write_text(json.dumps(metadata))
    return folder


@pytest.fixture(scope="module")
def stricter(run, tmp_path_factory) -> tuple[Path, list[dict]]:
    """A copy of the run whose threshold rejects half of the test clips, and their rows."""
    rows = [json.loads(line) for line in (run / "predictions_test.jsonl").read_text().splitlines()]
    middle = float(np.median([row["score"] for row in rows]))
    return with_rule(run, tmp_path_factory.mktemp("strict") / "r", threshold=middle), rows


def test_inference_applies_the_rule(stricter, data, tmp_path, capsys):
    run, rows = stricter
    threshold = read_run(run)[1]["reject"]["threshold"]
    argv = ["--checkpoint", str(run), "--video_dir", str(data / "test"), "--output", str(tmp_path / "a.jsonl")]
    assert inference.main([*argv, "--num_workers", "0"]) == 0
    printed = capsys.readouterr().out
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    rejected = [a for a in answers if a["label"] is None]
    assert f"{len(rejected)} of 30 answers: none of these" in printed and 10 < len(rejected) < 20
    assert printed.count("none of these  (") == len(rejected)
    assert f" of {30 - len(rejected)} right" in printed
    for answer, row in zip(answers, rows, strict=True):
        assert [best["label"] for best in answer["top_k"]] == [best["label"] for best in row["top_k"][:3]]
        assert answer["score"] == pytest.approx(row["score"], abs=2e-4)
        assert ((answer["name"] == NONE) == (answer["label"] is None) and "right" in answer) or answer["label"] is None
        if abs(row["score"] - threshold) > 1e-3:
            assert (answer["label"] is None) == (row["score"] < threshold)

    # from Python too; and answers of another rule must not be continued
    predictor = inference.Predictor.from_checkpoint(run, num_workers=0)
    alone = predictor.predict(rejected[0]["file"])
    assert (
        alone["label"] is None
        and alone["name"] == NONE
        and alone["top_k"][0]["label"] == rejected[0]["top_k"][0]["label"]
    )
    other = Rule(**vars(predictor.rule) | {"threshold": 0.4})
    prints = {fingerprint_answers(run, predictor.config, rule) for rule in (None, predictor.rule, other)}
    assert len(prints) == 3


def test_rejected_windows_are_background(stricter, tmp_path, capsys):
    run, _ = stricter
    rule = with_rule(run, tmp_path / "never", threshold=1.0)
    write_video(tmp_path / "long.mkv", np.zeros((40, 32, 48, 3), np.uint8))
    argv = ["--checkpoint", str(rule), "--video_dir", str(tmp_path / "long.mkv"), "--timeline", "2", "--output"]
    assert inference.main([*argv, str(tmp_path / "plain.jsonl")]) == 0
    assert inference.main([*argv, str(tmp_path / "merged.jsonl"), "--timeline_stride", "1"]) == 0
    assert "segment:" not in capsys.readouterr().out
    truth = tmp_path / "truth.jsonl"
    truth.write_text('{"file_name": "long.mkv", "start": 0, "end": 2, "label": "class_0"}\n')
    for name in ("plain", "merged"):
        (recording,) = read_recordings(truth, tmp_path / f"{name}.jsonl")
        assert recording.truth and not recording.predicted and recording.seconds == 4


def test_rejected_windows_outvote_less_sure_ones():
    top = {"label": "a", "name": "A", "score": 0.9}
    sure = {"file": "v", "path": "v", "label": "a", "name": "A", "score": 0.9, "top_k": [top]}
    rows = [sure | {"start": 0, "end": 2}, sure | {"start": 1, "end": 3, "label": None, "name": NONE}]
    (segment,) = merge_windows(rows, 1)
    assert (segment["start"], segment["end"], segment["label"]) == (0, 1, "a")


def test_an_answer_of_none_is_neither_right_nor_wrong():
    answer = {"label": None, "name": NONE, "score": 0.4, "top_k": [{"label": "a", "name": "A", "score": 0.4}]}
    assert is_right(answer, Sample(Path("x"), label="a"), {"a": "A"}, None) is None
    assert answer_line("x", answer) == "x  none of these  (A 40.0 %)"


def test_the_export_applies_the_rule(stricter, tmp_path, capsys, monkeypatch):
    """predict.py gives the calibrated scores of the run, and rejects what is below the threshold."""
    run, _ = stricter
    video = write_video(tmp_path / "a.mkv", np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8))
    rule = with_rule(run, tmp_path / "hot", threshold=0.99, temperature=3.0)
    out = tmp_path / "out"
    assert inference.main(["--checkpoint", str(rule), "--export", str(out), "--video_dir", str(video)]) == 0
    printed = capsys.readouterr().out
    (score,) = re.findall(r"none of these  \(\S.*? ([\d.]+) %", printed)
    difference = re.search(r"predict.py differ by at most (\S+)", printed)
    assert difference and float(difference[1]) < 1e-3 and "must be at least 0.99;" in (out / "README.md").read_text()
    exported = runpy.run_path(str(out / "predict.py"))
    scores = exported["predict"](video)
    assert exported["answer"](video) == {} and max(scores.values()) == pytest.approx(float(score) / 100, abs=1e-3)
    exported["RULES"]["reject"]["threshold"] = 0.1
    assert exported["answer"](video) == {max(scores, key=scores.get): max(scores.values())}

    # the command line
    monkeypatch.setattr(sys, "argv", ["predict.py", str(video)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(out / "predict.py"), run_name="__main__")
    assert ended.value.code == 0 and "' none of these\n" in capsys.readouterr().out


# -- scoring again ----------------------------------------------------------------------------------


def test_score_keeps_changes_and_removes_the_rule(run, data, tmp_path, capsys):
    folder = with_rule(run, tmp_path / "r")
    first, before = json.loads((folder / "metrics.json").read_text()), (folder / METADATA).read_bytes()

    def scored(*flags: str) -> dict:
        assert score.main(["--checkpoint", str(folder), "--num_workers", "0", *flags]) == 0
        return json.loads((folder / "metrics.json").read_text())

    # the run's own rule, on the same and on other videos; their val does not change it
    assert scored()["reject"] == first["reject"] and read_run(folder)[1] == json.loads(before)
    other = tmp_path / "other"
    shutil.copytree(data, other)
    shutil.rmtree(other / "train")
    shutil.rmtree(other / "val")
    scored("--data_dir", str(other))
    elsewhere = json.loads((folder / "evaluation_other" / "metrics.json").read_text())
    assert elsewhere["reject"] == first["reject"]
    assert elsewhere["test"]["reject"]["coverage"] == first["test"]["reject"]["coverage"]
    assert read_run(folder)[1] == json.loads(before)

    # another share, then none at all
    assert scored("--reject", "0.4")["reject"]["share"] == 0.4 == read_run(folder)[1]["reject"]["share"]
    assert (folder / "risk.png").exists()
    without = scored("--reject", "0")
    assert not (folder / "risk.png").exists()
    assert "reject" not in without and "reject" not in without["test"] and "reject" not in read_run(folder)[1]
    assert without["test"]["accuracy"] == first["test"]["accuracy"]


def test_clips_of_one_recording_are_mentioned(run):
    """The test of the threshold counts on independent clips."""
    metrics = json.loads((run / "metrics.json").read_text())
    assert "note" not in reject_line(metrics)
    metrics["val"]["recordings"] = 12
    assert reject_line(metrics).endswith(
        "\nnote: val has 60 clips of 12 recordings, and the 95 % confidence of --reject is for independent clips"
    )


def test_a_promise_that_cannot_be_kept_is_a_warning_and_the_run_is_kept(run, tmp_path, capsys):
    folder = with_rule(run, tmp_path / "r")
    assert score.main(["--checkpoint", str(folder), "--num_workers", "0", "--reject", "0.06"]) == 1
    printed = capsys.readouterr().out
    assert "warning: --reject 0.06: the 60 clips of val show for no threshold that fewer than 6 % of" in printed
    assert (folder / "risk.png").exists() and "reject" not in read_run(folder)[1]
    assert json.loads((folder / "metrics.json").read_text())["reject"]["threshold"] is None


def test_a_small_val_is_refused_before_training(train, data, capsys):
    for program in (main, doctor):
        assert program.main(["--data_dir", str(data), "--reject", "0.04", "--output_dir", "none"]) == 2
        assert (
            "--reject 0.04 needs at least 74 clips in val even if no answer is wrong, but val has 60"
            in capsys.readouterr().err
        )
    status = main.main(["--captioning", "--use_vlm", "--reject", "0.1"])
    assert status == 2 and "--reject works with classifiers only" in capsys.readouterr().err


def test_damaged_rules_are_refused(run, tmp_path):
    for number, change in enumerate(({"threshold": None}, {"temperature": 0.0}, {"threshold": "0.5"}, {"more": 1.0})):
        with pytest.raises(UserError, match="damaged: reject is not"):
            read_run(with_rule(run, tmp_path / str(number), **change))


def test_the_picture_of_a_rule_is_drawn(run, tmp_path):
    """It shows the curve, and also a rule that answers nothing."""
    scores = json.loads((run / "metrics.json").read_text())["test"]
    with in_full():
        for number, error in enumerate((scores["reject"]["error"], None)):
            path = figures.plot_risk_coverage(scores["reject"] | {"error": error}, 30, tmp_path / f"{number}.png")
            assert path.read_bytes()[:4] == b"\x89PNG"
