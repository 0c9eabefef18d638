"""What the study reads: the finished runs, from their folders or from experiments/predictions/, and the test clips.

A packed run is one small file, <run>.json.gz, with everything that the report needs: options, scores, the log of its
epochs, and its predictions for the test clips. So every number can be computed again without training.
"""

import gzip
import json
import zlib
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from config import FIELDS, Config, read_yaml
from dummy_data import read_rows as read_metadata
from figures import clip_name
from script import UserError, make_folder, read_rows, replace_file

PACKED = ".json.gz"
# options that describe how a run was trained; the others say where and on what machine
KEPT = [n for n, f in FIELDS.items() if f.metadata["group"] in ("model", "training mode", "data", "training")]
KEPT = [name for name in KEPT if not name.endswith("_dir")]


# -- the test clips ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clips:
    """The clips of one split of the dataset, in the order of its metadata.jsonl: one row for each."""

    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def files(self) -> list[str]:
        return [row["file_name"] for row in self.rows]

    @cached_property
    def labels(self) -> np.ndarray:
        """The class of each clip, which is the name of its folder. (n,)"""
        return np.array([file.split("/")[0] for file in self.files])

    @cached_property
    def single(self) -> np.ndarray:
        """Which clips have one object. (n,)"""
        return np.array([len(row["objects"]) == 1 for row in self.rows])

    def in_order(self, by_file: dict[str, Any], source: str) -> list[Any]:
        """The values of a {file: value} in the order of the clips. Raises UserError if it is about other clips."""
        if by_file.keys() != {*self.files}:
            raise UserError(f"{source} has predictions for other clips than those of this dataset")
        return [by_file[file] for file in self.files]


def read_clips(data_dir: Path, split: str) -> Clips:
    """The clips of a split. Raises UserError if the folder is not a dataset of dummy_data.py."""
    return Clips(read_metadata(data_dir / split))


def annotations_of(data_dir: Path) -> str:
    """The part of VLoader's fingerprint that identifies files, labels, captions and texts: 32 hex digits."""
    from VLoader import SPLITS, fingerprint_data, read_splits

    # a digest is given to every video, because only the other part of the fingerprint depends on what is in it
    splits = read_splits(data_dir)
    splits = replace(splits, **{n: [replace(s, digest="-") for s in getattr(splits, n)] for n in SPLITS})
    return fingerprint_data(splits, data_dir)[:32]


# -- one run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What the study reads from one finished run."""

    name: str
    options: dict[str, Any]  # KEPT, with every `auto` filled in
    metrics: dict[str, Any]  # metrics.json
    log: list[dict[str, Any]]  # log.jsonl
    predictions: list[dict[str, Any]]  # predictions_test.jsonl; `file` is "class/video", references are left out
    parameters: int  # how many were trained
    megabytes: float  # of the checkpoint's weights
    data: str  # annotations_of() its dataset

    def answers(self, clips: Clips) -> list[dict[str, Any]]:
        """The predictions in the order of the clips. Raises UserError if they are for other clips."""
        return clips.in_order({row["file"]: row for row in self.predictions}, self.name)

    def check(self, config: Config, data: str) -> None:
        """Raises UserError if the run was trained with other options than `config`, or on other data."""
        if self.data != data:
            raise UserError(f"{self.name} was trained on another dataset; remove the run to train it again")
        for name in (name for name in KEPT if name in self.options and name != "seed"):
            wanted = getattr(config, name)
            if wanted not in ("auto", self.options[name]):
                raise UserError(
                    f"{self.name} was trained with {name} {self.options[name]}, its yaml file says {wanted}; "
                    "remove the run to train it again"
                )


def read_result(run_dir: Path, packed: Path) -> Result | None:
    """The result of a run, from its folder or else from its packed file; None if the run is not finished.

    Controls are written last, so a run that has them has everything else. Raises UserError for a damaged file.
    """
    from checkpoint import read_metrics

    if "controls" in read_metrics(run_dir):
        return read_folder(run_dir)
    if not packed.is_file():
        return None
    values = read_packed(packed)
    if values.keys() != {f.name for f in fields(Result)}:
        raise UserError(f"{packed} is damaged")
    return Result(**values)


def read_folder(run_dir: Path) -> Result:
    """The result of a finished run in its folder."""
    from checkpoint import CONFIG_YAML, METADATA, WEIGHTS, read_metrics, read_tensors

    # a checkpoint holds the trained parameters and no others
    tensors, _ = read_tensors(run_dir / WEIGHTS)
    rows = [
        {k: v for k, v in row.items() if k != "references"} | {"file": clip_name(row["file"])}
        for row in read_rows(run_dir / "predictions_test.jsonl")
    ]
    options = read_yaml(run_dir / CONFIG_YAML)
    return Result(
        name=run_dir.name,
        options={name: options[name] for name in KEPT if name in options},
        metrics=read_metrics(run_dir),
        log=read_rows(run_dir / "log.jsonl"),
        predictions=rows,
        parameters=sum(t.numel() for t in tensors.values()),
        megabytes=(run_dir / WEIGHTS).stat().st_size / 1e6,
        data=json.loads((run_dir / METADATA).read_text(encoding="utf-8"))["data"][:32],
    )


def pack(result: Result, packed: Path) -> None:
    """Writes the packed file of a run. The same run always gives the same bytes."""
    write_packed(asdict(result), packed)


def read_packed(path: Path) -> dict[str, Any]:
    """The object in a compressed JSON file. Raises UserError if it is damaged."""
    try:
        values = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged")
    return values


def write_packed(values: Any, path: Path) -> None:
    """Writes compressed JSON."""
    make_folder(path.parent)
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    replace_file(path, lambda p: p.write_bytes(gzip.compress(text, mtime=0)))


# -- the nearest neighbour --------------------------------------------------------------------------


def read_neighbours(vision_model: str, data_dir: Path, runs: Path, packed: Path) -> dict[str, str]:
    """{test clip: the training clip nearest to it in the frozen features of a backbone}, both as "class/video".

    It is computed once and then read from the packed file, as long as the dataset is the same.
    """
    file = packed / f"nearest_{vision_model}{PACKED}"
    data = annotations_of(data_dir)
    if file.is_file():
        values = read_packed(file)
        if values.get("data") == data:
            return values["neighbours"]

    import train_code
    from build_model import build_model
    from extras.controls import nearest_neighbours
    from VLoader import read_splits

    config = Config(vision_model=vision_model, freeze_visionbackbone=True, num_workers=0, output_dir=str(runs))
    config = build_model(config, num_classes=2).vision_encoder.fill_auto(config)
    splits = read_splits(data_dir)
    found = nearest_neighbours(splits, splits.test, config, train_code.build_accelerator(config))
    pairs = zip(splits.test, found, strict=True)
    neighbours = {clip_name(s.path): clip_name(splits.train[i].path) for s, i in pairs}
    write_packed({"data": data, "neighbours": neighbours}, file)
    return neighbours
