# The miniature GPT of train_shakespeare_char_cpu.py with what was found since: Muon, rotary positions, normalised
# queries and keys, squared ReLU, and more tokens a step.
#   python data/shakespeare_char/prepare.py
#   python train.py config/shakespeare_char_fast.py
#   python sample.py --out_dir=out-shakespeare-char-fast

out_dir = "out-shakespeare-char-fast"
eval_interval = 180
eval_iters = 8
log_interval = 10
always_save_checkpoint = False  # keep what validates best
wandb_project = "shakespeare-char"
wandb_run_name = "fast"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 32
block_size = 64  # 1 x 32 x 64 = 2,048 tokens a step

n_layer = 3
n_head = 2
n_embd = 128
dropout = 0.0
norm = "rmsnorm"
position = "rope"
qk_norm = True
mlp = "relu2"
tied = False

muon = True
learning_rate = 3e-3
min_lr = 0.0
lr_schedule = "linear"
max_iters = 1440
lr_decay_iters = 1440
warmup_iters = 0
weight_decay = 0.0
beta2 = 0.99

device = "cpu"
compile = False
