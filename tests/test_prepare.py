"""prepare/__main__.py: the command, its options, and the `train next` command that it prints."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import FOX, REPO, TEXT, prepare, prepare_fails, refused, script_here

from acorn.data.shards import load_dataset, open_shard
from model import GPT, GPTConfig
from prepare import __main__ as cli

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def test_invalid_options_are_refused():
    Path("mine.txt").write_text(FOX)
    for fraction in ("0", "1", "-0.1", "1.5", "nan"):
        prepare_fails("between 0 and 1", "text", "mine.txt", f"--val_fraction={fraction}")
    prepare_fails(r"--val-fraction; did you mean --val_fraction\?", "text", "mine.txt", "--val-fraction", "0.2")
    prepare_fails("is a path", "text", "mine.txt", "--name", "../x")
    prepare_fails("is a file, not a folder", "text", "mine.txt", "--out", "mine.txt")
    prepare_fails(r"no corpus 'shakespear'\. Did you mean shakespeare\?", "shakespear")
    prepare_fails("python prepare text mine.txt", "mine.txt")
    assert not Path("data").exists()


def command(*argv, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, **kwargs)


def test_prepare_runs_from_another_directory():
    Path("mine.txt").write_text(FOX)
    done = command(REPO / "prepare", "text", "mine.txt", "--tokenizer=byte", "--val_fraction", "0.2")
    assert done.returncode == 0, done.stderr
    assert "train next       python train.py config/quickstart.py --dataset=mine" in done.stdout
    assert "\r" not in done.stderr and "encoding" not in done.stderr  # progress bars appear only on a terminal
    shard = open_shard(Path("data/mine/val_000000.bin"))
    assert shard.tokens == len(FOX) - int(len(FOX) * 0.8)
    refused(script_here("prepare", "text", "mine.txt", cwd="."), "data/mine already")


def test_help_lists_the_corpora():
    done = command("-m", "prepare", "--help", cwd=REPO)
    assert done.returncode == 0
    assert all(corpus in done.stdout for corpus in ("shakespeare", "tinyshakespeare", "stdlib", "text"))
    for corpus, kind in (("text", "gpt2"), ("shakespeare", "char")):
        options = script_here("prepare", corpus, "--help", cwd=".").stdout
        assert f"default: {kind}" in options and "--val_fraction" in options and "--overwrite" in options


@pytest.mark.parametrize(
    ("corpus", "name"),
    [("text", "after the first file"), ("shakespeare", "plays"), ("hub", "the last part"), ("poems", "poems")],
)
def test_help_shows_the_default_name(corpus, name, capsys):
    with pytest.raises(SystemExit):
        cli.prepare_corpus([corpus, "--help"])
    assert f"the name of the dataset; default: {name}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "text, match",
    [
        ('"""mine at 100%"""\ndef documents(args): return []', r"broken_one\.py lacks TOKENIZER"),
        ('"""mine"""\nTOKENIZER = "char"', r"broken_one\.py lacks documents\(args\)"),
        ('TOKENIZER = "char"\ndef documents(args): return []', r"broken_one\.py lacks a docstring"),
        ('"""mine"""\nTOKENIZER = = 3', r"broken_one\.py, line 2 .*SyntaxError"),
        ('"""mine"""\n\nimport not_installed', r"broken_one\.py, line 3 .*not_installed"),
        ("raise SystemExit(3)", r"broken_one\.py, line 1 .*SystemExit"),
        (
            '"""mine"""\nTOKENIZER = "char"\ndef documents(args): return []\n'
            "def add_arguments(parser):\n    parser.add_argument('--files', nargs=a)",
            r"broken_one\.py, line 5: .*NameError",
        ),
    ],
)
def test_a_broken_corpus_does_not_affect_others(text, match, tmp_path, monkeypatch, capsys):
    Path("corpora").mkdir()
    Path("corpora/broken_one.py").write_text(text)
    package = sys.modules["prepare"]
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / "corpora")])
    names = [*cli.corpora(), "broken_one"]
    monkeypatch.setattr(cli, "corpora", lambda: names)
    prepare_fails(match, "broken_one")
    Path("mine.txt").write_text(FOX)
    assert prepare("text", "mine.txt", "--tokenizer=char")["name"] == "mine"
    with pytest.raises(SystemExit):
        cli.prepare_corpus(["--help"])
    listed = capsys.readouterr().out
    assert "broken: prepare/broken_one.py" in listed and "tinystories" in listed
    sys.modules.pop("prepare.broken_one", None)


def test_a_nanogpt_checkpoint_can_provide_the_tokenizer():
    """The checkpoint names its dataset, whose tokenizer is used."""
    Path("mine.txt").write_text(FOX)
    meta = prepare("text", "mine.txt", "--tokenizer=char")
    shape = dict(block_size=8, vocab_size=meta["vocab_size"], n_layer=1, n_head=1, n_embd=4, bias=False)
    model = GPT(GPTConfig(**shape, mlp="gelu"))
    torch.save({"model_args": shape, "model": model.state_dict(), "config": {"dataset": "mine"}}, "ckpt.pt")
    cli.prepare_corpus(["text", "mine.txt", "--name=again", "--tokenizer=ckpt.pt"])
    assert load_dataset("again").tokenizer.to_dict() == load_dataset("mine").tokenizer.to_dict()


def train_next(capsys) -> list[str]:
    """Return the words of the last `train next` command that `prepare` printed."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train next")]
    return shlex.split(lines[-1].removeprefix("train next"))


def test_train_next_fine_tunes_the_run_of_the_tokenizer(trained, capsys):
    """The command fine-tunes the run that provided the tokenizer, with settings that its model supports."""
    Path("more.txt").write_text(TEXT * 3)
    prepare("text", "more.txt", f"--tokenizer={trained}")
    words = train_next(capsys)
    assert words[:2] == ["python", "train.py"] and f"--init_from={trained}" in words
    done = command(REPO / "train.py", *words[2:], "--dry_run=True", "--device=cpu")
    assert done.returncode == 0, done.stderr
    assert "this was a dry run" in done.stdout


def test_train_next_for_preferences_starts_from_a_model(trained, capsys):
    """With the tokenizer of a dataset, the command starts from a model trained on that dataset, or trains one first."""
    Path("mine.txt").write_text(TEXT)
    prepare("text", "mine.txt", "--tokenizer=byte")
    Path("p.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 20)
    options = "preferences", "p.jsonl", "--out=pairs"
    cli.prepare_corpus([*options, "--tokenizer=mine"])
    first, second = " ".join(train_next(capsys)).split(" && ")
    assert "--dataset=mine --out_dir=out/mine" in first and "--init_from=out/mine --dataset=pairs" in second
    done = script_here(*first.split()[1:], "--dry_run=True", "--device=cpu", cwd=".")
    assert done.returncode == 0, done.stderr
    Path("out").mkdir()
    Path("out/mine").symlink_to(trained)
    cli.prepare_corpus([*options, "--tokenizer=data/mine", "--overwrite"])
    words = train_next(capsys)
    assert "--init_from=out/mine" in words and "&&" not in words and "--block_size=32" in words


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300", "pairs"])
def test_train_next_for_preferences_with_a_new_tokenizer_trains_a_model(tokenizer, tmp_path, monkeypatch, capsys):
    """No model has the tokenizer yet, so the commands first train one on conversations, which the user adds."""
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 20)
    Path("chats.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 20)
    options = ["preferences", "pairs.jsonl", "--overwrite"]
    cli.prepare_corpus([*options, f"--tokenizer={'byte' if tokenizer == 'pairs' else tokenizer}"])
    if tokenizer == "pairs":  # the tokenizer of another dataset of pairs
        cli.prepare_corpus([*options, "--tokenizer=pairs", "--name=again"])
    first, second, third = " ".join(train_next(capsys)).split(" && ")
    cli.prepare_corpus([word if word != "FILES" else "chats.jsonl" for word in first.split()[2:]])
    done = script_here(*second.split()[1:], "--dry_run=True", "--device=cpu", cwd=".")
    assert done.returncode == 0, done.stderr
    out_dir = next(word for word in second.split() if word.startswith("--out_dir="))
    assert out_dir.replace("--out_dir", "--init_from") in third.split() and "config/dpo_style.py" in third
