"""README and docs/: the quoted code exists, and commands, links and figures are valid."""

import argparse
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
from helpers import REPO

import sample
import train
from acorn import examples, hub, report, serve, settings
from acorn.data.corpora import prepare_command
from acorn.evaluation import tasks
from acorn.inference import pictures
from prepare import __main__ as prepare


def code_lines(page: str) -> list[str]:
    """Return the lines of a page's Python blocks."""
    text = (REPO / "docs" / page).read_text(encoding="utf-8")
    return [line.strip() for block in re.findall(r"```python\n(.*?)```", text, re.S) for line in block.splitlines()]


def test_model_page_quotes_existing_lines():
    quoted = code_lines("how-the-model-works.md")
    lines = {line.strip() for line in (REPO / "model.py").read_text(encoding="utf-8").splitlines()}
    assert len(quoted) > 15
    for line in quoted:
        assert any(line.split("  # ")[0] == own.split("  # ")[0] for own in lines), line


def test_preferences_page_quotes_existing_lines():
    files = [REPO / "acorn" / "training" / "losses.py", REPO / "config" / "grpo_arithmetic.py"]
    lines = {line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()}
    quoted = code_lines("preferences.md")
    assert len(quoted) > 5 and set(quoted) <= lines, set(quoted) - lines


@pytest.mark.parametrize(("n_vocab", "loss"), [(78, "4.36"), (50257, "10.82")])
def test_model_page_gives_the_loss_of_a_uniform_prediction(n_vocab, loss):
    assert f"{math.log(n_vocab):.2f}" == loss
    assert loss in (REPO / "docs" / "how-the-model-works.md").read_text(encoding="utf-8")


def test_tables_of_both_readmes_have_the_same_figures():
    tables = []
    for name in ("README.md", "README.zh-CN.md"):
        text = (REPO / name).read_text(encoding="utf-8")
        rows = [line.split("|")[2:] for line in text.splitlines() if line.startswith("|") and "AVX" not in line]
        tables.append([re.findall(r"\d[\d.]*", "|".join(row)) for row in rows])
    english, chinese = ([row for row in table if len(row) > 1] for table in tables)
    assert len(english) > 4 and english == chinese


PAGES = sorted([*REPO.glob("README*.md"), *(REPO / "docs").glob("*.md")])


def commands(page: Path) -> list[list[str]]:
    """Return the commands in a page's shell blocks as lists of words, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    text = re.sub(r"\$'([^']*)'", lambda quoted: f"'{quoted[1]}'", text)  # shlex does not know $'...'
    parsed = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words for words in parsed if words]


class Parsed(Exception):
    pass


def parse(words: list[str], monkeypatch) -> None:
    """Parse a command as the script would. Raises an exception for unknown words."""
    known = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self, *args, **kwargs):
        _, unknown = known(self, *args, **kwargs)
        assert not unknown
        raise Parsed  # a subcommand's parser gets here first, with all words

    script, *rest = words
    if script == "train.py":
        settings.parse(train.TrainSettings, rest)
    elif script == "sample.py":
        settings.parse(sample.SampleSettings, rest)
    elif script == "acorn.serve":
        settings.parse(serve.ServeSettings, rest)
    else:
        mains = {"prepare": prepare.main, "acorn.evaluate": tasks.main, "acorn.hub": hub.main}
        mains |= {"acorn.report": report.main, "acorn.examples": examples.main}
        mains |= {"acorn.inspect": pictures.main}
        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
            patch.setattr(sys, "argv", words)
            mains[script]()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_each_page_are_valid(page, monkeypatch):
    monkeypatch.chdir(REPO)
    n_parsed = 0
    for words in commands(page):
        while words and words[0] != "python":  # skip torchrun and its options
            words = words[1:]
        words = [word for word in words[1:] if word != "-m"]
        if not words or "--help" in words or words[0].startswith("llama.cpp") or "config/x.py" in words:
            continue
        parse(words, monkeypatch)
        n_parsed += 1
    assert n_parsed or page.name not in ("README.md", "README.zh-CN.md", "data.md", "fine-tuning.md")


def test_both_readmes_show_the_same_commands():
    english, chinese = (commands(REPO / name) for name in ("README.md", "README.zh-CN.md"))
    assert english == chinese and len(english) > 15


def test_links_between_pages_are_valid():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
            other = (page.parent / target).resolve() if target else page
            assert other.exists(), f"{page.name}: {target}"
            if anchor:
                heads = re.findall(r"^#+ (.*)", other.read_text(encoding="utf-8"), re.M)
                slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
                assert anchor in slugs, f"{page.name}: {target}#{anchor}"


def test_pyproject_and_requirements_list_the_same_packages():
    """Compare all packages except the dev tools, which are in requirements-dev.txt."""
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]

    def names(lines):
        return {re.match(r"[\w-]+", line)[0] for line in lines if line.strip() and not line.startswith("#")}

    required = (REPO / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert names(project["dependencies"] + extras) == names(required)


def test_error_for_a_missing_dataset_gives_the_command_in_the_config_files():
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((REPO / "config").glob("*.py")))
    datasets = set(re.findall(r'^dataset = "(\w+)"', text, re.M))
    assert {"answers", "sums", "style", "plays", "poems", "shakespeare"} < datasets
    for name in datasets:
        assert "$ " + prepare_command(name).strip("`").split(" && ")[-1] in text
