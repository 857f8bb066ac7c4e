"""The examples of the recipes, made from the standard library of the Python that runs this."""

import json

from acorn import chat
from acorn.examples import TOPICS, write_examples
from acorn.measure import check_choices


def test_what_it_makes_is_what_the_scripts_read_and_keeps_validation_apart(tmp_path):
    counts = write_examples(tmp_path)
    read = {path.stem: [json.loads(line) for line in path.open(encoding="utf-8")] for path in tmp_path.glob("*.jsonl")}
    assert {name: len(records) for name, records in read.items()}.items() <= counts.items()
    assert counts["answers"] > 1000 and counts["answers_val"] > 100
    for record in read["answers"] + read["answers_val"] + read["labels"]:
        assert len(chat.read_messages(record)) == 2
    for record in read["choices"] + read["choices_val"]:
        check_choices("here", record)
        assert len(set(record["choices"])) == 4
    for kind, field in (("answers", "response"), ("choices", "prompt")):
        assert not {r[field] for r in read[kind]} & {r[field] for r in read[f"{kind}_val"]}
    places = [record["answer"] for record in read["choices"]]
    assert all(places.count(k) > len(places) / 8 for k in range(4))  # the right one stands anywhere
    topics = [path.read_text(encoding="utf-8") for path in (tmp_path / "topics").iterdir()]
    assert all(text.startswith(tuple(f"<topic={topic}> " for topic in TOPICS)) for text in topics)
