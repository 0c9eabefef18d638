"""Shares work among processes, on one machine or on several with a shared folder. Needs no server.

A job is cut into named pieces. A process claims a piece, works on it, and writes the result:

    <folder>/plan          identifies the job; processes with other data or options are refused
             <name>.1      the first claim of a piece; its owner keeps rewriting it while it works
             <name>.2      the second claim, made after the first had not changed for the length of a lease
             <name>.jsonl  the result of the piece, which is then done

A claim expires once another process has seen it unchanged for longer than the lease, by its own monotonic clock. So the
clocks of two machines are never compared. Any process may then make the next claim. The file is created exclusively,
so only one process succeeds. Its former owner may still be alive, for example if it was stopped for a while. Then both
do the piece. That costs time but no correctness: the same piece has the same result, which is renamed into place whole.
"""

import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from script import UserError, cause_of, counted, make_folder, remove_leftovers, temporary, write_rows

PLAN = "plan"
END = "end"  # the name of the last piece, which one process does when all others are done
RELEASED = "released"  # content of a claim that its owner gave up
RENEWALS = 4  # per lease
MAX_WAIT = 0.5  # seconds between two looks at the claims of others

State = tuple[int, str]  # the number of the last claim of a piece, 0 for none, and what it contains


def join(folder: Path, plan: str) -> None:
    """Makes the folder of a job, or joins the processes that work there. Raises UserError if theirs is another plan."""
    while (theirs := read_plan(folder)) != plan:
        if theirs is not None:
            raise UserError(
                f"{folder} belongs to processes with other videos, weights or options: wait until they have finished, "
                "or remove the folder if none of them runs"
            )
        make_job(folder, plan)


def read_plan(folder: Path) -> str | None:
    """The plan of the job in a folder, None if there is no job."""
    with suppress(FileNotFoundError):
        return (folder / PLAN).read_text(encoding="utf-8")
    return None


def make_job(folder: Path, plan: str) -> None:
    """Makes the folder of a job under a temporary name and renames it, so that it appears with its plan. Does nothing
    if another process was faster."""
    make_folder(folder.parent)
    remove_leftovers(folder.parent)
    new = temporary(folder)
    try:
        new.mkdir(exist_ok=True)
        (new / PLAN).write_text(plan, encoding="utf-8")
        with suppress(FileExistsError):
            rename_folder(new, folder)
    except OSError as error:
        raise UserError(f"cannot create the folder {folder}: {cause_of(error)}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def rename_folder(folder: Path, target: Path) -> None:
    """Renames a folder. Raises FileExistsError if the target exists; systems differ in what they raise then."""
    try:
        os.rename(folder, target)
    except OSError:
        if os.path.lexists(target):
            raise FileExistsError(str(target)) from None
        raise


def remove_job(folder: Path) -> None:
    """Removes the folder of a finished job. Other processes see all of it vanish at once, and know that it is done."""
    moved = temporary(folder)
    with suppress(FileNotFoundError):  # another process was faster
        os.rename(folder, moved)
    shutil.rmtree(moved, ignore_errors=True)


def share(
    folder: Path,
    names: Sequence[str],
    lease: float,
    work: Callable[[str], list[dict[str, Any]]],
    finish: Callable[[], Callable[[], None]],
) -> bool:
    """Works on a job with all other processes that call this for the same folder; returns when the job is finished.

    `work(name)` returns the rows of a piece, which become <folder>/<name>.jsonl. When all pieces are done, one of the
    processes calls `finish()`, which may read them, and returns a function that writes the result. Then the folder is
    removed. All three must give the same result whichever process calls them, and may be called again after a process
    was killed.

    `lease` is in seconds. Returns whether this process wrote the result.
    """
    finished = []

    def end(_: str) -> list[dict[str, Any]]:
        with pieces.unless_over():
            write = finish()
            if not pieces.is_over():
                write()
                finished.append(True)
        return []

    pieces = Pieces(folder, lease)
    pieces.do(names, work)
    pieces.do([END], end)
    if not pieces.is_over():
        remove_job(folder)
    return bool(finished)


class Pieces:
    """The pieces of one job, as one process sees them."""

    def __init__(self, folder: Path, lease: float):
        self.folder, self.lease, self.plan = folder, lease, read_plan(folder)
        self.watched: dict[str, tuple[State, float]] = {}  # name: (its last state, when that was seen first)
        self.told = False

    def do(self, names: Sequence[str], work: Callable[[str], list[dict[str, Any]]]) -> None:
        """Does the pieces that no other process does, until all of `names` are done."""
        left = [*names]
        while left:
            others = []
            for name in left:
                if self.is_done(name):
                    continue
                claim = self.claim(name)
                if claim is None:
                    others.append(name)
                else:
                    self.do_one(name, claim, work)
            left = [name for name in others if not self.is_done(name)]
            if left:
                self.wait(left)

    def is_done(self, name: str) -> bool:
        """Whether the result of a piece is there, or the job has been finished by others."""
        return (self.folder / f"{name}.jsonl").exists() or self.is_over()

    def is_over(self) -> bool:
        """Whether others have finished the job; another one may have begun in the same folder."""
        return self.plan is None or read_plan(self.folder) != self.plan

    def claim(self, name: str) -> int | None:
        """Claims a piece that nobody holds. Returns the descriptor of the new claim, None if it was not possible."""
        state, now = self.state(name), time.monotonic()
        if state[1] != RELEASED:
            seen, since = self.watched.get(name, (None, 0.0))
            if state != seen:
                self.watched[name] = (state, now)
                return None
            if now - since <= self.lease:
                return None
        # exclusive creation is atomic, on NFS too since version 3
        with suppress(FileExistsError, FileNotFoundError):  # another process was faster, or the job is finished
            return os.open(self.folder / f"{name}.{state[0] + 1}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        return None

    def state(self, name: str) -> State:
        """The number and content of the last claim of a piece; (0, RELEASED) without one."""
        number = 0
        while (self.folder / f"{name}.{number + 1}").exists():
            number += 1
        try:
            return number, (self.folder / f"{name}.{number}").read_text(encoding="utf-8") if number else RELEASED
        except FileNotFoundError:  # the job is finished
            return number, ""

    def do_one(self, name: str, claim: int, work: Callable[[str], list[dict[str, Any]]]) -> None:
        """Works on a claimed piece and writes its result."""
        with renewed(claim, self.lease / RENEWALS):
            rows = work(name)
            with self.unless_over():
                if not self.is_over():
                    write_rows(rows, self.folder / f"{name}.jsonl")

    @contextmanager
    def unless_over(self) -> Generator[None]:
        """Ignores errors of a process that was so late that others have finished the job and removed its folder."""
        try:
            yield
        except (UserError, OSError):
            if not self.is_over():
                raise

    def wait(self, left: list[str]) -> None:
        """Waits before the next look at pieces that other processes hold."""
        if not self.told:
            self.told = True
            count = counted(len(left), "piece")
            print(
                f"waiting for {count} of other processes; one that dies is replaced after {self.lease:g} s", flush=True
            )
        time.sleep(min(MAX_WAIT, self.lease / RENEWALS))


@contextmanager
def renewed(claim: int, seconds: float) -> Generator[None]:
    """Rewrites a claim every so many seconds until the end of the block, and closes it. After an error the claim is
    released, so that others need not wait until it expires."""

    # the descriptor stays open: should another process hold the next claim by now, this one is only written in vain
    def write(text: str) -> None:
        with suppress(OSError):
            os.ftruncate(claim, 0)
            os.pwrite(claim, text.encode(), 0)
            os.fsync(claim)  # so that other machines see it

    def renew() -> None:
        count = 0
        while not ended.wait(seconds):
            count += 1
            write(f"{owner}, renewed {counted(count, 'time')}")

    owner = f"process {os.getpid()} on {platform.node()}"
    ended = threading.Event()
    thread = threading.Thread(target=renew, daemon=True)
    write(owner)
    thread.start()
    failed = True
    try:
        yield
        failed = False
    finally:
        ended.set()
        thread.join()
        if failed:
            write(RELEASED)
        os.close(claim)
