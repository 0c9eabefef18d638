"""Classifies or captions videos with a trained run.

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from answers import (
    Job,
    answer_line,
    find_lexicon,
    fingerprint_answers,
    is_right,
    list_jobs,
    open_output,
    share_answers,
    short_name,
)
from config import FIELDS, Config, parse, refuse_classifier_options
from extras.multilabel import all_labels, several_labels
from extras.reject import NONE, Rule
from metrics import Lexicon
from script import UserError, counted, freeze_objects, gc_disabled, leave, printable, script

if TYPE_CHECKING:
    from VLoader import Sample

FEW = 16  # up to this many videos are read faster without worker processes
SHOWN = 100  # with --output, up to this many answers are printed too


class Predictor:
    """A trained run, ready to classify or caption videos."""

    def __init__(self, model: Any, config: Config, metadata: dict[str, Any]):
        from build_model import merge_adapters
        from train_code import build_accelerator, cast_frozen

        # refuse what would give wrong answers silently
        refuse_classifier_options(config)
        self.config = config
        self.class_names: list[str] = metadata["class_names"]
        self.display_names: dict[str, str] = metadata["display_names"]
        self.rule = Rule(**metadata["reject"]) if "reject" in metadata else None
        self.questions: str = metadata.get("questions", "")  # "all" or "some" training samples had one; "" if none had
        # of a run that was stopped before it could choose them, one half
        self.thresholds = (model.thresholds or dict.fromkeys(self.class_names, 0.5)) if model.multi_label else None
        self.accelerator = build_accelerator(config)
        if self.accelerator.num_processes > 1:
            raise UserError(
                "inference cannot use torchrun: start several processes with python, each with --shared True"
            )

        # merged adapters give the same answers and take less time
        if config.use_lora_vision or config.use_lora_llm:
            merge_adapters(model)
        cast_frozen(model, config, self.accelerator)
        self.model = model.to(self.accelerator.device).eval()

    @classmethod
    def from_checkpoint(cls, run_dir: str | Path, **options: Any) -> "Predictor":
        """The predictor for a run's folder; `options` are fields of Config such as device, top_k, num_beams.

        Raises UserError if the folder is not a run, its backbone is not available, or its weights are damaged.
        """
        from checkpoint import load_run

        return cls(*load_run(Path(run_dir), replace(Config(), **options)))

    def predict(self, path: str | Path, text: str | None = None) -> dict[str, Any]:
        """The answer for one video: {"file", "label", "name", "score", "top_k"}, with --multi_label {"file", "labels",
        "top_k"}, or {"file", "caption"}. For a captioner the text is a question, and the answer is {"file", "question",
        "answer"}. With a run trained with --reject, the label may be None and the name "none of these".

        Raises UserError if the video cannot be read, or if the run needs a text and none is given, or cannot read one.
        """
        from VLoader import Sample

        sample = Sample(Path(path), question=text or None) if self.config.captioning else Sample(Path(path), text=text)
        answer = next(self.predict_many([sample]))
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def predict_many(self, samples: list["Sample"]) -> Iterator[dict[str, Any]]:
        """Yields the predictions for many videos, in their order, in batches; {"file", "error"} for a video that
        cannot be read."""
        import torch

        from VLoader import ClipDataset, EpochBatches, build_loader

        # the same dataset and loader as in training, so that frames and pixels are the same
        self.check_texts(samples)
        config, preprocessing = self.config, self.model.vision_encoder.preprocessing
        views = (config.test_clips, config.test_crops)
        dataset = ClipDataset(
            samples, preprocessing, config.num_frames, config.frame_stride, self.class_names, views=views
        )
        collator = self.model.collator()
        if config.captioning:
            collator = replace(collator, codec=None)  # captions are generated, so there are none to encode
        batch_size = 8 if config.batch_size == "auto" else config.batch_size
        workers = config.num_workers if len(samples) > FEW else 0
        loader = build_loader(dataset, collator, workers, EpochBatches(dataset, batch_size))

        # one unreadable video must not stop the others
        try:
            for batch, errors in loader.with_errors():
                answers = {index: {"error": cause} for index, cause in errors.items()}
                if batch is not None:
                    batch = {k: v.to(self.accelerator.device) for k, v in batch.items()}
                    indices = batch["index"].tolist()
                    with torch.inference_mode(), self.accelerator.autocast():
                        answers |= zip(indices, self.answer(batch, [samples[i] for i in indices]), strict=True)
                for index in sorted(answers):
                    yield {"file": str(samples[index].path)} | answers[index]
        finally:
            loader.close()

    def answer(self, batch: dict[str, Any], samples: list["Sample"]) -> list[dict[str, Any]]:
        """The predictions for a batch of samples, without file names. Raises UserError if the scores are not finite."""
        import torch

        # captioner
        if self.config.captioning:
            questions = [sample.question or "" for sample in samples]
            texts = self.model.generate(batch["video"], self.config, questions)
            pairs = zip(questions, texts, strict=True)
            return [{"question": asked, "answer": text} if asked else {"caption": text} for asked, text in pairs]

        # classifier: the best class, or all above their thresholds, and the top_k best with their scores
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "index")}
        logits = self.model.scores(**inputs)  # (B, K)
        if not logits.isfinite().all():
            raise UserError("the model's scores are not finite numbers: its weights are damaged; train the run again")
        if self.model.multi_label:
            scores, options = logits.sigmoid().tolist(), (self.thresholds, self.config.top_k, self.display_names)
            return several_labels(scores, self.class_names, *options)
        probabilities = logits.softmax(-1)
        if self.rule is not None:
            probabilities = torch.from_numpy(self.rule.probabilities(logits.cpu().numpy()))
        scores, classes = probabilities.topk(min(self.config.top_k, len(self.class_names)))  # (B, top_k) each
        rows = []
        for row_scores, row_classes in zip(scores.tolist(), classes.tolist(), strict=True):
            labels = [self.class_names[k] for k in row_classes]
            top = [
                {"label": label, "name": self.display_names[label], "score": round(score, 4)}
                for label, score in zip(labels, row_scores, strict=True)
            ]
            rejected = self.rule is not None and not self.rule.answers(row_scores[0])
            rows.append(top[0] | ({"label": None, "name": NONE} if rejected else {}) | {"top_k": top})
        return rows

    def check_texts(self, samples: list["Sample"]) -> None:
        """Raises UserError unless every sample has the text or the question that the run reads, and none it cannot."""
        field = "question" if self.questions == "all" else "text" if self.model.text_field == "text" else ""
        without = [s for s in samples if field and getattr(s, field) is None]
        if without:
            from VLoader import distinct

            count = f"{len(distinct(without))} of {counted(len(distinct(samples)), 'video')}"
            trained = "--use_text True" if field == "text" else "questions only"
            raise UserError(
                f"this run was trained with {trained}, but {count} came without a {field}, first "
                f"{without[0].path}: add --text_input '...' for all of them, or a metadata.jsonl in the video "
                f'folder with a {field} for each: {{"file_name": "...", "{field}": "..."}}'
            )
        if not self.questions and any(s.question for s in samples):
            raise UserError("this run was trained without questions, so it cannot answer any")


# -- the script -------------------------------------------------------------------------------------


def note_ignored_flags(typed_flags: set[str]) -> None:
    """Prints one line if flags were typed that only training reads."""
    ignored = [f"--{n}" for n in sorted(typed_flags) if "inference" not in FIELDS[n].metadata["scripts"]]
    if ignored:
        print(f"note: ignoring {', '.join(ignored)}; the run's own options are used")


def add_texts(
    samples: list["Sample"], config: Config, text_field: str | None, questions: bool, run_dir: Path
) -> list["Sample"]:
    """The samples with the text or the question in --text_input. Without it, a run that was trained with `questions`
    answers those in metadata.jsonl. Raises UserError if the run can read neither."""
    from VLoader import by_question

    if config.text_input is None:
        return by_question(samples) if questions else samples
    if text_field == "text":
        return [replace(s, text=config.text_input) for s in samples]
    if questions:
        return [replace(s, question=config.text_input or None, captions=(), objects=()) for s in samples]
    what = "questions" if config.captioning else "a text input"
    raise UserError(f"--text_input: {run_dir} was trained without {what}; leave this flag out")


def answer_all(predictor: Predictor, samples: list["Sample"], run_dir: Path) -> int:
    """Computes the answers that --output does not have yet; prints and writes them.

    Returns 1 if a video could not be read, else 0.
    """
    from extras.segments import merged_segments

    # what --output already holds is not computed again
    config = predictor.config
    run = fingerprint_answers(run_dir, config, predictor.rule, predictor.thresholds)
    output = Path(config.output) if config.output is not None else None
    started = time.perf_counter()
    with open_output(output, run, config.video_dir) as (done, append):
        jobs = list_jobs(samples, config.video_dir, config.timeline, config.timeline_stride)
        todo = [job for job in jobs if job.key not in done]
        if len(todo) < len(jobs):
            print(printable(f"{output} already has {len(jobs) - len(todo)} of {counted(len(jobs), 'answer')}"))
        if others := len(done) - (len(jobs) - len(todo)):
            print(printable(f"{output} also has {counted(others, 'answer')} about other videos, which are kept"))

        # append each row at once: whatever ends this, nothing has to be computed twice
        rows = [done[job.key] for job in jobs if job.key in done]
        show = output is None or len(jobs) <= SHOWN
        for row in answer_jobs(predictor, todo, show, len(jobs)):
            rows.append(row)
            append(row | {"run": run})
        for row in merged_segments(rows, config.timeline_stride, predictor.thresholds):
            append(row | {"run": run})
            if show:
                print(f"segment: {answer_line(short_name(row['file'], config.video_dir), row)}")
    print_summary(rows, len(todo), time.perf_counter() - started, output)
    return int(any("error" in row for row in rows))


def answer_shared(predictor: Predictor, samples: list["Sample"], run_dir: Path) -> int:
    """Computes answers together with all other processes that share --output. The last one writes the file and reports
    unreadable videos; returns 1 if there are any, else 0."""
    from extras.segments import merged_segments

    config = predictor.config
    run = fingerprint_answers(run_dir, config, predictor.rule, predictor.thresholds)
    jobs = list_jobs(samples, config.video_dir, config.timeline, config.timeline_stride)

    def compute(part: list[Job]) -> Iterator[dict[str, Any]]:
        return answer_jobs(predictor, part, len(jobs) <= SHOWN, len(part))

    def merge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return merged_segments(rows, config.timeline_stride, predictor.thresholds)

    rows = share_answers(config, run, jobs, compute, merge)
    print_summary(rows, 0, 0.0, Path(config.output))
    return int(any("error" in row for row in rows))


def answer_jobs(predictor: Predictor, jobs: list[Job], show: bool, total: int) -> Iterator[dict[str, Any]]:
    """Yields the rows of predict_jobs() with a bar of `total` clips, and prints them if `show`."""
    from tqdm import tqdm

    folder, lexicon = predictor.config.video_dir, find_lexicon(Path(predictor.config.video_dir))
    width = max((len(short_name(job.sample.path, folder)) for job in jobs), default=0)
    kind = {"segment": False} if predictor.config.timeline_stride else {}  # score.py must not take windows for segments
    with tqdm(total=total, initial=total - len(jobs), unit="clip", disable=len(jobs) <= FEW, leave=False) as bar:
        for row in predict_jobs(predictor, jobs, lexicon):
            bar.update()
            if show:
                tqdm.write(answer_line(f"{short_name(row['file'], folder):<{width}}", row))
            yield row | kind


def predict_jobs(predictor: Predictor, jobs: list[Job], lexicon: Lexicon | None) -> Iterator[dict[str, Any]]:
    """Yields a row for every job: file, path, times, the answer or error, and whether it is right if that is known."""
    answers = predictor.predict_many([job.sample for job in jobs if not job.error])
    for job in jobs:
        answer = {"file": str(job.sample.path), "error": job.error} if job.error else next(answers)
        right = is_right(answer, job.sample, predictor.display_names, lexicon)
        video = {"file": answer.pop("file"), "path": job.path}
        yield video | job.times | answer | ({} if right is None else {"right": right})


def print_summary(rows: list[dict[str, Any]], computed: int, seconds: float, output: Path | None) -> None:
    """Prints how many answers are right, how fast they came, which videos could not be read, and where the answers are.
    `computed` counts the rows that are new."""
    judged = [row["right"] for row in rows if "right" in row]
    errors = [row["error"] for row in rows if "error" in row]
    clips = computed - len(errors)  # errors are always new, because they are tried again
    if judged:
        print(f"{sum(judged)} of {len(judged)} right")
    if rejected := sum(row.get("name") == NONE and row["label"] is None for row in rows):
        print(f"{rejected} of {counted(len(rows), 'answer')}: {NONE}")
    if clips > FEW:
        print(f"{clips} clips in {seconds:.1f} s, {clips / seconds:.1f} per second")
    if errors:
        where = f"; their rows in {output} have an `error`" if output else ""
        message = f"{len(errors)} of {len(rows)} could not be read{where}, first: {errors[0]}"
        print(printable(message), file=sys.stderr)
    if output is not None and computed:
        print(printable(f"wrote {output}"))


def print_export(run_dir: Path, model: Any, config: Config, metadata: dict[str, Any]) -> None:
    """Exports the run and prints how closely the export agrees with it. Raises UserError if it cannot be exported."""
    from extras.export import export

    output = Path(os.path.abspath(config.export))
    differences = export(run_dir, model, config, metadata, output)
    if differences is not None:
        logits, probabilities = differences
        print(f"the logits of the exported model differ by at most {logits:.1e}")
        print(f"the probabilities of predict.py differ by at most {probabilities:.1e}")
    print(printable(f"exported {run_dir} to {config.export}/: {', '.join(sorted(p.name for p in output.iterdir()))}"))


@script
def main(argv: list[str] | None = None) -> int:
    """Classifies or captions the videos in --video_dir, exports the run, or both. Returns 1 if a video could not be
    read."""
    config, typed_flags = parse(argv, "inference")
    if config.timeline_stride > config.timeline:
        raise UserError("--timeline_stride must not be above --timeline, or time between the windows would be skipped")
    with gc_disabled():
        from checkpoint import find_run, load_run
        from pretrained import warn_of_tiny
        from VLoader import read_folder

    # the videos first: finding them takes less time than loading a model
    samples = read_folder(Path(config.video_dir)) if config.video_dir is not None else []
    run_dir = find_run(config)
    note_ignored_flags(typed_flags)
    model, config, metadata = load_run(run_dir, config, typed_flags)
    freeze_objects()
    samples = add_texts(samples, config, model.text_field, "questions" in metadata, run_dir)
    samples = all_labels(samples) if model.multi_label else samples
    warn_of_tiny(config, find_lexicon(Path(config.video_dir)) if samples else None)

    # answer
    status = 0
    if samples:
        predictor = Predictor(model, config, metadata)
        predictor.check_texts(samples)
        videos = counted(len({sample.path for sample in samples}), "video")
        print(printable(f"{run_dir}: {metadata['task']}, {videos} in {config.video_dir}"))
        if note := model.truncation_note([replace(s, captions=()) for s in samples]):  # captions are not read here
            print(note)
        status = (answer_shared if config.shared else answer_all)(predictor, samples, run_dir)

    # export; the predictor has merged the adapters, which an export keeps apart
    if config.export is not None:
        if samples:
            model, _, _ = load_run(run_dir, config, typed_flags)
        print_export(run_dir, model.cpu(), config, metadata)
    return status


if __name__ == "__main__":
    leave(main())
