"""Writes the runs of seed 0 as provided checkpoints, which are shipped with the program and serve without training."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from config import Config, as_flags, write_yaml
from experiments.grid import Row
from experiments.tables import CONTROLS
from script import replace_file

LEFT_OUT = ("vjepa2", "vjepa2_loravision")  # with these, a clone would take 3 MB more


def provide(row: Row, folder: Path, data_dir: Path) -> int:
    """Writes the run of seed 0 as a provided checkpoint and returns its size in bytes."""
    import torch

    from checkpoint import CONFIG_YAML, METADATA, WEIGHTS, read_run, read_tensors, save_tensors
    from script import write_json

    # weights, and what is needed to rebuild the model: pictures, logs and predictions stay behind
    run_dir, target = row.dirs[0], folder / row.name
    if target.is_dir():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for name in ("vision", "language"):
        if (run_dir / name).is_dir():
            shutil.copytree(run_dir / name, target / name)

    # no path of this machine is shipped, and the run's name follows from its flags again
    config, metadata = read_run(run_dir)
    folders = {name: getattr(Config(), name) for name in ("data_dir", "output_dir", "cache_dir")}
    config = replace(config, run_name=None, controls=False, **folders)
    write_yaml(asdict(config), target / CONFIG_YAML)
    write_json(metadata, target / METADATA)

    # bfloat16 halves the file and changes a few answers of a thousand
    tensors, header = read_tensors(run_dir / WEIGHTS)
    save_tensors({name: t.to(torch.bfloat16) for name, t in tensors.items()}, header, target / WEIGHTS)

    # so the card reports what the file in this folder scores, not what the run once scored
    count = sum(t.numel() for t in tensors.values())
    controls = control_table(target, data_dir, run_dir.parent)
    text = card(row, config, rescored(target, data_dir), controls, count)
    replace_file(target / "CARD.md", lambda p: p.write_text(text, encoding="utf-8"))
    return sum(p.stat().st_size for p in target.rglob("*") if p.is_file())


def card(row: Row, config: Config, scores: dict[str, float], table: dict[str, Any], parameters: int) -> str:
    """CARD.md. `scores` and the `table` of controls are those of the checkpoint in the same folder."""
    # as_flags is empty for a row of defaults, so the commands are joined from parts
    flags = as_flags(config).split()
    train, predict = (" ".join((script, *flags)) for script in ("main.py", "python inference.py"))
    controls = [f"{CONTROLS[n]} {show_all(v)}" for n, v in table.items() if n in CONTROLS]
    return f"""# {row.name}

{row.title}: a {row.task}, trained on the synthetic dataset with `{train}`, seed {config.seed},
{config.epochs} epochs. It knows the moving shapes of that dataset, and nothing else.

    {predict} --video_dir ./frames_see/

Contains the {parameters:,} trained parameters in bfloat16. All other weights come from [backbones](../../../backbones).

Scores of this checkpoint on the dataset's test videos: {show_all(scores)}.

Controls (inputs on which it should fail) and baselines (majority, nearest neighbour): {"; ".join(controls)}.

Licence: Apache-2.0.
"""


def show_all(scores: dict[str, float]) -> str:
    """`accuracy 98.5 %, macro_f1 98.5 %`; BLEU and CIDEr are not percentages, and counts are left out."""
    plain = ("CIDEr", "Bleu_4")
    shown = {name: value for name, value in scores.items() if name != "count"}
    return ", ".join(f"{n} {v:.3f}" if n in plain else f"{n} {100 * v:.1f} %" for n, v in shown.items())


def rescored(run_dir: Path, data_dir: Path) -> dict[str, float]:
    """Test scores of a checkpoint, computed again from its files and rounded to the digits that the card shows."""
    import train_code
    from checkpoint import load_run
    from VLoader import read_splits

    # test only: nothing is trained or selected here
    model, config, _ = load_run(run_dir, Config(num_workers=0))
    config = model.vision_encoder.fill_auto(config)  # load_run leaves the batch size to its caller
    splits = replace(read_splits(data_dir), train=[], val=[])
    accelerator = train_code.build_accelerator(config)
    loader = train_code.build_loaders(model, config, splits)["test"]
    scores, _ = train_code.final_scores(model, loader, accelerator, config, "test")

    # the two scores of each task that papers report, and the attributes of captions
    names = ("accuracy", "macro_f1", "CIDEr", "Bleu_4")
    kept = {name: round(scores[name], 4) for name in names if name in scores}
    return kept | {n: round(v, 4) for n, v in scores.get("attributes", {}).items() if n != "intervals"}


def control_table(run_dir: Path, data_dir: Path, runs: Path) -> dict[str, Any]:
    """The controls of a checkpoint, computed again. Features are cached in the folder `runs`."""
    import train_code
    from checkpoint import load_run
    from extras.controls import control_scores
    from VLoader import read_splits

    model, config, _ = load_run(run_dir, Config(num_workers=0, output_dir=str(runs)))
    config = model.vision_encoder.fill_auto(config)
    return control_scores(model, read_splits(data_dir), config, train_code.build_accelerator(config))
