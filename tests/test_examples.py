"""acorn/examples.py: the datasets of the recipes, made from Python's standard library and from poems."""

import json
from pathlib import Path

import pytest

from acorn import UserError
from acorn.data.records import read_messages
from acorn.evaluation.tasks import check_choices
from acorn.examples import TOPICS, translations, write_couplets, write_examples
from prepare.pipeline import prepare


def test_examples_are_valid_and_validation_is_separate(tmp_path):
    counts = write_examples(tmp_path)
    read = {path.stem: [json.loads(line) for line in path.open(encoding="utf-8")] for path in tmp_path.glob("*.jsonl")}
    assert {name: len(records) for name, records in read.items()}.items() <= counts.items()
    assert counts["answers"] > 1000 and counts["summaries"] > 300 and counts["translations"] > 1000
    for record in read["choices_val"]:
        check_choices("here", record)
        assert len(set(record["choices"])) == 4
    assert all(int(record["rejected"]) == int(record["chosen"][11:-1]) for record in read["style"])
    right, hasty = ({r["prompt"]: r["response"] for r in read[name]} for name in ("sums", "hasty"))
    assert right.keys() == hasty.keys() and {right["28 + 47 ="], hasty["28 + 47 ="]} == {"75", "65"}
    for name in read.keys() - {"choices_val", "style"}:
        assert all(len(read_messages(record)) == 2 for record in read[name])
    for name in ("answers", "summaries", "translations"):
        assert not {r["response"] for r in read[name]} & {r["response"] for r in read[f"{name}_val"]}
        assert len(read[f"{name}_val"]) > 50
    assert not {r["prompt"] for r in read["labels"]} & {r["prompt"] for r in read["choices_val"]}
    task = (tmp_path / "choices.yaml").read_text(encoding="utf-8")
    assert str((tmp_path / "choices_val.jsonl").resolve()) in task and "doc_to_target: answer" in task
    places = [record["answer"] for record in read["choices_val"]]
    assert all(places.count(k) > len(places) / 8 for k in range(4))  # the right answer occurs at every position
    topics = [path.read_text(encoding="utf-8") for path in (tmp_path / "topics").iterdir()]
    assert all(text.startswith(tuple(f"<topic={topic}> " for topic in TOPICS)) for text in topics)


def test_german_translations_are_grammatical():
    german = {record["prompt"].removeprefix("In German: "): record["response"] for record in translations(400)}
    assert german["the wild dog finds a big mouse"] == "der wilde Hund findet eine große Maus"
    assert german["a good child sees the white man"] == "ein gutes Kind sieht den weißen Mann"
    assert german["the good cat finds a good man"] == "die gute Katze findet einen guten Mann"
    assert german["a small dog finds a young pig"] == "ein kleiner Hund findet ein junges Schwein"


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_couplets_come_from_the_poems_of_their_split(tmp_path, tokenizer):
    numerals = "一二三四五六七八九十"
    poems = [
        f"《{a}{b}》李白\n{a}前明月光，疑是地上{b}。\n举头望{a}月，低头思故{b}。" for a in numerals for b in numerals
    ]
    prepare(
        [*poems, "《散句》李白\n举头望明月。"],
        tmp_path / "d",
        name="d",
        tokenizer=tokenizer,
        source={},
        val_fraction=0.3,
    )
    counts = write_couplets(tmp_path, str(tmp_path / "d"))
    answers = {}
    for name in ("couplets", "couplets_val"):
        records = [json.loads(line) for line in Path(tmp_path, f"{name}.jsonl").read_text("utf-8").splitlines()]
        assert len(records) == counts[name] > 20
        for record in records:
            if record["prompt"].startswith("请对下句："):
                couplet = record["prompt"].removeprefix("请对下句：") + record["response"]
                assert any(couplet in poem for poem in poems)
            else:
                assert f"{record['prompt'][2:6]}李白\n{record['response']}" in poems
                answers.setdefault(name, set()).add(record["response"])
    assert not answers["couplets"] & answers["couplets_val"] and len(answers["couplets"]) > 40
    with pytest.raises(UserError, match="no couplets"):
        prepare(["prose " * 9, "more " * 9], tmp_path / "p", name="p", tokenizer="byte", source={})
        write_couplets(tmp_path, str(tmp_path / "p"))
