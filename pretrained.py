"""Published and tiny backbones: where a name leads, and how its files are loaded and checked."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config import BACKBONES, ROOT
from script import UserError, shown

# a configuration beyond these would keep the machine busy long before anything fails
MOST_LAYERS, MOST_TOKENS, MOST_PARAMETERS = 1000, 10**6, 10**11


@dataclass
class Source:
    """Where a backbone comes from: a folder or hub id. Without weights only its configuration is read,
    because a checkpoint brings all its tensors."""

    path: str
    revision: str | None = None
    weights: bool = True
    fingerprint: str = field(default="", compare=False)

    @property
    def local(self) -> bool:
        return Path(self.path).is_dir()

    def arguments(self) -> dict[str, Any]:
        """For every from_pretrained: never code from a checkpoint."""
        pinned = {} if self.local or self.revision is None else {"revision": self.revision}
        return {"pretrained_model_name_or_path": self.path, "trust_remote_code": False} | pinned


def locate(name: str, weights: str) -> Source:
    """The source of a --vision_model or --language_model: a short name, a folder, or a hub id."""
    known = BACKBONES.get(name)
    if known is None:
        return Source(name)
    if weights == "hub":
        return Source(known.hub, known.revision)
    return Source(str(ROOT / known.tiny))


def from_source(loader: Any, source: Source, what: str, **more: Any) -> Any:
    """loader.from_pretrained(source, ...), its failures as a UserError with the ways out."""
    try:
        return loader.from_pretrained(**source.arguments(), **more)
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, UnpicklingError ...
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        if source.local:
            raise UserError(f"cannot load the {what} in {source.path}: {cause}") from None
        raise UserError(
            f"cannot load the {what} of {source.path} from the hub: {cause} -- "
            "ways out: --weights tiny, or name a folder that holds a copy of it"
        ) from None


def find_file(source: Source, name: str) -> Path | None:
    """A file of a source; None where it has none of that name, or the hub cannot be reached."""
    if source.local:
        path = Path(source.path) / name
        if os.path.lexists(path) and not path.is_file():
            raise UserError(f"{path} is not a file")
        return path if path.is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(
            source.path,
            name,
            revision=source.revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no such repository; loading its configuration says so
        return None
    return Path(found) if found else None


def read_config(source: Source) -> Any:
    """The configuration of a backbone. Raises UserError for one that is no backbone, or too large to build."""
    from transformers import AutoConfig

    check_files(source)
    settings = from_source(AutoConfig, source, "configuration (config.json)")
    check_sizes(source, settings)
    return settings


def check_files(source: Source) -> None:
    """Raises UserError for adapters in place of a backbone, and for weights that lie outside their folder."""
    if find_file(source, "adapter_config.json"):
        raise UserError(
            f"{source.path} holds adapters (adapter_config.json), no whole backbone: merge them into their model with "
            "peft's merge_and_unload(), write it with save_pretrained, and name that folder"
        )
    for index in Path(source.path).glob("*.index.json") if source.local else ():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            outside = [name for name in names if Path(name).name != name]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{index} is no index of weights: copy the folder anew") from None
        if outside:
            raise UserError(f"{index} names a file outside its folder: {shown(outside[0])}")


def check_sizes(source: Source, settings: Any) -> None:
    """Raises UserError where the configuration asks for a model beyond all that can be trained here."""

    def size(name: str) -> int:
        value = getattr(settings, name, 0)
        value = max(value, default=0) if isinstance(value, list | tuple) else value
        return value if isinstance(value, int) else 0

    layers, width = size("num_hidden_layers"), size("hidden_size")
    attention = max(width, size("num_attention_heads") * size("head_dim"))
    layer = 4 * width * attention + 2 * width * (size("intermediate_size") or 4 * width)
    tokens = size("num_frames") * (size("image_size") // max(1, size("patch_size"))) ** 2
    rows = size("vocab_size") + size("max_position_embeddings") + size("type_vocab_size") + tokens
    if layers > MOST_LAYERS or tokens > MOST_TOKENS or layers * layer + rows * width > MOST_PARAMETERS:
        raise UserError(
            f"{source.path}: config.json describes a model that cannot be built here: {layers:,} layers of width "
            f"{width:,}, about {layers * layer + rows * width:.1e} parameters"
        )


def fingerprint(module: nn.Module) -> str:
    """Of a backbone's tensors: names, shapes and bytes, whatever file format they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def load_backbone(auto_class: Any, source: Source, config: Any, new_layers: tuple[str, ...], **more: Any) -> nn.Module:
    """A float32 backbone with pretrained weights, or with random ones where the source has no weights.

    Raises:
        UserError: a tensor is missing that is not of `new_layers`, or does not fit.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # loading takes a moment, not minutes
    more |= {"dtype": torch.float32, "attn_implementation": None}  # not one that config.json names: it may be a program
    if not source.weights:
        try:
            return auto_class.from_config(config, **more)
        except Exception as error:  # whatever a damaged configuration makes of the model's arithmetic
            raise UserError(f"cannot build the model of {source.path}/config.json: {error}") from None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no table of the tensors that are not needed; the missing ones are told below
    try:
        model, report = from_source(
            auto_class, source, "weights", config=config, weights_only=True, output_loading_info=True, **more
        )
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(k for k in report["missing_keys"] if not k.startswith(new_layers))
    misfits = sorted(str(k[0] if isinstance(k, tuple) else k) for k in report["mismatched_keys"])
    if missing or misfits:
        names = ", ".join((missing + misfits)[:4])
        raise UserError(f"{source.path}: {len(missing)} tensors missing and {len(misfits)} of another shape: {names}")
    return model


def load_preprocessor(source: Source, model_type: str) -> dict[str, Any]:
    """The fields of preprocessor_config.json; without that file, what transformers assumes for the family.

    Raises UserError if the file is damaged.
    """
    from transformers import AutoImageProcessor
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

    if find_file(source, "preprocessor_config.json") or find_file(source, "processor_config.json"):
        return from_source(AutoImageProcessor, source, "preprocessor_config.json", backend="pil").to_dict()
    values = VideoMAEImageProcessorPil().to_dict()
    print(
        f"warning: {source.path} has no preprocessor_config.json; guessing transformers' default for "
        f"{model_type}: mean {values['image_mean']}, std {values['image_std']}"
    )
    return values
