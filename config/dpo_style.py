# Teach a style by preferences: a tiny chat model learns to answer sums in a sentence instead of a bare number.
# $ python -m acorn.examples data/examples
# $ python prepare chat data/examples/sums.jsonl --tokenizer byte --name sums
# $ python train.py config/quickstart.py --dataset=sums --out_dir=out/sums --block_size=128 --max_iters=800 \
#     --cooldown_frac=0.5
# $ python prepare preferences data/examples/style.jsonl --tokenizer out/sums --name style
# $ python train.py config/dpo_style.py
# $ python sample.py --out_dir=out/style --chat=True

out_dir = "out/style"
init_from = "out/sums"
dataset = "style"
objective = "dpo"
dpo_beta = 0.5

# 16 rows * 128 tokens; a row holds one pair, with its prompt twice
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 40
eval_interval = 20
eval_iters = 2

# a low learning rate: the loss ignores what it does to all other texts
learning_rate = 1e-4
min_lr = 1e-5
warmup_iters = 6
weight_decay = 0.0
beta2 = 0.99
