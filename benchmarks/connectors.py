"""Ways to join a frozen vision backbone to a language model, trained alike on one feature cache.

    python -m benchmarks.connectors --data_dir synthetic_dataset [--seeds 3] [the flags of a training]

    mean        one token: the mean of all video tokens, through the MLP
    mlp         today's projector: the MLP on every pooled token, and a time embedding
    resampler   --queries learned tokens that read the projected tokens (Flamingo's resampler, arXiv:2204.14198)
    gated       no tokens in the text: before each layer of a frozen GPT-2 a gated cross-attention reads the projected
                tokens (arXiv:2204.14198); its gates start closed
val selects the epoch, test is read once; means over the seeds, and their range.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from build_model import Projector, VideoModel, build_model, trained_tensors
from checkpoint import describe_run, start_run
from config import Config, parse
from feature_cache import fill, open_store, read_features
from main import resolve
from script import UserError
from train_code import build_accelerator, build_loaders, train
from VLoader import Splits, read_splits

FROZEN = ["--use_vlm", "True", "--freeze_visionbackbone", "True"]
SETTINGS = {
    "bert frozen": [*FROZEN, "--freeze_llmbackbone", "True"],
    "bert full": FROZEN,
    "gpt2 frozen": [*FROZEN, "--captioning", "True", "--freeze_llmbackbone", "True"],
    "gpt2 LoRA": [*FROZEN, "--captioning", "True", "--use_lora_llm", "True"],
}


class Mean(nn.Module):
    """The projector's MLP on the mean of all video tokens."""

    num_tokens = 1

    def __init__(self, projector: Projector):
        super().__init__()
        self.mlp = projector.mlp

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.mlp(tokens.mean(1, keepdim=True))  # (B, 1, D)


class CrossAttention(nn.Module):
    """Queries (B, M, D) read keys (B, N, D), then an MLP; both behind norms."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.norm, self.norm_keys, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.gates = None

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        gate_read, gate_mlp = (1.0, 1.0) if self.gates is None else self.gates.tanh()
        keys = self.norm_keys(keys)
        queries = queries + gate_read * self.attention(self.norm(queries), keys, keys, need_weights=False)[0]
        return queries + gate_mlp * self.mlp(self.norm_mlp(queries))


class Resampler(nn.Module):
    """Learned queries that read the projector's tokens in two layers."""

    def __init__(self, projector: Projector, width: int, queries: int):
        super().__init__()
        self.projector, self.num_tokens = projector, queries
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.layers = nn.ModuleList(CrossAttention(width) for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        keys = self.projector(tokens)  # (B, N, D)
        queries = self.queries.expand(len(keys), -1, -1)  # (B, M, D)
        for layer in self.layers:
            queries = layer(queries, keys)
        return queries


class Gated(nn.Module):
    """A gated cross-attention before each layer of a causal model; adds no tokens to the text."""

    num_tokens = 0

    def __init__(self, projector: Projector, language_model: nn.Module):
        super().__init__()
        self.projector = projector
        blocks = language_model.transformer.h
        self.layers = nn.ModuleList(CrossAttention(language_model.config.hidden_size) for _ in blocks)
        for layer, block in zip(self.layers, blocks, strict=True):
            layer.gates = nn.Parameter(torch.zeros(2))
            block.register_forward_pre_hook(lambda _, args, layer=layer: (layer(args[0], self.keys), *args[1:]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.keys = self.projector(tokens)  # (B, N, D)
        return self.keys[:, :0]


def connect(model: VideoModel, name: str, queries: int) -> None:
    """Puts the connector in the projector's place."""
    width = model.language_model.config.hidden_size
    if name == "mean":
        model.projector = Mean(model.projector)
    elif name == "resampler":
        model.projector = Resampler(model.projector, width, queries)
    elif name == "gated":
        model.projector = Gated(model.projector, model.language_model)


def run(config: Config, name: str, queries: int, splits: Splits, folder: Path) -> dict[str, Any]:
    """One training; test scores, trained parameters outside the language model, seconds per epoch."""
    accelerator = build_accelerator(config)
    torch.manual_seed(config.seed)
    model = build_model(config, len(splits.class_names))
    config = resolve(config, model)
    store = open_store(model, config)
    fill(store, model, splits, config, accelerator)
    connect(model, name, queries)
    run_dir = folder / f"{time.time_ns()}"
    run_dir.mkdir()
    start_run(run_dir, model, config, describe_run(model, config, splits.class_names, {}, ""))
    loaders = build_loaders(model, config, splits, read_features(store, splits, config))
    metrics = train(model, loaders, config, accelerator, run_dir)
    parameters = sum(p.numel() for n, p in trained_tensors(model).items() if n.startswith("projector"))
    return metrics | {"parameters": parameters}


def compare(argv: list[str], folder: Path) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.connectors", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--connectors", nargs="+", default=["mean", "mlp", "resampler", "gated"])
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS])
    args, flags = parser.parse_known_args(argv)
    print("| vision, language | connector | parameters | test loss | accuracy, or all attributes right | s per epoch |")
    for setting in args.settings:
        config, _ = parse([*SETTINGS[setting], *flags, "--cache_dir", str(folder / "features")], "main")
        splits = read_splits(Path(config.data_dir))
        for name in args.connectors:
            if name == "gated" and setting != "gpt2 frozen":
                continue
            runs = [run(replace(config, seed=s), name, args.queries, splits, folder) for s in range(args.seeds)]
            tests = [r["test"] for r in runs]
            right = [100 * (t["accuracy"] if "accuracy" in t else t["attributes"]["all"]) for t in tests]
            losses = [t["loss"] for t in tests]
            print(
                f"| {config.vision_model}, {setting} | {name} | {runs[0]['parameters']:,} | {mean(losses):.3f} ({min(losses):.3f}-{max(losses):.3f}) "
                f"| {mean(right):.1f} % ({min(right):.1f}-{max(right):.1f}) | {mean(r['seconds_per_epoch'] for r in runs):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        try:
            compare(sys.argv[1:], Path(folder))
        except UserError as error:
            sys.exit(f"error: {error}")
