"""The shipped tiny backbones match their cards, and damaged backbone folders are refused."""

import argparse
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import backbones.pretrain as world
import dummy_data
import main
import score
from config import ROOT
from pretrained import tiny_folder
from transforms import Preprocessing


def card(name: str) -> str:
    return (ROOT / "backbones" / f"{name}-tiny" / "CARD.md").read_text(encoding="utf-8")


def load_vision(name: str):
    from transformers import AutoModelForVideoClassification

    return AutoModelForVideoClassification.from_pretrained(tiny_folder(name))


def test_all_together_are_small():
    size = sum(f.stat().st_size for f in (ROOT / "backbones").rglob("*") if f.is_file())
    assert size <= 25e6, f"{size / 1e6:.1f} MB"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timesformer", "videomae", "vjepa2"])
def test_a_linear_head_on_frozen_features(name):
    """TimeSformer's pooled token knows the motion, the others' hardly do; one frame shows none of them any."""
    ours, still = world.probe(load_vision(name)), world.probe(load_vision(name), still=True)
    assert f"| pretrained | {100 * ours:.1f} % |" in card(name)
    assert still < 0.2  # chance is 1 in 9
    torch.manual_seed(0)
    assert ours > world.probe(world.NEW[name]()) + (0.5 if name == "timesformer" else 0)


def test_gpt2_knows_the_grammar():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_folder("gpt2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    perplexity, best = world.held_out_perplexity(model, tokenizer, count=500)
    assert best <= perplexity <= 1.15 * best


def test_the_grammars_entropy_is_right():
    """No two derivations give the same caption, so -log p is the sum of the logs of the choices."""
    first = {"size": "small", "colour": "red", "shape": "diamond", "motion": "up left"}
    second = {"size": "large", "colour": "white", "shape": "ring", "motion": "stops"}
    rng = np.random.default_rng(0)
    one, two = ({world.draw_caption(items, rng) for _ in range(20_000)} for items in ([first], [first, second]))
    words = 3 * len(world.SHAPE_WORDS["diamond"]) * len(world.MOTION_PHRASES["up left"])
    more = 3 * len(world.SHAPE_WORDS["ring"]) * len(world.MOTION_PHRASES["stops"])
    assert len(one) == len(dummy_data.TEMPLATES) * words and len(two) == len(one) * more

    # one or two objects, different colours, and for each object a size and a pair of shape and motion; the motions
    # differ, so the second object has no pair with "up left", of which none is withheld
    pairs, colours = len(world.PHRASE_PAIRS), len(world.COLOURS)
    assert world.caption_surprise([first]) == pytest.approx(np.log(2 * colours * pairs * 2 * len(one)))
    others = pairs - len(world.SHAPES)
    choices = 2 * (colours * (colours - 1) / 2) * (pairs * 2) * (others * 2) * len(two)
    assert world.caption_surprise([first, second]) == pytest.approx(np.log(choices))


def test_bert_separates_texts_from_captions_and_reads_any_text():
    """Its features separate the texts of clips from captions: a nearest-mean classifier is nearly always right."""
    from transformers import AutoModel, AutoTokenizer

    folder = tiny_folder("bert")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    assert tokenizer.unk_token_id not in tokenizer("any plain text, really?", add_special_tokens=False)["input_ids"]
    rng = np.random.default_rng(0)
    items = [world.draw_truth(rng)[0] for _ in range(25)]
    words = world.SHAPE_WORDS, world.MOTION_PHRASES
    texts = [dummy_data.fill(template, item, rng, *words) for item in items for template in dummy_data.TEXTS]
    captions = [world.draw_caption(world.draw_truth(rng), rng) for _ in texts]

    @torch.no_grad()
    def features(lines):
        rows = [
            [tokenizer.cls_token_id, *tokenizer(line, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
            for line in lines
        ]
        return torch.stack([model(input_ids=torch.tensor([row])).last_hidden_state[0].mean(0) for row in rows])

    a, b = features(texts), features(captions)
    middle, axis = (a.mean(0) + b.mean(0)) / 2, a.mean(0) - b.mean(0)
    right = torch.cat([(a - middle) @ axis > 0, (b - middle) @ axis < 0])
    assert right.float().mean() > 0.9


def test_withheld_pairs_and_seeds_never_occur_in_pretraining():
    rng = np.random.default_rng(1)
    shapes, motions = list(world.SHAPES), list(world.MOTIONS)
    drawn = world.draw_objects(rng, 400)
    pairs = {(shapes[s], motions[m]) for s, m in zip(drawn["shape"], drawn["motion"], strict=True)}
    assert not pairs & set(world.WITHHELD) and len(pairs) == len(world.PAIRS)
    items = [item for _ in range(500) for item in world.draw_truth(rng)]
    assert all((item["shape"], item["motion"]) not in world.WITHHELD for item in items)


def test_pretraining_resumes_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "SAVE_EVERY", 3)

    def losses(steps: list[int], state: Path) -> list[float]:
        torch.manual_seed(0)
        tokenizer = world.load_or_train_tokenizer("bert", state)
        model = world.new_bert(tokenizer)
        seen = []

        def loss_of(batch):
            if len(seen) == steps[0]:
                raise KeyboardInterrupt
            loss = model(**batch).loss
            seen.append(loss.item())
            return loss

        args = argparse.Namespace(state_dir=state, scale=1.0, workers=0)
        draw = partial(world.draw_masked_notes, tokenizer=tokenizer)
        try:
            world.train("t", torch.nn.ModuleList([model]), draw, loss_of, 6, 1e-3, args)
        except KeyboardInterrupt:
            steps.pop(0)
            seen += losses(steps, state)
        return seen

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    world.load_or_train_tokenizer("bert", tmp_path / "a").save_pretrained(tmp_path / "b" / "bert-tokenizer")
    whole = losses([99], tmp_path / "a")
    broken = losses([4, 99], tmp_path / "b")  # stopped in step 5, resumes from the state of step 3
    assert len(whole) == 6 and broken == [*whole[:4], *whole[3:]]


# -- damaged backbone folders -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A copy of videomae-tiny."""
    return shutil.copytree(ROOT / "backbones" / "videomae-tiny", tmp_path / "backbone")


def refusal(dataset, capsys, folder, *flags: str) -> str:
    """The one-line error of main.py for a vision backbone."""
    argv = ["--vision_model", str(folder), "--data_dir", str(dataset), "--output_dir", str(folder.parent / "runs")]
    assert main.main([*argv, "--num_workers", "0", "--epochs", "1", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize("text", ["{", "[1, 2]", "", "null", '{"image_processor_type": 3}', "[" * 100_000])
def test_a_damaged_preprocessor_config_is_an_error_that_names_it(dataset, capsys, folder, text):
    (folder / "preprocessor_config.json").write_text(text)
    said = refusal(dataset, capsys, folder)
    assert "preprocessor_config.json" in said and str(folder) in said


@pytest.mark.parametrize(
    "field, value",
    [
        ("image_mean", None),
        ("image_mean", "abc"),
        ("image_mean", [0.5]),
        ("image_mean", [0.5, 0.5, None]),
        ("image_std", [1, 1, 0]),
        ("image_std", [1, 1, float("nan")]),
        ("size", 0),
        ("size", -1),
        ("size", 1e6),
        ("size", "x"),
        ("size", {"longest_edge": 64}),
        ("crop_size", 0),
        ("crop_size", {"height": 64}),
        ("resample", None),
        ("resample", 7),
        ("resample", [2]),
        ("rescale_factor", "a"),
        ("rescale_factor", 0),
    ],
)
def test_an_invalid_field_of_the_preprocessor_config_is_an_error(dataset, capsys, folder, field, value):
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_center_crop": True, field: value}))
    said = refusal(dataset, capsys, folder)
    assert "preprocessor_config.json" in said and str(folder) in said


PREPROCESSOR_FIELDS = [
    "size",
    "crop_size",
    "do_resize",
    "do_center_crop",
    "resample",
    "rescale_factor",
    "image_mean",
    "image_std",
    "do_normalize",
    "do_rescale",
    "offset",
]
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["height", "width", "shortest_edge"]), inner)
    ),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(PREPROCESSOR_FIELDS), ODD), st.integers(8, 512))
def test_any_fields_give_a_preprocessing_that_works_or_a_value_error(fields, size):
    plain = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    try:
        found = Preprocessing.from_dict(plain | fields, size)
    except ValueError:
        return
    assert found.normalise(torch.zeros(1, 1, 3, 2, 2, dtype=torch.uint8)).isfinite().all()
    assert found.resize is None or all(1 <= side <= 8192 for side in found.resize)


def test_only_a_missing_preprocessor_config_is_guessed_with_a_warning(dataset, capsys, folder):
    (folder / "preprocessor_config.json").unlink()
    argv = ["--vision_model", str(folder), "--data_dir", str(dataset), "--output_dir", str(folder.parent / "runs")]
    assert main.main([*argv, "--num_workers", "0", "--epochs", "1", "--freeze_visionbackbone", "True"]) == 0
    assert (
        f"warning: {folder} has no preprocessor_config.json; using the usual values of videomae: mean [0.485, 0.456"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**7},
        {"hidden_size": 10**9},
        {"intermediate_size": 10**12},
        {"image_size": 10**6, "patch_size": 1},
        {"num_frames": 10**8},
    ],
)
def test_a_config_too_large_for_any_machine_is_refused_before_building(dataset, capsys, folder, fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    assert "describes a model that is too large to build" in refusal(dataset, capsys, folder)


@pytest.mark.parametrize("fields", [{"vocab_size": 10**13}, {"n_layer": 10**6}, {"n_positions": 10**12}])
def test_a_language_config_too_large_is_refused_too(dataset, capsys, folder, fields):
    language = shutil.copytree(ROOT / "backbones" / "gpt2-tiny", folder.parent / "gpt2")
    (language / "config.json").write_text(json.dumps(json.loads((language / "config.json").read_text()) | fields))
    flags = ["--use_vlm", "True", "--captioning", "True", "--language_model", str(language)]
    assert "describes a model that is too large to build" in refusal(dataset, capsys, folder, *flags)


def test_attention_code_from_the_hub_is_never_loaded(dataset, capsys, folder, monkeypatch):
    from transformers import modeling_utils

    asked = []
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *a, **k: asked.append(a))
    monkeypatch.setattr(modeling_utils, "load_and_register_attn_kernel", lambda *a, **k: asked.append(a), raising=False)
    language = shutil.copytree(ROOT / "backbones" / "bert-tiny", folder.parent / "bert")
    for backbone in (folder, language):
        file = backbone / "config.json"
        file.write_text(
            json.dumps(
                json.loads(file.read_text()) | {"_attn_implementation": "org/name", "attn_implementation": "org/name"}
            )
        )
    argv = ["--vision_model", str(folder), "--data_dir", str(dataset), "--output_dir", str(folder.parent / "runs")]
    argv += ["--num_workers", "0", "--epochs", "1", "--freeze_visionbackbone", "True"]
    assert main.main([*argv, "--use_vlm", "True", "--language_model", str(language), "--run_name", "r"]) == 0
    assert (
        score.main(["--checkpoint", str(folder.parent / "runs" / "r"), "--num_workers", "0"]) == 0
    )  # the run's own folders
    assert not asked


def test_a_folder_of_adapters_is_refused(dataset, capsys, folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/name"}')
    said = refusal(dataset, capsys, folder)
    assert "holds adapters" in said and "merge_and_unload" in said


@pytest.mark.parametrize(
    "index, cause",
    [
        ({"weight_map": {"a": "../outside.safetensors"}}, "lists a file outside its folder"),
        ({"weight_map": {"a": "/x.safetensors"}}, "outside its folder"),
        ({"weight_map": 3}, "is not an index of weight files"),
        ([], "is not an index of weight files"),
        ({"weight_map": {"a": 3}}, "is not an index of weight files"),
    ],
)
def test_an_index_of_weights_cannot_name_files_outside_its_folder(dataset, capsys, folder, index, cause):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert cause in refusal(dataset, capsys, folder)
