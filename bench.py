"""
How fast a GPT trains and generates on this machine, beside what the hardware could do.

    python bench.py                                          GPT-2 124M
    python bench.py config/train_shakespeare_char_cpu.py     the model, batch and data of a run
    python bench.py --real_data=False --decode_tokens=0      training alone, on random tokens
    python bench.py --profile                                and a trace of it for chrome://tracing or Perfetto
    python bench.py config/train_shakespeare_char_cpu.py --compare=config/modern.py     two architectures, in turns
    python bench.py --classic=../nanoGPT                     in turns with nanoGPT, from a folder that has it
    python bench.py --steps=0 --transformers --int8          generation, beside transformers and with 8-bit weights
    python bench.py --steps=0 --init_from=out --int8         generation by a model of yours
    python bench.py --compare=config/modern.py,gpt2-medium,gpt2-large,gpt2-xl --decode_batch=1,8,64     several sizes
    python bench.py config/train_gpt2.py --plan=8            what each of 8 processes would need, without training

Utilisation (MFU) is of the data sheet's peak on a GPU, and of a large matrix product measured in the same run on a CPU.
A token that is generated reads every weight once, and the cache: its bound is the measured bandwidth of the memory.
Models in turns see the same batches; the loss named is the mean of the last tenth of the steps.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from json import dump, dumps, loads

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configurator import can_compile, configure, end_with_the_pipe, fail, pick_device, read_config, usage_errors
from data.shards import Dataset, eval_windows, train_windows
from model import (
    BEST,
    CLASSIC,
    GPT,
    GPU_TFLOPS,
    LATEST,
    PREVIOUS,
    GPTConfig,
    find_checkpoint,
    from_hub_config,
    hub_config,
    padded,
    peak_flops,
    peak_memory,
)

# -----------------------------------------------------------------------------
# what
batch_size = 12
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
bias = False
norm = "layernorm"
position = "learned"
rope_theta = 10000.0
mlp = "gelu"
n_hidden = 0
n_kv_head = 0
qk_norm = False
tied = True
gradient_checkpointing = False
lora_rank = 0
lora_targets = "c_attn,c_proj,c_fc"
muon = False
learning_rate = 1e-3  # the same in all steps
real_data = True  # train on the dataset, with its loading in the time; False, or no such dataset: on random tokens
dataset = "openwebtext"
init_from = ""  # a checkpoint, its folder or a Hub name: measure that model, not one of the shape above
compare = ""  # config files, or names as gpt2-xl, commas between: measure what they make of these settings, in turns
classic = ""  # a folder with nanoGPT's model.py, to measure in turns
transformers = False  # measure generation by transformers in turns
int8 = False  # measure generation with 8-bit weights, too, and what they do to the validation split's perplexity
plan = 0  # print the memory that a process needs where so many train it, and what they send a step, and exit
gradient_accumulation_steps = 5 * 8  # of the plan: micro-batches a step, over all processes together
# how long
steps = 20  # training steps to time; 0: none
decode_tokens = 256  # tokens to generate; 0: none
decode_batch = "1,10"  # how many sequences to generate together, one number after another
seconds = 120.0  # begin no further training step after this time, three at least
# output
profile = False  # record five training steps with torch.profiler in bench_log/
json = ""  # write the results to this file
# system
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # auto, float32, bfloat16, float16
compile = True  # torch.compile the training step
seed = 1337
# -----------------------------------------------------------------------------
# several models are measured in processes of their own, each as its users run it; this may be one of them
contender = os.environ.get("PLAINGPT_CONTENDER", "")
with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere if contender else sys.stderr):
    settings, given = configure(globals())
end_with_the_pipe()

for name in ("batch_size", "block_size", "gradient_accumulation_steps"):
    if settings[name] < 1:
        fail(f"{name} must be at least 1, not {settings[name]}")
if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", decode_batch):
    fail(f"decode_batch takes numbers such as 1,10, not {decode_batch!r}")
if plan < 0 or plan and gradient_accumulation_steps % plan:
    fail(f"plan takes a number that divides gradient_accumulation_steps={gradient_accumulation_steps}, not {plan}")
if profile and (compare or classic or transformers):
    fail("profile records one model alone: leave out --compare, --classic and --transformers")
if plan and (compare or classic or transformers or profile):
    fail("plan measures nothing: leave out --compare, --classic, --transformers and --profile")
if init_from and (compare or plan):
    fail("init_from measures one model that is there: leave out --compare and --plan")
if not plan and steps < 1 and (profile or decode_tokens < 1):
    fail("nothing to measure: give --steps=20" + ("" if profile else " or --decode_tokens=256"))
if transformers and decode_tokens > block_size:
    fail(f"transformers generates up to block_size={block_size} tokens: give --decode_tokens={block_size}")
if batch_size * (block_size + 1) >= 2**31:
    fail(f"{batch_size} x {block_size} tokens are too many for a step: lower --batch_size")
if json:
    with usage_errors():
        open(json, "a").close()  # better to know now that it cannot be written
foreign = contender in ("classic", "transformers")
device, dtype, device_line = pick_device(device, dtype, tuned=not foreign)
device_type, ptdtype = device.split(":")[0], getattr(torch, dtype)
vocab_size, data_line = None, "random tokens"
if init_from:
    with usage_errors():
        checkpoint, _ = find_checkpoint(init_from, (BEST, LATEST, PREVIOUS), "")
        shape = GPTConfig(**(checkpoint["model_args"] if checkpoint else from_hub_config(hub_config(init_from))))
    there = dataclasses.asdict(shape) | {"block_size": min(block_size, shape.block_size)}
    there["dataset"] = checkpoint.get("config", {}).get("dataset", dataset) if checkpoint else dataset
    settings.update({name: value for name, value in there.items() if name in settings.keys() - {"dropout"} - given})
    vocab_size, block_size, dataset = shape.vocab_size, settings["block_size"], settings["dataset"]
    for name in given & there.keys() - {"block_size", "dropout", "dataset"}:
        if settings[name] != there[name] and (settings[name] or type(there[name]) is bool):  # 0: as it comes
            fail(f"{name}={settings[name]} was given, but the model of {init_from} has {there[name]}")
    if block_size > shape.block_size:
        fail(f"the model of {init_from} sees {shape.block_size} tokens: give --block_size={shape.block_size}")
    checkpoint = None
GPT2_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280)}
GPT2_SIZES["gpt2-xl"] = (48, 25, 1600)  # layers, heads, channels
compared = {os.path.splitext(os.path.basename(path))[0]: path for path in compare.split(",") if path}
names = ["plainGPT", *compared, *["classic"] * bool(classic), *["transformers"] * transformers]
if len(set(names)) < len(names) or len(compared) < len(compare.split(",")) and compare:
    fail(f"two models have the same name: rename one of {', '.join(compare.split(','))}")
tokens = {}
if real_data:
    try:
        data = Dataset(os.path.join("data", dataset))
        vocab_size = vocab_size or padded(data.vocab_size or GPTConfig.vocab_size)
        splits = {name: data.split(name) for name in ("train", "val")}
        with usage_errors():
            for split in splits.values():
                split.check(block_size, vocab_size)
        tokens, data_line = splits, ""
    except (OSError, ValueError) as e:
        data_line = f"{f'a vocabulary of {GPTConfig.vocab_size:,}' if plan else 'random tokens'}: {e}"
vocab_size = vocab_size or GPTConfig.vocab_size
if not contender:
    print(device_line + (f"\n{data_line}" if data_line else ""))
compile = compile and not plan and can_compile(device)
autocast = torch.autocast(device_type, dtype=ptdtype, enabled=dtype != "float32")


def build(settings):
    """The model of these settings."""
    torch.manual_seed(seed)
    if init_from:
        checkpoint, _ = find_checkpoint(init_from, (BEST, LATEST, PREVIOUS), "")
        model = GPT.from_checkpoint(checkpoint) if checkpoint else GPT.from_pretrained(init_from)
        model.merge_lora()
    else:
        fields = [field.name for field in dataclasses.fields(GPTConfig) if field.name in settings]
        model = GPT(GPTConfig(**{name: settings[name] for name in fields}, vocab_size=vocab_size))
    model.gradient_checkpointing = settings["gradient_checkpointing"]
    if settings["lora_rank"] > 0:
        model.add_lora("", settings["lora_rank"], 16, 0.0, settings["lora_targets"], checksum="-")
    return model


def build_classic(folder):
    """nanoGPT's model of the same shape, from a folder that has its model.py."""
    path = os.path.join(folder, "model.py")
    if not os.path.exists(path):
        fail(f"no {path}: classic takes the folder of a copy of nanoGPT")
    spec = importlib.util.spec_from_file_location("classic_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["classic_model"] = module  # dataclasses look themselves up there
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
            shape = {name: getattr(build(settings).config, name) for name in CLASSIC}
            return module.GPT(module.GPTConfig(**shape))
    except Exception as e:  # it is somebody else's code
        fail(f"{path}: {type(e).__name__}: {e}")


def build_transformers():
    """The model as transformers has it, for generation in its own dtype."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        build(settings).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=ptdtype)


def sync():
    """Wait for the device to finish what it was given."""
    if device_type != "cpu":
        getattr(torch, device_type).synchronize()


def get_batch(split, starts):
    """Inputs and targets of the windows at starts, two (B, T) on the device."""
    if tokens:
        xy = torch.from_numpy(tokens[split].windows(starts, block_size + 1))
    else:
        xy = torch.randint(vocab_size, (len(starts), block_size + 1))
    xy = xy.pin_memory().to(device, non_blocking=True) if device_type == "cuda" else xy.to(device)
    return xy[:, :-1], xy[:, 1:].contiguous()


class Contender:
    """A model and what is measured of it."""

    def __init__(self, name):
        """plainGPT, one of compare's settings, classic or transformers. Exits with one line if it cannot be built."""
        self.name, self.forward, self.settings = name, None, settings
        with usage_errors():
            if name == "classic":
                self.model = build_classic(classic)
            elif name == "transformers":
                self.model = build_transformers()
            elif name == "plainGPT":
                self.model = build(settings)
            else:  # on the same batches
                path = compared[name]
                known = dict(zip(("n_layer", "n_head", "n_embd"), GPT2_SIZES.get(path, ()), strict=False))
                found = known or read_config(path, {**globals(), **settings}, settings)
                self.settings = {**settings, **found, "block_size": block_size}
                self.model = build(self.settings)
            self.model.to(device)

    def describe(self):
        """What the model is: its config, parameters, bytes of KV cache a token, and FLOPs a token."""
        shape, flops = self.model.config, self.model.flops_per_token(block_size)
        cache = 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * ptdtype.itemsize
        count = self.model.get_num_params(non_embedding=False)
        return {"config": shape.to_dict(), "parameters": count, "cache_bytes_per_token": cache, "flops": flops}

    def train(self, i):
        """Step i, as train.py takes it: its seconds, those of them that its data took, and its loss."""
        if self.forward is None:
            self.forward = torch.compile(self.model, dynamic=False) if compile else self.model
            # nanoGPT computes in float32 on CPUs, whatever its dtype
            self.precision = contextlib.nullcontext() if foreign and device_type == "cpu" else autocast
            options = {} if foreign else dict(muon=self.settings["muon"], dtype=ptdtype)
            betas = (0.9, 0.95)
            self.optimizer = self.model.configure_optimizers(0.1, learning_rate, betas, device_type, **options)
            self.scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
        sync()
        start = time.perf_counter()
        starts = train_windows(len(tokens["train"]), block_size, seed, i * batch_size, batch_size) if tokens else 0
        X, Y = get_batch("train", starts if tokens else range(batch_size))
        data_seconds = time.perf_counter() - start
        with self.precision:
            _, loss = self.forward(X, Y) if foreign else self.forward(X, Y, return_logits=False)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss.item()
        return time.perf_counter() - start, data_seconds, loss

    def rest(self):
        """Leave the memory of a CUDA device that is not in use to the others."""
        if device_type == "cuda":
            torch.cuda.empty_cache()

    def peak_memory(self):
        return peak_memory(device_type)

    def prepare_decoding(self, quantized):
        """Set the model up for generation. Returns the bytes that a token reads of it."""
        self.model.eval()
        if self.name in ("classic", "transformers"):
            return sum(p.nbytes for p in self.model.parameters())
        if quantized:
            self.model.quantize()
        self.model.to(ptdtype)
        if compile:
            self.model.compile_generation()
        looked_up = {id(p) for p in self.model.looked_up()}
        weights = itertools.chain(self.model.parameters(), self.model.buffers())
        return sum(w.nbytes for w in weights if id(w) not in looked_up)

    def generate(self, B, n):
        """Seconds for n tokens of each of B sequences."""
        prompt = torch.randint(vocab_size, (B, 1), device=device)
        sync()
        start = time.perf_counter()
        with torch.no_grad():
            if self.name == "transformers":
                self.model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=True, pad_token_id=0)
            else:
                self.model.generate(prompt, n)
        sync()
        return time.perf_counter() - start

    def perplexity(self):
        """exp of the mean loss over windows spread over the validation split."""
        starts = eval_windows(len(tokens["val"]), block_size, 20 * batch_size)
        losses = []
        with torch.no_grad():
            for some in np.array_split(starts, math.ceil(len(starts) / batch_size)):
                losses.append(self.model(*get_batch("val", some))[1].item() * len(some))
        return math.exp(sum(losses) / len(starts))


if contender:  # answer, line by line, what the process that started this one asks
    answers, sys.stdout = sys.stdout, sys.stderr
    me = Contender(contender)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        function, *args = loads(line)
        print(dumps(getattr(me, function)(*args)), file=answers, flush=True)
    sys.exit()


class Elsewhere:
    """A Contender in a process of its own: its functions are asked for by name."""

    def __init__(self, name):
        command = [sys.executable, __file__, *sys.argv[1:]]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, env={**os.environ, "PLAINGPT_CONTENDER": name}, **pipes)

    def answer(self):
        if not (line := self.process.stdout.readline()):
            sys.exit(self.process.wait())  # it has said why
        return line

    def __getattr__(self, function):
        def ask(*args):
            self.process.stdin.write(dumps([function, *args]) + "\n")
            self.process.stdin.flush()
            return loads(self.answer())

        return ask


def memory_bandwidth():
    """Bytes per second that the device reads, at best of five sums over 1 GiB."""
    ones, times = torch.ones(1 << 28, device=device), []
    for _ in range(6):
        sync()
        start = time.perf_counter()
        ones.sum()
        sync()
        times.append(time.perf_counter() - start)
    return ones.nbytes / min(times)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made under it and still there: live now, peak at most."""

    def __init__(self, known):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(made) if isinstance(t, torch.Tensor)):
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return made

    def forget(self, identity, size):
        self.seen.discard(identity)
        self.live -= size


def activation_bytes(sharded):
    """The most that a micro-batch takes beside weights and gradients, found by training on tensors without numbers."""
    with FakeTensorMode(), torch.device(device):
        model = build(settings)
        for p in model.transformer.h.parameters() if sharded else ():
            p.data = p.data.to(ptdtype)  # as they are gathered; otherwise autocast keeps such copies of all
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        X = torch.zeros(batch_size, block_size, dtype=torch.long)
        with LiveBytes(model.parameters()) as count:
            with autocast:
                _, loss = model(X, X, return_logits=False)
            loss.backward()
    return count.peak


def print_plan(n):
    """What each of n processes needs in memory and sends (and receives as much) in a step: {what: bytes with DDP, with
    FSDP}."""
    with torch.device("meta"):
        model = build(settings)
    total = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.transformer.h[0].parameters())
    blocks = block * len(model.transformer.h)
    rest, size, micro_steps = total - blocks, ptdtype.itemsize, gradient_accumulation_steps // n
    rows = {  # bytes with DDP, bytes with FSDP
        "weights, float32": (4 * total, 4 * total / n),
        "gradients, float32": (4 * total, 4 * total / n),
        "AdamW's two moments, float32": (8 * total, 8 * total / n),
        # embeddings and their gradients; two blocks, and the gradients of one, in float32 to be summed up
        "gathered for the moment": (0, 8 * rest + 2 * size * block + (4 + size) * block),
        "activations and copies": (activation_bytes(False), activation_bytes(True)),
    }
    rows["memory together"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    # gradients are summed and handed out again once a step; or weights gathered forward and backward, gradients summed
    # and kept apart, in every micro-step
    once = (n - 1) / n
    sharded = micro_steps * once * (2 * size * blocks + 4 * rest + 4 * total)
    rows["sent a step"] = (2 * once * 4 * total, sharded)
    print(
        f"{total / 1e6:.2f}M parameters, {n} processes, {micro_steps} x {batch_size} x {block_size} tokens a step each"
    )
    print(f"{'GiB, each process':<30}{'DDP':>10}{'FSDP':>10}")
    for name, (ddp, fsdp) in rows.items():
        print(f"{name:<30}{ddp / 2**30:10.3f}{fsdp / 2**30:10.3f}")
    flops = model.flops_per_token(block_size) * block_size * batch_size * micro_steps
    time_on_h100 = flops / (GPU_TFLOPS["H100"] * 1e12 / 2)
    print(f"computed a step: {flops / 1e12:.4g} TFLOP, {time_on_h100:.3g} s at half of an H100's peak")
    print(
        f"host memory: {4 * total / 2**30:.3f} GiB each at the start; "
        f"{12 * total / 2**30:.3f} GiB in the main process while a checkpoint is written"
    )
    return rows


# -----------------------------------------------------------------------------
if plan:
    with usage_errors():
        rows = print_plan(plan)
    if json:
        with usage_errors(), open(json, "w", encoding="utf-8") as f:
            dump(rows, f, indent=1)
    sys.exit()

contenders = {name: (Elsewhere if len(names) > 1 else Contender)(name) for name in names}
for other in contenders.values() if len(names) > 1 else ():
    other.answer()  # that it is ready
ours = [name for name in names if name not in ("classic", "transformers")]
results = {"device": device_line, "dtype": dtype, "compile": compile, "torch": torch.__version__}
results |= {"batch_size": batch_size, "models": {name: contenders[name].describe() for name in ours}}
for name, model in results["models"].items():
    count, cache = model["parameters"], model["cache_bytes_per_token"]
    print(f"{name}: {count / 1e6:.2f}M parameters, KV cache {cache:,} bytes a token")


def compare_with_first(kind):
    """Print how the tokens per second of the other contenders compare with ours."""
    first, *others = (name for name in names if f"{kind} {name}" in results)
    for name in others:
        ratio = results[f"{kind} {first}"]["tokens_per_second"] / results[f"{kind} {name}"]["tokens_per_second"]
        results[f"{kind} {first} / {name}"] = ratio
        print(f"  {first} / {name}: {ratio:.2f}")


if steps > 0:
    learners = [name for name in names if name != "transformers"]
    first_losses, (times, data_times, losses) = {}, ({name: [] for name in learners} for _ in range(3))
    for name in learners:
        first_losses[name] = contenders[name].train(0)[-1]
        contenders[name].rest()
    begin, i, turn = time.perf_counter(), 0, 1
    while i < steps and (i < 3 or time.perf_counter() - begin < seconds):
        for name in learners:
            for step in range(i + 1, min(i + turn, steps) + 1):
                for column, value in zip((times, data_times, losses), contenders[name].train(step), strict=True):
                    column[name].append(value)
            contenders[name].rest()
        i = min(i + turn, steps)
        turn = max(1, int(0.5 / times[name][-1]))  # half a second: time to get its threads and its cache back
    peak, source = peak_flops(device, ptdtype)
    print(
        f"training, {batch_size} x {block_size} tokens a step, median of {i} steps; "
        f"peak: {f'{peak / 1e12:.3g} TFLOP/s, ' if peak else ''}{source}"
    )
    for name in learners:
        dt = statistics.median(times[name])
        row = {"ms": dt * 1e3, "steps_per_second": 1 / dt, "tokens_per_second": batch_size * block_size / dt}
        flops = results["models"].get(name, results["models"]["plainGPT"])["flops"]
        row |= {"mfu": peak and flops * row["tokens_per_second"] / peak, "peak_memory": contenders[name].peak_memory()}
        row["data_share"] = sum(data_times[name]) / sum(times[name])
        row |= {"first_loss": first_losses[name], "loss": statistics.mean(losses[name][-max(1, i // 10) :])}
        results[f"train {name}"] = row
        print(
            f"  {name:<12} {row['ms']:9.2f} ms a step, {row['steps_per_second']:.2f} it/s, "
            f"{row['tokens_per_second']:9,.0f} tokens/s" + (f", MFU {row['mfu']:.1%}" if peak else "")
            + f", data {row['data_share']:.1%}, loss {row['first_loss']:.4f} -> {row['loss']:.4f}"
            + (f", peak memory {row['peak_memory'] / 2**30:.2f} GiB" if row["peak_memory"] else "")
        )  # fmt: skip
    compare_with_first("train")

if profile:
    with usage_errors():
        os.makedirs("bench_log", exist_ok=True)
    with torch.profiler.profile() as profiler:
        for i in range(5):
            contenders["plainGPT"].train(i)
    sort_by = f"self_{'cuda' if device_type == 'cuda' else 'cpu'}_time_total"
    print(profiler.key_averages().table(sort_by=sort_by, row_limit=20, max_name_column_width=50))
    profiler.export_chrome_trace(os.path.join("bench_log", "trace.json"))
    print("trace of five steps: bench_log/trace.json")

if decode_tokens > 0:
    bandwidth = memory_bandwidth()
    print(f"generating {decode_tokens} tokens in {dtype}; the memory reads {bandwidth / 1e9:.1f} GB/s")
    perplexities = {name: [] for name in ours if tokens and int8}
    for kind in ("decode", *(["int8 decode"] if int8 else [])):
        players = names if kind == "decode" else ours
        size = {name: contenders[name].prepare_decoding(kind != "decode") for name in players}
        classic_row = None
        for B in map(int, decode_batch.split(",")):
            for name in players:
                # nanoGPT has no cache for a batch to share: one sequence after another is what it does best
                row = classic_row if name == "classic" else None
                if not row:
                    contenders[name].generate(B, 8 if name == "classic" else decode_tokens)  # compiles
                    rate = B * decode_tokens / contenders[name].generate(B, decode_tokens)
                    cached = results["models"].get(name, results["models"]["plainGPT"])["cache_bytes_per_token"]
                    read = size[name] + B * cached * decode_tokens / 2  # bytes a step: weights, and the cache so far
                    row = {"tokens_per_second": rate, "bound": B * bandwidth / read}
                    classic_row = row if name == "classic" else classic_row
                results[f"{kind} {B} {name}"] = row
                rate, bound = row.values()
                share = f"{rate / bound:.0%} of the bound {bound:,.1f}"
                print(f"  {name:<12} {kind[:-6]}{B:3} at once {rate:9,.1f} tokens/s, {share}")
            compare_with_first(f"{kind} {B}")
        for name in perplexities:
            perplexities[name].append(contenders[name].perplexity())
    for name, (before, after) in perplexities.items():
        results[f"int8 perplexity {name}"] = {dtype: before, "int8": after}
        print(f"  {name}: perplexity {before:.4f}, with int8 weights {after:.4f} ({after / before - 1:+.3%})")

if json:
    with usage_errors(), open(json, "w", encoding="utf-8") as f:
        dump(results, f, indent=1)
    print(f"results: {json}")
