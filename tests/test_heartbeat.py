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


def test_a_process_without_signs_of_life_is_named_once_the_patience_is_over(three):
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


def test_after_a_failed_collective_the_patience_is_short(three):
    three[0].collective_failed = True
    for _ in range(FAILURE_LOOKS + 2):
        three[0].beat()
        three[1].beat()
        lost = three[0].look()
    assert "no heartbeat from rank 2" in lost


def test_a_process_that_lives_and_stays_behind_is_named_and_a_slow_run_is_not(three):
    def look():
        for watch in three:
            watch.beat()
        return three[0].look()

    assert all(look() == "" for _ in range(MAX_LATE_LOOKS + 10))  # an update of ten minutes
    for watch in three[:2]:
        watch.step = 4
    assert all(look() == "" for _ in range(MAX_LATE_LOOKS))
    for watch in three:  # it came after all
        watch.step = 5
    assert look() == ""
    three[0].step = three[2].step = 6
    said = []
    for i in range(MAX_LATE_LOOKS + 20):
        said.append(look())
        if i % 50 == 0:  # who looks more often than the others beat sees the same sign twice now and then
            said.append(three[0].look())
    assert "rank 1" in said[-1] and "hangs at step 5" in said[-1]
