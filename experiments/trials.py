"""The trials of the study: short trainings that tune or sweep an option, or take a share of the training clips.

Their scores are kept in experiments/study.json, one row for each trial.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import default_rates, head_of, training_mode
from experiments.grid import EXPERIMENTS, MODES, TASKS, Row
from script import UserError, write_json

if TYPE_CHECKING:
    from experiments.scores import Study

STUDY = EXPERIMENTS / "study.json"
SWEEP_SHARE = 20  # percent of the training clips: with all of them, the sweeps would take days


@dataclass(frozen=True)
class Trial:
    """One training: a row of the grid with some options changed, on a share of the training clips (in percent)."""

    row: str
    options: dict[str, Any] = field(default_factory=dict)
    share: int = 100
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of its run's folder."""
        changes = [f"{option}_{value}" for option, value in self.options.items()]
        return "-".join([self.row, *changes, f"share_{self.share}", f"seed_{self.seed}"])


def read_trials(file: Path) -> list[dict[str, Any]]:
    """The finished trials and their scores; none if there is no such file. Raises UserError if it is damaged."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        known = {Trial(r["row"], r["options"], r["share"], r["seed"]).name for r in rows}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{file} holds no trials of the study") from None
    if len(known) != len(rows):
        raise UserError(f"{file} has a trial twice")
    return rows


def add_trial(trial: Trial, scores: dict[str, Any], file: Path) -> None:
    """Adds a finished trial to the file."""
    write_json([*read_trials(file), asdict(trial) | scores], file)


def learning_curves(study: "Study") -> dict[str, dict[str, dict[int, list[float]]]]:
    """{vision model: {training mode: {share: test accuracy of each seed}}} of the video classifiers."""
    curves: dict[str, dict[str, dict[int, list[float]]]] = {}
    for row in (row for row in study.rows if row.task == TASKS[0]):
        curve: dict[int, list[float]] = {}
        for trial in study.trials:
            if trial["row"] == row.name and not trial["options"]:
                curve.setdefault(trial["share"], []).append(trial["test"])
        scores = study.scores[row.name]
        if curve and scores is not None:
            curve[100] = [*scores.accuracy().seeds]
            curves.setdefault(row.config.vision_model, {})[row.mode] = dict(sorted(curve.items()))
    return {model: {mode: modes[mode] for mode in MODES if mode in modes} for model, modes in curves.items()}


def sweep_curves(study: "Study", option: str) -> dict[str, dict[Any, float]]:
    """{row: {value of the option: score on val, with SWEEP_SHARE percent of the training clips}}, of one seed. The
    trial without changed options has the row's own value."""
    rows, curves = {row.name: row for row in study.rows}, {}
    for trial in (t for t in study.trials if t["share"] == SWEEP_SHARE and t["seed"] == 0):
        row, options = rows[trial["row"]], trial["options"]
        if [*options] == [option] or (not options and matters(option, row)):
            curve = curves.setdefault(row.name, {})
            curve[options.get(option, own_value(option, row))] = trial["val"]
    curves = {row: {value: v for value, v in curve.items() if value != "auto"} for row, curve in curves.items()}
    return {row: dict(sorted(curve.items())) for row, curve in curves.items() if len(curve) > 1}


def own_value(option: str, row: Row) -> Any:
    """The value that a row has without a sweep; "auto" where only the backbone decides what it means."""
    value, config = getattr(row.config, option), row.config
    if value == "auto" and option in ("learning_rate", "head"):
        return default_rates(config)[0] if option == "learning_rate" else head_of(config)
    return value


def matters(option: str, row: Row) -> bool:
    """Whether an option changes anything in a row: a rank needs adapters, a grid needs tokens that are read."""
    if option == "lora_r":
        return "lora" in training_mode(row.config).values()
    return option != "token_grid" or row.config.use_vlm or head_of(row.config) == "attentive"
