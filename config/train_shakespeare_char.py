# A baby GPT on the works of Shakespeare, character by character: a few minutes on a GPU.
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char.py
#   python sample.py --out_dir=out-shakespeare-char

out_dir = "out-shakespeare-char"
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # it overfits in the end, so only save when val improves
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # 1 x 64 x 256 = 16,384 tokens per step; an epoch is 61 steps

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # with baby networks can afford to go a bit higher
min_lr = 1e-4
max_iters = 5000
warmup_iters = 100
beta2 = 0.99  # made a bit bigger because number of tokens per step is small
