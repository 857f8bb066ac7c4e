"""A process with limits, for what a stranger's file makes run: a chat template, the patterns of a tokenizer.json.

    text = sandbox.render("the chat template", conversations=..., chat_template=..., ...)

Either may loop without end or take all memory, inside a library that cannot be interrupted. So they run in one more
process, which is kept for the next call and may take SECONDS of processor time a call. On Linux it may also take
MEMORY bytes of addresses more than it has before the call. Beyond that it ends, and the call is a UserError.
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
WAIT = 60  # seconds until a process that got no processor time, or has no such limit, is given up
MEMORY = 1 << 30  # bytes
LONGEST = 1 << 26  # characters of a rendered conversation
RUN = 1 << 16  # characters of one kind in a row, which patterns have to get through
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")

_worker, _lock = None, threading.Lock()


def render(what: str, **arguments) -> str:
    """`transformers.utils.chat_template_utils.render_jinja_template` of one conversation, with JSON-able arguments.
    Raises UserError, which calls the template `what`, where it fails or exceeds the limits."""
    return _call(what, "render", arguments)


def check_patterns(what: str, normalizer: dict | None, pre_tokenizer: dict | None) -> None:
    """Try these parts of a tokenizer.json on long runs of letters, spaces and so on. Raises UserError where they fail
    there or exceed the limits, as regular expressions do whose time grows with the square of a text, or faster."""
    _call(what, "check_patterns", dict(normalizer=normalizer, pre_tokenizer=pre_tokenizer))


# ---------------------------------------------------------------------------------------------------------------------
# The process that asks


class _Worker:
    """The other process; a thread collects what it answers, line by line."""

    def __init__(self):
        # the first place that Python looks for modules would be the folder where a person stands
        start = f"import sys; sys.path[0] = {str(REPO)!r}; from acorn import sandbox; sandbox.serve()"
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        env = os.environ | ONE_THREAD | {"MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen([sys.executable, "-c", start], env=env, bufsize=0, **pipes)
        self.owner, self.answers = os.getpid(), queue.SimpleQueue()
        threading.Thread(target=self.collect, args=(self.process.stdout.fileno(),), daemon=True).start()

    def collect(self, descriptor: int) -> None:
        pieces = []
        while piece := os.read(descriptor, 1 << 16):  # not a file object, whose lock would trouble the end of Python
            while b"\n" in piece:
                line, piece = piece.split(b"\n", 1)
                self.answers.put(b"".join([*pieces, line]))
                pieces = []
            pieces.append(piece)
        self.answers.put(None)

    def ask(self, request: bytes) -> dict | None:
        """The answer; None where the process ended, or did not answer in time."""
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
# The process that answers


def serve() -> None:
    """Answer the requests on standard input, a line of JSON each, until its end."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
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
    """Set the limits of a call, where the system has such."""
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
    model = {"type": "BPE", "vocab": {}, "merges": []}  # the patterns alone take time: what follows is linear
    parts = dict(added_tokens=[], normalizer=normalizer, pre_tokenizer=pre_tokenizer, model=model)
    backend = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", **parts}))
    for char in "a !1\n\té字":
        backend.encode(char * RUN + "x.", add_special_tokens=False)
    backend.encode("It's 10 o'clock,\n  and\tall is well. " * (RUN // 32), add_special_tokens=False)
