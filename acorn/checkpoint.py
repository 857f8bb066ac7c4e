"""Checkpoints: written atomically, safe to load, exact to resume.

    out_dir/step_002000/model.safetensors      the parameters (for a LoRA run: adapters.safetensors, the adapters only)
                        optimizer.safetensors  the optimizer state by parameter: wte.weight.exp_avg and so on
                        state.json             settings, shape, step, losses, the tokenizer, SHA-256 of the other files
    out_dir/latest, out_dir/best               the name of a step folder

A step folder is written under a temporary name and renamed when complete, so a kill at any instant leaves the earlier
checkpoints intact. Loading never runs code from a file: only tensors, numbers and JSON are read.

The ranks of a sharded model (FSDP) each write their rows: model-00001-of-00004.safetensors and so on. A tensor is the
concatenation of the rows in these files, so any number of processes can load it.
"""

import concurrent.futures
import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import os
import pickle
import re
import sys
import threading
import time
import typing
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from acorn import UserError, files, lora, optim, printable, settings, sharding
from acorn import tokenizer as tokenizers
from acorn.runtime import ALONE, Runtime
from acorn.shards import load_dataset
from model import DROPOUTS, GPT, GPTConfig

FORMAT = 2  # of state.json; format 1 had optimizer.pt, with the optimizer state by parameter number
STEP_NAME = re.compile(r"step_[0-9]{6,18}")
REPLACED = ".replaced-"  # prefix of a step folder's name while the same step is saved again
PINNED = "pinned"  # a file that marks a step folder as not to be removed
SCALER = "scale growth_factor backoff_factor growth_interval _growth_tracker".split()  # keys of a GradScaler's state
PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # names on the Hugging Face hub
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # other names there: owner/name


class Damaged(Exception):
    """An incomplete or corrupt checkpoint; the message says what is wrong."""


class Opened(typing.NamedTuple):
    """An opened checkpoint, whose weights are not read yet."""

    model: GPT  # on the meta device, where it takes no memory
    values: dict  # parameter name -> a tensor, Stored or lora.Merged; indexing it with rows reads them
    tokenizer: tokenizers.Tokenizer | None  # None if it is not known
    source: str  # a description for messages
    name: str  # an absolute path or hub name, by which adapters refer to their base


class Writer:
    """Saves the checkpoints of a run asynchronously.

    `save` returns once parameters and optimizer state are copied into a reused host buffer; a thread writes the buffer
    to disk. Rank 0 writes alone. If the model is sharded, every rank writes its rows into one shared `out_dir`. Ranks
    report success through the process group's key-value store, because collectives in a thread would interleave with
    those of training.
    """

    def __init__(self, out_dir: Path, keep: int, rank: int = 0, world_size: int = 1):
        self.out_dir, self.keep, self.rank, self.world_size = out_dir, keep, rank, world_size
        self.copies = defaultdict(dict)  # host buffers, by kind of file and name
        self.writing = None  # a Future of the checkpoint that the thread is writing
        self.failure = None  # why the last checkpoint could not be written
        if world_size > 1:  # a separate connection, so that waiting blocks no other user of the store
            store = torch.distributed.group.WORLD.get_group_store().clone()
            self.store = torch.distributed.PrefixStore(f"checkpoint/{out_dir}", store)

    def save(self, model: GPT, optimizers: list[torch.optim.Optimizer], state: dict, best: bool) -> None:
        """Wait for the previous checkpoint, then start writing `out_dir/step_NNNNNN` for state["step"].

        When it is complete, `latest` (and `best` if `best`) point to it, and all but the newest `keep` and the best
        checkpoints are removed. Every rank must call this."""
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
        """Wait for the checkpoint that is being written. Returns whether the last one succeeded, the same on every
        rank."""
        if self.writing is not None:
            if concurrent.futures.wait([self.writing], timeout=60).not_done and self.rank == 0:
                print(f"waiting for the last checkpoint: writing to {self.out_dir} is slow", flush=True)
            self.failure, self.writing = self.writing.result(), None
        return self.failure is None

    def run(self, writing: concurrent.futures.Future, *args) -> None:
        if sys.platform == "linux":
            os.nice(10)  # on Linux this applies to the calling thread only; training has priority
        try:
            writing.set_result(self.write(*args))
        except BaseException as error:  # `wait` raises it
            writing.set_exception(error)

    def write(self, parts: dict[str, dict[str, torch.Tensor]], state: dict, best: bool) -> str | None:
        """Write this rank's files. Rank 0 then waits for the others and completes the folder. Returns the reason of a
        failure, None on success."""
        step = state["step"]
        tmp_dir = self.out_dir / f".writing-step_{step:06d}"
        hashes, failure = {}, astray(parts, state)
        try:
            hashes = {} if failure else write_files(tmp_dir, parts)
        except (OSError, SafetensorError) as error:
            failure = reason(error)
        if self.rank == 0:
            for rank in range(1, state["shards"]):
                other = self.hear(rank, step)
                hashes |= other["hashes"]
                failure = failure or (other["failure"] and f"rank {rank}: {other['failure']}")
            if failure is None:
                try:
                    complete(tmp_dir, state, hashes, self.keep, best)
                except OSError as error:
                    failure = reason(error)
            if failure is not None:
                files.remove(tmp_dir, ignore_errors=True)
                print(
                    f"warning: the checkpoint of step {step} could not be written into {self.out_dir} ({failure}). "
                    "Earlier checkpoints are intact. The next evaluation tries again.",
                    file=sys.stderr,
                    flush=True,
                )
        if self.world_size > 1:
            self.store.set(f"{step}/{self.rank}", json.dumps({"hashes": hashes, "failure": failure}))
            failure = self.hear(0, step)["failure"]  # rank 0 decides
        return failure

    def hear(self, rank: int, step: int) -> dict:
        """Wait for another rank's report on the checkpoint, without a timeout, because disks may be slow."""
        while not self.store.check([f"{step}/{rank}"]):
            if not threading.main_thread().is_alive():
                raise RuntimeError(f"training ended while rank {rank} was writing a checkpoint")
            time.sleep(0.02)
        return json.loads(self.store.get(f"{step}/{rank}"))


def astray(parts: dict[str, dict[str, torch.Tensor]], state: dict) -> str | None:
    """Return why a checkpoint must not be saved: a non-finite validation loss or tensor. None if it is fine."""
    if state.get("evaluated_at") == state["step"] and not math.isfinite(state["val_loss"]):
        return "the val loss is not finite; try a lower learning rate"
    for tensors in parts.values():
        for name, tensor in tensors.items():
            if not is_whole(tensor):
                return f"{name} is not finite; try a lower learning rate"
    return None


def reason(error: Exception) -> str:
    """Return the system's message for an error of reading or writing."""
    number = re.search(r"\(os error (\d+)\)", str(error))  # safetensors wraps system errors
    return os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or str(error).splitlines()[0]


def copy_to_host(tensors: dict[str, torch.Tensor], copies: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors, or this rank's rows of sharded ones, into the buffers `copies`; missing buffers are added."""
    for name, tensor in tensors.items():
        local = sharding.local(tensor.detach())
        if name not in copies:
            copies[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        copies[name].copy_(local, non_blocking=local.is_cuda)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return {name: copies[name] for name in tensors}


def write_files(folder: Path, parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """Write safetensors files, by name, into a new folder and sync them to disk. Returns their SHA-256 (hex)."""
    for name, tensors in parts.items():
        files.make_folder(folder)
        files.remove(folder / name)  # left by a killed process, or a link that safetensors would write through
        save_file(tensors, folder / name)
        with contextlib.suppress(OSError):  # safetensors makes it private; give it the folder's permissions
            os.chmod(folder / name, folder.stat().st_mode & 0o666)
        files.sync(folder / name)
    return {name: files.sha256(folder / name) for name in parts}


def complete(tmp_dir: Path, state: dict, hashes: dict[str, str], keep: int, best: bool) -> None:
    """Turn the folder `tmp_dir`, which has all tensor files, into the checkpoint of state["step"]."""
    out_dir, final = tmp_dir.parent, tmp_dir.with_name(f"step_{state['step']:06d}")
    replaced = out_dir / f"{REPLACED}{final.name}"
    for folder in step_folders(out_dir):  # restore the name of a folder if a kill interrupted its replacement
        if folder.name != step_name(folder):
            os.rename(folder, out_dir / step_name(folder))
    for name in hashes:
        deadline = time.monotonic() + 60  # network file systems may show a new file late
        while not (tmp_dir / name).exists():
            if time.monotonic() > deadline:
                raise OSError(0, f"{name} is missing: every machine must see the same folder as out_dir")
            time.sleep(1)
    for file in tmp_dir.iterdir():
        if file.name not in hashes:  # left by a process that was killed while writing the same step
            files.remove(file)
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
    if best:  # before `latest`, which marks the end of the update
        files.replace(out_dir / "best", final.name + "\n")
    files.replace(out_dir / "latest", final.name + "\n")
    for leftover in out_dir.glob(".*-step_*"):  # of killed processes
        files.remove(leftover, ignore_errors=True)
    # later steps are damaged, otherwise the run would have resumed from them
    earlier = [folder for folder in step_folders(out_dir) if step_of(folder) <= state["step"]]
    kept = {read_pointer(out_dir / "best"), *earlier[:keep]}
    for folder in step_folders(out_dir):
        if (folder not in kept or folder not in earlier) and not is_pinned(folder):
            files.remove(folder, ignore_errors=True)


def is_pinned(folder: Path) -> bool:
    """Whether a step folder must not be removed, because adapters need it."""
    return os.path.lexists(folder / PINNED)


def pin(folder: Path, out_dir: Path) -> None:
    """Keep a step folder from being removed by its run, because the adapters in `out_dir` need it.

    Raises UserError if its run has removed it meanwhile. If the folder is not writable, a note says that it is not
    protected. Other bases need no pin, because no run removes them."""
    if not STEP_NAME.fullmatch(folder.name):
        return
    try:
        with files.open_own(folder / PINNED, "ab") as file:
            text = f"LoRA adapters in {out_dir.absolute()} need this checkpoint. Delete this file to allow removal.\n"
            file.write(text.encode(errors="surrogateescape"))
    except FileNotFoundError as error:
        raise UserError(f"{folder} was removed by its run while it was being read. Start again.") from error
    except OSError as error:
        print(
            f"note: {folder} is the base of this run, but its own run may remove it: it cannot be marked as pinned "
            f"({error.strerror})",
            file=sys.stderr,
        )


def weights_kind(state: dict) -> str:
    """Return the kind of files that hold the parameters in a step folder: adapters or model."""
    return "adapters" if state.get("lora") else "model"


def file_names(kind: str, shards: int) -> list[str]:
    """Return the names of the files, one per shard, with the tensors of a kind: model, adapters or optimizer."""
    if shards == 1:
        return [f"{kind}.safetensors"]
    return [f"{kind}-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]


class Stored:
    """A tensor in safetensors files, whose rows are read on demand.

    It consists of one or more pieces, concatenated along dimension 0. `stored[3:7]` reads rows, `stored[...]` reads
    all. Reading non-finite values raises UserError."""

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
        chunks = []
        for piece in self.pieces:
            n = piece.get_shape()[0]
            if max(start, 0) < min(stop, n):
                chunks.append(piece[max(start, 0) : min(stop, n)])
            start, stop = start - n, stop - n
        return torch.cat(chunks) if len(chunks) > 1 else chunks[0] if chunks else self.pieces[0][0:0]


def open_tensors(folder: Path, state: dict, kind: str) -> dict[str, Stored]:
    """Open the tensors of a kind in a checkpoint, by name. Raises UserError if their files are inconsistent."""
    tensors = {}
    try:
        for name in file_names(kind, state.get("shards", 1)):
            file = safe_open(folder / name, "pt", backend="pread")  # a memory map would count as resident memory
            for key in file.keys():  # noqa: SIM118 (not a dict)
                tensors.setdefault(key, Stored(key, str(folder), [])).pieces.append(file.get_slice(key))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / name} cannot be read: {error}") from error
    for key, stored in tensors.items():
        if len({(len(piece.get_shape()), *piece.get_shape()[1:]) for piece in stored.pieces}) > 1:
            raise UserError(f"the files of {folder} are inconsistent: {key} differs in shape. Use another checkpoint.")
    return tensors


def state_hash(state: dict) -> str:
    """Return the SHA-256 (hex) of the content of state.json without its hashes."""
    canonical = json.dumps({k: v for k, v in state.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_pointer(pointer: Path) -> Path | None:
    """Return the step folder that `latest` or `best` names; None if the pointer or the folder does not exist."""
    try:
        name = files.read_bytes(pointer, 100).decode().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return next((folder for folder in step_folders(pointer.parent) if step_name(folder) == name), None)


def step_name(folder: Path) -> str:
    """Return a step folder's name, without the prefix REPLACED."""
    return folder.name.removeprefix(REPLACED)


def step_of(folder: Path) -> int:
    """Return the step number of a step folder."""
    return int(folder.name.rpartition("_")[2])


def step_folders(out_dir: Path) -> list[Path]:
    """Return the step folders in `out_dir`, newest first. A name `.replaced-step_NNNNNN` remains if a kill interrupted
    saving that step again."""
    both = (*out_dir.glob(f"{REPLACED}step_*"), *out_dir.glob("step_*"))
    by_name = {step_name(folder): folder for folder in both}  # if both exist, the one without the prefix
    return sorted((by_name[name] for name in by_name if STEP_NAME.fullmatch(name)), key=step_of, reverse=True)


def holds_run(out_dir: Path) -> bool:
    """Whether `out_dir` has a checkpoint, acorn's or nanoGPT's, that a new run there would overwrite."""
    return bool(step_folders(out_dir)) or any((out_dir / name).exists() for name in ("ckpt.pt", "state.json"))


def launched_by(out_dir: Path, launch: str) -> bool:
    """Whether a process of this launch (`watch.launch_id`) saved a checkpoint in `out_dir`."""
    for folder in step_folders(out_dir):
        try:
            if files.read_json(folder / "state.json").get("launch") == launch:
                return True
        except (OSError, ValueError, AttributeError):  # damaged: `find` reports it
            continue
    return False


def remove_run(out_dir: Path) -> None:
    """Remove the files that a run wrote into `out_dir`, and nothing else. A nanoGPT checkpoint there stays."""
    for folder in {*step_folders(out_dir), *out_dir.glob(".*-step_*")}:
        files.remove(folder)
    for name in ("latest", "best", "base", "metrics.jsonl", "loss.png"):
        (out_dir / name).unlink(missing_ok=True)


def read_state(folder: Path) -> dict:
    """Read state.json of a step folder. Raises Damaged if it was changed or has invalid values."""
    path = folder / "state.json"
    try:
        state = files.read_json(path)
        unchanged = state["sha256"]["state"] == state_hash(state)
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is incomplete or damaged") from error
    if not unchanged:
        raise Damaged(f"{path} was changed: its SHA-256 differs from the one in it")
    if state.get("format") not in (1, FORMAT):
        raise Damaged(f"{path} has format {state.get('format')!r:.20}, which this version does not support")
    # an untrusted file may match its hash and still hold any values
    number, count = (int, float, type(None)), int
    kinds = dict.fromkeys(("config", "settings", "tokenizer", "scaler"), dict)
    kinds |= dict.fromkeys(("step", "position", "skipped", "bad_steps", "shards"), count)
    kinds |= dict(seconds=(int, float), best_loss=number, val_loss=number, evaluated_at=(int, type(None)))
    for name, kind in kinds.items():
        value = state.get(name)
        too_large = isinstance(value, int) and abs(value) >= 2**62
        if name in state and (not isinstance(value, kind) or isinstance(value, bool) or too_large):
            raise Damaged(f"{path}: {name}={value!r:.40} is invalid")
        if kind is count and not 0 <= state.get(name, 0) < 2**62:
            raise Damaged(f"{path}: {name}={value!r:.40} is invalid")
    if missing := {"config", "settings", "tokenizer", "step"} - state.keys():
        raise Damaged(f"{path} has no {min(missing)}")
    shards = state.get("shards", 1)
    if not 0 < shards < 2**20:
        raise Damaged(f"{path}: shards={shards} is invalid")
    numbers = [state["scaler"].get(name) for name in SCALER] if state.get("scaler") else []
    if not all(isinstance(number, (int, float)) and 0 <= number < 2**62 for number in numbers):
        raise Damaged(f"{path}: scaler has an invalid value")
    if adapters := state.get("lora"):
        kinds = dict(rank=int, alpha=(int, float), base=str, sha256=str)
        has_fields = isinstance(adapters, dict) and all(isinstance(adapters.get(name), kinds[name]) for name in kinds)
        if not has_fields or not 0 < adapters["rank"] < 2**20 or not 0 < adapters["alpha"] < 2**62:
            raise Damaged(f"{path}: lora={adapters!r:.40} is invalid")
    return state


def check_files(folder: Path, state: dict, rank: int, world_size: int) -> None:
    """Compare this rank's share of a checkpoint's files with their hashes. Raises Damaged if one differs."""
    shards = state.get("shards", 1)
    optimizer = ["optimizer.pt"] if state["format"] == 1 else file_names("optimizer", shards)
    for name in [*file_names(weights_kind(state), shards), *optimizer][rank::world_size]:
        file = folder / name
        if not file.is_file():
            raise Damaged(f"{file} is missing")
        if files.sha256(file) != state["sha256"].get(name):
            raise Damaged(f"{file} was changed: its SHA-256 differs from the one in state.json")


def in_order(out_dir: Path, which: str = "latest") -> list[Path]:
    """Return the step folders in `out_dir` in the order of preference: first `which` ("latest", "best" or the name of
    a step folder), then the newest first. Raises UserError if there is none, or none of that name."""
    if not out_dir.is_dir():
        raise UserError(f"there is no folder {out_dir}. {_runs_near(out_dir)}")
    if (out_dir / "state.json").exists():  # a step folder
        return [out_dir]
    folders = step_folders(out_dir)
    if which in ("latest", "best"):
        first = read_pointer(out_dir / which)
    else:
        first = next((folder for folder in folders if step_name(folder) == which), None)
        if first is None:
            choices = ", ".join(["best", "latest", *map(step_name, folders)])
            raise UserError(f"there is no {which} in {out_dir}. Choose one of {choices}.")
    if not folders and (out_dir / "ckpt.pt").exists():
        raise UserError(f"{out_dir} holds a nanoGPT checkpoint. Start from it with --init_from={out_dir / 'ckpt.pt'}")
    if not folders and (out_dir / "adapter_config.json").exists():
        raise UserError(
            f"{out_dir} holds adapters of the library peft. Merge them into their base with peft (merge_and_unload, "
            "then save_pretrained), and use the resulting folder."
        )
    if not folders and any(out_dir.glob("*.safetensors")):
        raise UserError(f"{out_dir} holds weights without their config.json. Download the whole checkpoint again.")
    if not folders:
        raise UserError(
            f"there is no checkpoint in {out_dir} yet. A run saves its first checkpoint at its first evaluation or at "
            "its end."
        )
    return sorted(folders, key=lambda folder: folder != first)


def _runs_near(out_dir: Path) -> str:
    """Return advice for an out_dir that does not exist: the run with the most similar name, else all runs in the same
    folder and in out/."""
    runs = {str(f) for parent in (out_dir.parent, Path("out")) for f in parent.glob("*") if step_folders(f)}
    if near := difflib.get_close_matches(str(out_dir), runs, 1, 0.8):
        return f"Did you mean {near[0]}?"
    return f"Existing runs: {', '.join(sorted(runs)[:10])}" if runs else "Train first, or give the out_dir of a run."


def find(out_dir: Path, which: str = "latest", r: Runtime = ALONE) -> tuple[Path, dict]:
    """Return the folder and state of the first intact checkpoint in `in_order`, with a warning for each damaged one
    before it. Files are only read, because a run may be saving. Raises UserError if none is intact.

    The ranks divide the files among them, so that each file is hashed once. All must see the same `out_dir`.
    """
    folders, pointer = in_order(out_dir, which), out_dir / which
    if r.is_main and which in ("latest", "best") and pointer.exists() and not read_pointer(pointer):
        print(f"warning: {pointer} names a checkpoint that does not exist", file=sys.stderr)
    for folder in folders:
        state, is_intact = {}, True
        try:
            state = read_state(folder)
            check_files(folder, state, r.rank, r.world_size)
        except Damaged as damage:
            is_intact = False
            print(printable(f"warning: {damage}; trying another checkpoint"), file=sys.stderr)
        reports = r.gather([state.get("step", -1), is_intact])
        if len({step for step, _ in reports}) > 1:
            raise UserError(f"the ranks see different checkpoints in {out_dir}. Put out_dir on a shared file system.")
        if all(is_intact for _, is_intact in reports):
            return folder, state
    raise UserError(f"no checkpoint in {out_dir} is intact. Train again with --overwrite=True.")


def last_settings(out_dir: Path) -> dict:
    """Return the settings of a run from the newest intact state.json, without checking the other files; {} if there is
    none, which `find` reports."""
    for folder in in_order(out_dir):
        with contextlib.suppress(Damaged):
            return read_state(folder)["settings"]
    return {}


def build_model(folder: Path, state: dict, r: Runtime = ALONE, whole_context: bool = False) -> tuple[GPT, dict]:
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
        base = open_model(name, plain=True, r=r)  # plain: adapters could be their own base
    except UserError as error:
        raise UserError(f"{folder} holds adapters for {name}, which cannot be loaded ({error}). {advice}") from error
    if not r.agree(not r.is_main or lora.fingerprint(base.model, base.values) == adapters["sha256"]):
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


def is_whole(t: torch.Tensor) -> bool:
    """Whether a tensor is dense, floating-point, finite, and backed by enough memory: a pickle may declare a tensor far
    larger than its file."""
    plain = t.layout == torch.strided and t.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if not plain or t.untyped_storage().nbytes() < t.nbytes:
        return False
    return not t.numel() or bool(torch.stack(t.aminmax()).isfinite().all())


def check_tensors(tensors: dict[str, torch.Tensor], source: str) -> None:
    for name, t in tensors.items():
        if not is_whole(t):
            raise UserError(f"{source} is broken: {name} has non-finite or missing values. Use an earlier checkpoint.")


def load_optimizers(folder: Path, state: dict, model: GPT, optimizers: list[torch.optim.Optimizer]) -> None:
    """Load a checkpoint's optimizer state into the optimizers of `model`. Raises UserError if it belongs to another
    model or to other optimizers."""
    if state["format"] == FORMAT:
        saved = open_tensors(folder, state, "optimizer")
    else:
        try:
            saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)["optimizers"]
        except Exception as error:  # its hash matches, so it is a pickle with other content
            raise UserError(
                f"{folder / 'optimizer.pt'} is not an optimizer state. No code in it was run. Use another checkpoint."
            ) from error
        saved = optim.name_moments(model, optimizers, saved)
        check_tensors(saved, str(folder / "optimizer.pt"))
    optim.load_moments(model, optimizers, saved)


def open_nanogpt(path: Path) -> tuple[GPT, dict, dict]:
    """Return the model of a nanoGPT `ckpt.pt` on the meta device, its parameters, and the whole checkpoint. The pickle
    is loaded with weights_only, so it cannot run code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not loaded: it holds objects other than tensors, numbers and strings, which could run code"
        ) from error
    except Exception as error:  # torch raises many types for a damaged file
        raise UserError(
            f"{path} cannot be read as a nanoGPT checkpoint; it may be truncated. Copy it again."
        ) from error
    try:
        shape = {**checkpoint["model_args"], "mlp": "gelu"}  # nanoGPT trains with the exact GELU
        tensors = {name.removeprefix("_orig_mod."): t for name, t in checkpoint["model"].items()}
        only_tensors = all(isinstance(t, torch.Tensor) for t in tensors.values())
    except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is not a nanoGPT checkpoint: it lacks model_args or model") from error
    if not only_tensors:
        raise UserError(f"{path} is not a nanoGPT checkpoint: its model holds objects that are not tensors")
    check_tensors(tensors, str(path))
    return fitting_model(shape, tensors, str(path)), tensors, checkpoint


def is_on_hub(source: str) -> bool:
    """Whether `source` is a model on the Hugging Face hub: GPT-2, or owner/name if no such folder exists."""
    path = Path(source)
    is_name = HUB_NAME.fullmatch(source) and not path.parent.exists()  # if the parent exists, it is a mistyped path
    return not path.exists() and (source in PUBLISHED or bool(is_name))


def load_model(
    source: str, which: str = "best", whole_context: bool = False
) -> tuple[GPT, tokenizers.Tokenizer | None, str]:
    """Load what `open_model` opens. Returns the model on the CPU in float32, its tokenizer, and a description."""
    opened = open_model(source, which, whole_context=whole_context)
    return fill(opened.model, opened.values), opened.tokenizer, opened.source


def open_model(
    source: str, which: str = "best", plain: bool = False, r: Runtime = ALONE, whole_context: bool = False
) -> Opened:
    """Open an acorn out_dir or step folder, a nanoGPT `ckpt.pt` or a folder with one, or a Hugging Face checkpoint by
    its name or folder.

    For a LoRA run, the result is its base with the adapters merged. `whole_context` keeps the base's block size even if
    the run's was shorter. With `plain`, a LoRA run raises UserError."""
    path = Path(source)
    if (path / "config.json").exists() or is_on_hub(source):
        from acorn import hub

        name = str(path.absolute()) if path.exists() else source
        return Opened(*hub.open_model(source), f"the published weights {source}", name)
    if path.is_dir() and not step_folders(path) and (path / "ckpt.pt").exists():
        path = path / "ckpt.pt"
    if path.is_file() and path.suffix in (".safetensors", ".bin"):
        raise UserError(f"{source} is one file of a checkpoint. Give its folder: {path.parent}")
    if path.is_file():
        model, tensors, checkpoint = open_nanogpt(path)
        config, tokenizer = checkpoint.get("config"), None
        dataset = config.get("dataset") if isinstance(config, dict) else None
        with contextlib.suppress(UserError):  # nanoGPT keeps the vocabulary in the dataset's folder
            tokenizer = load_dataset(dataset).tokenizer if isinstance(dataset, str) else None
        if tokenizer is None or tokenizer.n_vocab > model.config.vocab_size:
            is_gpt2 = model.config.vocab_size in (50257, 50304)
            tokenizer = tokenizers.get_tokenizer("gpt2") if is_gpt2 else None
        if tokenizer is None:
            print(
                f"note: the vocabulary of {path} is in its dataset {dataset!r}, which was not found. Run this where "
                "data/ has it, or prepare it again.",
                file=sys.stderr,
            )
        description = f"{path}, a nanoGPT checkpoint of step {checkpoint.get('iter_num')}"
        return Opened(model, tensors, tokenizer, description, str(path.absolute()))
    folder, state = find(path, which, r)
    adapters = state.get("lora")
    if adapters and plain:
        raise UserError(
            f"{source} is a LoRA run, which cannot be the base of other adapters. First merge it with "
            f"`python -m acorn.hub export {source} FOLDER`, then use --init_from=FOLDER."
        )
    model, values = build_model(folder, state, r, whole_context)
    if adapters:
        model = empty_model({**state["config"], "block_size": model.config.block_size}, str(folder))
        values = lora.merged(values, adapters["alpha"] / adapters["rank"])
    loss = f", val loss {state['val_loss']:.4f}" if state.get("val_loss") is not None else ""
    description = f"{folder}, step {state['step']}{loss}"
    return Opened(model, values, tokenizers.from_dict(state["tokenizer"]), description, str(folder.absolute()))
