# Learn from rewards: a tiny chat model has the habit of forgetting to carry, which rewards correct.
# The first three commands of config/dpo_style.py make a model that knows sums. The next two make one with the habit.
# $ python prepare chat data/examples/hasty.jsonl --tokenizer out/sums --name hasty
# $ python train.py config/quickstart.py --init_from=out/sums --dataset=hasty --out_dir=out/hasty --block_size=128 \
#     --max_iters=150 --learning_rate=1e-3 --muon_lr=0.002
# $ python train.py config/grpo_arithmetic.py
# $ python sample.py --out_dir=out/grpo --chat=True

import re as _re

out_dir = "out/grpo"
init_from = "out/hasty"
dataset = "sums"
objective = "grpo"


def reward(prompt, completion, answer):
    """Return 1 if the first number in the completion is the sum, else 0."""
    found, expected = _re.search(r"\d+", completion), _re.search(r"\d+", answer)
    return float(found is not None and found[0] == expected[0])


# 16 prompts * 16 completions per update
group_size = 16
batch_size = 64
gradient_accumulation_steps = 4
max_new_tokens = 24
block_size = 128
max_iters = 30
eval_interval = 10
eval_iters = 2

# a tenth of a usual rate for such a small model: every update follows the few completions that it sampled
learning_rate = 3e-4
min_lr = 3e-5
warmup_iters = 5
weight_decay = 0.0
beta2 = 0.99
