"""Every option once, with all its facts; default < config_file.yaml < flag. Imports no torch, so that --help is fast.

python config.py        writes config_file.yaml anew
"""

import argparse
import ast
import difflib
import importlib.util
import inspect
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from script import Parser, UserError, replace_file, shown

ROOT = Path(__file__).resolve().parent  # the folder of backbones/ and config_file.yaml
CONFIG_FILE = ROOT / "config_file.yaml"
LARGEST_YAML = 100_000  # bytes
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}


class Backbone(NamedTuple):
    """What a short name stands for: backbones/<name>-tiny, or a model on the hub."""

    kind: str  # vision | encoder (BERT-like) | decoder (causal)
    hub: str
    revision: str  # a commit, so that later uploads change nothing


BACKBONES = {
    "timesformer": Backbone(
        "vision", "facebook/timesformer-base-finetuned-k400", "8aaf40ea7d3d282dcb0a5dea01a198320d15d6c0"
    ),
    "videomae": Backbone(
        "vision", "MCG-NJU/videomae-base-finetuned-kinetics", "488eb9a0565f257b32866000305c8178965eb9f6"
    ),
    "bert": Backbone("encoder", "google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594"),
    "gpt2": Backbone("decoder", "openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
}

# (weights, how a backbone is trained) -> (peak learning rate, factor for new layers). The least restricted backbone
# decides; of two equally restricted ones the published, whose weights cost more to spoil.
LEARNING_RATES = {
    ("hub", "full"): (5e-5, 10.0),
    ("tiny", "full"): (5e-4, 2.0),
    ("hub", "lora"): (5e-4, 2.0),
    ("tiny", "lora"): (3e-3, 1.0),
    ("hub", "frozen"): (1e-3, 1.0),
    ("tiny", "frozen"): (3e-3, 1.0),
}


# -- converters: str -> value, raising ValueError with what is allowed ------------------------------


WORDS = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
LONGEST_NAME = 200  # bytes; file systems take 255, and a temporary file's name adds some


def to_bool(text: str) -> bool:
    """True or False, in any case; argparse's type=bool would read 'False' as True."""
    return one_of("True", "False")(text) == "True"


def one_of(*choices: str) -> Callable[[str], str]:
    """A converter that ignores case and treats yes, on, 1 and true (no, off, 0 and false) alike."""

    def plain(text: str) -> str:
        return WORDS.get(text.lower(), text.lower())

    known = {plain(choice): choice for choice in choices}

    def convert(text: str) -> str:
        if plain(text) not in known:
            raise ValueError(" or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}")
        return known[plain(text)]

    return convert


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], Any]:
    """A converter to `kind` (int or float) that accepts finite low <= value <= high; with `above`, low < value."""
    name = "a whole number" if kind is int else "a number"
    span = f"above {low}" if above else f"at least {low}" if high == math.inf else f"from {low} to {high}"

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(f"{name}, {span}") from None
        if not low <= value <= high or value == math.inf or (above and value == low):
            raise ValueError(f"{name}, {span}")
        return value

    return convert


def auto_or(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert_or_auto(text: str) -> Any:
        if text.lower() == "auto":
            return "auto"
        try:
            return convert(text)
        except ValueError as error:
            raise ValueError(f"auto, or {error}") from None

    return convert_or_auto


def text_value(text: str) -> str:
    try:
        text.encode()
    except ValueError:  # an argument that is no text of this locale
        raise ValueError("a text") from None
    return text


def path_value(text: str) -> str:
    """A file, a folder or a hub id: anything that can be a file name."""
    try:
        os.fsencode(text)
    except ValueError:
        raise ValueError("a path or name") from None
    if not text or "\0" in text:
        raise ValueError("a path or name, not empty and without NUL")
    return text


# -- the options ------------------------------------------------------------------------------------

TRAIN = "main doctor preview"  # scripts that build a new model
USE = "inference score"  # scripts that load a run
ALL = f"{TRAIN} {USE}"
#: options that became scripts: what to type instead
RETIRED = {
    "doctor": "python doctor.py takes the same flags",
    "evaluate": "python score.py --checkpoint <run> scores a run again",
    "preview": "python preview.py --count <clips> takes the same flags",
}


def option(default: Any, convert: Callable[[str], Any], group: str, scripts: str, **facts: Any) -> Any:
    """A field of Config; its help is the string below it. `scripts` are those that read it.

    Facts that may be given:
        names_run         part of what a run is: typed again for a checkpoint, it must agree
        mark              what it adds to the default name of a run
        needs_vlm         has no meaning without a language model
        classifiers_only  has no meaning for a captioner
        free_at_resume    may change when a run is resumed: no result depends on it
        changes_answers   inference answers depend on it
        in_feature_key    cached features depend on it
    """
    return field(default=default, metadata={"convert": convert, "group": group, "scripts": scripts.split()} | facts)


@dataclass(frozen=True)
class Config:
    """All options of all scripts; None means "not given"."""

    vision_model: str = option("timesformer", path_value, "model", ALL, names_run=True)
    """video backbone: timesformer, videomae, a local folder written by save_pretrained, or a hub id of either family"""
    language_model: str | None = option(None, path_value, "model", ALL, names_run=True, needs_vlm=True)
    """language backbone, with --use_vlm True: bert (classification), gpt2 (captioning), or a folder or hub id of such a
    model"""
    use_vlm: bool = option(False, to_bool, "model", ALL, names_run=True)
    """connect a language model to the video backbone"""
    captioning: bool = option(False, to_bool, "model", ALL, names_run=True)
    """write captions instead of predicting a class; needs --use_vlm True"""
    use_text: bool = option(False, to_bool, "model", ALL, names_run=True, needs_vlm=True)
    """classification: also read the clip's own text; captioning: no effect, captions are the targets either way"""
    weights: str = option("tiny", one_of("tiny", "hub"), "model", ALL, names_run=True)
    """which weights the short names load: tiny (backbones/, synthetic shapes only) or hub (published weights; use these
    for real videos)"""
    token_grid: int = option(2, number(int, 1, 32), "model", TRAIN, in_feature_key=True)
    """video tokens per time step for a language model: pooled to N x N; more keeps finer detail and takes memory"""
    max_text_tokens: int = option(128, number(int, 1, 100_000), "model", TRAIN)
    """longest text or caption, in tokens; longer ones are cut and counted. The language model's positions are a limit
    too"""
    dropout: float = option(0.1, number(float, 0, 0.9), "model", TRAIN)
    """dropout before the new head and in the projector; raise it when val falls behind train"""

    freeze_visionbackbone: bool = option(False, to_bool, "what is trained", ALL, names_run=True, mark="fvbb")
    """do not train the video backbone: fast, little memory, good for small data sets"""
    freeze_llmbackbone: bool = option(
        False, to_bool, "what is trained", ALL, names_run=True, mark="fllm", needs_vlm=True
    )
    """do not train the language backbone"""
    use_lora_vision: bool = option(False, to_bool, "what is trained", ALL, names_run=True, mark="loravision")
    """train low-rank adapters (LoRA) in the video backbone instead of its own weights"""
    use_lora_llm: bool = option(False, to_bool, "what is trained", ALL, names_run=True, mark="lorallm", needs_vlm=True)
    """train low-rank adapters (LoRA) in the language backbone instead of its own weights"""
    lora_r: int = option(16, number(int, 1, 1024), "what is trained", TRAIN)
    """rank of the adapters (alpha is twice the rank): 8 to 64, larger for larger data sets"""

    data_dir: str = option("synthetic_dataset", path_value, "data", f"{TRAIN} score", free_at_resume=True)
    """folder with train/, test/ and optionally val/, each with one folder per class or a metadata.jsonl"""
    num_frames: int | str = option("auto", auto_or(number(int, 1, 1024)), "data", TRAIN, in_feature_key=True)
    """frames per clip; auto: as many as the backbone was trained with. More frames show finer motion and take time"""
    image_size: int | str = option("auto", auto_or(number(int, 8, 2048)), "data", TRAIN)
    """height and width of the model's input in pixels; auto: the size the backbone was trained with"""
    frame_stride: int = option(0, number(int, 0, 1000), "data", TRAIN, in_feature_key=True)
    """0 spreads the frames over the whole video; S > 0 takes every S-th frame of one window, centred at evaluation"""
    cache_features: str = option("auto", one_of("auto", "True", "False"), "data", "main score")
    """compute a frozen backbone's features once per video and reuse them in every epoch and run; training then uses the
    centre frames, without jitter. auto: on if the vision backbone is frozen and there is no augmentation"""
    cache_dir: str = option("auto", path_value, "data", "main score", free_at_resume=True)
    """folder of cached features, safe to delete; auto: .features in --output_dir"""
    skip_unreadable: bool = option(False, to_bool, "data", "main preview score")
    """skip videos that cannot be read, and list them in metrics.json, instead of stopping with an error"""
    augment: str = option("none", one_of("none", "light", "strong"), "data", "main preview")
    """random changes to training clips, the same for all frames of a clip. light: mild crop and erasing. strong: wider
    crop, RandAugment without rotation or flip, colour jitter and, for classifiers without text, mixup and cutmix (needs
    kornia: requirements-extra.txt). For small data sets; strong changes colours, which captions may name"""
    flip: bool = option(False, to_bool, "data", "main preview")
    """mirror half of the training clips; leave it off where left and right matter, as in "moving left\""""
    class_balance: bool = option(False, to_bool, "data", "main preview", classifiers_only=True)
    """draw equally many clips of every class in each epoch: small classes repeat clips with other frames"""

    epochs: int = option(10, number(int, 1, 100_000), "training", "main")
    """passes over the training videos; the epoch that is best on val is kept"""
    batch_size: int | str = option("auto", auto_or(number(int, 1, 65_536)), "training", f"main preview {USE}")
    """clips per batch, over all processes; lower it if memory runs out. auto: 16, for inference 8"""
    learning_rate: float | str = option("auto", auto_or(number(float, 0, above=True)), "training", "main doctor")
    """peak learning rate, reached after 10 % of the steps, then cosine decay to zero. auto: the table in README.md. It
    applies to the least restricted backbone; other backbone and new layers keep the table's ratios"""
    weight_decay: float = option(0.05, number(float, 0), "training", "main")
    """AdamW weight decay, on weight matrices only: not on biases, norms, adapters, CLS, position or time embeddings"""
    layer_decay: float = option(1.0, number(float, 0.1, 1), "training", "main")
    """multiply the learning rate by this for every layer further from the output; 0.65 to 0.9 protects the early layers
    of a backbone that is trained in full"""
    label_smoothing: float = option(0.0, number(float, 0, 0.9), "training", "main")
    """share of each target that is spread over all classes or words; 0.1 reduces overconfidence"""
    patience: int = option(0, number(int, 0), "training", "main")
    """stop when val has not improved for this many epochs; 0: never"""
    gradient_accumulation_steps: int = option(1, number(int, 1, 65_536), "training", "main")
    """batches per optimizer step: N steps of batch B train like one batch of N x B, with the memory of B"""
    gradient_checkpointing: bool = option(False, to_bool, "training", "main doctor")
    """recompute activations in the backward pass: less memory, about a third slower"""
    compile: bool = option(False, to_bool, "training", "main")
    """torch.compile the backbones: slow first step, faster afterwards; for long training on a GPU. Needs a C++
    compiler"""
    seed: int = option(0, number(int, 0, 2**31 - 1), "training", TRAIN)
    """random seed for new layers, sampling, dropout and shuffling; the val split does not depend on it"""

    video_dir: str | None = option(None, path_value, "inference", "inference")
    """input: a video file, a folder of frames, a .pt file, or a folder of these"""
    text_input: str | None = option(None, text_value, "inference", "inference", changes_answers=True)
    """text for every clip, for a classifier trained with --use_text True; or give each clip its own text in a
    metadata.jsonl in --video_dir"""
    top_k: int = option(3, number(int, 1), "inference", "inference", changes_answers=True)
    """number of classes to print with their scores"""
    test_clips: int = option(1, number(int, 1, 100), "inference", USE, changes_answers=True, classifiers_only=True)
    """average predictions over N clips per video, taken at different times"""
    test_crops: int = option(1, number(int, 1, 10), "inference", USE, changes_answers=True, classifiers_only=True)
    """average predictions over N crops per clip, along the longer side of the frame; papers use 3 or more clips x 3
    crops"""
    max_new_tokens: int = option(40, number(int, 1, 4096), "inference", USE, changes_answers=True)
    """longest generated caption, in tokens"""
    num_beams: int = option(1, number(int, 1, 64), "inference", USE, changes_answers=True)
    """1: greedy decoding; 3 to 5: beam search, slower"""
    timeline: float = option(0.0, number(float, 0), "inference", "inference", changes_answers=True)
    """predict once per SECONDS of video instead of once per video; 0: once per video"""
    output: str | None = option(None, path_value, "inference", "inference")
    """also write the predictions to this file, one JSON object per line; an unfinished file of the same run is
    continued"""
    export: str | None = option(None, path_value, "inference", "inference")
    """write the run to this folder for other programs: a classifier as a merged Hugging Face model, adapters as peft
    folders"""
    count: int = option(8, number(int, 1, 200), "inference", "preview")
    """number of training clips to draw"""

    checkpoint: str | None = option(None, path_value, "run and machine", USE)
    """run folder to load; all model options are read from it"""
    run_name: str | None = option(None, path_value, "run and machine", f"main preview {USE}", free_at_resume=True)
    """name of the run's folder; by default derived from the model options"""
    output_dir: str = option("checkpoints", path_value, "run and machine", f"main preview {USE}", free_at_resume=True)
    """folder of all runs"""
    overwrite: bool = option(False, to_bool, "run and machine", "main", free_at_resume=True)
    """replace an existing run of this name"""
    resume: bool = option(False, to_bool, "run and machine", "main", free_at_resume=True)
    """continue a stopped run from its last saved step, bit for bit as if it had not stopped; keeps the run's original
    options"""
    save_every: int = option(0, number(int, 0), "run and machine", "main", free_at_resume=True)
    """also save what --resume needs every N optimizer steps; it is always saved after each epoch, and on Ctrl-C or
    SIGTERM"""
    controls: bool = option(False, to_bool, "run and machine", "main score", free_at_resume=True)
    """also score inputs on which the model should fail (repeated, shuffled, reversed frames, grey video, swapped texts)
    and two baselines (majority class, nearest neighbour), and draw where the model looks"""
    tensorboard: bool = option(False, to_bool, "run and machine", "main", free_at_resume=True)
    """also write the log for TensorBoard to the run's folder (needs tensorboardX: requirements-extra.txt)"""
    device: str = option("auto", one_of("auto", "cpu", "cuda", "mps"), "run and machine", ALL, free_at_resume=True)
    """auto: cuda if available, else mps, else cpu"""
    mixed_precision: str = option("auto", one_of("auto", "no", "bf16", "fp16"), "run and machine", ALL)
    """auto: bf16 on a GPU that supports it, else no"""
    num_workers: int = option(2, number(int, 0, 256), "run and machine", ALL, free_at_resume=True)
    """processes that decode videos; 0: decode in the main process"""


FIELDS = {f.name: f for f in fields(Config)}


def options_with(fact: str) -> list[str]:
    """The names of the options with this fact."""
    return [name for name, f in FIELDS.items() if f.metadata.get(fact)]


def help_texts() -> dict[str, str]:
    """The string below each option in Config."""
    (tree,) = ast.parse(inspect.getsource(Config)).body
    pairs = [(a, b) for a, b in pairwise(tree.body) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)]
    return {a.target.id: " ".join(b.value.value.split()) for a, b in pairs}


# -- reading values ---------------------------------------------------------------------------------


def convert(name: str, text: str | None, where: str) -> Any:
    """`text` (from a flag or yaml) through the option's converter; None stays where it is the default."""
    if text is None and FIELDS[name].default is None:
        return None
    try:
        return FIELDS[name].metadata["convert"](text or "")
    except ValueError as error:
        raise UserError(f"{where}{name}: expected {error}, not {shown(text)}") from None


def closest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def read_yaml(path: Path) -> dict[str, Any]:
    """A yaml file's options, converted. Raises UserError for a bad file, key or value."""
    values: dict[str, Any] = {}
    for key, value in yaml_pairs(path):
        if key in RETIRED:  # runs of earlier versions have them
            continue
        if key not in FIELDS:
            raise UserError(f"{path}: unknown key {shown(key)}; {closest(key, list(FIELDS))}")
        if key in values:
            raise UserError(f"{path}: {key} is given twice")
        values[key] = convert(key, value, f"{path}: ")
    return values


def yaml_pairs(path: Path) -> Iterator[tuple[str, str | None]]:
    """Each key and value of a yaml file as text; a value is None where it is null, ~ or empty.

    Nothing is constructed: a list, a map, or a tag that asks for more than plain values is refused.
    """
    # compose() stops at the syntax tree: no object is made, no alias expanded
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_YAML + 1)
        if len(data) > LARGEST_YAML:
            raise ValueError(f"it is larger than {LARGEST_YAML:,} bytes")
        root = yaml.compose(data, Loader=yaml.BaseLoader)
    except RecursionError:
        raise UserError(f"cannot read {path}: it is nested too deeply") from None
    except (OSError, ValueError, OverflowError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode | None):
        raise UserError(f"{path}: expected lines of `key: value`")

    # scalars stay text; the converters of the options decide what `no` or `1e-3` means
    for key, value in root.value if root else []:
        where = f"{path}, line {key.start_mark.line + 1}"
        if not is_plain(key):
            raise UserError(f"{where}: expected `key: value`")
        if not is_plain(value):
            raise UserError(f"{where}: {shown(key.value)}: expected a single value, not a list, a map or a tag")
        empty = value.style is None and value.value in ("", "~", "null", "Null", "NULL")
        yield key.value, None if empty else value.value


def is_plain(node: yaml.Node) -> bool:
    """Whether a part of a yaml file is one number, word or text."""
    return isinstance(node, yaml.ScalarNode) and node.tag in PLAIN_TAGS


def write_yaml(values: dict[str, Any], path: Path) -> None:
    # escape non-ASCII letters: yaml would take U+0085 and U+2028 in a text for line breaks
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def config_file_text() -> str:
    """config_file.yaml: every option with its default and its help; `python config.py` writes it."""
    lines = ["# Every option with its default. A flag of the same name overrides its line here."]
    group, texts = None, help_texts()
    for name, f in FIELDS.items():
        if f.metadata["group"] != group:
            group = f.metadata["group"]
            lines += ["", f"# {group}"]
        lines.append(f"{name}: {yaml.safe_dump(f.default).splitlines()[0]}  # {texts[name]}")
    return "\n".join(lines) + "\n"


# -- the command line -------------------------------------------------------------------------------

#: what each script does, for the first line of its --help
ABOUT = {
    "main": "Train a video classifier, a video + language classifier or a video captioner.",
    "inference": "Classify or caption videos with a trained run.",
    "score": "Score a trained run again on val and test, with its own options or on other videos.",
    "doctor": "Check data, backbone and options before training: the same flags as main.py; nothing is kept.",
    "preview": "Draw what the model will see of the first training clips: the same flags as main.py.",
}


def build_parser(script: str) -> Parser:
    """The parser of a script; its --help shows the options that the script reads, and the others are accepted too."""
    names = "".join(f"\n  {name:<12} backbones/{f'{name}-tiny':<18} {b.hub}" for name, b in BACKBONES.items())
    parser = Parser(
        prog=f"{script}.py",
        usage="%(prog)s [--flag value ...]",
        description=ABOUT[script],
        epilog=f"Flags override config_file.yaml. A bare --use_vlm means --use_vlm True.\n\n"
        f"short name     --weights tiny               --weights hub{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # defaults are suppressed, so that the result holds exactly what was typed
    parser.add_argument("--config", metavar="FILE", help=f"yaml file with defaults (default: {CONFIG_FILE.name})")
    groups: dict[str, Any] = {}
    texts = help_texts()
    for name, f in FIELDS.items():
        group = f.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        bare = {"nargs": "?", "const": "True"} if f.metadata["convert"] is to_bool else {}
        text = f"{texts[name]} (default: {f.default})".replace("%", "%%")
        text = text if script in f.metadata["scripts"] else argparse.SUPPRESS
        groups[group].add_argument(f"--{name}", metavar="VALUE", default=argparse.SUPPRESS, help=text, **bare)
    return parser


def parse(argv: list[str] | None, script: str) -> tuple[Config, set[str]]:
    """The options for a script and the names of those typed as flags.

    Raises:
        UserError: an unknown flag or key, a value of the wrong type, or an impossible combination.
    """
    args, unknown = build_parser(script).parse_known_args(argv)
    if unknown:
        raise UserError(unknown_flag(unknown[0].split("=")[0]))

    # default < yaml file < flag
    given = vars(args)
    path = given.pop("config", None)
    file = CONFIG_FILE if path is None else Path(path)
    values = read_yaml(file) if path is not None or file.is_file() else {}
    typed = {name: convert(name, value, "--") for name, value in given.items()}
    if script in TRAIN:
        refuse_foreign(script, typed)
    config = Config(**(values | typed))

    if config.checkpoint is None:  # else the run's own options decide
        config = check_options(config)
    if script == "inference" and config.video_dir is None and config.export is None:
        raise UserError("no input: add --video_dir <a video file, a folder of frames, or a folder of these>")
    return config, set(typed)


def unknown_flag(flag: str) -> str:
    if flag.removeprefix("--") in RETIRED:
        return f"{flag} is no longer an option: {RETIRED[flag.removeprefix('--')]}"
    what = "unknown flag" if flag.startswith("-") else "unexpected word"
    return f"{what} {shown(flag)}; {closest(flag, ['--config', *(f'--{name}' for name in FIELDS)])}"


def refuse_foreign(script: str, typed: dict[str, Any]) -> None:
    """Raises UserError for a flag that only scripts for trained runs, or another one, read."""
    for name in typed:
        readers = FIELDS[name].metadata["scripts"]
        if script not in readers and "main" not in readers:
            raise UserError(
                f"--{name} is not an option of {script}.py but of {' and '.join(f'{r}.py' for r in readers)}"
            )


# -- checks and defaults that depend on several options ---------------------------------------------


def check_options(config: Config) -> Config:
    """Fills in the language model and refuses impossible combinations, saying what to do."""
    # options of a language model without one would be ignored silently
    if not config.use_vlm:
        if config.captioning:
            raise UserError("--captioning True needs a language model: add --use_vlm True")
        for name in options_with("needs_vlm"):
            if getattr(config, name):
                raise UserError(f"--{name} needs --use_vlm True")
    elif config.language_model is None:
        config = replace(config, language_model="gpt2" if config.captioning else "bert")
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UserError("--tensorboard True needs tensorboardX: pip install -r requirements-extra.txt")
    refuse_classifier_options(config)
    check_backbone("vision_model", config.vision_model, "vision")
    if config.use_vlm:
        check_backbone("language_model", config.language_model, "decoder" if config.captioning else "encoder")
    run_name(config)  # before anything is read
    return config


def refuse_classifier_options(config: Config) -> None:
    """Raises UserError for options that mean nothing to a captioner."""
    for name in options_with("classifiers_only"):
        if config.captioning and getattr(config, name) != FIELDS[name].default:
            raise UserError(f"--{name} is for classifiers, not for captioners")


def check_backbone(option_name: str, name: str, kind: str) -> None:
    """Raises UserError for a short name of another kind, and for a word that is no name, folder or hub id."""
    known = BACKBONES.get(name)
    if known is None:
        # a word without a slash cannot be a hub id: most likely a short name with a typo
        if "/" not in name and not Path(name).is_dir():
            names = [n for n, b in BACKBONES.items() if (b.kind == "vision") == (kind == "vision")]
            raise UserError(
                f"--{option_name} {shown(name)} is neither a short name ({', '.join(names)}), a folder nor a hub id; "
                f"{closest(name, names)}"
            )
        return
    if known.kind == kind:
        return
    if (known.kind, kind) == ("encoder", "decoder"):
        raise UserError(f"captioning needs a causal language model such as gpt2, not {name}")
    if (known.kind, kind) == ("decoder", "encoder"):
        raise UserError(f"{name} writes captions: add --captioning True, or use --language_model bert to classify")
    raise UserError(f"--{option_name} cannot be {name}, a {known.kind} backbone")


def training_mode(config: Config) -> dict[str, str]:
    """How each backbone is trained, "full", "lora" or "frozen": {"vision": ..., "language": ...}."""
    modes = {"vision": "lora" if config.use_lora_vision else "frozen" if config.freeze_visionbackbone else "full"}
    if config.use_vlm:
        modes["language"] = "lora" if config.use_lora_llm else "frozen" if config.freeze_llmbackbone else "full"
    return modes


def default_rates(config: Config) -> tuple[float, dict[str, float]]:
    """(the peak learning rate of the least restricted backbone, the rate of each part as a multiple of it: "vision",
    "language" and "new layers")."""
    # a folder or a hub id counts as published weights
    kinds = {}
    for part, mode in training_mode(config).items():
        tiny = config.weights == "tiny" and getattr(config, f"{part}_model") in BACKBONES
        kinds[part] = ("tiny" if tiny else "hub", mode)
    rate, factor = LEARNING_RATES[min(kinds.values(), key=[*LEARNING_RATES].index)]
    return rate, {part: LEARNING_RATES[kind][0] / rate for part, kind in kinds.items()} | {"new layers": factor}


def fill_auto(config: Config, num_frames: int, image_size: int, batch_size: int = 16) -> Config:
    """Replaces every `auto` whose value depends on the model; num_frames and image_size are the backbone's own.

    What depends on the machine stays `auto` in a run's config.yaml: device, mixed_precision, cache_features, cache_dir.
    """
    values = {
        "num_frames": num_frames,
        "image_size": image_size,
        "batch_size": batch_size,
        "learning_rate": default_rates(config)[0],
    }
    return replace(config, **{name: value for name, value in values.items() if getattr(config, name) == "auto"})


def run_name(config: Config) -> str:
    """The name of the run's folder, by default made of the model options. Raises UserError if no folder in
    --output_dir can have it."""
    name = default_run_name(config) if config.run_name is None else config.run_name
    if name in ("", ".", "..") or re.search(r"[/\\]", name) or CONTROL.search(name):
        problem = "cannot be the name of a folder"
    elif len(os.fsencode(name)) > LONGEST_NAME:
        problem = f"is longer than {LONGEST_NAME} bytes"
    else:
        return name
    advice = "add --run_name <a name>" if config.run_name is None else "choose another --run_name"
    raise UserError(f"the run's name {shown(name)} {problem}; {advice}")


def default_run_name(config: Config) -> str:
    """For example timesformer_bert_text_fvbb_lorallm: backbones, task, how they are trained, weights."""
    parts = [Path(os.path.abspath(config.vision_model)).name]
    if config.use_vlm:
        parts.append(Path(os.path.abspath(config.language_model)).name)
        if config.captioning:
            parts.append("caption")
        elif config.use_text:
            parts.append("text")
    parts += [FIELDS[name].metadata["mark"] for name in options_with("mark") if getattr(config, name)]
    if config.weights == "hub" and (config.vision_model in BACKBONES or config.language_model in BACKBONES):
        parts.append("hub")
    return "_".join(parts)


def as_flags(config: Config) -> str:
    """The flags that name the run and differ from the defaults, as one would type them."""
    pairs = ((name, getattr(config, name)) for name in options_with("names_run"))
    return " ".join(f"--{name} {value}" for name, value in pairs if value not in (None, FIELDS[name].default))


if __name__ == "__main__":
    replace_file(CONFIG_FILE, lambda p: p.write_text(config_file_text(), encoding="utf-8"))
    print(f"wrote {CONFIG_FILE}")
