# GPT-2 (124M), the size of OpenAI's model, on OpenWebText, on one machine with 8 A100s (40 GB) or better.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

wandb_log = True
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 40 micro-batches x 12 sequences x 1024 tokens = 491,520 tokens per step; 8 processes take 5 micro-batches each
dataset = "openwebtext"
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000  # 295 billion tokens

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
