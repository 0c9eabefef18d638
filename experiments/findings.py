"""Every sentence of the report that states a result. Each is made from the numbers, or asserted: numbers that
contradict an asserted sentence stop the build."""

import math
from collections.abc import Callable, Sequence
from statistics import mean

import numpy as np

from config import default_rates
from experiments.epochs import compared_rules
from experiments.grid import MODES, NAMES, NOT_RUN, TASKS, Row
from experiments.intervals import Estimate, difference, estimate
from experiments.scores import Study
from experiments.tables import control_value, show
from experiments.trials import SWEEP_SHARE, learning_curves, sweep_curves
from metrics import wilson
from script import UserError

READ = 0.2  # a model whose accuracy falls by more than this with the other object's text has read it


def asserted(sentence: str, holds: bool) -> str:
    """The sentence. Raises UserError if it does not hold."""
    if not holds:
        raise UserError(f'the runs contradict this sentence of the report: "{sentence}"')
    return sentence


# -- words for numbers ------------------------------------------------------------------------------


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def points(value: Estimate) -> str:
    """`8.1 points [6.0, 10.2]`, without the sign."""
    if value.mean < 0:
        value = Estimate(-value.mean, -value.high, -value.low)
    return show(value, interval=True).replace(" [", " points [")


def spread(values: Sequence[float], unit: str = " %") -> str:
    """`91.3 %`, or `79.8 to 92.0 %` if the values differ after rounding."""
    ends = sorted({f"{100 * v:.1f}" for v in (min(values), max(values))}, key=float)
    return " to ".join(ends) + unit


def signed(value: Estimate) -> str:
    """`+8.1 points [+6.0, +10.2]`"""
    return show(value, interval=True, sign="+").replace(" [", " points [")


def gained(lora: Estimate, full: Estimate) -> str:
    """What two paired differences from the frozen backbone say: `gains 8.1 points [6.0, 10.2] through LoRA and 8.9
    points [6.8, 11.0] in full`."""
    first, second = (
        f"{'gains' if value.mean > 0 else 'loses'} {points(value)} {how}"
        if value.excludes_zero
        else f"does not change measurably {how} ({signed(value)})"
        for value, how in ((lora, "through LoRA"), (full, "in full"))
    )
    if not lora.excludes_zero and not full.excludes_zero:
        return f"does not change measurably through LoRA ({signed(lora)}) or in full ({signed(full)})"
    return f"{first} and {second.removeprefix(f'{first.split()[0]} ')}"


def compared(value: Estimate, first: str, second: str) -> str:
    """What a paired difference says about two things: `A is ahead of B by 8.1 points [6.0, 10.2]`."""
    if value.excludes_zero:
        return f"{first} is {'ahead of' if value.mean > 0 else 'behind'} {second} by {points(value)}"
    return f"{first} and {second} cannot be told apart ({signed(value)})"


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, or `a, b and c`."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def in_words(title: str) -> str:
    """A title of a row or comparison for use in a sentence: `TimeSformer + BERT frozen with text`."""
    return title.replace(", text", " with text")


def values_of(rows: Sequence[Row], control: str, score: str = "accuracy") -> list[float]:
    """A control's score in all runs of the rows that have it."""
    values = [control_value(result, control, score) for row in rows for result in row.results.values()]
    return [value for value in values if value is not None]


# -- which rows are best, and what training gains ---------------------------------------------------


def best(study: Study) -> str:
    """The best row of each task."""
    parts = []
    for task in TASKS:
        rows = [row for row in study.rows if row.task == task and study.scores[row.name] is not None]
        if not rows:
            return NOT_RUN
        top = max(rows, key=lambda row: study.scores[row.name].right.mean())
        parts.append(f"the best {task} is {top.title} ({show(study.scores[top.name].accuracy(), interval=True)} %)")
    return sentence("; ".join(parts))


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def comparisons_of(study: Study, task: str, first: str, second: str) -> dict[str, Estimate]:
    """The difference of two training modes, for each model of a task: {its title without the mode: difference}"""
    return {
        c.title.split(":")[0]: c.columns["all"]
        for c in study.comparisons
        if (c.first.task, c.first.mode, c.second.mode) == (task, first, second)
    }


def adapting(study: Study, task: str) -> str:
    """What LoRA and training in full gain over the frozen backbone, and one over the other: a sentence for each model,
    and one for all models without any measurable difference."""
    lora, full, both = (
        comparisons_of(study, task, a, b) for a, b in (("lora", "frozen"), ("full", "frozen"), ("full", "lora"))
    )
    found, equal = [], []
    for name in (name for name in lora if name in full and name in both):  # others have not been run in every mode
        gaps = lora[name], full[name], both[name]
        if any(gap.excludes_zero for gap in gaps):
            between = compared(both[name], "training in full", "LoRA") if both[name].excludes_zero else ""
            between = between or f"the two cannot be told apart ({signed(both[name])})"
            found.append(f"{in_words(name)} {gained(lora[name], full[name])}; {between}.")
        else:
            equal.append(f"{in_words(name)} (LoRA {signed(lora[name])}, in full {signed(full[name])})")
    if equal:
        found.append(
            f"There is no measurable difference between frozen, LoRA and in full for {listed(equal)}, each compared "
            "with frozen."
        )
    return " ".join(found) or NOT_RUN


def neighbour(study: Study) -> str:
    """How far the best row without text of each vision backbone is above the nearest neighbour in its features."""
    parts = []
    for model, nearest in study.nearest[False].items():
        rows = [row for row in study.finished(captioning=False) if row.config.vision_model == model]
        rows = [row for row in rows if not row.config.use_text]
        if not rows:
            return NOT_RUN
        top = max(rows, key=lambda row: study.scores[row.name].right.mean())
        gap = difference(study.scores[top.name].right, nearest.right)
        parts.append(
            compared(gap, f"the best {NAMES[model]} without text", "the nearest neighbour in its frozen features")
        )
    return sentence("; ".join(parts))


def pretraining(study: Study) -> str:
    """Two frozen backbones of one size that have seen no label: one predicted features, the other pixels."""
    rows = [row for name in ("vjepa2_fvbb", "videomae_fvbb") for row in study.finished(False) if row.name == name]
    if len(rows) < 2:
        return NOT_RUN
    features, pixels = rows
    gap = difference(study.scores[features.name].right, study.scores[pixels.name].right)
    return (
        "V-JEPA 2 and VideoMAE have the same size and patches, and neither has seen a label: one was pretrained to predict "
        f"the features of hidden tokens, the other their pixels. Both frozen, {compared(gap, 'V-JEPA 2', 'VideoMAE')}."
    )


# -- what the models use ----------------------------------------------------------------------------


def text_gain(study: Study) -> str:
    """With text against without."""
    pairs = [c for c in study.comparisons if c.first.config.use_text != c.second.config.use_text]
    if not pairs:
        return NOT_RUN
    above = [c for c in pairs if c.columns["all"].low > 0]
    gains = spread([c.columns["all"].mean for c in pairs], " points")
    two = spread([c.columns["two"].mean for c in pairs], " points")
    found = f"The text raises the accuracy in {len(above)} of {len(pairs)} pairs of rows; the differences are {gains}."
    if len(above) == len(pairs):
        found = (
            f"The text raises the accuracy in all {len(pairs)} pairs of rows, by {gains}; with two objects, by {two}."
        )

    # a pair whose heads differ says nothing about the text alone
    heads = [[next(iter(row.results.values())).options["head"] for row in (c.first, c.second)] for c in pairs]
    other = [(first, second) for first, second in heads if first != second]
    if other:
        found += (
            f" {len(other)} of these pairs also differ in the head: {other[0][0]} with text, {other[0][1]} without."
        )
    return found


def text_read(study: Study) -> str:
    """What a wrong text costs: whether the text is read."""
    rows = [row for row in study.finished(captioning=False) if row.config.use_text]
    if not rows:
        return NOT_RUN
    results = [result for row in rows for result in row.results.values()]

    def costs(right: str, wrong: str) -> list[float]:
        return [control_value(r, right, "accuracy") - control_value(r, wrong, "accuracy") for r in results]

    exchanged, other = costs("as_it_is", "text_shuffled"), costs("several_objects", "text_other_object")
    left = spread(values_of(rows, "text_other_object"))
    found = (
        f"The text of another clip costs {spread(exchanged, ' points')}. With two objects, the text of the other "
        f"object costs {spread(other, ' points')} and leaves {left} right"
    )
    reading = sum(cost > READ for cost in other)
    if reading == len(other):
        return f"{found}: every model reads its text."
    return f"{found}: {reading} of {len(other)} runs read their text."


def is_above(value: float, limit: float, study: Study) -> bool:
    """Whether an accuracy on the test clips is above a limit by more than chance: its Wilson interval is."""
    count = len(study.clips)
    return wilson(round(value * count), count)[0] > limit


def ceiling_claim(study: Study) -> str:
    """Asserted: nothing beats the best possible observer without text. If a row did, something would leak."""
    top = study.ceilings["video without text"]
    rows = [row for row in study.finished(captioning=False) if not row.config.use_text]
    holds = all(study.scores[row.name].accuracy().low <= top for row in rows)
    return asserted(f"No row without text is above the {percent(top)} that are possible without it.", holds)


def grey_claim(study: Study) -> str:
    """Asserted: without a video nothing is left."""
    rows = [row for row in study.finished(captioning=False) if not row.config.use_text]
    values = values_of(rows, "blank_video")
    if not values:
        return NOT_RUN
    majority = max(values_of(rows, "majority"))
    holds = not any(is_above(value, majority, study) for value in values)
    return asserted(f"On a grey video every classifier without text is at chance ({spread(values)}).", holds)


def one_frame_claim(study: Study) -> str:
    """Asserted: a single frame does not show a motion."""
    rows = study.finished(captioning=False)
    values = values_of(rows, "one_frame")
    if not values:
        return NOT_RUN
    top = max(study.ceilings["one frame, and text"], 1 / len({*study.clips.labels}))
    holds = not any(is_above(value, top, study) for value in values)
    return asserted(f"With one frame repeated, no classifier is better than chance ({spread(values)}).", holds)


def order(study: Study) -> str:
    """Frames in another order, against the best observer that does not know the order."""
    parts, limits, beyond = [], [], []
    for text, name in ((False, "frames in any order, without text"), (True, "frames in any order, and text")):
        rows = [row for row in study.finished(captioning=False) if row.config.use_text == text]
        values, top = values_of(rows, "shuffled"), study.ceilings[name]
        if not values:
            return NOT_RUN
        above = sum(is_above(value, top, study) for value in values)
        kind = "with" if text else "without"
        parts.append(f"classifiers {kind} text reach {spread(values)}")
        limits.append(f"{percent(top)} {kind} text")
        beyond += [f"{above} of {len(values)} runs {kind} text"] if above else []
    verdict = f"{listed(beyond)} are measurably above" if beyond else "none is measurably above"
    backwards = spread(values_of(study.finished(captioning=False), "reversed"))
    return (
        f"With shuffled frames, {listed(parts)}; {verdict} what an observer of unordered frames can reach, "
        f"{listed(limits)}. With reversed frames, classifiers reach {backwards}."
    )


# -- captions ---------------------------------------------------------------------------------------


def captions(study: Study) -> str:
    """The captioners against the caption of the nearest neighbour."""
    parts = []
    for model, nearest in study.nearest[True].items():
        rows = [row for row in study.finished(captioning=True) if row.config.vision_model == model]
        if not rows:
            return NOT_RUN
        one, two = ([study.scores[row.name].columns[c].mean() for row in rows] for c in ("one", "two"))
        copied = [nearest.columns[column].mean() for column in ("one", "two")]
        parts.append(
            f"{NAMES[model]}: {spread(one)} of the captions of one object are wholly right and {spread(two)} of those "
            f"of two; the nearest neighbour's caption is right for {percent(copied[0])} and {percent(copied[1])}."
        )
    return " ".join(parts)


def binding(study: Study) -> str:
    """Which attribute the captions of two objects get wrong."""
    rows = study.finished(captioning=True)
    if not rows:
        return NOT_RUN
    two = ~study.clips.single
    named = {n: mean(study.scores[r.name].attributes[n][:, two].mean() for r in rows) for n in ("motion", "colour")}
    whole = mean(study.scores[row.name].right[:, two].mean() for row in rows)
    hardest = min(named, key=lambda name: named[name])
    shown = listed([f"both {name}s in {percent(value)}" for name, value in named.items()])
    return (
        f"With two objects, the captions name {shown}, and everything in {percent(whole)} (means of all captioners): "
        f"{hardest} is the harder of the two."
    )


# -- where the errors are ---------------------------------------------------------------------------

# name -> the groups of clips that a picture and a sentence compare
GROUPS = ("speed", "size", "objects")


def groups_of(study: Study, name: str) -> dict[str, np.ndarray]:
    """{group: which clips belong to it}, by a property of the named object or by the number of objects. (n,) each"""
    items = [row["objects"][0] for row in study.clips.rows]
    if name == "size":
        return {size: np.array([item["size"] == size for item in items]) for size in ("small", "large")}
    if name == "objects":
        return {"one": study.clips.single, "two": ~study.clips.single}

    # an object that stands still has a speed in its description, but shows none
    moving = np.array([item["motion"] != "still" for item in items])
    speeds = np.array([item["speed"] for item in items])
    cuts = np.quantile(speeds[moving], [1 / 3, 2 / 3])
    third = np.searchsorted(cuts, speeds)
    groups = {group: moving & (third == number) for number, group in enumerate(("slow", "middle", "fast"))}
    return {group: mask for group, mask in groups.items() if mask.any()}


def shown_rows(study: Study) -> list[Row]:
    """The best classifier of each vision backbone, with and without text: those whose errors are shown."""
    rows = study.finished(captioning=False)
    keys = sorted({(row.config.vision_model, row.config.use_text) for row in rows})
    return [
        max(
            (r for r in rows if (r.config.vision_model, r.config.use_text) == key),
            key=lambda r: study.scores[r.name].right.mean(),
        )
        for key in keys
    ]


def errors(study: Study, name: str) -> str:
    """Whether the errors of the best rows depend on a property of the clips."""
    parts = []
    for row in shown_rows(study):
        scores = {group: estimate(study.scores[row.name].right[:, m]) for group, m in groups_of(study, name).items()}
        low, high = min(scores, key=lambda g: scores[g].mean), max(scores, key=lambda g: scores[g].mean)
        apart = scores[low].high < scores[high].low
        verdict = "" if apart else ", intervals overlap"
        shown = f"{percent(scores[low].mean)} ({low}) to {percent(scores[high].mean)} ({high}){verdict}"
        parts.append(f"{in_words(row.title)} {shown}")
    what = "number of objects" if name == "objects" else name
    return f"By {what}: {'; '.join(parts)}." if parts else NOT_RUN


def confused(study: Study, names: dict[str, str]) -> str:
    """The most frequent error of the best row without text, and of the best one with text."""
    parts = []
    for text in (False, True):
        rows = [row for row in study.finished(captioning=False) if row.config.use_text == text]
        if not rows:
            return NOT_RUN
        top = max(rows, key=lambda row: study.scores[row.name].right.mean())
        counts: dict[tuple[str, str], int] = {}
        for result in top.results.values():
            for answer in result.answers(study.clips):
                pair = (answer["truth"], answer["label"])
                counts[pair] = counts.get(pair, 0) + (pair[0] != pair[1])
        (truth, answered), count = max(counts.items(), key=lambda item: item[1])
        wrong = sum(counts.values())
        share = percent(count / wrong) if wrong else "none"
        mistake = f"“{names[truth]}” for “{names[answered]}”"
        parts.append(f"{in_words(top.title)} most often mistakes {mistake} ({share} of its errors)")
    return sentence("; ".join(parts))


# -- sweeps -----------------------------------------------------------------------------------------


def learning(study: Study) -> str:
    """The accuracy of full, LoRA and frozen at each share of the training clips, by vision backbone."""
    parts = []
    for model, curves in learning_curves(study).items():
        shares = [share for share in (5, 20, 100) if all(share in curve for curve in curves.values())]
        if not curves or not shares:
            continue
        found = []
        for share in shares:
            means = listed([percent(mean(curve[share])) for curve in curves.values()])
            found.append(f"{means} with {share} % of the clips")
        verb = "reaches" if len(curves) == 1 else "reach"
        parts.append(f"{NAMES[model]} {listed([MODES[mode] for mode in curves])} {verb} {'; '.join(found)}")
    return sentence("; ".join(parts)) if parts else NOT_RUN


def sweep(study: Study, option: str) -> str:
    """The best and the worst value of an option in each row of a sweep, on val."""
    rows, parts = {row.name: row for row in study.rows}, []
    for name, curve in sweep_curves(study, option).items():
        top, low = max(curve, key=lambda v: curve[v]), min(curve, key=lambda v: curve[v])
        best_and_worst = f"best with {top} ({percent(curve[top])}) and worst with {low} ({percent(curve[low])})"
        parts.append(f"{rows[name].title} is {best_and_worst}")
    what = {"lora_r": "rank", "token_grid": "grid"}[option]
    return f"By {what}, with {SWEEP_SHARE} % of the training clips: {'; '.join(parts)}." if parts else NOT_RUN


def pareto(study: Study) -> str:
    """The classifiers that no other one beats in both accuracy and seconds."""
    rows = study.finished(captioning=False)
    if not rows:
        return NOT_RUN
    seconds = {r.name: r.first.metrics["seconds"] for r in rows}
    accuracy = {r.name: study.scores[r.name].right.mean() for r in rows}
    front = [
        r
        for r in rows
        if not any(seconds[o.name] < seconds[r.name] and accuracy[o.name] >= accuracy[r.name] for o in rows)
    ]
    shown = [f"{in_words(r.title)} ({percent(accuracy[r.name])}, {seconds[r.name]:.0f} s)" for r in front]
    return f"No other classifier is both faster to train and at least as accurate as {listed(shown)}."


def linear_head(study: Study) -> str:
    """What video classifiers reach with a linear head where the final rows have an attentive one; "" if not tried."""
    rows, reached = {row.name: row for row in study.rows}, {}
    for trial in study.trials:
        row = rows[trial["row"]]
        if trial["options"] == {"head": "linear"} and trial["share"] == 100 and row.task == TASKS[0]:
            reached.setdefault(row.config.vision_model, {})[row.mode] = trial["test"]
    parts = []
    for model, modes in reached.items():
        if {*modes} == {*MODES}:
            shown = [f"{percent(modes[mode])} {'through LoRA' if mode == 'lora' else MODES[mode]}" for mode in MODES]
            parts.append(f"{NAMES[model]} with a linear head, which mixes all tokens, reaches {listed(shown)}")
    return f"In one seed, {'; '.join(parts)}." if parts else ""


def tuning(study: Study) -> str:
    """In how many rows the default learning rate is as good on val as the others that were tried."""
    curves = sweep_curves(study, "learning_rate")
    counts = [result.metrics["val"]["count"] for row in study.rows for result in row.results.values()]
    if not curves or not counts:
        return "Learning rates are the program's defaults, which were chosen on val with one seed."
    worse = []
    for row in (row for row in study.rows if row.name in curves):
        # a difference of less than one standard error says nothing
        curve, default = curves[row.name], default_rates(row.config)[0]
        best = max(curve.values())
        error = math.sqrt(best * (1 - best) / counts[0])
        if curve[min(curve, key=lambda rate: abs(rate - default))] < best - error:
            worse.append(row.title)
    sizes = sorted({len(curve) for curve in curves.values()})
    tried = f"{' or '.join(map(str, sizes))} learning rates were tried for {len(curves)} of {len(study.rows)} rows"
    near = f"the default is the best on val, or within one standard error of it, in {len(curves) - len(worse)}"
    but = f", but not for {listed(worse)}" if worse else ""
    return f"With {SWEEP_SHARE} % of the training clips and one seed, {tried}: {near}{but}."


def epoch_choice(study: Study) -> str:
    """What other rules for the best epoch would have chosen in these runs."""
    results = [r for row in study.finished(captioning=False) for r in row.results.values()]
    if not results:
        return NOT_RUN
    rules = compared_rules([(r.log, r.metrics["val"]["count"]) for r in results])
    parts = [f"{name}, {percent(v['accuracy'])} and {v['loss']:.3f}" for name, v in rules.items()]
    return f"Mean val accuracy and loss of the chosen epoch, by rule: {'; '.join(parts)}."


def all_findings(study: Study, names: dict[str, str]) -> dict[str, str]:
    """{name in report.typ: sentences}. `names` are the display names of the classes.

    Raises UserError, naming the sentence, if the numbers contradict one that is asserted.
    """
    plain: tuple[Callable[[Study], str], ...] = (
        *(best, neighbour, pretraining, text_gain, text_read, ceiling_claim, grey_claim, one_frame_claim, order),
        *(captions, binding, learning, linear_head, pareto, tuning, epoch_choice),
    )
    return (
        {make.__name__: make(study) for make in plain}
        | {f"adapting_{number}": adapting(study, task) for number, task in enumerate(TASKS)}
        | {f"errors_{name}": errors(study, name) for name in GROUPS}
        | {f"sweep_{option}": sweep(study, option) for option in ("lora_r", "token_grid")}
        | {"confused": confused(study, names)}
    )
