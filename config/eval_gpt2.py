# Evaluate OpenAI's GPT-2 (124M) on OpenWebText.
#   python train.py config/eval_gpt2.py

init_from = "gpt2"
eval_only = True
eval_iters = 500  # use more iterations to get a good estimate
batch_size = 8
wandb_log = False
