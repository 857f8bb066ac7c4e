# Fine-tune GPT-2 XL to write like Shakespeare.
# $ python prepare tinyshakespeare --tokenizer gpt2 --name shakespeare
# $ python train.py config/finetune_shakespeare.py    # with --init_from=gpt2 it needs much less memory

import time

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())

dataset = "shakespeare"
init_from = "gpt2-xl"  # the largest; gpt2, gpt2-medium and gpt2-large need less memory

# save only if the val loss improves (and at the end)
always_save_checkpoint = False

# 1 sequence * 32 micro-batches * 1024 tokens = 32,768 tokens per update;
# the dataset has 301,967 training tokens, so an epoch is 9.2 updates
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# a constant learning rate
learning_rate = 3e-5
decay_lr = False
