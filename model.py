"""
The GPT model, with the architectures of GPT-2, Llama, Mistral and Qwen. Sections 1 to 5 are the model and nothing else;
the layers they use from section 11 behave like their PyTorch namesakes. Skip the other sections until you need them.

Shape letters: B sequences of T tokens, C = n_embd channels, H query heads and G key/value heads of D = head_dim
channels, S keys (cached and new ones; S = T without a cache; the whole cache if compiled), V tokens in the vocabulary.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, replace
from unittest import mock

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute  # in this repository a checkpoint is a file

# -----------------------------------------------------------------------------
# 1. hyperparameters


@dataclass
class GPTConfig:
    """Define the model's hyperparameters; ValueError if they are inconsistent."""

    block_size: int = 1024  # maximum context length, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm layers, as in GPT-2
    # options that nanoGPT lacks; the defaults give its model, and checkpoints omit them, so they must never change
    norm: str = "layernorm"  # layernorm, rmsnorm
    position: str = "learned"  # learned, rope
    mlp: str = "gelu"  # gelu, gelu_tanh (OpenAI's GPT-2), swiglu, relu2
    n_hidden: int = 0  # width of the MLP; 0: 4 * n_embd, for swiglu 8/3 * n_embd rounded up to a multiple of 8
    n_kv_head: int = 0  # number of key/value heads (grouped-query attention); 0: n_head
    qk_norm: bool = False  # normalize queries and keys
    tied: bool = True  # share the weights of the token embedding and the output layer
    head_dim: int = 0  # channels per head; 0: n_embd / n_head
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_scaling: dict | None = None  # how an imported model extends its context: rope_parameters in its config.json

    def __post_init__(self):
        check_config(self)  # ValueError, see section 7
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        # swiglu has three matrices instead of two, so 8/3 instead of 4 keeps the parameter count
        default_width = 8 * math.ceil(self.n_embd / 3) if self.mlp == "swiglu" else 4 * self.n_embd
        self.n_hidden = self.n_hidden or default_width


# -----------------------------------------------------------------------------
# 2. norms, activations, rotary embeddings

NORMS = {  # as nn.LayerNorm and nn.RMSNorm (https://arxiv.org/abs/1910.07467), see section 11
    "layernorm": lambda size, config: LayerNorm(size, eps=config.norm_eps, bias=config.bias),
    "rmsnorm": lambda size, config: RMSNorm(size, eps=config.norm_eps),
}


def swiglu(x):
    """Return silu(first half) * second half of the channels (https://arxiv.org/abs/2002.05202).

    Example: tensor([1.0, 2.0, 10.0, 20.0]) -> tensor([7.31, 35.23])
    """
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "swiglu": swiglu,
    "relu2": lambda x: SquaredReLU.apply(x),  # relu(x)**2 (https://arxiv.org/abs/2109.08668), defined in section 11
}


def rope_cos_sin(pos, config):
    """Return [cos | cos] and [-sin | sin] (T, D), each of two halves of D/2 channels, for positions pos (T,).

    Rotary embeddings: https://arxiv.org/abs/2104.09864
    """
    exponents = torch.arange(0, config.head_dim, 2, device=pos.device).float() / config.head_dim
    freqs = 1.0 / config.rope_theta**exponents  # radians per position, (D/2,)
    freqs, factor = scale_rope(freqs, config) if config.rope_scaling else (freqs, 1.0)  # extended context, section 7
    angles = pos[:, None] * freqs  # (T, D/2)
    return factor * angles.cos().repeat(1, 2), factor * torch.cat((-angles.sin(), angles.sin()), dim=-1)


def apply_rope(x, cos, signed_sin):
    """Rotate the channel pairs (i, i + D/2) of x (B, H, T, D): (x1 cos - x2 sin, x2 cos + x1 sin).

    Example: channels 1, 2, 3, 4, rotated by 90 degrees -> -3, -4, 1, 2
    """
    swapped = x.roll(x.size(-1) // 2, dims=-1)  # (x2, x1)
    return torch.addcmul(x * cos.to(x.dtype), swapped, signed_sin.to(x.dtype))


# -----------------------------------------------------------------------------
# 3. attention, MLP, block


def attention(q, k, v, mask=None, dropout=0.0):
    """Return the attention output (B, H, T, D) of queries q (B, H, T, D) over keys and values k, v (B, G, S, D).

    mask (T, S) is True where a query may attend to a key. None: causal attention with S == T, or one query (T == 1)
    that attends to all S keys.
    """
    # two cases have faster kernels with equal results, see section 11: training on CPUs, and decoding one token
    if q.is_cpu and q.requires_grad and mask is None and q.size(2) == k.size(2):
        return train_attention_on_cpu(q, k, v, dropout)
    if q.size(2) == 1 and not q.requires_grad:
        return attend_one_token(q, k, v, mask)
    # only flash attention shares keys and values between heads; GPUs that compute in bfloat16 have it, others copy
    if q.is_cuda and q.size(1) > k.size(1) and q.dtype != torch.bfloat16:
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    causal = mask is None and q.size(2) > 1
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, enable_gqa=q.size(1) > k.size(1))


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        # query, key and value projections for all heads, in one matrix
        self.c_attn = Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=config.bias)
        self.c_proj = Linear(self.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = NORMS[config.norm](self.head_dim, config) if config.qk_norm else nn.Identity()
        self.k_norm = NORMS[config.norm](self.head_dim, config) if config.qk_norm else nn.Identity()
        self.resid_dropout = nn.Dropout(config.dropout)
        self.attn_dropout = config.dropout

    def forward(self, x, rope=None, mask=None, cache=None, pos=None):  # rope: (cos, signed sin)
        B, T, _ = x.size()
        # queries, keys and values of all heads, with the heads as a batch dimension
        sizes = [n * self.head_dim for n in (self.n_head, self.n_kv_head, self.n_kv_head)]
        q, k, v = self.c_attn(x).split(sizes, dim=2)
        q = q.view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        v = v.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        # QK-norm (autocast may compute it in float32), RoPE, then store k and v and read back all S of them
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, pos)  # (B, G, S, D)
        # causal self-attention: (B, H, T, D) x (B, G, S, D) -> (B, H, T, D)
        y = attention(q, k, v, mask, self.attn_dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, -1)  # concatenate the heads
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = 2 * config.n_hidden if config.mlp == "swiglu" else config.n_hidden  # swiglu halves its input
        self.c_fc = Linear(config.n_embd, width, bias=config.bias)
        self.activation = ACTIVATIONS[config.mlp]
        self.c_proj = Linear(config.n_hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config.n_embd, config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = NORMS[config.norm](config.n_embd, config)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, mask=None, cache=None, pos=None):
        x = x + self.attn(self.ln_1(x), rope, mask, cache, pos)
        x = x + self.mlp(self.ln_2(x))
        return x


# -----------------------------------------------------------------------------
# 4. the model


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.lora = None  # settings of the LoRA adapters, if there are any: see add_lora()
        self.hub = None  # transformers' config.json and generation_config.json, if imported: see from_pretrained()
        # GPT-2's names, as in nanoGPT, whose checkpoints load here
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None,
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=NORMS[config.norm](config.n_embd, config),
            )
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        # initial values; functions that load weights replace them
        self.tie_weights()
        self.init_weights()

    def tie_weights(self):
        if self.config.tied:
            self.transformer.wte.weight = self.lm_head.weight  # https://arxiv.org/abs/1608.05859

    @torch.no_grad()
    def init_weights(self):
        """Initialize like GPT-2: normal with std 0.02 for matrices, 0 for biases, 1 for the gains of norms."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # the projections into the residual stream, 2 per layer
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                p.normal_(std=0.02)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)

    def forward(self, idx, targets=None, caches=None, pos=None, return_logits=True):
        """Return (logits, loss) for token ids idx (B, T).

        With targets (B, T): logits (B, T, V), and the mean cross-entropy in nats over the targets that are not -1;
        return_logits=False saves the memory of the logits and returns None for them.
        Without targets: logits (B, 1, V) of the last position, and None.
        caches: one KVCache per layer, whose `visible` already includes the new tokens.
        pos: positions (T,) of the tokens; default: the last T of the visible ones, 0 .. T - 1 without caches.
        """
        B, T = idx.size()
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens exceed the model's block_size of {self.config.block_size}")
        S = caches[0].visible if caches else T
        pos = torch.arange(S - T, S, device=idx.device) if pos is None else pos

        # token embeddings, and either position embeddings or rotations
        x = self.transformer.wte(idx)  # (B, T, C)
        rope = None
        if self.transformer.wpe is not None:
            x = x + self.transformer.wpe(pos)
        else:
            # cast once for all layers; under autocast x is float32 here, and apply_rope() casts to the dtype of q
            rope = [table.to(x.dtype) for table in rope_cos_sin(pos, self.config)]
        x = self.transformer.drop(x)

        # attention() needs no mask for S == T, where it is causal, nor for one token, which attends to all S keys. But
        # several tokens after cached ones need one, and so does compiled decoding: there all slots of the cache are
        # visible, filled or not. A query at position p may attend to keys 0 .. p
        mask = None
        if S > T and (T > 1 or S == caches[0].size):
            mask = pos[:, None] >= torch.arange(S, device=idx.device)  # (T, S)

        # transformer blocks
        for i, block in enumerate(self.transformer.h):
            x = block(x, rope, mask, caches[i] if caches else None, pos)
        x = self.transformer.ln_f(x)

        # output layer and loss; generation needs the logits of the last position only
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        if not return_logits and isinstance(self.lm_head, Linear):  # not after quantize() or pack_weights()
            return None, linear_cross_entropy(x, self.lm_head.weight, targets)  # in chunks, see section 11
        logits = self.lm_head(x)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits if return_logits else None, loss

    # -------------------------------------------------------------------------
    # 5. generation

    def next_logits(self, context, caches):
        """Return the logits (B, V) of the token after context (B, T).

        Only tokens that are not yet cached go through the model. compile_generation() replaces this method.
        """
        new = context[:, caches[0].visible :]
        for cache in caches:
            cache.visible = context.size(1)
        logits, _ = self(new, caches=caches)
        return logits[:, -1]

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=(), generator=None, slide=1):
        """Yield up to max_new_tokens tokens (B,) that continue idx (B, T). Call eval() first.

        Sampling options: see sample_next(). stop: token ids that end a row; ended rows are padded with stop[0], and
        generation ends when all rows have ended.
        When the context is full, its first `slide` tokens are dropped and the caches are recomputed: cached keys and
        values depend on the dropped tokens. slide=1 always uses the last block_size tokens, like nanoGPT, but computes
        the whole context for every token; a larger slide does so less often, with a shorter context.
        """
        # keep the part of the prompt that the model can see
        block_size = self.config.block_size
        if not 1 <= slide <= block_size:
            raise ValueError(f"slide must be between 1 and block_size ({block_size}), got {slide}")
        context, caches = idx[:, -block_size:], None
        finished = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        stop_ids = torch.tensor(stop, dtype=torch.int64, device=idx.device)
        for _ in range(max_new_tokens):
            # the context has one token too many: drop its first tokens, which invalidates the caches
            if context.size(1) > block_size:
                context, caches = context[:, slide:], None
            if caches is None:
                # enough for all tokens; rounded up, so that compile_generation() (section 11) rarely compiles again
                size = min(block_size, 256 * math.ceil((idx.size(1) + max_new_tokens) / 256))
                caches = [KVCache(size) for _ in self.transformer.h]
            # with empty caches this computes the whole context, else one token
            logits = self.next_logits(context, caches)
            token = sample_next(logits, temperature, top_k, top_p, generator)
            # finished rows are padded with a stop token, so that the batch stays rectangular
            if stop:
                token = token.masked_fill(finished, stop[0])
                finished |= torch.isin(token, stop_ids)
            yield token
            if stop and finished.all():
                return
            context = torch.cat((context, token[:, None]), dim=1)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **sampling):
        """Return idx (B, T), followed by the tokens of stream()."""
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, **sampling)
        return torch.cat([idx, *(token[:, None] for token in tokens)], dim=1)


class KVCache:
    """Store one layer's keys and values of up to `size` tokens.

    Attention sees the first `visible` positions. The caller sets that before the forward pass, which needs it for
    the mask.
    """

    def __init__(self, size):
        self.size = size
        self.visible = 0
        self.k = self.v = None  # (B, G, size, D); the first keys determine B, G, D, dtype and device

    def update(self, k, v, pos):
        """Store k and v (B, G, T, D) at positions pos (T,); return all that are visible."""
        if self.k is None:
            self.k = k.new_zeros(*k.shape[:2], self.size, k.size(3))
            self.v = torch.zeros_like(self.k)
        self.k.index_copy_(2, pos, k)
        self.v.index_copy_(2, pos, v)
        return self.k[:, :, : self.visible], self.v[:, :, : self.visible]


def sample_next(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Sample one token per row of logits (B, V); returns token ids (B,).

    temperature 0: greedy. top_k: keep the k most likely tokens. top_p: keep the fewest tokens whose probabilities
    sum to at least p (nucleus sampling, https://arxiv.org/abs/1904.09751). None or 0 turns either off.
    Example: tensor([[0.0, 9.0, 1.0]]), temperature=0 -> tensor([1])
    """
    # greedy; a division by so small a temperature could give inf or NaN
    if temperature < 1e-30 or top_k == 1:
        return logits.argmax(dim=-1)
    # the largest logit becomes 0, so that a low temperature cannot overflow
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    # crop the logits to the k most likely tokens
    if top_k:
        values, kept = logits.topk(min(top_k, logits.size(-1)))  # exactly k, even if logits are equal
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept, values)
    # crop them to the nucleus; the most likely token is always in it
    if top_p:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(dim=-1)
        outside = probs.cumsum(dim=-1) - probs >= top_p  # tokens outside the nucleus
        outside[:, 0] = False
        removed = torch.zeros_like(outside).scatter(-1, order, outside)  # in the order of the vocabulary
        logits = logits.masked_fill(removed, -math.inf)
    # inverse-CDF sampling: the first token whose CDF exceeds a random number. It draws one number per row, and is
    # faster than torch.multinomial, which draws V
    cdf = logits.softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.rand(len(cdf), 1, device=cdf.device, generator=generator)
    return torch.searchsorted(cdf, drawn * cdf[:, -1:], right=True).squeeze(-1)


# -----------------------------------------------------------------------------
# 6. optimizers: read on if you change how weights are updated


def configure_optimizers(
    model, weight_decay, learning_rate, betas, device_type, muon=False, dtype=torch.float32, muon_momentum=0.95
):
    """Return AdamW, or with `muon` Muon for the matrices of the blocks and AdamW for the rest.

    Matrices and embeddings decay, biases and norms do not. Muon computes in `dtype`.
    """
    # every parameter that is trained is in one group
    params = [p for p in model.parameters() if p.requires_grad]
    hidden_ids = {id(p) for p in model.transformer.h.parameters() if muon and p.dim() == 2}
    hidden = [p for p in params if id(p) in hidden_ids]
    decay = [p for p in params if p.dim() >= 2 and id(p) not in hidden_ids]
    no_decay = [p for p in params if p.dim() < 2]
    groups = [
        dict(kind="adamw", params=decay, weight_decay=weight_decay),
        dict(kind="adamw", params=no_decay, weight_decay=0.0),
    ]
    if muon:
        groups.append(dict(kind="muon", params=hidden, weight_decay=weight_decay, momentum=muon_momentum))

    # one fused kernel per step; not on MPS, where it takes the steps that the loss scaler should skip
    options = dict(lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu"))
    return Muon(groups, dtype, **options) if muon else AdamW(groups, **options)


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW without the wrappers that import torch._dynamo, 0.9 s, at the first call."""


# the function inside the wrapper, with no_grad
for _name in ("step", "zero_grad", "add_param_group", "state_dict", "load_state_dict"):
    _method = getattr(torch.optim.AdamW, _name)
    setattr(AdamW, _name, torch.no_grad()(getattr(_method, "__wrapped__", _method)))


class Muon(AdamW):
    """AdamW, with Muon for the groups of kind "muon" (https://kellerjordan.github.io/posts/muon).

    The update is the orthogonalized momentum of a matrix's gradients, scaled to AdamW's RMS
    (https://arxiv.org/abs/2502.16982), so that learning rate and weight decay mean the same for both.
    """

    def __init__(self, groups, dtype, **options):
        super().__init__(groups, **options)
        self.dtype = dtype
        self._step_supports_amp_scaling = False  # let GradScaler skip the steps whose gradients overflow

    @torch.no_grad()
    def step(self, closure=None):
        # AdamW's step() sees its own groups only
        all_groups = self.param_groups
        self.param_groups = [group for group in all_groups if group["kind"] == "adamw"]
        super().step()
        self.param_groups = all_groups
        for group in all_groups:
            if group["kind"] == "muon":
                self.muon_step(group)

    def muon_step(self, group):
        # Nesterov momentum; matrices of the same shape are stacked, sharded ones gathered one by one
        batches = {}
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state.update(step=torch.tensor(0.0), momentum_buffer=torch.zeros_like(p))
            state["step"] += 1  # AdamW's load_state_dict() requires it
            momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(momentum, group["momentum"])
            sharded = hasattr(update, "full_tensor")
            key = p if sharded else p.shape
            batches.setdefault(key, []).append((p, update.full_tensor() if sharded else update))

        # orthogonalize, scale and apply
        for batch in batches.values():
            params, updates = zip(*batch, strict=True)
            updates = orthogonalize(torch.stack(updates), self.dtype)
            scale = group["lr"] * 0.2 * math.sqrt(max(updates.shape[1:]))  # AdamW's usual RMS is 0.2
            for p, update in zip(params, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(shard_like(p, update), alpha=scale)


@torch.no_grad()
def orthogonalize(matrices, dtype=torch.float32):
    """Set the singular values of matrices (n, rows, columns) to about 1 (0.7 to 1.2); computes in dtype.

    Five Newton-Schulz iterations: each singular value s becomes 3.4445 s - 4.7750 s^3 + 2.0315 s^5.
    Example: diag(3, 0.5) -> about diag(1, 1)
    """
    # the iteration works on wide matrices whose singular values are at most 1; small gradients vanish in float16
    tall = matrices.size(1) > matrices.size(2)
    X = matrices.mT if tall else matrices
    X = (X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X.mT if tall else X


def shard_like(p, tensor):
    """Copy `tensor` to the device, dtype and sharding of parameter p."""
    tensor = tensor.to(p.device, p.dtype, copy=True).contiguous()
    if not hasattr(p, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def load_optimizer_state(optimizer, saved):
    """Load the state of a checkpoint; learning rate, betas and weight decay stay the optimizer's own.

    ValueError if it does not match: fused kernels do not check shapes.
    """
    # both must have the same groups of parameters
    mismatch = ValueError("the optimizer state does not match this model and optimizer")
    groups = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in groups] != [group["params"] for group in saved["param_groups"]]:
        raise mismatch

    # copy the moments of each parameter, if their shapes match
    moments = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}
    params = [(p, moments[group["kind"]]) for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for i, entry in saved["state"].items():
        p, names = params[i]
        if any(name not in entry or entry[name].shape != p.shape for name in names):
            raise mismatch
        state[i] = {"step": torch.tensor(float(entry["step"]))}
        state[i] |= {name: shard_like(p, entry[name]) for name in names}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def load_training_state(optimizer, scaler, checkpoint):
    """Load the states of optimizer and loss scaler. ValueError says how to start without them."""
    try:
        if "optimizer" in checkpoint:
            load_optimizer_state(optimizer, checkpoint["optimizer"])
        if checkpoint.get("scaler"):
            scaler.load_state_dict(checkpoint["scaler"])
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f"cannot resume ({e}); to start from its weights: --init_from=FOLDER") from None


def shard_model(model, device_type, dtype):
    """Shard the weights across ranks (FSDP2); blocks are gathered in the dtype of their matmuls."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = torch.distributed.init_device_mesh(device_type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)  # embeddings, in float32


def enable_gradient_checkpointing(model):
    """Recompute each block in the backward pass: less memory, a third more time."""
    for block in model.transformer.h:
        block.forward = functools.partial(recompute, block.forward, use_reentrant=False)


@torch.no_grad()
def clip_gradients(model, max_norm):
    """Scale the gradients down to max_norm (0: never); returns their norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


GPT.configure_optimizers = configure_optimizers  # a method, as in nanoGPT

# -----------------------------------------------------------------------------
# 7. weights in and out: read on if you import or export models


def check_config(config):
    """Raise ValueError if the fields of a GPTConfig are inconsistent."""
    # sizes and names
    positive = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "rope_theta")
    for name in (*positive, "n_hidden", "n_kv_head", "head_dim"):
        minimum = int(name in positive)
        if getattr(config, name) < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {getattr(config, name)}")
    for name, choices in (("norm", NORMS), ("position", ("learned", "rope")), ("mlp", ACTIVATIONS)):
        if getattr(config, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(config, name)}")
    # heads must divide the channels, and share keys and values evenly
    if not config.head_dim and config.n_embd % config.n_head:
        raise ValueError(f"n_embd ({config.n_embd}) must be a multiple of n_head ({config.n_head})")
    if config.n_kv_head and config.n_head % config.n_kv_head:
        raise ValueError(f"n_head ({config.n_head}) must be a multiple of n_kv_head ({config.n_kv_head})")
    head_dim = config.head_dim or config.n_embd // config.n_head
    if config.position == "rope" and head_dim % 2:
        raise ValueError(f"rope needs an even head_dim, got {head_dim}")
    if not isinstance(config.rope_scaling, dict | None):
        raise ValueError(f"rope_scaling must be a dict as in transformers, got {config.rope_scaling}")
    # a typo rather than a model: building it would exhaust the memory
    n_params = 12 * config.n_layer * config.n_embd**2
    if n_params > 1e14:
        raise ValueError(f"n_layer and n_embd give {n_params:.1e} parameters: lower them")


def scale_rope(freqs, config):
    """Return frequencies (D/2,) and the attention factor of config.rope_scaling.

    To extend the context, low frequencies are divided by a factor and high ones kept. Llama 3.1 tells them apart by the
    rotations within the original context, YaRN (https://arxiv.org/abs/2309.00071) by their index; linear keeps none.
    Example: tensor([1.0, 1e-2, 1e-4]), Llama 3.1's scaling by 8 -> tensor([1.0, 1e-2, 1.25e-5]), 1.0
    """
    scaling = config.rope_scaling
    original = scaling.get("original_max_position_embeddings")
    # kept: 1 for high frequencies, 0 for low ones, between them a ramp
    if scaling["rope_type"] == "linear":
        kept = 0.0
    elif scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((original * freqs / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    else:
        # the indices of the frequencies that rotate beta_fast (32) times and beta_slow (1) times
        rotations = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
        scale = config.head_dim / (2 * math.log(config.rope_theta))
        start, end = (scale * math.log(original / (2 * math.pi * n)) for n in rotations)
        start, end = max(math.floor(start), 0), min(math.ceil(end), config.head_dim - 1)
        kept = 1 - ((torch.arange(len(freqs), device=freqs.device) - start) / max(end - start, 1e-3)).clamp(0, 1)
    return kept * freqs + (1 - kept) * freqs / scaling["factor"], scaling.get("attention_factor") or 1.0


def model_args(config):
    """Return a GPTConfig as keyword arguments, for checkpoints.

    Fields that nanoGPT lacks are omitted at their default values, so nanoGPT can load GPT-2-style checkpoints.
    Example: GPTConfig(norm="rmsnorm") -> {"block_size": 1024, ..., "bias": True, "norm": "rmsnorm"}
    """
    # nanoGPT's GPTConfig takes its seven fields and no others
    values = asdict(config)
    defaults = asdict(GPTConfig(**{name: values[name] for name in NANOGPT_FIELDS}))
    return {name: value for name, value in values.items() if name in NANOGPT_FIELDS or value != defaults[name]}


NANOGPT_FIELDS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")


def zero_projections(model):
    """Set the projections into the residual stream to 0: each block starts as the identity."""
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            torch.nn.init.zeros_(p)


def round_vocab_size(vocab_size):
    """Round up to a multiple of 64, which is faster on tensor cores.

    Small (character-level) vocabularies are kept. Example: 50257 -> 50304, 65 -> 65
    """
    return vocab_size if vocab_size < 1000 else math.ceil(vocab_size / 64) * 64


def load_model(init_from, checkpoint, **override):
    """Build the model of a checkpoint, or of a Hugging Face folder or name where there is none.

    override replaces fields of the GPTConfig. ValueError or OSError says why it cannot be loaded.
    """
    if not checkpoint:
        return from_pretrained(init_from, override)
    if "lora" in checkpoint:
        return load_lora_checkpoint(checkpoint, **override)
    return from_checkpoint(checkpoint, **override)


def from_checkpoint(checkpoint, **override):
    """Build the model of a checkpoint, on the CPU in float32.

    ValueError names every weight that is missing, unexpected or of the wrong shape.
    """
    try:
        config = GPTConfig(**checkpoint["model_args"] | override)
    except TypeError as e:  # an unknown field
        raise ValueError(f"invalid model_args in the checkpoint: {e}") from None
    # torch.compile and DDP prefix the names; old GPT-2 checkpoints contain attention masks
    weights = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in checkpoint["model"].items()}
    weights = {k: v for k, v in weights.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}

    model = empty_model(config)
    load_weights(model, weights)
    model.hub = checkpoint.get("hub")
    return model


def empty_model(config):
    """Build a model without the slow initialization of its weights."""
    # no meta device: its first random tensor imports the compiler, which takes a second
    with mock.patch.multiple(torch.Tensor, normal_=mock.DEFAULT, uniform_=mock.DEFAULT):
        return GPT(config)


def load_weights(model, weights):
    """Load a state_dict; ValueError names the tensors that are missing, unexpected or of the wrong shape."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        lines = str(e).replace("\t", " ").split("\n")[1:5]
        raise ValueError(f"the weights do not fit the model: {' '.join(lines)}") from None


def crop_block_size(model, block_size):
    """Truncate the position embeddings to block_size. ValueError if there are fewer."""
    if block_size > model.config.block_size:
        raise ValueError(f"block_size {block_size} exceeds the model's {model.config.block_size}")
    # rotary embeddings need no cropping
    model.config.block_size = block_size
    if model.transformer.wpe is not None:
        weight = model.transformer.wpe.weight.detach()[:block_size].clone()
        model.transformer.wpe = nn.Embedding.from_pretrained(weight, freeze=False)


@torch.no_grad()
def grow_vocab_size(model, vocab_size):
    """Grow embedding and output layer by rows equal to the mean of the others; nothing if there are enough."""
    n = vocab_size - model.config.vocab_size
    if n <= 0:
        return
    for layer in (model.transformer.wte, model.lm_head):
        mean = layer.weight.mean(dim=0, keepdim=True)
        layer.weight = nn.Parameter(torch.cat((layer.weight, mean.expand(n, -1))))
    model.transformer.wte.num_embeddings = model.lm_head.out_features = model.config.vocab_size = vocab_size
    model.tie_weights()


# modules here: modules of LlamaForCausalLM and Qwen3ForCausalLM; fused matrices list their parts, row blocks in order
HF_NAMES = {
    "transformer.wte": ["model.embed_tokens"],
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
    "transformer.ln_f": ["model.norm"],
    "lm_head": ["lm_head"],
}


def hf_parts(key, weight, config):
    """Return [(name in transformers, view of the weight)] for one weight of our state_dict().

    Example: h.0.attn.c_attn.weight of Llama -> its q_proj, k_proj and v_proj rows
    """
    if config.position == "learned":  # GPT-2 has our names, but its Conv1D stores matrices as (in, out)
        return [(key, weight.t() if re.search(r"c_(attn|proj|fc)\.weight$", key) else weight)]
    # layer number, module, and what it is of that module
    pattern = r"(?:transformer\.h\.(\d+)\.)?(.+?)\.((?:lora_[AB]\.)?(?:weight|bias))"
    layer, module, kind = re.fullmatch(pattern, key).groups()
    names = HF_NAMES[module]
    if kind == "lora_A.weight":  # the parts share the input projection
        rows = [weight] * len(names)
    elif len(names) == 3:
        rows = weight.split([n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)])
    else:
        rows = weight.split(len(weight) // len(names))
    # weights outside the blocks have no layer number
    prefix = f"model.layers.{layer}." if layer else ""
    return [(f"{prefix}{name}.{kind}", part) for name, part in zip(names, rows, strict=True)]


def adapter_base(name):
    """Return the base model of a folder with a peft adapter; any other name as it is."""
    path = os.path.join(name, "adapter_config.json")
    if not os.path.exists(path):
        return name
    try:
        with open(path, encoding="utf-8") as f:
            return str(json.load(f)["base_model_name_or_path"])
    except (ValueError, LookupError, TypeError) as e:
        raise OSError(f"{path} names no base model: {e}") from None


def load_hf_config(name):
    """Return the transformers config of a folder or Hub name. OSError if it cannot be loaded."""
    import transformers

    name = adapter_base(name)
    try:
        # by default it asks whether to run code of the model
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as e:  # corrupt files and missing networks raise many exception types
        raise OSError(f"cannot load config.json of {name}: {str(e).strip() or type(e).__name__}") from None


def from_pretrained(name, override_args=None):
    """Build a model of HF_MODELS from a transformers folder or a Hub name, in float32.

    A peft adapter is merged into its base. override_args replaces fields of the GPTConfig. OSError if the model cannot
    be loaded, ValueError if it has features that are not supported here, or weights that do not fit.
    """
    config = GPTConfig(**from_hf_config(load_hf_config(name)) | (override_args or {}))
    hf = load_hf_model(name)
    hf_weights = hf.state_dict()
    # an adapter may have changed one of two tied matrices
    config.tied = config.tied and torch.equal(hf.get_input_embeddings().weight, hf.lm_head.weight)
    hub = dict(config=json.loads(hf.config.to_json_string(use_diff=False)))
    hub["generation_config"] = json.loads(hf.generation_config.to_json_string())
    del hf

    # move the tensors over one by one, so that no more than one is in memory twice; missing biases become 0
    model = empty_model(config)
    for key, weight in model.state_dict().items():
        for hf_name, part in hf_parts(key, weight.zero_(), config):
            if hf_name in hf_weights:
                part.copy_(hf_weights[hf_name] if config.tied else hf_weights.pop(hf_name))
    model.hub = hub
    return model


def load_hf_model(name):
    """Return the transformers model of a folder or Hub name, with a peft adapter merged; errors as above."""
    import transformers

    # transformers reports the weights that do not fit
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    options = dict(output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False)
    try:
        base = adapter_base(name)
        hf, info = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
        if base != name:
            from peft import PeftModel

            # the adapter may change one of two tied matrices; peft only warns of weights that it lacks
            hf.lm_head.weight = nn.Parameter(hf.lm_head.weight.detach().clone())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.filterwarnings("error", "Found missing adapter keys")
                hf = PeftModel.from_pretrained(hf, name).merge_and_unload()
    except Exception as e:  # corrupt files raise many exception types
        raise OSError(f"cannot load the weights of {name}: {str(e).strip() or type(e).__name__}") from None
    wrong = [f"{kind.removesuffix('_keys')} {', '.join(map(str, keys))}" for kind, keys in info.items() if keys]
    if wrong:
        raise ValueError(f"the weights of {name} do not fit its config.json: {'; '.join(wrong)[:400]}")
    return hf


def save_pretrained(model, folder, eot=None, vocab_size=None, end_ids=()):
    """Write a folder for AutoModelForCausalLM: config.json, generation_config.json, model.safetensors.

    Settings of an imported model that training does not change are written as they were. eot: id of the end-of-text
    token of models that were not imported. vocab_size: the tokenizer's; rows that only pad the vocabulary beyond it are
    left out. end_ids: the tokens that end a generation, if not the above.
    ValueError if no transformers architecture fits, OSError if writing fails.
    """
    import transformers

    # an empty transformers model, which determines the names
    transformers.utils.logging.disable_progress_bar()
    config, ids = model.config, dict(bos_token_id=eot, eos_token_id=eot)
    hub = model.hub or dict(config=ids, generation_config=ids)
    if vocab_size and not model.hub and round_vocab_size(vocab_size) == config.vocab_size:
        config = replace(config, vocab_size=vocab_size)
    hf_config = to_hf_config(config, hub["config"])
    with torch.device("meta"):
        hf = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=model.lm_head.weight.dtype)
    # views of our weights under its names
    weights = {}
    for key, weight in model.state_dict().items():
        if key in ("transformer.wte.weight", "lm_head.weight"):
            weight = weight[: config.vocab_size]
        weights.update((name, part.contiguous()) for name, part in hf_parts(key, weight, config))
    for name, weight in hf.state_dict().items():  # biases are not optional in transformers' GPT-2
        if name not in weights:
            weights[name] = torch.zeros_like(weight, device="cpu")
    hf.generation_config = transformers.GenerationConfig()  # a published one may not pass the checks of saving
    hf.save_pretrained(folder, state_dict=weights)  # safetensors and config.json

    generation = hub["generation_config"]
    if end_ids:
        generation = generation | dict(eos_token_id=list(end_ids))
    complete_export(folder, hf.config, generation)


def complete_export(folder, hf_config, generation):
    """Write generation_config.json, and the field names that older readers expect in config.json."""
    # llama.cpp, and transformers before version 5
    values = json.loads(hf_config.to_json_string())
    if hf_config.model_type == "gpt2":
        values["n_ctx"] = hf_config.n_positions
    else:
        rope = hf_config.rope_parameters
        values |= dict(rope_theta=rope["rope_theta"], rope_scaling=None if rope["rope_type"] == "default" else rope)
    for name, content in (("config.json", values), ("generation_config.json", generation)):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            json.dump(content, f, indent=2)
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):  # written for the owner only
            shutil.copymode(os.path.join(folder, "config.json"), os.path.join(folder, name))


HF_MODELS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
HF_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
HF_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# fields here: fields of transformers' configs
GPT2_FIELDS = dict(
    block_size="n_positions", vocab_size="vocab_size", n_layer="n_layer", n_head="n_head", n_embd="n_embd",
    n_hidden="n_inner", norm_eps="layer_norm_epsilon", tied="tie_word_embeddings",
)  # fmt: skip
LLAMA_FIELDS = dict(
    block_size="max_position_embeddings", vocab_size="vocab_size", n_layer="num_hidden_layers",
    n_head="num_attention_heads", n_kv_head="num_key_value_heads", n_embd="hidden_size", head_dim="head_dim",
    n_hidden="intermediate_size", norm_eps="rms_norm_eps", tied="tie_word_embeddings",
)  # fmt: skip


def find_mismatches(config, allowed):
    """Return "name=value" of the config's fields whose values are not among those allowed.

    Example: GPTConfig(mlp="relu2"), dict(mlp=["gelu"]) -> ["mlp=relu2"]
    """
    values = {name: getattr(config, name) for name in allowed if hasattr(config, name)}
    return [f"{name}={value}" for name, value in values.items() if value not in allowed[name]]


def from_hf_config(hf):
    """Return the GPTConfig arguments of a transformers config.

    ValueError names everything that is not supported here.
    """
    if hf.model_type not in HF_MODELS:
        raise ValueError(f"unsupported model type {hf.model_type} (supported: {', '.join(HF_MODELS)})")
    # fields whose values must be the ones implemented here
    allowed = dict(quantization_config=[None], scale_attn_weights=[True], scale_attn_by_inverse_layer_idx=[False])
    allowed |= dict(add_cross_attention=[False], activation_function=HF_ACTIVATIONS)  # GPT-2's
    allowed |= dict(hidden_act=["silu"], use_sliding_window=[False])  # the others'
    if hf.model_type == "qwen3":
        allowed["attention_bias"] = [False]
    # report all mismatches at once
    wrong = find_mismatches(hf, allowed)
    rope = getattr(hf, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in HF_ROPE_TYPES or rope.get("partial_rotary_factor", 1) != 1 or rope.get("truncate") is False:
        wrong.append(f"rope_parameters={rope}")
    if wrong:
        raise ValueError(f"this {hf.model_type} model uses unsupported settings: {', '.join(wrong)}")

    # translate the names of the fields
    names = GPT2_FIELDS if hf.model_type == "gpt2" else LLAMA_FIELDS
    fields = {ours: getattr(hf, theirs, None) for ours, theirs in names.items()}
    fields = {name: value for name, value in fields.items() if value is not None}
    # fields without a counterpart
    if hf.model_type == "gpt2":
        return fields | dict(mlp=HF_ACTIVATIONS[hf.activation_function], bias=True)
    if rope_type != "default":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        _, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](hf)
        scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        fields["rope_scaling"] = scaling | ({"attention_factor": attention_factor} if rope_type == "yarn" else {})
    if hf.model_type == "mistral" and hf.sliding_window:  # within the window, attention is the same
        fields["block_size"] = min(fields["block_size"], hf.sliding_window)
    has_bias = hf.model_type == "qwen2" or getattr(hf, "attention_bias", False) or getattr(hf, "mlp_bias", False)
    fields |= dict(norm="rmsnorm", position="rope", mlp="swiglu", qk_norm=hf.model_type == "qwen3", bias=has_bias)
    return fields | dict(rope_theta=float(rope["rope_theta"]))


def to_hf_config(config, source):
    """Return the transformers config of a GPTConfig. ValueError if no architecture there fits.

    source: fields to keep that a GPTConfig does not determine, such as all of an imported model's config.json.
    """
    import transformers

    # the architecture that comes closest
    if config.position == "learned":
        model_type, allowed = "gpt2", dict(norm=["layernorm"], mlp=["gelu", "gelu_tanh"], qk_norm=[False])
        allowed |= dict(n_kv_head=[config.n_head], head_dim=[config.n_embd // config.n_head])
    elif config.qk_norm:
        model_type, allowed = "qwen3", dict(norm=["rmsnorm"], mlp=["swiglu"], bias=[False])
    else:
        model_type, allowed = "llama", dict(norm=["rmsnorm"], mlp=["swiglu"])
    wrong = find_mismatches(config, allowed)
    if wrong:
        raise ValueError(f"cannot export: {model_type}, the closest architecture, has no {', '.join(wrong)}")

    # translate the names of the fields
    names = GPT2_FIELDS if model_type == "gpt2" else LLAMA_FIELDS
    fields = {theirs: getattr(config, ours) for ours, theirs in names.items()}
    # fields without a counterpart
    if model_type == "gpt2":
        fields["activation_function"] = "gelu" if config.mlp == "gelu" else "gelu_new"
        fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    else:
        scaling = config.rope_scaling or dict(rope_type="default")
        fields["rope_parameters"] = scaling | dict(rope_theta=config.rope_theta)
        fields["attention_bias"] = config.bias
    if model_type == "llama":
        fields["mlp_bias"] = config.bias
    # another architecture shares the ids of special tokens only
    if source.get("model_type") != model_type:
        source = {name: value for name, value in source.items() if name.endswith("_token_id")}
    return transformers.AutoConfig.for_model(**source | fields | {"model_type": model_type})


GPT.from_pretrained = staticmethod(from_pretrained)  # methods, as in nanoGPT
GPT.crop_block_size = crop_block_size

# -----------------------------------------------------------------------------
# 8. LoRA (https://arxiv.org/abs/2106.09685): read on if you finetune with adapters


def add_lora(model, base, rank, alpha, dropout, targets, checksum=None):
    """Freeze the model and add LoRA adapters to the Linear layers in `targets` (comma-separated).

    base: where the frozen weights can be loaded again; checkpoints contain the adapters only.
    ValueError if a setting does not fit or the peft library is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("LoRA needs the peft library: pip install peft") from None
    # targets are names such as c_attn, or paths in a block such as attn.c_proj
    paths = [name for name, module in model.transformer.h[0].named_modules() if isinstance(module, Linear)]
    choices = sorted({path.split(".")[-1] for path in paths}) + paths
    for name in targets.split(","):
        if name not in choices:
            raise ValueError(f"lora_targets must be some of {', '.join(choices)}, got {name}")

    # peft puts the adapters in place; without dropout our forward pass is faster than its own
    checksum = checksum or weights_checksum(model)
    model.lora = dict(base=base, rank=rank, alpha=alpha, dropout=dropout, targets=targets, checksum=checksum)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets.split(","))
    inject_adapter_in_model(config, model)
    for _, layer in lora_layers(model):
        layer.cast_input_dtype_enabled = False  # autocast casts already
        if not dropout:
            layer.forward = functools.partial(merged_forward, layer, layer.forward)


def merged_forward(layer, peft_forward, x):
    """Add B A to the weight, then multiply once: faster than multiplying every token by A, by B and by the weight."""
    if layer.disable_adapters or not layer.training:
        return peft_forward(x)
    # x (W + scale B A)^T + bias
    A, B, base = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer
    return F.linear(x, torch.addmm(base.weight, B, A, alpha=layer.scaling["default"]), base.bias)


def lora_layers(model):
    """Return [(name, module)] of the layers with adapters."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "base_layer")]


def merge_lora(model):
    """Merge the adapters into the base weights."""
    if not model.lora:
        return
    # replace peft's layers with their base layers, to which scale B A has been added
    for name, layer in lora_layers(model):
        layer.merge()
        model.set_submodule(name, layer.base_layer)
    model.lora = None
    del model.peft_config
    model.requires_grad_(True)


def enable_lora(model, enabled):
    """Turn the adapters on or off, to compare the model with its base."""
    for _, layer in lora_layers(model):
        layer.enable_adapters(enabled)


def weights_to_save(model, **options):
    """Return state_dict(**options); for a model with adapters, only theirs."""
    state = model.state_dict(**options)
    return {name: weight for name, weight in state.items() if ".lora_" in name} if model.lora else state


def weights_checksum(model):
    """Return the SHA-256 of the weights, without the position embeddings (they may be cropped)."""
    # in the order of the modules
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        if name != "transformer.wpe.weight":
            digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_lora_checkpoint(checkpoint, **override):
    """Load the base model from the path stored in the checkpoint, and add the adapters to it."""
    # the base may be a checkpoint or a transformers model
    lora = checkpoint["lora"]
    try:
        base_checkpoint, _ = open_checkpoint(lora["base"])
        if base_checkpoint and "lora" in base_checkpoint:
            raise ValueError("it is an adapter itself")
        model = load_model(lora["base"], base_checkpoint, **override)
    except (OSError, ValueError) as e:
        where = f"{lora['base']} (current directory {os.getcwd()})"
        raise ValueError(f"cannot load the LoRA base model {where}: {e}") from None
    # an adapter only fits the weights that it was trained on
    if weights_checksum(model) != lora["checksum"]:
        raise ValueError(f"the weights of {lora['base']} changed since the adapter was trained: restore them")
    # the adapter may have been trained on shorter sequences
    if checkpoint["model_args"]["block_size"] < model.config.block_size:
        crop_block_size(model, checkpoint["model_args"]["block_size"])
    # add the adapters, and replace their initial weights
    add_lora(model, **lora)
    load_weights(model, model.state_dict() | checkpoint["model"])
    return model


def save_adapter(model, folder):
    """Write adapter_config.json and adapter_model.safetensors, for PeftModel and vLLM.

    They fit the base model as save_pretrained() exports it; the errors are the same.
    """
    import safetensors.torch

    model_type = to_hf_config(model.config, {}).model_type
    weights = {}
    for key, weight in weights_to_save(model).items():
        for name, part in hf_parts(key.replace(".default", ""), weight, model.config):
            weights["base_model.model." + name] = part.clone()
    # the modules' names in transformers, for peft's config
    targets = {".".join(name.split(".lora_")[0].split(".")[-2:]) for name in weights}
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "adapter_model.safetensors")
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    replace(
        model.peft_config["default"], task_type="CAUSAL_LM", base_model_name_or_path=model.lora["base"],
        target_modules=sorted(targets), fan_in_fan_out=model_type == "gpt2", inference_mode=True,
    ).save_pretrained(folder)  # fmt: skip
    shutil.copymode(os.path.join(folder, "adapter_config.json"), path)  # written for the owner only


# -----------------------------------------------------------------------------
# 9. checkpoint files: read on if a crash, a full disk or a second reader concerns you

LATEST, PREVIOUS, BEST = "ckpt.pt", "ckpt_prev.pt", "ckpt_best.pt"


def save_checkpoint(checkpoint, folder, name=LATEST, keep_previous=True):
    """Save atomically: temporary file, fsync, rename.

    A crash or a full disk at any byte leaves the old file intact. keep_previous renames the old ckpt.pt to
    ckpt_prev.pt. OSError or RuntimeError if it cannot be written.
    """
    # write all of it under another name
    path = os.path.join(folder, name)
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError):
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    # rename; a crash between the two renames leaves ckpt_prev.pt
    if name == LATEST and keep_previous and os.path.exists(path):
        os.replace(path, os.path.join(folder, PREVIOUS))
    os.replace(temporary, path)
    # make the renames durable; only POSIX can open folders
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def copy_to_cpu(state, is_writer=True, copies=None):
    """Copy the tensors in nested dicts to the CPU, tied ones once, and gather sharded ones.

    All ranks must call it if tensors are sharded; those that do not write get None for each tensor.
    """
    # copies: {id of a tensor: its copy}
    copies = {} if copies is None else copies
    if isinstance(state, dict):
        return {key: copy_to_cpu(value, is_writer, copies) for key, value in state.items()}
    if not isinstance(state, torch.Tensor):
        return state
    # full_tensor() gathers the shards of all ranks
    if id(state) not in copies:
        full = state.full_tensor() if hasattr(state, "full_tensor") else state
        copies[id(state)] = full.detach().to("cpu", copy=True) if is_writer else None
    return copies[id(state)]


def read_checkpoint(path, mmap=False):
    """Read a checkpoint file onto the CPU; nothing in it is executed.

    mmap reads tensors when they are used, so that several processes share the memory.
    OSError if the file is missing, ValueError if it is corrupt or not a checkpoint.
    """
    with open(path, "rb") as f:
        try:
            archive = zipfile.ZipFile(f)
            corrupt = archive.testzip()  # torch.load skips the checksums
            if corrupt:
                raise ValueError(f"wrong checksum of {corrupt}")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, but torch.load would take the compressed bytes for weights")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            if not all(isinstance(checkpoint.get(key), dict) for key in ("model", "model_args")):
                raise ValueError("it has no model")
        except Exception as e:  # corrupt files raise many exception types
            raise ValueError(f"{path} is corrupt or not a checkpoint: {str(e).strip() or type(e).__name__}") from None
    return checkpoint


def load_checkpoint(folder, names=(LATEST, PREVIOUS)):
    """Return the first readable checkpoint of these names in a folder, and its path.

    Corrupt ones are reported on stderr. FileNotFoundError if there is none, ValueError if all are corrupt.
    """
    # those that exist, in the order of preference
    paths = [os.path.join(folder, name) for name in names]
    paths = [path for path in paths if os.path.exists(path)]
    if not paths:
        raise FileNotFoundError(f"no checkpoint in {folder} (looked for {', '.join(names)})")
    # the first that can be read, or the error of the last
    for path in paths[:-1]:
        try:
            return read_checkpoint(path, mmap=True), path
        except ValueError as e:
            print(f"WARNING: {str(e).splitlines()[0]!r}; using the next one instead", file=sys.stderr)
    return read_checkpoint(paths[-1], mmap=True), paths[-1]


def open_checkpoint(init_from, out_dir="", names=(BEST, LATEST, PREVIOUS)):
    """Return the checkpoint that init_from means, and its path; (None, None) for transformers models.

    'resume' means out_dir; from a folder, the first readable of `names` is loaded; a file is loaded itself.
    """
    if init_from == "resume":
        return load_checkpoint(out_dir, names)
    # a folder in the format of transformers or peft
    if any(os.path.exists(os.path.join(init_from, name)) for name in ("config.json", "adapter_config.json")):
        return None, None
    if os.path.isdir(init_from):
        return load_checkpoint(init_from, names)
    if os.path.exists(init_from) or init_from.endswith(".pt"):
        return read_checkpoint(init_from, mmap=True), init_from
    # a name on the Hub
    if re.fullmatch(r"gpt2(-medium|-large|-xl)?|[\w.-]+/[\w.-]+", init_from):
        return None, None
    raise ValueError(f"init_from must be resume, a checkpoint, a folder or a Hub name such as gpt2, got {init_from!r}")


# -----------------------------------------------------------------------------
# 10. FLOPs, memory, loss: read on if you measure


def get_num_params(model, non_embedding=True):
    """Return the number of parameters, by default without the position embeddings.

    The token embeddings count: the output layer shares them.
    """
    # tied weights are one parameter, and count once
    n = sum(p.numel() for p in model.parameters())
    if non_embedding and model.transformer.wpe is not None:
        n -= model.transformer.wpe.weight.numel()
    return n


def flops_per_token(model, T):
    """Return the training FLOPs per token at sequence length T (PaLM, https://arxiv.org/abs/2204.02311).

    6 per matmul weight, 4 if it is frozen, and 12 * n_layer * n_head * head_dim * T for attention.
    Example: n_layer=1, n_embd=8, 896 weights, T=4 -> 6 * 896 + 12 * 8 * 4 = 5760
    """
    # matmuls with the weights: 2 FLOPs forward, 4 backward; attention: QK^T and PV
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    products = sum((6 if p.requires_grad else 4) * p.numel() for p in matrices)
    return products + 12 * model.config.n_layer * model.config.n_head * model.config.head_dim * T


# Dense bfloat16/float16 TFLOP/s with float32 accumulation, from data sheets. A key fits if all its words are in the
# device's name; the first that fits is used.
GPU_TFLOPS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIE": 756, "H100 NVL": 835, "H100": 989,
    "A100": 312, "A30": 165, "A40": 150, "A10": 125, "A10G": 70, "L40S": 362, "L40": 181, "L4": 121,
    "RTX A6000": 155, "RTX 6000 ADA": 364, "RTX 5090": 209.5, "RTX 4090": 165, "RTX 3090": 71,
    "V100": 125, "T4": 65, "MI300X": 1307,
}  # fmt: skip


@functools.cache
def peak_flops(device, dtype):
    """Return (peak FLOP/s, its source): data sheet of a GPU, measured on a CPU, (None, reason) if unknown."""
    device = torch.device(device)
    dtype_name = str(dtype).removeprefix("torch.")
    # CPU: the fastest of up to 20 matmuls
    if device.type == "cpu":
        a, times = torch.ones(1024, 1024, dtype=dtype), []
        while len(times) < 20 and sum(times) < 0.5:  # a matmul takes seconds without bfloat16 instructions
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        return 2 * 1024**3 / min(times), f"measured, {dtype_name} matmul of 1024 x 1024 matrices"
    if device.type != "cuda":
        return None, f"peak of {device.type} unknown"

    # GPU: the data sheet, by name
    name = torch.cuda.get_device_name(device)
    words = re.findall(r"[A-Z0-9]+", name.upper())
    tflops = next((rate for key, rate in GPU_TFLOPS.items() if all(word in words for word in key.split())), None)
    # before Ampere only float16 runs on tensor cores; laptop GPUs are slower than their names
    has_tensor_cores = dtype == torch.float16 or torch.cuda.get_device_capability(device) >= (8, 0)
    if tflops is None or "LAPTOP" in words or not has_tensor_cores:
        return None, f"peak of {name} in {dtype_name} unknown"
    if dtype == torch.float32:
        return tflops * 1e12 / 2, f"data sheet of {name}, TF32"
    return tflops * 1e12, f"data sheet of {name}"


def peak_memory(device_type):
    """Return the peak memory in bytes: tensors on CUDA, else the process; None if unknown."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux, then other POSIX systems
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", f.read())[1])
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def sum_losses(model, batches):
    """Return (summed loss in nats, number of targets) over batches (X, Y), (B, T) each.

    Targets of -1 do not count.
    """
    total, count = 0.0, 0
    for X, Y in batches:
        _, loss = model(X, Y, return_logits=False)
        n = int((Y != -1).sum())
        if n:
            total += loss.item() * n
            count += n
    return total, count


GPT.get_num_params = get_num_params  # a method, as in nanoGPT

# -----------------------------------------------------------------------------
# 11. appendix: the same mathematics, faster. Skip it: results are equal up to rounding, int8 aside


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose weights may differ from x in dtype: FSDP gathers them in bfloat16."""

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm; on CPUs, where PyTorch does not fuse it, with half the memory traffic if x is large."""

    def forward(self, x):
        if x.is_cpu and x.numel() > 2**15 and not torch.compiler.is_compiling():
            return LeanRMSNorm.apply(x.float(), self.weight.float(), self.eps).to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LeanRMSNorm(torch.autograd.Function):
    """RMSNorm in float32 with a hand-written backward pass: 1.5 to 2 times faster on CPUs."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        # scale is 1 / RMS
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx, grad):
        normed, scale, weight = ctx.saved_tensors
        product = grad * normed
        # x / |x| does not change along x, so that part of the gradient vanishes
        along = (product @ weight).unsqueeze(-1).div_(-grad.size(-1))
        dx = (grad * weight).addcmul_(normed, along).mul_(scale)
        return dx, product.flatten(0, -2).sum(dim=0), None


class SquaredReLU(torch.autograd.Function):
    """relu(x)**2 with a hand-written backward pass: half the memory traffic of autograd's."""

    @staticmethod
    def forward(ctx, x):
        # relu(x) is all that the backward pass needs: d relu(x)^2 = 2 relu(x) dx
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).mul_(2)


def train_attention_on_cpu(q, k, v, dropout):
    """Compute causal attention where PyTorch's kernel is slow: in bfloat16, and with dropout."""
    if q.size(2) <= 256 and (dropout or q.dtype != torch.float32):
        return ShortAttention.apply(q, k, v, dropout)
    # SDPA's backward pass is up to five times slower in bfloat16 than in float32
    x = (q.float(), k.float(), v.float())
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(*x, dropout_p=dropout, is_causal=True, enable_gqa=q.size(1) > k.size(1))
    return y.to(q.dtype)


class ShortAttention(torch.autograd.Function):
    """Causal attention that stores its probabilities (B, H, T, T) for the backward pass.

    For T <= 256 they are small, and training on CPUs is up to 1.15 times faster than with
    F.scaled_dot_product_attention, which needs float32 to be fast and has no fused dropout there.
    """

    @staticmethod
    def forward(ctx, q, k, v, dropout=0.0):
        # (B, H, T, D) -> (B * G, H / G * T, D)
        B, H, T, D = q.shape
        groups = B * k.size(1)  # fold the query heads of a group into the sequence dimension
        q, k, v = q.reshape(groups, -1, D), k.reshape(groups, T, D), v.reshape(groups, T, D)
        # softmax(q k^T / sqrt(D) + mask)
        mask = q.new_full((T, T), -math.inf).triu(1).repeat(q.size(1) // T, 1)
        probs = torch.baddbmm(mask, q, k.mT, alpha=1 / math.sqrt(D)).softmax(dim=-1)
        kept = F.dropout(torch.ones_like(probs), dropout) if dropout else None  # 0 or 1 / (1 - dropout)
        ctx.save_for_backward(q, k, v, probs, kept)
        return ((probs if kept is None else probs * kept) @ v).view(B, H, T, D)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, probs, kept = ctx.saved_tensors
        B, H, T, D = grad.shape
        dy = grad.reshape(q.shape)
        # the chain rule, from y = (probs * kept) v backwards
        dprobs = dy @ v.mT if kept is None else (dy @ v.mT).mul_(kept)
        dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype).div_(math.sqrt(D))
        dq = dscores @ k
        dk = dscores.mT @ q
        dv = (probs if kept is None else probs * kept).mT @ dy
        return dq.view(B, H, T, D), dk.view(B, -1, T, D), dv.view(B, -1, T, D), None


def attend_one_token(q, k, v, mask):
    """Compute the attention of one query per sequence; the query heads that share keys and values become rows."""
    B, H, _, D = q.shape
    q = q.view(B, k.size(1), -1, D)  # (B, G, H / G, D)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v).reshape(B, H, 1, D)  # some kernels swap G and H / G in memory
    # sums that torch.compile fuses: faster than SDPA with a mask
    q = q.float()
    if q.is_cpu:  # store q, which the compiler would otherwise compute again for every key
        q = q.as_strided(q.shape, q.stride())
    q, k, v = q.unsqueeze(3), k.unsqueeze(2), v.unsqueeze(2)  # (B, G, H / G, 1, D), (B, G, 1, S, D)
    scores = (q * k).sum(dim=-1) / math.sqrt(D)  # (B, G, H / G, S)
    probs = scores.masked_fill(~mask[0], -math.inf).softmax(dim=-1)
    return (probs.unsqueeze(-1) * v).sum(dim=-2).to(v.dtype).view(B, H, 1, D)


def linear_cross_entropy(x, weight, targets):
    """Return the mean cross-entropy of logits x @ weight.T; x (B, T, C), weight (V, C), targets (B, T)."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    needs_grad = torch.is_grad_enabled()
    return LinearCrossEntropy.apply(
        x.flatten(0, 1), weight, targets.flatten(), needs_grad, needs_grad and weight.requires_grad
    )


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits that are never all in memory.

    The full logits would dominate the memory of a small GPT. They are computed in chunks of rows, and their gradient
    (softmax - one_hot) in the same pass; backward only rescales. Products are in x's dtype, sums in float32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, x_needs_grad, weight_needs_grad):
        # rows without a target become 0, and have no gradient then
        w, counted = weight.to(x.dtype), targets != -1
        x, targets = x * counted.unsqueeze(1), targets.clamp(min=0).unsqueeze(1)
        # larger chunks on GPUs: each adds to the whole weight gradient, which costs memory traffic
        chunks = math.ceil(x.size(0) * w.size(0) / (2**26 if x.is_cpu else 2**28))
        buffer = x.new_empty(math.ceil(x.size(0) / chunks), w.size(0))
        losses, dx = [], []
        dw = torch.zeros_like(weight, dtype=torch.float32) if weight_needs_grad else None
        for rows, target in zip(x.chunk(chunks), targets.chunk(chunks), strict=True):
            logits = torch.mm(rows, w.t(), out=buffer[: len(rows)])
            losses.append(cross_entropy_and_gradient_(logits, target))
            if x_needs_grad:
                dx.append(logits @ w)
            if weight_needs_grad:
                dw += logits.t() @ rows
        # the mean over the targets that count
        count = counted.sum().clamp(min=1)
        if x_needs_grad:
            ctx.save_for_backward(torch.cat(dx), dw, counted.unsqueeze(1) / count)
        return (torch.cat(losses) * counted).sum() / count

    @staticmethod
    def backward(ctx, grad):
        dx, dw, share = ctx.saved_tensors  # share: 1 / count, or 0 for targets of -1
        dw = None if dw is None else dw.mul_(grad * share.amax())
        return dx * (grad * share).to(dx.dtype), dw, None, None, None


def cross_entropy_and_gradient_(logits, targets):
    """Return the cross-entropies (N,) of logits (N, V) with targets (N, 1).

    In place, the logits become their gradient, softmax - one_hot.
    """
    # on CPUs, tiles whose float32 copies stay in the cache; the compiler makes no copies
    tile = 2**21 // logits.size(1) if logits.is_cpu and not torch.compiler.is_compiling() else len(logits)
    losses = []
    for rows, target in zip(logits.split(max(1, tile)), targets.split(max(1, tile)), strict=True):
        probs = rows.float()
        largest, at_target = probs.amax(dim=1, keepdim=True), probs.gather(1, target)
        probs = torch.softmax(probs, dim=1)
        # numerically stable log-sum-exp: the largest probability is exp(largest - log-sum-exp)
        loss = largest - probs.amax(dim=1, keepdim=True).log() - at_target
        losses.append(loss)
        # probability - 1 at the target; expm1 keeps its digits when the probability is close to 1
        rows.copy_(probs).scatter_(1, target, torch.expm1(-loss).to(rows.dtype))
    return torch.cat(losses).squeeze(1)


_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class Linear(nn.Linear):
    """nn.Linear that uses oneDNN for float32 inference on CPUs.

    Decoding reads every weight once per token. F.linear's float32 kernel reads them at about a third of the memory
    bandwidth, oneDNN's at nearly all of it.
    """

    def forward(self, x):
        is_float32 = x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        is_inference = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if _onednn_linear and x.is_cpu and is_float32 and is_inference:
            return _onednn_linear(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


class Int8Linear(nn.Module):
    """Linear with int8 weights and one scale per output row, for generation only.

    Half the memory traffic of bfloat16, slightly less accurate.
    """

    def __init__(self, linear):
        super().__init__()
        # each row is scaled to -127 .. 127 and rounded
        weight, self.bias = linear.weight.detach().to_dense().float(), linear.bias  # dense: not packed
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale.unsqueeze(1)).round().to(torch.int8))  # (out, in)
        self.register_buffer("scale", scale.to(linear.weight.dtype))

    def forward(self, x):
        # PyTorch's kernel for few rows reads blocks of 64 weights
        rows = x.numel() // x.size(-1)
        has_kernel = all(size % 64 == 0 for size in self.weight.shape) and rows <= 16
        if has_kernel and x.is_cpu and x.dtype == torch.bfloat16:
            y = torch._weight_int8pack_mm(x.view(rows, -1), self.weight, self.scale).view(*x.shape[:-1], -1)
        elif x.dtype == torch.float16:  # products with -127 .. 127 could overflow
            y = F.linear(x, self.weight.to(x.dtype) * self.scale.unsqueeze(1))
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


class PackedLinear(nn.Module):
    """Linear with the weights in oneDNN's order, for generation on CPUs only.

    Decoding in bfloat16 reads them at 1.4 to 1.7 times the bandwidth.
    """

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = linear.bias

    def forward(self, x):
        return _onednn_linear(x, self.weight, self.bias, "none", [], "")


def quantize(model):
    """Replace all Linear layers by Int8Linear."""
    replace_linear(model, Int8Linear)


def pack_weights(model):
    """Replace all Linear layers by PackedLinear, if the model is in bfloat16 on a CPU, where that is faster."""
    if _onednn_linear and model.lm_head.weight.is_cpu and model.lm_head.weight.dtype == torch.bfloat16:
        replace_linear(model, PackedLinear)


def replace_linear(model, kind):
    """Replace all Linear layers, packed ones too. A tied output layer gets weights of its own."""
    # a list, because the modules change
    for name, module in list(model.named_modules()):
        if isinstance(module, (Linear, PackedLinear)):
            model.set_submodule(name, kind(module))


def compile_generation(model):
    """Compile the decoding of one token, for weights that do not change, and for one generation at a time.

    CUDA graphs on GPUs, autotuned kernels with prepacked weights on CPUs. The first token takes up to a minute;
    another batch size or cache size, a few seconds.
    """

    def step(token, pos, caches):
        logits, _ = model(token[:, None], caches=caches, pos=pos)
        return logits[:, -1]

    embeddings = model.transformer.wte.weight

    def needed_guards(guards):
        # the embeddings identify the model; checking that none of its modules has changed takes 1 ms per token
        return ["model" not in guard.name or guard.value is embeddings for guard in guards]

    # once per shape of the caches; beyond the limit, which is 8 by default, step() would not be compiled
    torch._dynamo.config.recompile_limit = 256
    # CPU: freezing prepacks the weights, autotuning picks the kernels
    if embeddings.is_cpu:
        from torch._inductor import config  # torch.compile has no option for freezing

        # autotuning measures matrices in the cache, where generated kernels win; without AMX, generated bfloat16
        # kernels read memory at half the speed of oneDNN's
        has_amx = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16")
        backends = "CPP,ATEN" if has_amx or model.lm_head.weight.dtype != torch.bfloat16 else "ATEN"
        options = {"max_autotune": True, "max_autotune_gemm_backends": backends, "guard_filter_fn": needed_guards}
        compiled = torch.compile(step, dynamic=False, options=options)

        @config.patch(freezing=True)
        def compiled_step(*args):
            with contextlib.redirect_stderr(io.StringIO()):  # it lists every kernel that it tries
                return compiled(*args)
    else:
        compiled_step = capture_cuda_graphs(torch.compile(step, dynamic=False))

    eager = model.next_logits

    def next_logits(context, caches):
        if not caches[0].visible:  # the prompt, which may have any length
            return eager(context, caches)
        for cache in caches:
            cache.visible = cache.size  # static shapes: the mask hides positions that are not filled
        token = context[:, -1].clone(memory_format=torch.contiguous_format)  # another stride would be compiled again
        pos = torch.full((1,), context.size(1) - 1, device=context.device)
        return compiled_step(token, pos, caches)

    model.next_logits = next_logits


def capture_cuda_graphs(step):
    """Return step(token, pos, caches) as one CUDA graph per shape of the caches.

    A graph works at the addresses it was captured with, so later generations use the caches of the first one.
    """
    captured = {}  # {shape of a layer's keys: (graph, its inputs, its logits)}

    def replay(token, pos, caches):
        shape = caches[0].k.shape
        if shape not in captured:
            inputs = (token.clone(), pos.clone(), caches)
            step(*inputs)  # compiles; the graph will store the same keys and values again
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = step(*inputs)
            captured[shape] = graph, inputs, logits
        graph, (graph_token, graph_pos, graph_caches), logits = captured[shape]
        # copy the inputs to the graph's; the caches only at the start of a generation
        graph_token.copy_(token)
        graph_pos.copy_(pos)
        for cache, static in zip(caches, graph_caches, strict=True):
            if cache.k is not static.k:
                cache.k, cache.v = static.k.copy_(cache.k), static.v.copy_(cache.v)
        graph.replay()
        return logits

    return replay
