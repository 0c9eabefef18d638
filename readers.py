"""Readers: one video on disk to uint8 frames.

    open_video(path)    a .pt tensor, a folder of frames, or any file that FFmpeg decodes

Every reader gives the same RGB uint8 [T, C, H, W] for the same frames. A file that cannot be read raises a ReadError
that names it.
"""

import errno
import hashlib
import itertools
import os
import re
import stat
import warnings
import zipfile
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from script import UserError
from transforms import LARGEST_PICTURE

VIDEO_SUFFIXES = {
    f".{name}"
    for name in ["mp4", "avi", "mkv", "webm", "mov", "gif", "m4v", "mpg", "mpeg", "wmv", "flv", "ts", "3gp", "ogv"]
}


IMAGE_SUFFIXES = {f".{name}" for name in ["png", "jpg", "jpeg", "bmp", "webp", "tif", "tiff", "ppm"]}


#: what systems and programs leave beside the user's own files, in lower case
SYSTEM_FOLDERS = {"@eadir", "__macosx", "lost+found", "$recycle.bin", "system volume information"}


LARGE = 1280 * 720  # pixels of a picture that several threads decode faster than one


#: FFmpeg's formats that only name other files: what these show may change while the list's own digest stays the same
PLAYLISTS = {"concat", "hls", "applehttp", "dash", "webm_dash_manifest", "imf", "sdp", "rtsp"}


LARGEST_CLIP = 2**30  # bytes of the frames that are held at once


#: makes [n, ...] of uint8 [n, 3, H, W]; every frame for itself, since a reader may hand over one at a time
Transform = Callable[[torch.Tensor], torch.Tensor]


class ReadError(UserError):
    """A video that cannot be read: names the file and the cause."""

    def __init__(self, path: Path, cause: object):
        super().__init__(f"cannot read {path}: {cause}")
        self.path = path


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


# -- tensors and folders of frames ------------------------------------------------------------------


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


# -- video files ------------------------------------------------------------------------------------


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
    if PLAYLISTS & {*container.format.name.split(",")}:
        raise ReadError(path, f"a list of other files ({container.format.name}), not a video")
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


# -- any path ---------------------------------------------------------------------------------------


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


def corner(frames: torch.Tensor) -> torch.Tensor:
    """One pixel of each frame: for those who only ask whether it can be read."""
    return frames[..., :1, :1]


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


# -- folders ----------------------------------------------------------------------------------------


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
