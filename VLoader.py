"""Videos from disk to batches: readers, what a data folder holds, dataset, loader.

    <data_dir>/{train,val,test}/<class>/<video>      <video> = x.pt | x.mp4 .avi ... | a folder of frames
    <data_dir>/{train,val,test}/metadata.jsonl       optional: captions, texts, labels; see README.md

Every reader gives the same RGB uint8 [T, C, H, W] for the same clip. A file that cannot be read is an
error that names it; it is never replaced by another clip.
"""

import errno
import hashlib
import itertools
import json
import os
import re
import stat
import warnings
import zipfile
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from script import UserError, printable, shown
from transforms import LARGEST_PICTURE, Preprocessing, sample_indices

VIDEO_SUFFIXES = {
    ".mp4",
    ".avi",
    ".mkv",
    ".webm",
    ".mov",
    ".gif",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".flv",
    ".ts",
    ".3gp",
    ".ogv",
}
#: what systems and programs leave beside the user's own files, in lower case
SYSTEM_FOLDERS = {"@eadir", "__macosx", "lost+found", "$recycle.bin", "system volume information"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
VAL_FRACTION, VAL_SALT = 0.1, "val"
LARGE = 1280 * 720  # pixels of a picture that several threads decode faster than one
LARGEST_CLIP = 2**30  # bytes of the frames that are held at once
MOST_WINDOWS = 100_000  # of one video, with a timeline


class ReadError(UserError):
    """A video that cannot be read: names the file and the cause."""

    def __init__(self, path: Path, cause: object):
        super().__init__(f"cannot read {path}: {cause}")
        self.path = path


# -- readers ----------------------------------------------------------------------------------------

#: makes [n, ...] of uint8 [n, 3, H, W]; every frame for itself, since a reader may hand over one at a time
Transform = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def naming(path: Path) -> Generator[None]:
    """Whatever a library raises inside becomes a ReadError: a damaged file can make them raise anything."""
    try:
        yield
    except ReadError:
        raise
    except Exception as error:
        cause = getattr(error, "strerror", None)
        if not cause:
            kind = "" if isinstance(error, OSError | ValueError | UserError) else f"{type(error).__name__}: "
            cause = f"{kind}{error}"
        raise ReadError(path, cause) from None


def check_picture(path: Path, height: int, width: int) -> None:
    if height * width > LARGEST_PICTURE:
        raise ReadError(path, f"{width}x{height} pixels; a picture may have {LARGEST_PICTURE / 1e6:.0f} million")


def check_clip(path: Path, count: int, frame: torch.Tensor) -> None:
    """Raises ReadError if `count` frames like this one would take more memory than a clip may."""
    if count * frame.nbytes > LARGEST_CLIP:
        size = f"{count} frames of shape {list(frame.shape)} are {count * frame.nbytes / 2**30:.1f} GiB"
        raise ReadError(path, f"{size}; a clip may have {LARGEST_CLIP / 2**30:.0f}")


class Reader:
    """A video: len(reader) frames. Opening and reading raise ReadError and nothing else."""

    def __init__(self, path: Path):
        self.path = path
        with naming(path):
            self._open()

    def frames(self, indices: Iterable[int], transform: Transform | None = None) -> torch.Tensor:
        """uint8 [n, 3, H, W], or [n, ...] of what `transform` makes of each frame as soon as it is read, so that no
        more than one is held at full size."""
        with naming(self.path):
            return self._frames([int(i) for i in indices], transform)

    def _frames(self, indices: list[int], transform: Transform | None) -> torch.Tensor:
        clip, size, first = None, None, 0
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(index, []).append(place)
        for index, picture in self._pictures(sorted(places)):
            check_picture(self.path, *picture.shape[:2])
            if size is None:
                size, first = picture.shape, index
            elif picture.shape != size:
                (h, w), (h0, w0) = picture.shape[:2], size[:2]
                cause = f"{self._name(index)} is {w}x{h} pixels, {self._name(first)} is {w0}x{h0}"
                raise ReadError(self.path, cause)
            frame = picture.permute(2, 0, 1)  # [C, H, W]
            frame = frame if transform is None else transform(frame[None])[0]
            if clip is None:
                check_clip(self.path, len(indices), frame)
                layout = torch.channels_last if transform is None else torch.contiguous_format
                clip = torch.empty((len(indices), *frame.shape), dtype=frame.dtype, memory_format=layout)
            for place in places[index]:
                clip[place] = frame
        return clip

    def _open(self) -> None:
        raise NotImplementedError

    def _pictures(self, wanted: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """(index, uint8 [H, W, 3]) of each wanted frame; one that is given again replaces what came before."""
        raise NotImplementedError

    def _name(self, index: int) -> str:
        return f"frame {index}"


class TensorVideo(Reader):
    """A .pt file with one tensor [T, 3, H, W]: uint8, or floating point in [0, 1]."""

    def _open(self) -> None:
        check_tensor_file(self.path)
        try:
            video = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a dozen kinds; a pickle of objects is refused here
            raise ReadError(self.path, f"not a tensor saved with torch.save ({type(error).__name__})") from None
        self.video = self._checked(video)

    def _checked(self, video: Any) -> torch.Tensor:
        if not isinstance(video, torch.Tensor):
            raise ReadError(self.path, f"holds a {type(video).__name__}, not a tensor")
        if video.layout != torch.strided or video.device.type != "cpu":  # sparse; without any numbers ("meta")
            raise ReadError(self.path, f"expected a plain tensor, not a {video.layout} one on {video.device}")
        if video.ndim != 4 or video.shape[1] != 3 or 0 in video.shape:
            raise ReadError(self.path, f"expected a tensor [T, 3, H, W], not {list(video.shape)}")
        check_picture(self.path, *video.shape[2:])
        check_clip(self.path, len(video), video[0])
        if video.dtype == torch.uint8:
            return video
        if not video.dtype.is_floating_point:
            raise ReadError(self.path, f"expected uint8 or floats in [0, 1], not {video.dtype}")
        video = video.float()
        if not (video.amin() >= 0 and video.amax() <= 1):  # also false for NaN
            raise ReadError(self.path, "floating-point pixels must lie in [0, 1]")
        return (video * 255).round().to(torch.uint8)

    def __len__(self) -> int:
        return len(self.video)

    def _frames(self, indices: list[int], transform: Transform | None) -> torch.Tensor:
        """All at once, since they lie in memory already."""
        wanted, places = torch.tensor(indices), None
        if len(indices) > len(self.video):  # some of them several times
            wanted, places = wanted.unique(return_inverse=True)
        clip = self.video[wanted]
        clip = clip if transform is None else transform(clip)
        check_clip(self.path, len(indices), clip[0])
        return clip if places is None else clip[places]


def check_tensor_file(path: Path) -> None:
    """Raises ReadError if a file of torch.save holds more than a clip may, packed or not."""
    size = path.stat().st_size
    if 1032 * size > LARGEST_CLIP and zipfile.is_zipfile(path):  # deflate packs to no less than a 1032nd
        with zipfile.ZipFile(path) as archive:
            size = max(size, sum(entry.file_size for entry in archive.infolist()))
    if size > LARGEST_CLIP + 2**20:
        raise ReadError(path, f"it holds {size / 2**30:.1f} GiB; a clip may have {LARGEST_CLIP / 2**30:.0f}")


class FrameFolder(Reader):
    """A folder of images in natural order (frame_2 before frame_10), all of one size."""

    def _open(self) -> None:
        self.images = list_images(self.path)
        if not self.images:
            raise ReadError(self.path, "no images in this folder")

    def __len__(self) -> int:
        return len(self.images)

    def _name(self, index: int) -> str:
        return self.images[index].name

    def _pictures(self, wanted: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        return ((index, read_picture(self.images[index])) for index in wanted)


def read_picture(file: Path) -> torch.Tensor:
    """An image file as uint8 [H, W, 3]. Raises ReadError."""
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = LARGEST_PICTURE  # PIL's own limit is lower
    with naming(file), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's on size and damaged EXIF; torch's on an array that is only read
        if not file.is_file():  # a pipe would be waited for
            raise ReadError(file, "no such file")
        with Image.open(file) as image:
            check_picture(file, image.height, image.width)
            ImageOps.exif_transpose(image, in_place=True)
            return torch.from_numpy(np.asarray(image if image.mode == "RGB" else image.convert("RGB")))


class VideoFile(Reader):
    """Any file that FFmpeg decodes (PyAV). Frames are counted and chosen in the decoder's order.

    One pass over the packets, without decoding, finds all timestamps and keyframes. Where these can be
    trusted, it seeks when a keyframe lies between here and the next wanted frame; else it decodes on.
    """

    #: codecs whose decoders pass over a frame that no other frame is predicted from, when asked to
    SKIPPING = frozenset({"h264", "mpeg4", "mpeg2video", "mpeg1video", "vp8"})

    def _open(self) -> None:
        self.container, self.stream = open_stream(self.path)
        self.begun = False
        # a tuple of each packet: the packets themselves would be the whole file in memory
        packets = [(p.pts, p.is_keyframe, p.is_discard) for p in self.container.demux(self.stream) if p.size]
        # a clip that was cut out without encoding anew holds frames that are decoded but never shown
        times = [time for time, _, hidden in packets if not hidden]
        # AVI stores no presentation times: with B-frames those of its packets are wrong
        ordered = self.container.format.name != "avi" and None not in times and len(set(times)) == len(times)
        self.times = sorted(times) if ordered else None
        self.keyframes = sorted(time for time, is_key, _ in packets if is_key and time is not None) if ordered else []
        self.count = len(times)
        if not times:
            raise ReadError(self.path, "no frames in this file")

    def __del__(self):
        # at once, not when the garbage collector finds the container: decoding threads that are still there when
        # a loader's worker is forked crash it
        if hasattr(self, "container"):
            self.container.close()

    def __len__(self) -> int:
        return self.count

    def seconds(self) -> np.ndarray:
        """When each frame is shown, in seconds from the first."""
        if self.times is not None:
            times = np.array(self.times, dtype=float) * float(self.stream.time_base)
            return times - times[0]
        return np.arange(self.count) / float(self.stream.average_rate or 25)

    def _pictures(self, wanted: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        if self.times is None or not (yield from self._seek(wanted)):
            yield from self._decode_all(wanted)

    def _seek(self, wanted: list[int]) -> Generator[tuple[int, torch.Tensor], None, bool]:
        """The wanted frames by timestamp; returns False if the decoder's timestamps are not the packets'."""
        decoded, position = iter(()), None
        targets = {self.times[index] for index in wanted}
        use_cores(self.stream)
        for index in wanted:
            target = self.times[index]
            key = self.keyframes[max(0, bisect_right(self.keyframes, target) - 1)] if self.keyframes else self.times[0]
            if position is None or key > position + 1:
                self._begin(key)
                decoded = self._jump(target, key, targets)
            for frame in decoded:
                position = frame.pts if frame.pts is not None else target + 1
                if position >= target:
                    break
            if position != target:
                return False
            yield index, upright(frame)
        return True

    def _begin(self, key: int) -> None:
        """Decodes the first packet of a video of which a later part is wanted. It tells FFmpeg which version of x264
        made the file, and so which mistakes of that version to make again: 4:4:4 of older ones is garbage otherwise."""
        if self.stream.codec_context.name == "h264" and not self.begun and key != (self.keyframes or self.times)[0]:
            self.container.seek(self.times[0], stream=self.stream, backward=True)
            next(self.container.demux(self.stream)).decode()
        self.begun = True

    def _jump(self, target: int, key: int, targets: Set[int]) -> Iterator:
        """Frames from the last keyframe at or before `target` on."""
        import av

        try:
            self.container.seek(target, stream=self.stream, backward=True)
        except av.FFmpegError:  # gif: start again
            self.container.close()
            self.container, self.stream = open_stream(self.path)
            return self._decoded(targets)
        decoded = self._decoded(targets)
        first = next(decoded, None)
        if first is None or (first.pts is not None and first.pts > target):  # landed on the keyframe after it
            self.container.seek(key, stream=self.stream, backward=True)
            return self._decoded(targets)
        return itertools.chain([first], decoded)

    def _decoded(self, targets: Set[int]) -> Iterator:
        """Decoded frames from here on; of those that are neither wanted nor needed for others, as few as can be."""
        context = self.stream.codec_context
        skipping = context.name in self.SKIPPING
        for packet in self.container.demux(self.stream):
            if skipping:
                context.skip_frame = "DEFAULT" if packet.pts in targets else "NONREF"
            yield from packet.decode()

    def _decode_all(self, wanted: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """The wanted frames by counting decoded frames. Raises ReadError if fewer come than there are packets."""
        lacking = set(wanted)
        container, stream = open_stream(self.path)
        with container:
            use_cores(stream)
            for index, frame in enumerate(container.decode(stream)):
                if index in lacking:
                    lacking.remove(index)
                    yield index, upright(frame)
                if not lacking:
                    return
        raise ReadError(self.path, f"frame {min(lacking)} of {self.count} does not decode")


def open_stream(path: Path) -> tuple[Any, Any]:
    """(container, its video). Raises ReadError if it has none, or one that cannot be decoded."""
    import av

    # a bare path may be taken for a URL: in a folder named "http:" FFmpeg would fetch it
    container = av.open(f"file:{path}", metadata_errors="replace")
    stream = container.streams.best("video")
    if stream is None:
        raise ReadError(path, "no video in this file")
    if stream.codec_context is None:
        raise ReadError(path, "its codec is unknown to this FFmpeg")
    check_picture(path, stream.codec_context.height, stream.codec_context.width)
    return container, stream


def use_cores(stream) -> None:
    """Several decoding threads for large pictures only, for which they pay, and not in a loader's worker, since the
    workers already fill the cores."""
    context = stream.codec_context
    if not context.is_open:
        alone = get_worker_info() is None and context.width * context.height >= LARGE
        stream.thread_type, stream.thread_count = "AUTO", 0 if alone else 1


def upright(frame) -> torch.Tensor:
    """A decoded frame as uint8 [H, W, C], turned as the file's display matrix says (PyAV does not)."""
    picture, turns = torch.from_numpy(frame.to_ndarray(format="rgb24")), frame.rotation // 90
    return torch.rot90(picture, turns) if turns % 4 else picture


def open_video(path: Path) -> Reader:
    """The reader for a path. Raises ReadError, naming the file, if it is missing or cannot be read."""
    with naming(path):
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            return FrameFolder(path)
        if not stat.S_ISREG(info.st_mode):  # a pipe would be waited for, and a device never ends
            raise ReadError(path, "neither a file nor a folder")
        if info.st_size == 0:
            raise ReadError(path, "the file is empty")
        return TensorVideo(path) if path.suffix.lower() == ".pt" else VideoFile(path)


def natural_key(path: Path | str) -> tuple[list, str]:
    """Sorts frame_2 before frame_10. No two names are equal: 01 and 1 have an order of their own."""
    parts = re.split(r"0*([0-9]+)", str(path))  # text and digits in turn; digits compare by length, then by value
    return [(len(part), part) if place % 2 else part for place, part in enumerate(parts)], str(path)


def visible(folder: Path) -> list[os.DirEntry]:
    """What a folder holds, without hidden files, in natural order. Raises ReadError."""
    with naming(folder), os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: natural_key(e.name))


def kind_of(entry: os.DirEntry) -> str:
    """What an entry is: "folder", "file" (also a link that leads nowhere: a missing video), or why it is neither."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file() or not os.path.exists(entry.path):
            return "file"
    except OSError as error:
        return "a link to itself" if error.errno == errno.ELOOP else "file"
    return "a special file"  # a FIFO would be waited for


def suffix_of(entry: os.DirEntry) -> str:
    return os.path.splitext(entry.name)[1].lower()


def list_images(folder: Path) -> list[Path]:
    """The images of a frame folder in natural order. Raises ReadError."""
    return [Path(e.path) for e in visible(folder) if suffix_of(e) in IMAGE_SUFFIXES and kind_of(e) == "file"]


def view_indices(available: int, num_frames: int, stride: int, clips: int) -> np.ndarray:
    """The frames of `clips` clips of one video, one behind the other, [clips * num_frames]; one clip is the
    one that evaluation takes."""
    places = (np.arange(clips) + 0.5) / clips
    return np.concatenate([sample_indices(available, num_frames, stride, place=place) for place in places])


# -- what a folder holds ----------------------------------------------------------------------------


def find_videos(folder: Path) -> list[Path]:
    """Every video at or below `folder`, in natural order. Raises ReadError for a folder that cannot be read."""
    return survey(folder)[0]


def survey(folder: Path) -> tuple[list[Path], list[str]]:
    """(find_videos, what was passed over and why); hidden files are passed over in silence.

    A video is a video file, a .pt, or a folder of frames: one with images inside, and no videos or folders. Every
    other folder is entered once, whatever links lead to it, and those above `folder` never: links may run in circles.
    """
    if not folder.is_dir():
        return [folder] * (folder.suffix.lower() in {*VIDEO_SUFFIXES, ".pt"}), []
    videos: list[Path] = []
    passed: list[str] = []
    entered = {inode(above) for above in folder.resolve().parents}
    waiting = deque([folder])
    while waiting:
        inside = waiting.popleft()
        here = inode(inside)
        if here in entered:
            passed.append(f"{inside} (a link to a folder that is read already)")
            continue
        found = Listing(inside, entered | {here}, passed)
        if found.images and not found.videos and not found.folders:
            videos.append(inside)
            continue
        entered.add(here)
        videos += found.videos
        if inside != folder:  # directly in the data folder lie metadata.jsonl and the like
            passed += [f"{path} (not a video)" for path in found.others + found.images]
        for path in found.folders:  # links last: a folder is known by its own place if that is one of those below
            (waiting.append if os.path.islink(path) else waiting.appendleft)(path)
    return sorted(videos, key=natural_key), passed


def inode(folder: Path) -> tuple[int, int]:
    """What all paths of one folder have in common. Raises ReadError."""
    with naming(folder):
        info = folder.stat()
    return info.st_dev, info.st_ino


class Listing:
    """What lies directly in a folder. Links to folders already `entered`, the system's own folders and special files
    are added to `passed`."""

    def __init__(self, folder: Path, entered: Set[tuple[int, int]], passed: list[str]):
        self.images, self.videos, self.folders, self.others = [], [], [], []
        for entry in visible(folder):
            path, kind, suffix = Path(entry.path), kind_of(entry), suffix_of(entry)
            if kind == "folder" and entry.name.lower() in SYSTEM_FOLDERS:
                passed.append(f"{path} (a folder of the system)")
            elif kind == "folder" and entry.is_symlink() and inode(path) in entered:
                passed.append(f"{path} (a link to a folder that is read already)")
            elif kind == "folder":
                self.folders.append(path)
            elif kind != "file":
                passed.append(f"{path} ({kind})")
            elif suffix in VIDEO_SUFFIXES or suffix == ".pt":
                self.videos.append(path)
            else:
                (self.images if suffix in IMAGE_SUFFIXES else self.others).append(path)


# -- what identifies a video ------------------------------------------------------------------------


def digest(path: Path) -> str:
    """32 hex digits that identify a video wherever it lies: of the whole file, or of the names and contents of a
    frame folder's images. Raises ReadError."""
    with naming(path):
        if not path.is_dir():
            return file_digest(path).hex()
        whole = hashlib.blake2b(digest_size=16, person=b"frames")
        images = list_images(path)
        if not images:
            raise ReadError(path, "no images in this folder")
        for image in images:
            name = os.fsencode(image.name)
            whole.update(len(name).to_bytes(2, "big") + name + file_digest(image))
        return whole.hexdigest()


def file_digest(file: Path) -> bytes:
    with naming(file):
        if not stat.S_ISREG(file.stat().st_mode):  # a FIFO would be waited for
            raise ReadError(file, "neither a file nor a folder")
        with file.open("rb") as content:
            return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).digest()


def stamp(path: Path) -> str:
    """What changes whenever a file, or an image of a frame folder, is written: 32 hex digits of names, sizes and
    times. Reads no content. Raises ReadError."""
    with naming(path):
        files = list_images(path) if path.is_dir() else [path]
    marks = []
    for file in files:
        with naming(file):
            info = file.stat()
        marks.append((file.name, info.st_size, info.st_mtime_ns, info.st_ctime_ns))
    return hashlib.blake2b(repr(marks).encode(), digest_size=16).hexdigest()


# -- samples ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One video and what is known of it; `label` is the class folder's name or metadata.jsonl's label."""

    path: Path
    label: str | None = None
    captions: tuple[str, ...] = ()
    text: str | None = None
    attributes: dict[str, str] = field(default_factory=dict, hash=False)
    span: tuple[int, int] | None = None  # first and last frame, where only a part is meant
    digest: str | None = field(default=None, compare=False)  # where it has been computed; see identified()

    @property
    def identity(self) -> str:
        """The video's digest, computed now if need be. Raises ReadError."""
        return self.digest or digest(self.path)


def cut(sample: Sample, seconds: float) -> list[tuple[Sample, float, float]]:
    """A video's windows of this length: (sample with its frames as span, start, end in seconds), the last one
    perhaps shorter. Raises ReadError if it cannot be read, or is no video file and so has no times."""
    reader = open_video(sample.path)
    if not isinstance(reader, VideoFile):
        raise ReadError(sample.path, "no times: a timeline needs a video file")
    with naming(sample.path):
        times = reader.seconds()
    end = max(1e-9, float(times[-1] + (np.median(np.diff(times)) if len(times) > 1 else 0)))
    if end > MOST_WINDOWS * seconds:
        raise ReadError(sample.path, f"{end:g} s are more than {MOST_WINDOWS} windows of {seconds:g} s")
    windows = []
    for start in np.arange(0, end, seconds):
        first, last = np.searchsorted(times, [start, start + seconds - 1e-6])
        if last > first:
            span = (int(first), int(last) - 1)
            windows.append((replace(sample, span=span), round(float(start), 3), round(min(start + seconds, end), 3)))
    return windows


def read_metadata(folder: Path) -> dict[Path, dict[str, Any]]:
    """metadata.jsonl of a folder as {path: row}, {} if there is none. Errors name the line."""
    file = folder / "metadata.jsonl"
    if not file.is_file():
        return {}
    rows: dict[Path, dict[str, Any]] = {}
    missing: list[Path] = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 in a caption too
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line, strict=False)  # a tab or the like may stand in a text
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        path = folder / check_row(row, where)
        if path in rows:
            raise UserError(f"{where}: file_name {shown(row['file_name'])} stands twice")
        rows[path] = row
        if not exists(path, where):
            missing.append(path)
    if missing:
        raise UserError(f"{file} names {len(missing)} files that do not exist, first {missing[0]}")
    return rows


def exists(path: Path, where: str) -> bool:
    """Whether there is such a file. Raises UserError if there cannot be: a name that is too long, or with a NUL."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise UserError(f"{where}: file_name {shown(str(path))}: {cause}") from None
    return True


def is_text(value: Any) -> bool:
    """Whether a value of JSON is a text; half of a surrogate pair, which JSON can escape, is none."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def check_row(row: Any, where: str) -> str:
    """The row's file_name; raises UserError where a field has the wrong type."""
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
        raise UserError(f'{where}: expected {{"file_name": "...", ...}}')
    for key in ("text", "label"):
        if row.get(key) is not None and not is_text(row[key]):
            raise UserError(f"{where}: {key} must be a text")
    captions = row.get("caption", [])
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(is_text(c) and c.strip() for c in captions):
        raise UserError(f"{where}: caption must be a text or a list of texts, none of them empty")
    if not isinstance(row.get("attributes", {}), dict):
        raise UserError(f'{where}: attributes must be {{"name": "value"}}')
    return row["file_name"]


def sample_of(path: Path, row: dict[str, Any], folder: Path) -> Sample:
    """One row of metadata, or {} for a video that none speaks of."""
    label = row.get("label")
    if label is None:  # the class folder, if the video lies in one
        inside = Path(os.path.relpath(path, folder)).parts
        label = inside[0] if len(inside) > 1 and inside[0] != os.pardir else None
    captions = row.get("caption", ())
    return Sample(
        path=path,
        label=label,
        captions=(captions,) if isinstance(captions, str) else tuple(captions),
        text=row.get("text"),
        attributes=row.get("attributes", {}),
    )


def read_folder(folder: Path) -> list[Sample]:
    """Every video of a folder, with its class folder and its row of metadata.jsonl. Sorted by name. Prints how many
    other things were passed over.

    Raises:
        UserError: the folder is missing or empty, or metadata.jsonl is bad or names a missing file.
    """
    if not folder.exists():
        raise UserError(f"no such file or folder: {folder}")
    rows = read_metadata(folder) if folder.is_dir() else {}
    found, passed = survey(folder)
    if passed:
        print(
            printable(f"passed over {len(passed)} files or folders in {folder} that are not videos, first {passed[0]}")
        )
    videos = {*rows, *found}
    if not videos:
        raise UserError(
            f"no videos in {folder}: expected {', '.join(sorted(VIDEO_SUFFIXES))}, .pt or folders of images"
        )
    return [sample_of(path, rows.get(path, {}), folder) for path in sorted(videos, key=natural_key)]


@dataclass(frozen=True)
class Splits:
    """The samples of each split, the class names in order, and where val comes from."""

    train: list[Sample]
    val: list[Sample]
    test: list[Sample]
    class_names: list[str]
    note: str
    unreadable: tuple[str, ...] = ()  # what was wrong with the videos that were left out


def read_splits(data_dir: Path, class_names: list[str] | None = None) -> Splits:
    """train, val and test of a data folder. Without val/, a tenth of train is held out, of each class.

    Which ones depends on the names alone (hashed), not on the machine, the seed or the order of files. The classes
    are those of train/; where `class_names` are given they are these, and train/ may be lacking.
    Raises UserError if there is no train/.
    """
    if not data_dir.is_dir():
        hint = "; python dummy_data.py draws one" if data_dir.name == "synthetic_dataset" else ""
        raise UserError(f"no data folder {data_dir}{hint}")
    splits = {name: read_folder(data_dir / name) for name in ("train", "val", "test") if (data_dir / name).is_dir()}
    if "train" not in splits and (class_names is None or not splits):
        raise UserError(f"{data_dir} has no folder train/ (expected {data_dir}/train/<class>/<video>)")
    note = ""
    if "train" in splits and "val" not in splits:
        splits["train"], splits["val"] = hold_out(splits["train"], data_dir / "train")
        note = f"no val/: {len(splits['val'])} of the training videos are held out for it, always the same"
    if class_names is None:
        class_names = sorted({s.label for s in splits["train"] if s.label is not None}, key=natural_key)
    return Splits(splits.get("train", []), splits.get("val", []), splits.get("test", []), class_names, note)


def identified(splits: Splits, digests: dict[Path, str]) -> Splits:
    """The splits with every sample's digest, where there is one."""
    names = ("train", "val", "test")
    return replace(splits, **{n: [replace(s, digest=digests.get(s.path)) for s in getattr(splits, n)] for n in names})


def fingerprint_data(splits: Splits, data_dir: Path) -> str:
    """32 hex digits of all that the splits say of their videos (names below data_dir, labels, captions, texts), and
    behind them 32 of the videos' contents."""
    said, content = hashlib.sha256(), hashlib.sha256()
    for name in ("train", "val", "test"):
        for s in getattr(splits, name):
            place = Path(os.path.relpath(s.path, data_dir)).as_posix()
            said.update(repr((name, place, s.label, s.captions, s.text)).encode("utf-8", "surrogateescape"))
            content.update(s.identity.encode())
    return said.hexdigest()[:32] + content.hexdigest()[:32]


def read_display_names(data_dir: Path, class_names: list[str]) -> dict[str, str]:
    """classes.json's display name of every class; the class's own name where it has none."""
    file = data_dir / "classes.json"
    try:
        names = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise UserError(f'{file}: expected {{"class": "display name", ...}}')
    return {name: names.get(name, name) for name in class_names}


def hold_out(samples: list[Sample], folder: Path) -> tuple[list[Sample], list[Sample]]:
    """(train, val): a tenth of each class, at least one video where the class has two or more."""

    def rank(sample: Sample) -> str:
        name = Path(os.path.relpath(sample.path, folder)).as_posix()
        return hashlib.sha256(f"{VAL_SALT}/{name}".encode("utf-8", "surrogateescape")).hexdigest()

    held: set[Path] = set()
    for label in {s.label for s in samples}:
        ranked = sorted((s for s in samples if s.label == label), key=rank)
        count = max(1, round(VAL_FRACTION * len(ranked))) if len(ranked) > 1 else 0
        held |= {s.path for s in ranked[:count]}
    if not held:
        raise UserError(f"{folder}: too few videos to hold any out for val; add a folder val/ beside it")
    return [s for s in samples if s.path not in held], [s for s in samples if s.path in held]


def check_samples(splits: Splits, captioning: bool, use_text: bool) -> None:
    """Raises UserError unless every sample has what the task needs: a known class, or captions; texts."""
    for name in ("train", "val", "test"):
        samples = getattr(splits, name)
        if captioning:
            bad = [s for s in samples if not s.captions]
            what = "no caption in metadata.jsonl"
        else:
            bad = [s for s in samples if s.label not in splits.class_names]
            what = (
                f"a class that is not one of the training's ({bad[0].label})"
                if bad and bad[0].label
                else "no class: no folder, no label"
            )
        if bad:
            raise UserError(f"{len(bad)} of {len(samples)} videos of {name} have {what}, first {bad[0].path}")
        if use_text and not captioning and all(s.text is None for s in samples) and samples:
            raise UserError(f"--use_text True: no video of {name} has a text in metadata.jsonl")
    if not captioning and len(splits.class_names) < 2:
        raise UserError(f"classification needs two classes or more, train has {splits.class_names}")


# -- the scan before training -----------------------------------------------------------------------


class WorkerLoader(DataLoader):
    """A DataLoader that raises UserError when a worker process was killed."""

    def __iter__(self):
        # torch's own handler would raise wherever the main process is just then; without it, the wait for the dead
        # worker's batch does
        signal_handling._SIGCHLD_handler_set = True
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if not re.match(r"DataLoader worker \(pid.*(killed|exited)", str(error)):
                raise
            raise UserError(
                "a process that reads videos was killed, most likely because the machine ran out of memory: lower "
                "--num_workers, --batch_size or --num_frames"
            ) from None


def corner(frames: torch.Tensor) -> torch.Tensor:
    """One pixel of each frame: for those who only ask whether it can be read."""
    return frames[..., :1, :1]


class ScanDataset(Dataset):
    """Item i is what is wrong with video i, "" if nothing: it is opened, and of its sampled frames the
    first and the last are decoded, or those of as many clips as its job says."""

    def __init__(self, jobs: list[tuple[Path, int]], num_frames: int, stride: int):
        self.jobs, self.num_frames, self.stride = jobs, num_frames, stride

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> str:
        path, clips = self.jobs[index]
        try:
            reader = open_video(path)
            indices = view_indices(len(reader), self.num_frames, self.stride, max(1, clips))
            reader.frames(indices if clips else indices[[0, -1]], corner)
        except ReadError as error:
            return str(error)
        return ""


class Examination(Dataset):
    """Item i is (what is wrong with video i, "" if nothing; its digest): the scan's item, or where the job's number
    of clips is None, the digest alone."""

    def __init__(self, jobs: list[tuple[Path, int | None]], num_frames: int, stride: int):
        self.jobs = jobs
        self.scan = ScanDataset([(path, clips or 0) for path, clips in jobs], num_frames, stride)

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> tuple[str, str]:
        path, clips = self.jobs[index]
        try:
            content = digest(path)
        except ReadError as error:
            return str(error), ""
        return "" if clips is None else self.scan[index], content


#: what is remembered of a video: {"stamp": ..., "digest": ..., "decoded": [of which frames it was tried, ...]}
Record = dict[str, Any]


def scan(
    splits: Splits,
    num_frames: int,
    stride: int,
    test_clips: int,
    num_workers: int,
    known: dict[str, Record],
    cached: Sequence[str] = (),
) -> tuple[dict[Path, str], dict[Path, Record]]:
    """scan_videos of all splits; of val and test, all frames that evaluation takes are decoded. Of the `cached`
    splits only digests are computed: they are read when their features are."""
    clips = {"train": 0, "val": 1, "test": test_clips}
    jobs = {s.path: None if name in cached else count for name, count in clips.items() for s in getattr(splits, name)}
    return scan_videos(jobs, num_frames, stride, num_workers, known)


def scan_videos(
    jobs: dict[Path, int | None], num_frames: int, stride: int, num_workers: int, known: dict[str, Record]
) -> tuple[dict[Path, str], dict[Path, Record]]:
    """(what is wrong with each unreadable video, the records of the others). `jobs` says of how many clips of each
    video all frames are decoded; 0: only two frames; None: the digest is enough. `known` has records by absolute
    path; what they say of videos whose stamp is theirs is not tried again."""
    from tqdm import tqdm

    bad: dict[Path, str] = {}
    records: dict[Path, Record] = {}
    fresh: list[tuple[Path, int | None]] = []
    for path, clips in jobs.items():
        wanted = {f"{num_frames}/{stride}/{clips}" if clips else "two frames"} if clips is not None else set()
        try:
            mark = stamp(path)
        except ReadError as error:
            bad[path] = str(error)
            continue
        record = known.get(os.path.abspath(path), {"stamp": None})
        if record["stamp"] != mark or not wanted <= {*record["decoded"]}:
            fresh.append((path, clips))
            tried = record["decoded"] if record["stamp"] == mark else []
            record = {"stamp": mark, "decoded": sorted({*tried, *wanted})}
        records[path] = record
    loader = WorkerLoader(
        Examination(fresh, num_frames, stride),
        batch_size=16,
        num_workers=num_workers if len(fresh) > 64 else 0,
        collate_fn=list,
    )
    found: list[tuple[str, str]] = []
    with tqdm(total=len(fresh), desc="scan of the videos", unit="video", leave=False, disable=not fresh) as bar:
        for batch in loader:
            found += batch
            bar.update(len(batch))
    for (path, _), (cause, content) in zip(fresh, found, strict=True):
        if cause:
            bad[path] = cause
            del records[path]
        else:
            records[path] |= {"digest": content}
    return bad, records


def leave_out(splits: Splits, bad: dict[Path, str]) -> Splits:
    """The splits without the unreadable videos. Raises UserError if a split or a class loses its last video."""
    kept = {n: [s for s in getattr(splits, n) if s.path not in bad] for n in ("train", "val", "test")}
    for name, samples in kept.items():
        if getattr(splits, name) and not samples:
            raise UserError(f"no video of {name} can be read; the first: {next(iter(bad.values()))}")
    lost = set(splits.class_names) - {s.label for s in kept["train"]}
    if lost:
        raise UserError(f"no training video of class {min(lost)} can be read")
    return replace(splits, **kept, unreadable=tuple(bad.values()))


# -- dataset and loader -----------------------------------------------------------------------------


class ClipDataset(Dataset):
    """Clips of samples; item (draw, index) depends on nothing but (seed, draw, index).

    In training the frames are jittered (unless `jitter` is off) and one caption is drawn; else centres and the
    first caption. `features`, by place, are given instead of pixel_values where they are known already.
    `views` (clips, crops) other than (1, 1) gives pixel_values [clips * crops, T, C, H, W].
    """

    def __init__(
        self,
        samples: list[Sample],
        preprocessing: Preprocessing,
        num_frames: int,
        stride: int,
        class_names: list[str],
        train: bool = False,
        seed: int = 0,
        views: tuple[int, int] = (1, 1),
        features: Any = None,
    ):
        self.samples = samples
        self.preprocessing = preprocessing
        self.num_frames, self.stride = num_frames, stride
        self.class_index = {name: i for i, name in enumerate(class_names)}
        self.train, self.seed, self.views, self.features = train, seed, views, features
        self.jitter = True
        self.last: tuple[Path, Reader] | None = None  # the reader in use: spans of one video follow each other

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> list[int]:
        """The class of every sample, -100 where it is not known."""
        return [self.class_index.get(sample.label, -100) for sample in self.samples]

    def reader(self, sample: Sample) -> Reader:
        if sample.span is None:
            return open_video(sample.path)
        if self.last is None or self.last[0] != sample.path:
            self.last = (sample.path, open_video(sample.path))
        return self.last[1]

    def pixels(self, sample: Sample, rng: np.random.Generator | None) -> torch.Tensor:
        """uint8 [T, C, H, W], or [V, T, C, H, W] of several views. Raises ReadError."""
        reader = self.reader(sample)
        first, last = sample.span or (0, len(reader) - 1)
        clips, crops = self.views
        if self.views == (1, 1):
            indices = sample_indices(last - first + 1, self.num_frames, self.stride, rng)
            return reader.frames(first + indices, self.preprocessing.pixels)
        crop = partial(self.preprocessing.crops, count=crops)
        views = reader.frames(first + view_indices(last - first + 1, self.num_frames, self.stride, clips), crop)
        return views.unflatten(0, (clips, -1)).transpose(1, 2).flatten(0, 1)

    def caption(self, draw: int, place: int) -> str:
        """The caption of an item, known without reading its video: "" where there is none."""
        captions = self.samples[place].captions or ("",)
        if len(captions) == 1 or not self.train:
            return captions[0]
        return captions[int(np.random.default_rng([self.seed, draw, place, 1]).integers(len(captions)))]

    def caption_length(self, item: tuple[int, int]) -> tuple[int, int]:
        """(words, characters) of the caption of item (draw, index)."""
        caption = self.caption(*item)
        return len(caption.split()), len(caption)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        draw, place = index
        sample = self.samples[place]
        rng = np.random.default_rng([self.seed, draw, place]) if self.train else None
        try:
            if self.features is not None:
                video = {"features": self.features[place]}  # [1 + N, D] fp16
            else:
                video = {"pixel_values": self.pixels(sample, rng if self.jitter else None)}
        except ReadError as error:  # raised by ClipLoader: a worker's exception would arrive as a traceback
            return {"error": str(error), "index": place}
        return video | {
            "label": self.class_index.get(sample.label, -100),
            "caption": self.caption(draw, place),
            "text": sample.text or "",
            "index": place,
        }


class EpochBatches:
    """Yields lists of (draw, index); the order comes from (seed, epoch), or is plain.

    With `classes`, each sample's class, an epoch draws equally many clips of every class, else every clip once.
    With `length`, of (draw, index), the clips of every `group` batches are sorted by it, so that they need less
    padding: of batches that make one optimizer step, which learns from the same clips in any order.
    `share` (r, n) gives every n-th clip of each batch from the r-th on: one process's part, which may be empty.
    `epoch` and `start`, the number of batches to leave out, are set before each pass.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        classes: list[int] | None = None,
        share: tuple[int, int] = (0, 1),
        group: int = 1,
        length: Callable[[tuple[int, int]], Any] | None = None,
    ):
        self.count, self.batch_size, self.shuffle, self.seed = count, batch_size, shuffle, seed
        self.classes, self.share, self.group, self.length = classes, share, group, length
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.order()
        for start in range(self.start * self.batch_size, self.count, self.batch_size):
            yield order[start : start + self.batch_size][self.share[0] :: self.share[1]]

    def order(self) -> list[tuple[int, int]]:
        if not self.shuffle:
            return [(self.epoch, place) for place in range(self.count)]
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.classes is not None:
            order = balanced_order(np.array(self.classes), self.epoch, rng)
        else:
            order = [(self.epoch, int(place)) for place in rng.permutation(self.count)]
        if self.length is None:
            return order
        step = self.group * self.batch_size
        return [item for k in range(0, self.count, step) for item in sorted(order[k : k + step], key=self.length)]


def balanced_order(classes: np.ndarray, epoch: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """As many (draw, index) as there are clips, equally many of every class (give or take one); a class that
    is too small repeats its clips, each time as another draw."""
    groups = [np.flatnonzero(classes == k) for k in np.unique(classes)]
    share, rest = divmod(len(classes), len(groups))
    draws = -(-(share + 1) // min(map(len, groups)))  # of one clip in one epoch, at most
    extra = set(rng.permutation(len(groups))[:rest].tolist())
    order: list[tuple[int, int]] = []
    for number, group in enumerate(groups):
        drawn = [(epoch * draws + d, int(i)) for d in range(draws) for i in rng.permutation(group)]
        order += drawn[: share + (number in extra)]
    return [order[i] for i in rng.permutation(len(order))]


def collate(items: list[dict[str, Any]], make_batch: Callable[[list[dict[str, Any]]], dict]) -> dict[str, Any]:
    """make_batch(the items that could be read); {index: what is wrong} of the others beside it."""
    errors = {item["index"]: item["error"] for item in items if "error" in item}
    good = [item for item in items if "error" not in item]
    return {"batch": make_batch(good) if good else None, "errors": errors}


class ClipLoader(WorkerLoader):
    """Yields the batches of `make_batch`. Raises UserError for a video that could not be read, or with
    `skip_unreadable` leaves it out and adds the error to `skipped`; a batch without any readable video
    is None, so that batches can still be counted."""

    def __init__(self, *args, skip_unreadable: bool = False, skipped: Iterable[str] = (), **kwargs):
        super().__init__(*args, **kwargs)
        self.skip_unreadable, self.skipped = skip_unreadable, set(skipped)

    def close(self) -> None:
        """Ends the worker processes at once; left to the garbage collector, each is waited for 5 seconds."""
        if self.num_workers and self._iterator is not None:
            self._iterator._shutdown_workers()
            self._iterator = None

    def with_errors(self) -> Iterator[tuple[dict[str, Any] | None, dict[int, str]]]:
        """Every batch beside {index: what is wrong} of its unreadable videos."""
        for item in super().__iter__():
            yield item["batch"], item["errors"]

    def __iter__(self):
        for batch, errors in self.with_errors():
            if errors and not self.skip_unreadable:
                raise UserError(next(iter(errors.values())))
            self.skipped.update(errors.values())
            yield batch


def build_loader(
    dataset: ClipDataset,
    make_batch: Callable,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
    balance: bool = False,
    share: tuple[int, int] = (0, 1),
    group: int = 1,
    **skipping: Any,
) -> ClipLoader:
    """A loader of `dataset`; its `batch_sampler` takes the epoch before each pass in training, and with
    `balance` draws all classes equally often; the clips of every `group` batches are sorted by the length of their
    captions. `share` is EpochBatches', `skipping` are ClipLoader's own arguments."""
    batches = EpochBatches(
        len(dataset),
        batch_size,
        shuffle=dataset.train,
        seed=dataset.seed,
        share=share,
        classes=dataset.labels if balance else None,
        group=group,
        length=dataset.caption_length if group > 1 else None,
    )
    return ClipLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=partial(collate, make_batch=make_batch),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(dataset.seed),  # so that making an iterator draws nothing global
        **skipping,
    )
