"""How far plan.py's estimates are from what the runs then take.

    python -m benchmarks.planning --data_dir synthetic_dataset --rounds 3

For each configuration, plan.py's trial and the run that it estimates alternate; each is a new process with an empty
cache. The number of epochs makes a run take about --minutes. Prints medians: time and peak memory of the run, and by
how much the estimates of the same round differ from them.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from checkpoint import read_metrics
from config import ROOT, parse
from plan import Estimate, try_in_process
from script import UserError

FROZEN = "--freeze_visionbackbone True --use_vlm True"
CONFIGURATIONS = {
    "TimeSformer in full": "--vision_model timesformer",
    "TimeSformer LoRA": "--vision_model timesformer --use_lora_vision True",
    "VideoMAE in full": "--vision_model videomae",
    "V-JEPA 2 LoRA": "--vision_model vjepa2 --use_lora_vision True",
    "TimeSformer + BERT, text": f"--vision_model timesformer {FROZEN} --language_model bert --use_text True",
    "TimeSformer + GPT-2 LoRA": f"--vision_model timesformer {FROZEN} --language_model gpt2 --captioning True "
    "--use_lora_llm True",
}


def planned(flags: list[str]) -> Estimate:
    """plan.py's estimate for these flags of main.py. Raises UserError if there is none."""
    config, _ = parse(flags, "main")
    estimate = try_in_process(config)
    if isinstance(estimate, str):
        raise UserError(estimate)
    return estimate


def trained(flags: list[str]) -> tuple[float, float]:
    """(Seconds that main.py takes with these flags, its peak memory in MB)."""
    with tempfile.TemporaryDirectory() as folder:
        places = ["--output_dir", folder, "--run_name", "run", "--cache_dir", f"{folder}/cache"]
        start = time.perf_counter()
        subprocess.run([sys.executable, "main.py", *flags, *places], cwd=ROOT, check=True, capture_output=True)
        return time.perf_counter() - start, read_metrics(Path(folder, "run"))["peak_mb"]


def compared(flags: list[str], rounds: int) -> list[tuple[float, ...]]:
    """For each round: seconds and MB of the run, and the estimates divided by them."""
    rows = []
    for _ in range(rounds):
        estimate, (seconds, memory) = planned(flags), trained(flags)
        rows.append((seconds, memory, estimate.total / seconds, estimate.memory / memory))
    return rows


def main() -> None:
    """Prints a row of the table after each configuration."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, default=Path("synthetic_dataset"), help="data folder")
    parser.add_argument("--minutes", type=float, default=5.5, help="of a run; its epochs follow from a first estimate")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of an estimate and a run")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=[*CONFIGURATIONS], help="configurations")
    args = parser.parse_args()

    print(
        "| | epochs | run, s | estimate off by | spread | peak, MB | estimate off by |\n|---|---|---|---|---|---|---|"
    )
    for name in args.only:
        # early stopping would end a run before the epochs that plan.py counts
        flags = [*CONFIGURATIONS[name].split(), "--data_dir", str(args.data_dir.resolve()), "--patience", "0"]
        once = planned([*flags, "--epochs", "1"])
        epochs = max(1, math.ceil((60 * args.minutes - once.once - once.scores) / once.epoch))
        seconds, memory, times, peaks = zip(*compared([*flags, "--epochs", str(epochs)], args.rounds), strict=True)
        off = [100 * (ratio - 1) for ratio in sorted(times)]
        print(
            f"| {name} | {epochs} | {median(seconds):.0f} | {median(off):+.0f} % | {off[0]:+.0f} to {off[-1]:+.0f} % "
            f"| {median(memory):.0f} | {100 * (median(peaks) - 1):+.0f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
