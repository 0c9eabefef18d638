"""What a frozen vision backbone says of each video, computed once and read by every epoch and every later run.

    <cache_dir>/<key>/<number>.safetensors     features (n, 1 + N, D) fp16 and the ids (n, 16) of n videos
                      about.json               what the key stands for

The key is made of the backbone's fingerprint, its preprocessing, the frames that are taken, and token_grid; an
id is the digest of a video's content. So videos may be moved and copied, and a changed video, or another backbone,
is never answered from here. Shards are written whole or not at all: an extraction that was killed goes on behind
its last one. Each holds a digest of its ids and features, which is compared before a run uses them. Files are only
ever added; two runs may write side by side, and the folder may be removed at any time.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from build_model import VideoModel, VisionEncoder
from config import Config, options_with
from script import UserError, make_folder, printable, remove_leftovers, replace_file
from VLoader import ClipDataset, EpochBatches, Sample, Splits, build_loader

SHARD = 256  # videos a file


def video_ids(samples: list[Sample]) -> np.ndarray:
    """The 16 bytes of each video's digest. (n, 16). Raises ReadError where one is computed now and cannot be."""
    return np.frombuffer(bytearray.fromhex("".join(s.identity for s in samples)), np.uint8).reshape(-1, 16)


def content_digest(ids: np.ndarray, features: np.ndarray) -> str:
    """Of what a shard holds: ids (n, 16) uint8 and features (n, 1 + N, D) fp16."""
    digest = hashlib.blake2b(np.ascontiguousarray(ids), digest_size=16)
    digest.update(np.ascontiguousarray(features))
    return digest.hexdigest()


class FeatureIndex:
    """Which row of which shard holds a video's features: three sorted arrays, 24 bytes a video."""

    def __init__(self) -> None:
        self.low, self.high = np.empty(0, np.uint64), np.empty(0, np.uint64)  # halves of the ids
        self.rows = np.empty(0, np.int64)  # shard * 2^32 + row

    def add(self, shards: list[tuple[int, np.ndarray]]) -> None:
        """Adds (shard's number, ids (n, 16) uint8) of several shards."""
        halves = [np.ascontiguousarray(ids).view(np.uint64).reshape(-1, 2) for _, ids in shards]  # (n, 2)
        rows = [(number << 32) + np.arange(len(ids), dtype=np.int64) for number, ids in shards]
        low = np.concatenate([self.low, *(h[:, 0] for h in halves)])
        high = np.concatenate([self.high, *(h[:, 1] for h in halves)])
        order = np.argsort(low, kind="stable")
        self.low, self.high = low[order], high[order]
        self.rows = np.concatenate([self.rows, *rows])[order]

    def drop(self, number: int) -> None:
        """Forgets a shard's videos."""
        kept = self.rows >> 32 != number
        self.low, self.high, self.rows = self.low[kept], self.high[kept], self.rows[kept]

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The place of each id (n, 16) uint8, -1 where there is none. (n,) int64"""
        if not len(self.low) or not len(ids):
            return np.full(len(ids), -1, np.int64)
        halves = np.ascontiguousarray(ids).view(np.uint64).reshape(-1, 2)
        at = np.searchsorted(self.low, halves[:, 0]).clip(max=len(self.low) - 1)
        same = (self.low[at] == halves[:, 0]) & (self.high[at] == halves[:, 1])
        return np.where(same, self.rows[at], -1)


class FeatureStore:
    """The features of one backbone, with one way of taking frames, in one folder; `shape` (1 + N, D) is a video's.

    Raises UserError if the folder cannot be made or a shard written.
    """

    def __init__(self, folder: Path, about: dict[str, Any], shape: tuple[int, int]):
        self.folder, self.shape = folder, shape
        make_folder(folder)
        remove_leftovers(folder)
        if not (folder / "about.json").is_file():
            self.describe(about)
        self.index = FeatureIndex()
        self.shards: list[Path] = []
        self.checked: set[int] = set()  # the shards whose content was compared with its digest
        self.passed_over: dict[Path, None] = {}  # files that are not, or no longer, this store's; in order
        self.handles: dict[int, Any] = {}  # opened where they are used: a worker opens its own
        self.refresh()

    def describe(self, about: dict[str, Any]) -> None:
        text = json.dumps(about, indent=1) + "\n"
        replace_file(self.folder / "about.json", lambda p: p.write_text(text, encoding="utf-8"))

    def refresh(self) -> None:
        """Reads the ids of shards that have come since. A file that is no shard of this store is passed over."""
        known, fresh = {*self.shards, *self.passed_over}, []
        for path in sorted(self.folder.glob("*.safetensors")):
            ids = self.read_ids(path) if path not in known else None
            if ids is not None:
                fresh.append((len(self.shards), ids))
                self.shards.append(path)
            elif path not in known:
                self.passed_over[path] = None
        if fresh:
            self.index.add(fresh)

    def read_ids(self, path: Path) -> np.ndarray | None:
        """A shard's ids (n, 16) uint8; None if the file is no shard of this store."""
        if not path.is_file():  # a FIFO would be waited for
            return None
        try:
            with safe_open(str(path), framework="np") as shard:
                parts = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118, no mapping
                found = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
                count = found["ids"][1][:1] if "ids" in found else []
                wanted = {"ids": ("U8", [*count, 16]), "features": ("F16", [*count, *self.shape])}
                return shard.get_tensor("ids") if found == wanted else None
        except (SafetensorError, OSError):
            return None

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The place of each id (n, 16) uint8, -1 where there is none. (n,) int64. Every shard that is asked for the
        first time is compared with its digest, and passed over if it is not what was written."""
        while True:
            places = self.index.find(ids)
            fresh = {*(places[places >= 0] >> 32).tolist()} - self.checked
            if not fresh:
                return places
            for number in tqdm(sorted(fresh), desc="check of the features", unit="file", leave=False):
                self.checked.add(number)
                if not self.is_sound(self.shards[number]):
                    self.passed_over[self.shards[number]] = None
                    self.index.drop(number)

    def is_sound(self, path: Path) -> bool:
        """Whether a shard's content has the digest in its header; those of older versions have none."""
        try:
            with safe_open(str(path), framework="np") as shard:
                digest = (shard.metadata() or {}).get("digest")
                tensors = [shard.get_tensor(name) for name in ("ids", "features")]
        except (SafetensorError, OSError):
            return False
        return digest is None or digest == content_digest(*tensors)

    def read(self, place: int) -> torch.Tensor:
        """The features at a place, fp16 [1 + N, D]."""
        number, row = int(place) >> 32, int(place) & 0xFFFFFFFF
        if number not in self.handles:
            self.handles[number] = safe_open(str(self.shards[number]), framework="pt").get_slice("features")
        return self.handles[number][row]

    def write(self, ids: np.ndarray, features: list[torch.Tensor]) -> None:
        """One shard: ids (n, 16) uint8 and as many features."""
        tensors = {"features": torch.stack(features).contiguous(), "ids": torch.from_numpy(ids)}
        path = self.folder / f"{time.time_ns()}-{os.getpid()}.safetensors"
        header = {"digest": content_digest(ids, tensors["features"].numpy())}
        replace_file(path, lambda p: save_file(tensors, str(p), metadata=header))


@dataclass(frozen=True)
class CachedFeatures:
    """The features of one split's samples, by their place in it."""

    store: FeatureStore
    places: np.ndarray  # (n,)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.store.read(self.places[index])


def cacheable(model: VideoModel, config: Config) -> bool:
    """Whether features can be computed once: the vision backbone is frozen, and clips are not changed at random."""
    return model.vision_encoder.frozen and config.augment == "none" and not config.flip


def use_cache(model: VideoModel, config: Config) -> bool:
    """Whether this run reads features. Raises UserError if that was asked for and cannot be."""
    if config.cache_features == "True" and not cacheable(model, config):
        raise UserError(
            "--cache_features True needs --freeze_visionbackbone True without LoRA in it, --augment none and --flip False"
        )
    return config.cache_features != "False" and cacheable(model, config)


def open_store(model: VideoModel, config: Config) -> FeatureStore:
    """The store for a model's vision backbone and a resolved config's frames."""
    about = {
        "backbone": model.sources["vision"].path,
        "fingerprint": model.sources["vision"].fingerprint,
        "preprocessing": asdict(model.vision_encoder.preprocessing),
        "format": 1,
    } | {name: getattr(config, name) for name in options_with("in_feature_key")}
    told = {name: value for name, value in about.items() if name != "backbone"}  # the same weights may lie elsewhere
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(config.output_dir) / ".features" if config.cache_dir == "auto" else Path(config.cache_dir)
    encoder = model.vision_encoder
    return FeatureStore(folder / key, about, (1 + encoder.num_tokens(config.token_grid), encoder.config.hidden_size))


def cached_splits(config: Config) -> tuple[str, ...]:
    """Which splits are read from features: not a test with several views."""
    return ("train", "val", "test") if (config.test_clips, config.test_crops) == (1, 1) else ("train", "val")


def read_features(store: FeatureStore, splits: Splits, config: Config) -> dict[str, CachedFeatures]:
    """The features of the splits that are read from them. Raises UserError unless all of them are in the store."""
    samples = {name: getattr(splits, name) for name in cached_splits(config)}
    places = {name: store.find(video_ids(s)) for name, s in samples.items() if s}
    if any((found < 0).any() for found in places.values()):
        raise UserError(f"features in {store.folder} were removed or damaged while this run began; start it again")
    return {name: CachedFeatures(store, found) for name, found in places.items()}


def compute_missing(
    store: FeatureStore, model: VideoModel, splits: Splits, config: Config, accelerator: Any
) -> dict[Path, str]:
    """Computes the features that the store lacks; returns what is wrong with each video that cannot be read.

    Raises UserError if a feature is too large for fp16. With several processes each computes its share.
    """
    samples = list({s.path: s for name in cached_splits(config) for s in getattr(splits, name)}.values())
    ids = video_ids(samples)
    lacking = np.flatnonzero(store.find(ids) < 0)
    encoder = model.vision_encoder
    rows, width = store.shape
    if store.passed_over:
        print(
            f"feature cache: passed over {len(store.passed_over)} damaged or foreign files, first "
            f"{printable(next(iter(store.passed_over)))}; videos that only they hold are computed again"
        )
    print(
        f"feature cache: {len(samples) - len(lacking)} of {len(samples)} videos are in {store.folder}; "
        f"{rows} x {width} numbers each, {2 * rows * width * len(samples) / 1e6:.1f} MB in all"
    )
    mine = lacking[accelerator.process_index :: accelerator.num_processes]
    bad = extract_features(encoder, [samples[i] for i in mine], ids[mine], store, config, accelerator)
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        bad = dict(gather_object(list(bad.items())))
    accelerator.wait_for_everyone()
    store.refresh()
    return bad


@torch.no_grad()
def extract_features(
    encoder: VisionEncoder,
    samples: list[Sample],
    ids: np.ndarray,
    store: FeatureStore,
    config: Config,
    accelerator: Any,
) -> dict[Path, str]:
    """Computes and stores features, shard by shard; returns what is wrong with the unreadable videos."""
    encoder.to(accelerator.device).eval()
    dataset = ClipDataset(samples, encoder.preprocessing, config.num_frames, config.frame_stride, [])
    workers = config.num_workers if len(samples) > SHARD else 0
    loader = build_loader(dataset, stack_clips, workers, EpochBatches(dataset, config.batch_size))
    bad: dict[Path, str] = {}
    shard: list[tuple[int, torch.Tensor]] = []

    def flush() -> None:
        if shard:
            store.write(ids[[index for index, _ in shard]], [features for _, features in shard])
            shard.clear()

    with tqdm(total=len(samples), desc="features", unit="video", leave=False, disable=not samples) as bar:
        for batch, errors in loader.with_errors():
            bad |= {samples[index].path: cause for index, cause in errors.items()}
            if batch is not None:
                features = features_of(encoder, batch["video"], config.token_grid, accelerator)
                shard += zip(batch["index"].tolist(), features, strict=True)
            bar.update(len(errors) + (len(batch["index"]) if batch is not None else 0))
            if len(shard) >= SHARD:
                flush()
    flush()
    loader.close()
    return bad


def stack_clips(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    indices = torch.tensor([item["index"] for item in items])
    return {"video": torch.stack([item["video"] for item in items]), "index": indices}


def features_of(encoder: VisionEncoder, pixel_values: torch.Tensor, grid: int, accelerator: Any) -> torch.Tensor:
    """fp16 features (B, 1 + N, D) of uint8 (B, T, C, H, W), on the CPU."""
    with accelerator.autocast():
        features = encoder.features(pixel_values.to(accelerator.device, non_blocking=True), grid)
    features = features.half().cpu()
    if not torch.isfinite(features).all():
        raise UserError("features of this backbone are too large for 16 bits: add --cache_features False")
    return features
