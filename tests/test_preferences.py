"""prepare/preferences.py: read pairs of answers in published formats, and keep each pair in one row."""

import json
from pathlib import Path

import pytest
from helpers import documents_of, prepare, prepare_fails

from acorn import UserError
from acorn.data import batches, chat
from acorn.data.records import read_pair
from acorn.data.shards import load_dataset

ASK = {"role": "user", "content": "Why?"}


def reply(text: str) -> dict:
    return {"role": "assistant", "content": text}


FORMS = [
    {"prompt": "Why?", "chosen": "good", "rejected": "bad"},
    {"messages": [ASK], "chosen": "good", "rejected": "bad"},
    {"messages": None, "prompt": "Why?", "chosen": "good", "rejected": "bad"},
    {"prompt": [ASK], "chosen": [reply("good")], "rejected": [reply("bad")]},
    {"prompt": "Why?", "chosen": [ASK, reply("good")], "rejected": [ASK, reply("bad")], "score_chosen": 8.5},
    {"chosen": [ASK, reply("good")], "rejected": [ASK, reply("bad")]},
    {"messages": [ASK, reply("good")], "chosen": [ASK, reply("good")], "rejected": [ASK, reply("bad")]},
    {"instruction": "Why?", "input": "", "chosen": "good", "rejected": "bad"},
    {
        "conversations": [{"from": "human", "value": "Why?"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
]


@pytest.mark.parametrize("record", FORMS)
def test_published_formats_of_pairs_are_read(record):
    assert read_pair(record) == ([ASK, reply("good")], [ASK, reply("bad")])


@pytest.mark.parametrize("text", ["[1, 2, 3]", '{"a": 1}', '[{"a": 1}]', "[]"])
def test_prompt_and_answer_may_be_json_text(text):
    pair = read_pair({"prompt": text, "chosen": text, "rejected": "bad"})
    assert [[message["content"] for message in messages] for messages in pair] == [[text, text], [text, "bad"]]


def test_pairs_keep_the_input_and_the_earlier_turns():
    options = {"chosen": "good", "rejected": "bad", "history": [["Hi", "Yes?"]], "system": "Be kind."}
    earlier = [{"role": "system", "content": "Be kind."}, ASK | {"content": "Hi"}, reply("Yes?") | {"learn": False}]
    for fields in ({"prompt": "Why?\n\nSo?"}, {"instruction": "Why?", "input": "So?"}):
        pair = read_pair(fields | options)
        question = ASK | {"content": "Why?\n\nSo?"}
        assert pair == ([*earlier, question, reply("good")], [*earlier, question, reply("bad")])
        assert pair[0].extras == {}


@pytest.mark.parametrize("prompt", [[], [ASK]])
def test_answers_that_repeat_the_question_keep_what_precedes_it(prompt):
    system = {"role": "system", "content": "Be kind."}
    answers = {"chosen": [ASK, reply("good")], "rejected": [ASK, reply("bad")]}
    assert read_pair({"prompt": [system, *prompt], **answers})[0] == [system, ASK, reply("good")]
    earlier = [{"role": "user", "content": "Hi"}, reply("Yes?")]
    pair = read_pair({"prompt": [system, *earlier, ASK], **answers})
    assert pair[1] == [system, earlier[0], reply("Yes?") | {"learn": False}, ASK, reply("bad")]
    pair = read_pair({"prompt": "Human: Why?", **answers})  # the same question in another format
    assert pair[0] == [ASK, reply("good")]


def test_only_the_final_answers_are_learned():
    turns = [ASK, reply("so"), {"role": "user", "content": "And?"}]
    for messages in read_pair({"messages": turns, "chosen": "good", "rejected": "bad"}):
        assert [message.get("learn", True) for message in messages if message["role"] == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, 'It needs "chosen"'),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same answer"),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "without a question .its fields: question, chosen"),
        ({"messages": [ASK, reply("b")], "chosen": "b", "rejected": "c"}, "a reply before its chosen answer"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "not a list"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "not a string"),
        ({"chosen": [ASK, reply("b")], "rejected": [{**ASK, "content": "How?"}, reply("c")]}, "different prompts"),
    ],
)
def test_bad_records_are_refused(record, words, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=words):
        read_pair(record)
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text(json.dumps(FORMS[0]) + "\n" + json.dumps(record))
    prepare_fails(f"line 2.*{words}", "preferences", "p.jsonl", "--tokenizer=byte")
    assert not Path("data/p").exists()


def test_each_pair_is_in_one_row_with_its_answers_as_targets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}?", "chosen": "A" * (1 + i % 4), "rejected": "b" * (1 + i % 3)} for i in range(40)]
    rows.append({"prompt": "long", "chosen": "A" * 300, "rejected": "b"})
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    meta = prepare("preferences", "p.jsonl", "--tokenizer=byte", "--val_fraction=0.2")
    assert meta["preferences"]["pairs"] == 41 and len(documents_of(load_dataset("p"), "train")) % 2 == 0
    dataset, found = load_dataset("p"), {}
    tokenizer = dataset.tokenizer
    for tokens in (dataset.train, dataset.val):
        n = batches.samples_per_epoch(tokens, 200)
        x, y, documents = batches.in_order(tokens, 200, 0, n)
        for row in range(n):
            for number in range(0, documents[row].max() + 1, 2):
                parts = [documents[row] == number + i for i in range(2)]
                texts = [tokenizer.decode(y[row, part & (y[row] != -1)]) for part in parts]
                if any(texts):
                    ids = x[row, parts[0]]
                    found[next(i for i in range(40) if f"\n{i}?" in tokenizer.decode(ids))] = texts
                    messages = [{"role": "user", "content": rows[i]["prompt"]} for i in list(found)[-1:]]
                    prompt = chat.render(tokenizer, messages)
                    assert ids[: len(prompt)].tolist() == prompt.tolist()
    expected = {i: [row[name] + "<|endoftext|>" for name in ("chosen", "rejected")] for i, row in enumerate(rows[:40])}
    assert found == expected  # all pairs except the one that is longer than a row
    notes = " ".join(dataset.notes(200))
    assert "pairs in" in notes and ("1 left out" in notes or dataset.val.conversations.rows(200).left_out)


def test_val_tokens_too_small_for_any_pair_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}?", "chosen": "good", "rejected": "bad"} for i in range(20)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare_fails(
        "val_tokens=5 leaves none of 20 pairs", "preferences", "p.jsonl", "--tokenizer=byte", "--val_tokens=5"
    )
    assert not Path("data/p").exists()
    assert 0 < prepare("preferences", "p.jsonl", "--tokenizer=byte", "--val_tokens=100")["val"]["tokens"] <= 100


def test_replaced_bytes_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": f"{i}?", "chosen": "good", "rejected": "bad"}).encode() for i in range(20)]
    Path("p.jsonl").write_bytes(b"\n".join(rows).replace(b"7?", b"7\xff"))
    prepare("preferences", "p.jsonl", "--tokenizer=byte", "--errors=replace", "--val_fraction=0.3")
    notes = capsys.readouterr().err
    assert "replaced by U+FFFD 2 times" in notes and "earlier conversion" not in notes
