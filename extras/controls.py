"""What a trained model really uses: the same test with inputs on which it should fail, and baselines without training.

majority            the most frequent class (or labels, or caption) of the training videos, for every clip
nearest_neighbour   the answer of the nearest training video, by the frozen backbone's features (cosine, centred)
one_frame           every frame replaced by the middle one: no motion
shuffled reversed   the same frames in another order
blank_video         every pixel replaced by the backbone's mean grey; a model that reads text then has nothing else
text_shuffled       every clip with the text of another one
question_shuffled   every clip with the question of another one
text_other_object   clips with several objects, with the text of another object in the same clip (`other_text`)
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from build_model import VideoModel, build_model
from config import Config
from extras.multilabel import labels_of, mean_average_precision, multi_hot
from feature_cache import compute_missing, open_store, video_ids
from metrics import Lexicon, attribute_summary, caption_summary, exact_matches, generated
from script import UserError
from train_code import build_loaders, caption_all, cast_frozen, evaluate, loss_sum, split_by_question, to_device
from transforms import Preprocessing
from VLoader import Sample, Splits

SHOWN, PARTS, CELLS = 2, 4, 6  # occlusion maps: clips, parts of the frames in time, cells on each side of a frame


# -- changed videos: functions of pixels uint8 (B, T, C, H, W) or with views, and the samples' numbers ---------


def middle_frame(pixel_values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Repeats the middle frame."""
    times = pixel_values.shape[-4]
    return pixel_values.narrow(-4, times // 2, 1).expand_as(pixel_values)


def shuffled_frames(pixel_values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Shuffles the frames of every clip. The order depends on the sample only, so every evaluation is the same."""
    clips = []
    for clip, seed in zip(pixel_values, index.tolist(), strict=True):
        order = np.random.default_rng(seed).permutation(clip.shape[-4])
        clips.append(clip.index_select(-4, torch.from_numpy(order)))
    return torch.stack(clips)


def reversed_frames(pixel_values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Plays the clips backwards."""
    return pixel_values.flip(-4)


def blank(preprocessing: Preprocessing) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Replaces every pixel by the mean of the backbone's normalisation, so that the model sees zeros."""
    grey = (torch.tensor(preprocessing.mean) / preprocessing.rescale_factor).round()[:, None, None]  # (C, 1, 1)
    return lambda pixel_values, index: grey.to(torch.uint8).expand_as(pixel_values)


class ChangedLoader:
    """A loader whose clips are replaced by change(pixel_values, index)."""

    def __init__(self, loader: DataLoader, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        self.loader, self.change, self.dataset = loader, change, loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor] | None]:
        for batch in self.loader:
            if batch is not None:
                batch["video"] = self.change(batch["video"], batch["index"])
            yield batch


def with_texts_of_others(samples: list[Sample], name: str = "text") -> list[Sample]:
    """Gives every sample the text, or the question, of the next one in a random cycle, so never its own."""
    order = np.random.default_rng(0).permutation(len(samples))
    others = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return [replace(sample, **{name: getattr(samples[others[i]], name)}) for i, sample in enumerate(samples)]


# -- baselines without training ---------------------------------------------------------------------


def nearest_neighbours(splits: Splits, samples: list[Sample], config: Config, accelerator: Any) -> np.ndarray:
    """The index of the nearest training sample for each of the samples; for a question, of the nearest that has a
    question of its kind. (n,)"""
    # the backbone as published, whatever the run has trained: this is what fine-tuning must beat
    frozen_config = replace(
        config,
        use_vlm=False,
        captioning=False,
        use_text=False,
        language_model=None,
        use_lora_vision=False,
        freeze_visionbackbone=True,
        test_clips=1,
        test_crops=1,
        augment="none",
        flip=False,
    )
    model = build_model(frozen_config, num_classes=1)
    cast_frozen(model, config, accelerator)

    # the feature cache may have most of them already
    store = open_store(model, frozen_config, accelerator)
    bad = compute_missing(store, model, replace(splits, val=[], test=samples), frozen_config, accelerator)

    # training read other frames of these videos, so a damaged one may show up only now
    readable = [index for index, sample in enumerate(splits.train) if sample.key not in bad]
    if bad and (not config.skip_unreadable or not readable or any(s.key in bad for s in samples)):
        raise UserError(next(iter(bad.values())))

    def pooled(samples: list[Sample]) -> torch.Tensor:
        return torch.stack([store.read(slot)[0].float() for slot in store.index.find(video_ids(samples))])  # (n, D)

    # centred, because all features share a large common part; in chunks, because the product of all could be huge
    train = pooled([splits.train[index] for index in readable])  # (n, D)
    centre = train.mean(0)
    train = F.normalize(train - centre).T  # (D, n)
    groups = {group: number for number, group in enumerate({group_of(s) for s in [*splits.train, *samples]})}
    train_groups = torch.tensor([groups[group_of(splits.train[index])] for index in readable])  # (n,)
    own_groups = torch.tensor([groups[group_of(sample)] for sample in samples])  # (m,)
    nearest = torch.cat(
        [
            (chunk @ train).masked_fill(own[:, None] != train_groups, -2.0).argmax(1)  # less than any cosine
            for chunk, own in zip(F.normalize(pooled(samples) - centre).split(256), own_groups.split(256), strict=True)
        ]
    )
    return np.array(readable)[nearest.numpy()]


def group_of(sample: Sample) -> tuple[bool, str | None]:
    """Samples whose answers a baseline may exchange: all without a question, or with questions of one kind."""
    return bool(sample.question), sample.kind


# -- where the model looks --------------------------------------------------------------------------


@torch.no_grad()
def occlusion_maps(
    model: VideoModel, loader: DataLoader, rows: list[dict[str, Any]], accelerator: Any
) -> list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
    """(clip uint8 [T, C, H, W], map [PARTS, CELLS, CELLS], row) of the chosen clips.

    A map says by how much the score of the model's own answer drops when a cell is covered with the clip's background
    in a part of the frames (after Zeiler 2014; his grey square would look like one more object in synthetic clips).
    """
    model.to(accelerator.device).eval()
    names = list(loader.dataset.class_index)
    maps = []
    for index in tqdm(chosen(rows), desc="occlusion", unit="clip", leave=False):
        # the question is what the model based its own answer on, right or wrong
        row, item = rows[index], loader.dataset[(0, index)]
        if "references" in row:
            item["caption"] = generated(row)
        else:
            best = row.get("top_k", [row])[0]["label"]
            item["label"] = multi_hot([[best]], names)[0] if "labels" in row else names.index(best)

        # the clip itself first, then every covered one, 16 at a time
        items = [item | {"video": video} for video in (item["video"], *occluded(item["video"]))]
        chunks = [items[:1], *(items[i : i + 16] for i in range(1, len(items), 16))]
        scores = torch.cat([answer_scores(model, chunk, accelerator) for chunk in chunks])
        maps.append((item["video"], (scores[0] - scores[1:]).view(PARTS, CELLS, CELLS), row))
    return maps


def chosen(rows: list[dict[str, Any]]) -> list[int]:
    """The indices of at most SHOWN clips, wrong and right answers in turn. They are drawn at random with a fixed seed,
    no two of one class (for captioners: with the same references)."""
    indices: list[int] = []
    for right in (False, True) * SHOWN:
        seen = [truth(rows[index]) for index in indices]
        order = np.random.default_rng(0).permutation(len(rows)).tolist()
        indices += [i for i in order if is_right(rows[i]) == right and truth(rows[i]) not in seen][:1]
    return indices[:SHOWN]


def truth(row: dict[str, Any]) -> str | list[str]:
    """The true class or classes, or the references of a caption."""
    return row["references"] if "references" in row else row["truth"]


def is_right(row: dict[str, Any]) -> bool:
    """Whether the class is the true one, or all classes are, or the caption equals a reference."""
    if "labels" in row:
        return labels_of(row) == {*row["truth"]}
    return generated(row) in row["references"] if "references" in row else row["label"] == row["truth"]


def background(clip: torch.Tensor) -> torch.Tensor:
    """The background of a clip, uint8 [T, C, H, W] -> [C, H, W]: the median over time, blurred over two cells of the
    map, so that no object can be recognised in it."""
    still = clip.contiguous().median(0).values.float()[None]  # (1, C, H, W); torch's median of expanded clips is wrong
    coarse = F.adaptive_avg_pool2d(still, max(1, CELLS // 2))
    blurred = F.interpolate(coarse, size=clip.shape[-2:], mode="bilinear", align_corners=False)
    return blurred[0].round().to(torch.uint8)


def occluded(clip: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the clip, uint8 [T, C, H, W], with one cell covered: by part of the frames, then row, then column."""
    times, _, height, width = clip.shape
    filled = background(clip).expand_as(clip)
    edges = [
        torch.linspace(0, size, n + 1).round().int().tolist()
        for size, n in ((times, PARTS), (height, CELLS), (width, CELLS))
    ]
    spans = [[slice(a, b) for a, b in pairwise(e)] for e in edges]
    for time, row, column in product(*spans):
        changed = clip.clone()
        changed[time, :, row, column] = filled[time, :, row, column]
        yield changed


def answer_scores(model: VideoModel, items: list[dict], accelerator: Any) -> torch.Tensor:
    """The log odds of each item's label, which is the only one, or the log probability of its caption. (B,)

    Log odds, because the probability of a confident model hardly moves.
    """
    batch = to_device(model.collator()(items), accelerator.device)
    with accelerator.autocast():
        _, logits, targets = loss_sum(model, batch)
    if targets.dtype == torch.bool:  # the logits are log odds
        return (logits * targets).sum(1).cpu()
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")  # 0 where targets are -100
    scores = -losses.view(len(items), -1).sum(1).cpu()
    return scores if targets.ndim > 1 else scores - torch.log(-torch.expm1(scores.clamp(max=-1e-7)))


# -- the scores -------------------------------------------------------------------------------------


def caption_row(texts: list[str], samples: list[Sample], lexicon: Lexicon | None) -> dict[str, float]:
    """CIDEr of the captions; if the dataset has a lexicon, also the fraction of captions with each attribute right, and
    with all. Under "answers", the fraction of questions with the right answer."""
    row: dict[str, float] = {}
    (samples, captions), (asked, answers) = split_by_question(samples, texts)
    everything = np.arange(len(samples))
    if samples:
        row["CIDEr"] = caption_summary(captions, [s.captions for s in samples])(everything)["CIDEr"]
    if samples and lexicon and all(s.has_attributes(lexicon) for s in samples):
        scores = attribute_summary(captions, [s.objects for s in samples], lexicon)(everything)
        row |= scores | {"all_attributes": scores.pop("all")}
    if asked:
        row["answers"] = float(exact_matches(answers, [s.captions for s in asked]).mean())
    return row


def score(model: VideoModel, loader: Any, config: Config, accelerator: Any, desc: str) -> dict[str, float]:
    """Accuracy or mAP of a classifier on the clips of a loader; caption_row() of a captioner."""
    if config.captioning:
        texts = caption_all(model, loader, accelerator, config)
        return caption_row(texts, loader.dataset.samples, loader.dataset.lexicon)
    scores = evaluate(model, loader, accelerator, desc=desc)
    return {name: scores[name] for name in ("accuracy", "mAP") if name in scores}


def control_scores(model: VideoModel, splits: Splits, config: Config, accelerator: Any) -> dict[str, Any]:
    """{"split": ..., "as_it_is": {score: value}, <control>: {score: value}, ...} on test, or without one on val."""
    split = "test" if splits.test else "val"
    samples = getattr(splits, split)
    model.to(accelerator.device)

    def loader_of(samples: list[Sample]) -> DataLoader:
        only_these = replace(splits, train=[], val=[], test=samples)
        return build_loaders(model, config, only_these, accelerator=accelerator)["test"]

    def score_changed(samples: list[Sample], desc: str) -> dict[str, float]:
        loader = loader_of(samples)
        scores = score(model, loader, config, accelerator, desc)
        loader.close()
        return scores

    # the model itself, and the two baselines
    loader = loader_of(samples)
    table: dict[str, Any] = {"split": split, "as_it_is": score(model, loader, config, accelerator, "as it is")}
    table |= baseline_scores(model, splits, samples, config, accelerator)

    # changed videos: a model that loses nothing did not use what was taken away
    changes = {
        "one_frame": middle_frame,
        "shuffled": shuffled_frames,
        "reversed": reversed_frames,
        "blank_video": blank(model.vision_encoder.preprocessing),
    }
    for name, change in changes.items():
        table[name] = score(model, ChangedLoader(loader, change), config, accelerator, name)
    loader.close()

    # changed texts: with that of another object, a model that uses the text names that object, so it is mostly wrong
    if model.text_field == "text":
        table["text_only"] = table["blank_video"]
        table["text_shuffled"] = score_changed(with_texts_of_others(samples), "text shuffled")
        if several := [s for s in samples if s.other_text]:
            other = [replace(s, text=s.other_text) for s in several]
            table["several_objects"] = score_changed(several, "several objects") | {"count": len(several)}
            table["text_other_object"] = score_changed(other, "text other object") | {"count": len(several)}
    if asked := [s for s in samples if s.question]:
        table["question_shuffled"] = score_changed(with_texts_of_others(asked, "question"), "question shuffled")
    return table


def baseline_scores(
    model: VideoModel, splits: Splits, samples: list[Sample], config: Config, accelerator: Any
) -> dict[str, dict[str, float]]:
    """{"majority": {score: value}, "nearest_neighbour": {score: value}}: the samples with answers of train."""

    def score_answers(answers: list[Any]) -> dict[str, float]:
        if config.captioning:
            return caption_row(answers, samples, splits.lexicon)
        if model.multi_label:  # a label that is in the answer has the score 1, any other 0
            found, true = (multi_hot(rows, splits.class_names) for rows in (answers, [s.labels for s in samples]))
            return {"mAP": mean_average_precision(true, found.astype(float))}
        return {"accuracy": float(np.mean([a == s.label for a, s in zip(answers, samples, strict=True)]))}

    of_class = [s.labels if model.multi_label else str(s.label) for s in splits.train]
    train_answers = [s.captions[0] for s in splits.train] if config.captioning else of_class
    majority = score_answers(majority_answers(splits.train, train_answers, samples))
    neighbours = nearest_neighbours(splits, samples, config, accelerator)
    return {"majority": majority, "nearest_neighbour": score_answers([train_answers[i] for i in neighbours])}


def majority_answers(train: list[Sample], answers: list[Any], samples: list[Sample]) -> list[Any]:
    """For each sample, the most frequent answer among the training samples of its group_of(); "" if there are none."""
    counts: dict[tuple, Counter] = defaultdict(Counter)
    for sample, answer in zip(train, answers, strict=True):
        counts[group_of(sample)][answer] += 1
    most_common = {group: counter.most_common(1)[0][0] for group, counter in counts.items()}
    return [most_common.get(group_of(sample), "") for sample in samples]


def control_line(table: dict[str, Any]) -> str:
    """The result in one line: how much the model uses motion and text. Captions and answers have a part each."""
    return "; ".join(
        control_text(table, name) for name in ("accuracy", "mAP", "CIDEr", "answers") if name in table["as_it_is"]
    )


def control_text(table: dict[str, Any], name: str) -> str:
    """The part of control_line() about one score."""
    # CIDEr as it is, the others in percent
    scale, points = (1, "") if name == "CIDEr" else (100, " points")
    digits = 2 if name == "CIDEr" else 1

    def lost(control: str) -> str:
        return f"{scale * (table['as_it_is'][name] - table[control][name]):.{digits}f}"

    def value(control: str) -> str:
        return f"{scale * table[control][name]:.{digits}f}{' %' if scale == 100 else ''}"

    # what a control costs says more than its score
    parts = [
        f"controls on {table['split']} ({name}): {value('as_it_is')} as it is, {value('majority')} majority, "
        f"{value('nearest_neighbour')} nearest neighbour, {value('blank_video')} blank video",
        f"motion: one frame repeated costs {lost('one_frame')}, frames shuffled {lost('shuffled')}, "
        f"reversed {lost('reversed')}{points}",
    ]
    if "text_shuffled" in table:
        parts.append(f"text: shuffled costs {lost('text_shuffled')}, alone it gives {value('text_only')}")
    if "text_other_object" in table:
        parts.append(
            f"clips with several objects: {value('several_objects')}, with another object's text "
            f"{value('text_other_object')}"
        )
    if name == "answers":
        parts.append(f"questions: those of other clips cost {lost('question_shuffled')}{points}")
    return "; ".join(parts)
