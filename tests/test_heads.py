"""The attentive head against a slow reference; order and text that it must read; whole runs with it."""

import json
import math

import numpy as np
import pytest
import torch
from test_cache import log_of, train
from test_models import batch_of, clips, items_of, model_of
from test_resume import Killed, assert_same, killed_after
from torch.nn import functional as F

import inference
import train_code
from build_model import adapters, trained_tensors
from checkpoint import PROVIDED, load_run
from config import Config, as_flags, parse, run_name
from heads import AttentiveHead, StepAttention, StepReader, WordLoss, whitening
from script import UserError, read_rows
from train_code import first_steps_checked, loss_sum

ATTENTIVE = {"head": "attentive"}
TEXT = ATTENTIVE | {"use_vlm": True, "use_text": True}
FLAGS = ["--head", "attentive", "--freeze_visionbackbone", "True"]
TEXT_FLAGS = [*FLAGS, "--use_vlm", "True", "--use_text", "True"]


def slow(case: object) -> object:
    return pytest.param(case, marks=pytest.mark.slow)


# -- a slow reference -------------------------------------------------------------------------------


def slow_query(text, embeddings: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """TextQuery of one text without padding: (L, .), (L, .) -> (D,)."""
    norm, score = text.gate
    scores = [F.linear(F.layer_norm(o, o.shape, norm.weight), score.weight) for o in outputs]
    gate = torch.cat(scores).softmax(0)
    words = [F.linear(e, text.whiten.weight, text.whiten.bias) for e in embeddings]
    total = sum(g * w for g, w in zip(gate, words, strict=True))
    norm, project = text.project
    return F.linear(F.layer_norm(total, total.shape, norm.weight, norm.bias), project.weight, project.bias)


def slow_attention(attention: StepAttention, query: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Textbook attention of one query (D,) to one step's tokens (n, D), head by head: every token has key and value."""
    query = F.linear(query, attention.query.weight, attention.query.bias)
    keys = F.linear(tokens, attention.key.weight)
    values = F.linear(tokens, attention.value.weight, attention.value.bias)
    size, parts = len(query) // attention.heads, []
    for h in range(attention.heads):
        part = slice(h * size, (h + 1) * size)
        weights = torch.stack([query[part] @ key[part] / math.sqrt(size) for key in keys]).softmax(0)
        parts.append(sum(w * value[part] for w, value in zip(weights, values, strict=True)))
    return F.linear(torch.cat(parts), attention.out.weight, attention.out.bias)


def slow_read(reader: StepReader, tokens: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """StepReader.read in eval mode for one clip and one query: (N, D), (D,) -> (D,)."""
    tokens = [F.layer_norm(x, x.shape, reader.norm.weight, reader.norm.bias) for x in tokens]
    cls, grid = tokens[: reader.num_pooled], tokens[reader.num_pooled :]
    size, answers = len(grid) // reader.times, []
    for time in range(reader.times):
        step = torch.stack(grid[time * size : (time + 1) * size])
        answers.append(slow_attention(reader.attention, query, step) + reader.time_embedding[time])
    query = F.layer_norm(query, query.shape, reader.query_norm.weight, reader.query_norm.bias)
    read = reader.reader(torch.stack([*cls, query, *answers])[None])[0]  # torch's own transformer layer
    return sum(read) / len(read)


def slow_head(head: AttentiveHead, tokens: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """AttentiveHead in eval mode for one clip: (N, D), (D,) -> (K,)."""
    return F.linear(slow_read(head, tokens, query), head.classifier.weight, head.classifier.bias)


@pytest.mark.parametrize("family", ["timesformer", "videomae"])
def test_equals_a_slow_reference(family):
    model = model_of(vision_model=family, token_grid=3, **ATTENTIVE).eval()
    with torch.no_grad():
        tokens = model.vision_encoder.encode_video(clips(3), 3)
        expected = torch.stack([slow_head(model.head, clip, model.head.query) for clip in tokens])
        assert torch.allclose(model(clips(3)), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["timesformer", "videomae"])
def test_the_tokens_of_a_captioner_equal_a_slow_reference(family):
    model = model_of(vision_model=family, token_grid=3, use_vlm=True, captioning=True).eval()
    projector = model.projector
    with torch.no_grad():
        tokens = model.vision_encoder.encode_video(clips(2), 3)
        read = [[slow_read(projector, clip, query) for query in projector.queries] for clip in tokens]
        expected = projector.project(torch.stack([torch.stack(row) for row in read]))
        assert torch.allclose(model.video_tokens(clips(2)), expected, atol=1e-5)


def test_with_texts_equals_a_slow_reference():
    """Texts of different lengths, one of them empty, in one batch."""
    model = model_of(**TEXT).eval()
    batch, tok = batch_of(model), model.tokenizer
    with torch.no_grad():
        logits = model(batch["video"], batch["input_ids"], batch["attention_mask"])
        tokens = model.vision_encoder.encode_video(batch["video"], model.grid)
        for item, clip, row in zip(items_of(), tokens, logits, strict=True):
            ids = [tok.cls_token_id, *tok(item["text"], add_special_tokens=False)["input_ids"], tok.sep_token_id]
            ids = torch.tensor(ids)
            outputs = model.language_model(input_ids=ids[None]).last_hidden_state[0]
            query = slow_query(model.head.text_query, model.embed(ids), outputs)
            assert torch.allclose(row, slow_head(model.head, clip, query), atol=1e-5)


def test_without_texts_the_query_is_that_of_the_empty_text():
    with_text, without = model_of(**TEXT).eval(), model_of(**(TEXT | {"use_text": False})).eval()
    without.load_state_dict(with_text.state_dict())
    batch = with_text.collator()([item | {"text": ""} for item in items_of()])
    with torch.no_grad():
        assert torch.allclose(loss_sum(without, batch_of(without))[1], loss_sum(with_text, batch)[1], atol=1e-5)


def test_whitened_words_are_uncorrelated_and_far_from_each_other():
    model = model_of(**TEXT)
    table = model.language_model.get_input_embeddings().weight.detach()
    white = whitening(table)(table).detach()
    assert white.mean(0).abs().max() < 1e-3
    assert ((white.T @ white / len(white)).diagonal() - 1).abs().max() < 0.2  # a thousandth of the mean is added
    colours = torch.tensor(model.tokenizer.convert_tokens_to_ids(["red", "green", "blue", "yellow", "white"]))
    cosines = [F.normalize(x[colours], dim=1) @ F.normalize(x[colours], dim=1).T for x in (table, white)]
    assert cosines[0].min() > 0.8 and cosines[1].fill_diagonal_(0).max() < 0.6
    flat = torch.ones(50, 4) * torch.arange(50.0)[:, None]  # varies in one direction only
    assert torch.isfinite(whitening(flat)(flat)).all()


def test_the_word_loss_equals_its_definition():
    """Rarity, whitened embeddings and softmax in plain loops. The loss reaches the projector, and nothing else."""
    model = model_of(use_vlm=True, captioning=True, freeze_visionbackbone=True).eval()
    captions = [("a red disc", "the red circle"), ("a blue disc",), ("a blue square", "a disc"), ("a disc",)]
    loss = WordLoss(model, captions)
    sets = [{i for text in texts for i in model.tokenizer(text)["input_ids"]} for texts in captions]
    words = sorted(set().union(*sets))
    embeddings = model.language_model.get_input_embeddings().weight.detach()
    white = whitening(embeddings)(embeddings).detach()

    tokens = model.video_tokens(clips(2))  # (2, N, W)
    found = loss([2, 0])  # clips 2 and 0 are in this batch
    for clip, index, value in zip(tokens.detach(), (2, 0), found.tolist(), strict=True):
        mean = sum(F.layer_norm(token, token.shape) for token in clip) / len(clip)
        log_p = torch.stack([mean @ white[word] / math.sqrt(len(mean)) for word in words]).log_softmax(0)
        rarity = [math.log(5 / (1 + sum(word in s for s in sets))) * (word in sets[index]) for word in words]
        assert value == pytest.approx(-sum(r * p for r, p in zip(rarity, log_p, strict=True)).item() / sum(rarity))

    found.sum().backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"projector"}


def test_a_word_of_every_caption_has_no_weight_and_a_clip_of_such_words_no_loss():
    model = model_of(use_vlm=True, captioning=True, freeze_visionbackbone=True).eval()
    loss = WordLoss(model, [("the disc",), ("the",)])
    model.video_tokens(clips(2))
    assert loss([0, 1])[1] == 0 < loss([0, 1])[0]


def test_a_captioner_trains_with_the_word_loss(dataset, tmp_path, monkeypatch):
    """With the weight 0 the same run ends elsewhere, and the log says nothing of the word loss."""
    flags = ["--use_vlm", "True", "--captioning", "True", "--freeze_visionbackbone", "True", "--epochs", "1"]
    assert train(dataset, tmp_path, *flags, "--run_name", "with") == 0
    monkeypatch.setattr(train_code, "WORD_LOSS", 0.0)
    assert train(dataset, tmp_path, *flags, "--run_name", "without") == 0
    first, second = (log_of(tmp_path, name)[0] for name in ("with", "without"))
    assert first["val_loss"] != second["val_loss"] and first.keys() == second.keys()


# -- what it reads ----------------------------------------------------------------------------------


def test_the_order_of_time_steps_changes_logits():
    model = model_of(**ATTENTIVE).eval()
    tokens = torch.randn(4, model.vision_encoder.num_tokens(2), 128)
    order = torch.tensor([1, 0, *range(2, 8)])
    swapped = torch.cat([tokens[:, :1], tokens[:, 1:].unflatten(1, (8, 4))[:, order].flatten(1, 2)], dim=1)
    with torch.no_grad():
        assert (model.head(tokens) - model.head(swapped)).abs().max() > 1e-3
        assert torch.allclose(model.head(tokens[[1, 0]]), model.head(tokens)[[1, 0]], atol=1e-6)


def test_every_time_step_answers_for_itself():
    """A token planted in one step changes that step's answer alone, wherever in the step it is."""
    torch.manual_seed(0)
    attention, query, tokens = StepAttention(16, 2), torch.randn(1, 1, 16), torch.randn(1, 5, 4, 16)
    for time, place in ((0, 3), (4, 0)):
        planted = tokens.clone()
        planted[0, time, place] += 3.0
        with torch.no_grad():
            change = (attention(query, planted) - attention(query, tokens)).abs().sum((2, 3))[0]  # (t,)
        assert change.nonzero().flatten().tolist() == [time]
        with torch.no_grad():  # a step's tokens have no order
            assert torch.allclose(attention(query, planted.flip(2)), attention(query, planted), atol=1e-6)


def test_a_text_that_alone_tells_the_object_is_read():
    """Each clip shows two colours that walk over the grid in different ways; the class is the way of the colour in the
    text. Without the text the best is 50 %."""
    colours, classes = ["red", "green", "blue", "yellow", "white"], 4
    model = model_of(freeze_visionbackbone=True, freeze_llmbackbone=True, dropout=0.0, **TEXT)
    rng = np.random.default_rng(0)
    signs = torch.from_numpy(rng.normal(size=(len(colours), 128)).astype(np.float32))
    places = torch.from_numpy(rng.normal(size=(4, 128)).astype(np.float32))
    ways = [[0, 1, 2, 3, 0, 1, 2, 3], [3, 2, 1, 0, 3, 2, 1, 0], [0, 0, 1, 1, 2, 2, 3, 3], [2, 2, 2, 2, 1, 1, 1, 1]]

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features (B, 1 + N, D), the two colours (B, 2), the two ways (B, 2)."""
        features = 0.1 * torch.randn(count, 2 + 8 * 4, 128)
        colour = torch.from_numpy(np.stack([rng.permutation(len(colours))[:2] for _ in range(count)]))
        way = torch.from_numpy(np.stack([rng.permutation(classes)[:2] for _ in range(count)]))
        for clip in range(count):
            for c, w in zip(colour[clip].tolist(), way[clip].tolist(), strict=True):
                for time, place in enumerate(ways[w]):
                    features[clip, 2 + 4 * time + place] += signs[c] + places[place]
        return features, colour, way

    texts = model.codec()([f"a note says: something {colour}" for colour in colours])  # of one length

    def accuracy(data, named: int, truth: int) -> float:
        with torch.no_grad():
            logits = model.eval()(data[0], **{name: ids[data[1][:, named]] for name, ids in texts.items()})
        return float((logits.argmax(1) == data[2][:, truth]).float().mean())

    # the language model is frozen: its outputs for the five texts are computed once
    with torch.no_grad():
        words, outputs = model.embed(texts["input_ids"]), model.language_model(**texts).last_hidden_state
    torch.manual_seed(1)
    data, test = draw(800), draw(200)
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=2e-3, weight_decay=0.05)
    model.train()
    for step in range(150):
        rows = torch.randint(0, 800, (32,))
        named, video = data[1][rows, 0], data[0][rows, 1:]
        logits = model.head(video, words[named], outputs[named], texts["attention_mask"][named])
        F.cross_entropy(logits, data[2][rows, 0]).backward()
        optimizer.param_groups[0]["lr"] = train_code.lr_at(step, 150, 2e-3)
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy(test, named=0, truth=0) >= 0.95
    assert accuracy(test, named=1, truth=0) <= 0.05  # it follows the wrong text
    assert accuracy(test, named=1, truth=1) >= 0.95


# -- what is trained --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ATTENTIVE,
        slow(ATTENTIVE | {"vision_model": "videomae", "use_lora_vision": True}),
        ATTENTIVE | {"vision_model": "videomae", "freeze_visionbackbone": True},
        slow(TEXT),
        slow(TEXT | {"freeze_visionbackbone": True, "use_lora_llm": True}),
        TEXT | {"use_lora_vision": True, "freeze_llmbackbone": True, "gradient_checkpointing": True},
        TEXT | {"use_text": False, "use_lora_llm": True, "freeze_visionbackbone": True},
    ],
)
def test_everything_that_is_trained_moves_and_every_adapter_is_live(options):
    model = model_of(**options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=1e-3)
    for step in range(2):
        loss_sum(model.train(), batch_of(model))[0].backward()
        with first_steps_checked(model, step):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trained_tensors(model))
    assert all(
        n.startswith("vision_encoder.backbone") or ".lora_" in n or "head" in n or "language" in n for n in before
    )
    assert bool(list(adapters(model))) == any("lora" in name for name in options)


def test_the_head_takes_no_positions_of_the_language_model_and_no_grid_finer_than_the_patches():
    assert model_of(num_frames=128, **TEXT).codec().max_tokens == 128
    for options in (ATTENTIVE, TEXT):
        with pytest.raises(UserError, match="4 x 4 patches"):
            model_of(token_grid=5, **options)


# -- options and whole runs -------------------------------------------------------------------------


def test_names_of_runs_and_flags():
    """A head is named where it is not what `auto` means."""
    parsed = parse(["--head", "attentive"], "main")[0]
    assert run_name(parsed) == "timesformer_attentive" and as_flags(parsed) == "--head attentive"
    for head in ("auto", "linear"):
        assert run_name(Config(head=head)) == "timesformer" and as_flags(Config(head=head)) == ""
    encoder, captioner = {"use_vlm": True, "language_model": "bert"}, {"captioning": True, "language_model": "gpt2"}
    for options in ({"vision_model": "videomae"}, encoder, encoder | captioner):
        names = {head: run_name(Config(head=head, **options)) for head in ("auto", "linear", "attentive")}
        assert names["auto"] == names["attentive"] and "linear" in names["linear"] and "linear" not in names["auto"]


def test_provided_checkpoints_answer_as_before(capsys):
    """They were trained before there were other heads."""
    run = PROVIDED / "timesformer_fvbb"
    model, config, _ = load_run(run, Config(head="auto"), {"head"})
    assert config.head == "linear" and isinstance(model.head, torch.nn.Linear)
    with torch.no_grad():
        expected = model.head(model.vision_encoder(clips(2)))
        assert torch.equal(model(clips(2)), expected)
    with pytest.raises(UserError, match=r"trained with other flags: --head attentive \(it has linear\)"):
        load_run(run, Config(head="attentive"), {"head"})


@pytest.mark.parametrize(
    "flags", [slow(FLAGS), ["--head", "attentive"], TEXT_FLAGS, slow([*TEXT_FLAGS[:-2], "--use_lora_llm"])]
)
def test_a_run_answers_from_its_folder(dataset, tmp_path, capsys, flags):
    """Training, its predictions again from the folder alone, views, controls; the text counts where it is read."""
    assert train(dataset, tmp_path, *flags, "--run_name", "a") == 0
    folder = tmp_path / "runs" / "a"
    assert "head: attentive" in (folder / "config.yaml").read_text()
    capsys.readouterr()
    ask = ["--checkpoint", str(folder), "--video_dir", str(dataset / "test"), "--num_workers", "0"]
    assert inference.main([*ask, "--output", str(tmp_path / "answers.jsonl")]) == 0
    answers = {row["file"]: row["label"] for row in read_rows(tmp_path / "answers.jsonl")}
    assert answers == {row["file"]: row["label"] for row in read_rows(folder / "predictions_test.jsonl")}
    assert inference.main([*ask, "--test_clips", "2", "--head", "attentive"]) == 0
    assert inference.main([*ask, "--head", "linear"]) == 2

    model, _, _ = load_run(folder)
    batch = batch_of(model, 3)
    with torch.no_grad():
        logits = loss_sum(model, batch)[1]
        if "--use_text" in flags:
            swapped = batch | {k: batch[k].roll(1, 0) for k in ("input_ids", "attention_mask")}
            assert (loss_sum(model, swapped)[1] - logits).abs().max() > 1e-6
        else:
            assert "input_ids" not in batch
        assert torch.allclose(model.scores(**views(batch)), logits.log_softmax(-1), atol=1e-5)


def test_a_captioner_answers_from_its_folder_and_learns_with_every_tensor(dataset, tmp_path):
    flags = ["--head", "attentive", "--use_vlm", "--captioning", "--freeze_visionbackbone", "--use_lora_llm"]
    assert train(dataset, tmp_path, *flags, "--epochs", "1", "--run_name", "a") == 0
    folder = tmp_path / "runs" / "a"
    ask = ["--checkpoint", str(folder), "--video_dir", str(dataset / "test"), "--num_workers", "0"]
    assert inference.main([*ask, "--output", str(tmp_path / "answers.jsonl")]) == 0
    answers = {row["file"]: row["caption"] for row in read_rows(tmp_path / "answers.jsonl")}
    assert answers == {row["file"]: row["caption"] for row in read_rows(folder / "predictions_test.jsonl")}

    model, _, _ = load_run(folder)
    loss_sum(model.train(), batch_of(model))[0].backward()
    assert model.projector.num_tokens == 16 and all(p.grad.abs().sum() > 0 for p in model.projector.parameters())


def views(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch's arguments with every clip twice."""
    inputs = {k: v for k, v in batch.items() if k not in ("index", "labels")}
    return inputs | {"video": inputs["video"][:, None].expand(-1, 2, -1, -1, -1, -1)}


def test_the_controls_score_it(dataset, tmp_path):
    assert train(dataset, tmp_path, *TEXT_FLAGS, "--epochs", "1", "--run_name", "a", "--controls", "True") == 0
    controls = json.loads((tmp_path / "runs" / "a" / "metrics.json").read_text())["controls"]
    assert {"text_shuffled", "text_only", "shuffled"} < controls.keys()
    assert (tmp_path / "runs" / "a" / "occlusion.png").is_file()


@pytest.mark.slow
def test_resumed_equals_uninterrupted_and_accumulated_equals_one_batch(dataset, tmp_path, monkeypatch):
    flags = [*TEXT_FLAGS, "--use_lora_llm", "True", "--dropout", "0.3", "--save_every", "2"]
    assert train(dataset, tmp_path / "whole", *flags, "--run_name", "r") == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 3)
        train(dataset, tmp_path / "stopped", *flags, "--run_name", "r")
    assert train(dataset, tmp_path / "stopped", *flags, "--run_name", "r", "--resume", "True") == 0
    assert_same(tmp_path / "whole" / "runs" / "r", tmp_path / "stopped" / "runs" / "r")

    flags = [*TEXT_FLAGS, "--dropout", "0", "--freeze_llmbackbone", "True", "--learning_rate", "3e-4"]
    assert train(dataset, tmp_path, *flags, "--run_name", "one") == 0
    more = ["--batch_size", "2", "--gradient_accumulation_steps", "2"]
    assert train(dataset, tmp_path, *flags, *more, "--run_name", "two") == 0
    for a, b in zip(log_of(tmp_path, "one"), log_of(tmp_path, "two"), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


def test_export_refuses_the_head_and_writes_adapters(dataset, tmp_path, capsys):
    small = ["--epochs", "1", "--use_lora_vision", "True", "--head", "attentive"]
    assert train(dataset, tmp_path, *small, "--run_name", "video") == 0
    capsys.readouterr()
    ask = ["--checkpoint", str(tmp_path / "runs" / "video"), "--export", str(tmp_path / "out")]
    assert inference.main(ask) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "has an attentive head, for which Hugging Face has no class" in error
    assert not (tmp_path / "out").exists()
    assert train(dataset, tmp_path, *small, "--use_vlm", "--run_name", "text") == 0
    assert inference.main(["--checkpoint", str(tmp_path / "runs" / "text"), "--export", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "adapter_vision").is_dir()
