"""
Measure how fast a GPT trains and generates on this machine, compared with the limits of the hardware.

    python bench.py                                          GPT-2 124M
    python bench.py config/train_shakespeare_char_cpu.py     the model, batch and data of a run
    python bench.py --real_data=False --decode_tokens=0      training only, on random tokens
    python bench.py --profile                                also write a trace for chrome://tracing or Perfetto
    python bench.py config/train_shakespeare_char_cpu.py --compare=config/modern.py     two architectures, interleaved
    python bench.py --classic=../nanoGPT                     interleaved with nanoGPT, from a folder that contains it
    python bench.py --steps=0 --transformers --int8          generation, also by transformers and with int8 weights
    python bench.py --steps=0 --init_from=out --int8         generation by a trained model
    python bench.py --compare=config/modern.py,gpt2-medium,gpt2-large,gpt2-xl --decode_batch=1,8,64     several sizes

The peak, for the model FLOPs utilization (MFU), is from a GPU's data sheet, or measured on a CPU in the same run.
Generation is bounded by the measured memory bandwidth: a step reads every weight and the KV cache once. Interleaved
models train on the same batches of the dataset; the loss is the mean over the last tenth of the steps.
"""

import configurator  # isort: skip  # first: it prepares the import of torch

import dataclasses
import functools
import math
import multiprocessing
import os
import re
import runpy
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from json import dump

import numpy as np
import torch

import model as gpt
from configurator import configure, fail, pick_device, usage_errors
from data.shards import Dataset, eval_windows, load_batch, train_windows
from data.tokenizer import for_terminal
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# settings
# the model, and what is measured
batch_size = 12  # in sequences
block_size = 1024  # context length, in tokens
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
lora_rank = 0  # rank of LoRA adapters; 0: off
lora_targets = "c_attn,c_proj,c_fc"
muon = False
learning_rate = 1e-3  # of all steps
real_data = True  # train on the dataset, and time its loading; False: on random tokens
dataset = "openwebtext"  # folder in data/
init_from = ""  # a checkpoint, its folder, or a Hub name: measure this model
compare = ""  # config files, or gpt2-medium, -large, -xl, comma-separated: also measure the model with these changes
classic = ""  # folder with nanoGPT's model.py: also measure nanoGPT, always with GPT-2's architecture
transformers = False  # also measure generation by transformers
int8 = False  # also measure generation with int8 weights, and the perplexity before and after
# how long
steps = 20  # training steps to time; 0: off
decode_tokens = 256  # tokens to generate; 0: off
decode_batch = "1,10"  # numbers of sequences to generate together, comma-separated
seconds = 120.0  # after this time start no training step, except the first three
# output
profile = False  # record five training steps of the first model with torch.profiler in bench_log/
json = ""  # write the results to this file
# system
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # auto, float32, bfloat16, float16
compile = True  # use torch.compile
seed = 1337  # of the initial weights and the order of the data
# -----------------------------------------------------------------------------
config, explicit = configure(globals())

FOREIGN = ("classic", "transformers")  # settings that also measure other implementations of the same model
GPT2_SIZES = {"gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
SHAPE = {field.name for field in dataclasses.fields(GPTConfig)} & config.keys()

# -----------------------------------------------------------------------------
# setup


def open_splits():
    """Return the splits of the dataset, and its vocabulary size."""
    data = Dataset(os.path.join("data", dataset))
    return {split: data.split(split) for split in ("train", "val")}, data.vocab_size


if __name__ == "__main__":  # not in worker processes: they get the resulting settings
    configurator.check_minimum(config, 1, "batch_size", "block_size")
    configurator.check_minimum(config, 0, "steps", "decode_tokens", "lora_rank", "learning_rate", "seed", "seconds")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", decode_batch):
        fail(f"--decode_batch must be numbers such as 1,10, got {decode_batch}")
    if transformers and decode_tokens > block_size:
        fail(f"transformers cannot generate more than block_size tokens: set --decode_tokens={block_size}")

    # device
    device, dtype, device_line = pick_device(device, dtype)
    print(f"device: {device_line}")
    device_type = device.split(":")[0]
    ptdtype = getattr(torch, dtype)
    compile = compile and configurator.can_compile(device)

    # the model of a checkpoint decides its settings; a shorter context is possible
    vocab_size = None
    if init_from:
        with usage_errors():
            checkpoint, _ = gpt.open_checkpoint(init_from)
            args = checkpoint["model_args"] if checkpoint else gpt.from_hf_config(gpt.load_hf_config(init_from))
            fields = dataclasses.asdict(GPTConfig(**args))
        fields |= {"block_size": min(block_size, fields["block_size"]), "dropout": dropout}
        if checkpoint and "dataset" not in explicit:
            fields["dataset"] = checkpoint.get("config", {}).get("dataset", dataset)
        configurator.match_model(config, explicit, fields, init_from)
        globals().update({name: config[name] for name in (*SHAPE, "dataset")}, vocab_size=fields["vocab_size"])

    # data
    tokens, data_vocab_size = {}, None
    if real_data:
        try:
            tokens, data_vocab_size = open_splits()
        except (OSError, ValueError) as e:
            print(for_terminal(f"using random tokens: {e}"))
    real_data = bool(tokens)
    vocab_size = vocab_size or gpt.round_vocab_size(data_vocab_size or 50257)
    with usage_errors():
        for split in tokens.values():
            split.check(block_size, vocab_size)

    # the settings of each model; `compare` changes the model, but not the batches
    config = {name: globals()[name] for name in (*config, "device_type", "ptdtype", "vocab_size")}
    models = {"plainGPT": config}
    changeable = SHAPE - {"block_size"} | {"gradient_checkpointing", "lora_rank", "lora_targets", "muon"}
    for path in filter(None, compare.split(",")):
        name = os.path.splitext(os.path.basename(path))[0]
        if name in (*models, *FOREIGN):
            fail(f"--compare: two models have the name {name}: rename {path}")
        if path in GPT2_SIZES:
            changes = dict(zip(("n_layer", "n_head", "n_embd"), GPT2_SIZES[path], strict=True))
        else:
            changes = configurator.read_config(path, globals(), config, explicit)
        models[name] = config | {"init_from": ""} | {key: changes[key] for key in changes.keys() & changeable}
    models |= {name: config for name in FOREIGN if config[name]}

# -----------------------------------------------------------------------------
# a model, and what is measured of it


def build_model():
    """Return the model of init_from, or of the settings with new weights."""
    torch.manual_seed(seed)
    if init_from:
        checkpoint, _ = gpt.open_checkpoint(init_from)
        model = gpt.load_model(init_from, checkpoint, dropout=dropout)
        gpt.merge_lora(model)
    else:
        model = GPT(GPTConfig(**{name: globals()[name] for name in SHAPE}, vocab_size=vocab_size))
    if gradient_checkpointing:
        gpt.enable_gradient_checkpointing(model)
    if lora_rank:
        gpt.add_lora(model, "", lora_rank, 16, 0.0, lora_targets, checksum="unused")
    return model


def describe(model):
    """Return the hyperparameters of a GPT, and what follows from them."""
    shape = model.config
    return {
        "config": gpt.model_args(shape),
        "parameters": gpt.get_num_params(model, non_embedding=False),
        "cache_bytes_per_token": 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * ptdtype.itemsize,
        "flops_per_token": gpt.flops_per_token(model, block_size),
    }


def build_classic(config):
    """Return nanoGPT's model of a GPTConfig."""
    nanogpt = runpy.run_path(os.path.join(classic, "model.py"))
    args = {name: getattr(config, name) for name in gpt.NANOGPT_FIELDS}
    return nanogpt["GPT"](nanogpt["GPTConfig"](**args))


def convert_to_transformers(model):
    """Return a GPT as transformers implements it, in the dtype of generation."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        gpt.save_pretrained(model, folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=ptdtype)


class Runner:
    """Train a model and generate with it, by the settings of this process."""

    def __init__(self, name):
        self.name = name
        self.foreign = name in FOREIGN
        self.tokens = open_splits()[0] if real_data else {}
        model = build_model()
        self.specs = describe(model)
        if name == "classic":
            model = build_classic(model.config)
        elif name == "transformers":
            model = convert_to_transformers(model)
        self.model = model.to(device)
        if name == "transformers" or not (steps or profile):
            return

        # nanoGPT computes in float32 on CPUs
        use_autocast = dtype != "float32" and not (self.foreign and device_type == "cpu")
        self.autocast = torch.autocast(device_type, dtype=ptdtype, enabled=use_autocast)
        self.forward = torch.compile(self.model, dynamic=False) if compile else self.model
        self.forward_options = {} if self.foreign else {"return_logits": False}
        options = {} if self.foreign else {"muon": muon, "dtype": ptdtype}
        self.optimizer = self.model.configure_optimizers(0.1, learning_rate, (0.9, 0.95), device_type, **options)
        self.scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")

    def get_batch(self, i):
        """Return inputs and targets of training step i, both (B, T)."""
        if not self.tokens:
            xy = torch.randint(vocab_size, (batch_size, block_size + 1), device=device)
            return xy[:, :-1], xy[:, 1:]
        packed = self.tokens["train"].block_size is not None
        starts = train_windows(len(self.tokens["train"]), block_size, seed, i * batch_size, batch_size, packed)
        return load_batch(self.tokens["train"], starts, block_size, vocab_size, device)

    def train(self, first, count):
        """Take steps as train.py does; returns [(seconds, seconds to load data, loss, peak memory)]."""
        records = []
        for i in range(first, first + count):
            start = time.perf_counter()
            X, Y = self.get_batch(i)
            data_seconds = time.perf_counter() - start
            with self.autocast:
                _, loss = self.forward(X, Y.contiguous(), **self.forward_options)
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            loss = loss.item()  # waits for the device
            seconds = time.perf_counter() - start
            records.append((seconds, data_seconds, loss, gpt.peak_memory(device_type) or 0))
        if device_type == "cuda":
            torch.cuda.empty_cache()  # leave the memory to the other models
        return records

    def profile(self):
        """Print the most expensive operations of five training steps, and write their trace."""
        with torch.profiler.profile() as profiler:
            self.train(0, 5)
        sort_by = "self_cuda_time_total" if device_type == "cuda" else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=sort_by, row_limit=20, max_name_column_width=50))
        os.makedirs("bench_log", exist_ok=True)
        profiler.export_chrome_trace("bench_log/trace.json")
        print("trace of five steps: bench_log/trace.json")

    def prepare_decoding(self, quantized):
        """Set the model up for generation; returns the bytes of weights that a step reads."""
        self.model.eval()
        torch.backends.cuda.enable_cudnn_sdp(False)  # as in sample.py
        if self.foreign:
            return sum(p.nbytes for p in self.model.parameters())
        if quantized:
            gpt.quantize(self.model)
        self.model.to(ptdtype)
        modules = [m for m in self.model.modules() if not isinstance(m, torch.nn.Embedding)]  # those are looked up
        n_bytes = sum(w.nbytes for m in modules for w in (*m.parameters(False), *m.buffers(False)))
        if compile:
            gpt.compile_generation(self.model)
        else:
            gpt.pack_weights(self.model)
        return n_bytes

    @torch.no_grad()
    def generate(self, B, n):
        """Generate n tokens of each of B sequences; returns the seconds."""
        prompt = torch.randint(vocab_size, (B, 1), device=device)
        options = {"max_new_tokens": n}
        if self.name == "transformers":
            options |= {"min_new_tokens": n, "do_sample": True, "pad_token_id": 0}
        return measure_seconds(lambda: self.model.generate(prompt, **options))

    def perplexity(self):
        """Return the perplexity over windows spread over the validation split."""
        val = self.tokens["val"]
        starts = eval_windows(len(val), block_size, 20 * batch_size, val.block_size is not None)
        batches = np.array_split(starts, math.ceil(len(starts) / batch_size))
        batches = (load_batch(val, batch, block_size, vocab_size, device) for batch in batches)
        loss, count = gpt.sum_losses(self.model, batches)
        return math.exp(loss / count)


def measure_seconds(function):
    """Return the seconds that a function takes on the device."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


# -----------------------------------------------------------------------------
# processes: one model runs in this process, several run in one worker each, as users would run them

runner = None  # the Runner of this process
workers = {}  # {name: executor with one process}


def start_runner(name, settings):
    """Build a model in this process; returns describe()."""
    global runner
    globals().update(settings)
    pick_device(device, dtype, tuned=name not in FOREIGN)
    runner = Runner(name)
    return runner.specs


def call(name, method, *args):
    """Call a method of a model's Runner, in its process."""
    if not workers:  # this is its process
        return method(runner, *args)
    try:
        return workers[name].submit(call, name, method, *args).result()
    except BrokenExecutor:
        fail(f"the process of {name} was killed, probably for lack of memory: lower --batch_size")


def start_worker():
    """Tie this worker to the main process: exit when it exits, and quietly on Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# -----------------------------------------------------------------------------
# training and decoding


def report(kind, name, row):
    """Print a row, plainGPT's below a header, and store it."""
    results[f"{kind} {name}"] = row
    ratio = results[f"{kind} plainGPT"]["tokens_per_second"] / row["tokens_per_second"]
    titles = [f"{key:>9}" for key in row]
    cells = [f"{value:{max(9, len(key))},.6g}" for key, value in row.items()]
    if name == "plainGPT":
        print(f"{kind:<16}", *titles, "plainGPT / this")
    else:
        results[f"{kind} plainGPT / {name}"] = ratio
    print(f"  {name:<14}", *cells, f"{ratio:15.2f}")


def time_training(names):
    """Train the models, interleaved."""
    # the first step compiles, and is not timed
    records = {name: call(name, Runner.train, 0, 1) for name in names}
    start = time.perf_counter()
    i, turn = 1, 1  # next step, steps per turn
    while i <= steps and (i <= 3 or time.perf_counter() - start < seconds):
        for name in names:
            records[name] += call(name, Runner.train, i, turn)
        i += turn
        # about half a second per turn, so that threads and caches warm up again
        turn = max(1, min(int(0.5 / records[name][-1][0]), steps + 1 - i))

    peak, source = gpt.peak_flops(device, ptdtype)
    print(f"\ntraining, {batch_size} x {block_size} tokens per step, median of {i - 1} steps")
    print(f"peak: {peak / 1e12:.3g} TFLOP/s, {source}" if peak else source)
    for name in names:
        times, data_times, losses, memory = np.array(records[name][1:]).T
        dt = np.median(times)
        speed = batch_size * block_size / dt
        row = {"ms": dt * 1e3, "steps_per_second": 1 / dt, "tokens_per_second": speed}
        if peak:
            row["mfu"] = specs[name]["flops_per_token"] * speed / peak
        row["data_share"] = data_times.sum() / times.sum()
        row["first_loss"] = records[name][0][2]
        row["loss"] = losses[-max(1, len(losses) // 10) :].mean()
        row["peak_memory"] = memory[-1]
        report("train", name, row)


def memory_bandwidth():
    """Return the bytes per second that the device reads, the best of six sums of 1 GiB."""
    ones = torch.ones(1 << 28, device=device)
    return ones.nbytes / min(measure_seconds(ones.sum) for _ in range(6))


@functools.cache  # nanoGPT is measured once
def time_generation(kind, name, B):
    """Return the tokens per second of generating B sequences."""
    call(name, Runner.generate, B, 8 if name == "classic" else decode_tokens)  # compiles
    return B * decode_tokens / call(name, Runner.generate, B, decode_tokens)


def time_decoding(kind, names, bandwidth):
    """Generate with the models, for each batch size."""
    weight_bytes = {name: call(name, Runner.prepare_decoding, kind == "int8 decode") for name in names}
    for batch in map(int, decode_batch.split(",")):
        for name in names:
            # without a KV cache nanoGPT is fastest with one sequence at a time
            B = 1 if name == "classic" else batch
            speed = time_generation(kind, name, B)
            # a step reads all weights, and the part of the cache that is filled, half of it on average
            cache_bytes = specs[name]["cache_bytes_per_token"] * min(decode_tokens / 2, block_size)
            bound = B * bandwidth / (weight_bytes[name] + B * cache_bytes)
            row = {"tokens_per_second": speed, "bound": bound, "share_of_bound": speed / bound}
            report(f"{kind} {batch}", name, row)


# -----------------------------------------------------------------------------
# start and end

if __name__ == "__main__":
    # build the models
    with usage_errors():
        if len(models) == 1:
            configurator.exit_quietly_on_closed_pipe()
            specs = {"plainGPT": start_runner("plainGPT", config)}
        else:
            sys.argv = sys.argv[:1]  # workers get the settings from start_runner()
            options = dict(mp_context=multiprocessing.get_context("spawn"), initializer=start_worker)
            workers = {name: ProcessPoolExecutor(1, **options) for name in models}
            started = {name: workers[name].submit(start_runner, name, models[name]) for name in models}
            specs = {name: future.result() for name, future in started.items()}
    results = {"device": device_line, "dtype": dtype, "compile": compile, "torch": torch.__version__}
    results |= {"batch_size": batch_size, "models": specs}
    ours = [name for name in models if name not in FOREIGN]
    for name in ours:
        cache = specs[name]["cache_bytes_per_token"]
        print(f"{name}: {specs[name]['parameters'] / 1e6:.2f}M parameters, KV cache {cache:,} bytes per token")

    # measure
    if steps:
        time_training([name for name in models if name != "transformers"])
    if profile:
        call("plainGPT", Runner.profile)
    if decode_tokens:
        bandwidth = memory_bandwidth()
        print(f"\ngenerating {decode_tokens} tokens in {dtype}; memory bandwidth {bandwidth / 1e9:.1f} GB/s")
        time_decoding("decode", models, bandwidth)
    if decode_tokens and int8:
        before = {name: call(name, Runner.perplexity) for name in ours if real_data}
        time_decoding("int8 decode", ours, bandwidth)
        for name, value in before.items():
            after = call(name, Runner.perplexity)
            results[f"int8 perplexity {name}"] = {dtype: value, "int8": after}
            print(f"{name}: perplexity {value:.4f}, with int8 weights {after:.4f} ({after / value - 1:+.3%})")

    if json:
        with usage_errors(), open(json, "w", encoding="utf-8") as f:
            dump(results, f, indent=1)
        print(f"results: {json}")
