"""Answers for videos with a trained run: a class with scores, or a caption.

python inference.py --checkpoint checkpoints/timesformer --video_dir my_clips/

from inference import Predictor
predictor = Predictor.from_checkpoint("checkpoints/timesformer")
print(predictor.predict("clip.mp4"))
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from answers import Job, fingerprint_answers, list_jobs, open_output
from config import FIELDS, Config, parse, refuse_classifier_options
from metrics import Lexicon, attributes_in
from script import UserError, leave, printable, run_script

if TYPE_CHECKING:
    from VLoader import Sample

LONGEST_ANSWER = 1000  # characters of one that are printed; the file of answers has it whole
FEW = 16  # so few videos are read faster without worker processes
SHOWN = 100  # answers that are printed where a file takes them too


class Predictor:
    """A trained run, ready to answer."""

    def __init__(self, model: Any, config: Config, metadata: dict[str, Any]):
        from build_model import merge_adapters
        from train_code import build_accelerator

        refuse_classifier_options(config)
        self.config = config
        self.names: list[str] = metadata["class_names"]
        self.display: dict[str, str] = metadata["display_names"]
        self.accelerator = build_accelerator(config)
        if self.accelerator.num_processes > 1:
            raise UserError("inference runs in one process: start it with python, give each its own --video_dir")
        check_weights(model)
        if config.use_lora_vision or config.use_lora_llm:
            merge_adapters(model)
        self.model = model.to(self.accelerator.device).eval()

    @classmethod
    def from_checkpoint(cls, run_dir: str | Path, **options: Any) -> "Predictor":
        """The predictor of a run's folder; `options` are fields of Config such as device, top_k, num_beams.

        Raises UserError for a folder that is no run, whose backbone is not to be had, or whose weights are damaged.
        """
        from checkpoint import load_run

        return cls(*load_run(Path(run_dir), replace(Config(), **options)))

    def predict(self, path: str | Path, text: str | None = None) -> dict[str, Any]:
        """The answer for one video: {"file", "label", "score", "top_k"} or {"file", "caption"}.

        Raises UserError if the video cannot be read, or the run needs a text and none is given.
        """
        from VLoader import Sample

        answer = next(self.predict_many([Sample(Path(path), text=text)]))
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def predict_many(self, samples: list["Sample"]) -> Iterator[dict[str, Any]]:
        """The answers for many videos, in order, batched; {"file", "error"} for one that cannot be read."""
        import torch

        from VLoader import ClipDataset, EpochBatches, build_loader

        self.check_texts(samples)
        config = self.config
        dataset = ClipDataset(
            samples,
            self.model.vision_encoder.preprocessing,
            config.num_frames,
            config.frame_stride,
            self.names,
            views=(config.test_clips, config.test_crops),
        )
        collator = self.model.collator()
        if config.captioning:  # nothing to read: captions are what is asked for
            collator = replace(collator, codec=None)
        batch_size = 8 if config.batch_size == "auto" else config.batch_size
        workers = config.num_workers if len(samples) > FEW else 0
        loader = build_loader(dataset, collator, workers, EpochBatches(dataset, batch_size))
        try:
            for batch, errors in loader.with_errors():
                answers = {index: {"error": cause} for index, cause in errors.items()}
                if batch is not None:
                    batch = {k: v.to(self.accelerator.device) for k, v in batch.items()}
                    with torch.inference_mode(), self.accelerator.autocast():
                        answers |= zip(batch["index"].tolist(), self.answer(batch), strict=True)
                for index in sorted(answers):
                    yield {"file": str(samples[index].path)} | answers[index]
        finally:
            loader.close()

    def answer(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        if self.config.captioning:
            texts = self.model.generate(batch["video"], self.config.max_new_tokens, self.config.num_beams)
            return [{"caption": text} for text in texts]
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "index")}
        logits = self.model.scores(**inputs)
        if not logits.isfinite().all():
            raise UserError("the model's scores are not finite numbers: its weights are damaged; train it anew")
        scores, classes = logits.softmax(-1).topk(min(self.config.top_k, len(self.names)))
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
        if self.model.text_field == "text" and lacking:
            raise UserError(
                f"this run was trained with --use_text True and {len(lacking)} of {len(samples)} videos have no text, "
                f"first {lacking[0].path}: give all of them one with --text_input '...', or each its own with "
                'a metadata.jsonl in the video folder: {"file_name": "...", "text": "..."}'
            )


def check_weights(model: Any) -> None:
    """Raises UserError if a weight is not a finite number."""
    for name, parameter in model.named_parameters():
        if not all(extreme.isfinite() for extreme in parameter.detach().aminmax()):  # NaN is both
            raise UserError(f"the weights are damaged: {name} holds numbers that are not finite; train the run anew")


def is_right(answer: dict[str, Any], sample: "Sample", display: dict[str, str], lexicon: Lexicon | None) -> bool | None:
    """Whether an answer is right; None where the truth is not known (or, for captions, not decidable)."""
    if "caption" in answer:
        if lexicon is None or not sample.attributes:
            return None
        named = attributes_in(answer["caption"], lexicon)
        return all(named.get(name) == value for name, value in sample.attributes.items())
    if sample.label is None or "error" in answer:
        return None
    if sample.label in display:
        return sample.label == answer["label"]
    return sample.label == display[answer["label"]]  # a folder may be named like the display name


def find_lexicon(video_dir: Path) -> Lexicon | None:
    """The lexicon of the data set that --video_dir is, or is a split of."""
    from VLoader import read_lexicon

    return read_lexicon(video_dir) or read_lexicon(video_dir.absolute().parent)


def answer_line(answer: dict[str, Any], width: int) -> str:
    said = answer.get("caption", answer.get("error"))  # a caption may be empty
    if said is None:
        said = "  ".join(f"{top['name']} {100 * top['score']:.1f} %" for top in answer["top_k"])
    when = f"{answer['start']:.1f}-{answer['end']:.1f} s  " if "start" in answer else ""
    mark = {None: "", True: "  right", False: "  WRONG"}[answer.get("right")]
    return printable(f"{printable(Path(answer['file']).name):<{width}}  {when}{said[:LONGEST_ANSWER]}{mark}")


# -- the file of answers ----------------------------------------------------------------------------


def note_unread(typed: set[str]) -> None:
    """One line on typed training flags: the checkpoint decides those."""
    unread = [f"--{n}" for n in sorted(typed) if "inference" not in FIELDS[n].metadata["scripts"]]
    if unread:
        print(f"note: {', '.join(unread)} belong to training; here the checkpoint decides")


def answer_all(predictor: Predictor, samples: list["Sample"], run_dir: Path) -> int:
    """Answers, prints, writes --output; goes on with one that was begun. Returns 1 if a video could not be read."""
    from tqdm import tqdm

    config = predictor.config
    run = fingerprint_answers(run_dir, config)
    output = Path(config.output) if config.output is not None else None
    clock = time.perf_counter()
    with open_output(output, run, config.video_dir) as (done, append):
        jobs, failed = list_jobs(samples, config.video_dir, config.timeline)
        todo = [job for job in jobs if job.key not in done]
        if len(todo) < len(jobs):
            print(printable(f"{output} has {len(jobs) - len(todo)} of the {len(jobs)} answers already"))
        rows = [done[job.key] for job in jobs if job.key in done]
        show = output is None or len(jobs) <= SHOWN
        width = max(len(printable(s.path.name)) for s in samples)
        bar = tqdm(
            total=len(jobs) + len(failed), initial=len(rows), unit="answer", disable=len(todo) <= FEW, leave=False
        )
        with bar:
            for row in chain(failed, predict_jobs(predictor, todo, find_lexicon(Path(config.video_dir)))):
                rows.append(row)
                bar.update()
                if show:
                    tqdm.write(answer_line(row, width))
                append(row | {"run": run})
    print_summary(rows, len(todo), time.perf_counter() - clock, output)
    return int(any("error" in row for row in rows))


def predict_jobs(predictor: Predictor, jobs: list[Job], lexicon: Lexicon | None) -> Iterator[dict[str, Any]]:
    """A row for every job: file, path, times, the answer or error, and whether it is right where that is known."""
    answers = predictor.predict_many([job.sample for job in jobs]) if jobs else iter(())
    for job, answer in zip(jobs, answers, strict=True):
        right = is_right(answer, job.sample, predictor.display, lexicon)
        place = {"file": answer.pop("file"), "path": job.path}
        yield place | job.times | answer | ({} if right is None else {"right": right})


def print_summary(rows: list[dict[str, Any]], fresh: int, seconds: float, output: Path | None) -> None:
    judged = [row["right"] for row in rows if "right" in row]
    errors = [row["error"] for row in rows if "error" in row]
    if judged:
        print(f"{sum(judged)} of {len(judged)} right")
    if fresh > FEW:
        print(f"{fresh} answers in {seconds:.1f} s, {fresh / seconds:.1f} a second")
    if errors:
        where = f"; their rows in {output} hold an `error`" if output else ""
        first = f"{len(errors)} of {len(rows)} could not be read{where}, first: {errors[0]}"
        print(printable(first), file=sys.stderr)
    if output is not None:
        print(printable(f"wrote {output}"))


def print_export(run_dir: Path, model: Any, config: Config, metadata: dict[str, Any]) -> None:
    from export import export

    check_weights(model)
    output = Path(os.path.abspath(config.export))
    differences = export(run_dir, model, config, metadata, output)
    if differences is not None:
        logits, probabilities = differences
        print(f"the reloaded model's logits differ by at most {logits:.1e}")
        print(f"the probabilities of predict.py differ by at most {probabilities:.1e}")
    print(printable(f"exported {run_dir} to {config.export}/: {', '.join(sorted(p.name for p in output.iterdir()))}"))


def run(argv: list[str] | None) -> int:
    config, typed = parse(argv, "inference")
    from checkpoint import find_run, load_run
    from VLoader import read_folder

    samples = read_folder(Path(config.video_dir)) if config.video_dir is not None else []
    run_dir = find_run(config)
    note_unread(typed)
    model, config, metadata = load_run(run_dir, config, typed)
    if config.text_input is not None:
        if model.text_field != "text":
            raise UserError(f"--text_input: {run_dir} was trained without a text input; leave the flag out")
        samples = [replace(s, text=config.text_input) for s in samples]
    status = 0
    if samples:
        predictor = Predictor(model, config, metadata)
        predictor.check_texts(samples)
        print(printable(f"{run_dir}: {metadata['task']}, {len(samples)} videos in {config.video_dir}"))
        if not config.captioning and (note := model.truncation_note(samples)):
            print(note)
        status = answer_all(predictor, samples, run_dir)
    if config.export is not None:
        if samples:  # its adapters are merged
            model, _, _ = load_run(run_dir, config, typed)
        print_export(run_dir, model.cpu(), config, metadata)
    return status


def main(argv: list[str] | None = None) -> int:
    return run_script(run, argv)


if __name__ == "__main__":
    leave(main())
