# A miniature GPT on the works of Shakespeare for a laptop's CPU: about a minute, validation loss below 1.9.
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_cpu.py
#   python sample.py --out_dir=out-shakespeare-char

out_dir = "out-shakespeare-char"
eval_interval = 250
eval_iters = 20
log_interval = 10
always_save_checkpoint = False  # it overfits in the end, so only save when val improves
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64  # 1 x 12 x 64 = 768 tokens per step

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

learning_rate = 1e-3  # with baby networks can afford to go a bit higher
min_lr = 1e-4
max_iters = 2000
warmup_iters = 100
beta2 = 0.99  # made a bit bigger because number of tokens per step is small

device = "cpu"
compile = False
