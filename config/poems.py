# Chinese verse: a character-level GPT on Tang and Song poems. On two CPU cores, training takes about three minutes with
# AVX-512, and eight with AVX2.
# $ python prepare poems
# $ python train.py config/poems.py
# $ python sample.py --out_dir=out/poems --start="《春晓》" --stop="《"   # stops before the next poem's title

out_dir = "out/poems"
dataset = "poems"

# 12 sequences * 128 characters: a long poem fits into a sequence
batch_size = 12
block_size = 128
gradient_accumulation_steps = 1

# the architecture of config/quickstart.py with a third layer
n_layer = 3
n_head = 2
n_embd = 128
pos = "rope"
mlp = "relu2"
qk_norm = True
tie_weights = False
zero_init = True
ngram = 3
embedding_std = 0.1

max_iters = 2000
optimizer = "muon"
muon_lr = 0.02
muon_momentum = 0.85
muon_split = True
learning_rate = 1e-2
lr_schedule = "wsd"
warmup_iters = 10
cooldown_frac = 0.7
min_lr = 0.0
weight_decay = 0.0
beta1 = 0.7
beta2 = 0.99

eval_interval = 500
eval_iters = 20
