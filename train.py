"""Train a GPT, from scratch or from a checkpoint.

On one device:       python train.py config/quickstart.py --batch_size=32
On four GPUs:        torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py
To resume a run:     python train.py --init_from=resume --out_dir=out/quickstart

This file reads from top to bottom: settings, machine, data, model, optimizer, loop.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import acorn  # noqa: F401  # isort: skip  # before torch: it selects the OpenMP runtime

from acorn import UserError, checkpoint, out_of_memory, run
from acorn.distributed import heartbeat, runtime
from acorn.evaluation.monitor import measure_tasks, read_tasks
from acorn.training import autotune
from acorn.training.accumulate import Accumulator
from acorn.training.objective import start_objective
from acorn.training.optim import make_optimizers, set_learning_rates
from acorn.training.progress import Console, Progress, evaluation_line
from acorn.training.run import (
    SIGNALED,
    RunState,
    SkippedUpdates,
    dry_run,
    finish,
    resume,
    sample,
    saved_state,
    start_writing,
    stop_at_signals,
)
from acorn.training.start import describe, load_data, materialize, micro_batch_size, read_settings, start_model


@dataclass
class TrainSettings:
    """Train a GPT, from scratch or from a checkpoint."""

    # input and output
    out_dir: str = "out"  # where checkpoints, metrics.jsonl and loss.png go
    overwrite: bool = False  # if out_dir already contains a run, delete that run and start a new one
    eval_interval: int = 2000  # updates between evaluations
    log_interval: int = 0  # updates between lines on the console and in metrics.jsonl; 0: about 40 lines
    eval_iters: int = 200  # batches of each split per evaluation; 0: the whole val split
    eval_choices: str = ""  # also measure accuracy at each evaluation: a .jsonl of {"prompt", "choices", "answer"}
    eval_pairs: str = ""  # also measure greedy answers at each evaluation: a .jsonl of {"prompt", "response"}
    eval_only: bool = False  # evaluate once and exit
    always_save_checkpoint: bool = True  # save after each evaluation; if False, only if the val loss is the best so far
    keep_checkpoints: int = 2  # number of newest checkpoints to keep, in addition to the best
    sample_interval: int = 0  # updates between samples on the console; 0: none
    init_from: str = "scratch"  # scratch | resume | an out_dir | a nanoGPT ckpt.pt | gpt2, OWNER/NAME (hub), a folder
    max_minutes: float = 0.0  # end after this many minutes, including those before a resume; 0: off
    early_stopping: int = 0  # end after this many evaluations without a better val loss; 0: off
    dry_run: bool = False  # time a few updates, print the memory and time that the run would need, and write nothing
    # logging; metrics.jsonl is always written
    tensorboard_log: bool = False  # also log to TensorBoard, in out_dir/tensorboard
    wandb_log: bool = False  # also log to Weights & Biases
    wandb_project: str = "owt"  # W&B project
    wandb_run_name: str = "gpt2"  # W&B run
    # data
    dataset: str = "openwebtext"  # output of `python prepare`: a path, or a name in data/; a mixture: a:0.8,b:0.2
    document_mask: bool = False  # attention and positions stay within documents (within conversations, they always do)
    gradient_accumulation_steps: int = 40  # micro-batches per update, on all processes together
    batch_size: int = 12  # sequences per micro-batch
    auto_batch: bool = False  # when memory runs out, use more and smaller micro-batches for the same updates
    block_size: int = 1024  # tokens per sequence
    seed: int = 1337  # for initialization, data order and dropout
    # model
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels
    dropout: float = 0.0  # 0 for pretraining; for fine-tuning and small datasets try 0.1 to 0.2
    attn_dropout: float = -1.0  # dropout of attention weights; -1: same as dropout; 0 keeps the fast attention kernels
    bias: bool = False  # biases in Linear and LayerNorm
    n_kv_head: int = 0  # key/value heads, each shared by a group of query heads; 0: n_head
    head_dim: int = 0  # channels of a head; 0: n_embd / n_head
    n_hidden: int = 0  # width of the MLP; 0: 4 * n_embd (swiglu and geglu: 8/3)
    pos: Literal["learned", "sinusoidal", "rope"] = "learned"  # position encoding
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # normalization
    mlp: Literal["gelu_tanh", "gelu", "relu", "relu2", "swiglu", "geglu"] = "gelu_tanh"  # activation; nanoGPT uses gelu
    qk_norm: bool = False  # normalize queries and keys
    qk_norm_weight: bool = False  # qk_norm has a weight for each channel of a head (Qwen3)
    qkv_bias: bool = False  # biases of queries, keys and values even with bias=False (Qwen2)
    nope_every: int = 0  # n > 0: every n-th block has no rope (SmolLM3)
    tie_weights: bool = True  # head and token embedding share a matrix
    logit_softcap: float = 0.0  # c > 0: logits are c * tanh(logits / c)
    zero_init: bool = False  # blocks, and an untied head, initially output zero
    embedding_std: float = 0.02  # standard deviation of the initial token embedding
    ngram: int = 1  # n > 1: add hashed embeddings of the last 2, 3, ..., n tokens; for small models
    ngram_rows: int = 16384  # maximum rows per n-gram table; if there are more n-grams, they share rows
    ngram_dropout: float = 0.0  # dropout of whole n-gram embeddings, against memorizing a small dataset
    embedding_skip: bool = False  # each block's input is a learned mix of its usual input and the embedding
    # objective: docs/preferences.md
    objective: Literal["tokens", "dpo", "grpo", "distill"] = "tokens"  # learn from text, preferences, rewards, teacher
    reference: str = ""  # dpo, grpo with kl_beta: a checkpoint; default: init_from (LoRA: without its adapters)
    preference_loss: Literal["dpo", "ipo", "simpo"] = "dpo"  # the loss of objective=dpo; simpo needs no reference
    dpo_beta: float = 0.1  # the larger, the closer the model stays to the reference; for simpo, 2 to 10 is usual
    label_smoothing: float = 0.0  # dpo: the assumed fraction of pairs whose answers are swapped
    simpo_gamma: float = 1.0  # simpo: the target margin between the rewards of the two answers
    teacher: str = ""  # distill: the checkpoint to imitate, with the same tokenizer
    distill_temperature: float = 2.0  # distill: softens both distributions before they are compared; 1: unchanged
    distill_weight: float = 0.5  # distill: 1: only the teacher; 0: only the tokens
    reward: str = ""  # grpo: exact_match | arithmetic | format | length | a Python file with a function `reward`
    group_size: int = 8  # grpo: completions of the same prompt, whose rewards are compared
    max_new_tokens: int = 64  # grpo: maximum length of a completion
    rollout_temperature: float = 1.0  # grpo: the temperature at which completions are sampled
    advantage_std: bool = False  # grpo: divide advantages by the standard deviation of their group
    kl_beta: float = 0.0  # grpo: weight of the divergence from the reference; 0: none
    # training part of a model
    lora_rank: int = 0  # r > 0: freeze the weights, and train LoRA adapters of this rank
    lora_alpha: float = 16.0  # the adapters' output is scaled by lora_alpha / lora_rank
    lora_targets: str = "c_attn|c_proj|c_fc"  # regular expression: layers whose names match get adapters
    freeze: str = ""  # regular expression: parameters whose names match are not trained
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the matrices in the blocks, AdamW for the rest
    muon_lr: float = 0.02  # peak learning rate of Muon, scheduled like learning_rate
    muon_momentum: float = 0.95  # Muon's decay rate for the mean of gradients; shorter runs need less
    muon_split: bool = False  # orthogonalize queries, keys, values and gates separately, although stored as one matrix
    learning_rate: float = 6e-4  # peak learning rate
    max_iters: int = 600000  # total number of updates
    weight_decay: float = 1e-1  # on matrices and embeddings; with optimizer=muon, on the matrices in the blocks only
    beta1: float = 0.9  # AdamW's decay rate for the mean of gradients
    beta2: float = 0.95  # AdamW's decay rate for the mean of squared gradients
    grad_clip: float = 1.0  # maximum norm of the gradient; 0: no clipping
    max_bad_steps: int = 20  # stop after this many consecutive updates with a non-finite gradient
    # learning rate
    decay_lr: bool = True  # warm up and decay; if False, the rate is constant
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # wsd: warmup, stable, decay
    warmup_iters: int = 2000  # updates of linear warmup
    lr_decay_iters: int = 0  # the update at which the rate reaches min_lr; 0: max_iters
    min_lr: float = 6e-5  # usually learning_rate / 10
    cooldown_frac: float = 0.4  # wsd: the last fraction of lr_decay_iters, over which the rate falls
    # machine
    backend: Literal["auto", "nccl", "gloo", "mpi"] = "auto"  # communication between processes
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # precision of matrix products
    compile: Literal["auto", True, False] = "auto"  # torch.compile the model
    fsdp: bool = False  # shard the model over the processes (FSDP), for models larger than one device
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more compute


def main() -> int:
    # ---- settings
    s, given = read_settings(TrainSettings, sys.argv[1:])
    out_dir, resumed, writes = Path(s.out_dir), s.init_from == "resume", not (s.eval_only or s.dry_run)
    folders_before = checkpoint.step_folders(out_dir)

    # ---- machine
    dist = runtime.setup(s.device, s.dtype, s.compile, s.backend, s.fsdp)
    if s.activation_checkpointing:
        runtime.set_malloc(lean=True)
    signals: list[int] = []  # received requests to stop
    console = Console(dist.is_main, signals)
    log = console.log
    micro_batch = micro_batch_size(s, dist.world_size)
    if micro_batch < s.batch_size:
        dist.notes.append(f"micro-batches of {micro_batch} sequences, so that all processes get the same number")
    log("; ".join(dist.notes))

    # ---- data and model
    folder, saved = checkpoint.find(out_dir, dist=dist) if resumed else (None, {})
    data = load_data(s, saved, dist)
    token_bytes = data.tokenizer.token_bytes()
    model, weights, source, adapters = start_model(s, given, folder, saved, data, dist)
    tasks = read_tasks(s.eval_choices, s.eval_pairs, data.tokenizer, model.config.block_size, log)
    has_muon = s.optimizer == "muon"
    arithmetic, notes = autotune.choose(s.dtype, model.config, micro_batch, has_muon, dist, saved.get("arithmetic"))
    if notes:
        log("; ".join(notes))
    dist.dtype = arithmetic.torch_dtype
    arithmetic.apply(model)
    model = materialize(model, weights, dist)
    del weights  # otherwise their file would stay open
    objective = start_objective(s, data, model, saved, dist)
    log(describe(s, data, model, source))

    # ---- optimizer
    optimizers = make_optimizers(
        model,
        s.optimizer,
        learning_rate=s.learning_rate,
        muon_lr=s.muon_lr,
        weight_decay=s.weight_decay,
        betas=(s.beta1, s.beta2),
        device_type=dist.device.type,
        muon_dtype=arithmetic.torch_muon_dtype,
        muon_split=s.muon_split,
        muon_momentum=s.muon_momentum,
    )
    if folder:
        checkpoint.load_optimizers(folder, saved, model, optimizers)

    # ---- the state of the run, and the gradient accumulator
    state, notes = resume(s, saved, dist) if resumed else (RunState(), [])
    for note in notes:
        log(f"note: {note}")
    if (reason := state.ended(s)) and not s.eval_only:
        log(f"{out_dir} {reason}")
        return 0
    state.data = data.identity()
    n_sequences = s.gradient_accumulation_steps * s.batch_size  # per update
    accumulator = Accumulator(
        model, data, dist, micro_batch, n_sequences, s.block_size, s.seed, s.auto_batch, log, objective
    )
    if accumulator.scaler.is_enabled() and saved.get("scaler"):
        accumulator.scaler.load_state_dict(saved["scaler"])
    accumulator.prepare(dist.compile and not s.eval_only)
    if s.dry_run:
        log(dry_run(s, accumulator, optimizers, state, token_bytes, tasks))
        return 0

    # ---- output; nothing was written up to here
    metrics = lock = None  # the lock is held until this function returns
    if writes and dist.is_main:
        metrics, lock = start_writing(s, folders_before, adapters, state)  # noqa: RUF059
    skipped = SkippedUpdates(state, s.max_bad_steps, dist.device, log)
    contents = functools.partial(saved_state, s, state, data, adapters, arithmetic, accumulator, skipped)
    writer = checkpoint.Writer(out_dir, s.keep_checkpoints, dist.rank, dist.world_size)
    checkpoints = checkpoint.CheckpointManager(writer, model, optimizers, state, contents, resumed)
    if writes:
        stop_at_signals(signals)
        console.start_bar(state.step, s.max_iters)

    # ---- the loop
    first_step, stop = state.step, 0  # stop: a reason to stop here, or 0
    state.start_clock()
    progress = Progress(s, state, accumulator, console, metrics)
    model.train()
    while True:
        step = state.step
        # evaluate, save a checkpoint, and sample
        evaluates = state.is_evaluation_due(s, stop)
        if evaluates:
            size, n = accumulator.micro_batch, s.eval_iters * s.batch_size
            train = objective.evaluate(data, "train", size, s.block_size, n, token_bytes)
            val = objective.evaluate(data, "val", size, s.block_size, n, token_bytes)
            measured = measure_tasks(tasks, model, data.tokenizer, dist, size)
            best, failed = checkpoints.record_evaluation(val["loss"])
            log(evaluation_line(step, train, val, measured))
            if s.eval_only:
                return 0
            if step > 0 and (best or failed or s.always_save_checkpoint):
                checkpoints.save()
            if metrics is not None:
                metrics.write_evaluation(step, train, val, measured, state.tick())
        samples = s.sample_interval and step % s.sample_interval == 0 and step > first_step and stop != SIGNALED
        if samples and (dist.is_main or dist.fsdp):  # FSDP needs every rank in each forward pass
            log(f"--- sample at step {step}\n{sample(model, data.tokenizer, s.seed)}")
        if evaluates:
            progress.restart_clock()
        if stop or step == s.max_iters or state.is_out_of_patience(s.early_stopping):
            code = finish(s, state, checkpoints, console, stop, data.has_conversations)
            if metrics is not None:
                metrics.draw()
            return code

        # update; up to the log line, the host does not wait for a GPU, so that the GPU always has work queued
        agreed_stop = dist.start_max(lambda: state.reason_to_stop(s.max_minutes if dist.is_main else 0, signals))
        loss_sum, n_targets = accumulator.backward(step, state.position)
        lr = set_learning_rates(s, optimizers, step)
        grad_norm = accumulator.step(optimizers, s.grad_clip, skipped.counts)
        state.step, state.position = step + 1, state.position + n_sequences
        stop = agreed_stop()  # the same on all ranks
        if stop == SIGNALED and dist.world_size > 1:  # only now, as torchrun also signals when another rank has died
            log("stopping after this update, with a checkpoint")

        # log
        console.advance()
        if progress.is_due(step) or state.step >= skipped.read_at:
            skipped.read()
        if state.bad_steps >= s.max_bad_steps:
            writer.wait()
            text = f"{s.max_bad_steps} consecutive updates had a non-finite gradient, so the run stops at step {step}"
            return console.fail(f"{text}. Lower the learning rate, or check the data.", 1)
        if progress.is_due(step):
            progress.update(step, loss_sum, n_targets, lr, grad_norm)


def main_or_advice() -> int:
    """Run `main`, with advice when memory runs out. Errors common to all ranks are printed once."""
    try:
        return runtime.shutdown(main())
    except Exception as error:
        heartbeat.explain(error)
        heartbeat.fail()
        if isinstance(error, (MemoryError, RuntimeError)) and out_of_memory(error):  # torch raises RuntimeError
            error = UserError(
                "out of memory. Halve --batch_size and double --gradient_accumulation_steps for the same updates, or "
                "reduce --block_size or the model."
            )
        if isinstance(error, (UserError, OSError)) and not heartbeat.first_to_report(str(error)):
            return 2
        raise error


if __name__ == "__main__":
    run(main_or_advice)
