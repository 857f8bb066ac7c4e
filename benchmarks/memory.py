"""Peak memory per process and time per update: one or several processes, DDP or FSDP, blocks kept or recomputed.

$ python benchmarks/memory.py --optimizers adamw,muon --blocks kept
$ python benchmarks/memory.py --shape 12,256,4,512,256 --batch 8 --processes 1,2

In the first example, parameters, gradients and moments dominate; in the second, activations. The global batch is the
same in all rows. Each row is a separate run of the parts of train.py on random tokens: model, initialization,
optimizer, and a few updates. A run that exceeds --limit is stopped. On a CPU, the peak is that of resident memory
(VmHWM), and a column gives the part beyond the interpreter and its libraries.
"""

import argparse
import itertools
import json
import os
import sys
import time

import bench
import torch
from bench import machine, median, synchronize, table
from torch.nn.parallel import DistributedDataParallel

from acorn.distributed import runtime, sharding
from acorn.training import autotune
from acorn.training.optim import make_optimizers
from model import GPT, GPTConfig


def worker(args: argparse.Namespace) -> None:
    """Run one rank of a row: a few updates, after which rank 0 prints the figures of all ranks as JSON."""
    r = runtime.setup(args.device, args.dtype, False, fsdp=args.form == "fsdp")
    if args.recompute:  # as in train.py
        runtime.set_malloc(lean=True)
    L, C, H, T, V = map(int, args.shape.split(","))
    seconds = []
    if args.form != "nothing":
        torch.manual_seed(0)
        with torch.device("meta" if r.fsdp else "cpu"):
            model = GPT(GPTConfig(T, V, L, H, C))
        model.activation_checkpointing = args.recompute
        rows, muon = args.batch // r.world_size, args.optimizer == "muon"
        arithmetic, _ = autotune.choose(args.dtype, model.config, rows, muon, r)
        r.dtype = arithmetic.torch_dtype
        arithmetic.apply(model)
        model = sharding.shard(model, r) if r.fsdp else model.to(r.device)
        rates = (6e-4, 0.02, 0.1, (0.9, 0.95))
        optimizers = make_optimizers(model, args.optimizer, *rates, r.device.type, arithmetic.torch_muon_dtype)
        forward = model
        if r.world_size > 1 and not r.fsdp:
            device_ids = [r.device.index] if r.device.type == "cuda" else None
            forward = DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)
        x = torch.randint(V, (rows, T), device=r.device)
        for _ in range(args.updates):
            synchronize(r.device)
            start = time.perf_counter()
            with r.autocast():
                loss = forward(x, x, reduction="sum")[1] / x.numel()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            synchronize(r.device)
            seconds.append(time.perf_counter() - start)
    peaks = [runtime.peak_memory(r.device)]
    if r.world_size > 1:
        peaks = [None] * r.world_size
        torch.distributed.all_gather_object(peaks, runtime.peak_memory(r.device))
    if r.is_main:
        print(json.dumps({"peak_bytes": peaks, "seconds": median(seconds[1:]) if seconds else None}), flush=True)
    runtime.shutdown(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,4", help="numbers of processes, a row for each")
    parser.add_argument("--shape", default="12,512,8,128,8192", help="layers, width, heads, block, vocabulary")
    parser.add_argument("--batch", type=int, default=4, help="sequences per update, on all processes together")
    parser.add_argument("--optimizers", default="adamw", help="adamw, muon, or adamw,muon")
    parser.add_argument("--blocks", default="kept,recomputed", help="activations in the backward pass; one or both")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--updates", type=int, default=4, help="updates per run; the first one does not count")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which a row is left out")
    parser.add_argument("--json", default="", help="also write the result to this file")
    parser.add_argument("--form", default="", help=argparse.SUPPRESS)  # this and the next two are for worker processes
    parser.add_argument("--optimizer", default="adamw", help=argparse.SUPPRESS)
    parser.add_argument("--recompute", action="store_true", help=argparse.SUPPRESS)
    args = bench.parse_args(parser)
    if args.form:
        return worker(args)

    cases = [("libraries only", 1, ["--form", "nothing"])]
    for optimizer, n in itertools.product(args.optimizers.split(","), map(int, args.processes.split(","))):
        for form in ("one",) if n == 1 else ("ddp", "fsdp"):
            for blocks in args.blocks.split(","):
                words = ["--form", form, "--optimizer", optimizer] + ["--recompute"] * (blocks == "recomputed")
                cases.append((f"{form}, {optimizer}, blocks {blocks}", n, words))
    with torch.device("meta"):
        L, C, H, T, V = map(int, args.shape.split(","))
        n_params = GPT(GPTConfig(T, V, L, H, C)).num_params()
    print(machine(torch.device(args.device)))
    print(f"{n_params:,} parameters, {args.batch} x {T} tokens, {args.dtype}\n")
    rows, results, libraries = [], {}, 0
    for name, n, words in cases:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
        threads = max(1, torch.get_num_threads() // n)
        command = [sys.executable, *launcher, __file__, *sys.argv[1:], *words]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        try:
            took, lines = bench.timed(command, env=env, limit=args.limit)
        except RuntimeError as error:
            print(f"{name}, {n} processes: left out ({str(error).splitlines()[-1][:100]})", flush=True)
            continue
        if took is None:
            print(f"{name}, {n} processes: stopped at its limit of {args.limit:g} s", flush=True)
            continue
        result = json.loads(next(line for _, line in lines if line.startswith('{"peak_bytes"')))
        peaks, seconds = result["peak_bytes"], result["seconds"]
        libraries = libraries or max(peaks)  # the first row has only the libraries
        row = {"processes": n, "training": name, "peak per process, MB": f"{max(peaks) / 1e6:,.0f}"}
        row["beyond the libraries"] = f"{(max(peaks) - libraries) / 1e6:,.0f}"
        row["ms per update"] = "" if seconds is None else f"{1e3 * seconds:,.0f}"
        rows.append(row)
        print(", ".join(f"{head} {value}" for head, value in row.items()), flush=True)
        results[f"{n}: {name}"] = result
    print("\n" + table(rows))
    bench.write(args.json, machine=machine(torch.device(args.device)), parameters=n_params, results=results)


if __name__ == "__main__":
    main()
