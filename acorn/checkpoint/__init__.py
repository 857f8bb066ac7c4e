"""Checkpoints: written atomically, safe to load, exact to resume.

    out_dir/step_002000/model.safetensors      the parameters (for a LoRA run: adapters.safetensors, the adapters only)
                        optimizer.safetensors  the optimizer state: transformer.wte.weight.exp_avg and so on
                        state.json             settings, shape, step, losses, the tokenizer, SHA-256 of the other files
    out_dir/latest, out_dir/best               the name of a step folder

A step folder is written under a temporary name and renamed when complete, so a kill at any instant leaves the earlier
checkpoints intact. Loading never runs code from a file: only tensors, numbers and JSON are read.

The ranks of a sharded model (FSDP) each write their rows: model-00001-of-00004.safetensors and so on. A tensor is the
concatenation of the rows in these files, so any number of processes can load it.
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
    read_pointer,
    read_state,
    remove_run,
    source_of,
    state_hash,
    step_folders,
    step_of,
)
from acorn.checkpoint.load import LazyCheckpoint, build_model, is_on_hub, load_model, load_with_tokenizer, open_model
from acorn.checkpoint.manager import CheckpointManager
from acorn.checkpoint.moments import load_optimizers, named_moments
from acorn.checkpoint.save import Writer
from acorn.checkpoint.tensors import LazyTensor, empty_model, fill, merge_adapters, open_tensors

__all__ = [
    "FORMAT",
    "PINNED",
    "CheckpointManager",
    "Damaged",
    "LazyCheckpoint",
    "LazyTensor",
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
    "load_with_tokenizer",
    "merge_adapters",
    "named_moments",
    "open_model",
    "open_tensors",
    "pin",
    "read_pointer",
    "read_state",
    "remove_run",
    "source_of",
    "state_hash",
    "step_folders",
    "step_of",
]
