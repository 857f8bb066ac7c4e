"""sample.py from the command line."""

import dataclasses
import json
import sys

import pytest
import torch
from helpers import fuzz, refused, refused_here, rounds, run_here, script, script_here
from hypothesis import strategies as st

import sample as sample_script
from acorn import UserError, settings
from acorn.inference.console import explain_keys
from acorn.inference.generate import Sampling, generate
from model import GPT, GPTConfig


@pytest.fixture(scope="module")
def sample(trained, tmp_path_factory):
    """Return a function that runs sample.py on the trained model, in a folder without data.

    The tokenizer comes from the checkpoint.
    """
    cwd = tmp_path_factory.mktemp("elsewhere")

    def call(*words, **kwargs):
        return run_here(sample_script.main, f"--out_dir={trained}", "--device=cpu", *words, cwd=cwd, **kwargs)

    return call


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory):
    """The out_dir of a run with a byte tokenizer, in which a Chinese character is three tokens."""
    cwd = tmp_path_factory.mktemp("bytes")
    (cwd / "t.txt").write_text("今天天气很好。我们去公园。" * 60)
    assert script_here("prepare", "text", "t.txt", "--tokenizer=byte", "--out=d", cwd=cwd).returncode == 0
    words = "--block_size=32 --batch_size=4 --gradient_accumulation_steps=1 --n_layer=2 --n_head=1 --n_embd=32"
    run = "--max_iters=200 --warmup_iters=0 --learning_rate=1e-2 --eval_interval=200 --log_interval=50 --eval_iters=1"
    machine = "--device=cpu --dtype=float32 --compile=False"
    result = script_here(
        "train.py", *words.split(), *run.split(), *machine.split(), "--dataset=d", "--out_dir=out", cwd=cwd
    )
    assert result.returncode == 0, result.stderr
    return cwd / "out"


def as_json(result):
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_samples_depend_only_on_their_seed(sample):
    three = as_json(sample("--num_samples=3", "--max_new_tokens=30", "--json=True", "--start=ANNA"))
    one = as_json(sample("--num_samples=1", "--max_new_tokens=30", "--json=True", "--start=ANNA"))
    later = as_json(sample("--num_samples=1", "--max_new_tokens=30", "--json=True", "--start=ANNA", "--seed=1339"))
    assert three[0] == one[0] and three[2] == later[0]
    assert len({s["text"] for s in three}) == 3
    assert all(s["n_tokens"] == 30 and s["stopped_by"] == "max_new_tokens" for s in three)


def test_output_starts_with_prompt_and_streaming_gives_the_same_text(sample):
    whole = sample("--num_samples=1", "--max_new_tokens=40", "--start=BORIS:")
    assert whole.stdout.startswith("BORIS:") and whole.stdout.endswith("\n---------------\n")
    assert sample("--num_samples=1", "--max_new_tokens=40", "--start=BORIS:", "--stream=True").stdout == whole.stdout
    assert "sliding window" in whole.stderr  # 46 tokens in a block of 32


def test_batch_of_prompts_from_a_file_matches_single_prompts(sample, tmp_path):
    prompts = ["ANNA:", "take the letter, and", "B"]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in prompts))
    words = ["--temperature=0", "--max_new_tokens=20", "--json=True"]
    batch = as_json(sample(*words, f"--prompts={tmp_path}/p.txt"))
    assert batch == as_json(sample(*words, f"--prompts={tmp_path}/p.jsonl"))
    assert [s["prompt"] for s in batch] == prompts
    alone = as_json(sample(*words, f"--start={prompts[1]}", "--num_samples=1"))
    assert alone[0] == batch[1]


def test_prompt_from_a_file_stop_strings_and_logprobs(sample, tmp_path):
    (tmp_path / "p.txt").write_text("CLARA:\n")
    words = [f"--start=FILE:{tmp_path}/p.txt", "--num_samples=1", "--json=True", "--logprobs=True"]
    (result,) = as_json(sample(*words, "--stop=e", "--stop=the", "--max_new_tokens=200"))
    assert result["prompt"] == "CLARA:\n"
    assert "e" not in result["text"] and result["stopped_by"] in ("e", "the")
    assert len(result["tokens"]) == len(result["logprobs"]) == result["n_tokens"]
    assert all(p <= 0 for p in result["logprobs"])


def test_interactive_mode_reads_prompts_until_end_of_input(trained):
    words = [f"--out_dir={trained}", "--device=cpu", "--interactive=True", "--max_new_tokens=5"]
    result = script("sample.py", *words, cwd="/", input="ANNA\nBORIS\n")
    assert result.returncode == 0
    assert result.stdout.count("---------------") == 2 and "ANNA" in result.stdout and "BORIS" in result.stdout
    piped = script_here("sample.py", *words, "--json=True", cwd="/", input="ANNA\n€\nBORIS\n")
    assert [json.loads(line)["prompt"] for line in piped.stdout.splitlines()] == ["ANNA", "BORIS"]
    assert "to exit" not in result.stderr + piped.stderr


def test_a_terminal_shows_how_to_exit(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    explain_keys("a prompt")
    assert capsys.readouterr().err.startswith("Type a prompt and press Enter; Ctrl-")


def test_incomplete_chinese_characters_are_not_printed(bytes_model):
    prompt = "今天天气很好。"
    words = ["--device=cpu", "--json=True", "--num_samples=2", f"--start={prompt}", "--temperature=0"]
    for n in (1, 2, 10):  # the last character may be incomplete
        words_n = [f"--out_dir={bytes_model}", *words, f"--max_new_tokens={n}"]
        for result in as_json(run_here(sample_script.main, *words_n, cwd="/")):
            assert result["prompt"] == prompt and "\ufffd" not in result["text"]
    streamed = script_here(
        "sample.py", f"--out_dir={bytes_model}", *words[:1], *words[3:], "--num_samples=1", "--stream", cwd="/"
    )
    assert streamed.stdout.startswith(prompt) and "\ufffd" not in streamed.stdout


def test_bad_input_is_refused(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    (tmp_path / "euro.txt").write_text("ANNA\n\n€\n")
    words = [f"--out_dir={trained}", "--device=cpu", "--start=€"]
    refused(script_here("sample.py", *words, cwd=tmp_path), "U+20AC")
    for words, said in (
        (["--start="], "empty"),
        (["--start=<|endoftext|>"], "no end-of-text token"),
        (["--start=FILE:nowhere.txt"], "nowhere.txt"),
        ([f"--start=FILE:{tmp_path}/bad.txt"], "byte 3"),
        ([f"--prompts={tmp_path}/empty.txt"], "is empty"),
        ([f"--prompts={tmp_path}/euro.txt"], "line 3 of"),
        (["--temperature=-1"], "must not be negative"),
        (["--top_p=0"], "above 0"),
        (["--checkpoint=step_000001"], "no step_000001"),
        (["--out_dir=nowhere"], "there is no folder nowhere"),
    ):
        words = [f"--out_dir={trained}", "--device=cpu", *words]
        refused_here(monkeypatch, capsys, sample_script.main, words, said)


def test_beam_search_prints_texts_by_descending_score(trained, monkeypatch, capsys):
    words = "--device=cpu --compile=False --start=ANNA --max_new_tokens=9 --json=True --logprobs=True --num_beams=4"
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={trained}", *words.split(), "--num_samples=3"])
    monkeypatch.setattr(sys, "stdin", None)
    assert sample_script.main() == 0
    best = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({each["text"] for each in best}) == 3 and all(each["prompt"] == "ANNA" for each in best)
    scores = [each["score"] for each in best]
    assert scores == sorted(scores, reverse=True)
    assert scores == pytest.approx([sum(each["logprobs"]) / each["n_tokens"] for each in best], abs=1e-4)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--num_beams=4 --temperature=0.5", "temperature"),
        ("--num_beams=4 --top_k=5", "top_k"),
        ("--num_beams=4 --seed=1", "seed"),
        ("--num_beams=4 --stream=True", "stream"),
        ("--num_beams=4 --chat=True", "chat"),
        ("--num_beams=4 --num_samples=5", "--num_beams=5"),
        ("--num_beams=0", "num_beams"),
        ("--num_beams=2 --length_penalty=1e9", "length_penalty"),
        ("--length_penalty=2", "--num_beams=4"),
        ("--early_stopping=never", "--num_beams=4"),
        ("--start=a --prompts=p.txt", "start and prompts"),
        ("--start=a --interactive", "start and interactive"),
        ("--prompts=p.txt --interactive", "prompts and interactive"),
    ],
)
def test_contradictory_settings_are_refused(words, said):
    given = settings.parse(sample_script.SampleSettings, words.split())
    with pytest.raises(UserError, match=said):
        sample_script.check(settings.build(sample_script.SampleSettings, given), given)


@rounds(30, 1500)
def test_arbitrary_sampling_settings_work_or_are_refused(rounds):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=6, vocab_size=20, n_layer=1, n_head=2, n_embd=8, pos="rope"))
    names = [f.name for f in dataclasses.fields(Sampling)] + ["num_samples", "max_new_tokens", "seed"]
    values = [*"-1 0 1 2 5 0.3 1e-320 1e308 1e30 1e18 nan inf x".split(), ""]

    def one(chosen: dict[str, str], prompts: list[list[int]]) -> None:
        argv = [f"--{name}={value}" for name, value in chosen.items()]
        try:
            given = settings.parse(sample_script.SampleSettings, argv)
            s = settings.build(sample_script.SampleSettings, given)
            sample_script.check(s, given)
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
    fuzz(one, rounds, chosen, st.lists(st.lists(st.integers(0, 14), min_size=1, max_size=9), min_size=1, max_size=3))
