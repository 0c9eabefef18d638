"""Rejection: a classifier answers "none of these" where its best score is low, so that few of its answers are wrong.

After training, val decides two numbers, the Rule. A temperature makes the scores honest: of the clips with a score of
80 %, about 80 % are right. A threshold on the best score then keeps the fraction of wrong answers below --reject SHARE,
with 95 % confidence; test shows whether it does.

The score is the largest probability after temperature scaling. Three times we trained without one class of
dummy_data.py, and measured the share of its clips that each score rejects when it rejects 10 % of the others
(benchmarks/rejection.py): the probability 81, 70 and 52 % (turns clockwise, moves left, stops), entropy 83, 70 and 52,
the energy of the calibrated logits 82, 83 and 28. The probability is as good as entropy, and it is what users see. The
Mahalanobis distance of the head's input to the training clips (Lee 2018) gives 70, 91 and 72 %. It is not used: it
needs another pass over the training videos, and their statistics in every run and export.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from metrics import fraction_interval, with_intervals
from script import UserError, counted

NONE = "none of these"
DELTA = 0.05  # the probability that the fraction of wrong answers exceeds SHARE anyway
MAX_POINTS = 200  # of the curve in metrics.json


@dataclass
class Rule:
    """When a run answers: if the largest of softmax(logits / temperature) is at least the threshold. Without a
    threshold it always answers, and the temperature is not used."""

    share: float  # of wrong answers
    temperature: float = 1.0
    threshold: float | None = None

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """The scores of all classes. (n, K) -> (n, K)"""
        # in double precision: in single precision many of the best scores would be exactly 1, and so equal
        return np.exp(log_softmax(logits.astype(np.float64) / self.temperature))

    def answers(self, scores: Any) -> Any:
        """Whether a run answers, given its best score, or an array of them."""
        return scores >= (self.threshold or 0.0)

    def fit(self, logits: np.ndarray, truth: np.ndarray) -> None:
        """Chooses temperature and threshold from the logits (n, K) and the true classes (n,) of val."""
        self.temperature = fit_temperature(logits, truth)
        self.threshold = choose_threshold(self.probabilities(logits).max(1), logits.argmax(1) != truth, self.share)
        if self.threshold is None:
            self.temperature = 1.0

    def apply(self, result: dict[str, Any], split: str, groups: Sequence[str] | None = None) -> None:
        """Scores what evaluate() returns, as `reject`; calibrates its `probabilities`, and adds `answered` (n,). If
        the rule has no threshold, val decides it first. `groups`: the recording of each clip, for intervals."""
        logits, truth, ranked = (result[name] for name in ("logits", "truth", "ranked"))
        if split == "val" and self.threshold is None:
            self.fit(logits, truth)
        result["probabilities"] = np.take_along_axis(self.probabilities(logits), ranked, 1)  # (n, min(5, K))
        best = result["probabilities"][:, 0]
        result["answered"] = self.answers(best)
        result["reject"] = reject_scores(best, ranked[:, 0] != truth, result["answered"], groups)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(n, K) -> (n, K)"""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


# -- temperature and threshold ----------------------------------------------------------------------


def fit_temperature(logits: np.ndarray, truth: np.ndarray) -> float:
    """The temperature with the lowest loss (Guo 2017), from 0.05 to 20. It is 1 if every clip is right, since then the
    loss falls with the temperature however low it is."""
    true_logits = logits[np.arange(len(truth)), truth]  # (n,)
    if (logits.argmax(1) == truth).all():
        return 1.0

    # the loss is convex in 1 / temperature, so its slope has one zero: the mean logit equals the mean true logit
    low, high = 0.05, 20.0
    for _ in range(40):
        scale = math.sqrt(low * high)
        mean_logits = (np.exp(log_softmax(logits * scale)) * logits).sum(1)  # (n,)
        low, high = (scale, high) if mean_logits.mean() < true_logits.mean() else (low, scale)
    return 1 / math.sqrt(low * high)


@cache
def log_factorials(size: int) -> np.ndarray:
    """The logarithms of 0!, 1! … (size - 1)!. (size,)"""
    return np.concatenate([[0.0], np.log(np.arange(1, size)).cumsum()])


def binomial_tail(errors: int, count: int, share: float) -> float:
    """The probability of at most `errors` wrong answers among `count` that are each wrong with probability `share`."""
    i = np.arange(errors + 1)
    factorials = log_factorials(1 << count.bit_length())  # rounded up to a power of two, so that the cache is hit
    terms = factorials[count] - factorials[i] - factorials[count - i] + i * math.log(share)
    return float(np.exp(terms + (count - i) * math.log1p(-share)).sum())


def upper_bound(errors: int, count: int) -> float:
    """The upper 95 % confidence bound of a fraction of errors, one-sided (Clopper & Pearson 1934)."""
    low, high = errors / count, 1.0
    for _ in range(40):
        share = (low + high) / 2
        low, high = (low, share) if errors < count and binomial_tail(errors, count, share) <= DELTA else (share, high)
    return high


def min_clips(share: float) -> int:
    """How many clips without any error it takes to show that less than `share` are wrong."""
    return math.ceil(math.log(DELTA) / math.log1p(-share))


def choose_threshold(scores: np.ndarray, wrong: np.ndarray, share: float) -> float | None:
    """The lowest threshold on the scores (n,) that keeps the fraction of wrong answers below `share`, with 95 %
    confidence; None if none does. `wrong` (n,) says which answers are.

    Trying many thresholds and taking the best would be too optimistic (Geifman & El-Yaniv 2017). So they are tested in
    a fixed order, from the strictest one down, up to the first that fails: then the probability of any false pass stays
    5 % (Learn then Test, Angelopoulos 2021). Each test is an exact one for binomial counts. Using
    scores of val as thresholds is valid: given the next lower score, the clips above it are independent draws.

    The strictest threshold answers half of the clips, but at most four times min_clips(). With fewer, a single error
    with a high score would often end the test at once.
    """
    least = min_clips(share)
    first = max(least, min(len(scores) // 2, 4 * least))
    order = np.argsort(-scores, kind="stable")
    scores, errors = scores[order], wrong[order].cumsum()
    threshold = None
    for count in range(first, len(scores) + 1):
        if count < len(scores) and scores[count] == scores[count - 1]:
            continue  # equal scores are answered together
        if binomial_tail(int(errors[count - 1]), count, share) > DELTA:
            break
        threshold = float(scores[count - 1])
    return threshold


# -- what a run reports -----------------------------------------------------------------------------


def risk_coverage(scores: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """With each of the n scores as threshold, highest first: (the fraction of clips answered, the fraction of these
    that are wrong). (n,) each"""
    order = np.argsort(-scores, kind="stable")
    count = np.searchsorted(-scores[order], -scores[order], side="right")  # clips that are answered
    return count / len(scores), wrong[order].cumsum()[count - 1] / count


def reject_scores(
    scores: np.ndarray, wrong: np.ndarray, answered: np.ndarray, groups: Sequence[str] | None = None
) -> dict[str, Any]:
    """The fraction of clips that are answered, how many of these are wrong, and the area under the risk-coverage curve
    (AURC, Geifman 2019): the mean fraction of wrong answers over all thresholds. With 95 % intervals, over the `groups`
    that the clips are in."""
    total, count, errors = len(scores), int(answered.sum()), int(wrong[answered].sum())
    coverage, risk = risk_coverage(scores, wrong)

    def area(indices: np.ndarray) -> dict[str, float]:
        return {"AURC": float(risk_coverage(scores[indices], wrong[indices])[1].mean())}

    intervals = with_intervals(area, total, groups)["intervals"] | {"coverage": fraction_interval(answered, groups)}
    if count:
        own = [groups[i] for i in np.flatnonzero(answered)] if groups else None
        intervals["error"] = fraction_interval(wrong[answered], own)
    points = np.unique(np.linspace(0, total - 1, MAX_POINTS).round().astype(int))
    return {
        "answered": count,
        "wrong": errors,
        "coverage": count / total,
        "error": errors / count if count else None,
        "upper_bound": upper_bound(errors, count) if count else None,
        "AURC": float(risk.mean()),
        "intervals": intervals,
        "curve": np.stack([coverage[points], risk[points]], 1).round(5).tolist(),
    }


def lacks_threshold(metrics: dict[str, Any]) -> bool:
    """Whether --reject was asked for, and no threshold is strict enough."""
    return "reject" in metrics and metrics["reject"]["threshold"] is None


def reject_line(metrics: dict[str, Any]) -> str:
    """What a run prints about its rule; a warning if there is none that is strict enough."""
    rule = metrics["reject"]
    wanted = f"{100 * rule['share']:g} %"
    if rule["threshold"] is None:
        return (
            f"warning: --reject {rule['share']:g}: the {counted(metrics['val']['count'], 'clip')} of val show for no threshold that "
            f"fewer than {wanted} of the answers are wrong, so this run always answers; try a larger share, or more val clips"
        )
    split = "test" if "test" in metrics else "val"
    scores = metrics[split]["reject"]
    parts = [
        f"reject {wanted}: {split}, threshold {100 * rule['threshold']:.1f} %, temperature {rule['temperature']:.2f}"
    ]
    for name, text in (("coverage", "answered"), ("error", "of the answers wrong")):
        if name in scores["intervals"]:
            low, high = scores["intervals"][name]
            parts.append(f"{100 * scores[name]:.1f} % {text} (95 %: {100 * low:.1f} to {100 * high:.1f})")
    line = ", ".join([*parts, f"AURC {scores['AURC']:.4f}"])
    if "recordings" in (val := metrics.get("val", {})):
        clips = f"{counted(val['count'], 'clip')} of {counted(val['recordings'], 'recording')}"
        line += f"\nnote: val has {clips}, and the 95 % confidence of --reject is for independent clips"
    return line


# -- checks -----------------------------------------------------------------------------------------


def check_val(val: Sequence[Any], share: float) -> None:
    """Raises UserError if val has too few clips for any threshold, which is known before a run trains."""
    if share and len(val) < (least := min_clips(share)):
        raise UserError(
            f"--reject {share:g} needs at least {least} clips in val even if no answer is wrong, but val has {len(val)}: "
            "add clips to val/, or choose a larger share"
        )


def rule_problem(rule: Any) -> str:
    """What is wrong with the rule in a metadata.json, or ""."""
    names = ("share", "temperature", "threshold")
    numbers = isinstance(rule, dict) and {*rule} == {*names} and all(type(rule[name]) is float for name in names)
    if not numbers or not (0 <= rule["threshold"] <= 1 and 0 < rule["temperature"] < math.inf):
        return "reject is not a share, a temperature and a threshold"
    return ""
