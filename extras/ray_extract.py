"""Computes the pieces of an extraction with Ray Data: extract.py --engine ray.

    piece -> decode(), a task -> batches of clips -> Encoder, an actor -> features -> this process writes the shard

CPUs decode; GPUs encode, or CPUs if this process finds no GPU. Every piece enters as one block, and every batch is one
row, with the same clips as in a single process. So the shards are the same, byte for byte on equal machines. A
piece is done when its shard and then its result are written: a new start goes on with those that are not.

Ray repeats what was lost with a machine, unless it is the one where this process runs. All machines need the same
packages, and these scripts and the data under the same paths.
"""

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ["RAY_usage_stats_enabled"] = "0"  # noqa: SIM112, Ray's own spelling, read on import

import ray
import torch
from tqdm import tqdm

from config import ROOT, Config
from extras.shards import MOUNTED
from feature_cache import decoded_batches, features_of
from scan import Record, features_to_compute
from script import UserError, counted, write_rows
from train_code import build_accelerator
from transforms import Preprocessing
from VLoader import Key


@dataclass
class Batch:
    """One of the `count` batches of a piece, with the clips, later with their features."""

    number: int
    count: int
    indices: list[int] = field(default_factory=list)  # among the samples to compute
    video: torch.Tensor | None = None  # uint8 (B, T, C, H, W); None if no video of the batch can be read
    features: torch.Tensor | None = None  # fp16 (B, 1 + N, D)
    failure: str = ""  # what the user has to change
    bad: dict[Key, str] = field(default_factory=dict)  # errors of unreadable samples
    # the same in all batches of a piece: the ids of the samples to compute, and the records of all readable videos
    ids: Any = None  # (n, 16) uint8
    records: dict[Path, Record] = field(default_factory=dict)


def decode(row: dict[str, Any], preprocessing: Preprocessing, config: Config, store: Any) -> Iterator[dict[str, Any]]:
    """Yields the batches of a piece."""
    todo, ids, bad, records = features_to_compute(row["samples"], config, row["known"], ray.get(store))
    count = math.ceil(len(todo) / config.batch_size)
    if not count:
        yield {"piece": row["piece"], "batch": Batch(0, 1, bad=bad, ids=ids, records=records)}
    for number, (clips, errors) in enumerate(decoded_batches(preprocessing, todo, config, workers=0)):
        batch = Batch(number, count, bad=bad | {todo[i].key: e for i, e in errors.items()}, ids=ids, records=records)
        if clips is not None:
            batch = replace(batch, video=clips["video"], indices=clips["index"].tolist())
        yield {"piece": row["piece"], "batch": batch}


class Encoder:
    """Computes the features of batches, in a process of its own."""

    def __init__(self, encoder: Any, config: Config):
        self.config, self.accelerator = config, build_accelerator(config)
        self.encoder = ray.get(encoder).to(self.accelerator.device).eval()

    @torch.no_grad()
    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Replaces the clips of a batch by their features."""
        batch = row["batch"]
        if batch.video is not None:
            try:
                features = features_of(self.encoder, batch.video, self.config.token_grid, self.accelerator)
                batch = replace(batch, video=None, features=features)
            except UserError as error:  # raised here, it would be a traceback of the actor
                batch = replace(batch, video=None, failure=str(error))
        return {"piece": row["piece"], "batch": batch}


def compute_pieces(job: Any) -> None:
    """Computes all pieces of a job, an extract.Extraction, that are not done. Raises UserError if features overflow."""
    names = [name for name in job.pieces if not (job.folder / f"{name}.jsonl").exists()]
    if not names:
        return
    start_ray()
    arrived: dict[str, list[Batch]] = {}
    with tqdm(total=sum(len(job.pieces[name]) for name in names), desc="features", unit="video", leave=False) as bar:
        for row in pipeline(job, names).iter_rows():
            name, batch = row["piece"], row["batch"]
            if batch.failure:
                raise UserError(batch.failure)
            batches = arrived.setdefault(name, [])
            batches.append(batch)
            if len(batches) == batch.count:
                write_piece(job, name, sorted(arrived.pop(name), key=lambda b: b.number))
                bar.update(len(job.pieces[name]))


def start_ray() -> None:
    """Connects to the cluster of RAY_ADDRESS or of this machine, or else starts Ray here. Prints its size."""
    # workers find the modules here; the main process shows the progress, so they print none
    variables = {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", MOUNTED: os.environ.get(MOUNTED, "{}")}
    if not ray.is_initialized():
        quiet = {"log_to_driver": False, "include_dashboard": False, "logging_level": logging.WARNING}
        ray.init(runtime_env={"env_vars": variables}, **quiet)
    found = ray.cluster_resources()
    cpus, gpus = (counted(int(found.get(kind, 0)), kind) for kind in ("CPU", "GPU"))
    print(f"Ray has {cpus} and {gpus} on {counted(len(ray.nodes()), 'machine')}")


def pipeline(job: Any, names: list[str]) -> Any:
    """The dataset whose rows are the batches of these pieces, with features."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns about rows with Python objects
    encoder, config, resources = job.run.model.vision_encoder, job.run.config, ray.cluster_resources()
    # an encoder asks for no CPU: as many actors with one CPU each as there are would leave none for decode(), and both
    # would wait for each other forever
    gpu = job.run.accelerator.device.type == "cuda"
    most = max(1, int(resources.get("GPU" if gpu else "CPU", 0)))
    actors = ray.data.ActorPoolStrategy(min_size=1, max_size=most)
    alone = replace(config, num_workers=0)  # a task has one CPU, and must not fork
    shared = {"preprocessing": encoder.preprocessing, "config": alone, "store": ray.put(job.store)}
    own = {"encoder": ray.put(encoder.cpu()), "config": config}
    pieces = ray.data.from_items([item(job, name) for name in names], override_num_blocks=len(names))
    clips = pieces.flat_map(decode, fn_kwargs=shared, num_cpus=1)
    return clips.map(Encoder, fn_constructor_kwargs=own, num_cpus=0, num_gpus=int(gpu), compute=actors)


def item(job: Any, name: str) -> dict[str, Any]:
    """The input row of a piece: its samples, and what earlier scans know of them."""
    samples = job.pieces[name]
    paths = {os.path.abspath(sample.path) for sample in samples}
    return {"piece": name, "samples": samples, "known": {path: job.known[path] for path in paths & job.known.keys()}}


def write_piece(job: Any, name: str, batches: list[Batch]) -> None:
    """Writes the shard of a piece, then its result, which marks it as done."""
    indices = [index for batch in batches for index in batch.indices]
    if indices:
        features = torch.cat([batch.features for batch in batches if batch.features is not None])  # (n, 1 + N, D)
        job.store.write(batches[0].ids[indices], [*features])
        job.computed += len(indices)
    bad = {key: error for batch in batches for key, error in batch.bad.items()}
    write_rows(job.result(name, bad, batches[0].records), job.folder / f"{name}.jsonl")
