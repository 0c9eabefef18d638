"""Clips that show several classes at once, or none: their labels, loss, thresholds and scores.

With --multi_label True each class is a yes or no of its own. The probability of a class is the sigmoid of its logit,
and an answer names the classes whose probability reaches their threshold. `samples` and `splits` are those of VLoader.

Shapes: B clips of a batch, n clips of a split, K classes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from config import Config
from metrics import Summary, macro_f1, wilson, with_intervals
from script import UserError, counted

if TYPE_CHECKING:
    import torch

SHARED = 0.5  # fraction of a segment that another one must cover to add its labels

# -- labels -----------------------------------------------------------------------------------------


def resolve_labels(splits: Any, config: Config) -> tuple[Any, Config]:
    """The splits with `labels` or one `label` for each sample, and the options with multi_label filled in.

    Raises UserError for options that need one label per clip, and for samples with several where one is wanted.
    """
    names = ("train", "val", "test")
    if config.captioning:
        if config.multi_label == "True":
            raise UserError("--multi_label True works with classifiers only; leave it out or set --captioning False")
        return splits, replace(config, multi_label="False")

    listed = any(s.labels is not None for name in names for s in getattr(splits, name))
    several = config.multi_label == "True" or (config.multi_label == "auto" and listed)
    if several and config.reject:
        raise UserError("--reject needs one label per clip, and here clips may have several or none; leave it out")
    if several and config.class_balance:
        raise UserError("--class_balance True needs one label per clip, and here clips may have several; leave it out")
    if several:
        changed = {name: all_labels(getattr(splits, name)) for name in names}
    else:
        changed = {name: [*map(with_one_label, getattr(splits, name))] for name in names}
    return replace(splits, **changed), replace(config, multi_label=str(several))


def with_one_label(sample: Any) -> Any:
    """The sample with the only one of its `labels` as its label. Raises UserError if it has none or several."""
    if sample.labels is None:
        return sample
    if len(sample.labels) != 1:
        count = counted(len(sample.labels), "label")
        raise UserError(f"--multi_label False: {sample.path} has {count} in metadata.jsonl, and needs exactly one")
    return replace(sample, label=sample.labels[0], labels=None)


def all_labels(samples: list[Any]) -> list[Any]:
    """The samples with everything that they show in `labels`: a `label` becomes the only one, and a segment gets also
    the labels of other segments of its video that cover at least half of it."""
    from extras.segments import ROUNDING, by_video, times_of  # imports torch, which would make --help slow

    samples = [s if s.label is None else replace(s, label=None, labels=(s.label,)) for s in samples]
    shared = {}
    for segments in by_video(samples).values():
        starts, ends = np.array([times_of(s) for s in segments]).T  # (segments of the video,) each
        for sample in (s for s in segments if s.labels is not None):
            start, end = times_of(sample)
            common = np.minimum(ends, end) - np.maximum(starts, start)
            covering = np.flatnonzero(common >= SHARED * (end - start) - ROUNDING)  # itself too
            labels = [*sample.labels, *(label for i in covering for label in segments[i].labels or ())]
            shared[id(sample)] = replace(sample, labels=tuple(dict.fromkeys(labels)))
    return [shared.get(id(sample), sample) for sample in samples]


def multi_hot(rows: Iterable[Iterable[str]], class_names: Sequence[str]) -> np.ndarray:
    """Whether each row of labels has each class, (n, K) bool. Labels that are no class are ignored."""
    sets = [{*row} for row in rows]
    table = np.zeros((len(sets), len(class_names)), bool)
    for row, labels in zip(table, sets, strict=True):
        row[:] = [name in labels for name in class_names]
    return table


def labels_line(samples: list[Any]) -> str:
    """How many labels the training clips have, in one line."""
    counts = [len(sample.labels) for sample in samples]
    without = counted(counts.count(0), "clip has none", "clips have none")
    return f"several labels per clip (--multi_label True): {np.mean(counts):.2f} on average in train; {without}"


# -- loss -------------------------------------------------------------------------------------------


def binary_losses(logits: "torch.Tensor", targets: "torch.Tensor", smoothing: float = 0.0) -> "torch.Tensor":
    """The binary cross-entropy of logits (B, K) and targets (B, K) bool, summed over the classes of each clip. (B,)

    `smoothing` moves every target that far towards one half.
    """
    from torch.nn import functional as F

    wanted = targets.to(logits.dtype) * (1 - smoothing) + smoothing / 2  # (B, K)
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(1)


# -- answers ----------------------------------------------------------------------------------------


def choose_thresholds(truth: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    """{class: the threshold of its probability with the best F1}; one half for a class without positives.

    `truth` and `probabilities` are those of val, (n, K) each. A threshold lies halfway between two probabilities, so
    that rounding changes no answer.
    """
    thresholds = dict.fromkeys(class_names, 0.5)
    for name, true, scores in zip(class_names, truth.T, probabilities.T, strict=True):
        ranking = rank(true, scores)
        if true.any():  # F1 if all clips with at least the score of a positive are predicted
            last = ranking.ends[np.argmax(2 * ranking.found / (ranking.ends + 1 + true.sum()))]
            falling = [*scores[ranking.order], 0.0]
            thresholds[name] = float(falling[last] + falling[last + 1]) / 2
    return thresholds


def several_labels(
    probabilities: Iterable[Sequence[float]],
    class_names: Sequence[str],
    thresholds: dict[str, float],
    top_k: int,
    display_names: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """For each row of K probabilities the answer: `labels` that reach their thresholds and the `top_k` best, each with
    its score, the best first."""
    answers = []
    for row in probabilities:
        best = sorted(zip(class_names, row, strict=True), key=lambda pair: -pair[1])
        entries = [{"label": label, "score": round(score, 4)} for label, score in best]
        if display_names:
            entries = [{"label": e["label"], "name": display_names[e["label"]], "score": e["score"]} for e in entries]
        above = [score >= thresholds[label] for label, score in best]
        answers.append({"labels": [*compress(entries, above)], "top_k": entries[:top_k]})
    return answers


def labels_of(answer: dict[str, Any]) -> set[str]:
    """The labels of an answer or of a row of predictions."""
    return {entry["label"] for entry in answer["labels"]}


def are_right(answer: dict[str, Any], sample: Any, class_names: Iterable[str]) -> bool | None:
    """Whether an answer has exactly the labels of its sample. None if these are not known, or are no classes: the
    folder of a video may have any name."""
    if sample.labels is None or not {*sample.labels} <= {*class_names}:
        return None
    return labels_of(answer) == {*sample.labels}


# -- scores -----------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    """The clips of one class in the order of falling scores. Equal scores cannot be told apart, so all of them count
    for each of them. P is the number of positives."""

    order: np.ndarray  # the indices of the clips, (n,)
    places: np.ndarray  # of the positives in this order, (P,)
    ends: np.ndarray  # the last place with the score of each positive, (P,)
    found: np.ndarray  # how many positives have at least this score, (P,)


def rank(truth: np.ndarray, scores: np.ndarray) -> Ranking:
    """The ranking of one class. Both arguments are (n,)."""
    order = np.argsort(-scores, kind="stable")
    places = np.flatnonzero(truth[order])
    rising = -scores[order]
    ends = np.searchsorted(rising, rising[places], side="right") - 1
    return Ranking(order, places, ends, np.searchsorted(places, ends, side="right"))


def average_precision(ranking: Ranking, weights: np.ndarray) -> float:
    """The mean over the positives of the precision among all clips with at least their score; NaN without positives.

    `weights` (n,) says how often each clip counts: the bootstrap repeats clips.
    """
    counts, own = weights[ranking.order].cumsum(), weights[ranking.order[ranking.places]]  # (n,), (P,)
    total = own.cumsum()
    if not own.any():
        return np.nan
    return float((own * total[ranking.found - 1] / np.maximum(counts[ranking.ends], 1)).sum() / total[-1])


def mean_average_precision(truth: np.ndarray, scores: np.ndarray) -> float:
    """The mean average precision over the classes with positives. Both arguments are (n, K)."""
    return mean(
        [average_precision(rank(*columns), np.ones(len(truth))) for columns in zip(truth.T, scores.T, strict=True)]
    )


def mean(precisions: list[float]) -> float:
    """The mean without NaN, 0 if there is nothing else."""
    known = [value for value in precisions if not np.isnan(value)]
    return float(np.mean(known)) if known else 0.0


def multi_label_summary(
    truth: np.ndarray, probabilities: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]
) -> Summary:
    """mAP, F1 over all decisions (micro), the mean F1 over the classes (macro), and "AP <class>" for each class with
    positives. `truth` and `predicted` are (n, K) bool."""
    # computed once, because the bootstrap calls the summary a thousand times; floats, because their products are fast
    columns = zip(class_names, truth.T, probabilities.T, strict=True)
    rankings = {name: rank(true, scores) for name, true, scores in columns if true.any()}
    tables = [table.astype(float) for table in (truth & predicted, truth, predicted)]  # (n, K) each

    def summary(indices: np.ndarray) -> dict[str, float]:
        drawn = np.bincount(indices, minlength=len(truth)).astype(float)  # (n,)
        precisions = {f"AP {name}": average_precision(ranking, drawn) for name, ranking in rankings.items()}
        right, clips, predictions = (drawn @ table for table in tables)  # (K,) each
        total = clips.sum() + predictions.sum()
        f1 = {"micro_f1": float(2 * right.sum() / max(total, 1)), "macro_f1": 0.0}
        if total:
            f1["macro_f1"] = macro_f1(right, clips, predictions)
        return {"mAP": mean([*precisions.values()])} | f1 | precisions

    return summary


def multi_label_result(truth: Iterable[Any], probabilities: Iterable[Any]) -> dict[str, Any]:
    """What evaluate() adds for several labels: mAP, `truth` and `probabilities`, (n, K) each."""
    tables = np.array(truth), np.array(probabilities)
    return {"mAP": mean_average_precision(*tables), "truth": tables[0], "probabilities": tables[1]}


def multi_label_scores(
    result: dict[str, Any], samples: list[Any], class_names: Sequence[str], thresholds: dict[str, float] | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the scores of a split for metrics.json, one row per clip for predictions_<split>.jsonl); see final_scores().

    The scores are those of multi_label_summary() with intervals, and "classes": {class: the number and share of its
    positives, its average precision with interval, its threshold}. `result` is that of evaluate(). Without `thresholds`
    all are one half.
    """
    thresholds = thresholds or dict.fromkeys(class_names, 0.5)
    truth, probabilities = result.pop("truth"), result.pop("probabilities")  # (n, K) each
    predicted = probabilities >= np.array([thresholds[name] for name in class_names])
    summary = multi_label_summary(truth, probabilities, predicted, class_names)
    groups = [sample.recording for sample in samples]
    scores, classes = with_intervals(summary, len(truth), groups), {}
    for k, name in enumerate(class_names):
        count = int(truth[:, k].sum())
        row = {"count": count, "share": count / len(truth), "average_precision": None, "threshold": thresholds[name]}
        if count:  # the bootstrap of a perfect ranking has no width, so each recording counts as one right answer
            value, interval = scores.pop(f"AP {name}"), scores["intervals"].pop(f"AP {name}")
            found = len({groups[i] for i in np.flatnonzero(truth[:, k])})
            row |= {"average_precision": value, "interval": wilson(found, found) if value == 1 else interval}
        classes[name] = row

    answers = several_labels(probabilities.tolist(), class_names, thresholds, top_k=5)
    rows = [{**sample.place, "truth": sample.labels, **answer} for sample, answer in zip(samples, answers, strict=True)]
    return result | scores | {"classes": classes}, rows


def scores_text(scores: dict[str, Any]) -> str:
    """mAP with its interval and F1, in one line."""
    low, high = scores["intervals"]["mAP"]
    precision = f"mAP {100 * scores['mAP']:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f})"
    return f"{precision}, micro F1 {100 * scores['micro_f1']:.1f} %, macro F1 {100 * scores['macro_f1']:.1f} %"
