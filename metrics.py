"""Scores of predictions against truths, each with a 95 % bootstrap interval. No torch.

python metrics.py --references R.json --predictions P.json [--compare P2.json]

R holds {id: [captions]}, or {id: label}. P holds {id: caption}, or is a predictions_test.jsonl of a run, which brings
its truths itself, or an --output of inference.py. One JSON object is printed.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from script import Parser, UserError, run_script, shown

RESAMPLES = 1000
BINS = 15  # of confidence, for the calibration error
Summary = Callable[[np.ndarray], dict[str, float]]  # the scores of the clips at these places


# -- intervals --------------------------------------------------------------------------------------


def resampled(summaries: list[Summary], count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Each summary's scores over the same RESAMPLES draws of `count` clips with replacement: name -> (RESAMPLES,)."""
    rng = np.random.default_rng(seed)
    rows: list[list[dict[str, float]]] = [[] for _ in summaries]
    for _ in range(RESAMPLES):
        places = rng.integers(0, count, count)
        for row, summary in zip(rows, summaries, strict=True):
            row.append(summary(places))
    return [{name: np.array([r[name] for r in row]) for name in row[0]} for row in rows]


def bounds(draws: np.ndarray) -> list[float]:
    """The 2.5 and 97.5 % quantiles."""
    return np.quantile(draws, [0.025, 0.975]).tolist()


def with_intervals(summary: Summary, count: int) -> dict[str, Any]:
    """The scores of all `count` clips, and `intervals`: name -> [low, high], percentile bootstrap over clips
    (Efron 1979)."""
    (draws,) = resampled([summary], count)
    return summary(np.arange(count)) | {"intervals": {name: bounds(values) for name, values in draws.items()}}


def compared(first: Summary, second: Summary, count: int) -> dict[str, dict[str, float]]:
    """second - first for every score, with the interval of the paired bootstrap: both on the same draws."""
    draws, places = resampled([first, second], count), np.arange(count)
    one, two = first(places), second(places)
    result = {}
    for name in (name for name in one if name in two):  # labels without probabilities have fewer scores
        low, high = bounds(draws[1][name] - draws[0][name])
        result[name] = {"difference": two[name] - one[name], "low": low, "high": high}
    return result


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float]:
    """McNemar's exact test of two classifiers on the same clips: how many only one of them has right, and how
    likely so uneven a split is by chance (two-sided binomial)."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1))
    return {"only_first_right": only_first, "only_second_right": only_second, "p": min(1.0, 2 * tail / 2**n)}


def wilson(right: int, count: int) -> list[float]:
    """The 95 % interval of a share (Wilson 1927); it does not shrink to a point at 0 and 1, as the bootstrap's does."""
    z = 1.959964
    centre = (right + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * math.sqrt(right * (count - right) / count + z * z / 4)
    return [max(0.0, centre - half), min(1.0, centre + half)]


# -- labels -----------------------------------------------------------------------------------------


def class_counts(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> tuple[np.ndarray, ...]:
    """Of each class: clips answered rightly, clips, clips answered with it. (K,) each"""
    groups = (truth[truth == predicted], truth, predicted)
    return tuple(np.bincount(group, minlength=num_classes) for group in groups)


def mean_recall(right: np.ndarray, clips: np.ndarray) -> float:
    """The mean recall of the classes that have clips."""
    return float((right[clips > 0] / clips[clips > 0]).mean())


def macro_f1(right: np.ndarray, clips: np.ndarray, answers: np.ndarray) -> float:
    """The mean F1 of all classes that occur, as truth or as answer."""
    seen = clips + answers > 0
    return float((2 * right[seen] / (clips + answers)[seen]).mean())


def bins_of(confidence: np.ndarray) -> np.ndarray:
    """Which of BINS equal spans each confidence lies in. (n,)"""
    return np.minimum((confidence * BINS).astype(int), BINS - 1)


def calibration(confidence: np.ndarray, right: np.ndarray) -> list[tuple[int, float, float]]:
    """For each of BINS equal spans of confidence that is not empty: (clips, mean confidence, accuracy)."""
    bins = bins_of(confidence)
    masks = [bins == b for b in np.unique(bins)]
    return [(int(m.sum()), float(confidence[m].mean()), float(right[m].mean())) for m in masks]


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error (Naeini 2015): the mean distance of confidence and accuracy over the bins, by clips."""
    bins = bins_of(confidence)
    gaps = np.bincount(bins, weights=confidence - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(right))


def label_summary(truth: np.ndarray, ranked: np.ndarray, confidence: np.ndarray, num_classes: int) -> Summary:
    """Scores from the true classes (n,), the likeliest classes, best first (n, min(5, K)), and the probability of
    the first of them (n,)."""
    hits = ranked == truth[:, None]  # (n, k)
    first, within = hits[:, 0], hits.any(1)

    def summary(places: np.ndarray) -> dict[str, float]:
        right, clips, answers = class_counts(truth[places], ranked[places, 0], num_classes)
        return {
            "accuracy": float(first[places].mean()),
            "top_5_accuracy": float(within[places].mean()),
            "mean_class_recall": mean_recall(right, clips),
            "macro_f1": macro_f1(right, clips, answers),
            "calibration_error": calibration_error(confidence[places], first[places]),
        }

    return summary


def label_rows_summary(rows: list[dict[str, Any]]) -> Summary:
    """label_summary from the rows of a predictions_{val,test}.jsonl, which hold the five likeliest classes."""
    names = sorted({row["truth"] for row in rows} | {best["label"] for row in rows for best in row["top_k"]})
    places = {name: i for i, name in enumerate(names)}
    truth = np.array([places[row["truth"]] for row in rows])
    ranked = np.array([[places[best["label"]] for best in row["top_k"]] for row in rows])
    return label_summary(truth, ranked, np.array([row["score"] for row in rows]), len(names))


def label_scores(
    truth: np.ndarray, ranked: np.ndarray, confidence: np.ndarray, class_names: list[str]
) -> dict[str, Any]:
    """label_summary with intervals, and by class: recall, its Wilson interval, and what it was taken for."""
    classes: dict[str, dict[str, Any]] = {name: {"count": 0, "recall": None, "predicted": {}} for name in class_names}
    for t, p in zip(truth, ranked[:, 0], strict=True):
        row = classes[class_names[t]]
        row["count"] += 1
        row["predicted"][class_names[p]] = row["predicted"].get(class_names[p], 0) + 1
    for name, row in classes.items():
        if row["count"]:
            right = row["predicted"].get(name, 0)
            row |= {"recall": right / row["count"], "interval": wilson(right, row["count"])}
    scores = with_intervals(label_summary(truth, ranked, confidence, len(class_names)), len(truth))
    return scores | {"classes": classes, "calibration": calibration(confidence, ranked[:, 0] == truth)}


# -- captions ---------------------------------------------------------------------------------------

ABBREVIATIONS = (
    "[a-z]|ave|blvd|bros|capt|co|corp|dr|etc|ft|gen|gov|inc|jr|lt|ltd|mr|mrs|ms|mt|prof|rd|rev|sen|sgt|sq|sr|st|vs"
)
WORD = re.compile(
    rf"\b(?:[a-z]\.){{2,}}|\b(?:{ABBREVIATIONS})\.(?!\w)|o'clock|\b[dl]'\w+|n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:[-.,/&*:]\w+)*|\S"
)
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}  # count as words there
PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'}


def words(caption: str) -> list[str]:
    """Lower-case words as coco-caption's tokenizer gives them: clitics split off (does n't, dog 's), punctuation
    dropped, the full stop of an abbreviation kept."""
    text = re.sub(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b", r" \1", caption.lower().replace("’", "'"))
    found = WORD.findall(re.sub(r"\bcannot\b", "can not", text))
    return [BRACKETS.get(w, w) for w in found if w not in PUNCTUATION]


def tokenised(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """The words of all captions and references. Texts of which `words` would change fewer than one in a thousand have
    been through a tokenizer already, and are split at their spaces."""
    mine, theirs = [words(c) for c in captions], [[words(r) for r in refs] for refs in references]
    texts = [*zip(captions, mine, strict=True)]
    texts += [pair for refs, split in zip(references, theirs, strict=True) for pair in zip(refs, split, strict=True)]
    if sum(text.split() != split for text, split in texts) * 1000 < len(texts):
        return [c.split() for c in captions], [[r.split() for r in refs] for refs in references]
    return mine, theirs


def ngrams(tokens: list[str]) -> list[Counter]:
    """Counts of the 1-, 2-, 3- and 4-grams."""
    return [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in (1, 2, 3, 4)]


def bleu_counts(tokens: list[str], references: list[list[str]]) -> list[int]:
    """What a caption adds to Bleu: for n = 1 to 4 its n-grams, then those that a reference has too, then its
    length and that of the reference closest in length. (10,)"""
    wanted = [ngrams(r) for r in references]
    total, matched = [], []
    for n, mine in enumerate(ngrams(tokens)):
        most = Counter()
        for counts in wanted:
            most |= counts[n]
        total.append(sum(mine.values()))
        matched.append(sum((mine & most).values()))
    closest = min((abs(len(r) - len(tokens)), len(r)) for r in references)[1]
    return [*total, *matched, len(tokens), closest]


def bleu(counts: np.ndarray) -> dict[str, float]:
    """Bleu-1 to -4 of a corpus (Papineni 2002) from the rows of bleu_counts, with coco-caption's two small terms."""
    totals = counts.sum(0).astype(float)
    precisions = (totals[4:8] + 1e-15) / (totals[:4] + 1e-9)
    means = np.cumprod(precisions) ** (1 / np.arange(1, 5))
    ratio = (totals[8] + 1e-15) / (totals[9] + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return {f"Bleu_{n}": float(value * brevity) for n, value in enumerate(means, start=1)}


def longest_common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0  # row[j - 1] of the word before
        for j, other in enumerate(b, start=1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(tokens: list[str], references: list[list[str]]) -> float:
    """ROUGE-L (Lin 2004) with beta 1.2, the best precision and the best recall over the references."""
    common = [longest_common(r, tokens) for r in references]
    precision = max(common) / max(1, len(tokens))
    recall = max(c / max(1, len(r)) for c, r in zip(common, references, strict=True))
    weight = 1.2**2
    return (1 + weight) * precision * recall / (recall + weight * precision) if precision and recall else 0.0


def cider_d(captions: list[list[str]], references: list[list[list[str]]]) -> np.ndarray:
    """CIDEr-D of each caption (Vedantam 2015): sigma 6, clipped, times 10; document frequencies from these
    references. (n,)"""
    grams = [[ngrams(r) for r in refs] for refs in references]
    documents = Counter(gram for refs in grams for gram in {g for r in refs for counts in r for g in counts})
    log_count = math.log(len(references))

    def vectors(counts: list[Counter]) -> tuple[list[dict[tuple, float]], list[float], int]:
        weighted = [{g: c * (log_count - math.log(max(1, documents[g]))) for g, c in n.items()} for n in counts]
        return weighted, [math.sqrt(sum(v * v for v in w.values())) for w in weighted], counts[1].total()

    def similarity(mine: tuple, other: tuple) -> float:
        total = 0.0
        for a, b, norm_a, norm_b in zip(mine[0], other[0], mine[1], other[1], strict=True):
            if norm_a and norm_b:
                total += sum(min(v, b[g]) * b[g] for g, v in a.items() if g in b) / (norm_a * norm_b)
        return total * math.exp(-((mine[2] - other[2]) ** 2) / (2 * 6**2))

    scores = []
    for tokens, refs in zip(captions, grams, strict=True):
        mine = vectors(ngrams(tokens))
        scores.append(10 / 4 * sum(similarity(mine, vectors(r)) for r in refs) / len(refs))
    return np.array(scores)


def exact_matches(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Whether each caption equals one of its references, spaces aside. (n,)"""
    tidy = [" ".join(c.split()) for c in captions]
    return np.array([c in {" ".join(r.split()) for r in refs} for c, refs in zip(tidy, references, strict=True)])


def caption_summary(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Summary:
    """Bleu-1 to -4, ROUGE-L, CIDEr and the share of exact matches. CIDEr's document frequencies stay those of
    all references, whichever clips are drawn."""
    mine, theirs = tokenised(captions, references)
    counts = np.array([bleu_counts(m, refs) for m, refs in zip(mine, theirs, strict=True)])
    rouge = np.array([rouge_l(m, refs) for m, refs in zip(mine, theirs, strict=True)])
    cider, exact = cider_d(mine, theirs), exact_matches(captions, references)

    def summary(places: np.ndarray) -> dict[str, float]:
        return bleu(counts[places]) | {
            "ROUGE_L": float(rouge[places].mean()),
            "CIDEr": float(cider[places].mean()),
            "exact_match": float(exact[places].mean()),
        }

    return summary


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """caption_summary with intervals."""
    return with_intervals(caption_summary(captions, references), len(captions))


#: the words that name an attribute's values: {attribute: {value: [word, ...]}}
Lexicon = dict[str, dict[str, list[str]]]


def attributes_in(caption: str, lexicon: Lexicon) -> dict[str, str | None]:
    """The value of each attribute that a caption names; None where it names none, or two."""
    tokens = {*re.findall(r"[a-z]+", caption.lower())}
    named = {a: [value for value, words in values.items() if tokens & {*words}] for a, values in lexicon.items()}
    return {attribute: values[0] if len(values) == 1 else None for attribute, values in named.items()}


def attribute_summary(found: Sequence[dict[str, str | None]], truth: Sequence[dict[str, str]]) -> Summary:
    """For each attribute the share of captions that name it rightly; `all`: every one of them."""
    right = {n: np.array([f.get(n) == t[n] for f, t in zip(found, truth, strict=True)]) for n in truth[0]}
    right["all"] = np.logical_and.reduce([right[n] for n in truth[0]])
    return lambda places: {name: float(r[places].mean()) for name, r in right.items()}


# -- the script -------------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[str, Any]:
    """id -> value of a JSON object, or file -> row of a jsonl. Raises UserError if it is neither."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    try:
        values = json.loads(text)
        if isinstance(values, dict) and not isinstance(values.get("file"), str):
            return values
    except (ValueError, RecursionError):
        pass
    try:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        files = [row["file"] for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError):
        files = [None]
    if not all(isinstance(file, str) for file in files):
        raise UserError(f"{path} is neither a JSON object {{id: ...}} nor lines with a `file` each")
    twice = [file for file, count in Counter(files).items() if count > 1]
    if twice:
        raise UserError(f"{path} has several rows for {shown(twice[0])}")
    return dict(zip(files, rows, strict=True))


def paired(references: dict[str, Any] | None, predictions: dict[str, Any], path: Path) -> tuple[list, list]:
    """(predictions, truths) in the references' order; without these in the predictions' own, with the truths they
    bring. The file a/b.mp4 stands for the id b too. Raises UserError for an id without prediction or a row without truth."""
    if references is None:
        lacking = [
            k for k, row in predictions.items() if not isinstance(row, dict) or not row.keys() & {"truth", "references"}
        ]
        if lacking:
            raise UserError(f"{path} holds no truth for {shown(lacking[0])}: add --references R.json")
        return [*predictions.values()], [row.get("truth", row.get("references")) for row in predictions.values()]
    by_name = {Path(k).stem: row for k, row in predictions.items()}
    if not references.keys() & predictions.keys() and len(by_name) == len(predictions):
        predictions = by_name  # files were answered for, ids are asked for
    lacking = [k for k in references if k not in predictions]
    if lacking:
        raise UserError(
            f"{path} has no prediction for {len(lacking)} of {len(references)} ids, first {shown(lacking[0])}"
        )
    return [predictions[k] for k in references], [*references.values()]


def said(row: Any, path: Path) -> str:
    """The caption or label of a prediction, be it a text or a row."""
    value = row.get("caption", row.get("label")) if isinstance(row, dict) else row
    if isinstance(value, list) and len(value) == 1:  # coco-caption's own layout
        (value,) = value
    if not isinstance(value, str):
        raise UserError(f"{path}: a prediction is neither a text nor a row with `caption` or `label`: {shown(row)}")
    return value


def check_label_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Raises UserError for rows that are not those of a run's predictions_{val,test}.jsonl."""
    for row in rows:
        score, best = row.get("score"), row.get("top_k")
        labels = [b.get("label") if isinstance(b, dict) else None for b in best] if isinstance(best, list) else [None]
        plain = isinstance(score, int | float) and 0 <= score <= 1 and all(isinstance(b, str) for b in labels)
        if not plain or not labels or len(labels) != len(rows[0]["top_k"]):
            raise UserError(
                f"{path}: a row needs `score` from 0 to 1 and `top_k` with as many labels as the others: {shown(row)}"
            )


def summary_of(rows: list[Any], truths: list[Any], path: Path) -> Summary:
    """The summary of captions (truths are lists of texts) or labels (truths are texts)."""
    answers = [said(row, path) for row in rows]
    if all(isinstance(t, list) and t and all(isinstance(c, str) for c in t) for t in truths):
        return caption_summary(answers, truths)
    if not all(isinstance(t, str) for t in truths):
        raise UserError("references are lists of captions for every id, or a label for every id")
    if all(isinstance(row, dict) and "truth" in row for row in rows):
        check_label_rows(rows, path)
        return label_rows_summary([row | {"truth": t} for row, t in zip(rows, truths, strict=True)])
    places = {name: i for i, name in enumerate(sorted({*answers, *truths}))}
    truth, first = np.array([places[t] for t in truths]), np.array([places[a] for a in answers])
    summary = label_summary(truth, first[:, None], np.ones(len(first)), len(places))
    kept = ("accuracy", "mean_class_recall", "macro_f1")  # the others need more than the first answer
    return lambda drawn: {name: value for name, value in summary(drawn).items() if name in kept}


def run(argv: list[str] | None) -> None:
    parser = Parser(
        prog="metrics.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--references",
        metavar="R",
        type=Path,
        help="{id: [captions]} or {id: label}; a run's own predictions bring theirs",
    )
    parser.add_argument(
        "--predictions",
        metavar="P",
        type=Path,
        required=True,
        help="{id: caption or label}, or a jsonl with a row per file",
    )
    parser.add_argument(
        "--compare",
        metavar="P2",
        type=Path,
        help="other predictions for the same ids: adds P2 - P with paired bootstrap intervals, for labels McNemar's test too",
    )
    args = parser.parse_args(argv)
    references = read_rows(args.references) if args.references else None
    rows, truths = paired(references, read_rows(args.predictions), args.predictions)
    if not truths:
        raise UserError("there is nothing to score: no ids")
    summary = summary_of(rows, truths, args.predictions)
    result = {"count": len(truths)} | with_intervals(summary, len(truths))
    if args.compare:
        ids = [*(references or read_rows(args.predictions))]
        others, _ = paired(dict(zip(ids, truths, strict=True)), read_rows(args.compare), args.compare)
        result["compare"] = compared(summary, summary_of(others, truths, args.compare), len(truths))
        if not isinstance(truths[0], list):
            right = [[said(r, args.predictions) == t for r, t in zip(x, truths, strict=True)] for x in (rows, others)]
            result["compare"]["mcnemar"] = mcnemar(*right)
    print(json.dumps(result, indent=1))


def main(argv: list[str] | None = None) -> int:
    return run_script(run, argv)


if __name__ == "__main__":
    sys.exit(main())
