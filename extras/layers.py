"""Features of several layers of one backbone from one pass over the videos, for sweep_heads.py --layers.

Each layer has a store of its own in the feature cache: the one that a run with that --vision_layer opens. The backbone
computes its layers once. The embeddings, the final norm and the pooling come again for each layer, as they would in an
encoder that ends there, so the features are the same bit for bit.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from build_model import VideoModel
from config import Config
from feature_cache import FeatureStore, cached_splits, compute_missing, open_store
from scan import scan
from vision import VisionEncoder, layer_lists
from VLoader import Splits


def share_layers(encoder: VisionEncoder, other: VisionEncoder) -> None:
    """Makes an encoder use the layers of another one, which has equal weights and as many layers or more."""
    for own, shared in zip(layer_lists(encoder.backbone), layer_lists(other.backbone), strict=True):
        for index in range(len(own)):
            own[index] = shared[index]


class Replay(nn.Module):
    """Stands for all layers up to one, and returns what that one has computed just before."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.output: Any = None
        self.hook = layer.register_forward_hook(self.keep)

    def keep(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        output, self.output = self.output, None
        return output


class LayersEncoder(VisionEncoder):
    """An encoder and those that end at lower layers of its backbone, with what compute_missing() needs of them."""

    def __init__(self, encoder: VisionEncoder, layers: Iterable[int]):
        nn.Module.__init__(self)
        self.preprocessing, self.encoders = encoder.preprocessing, nn.ModuleList([encoder])
        computed = [layer for part in layer_lists(encoder.backbone) for layer in part]
        tensors = {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())}
        for layer in layers:
            lower = deepcopy(encoder, dict(tensors))  # shares the tensors
            lower.read_layer(layer)
            parts = layer_lists(lower.backbone)
            for part in parts:
                del part[:]
            parts[-1].append(Replay(computed[layer - 1]))
            self.encoders.append(lower)

    def features(self, pixel_values: torch.Tensor, grid: int) -> torch.Tensor:
        """uint8 (B, T, C, H, W) -> the features of all encoders in a row, (B, sum of 1 + N, D)."""
        return torch.cat([encoder.features(pixel_values, grid) for encoder in self.encoders], dim=1)

    def close(self) -> None:
        """Takes the hooks off the layers."""
        for module in self.modules():
            if isinstance(module, Replay):
                module.hook.remove()


class LayersStore(FeatureStore):
    """The stores of several layers, with what compute_missing() needs of them."""

    def __init__(self, stores: list[FeatureStore]):
        self.stores, self.folder = stores, stores[0].folder.with_name("*")
        self.shape = sum(store.shape[0] for store in stores), stores[0].shape[1]
        self.ignored = {path: None for store in stores for path in store.ignored}

    def find(self, ids: np.ndarray) -> np.ndarray:
        """-1 for each id (n, 16) uint8 that is missing in a store. (n,) int64"""
        return np.min([store.find(ids) for store in self.stores], axis=0)

    def write(self, ids: np.ndarray, features: list[torch.Tensor]) -> None:
        """Writes features as those of LayersEncoder, ids (n, 16) uint8 and n tensors, to the stores that lack them."""
        parts = [tensor.split([store.shape[0] for store in self.stores]) for tensor in features]
        for store, own in zip(self.stores, zip(*parts, strict=True), strict=True):
            missing = np.flatnonzero(store.find(ids) < 0)
            if len(missing):
                store.write(ids[missing], [own[index] for index in missing])

    def refresh(self) -> None:
        for store in self.stores:
            store.refresh()


@torch.random.fork_rng(devices=[])
def cache_layers(model: VideoModel, splits: Splits, config: Config, accelerator: Any, layers: list[int]) -> None:
    """Computes the missing features of the layer that `model` reads, and of the lower `layers`. Unreadable videos are
    left to prepare_data(), which reports them. The random generators stay as they are.

    Raises UserError if the backbone has no such layer.
    """
    encoder = LayersEncoder(model.vision_encoder, layers)
    try:
        models = [VideoModel(each) for each in encoder.encoders]
        for each in models:
            each.sources = model.sources
        store = LayersStore([open_store(each, config, accelerator) for each in models])
        names = cached_splits(config)
        splits, bad = scan(splits, config, names)
        splits = replace(splits, **{name: [s for s in getattr(splits, name) if s.key not in bad] for name in names})
        compute_missing(store, VideoModel(encoder), splits, config, accelerator)
    finally:
        encoder.close()
