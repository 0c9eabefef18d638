"""Published weights: short names, licences."""

import json
import re
import shutil

import pytest

import main
from config import BACKBONES, ROOT, build_parser, is_non_commercial
from pretrained import Source, licence_of, locate

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
    assert main.main(["--vision_model", name]) == 2
    assert capsys.readouterr().err == f"error: --vision_model {name} has no tiny weights: add --weights hub\n"


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
