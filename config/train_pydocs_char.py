# A miniature GPT on Python's own documentation: nothing to download, about two minutes on two CPU cores.
#   python data/pydocs_char/prepare.py
#   python train.py config/train_pydocs_char.py
#   python sample.py --out_dir=out-pydocs-char

out_dir = "out-pydocs-char"
eval_interval = 250
eval_iters = 20
log_interval = 10
sample_interval = 500

dataset = "pydocs_char"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128  # 1 x 16 x 128 = 2,048 tokens per step; an epoch is 962 steps

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

learning_rate = 3e-3  # with baby networks can afford to go a bit higher
min_lr = 1e-4
max_iters = 1500
warmup_iters = 100
beta2 = 0.99  # made a bit bigger because number of tokens per step is small

compile = False  # compiling takes longer than it saves in a short run
