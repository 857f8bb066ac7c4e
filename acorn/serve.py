"""Serve a model over HTTP with OpenAI's API.

From a training run:    python -m acorn.serve --out_dir=out/quickstart
From published weights: python -m acorn.serve --init_from=gpt2 --port=9000
"""

import gc
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import acorn  # noqa: F401  # isort: skip  # before torch: it selects the OpenMP runtime


from acorn import UserError, checkpoint, printable, run, settings
from acorn.distributed import runtime
from acorn.inference import scheduler

N_TOKENS = 20_000  # `auto` compiles if this pays after so many tokens


@dataclass
class ServeSettings:
    """Serve a GPT with OpenAI's API."""

    # model
    init_from: str = "resume"  # resume: the run in out_dir | an acorn out_dir | a nanoGPT ckpt.pt | gpt2, gpt2-xl, ...
    out_dir: str = "out"  # the run's folder
    checkpoint: str = "best"  # of the run: best (or the newest if there is no best) | latest | step_002000
    name: str = ""  # the model's name in the API; default: the name of the run's folder
    # server
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: all, so that other machines can connect
    port: int = 8000  # 0: any free one
    api_key: str = ""  # key that clients must send; default: the environment variable ACORN_API_KEY, else none
    cors_origin: list[str] = field(default_factory=list)  # web site that may use the API, or *; may be repeated
    # limits
    max_batch: int = 8  # maximum number of sequences decoded at once
    max_queue: int = 64  # maximum number of waiting sequences; further requests get status 429
    cache_mb: int = 0  # MB for the KV cache, twice this while it grows; 0: enough for max_batch whole blocks
    max_new_tokens: int = 4096  # maximum tokens that a request may ask for, per choice
    # machine
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on a CPU
    quantize: Literal["none", "int8"] = "none"  # int8: one byte per weight, on CPUs only; faster, slightly less exact
    compile: Literal["auto", True, False] = "auto"  # on a CPU, torch.compile the one-token step; auto: if it is faster


def check(s: ServeSettings) -> None:
    """Raise UserError for a setting that is out of range."""
    for name, least in (("max_batch", 1), ("max_queue", 1), ("max_new_tokens", 1), ("cache_mb", 0), ("port", 0)):
        if getattr(s, name) < least:
            raise UserError(f"{name} = {getattr(s, name)} must be at least {least}")
    if s.port > 65535:
        raise UserError(f"port = {s.port} must be at most 65535")


def check_address(host: str, port: int) -> None:
    """Raise UserError if the server cannot listen at this address. uvicorn would find out after loading the model."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            if os.name == "posix":  # as asyncio does: a port may be used again right after its server has ended
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        problem = f"cannot listen on host={host}, port={port}: {error.strerror or error}"
        raise UserError(f"{problem}. Choose another --host or --port.") from error


def main() -> int:
    s = settings.build(ServeSettings, settings.parse(ServeSettings, sys.argv[1:]))
    check(s)
    check_address(s.host, s.port)
    try:
        import uvicorn

        from acorn.inference import page
        from acorn.inference.connection import Connection
        from acorn.inference.server import create_app
    except ImportError as error:
        raise UserError(f"the server needs {error.name}. Install it: pip install fastapi uvicorn") from error

    # ---- model, as in sample.py
    dist = runtime.setup(s.device, s.dtype, False)
    load_from = checkpoint.source_of(s.init_from, s.out_dir)
    model, tokenizer, source = checkpoint.load_with_tokenizer(load_from, s.checkpoint)
    model.to(dist.device, dist.dtype)
    if dist.device.type != "cpu" and s.quantize != "none":
        raise UserError(f"quantize={s.quantize} works on CPUs only. Leave it out on {dist.device}.")
    summary = f"{model.num_params():,} parameters, on {dist.device} in {runtime.dtype_name(dist.dtype)}"
    print(printable(f"{source}: {summary}"))
    model = scheduler.prepare(model, s.max_batch, s.quantize, s.compile, N_TOKENS)

    # ---- server
    app = create_app(
        model,
        tokenizer,
        s.name or Path(load_from).resolve().name,
        max_batch=s.max_batch,
        max_queue=s.max_queue,
        cache_bytes=s.cache_mb << 20,
        max_new_tokens=s.max_new_tokens,
        api_key=s.api_key or os.environ.get("ACORN_API_KEY", ""),
        cors_origins=s.cors_origin,
    )
    page.add_page(app)
    print(f"up to {s.max_batch} sequences at once, batches of {app.state.scheduler.row_counts} rows", flush=True)
    gc.freeze()  # else each full garbage collection visits all objects of the libraries, a tenth of a second
    # after finishing what runs, uvicorn raises the signal again, which then must not change the exit code
    signal.signal(signal.SIGTERM, lambda *_: None)
    server = uvicorn.Server(uvicorn.Config(app, s.host, s.port, http=Connection, log_level="info", access_log=False))
    try:
        server.run()
    finally:
        # Ctrl-C twice skips the app's shutdown. If the thread still ran while Python exits, torch would abort
        app.state.scheduler.close(finish=False)
    return 0 if server.started else 2


if __name__ == "__main__":
    run(main)
