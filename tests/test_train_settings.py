"""Random values for train.py's settings: each combination either trains or is refused with an error message."""

import math
import sys
import typing
from pathlib import Path

import pytest
from helpers import fuzz, keep_signal_handlers, rounds, script_here
from hypothesis import strategies as st

import prepare.__main__ as prepare_cli
import train
from acorn import UserError, report
from acorn.training.progress import LINES

# a model of a few thousand parameters, two updates, and no settings that depend on the machine
BASE = dict(block_size=8, batch_size=2, gradient_accumulation_steps=2, n_layer=1, n_head=2, n_embd=16, ngram_rows=50)
BASE |= dict(max_iters=2, eval_interval=1, eval_iters=1, warmup_iters=1, device="cpu", dtype="float32", compile=False)
# values that are valid in almost any combination
PLAIN = dict(
    block_size=[1, 2, 5, 8],
    batch_size=[1, 3],
    gradient_accumulation_steps=[1, 3],
    n_layer=[1, 2],
    n_head=[1, 2, 4],
    n_kv_head=[0, 1, 2],
    n_embd=[16, 24],
    head_dim=[0, 6],
    n_hidden=[0, 7],
    nope_every=[0, 2],
    ngram=[1, 2, 3],
    ngram_rows=[1, 9],
    ngram_dropout=[0.0, 0.5],
    dropout=[0.0, 0.5],
    attn_dropout=[-1, 0.0, 0.3],
    logit_softcap=[0.0, 5.0],
    eval_interval=[1, 2, 7],
    log_interval=[1, 3],
    eval_iters=[0, 1],
    keep_checkpoints=[1, 3],
    sample_interval=[0, 1],
    max_iters=[0, 1, 2],
    learning_rate=[0.0, 1e-3],
    muon_lr=[0.0, 0.02],
    muon_momentum=[0.0, 0.95],
    embedding_std=[0.0, 0.1],
    min_lr=[0.0, 1e-4],
    weight_decay=[0.0, 0.1],
    beta1=[0.0, 0.9],
    beta2=[0.0, 0.99],
    grad_clip=[0.0, 1.0],
    warmup_iters=[0, 1, 5],
    lr_decay_iters=[0, 1, 9],
    cooldown_frac=[0.1, 1.0],
    seed=[0, 7],
    max_bad_steps=[1, 20],
    objective=["tokens"],  # tests/test_objective.py tries the others
    reference=[""],
    teacher=[""],
    reward=[""],
    dpo_beta=[0.1, 2.0],
    label_smoothing=[0.0],
    simpo_gamma=[0.0, 1.0],
    distill_temperature=[1.0, 2.0],
    distill_weight=[0.0, 1.0],
    group_size=[2, 8],
    max_new_tokens=[1, 64],
    rollout_temperature=[0.5, 1.0],
    kl_beta=[0.0, 0.1],
    lora_rank=[0, 2],
    lora_alpha=[1, 16.0],
    lora_targets=["c_attn|c_fc", "mlp"],
    freeze=["", "wte", r"h\.0"],
    init_from=["scratch", "RUN"],
    dataset=["CHAR", "BYTE", "BYTE:1,OTHER:2"],
    eval_choices=[""],
    eval_pairs=[""],
    dtype=["float32", "bfloat16", "float16", "auto"],
)
STRANGE = {
    int: "-1 0 1e0 2.5 1099511627776 1e18 9223372036854775808 1e30 -1e30 nan inf x 0x10 ".split(" "),
    float: "-1 0 1 -0.0 1e-320 1e-30 1e30 1e308 1e999 nan -inf x 0.999999999 ".split(" "),
    str: ["", " ", "nowhere", "a\nb", "(", "*", "\udcff", "x" * 300, "../..", "a:1,b:x", ":", ",", "0"],
}
LEFT_OUT = {"out_dir", "wandb_log", "wandb_project", "wandb_run_name", "tensorboard_log", "compile", "device"}
LEFT_OUT |= {"max_minutes", "early_stopping"}  # these can end training early


@st.composite
def words(draw) -> dict[str, str]:
    """Draw settings for the command line: up to 12 values that are usually valid, and up to two strange ones."""
    types_of = {n: t for n, t in typing.get_type_hints(train.TrainSettings).items() if n not in LEFT_OUT}
    chosen = {k: str(v) for k, v in BASE.items()}
    for name in draw(st.lists(st.sampled_from(sorted(types_of)), max_size=12, unique=True)):
        if name in PLAIN:
            values = PLAIN[name]
        else:
            values = [True, False] if types_of[name] is bool else typing.get_args(types_of[name])
        chosen[name] = str(draw(st.sampled_from(list(values))))
    strange = [name for name, kind in types_of.items() if kind in STRANGE]
    for name in draw(st.lists(st.sampled_from(strange), max_size=2)):
        chosen[name] = draw(st.sampled_from(STRANGE[types_of[name]]))
    if float_of(chosen["max_iters"]) > 2:  # a dry run estimates the time without training
        chosen["dry_run"] = "True"
    return chosen


def float_of(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


@pytest.fixture(scope="module")
def places(dataset, tmp_path_factory) -> dict[str, str]:
    """Return the paths that replace the placeholders in PLAIN, such as RUN."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("BYTE", "OTHER"):
        (folder / name).write_text(f"{name} is what it says. " * 50)
        argv = ["text", str(folder / name), "--tokenizer=byte", f"--out={folder / name.lower()}", f"--name={name}"]
        prepare_cli.prepare_corpus(argv)
    run = folder / "run"
    argv = [f"--{k}={v}" for k, v in BASE.items()]
    done = script_here("train.py", *argv, f"--dataset={folder / 'byte'}", f"--out_dir={run}", cwd=folder)
    assert done.returncode == 0, done.stderr
    return {"CHAR": str(dataset), "BYTE": str(folder / "byte"), "OTHER": str(folder / "other"), "RUN": str(run)}


@rounds(20, 2000)
def test_random_settings_train_or_are_refused(places, tmp_path, monkeypatch, capsys, rounds):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "draw_curve", lambda *args: None)  # slow, and independent of the settings
    runs = trained = refused = 0

    def one(chosen: dict[str, str]) -> None:
        nonlocal runs, trained, refused
        runs += 1
        for name in ("dataset", "init_from"):
            for place, path in places.items():
                chosen[name] = chosen.get(name, "BYTE" if name == "dataset" else "scratch").replace(place, path)
        out_dir = Path(f"o{runs}")
        argv = ["train.py", *(f"--{name}={value}" for name, value in chosen.items()), f"--out_dir={out_dir}"]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            code = train.main_or_advice()
        except (UserError, OSError) as error:  # `acorn.run` prints both as an error message
            assert 10 < len(str(error)) < 3000
            assert not out_dir.exists()
            refused += 1
            return
        if code == 1:
            assert "had a non-finite gradient" in capsys.readouterr().err
        elif "True" not in (chosen.get("eval_only"), chosen.get("dry_run")):
            steps = [line["step"] for line in report.read_metrics(out_dir / "metrics.jsonl") if "loss" in line]
            n_updates = int(float(chosen["max_iters"]))
            every = int(float(chosen.get("log_interval", 1))) or math.ceil(n_updates / LINES)
            assert steps == list(range(0, n_updates, every))
        trained += 1

    with keep_signal_handlers():
        fuzz(one, rounds, words())
    assert trained > rounds / 10 and refused > rounds / 10
    print(f"{trained} trained, {refused} refused")
