"""Every option of every script: its type, default, help text and properties. A flag overrides config_file.yaml, which
overrides the default. Imports no torch, so that --help is fast.

    config, typed_flags = parse(argv, "main")      reads the options of main.py; typed_flags are the names of the flags
    python config.py                               rewrites config_file.yaml; run it after changing an option
"""

import argparse
import ast
import difflib
import importlib.util
import inspect
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from extras import shards
from script import Parser, UserError, cause_of, replace_file, shown

ROOT = Path(__file__).resolve().parent  # contains backbones/ and config_file.yaml
CONFIG_FILE = ROOT / "config_file.yaml"
LARGEST_YAML = 100_000  # bytes
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}


class Backbone(NamedTuple):
    """What a short name stands for: this hub model with --weights hub, the folder backbones/<name>-tiny with --weights
    tiny."""

    kind: str  # vision | encoder (BERT-like) | decoder (causal)
    hub: str
    revision: str  # a pinned commit: later uploads to the hub change nothing
    licence: str  # of the published weights, as their card names it
    tiny: bool = False  # whether there is such a folder
    tiny_head: str = "linear"  # what --head auto means for a video classifier on the tiny weights


TINY_LICENCE = "Apache-2.0"  # of the folders in backbones/
BACKBONES = {
    "timesformer": Backbone(
        "vision",
        "facebook/timesformer-base-finetuned-k400",
        "8aaf40ea7d3d282dcb0a5dea01a198320d15d6c0",
        "CC-BY-NC-4.0",
        tiny=True,
    ),
    "videomae": Backbone(
        "vision",
        "MCG-NJU/videomae-base-finetuned-kinetics",
        "488eb9a0565f257b32866000305c8178965eb9f6",
        "CC-BY-NC-4.0",
        tiny=True,
        tiny_head="attentive",
    ),
    "vjepa2": Backbone(
        "vision",
        "facebook/vjepa2-vitl-fpc16-256-ssv2",
        "4aa02df83918538fc21cfaf576382fa20e489a80",
        "MIT",
        tiny=True,
        tiny_head="attentive",
    ),
    "vivit": Backbone("vision", "google/vivit-b-16x2-kinetics400", "8a7171a57f79b9aaa58bc8d977c002a0ea0f0d42", "MIT"),
    # its main branch has no weights for transformers; this is the commit of the pull request that adds them
    "videoprism": Backbone(
        "vision", "google/videoprism-base-f16r288", "2be2ef51d0d611d0fadf21a6d1470a4ad4af9249", "Apache-2.0"
    ),
    # gated: its conditions must be accepted on the hub, and HF_TOKEN set
    "dinov3": Backbone(
        "vision",
        "facebook/dinov3-vitb16-pretrain-lvd1689m",
        "5931719e67bbdb9737e363e781fb0c67687896bc",
        "DINOv3 License",
    ),
    "dinov2": Backbone("vision", "facebook/dinov2-base", "f9e44c814b77203eaa57a6bdbbd535f21ede1415", "Apache-2.0"),
    "siglip": Backbone(
        "vision", "google/siglip2-base-patch16-224", "75de2d55ec2d0b4efc50b3e9ad70dba96a7b2fa2", "Apache-2.0"
    ),
    # the card names no licence; OpenAI's repository, which links to these weights, is MIT
    "clip": Backbone("vision", "openai/clip-vit-base-patch16", "57c216476eefef5ab752ec549e440a49ae4ae5f3", "MIT"),
    "bert": Backbone(
        "encoder", "google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594", "Apache-2.0", tiny=True
    ),
    "gpt2": Backbone("decoder", "openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e", "MIT", tiny=True),
    # base models: the others expect a chat, and captions have none
    "smollm2": Backbone(
        "decoder", "HuggingFaceTB/SmolLM2-135M", "93efa2f097d58c2a74874c7e644dbc9b0cee75a2", "Apache-2.0"
    ),
    "qwen3": Backbone("decoder", "Qwen/Qwen3-0.6B-Base", "da87bfb608c14b7cf20ba1ce41287e8de496c0cd", "Apache-2.0"),
}

# (weights, training mode) -> (peak learning rate, factor for new layers). With two backbones the one listed first here
# decides: full before lora before frozen, and in the same mode hub before tiny, because published weights have more to
# lose
LEARNING_RATES = {
    ("hub", "full"): (5e-5, 10.0),
    ("tiny", "full"): (1e-3, 2.0),
    ("hub", "lora"): (5e-4, 2.0),
    ("tiny", "lora"): (3e-3, 1.0),
    ("hub", "frozen"): (1e-3, 1.0),
    ("tiny", "frozen"): (3e-3, 1.0),
}
# highest peak learning rates with an attentive head: of the head, and of the vision backbone by training mode. While
# features change fast, the head does not learn what to attend to
ATTENTIVE_RATE = 1e-3
ATTENTIVE_VISION_RATES = {"full": 3e-4, "lora": 1e-3, "frozen": math.inf}
# --epochs auto: optimizer steps, and bounds on the epochs. With cached features an epoch costs seconds
STEPS = {"cached": 3600, "other": 1800}
EPOCHS = (5, 30)


def is_non_commercial(licence: str) -> bool:
    """Whether the name of a licence, such as CC-BY-NC-4.0, says that it forbids commercial use."""
    words = re.split("[^a-z]+", licence.lower())
    return "nc" in words or "noncommercial" in "".join(words)


# -- converters: str -> value; a ValueError says what is allowed ------------------------------------

WORDS = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
MAX_NAME = 200  # bytes; file systems allow 255, and names of temporary files are longer


def to_bool(text: str) -> bool:
    """True or False in any case. (argparse's type=bool would read "False" as True.)"""
    return one_of("True", "False")(text) == "True"


def one_of(*choices: str) -> Callable[[str], str]:
    """A converter to one of `choices`. It ignores case; yes, on, 1 mean true, and no, off, 0 mean false."""

    def normalised(text: str) -> str:
        return WORDS.get(text.lower(), text.lower())

    by_word = {normalised(choice): choice for choice in choices}

    def convert(text: str) -> str:
        if normalised(text) not in by_word:
            raise ValueError(" or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}")
        return by_word[normalised(text)]

    return convert


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], Any]:
    """A converter to `kind`, int or float, for finite values with low <= value <= high; with `above`, low < value."""
    bounds = f"above {low}" if above else f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    expected = f"a whole number {bounds}" if kind is int else f"a number {bounds}"

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(expected) from None
        if not low <= value <= high or value == math.inf or (above and value == low):
            raise ValueError(expected)
        return value

    return convert


def auto_or(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """A converter that also accepts the word auto."""

    def convert_or_auto(text: str) -> Any:
        if text.lower() == "auto":
            return "auto"
        try:
            return convert(text)
        except ValueError as error:
            raise ValueError(f"auto or {error}") from None

    return convert_or_auto


def several(convert: Callable[[str], Any]) -> Callable[[str], str]:
    """A converter for one or more values separated by spaces. Returns them as one string, without duplicates."""

    def convert_all(text: str) -> str:
        try:
            values = [str(convert(word)) for word in text.split() or [""]]
        except ValueError as error:
            raise ValueError(f"one or more values with spaces between them, each {error}") from None
        return " ".join(dict.fromkeys(values))

    return convert_all


def group_rule(text: str) -> str:
    """auto, column, parent, none, or a regular expression."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"auto, column, parent, none or a regular expression ({error})") from None
    if not text:
        raise ValueError("auto, column, parent, none or a regular expression")
    return text


def text_value(text: str) -> str:
    """Any valid text."""
    try:
        text.encode()
    except ValueError:  # bytes that are not valid in this locale
        raise ValueError("valid UTF-8 text") from None
    return text


def path_value(text: str) -> str:
    """A file, a folder or a hub id."""
    try:
        os.fsencode(text)
    except ValueError:
        raise ValueError("a path or name") from None
    if not text or "\0" in text:
        raise ValueError("a path or name that is not empty and contains no NUL")
    return text


# -- the options ------------------------------------------------------------------------------------

# scripts that read an option: those that build a new model, and those that load a run
TRAIN_ANY = "main doctor preview plan extract"  # not a sweep: it trains heads only, and without a language model
TRAIN = f"{TRAIN_ANY} sweep_heads"
USE = "inference score"
ALL = f"{TRAIN} {USE}"
NO_SWEEP = f"{TRAIN_ANY} {USE}"
# options that are scripts now, and what to type instead
RETIRED = {
    "doctor": "python doctor.py takes the same flags",
    "evaluate": "python score.py --checkpoint <run> scores a run again",
    "preview": "python preview.py --count <clips> takes the same flags",
}


def option(default: Any, convert: Callable[[str], Any], group: str, scripts: str, **facts: Any) -> Any:
    """A field of Config. The string below the field is its help text; `scripts` are the scripts that read it.

    All other properties of an option are kept here too, as `facts`:
        names_run         identifies a run; a flag that contradicts a loaded run is an error
        mark              added to the default name of a run if the option is True
        needs_vlm         an error without a language model
        classifiers_only  an error for a captioner
        free_at_resume    may change when a run is resumed, because no result depends on it
        changes_answers   answers of inference depend on it
        in_feature_key    cached features depend on it
        package           an optional package that values other than the default need
        several           its flag takes several values
    """
    return field(default=default, metadata={"convert": convert, "group": group, "scripts": scripts.split()} | facts)


@dataclass(frozen=True)
class Config:
    """All options of all scripts. None means "not set"."""

    vision_model: str = option("timesformer", path_value, "model", ALL, names_run=True)
    """vision backbone: a short name from the table at the end, or a folder (from save_pretrained) or hub id of one of
    the families in that table"""
    language_model: str | None = option(None, path_value, "model", NO_SWEEP, names_run=True, needs_vlm=True)
    """language backbone for --use_vlm True: bert for classification; gpt2, smollm2 or qwen3 for captioning; or a folder
    or hub id of a similar model. If not set: bert, or gpt2 with --captioning True"""
    use_vlm: bool = option(False, to_bool, "model", NO_SWEEP, names_run=True)
    """connect a language model to the vision backbone"""
    captioning: bool = option(False, to_bool, "model", NO_SWEEP, names_run=True)
    """generate captions, or answers to the questions in metadata.jsonl, instead of predicting a class; needs --use_vlm
    True"""
    use_text: bool = option(False, to_bool, "model", NO_SWEEP, names_run=True, needs_vlm=True)
    """classification: also read each clip's `text` from metadata.jsonl. Captioning: no effect, because captions are the
    targets either way"""
    weights: str = option("tiny", one_of("tiny", "hub"), "model", ALL, names_run=True)
    """weights that the short names load: tiny (in backbones/, for the synthetic dataset only) or hub (published; use
    these for real videos)"""
    vision_layer: int | str = option("auto", auto_or(number(int, 1, 1000)), "model", TRAIN_ANY)
    """read the output of this layer of the vision backbone, 1 being the first; the layers above are left out.
    Intermediate layers of self-supervised backbones can be better than the last: compare them with sweep_heads.py
    --layers. auto: the last"""
    token_grid: int | str = option("auto", auto_or(number(int, 1, 32)), "model", TRAIN, in_feature_key=True)
    """pool the video tokens of each time step to N x N for the language model or the attentive head; a larger N keeps
    finer detail and takes more memory. auto: 8 for the attentive head, or the backbone's own N if that is smaller; else
    2"""
    max_text_tokens: int = option(128, number(int, 1, 100_000), "model", TRAIN_ANY)
    """maximum length, in tokens, of a text, of a caption, or of a question with its answer; the question gets at most
    half of it. Longer ones are cut, and the run prints how many. The language model's own maximum also applies"""
    head: str = option("auto", one_of("auto", "linear", "attentive"), "model", NO_SWEEP, names_run=True)
    """what reads the video. linear: one layer on the pooled token, or on [CLS] of the language model; for captioners,
    an MLP on every token of the grid. attentive: a query, learned or made from the text, attends to each time step, and
    a small transformer reads the results in order; captioners have 16 such queries. Choose attentive if the answer
    depends on the order of events or on the text. auto: attentive with --use_vlm True and for videomae-tiny and
    vjepa2-tiny, else linear"""
    dropout: float = option(0.1, number(float, 0, 0.9), "model", TRAIN)
    """dropout before the new head and in the projector; raise it if val falls behind train"""

    # without these flags a backbone is trained in full; LoRA trains adapters only, with or without freezing
    freeze_visionbackbone: bool = option(False, to_bool, "training mode", ALL, names_run=True, mark="fvbb")
    """do not train the vision backbone: fast, uses little memory, good for small datasets"""
    freeze_llmbackbone: bool = option(
        False, to_bool, "training mode", NO_SWEEP, names_run=True, mark="fllm", needs_vlm=True
    )
    """do not train the language backbone"""
    use_lora_vision: bool = option(False, to_bool, "training mode", NO_SWEEP, names_run=True, mark="loravision")
    """train low-rank adapters (LoRA) in the vision backbone instead of its own weights"""
    use_lora_llm: bool = option(
        False, to_bool, "training mode", NO_SWEEP, names_run=True, mark="lorallm", needs_vlm=True
    )
    """train low-rank adapters (LoRA) in the language backbone instead of its own weights"""
    lora_r: int = option(16, number(int, 1, 1024), "training mode", TRAIN_ANY)
    """LoRA rank, usually 8 to 64; higher for larger datasets. alpha is twice the rank"""

    data_dir: str = option("synthetic_dataset", path_value, "data", f"{TRAIN} score", free_at_resume=True)
    """dataset folder with train/, test/ and optionally val/; each has one folder per class, a metadata.jsonl, or tar
    files. With tar files also s3://, gs:// or hf://"""
    # "auto" means the backbone's own value; fill_auto() replaces it once the backbone is known
    num_frames: int | str = option("auto", auto_or(number(int, 1, 1024)), "data", TRAIN, in_feature_key=True)
    """frames per clip; more show finer motion but take longer. auto: as many as the backbone was trained with, or 8
    for an image encoder"""
    image_size: int | str = option("auto", auto_or(number(int, 8, 2048)), "data", TRAIN)
    """height and width of the model's input in pixels. auto: the size that the backbone was trained with"""
    frame_stride: int | str = option("auto", auto_or(number(int, -1000, 1000)), "data", TRAIN, in_feature_key=True)
    """0: spread the frames over the whole video. S > 0: take every S-th frame of one window, random in training and
    centred in evaluation; a video shorter than the window repeats its last frame. -S: the same, but the frames are
    spread over a video shorter than the window. auto: -S with the S of the backbone's published training; 0 for tiny
    backbones, for image encoders, and if S is unknown"""
    # three values, because auto must not fail where True must: with augmentation or a trained backbone
    cache_features: str = option("auto", one_of("auto", "True", "False"), "data", "main plan score")
    """compute a frozen vision backbone's features once per video and reuse them in every epoch and run; training then
    always takes the centred frames. auto: True if the vision backbone is frozen and clips are not augmented"""
    cache_dir: str = option("auto", path_value, "data", "main sweep_heads score extract", free_at_resume=True)
    """folder of cached features and stored frames; safe to delete. auto: .features in --output_dir"""
    preread: str = option("auto", one_of("auto", "True", "False"), "data", "main plan")
    """decode each training video once, and store three candidates for each frame of a clip as JPEG files; every epoch
    draws one of the three. auto: True if training videos are video files, their features are not cached, and there are
    several epochs"""
    background: float = option(0.0, number(float, 0, 10), "data", f"{TRAIN} score", classifiers_only=True)
    """with segments (start and end in metadata.jsonl): add clips from the gaps between them as a class "background".
    0.3 adds 3 for every 10 segments, in train, val and test. Use it for timelines, where most of a video may show none
    of the classes"""
    multi_label: str = option("auto", one_of("auto", "True", "False"), "data", TRAIN)
    """clips may show several classes at once, or none: each class is a separate yes or no, from the `labels` in
    metadata.jsonl. auto: True if a row has `labels`"""
    skip_unreadable: bool = option(False, to_bool, "data", "main sweep_heads preview score")
    """skip videos that cannot be read and list them in metrics.json; otherwise they stop the run"""
    group_by: str = option("auto", group_rule, "data", f"{TRAIN} score")
    """which clips come from one recording. A held-out val shares no recording with train, and intervals of scores
    resample recordings. auto: clips with the same `group` in metadata.jsonl. column: the same, but every clip needs
    one. parent: clips in one folder below the class folder. none: only segments of one video. Anything else is a
    regular expression: what its first group, or else all of it, matches in the file name is the name of the
    recording"""
    augment: str = option("none", one_of("none", "light", "strong"), "data", "main plan preview")
    """random changes to training clips, for small datasets; all frames of a clip change alike. light: mild cropping and
    erasing. strong: more cropping, erasing, RandAugment without rotation or flip, colour jitter and, for classifiers
    without text, mixup or cutmix. strong needs kornia (requirements-extra.txt) and changes colours, which captions may
    mention"""
    flip: bool = option(False, to_bool, "data", "main plan preview")
    """mirror half of the training clips; leave it off if left and right matter, as in "moving left\""""
    class_balance: bool = option(False, to_bool, "data", "main plan sweep_heads preview", classifiers_only=True)
    """draw equally many clips of every class in each epoch; small classes repeat clips, with different frames if frames
    are drawn at random"""

    epochs: int | str = option("auto", auto_or(number(int, 1, 100_000)), "training", "main plan sweep_heads")
    """passes over the training videos; the epoch with the best val accuracy is kept (with several labels, the best mAP;
    for captioners, the lowest val loss). auto: 1,800 optimizer steps, or 3,600 on cached features; at least 5
    and at most 30 epochs"""
    batch_size: int | str = option(
        "auto", auto_or(number(int, 1, 65_536)), "training", f"main plan sweep_heads preview extract {USE}"
    )
    """clips per batch, over all processes; lower it if you run out of memory. auto: 16, or 8 for inference"""
    learning_rate: float | str = option("auto", auto_or(number(float, 0, above=True)), "training", "main doctor")
    """peak learning rate: linear warmup over 10 % of the steps, then cosine decay to zero. auto: see the table in
    docs/runs.md. With two backbones it is the rate of the one trained most (in full, else LoRA, else frozen); the
    other backbone and the new layers keep their default ratios to it"""
    weight_decay: float = option(0.05, number(float, 0), "training", "main")
    """AdamW weight decay, on weight matrices only: not on biases, norms, adapters, CLS, position or time embeddings"""
    layer_decay: float = option(1.0, number(float, 0.1, 1), "training", "main")
    """multiply the learning rate by this for every layer further from the output; 0.65 to 0.9 protects the early layers
    of a fully trained backbone"""
    label_smoothing: float = option(0.0, number(float, 0, 0.9), "training", "main sweep_heads")
    """fraction of each target that is spread over all classes or tokens; 0.1 reduces overconfidence"""
    patience: int | str = option("auto", auto_or(number(int, 0)), "training", "main sweep_heads")
    """stop early if val has not improved for this many epochs. 0: never. auto: half the epochs with --epochs auto,
    otherwise 0"""
    gradient_accumulation_steps: int = option(1, number(int, 1, 65_536), "training", "main plan sweep_heads")
    """batches per optimizer step: N batches of size B train like one batch of N x B, with the memory of B"""
    gradient_checkpointing: bool = option(False, to_bool, "training", "main plan doctor")
    """recompute activations in the backward pass: uses less memory, about a third slower"""
    compile: bool = option(False, to_bool, "training", "main plan")
    """apply torch.compile to the backbones: the first step is slow, later ones are faster; for long runs on a GPU.
    Needs a C++ compiler"""
    seed: int = option(0, number(int, 0, 2**31 - 1), "training", TRAIN)
    """random seed for new layers, sampling, dropout and shuffling; does not affect the val split"""

    heads: str = option(
        "linear attentive", several(one_of("linear", "attentive")), "sweep", "sweep_heads", several=True
    )
    """heads to train. linear: one layer on the pooled token. attentive: attends to each time step and reads the results
    in order; takes longer"""
    layers: str = option("auto", auto_or(several(number(int, 1, 1000))), "sweep", "sweep_heads", several=True)
    """layers of the vision backbone to train each head on, for example 6 9 12; 1 is the first. Their features are
    computed in one pass. Intermediate layers of self-supervised backbones are sometimes better. auto: the last"""
    learning_rates: str = option(
        "0.0001 0.0003 0.001 0.003 0.01", several(number(float, 0, above=True)), "sweep", "sweep_heads", several=True
    )
    """peak learning rates to train each head with. If the lowest or the highest of them is best, try more beyond it"""
    weight_decays: str = option("0.05 0.5", several(number(float, 0)), "sweep", "sweep_heads", several=True)
    """weight decays to train each head with, at each learning rate; higher ones help if val falls behind train"""

    video_dir: str | None = option(None, path_value, "inference", "inference")
    """input: a video file, a folder of frames, a .pt file, or a folder that contains any of these"""
    text_input: str | None = option(None, text_value, "inference", "inference", changes_answers=True)
    """text for all clips, for a classifier trained with --use_text True; for a captioner trained with questions, the
    question. To give each clip its own, put a metadata.jsonl into --video_dir"""
    top_k: int = option(3, number(int, 1), "inference", "inference", changes_answers=True)
    """number of classes to print with their scores"""
    test_clips: int = option(1, number(int, 1, 100), "inference", USE, changes_answers=True, classifiers_only=True)
    """average predictions over N clips per video, sampled at different times"""
    test_crops: int = option(1, number(int, 1, 10), "inference", USE, changes_answers=True, classifiers_only=True)
    """average predictions over N crops per clip, along the longer side of the frame; papers often use 3 crops, with 3
    or more clips"""
    max_new_tokens: int = option(40, number(int, 1, 4096), "inference", USE, changes_answers=True)
    """longest generated caption or answer in tokens"""
    num_beams: int = option(1, number(int, 1, 64), "inference", USE, changes_answers=True)
    """beam width. 1: greedy decoding. 3 to 5: beam search, slower"""
    timeline: float = option(0.0, number(float, 0), "inference", "inference", changes_answers=True)
    """make one prediction for every window of this many seconds. 0: one prediction per video"""
    timeline_stride: float = option(
        0.0, number(float, 0), "inference", "inference", changes_answers=True, classifiers_only=True
    )
    """seconds from the start of one window to the next, at most --timeline; overlapping windows are averaged, and
    stretches with the same best class are added to --output as segments. 0: windows follow one another without overlap,
    and no segments are added"""
    output: str | None = option(None, path_value, "inference", "inference")
    """also write the predictions to this file, one JSON object per line; an unfinished file of the same run is
    continued"""
    shared: bool = option(False, to_bool, "inference", "inference")
    """share --output with other processes that are started with the same flags, on this machine or on others that see
    the same folders; the last one to finish writes it, as a single process would. Without this flag a second process is
    an error"""
    export: str | None = option(None, path_value, "inference", "inference")
    """export the run to this folder for other programs: a classifier as a merged Hugging Face model, adapters in peft
    format"""
    count: int = option(8, number(int, 1, 200), "inference", "preview")
    """number of training clips to draw"""

    checkpoint: str | None = option(None, path_value, "run and machine", USE)
    """run folder to load; all model options are read from it. Without it, inference.py finds the run by its model
    options"""
    run_name: str | None = option(
        None, path_value, "run and machine", f"main sweep_heads preview {USE}", free_at_resume=True
    )
    """name of the run's folder; derived from the model options by default"""
    output_dir: str = option(
        "checkpoints", path_value, "run and machine", f"main sweep_heads preview extract {USE}", free_at_resume=True
    )
    """folder that contains all runs"""
    overwrite: bool = option(False, to_bool, "run and machine", "main sweep_heads", free_at_resume=True)
    """replace an existing run with the same name"""
    resume: bool = option(False, to_bool, "run and machine", "main", free_at_resume=True)
    """continue a stopped run from its last saved step, with its original options; the result is bit-for-bit the same as
    without the interruption"""
    save_every: int = option(0, number(int, 0), "run and machine", "main", free_at_resume=True)
    """save the state for --resume every N optimizer steps, not only after each epoch and on Ctrl-C or SIGTERM. 0: no
    additional saves"""
    controls: bool = option(False, to_bool, "run and machine", "main sweep_heads score", free_at_resume=True)
    """also score inputs on which the model should fail (one repeated frame, shuffled or reversed frames, a grey video,
    swapped texts) and two baselines (majority class, nearest neighbour), and draw where the model looks"""
    reject: float = option(
        0.0, number(float, 0, 0.5), "run and machine", "main score", free_at_resume=True, classifiers_only=True
    )
    """answer "none of these" where the best score is low: 0.05 chooses the threshold on val that keeps the fraction of
    wrong answers below 5 %, with 95 % confidence, and calibrates the scores. 0: always answer"""
    tensorboard: bool = option(False, to_bool, "run and machine", "main", free_at_resume=True, package="tensorboardX")
    """also write TensorBoard logs to the run's folder; needs tensorboardX (requirements-extra.txt)"""
    device: str = option("auto", one_of("auto", "cpu", "cuda", "mps"), "run and machine", ALL, free_at_resume=True)
    """where to compute: cpu, cuda or mps. auto: cuda if available, else mps, else cpu"""
    mixed_precision: str = option(
        "auto", one_of("auto", "no", "bf16", "fp16"), "run and machine", ALL, changes_answers=True
    )
    """compute in 16 bit where that is safe (autocast): bf16 or fp16, or no for 32 bit. auto: bf16 on a GPU that
    supports it, else no"""
    frozen_dtype: str = option(
        "auto",
        one_of("auto", "fp32", "bf16"),
        "run and machine",
        f"main plan extract sweep_heads {USE}",
        changes_answers=True,
    )
    """store the frozen weights of backbones in fp32 or bf16. bf16 takes half the memory and needs --mixed_precision
    bf16, which computes with bf16 copies of them anyway. auto: bf16 on a GPU with --mixed_precision bf16, else fp32"""
    lease: float = option(60.0, number(float, 0.1, 86_400), "run and machine", "inference extract", free_at_resume=True)
    """when several processes share the work: if one shows no sign of life for this many seconds, another takes over its
    part. Raise it if changes in the shared folder become visible late"""
    engine: str = option(
        "processes", one_of("processes", "ray"), "run and machine", "extract", free_at_resume=True, package="ray"
    )
    """what shares the work. processes: every process that is started with these flags. ray: this one process and a Ray
    cluster; needs ray (requirements-extra.txt)"""
    num_workers: int = option(2, number(int, 0, 256), "run and machine", ALL, free_at_resume=True)
    """number of processes that decode videos. 0: decode in the main process"""


FIELDS = {f.name: f for f in fields(Config)}


def options_with(fact: str) -> list[str]:
    """The names of the options that have this property."""
    return [name for name, f in FIELDS.items() if f.metadata.get(fact)]


@cache
def help_texts() -> dict[str, str]:
    """{option: help text}, from the string below each option in Config. Only the source has these strings."""
    # a string directly after an annotated field, with its line breaks removed
    (tree,) = ast.parse(inspect.getsource(Config)).body
    pairs = [(a, b) for a, b in pairwise(tree.body) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)]
    return {a.target.id: " ".join(b.value.value.split()) for a, b in pairs}


# -- reading values ---------------------------------------------------------------------------------


def read_value(name: str, text: str | None, where: str) -> Any:
    """The value of an option from its text in a flag or yaml file. None stays None if that is the default.

    Raises UserError with the text and what is allowed; `where` says where it was read.
    """
    if text is None and FIELDS[name].default is None:
        return None
    try:
        return FIELDS[name].metadata["convert"](text or "")
    except ValueError as error:
        raise UserError(f"{where}{name}: expected {error}, not {shown(text)}") from None


def closest(word: str, names: list[str]) -> str:
    """The end of an error message about an unknown word: the most similar name, or all names."""
    matches = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {matches[0]}?" if matches else f"choose from {', '.join(names)}"


def read_yaml(path: Path) -> dict[str, Any]:
    """{option: converted value} of a yaml file. Raises UserError for a bad file, key or value."""
    values: dict[str, Any] = {}
    for key, value in yaml_pairs(path):
        if key in RETIRED:  # in the config.yaml of runs of earlier versions
            continue
        if key not in FIELDS:
            raise UserError(f"{path}: unknown key {shown(key)}; {closest(key, list(FIELDS))}")
        if key in values:
            raise UserError(f"{path}: {key} appears twice; remove one")
        values[key] = read_value(key, value, f"{path}: ")
    return values


def yaml_pairs(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yields the keys and values of a yaml file as text. A value is None if it is null, ~ or empty.

    Raises UserError for a file that cannot be parsed, and for lists, maps and tags.
    """
    # compose() stops at the syntax tree. It creates no objects and expands no aliases, so any file is safe to read
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_YAML + 1)
        if len(data) > LARGEST_YAML:
            raise ValueError(f"it is larger than {LARGEST_YAML:,} bytes")
        root = yaml.compose(data, Loader=yaml.BaseLoader)
    except RecursionError:
        raise UserError(f"cannot read {path}: it is nested too deeply") from None
    except (OSError, ValueError, OverflowError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(cause_of(error).split())}") from None
    if not isinstance(root, yaml.MappingNode | None):
        raise UserError(f"{path}: expected lines of `key: value`")

    # values stay text: yaml would read `no` as False and `1e-3` as text; the options' converters know better
    for key, value in root.value if root else []:
        where = f"{path}, line {key.start_mark.line + 1}"
        if not is_plain(key):
            raise UserError(f"{where}: expected `key: value`")
        if not is_plain(value):
            raise UserError(f"{where}: {shown(key.value)}: expected a single value, not a list, a map or a tag")
        empty = value.style is None and value.value in ("", "~", "null", "Null", "NULL")
        yield key.value, None if empty else value.value


def is_plain(node: yaml.Node) -> bool:
    """Whether a yaml node is a single number, word or text."""
    return isinstance(node, yaml.ScalarNode) and node.tag in PLAIN_TAGS


def write_yaml(values: dict[str, Any], path: Path) -> None:
    """Writes options to a yaml file that read_yaml() can read."""
    # safe_dump escapes non-ASCII letters by default; it must, because yaml treats U+0085 and U+2028 as line breaks
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def config_file_text() -> str:
    """The content of config_file.yaml: every option with its default and help text."""
    lines = ["# Every option with its default. Change a default here; a flag of the same name overrides it."]
    # a comment above each group, and the help text after each value
    group, texts = None, help_texts()
    for name, f in FIELDS.items():
        if f.metadata["group"] != group:
            group = f.metadata["group"]
            lines += ["", f"# {group}"]
        lines.append(f"{name}: {yaml.safe_dump(f.default).splitlines()[0]}  # {texts[name]}")
    return "\n".join(lines) + "\n"


# -- the command line -------------------------------------------------------------------------------

# what each script does, for the first line of its --help
ABOUT = {
    "main": "Train a video classifier, a video + language classifier or a video captioner.",
    "inference": "Classify or caption videos with a trained run: --checkpoint FOLDER, or the model options of its training.",
    "score": "Score a trained run again on val and test of its own data, or of other data. --segments TRUTH ANSWERS "
    "scores predicted segments (ANSWERS, an output of inference.py) against a metadata.jsonl (TRUTH).",
    "doctor": "Check data, backbone and options before training. Takes the flags of main.py and saves nothing.",
    "sweep_heads": "Train many heads on cached features of a frozen backbone, and keep the one that is best on val.",
    "plan": "Estimate, in about a minute, the memory and time that training takes with the vision backbone frozen, with "
    "LoRA and in full. Takes the flags of main.py and saves nothing.",
    "extract": "Compute the features of a frozen vision backbone into the feature cache. Takes the flags of main.py. "
    "If you start it several times, on one machine or several, the processes share the work.",
    "preview": "Draw the first training clips as the model will see them. Takes the flags of main.py.",
}
# which flag a path without a flag most likely lacks
INPUT = {"inference": "--video_dir", "score": "--checkpoint"} | dict.fromkeys(TRAIN.split(), "--data_dir")


def table_of_names() -> str:
    """The short names, what they load with --weights tiny and hub, and the licence of the published weights."""
    lines = [f"  {'short name':<12} {'tiny':<4} {'hub model':<41} licence of the hub model"]
    for name, backbone in BACKBONES.items():
        licence = f"{backbone.licence}{', not for commercial use' if is_non_commercial(backbone.licence) else ''}"
        lines.append(f"  {name:<12} {'yes' if backbone.tiny else 'no':<4} {backbone.hub:<41} {licence}")
    return "\n".join(lines)


def build_parser(script: str) -> Parser:
    """The argument parser of a script. It accepts all options, but --help shows only those that the script reads."""
    parser = Parser(
        prog=f"{script}.py",
        usage="%(prog)s [--flag value ...]",
        description=ABOUT[script],
        epilog=f"Flags override config_file.yaml. A True/False flag without a value means True.\n\n{table_of_names()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    # no defaults here: the result must contain only the flags that were typed, because only these override the file
    parser.add_argument("--config", metavar="FILE", help=f"yaml file with defaults (default: {CONFIG_FILE.name})")
    groups: dict[str, Any] = {}
    texts = help_texts()
    for name, f in FIELDS.items():
        group = f.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        bare = {"nargs": "?", "const": "True"} if f.metadata["convert"] is to_bool else {}
        bare |= {"nargs": "+"} if f.metadata.get("several") else {}
        text = f"{texts[name]} (default: {f.default})".replace("%", "%%")
        text = text if script in f.metadata["scripts"] else argparse.SUPPRESS
        groups[group].add_argument(f"--{name}", metavar="VALUE", default=argparse.SUPPRESS, help=text, **bare)
    return parser


def parse(argv: list[str] | None, script: str) -> tuple[Config, set[str]]:
    """The options of a script, and the names of those that were typed as flags.

    Raises:
        UserError: an unknown flag or key, a value of the wrong type, or an impossible combination.
    """
    # unknown flags are an error here, not in argparse, to suggest the closest name
    args, unknown = build_parser(script).parse_known_args(argv)
    if unknown:
        raise UserError(unknown_flag(unknown[0], script))

    # default < yaml file < flag
    flags = vars(args)
    path = flags.pop("config", None)
    file = CONFIG_FILE if path is None else Path(path)
    values = read_yaml(file) if path is not None or file.is_file() else {}
    typed_flags = {n: read_value(n, v if isinstance(v, str) else " ".join(v), "--") for n, v in flags.items()}
    if script in TRAIN:
        refuse_foreign(script, typed_flags)
    config = Config(**(values | typed_flags))
    shards.TYPED.add(config.data_dir)

    # with --checkpoint the run's own options are loaded and checked later
    if config.checkpoint is None:
        config = check_options(config)
    if script == "inference" and config.video_dir is None and config.export is None:
        raise UserError("no input: add --video_dir <a video file, a folder of frames, or a folder of videos>")
    return config, set(typed_flags)


def unknown_flag(word: str, script: str) -> str:
    """The error message for a flag that does not exist, or for a word without a flag."""
    if not word.startswith("-") and word not in FIELDS:
        return f"unexpected word {shown(word)}: every value needs its flag, for example {INPUT[script]} {word}"

    # options of earlier versions get a hint of their own, others the closest name
    flag = word.split("=")[0]
    if flag.removeprefix("--") in RETIRED:
        return f"{flag} is no longer an option: {RETIRED[flag.removeprefix('--')]}"
    return f"unknown flag {shown(flag)}; {closest(flag, ['--config', *(f'--{name}' for name in FIELDS)])}"


def refuse_foreign(script: str, typed_flags: dict[str, Any]) -> None:
    """Raises UserError for a typed flag that belongs to other scripts; flags of main.py are accepted by all."""
    for name in typed_flags:
        scripts = FIELDS[name].metadata["scripts"]
        if script not in scripts and "main" not in scripts:
            owners = " and ".join(f"{s}.py" for s in scripts)
            raise UserError(f"--{name} is an option of {owners}, not of {script}.py")


# -- checks and defaults that depend on several options ---------------------------------------------


def check_options(config: Config) -> Config:
    """The options with the default language model filled in. Raises UserError for an impossible combination."""
    # without a language model, its options would silently have no effect
    if not config.use_vlm:
        if config.captioning:
            raise UserError("--captioning True needs a language model: add --use_vlm True")
        for name in options_with("needs_vlm"):
            if getattr(config, name):
                raise UserError(f"--{name} needs --use_vlm True")
    elif config.language_model is None:
        config = replace(config, language_model="gpt2" if config.captioning else "bert")

    # problems that would otherwise show only after data and weights are loaded
    for name in options_with("package"):
        package, value = FIELDS[name].metadata["package"], getattr(config, name)
        if value != FIELDS[name].default and importlib.util.find_spec(package) is None:
            raise UserError(f"--{name} {value} needs {package}: pip install -r requirements-extra.txt")
    refuse_classifier_options(config)
    check_backbone(config, "vision_model", "vision")
    if config.use_vlm:
        check_backbone(config, "language_model", "decoder" if config.captioning else "encoder")
    run_name(config)  # called for its checks
    return config


def refuse_classifier_options(config: Config) -> None:
    """Raises UserError for a captioner with an option that only classifiers have."""
    for name in options_with("classifiers_only"):
        if config.captioning and getattr(config, name) != FIELDS[name].default:
            raise UserError(f"--{name} works with classifiers only, and this is a captioner: leave it out")


def check_backbone(config: Config, option_name: str, kind: str) -> None:
    """Raises UserError unless the option is a folder, a hub id, or a short name of this kind that has the weights that
    --weights asks for."""
    # hub ids contain a slash, so any other unknown word is most likely a short name with a typo
    name = getattr(config, option_name)
    if name not in BACKBONES:
        if "/" in name or Path(name).is_dir():
            return
        names = [n for n, b in BACKBONES.items() if (b.kind == "vision") == (kind == "vision")]
        reason = f"is neither a short name ({', '.join(names)}), a folder nor a hub id; {closest(name, names)}"
        raise UserError(f"--{option_name} {shown(name)} {reason}")

    # BERT and GPT-2 are easily confused, so say which one the task needs
    actual = BACKBONES[name].kind
    if (actual, kind) == ("encoder", "decoder"):
        raise UserError(f"captioning needs a causal language model such as gpt2, not {name}")
    if (actual, kind) == ("decoder", "encoder"):
        raise UserError(f"{name} writes captions: add --captioning True, or use --language_model bert to classify")
    if actual != kind:
        raise UserError(f"--{option_name} cannot be {name}, a {actual} backbone")
    if config.weights == "tiny" and not BACKBONES[name].tiny:
        raise UserError(f"--{option_name} {name} has no tiny weights: add --weights hub")


def training_mode(config: Config) -> dict[str, str]:
    """How each backbone is trained: {"vision": "full", "lora" or "frozen"}, with a VLM also "language"."""
    # LoRA wins over frozen: adapters on frozen weights
    modes = {"vision": "lora" if config.use_lora_vision else "frozen" if config.freeze_visionbackbone else "full"}
    if config.use_vlm:
        modes["language"] = "lora" if config.use_lora_llm else "frozen" if config.freeze_llmbackbone else "full"
    return modes


def is_tiny(config: Config, part: str) -> bool:
    """Whether the vision or language backbone is one of those in backbones/."""
    return config.weights == "tiny" and getattr(config, f"{part}_model") in BACKBONES


def default_rates(config: Config) -> tuple[float, dict[str, float]]:
    """The default learning rates: (peak rate of the least restricted backbone, {part: its rate as a multiple of it}).
    Parts are "vision", "language" and "new layers"."""
    # folders and hub ids get the rates of published weights
    modes = training_mode(config)
    kinds = {part: ("tiny" if is_tiny(config, part) else "hub", mode) for part, mode in modes.items()}
    rates = {part: LEARNING_RATES[kind][0] for part, kind in kinds.items()}
    # the keys of LEARNING_RATES are ordered from least to most restricted
    lead = min(kinds, key=lambda part: [*LEARNING_RATES].index(kinds[part]))
    new_layers = rates[lead] * LEARNING_RATES[kinds[lead]][1]
    if head_of(config) == "attentive":
        new_layers = min(new_layers, ATTENTIVE_RATE)
        rates["vision"] = min(rates["vision"], ATTENTIVE_VISION_RATES[modes["vision"]])

    # without a trained backbone there are only new layers
    rate = new_layers if {*modes.values()} == {"frozen"} else rates[lead]
    return rate, {part: value / rate for part, value in (rates | {"new layers": new_layers}).items()}


def head_of(config: Config) -> str:
    """What reads the video, "linear" or "attentive"; decides what `auto` means."""
    if config.head != "auto":
        return config.head
    if config.use_vlm:
        return "attentive"
    return BACKBONES[config.vision_model].tiny_head if is_tiny(config, "vision") else "linear"


def fill_auto(config: Config, num_frames: int, image_size: int, side: int, stride: int = 0) -> Config:
    """Replaces every `auto` that depends on the model. The backbone reads num_frames frames of image_size x image_size
    pixels, in side x side patches; its family was trained with every stride-th frame, or 0.

    Options that depend on the machine stay `auto`: device, mixed_precision, frozen_dtype, cache_features, cache_dir,
    preread.
    """
    values = {"num_frames": num_frames, "image_size": image_size, "batch_size": 16}
    values["frame_stride"] = 0 if is_tiny(config, "vision") else -stride
    values["learning_rate"] = default_rates(config)[0]
    values["token_grid"] = min(side, 8 if head_of(config) == "attentive" else 2)
    values["head"] = head_of(config)
    return replace(config, **{name: value for name, value in values.items() if getattr(config, name) == "auto"})


def fill_epochs(config: Config, num_videos: int) -> Config:
    """Replaces `auto` in epochs and patience, which depend on the number of training videos."""
    if config.epochs == "auto":
        cached = training_mode(config)["vision"] == "frozen" and config.augment == "none"
        budget = STEPS["cached" if cached and config.cache_features != "False" else "other"]
        steps = math.ceil(num_videos / (config.batch_size * config.gradient_accumulation_steps))
        epochs = max(EPOCHS[0], min(EPOCHS[1], round(budget / steps)))
        patience = epochs // 2
    else:
        epochs, patience = config.epochs, 0
    return replace(config, epochs=epochs, patience=patience if config.patience == "auto" else config.patience)


def run_name(config: Config) -> str:
    """The name of the run's folder: --run_name, or one made from the model options. Raises UserError if no folder can
    have this name."""
    # backslashes are refused on every system, because on Windows they separate folders
    name = default_run_name(config) if config.run_name is None else config.run_name
    if name in ("", ".", "..") or re.search(r"[/\\]", name) or CONTROL.search(name):
        problem = "cannot be the name of a folder"
    elif len(os.fsencode(name)) > MAX_NAME:
        problem = f"is longer than {MAX_NAME} bytes"
    else:
        return name
    advice = "add --run_name NAME" if config.run_name is None else "choose another --run_name"
    raise UserError(f"the run's name {shown(name)} {problem}; {advice}")


def default_run_name(config: Config) -> str:
    """For example timesformer_bert_text_fvbb_lorallm: backbones, task, how each is trained, weights."""
    # abspath gives folders such as "." or "models/" a name
    parts = [Path(os.path.abspath(config.vision_model)).name]
    if config.use_vlm:
        parts.append(Path(os.path.abspath(config.language_model)).name)
        if config.captioning:
            parts.append("caption")
        elif config.use_text:
            parts.append("text")
    if config.head not in ("auto", head_of(replace(config, head="auto"))):
        parts.append(config.head)
    parts += [FIELDS[name].metadata["mark"] for name in options_with("mark") if getattr(config, name)]
    if config.weights == "hub" and (config.vision_model in BACKBONES or config.language_model in BACKBONES):
        parts.append("hub")
    return "_".join(parts)


def as_flags(config: Config) -> str:
    """The flags that identify a run and differ from their defaults, as one would type them."""
    if config.head == head_of(replace(config, head="auto")):
        config = replace(config, head="auto")
    pairs = ((name, getattr(config, name)) for name in options_with("names_run"))
    given = ((name, value) for name, value in pairs if value not in (None, FIELDS[name].default))
    return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in given)


if __name__ == "__main__":
    replace_file(CONFIG_FILE, lambda p: p.write_text(config_file_text(), encoding="utf-8"))
    print(f"wrote {CONFIG_FILE}")
