"""Folders and files of strangers: links, pipes, wrong forms, endless templates and patterns, control characters."""

import contextlib
import gc
import io
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY
from test_checkpoint import save as save_small

import acorn
import prepare.__main__ as prepare_cli
import sample
import train
from acorn import UserError, checkpoint, examples, files, hub, printable, report
from acorn.checkpoint import huggingface
from acorn.data import chat, sandbox, shards
from acorn.data.shards import load_dataset
from acorn.data.tokenizer import ByteTokenizer, from_dict, load_hf, train_bpe
from prepare import inspection, pipeline

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes as POSIX has them")
SMALL = "--n_layer=1 --n_embd=16 --block_size=16 --eval_interval=2 --eval_iters=1 --keep_checkpoints=1".split()
PAIR = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(autouse=True)
def alarm():
    """What hangs ends."""

    def ring(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def train_here(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        return train.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        gc.collect()  # releases the run's lock, as the end of a process does


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def precious(tmp_path):
    """A folder that nobody named to acorn, with the names that acorn writes in it."""
    folder = tmp_path / "precious"
    folder.mkdir()
    for name in ("diary", "model.safetensors", "state.json", "progress.json", "train_000000.bin", "0000.txt"):
        (folder / name).write_text(f"my own {name}\n")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Links


@pytest.mark.parametrize("begin", ["--init_from=resume", "--overwrite=True"])
def test_a_run_writes_and_deletes_through_no_link(dataset, tmp_path, monkeypatch, precious, begin):
    out, words = tmp_path / "o", [*TINY, *SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path / 'o'}"]
    assert train_here(monkeypatch, *words, "--max_iters=2") == 0
    before = contents(precious)
    for name in "metrics.jsonl loss.png latest best .latest.writing .best.writing .loss.writing.png".split():
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(precious / "diary")
    (out / ".metrics.jsonl.writing").symlink_to(precious / "new")  # which is not there, and is not to be made
    for name in (".writing-step_000004", ".replaced-step_000004", ".writing-step_000050", "step_000001", "step_000099"):
        (out / name).symlink_to(precious)
    (out / ".writing-step_000006").mkdir()
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "other"):
        (out / ".writing-step_000006" / name).symlink_to(precious / "diary")
    (out / ".writing-step_000006" / "folder").symlink_to(precious)
    assert train_here(monkeypatch, *words, "--max_iters=6", begin) == 0
    assert contents(precious) == before
    assert checkpoint.find(out)[1]["step"] == 6 and not any(path.is_symlink() for path in out.rglob("*"))
    assert {"latest", "best", "metrics.jsonl", "loss.png"} <= {file.name for file in out.iterdir()}
    assert not list(out.glob(".*-step_*"))


def test_a_lock_that_is_a_link_is_refused(dataset, tmp_path, monkeypatch, precious, capsys):
    out = tmp_path / "o"
    out.mkdir()
    (out / ".lock").symlink_to(precious / "diary")
    with pytest.raises(OSError, match="symbolic link"):
        train_here(monkeypatch, *TINY, *SMALL, f"--dataset={dataset}", f"--out_dir={out}", "--max_iters=1")
    (tmp_path / "t.txt").write_text("to be or not to be, " * 50)
    with pytest.raises(UserError, match="symbolic link"):
        prepare_cli.prepare_corpus(["text", str(tmp_path / "t.txt"), "--tokenizer=byte", f"--out={out}"])
    assert (precious / "diary").read_text() == "my own diary\n"


def test_a_pin_that_is_a_link_is_not_written(tmp_path, precious, capsys):
    step = save_small(tmp_path / "o", 1)
    (step / checkpoint.PINNED).symlink_to(precious / "diary")
    checkpoint.pin(step, tmp_path / "adapters")
    assert "symbolic link" in capsys.readouterr().err and checkpoint.is_pinned(step)
    assert (precious / "diary").read_text() == "my own diary\n"


def stopping(function, calls: int):
    """The function, which can be called so often."""
    left = iter(range(calls))

    def call(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments)

    return call


@pytest.mark.parametrize("corpus", ["text", "chat"])
def test_preparation_writes_and_deletes_through_no_link(tmp_path, precious, corpus, monkeypatch):
    file = tmp_path / "t.jsonl"
    text = '{"prompt": "q%d", "response": "a"}\n' if corpus == "chat" else '{"text": "to be or %d not to be"}\n'
    file.write_text("".join(text % i for i in range(200)))
    before = contents(precious)
    argv = [corpus, str(file), "--tokenizer=byte", f"--out={tmp_path / 'd'}", "--shard_tokens=1000"]
    partial = tmp_path / "d" / shards.PARTIAL
    for round_ in range(3):
        if round_ == 0:  # all of it is a link
            partial.parent.mkdir()
            partial.symlink_to(precious)
        elif corpus == "text":  # it was stopped after some shards, and what it wrote next are links
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(pipeline, "BATCH_CHARS", 500)
                patch.setattr(pipeline, "_write", stopping(pipeline._write, 5))
                prepare_cli.prepare_corpus([*argv, "--overwrite"])
            assert (partial / "progress.json").exists()
            for temporary in (
                *partial.glob("*.tmp"),
                partial / ".progress.json.writing",
                partial / ".meta.json.writing",
            ):
                temporary.unlink(missing_ok=True)
                temporary.symlink_to(precious / "diary")
            if round_ == 2:
                (partial / "progress.json").unlink()
                (partial / "progress.json").symlink_to(precious / "progress.json")
        with contextlib.suppress(UserError):  # a shard that is not as long as it was
            prepare_cli.prepare_corpus([*argv, "--overwrite"])
        assert contents(precious) == before
    prepare_cli.prepare_corpus([*argv, "--overwrite"])
    assert contents(precious) == before and len(load_dataset(str(tmp_path / "d")).train) > 1000


def test_exports_examples_and_pictures_write_through_no_link(tmp_path, precious, monkeypatch):
    save_small(tmp_path / "o", 1, best=True)
    before = contents(precious)
    (tmp_path / ".writing-hf").symlink_to(precious)
    hub.export(str(tmp_path / "o"), tmp_path / "hf")
    (tmp_path / "nothing").symlink_to(precious / "new")
    with pytest.raises(UserError, match="already exists"):
        hub.export(str(tmp_path / "o"), tmp_path / "nothing")
    monkeypatch.setattr(
        examples, "functions", lambda _: [("json", f"f{i}", f"line {i} " * 4, "w" * 200) for i in range(90)]
    )
    folder = tmp_path / "examples"
    folder.mkdir()
    (folder / "topics").symlink_to(precious)
    for name in ("answers.jsonl", "choices.yaml"):
        (folder / name).symlink_to(precious / "diary")
    examples.write_examples(folder)
    (tmp_path / ".lengths.writing.png").symlink_to(precious / "diary")
    inspection.draw_lengths({}, "x", tmp_path / "lengths.png")
    assert contents(precious) == before and (tmp_path / "lengths.png").stat().st_size > 1000


def test_wandb_does_not_write_through_a_link(tmp_path, precious, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", type(sys)("wandb"))
    (tmp_path / "wandb").symlink_to(precious)
    with pytest.raises(UserError, match="symbolic link"):
        report.start_wandb("p", "n", {}, tmp_path, None)


def test_a_folder_or_a_shard_on_another_disk_may_be_a_link(dataset, tmp_path, monkeypatch):
    (tmp_path / "disk" / "o").mkdir(parents=True)
    (tmp_path / "o").symlink_to(tmp_path / "disk" / "o")
    (tmp_path / "data").mkdir()
    for file in dataset.iterdir():
        (tmp_path / "data" / file.name).symlink_to(file)
    (tmp_path / "d").symlink_to(tmp_path / "data")
    words = [*TINY, *SMALL, f"--dataset={tmp_path / 'd'}", f"--out_dir={tmp_path / 'o'}"]
    assert train_here(monkeypatch, *words, "--max_iters=2") == 0
    assert train_here(monkeypatch, *words, "--max_iters=3", "--init_from=resume") == 0
    assert checkpoint.find(tmp_path / "disk" / "o")[1]["step"] == 3
    (tmp_path / "t.txt").write_text("to be or not to be, " * 50)
    prepare_cli.prepare_corpus(
        ["text", str(tmp_path / "t.txt"), "--tokenizer=byte", f"--out={tmp_path / 'd'}", "--overwrite"]
    )
    assert load_dataset(str(tmp_path / "data")).vocab_size == 257 and load_dataset(str(dataset)).vocab_size < 257


# ---------------------------------------------------------------------------------------------------------------------
# Pipes, which keep waiting whoever opens them


def test_pipes_are_not_waited_for(tmp_path, capsys):
    out = tmp_path / "o"
    step = save_small(out, 1, best=True)
    for name in ("best", "latest"):
        (out / name).unlink()
        os.mkfifo(out / name)
    assert checkpoint.load_model(str(out))[2].startswith(str(step))
    os.mkfifo(out / "metrics.jsonl")
    report.Metrics(out, 0, None).write(step=0, loss=1.0)
    assert len(report.read_metrics(out / "metrics.jsonl")) == 1
    os.mkfifo(out / ".lock")
    with pytest.raises(OSError, match="not a regular file"):
        files.lock(out, "training into")
    for name in ("model.safetensors", "state.json"):
        (step / name).unlink()
        os.mkfifo(step / name)
        with pytest.raises(UserError, match="intact"):
            checkpoint.load_model(str(out))
        assert not checkpoint.launched_by(out, "x")

    hf = tmp_path / "hf"
    hf.mkdir()
    for name in ("acorn_tokenizer.json", "model.safetensors.index.json", "config.json"):
        os.mkfifo(hf / name)
        with pytest.raises(UserError, match=name):
            huggingface.load_tokenizer(str(hf)) if "token" in name else huggingface.open_tensors(
                hf, "x", "model."
            ) if "index" in name else huggingface.open_model(str(hf))

    data = tmp_path / "d"
    data.mkdir()
    (data / "train.bin").write_bytes(bytes(100))
    os.mkfifo(data / "meta.pkl")
    with pytest.raises(UserError, match=r"meta\.pkl"):
        load_dataset(str(data))
    os.mkfifo(tmp_path / "d" / "x.txt")
    with pytest.raises(UserError, match=r"x\.txt"):
        prepare_cli.prepare_corpus(["text", str(data / "*.txt"), "--tokenizer=byte", f"--out={tmp_path / 'e'}"])


# ---------------------------------------------------------------------------------------------------------------------
# Files of another form


HOSTILE = [None, [], {}, "", "x" * 100, -1, 2**70, 10**400, 0.5, float("nan"), True, [[]], [{}], {"a": []}, "../../x"]


def forms(whole, depth=4):
    """A JSON value with each part of it in turn replaced by something else, or left out."""
    yield from HOSTILE
    if depth and isinstance(whole, (dict, list)):
        for key in [*whole] if isinstance(whole, dict) else range(min(len(whole), 2)):
            for form in forms(whole[key], depth - 1):
                changed = whole.copy()
                changed[key] = form
                yield changed
            if isinstance(whole, dict):
                yield {k: v for k, v in whole.items() if k != key}


def test_a_weight_map_of_any_form_is_a_sentence(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    for form in forms({"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}):
        path.write_text(json.dumps(form))
        with pytest.raises(UserError, match="Download the checkpoint again"):
            huggingface.open_tensors(tmp_path, "x", "model.")


def test_progress_of_any_form_begins_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "BATCH_CHARS", 500)
    documents = [f"document {i}, " * 20 for i in range(40)]
    command = dict(name="d", tokenizer="byte", source={"corpus": "text"}, shard_tokens=2000, val_by="document")
    expected = pipeline.prepare(documents, tmp_path / "d", **command)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "_write", stopping(pipeline._write, 12))
        pipeline.prepare(documents, tmp_path / "e", **command)
    partial = tmp_path / "e" / shards.PARTIAL
    progress = json.loads((partial / "progress.json").read_text())
    shutil.copytree(partial, tmp_path / "kept")
    n = 0
    for form in [*forms(progress, depth=3)][::9]:
        shutil.rmtree(tmp_path / "f", ignore_errors=True)
        shutil.copytree(tmp_path / "kept", tmp_path / "f" / shards.PARTIAL)
        (tmp_path / "f" / shards.PARTIAL / "progress.json").write_text(json.dumps(form))
        with contextlib.suppress(UserError):  # what is plausible, but false, is found later
            assert pipeline.prepare(documents, tmp_path / "f", **command)["tokenizer"] == expected["tokenizer"]
        n += 1
    capsys.readouterr()
    print(f"{n} forms of progress.json")
    (partial / "progress.json").write_text(json.dumps(progress))
    assert pipeline.prepare(documents, tmp_path / "e", **command) == expected


def test_a_finished_preparation_moves_nothing_from_elsewhere(tmp_path, precious, monkeypatch):
    documents, command = ["to be or not to be " * 100], dict(name="d", tokenizer="byte", source={})
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(pipeline, "BATCH_CHARS", 100)
        patch.setattr(pipeline, "move_in", lambda *_: 1 / 0)
        pipeline.prepare(documents, tmp_path / "d", **command, shard_tokens=500)
    partial = tmp_path / "d" / shards.PARTIAL
    meta = json.loads((partial / "meta.json").read_text())
    meta["train"]["shards"][0]["file"] = "../../precious/diary"
    shards.write_meta(partial, {k: v for k, v in meta.items() if k != "sha256"})
    pipeline.prepare(documents, tmp_path / "d", **command, shard_tokens=500)
    assert (precious / "diary").read_text() == "my own diary\n"
    load_dataset(str(tmp_path / "d"))


def test_deep_and_large_json_is_a_sentence(tmp_path):
    path = tmp_path / "x.json"
    for text in ("[" * 90 + "]" * 90, '{"a":' * 90 + "1" + "}" * 90):
        path.write_text(text)
        files.read_json(path)
    for text in ("[" * 200 + "]" * 200, '{"a":' * 20_000 + "1" + "}" * 20_000, "[" * 10**6, "", "\x00", "\udcff"):
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError):
            files.read_json(path)
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    for read in (files.read_json, lambda path: huggingface.read_json(path), load_hf):
        with pytest.raises((OSError, UserError), match=r"x\.json|it has more than"):
            read(path)


def test_the_settings_of_a_checkpoint_may_be_anything(tmp_path):
    step = save_small(tmp_path, 1)
    state = json.loads((step / "state.json").read_text())
    for name in ("settings", "scaler", "lora", "val_loss", "seconds", "best_loss", "position", "shards"):
        for bad in (10**400, [[["a"]]], {"scale": 10**400}, {"rank": 1, "alpha": 10**400, "base": "\0", "sha256": ""}):
            stranger = {**state, name: {"max_iters": bad} if name == "settings" else bad}
            stranger["sha256"] = {**state["sha256"], "state": checkpoint.state_hash(stranger)}
            (step / "state.json").write_text(json.dumps(stranger))
            with pytest.raises(UserError):
                sys_argv = ["--init_from=resume", f"--out_dir={tmp_path}"]
                train.read_settings(train.TrainSettings, sys_argv)
                checkpoint.find(tmp_path)


def tokenizer_json(**changes) -> dict:
    return train_bpe(["to be or not to be"], 270).config | changes


def pattern(regex: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


EMPTY = dict.fromkeys(("type", "vocab", "merges"), None)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {}},
        {"model": EMPTY},
        {"model": {"type": "BPE", "vocab": {}, "merges": []}},
        {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}},
        {"model": {"type": "Unigram", "vocab": [], "unk_id": None}},
        {"pre_tokenizer": pattern("(a+)+$")},
        {"pre_tokenizer": pattern(r"[\s\S]*[\x00\x01]|.")},  # the square of the text
        {"pre_tokenizer": {"type": []}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10**6}},  # 64 GB
        {"normalizer": []},
        {"added_tokens": [{"id": 2**40, "content": "x"}]},
        {"added_tokens": {}},
        {"decoder": {"type": "Replace", "pattern": {"Regex": "((("}, "content": ""}},
    ],
)
def test_a_hostile_tokenizer_is_a_sentence(tmp_path, changes, monkeypatch):
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(**changes)))
    began = time.process_time()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_hf(tmp_path)
    assert time.process_time() - began < 5  # the rest of it is another process's


def test_usual_patterns_are_taken():
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    llama3 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for regex in (gpt2, llama3):
        tokenizer = from_dict({"kind": "hf", "config": tokenizer_json(pre_tokenizer=pattern(regex))})
        assert tokenizer.decode(tokenizer.encode("to be, or 12 not")) == "to be, or 12 not"


def test_a_pattern_that_fails_on_a_text_is_a_sentence(monkeypatch):
    """One that is harmless where it is tried."""
    tokenizer = from_dict({"kind": "hf", "config": tokenizer_json(pre_tokenizer=pattern("(?=(q+)+$)."))})
    assert len(tokenizer.encode("to be")) > 0
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_part(text, True, True)):
        with pytest.raises(UserError, match="fails on the text"):
            encode("q" * 50 + "!")


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{{ (9 ** 9) ** (9 ** 9) }}",
        "{{ ['ab' * 9999] | map('replace', 'ab', 'ab' * 9999) | map('replace', 'ab', 'ab' * 9999) | join }}",
        "{% set n = namespace(x='a') %}{% for a in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{{ 'a'.center(90000000) }}",
        "{{ '%2000000000d' % 1 }}{{ '{:>2000000000}'.format(1) }}",
        "{% if a %}" * 20_000 + "{% endif %}" * 20_000,
        "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
        "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    ],
    ids=range(11),
)
def test_an_endless_template_is_a_sentence(template, monkeypatch):
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = template
    began = time.process_time()
    with pytest.raises(UserError, match="chat template"):
        chat.render(tokenizer, PAIR[:1])
    assert time.process_time() - began < 2  # of this process
    tokenizer.chat_template = chat.CHATML + " "
    assert tokenizer.decode(chat.render(tokenizer, PAIR[:1])).startswith("<|im_start|>user\na<|im_end|>")


def test_a_template_renders_as_it_does_in_transformers():
    from transformers.utils.chat_template_utils import render_jinja_template

    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] | tojson }} {% endfor %}{{ messages | length }}"
    talk = [*PAIR, {"role": "user", "content": 'é字\ud800 "x"\n'}]
    arguments = dict(conversations=[talk], chat_template=template, add_generation_prompt=True, bos_token="<s>")
    assert sandbox.render("it", **arguments) == render_jinja_template(**arguments)[0][0]


def test_a_forked_process_has_a_sandbox_of_its_own():
    arguments = dict(conversations=[PAIR], chat_template="{{ messages[0]['content'] }}.")
    assert sandbox.render("it", **arguments) == "a."
    child = os.fork()
    if not child:
        os._exit(0 if sandbox.render("it", **arguments) == "a." else 1)
    assert os.waitpid(child, 0)[1] == 0 and sandbox.render("it", **arguments) == "a."


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


BAD_LINES = [
    b'{"step": 3, "loss": "<script>"}',
    b'{"step": 99999999999999999999, "val_loss": 3}',
    b'{"step": true, "loss": 1.0}',
    b'{"step": -1, "loss": 1.0}',
    b'{"step": 1, "val_loss": [1.0]}',
    b'{"step": 1, "loss": 1' + b"0" * 400 + b"}",
    b'{"step": 1, "seconds": {}}',
    b"[1, 2]",
    b"null",
    b"\xff\xfe\x00",
    b'{"step": 1, "lo',
    b"[" * 20_000,
    b"\x1b[2J",
]


def test_bad_metrics_neither_end_a_run_nor_keep_it_from_saving(dataset, tmp_path, monkeypatch, capsys):
    out, words = tmp_path / "o", [*TINY, *SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path / 'o'}"]
    assert train_here(monkeypatch, *words, "--max_iters=2") == 0
    good = report.read_metrics(out / "metrics.jsonl")
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b"\n".join([*BAD_LINES, b'{"step": 1, "loss": NaN, "val_loss": Infinity}', b""]))
    capsys.readouterr()
    assert train_here(monkeypatch, *words, "--max_iters=4", "--init_from=resume") == 0
    said = capsys.readouterr().err
    assert said.count("warning:") == 1 and f"{len(BAD_LINES)} " in said and "\x1b" not in said
    assert checkpoint.find(out)[1]["step"] == 4
    lines = report.read_metrics(out / "metrics.jsonl")
    assert lines[: len(good)] == good and lines[len(good)] == {"step": 1, "loss": None, "val_loss": None}
    assert [line["step"] for line in lines[len(good) + 1 :]] == [2, 3, 4]


def test_a_run_saves_before_it_draws_and_goes_on_where_that_fails(dataset, tmp_path, monkeypatch, capsys):
    seen = []

    def fails(*_):
        seen.append(sorted(folder.name for folder in (tmp_path / "o").glob("*step_*")))
        raise ZeroDivisionError("\x1b[2Jno font")

    class Wandb:
        id = "x"

        def log(self, *_, **__):
            raise RuntimeError("no network")

    monkeypatch.setattr(report, "draw_losses", fails)
    monkeypatch.setattr(report, "start_wandb", lambda *_: Wandb())
    save, saved = checkpoint.Writer.save, []
    monkeypatch.setattr(checkpoint.Writer, "save", lambda *a: (saved.append(len(seen)), save(*a)))
    words = [*TINY, *SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path / 'o'}", "--wandb_log=True", "--max_iters=4"]
    assert train_here(monkeypatch, *words) == 0
    said = capsys.readouterr().err
    assert len(seen) == 3 and saved == [1, 2]  # at steps 0, 2 and 4; a checkpoint at 2 and 4, each before its picture
    assert said.count("the run continues") == 4 and said.count("wandb logging failed") == 1 and "\x1b" not in said
    assert checkpoint.find(tmp_path / "o")[1]["step"] == 4


# ---------------------------------------------------------------------------------------------------------------------
# Control characters


ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\r\b\x7f\u202egnp.exe\u2066"


def has_control(text: str) -> bool:
    return bool(re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text))


def test_control_characters_are_escaped_and_text_is_not():
    assert not has_control(printable(ESCAPES)) and json.loads(f'"{printable(ESCAPES)}"') == ESCAPES
    for text in ("a\n\tb", "字é😀 👩‍👩‍👧 שלום \u00a0\u200f", r"\u001b"):
        assert printable(text) == text


def test_an_error_that_quotes_a_stranger_is_one_plain_line(capsys):
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


def test_inspection_and_comparison_show_no_control_characters(tmp_path, monkeypatch, capsys):
    documents = [f"{ESCAPES} {i}, " * 20 for i in range(40)]
    source = {"corpus": ESCAPES, "arguments": {"files": [ESCAPES]}, "sha256": 1}
    pipeline.prepare(documents, tmp_path / "d", name="d", tokenizer="byte", source=source)
    prepare_cli.prepare_corpus(["inspect", str(tmp_path / "d"), "--verify"])
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


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def reconfigure(self, **_):
        pass


@pytest.mark.parametrize("words", [[], ["--stream=True"], ["--json=True"], ["--logprobs=True"]])
def test_a_terminal_gets_samples_escaped_and_a_pipe_gets_them_as_they_are(tmp_path, monkeypatch, words):
    save_small(tmp_path, 1, best=True)
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


def test_a_conversation_with_a_checkpoint_whose_template_never_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    step = save_small(tmp_path, 1, best=True)
    state = json.loads((step / "state.json").read_text())
    state["tokenizer"]["chat_template"] = (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    state["sha256"]["state"] = checkpoint.state_hash(state)
    (step / "state.json").write_text(json.dumps(state))
    words = [f"--out_dir={tmp_path}", "--chat=True", "--start=hi", "--device=cpu", "--compile=False"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", Terminal())
    with pytest.raises(UserError, match="chat template"):
        sample.main()
