"""Shared by the campaigns: forks of a process that has imported everything, verdicts on their outcomes, tiny data and
runs, and the final table."""

import argparse
import faulthandler
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn

import yaml

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parents[2]
MAX_LINE = 5000  # characters
GOOD = {0, 1, 2, 130, 143}  # exit statuses
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters but tab and newline
BAR = re.compile(r"\r[^\r\n]*\d+/[\d?]+ \[[^\r\n]*\]|\r {4,}\r")  # tqdm's
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 2**63)
MORE_MEMORY = 6 << 30  # bytes that a fork may ask for beyond what it inherits
FAMILIES = ("bert", "gpt2", "timesformer", "videomae")
IMPORTED = [f"transformers.models.{name}.modeling_{name}" for name in FAMILIES]
IMPORTED += ["transformers.models.auto", "peft", "matplotlib.figure", "accelerate.utils", "feature_cache", "figures"]
IMPORTED += ["extras.controls", "inference", "main", "metrics", "convert_dataset"]
TINY = "--image_size 32 --num_frames 4 --batch_size 4 --dropout 0.3"


def warm_up() -> None:
    """Imports what the forks need, so that a case costs no import. Nothing is computed here: threads do not survive
    a fork."""
    import torch

    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)


# -- one case, one process --------------------------------------------------------------------------


class Process:
    """A fork that runs body() in `folder`, or python with the arguments `body`, in a session of its own.

    `status` is its exit status, the negative number of the signal that ended it, or None for a hang.
    """

    def __init__(self, body: Callable[[], int | None] | list[str], folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115, open as long as this is
        self.status: int | None = None
        self.ended, self.started = False, time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._child(body, folder)

    def _child(self, body: Callable[[], int | None] | list[str], folder: Path) -> NoReturn:
        status = 1
        try:
            os.setsid()
            os.chdir(folder)
            for number, log in enumerate((open(os.devnull), *self.logs)):  # noqa: SIM115
                os.dup2(log.fileno(), number)
            if isinstance(body, list):
                os.execv(sys.executable, [sys.executable, *body])
            limit_memory()
            status = body() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def poll(self) -> bool:
        """Returns whether it has ended."""
        if not self.ended:
            pid, code = os.waitpid(self.pid, os.WNOHANG)
            self.ended = pid != 0
            self.status = os.waitstatus_to_exitcode(code) if self.ended else None
        return self.ended

    def wait(self, limit: float = 1800, until: Callable[[], bool] = lambda: False) -> "Process":
        """Waits until it ends or `until` returns True. After `limit` seconds without either it is killed as a hang."""
        while not self.poll() and not until():
            if time.monotonic() - self.started > limit:
                self.kill()
                self.status = None
                break
            time.sleep(0.001)
        return self

    def kill(self) -> None:
        """SIGKILL for this process only; its workers live on, as after the OOM killer."""
        if not self.poll():
            os.kill(self.pid, signal.SIGKILL)
            while not self.poll():
                time.sleep(0.001)

    def close(self) -> None:
        """Kills the processes that it left behind."""
        self.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    @property
    def out(self) -> str:
        return os.pread(self.logs[0].fileno(), 200_000, 0).decode(errors="replace")

    @property
    def err(self) -> str:
        return BAR.sub("", os.pread(self.logs[1].fileno(), 200_000, 0).decode(errors="replace"))


def limit_memory() -> None:
    """Keeps a fork from using all memory."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MORE_MEMORY,) * 2)


def script(name: str, flags: str | Sequence[str]) -> Callable[[], int]:
    """A body that runs the main(argv) of a script."""
    return lambda: importlib.import_module(name).main(flags.split() if isinstance(flags, str) else [*flags])


def unwanted(status: int | None, out: str, err: str) -> str:
    """What is wrong with the way a script ended; "" if nothing."""
    errors = re.findall(r"^error:.*", err, re.MULTILINE)
    if status is None:
        return "hang"
    if "Traceback (most recent call last)" in err:
        return "traceback"
    if status not in GOOD:
        return f"exit status {status}"
    if STEERING.search(out + err):
        return "control characters"
    if len(errors) > 1 or (status == 2 and len(errors) != 1):
        return f"{len(errors)} error lines"
    return "long message" if max(map(len, [*out.splitlines(), *err.splitlines(), ""])) > MAX_LINE else ""


# -- many cases, one process ------------------------------------------------------------------------

Judge = Callable[[int], tuple[str, str]]  # number of a case -> (ok, refused, or what was unwanted; text)


def judge_many(count: int, judge: Judge, folder: Path, limit: int, memory_mb: int) -> Iterator[tuple[int, str, str]]:
    """(number, verdict, text) of every case; a fork handles cases until one crashes it, takes `limit` seconds, or makes
    it larger than `memory_mb`. `folder` is its working directory, emptied behind every case."""
    done = 0
    while done < count:
        read, write = os.pipe()
        first, last = done, min(count, done + 200)
        process = Process(lambda: judge_some(range(first, last), judge, write, limit, memory_mb), folder)  # noqa: B023
        os.close(write)
        with os.fdopen(read, encoding="utf-8") as lines:
            for line in lines:
                try:
                    yield tuple(json.loads(line))
                except GeneratorExit:  # time is up
                    process.close()
                    raise
                done += 1
        process.wait(limit=float("inf"))
        if process.status != 0:  # it died with case `done`
            verdict = "hang" if "Timeout (" in process.err else "crash"
            yield done, verdict, f"status {process.status}\n{process.err[-8000:]}"
            done += 1
        process.close()
        shutil.rmtree(folder, ignore_errors=True)


def judge_some(numbers: range, judge: Judge, pipe: int, limit: int, memory_mb: int) -> None:
    faulthandler.enable()
    for number in numbers:
        faulthandler.dump_traceback_later(limit, exit=True)
        before = peak_mb()
        try:
            verdict, text = judge(number)
        except Exception:
            verdict, text = "exception", traceback.format_exc()
        large = peak_mb() > max(memory_mb, before)
        if large:
            verdict, text = "memory", f"{peak_mb():.0f} MB\n{text}"
        os.write(pipe, json.dumps([number, verdict, text[-20_000:]]).encode() + b"\n")
        faulthandler.cancel_dump_traceback_later()
        for path in Path.cwd().iterdir():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()
        if large:
            return


def peak_mb(who: int = resource.RUSAGE_SELF) -> float:
    return resource.getrusage(who).ru_maxrss / 1024


def run_here(name: str, argv: str | Sequence[str]) -> tuple[int | None, str, str]:
    """(status, stdout, stderr) of a script's main(argv) in this process; an exception is in stderr."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            status = script(name, argv)()
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
            status = 1
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode(errors="replace") for stream in streams)
    return status, out, BAR.sub("", err)


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """The data with flipped bits; with pieces lost, zeroed, repeated, or replaced by extreme numbers or parts of
    `others`; or with one of `others` appended."""
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + int(len(data) ** rng.random()))
    kind, piece, other, changed = rng.randrange(10), data[start:end], rng.choice(others), bytearray(data)
    cut = rng.randrange(len(other) + 1)
    if kind < 3:
        for _ in range(int(30 ** rng.random()) if data else 0):
            changed[rng.randrange(len(data) if kind else min(200, len(data)))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    number = rng.choice(NUMBERS).to_bytes(8, "big")[-rng.choice((1, 2, 4, 8)) :]
    end = start + len(number) if kind == 6 else end
    new = [b"", bytes(len(piece)), piece * int(2 + 20 ** rng.random()), number, other[cut:], other + piece]
    return data[:start] + [*new, data[end:] + other][kind - 3] + (data[end:] if kind < 9 else b"")


# -- the table --------------------------------------------------------------------------------------


class Tally:
    """Counts outcomes, keeps unwanted ones and prints the table."""

    def __init__(self, about: str, count: int, argv: list[str] | None = None):
        parser = argparse.ArgumentParser(description=about)
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--count", type=int, default=count)
        parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after these, with fewer cases")
        parser.add_argument("--keep", type=Path, help="folder for unwanted cases; default: a temporary one")
        args = parser.parse_args(argv)
        self.seed, self.total, self.keep = args.seed, args.count, args.keep
        self.counts, self.signatures = Counter(), Counter()
        self.started = time.monotonic()
        self.until = self.started + 60 * args.minutes
        self.shown = self.started
        sys.path.insert(0, str(ROOT))
        os.environ["PYTHONPATH"] = str(ROOT)

    def time_is_up(self) -> bool:
        return time.monotonic() > self.until

    def rng(self, number: int) -> random.Random:
        """The random generator of one case."""
        return random.Random(f"{self.seed} {number}")

    def add(self, kind: str, text: str = "", case: str = "", bad: bool = True) -> Path | None:
        """Counts a case. For an unwanted one, keeps its text and returns the folder for its input."""
        self.counts[kind] += 1
        if time.monotonic() > self.shown + 60:
            self.shown = time.monotonic()
            print(f"{(self.shown - self.started) / 60:.0f} minutes: {dict(self.counts)}", flush=True)
        if not bad:
            return None
        self.signatures[f"{kind}: {signature(text)}"] += 1
        print(f"{dict(self.counts)} {case}: {kind}: {signature(text)}", flush=True)
        self.keep = self.keep or Path(tempfile.mkdtemp(prefix="campaign_"))
        folder = self.keep / re.sub(r"\W+", "_", f"{kind} {case}")[:80]
        folder.mkdir(parents=True, exist_ok=True)
        report = f"seed {self.seed}, case {case}: {kind}\n\n{text}\n"
        (folder / "what.txt").write_text(report, encoding="utf-8", errors="backslashreplace")
        return folder

    def finish(self, *expected: str) -> int:
        """Prints the table, the `expected` rows first; 1 if anything unwanted was seen."""
        rows = [*expected, *sorted(self.counts.keys() - set(expected))]
        print(f"\n{'tried':<22}{sum(self.counts[k] for k in rows if not k.startswith('+')):>8,}")
        for name in rows:
            print(f"{name:<22}{self.counts[name]:>8,}")
        peak = peak_mb(resource.RUSAGE_CHILDREN)
        print(f"{'peak MB':<22}{peak:>8,.0f}\n{'minutes':<22}{(time.monotonic() - self.started) / 60:>8.1f}")
        for text, count in self.signatures.most_common(40):
            print(f"{count:>6} x {text}")
        if self.signatures:
            print(f"unwanted cases are in {self.keep}/")
        return int(bool(self.signatures))


def signature(text: str) -> str:
    """One line that is equal for cases with the same cause: the exception and our innermost line, or the first line."""
    places = re.findall(rf'File "{re.escape(str(ROOT))}/(?!tests)([^"]+)", line (\d+)', text)
    places = [f" at {file}:{line}" for file, line in places if not file.startswith(".venv")]
    places = places[::-1] if "most recent call first" in text else places
    errors = re.findall(r"^(\w[\w.]*(?:Error|Exception|Interrupt|Warning|Found)\b.*)", text, re.MULTILINE)
    line = errors[-1] if errors else next(iter(text.strip().splitlines()), "")
    return re.sub(r"0x[0-9a-f]+|\d+", "N", re.sub(r"/\S+/", "", line))[:110] + (places[-1] if places else "")


@contextmanager
def scratch() -> Generator[Path]:
    """A temporary folder, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="campaign_scratch_")).resolve()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- data and runs ----------------------------------------------------------------------------------


def tiny_data(folder: Path, form: str = "pt", per_class: int = 6) -> Path:
    """Three classes of 16 px videos."""
    flags = f"--classes 3 --videos_per_class {per_class} --val_per_class 1 --test_per_class 2 --frames 8 --size 16 --format {form}"
    finished("dummy_data", f"{flags} --output {folder}", folder.parent)
    return folder


def finished(name: str, flags: str, folder: Path) -> Process:
    """Runs a script in `folder` to its end. It must succeed."""
    process = Process(script(name, flags), folder).wait(600)
    process.close()
    assert process.status == 0, process.out + process.err
    return process


PASSING = {"seconds", "seconds_per_epoch", "clips_per_second", "peak_mb", "device"}  # differ between equal runs
PLACE = {"overwrite", "resume", "run_name", "num_workers", "cache_dir"}  # options that may differ in config.yaml


def contents(run: Path) -> dict[str, Any]:
    """Every file that equal runs share, without times and memory; pictures by name only."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = path.relative_to(run).as_posix()
        if path.suffix == ".png":
            found[name] = "a picture"
        elif name == "config.yaml":
            found[name] = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k not in PLACE}
        elif name in ("log.jsonl", "metrics.json"):
            rows = path.read_text().splitlines() if name == "log.jsonl" else [path.read_text()]
            found[name] = [{k: v for k, v in json.loads(row).items() if k not in PASSING} for row in rows]
        else:
            found[name] = path.read_bytes()
    return found


def differences(run: Path, reference: dict[str, Any]) -> list[str]:
    """The names of files that are missing, additional or different compared to the reference."""
    try:
        mine = contents(run)
    except (ValueError, OSError, AttributeError) as error:
        return [f"unreadable: {error}"]
    wrong = [f"lacks {name}" for name in reference.keys() - mine.keys()]
    wrong += [f"has {name}" for name in mine.keys() - reference.keys()]
    return sorted(wrong + [f"other {n}" for n in mine.keys() & reference.keys() if mine[n] != reference[n]])


def leftovers(folder: Path) -> list[str]:
    """Temporary and lock files below a folder."""
    pattern = re.compile(r"\.tmp|\.lock$|\.partial$")
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if pattern.search(p.name)]
