"""The faster forms of layers against those of transformers, peft and torch."""

from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import TimesformerConfig, VJEPA2Config
from transformers.models.timesformer.modeling_timesformer import TimesformerSelfAttention
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2RopeAttention

from build_model import adapters, build_model
from config import Config
from extras.fused import add_rotation, cast_once, fuse_adapter, fused_attention, patches_as_matmul


def outputs_and_gradients(module: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """The output of a module, and the gradients of its inputs and of all trained tensors."""
    inputs = inputs.clone().requires_grad_()
    output = module(inputs)
    trained = [p for p in module.parameters() if p.requires_grad]
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), [inputs, *trained])]


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()


class Attention(nn.Module):
    """TimeSformer's attention, of whose outputs only the first is used."""

    def __init__(self):
        super().__init__()
        config = TimesformerConfig(hidden_size=48, num_attention_heads=3, attention_probs_dropout_prob=0.0)
        self.own = TimesformerSelfAttention(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.own(hidden_states)[0]


@pytest.mark.parametrize("sequences, length", [(16, 8), (49, 8), (9, 5), (1, 70)])
def test_packed_attention_is_transformers_own(sequences, length):
    """8, 7, 9 sequences in one, and one that is longer than a tile."""
    attention, inputs = Attention(), torch.randn(2 * sequences, length, 48)
    attention.own.sequences = sequences
    expected = outputs_and_gradients(attention, inputs)
    attention.own.forward = MethodType(fused_attention, attention.own)
    assert_near(outputs_and_gradients(attention, inputs), expected, 1e-5)

    # clips do not mix, not even if one has overflown
    inputs[:sequences] = torch.inf
    assert attention(inputs)[sequences:].isfinite().all()


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 8, (4, 2), (4, 2)), nn.Conv3d(2, 8, (2, 4, 3), (2, 4, 3), bias=False)])
def test_the_patches_as_matmul_is_the_convolution(layer):
    pixels = torch.randn(2, layer.in_channels, *(3 * size for size in layer.kernel_size))
    expected = outputs_and_gradients(layer, pixels)
    layer.forward = MethodType(patches_as_matmul, layer)
    assert_near(outputs_and_gradients(layer, pixels), expected, 1e-5)


@pytest.mark.parametrize("heads", [2, 3])
def test_the_rotation_of_vjepa2_is_transformers_own(heads):
    """Also if three parts do not fill a head: of 3 heads, each has a width of 16, three parts of 4 and 4 that stay."""
    config = VJEPA2Config(crop_size=48, patch_size=16, frames_per_clip=4, tubelet_size=2, attention_dropout=0.0)
    attention = VJEPA2RopeAttention(config, hidden_size=48, num_attention_heads=heads).eval()
    query = torch.randn(2, heads, 18, 48 // heads)
    expected = attention.apply_rotary_embeddings(query, attention.get_position_ids(query[:, 0]))
    before = {*attention.state_dict()}
    add_rotation(attention)
    found = attention.apply_rotary_embeddings(query, attention.get_position_ids(query[:, 0]))
    assert torch.allclose(found, expected, atol=1e-6)
    assert {*attention.state_dict()} == before


@pytest.mark.parametrize("name", ["timesformer", "videomae", "vjepa2"])
def test_casting_norms_once_changes_no_bit_of_the_output(name):
    model = build_model(Config(vision_model=name, head="linear"), 3).eval()
    norms = [m for m in model.modules() if cast_once in m._forward_hooks.values()]
    assert len(norms) >= 2 * model.vision_encoder.depth
    video = torch.randint(0, 256, (1, model.vision_encoder.num_frames, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(video)
        for norm in norms:
            norm._forward_hooks.clear()
        assert torch.equal(model(video), found)


@pytest.mark.parametrize(
    "options", [{}, {"use_vlm": True, "captioning": True, "use_lora_llm": True, "language_model": "gpt2"}]
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_an_adapter_gives_what_peft_does(options, dtype, tolerance):
    """A linear layer, and GPT-2's with transposed weights."""
    model = build_model(Config(use_lora_vision=True, **options), 3)
    _, layer = next(adapters(model.backbones()["language" if options else "vision"]))
    nn.init.normal_(layer.lora_B["default"].weight)
    inputs = torch.randn(2, 5, layer.in_features)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = outputs_and_gradients(layer, inputs)
        layer.forward = MethodType(type(layer).forward, layer)
        expected = outputs_and_gradients(layer, inputs)
    assert_near(found, expected, tolerance)

    # the switches of peft keep working
    fuse_adapter(layer)
    layer.enable_adapters(False)
    base = F.linear(inputs, layer.base_layer.weight.t() if options else layer.base_layer.weight, layer.base_layer.bias)
    assert torch.allclose(layer(inputs), base, atol=1e-5)
    layer.enable_adapters(True)
    layer.merge()
    assert torch.allclose(layer(inputs), expected[0].float(), atol=tolerance * expected[0].abs().max().item())
    layer.enable_adapters(False)
    assert torch.allclose(layer(inputs), base, atol=1e-5)
