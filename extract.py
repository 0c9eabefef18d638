"""Computes the features of a frozen vision backbone into the feature cache, so that training starts at once.

python extract.py --data_dir my_clips --vision_model vjepa2 --weights hub --freeze_visionbackbone True

Start it as often as there are processors, also on other machines that see the same folders: the processes share the
work, see extras/claims.py. With --engine ray one process starts the work on all machines of a Ray cluster: see
extras/ray_extract.py. It takes the flags of main.py. A run with the same flags then finds all features, and that every
video was read.

Modules that need torch are imported inside the functions, so that --help stays fast.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import parse
from extras.claims import join, share
from extras.shards import data_folder
from script import UserError, counted, leave, printable, read_rows, script

if TYPE_CHECKING:
    from feature_cache import FeatureStore
    from runs import Run
    from scan import Record
    from VLoader import Key, Sample


class Extraction:
    """The pieces of a data folder, and how to compute one. A piece is a shard of the store."""

    def __init__(self, run: "Run", store: "FeatureStore"):
        from feature_cache import SHARD, cached_splits
        from scan import SCAN_CACHE, read_records
        from VLoader import distinct

        self.run, self.store, self.computed = run, store, 0
        samples = distinct(s for name in cached_splits(run.config) for s in getattr(run.splits, name))
        self.pieces = {str(first // SHARD): samples[first : first + SHARD] for first in range(0, len(samples), SHARD)}
        self.records_file = Path(run.config.output_dir) / SCAN_CACHE
        self.known = read_records(self.records_file)
        self.errors: list[str] = []  # of all processes, known to the last one

        # other videos are another job, in a folder of its own
        names = repr([self.name(sample) for sample in samples])
        self.plan = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
        self.folder = store.folder / f"job-{self.plan[:16]}"

    def name(self, sample: "Sample") -> tuple[Any, ...]:
        """Identifies a sample in its data folder, which may have another path on another machine."""
        folder = data_folder(self.run.config.data_dir, self.run.config.output_dir)
        return Path(os.path.relpath(sample.path, folder)).as_posix(), *(sample.segment or ())

    def compute(self, name: str) -> list[dict[str, Any]]:
        """Computes the features of a piece that are not in the store. Returns a row for each of its samples: the record
        of the video, or the error."""
        from feature_cache import extract_features
        from scan import features_to_compute

        run = self.run
        todo, ids, bad, records = features_to_compute(self.pieces[name], run.config, self.known, self.store)
        bad |= extract_features(run.model.vision_encoder, todo, ids, self.store, run.config, run.accelerator)
        self.computed += sum(sample.key not in bad for sample in todo)
        return self.result(name, bad, records)

    def result(self, name: str, bad: "dict[Key, str]", records: "dict[Path, Record]") -> list[dict[str, Any]]:
        """The rows of a piece whose features are in the store, from the errors and records of its samples."""
        samples = self.pieces[name]
        return [{"error": bad[s.key]} if s.key in bad else {"record": records[s.path]} for s in samples]

    def finish(self) -> Callable[[], None]:
        """Collects the errors of all processes. Returns a function that keeps the records, so that a run need not read
        the videos again."""
        from scan import write_records

        records: dict[str, Any] = {}
        errors: dict[str, None] = {}  # the segments of an unreadable file share one
        for name, samples in self.pieces.items():
            for sample, row in zip(samples, read_rows(self.folder / f"{name}.jsonl"), strict=True):
                if "error" in row:
                    errors[row["error"]] = None
                else:
                    records[os.path.abspath(sample.path)] = row["record"]
        self.errors = [*errors]
        return partial(write_records, self.records_file, records)


@script
def main(argv: list[str] | None = None) -> int:
    """Computes features together with all other processes that do the same. The last one reports unreadable videos, and
    then returns 1."""
    config, _ = parse(argv, "extract")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("start extract.py without torchrun, as often as you like: the processes share the work")
    from feature_cache import open_store, use_cache
    from runs import memory_advice, prepare, print_backbones
    from train_code import cast_frozen

    # the same model and options as a run with these flags, or it would not find the features
    run = prepare(config, Path(config.output_dir))
    use_cache(run.model, replace(run.config, cache_features="True"))
    cast_frozen(run.model, run.config, run.accelerator)
    print_backbones(run)
    store = open_store(run.model, run.config, run.accelerator)
    job, started = Extraction(run, store), time.perf_counter()
    with memory_advice():
        join(job.folder, job.plan)
        if config.engine == "ray":
            from extras.ray_extract import compute_pieces

            compute_pieces(job)  # all of them, so that only the end is left to share
        last = share(job.folder, [*job.pieces], run.config.lease, job.compute, job.finish)

    # how fast it was, and what is wrong with the videos
    seconds, total = time.perf_counter() - started, sum(map(len, job.pieces.values()))
    speed = f", {job.computed / seconds:.1f} per second" if job.computed else ""
    print(f"this process computed {job.computed} of {counted(total, 'video')} in {seconds:.1f} s{speed}")
    print(printable(f"features are in {store.folder}{'' if last else '; another process was the last'}"))
    if job.errors:
        print(f"{counted(len(job.errors), 'video')} could not be read:", file=sys.stderr)
        print("\n".join(map(printable, job.errors)), file=sys.stderr)
    return int(bool(job.errors))


if __name__ == "__main__":
    leave(main())
