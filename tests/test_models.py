"""The models against native ones: embeddings, token order, padding, what is trained, and what is learned."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import drawn, resolved
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import inference
import main
from build_model import adapters, build_model, trained_tensors
from config import ROOT, Config, check_options, default_rates
from extras.fused import fused_attention
from pretrained import Source, locate
from runs import rates_line
from script import UserError
from train_code import build_accelerator, build_optimizer, first_steps_checked, loss_sum
from transforms import Preprocessing
from vision import fit_embeddings, load_vision, patch_shape, to_grid

FAMILIES = ("timesformer", "videomae")

CAPTIONS = [
    "a small red circle moves right",
    "the blue box is huge and stands still",
    "we see that the disc , tiny and white , moves up",
    "a large green square drifts leftwards",
    "there is a big disc in cyan that moves down",
    "a little box moves left ; it is orange",
    "in this clip the huge purple disc does not move",
    "a circle of yellow colour , small , glides towards the top",
]
TEXTS = [
    "",
    "a note says: something red",
    "something",
    "what does the blue disc do ?",
    "a",
    "b c d e f g",
    "x",
    "look at the tiny green box",
]


def config_of(**options) -> Config:
    return check_options(Config(**({"dropout": 0.0} | options)))


def model_of(**options):
    torch.manual_seed(0)
    return build_model(config_of(**options), num_classes=4)


def clips(count: int = 8, frames: int = 8, size: int = 64) -> torch.Tensor:
    """Noise, uint8 (B, T, C, H, W)."""
    return torch.randint(
        0, 256, (count, frames, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def batch_of(model, count: int = 8) -> dict[str, torch.Tensor]:
    """A batch of dummy videos with four labels, and captions and texts of different lengths."""
    return model.collator()(items_of(count))


def items_of(count: int = 8) -> list[dict]:
    videos = [drawn(k, frames=8)[0] for k in range(count)]
    return [
        {
            "video": torch.from_numpy(v),
            "index": i,
            "label": i % 4,
            "caption": CAPTIONS[i],
            "text": TEXTS[i],
            "question": "",
        }
        for i, v in enumerate(videos)
    ]


def native_config(family: str, **more):
    from transformers import TimesformerConfig, VideoMAEConfig

    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
        "num_frames": 4,
    }
    return {"timesformer": TimesformerConfig, "videomae": VideoMAEConfig}[family](**(small | more))


def native_model(family: str, **more):
    from transformers import AutoModelForVideoClassification

    torch.manual_seed(0)
    model = AutoModelForVideoClassification.from_config(native_config(family, **more))
    for name, parameter in model.named_parameters():
        if "embeddings" in name:  # TimeSformer starts its time embeddings at zero
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def preprocessor_folder(folder, model):
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

    model.save_pretrained(folder)
    size = model.config.image_size
    VideoMAEImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder
    )
    return Source(str(folder))


# -- the vision encoder -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_at_its_own_size_the_encoder_is_the_published_classifier(tmp_path, family):
    model = native_model(family)
    vision = load_vision(preprocessor_folder(tmp_path, model), Config())
    pixel_values = clips(2, frames=4, size=32)
    with torch.no_grad():
        expected = model(vision.preprocessing.normalise(pixel_values)).logits
        logits = model.classifier(vision(pixel_values))
    # TimeSformer's attention is fused, so sums are in another order
    assert torch.equal(logits, expected) if family == "videomae" else torch.allclose(logits, expected, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_frames, image_size", [(8, 32), (2, 32), (6, 32), (4, 64), (4, 16), (10, 48)])
def test_any_length_and_size_equals_a_native_model(tmp_path, family, num_frames, image_size):
    small = native_model(family)
    source = preprocessor_folder(tmp_path, small)
    vision = load_vision(source, Config(num_frames=num_frames, image_size=image_size)).eval()
    native = native_model(family, num_frames=num_frames, image_size=image_size)
    if family == "videomae":
        native.base_model.embeddings.position_embeddings = vision.backbone.embeddings.position_embeddings
    native.base_model.load_state_dict(vision.backbone.state_dict())  # strict: every shape equals the native one
    pixel_values = clips(2, num_frames, image_size)
    with torch.no_grad():
        expected = native.base_model(vision.preprocessing.normalise(pixel_values)).last_hidden_state
        assert torch.allclose(vision.encode(pixel_values)[1], to_grid(expected, vision.config), atol=1e-6)


@pytest.mark.parametrize("num_frames, image_size", [("auto", "auto"), (8, 48), (2, 16)])
def test_vivit_has_a_list_for_its_tubelet_and_pixels_from_minus_one_to_one(tmp_path, num_frames, image_size):
    """It also has no patch_size, and a pair as image_size."""
    from transformers import AutoModelForVideoClassification, VivitConfig, VivitImageProcessor

    def native(frames: int, side: int):
        config = VivitConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            num_frames=frames,
            image_size=[side, side],
            tubelet_size=[2, 8, 8],
        )
        model = AutoModelForVideoClassification.from_config(config).eval()
        nn.init.normal_(model.base_model.embeddings.position_embeddings, std=0.5)
        return model

    small = native(4, 32)
    small.save_pretrained(tmp_path)
    processor = VivitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    config = Config(num_frames=num_frames, image_size=image_size)
    vision = load_vision(Source(str(tmp_path)), config).eval()
    frames, side = (4, 32) if num_frames == "auto" else (num_frames, image_size)

    # its tokens and their order are those of a native model of that size
    same = native(frames, side)
    same.base_model.load_state_dict(vision.backbone.state_dict())
    assert vision.config.image_size == side and patch_shape(vision.config) == (2, 8)
    pixel_values = clips(2, frames, side)
    with torch.no_grad():
        expected = same.base_model(vision.preprocessing.normalise(pixel_values)).last_hidden_state
        assert torch.allclose(vision.encode(pixel_values)[1], to_grid(expected, vision.config), atol=1e-6)
    assert to_grid(expected, vision.config).shape == (2, frames // 2, side // 8, side // 8, 32)
    assert torch.equal(to_grid(expected, vision.config)[:, 0, 0, 1], expected[:, 2])
    assert vision.num_tokens(2) == 1 + 4 * frames // 2

    # at its own size it is the published classifier, pixels and all
    if num_frames == "auto":
        clip = [*pixel_values[0].numpy()]
        inputs = processor(clip, return_tensors="pt", do_resize=False, input_data_format="channels_first")
        with torch.no_grad():
            assert torch.allclose(small(**inputs).logits, small.classifier(vision(pixel_values[:1])), atol=1e-5)


def test_fused_attention_equals_transformers_own(tmp_path):
    """Outputs and gradients of TimeSformer in training mode agree to 1e-5 of the largest value."""
    native = native_model("timesformer")
    fused = load_vision(preprocessor_folder(tmp_path, native), Config()).backbone.train()
    native = native.base_model.train()
    clips = torch.randn(2, native.config.num_frames, 3, native.config.image_size, native.config.image_size)
    results = []
    for model in (native, fused):
        hidden = model(clips).last_hidden_state
        hidden.square().mean().backward()
        results.append((hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (output, fused_gradients) = results
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert gradients.keys() == fused_gradients.keys()
    for name, gradient in gradients.items():
        assert (fused_gradients[name] - gradient).abs().max() <= 1e-5 * max(float(gradient.abs().max()), 1e-3), name
    assert fused.encoder.layer[0].attention.attention.forward.__func__ is fused_attention


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_interpolated_along_their_own_axis(family):
    """A table that is linear in t, h and w stays linear, with the value at the centre of each token."""
    model = native_model(family).base_model
    tubelet = getattr(model.config, "tubelet_size", 1)
    times, side = 4 // tubelet, 4
    t, h, w = torch.meshgrid(
        torch.arange(times) + 0.5, torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij"
    )
    embeddings = model.embeddings
    if family == "timesformer":
        embeddings.time_embeddings.data = t[:, 0, 0].view(1, -1, 1).expand(1, times, 32).clone()
        plane = (10 * h + 100 * w)[0].reshape(1, -1, 1).expand(1, side * side, 32)
        embeddings.position_embeddings.data = torch.cat([torch.full((1, 1, 32), 7.0), plane], dim=1)
    else:
        embeddings.position_embeddings = (t + 10 * h + 100 * w).reshape(1, -1, 1).expand(1, -1, 32).clone()
    fit_embeddings(model, 8, 64)
    new_t, new_h, new_w = (torch.arange(n) + 0.5 for n in (8 // tubelet, 8, 8))
    want_t, want_h, want_w = new_t * times / len(new_t), new_h / 2, new_w / 2
    if family == "timesformer":
        found_t = embeddings.time_embeddings[0, :, 0]
        grid = embeddings.position_embeddings[0, 1:, 0].view(8, 8)
        assert embeddings.position_embeddings[0, 0, 0] == 7
        found_h = (grid - 100 * want_w.clamp(0.5, 3.5)) / 10
        assert torch.allclose(found_t[1:-1], want_t[1:-1])
    else:
        grid = embeddings.position_embeddings[0, :, 0].view(len(new_t), 8, 8)
        assert torch.allclose((grid - grid[..., :1])[0, 0, 1:-1] + 50, 100 * want_w[1:-1])
        found_h = (grid[0] - 100 * want_w.clamp(0.5, 3.5) - grid[0, 0, 0] + 50 + 5) / 10
    assert torch.allclose(found_h[1:-1, 3], want_h[1:-1], atol=1e-4)


@pytest.mark.parametrize(
    "family, options, cause",
    [
        ("timesformer", {"image_size": 60}, "multiple of its patch size, 16"),
        ("videomae", {"image_size": 60}, "multiple of its patch size, 8"),
        ("videomae", {"num_frames": 7}, "multiple of its tubelet size, 2"),
        ("timesformer", {"token_grid": 5, "use_vlm": True}, "4 x 4 patches"),
        ("timesformer", {"num_frames": 128, "use_vlm": True, "head": "linear"}, "leave no room"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(family, options, cause):
    with pytest.raises(UserError, match=cause):
        model_of(vision_model=family, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_order_finds_a_planted_patch(family):
    """Without layers a token is the embedding of its patch, so only the planted one differs."""
    model = native_model(family).base_model
    model.encoder.layer = nn.ModuleList()
    tubelet = getattr(model.config, "tubelet_size", 1)
    plain = torch.zeros(1, 4, 3, 32, 32)
    for time, row, column in ((0, 0, 1), (1, 2, 3), (4 // tubelet - 1, 3, 0)):
        planted = plain.clone()
        planted[:, time * tubelet, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1
        with torch.no_grad():
            change = [to_grid(model(x).last_hidden_state, model.config) for x in (plain, planted)]
        moved = (change[0] - change[1]).abs().sum(-1)[0]  # (t, h, w)
        assert moved.nonzero().tolist() == [[time, row, column]]


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_video_averages_blocks_of_tokens(family):
    vision = model_of(vision_model=family).vision_encoder.eval()
    pixel_values = clips(2)
    with torch.no_grad():
        pooled, grid = vision.encode(pixel_values)
        found = vision.encode_video(pixel_values, grid=2)
    half = grid.shape[2] // 2
    first = int(vision.has_pooled_token)
    assert found.shape[1] == first + vision.num_times * 4
    if first:
        assert torch.equal(found[:, 0], pooled)
    for time, row, column in ((0, 0, 0), (1, 0, 1), (vision.num_times - 1, 1, 0)):
        block = grid[:, time, row * half : (row + 1) * half, column * half : (column + 1) * half].mean((1, 2))
        assert torch.allclose(found[:, first + time * 4 + row * 2 + column], block, atol=1e-5)


def test_mean_and_std_are_the_backbones_own():
    statistics = {family: model_of(vision_model=family).vision_encoder.preprocessing.mean for family in FAMILIES}
    assert statistics == {"timesformer": (0.45, 0.45, 0.45), "videomae": (0.485, 0.456, 0.406)}


# -- what is trained --------------------------------------------------------------------------------

TRAINED = [
    ({}, {"vision": "all"}),
    ({"freeze_visionbackbone": True}, {"vision": "none"}),
    ({"use_lora_vision": True}, {"vision": "lora"}),
    ({"use_lora_vision": True, "freeze_visionbackbone": True}, {"vision": "lora"}),
    ({"use_vlm": True, "freeze_visionbackbone": True}, {"vision": "none", "language": "all"}),
    (
        {"use_vlm": True, "freeze_visionbackbone": True, "freeze_llmbackbone": True, "use_text": True},
        {"vision": "none", "language": "none"},
    ),
    ({"use_vlm": True, "use_lora_llm": True, "use_text": True}, {"vision": "all", "language": "lora"}),
    (
        {"use_vlm": True, "captioning": True, "freeze_visionbackbone": True, "use_lora_llm": True},
        {"vision": "none", "language": "lora"},
    ),
    (
        {"use_vlm": True, "captioning": True, "freeze_llmbackbone": True, "use_lora_vision": True},
        {"vision": "lora", "language": "none"},
    ),
    ({"use_vlm": True, "captioning": True}, {"vision": "all", "language": "all"}),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options, expected", TRAINED)
def test_what_is_trained_is_what_the_flags_say_and_a_step_changes_only_that(family, options, expected):
    config = config_of(vision_model=family, **options)
    torch.manual_seed(0)
    model = build_model(config, 4)
    for name, backbone in model.backbones().items():
        kinds = {(".lora_" in n, p.requires_grad) for n, p in backbone.named_parameters()}
        assert (
            kinds
            == {"all": {(False, True)}, "none": {(False, False)}, "lora": {(False, False), (True, True)}}[
                expected[name]
            ]
        )
        assert not (expected[name] == "none" and any(m.training for m in model.train().backbones()[name].modules()))
    of_backbones = {id(p) for t in model.backbones().values() for p in t.parameters()}
    assert all(p.requires_grad for p in model.parameters() if id(p) not in of_backbones)  # head, projector
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, resolved(config, model))
    model.train()
    for step in range(2):
        loss_sum(model, batch_of(model))[0].backward()
        with first_steps_checked(model, step):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(trained_tensors(model))


@pytest.mark.parametrize(
    "options",
    [
        {"vision_model": "timesformer", "use_lora_vision": True},
        {"vision_model": "videomae", "use_lora_vision": True},
        {"use_vlm": True, "use_lora_llm": True, "freeze_visionbackbone": True},
        {"use_vlm": True, "captioning": True, "use_lora_llm": True, "freeze_visionbackbone": True},
    ],
)
def test_every_adapter_is_live_and_switching_one_off_changes_the_output(options):
    model = model_of(**options)
    found = dict(adapters(model))
    layers = model.backbones()["language" if options.get("use_vlm") else "vision"].config.num_hidden_layers
    per_layer = {"timesformer": 7, "videomae": 6, "bert": 6, "gpt2": 4}
    kind = "gpt2" if options.get("captioning") else "bert" if options.get("use_vlm") else options["vision_model"]
    assert len(found) == layers * per_layer[kind]
    batch = batch_of(model)
    for adapter in found.values():  # as after some training, when B is no longer zero
        nn.init.normal_(adapter.lora_B["default"].weight, std=0.3)
    model.eval()
    with torch.no_grad():
        logits = loss_sum(model, batch)[1]
        for name, adapter in found.items():
            adapter.enable_adapters(False)
            assert not torch.allclose(loss_sum(model, batch)[1], logits, atol=1e-5), f"{name} does nothing"
            adapter.enable_adapters(True)
    loss_sum(model, batch)[0].backward()
    for name, adapter in found.items():
        assert adapter.lora_A["default"].weight.grad.abs().max() > 0, name
        assert adapter.lora_B["default"].weight.grad.abs().max() > 0, name


def test_dead_adapters_and_a_moved_frozen_tensor_stop_the_run():
    model = model_of(use_lora_vision=True)
    loss_sum(model, batch_of(model))[0].backward()
    found = dict(adapters(model))
    first, *_, last = found
    found[first].lora_B["default"].weight.grad.zero_()
    found[last].lora_B["default"].weight.grad = None  # as if its layer bypassed it
    dead = rf"2 of {len(found)} adapters are dead, no gradient reaches lora_B: {first}, {last}$"
    with pytest.raises(UserError, match=dead), first_steps_checked(model, 0):
        pass
    for name in (first, last):
        found[name].lora_B["default"].weight.grad = torch.ones_like(found[name].lora_B["default"].weight)
    with pytest.raises(UserError, match="is frozen but was changed"), first_steps_checked(model, 0), torch.no_grad():
        model.vision_encoder.backbone.embeddings.cls_token.add_(1)


def test_gradients_reach_the_projector_through_a_frozen_language_model():
    for options in ({"head": "linear"}, {"head": "linear", "captioning": True}, {"captioning": True}):
        model = model_of(use_vlm=True, freeze_llmbackbone=True, freeze_visionbackbone=True, **options)
        loss_sum(model.train(), batch_of(model))[0].backward()
        assert all(p.grad.abs().max() > 0 for p in model.projector.parameters())


def passes_through_layers(model, batch) -> tuple[dict[str, list[int]], dict[str, torch.Tensor]]:
    """(how often each layer of each backbone runs its first module in a training step, the gradients)."""
    counts = {}
    for name, backbone in model.backbones().items():
        counts[name] = []
        for layer in (m for m in backbone.modules() if isinstance(m, GradientCheckpointingLayer)):
            leaf = next(m for m in layer.modules() if not [*m.children()] and [*m.parameters()])
            leaf.register_forward_pre_hook(
                lambda *_, index=len(counts[name]), row=counts[name]: row.__setitem__(index, row[index] + 1)
            )
            counts[name].append(0)
    loss_sum(model.train(), batch)[0].backward()
    return counts, {n: p.grad for n, p in trained_tensors(model).items()}


@pytest.mark.parametrize(
    "options, again",
    [
        pytest.param({}, {"vision": 2}, marks=pytest.mark.slow),
        ({"vision_model": "videomae", "use_lora_vision": True, "freeze_visionbackbone": True}, {"vision": 2}),
        ({"use_vlm": True, "captioning": True, "use_lora_llm": True}, {"vision": 2, "language": 2}),
        (
            {"use_vlm": True, "captioning": True, "freeze_llmbackbone": True, "freeze_visionbackbone": True},
            {"vision": 1, "language": 2},
        ),
        (
            {"use_vlm": True, "head": "linear", "freeze_llmbackbone": True, "use_lora_vision": True},
            {"vision": 2, "language": 2},
        ),
    ],
)
def test_gradient_checkpointing_computes_each_layer_again_and_gives_the_same_gradients(options, again):
    grads = []
    for checkpointing in (False, True):
        model = model_of(gradient_checkpointing=checkpointing, **options)
        counts, found = passes_through_layers(model, batch_of(model, 2))
        grads.append(found)
        for name, times in again.items():
            assert counts[name] == [times if checkpointing else 1] * 4, name
        frozen = [n for n, backbone in model.backbones().items() if not trained_tensors(backbone)]
        assert not any(m.training for n in frozen for m in model.backbones()[n].modules())
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-5) for n in grads[0])


# -- padding, targets, captions ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"use_vlm": True, "use_text": True}, {"use_vlm": True, "captioning": True}])
def test_padding_changes_no_logit_and_no_loss(options):
    model = model_of(**options).eval()
    items = items_of()
    collate = model.collator()
    with torch.no_grad():
        together, logits, targets = loss_sum(model, collate(items))
        alone = [loss_sum(model, collate([item])) for item in items]
    assert torch.allclose(together, sum(loss for loss, _, _ in alone), rtol=1e-5)
    for row, (_, own, _) in zip(logits, alone, strict=True):
        own = own[0]
        assert torch.allclose(row[: len(own)] if own.ndim == 2 else row, own, atol=1e-4)
    if options.get("captioning"):
        assert int((targets != -100).sum()) == sum(int((t != -100).sum()) for _, _, t in alone)


def test_caption_targets_are_the_caption_and_one_end():
    model = model_of(use_vlm=True, captioning=True)
    batch = batch_of(model)
    end = model.tokenizer.eos_token_id
    assert (batch["input_ids"][:, 0] == end).all()  # BOS of GPT-2
    for caption, row in zip(CAPTIONS, model.targets(batch), strict=True):
        kept = row[row != -100].tolist()
        assert kept == [*model.tokenizer(caption)["input_ids"], end]


def test_the_classifiers_sequence_is_cls_video_sep_text_sep():
    model = model_of(use_vlm=True, use_text=True, head="linear").eval()
    seen = {}
    model.language_model.register_forward_pre_hook(lambda m, a, kw: seen.update(kw), with_kwargs=True)
    batch = batch_of(model, 2)
    with torch.no_grad():
        model(batch["video"], batch["input_ids"], batch["attention_mask"])
    video, tok = model.projector.num_tokens, model.tokenizer
    table = model.language_model.get_input_embeddings().weight
    embeds = seen["inputs_embeds"][1]
    assert torch.equal(embeds[0], table[tok.cls_token_id]) and torch.equal(embeds[1 + video], table[tok.sep_token_id])
    text = [*tok(TEXTS[1], add_special_tokens=False)["input_ids"], tok.sep_token_id]
    assert torch.equal(embeds[2 + video : 2 + video + len(text)], table[torch.tensor(text)])
    types = seen["token_type_ids"][1].tolist()
    assert types == [0] * (video + 2) + [1] * (len(types) - video - 2)
    assert seen["attention_mask"][0].tolist() == [1] * (video + 3) + [0] * (len(types) - video - 3)  # its text is empty


OVERFIT = [
    {"vision_model": "timesformer"},
    {"vision_model": "videomae"},
    {"vision_model": "videomae", "use_lora_vision": True},
    {"use_vlm": True, "freeze_visionbackbone": True},
    {"use_vlm": True, "use_text": True, "freeze_visionbackbone": True, "use_lora_llm": True},
    {"use_vlm": True, "captioning": True, "freeze_visionbackbone": True, "use_lora_llm": True},
    {"vision_model": "videomae", "use_vlm": True, "captioning": True, "freeze_visionbackbone": True},
]


@pytest.mark.parametrize(
    "options", [pytest.param(o, marks=[pytest.mark.slow] * (n in (2, 3, 5))) for n, o in enumerate(OVERFIT)]
)
def test_a_batch_of_eight_is_overfitted(options):
    """On few and small frames: the videos must differ in colour, size and place only."""
    model = model_of(**options, num_frames=4, image_size=32)
    pixels = model.vision_encoder.preprocessing.pixels
    batch = model.collator()([item | {"video": pixels(item["video"][::2])} for item in items_of()])
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=2e-3, weight_decay=0)
    for _ in range(250):
        loss, _, targets = loss_sum(model.train(), batch)
        mean = loss / (targets != -100).sum()
        if mean < 0.02:
            break
        mean.backward()
        nn.utils.clip_grad_norm_(trained_tensors(model).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert mean < 0.1
    if options.get("captioning"):
        assert model.eval().generate(batch["video"], Config(max_new_tokens=40)) == CAPTIONS  # each ends on its own


def test_generate_in_a_batch_equals_one_by_one_and_beams_run():
    model = model_of(use_vlm=True, captioning=True).eval()
    pixel_values = clips(3)
    together = model.generate(pixel_values, Config(max_new_tokens=12))
    assert together == [model.generate(pixel_values[i : i + 1], Config(max_new_tokens=12))[0] for i in range(3)]
    assert len(model.generate(pixel_values, Config(max_new_tokens=12, num_beams=3))) == 3
    with pytest.raises(UserError, match="--max_new_tokens"):
        model.generate(pixel_values, Config(max_new_tokens=1000))


# -- language models of other families ----------------------------------------------------------------

ENCODERS = {
    "bert": {},
    "roberta": {"pad_token_id": 0},
    "xlm-roberta": {"pad_token_id": 0, "type_vocab_size": 1},
    "camembert": {"pad_token_id": 0},
    "electra": {"embedding_size": 8},
    "albert": {"embedding_size": 8},
    "distilbert": {"hidden_dim": 24},
    "modernbert": {"global_attn_every_n_layers": 1},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
}
DECODERS = {
    "gpt2": {},
    "llama": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 8},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"head_dim": 8, "num_key_value_heads": 1},
    "gemma": {"head_dim": 8, "num_key_value_heads": 1},
}


def language_folder(folder, model_type: str, **more):
    """A random two-layer model of a family, width 16, with the tokenizer of the tiny backbone of its kind."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    encoder = model_type in ENCODERS
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "backbones" / ("bert-tiny" if encoder else "gpt2-tiny"))
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 120}
    small |= {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    small |= {} if model_type in ("distilbert", "gpt2", "opt") else {"intermediate_size": 24}
    settings = AutoConfig.for_model(model_type, **(small | (ENCODERS | DECODERS)[model_type] | more))
    torch.manual_seed(0)
    (AutoModel if encoder else AutoModelForCausalLM).from_config(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_of(dataset, tmp_path, folder, *flags: str) -> list[str]:
    """Trains one epoch with main.py. Returns the flags that inference.py needs for the run."""
    argv = ["--use_vlm", "True", "--language_model", str(folder), "--freeze_visionbackbone", "True", *flags]
    argv += ["--output_dir", str(tmp_path), "--run_name", "r", "--num_workers", "0"]
    small = ["--num_frames", "2", "--image_size", "32", "--token_grid", "1", "--epochs", "1"]
    assert main.main([*argv, *small, "--data_dir", str(dataset)]) == 0
    return ["--checkpoint", str(tmp_path / "r"), "--video_dir", str(dataset / "test" / "class_0"), "--num_workers", "0"]


@pytest.mark.parametrize("family", ENCODERS)
def test_every_bert_like_encoder_trains_and_answers_from_its_checkpoint_alone(dataset, tmp_path, capfd, family):
    folder = language_folder(tmp_path / "language", family)
    flags = run_of(dataset, tmp_path, folder, "--use_text", "True")
    shutil.rmtree(folder)
    assert inference.main([*flags, "--text_input", "a note says: something red"]) == 0
    said = "".join(capfd.readouterr())
    assert "2 videos" in said and "LOAD REPORT" not in said


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_of_other_families_train_and_write_captions(dataset, tmp_path, capsys, family):
    folder = language_folder(tmp_path / "language", family)
    flags = run_of(dataset, tmp_path, folder, "--captioning", "True")
    shutil.rmtree(folder)
    assert inference.main([*flags, "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out.count(".pt  ") == 2


@pytest.mark.parametrize(
    "family, captioning, message",
    [
        ("llama", False, "is a llama; classification needs a BERT-like encoder; for captions add --captioning True"),
        ("distilbert", True, "captioning needs a causal language model such as gpt2, not"),
    ],
)
def test_a_model_of_the_other_kind_is_refused(tmp_path, family, captioning, message):
    folder = language_folder(tmp_path, family)
    with pytest.raises(UserError, match=message):
        model_of(use_vlm=True, captioning=captioning, language_model=str(folder))


@pytest.mark.parametrize("family", ["electra", "albert", "deberta-v2", "modernbert"])
@pytest.mark.parametrize("options", [{"use_lora_llm": True}, {"freeze_llmbackbone": True}, {}])
def test_two_steps_train_what_they_should_of_other_encoders(tmp_path, family, options):
    """No pooler is trained or adapted, no tensor is without a gradient."""
    folder = language_folder(tmp_path, family)
    options |= {"freeze_visionbackbone": True, "num_frames": 2, "image_size": 32, "token_grid": 1}
    config = config_of(use_vlm=True, use_text=True, language_model=str(folder), **options)
    model = build_model(config, 4).train()
    assert not [n for n in trained_tensors(model) if "pooler" in n]
    items = [i | {"video": i["video"][:2, :, ::2, ::2]} for i in items_of()]
    optimizer = build_optimizer(model, resolved(config, model))
    for step in range(2):
        loss_sum(model, model.collator()(items))[0].backward()
        with first_steps_checked(model, step):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_positions_reserved_for_padding_are_not_counted(tmp_path):
    """RoBERTa's positions start after the padding id: 120 - 6 of 120 are usable, and one more fails."""
    folder = language_folder(tmp_path, "xlm-roberta", pad_token_id=5)
    model = model_of(
        use_vlm=True, use_text=True, head="linear", language_model=str(folder), num_frames=8, token_grid=2
    ).eval()
    room = model.codec().max_tokens
    assert room == 120 - 6 - model.projector.num_tokens - 3
    items = [item | {"text": "a " * 200} for item in items_of(1)]
    with torch.no_grad():
        assert loss_sum(model, model.collator()(items))[0].isfinite()
        batch = model.collator()(items)
        batch |= {n: torch.cat([batch[n], batch[n][:, -1:]], dim=1) for n in ("input_ids", "attention_mask")}
        with pytest.raises((IndexError, RuntimeError)):
            loss_sum(model, batch)


def test_captions_do_not_depend_on_the_folders_generation_config(tmp_path):
    plain, odd = (shutil.copytree(ROOT / "backbones" / "gpt2-tiny", tmp_path / name) for name in "ab")
    settings = {
        "repetition_penalty": 2.0,
        "no_repeat_ngram_size": 1,
        "temperature": 0.1,
        "do_sample": True,
        "max_length": 3,
        "min_new_tokens": 11,
        "suppress_tokens": [5, 6, 7, 8],
        "forced_eos_token_id": 9,
        "num_return_sequences": 2,
        "length_penalty": -5.0,
        "bad_words_ids": [[3]],
    }
    (odd / "generation_config.json").write_text(json.dumps(settings))
    captions = []
    for folder in (plain, odd):
        model = model_of(use_vlm=True, captioning=True, language_model=str(folder)).eval()
        captions.append([model.generate(clips(3), Config(max_new_tokens=12, num_beams=beams)) for beams in (1, 3)])
    assert captions[0] == captions[1]


def test_texts_that_are_cut_are_counted(dataset, tmp_path, capsys):
    data = shutil.copytree(dataset, tmp_path / "data")
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (data / split / "metadata.jsonl").read_text().splitlines()]
        for place, row in enumerate(rows):
            row["text"] = "a note says something red " * (1 + 10 * (place % 3 == 0))  # 5 or 55 words
        (data / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--use_text", "True", "--freeze_llmbackbone", "True", "--max_text_tokens", "10"]
    infer = run_of(data, tmp_path, "bert", *flags)
    said = capsys.readouterr().out
    assert "note: 6 of 18 texts are longer than 10 tokens and are cut; train with a larger --max_text_tokens" in said
    assert (
        inference.main([*infer, "--text_input", "a note says something red and something red and something red"]) == 0
    )
    assert "note: 2 of 2 texts are longer than 10 tokens and are cut" in capsys.readouterr().out
    assert inference.main([*infer, "--text_input", "a note says something red"]) == 0
    assert "are cut" not in capsys.readouterr().out


# -- rates and decay --------------------------------------------------------------------------------


BEHIND = re.compile(  # modules after the layers, by their names in each family
    r"(^backbone\.layernorm|fc_norm|final_norm|final_layer_norm|ln_f|^model\.norm|encoder\.LayerNorm)\.|project_out|lm_head|embed_out"
)


def groups_of(model, config) -> dict[str, tuple[float, float]]:
    """name -> (peak learning rate, weight decay) of every trained tensor."""
    found = {
        id(p): (g["peak_lr"], g["weight_decay"])
        for g in build_optimizer(model, resolved(config, model)).param_groups
        for p in g["params"]
    }
    return {name: found[id(p)] for name, p in trained_tensors(model).items()}


@pytest.mark.parametrize("family", ["timesformer", "videomae", *ENCODERS, *DECODERS])
def test_layer_decay_slows_every_layer_below_another_and_embeddings_most(tmp_path, family):
    """Layer k of n: rate x 0.5^(n - k). Embeddings: rate x 0.5^(n + 1). Modules after the layers: the full rate."""
    options = {"layer_decay": 0.5, "learning_rate": 1.0, "num_frames": 2, "image_size": 32, "token_grid": 1}
    if family in FAMILIES:
        options |= {"vision_model": family}
    else:
        more = {} if family == "albert" else {"num_hidden_layers": 3}  # ALBERT's layers share their weights
        folder = language_folder(tmp_path, family, **more)
        options |= {
            "use_vlm": True,
            "freeze_visionbackbone": True,
            "captioning": family in DECODERS,
            "language_model": str(folder),
        }
    config = config_of(**options)
    model = build_model(config, 4)
    prefix = "vision_encoder." if family in FAMILIES else "language_model."
    rates = {n.removeprefix(prefix): rate for n, (rate, _) in groups_of(model, config).items() if n.startswith(prefix)}
    layers = 4 if family in FAMILIES else 1 if family == "albert" else 3
    for name, rate in rates.items():
        number = re.search(r"\.(?:layers?|h|albert_layer_groups)\.(\d+)\.", f".{name}")
        power = layers - int(number[1]) if number else 0 if BEHIND.search(name) else layers + 1
        assert rate == 0.5**power, name


@pytest.mark.parametrize(
    "options, new",
    [
        ({"vision_model": "timesformer"}, set()),
        ({"vision_model": "videomae", "use_vlm": True}, {"head.time_embedding"}),
        ({"use_vlm": True, "captioning": True}, {"projector.time_embedding"}),
        ({"use_vlm": True, "captioning": True, "head": "linear"}, {"projector.time_embedding.weight"}),
    ],
)
def test_no_decay_on_biases_norms_and_position_embeddings(options, new):
    config = config_of(**options)
    model = build_model(config, 4)
    decays = {name: decay for name, (_, decay) in groups_of(model, config).items()}
    spared = {name for name, p in trained_tensors(model).items() if p.ndim > 1 and not decays[name]}
    expected = {*new}
    if config.vision_model == "timesformer":
        expected |= {
            f"vision_encoder.backbone.embeddings.{n}" for n in ("cls_token", "position_embeddings", "time_embeddings")
        }
    if config.use_vlm:
        position = "transformer.wpe" if config.captioning else "embeddings.position_embeddings"
        expected |= {f"language_model.{position}.weight"}
    assert spared == expected
    assert all(decays[n] == 0 for n, p in trained_tensors(model).items() if p.ndim == 1)


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_no_decay_on_positions_of_any_language_model_but_on_words(tmp_path, family):
    folder = language_folder(tmp_path, family)
    options = {"num_frames": 2, "image_size": 32, "token_grid": 1, "freeze_visionbackbone": True}
    config = config_of(use_vlm=True, captioning=family in DECODERS, language_model=str(folder), **options)
    model = build_model(config, 4)
    for name, (_, decay) in groups_of(model, config).items():
        if re.search("position|wpe|rel_emb", name):
            assert decay == 0, name
        if re.match(r"language_model\..*weight$", name) and any(
            w in name
            for w in ("word_embeddings", "wte", "embed_tokens", "tok_embeddings", "embed_in", "query", "fc1", "Wqkv")
        ):
            assert decay == 0.05, name


F_TINY, F_HUB, L_TINY, L_HUB, H_TINY, H_HUB = 1e-3, 5e-5, 3e-3, 5e-4, 3e-3, 1e-3


@pytest.mark.parametrize(
    "vision, language, options, rates",
    [  # the README's table, typed by hand: vision, language, new layers
        ("tiny", "tiny", {}, (F_TINY, F_TINY, 2 * F_TINY)),
        ("hub", "hub", {"use_lora_vision": True, "use_lora_llm": True}, (L_HUB, L_HUB, 2 * L_HUB)),
        ("tiny", "hub", {"freeze_visionbackbone": True}, (None, F_HUB, 10 * F_HUB)),
        ("tiny", "hub", {"freeze_visionbackbone": True, "use_lora_llm": True}, (None, L_HUB, 2 * L_HUB)),
        ("tiny", "hub", {"freeze_visionbackbone": True, "freeze_llmbackbone": True}, (None, None, H_HUB)),
        ("tiny", "tiny", {"freeze_visionbackbone": True, "freeze_llmbackbone": True}, (None, None, H_TINY)),
        ("tiny", "hub", {"use_lora_vision": True, "freeze_llmbackbone": True}, (L_TINY, None, L_TINY)),
        ("tiny", "hub", {}, (F_TINY, F_HUB, 10 * F_HUB)),
        ("tiny", "tiny", {"use_lora_vision": True}, (L_TINY, F_TINY, 2 * F_TINY)),
        ("hub", "tiny", {"use_lora_llm": True}, (F_HUB, L_TINY, 10 * F_HUB)),
        # an attentive head learns by at most 1e-3, and the vision backbone below it by no more, in full by less
        ("tiny", "tiny", {"head": "attentive"}, (3e-4, F_TINY, 1e-3)),
        ("hub", "hub", {"head": "attentive"}, (F_HUB, F_HUB, 10 * F_HUB)),
        ("tiny", "tiny", {"use_lora_vision": True, "head": "attentive"}, (1e-3, F_TINY, 1e-3)),
        (
            "tiny",
            "tiny",
            {"freeze_visionbackbone": True, "freeze_llmbackbone": True, "head": "attentive"},
            (None, None, 1e-3),
        ),
    ],
)
def test_every_part_learns_by_its_own_row_of_the_table(tmp_path, vision, language, options, rates):
    """A folder counts as hub weights. A given rate is for the part trained most; the others keep their ratio."""
    names = {"vision_model": "timesformer", "language_model": "gpt2"}
    for option, kind in (("vision_model", vision), ("language_model", language)):
        if kind == "hub":
            names[option] = str(shutil.copytree(ROOT / "backbones" / f"{names[option]}-tiny", tmp_path / option))
    config = config_of(**{"use_vlm": True, "captioning": True, "head": "linear"} | names | options)
    model = build_model(config, 4)
    filled = resolved(config, model)
    assert filled.learning_rate == default_rates(config)[0]
    for typed in (1.0, 3.0):
        found = groups_of(model, replace(filled, learning_rate=typed * filled.learning_rate))
        for part, rate in zip(("vision_encoder", "language_model", "projector"), rates, strict=True):
            peaks = {peak for name, (peak, _) in found.items() if name.startswith(part)}
            assert [*peaks] == ([] if rate is None else [pytest.approx(typed * rate)]), part
    line = rates_line(filled)
    assert f"new layers {rates[2]:g}" in line and ("language" in line) == (rates[1] is not None)


# -- schedule, accumulation -------------------------------------------------------------------------


def test_learning_rate_warms_up_and_decays():
    from train_code import lr_at

    rates = [lr_at(step, 100, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert all(a > b for a, b in pairwise(rates[10:])) and rates[-1] < 0.001
    assert rates[55] == pytest.approx(1.0)


def test_accumulation_equals_one_large_batch(dataset):
    """Captions of different lengths: the mean is over tokens, not over batches."""
    from train_code import Engine, build_loaders, train_one_epoch
    from VLoader import read_splits

    after = []
    for batch_size, accumulate in ((8, 1), (2, 4), (3, 3)):
        config = config_of(
            use_vlm=True,
            captioning=True,
            freeze_visionbackbone=True,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            num_workers=0,
            num_frames=8,
            frame_stride=0,
        )
        torch.manual_seed(0)
        model = build_model(config, 3)
        splits = read_splits(dataset)
        splits = replace(splits, train=splits.train[:8])
        loaders = build_loaders(model, config, splits)
        optimizer = build_optimizer(model, replace(config, learning_rate=1e-3))
        train_one_epoch(model, loaders["train"], Engine(build_accelerator(config), optimizer, 1, accumulate))
        after.append({n: p.detach().clone() for n, p in trained_tensors(model).items()})
    for other in after[1:]:
        change = max(float((after[0][n] - other[n]).abs().max()) for n in other)
        assert change < 2e-4, change  # AdamW's first step is +-lr: a sign may flip where the gradient is ~0


def test_frames_at_evaluation_are_always_the_same(dataset):
    from VLoader import ClipDataset, read_folder

    preprocessing = Preprocessing(64, None, "bilinear", 1 / 255, (0.0,) * 3, (1.0,) * 3)
    samples = read_folder(dataset / "test")
    fixed, jittered = (ClipDataset(samples, preprocessing, 8, 0, [], train=t, seed=3) for t in (False, True))
    assert torch.equal(fixed[0, 1]["video"], fixed[5, 1]["video"])
    assert torch.equal(jittered[2, 1]["video"], jittered[2, 1]["video"])
    assert len({jittered[e, 1]["video"].numpy().tobytes() for e in range(6)}) > 3


def test_short_names_load_what_the_table_says(tmp_path):
    source = locate("timesformer", "hub")
    assert source.path == "facebook/timesformer-base-finetuned-k400"
    assert re.fullmatch("[0-9a-f]{40}", source.revision)  # a commit, not a branch
    assert locate(str(tmp_path), "hub") == Source(str(tmp_path))
    assert np.all([locate(n, "tiny").local for n in ("timesformer", "videomae", "bert", "gpt2")])


def test_freed_memory_is_reused_without_page_faults():
    """Page faults of the process while tensors of 16 MB are made and freed, before and after."""
    script = """
import resource, torch
from train_code import keep_freed_memory

def faults():
    torch.ones(4_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(4_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_freed_memory()
print(given_back, faults())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    if given_back < 100:
        pytest.skip("this C library keeps freed memory by itself")
    assert kept < given_back / 10
