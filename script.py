"""What all scripts share: one-line errors, exit status, atomic file writes, locks. Imports no torch.

A script ends with

    @script
    def main(argv=None): ...
    if __name__ == "__main__": leave(main())
"""

import argparse
import atexit
import ctypes
import gc
import json
import os
import platform
import re
import reprlib
import shutil
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

# fail with one line here; an older Python would fail later with a traceback
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("error: vidtune needs Python 3.11 or newer, this is {}.{}".format(*sys.version_info[:2]))

try:
    import fcntl
except ImportError:  # Windows has no fcntl, so runs are not locked there
    fcntl = None

MAX_MESSAGE = 4000  # characters of an error that are printed
# control characters, line separators, text direction marks, and surrogates (bytes of a file name that are not UTF-8)
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


# -- messages ---------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can fix. Scripts print it as one line, `error: ...`, and exit with status 2.

    Each of the `details` is printed on its own line below.
    """

    def __init__(self, message: str, details: Sequence[str] = ()):
        super().__init__(message)
        self.details = details


def printable(text: object) -> str:
    """The text with control characters escaped, so that file names and captions cannot control the terminal."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def cause_of(error: Exception) -> str:
    """What went wrong. For an OSError, without its number and its path: our messages name the path themselves."""
    return str(getattr(error, "strerror", None) or error)


def counted(count: int, noun: str, plural: str = "") -> str:
    """`1 video`, `2 videos`; `plural` for nouns that do not just add an s."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def shown(value: object) -> str:
    """repr(value), shortened to fit in a message."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    short.maxlevel = 2
    return short.repr(value)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of printing its usage and exiting."""

    def error(self, message: str):
        raise UserError(message)


def is_main() -> bool:
    """Whether this is the only process, or rank 0 under torchrun."""
    return int(os.environ.get("RANK", 0)) == 0


def script(main: Callable[..., int | None]) -> Callable[..., int]:
    """Makes main(argv) return an exit status, however it ends.

    A UserError, or a file that cannot be read or written, becomes one line on stderr and exit status 2. Under torchrun
    only rank 0 prints to stdout.
    """

    @wraps(main)
    def main_with_status(argv: list[str] | None = None) -> int:
        # file names may not be valid UTF-8; printing them must not fail
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")

        # main() itself returns 0 or 1; 2 is a user's mistake, 130 is what shells report for Ctrl-C
        try:
            with nullcontext() if is_main() else silence():
                status = main(argv) or 0
            sys.stdout.flush()  # raises here, not at exit, if the disk is full
            return status
        except UserError as error:
            return print_error(str(error), error.details)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader closed the pipe, as `head` does
            discard_output()
            return 1
        except MemoryError:
            return print_error("out of memory")
        except OSError as error:
            discard_output()
            return print_error(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
        finally:
            gc.unfreeze()  # a program that calls main() goes on; see freeze_objects()

    return main_with_status


@contextmanager
def silence() -> Generator[None]:
    """Drops what is printed to stdout, and progress bars."""
    os.environ["TQDM_DISABLE"] = "1"
    with open(os.devnull, "w", encoding="utf-8") as devnull, redirect_stdout(devnull):
        yield


def print_error(message: str, details: Sequence[str] = ()) -> int:
    """Prints the error to stderr. Returns 2, the exit status for it."""
    print(f"error: {printable(message)[:MAX_MESSAGE]}", file=sys.stderr)
    for line in details:
        print(printable(line), file=sys.stderr)
    return 2


def discard_output() -> None:
    """Drops buffered output that cannot be written (full disk, closed pipe); Python would try again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


ENDING: list[int] = []  # the exit status, once leave() was called


def leave(status: int) -> NoReturn:
    """Exits with this status, without freeing torch and transformers object by object, which takes time."""
    gc.freeze()  # otherwise the garbage collector visits all objects once more
    ENDING.append(status)
    sys.exit(status)


@atexit.register  # before torch is imported, so it runs last: after threads, worker processes and log files are closed
def end_process() -> None:
    if ENDING:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ENDING[0])


@contextmanager
def gc_disabled() -> Generator[None]:
    """Turns garbage collection off during imports. Imported objects all stay alive, and scanning them again and again
    takes as long as importing torch."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def freeze_objects() -> None:
    """Exempts all objects made so far from garbage collection until the script ends. Imports and the model make nearly
    a million, which stay alive anyway, and later passes of the collector would visit them again and again."""
    gc.freeze()


# -- the machine ------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Makes glibc keep the memory of freed tensors smaller than 16 MB.

    By default glibc returns these pages to the system, which maps and zeroes them again in the next step. On a CPU that
    takes up to a fifth of a step. Larger blocks are still returned, because keeping them would fragment memory. Does
    nothing with other C libraries. Source: mallopt(3).
    """
    # both must be set: glibc returns memory at the end of the heap (trim), and blocks that it mapped one by one (mmap)
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 2**24)
        libc.mallopt(trim_threshold, 2**31 - 1)


# -- files ------------------------------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    """Creates the folder and its parents. Raises UserError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: the name contains a NUL
        raise UserError(f"cannot create the folder {folder}: {cause_of(error)}") from None


def temporary(path: Path) -> Path:
    """The temporary folder next to `path` in which this process writes the file."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls write(temporary path), then renames the result to `path`.

    So `path` is always complete, the old file or the new one, even if several processes write it. The file is written
    in a temporary folder next to `path`: if the process is killed, remove_leftovers() later removes this folder with
    everything in it, including the temporary files of libraries such as safetensors.
    Raises UserError if the file cannot be written.
    """
    # safetensors raises an error class of its own for a full disk; only writers need it, so import it here
    from safetensors import SafetensorError

    # write in the same file system, because a rename is atomic only there
    folder = temporary(path)
    try:
        folder.mkdir(exist_ok=True)
        write(folder / path.name)
        give_default_mode(folder / path.name)
        # the contents must reach the disk before the rename does: a power cut could leave an empty file otherwise
        with (folder / path.name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(folder / path.name, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {cause_of(error)}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def give_default_mode(file: Path) -> None:
    """Gives a file the permissions that other new files get. safetensors lets only the owner read its files, so that
    nobody else could use a run on a shared disk."""
    file.chmod(file.parent.stat().st_mode & 0o666)


def is_temporary(path: Path) -> bool:
    """Whether replace_file() or a library made this as a temporary file or folder."""
    # .NAME.MACHINE.PROCESS.tmp of replace_file(), .tmp and six letters of safetensors
    return re.fullmatch(r"(?s)\.(.*\.)?tmp|\.tmp\w{6}", path.name) is not None


def remove_leftovers(folder: Path, owned: bool = False) -> None:
    """Removes temporary files that killed processes left in a folder.

    By default only those directly in the folder, of processes of this machine that have ended. With `owned`, which
    means that this process holds the folder's lock, all of them at any depth.
    """
    # the name contains the machine and the process that wrote the file
    for path in [*(folder.rglob(".*tmp*") if owned else folder.glob(".*.tmp"))]:
        writer = re.search(rf"\.{re.escape(platform.node())}\.(\d+)\.tmp$", path.name)
        if is_temporary(path) and (owned or (writer and not is_running(int(writer[1])))):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether a process with this id exists on this machine."""
    try:
        os.kill(process, 0)  # signal 0 only checks
    except ProcessLookupError:
        return False
    except OSError:  # it exists but belongs to another user
        return True
    return True


def write_json(values: Any, path: Path) -> None:
    """Writes a JSON file, indented. Raises UserError if it cannot be written."""
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    # bytes of a file name that are not UTF-8 become JSON escapes: "\\udcff"
    replace_file(path, lambda p: p.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes a JSON Lines file, one object per line. Raises UserError if it cannot be written."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_file(path, lambda p: p.write_text(text, encoding="utf-8", errors="backslashreplace"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file written by write_rows()."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# -- locks ------------------------------------------------------------------------------------------


class FileLock:
    """An exclusive lock until release() or the end of this process. `what` names the locked thing in error messages.

    It is a POSIX record lock (fcntl(2)) on the file `path`. The system drops it when the process ends, even by SIGKILL.
    Unlike a lock of flock(2), forked children such as a loader's workers do not inherit it. The file contains the name
    of the owner; release() removes it.

    Raises:
        UserError: another process or this one holds the lock. The message names the owner.
        FileNotFoundError: the folder of `path` does not exist.
    """

    # (process, path) of the locks of this process: fcntl would grant a process its own lock a second time
    held: set[tuple[int, str]] = set()  # noqa: RUF012

    def __init__(self, path: Path, what: str):
        self.path, self.key = path, (os.getpid(), os.path.realpath(path))
        # check our own locks first, because fcntl would not refuse
        if self.key in self.held:
            raise UserError(f"{what} is in use by this process")
        try:
            self.file = self._acquire(what)
            # the error message of other processes quotes this line
            os.ftruncate(self.file, 0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            os.pwrite(self.file, f"process {os.getpid()} on {platform.node()} since {since}".encode(), 0)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(f"cannot lock {what}: {path}: {error.strerror}") from None
        self.held.add(self.key)

    def _acquire(self, what: str) -> int:
        """Opens and locks the file; returns its descriptor."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if fcntl is not None:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = os.pread(file, 200, 0).decode(errors="replace") or "another process"
                os.close(file)
                raise UserError(f"{what} is in use by {holder}") from None
            # if the last owner removed the file after we opened it, no other process can see our lock: try again
            if os.path.exists(self.path) and os.path.samestat(os.fstat(file), os.stat(self.path)):
                return file
            os.close(file)

    def move_with(self, folder: Path, target: Path) -> None:
        """Renames the folder that contains the lock file and keeps the lock. Raises OSError if the target exists."""
        os.rename(folder, target)
        self.held.discard(self.key)
        self.path = target / self.path.name
        self.key = (self.key[0], os.path.realpath(self.path))
        self.held.add(self.key)

    def release(self) -> None:
        """Releases the lock. Does nothing if it is already released, or in a forked child, which does not hold it."""
        if self.key not in self.held or self.key[0] != os.getpid():
            return
        self.held.discard(self.key)
        self.path.unlink(missing_ok=True)
        os.close(self.file)

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
