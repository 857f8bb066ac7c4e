"""Open a model from wherever it lies: a run, a nanoGPT checkpoint, a Hugging Face checkpoint."""

import contextlib
import re
import sys
import typing
from pathlib import Path

import torch

from acorn import UserError, files
from acorn.checkpoint import huggingface
from acorn.checkpoint.layout import FORMAT, file_names, find, step_folders, weights_kind
from acorn.checkpoint.nanogpt import open_nanogpt
from acorn.checkpoint.tensors import check_tensors, empty_model, fill, fitting_model, open_tensors
from acorn.data import tokenizer as tokenizers
from acorn.data.shards import load_dataset
from acorn.distributed.runtime import ALONE, Runtime
from acorn.training import lora, optim
from model import DROPOUTS, GPT

PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # names on the Hugging Face hub
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # others there: owner/name


class Opened(typing.NamedTuple):
    """A checkpoint of which no weight is read yet."""

    model: GPT  # on the meta device, where it takes no memory
    values: dict  # its parameters by name, of which rows can be asked for: tensors, or Stored, or lora.Merged
    tokenizer: tokenizers.Tokenizer | None  # None where it is not known
    source: str  # a word on it, for a person
    name: str  # by which adapters find it again from anywhere


def build_model(folder: Path, state: dict, r: Runtime = ALONE, whole_context: bool = False) -> tuple[GPT, dict]:
    """The model of a checkpoint, on the meta device, and its parameters, unread, for `fill` or `sharding.shard`. That
    of a LoRA run has its adapters beside the weights of the base, and with `whole_context` also the base's block size;
    a base that is not the one they were trained on is a UserError."""
    kind = weights_kind(state)
    path = folder / file_names(kind, state.get("shards", 1))[0]
    tensors = open_tensors(folder, state, kind)
    if not state.get("lora"):
        return fitting_model(state["config"], tensors, str(path)), tensors

    adapters, moved = state["lora"], folder.parent / "base"
    try:
        name = files.read_bytes(moved, 10_000).decode().strip() if moved.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{moved} {reason}; it should hold one path, that of the base") from error
    name = name or adapters["base"]
    advice = f"write where it lies into the file {moved}"
    try:
        base = open_model(name, plain=True, r=r)  # not adapters, which could be their own base
    except UserError as error:
        raise UserError(f"{folder} holds adapters for {name}, which cannot be loaded ({error}); {advice}") from error
    if not r.agree(not r.is_main or lora.fingerprint(base.model, base.values) == adapters["sha256"]):
        source = base.source
        raise UserError(f"{folder} holds adapters for {adapters['base']}, but not for {source} as it is now; {advice}")
    model, config = base.model, empty_model(state["config"], str(path)).config
    if whole_context:
        config.block_size = model.config.block_size
    elif config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
    for dropout in DROPOUTS:
        setattr(model.config, dropout, getattr(config, dropout))
    if config != model.config:
        raise UserError(f"{path} is not for a model of the shape of {base.source}")
    lora.fit_adapters(model, tensors, adapters["rank"], adapters["alpha"], str(path))
    return model, base.values | tensors


def load_optimizers(folder: Path, state: dict, model: GPT, optimizers: list[torch.optim.Optimizer]) -> None:
    """Give the optimizers of `model` what they remembered when the checkpoint was saved. Raises UserError where that
    was of another model or other optimizers."""
    if state["format"] == FORMAT:
        saved = open_tensors(folder, state, "optimizer")
    else:
        try:
            saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)["optimizers"]
        except Exception as error:  # its hash is right, so a stranger made it: a pickle of something else
            raise UserError(f"{folder / 'optimizer.pt'} is not an optimizer's state; nothing in it was run") from error
        saved = optim.name_moments(model, optimizers, saved)
        check_tensors(saved, str(folder / "optimizer.pt"))
    optim.load_moments(model, optimizers, saved)


def is_on_hub(source: str) -> bool:
    """Whether `source` is to be looked for on the Hugging Face hub: GPT-2, or owner/name where no such folder is."""
    path = Path(source)
    is_name = HUB_NAME.fullmatch(source) and not path.parent.exists()  # else a path with a slip of the pen
    return not path.exists() and (source in PUBLISHED or bool(is_name))


def load_model(
    source: str, which: str = "best", whole_context: bool = False
) -> tuple[GPT, tokenizers.Tokenizer | None, str]:
    """The model, on the CPU in float32, its tokenizer and a word on what was loaded, of what `open_model` opens."""
    opened = open_model(source, which, whole_context=whole_context)
    return fill(opened.model, opened.values), opened.tokenizer, opened.source


def open_model(
    source: str, which: str = "best", plain: bool = False, r: Runtime = ALONE, whole_context: bool = False
) -> Opened:
    """Open an acorn out_dir or step folder, a nanoGPT `ckpt.pt` or a folder with one, or a Hugging Face checkpoint by
    its name or folder. A run that is made of adapters is its base with them merged in, with `whole_context` also where
    the run's sequences were shorter than the base's; where the model has to be `plain`, it is a UserError."""
    path = Path(source)
    if (path / "config.json").exists() or is_on_hub(source):
        name = str(path.absolute()) if path.exists() else source
        return Opened(*huggingface.open_model(source), f"the published weights {source}", name)
    if path.is_dir() and not step_folders(path) and (path / "ckpt.pt").exists():
        path = path / "ckpt.pt"
    if path.is_file() and path.suffix in (".safetensors", ".bin"):
        raise UserError(f"{source} is one file of a checkpoint; give the folder that holds it, {path.parent}")
    if path.is_file():
        model, tensors, checkpoint = open_nanogpt(path)
        config, tokenizer = checkpoint.get("config"), None
        dataset = config.get("dataset") if isinstance(config, dict) else None
        with contextlib.suppress(UserError):  # its vocabulary lies beside the data that it was trained on
            tokenizer = load_dataset(dataset).tokenizer if isinstance(dataset, str) else None
        if tokenizer is None or tokenizer.n_vocab > model.config.vocab_size:
            is_gpt2 = model.config.vocab_size in (50257, 50304)
            tokenizer = tokenizers.get_tokenizer("gpt2") if is_gpt2 else None
        if tokenizer is None:
            print(
                f"note: the vocabulary of {path} lies with its dataset {dataset!r}, which is not here; "
                "run this where data/ holds it, or prepare it again",
                file=sys.stderr,
            )
        word = f"{path}, a nanoGPT checkpoint of step {checkpoint.get('iter_num')}"
        return Opened(model, tensors, tokenizer, word, str(path.absolute()))
    folder, state = find(path, which, r)
    adapters = state.get("lora")
    if adapters and plain:
        raise UserError(
            f"{source} is made of adapters, and adapters need a base that is whole: first make one of it by "
            f"python -m acorn.hub export {source} FOLDER, then give --init_from=FOLDER"
        )
    model, values = build_model(folder, state, r, whole_context)
    if adapters:
        model = empty_model({**state["config"], "block_size": model.config.block_size}, str(folder))
        values = lora.merged(values, adapters["alpha"] / adapters["rank"])
    loss = f", val loss {state['val_loss']:.4f}" if state.get("val_loss") is not None else ""
    word = f"{folder}, step {state['step']}{loss}"
    return Opened(model, values, tokenizers.from_dict(state["tokenizer"]), word, str(folder.absolute()))
