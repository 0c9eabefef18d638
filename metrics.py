"""Scores predictions against references, each score with a 95 % interval: the bootstrap's, or Wilson's for a score of
exactly 0 or 1. Prints one JSON object.

python metrics.py --references R.json --predictions P.json [--compare P2.json]

R contains {id: [captions]} or {id: label}. P contains {id: caption} or {id: label}, or is an --output of inference.py,
or a predictions_test.jsonl of a run, which contains its own references.
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

from script import Parser, UserError, cause_of, counted, script, shown

RESAMPLES = 1000
UNBOUNDED = {"CIDEr", "false_alarms_per_hour"}  # scores that are not proportions: they may exceed 1
BINS = 15  # confidence bins of the calibration error
Summary = Callable[[np.ndarray], dict[str, float]]  # indices of clips -> {name: score}


# -- intervals --------------------------------------------------------------------------------------


def resampled(summaries: list[Summary], count: int, groups: Sequence[str] | None = None) -> list[dict[str, np.ndarray]]:
    """Scores on RESAMPLES draws of `count` clips with replacement: {name: (RESAMPLES,)} for each summary.

    All summaries get the same draws, which makes their differences paired. With `groups`, the group of each clip, whole
    groups are drawn, as many as there are: the cluster bootstrap (Davison and Hinkley 1997, section 3.8).
    """
    # a fixed seed, so that the same predictions always get the same intervals
    rng = np.random.default_rng(0)
    rows: list[list[dict[str, float]]] = [[] for _ in summaries]
    members = members_of(groups)
    for _ in range(RESAMPLES):
        if members:
            indices = np.concatenate([members[g] for g in rng.integers(0, len(members), len(members))])
        else:
            indices = rng.integers(0, count, count)
        for row, summary in zip(rows, summaries, strict=True):
            row.append(summary(indices))
    return [{name: np.array([r[name] for r in row]) for name in row[0]} for row in rows]


def members_of(groups: Sequence[str] | None) -> list[np.ndarray]:
    """The indices of the clips of each group, or [] if no two clips are in one group."""
    numbers: dict[str, int] = {}
    codes = np.array([numbers.setdefault(name, len(numbers)) for name in groups or ()], int)
    if len(numbers) == len(codes):
        return []
    return np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])


def bounds(draws: np.ndarray) -> list[float]:
    """The 95 % interval of draws: their 2.5 and 97.5 % quantiles. Draws without a score (NaN) do not count."""
    return np.nanquantile(draws, [0.025, 0.975]).tolist()


def wilson(right: float, count: int) -> list[float]:
    """The 95 % interval of a proportion (Wilson 1927). Unlike the bootstrap's, it has a width at 0 and 1 too."""
    z = 1.959964  # 97.5 % quantile of the normal distribution
    centre = (right + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * math.sqrt(right * (count - right) / count + z * z / 4)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def with_intervals(summary: Summary, count: int, groups: Sequence[str] | None = None) -> dict[str, Any]:
    """The scores of all `count` clips and their "intervals" {name: [low, high]}.

    The intervals are those of the percentile bootstrap over clips (Efron 1979), or over the `groups` that they are in.
    It has no width if all draws are equal, as when every clip is right, so a score of exactly 0 or 1 gets the Wilson
    interval instead, which counts each group once; with a single group every score does.
    """
    scores, (draws,) = summary(np.arange(count)), resampled([summary], count, groups=groups)
    intervals = {name: bounds(values) for name, values in draws.items()}
    units = len(members_of(groups)) or count
    for name, score in scores.items():
        if (score in (0, 1) or units == 1 < count) and name not in UNBOUNDED:
            intervals[name] = wilson(score * units, units)
    return scores | {"intervals": intervals}


def fraction_interval(hits: np.ndarray, groups: Sequence[str] | None) -> list[float]:
    """The 95 % interval of the fraction of clips that are hits, (n,) bool: Wilson's, or the bootstrap's over groups."""
    if not members_of(groups):
        return wilson(int(hits.sum()), len(hits))
    scores = with_intervals(lambda drawn: {"fraction": float(hits[drawn].mean())}, len(hits), groups)
    return scores["intervals"]["fraction"]


def compared(
    first: Summary, second: Summary, count: int, groups: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """The difference second - first of every score, with its interval from the paired bootstrap."""
    draws, everything = resampled([first, second], count, groups=groups), np.arange(count)
    one, two = first(everything), second(everything)
    result = {}
    for name in (name for name in one if name in two):  # labels without probabilities have fewer scores
        low, high = bounds(draws[1][name] - draws[0][name])
        result[name] = {"difference": two[name] - one[name], "low": low, "high": high}
    return result


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float]:
    """McNemar's exact test of two classifiers on the same clips. `first` and `second` say which answers are right. The
    clips must be independent.

    Counts the clips that only one of them has right. `p` is the two-sided binomial probability of a split at least as
    uneven if both are equally good.
    """
    # clips that both get right, or both get wrong, say nothing about which one is better
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1))
    return {"only_first_right": only_first, "only_second_right": only_second, "p": min(1.0, 2 * tail / 2**n)}


# -- labels -----------------------------------------------------------------------------------------


def class_counts(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> tuple[np.ndarray, ...]:
    """Per class: true positives, clips, predictions. (K,) each"""
    groups = (truth[truth == predicted], truth, predicted)
    return tuple(np.bincount(group, minlength=num_classes) for group in groups)


def mean_recall(right: np.ndarray, clips: np.ndarray) -> float:
    """The mean recall over the classes that have clips."""
    return float((right[clips > 0] / clips[clips > 0]).mean())


def macro_f1(right: np.ndarray, clips: np.ndarray, predictions: np.ndarray) -> float:
    """The mean F1 over the classes that occur as truth or prediction."""
    used = clips + predictions > 0
    return float((2 * right[used] / (clips + predictions)[used]).mean())


def bins_of(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence; BINS bins of equal width divide [0, 1]. (n,)"""
    return np.minimum((confidence * BINS).astype(int), BINS - 1)


def calibration(confidence: np.ndarray, right: np.ndarray) -> list[tuple[int, float, float]]:
    """For each bin that is not empty: (clips, mean confidence, accuracy)."""
    bins = bins_of(confidence)
    masks = [bins == b for b in np.unique(bins)]
    return [(int(m.sum()), float(confidence[m].mean()), float(right[m].mean())) for m in masks]


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error (Naeini 2015): mean |confidence - accuracy| over the bins, weighted by clips."""
    # (clips in bin / all clips) * |mean confidence - accuracy|, summed over the bins; the clips in a bin cancel out
    bins = bins_of(confidence)
    gaps = np.bincount(bins, weights=confidence - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(right))


def label_summary(truth: np.ndarray, ranked: np.ndarray, confidence: np.ndarray, num_classes: int) -> Summary:
    """Classification scores.

    Args:
        truth: the true classes, (n,).
        ranked: the most likely classes, best first, (n, min(5, K)).
        confidence: the probability of the first of them, (n,).
    """
    # computed once, so that the summary only indexes: the bootstrap calls it a thousand times
    hits = ranked == truth[:, None]  # (n, k)
    first, any_hit = hits[:, 0], hits.any(1)

    def summary(indices: np.ndarray) -> dict[str, float]:
        right, clips, predictions = class_counts(truth[indices], ranked[indices, 0], num_classes)
        return {
            "accuracy": float(first[indices].mean()),
            "top_5_accuracy": float(any_hit[indices].mean()),
            "mean_class_recall": mean_recall(right, clips),
            "macro_f1": macro_f1(right, clips, predictions),
            "calibration_error": calibration_error(confidence[indices], first[indices]),
        }

    return summary


def label_rows_summary(rows: list[dict[str, Any]]) -> Summary:
    """label_summary() of the rows of a predictions_{val,test}.jsonl, which have the five most likely classes."""
    names = sorted({row["truth"] for row in rows} | {best["label"] for row in rows for best in row["top_k"]})
    index = {name: i for i, name in enumerate(names)}
    truth = np.array([index[row["truth"]] for row in rows])  # (n,)
    ranked = np.array([[index[best["label"]] for best in row["top_k"]] for row in rows])  # (n, k)
    return label_summary(truth, ranked, np.array([row["score"] for row in rows]), len(names))


def label_scores(
    truth: np.ndarray,
    ranked: np.ndarray,
    confidence: np.ndarray,
    class_names: list[str],
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """label_summary() with intervals, the calibration curve, and "classes": {class: its clips, recall with its
    interval, and how often each class was predicted for them}. `groups`: the group of each clip."""
    # a row of the confusion matrix per class, without its zeros
    classes: dict[str, dict[str, Any]] = {name: {"count": 0, "recall": None, "predicted": {}} for name in class_names}
    for t, p in zip(truth, ranked[:, 0], strict=True):
        row = classes[class_names[t]]
        row["count"] += 1
        row["predicted"][class_names[p]] = row["predicted"].get(class_names[p], 0) + 1

    # a class without clips has no recall
    hits = ranked[:, 0] == truth  # (n,)
    for number, (name, row) in enumerate(classes.items()):
        if row["count"]:
            places = np.flatnonzero(truth == number)
            own = [groups[i] for i in places] if groups else None
            row["recall"] = row["predicted"].get(name, 0) / row["count"]
            row["interval"] = fraction_interval(hits[places], own)
    scores = with_intervals(label_summary(truth, ranked, confidence, len(class_names)), len(truth), groups)
    return scores | {"classes": classes, "calibration": calibration(confidence, hits)}


# -- captions ---------------------------------------------------------------------------------------

ABBREVIATIONS = (
    "[a-z]|ave|blvd|bros|capt|co|corp|dr|etc|ft|gen|gov|inc|jr|lt|ltd|mr|mrs|ms|mt|prof|rd|rev|sen|sgt|sq|sr|st|vs"
)
WORD = re.compile(
    rf"\b(?:[a-z]\.){{2,}}|\b(?:{ABBREVIATIONS})\.(?!\w)|o'clock|\b[dl]'\w+"
    r"|n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:[-.,/&*:]\w+)*|\S"
)
# coco-caption counts these as words
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}
PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'}


def words(caption: str) -> list[str]:
    """Splits a caption into lower-case words, as coco-caption's PTB tokenizer does without its Java.

    Clitics are split off (does n't, dog 's), punctuation is dropped, and abbreviations keep their full stop.
    """
    text = re.sub(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b", r" \1", caption.lower().replace("’", "'"))
    tokens = WORD.findall(re.sub(r"\bcannot\b", "can not", text))
    return [BRACKETS.get(w, w) for w in tokens if w not in PUNCTUATION]


def tokenised(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """The words of all captions and of all references.

    If words() would change fewer than one text in a thousand, the texts are already tokenized, and only split at their
    spaces: tokenizing twice would change those few.
    """
    tokens, reference_tokens = [words(c) for c in captions], [[words(r) for r in refs] for refs in references]
    texts = [*zip(captions, tokens, strict=True)]
    for refs, split in zip(references, reference_tokens, strict=True):
        texts += zip(refs, split, strict=True)
    if sum(text.split() != split for text, split in texts) * 1000 < len(texts):
        return [c.split() for c in captions], [[r.split() for r in refs] for refs in references]
    return tokens, reference_tokens


def ngrams(tokens: list[str]) -> list[Counter]:
    """Counts of the 1-, 2-, 3- and 4-grams."""
    return [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in (1, 2, 3, 4)]


def bleu_counts(tokens: list[str], references: list[list[str]]) -> list[int]:
    """What one caption adds to the corpus counts of BLEU. (10,)

    For n = 1 to 4 its number of n-grams, then the number of these that a reference has too, then its own length and the
    length of the reference that is closest in length.
    """
    reference_counts = [ngrams(r) for r in references]
    total, matched = [], []
    for n, counts in enumerate(ngrams(tokens)):
        allowed = Counter()  # an n-gram counts as often as it is in one reference (clipped precision)
        for reference in reference_counts:
            allowed |= reference[n]
        total.append(sum(counts.values()))
        matched.append(sum((counts & allowed).values()))
    closest = min((abs(len(r) - len(tokens)), len(r)) for r in references)[1]
    return [*total, *matched, len(tokens), closest]


def bleu(counts: np.ndarray) -> dict[str, float]:
    """BLEU-1 to -4 of a corpus (Papineni 2002) from rows of bleu_counts(). The small constants are coco-caption's."""
    # sums over the corpus first, then geometric means of the precisions: BLEU is not a mean over captions
    totals = counts.sum(0).astype(float)
    precisions = (totals[4:8] + 1e-15) / (totals[:4] + 1e-9)
    means = np.cumprod(precisions) ** (1 / np.arange(1, 5))
    ratio = (totals[8] + 1e-15) / (totals[9] + 1e-9)
    # short captions would have a high precision, so they are penalised
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return {f"Bleu_{n}": float(value * brevity) for n, value in enumerate(means, start=1)}


def longest_common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence, by dynamic programming with one row."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0  # row[j - 1] of the previous word
        for j, other in enumerate(b, start=1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(tokens: list[str], references: list[list[str]]) -> float:
    """ROUGE-L (Lin 2004) with beta 1.2, from the best precision and the best recall over the references."""
    common = [longest_common(r, tokens) for r in references]
    precision = max(common) / max(1, len(tokens))
    recall = max(c / max(1, len(r)) for c, r in zip(common, references, strict=True))
    weight = 1.2**2
    return (1 + weight) * precision * recall / (recall + weight * precision) if precision and recall else 0.0


def cider_d(captions: list[list[str]], references: list[list[list[str]]]) -> np.ndarray:
    """CIDEr-D of each caption (Vedantam 2015), with sigma 6 and times 10. (n,)

    Document frequencies are those of these references; each clip's references are one document.
    """
    # in how many documents each n-gram occurs
    grams = [[ngrams(r) for r in refs] for refs in references]
    documents = Counter(gram for refs in grams for gram in {g for r in refs for counts in r for g in counts})
    log_count = math.log(len(references))

    # tf-idf vectors for n = 1 to 4, their norms, and the number of bigrams as a measure of length
    def vectors(counts: list[Counter]) -> tuple[list[dict[tuple, float]], list[float], int]:
        weighted = [{g: c * (log_count - math.log(max(1, documents[g]))) for g, c in n.items()} for n in counts]
        return weighted, [math.sqrt(sum(v * v for v in w.values())) for w in weighted], counts[1].total()

    # the "D": clipping and a length penalty, so that repeating words does not pay
    def similarity(caption: tuple, reference: tuple) -> float:
        total = 0.0
        for a, b, norm_a, norm_b in zip(caption[0], reference[0], caption[1], reference[1], strict=True):
            if norm_a and norm_b:
                total += sum(min(v, b[g]) * b[g] for g, v in a.items() if g in b) / (norm_a * norm_b)
        return total * math.exp(-((caption[2] - reference[2]) ** 2) / (2 * 6**2))

    # the mean over the four n and over the references
    scores = []
    for tokens, refs in zip(captions, grams, strict=True):
        caption = vectors(ngrams(tokens))
        scores.append(10 / 4 * sum(similarity(caption, vectors(r)) for r in refs) / len(refs))
    return np.array(scores)


def exact_matches(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Whether each caption equals one of its references, ignoring spacing. (n,)"""
    plain = [" ".join(c.split()) for c in captions]
    return np.array([c in {" ".join(r.split()) for r in refs} for c, refs in zip(plain, references, strict=True)])


def caption_summary(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Summary:
    """BLEU-1 to -4, ROUGE-L, CIDEr and the fraction of exact matches.

    Everything that depends on one clip is computed once, because the bootstrap calls the summary a thousand times. So
    CIDEr uses the document frequencies of all references, whichever clips are drawn. The metrics are written here, not
    taken from pycocoevalcap, because that package needs Java and does not give the counts per clip.
    """
    tokens, reference_tokens = tokenised(captions, references)
    counts = np.array([bleu_counts(c, refs) for c, refs in zip(tokens, reference_tokens, strict=True)])  # (n, 10)
    rouge = np.array([rouge_l(c, refs) for c, refs in zip(tokens, reference_tokens, strict=True)])  # (n,)
    cider, exact = cider_d(tokens, reference_tokens), exact_matches(captions, references)

    def summary(indices: np.ndarray) -> dict[str, float]:
        return bleu(counts[indices]) | {
            "ROUGE_L": float(rouge[indices].mean()),
            "CIDEr": float(cider[indices].mean()),
            "exact_match": float(exact[indices].mean()),
        }

    return summary


def caption_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]], groups: Sequence[str] | None = None
) -> dict[str, Any]:
    """caption_summary() with intervals. `groups`: the group of each caption's clip."""
    return with_intervals(caption_summary(captions, references), len(captions), groups)


def question_scores(right: np.ndarray, kinds: Sequence[str | None], videos: Sequence[str]) -> dict[str, Any]:
    """The fraction of right answers: "accuracy", its "interval", "count", and under "kinds" the same for each kind of
    question. `right`: (n,) bool. The bootstrap draws `videos`, or the groups that are given as such, because the
    answers about one video are not independent."""

    def scores_of(mask: np.ndarray) -> dict[str, Any]:
        hits, names = right[mask], np.array(videos)[mask].tolist()
        scores = with_intervals(lambda drawn: {"accuracy": float(hits[drawn].mean())}, len(hits), names)
        return {"accuracy": scores["accuracy"], "interval": scores["intervals"]["accuracy"], "count": int(mask.sum())}

    names = sorted({kind for kind in kinds if kind is not None})
    by_kind = {name: scores_of(np.array([kind == name for kind in kinds])) for name in names}
    return scores_of(np.ones(len(right), bool)) | {"kinds": by_kind}


def generated(row: dict[str, Any]) -> str:
    """What a captioner wrote in a row of predictions: a caption, or the answer to a question."""
    return row["caption"] if "caption" in row else row["answer"]


# the words for each value of an attribute: {attribute: {value: [word, ...]}}
Lexicon = dict[str, dict[str, list[str]]]


def attributes_in(caption: str, lexicon: Lexicon) -> dict[str, str | None]:
    """The value of each attribute in a caption: {attribute: value}, None if the caption names no value or several."""
    tokens = {*re.findall(r"[a-z]+", caption.lower())}
    matches = {a: [value for value, words in values.items() if tokens & {*words}] for a, values in lexicon.items()}
    return {attribute: values[0] if len(values) == 1 else None for attribute, values in matches.items()}


def right_attributes(caption: str, objects: Sequence[dict[str, str]], lexicon: Lexicon) -> dict[str, bool]:
    """Whether a caption gives each attribute its true value, for all objects; under "all", whether it makes no error.

    A caption of several objects describes one after the other, in any order, with a semicolon in between.
    """
    parts = caption.split(";") if len(objects) > 1 else [caption]
    named = [attributes_in(part, lexicon) for part in parts]

    def equal(names: Sequence[str]) -> bool:
        counts = [Counter(tuple(item.get(n) for n in names) for item in items) for items in (named, objects)]
        return counts[0] == counts[1]

    names = [*objects[0]]
    return {name: equal([name]) for name in names} | {"all": equal(names)}


def attribute_summary(
    captions: Sequence[str], objects: Sequence[Sequence[dict[str, str]]], lexicon: Lexicon
) -> Summary:
    """The fraction of captions that are right about each attribute, and about "all": see right_attributes()."""
    rows = [right_attributes(caption, items, lexicon) for caption, items in zip(captions, objects, strict=True)]
    right = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return lambda indices: {name: float(r[indices].mean()) for name, r in right.items()}


# -- the script -------------------------------------------------------------------------------------


def read_by_id(path: Path) -> dict[str, Any]:
    """{id: value} of a JSON object, or {file: row} of a JSON Lines file; see id_of(). Raises UserError if it is
    neither."""
    # a JSON object with a `file` is the only row of a jsonl
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {cause_of(error)}") from None
    try:
        values = json.loads(text)
        if isinstance(values, dict) and not isinstance(values.get("file"), str):
            return values
    except (ValueError, RecursionError):
        pass

    # predictions of a run or of inference.py
    try:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        ids = [id_of(row) for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is neither a JSON object {{id: ...}} nor lines with a `file` each") from None
    repeated = [key for key, count in Counter(ids).items() if count > 1]
    if repeated:
        raise UserError(f"{path} has several rows for {shown(repeated[0])}")
    return dict(zip(ids, rows, strict=True))


def id_of(row: dict[str, Any]) -> str:
    """What identifies a row of predictions: its file, and the times and the question if it has them. Raises TypeError
    or KeyError."""
    times = [f"{row['start']}-{row.get('end')}"] if "start" in row else []
    return " ".join([row["file"], *times, *([row["question"]] if "question" in row else [])])


def groups_of(rows: list[Any]) -> list[str] | None:
    """The group of each row of predictions: its recording if it names one, else its file. None without files."""
    if not all(isinstance(row, dict) and isinstance(row.get("file"), str) for row in rows):
        return None
    return [row["group"] if isinstance(row.get("group"), str) else row["file"] for row in rows]


def match_ids(references: dict[str, Any] | None, predictions: dict[str, Any], path: Path) -> tuple[list, list]:
    """(predictions, truths) in the same order.

    `references` gives the truths and the order. Without it the predictions must contain their truths. If references
    have ids and predictions have files, the prediction of a/b.mp4 belongs to the id b.
    Raises UserError for an id without prediction, or a prediction without truth or with several labels.
    """
    # predictions of a run contain the truth
    if references is None:
        for key, row in predictions.items():
            if not isinstance(row, dict) or not row.keys() & {"truth", "references"}:
                raise UserError(f"{path} has no truth for {shown(key)}: add --references R.json")
            if "labels" in row:  # its list of true labels would pass for the references of a caption
                raise UserError(f"{path} has several labels per clip: metrics.json of the run has their scores")
        return [*predictions.values()], [row.get("truth", row.get("references")) for row in predictions.values()]

    # match files to ids only if nothing matches otherwise, and no two files have the same name
    by_name = {Path(k).stem: row for k, row in predictions.items()}
    if not references.keys() & predictions.keys() and len(by_name) == len(predictions):
        predictions = by_name
    missing = [k for k in references if k not in predictions]
    if missing:
        count = f"{len(missing)} of {counted(len(references), 'id')}"
        raise UserError(f"{path} has no prediction for {count}, for example {shown(missing[0])}")
    return [predictions[k] for k in references], [*references.values()]


def answer_text(row: Any, path: Path) -> str:
    """The caption, answer or label of a prediction, which is a string or a row; the best class of one that was
    rejected. Raises UserError if it is neither."""
    value = row.get("caption", row.get("answer", row.get("label"))) if isinstance(row, dict) else row
    if value is None and isinstance(best := row.get("top_k"), list) and best and isinstance(best[0], dict):
        value = best[0].get("label")  # scores are about all clips, as in metrics.json
    if isinstance(value, list) and len(value) == 1:  # coco-caption's format
        (value,) = value
    if not isinstance(value, str):
        raise UserError(f"{path}: a prediction is neither a string nor a row with `caption` or `label`: {shown(row)}")
    return value


def check_label_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Raises UserError for a row that cannot come from a run's predictions_{val,test}.jsonl."""
    for row in rows:
        score, best = row.get("score"), row.get("top_k")
        labels = [b.get("label") if isinstance(b, dict) else None for b in best] if isinstance(best, list) else [None]
        plain = isinstance(score, int | float) and 0 <= score <= 1 and all(isinstance(b, str) for b in labels)
        if not plain or not labels or len(labels) != len(rows[0]["top_k"]):
            raise UserError(
                f"{path}: a row needs `score` from 0 to 1 and `top_k` with as many labels as the others: {shown(row)}"
            )


def summary_of(rows: list[Any], truths: list[Any], path: Path) -> Summary:
    """The summary of captions, if the truths are lists of strings, or of labels, if they are strings."""
    answers = [answer_text(row, path) for row in rows]
    if all(isinstance(t, list) and t and all(isinstance(c, str) for c in t) for t in truths):
        return caption_summary(answers, truths)
    if not all(isinstance(t, str) for t in truths):
        raise UserError("references must be a list of captions for every id, or a label for every id")

    # rows of a run contain confidences and the five most likely classes
    if all(isinstance(row, dict) and "truth" in row for row in rows):
        check_label_rows(rows, path)
        return label_rows_summary([row | {"truth": t} for row, t in zip(rows, truths, strict=True)])

    # of bare labels, keep the scores that need only the first answer
    index = {name: i for i, name in enumerate(sorted({*answers, *truths}))}
    truth, first = np.array([index[t] for t in truths]), np.array([index[a] for a in answers])
    summary = label_summary(truth, first[:, None], np.ones(len(first)), len(index))
    kept = ("accuracy", "mean_class_recall", "macro_f1")
    return lambda indices: {name: value for name, value in summary(indices).items() if name in kept}


@script
def main(argv: list[str] | None = None) -> None:
    """Scores the files on the command line and prints the result as JSON."""
    # the module's docstring explains the file formats, so it is the description
    parser = Parser(
        prog="metrics.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--references",
        metavar="R",
        type=Path,
        help="{id: [captions]} or {id: label}; not needed for a run's own predictions, which contain them",
    )
    parser.add_argument(
        "--predictions",
        metavar="P",
        type=Path,
        required=True,
        help="{id: caption or label}, or a JSON Lines file with one row per video",
    )
    parser.add_argument(
        "--compare",
        metavar="P2",
        type=Path,
        help="other predictions for the same ids; adds the differences P2 - P with paired bootstrap intervals and, for "
        "the labels of independent clips, McNemar's test",
    )
    args = parser.parse_args(argv)

    # one file against its references
    references = read_by_id(args.references) if args.references else None
    rows, truths = match_ids(references, read_by_id(args.predictions), args.predictions)
    if not truths:
        raise UserError("nothing to score: the file has no ids")
    summary = summary_of(rows, truths, args.predictions)
    groups = groups_of(rows)
    recordings = len(members_of(groups))
    result = {"count": len(truths)} | ({"recordings": recordings} if recordings else {})
    result |= with_intervals(summary, len(truths), groups)

    # the other predictions against the same references, in the same order
    if args.compare:
        ids = [*(references or read_by_id(args.predictions))]
        others, _ = match_ids(dict(zip(ids, truths, strict=True)), read_by_id(args.compare), args.compare)
        result["compare"] = compared(summary, summary_of(others, truths, args.compare), len(truths), groups)
        if recordings:
            print("note: without McNemar's test, because clips of one recording are not independent", file=sys.stderr)
        elif not isinstance(truths[0], list):
            right = [
                [answer_text(r, args.predictions) == t for r, t in zip(x, truths, strict=True)] for x in (rows, others)
            ]
            result["compare"]["mcnemar"] = mcnemar(*right)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(main())
