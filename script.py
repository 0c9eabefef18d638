"""What every script shares: errors in one line, exit status, files written completely or not at all, locks. No torch.

def main(argv=None): return run_script(run, argv)       # run(argv) does the work
if __name__ == "__main__": leave(main())
"""

import argparse
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
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

if sys.version_info < (3, 11):  # noqa: UP036, one line instead of a traceback
    sys.exit("error: vidtune needs Python 3.11 or newer, this is {}.{}".format(*sys.version_info[:2]))

try:
    import fcntl
except ImportError:  # Windows: no locks there
    fcntl = None

LONGEST_MESSAGE = 4000  # characters of an error that are printed
#: control characters, line separators, text direction marks, and bytes of a file name that are not text
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


# -- messages ---------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can fix. Scripts print it as one line, `error: ...`, and exit with status 2. `details`
    are printed below, one line each."""

    def __init__(self, message: str, details: Sequence[str] = ()):
        super().__init__(message)
        self.details = details


def printable(text: object) -> str:
    """The text with control characters escaped: file names and captions must not control the terminal."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def shown(value: object) -> str:
    """repr(value), shortened to fit into a message."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    short.maxlevel = 2
    return short.repr(value)


class Parser(argparse.ArgumentParser):
    """argparse, with errors as UserError."""

    def error(self, message: str):
        raise UserError(message)


def is_main() -> bool:
    """Whether this is the only process, or the first that torchrun started."""
    return int(os.environ.get("RANK", 0)) == 0


def run_script(run: Callable[[list[str] | None], int | None], argv: list[str] | None) -> int:
    """Calls run(argv) and returns the exit status; a UserError, or a file that cannot be read or written, becomes one
    line on stderr and exit status 2. Under torchrun only the first process prints."""
    if is_main():
        return run_and_catch(run, argv)
    os.environ["TQDM_DISABLE"] = "1"
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        return run_and_catch(run, argv)


def run_and_catch(run: Callable[[list[str] | None], int | None], argv: list[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):  # file names may not be valid UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # every way a script can end, as an exit status: 0 and 1 are run()'s own, 2 is the user's mistake
    try:
        status = run(argv) or 0
        sys.stdout.flush()  # a full disk shows here, not at exit
        return status
    except UserError as error:
        return print_error(str(error), error.details)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        return print_error("out of memory")
    except OSError as error:
        if sys.stdout.errors is not None:
            discard_output()
        return print_error(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")


def print_error(message: str, details: Sequence[str] = ()) -> int:
    print(f"error: {printable(message)[:LONGEST_MESSAGE]}", file=sys.stderr)
    for line in details:
        print(printable(line), file=sys.stderr)
    return 2


def discard_output() -> None:
    """Drops what stdout still holds if it cannot be written (a full disk): Python would try again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave(status: int) -> NoReturn:
    """Exits the program."""
    gc.freeze()  # else the garbage collector visits all of torch and transformers once more
    sys.exit(status)


@contextmanager
def collector_off() -> Generator[None]:
    """Turns garbage collection off, for imports: their objects all stay, and visiting these again and again takes as
    long as importing torch."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# -- the machine ------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Makes glibc keep the memory of freed tensors below 16 MB. By default it returns the pages to the system, which
    maps and zeroes them again for the next step: up to a fifth of a step on a CPU. Larger tensors are still returned,
    because they would fragment memory. Other C libraries are left alone.

    Source: mallopt(3).
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 2**24)
        libc.mallopt(trim_threshold, 2**31 - 1)


# -- files ------------------------------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    """Makes the folder and its parents. Raises UserError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"cannot make the folder {folder}: {getattr(error, 'strerror', None) or error}") from None


def temporary(path: Path) -> Path:
    """The folder next to `path` in which this process writes it."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls write(temporary path) and renames the result to `path`, which is therefore always complete: the old file or
    the new one, even if several processes write it.

    The temporary file has a folder of its own next to `path`. What a library leaves there when it is killed, such as
    safetensors' own temporary file, is found and removed later. Raises UserError if the file cannot be written.
    """
    from safetensors import SafetensorError

    folder = temporary(path)
    try:
        folder.mkdir(exist_ok=True)
        write(folder / path.name)
        # the contents must be on disk before the name points to them: a power cut may reorder the two
        with (folder / path.name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(folder / path.name, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_temporary(path: Path) -> bool:
    """Whether this is a temporary file of replace_file or of a library."""
    return path.name.startswith(".") and (
        path.name.endswith(".tmp") or re.fullmatch(r"\.tmp\w{6}", path.name) is not None
    )


def remove_leftovers(folder: Path, owned: bool = False) -> None:
    """Removes what killed processes were writing to a folder: directly in it, and only from dead processes of this
    machine. If this process has `owned` the folder by a lock, everything below it, whoever wrote it."""
    # the name says which process wrote it, and on which machine
    for path in [*(folder.rglob(".*tmp*") if owned else folder.glob(".*.tmp"))]:
        writer = re.search(rf"\.{re.escape(platform.node())}\.(\d+)\.tmp$", path.name)
        if is_temporary(path) and (owned or (writer and not is_running(int(writer[1])))):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs as another user
        return True
    return True


def write_json(values: Any, path: Path) -> None:
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    # bytes of a file name that are not text become JSON escapes: "\\udcff"
    replace_file(path, lambda p: p.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes one JSON object per line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_file(path, lambda p: p.write_text(text, encoding="utf-8", errors="backslashreplace"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that write_rows wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# -- locks ------------------------------------------------------------------------------------------


class FileLock:
    """Keeps other processes away from `what`, a folder or a file, until release() or the end of this process.

    It is a POSIX record lock (fcntl(2)) on a file of its own. The system drops it when the process ends, even by
    SIGKILL. Unlike a lock of flock(2), it is not inherited by forked children such as a loader's workers. The file
    names the owner and is removed by release().

    Raises UserError naming the owner if another process, or this one, has the lock; FileNotFoundError if the folder of
    the file does not exist.
    """

    held: set[tuple[int, str]] = set()  # noqa: RUF012, (process, path): fcntl grants a process its own lock again

    def __init__(self, path: Path, what: str):
        self.path, self.key = path, (os.getpid(), os.path.realpath(path))
        if self.key in self.held:
            raise UserError(f"{what} is in use by this process")
        try:
            self.file = self._acquire(what)
            # whoever is refused reads here whom to wait for
            os.ftruncate(self.file, 0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            os.pwrite(self.file, f"process {os.getpid()} on {platform.node()} since {since}".encode(), 0)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(f"cannot lock {what}: {path}: {error.strerror}") from None
        self.held.add(self.key)

    def _acquire(self, what: str) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if fcntl is not None:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = os.pread(file, 200, 0).decode(errors="replace") or "another process"
                os.close(file)
                raise UserError(f"{what} is in use by {holder}") from None
            # if the last owner removed the file after we opened it, nobody else can see our lock: try again
            if os.path.exists(self.path) and os.path.samestat(os.fstat(file), os.stat(self.path)):
                return file
            os.close(file)

    def move_with(self, folder: Path, target: Path) -> None:
        """Renames the folder of the lock's file and keeps the lock. Raises OSError if the target exists."""
        os.rename(folder, target)
        self.held.discard(self.key)
        self.path = target / self.path.name
        self.key = (self.key[0], os.path.realpath(self.path))
        self.held.add(self.key)

    def release(self) -> None:
        """Releases the lock. Does nothing in a forked child, which never had it, or when called again."""
        if self.key not in self.held or self.key[0] != os.getpid():
            return
        self.held.discard(self.key)
        self.path.unlink(missing_ok=True)
        os.close(self.file)

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
