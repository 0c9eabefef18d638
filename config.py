"""Every option once: name, type, default, help, group, and which script reads it. Imports no torch.

    config, typed = parse(argv, script="main")

Precedence: the default below < config_file.yaml < a flag. A yaml file gives texts, as the command line does; the
options' converters alone say what they mean.
"""

import argparse
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from script import Parser, UserError, replace_file, shown

ROOT = Path(__file__).resolve().parent  # where backbones/ and config_file.yaml lie
CONFIG_FILE = ROOT / "config_file.yaml"


LARGEST_YAML = 100_000  # bytes
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}


class Backbone(NamedTuple):
    """Where one of the four short names leads: a folder of this repository, or a hub id."""

    kind: str  # vision | encoder (BERT-like) | decoder (causal)
    tiny: str
    hub: str
    revision: str  # a commit, so that what is published later changes nothing
    trained_on: str  # what --weights tiny has seen


BACKBONES = {
    "timesformer": Backbone(
        "vision",
        "backbones/timesformer-tiny",
        "facebook/timesformer-base-finetuned-k400",
        "8aaf40ea7d3d282dcb0a5dea01a198320d15d6c0",
        "synthetic shapes",
    ),
    "videomae": Backbone(
        "vision",
        "backbones/videomae-tiny",
        "MCG-NJU/videomae-base-finetuned-kinetics",
        "488eb9a0565f257b32866000305c8178965eb9f6",
        "synthetic shapes",
    ),
    "bert": Backbone(
        "encoder",
        "backbones/bert-tiny",
        "google-bert/bert-base-uncased",
        "86b5e0934494bd15c9632b12f734a8a67f723594",
        "captions of synthetic shapes",
    ),
    "gpt2": Backbone(
        "decoder",
        "backbones/gpt2-tiny",
        "openai-community/gpt2",
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "captions of synthetic shapes",
    ),
}
HUB_TABLE = ", ".join(f"{name} = {b.hub}@{b.revision[:7]}" for name, b in BACKBONES.items())
TEXT_EXAMPLE = "a note says: it goes sideways"  # a text of the dummy dataset (dummy_data.HINTS)


# -- converters: str -> value, raising ValueError with what is allowed ------------------------------


WORDS = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
LONGEST_NAME = 200  # bytes; file systems take 255, and a temporary file's name adds some


def to_bool(text: str) -> bool:
    """True or False, in any case; argparse's type=bool would read 'False' as True."""
    return one_of("True", "False")(text) == "True"


def one_of(*choices: str) -> Callable[[str], str]:
    """A converter that ignores case and takes yes, on and true (no, off and false) for one another."""

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
    """A file, a folder or a hub id: anything that a file's name can hold."""
    try:
        os.fsencode(text)
    except ValueError:
        raise ValueError("a path or name") from None
    if not text or "\0" in text:
        raise ValueError("a path or name, not empty and without NUL")
    return text


# -- the options ------------------------------------------------------------------------------------

BOTH, TRAIN, INFER = "main inference", "main", "inference"


def option(default: Any, convert: Callable[[str], Any], group: str, scripts: str, help: str) -> Any:
    return field(default=default, metadata={"convert": convert, "group": group, "scripts": scripts, "help": help})


@dataclass(frozen=True)
class Config:
    """All options of main.py and inference.py; `None` stands for 'not given'."""

    # one option a line
    # fmt: off
    # model
    vision_model: str = option("timesformer", path_value, "model", BOTH, "video backbone: timesformer, videomae, a local folder written by save_pretrained, or a hub id of either family")
    language_model: str | None = option(None, path_value, "model", BOTH, "language backbone, with --use_vlm True: bert (classification) or gpt2 (captioning), or a folder or hub id of such a model")
    use_vlm: bool = option(False, to_bool, "model", BOTH, "join a language model to the video backbone")
    captioning: bool = option(False, to_bool, "model", BOTH, "write a caption instead of naming a class; needs --use_vlm True")
    use_text: bool = option(False, to_bool, "model", BOTH, "classification: the clip's own text is an input beside its frames; captioning: captions are the targets either way")
    weights: str = option("tiny", one_of("tiny", "hub"), "model", BOTH, f"where the short names lead: tiny = the folders in backbones/, which know synthetic shapes only; hub = {HUB_TABLE}. Take hub for real videos")
    token_grid: int = option(2, number(int, 1, 32), "model", TRAIN, "language models read this many x this many pooled video tokens per time step; more keeps finer detail and costs memory")
    max_text_tokens: int = option(128, number(int, 1, 100_000), "model", TRAIN, "longest text or caption that is read, in tokens; the rest is cut, which is said. The language model's positions bound it too")
    dropout: float = option(0.1, number(float, 0, 0.9), "model", TRAIN, "before the new head, and inside the projector; raise it when val falls behind train")
    # what is trained
    freeze_visionbackbone: bool = option(False, to_bool, "what is trained", BOTH, "keep the video backbone as it is: fast, little memory, good for small sets")
    freeze_llmbackbone: bool = option(False, to_bool, "what is trained", BOTH, "keep the language backbone as it is")
    use_lora_vision: bool = option(False, to_bool, "what is trained", BOTH, "train low-rank adapters in the video backbone, its own weights frozen")
    use_lora_llm: bool = option(False, to_bool, "what is trained", BOTH, "train low-rank adapters in the language backbone, its own weights frozen")
    lora_r: int = option(16, number(int, 1, 1024), "what is trained", TRAIN, "rank of the adapters (alpha is twice this); 8 to 64, larger for larger sets")
    # data
    data_dir: str = option("synthetic_dataset", path_value, "data", TRAIN, "folder with train/, test/ and perhaps val/, each with one folder per class or a metadata.jsonl")
    num_frames: int | str = option("auto", auto_or(number(int, 1, 1024)), "data", TRAIN, "frames taken from each video; auto = what the backbone was trained with. More frames see finer motion and cost time")
    image_size: int | str = option("auto", auto_or(number(int, 8, 2048)), "data", TRAIN, "height and width in pixels that the backbone sees; auto = what it was trained with")
    frame_stride: int = option(0, number(int, 0, 1000), "data", TRAIN, "0 spreads the frames over the whole video; S > 0 takes every S-th frame of one window, the middle one at evaluation")
    cache_features: str = option("auto", one_of("auto", "True", "False"), "data", TRAIN, "compute what a frozen vision backbone says of each video once, and let every epoch and every later run read that. Frames are then the middle ones in training too, not jittered. auto: where the backbone is frozen and clips are not changed at random")
    cache_dir: str = option("auto", path_value, "data", TRAIN, "folder of such features, which may be removed at any time; auto: .features in --output_dir")
    skip_unreadable: bool = option(False, to_bool, "data", TRAIN, "leave out videos that cannot be read, counted and listed in metrics.json, instead of stopping with an error")
    augment: str = option("none", one_of("none", "light", "strong"), "data", TRAIN, "random changes of training clips, the same for all frames of one: light = mild crop and erasing; strong = wider crop, RandAugment without rotation or flip, colour jitter and, for classifiers that read no text, mixup and cutmix (needs kornia: requirements-extra.txt). For small sets; strong hides colours that captions name")
    flip: bool = option(False, to_bool, "data", TRAIN, "mirror half of the training clips; not where left and right matter, as in 'moving left'")
    class_balance: bool = option(False, to_bool, "data", TRAIN, "draw equally many clips of every class in each epoch: small classes repeat theirs with other frames, large ones take turns")
    # training
    epochs: int = option(10, number(int, 1, 100_000), "training", TRAIN, "passes over the training videos; the best on val is kept")
    batch_size: int | str = option("auto", auto_or(number(int, 1, 65_536)), "training", BOTH, "clips per step; lower it when memory runs out. auto: 16, at inference 8")
    learning_rate: float | str = option("auto", auto_or(number(float, 0, above=True)), "training", TRAIN, "peak learning rate, reached after a tenth of the steps, cosine to zero after; auto: the table in README.md, by the weights and by what is trained. It is the rate of the backbone with the fewest restrictions; the other one and new layers follow in the table's proportions")
    weight_decay: float = option(0.05, number(float, 0), "training", TRAIN, "AdamW's, on the weights of layers and words; not on adapters, biases, norms, CLS, position and time embeddings")
    layer_decay: float = option(1.0, number(float, 0.1, 1), "training", TRAIN, "each layer of a backbone learns by this factor slower than the one above it; 0.65 to 0.9 keeps more of what a backbone knows when it is trained in full")
    label_smoothing: float = option(0.0, number(float, 0, 0.9), "training", TRAIN, "share of each target that is spread over all classes (or words); 0.1 tempers overconfidence")
    patience: int = option(0, number(int, 0), "training", TRAIN, "stop when val has not improved for this many epochs; 0: never")
    gradient_accumulation_steps: int = option(1, number(int, 1, 65_536), "training", TRAIN, "batches per optimizer step: N with --batch_size B trains as N x B would, in the memory of B")
    gradient_checkpointing: bool = option(False, to_bool, "training", TRAIN, "recompute activations in the backward pass: less memory, about a third slower")
    compile: bool = option(False, to_bool, "training", TRAIN, "torch.compile the backbones: a slow first step, faster ones after it; for long trainings on a GPU. Needs a C++ compiler")
    seed: int = option(0, number(int, 0, 2**31 - 1), "training", TRAIN, "of new layers, sampling, dropout and order; the val split does not depend on it")
    # inference
    video_dir: str | None = option(None, path_value, "inference", INFER, "what to answer for: a video file, a folder of frames, a .pt, or a folder of any of these")
    text_input: str | None = option(None, text_value, "inference", INFER, f"the text of every clip, for a classifier trained with --use_text True, e.g. '{TEXT_EXAMPLE}'; or give each clip its text in a metadata.jsonl in --video_dir")
    top_k: int = option(3, number(int, 1), "inference", INFER, "how many classes to print with their scores")
    test_clips: int = option(1, number(int, 1, 100), "inference", BOTH, "classifiers: average the answers for this many clips of each test video, at other times")
    test_crops: int = option(1, number(int, 1, 10), "inference", BOTH, "and for this many crops of each, along the longer side of the picture; papers take 3 clips or more x 3 crops")
    max_new_tokens: int = option(40, number(int, 1, 4096), "inference", BOTH, "longest caption, in tokens")
    num_beams: int = option(1, number(int, 1, 64), "inference", BOTH, "1 writes captions greedily; 3 to 5 searches wider and is slower")
    timeline: float = option(0.0, number(float, 0), "inference", INFER, "answer for every SECONDS of a long video instead of once for all of it; 0: once")
    output: str | None = option(None, path_value, "inference", INFER, "also write the answers to this file, one JSON object per line; a file begun by the same run is gone on with, videos that it answers are skipped")
    export: str | None = option(None, path_value, "inference", INFER, "write the run to this folder for other programs: a classifier as a merged Hugging Face model, adapters as peft folders")
    # run and machine
    checkpoint: str | None = option(None, path_value, "run and machine", INFER, "folder of a run to load; it says itself what it is, no other flag is needed")
    run_name: str | None = option(None, path_value, "run and machine", BOTH, "name of the run's folder; by default made of the flags above")
    output_dir: str = option("checkpoints", path_value, "run and machine", BOTH, "folder of all runs")
    overwrite: bool = option(False, to_bool, "run and machine", TRAIN, "replace an existing run of this name")
    resume: bool = option(False, to_bool, "run and machine", TRAIN, "go on with a run that was stopped, from its last saved step, exactly as if it had not been; the run's own options are in force")
    doctor: bool = option(False, to_bool, "run and machine", TRAIN, "check data, backbone, adapters, first loss and whether a batch can be learned by heart, print a table, train nothing; exit status 1 if a check fails")
    evaluate: str | None = option(None, path_value, "run and machine", TRAIN, "folder of a run to score anew on val and test, with its own options, instead of training; its metrics.json, predictions and pictures are written anew. With another --data_dir they go to evaluation_<name of that> in it")
    controls: bool = option(False, to_bool, "run and machine", TRAIN, "also score the model on frames repeated, shuffled and reversed, on blank video and on other texts, beside the majority class and the nearest neighbour, and say how much it uses motion and text")
    tensorboard: bool = option(False, to_bool, "run and machine", TRAIN, "also write the log for TensorBoard, to the run's folder (needs tensorboardX: requirements-extra.txt)")
    preview: int = option(0, number(int, 0, 200), "run and machine", TRAIN, "write a picture of what the model will see of this many training clips, with labels or captions, and train nothing")
    save_every: int = option(0, number(int, 0), "run and machine", TRAIN, "save what --resume needs every N optimizer steps too; 0: after each epoch, and when the run is stopped with Ctrl-C or SIGTERM")
    device: str = option("auto", one_of("auto", "cpu", "cuda", "mps"), "run and machine", BOTH, "auto: cuda, else mps, else cpu")
    mixed_precision: str = option("auto", one_of("auto", "no", "bf16", "fp16"), "run and machine", BOTH, "auto: bf16 on a GPU that has it, else no")
    num_workers: int = option(2, number(int, 0, 256), "run and machine", BOTH, "processes that decode videos beside the model; 0 decodes in turn")
    # fmt: on


FIELDS = {f.name: f for f in fields(Config)}
#: the options that make a run's name, and that a checkpoint is checked against when they are typed
NAMING = (
    "vision_model",
    "language_model",
    "use_vlm",
    "captioning",
    "use_text",
    "weights",
    "freeze_visionbackbone",
    "freeze_llmbackbone",
    "use_lora_vision",
    "use_lora_llm",
)


def convert(name: str, text: str | None, where: str) -> Any:
    """`text` (from a flag or yaml) through the option's converter; None is kept where it is the default."""
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
        if key not in FIELDS:
            raise UserError(f"{path}: unknown key {shown(key)}; {closest(key, list(FIELDS))}")
        if key in values:
            raise UserError(f"{path}: {key} stands twice")
        values[key] = convert(key, value, f"{path}: ")
    return values


def yaml_pairs(path: Path) -> Iterator[tuple[str, str | None]]:
    """Each key and value of a yaml file as text; a value is None where it is null, ~ or nothing.

    Nothing is constructed: a list, a map, or a tag that asks for more than plain values is refused as it stands.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_YAML + 1)
        if len(data) > LARGEST_YAML:
            raise ValueError(f"it is larger than {LARGEST_YAML:,} bytes")
        root = yaml.compose(data, Loader=yaml.BaseLoader)
    except RecursionError:
        raise UserError(f"cannot read {path}: it is nested too deep") from None
    except (OSError, ValueError, OverflowError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode | None):
        raise UserError(f"{path}: expected lines of `key: value`")
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


def build_parser(script: str) -> Parser:
    """The parser of main.py or inference.py. Both accept every flag, so that a run's flags can be typed
    again at inference; --help shows the ones that the script reads."""
    about = {
        "main": "Train a video classifier, a video + language classifier or a video captioner.",
        "inference": "Answer for videos with a trained run.",
    }
    parser = Parser(
        prog=f"{script}.py",
        usage="%(prog)s [--flag value ...]",
        description=about[script],
        allow_abbrev=False,
        epilog="Flags override config_file.yaml. A bare --use_vlm means --use_vlm True. Examples: README.md.",
    )
    parser.add_argument("--config", metavar="FILE", help=f"yaml file with defaults (default: {CONFIG_FILE.name})")
    groups: dict[str, Any] = {}
    for name, option_field in FIELDS.items():
        meta = option_field.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        listed = script in meta["scripts"].split()
        text = f"{meta['help']} (default: {option_field.default})".replace("%", "%%")
        bare = {"nargs": "?", "const": "True"} if meta["convert"] is to_bool else {}
        groups[meta["group"]].add_argument(
            f"--{name}", metavar="VALUE", default=argparse.SUPPRESS, help=text if listed else argparse.SUPPRESS, **bare
        )
    return parser


def parse(argv: list[str] | None, script: str) -> tuple[Config, set[str]]:
    """The options for `script` ("main" or "inference") and the names of those typed as flags.

    Raises:
        UserError: an unknown flag or key, a value of the wrong type, or an impossible combination.
    """
    parser = build_parser(script)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        known = ["--config", *(f"--{name}" for name in FIELDS)]
        what = "unknown flag" if flag.startswith("-") else "unexpected word"
        raise UserError(f"{what} {shown(flag)}; {closest(flag, known)}")
    given = vars(args)
    path = given.pop("config", None)
    file = CONFIG_FILE if path is None else Path(path)
    values = read_yaml(file) if path is not None or file.is_file() else {}
    typed = {name: convert(name, value, "--") for name, value in given.items()}
    config = Config(**(values | typed))
    if config.checkpoint is None and config.evaluate is None:  # a checkpoint says itself what it is
        config = complete(config)
    if script == "inference" and config.video_dir is None and config.export is None:
        raise UserError("say what to answer for: --video_dir <a video file, a folder of frames, or a folder of these>")
    return config, set(typed)


def family(name: str) -> Backbone | None:
    """The table's row of a short name; None for a folder or hub id."""
    return BACKBONES.get(name)


def complete(config: Config) -> Config:
    """Fills in the language model and refuses impossible combinations, saying what to do."""
    if not config.use_vlm:
        if config.captioning:
            raise UserError("--captioning True needs a language model: add --use_vlm True")
        for name in ("language_model", "use_text", "use_lora_llm", "freeze_llmbackbone"):
            if getattr(config, name):
                raise UserError(f"--{name} needs --use_vlm True")
    elif config.language_model is None:
        config = replace(config, language_model="gpt2" if config.captioning else "bert")
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UserError("--tensorboard True needs tensorboardX: pip install -r requirements-extra.txt")
    check_for_classifiers(config)
    check_backbone("vision_model", config.vision_model, "vision")
    if config.use_vlm:
        check_backbone("language_model", config.language_model, "decoder" if config.captioning else "encoder")
    run_name(config)  # before anything is read
    return config


def check_for_classifiers(config: Config) -> None:
    """Raises UserError for options that say nothing to a captioner."""
    for name in ("test_clips", "test_crops", "class_balance"):
        if config.captioning and getattr(config, name) != FIELDS[name].default:
            raise UserError(f"--{name} is for classifiers, not for captions")


def check_backbone(option_name: str, name: str, wanted: str) -> None:
    """A short name must be of the wanted kind; a word that is neither a name, a folder nor a hub id is refused."""
    known = family(name)
    if known is None:
        if "/" not in name and not Path(name).is_dir():
            names = [n for n, b in BACKBONES.items() if (b.kind == "vision") == (wanted == "vision")]
            raise UserError(
                f"--{option_name} {shown(name)} is no short name ({', '.join(names)}), no folder and no hub id; {closest(name, names)}"
            )
        return
    if known.kind == wanted:
        return
    advice = {
        ("encoder", "decoder"): f"captioning needs a causal language model such as gpt2, not {name}",
        (
            "decoder",
            "encoder",
        ): f"{name} writes captions: add --captioning True, or take --language_model bert to classify",
    }
    message = advice.get((known.kind, wanted), f"--{option_name} cannot be {name}, a {known.kind} backbone")
    raise UserError(message)


def run_name(config: Config) -> str:
    """The run's folder, by default made of vision model, language model, captioning, text, what is frozen, what has
    LoRA, hub. Raises UserError for a name that cannot be a folder in --output_dir."""
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
    parts = [Path(os.path.abspath(config.vision_model)).name]
    if config.use_vlm:
        parts.append(Path(os.path.abspath(config.language_model)).name)
        if config.captioning:
            parts.append("caption")
        elif config.use_text:
            parts.append("text")
    marks = {
        "freeze_visionbackbone": "fvbb",
        "freeze_llmbackbone": "fllm",
        "use_lora_vision": "loravision",
        "use_lora_llm": "lorallm",
    }
    parts += [mark for name, mark in marks.items() if getattr(config, name)]
    if config.weights == "hub" and (config.vision_model in BACKBONES or config.language_model in BACKBONES):
        parts.append("hub")
    return "_".join(parts)


def as_flags(config: Config) -> str:
    """The naming flags that differ from the defaults, as one would type them."""
    pairs = ((name, getattr(config, name)) for name in NAMING)
    return " ".join(f"--{name} {value}" for name, value in pairs if value not in (None, FIELDS[name].default))


def write_yaml(values: dict[str, Any], path: Path) -> None:
    # other letters than ASCII are escaped: yaml would take U+0085 and U+2028 in a text for line breaks
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def config_file_text() -> str:
    """config_file.yaml: every option with its default and its help; `python config.py` writes it."""
    lines = ["# Every option with its default. A flag of the same name overrides a line here."]
    group = None
    for name, option_field in FIELDS.items():
        if option_field.metadata["group"] != group:
            group = option_field.metadata["group"]
            lines += ["", f"# {group}"]
        value = yaml.safe_dump(option_field.default).splitlines()[0]
        lines.append(f"{name}: {value}  # {option_field.metadata['help']}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    replace_file(CONFIG_FILE, lambda p: p.write_text(config_file_text(), encoding="utf-8"))
    print(f"wrote {CONFIG_FILE}")
