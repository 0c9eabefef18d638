"""Options: one definition, precedence, and errors that say how to fix them."""

import inspect
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import config
import inference
import main
from config import FIELDS, Config, as_flags, parse, run_name
from script import UserError

ROOT = Path(config.__file__).parent


def test_config_file_matches_the_dataclass():
    text = (ROOT / "config_file.yaml").read_text(encoding="utf-8")
    assert text == config.config_file_text(), "run python config.py"
    assert config.read_yaml(ROOT / "config_file.yaml") == {name: f.default for name, f in FIELDS.items()}
    assert yaml.safe_load(text).keys() == FIELDS.keys()


def test_precedence_and_converters(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 1e-3\ndropout: 0.5\nuse_vlm: true\nnum_frames: 4\n")
    parsed, typed = parse(["--config", str(file), "--dropout", "0", "--use_vlm", "False"], "main")
    assert (parsed.learning_rate, parsed.dropout, parsed.use_vlm, parsed.num_frames) == (1e-3, 0.0, False, 4)
    assert typed == {"dropout", "use_vlm"}
    assert parse(["--use_vlm", "--captioning"], "main")[0].language_model == "gpt2"
    assert parse(["--use_vlm"], "main")[0].language_model == "bert"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--lerning_rate", "1"], "unknown flag '--lerning_rate'; did you mean --learning_rate?"),
        (["--epoch", "1"], "unknown flag '--epoch'; did you mean --epochs?"),  # no abbreviations
        (["epochs", "1"], "unknown flag 'epochs'; did you mean --epochs?"),
        (["my_clips"], "unexpected word 'my_clips': every value needs its flag, for example --data_dir my_clips"),
        (["--epochs", "many"], "--epochs: expected auto or a whole number from 1 to 100000, not 'many'"),
        (["--epochs", "0"], "from 1 to 100000"),
        (["--dropout", "nan"], "from 0 to 0.9"),
        (["--use_vlm", "maybe"], "--use_vlm: expected True or False"),
        (["--num_frames", "some"], "auto or a whole number"),
        (["--image_size", "4"], "from 8 to 2048"),
        (["--device", "tpu"], "one of auto, cpu, cuda, mps"),
        (["--captioning", "True"], "add --use_vlm True"),
        (
            ["--captioning", "--use_vlm", "--language_model", "bert"],
            "captioning needs a causal language model such as gpt2",
        ),
        (["--use_vlm", "--language_model", "gpt2"], "add --captioning True"),
        (["--language_model", "bert"], "--language_model needs --use_vlm True"),
        (["--use_text"], "--use_text needs --use_vlm True"),
        (["--use_lora_llm"], "--use_lora_llm needs --use_vlm True"),
        (["--vision_model", "timesfomer"], "did you mean timesformer?"),
        (["--vision_model", "bert"], "cannot be bert"),
        (["--config", "nowhere.yaml"], "cannot read nowhere.yaml: No such file or directory"),
    ],
)
def test_errors_are_one_line_with_status_2(capsys, argv, message):
    assert main.main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err and out == ""


@pytest.mark.parametrize(
    "text, message",
    [
        ("lerning_rate: 1", "unknown key 'lerning_rate'; did you mean learning_rate?"),
        ("epochs: true", "epochs: expected auto or a whole number"),
        ("use_vlm: 3", "use_vlm: expected True or False"),
        ("- a", "expected lines of `key: value`"),
        ("a: [", "cannot read"),
        ("vision_model: [a]", "'vision_model': expected a single value"),
        ("? [a]\n: 1", "line 1: expected `key: value`"),
        ("epochs: 1\nepochs: 2", "epochs appears twice"),
        ("epochs: 2.7", "epochs: expected auto or a whole number from 1 to 100000, not '2.7'"),
        ("epochs: 1e1", "epochs: expected auto or a whole number"),
        ("epochs: 12:30:45", "epochs: expected auto or a whole number"),
        ("epochs: 2001-99-99", "epochs: expected auto or a whole number"),
        ("epochs:", "epochs: expected auto or a whole number"),
        ("epochs: " + "9" * 5000, "epochs: expected auto or a whole number"),
        ("num_beams: 1.9", "num_beams: expected a whole number"),
        ("learning_rate: .inf", "learning_rate: expected auto or a number above 0"),
        ("learning_rate: nan", "learning_rate: expected auto or a number above 0"),
        ("learning_rate: 0", "learning_rate: expected auto or a number above 0"),
        ("timeline: inf", "timeline: expected a number of at least 0"),
        ("epochs: !!int x", "epochs: expected auto or a whole number"),
        ("use_vlm: !!bool x", "use_vlm: expected True or False"),
        ("epochs: !!timestamp x", "line 1: 'epochs': expected a single value"),
        ("output_dir: !!python/object/apply:os.getcwd []", "line 1: 'output_dir': expected a single value"),
        ("output_dir: !!python/name:os.getcwd", "line 1: 'output_dir': expected a single value"),
        ("epochs: &a [*a]", "'epochs': expected a single value"),
        ("<<: {epochs: 1}", "'<<': expected a single value"),
        ("a: " + "[" * 1000, "nested too deep"),
        ("a: 1\n---\nb: 2", "single document"),
        ("# more\n" * 20_000, "larger than 100,000 bytes"),
        ("epochs: \0", "cannot read"),
        ('cache_dir: "a\\0"', "cache_dir: expected a path or name"),
        ('data_dir: "a\\0b"', "data_dir: expected a path or name"),
        ("output_dir: ''", "output_dir: expected a path or name that is not empty"),
        ('run_name: "\\ud800"', "run_name: expected a path or name"),
        ('run_name: "\\U00110000"', "cannot read"),
        ("x" * 900 + ": 1", "unknown key 'xxx"),
    ],
)
def test_yaml_errors_name_file_and_key(tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text(text)
    assert main.main(["--config", str(tmp_path / "c.yaml")]) == 2
    err = capsys.readouterr().err
    assert "c.yaml" in err and message in err and err.count("\n") == 1 and len(err) < 2000


def test_yaml_of_a_billion_items_is_refused_at_once(tmp_path):
    """Ten levels of ten references each: it must not be expanded, not even for the error message."""
    rows = [f" - &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 11)]
    (tmp_path / "c.yaml").write_text("\n".join(["epochs:", " - &a0 [x, x, x]", *rows]))
    with pytest.raises(UserError, match="line 1: 'epochs': expected a single value"):
        config.read_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize("data", [b"\x00\xff\xfe\x80 junk", b"epochs: \xff", b"%PDF-1.7\n\xe2\xe3"])
def test_binary_junk_is_refused_as_yaml(tmp_path, data):
    (tmp_path / "c.yaml").write_bytes(data)
    with pytest.raises(UserError, match=r"cannot read .*c\.yaml"):
        config.read_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("\ufeffepochs: 3", {"epochs": 3}),
        ("mixed_precision: no\ncache_features: true", {"mixed_precision": "no", "cache_features": "True"}),
        ("mixed_precision: 'Off'\ncache_features: No", {"mixed_precision": "no", "cache_features": "False"}),
        (
            "use_vlm: on\nflip: Off\nweights: HUB\ndevice: Auto",
            {"use_vlm": True, "flip": False, "weights": "hub", "device": "auto"},
        ),
        ("run_name:\noutput: ~\ntext_input: null", {"run_name": None, "output": None, "text_input": None}),
        (
            "text_input: 'null'\nrun_name: 1.50\ndata_dir: 2024-01-01",
            {"text_input": "null", "run_name": "1.50", "data_dir": "2024-01-01"},
        ),
        ("learning_rate: !!float 1e-3\nepochs: !!int 7", {"learning_rate": 1e-3, "epochs": 7}),
        ("dropout: &x .5\nlabel_smoothing: *x", {"dropout": 0.5, "label_smoothing": 0.5}),
    ],
)
def test_yaml_values_mean_what_the_option_says(tmp_path, text, expected):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    assert config.read_yaml(tmp_path / "c.yaml") == expected


def test_words_mean_the_same_in_yaml_and_as_flags():
    argv = ["--mixed_precision", "No", "--cache_features", "true", "--use_vlm", "ON", "--num_frames", "AUTO"]
    parsed, _ = parse(argv, "main")
    assert (parsed.mixed_precision, parsed.cache_features, parsed.use_vlm, parsed.num_frames) == (
        "no",
        "True",
        True,
        "auto",
    )


def test_options_of_earlier_runs_still_load():
    files = [*(ROOT / "checkpoints" / "provided").glob("*/config.yaml"), *(ROOT / "experiments").glob("*.yaml")]
    assert files
    for file in files:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert config.read_yaml(file) == {k: v for k, v in values.items() if k not in config.RETIRED}, file


@given(st.text(max_size=20), st.floats(1e-300, 1e300), st.sampled_from(["auto", "True", "False"]))
def test_written_options_are_read_back(tmp_path_factory, text, rate, word):
    values = asdict(Config(text_input=text, learning_rate=rate, cache_features=word, mixed_precision="no"))
    file = tmp_path_factory.mktemp("yaml") / "c.yaml"
    config.write_yaml(values, file)
    assert config.read_yaml(file) == values


@given(
    st.dictionaries(
        st.sampled_from(list(FIELDS)), st.text(max_size=8) | st.integers() | st.floats() | st.none() | st.booleans()
    )
)
def test_any_value_is_accepted_or_refused_with_a_message(tmp_path_factory, values):
    file = tmp_path_factory.mktemp("yaml") / "c.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    try:
        parse(["--config", str(file)], "main")
    except UserError as error:
        assert "\n" not in str(error)


@given(st.sampled_from(["--epochs", "--dropout", "--seed", "--learning_rate", "--num_frames"]), st.text(max_size=12))
def test_any_flag_value_is_accepted_or_refused_with_a_message(flag, value):
    try:
        parse([f"{flag}={value}"], "main")
    except UserError as error:
        assert flag in str(error)


def test_run_names():
    captioner = Config(
        use_vlm=True, captioning=True, language_model="gpt2", freeze_visionbackbone=True, use_lora_llm=True
    )
    assert run_name(captioner) == "timesformer_gpt2_caption_fvbb_lorallm"
    assert run_name(replace(captioner, use_text=True)) == run_name(captioner)
    classifier = Config(use_vlm=True, language_model="bert", use_text=True, weights="hub", freeze_llmbackbone=True)
    assert run_name(classifier) == "timesformer_bert_text_fllm_hub"
    assert run_name(Config(vision_model="some/folder/mine/", use_lora_vision=True)) == "mine_loravision"
    assert run_name(Config(run_name="x")) == "x"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../../x", "a\\b", "/", "a\0b", "a\x1b[2J", "é" * 101])
def test_a_run_name_that_cannot_be_a_folder_is_refused(tmp_path, capsys, name):
    assert main.main(["--run_name", name, "--output_dir", str(tmp_path / "runs")]) == 2
    err = capsys.readouterr().err
    assert "name" in err and err.count("\n") == 1 and "\x1b" not in err and not (tmp_path / "runs").exists()


def test_a_default_run_name_can_be_a_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "deep")
    assert run_name(Config(vision_model=".")) == "deep" and run_name(Config(vision_model="..")) == "mine"
    assert main.main(["--vision_model", "/"]) == 2
    assert "the run's name '' cannot be the name of a folder; add --run_name" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["data_dir", "output_dir", "cache_dir", "checkpoint", "output", "vision_model"])
@pytest.mark.parametrize("path", ["", "a\0b", "\x1b\0", "\ud800"])
def test_impossible_paths_are_refused(capsys, flag, path):
    assert main.main([f"--{flag}", path]) == 2
    err = capsys.readouterr().err
    assert f"--{flag}: expected a path or name" in err and err.count("\n") == 1 and "\x1b" not in err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--doctor"], "python doctor.py takes the same flags"),
        (["--evaluate", "x"], "python score.py --checkpoint"),
        (["--preview", "3"], "python preview.py --count"),
        (["--test_clips", "3"], "is an option of inference.py and score.py, not of main.py"),
        (["--top_k", "3"], "is an option of inference.py, not of main.py"),
    ],
)
def test_a_flag_of_another_script_names_that_script(argv, message, capsys):
    assert main.main(argv) == 2
    assert message in capsys.readouterr().err


def test_flags_of_a_run_make_that_run():
    given_flags = (
        "--vision_model videomae --language_model gpt2 --use_vlm True --captioning True --freeze_visionbackbone True"
    )
    parsed, _ = parse(given_flags.split(), "main")
    assert as_flags(parsed) == given_flags


def test_printed_commands_can_be_pasted():
    from runs import resume_command

    parsed, _ = parse(["--vision_model", "my models/a", "--output_dir", "my runs"], "main")
    assert parse(shlex.split(as_flags(parsed)), "main")[0].vision_model == "my models/a"
    for name in (None, "my run; it's new"):
        program, script, *flags = shlex.split(resume_command(replace(parsed, run_name=name)))
        again, _ = parse(flags, "main")
        assert (program, script) == ("python", "main.py")
        assert (again.run_name, again.output_dir, again.resume) == (name, parsed.output_dir, True)
    words = shlex.split(resume_command(parsed, processes=2))
    assert words[:5] == ["torchrun", "--standalone", "--nproc_per_node", "2", "main.py"]


def test_help_shows_only_what_a_script_reads_and_is_fast():
    for script in ("main", "sweep_heads", "inference", "score", "doctor", "preview", "extract"):
        text = subprocess.run(
            [sys.executable, f"{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for name, field in FIELDS.items():
            assert (f"--{name} " in text) == (script in field.metadata["scripts"]), name
        assert "facebook/timesformer-base-finetuned-k400" in text
    code = "import sys, main, sweep_heads, inference, score, doctor, preview, extract; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_option_is_read_somewhere():
    files = {*ROOT.glob("*.py"), *ROOT.glob("extras/*.py")} - {ROOT / "config.py"}
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    source += "".join(inspect.getsource(f) for f in (config.check_options, config.training_mode, config.run_name))
    assert not [n for n in FIELDS if not re.search(rf'\b(config|saved|given)\.{n}\b|"{n}"', source)]


def test_inference_without_videos_says_so(capsys):
    assert inference.main([]) == 2
    assert "--video_dir" in capsys.readouterr().err
