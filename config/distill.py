# Distill a model into a smaller one: a student of two narrow layers learns from the distributions of its teacher.
# The first three commands of config/dpo_style.py make the teacher.
# $ python train.py config/distill.py
# $ python train.py config/distill.py --distill_weight=0 --out_dir=out/alone    # the same student, from tokens alone

out_dir = "out/student"
dataset = "sums"
objective = "distill"
teacher = "out/sums"
distill_temperature = 2.0
distill_weight = 0.9

# the student: half as wide as the teacher, and without its n-gram embeddings
n_layer = 2
n_head = 2
n_embd = 64
pos = "rope"
mlp = "relu2"
qk_norm = True
tie_weights = False

# 12 rows * 128 tokens = 1536 tokens per update
block_size = 128
batch_size = 12
gradient_accumulation_steps = 1
max_iters = 600
eval_interval = 200
eval_iters = 10

learning_rate = 5e-3
min_lr = 5e-4
warmup_iters = 20
weight_decay = 0.0
beta2 = 0.99
