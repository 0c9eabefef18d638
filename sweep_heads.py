"""Trains many heads at once on the cached features of a frozen vision backbone, and keeps the one that is best on val.

python sweep_heads.py --data_dir my_clips --vision_model vjepa2 --weights hub
python sweep_heads.py --heads linear --learning_rates 1e-3 3e-3 1e-2 --weight_decays 0.05
python sweep_heads.py --layers 2 3 4

Each batch of features is read once, and all heads take a step on it, as V-JEPA 2 trains its probes (arXiv:2506.09985).
A head gets the weights that main.py alone would give it: it has its own optimizer and random generators, and the clips
come in the same order. The best head becomes an ordinary run; sweep.csv and sweep.json in its folder list all heads.

Modules that need torch are imported inside the functions, so that --help stays fast.
"""

import os
import time
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import groupby, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import FIELDS, Config, default_run_name, parse
from script import UserError, counted, leave, replace_file, script, write_json

if TYPE_CHECKING:
    import torch

    from runs import Run
    from train_code import Engine


@dataclass
class Candidate:
    """One head of the sweep, with what a run of its own would have."""

    run: "Run"
    engine: "Engine"  # optimizer, progress, log
    loaders: dict[str, Any]  # of its layer
    generators: list["torch.Tensor"]  # states of the random generators, which dropout uses
    best: dict[str, "torch.Tensor"] = field(default_factory=dict)  # the weights of its best epoch
    diverged: str = ""  # what was wrong with its loss

    @property
    def name(self) -> str:
        config = self.run.config
        layer = "" if config.layers == "auto" else f"layer {config.vision_layer}, "
        return f"{layer}{config.head}, learning rate {config.learning_rate:g}, weight decay {config.weight_decay:g}"


@script
def main(argv: list[str] | None = None) -> int:
    """Trains all heads, prints a table, keeps the best as a run; returns the exit status."""
    config, typed_flags = parse(argv, "sweep_heads")
    config = sweep_options(config, typed_flags)
    from checkpoint import claimed_run
    from runs import memory_advice

    # nothing is written before all heads are trained, so a sweep that is interrupted leaves no run behind
    with claimed_run(config, typed_flags, first=True) as (folder, config), memory_advice():
        started = time.perf_counter()
        candidates = build_candidates(config, folder)
        train_all(candidates)
        keep_best(ranked(candidates), started)
    return 0


def sweep_options(config: Config, typed_flags: set[str]) -> Config:
    """The options with a frozen backbone, cached features and a run name filled in.

    Raises UserError for an option of main.py that a sweep cannot follow.
    """
    what = "a sweep trains heads of video classifiers on the cached features of a frozen backbone"
    if "freeze_visionbackbone" in typed_flags and not config.freeze_visionbackbone:
        raise UserError(f"leave out --freeze_visionbackbone False: {what}")
    for name in (*sorted(typed_flags), *FIELDS):
        scripts = FIELDS[name].metadata["scripts"]
        if "main" in scripts and "sweep_heads" not in scripts and getattr(config, name) != FIELDS[name].default:
            plural = f"{name}s".removeprefix("vision_")
            raise UserError(f"--{name}: use --{plural}" if plural in FIELDS else f"leave out --{name}: {what}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("a sweep runs in one process: start it without torchrun")
    config = replace(config, freeze_visionbackbone=True, cache_features="True")
    return config if config.run_name is not None else replace(config, run_name=f"{default_run_name(config)}_sweep")


# -- the heads --------------------------------------------------------------------------------------


def build_candidates(config: Config, folder: Path) -> list[Candidate]:
    """All combinations of layer, head, learning rate and weight decay, as main.py starts them. Caches features."""
    from extras.layers import cache_layers, share_layers
    from runs import prepare, print_backbones, print_data, print_hints
    from scan import prepare_data
    from train_code import build_accelerator, build_engine, cast_frozen

    # the highest layer first: computing it computes the others. attentive first: what is cached for it includes the
    # pooled token, which is all that the linear head reads
    candidates: list[Candidate] = []
    rates, decays = ([float(value) for value in text.split()] for text in (config.learning_rates, config.weight_decays))
    layers = ["auto"] if config.layers == "auto" else sorted(map(int, config.layers.split()), reverse=True)
    for layer, head in product(layers, sorted(config.heads.split())):
        run = prepare(replace(config, vision_layer=layer, head=head), folder)
        if run.model.multi_label:
            raise UserError("a sweep is for clips with one label each, and here they may have several; use main.py")
        cast_frozen(run.model, run.config, run.accelerator)
        if not candidates:
            print_backbones(run)
            print_hints(run)
            if len(layers) > 1:
                cache_layers(run.model, run.splits, run.config, run.accelerator, layers[1:])
        run.splits, run.features, _ = prepare_data(run.splits, run.config, run.model, run.accelerator)
        generators = generator_states()
        filled = ("token_grid", "epochs", "patience")  # the same for all heads
        config = replace(config, **{name: getattr(run.config, name) for name in filled})

        # the layers of one backbone serve all heads, and the features of a layer all of its heads
        encoder, loaders = run.model.vision_encoder, run.loaders()
        if candidates:
            share_layers(encoder, candidates[0].run.model.vision_encoder)
            if candidates[-1].run.config.vision_layer == run.config.vision_layer:
                loaders = candidates[-1].loaders
        run.model.to(run.accelerator.device)

        # deepcopy's memo shares the encoder; heads start equal; each has an accelerator, for the loss scale of fp16
        for rate, decay in product(rates, decays):
            options = replace(run.config, learning_rate=rate, weight_decay=decay)
            model, accelerator = deepcopy(run.model, {id(encoder): encoder}), build_accelerator(options)
            own_run = replace(run, config=options, model=model, accelerator=accelerator)
            engine = build_engine(model, loaders["train"], options, accelerator)
            candidates.append(Candidate(own_run, engine, loaders, generators))

    print_data(run)
    sizes = f"{counted(len(candidates), 'head')} ({config.heads}) x {counted(config.epochs, 'epoch')}"
    sizes += "" if config.layers == "auto" else f", layers {config.layers}"
    print(f"{sizes}, learning rates {config.learning_rates}, weight decays {config.weight_decays}, seed {config.seed}")
    return candidates


def generator_states() -> list["torch.Tensor"]:
    """The states of the random generators of the CPU and, if there is one, of the GPU."""
    import torch

    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


# -- training ---------------------------------------------------------------------------------------


def train_all(candidates: list[Candidate]) -> None:
    """Trains all heads together; after each epoch, keeps the weights of those that are better than before on val."""
    from tqdm import tqdm

    from build_model import trained_tensors
    from train_code import DivergedError, evaluate_epoch, out_of_patience

    config = candidates[0].run.config
    for epoch in range(config.epochs):
        active = [c for c in candidates if not out_of_patience(c.engine.progress.log, config.patience)]
        if not active:
            break
        for _, heads in groupby(active, lambda candidate: candidate.run.config.vision_layer):
            train_epoch([*heads], epoch)

        # val
        for candidate in (c for c in active if not c.diverged):
            model, engine = candidate.run.model, candidate.engine
            try:
                row = evaluate_epoch(model, candidate.loaders, engine, candidate.run.config)
            except DivergedError as error:
                candidate.diverged = str(error)
                continue
            if row["best"]:
                candidate.best = {name: tensor.detach().clone() for name, tensor in trained_tensors(model).items()}
            engine.progress.next_epoch()
        best = ranked(candidates)[0]
        accuracy = 100 * best.engine.progress.best[0]
        tqdm.write(f"epoch {epoch + 1}/{config.epochs}  val accuracy {accuracy:.1f} % ({best.name})")


def train_epoch(candidates: list[Candidate], epoch: int) -> None:
    """Trains heads on one layer for an epoch: one optimizer step of every head per group of batches."""
    from tqdm import tqdm

    from train_code import groups_of, to_device

    first = candidates[0]
    config, device, loader = first.run.config, first.run.accelerator.device, first.loaders["train"]
    for candidate in candidates:
        candidate.run.model.train()
    loader.batch_sampler.epoch = epoch
    groups, total = groups_of(loader, config.gradient_accumulation_steps), first.engine.total_steps // config.epochs
    layer = "" if config.layers == "auto" else f", layer {config.vision_layer}"
    for group in tqdm(groups, f"epoch {epoch + 1}{layer}", total, leave=False, unit="step"):
        group = [to_device(batch, device) for batch in group]
        for candidate in candidates:
            train_head(candidate, group, loader)


def train_head(candidate: Candidate, group: list[dict], loader: Any) -> None:
    """One optimizer step of a head. A head whose loss is not finite takes no further part."""
    import torch

    from train_code import DivergedError, train_step

    if candidate.diverged:
        return

    # a random stream of its own: its dropout must not depend on the other heads
    clock = time.perf_counter()
    torch.set_rng_state(candidate.generators[0])
    for state in candidate.generators[1:]:
        torch.cuda.set_rng_state(state)
    try:
        train_step(candidate.run.model, group, loader, candidate.engine)
        candidate.engine.read_reports()
    except DivergedError as error:
        candidate.diverged = str(error)
    candidate.generators = generator_states()
    candidate.engine.progress.seconds += time.perf_counter() - clock


def ranked(candidates: list[Candidate]) -> list[Candidate]:
    """The heads in the order of the val accuracy of their best epochs, ties by val loss; diverged ones last.

    Raises UserError if all have diverged.
    """
    order = sorted(candidates, key=lambda c: (not c.diverged, c.engine.progress.best or ()), reverse=True)
    if order[0].diverged:
        raise UserError(f"every head has diverged: lower --learning_rates; for example {order[0].diverged}")
    return order


# -- the result -------------------------------------------------------------------------------------


def keep_best(candidates: list[Candidate], started: float) -> None:
    """Prints and writes the table, and makes a run of the first head, the only one that is scored on test."""
    from runs import finish, print_end, write_or_compare
    from train_code import save_epoch, score_best_epoch

    rows = [table_row(candidate) for candidate in candidates]
    print_table(rows)
    run, engine, loaders = candidates[0].run, candidates[0].engine, candidates[0].loaders
    print(f"best on val: {candidates[0].name}; its score on val is partly luck, so report the score on test:")

    # table_row() loaded the best weights; metrics.json comes last, because it marks the run as finished
    write_or_compare(run)
    best_epoch = next(row for row in reversed(engine.progress.log) if row["best"])
    save_epoch(run.model, best_epoch, engine.progress.log, run.folder)
    write_json(rows, run.folder / "sweep.json")
    lines = [rows[0].keys(), *(row.values() for row in rows)]
    text = "".join(",".join("" if value is None else str(value) for value in line) + "\n" for line in lines)
    replace_file(run.folder / "sweep.csv", lambda path: path.write_text(text, encoding="utf-8"))
    engine.started = started  # the run took as long as the sweep
    finish(run, score_best_epoch(run.model, loaders, run.config, engine, run.folder))
    print_end(run)


def table_row(candidate: Candidate) -> dict[str, Any]:
    """Loads a head's best weights into its model; returns its row of the table, with None where it diverged."""
    from checkpoint import WEIGHTS, copy_tensors
    from metrics import with_intervals
    from train_code import evaluate

    run = candidate.run
    layer = ("vision_layer",) if run.config.layers != "auto" else ()
    row = {name: getattr(run.config, name) for name in (*layer, "head", "learning_rate", "weight_decay")}
    row |= dict.fromkeys(("epoch", "val_loss", "val_accuracy", "low", "high"))
    if candidate.diverged:
        return row
    copy_tensors(run.model, candidate.best, run.folder / WEIGHTS)
    val = evaluate(run.model, candidate.loaders["val"], run.accelerator)
    right = val["ranked"][:, 0] == val["truth"]  # (n,)
    groups = [sample.recording for sample in run.splits.val]
    scores = with_intervals(lambda indices: {"accuracy": float(right[indices].mean())}, len(right), groups)
    epoch = max(row["epoch"] for row in candidate.engine.progress.log if row["best"])
    values = (epoch, val["loss"], val["accuracy"], *scores["intervals"]["accuracy"])
    return row | dict(zip(("epoch", "val_loss", "val_accuracy", "low", "high"), values, strict=True))


def print_table(rows: list[dict[str, Any]]) -> None:
    layer = f"{'layer':<7}" if "vision_layer" in rows[0] else ""
    print(
        f"{layer}{'head':<10}{'learning rate':>14}{'weight decay':>14}{'epoch':>7}{'val loss':>10}   val accuracy (95 %)"
    )
    for row in rows:
        *number, head, rate, decay, epoch, loss, accuracy, low, high = row.values()
        layer = "".join(f"{value:<7}" for value in number)
        scores = "   diverged"
        if epoch is not None:
            scores = f"{epoch:>7}{loss:>10.3f}   {100 * accuracy:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        print(f"{layer}{head:<10}{rate:>14g}{decay:>14g}{scores}")


if __name__ == "__main__":
    leave(main())
