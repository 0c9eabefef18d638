"""Two processes at once on one run, output file or cache: one that ends with 0 has the result it would have alone.

The other one ends with 2 and one line that names the holder. Nothing is mixed, deleted or half removed.
"""

import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from tests.campaign import common
from tests.campaign.common import Process, script

RUN = "--output_dir out --run_name r"
REFUSALS = re.compile(r"process \d+|exists|is finished|no readable|does not exist|no run|did not finish")
Result = tuple[str, str]  # (verdict, text)
#: the folder at the start, and the jobs of the two processes
RACES = {
    "two starts": (None, "start", "start other"),
    "overwriting a run that goes on": (None, "start", "overwrite"),
    "two resumes": ("stopped", "resume", "resume"),
    "start and resume": ("stopped", "resume", "start other"),
    "overwrite and resume": ("stopped", "resume", "overwrite"),
    "score while training": ("done_0", "score", "overwrite"),
}


class World:
    """Data, runs of two seeds left alone, a run that was stopped half way, and answers of the first, for one number of
    workers."""

    def __init__(self, work: Path, workers: int):
        self.work, self.workers = work, workers
        self.data = common.tiny_data(work / "data")
        self.flags = {
            "start": self.start(0),
            "start other": self.start(1),
            "overwrite": f"{self.start(1)} --overwrite True",
            "resume": f"--resume True {RUN}",
            "score": f"--checkpoint out/r --num_workers {workers}",
        }
        begin = time.monotonic()
        self.lone = []
        for seed in (0, 1):
            common.finished("main", self.start(seed), work / f"done_{seed}")
            self.lone.append(common.contents(work / f"done_{seed}" / "out" / "r"))
        self.duration = (time.monotonic() - begin) / 2
        process = Process(script("main", self.start(0)), work / "stopped")
        process.wait(until=(work / "stopped" / "out" / "r" / "state" / "state.safetensors").exists)
        process.close()
        assert not (work / "stopped" / "out" / "r" / "metrics.json").exists()
        run = work / "done_0" / "out" / "r"
        self.inference = f"--checkpoint {run} --video_dir {self.data} --output a.jsonl --num_workers 0 --batch_size 2"
        common.finished("inference", self.inference, work / "answers")
        self.rows = (work / "answers" / "a.jsonl").read_bytes().splitlines()

    def start(self, seed: int) -> str:
        return f"{common.TINY} --data_dir {self.data} {RUN} --seed {seed} --num_workers {self.workers} --save_every 1 --epochs 3"


def both(commands: list[tuple[str, str]], folder: Path, delay: float) -> list[Process]:
    """Runs two scripts with their flags, the second one `delay` seconds after the first, to their ends."""
    processes = [Process(script(*commands[0]), folder)]
    time.sleep(delay)
    processes.append(Process(script(*commands[1]), folder))
    for process in processes:
        process.wait()
    return processes


def judge(processes: list[Process], outcomes: list[dict[str, Any]], folder: Path, name: str = "r") -> Result:
    """`outcomes`: the run that each process would write alone. The real one must match a process that ended with 0."""
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


def train_twice(world: World, name: str, folder: Path, delay: float, order: int) -> Result:
    """One of the RACES."""
    begin, *jobs = RACES[name]
    if begin:
        shutil.copytree(world.work / begin, folder)
    commands = [("score" if job == "score" else "main", world.flags[job]) for job in jobs]
    processes = both(commands[::order], folder, delay)[::order]
    outcomes = [world.lone[job in ("start other", "overwrite")] for job in jobs]
    if "score" in jobs and processes[1].status == 0:
        outcomes[0] = outcomes[1]  # the run that it checked is gone
    verdict, text = judge(processes, outcomes, folder)
    exclusive = not {"overwrite", "score"} & {*jobs}
    return ("both went in" if verdict == "both" and exclusive else verdict), text


def orphans(world: World, folder: Path, delay: float, order: int) -> Result:
    """The holder is killed, and its loader workers live on for seconds. The next process must get the lock."""
    holder = Process(script("main", world.flags["start"]), folder)
    holder.wait(until=lambda: (folder / "out" / "r").exists() and time.monotonic() - holder.started > delay)
    holder.kill()
    process = Process(script("main", world.flags["resume" if order > 0 else "overwrite"]), folder).wait()
    holder.close()
    if process.status == 2 and "is finished" in process.err:
        process.status = 0
    return judge([process], [world.lone[order < 0]], folder)


def cache(world: World, folder: Path, delay: float, order: int) -> Result:
    """Two runs fill one cache: both succeed, with equal results."""
    flags = [f"{world.start(0)} --freeze_visionbackbone True --run_name {name}" for name in "rs"]
    processes = both([("main", f) for f in flags], folder, delay)
    if not (folder / "out" / "r").is_dir():
        return "nobody", processes[0].err
    return judge(processes, 2 * [common.contents(folder / "out" / "r")], folder, "s")


def inferences(world: World, folder: Path, delay: float, order: int) -> Result:
    """Two inferences write one output file: every video is in it once."""
    processes = both(2 * [("inference", world.inference)], folder, delay)
    for process in processes:
        bad = common.unwanted(process.status, process.out, process.err)
        if bad or (process.status == 2 and not REFUSALS.search(process.err)):
            return bad or "unnamed", process.err
    rows = (folder / "a.jsonl").read_bytes().splitlines()
    if sorted(rows) != sorted(world.rows):
        return "mixed", f"{[p.status for p in processes]}: {len(rows)} rows, {len(set(rows))} of them different"
    rest = common.leftovers(folder)
    return ("leftovers", str(rest)) if rest else ("both" if {p.status for p in processes} == {0} else "one", "")


def main(argv: list[str] | None = None) -> int:
    tally = common.Tally(__doc__, 60, argv)
    common.warm_up()
    with common.scratch() as work:
        worlds = [World(work / str(workers), workers) for workers in (0, 2)]
        races = [(name, partial(train_twice, name=name)) for name in RACES]
        races += [(race.__name__, race) for race in (orphans, orphans, cache, inferences)]
        for number in range(tally.total):
            (name, race), rng = races[number % len(races)], tally.rng(number)
            world = worlds[1 if race is orphans else rng.randrange(2)]
            delay = rng.choice((0.1 * rng.random(), rng.random(), rng.random() * world.duration))
            order = rng.choice((-1, 1)) if name != "two starts" else 1
            verdict, text = race(world=world, folder=work / "race", delay=delay, order=order)
            about = f"{name}, {world.workers} workers, {delay:.3f} s apart, order {order}"
            tally.add(verdict, f"{name}: {text}\n{about}", f"{number} {about}", bad=verdict not in ("one", "both"))
            shutil.rmtree(work / "race", ignore_errors=True)
            if tally.time_is_up():
                break
    return tally.finish("one", "both", "both went in", "mixed", "nobody", "unnamed", "leftovers", "traceback", "hang")


if __name__ == "__main__":
    sys.exit(main())
