# Finetune a model by LoRA: its weights stay as they are, and a hundredth as many are trained beside them. Minutes on a
# GPU for GPT-2; for a model of yours give --init_from=its out_dir, and a --dataset of its tokens.
#   python data/shakespeare/prepare.py
#   python train.py config/finetune_lora.py
#   python sample.py --out_dir=out-lora --compare

out_dir = "out-lora"
init_from = "gpt2"  # a checkpoint, its folder, or any GPT-2, Llama or Qwen3 of the Hub
eval_interval = 50
eval_iters = 40
sample_interval = 100
always_save_checkpoint = False  # it overfits soon, so keep what validates best

dataset = "shakespeare"
batch_size = 4
gradient_accumulation_steps = 8  # 8 x 4 x 1,024 = 32,768 tokens a step for models that see 1,024

lora_rank = 8
lora_alpha = 16
learning_rate = 1e-3  # LoRA takes about ten times as much as finetuning all weights does
weight_decay = 0.0
max_iters = 200
lr_decay_iters = 200
warmup_iters = 10
min_lr = 1e-4
