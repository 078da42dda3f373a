# A miniature GPT on Python's own documentation: nothing to download, about two minutes on two CPU cores.
#   python data/pydocs_char/prepare.py
#   python train.py config/train_pydocs_char.py
#   python sample.py --out_dir=out-pydocs-char --start="Return the"

out_dir = "out-pydocs-char"
eval_interval = 100
eval_iters = 20
log_interval = 10
sample_interval = 350
sample_prompt = "Return the"

dataset = "pydocs_char"
gradient_accumulation_steps = 1
batch_size = 32
block_size = 128  # 1 x 32 x 128 = 4,096 tokens per step; an epoch is 481 steps

n_layer = 4
n_head = 4
n_kv_head = 1
n_embd = 128
dropout = 0.0
norm = "rmsnorm"
position = "rope"
rope_theta = 100.0  # a sequence is 128 tokens long, so lower frequencies would be constant in it
qk_norm = True
mlp = "swiglu"
tied = False

muon = True
learning_rate = 5e-3
min_lr = 0.0
lr_schedule = "linear"
max_iters = 700
warmup_iters = 0
weight_decay = 0.1
beta2 = 0.99

compile = False  # compiling takes longer than it saves in a short run
