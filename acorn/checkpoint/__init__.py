"""Checkpoints: atomic to write, safe to load, exact to resume.

    out_dir/step_002000/model.safetensors      the parameters (of a LoRA run: adapters.safetensors, its adapters alone)
                        optimizer.safetensors  what the optimizers remember, by parameter: wte.weight.exp_avg and so on
                        state.json             settings, shape, step, losses, the tokenizer whole, SHA-256 of the others
    out_dir/latest, out_dir/best               the name of a step folder

A folder is written beside under a temporary name and renamed when it is complete, so a kill at any instant leaves the
ones before it. Reading never runs code that a file brings: only tensors, numbers and JSON are read back.

A sharded model (FSDP) is written by all processes, each its rows: model-00001-of-00004.safetensors and so on. A tensor
is then the rows of all these files, in their order, whoever reads it: any number of processes, or one.
"""

from acorn.checkpoint.layout import (
    FORMAT,
    PINNED,
    Damaged,
    file_names,
    find,
    holds_run,
    is_pinned,
    last_settings,
    launched_by,
    pin,
    read_state,
    remove_run,
    state_hash,
    step_folders,
)
from acorn.checkpoint.load import Opened, build_model, is_on_hub, load_model, load_optimizers, open_model
from acorn.checkpoint.manager import CheckpointManager
from acorn.checkpoint.save import Writer
from acorn.checkpoint.tensors import Stored, empty_model, fill, open_tensors

__all__ = [
    "FORMAT",
    "PINNED",
    "CheckpointManager",
    "Damaged",
    "Opened",
    "Stored",
    "Writer",
    "build_model",
    "empty_model",
    "file_names",
    "fill",
    "find",
    "holds_run",
    "is_on_hub",
    "is_pinned",
    "last_settings",
    "launched_by",
    "load_model",
    "load_optimizers",
    "open_model",
    "open_tensors",
    "pin",
    "read_state",
    "remove_run",
    "state_hash",
    "step_folders",
]
