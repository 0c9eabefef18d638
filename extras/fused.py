"""Faster forms of what transformers and peft compute: the same weights, and the same outputs up to rounding.

Shapes: B batch, N tokens, D width, C channels; t, h and w are the numbers of patches along time, height and width.
"""

from math import gcd
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

TILE = 64  # tokens that a GPU's attention kernel computes at once


def fuse_backbone(backbone: nn.Module, layer_lists: list[nn.ModuleList]) -> None:
    """Replaces the slow parts of a vision backbone, in place. `layer_lists` are its layers.

    Classes are compared by name: importing those that are not used would take a second.
    """
    for module in backbone.modules():
        name = type(module).__name__
        if name == "TimesformerSelfAttention":
            module.forward = MethodType(fused_attention, module)
        elif name == "VJEPA2RopeAttention":
            add_rotation(module)
        elif isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.kernel_size == module.stride:
            module.forward = MethodType(embedded_patches, module)

    # in these layers, all that reads a norm's output is a linear layer
    norms = (m for layers in layer_lists for m in layers.modules() if isinstance(m, nn.LayerNorm))
    for norm in norms:
        norm.register_forward_hook(cast_once)


def fused_attention(self: Any, hidden_states: torch.Tensor, output_attentions: bool = False) -> tuple[torch.Tensor]:
    """Replaces TimesformerSelfAttention.forward by torch's fused attention: (B, N, D) -> ((B, N, D),).

    Over time a sequence has only the tokens of one place, and a GPU's kernel computes TILE of them at once. So several
    short sequences become one long sequence, in which a mask keeps them apart. A compiled model would be compiled again
    for every batch size.
    """
    batch, length, width = hidden_states.shape
    count = 1 if torch.compiler.is_compiling() else gcd(batch, max(1, TILE // length))
    qkv = self.qkv(hidden_states).view(batch // count, count * length, 3, self.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B / count, heads, count x N, D of a head)
    owner = torch.arange(count, device=qkv.device).repeat_interleave(length)
    mask = owner == owner[:, None] if count > 1 else None
    dropout = self.attn_drop.p if self.training else 0.0
    context = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=self.scale)
    return (context.transpose(1, 2).reshape(batch, length, width),)


def embedded_patches(self: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Replaces the forward of a convolution whose patches do not overlap; GPUs are slow at these."""
    return type(self).forward(self, pixels) if pixels.device.type == "cpu" else product_of_patches(self, pixels)


def product_of_patches(layer: nn.Conv2d | nn.Conv3d, pixels: torch.Tensor) -> torch.Tensor:
    """The convolution as one matrix product: (B, C, H, W) -> (B, D, h, w), or (B, C, T, H, W) -> (B, D, t, h, w)."""
    for number, size in enumerate(layer.kernel_size):
        pixels = pixels.unflatten(2 + 2 * number, (-1, size))
    axes = range(2, pixels.ndim, 2)
    patches = pixels.permute(0, *axes, 1, *(axis + 1 for axis in axes)).flatten(1 + len(axes))  # (B, ..., C x size)
    return F.linear(patches, layer.weight.flatten(1), layer.bias).movedim(-1, 1)


def cast_once(norm: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """Under autocast a norm gives fp32, and every layer that reads it would make its own copy in 16 bits."""
    kind = output.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return output
    return output.to(torch.get_autocast_dtype(kind))


# -- V-JEPA 2's rotary embeddings -------------------------------------------------------------------


def add_rotation(attention: Any) -> None:
    """Gives VJEPA2RopeAttention the cosines of its angles, and the sines with the signs of the swapped pairs, both
    (N, D of a head). Its own method computes them in every call, for time, height and width one by one.

    Like in the published code, the frequencies of a part repeat as a whole, not pair by pair. What is left of D is not
    rotated.
    """
    side, width = attention.grid_size, attention.attention_head_size
    token = torch.arange(attention.grid_depth * side**2)
    sizes = attention.d_dim, attention.h_dim, attention.w_dim
    angles = []
    for size, positions in zip(sizes, (token // side**2, token // side % side, token % side), strict=True):
        frequencies = 1.0 / 10000 ** (torch.arange(size // 2) / (size / 2.0))
        angles.append((positions.unsqueeze(-1) * frequencies).repeat(1, 2))  # (N, size)
    angle = F.pad(torch.cat(angles, dim=-1), (0, width - sum(sizes)))  # (N, D)
    signs = torch.tensor([-1.0, 1.0]).repeat(width // 2)
    attention.register_buffer("cos", angle.cos(), persistent=False)
    attention.register_buffer("signed_sin", angle.sin() * signs, persistent=False)
    attention.apply_rotary_embeddings = MethodType(rotated, attention)


def rotated(self: Any, states: torch.Tensor, positions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Replaces VJEPA2RopeAttention.apply_rotary_embeddings: queries or keys (B, heads, N, D) -> the same shape."""
    swapped = states.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return states * self.cos.to(states.dtype) + swapped * self.signed_sin.to(states.dtype)


# -- LoRA -------------------------------------------------------------------------------------------


def fuse_adapter(layer: Any) -> None:
    """Replaces the forward of peft's LoRA layer, in place."""
    layer.forward = MethodType(adapted, layer)


def adapted(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    """The layer's output, to which one product adds that of the adapter. peft's own forward has a product, a scaling
    and an addition, and under autocast it casts its inputs to fp32 and back."""
    output = self.base_layer(inputs)
    if self.merged or self.disable_adapters:
        return output
    (name,) = self.active_adapters
    down = self.scaling[name] * self.lora_A[name](inputs)  # (..., r)
    total = torch.addmm(output.flatten(0, -2), down.flatten(0, -2), self.lora_B[name].weight.t())
    return total.view_as(output)
