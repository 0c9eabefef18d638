"""Which score tells clips of an unknown class from known ones? Trains without one class, then rejects by each.

    python dummy_data.py
    python -m benchmarks.rejection --leave_out class_1 class_4 class_7

For each score: how many clips of the class that was left out are rejected by the threshold that rejects 10 % of the
test clips of the others, the area under the ROC curve of known against unknown clips (AUROC), and the area under the
risk-coverage curve of the known ones (AURC). The run is TimeSformer + BERT, frozen, with texts.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax, logsumexp
from scipy.stats import mannwhitneyu

import main as vidtune
from checkpoint import load_run
from extras.reject import fit_temperature, risk_coverage
from script import read_rows, write_rows
from VLoader import ClipDataset, EpochBatches, build_loader, read_folder, read_splits

FLAGS = "--use_vlm True --language_model bert --use_text True --freeze_visionbackbone True --freeze_llmbackbone True"


def leave_out(source: Path, name: str, per_class: int, folder: Path) -> None:
    """Links the dataset without a class to folder/known, with `per_class` training clips of each other class, and the
    test clips of the class to folder/unknown."""
    for split in ("train", "val", "test"):
        kept: dict[Path, list[dict[str, Any]]] = {folder / "known" / split: [], folder / "unknown": []}
        counts: dict[str, int] = {}
        for row in read_rows(source / split / "metadata.jsonl"):
            label = row["file_name"].split("/")[0]
            counts[label] = counts.get(label, 0) + 1
            target = folder / "unknown" if label == name else folder / "known" / split
            if (label == name and split != "test") or (split == "train" and counts[label] > per_class):
                continue
            (target / label).mkdir(parents=True, exist_ok=True)
            os.link(source / split / row["file_name"], target / row["file_name"])
            kept[target].append(row)
        for target, rows in kept.items():
            if rows:
                write_rows(rows, target / "metadata.jsonl")
    names = json.loads((source / "classes.json").read_text())
    names.pop(name)
    (folder / "known" / "classes.json").write_text(json.dumps(names))


def outputs(run: Path, folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of train, val, test and unknown clips: logits (n, K), inputs of the last layer (n, D), true classes (n,)."""
    model, config, metadata = load_run(run)
    names, inputs, result = metadata["class_names"], [], {}
    model.head.classifier.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    splits = read_splits(folder / "known", names)
    parts = {"train": splits.train, "val": splits.val, "test": splits.test, "unknown": read_folder(folder / "unknown")}
    for part, samples in parts.items():
        inputs.clear()
        dataset = ClipDataset(
            samples, model.vision_encoder.preprocessing, config.num_frames, config.frame_stride, names
        )
        loader = build_loader(dataset, model.collator(), 0, EpochBatches(dataset, 32))
        with torch.inference_mode():
            batches = [{k: v for k, v in b.items() if k not in ("labels", "index")} for b, _ in loader.with_errors()]
            logits = torch.cat([model.scores(**batch) for batch in batches])
        truth = np.array([names.index(s.label) if s.label in names else -1 for s in samples])
        result[part] = logits.double().numpy(), torch.cat(inputs).double().numpy(), truth
    return result


def all_scores(parts: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """{score: {part: (n,)}}; the higher, the surer."""
    logits, features, truth = parts["train"]
    temperature = fit_temperature(parts["val"][0], parts["val"][2])
    means = np.stack([features[truth == k].mean(0) for k in range(logits.shape[1])])  # (K, D)
    covariance = np.cov((features - means[truth]).T)
    covariance += 1e-3 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    precision, centre = np.linalg.inv(covariance), features.mean(0)

    def unit(x: np.ndarray) -> np.ndarray:
        return (x - centre) / np.linalg.norm(x - centre, axis=1, keepdims=True)

    scores: dict[str, dict[str, np.ndarray]] = {}
    for part in ("test", "unknown"):
        z, x, _ = parts[part]
        calibrated = log_softmax(z / temperature, 1)
        away = x[:, None] - means  # (n, K, D)
        values = {
            "largest probability": calibrated.max(1),
            "entropy": (np.exp(calibrated) * calibrated).sum(1),
            "largest logit": z.max(1),
            "energy": logsumexp(z, 1),
            "energy, calibrated": temperature * logsumexp(z / temperature, 1),
            "Mahalanobis distance": -np.einsum("nkd,de,nke->nk", away, precision, away).min(1),
            "nearest training clip": (unit(x) @ unit(features).T).max(1),
        }
        for name, value in values.items():
            scores.setdefault(name, {})[part] = value
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("synthetic_dataset"))
    parser.add_argument("--leave_out", nargs="+", default=["class_1", "class_4", "class_7"])
    parser.add_argument("--per_class", type=int, default=160, help="training clips of each class")
    parser.add_argument("--output", type=Path, default=Path("left_out"))
    args = parser.parse_args()
    for name in args.leave_out:
        folder = args.output / name
        if not folder.exists():
            leave_out(args.data_dir, name, args.per_class, folder)
        if not (folder / "run" / "metrics.json").exists():
            flags = ["--data_dir", str(folder / "known"), "--output_dir", str(folder), "--run_name", "run"]
            vidtune.main([*FLAGS.split(), *flags, "--cache_dir", str(args.output / "features")])
        parts = outputs(folder / "run", folder)
        wrong = parts["test"][0].argmax(1) != parts["test"][2]
        print(f"{name}: accuracy {100 * (1 - wrong.mean()):.1f} %\n{'score':<24}rejected  AUROC  AURC")
        for score, values in all_scores(parts).items():
            test, unknown = values["test"], values["unknown"]
            rejected = 100 * (unknown < np.quantile(test, 0.1)).mean()
            auroc = mannwhitneyu(test, unknown).statistic / len(test) / len(unknown)
            area = risk_coverage(test, wrong)[1].mean()
            print(f"{score:<24}{rejected:6.0f} %  {auroc:.3f}  {area:.4f}")


if __name__ == "__main__":
    main()
