"""
Generate text with a trained GPT.

    python sample.py --out_dir=out-shakespeare-char                    from the best checkpoint of a run
    python sample.py --out_dir=out --start="Once upon" --num_samples=3 --temperature=0.7
    python sample.py --out_dir=out --start=FILE:prompt.txt             the prompt is in a file
    echo "Once upon" | python sample.py --out_dir=out --start=-        the prompt is on standard input
    python sample.py --out_dir=out --stream                            print each token as it comes
    python sample.py --out_dir=out --interactive                       continue whatever you type
    python sample.py --out_dir=out --serve                             the same on a page in your browser
    python sample.py --init_from=gpt2-xl --start="What is the answer?" GPT-2 itself, or any Llama or Qwen3 on the Hub
    python sample.py --out_dir=out --export=folder                     write it for transformers, vLLM, llama.cpp ...
    python sample.py --out_dir=out-lora --compare                      an adapter beside its base, text and losses
    python sample.py --out_dir=out-lora --export=folder --merge        write both as one model

The checkpoint brings its tokenizer along; the same seed gives the same text. Exit codes: 0 done, 2 wrong usage, 130
stopped by Ctrl-C.
"""

import contextlib
import itertools
import math
import os
import shutil
import sys
import textwrap
import time

import torch

from configurator import can_compile, configure, end_with_the_pipe, fail, pick_device, usage_errors
from data.shards import Dataset, eval_windows, read_meta
from data.tokenizer import for_terminal, from_description, from_hub, prompt_ids, same_tokens
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
serve = False  # take prompts from a page, which only this machine's browsers can open (pip install gradio)
export = ""  # instead of sampling, write model and tokenizer into this folder in the format of transformers
merge = False  # with export: write an adapter and its base as one model; False: the adapter alone, as peft has it
compare = False  # print what an adapter and its base write side by side, and their losses on the dataset
dataset = ""  # a folder in data/, for compare and for checkpoints that bring no tokenizer; empty: that of the run
seed = 1337
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # auto, float32, bfloat16, float16
int8 = False  # 8-bit weights: less memory to read for each token
compile = False  # compile the step that generates a token: up to a minute once, then the fastest
# -----------------------------------------------------------------------------
_, given = configure(globals())
if not serve:  # a visitor who leaves must not end the page
    end_with_the_pipe()

for name in ("num_samples", "max_new_tokens", "slide"):
    if globals()[name] < 1:
        fail(f"{name} must be at least 1, not {globals()[name]}")
if merge and (compare or not export):
    fail("merge goes with --export=folder")
if serve and compile:
    fail("a compiled model is for one thread, and a page has many: leave out --compile")
if compare and (stream or interactive or serve or export):
    fail("compare prints two columns and ends: leave out --stream, --interactive, --serve and --export")
if temperature < 0 or top_k < 0 or not 0 <= top_p <= 1:
    fail("temperature and top_k must not be negative, and top_p must lie in [0, 1]")
device, dtype, device_line = pick_device(device, dtype)
print(device_line, file=sys.stderr)

# model
with usage_errors():
    checkpoint, name = find_checkpoint(init_from, (BEST, LATEST, PREVIOUS), out_dir)
    if checkpoint:
        model = GPT.from_checkpoint(checkpoint, dropout=0.0)
        if merge or not (export or compare):
            model.merge_lora()
        print(f"{name}: step {checkpoint.get('iter_num', 'unknown')}", file=sys.stderr)
    else:
        model = GPT.from_pretrained(init_from)
        checkpoint = {"tokenizer": from_hub(init_from)}
    if "lora" not in checkpoint and (merge or compare):
        fail("merge and compare are for adapters of LoRA: this is a whole model")
    if not all(p.isfinite().all() for p in model.eval().parameters()):
        fail("the checkpoint contains NaN or inf: its run diverged; use an earlier one with --init_from=")
    slide = min(slide, model.config.block_size)

    # nanoGPT's checkpoints bring no tokenizer: it is that of their dataset, or GPT-2's
    description = checkpoint.get("tokenizer")
    dataset = dataset or str(checkpoint.get("config", {}).get("dataset", ""))
    if not description and dataset:
        description = read_meta(os.path.join("data", dataset)).get("tokenizer")
    if not description and model.config.vocab_size < 50257:
        fail(
            f"nothing says which text the {model.config.vocab_size} tokens stand for: put meta.pkl into the data folder"
        )
    tokenizer = from_description(description or {"kind": "tiktoken", "name": "gpt2"})

    if export:
        run = out_dir if init_from == "resume" else os.path.dirname(init_from)
        sources = [run, init_from, checkpoint.get("lora", {}).get("base")]
        if os.path.realpath(export) in map(os.path.realpath, filter(None, sources)):
            fail(f"{export} holds what is to be exported: give another folder")
        for other, what in (("config.json", "a model"), ("adapter_config.json", "an adapter")):
            if os.path.exists(os.path.join(export, other)) and (what == "a model") == bool(model.lora):
                fail(f"{export} holds {what}, and libraries would take both for one: give another folder")
        model.to(getattr(torch, dtype) if "dtype" in given else torch.float32)
        if model.lora:
            model.save_adapter(export)
            base = model.lora["base"]
            print(
                f"written: {export}, for PeftModel of peft on top of python sample.py --init_from={base} --export=..."
            )
        else:
            model.save_pretrained(export, tokenizer.eot)
            print(f"written: {export}, for AutoModelForCausalLM and AutoTokenizer")
        tokenizer.save_pretrained(export)
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
    return torch.tensor([prompt_ids(tokenizer, prompt, model.config.vocab_size)], device=device)


def print_stream(x):
    """Print the continuation of x, (1, T), token by token."""
    tokens = (int(t) for t in model.stream(x, max_new_tokens, **sampling))
    for text in tokenizer.decode_stream(t for t in tokens if t != sampling["stop"]):
        print(text, end="", flush=True)
    print()


def texts(x):
    """num_samples continuations of x, (1, T), with it, made all at once."""
    for row in model.generate(x.repeat(num_samples, 1), max_new_tokens, **sampling).tolist():
        with contextlib.suppress(ValueError):  # the sample ends where it first stops
            row = row[: row.index(stop_ids[0], x.size(1))]
        yield tokenizer.decode(row)


@torch.no_grad()
def mean_loss(tokens, T):
    """Nats per token over 256 windows of T tokens at most, spread over a split."""
    losses = []
    for start in eval_windows(len(tokens), T, 256):
        xy = torch.from_numpy(tokens.windows(start[None], T + 1)).to(device)
        losses.append(model(xy[:, :-1], xy[:, 1:])[1].item())
    return sum(losses) / len(losses)


def print_side_by_side(x):
    """Print what base and adapter make of x, (1, T), and of the validation text."""
    folder = os.path.join("data", dataset)
    with usage_errors():
        data = Dataset(folder)
        if data.tokenizer and not same_tokens(data.tokenizer, tokenizer.description):
            raise ValueError(f"{folder} has another tokenizer than the model")
        tokens = data.split("val")
        T = max(1, min(model.config.block_size, 1024, len(tokens) - 1))
        tokens.check(T, model.config.vocab_size)
    samples, losses, width = [], [], max(1, (shutil.get_terminal_size().columns - 3) // 2)
    for tuned in (False, True):
        model.use_lora(tuned)
        generator.manual_seed(seed)
        samples.append(list(texts(x)))
        losses.append(mean_loss(tokens, T))
    count = len(eval_windows(len(tokens), T, 256)) * T
    names = f"base, {model.lora['base']}", f"tuned, {model.lora['rank']} ranks"
    titles = [
        f"{name}: loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f} on {count:,} tokens of {folder}"
        for name, loss in zip(names, losses, strict=True)
    ]
    for pair in (titles, *zip(*samples, strict=True)):
        lines = (for_terminal(text).split("\n") for text in pair)
        columns = (sum((textwrap.wrap(line, width) or [""] for line in some), []) for some in lines)
        for left, right in itertools.zip_longest(*columns, fillvalue=""):
            print(f"{left:<{width}} | {right}".rstrip())
        print("-" * width + "-+-" + "-" * width)


def page():
    """The page: a prompt and settings beside text that streams in. A tab that is closed ends its generation."""
    import gradio as gr

    def generate(prompt, temperature, top_k, top_p, length, stop):
        prompt = prompt or ""
        yield prompt, ""  # gradio can end what has begun to yield, and the first token may take long
        text, begin, options = prompt, time.perf_counter(), dict(sampling, stop=None)
        options |= dict(temperature=temperature, top_k=top_k, top_p=top_p)
        try:
            tokens = (int(t) for t in model.stream(encode(prompt or start), length, **options))
            for n, piece in enumerate(tokenizer.decode_stream(tokens), 1):
                text += piece
                end = text.find(stop, len(prompt)) if stop else -1
                yield text[:end] if end >= 0 else text, f"{min(n, length) / (time.perf_counter() - begin):.1f} tokens/s"
                if end >= 0:
                    return
        except ValueError as e:
            raise gr.Error(str(e), print_exception=False) from None

    with gr.Blocks(
        title=f"plainGPT: {out_dir if init_from == 'resume' else init_from}", analytics_enabled=False
    ) as blocks:
        with gr.Row():
            with gr.Column(scale=2):
                shown = start.strip("\n")  # of an empty field the hint is to be seen
                prompt = gr.Textbox(shown, label="Prompt", lines=4, placeholder="Shift+Enter generates")
                with gr.Row():
                    go, halt = gr.Button("Generate", variant="primary"), gr.Button("Stop")
                text, speed = gr.Textbox(label="Text", lines=12, buttons=["copy"]), gr.Textbox(label="Speed")
            with gr.Column():
                knobs = [
                    gr.Slider(
                        0, max(2, temperature), temperature, step=0.05, label="Temperature (0: always the likeliest)"
                    ),
                    gr.Slider(
                        0, max(model.config.vocab_size, top_k), top_k, step=1, precision=0, label="Top-k (0: off)"
                    ),
                    gr.Slider(0, 1, top_p, step=0.01, label="Top-p (0: off)"),
                    gr.Slider(
                        1, max(4000, max_new_tokens), max_new_tokens, step=1, precision=0, label="Length in tokens"
                    ),
                    gr.Textbox(stop, label="Stop at this text"),
                ]
        run = gr.on(
            [go.click, prompt.submit, knobs[-1].submit], generate, [prompt, *knobs], [text, speed],
            api_name="generate", concurrency_limit=8, show_progress_on=speed,
        )  # fmt: skip
        halt.click(None, cancels=run)
    return blocks


if serve:
    os.environ["no_proxy"] = f"{os.environ.get('no_proxy', '')},127.0.0.1"  # gradio looks whether its page is there
    try:
        blocks = page()
        local = dict(server_name="127.0.0.1", share=False, run_history=False, footer_links=[])
        blocks.launch(**local, quiet=True, prevent_thread_lock=True)
    except ImportError as e:
        fail(f"the page wants gradio ({e}): pip install gradio, or --interactive")
    except Exception as e:  # no free port, a proxy that is in the way, a folder that cannot be written ...
        fail(f"the page does not open ({type(e).__name__}: {e})")
    print(f"open {blocks.local_url} in a browser; Ctrl-C ends it", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        blocks.server.thread.join()
    os._exit(130)  # threads may be in the middle of a token, which Python cannot end
if compare:
    with usage_errors():
        x = encode(start)
    print_side_by_side(x)
    sys.exit(0)
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
    for text in texts(x):
        print(text)
        print("---------------")
