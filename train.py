"""
Train a GPT on a prepared dataset: from scratch, from a checkpoint, or from a Hugging Face model. The default settings
train GPT-2 (124M) on OpenWebText.

    python train.py config/train_shakespeare_char.py                      one process, on a GPU, a Mac or a CPU
    python train.py config/train_shakespeare_char.py --batch_size=32      any setting below can be overridden
    python train.py --init_from=resume --out_dir=out-shakespeare-char     continue a run that was interrupted
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py                   8 GPUs of one machine
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=IP --master_port=1234 train.py ...     2 nodes
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py --fsdp    a model too large for one GPU
    python train.py --plot=out-a,out-b                                    plot the loss curves of runs to loss.png

Ctrl-C or SIGTERM finishes the step, saves and exits; a second signal exits at once (not under torchrun). A resumed run
ends with the same weights, bit for bit, as an uninterrupted one (on GPUs with --deterministic, on CPUs with the same
number of threads). class Run, below, lists the files in out_dir.

Exit codes: 0 done, 1 the last checkpoint could not be written, 2 wrong usage, out of memory or corrupt data, 3
diverged, 129, 130 and 143 stopped by SIGHUP, SIGINT and SIGTERM. torchrun turns all but 0 into 1; out_dir/exit_code
then has rank 0's, unless the run failed at its start or ended with a traceback, which exits with 1.
"""

import configurator  # isort: skip  # first: it prepares the import of torch

import contextlib
import dataclasses
import datetime
import json
import math
import os
import shlex
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP

import model as gpt
from configurator import StopSignal, any_rank, configure, fail, first_line, print0, sum_over_ranks, usage_errors
from data.metrics import plot_losses, read_metrics
from data.shards import DataError, Dataset, FolderLock, eval_windows, load_batch, train_windows
from data.tokenizer import assumed_tokenizer, for_terminal, from_description, from_hub, match_tokenizers, prompt_ids
from model import BEST, GPT, LATEST, PREVIOUS, GPTConfig

# -----------------------------------------------------------------------------
# settings
# I/O
out_dir = "out"
eval_interval = 2000  # evaluate every N steps
eval_iters = 200  # batches per split, the same ones every time; 0: the whole validation split, and as much of train
eval_only = False  # if True, script exits right after the first eval
log_interval = 1  # log every N steps
always_save_checkpoint = True  # save a checkpoint at each eval; False: after a new best val loss, and at the end
save_interval = 0  # also save a checkpoint every N steps; 0: off
sample_interval = 2000  # generate a sample of text every N steps, and at the end; 0: off
sample_prompt = "\n"  # prompt of the samples
loss_plot = False  # plot the loss curves to out_dir/loss.png at every evaluation (pip install matplotlib)
plot = ""  # out_dirs of runs, comma-separated: plot their loss curves to loss.png, and exit
init_from = "scratch"  # scratch, resume, auto (resume or scratch), auto:X (resume or X), a checkpoint, a Hub name
# logging, in addition to out_dir/metrics.jsonl
tensorboard_log = False  # also log to TensorBoard: tensorboard --logdir=out_dir (pip install tensorboard)
wandb_log = False  # also log to Weights & Biases
wandb_project = "owt"
wandb_run_name = "gpt2"
# data
dataset = "openwebtext"  # folder in data/
gradient_accumulation_steps = 5 * 8  # micro-batches per step in total, divided among the ranks
batch_size = 12  # micro-batch size, in sequences
block_size = 1024  # context length, in tokens
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # for pretraining 0 is good, for finetuning try 0.1+
bias = False  # do we use bias inside LayerNorm and Linear layers?
# options that nanoGPT lacks; the defaults give its model, config/modern.py gives Llama's
norm = "layernorm"  # layernorm, rmsnorm
position = "learned"  # learned, rope
rope_theta = 10000.0  # base of the rotary frequencies
mlp = "gelu"  # gelu, gelu_tanh (OpenAI's GPT-2), swiglu, relu2
n_hidden = 0  # width of the MLP; 0: 4 * n_embd, for swiglu 8/3 * n_embd rounded up to a multiple of 8
n_kv_head = 0  # number of key/value heads (grouped-query attention); 0: n_head
qk_norm = False  # normalize queries and keys
tied = True  # share the weights of the token embedding and the output layer
zero_init = False  # zero-initialize the projections into the residual stream; False: like GPT-2
# LoRA: freeze the weights of init_from and train low-rank adapters (pip install peft)
lora_rank = 0  # rank of the adapters, usually 8 to 64; 0: off
lora_alpha = 16  # the adapters are scaled by lora_alpha / lora_rank
lora_dropout = 0.0  # dropout on the adapters' input
lora_targets = "c_attn,c_proj,c_fc"  # Linear layers that get adapters
# optimizer
muon = False  # Muon for the matrices of the blocks, AdamW for the rest; False: AdamW only
muon_momentum = 0.95  # of Muon's gradients; runs of about 150 steps learn faster with 0.85
learning_rate = 6e-4  # max learning rate
max_iters = 600000  # total number of training steps
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # maximum gradient norm; 0.0: no clipping
# learning rate decay settings
decay_lr = True  # whether to warm up and decay the learning rate
lr_schedule = "cosine"  # after the warmup: cosine, linear, constant or wsd (constant, then linear decay)
warmup_iters = 2000  # how many steps to warm up for
lr_decay_iters = 0  # step at which min_lr is reached, should be ~= max_iters per Chinchilla; 0: max_iters
min_lr = 6e-5  # minimum learning rate, should be ~= learning_rate/10 per Chinchilla
wsd_decay_frac = 0.2  # wsd: fraction of lr_decay_iters spent in the final decay
# system
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # auto, float32, bfloat16, float16 (with loss scaling)
compile = True  # use torch.compile to compile the model to be faster
gradient_checkpointing = False  # recompute each block in the backward pass: less memory, a third more time
backend = "auto"  # of torch.distributed: auto, nccl, gloo
fsdp = False  # shard weights, gradients and optimizer state across ranks (FSDP2)
timeout = 600  # timeout of collectives, in seconds
seed = 1337  # of the initial weights, the order of the data, and dropout
deterministic = False  # use deterministic (slower) algorithms on GPUs; CPUs are always deterministic
# -----------------------------------------------------------------------------
# override the globals above from config files and flags. explicit: the names that were given. config: a copy of the
# globals for checkpoints; match_model() below sets its model settings, but not the globals, to the loaded model's
config, explicit = configure(globals())

if plot:
    with usage_errors():
        plot_losses(plot.split(","), "loss.png")
    print("wrote loss.png")
    sys.exit(0)

# -----------------------------------------------------------------------------
# setup

# the exit code of an earlier run must not be taken for this one's
if os.environ.get("RANK", "0") == "0" and not eval_only:
    with contextlib.suppress(OSError):
        os.remove(os.path.join(out_dir, "exit_code"))

# open the checkpoint to start from; there is none for scratch and for Hub models, which load_model() reads
if init_from.split(":")[0] == "auto":
    can_resume = any(os.path.exists(os.path.join(out_dir, name)) for name in (LATEST, PREVIOUS))
    init_from = "resume" if can_resume else init_from.removeprefix("auto").lstrip(":") or "scratch"
resuming = init_from == "resume"
checkpoint, checkpoint_path = None, None
if init_from != "scratch":
    names = (LATEST, PREVIOUS) if resuming else (BEST, LATEST, PREVIOUS)
    with usage_errors():
        checkpoint, checkpoint_path = gpt.open_checkpoint(init_from, out_dir, names)

# resume and eval_only inherit the checkpoint's settings, except those in flags and config files; defaults never
# override them, not even edited ones or those from the environment
inherits = checkpoint is not None and (resuming or eval_only)
changed = []
if inherits:
    saved_config = dict(checkpoint.get("config", {}))
    # lr_decay_iters == max_iters means "until the end", so that the decay follows a new max_iters
    if saved_config.get("lr_decay_iters") == saved_config.get("max_iters") and "lr_decay_iters" not in explicit:
        saved_config["lr_decay_iters"] = 0
    changed = configurator.inherit(config, explicit, saved_config, checkpoint_path)
    globals().update(config, init_from=init_from)  # config has init_from as it was given, such as auto

# check the settings
configurator.check_minimum(config, 1, "eval_interval", "log_interval", "batch_size", "block_size")
configurator.check_minimum(config, 1, "gradient_accumulation_steps", "timeout")
configurator.check_minimum(config, 0, "eval_iters", "save_interval", "sample_interval", "max_iters", "warmup_iters")
configurator.check_minimum(config, 0, "learning_rate", "min_lr", "lr_decay_iters", "wsd_decay_frac", "weight_decay")
configurator.check_minimum(config, 0, "grad_clip", "seed", "lora_rank", "muon_momentum")
configurator.check_choice(config, "lr_schedule", "cosine", "linear", "constant", "wsd")
if lora_rank and init_from == "scratch":
    fail("LoRA needs pretrained weights: set --init_from")
if lora_rank and muon:
    fail("Muon cannot be combined with LoRA: set --muon=False")

# device and dtype, and the ranks that torchrun started
rank, _, world_size = configurator.read_ranks()
is_master = rank == 0  # this process will do logging, checkpointing etc.
distributed = "RANK" in os.environ
use_ddp = distributed and not fsdp
use_fsdp = distributed and fsdp  # an inherited fsdp setting has no effect on one process
if gradient_accumulation_steps % world_size:
    multiple = math.ceil(gradient_accumulation_steps / world_size) * world_size
    fail(f"{world_size} ranks need a multiple of {world_size}: try --gradient_accumulation_steps={multiple}")
if fsdp and "fsdp" in explicit and not distributed:
    fail("--fsdp needs several ranks: torchrun --standalone --nproc_per_node=8 train.py ...")
device, dtype, device_line = configurator.pick_device(device, dtype)
if use_fsdp and dtype == "float16":
    fail("--fsdp does not support float16: try --dtype=float32")
device_type = device.split(":")[0]
ptdtype = getattr(torch, dtype)
autocast = torch.autocast(device_type, dtype=ptdtype, enabled=dtype != "float32")
if deterministic:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
if distributed:
    configurator.join_processes(device, backend, timeout)

# data
if not explicit:
    print0("GPT-2 (124M) on OpenWebText; for a first try: python train.py config/train_pydocs_char.py")
with usage_errors():
    data = Dataset(os.path.join("data", dataset))
    tokens = {split: data.split(split) for split in ("train", "val")}

# model: a new one or a loaded one
torch.manual_seed(seed)
with usage_errors():
    if init_from == "scratch":
        fields = {field.name: config[field.name] for field in dataclasses.fields(GPTConfig) if field.name in config}
        model = GPT(GPTConfig(**fields, vocab_size=gpt.round_vocab_size(data.vocab_size or 50257)))
        if zero_init:
            gpt.zero_projections(model)
    else:
        model = gpt.load_model(init_from, checkpoint, dropout=dropout)
model_fields = dataclasses.asdict(model.config)
if resuming:  # the adapter's settings, too: model.lora has rank, alpha, dropout and targets
    model_fields |= {f"lora_{name}": value for name, value in (model.lora or {"rank": 0}).items()}
else:  # if it has an adapter, start from the sum of base and adapter
    gpt.merge_lora(model)
# write the model's values into config; fail if an explicit setting differs, except dropout, which may change, and
# block_size, which comes next
configurator.match_model(config, explicit - {"block_size", "dropout"}, model_fields, checkpoint_path or init_from)

# context length: as given; else the one that conversations were packed for; else the one the checkpoint was trained
# with; else (new and Hub models) the default. Never more than the model allows
longest = model.config.block_size
if "block_size" not in explicit:
    if checkpoint:  # with RoPE the model may allow more
        block_size = checkpoint.get("config", {}).get("block_size", longest)
    block_size = min(data.block_size or block_size, longest)
if block_size > longest:
    fail(f"--block_size={block_size} exceeds the model's {longest}")
if batch_size * block_size >= 2**31:
    fail(f"{batch_size} x {block_size} is too many tokens for a micro-batch: lower --batch_size")
# crop new models (packed conversations may be shorter than block_size) and learned positions; loaded RoPE models keep
# their own block_size
if block_size < longest and (init_from == "scratch" or model.config.position != "rope"):
    if resuming and not eval_only:
        new_run = f"{shlex.quote(f'--init_from={out_dir}')} --block_size={block_size}"
        fail(f"this run has block_size {longest}: start a new run with {new_run}")
    gpt.crop_block_size(model, block_size)
config["block_size"] = block_size

# tokenizer: the model's; the dataset must use the same, or add the tokens that begin and end turns of a chat ("extra"),
# for which the embedding grows
dataset_tokenizer = data.tokenizer or assumed_tokenizer(data.vocab_size)
model_tokenizer = checkpoint.get("tokenizer") if checkpoint else None
with usage_errors():
    if init_from != "scratch" and not checkpoint:  # of a Hub model; an adapter's folder may leave it to its base
        model_tokenizer = from_hub(init_from) or from_hub(gpt.adapter_base(init_from))
    tokenizer_description = match_tokenizers(model_tokenizer, dataset_tokenizer, data.folder)
    if "extra" in (tokenizer_description or {}):
        if lora_rank and "extra" not in (model_tokenizer or {}):
            fail("LoRA cannot learn new turn tokens: set --lora_rank=0, or finetune an instruct model")
        gpt.grow_vocab_size(model, data.vocab_size)
    for stream in tokens.values():
        stream.check(block_size, model.config.vocab_size)

# the tokenizer, for bits per byte and samples, and the prompt of the samples
vocab_size = model.config.vocab_size
tokenizer, prompt = None, None
if tokenizer_description:
    try:
        tokenizer = from_description(tokenizer_description)
    except ValueError as e:
        print(for_terminal(f"rank {rank}: no bits per byte and no samples: {e}"), file=sys.stderr)
if any_rank(tokenizer is None, device):  # a node without network may lack what the others have
    tokenizer = None
if tokenizer and sample_interval and not eval_only:
    try:
        prompt = torch.tensor([prompt_ids(tokenizer, sample_prompt, vocab_size)], device=device)
    except ValueError as e:
        if "sample_prompt" in explicit:
            fail(f"--sample_prompt: {e}")
        print0(f"no samples of text: {e}; set --sample_prompt")

# LoRA: add adapters; their checkpoints name the file of the base model, which must stay where it is
if lora_rank and not resuming and not eval_only:
    if checkpoint and "lora" in checkpoint:  # merge_lora() above merged it in memory only
        source = shlex.quote(f"--init_from={init_from}")
        fail(f"{init_from} is an adapter: merge it first: python sample.py {source} --export=x --merge")
    if checkpoint and os.path.realpath(out_dir) == os.path.dirname(os.path.realpath(checkpoint_path)):
        fail(f"the adapter needs the checkpoint in {out_dir}: set another --out_dir")
    torch.manual_seed(seed)  # loading may have drawn random numbers
    with usage_errors():
        gpt.add_lora(model, init_from, lora_rank, lora_alpha, lora_dropout, lora_targets)

# move the weights to the device: a full copy per rank, or a shard (FSDP); then the optimizer
with usage_errors():
    if use_fsdp:
        gpt.shard_model(model, device_type, ptdtype)
    else:
        model.to(device)
    optimizer = gpt.configure_optimizers(
        model, weight_decay, learning_rate, (beta1, beta2), device_type, muon, ptdtype, muon_momentum
    )
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")

# where the run stands
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
iter_num = first_iter = checkpoint.get("iter_num", 0) if inherits else 0
tokens_seen = 0
eval_settings = [dataset, block_size, eval_iters * batch_size, len(tokens["val"])]  # that losses are measured on
best_val_loss, reset_best = 1e9, False
wandb_id = None
if resuming and not eval_only:
    wandb_id = checkpoint.get("wandb_id")
    tokens_seen = checkpoint.get("tokens_seen", iter_num * tokens_per_iter)  # nanoGPT's checkpoints have none
    # losses on other validation windows cannot be compared
    reset_best = checkpoint.get("eval_settings", eval_settings) != eval_settings
    if not reset_best:
        best_val_loss = float(checkpoint.get("best_val_loss", 1e9))
    with usage_errors():
        gpt.load_training_state(optimizer, scaler, checkpoint)
    if "optimizer" not in checkpoint:
        print0("no optimizer state in the checkpoint: starting with a fresh optimizer")
checkpoint = None  # free its memory

# torch.compile and gradient checkpointing modify the model in place; compilation happens at the first call.
# DDP wraps the model, and averages the gradients of the ranks
raw_model = model  # without DDP's wrapper
compile = compile and configurator.can_compile(device)
if compile and use_fsdp:  # FSDP gathers weights between the blocks, so compile each one
    for block in model.transformer.h:
        block.forward = torch.compile(block.forward, dynamic=False)
elif compile:
    model.compile(dynamic=False)
if gradient_checkpointing:
    gpt.enable_gradient_checkpointing(raw_model)
if use_ddp:
    device_ids = [torch.device(device).index] if device_type == "cuda" else None
    model = DDP(model, device_ids=device_ids, gradient_as_bucket_view=True)
    # DDP rebuilds its gradient buckets after the first backward pass, and the order of sums over three or more ranks
    # depends on them: do it now, so that the first step of a resumed run has the buckets of an uninterrupted one
    if not eval_only:
        X, Y = torch.zeros((2, batch_size, block_size), dtype=torch.int64, device=device)
        with autocast:
            _, loss = model(X, Y, return_logits=False)
        loss.backward()
        optimizer.zero_grad(set_to_none=False)

# -----------------------------------------------------------------------------
# batches, evaluation, learning rate

packed = data.block_size is not None  # whether conversations were packed into windows


def eval_batches(split):
    """Yield this rank's evaluation batches, always the same, spread evenly over the split."""
    n_tokens = len(tokens[split])
    # with eval_iters=0, the whole validation split, and as much of the training split
    count = eval_iters * batch_size or len(tokens["val"]) // block_size
    starts = eval_windows(n_tokens, block_size, count, packed)
    if split == "val" and eval_iters == 0:
        starts = np.arange(0, n_tokens - 1, block_size + int(packed))  # with the last one, which may be shorter
    # pad, so that all ranks get the same number of batches; load_batch() sets targets past the end to -1
    padding = -len(starts) % (world_size * batch_size)
    starts = np.append(starts, [n_tokens] * padding).astype(np.int64)
    for batch in starts.reshape(-1, world_size, batch_size):
        yield load_batch(tokens[split], batch[rank], block_size, vocab_size, device)


@torch.no_grad()
def estimate_loss():
    """Return mean losses in nats per token, perplexity and bits per byte; None if asked to stop."""
    raw_model.eval()
    losses = {}
    for split in ("train", "val"):
        loss, n_tokens, n_bytes = 0.0, 0, 0
        for X, Y in eval_batches(split):
            if any_rank(stop_signal.received, device):
                return None
            with autocast:  # raw_model: DDP has nothing to average here
                batch_loss, batch_tokens = gpt.sum_losses(raw_model, [(X, Y)])
            loss, n_tokens = loss + batch_loss, n_tokens + batch_tokens
            n_bytes += tokenizer.count_bytes(X.cpu().numpy(), Y.cpu().numpy()) if tokenizer else 0
        loss, n_tokens, n_bytes = sum_over_ranks([loss, n_tokens, n_bytes], device)
        losses[f"{split}/loss"] = loss / n_tokens
        if split == "val":
            losses["val/perplexity"] = math.exp(min(loss / n_tokens, 700))  # exp overflows above 709
            losses["val/bits_per_byte"] = loss / math.log(2) / n_bytes if n_bytes > 0 else None
            losses["val/tokens"] = int(n_tokens)
    raw_model.train()
    return losses


def get_lr(it):
    """Return the learning rate of step `it`."""
    # constant, without warmup
    if not decay_lr:
        return learning_rate
    # linear warmup for warmup_iters steps
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if lr_schedule == "constant":
        return learning_rate
    # constant, too, if the warmup leaves no steps for the decay
    decay_end = lr_decay_iters or max_iters
    if decay_end <= warmup_iters:
        return learning_rate
    # after the decay, min learning rate
    if it >= decay_end:
        return min_lr
    # in between, decay down to min learning rate
    decay_start = warmup_iters
    if lr_schedule == "wsd":
        decay_start = max(warmup_iters, decay_end * (1 - wsd_decay_frac))
    ratio = max(0.0, (it - decay_start) / max(decay_end - decay_start, 1))
    if lr_schedule == "cosine":
        ratio = 0.5 * (1.0 - math.cos(math.pi * ratio))
    return learning_rate + ratio * (min_lr - learning_rate)


# -----------------------------------------------------------------------------
# training loop


def train():
    """Train until max_iters, a signal or divergence; returns the exit code."""
    # run and stop_signal are created at the end of the file, before this is called
    global iter_num, tokens_seen  # number of steps completed, and of tokens in them
    seconds, timed_steps = 0.0, 0  # since the last log line
    second_step_began = None  # for the ETA: the first step also compiles
    stopping = False
    model.train()
    while True:
        # once in a while: save, stop, evaluate, sample, finish
        if run.should_save(iter_num, stopping):
            run.save(LATEST)  # before the evaluation, so that a kill during it loses nothing
        if stopping:
            return 128 + (stop_signal.received or signal.SIGTERM)  # SIGTERM if another rank received the signal
        if run.should_evaluate(iter_num):
            losses = estimate_loss()
            if losses is None:  # a signal arrived: back to the top, which saves and returns
                stopping = True
                continue
            run.log(losses | {"memory": gpt.peak_memory(device_type)})
            print0(eval_line(losses))
            run.save_if_best(losses["val/loss"])  # ckpt_best.pt, and ckpt.pt with the new best loss
        if run.should_sample(iter_num) and (is_master or use_fsdp):  # FSDP needs all ranks to generate
            text = sample_text()
            run.log({"sample": text})
            print0(f"step {iter_num} sample:\n{text}\n---------------")
        if iter_num >= max_iters or eval_only:
            return 0

        # one optimizer step; the micro-batches are assigned to the ranks round-robin
        t0 = time.perf_counter()
        if iter_num == first_iter + 1:
            second_step_began = t0
        lr = get_lr(iter_num)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), device=device)
        starts, loss_weights = step_windows(tokens_seen)
        for micro_step in range(rank, gradient_accumulation_steps, world_size):
            set_seed(iter_num, micro_step)
            X, Y = load_batch(tokens["train"], starts[micro_step], block_size, vocab_size, device)
            if use_ddp:  # all-reduce in the last micro-step only; FSDP in each: unsharded gradients would not fit
                model.require_backward_grad_sync = micro_step + world_size >= gradient_accumulation_steps
            with autocast:
                _, loss = model(X, Y, return_logits=False)
                # DDP and FSDP average over the ranks
                loss = loss * loss_weights[micro_step] * world_size / gradient_accumulation_steps
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        scaler.unscale_(optimizer)
        grad_norm = gpt.clip_gradients(raw_model, grad_clip)
        # every rank must see the same loss, and stop at the same step
        loss, n_stopped = sum_over_ranks([loss_sum.item() / world_size, float(stop_signal.received > 0)], device)
        stopping = n_stopped > 0
        # in float16 an infinite norm is normal: the loss scale was too high, so the scaler skips this update and halves
        # the scale. With a scale below 1 it means divergence
        may_overflow = dtype == "float16" and scaler.get_scale() >= 1
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or may_overflow):
            print0(
                f"step {iter_num}: loss {loss}, gradient norm {grad_norm}: diverged, no update was made. "
                f"{'Resume' if run.saved_iter else 'Start again'} with a lower --learning_rate, or with --dtype=float32"
            )
            return 3
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=not use_ddp)  # DDP's gradients are views of its buckets
        tokens_seen += tokens_per_iter
        seconds += time.perf_counter() - t0
        timed_steps += 1

        # log: the loss of this step, the mean time of the steps since the last line
        if iter_num % log_interval == 0 and is_master:
            dt = seconds / timed_steps
            seconds, timed_steps = 0.0, 0
            speed = throughput(dt)
            run.log({"loss": loss, "lr": lr, "grad_norm": grad_norm if math.isfinite(grad_norm) else None} | speed)
            print0(progress_line(loss, lr, grad_norm, dt, speed, second_step_began), progress=True)
        iter_num += 1


def set_seed(iter_num, micro_step):
    """Seed by step and micro-step, so that a resumed run repeats the same dropout masks."""
    torch.manual_seed(int(np.random.SeedSequence((seed, iter_num, micro_step)).generate_state(1, np.uint64)[0]))


def step_windows(tokens_seen):
    """Return the windows of a step and the weights of its micro-batches.

    The starts of the windows (micro-batches, B) are a pure function of seed and tokens seen, so that a resumed run
    repeats them. The micro-batches' mean losses have weight 1, unless conversations are packed: there the numbers
    of targets differ.
    """
    count = gradient_accumulation_steps * batch_size
    starts = train_windows(len(tokens["train"]), block_size, seed, tokens_seen // block_size, count, packed)
    weights = [1.0] * gradient_accumulation_steps
    if packed:  # every rank counts the targets of all ranks
        mask = tokens["train"].mask.windows(starts, block_size + 1)[:, 1:] == 1
        targets = mask.reshape(gradient_accumulation_steps, -1).sum(axis=1)
        weights = (targets * gradient_accumulation_steps / max(1, targets.sum())).tolist()
    return starts.reshape(gradient_accumulation_steps, batch_size), weights


def sample_text():
    """Generate 100 tokens from the prompt with a separate RNG, so that training is not affected."""
    raw_model.eval()
    generator = torch.Generator(device).manual_seed(seed)
    # a compiled model would be compiled again for every length
    eager = torch.compiler.set_stance("force_eager") if compile else contextlib.nullcontext()
    # sampling needs cumsum, which has no deterministic kernel on GPUs (use_deterministic_algorithms() would import the
    # compiler, 1 s); cuDNN's attention builds a plan for each number of keys, which takes longer than a token
    torch.set_deterministic_debug_mode("default")
    without_cudnn = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    with eager, autocast, without_cudnn:
        ids = raw_model.generate(prompt, 100, temperature=0.8, top_k=200, generator=generator)
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    raw_model.train()
    return tokenizer.decode(ids[0].tolist())


def eval_line(losses):
    """Format an evaluation for the terminal."""
    bits = losses["val/bits_per_byte"]
    line = f"step {iter_num}: train loss {losses['train/loss']:.4f}, val loss {losses['val/loss']:.4f}"
    perplexity = losses["val/perplexity"]
    line += f", perplexity {perplexity:.2f}" if perplexity < 1e9 else f", perplexity {perplexity:.2e}"
    line += f", {bits:.4f} bits per byte" if bits else ""
    line += f", {losses['val/tokens']:,} tokens" if eval_only else ""
    # worse than an untrained model: ln(V) is the loss of a uniform distribution
    if iter_num > 0 and losses["val/loss"] > math.log(vocab_size) + 0.1:
        line += "\nWARNING: this loss is worse than guessing: try a lower --learning_rate"
    return line


def throughput(dt):
    """Return tokens so far and per second, and the model FLOPs utilization, for steps of dt seconds."""
    mfu = None
    if iter_num >= first_iter + log_interval:  # the first line includes compilation
        peak, _ = gpt.peak_flops(device, ptdtype)
        flops = gpt.flops_per_token(raw_model, block_size) * tokens_per_iter / world_size  # of this rank
        mfu = flops / dt / peak if peak else None
    return {"tokens": tokens_seen, "tokens_per_second": tokens_per_iter / dt, "mfu": mfu}


def progress_line(loss, lr, grad_norm, dt, speed, second_step_began):
    """Format a step for the terminal."""
    mfu = f"{speed['mfu']:.2%}" if speed["mfu"] else "unknown"
    # at the mean speed of the run so far, with its evaluations
    eta = "unknown"
    if second_step_began:
        step_seconds = (time.perf_counter() - second_step_began) / (iter_num - first_iter)
        eta = datetime.timedelta(seconds=round(min((max_iters - iter_num - 1) * step_seconds, 1e10)))
    return (
        f"iter {iter_num}: loss {loss:.4f}, time {dt * 1000:.2f}ms, mfu {mfu}, "
        f"{speed['tokens_per_second']:,.0f} tok/s, {iter_num + 1:,} of {max_iters:,} steps, eta {eta}, "
        f"lr {lr:.2e}, norm {grad_norm:.2f}"
    )


# -----------------------------------------------------------------------------
# what a run leaves behind


class Run:
    """Decide when to save, evaluate and sample. On rank 0, write out_dir:

    ckpt.pt           the latest state, to resume from; ckpt_prev.pt is the one before
    ckpt_best.pt      the weights with the lowest validation loss, to sample from
    ckpt.pt.corrupt   a ckpt.pt that could not be read
    metrics.jsonl     everything that is logged, one JSON object per line; tensorboard/ and loss.png if enabled
    exit_code         of the finished run
    previous-1/ ...   earlier runs in the same out_dir
    """

    def __init__(self):
        # checkpoints; the step that the run starts from counts as saved, so step 0 and eval_only save nothing
        self.pool = ThreadPoolExecutor(1)  # of one thread that writes them
        self.saving = None  # the save in progress, on rank 0
        self.saved_iter = iter_num  # step of ckpt.pt on disk; 0: there is none
        self.pending_iter = None  # step of the save in progress
        self.best_val_loss = best_val_loss
        # logs
        self.writes = is_master and not eval_only
        self.metrics_path = os.path.join(out_dir, "metrics.jsonl")
        self.tensorboard = self.wandb = None
        self.wandb_id = wandb_id  # a resumed run continues its charts
        # the folder
        if self.writes:
            with usage_errors():
                os.makedirs(out_dir, exist_ok=True)
                self.lock = FolderLock(out_dir)
                if resuming:
                    self.continue_files()
                else:
                    self.move_files(LATEST, PREVIOUS, BEST, "metrics.jsonl", "loss.png", "tensorboard")
                open(self.metrics_path, "a").close()  # fail now if the folder is not writable
            self.open_loggers()

    def continue_files(self):
        """Set a corrupt checkpoint aside, and drop the metrics that will be logged again."""
        # resumed from the previous one: the latest is corrupt
        latest = os.path.join(out_dir, LATEST)
        if checkpoint_path != latest and os.path.exists(latest):
            os.replace(latest, latest + ".corrupt")
        if reset_best:
            self.move_files(BEST)
        # rewrite metrics.jsonl atomically
        if os.path.exists(self.metrics_path):
            # drop what will be logged again; an extended run keeps its last evaluation unless it is due again
            due = {"loss": True, "val/loss": self.should_evaluate(iter_num), "sample": self.should_sample(iter_num)}
            records = read_metrics(out_dir, before=iter_num + 1)
            records = [r for r in records if r["iter"] < iter_num or not any(due[key] for key in due.keys() & r.keys())]
            with open(self.metrics_path + ".tmp", "w", encoding="utf-8") as f:
                f.writelines(json.dumps(record) + "\n" for record in records)
            os.replace(self.metrics_path + ".tmp", self.metrics_path)

    def move_files(self, *names):
        """Move files of an earlier run into the first free previous-N."""
        names = [name for name in names if os.path.exists(os.path.join(out_dir, name))]
        if not names:
            return
        n = 1
        while os.path.exists(os.path.join(out_dir, f"previous-{n}")):
            n += 1
        folder = os.path.join(out_dir, f"previous-{n}")
        os.makedirs(folder)
        for name in names:
            os.replace(os.path.join(out_dir, name), os.path.join(folder, name))
        print0(f"moved the earlier run's files in {out_dir} to {folder}")

    def open_loggers(self):
        if loss_plot:
            with usage_errors("--loss_plot needs pip install matplotlib"):
                import matplotlib.figure  # noqa: F401
        if tensorboard_log:
            with usage_errors("--tensorboard_log needs pip install tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                # purge the events of steps that will be repeated
                folder = os.path.join(out_dir, "tensorboard")
                purge = iter_num + (not self.should_evaluate(iter_num)) if resuming else None
                self.tensorboard = SummaryWriter(folder, purge_step=purge, flush_secs=10)
        if wandb_log:
            with usage_errors("--wandb_log needs pip install wandb, and wandb login or WANDB_MODE=offline"):
                import wandb

                options = dict(project=wandb_project, name=wandb_run_name, config=config)
                self.wandb = wandb
                self.wandb_id = wandb.init(**options, id=self.wandb_id, resume="allow").id

    def should_evaluate(self, it):
        return it % eval_interval == 0 or it >= max_iters or eval_only

    def should_save(self, it, stopping):
        # always save the last step, but no step twice
        is_due = (always_save_checkpoint and self.should_evaluate(it)) or (save_interval and it % save_interval == 0)
        return (is_due or stopping or it >= max_iters) and it not in (self.saved_iter, self.pending_iter)

    def should_sample(self, it):
        # prompt is None if there is nothing to sample: no tokenizer, sample_interval=0, eval_only
        return prompt is not None and it > 0 and (it % sample_interval == 0 or it >= max_iters)

    def save(self, name):
        """Save ckpt.pt or ckpt_best.pt; returns False if it could not be written.

        If the state has to be copied to CPU memory anyway (from GPUs, with FSDP), ckpt.pt is written in the background,
        and True means that the write has started. On CPUs a background write would slow training down. save() waits for
        ckpt_best.pt: see save_if_best().
        """
        # one save at a time
        self.wait()
        copied = use_fsdp or device_type != "cpu"
        state = {
            # keep_vars: the parameters themselves, not new views, so that copy_to_cpu() finds tied ones by their id
            "model": gpt.weights_to_save(raw_model, keep_vars=copied),
            "model_args": gpt.model_args(raw_model.config),
            "iter_num": iter_num,
            "tokens_seen": tokens_seen,
            "best_val_loss": self.best_val_loss,
            "eval_settings": eval_settings,  # that it was measured on
            "config": config,
            "tokenizer": tokenizer_description,
            "wandb_id": self.wandb_id,
        }
        # an adapter needs its LoRA settings, an export the Hub's config files, a resumed run the optimizer and scaler
        if raw_model.lora:
            state["lora"] = raw_model.lora
        if raw_model.hub:
            state["hub"] = raw_model.hub
        if name == LATEST:
            state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        if copied:
            state = gpt.copy_to_cpu(state, is_master)
        if is_master:
            # saving the same step again must not replace ckpt_prev.pt by that step
            keep_previous = iter_num > self.saved_iter
            self.saving = self.pool.submit(gpt.save_checkpoint, state, out_dir, name, keep_previous)
        self.pending_iter = iter_num
        in_background = copied and name == LATEST
        return True if in_background else self.wait(name)

    def wait(self, name=LATEST):
        """Wait for the save in progress; returns whether it succeeded. Training continues if the disk is full."""
        # all ranks must agree on what is on disk
        error = self.saving.exception() if self.saving else None
        self.saving = None
        if error:
            print0(f"WARNING: could not write {os.path.join(out_dir, name)} ({error}); keeping the previous one")
        succeeded = not any_rank(error, device)
        if succeeded and name == LATEST and self.pending_iter is not None:
            self.saved_iter = self.pending_iter
        self.pending_iter = None
        return succeeded

    def save_if_best(self, val_loss):
        """Save ckpt_best.pt and ckpt.pt if the validation loss is a new best."""
        if not val_loss < self.best_val_loss or eval_only:  # NaN is not a new best
            return
        # step 0 counts, but is not saved: its weights are those of init_from. A best that could not be written does not
        # count, so that a later evaluation tries again
        previous, self.best_val_loss = self.best_val_loss, val_loss
        if iter_num == 0:
            return
        is_saved = self.save(BEST)
        if not is_saved:
            self.best_val_loss = previous
        # train() may have saved this step with the old best_val_loss, and a resumed run may not repeat this evaluation
        if is_saved or iter_num > self.saved_iter:
            self.save(LATEST)

    def log(self, record):
        """Append a record of numbers and texts to metrics.jsonl, TensorBoard and wandb."""
        if not self.writes:
            return
        # values that are not known are omitted
        record = {name: value for name, value in record.items() if value is not None}
        try:
            with open(self.metrics_path, "a", encoding="utf-8") as f:
                f.write(json.dumps({"iter": iter_num} | record) + "\n")
            if self.tensorboard:
                for name, value in record.items():
                    add = self.tensorboard.add_text if isinstance(value, str) else self.tensorboard.add_scalar
                    add(name, value, iter_num)
            if self.wandb:
                self.wandb.log({"iter": iter_num} | record, step=iter_num)
            if loss_plot and "val/loss" in record:
                plot_losses([out_dir], os.path.join(out_dir, "loss.png"))
        except Exception as e:  # no logger is worth the run
            print0(f"WARNING: could not log ({type(e).__name__}: {first_line(e)})")

    def close(self, exit_code):
        if not self.writes:
            return
        # each of them, even if the one before failed
        with contextlib.suppress(OSError), open(os.path.join(out_dir, "exit_code"), "w") as f:
            f.write(f"{exit_code}\n")
        with contextlib.suppress(Exception):
            if self.tensorboard:
                self.tensorboard.close()
        with contextlib.suppress(Exception):
            if self.wandb:
                self.wandb.finish(exit_code)
        self.lock.release()


# -----------------------------------------------------------------------------
# start and end

out_flag = shlex.quote(f"--out_dir={out_dir}")
resume_command = f"{'torchrun ...' if distributed else 'python'} train.py --init_from=resume {out_flag}"
run = Run()
stop_signal = StopSignal()

# report the checkpoint, data, model and schedule
if inherits:
    print0(f"{'resuming from' if resuming else 'evaluating'} {checkpoint_path} at step {iter_num}")
    if changed:
        print0(f"changed since then: {', '.join(changed)}")
if reset_best:
    print0("best val loss restarts: dataset, block_size or number of evaluation windows changed")
n_params = gpt.get_num_params(raw_model)
n_trained = sum(p.numel() for p in raw_model.parameters() if p.requires_grad)
epochs = (tokens_seen + (max_iters - iter_num) * tokens_per_iter) / len(tokens["train"])
ranks = f", {world_size} ranks" if distributed else ""
print0(f"device:   {device_line}{ranks}" + (", compiled" if compile else ""))
print0(f"data:     {data.folder}, {len(tokens['train']):,} training tokens, {len(tokens['val']):,} validation tokens")
print0(
    f"model:    {n_params / 1e6:.2f}M parameters: {config['n_layer']} layers, {config['n_head']} heads, "
    f"{config['n_embd']} channels"
    + (f"; training {n_trained / 1e6:.2f}M in adapters of {raw_model.lora['base']}" if raw_model.lora else "")
)
if not eval_only:
    batch = f"{gradient_accumulation_steps} x {batch_size} x {block_size}"
    warmup = ", all of them warmup" if decay_lr and 0 < max_iters <= warmup_iters else ""
    print0(f"run:      {max_iters:,} steps of {tokens_per_iter:,} tokens ({batch}), {epochs:.3g} epochs{warmup}")
    decays = decay_lr and lr_schedule != "constant"
    warnings = {
        "min_lr exceeds learning_rate": decays and min_lr > learning_rate,
        "lr_decay_iters <= warmup_iters: no decay": decays and 0 < lr_decay_iters <= warmup_iters < max_iters,
        "lr_decay_iters exceeds max_iters: min_lr is never reached": decays and 0 < max_iters < lr_decay_iters,
    }
    for message, applies in warnings.items():
        if applies:
            print0(f"WARNING: {message}")
if not resuming:
    run.log({"parameters": n_params})
elif iter_num >= max_iters and not eval_only:
    print0(f"this run is finished; to train longer: {resume_command} --max_iters={2 * iter_num}")

try:
    exit_code = train()
except Exception as e:
    # two kinds of errors end a run cleanly: DataError, and any error after a signal, which is its consequence, because
    # Ctrl-C also reaches helper processes, such as the compiler's, whose death raises here
    if not isinstance(e, DataError) and not stop_signal.received:
        raise
    exit_code = 2 if isinstance(e, DataError) else 128 + stop_signal.received
    print(for_terminal(f"{'error' if exit_code == 2 else 'interrupted'}: {first_line(e)}"), file=sys.stderr)
    if use_fsdp:  # a save needs all ranks, but they wait in another collective: leave, and torchrun stops them
        run.pool.shutdown()
        run.close(exit_code)
        configurator.exit_now(exit_code, distributed)
    if distributed:
        dist.destroy_process_group()
    # without the other ranks, save the state after the last whole step
    if run.should_save(iter_num, stopping=True):
        run.save(LATEST)
run.wait()

# how it ended
if exit_code != 3 and run.saved_iter < iter_num:
    exit_code = 1
    print0(f"could not save the state of step {iter_num}")
elif eval_only:
    pass
elif exit_code == 2 and run.saved_iter:
    print0(f"stopped at step {iter_num}: prepare the dataset again, then {resume_command}")
elif exit_code > 128:
    print0(f"stopped at step {iter_num}" + (f"; to continue: {resume_command}" if run.saved_iter else ""))
elif exit_code == 0 and iter_num > 0:
    print0(f"done: {iter_num} steps, best val loss {run.best_val_loss:.4f}; python sample.py {out_flag}")
run.close(exit_code)
if dist.is_initialized():
    dist.barrier()  # a rank that exits while another one saves can bring it down
    dist.destroy_process_group()
configurator.exit_now(exit_code, distributed)
