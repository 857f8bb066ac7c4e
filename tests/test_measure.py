"""`python -m acorn.evaluate`: figures and standard errors against what hand computation gives, on a tiny chat model."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO, refused, script

from acorn import UserError, chat, checkpoint, runtime
from acorn.measure import choice_logprobs, encode_choice, main, measure_answers, ratio_and_error
from acorn.tokenizer import get_tokenizer
from model import GPT, GPTConfig

COLORS = {"grass": "green", "snow": "white", "coal": "black", "sky": "blue"}


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    """A folder with a byte model that learned by heart, from conversations of one turn, the colors of some things; the
    others went to validation."""
    cwd = tmp_path_factory.mktemp("chatting")
    pairs = [{"prompt": f"{thing}?", "response": color} for thing, color in COLORS.items()]
    (cwd / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (cwd / "many.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs for _ in range(10)))
    made = script("prepare", "chat", "many.jsonl", "--tokenizer=byte", "--val_fraction=0.5", "--out=d", cwd=cwd)
    assert made.returncode == 0, made.stderr
    words = "--block_size=64 --batch_size=8 --gradient_accumulation_steps=1 --n_layer=2 --n_head=2 --n_embd=64"
    run = "--max_iters=150 --warmup_iters=0 --learning_rate=3e-3 --eval_interval=150 --log_interval=50 --eval_iters=0"
    machine = "--device=cpu --dtype=float32 --compile=False --document_mask=True"
    trained = script("train.py", *words.split(), *run.split(), *machine.split(), "--dataset=d", "--out_dir=o", cwd=cwd)
    assert trained.returncode == 0 and "sample.py --chat=True --out_dir=o" in trained.stdout, trained.stderr
    return cwd


def measure(*words, cwd):
    command = [sys.executable, "-m", "acorn.evaluate", *map(str, words), "--device=cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    return subprocess.run(command, cwd=cwd, env=env, timeout=120, capture_output=True, text=True)


def figures(result):
    assert result.returncode == 0, result.stderr
    return {(row["on"], row["measure"]): row for row in json.loads(result.stdout)["results"]}


def test_answers_choices_and_text_of_a_model_that_knows_some_colors(chatting):
    known = [json.loads(line) for line in (chatting / "pairs.jsonl").read_text().splitlines()]
    colors = list(COLORS.values())
    choices = [
        {"prompt": pair["prompt"], "choices": colors, "answer": colors.index(pair["response"])} for pair in known
    ]
    (chatting / "choices.jsonl").write_text("".join(json.dumps(choice) + "\n" for choice in choices))
    (chatting / "text.txt").write_text("grass is green, and the sky is blue. " * 9)
    words = ["--pairs=pairs.jsonl", "--choices=choices.jsonl", "--text=text.txt", "--answers=a.jsonl"]
    result = measure("o", *words, "--json", cwd=chatting)
    found = figures(result)
    answered = [json.loads(line) for line in (chatting / "a.jsonl").read_text().splitlines()]
    right = [record["answered"] == record["response"] for record in answered[:4]]
    assert any(right)  # what it was taught, it says, and there it stops
    exact = found["pairs.jsonl", "exact match"]
    assert exact["value"] == 25 * sum(right) and exact["n"] == 4
    assert exact["standard_error"] == pytest.approx(np.std([100 * r for r in right], ddof=1) / 2)
    chosen = [record["chosen"] == record["answer"] for record in answered[4:]]
    assert found["choices.jsonl", "accuracy"]["value"] == 25 * sum(chosen)
    assert all(c for r, c in zip(right, chosen, strict=True) if r)  # the likeliest text is the likeliest choice

    bits, loss = found["text.txt", "bits per byte"], found["text.txt", "loss"]
    assert bits["n"] == loss["n"] == 9 * 37  # a token is a byte, and the first is predicted too
    assert bits["value"] == pytest.approx(loss["value"] / math.log(2))
    table = measure("o", *words[:3], cwd=chatting)
    assert f"{exact['value']:10.4f}" in table.stdout and "ROUGE-L" in table.stdout


def test_without_a_word_it_measures_what_the_run_itself_measured(chatting):
    lines = [json.loads(line) for line in (chatting / "o" / "metrics.jsonl").read_text().splitlines()]
    found = figures(measure("o", "--checkpoint=latest", "--json", cwd=chatting))
    assert found["d val", "loss"]["value"] == pytest.approx(lines[-1]["val_loss"], rel=1e-5)


def test_answers_against_counts_by_hand():
    answers, references = ["the cat sat on the mat", "no"], ["the cat sat on a mat", "yes"]
    found = measure_answers(answers, references)
    # n-grams that match, of those said: 5 (the, cat, sat, on, mat) of 7, 3 of 5, 2 of 4, 1 of 3; both 7 words long
    assert found["BLEU"][0] == pytest.approx(100 * (5 / 7 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert found["ROUGE-L"][0] == pytest.approx(100 * (5 / 6) / 2) and found["ROUGE-2"][0] == pytest.approx(30)
    assert found["exact match"][:1] == (0.0,)
    same = [references[0], "a dog ran away from it"]
    assert measure_answers(same, same)["BLEU"] == (pytest.approx(100), pytest.approx(0, abs=1e-9), 2)


def test_a_ratio_s_error_is_that_of_many_repetitions():
    random, n = np.random.default_rng(0), 50
    sizes = random.integers(1, 20, size=(2000, n))
    sums = sizes * random.normal(3, 1, size=(2000, n))  # what windows have, each with a mean of its own
    estimates = [ratio_and_error(a, b) for a, b in zip(sums, sizes, strict=True)]
    values, errors = np.array(estimates).T
    assert values.std() == pytest.approx(errors.mean(), rel=0.1)


def test_the_log_probability_of_a_choice_is_that_of_its_tokens_one_by_one():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=2, n_embd=16)).eval()
    tokenizer = get_tokenizer("gpt2")
    prompt, choices = "The sky is ", ["blue", "green as grass"]
    rows = [encode_choice(tokenizer, prompt, choice) for choice in choices]
    assert [tokenizer.decode(row[1]) for row in rows] == [" blue", " green as grass"]  # as the words stand in a text
    found = choice_logprobs(model, rows, runtime.setup("cpu", "float32", False), 2)
    for (start, continuation), value in zip(rows, found, strict=True):
        expected, ids = 0.0, list(start)
        for token in continuation:
            with torch.no_grad():
                expected += model(torch.tensor([ids]))[0][0, -1].log_softmax(-1)[token].item()
            ids.append(token)
        assert value == pytest.approx(expected, abs=1e-4)


def test_bad_input_is_one_sentence(chatting, trained, monkeypatch):
    (chatting / "bad.jsonl").write_text('{"prompt": "a"}\n')
    (chatting / "long.jsonl").write_text(json.dumps({"prompt": "a" * 99, "choices": ["b", "c"], "answer": 0}))
    (chatting / "talk.jsonl").write_text(json.dumps({"prompt": "a" * 99, "response": "b"}))
    (chatting / "half.jsonl").write_text('{"prompt": "a", "response": "\\ud800"}')
    (chatting / "array.jsonl").write_text('[{"prompt": "a", "response": "b"}]')
    (chatting / "empty.txt").write_text("")
    monkeypatch.chdir(chatting)
    for words, *said in (
        (["o", "--pairs=bad.jsonl"], "line 1 of bad.jsonl has prompt; it should have"),
        (["o", "--choices=bad.jsonl"], "line 1 of bad.jsonl should have"),
        (["o", "--choices=long.jsonl"], "more than the block size of 64"),
        (["o", "--pairs=talk.jsonl"], "line 1 of talk.jsonl has 119 tokens before the answer; the model holds 64"),
        (["o", "--pairs=nowhere"], "nowhere cannot be read"),
        (["o", "--pairs=half.jsonl"], "line 1 of half.jsonl is no JSON", "surrogates"),
        (["o", "--pairs=array.jsonl"], "line 1 of array.jsonl is no object", "has one a line"),
        (["o", "--pairs=talk.jsonl", "--answers=nowhere/a.jsonl"], "nowhere/a.jsonl cannot be written"),
        (["o", "--pairs=talk.jsonl", "--answers=talk.jsonl"], "would replace what is measured on"),
        (["o", "--text=empty.txt"], "nothing in it to predict"),
        ([trained, "--dataset=d"], "another tokenizer"),
    ):
        monkeypatch.setattr(sys, "argv", ["acorn.evaluate", *map(str, words), "--device=cpu"])
        with pytest.raises(UserError) as refusal:
            main()
        assert all(words in str(refusal.value) for words in said)
    refused(measure("o", "--pairs=nowhere", cwd=chatting), "nowhere cannot be read")  # as a person runs it


def test_a_conversation_streams_stops_at_its_turns_end_and_slides_by_whole_turns(chatting):
    words = ["sample.py", "--out_dir=o", "--chat", "--temperature=0", "--max_new_tokens=20", "--device=cpu"]
    questions = [f"{thing}?" for thing in COLORS] * 2
    result = script(*words, cwd=chatting, input="\n".join(questions) + "\n")
    assert result.returncode == 0, result.stderr
    replies = result.stdout.split("> ")[1:-1]
    assert len(replies) == len(questions)
    _, tokenizer, _ = checkpoint.load_model(str(chatting / "o"))
    assert "Assistant" not in result.stdout and "endoftext" not in result.stdout

    sys.path.insert(0, str(REPO))
    from sample import fit_conversation

    messages = []
    for question in questions[:6]:
        messages.append({"role": "user", "content": question})
        ids = fit_conversation(tokenizer, messages, 64, 20)
        assert len(ids) + 20 <= 64 and ids == chat.render(tokenizer, messages).tolist()
        assert messages[0]["role"] == "user" and messages[-1]["content"] == question
        messages.append({"role": "assistant", "content": "green"})
    assert len(messages) < 12
    long = script(*words, cwd=chatting, input="a" * 99 + "\n")
    assert long.returncode == 0 and "make it shorter" in long.stdout


def test_a_conversation_needs_a_template(trained):
    refused(script("sample.py", f"--out_dir={trained}", "--chat", cwd="/", input=""), "no chat template")
    refused(script("sample.py", "--chat", "--json=True", cwd="/"), "leave out interactive")
