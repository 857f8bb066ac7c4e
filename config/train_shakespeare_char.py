# A character-level GPT on tinyshakespeare: good for a first look and for debugging.
# $ python prepare tinyshakespeare --name shakespeare_char

out_dir = "out-shakespeare-char"
eval_interval = 250  # often, since this will overfit
eval_iters = 200
log_interval = 10

# it will overfit, so save only where the val loss improves (and at the end)
always_save_checkpoint = False

wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # a context of up to 256 characters

# a baby GPT: 6 layers of 12 * 384^2 parameters are 10.6 million
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small models can take more
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # above the usual 0.95, since an update sees few tokens
warmup_iters = 100
