"""Answers for videos with a trained run: a class with scores, or a caption.

python inference.py --checkpoint checkpoints/timesformer --video_dir my_clips/

from inference import Predictor
predictor = Predictor.from_checkpoint("checkpoints/timesformer")
print(predictor.predict("clip.mp4"))
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import FIELDS, Config, UserError, parse, run_script

if TYPE_CHECKING:
    from VLoader import Sample

FEW = 16  # so few videos are read faster without worker processes


class Predictor:
    """A trained run, ready to answer."""

    def __init__(self, model: Any, config: Config, metadata: dict[str, Any]):
        from train_code import build_accelerator

        self.config = config
        self.names: list[str] = metadata["class_names"]
        self.display: dict[str, str] = metadata["display_names"]
        self.accelerator = build_accelerator(config)
        self.model = model.to(self.accelerator.device).eval()

    @classmethod
    def from_checkpoint(cls, run_dir: str | Path, **options: Any) -> "Predictor":
        """The predictor of a run's folder; `options` are fields of Config such as device, top_k, num_beams.

        Raises UserError for a folder that is no run, or whose backbone is not to be had.
        """
        from checkpoint import load_run

        return cls(*load_run(Path(run_dir), replace(Config(), **options)))

    def predict(self, path: str | Path, text: str | None = None) -> dict[str, Any]:
        """The answer for one video: {"file", "label", "score", "top_k"} or {"file", "caption"}.

        Raises UserError if the video cannot be read, or the run needs a text and none is given.
        """
        from VLoader import Sample

        return next(self.predict_many([Sample(Path(path), text=text)]))

    def predict_many(self, samples: list["Sample"]) -> Iterator[dict[str, Any]]:
        """The answers for many videos, in order, batched."""
        import torch

        from VLoader import ClipDataset, build_loader

        self.check_texts(samples)
        config = self.config
        dataset = ClipDataset(
            samples, self.model.vision_encoder.preprocessing, config.num_frames, config.frame_stride, self.names
        )
        collator = self.model.collator()
        if config.captioning:  # nothing to read: captions are what is asked for
            collator = replace(collator, codec=None)
        batch_size = 8 if config.batch_size == "auto" else config.batch_size
        workers = config.num_workers if len(samples) > FEW else 0
        for batch in build_loader(dataset, collator, batch_size, workers):
            batch = {k: v.to(self.accelerator.device) for k, v in batch.items()}
            with torch.inference_mode(), self.accelerator.autocast():
                answers = self.answer(batch)
            for index, answer in zip(batch["index"].tolist(), answers, strict=True):
                yield {"file": str(samples[index].path)} | answer

    def answer(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        if self.config.captioning:
            texts = self.model.generate(batch["pixel_values"], self.config.max_new_tokens, self.config.num_beams)
            return [{"caption": text} for text in texts]
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "index")}
        scores, classes = self.model(**inputs).float().softmax(-1).topk(min(self.config.top_k, len(self.names)))
        rows = []
        for row_scores, row_classes in zip(scores.tolist(), classes.tolist(), strict=True):
            top = [
                {"label": self.names[k], "name": self.display[self.names[k]], "score": round(score, 4)}
                for k, score in zip(row_classes, row_scores, strict=True)
            ]
            rows.append(top[0] | {"top_k": top})
        return rows

    def check_texts(self, samples: list["Sample"]) -> None:
        """Raises UserError unless every sample has the text that the run reads."""
        lacking = [s for s in samples if s.text is None]
        if self.model.text_source == "text" and lacking:
            raise UserError(
                f"this run was trained with --use_text True and {len(lacking)} of {len(samples)} videos have no text, "
                f"first {lacking[0].path}: give all of them one with --text_input '...', or each its own with "
                'a metadata.jsonl in the video folder: {"file_name": "...", "text": "..."}'
            )


def is_right(answer: dict[str, Any], sample: "Sample", display: dict[str, str]) -> bool | None:
    """Whether an answer is right; None where the truth is not known (or, for captions, not decidable)."""
    if "caption" in answer:
        import dummy_data

        if not sample.attributes:
            return None
        found = dummy_data.attributes(answer["caption"])
        return all(found.get(name) == value for name, value in sample.attributes.items())
    if sample.label is None:
        return None
    return sample.label in (answer["label"], display[answer["label"]])


def answer_line(answer: dict[str, Any], right: bool | None, width: int) -> str:
    name = Path(answer["file"]).name
    if "caption" in answer:
        said = answer["caption"]
    else:
        said = "  ".join(f"{top['name']} {100 * top['score']:.1f} %" for top in answer["top_k"])
    mark = {None: "", True: "  right", False: "  WRONG"}[right]
    return f"{name:<{width}}  {said}{mark}"


def open_output(path: str | None) -> Any:
    if path is None:
        return None
    try:
        return Path(path).open("w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"--output: cannot write {path}: {error.strerror}") from None


def note_unread(typed: set[str]) -> None:
    """One line on typed training flags: the checkpoint decides those."""
    unread = [f"--{n}" for n in sorted(typed) if "inference" not in FIELDS[n].metadata["scripts"].split()]
    if unread:
        print(f"note: {', '.join(unread)} belong to training; here the checkpoint decides")


def print_answers(predictor: Predictor, samples: list["Sample"], path: str | None) -> None:
    """One line per video; writes them to `path` too; at the end how many are right, where that is known."""
    width = max(len(s.path.name) for s in samples)
    output = open_output(path)
    verdicts = []
    for sample, answer in zip(samples, predictor.predict_many(samples), strict=True):
        right = is_right(answer, sample, predictor.display)
        verdicts.append(right)
        print(answer_line(answer, right, width))
        if output is not None:
            known = {} if right is None else {"right": right}
            output.write(json.dumps(answer | known, ensure_ascii=False) + "\n")
    judged = [v for v in verdicts if v is not None]
    if judged:
        print(f"{sum(judged)} of {len(judged)} right")
    if output is not None:
        output.close()
        print(f"wrote {path}")


def print_export(run_dir: Path, model: Any, config: Config, metadata: dict[str, Any]) -> None:
    from checkpoint import export

    difference = export(run_dir, model, config, metadata, Path(config.export))
    if difference is not None:
        print(f"the reloaded model's logits differ by at most {difference:.1e}")
    print(f"exported {run_dir} to {config.export}/: {', '.join(sorted(p.name for p in Path(config.export).iterdir()))}")


def body(argv: list[str] | None) -> int:
    config, typed = parse(argv, "inference")
    from checkpoint import find_run, load_run
    from VLoader import read_folder

    samples = read_folder(Path(config.video_dir)) if config.video_dir is not None else []
    run_dir = find_run(config)
    note_unread(typed)
    model, config, metadata = load_run(run_dir, config, typed)
    if config.text_input is not None:
        if model.text_source != "text":
            raise UserError(f"--text_input: {run_dir} was trained without a text input; leave the flag out")
        samples = [replace(s, text=config.text_input) for s in samples]
    if samples:
        predictor = Predictor(model, config, metadata)
        predictor.check_texts(samples)
        print(f"{run_dir}: {metadata['task']}, {len(samples)} videos in {config.video_dir}")
        print_answers(predictor, samples, config.output)
    if config.export is not None:
        print_export(run_dir, model.cpu(), config, metadata)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_script(body, argv)


if __name__ == "__main__":
    sys.exit(main())
