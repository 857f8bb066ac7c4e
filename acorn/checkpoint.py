"""Checkpoints: atomic to write, safe to load, exact to resume.

    out_dir/step_002000/model.safetensors   the parameters
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
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from acorn import UserError
from acorn import tokenizer as tokenizers
from acorn.shards import load_dataset
from model import GPT, GPTConfig

FORMAT = 1  # of state.json


class Damaged(Exception):
    """A checkpoint that is not whole; the message says what is missing."""


def save(out_dir: Path, model: GPT, optimizer_state: dict, state: dict, keep: int, best: bool) -> Path:
    """Write `out_dir/step_NNNNNN` for state["step"], point `latest` (and `best`) at it, and remove all but the newest
    `keep` and the best. Raises OSError where the disk does not take it; what was there before is still whole then."""
    final = out_dir / f"step_{state['step']:06d}"
    beside = out_dir / f".writing-{final.name}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        save_file(parameters(model), beside / "model.safetensors")
        torch.save(optimizer_state, beside / "optimizer.pt")
        hashes = {name: file_hash(beside / name) for name in ("model.safetensors", "optimizer.pt")}
        state = {"format": FORMAT, "config": dataclasses.asdict(model.config), **state, "sha256": hashes}
        (beside / "state.json").write_text(json.dumps(state, indent=1))
        for file in beside.iterdir():
            fsync(file)
        fsync(beside)
        if final.exists():  # the same step once more, after a resume
            os.rename(final, out_dir / f".replaced-{final.name}")
        os.rename(beside, final)
        shutil.rmtree(out_dir / f".replaced-{final.name}", ignore_errors=True)
        fsync(out_dir)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    point(out_dir / "latest", final.name)
    if best:
        point(out_dir / "best", final.name)
    stay = {read_pointer(out_dir / "best"), *(folder.name for folder in step_folders(out_dir)[:keep])}
    for folder in step_folders(out_dir):
        if folder.name not in stay:
            shutil.rmtree(folder)
    return final


def parameters(model: GPT) -> dict[str, torch.Tensor]:
    """The model's parameters by name, on the CPU; a matrix that head and embedding share, once."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}


def point(pointer: Path, name: str) -> None:
    beside = pointer.with_name(f".{pointer.name}.writing")
    beside.write_text(name + "\n")
    fsync(beside)
    os.replace(beside, pointer)
    fsync(pointer.parent)


def read_pointer(pointer: Path) -> str | None:
    try:
        name = pointer.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if (pointer.parent / name / "state.json").is_file() and Path(name).name == name else None


def fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def step_folders(out_dir: Path) -> list[Path]:
    """The checkpoints in `out_dir`, the newest first."""
    return sorted((f for f in out_dir.glob("step_*") if f.name[5:].isdigit()), key=lambda f: -int(f.name[5:]))


def holds_run(out_dir: Path) -> bool:
    return bool(step_folders(out_dir)) or (out_dir / "metrics.jsonl").exists() or (out_dir / "ckpt.pt").exists()


def remove_run(out_dir: Path) -> None:
    """Remove what a run wrote into `out_dir`, and nothing else. A nanoGPT checkpoint there stays."""
    for folder in [*step_folders(out_dir), *out_dir.glob(".*-step_*")]:
        shutil.rmtree(folder)
    for name in ("latest", "best", "metrics.jsonl", "loss.png"):
        (out_dir / name).unlink(missing_ok=True)


def read_state(folder: Path) -> dict:
    """state.json of a step folder, its files checked against their hashes. Raises Damaged."""
    try:
        state = json.loads((folder / "state.json").read_text())
        hashes = state["sha256"]
        for name in ("step", "config", "settings", "tokenizer"):
            if name not in state:
                raise Damaged(f"{folder / 'state.json'} has no {name!r}")
    except OSError as error:
        raise Damaged(f"{folder / 'state.json'} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{folder / 'state.json'} is not whole") from error
    for name in ("model.safetensors", "optimizer.pt"):
        file = folder / name
        if not file.is_file():
            raise Damaged(f"{file} is missing")
        if file_hash(file) != hashes.get(name):
            raise Damaged(f"{file} is not what was written: its SHA-256 differs from the one in state.json")
    return state


def find(out_dir: Path, which: str = "latest") -> tuple[Path, dict]:
    """The folder and the state of a whole checkpoint in `out_dir`: `which` is "latest", "best" or a folder's name.

    Where it is damaged, a sentence says so and the newest whole one before it is taken. Raises UserError where there
    is none.
    """
    if not out_dir.is_dir():
        raise UserError(f"there is no folder {out_dir}; train first, or give --out_dir where a checkpoint lies")
    if (out_dir / "state.json").exists():  # a step folder itself
        folders = [out_dir]
    else:
        first = read_pointer(out_dir / which) or which
        folders = [f for f in step_folders(out_dir) if f.name == first]
        if which.startswith("step_") and not folders:
            raise UserError(
                f"there is no {which} in {out_dir}; it has {', '.join(f.name for f in step_folders(out_dir))}"
            )
        folders += [f for f in step_folders(out_dir) if f not in folders]
    for folder in folders:
        try:
            state = read_state(folder)
            if folder != folders[0]:
                print(f"going back to {folder} instead", flush=True)
            return folder, state
        except Damaged as damage:
            print(f"warning: {damage}", flush=True)
    if folders:
        raise UserError(f"no checkpoint in {out_dir} is whole; train again with --overwrite=True")
    raise UserError(
        f"there is no checkpoint in {out_dir} yet; a run saves its first at its first evaluation and its end"
    )


def build_model(folder: Path, state: dict) -> GPT:
    """The model of a checkpoint, on the CPU in float32."""
    try:
        config = GPTConfig(**state["config"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'state.json'} describes no model of this version: {error}") from error
    try:
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / 'model.safetensors'} cannot be read: {error}") from error
    return fill(GPT(config), tensors, str(folder / "model.safetensors"))


def fill(model: GPT, tensors: dict[str, torch.Tensor], source: str) -> GPT:
    """Copy `tensors` into the model's parameters; raises UserError unless names and shapes are the model's."""
    own = dict(model.named_parameters())
    if model.config.tie_weights:
        tensors = {name: t for name, t in tensors.items() if name != "lm_head.weight"}
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        word = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which this model does not"
        raise UserError(f"{source} is a checkpoint of another shape: it {word}")
    with torch.no_grad():
        for name, p in own.items():
            if p.shape != tensors[name].shape:
                shapes = f"{list(tensors[name].shape)} instead of {list(p.shape)}"
                raise UserError(f"{source} is a checkpoint of another shape: its {name} is {shapes}")
            p.copy_(tensors[name])
    return model


def load_optimizer_state(folder: Path) -> dict:
    return torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)


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
        config = GPTConfig(**checkpoint["model_args"], mlp="gelu")  # nanoGPT trains with the exact GELU
        tensors = {name.removeprefix("_orig_mod."): t for name, t in checkpoint["model"].items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a nanoGPT checkpoint: it lacks model_args or model") from error
    return fill(GPT(config), tensors, str(path)), checkpoint


def load_model(source: str, which: str = "best") -> tuple[GPT, object, str]:
    """The model, its tokenizer (None where it is not known) and a word on what was loaded, from an acorn out_dir or
    step folder, a nanoGPT `ckpt.pt` or a folder with one, or GPT-2 weights in Hugging Face's form by name or folder."""
    path = Path(source)
    if path.is_dir() and not step_folders(path) and (path / "ckpt.pt").exists():
        path = path / "ckpt.pt"
    if path.suffix in (".pt", ".pth") or path.is_file():
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        model, checkpoint = load_nanogpt(path)
        dataset, tokenizer = checkpoint.get("config", {}).get("dataset"), None
        with contextlib.suppress(UserError):  # its vocabulary lies beside the data that it was trained on
            tokenizer = load_dataset(dataset).tokenizer if dataset else None
        if tokenizer is None and model.config.vocab_size in (50257, 50304):
            tokenizer = tokenizers.get_tokenizer("gpt2")
        return model, tokenizer, f"{path}, a nanoGPT checkpoint of step {checkpoint.get('iter_num')}"
    if source.startswith("gpt2") or (path / "config.json").exists():
        from acorn import hub

        model, tokenizer = hub.load(source)
        return model, tokenizer, f"the published weights {source}"
    folder, state = find(path, which)
    loss = f", val loss {state['val_loss']:.4f}" if state.get("val_loss") is not None else ""
    model = build_model(folder, state)
    return model, tokenizers.from_dict(state["tokenizer"]), f"{folder}, step {state['step']}{loss}"
