# A compute-optimal run for a number of layers, by the sweep in README. Settings given before it keep their values:
#   python train.py --n_layer=4 --dataset=mine --block_size=256 config/scale.py

import dataclasses
import math
import os

import torch

from data.shards import Dataset
from model import GPT, GPTConfig, flops_per_token, round_vocab_size

# model: Llama's architecture with QK-norm, nanochat's width, heads as wide as GPT-2's or half as wide
n_embd = given.get("n_embd", 64 * n_layer)
n_head = given.get("n_head", max(1, n_embd // (32 if n_embd < 256 else 64)))
norm = given.get("norm", "rmsnorm")
position = given.get("position", "rope")
mlp = given.get("mlp", "swiglu")
qk_norm = given.get("qk_norm", True)
tied = given.get("tied", False)

# its parameters in matmuls, so without the token embedding
_folder = os.path.join("data", dataset)
_data = Dataset(_folder) if os.path.exists(os.path.join(_folder, "train.bin")) else None  # bench.py needs none
_shape = {field.name: globals()[field.name] for field in dataclasses.fields(GPTConfig) if field.name in globals()}
with torch.device("meta"):
    _model = GPT(GPTConfig(**_shape, vocab_size=round_vocab_size(_data and _data.vocab_size or 50257)))
_parameters = flops_per_token(_model, 0) // 6

# length: 10 tokens per parameter (sweep); tokens per step: the power of two nearest to 1.6 sqrt(tokens) (sweep)
_tokens = 10 * _parameters
_sequences = max(1, 2 ** round(math.log2(1.6 * _tokens**0.5)) // block_size)
_ranks = int(os.environ.get("WORLD_SIZE", 1))
batch_size = given.get("batch_size", max(1, min(_sequences // _ranks, 16384 // block_size)))
_micro_batches = _ranks * max(1, _sequences // max(1, batch_size * _ranks))
gradient_accumulation_steps = given.get("gradient_accumulation_steps", _micro_batches)
_step = max(1, gradient_accumulation_steps * batch_size * block_size)
max_iters = given.get("max_iters", math.ceil(_tokens / _step))
eval_interval = given.get("eval_interval", math.ceil(max_iters / 10) or 1)
eval_iters = given.get("eval_iters", max(1, 2**18 // max(1, batch_size * block_size)))  # on 2**18 tokens

# optimizer: 5e-3 is near the best learning rate at every width of the sweep; beyond them it falls as in nanochat
muon = given.get("muon", True)
learning_rate = given.get("learning_rate", 5e-3 * min(1, (384 / n_embd) ** 0.5))
weight_decay = given.get("weight_decay", 0.1 * min(5, max(1, n_embd / 192) ** 2))  # wider ones needed more (sweep)
beta2 = given.get("beta2", 0.99)
warmup_iters = given.get("warmup_iters", max_iters // 20)
lr_schedule = given.get("lr_schedule", "wsd")
wsd_decay_frac = given.get("wsd_decay_frac", 0.5)  # 0.03 nats better than linear from the start (sweep)
min_lr = given.get("min_lr", 0.0)

_tokens = max_iters * _step
_epochs = _tokens / len(_data.split("train")) if _data else 0
_flops = flops_per_token(_model, block_size) * _tokens
_loss = 1.005 + 0.186 * (max(_flops, 1) / 1e15) ** -0.367  # bits per byte, by the law that fits the sweep
if os.environ.get("RANK", "0") == "0":
    print(
        f"scale:    {_parameters / 1e6:.3g}M matrix parameters, {_tokens / 1e6:.4g}M tokens, {_epochs:.3g} epochs, "
        f"{_flops:.3g} FLOPs, {_flops / 1.14e19:.2g} hours on 8 H100s at 40 % MFU; expect {_loss:.3g} bits per byte"
    )
