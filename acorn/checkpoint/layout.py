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
from acorn.distributed.runtime import ONE_RANK, Runtime

FORMAT = 2  # of state.json; format 1 had optimizer.pt, with the optimizer state by parameter number
STEP_NAME = re.compile(r"step_[0-9]{6,18}")
REPLACED_PREFIX = ".replaced-"  # prefix of a step folder's name while the same step is saved again
PINNED = "pinned"  # a file that marks a step folder as not to be removed
SCALER_KEYS = "scale growth_factor backoff_factor growth_interval _growth_tracker".split()  # in GradScaler.state_dict()


class Damaged(Exception):
    """An incomplete or corrupt checkpoint; the message says what is wrong."""


def is_pinned(folder: Path) -> bool:
    """Whether a step folder must not be removed, because adapters need it."""
    return os.path.lexists(folder / PINNED)


def pin(folder: Path, out_dir: Path) -> None:
    """Keep a step folder from being removed by its run, because the run in `out_dir` needs it, as the
    base of its adapters or as its reference or teacher.

    Raises UserError if its run has removed it meanwhile. If the folder is not writable, a note says that it is not
    protected. Other bases need no pin, because no run removes them."""
    if not STEP_NAME.fullmatch(folder.name):
        return
    try:
        with files.open_own(folder / PINNED, "ab") as file:
            text = f"The run in {out_dir.absolute()} needs this checkpoint. Delete this file to allow removal.\n"
            file.write(text.encode(errors="surrogateescape"))
    except FileNotFoundError as error:
        raise UserError(f"{folder} was removed by its run while it was being read. Start again.") from error
    except OSError as error:
        print(
            f"note: {folder} is needed by this run, but its own run may remove it: it cannot be marked as pinned "
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
    """Return a step folder's name, without the prefix REPLACED_PREFIX."""
    return folder.name.removeprefix(REPLACED_PREFIX)


def step_of(folder: Path) -> int:
    """Return the step number of a step folder."""
    return int(folder.name.rpartition("_")[2])


def step_folders(out_dir: Path) -> list[Path]:
    """Return the step folders in `out_dir`, newest first. A name `.replaced-step_NNNNNN` remains if a kill interrupted
    saving that step again."""
    found_folders = (*out_dir.glob(f"{REPLACED_PREFIX}step_*"), *out_dir.glob("step_*"))
    by_name = {step_name(folder): folder for folder in found_folders}  # if both exist, the one without the prefix
    return sorted((by_name[name] for name in by_name if STEP_NAME.fullmatch(name)), key=step_of, reverse=True)


def holds_run(out_dir: Path) -> bool:
    """Whether `out_dir` has a checkpoint, acorn's or nanoGPT's, that a new run there would overwrite."""
    return bool(step_folders(out_dir)) or any((out_dir / name).exists() for name in ("ckpt.pt", "state.json"))


def launched_by(out_dir: Path, launch: str) -> bool:
    """Whether a process of this launch (`heartbeat.launch_id`) saved a checkpoint in `out_dir`."""
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
    kinds: dict[str, type | tuple[type, ...]]
    kinds = dict.fromkeys(("config", "settings", "tokenizer", "scaler"), dict)
    kinds |= dict.fromkeys(("step", "position", "skipped", "bad_steps", "stale_evaluations", "shards"), count)
    kinds |= dict(seconds=(int, float), best_loss=number, val_loss=number)
    kinds |= dict(best_step=(int, type(None)), evaluated_at=(int, type(None)))
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
    numbers = [state["scaler"].get(name) for name in SCALER_KEYS] if state.get("scaler") else []
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


def source_of(init_from: str, out_dir: str) -> str:
    """Return what to load: `init_from`, or for "resume" the folder `out_dir`, which is never looked up on the hub.
    Raises UserError if there is no such folder."""
    if init_from != "resume":
        return init_from
    _check_exists(Path(out_dir))
    return out_dir


def _check_exists(out_dir: Path) -> None:
    """Raise UserError, which suggests runs, if there is no folder `out_dir`."""
    if not out_dir.is_dir():
        raise UserError(f"there is no folder {out_dir}. {_runs_near(out_dir)}")


def in_order(out_dir: Path, choice: str = "latest") -> list[Path]:
    """Return the step folders in `out_dir` in the order of preference: first `choice` ("latest", "best" or the name of
    a step folder), then the newest first. Raises UserError if there is none, or none of that name."""
    _check_exists(out_dir)
    if (out_dir / "state.json").exists():  # a step folder
        return [out_dir]
    folders = step_folders(out_dir)
    if choice in ("latest", "best"):
        first = read_pointer(out_dir / choice)
    else:
        first = next((folder for folder in folders if step_name(folder) == choice), None)
        if first is None:
            choices = ", ".join(["best", "latest", *map(step_name, folders)])
            raise UserError(f"there is no {choice} in {out_dir}. Choose one of {choices}.")
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


def find(out_dir: Path, choice: str = "latest", dist: Runtime = ONE_RANK) -> tuple[Path, dict]:
    """Return the folder and state of the first intact checkpoint in `in_order`, with a warning for each damaged one
    before it. Files are only read, because a run may be saving. Raises UserError if none is intact.

    The ranks divide the files among them, so that each file is hashed once. All must see the same `out_dir`.
    """
    folders, pointer = in_order(out_dir, choice), out_dir / choice
    if dist.is_main and choice in ("latest", "best") and pointer.exists() and not read_pointer(pointer):
        print(f"warning: {pointer} names a checkpoint that does not exist", file=sys.stderr)
    for folder in folders:
        state, is_intact = {}, True
        try:
            state = read_state(folder)
            check_files(folder, state, dist.rank, dist.world_size)
        except Damaged as damage:
            is_intact = False
            print(printable(f"warning: {damage}; trying another checkpoint"), file=sys.stderr)
        reports = dist.gather([state.get("step", -1), is_intact])
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
