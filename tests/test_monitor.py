"""Task metrics measured during a run, compared with acorn.evaluate on its checkpoint."""

import json
import sys

import pytest
from helpers import SMALL, TINY, metrics, numbers, train_here

from acorn import UserError, report
from acorn.evaluation import tasks

pytestmark = pytest.mark.usefixtures("no_pictures")
RUN = [*TINY, *SMALL, "--max_iters=4", "--block_size=32", "--eval_choices=c.jsonl", "--eval_pairs=p.jsonl"]
WORDS = "letter", "lantern", "horse", "key"


@pytest.fixture
def files(in_tmp_path, tmp_path):
    """Write c.jsonl and p.jsonl, each with a record that exceeds 32 tokens."""
    prompts = [f"{verb} the " for verb in ("take", "bring", "leave", "forget", "forget " * 9)]
    choices = [{"prompt": p, "choices": WORDS, "answer": i % 4} for i, p in enumerate(prompts)]
    pairs = [{"prompt": p, "response": WORDS[i % 4]} for i, p in enumerate(prompts)]
    for name, records in (("c", choices), ("p", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_run_measures_the_same_task_metrics_as_acorn_evaluate(files, dataset, tmp_path, monkeypatch, capsys):
    assert train_here(monkeypatch, *RUN, f"--dataset={dataset}", "--out_dir=o") == 0
    said = capsys.readouterr().out
    assert said.count("accuracy") == 2 * 3 and "skipped 1 of 5" in said  # two kinds of tasks, three evaluations
    last = [line for line in metrics(tmp_path / "o") if "val_loss" in line][-1]
    words = "o --checkpoint=latest --choices=c.jsonl --pairs=p.jsonl --device=cpu --json"
    monkeypatch.setattr(sys, "argv", ["acorn.evaluate", *words.split()])
    assert tasks.main() == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert len(rows) == 8
    for row in rows:
        name = f"{'choices' if row['on'] == 'c.jsonl' else 'pairs'}/{row['measure'].replace(' ', '_')}"
        assert last[name] == pytest.approx(row["value"], abs=1e-6)
    words = [word for word in RUN if "eval_choices" not in word and "eval_pairs" not in word]
    assert train_here(monkeypatch, *words, f"--dataset={dataset}", "--out_dir=without") == 0
    alike = [{k: v for k, v in line.items() if not k.startswith(report.TASKS)} for line in numbers(tmp_path / "o")]
    assert alike == numbers(tmp_path / "without")  # measuring tasks does not change the run


def test_non_finite_logits_have_no_results_and_do_not_end_the_run(files, dataset, tmp_path, monkeypatch, capsys):
    words = ["--learning_rate=1e30", "--grad_clip=0", "--warmup_iters=0", f"--dataset={dataset}", "--out_dir=o"]
    assert train_here(monkeypatch, *RUN, *words) == 2
    said = capsys.readouterr()
    assert "step 4: train loss nan" in said.out and "exact match n/a" in said.out
    assert "the last updates are not saved (the val loss is not finite" in said.err
    last = metrics(tmp_path / "o")[-1]
    measured = [value for name, value in last.items() if name.startswith(report.TASKS)]
    assert last["step"] == 4 and measured == [None] * 8


def test_dry_run_times_the_records_that_fit(files, dataset, tmp_path, monkeypatch, capsys):
    records = [{"prompt": "a" * n, "choices": ["b", "c"], "answer": 0} for n in (*[99] * 8, 9)]  # a batch has 4
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert train_here(monkeypatch, *RUN, f"--dataset={dataset}", "--dry_run=True") == 0
    said = capsys.readouterr().out
    assert "skipped 8 of 9" in said and "for the evaluations" in said


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("eval_choices", '{"prompt": "a"}', "line 1 of bad.jsonl"),
        ("eval_choices", json.dumps({"prompt": "a" * 99, "choices": ["b", "c"], "answer": 0}), "32 tokens"),
        ("eval_choices", json.dumps({"prompt": "\u20ac", "choices": ["b", "c"], "answer": 0}), "20AC"),
        ("eval_pairs", "", "bad.jsonl is empty"),
        ("eval_pairs", '{"prompt": "a"}', "line 1 of bad.jsonl"),
        ("eval_pairs", None, "bad.jsonl"),
    ],
)
def test_invalid_task_file_is_refused_before_the_run_writes(files, dataset, tmp_path, monkeypatch, name, content, said):
    if content is not None:
        (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(UserError, match=said):
        train_here(monkeypatch, *RUN, f"--{name}=bad.jsonl", f"--dataset={dataset}", "--out_dir=o")
    assert not (tmp_path / "o").exists()
