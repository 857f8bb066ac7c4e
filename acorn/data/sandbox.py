"""A process with limits on time and memory, for the chat templates and tokenizer patterns in strangers' files.

    text = sandbox.render("the chat template", conversations=..., chat_template=..., ...)

Both can loop without end or fill the memory, inside libraries that cannot be interrupted. They run in a second process,
which is kept for later calls. Each call may take SECONDS of processor time and, on Linux, MEMORY bytes of new address
space. If a call exceeds a limit, that process ends and the call raises UserError. Windows has only the timeout WAIT.
"""

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time

from acorn import REPO, UserError

SECONDS = 5  # of processor time; a conversation takes milliseconds
WAIT = 60  # seconds; the timeout of a call, for a busy machine or a system without such limits
MEMORY = 1 << 30  # bytes
LONGEST = 1 << 26  # characters of a rendered conversation
RUN = 1 << 16  # length of the runs of one character that patterns are tried on
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")

_worker, _lock = None, threading.Lock()


def render(what: str, **arguments) -> str:
    """`transformers.utils.chat_template_utils.render_jinja_template` of one conversation, with JSON-able arguments.
    Raises UserError, which calls the template `what`, where it fails or exceeds the limits."""
    return _call(what, "render", arguments)


def check_patterns(what: str, normalizer: dict | None, pre_tokenizer: dict | None) -> None:
    """Try these parts of a tokenizer.json on long runs of letters, spaces and other characters. Raises UserError if
    they fail or exceed the limits, as regular expressions of quadratic or exponential time do."""
    _call(what, "check_patterns", dict(normalizer=normalizer, pre_tokenizer=pre_tokenizer))


# ---------------------------------------------------------------------------------------------------------------------
# The calling process


class _Worker:
    """The process with limits, and a thread that collects its answers, one JSON object a line."""

    def __init__(self):
        # sys.path[0] would be the working directory, whose modules must not be imported
        start = f"import sys; sys.path[0] = {str(REPO)!r}; from acorn.data import sandbox; sandbox.serve()"
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        env = os.environ | ONE_THREAD | {"MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen([sys.executable, "-c", start], env=env, bufsize=0, **pipes)
        self.owner, self.answers = os.getpid(), queue.SimpleQueue()
        threading.Thread(target=self.collect, args=(self.process.stdout.fileno(),), daemon=True).start()

    def collect(self, descriptor: int) -> None:
        pieces = []
        while piece := os.read(descriptor, 1 << 16):  # a file object's lock could abort Python's shutdown
            while b"\n" in piece:
                line, piece = piece.split(b"\n", 1)
                self.answers.put(b"".join([*pieces, line]))
                pieces = []
            pieces.append(piece)
        self.answers.put(None)

    def ask(self, request: bytes) -> dict | None:
        """The answer to a request; None if the process ended or the timeout passed."""
        try:
            rest = memoryview(request)
            while rest:
                rest = rest[self.process.stdin.write(rest) :]
            answer = self.answers.get(timeout=WAIT)
        except (OSError, queue.Empty):
            return None
        return None if answer is None else json.loads(answer)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()


def _call(what: str, task: str, arguments: dict) -> str:
    global _worker
    with _lock:
        if _worker is None or _worker.owner != os.getpid():  # a forked process does not share its parent's
            _worker = _Worker()
        answer = _worker.ask(json.dumps([task, arguments, SECONDS]).encode() + b"\n")
        if answer is None:
            _worker.end()
            _worker = None
    if answer is None:
        raise UserError(
            f"{what} takes more than {SECONDS} s of processor time or {MEMORY >> 30} GB of memory; use another one"
        )
    if "error" in answer:
        raise UserError(f"{what} {answer['error']}")
    return answer["value"]


# ---------------------------------------------------------------------------------------------------------------------
# The process with limits


def serve() -> None:
    """Answer the requests on standard input, one JSON array a line, until it is closed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries may print
    for line in sys.stdin.buffer:
        task, arguments, seconds = json.loads(line)
        run, failed = {
            "render": (_render, "does not take this conversation"),
            "check_patterns": (_check_patterns, "fails on a text of one character, repeated"),
        }[task]
        try:
            answer = {"value": run(seconds, **arguments)}
        except MemoryError:
            answer = {"error": f"takes more than {MEMORY >> 30} GB of memory; use another one"}
        except RecursionError:
            answer = {"error": "is nested too deeply; use another one"}
        except BaseException as error:  # among them a panic in Rust, which is no Exception
            answer = {"error": f"{failed} ({str(error) or type(error).__name__:.200})"}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _limit(seconds: int) -> None:
    """Set the limits of a call, as far as the system supports them."""
    try:
        import resource
    except ImportError:  # Windows
        return

    def limit(kind: int, most: int) -> None:
        _, hard = resource.getrlimit(kind)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))

    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + seconds)
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        limit(resource.RLIMIT_AS, taken + MEMORY)


def _render(seconds: int, **arguments) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit(seconds)
    text = render_jinja_template(**arguments)[0][0]
    if len(text) > LONGEST:
        raise ValueError(f"it makes a text of {len(text):,} characters")
    return text


def _check_patterns(seconds: int, normalizer: dict | None, pre_tokenizer: dict | None) -> None:
    import tokenizers

    _limit(seconds)
    model = {"type": "BPE", "vocab": {}, "merges": []}  # only the patterns can take more than linear time
    parts = dict(added_tokens=[], normalizer=normalizer, pre_tokenizer=pre_tokenizer, model=model)
    backend = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", **parts}))
    for char in "a !1\n\té字":
        backend.encode(char * RUN + "x.", add_special_tokens=False)
    backend.encode("It's 10 o'clock,\n  and\tall is well. " * (RUN // 32), add_special_tokens=False)
