"""
Generate text with a trained GPT.

    python sample.py --out_dir=out-shakespeare-char                         from the best checkpoint of a run
    python sample.py --init_from=gpt2-xl --start="What is the answer?"      from GPT-2, or another model on the Hub
    python sample.py --out_dir=out --start=FILE:prompt.txt --num_samples=3  a prompt from a file; - is standard input
    python sample.py --out_dir=out --interactive                            continue each line that you type
    python sample.py --out_dir=out --serve                                  the same on a page in your browser
    python sample.py --out_dir=out-chat --chat                              talk to it; with --serve, on a page
    python sample.py --out_dir=out --export=folder                          write it for transformers, vLLM, llama.cpp
    python sample.py --out_dir=out-lora --export=folder --merge             write an adapter and its base as one model
    python sample.py --out_dir=out-lora --compare                           compare an adapter with its base

Exit codes: 0 done, 2 wrong usage, 130 stopped by Ctrl-C.
"""

import configurator  # isort: skip  # first: it prepares the import of torch

import glob
import itertools
import math
import os
import re
import shutil
import sys
import textwrap
import time

import torch

import model as gpt
from configurator import configure, fail, usage_errors
from data.conversations import ChatTemplate, to_text
from data.shards import Dataset, eval_windows, load_batch, read_meta
from data.tokenizer import assumed_tokenizer, for_terminal, from_description, from_hub, is_chat, prompt_ids, same_tokens

# -----------------------------------------------------------------------------
init_from = "resume"  # resume (the best checkpoint in out_dir), a checkpoint, its folder, a Hub name
out_dir = "out"  # if there is no such run, the newest one in out*
start = "\n"  # the prompt, FILE:prompt.txt, or - for standard input
num_samples = 10  # number of samples to draw
max_new_tokens = 500  # number of tokens generated in each sample
temperature = 0.8  # <1.0: less random, >1.0: more random, 0: greedy
top_k = 200  # keep the k most likely tokens; 0: all
top_p = 0.0  # nucleus sampling: keep the fewest tokens whose probabilities sum to p; 0: all
stop = ""  # also end a sample before this text; a sample always ends at the model's end tokens
slide = 1  # tokens to drop when the context is full; more is faster, see GPT.stream
stream = False  # print tokens when they are generated, sample by sample; False: all samples in one batch
chat = False  # talk to a model that was finetuned on conversations; --start is the system message
interactive = False  # read prompts from the terminal, line by line
serve = False  # read prompts from a page that only browsers on this machine can open (pip install gradio)
export = ""  # instead of sampling, write model and tokenizer into this folder in transformers' format
merge = False  # with export: merge an adapter into its base model; False: write the adapter only, as peft does
compare = False  # print samples and validation losses of an adapter and its base model in two columns
dataset = ""  # folder in data/, for compare, and for checkpoints without a tokenizer; empty: the run's
seed = 1337
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # auto, float32, bfloat16, float16; an export is float32 by default
int8 = False  # int8 weights: less memory traffic per token
compile = False  # compile the generation step: up to a minute for the first token, then fastest
# -----------------------------------------------------------------------------
settings, explicit = configure(globals())

# check the settings
configurator.check_minimum(settings, 1, "num_samples", "max_new_tokens", "slide")
configurator.check_minimum(settings, 0, "temperature", "top_k", "top_p")
if top_p > 1:
    fail(f"--top_p must be at most 1, got {top_p}")
if merge and not export:
    fail("--merge needs --export=folder")
if compile and (serve or compare):
    fail("--serve and --compare cannot be combined with --compile, which is for one model and one request at a time")
if serve:
    with usage_errors("--serve needs pip install gradio; or use --interactive"):
        import gradio as gr
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

# device
device, dtype, device_line = configurator.pick_device(device, dtype)
torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN builds a plan for each number of keys, slower than a token
print(f"device:   {device_line}", file=sys.stderr)

# the newest run, if none is named
runs = glob.glob("out*/ckpt*.pt")
if init_from == "resume" and out_dir == "out" and "out_dir" not in explicit and runs and not glob.glob("out/ckpt*.pt"):
    out_dir = os.path.dirname(max(runs, key=os.path.getmtime))

# model; an adapter is merged, unless it is exported or compared
with usage_errors():
    checkpoint, path = gpt.open_checkpoint(init_from, out_dir)
    model = gpt.load_model(init_from, checkpoint, dropout=0.0).eval()
if checkpoint:
    print(for_terminal(f"loaded {path}, step {checkpoint.get('iter_num', 'unknown')}"), file=sys.stderr)
if (merge or compare) and not model.lora:
    fail("--merge and --compare need a LoRA adapter, but this is a whole model")
if merge or not (export or compare):
    gpt.merge_lora(model)
if not all(p.isfinite().all() for p in model.parameters()):
    fail("the checkpoint contains NaN or inf: its run diverged; use an earlier one with --init_from=")
vocab_size, block_size = model.config.vocab_size, model.config.block_size

# tokenizer: the checkpoint's, else its dataset's, else GPT-2's if the vocabulary has its size
with usage_errors():
    if not checkpoint:
        checkpoint = {"tokenizer": from_hub(init_from) or from_hub(gpt.adapter_base(init_from))}
    dataset = dataset or checkpoint.get("config", {}).get("dataset", "")
    description = checkpoint.get("tokenizer") or read_meta(os.path.join("data", dataset)).get("tokenizer")
    if not description:
        description = assumed_tokenizer(vocab_size)
        if not description:
            fail(
                f"no tokenizer for a vocabulary of {vocab_size}: prepare any text with it, python data/text/prepare.py "
                "FILE --name=x --tokenizer=..., then set --dataset=x"
            )
        print("no tokenizer is recorded: assuming GPT-2's", file=sys.stderr)
    tokenizer = from_description(description)

# prompt and sampling options
with usage_errors():
    if start == "-":
        start = sys.stdin.read().removeprefix("\ufeff").removesuffix("\n")  # echo ends its text with a newline
    elif start.startswith("FILE:"):
        with open(start.removeprefix("FILE:"), encoding="utf-8-sig") as f:
            start = f.read()
# the tokens that end a sample: an imported model has its own, others end a document with the tokenizer's end of text
end_ids = (model.hub or {}).get("generation_config", {}).get("eos_token_id", tokenizer.eot)
end_ids = [i for i in (end_ids if isinstance(end_ids, list) else [end_ids]) if i in range(vocab_size)]
# in a chat, the end of a turn, too; turn_ends: those that are not among the others
template, turn_ends = None, []
if chat or (export and is_chat(tokenizer.description)):
    with usage_errors():
        template = ChatTemplate(tokenizer)
    turn_ends = [i for i in [template.end_id] if i is not None and i not in end_ids]
    end_ids += turn_ends
slide = min(slide, block_size)
generator = torch.Generator(device).manual_seed(seed)
sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, stop=end_ids, slide=slide, generator=generator)

# -----------------------------------------------------------------------------


def encode(prompt):
    """Return the token ids of a prompt (1, T). ValueError if the tokenizer has none for it."""
    return torch.tensor([prompt_ids(tokenizer, prompt, vocab_size)], device=device)


def generate_texts(x):
    """Return num_samples texts that begin with the prompt `start`, x (1, T), generated in one batch."""
    rows = model.generate(x.repeat(num_samples, 1), max_new_tokens, **sampling)[:, x.size(1) :].tolist()
    return [start + "".join(decode_pieces(row, stop)) for row in rows]


def stream_text(x, length=max_new_tokens, stop=stop, options=sampling):
    """Yield the text that continues x (1, T) in pieces, up to `length` tokens or to the text `stop`."""
    return decode_pieces(map(int, model.stream(x, length, **options)), stop)


def decode_pieces(ids, stop):
    """Yield the text of an iterable of ids in pieces, up to an end token or to the text `stop`."""
    pieces = tokenizer.decode_stream(itertools.takewhile(lambda i: i not in end_ids, ids))
    text, hold = "", max(0, len(stop) - 1)  # hold back characters that may be the beginning of `stop`
    for piece in pieces:
        text += piece
        if stop and stop in text:
            break
        cut = max(0, len(text) - hold)
        yield text[:cut]
        text = text[cut:]
    yield text.partition(stop)[0] if stop else text


def show(text, end="\n"):
    """Print a text; into a file or a pipe it is written as it is."""
    print(for_terminal(text) if sys.stdout.isatty() else text, end=end, flush=True)


def reply(messages):
    """Yield the pieces of a reply to messages, without the oldest ones if the context is too short."""
    system = [{"role": "system", "content": start}] if start != "\n" else []
    ids = template.prompt(system + messages, block_size - min(max_new_tokens, block_size // 2))
    if max(ids) >= vocab_size:
        raise ValueError(f"the prompt has token id {max(ids)}, but the model's vocabulary ends at {vocab_size - 1}")
    x = torch.tensor([ids], device=device)
    yield from stream_text(x, min(max_new_tokens, block_size - len(ids)))


def answer_lines():
    """Continue each line, or reply to it; /reset forgets the earlier ones, Ctrl-C stops a text, Ctrl-D quits."""
    messages = []
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if chat and line.strip() == "/reset":
            messages = []
            continue
        question, pieces = {"role": "user", "content": line}, []
        try:
            for piece in reply([*messages, question]) if chat else stream_text(encode(line)):
                show(piece, end="")
                pieces.append(piece)
        except KeyboardInterrupt:
            pass
        except ValueError as e:
            print(f"error: {e}", file=sys.stderr)
            continue
        print()
        messages += [question, {"role": "assistant", "content": "".join(pieces)}]


def chat_on_page(text, history):
    """Yield the reply so far to `text`, given the chat history."""
    messages = [{"role": message["role"], "content": to_text(message["content"]) or ""} for message in history]
    try:
        yield from itertools.accumulate(reply([*messages, {"role": "user", "content": text}]))
    except ValueError as e:
        raise gr.Error(str(e), print_exception=False) from None


def export_model(folder):
    """Write the model, or only its adapter, and the tokenizer in transformers' format."""
    # do not overwrite the source, nor mix adapter and model: libraries would load both
    source = os.path.dirname(path) if path else init_from
    base = checkpoint.get("lora", {}).get("base", source)
    other = os.path.join(folder, "config.json" if model.lora else "adapter_config.json")
    sources = map(os.path.realpath, (source, base, gpt.adapter_base(base)))
    if os.path.realpath(folder) in sources or os.path.exists(other):
        fail(f"{folder} contains another model or adapter: export to another folder")

    model.to(torch.float32 if settings["dtype"] == "auto" else getattr(torch, settings["dtype"]))
    if model.lora:
        gpt.save_adapter(model, folder)
        reader = f"PeftModel, on top of python sample.py --init_from={base} --export=..."
    else:
        gpt.save_pretrained(model, folder, tokenizer.eot, tokenizer.vocab_size, end_ids if turn_ends else ())
        reader = "AutoModelForCausalLM and AutoTokenizer"
    tokenizer.save_pretrained(folder)
    show(f"wrote {folder} (for {reader})")
    if tokenizer.description["kind"] in ("bpe", "char", "symbols"):
        print("llama.cpp's converter does not know this tokenizer: it takes those of published models only")
    if tokenizer.eot is None and not template:
        print("the tokenizer has no end-of-text or padding token: trl needs SFTConfig(pad_token=...)")


def compare_with_base(x):
    """Print loss and samples that continue x (1, T), of the base and of the adapter, in two columns."""
    # up to 256 windows spread over the validation split
    if not dataset:
        fail("--compare needs --dataset=, a folder in data/")
    with usage_errors():
        data = Dataset(os.path.join("data", dataset))
        tokens = data.split("val")
        T = data.block_size or max(1, min(block_size, 1024, len(tokens) - 1))
        tokens.check(T, vocab_size)
        if data.tokenizer and not same_tokens(data.tokenizer, tokenizer.description):
            fail(f"{data.folder} was prepared with another tokenizer, not the model's")
        if T > block_size:
            fail(f"{data.folder} was prepared for --block_size={T}, but the model's is {block_size}")
    starts = eval_windows(len(tokens), T, 256, data.block_size is not None).reshape(-1, 1)
    batches = [load_batch(tokens, start, T, vocab_size, device) for start in starts]

    # a column is a title and the samples
    columns = []
    for name, enabled in ((f"base {model.lora['base']}", False), (f"adapter of rank {model.lora['rank']}", True)):
        gpt.enable_lora(model, enabled)
        generator.manual_seed(seed)
        texts = generate_texts(x)
        loss, count = gpt.sum_losses(model, batches)
        title = f"{name}: loss {loss / count:.4f}, perplexity {math.exp(min(loss / count, 700)):.2f}"
        columns.append([f"{title} on {count:,} tokens of {data.folder}", *texts])

    width = max(1, (shutil.get_terminal_size().columns - 3) // 2)
    for left, right in zip(*columns, strict=True):
        for a, b in itertools.zip_longest(wrap(left, width), wrap(right, width), fillvalue=""):
            print(f"{a:<{width}} | {b}".rstrip())
        print("-" * width + "-+-" + "-" * width)


def wrap(text, width):
    r"""Return the lines of a text, wrapped to `width` characters. Example: "a bc\n\nd", 2 -> ["a", "bc", "", "d"]"""
    return [row for line in for_terminal(text).split("\n") for row in textwrap.wrap(line, width) or [""]]


def stream_to_page(prompt, temperature, top_k, top_p, length, stop, seed=None):
    """Yield the continuation so far, and tokens per second."""
    yield "", ""  # gradio can cancel only what has yielded, and the first token may take long
    options = sampling | dict(temperature=temperature, top_k=top_k, top_p=top_p)
    if seed is not None:
        options["generator"] = torch.Generator(device).manual_seed(int(seed))
    begin = time.perf_counter()
    try:
        pieces = stream_text(encode(prompt or start), length, stop, options)
        for n, text in enumerate(itertools.accumulate(pieces), 1):
            yield text, f"{min(n, length) / (time.perf_counter() - begin):.1f} tokens/s"
    except ValueError as e:
        raise gr.Error(str(e), print_exception=False) from None


def build_page():
    """Return the page: what is known of the model, then a chat or a text."""
    name, run = for_terminal(f"plainGPT: {path or init_from}"), ""
    if path:
        run += f", step {checkpoint.get('iter_num', 'unknown')}"
    if "best_val_loss" in checkpoint:
        run += f", best validation loss {checkpoint['best_val_loss']:.4f}"
    with gr.Blocks(title=name + run, analytics_enabled=False, fill_height=True) as page:
        gr.Markdown("## " + re.sub(r"([^\w\s]|_)", r"\\\1", f"{name}\n{run[2:]}"))
        add_chat() if chat else add_text()
    return page


def add_text():
    """Add prompt, continuation and options to the page."""
    with gr.Row():
        with gr.Column(scale=2):
            prompt = gr.Textbox(start.strip("\n"), label="Prompt", lines=4, placeholder="Shift+Enter generates")
            with gr.Row():
                generate_button = gr.Button("Generate", variant="primary", min_width=100)
                stop_button = gr.Button("Stop", min_width=100)
            text, speed = gr.Textbox(label="Continuation", lines=12, buttons=["copy"]), gr.Textbox(label="Speed")
        with gr.Column():
            k_max, n_max = max(vocab_size, top_k), max(4000, max_new_tokens)
            options = [
                gr.Slider(0, max(2, temperature), temperature, step=0.05, label="Temperature (0: greedy)"),
                gr.Slider(0, k_max, top_k, step=1, precision=0, label="Top-k (0: off)"),
                gr.Slider(0, 1, top_p, step=0.01, label="Top-p (0: off)"),
                gr.Slider(1, n_max, max_new_tokens, step=1, precision=0, label="Length in tokens"),
                gr.Textbox(stop, label="Stop at this text"),
                # the browser shows None as 0, but not a function's None
                gr.Number(lambda: None, label="Seed", placeholder="random", precision=0, minimum=0),
            ]
    triggers = [generate_button.click, prompt.submit, options[-2].submit]
    run = gr.on(
        triggers, stream_to_page, [prompt, *options], [text, speed],
        api_name="generate", concurrency_limit=None, show_progress_on=speed,
    )  # fmt: skip
    stop_button.click(None, cancels=run)


def add_chat():
    """Add a conversation to the page."""
    # without the button that shares a conversation on the Hub
    chatbot = gr.Chatbot(show_label=False, buttons=["copy", "copy_all"], scale=1, render=False)
    options = dict(chatbot=chatbot, api_name="chat", concurrency_limit=None, analytics_enabled=False)
    gr.ChatInterface(chat_on_page, **options)


def serve_page(page):
    """Serve a page on 127.0.0.1 until Ctrl-C."""
    os.environ["no_proxy"] = f"{os.environ.get('no_proxy', '')},127.0.0.1"  # gradio requests its own page
    # other sites must not reach it by a domain name that they point to 127.0.0.1
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    with usage_errors():
        local = dict(server_name="127.0.0.1", share=False, run_history=False, footer_links=[], max_file_size=0)
        local |= dict(quiet=True, prevent_thread_lock=True, inbrowser=sys.stdout.isatty())
        # a reply may contain images: a browser must not request them from other machines
        head = "<meta http-equiv=Content-Security-Policy content=\"default-src 'self' 'unsafe-inline' data: blob:\">"
        css = "textarea {font-family: var(--font-mono) !important}"  # columns and indentation stay aligned
        page.launch(**local, head=head, css=css, app_kwargs={"middleware": [trusted]})
    print(f"open {page.local_url} in a browser; Ctrl-C stops the server", flush=True)
    try:
        page.server.thread.join()
    finally:
        os._exit(130)  # threads that generate cannot be interrupted


# -----------------------------------------------------------------------------

if export:
    with usage_errors():
        export_model(export)
    sys.exit(0)

# weights to the device
if int8:
    gpt.quantize(model)
model.to(device, getattr(torch, dtype))
if compile and configurator.can_compile(device):
    gpt.compile_generation(model)
else:
    gpt.pack_weights(model)

if serve:
    serve_page(build_page())
configurator.exit_quietly_on_closed_pipe()  # not for the page: a browser may close its connection
if chat or interactive:
    answer_lines()
    sys.exit(0)

with usage_errors():
    x = encode(start)
if compare:
    compare_with_base(x)
elif stream:
    for _ in range(num_samples):
        for text in itertools.chain([start], stream_text(x)):
            show(text, end="")
        print("\n---------------")
else:
    for text in generate_texts(x):
        show(text)
        print("---------------")
