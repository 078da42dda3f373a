# Llama's architecture, at the size of the config before it:
#   python train.py config/train_shakespeare_char.py config/modern.py
#   python bench.py config/train_shakespeare_char.py --compare=config/modern.py

norm = "rmsnorm"
position = "rope"
mlp = "swiglu"
# grouped-query attention: a KV cache of 40 % or less
n_kv_head = max(n for n in range(1, n_head + 1) if n_head % n == 0 and n <= max(1, 0.4 * n_head))
# the weights saved go to the MLP, in multiples of 64 for tensor cores: about GPT-2's parameter count in all
n_hidden = int((10 - 2 * n_kv_head / n_head) * n_embd / 3) // 64 * 64
