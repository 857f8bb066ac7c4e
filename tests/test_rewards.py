"""acorn/training/rewards.py and rollouts.py: rewards against expected values, and batches built from completions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import chat_dataset, small_model

from acorn import UserError, settings
from acorn.data import chat
from acorn.data.mixture import Mixture, load_mixture
from acorn.distributed.runtime import ONE_RANK, Runtime
from acorn.training.losses import advantages
from acorn.training.rewards import LARGEST, SHIPPED, call_reward, load_reward
from acorn.training.rollouts import Rollouts
from train import TrainSettings

CASES = [
    ("exact_match", " 42\n", "42", 1),
    ("exact_match", "42.", "42", 0),
    ("arithmetic", "3 + 4 = 7, so the sum is 7.0", "7", 1),
    ("arithmetic", "1,234 + 1 is 1,235", "1235", 1),
    ("arithmetic", "-5", "5", 0),
    ("arithmetic", "\u22125", "5", 0),
    ("arithmetic", "\u22125", "-5", 1),
    ("arithmetic", "8-3=5", "5", 1),
    ("arithmetic", "8-3", "3", 1),
    ("arithmetic", "it is .5", "5", 0),
    ("arithmetic", "it is .5.", "0.5", 1),
    ("arithmetic", "it is...5", "5", 1),
    ("arithmetic", "none", "5", 0),
    ("arithmetic", "9007199254740993", "9007199254740992", 0),  # equal as floats
    ("arithmetic", "1" * 400, "2" * 400, 0),
    ("arithmetic", "1" * 400 + ".0", "1" * 400, 1),
    ("format", "<b>yes</b>", "<b>.*</b>", 1),
    ("format", "well, <b>yes</b>", "<b>.*</b>", 0),
    ("length", "one two three", "a b c d", 0.75),
    ("length", "", "a b", 0),
    ("length", "我不知道。", "明月松间照，清泉。", 5 / 9),
    ("length", "两句\n诗\u3000。", "a b c d", 1),
    ("length", "用 GPT 写诗", "a b c d e", 0.8),
]


@pytest.mark.parametrize(("name", "completion", "answer", "value"), CASES)
def test_shipped_rewards(name, completion, answer, value):
    assert SHIPPED[name]("", completion, answer) == value


def test_config_file_can_define_the_reward(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("group_size = 4\ndef reward(prompt, completion, answer):\n    return 1 / len(completion)\n")
    given = settings.parse(TrainSettings, [str(path)])
    assert given == {"group_size": 4, "reward": str(path)}
    function, sha256 = load_reward(given["reward"])
    assert call_reward(function, str(path), "", "ab", "") == 0.5
    with pytest.raises(UserError, match="line 3: ZeroDivisionError"):
        call_reward(function, str(path), "", "", "")
    path.write_text(path.read_text().replace("1 /", "2 /"))
    assert load_reward(str(path))[1] != sha256
    path.write_text("_most = max_new_tokens\ndef reward(prompt, completion, answer):\n    return _most\n")
    assert load_reward(str(path), {"max_new_tokens": 5})[0]("", "", "") == 5  # as in a config file


@pytest.mark.parametrize(
    ("text", "words"),
    [("reward = 3", "no function"), ("def reward(a): return 1", "three parameters"), ("1 / 0", "ZeroDivisionError")],
)
def test_config_file_without_a_valid_reward_is_rejected(text, words, tmp_path):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(UserError, match=words):
        load_reward(str(tmp_path / "c.py"))


@pytest.mark.parametrize("value", [None, "1", float("nan"), float("-inf"), 1e300, -1e30, 10**400, 1j])
def test_reward_that_is_not_a_finite_number_is_rejected(value):
    with pytest.raises(UserError, match="a finite number"):
        call_reward(lambda prompt, completion, answer: value, "mine", "", "", "")


def test_largest_rewards_have_finite_advantages():
    values = torch.tensor([[LARGEST, -LARGEST, LARGEST, LARGEST]])
    for std in (False, True):
        assert advantages(values, std).isfinite().all()


@pytest.mark.parametrize("value", [True, -3, 0.5, np.float32(0.25)])
def test_reward_can_have_any_numeric_type(value):
    assert call_reward(lambda prompt, completion, answer: value, "mine", "", "", "") == value


def test_reward_that_exits_the_process_is_rejected(tmp_path):
    (tmp_path / "c.py").write_text("import sys\ndef reward(prompt, completion, answer): sys.exit(0)")
    function, _ = load_reward(str(tmp_path / "c.py"))
    with pytest.raises(UserError, match="SystemExit"):
        call_reward(function, "c.py", "", "", "")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_mixture(str(chat_dataset(tmp_path_factory.mktemp("chat"))))


def rollouts(data, reward, **changes) -> Rollouts:
    options = dict(objective="grpo", block_size=64, group_size=4, max_new_tokens=10, seed=3)
    s = TrainSettings(**{**options, "reward": "mine", **changes})
    model = small_model(block_size=64)
    return Rollouts(s, data, model, ONE_RANK, reward)


def test_batch_has_grouped_completions_with_their_advantages(data):
    """Rebuild each row from the arguments of the reward function: prompt, completion and advantage."""
    seen = []

    def reward(prompt, completion, answer):
        seen.append((prompt, completion, answer))
        return len(completion)

    (one, other), n_targets, figures = rollouts(data, reward).update(position=16, n_sequences=8, batch_size=4)
    assert len(seen) == 8 and len({prompt for prompt, _, _ in seen}) == 2
    tokenizer = data.tokenizer
    for batch, group in ((one, seen[:4]), (other, seen[4:])):
        lengths = [len(completion) for _, completion, _ in group]
        for row, (prompt, completion, answer) in enumerate(group):
            n = int(prompt.split("Say ")[1].split()[0])
            question = [{"role": "user", "content": f"Say {n} times a."}]
            ids = chat.render(tokenizer, question).tolist()
            assert answer == " ".join("a" * (n % 9 + 1)) and tokenizer.decode(ids) == prompt
            assert batch.x[row, : len(ids)].tolist() == ids
            is_target = batch.y[row] != -1
            assert int(is_target.nonzero()[0]) == len(ids) - 1
            text = tokenizer.decode(batch.y[row, is_target]).replace("<|endoftext|>", "")
            assert text.strip("\ufffd") in completion or completion in text
            advantage = len(completion) - np.mean(lengths)
            assert batch.advantages[row, is_target].tolist() == pytest.approx([advantage] * int(is_target.sum()))
            assert not batch.advantages[row, ~is_target].any()
    assert n_targets == int((one.y != -1).sum() + (other.y != -1).sum()) == figures["length"][0]
    assert figures["reward"][0] == sum(len(completion) for _, completion, _ in seen)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("most", [0, 3, 10**6])
def test_evaluation_uses_distinct_tasks_and_weights_datasets_by_share(data, world_size, most):
    """Sum over all ranks, for any number of requested tasks. Only the second dataset, with two tasks, is rewarded."""
    mixture = Mixture([data.datasets[0]] * 2, [Fraction(3, 4), Fraction(1, 4)])
    seen, second, sums = [], set(), np.zeros(2)

    def reward(prompt, completion, answer):
        seen.append(prompt)
        return 4.0 * (prompt in second)

    for rank in range(world_size):
        own = rollouts(mixture, reward)
        own.dist = Runtime(torch.device("cpu"), torch.float32, False, [], rank, world_size)
        own.usable["val"] = [own.usable["val"][0][2:], own.usable["val"][0][:2]]
        second.update(own.task("val", 1, i).prompt for i in range(2))
        sums += own.evaluate("val", 4, most)["reward"]
    n = 2 + (3 if most == 3 else len(own.usable["val"][0]))
    assert len(seen) == world_size * math.ceil(n / world_size) and len(set(seen)) == n
    assert sums.tolist() == pytest.approx([n, n])  # the weighted mean is 1


def test_rollouts_depend_only_on_the_position(data):
    same = [rollouts(data, SHIPPED["length"]).update(16, 8, size)[0] for size in (4, 8)]
    assert torch.equal(torch.cat([batch.y for batch in same[0]]), same[1][0].y)
    other = rollouts(data, SHIPPED["length"]).update(24, 8, 8)[0][0]
    assert other.y.shape != same[1][0].y.shape or not torch.equal(other.y, same[1][0].y)


def test_ranks_divide_the_groups(data):
    import dataclasses

    whole = rollouts(data, SHIPPED["length"]).update(0, 16, 4)[0]
    parts = []
    for rank in range(2):
        each = rollouts(data, SHIPPED["length"])
        each.dist = dataclasses.replace(ONE_RANK, rank=rank, world_size=2)
        parts.append(each.update(0, 16, 4)[0])
    for i, batch in enumerate(whole):
        assert torch.equal(batch.x, parts[i % 2][i // 2].x) and torch.equal(batch.y, parts[i % 2][i // 2].y)


def test_groups_without_signal_are_counted(data):
    figures = rollouts(data, lambda prompt, completion, answer: 1.0).update(0, 8, 8)[2]
    assert figures["no_signal"] == (2, 2)
