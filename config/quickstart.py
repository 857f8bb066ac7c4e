# The demo: a character-level GPT on Shakespeare's plays, in a few seconds of training on two CPU cores.
# $ python prepare shakespeare
# $ python train.py config/quickstart.py                     # or --max_iters=2000, for a minute and better text

out_dir = "out/quickstart"
dataset = "plays"

# 12 sequences * 64 characters = 768 characters an update: small batches, so that there are many updates
batch_size = 12
block_size = 64
gradient_accumulation_steps = 1

# the modern form: rotary positions, squared ReLU, normalized queries and keys, blocks and head that start at zero;
# few layers and long heads suit so short a run, and LayerNorm is the faster norm on a CPU
n_layer = 2
n_head = 2
n_embd = 128
pos = "rope"
mlp = "relu2"
qk_norm = True
tie_weights = False
zero_init = True

# the last two, three and four characters together have embeddings too: most of what so short a run can learn
ngram = 4

# Muon for the matrices in the blocks, AdamW with a high rate for the rest; after a short hold, a straight line to zero
max_iters = 100
optimizer = "muon"
muon_lr = 0.02
learning_rate = 1.5e-2
lr_schedule = "wsd"
warmup_iters = 10
cooldown_frac = 0.9
min_lr = 0.0
weight_decay = 0.0
beta2 = 0.99

eval_interval = 50
eval_iters = 10
log_interval = 10
