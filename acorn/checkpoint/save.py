"""Write the checkpoints of a run while it goes on training."""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from acorn import files
from acorn.checkpoint.layout import (
    FORMAT,
    REPLACED,
    file_names,
    is_pinned,
    read_pointer,
    state_hash,
    step_folders,
    step_name,
    step_of,
    weights_kind,
)
from acorn.checkpoint.tensors import copy_to_host, is_whole
from acorn.distributed import sharding
from acorn.training import lora, optim
from model import GPT


class Writer:
    """Writes the checkpoints of a run while it goes on training.

    `save` returns as soon as parameters and moments are copied to host memory, one more copy of them, which is kept for
    the next time; a thread writes it. Rank 0 writes alone, or, where the model is sharded, each process its rows, into
    one `out_dir` that all of them see. They tell each other how it went through the key-value store that connects
    them, because collectives of a thread would get between those of training.
    """

    def __init__(self, out_dir: Path, keep: int, rank: int = 0, world_size: int = 1):
        self.out_dir, self.keep, self.rank, self.world_size = out_dir, keep, rank, world_size
        self.copies = defaultdict(dict)  # in host memory, by file and name
        self.writing = None  # what will come of the checkpoint that a thread works on
        self.failure = None  # why the last one could not be written
        if world_size > 1:  # over a connection of its own, where waiting is in nobody's way
            store = torch.distributed.group.WORLD.get_group_store().clone()
            self.store = torch.distributed.PrefixStore(f"checkpoint/{out_dir}", store)

    def save(self, model: GPT, optimizers: list[torch.optim.Optimizer], state: dict, best: bool) -> None:
        """Begin to write `out_dir/step_NNNNNN` for state["step"], once the one before is done. Then `latest` (and
        `best`) point at it, and all but the newest `keep` and the best are removed. All processes call this alike."""
        self.wait()
        sharded = any(sharding.is_sharded(p) for p in model.parameters())
        shards = self.world_size if sharded else 1
        state = {"format": FORMAT, "config": dataclasses.asdict(model.config), "shards": shards, **state}
        parts = {}
        if self.rank < shards:
            for kind, tensors in (
                (weights_kind(state), lora.adapters(model) or dict(model.named_parameters())),
                ("optimizer", optim.named_moments(model, optimizers)),
            ):
                parts[file_names(kind, shards)[self.rank]] = copy_to_host(tensors, self.copies[kind])
        self.writing = concurrent.futures.Future()
        threading.Thread(target=self.run, args=(self.writing, parts, state, best)).start()

    def wait(self) -> bool:
        """Wait for the checkpoint that is being written, and say whether the last one succeeded. All processes hear the
        same."""
        if self.writing is not None:
            if concurrent.futures.wait([self.writing], timeout=60).not_done and self.rank == 0:
                print(f"waiting for the last checkpoint, which the disk of {self.out_dir} is slow to take", flush=True)
            self.failure, self.writing = self.writing.result(), None
        return self.failure is None

    def run(self, writing: concurrent.futures.Future, *args) -> None:
        if sys.platform == "linux":
            os.nice(10)  # there it is this thread's alone: training comes first
        try:
            writing.set_result(self.write(*args))
        except BaseException as error:  # for `wait` to raise
            writing.set_exception(error)

    def write(self, parts: dict[str, dict[str, torch.Tensor]], state: dict, best: bool) -> str | None:
        """Write this process's files and, on rank 0, once all have theirs, complete the folder. Returns why that
        failed, where it did."""
        step = state["step"]
        beside = self.out_dir / f".writing-step_{step:06d}"
        hashes, failure = {}, astray(parts, state)
        try:
            hashes = {} if failure else write_files(beside, parts)
        except (OSError, SafetensorError) as error:
            failure = reason(error)
        if self.rank == 0:
            for rank in range(1, state["shards"]):
                other = self.hear(rank, step)
                hashes |= other["hashes"]
                failure = failure or (other["failure"] and f"rank {rank}: {other['failure']}")
            if failure is None:
                try:
                    complete(beside, state, hashes, self.keep, best)
                except OSError as error:
                    failure = reason(error)
            if failure is not None:
                files.remove(beside, ignore_errors=True)
                print(
                    f"warning: the checkpoint of step {step} could not be written into {self.out_dir} ({failure}); "
                    "those before it are whole; mend that, and the next evaluation saves again",
                    file=sys.stderr,
                    flush=True,
                )
        if self.world_size > 1:
            self.store.set(f"{step}/{self.rank}", json.dumps({"hashes": hashes, "failure": failure}))
            failure = self.hear(0, step)["failure"]  # rank 0's word counts
        return failure

    def hear(self, rank: int, step: int) -> dict:
        """What another process says of the checkpoint, as soon as it does; a slow disk may take its time."""
        while not self.store.check([f"{step}/{rank}"]):
            if not threading.main_thread().is_alive():
                raise RuntimeError(f"training ended while rank {rank} was writing")
            time.sleep(0.02)
        return json.loads(self.store.get(f"{step}/{rank}"))


def astray(parts: dict[str, dict[str, torch.Tensor]], state: dict) -> str | None:
    """Why a checkpoint is of no use, where it is: its loss is no number, or one of its tensors would not be loaded."""
    if state.get("evaluated_at") == state["step"] and not math.isfinite(state["val_loss"]):
        return "the val loss is no number; a lower learning rate may help"
    for tensors in parts.values():
        for name, tensor in tensors.items():
            if not is_whole(tensor):
                return f"{name} is not finite; a lower learning rate may help"
    return None


def reason(error: Exception) -> str:
    """What the disk says, in the system's words."""
    number = re.search(r"\(os error (\d+)\)", str(error))  # safetensors wraps them
    return os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or str(error).splitlines()[0]


def write_files(folder: Path, parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """Write safetensors files, by name, into a new folder and onto the disk. Returns their SHA-256 (hex)."""
    for name, tensors in parts.items():
        files.make_folder(folder)
        files.remove(folder / name)  # of a process that was killed, or a link, through which safetensors would write
        save_file(tensors, folder / name)
        with contextlib.suppress(OSError):  # safetensors keeps it to this user; others may read what they may list
            os.chmod(folder / name, folder.stat().st_mode & 0o666)
        files.sync(folder / name)
    return {name: files.sha256(folder / name) for name in parts}


def complete(beside: Path, state: dict, hashes: dict[str, str], keep: int, best: bool) -> None:
    """Make the folder `beside`, which has all its tensors, the checkpoint of state["step"]."""
    out_dir, final = beside.parent, beside.with_name(f"step_{state['step']:06d}")
    replaced = out_dir / f"{REPLACED}{final.name}"
    for folder in step_folders(out_dir):  # where a kill came while one was replaced, it gets its name back
        if folder.name != step_name(folder):
            os.rename(folder, out_dir / step_name(folder))
    for name in hashes:
        deadline = time.monotonic() + 60  # network filesystems may show a new file late
        while not (beside / name).exists():
            if time.monotonic() > deadline:
                raise OSError(0, f"{name} is not there: all machines must see the same folder as out_dir")
            time.sleep(1)
    for file in beside.iterdir():
        if file.name not in hashes:  # of a process that was killed while it wrote the same step
            files.remove(file)
    hashes = {**hashes, "state": state_hash(state)}
    with files.create(beside / "state.json") as file:
        file.write(json.dumps({**state, "sha256": hashes}, indent=1).encode())
    files.sync(beside / "state.json")
    files.sync(beside)
    files.remove(replaced, ignore_errors=True)
    if os.path.lexists(final):  # the same step once more, after a resume
        os.rename(final, replaced)
    os.rename(beside, final)
    files.sync(out_dir)
    if best:  # before `latest`, which says that all is done
        files.replace(out_dir / "best", final.name + "\n")
    files.replace(out_dir / "latest", final.name + "\n")
    for leftover in out_dir.glob(".*-step_*"):  # of a process that was killed, too
        files.remove(leftover, ignore_errors=True)
    # those beyond this step were damaged, or the run would have gone on from them
    earlier = [folder for folder in step_folders(out_dir) if step_of(folder) <= state["step"]]
    stay = {read_pointer(out_dir / "best"), *earlier[:keep]}
    for folder in step_folders(out_dir):
        if (folder not in stay or folder not in earlier) and not is_pinned(folder):
            files.remove(folder, ignore_errors=True)
