# Finetune a base model into an assistant that answers: all weights, or LoRA with --lora_rank=16 for an instruct model.
#   python data/smoltalk/prepare.py --num_samples=20000
#   python train.py config/finetune_chat.py
#   python sample.py --out_dir=out-chat --chat
# For conversations of your own, and other models, see data/chat/prepare.py.

out_dir = "out-chat"
init_from = "HuggingFaceTB/SmolLM2-135M"  # a checkpoint, its folder, or a model on the Hub
eval_interval = 100
eval_iters = 20
sample_interval = 0  # prompts are conversations: sample.py --chat

dataset = "smoltalk"
batch_size = 4
gradient_accumulation_steps = 8  # 8 x 4 x 1,024 = 32,768 tokens per step at the context that the data is packed for

learning_rate = 1e-4  # ten times that with LoRA
min_lr = 0.0
lr_schedule = "linear"
max_iters = 1000
warmup_iters = 20
weight_decay = 0.0
