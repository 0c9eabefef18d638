"""SIGKILL at random moments of training, then --resume: the result must equal that of an uninterrupted run.

Seven configurations; a sixth of the runs are real `python main.py` processes, the others are forks. Every run is killed
one to three times, and resumed each time by its name and folder alone.
"""

import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign import common
from tests.campaign.common import Process, Tally, script

VLM = "--use_vlm True --use_text True --freeze_visionbackbone True --use_lora_llm True"
CONFIGURATIONS = {
    "lora": "--use_lora_vision True --save_every 1 --num_workers 0",
    "captioner": f"{VLM} --captioning True --num_workers 0",
    "cached": "--freeze_visionbackbone True --save_every 2 --num_workers 0",
    "workers": "--class_balance True --num_workers 2 --use_lora_vision True",
    "accumulate": "--gradient_accumulation_steps 2 --augment light --save_every 1 --num_workers 0",
    "skip": "--skip_unreadable True --patience 1 --controls True --num_workers 2",
    "text": f"{VLM} --cache_features False --save_every 2 --num_workers 2",
}
MOMENTS = ("uniform", "early", "temporary", "metrics", "state", "folder")
NAME = "--output_dir out --run_name r"


def make_data(folder: Path) -> dict[str, Path]:
    """The data folder of each configuration."""
    plain, films, junk = (common.tiny_data(folder / str(i), form) for i, form in enumerate(("pt", "mp4", "pt")))
    (junk / "train" / "class_0" / "junk.pt").write_bytes(b"junk")
    return dict.fromkeys(CONFIGURATIONS, plain) | {"workers": films, "skip": junk}


def start_flags(name: str, data: Path) -> str:
    return f"{common.TINY} --epochs 3 --data_dir {data} {NAME} {CONFIGURATIONS[name]}"


def until(moment: str, process: Process, out: Path, duration: float, rng: random.Random) -> Callable[[], bool]:
    """Returns whether the moment to kill has come."""
    share, seen = rng.random(), []
    delays = {"uniform": share * duration, "early": 0.6 * share, "temporary": 0.003 * share, "metrics": 0.5 * share}
    appeared = {
        "temporary": lambda: any(".tmp" in path.name for path in out.rglob("*")),
        "metrics": (out / "r" / "metrics.json").exists,
        "state": (out / "r" / "state" / "state.safetensors").exists,
        "folder": (out / "r").exists,
    }.get(moment, lambda: True)

    def come() -> bool:
        if not seen and appeared():
            seen.append(process.started if moment in ("uniform", "early") else time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= delays.get(moment, 0.02 * share)

    return come


def trial(name: str, data: Path, lone: tuple[dict[str, Any], float], folder: Path, real: bool, rng: random.Random):
    """One run, killed and resumed until it finishes: (moments of its kills, verdict, text)."""
    reference, duration = lone
    moments, wanted, processes = [], rng.choice((1, 1, 2, 3)), []
    moment = rng.choice(MOMENTS)
    while True:
        begun = (folder / "out" / "r").exists()
        flags = f"--resume True {NAME}" if begun else start_flags(name, data)
        process = Process([str(common.ROOT / "main.py"), *flags.split()] if real else script("main", flags), folder)
        processes.append(process)
        come = until(moment, process, folder / "out", duration + 6 * real, rng)
        process.wait(until=come if len(moments) < wanted else lambda: False)
        if process.ended:
            break
        process.kill()
        moments.append(moment)
        moment = rng.choice(("uniform", "uniform", "temporary", "metrics", "state"))
    for each in processes:
        each.close()
    verdict, text = judge(process, folder / "out", reference)
    return moments, verdict, f"{text}\n{name}, killed {moments}, real {real}\n{process.out[-2000:]}"


def judge(process: Process, out: Path, reference: dict[str, Any]) -> tuple[str, str]:
    bad = common.unwanted(process.status, process.out, process.err)
    if bad:
        return bad, process.err
    if process.status != 0 and "is finished" not in process.err:
        return "cannot be resumed", process.err
    wrong = common.differences(out / "r", reference) + (["has state/"] if (out / "r" / "state").exists() else [])
    if wrong:
        return "unequal" if process.status == 0 else "finished with less", f"{', '.join(wrong)}\n{process.err}"
    rest = common.leftovers(out)
    return ("leftovers", ", ".join(rest)) if rest else ("equal", "")


def main(argv: list[str] | None = None) -> int:
    tally = Tally(__doc__, 200, argv)
    common.warm_up()
    with common.scratch() as work:
        data, lone = make_data(work / "data"), {}
        for name in CONFIGURATIONS:
            begin = time.monotonic()
            common.finished("main", start_flags(name, data[name]), work / name)
            lone[name] = common.contents(work / name / "out" / "r"), time.monotonic() - begin
        number = 0
        while tally.counts["+kills"] < tally.total and not tally.time_is_up():
            name, real = list(CONFIGURATIONS)[number % len(CONFIGURATIONS)], number % 6 == 0
            folder = work / "trial"
            moments, verdict, text = trial(name, data[name], lone[name], folder, real, tally.rng(number))
            tally.add(verdict, text, f"{number} {name}", bad=verdict != "equal")
            tally.counts["+kills"] += len(moments)
            tally.counts["+of real processes"] += len(moments) * real
            tally.counts.update(f"+kills {moment}" for moment in moments)
            shutil.rmtree(folder)
            number += 1
    return tally.finish("equal", "cannot be resumed", "finished with less", "unequal", "leftovers", "traceback", "hang")


if __name__ == "__main__":
    sys.exit(main())
