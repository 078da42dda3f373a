"""
The GPT model, all of it in this file. In reading order:

    GPTConfig                     the shape of a model
    attention .. Block            the parts of a transformer
    GPT                           the model: forward, generation, weights in, optimizer, FLOPs
    save_checkpoint, load_...     checkpoint files, written whole or not at all
    peak_flops                    what the device at hand could do at best

Letters in shape comments: B sequences, T tokens in each, C = n_embd channels, H heads of D = C / H channels,
S tokens that attention looks back on, V tokens in the vocabulary.

References: GPT-2, https://github.com/openai/gpt-2/blob/master/src/model.py (architecture);
PaLM appendix B, https://arxiv.org/abs/2204.02311 (FLOPs, MFU).
"""

import functools
import math
import os
import re
import sys
import time
import zipfile
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F

# -----------------------------------------------------------------------------
# the parts


@dataclass
class GPTConfig:
    """The shape of a GPT. Raises ValueError for one that cannot be built."""

    block_size: int = 1024  # longest sequence the model can see, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # whether Linear and LayerNorm have biases, as GPT-2's do

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        weights = (12 * self.n_layer * self.n_embd + self.vocab_size + self.block_size) * self.n_embd
        if weights > 1e14:
            raise ValueError(f"a model of {weights:.1e} parameters is past all machines: lower n_layer or n_embd")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")


class KVCache:
    """One layer's keys and values of the tokens seen so far: (B, H, size, D) each, filled up to `length`."""

    def __init__(self, size):
        self.size, self.length = size, 0

    def append(self, k, v):
        """Store k and v, (B, H, T, D), behind those already here; returns all, (B, H, S, D)."""
        if self.length == 0:
            self.k, self.v = (t.new_empty(*t.shape[:2], self.size, t.size(3)) for t in (k, v))
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


def attention(q, k, v, dropout=0.0):
    """Causal attention of q, (B, H, T, D), on k and v, (B, H, S, D); the queries are the last T of S positions."""
    T, S = q.size(2), k.size(2)
    # is_causal aligns the first query with the first key, so it fits T == S alone; a single last query sees all keys
    mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if q.is_cpu and q.requires_grad:
        # on CPUs the backward pass of attention is slower in bfloat16 than in float32, up to five times
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast(q.device.type, enabled=False):  # the inputs' own dtype it is
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=1 < T == S)


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


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys, values of all heads
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, cache=None):
        B, T, C = x.size()
        qkv = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in qkv)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D)
        y = attention(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


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
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


# -----------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied, https://arxiv.org/abs/1608.05859
        self.init_weights()

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
                p.fill_(1.0)  # LayerNorm's gain

    def get_num_params(self, non_embedding=True):
        """Number of parameters; by default without the position embeddings. The token embeddings count: they are
        the output layer's weights, too."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def forward(self, idx, targets=None, caches=None):
        """Token ids idx, (B, T), to (logits, loss).

        With targets, (B, T): logits of all positions, (B, T, V), and the mean cross-entropy in nats over the targets
        that are not -1. Without: logits of the last position alone, (B, 1, V), and None. caches, one KVCache a
        layer: idx continues what they hold, and is added to them. ValueError where it all exceeds block_size.
        """
        B, T = idx.size()
        start = caches[0].length if caches else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit the model's block_size of {self.config.block_size}")
        positions = torch.arange(start, start + T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            x = block(x, caches[i] if caches else None)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)  # (B, T, V)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    # ---- generation

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None, generator=None, slide=1):
        """Continue idx, (B, T), token by token: yields (B,) ids up to max_new_tokens times.

        Sampling is as sample_next has it; a generator makes it repeatable. A row that has drawn the token `stop`
        goes on with it; when all rows have, the stream ends. The model sees its last block_size tokens at most.
        Positions are learned and start at 0, so once the window is full every step moves all of them, and with them
        every cached key: slide=1 computes the window anew for each token (exactly what a model without a cache
        says), slide=n drops n tokens at a time and computes it anew for one token in n. Call eval() first.
        """
        size = self.config.block_size
        if not 1 <= slide <= size:
            raise ValueError(f"slide must lie between 1 and block_size ({size}), not {slide}")
        window, caches = idx[:, -size:], None
        stopped = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if window.size(1) > size:
                window, caches = window[:, slide:], None
            caches = caches or [KVCache(min(size, idx.size(1) + max_new_tokens)) for _ in self.transformer.h]
            logits, _ = self(window[:, caches[0].length :], caches=caches)  # first the prompt, then one token each
            token = sample_next(logits[:, -1], temperature, top_k, top_p, generator)
            if stop is not None:
                token = token.masked_fill(stopped, stop)
                stopped |= token == stop
            yield token
            if stop is not None and stopped.all():
                return
            window = torch.cat((window, token[:, None]), dim=1)

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
        kept = self.transformer.wpe.weight.detach()[:block_size].clone()
        self.transformer.wpe = nn.Embedding.from_pretrained(kept, freeze=False)

    @classmethod
    def from_checkpoint(cls, checkpoint, **override):
        """The model of a checkpoint, on the CPU; override replaces fields of its GPTConfig (dropout, say).

        ValueError names every weight that is missing, unknown or of another shape.
        """
        unknown = set(checkpoint["model_args"]) - {field.name for field in fields(GPTConfig)}
        if unknown:
            names = ", ".join(sorted(map(str, unknown)))
            raise ValueError(f"the checkpoint's model has settings that are unknown here: {names}")
        config = GPTConfig(**{**checkpoint["model_args"], **override})
        # checkpoints from elsewhere may carry the prefixes of torch.compile and DDP, and attention masks
        weights = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in checkpoint["model"].items()}
        weights = {k: v for k, v in weights.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
        if config.n_layer > len(weights):
            raise ValueError(f"weights do not fit the model: {len(weights)} of them for {config.n_layer} layers")
        with torch.device("meta"):  # no memory and no time for weights that are replaced at once
            model = cls(config)
        shapes, expected = ({k: tuple(v.shape) for k, v in d.items()} for d in (weights, model.state_dict()))
        wrong = [k for k in sorted(shapes.keys() | expected) if shapes.get(k) != expected.get(k)]
        if wrong:
            lines = [f"{k} {shapes.get(k, 'missing')} instead of {expected.get(k, 'nothing')}" for k in wrong]
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise ValueError("weights do not fit the model: " + "; ".join(lines[:4]) + more)
        model.load_state_dict({k: v.float().contiguous() for k, v in weights.items()}, assign=True)
        model.transformer.wte.weight = model.lm_head.weight
        return model

    @classmethod
    def from_pretrained(cls, name, override_args=None):
        """GPT-2 from the Hugging Face Hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or from a local folder of that
        format. override_args may hold dropout. OSError when it is not to be had. GELU is exact here, as in nanoGPT;
        OpenAI's own model has its tanh approximation, which gives slightly other logits."""
        from transformers import GPT2LMHeadModel

        try:
            hub = GPT2LMHeadModel.from_pretrained(name)
        except OSError as e:
            reason = str(e).strip().split("\n")[0]
            raise OSError(
                f"{name} is not cached here and cannot be loaded from the Hugging Face Hub: {reason}"
            ) from None
        sizes = dict(n_layer=hub.config.n_layer, n_head=hub.config.n_head, n_embd=hub.config.n_embd)
        model_args = dict(sizes, block_size=hub.config.n_positions, vocab_size=hub.config.vocab_size, bias=True)
        # GPT-2 as published keeps the matrices of its blocks as (in, out), nn.Linear as (out, in)
        transposed = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
        weights = {k: v.t().contiguous() if k.endswith(transposed) else v for k, v in hub.state_dict().items()}
        return cls.from_checkpoint({"model": weights, "model_args": model_args}, **(override_args or {}))

    # ---- training

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW in two groups: matrices and embeddings decay, biases and norms do not. Fused into one kernel where
        the device has it."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = device_type in ("cuda", "cpu")  # on mps it would apply the steps that loss scaling wants skipped
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def flops_per_token(self):
        """Floating-point operations that training on one token takes at full block_size: 6 for each weight of a
        matrix product, and 12 * n_layer * n_embd * T for attention (PaLM appendix B)."""
        matrices = sum(p.numel() for p in self.parameters() if p.dim() == 2) - self.transformer.wpe.weight.numel()
        return 6 * matrices + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak=None):
        """Model FLOPs utilisation: the share of the peak (FLOP/s; found by peak_flops when not given) that training
        on fwdbwd_per_iter sequences of block_size tokens in dt seconds makes use of. None where no peak is known."""
        if peak is None:
            peak, _ = peak_flops(self.lm_head.weight.device, torch.bfloat16)
        return peak and self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak


def load_optimizer(optimizer, saved):
    """Give the optimizer the state of a checkpoint, while learning rate, decay and betas stay its own. ValueError if
    the state is of another model: fused kernels would read and write past the end of tensors of another shape."""
    groups = optimizer.state_dict()["param_groups"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        fits = [g["params"] for g in groups] == [g["params"] for g in saved["param_groups"]]
        fits = fits and set(saved["state"]) in (set(), set(range(len(params))))
        for i, state in saved["state"].items():
            fits = fits and torch.as_tensor(state["step"]).dim() == 0
            for moment in (state["exp_avg"], state["exp_avg_sq"]):
                fits = fits and is_plain(moment) and moment.shape == params[i].shape
        if fits:
            state = {
                i: {k: v.contiguous() if torch.is_tensor(v) else v for k, v in state.items()}
                for i, state in saved["state"].items()
            }
            return optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        pass
    raise ValueError("the optimizer state is of another model or optimizer")


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


def read_checkpoint(path):
    """The dict in a checkpoint file, tensors on the CPU. Nothing in the file is executed.

    OSError when it is not there, ValueError when it is damaged or is no checkpoint.
    """
    with open(path, "rb") as f:
        try:
            if zipfile.is_zipfile(f) and (part := zipfile.ZipFile(f).testzip()):  # torch.load skips the checksums
                raise ValueError(f"the checksum of {part} is wrong")
            f.seek(0)
            checkpoint = torch.load(f, map_location="cpu", weights_only=True)
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
    kinds = {"config": dict, "optimizer": dict, "scaler": dict, "tokenizer": (dict, type(None)), "iter_num": int}
    for part, kind in kinds.items():
        if part in checkpoint and not isinstance(checkpoint[part], kind):
            raise ValueError(f"its {part} is a {type(checkpoint[part]).__name__}")
    if not 0 <= checkpoint.get("iter_num", 0) < 2**63 or math.isnan(float(checkpoint.get("best_val_loss", 0))):
        raise ValueError("its iter_num or best_val_loss is out of range")


def is_plain(x):
    """Whether x is an ordinary tensor with its numbers in memory: not sparse, not quantized, not on meta."""
    return isinstance(x, torch.Tensor) and x.layout == torch.strided and x.is_cpu and not x.is_quantized


def find_checkpoint(init_from, names, out_dir):
    """What init_from means: (checkpoint, file name). 'resume' is out_dir; a folder stands for the first readable of
    `names` in it; a file is read; a GPT-2 size has none: (None, None). OSError and ValueError as below."""
    if init_from == "resume" or os.path.isdir(init_from):
        return load_checkpoint(out_dir if init_from == "resume" else init_from, names)
    if os.path.exists(init_from) or init_from.endswith(".pt"):
        return read_checkpoint(init_from), init_from
    if init_from.startswith("gpt2"):
        return None, None
    raise ValueError(
        f"init_from takes resume, a GPT-2 size (gpt2-medium), a checkpoint or its folder, not {init_from!r}"
    )


def load_checkpoint(folder, names=(LATEST, PREVIOUS)):
    """The first readable checkpoint of these names in a folder, and its name. Damaged ones are reported on stderr.

    FileNotFoundError when there is none at all, ValueError when all are damaged.
    """
    found = [name for name in names if os.path.exists(os.path.join(folder, name))]
    if not found:
        raise FileNotFoundError(f"no checkpoint in {folder} (looked for {', '.join(names)})")
    damaged = []
    for name in found:
        try:
            checkpoint = read_checkpoint(os.path.join(folder, name))
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
