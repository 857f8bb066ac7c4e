# A model of GPT-2's size with the recipe of the speedruns: rotary positions, RMSNorm, squared ReLU, normalized queries
# and keys, zero-initialized blocks, Muon for the matrices, and a constant learning rate with a long linear cooldown.
# $ python prepare openwebtext
# One GPU:    $ python train.py config/gpt2_speedrun.py
# Eight GPUs: $ torchrun --standalone --nproc_per_node=8 train.py config/gpt2_speedrun.py

out_dir = "out/gpt2-speedrun"
dataset = "openwebtext"

# 32 sequences * 1024 tokens * 16 micro-batches (2 on each of 8 GPUs) = 524,288 tokens per update
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 16

# GPT-2's matrices (124M parameters with a tied head) and an untied head: 12 * 12 * 768^2 + 2 * 50304 * 768 = 162M
n_layer = 12
n_head = 6  # fewer and larger heads (128 channels)
n_embd = 768
pos = "rope"
norm = "rmsnorm"
mlp = "relu2"
qk_norm = True
tie_weights = False
zero_init = True
logit_softcap = 15.0

# 3,250 * 524,288 = 1.7 billion tokens
max_iters = 3250
optimizer = "muon"
muon_lr = 0.02
muon_split = True
learning_rate = 3e-3
lr_schedule = "wsd"
warmup_iters = 50
cooldown_frac = 0.6
min_lr = 0.0
weight_decay = 0.01
beta2 = 0.95
grad_clip = 1.0

eval_interval = 250
eval_iters = 80
log_interval = 10
