"""Training on several ranks, with DDP or FSDP, gives the losses of a single process. torchrun starts the ranks."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import REPO, TINY, metrics, script_here, torchrun

from acorn import UserError, checkpoint, files, hub
from train import TrainSettings, load_data, micro_batch_size

# run several trainings in the same processes, because starting processes takes longer than a tiny run
RUNS = f"""
import json, sys
sys.path.insert(0, {str(REPO)!r})
import torch, train
from acorn import report
torch.set_num_threads(1)
report.draw_curve = lambda *args: None  # slower than a tiny run
join = train.heartbeat.join
train.heartbeat.join = lambda *how: torch.distributed.is_initialized() or join(*how)
for words in json.loads(sys.argv[1]):
    sys.argv = ["train.py", *words]
    assert train.main() == 0
train.runtime.shutdown(0)
"""
# numbers of rows and matrices that 2 and 4 ranks do not divide evenly, and micro-batches that they must split
SHAPE = "--n_layer=3 --n_hidden=50 --dropout=0 --eval_interval=5 --max_iters=10".split()
ADAMW = [*SHAPE, "--document_mask=True"]
MUON = [
    *SHAPE,
    "--optimizer=muon",
    "--muon_split=True",
    "--pos=rope",
    "--ngram=2",
    "--embedding_skip=True",
    "--tie_weights=False",
    "--zero_init=True",
]
MUON += ["--gradient_accumulation_steps=1", "--batch_size=8"]
OPTIMIZERS = [("adamw", ADAMW), ("muon", MUON)]


def train(cwd, n_processes, *runs, before=""):
    """Run train.py with each of the argument lists `runs` on `n_processes` ranks, and return the output.

    Each rank first executes the code `before`. A single rank without such code runs in this process.
    """
    if n_processes == 1 and not before:
        results = [script_here("train.py", *TINY, "--overwrite=True", *words, cwd=cwd) for words in runs]
        assert all(result.returncode == 0 for result in results), results
        return "".join(result.stdout for result in results)
    (cwd / "runs.py").write_text(RUNS.replace("for words in", f"{before}\nfor words in"))
    runs = json.dumps([[*TINY, "--overwrite=True", *map(str, words)] for words in runs])
    command = [sys.executable, *(torchrun(n_processes) if n_processes > 1 else []), cwd / "runs.py", runs]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "UserWarning" not in result.stderr
    return result.stdout


def losses(out_dir):
    lines = metrics(out_dir)
    return [{name: value for name, value in line.items() if "loss" in name or name == "step"} for line in lines]


def assert_same(folder, *runs, rel=1e-5):
    """Assert that all runs have the losses of the first, up to rounding errors from another order of summation."""
    one, *others = [losses(folder / run) for run in runs]
    for other in others:
        for a, b in zip(one, other, strict=True):
            assert a == pytest.approx(b, rel=rel)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with a text dataset, a chat dataset, and single-process runs on a mixture of both."""
    folder = tmp_path_factory.mktemp("distributed")
    pairs = [{"prompt": f"{n} a?", "response": " ".join("a" * n)} for n in range(1, 40)]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "t").mkdir()
    for i in range(40):
        (folder / "t" / f"{i}.txt").write_text(f"this is document number {i} of many. " * (i % 7 + 1))
    for words in (["chat", "p.jsonl"], ["text", "t"]):
        result = script_here("prepare", *words, "--tokenizer=byte", f"--out={words[0]}", cwd=folder)
        assert result.returncode == 0, result.stderr
    data = "--dataset=text:0.6,chat:0.4"
    train(folder, 1, [*ADAMW, data, "--out_dir=adamw"], [*MUON, data, "--out_dir=muon"])
    return folder


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_do_not_depend_on_the_number_of_ranks(alone, n):
    data = "--dataset=text:0.6,chat:0.4"
    forms = {"ddp": [], "fsdp": ["--fsdp=True"], "recomputed": ["--fsdp=True", "--activation_checkpointing=True"]}
    runs = {f"{form}-{name}-{n}": [*words, *more] for form, more in forms.items() for name, words in OPTIMIZERS}
    for form in ("recomputed",) if n > 2 else ("ddp", "recomputed"):  # a few of all combinations
        del runs[f"{form}-adamw-{n}"]
    auto = [*SHAPE, data, "--dtype=auto", "--max_iters=2", "--eval_interval=2", f"--out_dir=auto-{n}"]
    out = train(alone, n, *([*words, data, f"--out_dir={name}"] for name, words in runs.items()), auto)
    assert out.count("step 5: train loss") == len(runs)  # only one process prints
    assert out.count("(auto: ") == 1  # one process measures, and all use its choice
    assert f"{n} processes over gloo" in out and "sharded over them" in out
    assert f"micro-batches of {8 // n} sequences" in out
    for name, _ in OPTIMIZERS:
        assert_same(alone, name, *(run for run in runs if f"-{name}-" in run))


@pytest.mark.slow
def test_sharded_run_has_same_initial_weights_and_resumes_unsharded(alone):
    """With a learning rate of 0, the first checkpoint has the initial weights. A second run resumes in one process."""
    data = ["--dataset=text", "--max_iters=1", "--bias=True"]
    still = ["--learning_rate=0", "--min_lr=0", "--optimizer=muon", "--muon_lr=0"]
    train(alone, 1, [*SHAPE, *data, *still, "--out_dir=still"], [*ADAMW, "--dataset=text", "--out_dir=whole"])
    first = [*ADAMW, "--dataset=text", "--lr_decay_iters=10", "--max_iters=4", "--out_dir=parts"]
    train(alone, 2, [*SHAPE, *data, *still, "--out_dir=still2", "--fsdp=True"], [*first, "--fsdp=True"])
    models = [checkpoint.load_model(str(alone / out))[0] for out in ("still", "still2")]
    one, other = (dict(model.named_parameters()) for model in models)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    result = script_here("train.py", "--init_from=resume", "--out_dir=parts", "--max_iters=10", cwd=alone)
    assert result.returncode == 0 and "not sharded (fsdp" in result.stdout, result.stderr
    one, other = ([m["loss"] for m in losses(alone / out) if "loss" in m] for out in ("whole", "parts"))
    assert one == pytest.approx(other, rel=1e-5)


# make the gradient non-finite in updates 3 and 6 of each run; with FSDP, in the shard of every rank
POISON = """
from acorn.training import optim
optim.HOST_DECIDED_DEVICES = ()  # as on a GPU
from acorn.distributed.sharding import local
clip, calls = torch.nn.utils.clip_grad_norm_, []
def poisoned(parameters, *how):
    parameters = list(parameters)
    calls.append(0)
    if len(calls) % 8 in (3, 6):
        for p in parameters:
            local(p.grad).view(-1)[:1] = float("nan")
    return clip(parameters, *how)
torch.nn.utils.clip_grad_norm_ = poisoned
"""


@pytest.mark.slow
def test_ranks_skip_the_same_non_finite_updates(alone):
    forms = {"ddp": [], "fsdp": ["--fsdp=True"], "auto": ["--auto_batch=True"]}
    few = ["--max_iters=8", "--eval_interval=4", "--log_interval=3", "--dataset=text"]
    train(alone, 1, *([*words, *few, f"--out_dir=bad-{name}"] for name, words in OPTIMIZERS), before=POISON)
    runs = {f"bad-{form}-{name}": [*words, *few, *more] for form, more in forms.items() for name, words in OPTIMIZERS}
    train(alone, 2, *([*words, f"--out_dir={out}"] for out, words in runs.items()), before=POISON)
    for name, _ in OPTIMIZERS:
        outs = [f"bad-{name}", *(f"bad-{form}-{name}" for form in forms)]
        assert_same(alone, *outs)
        for out in outs:
            state = json.loads((alone / out / "step_000008" / "state.json").read_text())
            assert (state["skipped"], state["bad_steps"]) == (2, 0)


@pytest.mark.slow
def test_fsdp_with_lora_frozen_parameters_and_bfloat16(alone):
    """Covers LoRA, frozen parameters, a published checkpoint, and bfloat16 (with samples, and a larger tolerance)."""
    data = ["--dataset=text", "--max_iters=6", "--eval_interval=3"]
    hub.export(str(alone / "adamw"), alone / "hf")
    forms = {
        "lora": [*SHAPE[:3], "--init_from=adamw", "--lora_rank=3"],
        "lora-muon": [*SHAPE[:3], "--init_from=adamw", "--lora_rank=3", "--optimizer=muon"],
        "published": [*SHAPE[:3], "--init_from=hf"],
        "frozen": ["--freeze=wte|h.0", "--n_layer=3", "--dropout=0"],
        "bf16": [*SHAPE[:-2], "--dtype=bfloat16", "--n_head=1", "--sample_interval=3"],
    }
    train(alone, 1, *([*words, *data, f"--out_dir={name}"] for name, words in forms.items()))
    words = ["--fsdp=True", "--activation_checkpointing=True"]
    out = train(alone, 2, *([*form, *data, *words, f"--out_dir={name}2"] for name, form in forms.items()))
    assert out.count("sample at step") == 2
    for name in ("lora", "lora-muon", "published", "frozen"):
        assert_same(alone, name, f"{name}2")
    assert_same(alone, "bf16", "bf162", rel=0.01)


@pytest.mark.slow
def test_compiled_fsdp_matches_eager(alone):
    words = [*MUON, "--dataset=text", "--max_iters=6", "--compile=True"]
    train(alone, 1, [*words[:-1], "--out_dir=eager"])
    out = train(
        alone,
        2,
        [*words, "--fsdp=True", "--out_dir=compiled"],
        [*words, "--fsdp=True", "--activation_checkpointing=True", "--out_dir=compiled-recomputed"],
    )
    assert "warning" not in out
    assert_same(alone, "eager", "compiled", "compiled-recomputed")


def test_micro_batch_size_divides_the_batch_among_ranks():
    def size(accumulation, batch_size, n_processes):
        s = TrainSettings(gradient_accumulation_steps=accumulation, batch_size=batch_size)
        return micro_batch_size(s, n_processes)

    assert size(40, 12, 8) == 12  # nanoGPT's default is unchanged
    assert size(1, 12, 2) == 6 and size(1, 12, 4) == 3  # as in config/quickstart.py
    assert size(3, 8, 2) == 6  # 12 sequences per rank, in two micro-batches
    assert size(5, 12, 1) == 12
    for accumulation, batch_size, n_processes, nearest in (
        (1, 12, 8, 16),
        (1, 1, 4, 4),
        (40, 12, 64, 16),
        (6, 5, 4, 4),
    ):
        with pytest.raises(UserError, match=rf"--batch_size={nearest}\b"):
            size(accumulation, batch_size, n_processes)
        assert size(accumulation, nearest, n_processes)


def test_data_is_hashed_once_per_machine_and_compared(dataset, monkeypatch):
    hashed, really = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path) or really(path))
    s = TrainSettings(dataset=str(dataset))
    for first, n_files in ((True, 2), (False, 0)):
        hashed.clear()
        load_data(s, {}, SimpleNamespace(is_first_on_machine=first, gather=lambda values: [values, values]))
        assert len(hashed) == n_files
    with pytest.raises(UserError, match="differs between machines"):
        load_data(s, {}, SimpleNamespace(is_first_on_machine=True, gather=lambda values: [values, [values[0] + 1]]))


@pytest.mark.slow
def test_task_results_do_not_depend_on_the_number_of_ranks(dataset, tmp_path):
    prompts, words = [f"{verb} the " for verb in ("take", "bring", "leave")], ("letter", "lantern", "horse")
    for name, answer in (("c", lambda i: {"choices": words, "answer": i}), ("p", lambda i: {"response": words[i]})):
        records = [{"prompt": prompt, **answer(i)} for i, prompt in enumerate(prompts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = ["--max_iters=4", "--eval_interval=2", "--eval_choices=c.jsonl", "--eval_pairs=p.jsonl", "--dropout=0"]
    run += [f"--dataset={dataset}"]
    train(tmp_path, 1, [*run, "--out_dir=one"])
    train(tmp_path, 2, [*run, "--out_dir=ddp"], [*run, "--out_dir=fsdp", "--fsdp=True"])
    names = [name for name in metrics(tmp_path / "one")[0] if name.startswith(("choices/", "pairs/"))]
    assert len(names) == 8
    for out_dir in ("ddp", "fsdp"):
        for one, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / out_dir), strict=True):
            assert [one.get(name) for name in names] == pytest.approx([other.get(name) for name in names], abs=1e-6)


@pytest.mark.slow
def test_losses_of_every_objective_do_not_depend_on_ranks(alone):
    """Preferences, a teacher and rewards. GRPO samples the same completions for any number of ranks."""
    pairs = [{"prompt": f"{n} a?", "chosen": "A" * (n % 5 + 1), "rejected": "b" * (n % 3 + 1)} for n in range(1, 40)]
    (alone / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    result = script_here("prepare", "preferences", "pairs.jsonl", "--tokenizer=chat", "--out=pairs", cwd=alone)
    assert result.returncode == 0, result.stderr
    common = ["--block_size=96", "--dropout=0", "--max_iters=4", "--eval_interval=2"]
    train(alone, 1, [*common, "--dataset=chat", "--out_dir=sft", "--max_iters=20", "--eval_interval=20"])
    start = [*common, "--init_from=sft"]
    grpo = [*start, "--objective=grpo", "--dataset=chat", "--reward=length", "--group_size=4", "--max_new_tokens=12"]
    forms = {
        "dpo": [*start, "--objective=dpo", "--dataset=pairs"],
        "lora": [*start, "--objective=dpo", "--dataset=pairs", "--lora_rank=2"],
        "distill": [*common, "--objective=distill", "--teacher=sft", "--dataset=chat", "--n_embd=16"],
        "grpo": grpo,
        "kl": [*grpo, "--kl_beta=0.1"],
    }
    train(alone, 1, *([*words, f"--out_dir={name}"] for name, words in forms.items()))
    runs = {
        f"{name}-{kind}": [*forms[name], *more]
        for name in forms
        for kind, more in (("ddp", []), ("fsdp", ["--fsdp=True"]))
    }
    train(alone, 2, *([*words, f"--out_dir={name}"] for name, words in runs.items()))
    for name in forms:
        assert_same(alone, name, f"{name}-ddp", f"{name}-fsdp", rel=1e-4)
