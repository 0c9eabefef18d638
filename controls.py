"""What a trained model really uses: the same test under conditions in which it should fail, and rivals without training.

majority            the commonest class (or caption) of the training videos, for every clip
nearest_neighbour   the answer of the training video whose frozen features are nearest (cosine, centred)
one_frame           every frame replaced by the middle one: no motion
shuffled reversed   the same frames in another order
blank_video         every pixel the backbone's mean grey; where the model reads text, text alone
text_shuffled       every clip with the text of another one
"""

from collections import Counter
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
from feature_cache import compute_missing, open_store, video_ids
from metrics import Lexicon, attribute_summary, attributes_in, caption_summary
from pretrained import locate
from script import UserError
from train_code import build_loaders, caption_all, evaluate, loss_sum, to_device
from transforms import Preprocessing
from VLoader import Sample, Splits

SHOWN, PARTS, CELLS = 2, 4, 6  # clips whose occlusion is mapped; parts of the frames, cells on each side


# -- other videos -----------------------------------------------------------------------------------


def middle_frame(pixel_values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """uint8 (..., T, C, H, W), its middle frame T times."""
    times = pixel_values.shape[-4]
    return pixel_values.narrow(-4, times // 2, 1).expand_as(pixel_values)


def shuffled_frames(pixel_values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Every clip's frames in an order of its own, the same at every evaluation."""
    clips = []
    for clip, place in zip(pixel_values, index.tolist(), strict=True):
        order = np.random.default_rng(place).permutation(clip.shape[-4])
        clips.append(clip.index_select(-4, torch.from_numpy(order)))
    return torch.stack(clips)


def reversed_frames(pixel_values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return pixel_values.flip(-4)


def blank(preprocessing: Preprocessing) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Replaces every pixel by the mean that the backbone's normalisation takes away."""
    grey = (
        (torch.tensor(preprocessing.mean) / preprocessing.rescale_factor).round().to(torch.uint8)[:, None, None]
    )  # (C, 1, 1)
    return lambda pixel_values, index: grey.expand_as(pixel_values)


class Changed:
    """A loader whose clips are changed by change(pixel_values, index)."""

    def __init__(self, loader: DataLoader, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        self.loader, self.change, self.dataset = loader, change, loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor] | None]:
        for batch in self.loader:
            if batch is not None:
                batch["video"] = self.change(batch["video"], batch["index"])
            yield batch


def with_texts_of_others(samples: list[Sample]) -> list[Sample]:
    """Every sample with the text of the next one in a random circle: never its own."""
    order = np.random.default_rng(0).permutation(len(samples))
    texts = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return [replace(sample, text=samples[texts[i]].text) for i, sample in enumerate(samples)]


# -- rivals without training ------------------------------------------------------------------------


def nearest(splits: Splits, asked: list[Sample], config: Config, accelerator: Any) -> np.ndarray:
    """For every sample asked the place of the training sample nearest to it. (n,)"""
    plain = replace(
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
    encoder = build_model(plain, 1, locate(config.vision_model, config.weights))
    store = open_store(encoder, plain)
    bad = compute_missing(store, encoder, replace(splits, val=[], test=asked), plain, accelerator)
    # training reads other frames of a video, so a damaged one may show only now
    readable = [place for place, sample in enumerate(splits.train) if sample.path not in bad]
    if bad and (not config.skip_unreadable or not readable or any(s.path in bad for s in asked)):
        raise UserError(next(iter(bad.values())))

    def pooled(samples: list[Sample]) -> torch.Tensor:
        return torch.stack([store.read(p)[0].float() for p in store.index.find(video_ids(samples))])  # (n, D)

    known = pooled([splits.train[place] for place in readable])
    centre = known.mean(0)
    known = unit(known - centre).T  # (D, n)
    places = torch.cat([(part @ known).argmax(1) for part in unit(pooled(asked) - centre).split(256)])
    return np.array(readable)[places.numpy()]


def unit(features: torch.Tensor) -> torch.Tensor:
    return features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)


# -- where the model looks --------------------------------------------------------------------------


@torch.no_grad()
def occlusion_maps(
    model: VideoModel, loader: DataLoader, rows: list[dict[str, Any]], accelerator: Any
) -> list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
    """(clip uint8 [T, C, H, W], map [PARTS, CELLS, CELLS], row) of the chosen clips: by how much answer_scores of the
    model's own answer fall when a cell of the picture shows the clip's background in a part of the frames (after
    Zeiler 2014, whose grey square would be an object among objects)."""
    model.to(accelerator.device).eval()
    names = list(loader.dataset.class_index)
    maps = []
    for place in tqdm(chosen(rows), desc="occlusion", unit="clip", leave=False):
        row, item = rows[place], loader.dataset[(0, place)]
        if "caption" in row:
            item["caption"] = row["caption"]
        else:
            item["label"] = names.index(row["label"])
        covered = list(occluded(item["video"]))
        scores = torch.cat(
            [
                answer_scores(model, [item | {"video": c} for c in chunk], accelerator)
                for chunk in ([item["video"]], *(covered[i : i + 16] for i in range(0, len(covered), 16)))
            ]
        )
        maps.append((item["video"], (scores[0] - scores[1:]).view(PARTS, CELLS, CELLS), row))
    return maps


def chosen(rows: list[dict[str, Any]]) -> list[int]:
    """The places of SHOWN clips at most: a wrong answer, a right one, and so on where there are both; drawn at random,
    always the same, each of another class (of captioners: with other references)."""
    places: list[int] = []
    for right in (False, True) * SHOWN:
        seen = [truth(rows[place]) for place in places]
        drawn = np.random.default_rng(0).permutation(len(rows)).tolist()
        places += [p for p in drawn if is_right(rows[p]) == right and truth(rows[p]) not in seen][:1]
    return places[:SHOWN]


def truth(row: dict[str, Any]) -> str | list[str]:
    return row["references"] if "caption" in row else row["truth"]


def is_right(row: dict[str, Any]) -> bool:
    return row["caption"] in row["references"] if "caption" in row else row["label"] == row["truth"]


def background(clip: torch.Tensor) -> torch.Tensor:
    """What stands still in a clip, uint8 [T, C, H, W], too coarse to show an object: the median over time, blurred
    over two cells of the map. uint8 [C, H, W]"""
    still = clip.contiguous().median(0).values.float()[None]  # (1, C, H, W); torch's median of expanded clips is wrong
    coarse = F.adaptive_avg_pool2d(still, max(1, CELLS // 2))
    blurred = F.interpolate(coarse, size=clip.shape[-2:], mode="bilinear", align_corners=False)
    return blurred[0].round().to(torch.uint8)


def occluded(clip: torch.Tensor) -> Iterator[torch.Tensor]:
    """The clip, uint8 [T, C, H, W], with its background in one cell: over parts of the frames, rows, columns."""
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
    """The log odds of each item's label (a sure model's probability hardly moves), or the log probability of its
    caption. (B,)"""
    batch = to_device(model.collator()(items), accelerator.device)
    with accelerator.autocast():
        _, logits, targets = loss_sum(model, batch)
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")  # 0 where targets are -100
    scores = -losses.view(len(items), -1).sum(1).cpu()
    return scores if targets.ndim > 1 else scores - torch.log(-torch.expm1(scores.clamp(max=-1e-7)))


# -- the table --------------------------------------------------------------------------------------


def caption_row(captions: list[str], asked: list[Sample], lexicon: Lexicon | None) -> dict[str, float]:
    """CIDEr and, where the data set has a lexicon, the share of captions that name each attribute, and all, rightly."""
    everything = np.arange(len(asked))
    row = {"CIDEr": caption_summary(captions, [s.captions for s in asked])(everything)["CIDEr"]}
    if lexicon and all(s.attributes for s in asked):
        named = [attributes_in(c, lexicon) for c in captions]
        scores = attribute_summary(named, [s.attributes for s in asked])(everything)
        row |= scores | {"all_attributes": scores.pop("all")}
    return row


def control_scores(model: VideoModel, splits: Splits, config: Config, accelerator: Any) -> dict[str, Any]:
    """{"split": ..., "as_it_is": {score: value}, <control>: {score: value}, ...} on test, else on val."""
    split = "test" if splits.test else "val"
    asked = getattr(splits, split)
    model.to(accelerator.device)

    def loader_of(samples: list[Sample]) -> DataLoader:
        return build_loaders(model, config, replace(splits, train=[], val=[], test=samples), accelerator=accelerator)["test"]

    def scores(loader: Any, name: str) -> dict[str, float]:
        if config.captioning:
            return caption_row(caption_all(model, loader, accelerator, config), asked, splits.lexicon)
        return {"accuracy": evaluate(model, loader, accelerator, desc=name)["accuracy"]}

    def rival(answers: list[str]) -> dict[str, float]:
        if config.captioning:
            return caption_row(answers, asked, splits.lexicon)
        return {"accuracy": float(np.mean([a == s.label for a, s in zip(answers, asked, strict=True)]))}

    loader = loader_of(asked)
    known = [s.captions[0] if config.captioning else str(s.label) for s in splits.train]
    table: dict[str, Any] = {"split": split, "as_it_is": scores(loader, "as it is")}
    table["majority"] = rival([Counter(known).most_common(1)[0][0]] * len(asked))
    table["nearest_neighbour"] = rival([known[i] for i in nearest(splits, asked, config, accelerator)])
    changes = {
        "one_frame": middle_frame,
        "shuffled": shuffled_frames,
        "reversed": reversed_frames,
        "blank_video": blank(model.vision_encoder.preprocessing),
    }
    for name, change in changes.items():
        table[name] = scores(Changed(loader, change), name)
    loader.close()
    if model.text_field == "text":
        table["text_only"] = table["blank_video"]
        loader = loader_of(with_texts_of_others(asked))
        table["text_shuffled"] = scores(loader, "text shuffled")
        loader.close()
    return table


def control_line(table: dict[str, Any]) -> str:
    """How much the model uses motion, and text."""
    name = "CIDEr" if "CIDEr" in table["as_it_is"] else "accuracy"
    scale, unit_name = (1, "") if name == "CIDEr" else (100, " points")
    digits = 2 if name == "CIDEr" else 1

    def lost(control: str) -> str:
        return f"{scale * (table['as_it_is'][name] - table[control][name]):.{digits}f}"

    def value(control: str) -> str:
        return f"{scale * table[control][name]:.{digits}f}{' %' if scale == 100 else ''}"

    parts = [
        f"controls on {table['split']} ({name}): {value('as_it_is')} as it is, {value('majority')} majority, "
        f"{value('nearest_neighbour')} nearest neighbour, {value('blank_video')} blank video",
        f"motion: one frame repeated costs {lost('one_frame')}, frames shuffled {lost('shuffled')}, "
        f"reversed {lost('reversed')}{unit_name}",
    ]
    if "text_shuffled" in table:
        parts.append(f"text: shuffled costs {lost('text_shuffled')}, alone it gives {value('text_only')}")
    return "; ".join(parts)
