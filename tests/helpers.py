"""Helpers shared by several test files: settings and texts for tiny runs, functions that run the scripts, small models,
datasets and checkpoints, and invalid input.
"""

import contextlib
import csv
import functools
import gc
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import unicodedata
import unittest.mock
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import acorn
import prepare.__main__ as prepare_cli
from acorn import UserError, checkpoint, files, report
from acorn.data.shards import PARTIAL, Dataset, ShardWriter, Tokens, open_shard, write_meta
from acorn.data.tokenizer import tokenizer_hash, train_char
from acorn.data.tokenizer_json import HFTokenizer
from acorn.data.tokenizer_kinds import get_tokenizer, train_bpe
from acorn.training import optim
from model import GPT, GPTConfig

REPO = Path(__file__).resolve().parent.parent
# restricts the libraries to AVX2 on a newer CPU
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="file names and devices as on Linux")
on_posix = pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and forks as on POSIX systems")

# a tiny run: about 30,000 parameters and 40 updates of 256 tokens; it takes a few seconds
TINY = (
    "--block_size=32 --batch_size=4 --gradient_accumulation_steps=2 --n_layer=2 --n_head=2 --n_embd=32 --dropout=0.1 "
    "--eval_interval=10 --log_interval=1 --eval_iters=3 --max_iters=40 --warmup_iters=5 --learning_rate=1e-3 "
    "--min_lr=1e-4 --device=cpu --dtype=float32 --compile=False"
).split()
# an even smaller run: pass these arguments after TINY, to override it
SMALL = "--n_layer=1 --n_embd=16 --block_size=16 --eval_interval=2 --eval_iters=1 --keep_checkpoints=1".split()

TEXT = "".join(
    f"{name}:\n{verb} the {thing}, and {verb} it {how}.\n\n"
    for name in ("ANNA", "BORIS", "CLARA", "DMITRI")
    for verb in ("take", "bring", "leave", "forget")
    for thing in ("letter", "lantern", "horse", "key")
    for how in ("slowly", "at once", "before night", "with care")
)
CATEGORIES: dict[str, str] = {}  # Unicode category -> some of its characters
for code in range(0x20000):
    category = unicodedata.category(chr(code))
    if category != "Cs" and len(CATEGORIES.setdefault(category, "")) < 3 * (1 + code // 0x2000):
        CATEGORIES[category] += chr(code)

TEXTS = [  # difficult to tokenize
    "",
    "a",
    "Hello, world!\n\nIt's we'll they've  two  spaces \t tab\r\n",
    "<|endoftext|> stays text <|endoftext|>",
    "今天天气很好。 Привет, мир! שלום مرحبا",
    "emoji 👩‍👩‍👧‍👦 🇫🇷 e\u0301 \u00a0nbsp \u3000 wide \x1c\x85\u2028 separators",
    "\ufeffmark \x00 nul \x7f",
    "12345 3.14 1,000,000 ½ Ⅷ",
    "x = [i**2 for i in range(10)]\n    return x\n\n\n\n",
    " " * 50 + "x" + "\n" * 50,
    "ſ'S 'LL don’t",
    "<|endoftext|",
    "lone \ud800 and \udc00\udc01 surrogates",
    "".join(map(chr, range(0x250))),  # includes control characters
    # characters of each category, without and with spaces between them
    "".join(char for group in CATEGORIES.values() for char in group),
    "  ".join(" ".join(group) + "a1" for group in CATEGORIES.values()),
]

FOX = "The quick brown fox jumps over the lazy dog.\n" * 40
RECORDS = [f"Record {i}: " + FOX[: 10 + i % 60] for i in range(300)]


# ---------------------------------------------------------------------------------------------------------------------
# Scripts


def script(*words, cwd, env=None, timeout=120, **kwargs) -> subprocess.CompletedProcess:
    """Run `python SCRIPT ...` in the folder `cwd`, with a script of this repo. Captures stdout and stderr as text."""
    name, *rest = [str(word) for word in words]
    command = [sys.executable, str(REPO / name), *rest]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "NO_COLOR": "1", **(env or {})}
    return subprocess.run(command, cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True, **kwargs)


def start_process(*words, cwd) -> subprocess.Popen:
    """Start `python ...` in the folder `cwd` and return the process. Its stderr is redirected to stdout."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd, env=env, **pipes)


def torchrun(processes: int, *words) -> list[str]:
    """Return the arguments of `python` that start this number of ranks on this machine; `words` go to torchrun."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words]


@contextlib.contextmanager
def keep_signal_handlers():
    """Restore the signal handlers that a run in this process replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def release_locks(words) -> None:
    """Release the lock that an earlier run in this process still holds.

    If each run had its own process, the end of that process would release it.
    """
    if {"--init_from=resume", "--overwrite=True"} & set(words):
        gc.collect()


def train_here(monkeypatch, *words) -> int:
    """Run train.py in this process and return its exit code."""
    from train import main

    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    release_locks(words)
    with keep_signal_handlers():
        return main()


def run_here(main, *words, cwd: Path, input: str = "") -> subprocess.CompletedProcess:
    """Run a script's `main` in this process, and return the same type of result as `script`."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    before, folder, code = (sys.argv, sys.stdin), Path.cwd(), 0
    sys.argv, sys.stdin = ["script.py", *map(str, words)], io.TextIOWrapper(io.BytesIO(input.encode()), "utf-8")
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), keep_signal_handlers():
            acorn.run(main)
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv, sys.stdin = before
        os.chdir(folder)
    stdout, stderr = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(words, code, stdout, stderr)


def script_here(name, *words, cwd, input: str = "") -> subprocess.CompletedProcess:
    """Run a script in this process, without drawing the loss curve. A few seconds faster than `script`."""
    import sample
    from train import main_or_advice

    mains = {"train.py": main_or_advice, "sample.py": sample.main, "prepare": prepare_cli.main}
    release_locks(words)
    with unittest.mock.patch.object(report, "draw_curve"):
        return run_here(mains[name], *words, cwd=cwd, input=input)


def train(cwd, dataset, *words) -> subprocess.CompletedProcess:
    """Run train.py in this process with the settings in TINY."""
    return script_here("train.py", *TINY, f"--dataset={dataset}", *words, cwd=cwd)


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """Assert that a script refused bad input: exit code 2, no traceback, and an error message with these words."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), result.stderr
    for word in words:
        assert word in last, last


CLOCKS = ("seconds", "tokens_per_second", "mfu", "memory", "waited")  # differ from run to run


def refused_here(monkeypatch, capsys, main, words: list[str], said: str) -> None:
    """Run a script's `main` in this process, and assert that it refuses its arguments, as `refused` does."""
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as ended:
        acorn.run(main)
    assert ended.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and said in last, last


def metrics(out_dir: Path) -> list[dict]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def numbers(out_dir: Path) -> list[dict]:
    """Return the lines of a run's metrics.jsonl without the values that differ from run to run (CLOCKS)."""
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in metrics(out_dir)]


def losses(out_dir: Path) -> list[float]:
    """Return the training and validation losses in a run's metrics.jsonl, in the order of its lines."""
    return [line["val_loss"] if "val_loss" in line else line["loss"] for line in metrics(out_dir)]


class Terminal(io.StringIO):
    """A stdout that stores its text and claims to be a terminal."""

    def isatty(self):
        return True

    def reconfigure(self, **_):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Models and checkpoints

STATE = {"settings": {}, "tokenizer": get_tokenizer("byte").to_dict(), "val_loss": 1.5}


def small_model(seed=0, **changes) -> GPT:
    """Return a random model of a few thousand parameters for byte tokens."""
    torch.manual_seed(seed)
    shape = dict(block_size=8, vocab_size=257, n_layer=1, n_head=2, n_embd=16)
    return GPT(GPTConfig(**{**shape, **changes}))


def small_optimizers(m: GPT, kind="adamw", updates=1) -> list[torch.optim.Optimizer]:
    """Return optimizers for the model, after this number of updates."""
    optimizers = optim.make_optimizers(m, kind, 1e-3, 0.02, 0.1, (0.9, 0.95), "cpu")
    idx = torch.arange(16).view(2, 8)
    for _ in range(updates):
        m(idx, idx)[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return optimizers


def save_small(folder: Path, step: int, m: GPT | None = None, keep=2, best=None, optimizers=None) -> Path:
    """Save a checkpoint of a small model and return its folder. `best` is the step of the best checkpoint."""
    m, writer = m or small_model(step), checkpoint.Writer(folder, keep)
    writer.save(m, optimizers or small_optimizers(m), {**STATE, "step": step, "best_step": best})
    assert writer.wait()
    return folder / f"step_{step:06d}"


def make_older(folder: Path, optimizer: bytes) -> None:
    """Convert a checkpoint to format 1, with these bytes as its optimizer.pt."""
    (folder / "optimizer.safetensors").unlink(missing_ok=True)
    (folder / "optimizer.pt").write_bytes(optimizer)
    state = json.loads((folder / "state.json").read_text()) | {"format": 1}
    state["sha256"] |= {"optimizer.pt": files.sha256(folder / "optimizer.pt"), "state": checkpoint.state_hash(state)}
    (folder / "state.json").write_text(json.dumps(state))


def same_weights(a: GPT, b: GPT) -> bool:
    """Return whether two models have bitwise equal tensors with the same names."""
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(p, q) for (name, p), (other, q) in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Datasets


def prepare(*argv) -> dict:
    """Run `python prepare ...` in this process and return the meta.json of the only dataset in data/."""
    prepare_cli.prepare_corpus([str(arg) for arg in argv])
    (meta,) = Path("data").glob("*/meta.json")
    return json.loads(meta.read_text())


def prepare_fails(match: str, *argv) -> None:
    """Assert that `python prepare ...` raises a UserError whose message matches."""
    with pytest.raises(UserError, match=match):
        prepare_cli.prepare_corpus([str(arg) for arg in argv])


def ids_of(tokens: Tokens) -> list[int]:
    """Return all token ids of a split."""
    return tokens.read([0], len(tokens))[0].tolist()


def documents_of(dataset: Dataset, split: str) -> list[str]:
    """Return the texts of a split's documents."""
    return dataset.tokenizer.decode(ids_of(getattr(dataset, split))).split("<|endoftext|>")[1:]


def leftovers() -> list[str]:
    """Return the files in and below the current folder that an interrupted preparation leaves behind."""
    return [str(path) for path in Path(".").rglob("*") if PARTIAL in path.parts or path.suffix == ".tmp"]


def read_all(dataset: Dataset) -> tuple:
    """Return the contents of a dataset: tokens and masks, the tokenizer's hash, the chat template and meta.json."""
    streams = [dataset.train, dataset.val, dataset.train.mask, dataset.val.mask]
    tokens = [ids_of(stream) for stream in streams if stream is not None]
    return tokens, tokenizer_hash(dataset.tokenizer), dataset.tokenizer.chat_template, dataset.meta


def write_records(path: str, key: str = "text") -> None:
    """Write RECORDS to a file, in the format given by its suffix."""
    rows = [{"id": i, key: text} for i, text in enumerate(RECORDS)]
    if path.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=70)
    elif path.endswith(".csv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["id", key])
            writer.writeheader()
            writer.writerows(rows)
    else:
        data = "\n".join(json.dumps(row) for row in rows).encode()
        if path.endswith(".zst"):  # two frames, as written by parallel compressors
            data = b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (data[:999], data[999:]))
        Path(path).write_bytes(gzip.compress(data) if path.endswith(".GZ") else data)


def hub_folder() -> None:
    """Write a dataset in the hub's layout into the folder hubset: 600 training records and 2 validation records."""
    os.makedirs("hubset/data")
    write_records("hubset/data/train-00000-of-00002.parquet")
    write_records("hubset/data/train-00001-of-00002.parquet")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["val one", "val two"]}), "hubset/data/validation-00000-of-00001.parquet"
    )


def make_tokens(folder: Path, ids, vocab_size=2000, shard_tokens=10**8) -> Tokens:
    """Write these ids to shards, and open them."""
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, "train", vocab_size, shard_tokens) as writer:
        writer.write(np.asarray(ids))
    return Tokens([open_shard(folder / shard["file"]) for shard in writer.shards], vocab_size)


def make_dataset(folder: Path, tokenizer=None, text="hello world " * 50) -> dict:
    """Write a dataset whose last 50 tokens are the validation split, and return its meta.json."""
    tokenizer = tokenizer or train_char([text])
    folder.mkdir(parents=True)
    ids = tokenizer.encode(text)
    meta = {
        "format": 1,
        "name": folder.name,
        "tokenizer": tokenizer.to_dict(),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "vocab_size": tokenizer.n_vocab,
        "documents": 1,
    }
    for split, part in (("train", ids[:-50]), ("val", ids[-50:])):
        with ShardWriter(folder, split, tokenizer.n_vocab) as writer:
            writer.write(part)
        meta[split] = {"tokens": len(part), "bytes": len(part), "shards": writer.shards}
    write_meta(folder, meta)
    return meta


def chat_dataset(folder: Path) -> Path:
    """Prepare 200 conversations in several shards and return the dataset's folder."""
    pairs = [{"prompt": f"Say {n} times a.", "response": " ".join("a" * (n % 9 + 1))} for n in range(200)]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    prepare_cli.prepare_corpus(
        ["chat", str(folder / "p.jsonl"), "--tokenizer=byte", f"--out={folder / 'd'}", "--shard_tokens=2000"]
    )
    return folder / "d"


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


@functools.cache
def bpe_tokenizer() -> HFTokenizer:
    """Return a byte-level BPE of 340 tokens, learned from TEXT."""
    return train_bpe([TEXT], 340)


def sentencepiece(prepend: str = "first") -> dict:
    """Return a tokenizer.json like that of Llama 2.

    Spaces become U+2581, one is prepended to the text, and unknown characters become byte tokens.
    """
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    config = json.loads(backend.to_str())
    space = {"pattern": {"String": " "}, "content": "\u2581"}
    normalizers = [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", **space}]
    if prepend == "normalizer":  # as in older files
        config |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": normalizers}}
    else:
        config["pre_tokenizer"] |= {"prepend_scheme": prepend, "split": False}
    back = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    config["decoder"] = {"type": "Sequence", "decoders": [*back, {"type": "Fuse"}, strip]}
    config["added_tokens"] = config["added_tokens"][:3]
    return config


@functools.cache
def llama_tokenizer() -> HFTokenizer:
    """Return a tokenizer like that of Llama 2."""
    return HFTokenizer(sentencepiece(), "</s>", "<s>", "</s>")


def write_hf(folder: Path, config: dict | None = None, /, **files) -> Path:
    """Write a tokenizer.json (by default that of `bpe_tokenizer`) and other JSON files into a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(config or bpe_tokenizer().config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def tokenizer_json(**changes) -> dict:
    """Return the tokenizer.json of a small BPE with these keys replaced."""
    return train_bpe(["to be or not to be"], 270).config | changes


# ---------------------------------------------------------------------------------------------------------------------
# Conversations

PAIR = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi<|endoftext|>!"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "字"},
]
TWO = [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi"}]
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather now", "parameters": CITY}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
CALLING = [
    {"role": "user", "content": "Weather in Lima?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "18 C"},
    {"role": "assistant", "content": "It is 18 C."},
]


def conversation(n_turns: int, system: bool = False) -> list[dict]:
    """Return a conversation of `n_turns` questions and replies."""
    messages = [{"role": "system", "content": "Be kind."}] if system else []
    for i in range(n_turns):
        messages += [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Reply {i}."}]
    return messages


def spans(tokenizer, ids, learned) -> list[str]:
    """Return the text of each sequence of consecutive learned tokens."""
    edges = np.flatnonzero(np.diff([0, *learned, 0]))
    return [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]


@functools.cache
def small_bpe() -> str:
    """Return the tokenizer.json of a byte-level BPE of 300 tokens, learned from TEXT."""
    return json.dumps(train_bpe([TEXT], 300).config)


def with_control(folder: Path, control: list[str], template: str, **files) -> Path:
    """Write a byte-level tokenizer with these control tokens (first BOS, then EOS) and this chat template."""
    config = json.loads(small_bpe())
    first = config["added_tokens"].pop()
    for i, name in enumerate(dict.fromkeys(control), first["id"]):
        config["added_tokens"].append(first | {"id": i, "content": name})
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(config | files.pop("tokenizer", {})))
    settings = {"bos_token": control[0], "eos_token": control[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Repetition, damage, interruption


def rounds(few: int, many: int):
    """Parametrize a test with `rounds`: `few` in the default suite, and `many` as a slow test."""
    return pytest.mark.parametrize("rounds", [few, pytest.param(many, marks=pytest.mark.slow)])


def fuzz(test, rounds: int, *strategies) -> None:
    """Call `test` with up to `rounds` deterministic examples from the strategies, and print the number of examples."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    checks, count = list(HealthCheck), 0

    @settings(max_examples=rounds, derandomize=True, deadline=None, database=None, suppress_health_check=checks)
    @given(st.tuples(*strategies))
    def counted(values):
        nonlocal count
        count += 1
        test(*values)

    counted()
    print(f"{count} examples")


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Return the bytes with one random fault: a flipped bit, an overwritten range, a truncation or an insertion.

    Half of the positions are drawn from the first 2048 bytes.
    """
    at = chance.randrange(min(len(data), 2048) if chance.random() < 0.5 else len(data))
    length = chance.choice((1, 8, 512, 4096))
    kind = chance.choice(("bit", "range", "zeros", "cut", "grown"))
    if kind == "bit":
        return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "grown":
        return data[:at] + chance.randbytes(length) + data[at:]
    part = bytes(length) if kind == "zeros" else chance.randbytes(length)
    return (data[:at] + part + data[at + length :])[: len(data)]


def contents(folder: Path, without=()) -> dict[str, bytes]:
    """Return the bytes of all files below a folder by relative path, without files of the names in `without`."""
    found = (file for file in folder.rglob("*") if file.is_file() and file.name not in without)
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def stopping(function, calls: int):
    """Return a wrapper of `function` that raises KeyboardInterrupt after this number of calls."""
    left = iter(range(calls))

    def call(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments)

    return call


class Stopped(Exception):
    """Raised to stop a preparation as a kill would: the next attempt finds only the files on disk."""


class Calls:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments
