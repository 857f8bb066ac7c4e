"""acorn/distributed/heartbeat.py: which ranks are reported as lost."""

import pytest
import torch

from acorn.distributed.heartbeat import FAILURE_LOOKS, MAX_LATE_LOOKS, MAX_SILENT_LOOKS, Watch


@pytest.fixture
def three():
    store = torch.distributed.HashStore()
    watches = [Watch(store, rank, 3) for rank in range(3)]
    watches[0].look()
    return watches


def test_silent_rank_is_reported_after_the_timeout(three):
    for watch in three:
        watch.step = 7
        watch.beat()
    assert three[0].look() == ""
    for _ in range(MAX_SILENT_LOOKS):
        three[0].beat()
        three[2].beat()
        assert three[0].look() == ""
    three[0].beat()
    three[2].beat()
    lost = three[0].look()
    assert "rank 1 (process " in lost and "at step 7" in lost and "rank 2" not in lost


def test_failed_collective_shortens_the_timeout(three):
    three[0].collective_failed = True
    for _ in range(FAILURE_LOOKS + 2):
        three[0].beat()
        three[1].beat()
        lost = three[0].look()
    assert "no heartbeat from rank 2" in lost


def test_rank_that_falls_behind_is_reported_but_a_slow_run_is_not(three):
    def look():
        for watch in three:
            watch.beat()
        return three[0].look()

    assert all(look() == "" for _ in range(MAX_LATE_LOOKS + 10))  # one long update on all ranks
    for watch in three[:2]:
        watch.step = 4
    assert all(look() == "" for _ in range(MAX_LATE_LOOKS))
    for watch in three:  # rank 2 catches up
        watch.step = 5
    assert look() == ""
    three[0].step = three[2].step = 6
    said = []
    for i in range(MAX_LATE_LOOKS + 20):
        said.append(look())
        if i % 50 == 0:  # an extra look sees the same heartbeats twice, which must not reset the count
            said.append(three[0].look())
    assert "rank 1" in said[-1] and "hangs at step 5" in said[-1]
