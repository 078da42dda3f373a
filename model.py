"""
The GPT model, all of it in this file. In reading order:

    GPTConfig                     the shape of a model
    attention .. Block            the parts of a transformer
    GPT                           the model: forward, generation, weights in and out, LoRA, optimizer, FLOPs
    LLAMA_NAMES .. hub_weights    the formats of Hugging Face transformers
    save_checkpoint, load_...     checkpoint files, written whole or not at all
    peak_flops, peak_memory       what the device at hand could do at best, and has used

Letters in shape comments: B sequences, T tokens in each, C = n_embd channels, H heads of D = head_dim channels,
S tokens that attention looks back on, V tokens in the vocabulary.

References: GPT-2, https://github.com/openai/gpt-2/blob/master/src/model.py (architecture);
PaLM appendix B, https://arxiv.org/abs/2204.02311 (FLOPs, MFU).
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import re
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

# -----------------------------------------------------------------------------
# the parts

CLASSIC = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")  # what nanoGPT's config has
# the least that each size can be; 0 stands for a size that follows from the others
SIZES = dict(block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1, n_hidden=0, n_kv_head=0, head_dim=0)


def padded(vocab_size):
    """Rows of embeddings for so many tokens: a multiple of 64, at which matrix units are fastest, unless they are few
    as characters are."""
    return vocab_size if vocab_size < 1000 else (vocab_size + 63) // 64 * 64


def swiglu(x):
    """https://arxiv.org/abs/2002.05202: half of the channels gate the other half."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class SquaredReLU(torch.autograd.Function):
    """relu(x)**2 (https://arxiv.org/abs/2109.08668) in half of the passes over memory that autograd would make."""

    @staticmethod
    def forward(ctx, x):
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).mul_(2)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),  # as OpenAI's GPT-2 has it
    "swiglu": swiglu,
    "relu2": SquaredReLU.apply,
}


@dataclass
class GPTConfig:
    """The shape of a GPT. Raises ValueError for one that cannot be built."""

    block_size: int = 1024  # longest sequence the model can see, in tokens
    vocab_size: int = 50304  # GPT-2's 50257 as padded() has it
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # whether Linear and LayerNorm have biases, as GPT-2's do
    # choices that came later, each one by itself; the defaults are GPT-2's
    norm: str = "layernorm"  # layernorm, rmsnorm
    position: str = "learned"  # learned, rope
    mlp: str = "gelu"  # gelu, gelu_tanh, swiglu, relu2
    n_hidden: int = 0  # width of the MLP; 0: 4 * n_embd, or as many weights for swiglu
    n_kv_head: int = 0  # heads of keys and values, shared by groups of the n_head query heads; 0: n_head
    qk_norm: bool = False  # normalise queries and keys
    tied: bool = True  # the output layer shares the token embeddings' weights
    head_dim: int = 0  # channels of a head; 0: n_embd / n_head
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()  # Llama 3's: factor, low_freq_factor, high_freq_factor, original block_size

    def __post_init__(self):
        for name, least in SIZES.items():
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {getattr(self, name)!r}")
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{field.name} must be a {kind.__name__}, not {value!r}")
        if len(self.rope_scaling) not in (0, 4) or not all(type(x) in (int, float) for x in self.rope_scaling):
            raise ValueError(f"rope_scaling must be four numbers or none, not {self.rope_scaling!r}")
        for name, known in (("norm", NORMS), ("position", ("learned", "rope")), ("mlp", ACTIVATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} takes {', '.join(known)}, not {getattr(self, name)!r}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"rope turns pairs of channels, so the heads' {self.head_dim} must be even")
        if not self.n_hidden:
            self.n_hidden = -(-8 * self.n_embd // 24) * 8 if self.mlp == "swiglu" else 4 * self.n_embd
        weights = (12 * self.n_layer * self.n_embd + self.vocab_size + self.block_size) * self.n_embd
        if weights > 1e14:
            raise ValueError(f"a model of {weights:.1e} parameters is past all machines: lower n_layer or n_embd")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")

    def to_dict(self):
        """The fields as keyword arguments; those beyond GPT-2's are left out where they follow from the others, so
        that nanoGPT reads the checkpoints of what it can build."""
        values = asdict(self)
        classic = {name: values[name] for name in CLASSIC}
        implied = asdict(GPTConfig(**classic))
        return classic | {name: value for name, value in values.items() if value != implied[name]}


class LeanRMSNorm(torch.autograd.Function):
    """F.rms_norm with half of its passes over memory: PyTorch fuses it on GPUs, but not on CPUs."""

    @staticmethod
    def forward(ctx, x, gain, eps):
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, scale, gain)
        return normed * gain

    @staticmethod
    def backward(ctx, grad):
        normed, scale, gain = ctx.saved_tensors
        product = grad * normed
        # x / |x| does not change along x, so that part of the gradient goes
        along = (product @ gain).unsqueeze(-1).div_(-grad.size(-1))
        return (grad * gain).addcmul_(normed, along).mul_(scale), product.flatten(0, -2).sum(dim=0), None


def rms_norm(x, gain, eps):
    """x over its root mean square along the last dimension (https://arxiv.org/abs/1910.07467), times gain."""
    if x.is_cpu and not torch.compiler.is_compiling():
        return LeanRMSNorm.apply(x.float(), gain.float(), eps).to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], gain.to(x.dtype), eps)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that takes its input in another dtype than its weights (FSDP gathers those in bfloat16)."""

    def forward(self, x):
        gain, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, gain, bias, self.eps)


NORMS = {
    "layernorm": lambda size, config: LayerNorm(size, eps=config.norm_eps, bias=config.bias),
    "rmsnorm": lambda size, config: RMSNorm(size, config.norm_eps),
}


class KVCache:
    """One layer's keys and values of the tokens seen so far: (B, H, size, D) each, filled up to `length`."""

    def __init__(self, size):
        self.size, self.length = size, 0

    def append(self, k, v):
        """Store k and v, (B, H, T, D), behind those already here; returns all, (B, H, S, D)."""
        if self.length == 0:
            self.k, self.v = (t.new_zeros(*t.shape[:2], self.size, t.size(3)) for t in (k, v))
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    def next(self, q, k, v, position):
        """Attention of one more token's q, (B, H, 1, D), with its k and v stored at position, (1,). It has the same
        shapes at every position, and is made of sums that a compiler does in few passes over the memory."""
        self.k.index_copy_(2, position, k)
        self.v.index_copy_(2, position, v)
        B, H, _, D = q.shape
        k, v, q = self.k.unsqueeze(2), self.v.unsqueeze(2), q.view(B, k.size(1), -1, 1, D)  # heads that share k and v
        scores = (q.float() * k).sum(dim=-1) / math.sqrt(D)
        beyond = torch.arange(self.size, device=q.device) > position
        probs = scores.masked_fill(beyond, -math.inf).softmax(dim=-1)
        return (probs.unsqueeze(-1) * v).sum(dim=-2).to(v.dtype).view(B, H, 1, D)


class ShortAttention(torch.autograd.Function):
    """Causal attention that keeps its probabilities, (B, H, T, T), for the backward pass. They are little where T is
    small, and a CPU trains on short sequences up to twice as fast so, above all in bfloat16."""

    @staticmethod
    def forward(ctx, q, k, v, dropout=0.0):
        B, H, T, D = q.shape
        groups = B * k.size(1)  # query heads that share keys and values stand one below the other
        q, k, v = q.reshape(groups, -1, D), k.reshape(groups, T, D), v.reshape(groups, T, D)
        future = q.new_full((T, T), -math.inf).triu(1).repeat(q.size(1) // T, 1)
        probs = torch.baddbmm(future, q, k.mT, alpha=1 / math.sqrt(D)).softmax(dim=-1)
        kept = F.dropout(torch.ones_like(probs), dropout) if dropout else None
        ctx.save_for_backward(q, k, v, probs, kept)
        return ((probs if kept is None else probs * kept) @ v).view(B, H, T, D)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, probs, kept = ctx.saved_tensors
        (B, H, T, D), dy = grad.shape, grad.reshape(q.shape)
        dprobs = dy @ v.mT if kept is None else (dy @ v.mT).mul_(kept)
        dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype).div_(math.sqrt(D))
        dq, dk, dv = dscores @ k, dscores.mT @ q, (probs if kept is None else probs * kept).mT @ dy
        return dq.view(B, H, T, D), dk.view(B, -1, T, D), dv.view(B, -1, T, D), None


def attention(q, k, v, dropout=0.0):
    """Causal attention of q, (B, H, T, D), on k and v, (B, H, S, D); the queries are the last T of S positions."""
    T, S = q.size(2), k.size(2)
    if q.is_cpu and q.requires_grad and 1 < T == S:
        if T <= 256:
            return ShortAttention.apply(q, k, v, dropout)
        if q.dtype == torch.bfloat16:  # PyTorch's backward pass is up to five times slower in it
            return attention(q.float(), k.float(), v.float(), dropout).to(q.dtype)
    # is_causal aligns the first query with the first key, so it fits T == S alone; a single last query sees all keys
    mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    with torch.autocast(q.device.type, enabled=False):  # the inputs' own dtype it is
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=1 < T == S, enable_gqa=q.size(1) > k.size(1)
        )


def rope_angles(positions, config):
    """Cosines and signed sines, (T, D) each: rotary embeddings (https://arxiv.org/abs/2104.09864) turn channels i and
    i + D/2 of queries and keys at positions, (T,). Long waves are stretched by rope_scaling as Llama 3.1 does it."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents  # radians per position, (D/2,)
    if config.rope_scaling:
        factor, low, high, original = config.rope_scaling
        turns = original * frequencies / (2 * math.pi)  # in the context that the model was first trained on
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / factor
    angles = positions[:, None] * frequencies
    return angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), dim=-1)


def rotate(x, cos, sin):
    """x, (B, H, T, D), with the pairs of its channels turned."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.size(-1) // 2, dims=-1), sin.to(x.dtype))


_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class Linear(nn.Linear):
    """nn.Linear that multiplies few rows by a float32 matrix at the speed of memory on CPUs.

    Decoding reads every weight for each token. F.linear's float32 kernel reads them at about a third of the
    memory's bandwidth there, oneDNN's at nearly all of it.
    """

    def forward(self, x):
        plain_float32 = x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        inference = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if _onednn_linear and x.is_cpu and plain_float32 and inference:
            return _onednn_linear(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


class ThinlyTrained(torch.autograd.Function):
    """x @ (weight + scale * B @ A).T, for a frozen weight, (out, in), and LoRA's A, (rank, in), and B, (out, rank). To
    add B @ A to the weight takes less than to multiply every token by both and to add the results."""

    @staticmethod
    def forward(ctx, x, weight, A, B, scale):
        ctx.save_for_backward(x, weight, A, B)
        ctx.scale = scale
        return x @ torch.addmm(weight, B, A, alpha=scale).to(x.dtype).t()

    @staticmethod
    def backward(ctx, grad):
        x, weight, A, B = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = grad @ torch.addmm(weight, B, A, alpha=ctx.scale).to(x.dtype)
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)
        dA = (grad @ B.to(grad.dtype)).t() @ x
        dB = grad.t() @ (x @ A.to(x.dtype).t())
        return dx, None, ctx.scale * dA.to(A.dtype), ctx.scale * dB.to(B.dtype), None


def thinly_trained(layer, forward, x):
    """What a LoRA layer of peft makes of x, by ThinlyTrained while it is trained, else by its own forward."""
    if not layer.training or layer.disable_adapters:
        return forward(x)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    A, B, base = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer
    with torch.autocast(x.device.type, enabled=False):
        y = ThinlyTrained.apply(x, base.weight, A, B, layer.scaling["default"])
        return y if base.bias is None else y + base.bias.to(y.dtype)


class Int8Linear(nn.Module):
    """A Linear's weights as integers from -127 to 127, times a scale for each row: less to read for each token that is
    generated. Half as much as bfloat16's, and all in all a little less exact."""

    def __init__(self, linear):
        super().__init__()
        weight, self.bias = linear.weight.detach().float(), linear.bias
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale.unsqueeze(1)).round().to(torch.int8))  # (out, in)
        self.register_buffer("scale", scale.to(linear.weight.dtype))

    def forward(self, x):
        rows = x.numel() // x.size(-1)
        blocks = all(size % 64 == 0 for size in self.weight.shape)  # the kernel for few rows reads whole ones
        if blocks and x.is_cpu and x.dtype == torch.bfloat16 and rows <= 16:
            y = torch._weight_int8pack_mm(x.view(rows, -1), self.weight, self.scale).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        D = config.head_dim
        self.c_attn = Linear(config.n_embd, sum(self.heads) * D, bias=config.bias)  # queries, keys, values of all heads
        self.c_proj = Linear(config.n_head * D, config.n_embd, bias=config.bias)
        self.q_norm, self.k_norm = (NORMS[config.norm](D, config) if config.qk_norm else nn.Identity() for _ in "qk")
        self.resid_dropout = nn.Dropout(config.dropout)
        self.dropout = config.dropout

    def forward(self, x, rope=None, cache=None, position=None):
        B, T, C = x.size()
        qkv = self.c_attn(x).view(B, T, sum(self.heads), -1).transpose(1, 2)
        q, k, v = qkv.split(self.heads, dim=1)  # (B, H, T, D), and (B, n_kv_head, T, D) twice
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if position is not None:
            y = cache.next(q, k, v, position)  # (B, H, 1, D)
        else:
            if cache is not None:
                k, v = cache.append(k, v)  # (B, H, S, D)
            y = attention(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        gates = 2 if config.mlp == "swiglu" else 1
        self.c_fc = Linear(config.n_embd, gates * config.n_hidden, bias=config.bias)
        self.act = ACTIVATIONS[config.mlp]
        self.c_proj = Linear(config.n_hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config.n_embd, config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = NORMS[config.norm](config.n_embd, config)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, cache=None, position=None):
        x = x + self.attn(self.ln_1(x), rope, cache, position)
        x = x + self.mlp(self.ln_2(x))
        return x


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy, in nats, of logits x @ weight.T over the targets that are not -1; x (N, C), weight (V, C),
    targets (N,). Products are in the dtype of x, softmax and sums in float32.

    The logits would be most of a small GPT's memory. So they are made for a piece of the rows at a time, and their
    gradient, softmax - one_hot, is multiplied on at once: what is left for backward() is to scale the results.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, training, frozen):
        w, counted = weight.to(x.dtype), targets != -1
        x, targets = x * counted.unsqueeze(1), targets.clamp(min=0).unsqueeze(1)
        # each piece is added to the gradient of all weights: the faster a device multiplies, the larger it has to be
        pieces = math.ceil(x.size(0) * w.size(0) / (2**26 if x.is_cpu else 2**28))
        buffer = x.new_empty(math.ceil(x.size(0) / pieces), w.size(0))
        nats, dx, dw = [], [], torch.zeros_like(weight, dtype=torch.float32) if training and not frozen else None
        for rows, target in zip(x.chunk(pieces), targets.chunk(pieces), strict=True):
            logits = torch.mm(rows, w.t(), out=buffer[: len(rows)])
            nats.append(cross_entropy_(logits, target))
            if training:
                dx.append(logits @ w)
            if dw is not None:
                dw += logits.t() @ rows
        count = counted.sum()
        if training:
            ctx.save_for_backward(torch.cat(dx), dw, counted.unsqueeze(1) / count)
        return (torch.cat(nats) * counted).sum() / count

    @staticmethod
    def backward(ctx, grad):
        dx, dw, share = ctx.saved_tensors
        dw = None if dw is None else dw.mul_(grad * share.amax())
        return dx * (grad * share).to(dx.dtype), dw, None, None, None


def cross_entropy_(logits, targets):
    """Cross-entropies, (N,), of logits, (N, V), and targets, (N, 1). In place, the logits become their gradient."""
    # float32 copies of a few rows at a time stay in a CPU's cache; compilers do without copies
    tile = 2**21 // logits.size(1) if logits.is_cpu and not torch.compiler.is_compiling() else len(logits)
    nats = []
    for piece, target in zip(logits.split(max(1, tile)), targets.split(max(1, tile)), strict=True):
        probs = piece.float()
        top, at_target = probs.amax(dim=1, keepdim=True), probs.gather(1, target)
        probs = torch.softmax(probs, dim=1)
        # the log of the sum of exponentials, from the largest of them: it can neither overflow nor vanish
        nats.append(top - probs.amax(dim=1, keepdim=True).log() - at_target)
        piece.copy_(probs).scatter_(1, target, torch.expm1(-nats[-1]).to(piece.dtype))  # the probability less 1
    return torch.cat(nats).squeeze(1)


def sample_next(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token a row from logits, (B, V); returns ids, (B,).

    temperature 0 takes the likeliest token. top_k keeps the k likeliest; top_p keeps the fewest whose probabilities
    add up to p (nucleus sampling, https://arxiv.org/abs/1904.09751). None or 0 turns either off.
    """
    if temperature < 1e-30:  # what float32 takes for 0
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)).float() / temperature  # no overflow if that is tiny
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(dim=-1)
        beyond = probs.cumsum(dim=-1) - probs >= top_p  # what precedes the token already reaches p
        beyond[:, 0] = False  # one is left even where top_p is 0.0 in float32
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    # one random number a row picks from the probabilities laid end to end; torch.multinomial draws one for every token
    ends = logits.softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.rand(len(ends), 1, device=ends.device, generator=generator)  # rounded, too, below 1
    return torch.searchsorted(ends, drawn * ends[:, -1:], right=True).squeeze(-1)


# -----------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
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
        self.tie()
        self.init_weights()
        self.lora = None  # by add_lora()
        self.compiled_step = None  # by compile_generation()
        self.gradient_checkpointing = False  # for training: each block's inputs are kept, the rest is computed again

    def tie(self):
        if self.config.tied:  # https://arxiv.org/abs/1608.05859
            self.transformer.wte.weight = self.lm_head.weight

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialisation: N(0, 0.02), and less on the residual path, which 2 * n_layer projections add to."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                p.normal_(std=0.02)
            elif name.endswith("bias"):
                p.zero_()
            else:
                p.fill_(1.0)  # a norm's gain

    def get_num_params(self, non_embedding=True):
        """Number of parameters; by default without the position embeddings. The token embeddings count: they are
        the output layer's weights, too."""
        n = sum(p.numel() for p in self.parameters())
        return n - sum(p.numel() for p in self.positions()) if non_embedding else n

    def positions(self):
        """The weights of learned positions, if there are any."""
        return [self.transformer.wpe.weight] if self.transformer.wpe is not None else []

    def looked_up(self):
        """The weights of which a token reads one row, and that take part in no matrix product."""
        shared = self.lm_head.weight is self.transformer.wte.weight
        return self.positions() + ([] if shared else [self.transformer.wte.weight])

    def forward(self, idx, targets=None, caches=None, return_logits=True, position=None):
        """Token ids idx, (B, T), to (logits, loss).

        With targets, (B, T): logits of all positions, (B, T, V), and the mean cross-entropy in nats over the targets
        that are not -1. return_logits=False gives None for the logits, which then never lie in memory all at once.
        Without targets: logits of the last position alone, (B, 1, V), and None. caches, one KVCache a layer: idx
        continues what they hold, and is added to them; or, with its position, (1,), idx is one token that is put there.
        ValueError where it all exceeds block_size.
        """
        B, T = idx.size()
        positions = position
        if positions is None:
            start = caches[0].length if caches else 0
            if start + T > self.config.block_size:
                raise ValueError(f"{start + T} tokens do not fit the model's block_size of {self.config.block_size}")
            positions = torch.arange(start, start + T, device=idx.device)
        x, rope = self.transformer.wte(idx), None  # (B, T, C)
        if self.transformer.wpe is None:
            rope = rope_angles(positions, self.config)
        else:
            x = x + self.transformer.wpe(positions)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            if self.gradient_checkpointing and self.training:
                x = recompute(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, caches[i] if caches else None, position)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        if not return_logits:
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            x, weight, training = x.view(B * T, -1), self.lm_head.weight, torch.is_grad_enabled()
            return None, LinearCrossEntropy.apply(x, weight, targets.reshape(-1), training, not weight.requires_grad)
        logits = self.lm_head(x)  # (B, T, V)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    # ---- generation

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None, generator=None, slide=1):
        """Continue idx, (B, T), token by token: yields (B,) ids up to max_new_tokens times.

        Sampling is as sample_next has it; a generator makes it repeatable. A row that has drawn the token `stop`
        goes on with it; when all rows have, the stream ends. The model sees its last block_size tokens at most.
        Positions start at 0, so once the window is full every step moves all of them, and with them every cached key:
        slide=1 computes the window anew for each token (exactly what a model without a cache says), slide=n drops n
        tokens at a time and computes it anew for one token in n. Call eval() first.
        """
        size = self.config.block_size
        if not 1 <= slide <= size:
            raise ValueError(f"slide must lie between 1 and block_size ({size}), not {slide}")
        # the last token needs no room; a compiled step is compiled anew for every other size
        room = idx.size(1) + max_new_tokens - 1
        room = min(size, -(-room // 256) * 256 if self.compiled_step else room)
        window, token, caches = idx[:, -size:], None, None
        stopped = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if window.size(1) > size:
                window, caches = window[:, slide:], None
            if caches and self.compiled_step:
                position = torch.tensor([window.size(1) - 1], device=idx.device)
                logits, _ = self.compiled_step(token[:, None], caches=caches, position=position)
            else:
                caches = caches or [KVCache(room) for _ in self.transformer.h]
                logits, _ = self(window[:, caches[0].length :], caches=caches)  # first the prompt, then one token each
            token = sample_next(logits[:, -1], temperature, top_k, top_p, generator)
            if stop is not None:
                token = token.masked_fill(stopped, stop)
                stopped |= token == stop
            yield token
            if stop is not None and stopped.all():
                return
            window = torch.cat((window, token[:, None]), dim=1)

    def quantize(self):
        """Turn the weights of all matrix products into 8-bit integers, for generation alone. A tied output layer gets
        such weights of its own."""
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, Linear):
                    setattr(module, name, Int8Linear(child))

    def compile_generation(self):
        """Compile the step that generates a token, for weights that stay as they are: on GPUs it becomes one launch, on
        CPUs the weights are copied in the order in which the fastest of some matrix products reads them. Up to a minute
        for the first token, and seconds for others of another batch size or for every 256 positions."""
        if self.lm_head.weight.is_cpu:
            from torch._inductor import config  # torch.compile has no option for freezing

            options = {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}
            step = torch.compile(self.forward, dynamic=False, options=options)

            @config.patch(freezing=True)
            def quiet_step(*args, **kwargs):
                with contextlib.redirect_stderr(io.StringIO()):  # there it lists every product that it tries
                    return step(*args, **kwargs)

            self.compiled_step = quiet_step
        else:
            self.compiled_step = torch.compile(self.forward, dynamic=False, mode="reduce-overhead")

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **sampling):
        """idx, (B, T), and what stream() yields behind it: (B, T + up to max_new_tokens)."""
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, **sampling)
        return torch.cat([idx, *(t[:, None] for t in tokens)], dim=1)

    # ---- weights in

    def crop_block_size(self, block_size):
        """Forget the position embeddings from block_size on. ValueError if there are fewer than that."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size {block_size} is past the {self.config.block_size} that the model has")
        self.config.block_size = block_size
        if self.transformer.wpe is None:
            return
        kept = self.transformer.wpe.weight.detach()[:block_size].clone()
        self.transformer.wpe = nn.Embedding.from_pretrained(kept, freeze=False)

    @classmethod
    def from_checkpoint(cls, checkpoint, **override):
        """The model of a checkpoint, on the CPU; override replaces fields of its GPTConfig (dropout, say). One of LoRA
        brings its base along, from where that was.

        ValueError names every weight that is missing, unknown or of another shape; OSError when the base is gone.
        """
        if "lora" in checkpoint:
            return cls.from_adapter(checkpoint, **override)
        unknown = set(checkpoint["model_args"]) - {field.name for field in fields(GPTConfig)}
        if unknown:
            names = ", ".join(sorted(map(str, unknown)))
            raise ValueError(f"the checkpoint's model has settings that are unknown here: {names}")
        config = GPTConfig(**{**checkpoint["model_args"], **override})
        # checkpoints from elsewhere may carry the prefixes of torch.compile and DDP, and attention masks
        weights = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in checkpoint["model"].items()}
        weights = {k: v for k, v in weights.items() if not k.endswith(HUB_EXTRAS)}
        if config.n_layer > len(weights):
            raise ValueError(f"weights do not fit the model: {len(weights)} of them for {config.n_layer} layers")
        with torch.device("meta"):  # no memory and no time for weights that are replaced at once
            model = cls(config)
        check_shapes(weights, model.state_dict())
        # copies: the tensors of a checkpoint may still lie in its file
        weights = {k: torch.empty(v.shape).copy_(v.detach()) for k, v in weights.items()}
        model.load_state_dict(weights, assign=True)
        model.tie()
        return model

    @classmethod
    def from_adapter(cls, checkpoint, **override):
        """from_checkpoint() for one of LoRA: its base, with the adapter beside the weights."""
        lora = checkpoint["lora"]
        try:
            found, _ = find_checkpoint(lora["base"], (BEST, LATEST, PREVIOUS), "")
            if found and "lora" in found:
                raise ValueError(f"{lora['base']} holds an adapter itself")
            model = cls.from_checkpoint(found, **override) if found else cls.from_pretrained(lora["base"], override)
        except (OSError, ValueError) as e:
            raise ValueError(
                f"the base of this adapter, {lora['base']}, is not to be had from {os.getcwd()}: {e}"
            ) from None
        checksum = model.checksum()
        if checksum != lora["checksum"]:
            raise ValueError(
                f"{lora['base']} no longer holds the weights that this adapter was trained on: restore them"
            )
        block_size = checkpoint["model_args"].get("block_size")
        if type(block_size) is int and 0 < block_size < model.config.block_size:
            model.crop_block_size(block_size)
        model.add_lora(**{name: value for name, value in lora.items() if name != "checksum"}, checksum=checksum)
        check_shapes(checkpoint["model"], model.trained_state())
        model.load_state_dict({k: v.float() for k, v in checkpoint["model"].items()}, strict=False)
        return model

    @classmethod
    def from_pretrained(cls, name, override_args=None):
        """A GPT-2, Llama or Qwen3 model in the format of transformers: a folder, or a name on the Hugging Face Hub
        (gpt2, gpt2-medium, gpt2-large, gpt2-xl, HuggingFaceTB/SmolLM2-135M, ...). override_args may hold dropout.

        The weights are read tensor by tensor into their places, as float32. OSError when the model is not to be had,
        ValueError when it has something that cannot be built here, or names every weight that does not fit.
        """
        config = hub_config(name)
        with torch.device("meta"):
            model = cls(GPTConfig(**{**from_hub_config(config), **(override_args or {})}))
        model.to_empty(device="cpu")
        model.tie()
        places, wrong = model.hub_layout(), []
        for theirs, tensor in hub_weights(name):
            theirs = theirs.removeprefix("transformer.")  # gpt2 on the Hub is stored without, GPT2LMHeadModel with it
            place = places.pop(theirs, None)
            if place is not None and place.shape == tensor.shape:
                with torch.no_grad():
                    place.copy_(tensor)
            elif place is not None:
                wrong.append(f"{theirs} is {tuple(tensor.shape)} instead of {tuple(place.shape)}")
            elif not theirs.endswith(HUB_EXTRAS) and not (theirs == "lm_head.weight" and model.config.tied):
                wrong.append(f"{theirs} is unknown")
        wrong += [f"{theirs} is missing" for theirs in places]
        if wrong:
            more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise ValueError(f"the weights of {name} do not fit its config.json: {'; '.join(wrong[:8])}{more}")
        return model

    def save_pretrained(self, folder, eot=None):
        """Write config.json, generation_config.json and model.safetensors into folder, for GPT2LMHeadModel,
        LlamaForCausalLM or Qwen3ForCausalLM of transformers. eot: id of the token that ends a text, if there is one.

        ValueError names what no class there can express, OSError what cannot be written.
        """
        import safetensors.torch
        from transformers import GenerationConfig

        hub = to_hub_config(self.config, eot) | dict(dtype=str(self.lm_head.weight.dtype).removeprefix("torch."))
        weights = {name: place.detach().contiguous() for name, place in self.hub_layout().items()}
        if hub["model_type"] == "gpt2" and not self.config.bias:  # there biases cannot be left out
            for name, weight in list(weights.items()):
                if re.search(r"(ln_\w|c_attn|c_proj|c_fc)\.weight$", name):
                    weights[name.replace("weight", "bias")] = weight.new_zeros(weight.size(-1))
        os.makedirs(folder, exist_ok=True)
        safetensors.torch.save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
            json.dump(hub, f, indent=2)
        GenerationConfig(bos_token_id=eot, eos_token_id=eot).save_pretrained(folder)

    def hub_layout(self):
        """{name: place} of the weights of the transformers class that has this architecture: each place is a view of a
        parameter here, in the shape that the weight has there."""
        config, places = self.config, {}
        family = hub_family(config)
        heads = [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
        for name, p in self.named_parameters():
            # those of LoRA are called as peft calls them in a file: h.0.attn.c_attn.lora_A.weight
            name = re.sub(r"^transformer\.|\.base_layer|\.default", "", name)
            module, kind = re.fullmatch(r"(.+?)\.((?:lora_[AB]\.)?(?:weight|bias))", name).groups()
            if family == "gpt2":
                # its Conv1D keeps the matrices of the blocks as (in, out), nn.Linear as (out, in)
                places[name] = p.t() if name.startswith("h.") and p.dim() == 2 and kind == "weight" else p
                continue
            layer = re.match(r"h\.(\d+)\.", module)
            theirs = LLAMA_NAMES[module[layer.end() :] if layer else module]
            rows = {1: [len(p)], 2: [config.n_hidden] * 2, 3: heads}[len(theirs)]
            # rows belong to outputs; lora_A has none of its own for each, so all parts share it
            pieces = [p] * len(theirs) if kind == "lora_A.weight" else p.split(rows)
            for part, piece in zip(theirs, pieces, strict=True):
                places[f"model.layers.{layer[1]}.{part}.{kind}" if layer else f"{part}.{kind}"] = piece
        return places

    # ---- LoRA

    def checksum(self):
        """A text that is another one for other weights; those of positions, which can be cropped, do not count."""
        digest, positions = hashlib.sha256(), {id(p) for p in self.positions()}
        for p in (p for p in self.parameters() if id(p) not in positions):
            digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def add_lora(self, base, rank, alpha, dropout, targets, checksum=None):
        """Freeze all weights, and put the product of two thin matrices that are trained, (out, rank) and (rank, in),
        times alpha / rank, beside each of those that targets names: Linear layers of the blocks, commas between
        (https://arxiv.org/abs/2106.09685). base: where the frozen weights can be had again, for checkpoints, which
        hold the thin ones alone. ValueError where something does not fit, or the peft library is not there."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise ValueError("LoRA needs the peft library: pip install peft") from None
        linear = [name for name, module in self.transformer.h[0].named_modules() if isinstance(module, Linear)]
        known = sorted({name.split(".")[-1] for name in linear}) + linear
        for name in targets.split(","):
            if name not in known:
                raise ValueError(f"lora_targets takes some of {', '.join(known)}, commas between, not {name!r}")
        if not 1 <= rank <= self.config.n_embd or alpha < 1 or not 0 <= dropout < 1:
            most = self.config.n_embd
            raise ValueError(f"lora_rank takes 1 to n_embd={most}, lora_alpha 1 or more, lora_dropout 0 to less than 1")
        self.lora = dict(base=base, rank=rank, alpha=alpha, dropout=dropout, targets=targets)
        self.lora["checksum"] = checksum or self.checksum()
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets.split(","))
        inject_adapter_in_model(config, self)
        for _, layer in self.lora_layers():
            layer.cast_input_dtype_enabled = False  # autocast casts, and float32 copies of all inputs would take long
            if not dropout:
                layer.forward = functools.partial(thinly_trained, layer, layer.forward)

    def lora_layers(self):
        """[(name, module)] of the layers that LoRA has put something beside."""
        return [(name, module) for name, module in self.named_modules() if hasattr(module, "base_layer")]

    def merge_lora(self):
        """Add what LoRA has put beside the weights to them: the same model, as if all of it had been trained."""
        for name, layer in self.lora_layers():
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(self.get_submodule(parent), child, layer.base_layer)
        if self.lora:
            self.lora = None
            del self.peft_config
            self.requires_grad_(True)

    def use_lora(self, on):
        """Compute with LoRA's part, or as if it were not there."""
        for _, layer in self.lora_layers():
            layer.enable_adapters(on)

    def save_adapter(self, folder):
        """Write LoRA's part into folder as adapter_config.json and adapter_model.safetensors, for PeftModel of the peft
        library and for vLLM, to go with what save_pretrained() makes of the base. Errors are the same."""
        import safetensors.torch
        from peft import LoraConfig

        gpt2 = hub_family(self.config) == "gpt2"
        prefix = "base_model.model." + "transformer." * gpt2
        weights = {name: p.detach().clone() for name, p in self.hub_layout().items() if ".lora_" in name}
        targets = {".".join(name.split(".lora_")[0].split(".")[-2:]) for name in weights}
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "adapter_model.safetensors")
        safetensors.torch.save_file({prefix + k: v for k, v in weights.items()}, path, metadata={"format": "pt"})
        LoraConfig(
            task_type="CAUSAL_LM", base_model_name_or_path=self.lora["base"], target_modules=sorted(targets),
            r=self.lora["rank"], lora_alpha=self.lora["alpha"], lora_dropout=self.lora["dropout"], fan_in_fan_out=gpt2,
            inference_mode=True,
        ).save_pretrained(folder)  # fmt: skip

    def trained_state(self, **options):
        """state_dict(), of LoRA's weights alone where there are any: what a checkpoint holds."""
        state = self.state_dict(**options)
        return {name: weight for name, weight in state.items() if ".lora_" in name} if self.lora else state

    # ---- training

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, muon=False, dtype=torch.float32):
        """AdamW in two groups: matrices and embeddings decay, biases and norms do not. Fused into one kernel where
        the device has it. With muon, the blocks' matrices go to Muon, which computes in dtype."""
        params = [p for p in self.parameters() if p.requires_grad]
        hidden = {id(p) for p in self.transformer.h.parameters() if p.dim() == 2} if muon else set()
        groups = [
            {"params": [p for p in params if p.dim() >= 2 and id(p) not in hidden], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = device_type in ("cuda", "cpu")  # on mps it would apply the steps that loss scaling wants skipped
        options = dict(lr=learning_rate, betas=betas, fused=fused)
        if not muon:
            return torch.optim.AdamW(groups, **options)
        matrices = {"params": [p for p in params if id(p) in hidden], "weight_decay": weight_decay, "momentum": 0.95}
        return Muon([*groups, matrices], dtype, **options)

    def training_bytes(self, B, T, size, shards=1):
        """About how many bytes of tensors a step on B sequences of T tokens takes, with products in numbers of so many
        bytes and without torch.compile: the weights, for each that is trained a gradient and AdamW's two moments, all
        of them shared by so many processes, and what the forward pass keeps for the backward pass."""
        c, attended = self.config, self.config.n_head * self.config.head_dim
        kept = 8 * c.n_embd  # of a token in a block: what its two norms read, in float32
        qkv = attended + 2 * c.n_kv_head * c.head_dim
        hidden = c.n_hidden * (4 if c.mlp == "swiglu" else 2)  # before and after the activation
        kept += size * (2 * c.n_embd + qkv + 2 * attended + hidden)  # what each product reads, and attention
        kept += 2 * c.n_embd if c.dropout else 0
        if self.lm_head.weight.is_cpu and T <= 256:
            kept += size * c.n_head * T * (2 if c.dropout else 1)  # ShortAttention's probabilities
        elif self.lm_head.weight.is_cpu and c.dropout:
            kept += 13 * c.n_head * T  # those of PyTorch's way for this case, measured
        layers = c.n_layer
        if self.gradient_checkpointing:  # a block's, and what the others read
            layers, kept = 1, kept + 4 * c.n_embd * c.n_layer
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        weights = sum(p.nbytes for p in self.parameters()) + 12 * trained
        return weights / shards + B * T * kept * layers

    def flops_per_token(self, T=None):
        """Floating-point operations that training on one of T tokens (block_size by default) takes: 6 for each weight
        of a matrix product, 4 if it is frozen, and 12 * n_layer * n_head * head_dim * T for attention (PaLM appendix
        B)."""
        looked_up = {id(p) for p in self.looked_up()}
        matrices = [p for p in self.parameters() if p.dim() == 2 and id(p) not in looked_up]
        attended = self.config.n_head * self.config.head_dim * (T or self.config.block_size)
        products = sum((6 if p.requires_grad else 4) * p.numel() for p in matrices)
        return products + 12 * self.config.n_layer * attended

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak=None, T=None):
        """Model FLOPs utilisation: the share of the peak (FLOP/s; found by peak_flops when not given) that training
        on fwdbwd_per_iter sequences of T tokens (block_size by default) in dt seconds makes use of. None where no peak
        is known."""
        T = T or self.config.block_size
        if peak is None:
            peak, _ = peak_flops(self.lm_head.weight.device, torch.bfloat16)
        return peak and self.flops_per_token(T) * T * fwdbwd_per_iter / dt / peak


@torch.no_grad()
def orthogonalized(matrices):
    """The nearest matrices, (n, rows, columns), whose singular values are all about 1 (0.7 to 1.2): five steps of a
    Newton-Schulz iteration that costs matrix products alone (https://kellerjordan.github.io/posts/muon)."""
    tall = matrices.size(1) > matrices.size(2)
    X = matrices.mT if tall else matrices
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values of at most 1
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)  # each singular value s becomes 3.4445 s - 4.7750 s^3 + 2.0315 s^5
    return X.mT if tall else X


class Muon(torch.optim.AdamW):
    """AdamW whose groups with a momentum take Muon's steps instead: the momentum of a matrix's gradients with its
    singular values set to 1, so that the step is as long in all directions. Scaled to the length of AdamW's steps
    (https://arxiv.org/abs/2502.16982), so that learning rate and decay mean the same for both."""

    def __init__(self, groups, dtype, **options):
        super().__init__(groups, **options)
        self.dtype = dtype
        self._step_supports_amp_scaling = False  # let the scaler of float16 itself skip the steps that overflow

    @torch.no_grad()
    def step(self, closure=None):
        every = self.param_groups
        self.param_groups = [group for group in every if "momentum" not in group]
        super().step()
        self.param_groups = every
        for group in every:
            if "momentum" in group:
                self.orthogonal_step(**group)

    def orthogonal_step(self, params, lr, weight_decay, momentum, **_):
        batches = {}  # matrices of the same shape are multiplied together; sharded ones are gathered one by one
        for p in params:
            state, sharded = self.state[p], hasattr(p, "full_tensor")
            if not state:
                state.update(step=torch.tensor(0.0), momentum_buffer=torch.zeros_like(p))
            state["step"] += 1  # AdamW wants one in every state that it loads
            update = p.grad.lerp(state["momentum_buffer"].lerp_(p.grad, 1 - momentum), momentum)  # Nesterov's
            batches.setdefault(p if sharded else p.shape, []).append((p, update))
        for batch in batches.values():
            whole = [update.full_tensor() if hasattr(update, "full_tensor") else update for _, update in batch]
            length = lr * 0.2 * math.sqrt(max(whole[0].shape))
            for (p, _), update in zip(batch, orthogonalized(torch.stack(whole).to(self.dtype)), strict=True):
                p.mul_(1 - lr * weight_decay).sub_(like(p, update), alpha=length)


def like(place, tensor):
    """A copy of tensor that lies as the parameter place does, in whose shape it is: where FSDP has sharded that, only
    this process's rows."""
    copy = torch.empty_like(place)
    if not hasattr(place, "device_mesh"):
        return copy.copy_(tensor.detach())
    share = math.ceil(place.size(0) / place.device_mesh.size())
    copy.to_local().copy_(tensor[place.device_mesh.get_rank() * share :][:share])
    return copy


MOMENTS = {False: ("exp_avg", "exp_avg_sq"), True: ("momentum_buffer",)}  # what AdamW and Muon keep of a parameter


def load_optimizer(optimizer, saved):
    """Give the optimizer the state of a checkpoint, while learning rate, decay and betas stay its own. ValueError if
    the state is of another model: fused kernels would read and write past the end of tensors of another shape."""
    groups = optimizer.state_dict()["param_groups"]
    params = [(p, MOMENTS["momentum" in group]) for group in optimizer.param_groups for p in group["params"]]
    try:
        fits = [g["params"] for g in groups] == [g["params"] for g in saved["param_groups"]]
        fits = fits and set(saved["state"]) in (set(), set(range(len(params))))
        state = {}
        for i, s in saved["state"].items() if fits else ():
            p, moments = params[i]
            fits = fits and all(is_plain(s[name]) and s[name].shape == p.shape for name in moments)
            fits = fits and torch.as_tensor(s["step"]).dim() == 0
            if fits:
                state[i] = {"step": torch.tensor(float(s["step"])), **{name: like(p, s[name]) for name in moments}}
        if fits:
            return optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        pass
    raise ValueError("the optimizer state is of another model or optimizer")


# -----------------------------------------------------------------------------
# the formats of Hugging Face transformers

LLAMA_NAMES = {  # modules here, and those of LlamaForCausalLM and Qwen3ForCausalLM that they are made of, row on row
    "wte": ["model.embed_tokens"],
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
    "ln_f": ["model.norm"],
    "lm_head": ["lm_head"],
}
HUB_EXTRAS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # constants that older files carry
HUB_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}  # of GPT-2


def hub_family(config):
    """The model type of transformers that has the architecture of a GPTConfig. ValueError says why none has."""
    families = {
        "gpt2": dict(
            norm=["layernorm"], position=["learned"], mlp=["gelu", "gelu_tanh"], qk_norm=[False],
            n_kv_head=[config.n_head], head_dim=[config.n_embd // config.n_head],
        ),
        "llama": dict(norm=["rmsnorm"], position=["rope"], mlp=["swiglu"], qk_norm=[False]),
        "qwen3": dict(norm=["rmsnorm"], position=["rope"], mlp=["swiglu"], qk_norm=[True], bias=[False]),
    }  # fmt: skip
    lacking = {
        family: [f"{k}={getattr(config, k)}" for k, known in wanted.items() if getattr(config, k) not in known]
        for family, wanted in families.items()
    }
    nearest = min(lacking, key=lambda family: len(lacking[family]))
    if lacking[nearest]:
        raise ValueError(
            f"no class of transformers has this model's {', '.join(lacking[nearest])} ({nearest} is nearest)"
        )
    return nearest


def hub_folder(name, *patterns):
    """The folder that holds those files of a model: name itself if it is a folder, else a copy from the Hugging Face
    Hub. OSError when it is not to be had."""
    from huggingface_hub import snapshot_download

    if os.path.isdir(name):
        return name
    try:
        return snapshot_download(name, allow_patterns=patterns)
    except Exception as e:  # the Hub's errors, and those of the network below
        reason = str(e).strip().split("\n")[0]
        raise OSError(f"{name} is not cached here and cannot be had from the Hugging Face Hub: {reason}") from None


def hub_config(name):
    """The config of transformers of a folder or Hub name. OSError when it is not to be had or is damaged."""
    from transformers import AutoConfig

    folder = hub_folder(name, "config.json")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)  # by default it asks, and then runs code
    except Exception as e:  # what a damaged one raises depends on where it is damaged
        reason = str(e).strip().split("\n")[0]
        raise OSError(f"config.json of {name} cannot be read: {reason or type(e).__name__}") from None


def from_hub_config(config):
    """GPTConfig's arguments for a config of transformers. ValueError names all that cannot be built here."""
    family, rope = config.model_type, getattr(config, "rope_parameters", None) or {}
    known = {"quantization_config": [None]}
    if family == "gpt2":
        known |= dict(activation_function=HUB_ACTIVATIONS, scale_attn_weights=[True], add_cross_attention=[False])
        known |= dict(scale_attn_by_inverse_layer_idx=[False])
    elif family in ("llama", "qwen3"):
        known |= dict(hidden_act=["silu"], use_sliding_window=[False], mlp_bias=[config.attention_bias])
        known |= dict(attention_bias=[False] if family == "qwen3" else [False, True])
    else:
        raise ValueError(f"models of type {family} are not supported; gpt2, llama and qwen3 are")
    wrong = [
        f"{k}={getattr(config, k)}" for k, v in known.items() if hasattr(config, k) and getattr(config, k) not in v
    ]
    scaling = rope.get("rope_type", "default")
    if scaling not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        wrong.append(f"rope_parameters={rope}")
    if wrong:
        raise ValueError(f"this {family} model has what is not supported: {', '.join(wrong)}")
    if family == "gpt2":
        return dict(
            block_size=config.n_positions, vocab_size=config.vocab_size, n_layer=config.n_layer, n_head=config.n_head,
            n_embd=config.n_embd, mlp=HUB_ACTIVATIONS[config.activation_function], n_hidden=config.n_inner or 0,
            norm_eps=config.layer_norm_epsilon, tied=config.tie_word_embeddings, bias=True,
        )  # fmt: skip
    stretch = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return dict(
        block_size=config.max_position_embeddings, vocab_size=config.vocab_size, n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads, n_kv_head=config.num_key_value_heads, n_embd=config.hidden_size,
        head_dim=config.head_dim or 0, n_hidden=config.intermediate_size, norm="rmsnorm", position="rope", mlp="swiglu",
        qk_norm=family == "qwen3", bias=config.attention_bias, tied=config.tie_word_embeddings,
        norm_eps=config.rms_norm_eps, rope_theta=float(rope["rope_theta"]),
        rope_scaling=tuple(rope[name] for name in stretch) if scaling == "llama3" else (),
    )  # fmt: skip


def to_hub_config(config, eot=None):
    """config.json of transformers, as a dict, for a GPTConfig. ValueError when no class there can express it."""
    from transformers import GPT2Config, LlamaConfig, Qwen3Config

    family = hub_family(config)
    shared = dict(vocab_size=config.vocab_size, bos_token_id=eot, eos_token_id=eot, tie_word_embeddings=config.tied)
    if family == "gpt2":
        hub = GPT2Config(
            n_positions=config.block_size, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
            n_inner=config.n_hidden, activation_function="gelu" if config.mlp == "gelu" else "gelu_new",
            layer_norm_epsilon=config.norm_eps, resid_pdrop=config.dropout, embd_pdrop=config.dropout,
            attn_pdrop=config.dropout, **shared,
        )  # fmt: skip
        also = dict(architectures=["GPT2LMHeadModel"], n_ctx=config.block_size)  # llama.cpp reads n_ctx
    else:
        rope = dict(rope_type="default", rope_theta=config.rope_theta)
        if config.rope_scaling:
            factor, low, high, original = config.rope_scaling
            rope.update(rope_type="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high)
            rope.update(original_max_position_embeddings=original)
        hub = (LlamaConfig if family == "llama" else Qwen3Config)(
            hidden_size=config.n_embd, intermediate_size=config.n_hidden, num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head, head_dim=config.head_dim,
            max_position_embeddings=config.block_size, rms_norm_eps=config.norm_eps, attention_bias=config.bias,
            rope_parameters=rope, **(dict(mlp_bias=config.bias) if family == "llama" else {}), **shared,
        )  # fmt: skip
        also = dict(architectures=["LlamaForCausalLM" if family == "llama" else "Qwen3ForCausalLM"])
        # how versions of transformers before 5 spell rope_parameters
        also |= dict(rope_theta=config.rope_theta, rope_scaling=rope if config.rope_scaling else None)
    return json.loads(hub.to_json_string()) | also


def hub_weights(name):
    """Yield (name, tensor) of each weight in the files of a folder or Hub name, one or several, safetensors or bin.
    OSError when there are none, ValueError when they are damaged."""
    from safetensors import safe_open

    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        folder = hub_folder(name, f"{stem}*.{ending}", f"{stem}.{ending}.index.json")
        file, index = (os.path.join(folder, f"{stem}.{ending}{more}") for more in ("", ".index.json"))
        if not os.path.exists(file) and not os.path.exists(index):
            continue
        path = index if os.path.exists(index) else file
        try:
            shards = [file]
            if path == index:
                with open(index, encoding="utf-8") as f:
                    shards = sorted(set(json.load(f)["weight_map"].values()))
            for path in (os.path.join(folder, os.path.basename(shard)) for shard in shards):
                if ending == "bin":
                    in_parts = zipfile.is_zipfile(path)  # files from before PyTorch 1.6 are read as a whole
                    weights = torch.load(path, map_location="cpu", weights_only=True, mmap=in_parts)
                    if not all(isinstance(k, str) and is_plain(v) for k, v in weights.items()):
                        raise ValueError("it is not made of dense tensors of numbers")
                    yield from weights.items()
                else:
                    with safe_open(path, "pt") as f:
                        for key in f.keys():
                            yield key, f.get_tensor(key)
        except Exception as e:  # what a damaged file raises depends on where it is damaged
            reason = str(e).strip().split("\n")[0].split(". ")[0][:120]
            raise ValueError(f"{path} cannot be read: {reason or type(e).__name__}") from None
        return
    raise OSError(f"{name} has neither model.safetensors nor pytorch_model.bin")


# -----------------------------------------------------------------------------
# checkpoint files

LATEST, PREVIOUS, BEST = "ckpt.pt", "ckpt_prev.pt", "ckpt_best.pt"


def save_checkpoint(checkpoint, folder, name=LATEST, keep_previous=True):
    """Write a checkpoint (a dict of tensors and builtin types) as folder/name, whole or not at all: a kill, a power
    cut or a full disk at any byte leaves the one that stood there. The latest then is the previous, if that is kept.

    OSError or RuntimeError when it cannot be written.
    """
    path = os.path.join(folder, name)
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError):
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    if name == LATEST and keep_previous and os.path.exists(path):
        os.replace(path, os.path.join(folder, PREVIOUS))  # a kill right here leaves this one to be found
    os.replace(temporary, path)
    if os.name == "posix":  # the renames themselves must reach the disk; elsewhere folders cannot be opened
        fd = os.open(folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def read_checkpoint(path, mmap=False):
    """The dict in a checkpoint file, tensors on the CPU; with mmap they are read from the file when they are used,
    which several processes do in the memory of one. Nothing in the file is executed.

    OSError when it is not there, ValueError when it is damaged or is no checkpoint.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is no file")
    with open(path, "rb") as f:
        try:
            in_parts = zipfile.is_zipfile(f)  # files from before PyTorch 1.6 are read as a whole
            if in_parts and (part := zipfile.ZipFile(f).testzip()):  # torch.load skips the checksums
                raise ValueError(f"the checksum of {part} is wrong")
            f.seek(0)
            mmap = mmap and in_parts
            checkpoint = torch.load(path if mmap else f, map_location="cpu", weights_only=True, mmap=mmap)
            if mmap and not os.path.samestat(os.stat(path), os.fstat(f.fileno())):  # a run has just saved another
                return read_checkpoint(path, mmap)
            check_checkpoint(checkpoint)
            return checkpoint
        except Exception as e:  # what a damaged file raises depends on where it is damaged
            reason = str(e).strip().split("\n")[0].split(". ")[0][:120] or type(e).__name__
            raise ValueError(f"{path} is damaged or is not a checkpoint ({reason})") from None


def check_checkpoint(checkpoint):
    """ValueError if the parts of a checkpoint are not what they have to be."""
    for part in ("model", "model_args"):
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(part), dict):
            raise ValueError(f"it has no {part}")
    if not all(isinstance(k, str) and is_plain(v) for k, v in checkpoint["model"].items()):
        raise ValueError("its model is not made of dense tensors of numbers")
    kinds = {"config": dict, "optimizer": dict, "scaler": dict, "lora": dict, "iter_num": int}
    for part, kind in (kinds | {"tokenizer": (dict, type(None)), "wandb_id": (str, type(None))}).items():
        if part in checkpoint and not isinstance(checkpoint[part], kind):
            raise ValueError(f"its {part} is a {type(checkpoint[part]).__name__}")
    kinds = {"base": str, "rank": int, "alpha": int, "dropout": float, "targets": str, "checksum": str}
    if "lora" in checkpoint and {k: type(v) for k, v in checkpoint["lora"].items()} != kinds:
        raise ValueError("its lora is not what it has to be")
    if not 0 <= checkpoint.get("iter_num", 0) < 2**63 or math.isnan(float(checkpoint.get("best_val_loss", 0))):
        raise ValueError("its iter_num or best_val_loss is out of range")


def check_shapes(weights, expected):
    """ValueError names the tensors of a state_dict that are missing, unknown or of another shape than expected."""
    found, expected = ({k: tuple(v.shape) for k, v in d.items()} for d in (weights, expected))
    wrong = [k for k in sorted(found.keys() | expected) if found.get(k) != expected.get(k)]
    if wrong:
        lines = [f"{k} {found.get(k, 'missing')} instead of {expected.get(k, 'nothing')}" for k in wrong]
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError("weights do not fit the model: " + "; ".join(lines[:4]) + more)


def is_plain(x):
    """Whether x is an ordinary tensor with its numbers in memory: not sparse, not quantized, not on meta."""
    return isinstance(x, torch.Tensor) and x.layout == torch.strided and x.is_cpu and not x.is_quantized


def find_checkpoint(init_from, names, out_dir):
    """What init_from means: (checkpoint, file name). 'resume' is out_dir; a folder stands for the first readable of
    `names` in it; a file is read. What from_pretrained takes, a folder with a config.json or a name on the Hub, has
    none: (None, None). OSError and ValueError as below."""
    if init_from == "resume":
        return load_checkpoint(out_dir, names, mmap=True)
    if os.path.exists(os.path.join(init_from, "config.json")):
        return None, None
    if os.path.isdir(init_from):
        return load_checkpoint(init_from, names, mmap=True)
    if os.path.exists(init_from) or init_from.endswith(".pt"):
        return read_checkpoint(init_from, mmap=True), init_from
    if re.fullmatch(r"gpt2(-medium|-large|-xl)?|[\w.-]+/[\w.-]+", init_from):
        return None, None
    raise ValueError(f"init_from takes resume, a checkpoint, a folder or a name on the Hub as gpt2, not {init_from!r}")


def load_checkpoint(folder, names=(LATEST, PREVIOUS), mmap=False):
    """The first readable checkpoint of these names in a folder, and its name. Damaged ones are reported on stderr.

    FileNotFoundError when there is none at all, ValueError when all are damaged.
    """
    found = [name for name in names if os.path.exists(os.path.join(folder, name))]
    if not found:
        raise FileNotFoundError(f"no checkpoint in {folder} (looked for {', '.join(names)})")
    damaged = []
    for name in found:
        try:
            checkpoint = read_checkpoint(os.path.join(folder, name), mmap)
        except ValueError as e:
            damaged.append(str(e))
            continue
        for reason in damaged:
            print(f"WARNING: {reason}", file=sys.stderr)
        return checkpoint, name
    raise ValueError(f"{'; '.join(damaged)}; no other checkpoint is there")


# -----------------------------------------------------------------------------
# the hardware's limit

# Dense bfloat16/float16 TFLOP/s of the tensor cores with float32 accumulation, from the makers' data sheets.
# All words of a key must stand in the device's name; the first key that fits is taken.
GPU_TFLOPS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIE": 756, "H100 NVL": 835, "H100": 989,
    "A100": 312, "A30": 165, "A40": 150, "A10": 125, "A10G": 70, "L40S": 362, "L40": 181, "L4": 121,
    "RTX A6000": 155, "RTX 6000 ADA": 364, "RTX 5090": 209.5, "RTX 4090": 165, "RTX 3090": 71,
    "V100": 125, "T4": 65, "MI300X": 1307,
}  # fmt: skip


@functools.cache
def peak_flops(device, dtype):
    """(FLOP/s, where the figure comes from): data sheet for a GPU, measured for a CPU, (None, why) if unknown."""
    device = torch.device(device)
    if device.type == "cpu":
        a, times = torch.ones(1024, 1024, dtype=dtype), []
        for _ in range(20):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        return 2 * 1024**3 / min(times), f"measured, {str(dtype)[6:]} product of 1024 x 1024 matrices"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        words = re.findall(r"[A-Z0-9]+", name.upper())
        rate = next((tflops for key, tflops in GPU_TFLOPS.items() if all(w in words for w in key.split())), None)
        since_ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        if rate and "LAPTOP" not in words and (since_ampere or dtype == torch.float16):
            tf32 = dtype == torch.float32
            return rate * 1e12 / (2 if tf32 else 1), f"data sheet of {name}" + (", TF32" if tf32 else "")
        return None, f"peak of {name} in {str(dtype)[6:]} unknown"
    return None, f"peak of {device.type} unknown"


def peak_memory(device_type):
    """Bytes used at most so far: of tensors on a CUDA device, else of the whole process; None where nothing says."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", f.read())[1])
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
