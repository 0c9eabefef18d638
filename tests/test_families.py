"""Every family of backbones, from a tiny random folder: its own outputs, sizes, pooling, training and caching."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_resume import assert_resumed_exactly, flags
from torch import nn

import main
from build_model import adapters, build_model, trained_tensors
from checkpoint import read_run
from config import ROOT, Config, check_options
from extras.export import export
from inference import Predictor
from pretrained import Source
from script import UserError
from train_code import build_optimizer, cast_frozen, first_steps_checked, layers_above, loss_sum
from vision import FAMILIES, layer_lists, load_vision, patch_shape, read_vision_config

SIDE, FRAMES = 32, 4  # of every tiny model, in patches of 8 pixels
SMALL = {"hidden_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
MLP, PATCH, VIDEO = {"intermediate_size": 64}, {"image_size": SIDE, "patch_size": 8}, {"num_frames": FRAMES}
VJEPA2 = {"frames_per_clip": FRAMES, "crop_size": SIDE, "patch_size": 8, "num_pooler_layers": 1} | {
    f"pred_{name}": size for name, size in (SMALL | {"num_hidden_layers": 1}).items()
}
VIDEOPRISM = {"image_size": SIDE, "tubelet_size": [1, 8, 8], "num_spatial_layers": 2, "num_temporal_layers": 1}
# transformers' class and the fields of its configuration; the key's first word is the family
MODELS = {
    "timesformer": ("TimesformerForVideoClassification", SMALL | MLP | PATCH | VIDEO),
    "videomae": ("VideoMAEForVideoClassification", SMALL | MLP | PATCH | VIDEO),
    "vivit": ("VivitForVideoClassification", SMALL | MLP | VIDEO | {"image_size": SIDE, "tubelet_size": [2, 8, 8]}),
    "vjepa2": ("VJEPA2ForVideoClassification", SMALL | VJEPA2),
    "vjepa2 bare": ("VJEPA2Model", SMALL | VJEPA2),
    "videoprism_vision_model": ("VideoPrismForVideoClassification", SMALL | MLP | VIDEO | VIDEOPRISM),
    "videoprism_vision_model bare": ("VideoPrismVisionModel", SMALL | MLP | VIDEO | VIDEOPRISM),
    "dinov2": ("Dinov2Model", SMALL | PATCH),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", SMALL | PATCH),
    "dinov3_vit": ("DINOv3ViTModel", SMALL | MLP | PATCH | {"num_register_tokens": 3}),
    "siglip_vision_model": ("SiglipVisionModel", SMALL | MLP | PATCH),
    "siglip_vision_model bare": ("SiglipVisionModel", SMALL | MLP | PATCH | {"vision_use_head": False}),
    "clip_vision_model": ("CLIPVisionModel", SMALL | MLP | PATCH),
}
IMAGES = {key for key in MODELS if FAMILIES[key.split()[0]].is_image_encoder}
EVERY = pytest.mark.parametrize("key", MODELS)


def native_model(key: str, **more) -> nn.Module:
    """A random model of transformers, with weights that are large enough for every part of it to matter."""
    name, fields = MODELS[key]
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**(fields | more)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """A function from the key of a model to a folder with it."""
    made = {}

    def folder(key: str) -> Path:
        if key not in made:
            made[key] = tmp_path_factory.mktemp(key.replace(" ", "_"))
            native_model(key).save_pretrained(made[key])
            fields = {"size": {"shortest_edge": SIDE}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
            (made[key] / "preprocessor_config.json").write_text(json.dumps(fields))
        return made[key]

    return folder


def clips(count: int, frames: int = FRAMES, size: int = SIDE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, frames, 3, size, size), dtype=torch.uint8, generator=generator)


def own_pooled(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """What transformers' own class makes of a clip: the input of its classifier, or of a linear probe."""
    if isinstance(getattr(model, "classifier", None), nn.Linear):
        model.classifier, classifier = nn.Identity(), model.classifier
        pooled = model(pixels).logits
        model.classifier = classifier
        return pooled.reshape(len(pixels), -1)
    if pixels.shape[1] == 3:  # images
        output = model(pixels)
        return output.last_hidden_state.mean(1) if output.pooler_output is None else output.pooler_output
    more = {"skip_predictor": True} if hasattr(model, "predictor") else {}
    return model(pixels, **more).last_hidden_state.mean(1)


# -- outputs ----------------------------------------------------------------------------------------


@EVERY
def test_at_its_own_size_the_pooled_token_is_that_of_the_native_class(folder_of, key):
    model = native_model(key)
    vision = load_vision(Source(str(folder_of(key))), Config(num_frames=FRAMES)).eval()
    pixels = vision.preprocessing.normalise(clips(2))
    with torch.no_grad():
        found = vision(clips(2))
        if key in IMAGES:
            expected = own_pooled(model, pixels.flatten(0, 1)).unflatten(0, (2, FRAMES)).mean(1)
        else:
            expected = own_pooled(model, pixels)
    difference = float((found - expected).abs().max())
    print(f"{key}: {difference:.1e} of {float(expected.abs().max()):.1f}")
    assert difference <= 1e-5 * max(1, float(expected.abs().max()))


@EVERY
@pytest.mark.parametrize("frames, size", [(2, 48), (8, 16)])
def test_any_number_of_frames_and_size_finds_a_planted_patch(folder_of, key, frames, size):
    """A change of one patch moves the token of its cell, and its time step, more than any other."""
    vision = load_vision(Source(str(folder_of(key))), Config(num_frames=frames, image_size=size)).eval()
    for layer in (m for m in vision.backbone.modules() if isinstance(m, nn.Linear)):
        layer.weight.data *= 0.1  # random layers mix tokens more than trained ones
    (tubelet, patch), plain = patch_shape(vision.config), clips(1, frames, size)
    for time, row, column in ((0, 0, 1), (frames // tubelet - 1, 1, 0)):
        planted = plain.clone()
        rows, columns = (slice(patch * k, patch * (k + 1)) for k in (row, column))
        planted[:, tubelet * time : tubelet * (time + 1), :, rows, columns] ^= 128
        with torch.no_grad():
            (_, before), (_, after) = vision.encode(plain), vision.encode(planted)
        moved = (after - before).norm(dim=-1)[0]  # (t, h, w)
        assert moved.shape == (frames // tubelet, size // patch, size // patch)
        assert [int(i) for i in torch.unravel_index(moved.argmax(), moved.shape)] == [time, row, column]


@pytest.mark.parametrize("key", ["vivit", "vjepa2", "videoprism_vision_model", "dinov2", "siglip_vision_model"])
def test_another_size_equals_a_native_model_of_that_size(folder_of, key):
    """Where transformers can compute it: rotary positions and its own interpolation; ViViT gets our table."""
    frames, size = (FRAMES, 48) if key in IMAGES else (8, 48)
    vision = load_vision(Source(str(folder_of(key))), Config(num_frames=frames, image_size=size)).eval()
    if key in ("vivit", "vjepa2"):
        fields = {
            "vivit": {"num_frames": frames, "image_size": size},
            "vjepa2": {"frames_per_clip": 8, "crop_size": 48},
        }
        native = native_model(key, **fields[key]).base_model
        native.load_state_dict(vision.backbone.state_dict(), strict=False)
    else:
        native = native_model(key)
        native = native.base_model if key.startswith("videoprism") else native
    pixels = vision.preprocessing.normalise(clips(1, frames, size))
    pixels = pixels.flatten(0, 1) if key in IMAGES else pixels
    with torch.no_grad():
        expected = native(pixels, **vision.family.arguments).last_hidden_state
        found = vision.backbone(**{vision.family.input: pixels}, **vision.family.arguments).last_hidden_state
        patches = vision.encode(clips(1, frames, size))[1]
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(patches.flatten(1, 3)[0, -1], expected[-1, -1], atol=1e-5)


@pytest.mark.parametrize(
    "key, options, cause",
    [
        ("vjepa2", {"num_frames": 3}, "--num_frames 3: this backbone needs a multiple of its tubelet size, 2"),
        ("vivit", {"num_frames": 5}, "multiple of its tubelet size, 2"),
        ("dinov2", {"image_size": 36}, "--image_size 36: this backbone needs a multiple of its patch size, 8"),
    ],
)
def test_a_size_that_a_family_cannot_take_is_an_error_that_says_what_it_takes(folder_of, key, options, cause):
    with pytest.raises(UserError, match=cause):
        load_vision(Source(str(folder_of(key))), Config(**options))


def test_an_unknown_family_is_an_error_that_lists_the_known_ones(tmp_path):
    transformers.ResNetConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"is a resnet; vision backbones are {', '.join(FAMILIES)}"):
        load_vision(Source(str(tmp_path)), Config())


@pytest.mark.parametrize(
    "key, field",
    [("vjepa2", "pred_num_hidden_layers"), ("videoprism_vision_model", "num_spatial_layers"), ("vjepa2", "crop_size")],
)
def test_a_configuration_that_is_too_large_is_refused_before_it_is_built(folder_of, tmp_path, key, field):
    values = json.loads((folder_of(key) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {field: 10**6}))
    with pytest.raises(UserError, match="too large to build"):
        load_vision(Source(str(tmp_path)), Config())


# -- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_the_vision_part_of_a_model_with_text_is_loaded(tmp_path, kind):
    """Published SigLIP and CLIP weights come with a text part."""
    text = SMALL | MLP | {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    name = {"siglip": "Siglip", "clip": "CLIP"}[kind]
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=SMALL | MLP | PATCH)
    model = getattr(transformers, f"{name}Model")(config).eval()
    model.save_pretrained(tmp_path)
    vision = load_vision(Source(str(tmp_path)), Config(num_frames=1)).eval()
    pixels = vision.preprocessing.normalise(clips(2, 1))
    with torch.no_grad():
        expected = model.vision_model(pixels[:, 0]).pooler_output
        assert torch.allclose(vision(clips(2, 1)), expected, atol=1e-6)
    assert read_vision_config(Source(str(tmp_path))).model_type == f"{kind}_vision_model"


@pytest.mark.parametrize("key, mean", [("siglip_vision_model", 0.5), ("videoprism_vision_model", 0.0), ("vivit", 1.5)])
def test_without_a_preprocessor_config_a_family_has_values_of_its_own(tmp_path, capsys, key, mean):
    native_model(key).save_pretrained(tmp_path)
    vision = load_vision(Source(str(tmp_path)), Config())
    assert vision.preprocessing.mean == (mean,) * 3
    assert f"using the usual values of {key}" in capsys.readouterr().out
    white = torch.full((1, FRAMES, 3, SIDE, SIDE), 255, dtype=torch.uint8)
    assert torch.allclose(vision.preprocessing.normalise(white), torch.tensor(1.0))


@pytest.mark.parametrize("name", ["video_preprocessor_config.json", "processor_config.json"])
def test_the_files_of_video_processors_are_read(tmp_path, name):
    """V-JEPA 2 comes with the first; its frames are resized to more than the crop, at any size."""
    native_model("vjepa2").save_pretrained(tmp_path)
    fields = {"size": {"shortest_edge": 292}, "crop_size": {"height": 256, "width": 256}, "do_center_crop": True}
    fields |= {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "video_processor_type": "VJEPA2VideoProcessor",
    }
    values = {"video_processor": fields} if name == "processor_config.json" else fields
    (tmp_path / name).write_text(json.dumps(values))
    found = load_vision(Source(str(tmp_path)), Config(image_size=64)).preprocessing
    assert (found.image_size, found.resize, found.mean) == (64, (73,), (0.1, 0.2, 0.3))


def test_the_fingerprint_knows_the_pooler(tmp_path, folder_of):
    """V-JEPA 2 classifiers share their frozen backbone and differ in the pooler, which the cache depends on."""
    model = native_model("vjepa2")
    nn.init.zeros_(model.pooler.query_tokens)
    model.save_pretrained(tmp_path)
    sources = Source(str(tmp_path)), Source(str(folder_of("vjepa2")))
    for source in sources:
        load_vision(source, Config())
    assert sources[0].fingerprint != sources[1].fingerprint


# -- which frames -----------------------------------------------------------------------------------

STRIDES = {"timesformer": 32, "videomae": 4, "vivit": 2, "vjepa2": 4}  # of published training; 0 for the others


@EVERY
def test_the_stride_is_that_of_published_training_except_for_tiny_weights(folder_of, key):
    config = Config(vision_model=str(folder_of(key)), num_frames=FRAMES)
    vision = load_vision(Source(str(folder_of(key))), config)
    assert vision.fill_auto(config).frame_stride == -STRIDES.get(key.split()[0], 0)
    assert vision.fill_auto(replace(config, frame_stride=3)).frame_stride == 3
    assert vision.fill_auto(replace(config, vision_model="videomae")).frame_stride == 0


@pytest.mark.parametrize(
    "key, stride, line",
    [
        ("videomae", "4", "frames: one in 4, from a window of 13 frames; or spread over a shorter video"),
        pytest.param("timesformer", "0", "frames: one in 32, from a window of 97 frames;", marks=pytest.mark.slow),
    ],
)
def test_auto_is_the_stride_where_videos_are_long_enough_and_else_zero(
    dataset, tmp_path, capsys, folder_of, key, stride, line
):
    """These videos have 16 frames. Inference takes the stride from the run."""
    options = flags(dataset, tmp_path, "--epochs", "1", "--num_workers", "0", "--num_frames", str(FRAMES))
    options += ["--vision_model", str(folder_of(key))]
    assert main.main([*options, "--run_name", "auto"]) == 0
    assert line in capsys.readouterr().out
    assert main.main([*options, "--run_name", "given", "--frame_stride", stride]) == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("auto", "given")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    runs = [Predictor.from_checkpoint(tmp_path / name) for name in ("auto", "given")]
    assert [run.config.frame_stride for run in runs] == [-STRIDES[key], int(stride)]
    videos = sorted((dataset / "test").rglob("*.pt"))
    assert [runs[0].predict(video) for video in videos] == [runs[1].predict(video) for video in videos]


def test_runs_of_earlier_versions_spread_their_frames(tmp_path):
    run = shutil.copytree(ROOT / "checkpoints" / "provided" / "timesformer_fvbb", tmp_path / "run")
    assert read_run(run)[0].frame_stride == 0
    options = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(options.replace("frame_stride: 0\n", ""))
    assert read_run(run)[0].frame_stride == 0


# -- training ---------------------------------------------------------------------------------------

MODES = {"full": {}, "frozen": {"freeze_visionbackbone": True}, "lora": {"use_lora_vision": True}}
JOBS = {
    "linear": {"head": "linear"},
    "attentive": {"head": "attentive"},
    "bert": {"use_vlm": True},
    "bert text": {"use_vlm": True, "use_text": True},
    "gpt2": {"use_vlm": True, "captioning": True},
}
# every family in every mode, and every job with several families; the full product is slow
CYCLE = [*JOBS]
FAST = {(key, mode, CYCLE[(i + j) % len(CYCLE)]) for i, key in enumerate(MODELS) for j, mode in enumerate(MODES)}
PRODUCT = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in ((key, mode, job) for key in MODELS for mode in MODES for job in JOBS)
]


def batch_of(model) -> dict[str, torch.Tensor]:
    texts = ["a red circle", "it goes up and down"]
    return model.collator()(
        [
            {"video": v, "index": i, "label": i, "caption": texts[i], "text": texts[i], "question": ""}
            for i, v in enumerate(clips(2))
        ]
    )


@pytest.mark.parametrize("key, mode, job", PRODUCT)
def test_two_steps_change_what_is_trained_and_every_adapter_is_live(folder_of, key, mode, job):
    """Gradient checkpointing changes neither the loss nor the gradients."""
    options = {"num_frames": FRAMES, "dropout": 0.0} | MODES[mode] | JOBS[job]
    config = check_options(Config(vision_model=str(folder_of(key)), **options))
    losses, gradients = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_model(replace(config, gradient_checkpointing=checkpointing), 3)
        model.vision_encoder.config.pos_embed_rescale = None  # DINOv3 draws another scale in every training step
        losses.append(loss_sum(model.train(), batch_of(model))[0])
        losses[-1].backward()
        gradients.append({n: p.grad.clone() for n, p in trained_tensors(model).items()})
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for name, gradient in gradients[0].items():
        scale = float(gradient.abs().max()) + 1e-3
        assert torch.allclose(gradients[1][name], gradient, rtol=1e-3, atol=1e-4 * scale), name

    # the second model goes on
    assert bool(dict(adapters(model))) == (mode == "lora")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, model.vision_encoder.fill_auto(config))
    for step in range(2):
        with first_steps_checked(model, step):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss_sum(model, batch_of(model))[0].backward()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(trained_tensors(model))


@EVERY
def test_layer_decay_follows_the_order_in_which_modules_run(folder_of, key):
    """What runs before the first layer is furthest from the output, and what runs after the last one is nearest."""
    vision = load_vision(Source(str(folder_of(key))), Config(num_frames=FRAMES)).eval()
    layers = [layer for part in layer_lists(vision.backbone) for layer in part]
    started: list[nn.Module] = []
    for module in vision.modules():
        module.register_forward_pre_hook(lambda module, args: started.append(module))
    with torch.no_grad():
        vision(clips(1))
    assert [module for module in started if module in layers] == layers  # in the order in which they run
    first, last = started.index(layers[0]), started.index(layers[-1]) + len([*layers[-1].modules()])

    above, name_of = layers_above(vision), {module: name for name, module in vision.named_modules()}
    for k, layer in enumerate(layers):
        found = {above[f"{name_of[layer]}.{name}"] for name, _ in layer.named_parameters()}
        assert found == {len(layers) - k}
    for part, distance in ((started[:first], len(layers) + 1), (started[last:], 0)):
        names = {f"{name_of[m]}.{name}" for m in part for name, _ in m.named_parameters(recurse=False)}
        assert names and {above[name] for name in names} == {distance}


@EVERY
def test_frozen_weights_in_bf16_change_no_bit(folder_of, key):
    config = Config(
        vision_model=str(folder_of(key)), num_frames=FRAMES, frozen_dtype="bf16", freeze_visionbackbone=True
    )
    encoder = (model := build_model(config, 3).eval()).vision_encoder
    features = []
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features.append(encoder(clips(2)))
        cast_frozen(model, config, SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16"))
    assert torch.equal(*features)
    assert any(parameter.dtype == torch.bfloat16 for parameter in encoder.parameters())


# -- caching, resuming, predicting, exporting -------------------------------------------------------


@EVERY
@pytest.mark.parametrize("head", ["linear", "attentive"])
def test_features_stand_for_pixels(folder_of, key, head):
    """The cache holds them as fp16."""
    config = check_options(Config(vision_model=str(folder_of(key)), num_frames=FRAMES, head=head, **MODES["frozen"]))
    model = build_model(config, 3).eval()
    grid = model.vision_encoder.fill_auto(config).token_grid
    with torch.no_grad():
        features = model.vision_encoder.features(clips(2), grid)
        assert features.shape == (2, 1 + model.vision_encoder.num_tokens(grid), 48)
        assert torch.allclose(model(features), model(clips(2)), atol=1e-5)
        assert torch.allclose(model(features.half()), model(clips(2)), atol=0.02)


FEW = {("vjepa2", "frozen"), ("dinov3_vit", "full")}
RUNS = [
    pytest.param(*case, marks=() if case in FEW else pytest.mark.slow)
    for case in ((key, mode) for key in MODELS for mode in MODES)
]


@pytest.mark.parametrize("key, mode", RUNS)
def test_a_run_is_resumed_exactly_and_predicts(dataset, tmp_path, monkeypatch, folder_of, key, mode):
    """6 steps, stopped after 3. A frozen backbone's features are read from the cache; DINOv3 draws random scales."""
    backbone = shutil.copytree(folder_of(key), tmp_path / "backbone")
    options = {"num_frames": FRAMES, "num_workers": 0, "save_every": 2, "gradient_checkpointing": True} | MODES[mode]
    more = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    more += ["--vision_model", str(backbone), "--epochs", "2"]
    assert_resumed_exactly(dataset, tmp_path, monkeypatch, more, 3)
    assert any((tmp_path / "whole" / ".features").rglob("*")) == (mode == "frozen")

    # a backbone that was trained in full is in the run
    if mode == "full":
        shutil.rmtree(backbone)
    video = next((dataset / "test").rglob("*.pt"))
    assert Predictor.from_checkpoint(tmp_path / "whole" / "r").predict(video)["label"]


@pytest.mark.parametrize("key", [key for key in MODELS if key in IMAGES or "bare" in key])
def test_a_classifier_without_a_native_class_is_not_exported(folder_of, tmp_path, key):
    config = check_options(Config(vision_model=str(folder_of(key)), num_frames=FRAMES))
    cause = "the frames of .* read one image" if key in IMAGES else "the tokens of .* has an attentive pooler instead"
    with pytest.raises(UserError, match=f"r has a linear head on the mean over {cause}"):
        export(tmp_path / "r", build_model(config, 3), config, {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_size_that_a_native_class_cannot_take_is_not_exported(folder_of, tmp_path):
    """VideoPrism would run at that size, and be wrong unless every forward says interpolate_pos_encoding=True."""
    config = check_options(Config(vision_model=str(folder_of("videoprism_vision_model")), num_frames=8))
    with pytest.raises(UserError, match="to export, train with --num_frames 4 --image_size 32"):
        export(tmp_path / "r", build_model(config, 3), config, {}, tmp_path / "out")


OTHER_SIZE = {"num_frames": 6, "image_size": 48}


@pytest.mark.parametrize(
    "key, options",
    [
        ("vivit", OTHER_SIZE),
        ("vjepa2", OTHER_SIZE | MODES["lora"]),
        ("videoprism_vision_model", MODES["lora"]),
        *(pytest.param(k, {}, marks=pytest.mark.slow) for k in ("vivit", "vjepa2", "videoprism_vision_model")),
    ],
)
def test_an_exported_classifier_answers_like_its_run(folder_of, tmp_path, key, options):
    """Its logits, and what predict.py says, which export() compares. The weights are random and large."""
    names = ["a", "b", "c"]
    config = check_options(Config(vision_model=str(folder_of(key)), **options))
    torch.manual_seed(0)
    model = build_model(config, 3)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or name.startswith("head."):
            nn.init.normal_(parameter, std=0.3)
    metadata = {"class_names": names, "display_names": dict(zip(names, names, strict=True))}
    metadata["backbones"] = {"vision": {"source": "a folder", "licence": "mit"}}
    config = model.vision_encoder.fill_auto(config)
    video = clips(2, config.num_frames, config.image_size)
    with torch.no_grad():
        expected = model.eval()(video)

    logits, probabilities = export(tmp_path / "r", model, config, metadata, tmp_path / "out")
    assert logits < 1e-4 and probabilities < 1e-3
    native = transformers.AutoModelForVideoClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = native(model.vision_encoder.preprocessing.normalise(video)).logits.flatten(1)
    assert torch.allclose(found, expected, atol=1e-4) and found.std() > 0.1
    assert "Trained from `a folder`. Its licence (mit)" in (tmp_path / "out" / "README.md").read_text()
