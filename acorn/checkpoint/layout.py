"""The files of a checkpoint, and which of a run's checkpoints to take."""

import contextlib
import difflib
import hashlib
import json
import os
import re
import sys
from pathlib import Path

from acorn import UserError, files, printable
from acorn.distributed.runtime import ALONE, Runtime

FORMAT = 2  # of state.json; 1 had optimizer.pt, where the optimizers' state stands by number
STEP_NAME = re.compile(r"step_[0-9]{6,18}")
REPLACED = ".replaced-"  # before the name of a step folder, while the same step is saved again
PINNED = "pinned"  # a file in a step folder that has to stay
SCALER = "scale growth_factor backoff_factor growth_interval _growth_tracker".split()  # in the state of a GradScaler


class Damaged(Exception):
    """A checkpoint that is not whole; the message says what is missing."""


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
