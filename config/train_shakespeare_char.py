# nanoGPT's character-level GPT on Tiny Shakespeare, in minutes on a GPU. It takes hours on a CPU: there, use
# config/quickstart.py, with --dataset=shakespeare_char for the same text.
# $ python prepare tinyshakespeare --name shakespeare_char
# $ python train.py config/train_shakespeare_char.py

out_dir = "out-shakespeare-char"
eval_interval = 250  # frequent, because this run will overfit
eval_iters = 200
log_interval = 10

# the run will overfit, so save only if the val loss improves (and at the end)
always_save_checkpoint = False

wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # a context of up to 256 characters

# a small GPT: 6 layers * 12 * 384^2 = 10.6 million parameters
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small models tolerate a higher learning rate
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # higher than the usual 0.95, because an update has few tokens
warmup_iters = 100
