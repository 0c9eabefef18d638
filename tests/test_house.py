"""The layout: which module may import which, files that must agree, and one line for an old Python."""

import ast
import os
import re
import subprocess
import sys

import pytest
import yaml

from config import ROOT

LAYERS = [
    {"script", "transforms"},
    {"extras.shards"},
    {"extras.claims", "extras.fused", "extras.processes", "config", "metrics", "readers"},
    {"extras.segments", "extras.groups", "extras.reject"},
    {"extras.multilabel"},
    {"dummy_data", "VLoader", "extras.augment", "pretrained", "heads"},
    {"vision"},
    {"build_model"},
    {"feature_cache", "checkpoint"},
    {"extras.frame_store"},
    {"scan", "extras.export", "train_code", "figures", "answers"},
    {"extras.controls", "extras.layers", "extras.ray_extract"},
    {"runs"},
    {"main", "sweep_heads", "inference", "extract", "score", "doctor", "preview", "plan"},
    {"create_dummy", "extras.annotations"},
    {"convert_dataset"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(module: str) -> set[str]:
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    found |= {f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    found |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    return {name for name in found if name in LEVEL}


def test_modules_import_only_from_lower_layers():
    modules = {p.stem for p in ROOT.glob("*.py")} | {f"extras.{p.stem}" for p in ROOT.glob("extras/[a-z]*.py")}
    assert modules <= LEVEL.keys(), "a module that is missing in LAYERS"
    wrong = [(m, i) for m in modules for i in imports(m) if LEVEL[i] >= LEVEL[m]]
    assert not wrong


def test_the_root_shows_the_straight_way():
    assert len([*ROOT.glob("*.py")]) <= 28, "what the three tasks can do without belongs in extras/"


def test_no_module_has_the_name_of_a_library():
    for path in [*ROOT.glob("*.py"), ROOT / "extras"]:
        code = f"import importlib.util, sys; sys.path = [p for p in sys.path if p]; sys.exit(importlib.util.find_spec({path.stem!r}) is not None)"
        assert subprocess.run([sys.executable, "-I", "-c", code], cwd="/").returncode == 0, path.stem


def test_conda_environment_installs_the_same_requirements():
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    assert environment["name"] == "vidtune"
    assert "python=3.11" in environment["dependencies"]
    assert {"pip": ["-r requirements.txt"]} in environment["dependencies"]


def test_requirements_are_pinned_and_say_why():
    for name in ("requirements.txt", "requirements-extra.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            assert line.startswith(("#", "-r ")) or re.fullmatch(r"[a-z0-9-]+==[0-9.]+ +# .+", line), line


def test_an_older_python_gets_one_line():
    code = "import sys; sys.version_info = (3, 9, 1); import {}"
    for script in ("main", "inference", "dummy_data", "create_dummy", "convert_dataset"):
        done = subprocess.run([sys.executable, "-c", code.format(script)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr == "error: vidtune needs Python 3.11 or newer, this is 3.9\n"


def test_an_older_python_can_parse_the_guard():
    """The file with the version check must be parsable by the Pythons that it refuses."""
    source = (ROOT / "script.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 8))
    for script in ("main", "inference", "dummy_data", "create_dummy", "convert_dataset"):
        ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize(
    "name",
    [
        "main",
        "sweep_heads",
        "inference",
        "score",
        "doctor",
        "extract",
        "feature_cache",
        "preview",
        "plan",
        "dummy_data",
        "create_dummy",
        "backbones.pretrain",
        "convert_dataset",
        "metrics",
        "experiments.make_report",
        "experiments.make_study",
        "experiments.epochs",
    ],
)
def test_help_is_printed_and_nothing_else_happens(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", name, "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and "--" in done.stdout and not list(tmp_path.iterdir())
