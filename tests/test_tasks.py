"""`python -m acorn.evaluate`: metrics and standard errors against hand computations, with a tiny chat model."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import sacrebleu
import torch
from helpers import REPO, bpe_tokenizer, refused, run_here, script_here, small_model
from rouge_score.rouge_scorer import RougeScorer

from acorn import UserError, checkpoint
from acorn.data import chat
from acorn.data.tokenizer_kinds import from_dict, get_tokenizer
from acorn.distributed import runtime
from acorn.evaluation.tasks import (
    RougeWords,
    choice_logprobs,
    encode_choices,
    encode_record,
    main,
    measure_answers,
    measure_choices,
    measure_text,
    ratio_and_error,
)
from model import GPT, GPTConfig

COLORS = {"grass": "green", "snow": "white", "coal": "black", "sky": "blue"}


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    """Return a folder with a byte model that memorized the colors of some things from one-turn conversations.

    The conversations about the other things are the validation split.
    """
    cwd = tmp_path_factory.mktemp("chatting")
    pairs = [{"prompt": f"{thing}?", "response": color} for thing, color in COLORS.items()]
    (cwd / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (cwd / "many.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs for _ in range(10)))
    made = script_here("prepare", "chat", "many.jsonl", "--tokenizer=byte", "--val_fraction=0.5", "--out=d", cwd=cwd)
    assert made.returncode == 0, made.stderr
    words = "--block_size=64 --batch_size=8 --gradient_accumulation_steps=1 --n_layer=2 --n_head=2 --n_embd=64"
    run = "--max_iters=150 --warmup_iters=0 --learning_rate=3e-3 --eval_interval=150 --log_interval=50 --eval_iters=0"
    machine = "--device=cpu --dtype=float32 --compile=False --document_mask=True"
    trained = script_here(
        "train.py", *words.split(), *run.split(), *machine.split(), "--dataset=d", "--out_dir=o", cwd=cwd
    )
    assert trained.returncode == 0 and "sample.py --chat=True --out_dir=o" in trained.stdout, trained.stderr
    return cwd


def measure(*words, cwd):
    return run_here(main, *words, "--device=cpu", cwd=cwd)


def figures(result):
    assert result.returncode == 0, result.stderr
    return {(row["on"], row["measure"]): row for row in json.loads(result.stdout)["results"]}


def test_metrics_of_answers_choices_and_text_are_consistent(chatting):
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
    assert any(right)  # the model repeats memorized answers and then stops
    exact = found["pairs.jsonl", "exact match"]
    assert exact["value"] == 25 * sum(right) and exact["n"] == 4
    assert exact["standard_error"] == pytest.approx(np.std([100 * r for r in right], ddof=1) / 2)
    chosen = [record["chosen"] == record["answer"] for record in answered[4:]]
    assert found["choices.jsonl", "accuracy"]["value"] == 25 * sum(chosen)
    assert all(c for r, c in zip(right, chosen, strict=True) if r)  # a correct answer is the most likely choice

    bits, loss = found["text.txt", "bits per byte"], found["text.txt", "loss"]
    assert bits["n"] == loss["n"] == 9 * 37  # one token per byte; the first one is predicted as well
    assert bits["value"] == pytest.approx(loss["value"] / math.log(2))
    table = measure("o", *words[:3], cwd=chatting)
    assert f"{exact['value']:10.4f}" in table.stdout and "ROUGE-L" in table.stdout


def test_default_evaluation_reproduces_the_val_loss_of_the_run(chatting):
    lines = [json.loads(line) for line in (chatting / "o" / "metrics.jsonl").read_text().splitlines()]
    found = figures(measure("o", "--checkpoint=latest", "--json", cwd=chatting))
    assert found["d val", "loss"]["value"] == pytest.approx(lines[-1]["val_loss"], rel=1e-5)


def test_answer_metrics_match_hand_counts():
    answers, references = ["the cat sat on the mat", "no"], ["the cat sat on a mat", "yes"]
    found = measure_answers(answers, references)
    # matching n-grams of the answers: 5 (the, cat, sat, on, mat) of 7, 3 of 5, 2 of 4, 1 of 3; both have 7 words
    assert found["BLEU"][0] == pytest.approx(100 * (5 / 7 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert found["ROUGE-L"].value == pytest.approx(100 * (5 / 6) / 2)
    # 3 of 5 bigrams match; the reference "yes" has no bigram, so it does not count
    assert found["ROUGE-2"].value == pytest.approx(60) and found["ROUGE-2"].n == 1 and found["ROUGE-L"].n == 2
    assert found["exact match"].value == 0
    same = [references[0], "a dog ran away from it"]
    assert measure_answers(same, same)["BLEU"][:3] == (pytest.approx(100), pytest.approx(0, abs=1e-9), 2)


EXACT = {  # language: answers equal to their references, and the tokenizers that BLEU may use
    "Chinese": (["适合出游。", "今天天气很好，我们去公园散步吧。"], ("zh",)),
    "Japanese": (["はい", "東京はとても大きいスーパーがある町です。"], ("ja-mecab", "char")),
    "Korean": (["네", "오늘은 날씨가 정말 좋습니다."], ("ko-mecab", "char")),
    "Thai": (["ใช่", "วันนี้อากาศดีมาก"], ("char",)),
    "Lao": (["ແມ່ນ", "ມື້ນີ້ອາກາດດີ"], ("char",)),
    "Arabic": (["نعم", "الطقس جميل اليوم في المدينة"], ("13a",)),
    "Hindi": (["हाँ", "आज मौसम बहुत अच्छा है"], ("13a",)),
    "Russian": (["да", "сегодня очень хорошая погода"], ("13a",)),
    "French": (["été", "l'île où il a vécu était belle"], ("13a",)),
    "English": (["yes", "the weather is very good today"], ("13a",)),
}


@pytest.mark.parametrize("language", EXACT)
def test_exact_answers_score_100_percent_in_any_language(language):
    texts, tokenizers = EXACT[language]
    for answers in (texts, texts[:1] * 3, [texts[1][0]], [texts[1][:2].strip()]):  # also one and two characters
        for name, each in measure_answers(answers, answers).items():
            if name == "ROUGE-2" and each.value is None:  # a single word or character has no bigrams
                assert each.n == 0 and "fewer than 2" in each.note
            else:
                assert each.value == pytest.approx(100) and (each.error is None or each.error < 1e-9), (name, answers)
    found = measure_answers(texts, texts)
    assert any(f"tok:{name}" in found["BLEU"].method for name in tokenizers) and found["ROUGE-2"].value == 100


def test_wrong_answers_match_sacrebleu_rouge_score_and_hand_counts():
    answers = ["the cats sat on the mat", "a dog is running in the old park", "no", "it's 25 degrees"]
    references = ["the cat sat on a mat", "the dog runs in a park", "yes", "it is 25 degrees here"]
    found = measure_answers(answers, references)
    bleu = sacrebleu.corpus_bleu(answers, [references], use_effective_order=True)
    assert found["BLEU"].value == bleu.score and 0 < found["BLEU"].value < 50
    assert found["chrF"].value == sacrebleu.corpus_chrf(answers, [references]).score
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [theirs.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    assert found["ROUGE-1"].value == pytest.approx(np.mean([100 * score["rouge1"].fmeasure for score in scores]))
    assert found["ROUGE-L"].value == pytest.approx(np.mean([100 * score["rougeL"].fmeasure for score in scores]))
    pairs = [100 * score["rouge2"].fmeasure for score in scores]
    assert found["ROUGE-2"].value == pytest.approx((pairs[0] + pairs[1] + pairs[3]) / 3)  # "yes" has no bigram

    # Chinese by hand: 4 of 5 characters match (1 2 3 5), the bigrams 12 and 23, the trigram 123, no 4-gram
    found = measure_answers(["我爱北京。"], ["我爱北上。"])
    assert found["BLEU"].value == pytest.approx(100 * (4 / 5 * 2 / 4 * 1 / 3 * (1 / 2) / 2) ** 0.25)  # smoothed: 1/2
    assert found["BLEU"].value == sacrebleu.corpus_bleu(["我爱北京。"], [["我爱北上。"]], tokenize="zh").score
    # ROUGE ignores the period: 3 of 4 characters, 2 of 3 bigrams
    assert found["ROUGE-1"].value == found["ROUGE-L"].value == pytest.approx(75)
    assert found["ROUGE-2"].value == pytest.approx(100 * 2 / 3)
    # chrF is the mean over the orders 1 to 5; precision and recall are equal here
    assert found["chrF"].value == pytest.approx(100 * (4 / 5 + 2 / 4 + 1 / 3 + 0 + 0) / 5)


def test_bleu_tokenizer_follows_the_most_common_script():
    chinese, english = "今天天气很好。", "it is fine"
    for references, *tokenizers in (
        ([chinese, english], "13a"),  # 6 Chinese letters, 8 English ones
        ([chinese, chinese, english], "zh"),
        (["PyTorch", chinese * 2], "zh"),
        (["日本のカメラ", chinese], "ja-mecab", "char"),  # kana: Japanese
        (["42", "!"], "13a"),  # no letter
    ):
        found = measure_answers(references, references)["BLEU"]
        assert found.value == pytest.approx(100)
        assert any(f"tok:{name}" in found.method for name in tokenizers)
    assert RougeWords().tokenize("Running 42 été, PyTorch好用；ไทย スーパー") == [
        *("run", "42", "été", "pytorch", "好", "用", "ไ", "ท", "ย", "ス", "ー", "パ", "ー")
    ]


def test_undefined_metrics_have_no_value_and_give_the_reason():
    found = measure_answers(["👍", "!"], ["👍", "?"])
    assert found["BLEU"].value == pytest.approx(50) and found["exact match"].value == 50
    assert found["ROUGE-1"].value is None and "2 of 2" in found["ROUGE-1"].note
    found = measure_answers(["a", ""], ["", ""])
    assert found["BLEU"].value is found["chrF"].value is None and "empty" in found["BLEU"].note
    assert measure_answers(["", ""], ["a b", "c"])["BLEU"].value == 0  # an empty answer is wrong
    assert all(each.value is None and each.note for each in measure_answers([], []).values())
    found = measure_answers(["ok", ""], ["ok", ""])  # bootstrap samples with only empty references are left out
    assert found["BLEU"].error == pytest.approx(0, abs=1e-9) and found["chrF"].error == 0


def test_standard_errors_of_bleu_and_chrf_match_repeated_sampling():
    """Compare with the standard deviation over samples of 30 examples, each correct with probability 1/2."""
    random, found = np.random.default_rng(1), []
    references = [" ".join(random.choice(list("abcdefgh"), 6)) for _ in range(40 * 30)]
    answers = [reference if random.random() < 0.5 else "x y z x y z" for reference in references]
    for start in range(0, len(references), 30):
        part = slice(start, start + 30)
        bleu = sacrebleu.corpus_bleu(answers[part], [references[part]]).score
        found.append((bleu, sacrebleu.corpus_chrf(answers[part], [references[part]]).score))
    measured = measure_answers(answers[:30], references[:30])
    spread = np.std(found, axis=0)
    assert [measured["BLEU"].error, measured["chrF"].error] == pytest.approx(spread, rel=0.4)


def test_standard_error_of_a_ratio_matches_repeated_sampling():
    random, n = np.random.default_rng(0), 50
    sizes = random.integers(1, 20, size=(2000, n))
    sums = sizes * random.normal(3, 1, size=(2000, n))  # each window has a different mean
    estimates = [ratio_and_error(a, b) for a, b in zip(sums, sizes, strict=True)]
    values, errors = np.array(estimates).T
    assert values.std() == pytest.approx(errors.mean(), rel=0.1)


def test_choice_logprob_is_the_sum_of_its_token_logprobs():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=2, n_embd=16)).eval()
    tokenizer = get_tokenizer("gpt2")
    prompt, choices = "The sky is ", ["blue", "green as grass"]
    rows = encode_record(tokenizer, prompt, choices)
    assert [tokenizer.decode(row[1]) for row in rows] == [" blue", " green as grass"]  # tokens as in running text
    found = choice_logprobs(model, rows, runtime.setup("cpu", "float32", False), 2)
    for (start, continuation), value in zip(rows, found, strict=True):
        expected, ids = 0.0, list(start)
        for token in continuation:
            with torch.no_grad():
                expected += model(torch.tensor([ids]))[0][0, -1].log_softmax(-1)[token].item()
            ids.append(token)
        assert value == pytest.approx(expected, abs=1e-4)


def test_choices_with_the_right_text_are_right():
    model = GPT(GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=2, n_embd=16)).eval()
    records = [("line 1", {"prompt": "The sky is", "choices": ["blue", "blue"], "answer": i}) for i in range(2)]
    encoded = encode_choices(get_tokenizer("gpt2"), records)
    found, _ = measure_choices(model, records, *encoded, runtime.setup("cpu", "float32", False), 2)
    assert [figure.value for figure in found.values()] == [100, 100]


@pytest.mark.parametrize(
    "prompt, choices", [("I am wal", ["king", "nut"]), ("go", ["ing", "ne away"]), ("", ["a", "b"])]
)
def test_choices_that_merge_with_the_prompt_share_one_context(prompt, choices):
    tokenizer = get_tokenizer("gpt2")
    rows = encode_record(tokenizer, prompt, choices)
    assert len({tuple(before) for before, _ in rows}) == 1  # all choices share the context
    assert all(before and own for before, own in rows)
    texts = [tokenizer.decode([i for i in before + own if i != tokenizer.eot]) for before, own in rows]
    assert texts == [prompt + choice for choice in choices]
    for (before, own), text in zip(rows, texts, strict=True):
        assert [i for i in before + own if i != tokenizer.eot] == tokenizer.encode(text).tolist()  # as in running text


def test_choices_follow_the_reply_prefix_of_the_template():
    tokenizer = from_dict(bpe_tokenizer().to_dict())
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    for choice, (before, own) in zip(["or", "not"], encode_record(tokenizer, "to be", ["or", "not"]), strict=True):
        messages = [{"role": "user", "content": "to be"}, {"role": "assistant", "content": choice}]
        ids, learned = chat.render_to_learn(tokenizer, messages)
        assert before + own == ids[:-1].tolist()  # without the end token
        assert tokenizer.decode(own).strip() == choice and len(before) >= (~learned).sum()


def test_answers_fit_the_block_and_one_file_can_have_pairs_and_choices(chatting):
    pairs = [{"prompt": "a" * n, "response": "b"} for n in (30, 40)]
    records = [pair | {"choices": ["b", "c"], "answer": 0} for pair in pairs]
    (chatting / "both.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["--pairs=both.jsonl", "--choices=both.jsonl", "--answers=both_a.jsonl", "--json"]
    found = figures(measure("o", *words, cwd=chatting))
    assert {("both.jsonl", "exact match"), ("both.jsonl", "accuracy")} <= found.keys()
    _, tokenizer, _ = checkpoint.load_model(str(chatting / "o"))
    for record in [json.loads(line) for line in (chatting / "both_a.jsonl").read_text().splitlines()][:2]:
        prompt = chat.render(tokenizer, [{"role": "user", "content": record["prompt"]}])
        assert len(record["answered"].encode()) <= 64 - len(prompt)


def test_invalid_input_raises_a_clear_error(chatting, trained, monkeypatch):
    (chatting / "bad.jsonl").write_text('{"prompt": "a"}\n')
    (chatting / "talk.jsonl").write_text(json.dumps({"prompt": "a" * 99, "response": "b"}))
    (chatting / "half.jsonl").write_text('{"prompt": "a", "response": "\\ud800"}')
    (chatting / "array.jsonl").write_text('[{"prompt": "a", "response": "b"}]')
    (chatting / "euro.jsonl").write_text('{"prompt": "\\u20ac", "response": "b", "choices": ["b", "c"], "answer": 0}')
    (chatting / "euro.txt").write_text("a \u20ac", encoding="utf-8")
    (chatting / "empty.txt").write_text("")
    monkeypatch.chdir(chatting)
    for words, *said in (
        (["o", "--pairs=bad.jsonl"], "line 1 of bad.jsonl has the fields prompt"),
        (["o", "--choices=bad.jsonl"], "line 1 of bad.jsonl needs"),
        (["o", "--pairs=nowhere"], "nowhere cannot be read"),
        (["o", "--pairs=half.jsonl"], "line 1 of half.jsonl is not valid JSON", "surrogates"),
        (["o", "--pairs=array.jsonl"], "line 1 of array.jsonl is not a JSON object", "object per line"),
        (["o", "--pairs=talk.jsonl", "--answers=nowhere/a.jsonl"], "nowhere/a.jsonl cannot be written"),
        (["o", "--pairs=talk.jsonl", "--answers=talk.jsonl"], "would overwrite"),
        (["o", "--text=t.txt", "--answers=talk.jsonl"], "talk.jsonl would be empty", "--pairs or --choices"),
        (["o", "--text=empty.txt"], "no token to predict"),
        ([trained, "--dataset=d"], "different tokenizer"),
        ([trained, "--pairs=euro.jsonl"], "line 1 of euro.jsonl: the character"),
        ([trained, "--choices=euro.jsonl"], "line 1 of euro.jsonl: the character"),
        ([trained, "--text=euro.txt"], "euro.txt: the character"),
    ):
        monkeypatch.setattr(sys, "argv", ["acorn.evaluate", *map(str, words), "--device=cpu"])
        with pytest.raises(UserError) as refusal:
            main()
        assert all(words in str(refusal.value) for words in said)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rouge_score" else sys)
    monkeypatch.setattr(sys, "argv", ["acorn.evaluate", "o", "--pairs=talk.jsonl"])
    with pytest.raises(UserError, match=r"--pairs needs the package rouge_score.*pip install sacrebleu"):
        main()
    command = [sys.executable, "-m", "acorn.evaluate", "o", "--pairs=nowhere"]  # in its own process, as users run it
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=chatting, env=env, timeout=120, capture_output=True, text=True)
    refused(done, "nowhere cannot be read")


def test_error_names_a_token_outside_the_vocabulary_of_the_model(tmp_path):
    """Some published tokenizers have more tokens than their model."""
    model, byte, r = small_model(vocab_size=200), get_tokenizer("byte"), runtime.setup("cpu", "float32", False)
    (tmp_path / "text.txt").write_bytes("aé".encode())
    with pytest.raises(UserError, match=r"token 256.* 200 tokens"):
        measure_text(model, byte, str(tmp_path / "text.txt"), r, 2, 8)
    with pytest.raises(UserError, match=r"token 201.* 200 tokens"):
        choice_logprobs(model, [([1], [201]), ([1], [2])], r, 2)


def test_records_longer_than_the_block_are_skipped_and_counted(chatting, monkeypatch, capsys):
    pairs = [{"prompt": "a" * 99, "response": "b"}, {"prompt": "snow?", "response": "white"}]
    choices = [{"prompt": p["prompt"], "choices": ["white", "b"], "answer": 0} for p in pairs]
    long_choice = {"prompt": "snow?", "choices": ["white", "b" * 99], "answer": 0}
    for name, records in {"p": pairs, "c": [*choices, long_choice], "none": [pairs[0] | choices[0]]}.items():
        (chatting / f"skip_{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.chdir(chatting)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["acorn.evaluate", "o", *words, "--device=cpu"])
        assert main() == 0
        return capsys.readouterr().out

    out = json.loads(run("--pairs=skip_p.jsonl", "--choices=skip_c.jsonl", "--answers=skip_a.jsonl", "--json"))
    found = {(row["on"], row["measure"]): row for row in out["results"]}
    exact, accuracy = found["skip_p.jsonl", "exact match"], found["skip_c.jsonl", "accuracy"]
    assert exact["n"] == accuracy["n"] == 1 and exact["value"] in (0, 100) and exact["standard_error"] is None
    assert "skipped 1 of 2" in exact["note"] and "line 1 of skip_p.jsonl" in exact["note"]
    assert "skipped 2 of 3" in accuracy["note"] and "64 tokens" in accuracy["note"]
    assert "tok:13a" in found["skip_p.jsonl", "BLEU"]["method"]
    answered = [json.loads(line) for line in (chatting / "skip_a.jsonl").read_text().splitlines()]
    assert [record.get("answered", record.get("chosen")) is None for record in answered] == [1, 0, 1, 0, 1]

    out = json.loads(run("--pairs=skip_none.jsonl", "--choices=skip_none.jsonl", "--json"))
    assert len(out["results"]) == 8
    assert all(row["value"] is None and row["n"] == 0 and "skipped 1 of 1" in row["note"] for row in out["results"])
    table = run("--pairs=skip_p.jsonl")
    assert "skipped 1 of 2 records, which exceed 63 tokens (the first: line 1 of skip_p.jsonl, with" in table
    assert "tok:13a" in table and table.count("skipped 1 of 2") == 1 and "n/a" in table  # ROUGE-2 of one word


def test_chat_stops_at_the_end_of_a_turn_and_drops_whole_turns(chatting):
    words = ["sample.py", "--out_dir=o", "--chat", "--temperature=0", "--max_new_tokens=20", "--device=cpu"]
    questions = [f"{thing}?" for thing in COLORS] * 2
    result = script_here(*words, cwd=chatting, input="\n".join(questions) + "\n")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == len(questions)
    _, tokenizer, _ = checkpoint.load_model(str(chatting / "o"))
    assert "Assistant" not in result.stdout and "endoftext" not in result.stdout

    sys.path.insert(0, str(REPO))
    from acorn.inference.console import fit_conversation

    messages = []
    for question in questions[:6]:
        messages.append({"role": "user", "content": question})
        ids = fit_conversation(tokenizer, messages, 64, 20)
        assert len(ids) + 20 <= 64 and ids == chat.render(tokenizer, messages).tolist()
        assert messages[0]["role"] == "user" and messages[-1]["content"] == question
        messages.append({"role": "assistant", "content": "green"})
    assert len(messages) < 12
    long = script_here(*words, cwd=chatting, input="a" * 99 + "\n")
    assert long.returncode == 0 and "Shorten it" in long.stderr
    messages = [*messages[:2], {"role": "user", "content": "a" * 99}]
    with pytest.raises(UserError, match="this message has"):
        fit_conversation(tokenizer, messages, 64, 20)
    assert len(messages) == 3  # a rejected message leaves the history unchanged
    with pytest.raises(UserError, match="with the system message"):
        fit_conversation(tokenizer, [{"role": "system", "content": "a" * 99}, messages[0]], 64, 20)


def test_chat_needs_a_chat_template(trained):
    refused(script_here("sample.py", f"--out_dir={trained}", "--chat", cwd="/", input=""), "no chat template")
    refused(script_here("sample.py", "--chat", "--json=True", cwd="/"), "Leave out interactive")
