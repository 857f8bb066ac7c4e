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

from acorn import UserError, files, printable, settings
from acorn.data import tokenizer as tokenizers
from acorn.data.shards import load_dataset
from acorn.distributed import sharding
from acorn.distributed.runtime import ALONE, Runtime
from acorn.training import lora, optim
from model import DROPOUTS, GPT, GPTConfig

FORMAT = 2  # of state.json; 1 had optimizer.pt, where the optimizers' state stands by number
STEP_NAME = re.compile(r"step_[0-9]{6,18}")
REPLACED = ".replaced-"  # before the name of a step folder, while the same step is saved again
PINNED = "pinned"  # a file in a step folder that has to stay
SCALER = "scale growth_factor backoff_factor growth_interval _growth_tracker".split()  # in the state of a GradScaler
PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # names on the Hugging Face hub
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # others there: owner/name


class Damaged(Exception):
    """A checkpoint that is not whole; the message says what is missing."""


class Opened(typing.NamedTuple):
    """A checkpoint of which no weight is read yet."""

    model: GPT  # on the meta device, where it takes no memory
    values: dict  # its parameters by name, of which rows can be asked for: tensors, or Stored, or lora.Merged
    tokenizer: tokenizers.Tokenizer | None  # None where it is not known
    source: str  # a word on it, for a person
    name: str  # by which adapters find it again from anywhere


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


def is_pinned(folder: Path) -> bool:
    """Whether a step folder has to stay, since adapters stand on it."""
    return os.path.lexists(folder / PINNED)


def pin(folder: Path, out_dir: Path) -> None:
    """Make a step folder stay, whatever its run saves after it: the adapters in `out_dir` stand on it. Raises UserError
    where its run removed it meanwhile; in a folder that cannot be written to, a note says that nothing keeps it. Other
    bases, which no run removes, need no pin."""
    if not STEP_NAME.fullmatch(folder.name):
        return
    try:
        with files.open_own(folder / PINNED, "ab") as file:
            words = f"the adapters in {out_dir.absolute()} stand on this checkpoint; without this file it may go\n"
            file.write(words.encode(errors="surrogateescape"))
    except FileNotFoundError as error:
        raise UserError(f"{folder} was removed by its run while it was read; start again") from error
    except OSError as error:
        print(f"note: {folder}, the base, may be removed by its run: {error.strerror}", file=sys.stderr)


def weights_kind(state: dict) -> str:
    """What the files of a step folder that hold the parameters are called."""
    return "adapters" if state.get("lora") else "model"


def file_names(kind: str, shards: int) -> list[str]:
    """The files, one a shard, that hold the tensors of a kind: model, adapters or optimizer."""
    if shards == 1:
        return [f"{kind}.safetensors"]
    return [f"{kind}-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]


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


def state_hash(state: dict) -> str:
    """SHA-256 (hex) of what state.json says, but for the hashes in it."""
    canonical = json.dumps({k: v for k, v in state.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_pointer(pointer: Path) -> Path | None:
    """The step folder that `latest` or `best` names; None where that is not there."""
    try:
        name = files.read_bytes(pointer, 100).decode().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return next((folder for folder in step_folders(pointer.parent) if step_name(folder) == name), None)


def step_name(folder: Path) -> str:
    return folder.name.removeprefix(REPLACED)


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("_")[2])


def step_folders(out_dir: Path) -> list[Path]:
    """The checkpoints in `out_dir`, the newest first. One is called `.replaced-step_NNNNNN` where a kill came while
    that step was saved once more."""
    both = (*out_dir.glob(f"{REPLACED}step_*"), *out_dir.glob("step_*"))
    found = {step_name(folder): folder for folder in both}  # where there are two, the latter
    return sorted((found[name] for name in found if STEP_NAME.fullmatch(name)), key=step_of, reverse=True)


def holds_run(out_dir: Path) -> bool:
    """Whether a run would be lost by another one in `out_dir`: it has a checkpoint, acorn's or nanoGPT's."""
    return bool(step_folders(out_dir)) or any((out_dir / name).exists() for name in ("ckpt.pt", "state.json"))


def launched_by(out_dir: Path, launch: str) -> bool:
    """Whether a checkpoint in `out_dir` was saved by processes of this launch (`heartbeat.launch_id`)."""
    for folder in step_folders(out_dir):
        try:
            if files.read_json(folder / "state.json").get("launch") == launch:
                return True
        except (OSError, ValueError, AttributeError):  # damaged: `find` will say so
            continue
    return False


def remove_run(out_dir: Path) -> None:
    """Remove what a run wrote into `out_dir`, and nothing else. A nanoGPT checkpoint there stays."""
    for folder in {*step_folders(out_dir), *out_dir.glob(".*-step_*")}:
        files.remove(folder)
    for name in ("latest", "best", "base", "metrics.jsonl", "loss.png"):
        (out_dir / name).unlink(missing_ok=True)


def read_state(folder: Path) -> dict:
    """state.json of a step folder. Raises Damaged where it is not what was written."""
    path = folder / "state.json"
    try:
        state = files.read_json(path)
        whole = state["sha256"]["state"] == state_hash(state)
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is not whole") from error
    if not whole:
        raise Damaged(f"{path} is not what was written: its SHA-256 differs from the one in it")
    if state.get("format") not in (1, FORMAT):
        raise Damaged(f"{path} has format {state.get('format')!r:.20}, which this version does not read")
    # a stranger's file may be whole and still hold anything
    number, count = (int, float, type(None)), int
    kinds = dict.fromkeys(("config", "settings", "tokenizer", "scaler"), dict)
    kinds |= dict.fromkeys(("step", "position", "skipped", "bad_steps", "shards"), count)
    kinds |= dict(seconds=(int, float), best_loss=number, val_loss=number, evaluated_at=(int, type(None)))
    for name, kind in kinds.items():
        value = state.get(name)
        too_large = isinstance(value, int) and abs(value) >= 2**62
        if name in state and (not isinstance(value, kind) or isinstance(value, bool) or too_large):
            raise Damaged(f"{path}: {name} = {value!r:.40} is not as it should be")
        if kind is count and not 0 <= state.get(name, 0) < 2**62:
            raise Damaged(f"{path}: {name} = {value!r:.40} is not as it should be")
    if missing := {"config", "settings", "tokenizer", "step"} - state.keys():
        raise Damaged(f"{path} has no {min(missing)}")
    shards = state.get("shards", 1)
    if not 0 < shards < 2**20:
        raise Damaged(f"{path}: shards = {shards} is not as it should be")
    numbers = [state["scaler"].get(name) for name in SCALER] if state.get("scaler") else []
    if not all(isinstance(number, (int, float)) and 0 <= number < 2**62 for number in numbers):
        raise Damaged(f"{path}: scaler is not as it should be")
    if adapters := state.get("lora"):
        kinds = dict(rank=int, alpha=(int, float), base=str, sha256=str)
        whole = isinstance(adapters, dict) and all(isinstance(adapters.get(name), kinds[name]) for name in kinds)
        if not whole or not 0 < adapters["rank"] < 2**20 or not 0 < adapters["alpha"] < 2**62:
            raise Damaged(f"{path}: lora = {adapters!r:.40} is not as it should be")
    return state


def check_files(folder: Path, state: dict, rank: int, world_size: int) -> None:
    """Compare files of a checkpoint with their hashes, of several processes each its share. Raises Damaged."""
    shards = state.get("shards", 1)
    optimizer = ["optimizer.pt"] if state["format"] == 1 else file_names("optimizer", shards)
    for name in [*file_names(weights_kind(state), shards), *optimizer][rank::world_size]:
        file = folder / name
        if not file.is_file():
            raise Damaged(f"{file} is missing")
        if files.sha256(file) != state["sha256"].get(name):
            raise Damaged(f"{file} is not what was written: its SHA-256 differs from the one in state.json")


def in_order(out_dir: Path, which: str = "latest") -> list[Path]:
    """The checkpoints in `out_dir`, in the order in which they are to be taken: the one that `which` says ("latest",
    "best" or a name), then the newest first. Raises UserError where there is none, or not that name."""
    if not out_dir.is_dir():
        raise UserError(f"there is no folder {out_dir}; {_runs_near(out_dir)}")
    if (out_dir / "state.json").exists():  # a step folder itself
        return [out_dir]
    folders = step_folders(out_dir)
    if which in ("latest", "best"):
        first = read_pointer(out_dir / which)
    else:
        first = next((folder for folder in folders if step_name(folder) == which), None)
        if first is None:
            there = ", ".join(["best", "latest", *map(step_name, folders)])
            raise UserError(f"there is no {which} in {out_dir}; choose one of {there}")
    if not folders and (out_dir / "ckpt.pt").exists():
        raise UserError(f"{out_dir} holds a nanoGPT checkpoint; start from it with --init_from={out_dir / 'ckpt.pt'}")
    if not folders and (out_dir / "adapter_config.json").exists():
        raise UserError(
            f"{out_dir} holds adapters of the library peft; merge them into their base there (merge_and_unload, then "
            "save_pretrained) and give the folder of that"
        )
    if not folders and any(out_dir.glob("*.safetensors")):
        raise UserError(f"{out_dir} holds weights without their config.json; get the checkpoint again, whole")
    if not folders:
        raise UserError(
            f"there is no checkpoint in {out_dir} yet: a run saves its first at its first evaluation, or at its end"
        )
    return sorted(folders, key=lambda folder: folder != first)


def _runs_near(out_dir: Path) -> str:
    """Advice for an out_dir that does not exist: the run whose name is nearest, else all runs beside it and in out/."""
    runs = {str(f) for parent in (out_dir.parent, Path("out")) for f in parent.glob("*") if step_folders(f)}
    if near := difflib.get_close_matches(str(out_dir), runs, 1, 0.8):
        return f"did you mean {near[0]}?"
    return f"the runs here: {', '.join(sorted(runs)[:10])}" if runs else "train first, or give the out_dir of a run"


def find(out_dir: Path, which: str = "latest", r: Runtime = ALONE) -> tuple[Path, dict]:
    """The folder and the state of the first whole checkpoint in `in_order`; of those before a sentence says what is
    wrong. Nothing is changed there, since a run may be saving. Raises UserError where none is whole.

    Several processes share the files out among them, so that each is hashed once: all must see the same `out_dir`.
    """
    folders, pointer = in_order(out_dir, which), out_dir / which
    if r.is_main and which in ("latest", "best") and pointer.exists() and not read_pointer(pointer):
        print(f"warning: {pointer} names no checkpoint that is here", file=sys.stderr)
    for folder in folders:
        state, whole = {}, True
        try:
            state = read_state(folder)
            check_files(folder, state, r.rank, r.world_size)
        except Damaged as damage:
            whole = False
            print(printable(f"warning: {damage}; going back to another checkpoint"), file=sys.stderr)
        found = r.gather([state.get("step", -1), whole])
        if len({step for step, _ in found}) > 1:
            raise UserError(f"the processes see different checkpoints in {out_dir}; all must see the same folder there")
        if all(is_whole for _, is_whole in found):
            return folder, state
    raise UserError(f"no checkpoint in {out_dir} is whole; train again with --overwrite=True")


def last_settings(out_dir: Path) -> dict:
    """The settings of a run, by the newest state.json that is whole, whatever the files beside it are; {} where none
    is, as `find` will say."""
    for folder in in_order(out_dir):
        with contextlib.suppress(Damaged):
            return read_state(folder)["settings"]
    return {}


def build_model(folder: Path, state: dict, r: Runtime = ALONE, whole_context: bool = False) -> tuple[GPT, dict]:
    """The model of a checkpoint, on the meta device, and its parameters, unread, for `fill` or `sharding.shard`. That
    of a LoRA run has its adapters beside the weights of the base, and with `whole_context` also the base's block size;
    a base that is not the one they were trained on is a UserError."""
    kind = weights_kind(state)
    path = folder / file_names(kind, state.get("shards", 1))[0]
    tensors = open_tensors(folder, state, kind)
    if not state.get("lora"):
        return fitting_model(state["config"], tensors, str(path)), tensors

    adapters, moved = state["lora"], folder.parent / "base"
    try:
        name = files.read_bytes(moved, 10_000).decode().strip() if moved.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{moved} {reason}; it should hold one path, that of the base") from error
    name = name or adapters["base"]
    advice = f"write where it lies into the file {moved}"
    try:
        base = open_model(name, plain=True, r=r)  # not adapters, which could be their own base
    except UserError as error:
        raise UserError(f"{folder} holds adapters for {name}, which cannot be loaded ({error}); {advice}") from error
    if not r.agree(not r.is_main or lora.fingerprint(base.model, base.values) == adapters["sha256"]):
        source = base.source
        raise UserError(f"{folder} holds adapters for {adapters['base']}, but not for {source} as it is now; {advice}")
    model, config = base.model, empty_model(state["config"], str(path)).config
    if whole_context:
        config.block_size = model.config.block_size
    elif config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
    for dropout in DROPOUTS:
        setattr(model.config, dropout, getattr(config, dropout))
    if config != model.config:
        raise UserError(f"{path} is not for a model of the shape of {base.source}")
    lora.fit_adapters(model, tensors, adapters["rank"], adapters["alpha"], str(path))
    return model, base.values | tensors


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


def load_optimizers(folder: Path, state: dict, model: GPT, optimizers: list[torch.optim.Optimizer]) -> None:
    """Give the optimizers of `model` what they remembered when the checkpoint was saved. Raises UserError where that
    was of another model or other optimizers."""
    if state["format"] == FORMAT:
        saved = open_tensors(folder, state, "optimizer")
    else:
        try:
            saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)["optimizers"]
        except Exception as error:  # its hash is right, so a stranger made it: a pickle of something else
            raise UserError(f"{folder / 'optimizer.pt'} is not an optimizer's state; nothing in it was run") from error
        saved = optim.name_moments(model, optimizers, saved)
        check_tensors(saved, str(folder / "optimizer.pt"))
    optim.load_moments(model, optimizers, saved)


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


def is_on_hub(source: str) -> bool:
    """Whether `source` is to be looked for on the Hugging Face hub: GPT-2, or owner/name where no such folder is."""
    path = Path(source)
    is_name = HUB_NAME.fullmatch(source) and not path.parent.exists()  # else a path with a slip of the pen
    return not path.exists() and (source in PUBLISHED or bool(is_name))


def load_model(
    source: str, which: str = "best", whole_context: bool = False
) -> tuple[GPT, tokenizers.Tokenizer | None, str]:
    """The model, on the CPU in float32, its tokenizer and a word on what was loaded, of what `open_model` opens."""
    opened = open_model(source, which, whole_context=whole_context)
    return fill(opened.model, opened.values), opened.tokenizer, opened.source


def open_model(
    source: str, which: str = "best", plain: bool = False, r: Runtime = ALONE, whole_context: bool = False
) -> Opened:
    """Open an acorn out_dir or step folder, a nanoGPT `ckpt.pt` or a folder with one, or a Hugging Face checkpoint by
    its name or folder. A run that is made of adapters is its base with them merged in, with `whole_context` also where
    the run's sequences were shorter than the base's; where the model has to be `plain`, it is a UserError."""
    path = Path(source)
    if (path / "config.json").exists() or is_on_hub(source):
        from acorn import hub

        name = str(path.absolute()) if path.exists() else source
        return Opened(*hub.open_model(source), f"the published weights {source}", name)
    if path.is_dir() and not step_folders(path) and (path / "ckpt.pt").exists():
        path = path / "ckpt.pt"
    if path.is_file() and path.suffix in (".safetensors", ".bin"):
        raise UserError(f"{source} is one file of a checkpoint; give the folder that holds it, {path.parent}")
    if path.is_file():
        model, tensors, checkpoint = open_nanogpt(path)
        config, tokenizer = checkpoint.get("config"), None
        dataset = config.get("dataset") if isinstance(config, dict) else None
        with contextlib.suppress(UserError):  # its vocabulary lies beside the data that it was trained on
            tokenizer = load_dataset(dataset).tokenizer if isinstance(dataset, str) else None
        if tokenizer is None or tokenizer.n_vocab > model.config.vocab_size:
            is_gpt2 = model.config.vocab_size in (50257, 50304)
            tokenizer = tokenizers.get_tokenizer("gpt2") if is_gpt2 else None
        if tokenizer is None:
            print(
                f"note: the vocabulary of {path} lies with its dataset {dataset!r}, which is not here; "
                "run this where data/ holds it, or prepare it again",
                file=sys.stderr,
            )
        word = f"{path}, a nanoGPT checkpoint of step {checkpoint.get('iter_num')}"
        return Opened(model, tensors, tokenizer, word, str(path.absolute()))
    folder, state = find(path, which, r)
    adapters = state.get("lora")
    if adapters and plain:
        raise UserError(
            f"{source} is made of adapters, and adapters need a base that is whole: first make one of it by "
            f"python -m acorn.hub export {source} FOLDER, then give --init_from=FOLDER"
        )
    model, values = build_model(folder, state, r, whole_context)
    if adapters:
        model = empty_model({**state["config"], "block_size": model.config.block_size}, str(folder))
        values = lora.merged(values, adapters["alpha"] / adapters["rank"])
    loss = f", val loss {state['val_loss']:.4f}" if state.get("val_loss") is not None else ""
    word = f"{folder}, step {state['step']}{loss}"
    return Opened(model, values, tokenizers.from_dict(state["tokenizer"]), word, str(folder.absolute()))
