# Learn arithmetic from rewards: a tiny chat model samples answers to sums, and right ones become more likely.
# The first three commands of config/dpo_style.py make the model to start from.
# $ python train.py config/grpo_arithmetic.py
# $ python sample.py --out_dir=out/grpo --chat=True

from acorn.training.rewards import NUMBER as _NUMBER

out_dir = "out/grpo"
init_from = "out/sums"
dataset = "sums"
objective = "grpo"


def reward(prompt, completion, answer):
    """Return 1 if the first number in the completion is the sum, 0.1 for another number, and 0 for none."""
    found, expected = _NUMBER.search(completion), _NUMBER.search(answer)
    return 0.0 if found is None else 1.0 if found[0] == expected[0] else 0.1


# 16 prompts * 16 completions per update
group_size = 16
batch_size = 64
gradient_accumulation_steps = 4
max_new_tokens = 24
block_size = 128
max_iters = 100
eval_interval = 25
eval_iters = 2

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 5
weight_decay = 0.0
beta2 = 0.99
