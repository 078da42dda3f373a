# A miniature character-level GPT on Shakespeare, tuned for time to loss on two CPU cores.
# Muon, RoPE, QK-norm, grouped-query attention, squared ReLU, more tokens per step than train_shakespeare_char_cpu.py.
#   python data/shakespeare_char/prepare.py
#   python train.py config/shakespeare_char_fast.py
# A short run reaches validation loss 1.85 instead of 1.47, with 1/32 of the FLOPs:
#   ... --n_layer=2 --block_size=64 --max_iters=160 --learning_rate=8e-3 --muon_momentum=0.85 --lr_schedule=wsd
#       --wsd_decay_frac=0.4 --eval_interval=1000 --eval_iters=8
#   python sample.py --out_dir=out-shakespeare-char-fast

out_dir = "out-shakespeare-char-fast"
eval_interval = 130
eval_iters = 6
log_interval = 10
always_save_checkpoint = False  # only save when val improves
wandb_project = "shakespeare-char"
wandb_run_name = "fast"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 32
block_size = 128  # 1 x 32 x 128 = 4,096 tokens per step

n_layer = 3
n_head = 3
n_kv_head = 1
n_embd = 96
dropout = 0.0
norm = "rmsnorm"
position = "rope"
rope_theta = 100.0  # a sequence is 128 tokens long, so lower frequencies would be constant in it
qk_norm = True
mlp = "relu2"
tied = False
zero_init = True

muon = True
learning_rate = 6e-3
min_lr = 0.0
lr_schedule = "linear"
max_iters = 1560
warmup_iters = 0
weight_decay = 0.5  # six epochs
beta2 = 0.99

device = "cpu"
compile = False
