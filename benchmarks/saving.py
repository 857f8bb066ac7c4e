"""How long saving a checkpoint pauses training, and how long writing it in the background takes.

$ python benchmarks/saving.py --shape 12,768,12 --rounds 5

The model has GPT-2's shape and AdamW's moments. An update uses a batch of 1 x 64 tokens.
"""

import argparse
import tempfile
import time
from pathlib import Path

import bench
import torch
from bench import machine, median, table

from acorn.checkpoint import Writer
from acorn.data.tokenizer_kinds import get_tokenizer
from acorn.training.optim import make_optimizers
from model import GPT, GPTConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="12,768,12", help="layers, width, heads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default="", help="a folder on the disk to measure; default: the temporary folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", default="", help="also write the result to this file")
    args = bench.parse_args(parser)

    device = torch.device(args.device)
    L, C, H = map(int, args.shape.split(","))
    model = GPT(GPTConfig(block_size=1024, vocab_size=50304, n_layer=L, n_embd=C, n_head=H, bias=False)).to(device)
    optimizers = make_optimizers(model, "adamw", 1e-4, 0.02, 0.1, (0.9, 0.95), device.type)
    idx = torch.randint(50257, (1, 64), device=device)

    def update() -> float:
        """Make an update, and return its time in seconds."""
        start = time.perf_counter()
        model(idx, idx)[1].backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        bench.synchronize(device)
        return time.perf_counter() - start

    update()
    alone, during_save, pauses, writes = [update() for _ in range(3)], [], [], []
    n_bytes = sum(p.nbytes * 3 for p in model.parameters())  # parameters and two moments
    state = {"settings": {}, "tokenizer": get_tokenizer("byte").to_dict()}
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        writer = Writer(Path(folder), keep=1)
        for step in range(args.rounds):
            start = time.perf_counter()
            writer.save(model, optimizers, {**state, "step": step})
            pauses.append(time.perf_counter() - start)
            while not writer.writing.done():
                during_save.append(update())
            assert writer.wait()
            writes.append(time.perf_counter() - start)

    rows = [
        {"": "pause of training, first save", "seconds": f"{pauses[0]:.2f}"},
        {"": "pause of training, later saves", "seconds": f"{median(pauses[1:] or pauses):.2f}"},
        {"": "until the checkpoint is on disk", "seconds": f"{median(writes):.2f}"},
        {"": "an update, normally", "seconds": f"{median(alone):.2f}"},
        {"": "an update, while a checkpoint is written", "seconds": f"{median(during_save):.2f}"},
    ]
    print(machine(device))
    print(f"{model.num_params():,} parameters, {n_bytes / 1e9:.2f} GB with AdamW's moments\n")
    print(table(rows))
    bench.write(args.json, machine=machine(device), pauses=pauses, writes=writes, alone=alone, during_save=during_save)


if __name__ == "__main__":
    main()
