# The demo: a character-level GPT on Shakespeare's plays, in a few seconds of training on two CPU cores.
# $ python prepare shakespeare
# $ python train.py config/quickstart.py                     # or --max_iters=800, for better text

out_dir = "out/quickstart"
dataset = "plays"

# 12 sequences * 64 characters = 768 characters per update; small batches allow many updates
batch_size = 12
block_size = 64
gradient_accumulation_steps = 1

# a modern architecture: rotary positions, squared ReLU, normalized queries and keys, zero-initialized blocks and head;
# few layers and large heads suit such a short run, and LayerNorm is faster than RMSNorm on a CPU
n_layer = 2
n_head = 2
n_embd = 128
pos = "rope"
mlp = "relu2"
qk_norm = True
tie_weights = False
zero_init = True

# larger initial embeddings than GPT-2's: they help with BPE, and make no clear difference with characters
embedding_std = 0.1

# add embeddings of the last two, three and four characters, which is most of what such a short run can learn
ngram = 4

# Muon for the matrices in the blocks, AdamW with a high learning rate for the rest; the rate falls linearly to zero.
# In so few updates, lower momentum helps: it averages over fewer gradients (muon_momentum, beta1)
max_iters = 80
optimizer = "muon"
muon_lr = 0.02
muon_momentum = 0.85
muon_split = True
learning_rate = 1.5e-2
lr_schedule = "wsd"
warmup_iters = 10
cooldown_frac = 0.9
min_lr = 0.0
weight_decay = 0.0
beta1 = 0.5
beta2 = 0.99

eval_interval = 40
eval_iters = 10
