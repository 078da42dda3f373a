# The baby GPT of train_shakespeare_char.py, tuned for time to loss: Muon, RoPE, QK-norm, SwiGLU. 600 steps instead of
# 5,000 reach the same validation loss, 1.47. For a GPU.
#   python data/shakespeare_char/prepare.py
#   python train.py config/shakespeare_char_fast_gpu.py
#   python sample.py --out_dir=out-shakespeare-char-fast-gpu

out_dir = "out-shakespeare-char-fast-gpu"
eval_interval = 50
eval_iters = 20
log_interval = 10
always_save_checkpoint = False  # only save when val improves
wandb_project = "shakespeare-char"
wandb_run_name = "fast-gpu"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # 1 x 64 x 256 = 16,384 tokens per step; an epoch is 61 steps

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # with 0.3 the loss is 0.04 higher after these ten epochs
norm = "rmsnorm"
position = "rope"
qk_norm = True
mlp = "swiglu"
tied = False

muon = True
learning_rate = 4e-3
min_lr = 0.0
lr_schedule = "linear"
max_iters = 600
warmup_iters = 20
beta2 = 0.99
