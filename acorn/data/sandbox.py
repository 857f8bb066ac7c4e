"""Run chat templates and tokenizer patterns from untrusted files in a process with limits on time and memory.

    text = sandbox.render("the chat template", conversations=..., chat_template=..., ...)

Both can loop forever or exhaust memory, inside libraries that cannot be interrupted. They run in a worker process that
later calls reuse. Each call may take CPU_SECONDS of CPU time and, on Linux, MEMORY bytes of additional address space.
If a call exceeds a limit, the worker exits and the call raises UserError. On Windows, only the timeout WALL_SECONDS
applies.
"""

import contextlib
import functools
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from acorn import REPO, UserError

CPU_SECONDS = 5  # CPU time of one call; a conversation takes milliseconds
WALL_SECONDS = 60  # seconds of wall-clock time per call, for a busy machine or a system without the other limits
MEMORY = 1 << 30  # bytes
MAX_CHARS = 1 << 26  # characters of a rendered conversation
MAX_REMEMBERED = 1 << 17  # bytes of a request whose answer is kept for a repetition
RUN_LENGTH = 1 << 16  # length of the runs of one character that patterns are tested on
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")

_worker, _lock = None, threading.Lock()


def render(subject: str, **arguments) -> str:
    """Return the output of transformers' `render_jinja_template` for one conversation. The arguments must be
    JSON-serializable. Raises UserError, in which `subject` names the template, if it fails or exceeds a limit."""
    return _call(subject, "render", arguments)


def check_patterns(subject: str, normalizer: dict | None, pre_tokenizer: dict | None) -> None:
    """Test these parts of a tokenizer.json on long runs of letters, spaces and other characters. Raises UserError, in
    which `subject` names the file, if they fail or exceed a limit: regular expressions can take quadratic or
    exponential time."""
    _call(subject, "check_patterns", dict(normalizer=normalizer, pre_tokenizer=pre_tokenizer))


# ---------------------------------------------------------------------------------------------------------------------
# The calling process


class _Worker:
    """The worker process, and a thread that collects its answers, one JSON object per line."""

    def __init__(self):
        # otherwise sys.path[0] is the working directory, whose modules must not be imported
        start = f"import sys; sys.path[0] = {str(REPO)!r}; from acorn.data import sandbox; sandbox.serve()"
        env = os.environ | ONE_THREAD | {"MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", start],
            env=env,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdin is not None and self.process.stdout is not None, "they are pipes"
        self.requests = self.process.stdin
        self.owner = os.getpid()
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self.collect, args=(self.process.stdout.fileno(),), daemon=True).start()

    def collect(self, descriptor: int) -> None:
        pieces: list[bytes] = []
        while piece := os.read(descriptor, 1 << 16):  # a file object's lock could abort Python's shutdown
            while b"\n" in piece:
                line, piece = piece.split(b"\n", 1)
                self.answers.put(b"".join([*pieces, line]))
                pieces = []
            pieces.append(piece)
        self.answers.put(None)

    def ask(self, request: bytes) -> dict | None:
        """Return the answer to a request; None if the process ended or the timeout passed."""
        try:
            rest = memoryview(request)
            while rest:
                rest = rest[self.requests.write(rest) :]
            answer = self.answers.get(timeout=WALL_SECONDS)
        except (OSError, queue.Empty):
            return None
        return None if answer is None else json.loads(answer)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.requests.close()


def _call(subject: str, task: str, arguments: dict) -> str:
    request = json.dumps([task, arguments, CPU_SECONDS], default=str).encode() + b"\n"
    return (_answer if len(request) <= MAX_REMEMBERED else _answer.__wrapped__)(subject, request)


@functools.lru_cache(256)  # the forms of a conversation share many renderings
def _answer(subject: str, request: bytes) -> str:
    global _worker
    with _lock:
        if _worker is None or _worker.owner != os.getpid():  # a forked process must not share its parent's worker
            _worker = _Worker()
        answer = _worker.ask(request)
        if answer is None:
            _worker.stop()
            _worker = None
    if answer is None:
        raise UserError(
            f"{subject} takes more than {CPU_SECONDS} s of CPU time or {MEMORY >> 30} GB of memory. Use another one."
        )
    if "error" in answer:
        raise UserError(f"{subject} {answer['error']}")
    return answer["value"]


# ---------------------------------------------------------------------------------------------------------------------
# The worker process


def serve() -> None:
    """Answer the requests on standard input, one JSON array per line, until it is closed."""
    tasks: dict[str, tuple[Callable, str]] = {  # each with the start of its error message
        "render": (_render, "rejects this conversation"),
        "check_patterns": (_check_patterns, "fails on a text that repeats one character"),
    }
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries may print to stdout, which carries the answers
    for line in sys.stdin.buffer:
        task, arguments, seconds = json.loads(line)
        run, failed = tasks[task]
        try:
            answer = {"value": run(seconds, **arguments)}
        except MemoryError:
            answer = {"error": f"takes more than {MEMORY >> 30} GB of memory. Use another one."}
        except RecursionError:
            answer = {"error": "is nested too deeply. Use another one."}
        except BaseException as error:  # a panic in Rust is not an Exception
            answer = {"error": f"{failed} ({str(error) or type(error).__name__:.200})"}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _limit(seconds: int) -> None:
    """Set the limits of a call that the system supports."""
    try:
        import resource
    except ImportError:  # Windows
        return

    def limit(kind: int, soft: int) -> None:
        _, hard = resource.getrlimit(kind)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))

    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + seconds)
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        limit(resource.RLIMIT_AS, used + MEMORY)


def _render(seconds: int, **arguments) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit(seconds)
    text = render_jinja_template(**arguments)[0][0]
    if len(text) > MAX_CHARS:
        raise ValueError(f"the result has {len(text):,} characters, more than {MAX_CHARS:,}")
    return text


def _check_patterns(seconds: int, normalizer: dict | None, pre_tokenizer: dict | None) -> None:
    import tokenizers

    _limit(seconds)
    model = {"type": "BPE", "vocab": {}, "merges": []}  # an empty model: only the patterns can be slower than linear
    parts: dict = dict(added_tokens=[], normalizer=normalizer, pre_tokenizer=pre_tokenizer, model=model)
    backend = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", **parts}))
    for char in "a !1\n\té字":
        backend.encode(char * RUN_LENGTH + "x.", add_special_tokens=False)
    backend.encode("It's 10 o'clock,\n  and\tall is well. " * (RUN_LENGTH // 32), add_special_tokens=False)
