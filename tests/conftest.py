"""Fixtures shared by several test files: a small dataset, trained runs, scripts in forked processes, and folders."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from acorn import report
from acorn.data.chat import CHATML
from prepare import pipeline

pytest.register_assert_rewrite("helpers", "forked", "hf_models")  # before they are imported
from helpers import REPO, TEXT, TINY, script, script_here, small_bpe  # noqa: E402

torch.set_num_threads(1)  # two test processes run in parallel on two cores


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A prepared char dataset of about 11 thousand tokens."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT)
    result = script_here("prepare", "text", "text.txt", "--tokenizer=char", "--out=tiny", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "tiny"


@pytest.fixture(scope="session")
def trained(dataset, tmp_path_factory) -> Path:
    """The out_dir of a finished tiny run. Tests must not change it."""
    folder = tmp_path_factory.mktemp("trained")
    result = script("train.py", *TINY, f"--dataset={dataset}", "--out_dir=out", cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "out"


@pytest.fixture(scope="session")
def start():
    """Return a function that runs a script in a forked process: `start("train.py", ..., cwd=...)`.

    The process is forked from one that has already imported torch, so a test can start and kill a hundred scripts
    within minutes.
    """
    if sys.platform != "linux":
        pytest.skip("kills, limits and mounts as on Linux")
    from forked import Forked

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["forked"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{REPO}{os.pathsep}{REPO / 'tests'}")
        first = context.Process(target=time.sleep, args=(0,))
        first.start()
        first.join()
    return lambda *words, **options: Forked(context, *words, **options)


@pytest.fixture(scope="session")
def whole_run(dataset, start, tmp_path_factory) -> Path:
    """The out_dir of an uninterrupted run with the settings in RUN."""
    from forked import RUN

    folder = tmp_path_factory.mktemp("whole")
    assert start("train.py", *RUN, f"--dataset={dataset}", "--out_dir=out", cwd=folder).end() == 0
    return folder / "out"


@pytest.fixture(scope="session")
def chatml(tmp_path_factory) -> Path:
    """A folder with a byte-level tokenizer that has ChatML's control tokens and a chat template based on ChatML."""
    folder = tmp_path_factory.mktemp("chatml")
    config = json.loads(small_bpe())
    for i, name in enumerate(("<|im_start|>", "<|im_end|>"), 300):
        config["added_tokens"].append(config["added_tokens"][0] | {"id": i, "content": name})
    (folder / "tokenizer.json").write_text(json.dumps(config))
    template = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}"
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": template + CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    """Run the test in its own temporary directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_pictures(monkeypatch):
    """Do not draw the loss curve of a run in this process, which takes longer than the rest of a tiny run."""
    monkeypatch.setattr(report, "draw_curve", lambda *_: None)


@pytest.fixture
def small_steps(monkeypatch):
    """Encode a few hundred characters at a time, so that preparing a small corpus saves progress often."""
    monkeypatch.setattr(pipeline, "BATCH_CHARS", 300)
    monkeypatch.setattr(pipeline, "PIECE_CHARS", 200)


@pytest.fixture
def precious(tmp_path) -> Path:
    """A folder with a user's own files, which acorn must not change although it writes files of the same names."""
    folder = tmp_path / "precious"
    folder.mkdir()
    for name in ("diary", "model.safetensors", "state.json", "progress.json", "train_000000.bin", "0000.txt"):
        (folder / name).write_text(f"my own {name}\n")
    return folder


@pytest.fixture
def alarm():
    """Fail a test that hangs, after 100 seconds."""

    def ring(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
