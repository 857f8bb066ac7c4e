"""Hostile JSON files: each is either loaded or refused with a UserError."""

import contextlib
import json
import shutil

import pytest
from helpers import chat_dataset, read_all, save_small, stopping, tokenizer_json

import train
from acorn import UserError, checkpoint, files
from acorn.checkpoint import huggingface
from acorn.data import shards
from acorn.data.mixture import load_mixture
from acorn.data.shards import load_dataset
from acorn.data.tokenizer import ByteTokenizer
from acorn.data.tokenizer_json import load_hf
from acorn.data.tokenizer_kinds import from_dict
from prepare import pipeline

HOSTILE_TEXTS = [
    "",
    "null",
    "[]",
    "3",
    '"x"',
    "[" * 100_000,
    '{"a":' * 100_000,
    "{" + ",".join(f'"{i}": 1' for i in range(1000)) + "}",
    "9" * 5000,
    "\udcff",
    "\x00" * 100,
]
HOSTILE_VALUES = [None, True, -1, 10**30, 1e308, float("inf"), float("nan"), "", "x" * 10**5, "\x00", [], [[]], {}, 0.5]


def variants(whole: dict) -> list[str]:
    """Return hostile variants of a JSON object: invalid text, duplicate keys, and one value replaced or removed.

    The replaced value is at the top level or one level below.
    """
    texts = [*HOSTILE_TEXTS, json.dumps(whole)[:-1] + ', "format": 7, "format": 1, "step": 3}']
    for name, value in whole.items():
        for bad in HOSTILE_VALUES:
            texts.append(json.dumps({**whole, name: bad}))
            if isinstance(value, dict):
                for inner in [*value][:40]:
                    texts.append(json.dumps({**whole, name: {**value, inner: bad}}))
        texts.append(json.dumps({k: v for k, v in whole.items() if k != name}))
    return texts


def test_hostile_json_is_loaded_or_raises_user_error(tmp_path, capsys):
    """The files are a meta.json, a state.json with a correct hash, saved tokenizers, and a tokenizer.json."""
    n = refused = 0

    def load(call, *arguments) -> None:
        nonlocal n, refused
        n += 1
        try:
            call(*arguments)
        except UserError:
            refused += 1

    data = chat_dataset(tmp_path)
    meta = json.loads((data / "meta.json").read_text())
    for text in variants({k: v for k, v in meta.items() if k != "sha256"}):
        (data / "meta.json").write_text(text, errors="surrogateescape")
        load(lambda: read_all(load_dataset(str(data))))
        load(lambda: load_mixture(f"{data}:1,{data}:1"))

    step = save_small(tmp_path / "run", 1)
    state = json.loads((step / "state.json").read_text())
    for text in variants({**state, "settings": {"batch_size": 3}, "lora": None, "val_loss": 1.0, "data": "x"}):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            stranger = json.loads(text)
            stranger["sha256"] = {**state["sha256"], "state": checkpoint.state_hash(stranger)}
            text = json.dumps(stranger)
        (step / "state.json").write_text(text, errors="surrogateescape")
        load(lambda: checkpoint.load_model(str(tmp_path / "run")))

    for whole in (
        ByteTokenizer().to_dict(),
        {"kind": "char", "vocab": ["a"]},
        {"kind": "bpe", "config": tokenizer_json()},
    ):
        for text in variants({**whole, "eot": None, "chat_template": "x"}):
            with contextlib.suppress(ValueError, RecursionError):
                load(from_dict, json.loads(text))
    config = tokenizer_json()
    for text in variants(config):
        with contextlib.suppress(ValueError, RecursionError):
            load(from_dict, {"kind": "hf", "config": json.loads(text)})
    assert refused > n / 2
    print(f"{n} hostile objects, {refused} refused")


STRANGE_VALUES = [
    None,
    [],
    {},
    "",
    "x" * 100,
    -1,
    2**70,
    10**400,
    0.5,
    float("nan"),
    True,
    [[]],
    [{}],
    {"a": []},
    "../../x",
]


def forms(whole, depth=4):
    """Yield variants of a JSON value in which one part is replaced by a strange value or, in an object, removed."""
    yield from STRANGE_VALUES
    if depth and isinstance(whole, (dict, list)):
        for key in [*whole] if isinstance(whole, dict) else range(min(len(whole), 2)):
            for form in forms(whole[key], depth - 1):
                changed = whole.copy()
                changed[key] = form
                yield changed
            if isinstance(whole, dict):
                yield {k: v for k, v in whole.items() if k != key}


def test_an_invalid_weight_map_raises_user_error(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    for form in forms({"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}):
        path.write_text(json.dumps(form))
        with pytest.raises(UserError, match="Download the checkpoint again"):
            huggingface.open_tensors(tmp_path, "x", "model.")


def test_preparation_handles_an_invalid_progress_file(tmp_path, monkeypatch, capsys):
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
        with contextlib.suppress(UserError):  # plausible but wrong progress is detected later
            assert pipeline.prepare(documents, tmp_path / "f", **command)["tokenizer"] == expected["tokenizer"]
        n += 1
    capsys.readouterr()
    print(f"{n} forms of progress.json")
    (partial / "progress.json").write_text(json.dumps(progress))
    assert pipeline.prepare(documents, tmp_path / "e", **command) == expected


@pytest.mark.usefixtures("alarm")
def test_json_that_is_too_deep_or_too_large_is_refused(tmp_path):
    path = tmp_path / "x.json"
    for text in ("[" * 90 + "]" * 90, '{"a":' * 90 + "1" + "}" * 90):
        path.write_text(text)
        files.read_json(path)
    for text in ("[" * 200 + "]" * 200, '{"a":' * 20_000 + "1" + "}" * 20_000, "[" * 10**6, "", "\x00", "\udcff"):
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError):
            files.read_json(path)
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a sparse file, which uses no disk space
    for read in (files.read_json, lambda path: huggingface.read_json(path), load_hf):
        with pytest.raises((OSError, UserError), match=r"x\.json|it has more than"):
            read(path)


def test_hostile_values_in_a_checkpoint_state_raise_user_error(tmp_path):
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
