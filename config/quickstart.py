# The demo: a character-level GPT on Shakespeare's plays, in about a minute on two CPU cores.
# $ python prepare shakespeare

out_dir = "out/quickstart"
dataset = "plays"

# 16 sequences * 64 characters = 1,024 characters an update
batch_size = 16
block_size = 64
gradient_accumulation_steps = 1

# the modern form: rotary positions, RMSNorm, squared ReLU, normalized queries and keys, blocks that start at zero
n_layer = 4
n_head = 4
n_embd = 128
pos = "rope"
norm = "rmsnorm"
mlp = "relu2"
qk_norm = True
tie_weights = False
zero_init = True

max_iters = 1000
learning_rate = 4e-3
lr_schedule = "wsd"
warmup_iters = 20
cooldown_frac = 0.6
min_lr = 0.0
weight_decay = 0.1
beta2 = 0.99

eval_interval = 250
eval_iters = 50
log_interval = 50
sample_interval = 500
