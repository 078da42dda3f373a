"""Fixtures: a tiny dataset, and the scripts run as a user runs them, in this process or in one of their own."""

import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # the models here are too small to share, and busy machines punish sharing

import torch

from data.documents import Piece, Texts
from data.preparation import OPTIONS, write_dataset
from data.shards import Dataset, train_windows
from data.tokenizer import from_description
from model import GPT, GPTConfig, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, I left\n"


def tensors(x, prefix=""):
    """{path: value} of the leaves of nested dicts and lists."""
    if isinstance(x, (dict, list, tuple)):
        items = x.items() if isinstance(x, dict) else enumerate(x)
        return {k: v for key, value in items for k, v in tensors(value, f"{prefix}/{key}").items()}
    return {prefix: x}


def assert_same_state(a, b):
    """All that decides how training goes on is equal, bit for bit."""
    for part in ("model", "optimizer", "model_args", "iter_num", "best_val_loss", "scaler"):
        left, right = tensors(a[part]), tensors(b[part])
        assert left.keys() == right.keys()
        for key in left:
            same = torch.equal(left[key], right[key]) if torch.is_tensor(left[key]) else left[key] == right[key]
            assert same, f"{part}{key}"


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for variable in ("WANDB_PROJECT", "SAVE_INTERVAL", "MIXED_PRECISION", "TOKENIZER"):
        monkeypatch.delenv(variable, raising=False)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # after eight models in a process it compiles no more


def pytest_collection_modifyitems(items):
    """The longest tests start first: at the end one of them would leave the other worker idle."""
    long = ("compil", "rank", "kill", "fsdp", "disk", "wandb")
    items.sort(key=lambda item: not any(word in item.name for word in long))
    gc.freeze()  # what is imported by now need not be searched for garbage again and again


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a character-level dataset of some thousand tokens."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    pieces = [Piece(TEXT * 40, False, "train"), Piece(TEXT * 5, False, "val")]
    write_dataset(folder, Texts(pieces, "a test"), options(tokenizer="char"))
    return folder


def options(**changed):
    """What prepare_script yields without flags."""
    return SimpleNamespace(**{name: default for name, (default, _) in OPTIONS.items()} | changed)


@pytest.fixture
def tiny_run(tiny, tmp_path):
    """Flags of a training run of a second, without samples of text, and its out_dir."""
    flags = dict(
        dataset=tiny, out_dir=tmp_path / "out", n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4,
        gradient_accumulation_steps=2, dropout=0.1, max_iters=20, lr_decay_iters=20, warmup_iters=2, learning_rate=1e-2,
        eval_interval=10, eval_iters=2, sample_interval=0, device="cpu", dtype="float32", compile=False,
    )  # fmt: skip
    return SimpleNamespace(out=tmp_path / "out", flags=[f"--{k}={v}" for k, v in flags.items()])


@pytest.fixture
def script(capfd, monkeypatch):
    """script("train.py", "--flag=value", ...) runs it in this process: a namespace of code, out and err."""

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGPIPE") if hasattr(signal, name)]
        handlers = {name: signal.getsignal(getattr(signal, name)) for name in names}
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as e:
            code = e.code or 0
        finally:
            for name, handler in handlers.items():
                signal.signal(getattr(signal, name), handler)
            torch.set_grad_enabled(True)
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture
def start_process():
    """start_process("train.py", "--flag=value", ..., env={...}) starts it and returns the Popen; killed at the end."""
    started = []

    def start(*args, env=None, **options):
        command = [sys.executable, *map(str, args)]
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) | options
        environment = {**os.environ, **(env or {})}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **options)
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(OSError):  # and the processes that it started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def train(script):
    def run(flags, *more, code=0):
        result = script("train.py", *flags, *more)
        assert result.code == code, result.err + result.out
        return result

    return run


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """Folder with a checkpoint of a tiny model that has learned its text a little. No dataset is named in it."""
    data = Dataset(tiny)
    stream = data.split("train")
    torch.manual_seed(0)
    model_args = dict(
        n_layer=2, n_head=2, n_embd=32, n_hidden=32, block_size=32, vocab_size=data.vocab_size, bias=False, dropout=0.0
    )
    model = GPT(GPTConfig(**model_args))
    optimizer = model.configure_optimizers(0.0, 1e-2, (0.9, 0.99), "cpu")
    for step in range(400):
        xy = torch.from_numpy(stream.windows(train_windows(len(stream), 32, 0, step * 16, 16), 33))
        model(xy[:, :-1], xy[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("trained")
    state = {"model": model.state_dict(), "model_args": model_args, "tokenizer": data.tokenizer, "iter_num": 200}
    save_checkpoint(state, folder)
    assert from_description(data.tokenizer).vocab_size == data.vocab_size
    return folder


@pytest.fixture
def sample(script, trained):
    def run(*flags, code=0):
        result = script("sample.py", f"--out_dir={trained}", "--device=cpu", "--dtype=float32", *flags)
        assert result.code == code, result.err
        return result

    return run
