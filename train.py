"""Train a GPT, from scratch or from a checkpoint.

On one device:       python train.py config/quickstart.py --batch_size=32
On four GPUs:        torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py
From where it ended: python train.py --init_from=resume --out_dir=out/quickstart

This file reads from top to bottom: settings, machine, data, model, optimizer, loop.
"""

import contextlib
import dataclasses
import functools
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import acorn  # noqa: F401  # isort: skip  # before torch: it selects the OpenMP runtime
import torch
from torch.nn.parallel import DistributedDataParallel

from acorn import UserError, checkpoint, files, printable, report, run, settings
from acorn.data.batches import samples_per_epoch
from acorn.data.loader import Batch, prefetch, updates
from acorn.data.mixture import Mixture, load_mixture
from acorn.data.tokenizer import KINDS, extends, from_dict, tokenizer_hash
from acorn.distributed import heartbeat, runtime, sharding
from acorn.evaluation.loss import evaluate_mixture
from acorn.inference.generate import sample_text
from acorn.training import autotune, lora
from acorn.training.optim import learning_rate_at, make_optimizers, rate_change, step_if_finite
from model import DROPOUTS, GPT, GPTConfig, grown_rows


@dataclass
class TrainSettings:
    """Train a GPT: python train.py [CONFIG.py ...] [--key=value ...]"""

    # input and output
    out_dir: str = "out"  # where checkpoints, metrics.jsonl and loss.png go
    overwrite: bool = False  # start anew in an out_dir that holds a run, removing that run
    eval_interval: int = 2000  # updates between evaluations
    log_interval: int = 1  # updates between lines on the console and in metrics.jsonl
    eval_iters: int = 200  # batches of each split that an evaluation looks at; 0: the whole val split
    eval_only: bool = False  # evaluate once and exit
    always_save_checkpoint: bool = True  # save after each evaluation; if False, only where the val loss is the best yet
    keep_checkpoints: int = 2  # how many of the newest checkpoints stay; the best stays as well
    sample_interval: int = 0  # updates between samples shown on the console; 0: none
    init_from: str = "scratch"  # scratch | resume | an out_dir | a nanoGPT ckpt.pt | gpt2, OWNER/NAME (hub), a folder
    dry_run: bool = False  # say what the run would take, after a few timed updates, and write nothing
    # wandb logging
    wandb_log: bool = False  # also log to Weights & Biases
    wandb_project: str = "owt"  # its project
    wandb_run_name: str = "gpt2"  # its run
    # data
    dataset: str = "openwebtext"  # a folder that `python prepare` made: its path, or its name in data/; or a:0.8,b:0.2
    document_mask: bool = False  # attention and positions stay inside a document; inside a conversation they always do
    gradient_accumulation_steps: int = 40  # micro-batches in an update, over all processes together
    batch_size: int = 12  # sequences in a micro-batch
    auto_batch: bool = False  # where memory does not suffice, smaller micro-batches and more of them: the same updates
    block_size: int = 1024  # tokens in a sequence
    seed: int = 1337  # of initialization, the order of the data, and dropout
    # model
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels
    dropout: float = 0.0  # 0 is good for pretraining; for fine-tuning and small data try 0.1 to 0.2
    attn_dropout: float = -1.0  # of attention weights; -1: as dropout; with 0 attention keeps its fast kernels
    bias: bool = False  # biases in Linear and LayerNorm
    n_kv_head: int = 0  # heads of keys and values, shared by groups of query heads; 0: n_head
    n_hidden: int = 0  # width of the MLP; 0: 4 * n_embd (swiglu: 8/3)
    pos: Literal["learned", "sinusoidal", "rope"] = "learned"  # positions
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # normalization
    mlp: Literal["gelu_tanh", "gelu", "relu2", "swiglu"] = "gelu_tanh"  # activation; nanoGPT's is gelu
    qk_norm: bool = False  # normalize queries and keys
    tie_weights: bool = True  # head and token embedding share a matrix
    logit_softcap: float = 0.0  # c > 0: logits are c * tanh(logits / c)
    zero_init: bool = False  # blocks, and an untied head, start at zero output
    ngram: int = 1  # n > 1: the last 2, 3, ..., n tokens together have embeddings too; for small models
    ngram_rows: int = 16384  # rows of each table of n-grams at most; where there are more n-grams, these share rows
    ngram_dropout: float = 0.0  # of n-grams as a whole: keeps the tables from learning a small text by heart
    # training a part of a model
    lora_rank: int = 0  # r > 0: the weights stay, and adapters of this rank are learned beside them (LoRA)
    lora_alpha: float = 16.0  # what the adapters add is multiplied by lora_alpha / lora_rank
    lora_targets: str = "c_attn|c_proj|c_fc"  # regular expression: layers with this in their names get adapters
    freeze: str = ""  # regular expression: parameters with this in their names stay as they are
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices in the blocks, beside AdamW for the rest
    muon_lr: float = 0.02  # the highest rate of Muon, scheduled as learning_rate is
    learning_rate: float = 6e-4  # the highest
    max_iters: int = 600000  # updates made in all
    weight_decay: float = 1e-1  # on matrices and embeddings
    beta1: float = 0.9  # decay of AdamW's mean of gradients
    beta2: float = 0.95  # decay of AdamW's mean of squared gradients
    grad_clip: float = 1.0  # clip the norm of the gradient at this; 0: do not
    max_bad_steps: int = 20  # give up after so many updates in a row without a finite gradient
    # learning rate
    decay_lr: bool = True  # warm up and decay; if False, learning_rate throughout
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # wsd: warmup, stable, decay
    warmup_iters: int = 2000  # updates of linear warmup
    lr_decay_iters: int = 0  # the update at which min_lr is reached; 0: max_iters
    min_lr: float = 6e-5  # usually learning_rate / 10
    cooldown_frac: float = 0.4  # wsd: the last part of lr_decay_iters, over which the rate falls
    # machine
    backend: Literal["auto", "nccl", "gloo", "mpi"] = "auto"  # between several processes
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products
    compile: Literal["auto", True, False] = "auto"  # torch.compile the model
    fsdp: bool = False  # several processes hold a shard of the model each (FSDP); for models larger than one device
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more work


# the settings that are fields of GPTConfig too
SHAPE = {f.name for f in dataclasses.fields(TrainSettings)} & {f.name for f in dataclasses.fields(GPTConfig)}


def check(s: TrainSettings) -> None:
    """Raise UserError for a number that no run can have."""
    at_least_1 = "gradient_accumulation_steps batch_size block_size eval_interval log_interval keep_checkpoints"
    for name in [*at_least_1.split(), "max_bad_steps"]:
        if getattr(s, name) < 1:
            raise UserError(f"{name} = {getattr(s, name)} must be at least 1")
    counts = ("eval_iters", "max_iters", "warmup_iters", "lr_decay_iters", "sample_interval", "lora_rank")
    for name in (*counts, "learning_rate", "muon_lr", "min_lr", "weight_decay", "grad_clip"):
        if getattr(s, name) < 0:
            raise UserError(f"{name} = {getattr(s, name)} must not be negative")
    for name in ("beta1", "beta2", "dropout", "ngram_dropout"):
        if not 0 <= getattr(s, name) < 1:
            raise UserError(f"{name} = {getattr(s, name)} must be at least 0 and below 1")
    if not 0 < s.cooldown_frac <= 1:
        raise UserError(f"cooldown_frac = {s.cooldown_frac} must be above 0 and at most 1")
    if not (0 <= s.attn_dropout < 1 or s.attn_dropout == -1):
        raise UserError(f"attn_dropout = {s.attn_dropout} must be at least 0 and below 1, or -1 for that of dropout")
    if not 0 <= s.seed < 2**62:
        raise UserError(f"seed = {s.seed} must be from 0 to 2^62")
    if s.gradient_accumulation_steps * s.batch_size * s.block_size > 2**32:
        raise UserError("gradient_accumulation_steps x batch_size x block_size tokens are too many for any machine")
    if s.lora_rank >= 2**20:
        raise UserError(f"lora_rank = {s.lora_rank} is beyond the size of any matrix; 8 or 16 is usual")
    if s.lora_rank and s.lora_alpha <= 0:
        raise UserError(f"lora_alpha = {s.lora_alpha} must be above 0, or the adapters learn nothing")
    if s.lora_rank and s.init_from == "scratch":
        raise UserError("lora_rank needs weights to start from; name them by --init_from, or leave lora_rank out")
    if s.lora_rank and s.freeze:
        raise UserError("lora_rank freezes all weights, so freeze has nothing to add; leave one of the two out")
    learning_rate_at(0, s.lr_schedule, s.learning_rate, s.min_lr, 0, 1)  # raises where it has no branch
    if s.auto_batch and s.fsdp:
        raise UserError("auto_batch cannot go with fsdp, whose processes need one another in the middle of a pass")
    if not s.out_dir or "\0" in s.out_dir:
        raise UserError(f"out_dir = {s.out_dir!r:.100} is no folder's name; give one, such as out/mine")


def read_settings(argv: list[str]) -> tuple[TrainSettings, dict]:
    """The settings: the defaults, then those of the run that goes on, then the config file, then the command line. With
    them those that the person gave. Raises UserError for what no run can have, and for an out_dir that holds another
    run."""
    given = settings.parse(TrainSettings, argv)
    s = settings.build(TrainSettings, given)
    out_dir, launch = Path(s.out_dir), heartbeat.launch_id()
    if launch and checkpoint.launched_by(out_dir, launch):  # torchrun started this run again after a failure
        given |= {"init_from": "resume", "overwrite": False}
        s = settings.build(TrainSettings, given)
    if s.init_from == "resume":
        before = settings.checked(TrainSettings, checkpoint.last_settings(out_dir))
        for_this_time = {"overwrite": False, "dry_run": False, "eval_only": False}
        s = settings.build(TrainSettings, before, for_this_time, given)
        if (out_dir / "state.json").exists():
            raise UserError(f"{out_dir} is one checkpoint of a run; resume with --out_dir={out_dir.parent}")
    check(s)
    if s.decay_lr and s.min_lr > s.learning_rate:
        if "min_lr" in given:
            raise UserError(
                f"min_lr = {s.min_lr} is above learning_rate = {s.learning_rate}; it should be a tenth of it"
            )
        s.min_lr = s.learning_rate / 10
    starts = s.init_from != "resume" and not (s.eval_only or s.dry_run)
    if starts and not s.overwrite and checkpoint.holds_run(out_dir):
        raise UserError(
            f"{out_dir} holds a run already; go on with it by --init_from=resume, replace it by --overwrite=True, "
            "or give another --out_dir"
        )
    if starts and (pinned := [folder for folder in checkpoint.step_folders(out_dir) if checkpoint.is_pinned(folder)]):
        raise UserError(
            f"overwrite would remove {pinned[0]}, on which adapters stand, as the file {checkpoint.PINNED} in it says; "
            "give another --out_dir, or remove that file"
        )
    return s, given


def load_data(s: TrainSettings, state: dict, r: runtime.Runtime) -> Mixture:
    """The data. Raises UserError where it lacks what the run needs, where the run of `state` was on other data, and
    where the machines do not have the same."""
    data = load_mixture(s.dataset, r.is_first_here, s.document_mask)
    if len(set(map(tuple, r.gather([int(data.identity()[:12], 16)])))) > 1:  # as a number that a float64 holds
        raise UserError(f"{data.path} is not the same on all machines; copy it from one of them to the others")
    for dataset in data.datasets:
        if dataset.val is None:
            raise UserError(f"{dataset.path} has no validation shards; put a val_000000.bin beside its training shards")
    if s.init_from == "resume" and state.get("data") not in (None, data.identity()):
        raise UserError(
            f"{data.path} is not the data that {s.out_dir} was trained on, so its position means nothing there; "
            f"start from its weights with --init_from={s.out_dir} into a new --out_dir"
        )
    return data


def new_model(s: TrainSettings, n_vocab: int, meta: bool) -> GPT:
    """An initialized model for so many token ids; with `meta` on the meta device, where it takes no memory."""
    # rows that no token uses, up to a multiple of 64, make the head's product faster where the vocabulary is large
    vocab_size = n_vocab if n_vocab < 1024 else 64 * math.ceil(n_vocab / 64)
    try:
        config = GPTConfig(vocab_size=vocab_size, **{name: getattr(s, name) for name in SHAPE})
    except ValueError as error:
        raise UserError(str(error)) from error
    with torch.device("meta" if meta else "cpu"):
        return GPT(config)


def load_initial(
    s: TrainSettings, given: dict, folder: Path | None, state: dict, data: Mixture, r: runtime.Runtime
) -> tuple[GPT, dict, str, dict | None]:
    """The model that a run starts from when not from scratch, on the meta device, its parameters, unread (see
    `checkpoint.Opened`), a word on where it comes from, and what a checkpoint says of its adapters where it has any.

    The settings of its shape in `s` follow it; one that the person gave and that differs raises UserError, as does a
    dataset whose tokens mean something else to it. Only dropouts are free, block_size may be smaller, and for control
    tokens that the dataset adds to the tokenizer the model grows."""
    adapters = None
    if s.init_from == "resume":
        model, values = checkpoint.build_model(folder, state, r)
        tokenizer, source, adapters = from_dict(state["tokenizer"]), str(folder), state.get("lora")
        for name in ("lora_rank", "lora_alpha", "lora_targets"):
            if getattr(s, name) != state["settings"].get(name, getattr(TrainSettings, name)):
                raise UserError(f"{name} = {getattr(s, name)!r} differs from the run's own; leave it out to resume")
    else:
        model, values, tokenizer, source, base = checkpoint.open_model(s.init_from, plain=s.lora_rank > 0, r=r)
        if s.lora_rank:
            if s.lora_rank > model.config.n_embd:
                raise UserError(f"lora_rank = {s.lora_rank} is beyond the {model.config.n_embd} channels of {source}")
            if s.overwrite and Path(base).resolve().parent == Path(s.out_dir).resolve():
                raise UserError(f"overwrite would remove {base}, which the adapters stand on; give another --out_dir")
            sha256 = lora.fingerprint(model, values) if r.is_main else None  # which reads all, and rank 0 writes it
            adapters = dict(rank=s.lora_rank, alpha=s.lora_alpha, base=base, sha256=sha256)
            lora.add_adapters(model, lora.choose_targets(model, s.lora_targets), s.lora_rank, s.lora_alpha)
            values |= lora.initial(model, s.seed)
    same = tokenizer is None or tokenizer_hash(tokenizer) == tokenizer_hash(data.tokenizer)
    if not same and s.init_from != "resume" and extends(data.tokenizer, tokenizer):
        n_new = data.vocab_size - tokenizer.n_vocab
        frozen = lora.matching("freeze", s.freeze, [name for name, _ in model.named_parameters()]) if s.freeze else []
        if s.lora_rank or {"transformer.wte.weight", "lm_head.weight"} & set(frozen):
            setting = "lora_rank" if s.lora_rank else "this freeze"
            raise UserError(
                f"{data.path} has {n_new} tokens that are new to {source}, and with {setting} their embeddings would "
                f"stay unlearned; leave {setting} out, or first train a base without it and give that to --init_from"
            )
        n_before = min(tokenizer.n_vocab, model.config.vocab_size)
        model.grow_vocab(n_before, data.vocab_size)
        for name in {"transformer.wte.weight", "lm_head.weight"} & {name for name, _ in model.named_parameters()}:
            values[name] = grown_rows(values[name][...].float(), n_before, data.vocab_size)
        source += f", with {n_new} new tokens"
    elif not same:
        name = tokenizer.kind if tokenizer.kind in KINDS and tokenizer.kind != "char" else s.init_from
        raise UserError(
            f"{source} was trained with another tokenizer ({tokenizer.kind}, {tokenizer.n_vocab} tokens) than the one "
            f"of {data.path} ({data.tokenizer.kind}, {data.tokenizer.n_vocab}); prepare the data with the same one: "
            f"python prepare text FILES --tokenizer {shlex.quote(name)}"
        )
    if data.vocab_size > model.config.vocab_size:
        raise UserError(f"{data.path} has {data.vocab_size} token ids, but {source} only {model.config.vocab_size}")
    for name in sorted(SHAPE - set(DROPOUTS)):
        has, wanted = getattr(model.config, name), given.get(name)
        free = wanted is None or wanted == has or (name in ("n_kv_head", "n_hidden") and wanted == 0)
        if name == "block_size" and wanted is not None and wanted < has:
            model.crop_block_size(wanted)
        elif not free:
            raise UserError(f"{name} = {wanted}, but {source} has {has}, and a checkpoint keeps its shape")
        setattr(s, name, getattr(model.config, name))
    for name in DROPOUTS:
        setattr(model.config, name, getattr(s, name))
    return model, values, source, adapters


def describe(s: TrainSettings, data: Mixture, model: GPT, source: str) -> str:
    """What a run consists of, for a person to read: its data, its model, its updates."""
    lines, epochs = [], []
    windows = s.max_iters * s.gradient_accumulation_steps * s.batch_size
    for dataset, share in zip(data.datasets, data.shares, strict=True):
        where = f"{float(share):.1%} {dataset.path}" if share < 1 else dataset.path
        lines += [f"data: {where}, {len(dataset.train):,} tokens to train on and {len(dataset.val):,} to validate"]
        lines += [f"note: {note}" for note in dataset.notes(s.block_size)]
        epochs += [f"{windows * float(share) / samples_per_epoch(dataset.train, s.block_size):.3g}"]
    lines += [f"model: {model.num_params():,} parameters, vocabulary of {model.config.vocab_size:,}, from {source}"]
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if n_trained < model.num_params():
        lines += [f"trained: {n_trained:,} of them, {'adapters' if s.lora_rank else 'the others are frozen'}"]
    if not s.eval_only:
        update = f"{s.gradient_accumulation_steps * s.batch_size * s.block_size:,} tokens"
        lines += [f"run: {s.max_iters:,} updates of {update}, {' and '.join(epochs)} epochs, into {s.out_dir}"]
    return "\n".join(lines)


def micro_batch_size(s: TrainSettings, world_size: int) -> int:
    """Sequences in the micro-batches of each process: batch_size, or, where the micro-batches of an update cannot be
    dealt out evenly, the largest number below it that makes them. Raises UserError where there is none."""
    windows = s.gradient_accumulation_steps * s.batch_size
    if windows % world_size:
        unit = world_size // math.gcd(world_size, s.gradient_accumulation_steps)
        nearest = unit * max(1, round(s.batch_size / unit))
        raise UserError(
            f"an update has gradient_accumulation_steps x batch_size = {s.gradient_accumulation_steps} x "
            f"{s.batch_size} sequences, which {world_size} processes cannot share evenly; --batch_size={nearest} can be"
        )
    return max(n for n in range(1, s.batch_size + 1) if windows // world_size % n == 0)


def smaller(micro_batch: int) -> int:
    """Half of it; or, of an odd number above 1, the largest part that it can be divided into."""
    return micro_batch // next(n for n in range(2, micro_batch + 1) if micro_batch % n == 0)


def batch_words(micro_batch: int, windows: int) -> str:
    """The settings of an update of so many windows, for a person to copy."""
    return f"--batch_size={micro_batch} --gradient_accumulation_steps={windows // micro_batch}"


@contextlib.contextmanager
def advice_on_memory(micro_batch: int, windows: int):
    """Raise UserError with the settings that need less where memory runs out inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not runtime.out_of_memory(error) or micro_batch == 1:
            raise
        raise UserError(
            f"the memory does not hold micro-batches of {micro_batch}; {batch_words(smaller(micro_batch), windows)} "
            "makes the same updates in smaller ones, and --auto_batch=True finds those that fit"
        ) from error


def accumulate(
    model: torch.nn.Module,
    batches: list[Batch],
    r: runtime.Runtime,
    scaler: torch.amp.GradScaler,
    scale: torch.Tensor,
    average: bool,
    nats: torch.Tensor,
) -> None:
    """Add up the gradients of the micro-batches, times `scale`, and their losses in `nats`. With `average`,
    DistributedDataParallel averages the gradients in the last backward pass."""
    for i, batch in enumerate(batches):
        if isinstance(model, DistributedDataParallel):  # FSDP averages in each pass, since the gradients of the whole
            # model would stay in every process until the last
            model.require_backward_grad_sync = average and i == len(batches) - 1
        x, y, documents = batch.to(r.device)
        with r.autocast():
            loss = model(x, y, reduction="sum", documents=documents)[1]
        scaler.scale(loss * scale).backward()
        nats += loss.detach()


def set_rates(s: TrainSettings, optimizers: list[torch.optim.Optimizer], step: int) -> float:
    """Set the learning rates of update `step`, and return that of learning_rate; the others scale with it."""
    lr = s.learning_rate
    if s.decay_lr:
        decay = (s.min_lr, s.warmup_iters, s.lr_decay_iters or s.max_iters, s.cooldown_frac)
        lr = learning_rate_at(step, s.lr_schedule, s.learning_rate, *decay)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak_lr"] * lr / s.learning_rate if s.learning_rate else 0.0
    return lr


def foresee(
    s: TrainSettings, data: Mixture, model: GPT, n_updates: int, dt: float, per_window: float, peak_memory: int
) -> str:
    """What so many updates of `dt` seconds each, and their evaluations, at `per_window` seconds, would take, for a
    person to read."""
    whole = max(samples_per_epoch(dataset.val, s.block_size) for dataset in data.datasets)
    n_windows = 2 * (s.eval_iters * s.batch_size or whole)  # of each dataset, in both splits
    evaluating = per_window * n_windows * (math.ceil(n_updates / s.eval_interval) + 1)
    held = [(p, sharding.local(p).nbytes) for p in model.parameters()]
    fixed = sum(n_bytes * (4 if p.requires_grad else 1) for p, n_bytes in held)
    copied = sum(n_bytes * (3 if p.requires_grad else 0 if s.lora_rank else 1) for p, n_bytes in held)
    tokens = s.gradient_accumulation_steps * s.batch_size * s.block_size
    return (
        f"memory: {report.size(fixed)} at most for parameters, gradients and optimizer moments; "
        f"at its peak the process used {report.size(peak_memory)}; each checkpoint is copied into up to "
        f"{report.size(copied)} more of main memory\n"
        f"time: {1000 * dt:.0f} ms an update, {tokens / dt:,.0f} tokens/s; about "
        f"{report.duration(n_updates * dt)} for the updates and {report.duration(evaluating)} for the evaluations\n"
        "this was a dry run: nothing was written"
    )


def request_stop(signals: list[int], number: int, frame) -> None:
    """At the first signal ask for a checkpoint and an end after this update; a second one ends the process at once.
    Not so under torchrun, which passes on what its processes may have got already, and kills them after 30 seconds.
    Several processes first have to agree, so the loop says what comes."""
    signals.append(number)
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    signal.signal(signal.SIGINT, signal.SIG_IGN if launched else signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if launched else signal.SIG_DFL)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        words = "stopping after this update, with a checkpoint" + ("" if launched else "; once more to stop at once")
        os.write(2, f"\n{words}\n".encode())  # not print, which may itself be what was interrupted


def command(script: str, words: str, out_dir: str) -> str:
    """The command that goes on with `out_dir`, for a person to copy."""
    python, remark = "python", ""
    if script == "train.py" and "WORLD_SIZE" in os.environ:  # by torchrun, which calls a node a group
        processes, nodes = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
        python = f"torchrun --standalone --nproc_per_node={processes}"
        if nodes > 1:
            meet = f"--rdzv_backend=c10d --rdzv_endpoint={os.environ['MASTER_ADDR']}:29500"
            python = f"torchrun --nnodes={nodes} --nproc_per_node={processes} {meet}"
            remark = " # on every node"
    where = shlex.quote(str(Path(sys.argv[0]).with_name(script)))
    return " ".join(filter(None, [python, where, words, f"--out_dir={shlex.quote(out_dir)}"])) + remark


def main() -> int:
    sys.stdout.reconfigure(errors="replace")  # what a terminal's encoding lacks should not end a run
    # ---- settings
    s, given = read_settings(sys.argv[1:])
    out_dir, writes = Path(s.out_dir), not (s.eval_only or s.dry_run)
    there = checkpoint.step_folders(out_dir)

    # ---- machine
    r = runtime.setup(s.device, s.dtype, s.compile, s.backend, s.fsdp)
    if s.activation_checkpointing:
        runtime.set_malloc(lean=True)
    signals = []  # those that asked this process to stop

    def say(text: str) -> None:
        if r.is_main:
            try:
                print(printable(text), flush=True)
            except BrokenPipeError:  # whoever read this went away, as in `python train.py | head`
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115
                signals.append(signal.SIGTERM)
            except OSError:  # the disk of a log file is full, which is no reason to end a run
                pass

    micro_batch = micro_batch_size(s, r.world_size)
    if micro_batch < s.batch_size:
        r.notes.append(f"micro-batches of {micro_batch} sequences, so that each process has as many")
    say("; ".join(r.notes))

    # ---- data and model
    folder, state = checkpoint.find(out_dir, r=r) if s.init_from == "resume" else (None, {})  # to go on from
    data = load_data(s, state, r)
    torch.manual_seed(s.seed)
    adapters, values = None, None  # what a checkpoint says of adapters; its parameters, unread
    if s.init_from == "scratch":
        model, source = new_model(s, data.vocab_size, meta=r.fsdp), "scratch"
    else:
        model, values, source, adapters = load_initial(s, given, folder, state, data, r)
    if s.freeze:
        lora.freeze(model, s.freeze)
    model.activation_checkpointing = s.activation_checkpointing
    muon, before = s.optimizer == "muon", state.get("arithmetic")
    arithmetic, notes = autotune.choose(s.dtype, model.config, micro_batch, muon, r, before)
    r.dtype = arithmetic.torch_dtype
    arithmetic.apply(model)
    if notes:
        say("; ".join(notes))
    if r.fsdp:  # from here on it takes memory, each process for its rows alone
        model = sharding.shard(model, r, values)
    else:
        model = (checkpoint.fill(model, values) if values else model).to(r.device)
    raw_model, values = model, None  # `model` may become a compiled and distributed form of it

    windows_per_step = s.gradient_accumulation_steps * s.batch_size
    tokens_per_step = windows_per_step * s.block_size
    say(describe(s, data, raw_model, source))
    if s.init_from == "resume":
        before = settings.build(TrainSettings, settings.checked(TrainSettings, state["settings"]))
        if change := rate_change(before, s, state["step"]):
            say(f"note: {change}")

    # ---- optimizer
    rates = (s.learning_rate, s.muon_lr, s.weight_decay, (s.beta1, s.beta2))
    optimizers = make_optimizers(raw_model, s.optimizer, *rates, r.device.type, arithmetic.torch_muon_dtype)
    scaler = torch.amp.GradScaler(r.device.type, enabled=r.dtype == torch.float16)  # else its gradients underflow
    if s.init_from == "resume":
        checkpoint.load_optimizers(folder, state, raw_model, optimizers)
        if scaler.is_enabled() and state.get("scaler"):
            scaler.load_state_dict(state["scaler"])

    # ---- where the run stands; all of it goes into state.json
    at = dict(step=0, position=0, seconds=0.0, bad_steps=0, skipped=0)  # position: windows drawn from the data
    at |= dict(best_loss=None, val_loss=None, evaluated_at=None, wandb_id=None, data=None)
    at |= {name: state[name] for name in at if name in state}
    saved_at = at["step"] if s.init_from == "resume" else None
    if (at["step"] > s.max_iters or at["evaluated_at"] == at["step"] == s.max_iters) and not s.eval_only:
        say(f"{out_dir} has its {at['step']} updates already; a larger --max_iters goes on")
        return 0
    at["data"] = data.identity()

    # ---- compiled, and distributed
    def one_pass(some_model: torch.nn.Module) -> None:
        x = torch.zeros(micro_batch, s.block_size, dtype=torch.long, device=r.device)
        documents = x.clone() if data.has_documents else None
        with r.autocast():
            some_model(x, x.clone(), reduction="sum", documents=documents)[1].backward()
        raw_model.zero_grad(set_to_none=True)

    def shrink() -> None:
        """Go on with smaller micro-batches and more of them."""
        nonlocal micro_batch
        if micro_batch == 1:
            raise UserError("the memory does not hold one sequence at a time; make --block_size or the model smaller")
        micro_batch = smaller(micro_batch)
        say(f"out of memory; going on as with {batch_words(micro_batch, windows_per_step)}, which changes no update")

    while s.auto_batch and not r.fits(one_pass, raw_model):
        raw_model.zero_grad(set_to_none=True)
        shrink()
    if r.compile and not s.eval_only:
        say("compiling ...")
        model = runtime.compile_or_eager(model, one_pass, r)
    if r.world_size > 1 and not r.fsdp:
        device_ids = [r.device.index] if r.device.type == "cuda" else None
        # gradients stand where they are averaged, or they would be there twice
        model = DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)

    # ---- from here on the run writes
    metrics = None
    if writes and r.is_main:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = files.lock(out_dir, "training into")  # noqa: F841 (held until this process ends)
        if checkpoint.step_folders(out_dir) != there:
            raise UserError(f"another run wrote into {out_dir} while this one started; look at it, and start again")
        if s.init_from != "resume":
            checkpoint.remove_run(out_dir)  # only with overwrite does this find more than a run without a checkpoint
            if adapters:
                checkpoint.pin(Path(adapters["base"]), out_dir)
        wandb_run = None
        if s.wandb_log:
            named = (s.wandb_project, s.wandb_run_name, dataclasses.asdict(s), out_dir, at["wandb_id"])
            wandb_run = report.start_wandb(*named)
            at["wandb_id"] = wandb_run.id
        metrics = report.Metrics(out_dir, at["step"], at["evaluated_at"], wandb_run)

    writer = checkpoint.Writer(out_dir, s.keep_checkpoints, r.rank, r.world_size)

    skipped = torch.tensor([at["bad_steps"], at["skipped"]], device=r.device)  # updates, in a row and in all
    give_up_at = at["step"] + s.max_bad_steps - at["bad_steps"]  # the earliest step that can have too many in a row

    def read_skipped() -> None:
        """Wait for the device, and copy its count of skipped updates into `at`."""
        nonlocal give_up_at
        before = at["skipped"]
        at["bad_steps"], at["skipped"] = skipped.tolist()
        at["seconds"], give_up_at = time.perf_counter() - began, at["step"] + s.max_bad_steps - at["bad_steps"]
        if new := at["skipped"] - before:
            say(f"step {at['step'] - 1}: non-finite gradient, {new} updates skipped ({at['skipped']} so far)")

    def save(best: bool = False) -> None:
        read_skipped()
        progress = {"settings": dataclasses.asdict(s), **at, "tokenizer": data.tokenizer.to_dict()}
        progress |= {"arithmetic": dataclasses.asdict(arithmetic), "lora": adapters}
        progress |= {"scaler": scaler.state_dict(), "launch": heartbeat.launch_id()}
        writer.save(raw_model, optimizers, progress, best)

    def saved_whole() -> bool:
        """Whether the last checkpoint is on the disk, at the end of the run."""
        if not writer.wait() and r.is_main:
            go_on = command("train.py", "--init_from=resume", s.out_dir)
            error = f"error: the last updates are not saved ({writer.failure}); mend that, and go on with: {go_on}"
            print(error, file=sys.stderr)
        return writer.failure is None

    for name in ("SIGINT", "SIGTERM", "SIGHUP") if writes else ():
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), functools.partial(request_stop, signals))

    def batches() -> Iterator[tuple[list[Batch], int]]:
        """The micro-batches of this update and of those after it."""
        how = (r, s.block_size, s.seed, windows_per_step, micro_batch, at["position"])
        return prefetch(updates(data, *how), r.device)

    # ---- the loop
    token_bytes = data.tokenizer.token_bytes()
    first_step = sampled_at = at["step"]
    stop, best_before = False, at["best_loss"]
    began = time.perf_counter() - at["seconds"]
    clock, clock_step = time.perf_counter(), at["step"]  # since when the console line measures
    time_left = report.TimeLeft(s.max_iters, s.eval_interval)
    waited = runtime.Stopwatch(r.device)  # for processes that came later to their updates
    batch_stream = batches()
    model.train()
    while True:
        step = at["step"]
        if stop:
            if saved_at != step and writes:
                at["best_loss"] = at["best_loss"] if writer.wait() else best_before
                save()
            if not saved_whole():
                return 2
            say(f"stopped at step {step}, saved; go on with: {command('train.py', '--init_from=resume', s.out_dir)}")
            return 128 + (signals[0] if signals else signal.SIGTERM)

        # evaluate, and save a checkpoint
        due = step % s.eval_interval == 0 or step == s.max_iters or s.eval_only
        due_at = time.perf_counter() if due and at["evaluated_at"] != step else None
        if due and (at["evaluated_at"] != step or s.eval_only) and not s.dry_run:
            how = (r, micro_batch, s.block_size, s.eval_iters * s.batch_size, token_bytes)
            train = evaluate_mixture(raw_model, data, "train", *how)
            val = evaluate_mixture(raw_model, data, "val", *how)
            failed = not writer.wait()  # the checkpoint before this one: it cannot be the best, and this one is due
            at["best_loss"] = best_before if failed else at["best_loss"]
            best_before = at["best_loss"]
            best = math.isfinite(val["loss"]) and (at["best_loss"] is None or val["loss"] < at["best_loss"])
            at.update(evaluated_at=step, val_loss=val["loss"], seconds=time.perf_counter() - began)
            at["best_loss"] = val["loss"] if best else at["best_loss"]
            per_byte = f", {val['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in val else ""
            each = ", ".join(f"{name[5:]} {loss:.4f}" for name, loss in val.items() if name.startswith("loss/"))
            say(
                f"step {step}: train loss {train['loss']:.4f}, val loss {val['loss']:.4f}"
                f"{f' ({each})' if each else ''}, perplexity {val['perplexity']:.2f}{per_byte}"
            )
            if s.eval_only:
                return 0
            if step > 0 and (best or failed or s.always_save_checkpoint):
                save(best)
                saved_at = step
            if metrics is not None:
                values = {f"val_{name}": value for name, value in val.items()}
                metrics.write(step=step, train_loss=train["loss"], **values, seconds=at["seconds"])
                report.draw_curve(report.read_metrics(metrics.path), out_dir / "loss.png")
        sampling = s.sample_interval and step % s.sample_interval == 0 and step > sampled_at and writes
        sampled_at = step  # smaller micro-batches begin the same update again
        if sampling and (r.is_main or r.fsdp):  # a sharded model runs in all processes or in none
            try:
                text = sample_text(raw_model, data.tokenizer, 200, s.seed)
            except UserError as error:  # logits that are no numbers; what is saved has checks of its own
                text = f"none: {error}"
            say(f"--- a sample at step {step}\n{text}\n---")
        if due:
            clock, clock_step = time.perf_counter(), step
            if due_at is not None:
                time_left.evaluated(clock - due_at)
        if step == s.max_iters and not s.dry_run:
            if saved_at != step:  # the last weights, even where they are not the best
                save()
            if not saved_whole():
                return 2
            best_loss = "none" if at["best_loss"] is None else f"{at['best_loss']:.4f}"
            talks = any(d.train.mask is not None for d in data.datasets)  # conversations: the replies are learned
            sample = command("sample.py", "--chat=True" if talks else "", s.out_dir)
            say(f"done, best val loss {best_loss}; sample from it with: {sample}")
            return 0

        # forward and backward: the loss is a sum over this step's targets, of all micro-batches and processes,
        # divided by their number, so however the batch is split, the step is the same. From here to the log line the
        # host does not wait for a GPU, whose queue of work would run empty.
        micro_batches, n_targets = next(batch_stream)
        heartbeat.note(step)
        signalled = r.ask(bool(signals))
        waited.start()
        n_targets = r.sum(torch.full((), n_targets, device=r.device))  # not torch.tensor, which waits for the GPU
        waited.stop()
        scale = r.world_size / n_targets.clamp(min=1)
        torch.manual_seed(hash((s.seed, step, r.rank)))  # dropout depends on the step alone: exact to resume
        nats = torch.zeros((), device=r.device)
        passes = (model, micro_batches, r, scaler, scale, not s.auto_batch, nats)
        if not s.auto_batch:
            with advice_on_memory(micro_batch, windows_per_step):
                accumulate(*passes)
        elif r.fits(accumulate, *passes):  # no process waits for another in it; the gradients are averaged after it
            r.average_gradients(raw_model)
        else:
            raw_model.zero_grad(set_to_none=True)
            shrink()
            batch_stream, stop = batches(), signalled()
            continue

        # update
        lr = set_rates(s, optimizers, step)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), s.grad_clip or math.inf)
        grad_norm = sharding.whole(grad_norm)
        step_if_finite(optimizers, grad_norm, skipped)
        scaler.update()
        raw_model.zero_grad(set_to_none=True)
        at.update(step=step + 1, position=at["position"] + windows_per_step)
        stop = signalled()  # in all processes alike, so that all end at the same step
        if stop and r.world_size > 1:  # not before: the signal may have come because another process is gone
            say("stopping after this update, with a checkpoint")
        logs = step % s.log_interval == 0 and not s.dry_run
        if logs or at["step"] >= give_up_at:
            read_skipped()
        if at["bad_steps"] >= s.max_bad_steps:
            writer.wait()
            words = f"{s.max_bad_steps} updates in a row had no finite gradient, so the run stops at step {step}"
            if r.is_main:
                print(f"error: {words}; lower the learning rate, or look at the data", file=sys.stderr)
            return 1

        # a dry run ends after a few updates, of which the first, which warms up, does not count
        if s.dry_run and step == first_step:
            r.synchronize()
            clock, clock_step = time.perf_counter(), step + 1
        if s.dry_run and step == first_step + 4:
            r.synchronize()
            dt = (time.perf_counter() - clock) / (step + 1 - clock_step)
            clock, n = time.perf_counter(), micro_batch * r.world_size
            evaluate_mixture(raw_model, data, "val", r, micro_batch, s.block_size, n, token_bytes)
            per_window = (time.perf_counter() - clock) / n
            say(foresee(s, data, raw_model, s.max_iters - first_step, dt, per_window, runtime.peak_memory(r.device)))
            return 0

        # say how it goes
        if logs:
            r.synchronize()
            dt = (time.perf_counter() - clock) / (step + 1 - clock_step)  # seconds an update
            time_left.updated(step + 1 - clock_step, dt * (step + 1 - clock_step))
            clock, clock_step = time.perf_counter(), step + 1
            loss, grad_norm = r.sum(nats).item() / max(n_targets.item(), 1), grad_norm.item()
            mfu = raw_model.estimate_mfu(windows_per_step, dt, r.peak_flops())
            left = time_left.estimate(step + 1)
            say(report.update_line(step, s.max_iters, loss, lr, grad_norm, tokens_per_step / dt, mfu, left))
            memory, waits = zip(*r.gather([runtime.peak_memory(r.device), waited.take()]), strict=True)  # of each
            if metrics is not None:
                values = dict(step=step, loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_second=tokens_per_step / dt)
                values |= dict(mfu=mfu, skipped=at["skipped"], seconds=at["seconds"])
                metrics.write(**values, memory=[int(n) for n in memory], waited=[round(t, 4) for t in waits])


def main_or_advice() -> int:
    """main, with advice where memory runs out. What several processes meet alike, one of them says."""
    try:
        return runtime.leave(main())
    except Exception as error:
        heartbeat.explain(error)
        heartbeat.fail()
        if isinstance(error, (MemoryError, RuntimeError)) and runtime.out_of_memory(error):  # torch's is a RuntimeError
            error = UserError(
                "the device's memory does not hold this run; halve --batch_size and double "
                "--gradient_accumulation_steps, which keeps the updates the same, or make --block_size or the model "
                "smaller"
            )
        if isinstance(error, (UserError, OSError)) and not heartbeat.is_news(str(error)):
            return 2
        raise error


if __name__ == "__main__":
    run(main_or_advice)
