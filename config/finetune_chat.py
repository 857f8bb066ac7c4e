# Fine-tune all weights of a small chat model on new answers. Only the replies are learned.
# $ python -m acorn.examples data/examples                   # or your own jsonl: one {"prompt", "response"} per line
# $ python prepare chat data/examples/answers.jsonl --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct --name answers
# $ python train.py config/finetune_chat.py
# $ python sample.py --out_dir=out/chat --chat=True

out_dir = "out/chat"
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"  # or a local folder
dataset = "answers"

# 8 rows * 256 tokens = 2048 tokens per update; the examples have about 177,000 tokens, so an epoch is 87 updates
block_size = 256
batch_size = 8
gradient_accumulation_steps = 1
max_iters = 60
eval_interval = 20
eval_iters = 4

# a low learning rate, because the weights are already good
learning_rate = 5e-5
min_lr = 5e-6
warmup_iters = 6
weight_decay = 0.0
