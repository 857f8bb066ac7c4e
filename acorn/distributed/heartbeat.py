"""Detect ranks that died or hang, report them, and stop the run.

When a rank is killed or hangs, the others wait for it inside a collective until a timeout of many minutes. So a thread
of each rank writes a heartbeat into the shared store once a second, and reads those of the others. A surviving rank
reports any rank whose heartbeat or step counter stalls, and all ranks exit. A rank that reports its own error
marks its heartbeat as failed, and the others exit silently.
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

MAX_SILENT_LOOKS = 25  # seconds without a heartbeat; torchrun kills the surviving ranks 30 s after one has died
MAX_LATE_LOOKS = 540  # seconds behind the others' step; NCCL's timeout is 600
FAILURE_LOOKS = 5  # replaces both after a collective has failed, since a rank is then certainly missing
ADVICE = "All ranks stop. Use --init_from=resume to continue from the last checkpoint (torchrun --max-restarts does)."


def launchers_store() -> "torch.distributed.TCPStore | None":
    """Return torchrun's store, which outlives the ranks, or None if torchrun did not start this process."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(*address, is_master=False, timeout=timedelta(seconds=600))


@functools.cache
def launch_id() -> str | None:
    """Return an id shared by all ranks of one torchrun command, including restarts, or None without torchrun."""
    store = launchers_store()
    return None if store is None else store.compare_set("acorn/launch", "", uuid.uuid4().hex).decode()


def join(backend: str, rank: int, world_size: int) -> None:
    """Create the process group. Raises UserError if a rank does not join within ten minutes.

    torchrun keeps its store when it restarts the ranks, so keys of the previous attempt could mislead them. Each rank
    therefore writes a random word. Once all ranks have read the same words, the hash of these words is the prefix of
    the keys that they use.
    """
    store = launchers_store()
    if store is None:
        torch.distributed.init_process_group(backend)
        return

    def read(name: str) -> list[str]:
        keys = [f"acorn/{name}/{i}" for i in range(world_size)]
        return [store.get(key).decode() if store.check([key]) else "" for key in keys]

    store.set(f"acorn/word/{rank}", uuid.uuid4().hex)
    deadline, digest = time.monotonic() + 600, ""
    digests: list[str] = []
    while any(each != digest for each in digests) or not digests:
        if time.monotonic() > deadline:
            missing = ", ".join(str(i) for i, each in enumerate(digests) if each != digest)
            raise UserError(
                f"rank {missing} did not join within ten minutes. Check the output of its machine, and start again."
            )
        digest = hashlib.sha256(" ".join(read("word")).encode()).hexdigest()
        store.set(f"acorn/seen/{rank}", digest)
        digests = read("seen")
        time.sleep(0.1)
    prefixed = torch.distributed.PrefixStore(digest, store)
    torch.distributed.init_process_group(backend, store=prefixed, rank=rank, world_size=world_size)


def connect_store() -> "torch.distributed.Store":
    """Return a new connection to the ranks' key-value store, so that waiting blocks no other user of the store."""
    world = torch.distributed.group.WORLD
    assert world is not None, "the ranks have joined"
    return world.get_group_store().clone()  # type: ignore[attr-defined]  # torch's stubs lack Store.clone


class Watch:
    """Writes this rank's heartbeat into `store`, and checks those of the other ranks."""

    def __init__(self, store: "torch.distributed.Store", rank: int, world_size: int):
        self.rank, self.host = rank, socket.gethostname()
        self.step, self.beats, self.collective_failed, self.stopped = 0, 0, False, threading.Event()
        self.failed = False  # whether this rank exits with an error that it reports itself
        self.store = store
        self.keys = [f"alive/{i}" for i in range(world_size)]
        self.heartbeats: list[dict] = [{}] * world_size  # at the last look
        self.silent, self.late = [0] * world_size, [0] * world_size  # counted in looks, one per second
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.beat()

    def run(self) -> None:
        while not self.stopped.is_set():
            try:
                self.beat()
                lost = self.look()
            except RuntimeError as error:  # the process that hosts the store is gone
                lost = f"the store that the ranks share is gone ({str(error).splitlines()[0]})"
            a_rank_failed = any(each.get("failed") for each in self.heartbeats)
            if a_rank_failed and not self.stopped.wait(3):  # the failed rank exits first
                os._exit(1)
            if lost and not self.stopped.is_set():
                first = min((i for i, looks in enumerate(self.silent) if looks <= FAILURE_LOOKS), default=self.rank)
                if self.rank == first:  # one surviving rank reports
                    print(f"error: {lost}. {ADVICE}", file=sys.stderr, flush=True)
                os._exit(1)
            self.stopped.wait(1)  # counting looks, not time, keeps a rank that was paused from blaming the others

    def beat(self) -> None:
        self.beats += 1
        heartbeat = dict(beats=self.beats, step=self.step, host=self.host, process=os.getpid(), failed=self.failed)
        self.store.set(self.keys[self.rank], json.dumps(heartbeat))

    def look(self) -> str:
        """Read all heartbeats, and return a description of the lost ranks, or "" if there are none."""
        heartbeats = [json.loads(heartbeat) for heartbeat in self.store.multi_get(self.keys)]
        newest = max(each["step"] for each in heartbeats)
        for i, (beat, last_beat) in enumerate(zip(heartbeats, self.heartbeats, strict=True)):
            is_behind = beat["step"] == last_beat.get("step") < newest
            self.silent[i] = self.silent[i] + 1 if beat == last_beat else 0
            if not is_behind:
                self.late[i] = 0
            elif beat != last_beat:  # without a new heartbeat the rank counts as silent, and its lateness stays
                self.late[i] += 1
        self.heartbeats = heartbeats
        max_silent, max_late = MAX_SILENT_LOOKS, MAX_LATE_LOOKS
        if self.collective_failed:
            max_silent = max_late = FAILURE_LOOKS
        silent = [i for i, looks in enumerate(self.silent) if looks > max_silent]
        late = [i for i, looks in enumerate(self.late) if looks > max_late]
        names = [f"rank {i} (process {heartbeats[i]['process']} on {heartbeats[i]['host']})" for i in silent or late]
        if silent:
            ranks = " and ".join(names)
            return f"no heartbeat from {ranks} (killed, failed or hanging) while the others are at step {newest}"
        if late:
            step = heartbeats[late[0]]["step"]
            return f"{' and '.join(names)} hangs at step {step} while others are at step {newest}"
        return ""


_watch: Watch | None = None  # of this rank; None in a single process
cpu_group: "torch.distributed.ProcessGroup | None" = None  # all ranks over gloo, for CPU tensors; None: the default


def start(rank: int, world_size: int) -> None:
    """Start the heartbeat thread of this rank."""
    global _watch, cpu_group
    if torch.distributed.is_gloo_available():
        try:
            cpu_group = torch.distributed.new_group(backend="gloo")
        except RuntimeError as error:
            raise UserError(
                f"gloo cannot connect the ranks ({str(error).splitlines()[0]:.200}). Set GLOO_SOCKET_IFNAME to the "
                "network interface between the machines."
            ) from error
    store = connect_store()
    store.set_timeout(timedelta(seconds=MAX_SILENT_LOOKS))
    _watch = Watch(store, rank, world_size)
    store.wait(_watch.keys, timedelta(seconds=600))
    _watch.thread.start()
    atexit.register(stop)  # Python would abort if the thread were still inside the store at exit


def report_step(step: int) -> None:
    """Report to the other ranks that this rank has reached `step`."""
    if _watch is not None:
        _watch.step = step


def explain(error: BaseException) -> None:
    """If a collective failed because a rank is missing, report the missing rank and exit.

    Returns if `error` is of another kind, or if no rank is missing.
    """
    if _watch is not None and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher sends it now, but the report comes first
        _watch.collective_failed = True
        _watch.thread.join(timeout=FAILURE_LOOKS + 5)


def first_to_report(text: str) -> bool:
    """Return whether this rank is the first to report `text` under this torchrun command, restarts included.

    Errors common to all ranks are thereby printed once.
    """
    store = launchers_store()
    return store is None or store.add(f"acorn/said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1


def fail() -> None:
    """Mark this rank as failed with an error that it reports itself, so that the others exit silently."""
    if "WORLD_SIZE" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher may send it because another rank has exited
    if _watch is not None:
        with contextlib.suppress(RuntimeError):  # the thread was not started, or the store is gone
            stop()
            _watch.failed = True
            _watch.beat()


def stop() -> None:
    """Stop the heartbeat thread, because the other ranks may exit from here on."""
    if _watch is not None:
        _watch.stopped.set()
        _watch.thread.join(timeout=5)
