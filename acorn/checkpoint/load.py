"""Open a model: from a run, a nanoGPT checkpoint or a Hugging Face checkpoint."""

import contextlib
import re
import sys
import typing
from pathlib import Path

from acorn import UserError, files
from acorn.checkpoint import huggingface
from acorn.checkpoint.layout import file_names, find, step_folders, weights_kind
from acorn.checkpoint.nanogpt import open_nanogpt
from acorn.checkpoint.tensors import empty_model, fill, fitting_model, merge_adapters, open_tensors
from acorn.data.shards import load_dataset
from acorn.data.tokenizer import Tokenizer
from acorn.data.tokenizer_kinds import from_dict, get_tokenizer
from acorn.distributed.runtime import ONE_RANK, Runtime
from acorn.training import lora
from model import DROPOUTS, GPT

HUB_GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")  # names on the Hugging Face hub
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # other names there: owner/name


class LazyCheckpoint(typing.NamedTuple):
    """An opened checkpoint, whose weights are not read yet."""

    model: GPT  # on the meta device, where it takes no memory
    values: dict  # parameter name -> Tensor or LazyTensor; indexing it with rows reads them
    tokenizer: Tokenizer | None  # None if it is not known
    source: str  # a description for messages
    name: str  # an absolute path or hub name, by which adapters refer to their base


def build_model(folder: Path, state: dict, dist: Runtime = ONE_RANK, whole_context: bool = False) -> tuple[GPT, dict]:
    """Return the model of a checkpoint on the meta device and its parameters, not read yet, for `fill` or
    `sharding.shard`.

    The model of a LoRA run has its base's weights and the adapters, and with `whole_context` the base's block size.
    Raises UserError if the base is not the one that the adapters were trained on."""
    kind = weights_kind(state)
    path = folder / file_names(kind, state.get("shards", 1))[0]
    tensors = open_tensors(folder, state, kind)
    if not state.get("lora"):
        return fitting_model(state["config"], tensors, str(path)), tensors

    adapters, base_file = state["lora"], folder.parent / "base"
    try:
        name = files.read_bytes(base_file, 10_000).decode().strip() if base_file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{base_file} {reason}. Write only the path of the adapters' base into it.") from error
    name = name or adapters["base"]
    advice = f"If the base was moved, write its path into the file {base_file}."
    try:
        base = open_model(name, plain=True, dist=dist)  # plain: adapters could be their own base
    except UserError as error:
        raise UserError(f"{folder} holds adapters for {name}, which cannot be loaded ({error}). {advice}") from error
    if not dist.agree(not dist.is_main or lora.fingerprint(base.model, base.values) == adapters["sha256"]):
        raise UserError(
            f"{folder} holds adapters for {adapters['base']}, but the weights of {base.source} differ from those they "
            f"were trained on. {advice}"
        )
    model, config = base.model, empty_model(state["config"], str(path)).config
    if whole_context:
        config.block_size = model.config.block_size
    elif config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
    for dropout in DROPOUTS:
        setattr(model.config, dropout, getattr(config, dropout))
    if config != model.config:
        raise UserError(f"{path} does not fit the shape of its base, {base.source}. {advice}")
    lora.fit_adapters(model, tensors, adapters["rank"], adapters["alpha"], str(path))
    return model, base.values | tensors


def is_on_hub(source: str) -> bool:
    """Whether `source` is a model on the Hugging Face hub: GPT-2, or owner/name if no such folder exists."""
    path = Path(source)
    is_name = HUB_NAME.fullmatch(source) and not path.parent.exists()  # if the parent exists, it is a mistyped path
    return not path.exists() and (source in HUB_GPT2_NAMES or bool(is_name))


def load_model(source: str, choice: str = "best", whole_context: bool = False) -> tuple[GPT, Tokenizer | None, str]:
    """Load what `open_model` opens. Returns the model on the CPU in float32, its tokenizer, and a description."""
    opened = open_model(source, choice, whole_context=whole_context)
    return fill(opened.model, opened.values), opened.tokenizer, opened.source


def load_with_tokenizer(source: str, choice: str = "best") -> tuple[GPT, Tokenizer, str]:
    """Return the same as `load_model`. Raises UserError if the tokenizer cannot be loaded."""
    model, tokenizer, description = load_model(source, choice)
    if tokenizer is None:
        raise UserError(
            f"{description} has no tokenizer that acorn can load. Use a checkpoint that includes its tokenizer."
        )
    return model, tokenizer, description


def open_model(
    source: str, choice: str = "best", plain: bool = False, dist: Runtime = ONE_RANK, whole_context: bool = False
) -> LazyCheckpoint:
    """Open an acorn out_dir or step folder, a nanoGPT `ckpt.pt` or a folder with one, or a Hugging Face checkpoint by
    its name or folder.

    For a LoRA run, the result is its base with the adapters merged. `whole_context` keeps the base's block size even if
    the run's was shorter. With `plain`, a LoRA run raises UserError."""
    path = Path(source)
    is_published = (path / "config.json").exists() or is_on_hub(source)
    if choice not in ("best", "latest") and (is_published or path.is_file() or (path / "state.json").exists()):
        raise UserError(f"{source} is a single checkpoint, so {choice} cannot be chosen in it. Leave out --checkpoint.")
    if is_published:
        name = str(path.absolute()) if path.exists() else source
        return LazyCheckpoint(*huggingface.open_model(source), f"the published weights {source}", name)
    if path.is_dir() and not step_folders(path) and (path / "ckpt.pt").exists():
        path = path / "ckpt.pt"
    if path.is_file() and path.suffix in (".safetensors", ".bin", ".json"):
        raise UserError(f"{source} is one file of a checkpoint. Give its folder: {path.parent}")
    if path.is_file() and path.suffix == ".gguf":
        raise UserError(
            f"{source} is a GGUF file, which acorn writes but does not read. Use the model it was made from."
        )
    if path.is_file():
        model, tensors, checkpoint = open_nanogpt(path)
        config, tokenizer = checkpoint.get("config"), None
        dataset = config.get("dataset") if isinstance(config, dict) else None
        if isinstance(dataset, str):  # nanoGPT keeps the vocabulary in the dataset's folder, next to that of the run
            for place in (dataset, str(path.absolute().parent.parent / "data" / dataset)):
                with contextlib.suppress(UserError):
                    tokenizer = tokenizer or load_dataset(place).tokenizer
        if tokenizer is None or tokenizer.n_vocab > model.config.vocab_size:
            is_gpt2 = model.config.vocab_size in (50257, 50304)
            tokenizer = get_tokenizer("gpt2") if is_gpt2 else None
        if tokenizer is None:
            print(
                f"note: the vocabulary of {path} is in its dataset {dataset!r}, which was not found. Run this where "
                "data/ has it, or prepare it again.",
                file=sys.stderr,
            )
        description = f"{path}, a nanoGPT checkpoint of step {checkpoint.get('iter_num')}"
        return LazyCheckpoint(model, tensors, tokenizer, description, str(path.absolute()))
    folder, state = find(path, choice, dist)
    adapters = state.get("lora")
    if adapters and plain:
        raise UserError(
            f"{source} is a LoRA run, which cannot be the base of other adapters. First merge it with "
            f"`python -m acorn.hub export {source} FOLDER`, then use --init_from=FOLDER."
        )
    model, values = build_model(folder, state, dist, whole_context)
    if adapters:
        model = empty_model({**state["config"], "block_size": model.config.block_size}, str(folder))
        values = merge_adapters(values, adapters["alpha"] / adapters["rank"])
    loss = f", val loss {state['val_loss']:.4f}" if state.get("val_loss") is not None else ""
    description = f"{folder}, step {state['step']}{loss}"
    return LazyCheckpoint(model, values, from_dict(state["tokenizer"]), description, str(folder.absolute()))
