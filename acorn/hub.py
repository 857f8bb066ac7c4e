"""`python -m acorn.hub export`: write a run as a folder for transformers, or as a GGUF file for llama.cpp."""

import argparse
from pathlib import Path

import torch

from acorn import UserError, run
from acorn.checkpoint.export import check_new, export
from acorn.checkpoint.gguf_file import TYPES, export_gguf


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m acorn.hub", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    sub = commands.add_parser("export", help="write a run for transformers or llama.cpp", allow_abbrev=False)
    sub.add_argument("source", help="an out_dir, a nanoGPT ckpt.pt, or any other value of init_from")
    sub.add_argument("target", type=Path, nargs="?", help="the folder to write for transformers, which must not exist")
    sub.add_argument("--gguf", type=Path, metavar="FILE", help="the GGUF file to write for llama.cpp")
    sub.add_argument(
        "--checkpoint", default="best", help="checkpoint of an out_dir: best (default), latest, or step_002000"
    )
    sub.add_argument(
        "--dtype",
        default="float32",
        choices=list(TYPES),
        help="data type of the weights; q8_0 (8 bits) only with --gguf; default: %(default)s",
    )
    args = parser.parse_args()
    if args.target is None and args.gguf is None:
        raise UserError("there is nothing to write. Give a folder for transformers, or --gguf FILE for llama.cpp.")
    if args.target is not None and args.dtype == "q8_0":
        raise UserError("--dtype q8_0 is only for GGUF. Leave the folder out, or use --dtype float16.")
    for target in filter(None, (args.target, args.gguf)):
        check_new(target)  # both, before one of them is written
    if args.target is not None:
        name = export(args.source, args.target, args.checkpoint, getattr(torch, args.dtype))
        print(f"wrote {name} in {args.dtype} to {args.target}")
    if args.gguf is not None:
        name = export_gguf(args.source, args.gguf, args.checkpoint, args.dtype)
        print(f"wrote {name} in {args.dtype} to {args.gguf}")


if __name__ == "__main__":
    run(main)
