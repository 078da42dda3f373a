# Finetune GPT-2 (124M) on Shakespeare: minutes on a GPU.
#   python data/shakespeare/prepare.py
#   python train.py config/finetune_shakespeare.py
#   python sample.py --out_dir=out-shakespeare

out_dir = "out-shakespeare"
init_from = "gpt2"
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # it overfits quickly, so only save when val improves
wandb_project = "shakespeare"
wandb_run_name = "ft-gpt2"

dataset = "shakespeare"
batch_size = 1
gradient_accumulation_steps = 32
block_size = 1024  # 32 x 1 x 1,024 = 32,768 tokens per step; an epoch of 301,966 is 9 steps
max_iters = 20

learning_rate = 3e-5
decay_lr = False
