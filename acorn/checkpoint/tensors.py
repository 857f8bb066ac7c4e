"""Tensors of a checkpoint: read when they are needed, and checked; and the model that they belong to."""

import typing
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from acorn import UserError, settings
from acorn.checkpoint.layout import file_names
from acorn.distributed import sharding
from model import GPT, GPTConfig


def copy_to_host(tensors: dict[str, Tensor], copies: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors, or this rank's rows of sharded ones, into the buffers `copies`; missing buffers are added."""
    for name, tensor in tensors.items():
        local = sharding.local(tensor.detach())
        if name not in copies:
            copies[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        copies[name].copy_(local, non_blocking=local.is_cuda)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return {name: copies[name] for name in tensors}


class LazyTensor:
    """A tensor that is read on demand: `tensor[3:7]` reads rows, and `tensor[...]` reads all.

    `read(rows)` returns the rows of a slice. It gets `...` only if the shape is ()."""

    def __init__(self, shape: Sequence[int], read: Callable[..., Tensor]):
        self.shape, self.read = torch.Size(shape), read

    def __getitem__(self, rows) -> Tensor:
        return self.read(slice(None) if rows is ... and self.shape else rows)


def lazy_slice(piece) -> LazyTensor:
    """Return the tensor of `piece`, a slice object of safetensors."""
    return LazyTensor(piece.get_shape(), lambda rows: piece[rows])


def lazy_transpose(piece) -> LazyTensor:
    """Return the transposed matrix of `piece`, a slice object of safetensors."""
    return LazyTensor(piece.get_shape()[::-1], lambda rows: piece[:, rows].t())


def lazy_cat(pieces: list[LazyTensor], name: str, source: str) -> LazyTensor:
    """Concatenate pieces along dimension 0. Reading non-finite values raises UserError, which contains `name`."""
    first, lengths = pieces[0].shape, [piece.shape[0] for piece in pieces if piece.shape]

    def read(rows) -> Tensor:
        if rows is ...:
            tensor = pieces[0][...]
        else:
            start, stop, _ = rows.indices(sum(lengths))
            chunks = []
            for piece, n in zip(pieces, lengths, strict=True):
                if max(start, 0) < min(stop, n):
                    chunks.append(piece[max(start, 0) : min(stop, n)])
                start, stop = start - n, stop - n  # relative to the next piece
            tensor = chunks[0] if len(chunks) == 1 else torch.cat(chunks or [pieces[0][0:0]])
        check_tensors({name: tensor}, source)
        return tensor

    return LazyTensor((sum(lengths), *first[1:]) if first else (), read)


def merge_adapters(values: dict, scale: float) -> dict:
    """Return the parameters of the plain model that is equivalent to a model with LoRA adapters and the parameters
    `values`. A weight is merged with its adapter when it is read."""

    def merged(weight, a, b) -> LazyTensor:
        return LazyTensor(weight.shape, lambda rows: weight[rows].float() + scale * b[rows] @ a[...])

    result = {}
    for name, value in values.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A" in values:
            result[name] = merged(value, values[f"{layer}.lora_A"], values[f"{layer}.lora_B"])
        elif ".lora_" not in name:
            result[name] = value
    return result


def open_tensors(folder: Path, state: dict, kind: str) -> dict[str, LazyTensor]:
    """Open the tensors of a kind in a checkpoint, by name. Raises UserError if their files are inconsistent."""
    pieces = defaultdict(list)
    try:
        for name in file_names(kind, state.get("shards", 1)):
            file = safe_open(folder / name, "pt", backend="pread")  # a memory map would count as resident memory
            for key in file.keys():  # noqa: SIM118 (not a dict)
                pieces[key].append(lazy_slice(file.get_slice(key)))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / name} cannot be read: {error}") from error
    for key in pieces:
        if len({(len(piece.shape), *piece.shape[1:]) for piece in pieces[key]}) > 1:
            raise UserError(f"the files of {folder} are inconsistent: {key} differs in shape. Use another checkpoint.")
    return {key: lazy_cat(pieces[key], key, str(folder)) for key in pieces}


def empty_model(shape: dict, source: str) -> GPT:
    """Return the model with the GPTConfig fields `shape` on the meta device, where it takes no memory."""
    types = typing.get_type_hints(GPTConfig)
    try:
        config = GPTConfig(**{name: settings.convert(value, types[name], name) for name, value in shape.items()})
        with torch.device("meta"):
            return GPT(config)
    except (TypeError, ValueError, KeyError, OverflowError, RuntimeError, UserError) as error:
        raise UserError(f"{source} is not a model that this version supports ({error})") from error


def fill(model: GPT, values: dict) -> GPT:
    """Load parameters into a model on the meta device, on the CPU in float32, and return it. They are read one by one,
    so memory holds them once. If a value has more rows than the parameter, the first rows are used."""
    tensors = {name: values[name][: len(p)].float().contiguous() for name, p in model.named_parameters()}
    model.load_state_dict(tensors, strict=False, assign=True)
    if model.config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def fitting_model(shape: dict, tensors: dict, source: str) -> GPT:
    """Return the model with the GPTConfig fields `shape` on the meta device. Raises UserError unless the names and
    shapes of `tensors` match its parameters."""
    model = empty_model(shape, source)
    parameters = dict(model.named_parameters())
    if model.config.tie_weights:
        tensors = {name: t for name, t in tensors.items() if name != "lm_head.weight"}
    missing, extra = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or extra:
        mismatch = f"it lacks {missing[0]}" if missing else f"it has {extra[0]}, which the model does not have"
        raise UserError(f"{source} does not match the model shape in its checkpoint: {mismatch}")
    for name, p in parameters.items():
        if p.shape != tensors[name].shape:
            shapes = f"{list(tensors[name].shape)}, not {list(p.shape)}"
            raise UserError(f"{source} does not match the model shape in its checkpoint: its {name} has shape {shapes}")
    return model


def is_valid(t: Tensor) -> bool:
    """Whether a tensor is dense, floating-point, finite, and backed by enough memory: a pickle may declare a tensor far
    larger than its file."""
    plain = t.layout == torch.strided and t.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if not plain or t.untyped_storage().nbytes() < t.nbytes:
        return False
    return not t.numel() or bool(torch.stack(t.aminmax()).isfinite().all())


def check_tensors(tensors: dict[str, Tensor], source: str) -> None:
    for name, t in tensors.items():
        if not is_valid(t):
            raise UserError(f"{source} is broken: {name} has non-finite or missing values. Use an earlier checkpoint.")
