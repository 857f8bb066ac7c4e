"""Fixtures that several test files share: a small dataset and run made once, scripts in forked processes, folders."""

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

torch.set_num_threads(1)  # two test processes side by side on two cores


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
    """The out_dir of a finished tiny run; read it, do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    result = script("train.py", *TINY, f"--dataset={dataset}", "--out_dir=out", cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "out"


@pytest.fixture(scope="session")
def start():
    """Return a function that forks a script from a process that has imported torch: `start("train.py", ..., cwd=...)`.

    So that a hundred kills take minutes.
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
    """The out_dir of the run RUN that nothing interrupts."""
    from forked import RUN

    folder = tmp_path_factory.mktemp("whole")
    assert start("train.py", *RUN, f"--dataset={dataset}", "--out_dir=out", cwd=folder).end() == 0
    return folder / "out"


@pytest.fixture(scope="session")
def chatml(tmp_path_factory) -> Path:
    """A folder with a byte-level tokenizer.json that has ChatML's control tokens, and a template of its own."""
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
    """The test runs in a new folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_pictures(monkeypatch):
    """A run in this process draws no loss curve, which takes longer than the rest of a tiny run."""
    monkeypatch.setattr(report, "draw_curve", lambda *_: None)


@pytest.fixture
def small_steps(monkeypatch):
    """Preparation notes its progress after each few hundred bytes."""
    monkeypatch.setattr(pipeline, "BATCH_CHARS", 300)
    monkeypatch.setattr(pipeline, "PIECE_CHARS", 200)


@pytest.fixture
def precious(tmp_path) -> Path:
    """A folder that nobody named to acorn, with the names that acorn writes in it."""
    folder = tmp_path / "precious"
    folder.mkdir()
    for name in ("diary", "model.safetensors", "state.json", "progress.json", "train_000000.bin", "0000.txt"):
        (folder / name).write_text(f"my own {name}\n")
    return folder


@pytest.fixture
def alarm():
    """A test that hangs ends after 100 seconds."""

    def ring(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
