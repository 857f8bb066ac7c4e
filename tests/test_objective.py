"""acorn/training/objective.py: train.py with preferences, a teacher and rewards, on a tiny chat model."""

import dataclasses
import json
import math
import typing
from pathlib import Path

import pytest
import torch
from helpers import metrics, numbers, train_here

import prepare.__main__ as prepare_cli
import train
from acorn import UserError, checkpoint
from acorn.data import batches
from acorn.data.loader import Batch
from acorn.data.mixture import load_mixture
from acorn.distributed.runtime import ONE_RANK
from acorn.training import objective
from acorn.training.lora import adapters_off
from acorn.training.objective import Objective
from acorn.training.start import drop_unused
from train import TrainSettings

pytestmark = pytest.mark.usefixtures("no_pictures")
RUN = (
    "--block_size=96 --batch_size=4 --gradient_accumulation_steps=2 --n_layer=1 --n_head=2 --n_embd=16 --pos=rope "
    "--eval_interval=2 --log_interval=1 --eval_iters=1 --max_iters=4 --warmup_iters=0 --learning_rate=1e-2 "
    "--min_lr=1e-3 --device=cpu --dtype=float32 --compile=False --lr_decay_iters=4"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the datasets `chat` and `pairs`, and the run `sft`, trained on `chat`."""
    folder = tmp_path_factory.mktemp("objective")
    words = ["cat", "dog", "fox", "owl"]
    questions = [f"Say {words[i % 4]} {i}." for i in range(60)]
    chats = [{"prompt": q, "response": words[i % 4] * (1 + i % 3)} for i, q in enumerate(questions)]
    pairs = [{"prompt": q, "chosen": "A" * (1 + i % 3), "rejected": "b" * (1 + i % 2)} for i, q in enumerate(questions)]
    for name, kind, rows in (("chat", "chat", chats), ("pairs", "preferences", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        arguments = [str(folder / f"{name}.jsonl"), "--tokenizer=byte", f"--out={folder / name}"]
        prepare_cli.prepare_corpus([kind, *arguments])
    (folder / "none.py").write_text("def reward(prompt, completion, answer): return None")
    with pytest.MonkeyPatch.context() as patch:
        words = [*RUN, f"--dataset={folder / 'chat'}", f"--out_dir={folder / 'sft'}", "--max_iters=20"]
        assert train_here(patch, *words, "--eval_interval=20", "--lr_decay_iters=20") == 0
    return folder


DPO = ["--objective=dpo", "--dataset=pairs", "--init_from=sft", "--dropout=0.1"]
GRPO = ["--objective=grpo", "--reward=length", "--dataset=chat", "--init_from=sft", "--max_new_tokens=12"]
FORMS = {
    "dpo": DPO,
    "lora": [*DPO, "--lora_rank=2"],
    "simpo": [*DPO, "--preference_loss=simpo", "--dpo_beta=2"],
    "distill": ["--objective=distill", "--teacher=sft", "--dataset=chat", "--n_embd=8"],
    "grpo": GRPO,
    "kl": [*GRPO, "--kl_beta=0.1", "--group_size=4", "--advantage_std=True"],
}


SLOW = [form if form in ("dpo", "grpo") else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]


@pytest.mark.parametrize("form", SLOW)
def test_resumed_run_matches_an_uninterrupted_run(form, folder, monkeypatch):
    """All metrics are exactly equal, although resuming loads the frozen model and samples the completions again."""
    monkeypatch.chdir(folder)
    assert train_here(monkeypatch, *RUN, *FORMS[form], f"--out_dir={form}-a") == 0
    assert train_here(monkeypatch, *RUN, *FORMS[form], f"--out_dir={form}-b", "--max_iters=2") == 0
    assert train_here(monkeypatch, "--init_from=resume", f"--out_dir={form}-b", "--max_iters=4") == 0
    assert numbers(folder / f"{form}-b") == numbers(folder / f"{form}-a")
    lines = metrics(folder / f"{form}-a")
    if form == "dpo":
        assert lines[0]["val_loss"] == pytest.approx(math.log(2)) and lines[0]["val_margin"] == 0
        assert lines[-1]["val_loss"] < 0.69 and lines[-1]["val_accuracy"] > 0.9 and lines[-1]["val_margin"] > 0
    if form == "kl":
        assert (folder / "sft/step_000020/pinned").exists()  # the run sft must not remove the reference


@pytest.mark.parametrize("form", ["dpo", *(pytest.param(form, marks=pytest.mark.slow) for form in ("distill", "grpo"))])
def test_updates_do_not_depend_on_the_micro_batch_size(form, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for out, words in (("whole", []), ("pieces", ["--batch_size=2", "--gradient_accumulation_steps=4"])):
        words = [*words, "--dropout=0", "--eval_iters=0", "--max_iters=2", f"--out_dir={form}-{out}"]
        assert train_here(monkeypatch, *RUN, *FORMS[form], *words) == 0
    for one, other in zip(numbers(folder / f"{form}-whole"), numbers(folder / f"{form}-pieces"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


@torch.no_grad()
def test_preference_loss_matches_a_loop_over_pairs(folder, monkeypatch):
    """Compare the loss of rows of several pairs with a loop over pairs, in which each answer has its own sequence."""
    monkeypatch.chdir(folder)
    data = load_mixture("pairs")
    policy, reference = (checkpoint.load_model("sft")[0].eval() for _ in range(2))
    torch.manual_seed(0)
    for p in policy.parameters():
        p.data += 0.1 * torch.randn_like(p)
    s = dataclasses.replace(TrainSettings(), objective="dpo", label_smoothing=0.1)
    objective, rows = Objective(s, data, policy, ONE_RANK, reference), data.sample(96, 0, 4, seed=1)
    loss, figures = objective.loss(policy, Batch(*map(torch.from_numpy, rows)))
    expected, n, x, y, documents = 0.0, 0, *map(torch.from_numpy, rows)
    for row in range(4):
        for pair in range(50):
            h = []
            for document in (2 * pair, 2 * pair + 1):
                kept = documents[row] == document
                if (y[row, kept] != -1).any():
                    nats = [m(x[row, kept][None], y[row, kept][None])[1] for m in (reference, policy)]
                    h.append((nats[0] - nats[1]) * (y[row, kept] != -1).sum())
            if len(h) == 2:
                margin, n = 0.1 * float(h[0] - h[1]), n + 1
                expected += 0.9 * math.log1p(math.exp(-margin)) + 0.1 * math.log1p(math.exp(margin))
    assert n == batches.count_targets(*rows[1:], pairs=True) == figures[0, 1] >= 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for name in ("chosen_reward", "rejected_reward", "margin", "accuracy"):
        assert name in objective.names
    answers = data.tokenizer.decode(y[y != -1]).replace("<|endoftext|>", "")
    assert set(answers) == {"A", "b"}


def test_preference_loss_may_change_on_resume(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert train_here(monkeypatch, *RUN, *FORMS["simpo"], "--out_dir=changing", "--max_iters=2") == 0
    resume = ["--init_from=resume", "--out_dir=changing", "--max_iters=3"]
    with pytest.raises(UserError, match="--reference=CHECKPOINT"):
        train_here(monkeypatch, *resume, "--preference_loss=ipo")
    assert train_here(monkeypatch, *resume, "--preference_loss=ipo", "--reference=sft") == 0
    assert "best checkpoint is chosen anew" in capsys.readouterr().out
    assert train_here(monkeypatch, *resume, "--preference_loss=simpo", "--max_iters=4") == 0
    assert [line["step"] for line in metrics(folder / "changing") if "loss" in line] == [0, 1, 2, 3]


def test_objective_may_change_on_resume(folder, monkeypatch, tmp_path):
    """Inherited settings that only the loss before used are dropped, also a reward whose code would have to run."""
    monkeypatch.chdir(folder)
    (tmp_path / "r.py").write_text("def reward(prompt, completion, answer): return 1.0 * len(completion)")
    words = [*RUN, *GRPO, f"--reward={tmp_path / 'r.py'}", "--max_iters=1", f"--out_dir={tmp_path / 'o'}"]
    assert train_here(monkeypatch, *words) == 0
    resume = ["--init_from=resume", f"--out_dir={tmp_path / 'o'}"]
    assert train_here(monkeypatch, *resume, "--objective=distill", "--teacher=sft", "--max_iters=2") == 0
    assert train_here(monkeypatch, *resume, "--objective=tokens", "--max_iters=3") == 0
    with pytest.raises(UserError, match="teacher=sft has no effect"):
        train_here(monkeypatch, *resume, "--teacher=sft", "--max_iters=4")
    s = TrainSettings(objective="dpo", preference_loss="ipo", reference="sft", label_smoothing=0.1)
    drop_unused(s, given={"preference_loss": "ipo"})
    assert (s.reference, s.label_smoothing) == ("sft", 0.0)


def test_dry_run_includes_the_memory_of_the_reference(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert train_here(monkeypatch, *RUN, *FORMS["dpo"], "--out_dir=none", "--dry_run=True") == 0
    assert "for the reference" in capsys.readouterr().out and not Path("none").exists()


REFUSED = {
    "preferences FILES": ["--objective=dpo", "--dataset=chat", "--init_from=sft"],
    "--objective=dpo": ["--dataset=pairs", "--init_from=sft"],
    "--init_from": ["--objective=dpo", "--dataset=pairs"],
    "needs a teacher": ["--objective=distill", "--dataset=chat"],
    "reference=sft has no effect": ["--reference=sft", "--dataset=chat"],
    "without its adapters": [*FORMS["lora"], "--reference=sft"],
    "exceeds the 96": ["--objective=distill", "--teacher=sft", "--dataset=chat", "--block_size=128"],
    "needs a reward": ["--objective=grpo", "--dataset=chat", "--init_from=sft"],
    "label_smoothing": [*FORMS["simpo"], "--label_smoothing=0.1"],
    "divide": [*FORMS["grpo"], "--group_size=3"],
    "leaves room": [*FORMS["grpo"], "--max_new_tokens=90"],
    "a finite number": [*FORMS["grpo"], "--reward=none.py"],
    "nor a Python file": [*FORMS["grpo"], "--reward=exact"],
    "too small for every pair": [*FORMS["dpo"], "--block_size=8"],
}


@pytest.mark.parametrize("words", REFUSED)
def test_invalid_data_and_settings_are_refused(words, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=words):
        train_here(monkeypatch, *RUN, *REFUSED[words], "--out_dir=none")
    assert not Path("none").exists()


def test_unimplemented_objective_and_loss_are_refused(folder, dataset, monkeypatch):
    """If a name is only in the Literal, the error names the place that lacks it."""
    monkeypatch.chdir(folder)
    kinds = {name: typing.Literal["dpo", "other"] for name in ("objective", "preference_loss")}
    for name, place, words in (
        ("objective", "FIGURES", [f"--dataset={dataset}"]),
        ("preference_loss", "losses.py", FORMS["dpo"]),
    ):
        monkeypatch.setitem(train.TrainSettings.__annotations__, name, kinds[name])
        with pytest.raises(UserError, match=f"{name}='other' has no .*{place}"):
            train_here(monkeypatch, *RUN, *words, f"--{name}=other", f"--out_dir=other_{name}")
    monkeypatch.setitem(objective.FIGURES, "other", ())
    with pytest.raises(UserError, match=r"objective='other' has no branch in Objective\.loss"):
        train_here(monkeypatch, *RUN, f"--dataset={dataset}", "--objective=other", "--out_dir=other_branch")


def test_teacher_with_another_tokenizer_is_refused(folder, dataset, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="another tokenizer"):
        train_here(monkeypatch, *RUN, f"--dataset={dataset}", "--objective=distill", "--teacher=sft", "--out_dir=none")


def test_error_about_the_tokenizer_names_the_command_for_conversations(folder, trained, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="python prepare chat FILES"):
        train_here(monkeypatch, *RUN, "--dataset=chat", f"--init_from={trained}", "--out_dir=none")


def test_disabled_adapters_give_the_base_model(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert train_here(monkeypatch, *RUN, *FORMS["lora"], "--out_dir=adapted", "--max_iters=1") == 0
    found, state = checkpoint.find(Path("adapted"), "latest")
    model = checkpoint.fill(*checkpoint.build_model(found, state)).eval()
    base, idx = checkpoint.load_model("sft")[0].eval(), torch.arange(20)[None]
    with adapters_off(model):
        assert torch.equal(model(idx, idx)[0], base(idx, idx)[0])
    assert not torch.equal(model(idx, idx)[0], base(idx, idx)[0])
