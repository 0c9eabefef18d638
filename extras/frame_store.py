"""Keeps the frames that training takes from videos, so that they are decoded once and not in every epoch.

    <cache_dir>/frames/<key>/<name>.safetensors    a shard: the frames of n videos, resized, cropped, as JPEG files
                             about.json            what the key stands for

Where training would take a random frame of each slice of a video, or a random window, it takes one of three here. For
val, which is evaluated after every epoch, only the centred frames are kept. Every epoch reads what is stored, the first
one too, so that results do not depend on what the store held before. Augmentation comes later, on the device.

Final scores, and thresholds chosen on val, are about the videos as inference sees them, so for these val is decoded
again. test is decoded only for the final scores, and never stored.

The key is a hash of everything on which the frames depend: which are taken, size, interpolation, compression. Content,
digests and damage are treated as in feature_cache.py, and the folder may be deleted at any time.
"""

import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset
from tqdm import tqdm

from build_model import VideoModel
from config import Config
from feature_cache import SHARD, ShardStore, cache_folder, from_all, key_of, use_cache, video_ids
from readers import ReadError, is_video_file
from script import UserError, counted, printable
from transforms import sample_indices, window_stride
from VLoader import ClipDataset, Key, Sample, Splits, WorkerLoader, distinct

# where the stored frames lie in their slices, or the windows in the video; see sample_indices()
POSITIONS = {"train": (1 / 6, 1 / 2, 5 / 6), "val": (1 / 2,)}
# 4:4:4 keeps colours at full resolution: half of it would cost 3 dB, and 10 dB in clips with strong colours
COMPRESSION: dict[str, Any] = {"format": "JPEG", "quality": 90, "subsampling": "4:4:4"}
BATCH = 16  # videos per batch of a worker process


class StoredClip(NamedTuple):
    """The frames of one video."""

    available: int  # frames of the video or segment, of which these were taken
    places: np.ndarray  # first and last byte + 1 of each frame in `data`, int64 [P, T, 2]
    data: Any  # JPEG files, uint8 [bytes]; only slices of it are read


# -- one clip ---------------------------------------------------------------------------------------


def compressed(frame: torch.Tensor) -> bytes:
    """A frame uint8 [3, H, W] as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, **COMPRESSION)
    return file.getvalue()


def decompressed(data: bytes) -> np.ndarray:
    """The frame in a JPEG file, uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(data), formats=[COMPRESSION["format"]]) as image:
        return np.asarray(image)


def compress_clip(dataset: ClipDataset, sample: Sample, positions: tuple[float, ...]) -> StoredClip:
    """Decodes and compresses the frames of a sample at P positions. Raises ReadError."""
    reader = dataset.reader(sample)
    first, available = reader.part(sample.segment)
    indices = [sample_indices(available, dataset.num_frames, dataset.stride, position=p) for p in positions]

    # a short video, or windows that overlap, have the same frame several times
    unique, inverse = np.unique(indices, return_inverse=True)
    frames = reader.frames(first + unique, dataset.preprocessing.pixels)  # [n, C, H, W]
    files = [compressed(frame) for frame in frames]
    ends = np.cumsum([len(file) for file in files])
    places = np.stack([ends - [len(file) for file in files], ends], axis=1)[inverse]  # [P T, 2]
    data = np.frombuffer(b"".join(files), np.uint8)
    return StoredClip(available, places.reshape(len(positions), -1, 2), data)


def choose(clip: StoredClip, stride: int, rng: np.random.Generator | None) -> np.ndarray:
    """Picks one of the P stored positions for each frame; the frames of a window share one. Without `rng` it is the
    centred one. [T]"""
    positions, num_frames = clip.places.shape[:2]
    if rng is None:
        return np.full(num_frames, positions // 2)
    window = window_stride(clip.available, num_frames, stride) > 0
    return np.broadcast_to(rng.integers(positions, size=1 if window else num_frames), num_frames)


# -- the store --------------------------------------------------------------------------------------


class FrameStore(ShardStore):
    """The folder of one key: frames at P `positions`, T each."""

    noun = "frames"
    tensors = ("ids", "available", "places", "data")

    def __init__(self, folder: Path, description: dict[str, Any], positions: tuple[float, ...], num_frames: int):
        self.positions = positions
        super().__init__(folder, description, (len(positions), num_frames))

    def layout(self, shapes: dict[str, list[int]]) -> dict[str, tuple[str, list[int]]]:
        count, size = (shapes.get(name, [])[:1] for name in ("ids", "data"))
        places = ("I64", [*count, *self.shape, 2])
        return {"ids": ("U8", [*count, 16]), "available": ("I64", count), "places": places, "data": ("U8", size)}

    def write(self, ids: np.ndarray, clips: list[StoredClip]) -> None:
        """Writes a new shard: ids (n, 16) uint8 and n clips."""
        sizes = np.array([len(clip.data) for clip in clips])
        starts = np.cumsum(sizes) - sizes
        places = np.stack([clip.places + start for clip, start in zip(clips, starts, strict=True)])  # (n, P, T, 2)
        available = np.array([clip.available for clip in clips])
        data = np.concatenate([clip.data for clip in clips])
        tensors = {"ids": ids, "available": available, "places": places, "data": data}
        self.write_shard({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})

    def read(self, number: int) -> StoredClip:
        """The frames with this row number. Raises OSError or SafetensorError if the shard is gone."""
        shard, row = int(number) >> 32, int(number) & 0xFFFFFFFF
        if shard not in self.handles:
            opened = safe_open(str(self.shards[shard]), framework="np")
            self.handles[shard] = [opened.get_slice(name) for name in self.tensors[1:]]
        available, places, data = self.handles[shard]
        return StoredClip(int(available[row]), places[row], data)


@dataclass(frozen=True)
class StoredFrames:
    """The stored frames of a split: item i belongs to sample i."""

    store: FrameStore
    rows: np.ndarray  # (n,) row numbers

    def clip(self, dataset: ClipDataset, index: int, rng: np.random.Generator | None) -> torch.Tensor:
        """The clip of a sample, uint8 [T, C, H, W]; with `rng` a random one. Raises ReadError."""
        try:
            stored = self.store.read(self.rows[index])
        except (OSError, SafetensorError):  # deleted since the run started: the video gives the same bytes
            stored = compress_clip(dataset, dataset.samples[index], self.store.positions)
        chosen = stored.places[choose(stored, dataset.stride, rng), np.arange(dataset.num_frames)]  # [T, 2]
        frames = [decompressed(stored.data[start:end].tobytes()) for start, end in chosen.tolist()]
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()  # [T, C, H, W]


# -- before training --------------------------------------------------------------------------------


def stored_splits(splits: Splits, model: VideoModel, config: Config) -> tuple[str, ...]:
    """The splits that are read from a store in this run. Raises UserError for --preread True if it has no use."""
    if config.preread == "False" or not splits.train:
        return ()
    if use_cache(model, config):
        if config.preread == "True":
            raise UserError("--preread True is of no use with cached features: add --cache_features False")
        return ()
    if config.preread == "auto" and (config.epochs == 1 or not all(is_video_file(s.path) for s in splits.train)):
        return ()
    return tuple(POSITIONS)


def open_frames(model: VideoModel, config: Config, split: str) -> FrameStore:
    """The store for a split, which is made if it does not exist. The options of `config` must be without `auto`."""
    positions, preprocessing = POSITIONS[split], model.vision_encoder.preprocessing
    num_frames, stride = config.num_frames, config.frame_stride
    description = {
        # the frames taken from a short and a long video, not just the options: sampling may change too
        "frames": [[sample_indices(n, num_frames, stride, position=p).tolist() for p in positions] for n in (10, 1000)],
        "image_size": preprocessing.image_size,
        "resize": preprocessing.resize,
        "interpolation": preprocessing.interpolation,
        "num_frames": num_frames,
        "frame_stride": stride,
        "compression": COMPRESSION,
        "format": 1,  # raise it when the same options give other frames
    }
    return FrameStore(cache_folder(config) / "frames" / key_of(description), description, positions, num_frames)


def read_frames(stores: dict[str, FrameStore], splits: Splits) -> dict[str, StoredFrames]:
    """{split: its stored frames}. Raises UserError if some are not in the store."""
    frames = {}
    for name, store in stores.items():
        rows = store.find(video_ids(getattr(splits, name)))
        if (rows < 0).any():
            raise UserError(f"frames in {store.folder} were removed or damaged while this run started; start it again")
        frames[name] = StoredFrames(store, rows)
    return frames


def store_missing(
    store: FrameStore, samples: list[Sample], model: VideoModel, config: Config, accelerator: Any
) -> dict[Key, str]:
    """Stores the frames of samples that are not in the store yet. Returns {key: error} of the unreadable ones.

    With several processes each stores a part. Raises UserError if the disk has too little space.
    """
    samples = distinct(samples)  # a video may have several questions
    ids = video_ids(samples)
    missing = np.flatnonzero(store.find(ids) < 0)
    if store.ignored:
        print(
            f"frame store: ignored {counted(len(store.ignored), 'damaged or foreign file')}, for example "
            f"{printable(next(iter(store.ignored)))}; frames that were only there are stored again"
        )
    stored = len(samples) - len(missing)
    print(printable(f"frame store: {stored} of {counted(len(samples), 'video')} in {store.folder}"))

    # every process writes shards of its own, then reads those of the others
    part = missing[accelerator.process_index :: accelerator.num_processes]
    samples, ids = [samples[i] for i in part], ids[part]
    bad: dict[Key, str] = {}
    shard: list[tuple[int, StoredClip]] = []  # (index of the sample, its frames)

    def flush() -> None:
        """Writes the frames stored since the last call."""
        if shard:
            store.write(ids[[index for index, _ in shard]], [clip for _, clip in shard])
            shard.clear()

    dataset = ClipDataset(samples, model.vision_encoder.preprocessing, config.num_frames, config.frame_stride, [])
    announced = False
    with tqdm(total=len(samples), desc="storing frames", unit="video", leave=False, disable=not samples) as bar:
        for clips, errors in compressed_clips(dataset, store.positions, config.num_workers):
            bad |= {samples[index].key: error for index, error in errors.items()}
            shard += clips
            bar.update(len(clips) + len(errors))
            if clips and not announced:
                announce(store.folder, len(missing), sum(len(clip.data) for _, clip in clips) / len(clips))
                announced = True
            if len(shard) >= SHARD:
                flush()
    flush()
    return from_all(bad, store, accelerator)


def announce(folder: Path, count: int, size: float) -> None:
    """Prints how much disk space `count` videos of about `size` bytes take. Raises UserError if there is less."""
    free = shutil.disk_usage(folder).free
    tqdm.write(f"frame store: {counted(count, 'more video')}, about {count * size / 1e6:.1f} MB")
    if count * size > free:
        raise UserError(
            f"only {free / 1e6:.1f} MB are free in {folder}: choose another --cache_dir, or add --preread False"
        )


def compressed_clips(
    dataset: ClipDataset, positions: tuple[float, ...], num_workers: int
) -> Iterator[tuple[list[tuple[int, StoredClip]], dict[int, str]]]:
    """Compresses samples batch by batch: yields ([(index of the sample, its frames)], {index: error} of the unreadable
    ones)."""
    # for a few videos, starting worker processes takes longer than decoding
    jobs = CompressedClips(dataset, positions)
    workers = num_workers if len(jobs) > 64 else 0
    for batch in WorkerLoader(jobs, batch_size=BATCH, num_workers=workers, collate_fn=list):
        errors = {index: clip for index, clip in batch if isinstance(clip, str)}
        yield [item for item in batch if item[0] not in errors], errors


@dataclass
class CompressedClips(Dataset):
    """Item i is (i, the frames of sample i or the error)."""

    dataset: ClipDataset
    positions: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.dataset.samples)

    def __getitem__(self, index: int) -> tuple[int, StoredClip | str]:
        # an exception in a worker process would arrive as a traceback, so return the error
        try:
            return index, compress_clip(self.dataset, self.dataset.samples[index], self.positions)
        except ReadError as error:
            return index, str(error)
