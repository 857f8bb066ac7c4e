"""The state of the optimizers in a checkpoint, by parameter: transformer.wte.weight.exp_avg and so on."""

from pathlib import Path

import torch
from torch import Tensor

from acorn import UserError
from acorn.checkpoint.layout import FORMAT
from acorn.checkpoint.tensors import check_tensors, open_tensors
from acorn.distributed.sharding import local, own_rows
from acorn.training.optim import moment_kinds
from model import GPT


def load_optimizers(folder: Path, state: dict, model: GPT, optimizers: list[torch.optim.Optimizer]) -> None:
    """Load a checkpoint's optimizer state into the optimizers of `model`. Raises UserError if it belongs to another
    model or to other optimizers."""
    if state["format"] == FORMAT:
        load_moments(model, optimizers, open_tensors(folder, state, "optimizer"))
        return
    try:
        saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)["optimizers"]
    except Exception as error:  # its hash matches, so it is a pickle with other content
        raise UserError(
            f"{folder / 'optimizer.pt'} is not an optimizer state. No code in it was run. Use another checkpoint."
        ) from error
    moments = convert_format_1(model, optimizers, saved)
    check_tensors(moments, str(folder / "optimizer.pt"))
    load_moments(model, optimizers, moments)


def named_moments(model: GPT, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the state of the optimizers by name: transformer.wte.weight.exp_avg, transformer.wte.weight.step, ...

    Step counts have shape (), and all other values have their parameter's shape. Empty before the first update.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    states = [(p, moments) for optimizer in optimizers for p, moments in optimizer.state.items()]
    return {f"{names[p]}.{kind}": value for p, moments in states for kind, value in moments.items()}


def load_moments(model: GPT, optimizers: list[torch.optim.Optimizer], saved: dict) -> None:
    """Load the result of `named_moments` into the optimizers.

    The values of `saved` are tensors, or lazy tensors with a `shape`, which are read when indexed; of a sharded
    parameter, only this rank's rows are read. Because a checkpoint may be untrusted and fused kernels do not check
    shapes, a wrong name or shape raises UserError.
    """
    names = {p: name for name, p in model.named_parameters()}
    saved = dict(saved)
    for optimizer in optimizers if saved else ():
        kinds = moment_kinds(optimizer)
        for p, kind in [(p, kind) for group in optimizer.param_groups for p in group["params"] for kind in kinds]:
            name, shape = f"{names[p]}.{kind}", () if kind == "step" else tuple(p.shape)
            value = saved.pop(name, None)
            if value is None:
                raise foreign(f"it lacks {name}")
            if tuple(value.shape) != shape:
                raise foreign(f"{name} has the shape {tuple(value.shape)} instead of {shape}")
            if kind == "step":  # fused kernels need it on the parameter's device
                optimizer.state[p][kind] = value[...].to(p.device, torch.float32)
            else:
                optimizer.state[p][kind] = torch.zeros_like(p)
                local(optimizer.state[p][kind]).copy_(value[own_rows(p)])
    if saved:
        raise foreign(f"it has {min(saved)}, which is not trained")


def foreign(reason: str) -> UserError:
    """Return the error for an optimizer state that belongs to another model or to other optimizers."""
    return UserError(
        f"the saved optimizer state does not fit: {reason}. To resume, leave out --optimizer, --freeze and "
        "--block_size. To start from the weights alone, use --init_from=OUT_DIR with a new --out_dir."
    )


def convert_format_1(model: GPT, optimizers: list[torch.optim.Optimizer], saved: list[dict]) -> dict[str, Tensor]:
    """Convert optimizer state_dicts of older checkpoints, which number the parameters, to the form of `named_moments`.

    Raises UserError if they do not belong to these optimizers.
    """
    names, named = {p: name for name, p in model.named_parameters()}, {}
    position = {p: i for i, p in enumerate(names)}
    try:
        for optimizer, state in zip(optimizers, saved, strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            if len(state["param_groups"]) == 1:  # AdamW with Muon had one group, in the model's order
                params.sort(key=position.__getitem__)
            order = [i for group in state["param_groups"] for i in group["params"]]
            for i, moments in state["state"].items():
                for kind, value in moments.items():
                    if not isinstance(value, Tensor) or value.layout != torch.strided:
                        raise TypeError("not a dense tensor")
                    named[f"{names[params[order.index(i)]]}.{kind}"] = value
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise foreign("its parameter numbers do not match this model") from error
    return named
