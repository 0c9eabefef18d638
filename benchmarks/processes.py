"""Summing gradients over processes: vidtune against DDP and against one copy of all gradients, on the CPU (gloo).

    python -m benchmarks.processes --vision_model FOLDER --image_size 112

Ways:
    vidtune   GradientSum: buckets are summed while the backward pass goes on; no copy of large tensors
    DDP       torch's DistributedDataParallel as recommended, with gradients that are views of its buckets
    copy      all gradients are copied into one tensor after the backward pass, which is then summed
Each run starts new processes, and the ways alternate. Prints medians: seconds per step, and the peak memory of the
first process beyond that of `alone`, which sums nothing.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.training import ROOT, peak_memory

WAYS = ("vidtune", "DDP", "copy", "alone")
CLASSES = 400


def sum_by_copy(parameters: list[torch.nn.Parameter]) -> None:
    """Sums the gradients of all processes through one tensor."""
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def train(args: argparse.Namespace) -> dict[str, float]:
    """Trains on random clips in this process, one of several. Returns seconds per step and peak memory in MB."""
    from build_model import build_model, trained_tensors
    from config import parse
    from extras.processes import GradientSum

    # the same model in every process, with clips of its own
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    flags = ["--vision_model", args.vision_model, "--image_size", str(args.image_size)]
    config, _ = parse([*flags, "--num_frames", str(args.num_frames)], "main")
    torch.manual_seed(0)
    model = build_model(config, CLASSES)
    parameters = [*trained_tensors(model).values()]
    torch.manual_seed(dist.get_rank())
    shape = (args.batch_size, args.num_frames, 3, args.image_size, args.image_size)
    clips, labels = torch.randint(256, shape, dtype=torch.uint8), torch.randint(CLASSES, (args.batch_size,))

    # with DDP the mean over processes, otherwise the sum: it makes no difference to time or memory
    wrapped: Any = DistributedDataParallel(model, gradient_as_bucket_view=True) if args.way == "DDP" else model
    gradient_sum = GradientSum(parameters) if args.way == "vidtune" else None
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    seconds = []
    for _ in range(args.steps + 1):
        dist.barrier()
        start = time.perf_counter()
        loss = cross_entropy(wrapped(clips), labels)
        if gradient_sum:
            gradient_sum.last_batch = True
        loss.backward()
        if gradient_sum:
            gradient_sum.finish()
        elif args.way == "copy":
            sum_by_copy(parameters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    dist.barrier()
    return {"seconds": median(seconds[1:]), "memory": peak_memory()}  # the first step allocates


def run_processes(way: str, argv: list[str], count: int) -> dict[str, float]:
    """One run in new processes. Returns what the first of them measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.processes", *argv, "--way", way]
    processes = []
    for rank in range(count):
        variables = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in variables.items()}
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"error: {way}: a process failed")
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    """Prints the table. With --way it is one of the processes of a run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__.splitlines()[0])
    parser.add_argument("--vision_model", default="videomae", help="short name or folder")
    parser.add_argument("--image_size", type=int, default=64, help="pixels, of random clips")
    parser.add_argument("--num_frames", type=int, default=8, help="frames per clip")
    parser.add_argument("--batch_size", type=int, default=1, help="clips per process and step")
    parser.add_argument("--processes", type=int, default=2, help="processes per run")
    parser.add_argument("--steps", type=int, default=5, help="measured steps per run")
    parser.add_argument("--rounds", type=int, default=3, help="runs per way")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # for the child processes
    args = parser.parse_args()
    if args.way:
        print(json.dumps(train(args)))
        return

    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            runs[way].append(run_processes(way, sys.argv[1:], args.processes))
    alone = median(run["memory"] for run in runs["alone"])
    print(f"{'':<10}{'s per step':>12}{'/ copy':>9}{'memory, MB':>12}")
    for way, results in runs.items():
        ratio = median(a["seconds"] / b["seconds"] for a, b in zip(results, runs["copy"], strict=True))
        extra = median(run["memory"] for run in results) - alone
        print(f"{way:<10}{median(r['seconds'] for r in results):>12.3f}{ratio:>9.2f}{extra:>12.0f}")


if __name__ == "__main__":
    main()
