# A second model of the same size learns from the text and from the model of config/shakespeare_best.py, and reaches a
# lower loss: about 1.41, in twenty minutes on two CPU cores with AVX-512. See docs/training-fast.md.
# $ python train.py config/shakespeare_best.py
# $ python train.py config/shakespeare_student.py

from config.shakespeare_best import *  # noqa: F403

out_dir = "out/shakespeare_student"
objective = "distill"
teacher = "out/shakespeare_best"
distill_temperature = 1.0
distill_weight = 0.5
seed = 1  # other initial weights and another order of the text than the teacher's
max_iters = 4900
dropout = 0.05  # the teacher's distributions are harder to memorize than the text
