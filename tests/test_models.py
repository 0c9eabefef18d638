"""The models against native ones: embeddings, token order, padding, what is trained, what is learned."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import dummy_data
from build_model import (
    Source,
    adapters,
    build_model,
    fit_embeddings,
    fused_attention,
    load_vision,
    locate,
    token_grid,
    trained_tensors,
)
from config import ROOT, Config, complete
from script import UserError
from train_code import build_accelerator, build_optimizer, first_steps_checked, loss_sum
from transforms import Preprocessing

FAMILIES = ("timesformer", "videomae")
CAPTIONS = [
    "a small red circle moves right", "the blue box is huge and stands still", "we see that the disc , tiny and white , moves up",
    "a large green square drifts leftwards", "there is a big disc in cyan that moves down", "a little box moves left ; it is orange",
    "in this clip the huge purple disc does not move", "a circle of yellow colour , small , glides towards the top",
]  # fmt: skip
TEXTS = [
    "",
    "a note says: it is round",
    "something",
    "a note says: it goes sideways",
    "a",
    "b c d e f g",
    "x",
    "a note says: nothing happens",
]


def config_of(**options) -> Config:
    return complete(Config(**({"dropout": 0.0} | options)))


def model_of(**options):
    torch.manual_seed(0)
    return build_model(config_of(**options), num_classes=4)


def clips(count: int = 8, frames: int = 8, size: int = 64) -> torch.Tensor:
    """Noise, uint8 (B, T, C, H, W)."""
    return torch.randint(
        0, 256, (count, frames, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def batch_of(model, count: int = 8) -> dict[str, torch.Tensor]:
    """Dummy videos of as many classes, with four labels, and captions and texts of different lengths."""
    return model.collator()(items_of(count))


def items_of(count: int = 8) -> list[dict]:
    videos = [dummy_data.draw_class(k, 1, 8, 64, np.random.default_rng(k))[0][0] for k in range(count)]
    return [
        {"pixel_values": torch.from_numpy(v), "index": i, "label": i % 4, "caption": CAPTIONS[i], "text": TEXTS[i]}
        for i, v in enumerate(videos)
    ]


def native_config(family: str, **more):
    from transformers import TimesformerConfig, VideoMAEConfig

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32, "patch_size": 8, "num_frames": 4}  # fmt: skip
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
    # TimeSformer's attention is fused, in another order of sums
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
    native.base_model.load_state_dict(vision.backbone.state_dict())  # strict: every shape is the native one's
    pixel_values = clips(2, num_frames, image_size)
    with torch.no_grad():
        expected = native.base_model(vision.preprocessing.normalise(pixel_values)).last_hidden_state
        assert torch.allclose(vision.tokens(pixel_values), expected, atol=1e-6)


def test_fused_attention_equals_transformers_own(tmp_path):
    """Outputs and gradients of TimeSformer in training mode, to 1e-5 of the largest."""
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
    attention = fused.encoder.layer[0].attention.attention
    assert attention.forward.__func__ is fused_attention


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_interpolated_along_their_own_axis(family):
    """A table that is linear in t, h and w stays linear: the value at a token's centre."""
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


@pytest.mark.parametrize("family, options, cause", [
    ("timesformer", {"image_size": 60}, "multiple of its patch size, 16"),
    ("videomae", {"image_size": 60}, "multiple of its patch size, 8"),
    ("videomae", {"num_frames": 7}, "multiple of its tubelet size, 2"),
    ("timesformer", {"token_grid": 5, "use_vlm": True}, "4 x 4 patches"),
    ("timesformer", {"num_frames": 128, "use_vlm": True}, "leave no room"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(family, options, cause):
    with pytest.raises(UserError, match=cause):
        model_of(vision_model=family, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_order_finds_a_planted_patch(family):
    """Without layers a token is its patch's embedding: only the planted one differs from the rest."""
    model = native_model(family).base_model
    model.encoder.layer = nn.ModuleList()
    tubelet = getattr(model.config, "tubelet_size", 1)
    plain = torch.zeros(1, 4, 3, 32, 32)
    for time, row, column in ((0, 0, 1), (1, 2, 3), (4 // tubelet - 1, 3, 0)):
        planted = plain.clone()
        planted[:, time * tubelet, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1
        with torch.no_grad():
            change = [token_grid(model(x).last_hidden_state, model.config) for x in (plain, planted)]
        moved = (change[0] - change[1]).abs().sum(-1)[0]  # (t, h, w)
        assert moved.nonzero().tolist() == [[time, row, column]]


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_video_averages_blocks_of_tokens(family):
    vision = model_of(vision_model=family).vision_encoder.eval()
    pixel_values = clips(2)
    with torch.no_grad():
        tokens = vision.tokens(pixel_values)
        found = vision.encode_video(pixel_values, grid=2)
    grid = token_grid(tokens, vision.config)
    half = grid.shape[2] // 2
    first = int(vision.has_cls)
    assert found.shape[1] == first + vision.num_times * 4
    if first:
        assert torch.equal(found[:, 0], tokens[:, 0])
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
    ({"use_vlm": True, "freeze_visionbackbone": True, "freeze_llmbackbone": True, "use_text": True}, {"vision": "none", "language": "none"}),
    ({"use_vlm": True, "use_lora_llm": True, "use_text": True}, {"vision": "all", "language": "lora"}),
    ({"use_vlm": True, "captioning": True, "freeze_visionbackbone": True, "use_lora_llm": True}, {"vision": "none", "language": "lora"}),
    ({"use_vlm": True, "captioning": True, "freeze_llmbackbone": True, "use_lora_vision": True}, {"vision": "lora", "language": "none"}),
    ({"use_vlm": True, "captioning": True}, {"vision": "all", "language": "all"}),
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options, expected", TRAINED)
def test_what_is_trained_is_what_the_flags_say_and_a_step_changes_only_that(family, options, expected):
    config = config_of(vision_model=family, **options)
    torch.manual_seed(0)
    model = build_model(config, 4)
    for name, tower in model.towers().items():
        kinds = {(".lora_" in n, p.requires_grad) for n, p in tower.named_parameters()}
        assert (
            kinds
            == {"all": {(False, True)}, "none": {(False, False)}, "lora": {(False, False), (True, True)}}[
                expected[name]
            ]
        )
        assert not (expected[name] == "none" and any(m.training for m in model.train().towers()[name].modules()))
    tower_parameters = {id(p) for t in model.towers().values() for p in t.parameters()}
    assert all(p.requires_grad for p in model.parameters() if id(p) not in tower_parameters)  # head, projector
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, config)
    model.train()
    for step in range(2):
        loss_sum(model, batch_of(model))[0].backward()
        with first_steps_checked(model, step):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(trained_tensors(model))


@pytest.mark.parametrize("options", [
    {"vision_model": "timesformer", "use_lora_vision": True}, {"vision_model": "videomae", "use_lora_vision": True},
    {"use_vlm": True, "use_lora_llm": True, "freeze_visionbackbone": True},
    {"use_vlm": True, "captioning": True, "use_lora_llm": True, "freeze_visionbackbone": True},
])  # fmt: skip
def test_every_adapter_is_live_and_switching_one_off_changes_the_output(options):
    model = model_of(**options)
    found = dict(adapters(model))
    layers = model.towers()["language" if options.get("use_vlm") else "vision"].config.num_hidden_layers
    per_layer = {"timesformer": 7, "videomae": 6, "bert": 6, "gpt2": 4}
    kind = "gpt2" if options.get("captioning") else "bert" if options.get("use_vlm") else options["vision_model"]
    assert len(found) == layers * per_layer[kind]
    batch = batch_of(model)
    for adapter in found.values():  # as after some training: B is no longer zero
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


def test_a_dead_adapter_and_a_moved_frozen_tensor_stop_the_run():
    model = model_of(use_lora_vision=True)
    loss_sum(model, batch_of(model))[0].backward()
    name, adapter = next(iter(adapters(model)))
    adapter.lora_B["default"].weight.grad.zero_()
    with pytest.raises(UserError, match=f"{name} is dead"), first_steps_checked(model, 0):
        pass
    adapter.lora_B["default"].weight.grad.fill_(1)
    with pytest.raises(UserError, match="is frozen but was changed"), first_steps_checked(model, 0), torch.no_grad():
        model.vision_encoder.backbone.embeddings.cls_token.add_(1)


def test_gradients_reach_the_projector_through_a_frozen_language_model():
    for options in ({}, {"captioning": True}):
        model = model_of(use_vlm=True, freeze_llmbackbone=True, freeze_visionbackbone=True, **options)
        loss_sum(model.train(), batch_of(model))[0].backward()
        assert all(p.grad.abs().max() > 0 for p in model.projector.mlp.parameters())


@pytest.mark.parametrize("options", [{}, {"use_vlm": True, "captioning": True, "use_lora_llm": True}])
def test_gradient_checkpointing_gives_the_same_gradients(options):
    grads = []
    for checkpointing in (False, True):
        model = model_of(gradient_checkpointing=checkpointing, **options)
        for adapter in dict(adapters(model)).values():
            adapter.lora_dropout["default"].p = 0.0
        loss_sum(model.train(), batch_of(model, 2))[0].backward()
        grads.append({n: p.grad for n, p in trained_tensors(model).items()})
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
    model = model_of(use_vlm=True, use_text=True).eval()
    seen = {}
    model.language_model.register_forward_pre_hook(lambda m, a, kw: seen.update(kw), with_kwargs=True)
    batch = batch_of(model, 2)
    with torch.no_grad():
        model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
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
    {"vision_model": "timesformer"}, {"vision_model": "videomae"}, {"vision_model": "videomae", "use_lora_vision": True},
    {"use_vlm": True, "freeze_visionbackbone": True}, {"use_vlm": True, "use_text": True, "freeze_visionbackbone": True, "use_lora_llm": True},
    {"use_vlm": True, "captioning": True, "freeze_visionbackbone": True, "use_lora_llm": True},
    {"vision_model": "videomae", "use_vlm": True, "captioning": True, "freeze_visionbackbone": True},
]  # fmt: skip


@pytest.mark.parametrize("options", OVERFIT)
def test_a_batch_of_eight_is_overfitted(options):
    model = model_of(**options)
    batch = batch_of(model)
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
        assert model.eval().generate(batch["pixel_values"], max_new_tokens=40) == CAPTIONS  # each ends by itself


def test_generate_in_a_batch_equals_one_by_one_and_beams_run():
    model = model_of(use_vlm=True, captioning=True).eval()
    pixel_values = clips(3)
    together = model.generate(pixel_values, max_new_tokens=12)
    assert together == [model.generate(pixel_values[i : i + 1], max_new_tokens=12)[0] for i in range(3)]
    assert len(model.generate(pixel_values, max_new_tokens=12, num_beams=3)) == 3
    with pytest.raises(UserError, match="--max_new_tokens"):
        model.generate(pixel_values, max_new_tokens=1000)


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
    assert torch.equal(fixed[0, 1]["pixel_values"], fixed[5, 1]["pixel_values"])
    assert torch.equal(jittered[2, 1]["pixel_values"], jittered[2, 1]["pixel_values"])
    assert len({jittered[e, 1]["pixel_values"].numpy().tobytes() for e in range(6)}) > 3


def test_locate_names_lead_where_the_table_says(tmp_path):
    assert locate("timesformer", "hub") == Source("facebook/timesformer-base-finetuned-k400", "main")
    assert locate(str(tmp_path), "hub") == Source(str(tmp_path))
    assert np.all([locate(n, "tiny").local for n in ("timesformer", "videomae", "bert", "gpt2")])


def test_freed_memory_is_used_again_without_page_faults():
    """Tensors of 16 MB made and freed, by page faults of the process, before and after."""
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
