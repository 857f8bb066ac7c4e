"""Tokens per second of servers: streams over HTTP against acorn's sampling loop and llama.cpp's server.

$ python benchmarks/serve.py --streams 8
$ python benchmarks/serve.py --streams 1 --max_batch 1

The model, the precisions and the contenders' processes are those of benchmarks/decode.py. A run sends --streams
requests at once, from another process, and reads their streams to the end. tokens/s divides the generated tokens of all
streams by the time of the whole run. "acorn's loop" generates the same batch without a server.
"""

import argparse
import http.client
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import bench
import decode
import torch
from bench import machine, median, table

from acorn.distributed import runtime
from acorn.inference.scheduler import prepare
from model import GPT, GPTConfig

PRECISIONS = {"fp32": ("F32", torch.float32, "none"), "bf16": ("BF16", torch.bfloat16, "none")}
PRECISIONS["int8"] = ("Q8_0", torch.float32, "int8")


def acorn_server(dtype: torch.dtype, quantize: str, max_batch: int) -> str:
    """Start the server as `python -m acorn.serve --compile=True` does, and return its address."""
    import uvicorn

    from acorn.data.tokenizer_kinds import get_tokenizer
    from acorn.inference.server import create_app

    runtime.setup("cpu", "float32", False)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**decode.SHAPES)).to(dtype).eval()
    app = create_app(prepare(model, max_batch, quantize, True), get_tokenizer("gpt2"), max_batch=max_batch)
    print(f"batches of {app.state.scheduler.row_counts} rows", file=sys.stderr)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", access_log=False))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


def llama_cpp_server(dtype: str, streams: int) -> tuple:
    server = decode.llama_cpp_server(dtype, streams)
    return server, server.listening_address.removeprefix("http://")


def ask(address: str, prompt: list[int], new: int, start: float) -> dict:
    """Read one stream to its end; return the times of its first token and its end, and the number of tokens."""
    body = dict(prompt=prompt, max_tokens=new, temperature=0, stream=True, stream_options={"include_usage": True})
    if "--llama" in sys.argv:
        body |= dict(ignore_eos=True, cache_prompt=False)
    connection = http.client.HTTPConnection(address)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer, first, usage = connection.getresponse(), None, None
    if answer.status != 200:
        raise RuntimeError(answer.read(300).decode())
    for line in answer:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - start
            usage = json.loads(line[6:]).get("usage") or usage
    return {"first": first, "whole": time.perf_counter() - start, "tokens": usage["completion_tokens"]}


def client(address: str, streams: int, prompt: int, new: int) -> None:
    """Send the requests of one run and print its figures as JSON."""
    prompts = [[(7 * i + j) % 1000 for j in range(prompt)] for i in range(streams)]
    start = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        answers = list(pool.map(lambda p: ask(address, p, new, start), prompts))
    if any(answer["tokens"] != new for answer in answers):
        raise RuntimeError(f"{[answer['tokens'] for answer in answers]} tokens instead of {new}")
    print(json.dumps({name: max(answer[name] for answer in answers) for name in ("first", "whole")}))


def over_http(address: str, args, *words) -> dict:
    command = [sys.executable, __file__, "--client", address, *words]
    command += [f"--streams={args.streams}", f"--prompt={args.prompt}", f"--new={args.new}"]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(answer.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--max_batch", type=int, default=8, help="setting of acorn's server")
    parser.add_argument("--prompt", type=int, default=16, help="tokens in each prompt")
    parser.add_argument("--new", type=int, default=100, help="tokens to generate in each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only contenders whose name contains this")
    parser.add_argument("--json", default="", help="also write the result to this file")
    parser.add_argument("--alone", default="", help=argparse.SUPPRESS)  # the contender that this process runs
    parser.add_argument("--client", default="", help=argparse.SUPPRESS)  # send requests to this address
    parser.add_argument("--llama", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds per contender, over all its rounds")
    args = bench.parse_args(parser)
    if args.client:
        return client(args.client, args.streams, args.prompt, args.new)

    def loop(dtype, quantize):
        run = decode.acorn_run(dtype, torch.device("cpu"), args.streams, quantize)
        prompts = [[(7 * i + j) % 1000 for j in range(args.prompt)] for i in range(args.streams)]
        return lambda: run(prompts, args.new)

    def acorn(dtype, quantize):
        address = acorn_server(dtype, quantize, args.max_batch)
        return lambda: over_http(address, args)

    def llama(gguf):
        server, address = llama_cpp_server(gguf, args.streams)
        return lambda server=server: over_http(address, args, "--llama")

    contenders = {}
    for name, (gguf, dtype, quantize) in PRECISIONS.items():
        contenders[f"acorn's loop, {name}"] = partial(loop, dtype, quantize)
        contenders[f"acorn's server, {name}"] = partial(acorn, dtype, quantize)
        contenders[f"llama.cpp's server, {name}"] = partial(llama, gguf)
    if args.alone:
        return bench.serve(contenders[args.alone], warm_up=1)

    print(machine(torch.device("cpu")))
    print(f"GPT-2 124M, {args.streams} streams, prompts of {args.prompt}, {args.new} new tokens")
    print(f"acorn's server with --max_batch={args.max_batch}\n")
    names, n_new = bench.chosen(contenders, args.only), args.streams * args.new
    results = bench.in_turn(names, args.rounds, args.limit, lambda figures: f"{n_new / figures['whole']:,.1f} tokens/s")
    rows, medians = [], {}
    for name, figures in results.items():
        first, whole = (median([each[key] for each in figures]) for key in ("first", "whole"))
        medians[name] = {"first": first, "tokens_per_second": n_new / whole}
        rows.append({"contender": name, "tokens/s": f"{n_new / whole:.1f}", "last first token, s": f"{first:.2f}"})
        rows[-1]["rounds"] = len(figures)
    rows += [{"contender": name, "tokens/s": "left out, see above"} for name in names if name not in results]
    print("\n" + table(rows))
    settings = dict(streams=args.streams, prompt=args.prompt, new=args.new)
    bench.write(args.json, machine=machine(torch.device("cpu")), **settings, results=medians)


if __name__ == "__main__":
    main()
