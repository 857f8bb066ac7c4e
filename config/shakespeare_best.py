# A low loss on Tiny Shakespeare by character, in less than ten minutes on two CPU cores. For comparison, nanoGPT's
# settings for a GPU (config/train_shakespeare_char.py) end at 1.4697, in three minutes on an A100.
# $ python prepare tinyshakespeare --name shakespeare_char
# $ python train.py config/shakespeare_best.py

out_dir = "out/shakespeare_best"
dataset = "shakespeare_char"

# 8 sequences * 256 characters = 2,048 characters an update; 900 updates go through the text not quite twice
batch_size = 8
block_size = 256
gradient_accumulation_steps = 1

# 4.7 million parameters in the blocks, and tables of n-grams, which learn the text by heart if the run is much longer
n_layer = 6
n_head = 2
n_embd = 256
pos = "rope"
mlp = "relu2"
qk_norm = True
tie_weights = False
zero_init = True
ngram = 4
ngram_rows = 32768

max_iters = 900
optimizer = "muon"
muon_lr = 0.02
learning_rate = 5e-3
lr_schedule = "wsd"
warmup_iters = 10
cooldown_frac = 0.7
min_lr = 0.0
weight_decay = 0.0
beta2 = 0.99

eval_interval = 300
eval_iters = 20
log_interval = 50
