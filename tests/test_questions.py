"""Questions about clips: what a captioner reads and learns, its answers, their scores, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import drawn
from test_models import clips, model_of
from test_resume import assert_resumed_exactly
from test_segments import make_data

import create_dummy
import doctor
import dummy_data
import inference
import main
import metrics
import readers
import score
from config import ROOT, Config
from script import UserError, read_rows
from VLoader import Sample, by_question, fingerprint_data, read_folder, read_metadata, read_splits

CAPTIONER = ["--use_vlm", "True", "--captioning", "True", "--freeze_visionbackbone", "True"]
TINY = ["--classes", "2", "--videos_per_class", "2", "--val_per_class", "1", "--test_per_class", "1"]
PLAIN = ROOT / "checkpoints" / "provided" / "timesformer_gpt2_caption_fvbb"
KINDS = ("colour", "count", "motion")
QUESTIONS = ["", "how many ?", "what does the red circle do ?", "x"]
ANSWERS = ["a red circle", "two", "moves right", "a very long answer indeed"]


# -- data -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four training videos with three questions each, and one of them with a caption too. The other splits are the
    same videos, because these tests are about what has been learned."""
    folder = tmp_path_factory.mktemp("questions") / "data"
    assert dummy_data.main([*TINY, "--questions", "--output", str(folder)]) == 0
    rows = read_rows(folder / "train" / "metadata.jsonl")
    for number, row in enumerate(rows):
        row["caption"] = row["caption"][:1] if number == 0 else []
    for split in ("train", "val", "test"):
        if split != "train":
            shutil.rmtree(folder / split)
            (folder / split).mkdir()
            rows = [row | {"file_name": f"../train/{row['file_name'].removeprefix('../train/')}"} for row in rows]
        lines = [json.dumps({k: v for k, v in row.items() if v != []}) for row in rows]
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def written(folder: Path, *rows: dict) -> Path:
    """A folder with metadata.jsonl and the videos that it names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for row in rows:
        torch.save(torch.from_numpy(drawn(0, frames=8)[0]), folder / row["file_name"])
    return folder


def test_questions_change_no_video_and_no_caption(tmp_path):
    plain, asked = tmp_path / "plain", tmp_path / "asked"
    assert dummy_data.main([*TINY, "--output", str(plain)]) == 0
    assert dummy_data.main([*TINY, "--questions", "--output", str(asked)]) == 0
    assert [p.read_bytes() for p in sorted(plain.rglob("*.pt"))] == [
        p.read_bytes() for p in sorted(asked.rglob("*.pt"))
    ]
    own = {"question", "answer", "kind"}
    for split in ("train", "val", "test"):
        rows = read_rows(asked / split / "metadata.jsonl")
        assert all(own <= row.keys() for row in rows)
        without = [{k: v for k, v in row.items() if k not in own} for row in rows]
        assert without == read_rows(plain / split / "metadata.jsonl")


def test_every_answer_is_that_of_the_object_that_the_question_names():
    rng = np.random.default_rng(0)
    for _ in range(200):
        names = rng.choice(dummy_data.MOTIONS, int(rng.integers(1, 3)), replace=False)
        items = dummy_data.draw_items([str(name) for name in names], 16, rng)
        for item, colour in zip(items, rng.choice([*dummy_data.COLOURS], len(items), replace=False), strict=True):
            item["colour"] = str(colour)
        row = dummy_data.write_questions(items, rng)
        answers = dict(zip(row["kind"], row["answer"], strict=True))
        asked = {
            k: metrics.attributes_in(q, dummy_data.LEXICON) for k, q in zip(row["kind"], row["question"], strict=True)
        }
        (by_motion,) = [item for item in items if item["motion"] == asked["colour"]["motion"]]
        (by_colour,) = [item for item in items if item["colour"] == asked["motion"]["colour"]]
        assert answers["colour"] == by_motion["colour"]
        assert answers["motion"] == dummy_data.CLASS_NAMES[by_colour["motion"]]
        assert answers["count"] == {1: "one", 2: "two"}[len(items)]


def test_a_video_is_asked_each_of_its_questions_and_captioned_if_it_has_captions(tmp_path):
    rows = [
        {"file_name": "0.pt", "question": "how many ?", "answer": "two", "kind": "count"},
        {"file_name": "1.pt", "question": ["a ?", "b ?"], "answer": ["x", "y"], "caption": ["one", "two"]},
        {"file_name": "2.pt", "caption": "three", "kind": ["of another", "program"]},
        {"file_name": "3.pt", "question": "c ?"},
        {"file_name": "4.pt"},
    ]
    found = by_question(read_folder(written(tmp_path, *rows)))
    assert [(s.path.stem, s.question, s.captions, s.kind) for s in found] == [
        ("0", "how many ?", ("two",), "count"),
        ("1", None, ("one", "two"), None),
        ("1", "a ?", ("x",), None),
        ("1", "b ?", ("y",), None),
        ("2", None, ("three",), None),
        ("3", "c ?", (), None),
        ("4", None, (), None),
    ]


BAD = [
    ({"question": "a ?"}, "1 question, but 0 answers"),
    ({"question": ["a ?", "b ?"], "answer": "x"}, "2 questions, but 1 answer"),
    ({"answer": "x"}, "0 questions, but 1 answer"),
    ({"question": ["a ?", "b ?"], "answer": ["x", "y"], "kind": "k"}, "2 questions, but 1 kind"),
    ({"question": 3, "answer": "x"}, "must be strings"),
    ({"question": "a ?", "answer": {"x": 1}}, "must be strings"),
    ({"question": "a ?", "answer": None}, "must be strings"),
    ({"question": "a ?", "answer": "x", "kind": [1]}, "must be strings"),
    ({"question": " ", "answer": "x"}, "none of them empty"),
    ({"question": "a ?", "answer": ""}, "none of them empty"),
    ({"question": ["a ?", "a ?"], "answer": ["x", "y"]}, "a question appears twice"),
]


@pytest.mark.parametrize("row, message", BAD)
def test_a_bad_question_is_one_line_naming_file_and_line(tmp_path, capsys, row, message):
    written(tmp_path / "data" / "train", {"file_name": "0.pt", "caption": "a"}, {"file_name": "1.pt"} | row)
    assert main.main(["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "runs"), *CAPTIONER]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'data' / 'train' / 'metadata.jsonl'}, line 2: " in error and message in error
    assert error.count("\n") == 1


def test_a_question_needs_its_answer_for_training_only(tmp_path):
    folder = written(tmp_path / "train", {"file_name": "0.pt", "question": "a ?", "label": "x"})
    assert len(read_metadata(folder)) == 1
    with pytest.raises(UserError, match=r"line 1: 1 question, but 0 answers"):
        read_splits(tmp_path, ["x"], questions=True)


def test_a_classifier_reads_every_video_once(data):
    assert len(read_splits(data).train) == 4 and len(read_splits(data, questions=True).train) == 13


def test_held_out_videos_take_all_their_questions_along(data, tmp_path):
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    shutil.rmtree(folder / "val")
    splits = read_splits(folder, questions=True)
    train, val = ({s.path for s in samples} for samples in (splits.train, splits.val))
    assert len(train) == 2 and len(val) == 2 and not train & val


def test_frames_keep_their_questions(data, tmp_path):
    folder = tmp_path / "frames"
    assert create_dummy.main(["--data_dir", str(data), "--output", str(folder), "--per_class", "1"]) == 0
    kept = {s.questions for s in read_folder(folder)}
    assert kept and kept <= {s.questions for s in read_splits(data).train}


# -- the model --------------------------------------------------------------------------------------


def batch_of(model) -> dict[str, torch.Tensor]:
    rows = zip(clips(4), QUESTIONS, ANSWERS, strict=True)
    return model.collator()([{"video": v, "index": i, "question": q, "caption": a} for i, (v, q, a) in enumerate(rows)])


@pytest.fixture(scope="module")
def captioner():
    return model_of(use_vlm=True, captioning=True, freeze_visionbackbone=True).eval()


def test_the_loss_counts_the_answer_only(captioner):
    batch, tok = batch_of(captioner), captioner.tokenizer
    end = tok.eos_token_id
    for row, targets, question, answer in zip(
        batch["input_ids"], captioner.targets(batch), QUESTIONS, ANSWERS, strict=True
    ):
        prompt = [end, *(tok(f"{question}")["input_ids"] + tok("\n")["input_ids"] if question else [])]
        answer_ids = [*tok(answer)["input_ids"], end]
        length = len(prompt) + len(answer_ids)
        assert row[:length].tolist() == [*prompt, *answer_ids]
        ignored = len(prompt) - 1
        assert targets.tolist() == [-100] * ignored + answer_ids + [-100] * (len(row) - length)


def test_the_logits_depend_on_the_question(captioner):
    batch = batch_of(captioner)
    names = ("video", "input_ids", "attention_mask")
    changed = {name: batch[name].clone() for name in names}
    changed["input_ids"][2, 3] += 1  # a token of the question
    with torch.no_grad():
        before, after = (captioner(**{n: b[n] for n in names}) for b in (batch, changed))
    asked = captioner.targets(batch)[2] != -100
    assert not torch.allclose(before[2][asked], after[2][asked], atol=1e-3)
    assert torch.equal(before[:2], after[:2])


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_the_native_model_on_the_same_embeddings(captioner, beams):
    """In a batch with questions of several lengths and without one: padding changes nothing."""
    batch, tok, language = batch_of(captioner), captioner.tokenizer, captioner.language_model
    answers = captioner.generate(batch["video"], Config(max_new_tokens=8, num_beams=beams), QUESTIONS)
    for video, question, answer in zip(batch["video"], QUESTIONS, answers, strict=True):
        text = f"{tok.bos_token}{question}"
        ids = tok(text)["input_ids"] + (tok("\n")["input_ids"] if question else [])
        embeds = [captioner.video_tokens(video[None])[0], language.get_input_embeddings()(torch.tensor(ids))]
        native = language.generate(
            inputs_embeds=torch.cat(embeds)[None],
            attention_mask=torch.ones(1, sum(map(len, embeds)), dtype=torch.long),
            max_new_tokens=8,
            num_beams=beams,
            do_sample=False,
            pad_token_id=tok.eos_token_id,
        )
        assert answer == tok.decode(native[0], skip_special_tokens=True).strip()


def test_long_questions_are_cut_alike_in_training_and_inference_and_counted():
    model = model_of(use_vlm=True, captioning=True, freeze_visionbackbone=True, max_text_tokens=12)
    codec, long = model.codec(), "what does the red circle do ? " * 5
    (prompt,) = codec.prompts([long])
    row = codec(["moves right and then left and then right again"], [prompt])["input_ids"][0].tolist()
    assert row[: len(prompt)] == prompt and len(prompt) == 1 + 6 + 1 and len(row) == 1 + 12 + 1
    note = model.truncation_note([Sample(Path("a"), captions=("two",), question=q) for q in (long, "x")])
    assert note and "1 of 2 questions are longer than 6 tokens" in note and "captions" not in note
    note = model.truncation_note(
        [Sample(Path("a"), captions=("the red circle moves right and left",) * 2, question=q) for q in (long, "x")]
    )
    assert note and "2 of 4 captions and answers, with their questions, are longer than 12 tokens" in note


def test_a_prompt_without_room_for_an_answer_names_the_question(captioner):
    with pytest.raises(UserError, match=r"fit after the video and the question"):
        captioner.generate(clips(1), Config(max_new_tokens=225), ["what does the red circle do ? " * 4])


# -- runs -------------------------------------------------------------------------------------------


def train(data: Path, runs: Path, *more: str) -> int:
    flags = ["--data_dir", str(data), "--output_dir", str(runs), "--num_workers", "0", "--dropout", "0"]
    return main.main([*flags, *CAPTIONER, *more])


def answers_of(run: Path, videos: Path, output: Path, *flags: str) -> list[dict]:
    argv = ["--checkpoint", str(run), "--video_dir", str(videos), "--output", str(output), *flags]
    assert inference.main(argv) == 0
    return read_rows(output)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A captioner that knows all answers about its few videos."""
    folder = tmp_path_factory.mktemp("runs")
    more = ["--epochs", "36", "--batch_size", "7", "--learning_rate", "4e-3", "--token_grid", "2", "--controls", "True"]
    assert train(data, folder, "--run_name", "asked", *more) == 0
    return folder / "asked"


def test_answers_are_scored_by_kind_and_fall_with_the_questions_of_others(run):
    found = json.loads((run / "metrics.json").read_text())
    scores, controls = found["test"], found["controls"]
    assert scores["count"] == 4 and scores["answers"]["count"] == 12
    assert scores["answers"]["accuracy"] == 1
    assert {kind: row["count"] for kind, row in scores["answers"]["kinds"].items()} == dict.fromkeys(KINDS, 4)
    assert scores["exact_match"] == 1  # the caption
    assert controls["as_it_is"]["answers"] == 1 and controls["nearest_neighbour"]["answers"] == 1
    assert controls["question_shuffled"]["answers"] <= 0.6 and controls["majority"]["answers"] < 1
    rows = read_rows(run / "predictions_test.jsonl")
    assert sum("caption" in row for row in rows) == 1
    assert all([row["answer"]] == row["references"] for row in rows if "question" in row)


def test_another_question_gets_another_answer(run, data, tmp_path, capsys):
    (video, questions), *_ = [(s.path, s.questions) for s in read_folder(data / "train")]
    for number, (question, truth, _) in enumerate(questions):
        (row,) = answers_of(run, video, tmp_path / f"{number}.jsonl", "--text_input", question)
        assert (row["question"], row["answer"]) == (question, truth)
    predictor = inference.Predictor.from_checkpoint(run)
    question, truth, _ = questions[0]
    assert predictor.predict(video, question) == {"file": str(video), "question": question, "answer": truth}
    assert predictor.predict(video).keys() == predictor.predict(video, "").keys() == {"file", "caption"}


def test_inference_asks_the_questions_of_a_folder(run, data, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    rows = answers_of(run, data / "train", output)
    asked = [row for row in rows if "question" in row]
    expected = [(str(s.path), q, a) for s in read_folder(data / "train") for q, a, _ in s.questions]
    assert [(row["file"], row["question"], row["answer"]) for row in asked] == expected
    assert all(row["right"] for row in asked) and len(rows) == 13
    assert "captioning, 4 videos" in capsys.readouterr().out
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:5]))
    again = answers_of(run, data / "train", output, "--use_text", "False", "--num_workers", "0")
    assert "already has 5 of 13 answers" in capsys.readouterr().out and again == rows


def test_scores_can_be_computed_again(run, data, tmp_path, capsys):
    argv = ["--checkpoint", str(run), "--data_dir", str(data), "--output_dir", str(tmp_path), "--num_workers", "0"]
    assert score.main(argv) == 0
    assert "100.0 % of 12 answers right" in capsys.readouterr().out
    predictions = tmp_path / "asked" / "predictions_test.jsonl"
    assert metrics.main(["--predictions", str(predictions)]) == 0
    assert json.loads(capsys.readouterr().out)["exact_match"] == 1


def test_captioners_without_questions_refuse_them_and_caption_as_before(data, tmp_path, capsys):
    video = data / "train" / "class_0" / "video_0.pt"
    argv = ["--checkpoint", str(PLAIN), "--video_dir", str(video)]
    assert inference.main([*argv, "--text_input", "how many ?"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "was trained without questions; leave this flag out" in error
    with pytest.raises(UserError, match="trained without questions"):
        inference.Predictor.from_checkpoint(PLAIN).predict(video, "how many ?")
    rows = answers_of(PLAIN, data / "train", tmp_path / "out.jsonl")
    assert len(rows) == 4 and all("caption" in row for row in rows)


def test_a_run_with_questions_only_asks_for_one(run, data, tmp_path, capsys):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    metadata = json.loads((copy / "metadata.json").read_text())
    assert metadata["questions"] == "some"  # one training video has a caption too
    (copy / "metadata.json").write_text(json.dumps(metadata | {"questions": "all"}))
    capsys.readouterr()
    argv = ["--checkpoint", str(copy), "--video_dir", str(data / "train" / "class_0" / "video_0.pt")]
    for more in ([], ["--text_input", ""]):
        assert inference.main([*argv, *more]) == 2
        assert "1 of 1 video came without a question" in capsys.readouterr().err


def test_a_resumed_run_equals_an_uninterrupted_one(data, tmp_path, monkeypatch):
    """13 samples in batches of 4: 4 steps per epoch, stopped in the second of two."""
    more = [*CAPTIONER, "--num_workers", "0", "--save_every", "1", "--epochs", "2", "--token_grid", "2"]
    assert_resumed_exactly(data, tmp_path, monkeypatch, more, 6)


def test_changed_questions_and_answers_are_noticed_at_resume(data, tmp_path):
    splits = [read_splits(data, questions=True)]
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    file = folder / "train" / "metadata.jsonl"
    file.write_text(file.read_text().replace('"one"', '"three"'))
    splits.append(read_splits(folder, questions=True))
    file.write_text((data / "train" / "metadata.jsonl").read_text().replace("how many", "how few"))
    splits.append(read_splits(folder, questions=True))
    prints = [fingerprint_data(s, d)[:32] for s, d in zip(splits, (data, folder, folder), strict=True)]
    assert len({*prints}) == 3


@pytest.mark.slow
def test_segments_of_a_video_have_questions_of_their_own(tmp_path, capsys, monkeypatch):
    """Every second of a video gets the same two questions; the pixels of the second decide the answers."""
    data = make_data(tmp_path / "data")
    for file in data.glob("*/metadata.jsonl"):
        rows = read_rows(file)
        for row in rows:
            answers = [row["label"], f"half {row['start'] // 3}"]
            row |= {"question": ["how bright ?", "which half ?"], "answer": answers}
        rows[0]["caption"] = "a bright second"
        file.write_text("\n".join(map(json.dumps, rows)))
    argv = ["--run_name", "r", "--epochs", "60", "--learning_rate", "3e-3", "--image_size", "32", "--num_frames", "2"]
    assert train(data, tmp_path, *argv) == 0
    out = capsys.readouterr().out
    assert "feature cache: 0 of 16 videos" in out
    assert "videos: 8 train, 4 val, 4 test" in out and "questions: 16 train, 8 val, 8 test" in out

    # scores and predictions
    scores = json.loads((tmp_path / "r" / "metrics.json").read_text())["test"]
    assert (scores["answers"]["accuracy"], scores["answers"]["count"], scores["count"]) == (1, 8, 4)
    predictions = tmp_path / "r" / "predictions_test.jsonl"
    rows = read_rows(predictions)
    asked = [(second, question) for second in (1, 2, 4, 5) for question in ("how bright ?", "which half ?")]
    expected = [(1, 2, None), *((second, second + 1, question) for second, question in asked)]
    assert [(r["start"], r["end"], r.get("question")) for r in rows] == expected
    assert metrics.main(["--predictions", str(predictions)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["count"], found["exact_match"]) == (9, 1)
    assert score.main(["--checkpoint", str(tmp_path / "r"), "--num_workers", "0"]) == 0
    assert "100.0 % of 8 answers right" in capsys.readouterr().out and read_rows(predictions) == rows

    # inference continues its file where it ended, within the questions about a segment
    output = tmp_path / "out.jsonl"
    rows = answers_of(tmp_path / "r", data / "test", output)
    assert [(r["start"], r["end"], r.get("question")) for r in rows] == expected
    assert [r["right"] for r in rows if "answer" in r] == [True] * 8
    output.write_text("".join(output.read_text().splitlines(keepends=True)[:4]))
    capsys.readouterr()
    assert answers_of(tmp_path / "r", data / "test", output) == rows
    assert "already has 4 of 9 answers" in capsys.readouterr().out

    # each window is asked every question once, and has no true answer
    rows = answers_of(tmp_path / "r", data / "test", tmp_path / "line.jsonl", "--timeline", "3")
    windows = [(r["start"], r.get("question")) for r in rows]
    assert windows == [(start, q) for q in (None, "how bright ?", "which half ?") for start in (0, 3)]
    assert not any("right" in r for r in rows)

    # the doctor hashes a video once, and decodes a segment once
    hashed, digest = [], readers.digest
    monkeypatch.setattr(readers, "digest", lambda path: hashed.append(path.resolve()) or digest(path))
    splits = read_splits(data, questions=True)
    assert all(not finding.advice for finding in doctor.check_copies(splits))
    assert len(hashed) == len({*hashed}) == 4 and doctor.check_readable(splits).result == "16 videos"


def test_answers_about_a_video_are_drawn_together():
    """A draw of two videos has all right, half right, or none right, so the interval is as wide as it can be."""
    right, kinds = np.array([True] * 4 + [False] * 4), ["count", "intervals", "all", None] * 2
    scores = metrics.question_scores(right, kinds, ["x"] * 4 + ["y"] * 4)
    assert (scores["accuracy"], scores["interval"], scores["count"]) == (0.5, [0.0, 1.0], 8)
    assert {kind: (row["accuracy"], row["count"]) for kind, row in scores["kinds"].items()} == dict.fromkeys(
        ("all", "count", "intervals"), (0.5, 2)
    )


def test_a_rare_kind_has_the_interval_of_its_own_videos():
    """Most draws of 100 videos would miss the only one with this kind. A single video has no spread to draw from, so it
    gets Wilson's interval of one answer."""
    right, kinds = np.array([True, False] * 51), ["rare"] * 2 + ["common"] * 100
    scores = metrics.question_scores(right, kinds, ["x", "x", *map(str, range(100))])
    assert scores["kinds"]["rare"] == {"accuracy": 0.5, "interval": metrics.wilson(0.5, 1), "count": 2}
