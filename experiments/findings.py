"""Every sentence of the report that states a result. Each is made from the numbers, or asserted: numbers that
contradict an asserted sentence stop the build."""

import math
from collections.abc import Callable, Sequence
from statistics import mean

import numpy as np

from config import default_rates, head_of
from dummy_data import LEXICON
from experiments.epochs import compared_rules
from experiments.grid import MODES, NAMES, NOT_RUN, TASKS, Row
from experiments.intervals import Estimate, difference, estimate
from experiments.scores import Study
from experiments.tables import control_value, show
from experiments.trials import SWEEP_SHARE, learning_curves, sweep_curves
from metrics import wilson
from script import UserError, counted

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
    digits = 2 if f"{100 * value.low:.1f}" == "0.0" else 1  # an interval that excludes zero must not seem to touch it
    return show(value, digits=digits, interval=True).replace(" [", " points [")


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


def ranked(study: Study, task: str) -> list[Row]:
    """The finished rows of a task, the best on the test clips first."""
    return by_score(study, [r for r in study.rows if r.task == task and study.scores[r.name] is not None])


def by_score(study: Study, rows: Sequence[Row]) -> list[Row]:
    """Finished rows, the best on the test clips first."""
    return sorted(rows, key=lambda row: -study.scores[row.name].right.mean())


def best(study: Study) -> str:
    """The best row of each task."""
    parts = []
    for task in TASKS:
        rows = ranked(study, task)
        if not rows:
            return NOT_RUN
        reached = show(study.scores[rows[0].name].accuracy(), interval=True).replace(" [", " % [")
        right = "wholly right" if rows[0].config.captioning else "right"
        parts.append(f"the best {task} is {in_words(rows[0].title)} ({reached} {right})")
    return sentence("; ".join(parts))


def runner_up(study: Study) -> str:
    """Whether the best row of each task is measurably ahead of the next one."""
    parts = []
    for first, second in (ranked(study, task)[:2] for task in TASKS if len(ranked(study, task)) > 1):
        gap = difference(study.scores[first.name].right, study.scores[second.name].right)
        parts.append(compared(gap, in_words(first.title), in_words(second.title)))
    return f"Of the two best rows of each task, {'; '.join(parts)}." if parts else NOT_RUN


def adapting_count(study: Study) -> str:
    """In how many models training a backbone is measurably better or worse than keeping it frozen, and in full than
    through LoRA. A language model without a text is left out: what it has learned reaches nothing."""
    pairs = [c for c in study.comparisons if c.first.mode != c.second.mode]
    pairs = [c for c in pairs if c.first.task != TASKS[1] or c.first.config.use_text]

    def counts(first: str, second: str) -> str:
        gaps = [c.columns["all"] for c in pairs if (c.first.mode, c.second.mode) == (first, second)]
        better, worse = (sum(gap.excludes_zero and (gap.mean > 0) == up for gap in gaps) for up in (True, False))
        return f"better in {better} of {counted(len(gaps), 'model')} and worse in {worse}"

    if not {("lora", "frozen"), ("full", "frozen"), ("full", "lora")} <= {(c.first.mode, c.second.mode) for c in pairs}:
        return NOT_RUN
    return (
        f"Against the frozen backbone, LoRA is measurably {counts('lora', 'frozen')}, and training in full is measurably "
        f"{counts('full', 'frozen')}. Against LoRA, training in full is measurably {counts('full', 'lora')}."
    )


def significance(study: Study) -> str:
    """How many of the differences are measurable, by interval and by p value."""
    count = len(study.comparisons)
    if not count:
        return NOT_RUN
    apart = sum(c.columns["all"].excludes_zero for c in study.comparisons)
    small, smaller = (sum(c.p < limit for c in study.comparisons) for limit in (0.05, 0.05 / count))
    return (
        f"Of {counted(count, 'difference')} over all clips, {apart} have an interval that excludes zero and {small} "
        f"have p < 0.05, or {smaller} with Bonferroni's correction."
    )


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
            f"Frozen, LoRA and in full cannot be told apart for {listed(equal)}; the brackets give the gains over frozen."
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
        top = by_score(study, rows)[0]
        gap = difference(study.scores[top.name].right, nearest.right)
        parts.append(f"{signed(gap)} with {NAMES[model]}")
    return f"The best row without text differs from the nearest neighbour by {listed(parts)}."


def pretraining(study: Study) -> str:
    """Two frozen backbones of one size that have seen no label: one predicted features, the other pixels."""
    rows = [row for name in ("vjepa2_fvbb", "videomae_fvbb") for row in study.finished(False) if row.name == name]
    if len(rows) < 2:
        return NOT_RUN
    features, pixels = rows
    gap = difference(study.scores[features.name].right, study.scores[pixels.name].right)
    return (
        "V-JEPA 2 and VideoMAE have encoders of the same size and the same patches, and neither has seen a label: one "
        "was pretrained to predict the features of hidden tokens, the other their pixels. Both frozen, "
        f"{compared(gap, 'V-JEPA 2', 'VideoMAE')}."
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
    which = f"all {len(pairs)}" if len(above) == len(pairs) else f"{len(above)} of {len(pairs)}"
    found = (
        f"The text measurably raises the accuracy in {which} pairs of models that differ only in reading it; the "
        f"differences are {gains}, and with two objects {two}."
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
    reading = sum(cost > READ for cost in other)
    which = f"all {reading}" if reading == len(other) else f"{reading} of {len(other)}"
    return (
        f"In the runs with text, the text of another clip costs {spread(exchanged, ' points')}. In clips with two "
        f"objects, the text of the other object costs {spread(other, ' points')} and leaves {left} right. We say that "
        f"a run reads its text if this costs more than {100 * READ:.0f} points: {which} runs do."
    )


def is_above(value: float, limit: float, study: Study) -> bool:
    """Whether an accuracy on the test clips is above a limit by more than chance: its Wilson interval is."""
    count = len(study.clips)
    return wilson(round(value * count), count)[0] > limit


def ceiling_claim(study: Study) -> str:
    """Asserted: nothing beats the best possible observer without text. If a row did, something would leak."""
    top = study.ceilings["video without text"]
    rows = [row for row in study.finished(captioning=False) if not row.config.use_text]
    holds = all(study.scores[row.name].accuracy().low <= top for row in rows)
    return asserted(f"No row without text is measurably above the {percent(top)} that are possible without it.", holds)


def grey_claim(study: Study) -> str:
    """Asserted: without a video nothing is left."""
    rows = [row for row in study.finished(captioning=False) if not row.config.use_text]
    values = values_of(rows, "blank_video")
    if not values:
        return NOT_RUN
    majority = max(values_of(rows, "majority"))
    holds = not any(is_above(value, majority, study) for value in values)
    return asserted(f"On a grey video, no run without text is measurably above chance ({spread(values)}).", holds)


def one_frame_claim(study: Study) -> str:
    """Asserted: a single frame does not show a motion."""
    rows = study.finished(captioning=False)
    values = values_of(rows, "one_frame")
    if not values:
        return NOT_RUN
    top = max(study.ceilings["one frame, and text"], 1 / len({*study.clips.labels}))
    holds = not any(is_above(value, top, study) for value in values)
    return asserted(f"With one frame repeated, no run is measurably above chance ({spread(values)}).", holds)


def order(study: Study) -> str:
    """Frames in another order, against the best observer that does not know the order."""
    reached, limits, beyond = [], [], []
    for text, name in ((False, "frames in any order, without text"), (True, "frames in any order, and text")):
        rows = [row for row in study.finished(captioning=False) if row.config.use_text == text]
        values, top = values_of(rows, "shuffled"), study.ceilings[name]
        if not values:
            return NOT_RUN
        above = sum(is_above(value, top, study) for value in values)
        kind = "with text" if text else "without text"
        reached.append(f"{spread(values)} {kind}")
        limits.append(f"{percent(top)} {kind}")
        beyond += [f"{above} of {len(values)} runs {kind}"] if above else []
    verdict = f"{listed(beyond)} are measurably above" if beyond else "no run is measurably above"
    backwards = spread(values_of(study.finished(captioning=False), "reversed"))
    return (
        f"With shuffled frames, runs reach {listed(reached)}; {verdict} what an ideal observer of unordered frames can "
        f"reach, {listed(limits)}. With reversed frames, they reach {backwards}."
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
            f"With {NAMES[model]}, {spread(one)} of the captions of one object are wholly right, and {spread(two)} of "
            f"those of two; of the nearest neighbours' captions, {percent(copied[0])} and {percent(copied[1])}."
        )
    return " ".join(parts)


def binding(study: Study) -> str:
    """Which attributes the captions of two objects get wrong, by vision backbone."""
    two, parts = ~study.clips.single, []
    for model in study.nearest[True]:
        rows = [row for row in study.finished(captioning=True) if row.config.vision_model == model]
        if not rows:
            return NOT_RUN
        named = {n: mean(study.scores[r.name].attributes[n][:, two].mean() for r in rows) for n in LEXICON}
        whole = mean(study.scores[row.name].right[:, two].mean() for row in rows)
        shown = listed(
            [*(f"{name} in {percent(value)}" for name, value in named.items()), f"all of it in {percent(whole)}"]
        )
        parts.append(f"the captions with {NAMES[model]} are right about both objects' {shown}")
    return f"In clips with two objects, {'; '.join(parts)} (means over the rows)."


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
    return [by_score(study, [r for r in rows if (r.config.vision_model, r.config.use_text) == key])[0] for key in keys]


def errors(study: Study, name: str) -> str:
    """Whether the errors of the shown rows depend on a property of the clips."""
    apart, gaps = [], []
    for row in shown_rows(study):
        scores = {group: estimate(study.scores[row.name].right[:, m]) for group, m in groups_of(study, name).items()}
        low, high = min(scores, key=lambda g: scores[g].mean), max(scores, key=lambda g: scores[g].mean)
        if scores[low].high < scores[high].low:
            shown = f"{low}: {percent(scores[low].mean)}, {high}: {percent(scores[high].mean)}"
            apart.append(f"{in_words(row.title)} ({shown})")
        else:
            gaps.append(scores[high].mean - scores[low].mean)
    if not apart and not gaps:
        return NOT_RUN
    parts = [f"the intervals do not overlap for {listed(apart)}"] if apart else []
    if gaps:
        which = f"{len(gaps)} {'other ' if apart else ''}{'row' if len(gaps) == 1 else 'rows'}"
        parts.append(f"they overlap for {which}, in which groups differ by up to {100 * max(gaps):.1f} points")
    what = "number of objects" if name == "objects" else name
    return f"By {what}, {'; '.join(parts)}.".replace(", they overlap", ", the intervals overlap")


def top_classifier(study: Study, text: bool) -> Row | None:
    """The best classifier with or without text; None if none has run."""
    rows = [row for row in study.finished(captioning=False) if row.config.use_text == text]
    return by_score(study, rows)[0] if rows else None


def confused(study: Study, names: dict[str, str]) -> str:
    """The most frequent error of the best row without text, and of the best one with text."""
    parts = []
    for text in (False, True):
        top = top_classifier(study, text)
        if top is None:
            return NOT_RUN
        counts: dict[tuple[str, str], int] = {}
        for result in top.results.values():
            for answer in result.answers(study.clips):
                pair = (answer["truth"], answer["label"])
                counts[pair] = counts.get(pair, 0) + (pair[0] != pair[1])
        (truth, answered), count = max(counts.items(), key=lambda item: item[1])
        mistake = f"“{names[answered]}” where “{names[truth]}” is right"
        parts.append(f"{in_words(top.title)} is {mistake} ({count} of {sum(counts.values())} errors)")
    return f"The most frequent error of {'; that of '.join(parts)}."


def top_row(study: Study, captioning: bool) -> Row:
    """The best captioner or classifier, whose answers are shown. Raises IndexError if none has run."""
    return by_score(study, study.finished(captioning))[0]


def shown_run(study: Study, captioning: bool) -> str:
    """`TimeSformer + GPT-2 in full, seed 0`: the run whose answers are shown."""
    if not study.finished(captioning):
        return NOT_RUN
    row = top_row(study, captioning)
    return f"{in_words(row.title)}, seed {next(iter(row.results))}"


# -- sweeps -----------------------------------------------------------------------------------------


def learning(study: Study) -> str:
    """The accuracy of full, LoRA and frozen at each share of the training clips, by vision backbone."""
    parts, seeds = [], set()
    for model, curves in learning_curves(study).items():
        found = []
        for mode, curve in curves.items():
            means = [f"{percent(mean(values))} ({share} %)" for share, values in curve.items()]
            found.append(f"{MODES[mode]} {listed(means)}")
            seeds |= {len(values) for share, values in curve.items() if share < 100}
        parts.append(f"{NAMES[model]} {', '.join(found)}")
    if not seeds:
        return NOT_RUN
    many = " to ".join(map(str, sorted({min(seeds), max(seeds)})))
    return (
        f"Mean test accuracy by the share of the clips (in brackets): {'; '.join(parts)}. Below 100 %, means are over "
        f"{many} seed{'' if many == '1' else 's'}."
    )


def sweep(study: Study, option: str) -> str:
    """The best and the worst value of an option in each row of a sweep, on val."""
    rows, parts = {row.name: row for row in study.rows}, []
    for name, curve in sweep_curves(study, option).items():
        top, low = max(curve, key=lambda v: curve[v]), min(curve, key=lambda v: curve[v])
        best_and_worst = f"{top} ({percent(curve[top])}) and {low} ({percent(curve[low])})"
        parts.append(f"{best_and_worst} for {in_words(rows[name].title)}")
    what = {"lora_r": "ranks", "token_grid": "grids"}[option]
    return f"The best and the worst of the {what}: {'; '.join(parts)}." if parts else NOT_RUN


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
    front.sort(key=lambda r: seconds[r.name])
    shown = [f"{in_words(r.title)} ({percent(accuracy[r.name])}, {seconds[r.name]:.0f} s)" for r in front]
    return f"In order of training time, these classifiers are more accurate than every faster one: {listed(shown)}."


def other_head(study: Study) -> str:
    """What video classifiers reach with another head than that of the final rows; "" if not tried."""
    articles = {"linear": "a linear", "attentive": "an attentive"}
    found: dict[str, list[str]] = {}
    for row in study.rows:
        for trial in (t for t in study.trials if t["row"] == row.name and t["share"] == 100):
            own, head = head_of(row.config), trial["options"].get("head", "")
            if [*trial["options"]] == ["head"] and head != own and trial["seed"] in row.results:
                reached = row.results[trial["seed"]].metrics["test"]["accuracy"]
                shown = f"{in_words(row.title)} reaches {percent(trial['test'])} ({percent(reached)})"
                found.setdefault(f"with {articles[head]} head instead of {articles[own]} one", []).append(shown)
    parts = [f"{change}, {listed(shown)}" for change, shown in found.items()]
    if not parts:
        return ""
    return (
        f"{sentence('; '.join(parts))} These are runs of one seed; the brackets give the run with the row's own head."
    )


def tuning(study: Study) -> str:
    """In how many rows the default learning rate is as good on val as the others that were tried."""
    curves = sweep_curves(study, "learning_rate")
    counts = [result.metrics["val"]["count"] for row in study.rows for result in row.results.values()]
    if not curves or not counts:
        return "Learning rates are the program's defaults, which were chosen on validation clips with one seed."
    worse = []
    for row in (row for row in study.rows if row.name in curves):
        # a difference of less than one standard error says nothing
        curve, default = curves[row.name], default_rates(row.config)[0]
        best = max(curve.values())
        error = math.sqrt(best * (1 - best) / counts[0])
        reached = curve[min(curve, key=lambda rate: abs(rate - default))]
        if reached < best - error:
            worse.append(f"{in_words(row.title)} ({100 * (best - reached):.1f} points)")
    sizes = sorted({len(curve) for curve in curves.values()})
    near = (
        f"For {len(curves) - len(worse)} of them, the default is within one standard error of the best validation score"
    )
    but = f"; for {len(worse)}, it is further below: {listed(worse)}" if worse else ""
    return (
        f"Learning rates are the program's defaults. With {SWEEP_SHARE} % of the training clips and one seed, "
        f"{' or '.join(map(str, sizes))} learning rates were tried for {len(curves)} of {len(study.rows)} rows. "
        f"{near}{but}."
    )


def epoch_choice(study: Study) -> str:
    """What other rules for the best epoch would have chosen in these runs, and how often the last epoch is the best."""
    results = [r for row in study.finished(captioning=False) for r in row.results.values()]
    if not results:
        return NOT_RUN
    rules = compared_rules([(r.log, r.metrics["val"]["count"]) for r in results])
    kept, lowest, near = (
        f"{percent(rules[rule]['accuracy'])} and {rules[rule]['loss']:.3f}"
        for rule in ("best accuracy", "lowest loss", "one standard error")
    )
    last = sum(r.metrics["best_epoch"] == r.log[-1]["epoch"] for r in results)
    return (
        f"In {counted(len(results), 'run')} of classifiers, the mean validation accuracy and loss are {kept} in the "
        f"epoch that is kept, {lowest} in the one with the lowest loss, and {near} in the one with the lowest loss "
        f"among those within one standard error of the best accuracy. In {last} of these runs the last epoch is kept."
    )


def all_findings(study: Study, names: dict[str, str]) -> dict[str, str]:
    """{name in report.typ: sentences}. `names` are the display names of the classes.

    Raises UserError, naming the sentence, if the numbers contradict one that is asserted.
    """
    plain: tuple[Callable[[Study], str], ...] = (
        *(best, runner_up, adapting_count, significance, neighbour, pretraining, text_gain, text_read, ceiling_claim),
        *(grey_claim, one_frame_claim, order, captions, binding, learning, other_head, pareto, tuning, epoch_choice),
    )
    return (
        {make.__name__: make(study) for make in plain}
        | {f"adapting_{number}": adapting(study, task) for number, task in enumerate(TASKS)}
        | {f"errors_{name}": errors(study, name) for name in GROUPS}
        | {f"sweep_{option}": sweep(study, option) for option in ("lora_r", "token_grid")}
        | {"confused": confused(study, names)}
        | {"shown_classifier": shown_run(study, captioning=False), "shown_captioner": shown_run(study, captioning=True)}
    )
