"""Two processes at once on one run, one file of answers, one cache: whoever ends with 0 has what it would have had alone.

The other one ends with 2 and one line that says who is there. Nothing is ever mixed, deleted or half removed.
"""

import json
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign import common
from tests.campaign.common import Process, script

RUN = ["--output_dir", "out", "--run_name", "r"]
RESUME = ["--resume", "True", *RUN]
REFUSALS = re.compile(r"process \d+|exists|is finished|no readable|does not exist|no run|did not finish")
Result = tuple[str, str]  # (verdict, text)


class World:
    """Data, runs left alone for comparison, and a run that was stopped half way, per number of workers."""

    def __init__(self, work: Path):
        self.data, self.work = common.tiny_data(work / "data"), work
        self.lone: dict[tuple[int, int], dict[str, Any]] = {}  # (seed, workers) -> contents
        self.duration = 0.0
        for workers in (0, 2):
            for seed in (0, 1):
                begin = time.monotonic()
                common.train(self.finished(seed, workers), *self.start(seed, workers))
                self.duration = time.monotonic() - begin
                self.lone[seed, workers] = common.contents(self.finished(seed, workers) / "out" / "r")
            self.stop_half_way(workers)
        self.answers = self.work / "answers"
        process = self.infer(self.answers).wait()
        assert process.status == 0, process.err
        self.rows = (self.answers / "a.jsonl").read_bytes().splitlines()

    def start(self, seed: int, workers: int, *more: str) -> list[str]:
        flags = [
            "--data_dir",
            self.data,
            *RUN,
            "--seed",
            seed,
            "--num_workers",
            workers,
            "--save_every",
            1,
            "--epochs",
            3,
        ]
        return [*map(str, flags), *common.TINY, *more]

    def finished(self, seed: int, workers: int) -> Path:
        return self.work / f"lone_{seed}_{workers}"

    def stopped(self, workers: int) -> Path:
        return self.work / f"stopped_{workers}"

    def stop_half_way(self, workers: int) -> None:
        folder = self.stopped(workers)
        process = Process(script("main", self.start(0, workers)), folder)
        process.wait(until=(folder / "out" / "r" / "state" / "state.safetensors").exists)
        process.kill()
        process.close()
        assert not (folder / "out" / "r" / "metrics.json").exists()

    def infer(self, folder: Path) -> Process:
        run = self.finished(0, 0) / "out" / "r"
        flags = [
            "--checkpoint",
            run,
            "--video_dir",
            self.data,
            "--output",
            "a.jsonl",
            "--num_workers",
            0,
            "--batch_size",
            2,
        ]
        return Process(script("inference", [*map(str, flags)]), folder)


def both(first: list[str], second: list[str], folder: Path, delay: float) -> list[Process]:
    """The two trainings, the second `delay` seconds behind the first, at their ends."""
    processes = [Process(script("main", first), folder)]
    time.sleep(delay)
    processes.append(Process(script("main", second), folder))
    for process in processes:
        process.wait()
    return processes


def judge(processes: list[Process], outcomes: list[dict[str, Any]], folder: Path, name: str = "r") -> Result:
    """`outcomes`: what each process would leave alone. The run must be that of one that ended with 0."""
    text = "\n".join(f"-- {p.status}\n{p.out[-1500:]}\n{p.err[-3000:]}" for p in processes)
    for process in processes:
        bad = common.unwanted(process.status, process.out, process.err)
        if bad:
            return bad, process.err + text
        if process.status == 2 and not REFUSALS.search(process.err):
            return "unnamed", process.err + text
    winners = [outcome for process, outcome in zip(processes, outcomes, strict=True) if process.status == 0]
    if not winners:
        return "nobody", text
    wrong = [common.differences(folder / "out" / name, outcome) for outcome in winners]
    if all(wrong):
        return "mixed", f"{wrong}\n{text}"
    rest = common.leftovers(folder / "out")
    return ("leftovers", f"{rest}\n{text}") if rest else ("one" if len(winners) == 1 else "both", text)


# -- races ------------------------------------------------------------------------------------------


def starts(world: World, folder: Path, workers: int, delay: float) -> Result:
    processes = both(world.start(0, workers), world.start(1, workers), folder, delay)
    return judge(processes, [world.lone[seed, workers] for seed in (0, 1)], folder)


def overwrite_live(world: World, folder: Path, workers: int, delay: float) -> Result:
    processes = both(world.start(0, workers), world.start(1, workers, "--overwrite", "True"), folder, delay)
    return judge(processes, [world.lone[seed, workers] for seed in (0, 1)], folder)


def resumes(world: World, folder: Path, workers: int, delay: float) -> Result:
    shutil.copytree(world.stopped(workers), folder)
    return judge(both(RESUME, RESUME, folder, delay), 2 * [world.lone[0, workers]], folder)


def start_and_resume(world: World, folder: Path, workers: int, delay: float) -> Result:
    shutil.copytree(world.stopped(workers), folder)
    flags = [RESUME, world.start(1, workers)]
    order = -1 if delay * 1000 % 2 < 1 else 1
    return judge(both(*flags[::order], folder, delay), [world.lone[seed, workers] for seed in (0, 1)[::order]], folder)


def overwrite_and_resume(world: World, folder: Path, workers: int, delay: float) -> Result:
    shutil.copytree(world.stopped(workers), folder)
    flags = [RESUME, world.start(1, workers, "--overwrite", "True")]
    order = -1 if delay * 1000 % 2 < 1 else 1
    return judge(both(*flags[::order], folder, delay), [world.lone[seed, workers] for seed in (0, 1)[::order]], folder)


def evaluate_while_training(world: World, folder: Path, workers: int, delay: float) -> Result:
    shutil.copytree(world.finished(0, workers), folder)
    train = world.start(1, workers, "--overwrite", "True")
    evaluate = ["--evaluate", "out/r", "--num_workers", str(workers)]
    order = -1 if delay * 1000 % 2 < 1 else 1
    processes = both(*[train, evaluate][::order], folder, delay)
    trained = processes[::order][0].status == 0  # else the run that was there before must be as it was
    return judge(processes, 2 * [world.lone[int(trained), workers]], folder)


def orphans(world: World, folder: Path, workers: int, delay: float) -> Result:
    """The holder is killed; its loader's workers live on for seconds. The next one must get in."""
    holder = Process(script("main", world.start(0, 2)), folder)
    holder.wait(until=lambda: (folder / "out" / "r").exists() and time.monotonic() - holder.started > delay)
    holder.kill()
    begun = (folder / "out" / "r").exists()
    resumed = begun and delay * 1000 % 2 < 1
    flags = RESUME if resumed else world.start(1, 2, "--overwrite", "True")
    process = Process(script("main", flags), folder).wait()
    holder.close()
    if process.status == 2 and "is finished" in process.err:
        process.status = 0
    return judge([process], [world.lone[0 if resumed else 1, 2]], folder)


def cache(world: World, folder: Path, workers: int, delay: float) -> Result:
    """Two runs fill one cache: both succeed, and equal each other."""
    flags = [*world.start(0, workers), "--freeze_visionbackbone", "True"]
    names = [["--run_name", name] for name in ("r", "s")]
    processes = both(flags + names[0], flags + names[1], folder, delay)
    if not (folder / "out" / "r").is_dir():
        return "nobody", processes[0].err
    return judge(processes, 2 * [common.contents(folder / "out" / "r")], folder, "s")


def inferences(world: World, folder: Path, workers: int, delay: float) -> Result:
    """Two inferences write one file of answers: every video stands in it once."""
    processes = [world.infer(folder)]
    time.sleep(delay)
    processes.append(world.infer(folder))
    for process in processes:
        process.wait()
        bad = common.unwanted(process.status, process.out, process.err)
        if bad or (process.status == 2 and not REFUSALS.search(process.err)):
            return bad or "unnamed", process.err
    rows = (folder / "a.jsonl").read_bytes().splitlines()
    done = [process.status for process in processes]
    if sorted(rows) != sorted(world.rows):
        files = [json.loads(row).get("file") for row in rows]
        return "mixed", f"{done}: {len(rows)} rows of {len(set(files))} files, not {len(world.rows)}"
    rest = common.leftovers(folder)
    return ("leftovers", str(rest)) if rest else ("both" if done == [0, 0] else "one", "")


RACES: tuple[Callable[[World, Path, int, float], Result], ...] = (
    starts, overwrite_live, resumes, start_and_resume, overwrite_and_resume, evaluate_while_training, orphans, cache, inferences,
)  # fmt: skip
EXCLUSIVE = {starts, resumes, start_and_resume}  # one of the two must be refused


def random_delay(rng: random.Random, duration: float) -> float:
    return rng.choice((0.0, 0.1 * rng.random(), rng.random() * duration))


def main(argv: list[str] | None = None) -> int:
    tally = common.Tally(__doc__, 60, argv)
    common.warm_up()
    with common.scratch() as work:
        world = World(work)
        for number in range(tally.total):
            race, rng = RACES[number % len(RACES)], tally.rng(number)
            workers, delay = rng.choice((0, 2)), random_delay(rng, world.duration)
            verdict, text = race(world, work / "race", workers, delay)
            verdict = "both went in" if verdict == "both" and race in EXCLUSIVE else verdict
            about = f"{race.__name__}, {workers} workers, {delay:.3f} s apart"
            tally.add(
                verdict, f"{race.__name__} {text}\n{about}", f"{number} {about}", bad=verdict not in ("one", "both")
            )
            shutil.rmtree(work / "race", ignore_errors=True)
    return tally.finish(["one", "both", "both went in", "mixed", "nobody", "unnamed", "leftovers", "traceback", "hang"])


if __name__ == "__main__":
    sys.exit(main())
