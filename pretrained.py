"""Pretrained backbones: where a name leads, and how files are loaded and checked."""

import hashlib
import inspect
import json
import os
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from config import BACKBONES, ROOT, TINY_LICENCE, Backbone, Config, is_tiny
from metrics import Lexicon
from script import UserError, counted, shown

# a damaged or hostile configuration beyond these would keep the machine busy for minutes before anything fails
MAX_LAYERS, MAX_TOKENS, MAX_PARAMETERS = 1000, 10**6, 10**11
LARGEST_FIELDS = 20_000  # bytes at the start of a model card that may hold its fields

LAYER_FIELDS = tuple(
    f"{kind}_layers" for kind in ["num_hidden", "num_spatial", "num_temporal", "num_pooler", "pred_num_hidden"]
)

PREPROCESSOR_FILES = ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json")
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@dataclass
class Source:
    """Where a backbone is loaded from: a folder or a hub id."""

    path: str
    revision: str | None = None  # a commit on the hub
    weights: bool = True  # False: read the configuration only, because a checkpoint holds all the tensors
    fingerprint: str = field(default="", compare=False)  # filled in when the weights are loaded

    @property
    def local(self) -> bool:
        return Path(self.path).is_dir()

    @property
    def remedy(self) -> str:
        """What to do if one of its files is missing or damaged."""
        return "copy the folder again" if self.local else "remove it from HF_HOME to download it again"

    def arguments(self) -> dict[str, Any]:
        """The arguments of every from_pretrained. Code that comes with a model is never run."""
        pinned = {} if self.local or self.revision is None else {"revision": self.revision}
        return {"pretrained_model_name_or_path": self.path, "trust_remote_code": False} | pinned


def tiny_folder(name: str) -> Path:
    """The folder of the tiny backbone with this short name."""
    return ROOT / "backbones" / f"{name}-tiny"


def locate(name: str, weights: str) -> Source:
    """The source of a --vision_model or --language_model: a short name, a folder, or a hub id."""
    backbone = BACKBONES.get(name)
    if backbone is None:
        return Source(name)
    if weights == "hub":
        return Source(backbone.hub, backbone.revision)
    return Source(str(tiny_folder(name)))


def warn_of_tiny(config: Config, lexicon: Lexicon | None) -> None:
    """Prints a warning if a run uses a tiny backbone on videos without a lexicon, so on other than synthetic ones."""
    if is_tiny(config, "vision") and lexicon is None:
        print(
            "warning: the tiny backbones were trained on synthetic shapes only and do not understand real videos; for "
            "these, train with --weights hub"
        )


def known_backbone(source: Source) -> Backbone | None:
    """The entry of BACKBONES that has this hub id; None for folders and other ids."""
    return next((backbone for backbone in BACKBONES.values() if backbone.hub == source.path), None)


def licence_of(source: Source) -> str:
    """The licence of a backbone's weights: from BACKBONES or, for a folder, from the first lines of its README.md."""
    if Path(source.path).resolve().parent == ROOT / "backbones":
        return TINY_LICENCE
    if backbone := known_backbone(source):
        return backbone.licence
    card = find_file(source, "README.md") if source.local else None
    return (card and stated_licence(card)) or "unknown: read its card"


def stated_licence(card: Path) -> str | None:
    """The licence in the fields at the start of a model card. None if they name none, or several."""
    try:
        with card.open("rb") as file:
            text = file.read(LARGEST_FIELDS).decode("utf-8", errors="replace")
    except OSError:
        return None
    fields = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    names = dict(re.findall(r"^(license|license_name):[ ]*[\"']?([\w.+-]+)", fields[1] if fields else "", re.MULTILINE))
    licence = names.get("license")
    return names.get("license_name", licence) if licence == "other" else licence


def from_source(loader: Any, source: Source, what: str, **more: Any) -> Any:
    """loader.from_pretrained(source, ...), with every exception turned into a UserError that says what to do. `what`
    names the part of the backbone that is loaded."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError
    from safetensors import SafetensorError

    try:
        return loader.from_pretrained(**source.arguments(), **more)
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, UnpicklingError, ...
        # transformers' words for what it does not expect, such as a download that breaks off, hide what went wrong
        known = error.__cause__ is None or not str(error).startswith("Can't load")
        cause = " ".join(str(error if known else error.__cause__).split())[:300] or type(error).__name__
        if isinstance(error, UnpicklingError):  # torch's words say how to run what is in the file
            cause = "pytorch_model.bin is damaged or holds more than tensors; use a copy with model.safetensors"
        if isinstance(error, SafetensorError):
            raise UserError(f"{source.path}: its weights are damaged: {cause}; {source.remedy}") from None
        if source.local:
            raise UserError(f"cannot load the {what} in {source.path}: {cause}") from None
        advice = "give the path of a folder with a copy of it"
        if isinstance(error.__cause__, GatedRepoError):
            page = f"https://huggingface.co/{source.path}"
            raise UserError(
                f"{source.path} is gated: accept its conditions on {page} and set HF_TOKEN, or {advice}"
            ) from None
        if (backbone := known_backbone(source)) and backbone.tiny:
            advice = f"use --weights tiny, or {advice}"
        place = "the downloads in HF_HOME, without the hub" if constants.HF_HUB_OFFLINE else "the hub"
        raise UserError(f"cannot load the {what} of {source.path} from {place}: {cause} -- {advice}") from None


@cache
def check_hub() -> None:
    """Asks the hub once whether it can be reached, and uses only cached files if not. huggingface_hub itself would
    retry every missing file for half a minute, with a warning each time."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # no network, no such host, a proxy that refuses, offline mode, ...
        constants.HF_HUB_OFFLINE = True


def find_file(source: Source, name: str) -> Path | None:
    """The path of a source's file. None if there is no such file, or the hub cannot be reached."""
    if source.local:
        path = Path(source.path) / name
        if os.path.lexists(path) and not path.is_file():
            raise UserError(f"{path} is not a file")
        return path if path.is_file() else None
    from transformers.utils import cached_file

    quiet = {f"_raise_exceptions_for_{case}": False for case in ("gated_repo", "missing_entries", "connection_errors")}
    try:
        path = cached_file(source.path, name, revision=source.revision, **quiet)
    except OSError:  # no such repository: loading the configuration reports it
        return None
    return Path(path) if path else None


def read_config(source: Source) -> Any:
    """The configuration of a backbone. Raises UserError if the source is not a backbone, or too large to build."""
    from transformers import AutoConfig

    if not source.local:
        check_hub()
    check_files(source)
    hf_config = from_source(AutoConfig, source, "configuration (config.json)")
    for part in filter(None, (hf_config, getattr(hf_config, "vision_config", None))):
        check_sizes(source, part)
    return hf_config


def check_files(source: Source) -> None:
    """Raises UserError if the source holds adapters instead of a backbone, or lists weight files outside its folder."""
    if find_file(source, "adapter_config.json"):
        raise UserError(
            f"{source.path} holds adapters (adapter_config.json), not a whole backbone: merge them into their model "
            "with peft's merge_and_unload(), save it with save_pretrained, and use that folder"
        )

    # a downloaded index could otherwise point at any file of this machine
    for index in Path(source.path).glob("*.index.json") if source.local else ():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            outside = [name for name in names if Path(name).name != name]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{index} is not an index of weight files: copy the folder again") from None
        if outside:
            raise UserError(f"{index} lists a file outside its folder: {shown(outside[0])}; copy the folder again")


def check_sizes(source: Source, hf_config: Any) -> None:
    """Raises UserError if the configuration describes a model that is too large to build. Sizes are read leniently:
    the families name and type them differently."""

    def size(name: str) -> int:
        value = getattr(hf_config, name, 0)
        value = max(value, default=0) if isinstance(value, list | tuple) else value
        return value if isinstance(value, int) else 0

    # a rough count of the parameters: attention, MLP, embeddings
    layers, width = sum(map(size, LAYER_FIELDS)), max(size("hidden_size"), size("pred_hidden_size"))
    attention = max(width, size("num_attention_heads") * size("head_dim"))
    layer = 4 * width * attention + 2 * width * (size("intermediate_size") or 4 * width)
    patch = max(1, size("patch_size") or size("tubelet_size"))  # ViViT's tubelet_size has the sides of a patch too
    frames = max(size("num_frames"), size("frames_per_clip"), 1)
    tokens = frames * (max(size("image_size"), size("crop_size")) // patch) ** 2 + size("num_register_tokens")
    rows = size("vocab_size") + size("max_position_embeddings") + size("type_vocab_size") + tokens
    parameters = layers * layer + rows * width
    if layers > MAX_LAYERS or tokens > MAX_TOKENS or parameters > MAX_PARAMETERS:
        size_text = f"{layers:,} layers of width {width:,}, about {parameters:.1e} parameters"
        raise UserError(f"{source.path}: config.json describes a model that is too large to build: {size_text}")


def fingerprint(module: nn.Module) -> str:
    """32 hex digits that identify a module's tensors by name, shape and bytes, whatever file format they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def load_backbone(auto_class: Any, source: Source, config: Any, new_layers: tuple[str, ...], **more: Any) -> nn.Module:
    """Loads a float32 backbone with its pretrained weights, or builds a random one if the source is without weights.

    Raises UserError if a tensor has another shape, or is missing and not part of `new_layers` (prefixes of names).
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    # no bar for loading, which takes a moment; transformers would also hide that of a download, which takes minutes
    logging.disable_progress_bar()
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()

    # override what config.json may ask for: another dtype, or an attention implementation that is code on the hub
    more |= {"dtype": torch.float32, "attn_implementation": None}
    if not source.weights:
        try:
            return auto_class.from_config(config, **more)
        except Exception as error:  # with a damaged configuration transformers can raise anything
            raise UserError(f"cannot build the model that {source.path}/config.json describes: {error}") from None

    # a .bin file is a pickle: weights_only, so that it cannot run code. transformers would also have a web service
    # convert it, and download the result a second time
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "true"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no table of unused tensors; missing ones are checked below
    try:
        more |= {"config": config, "weights_only": True, "output_loading_info": True}
        model, report = from_source(auto_class, source, "weights", **more)
    finally:
        logging.set_verbosity(verbosity)

    # transformers would only warn, and train on random numbers in place of the missing tensors
    missing = sorted(k for k in report["missing_keys"] if not k.startswith(new_layers))
    misfits = sorted(str(k[0] if isinstance(k, tuple) else k) for k in report["mismatched_keys"])
    if missing or misfits:
        names = ", ".join((missing + misfits)[:4])
        count = f"{counted(len(missing), 'tensor')} missing, {len(misfits)} of another shape than config.json says"
        raise UserError(f"{source.path}: {count}: {names}; {source.remedy}")
    return model


def load_preprocessor(source: Source, model_type: str, usual: dict[str, Any]) -> dict[str, Any]:
    """The fields of preprocessor_config.json, or of the newer files for videos and for several inputs. Without a file,
    the `usual` fields of this family, with a warning.

    Raises UserError if the file is damaged: a wrong mean would cost accuracy silently.
    """
    # transformers' own processors need torchvision for most families
    for name in PREPROCESSOR_FILES:
        path = find_file(source, name)
        try:
            values = json.loads(path.read_text(encoding="utf-8")) if path else {}
            if path and name == "processor_config.json":  # each kind of input has fields of its own
                values = values.get("video_processor") or values.get("image_processor") or {}
            if not isinstance(values, dict):
                raise ValueError("expected an object with fields")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{source.path}: {name}: {error}; {source.remedy}") from None
        if values or (path and name != "processor_config.json"):
            return values
    values = IMAGENET | usual
    mean, std = (values[f"image_{name}"] if values.get("do_normalize", True) else "none" for name in ("mean", "std"))
    print(
        f"warning: {source.path} has no preprocessor_config.json; using the usual values of {model_type}: "
        f"mean {mean}, std {std}"
    )
    return values


# -- language models --------------------------------------------------------------------------------


def load_language(source: Source, captioning: bool) -> tuple[nn.Module, Any]:
    """Loads a language model and its tokenizer: a causal model for captioning, else a BERT-like encoder.

    Raises UserError if the source is a model of another kind.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    hf_config = read_config(source)
    if captioning:
        if not is_decoder(hf_config):
            raise UserError(f"captioning needs a causal language model such as gpt2, not {source.path}")
        # a file may lack lm_head if that shares its weights with the embeddings, as in most causal models
        model = load_backbone(AutoModelForCausalLM, source, hf_config, new_layers=())
        model.generation_config = GenerationConfig()  # captions depend on our options, not on a file of the backbone
    else:
        if not is_encoder(hf_config):
            kind = f"{source.path} is a {hf_config.model_type}"
            raise UserError(f"{kind}; classification needs a BERT-like encoder; for captions add --captioning True")
        # the head reads [CLS] itself, so BERT's pooler is left out where possible: published checkpoints often lack it
        optional = "add_pooling_layer" in inspect.signature(model_class(hf_config).__init__).parameters
        without_pooler = {"add_pooling_layer": False} if optional else {}
        model = load_backbone(AutoModel, source, hf_config, new_layers=("pooler.",), **without_pooler)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("pooler" not in name)  # no gradient would reach it

    # a checkpoint records which weights it was trained on
    source.fingerprint = fingerprint(model) if source.weights else source.fingerprint
    tokenizer = from_source(AutoTokenizer, source, "tokenizer")
    check_tokenizer(source, tokenizer, model.get_input_embeddings().num_embeddings)
    return model, tokenizer


def check_tokenizer(source: Source, tokenizer: Any, num_embeddings: int) -> None:
    """Raises UserError if a tokenizer cannot be that of a model with so many embeddings."""
    # without its files, transformers makes a tokenizer that knows special tokens only
    if len(tokenizer) <= len({*tokenizer.all_special_ids}):
        raise UserError(f"{source.path} has no tokenizer (tokenizer.json): {source.remedy}")

    # added tokens may lie beyond the embeddings if no text contains them, such as Gemma 3's token for images
    ends = (i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None)
    largest = max([tokenizer.vocab_size - 1, *ends])
    if largest >= num_embeddings:
        raise UserError(
            f"{source.path}: the tokenizer has ids up to {largest}, but the model has {num_embeddings} embeddings: the "
            "tokenizer is another model's"
        )


def model_class(hf_config: Any) -> type[nn.Module] | None:
    """The class that AutoModel would choose for this configuration."""
    from transformers import MODEL_MAPPING

    classes = MODEL_MAPPING.get(type(hf_config), None)
    return classes[0] if isinstance(classes, tuple) else classes


def is_encoder(hf_config: Any) -> bool:
    """Whether this configuration describes a masked language model that accepts embeddings instead of ids."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    masked = hf_config.model_type in MASKED and not hf_config.is_encoder_decoder
    return masked and takes(model_class(hf_config), "inputs_embeds")


def is_decoder(hf_config: Any) -> bool:
    """Whether this configuration describes a causal language model. transformers has causal versions of BERT-like
    encoders too, but none was pretrained as such."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    kind = hf_config.model_type
    return kind in CAUSAL and kind not in MASKED and not hf_config.is_encoder_decoder


def takes(model: Any, argument: str) -> bool:
    """Whether a model's forward has an argument of this name."""
    return model is not None and argument in inspect.signature(model.forward).parameters
