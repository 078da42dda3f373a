# Today's architecture (Qwen3's) at the weights of the run that this comes behind:
#   python train.py config/train_shakespeare_char.py config/modern.py
#   python bench.py config/train_shakespeare_char.py --compare=config/modern.py

norm = "rmsnorm"
position = "rope"
qk_norm = True
mlp = "swiglu"
# the fewest heads of keys and values that ...
n_kv_head = max(n for n in range(1, n_head + 1) if n_head % n == 0 and n <= max(1, 0.4 * n_head))
# what they save goes to the MLP: 12 * n_embd**2 weights a layer, as GPT-2 has
n_hidden = round((10 - 2 * n_kv_head / n_head) * n_embd / 3 / 8) * 8
