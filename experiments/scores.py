"""The scores of every row, and of every pair of rows that differ in one thing."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from dummy_data import LEXICON, ceilings
from experiments.grid import MODES, Row
from experiments.intervals import Estimate, difference, estimate, mcnemar_p
from experiments.results import Clips, annotations_of, read_clips, read_neighbours
from metrics import bleu, bleu_counts, cider_d, label_rows_summary, right_attributes, tokenised

# -- one row ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """The scores of a row's runs, or of a baseline without training. S seeds, n clips."""

    right: np.ndarray  # which answers are right: the class, or everything that the caption says. (S, n)
    clips: Clips
    cider: np.ndarray | None = None  # captions only: CIDEr of each. (S, n)
    attributes: dict[str, np.ndarray] | None = None  # captions only: which get it right for all objects. (S, n)
    corpus: dict[str, float] | None = None  # scores that are not means over clips; means over the seeds

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """`right` of all clips, of those with one object and of those with two: (S, clips) each."""
        single = self.clips.single
        return {"all": self.right, "one": self.right[:, single], "two": self.right[:, ~single]}

    def accuracy(self, column: str = "all") -> Estimate:
        return estimate(self.columns[column])


def row_scores(row: Row, clips: Clips) -> Scores | None:
    """The scores of a row's finished runs; None if there are none."""
    if not row.results:
        return None
    answers = [result.answers(clips) for result in row.results.values()]
    if row.config.captioning:
        return caption_scores([[a["caption"] for a in rows] for rows in answers], clips)
    right = np.array([[a["label"] for a in rows] == clips.labels for rows in answers])
    summaries = [label_rows_summary(rows)(np.arange(len(clips))) for rows in answers]
    names = ("macro_f1", "calibration_error")
    return Scores(right, clips, corpus={name: mean(s[name] for s in summaries) for name in names})


def caption_scores(captions: list[list[str]], clips: Clips) -> Scores:
    """The scores of the captions of each seed."""
    references = [row["caption"] for row in clips.rows]
    objects = [row["attributes"] for row in clips.rows]
    cider, bleu_4, attributes = [], [], []
    for answers in captions:
        tokens, reference_tokens = tokenised(answers, references)
        cider.append(cider_d(tokens, reference_tokens))
        counts = [bleu_counts(c, refs) for c, refs in zip(tokens, reference_tokens, strict=True)]
        bleu_4.append(bleu(np.array(counts))["Bleu_4"])
        attributes.append([right_attributes(c, items, LEXICON) for c, items in zip(answers, objects, strict=True)])
    named = {name: np.array([[a[name] for a in rows] for rows in attributes]) for name in attributes[0][0]}
    return Scores(named.pop("all"), clips, np.array(cider), named, {"Bleu_4": mean(bleu_4)})


def neighbour_scores(neighbours: dict[str, str], clips: Clips, train: Clips, captioning: bool) -> Scores:
    """The scores of copying the class, or the first caption, of the nearest training clip."""
    rows = {row["file_name"]: row for row in train.rows}
    nearest = [rows[file] for file in clips.in_order(neighbours, "the nearest neighbours")]
    if captioning:
        return caption_scores([[row["caption"][0] for row in nearest]], clips)
    return Scores(np.array([[row["file_name"].split("/")[0] for row in nearest]]) == clips.labels, clips)


# -- pairs of rows ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two rows that differ in one thing, and the paired difference first - second of their answers."""

    first: Row
    second: Row
    columns: dict[str, Estimate]  # "all", "one", "two"
    p: float

    @property
    def title(self) -> str:
        """`TimeSformer: in full - frozen`"""
        if self.first.config.use_text != self.second.config.use_text:
            return f"{self.second.title}: with text − without"
        what = self.first.title.replace(f" {MODES[self.first.mode]}", "")
        return f"{what}: {MODES[self.first.mode]} − {MODES[self.second.mode]}"


def compared_rows(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """The pairs of rows that differ in one thing: LoRA and in full against frozen, in full against LoRA, and with text
    against without."""

    def setting(row: Row, text: bool = True) -> tuple[Any, ...]:
        return (row.config.vision_model, row.task, text and row.config.use_text)

    rows, pairs = list(rows), []
    for modes in (("lora", "frozen"), ("full", "frozen"), ("full", "lora")):
        pairs += [(a, b) for a in rows for b in rows if (a.mode, b.mode) == modes and setting(a) == setting(b)]
    for a in rows:
        pairs += [
            (a, b)
            for b in rows
            if a.config.use_text > b.config.use_text and a.mode == b.mode and setting(a, False) == setting(b, False)
        ]
    return pairs


def compare(rows: list[Row], scores: dict[str, Scores | None]) -> list[Comparison]:
    """The comparisons of all pairs whose rows have runs."""
    found = []
    for first, second in compared_rows(rows):
        a, b = scores[first.name], scores[second.name]
        if a is not None and b is not None:
            columns = {name: difference(a.columns[name], b.columns[name]) for name in a.columns}
            found.append(Comparison(first, second, columns, mcnemar_p(a.right, b.right)))
    return found


# -- everything -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """What tables, findings and pictures are made from."""

    rows: list[Row]
    clips: Clips
    scores: dict[str, Scores | None]  # by the row's name; None: not run
    nearest: dict[bool, dict[str, Scores]]  # of classes, and under True of captions: {vision model: scores}
    comparisons: list[Comparison]
    ceilings: dict[str, float]
    trials: list[dict[str, Any]]  # experiments/study.json

    def of(self, captioning: bool) -> list[Row]:
        """The captioners, or all other rows."""
        return [row for row in self.rows if row.config.captioning == captioning]

    def finished(self, captioning: bool) -> list[Row]:
        return [row for row in self.of(captioning) if self.scores[row.name] is not None]


def read_study(rows: list[Row], data_dir: Path, runs: Path, packed: Path, trials: list[dict[str, Any]]) -> Study:
    """Scores all rows. Raises UserError for a run with other options than its yaml file, or on other data."""
    data = annotations_of(data_dir)
    for row in rows:
        for result in row.results.values():
            result.check(row.config, data)
    clips, train = read_clips(data_dir, "test"), read_clips(data_dir, "train")
    scores = {row.name: row_scores(row, clips) for row in rows}
    models = sorted({(row.config.captioning, row.config.vision_model) for row in rows})
    neighbours = {model: read_neighbours(model, data_dir, runs, packed) for _, model in models}
    nearest: dict[bool, dict[str, Scores]] = {False: {}, True: {}}
    for captioning, model in models:
        nearest[captioning][model] = neighbour_scores(neighbours[model], clips, train, captioning)
    return Study(rows, clips, scores, nearest, compare(rows, scores), ceilings(data_dir), trials)
