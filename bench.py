"""
How fast a GPT trains and generates on this machine, beside what the hardware could do.

    python bench.py                                          GPT-2 124M
    python bench.py config/train_shakespeare_char_cpu.py     the model, batch and data of a run
    python bench.py --real_data=False --decode_tokens=0      training alone, on random tokens
    python bench.py --profile                                and a trace of it for chrome://tracing or Perfetto
    python bench.py --classic=../nanoGPT                     in turns with nanoGPT, from a folder that has it

Utilisation (MFU) is of the data sheet's peak on a GPU, and of a large matrix product measured in the same run on a CPU.
Generating one token reads every weight once, so its bound is the memory's measured bandwidth over the model's bytes.
"""

import contextlib
import importlib.util
import os
import statistics
import sys
import time
from json import dump

import torch

from configurator import can_compile, configure, end_with_the_pipe, fail, pick_device, usage_errors
from data.shards import Dataset, train_windows
from model import GPT, GPTConfig, peak_flops

# -----------------------------------------------------------------------------
# what
batch_size = 12
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
bias = False
real_data = True  # train on the dataset, with its loading in the time; False, or no such dataset: on random tokens
dataset = "openwebtext"
classic = ""  # a folder with nanoGPT's model.py, to measure in turns with ours
# how long
steps = 20  # training steps to time; 0: none
decode_tokens = 256  # tokens to generate; 0: none
decode_batch = 10  # sequences to generate together, after one alone
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
configure(globals())

end_with_the_pipe()
for name in ("batch_size", "block_size", "decode_batch"):
    if globals()[name] < 1:
        fail(f"{name} must be at least 1, not {globals()[name]}")
if steps < 1 and (profile or decode_tokens < 1):
    fail("nothing to measure: give --steps=20" + ("" if profile else " or --decode_tokens=256"))
if batch_size * (block_size + 1) >= 2**31:
    fail(f"{batch_size} x {block_size} tokens are too many for a step: lower --batch_size")
if json:
    with usage_errors():
        open(json, "a").close()  # better to know now that it cannot be written
device, dtype, device_line = pick_device(device, dtype)
device_type, ptdtype = device.split(":")[0], getattr(torch, dtype)
print(device_line)
torch.manual_seed(seed)
vocab_size, tokens = GPTConfig.vocab_size, None
if real_data:
    try:
        data = Dataset(os.path.join("data", dataset))
        tokens, vocab_size = data.split("train"), data.vocab_size or vocab_size
        with usage_errors():
            tokens.check(block_size, vocab_size)
    except (OSError, ValueError) as e:
        print(f"random tokens: {e}")
shape = dict(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size)
shape.update(dropout=dropout, bias=bias)
compile = compile and steps > 0 and can_compile(device)
autocast = torch.autocast(device_type, dtype=ptdtype, enabled=dtype != "float32")


def sync():
    """Wait for the device to finish what it was given."""
    if device_type != "cpu":
        getattr(torch, device_type).synchronize()


def get_batch(i):
    """Inputs and targets of step i, two (B, T) on the device."""
    if tokens:
        xy = torch.from_numpy(
            tokens.windows(train_windows(len(tokens), block_size, seed, i * batch_size, batch_size), block_size + 1)
        )
    else:
        xy = torch.randint(vocab_size, (batch_size, block_size + 1))
    xy = xy.pin_memory().to(device, non_blocking=True) if device_type == "cuda" else xy.to(device)
    return xy[:, :-1], xy[:, 1:].contiguous()


def training(model, precision):
    """A function that trains model one step on batch i and returns the loss, as train.py does it."""
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device_type)
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
    forward = torch.compile(model) if compile else model

    def step(i):
        X, Y = get_batch(i)
        with precision:
            _, loss = forward(X, Y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def seconds_of(function, *args):
    sync()
    start = time.perf_counter()
    function(*args)
    sync()
    return time.perf_counter() - start


def peak_memory():
    """Bytes: of tensors on a CUDA device, else of the whole process; None where the system does not say."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_bandwidth():
    """Bytes per second that the device reads, at best of five sums over 1 GiB."""
    ones = torch.ones(1 << 28, device=device)
    return ones.nbytes / min(seconds_of(ones.sum) for _ in range(5))


# -----------------------------------------------------------------------------
with usage_errors():
    contenders = {"plainGPT": GPT(GPTConfig(**shape)).to(device)}
    if classic:
        path = os.path.join(classic, "model.py")
        if not os.path.exists(path):
            fail(f"no {path}: classic takes the folder of a copy of nanoGPT")
        spec = importlib.util.spec_from_file_location("classic_model", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["classic_model"] = module  # dataclasses look themselves up there
        try:
            spec.loader.exec_module(module)
            contenders["classic"] = module.GPT(module.GPTConfig(**shape)).to(device)
        except Exception as e:  # it is somebody else's code
            fail(f"{path}: {type(e).__name__}: {e}")
ours = contenders["plainGPT"]
parameters = ours.get_num_params(non_embedding=False)
results = {"device": device_line, "dtype": dtype, "compile": compile, "torch": torch.__version__}
results |= {"parameters": parameters, "batch_size": batch_size, **shape}
print(f"model: {parameters / 1e6:.2f}M parameters; {batch_size} x {block_size} tokens a step")

if steps > 0:
    # nanoGPT computes in float32 on CPUs, whatever its dtype
    plain = contextlib.nullcontext() if device_type == "cpu" else autocast
    step = {name: training(model, plain if name == "classic" else autocast) for name, model in contenders.items()}
    for name in contenders:
        print(f"{name}: loss of the first step {step[name](0):.4f}")
    times = {name: [] for name in contenders}
    begin = time.perf_counter()
    for i in range(1, steps + 1):
        for name in contenders:
            times[name].append(seconds_of(step[name], i))
        if i >= 3 and time.perf_counter() - begin > seconds:
            break
    peak, source = peak_flops(device, ptdtype)
    print(f"training, median of {i} steps; peak: {f'{peak / 1e12:.3g} TFLOP/s, ' if peak else ''}{source}")
    for name in contenders:
        dt = statistics.median(times[name])
        mfu = ours.estimate_mfu(batch_size, dt, peak) if peak else None
        row = {"ms": dt * 1e3, "tokens_per_second": batch_size * block_size / dt, "mfu": mfu}
        results[f"train {name}"] = row
        utilisation = f", MFU {mfu:.1%}" if mfu else ""
        print(f"  {name:<9} {row['ms']:9.2f} ms a step, {row['tokens_per_second']:9,.0f} tokens/s{utilisation}")
    if classic:
        results["train ratio"] = (
            results["train plainGPT"]["tokens_per_second"] / results["train classic"]["tokens_per_second"]
        )
        print(f"  ratio {results['train ratio']:.2f}")
    results["peak_memory"] = peak_memory()
    if results["peak_memory"]:
        print(f"peak memory of all of this {results['peak_memory'] / 2**30:.2f} GiB")

if profile:
    with usage_errors():
        os.makedirs("bench_log", exist_ok=True)
    with torch.profiler.profile() as profiler:
        for i in range(5):
            step["plainGPT"](i)
    print(
        profiler.key_averages().table(
            sort_by=f"self_{'cuda' if device_type == 'cuda' else 'cpu'}_time_total",
            row_limit=20,
            max_name_column_width=50,
        )
    )
    profiler.export_chrome_trace(os.path.join("bench_log", "trace.json"))
    print("trace of five steps: bench_log/trace.json")

if decode_tokens > 0:
    bandwidth = memory_bandwidth()
    for model in contenders.values():
        model.eval()
    ours.to(ptdtype)
    n_bytes = sum(p.nbytes for name, p in ours.named_parameters() if "wpe" not in name)
    bound = bandwidth / n_bytes
    print(
        f"generating {decode_tokens} tokens in {dtype}; at {bandwidth / 1e9:.1f} GB/s of memory bandwidth one sequence "
        f"cannot exceed {bound:.1f} tokens/s"
    )
    for B in (1, decode_batch):
        prompt = torch.randint(vocab_size, (B, 1), device=device)
        ours.generate(prompt, 8)
        rate = B * decode_tokens / seconds_of(ours.generate, prompt, decode_tokens)
        results[f"decode {B}"] = {"tokens_per_second": rate, "bound": B * bound}
        share = f", {rate / bound:.0%} of the bound" if B == 1 else ""
        print(f"  plainGPT  {B:3} at once {rate:9,.1f} tokens/s{share}")
    if classic:
        prompt = prompt[:1]
        with torch.no_grad():
            contenders["classic"].generate(prompt, 8)
            rate = decode_tokens / seconds_of(contenders["classic"].generate, prompt, decode_tokens)
        results["decode classic"] = {"tokens_per_second": rate}
        one, many = (results[f"decode {B}"]["tokens_per_second"] / rate for B in (1, decode_batch))
        print(f"  classic     1 at once {rate:9,.1f} tokens/s; ratios {one:.1f} and {many:.1f}")

if json:
    with usage_errors(), open(json, "w", encoding="utf-8") as f:
        dump(results, f, indent=1)
    print(f"results: {json}")
