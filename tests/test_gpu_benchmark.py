"""benchmarks/gpu.py at tiny size on the CPU, by main([...]): what GPU.md has to contain."""

import re
from pathlib import Path

import pytest

from benchmarks import gpu

ROWS = ["full", "LoRA", "frozen, extraction", "frozen, warm"]


def written(tmp_path: Path, *flags: str) -> tuple[dict[str, dict[str, list[str]]], dict[str, list[str]]]:
    """({model: {row: its cells}}, {bar: its cells}) of GPU.md after a run of main() with these flags."""
    file = tmp_path / "GPU.md"
    assert gpu.main(["--seconds", "0.02", "--output", str(file), *flags]) == 0
    top, *sections = re.split("^## ", file.read_text(), flags=re.MULTILINE)
    models = {section.splitlines()[0]: rows_of(section) for section in sections}
    return models, rows_of(top)


def rows_of(text: str) -> dict[str, list[str]]:
    """{first cell: the others} of the rows of a Markdown table, without its header."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {name: cells for name, *cells in rows[2:]}


def assert_complete(rows: dict[str, list[str]]) -> None:
    """Every row has speeds above zero, MFU if it reads pixels, no GPU memory, and the quotients of its speeds."""
    assert [*rows] == ROWS
    for name, cells in rows.items():
        speeds = {}
        for column in (0, 1, 3, 5):
            if name == "frozen, warm" and column == 1:
                assert cells[1:3] == ["", ""]
                continue
            speed, memory, *mfu = cells[column].split(", ")
            speeds[column] = float(speed)
            assert speeds[column] > 0 and memory == "not measured"
            assert [float(value.removesuffix(" %")) >= 0 for value in mfu] == [True] * (name != "frozen, warm")
        for column in {1, 3, 5} & speeds.keys():
            assert float(cells[column + 1]) == pytest.approx(speeds[0] / speeds[column], rel=0.02, abs=0.01)


def assert_not_measured(rows: dict[str, list[str]]) -> None:
    assert [*rows] == ROWS
    assert {cell for cells in rows.values() for cell in cells} == {"not measured", ""}


@pytest.mark.parametrize(
    "clips, names", [("mp4", ["VideoMAE-base"]), pytest.param("pt", [*gpu.MODELS], marks=pytest.mark.slow)]
)
def test_without_a_gpu_tiny_models_are_measured_and_nothing_of_a_gpu(tmp_path, monkeypatch, clips, names):
    monkeypatch.setattr(gpu, "clip_format", lambda: clips)
    monkeypatch.setattr(gpu, "MODELS", {name: gpu.MODELS[name] for name in names})
    models, bars = written(tmp_path, "--minutes", "60")
    assert [*models] == [*names, *(f"{name}, tiny, on the CPU" for name in names)]
    for model, rows in models.items():
        assert_complete(rows) if "tiny" in model else assert_not_measured(rows)
    assert [cells[1] for cells in bars.values()] == ["not measured"] * 4
    assert f"Clips are synthetic, as {clips}" in (tmp_path / "GPU.md").read_text()


def test_what_there_is_no_time_for_is_not_measured(tmp_path, capsys):
    models, _ = written(tmp_path, "--minutes", "0")
    assert "the last 27 of 27 cells are not measured" in capsys.readouterr().out
    for rows in models.values():
        assert_not_measured(rows)


def test_a_cell_that_fails_is_named_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "MODELS", {"V-JEPA 2 large": gpu.MODELS["V-JEPA 2 large"]})
    monkeypatch.setattr(gpu, "ORDER", [("full", "tuned"), ("frozen", "vidtune")])
    monkeypatch.setattr(gpu.Bench, "run_trainer", lambda *_: 1 / 0)
    file = tmp_path / "GPU.md"
    assert gpu.main(["--seconds", "0.02", "--output", str(file)]) == 1
    assert file.read_text().endswith("failed: V-JEPA 2 large, tiny, on the CPU, full, tuned: ZeroDivisionError\n")
    warm = rows_of(file.read_text().split("## ")[2])["frozen, warm"]
    assert float(warm[0].split(", ")[0]) > 0 and warm[3:] == ["not measured"] * 4


def test_bars_count_what_was_measured(tmp_path):
    """One model at the bar of the tuned Trainer, one below it, one that was not measured."""
    bench = gpu.Bench(tmp_path, gpu.MODELS, 1.0, 0, {})
    for model, speed in zip(gpu.MODELS, (10.0, 9.9), strict=False):
        bench.figures[model, "full", "vidtune"] = gpu.Figures(speed, 1.0, 0.4)
        bench.figures[model, "full", "synthetic"] = gpu.Figures(11.0, 1.0, 0.44)
        bench.figures[model, "full", "Trainer, tuned"] = gpu.Figures(10.0, 2.0, 0.4)
    tuned, documented, mfu, loader = rows_of(gpu.bars(bench)).values()
    assert tuned[:2] == ["1.00", "1 of 2"] and "TimeSformer-base, full 1.00; VideoMAE-base, full 0.99" in tuned[2]
    assert "V-JEPA 2 large, full not measured" in tuned[2] and documented[1] == "not measured"
    assert mfu[:2] == ["45 %", "0 of 2"] and loader[:2] == ["85 %", "2 of 2"]
