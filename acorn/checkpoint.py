"""Checkpoints: atomic to write, safe to load, exact to resume.

    out_dir/step_002000/model.safetensors   the parameters (of a LoRA run: adapters.safetensors, its adapters alone)
                        optimizer.pt        the optimizer's state, tensors and numbers only
                        state.json          settings, shape, step, losses, the tokenizer whole, SHA-256 of the others
    out_dir/latest, out_dir/best            the name of a step folder

A folder is written beside under a temporary name and renamed when it is complete, so a kill at any instant leaves the
ones before it. Reading never runs code that a file brings: only tensors, numbers and JSON are read back.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import typing
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from acorn import UserError, files, lora, settings, sharding
from acorn import tokenizer as tokenizers
from acorn.shards import load_dataset
from model import GPT, GPTConfig

FORMAT = 1  # of state.json
STEP_NAME = re.compile(r"step_[0-9]{6,18}")
PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # names on the Hugging Face hub
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # others there: owner/name


class Damaged(Exception):
    """A checkpoint that is not whole; the message says what is missing."""


def save(
    out_dir: Path, model: GPT, optimizer_state: dict, state: dict, keep: int, best: bool, tensors: dict | None = None
) -> Path:
    """Write `out_dir/step_NNNNNN` for state["step"], of a sharded model with its gathered `tensors`, point `latest`
    (and `best`) at it, and remove all but the newest `keep` and the best. Raises UserError where the disk does not take
    it; what was there before is still whole then."""
    final = out_dir / f"step_{state['step']:06d}"
    beside, replaced = out_dir / f".writing-{final.name}", out_dir / f".replaced-{final.name}"
    try:
        for leftover in (beside, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir(parents=True)
        weights = weights_name(state)
        save_file(tensors or parameters(model), beside / weights)
        torch.save(optimizer_state, beside / "optimizer.pt")
        state = {"format": FORMAT, "config": dataclasses.asdict(model.config), **state}
        hashes = {name: files.sha256(beside / name) for name in (weights, "optimizer.pt")}
        hashes["state"] = state_hash(state)
        (beside / "state.json").write_text(json.dumps({**state, "sha256": hashes}, indent=1))
        for file in beside.iterdir():
            files.sync(file)
        files.sync(beside)
        if final.exists():  # the same step once more, after a resume
            os.rename(final, replaced)
        os.rename(beside, final)
        files.sync(out_dir)
        if best:  # before `latest`, which says that all is done
            files.replace(out_dir / "best", final.name + "\n")
        files.replace(out_dir / "latest", final.name + "\n")
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(beside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"the checkpoint of step {state['step']} could not be written into {out_dir} ({reason}); those before it "
            "are whole: make room, and go on with --init_from=resume"
        ) from error
    shutil.rmtree(replaced, ignore_errors=True)
    # those beyond this step were damaged, or the run would have gone on from them
    earlier = [folder for folder in step_folders(out_dir) if step_of(folder) <= state["step"]]
    stay = {out_dir / (read_pointer(out_dir / "best") or ""), *earlier[:keep]}
    for folder in step_folders(out_dir):
        if folder not in stay or folder not in earlier:
            shutil.rmtree(folder, ignore_errors=True)
    return final


def parameters(model: GPT) -> dict[str, torch.Tensor]:
    """The model's parameters by name, on the CPU; a matrix that head and embedding share, once. Where it has adapters,
    these alone."""
    own = lora.adapters(model) or dict(model.named_parameters())
    return {name: sharding.whole(p.detach()).cpu().contiguous() for name, p in own.items()}


def weights_name(state: dict) -> str:
    """The file of a step folder that holds the parameters."""
    return "adapters.safetensors" if state.get("lora") else "model.safetensors"


def state_hash(state: dict) -> str:
    """SHA-256 (hex) of what state.json says, but for the hashes in it."""
    canonical = json.dumps({k: v for k, v in state.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_pointer(pointer: Path) -> str | None:
    """The name of the step folder that `latest` or `best` gives; None where that is not there."""
    try:
        name = pointer.read_text()[:100].strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if STEP_NAME.fullmatch(name) and (pointer.parent / name).is_dir() else None


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def step_folders(out_dir: Path) -> list[Path]:
    """The checkpoints in `out_dir`, the newest first."""
    return sorted((f for f in out_dir.glob("step_*") if STEP_NAME.fullmatch(f.name)), key=step_of, reverse=True)


def holds_run(out_dir: Path) -> bool:
    """Whether a run would be lost by another one in `out_dir`: it has a checkpoint, acorn's or nanoGPT's."""
    return bool(step_folders(out_dir)) or any((out_dir / name).exists() for name in ("ckpt.pt", "state.json"))


def launched_by(out_dir: Path, launch: str) -> bool:
    """Whether a checkpoint in `out_dir` was saved by processes of this launch (`watch.launch_id`)."""
    for folder in step_folders(out_dir):
        try:
            if json.loads((folder / "state.json").read_text()).get("launch") == launch:
                return True
        except (OSError, ValueError, AttributeError, RecursionError):  # damaged: `find` will say so
            continue
    return False


def remove_run(out_dir: Path) -> None:
    """Remove what a run wrote into `out_dir`, and nothing else. A nanoGPT checkpoint there stays."""
    for folder in [*step_folders(out_dir), *out_dir.glob(".*-step_*")]:
        shutil.rmtree(folder)
    for name in ("latest", "best", "base", "metrics.jsonl", "loss.png"):
        (out_dir / name).unlink(missing_ok=True)


def read_state(folder: Path) -> dict:
    """state.json of a step folder, all files checked against their hashes. Raises Damaged."""
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text())
        whole = state["sha256"]["state"] == state_hash(state)
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{path} is not whole") from error
    if not whole:
        raise Damaged(f"{path} is not what was written: its SHA-256 differs from the one in it")
    if state.get("format") != FORMAT:
        raise Damaged(f"{path} has format {state.get('format')!r:.20}, which this version does not read")
    # a stranger's file may be whole and still hold anything
    number, count = (int, float, type(None)), int
    kinds = dict(config=dict, settings=dict, tokenizer=dict, step=count, position=count, skipped=count, bad_steps=count)
    kinds |= dict(seconds=(int, float), best_loss=number, val_loss=number, evaluated_at=(int, type(None)))
    for name, kind in kinds.items():
        value = state.get(name)
        if name in state and (not isinstance(value, kind) or isinstance(value, bool)):
            raise Damaged(f"{path}: {name} = {value!r:.40} is not as it should be")
        if kind is count and not 0 <= state.get(name, 0) < 2**62:
            raise Damaged(f"{path}: {name} = {value!r:.40} is not as it should be")
    if missing := {"config", "settings", "tokenizer", "step"} - state.keys():
        raise Damaged(f"{path} has no {min(missing)}")
    if adapters := state.get("lora"):
        kinds = dict(rank=int, alpha=(int, float), base=str, sha256=str)
        whole = isinstance(adapters, dict) and all(isinstance(adapters.get(name), kinds[name]) for name in kinds)
        if not whole or not 0 < adapters["rank"] < 2**20:
            raise Damaged(f"{path}: lora = {adapters!r:.40} is not as it should be")
    for name in (weights_name(state), "optimizer.pt"):
        file = folder / name
        if not file.is_file():
            raise Damaged(f"{file} is missing")
        if files.sha256(file) != state["sha256"].get(name):
            raise Damaged(f"{file} is not what was written: its SHA-256 differs from the one in state.json")
    return state


def find(out_dir: Path, which: str = "latest") -> tuple[Path, dict]:
    """The folder and the state of a whole checkpoint in `out_dir`: `which` is "latest", "best" or a folder's name.

    Where it is damaged, a sentence says so and the newest whole one is taken. Raises UserError where there is none.
    """
    if not out_dir.is_dir():
        raise UserError(f"there is no folder {out_dir}; train first, or give --out_dir where a checkpoint lies")
    for moved in out_dir.glob(".replaced-step_*"):  # a kill while a step was saved again
        with contextlib.suppress(OSError):
            os.rename(moved, out_dir / moved.name.removeprefix(".replaced-"))  # fails, rightly, where the new one is
    folders = step_folders(out_dir)
    if (out_dir / "state.json").exists():  # a step folder itself
        folders, first = [out_dir], out_dir
    elif which in ("latest", "best"):
        pointer = out_dir / which
        if pointer.exists() and not read_pointer(pointer):
            print(f"warning: {pointer} names no checkpoint that is here", file=sys.stderr)
        first = out_dir / (read_pointer(pointer) or "")
    else:
        first = out_dir / which
        if first not in folders:
            there = ", ".join(["best", "latest", *(folder.name for folder in folders)])
            raise UserError(f"there is no {which} in {out_dir}; choose one of {there}")
    for folder in sorted(folders, key=lambda folder: folder != first):  # the one asked for, then the newest
        try:
            state = read_state(folder)
        except Damaged as damage:
            print(f"warning: {damage}; going back to another checkpoint", file=sys.stderr)
            continue
        return folder, state
    if folders:
        raise UserError(f"no checkpoint in {out_dir} is whole; train again with --overwrite=True")
    if (out_dir / "ckpt.pt").exists():
        raise UserError(f"{out_dir} holds a nanoGPT checkpoint; start from it with --init_from={out_dir / 'ckpt.pt'}")
    raise UserError(
        f"there is no checkpoint in {out_dir} yet: a run saves its first at its first evaluation, or at its end"
    )


def build_model(folder: Path, state: dict) -> GPT:
    """The model of a checkpoint, on the CPU in float32. That of a LoRA run has its adapters beside the weights of the
    base; a base that is not the one they were trained on is a UserError."""
    path = folder / weights_name(state)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not state.get("lora"):
        return fill(state["config"], tensors, str(path))

    adapters, moved = state["lora"], folder.parent / "base"
    base = moved.read_text().strip() if moved.is_file() else adapters["base"]
    advice = f"write where it lies into the file {moved}"
    try:
        base_of(base)  # refuses adapters, which could be their own base
        model, _, source = load_model(base)
    except UserError as error:
        raise UserError(f"{folder} holds adapters for {base}, which cannot be loaded ({error}); {advice}") from error
    if lora.fingerprint(model) != adapters["sha256"]:
        raise UserError(f"{folder} holds adapters for {adapters['base']}, but not for {source} as it is now; {advice}")
    config = empty_model(state["config"], str(path)).config
    if config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
    model.config.dropout, model.config.attn_dropout = config.dropout, config.attn_dropout
    if config != model.config:
        raise UserError(f"{path} is not for a model of the shape of {source}")
    lora.load_adapters(model, tensors, adapters["rank"], adapters["alpha"], str(path))
    return model


def base_of(source: str) -> str:
    """What adapters call the base that `load_model` makes of `source`, so that it is found again from anywhere. Raises
    UserError for a run that is made of adapters itself, whose weights exist only once it is exported."""
    path = Path(source)
    if (path / "state.json").exists() or step_folders(path):
        path, state = find(path, "best")
        if state.get("lora"):
            raise UserError(
                f"{source} is made of adapters, and adapters need a base that is whole: first make one of it by "
                f"python -m acorn.hub export {source} FOLDER, then give --init_from=FOLDER"
            )
    return str(path.absolute()) if path.exists() else source


def empty_model(shape: dict, source: str) -> GPT:
    """The model with the GPTConfig fields `shape`, on the meta device, where it takes no memory."""
    types = typing.get_type_hints(GPTConfig)
    try:
        config = GPTConfig(**{name: settings.convert(value, types[name], name) for name, value in shape.items()})
        with torch.device("meta"):
            return GPT(config)
    except (TypeError, ValueError, KeyError, OverflowError, RuntimeError, UserError) as error:
        raise UserError(f"{source} belongs to no model of this version ({error})") from error


def fill(shape: dict, tensors: dict[str, torch.Tensor], source: str) -> GPT:
    """The model with the GPTConfig fields `shape` and these parameters. Raises UserError unless their names and shapes
    are the model's, which is known before any memory is taken."""
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
    model.load_state_dict({name: t.float().contiguous() for name, t in tensors.items()}, strict=False, assign=True)
    if model.config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def load_optimizer_state(folder: Path) -> dict:
    try:
        return torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # its hash is right, so a stranger made it: a pickle of something else
        raise UserError(f"{folder / 'optimizer.pt'} is not an optimizer's state; nothing in it was run") from error


def load_nanogpt(path: Path) -> tuple[GPT, dict]:
    """The model and the rest of a nanoGPT `ckpt.pt`, loaded so that a pickle in it cannot run anything."""
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
    return fill(shape, tensors, str(path)), checkpoint


def is_on_hub(source: str) -> bool:
    """Whether `source` is to be looked for on the Hugging Face hub: GPT-2, or owner/name where no such folder is."""
    path = Path(source)
    is_name = HUB_NAME.fullmatch(source) and not path.parent.exists()  # else a path with a slip of the pen
    return not path.exists() and (source in PUBLISHED or bool(is_name))


def load_model(source: str, which: str = "best") -> tuple[GPT, object, str]:
    """The model, its tokenizer (None where it is not known) and a word on what was loaded, from an acorn out_dir or
    step folder, a nanoGPT `ckpt.pt` or a folder with one, or a Hugging Face checkpoint by its name or folder."""
    path = Path(source)
    if (path / "config.json").exists() or is_on_hub(source):
        from acorn import hub

        model, tokenizer = hub.load(source)
        return model, tokenizer, f"the published weights {source}"
    if path.is_dir() and not step_folders(path) and (path / "ckpt.pt").exists():
        path = path / "ckpt.pt"
    if path.is_file():
        model, checkpoint = load_nanogpt(path)
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
        return model, tokenizer, f"{path}, a nanoGPT checkpoint of step {checkpoint.get('iter_num')}"
    folder, state = find(path, which)
    loss = f", val loss {state['val_loss']:.4f}" if state.get("val_loss") is not None else ""
    model = lora.merge(build_model(folder, state))
    return model, tokenizers.from_dict(state["tokenizer"]), f"{folder}, step {state['step']}{loss}"
