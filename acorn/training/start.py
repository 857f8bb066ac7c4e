"""Set up a run: its settings, its data and its model."""

import dataclasses
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from acorn import UserError, checkpoint, settings
from acorn.data.batches import samples_per_epoch
from acorn.data.mixture import Mixture, load_mixture
from acorn.data.tokenizer import Tokenizer, tokenizer_hash
from acorn.data.tokenizer_json import extends
from acorn.data.tokenizer_kinds import KINDS, from_dict
from acorn.distributed import heartbeat, sharding
from acorn.distributed.runtime import Runtime
from acorn.training import lora, rewards
from acorn.training.optim import learning_rate_at, scheduled_rate
from model import DROPOUTS, GPT, INITIALIZATION, GPTConfig, grown_rows

if TYPE_CHECKING:
    from train import TrainSettings

AUTOMATIC = ("n_kv_head", "head_dim", "n_hidden")  # shape settings that GPTConfig computes if they are 0
USERS = {"reference": ("dpo", "grpo"), "teacher": ("distill",), "reward": ("grpo",)}  # the objectives of a setting


def shape_settings(s: "TrainSettings") -> set[str]:
    """Return the names of the settings that are also fields of GPTConfig."""
    return {f.name for f in dataclasses.fields(s)} & {f.name for f in dataclasses.fields(GPTConfig)}


def check(s: "TrainSettings") -> None:
    """Raise UserError for a setting that is out of range, and for settings that exclude each other."""
    settings.check_bounds(vars(s))
    if s.early_stopping < 0:  # not among the bounds, because sample.py has another setting of this name
        raise UserError(f"early_stopping = {s.early_stopping} must not be negative")
    if s.gradient_accumulation_steps * s.batch_size * s.block_size > 2**32:
        raise UserError(
            "gradient_accumulation_steps x batch_size x block_size exceeds 2^32 tokens per update. Reduce one of them."
        )
    if s.lora_rank and s.lora_alpha <= 0:
        raise UserError(f"lora_alpha = {s.lora_alpha} must be above 0, or the adapters learn nothing")
    if s.lora_rank and s.init_from == "scratch":
        raise UserError("lora_rank needs weights to start from. Give --init_from, or leave lora_rank out.")
    if s.lora_rank and s.freeze:
        raise UserError("lora_rank already freezes all weights. Leave out either lora_rank or freeze.")
    check_objective(s)
    learning_rate_at(0, s.lr_schedule, s.learning_rate, s.min_lr, 0, 1)  # raises for a schedule without a branch
    if s.auto_batch and s.fsdp:
        raise UserError("auto_batch does not work with fsdp, whose passes need all ranks. Leave one of them out.")
    if not s.out_dir or "\0" in s.out_dir:
        raise UserError(f"out_dir = {s.out_dir!r:.100} is not a valid folder name. Use one such as out/mine.")


def check_objective(s: "TrainSettings") -> None:
    """Raise UserError for settings that the objective needs or excludes."""
    if s.objective in ("dpo", "grpo") and s.init_from == "scratch":
        raise UserError(f"objective={s.objective} needs weights to start from. Give --init_from.")
    for name, objectives in USERS.items():
        if getattr(s, name) and s.objective not in objectives:
            raise UserError(
                f"{name}={getattr(s, name)} has no effect with objective={s.objective}. Leave it out, or use "
                f"--objective={objectives[0]}."
            )
    if s.objective == "distill" and not s.teacher:
        raise UserError("objective=distill needs a teacher. Give a checkpoint with --teacher.")
    if s.objective == "grpo" and not s.reward:
        raise UserError(
            "objective=grpo needs a reward. Define `def reward(prompt, completion, answer)` in the config file, or use "
            f"--reward={' or '.join(rewards.SHIPPED)}."
        )
    if s.objective == "grpo" and (s.group_size < 2 or s.gradient_accumulation_steps * s.batch_size % s.group_size):
        raise UserError(
            f"group_size={s.group_size} must be at least 2, and divide the gradient_accumulation_steps x batch_size = "
            f"{s.gradient_accumulation_steps} x {s.batch_size} completions of an update."
        )
    if s.objective == "grpo" and not 1 <= s.max_new_tokens < s.block_size:
        raise UserError(f"max_new_tokens={s.max_new_tokens} must be at least 1 and below block_size={s.block_size}.")
    if s.reference and s.objective == "grpo" and not s.kl_beta:
        raise UserError("reference has no effect with kl_beta=0. Leave it out, or use --kl_beta=0.04.")
    if s.reference and s.lora_rank:
        raise UserError("with lora_rank, the reference is the model without its adapters. Leave out --reference.")
    if s.reference and s.preference_loss == "simpo":
        raise UserError("preference_loss=simpo uses no reference. Leave out --reference.")
    if s.label_smoothing and s.preference_loss != "dpo":
        raise UserError(f"label_smoothing applies to preference_loss=dpo, not {s.preference_loss}. Leave it out.")


def has_reference(s: "TrainSettings") -> bool:
    """Return whether the loss compares with a reference."""
    return (s.objective == "dpo" and s.preference_loss != "simpo") or (s.objective == "grpo" and s.kl_beta > 0)


def drop_unused(s: "TrainSettings", given: dict) -> None:
    """Reset the settings in `s` that only the loss before a resume used, except for those that the user has `given`."""
    unused = [name for name, objectives in USERS.items() if s.objective not in objectives]
    unused += [] if has_reference(s) else ["reference"]
    unused += ["label_smoothing"] if s.preference_loss != "dpo" else []
    for name in unused:
        if name not in given:
            setattr(s, name, getattr(type(s), name))


def read_settings(kind: type["TrainSettings"], argv: list[str]) -> tuple["TrainSettings", dict]:
    """Return the settings, and those among them that the user gave.

    Defaults are overridden by the settings of a resumed run, then by config files, then by the command line. Raises
    UserError for invalid settings, and for an out_dir that already contains a run.
    """
    given = settings.parse(kind, argv)
    s = settings.build(kind, given)
    out_dir, launch = Path(s.out_dir), heartbeat.launch_id()
    if launch and checkpoint.launched_by(out_dir, launch):  # torchrun started this run again after a failure
        given |= {"init_from": "resume", "overwrite": False}
        s = settings.build(kind, given)
    if s.init_from == "resume":
        before = settings.checked(kind, checkpoint.last_settings(out_dir))
        not_inherited = {"overwrite": False, "dry_run": False, "eval_only": False}
        s = settings.build(kind, before, not_inherited, given)
        if (out_dir / "state.json").exists():
            raise UserError(f"{out_dir} is a single checkpoint of a run. Resume with --out_dir={out_dir.parent}.")
        drop_unused(s, given)
        if s.reward.endswith(".py") and "reward" not in given:  # a checkpoint must not name code that runs
            raise UserError(
                f"the reward of this run is a function in {s.reward}. To run its code, resume with "
                f"--reward={shlex.quote(s.reward)} as well."
            )
        if has_reference(s) and not s.reference and not s.lora_rank:
            raise UserError("the loss now needs a reference, which this run did not have. Give --reference=CHECKPOINT.")
    check(s)
    if s.decay_lr and s.min_lr > s.learning_rate:
        if "min_lr" in given:
            raise UserError(
                f"min_lr = {s.min_lr} is above learning_rate = {s.learning_rate}. "
                f"Use --min_lr={s.learning_rate / 10:g}."
            )
        s.min_lr = s.learning_rate / 10
    starts = s.init_from != "resume" and not (s.eval_only or s.dry_run)
    file = next((place for place in (out_dir, *out_dir.parents) if place.exists() and not place.is_dir()), None)
    if starts and file is not None:
        raise UserError(
            f"out_dir={out_dir} cannot be a folder, because {file} is a file. Give another --out_dir or remove it."
        )
    if starts and not s.overwrite and checkpoint.holds_run(out_dir):
        raise UserError(
            f"{out_dir} already contains a run. Continue it with --init_from=resume, replace it with "
            "--overwrite=True, or give another --out_dir."
        )
    if starts and (pinned := [folder for folder in checkpoint.step_folders(out_dir) if checkpoint.is_pinned(folder)]):
        raise UserError(
            f"overwrite would remove {pinned[0]}, which another run needs (see its file {checkpoint.PINNED}). "
            "Give another --out_dir, or delete that file."
        )
    return s, given


def load_data(s: "TrainSettings", state: dict, dist: Runtime) -> Mixture:
    """Load the data of a run.

    Raises UserError if it has no validation split, differs between machines, or is not the data that the resumed run
    with this `state` was trained on.
    """
    data = load_mixture(s.dataset, dist.is_first_on_machine, s.document_mask)
    if len(set(map(tuple, dist.gather([int(data.identity()[:12], 16)])))) > 1:  # 48 bits, exact in float64
        raise UserError(f"{data.path} differs between machines. Copy it from one machine to the others.")
    for dataset in data.datasets:
        if dataset.val is None:
            raise UserError(
                f"{dataset.path} has no validation shards. Add a val_000000.bin next to its training shards."
            )
    if s.init_from == "resume" and state.get("data") not in (None, data.identity()):
        raise UserError(
            f"dataset={s.dataset} is not the data that {s.out_dir} was trained on, so the run cannot resume at its "
            f"position. Start from its weights: --init_from={s.out_dir} with a new --out_dir."
        )
    return data


def new_model(s: "TrainSettings", n_vocab: int, meta: bool) -> GPT:
    """Return a new, initialized model for `n_vocab` token ids; with `meta`, on the meta device without memory."""
    # padding a large vocabulary to a multiple of 64 makes the head's matrix product faster
    vocab_size = n_vocab if n_vocab < 1024 else 64 * math.ceil(n_vocab / 64)
    try:
        config = GPTConfig(vocab_size=vocab_size, **{name: getattr(s, name) for name in shape_settings(s)})
    except ValueError as error:
        raise UserError(str(error)) from error
    with torch.device("meta" if meta else "cpu"):
        return GPT(config)


def load_initial(
    s: "TrainSettings", given: dict, folder: Path | None, state: dict, data: Mixture, dist: Runtime
) -> tuple[GPT, dict, str, dict | None]:
    """Open the checkpoint or weights from which a run starts.

    Returns the model on the meta device, its parameters (lazy, not yet read), a description of the source, and the
    description of its LoRA adapters, or None. Raises UserError if they do not fit the settings or the data: see
    `extend_vocabulary` and `adopt_shape`.
    """
    adapters = None
    tokenizer: Tokenizer | None  # None if the source does not say
    if s.init_from == "resume":
        assert folder is not None, "a run that resumes has a checkpoint"
        model, values = checkpoint.build_model(folder, state, dist)
        tokenizer, source, adapters = from_dict(state["tokenizer"]), str(folder), state.get("lora")
        for name in ("lora_rank", "lora_alpha", "lora_targets"):
            if getattr(s, name) != state["settings"].get(name, getattr(type(s), name)):
                raise UserError(
                    f"{name} = {getattr(s, name)!r} differs from the run's setting. Leave it out to resume."
                )
    else:
        model, values, tokenizer, source, base = checkpoint.open_model(s.init_from, plain=s.lora_rank > 0, dist=dist)
        if s.lora_rank:
            adapters = add_new_adapters(s, model, values, source, base, dist)
    if tokenizer is not None and tokenizer_hash(tokenizer) != tokenizer_hash(data.tokenizer):
        n_new = extend_vocabulary(s, model, values, source, tokenizer, data)
        source += f", with {n_new} new tokens"
    if data.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{data.path} has {data.vocab_size} token ids, but {source} has only {model.config.vocab_size}. Prepare "
            "the data with the model's tokenizer. If you did, it has tokens that the model lacks: remove these tokens."
        )
    adopt_shape(s, given, model, source)
    return model, values, source, adapters


def add_new_adapters(s: "TrainSettings", model: GPT, values: dict, source: str, base: str, dist: Runtime) -> dict:
    """Add untrained LoRA adapters to a model and to its parameters `values`. Returns their description."""
    if s.lora_rank > model.config.n_embd:
        raise UserError(
            f"lora_rank = {s.lora_rank} exceeds the {model.config.n_embd} channels of {source}. 8 or 16 is usual."
        )
    if s.overwrite and Path(base).resolve().parent == Path(s.out_dir).resolve():
        raise UserError(f"overwrite would remove {base}, the base of the adapters. Give another --out_dir.")
    sha256 = lora.fingerprint(model, values) if dist.is_main else None  # reads everything; only rank 0 needs it
    lora.add_adapters(model, lora.choose_targets(model, s.lora_targets), s.lora_rank, s.lora_alpha)
    values.update(lora.initial_adapters(model, s.seed))
    return dict(rank=s.lora_rank, alpha=s.lora_alpha, base=base, sha256=sha256)


def extend_vocabulary(
    s: "TrainSettings", model: GPT, values: dict, source: str, tokenizer: Tokenizer, data: Mixture
) -> int:
    """Add to a model the control tokens that the dataset adds to the model's `tokenizer`. Returns their number.

    Raises UserError if the tokenizers differ in other ways, or if the embeddings of the new tokens are frozen.
    """
    if s.init_from == "resume" or not extends(data.tokenizer, tokenizer):
        name = tokenizer.kind if tokenizer.kind in KINDS and tokenizer.kind != "char" else s.init_from
        corpus = "preferences" if data.has_pairs else "chat" if data.has_conversations else "text"
        raise UserError(
            f"{data.path} uses another tokenizer ({data.tokenizer.kind}, {data.tokenizer.n_vocab} tokens) than "
            f"{source} ({tokenizer.kind}, {tokenizer.n_vocab} tokens). Prepare the data with the model's tokenizer: "
            f"python prepare {corpus} FILES --tokenizer {shlex.quote(name)}"
        )
    n_new = data.vocab_size - tokenizer.n_vocab
    names = [name for name, _ in model.named_parameters()]
    tables = {"transformer.wte.weight", "lm_head.weight"} & set(names)
    frozen = lora.matching("freeze", s.freeze, names) if s.freeze else []
    if s.lora_rank or tables & set(frozen):
        setting = "lora_rank" if s.lora_rank else "this freeze"
        raise UserError(
            f"{data.path} has {n_new} tokens that are new to {source}, but with {setting} their embeddings would "
            f"not be trained. Leave {setting} out, or first train a base without it for --init_from."
        )
    n_before = min(tokenizer.n_vocab, model.config.vocab_size)
    model.grow_vocab(n_before, data.vocab_size)
    for name in tables:
        values[name] = grown_rows(values[name][...].float(), n_before, data.vocab_size)
    return n_new


def adopt_shape(s: "TrainSettings", given: dict, model: GPT, source: str) -> None:
    """Set the shape settings in `s` to those of the model.

    A different value that the user gave raises UserError. Exceptions: dropouts may differ, settings of the
    initialization are ignored, and block_size may be smaller.
    """
    differing = []  # given values that the model does not have
    for name in sorted(shape_settings(s) - set(DROPOUTS)):
        actual, value = getattr(model.config, name), given.get(name)
        matches = value in (None, actual) or name in INITIALIZATION or (name in AUTOMATIC and value == 0)
        if name == "block_size" and value is not None and value < actual:
            model.crop_block_size(value)
        elif not matches:
            differing.append(name)
        setattr(s, name, getattr(model.config, name))
    if differing:
        wanted = ", ".join(f"{name} = {given[name]}" for name in differing)
        fix = " ".join(f"--{name}={getattr(s, name)}" for name in differing)
        raise UserError(f"the shape of {source} differs from {wanted}. Use {fix}, or train from scratch.")
    for name in DROPOUTS:
        setattr(model.config, name, getattr(s, name))


def describe(s: "TrainSettings", data: Mixture, model: GPT, source: str) -> str:
    """Describe the data, the model and the updates of a run for the console."""
    lines, epochs = [], []
    n_sequences = s.max_iters * s.gradient_accumulation_steps * s.batch_size
    for dataset, share in zip(data.datasets, data.shares, strict=True):
        assert dataset.val is not None, "load_data checks this"
        name = f"{float(share):.1%} {dataset.path}" if share < 1 else dataset.path
        lines += [f"data: {name}, {len(dataset.train):,} training tokens and {len(dataset.val):,} validation tokens"]
        lines += [f"note: {note}" for note in dataset.notes(s.block_size)]
        if dataset.train.conversations is None and s.block_size >= len(dataset.train):
            lines += [f"note: block_size={s.block_size} exceeds {dataset.path}, so part of each sequence is masked"]
        epochs += [f"{n_sequences * float(share) / samples_per_epoch(dataset.train, s.block_size):.3g}"]
    lines += [f"model: {model.num_params():,} parameters, vocabulary of {model.config.vocab_size:,}, from {source}"]
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if n_trained < model.num_params():
        lines += [f"trained: {n_trained:,} parameters ({'adapters' if s.lora_rank else 'the others are frozen'})"]
    if not s.eval_only and s.objective == "grpo":
        n_prompts = sum(len(dataset.train.conversations or ()) for dataset in data.datasets)
        n_epochs = n_sequences // s.group_size / n_prompts
        update = f"{s.gradient_accumulation_steps * s.batch_size:,} completions in groups of {s.group_size}"
        lines += [f"run: {s.max_iters:,} updates of {update}, {n_epochs:.3g} epochs, into {s.out_dir}"]
    elif not s.eval_only:
        update = f"{s.gradient_accumulation_steps * s.batch_size * s.block_size:,} tokens"
        lines += [f"run: {s.max_iters:,} updates of {update}, {' and '.join(epochs)} epochs, into {s.out_dir}"]
    if not s.eval_only and s.decay_lr and s.warmup_iters > s.max_iters > 0:
        lines += [
            f"note: the learning rate rises only to {scheduled_rate(s, s.max_iters - 1):.2e}, because "
            f"warmup_iters={s.warmup_iters} exceeds max_iters={s.max_iters}. Use --warmup_iters={s.max_iters // 10}."
        ]
    return "\n".join(lines)


def micro_batch_size(s: "TrainSettings", world_size: int) -> int:
    """Return the number of sequences per micro-batch and rank: at most batch_size, so that all ranks get equal work.

    Raises UserError if the ranks cannot share an update's sequences evenly.
    """
    n_sequences = s.gradient_accumulation_steps * s.batch_size
    if n_sequences % world_size:
        unit = world_size // math.gcd(world_size, s.gradient_accumulation_steps)
        nearest = unit * max(1, round(s.batch_size / unit))
        raise UserError(
            f"an update has gradient_accumulation_steps x batch_size = {s.gradient_accumulation_steps} x "
            f"{s.batch_size} sequences, which {world_size} processes cannot share evenly. Use --batch_size={nearest}."
        )
    return max(n for n in range(1, s.batch_size + 1) if n_sequences // world_size % n == 0)


def start_model(
    s: "TrainSettings", given: dict, folder: Path | None, saved: dict, data: Mixture, dist: Runtime
) -> tuple[GPT, dict | None, str, dict | None]:
    """Create or open the model of a run. Returns the same as `load_initial`.

    From scratch, the parameters are None: the model is already initialized, or, with FSDP, is on the meta device.
    """
    torch.manual_seed(s.seed)
    if s.init_from == "scratch":
        model, values, source, adapters = new_model(s, data.vocab_size, meta=dist.fsdp), None, "scratch", None
        for name in AUTOMATIC:
            setattr(s, name, getattr(model.config, name))
    else:
        model, values, source, adapters = load_initial(s, given, folder, saved, data, dist)
    if s.freeze:
        lora.freeze(model, s.freeze)
    model.activation_checkpointing = s.activation_checkpointing
    return model, values, source, adapters


def materialize(model: GPT, values: dict | None, dist: Runtime) -> GPT:
    """Load the parameters into memory, and return the model on its device; with FSDP, only this rank's rows."""
    if dist.fsdp:
        return sharding.shard(model, dist, values)
    return (checkpoint.fill(model, values) if values else model).to(dist.device)
