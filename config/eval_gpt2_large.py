# Evaluate OpenAI's GPT-2 (774M) on OpenWebText.
#   python train.py config/eval_gpt2_large.py

init_from = "gpt2-large"
eval_only = True
eval_iters = 500  # use more iterations to get a good estimate
batch_size = 8
wandb_log = False
