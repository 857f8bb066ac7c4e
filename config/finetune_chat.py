# A small chat model taught new answers, all of its weights; only the replies are learned.
# $ python -m acorn.examples data/examples                   # or your own {"prompt", "response"} a line
# $ python prepare chat data/examples/answers.jsonl --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct --name answers
# $ python train.py config/finetune_chat.py
# $ python sample.py --out_dir=out/chat --chat=True

out_dir = "out/chat"
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"  # or the folder of a copy
dataset = "answers"

# 8 rows * 256 tokens = 2048 tokens an update; the examples have some 177,000, so an epoch is 87 updates
block_size = 256
batch_size = 8
gradient_accumulation_steps = 1
max_iters = 60
eval_interval = 20
eval_iters = 4

# a small rate: the weights are good already
learning_rate = 5e-5
min_lr = 5e-6
warmup_iters = 6
weight_decay = 0.0
