# Fine-tune a small chat model on new answers with LoRA adapters. The weights of the model do not change.
# $ python -m acorn.examples data/examples                   # or your own jsonl: one {"prompt", "response"} per line
# $ python prepare chat data/examples/answers.jsonl --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct --name answers
# $ python train.py config/finetune_lora.py
# $ python sample.py --out_dir=out/lora --chat=True

out_dir = "out/lora"
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"  # or a local folder
dataset = "answers"

# adapters of rank 8 for every matrix in the blocks: 1.8% of the parameters
lora_rank = 8
lora_alpha = 16

# 8 sequences * 256 tokens = 2048 tokens per update; the examples have about 177,000 tokens, so an epoch is 87 updates
block_size = 256
batch_size = 8
gradient_accumulation_steps = 1
max_iters = 60
eval_interval = 20
eval_iters = 4

# adapters start at zero output, so they need a higher learning rate than pretrained weights
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 6
weight_decay = 0.0
