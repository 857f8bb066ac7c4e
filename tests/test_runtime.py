"""acorn/distributed/runtime.py: `auto` settings, errors, compilation, peak FLOPs, timing and memory."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import acorn
from acorn import UserError
from acorn.distributed import runtime


def test_auto_choices_work_and_are_explained():
    r = runtime.setup("auto", "auto", "auto")
    assert len(r.notes) >= 2 and all("auto" in note for note in r.notes)
    with r.autocast():
        product = torch.ones(2, 2, device=r.device) @ torch.ones(2, 2, device=r.device)
    assert product.dtype == r.dtype and product.tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_float16_on_a_cpu_becomes_float32_with_a_note():
    r = runtime.setup("cpu", "float16", False)
    assert r.dtype == torch.float32 and "float16 needs" in r.notes[1]


@pytest.mark.parametrize("device, word", [("cuda", "--device=auto"), ("cuda:7", "CUDA"), ("gpu", "unknown to torch")])
def test_unavailable_devices_are_refused(device, word):
    if torch.cuda.is_available() and device == "cuda":
        pytest.skip("this machine has CUDA")
    with pytest.raises(UserError, match=word):
        runtime.setup(device, "auto", False)


def test_one_process_uses_the_first_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("auto", "cuda"):
        r = runtime.setup(device, "auto", False)
        assert r.device == chosen.pop() == torch.device("cuda", 0)  # torch refuses a device without an index
        assert r.dtype == torch.bfloat16


def test_compile_failure_on_one_rank_disables_compilation_on_all(capsys):
    model, r = torch.nn.Linear(2, 2), runtime.setup("cpu", "float32", True)

    def failing_trial(compiled):
        assert compiled is not model
        model(torch.ones(2)).sum().backward()
        raise RuntimeError("no compiler\nand a long trace")

    assert runtime.compile_or_eager(model, failing_trial, r) is model
    assert model.weight.grad is None  # the failed pass must not count in the first update
    said = capsys.readouterr().out
    assert said.count("warning:") == 1 and "no compiler" in said and "long trace" not in said

    r.agree = lambda holds: False  # compiling fails on another rank
    assert runtime.compile_or_eager(model, lambda compiled: None, r) is model
    r.agree, r.fsdp = lambda holds: holds, True  # with FSDP, other ranks may be in the middle of a pass
    with pytest.raises(UserError, match=r"no compiler.*--compile=False"):
        runtime.compile_or_eager(model, failing_trial, r)
    assert capsys.readouterr().out == ""


def test_out_of_memory_is_not_a_compile_failure(capsys):
    def short(compiled):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes")

    model, r = torch.nn.Linear(2, 2), runtime.setup("cpu", "float32", True)
    assert runtime.compile_or_eager(model, short, r) is not model
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory"), torch.OutOfMemoryError()])
def test_scripts_report_lack_of_memory_in_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        acorn.run(main)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: out of memory. ")
    error = RuntimeError("sizes do not match")  # a programming error
    with pytest.raises(RuntimeError, match="sizes"):
        acorn.run(main)


def test_peak_flops_depend_on_the_device_name(monkeypatch):
    r = runtime.Runtime(torch.device("cuda"), torch.bfloat16, False, [], world_size=2)
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert r.peak_flops() == 2 * peak
    for name in ("An Unknown GPU", "NVIDIA RTX A1000", "NVIDIA T400 4GB", "NVIDIA RTX A4000"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert r.peak_flops() is None
    assert runtime.setup("cpu", "float32", False).peak_flops() is None


def test_stopwatch_adds_the_time_between_start_and_stop(monkeypatch):
    times = iter([1.0, 1.5, 4.0, 4.25, 9.0, 10.0])
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(times))
    watch, taken = runtime.Stopwatch(torch.device("cpu")), []
    for n in (2, 1):
        for _ in range(n):
            watch.start()
            watch.stop()
        taken.append(watch.take())
    assert taken == [0.75, 1.0] and watch.take() == 0


def test_gpu_stopwatch_adds_finished_spans_without_waiting(monkeypatch):
    passed, recorded = [0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            recorded.append(self)
            self.at = len(recorded)

        def query(self):
            return self.at <= passed[0]

        def elapsed_time(self, end):
            assert self.query() and end.query()
            return 1000.0 * (end.at - self.at)  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = runtime.Stopwatch(torch.device("cuda"))
    for _ in range(3):
        watch.start()
        watch.stop()
    assert watch.take() == 0
    passed[0] = 5
    assert watch.take() == 2.0
    passed[0] = 6
    assert watch.take() == 1.0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
def test_freed_memory_is_reused_with_few_page_faults():
    code = (
        "import resource, torch; from acorn.distributed import runtime; runtime.setup('cpu', 'float32', False)\n"
        "for i in range(20):\n"
        "    if i == 10: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    a, b = torch.ones(4 << 20), torch.ones(4 << 20); del a, b\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10 * 2 * 4096 / 4  # each tensor has 4096 pages of 4 KB; most cause no page fault
