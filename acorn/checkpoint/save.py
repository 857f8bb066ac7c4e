"""Write the checkpoints of a run while it trains."""

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
    REPLACED_PREFIX,
    file_names,
    is_pinned,
    read_pointer,
    state_hash,
    step_folders,
    step_name,
    step_of,
    weights_kind,
)
from acorn.checkpoint.moments import named_moments
from acorn.checkpoint.tensors import copy_to_host, is_valid
from acorn.distributed import heartbeat, sharding
from acorn.training import lora
from model import GPT


class Writer:
    """Saves the checkpoints of a run asynchronously.

    `save` returns once parameters and optimizer state are copied into a reused host buffer; a thread writes the buffer
    to disk. Rank 0 writes alone. If the model is sharded, every rank writes its rows into one shared `out_dir`. Ranks
    report success through the process group's key-value store, because collectives in a thread would interleave with
    those of training.
    """

    def __init__(self, out_dir: Path, keep: int, rank: int = 0, world_size: int = 1):
        self.out_dir, self.keep, self.rank, self.world_size = out_dir, keep, rank, world_size
        self.copies: dict[str, dict] = defaultdict(dict)  # host buffers, by kind of file and name
        self.writing: concurrent.futures.Future | None = None  # the checkpoint that the thread is writing
        self.failure: str | None = None  # why the last checkpoint could not be written
        if world_size > 1:
            self.store = torch.distributed.PrefixStore(f"checkpoint/{out_dir}", heartbeat.connect_store())

    def save(self, model: GPT, optimizers: list[torch.optim.Optimizer], state: dict) -> None:
        """Wait for the previous checkpoint, then start writing `out_dir/step_NNNNNN` for state["step"].

        When it is complete, `latest` points to it, and `best` to the checkpoint of state["best_step"]. The best and the
        newest `keep` checkpoints stay, the others are removed. Every rank must call this."""
        self.wait()
        sharded = any(sharding.is_sharded(p) for p in model.parameters())
        shards = self.world_size if sharded else 1
        state = {"format": FORMAT, "config": dataclasses.asdict(model.config), "shards": shards, **state}
        parts = {}
        if self.rank < shards:
            for kind, tensors in (
                (weights_kind(state), lora.adapters(model) or dict(model.named_parameters())),
                ("optimizer", named_moments(model, optimizers)),
            ):
                parts[file_names(kind, shards)[self.rank]] = copy_to_host(tensors, self.copies[kind])
        self.writing = concurrent.futures.Future()
        threading.Thread(target=self.run, args=(self.writing, parts, state)).start()

    def wait(self) -> bool:
        """Wait for the checkpoint that is being written. Returns whether the last one succeeded, the same on every
        rank."""
        if self.writing is not None:
            if concurrent.futures.wait([self.writing], timeout=60).not_done and self.rank == 0:
                print(f"waiting for the last checkpoint: writing to {self.out_dir} is slow", flush=True)
            self.failure, self.writing = self.writing.result(), None
        return self.failure is None

    def run(self, writing: concurrent.futures.Future, *args) -> None:
        """Run `write` in the thread, and set its result in `writing`."""
        if sys.platform == "linux":
            os.nice(10)  # on Linux this applies to the calling thread only; training has priority
        try:
            writing.set_result(self.write(*args))
        except BaseException as error:  # `wait` raises it
            writing.set_exception(error)

    def write(self, parts: dict[str, dict[str, torch.Tensor]], state: dict) -> str | None:
        """Write this rank's files. Rank 0 then waits for the others and completes the folder.

        `parts` are the tensors of each file. Returns the reason of a failure, or None on success.
        """
        step = state["step"]
        tmp_dir = self.out_dir / f".writing-step_{step:06d}"
        hashes, failure = {}, check_finite(parts, state)
        try:
            hashes = {} if failure else write_files(tmp_dir, parts)
        except (OSError, SafetensorError) as error:
            failure = error_reason(error)
        if self.rank == 0:
            for rank in range(1, state["shards"]):
                report = self.wait_for_rank(rank, step)
                hashes |= report["hashes"]
                failure = failure or (report["failure"] and f"rank {rank}: {report['failure']}")
            if failure is None:
                try:
                    commit(tmp_dir, state, hashes, self.keep)
                except OSError as error:
                    failure = error_reason(error)
            if failure is not None:
                files.remove(tmp_dir, ignore_errors=True)
                print(
                    f"warning: the checkpoint of step {step} could not be written into {self.out_dir} ({failure}). "
                    "Any earlier checkpoint is intact. The next evaluation tries again.",
                    file=sys.stderr,
                    flush=True,
                )
        if self.world_size > 1:
            self.store.set(f"{step}/{self.rank}", json.dumps({"hashes": hashes, "failure": failure}))
            failure = self.wait_for_rank(0, step)["failure"]  # rank 0 decides
        return failure

    def wait_for_rank(self, rank: int, step: int) -> dict:
        """Wait for another rank's report on the checkpoint, without a timeout, because disks may be slow."""
        while not self.store.check([f"{step}/{rank}"]):
            if not threading.main_thread().is_alive():
                raise RuntimeError(f"training ended while rank {rank} was writing a checkpoint")
            time.sleep(0.02)
        return json.loads(self.store.get(f"{step}/{rank}"))


def check_finite(parts: dict[str, dict[str, torch.Tensor]], state: dict) -> str | None:
    """Return why a checkpoint must not be saved: a non-finite validation loss or tensor. None if it is fine."""
    if state.get("evaluated_at") == state["step"] and not math.isfinite(state["val_loss"]):
        return "the val loss is not finite; try a lower learning rate"
    for tensors in parts.values():
        for name, tensor in tensors.items():
            if not is_valid(tensor):
                return f"{name} is not finite; try a lower learning rate"
    return None


def error_reason(error: Exception) -> str:
    """Return the system's message for an error of reading or writing, after the file's name if it is known."""
    number = re.search(r"\(os error (\d+)\)", str(error))  # safetensors wraps system errors
    if number:
        return os.strerror(int(number[1]))
    name = getattr(error, "filename", None)
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return f"{Path(name).name}: {reason}" if isinstance(name, str) else reason


def write_files(folder: Path, parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """Write safetensors files, by name, into a new folder and sync them to disk. Returns their SHA-256 (hex)."""
    for name, tensors in parts.items():
        if not folder.is_dir():
            with contextlib.suppress(OSError):  # another rank may just have made the folder
                folder.unlink()  # a file of this name would keep the run from saving
        files.make_folder(folder)
        files.remove(folder / name)  # left by a killed process, or a link that safetensors would write through
        save_file(tensors, folder / name)
        with contextlib.suppress(OSError):  # safetensors makes it private; give it the folder's permissions
            os.chmod(folder / name, folder.stat().st_mode & 0o666)
        files.sync(folder / name)
    return {name: files.sha256(folder / name) for name in parts}


def commit(tmp_dir: Path, state: dict, hashes: dict[str, str], keep: int) -> None:
    """Turn the folder `tmp_dir`, which has all tensor files, into the checkpoint of state["step"]."""
    out_dir, final = tmp_dir.parent, tmp_dir.with_name(f"step_{state['step']:06d}")
    replaced = out_dir / f"{REPLACED_PREFIX}{final.name}"
    for folder in step_folders(out_dir):  # restore the name of a folder if a kill interrupted its replacement
        if folder.name != step_name(folder):
            os.rename(folder, out_dir / step_name(folder))
    for name in hashes:
        deadline = time.monotonic() + 60  # network file systems may show a new file late
        while not (tmp_dir / name).exists():
            if time.monotonic() > deadline:
                raise OSError(0, f"{name} is missing: every machine must see the same folder as out_dir")
            time.sleep(1)
    for path in tmp_dir.iterdir():
        if path.name not in hashes:  # left by a process that was killed while writing the same step
            files.remove(path)
    hashes = {**hashes, "state": state_hash(state)}
    with files.create(tmp_dir / "state.json") as file:
        file.write(json.dumps({**state, "sha256": hashes}, indent=1).encode())
    files.sync(tmp_dir / "state.json")
    files.sync(tmp_dir)
    files.remove(replaced, ignore_errors=True)
    if os.path.lexists(final):  # the same step was saved before a resume
        os.rename(final, replaced)
    os.rename(tmp_dir, final)
    files.sync(out_dir)
    # Write best before latest, which completes the update. Rewrite it at each save: after a damaged checkpoint, it may
    # name a step that was trained again and is no longer the best.
    best = [folder.name for folder in step_folders(out_dir) if step_of(folder) == state.get("best_step")]
    if best:
        files.replace(out_dir / "best", best[0] + "\n")
    else:
        files.remove(out_dir / "best", ignore_errors=True)
    files.replace(out_dir / "latest", final.name + "\n")
    for leftover in out_dir.glob(".*-step_*"):  # of killed processes
        files.remove(leftover, ignore_errors=True)
    # later steps are damaged, otherwise the run would have resumed from them
    earlier = [folder for folder in step_folders(out_dir) if step_of(folder) <= state["step"]]
    kept = {read_pointer(out_dir / "best"), *earlier[:keep]}
    for folder in step_folders(out_dir):
        if (folder not in kept or folder not in earlier) and not is_pinned(folder):
            files.remove(folder, ignore_errors=True)
