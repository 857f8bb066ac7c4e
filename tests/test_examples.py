"""The examples of the recipes, made from the standard library of the Python that runs this."""

import json

from acorn.data.records import read_messages
from acorn.evaluation.tasks import check_choices
from acorn.examples import TOPICS, translations, write_examples


def test_what_it_makes_is_what_the_scripts_read_and_keeps_validation_apart(tmp_path):
    counts = write_examples(tmp_path)
    read = {path.stem: [json.loads(line) for line in path.open(encoding="utf-8")] for path in tmp_path.glob("*.jsonl")}
    assert {name: len(records) for name, records in read.items()}.items() <= counts.items()
    assert counts["answers"] > 1000 and counts["summaries"] > 300 and counts["translations"] > 1000
    for record in read["choices_val"]:
        check_choices("here", record)
        assert len(set(record["choices"])) == 4
    for name in read.keys() - {"choices_val"}:
        assert all(len(read_messages(record)) == 2 for record in read[name])
    for name in ("answers", "summaries", "translations"):
        assert not {r["response"] for r in read[name]} & {r["response"] for r in read[f"{name}_val"]}
        assert len(read[f"{name}_val"]) > 50
    assert not {r["prompt"] for r in read["labels"]} & {r["prompt"] for r in read["choices_val"]}
    task = (tmp_path / "choices.yaml").read_text(encoding="utf-8")
    assert str((tmp_path / "choices_val.jsonl").resolve()) in task and "doc_to_target: answer" in task
    places = [record["answer"] for record in read["choices_val"]]
    assert all(places.count(k) > len(places) / 8 for k in range(4))  # the right one stands anywhere
    topics = [path.read_text(encoding="utf-8") for path in (tmp_path / "topics").iterdir()]
    assert all(text.startswith(tuple(f"<topic={topic}> " for topic in TOPICS)) for text in topics)


def test_the_german_is_german():
    german = {record["prompt"].removeprefix("In German: "): record["response"] for record in translations(400)}
    assert german["the wild dog finds a big mouse"] == "der wilde Hund findet eine große Maus"
    assert german["a good child sees the white man"] == "ein gutes Kind sieht den weißen Mann"
    assert german["the good cat finds a good man"] == "die gute Katze findet einen guten Mann"
    assert german["a small dog finds a young pig"] == "ein kleiner Hund findet ein junges Schwein"
