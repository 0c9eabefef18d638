"""Scores against scikit-learn, scipy, pycocoevalcap and published numbers; and the metrics.py script."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import sklearn.metrics
from conftest import in_full
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from scipy.stats import binomtest

import metrics
from config import ROOT


@pytest.fixture(scope="module", autouse=True)
def whole_intervals():
    with in_full():
        yield


def predictions(seed: int, count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(true classes, probabilities), random but better than chance."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes)) + 1.5 * np.eye(classes)[truth]
    exp = np.exp(logits)
    return truth, exp / exp.sum(1, keepdims=True)


def ranked(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-probabilities, axis=1)[:, :5]
    return order, np.take_along_axis(probabilities, order, 1)[:, 0]


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(2, 12))
def test_label_scores_are_scikit_learn_s(seed, count, classes):
    truth, probabilities = predictions(seed, count, classes)
    order, confidence = ranked(probabilities)
    found = metrics.label_summary(truth, order, confidence, classes)(np.arange(count))
    first = order[:, 0]
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, first))
    assert found["mean_class_recall"] == pytest.approx(
        sklearn.metrics.recall_score(truth, first, labels=np.unique(truth), average="macro")
    )
    assert found["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(truth, first, average="macro", zero_division=0))
    within = (
        sklearn.metrics.top_k_accuracy_score(truth, probabilities, k=min(5, classes), labels=range(classes))
        if classes > 5
        else 1.0
    )
    assert found["top_5_accuracy"] == pytest.approx(within)


def test_what_each_class_was_taken_for_is_scikit_learn_s_confusion_matrix():
    truth, probabilities = predictions(1, 80, 6)
    order, confidence = ranked(probabilities)
    names = list("abcdef")
    rows = metrics.label_scores(truth, order, confidence, names)["classes"]
    matrix = sklearn.metrics.confusion_matrix(truth, order[:, 0])
    assert [[rows[a]["predicted"].get(b, 0) for b in names] for a in names] == matrix.tolist()
    assert [row["recall"] for row in rows.values()] == pytest.approx(matrix.diagonal() / matrix.sum(1))
    assert all(row["interval"][0] < row["recall"] < row["interval"][1] for row in rows.values())


def test_the_calibration_error_is_the_mean_gap_of_the_bins():
    truth, probabilities = predictions(3, 500, 4)
    order, confidence = ranked(probabilities)
    right = order[:, 0] == truth
    total = 0.0
    for low in range(15):
        inside = [i for i in range(500) if low / 15 <= confidence[i] < (low + 1) / 15]
        if inside:
            total += abs(sum(confidence[i] for i in inside) - sum(right[i] for i in inside)) / 500
    assert metrics.calibration_error(confidence, right) == pytest.approx(total)
    bins = metrics.calibration(confidence, right)
    assert sum(n for n, _, _ in bins) == 500
    assert sum(n * abs(c - a) for n, c, a in bins) / 500 == pytest.approx(total)
    assert metrics.calibration_error(np.ones(3), np.array([True, True, True])) == 0


def test_intervals_match_the_spread_of_a_proportion():
    """320 of 400 clips right: the normal approximation is 0.8 +- 1.96 * 0.02."""
    right = np.arange(400) < 320
    scores = metrics.with_intervals(lambda places: {"accuracy": float(right[places].mean())}, 400)
    low, high = scores["intervals"]["accuracy"]
    assert (
        scores["accuracy"] == 0.8 and low == pytest.approx(0.761, abs=0.004) and high == pytest.approx(0.839, abs=0.004)
    )
    assert scores == metrics.with_intervals(lambda places: {"accuracy": float(right[places].mean())}, 400)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40))
def test_mcnemar_and_wilson_are_scipy_s(only_first, only_second, both):
    first = [True] * only_first + [False] * only_second + [True] * both
    second = [False] * only_first + [True] * only_second + [True] * both
    found = metrics.mcnemar(first, second)
    assert (found["only_first_right"], found["only_second_right"]) == (only_first, only_second)
    if only_first + only_second:
        assert found["p"] == pytest.approx(binomtest(only_first, only_first + only_second).pvalue)
    low, high = metrics.wilson(only_first, only_first + both)
    oracle = binomtest(only_first, only_first + both).proportion_ci(method="wilson")
    assert low == pytest.approx(oracle.low, abs=1e-6) and high == pytest.approx(oracle.high, abs=1e-6)


def test_a_score_of_0_or_1_has_an_interval_too():
    """All draws are equal there, so the bootstrap alone would say "100.0 to 100.0" of two clips."""
    scores = {"accuracy": 1.0, "exact_match": 0.0, "CIDEr": 0.0}
    found = metrics.with_intervals(lambda places: scores, 2)["intervals"]
    for name, right in (("accuracy", 2), ("exact_match", 0)):
        oracle = binomtest(right, 2).proportion_ci(method="wilson")
        assert found[name] == pytest.approx([oracle.low, oracle.high], abs=1e-6) and found[name][0] < found[name][1]
    assert found["CIDEr"] == [0, 0]  # not a proportion


def test_a_paired_difference_is_tighter_than_two_intervals():
    """The second model is right wherever the first is, and on 5 more of 100 clips."""
    first, second = np.arange(100) < 60, np.arange(100) < 65
    one, two = ((lambda places, r=r: {"accuracy": float(r[places].mean())}) for r in (first, second))
    found = metrics.compared(one, two, 100)["accuracy"]
    assert found["difference"] == pytest.approx(0.05) and 0 < found["low"] <= 0.02 and 0.08 <= found["high"] < 0.12


# -- captions ---------------------------------------------------------------------------------------


def random_captions(seed: int, count: int) -> tuple[list[str], list[list[str]]]:
    rng = np.random.default_rng(seed)
    vocabulary = [f"w{i}" for i in range(40)]

    def sentence(low: int) -> list[str]:
        return list(rng.choice(vocabulary, rng.integers(low, 15), p=np.arange(40, 0, -1) / 820))

    references = [[" ".join(sentence(1)) for _ in range(rng.integers(1, 6))] for _ in range(count)]
    captions = []
    for refs in references:  # a reference with swapped words, something else, or nothing
        tokens = refs[0].split() if rng.random() < 0.7 else sentence(0)
        captions.append(" ".join(w if rng.random() < 0.7 else rng.choice(vocabulary) for w in tokens))
    return captions, references


def test_caption_scores_are_pycocoevalcap_s_on_2000_items():
    captions, references = random_captions(0, 2000)
    found = metrics.caption_summary(captions, references)(np.arange(2000))
    gts, res = dict(enumerate(references)), {i: [c] for i, c in enumerate(captions)}
    for n, value in enumerate(Bleu(4).compute_score(gts, res, verbose=0)[0], start=1):
        assert found[f"Bleu_{n}"] == pytest.approx(value, abs=1e-9)
    cider, each = Cider().compute_score(gts, res)
    assert found["CIDEr"] == pytest.approx(cider, abs=1e-9)
    assert metrics.cider_d(
        [c.split() for c in captions], [[r.split() for r in refs] for refs in references]
    ) == pytest.approx(each, abs=1e-9)
    assert found["ROUGE_L"] == pytest.approx(Rouge().compute_score(gts, res)[0], abs=1e-9)


def test_the_published_scores_are_reproduced(real_data, tmp_path, capsys):
    """The 1,000 items of coco-caption's demo, scored with the script."""
    given_data = json.loads((real_data / "caption_metrics" / "coco_fakecap_1000.json").read_text())
    for name in ("references", "candidates"):
        (tmp_path / f"{name}.json").write_text(json.dumps(given_data[name]))
    argv = ["--references", str(tmp_path / "references.json"), "--predictions", str(tmp_path / "candidates.json")]
    assert metrics.main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    published = given_data["published"]
    for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "CIDEr"):
        assert found[name] == pytest.approx(published[name], abs=1e-6)
    assert round(found["ROUGE_L"], 3) == published["ROUGE_L"]  # published with three digits
    low, high = found["intervals"]["CIDEr"]
    assert low < found["CIDEr"] < high


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's dog doesn't bark.", "a man 's dog does n't bark"),
        ("Two well-known boys, (maybe) three!", "two well-known boys -lrb- maybe -rrb- three"),
        ("on Morgan Rd. at 5:55 they’re off", "on morgan rd. at 5:55 they 're off"),
        ("un'acqua di mare, l'uomo", "un acqua di mare l'uomo"),
        ("they cannot see [a] U.S. flag", "they can not see -lsb- a -rsb- u.s. flag"),
        ("", ""),
    ],
)
def test_words_are_coco_caption_s(text, expected):
    """The output of its tokenizer (PTB 3600) for these texts."""
    assert " ".join(metrics.words(text)) == expected


def test_tokenised_texts_stay_unchanged():
    texts = [f"a bird sits on branch {i}" for i in range(1500)]
    mine, _ = metrics.tokenised(["a man ready to bat."], [texts])
    assert mine == [["a", "man", "ready", "to", "bat."]]
    mine, _ = metrics.tokenised(["a man ready to bat."], [["A man."]])
    assert mine == [["a", "man", "ready", "to", "bat"]]


def test_one_clip_and_empty_captions_have_scores():
    scores = metrics.caption_scores(["", "a dog"], [["a cat"], ["a dog"]])
    assert scores["exact_match"] == 0.5 and all(math.isfinite(scores[n]) for n in ("Bleu_4", "ROUGE_L", "CIDEr"))
    assert metrics.caption_scores([""], [[""]])["exact_match"] == 1


# -- the script -------------------------------------------------------------------------------------


def write(path, value) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def test_the_script_compares_labels(tmp_path, capsys):
    truth = {str(i): "ab"[i % 2] for i in range(40)}
    worse = truth | {str(i): "b" for i in range(0, 20, 2)}
    argv = ["--references", write(tmp_path / "r.json", truth), "--predictions", write(tmp_path / "p.json", worse)]
    assert metrics.main([*argv, "--compare", write(tmp_path / "q.json", truth)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == 0.75 and found["count"] == 40
    assert found["compare"]["accuracy"]["difference"] == 0.25
    assert found["compare"]["mcnemar"] == {"only_first_right": 0, "only_second_right": 10, "p": 2 / 2**10}


def test_the_script_compares_captions_in_any_order(tmp_path, capsys):
    references = {str(i): [f"a dog runs {i}", "an animal"] for i in range(30)}
    captions = {i: refs[0] for i, refs in references.items()}
    files = [
        write(tmp_path / f"{i}.json", v) for i, v in enumerate((references, captions, dict(reversed(captions.items()))))
    ]
    assert metrics.main(["--references", files[0], "--predictions", files[1], "--compare", files[2]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exact_match"] == 1 and found["Bleu_4"] == pytest.approx(1)
    assert all(c == {"difference": 0, "low": 0, "high": 0} for c in found["compare"].values())


def test_answers_of_inference_are_matched_by_their_files_names(tmp_path, capsys):
    rows = [{"file": f"clips/v{i}.mp4", "caption": f"a dog {i}", "run": "r"} for i in range(3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    references = write(tmp_path / "r.json", {"v2": ["a dog 2"], "v0": ["a cat"]})
    assert metrics.main(["--references", references, "--predictions", str(tmp_path / "p.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["count"], found["exact_match"]) == (2, 0.5)


@pytest.mark.parametrize(
    ("references", "answers", "message"),
    [
        ({"a": ["x"]}, {"b": "x"}, "no prediction for 1 of 1 id, for example 'a'"),
        ({"a": ["x"], "b": "y"}, {"a": "x", "b": "y"}, "a list of captions for every id, or a label for every id"),
        ({"a": ["x"]}, {"a": 3}, "neither a string nor a row"),
        ({"a": []}, {"a": "x"}, "a list of captions"),
        ({}, {"a": "x"}, "nothing to score"),
    ],
)
def test_bad_files_are_one_line(tmp_path, capsys, references, answers, message):
    argv = [
        "--references",
        write(tmp_path / "r.json", references),
        "--predictions",
        write(tmp_path / "p.json", answers),
    ]
    assert metrics.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_files_that_are_not_json_are_one_line(tmp_path, capsys):
    (tmp_path / "p.json").write_text("nothing\n")
    assert metrics.main(["--predictions", str(tmp_path / "p.json")]) == 2
    assert "neither a JSON object" in capsys.readouterr().err
    assert metrics.main(["--predictions", str(tmp_path / "absent.json")]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert metrics.main(["--predictions", write(tmp_path / "p.json", {"a": "x"})]) == 2
    assert "has no truth for 'a': add --references" in capsys.readouterr().err


def test_labels_of_a_multi_label_run_are_not_taken_for_captions(tmp_path, capsys):
    best = {"label": "a", "score": 0.9}
    row = {"file": "x.pt", "truth": ["a", "b"], "labels": [best], "top_k": [best]}
    assert metrics.main(["--predictions", write(tmp_path / "p.json", row)]) == 2
    assert "several labels per clip" in capsys.readouterr().err


def test_a_reader_that_stops_early_gets_no_traceback(tmp_path):
    answers = {str(i): "a" for i in range(20)}
    argv = ["--references", write(tmp_path / "r.json", answers), "--predictions", write(tmp_path / "p.json", answers)]
    command = [sys.executable, str(ROOT / "metrics.py"), *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1
