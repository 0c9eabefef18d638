"""Reads one video from disk as uint8 frames.

    reader = open_video(path)      a .pt tensor, a folder of frames, or any file that FFmpeg can decode
    reader.frames([0, 8, 16])      RGB uint8 [3, 3, H, W]

A video that cannot be read raises a ReadError with its path and the cause. The second half of the file finds the videos
in a folder and tells whether they have changed.
"""

import errno
import hashlib
import itertools
import os
import re
import stat
import warnings
import zipfile
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from extras.shards import find_member, list_videos, open_member, stamp_of
from script import UserError
from transforms import LARGEST_PICTURE

VIDEO_SUFFIXES = {
    f".{name}"
    for name in ["mp4", "avi", "mkv", "webm", "mov", "gif", "m4v", "mpg", "mpeg", "wmv", "flv", "ts", "3gp", "ogv"]
}
FILE_SUFFIXES = {*VIDEO_SUFFIXES, ".pt"}  # of every file that is a video
IMAGE_SUFFIXES = {f".{name}" for name in ["png", "jpg", "jpeg", "bmp", "webp", "tif", "tiff", "ppm"]}
# folders that operating systems and NAS devices create among the user's own, in lower case
SYSTEM_FOLDERS = {"@eadir", "__macosx", "lost+found", "$recycle.bin", "system volume information"}
REPEATED = "a link to a folder that was already read"

LARGE = 1280 * 720  # pixels of a frame from which several decoding threads are faster than one
LARGEST_CLIP = 2**30  # bytes of all frames of a clip
# how many files, and frames in all, have their timestamps (8 bytes each) remembered: 37 hours at 30 frames per second
INDEXED_FILES, INDEXED_FRAMES = 1000, 4_000_000

# FFmpeg formats that only name other files. What they show may change while their own digest stays the same
PLAYLISTS = {"concat", "hls", "applehttp", "dash", "webm_dash_manifest", "imf", "sdp", "rtsp"}

# turns uint8 [n, 3, H, W] into [n, ...]; must treat frames independently, because a reader may pass them one by one
Transform = Callable[[torch.Tensor], torch.Tensor]


class Segment(NamedTuple):
    """A part of a video: the frames with start <= time < end, in seconds after the first frame."""

    start: float
    end: float
    fps: float | None = None  # frames per second, for frame folders and tensors, which store no times


class ReadError(UserError):
    """A video that cannot be read. The message names the file and the cause."""

    def __init__(self, path: Path, cause: object):
        super().__init__(f"cannot read {path}: {cause}")
        self.path = path


@contextmanager
def as_read_error(path: Path) -> Generator[None]:
    """Turns any exception inside the block into a ReadError for `path`.

    A damaged file can make FFmpeg, PIL or torch raise anything, so all exceptions are caught.
    """
    try:
        yield
    except ReadError:
        raise
    except Exception as error:
        # name the exception's class only if its text alone may mean nothing to a user
        cause = getattr(error, "strerror", None)
        if not cause:
            kind = "" if isinstance(error, OSError | ValueError | UserError) else f"{type(error).__name__}: "
            cause = f"{kind}{error}"
        raise ReadError(path, cause) from None


def check_picture(path: Path, height: int, width: int) -> None:
    """Raises ReadError if a frame is too large: a small damaged file may claim any size."""
    if height * width > LARGEST_PICTURE:
        raise ReadError(path, f"{width}x{height} pixels; at most {LARGEST_PICTURE / 1e6:.0f} million are allowed")


def check_clip(path: Path, count: int, frame: torch.Tensor) -> None:
    """Raises ReadError if `count` frames like this one would need too much memory."""
    if count * frame.nbytes > LARGEST_CLIP:
        size = f"{count} frames of shape {list(frame.shape)} take {count * frame.nbytes / 2**30:.1f} GiB"
        raise ReadError(path, f"{size}; at most {LARGEST_CLIP / 2**30:.0f} GiB are allowed")


class Reader:
    """An opened video with len(reader) frames. Opening and reading raise only ReadError.

    Subclasses define _open(), __len__() and either _pictures() or _frames().
    """

    def __init__(self, path: Path):
        self.path = path
        with as_read_error(path):
            self._open()

    def frames(self, indices: Iterable[int], transform: Transform | None = None) -> torch.Tensor:
        """The frames at these indices as uint8 [n, 3, H, W], or as [n, ...] with `transform` applied to each.

        `transform` is applied as soon as a frame is read, so that only one frame is in memory at full size.
        """
        with as_read_error(self.path):
            return self._frames([int(i) for i in indices], transform)

    def seconds(self, fps: float | None = None) -> np.ndarray:
        """The time at which each frame is shown, in seconds after the first. (frames,)

        Frame folders and tensors need their frame rate, `fps`. Raises ReadError without it.
        """
        if fps is None:
            raise ReadError(self.path, 'it stores no times: add "fps" (frames per second) to its row in metadata.jsonl')
        return np.arange(len(self)) / fps

    def part(self, segment: Segment | None) -> tuple[int, int]:
        """(index of the first frame, number of frames) of a segment, or of the whole video for None.

        Raises ReadError if no frame lies in the segment.
        """
        if segment is None:
            return 0, len(self)
        # times are fractions of a time base, so allow for rounding: by a microsecond, much less than a frame lasts
        times = self.seconds(segment.fps)
        first, after = np.searchsorted(times, [segment.start - 1e-6, segment.end - 1e-6])
        if first == after:
            cause = f"no frame between {segment.start:g} and {segment.end:g} s; its last one is at {times[-1]:.2f} s"
            raise ReadError(self.path, cause)
        return int(first), int(after - first)

    def _frames(self, indices: list[int], transform: Transform | None) -> torch.Tensor:
        # decode each frame once and in order, even if a short video repeats it
        positions: dict[int, list[int]] = {}
        for position, index in enumerate(indices):
            positions.setdefault(index, []).append(position)

        # the first frame sets the size that all others must have
        clip, size, first = None, None, 0
        for index, picture in self._pictures(sorted(positions)):
            check_picture(self.path, *picture.shape[:2])
            if size is None:
                size, first = picture.shape, index
            elif picture.shape != size:
                (h, w), (h0, w0) = picture.shape[:2], size[:2]
                raise ReadError(self.path, f"{self._name(index)} is {w}x{h} pixels, {self._name(first)} is {w0}x{h0}")
            frame = picture.permute(2, 0, 1)  # [C, H, W]
            frame = frame if transform is None else transform(frame[None])[0]

            # allocate once the size is known; channels_last is the layout of `picture`, which makes copying fast
            if clip is None:
                check_clip(self.path, len(indices), frame)
                layout = torch.channels_last if transform is None else torch.contiguous_format
                clip = torch.empty((len(indices), *frame.shape), dtype=frame.dtype, memory_format=layout)
            for position in positions[index]:
                clip[position] = frame
        return clip

    def _open(self) -> None:
        raise NotImplementedError

    def _pictures(self, indices: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields (index, uint8 [H, W, 3]) for ascending indices. An index may be yielded again to correct it."""
        raise NotImplementedError

    def _name(self, index: int) -> str:
        """What error messages call a frame."""
        return f"frame {index}"


# -- tensors and folders of frames ------------------------------------------------------------------


class TensorVideo(Reader):
    """A .pt file that contains one tensor [T, 3, H, W]: uint8, or floating point in [0, 1]."""

    def _open(self) -> None:
        try:
            with open_file(self.path) as file:
                check_tensor_file(self.path, file)
                video = torch.load(file, map_location="cpu", weights_only=True)
        except ReadError:
            raise
        except Exception as error:  # torch raises a dozen kinds, also for a pickle that is not a plain tensor
            raise ReadError(self.path, f"not a tensor saved with torch.save ({type(error).__name__})") from None
        self.video = self._checked(video)

    def _checked(self, video: Any) -> torch.Tensor:
        """The loaded object as uint8 [T, 3, H, W]. Raises ReadError if it is anything else."""
        if not isinstance(video, torch.Tensor):
            raise ReadError(self.path, f"expected a tensor, not a {type(video).__name__}")
        if video.layout != torch.strided or video.device.type != "cpu":  # sparse, or on the "meta" device without data
            raise ReadError(self.path, f"expected a dense CPU tensor, not {video.layout} on {video.device}")
        if video.ndim != 4 or video.shape[1] != 3 or 0 in video.shape:
            raise ReadError(self.path, f"expected a tensor [T, 3, H, W], not {list(video.shape)}")
        check_picture(self.path, *video.shape[2:])
        check_clip(self.path, len(video), video[0])

        # floats become uint8, the one pixel type that all readers return
        if video.dtype == torch.uint8:
            return video
        if not video.dtype.is_floating_point:
            raise ReadError(self.path, f"expected uint8 or floats in [0, 1], not {video.dtype}")
        video = video.float()
        if not (video.amin() >= 0 and video.amax() <= 1):  # written so that NaN fails too
            raise ReadError(self.path, "floating-point pixels must be in [0, 1]")
        return (video * 255).round().to(torch.uint8)

    def __len__(self) -> int:
        return len(self.video)

    def _frames(self, indices: list[int], transform: Transform | None) -> torch.Tensor:
        """Transforms all frames in one call, because they are already in memory."""
        chosen, positions = torch.tensor(indices), None
        if len(indices) > len(self.video):  # some frames repeat: transform each only once
            chosen, positions = chosen.unique(return_inverse=True)
        clip = self.video[chosen]  # [n, 3, H, W]
        clip = clip if transform is None else transform(clip)
        check_clip(self.path, len(indices), clip[0])
        return clip if positions is None else clip[positions]


def check_tensor_file(path: Path, file: BinaryIO) -> None:
    """Raises ReadError if a .pt file holds more than LARGEST_CLIP, also after unzipping (a zip bomb)."""
    size = file.seek(0, os.SEEK_END)
    if 1032 * size > LARGEST_CLIP and zipfile.is_zipfile(file):  # deflate compresses at most 1032 : 1
        with zipfile.ZipFile(file) as archive:
            size = max(size, sum(entry.file_size for entry in archive.infolist()))
    file.seek(0)
    if size > LARGEST_CLIP + 2**20:
        raise ReadError(path, f"it holds {size / 2**30:.1f} GiB; at most {LARGEST_CLIP / 2**30:.0f} GiB are allowed")


class FrameFolder(Reader):
    """A folder of images of the same size, in natural order (frame_2 before frame_10)."""

    def _open(self) -> None:
        self.images = list_images(self.path)
        if not self.images:
            raise ReadError(self.path, "no images in this folder")

    def __len__(self) -> int:
        return len(self.images)

    def _name(self, index: int) -> str:
        return self.images[index].name

    def _pictures(self, indices: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        return ((index, read_picture(self.images[index])) for index in indices)


def read_picture(file: Path) -> torch.Tensor:
    """Reads an image file as uint8 [H, W, 3]. Raises ReadError."""
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = LARGEST_PICTURE  # raises PIL's limit to ours
    with as_read_error(file), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns about size and damaged EXIF, torch about read-only arrays
        if not file.is_file():  # reading a FIFO would block
            raise ReadError(file, "no such file")
        with Image.open(file) as image:
            check_picture(file, image.height, image.width)
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode in ("I", "F"):
                raise ReadError(file, "32-bit grey values have no fixed range: convert it to 8 or 16 bit")
            if image.mode.startswith("I;16"):  # convert() would make everything above 255 white
                grey = (np.asarray(image) >> 8).astype(np.uint8)
                return torch.from_numpy(np.repeat(grey[..., None], 3, axis=2))
            return torch.from_numpy(np.asarray(image if image.mode == "RGB" else image.convert("RGB")))


# -- video files ------------------------------------------------------------------------------------

# what opening a file found out, by its path and stamp
INDEXES: dict[tuple[Path, str], tuple[array | None, array, int]] = {}


class VideoFile(Reader):
    """Any file that FFmpeg can decode, through PyAV. Frame i is the i-th frame that the decoder returns.

    Opening reads all packets once, without decoding, to learn the timestamps and keyframes. If these are reliable,
    frames() seeks to the last keyframe before each frame. Otherwise it decodes from the start and counts.
    """

    # codecs whose decoders can skip frames that no other frame is predicted from
    SKIPPING = frozenset({"h264", "mpeg4", "mpeg2video", "mpeg1video", "vp8"})

    def _open(self) -> None:
        self.container, self.stream = open_stream(self.path)
        self.started = False
        # segments of one file are read in any order, and reading all packets of a long one takes seconds
        key = (self.path, stamp(self.path))
        if key not in INDEXES:
            INDEXES[key] = self._index()
            while len(INDEXES) > 1 and (
                len(INDEXES) > INDEXED_FILES or sum(count for *_, count in INDEXES.values()) > INDEXED_FRAMES
            ):
                del INDEXES[next(iter(INDEXES))]  # the oldest
        self.times, self.keyframes, self.count = INDEXES[key]
        if not self.count:
            raise ReadError(self.path, "no frames in this file")

    def _index(self) -> tuple[array | None, array, int]:
        """(timestamps of the frames, or None if they are not reliable; those of the keyframes; number of frames)."""
        # keep only these three values per packet: the packets together are the whole file
        packets = [(p.pts, p.is_keyframe, p.is_discard) for p in self.container.demux(self.stream) if p.size]
        # a recording that starts between two keyframes: decoders return nothing of what is shown before the first one
        first = next((number for number, (_, is_key, _) in enumerate(packets) if is_key), 0)
        if first and (start := packets[first][0]) is not None:
            packets = [packet for packet in packets[first:] if packet[0] is None or packet[0] >= start]
        # a clip that was cut without re-encoding starts with frames that are decoded but never shown
        times = [time for time, _, hidden in packets if not hidden]
        # AVI stores no presentation times, so with B-frames the times of its packets are wrong
        ordered = self.container.format.name != "avi" and None not in times and len(set(times)) == len(times)
        if not ordered:
            return None, array("q"), len(times)
        keyframes = sorted(time for time, is_key, _ in packets if is_key and time is not None)
        return array("q", sorted(times)), array("q", keyframes), len(times)

    def __del__(self):
        # close now, not when the garbage collector runs: if decoding threads still exist when a loader forks a worker,
        # the worker crashes
        if hasattr(self, "container"):
            self.container.close()

    def __len__(self) -> int:
        return self.count

    def seconds(self, fps: float | None = None) -> np.ndarray:
        """The time at which each frame is shown, in seconds after the first. (frames,) Ignores `fps`."""
        # without reliable timestamps, assume a constant frame rate
        if self.times is not None:
            times = np.array(self.times, dtype=float) * float(self.stream.time_base)
            return times - times[0]
        return np.arange(self.count) / float(self.stream.average_rate or 25)

    def _pictures(self, indices: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        if self.times is None or not (yield from self._seek(indices)):
            yield from self._decode_all(indices)

    def _seek(self, indices: list[int]) -> Generator[tuple[int, torch.Tensor], None, bool]:
        """Yields frames found by timestamp. Returns False if the decoder's timestamps differ from the packets'."""
        # `position` is the timestamp of the last decoded frame
        decoded, position = iter(()), None
        targets = {self.times[index] for index in indices}
        use_cores(self.stream)
        for index in indices:
            # seek only if a keyframe lies between the current position and the target
            target = self.times[index]
            key = self.keyframes[max(0, bisect_right(self.keyframes, target) - 1)] if self.keyframes else self.times[0]
            if position is None or key > position + 1:
                self._start(key)
                decoded = self._jump(target, key, targets)

            # decode up to the target; overshooting it means that the timestamps are unreliable
            for frame in decoded:
                position = frame.pts if frame.pts is not None else target + 1
                if position >= target:
                    break
            if position != target:
                return False
            yield index, upright(frame)
        return True

    def _start(self, key: int) -> None:
        """Decodes the first packet of an H.264 file before the first seek to a later keyframe.

        The first packet contains the version of x264. FFmpeg needs it to reproduce the bugs of old versions; without it
        their 4:4:4 video decodes to garbage.
        """
        if self.stream.codec_context.name == "h264" and not self.started and key != (self.keyframes or self.times)[0]:
            self.container.seek(self.times[0], stream=self.stream, backward=True)
            next(self.container.demux(self.stream)).decode()
        self.started = True

    def _jump(self, target: int, key: int, targets: Set[int]) -> Iterator:
        """Decodes from `key` on, the last keyframe at or before `target`."""
        import av

        try:
            self.container.seek(target, stream=self.stream, backward=True)
        except av.FFmpegError:  # GIF cannot seek: open it again to start from the beginning
            self.container.close()
            self.container, self.stream = open_stream(self.path)
            return self._decoded(targets)

        # some files land on the keyframe after the target; seeking to the keyframe's own time then works
        decoded = self._decoded(targets)
        first = next(decoded, None)
        if first is None or (first.pts is not None and first.pts > target):
            self.container.seek(key, stream=self.stream, backward=True)
            return self._decoded(targets)
        return itertools.chain([first], decoded)

    def _decoded(self, targets: Set[int]) -> Iterator:
        """Yields decoded frames from here on. Where the codec allows it, those not in `targets` are skipped."""
        context = self.stream.codec_context
        can_skip = context.name in self.SKIPPING
        for packet in self.container.demux(self.stream):
            if can_skip:
                context.skip_frame = "DEFAULT" if packet.pts in targets else "NONREF"
            yield from packet.decode()

    def _decode_all(self, indices: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields frames found by counting from the start. Raises ReadError if the decoder ends too early."""
        missing = set(indices)
        container, stream = open_stream(self.path)
        with container:
            use_cores(stream)
            for index, frame in enumerate(container.decode(stream)):
                if index in missing:
                    missing.remove(index)
                    yield index, upright(frame)
                if not missing:
                    return
        raise ReadError(self.path, f"frame {min(missing)} of {self.count} cannot be decoded")


def open_stream(path: Path) -> tuple[Any, Any]:
    """(container, video stream) of a file. Raises ReadError if it has no video that can be decoded."""
    import av

    # the prefix keeps FFmpeg from taking a path for a URL: a folder may be named "http:". A video in a tar must not
    # make it open anything else either
    member = find_member(path)
    source, options = (f"file:{path}", {}) if member is None else (open_member(member), {"protocol_whitelist": "none"})
    container = av.open(source, options=options, metadata_errors="replace")
    if PLAYLISTS & {*container.format.name.split(",")}:
        raise ReadError(path, f"a list of other files ({container.format.name}), not a video")
    stream = container.streams.best("video")
    if stream is None:
        raise ReadError(path, "no video in this file")
    if stream.codec_context is None:
        raise ReadError(path, "this FFmpeg does not know its codec")
    check_picture(path, stream.codec_context.height, stream.codec_context.width)
    return container, stream


def use_cores(stream) -> None:
    """Turns on several decoding threads for large frames, where they pay off, unless this is a loader's worker: the
    workers already use all cores."""
    context = stream.codec_context
    if not context.is_open:
        alone = get_worker_info() is None and context.width * context.height >= LARGE
        stream.thread_type, stream.thread_count = "AUTO", 0 if alone else 1


def upright(frame) -> torch.Tensor:
    """A decoded frame as uint8 [H, W, C], rotated as the file's display matrix asks for. PyAV does not do it."""
    picture, turns = torch.from_numpy(frame.to_ndarray(format="rgb24")), frame.rotation // 90
    return torch.rot90(picture, turns) if turns % 4 else picture


# -- any path ---------------------------------------------------------------------------------------


def open_video(path: Path) -> Reader:
    """Opens a video of any kind. Raises ReadError if it is missing or cannot be read."""
    with as_read_error(path):
        member = find_member(path)
        if member is None and path.is_dir():
            return FrameFolder(path)
        if (regular_size(path) if member is None else member.size) == 0:
            raise ReadError(path, "the file is empty")
        return VideoFile(path) if is_video_file(path) else TensorVideo(path)


def is_video_file(path: Path) -> bool:
    """Whether open_video() decodes this path with FFmpeg: it is neither a tensor nor a folder of frames."""
    return path.suffix.lower() != ".pt" and not path.is_dir()


def regular_size(path: Path) -> int:
    """The bytes of a file. Raises ReadError for anything but a regular one."""
    with as_read_error(path):
        info = path.stat()
    if not stat.S_ISREG(info.st_mode):  # reading a FIFO would block, and a device never ends
        raise ReadError(path, "neither a file nor a folder")
    return info.st_size


def open_file(path: Path) -> BinaryIO:
    """The content of a file, or of a video in a tar. Raises ReadError."""
    with as_read_error(path):
        member = find_member(path)
        if member is not None:
            return open_member(member)
        regular_size(path)
        return path.open("rb")


def corner(frames: torch.Tensor) -> torch.Tensor:
    """One pixel of each frame: a Transform for callers that only check whether frames can be read."""
    return frames[..., :1, :1]


def digest(path: Path) -> str:
    """32 hex digits that identify a video by its content, wherever it is stored. Raises ReadError.

    The content is the whole file, or the names and contents of the images in a frame folder.
    """
    with as_read_error(path):
        if not path.is_dir():
            return file_digest(path).hex()
        # `person` and the length of each name keep different folders, or a file, from having the same digest
        whole = hashlib.blake2b(digest_size=16, person=b"frames")
        for image in FrameFolder(path).images:
            name = os.fsencode(image.name)
            whole.update(len(name).to_bytes(2, "big") + name + file_digest(image))
        return whole.hexdigest()


def file_digest(file: Path) -> bytes:
    """The 16-byte BLAKE2 digest of a file. Raises ReadError."""
    with as_read_error(file), open_file(file) as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).digest()


def stamp(path: Path) -> str:
    """32 hex digits that change whenever the file, or an image of the frame folder, is written. Raises ReadError.

    They are computed from names, sizes and times, without reading any content, so that checking many videos is fast.
    """
    with as_read_error(path):
        member = find_member(path)
        files = [] if member is not None else list_images(path) if path.is_dir() else [path]
        times: list[tuple[Any, ...]] = [] if member is None else [stamp_of(member)]
    for file in files:
        with as_read_error(file):
            info = file.stat()
        times.append((file.name, info.st_size, info.st_mtime_ns, info.st_ctime_ns))
    return hashlib.blake2b(repr(times).encode(), digest_size=16).hexdigest()


# -- folders ----------------------------------------------------------------------------------------


def natural_key(path: Path | str) -> tuple[list, str]:
    """A sort key that puts frame_2 before frame_10. The name itself comes last, so that 01 and 1 have a fixed order."""
    parts = re.split(r"0*([0-9]+)", str(path))  # text and digits alternate; digits compare by length, then by value
    return [(len(part), part) if i % 2 else part for i, part in enumerate(parts)], str(path)


def visible_entries(folder: Path) -> list[os.DirEntry]:
    """The entries of a folder without hidden files, in natural order. Raises ReadError."""
    with as_read_error(folder), os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: natural_key(e.name))


def kind_of(entry: os.DirEntry) -> str:
    """The kind of an entry ("folder", "video", "image", "tar" or "file"), or else the reason why it is ignored.

    A broken link counts as what its name says: if that is a video, it must be reported as missing.
    """
    try:
        if entry.is_dir():
            return "a system folder" if entry.name.lower() in SYSTEM_FOLDERS else "folder"
        if not entry.is_file() and os.path.exists(entry.path):
            return "a special file"  # reading a FIFO would block
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link to itself"
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in FILE_SUFFIXES:
        return "video"
    return "image" if suffix in IMAGE_SUFFIXES else "tar" if entry.name.endswith(".tar") else "file"


def list_images(folder: Path) -> list[Path]:
    """The images of a frame folder in natural order. Raises ReadError."""
    return [Path(entry.path) for entry in visible_entries(folder) if kind_of(entry) == "image"]


def find_videos(folder: Path) -> list[Path]:
    """All videos at or below `folder`, in natural order. Raises ReadError if a folder cannot be read."""
    return survey(folder)[0]


def survey(folder: Path) -> tuple[list[Path], list[str]]:
    """(the videos at or below `folder`, the ignored entries, each with the reason). Hidden files are not mentioned.

    A video is a video file or a .pt file, which may be in a tar, or a folder of frames. A folder of frames contains
    images, and no videos or folders. Every other folder is entered once, whatever links lead to it. Raises ReadError.
    """
    # a single file is its own survey
    if folder.suffix == ".tar" and folder.is_file():
        return survey_tar(folder)
    if not folder.is_dir():
        return [folder] * (folder.suffix.lower() in FILE_SUFFIXES), []

    # links may lead back up or in circles, so remember which folders were entered
    videos: list[Path] = []
    ignored: list[str] = []
    entered = {inode(parent) for parent in folder.resolve().parents}
    waiting = deque([folder])
    while waiting:
        current = waiting.popleft()
        if inode(current) in entered:
            ignored.append(f"{current} ({REPEATED})")
            continue
        entries = entries_by_kind(current, entered | {inode(current)}, ignored)
        if entries["image"] and not entries["video"] and not entries["folder"] and not entries["tar"]:
            videos.append(current)
            continue

        # metadata.jsonl and the like are expected in the top folder, but not further down
        entered.add(inode(current))
        videos += entries["video"]
        for found, others in map(survey_tar, entries["tar"]):
            videos += found
            ignored += others
        if current != folder:
            ignored += [f"{path} (not a video)" for path in entries["file"] + entries["image"]]

        # real folders before links: a folder that is reached both ways gets its real path
        for path in entries["folder"]:
            (waiting.append if os.path.islink(path) else waiting.appendleft)(path)
    return sorted(videos, key=natural_key), ignored


def survey_tar(shard: Path) -> tuple[list[Path], list[str]]:
    """(the videos in a tar, the ignored entries, each with the reason). Raises ReadError."""
    with as_read_error(shard):
        videos, ignored = list_videos(shard, FILE_SUFFIXES)
    return sorted(videos, key=natural_key), ignored


def inode(folder: Path) -> tuple[int, int]:
    """The identity of a folder, the same for all paths that lead to it. Raises ReadError."""
    with as_read_error(folder):
        info = folder.stat()
    return info.st_dev, info.st_ino


def entries_by_kind(folder: Path, entered: Set[tuple[int, int]], ignored: list[str]) -> dict[str, list[Path]]:
    """{"folder", "video", "image", "tar" or "file": paths} of the entries directly in a folder.

    Other entries, and links to folders already `entered`, are added to `ignored` with the reason.
    """
    groups: dict[str, list[Path]] = {"folder": [], "video": [], "image": [], "tar": [], "file": []}
    for entry in visible_entries(folder):
        path, kind = Path(entry.path), kind_of(entry)
        if kind == "folder" and entry.is_symlink() and inode(path) in entered:
            kind = REPEATED
        if kind in groups:
            groups[kind].append(path)
        else:
            ignored.append(f"{path} ({kind})")
    return groups
