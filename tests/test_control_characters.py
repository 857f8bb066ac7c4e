"""Control characters in untrusted names and texts are escaped on a terminal."""

import io
import json
import re
import sys

import pytest
from helpers import Terminal, save_small

import acorn
import prepare.__main__ as prepare_cli
import sample
from acorn import UserError, printable, report
from acorn.data import shards
from acorn.data.shards import load_dataset
from prepare import inspection, pipeline

ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\r\b\x7f\u202egnp.exe\u2066"


def has_control(text: str) -> bool:
    return bool(re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text))


def test_only_control_characters_are_escaped():
    assert not has_control(printable(ESCAPES)) and json.loads(f'"{printable(ESCAPES)}"') == ESCAPES
    for text in ("a\n\tb", "字é😀 👩‍👩‍👧 שלום \u00a0\u200f", r"\u001b"):
        assert printable(text) == text


def test_error_messages_with_untrusted_text_are_escaped(capsys):
    def main():
        raise UserError(f"{ESCAPES}\nerror: none at all")

    with pytest.raises(SystemExit):
        acorn.run(main)
    said = capsys.readouterr().err
    assert not has_control(said) and said.count("\n") == 1

    def missing():
        raise FileNotFoundError(2, "not there", ESCAPES)

    with pytest.raises(SystemExit):
        acorn.run(missing)
    assert not has_control(capsys.readouterr().err)


def test_characters_that_stdout_cannot_encode_are_replaced(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as ended:
        acorn.run(lambda: print("é你"))
    out.flush()
    assert ended.value.code == 0 and out.buffer.getvalue().strip() == b"\xe9?"


def test_inspect_and_report_print_no_control_characters(tmp_path, monkeypatch, capsys):
    documents = [f"{ESCAPES} {i}, " * 20 for i in range(40)]
    source = {"corpus": ESCAPES, "arguments": {"files": [ESCAPES]}, "sha256": 1}
    pipeline.prepare(documents, tmp_path / "d", name="d", tokenizer="byte", source=source)
    prepare_cli.prepare_corpus(["inspect", str(tmp_path / "d"), "--verify"])
    monkeypatch.setattr(inspection, "draw_lengths", lambda *_: None)  # a second for each picture
    for source in (
        [],
        "x",
        {"corpus": []},
        {"corpus": "text", "arguments": {"files": 5}},
        {"arguments": {"files": ["/dev/zero"]}},
    ):
        meta = {k: v for k, v in load_dataset(str(tmp_path / "d")).meta.items()} | {"source": source}
        shards.write_meta(tmp_path / "d", meta)
        prepare_cli.prepare_corpus(["inspect", str(tmp_path / "d"), "--verify"])
    for name, note in (("a", ESCAPES), ("b", "x")):
        step = save_small(tmp_path / name, 1)
        state = json.loads((step / "state.json").read_text())
        (step / "state.json").write_text(json.dumps({**state, "settings": {"dataset": note, note: 1}}))
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    for words in ([], ["--json"]):
        runs = [str(tmp_path / name) for name in "ab"]
        monkeypatch.setattr(sys, "argv", ["report", *runs, f"--out={tmp_path / 'x.png'}", *words])
        report.main()
    said = capsys.readouterr()
    assert not has_control(said.out) and not has_control(said.err.replace("\r", "").replace("\x1b[A", ""))


@pytest.mark.parametrize("words", [[], ["--stream=True"], ["--json=True"], ["--logprobs=True"]])
def test_samples_are_escaped_on_a_terminal_but_not_in_a_pipe(tmp_path, monkeypatch, words):
    save_small(tmp_path, 1, best=1)
    drawn = list(ESCAPES.encode())

    def generate(model, prompts, n, how, seeds, on_token, *_):
        for token in drawn:
            on_token(0, token, -1.0)

    monkeypatch.setattr("acorn.inference.generate.generate", generate)
    argv = [
        "sample.py",
        f"--out_dir={tmp_path}",
        "--num_samples=1",
        "--start=x",
        "--device=cpu",
        "--compile=False",
        *words,
    ]
    monkeypatch.setattr(sys, "argv", argv)
    terminal, pipe = Terminal(), Terminal()
    pipe.isatty = lambda: False
    monkeypatch.setattr(sys, "stdin", None)
    for out in (terminal, pipe):
        monkeypatch.setattr(sys, "stdout", out)
        sample.main()
    assert not has_control(terminal.getvalue()) and "\\u001b[2J" in terminal.getvalue()
    if "--json=True" in words:
        for out in (terminal, pipe):
            assert json.loads(out.getvalue())["text"] == ESCAPES
    else:
        assert f"x{ESCAPES}" in pipe.getvalue()
