"""Extraction on a Ray cluster: what is stored is what one plain process stores, whatever machine is lost."""

import importlib.util
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import config
import dummy_data
import extract
import feature_cache
from config import ROOT

STORE_MEMORY = 100 * 2**20  # bytes of a machine's object store; Ray takes no less than 75 MiB


def flags(data: Path, folder: Path) -> list[str]:
    argv = ["--data_dir", str(data), "--output_dir", str(folder), "--freeze_visionbackbone", "True"]
    return [*argv, "--num_workers", "0", "--batch_size", "3"]


def files(folder: Path) -> dict[str, bytes]:
    """The shards and the records of an extraction."""
    paths = [*folder.glob(".features/*/*"), folder / ".videos.json"]
    return {path.name: path.read_bytes() for path in paths if path.name != "about.json"}


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """66 videos, one of them unreadable, in pieces of four."""
    monkeypatch.setattr(feature_cache, "SHARD", 4)
    few = ["--videos_per_class", "30", "--val_per_class", "1", "--test_per_class", "2"]
    assert dummy_data.main(["--classes", "2", *few, "--output", str(tmp_path / "data")]) == 0
    (tmp_path / "data" / "train" / "class_1" / "video_1.pt").write_bytes(b"broken")
    return tmp_path / "data"


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Any]:
    """Three machines with one logical CPU each."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    machine = {"num_cpus": 1, "object_store_memory": STORE_MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args=machine | {"include_dashboard": False})
    cluster.others = [cluster.add_node(**machine) for _ in range(2)]
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_without_ray_the_engine_is_an_error_of_one_line(dataset, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    assert extract.main([*flags(dataset, tmp_path), "--engine", "ray"]) == 2
    expected = "error: --engine ray needs ray: pip install -r requirements-extra.txt\n"
    assert capsys.readouterr().err == expected


@pytest.mark.slow
def test_a_lost_machine_and_a_new_start_change_nothing(data, tmp_path, cluster, monkeypatch, capsys):
    """One machine dies while its encoders work. This process fails later, and is started again."""
    assert extract.main(flags(data, tmp_path / "plain")) == 1
    expected = capsys.readouterr()

    from extras import ray_extract

    worked = tmp_path / "worked"
    worked.mkdir()
    monkeypatch.setattr(ray_extract, "Encoder", waiting_encoder(ray_extract.Encoder, worked))
    write, done, lost = ray_extract.write_piece, [], []

    def write_and_break(job: Any, name: str, batches: list[Any]) -> None:
        write(job, name, batches)
        done.append(name)
        if len(done) == 2:  # a busy machine may start its encoders late
            node = first_at_work()
            cluster.remove_node(node)
            lost.append(node.node_id)
        if len(done) == 7:
            raise KeyboardInterrupt

    def first_at_work() -> Any:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for node in cluster.others:
                if (worked / node.node_id).exists():
                    return node
            time.sleep(0.1)
        raise AssertionError("no other machine has encoded anything")

    monkeypatch.setattr(ray_extract, "write_piece", write_and_break)
    argv = [*flags(data, tmp_path / "ray"), "--engine", "ray"]
    assert extract.main(argv) == 130
    assert lost and len(done) == 7

    monkeypatch.setattr(ray_extract, "write_piece", lambda *args: (write(*args), done.append(args[1])))
    capsys.readouterr()
    assert extract.main(argv) == 1
    again = capsys.readouterr()
    assert len(done) == len({*done}) == 17  # no piece twice
    assert again.err.splitlines()[-2:] == expected.err.splitlines()[-2:]  # the unreadable video
    assert files(tmp_path / "ray") == files(tmp_path / "plain")
    shutil.rmtree(tmp_path / "ray" / ".features")  # and with known records
    assert extract.main(argv) == 1
    assert files(tmp_path / "ray") == files(tmp_path / "plain")


def waiting_encoder(encoder: Any, worked: Path) -> type:
    """An Encoder that notes its machine in `worked`, and waits until two machines work: otherwise one might do all."""

    class Waiting(encoder):
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            import ray

            (worked / ray.get_runtime_context().get_node_id()).touch()
            deadline = time.monotonic() + 60
            while len([*worked.iterdir()]) < 2 and time.monotonic() < deadline:
                time.sleep(0.1)
            return super().__call__(row)

    return Waiting
