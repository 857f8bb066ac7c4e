"""acorn/settings.py: the precedence of settings, and the errors for invalid ones."""

import re
import subprocess
import sys
from dataclasses import dataclass, field, fields
from typing import Literal

import pytest
from helpers import REPO

from acorn import UserError, serve
from acorn.settings import BOUNDS, build, check_bounds, parse
from sample import SampleSettings
from train import TrainSettings


@dataclass
class Settings:
    """Settings for these tests."""

    out_dir: str = "out"  # where things go
    max_iters: int = 10  # updates
    learning_rate: float = 6e-4  # the highest
    bias: bool = False  # biases
    compile: Literal["auto", True, False] = "auto"  # compiled
    stop: list[str] = field(default_factory=list)  # texts to end at


def test_command_line_overrides_file_overrides_defaults(tmp_path):
    config = tmp_path / "c.py"
    config.write_text("import time\nfrom math import sqrt\n_half = 3\nmax_iters = 2 * _half\nout_dir = 'from-file'\n")
    given = parse(Settings, [str(config), "--out_dir=from-line"])
    assert given == {"max_iters": 6, "out_dir": "from-line"}
    assert build(Settings, given) == Settings(out_dir="from-line", max_iters=6)


@pytest.mark.parametrize("at", range(5))
def test_the_command_line_wins_at_any_position_of_the_file(tmp_path, at):
    config = tmp_path / "c.py"
    config.write_text("max_iters = 6\nout_dir = 'from-file'\nstop = ['file']\nlearning_rate = 0.5\n")
    words = ["--out_dir=from-line", "--stop=a", "--max_iters=1", "--stop=b"]
    words.insert(at, str(config))
    given = parse(Settings, words)
    assert given == {"out_dir": "from-line", "max_iters": 1, "stop": ["a", "b"], "learning_rate": 0.5}


def test_a_later_config_file_overrides_an_earlier_one(tmp_path):
    for name, text in (("a.py", "max_iters = 1\nout_dir = 'a'\nstop = ['a']"), ("b.py", "max_iters = 2\nstop = ['b']")):
        (tmp_path / name).write_text(text)
    assert parse(Settings, [str(tmp_path / "a.py"), "--bias", str(tmp_path / "b.py")]) == {
        "max_iters": 2,
        "out_dir": "a",
        "stop": ["b"],
        "bias": True,
    }


@pytest.mark.parametrize(
    "word, name, value",
    [
        ("--out_dir=a=b", "out_dir", "a=b"),
        ("--out_dir=", "out_dir", ""),
        ("--out_dir=-5", "out_dir", "-5"),
        ("--out-dir=x", "out_dir", "x"),
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--learning_rate=3e-4", "learning_rate", 3e-4),
        ("--max_iters=1e3", "max_iters", 1000),
        ("--max_iters=600_000", "max_iters", 600000),
        ("--bias=True", "bias", True),
        ("--bias=false", "bias", False),
        ("--bias", "bias", True),
        ("--compile=False", "compile", False),
        ("--compile=auto", "compile", "auto"),
    ],
)
def test_command_line_values_are_converted(word, name, value):
    given = parse(Settings, [word])
    assert given == {name: value} and type(given[name]) is type(value)


def test_a_value_can_be_a_separate_word():
    assert parse(Settings, ["--max_iters", "5", "--out_dir", "x"]) == {"max_iters": 5, "out_dir": "x"}


def test_repeated_list_options_accumulate_and_override_the_file(tmp_path):
    config = tmp_path / "c.py"
    config.write_text("stop = ['file']\nlearning_rate = 1\n")
    given = parse(Settings, [str(config), "--stop=a", "--stop=b"])
    assert given["stop"] == ["a", "b"]
    assert type(given["learning_rate"]) is float  # an int is accepted for a float


@pytest.mark.parametrize(
    "word, said",
    [
        ("--max_itres=3", "Did you mean 'max_iters'"),
        ("--max_iters=3.5", "an integer"),
        ("--max_iters=many", "an integer"),
        ("--max_iters=True", "an integer"),
        ("--learning_rate=nan", "a number"),
        ("--learning_rate=fast", "a number"),
        ("--bias=maybe", "True or False"),
        ("--compile=perhaps", "one of auto, True, False"),
        ("--max_iters", "has no value"),
        ("-x", "neither a config file"),
        ("config/quickstrat.py", "config/quickstart.py"),
        ("nothing.py", "there is no config file nothing.py"),
    ],
)
def test_command_line_errors_say_what_is_valid(word, said):
    with pytest.raises(UserError, match=said):
        parse(Settings, [word])


@pytest.mark.parametrize(
    "text, said",
    [
        ("max_itres = 3", "Did you mean 'max_iters'"),
        ("max_iters = '3x'", "an integer"),
        ("bias = 1.5", "True or False"),
        ("out_dir = 3", "a string"),
        ("max_iters = 3\nout_dir = undefined\n", "line 2: NameError"),
        ("max_iters = = 3", "line 1: SyntaxError"),
        ("import sys\nsys.exit(3)", "line 2: SystemExit: 3"),
    ],
)
def test_config_file_errors_name_the_file(tmp_path, text, said):
    config = tmp_path / "wrong.py"
    config.write_text(text)
    with pytest.raises(UserError, match=said) as refusal:
        parse(Settings, [str(config)])
    assert "wrong.py" in str(refusal.value)


def test_repo_config_files_are_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(TrainSettings, ["config/train_gpt2.py"])["gradient_accumulation_steps"] == 40


@pytest.mark.parametrize("path", sorted((REPO / "config").glob("*.py")), ids=lambda path: path.stem)
def test_repo_config_files_have_valid_settings(path):
    check_bounds(parse(TrainSettings, [str(path)]))


def test_a_config_file_can_import_another_one():
    first, second = (parse(TrainSettings, [f"config/shakespeare_{name}.py"]) for name in ("best", "student"))
    assert {**first, **second} == second
    assert (first["out_dir"], second["out_dir"]) == ("out/shakespeare_best", "out/shakespeare_student")


def test_help_lists_every_field_with_its_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Settings, ["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    for words in (
        "--out_dir",
        "where things go",
        "--max_iters",
        "the highest",
        "--bias",
        "compiled",
        "texts to end at",
    ):
        assert words in text


@pytest.mark.parametrize("cls", [TrainSettings, SampleSettings, serve.ServeSettings])
def test_help_explains_every_setting(cls, capsys):
    with pytest.raises(SystemExit):
        parse(cls, ["--help"])
    text = capsys.readouterr().out
    assert re.findall(r"^  --(\w+) ", text, re.MULTILINE) == [field.name for field in fields(cls)]
    assert text.count("(default:") == len(fields(cls))
    assert not re.findall(r"(--\w+) \S+\s+\(default: ", text)


def test_help_has_the_sections_of_the_settings(capsys):
    with pytest.raises(SystemExit):
        parse(TrainSettings, ["--help"])
    text = capsys.readouterr().out
    model = text[text.index("\nmodel:\n") : text.index("\nobjective")]
    assert "--n_layer" in model and "--embedding_skip" in model and "--optimizer" not in model


def test_build_ignores_unknown_names():
    assert build(Settings, {"max_iters": 3, "from_the_future": 1}) == Settings(max_iters=3)


def test_help_shows_line_breaks_and_lists_as_they_are_typed(capsys):
    with pytest.raises(SystemExit):
        parse(SampleSettings, ["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert r"(default: '\n')" in words and "--stop STR end" in words


def test_help_shows_the_command_of_a_module():
    words = [sys.executable, "-m", "acorn.serve", "--help"]
    result = subprocess.run(words, cwd=REPO, capture_output=True, text=True, timeout=100)
    assert result.stdout.startswith("usage: python -m acorn.serve ")


def test_help_starts_without_heavy_imports():
    """The heavy modules take longer to import than torch."""
    program = """
import contextlib, runpy, sys
import torch
at_start = set(sys.modules)
for script in ("train.py", "sample.py"):
    sys.argv = [script, "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
print(*sorted(set(sys.modules) - at_start), file=sys.stderr)
"""
    words = [sys.executable, "-c", program]
    result = subprocess.run(words, cwd=REPO, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert "--eval_interval" in result.stdout and "--top_k" in result.stdout
    imported = result.stderr.split()
    assert "acorn.checkpoint" in imported
    slow = "torch.distributed.tensor torch.distributed.fsdp torch._dynamo torch._inductor sympy triton matplotlib "
    slow += "datasets transformers tokenizers tiktoken fastokens wandb pandas pyarrow scipy"
    assert not set(slow.split()) & set(imported)


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("batch_size", [1, 512], [0, -1]),
        ("temperature", [0, 0.0, 3.5], [-1e-9]),
        ("dropout", [0, 0.999], [1, -0.1]),
        ("attn_dropout", [-1, 0, 0.999], [1, -0.5]),
        ("top_p", [1e-9, 1], [0, 1.001]),
        ("min_p", [0, 1], [-0.1, 1.1]),
        ("seed", [0, 2**62 - 1], [-1, 2**62]),
        ("val_fraction", [0.1, 0.999], [0, 1, float("nan")]),
        ("max_tokens", [None, 8], [7, 0]),
    ],
)
def test_bounds_are_exact(name, inside, outside):
    for value in inside:
        check_bounds({name: value, "unknown": -5})
    for value in outside:
        with pytest.raises(UserError, match=name):
            check_bounds({name: value})


def test_no_setting_has_bounds_twice():
    names = [name for _, _, group in BOUNDS for name in group.split()]
    assert sorted(set(names)) == sorted(names)
