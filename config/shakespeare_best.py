# A low character-level loss on Tiny Shakespeare, in ten minutes on two CPU cores with AVX-512: about 1.44 over the
# whole validation split. nanoGPT's README reports 1.4697 for its GPU settings (config/train_shakespeare_char.py), after
# three minutes on an A100.
# $ python prepare tinyshakespeare --name shakespeare_char
# $ python train.py config/shakespeare_best.py

out_dir = "out/shakespeare_best"
dataset = "shakespeare_char"

# 8 sequences * 256 characters = 2,048 characters per update; 3,500 updates are seven epochs
batch_size = 8
block_size = 256
gradient_accumulation_steps = 1

# a small model for many epochs: 1.8 million parameters in the blocks, and n-gram tables. Without dropout, these tables
# would memorize a megabyte of text; with half of the n-grams dropped, they help
n_layer = 4
n_head = 2
n_embd = 192
pos = "rope"
mlp = "relu2"
qk_norm = True
tie_weights = False
zero_init = True
embedding_std = 0.1
dropout = 0.1
attn_dropout = 0.0
ngram = 4
ngram_rows = 32768
ngram_dropout = 0.5

max_iters = 3500
optimizer = "muon"
muon_lr = 0.02
muon_momentum = 0.85
muon_split = True
learning_rate = 5e-3
lr_schedule = "wsd"
warmup_iters = 10
cooldown_frac = 0.7
min_lr = 0.0
weight_decay = 0.0
beta1 = 0.7
beta2 = 0.99

eval_interval = 700
eval_iters = 20
