"""Read nanoGPT's `ckpt.pt`."""

import pickle
from pathlib import Path

import torch

from acorn import UserError
from acorn.checkpoint.huggingface import BUFFERS
from acorn.checkpoint.tensors import check_tensors, fitting_model
from model import GPT


def open_nanogpt(path: Path) -> tuple[GPT, dict, dict]:
    """Return the model of a nanoGPT `ckpt.pt` on the meta device, its parameters, and the whole checkpoint. The pickle
    is loaded with weights_only, so it cannot run code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a nanoGPT checkpoint, or it holds objects other than tensors, numbers and strings, which "
            "could run code. Give a ckpt.pt, or the folder of a run or of a published model."
        ) from error
    except Exception as error:  # torch raises many types for a damaged file
        raise UserError(
            f"{path} cannot be read as a nanoGPT checkpoint; it may be truncated. Copy it again."
        ) from error
    try:
        shape = {**checkpoint["model_args"], "mlp": "gelu"}  # nanoGPT trains with the exact GELU
        named = ((name.removeprefix("_orig_mod."), t) for name, t in checkpoint["model"].items())
        # the causal mask, stored when nanoGPT runs without flash attention
        tensors = {name: t for name, t in named if not name.endswith(BUFFERS)}
        only_tensors = all(isinstance(t, torch.Tensor) for t in tensors.values())
    except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is not a nanoGPT checkpoint: it lacks model_args or model") from error
    if not only_tensors:
        raise UserError(f"{path} is not a nanoGPT checkpoint: its model holds objects that are not tensors")
    check_tensors(tensors, str(path))
    return fitting_model(shape, tensors, str(path)), tensors, checkpoint
