"""Tensors of a checkpoint: read when they are needed, and checked; and the model that they belong to."""

import typing
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from acorn import UserError, settings
from acorn.checkpoint.layout import file_names
from acorn.distributed import sharding
from model import GPT, GPTConfig


def copy_to_host(tensors: dict[str, torch.Tensor], copies: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, of sharded ones the rows that this process has, copied into `copies`, which grows to hold them."""
    for name, tensor in tensors.items():
        own = sharding.local(tensor.detach())
        if name not in copies:
            copies[name] = torch.empty(own.shape, dtype=own.dtype, pin_memory=own.is_cuda)
        copies[name].copy_(own, non_blocking=own.is_cuda)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return {name: copies[name] for name in tensors}


class Stored:
    """A tensor in safetensors files: one piece, or several, the rows (dimension 0) of one after the other's. Nothing
    but `shape` is read until rows are asked for: `stored[3:7]`, or all, `stored[...]`. Numbers that are not finite
    raise UserError then."""

    def __init__(self, name: str, source: str, pieces: list):
        self.name, self.source, self.pieces = name, source, pieces

    @property
    def shape(self) -> torch.Size:
        first, *others = (piece.get_shape() for piece in self.pieces)
        return torch.Size([first[0] + sum(shape[0] for shape in others), *first[1:]] if first else [])

    def __getitem__(self, rows) -> torch.Tensor:
        tensor = self.read(rows)
        check_tensors({self.name: tensor}, self.source)
        return tensor

    def read(self, rows) -> torch.Tensor:
        if rows is ...:
            rows = slice(None)
            if not self.shape:
                return self.pieces[0][...]
        start, stop, _ = rows.indices(self.shape[0])
        found = []
        for piece in self.pieces:
            n = piece.get_shape()[0]
            if max(start, 0) < min(stop, n):
                found.append(piece[max(start, 0) : min(stop, n)])
            start, stop = start - n, stop - n
        return torch.cat(found) if len(found) > 1 else found[0] if found else self.pieces[0][0:0]


def open_tensors(folder: Path, state: dict, kind: str) -> dict[str, Stored]:
    """The tensors of a kind in a checkpoint, by name. Raises UserError where their files do not fit together."""
    tensors = {}
    try:
        for name in file_names(kind, state.get("shards", 1)):
            file = safe_open(folder / name, "pt", backend="pread")  # a memory map would count as memory in use
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                tensors.setdefault(key, Stored(key, str(folder), [])).pieces.append(file.get_slice(key))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / name} cannot be read: {error}") from error
    for key, stored in tensors.items():
        if len({(len(piece.get_shape()), *piece.get_shape()[1:]) for piece in stored.pieces}) > 1:
            raise UserError(f"the files of {folder} do not fit together: {key} has another shape in each")
    return tensors


def empty_model(shape: dict, source: str) -> GPT:
    """The model with the GPTConfig fields `shape`, on the meta device, where it takes no memory."""
    types = typing.get_type_hints(GPTConfig)
    try:
        config = GPTConfig(**{name: settings.convert(value, types[name], name) for name, value in shape.items()})
        with torch.device("meta"):
            return GPT(config)
    except (TypeError, ValueError, KeyError, OverflowError, RuntimeError, UserError) as error:
        raise UserError(f"{source} belongs to no model of this version ({error})") from error


def fill(model: GPT, values: dict) -> GPT:
    """The model, which stands on the meta device, with these parameters, on the CPU in float32. They are read one after
    the other, so that memory holds them once; of one that has more rows than the model's, the first."""
    tensors = {name: values[name][: len(p)].float().contiguous() for name, p in model.named_parameters()}
    model.load_state_dict(tensors, strict=False, assign=True)
    if model.config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def fitting_model(shape: dict, tensors: dict, source: str) -> GPT:
    """The model with the GPTConfig fields `shape`, on the meta device. Raises UserError unless the names and shapes of
    `tensors` are those of its parameters."""
    model = empty_model(shape, source)
    own = dict(model.named_parameters())
    if model.config.tie_weights:
        tensors = {name: t for name, t in tensors.items() if name != "lm_head.weight"}
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        word = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which this model does not"
        raise UserError(f"{source} is a checkpoint of another shape: it {word}")
    for name, p in own.items():
        if p.shape != tensors[name].shape:
            shapes = f"{list(tensors[name].shape)} instead of {list(p.shape)}"
            raise UserError(f"{source} is a checkpoint of another shape: its {name} is {shapes}")
    return model


def is_whole(t: torch.Tensor) -> bool:
    """Whether what was read is a tensor of finite numbers, all of them there: a pickle may bring one that says that it
    is far larger than its file."""
    plain = t.layout == torch.strided and t.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if not plain or t.untyped_storage().nbytes() < t.nbytes:
        return False
    return not t.numel() or bool(torch.stack(t.aminmax()).isfinite().all())


def check_tensors(tensors: dict[str, torch.Tensor], source: str) -> None:
    for name, t in tensors.items():
        if not is_whole(t):
            raise UserError(f"{source} is broken: {name} is no tensor of finite numbers; take an earlier checkpoint")
