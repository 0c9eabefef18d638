"""The file of answers that inference writes: one JSON object a line, locked, continued where it ended."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Config, options_with
from script import FileLock, UserError, replace_file

if TYPE_CHECKING:
    from VLoader import Sample


@dataclass(frozen=True)
class Job:
    """One answer to give: for a video, or with --timeline for `times` (start, end) of it."""

    sample: "Sample"
    path: str  # see locate
    times: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, float | None]:
        return self.path, self.times.get("start")


def locate(path: str | Path, folder: str | Path) -> str:
    """A video's absolute path, the same from every working directory and by every name of `folder`, --video_dir.

    Links below the folder are not followed: two links to one video are two videos.
    """
    root = folder if os.path.isdir(folder) else os.path.dirname(folder)
    below = os.path.relpath(path, root or os.curdir)
    if below.split(os.sep)[0] == os.pardir:  # metadata.jsonl may name any place
        return os.path.abspath(path)
    return os.path.normpath(os.path.join(os.path.realpath(root), below))


def list_jobs(samples: list["Sample"], folder: str, seconds: float) -> tuple[list[Job], list[dict[str, Any]]]:
    """(what is to be answered, rows of the videos that could not be cut into windows)."""
    jobs = [Job(sample, locate(sample.path, folder)) for sample in samples]
    if not seconds:
        return jobs, []
    from tqdm import tqdm

    from VLoader import split_into_windows

    parts, failed = [], []
    for job in tqdm(jobs, desc="lengths", unit="video", leave=False):
        try:
            windows = split_into_windows(job.sample, seconds)
            parts += [Job(part, job.path, {"start": start, "end": end}) for part, start, end in windows]
        except UserError as error:
            failed.append({"file": str(job.sample.path), "path": job.path, "error": str(error)})
    return parts, failed


def fingerprint_answers(run_dir: Path, config: Config) -> str:
    """Of all that an answer depends on beside its video: the run's weights and the options in force."""
    from checkpoint import WEIGHTS

    names = options_with("changes_answers")
    digest = hashlib.sha256((run_dir / WEIGHTS).read_bytes())
    digest.update(repr([getattr(config, name) for name in names]).encode())
    return f"{run_dir.name} {digest.hexdigest()[:12]}"


def begun(path: Path, run: str, folder: str) -> dict[tuple[str, float | None], dict[str, Any]]:
    """The answers that a file of answers holds already, by Job.key; errors in it, answers that stand twice, and a last
    line cut short are dropped. Rows without a `path` are resolved against the working directory.

    Raises UserError if the file is not one of answers by the same run with the same options.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = text.split("\n")  # not splitlines: captions may hold other ends of line
    good: dict[tuple[str, float | None], dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            made_by = row["run"]
            key = row["path"] if "path" in row else locate(row["file"], folder), row.get("start")
            fresh = "error" not in row and key not in good
        except (ValueError, KeyError, TypeError, RecursionError):
            if number == len(lines) and is_torn(line, begun=number > 1):
                break
            raise UserError(
                f"--output {path}, line {number} is no answer of this program; choose another file"
            ) from None
        if made_by != run:
            raise UserError(
                f"--output {path} holds answers of another run or with other options ({made_by}, this is {run}); "
                "remove it or choose another file"
            )
        if fresh:
            good[key] = row
    kept = "".join(map(as_line, good.values()))
    if kept != text:
        replace_file(path, lambda p: p.write_text(kept, encoding="utf-8"))
    return good


def is_torn(line: str, begun: bool) -> bool:
    """Whether a last line that is no row is what a killed run left behind the rows before it, or nothing at all."""
    start = '{"file": '
    return not line or (begun and (line.startswith(start) or start.startswith(line)))


def as_line(row: dict[str, Any]) -> str:
    # a file's name that is no text becomes JSON's own escape
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


@contextmanager
def open_output(
    path: Path | None, run: str, folder: str
) -> Generator[tuple[dict[tuple[str, float | None], dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    """(the answers that --output holds already, what appends a row to it).

    A file is locked and goes on where it ended; a pipe or a device takes the rows as they come.
    Raises UserError if it cannot be written, is in use by another process, or is no file of answers by this run.
    """
    if path is None:
        yield {}, lambda row: None
        return
    done = {}
    with ExitStack() as stack:
        if path.exists() and os.path.samestat(path.stat(), os.fstat(1)):  # opened anew, it would be written over
            sys.stdout.flush()
            file = os.dup(1)
        elif path.exists() and not path.is_file():
            file = open_rows(path, getattr(os, "O_NONBLOCK", 0))  # a pipe that nobody reads is not waited for
            os.set_blocking(file, True)
        else:
            path = Path(os.path.realpath(path))
            if not path.parent.is_dir():
                raise UserError(f"--output: cannot write {path}: there is no folder {path.parent}")
            stack.enter_context(FileLock(path.with_name(f".{path.name}.lock"), f"--output {path}"))
            done = begun(path, run, folder)
            file = open_rows(path, os.O_CREAT | os.O_APPEND)
        stack.callback(os.close, file)
        yield done, partial(append_row, file, path)


def open_rows(path: Path, flags: int) -> int:
    try:
        return os.open(path, os.O_WRONLY | flags, 0o666)
    except OSError as error:
        raise UserError(f"--output: cannot write {path}: {error.strerror}") from None


def append_row(file: int, path: Path, row: dict[str, Any]) -> None:
    """Writes a row at once and whole, or takes back what was written of it and raises UserError."""
    data, written = as_line(row).encode("utf-8"), 0
    try:
        while written < len(data):
            written += os.write(file, data[written:])
    except BrokenPipeError:  # its reader has seen enough
        raise
    except OSError as error:
        if path.is_file():
            os.ftruncate(file, os.fstat(file).st_size - written)
        raise UserError(f"--output: cannot write {path}: {error.strerror}") from None
