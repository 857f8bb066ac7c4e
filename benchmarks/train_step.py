"""Time and tokens/s of a training step: acorn, Hugging Face GPT-2 and nanoGPT on the same shapes.

$ python benchmarks/train_step.py --nanogpt PATH_OF_A_CHECKOUT --shape 6,384,6,8,256

A step is forward, backward, gradient clipping and AdamW on one batch. acorn's "modern" architecture uses Muon for the
matrices. The others use exact GELU, as nanoGPT does. Contenders run in separate processes, whose peak memory is shown,
and take turns of half a second or one step. A contender that exceeds --limit is stopped; its finished rounds count, or
its warm-up as one round. With --documents 4, acorn is also timed with document_mask=True and four documents per row;
with --lora 8, also with lora_rank=8.
"""

import argparse
import contextlib
import importlib.util
import io
import time
from pathlib import Path

import bench
import torch
from bench import in_turn, machine, matmul_rate, median, synchronize, table

from acorn.distributed import runtime
from acorn.training import autotune, lora
from acorn.training.optim import make_optimizers
from model import GPT, GPTConfig

EXACT = dict(mlp="gelu")
TURN_SECONDS = 0.5  # a turn takes at least so long, and counts with the median of its steps
MODERN = dict(pos="rope", norm="rmsnorm", mlp="relu2", qk_norm=True, tie_weights=False, zero_init=True)


def step_of(model, forward, optimizers, dtype, device):
    """Return a function that makes one training step and returns its measurements. `forward` returns the loss."""

    def update() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = forward()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    def step() -> dict:
        update()  # the caches hold another contender's data, and on a GPU memory was freed
        times: list[float] = []
        while sum(times) < TURN_SECONDS:
            synchronize(device)
            start = time.perf_counter()
            update()
            synchronize(device)
            times.append(time.perf_counter() - start)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # leave room on the GPU for the next contender
        return {"seconds": median(times), "peak_bytes": runtime.peak_memory(device)}

    return step


def acorn_step(shape, modern, dtype, compile, x, y, documents=None, rank=0):
    L, C, H, B, T, V = shape
    runtime.setup(str(x.device), str(dtype).removeprefix("torch."), compile)  # as train.py does
    switches = MODERN if modern else EXACT
    torch.manual_seed(0)
    model = GPT(GPTConfig(T, V, L, H, C, bias=False, **switches)).to(x.device)
    if rank:
        lora.add_adapters(model, lora.linear_layers(model), rank, 2.0 * rank)
        model.load_state_dict(lora.initial_adapters(model, seed=0), strict=False)
    arithmetic = autotune.fix_arithmetic(dtype, model.config, x.device)  # as in train.py with an explicit dtype
    arithmetic.apply(model)
    optimizer, rates = "muon" if modern else "adamw", (6e-4, 0.02, 0.1, (0.9, 0.95))
    optimizers = make_optimizers(model, optimizer, *rates, x.device.type, arithmetic.torch_muon_dtype)
    forward = torch.compile(model) if compile else model

    def loss():
        return forward(x, y, documents=documents, reduction="sum")[1] / (B * T)

    return step_of(model, loss, optimizers, dtype, x.device)


def hugging_face_step(shape, dtype, x, y):
    import transformers

    transformers.logging.set_verbosity_error()
    L, C, H, _, T, V = shape
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=H, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    config.activation_function = "gelu"
    model = transformers.GPT2LMHeadModel(config).to(x.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 6e-4, (0.9, 0.95), weight_decay=0.1, fused=True)
    return step_of(model, lambda: model(x, labels=x).loss, [optimizer], dtype, x.device)


def nanogpt_step(path, shape, dtype, compile, x, y):
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(path) / "model.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    L, C, H, _, T, V = shape
    with contextlib.redirect_stdout(io.StringIO()):
        model = theirs.GPT(theirs.GPTConfig(T, V, L, H, C, dropout=0.0, bias=False)).to(x.device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), x.device.type)
    forward = torch.compile(model) if compile else model
    return step_of(model, lambda: forward(x, y)[1], [optimizer], dtype, x.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", help="folder of a nanoGPT checkout")
    parser.add_argument("--shape", default="6,384,6,8,256", help="layers, width, heads, batch, block")
    parser.add_argument("--vocab", type=int, default=65)
    parser.add_argument("--documents", type=int, default=0, help="also time this many documents per row; 0: do not")
    parser.add_argument("--lora", type=int, default=0, help="also time LoRA adapters of this rank; 0: do not")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--only", default="", help="only contenders whose name contains this")
    parser.add_argument("--alone", default="", help=argparse.SUPPRESS)  # the contender that this process runs
    parser.add_argument("--json", default="", help="also write the result to this file")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds per contender, over all its rounds")
    args = bench.parse_args(parser)

    device = torch.device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    shape = (*map(int, args.shape.split(",")), args.vocab)
    L, C, H, B, T, V = shape
    idx = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(device)
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    documents = (torch.arange(T, device=device) * args.documents // T).expand(B, T)
    dtypes = {name: {"fp32": torch.float32, "bf16": torch.bfloat16}[name] for name in args.dtypes.split(",")}
    contenders = {}
    for name, dtype in dtypes.items():
        for mode, compile in (("eager", False), ("compiled", True)):
            for form, modern in (("GPT-2", False), ("modern", True)):
                make = lambda d=dtype, c=compile, m=modern: acorn_step(shape, m, d, c, x, y)  # noqa: E731
                contenders[f"acorn {form}, {name} {mode}"] = make
                if args.documents:
                    make = lambda d=dtype, c=compile, m=modern: acorn_step(shape, m, d, c, x, y, documents)  # noqa: E731
                    contenders[f"acorn {form}, {name} {mode}, document mask"] = make
                if args.lora:
                    make = lambda d=dtype, c=compile, m=modern: acorn_step(shape, m, d, c, x, y, None, args.lora)  # noqa: E731
                    contenders[f"acorn {form}, {name} {mode}, LoRA {args.lora}"] = make
            # on a CPU, nanoGPT ignores its dtype and runs in float32
            if args.nanogpt and (dtype == torch.float32 or device.type == "cuda"):
                make = lambda d=dtype, c=compile: nanogpt_step(args.nanogpt, shape, d, c, x, y)  # noqa: E731
                contenders[f"nanoGPT, {name} {mode}"] = make
        contenders[f"Hugging Face, {name} eager"] = lambda d=dtype: hugging_face_step(shape, d, x, y)
    if args.alone:
        return bench.serve(contenders[args.alone])

    print(machine(device))
    print(f"{L} layers, {C} wide, {H} heads, {B} x {T} tokens, vocabulary {V}; medians of {args.rounds} rounds\n")
    names = bench.chosen(contenders, args.only)
    rounds = in_turn(names, args.rounds, args.limit, lambda figures: f"{1e3 * figures['seconds']:,.1f} ms per step")
    seconds = {name: median([each["seconds"] for each in figures]) for name, figures in rounds.items()}
    peers = [s for name, s in seconds.items() if name.startswith("nanoGPT")]
    with torch.device("meta"):
        flops = GPT(GPTConfig(T, V, L, H, C, bias=False)).flops_per_token() * B * T
    peak = {name: matmul_rate(device, dtype) for name, dtype in dtypes.items()}
    rows = []
    for name, s in sorted(seconds.items(), key=lambda item: item[1]):
        row = {"contender": name, "ms per step": f"{1e3 * s:.1f}", "tokens/s": f"{B * T / s:,.0f}"}
        if peers:
            row["x nanoGPT's best"] = f"{min(peers) / s:.2f}"
        row["peak memory, MB"] = f"{max(each['peak_bytes'] for each in rounds[name]) / 1e6:,.0f}"
        row["of the matmul rate"] = f"{flops / s / peak['bf16' if 'bf16' in name else 'fp32']:.0%}"
        row["rounds"] = len(rounds[name])
        rows.append(row)
    missing = [{"contender": name, "ms per step": "left out, see above"} for name in names if name not in rounds]
    print("\n" + table(rows + missing))
    print("\nmatmul rate: " + ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in peak.items()))
    results = {
        row["contender"]: {"seconds": seconds[row["contender"]], "tokens_per_second": B * T / seconds[row["contender"]]}
        | {"note": f"{row['of the matmul rate']} of the matmul rate, {row['peak memory, MB']} MB"}
        for row in rows
    }
    bench.write(args.json, machine=machine(device), shape=args.shape, results=results, matmul_rate=peak)


if __name__ == "__main__":
    main()
