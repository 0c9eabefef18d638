"""Computes the features of a frozen vision backbone once per video, for all epochs and all later runs.

    <cache_dir>/<key>/<name>.safetensors       a shard: features (n, 1 + N, D) fp16 and ids (n, 16) of n videos
                      about.json               what the key stands for

The key is a hash of the backbone's fingerprint, the layer unless it is the last, the preprocessing, the sampled frames,
and token_grid. The id of a video is the digest of its content; that of a segment depends on its times too. So moved or
copied videos still hit the cache, and a changed video or another backbone never does. Shards are written atomically, so
a killed extraction resumes after its last shard. Each contains a digest of its ids and features, which is checked
before a run uses them. Files are only added: several runs may write at the same time, and the folder may be deleted at
any time.

A row number combines two numbers: shard * 2^32 + the row in that shard.

python feature_cache.py info                                   what is in a cache
python feature_cache.py pack --data_dir my_clips --output P    features and metadata of a dataset in one file
python feature_cache.py merge P --data_dir my_features         adds a pack or another cache; writes the metadata
python feature_cache.py verify                                 compares every shard with its digest
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from build_model import VideoModel
from config import Config, options_with
from extras.shards import is_there
from readers import digest
from script import (
    Parser,
    UserError,
    counted,
    leave,
    make_folder,
    printable,
    remove_leftovers,
    replace_file,
    script,
    write_rows,
)
from transforms import Preprocessing, sample_indices
from vision import VisionEncoder
from VLoader import (
    SPLITS,
    ClipDataset,
    EpochBatches,
    Key,
    Sample,
    Splits,
    build_loader,
    distinct,
    read_folder,
    read_metadata,
)

SHARD = 256  # videos per file
ABOUT = "about.json"
# the files of a pack: those of a cache, and those of a data folder without its videos
PACKED = re.compile(
    r"features/([0-9a-f]{16})/(about\.json|[\w-]+\.safetensors)|"
    r"data/((train|val|test)/metadata\.jsonl|classes\.json|lexicon\.json)"
)


def video_ids(samples: list[Sample]) -> np.ndarray:
    """The digests of videos, (n, 16) uint8. Raises ReadError if one has to be computed and the video is unreadable."""
    return np.frombuffer(bytearray.fromhex("".join(s.identity for s in samples)), np.uint8).reshape(-1, 16)


def content_digest(*tensors: np.ndarray) -> str:
    """The digest of a shard with these tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(np.ascontiguousarray(tensor))
    return digest.hexdigest()


class FeatureIndex:
    """Maps ids to row numbers in three sorted arrays. They take 24 bytes per video; a dict would take six times that,
    which matters for ten million videos."""

    def __init__(self) -> None:
        self.low, self.high = np.empty(0, np.uint64), np.empty(0, np.uint64)  # the halves of each id
        self.rows = np.empty(0, np.int64)

    def add(self, shards: list[tuple[int, np.ndarray]]) -> None:
        """Adds several shards: (number of the shard, its ids (n, 16) uint8)."""
        halves = [np.ascontiguousarray(ids).view(np.uint64).reshape(-1, 2) for _, ids in shards]  # (n, 2)
        rows = [(number << 32) + np.arange(len(ids), dtype=np.int64) for number, ids in shards]
        low = np.concatenate([self.low, *(h[:, 0] for h in halves)])
        high = np.concatenate([self.high, *(h[:, 1] for h in halves)])
        order = np.argsort(low, kind="stable")  # ids are digests: two equal low halves do not occur in practice
        self.low, self.high = low[order], high[order]
        self.rows = np.concatenate([self.rows, *rows])[order]

    def drop(self, number: int) -> None:
        """Removes the videos of a shard."""
        kept = self.rows >> 32 != number
        self.low, self.high, self.rows = self.low[kept], self.high[kept], self.rows[kept]

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The row number of each id (n, 16) uint8, -1 if it is not there. (n,) int64"""
        if not len(self.low) or not len(ids):
            return np.full(len(ids), -1, np.int64)
        halves = np.ascontiguousarray(ids).view(np.uint64).reshape(-1, 2)
        at = np.searchsorted(self.low, halves[:, 0]).clip(max=len(self.low) - 1)
        same = (self.low[at] == halves[:, 0]) & (self.high[at] == halves[:, 1])
        return np.where(same, self.rows[at], -1)


class ShardStore:
    """The folder of one key: shards of several videos, which all have an array of `shape`.

    Raises UserError if the folder cannot be created or a shard cannot be written.
    """

    noun: str  # what is stored
    tensors: tuple[str, ...]  # of a shard, ids first

    def __init__(self, folder: Path, description: dict[str, Any], shape: tuple[int, int]):
        # the folder may be new, or a killed run may have left temporary files in it
        self.folder, self.shape = folder, shape
        make_folder(folder)
        remove_leftovers(folder)
        if not (folder / ABOUT).is_file():  # for people who wonder what a folder is for
            text = json.dumps(description, indent=1) + "\n"
            replace_file(folder / ABOUT, lambda p: p.write_text(text, encoding="utf-8"))
        self.index = FeatureIndex()
        self.shards: list[Path] = []
        self.checked: set[int] = set()  # shards whose digest was checked
        self.ignored: dict[Path, None] = {}  # files that are damaged or no shards of this store; a dict keeps the order
        self.handles: dict[int, Any] = {}  # opened on first use, so that each worker process has its own
        self.refresh()

    def refresh(self) -> None:
        """Adds the ids of shards that were written since the last call. Files that are no shards are ignored."""
        added = []
        for path in sorted({*self.folder.glob("*.safetensors")} - {*self.shards, *self.ignored}):
            ids = self.read_ids(path)
            if ids is None:
                self.ignored[path] = None
            else:
                added.append((len(self.shards), ids))
                self.shards.append(path)
        if added:
            self.index.add(added)

    def read_ids(self, path: Path) -> np.ndarray | None:
        """The ids of a shard, (n, 16) uint8. None if the file is damaged or has tensors of other shapes."""
        if not path.is_file():  # reading a FIFO would block
            return None
        try:
            with safe_open(str(path), framework="np") as shard:
                parts = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118, not a dict
                actual = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
                expected = self.layout({name: shape for name, (_, shape) in actual.items()})
                return shard.get_tensor("ids") if actual == expected else None
        except (SafetensorError, OSError):
            return None

    def layout(self, shapes: dict[str, list[int]]) -> dict[str, tuple[str, list[int]]]:
        """The {tensor: (type, shape)} that a shard must have if its tensors have these shapes."""
        raise NotImplementedError

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The row number of each id (n, 16) uint8, -1 if it is not stored. (n,) int64

        Checks the digest of every shard on first use. A damaged shard is ignored from then on.
        """
        # look up again after dropping a shard: another one may contain the same video
        while True:
            rows = self.index.find(ids)
            unchecked = {*np.unique(rows[rows >= 0] >> 32).tolist()} - self.checked
            if not unchecked:
                return rows
            for number in tqdm(sorted(unchecked), desc=f"checking {self.noun}", unit="file", leave=False):
                self.checked.add(number)
                if not self.is_intact(self.shards[number]):
                    self.ignored[self.shards[number]] = None
                    self.index.drop(number)

    def is_intact(self, path: Path) -> bool:
        """Whether the content of a shard matches the digest in its header. Shards of older versions have no digest."""
        try:
            with safe_open(str(path), framework="np") as shard:
                digest = (shard.metadata() or {}).get("digest")
                tensors = [shard.get_tensor(name) for name in self.tensors]
        except (SafetensorError, OSError):
            return False
        return digest is None or digest == content_digest(*tensors)

    def write_shard(self, tensors: dict[str, torch.Tensor]) -> None:
        """Writes a new shard with these tensors."""
        # named after its videos: should two processes compute the same ones, only one shard remains
        ids = tensors["ids"].numpy()
        name = hashlib.blake2b(np.ascontiguousarray(ids), digest_size=16).hexdigest()
        path = self.folder / f"{name}.safetensors"
        if path in self.ignored:  # it is damaged, and other processes may know it as such
            path = self.folder / f"{name}-{time.time_ns()}.safetensors"
        header = {"digest": content_digest(*(tensors[name].numpy() for name in self.tensors))}
        replace_file(path, lambda p: save_file(tensors, str(p), metadata=header))


class FeatureStore(ShardStore):
    """The features of one backbone with one way to sample frames, of `shape` (1 + N, D) per video."""

    noun = "features"
    tensors = ("ids", "features")

    def layout(self, shapes: dict[str, list[int]]) -> dict[str, tuple[str, list[int]]]:
        count = shapes.get("ids", [])[:1]
        return {"ids": ("U8", [*count, 16]), "features": ("F16", [*count, *self.shape])}

    def read(self, number: int) -> torch.Tensor:
        """The features with this row number, fp16 [1 + N, D]."""
        shard, row = int(number) >> 32, int(number) & 0xFFFFFFFF
        if shard not in self.handles:
            self.handles[shard] = safe_open(str(self.shards[shard]), framework="np").get_slice("features")
        return torch.from_numpy(self.handles[shard][row])  # a third of the time that framework="pt" takes

    def write(self, ids: np.ndarray, features: list[torch.Tensor]) -> None:
        """Writes a new shard: ids (n, 16) uint8 and n features [1 + N, D]."""
        self.write_shard({"features": torch.stack(features).contiguous(), "ids": torch.from_numpy(ids)})


@dataclass(frozen=True)
class CachedFeatures:
    """The features of a split: item i belongs to sample i."""

    store: FeatureStore
    rows: np.ndarray  # (n,) row numbers

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.store.read(self.rows[index])


def cacheable(model: VideoModel, config: Config) -> bool:
    """Whether features stay the same in every epoch: the vision backbone is frozen and clips are not augmented."""
    return model.vision_encoder.frozen and config.augment == "none" and not config.flip


def use_cache(model: VideoModel, config: Config) -> bool:
    """Whether this run uses cached features. Raises UserError for --cache_features True if it cannot."""
    if config.cache_features == "True" and not cacheable(model, config):
        raise UserError(
            "--cache_features True needs --freeze_visionbackbone True without LoRA, --augment none and --flip False"
        )
    return config.cache_features != "False" and cacheable(model, config)


def open_store(model: VideoModel, config: Config, accelerator: Any) -> FeatureStore:
    """The store of a model's vision backbone, which is made if it does not exist. The options of `config` must be
    without `auto`, except those that the accelerator has resolved."""
    encoder = model.vision_encoder
    shape = 1 + encoder.num_tokens(config.token_grid), encoder.config.hidden_size
    return FeatureStore(*place_of_store(model, config, accelerator), shape)


def place_of_store(model: VideoModel, config: Config, accelerator: Any) -> tuple[Path, dict[str, Any]]:
    """(the folder of a model's store, which may not exist; what its about.json says)."""
    description = {
        "backbone": model.sources["vision"].path,
        "fingerprint": model.sources["vision"].fingerprint,
        "preprocessing": asdict(model.vision_encoder.preprocessing),
        # the frames taken from a short and a long video, not just the options: sampling may change too
        "frames": [sample_indices(n, config.num_frames, config.frame_stride).tolist() for n in (10, 1000)],
        "format": 1,  # raise it when the same frames and options give other features
    } | {name: getattr(config, name) for name in options_with("in_feature_key")}
    if accelerator.mixed_precision != "no":
        description["mixed_precision"] = accelerator.mixed_precision  # not the option's value, which may be auto
    if model.vision_encoder.layer < model.vision_encoder.depth:
        description["vision_layer"] = model.vision_encoder.layer
    return cache_folder(config) / key_of(description), description


def cache_folder(config: Config) -> Path:
    """The folder of all stores."""
    return Path(config.output_dir) / ".features" if config.cache_dir == "auto" else Path(config.cache_dir)


def key_of(description: dict[str, Any]) -> str:
    """The key for what about.json says."""
    # leave out the path: the same weights may be stored elsewhere
    hashed = {name: value for name, value in description.items() if name != "backbone"}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]


def cached_splits(config: Config) -> tuple[str, ...]:
    """The splits that use cached features. test does not if it averages several views, because one is cached."""
    return SPLITS if (config.test_clips, config.test_crops) == (1, 1) else ("train", "val")


def read_features(store: FeatureStore, splits: Splits, config: Config) -> dict[str, CachedFeatures]:
    """{split: its features}. Raises UserError if some are not in the store."""
    samples = {name: getattr(splits, name) for name in cached_splits(config)}
    rows = {name: store.find(video_ids(s)) for name, s in samples.items() if s}
    if any((numbers < 0).any() for numbers in rows.values()):
        raise UserError(f"features in {store.folder} were removed or damaged while this run started; start it again")
    return {name: CachedFeatures(store, numbers) for name, numbers in rows.items()}


def compute_missing(
    store: FeatureStore, model: VideoModel, splits: Splits, config: Config, accelerator: Any
) -> dict[Key, str]:
    """Computes the features that are not in the store yet. Returns {key: error} of the unreadable samples.

    With several processes each computes a part. Raises UserError if a feature is too large for fp16.
    """
    # a video may be in several splits
    samples = distinct(s for name in cached_splits(config) for s in getattr(splits, name))
    ids = video_ids(samples)
    missing = np.flatnonzero(store.find(ids) < 0)

    # say what is reused and how much disk space the cache takes
    tokens, width = store.shape
    if store.ignored:
        print(
            f"feature cache: ignored {counted(len(store.ignored), 'damaged or foreign file')}, for example "
            f"{printable(next(iter(store.ignored)))}; features that were only there are computed again"
        )
    print(
        f"feature cache: {len(samples) - len(missing)} of {counted(len(samples), 'video')} in {store.folder}; "
        f"{tokens} x {width} numbers each, {2 * tokens * width * len(samples) / 1e6:.1f} MB in total"
    )

    if absent := [samples[i].path for i in missing if not is_there(samples[i].path)]:
        raise UserError(
            f"{counted(len(absent), 'video')} not found, first {absent[0]}, and {store.folder} has no features of them; "
            f"features depend on backbone, layer, frames, --token_grid and --mixed_precision: see python "
            f"feature_cache.py info {store.folder.parent}"
        )

    # every process writes shards of its own, then reads those of the others
    part = missing[accelerator.process_index :: accelerator.num_processes]
    bad = extract_features(model.vision_encoder, [samples[i] for i in part], ids[part], store, config, accelerator)
    return from_all(bad, store, accelerator)


def from_all(bad: dict[Key, str], store: ShardStore, accelerator: Any) -> dict[Key, str]:
    """Waits for the other processes and makes the shards of all of them known to `store`. Returns the unreadable
    samples of all, {key: error}; each process knows only those of its part."""
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        bad = dict(gather_object(list(bad.items())))
    accelerator.wait_for_everyone()
    store.refresh()
    return bad


def extract_features(
    encoder: VisionEncoder,
    samples: list[Sample],
    ids: np.ndarray,
    store: FeatureStore,
    config: Config,
    accelerator: Any,
) -> dict[Key, str]:
    """Computes and stores features, shard by shard. Returns {key: error} of the unreadable samples."""
    bad: dict[Key, str] = {}
    shard: list[tuple[int, torch.Tensor]] = []  # (index of the sample, its features)

    # after every shard, so that a killed run loses little
    def flush() -> None:
        """Writes the features computed since the last call."""
        if shard:
            store.write(ids[[index for index, _ in shard]], [features for _, features in shard])
            shard.clear()

    with tqdm(total=len(samples), desc="features", unit="video", leave=False, disable=not samples) as bar:
        for features, errors in computed_features(encoder, samples, config, accelerator):
            bad |= {samples[index].key: error for index, error in errors.items()}
            shard += features
            bar.update(len(errors) + len(features))
            if len(shard) >= SHARD:
                flush()
    flush()
    return bad


@torch.no_grad()
def computed_features(
    encoder: VisionEncoder, samples: list[Sample], config: Config, accelerator: Any
) -> Iterator[tuple[list[tuple[int, torch.Tensor]], dict[int, str]]]:
    """Computes features batch by batch: yields ([(index of the sample, its features fp16 [1 + N, D])], {index: error}
    of the unreadable samples)."""
    # for less than a shard of videos, starting worker processes takes longer than decoding
    encoder.to(accelerator.device).eval()
    workers = config.num_workers if len(samples) >= SHARD else 0
    with closing(decoded_batches(encoder.preprocessing, samples, config, workers)) as batches:
        for batch, errors in batches:
            features = []
            if batch is not None:  # a batch without readable videos is None
                computed = features_of(encoder, batch["video"], config.token_grid, accelerator)  # (B, 1 + N, D)
                features = [*zip(batch["index"].tolist(), computed, strict=True)]
            yield features, errors


def decoded_batches(
    preprocessing: Preprocessing, samples: list[Sample], config: Config, workers: int
) -> Iterator[tuple[dict[str, torch.Tensor] | None, dict[int, str]]]:
    """Reads clips batch by batch: yields (a batch as stack_clips() makes it, or None without any readable video,
    {index: error} of the unreadable samples)."""
    dataset = ClipDataset(samples, preprocessing, config.num_frames, config.frame_stride, [])
    loader = build_loader(dataset, stack_clips, workers, EpochBatches(dataset, config.batch_size))
    try:
        yield from loader.with_errors()
    finally:
        loader.close()


def stack_clips(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch: `video` uint8 (B, T, C, H, W) and `index` (B,) of the samples."""
    indices = torch.tensor([item["index"] for item in items])
    return {"video": torch.stack([item["video"] for item in items]), "index": indices}


def features_of(encoder: VisionEncoder, pixel_values: torch.Tensor, grid: int, accelerator: Any) -> torch.Tensor:
    """fp16 features (B, 1 + N, D) on the CPU, from uint8 clips (B, T, C, H, W). Raises UserError if they overflow."""
    with accelerator.autocast():
        features = encoder.features(pixel_values.to(accelerator.device, non_blocking=True), grid)
    # fp16 halves the size of the cache; its largest number is 65504
    features = features.half().cpu()
    if not torch.isfinite(features).all():
        raise UserError("the features of this backbone are too large for 16 bits: add --cache_features False")
    return features


# -- caches that travel -----------------------------------------------------------------------------


@contextmanager
def opened(pack: Path) -> Generator[zipfile.ZipFile]:
    """A pack for reading. Raises UserError if it is not one, or damaged."""
    try:
        with zipfile.ZipFile(pack) as archive:
            # no names but ours, and nothing compressed, which might fill the disk
            files = archive.infolist()
            foreign = [f for f in files if not PACKED.fullmatch(f.filename) or f.compress_type != zipfile.ZIP_STORED]
            if foreign:
                raise UserError(f"{pack} is not a pack of features: it contains {foreign[0].filename}")
            yield archive
    except (OSError, KeyError, RuntimeError, zipfile.BadZipFile) as error:  # a missing file, an encrypted one
        raise UserError(f"cannot read {pack}: {error}") from None


def shards_of(source: Path) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """Yields (key, what about.json says, file) for every shard of a cache or a pack. The files of a pack are copied,
    and removed before the next one."""
    if source.is_dir():
        for folder in sorted(path.parent for path in source.glob(f"*/{ABOUT}")):
            about = parse_about((folder / ABOUT).read_bytes(), folder)
            yield from ((folder.name, about, path) for path in sorted(folder.glob("*.safetensors")))
        return
    with opened(source) as archive, tempfile.TemporaryDirectory() as scratch:
        for name in sorted(archive.namelist()):
            if not name.endswith(".safetensors"):
                continue
            key = name.split("/")[1]
            path = Path(scratch) / Path(name).name
            with archive.open(name) as packed, path.open("wb") as copy:
                shutil.copyfileobj(packed, copy)
            yield key, parse_about(archive.read(f"features/{key}/{ABOUT}"), source), path
            path.unlink()


def parse_about(text: bytes, where: Path) -> dict[str, Any]:
    """What an about.json says. Raises UserError."""
    try:
        about = json.loads(text)
        key_of(about)
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{where}: {ABOUT} is damaged") from None
    return about


def shape_of(path: Path) -> tuple[int, int, int]:
    """The number of videos in a shard and the shape of their features, (n, 1 + N, D); zeros if it is damaged."""
    if not path.is_file():  # reading a FIFO would block
        return 0, 0, 0
    try:
        with safe_open(str(path), framework="np") as shard:
            n, tokens, width = shard.get_slice("features").get_shape()
            return n, tokens, width
    except (SafetensorError, OSError, ValueError):
        return 0, 0, 0


def checked_shards(source: Path, target: Path) -> Iterator[tuple[Any, np.ndarray | None, Path]]:
    """Yields for every shard of a cache or pack (the store of the same key in `target`, its ids (n, 16) uint8, file).
    The ids are None if the shard is damaged."""
    stores: dict[str, FeatureStore] = {}
    for key, about, path in shards_of(source):
        n, *shape = shape_of(path)
        if key not in stores and n and key_of(about) == key:
            stores[key] = FeatureStore(target / key, about, tuple(shape))
        store = stores.get(key)
        ids = store.read_ids(path) if store is not None else None
        yield store, ids if ids is not None and store.is_intact(path) else None, path


def pack(args: argparse.Namespace) -> int:
    """Writes the features of a data folder and its metadata into one file."""
    # the digests of all videos, and from them the ids of what they show
    data, digests, splits = Path(args.data_dir), {}, {}
    for name in (n for n in SPLITS if (data / n).is_dir()):
        splits[name] = read_folder(data / name)
        for sample in tqdm(splits[name], desc=f"digests of {name}", unit="video", leave=False):
            digests.setdefault(sample.path, sample.digest or digest(sample.path))
    samples = [replace(s, digest=digests[s.path]) for part in splits.values() for s in distinct(part)]
    if not samples:
        raise UserError(f"{data} has neither train/ nor val/ nor test/")
    ids = np.unique(video_ids(samples), axis=0)

    # every store that has the features of all of them
    stores = {}
    for folder in sorted(path.parent for path in Path(args.cache_dir).glob(f"*/{ABOUT}")):
        store = open_folder(folder)
        found = store.find(ids)
        print(
            f"{folder}: features of {(found >= 0).sum()} of {counted(len(ids), 'video or segment', 'videos and segments')}"
        )
        if (found >= 0).all():
            stores[store] = found
    if not stores:
        raise UserError(f"no folder of {args.cache_dir} has the features of all videos: compute them with extract.py")

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, part in splits.items():
                write_rows([*rows_of(data / name, part, digests)], path.parent / "rows")
                add(archive, f"data/{name}/metadata.jsonl", path.parent / "rows")
            for name in ("classes.json", "lexicon.json"):
                if (data / name).is_file():
                    add(archive, f"data/{name}", data / name)
            for store, numbers in stores.items():
                pack_store(archive, store, ids, numbers, path.parent)

    output = Path(args.output)
    replace_file(output, write)
    print(printable(f"wrote {output}: {output.stat().st_size / 1e6:.1f} MB"))
    return 0


def open_folder(folder: Path) -> FeatureStore:
    """The store in an existing folder of a cache."""
    shapes = (shape_of(path)[1:] for path in sorted(folder.glob("*.safetensors")))
    shape = next((shape for shape in shapes if any(shape)), (0, 0))
    return FeatureStore(folder, parse_about((folder / ABOUT).read_bytes(), folder), shape)


def rows_of(folder: Path, samples: list[Sample], digests: dict[Path, str]) -> Iterator[dict[str, Any]]:
    """The rows of metadata.jsonl for a split: those it has, or one for each video, with the digests of the videos."""
    paths = [*dict.fromkeys(sample.path for sample in samples)]
    rows = read_metadata(folder, videos=paths)
    for path in paths:
        default = {"file_name": Path(os.path.relpath(path, folder)).as_posix()}
        yield from (row | {"video_digest": digests[path]} for row in rows.get(path, [default]))


def pack_store(
    archive: zipfile.ZipFile, store: FeatureStore, ids: np.ndarray, numbers: np.ndarray, scratch: Path
) -> None:
    """Adds to a pack the features of the videos `ids` (n, 16), which have these row numbers (n,) in the store."""
    key = store.folder.name
    copy = FeatureStore(scratch / key, parse_about((store.folder / ABOUT).read_bytes(), store.folder), store.shape)
    add(archive, f"features/{key}/{ABOUT}", copy.folder / ABOUT)
    order = np.argsort(numbers)  # shard by shard
    for first in tqdm(range(0, len(ids), SHARD), desc=f"packing {key}", unit="shard", leave=False):
        part = order[first : first + SHARD]
        copy.write(ids[part], [store.read(number) for number in numbers[part]])
        (path,) = copy.folder.glob("*.safetensors")
        add(archive, f"features/{key}/{path.name}", path)
        path.unlink()


def add(archive: zipfile.ZipFile, name: str, file: Path) -> None:
    """Adds a file to a pack, not compressed, and without its time, so that equal packs are equal files."""
    with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as packed, file.open("rb") as content:
        shutil.copyfileobj(content, packed)


def merge(args: argparse.Namespace) -> int:
    """Adds the features of a pack or of another cache; with --data_dir also writes the metadata of a pack. Returns 1 if
    shards were damaged, which are left out."""
    source, added, damaged = Path(args.source), 0, []
    data = None if args.data_dir is None else Path(args.data_dir)
    if data is not None and (source.is_dir() or data.exists()):
        problem = "exists already" if data.exists() else f"needs a pack, and {source} is a cache"
        raise UserError(f"--data_dir {data} {problem}")
    for store, ids, path in checked_shards(source, Path(args.cache_dir)):
        if ids is None:
            damaged.append(path.name)
            continue
        new = store.find(ids) < 0
        if new.any():
            with safe_open(str(path), framework="pt") as shard:
                features = shard.get_tensor("features")[torch.from_numpy(new)]
            store.write(ids[new], [*features])
            added += int(new.sum())

    # the metadata last: when it is there, all features are
    if data is not None:
        with opened(source) as archive:
            for name in (n for n in archive.namelist() if n.startswith("data/")):
                file = data / name.removeprefix("data/")
                make_folder(file.parent)
                replace_file(file, lambda p, name=name: p.write_bytes(archive.read(name)))
        print(printable(f"wrote {data}: train with --data_dir {data} --cache_dir {args.cache_dir}"))
    print(printable(f"added features of {counted(added, 'video')} to {args.cache_dir}"))
    return report_damaged(damaged, source)


def report_damaged(damaged: list[str], source: Path) -> int:
    """Prints which shards are damaged; returns 1 if there are any."""
    for name in damaged:
        print(printable(f"damaged: {name} in {source}"))
    return int(bool(damaged))


def verify(args: argparse.Namespace) -> int:
    """Compares every shard with its digest; names damaged ones and returns 1 if there are any."""
    source, damaged, intact = Path(args.source), [], 0
    with tempfile.TemporaryDirectory() as empty:
        shards = checked_shards(source, Path(empty))
        for _, ids, path in tqdm(shards, desc="checking features", unit="file", leave=False):
            if ids is None:
                damaged.append(path.name)
            else:
                intact += len(ids)
    print(printable(f"{source}: features of {counted(intact, 'video')} are intact"))
    return report_damaged(damaged, source)


def info(args: argparse.Namespace) -> int:
    """Prints what every folder of a cache or pack is for, and how much is in it."""
    counts: dict[str, Counter[str]] = {}
    abouts: dict[str, dict[str, Any]] = {}
    for key, about, path in shards_of(Path(args.source)):
        n, tokens, width = shape_of(path)
        abouts[key] = (
            {"vision_layer": "the last", "mixed_precision": "no"} | about | {"features": f"{tokens} x {width}"}
        )
        counts.setdefault(key, Counter()).update(videos=n, shards=1, bytes=path.stat().st_size)
    for key, about in abouts.items():
        count = counts[key]
        print(
            f"{key}: {counted(count['videos'], 'video')}, {counted(count['shards'], 'shard')}, {count['bytes'] / 1e6:.1f} MB"
        )
        for name in ("backbone", "vision_layer", "features", "mixed_precision", *options_with("in_feature_key")):
            print(printable(f"    {name}: {about.get(name)}"))
    if not abouts:
        print(printable(f"no features in {args.source}"))

    # what extras/frame_store.py keeps beside them
    for folder in sorted(Path(args.source).glob(f"frames/*/{ABOUT}")):
        sizes = [path.stat().st_size for path in folder.parent.glob("*.safetensors")]
        print(
            printable(f"frames of videos in {folder.parent}: {counted(len(sizes), 'shard')}, {sum(sizes) / 1e6:.1f} MB")
        )
    return 0


@script
def main(argv: list[str] | None = None) -> int:
    """Inspects, verifies, packs and merges caches; returns the exit status."""
    parser = Parser(prog="feature_cache.py", description="Inspect, verify, pack and merge feature caches.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, text in ((info, "what is in a cache or pack"), (verify, "check every shard of a cache or pack")):
        sub = commands.add_parser(command.__name__, help=text, description=command.__doc__)
        sub.add_argument("source", nargs="?", default="checkpoints/.features", help="default: %(default)s")
    packing = commands.add_parser("pack", help="one file for a dataset", description=pack.__doc__)
    packing.add_argument("--data_dir", required=True, help="the dataset")
    packing.add_argument("--output", required=True, help="the file to write")
    merging = commands.add_parser("merge", help="add a pack or another cache", description=merge.__doc__)
    merging.add_argument("source", help="a pack or the folder of another cache")
    merging.add_argument("--data_dir", help="new folder for the metadata of a pack: a dataset without videos")
    for sub in (packing, merging):
        sub.add_argument("--cache_dir", default="checkpoints/.features", help="default: %(default)s")
    args = parser.parse_args(argv)
    if "source" in args and not Path(args.source).exists():
        raise UserError(f"no such file or folder: {args.source}")
    return {"info": info, "pack": pack, "merge": merge, "verify": verify}[args.command](args)


if __name__ == "__main__":
    leave(main())
