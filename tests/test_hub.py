"""Published weights: short names, licences, and downloads from a hub on the loopback address."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pytest
import torch
from hub_server import Hub
from huggingface_hub import constants
from safetensors.torch import load, load_file, save_file

import main
from config import BACKBONES, ROOT, build_parser, is_non_commercial
from pretrained import Source, check_tokenizer, from_source, licence_of, locate
from script import UserError

HUB_ONLY = [name for name, backbone in BACKBONES.items() if not backbone.tiny]


# -- short names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_a_short_name_leads_to_one_commit_of_the_hub(name):
    """A branch could be changed later, and a wrong name would be downloaded before anybody notices."""
    source = locate(name, "hub")
    assert source.path == BACKBONES[name].hub and re.fullmatch("[0-9a-f]{40}", source.revision)
    assert BACKBONES[name].tiny == (ROOT / "backbones" / f"{name}-tiny").is_dir()


@pytest.mark.parametrize("name", HUB_ONLY)
def test_a_name_without_tiny_weights_says_what_to_add(capsys, name):
    option = "--vision_model" if BACKBONES[name].kind == "vision" else "--language_model"
    captioning = [] if BACKBONES[name].kind == "vision" else ["--use_vlm", "True", "--captioning", "True"]
    assert main.main([option, name, *captioning]) == 2
    assert capsys.readouterr().err == f"error: {option} {name} has no tiny weights: add --weights hub\n"


def test_help_gives_the_licence_of_every_short_name():
    text = build_parser("main").format_help()
    for name, backbone in BACKBONES.items():
        (line,) = re.findall(rf"^  {name} +(?:yes|no) +{backbone.hub} +(.*)$", text, re.MULTILINE)
        assert line.startswith(backbone.licence)
        assert line.endswith(", not for commercial use") == (name in ("timesformer", "videomae"))


# -- licences ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "licence, forbids",
    [
        ("CC-BY-NC-4.0", True),
        ("cc-by-nc-sa-2.0", True),
        ("openrail-noncommercial", True),
        ("Non-Commercial", True),
        ("CC-BY-4.0", False),
        ("MIT", False),
        ("DINOv3 License", False),
        ("nccl-license", False),
        ("unknown: read its card", False),
    ],
)
def test_which_licences_forbid_commercial_use(licence, forbids):
    assert is_non_commercial(licence) == forbids


@pytest.mark.parametrize(
    "card, licence",
    [
        ("---\nlicense: mit\ntags:\n- video\n---\n# A model", "mit"),
        ("---\r\ntags:\r\n- video\r\nlicense: 'cc-by-nc-4.0'\r\n---\r\n", "cc-by-nc-4.0"),
        ("---\nlicense: other\nlicense_name: dinov3-license\n---\n", "dinov3-license"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", None),
        ("---\ntags: [video]\n---\nlicense: mit\n", None),
        ("# A model\nlicense: mit\n", None),
        ("---\nlicense: mit\n" + "x" * 30_000, None),
        ("\xff\xfe", None),
        (None, None),
    ],
)
def test_the_licence_of_a_folder_is_that_of_its_card(tmp_path, card, licence):
    if card is not None:
        (tmp_path / "README.md").write_text(card, encoding="latin-1", newline="")
    assert licence_of(Source(str(tmp_path))) == (licence or "unknown: read its card")


def test_the_licence_of_a_hub_id_is_known_if_it_has_a_short_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert licence_of(Source("MCG-NJU/videomae-base-finetuned-kinetics")) == "CC-BY-NC-4.0"
    assert licence_of(Source("MCG-NJU/videomae-large")) == "unknown: read its card"
    assert licence_of(Source("backbones/bert-tiny")) == licence_of(locate("bert", "tiny")) == "Apache-2.0"


def test_a_run_prints_and_keeps_the_licences_and_warns(dataset, tmp_path, capsys):
    folder = shutil.copytree(ROOT / "backbones" / "timesformer-tiny", tmp_path / "noncommercial")
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    argv = ["--vision_model", str(folder), "--use_vlm", "True", "--freeze_visionbackbone", "True"]
    argv += ["--data_dir", str(dataset), "--output_dir", str(tmp_path), "--run_name", "r"]
    assert main.main([*argv, "--epochs", "1", "--num_workers", "0"]) == 0
    first, second, third, fourth, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"vision: {folder} (") and first.endswith("licence cc-by-nc-4.0)")
    assert second == f"warning: {folder} and models trained from it are not for commercial use (cc-by-nc-4.0)"
    assert third.startswith("language: bert-tiny (") and third.endswith("licence Apache-2.0)")
    assert fourth.startswith("frames: ")
    backbones = json.loads((tmp_path / "r" / "metadata.json").read_text())["backbones"]
    assert {part: values["licence"] for part, values in backbones.items()} == {
        "vision": "cc-by-nc-4.0",
        "language": "Apache-2.0",
    }


# -- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offline, place", [(False, "the hub"), (True, "the downloads in HF_HOME, without the hub")])
def test_an_error_names_what_went_wrong_and_not_what_transformers_makes_of_it(monkeypatch, offline, place):
    """As when a download breaks off again and again. Without the hub, a file that is missing may well exist there."""

    class Loader:
        @staticmethod
        def from_pretrained(**arguments):
            try:
                raise ConnectionError("peer closed connection")
            except ConnectionError as error:
                raise OSError(
                    "Can't load the model for 'a/b'. Make sure you don't have a folder of that name."
                ) from error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(UserError, match=f"cannot load the weights of a/b from {place}: peer closed connection -- "):
        from_source(Loader, Source("a/b"), "weights")


def test_the_remedy_fits_the_source(tmp_path):
    """A folder is copied again. What the hub sent is in its cache, and would be read from there for ever."""

    class Damaged:
        @staticmethod
        def from_pretrained(**arguments):
            return load(bytes(100))

    class SpecialTokensOnly(list):
        all_special_ids = ()

    for source, remedy in ((Source(str(tmp_path)), "copy the folder again"), (Source("a/b"), "remove it from HF_HOME")):
        with pytest.raises(UserError, match=f"its weights are damaged: .*; {remedy}"):
            from_source(Damaged, source, "weights")
        with pytest.raises(UserError, match=rf"{source.path} has no tokenizer \(tokenizer.json\): {remedy}"):
            check_tokenizer(source, SpecialTokensOnly(), 10)


# -- downloads --------------------------------------------------------------------------------------

NAME, TINY = BACKBONES["timesformer"], ROOT / "backbones" / "timesformer-tiny"
FLAGS = ["--vision_model", "timesformer", "--weights", "hub", "--freeze_visionbackbone", "True"]
slow = pytest.mark.slow
# every script is started with this: it lists what the process connects to, and lets it reach nothing but this machine
GUARD = """
import os, sys

def watch(event, args):
    if event in ("socket.getaddrinfo", "socket.connect"):
        host = args[0] if event == "socket.getaddrinfo" else args[1][0] if isinstance(args[1], tuple) else "127.0.0.1"
        with open(os.environ["ASKED"], "a") as file:
            file.write(f"{host}\\n")
        if host != "127.0.0.1":
            raise OSError("the tests reach no other machine")

sys.addaudithook(watch)
"""


@dataclass
class User:
    """Someone with a cache of downloads who starts scripts."""

    home: Path
    dataset: Path

    def run(self, hub: Hub, script: str, *flags: str, **environment: str) -> tuple[int, str, str]:
        """(exit status, stdout, stderr) of a script whose hub is `hub`. Fails if it asks anything else."""
        (self.home / "guard").mkdir(parents=True, exist_ok=True)
        (self.home / "guard" / "sitecustomize.py").write_text(GUARD)
        asked = self.home / "asked"
        asked.write_text("")
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *flags],
            cwd=self.home,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(self.home / "guard"),
                "HOME": str(self.home),
                "HF_HOME": str(self.home / "hub"),
                "HF_ENDPOINT": hub.url,
                "MPLCONFIGDIR": matplotlib.get_cachedir(),  # its list of fonts takes seconds to make
                "OMP_NUM_THREADS": "1",
                "ASKED": str(asked),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert {*asked.read_text().split()} <= {"127.0.0.1"}
        return done.returncode, done.stdout, done.stderr

    def train(self, hub: Hub, run: str, *flags: str, **environment: str) -> tuple[int, str, str]:
        """A short training with FLAGS, unless `flags` say otherwise."""
        fixed = ["--data_dir", str(self.dataset), "--epochs", "1", "--num_workers", "0", "--run_name", run]
        return self.run(hub, "main.py", *FLAGS, *fixed, *flags, **environment)

    def fingerprint(self, run: str) -> str:
        """That of the vision backbone on which a run was trained."""
        metadata = json.loads((self.home / "checkpoints" / run / "metadata.json").read_text())
        return metadata["backbones"]["vision"]["fingerprint"]


@pytest.fixture
def hub() -> Generator[Hub]:
    """A hub with one repository, the published TimeSformer; its weights are the tiny ones."""
    hub = Hub({NAME.hub: {NAME.revision: TINY}})
    yield hub
    hub.close()


@pytest.fixture
def user(tmp_path, dataset) -> User:
    return User(tmp_path, dataset)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset) -> tuple[User, Hub, tuple[int, str, str]]:
    """Someone who has trained the run `first`; the hub, which is gone by now; and what the training printed."""
    user, hub = User(tmp_path_factory.mktemp("user"), dataset), Hub({NAME.hub: {NAME.revision: TINY}})
    result = user.train(hub, "first")
    hub.close()
    return user, hub, result


def changed(folder: Path, file: str) -> Path:
    """A copy of the tiny TimeSformer with other weights, or without one of its files."""
    shutil.copytree(TINY, folder)
    if file != "model.safetensors, changed":
        (folder / file).unlink()
        return folder
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@slow
def test_a_backbone_is_downloaded_once_at_its_commit_and_then_no_hub_is_needed(trained):
    """Each file is fetched once, and only at the pinned commit; afterwards a run and its use need no network."""
    user, hub, (status, out, err) = trained
    assert status == 0, err
    assert f"vision: {NAME.hub} (" in out and f"warning: {NAME.hub} and models trained from it" in out
    assert len(hub.asked("model.safetensors")) == len(hub.asked("config.json")) == 1
    assert {request.path for request in hub.requests if "resolve" in request.path} == {
        request.path for request in hub.requests if f"/{NAME.hub}/resolve/{NAME.revision}/" in request.path
    }
    assert not any(request.token for request in hub.requests)

    count = len(hub.requests)
    video = str(next((user.dataset / "test").rglob("*.pt")))
    status, out, err = user.run(hub, "inference.py", "--checkpoint", "checkpoints/first", "--video_dir", video)
    assert status == 0 and " %" in out, err
    assert len(hub.requests) == count


@slow
def test_offline_a_cached_backbone_is_used_and_an_absent_one_is_one_line(trained, hub, tmp_path):
    """HF_HUB_OFFLINE: nothing is asked, although the hub is there."""
    known, _, _ = trained
    status, _, err = known.train(hub, "again", HF_HUB_OFFLINE="1")
    assert status == 0, err
    new = User(tmp_path, known.dataset)
    status, out, err = new.train(hub, "r", HF_HUB_OFFLINE="1")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: cannot load the configuration (config.json) of facebook/timesformer-base")
    assert err.endswith("use --weights tiny, or give the path of a folder with a copy of it\n")
    assert not hub.requests and not (tmp_path / "checkpoints").exists()


@slow
def test_a_download_that_breaks_off_continues_where_it_stopped(hub, user, trained, tmp_path):
    """The hub's client keeps what it has in pieces of 10 MiB. A bar shows the download, as on a terminal."""
    folder = shutil.copytree(TINY, tmp_path / "large")
    tensors = load_file(folder / "model.safetensors") | {"unused": torch.zeros(4 * 2**20)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    hub.repositories[NAME.hub] = {NAME.revision: folder}
    hub.breaks["model.safetensors"] = 11 * 2**20
    status, _, err = user.train(hub, "r", TQDM_POSITION="-1")
    assert status == 0 and re.search(r"model.safetensors: 100%\|.*MB/s", err), err
    whole, rest = hub.asked("model.safetensors")
    assert whole.range is None and rest.range == f"bytes={10 * 2**20}-"
    assert user.fingerprint("r") == trained[0].fingerprint("first")


@slow
def test_what_is_uploaded_later_changes_nothing_for_a_short_name(hub, user, trained, tmp_path):
    """The id without the short name means the newest commit."""
    hub.repositories[NAME.hub]["f" * 40] = changed(tmp_path / "later", "model.safetensors, changed")
    assert user.train(hub, "pinned")[0] == 0
    assert not any("f" * 40 in request.path or "/main/" in request.path for request in hub.requests)
    status, _, err = user.train(hub, "newest", "--vision_model", NAME.hub)
    assert status == 0, err
    assert user.fingerprint("pinned") == trained[0].fingerprint("first") != user.fingerprint("newest")


@slow
@pytest.mark.parametrize(
    "file, message",
    [
        ("config.json", "error: cannot load the configuration (config.json) of facebook/timesformer-base"),
        (
            "model.safetensors",
            "error: cannot load the weights of facebook/timesformer-base-finetuned-k400 from the hub",
        ),
        ("preprocessor_config.json", ""),
    ],
)
def test_a_repository_without_a_file(hub, user, tmp_path, file, message):
    hub.repositories[NAME.hub] = {NAME.revision: changed(tmp_path / "incomplete", file)}
    status, out, err = user.train(hub, "r")
    if message:
        assert status == 2 and err.startswith(message) and err.count("\n") == 1 and "a folder with a copy" in err
        assert not (user.home / "checkpoints").exists()
    else:
        assert status == 0 and f"warning: {NAME.hub} has no preprocessor_config.json; using the usual values" in out


@slow
def test_weights_as_a_pickle_are_read_and_no_service_converts_them(hub, user, trained, tmp_path):
    """transformers would ask another host to convert them, and download the result too."""
    folder = changed(tmp_path / "pickle", "model.safetensors")
    torch.save(load_file(TINY / "model.safetensors"), folder / "pytorch_model.bin")
    hub.repositories[NAME.hub] = {NAME.revision: folder}
    status, _, err = user.train(hub, "r")
    assert status == 0, err
    assert user.fingerprint("r") == trained[0].fingerprint("first")
    assert len(hub.asked("pytorch_model.bin")) == 1
    assert not any("discussions" in request.path or "commits" in request.path for request in hub.requests)


@slow
def test_a_gated_backbone_needs_a_token_which_only_the_hub_gets(hub, user):
    hub.gated[NAME.hub] = "hf_notarealtoken"
    for environment in ({}, {"HF_TOKEN": "hf_wrong"}):
        status, out, err = user.train(hub, "r", **environment)
        page = f"https://huggingface.co/{NAME.hub}"
        assert (status, out) == (2, "") and "hf_wrong" not in err
        assert err == (
            f"error: {NAME.hub} is gated: accept its conditions on {page} and set HF_TOKEN, or give the path of a "
            "folder with a copy of it\n"
        )
    status, out, err = user.train(hub, "r", HF_TOKEN="hf_notarealtoken")
    assert status == 0, err
    assert "hf_notarealtoken" not in out + err
    for file in (user.home / "checkpoints").rglob("*"):
        assert not file.is_file() or b"hf_notarealtoken" not in file.read_bytes(), file


@slow
def test_an_id_that_does_not_exist_is_one_line(hub, user):
    status, out, err = user.train(hub, "r", "--vision_model", "nobody/nothing")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "cannot load the configuration (config.json) of nobody/nothing from the hub" in err


@slow
def test_a_hub_that_does_not_answer_in_time_is_one_line_and_slow_files_are_waited_for(hub, user):
    hub.delays = {"model.safetensors": 3, "config.json": 3}
    status, _, err = user.train(hub, "r")
    assert status == 0, err
    hub.delays = {"/": 5}
    status, out, err = User(user.home / "other", user.dataset).train(hub, "r", HF_HUB_ETAG_TIMEOUT="1")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "use --weights tiny, or give the path of a folder with a copy of it" in err
