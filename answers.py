"""The answers of inference: which ones to compute, whether they are right, and the file that --output names.

That file has one JSON object per line. It is locked while it is written, and an unfinished one is continued. With
--shared True several processes compute its rows: see share_answers().
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Config, options_with
from extras.claims import join, share
from extras.multilabel import are_right
from extras.reject import NONE, Rule
from metrics import Lexicon, exact_matches, right_attributes
from script import FileLock, UserError, counted, printable, read_rows, replace_file

if TYPE_CHECKING:
    from VLoader import Sample

AnswerKey = tuple[str, float | None, float | None, str | None]  # path, start, end, question
MAX_ANSWER = 1000  # characters of an answer that are printed; the file holds all of it
PIECE = 64  # answers that a process computes at a time with --shared True

# -- what is to be answered -------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One answer to compute: for a video, a segment of it, or with --timeline a window of it."""

    sample: "Sample"
    path: str  # identifies the video, see absolute_path
    times: dict[str, float] = field(default_factory=dict)  # start and end of the segment or window in seconds
    error: str = ""  # why the video could not be split into windows

    @property
    def key(self) -> AnswerKey:
        """Identifies the answer in the file."""
        return self.path, self.times.get("start"), self.times.get("end"), self.sample.question


def absolute_path(path: str | Path, folder: str | Path) -> str:
    """A video's absolute path, the same from every working directory and for every way to write `folder`, --video_dir.

    Links below the folder are not followed: two links to one video are two videos.
    """
    root = folder if os.path.isdir(folder) else os.path.dirname(folder)
    below = os.path.relpath(path, root or os.curdir)
    if below.split(os.sep)[0] == os.pardir:  # metadata.jsonl may name files outside the folder
        return os.path.abspath(path)
    return os.path.normpath(os.path.join(os.path.realpath(root), below))


def list_jobs(samples: list["Sample"], folder: str, seconds: float, stride: float = 0) -> list[Job]:
    """A job for every sample, or for every window of `seconds` if that is not 0, see split_into_windows(). They are in
    the order of the videos."""
    if not seconds:
        return [Job(sample, absolute_path(sample.path, folder), sample.times) for sample in samples]
    from tqdm import tqdm

    from VLoader import split_into_windows

    # the windows of a video say nothing about its segments, and belong to none of them; each question is asked once
    whole: dict[tuple[Path, str | None], Sample] = {}
    for sample in samples:
        unknown = {"segment": None, "label": None, "labels": None, "captions": (), "objects": ()}
        unknown = {} if sample.segment is None else unknown
        whole.setdefault((sample.path, sample.question), replace(sample, **unknown))
    jobs = [Job(sample, absolute_path(sample.path, folder)) for sample in whole.values()]
    parts = []
    for job in tqdm(jobs, desc="lengths", unit="video", leave=False):
        try:
            windows = split_into_windows(job.sample, seconds, stride)
            parts += [Job(part, job.path, {"start": start, "end": end}) for part, start, end in windows]
        except UserError as error:
            parts.append(replace(job, error=str(error)))
    return parts


def fingerprint_answers(
    run_dir: Path, config: Config, rule: Rule | None = None, thresholds: dict[str, float] | None = None
) -> str:
    """Identifies everything that an answer depends on besides its video: the run's weights, the options, the rule that
    says which videos are answered, and the thresholds of several labels."""
    from checkpoint import WEIGHTS

    names = options_with("changes_answers")
    digest = hashlib.sha256((run_dir / WEIGHTS).read_bytes())
    digest.update(repr([getattr(config, name) for name in names]).encode())
    for value in (rule, thresholds):
        if value is not None:
            digest.update(repr(value).encode())
    return f"{run_dir.name} {digest.hexdigest()[:12]}"


# -- what an answer says ----------------------------------------------------------------------------


def is_right(
    answer: dict[str, Any], sample: "Sample", display_names: dict[str, str], lexicon: Lexicon | None
) -> bool | None:
    """Whether an answer is right. None if the truth is not known, or "none of these" is the answer; for captions, if
    there is no lexicon."""
    # the answer to a question
    if "answer" in answer:
        return bool(exact_matches([answer["answer"]], [sample.captions])[0]) if sample.captions else None

    # a caption is right if it names all attributes of the video
    if "caption" in answer:
        if lexicon is None or not sample.has_attributes(lexicon):
            return None
        return right_attributes(answer["caption"], sample.objects, lexicon)["all"]

    # several labels
    if "labels" in answer:
        return are_right(answer, sample, display_names)

    # the folder of a video may have the label or its display name; any other folder says nothing about its class
    if sample.label is None or "error" in answer or answer["label"] is None:
        return None
    if sample.label in display_names:
        return sample.label == answer["label"]
    return sample.label == display_names[answer["label"]] if sample.label in display_names.values() else None


def find_lexicon(video_dir: Path) -> Lexicon | None:
    """The lexicon of the dataset; --video_dir is the dataset or one of its splits."""
    from VLoader import read_lexicon

    return read_lexicon(video_dir) or read_lexicon(video_dir.absolute().parent)


def short_name(path: str | Path, folder: str) -> str:
    """A video's path below --video_dir, which may be the video itself."""
    relative = os.path.relpath(path, folder)
    return printable(Path(path).name if relative == os.curdir else relative)


def answer_line(name: str, answer: dict[str, Any]) -> str:
    """What is printed for an answer to the video `name`."""
    text = answer.get("caption", answer.get("error"))  # a caption may be empty
    if "answer" in answer:
        text = f"{answer['question']}  {answer['answer']}"
    if text is None:
        best = answer.get("labels", answer.get("top_k", [answer]))
        text = "  ".join(f"{top['name']} {100 * top['score']:.1f} %" for top in best) or "no label"
        text = f"{answer['name']}  ({text})" if answer.get("name") == NONE else text
    times = f"{answer['start']:.1f}-{answer['end']:.1f} s  " if "start" in answer else ""
    mark = {None: "", True: "  right", False: "  WRONG"}[answer.get("right")]
    return printable(f"{name}  {times}{text[:MAX_ANSWER]}{mark}")


# -- the file of answers ----------------------------------------------------------------------------


def key_of_answer(row: dict[str, Any], folder: str) -> AnswerKey:
    """The Job.key of the job that a row answers. Raises KeyError or TypeError if it is no answer."""
    video = row["path"] if "path" in row else absolute_path(row["file"], folder)
    return video, row.get("start"), row.get("end"), row.get("question")


def read_answers(path: Path, run: str, folder: str, shared: bool = False) -> dict[AnswerKey, dict[str, Any]]:
    """The answers in an unfinished file, by Job.key; {} if there is no such file.

    Drops errors, duplicates, segments merged from windows, and a last line that was cut short, also from the file. The
    paths in files of earlier versions, which have no `path`, are taken relative to the working directory. If other
    processes read the file too (`shared`), it stays as it is, and errors count as answers.

    Raises UserError if the file holds anything but answers of the same run with the same options.
    """
    # parse row by row; only the last line may be broken, because a killed run may have left it so
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = text.split("\n")  # not splitlines: captions may contain other line separators
    answers: dict[AnswerKey, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row_run = row["run"]
            key = key_of_answer(row, folder)
            usable = (shared or "error" not in row) and row.get("segment") is not True and key not in answers
        except (ValueError, KeyError, TypeError, RecursionError):
            if number == len(lines) and is_cut_short(line, first=number == 1):
                break
            raise UserError(f"--output {path}: line {number} is not an answer; choose another file") from None

        # answers of different weights or options must not be mixed
        if row_run != run:
            raise UserError(
                f"--output {path} holds answers of another run or with other options ({row_run}, this is {run}); "
                "remove it or choose another file"
            )
        if usable:
            answers[key] = row

    # a video that could not be read is tried again, so its row goes
    kept = "".join(map(as_line, answers.values()))
    if kept != text and not shared:
        replace_file(path, lambda p: p.write_text(kept, encoding="utf-8"))
    return answers


def is_cut_short(line: str, first: bool) -> bool:
    """Whether a last line that cannot be parsed is empty, or the beginning of a row. If it is the `first` line too, it
    more likely belongs to somebody else's file."""
    start = '{"file": '
    return not line or (not first and (line.startswith(start) or start.startswith(line)))


def as_line(row: dict[str, Any]) -> str:
    """A row as JSON. Bytes of a file name that are not UTF-8 become JSON's own escapes."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


@contextmanager
def open_output(
    path: Path | None, run: str, folder: str
) -> Generator[tuple[dict[AnswerKey, dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    """Yields (the answers that --output already has, a function that appends a row to it).

    A file is locked and continued; a pipe or a device gets the rows as they come.
    Raises UserError if it cannot be written, is in use by another process, or holds anything but answers of this run.
    """
    # no --output: rows are dropped
    if path is None:
        yield {}, lambda row: None
        return
    done = {}
    with ExitStack() as stack:
        # stdout was redirected to the same file: a second descriptor would overwrite what is printed
        if path.exists() and os.path.samestat(path.stat(), os.fstat(1)):
            sys.stdout.flush()
            file = os.dup(1)

        # a pipe or a device: O_NONBLOCK raises an error instead of waiting for a reader that may never come
        elif path.exists() and not path.is_file():
            file = open_rows(path, getattr(os, "O_NONBLOCK", 0))
            os.set_blocking(file, True)

        # a file, new or unfinished
        else:
            path = Path(os.path.realpath(path))
            if not path.parent.is_dir():
                raise UserError(f"--output: cannot write {path}: there is no folder {path.parent}")
            stack.enter_context(lock_output(path))
            if (parts := parts_of(path)).exists():
                raise UserError(
                    f"--output {path}: add --shared True to join the processes that write {parts}, or remove it"
                )
            done = read_answers(path, run, folder)
            file = open_rows(path, os.O_CREAT | os.O_APPEND)
        stack.callback(os.close, file)
        yield done, partial(append_row, file, path)


def open_rows(path: Path, flags: int) -> int:
    """A file descriptor for writing."""
    try:
        return os.open(path, os.O_WRONLY | flags, 0o666)
    except OSError as error:
        raise UserError(f"--output: cannot write {path}: {error.strerror}") from None


def append_row(file: int, path: Path, row: dict[str, Any]) -> None:
    """Writes a whole row at once; if that fails, removes what was written of it and raises UserError."""
    data, written = as_line(row).encode("utf-8"), 0
    try:
        while written < len(data):
            written += os.write(file, data[written:])
    except BrokenPipeError:  # the reader closed the pipe: no error, the script ends quietly
        raise
    except OSError as error:
        if path.is_file():
            os.ftruncate(file, os.fstat(file).st_size - written)
        raise UserError(f"--output: cannot write {path}: {error.strerror}") from None


def lock_output(path: Path) -> FileLock:
    """Locks the file of answers. Raises UserError naming the process that holds the lock."""
    return FileLock(path.with_name(f".{path.name}.lock"), f"--output {path}")


# -- several processes with one file of answers -----------------------------------------------------


def parts_of(path: Path) -> Path:
    """The folder in which several processes put their answers until all are there."""
    return path.with_name(f"{path.name}.parts")


def share_answers(
    config: Config,
    run: str,
    jobs: list[Job],
    compute: Callable[[list[Job]], Iterable[dict[str, Any]]],
    merge: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Computes the answers that --output does not have yet, together with all other processes that do the same.

    `compute` yields one row per job. The process that comes last writes the rows of all in the order of the jobs, and
    the segments that `merge` makes of them: the file that a single process would write. It gets the rows, the others
    []. Errors in an unfinished file are kept. Raises UserError like open_output().
    """
    if config.output is None or (os.path.exists(config.output) and not os.path.isfile(config.output)):
        raise UserError("--shared True needs --output with the name of a file")

    # join first: nobody writes the file before this process has done its share
    path, started = Path(os.path.realpath(config.output)), time.perf_counter()
    pieces = cut(jobs, 8 if config.batch_size == "auto" else config.batch_size)
    plan = repr([run, *(len(piece) for piece in pieces.values()), *(job.key for job in jobs)])
    join_output(path, hashlib.sha256(plan.encode("utf-8", "surrogateescape")).hexdigest())
    done = read_answers(path, run, config.video_dir, shared=True)
    computed: list[dict[str, Any]] = []
    merged: list[dict[str, Any]] = []

    def work(name: str) -> list[dict[str, Any]]:
        rows = [row | {"run": run} for row in compute([job for job in pieces[name] if job.key not in done])]
        computed.extend(rows)
        return rows

    def finish() -> Callable[[], None]:
        found = dict(done)
        for row in chain.from_iterable(read_rows(parts_of(path) / f"{name}.jsonl") for name in pieces):
            found.setdefault(key_of_answer(row, config.video_dir), row)

        # killed processes may have left parts that go with another unfinished file than the present one
        missing = [job for job in jobs if job.key not in found]
        found |= {key_of_answer(row, config.video_dir): row | {"run": run} for row in compute(missing)}
        merged[:] = (found[job.key] for job in jobs)
        text = "".join(map(as_line, merged + [row | {"run": run} for row in merge(merged)]))
        return lambda: replace_file(path, lambda p: p.write_text(text, encoding="utf-8"))

    last = share(parts_of(path), [*pieces], config.lease, work, finish)
    seconds = time.perf_counter() - started
    print(f"this process computed {len(computed)} of {counted(len(jobs), 'answer')} in {seconds:.1f} s")
    print(printable(f"{'wrote' if last else 'another process wrote'} {config.output}"))
    return merged


def cut(jobs: list[Job], batch_size: int) -> dict[str, list[Job]]:
    """{name: jobs} of the pieces. They consist of whole batches, so that every batch is the same as in one process."""
    size = batch_size * max(1, PIECE // batch_size)
    pieces: dict[str, list[Job]] = {}
    count = 0  # of the clips so far: a job with an error has none
    for job in jobs:
        pieces.setdefault(str(count // size), []).append(job)
        count += not job.error
    return pieces


def join_output(path: Path, plan: str) -> None:
    """Makes or joins the folder of parts. Raises UserError if a single process writes the file."""
    for attempt in range(20):
        if parts_of(path).exists():
            break
        try:
            lock = lock_output(path)
        except FileNotFoundError:
            raise UserError(f"--output: cannot write {path}: there is no folder {path.parent}") from None
        except UserError:
            if attempt == 19:
                raise
            time.sleep(0.05)  # another process may hold the lock just to make the folder
            continue
        with lock:
            join(parts_of(path), plan)
    join(parts_of(path), plan)
