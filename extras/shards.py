"""Videos in tar files, as WebDataset, video2dataset and tar write them, read in place.

    <data_dir>/train/000000.tar      jumping/a.mp4, and what describes it: jumping/a.json, jumping/a.cls, jumping/a.txt

All other modules call this video <data_dir>/train/000000.tar/jumping/a.mp4. Only this module opens tars: it indexes
their headers once, and then reads videos by offset, in any order. Nothing is extracted, names of members are never
opened as paths, and links are not followed.

A data folder at s3://, gs:// or hf:// is read in the same way if the user typed its URL. Nothing else is: no URL from
metadata or from a tar. Its tars are copied to a local folder as sparse files, with the headers and descriptions but not
the videos. A video is fetched from the URL every time it is read.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from tarfile import (
    GNUTYPE_LONGLINK,
    GNUTYPE_LONGNAME,
    GNUTYPE_SPARSE,
    SUPPORTED_TYPES,
    XGLTYPE,
    XHDTYPE,
    HeaderError,
    TarInfo,
)
from typing import Any, BinaryIO, NamedTuple

from script import UserError, cause_of, counted, make_folder, printable, replace_file, shown

BLOCK = 512  # bytes; headers and contents of a tar start at multiples of it
LARGEST_NOTE = 2**20  # bytes of a .json, .cls or .txt file, or of an extended header
LARGEST_FETCH = 2**30  # bytes of a video that is fetched as a whole
NOTES = (".json", ".cls", ".txt")
SCHEMES = ("s3", "gs", "hf", "memory")
FOLDERS = ("", "train", "val", "test")  # of a remote data folder
BESIDE = ("metadata.jsonl", "classes.json", "lexicon.json")
MOUNTED = "VIDTUNE_MOUNTED"  # environment variable: JSON {URL: the local folder that stands for it}
TYPED: set[str] = set()  # the URLs that the user typed


class Member(NamedTuple):
    """A file in a tar."""

    shard: Path
    name: str
    offset: int  # of its content
    size: int  # bytes


# -- the index --------------------------------------------------------------------------------------

# (members by name, entries that are ignored, each with the reason) of each shard, by its path, size and time
INDEXES: dict[tuple[str, int, int], tuple[dict[str, tuple[int, int]], list[str]]] = {}


def headers(file: BinaryIO, size: int) -> Iterator[tuple[TarInfo, int]]:
    """Yields (header, offset of the content) of each member of a tar of `size` bytes. Raises ValueError if damaged.

    tarfile itself only parses the blocks: it would keep all headers in memory, and hostile sizes make it run forever.
    """
    offset, longer = 0, {}
    while True:
        block = read_at(file, offset, BLOCK) if offset < size else b""
        if len(block) < BLOCK:
            raise ValueError("it has no end mark, so it was not written or copied completely")
        if block == bytes(BLOCK):
            return
        try:
            info = TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except HeaderError as error:
            raise ValueError(f"damaged at byte {offset} ({error})" if offset else "not an uncompressed tar") from None

        # an extended header describes the member that follows
        content = offset + BLOCK
        info.name, info.size = longer.get("path", info.name), longer.get("size", info.size)
        if info.size < 0 or info.type == GNUTYPE_SPARSE:
            raise ValueError(f"damaged or sparse at byte {offset}; sparse tars cannot be read")
        extended = info.type in (XHDTYPE, XGLTYPE, GNUTYPE_LONGNAME, GNUTYPE_LONGLINK)
        if not extended and info.type not in SUPPORTED_TYPES:  # GNU's incremental tars store times where names belong
            raise ValueError(f"an unknown kind of entry at byte {offset}; incremental tars cannot be read")
        has_content = info.isreg() or extended
        offset = content + (-(-info.size // BLOCK) * BLOCK if has_content else 0)
        if info.type in (XHDTYPE, GNUTYPE_LONGNAME):
            longer |= extension(file, info, content)
        elif info.type not in (XGLTYPE, GNUTYPE_LONGLINK):
            longer = {}
            yield info, content


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Up to `size` bytes of a file from `offset` on."""
    file.seek(offset)
    return file.read(size)


def extension(file: BinaryIO, info: TarInfo, content: int) -> dict[str, Any]:
    """{"path", "size"}, or one of them, that an extended header gives the next member. Raises ValueError."""
    if info.size > LARGEST_NOTE:
        raise ValueError(f"damaged at byte {content}: a header of {info.size} bytes")
    data = read_at(file, content, info.size)
    if info.type == GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    # records "LENGTH KEY=VALUE\n"; the length counts itself
    found: dict[str, Any] = {}
    while data.strip(b"\0"):
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length[:9]) <= len(data):
            raise ValueError(f"damaged at byte {content} (bad extended header)")
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if key.startswith(b"GNU.sparse"):
            raise ValueError("sparse tars cannot be read")
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode("utf-8", "surrogateescape") if key == b"path" else int(value[:20])
        data = data[int(length) :]
    return found


def index_of(shard: Path) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """({name: (offset, size)} of the files in a tar, the entries that are ignored). Raises ValueError, OSError."""
    info = os.stat(shard)
    key = (os.fspath(shard), info.st_size, info.st_mtime_ns)
    if key not in INDEXES:
        with shard.open("rb") as file:
            INDEXES[key] = collect(headers(file, info.st_size))
    return INDEXES[key]


def collect(found: Iterator[tuple[TarInfo, int]]) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """The index from the headers of a tar."""
    members: dict[str, tuple[int, int]] = {}
    ignored: list[str] = []
    for info, content in found:
        name = plain_name(info.name)
        if info.isdir() or any(part.startswith(".") for part in name.split("/")):
            continue
        if not info.isreg():
            ignored.append(f"{name} (a link or a device in a tar)")
        elif name in members:
            raise ValueError(f"{shown(name)} appears twice in it")
        elif name == BESIDE[0]:
            raise ValueError(f"it contains {BESIDE[0]}: put that beside it, with names like 000000.tar/a.mp4")
        else:
            members[name] = (content, info.size)
    return members, ignored


def plain_name(name: str) -> str:
    """The name of a member without "./". Raises ValueError if it would lead out of its tar."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise ValueError(f"it contains {shown(name)}, which would lie outside of it")
    return "/".join(parts)


def key_of(name: str) -> str:
    """What the files of one sample share: the name up to the first dot after the folders, as in WebDataset."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


# -- paths of members -------------------------------------------------------------------------------


def split_path(path: str | Path) -> tuple[Path, str] | None:
    """(the tar, the name of the member) of a path into a tar, None for any other path."""
    text, mark = os.fspath(path), f".tar{os.sep}"
    end = text.find(mark)
    while end >= 0:
        end += len(mark)
        if os.path.isfile(text[: end - 1]):
            return Path(text[: end - 1]), text[end:].replace(os.sep, "/")
        end = text.find(mark, end)
    return None


def find_member(path: str | Path) -> Member | None:
    """The member of a tar that a path names, None for any other path. Raises ValueError, OSError."""
    place = split_path(path)
    if place is None:
        return None
    members, _ = index_of(place[0])
    if place[1] not in members:
        raise ValueError(f"no such file in {place[0]}")
    return Member(*place, *members[place[1]])


def is_there(path: Path) -> bool:
    """Whether there is such a file, folder or member of a tar. Raises OSError and ValueError for impossible paths."""
    place = split_path(path)
    if place is not None:
        return place[1] in index_of(place[0])[0]
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def parts_below(path: Path, folder: Path) -> tuple[str, ...]:
    """The parts of a path below a folder, without the tar that it may be in. So a tar can replace its contents."""
    parts, place = Path(os.path.relpath(path, folder)).parts, split_path(path)
    if place is None:
        return parts
    member = len(parts) - place[1].count("/") - 1  # where the parts of its name in the tar start
    return parts[: max(0, member - 1)] + parts[member:]


def list_videos(shard: Path, suffixes: set[str]) -> tuple[list[Path], list[str]]:
    """(the paths of the videos in a tar, the entries that are ignored). Raises ValueError, OSError."""
    members, ignored = index_of(shard)
    videos: dict[str, str] = {}
    for name in members:
        if os.path.splitext(name)[1].lower() in suffixes:
            if other := videos.get(key_of(name)):
                raise ValueError(
                    f"{shown(other)} and {shown(name)} in it have the same key; WebDataset ends it at a dot"
                )
            videos[key_of(name)] = name
    notes = {key + suffix for key in videos for suffix in NOTES}
    foreign = [f"{name} (not a video)" for name in members if name not in notes and videos.get(key_of(name)) != name]
    return [shard / name for name in videos.values()], [f"{shard}/{text}" for text in ignored + foreign]


def read_notes(path: Path) -> list[dict[str, Any]]:
    """The rows that describe a video in a tar, like those of metadata.jsonl but without file_name: from .json one or
    several, for segments; from .cls the label, from .txt the caption. [] without such files or for any other path.

    Raises UserError.
    """
    place = split_path(path)
    if place is None:
        return []
    shard, key = place[0], key_of(place[1])
    members, _ = index_of(shard)
    found = {
        suffix: read_note(shard, key + suffix, *members[key + suffix]) for suffix in NOTES if key + suffix in members
    }
    if not found:
        return []

    # the fields of .json win; a tar may set neither file_name nor video_digest
    own = {"label": found[".cls"].strip()} if ".cls" in found else {}
    own |= {"caption": found[".txt"].strip()} if found.get(".txt", "").strip() else {}
    try:
        rows = json.loads(found.get(".json", "{}"), strict=False)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shard}/{key}.json: not JSON ({error})") from None
    rows = rows if isinstance(rows, list) else [rows]
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{shard}/{key}.json: expected an object, or a list of objects, one for each segment")
    merged = [own | {k: v for k, v in row.items() if v is not None and k != "video_digest"} for row in rows]
    return [{k: v for k, v in row.items() if k != "label" or "labels" not in row} for row in merged]


def read_note(shard: Path, name: str, offset: int, size: int) -> str:
    """The text of a description. Raises UserError if it is too long or not UTF-8."""
    try:
        if size > LARGEST_NOTE:
            raise ValueError(f"{size} bytes; at most {LARGEST_NOTE} are allowed")
        with shard.open("rb") as file:
            return read_at(file, offset, size).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {shard}/{name}: {cause_of(error)}") from None


# -- contents ---------------------------------------------------------------------------------------


class Slice(io.RawIOBase):
    """The content of a member, for reading."""

    def __init__(self, member: Member):
        self.member, self.at = member, 0
        self.file = os.open(member.shard, os.O_RDONLY)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + (0, self.at, self.member.size)[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        # pread, because forked processes share the position of the file
        count = max(0, min(len(buffer), self.member.size - self.at))
        data = os.pread(self.file, count, self.member.offset + self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self.file)
        super().close()


def open_member(member: Member) -> BinaryIO:
    """The content of a member, from its tar or from the URL that the tar's folder stands for. Raises ValueError and
    whatever a file system raises."""
    for url, folder in mounted().items():
        if member.shard.is_relative_to(folder):
            if member.size > LARGEST_FETCH:
                raise ValueError(f"{member.size / 2**30:.1f} GiB; at most {LARGEST_FETCH / 2**30:.0f} are fetched")
            system, root = connect(url)
            address = f"{root}/{member.shard.relative_to(folder).as_posix()}"
            data = system.cat_file(address, start=member.offset, end=member.offset + member.size)
            if len(data) < member.size:
                raise ValueError(f"{url} has changed since this process was started")
            return io.BytesIO(data)
    return io.BufferedReader(Slice(member), 2**16)


def stamp_of(member: Member) -> tuple[Any, ...]:
    """What changes whenever the tar of a member is written."""
    info = os.stat(member.shard)
    return (member.name, member.offset, member.size, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


# -- remote folders ---------------------------------------------------------------------------------


def is_url(text: str) -> bool:
    """Whether an option is the URL of a remote data folder."""
    return text.partition("://")[0] in SCHEMES and "://" in text


def data_folder(typed: str, output_dir: str) -> Path:
    """The folder that --data_dir names. A remote one gets a local folder in --output_dir, with all but the videos.

    Raises UserError if it cannot be read, or if the user did not type its URL now.
    """
    if not is_url(typed):
        return Path(typed)
    if typed in mounted():
        return Path(mounted()[typed])
    if typed not in TYPED:
        raise UserError(f"{typed} is only read when given as a flag: add --data_dir {typed}")
    folder = Path(output_dir).absolute() / ".shards" / hashlib.sha256(typed.encode()).hexdigest()[:16]
    try:
        copy_remote(typed, folder)
    except UserError:
        raise
    except Exception as error:  # each file system raises errors of its own
        raise UserError(f"cannot read {typed}: {type(error).__name__}: {cause_of(error)}") from None
    # in the environment, so that worker processes know it however they are started
    os.environ[MOUNTED] = json.dumps(mounted() | {typed: os.fspath(folder)})
    return folder


def mounted() -> dict[str, str]:
    """{URL: the local folder that stands for it}."""
    return json.loads(os.environ.get(MOUNTED, "{}"))


def connect(url: str) -> tuple[Any, str]:
    """(the file system of a URL, the path in it). Raises UserError without the package that it needs."""
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url} needs another package: {cause_of(error)}") from None
    return system, path.rstrip("/")


def copy_remote(url: str, folder: Path) -> None:
    """Copies tars without their videos, and metadata, from a URL; of tars that were copied before only changed ones."""
    from fsspec.utils import tokenize
    from tqdm import tqdm

    system, root = connect(url)
    found: dict[Path, dict[str, Any]] = {}
    for name in FOLDERS:
        try:
            entries = system.ls(f"{root}/{name}".rstrip("/"), detail=True)
        except FileNotFoundError:
            continue
        for entry in entries:
            base = entry["name"].rsplit("/", 1)[-1]
            if entry["type"] == "file" and (base.endswith(".tar") or base in BESIDE) and not base.startswith("."):
                found[folder / name / base] = entry
    shards = [path for path in found if path.suffix == ".tar"]
    if not shards:
        raise UserError(f"no tar files in {url}, nor in train/, val/ and test/ there")
    for path, entry in tqdm(found.items(), desc="reading tar headers", unit="file", leave=False):
        make_folder(path.parent)
        version = path.with_name(f".{path.name}.version")
        now = tokenize({k: str(v) for k, v in entry.items()})
        if not path.exists() or not version.exists() or version.read_text() != now:
            replace_file(path, lambda new, entry=entry: copy_file(system, entry, new))
            replace_file(version, lambda new, now=now: new.write_text(now))
    for path in {path for name in FOLDERS for path in (folder / name).glob("[!.]*.*")} - {*found}:
        path.unlink(missing_ok=True)
    print(printable(f"{url}: {counted(len(shards), 'tar file')}; copies without the videos are in {folder}"))


def copy_file(system: Any, entry: dict[str, Any], new: Path) -> None:
    """Copies one remote file; of a tar only headers and descriptions, the rest are holes, which take no disk space."""
    with system.open(entry["name"], "rb") as source, new.open("wb") as target:
        if new.suffix != ".tar":
            target.write(source.read())
            return
        target.truncate(entry["size"])
        copy = Copying(source, target)
        try:
            for info, content in headers(copy, entry["size"]):
                if info.isreg() and info.name.endswith(NOTES) and info.size <= LARGEST_NOTE:
                    read_at(copy, content, info.size)
        except ValueError as error:
            raise UserError(f"cannot read {entry['name']}: {error}") from None


class Copying:
    """Reads a file, and writes what it reads to the same place of another one."""

    def __init__(self, source: BinaryIO, target: BinaryIO):
        self.source, self.target = source, target

    def seek(self, offset: int) -> None:
        self.source.seek(offset)
        self.target.seek(offset)

    def read(self, size: int) -> bytes:
        data = self.source.read(size)
        self.target.write(data)
        return data
