"""Layers below the last: what a native model computes there, in one pass for several, as runs and in a sweep."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_families import FRAMES, IMAGES, MODELS, MODES, SIDE, batch_of, clips, native_model
from test_resume import assert_resumed_exactly

import feature_cache
import main
import sweep_heads
from build_model import build_model, trained_tensors
from checkpoint import load_run, read_run
from config import Config, check_options
from extras.export import export
from extras.layers import LayersEncoder
from feature_cache import place_of_store
from inference import Predictor
from pretrained import Source
from script import UserError, read_rows
from train_code import build_accelerator, loss_sum
from vision import layer_lists, load_vision, to_grid

EVERY = pytest.mark.parametrize("key", MODELS)
#: VideoPrism's layers over time come after two over space
MORE = {"videoprism_vision_model": {"num_temporal_layers": 2}}


def native(key: str) -> torch.nn.Module:
    return native_model(key, **MORE.get(key.split()[0], {}))


def lower(key: str) -> int:
    """The layer below the last."""
    return 3 if key.startswith("videoprism") else 1


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function from the key of a model to a folder with it."""
    made = {}

    def folder(key: str) -> Path:
        if key not in made:
            made[key] = tmp_path_factory.mktemp(key.replace(" ", "_"))
            native(key).save_pretrained(made[key])
            fields = {"size": {"shortest_edge": SIDE}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
            (made[key] / "preprocessor_config.json").write_text(json.dumps(fields))
        return made[key]

    return folder


def encoder_of(folder: Path, layer: int | str):
    return load_vision(Source(str(folder)), Config(num_frames=FRAMES, vision_layer=layer)).eval()


# -- features ---------------------------------------------------------------------------------------


def own_features(model: torch.nn.Module, key: str, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(pooled, tokens) from the hidden states of transformers' own model, and its final norm."""
    base, family = model if key in IMAGES else model.base_model, key.split()[0]
    more = {"skip_predictor": True} if hasattr(base, "predictor") else {}
    hidden = base(pixels, output_hidden_states=True, **more).hidden_states[lower(key)]
    if family == "videomae":
        return hidden.mean(1), hidden
    if family == "clip_vision_model":
        return base.post_layernorm(hidden[:, 0]), hidden
    if family == "videoprism_vision_model":  # (B N, T, D)
        hidden = base.layernorm2(hidden).unflatten(0, (len(pixels), -1)).transpose(1, 2).flatten(1, 2)
        return hidden.mean(1), hidden
    norms = {"vjepa2": "encoder.layernorm", "dinov3_vit": "norm", "siglip_vision_model": "post_layernorm"}
    hidden = base.get_submodule(norms.get(family, "layernorm"))(hidden)
    mean = family in ("vjepa2", "siglip_vision_model")
    return hidden.mean(1) if mean else hidden[:, 0], hidden


@EVERY
def test_a_lower_layer_is_the_hidden_state_of_the_native_class(folder_of, key):
    vision = encoder_of(folder_of(key), lower(key))
    pixels = vision.preprocessing.normalise(clips(2))
    with torch.no_grad():
        pooled, patches = vision.encode(clips(2))
        expected, tokens = own_features(native(key), key, pixels.flatten(0, 1) if key in IMAGES else pixels)
        last = encoder_of(folder_of(key), "auto").encode(clips(2))[1]
    if key in IMAGES:
        expected, tokens = expected.unflatten(0, (2, FRAMES)).mean(1), tokens.unflatten(0, (2, FRAMES))
    scale = max(1.0, float(tokens.abs().max()))
    assert torch.allclose(pooled, expected, atol=1e-5 * scale)
    assert torch.allclose(patches, to_grid(tokens, vision.config), atol=1e-5 * scale)
    assert not torch.allclose(patches, last, atol=0.1)


@EVERY
def test_one_pass_gives_the_features_of_each_layer_bit_for_bit(folder_of, key):
    number, layers = encoder_of(folder_of(key), "auto").depth, [lower(key)]
    first = encoder_of(folder_of(key), number)
    calls = []
    for part in layer_lists(first.backbone):
        for layer in part:
            layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = [encoder_of(folder_of(key), layer).features(clips(2), 2) for layer in (number, *layers)]
        together = LayersEncoder(first, layers)
        assert torch.equal(together.features(clips(2), 2), torch.cat(expected, dim=1))
        assert len(calls) == number

        # the first encoder still is what it was
        together.close()
        assert torch.equal(first.features(clips(2), 2), expected[0])
        assert first.layer == number


@EVERY
@pytest.mark.parametrize("mode", MODES)
def test_nothing_above_the_layer_is_trained_and_all_else_is(folder_of, key, mode):
    """Every trained tensor gets a gradient: no adapter or pooler is left that forward never reaches."""
    options = {"vision_layer": lower(key), "head": "linear", "dropout": 0.0} | MODES[mode]
    config = check_options(Config(vision_model=str(folder_of(key)), num_frames=FRAMES, **options))
    model = build_model(config, 3).train()
    loss_sum(model, batch_of(model))[0].backward()
    trained = trained_tensors(model)
    assert all(p.grad is not None and (p.grad.any() or "lora_A" in n) for n, p in trained.items())
    assert (mode == "frozen") == (len(trained) == 2)
    assert sum(map(len, layer_lists(model.vision_encoder.backbone))) == lower(key)


# -- keys and errors --------------------------------------------------------------------------------


def test_the_last_layer_has_the_key_of_runs_without_the_option(folder_of):
    keys = []
    for layer in ("auto", 2, 1):
        config = check_options(Config(vision_model=str(folder_of("vjepa2")), vision_layer=layer, **MODES["frozen"]))
        model = build_model(config, 3)
        config = model.vision_encoder.fill_auto(config)
        folder, description = place_of_store(model, config, build_accelerator(config))
        assert ("vision_layer" in description) == (layer == 1)
        keys.append((folder, description["fingerprint"]))
    assert keys[0] == keys[1] and keys[0][0] != keys[2][0] and keys[0][1] == keys[2][1]


@pytest.mark.parametrize(
    "key, layer, cause",
    [
        ("dinov2", 3, "no layer 3 to read: this backbone has 2 layers$"),
        ("videoprism_vision_model", 2, "4 layers, of which the first 2 see single frames and cannot be read"),
        ("videoprism_vision_model", 5, "no layer 5 to read: this backbone has 4 layers"),
    ],
)
def test_a_layer_that_cannot_be_read_is_an_error(folder_of, key, layer, cause):
    with pytest.raises(UserError, match=cause):
        encoder_of(folder_of(key), layer)


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (main, ["--vision_layer", "0"], "auto or a whole number from 1 to 1000, not '0'"),
        (main, ["--vision_layer", "last"], "auto or a whole number"),
        (main, ["--vision_layer", "5"], "there is no layer 5 to read: this backbone has 4 layers"),
        (main, ["--layers", "5"], "--layers is an option of sweep_heads.py, not of main.py"),
        (sweep_heads, ["--layers", "2", "5"], "there is no layer 5 to read: this backbone has 4 layers"),
        (sweep_heads, ["--layers", "-1"], "each a whole number from 1 to 1000, not '-1'"),
        (sweep_heads, ["--layers", "1", "auto"], "auto or one or more values with spaces between them"),
        (sweep_heads, ["--vision_layer", "2"], "--vision_layer: use --layers"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(script, flags, words, dataset, tmp_path, capsys):
    assert script.main(["--data_dir", str(dataset), "--output_dir", str(tmp_path / "runs"), *flags]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


# -- runs -------------------------------------------------------------------------------------------


def options(dataset: Path, folder: Path, *flags: str) -> list[str]:
    argv = ["--data_dir", str(dataset), "--output_dir", str(folder), "--num_workers", "0", "--epochs", "2"]
    return [*argv, "--batch_size", "4", "--seed", "5", *flags]


@pytest.mark.parametrize("mode", MODES)
def test_a_run_on_a_lower_layer_answers_the_same_when_it_is_loaded(dataset, tmp_path, capsys, mode):
    flags = [part for name, value in MODES[mode].items() for part in (f"--{name}", str(value))]
    argv = options(dataset, tmp_path, *flags, "--vision_layer", "2", "--run_name", "r", "--vision_model", "vjepa2")
    assert main.main(argv) == 0
    assert "8 frames, layer 2 of 4, licence" in capsys.readouterr().out
    assert read_run(tmp_path / "r")[0].vision_layer == 2
    names = load_file(tmp_path / "r" / "model.safetensors").keys()
    assert not any(f"layer.{number}." in name for name in names for number in (2, 3))
    assert any("layer.1." in name for name in names) == (mode != "frozen")
    predictor = Predictor.from_checkpoint(tmp_path / "r")
    for row in read_rows(tmp_path / "r" / "predictions_test.jsonl"):
        answer = predictor.predict(row["file"])
        assert answer["label"] == row["label"]
        assert answer["score"] == pytest.approx(row["score"], abs=2e-3 if mode == "frozen" else 1e-5)

    # the layer is part of the run
    assert main.main([*options(dataset, tmp_path), "--run_name", "r", "--resume", "--vision_layer", "3"]) == 2


@pytest.mark.slow
def test_a_run_on_a_lower_layer_is_resumed_exactly(dataset, tmp_path, monkeypatch):
    more = ["--num_workers", "0", "--save_every", "2", "--epochs", "2", "--vision_layer", "2", "--use_lora_vision"]
    assert_resumed_exactly(dataset, tmp_path, monkeypatch, more, 3)


def shards(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """{key and file: tensors} of a feature cache."""
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def swept(dataset, tmp_path_factory) -> tuple[Path, list[sweep_heads.Candidate]]:
    """(the folder of the finished run of a sweep over layers, all heads)."""
    folder, heads, keep_best = tmp_path_factory.mktemp("sweep"), [], sweep_heads.keep_best
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_heads, "keep_best", lambda found, *rest: (heads.extend(found), keep_best(found, *rest)))
        flags = ["--layers", "1", "4", "2", "--learning_rates", "0.01", "--weight_decays", "0.05", "--dropout", "0.4"]
        assert sweep_heads.main([*options(dataset, folder, *flags), "--run_name", "r", "--token_grid", "2"]) == 0
    return folder / "r", heads


@pytest.mark.parametrize("layer, head", [(1, "linear"), (2, "attentive"), (4, "linear")])
def test_each_head_of_a_sweep_is_the_one_that_main_trains_on_that_layer(swept, dataset, tmp_path, layer, head):
    flags = ["--vision_layer", str(layer), "--head", head, "--freeze_visionbackbone", "--learning_rate", "0.01"]
    flags += ["--dropout", "0.4", "--token_grid", "2", "--run_name", "r"]
    assert main.main(options(dataset, tmp_path, *flags)) == 0
    alone, log = load_file(tmp_path / "r" / "model.safetensors"), read_rows(tmp_path / "r" / "log.jsonl")
    (found,) = [c for c in swept[1] if (c.run.config.vision_layer, c.run.config.head) == (layer, head)]
    assert found.best.keys() == alone.keys()
    assert all(torch.allclose(found.best[name], tensor, rtol=0, atol=1e-5) for name, tensor in alone.items())
    for own, row in zip(found.engine.progress.log, log, strict=True):
        assert own["val_loss"] == pytest.approx(row["val_loss"], abs=1e-5)

    # the one pass of the sweep has stored what this run computes alone
    together, separate = shards(swept[0].parent / ".features"), shards(tmp_path / ".features")
    assert separate and separate.keys() <= together.keys()
    for name, tensors in separate.items():
        assert all(torch.equal(tensor, together[name][part]) for part, tensor in tensors.items())


def test_a_sweep_reads_the_videos_once_and_later_runs_not_at_all(swept, dataset, monkeypatch, capsys):
    computed = []
    original = feature_cache.features_of
    monkeypatch.setattr(feature_cache, "features_of", lambda e, p, *a: computed.append(len(p)) or original(e, p, *a))
    flags = ["--freeze_visionbackbone", "--run_name", "later", "--vision_layer", "2", "--token_grid", "2"]
    assert main.main(options(dataset, swept[0].parent, *flags)) == 0 and not computed
    assert "18 of 18 videos in" in capsys.readouterr().out

    # a new layer is computed for itself, and those that are there are left alone
    before = shards(swept[0].parent / ".features")
    flags = ["--layers", "3", "4", "--heads", "linear", "--token_grid", "2", "--learning_rates", "0.01"]
    assert sweep_heads.main(options(dataset, swept[0].parent, *flags, "--run_name", "more")) == 0
    assert sum(computed) == 18 and len(shards(swept[0].parent / ".features")) == len(before) + 1


def test_the_best_head_of_a_sweep_over_layers_is_a_run_on_its_layer(swept):
    folder, heads = swept
    rows = json.loads((folder / "sweep.json").read_text())
    assert sorted((row["vision_layer"], row["head"]) for row in rows) == [
        (layer, head) for layer in (1, 2, 4) for head in ("attentive", "linear")
    ]
    config = read_run(folder)[0]
    assert (config.vision_layer, config.head) == (rows[0]["vision_layer"], rows[0]["head"])
    model, *_ = load_run(folder)
    assert model.vision_encoder.layer == rows[0]["vision_layer"]

    # one backbone in memory
    first = heads[0].run.model.vision_encoder.backbone.encoder.layer
    assert all(c.run.model.vision_encoder.backbone.encoder.layer[0] is first[0] for c in heads)


@pytest.mark.parametrize("key, mode", [("timesformer", "lora"), ("videomae", "frozen"), ("vivit", "full")])
def test_a_classifier_on_a_lower_layer_is_exported_as_a_smaller_model(folder_of, tmp_path, key, mode):
    config = check_options(
        Config(vision_model=str(folder_of(key)), num_frames=FRAMES, vision_layer=1, head="linear", **MODES[mode])
    )
    model = build_model(config, 3)
    metadata = {"class_names": ["a", "b", "c"], "display_names": {n: n for n in "abc"}}
    metadata["backbones"] = {"vision": {"source": "a folder", "licence": "mit"}}
    config = model.vision_encoder.fill_auto(config)
    logits, probabilities = export(tmp_path / "r", model, config, metadata, tmp_path / "out")
    assert logits < 1e-4 and probabilities < 1e-3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1


def test_without_its_pooler_a_classifier_has_no_native_class(folder_of, tmp_path):
    config = check_options(Config(vision_model=str(folder_of("vjepa2")), num_frames=FRAMES, vision_layer=1))
    with pytest.raises(UserError, match=r"the tokens of vjepa2, .* has an attentive pooler instead"):
        export(tmp_path / "r", build_model(replace(config, head="linear"), 3), config, {}, tmp_path / "out")
