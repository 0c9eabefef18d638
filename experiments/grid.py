"""The rows of the study, one for each experiments/*.yaml, and the training of their runs, one for each seed."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path

from config import ROOT, Config, read_yaml, run_name, training_mode
from experiments.results import PACKED, Result, read_result
from script import UserError

EXPERIMENTS = ROOT / "experiments"
NAMES = {"timesformer": "TimeSformer", "videomae": "VideoMAE", "vjepa2": "V-JEPA 2", "bert": "BERT", "gpt2": "GPT-2"}
TASKS = ("video classifier", "video + language classifier", "video captioner")
MODES = {"full": "in full", "lora": "LoRA", "frozen": "frozen"}
NOT_RUN = "not run"


class Row:
    """One row of the grid: a yaml file of options, and one run for each seed."""

    def __init__(self, file: Path, runs: Path, packed: Path, seeds: int):
        self.file = file
        self.config = Config(**read_yaml(file))
        self.name = run_name(self.config)
        self.dirs = [runs / f"{self.name}_seed{seed}" for seed in range(seeds)]
        self.packed = [packed / f"{folder.name}{PACKED}" for folder in self.dirs]

    @property
    def task(self) -> str:
        return TASKS[self.config.use_vlm + self.config.captioning]

    @property
    def mode(self) -> str:
        """How the last backbone named is trained, which is the only one of the row that may differ."""
        return [*training_mode(self.config).values()][-1]

    @property
    def title(self) -> str:
        """`TimeSformer + BERT LoRA, text`: how a backbone is trained refers to the last one named."""
        config = self.config
        names = [NAMES[config.vision_model]] + ([NAMES[config.language_model]] if config.use_vlm else [])
        return f"{' + '.join(names)} {MODES[self.mode]}{', text' if config.use_text else ''}"

    @cached_property
    def results(self) -> dict[int, Result]:
        """The results of the finished runs, by seed. They are read once: drop the row to read them again."""
        found = {seed: read_result(*places) for seed, places in enumerate(zip(self.dirs, self.packed, strict=True))}
        return {seed: result for seed, result in found.items() if result is not None}

    @property
    def first(self) -> Result:
        """The result of the first finished seed. Raises StopIteration if none is finished."""
        return next(iter(self.results.values()))


def read_grid(runs: Path, packed: Path, seeds: int, only: str = "") -> list[Row]:
    """The rows whose file name matches the regex `only`, sorted by task, text, vision model and training mode.

    Raises UserError for a wrong regex.
    """
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise UserError(f"{only!r} is not a regular expression: {error}") from None
    rows = [Row(file, runs, packed, seeds) for file in EXPERIMENTS.glob("*.yaml") if pattern.search(file.stem)]
    modes = [*MODES]
    return sorted(
        rows, key=lambda r: (TASKS.index(r.task), r.config.use_text, r.config.vision_model, modes.index(r.mode))
    )


# -- training ---------------------------------------------------------------------------------------


def train_missing(rows: list[Row], data_dir: Path, jobs: int, folders: bool = False) -> None:
    """Trains every run without a result, `jobs` at a time; with `folders` also packed runs of seed 0 without a folder.

    Raises UserError if a run fails.
    """
    todo = []
    for row in rows:
        for seed, run_dir in enumerate(row.dirs):
            packed_only = seed in row.results and not (run_dir / "metrics.json").is_file()
            if seed not in row.results or (folders and seed == 0 and packed_only):
                flags = ["--config", str(row.file), "--seed", str(seed)]
                todo.append((run_dir, flags))
    in_parallel([train_call(run_dir, flags, data_dir) for run_dir, flags in todo], jobs)
    for row in rows:
        vars(row).pop("results", None)


def train_call(run_dir: Path, flags: Sequence[str], data_dir: Path) -> Callable[[dict[str, str]], str]:
    """train_run() with everything but the environment."""
    return lambda environment: train_run(run_dir, flags, data_dir, environment)


def in_parallel(calls: Sequence[Callable[[dict[str, str]], str]], jobs: int) -> None:
    """Makes the calls, `jobs` at a time, and prints the line that each returns.

    Each gets the environment for its process: together the processes use one thread per core, because with more they
    would slow each other down.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    with ThreadPoolExecutor(jobs) as pool:
        started = [pool.submit(call, environment) for call in calls]
        try:
            for number, done in enumerate(as_completed(started), start=1):
                print(f"{number}/{len(calls)} {done.result()}", flush=True)
        except BaseException:  # on Ctrl-C too: otherwise the pool would start all calls that are still queued
            pool.shutdown(cancel_futures=True)
            raise


def train_run(
    run_dir: Path, flags: Sequence[str], data_dir: Path, environment: dict[str, str], controls: bool = True
) -> str:
    """Starts a run with these flags of main.py, resumes a stopped one, or scores a trained one with the controls.

    Returns a line to print. Raises UserError with the last line of stderr if the process fails.
    """
    # a run with metrics but no controls was killed between the two: evaluating it again is enough
    start = time.perf_counter()
    if (run_dir / "metrics.json").is_file():
        script, flags = "score.py", ["--checkpoint", str(run_dir)]
    else:
        flags = [*flags, "--data_dir", str(data_dir), "--output_dir", str(run_dir.parent), "--run_name", run_dir.name]
        script, flags = "main.py", [*flags, *(("--resume",) if (run_dir / "state").is_dir() else ("--overwrite",))]

    # the same commands that a user would type, so the study tests the scripts as well
    command = [sys.executable, str(ROOT / script), *flags, "--controls", str(controls)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["no message"]
        raise UserError(f"{run_dir.name} failed: {lines[-1]}")
    return f"{run_dir.name}: {time.perf_counter() - start:.0f} s"
