"""
Train a GPT on a prepared dataset, from scratch, from GPT-2 or from any checkpoint. The default settings are those of a
GPT-2 of 124M parameters on OpenWebText.

    python train.py config/train_shakespeare_char.py                       one process: GPU, Mac or CPU, found by itself
    python train.py config/train_shakespeare_char.py --batch_size=32       any setting below can be overridden
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py                  8 GPUs of one machine
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=IP --master_port=1234 train.py ...   two nodes
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py --fsdp        a model too large for one GPU
    python train.py --plot=out-a,out-b                                     draw loss curves of runs into loss.png

out_dir then holds ckpt.pt (the latest state, to resume from), ckpt_prev.pt (the one before it), ckpt_best.pt (the
weights with the lowest validation loss, to sample from) and metrics.jsonl. Ctrl-C or SIGTERM finishes the step, saves
and exits; a second one exits at once. --init_from=resume carries on, and gives the weights that the uninterrupted run
would have given.

Exit codes: 0 done, 1 the last checkpoint could not be written, 2 wrong usage, 3 the run diverged, 129, 130 and 143
stopped by SIGHUP, SIGINT and SIGTERM. out_dir/exit_code says so too, since torchrun exits with 1 for all but 0; a run
that was killed leaves none.
"""

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from configurator import can_compile, check, configure, fail, pick_device, usage_errors
from data.shards import Dataset, FolderLock, eval_windows, train_windows
from data.tokenizer import for_terminal, from_description, from_hub, prompt_ids, same_tokens
from model import (
    BEST,
    GPT,
    LATEST,
    PREVIOUS,
    GPTConfig,
    find_checkpoint,
    load_optimizer,
    padded,
    peak_flops,
    peak_memory,
    save_checkpoint,
)

# -----------------------------------------------------------------------------
# input and output
out_dir = "out"
eval_interval = 2000  # steps from evaluation to evaluation
eval_iters = 200  # batches of each split that an evaluation looks at, the same ones each time; 0: all of val
eval_only = False  # evaluate once and exit
log_interval = 1  # steps from log line to log line
always_save_checkpoint = True  # save ckpt.pt at every evaluation; False: only when the validation loss is a new best
save_interval = 0  # save ckpt.pt every so many steps as well; 0: only as above
sample_interval = 2000  # steps from sample of text to sample of text, and one at the end; 0: none
sample_prompt = "\n"  # what they continue
loss_plot = False  # draw the loss curves into out_dir/loss.png at every evaluation (pip install matplotlib)
plot = ""  # out_dirs of runs, commas between: draw their curves into loss.png, and exit
init_from = "scratch"  # scratch, resume, auto or auto:gpt2 (resume if possible), a checkpoint or folder, a Hub name
# logging: out_dir/metrics.jsonl always has everything
tensorboard_log = False  # for tensorboard --logdir=out_dir as well (pip install tensorboard)
wandb_log = False  # for Weights & Biases as well
wandb_project = "owt"
wandb_run_name = "gpt2"
# data
dataset = "openwebtext"  # a folder in data/
gradient_accumulation_steps = 5 * 8  # micro-batches a step, over all processes together
batch_size = 12  # sequences in a micro-batch
block_size = 1024  # tokens in a sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # against overfitting on small data: 0.1 to 0.3
bias = False  # whether LayerNorm and Linear layers have biases
# architecture: each choice by itself; the defaults are GPT-2's, config/modern.py has today's
norm = "layernorm"  # layernorm, rmsnorm
position = "learned"  # learned, rope
rope_theta = 10000.0  # wavelength of rope's slowest channels, over 2 pi
mlp = "gelu"  # gelu, gelu_tanh, swiglu, relu2
n_hidden = 0  # width of the MLP; 0: 4 * n_embd, or as many weights for swiglu
n_kv_head = 0  # heads of keys and values, each shared by a group of query heads; 0: n_head
qk_norm = False  # normalise queries and keys
tied = True  # the output layer shares the weights of the token embeddings
gradient_checkpointing = False  # compute each block again in the backward pass: less memory, a third more time
# LoRA: keep the weights of init_from as they are, and train two thin matrices beside each (pip install peft)
lora_rank = 0  # how thin: 8 to 64 are usual; 0: no LoRA, all weights are trained
lora_alpha = 16  # their product counts lora_alpha / lora_rank times
lora_dropout = 0.0  # of what they are multiplied with
lora_targets = "c_attn,c_proj,c_fc"  # beside which: queries, keys and values; results; the MLP's hidden layer
# optimizer
muon = False  # Muon for the matrices of the blocks and AdamW for the rest; False: AdamW for all
learning_rate = 6e-4  # peak, after the warmup
max_iters = 600000  # steps in all
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # scale gradients down to this norm; 0.0: never
# learning rate schedule
decay_lr = True  # False: learning_rate throughout, without warmup
lr_schedule = "cosine"  # after the warmup: cosine, linear, constant or wsd (constant, then linear in the last part)
warmup_iters = 2000
lr_decay_iters = 600000  # step at which min_lr is reached
min_lr = 6e-5
wsd_decay_frac = 0.2  # wsd: share of lr_decay_iters that decays
# system
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # auto, float32, bfloat16, float16 (with loss scaling)
compile = True  # torch.compile the model: half a minute once, faster steps after
backend = "auto"  # of torch.distributed: auto, nccl, gloo
fsdp = False  # share weights, gradients and optimizer out among the processes of torchrun: for models too large for one
timeout = 600  # seconds that processes wait for one that does not answer
seed = 1337  # of the weights, the order of the data and dropout
deterministic = False  # on GPUs: only algorithms that repeat bit for bit, slower; CPUs always do
# -----------------------------------------------------------------------------
config, given = configure(globals())


def read_metrics(folder, it=math.inf):
    """The records of steps before it in the metrics.jsonl of a run, less what a crash has cut off."""
    records = []
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8", errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                record = json.loads(line)
                records += [record] if record["iter"] < it else []
    return records


def draw_losses(folders, path):
    """Draw the losses in the metrics.jsonl of some out_dirs into a picture. OSError if it cannot be read or written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for i, folder in enumerate(folders):
        records = read_metrics(folder)
        for key, style in (
            ("loss", dict(alpha=0.4, linewidth=0.7)),
            ("val/loss", dict(marker=".", label=folder.replace("$", r"\$"))),
        ):
            points = [(r["iter"], r[key]) for r in records if isinstance(r.get(key), float)]
            axes.plot(*zip(*points or [(math.nan, math.nan)], strict=True), color=f"C{i}", **style)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(title="validation; training in pale")
    figure.savefig(path + ".tmp", format="png")
    os.replace(path + ".tmp", path)


if (plot or loss_plot) and not importlib.util.find_spec("matplotlib"):
    fail("pictures want matplotlib: pip install matplotlib, or leave out --plot and --loss_plot")
if plot:
    try:
        draw_losses([folder for folder in plot.split(",") if folder], "loss.png")
    except Exception as e:  # of a library that has many ways to fail
        missing = isinstance(e, OSError) and e.filename
        fail(f"{e.strerror}: {e.filename}" if missing else f"the picture cannot be drawn ({type(e).__name__}: {e})")
    print("drawn: loss.png")
    sys.exit(0)

if re.match("auto(:|$)", init_from):
    there = any(os.path.exists(os.path.join(out_dir, name)) for name in (LATEST, PREVIOUS))
    init_from = "resume" if there else init_from[5:] or "scratch"
resuming = init_from == "resume"
checkpoint = None
if init_from != "scratch":
    with usage_errors():
        names = (LATEST, PREVIOUS) if resuming else (BEST, LATEST, PREVIOUS)
        checkpoint, checkpoint_name = find_checkpoint(init_from, names, out_dir)
if checkpoint and (resuming or eval_only):
    # settings that were not given are those that the run had; where it lies and what it runs on may have changed
    today = given | {"out_dir", "init_from", "device", "backend"}
    before = {
        k: v for k, v in checkpoint.get("config", {}).items() if k in config and type(v) in (int, float, bool, str)
    }
    config.update({k: check(k, v, config[k], checkpoint_name) for k, v in before.items() if k not in today})
    globals().update(config, init_from=init_from)

positive = ("eval_interval", "log_interval", "batch_size", "block_size", "timeout", "gradient_accumulation_steps")
for name in positive:
    if config[name] < 1:
        fail(f"{name} must be at least 1, not {config[name]}")
if batch_size * (block_size + 1) >= 2**31:
    fail(f"{batch_size} x {block_size} tokens are too many for a micro-batch: lower --batch_size")
if not out_dir:
    fail("out_dir must not be empty")
not_negative = ("eval_iters", "save_interval", "sample_interval", "lora_rank", "max_iters", "warmup_iters")
for name in (*not_negative, "learning_rate", "weight_decay", "grad_clip", "seed"):
    if config[name] < 0:
        fail(f"{name} must not be negative, but is {config[name]}")
for name in ("beta1", "beta2", "wsd_decay_frac"):
    if not 0 < config[name] < 1:
        fail(f"{name} must lie between 0 and 1, but is {config[name]}")
for name, known in (("lr_schedule", ("cosine", "linear", "constant", "wsd")), ("backend", ("auto", "nccl", "gloo"))):
    if config[name] not in known:
        fail(f"{name} takes {', '.join(known)}, not {config[name]!r}")

# processes: torchrun starts one for each GPU and tells each its place by environment variables
ddp = "RANK" in os.environ
rank, local_rank, world_size = 0, 0, 1
if ddp:
    try:
        rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    except (KeyError, ValueError) as e:
        fail(f"RANK is set, but LOCAL_RANK and WORLD_SIZE are not as torchrun sets them ({e}): use it, or unset RANK")
    world_size = max(world_size, 1)
master = rank == 0  # the process that writes and prints
if ddp and device in ("auto", "cuda"):
    device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
device, dtype, device_line = pick_device(device, dtype)
device_type = device.split(":")[0]
ptdtype = getattr(torch, dtype)
if gradient_accumulation_steps % world_size:
    fail(
        f"gradient_accumulation_steps={gradient_accumulation_steps} is no multiple of the {world_size} processes: "
        f"try --gradient_accumulation_steps={math.ceil(gradient_accumulation_steps / world_size) * world_size}"
    )
if lora_rank and init_from == "scratch":
    fail("LoRA begins from a trained model: give --init_from=, a checkpoint, its folder or a Hub name")
if lora_rank and muon:
    fail("Muon is for whole matrices, not for LoRA's thin ones: give --muon=False")
sharded, replicated = ddp and fsdp, ddp and not fsdp  # the weights; a process alone has them all in either case
if fsdp and "fsdp" in given and not ddp:
    fail("fsdp wants several processes: torchrun --standalone --nproc_per_node=8 train.py ..., or --fsdp=False")
if sharded and dtype == "float16":
    fail("fsdp computes in bfloat16 or float32, not float16: try --dtype=float32")
if sharded and (device_type == "mps" or device_type == "cuda" and backend == "gloo"):
    fail("fsdp wants CPUs, or GPUs with nccl: try --device=cpu or --backend=nccl")
if ddp:
    nccl = device_type == "cuda" and dist.is_nccl_available()
    backend = ("nccl" if nccl else "gloo") if backend == "auto" else backend
    with usage_errors():
        patience = datetime.timedelta(seconds=timeout)
        # torchrun keeps one store for all starts, and a process that is started again must not find the addresses of
        # before in it. Nodes may count starts differently: there the variable makes torchrun open new stores instead
        starts, alone = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("GROUP_WORLD_SIZE") == "1"
        renewed = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and not alone and not renewed:
            fail("--max-restarts on several nodes wants TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, on each")
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=patience))
        store = dist.PrefixStore(f"start {starts}", store) if alone else store
        here = torch.device(device) if backend == "nccl" else None
        try:
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=patience, device_id=here
            )
        except RuntimeError as e:
            reason = str(e).split("\n")[0]
            fail(f"the processes do not reach each other ({reason}): name the network interface, as README.md does")
    last_words = sys.excepthook

    def name_the_missing(kind, error, trace):
        """Where one process hangs or is gone the others fail, all at once: they say which it is."""
        missing = []
        if issubclass(kind, dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE):  # not its own mistake
            with contextlib.suppress(RuntimeError):  # the store may be gone as well
                store.set(f"failed {rank}", "")
                time.sleep(3)
                missing = [str(r) for r in range(world_size) if not store.check([f"failed {r}"])]
        if missing:
            print(f"error: process {', '.join(missing)} of {world_size} hangs or is gone", file=sys.stderr)
        else:
            last_words(kind, error, trace)

    sys.excepthook = name_the_missing


def any_process(flag):
    """Whether the flag is set in any process. All must ask."""
    if not ddp:
        return bool(flag)
    flags = torch.tensor(float(bool(flag)), device=device)
    dist.all_reduce(flags)
    return flags.item() > 0


if deterministic:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)

terminal = sys.stdout.isatty()
bold = terminal and os.name == "posix" and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def say(text, passing=False):
    """Print a text. On a terminal whatever comes next replaces a passing line."""
    if not master:
        return
    if terminal:
        width = shutil.get_terminal_size().columns - 1
        text = re.sub(r"^(WARNING|step \d+|done)", "\33[1m\\1\33[0m", text) if bold else text
        text = "\r".ljust(width + 1) + "\r" + (text[:width] if passing else text)
    with contextlib.suppress(OSError):  # a terminal or a pipe that is gone does not end a run
        print(text, end="" if terminal and passing else "\n", flush=True)


# -----------------------------------------------------------------------------
# data, model, optimizer

with usage_errors():
    data = Dataset(os.path.join("data", dataset))
    tokens = {split: data.split(split) for split in ("train", "val")}
    if init_from == "scratch":
        torch.manual_seed(seed)
        shape = {field.name: config[field.name] for field in dataclasses.fields(GPTConfig) if field.name in config}
        model = GPT(GPTConfig(**shape, vocab_size=padded(data.vocab_size or GPTConfig.vocab_size)))
    elif checkpoint:
        model = GPT.from_checkpoint(checkpoint, dropout=dropout)
    else:
        model = GPT.from_pretrained(init_from, dict(dropout=dropout))
    if not resuming:
        model.merge_lora()  # where it begins from an adapter, from the sum
    for name, value in dataclasses.asdict(model.config).items():
        if name in config and name not in ("block_size", "dropout"):
            if name in given and config[name] != value and (config[name] or type(value) is bool):  # 0: as it comes
                fail(f"{name}={config[name]} was given, but the model of {init_from} has {value}")
            config[name] = value
    for name, value in (model.lora or {"rank": 0}).items() if resuming else ():
        if config.get(f"lora_{name}", value) != value:
            fail(f"lora_{name}={config[f'lora_{name}']} was given, but this run has {value}")
    longest, rope = model.config.block_size, model.config.position == "rope"
    if "block_size" not in given and not (resuming and rope):  # models of the Hub may see 131,072 tokens
        block_size = longest if checkpoint else min(block_size, longest)
    config["block_size"] = block_size
    if block_size != longest and (block_size > longest or not rope):  # rope trains on fewer tokens just as well
        if resuming:
            fail(f"block_size is {model.config.block_size} in this run; --init_from={out_dir} begins one with another")
        model.crop_block_size(block_size)
    for stream in tokens.values():
        stream.check(block_size, model.config.vocab_size)

    # where nothing names the tokenizer, a vocabulary of unknown size is taken to be GPT-2's
    there = data.tokenizer or (None if data.vocab_size else {"kind": "tiktoken", "name": "gpt2"})
    had = checkpoint.get("tokenizer") if checkpoint else from_hub(init_from) if init_from != "scratch" else None
    description = had or there
    if had and there and not same_tokens(had, there):
        whence = out_dir if resuming else init_from
        fail(
            f"the model was trained with another tokenizer than {data.folder} has: its token ids mean other text. "
            "Prepare the text with the model's: "
            + (f"python sample.py --init_from={whence} --export=out-hub and then " if checkpoint else "")
            + f"python data/text/prepare.py ... --tokenizer={'out-hub' if checkpoint else init_from}"
        )
    if lora_rank and not resuming and not eval_only:
        if checkpoint and "lora" in checkpoint:
            fail(f"{init_from} is an adapter itself: first python sample.py --init_from={init_from} --export=x --merge")
        files = [init_from, *(os.path.join(init_from, name) for name in (BEST, LATEST, PREVIOUS))]
        if checkpoint and os.path.realpath(out_dir) in {os.path.dirname(os.path.realpath(path)) for path in files}:
            fail(f"the adapter needs the checkpoint in {out_dir} to stay: give another --out_dir")
        torch.manual_seed(seed)
        model.add_lora(init_from, lora_rank, lora_alpha, lora_dropout, lora_targets)
    if sharded:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = dist.init_device_mesh(device_type, (world_size,))
        # a block's weights are gathered in the dtype that they are multiplied in; embeddings and the sums in float32
        policy = MixedPrecisionPolicy(ptdtype, torch.float32, cast_forward_inputs=False)
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)  # the rest
    else:
        model.to(device)
    for name in () if compile else ("step", "zero_grad", "add_param_group", "state_dict", "load_state_dict"):
        # PyTorch hides these from torch.compile, and imports all of it to do so: nearly a second at every start
        hidden = getattr(torch.optim.AdamW, name)
        setattr(torch.optim.AdamW, name, torch.no_grad()(getattr(hidden, "__wrapped__", hidden)))
    optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type, muon, ptdtype)

byte_lengths = torch.zeros(model.config.vocab_size, dtype=torch.int64)  # of the text that each token stands for
tokenizer, known = None, None
prompt = None  # the token ids that samples of text begin with, (1, T)
if description:
    try:
        tokenizer = from_description(description)
        known = torch.from_numpy(tokenizer.byte_lengths()[: len(byte_lengths)])
    except ValueError as e:
        say(f"no bits per byte and no samples: {e}")
if any_process(known is None):  # a machine without network may lack what the others have
    tokenizer = None
else:
    byte_lengths[: len(known)] = known
if tokenizer and sample_interval and not eval_only:
    try:
        prompt = torch.tensor([prompt_ids(tokenizer, sample_prompt, len(byte_lengths))], device=device)
    except ValueError as e:
        if "sample_prompt" in given:
            fail(f"sample_prompt: {e}")
        say(f"no samples of text, which --sample_prompt= gives: {e}")

iter_num, best_val_loss, wandb_id = 0, 1e9, None
if checkpoint and eval_only and not resuming:
    iter_num = checkpoint.get("iter_num", 0)
    say(f"checkpoint {os.path.join(init_from, checkpoint_name) if os.path.isdir(init_from) else init_from}")
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
if resuming:
    iter_num, best_val_loss = checkpoint.get("iter_num", 0), float(checkpoint.get("best_val_loss", 1e9))
    wandb_id = checkpoint.get("wandb_id")  # charts go on in the same run
    say(f"resuming from {os.path.join(out_dir, checkpoint_name)} at step {iter_num}")
    changed = {k for k in given & set(before) if before[k] != config[k]}
    if changed := changed - {"init_from", "out_dir", "device", "eval_only"}:
        say("changed since then: " + ", ".join(f"{k} {before[k]} -> {config[k]}" for k in sorted(changed)))
    try:
        if "optimizer" in checkpoint:
            load_optimizer(optimizer, checkpoint["optimizer"])
        else:
            say("the checkpoint has no optimizer state: AdamW begins anew")
        if checkpoint.get("scaler"):
            scaler.load_state_dict(checkpoint["scaler"])
    except (ValueError, KeyError, TypeError, RuntimeError) as e:
        fail(f"{checkpoint_name}: {e}; --init_from={out_dir} begins anew from its weights alone")
checkpoint = None  # its memory is needed

model.gradient_checkpointing = gradient_checkpointing
raw_model = model
autocast = torch.autocast(device_type, dtype=ptdtype, enabled=dtype != "float32")
compile = compile and can_compile(device)
if compile:
    if sharded:  # between blocks the weights are gathered, so each is compiled for itself
        for block in model.transformer.h:
            block.forward = torch.compile(block.forward, dynamic=False)
    else:
        model.compile(dynamic=False)  # a short last batch of an evaluation gets a graph of its own
if replicated:
    ids = [torch.device(device).index] if device_type == "cuda" else None
    model = DDP(model, device_ids=ids, gradient_as_bucket_view=True)  # no copy of the gradients to send
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
damaged = False  # whether this process met data that cannot be trained on
asked = 0  # the signal that asked this process to stop


def get_batch(split, starts):
    """Inputs and targets, the tokens one further on, of the windows that begin at starts: two (B, T) on the device."""
    global damaged
    try:
        xy = torch.from_numpy(tokens[split].windows(starts, block_size + 1))
    except (OSError, ValueError) as e:  # a disk that is gone, a file that has become shorter
        print(f"error: {data.folder}, {split}: cannot be read any more ({e})", file=sys.stderr)
        damaged, xy = True, torch.zeros(len(starts), block_size + 1, dtype=torch.int64)
    if xy.max() >= raw_model.config.vocab_size:
        # the step goes on with other ids, so that no process waits in vain for this one; then all of them stop
        row = int((xy >= raw_model.config.vocab_size).any(dim=1).nonzero()[0])
        message = f"has a token id {xy.max()} in the window at token {starts[row]:,}, past the model's vocabulary"
        print(f"error: {data.folder}, {split}: {message}", file=sys.stderr)
        damaged = True
        xy.clamp_(max=raw_model.config.vocab_size - 1)
    if device_type == "cuda":
        xy = xy.pin_memory().to(device, non_blocking=True)
    else:
        xy = xy.to(device)
    return xy[:, :-1], xy[:, 1:]


@torch.no_grad()
def estimate_loss():
    """Evaluate on eval_iters * batch_size windows of each split (all, where there are fewer) that are spread evenly and
    are the same each time; with eval_iters=0 on every token of val but the first, and as much of train. Returns a
    record for log(): mean losses in nats per token; of val also the perplexity, the bits per byte of its text, None
    where the tokenizer is not at hand, and how many tokens it was. None instead if it is asked to stop or meets damaged
    data."""
    global damaged
    raw_model.eval()
    record, stopping = {}, False
    every = (len(tokens["val"]) - 1) // block_size
    for split, stream in tokens.items():
        starts = eval_windows(len(stream), block_size, eval_iters * batch_size or every)
        rest = (len(stream) - 1) % block_size if split == "val" and not eval_iters else 0
        if rest:
            starts = np.append(starts, len(stream) - 1 - block_size)  # a last window for the tokens left over
        sums = torch.zeros(3, dtype=torch.float64)  # of losses, tokens, bytes
        for i in range(0, len(starts), world_size * batch_size):
            stopping = any_process(asked or damaged)
            if stopping:
                break
            mine = starts[i + rank * batch_size :][:batch_size]
            X, Y = get_batch(split, mine if len(mine) else starts[:batch_size])  # sharded weights want all processes
            if rest and len(mine) and mine[-1] == starts[-1]:
                Y = Y.clone()
                Y[-1, :-rest] = -1  # counted in the window before
            with autocast:
                _, loss = raw_model(X, Y, return_logits=False)
            if len(mine):
                counted = Y[Y != -1].cpu()
                sums += torch.tensor([loss.item() * len(counted), len(counted), byte_lengths[counted].sum().item()])
        if stopping:
            break
        if ddp:  # each process had its share
            sums = sums.to(device)
            dist.all_reduce(sums)
        total, count, n_bytes = sums.tolist()
        record[f"{split}/loss"] = total / count
        if split == "val":
            record["val/perplexity"] = math.exp(min(total / count, 700))
            record["val/bits_per_byte"] = total / math.log(2) / n_bytes if n_bytes else None
            record["val/tokens"] = int(count)
    raw_model.train()
    damaged = any_process(damaged)
    return None if stopping or damaged else record


def write_sample():
    """What the model makes of the prompt now, 100 tokens of it. It draws from a generator of its own, so that training
    goes on as if nothing had been. Processes that share the weights must all take part."""
    raw_model.eval()
    generator = torch.Generator(device).manual_seed(seed)
    # a compiled model would be compiled anew for each length
    with torch.compiler.set_stance("force_eager") if compile else contextlib.nullcontext(), autocast:
        ids = raw_model.generate(prompt, 100, temperature=0.8, top_k=200, generator=generator)
    raw_model.train()
    return for_terminal(tokenizer.decode(ids[0].tolist()))


def get_lr(it):
    """Learning rate of step it."""
    if not decay_lr:
        return learning_rate
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if lr_schedule == "constant":
        return learning_rate
    if it >= lr_decay_iters:
        return min_lr
    begin = warmup_iters
    if lr_schedule == "wsd":
        begin = max(begin, lr_decay_iters * (1 - wsd_decay_frac))
    ratio = max(0.0, (it - begin) / (lr_decay_iters - begin))  # of the decay that is done
    if lr_schedule == "cosine":
        ratio = 0.5 * (1.0 - math.cos(math.pi * ratio))
    return learning_rate + ratio * (min_lr - learning_rate)


# -----------------------------------------------------------------------------
# what is kept

metrics_path = os.path.join(out_dir, "metrics.jsonl")
writer, writing = ThreadPoolExecutor(1), None  # the checkpoint on its way to the disk: its name, step and future
saved_iter = iter_num  # step of the latest one that is there
best_before = best_val_loss  # the loss of the best one that is surely there


def on_host(state, seen):
    """A copy of a state_dict in the main process's memory: sharded tensors whole (all processes must take part then),
    one that stands there twice (tied weights) once."""
    if isinstance(state, dict):
        return {key: on_host(value, seen) for key, value in state.items()}
    if not isinstance(state, torch.Tensor):
        return state
    if id(state) not in seen:
        full = state.full_tensor() if hasattr(state, "full_tensor") else state
        seen[id(state)] = full.detach().to("cpu", copy=True) if master else None
    return seen[id(state)]


def save(name):
    """Begin to write a checkpoint: training waits for a copy in host memory alone, settle() for the disk. Where the
    weights lie there already, none is made and it waits for the disk: a CPU trains with all its cores, so that both at
    once would take longer than one after the other."""
    global writing
    settle()
    copied = sharded or device_type != "cpu"
    state = {
        "model": raw_model.trained_state(keep_vars=copied),
        "model_args": raw_model.config.to_dict(),
        "iter_num": iter_num,
        "best_val_loss": best_val_loss,
        "config": config,
        "tokenizer": description,
        "wandb_id": wandb_id,
        "format": 1,
    }
    if raw_model.lora:
        state["lora"] = raw_model.lora
    if name != BEST:
        state.update(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    state = on_host(state, {}) if copied else state
    written = None
    if master:
        written = writer.submit(save_checkpoint, state, out_dir, name, keep_previous=iter_num > saved_iter)
    writing = name, iter_num, written
    if not copied:
        settle()


def settle():
    """Wait for the checkpoint that is being written, if one is. A failure is reported and training goes on: the disk
    may be freed."""
    global writing, saved_iter, best_val_loss
    if not writing:
        return
    (name, step, written), writing = writing, None
    if error := written and written.exception():
        say(f"WARNING: {os.path.join(out_dir, name)} is not written, the one before stays ({error})")
    if any_process(error):
        best_val_loss = best_before if name == BEST else best_val_loss  # a later evaluation tries again
    elif name == LATEST:
        saved_iter = step


def log(record):
    """Append a record of numbers and texts to metrics.jsonl, and to TensorBoard and wandb."""
    if not master or eval_only:
        return
    record = {name: value for name, value in record.items() if value is not None}
    try:
        with open(metrics_path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"iter": iter_num} | record) + "\n")
    except OSError as e:
        say(f"WARNING: {metrics_path} is not written ({e})")
    try:  # whatever happens in these, it is not worth the run
        for name, value in record.items() if tensorboard else ():
            add = tensorboard.add_text if isinstance(value, str) else tensorboard.add_scalar
            add(name, value, iter_num)
    except Exception as e:
        say(f"WARNING: TensorBoard does not log ({e})")
    try:
        if wandb_log:  # it passes over steps that are repeated after a crash: they are the same
            wandb.log({"iter": iter_num} | record, step=iter_num)
    except Exception as e:
        say(f"WARNING: wandb does not log ({e})")


tensorboard = None
if master and not eval_only:
    if tensorboard_log:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            fail("tensorboard_log needs tensorboard: pip install tensorboard, or --tensorboard_log=False")
    if wandb_log:
        try:
            import wandb

            options = dict(project=wandb_project, name=wandb_run_name, config=config)
            wandb_id = wandb.init(**options, id=wandb_id, resume="allow").id
        except ImportError:
            fail("wandb_log needs wandb: pip install wandb, or --wandb_log=False")
        except Exception as e:  # wandb has errors of its own, for a missing login above all
            fail(f"wandb: {e} (type wandb login, or --wandb_log=False, or set WANDB_MODE=offline)")
    with usage_errors():
        os.makedirs(out_dir, exist_ok=True)
        lock = FolderLock(out_dir)
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(out_dir, "exit_code"))
        kept_names = (LATEST, PREVIOUS, BEST, "metrics.jsonl", "loss.png", "tensorboard")
        if resuming:
            if checkpoint_name != LATEST and os.path.exists(os.path.join(out_dir, LATEST)):  # it is damaged
                os.replace(os.path.join(out_dir, LATEST), os.path.join(out_dir, LATEST + ".damaged"))
            if os.path.exists(metrics_path):
                kept = read_metrics(out_dir, iter_num)  # those from there on will be logged again
                with open(metrics_path + ".tmp", "w", encoding="utf-8") as f:
                    f.writelines(json.dumps(record) + "\n" for record in kept)
                os.replace(metrics_path + ".tmp", metrics_path)
        elif earlier := [name for name in kept_names if os.path.exists(os.path.join(out_dir, name))]:
            numbers = (n for n in range(1, 10**6) if not os.path.exists(os.path.join(out_dir, f"previous-{n}")))
            aside = os.path.join(out_dir, f"previous-{next(numbers)}")
            os.makedirs(aside)
            for name in earlier:
                os.replace(os.path.join(out_dir, name), os.path.join(aside, name))
            say(f"{out_dir} held an earlier run: moved to {aside}")
        open(metrics_path, "a").close()  # better to know now that a folder cannot be written to
        if tensorboard_log:
            purge = iter_num if resuming else None  # what comes from there on is logged again
            tensorboard = SummaryWriter(os.path.join(out_dir, "tensorboard"), purge_step=purge, flush_secs=10)


def on_signal(number, _):
    global asked
    if asked and not ddp:  # torchrun repeats signals, and kills what does not end in its --shutdown-timeout
        os._exit(128 + number)
    asked = asked or number
    if master:
        with contextlib.suppress(OSError):  # a handler can come in the middle of a print, so it does not print itself
            once_more = b"" if ddp else b"; once more exits at once"
            os.write(2, b"\nfinishing the step, then saving" + once_more + b"\n")


if not eval_only:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):  # nohup ignores it
            signal.signal(number, on_signal)

parameters, shape = raw_model.get_num_params(), raw_model.config
trained = sum(p.numel() for p in raw_model.parameters() if p.requires_grad)
epochs = max_iters * tokens_per_iter / len(tokens["train"])
memory = raw_model.training_bytes(batch_size, block_size, ptdtype.itemsize, world_size if sharded else 1)
summary = {
    "device": device_line.removeprefix("device ") + (f", {world_size} processes" if ddp else ""),
    "compile": str(compile),
    "data": f"{data.folder}, {len(tokens['train']):,} tokens to train on, {len(tokens['val']):,} to validate",
    "model": f"{parameters / 1e6:.2f}M parameters, {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide"
    + (f"; {trained / 1e6:.2f}M are trained, beside {raw_model.lora['base']}" if raw_model.lora else ""),
    "step": f"{tokens_per_iter:,} tokens, {gradient_accumulation_steps} x {batch_size} x {block_size}",
    "run": f"{max_iters:,} steps, {epochs:.3g} epochs",
    "memory": f"about {memory / 2**30:.2f} GiB of tensors" + " a process" * ddp + ", less when compiled" * compile,
}
for name, value in summary.items():
    if not eval_only or name in ("device", "data", "model"):
        say(f"{name:<8} {value}")
# the learning rate of https://arxiv.org/abs/2001.08361, D.6, which is for models of less than 10 billion parameters
usual = (0.003239 - 0.0001395 * math.log(min(parameters, 1e10))) * (10 if raw_model.lora else 1)
falls = decay_lr and lr_schedule != "constant"
doubts = {
    "more than four epochs: from there on the same text teaches less and less": epochs > 4,
    f"learning_rate is high, {usual:.0e} is usual for this size: the run may diverge": learning_rate > 10 * usual,
    f"learning_rate is low, {usual:.0e} is usual for this size": learning_rate < usual / 1000,
    "min_lr is above learning_rate": falls and min_lr > learning_rate,
    "warmup_iters is past max_iters: learning_rate is never reached": decay_lr and 0 < max_iters <= warmup_iters,
    "lr_decay_iters is past max_iters: min_lr is never reached": falls and 0 < max_iters < lr_decay_iters,
}
for doubt, holds in doubts.items():
    if holds and not eval_only:
        say(f"WARNING: {doubt}")

# -----------------------------------------------------------------------------
# training

model.train()
first_iter = iter_num
if not resuming:
    log({"parameters": parameters})
seconds, timed = 0.0, 0  # of the steps since the last log line
stop, exit_code = 0, 0
while True:
    # once in a while: save, evaluate, end
    done = iter_num >= max_iters
    evaluating = iter_num % eval_interval == 0 or done or eval_only
    due = always_save_checkpoint and evaluating or save_interval and iter_num % save_interval == 0
    if (due or done or stop) and iter_num > saved_iter:
        save(LATEST)
    if stop:
        break
    if evaluating:
        record = estimate_loss()
        if record is None:  # the resumed run evaluates anew
            stop = True
            settle()
            continue
        settle()  # best_val_loss may be that of a file which could not be written
        log(record | {"memory": peak_memory(device_type)})
        bits = record["val/bits_per_byte"]
        say(
            f"step {iter_num}: train loss {record['train/loss']:.4f}, val loss {record['val/loss']:.4f}, "
            f"perplexity {record['val/perplexity']:.2f}" + (f", {bits:.4f} bits per byte" if bits else "")
            + f", {record['val/tokens']:,} tokens" * eval_only
        )  # fmt: skip
        if loss_plot and master and not eval_only:
            try:
                draw_losses([out_dir], os.path.join(out_dir, "loss.png"))
            except Exception as e:  # whatever it is, it is not worth the run
                say(f"WARNING: loss.png is not drawn ({e})")
        if record["val/loss"] < best_val_loss and not eval_only:
            best_before, best_val_loss = best_val_loss, record["val/loss"]
            if iter_num > 0:
                save(BEST)
            if iter_num > saved_iter or done and iter_num > 0:  # at the end for best_val_loss
                save(LATEST)
    if prompt is not None and iter_num > 0 and (iter_num % sample_interval == 0 or done) and (master or sharded):
        text = write_sample()
        log({"sample": text})
        say(f"step {iter_num} writes:\n{text}\n---------------")
    if done or eval_only:
        break

    # one step
    t0 = time.perf_counter()
    lr = get_lr(iter_num)
    for group in optimizer.param_groups:
        group["lr"] = lr
    stats = torch.zeros(3, device=device)  # of this process: mean loss, whether to stop, whether data is damaged
    for micro_step in range(gradient_accumulation_steps // world_size):
        piece = micro_step * world_size + rank  # of the gradient_accumulation_steps micro-batches of this step
        # batch and dropout depend on the seed, the step and the piece alone: a resumed run repeats them
        torch.manual_seed(int(np.random.SeedSequence((seed, iter_num, piece)).generate_state(1, np.uint64)[0]))
        first = (iter_num * gradient_accumulation_steps + piece) * batch_size
        X, Y = get_batch("train", train_windows(len(tokens["train"]), block_size, seed, first, batch_size))
        if replicated:  # gradients are exchanged once a step; sharded ones at once, as none holds them whole
            model.require_backward_grad_sync = piece + world_size >= gradient_accumulation_steps
        with autocast:
            _, loss = model(X, Y, return_logits=False)
            loss = loss * world_size / gradient_accumulation_steps
        scaler.scale(loss).backward()
        stats[0] += loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    grad_norm = (grad_norm.full_tensor() if sharded else grad_norm).item()
    stats[1], stats[2] = asked, damaged
    if ddp:  # all processes see the same loss, and stop at the same step
        dist.all_reduce(stats)
        stats[0] /= world_size
    step_loss, stop, damaged = stats.tolist()
    if damaged:  # before the weights are touched
        break
    # float16 gradients overflow now and then: the scaler skips such steps and scales less
    overflow = dtype == "float16" and scaler.get_scale() >= 1
    if not math.isfinite(step_loss) or not math.isfinite(grad_norm) and not overflow:
        settle()
        say(
            f"step {iter_num}: loss {step_loss}, gradient norm {grad_norm}: stopped before the weights were touched. "
            + ("Resume from the last checkpoint" if saved_iter else "Nothing is saved yet, so begin again")
            + " with a lower --learning_rate, or with --dtype=float32"
        )
        exit_code = 3
        break
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=not replicated)  # those of DDP are views of its buckets: keep them
    seconds, timed = seconds + time.perf_counter() - t0, timed + 1

    # log
    if iter_num % log_interval == 0 and master:
        dt = seconds / timed
        seconds, timed = 0.0, 0
        # the first step warms up, and a CPU's peak has to be measured, so utilisation waits for the second line
        peak, _ = peak_flops(device, ptdtype) if iter_num > first_iter else (None, "")
        sequences = gradient_accumulation_steps * batch_size / world_size
        mfu = raw_model.estimate_mfu(sequences, dt, peak, block_size) if peak else None
        left = datetime.timedelta(seconds=round(min((max_iters - iter_num - 1) * dt, 1e10)))
        say(
            f"iter {iter_num}: loss {step_loss:.4f}, time {dt * 1000:.2f}ms, "
            f"mfu {f'{mfu:.2%}' if mfu else 'unknown'}, {tokens_per_iter / dt:,.0f} tok/s, "
            f"eta {left}, lr {lr:.2e}, norm {grad_norm:.2f}",
            passing=True,
        )
        log({
            "loss": step_loss, "lr": lr, "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "tokens": (iter_num + 1) * tokens_per_iter, "tokens_per_second": tokens_per_iter / dt, "mfu": mfu,
        })  # fmt: skip
    iter_num += 1

# -----------------------------------------------------------------------------
# the end

settle()
if damaged and not eval_only and iter_num > saved_iter:
    save(LATEST)
    settle()
if exit_code != 3 and saved_iter < iter_num:
    exit_code = 1
    say(f"the state of step {iter_num} could not be saved")
elif damaged:
    exit_code = 2
    say(f"stopped at step {iter_num}: prepare the dataset again, then --init_from=resume --out_dir={out_dir}")
elif stop:
    exit_code = 128 + (asked or signal.SIGTERM)  # where another process was asked, this one goes along
    carry_on = f"; to carry on: python train.py --init_from=resume --out_dir={out_dir}" if saved_iter else ""
    say(f"stopped at step {iter_num}{carry_on}")
elif exit_code == 0 and iter_num > 0 and not eval_only:
    say(f"done: {iter_num} steps, best validation loss {best_val_loss:.4f}; python sample.py --out_dir={out_dir}")
if master and not eval_only:
    with contextlib.suppress(OSError), open(os.path.join(out_dir, "exit_code"), "w") as f:
        f.write(f"{exit_code}\n")
    lock.release()
if ddp:
    dist.barrier()  # a process that leaves while another still saves can bring it down
    dist.destroy_process_group()
with contextlib.suppress(Exception):  # whatever it is, the run is done
    if tensorboard:
        tensorboard.close()
    if wandb_log and master and not eval_only:
        wandb.finish(exit_code)
try:
    sys.stdout.flush()
except OSError:  # gone, and Python would exit with a code of its own for it
    sys.stdout = None
if ddp:  # now and then gloo's threads are still there, and abort when Python takes itself down under them
    os._exit(exit_code)
sys.exit(exit_code)
