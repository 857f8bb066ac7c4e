"""Read nanoGPT's `ckpt.pt`."""

import pickle
from pathlib import Path

import torch

from acorn import UserError
from acorn.checkpoint.tensors import check_tensors, fitting_model
from model import GPT


def open_nanogpt(path: Path) -> tuple[GPT, dict, dict]:
    """The model of a nanoGPT `ckpt.pt` on the meta device, its parameters, and the rest, loaded so that a pickle in it
    cannot run anything."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, numbers and names, and is not loaded: it could run code"
        ) from error
    except Exception as error:  # a damaged file fails in many ways
        raise UserError(f"{path} cannot be read as a nanoGPT checkpoint; is it whole?") from error
    try:
        shape = {**checkpoint["model_args"], "mlp": "gelu"}  # nanoGPT trains with the exact GELU
        tensors = {name.removeprefix("_orig_mod."): t for name, t in checkpoint["model"].items()}
        whole = all(isinstance(t, torch.Tensor) for t in tensors.values())
    except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is not a nanoGPT checkpoint: it lacks model_args or model") from error
    if not whole:
        raise UserError(f"{path} is not a nanoGPT checkpoint: its model holds more than tensors")
    check_tensors(tensors, str(path))
    return fitting_model(shape, tensors, str(path)), tensors, checkpoint
