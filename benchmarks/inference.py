"""What an answer costs: one clip from a cold start, adapters merged or not, captions in batches with and without cache.

    python -m benchmarks.inference --data_dir synthetic_dataset

    one clip      `inference.py` for one video, as a process, beside a bare `import torch, transformers`
    adapters      a classifier with LoRA, its adapters merged as inference.py does, and as they were trained
    captions      a captioner's answers, greedy: batched with a key-value cache as inference.py writes them, one clip
                  at a time, and batched without cache
Jobs of one table alternate; medians over the rounds, and their spread. --classifier and --captioner name other runs.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks import alternate
from build_model import VideoModel
from checkpoint import PROVIDED, load_run
from config import ROOT
from inference import Predictor
from script import UserError
from train_code import build_loaders
from VLoader import read_splits


def table(title: str, jobs: dict[str, Callable[[], object]], rounds: int, clips: int = 1) -> None:
    """Seconds, or clips per second, of each job, and the median of its ratio to the first within a round."""
    seconds = alternate(jobs, rounds)
    first = next(iter(seconds.values()))
    print(f"\n| {title} | {'s' if clips == 1 else 'clips/s'} | spread | time to the first |\n|---|---|---|---|")
    for name, values in seconds.items():
        shown = sorted(values if clips == 1 else [clips / v for v in values])
        ratio = median(a / b for a, b in zip(values, first, strict=True))
        print(f"| {name} | {median(shown):.2f} | {shown[0]:.2f}-{shown[-1]:.2f} | {ratio:.2f} |", flush=True)


def process(*command: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)


def one_clip(classifier: Path, captioner: Path, video: Path, rounds: int) -> None:
    def answer(run: Path) -> Callable[[], object]:
        return process("inference.py", "--checkpoint", str(run), "--video_dir", str(video))

    jobs = {
        "import torch, transformers": process("-c", "import torch, transformers"),
        "inference.py, classifier with LoRA": answer(classifier),
        "inference.py, captioner": answer(captioner),
        "inference.py --help": process("inference.py", "--help"),
    }
    table("one clip, a process", jobs, rounds)


def adapters(run: Path, batches: list[torch.Tensor], rounds: int) -> None:
    trained, config, metadata = load_run(run)
    merged = Predictor(load_run(run)[0], config, metadata).model

    def answers(model: VideoModel) -> Callable[[], object]:
        return lambda: [model.scores(video=batch) for batch in batches]

    clips = sum(map(len, batches))
    table(f"adapters, {clips} clips", {"merged": answers(merged), "as trained": answers(trained)}, rounds, clips)


def captions(model: VideoModel, batches: list[torch.Tensor], tokens: int, rounds: int) -> None:
    single = [clip[None] for batch in batches for clip in batch]

    def answers(clips: list[torch.Tensor], cache: bool = True) -> Callable[[], object]:
        def job() -> None:
            model.language_model.generation_config.use_cache = cache
            for batch in clips:
                model.generate(batch, tokens)

        return job

    jobs = {
        "batches, with cache": answers(batches),
        "one at a time, with cache": answers(single),
        "batches, without cache": answers(batches, cache=False),
    }
    table(f"captions, {len(single)} clips", jobs, rounds, len(single))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, default=Path("synthetic_dataset"))
    parser.add_argument("--classifier", type=Path, default=PROVIDED / "timesformer_loravision")
    parser.add_argument("--captioner", type=Path, default=PROVIDED / "timesformer_gpt2_caption_fvbb_lorallm")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    splits = read_splits(args.data_dir)
    one_clip(args.classifier, args.captioner, splits.test[0].path, args.rounds)
    model, config, metadata = load_run(args.captioner)
    loader = build_loaders(model, config, splits)["test"]
    batches = [batch["video"] for batch in loader if batch is not None][:4]
    loader.close()
    with torch.inference_mode():
        adapters(args.classifier, batches, args.rounds)
        captions(Predictor(model, config, metadata).model, batches, config.max_new_tokens, args.rounds)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
