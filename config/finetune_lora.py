# Finetune GPT-2 with LoRA: freeze its weights and train adapters with 1 % as many. Minutes on a GPU.
# For another model set --init_from, and --dataset to text prepared with its tokenizer.
#   python data/shakespeare/prepare.py
#   python train.py config/finetune_lora.py
#   python sample.py --out_dir=out-lora --compare

out_dir = "out-lora"
init_from = "gpt2"  # a checkpoint, its folder, or a model on the Hub
eval_interval = 50
eval_iters = 40
sample_interval = 100
always_save_checkpoint = False  # it overfits quickly, so only save when val improves

dataset = "shakespeare"
batch_size = 4
gradient_accumulation_steps = 8  # 8 x 4 x 1,024 = 32,768 tokens per step at a context of 1,024

lora_rank = 8
lora_alpha = 16
learning_rate = 1e-3  # about ten times that of full finetuning
weight_decay = 0.0
max_iters = 200
warmup_iters = 10
min_lr = 1e-4
