"""The cost of a prediction: one clip from a cold start, LoRA adapters merged or not, and captions batched or not.

    python -m benchmarks.inference --data_dir synthetic_dataset

    one clip      `inference.py` on one video, including start-up, against a bare `import torch, transformers`
    adapters      a LoRA classifier with merged adapters, as inference.py runs it, and with separate ones, as trained
    captions      greedy captions: in batches with a key-value cache, as inference.py generates them; one clip at a
                  time; in batches without the cache
The jobs of a table alternate. Prints medians over the rounds and their spread. --classifier and --captioner choose
other runs.
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
from config import ROOT, Config
from inference import Predictor
from script import UserError
from train_code import build_loaders
from VLoader import read_splits


def table(title: str, jobs: dict[str, Callable[[], object]], rounds: int, clips: int = 1) -> None:
    """Times the jobs and prints a markdown table: seconds, or clips per second if there are several clips, and the
    time relative to the first job (median of the ratios within a round)."""
    seconds = alternate(jobs, rounds)

    # the first job is the reference of the last column
    first = next(iter(seconds.values()))
    print(f"\n| {title} | {'s' if clips == 1 else 'clips/s'} | spread | time to the first |\n|---|---|---|---|")
    for name, values in seconds.items():
        shown = sorted(values if clips == 1 else [clips / v for v in values])
        ratio = median(a / b for a, b in zip(values, first, strict=True))
        print(f"| {name} | {median(shown):.2f} | {shown[0]:.2f}-{shown[-1]:.2f} | {ratio:.2f} |", flush=True)


def process(*command: str) -> Callable[[], object]:
    """A job that runs Python with these arguments in a new process."""
    return lambda: subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)


def one_clip(classifier: Path, captioner: Path, video: Path, rounds: int) -> None:
    """Table of cold starts. Imports dominate them, so a bare import is the first row."""

    def answer(run: Path) -> Callable[[], object]:
        return process("inference.py", "--checkpoint", str(run), "--video_dir", str(video))

    jobs = {
        "import torch, transformers": process("-c", "import torch, transformers"),
        "inference.py, classifier with LoRA": answer(classifier),
        "inference.py, captioner": answer(captioner),
        # --help must not import torch: it shows at once when it does
        "inference.py --help": process("inference.py", "--help"),
    }
    table("one clip, new process", jobs, rounds)


def adapters(run: Path, batches: list[torch.Tensor], rounds: int) -> None:
    """Table of a LoRA classifier, with and without merging the adapters into the weights."""
    # loaded twice: merging changes the model in place
    trained, config, metadata = load_run(run)
    merged = Predictor(load_run(run)[0], config, metadata).model

    def answers(model: VideoModel) -> Callable[[], object]:
        return lambda: [model.scores(video=batch) for batch in batches]

    # scores alone, without reading videos or writing answers
    clips = sum(map(len, batches))
    table(f"adapters, {clips} clips", {"merged": answers(merged), "as trained": answers(trained)}, rounds, clips)


def captions(model: VideoModel, config: Config, batches: list[torch.Tensor], rounds: int) -> None:
    """Table of captions in batches and one clip at a time."""

    def answers(batches: list[torch.Tensor]) -> Callable[[], object]:
        return lambda: [model.generate(batch, config) for batch in batches]

    # the same clips as batches (B, T, C, H, W) and one by one (1, T, C, H, W)
    single = [clip[None] for batch in batches for clip in batch]
    table(
        f"captions, {len(single)} clips",
        {"batches": answers(batches), "one at a time": answers(single)},
        rounds,
        len(single),
    )


def main() -> None:
    """Prints the three tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, default=Path("synthetic_dataset"), help="data folder with test videos")
    parser.add_argument(
        "--classifier", type=Path, default=PROVIDED / "timesformer_loravision", help="run of a LoRA classifier"
    )
    parser.add_argument(
        "--captioner", type=Path, default=PROVIDED / "timesformer_gpt2_caption_fvbb_lorallm", help="run of a captioner"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one warm-up")
    args = parser.parse_args()

    # new processes first: the models loaded below would take memory and cores from them
    splits = read_splits(args.data_dir)
    one_clip(args.classifier, args.captioner, splits.test[0].path, args.rounds)

    # four batches in memory, so that decoding is not part of the measurement
    model, config, metadata = load_run(args.captioner)
    config = model.vision_encoder.fill_auto(config)  # load_run leaves the batch size to its caller
    loader = build_loaders(model, config, splits)["test"]
    batches = [batch["video"] for batch in loader if batch is not None][:4]
    loader.close()

    # inference.py predicts in this mode, too
    with torch.inference_mode():
        adapters(args.classifier, batches, args.rounds)
        captions(Predictor(model, config, metadata).model, config, batches, args.rounds)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
