"""The study on two small rows, trained once: every number comes from a run, and missing runs are shown as missing."""

import json
import re
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import in_full

import dummy_data
import inference
import main
import score
from checkpoint import PROVIDED, load_run, read_run
from config import ROOT, as_flags, read_yaml, run_name
from experiments import make_report
from metrics import right_attributes
from VLoader import read_folder

ROWS = ("timesformer_fvbb", "videomae_gpt2_caption_fvbb_fllm")
RUNS = sorted(path.parent.name for path in PROVIDED.glob("*/metadata.json"))


@pytest.fixture(scope="module", autouse=True)
def whole_runs():
    with in_full():
        yield


@pytest.fixture(scope="module")
def study(dataset, tmp_path_factory) -> Path:
    """A folder with runs/ (one seed of both rows), report.pdf and RESULTS.md."""
    folder, one_at_a_time = tmp_path_factory.mktemp("study"), threading.Lock()

    def run(command: list[str], **_) -> subprocess.CompletedProcess:
        """In this process, which has imported everything; the tests of failed and resumed runs start others."""
        with one_at_a_time:
            return subprocess.CompletedProcess(command, main.main(command[2:]), stderr="")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_report, "subprocess", SimpleNamespace(run=run))
        assert make_report.main([*flags_of(folder, dataset), "--only", f"^({'|'.join(ROWS)})$"]) == 0
    return folder


def flags_of(folder: Path, dataset: Path) -> list[str]:
    return ["--seeds", "1", "--data_dir", str(dataset), "--runs", str(folder / "runs"), "--output", str(folder)]


def cells(text: str, title: str) -> list[list[str]]:
    """The cells of every table row with this title: results, controls, cost."""
    return [
        [c.strip() for c in line.strip("| ").split(" | ")]
        for line in text.split("\n")
        if line.startswith(f"| {title} |")
    ]


def test_the_tables_hold_the_runs_numbers(study):
    text = (study / "RESULTS.md").read_text()
    scores = json.loads((study / "runs" / f"{ROWS[0]}_seed0" / "metrics.json").read_text())
    result, controls, cost = cells(text, "TimeSformer frozen")
    assert result[2].startswith(f"{100 * scores['test']['accuracy']:.1f} [")
    assert result[5] == f"{100 * scores['test']['macro_f1']:.1f}"
    assert controls[1:3] == [f"{100 * scores['controls'][n]['accuracy']:.1f}" for n in ("as_it_is", "majority")]
    assert cost[1] == "387" and float(cost[5]) == pytest.approx(scores["peak_mb"], abs=0.5)
    scores = json.loads((study / "runs" / f"{ROWS[1]}_seed0" / "metrics.json").read_text())
    result, controls, _ = cells(text, "VideoMAE + GPT-2 frozen")
    low, high = scores["test"]["intervals"]["CIDEr"]
    assert result[2] == f"{scores['test']['CIDEr']:.2f} [{low:.2f}, {high:.2f}]"
    assert controls[1] == f"{100 * scores['controls']['as_it_is']['motion']:.1f}"


def test_missing_runs_are_shown_as_not_run(study):
    text = (study / "RESULTS.md").read_text()
    for row in cells(text, "VideoMAE LoRA"):
        assert set(row[-5:]) == {"not run"}
    assert text.count("0 of 1") == 22 and text.count("1 of 1") == 2


def test_a_pdf_is_written(study):
    assert (study / "report.pdf").read_bytes().startswith(b"%PDF-")


@pytest.mark.slow
def test_finished_runs_are_not_trained_again_and_unfinished_ones_are(study, dataset, capsys):
    capsys.readouterr()
    metrics_file = study / "runs" / f"{ROWS[0]}_seed0" / "metrics.json"
    before = json.loads(metrics_file.read_text())
    metrics_file.write_text(
        json.dumps({k: v for k, v in before.items() if k != "controls"})
    )  # as if killed before the controls
    assert make_report.main([*flags_of(study, dataset), "--only", f"^({'|'.join(ROWS)})$"]) == 0
    assert "1/1 timesformer_fvbb_seed0" in capsys.readouterr().out
    assert json.loads(metrics_file.read_text()) == before
    assert make_report.main([*flags_of(study, dataset), "--only", f"^({'|'.join(ROWS)})$"]) == 0
    assert "1/1" not in capsys.readouterr().out


def test_a_run_that_fails_is_named(study, tmp_path, capsys):
    assert make_report.main([*flags_of(tmp_path, tmp_path), "--only", "^timesformer_fvbb$"]) == 2
    assert "timesformer_fvbb_seed0 failed: error:" in capsys.readouterr().err


def test_the_mean_of_seeds_and_its_interval(study, tmp_path):
    """Two seeds with equal predictions have the interval of one. A seed without a right answer halves the mean."""
    runs = Path(shutil.copytree(study / "runs", tmp_path / "runs"))
    shutil.copytree(runs / f"{ROWS[0]}_seed0", runs / f"{ROWS[0]}_seed1")
    file = ROOT / "experiments" / f"{ROWS[0]}.yaml"
    one, two = (make_report.row_scores(make_report.Row(file, runs, seeds))["accuracy"] for seeds in (1, 2))
    assert one == two
    other = runs / f"{ROWS[0]}_seed1" / "predictions_test.jsonl"
    rows = [json.loads(line) for line in other.read_text().splitlines()]
    other.write_text("".join(json.dumps(r | {"truth": "none of them"}) + "\n" for r in rows))
    mixed = make_report.row_scores(make_report.Row(file, runs, 2))["accuracy"]
    assert mixed["mean"] == pytest.approx(one["mean"] / 2) and mixed["range"] == [0, one["mean"]]


def test_a_card_reports_the_scores_of_its_own_file(study, dataset, tmp_path, capsys):
    """Measured by score.py on a copy. The run's own metrics.json is falsified, so copying from it would show."""
    row = make_report.Row(
        ROOT / "experiments" / f"{ROWS[0]}.yaml", Path(shutil.copytree(study / "runs", tmp_path / "runs")), 1
    )
    file = row.dirs[0] / "metrics.json"
    metrics = json.loads(file.read_text())
    metrics["controls"] = {name: {"accuracy": 0.123} for name in metrics["controls"] if name != "split"}
    file.write_text(json.dumps(metrics))
    make_report.provide(row, tmp_path / "provided", dataset)
    card = (tmp_path / "provided" / row.name / "CARD.md").read_text()
    copy = shutil.copytree(tmp_path / "provided" / row.name, tmp_path / "copy")
    argv = ["--data_dir", str(dataset), "--controls", "True", "--num_workers", "0", "--output_dir", str(tmp_path)]
    assert score.main(["--checkpoint", str(copy), *argv]) == 0
    (scored,) = [json.loads(p.read_text()) for p in tmp_path.rglob("metrics.json") if "copy" in str(p)]
    names = {
        "one_frame": "one frame",
        "shuffled": "shuffled",
        "majority": "majority",
        "nearest_neighbour": "nearest neighbour",
    }
    for key, name in names.items():
        assert f"{name} accuracy {100 * scored['controls'][key]['accuracy']:.1f} %" in card
    assert f"test videos: accuracy {100 * scored['test']['accuracy']:.1f} %" in card


def test_a_provided_checkpoint_has_the_weights_of_its_run(study, dataset, tmp_path):
    for name in ROWS:
        row = make_report.Row(ROOT / "experiments" / f"{name}.yaml", study / "runs", 1)
        size = make_report.provide(row, tmp_path, dataset)
        target = tmp_path / name
        assert size < 1e6 and "Contains the" in (target / "CARD.md").read_text()
        config, _ = read_run(target)
        assert (config.run_name, config.output_dir, config.data_dir) == (None, "checkpoints", "synthetic_dataset")
        assert not re.search(r"\"/|: /", (target / "metadata.json").read_text() + (target / "config.yaml").read_text())
        provided, _, _ = load_run(target)
        trained, _, _ = load_run(row.dirs[0])
        for (n, a), (_, b) in zip(provided.named_parameters(), trained.named_parameters(), strict=True):
            assert (a - b).abs().max() <= 2**-8 * b.abs().max(), n


# -- the files in the repository ----------------------------------------------------------------------


def test_the_template_holds_no_results():
    """The only digits of the template are lengths, column counts and parts of names."""
    text = re.sub(r"//.*", "", (ROOT / "experiments" / "report.typ").read_text())
    text = re.sub(r"[\d.]+(pt|cm|fr|%)", "", text)
    text = re.sub(
        r"GPT-2|a4|luma\(\d+\)|columns: \d|numbering: \"1\"|head\.len\(\) - 1|== 0|Bleu-4|report_?\d", "", text
    )
    text = re.sub(r"\bf\.\w+_\d|--seed 0", "", text)
    assert not re.findall(r".*\d.*", text)


def test_the_grid_has_the_24_rows_of_the_readme():
    rows = make_report.read_grid(ROOT / "nowhere", 3, "")
    assert len(rows) == 24 and all(row.name == row.file.stem for row in rows)
    assert all(len(read_yaml(row.file)) <= 7 for row in rows)
    assert [sum(row.task == task for row in rows) for task in make_report.TASKS] == [6, 12, 6]
    assert all(row.config.freeze_visionbackbone for row in rows if row.config.use_vlm)
    assert len({row.title for row in rows}) == 24


def test_results_md_has_the_text_that_the_report_writes():
    """All but its numbers: the runs are not in the repository."""

    def without_numbers(text: str) -> str:
        rows = [line for line in text.splitlines() if not re.match(r"\| (TimeSformer|VideoMAE)", line)]
        return re.sub(r"\d+(\.\d+)*(, \d+)*", "0", "\n".join(rows))

    tables = {name: [] for name in ("labels", "captions", "controls", "caption_controls", "cost")}
    numbers = {"classes": "0", "epochs": "0", "seeds": "0", "machine": "0 CPU thread, torch 0"}
    sizes = {"train": "0", "val": "0", "test": "0"}
    text = "# Results\n\n" + make_report.results_text({"tables": tables, "sizes": sizes, **numbers})
    shipped = (ROOT / "RESULTS.md").read_text()
    assert without_numbers(shipped) == without_numbers(text)
    assert (
        "not run" not in shipped and len(re.findall(r"^\| (?:TimeSformer|VideoMAE)", shipped, re.MULTILINE)) == 3 * 24
    )


def test_every_row_has_a_small_provided_checkpoint():
    provided = [PROVIDED / name for name in RUNS]
    assert {*RUNS} == {f.stem for f in (ROOT / "experiments").glob("*.yaml")}
    assert sum(f.stat().st_size for f in PROVIDED.rglob("*") if f.is_file()) <= 25e6
    for path in provided:
        config, _ = read_run(path)
        assert run_name(config) == path.name and (path / "CARD.md").is_file()


@pytest.mark.parametrize("run", RUNS)
def test_a_provided_checkpoint_answers_at_once(run, dataset, tmp_path, monkeypatch, capsys):
    """With the flags of its README command, in a folder without any trained run. Most of its answers are right, where
    it is told which object is meant or there is only one; guessing is right 1 time in 9."""
    monkeypatch.chdir(tmp_path)
    config, _ = read_run(PROVIDED / run)
    answers = tmp_path / "answers.jsonl"
    argv = ["--video_dir", str(dataset / "test"), "--output", str(answers), "--num_workers", "0"]
    assert inference.main([*as_flags(config).split(), *argv]) == 0
    assert "using the provided checkpoint" in capsys.readouterr().out
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(rows) == 6
    samples = {sample.path.resolve(): sample for sample in read_folder(dataset / "test")}
    right = []
    for row in rows:
        sample = samples[Path(row["file"]).resolve()]
        if config.captioning:
            right.append(right_attributes(row["caption"], sample.objects, dummy_data.LEXICON)["motion"])
        elif config.use_text or len(sample.objects) == 1:
            right.append(row["label"] == sample.label)
    assert sum(right) > len(right) / 2
