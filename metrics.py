"""Scores of predictions against truths. Plain Python, no torch."""

from collections.abc import Sequence


def accuracy(predicted: Sequence[int], truth: Sequence[int]) -> float:
    """The share of equal entries."""
    return sum(p == t for p, t in zip(predicted, truth, strict=True)) / len(truth)


def per_class_accuracy(predicted: Sequence[int], truth: Sequence[int], num_classes: int) -> list[float | None]:
    """Recall of each class; None where the truth has none of it."""
    recalls: list[float | None] = []
    for k in range(num_classes):
        mine = [p for p, t in zip(predicted, truth, strict=True) if t == k]
        recalls.append(sum(p == k for p in mine) / len(mine) if mine else None)
    return recalls


def exact_match(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of captions that equal one of their references, spaces aside."""
    tidy = [" ".join(c.split()) for c in captions]
    return sum(c in {" ".join(r.split()) for r in refs} for c, refs in zip(tidy, references, strict=True)) / len(tidy)


def attribute_accuracy(found: Sequence[dict[str, str | None]], truth: Sequence[dict[str, str]]) -> dict[str, float]:
    """For each attribute the share named rightly; `colour+shape+motion` and `all`: rightly together."""
    rows = list(zip(found, truth, strict=True))
    scores = {name: sum(f.get(name) == t[name] for f, t in rows) / len(rows) for name in truth[0]}
    for joint in (("colour", "shape", "motion"), tuple(truth[0])):
        if set(joint) <= set(truth[0]):
            key = "all" if joint == tuple(truth[0]) else "+".join(joint)
            scores[key] = sum(all(f.get(n) == t[n] for n in joint) for f, t in rows) / len(rows)
    return scores
