"""Statistics of the study against slow references and values by hand, and its trials."""

import json
import re
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import main
from config import ROOT
from experiments import epochs, grid, make_study
from experiments.findings import adapting, adapting_count, errors, gained, other_head, points, significance, tuning
from experiments.intervals import DRAWS, Estimate, bootstrap_means, difference, drawn_clips, estimate, mcnemar_p
from experiments.make_study import chosen_rows, planned, swept_values, write_share
from experiments.results import read_clips
from experiments.scores import Comparison
from experiments.trials import Trial, learning_curves, own_value, read_trials, sweep_curves
from metrics import wilson
from script import UserError
from VLoader import read_splits


def some_scores(seeds: int = 3, clips: int = 40, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((seeds, clips)) < 0.7).astype(float)


# -- intervals --------------------------------------------------------------------------------------


def test_a_draw_is_the_mean_over_the_drawn_seeds_and_clips():
    """Drawn by indices, one draw at a time, from the same numbers of draws."""
    first, second = some_scores(), some_scores(2, seed=1)
    rng = np.random.default_rng(1)
    for scores, means in zip((first, second), bootstrap_means(first, second), strict=True):
        seeds = rng.multinomial(len(scores), np.full(len(scores), 1 / len(scores)), DRAWS)
        clips = drawn_clips(scores.shape[1]).astype(int)
        for draw in range(0, DRAWS, 100):
            drawn = scores[np.repeat(np.arange(len(scores)), seeds[draw])][
                :, np.repeat(np.arange(scores.shape[1]), clips[draw])
            ]
            assert drawn.shape == scores.shape
            assert means[draw] == pytest.approx(drawn.mean())


def test_the_bootstrap_agrees_with_one_that_draws_indices():
    scores, rng = some_scores(clips=60), np.random.default_rng(7)
    slow = []
    for _ in range(DRAWS):
        seeds, clips = rng.integers(0, 3, 3), rng.integers(0, 60, 60)
        slow.append(scores[seeds][:, clips].mean())
    value = estimate(scores)
    assert [value.low, value.high] == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.02)
    assert value.mean == pytest.approx(scores.mean()) and value.seeds == tuple(scores.mean(1))


def test_the_spread_of_seeds_widens_the_interval():
    """Two seeds with no clip in common are further apart than two equal ones of the same mean."""
    half = np.arange(40) % 2 == 0
    apart, equal = np.stack([np.ones(40), np.zeros(40)]), np.stack([half, half])
    assert estimate(apart).low == 0 and estimate(apart).high == 1
    assert 0.2 < estimate(equal).low < estimate(equal).high < 0.8


def test_all_right_gets_wilsons_interval_of_the_clips():
    value = estimate(np.ones((3, 200)))
    assert [value.low, value.high] == wilson(200, 200) and value.low == pytest.approx(0.981, abs=5e-4)
    assert estimate(np.zeros((3, 200))).high == pytest.approx(0.019, abs=5e-4)


def test_differences_are_paired():
    """Of two rows with one seed each that differ in the same 4 of 40 clips, every draw sees the same clips."""
    first = some_scores(1)
    second = first.copy()
    assert difference(first, second).low == difference(first, second).high == 0
    second[0, np.flatnonzero(first[0])[:4]] = 0
    value = difference(first, second)
    assert value.mean == pytest.approx(0.1) and 0 <= value.low < value.high < 0.25


def test_two_rows_that_are_all_right_differ_by_newcombes_interval():
    """By hand: 200 of 200 against 200 of 200, Wilson [0.9812, 1], so the difference is within 0.0188."""
    value = difference(np.ones((2, 200)), np.ones((3, 200)))
    assert [value.mean, value.low, value.high] == pytest.approx([0, -0.0188, 0.0188], abs=1e-4)
    value = difference(np.ones((1, 200)), np.zeros((1, 200)))
    assert (
        value.mean == 1 and value.high == pytest.approx(1) and value.low == pytest.approx(1 - 0.0188 * 2**0.5, abs=1e-4)
    )


def test_mcnemar_takes_the_least_sure_pair_of_seeds():
    """By hand: 5 clips against 0 have p = 2 / 2 ** 5; 2 against 1 have 1."""
    base = np.zeros((2, 10), bool)
    first, second = base.copy(), base.copy()
    first[0, :5] = True
    first[1, :2], second[1, 2] = True, True
    assert mcnemar_p(first[:1], second[:1]) == pytest.approx(0.0625)
    assert mcnemar_p(first, second) == 1


def test_gains_of_both_modes_share_their_verb():
    gain, loss, none = (Estimate(0.1, 0.05, 0.15), Estimate(-0.1, -0.15, -0.05), Estimate(0.0, -0.01, 0.01))
    size, equal = "10.0 points [5.0, 15.0]", "(+0.0 points [−1.0, +1.0])"
    assert gained(gain, gain) == f"gains {size} through LoRA and {size} in full"
    assert gained(gain, loss) == f"gains {size} through LoRA and loses {size} in full"
    assert gained(none, loss) == f"does not change measurably through LoRA {equal} and loses {size} in full"
    assert gained(none, none) == f"does not change measurably through LoRA {equal} or in full {equal}"


def test_an_interval_that_excludes_zero_does_not_seem_to_touch_it():
    assert points(Estimate(0.025, 0.0003, 0.05)) == "2.50 points [0.03, 5.00]"
    assert points(Estimate(-0.025, -0.05, -0.01)) == "2.5 points [1.0, 5.0]"


def test_trials_of_the_other_head_stand_beside_the_run_of_their_seed(tmp_path):
    rows = [row_of(name, tmp_path) for name in ("timesformer_fvbb", "videomae")]
    for row, test in zip(rows, (0.5, 0.6), strict=True):
        row.results[0] = SimpleNamespace(metrics={"test": {"accuracy": test}})
    found = [
        {"row": "videomae", "options": {"head": "linear"}, "share": 100, "seed": 0, "test": 0.3},
        {"row": "timesformer_fvbb", "options": {"head": "attentive"}, "share": 100, "seed": 0, "test": 0.7},
    ]
    others = [
        found[0] | {"options": {"head": "attentive"}},  # the row's own
        found[0] | {"options": {"lora_r": 2}},
        found[0] | {"share": 5},
        found[0] | {"seed": 1},  # there is no final run of this seed
    ]
    assert other_head(SimpleNamespace(rows=rows, trials=others)) == ""
    assert other_head(SimpleNamespace(rows=rows, trials=found + others)) == (
        "With an attentive head instead of a linear one, TimeSformer frozen reaches 70.0 % (50.0 %); with a linear head "
        "instead of an attentive one, VideoMAE in full reaches 30.0 % (60.0 %). These are runs of one seed; the "
        "brackets give the run with the row's own head."
    )


def test_sentences_about_modes_need_all_three(tmp_path):
    """TimeSformer was run in all modes, VideoMAE not in full."""

    def comparison(model: str, first: str, second: str, value: Estimate) -> Comparison:
        suffix = {"full": "", "lora": "_loravision", "frozen": "_fvbb"}
        rows = [row_of(f"{model}{suffix[mode]}", tmp_path) for mode in (first, second)]
        return Comparison(*rows, {"all": value}, 1.0)

    values = {
        ("lora", "frozen"): (0.1, 0.05, 0.15),
        ("full", "frozen"): (0.02, -0.01, 0.05),
        ("full", "lora"): (-0.08, -0.1, -0.05),
    }
    found = [comparison("timesformer", *modes, Estimate(*value)) for modes, value in values.items()]
    found.append(comparison("videomae", "lora", "frozen", Estimate(0.1, 0.05, 0.15)))
    assert adapting(SimpleNamespace(comparisons=found), grid.TASKS[0]) == (
        "TimeSformer gains 10.0 points [5.0, 15.0] through LoRA and does not change measurably in full "
        "(+2.0 points [−1.0, +5.0]); training in full is behind LoRA by 8.0 points [5.0, 10.0]."
    )
    found += [comparison("videomae", *modes, Estimate(0.0, -0.01, 0.01)) for modes in list(values)[1:]]
    found[3] = comparison("videomae", "lora", "frozen", Estimate(-0.02, -0.05, 0.01))
    assert adapting(SimpleNamespace(comparisons=found[3:]), grid.TASKS[0]) == (
        "Frozen, LoRA and in full cannot be told apart for VideoMAE (LoRA −2.0 points [−5.0, +1.0], in full +0.0 points "
        "[−1.0, +1.0]); the brackets give the gains over frozen."
    )
    assert adapting(SimpleNamespace(comparisons=[]), grid.TASKS[0]) == grid.NOT_RUN


def test_measurable_differences_are_counted(tmp_path):
    """LoRA is ahead of frozen in two of three models, and behind in none. BERT without text is left out."""
    gain, none, loss = Estimate(0.1, 0.05, 0.15), Estimate(0.0, -0.01, 0.01), Estimate(-0.1, -0.15, -0.05)
    names = {"timesformer": gain, "videomae": gain, "vjepa2": none}
    pairs = [(f"{name}_loravision", f"{name}_fvbb", value) for name, value in names.items()]
    pairs += [("timesformer_bert_fvbb_lorallm", "timesformer_bert_fvbb_fllm", gain)]
    pairs += [("timesformer", "timesformer_fvbb", loss), ("timesformer", "timesformer_loravision", none)]
    found = [Comparison(row_of(a, tmp_path), row_of(b, tmp_path), {"all": v}, 0.02) for a, b, v in pairs]
    assert adapting_count(SimpleNamespace(comparisons=found)) == (
        "Against the frozen backbone, LoRA is measurably better in 2 of 3 models and worse in 0, and training in full is "
        "measurably better in 0 of 1 model and worse in 1. Against LoRA, training in full is measurably better in 0 of 1 "
        "model and worse in 0."
    )
    assert adapting_count(SimpleNamespace(comparisons=found[:4])) == grid.NOT_RUN
    found[0] = replace(found[0], p=0.001)
    assert significance(SimpleNamespace(comparisons=found)) == (
        "Of 6 differences over all clips, 4 have an interval that excludes zero and 6 have p < 0.05, or 1 with "
        "Bonferroni's correction."
    )


def test_groups_whose_intervals_overlap_are_only_counted(tmp_path):
    """One row is right about large objects alone, the other about every second clip."""
    rows = [row_of(name, tmp_path) for name in ("timesformer_fvbb", "videomae_fvbb")]
    items = [{"size": "large" if n < 100 else "small"} for n in range(200)]
    right = [np.arange(200)[None] < 100, np.arange(200)[None] % 2 == 0]
    study = SimpleNamespace(
        clips=SimpleNamespace(rows=[{"objects": [item]} for item in items]),
        scores={row.name: SimpleNamespace(right=values) for row, values in zip(rows, right, strict=True)},
        finished=lambda captioning: rows,
    )
    overlap = "overlap for 1 {}row, in which groups differ by up to 0.0 points."
    assert errors(study, "size") == (
        "By size, the intervals do not overlap for TimeSformer frozen (small: 0.0 %, large: 100.0 %); they "
        + overlap.format("other ")
    )
    rows.pop(0)
    assert errors(study, "size") == "By size, the intervals " + overlap.format("")


# -- which epoch ------------------------------------------------------------------------------------


def test_the_rules_choose_their_epochs(tmp_path, capsys):
    """By hand: 90 % of 100 clips has a standard error of 3 points, so epochs 2 to 4 are equally good."""
    values = [(0.80, 0.50), (0.88, 0.30), (0.90, 0.40), (0.89, 0.35), (0.86, 0.29)]
    log = [{"epoch": n, "val_accuracy": a, "val_loss": loss} for n, (a, loss) in enumerate(values, start=1)]
    chosen = epochs.chosen_epochs(log, 100)
    assert {rule: row["epoch"] for rule, row in chosen.items()} == {
        "best accuracy": 3,
        "lowest loss": 5,
        "one standard error": 2,
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"val": {"count": 100}}))
    assert epochs.main([str(tmp_path / "run")]) == 0
    assert "mean of 1 runs, lowest loss: 86.00 %, loss 0.2900, epoch 5.0" in capsys.readouterr().out
    assert epochs.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: none of these folders holds a finished run of a classifier\n"


# -- shares of the training clips -------------------------------------------------------------------


def test_smaller_shares_are_parts_of_larger_ones():
    rows = [{"file_name": f"class_{k}/video_{i}.pt"} for k in range(3) for i in range(40)]
    shares = {share: [row["file_name"] for row in chosen_rows(rows, share)] for share in (1, 5, 20, 100)}
    assert {*shares[1]} < {*shares[5]} < {*shares[20]} < {*shares[100]}
    assert [len(shares[share]) for share in (1, 5, 20, 100)] == [3, 6, 24, 120]
    for files in shares.values():
        counts = [sum(file.startswith(f"class_{k}/") for file in files) for k in range(3)]
        assert len({*counts}) == 1
    assert shares[20] != [row["file_name"] for row in rows if int(row["file_name"].split("_")[2][:-3]) < 8]


def test_a_share_holds_the_same_videos_and_texts(dataset, tmp_path):
    whole, part = read_splits(dataset), read_splits(write_share(dataset, 67, tmp_path / "part"))
    assert part.class_names == whole.class_names and part.lexicon == whole.lexicon
    by_path = {s.path.resolve(): s for s in [*whole.train, *whole.val, *whole.test]}
    assert (len(part.train), len(part.val), len(part.test)) == (
        2 * len(whole.train) // 3,
        len(whole.val),
        len(whole.test),
    )
    for sample in [*part.train, *part.val, *part.test]:
        assert replace(by_path[sample.path.resolve()], path=sample.path) == sample
        assert by_path[sample.path.resolve()].objects == sample.objects


# -- trials -----------------------------------------------------------------------------------------


def row_of(name: str, tmp_path) -> grid.Row:
    return grid.Row(ROOT / "experiments" / f"{name}.yaml", tmp_path, tmp_path, 1)


def test_relative_values_are_multiples_of_the_rows_own(tmp_path):
    values = swept_values("learning_rate=x0.5,x1,0.01", row_of("timesformer_fvbb", tmp_path))
    rate = own_value("learning_rate", row_of("timesformer_fvbb", tmp_path))
    assert values == [{"learning_rate": rate / 2}, {"learning_rate": rate}, {"learning_rate": 0.01}]


def test_every_row_gets_the_same_number_of_rates(tmp_path):
    rows = grid.read_grid(tmp_path, tmp_path, 1)
    only, sweep, shares, seeds = make_study.PLAN[0]
    trials = planned(grid.read_grid(tmp_path, tmp_path, 1, only), sweep, make_study.as_shares(shares), seeds)
    counts = [sum(trial.row == row.name for trial in trials) for row in rows]
    assert len(counts) == 27 and {*counts} == {3}


def test_a_share_without_a_sweep_is_a_learning_curve(tmp_path):
    row = row_of("timesformer_fvbb", tmp_path)
    assert planned([row], "", [5, 100], 2) == [Trial(row.name, {}, 5, 0), Trial(row.name, {}, 5, 1)]
    assert planned([row], "dropout=0.2", [], 1) == [Trial(row.name, {"dropout": 0.2}, 100, 0)]
    assert planned([row], "dropout=0.2", [20], 1) == [Trial(row.name, {"dropout": 0.2}, 20, 0)]
    # the row's own value is the curve's trial or, with all clips, the final run
    both = f"dropout={row.config.dropout},0.2"
    assert planned([row], both, [20], 1) == [Trial(row.name, {}, 20, 0), Trial(row.name, {"dropout": 0.2}, 20, 0)]
    assert planned([row], both, [], 1) == [Trial(row.name, {"dropout": 0.2}, 100, 0)]


def test_the_report_names_rows_whose_default_rate_is_not_the_best(tmp_path):
    """One standard error of 80 % right on 100 clips is 4 points."""
    rows = [row_of(name, tmp_path) for name in ("timesformer_fvbb", "videomae_fvbb")]
    for row in rows:
        row.results[0] = SimpleNamespace(metrics={"val": {"count": 100}})
    study = SimpleNamespace(rows=rows, trials=[])
    assert "the program's defaults" in tuning(study)
    for row, default in zip(rows, (0.77, 0.75), strict=True):
        values = {3e-3: default, 9e-3: 0.80} if row is rows[0] else {1e-3: default, 3e-4: 0.80}
        options = [{"learning_rate": rate} for rate in values]
        study.trials += [
            {"row": row.name, "options": o, "share": 20, "seed": 0, "val": values[o["learning_rate"]]} for o in options
        ]
    assert "2 learning rates were tried for 2 of 2 rows" in tuning(study)
    assert "For 1 of them, the default is within one standard error of the best" in tuning(study)
    assert tuning(study).endswith("; for 1, it is further below: VideoMAE frozen (5.0 points).")


def test_a_sweep_leaves_out_rows_in_which_nothing_changes(tmp_path):
    rows = grid.read_grid(tmp_path, tmp_path, 1)
    ranked = {trial.row for trial in planned(rows, "lora_r=2,4", [], 1)}
    assert ranked == {row.name for row in rows if "lora" in row.name}
    gridded = {trial.row for trial in planned(rows, "token_grid=1", [], 1)}  # TimeSformer's own head is linear
    assert gridded == {row.name for row in rows if not re.fullmatch("timesformer(_loravision|_fvbb)?", row.name)}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sweep", "learning_rat=1"], "expected OPTION=a,b,c"),
        (["--sweep", "data_dir=a,b"], "expected OPTION=a,b,c"),
        (["--sweep", "learning_rate"], "expected OPTION=a,b,c"),
        (["--sweep", "learning_rate=1e-3,fast", "--rows", "^videomae$"], "fast is not a value of learning_rate"),
        (["--sweep", "head=x2", "--rows", "^videomae$"], "x2 is not a value of head"),
        (["--sweep", "lora_r=4", "--rows", "^videomae$"], "nothing to train"),
        (["--train_share", "0,5"], "expected whole numbers from 1 to 100"),
        (["--train_share", "five"], "expected whole numbers from 1 to 100"),
        (["--train_share", "5", "--rows", "("], "is not a regular expression"),
        (["--train_share", "5", "--jobs", "0"], "must be at least 1"),
        (["--rows", "^videomae$"], "--rows and --seeds need --sweep or --train_share"),
    ],
)
def test_bad_input_is_one_line(argv, message, tmp_path, capsys):
    assert make_study.main([*argv, "--data_dir", str(tmp_path), "--runs", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_damaged_study_is_one_line(tmp_path):
    file = tmp_path / "study.json"
    for text in ("{", '{"a": 1}', "[1]", '[{"row": "videomae"}]'):
        file.write_text(text)
        with pytest.raises(UserError, match="holds no trials"):
            read_trials(file)


def test_a_stopped_study_goes_on_where_it_was(dataset, tmp_path, monkeypatch, capsys):
    """The second of three trials fails. What is finished is kept, and is not trained again."""
    names: list[str] = []

    def run(command: list[str], **_) -> subprocess.CompletedProcess:
        name = command[command.index("--run_name") + 1]
        if len(names) == 1 and "broken" not in names:
            names.append("broken")
            return subprocess.CompletedProcess(command, 1, stdout="", stderr="error: the power failed\n")
        names.append(name)
        return subprocess.CompletedProcess(command, main.main([*command[2:], "--num_workers", "0"]), stderr="")

    monkeypatch.setattr(grid, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(make_study, "MAX_EPOCHS", 1)
    argv = ["--data_dir", str(dataset), "--runs", str(tmp_path / "runs"), "--study", str(tmp_path / "s.json")]
    argv += [
        "--sweep",
        "learning_rate=x0.5,x1,x2",
        "--train_share",
        "20",
        "--rows",
        "^timesformer_fvbb$",
        "--jobs",
        "1",
    ]
    assert make_study.main(argv) == 2
    assert "failed: error: the power failed" in capsys.readouterr().err
    first = read_trials(tmp_path / "s.json")
    assert 1 <= len(first) <= 2  # the third one may have been started before the failure was seen
    assert all(0 <= trial["val"] <= 1 for trial in first)
    assert make_study.main(argv) == 0
    trials = read_trials(tmp_path / "s.json")
    assert trials[: len(first)] == first and len(trials) == 3 and len({*names}) == len(names) == 4
    output = capsys.readouterr().out
    assert f"{len(first)} trials are in" in output
    study = SimpleNamespace(rows=[row_of("timesformer_fvbb", tmp_path)], trials=trials)
    assert len(sweep_curves(study, "learning_rate")["timesformer_fvbb"]) == 3
    assert re.search(
        r"with 20 % of the clips: learning_rate \S+ is best on val \(0.0015: .*, 0.003: .*, 0.006: .*\)", output
    )
    assert {t["share"] for t in trials} == {20}
    assert not list((tmp_path / "runs").rglob("model.safetensors"))
    assert make_study.main(argv) == 0 and len(names) == 4


def test_learning_curves_end_with_the_final_runs(tmp_path):
    row = row_of("timesformer_fvbb", tmp_path)
    trials = [{"row": row.name, "options": {}, "share": s, "seed": n, "test": s / 100} for s in (5, 20) for n in (0, 1)]
    scores = SimpleNamespace(accuracy=lambda: SimpleNamespace(seeds=(0.9, 0.8)))
    study = SimpleNamespace(rows=[row], trials=trials, scores={row.name: scores})
    curves = {"timesformer": {"frozen": {5: [0.05, 0.05], 20: [0.2, 0.2], 100: [0.9, 0.8]}}}
    assert learning_curves(study) == curves


def test_a_trials_name_tells_it_from_all_others():
    trials = [Trial("a", {"lora_r": r}, share, seed) for r in (2, 4) for share in (5, 100) for seed in (0, 1)]
    assert len({trial.name for trial in [*trials, Trial("a"), Trial("b")]}) == len(trials) + 2


def test_clips_are_read_in_the_order_of_the_metadata(dataset):
    clips = read_clips(dataset, "test")
    values = {file: number for number, file in enumerate(clips.files)}
    assert clips.in_order(dict(reversed(values.items())), "x") == [*range(len(clips))]
    with pytest.raises(UserError, match="x has predictions for other clips"):
        clips.in_order(values | {"other": 1}, "x")
