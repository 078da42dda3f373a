# Evaluate OpenAI's GPT-2 (350M) on OpenWebText.
#   python train.py config/eval_gpt2_medium.py

init_from = "gpt2-medium"
eval_only = True
eval_iters = 500  # use more iterations to get a good estimate
batch_size = 8
wandb_log = False
