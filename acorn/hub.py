"""`python -m acorn.hub export`: write a run as a folder that transformers loads."""

import argparse
from pathlib import Path

import torch

from acorn import run
from acorn.checkpoint.export import export


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m acorn.hub", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    sub = commands.add_parser("export", help="write a run as a folder that transformers loads", allow_abbrev=False)
    sub.add_argument("source", help="an out_dir, a nanoGPT ckpt.pt, or any other value of init_from")
    sub.add_argument("target", type=Path, help="the folder to write, which must not exist")
    sub.add_argument(
        "--checkpoint", default="best", help="checkpoint of an out_dir: best (default), latest, or step_002000"
    )
    dtypes = ("float32", "bfloat16", "float16")
    sub.add_argument(
        "--dtype", default="float32", choices=dtypes, help="data type of the weights; default: %(default)s"
    )
    args = parser.parse_args()
    name = export(args.source, args.target, args.checkpoint, getattr(torch, args.dtype))
    print(f"wrote {name} in {args.dtype} to {args.target}")


if __name__ == "__main__":
    run(main)
