"""The tables of RESULTS.md and report.pdf. They hold strings, so that both round in the same way."""

from statistics import mean

from config import Config, default_rates, training_mode
from dummy_data import LEXICON
from experiments.grid import NAMES, NOT_RUN, Row
from experiments.intervals import Estimate, estimate
from experiments.results import Result
from experiments.scores import Comparison, Scores, Study

# key of metrics.json's controls -> column title, in the order of the columns
CONTROLS = {
    "majority": "majority",
    "nearest_neighbour": "nearest neighbour",
    "one_frame": "one frame",
    "shuffled": "shuffled",
    "reversed": "reversed",
    "blank_video": "grey video",
    "text_shuffled": "text exchanged",
    "several_objects": "two objects",
    "text_other_object": "the other's text",
}
# column titles; the keys are the names of the tables in report.json
HEADS = {
    "labels": ["model", "seeds", "all [95 %]", "one object", "two objects", "each seed", "macro-F1", "calib. error"],
    "captions": ["model", "seeds", "CIDEr [95 %]", "one object right [95 %]", "both objects right [95 %]"],
    "differences": ["difference", "all [95 %]", "one object [95 %]", "two objects [95 %]", "p"],
    "controls": ["model", "as it is", *CONTROLS.values()],
    "options": ["model", "epochs", "best epoch", "vision rate", "language", "new layers", "grid", "head"],
    "cost": ["model", "trained", "file MB", "peak MB", "s per epoch", "total s"],
    "ceilings": ["observer", "accuracy"],
}
HEADS["captions"] += [*LEXICON, "Bleu-4"]


# -- cells ------------------------------------------------------------------------------------------


def show(value: Estimate | None, scale: float = 100, digits: int = 1, interval: bool = False, sign: str = "") -> str:
    """`98.5`, or `98.5 [97.0, 99.7]` with the interval."""
    if value is None:
        return NOT_RUN
    low, high = (f"{scale * v:{sign}.{digits}f}" for v in (value.low, value.high))
    text = f"{scale * value.mean + 0.0:{sign}.{digits}f}"
    return (f"{text} [{low}, {high}]" if interval else text).replace("-", "−")


def label_cells(title: str, seeds: str, scores: Scores | None) -> list[str]:
    """A row of the table of classifiers."""
    if scores is None:
        return [title, seeds, *[NOT_RUN] * 6]
    accuracies = [show(scores.accuracy(column), interval=column == "all") for column in scores.columns]
    if scores.corpus is None:
        return [title, seeds, *accuracies, "", "", ""]
    each = ", ".join(f"{100 * value:.1f}" for value in scores.accuracy().seeds)
    return [
        *(title, seeds, *accuracies, each),
        *(f"{100 * scores.corpus['macro_f1']:.1f}", f"{scores.corpus['calibration_error']:.3f}"),
    ]


def caption_cells(title: str, seeds: str, scores: Scores | None) -> list[str]:
    """A row of the table of captioners. CIDEr is shown as coco-caption does, from 0 to 10."""
    if scores is None:
        return [title, seeds, *[NOT_RUN] * (len(HEADS["captions"]) - 2)]
    return [
        *(title, seeds, show(estimate(scores.cider, proportion=False), 1, 2, interval=True)),
        *(show(scores.accuracy(column), interval=True) for column in ("one", "two")),
        *(f"{100 * scores.attributes[name].mean():.1f}" for name in LEXICON),
        f"{scores.corpus['Bleu_4']:.3f}",
    ]


def seeds_of(row: Row) -> str:
    return f"{len(row.results)} of {len(row.dirs)}"


def result_table(study: Study, captioning: bool) -> list[list[str]]:
    """The table of classifiers or of captioners, with the nearest neighbours at its end."""
    cells = caption_cells if captioning else label_cells
    table = [cells(row.title, seeds_of(row), study.scores[row.name]) for row in study.of(captioning)]
    nearest = study.nearest[captioning].items()
    return table + [cells(f"nearest neighbour, {NAMES[model]}", "", scores) for model, scores in nearest]


def ceiling_table(ceilings: dict[str, float]) -> list[list[str]]:
    return [[observer, f"{100 * accuracy:.1f}"] for observer, accuracy in ceilings.items()]


# -- differences ------------------------------------------------------------------------------------


def difference_table(comparisons: list[Comparison]) -> list[list[str]]:
    """In points."""
    table = []
    for c in comparisons:
        cells = [show(c.columns[name], interval=True, sign="+") for name in ("all", "one", "two")]
        table.append([c.title, *cells, "< 0.001" if c.p < 0.001 else f"{c.p:.3f}"])
    return table


# -- controls, options, cost ------------------------------------------------------------------------


def control_value(result: Result, name: str, score: str) -> float | None:
    """A control's score in a run; None if the task does not have this control."""
    return result.metrics["controls"].get(name, {}).get(score)


def control_cells(row: Row) -> list[str]:
    """A row of the table of controls: means over the seeds in percent, of the accuracy or, for captioners, of the
    captions with the right motions. A control that the task does not have is an empty cell."""
    score = "motion" if row.config.captioning else "accuracy"
    cells = [row.title]
    for name in ("as_it_is", *CONTROLS):
        values = [control_value(result, name, score) for result in row.results.values()]
        shown = "" if None in values else f"{100 * mean(values):.1f}" if values else NOT_RUN
        cells.append(shown)
    return cells


def option_cells(row: Row) -> list[str]:
    """A row of the table of options: epochs, which epoch was best, peak learning rates, token grid, head."""
    if not row.results:
        return [row.title, *[NOT_RUN] * (len(HEADS["options"]) - 1)]
    results = [*row.results.values()]
    config = Config(**results[0].options)
    modes, (_, scales) = training_mode(config), default_rates(config)
    rates = {part: config.learning_rate * scale for part, scale in scales.items() if modes.get(part) != "frozen"}
    return [
        *(row.title, str(config.epochs), ", ".join(str(result.metrics["best_epoch"]) for result in results)),
        *(f"{rates[part]:g}" if part in rates else "–" for part in ("vision", "language", "new layers")),
        str(config.token_grid) if config.use_vlm or config.head == "attentive" else "–",
        "–" if config.captioning else config.head,
    ]


def cost_cells(row: Row) -> list[str]:
    """A row of the table of costs: those of the first seed, because other seeds may have run on other machines."""
    if not row.results:
        return [row.title, *[NOT_RUN] * (len(HEADS["cost"]) - 1)]
    first, costs = row.first, row.first.metrics
    return [
        *(row.title, f"{first.parameters:,}", f"{first.megabytes:.2f}"),
        *(f"{costs['peak_mb']:.0f}", f"{costs['seconds_per_epoch']:.1f}", f"{costs['seconds']:.0f}"),
    ]


def all_tables(study: Study) -> dict[str, list[list[str]]]:
    """{name in report.typ: rows of cells}"""
    return {
        "labels": result_table(study, captioning=False),
        "captions": result_table(study, captioning=True),
        "ceilings": ceiling_table(study.ceilings),
        "differences": difference_table(study.comparisons),
        "controls": [control_cells(row) for row in study.of(captioning=False)],
        "caption_controls": [control_cells(row) for row in study.of(captioning=True)],
        "options": [option_cells(row) for row in study.rows],
        "cost": [cost_cells(row) for row in study.rows],
    }
