# One dial: the depth sets width, heads, Muon's rate, batch and number of updates. The losses of 2 to 6 layers follow
# one scaling law.
# $ python prepare shakespeare
# $ python train.py config/ladder.py --n_layer=2              # then 3, 4 and 5, each into its own out_dir
# $ python train.py config/ladder.py --n_layer=6 --dry_run=True    # the loss and the time of the next run

n_layer = globals().get("n_layer", 4)  # the dial, from the command line

out_dir = f"out/ladder-{n_layer}"
dataset = "plays"

# width grows with depth; heads of 32 channels
n_embd = 32 * n_layer
n_head = n_layer
pos = "rope"
mlp = "relu2"
qk_norm = True
tie_weights = False
zero_init = True

# the batch grows with the depth
block_size = 128
batch_size = 2 * n_layer
gradient_accumulation_steps = 1

# 3 tokens for each parameter of a matrix in the blocks, so that 6 layers see the plays less than twice
_matrices = 12 * n_layer * n_embd**2
max_iters = 3 * _matrices // (batch_size * block_size)

optimizer = "muon"
muon_lr = 0.04 / n_layer  # chosen by short runs with 2, 3 and 4 layers
muon_split = True
muon_momentum = 0.85
learning_rate = 1.5e-2
lr_schedule = "wsd"
warmup_iters = 20
cooldown_frac = 0.7
min_lr = 0.0
weight_decay = 0.0
beta1 = 0.7
beta2 = 0.99
embedding_std = 0.1

eval_interval = max_iters
eval_iters = 0  # the whole validation split
