"""
Generate text with a trained GPT.

    python sample.py --out_dir=out-shakespeare-char                    from the best checkpoint of a run
    python sample.py --out_dir=out --start="Once upon" --num_samples=3 --temperature=0.7
    python sample.py --out_dir=out --start=FILE:prompt.txt             the prompt is in a file
    echo "Once upon" | python sample.py --out_dir=out --start=-        the prompt is on standard input
    python sample.py --out_dir=out --stream                            print each token as it comes
    python sample.py --out_dir=out --interactive                       continue whatever you type
    python sample.py --init_from=gpt2-xl --start="What is the answer?" GPT-2 itself, or any Llama or Qwen3 on the Hub
    python sample.py --out_dir=out --export=folder                     write it for transformers, vLLM, llama.cpp ...

The checkpoint brings its tokenizer along; the same seed gives the same text. Exit codes: 0 done, 2 wrong usage, 130
stopped by Ctrl-C.
"""

import contextlib
import os
import sys

import torch

from configurator import can_compile, configure, end_with_the_pipe, fail, pick_device, usage_errors
from data.shards import read_meta
from data.tokenizer import from_description, from_hub
from model import BEST, GPT, LATEST, PREVIOUS, find_checkpoint

# -----------------------------------------------------------------------------
init_from = "resume"  # resume (the best checkpoint in out_dir, or the latest), a checkpoint, a Hub name or folder
out_dir = "out"
start = "\n"  # the prompt, or FILE:prompt.txt, or - for standard input
num_samples = 10
max_new_tokens = 500
temperature = 0.8  # below 1.0 keeps to the likely, above it strays; 0: always the likeliest
top_k = 200  # keep the likeliest k tokens; 0: all
top_p = 0.0  # keep the likeliest tokens that make up this probability; 0.0: all
stop = ""  # end a sample at this text, which must be one token; empty: go on to max_new_tokens
slide = 1  # tokens to drop when block_size is full; more is faster from there on, see GPT.stream
stream = False  # print tokens as they come, sample after sample; False: all samples at once, in a batch
interactive = False  # read prompts from the terminal, line after line; implies stream
export = ""  # instead of sampling, write model and tokenizer into this folder in the format of transformers
seed = 1337
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # auto, float32, bfloat16, float16
int8 = False  # 8-bit weights: less memory to read for each token
compile = False  # compile the step that generates a token: up to a minute once, then the fastest
# -----------------------------------------------------------------------------
_, given = configure(globals())
end_with_the_pipe()

for name in ("num_samples", "max_new_tokens", "slide"):
    if globals()[name] < 1:
        fail(f"{name} must be at least 1, not {globals()[name]}")
if temperature < 0 or top_k < 0 or not 0 <= top_p <= 1:
    fail("temperature and top_k must not be negative, and top_p must lie in [0, 1]")
device, dtype, device_line = pick_device(device, dtype)
print(device_line, file=sys.stderr)

# model
with usage_errors():
    checkpoint, name = find_checkpoint(init_from, (BEST, LATEST, PREVIOUS), out_dir)
    if checkpoint:
        model = GPT.from_checkpoint(checkpoint, dropout=0.0)
        print(f"{name}: step {checkpoint.get('iter_num', 'unknown')}", file=sys.stderr)
    else:
        model = GPT.from_pretrained(init_from)
        checkpoint = {"tokenizer": from_hub(init_from)}
    with torch.no_grad():
        logits, _ = model.eval()(torch.zeros(1, 1, dtype=torch.int64))
    if not all(x.isfinite().all() for x in (logits, *model.parameters())):
        fail("the model's numbers are not finite: its run diverged; take an earlier checkpoint with --init_from=")
    slide = min(slide, model.config.block_size)

    # nanoGPT's checkpoints bring no tokenizer: it is that of their dataset, or GPT-2's
    description = checkpoint.get("tokenizer")
    dataset = checkpoint.get("config", {}).get("dataset")
    if not description and isinstance(dataset, str):
        description = read_meta(os.path.join("data", dataset)).get("tokenizer")
    if not description and model.config.vocab_size < 50257:
        fail(
            f"nothing says which text the {model.config.vocab_size} tokens stand for: put meta.pkl into the data folder"
        )
    tokenizer = from_description(description or {"kind": "tiktoken", "name": "gpt2"})

    if export:
        model.to(getattr(torch, dtype) if "dtype" in given else torch.float32).save_pretrained(export, tokenizer.eot)
        tokenizer.save_pretrained(export)
        print(f"written: {export}, for AutoModelForCausalLM and AutoTokenizer")
        sys.exit(0)

    if start == "-":
        start = sys.stdin.read()
    elif start.startswith("FILE:"):
        with open(start[5:], encoding="utf-8") as f:
            start = f.read()
    stop_ids = tokenizer.encode(stop) if stop else [None]
    if len(stop_ids) != 1:
        fail(f"stop must be one token, but {stop!r} is {len(stop_ids)}")

if int8:
    model.quantize()
model.to(device, getattr(torch, dtype))
if compile and can_compile(device):
    model.compile_generation()
generator = torch.Generator(device).manual_seed(seed)
sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, stop=stop_ids[0], generator=generator, slide=slide)


def encode(prompt):
    """A prompt as (1, T) token ids on the device. ValueError if it is empty or the tokenizer lacks a character."""
    ids = tokenizer.prompt(prompt).tolist()
    if not ids and tokenizer.eot is None:
        raise ValueError("the prompt is empty: give at least one character with --start=")
    if max(ids, default=0) >= model.config.vocab_size:
        raise ValueError(f"the prompt has tokens past the model's vocabulary of {model.config.vocab_size}")
    return torch.tensor([ids or [tokenizer.eot]], device=device)


def print_stream(x):
    """Print the continuation of x, (1, T), token by token."""
    tokens = (int(t) for t in model.stream(x, max_new_tokens, **sampling))
    for text in tokenizer.decode_stream(t for t in tokens if t != sampling["stop"]):
        print(text, end="", flush=True)
    print()


if interactive:
    while True:
        try:
            print_stream(encode(input("> ")))
        except EOFError:
            sys.exit(0)
        except ValueError as e:
            print(f"error: {e}", file=sys.stderr)

with usage_errors():
    x = encode(start)
if stream:
    for _ in range(num_samples):
        print(start, end="")
        print_stream(x)
        print("---------------")
else:
    for row in model.generate(x.repeat(num_samples, 1), max_new_tokens, **sampling).tolist():
        with contextlib.suppress(ValueError):  # the sample ends where it first stops
            row = row[: row.index(stop_ids[0], x.size(1))]
        print(tokenizer.decode(row))
        print("---------------")
