# Finetune SmolLM2 (135M), a small model of the Llama family, on Shakespeare: minutes on a GPU.
#   python data/shakespeare/prepare.py --tokenizer=HuggingFaceTB/SmolLM2-135M --name=shakespeare_smollm
#   python train.py config/finetune_smollm.py
#   python sample.py --out_dir=out-smollm --export=smollm-shakespeare

out_dir = "out-smollm"
init_from = "HuggingFaceTB/SmolLM2-135M"  # a Hub name or a folder
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # it overfits quickly, so only save when val improves

dataset = "shakespeare_smollm"
batch_size = 4
gradient_accumulation_steps = 8
block_size = 1024  # 8 x 4 x 1,024 = 32,768 tokens per step; the model's context is 8,192
max_iters = 20

learning_rate = 3e-5
decay_lr = False
