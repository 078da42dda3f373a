# Evaluate OpenAI's GPT-2 (1558M) on OpenWebText.
#   python train.py config/eval_gpt2_xl.py

init_from = "gpt2-xl"
eval_only = True
eval_iters = 500  # use more iterations to get a good estimate
batch_size = 8
wandb_log = False
