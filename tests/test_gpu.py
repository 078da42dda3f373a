"""Acceptance test of a machine with a CUDA GPU: pytest tests/test_gpu.py. Some minutes; -n 4 shares the GPU."""

import math
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import assert_same_state, metrics

from model import (
    GPT,
    LATEST,
    PREVIOUS,
    GPTConfig,
    clip_gradients,
    compile_generation,
    copy_to_cpu,
    quantize,
    read_checkpoint,
    save_checkpoint,
)

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this PyTorch finds no CUDA GPU")

SMALL = dict(block_size=32, vocab_size=64, n_layer=2, n_head=4, n_embd=64)
MODERN = dict(norm="rmsnorm", position="rope", mlp="swiglu", n_kv_head=2, qk_norm=True, bias=False)
EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}  # products in full float32, although train.py allows TF32
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """What earlier tests compiled and counted does not matter."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def run(tiny_run, start_process):
    """run(out_dir, "--flag=value", ..., launcher=(), env={...}, code=0) trains on the GPU; returns what is printed."""

    def train(out, *flags, launcher=(), env=None, code=0):
        flags = ("--n_embd=64", "--block_size=32", f"--device={DEVICE}", f"--out_dir={out}", *flags)
        process = start_process(*launcher, "train.py", *tiny_run.flags, *flags, env=env, stderr=subprocess.STDOUT)
        text, _ = process.communicate(timeout=500)
        assert process.returncode == code, text
        return text

    return train


def losses(folder):
    return [record["loss"] for record in metrics(folder) if "loss" in record]


def small(**settings):
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL | settings)).to(DEVICE)


def random_tokens(model, B, T):
    return torch.randint(model.config.vocab_size, (B, T), device=DEVICE)


def weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def equal(a, b):
    return all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a.keys() | b.keys())


def take_steps(model, dtype, count, muon=False, loss_scale=1024.0):
    """Yield loss and gradient norm of steps on one batch, taken as train.py does."""
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), DEVICE, muon, dtype)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=loss_scale, enabled=dtype == torch.float16)
    X, Y = random_tokens(model, 4, 32), random_tokens(model, 4, 32)
    for _ in range(count):
        with torch.autocast(DEVICE, dtype=dtype):
            _, loss = model(X, Y, return_logits=False)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = clip_gradients(model, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield loss.item(), norm


# ---- train.py


def test_compiled_training_equals_eager_without_recompiling(run, tmp_path):
    flags = ("--dropout=0.0", "--sample_interval=5")
    run(tmp_path / "eager", *flags, env=EXACT)
    logs = {"TORCH_LOGS": "graph_breaks,recompiles"}
    text = run(tmp_path / "compiled", *flags, "--compile=True", env=EXACT | logs)
    assert ", compiled" in text and "[__graph_breaks]" not in text
    # evaluation and training are compiled before the second step
    warmup, training = text.split("iter 1:")
    assert "[__recompiles]" in warmup and "[__recompiles]" not in training
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_deterministic_runs_are_equal(run, tmp_path, compiled):
    flags = ("--deterministic=True", "--dtype=bfloat16", f"--compile={compiled}", "--sample_interval=5")
    for name in ("a", "b"):
        assert "step 5 sample:" in run(tmp_path / name, *flags)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert_same_state(*(read_checkpoint(tmp_path / name / LATEST) for name in ("a", "b")))


def test_deterministic_run_resumes_exactly(run, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    flags = ("--deterministic=True", "--dtype=bfloat16", "--compile=True")
    run(whole, *flags)
    run(halves, *flags, "--max_iters=10")
    # the uninterrupted run saved step 10 in the background, while it trained on
    background, stopped = read_checkpoint(whole / PREVIOUS), read_checkpoint(halves / LATEST)
    assert background["iter_num"] == stopped["iter_num"] == 10 and equal(background["model"], stopped["model"])
    run(halves, *flags, "--init_from=resume")
    assert_same_state(read_checkpoint(whole / LATEST), read_checkpoint(halves / LATEST))


@pytest.mark.parametrize("fsdp", [False, True])
def test_distributed_training_equals_one_process(run, tmp_path, fsdp):
    run(tmp_path / "one", "--dropout=0.0", env=EXACT)
    flags = ("--dropout=0.0", "--compile=True", f"--fsdp={fsdp}")
    assert "1 ranks, compiled" in run(tmp_path / "ranks", *flags, launcher=TORCHRUN, env=EXACT)
    assert losses(tmp_path / "ranks") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_lack_of_memory_is_one_line(run, tmp_path):
    # the embeddings of a micro-batch take 512 GiB
    flags = ("--batch_size=131072", "--block_size=512", "--n_embd=2048", "--n_layer=1", "--eval_iters=1")
    text = run(tmp_path / "out", *flags, code=2)
    errors = [line for line in text.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error: out of memory (CUDA out of memory. Tried to allocate 512")
    assert "lower --batch_size" in errors[0] and "Traceback" not in text


# ---- model.py


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_qk_norm_trains_under_autocast(norm, position, dtype):
    model = small(norm=norm, position=position, qk_norm=True)
    steps = list(take_steps(model, dtype, 20))
    assert all(math.isfinite(x) for step in steps for x in step)
    assert steps[-1][0] < steps[0][0] - 0.5


def test_muon_skips_steps_that_overflow_in_float16():
    model, steps = small(), []
    before = weights(model)
    for loss, norm in take_steps(model, torch.float16, 50, muon=True, loss_scale=2.0**30):
        after = weights(model)
        assert equal(before, after) != math.isfinite(norm)
        before = after
        steps.append((loss, norm))
    assert not math.isfinite(steps[0][1]) and math.isfinite(steps[-1][1])
    assert steps[-1][0] < steps[0][0] - 0.5


def test_background_save_has_the_weights_of_its_step(tmp_path):
    model = small()
    expected = weights(model)
    with ThreadPoolExecutor(1) as pool:
        copies = copy_to_cpu({"model": model.state_dict(keep_vars=True)})
        saving = pool.submit(save_checkpoint, copies, tmp_path, LATEST)
        list(take_steps(model, torch.bfloat16, 5))
    assert saving.exception() is None
    saved = torch.load(tmp_path / LATEST)["model"]
    assert equal(saved, expected) and not equal(saved, weights(model))


@pytest.mark.parametrize("settings", [{}, MODERN])
@torch.no_grad()
def test_compiled_generation_captures_one_cuda_graph(settings, monkeypatch):
    model = small(**settings).eval()
    for p in model.parameters():  # larger weights than at initialization, so that no two tokens are equally likely
        p += 0.1 * torch.randn_like(p)
    prompts = [random_tokens(model, 3, 4) for _ in range(3)]
    # the context fills up, so that the caches are made anew in each generation
    expected = [model.generate(prompt, 60, temperature=0, slide=8) for prompt in prompts]
    compile_generation(model)
    capture, graphs = torch.cuda.graph, []
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graphs.append(graph) or capture(graph))
    for prompt, text in zip(prompts, expected, strict=True):
        assert model.generate(prompt, 60, temperature=0, slide=8).tolist() == text.tolist()
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_int8_weights_give_close_logits(dtype):
    model = small(**MODERN).to(dtype).eval()
    idx = random_tokens(model, 3, 32)
    expected, _ = model(idx, idx)
    quantize(model)
    logits, _ = model(idx, idx)
    assert 0 < (logits - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("compiled", [False, True])
def test_fused_loss_needs_less_memory_than_full_logits(compiled):
    model = small(vocab_size=50304, block_size=1024)
    X, Y = random_tokens(model, 16, 1024), random_tokens(model, 16, 1024)
    if compiled:
        model.compile(dynamic=False)
    peaks = []
    for return_logits in (False, True):
        for _ in range(2):  # the first time it is compiled
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                _, loss = model(X, Y, return_logits=return_logits)
            loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] < peaks[1]
