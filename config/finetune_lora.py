# A small chat model taught new answers by adapters beside its weights, which stay (LoRA).
# $ python -m acorn.examples data/examples                   # or your own {"prompt", "response"} a line
# $ python prepare chat data/examples/answers.jsonl --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct --name answers
# $ python train.py config/finetune_lora.py
# $ python sample.py --out_dir=out/lora --chat=True

out_dir = "out/lora"
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"  # or the folder of a copy
dataset = "answers"

# adapters of rank 8 beside every matrix in the blocks: 1.8% of the parameters
lora_rank = 8
lora_alpha = 16

# 8 sequences * 256 tokens = 2048 tokens an update; the examples have some 177,000, so an epoch is 87 updates
block_size = 256
batch_size = 8
gradient_accumulation_steps = 1
max_iters = 60
eval_interval = 20
eval_iters = 4

# adapters start from nothing, so they take a higher rate than weights that are good already
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 6
weight_decay = 0.0
