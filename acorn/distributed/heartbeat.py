"""Processes that train together watch one another.

When one of them is killed or hangs, the others wait for it inside a collective, which would end only with a timeout of
many minutes. So a thread of each process puts a sign of life into the store that they share, once a second, and reads
those of the others. Whose sign stays the same, or who stays behind the others' step, is named by one of those that are
left, and they end. One that ends with an error of its own leaves a sign that says so, and the others end quietly.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from datetime import timedelta

import torch

from acorn import UserError

SILENT = 25  # seconds without a sign of life; a launcher kills those that a lost process left after 30
LATE = 540  # seconds behind the others' step; NCCL gives up after 600
TROUBLE = 5  # either of them, where a collective failed already, so that someone is certainly missing
ADVICE = "all processes stop here; --init_from=resume goes on from the last checkpoint, as torchrun --max-restarts does"


def launchers_store() -> "torch.distributed.TCPStore | None":
    """The store of torchrun, which outlives the processes that it starts; None where something else started them."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(*where, is_master=False, timeout=timedelta(seconds=600))


@functools.cache
def launch_id() -> str | None:
    """What the processes that one torchrun starts have in common, restarts included; None where it started none."""
    store = launchers_store()
    return None if store is None else store.compare_set("acorn/launch", "", uuid.uuid4().hex).decode()


def join(backend: str, rank: int, world_size: int) -> None:
    """Make the process group. Raises UserError where not all processes come within ten minutes.

    torchrun keeps its store when it starts its processes again, and what their predecessors wrote there would mislead
    them. So each puts a random word into it, and they go on in a part of the store that is named by all their words,
    once all have seen the same ones.
    """
    store = launchers_store()
    if store is None:
        torch.distributed.init_process_group(backend)
        return

    def read(name: str) -> list[str]:
        keys = [f"acorn/{name}/{i}" for i in range(world_size)]
        return [store.get(key).decode() if store.check([key]) else "" for key in keys]

    store.set(f"acorn/word/{rank}", uuid.uuid4().hex)
    deadline, seen, mine = time.monotonic() + 600, [], ""
    while any(each != mine for each in seen) or not seen:
        if time.monotonic() > deadline:
            missing = ", ".join(str(i) for i, each in enumerate(seen) if each != mine)
            raise UserError(
                f"rank {missing} did not come within ten minutes; see what its machine says, and start again"
            )
        mine = hashlib.sha256(" ".join(read("word")).encode()).hexdigest()
        store.set(f"acorn/seen/{rank}", mine)
        seen = read("seen")
        time.sleep(0.1)
    part = torch.distributed.PrefixStore(mine, store)
    torch.distributed.init_process_group(backend, store=part, rank=rank, world_size=world_size)


class Watch:
    """Gives signs of life through `store`, and looks at those of the other processes."""

    def __init__(self, store: "torch.distributed.Store", rank: int, world_size: int):
        self.rank, self.host = rank, socket.gethostname()
        self.step, self.beats, self.trouble, self.over = 0, 0, False, threading.Event()
        self.failed = False  # whether this process ends with an error, which it says itself
        self.store = store
        self.keys = [f"alive/{i}" for i in range(world_size)]
        self.said = [{}] * world_size  # when last looked
        self.silent, self.late = [0] * world_size, [0] * world_size  # seconds, in looks
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.beat()

    def run(self) -> None:
        while not self.over.is_set():
            try:
                self.beat()
                lost = self.look()
            except RuntimeError as error:  # the store went with the process that kept it
                lost = f"the store that the processes share is gone ({str(error).splitlines()[0]})"
            if any(each.get("failed") for each in self.said) and not self.over.wait(3):  # who failed is to end first
                os._exit(1)
            if lost and not self.over.is_set():
                first = min((i for i, looks in enumerate(self.silent) if looks <= TROUBLE), default=self.rank)
                if self.rank == first:  # of those that are left one speaks
                    print(f"error: {lost}; {ADVICE}", file=sys.stderr, flush=True)
                os._exit(1)
            self.over.wait(1)  # who was stopped itself has not looked in that time, so it blames no one

    def beat(self) -> None:
        self.beats += 1
        sign = dict(beats=self.beats, step=self.step, host=self.host, process=os.getpid(), failed=self.failed)
        self.store.set(self.keys[self.rank], json.dumps(sign))

    def look(self) -> str:
        """Who is lost, in words; empty where none is."""
        said = [json.loads(sign) for sign in self.store.multi_get(self.keys)]
        newest = max(each["step"] for each in said)
        for i, (now, before) in enumerate(zip(said, self.said, strict=True)):
            behind = now["step"] == before.get("step") < newest
            self.silent[i] = self.silent[i] + 1 if now == before else 0
            if not behind:
                self.late[i] = 0
            elif now != before:  # silence is counted above, and does not begin the count of lateness anew
                self.late[i] += 1
        self.said = said
        silent = [i for i, looks in enumerate(self.silent) if looks > (TROUBLE if self.trouble else SILENT)]
        late = [i for i, looks in enumerate(self.late) if looks > (TROUBLE if self.trouble else LATE)]
        names = [f"rank {i} (process {said[i]['process']} on {said[i]['host']})" for i in silent or late]
        if silent:
            who = " and ".join(names)
            return f"no sign of life from {who}, killed, failed or hanging, when the others were at step {newest}"
        if late:
            return f"{' and '.join(names)} hangs at step {said[late[0]]['step']}, while others are at step {newest}"
        return ""


_watch: Watch | None = None  # this process's, where it is one of several
hosts: "torch.distributed.ProcessGroup | None" = None  # all processes, connected between CPUs; None: as the others


def start(rank: int, world_size: int) -> None:
    """Watch the others, and be watched, from here on."""
    global _watch, hosts
    if torch.distributed.is_gloo_available():
        try:
            hosts = torch.distributed.new_group(backend="gloo")
        except RuntimeError as error:
            raise UserError(
                f"gloo cannot connect the processes ({str(error).splitlines()[0]:.200}). Set GLOO_SOCKET_IFNAME to the "
                "network interface between the machines"
            ) from error
    store = torch.distributed.group.WORLD.get_group_store().clone()  # a connection of the thread's own
    store.set_timeout(timedelta(seconds=SILENT))
    _watch = Watch(store, rank, world_size)
    store.wait(_watch.keys, timedelta(seconds=600))
    _watch.thread.start()
    atexit.register(end)  # Python takes a thread that is still inside the store for a reason to abort


def note(step: int) -> None:
    """Let the others know that this process came to `step`."""
    if _watch is not None:
        _watch.step = step


def explain(error: BaseException) -> None:
    """After a collective failed: end this process with the sentence that says who is missing. Returns for an error of
    another kind, and where none is missing."""
    if _watch is not None and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the launcher sends now; first the sentence
        _watch.trouble = True
        _watch.thread.join(timeout=TROUBLE + 5)


def is_news(text: str) -> bool:
    """Whether no process that this torchrun started has said `text` yet. What all of them meet, or meet again when they
    are started again, one of them says once."""
    store = launchers_store()
    return store is None or store.add(f"acorn/said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1


def fail() -> None:
    """This process is about to end with an error of its own, which it says; the others end without a word."""
    if "WORLD_SIZE" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the launcher sends when another is gone already
    if _watch is not None:
        with contextlib.suppress(RuntimeError):  # it has not begun to watch, or the store is gone
            end()
            _watch.failed = True
            _watch.beat()


def end() -> None:
    """From here on the others may leave."""
    if _watch is not None:
        _watch.over.set()
        _watch.thread.join(timeout=5)
