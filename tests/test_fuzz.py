"""Any settings, shard headers, sampling parameters and texts: they work, or one sentence refuses them.

The choices of hypothesis are the same in each run (`derandomize`); the suite tries a few, the slow tests many.
"""

import contextlib
import dataclasses
import json
import math
import signal
import struct
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script
from hypothesis import HealthCheck, given
from hypothesis import settings as how
from hypothesis import strategies as st
from test_tokenizer import BPE, GPT2, LLAMA

import prepare.__main__ as prepare_cli
import sample
import train
from acorn import UserError, report, settings
from acorn.data.shards import LAYOUTS, Tokens, load_dataset, open_shard
from acorn.data.tokenizer import ByteTokenizer, StreamDecoder, from_dict, load_hf, tokenizer_hash, train_char
from acorn.inference.generate import Sampling, draw, generate
from model import GPT, GPTConfig
from prepare.encoding import binary_type


def examples(few: int, many: int):
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


def fuzz(test, examples: int, *strategies) -> None:
    """Call `test` with so many choices from the strategies, and say how many there were."""
    count = 0

    @how(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.tuples(*strategies))
    def counted(values):
        nonlocal count
        count += 1
        test(*values)

    counted()
    print(f"{count} examples")


# ---------------------------------------------------------------------------------------------------------------------
# Settings

# a model of some hundred parameters, two updates; a machine that is as it is
BASE = dict(block_size=8, batch_size=2, gradient_accumulation_steps=2, n_layer=1, n_head=2, n_embd=16, ngram_rows=50)
BASE |= dict(max_iters=2, eval_interval=1, eval_iters=1, warmup_iters=1, device="cpu", dtype="float32", compile=False)
# what is right in nearly any company
PLAIN = dict(
    block_size=[1, 2, 5, 8],
    batch_size=[1, 3],
    gradient_accumulation_steps=[1, 3],
    n_layer=[1, 2],
    n_head=[1, 2, 4],
    n_kv_head=[0, 1, 2],
    n_embd=[16, 24],
    n_hidden=[0, 7],
    ngram=[1, 2, 3],
    ngram_rows=[1, 9],
    ngram_dropout=[0.0, 0.5],
    dropout=[0.0, 0.5],
    attn_dropout=[-1, 0.0, 0.3],
    logit_softcap=[0.0, 5.0],
    eval_interval=[1, 2, 7],
    log_interval=[1, 3],
    eval_iters=[0, 1],
    keep_checkpoints=[1, 3],
    sample_interval=[0, 1],
    max_iters=[0, 1, 2],
    learning_rate=[0.0, 1e-3],
    muon_lr=[0.0, 0.02],
    min_lr=[0.0, 1e-4],
    weight_decay=[0.0, 0.1],
    beta1=[0.0, 0.9],
    beta2=[0.0, 0.99],
    grad_clip=[0.0, 1.0],
    warmup_iters=[0, 1, 5],
    lr_decay_iters=[0, 1, 9],
    cooldown_frac=[0.1, 1.0],
    seed=[0, 7],
    max_bad_steps=[1, 20],
    lora_rank=[0, 2],
    lora_alpha=[1, 16.0],
    lora_targets=["c_attn|c_fc", "mlp"],
    freeze=["", "wte", r"h\.0"],
    init_from=["scratch", "RUN"],
    dataset=["CHAR", "BYTE", "BYTE:1,OTHER:2"],
    dtype=["float32", "bfloat16", "float16", "auto"],
)
STRANGE = {
    int: "-1 0 1e0 2.5 1099511627776 1e18 9223372036854775808 1e30 -1e30 nan inf x 0x10 ".split(" "),
    float: "-1 0 1 -0.0 1e-320 1e-30 1e30 1e308 1e999 nan -inf x 0.999999999 ".split(" "),
    str: ["", " ", "nowhere", "a\nb", "(", "*", "\udcff", "x" * 300, "../..", "a:1,b:x", ":", ",", "0"],
}
LEFT_OUT = {"out_dir", "wandb_log", "wandb_project", "wandb_run_name", "compile", "device"}


@st.composite
def words(draw) -> dict[str, str]:
    """Settings for the command line: some of those that are plain, and at times one or two that are strange."""
    types_of = {n: t for n, t in typing.get_type_hints(train.TrainSettings).items() if n not in LEFT_OUT}
    chosen = {k: str(v) for k, v in BASE.items()}
    for name in draw(st.lists(st.sampled_from(sorted(types_of)), max_size=12, unique=True)):
        if name in PLAIN:
            values = PLAIN[name]
        else:
            values = [True, False] if types_of[name] is bool else typing.get_args(types_of[name])
        chosen[name] = str(draw(st.sampled_from(list(values))))
    strange = [name for name, kind in types_of.items() if kind in STRANGE]
    for name in draw(st.lists(st.sampled_from(strange), max_size=2)):
        chosen[name] = draw(st.sampled_from(STRANGE[types_of[name]]))
    if float_of(chosen["max_iters"]) > 2:  # only to be told how long that would take
        chosen["dry_run"] = "True"
    return chosen


def float_of(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


@pytest.fixture(scope="module")
def places(dataset, tmp_path_factory) -> dict[str, str]:
    """What the names in PLAIN stand for."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("BYTE", "OTHER"):
        (folder / name).write_text(f"{name} is what it says. " * 50)
        argv = ["text", str(folder / name), "--tokenizer=byte", f"--out={folder / name.lower()}", f"--name={name}"]
        prepare_cli.prepare_corpus(argv)
    run = folder / "run"
    argv = [f"--{k}={v}" for k, v in BASE.items()]
    done = script("train.py", *argv, f"--dataset={folder / 'byte'}", f"--out_dir={run}", cwd=folder)
    assert done.returncode == 0, done.stderr
    return {"CHAR": str(dataset), "BYTE": str(folder / "byte"), "OTHER": str(folder / "other"), "RUN": str(run)}


@examples(40, 2000)
def test_any_settings_train_two_steps_or_are_refused_with_a_sentence(places, tmp_path, monkeypatch, capsys, examples):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "draw_curve", lambda *args: None)  # slow, and the same for all
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    runs = trained = refused = 0

    def one(chosen: dict[str, str]) -> None:
        nonlocal runs, trained, refused
        runs += 1
        for name in ("dataset", "init_from"):
            for place, path in places.items():
                chosen[name] = chosen.get(name, "BYTE" if name == "dataset" else "scratch").replace(place, path)
        out_dir = Path(f"o{runs}")
        argv = ["train.py", *(f"--{name}={value}" for name, value in chosen.items()), f"--out_dir={out_dir}"]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            code = train.main_or_advice()
        except (UserError, OSError) as error:  # of both `run` makes a sentence
            assert 10 < len(str(error)) < 3000
            assert not out_dir.exists()
            refused += 1
            return
        if code == 1:
            assert "had a non-finite gradient" in capsys.readouterr().err
        elif "True" not in (chosen.get("eval_only"), chosen.get("dry_run")):
            steps = [line["step"] for line in report.read_metrics(out_dir / "metrics.jsonl") if "loss" in line]
            every = int(float(chosen.get("log_interval", 1)))
            assert steps == list(range(0, int(float(chosen["max_iters"])), every))
        trained += 1

    try:
        fuzz(one, examples, words())
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert trained > examples / 10 and refused > examples / 10
    print(f"{trained} trained, {refused} refused")


# ---------------------------------------------------------------------------------------------------------------------
# Shards


@st.composite
def shard_bytes(draw) -> bytes:
    """A shard, right or nearly right: a header of three numbers and more, then any bytes."""
    magic = draw(st.sampled_from([*LAYOUTS, 0, -1, 20240521, 2**31 - 1]))
    version = draw(st.sampled_from([1, 7, 0, -1, 2**31 - 1]))
    body = draw(st.binary(max_size=40))
    width = LAYOUTS[magic][1].itemsize if magic in LAYOUTS else 2
    tokens = draw(st.sampled_from([len(body) // width, len(body), 0, -1, -(2**31), 2**31 - 1, 2**30]))
    rest = draw(st.sampled_from([bytes(1012), b"\xff" * 1012, bytes(1011), b"", bytes(1013)]))
    return struct.pack("<iii", magic, version, tokens) + rest + body


@examples(300, 20000)
def test_any_shard_header_is_right_or_refused_with_a_sentence(tmp_path, examples):
    path = tmp_path / "x_train_000000.bin"

    def one(data: bytes) -> None:
        path.write_bytes(data)
        magic, version, n = struct.unpack("<iii", data[:12])
        codes = {(20240520, 1): "H", (20240801, 7): "I", (20261122, 1): "B"}
        code = codes.get((magic, version))
        right = code is not None and n >= 0 and len(data) == 1024 + n * struct.calcsize(code)
        try:
            shard = open_shard(path)
        except UserError as error:
            assert not right and str(path) in str(error)
            return
        assert right and shard.tokens == n
        expected = struct.unpack(f"<{n}{code}", data[1024:])
        assert tuple(Tokens([shard], 2**32).read([0], n)[0].tolist()) == expected
        if expected and max(expected) >= 300:
            with pytest.raises(UserError, match="outside the vocabulary"):
                Tokens([shard], 300).read([0], n)

    fuzz(one, examples, shard_bytes())


@examples(100, 3000)
def test_any_bytes_in_a_nanogpt_folder_are_tokens_or_a_sentence(tmp_path, examples):
    def one(train_bin: bytes, meta_pkl: bytes | None) -> None:
        (tmp_path / "train.bin").write_bytes(train_bin)
        (tmp_path / "meta.pkl").unlink(missing_ok=True)
        if meta_pkl is not None:
            (tmp_path / "meta.pkl").write_bytes(meta_pkl)
        try:
            tokens = load_dataset(str(tmp_path)).train
            ids = tokens.read([0], len(tokens))[0]
        except UserError:
            return
        assert ids.tolist() == np.frombuffer(train_bin, "<u2").tolist()

    opcodes = st.lists(
        st.sampled_from([bytes([b]) for b in b"}])(.NKaqhjrtsuebRcoiX\x8c\x80\x94\x00\x02\n"]), max_size=30
    )
    fuzz(one, examples, st.binary(max_size=9), st.none() | st.binary(max_size=30) | opcodes.map(b"".join))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

PROBABILITIES = st.sampled_from([0.0, 1e-320, 1e-9, 0.1, 0.5, 0.999999, 1.0])
samplings = st.builds(
    Sampling,
    repetition_penalty=st.sampled_from([1e-308, 1e-30, 0.5, 1.0, 1.3, 1e30, 1e308]),
    no_repeat_ngram_size=st.sampled_from([0, 1, 2, 3, 10**18]),
    temperature=st.sampled_from([0.0, 1e-320, 1e-9, 0.8, 1.0, 50.0, 1e308]),
    top_k=st.sampled_from([0, 1, 2, 3, 7, 10**18]),
    top_p=PROBABILITIES.filter(bool),
    min_p=PROBABILITIES,
)
any_logit = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(
    [0.0, 1.0, -1.0, 3.4e38, -3.4e38]
)


@examples(400, 20000)
def test_any_sampling_parameters_draw_a_token_that_they_allow(examples):
    def one(how: Sampling, values: list[float], row: list[int], seed: int) -> None:
        logits = torch.tensor(values, dtype=torch.float32)
        row = [i % len(values) for i in row]
        token = draw(logits, row, how, torch.Generator().manual_seed(seed))
        assert token == draw(logits, row, how, torch.Generator().manual_seed(seed))
        assert 0 <= token < len(values)
        if how.repetition_penalty == 1 and not how.no_repeat_ngram_size:
            if how.top_k:
                assert sum(value > logits[token] for value in logits) < how.top_k
            if how.temperature == 0 or how.top_k == 1:
                assert token == int(np.argmax(logits.numpy()))

    fuzz(
        one,
        examples,
        samplings,
        st.lists(any_logit, min_size=1, max_size=9),
        st.lists(st.integers(0, 8), max_size=12),
        st.integers(0, 2**62 - 1),
    )


@examples(30, 1500)
def test_any_sample_settings_give_text_or_a_sentence(examples):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=6, vocab_size=20, n_layer=1, n_head=2, n_embd=8, pos="rope"))
    names = [f.name for f in dataclasses.fields(Sampling)] + ["num_samples", "max_new_tokens", "seed"]
    values = [*"-1 0 1 2 5 0.3 1e-320 1e308 1e30 1e18 nan inf x".split(), ""]

    def one(chosen: dict[str, str], prompts: list[list[int]]) -> None:
        argv = [f"--{name}={value}" for name, value in chosen.items()]
        try:
            s = settings.build(sample.SampleSettings, settings.parse(sample.SampleSettings, argv))
            sample.check(s)
        except UserError as error:
            assert len(str(error)) > 10
            return
        how = Sampling(**{f.name: getattr(s, f.name) for f in dataclasses.fields(Sampling)})
        n, drawn = min(s.max_new_tokens, 9), []
        rows = generate(model, prompts, n, how, [s.seed] * len(prompts), lambda *t: drawn.append(t), n_vocab=15)
        for row, prompt in zip(rows, prompts, strict=True):
            assert row[: len(prompt)] == prompt and len(row) == len(prompt) + n
            assert all(0 <= token < 15 for token in row[len(prompt) :])
        assert all(logprob <= 0 for _, _, logprob in drawn)

    chosen = st.dictionaries(st.sampled_from(names), st.sampled_from(values), max_size=4)
    fuzz(one, examples, chosen, st.lists(st.lists(st.integers(0, 14), min_size=1, max_size=9), min_size=1, max_size=3))


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

texts = st.text(max_size=40) | st.lists(
    st.sampled_from(
        ["<|endoftext|>", "</s>", "\u2581", " ", "\ufeff", "\r\n", "\ud800", "é", "字", "\U0001f600", "\x00"]
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def gpt2_hf(tmp_path_factory):
    """GPT-2's tokenizer as a tokenizer.json with a token more, so that it is not known for GPT-2's own."""
    from acorn.data.tokenizer import add_tokens

    folder = tmp_path_factory.mktemp("hf")
    (folder / "tokenizer.json").write_text(json.dumps(add_tokens(GPT2, ["<|note|>"]).config))
    return load_hf(folder)


@pytest.mark.parametrize("kind", ["char", "byte", "gpt2", "bpe", "hf", "sentencepiece"])
@examples(60, 4000)
def test_any_text_goes_through_any_tokenizer(kind, gpt2_hf, examples):
    fixed = {"byte": ByteTokenizer(), "gpt2": GPT2, "bpe": BPE, "hf": gpt2_hf, "sentencepiece": LLAMA}.get(kind)
    again = None if fixed is None else from_dict(json.loads(json.dumps(fixed.to_dict())))
    assert again is None or tokenizer_hash(again) == tokenizer_hash(fixed)

    def one(text: str) -> None:
        tokenizer = fixed or train_char([text, "x"])
        copy = again or from_dict(json.loads(json.dumps(tokenizer.to_dict())))
        ids = tokenizer.encode(text)
        expected = text if kind == "char" else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if kind == "sentencepiece":  # writes a space so, and puts one first where there is none
            expected = expected.replace("\u2581", " ").removeprefix(" ")
        assert tokenizer.decode(ids) == expected
        assert copy.encode(text).tolist() == ids.tolist()
        assert not set(ids.tolist()) & set(tokenizer.control.values())  # text never becomes a control token
        assert [each.tolist() for each in tokenizer.encode_batch([text, "", text])][::2] == [ids.tolist()] * 2
        assert tokenizer.token_bytes()[ids].sum() == len(tokenizer.decode_bytes(ids))

    fuzz(one, examples, texts)


@pytest.mark.parametrize("kind", ["byte", "gpt2", "bpe", "hf", "sentencepiece"])
@examples(60, 4000)
def test_any_ids_come_out_as_the_same_text_at_once_and_one_by_one(kind, gpt2_hf, examples):
    tokenizer = {"byte": ByteTokenizer(), "gpt2": GPT2, "bpe": BPE, "hf": gpt2_hf, "sentencepiece": LLAMA}[kind]

    def one(numbers: list[int]) -> None:
        ids = [i % tokenizer.n_vocab for i in numbers]
        joined = b"".join(tokenizer.decode_bytes([i]) for i in ids)
        assert tokenizer.decode_bytes(ids) == joined
        stream = StreamDecoder(tokenizer)
        pieces = "".join(stream.push(i) for i in ids) + stream.finish()
        whole = joined.decode("utf-8", "replace")
        # of a last character that is not whole, at most three bytes, nothing is shown
        assert whole.startswith(pieces) and whole.removeprefix(pieces) in ("", *("\ufffd" * n for n in (1, 2, 3)))

    fuzz(one, examples, st.lists(st.integers(0, 2**20), max_size=20))


@examples(25, 1500)
def test_any_bytes_are_prepared_as_they_are_or_refused_with_a_sentence(tmp_path, monkeypatch, capsys, examples):
    monkeypatch.chdir(tmp_path)

    def one(data: bytes, errors: str) -> None:
        Path("t.txt").write_bytes(data)
        argv = ["text", "t.txt", "--tokenizer=byte", "--overwrite", "--val_fraction=0.5", f"--errors={errors}"]
        with contextlib.suppress(UserError):
            prepare_cli.prepare_corpus(argv)  # with any detected encoding
        argv.append("--encoding=utf-8")
        if binary_type(data):
            with pytest.raises(UserError, match="not text"):
                prepare_cli.prepare_corpus(argv)
            return
        try:
            text = data.decode("utf-8", errors).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError:
            with pytest.raises(UserError, match="not UTF-8"):
                prepare_cli.prepare_corpus(argv)
            return
        try:
            prepare_cli.prepare_corpus(argv)
        except UserError as error:
            assert len(text) < 4 and ("too short" in str(error) or "empty" in str(error))
            return
        loaded = load_dataset("t")
        ids = np.concatenate([split.read([0], len(split))[0] for split in (loaded.train, loaded.val)])
        assert ids[0] == 256 and bytes(ids[1:].tolist()).decode() == text

    data = st.binary(max_size=30) | st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace"))
    fuzz(one, examples, data, st.sampled_from(["strict", "replace"]))
