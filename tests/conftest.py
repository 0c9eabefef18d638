"""Shared by all tests: a small dataset, clips written with PyAV, and real clips if VIDTUNE_TEST_DATA is set."""

import argparse
import os
import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

import dummy_data
import figures
import metrics
from extras import controls
from readers import open_video
from script import replace_file
from transforms import sample_indices

torch.set_num_threads(1)
# all tests but those of test_gpu.py compare with the CPU, so a GPU is hidden from them
if not os.environ.get("VIDTUNE_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
controls.SHOWN, controls.CELLS = 1, 2  # few tests look at occlusion maps, so the others draw small ones
# no deadlines: a busy machine must not fail a test
settings.register_profile(
    "default",
    deadline=None,
    max_examples=int(os.environ.get("VIDTUNE_EXAMPLES", 50)),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("default")
REAL = os.environ.get("VIDTUNE_TEST_DATA")
FEW = ["--videos_per_class", "3", "--val_per_class", "1", "--test_per_class", "2"]


# Pictures and intervals take most of the time of a small run, and few tests look at them.
PLOTS = ["plot_curves", "plot_clips", "plot_confusion", "plot_bars", "plot_reliability", "plot_timelines"]
PLOTS += ["plot_risk_coverage"]
COSTLY = [*((figures, name) for name in PLOTS), (metrics, "RESAMPLES")]
FULL = [getattr(module, name) for module, name in COSTLY]


def plot_nothing(*args: Any, **_: Any) -> Path:
    """Stands in for the functions that draw a picture into a file."""
    (path,) = (arg for arg in args if isinstance(arg, Path))
    replace_file(path, lambda p: p.write_bytes(b"not drawn"))
    return path


def set_costly(values: list[Any]) -> list[Any]:
    """Sets what COSTLY names, and returns what it was."""
    before = [getattr(module, name) for module, name in COSTLY]
    for (module, name), value in zip(COSTLY, values, strict=True):
        setattr(module, name, value)
    return before


set_costly([*[plot_nothing] * len(PLOTS), 20])


@contextmanager
def in_full() -> Generator[None]:
    """Inside, a run draws its pictures and computes its intervals as users get them."""
    before = set_costly(FULL)
    try:
        yield
    finally:
        set_costly(before)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Three classes: moves right, left and down. 3 training videos, 1 of val and 2 of test each; every second one of a
    class and split has two objects."""
    folder = tmp_path_factory.mktemp("data") / "synthetic_dataset"
    assert dummy_data.main(["--classes", "3", *FEW, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder named by VIDTUNE_TEST_DATA, with clips/ and frames/."""
    if not REAL:
        pytest.skip("VIDTUNE_TEST_DATA names no folder of real clips")
    return Path(REAL)


def write_video(path: Path, frames: np.ndarray, codec: str = "libx264", **options: str) -> Path:
    """Encodes uint8 [T, H, W, C] with PyAV."""
    import av  # imported late: the tests of a GPU run without it

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p" if codec == "libx264" else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return path


def drawn(label: int, count: int = 1, frames: int = 16) -> np.ndarray:
    """Videos of dummy_data's class with this label, with one object or two in turn: uint8 (B, T, C, H, W)."""
    args = argparse.Namespace(classes=9, frames=frames, size=64, seed=0)
    return np.stack([video for video, _ in dummy_data.draw_rows(label, "train", count, args)])


def read_clip(path: Path, num_frames: int, stride: int = 0, rng: np.random.Generator | None = None) -> torch.Tensor:
    """`num_frames` frames of a video, uint8 [T, C, H, W]."""
    reader = open_video(path)
    return reader.frames(sample_indices(len(reader), num_frames, stride, rng))


def counting_frames(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames that show their index: a growing white bar on a background that gets brighter. uint8 [T, H, W, C]."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for index in range(count):
        frames[index] = 3 * index
        frames[index, : height // 2, : 1 + index * width // count] = 255
    return frames


def one_of_each_job(names: Iterable[str]) -> set[str]:
    """Of the names of runs one for each vision backbone and job, trained in different ways."""
    jobs: dict[str, list[str]] = {}
    for name in sorted(names):
        jobs.setdefault(re.sub("_(fvbb|fllm|loravision|lorallm)", "", name), []).append(name)
    return {job[number % len(job)] for number, job in enumerate(jobs.values())}


def resolved(config, model):
    """The options with every `auto` filled in, as a run does it."""
    return model.vision_encoder.fill_auto(config)
