import ast
import functools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same_state, metrics, options, tensors

from data.shards import DataError, FolderLock, Tokens
from model import (
    BEST,
    GPT,
    LATEST,
    PREVIOUS,
    GPTConfig,
    from_checkpoint,
    load_checkpoint,
    load_optimizer_state,
    load_training_state,
    read_checkpoint,
    save_checkpoint,
)


@pytest.fixture(scope="module")
def finished_folder(tmp_path_factory):
    """Where the first test that needs a finished run leaves a copy for the others."""
    return tmp_path_factory.mktemp("finished") / "out"


@pytest.fixture
def finished(train, tiny_run, finished_folder):
    """A finished run of 20 steps in tiny_run.out: its last state."""
    if finished_folder.exists():
        shutil.copytree(finished_folder, tiny_run.out)
    else:
        train(tiny_run.flags)
        shutil.copytree(tiny_run.out, finished_folder)
    return read_checkpoint(tiny_run.out / LATEST)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_run_equals_uninterrupted_run(train, tiny_run, tmp_path, dtype):
    flags = [*tiny_run.flags, f"--dtype={dtype}", "--eval_interval=5"]
    train(flags)
    halves = f"--out_dir={tmp_path / 'halves'}"
    train(flags, halves, "--max_iters=10")
    train(flags, halves, "--init_from=resume")
    whole, resumed = read_checkpoint(tiny_run.out / LATEST), read_checkpoint(tmp_path / "halves" / LATEST)
    assert_same_state(whole, resumed)
    strip = lambda rows: [{k: v for k, v in r.items() if k not in ("tokens_per_second", "mfu")} for r in rows]  # noqa: E731
    whole, resumed = strip(metrics(tiny_run.out)), strip(metrics(tmp_path / "halves"))
    assert [r for r in whole if "loss" in r] == [r for r in resumed if "loss" in r]
    # the shorter run evaluated at its end, as the longer one does at every fifth step
    assert [r["val/loss"] for r in whole if "val/loss" in r] == [r["val/loss"] for r in resumed if "val/loss" in r]


def test_resume_needs_only_out_dir(train, tiny_run, finished, tmp_path):
    again = tmp_path / "again"
    train(tiny_run.flags, f"--out_dir={again}", "--max_iters=7")
    train([], f"--out_dir={again}", "--init_from=resume", "--max_iters=20", "--device=cpu")
    assert_same_state(finished, read_checkpoint(again / LATEST))
    # the evaluation at the end of the shorter run is not repeated, and kept
    assert [r["iter"] for r in metrics(again) if "val/loss" in r] == [0, 7, 10, 20]
    assert [r["iter"] for r in metrics(again) if "loss" in r] == list(range(20))


def test_auto_starts_and_then_resumes(train, tiny_run, finished, tmp_path):
    flags = [*tiny_run.flags, f"--out_dir={tmp_path / 'auto'}", "--init_from=auto"]
    train(flags, "--max_iters=8")
    assert "resuming" in train(flags).out
    assert_same_state(finished, read_checkpoint(tmp_path / "auto" / LATEST))


def test_moved_run_resumes_in_its_new_folder(train, tiny_run, finished, tmp_path):
    moved = tiny_run.out.rename(tmp_path / "moved")
    train([], f"--out_dir={moved}", "--init_from=resume", "--max_iters=22", "--device=cpu")
    assert read_checkpoint(moved / LATEST)["iter_num"] == 22 and not tiny_run.out.exists()


def test_config_file_overrides_saved_settings_even_with_defaults(train, tiny_run, finished, tmp_path):
    config = tmp_path / "config.py"
    config.write_text("always_save_checkpoint = True\nweight_decay = 1e-1\n")
    flags = [f for f in tiny_run.flags if "decay=" not in f]
    train(flags, "--always_save_checkpoint=False", "--weight_decay=0.3")
    train([], config, f"--out_dir={tiny_run.out}", "--init_from=resume", "--max_iters=21", "--device=cpu")
    state = read_checkpoint(tiny_run.out / LATEST)
    assert state["config"]["always_save_checkpoint"] is True and state["config"]["weight_decay"] == 0.1


def test_corrupt_metrics_do_not_stop_a_resume(train, tiny_run, finished):
    path = tiny_run.out / "metrics.jsonl"
    path.write_bytes(b'\xff\xfe\nnot json\n[1]\n{"loss": 1}\n' + path.read_bytes()[:-9])
    train(tiny_run.flags, "--init_from=resume", "--max_iters=22")
    rows = [r["iter"] for r in metrics(tiny_run.out) if "loss" in r]
    assert rows == list(range(22))


def as_nanogpt(state):
    """A checkpoint as nanoGPT writes it after torch.compile on a GPU in float16."""
    settings = {**state["config"], "device": "cuda", "dtype": "float16", "backend": "nccl"}
    for key in ("save_interval", "lr_schedule", "wsd_decay_frac", "seed", "deterministic"):
        del settings[key]
    return {
        "model": {"_orig_mod." + k: v for k, v in state["model"].items()},
        "optimizer": {
            **state["optimizer"],
            "param_groups": [{**g, "fused": None} for g in state["optimizer"]["param_groups"]],
        },
        "model_args": state["model_args"],
        "iter_num": state["iter_num"],
        "best_val_loss": torch.tensor(state["best_val_loss"]),
        "config": settings,
    }


def test_nanogpt_checkpoint_resumes(train, tiny_run, finished, tmp_path):
    train(tiny_run.flags, "--max_iters=10", "--always_save_checkpoint=False")
    torch.save(as_nanogpt(read_checkpoint(tiny_run.out / LATEST)), tiny_run.out / LATEST)
    result = train(
        [], f"--out_dir={tiny_run.out}", "--init_from=resume", "--max_iters=20", "--device=cpu", "--dtype=float32"
    )
    assert "at step 10" in result.out
    expected, state = finished["model"], read_checkpoint(tiny_run.out / LATEST)["model"]
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_float16_skips_overflows_and_resumes_its_scale(train, tiny_run, finished, tmp_path, monkeypatch):
    import configurator

    flags = [*tiny_run.flags, f"--out_dir={tmp_path / 'half'}"]
    with monkeypatch.context() as patch:  # a CPU is not offered float16, but its loss scaling is a GPU's
        patch.setattr(configurator, "pick_device", lambda device, dtype: ("cpu", "float16", "cpu, dtype float16"))
        patch.setattr("model.peak_flops", lambda device, dtype: (None, "half a minute of products"))
        patch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**24))
        train(flags)
        whole = read_checkpoint(tmp_path / "half" / LATEST)
        assert 1 < whole["scaler"]["scale"] < 2**24  # it overflowed at first
        train(flags, "--max_iters=10")
        train(flags, "--init_from=resume")
        assert_same_state(whole, read_checkpoint(tmp_path / "half" / LATEST))
        train(tiny_run.flags, "--init_from=resume", "--max_iters=22")  # a float32 run has no scale


def test_gradient_checkpointing_gives_equal_weights(train, tiny_run, finished, tmp_path, monkeypatch):
    import model

    calls, real = [], model.recompute
    monkeypatch.setattr(model, "recompute", lambda *a, **k: calls.append(torch.is_grad_enabled()) or real(*a, **k))
    train(tiny_run.flags, f"--out_dir={tmp_path / 'less'}", "--gradient_checkpointing")
    assert sum(calls) == 20 * 2 * 2  # steps, micro-batches, layers; evaluations have no gradients
    assert_same_state(finished, read_checkpoint(tmp_path / "less" / LATEST))


def test_modern_run_with_muon_resumes_exactly(train, tiny_run, tmp_path):
    flags = [
        *tiny_run.flags,
        ROOT / "config" / "modern.py",
        "--qk_norm",
        "--n_hidden=40",
        "--muon",
        "--muon_momentum=0.9",
    ]
    train(flags)
    halves = f"--out_dir={tmp_path / 'halves'}"
    train(flags, halves, "--max_iters=10")
    train([], halves, "--init_from=resume", "--max_iters=20", "--device=cpu")
    whole = read_checkpoint(tiny_run.out / LATEST)
    assert_same_state(whole, read_checkpoint(tmp_path / "halves" / LATEST))
    assert whole["optimizer"]["param_groups"][2]["momentum"] == 0.9
    assert whole["model_args"]["norm"] == "rmsnorm" and whole["model_args"]["n_kv_head"] == 1
    for changed, message in (
        ("--mlp=relu2", "--mlp=relu2 was given, but the model of "),
        ("--muon=False", "the optimizer state does not match this model and optimizer"),
    ):
        assert message in train(flags, halves, "--init_from=resume", changed, code=2).err


def test_zero_init_starts_with_blocks_that_add_nothing(train, tiny_run):
    train(tiny_run.flags, "--zero_init", "--learning_rate=0.0", "--decay_lr=False", "--max_iters=1")
    checkpoint = read_checkpoint(tiny_run.out / LATEST)
    model = from_checkpoint(checkpoint).eval()
    idx = torch.arange(8)[None] % model.config.vocab_size
    embeddings = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(8))
    torch.testing.assert_close(model(idx)[0], model.lm_head(model.transformer.ln_f(embeddings))[:, -1:])
    assert all(p.any() for name, p in model.named_parameters() if "c_proj" not in name and "bias" not in name)


def test_dropout_is_on_after_an_evaluation(train, tiny_run):
    losses = []
    for dropout in (0.0, 0.5):
        train(tiny_run.flags, f"--dropout={dropout}", "--learning_rate=0.0", "--decay_lr=False", "--max_iters=3")
        losses.append([r["loss"] for r in metrics(tiny_run.out) if "loss" in r])
    assert all(a != b for a, b in zip(*losses, strict=True))


def test_given_settings_override_saved_ones_and_are_named(train, tiny_run, finished):
    result = train(tiny_run.flags, "--init_from=resume", "--weight_decay=0.5", "--max_iters=21")
    assert "changed since then: max_iters 20 -> 21, weight_decay 0.1 -> 0.5" in result.out
    state = read_checkpoint(tiny_run.out / LATEST)
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.5 and state["iter_num"] == 21


def test_evaluating_and_saving_do_not_disturb_training(train, tiny_run, finished, tmp_path):
    train(tiny_run.flags, f"--out_dir={tmp_path / 'b'}", "--eval_interval=3", "--save_interval=4", "--log_interval=7")
    assert_same_state(finished, read_checkpoint(tmp_path / "b" / LATEST))


def test_new_run_moves_the_earlier_one(train, tiny_run, finished):
    result = train(tiny_run.flags, "--seed=1", "--max_iters=3")
    assert "moved the earlier run" in result.out
    assert_same_state(finished, read_checkpoint(tiny_run.out / "previous-1" / LATEST))
    train(tiny_run.flags, "--seed=2", "--max_iters=0")
    assert_same_state(finished, read_checkpoint(tiny_run.out / "previous-1" / LATEST))
    train(tiny_run.flags, "--seed=1", "--max_iters=3")
    assert len(metrics(tiny_run.out / "previous-3")) == 2  # a run that ended before its first save
    assert len(metrics(tiny_run.out)) == 6 and read_checkpoint(tiny_run.out / LATEST)["iter_num"] == 3


def test_init_from_checkpoint_starts_with_its_weights(train, tiny_run, finished, tmp_path):
    for source in (tiny_run.out / LATEST, tiny_run.out):
        flags = [*tiny_run.flags, f"--out_dir={tmp_path / 'tuned'}", f"--init_from={source}"]
        name = LATEST if source.is_file() else BEST
        before = read_checkpoint(tiny_run.out / name)["model"]
        train(flags, "--max_iters=1", "--learning_rate=0.0", "--weight_decay=0.0", "--decay_lr=False", "--block_size=8")
        after = read_checkpoint(tmp_path / "tuned" / LATEST)
        assert after["iter_num"] == 1 and after["model_args"]["block_size"] == 8
        for key, value in after["model"].items():
            assert torch.equal(value, before[key][:8] if "wpe" in key else before[key]), key


def test_best_and_latest(train, tiny_run, finished):
    rows = [r for r in metrics(tiny_run.out) if "val/loss" in r]
    best = read_checkpoint(tiny_run.out / BEST)
    assert best["best_val_loss"] == min(r["val/loss"] for r in rows) and "optimizer" not in best
    assert finished["iter_num"] == 20 and read_checkpoint(tiny_run.out / PREVIOUS)["iter_num"] == 10


def test_only_new_best_is_saved_without_always_save_checkpoint(train, tiny_run):
    # the rate makes the loss worse from the first step on
    flags = ["--always_save_checkpoint=False", "--learning_rate=50.0", "--decay_lr=False", "--eval_interval=2"]
    train(tiny_run.flags, *flags, "--max_iters=6")
    assert not (tiny_run.out / BEST).exists() and not (tiny_run.out / PREVIOUS).exists()
    assert read_checkpoint(tiny_run.out / LATEST)["iter_num"] == 6  # the end is saved all the same


def test_checkpoint_has_plain_values_and_nanogpt_keys(finished):
    assert {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"} <= set(finished)
    assert set(finished["model_args"]) == {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    plain = (torch.Tensor, int, float, bool, str, type(None))
    assert all(isinstance(v, plain) for v in tensors(finished).values())
    assert not any(key.startswith(("_orig_mod", "module")) for key in finished["model"])


def test_eval_only_is_repeatable_and_writes_nothing(train, tiny_run, finished):
    files = {p: p.read_bytes() for p in tiny_run.out.iterdir()}
    outs = [train(tiny_run.flags, "--init_from=resume", "--eval_only").out for _ in range(2)]
    best = train([], f"--init_from={tiny_run.out / BEST}", "--eval_only", "--device=cpu").out
    assert re.search(r"val loss [\d.]+", best)[0] == re.search(r"val loss [\d.]+", outs[0])[0]  # the last is the best
    assert outs[0] == outs[1] and {p: p.read_bytes() for p in tiny_run.out.iterdir()} == files
    match = re.search(r"step 20: .* val loss ([\d.]+), perplexity ([\d.]+), ([\d.]+) bits per byte", outs[0])
    loss, perplexity, bits = map(float, match.groups())
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-2) and bits == pytest.approx(loss / math.log(2), rel=1e-3)
    assert loss == pytest.approx([r["val/loss"] for r in metrics(tiny_run.out) if "val/loss" in r][-1], abs=1e-4)


def test_accumulated_micro_batches_equal_one_large_batch(train, tiny_run, tmp_path):
    runs = []
    for accumulation, batch in ((4, 2), (1, 8)):
        out = tmp_path / f"a{accumulation}"
        sizes = [f"--gradient_accumulation_steps={accumulation}", f"--batch_size={batch}", "--dropout=0.0"]
        train(tiny_run.flags, *sizes, f"--out_dir={out}")
        runs.append([r["loss"] for r in metrics(out) if "loss" in r])
    assert runs[0] == pytest.approx(runs[1], abs=1e-4) and runs[0][-1] < runs[0][0] - 0.5


def test_learning_rate_schedules():
    tree = ast.parse((ROOT / "train.py").read_text())
    get_lr = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "get_lr")
    lr = {}
    for name in ("cosine", "linear", "constant", "wsd"):
        scope = dict(
            math=math, decay_lr=True, lr_schedule=name, learning_rate=1.0, min_lr=0.1, warmup_iters=10,
            lr_decay_iters=110, wsd_decay_frac=0.2,
        )  # fmt: skip
        exec(ast.unparse(get_lr), scope)
        lr[name] = [scope["get_lr"](it) for it in range(130)]
        assert lr[name][:11] == pytest.approx([(i + 1) / 11 for i in range(10)] + [1.0])
    for name in ("cosine", "linear"):
        assert lr[name][60] == pytest.approx(0.55) and lr[name][110:] == [0.1] * 20
    assert lr["cosine"][35] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert lr["linear"][35] == pytest.approx(0.775)
    assert lr["constant"][10:] == [1.0] * 120
    assert lr["wsd"][10:89] == [1.0] * 79 and lr["wsd"][99] == pytest.approx(0.55) and lr["wsd"][110:] == [0.1] * 20


def test_schedule_reaches_the_optimizer(train, tiny_run):
    train(tiny_run.flags, "--decay_lr=False", "--learning_rate=0.003")
    assert {r["lr"] for r in metrics(tiny_run.out) if "lr" in r} == {0.003}
    train(tiny_run.flags, "--lr_schedule=linear", "--min_lr=0.001", "--learning_rate=0.003", "--lr_decay_iters=12")
    rows = [r["lr"] for r in metrics(tiny_run.out) if "lr" in r]
    assert rows[:3] == pytest.approx([0.001, 0.002, 0.003]) and rows[12:] == [0.001] * 8


def test_resume_with_another_batch_size_continues_the_windows(train, tiny_run, monkeypatch):
    import data.shards

    visited, train_windows = [], data.shards.train_windows

    def recorded(n_tokens, block_size, seed, first, count, packed):
        visited.extend(range(first, first + count))
        return train_windows(n_tokens, block_size, seed, first, count, packed)

    monkeypatch.setattr(data.shards, "train_windows", recorded)
    train(tiny_run.flags, "--max_iters=10")  # 2 x 4 sequences per step
    train(tiny_run.flags, "--max_iters=12", "--batch_size=8", "--init_from=resume")
    train(tiny_run.flags, "--max_iters=15", "--batch_size=3", "--gradient_accumulation_steps=1", "--init_from=resume")
    assert visited == list(range(10 * 8 + 2 * 16 + 3 * 3))
    tokens = [record["tokens"] for record in metrics(tiny_run.out) if "tokens" in record]
    assert len(tokens) == 15 and tokens[-1] == 16 * len(visited)


def test_resume_on_other_data_starts_a_new_best(train, tiny_run, finished, tmp_path):
    from data.documents import Piece, Texts
    from data.preparation import write_dataset

    # text without order, whose loss is higher
    characters = finished["tokenizer"]["characters"]
    text = "".join(np.random.default_rng(0).choice(list(characters), 3000))
    pieces = [Piece(characters + text, False, "train"), Piece(text[:1000], False, "val")]
    write_dataset(str(tmp_path / "other"), Texts(pieces, "a test"), options(tokenizer="char"))
    flags = [f"--dataset={tmp_path / 'other'}", "--init_from=resume", "--max_iters=24", "--eval_interval=2"]
    assert "best val loss restarts" in train(tiny_run.flags, *flags).out
    best = read_checkpoint(tiny_run.out / BEST)
    assert best["iter_num"] > 20 and best["best_val_loss"] > finished["best_val_loss"]
    assert read_checkpoint(tiny_run.out / "previous-1" / BEST)["iter_num"] <= 20


def test_decay_ends_with_the_run_unless_it_is_set(train, tiny_run, tmp_path):
    flags = [flag for flag in tiny_run.flags if not flag.startswith("--lr_decay_iters")]
    lr = lambda folder: [record["lr"] for record in metrics(folder) if "lr" in record]  # noqa: E731
    train(flags, f"--out_dir={tmp_path / 'whole'}")
    train(flags, "--max_iters=10")
    assert lr(tiny_run.out)[9] < lr(tmp_path / "whole")[9]
    resumed = train(flags, "--init_from=resume")
    assert lr(tiny_run.out)[10:] == lr(tmp_path / "whole")[10:] and "WARNING" not in resumed.out
    again = train(flags, "--init_from=resume")
    assert "this run is finished" in again.out and "--max_iters=40" in again.out


def test_limits_of_settings_are_accepted(train, tiny_run):
    train(tiny_run.flags, "--beta1=0", "--min_lr=0", "--lr_schedule=wsd", "--wsd_decay_frac=1.0", "--max_iters=3")
    train(tiny_run.flags, "--lr_schedule=wsd", "--wsd_decay_frac=1e-320", "--max_iters=3")


def test_diverged_run_stops_before_the_update(train, tiny_run):
    flags = ["--learning_rate=1e30", "--decay_lr=False", "--grad_clip=0.0", "--save_interval=1", "--dropout=0.0"]
    result = train(tiny_run.flags, *flags, code=3)
    assert "diverged, no update was made" in result.out
    step = int(re.search(r"^step (\d+): loss", result.out, re.M)[1])
    state = read_checkpoint(tiny_run.out / LATEST)
    assert state["iter_num"] == step  # saved before the step that failed
    assert all(torch.isfinite(v).all() for v in state["model"].values())


# ---- signals and kills


def wait_for_line(process, pattern):
    """Read the process's output up to a line that matches."""
    for line in process.stdout:
        if re.search(pattern, line):
            return line
    raise AssertionError(f"it ended without {pattern!r}: {process.stderr.read()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
def test_signal_finishes_the_step_and_saves(train, tiny_run, finished, start_process, tmp_path, number):
    out = f"--out_dir={tmp_path / 'stopped'}"
    process = start_process("train.py", *tiny_run.flags, out, "--max_iters=1000000")
    wait_for_line(process, r"^iter 3:")
    process.send_signal(number)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "--init_from=resume" in rest and "Traceback" not in err
    assert "finishing the step" in err
    state = read_checkpoint(tmp_path / "stopped" / LATEST)
    assert f"stopped at step {state['iter_num']}" in rest
    steps = max(20, state["iter_num"] + 1)
    for folder, begin in ((out, "resume"), (f"--out_dir={tmp_path / 'whole'}", "scratch")):
        train(tiny_run.flags, folder, f"--init_from={begin}", f"--max_iters={steps}")
    assert_same_state(read_checkpoint(tmp_path / "whole" / LATEST), read_checkpoint(tmp_path / "stopped" / LATEST))


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile with")
def test_ctrl_c_during_compilation_saves(tiny_run, start_process, tmp_path):
    # a terminal signals the whole process group, with the compilers in it
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = start_process("train.py", *tiny_run.flags, "--compile=True", "--n_layer=1", env=env)
    wait_for_line(process, r"^run:")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    os.killpg(process.pid, signal.SIGINT)
    rest, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err and "stopped at step" in rest, err
    assert (tiny_run.out / "exit_code").read_text() == "130\n"


def test_exception_after_a_signal_is_that_stop(train, tiny_run, finished, tmp_path, monkeypatch):
    forward, calls = GPT.forward, iter(range(10**6))

    def interrupted(self, *args, **options):
        if self.training and next(calls) == 14:  # two micro-batches per step
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("the compiler was interrupted")
        return forward(self, *args, **options)

    out = f"--out_dir={tmp_path / 'stopped'}"
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "forward", interrupted)
        result = train(tiny_run.flags, out, "--eval_interval=1000", code=130)
    assert "stopped at step 7; to continue" in result.out and "Traceback" not in result.err
    train(tiny_run.flags, out, "--init_from=resume")
    assert_same_state(finished, read_checkpoint(tmp_path / "stopped" / LATEST))


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc to see what is imported")
@pytest.mark.parametrize("name", ["train.py", "sample.py", "bench.py"])
def test_ctrl_c_during_the_import_of_torch_is_quiet(start_process, name):
    process = start_process(name, "--device=cpu")
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


def test_run_survives_kill_9_at_any_moment(train, tiny_run, tmp_path, start_process):
    # small batches and many weights: nearly all of the time goes into saves, and with it nearly every kill
    flags = [*tiny_run.flags, "--batch_size=1", "--gradient_accumulation_steps=1", "--n_embd=256"]
    flags += ["--max_iters=60", "--log_interval=30", "--eval_interval=30"]
    train(flags)
    folder = tmp_path / "killed"
    kills = reached = 0
    while True:
        process = start_process("train.py", *flags, f"--out_dir={folder}", "--init_from=auto", "--save_interval=1")
        try:
            wait_for_line(process, r"^run:" if reached else r"^iter 0:")
            process.communicate(timeout=0.1 + 0.1 * kills if kills < 4 else 120)
            assert process.returncode == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            if not reached and not list(folder.glob("ckpt*.pt")):  # a disk that took its time over the first save
                continue
            state, _ = load_checkpoint(folder)
            assert state["iter_num"] >= reached
            reached = state["iter_num"]
    assert kills >= 3
    assert_same_state(read_checkpoint(tiny_run.out / LATEST), read_checkpoint(folder / LATEST))
    assert [r["iter"] for r in metrics(folder) if "loss" in r] == [0, 30]


def test_checkpoint_survives_kill_at_any_rename(tmp_path, monkeypatch):
    state = {"model": {}, "model_args": {}, "iter_num": 0}
    for name in (LATEST, BEST):
        for killed_at in range(3):
            folder = tmp_path / f"{name}{killed_at}"
            folder.mkdir()
            for i in (1, 2):
                save_checkpoint({**state, "iter_num": i}, folder, name)
            calls = iter(range(9))

            def replace(a, b, real=os.replace, calls=calls, killed_at=killed_at):
                if next(calls) == killed_at:
                    raise KeyboardInterrupt
                real(a, b)

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", replace)
                try:
                    save_checkpoint({**state, "iter_num": 3}, folder, name)
                except KeyboardInterrupt:
                    pass
            found, _ = load_checkpoint(folder, (name, PREVIOUS))
            assert found["iter_num"] in (2, 3)


@pytest.mark.parametrize("processes", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")])
def test_full_disk_keeps_the_checkpoint_and_the_run(train, tiny_run, start_process, processes):
    resource = pytest.importorskip("resource")

    def limit():  # files can grow to 100 kB, as if that were all the space
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    train(tiny_run.flags, "--max_iters=5", "--n_embd=32")
    before = (tiny_run.out / LATEST).read_bytes()
    assert len(before) > 100_000
    flags = (*tiny_run.flags, "--n_embd=32", "--init_from=resume", f"--fsdp={bool(processes)}")
    process = start_process(*processes, "train.py", *flags, preexec_fn=limit)
    out, err = process.communicate()
    assert process.returncode == 1 and (processes or "Traceback" not in err)  # torchrun shows one of its own
    assert "could not write" in out and "iter 19:" in out and "could not save the state of step 20" in out
    assert (tiny_run.out / LATEST).read_bytes() == before and not list(tiny_run.out.glob("*.tmp"))


def test_log_on_a_full_disk_does_not_end_the_run(train, tiny_run, start_process):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        process = start_process("train.py", *tiny_run.flags, "--max_iters=3", stdout=full)
        assert process.wait() == 0 and "Traceback" not in process.stderr.read()
    assert read_checkpoint(tiny_run.out / LATEST)["iter_num"] == 3


# ---- damaged and hostile files


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "truncated":
        raw = raw[: len(raw) // 2]
    elif how == "empty":
        raw = b""
    else:
        raw[len(raw) // 2] ^= 16  # in the middle lies a tensor: torch.load itself does not see it
    path.write_bytes(raw)


@pytest.mark.parametrize("how", ["truncated", "empty", "bit-flipped"])
def test_corrupt_latest_falls_back_to_previous(train, tiny_run, finished, how):
    damage(tiny_run.out / LATEST, how)
    result = train(tiny_run.flags, "--init_from=auto")
    assert f"{LATEST} is corrupt" in result.err and f"resuming from {tiny_run.out / PREVIOUS} at step 10" in result.out
    assert_same_state(finished, read_checkpoint(tiny_run.out / LATEST))
    assert (tiny_run.out / (LATEST + ".corrupt")).exists()


def test_corrupt_token_stops_the_run_with_a_save(train, tiny_run, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("data.shards.CHECKED", 1 << 20)
    folder = shutil.copytree(tiny, tmp_path / "damaged")
    (folder / "meta.json").write_text(json.dumps({"vocab_size": 32, "dtype": "uint16"}))
    good = np.arange((1 << 20) + 90_000, dtype="<u2") % 30
    bad = good.copy()
    bad[(1 << 20) + 60_000 :] = 999  # past what is looked at before the run, and past all evaluations
    bad.tofile(folder / "train.bin")
    flags = [*tiny_run.flags, f"--dataset={folder}", "--max_iters=30", "--seed=5"]
    result = train(flags, code=2)
    step = int(re.search(r"stopped at step (\d+)", result.out)[1])
    assert "train.bin has token id 999" in result.err and step == 6
    assert read_checkpoint(tiny_run.out / LATEST)["iter_num"] == step
    good.tofile(folder / "train.bin")
    train(flags, "--init_from=resume")
    train(flags, f"--out_dir={tmp_path / 'whole'}")
    assert_same_state(read_checkpoint(tmp_path / "whole" / LATEST), read_checkpoint(tiny_run.out / LATEST))
    bad[:] = 999
    bad.tofile(folder / "val.bin")
    bad.tofile(folder / "train.bin")
    assert "vocabulary ends at 31" in train(flags, "--init_from=resume", code=2).err


def test_compressed_checkpoint_is_refused(tmp_path):
    torch.save({"model": {"w": torch.ones(1000)}, "model_args": {}}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as a, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as b:
        for entry in a.infolist():
            b.writestr(entry.filename, a.read(entry))
    assert read_checkpoint(tmp_path / "a.pt", mmap=True)["model"]["w"].sum() == 1000
    for mmap in (False, True):
        with pytest.raises(ValueError, match="it is compressed"):
            read_checkpoint(tmp_path / "b.pt", mmap)


def test_flipped_bits_are_found_or_harmless(tmp_path):
    weights = {"w": torch.arange(300.0)}
    save_checkpoint({"model": weights, "model_args": {"n_layer": 3}}, tmp_path)
    raw, found = (tmp_path / LATEST).read_bytes(), 0
    for position in range(0, len(raw), 7):
        (tmp_path / LATEST).write_bytes(raw[:position] + bytes([raw[position] ^ 4]) + raw[position + 1 :])
        try:
            state = read_checkpoint(tmp_path / LATEST)
            assert torch.equal(state["model"]["w"], weights["w"]) and state["model_args"] == {"n_layer": 3}
        except ValueError:
            found += 1
    assert found > 1200 / 7  # all of the tensor's bytes at least


def test_pickled_code_in_a_checkpoint_does_not_run(script, tiny_run, tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "it ran"), "w")

    tiny_run.out.mkdir()
    path = tiny_run.out / LATEST
    for write in (
        lambda: torch.save({"model": Hostile(), "model_args": {}}, path),
        lambda: path.write_bytes(pickle.dumps(Hostile())),
    ):
        write()
        for name, flags in (
            ("train.py", [*tiny_run.flags, "--init_from=resume"]),
            ("train.py", [*tiny_run.flags, f"--init_from={path}"]),
            ("sample.py", [f"--out_dir={tiny_run.out}"]),
        ):
            result = script(name, *flags)
            assert result.code == 2 and "error: " in result.err and "Traceback" not in result.err
    assert not (tmp_path / "it ran").exists()


# ---- wrong input


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset=nowhere"], "no dataset in data/nowhere; prepare the dataset: python data/text/prepare.py FILE"),
        (["--dataset=shakespear_char"], "prepare the dataset: python data/shakespeare_char/prepare.py"),
        (["--batch_size=0"], "--batch_size must be at least 1, got 0"),
        (["--learning_rate=-1.0"], "--learning_rate must be at least 0, got -1.0"),
        (["--min_lr=-1e-3"], "--min_lr must be at least 0"),
        (["--lr_decay_iters=-5"], "--lr_decay_iters must be at least 0"),
        (["--dataset=data/shakespeare_char"], "try --dataset=shakespeare_char"),
        (["config/"], "did you mean config/eval_gpt2.py"),
        (["out-x"], "did you mean --out_dir=out-x?"),
        (["--n_head=3"], "n_embd (16) must be a multiple of n_head (3)"),
        (["--dropout=1.5"], "dropout probability has to be between 0 and 1"),
        (["--block_size=100000"], "use more text, or --block_size="),
        (["--n_embd=2000000000000"], "parameters: lower them"),
        (["--beta1=1.5"], "Invalid beta parameter"),
        (["--lr_schedule=sine"], "--lr_schedule must be one of cosine"),
        (["--init_from=resume"], "no checkpoint in"),
        (["--init_from=nowhere.pt"], "No such file or directory: nowhere.pt"),
        (["--init_from=gtp2"], "init_from must be resume, a checkpoint"),
        (["--device=cuda:77"], "GPU"),
        (["--dtype=float8"], "--dtype must be one of"),
        (["config/nothing.py"], "no config file config/nothing.py"),
        (["--n_laier=3"], "did you mean n_layer?"),
        (["--out_dir=/dev/null/x"], "Not a directory"),
        (["--out_dir="], "No such file or directory: ''"),
        (["--batch_size=1000000000000"], "too many tokens"),
        (["--n_layer=1000000000000"], "parameters: lower them"),
        (["--max_iters=1e30"], "max_iters is too large"),
        (["--device=cpu:99"], "--device must be"),
        (["--fsdp"], "torchrun --standalone --nproc_per_node=8 train.py"),
    ],
)
def test_wrong_input_is_one_line(script, tiny_run, flags, message):
    result = script("train.py", *tiny_run.flags, *flags)
    assert result.code == 2 and message in result.err
    lines = [line for line in result.err.splitlines() if not line.startswith("settings:")]
    assert len(lines) == 1 and lines[0].startswith("error: ")


def test_unprepared_dataset_names_the_command(script):
    if any((ROOT / "data" / "pydocs_char").glob("*.bin")):
        pytest.skip("data/pydocs_char is prepared")
    result = script("train.py", "config/train_pydocs_char.py")
    assert result.code == 2 and "python data/pydocs_char/prepare.py" in result.err


def test_dataset_with_another_tokenizer_is_refused(script, tiny_run, finished, tmp_path, tiny):
    other = shutil.copytree(tiny, tmp_path / "other")
    meta = json.loads((other / "meta.json").read_text())
    meta["tokenizer"]["characters"] = meta["tokenizer"]["characters"][::-1]
    (other / "meta.json").write_text(json.dumps(meta))
    result = script("train.py", *tiny_run.flags, "--init_from=resume", f"--dataset={other}")
    assert result.code == 2 and "another tokenizer" in result.err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--block_size=8"], "this run has block_size 16"),
        (["--n_layer=3"], "ckpt.pt has 2"),
        (["--bias"], "--bias=True was given"),
    ],
)
def test_settings_that_differ_from_the_checkpoint_are_refused(script, tiny_run, finished, flags, message):
    result = script("train.py", *tiny_run.flags, "--init_from=resume", *flags)
    assert result.code == 2 and message in result.err


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model=[1]), "it has no model"),
        (dict(model={"a": torch.ones(2)}), "the weights do not fit the model"),
        (dict(model_args={"n_experts": 3}), "unexpected keyword argument 'n_experts'"),
        (dict(tokenizer={"kind": "char"}), "unknown tokenizer description"),
        (dict(config={"weight_decay": -1.0}), "--weight_decay must be at least 0"),
        (dict(config={"compile": "maybe"}), "ckpt.pt: compile must be True or False"),
    ],
)
def test_invalid_checkpoint_is_refused(script, tiny_run, finished, change, message):
    (tiny_run.out / PREVIOUS).unlink()
    torch.save({**finished, **change}, tiny_run.out / LATEST)
    flags = [flag for flag in tiny_run.flags if "compile" not in flag]
    result = script("train.py", *flags, "--init_from=resume")
    errors = [line for line in result.err.splitlines() if not line.startswith("settings:")]
    assert result.code == 2 and len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize("change", [dict(param_groups=[]), dict(state={0: dict(step=1.0)}), dict(state={7: {}})])
def test_mismatched_optimizer_state_is_refused(change):
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=8))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))[1].backward()
    optimizer.step()
    saved = optimizer.state_dict()
    load_optimizer_state(optimizer, saved)
    with pytest.raises(ValueError, match="does not match this model and optimizer"):
        load_training_state(optimizer, None, {"optimizer": saved | change})
    saved["state"][0]["exp_avg"] = torch.ones(3, 3)  # a fused kernel would read past its end
    with pytest.raises(ValueError, match="does not match this model and optimizer"):
        load_optimizer_state(optimizer, saved)


def test_expanded_tensors_get_their_own_memory(train, tiny_run, finished):
    # an expanded tensor has fewer bytes than numbers: a kernel that takes it for dense would leave its memory
    expanded = lambda t: torch.ones(1).expand(t.shape) if t.dim() else t  # noqa: E731
    state = {i: {k: expanded(v) for k, v in s.items()} for i, s in finished["optimizer"]["state"].items()}
    finished["model"]["transformer.ln_f.weight"] = torch.ones(1).expand(16)
    finished["optimizer"] = {**finished["optimizer"], "state": state}
    torch.save(finished, tiny_run.out / LATEST)
    train(tiny_run.flags, "--init_from=resume", "--max_iters=22")
    assert read_checkpoint(tiny_run.out / LATEST)["model"]["transformer.ln_f.weight"].unique().numel() > 1


def test_wandb_gets_the_records_and_its_errors_do_not_end_a_run(train, tiny_run, monkeypatch):
    records = []

    def init(**settings):
        records.append(settings)
        return types.SimpleNamespace(id="mine")

    def log(record, step):
        assert record["iter"] == step
        records.append(record)
        if len(records) == 2:
            raise RuntimeError("no route")

    codes = []
    wandb = types.SimpleNamespace(init=init, log=log, finish=codes.append)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    result = train(tiny_run.flags, "--wandb_log", "--wandb_project=p", "--max_iters=3")
    assert "WARNING: could not log (RuntimeError: no route)" in result.out
    assert records[0]["project"] == "p" and records[0]["config"]["max_iters"] == 3
    assert records[1:] == metrics(tiny_run.out) and codes == [0]


def test_world_size_without_torchrun(script, tiny_run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")  # some clusters set it for purposes of their own
    assert script("train.py", *tiny_run.flags, "--max_iters=1").code == 0
    monkeypatch.setenv("RANK", "0")
    result = script("train.py", *tiny_run.flags)
    assert result.code == 2 and "unset RANK" in result.err


# ---- processes and compilers


def test_signal_to_one_rank_stops_all_at_the_same_step(tiny_run, start_process):
    process = start_process(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "train.py", *tiny_run.flags, "--max_iters=1000000", "--eval_interval=1000000",
        env={"OMP_NUM_THREADS": "1"}, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for_line(process, r"^iter 3:")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("this system does not list child processes in /proc")
    workers = [int(pid) for pid in children.read_text().split()]
    workers = [pid for pid in workers if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[1], signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    step = int(re.search(r"stopped at step (\d+)", out)[1])
    assert read_checkpoint(tiny_run.out / LATEST)["iter_num"] == step and "exitcode  : 143" in out


@pytest.fixture
def torchrun(start_process):
    """torchrun(script, *flags, n=2, restarts=0, env={...}) starts processes of it that share the machine."""

    def start(*args, n=2, restarts=0, env=None, **options):
        run = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", f"--max-restarts={restarts}")
        return start_process(*run, *args, env={"OMP_NUM_THREADS": "1", **(env or {})}, **options)

    return start


def test_three_ranks_equal_one_and_survive_a_kill(train, torchrun, tiny_run, tmp_path):
    # with three ranks, unlike two, the result of a sum depends on its order
    flags = [*tiny_run.flags, "--eval_interval=6", "--save_interval=2", "--sample_interval=10"]
    flags += ["--gradient_accumulation_steps=3"]
    train(flags, f"--out_dir={tmp_path / 'one'}")
    whole = torchrun("train.py", *flags, f"--out_dir={tmp_path / 'whole'}", n=3)
    _, err = whole.communicate(timeout=120)
    assert whole.returncode == 0, err
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "whole")
    for key in ("loss", "val/loss", "train/loss", "grad_norm"):
        assert [r[key] for r in two if key in r] == pytest.approx([r[key] for r in one if key in r], abs=1e-4)
    job = torchrun("tests/faulty_train.py", *flags, "--init_from=auto", n=3, restarts=1, env={"FAULT": "backward"})
    _, err = job.communicate(timeout=240)
    assert job.returncode == 0, err
    assert re.findall(r"fault: (\w+)", err) == ["backward"]
    assert_same_state(read_checkpoint(tmp_path / "whole" / LATEST), read_checkpoint(tiny_run.out / LATEST))
    assert (tiny_run.out / "exit_code").read_text() == "0\n"


def test_fsdp_equals_one_process_and_shares_checkpoints(torchrun, train, tiny_run, tmp_path):
    flags = [*tiny_run.flags, "--muon", "--sample_interval=20"]
    train(flags)
    finished = read_checkpoint(tiny_run.out / LATEST)
    folders = {name: tmp_path / name for name in ("sharded", "again", "alone")}

    def shard(name):
        job = torchrun("train.py", *flags, "--fsdp", "--gradient_checkpointing", "--init_from=auto",
                       f"--out_dir={folders[name]}")  # fmt: skip
        _, err = job.communicate(timeout=120)
        assert job.returncode == 0, err
        return read_checkpoint(folders[name] / LATEST)

    def assert_close(state):
        for part in ("model", "optimizer"):
            ours, theirs = tensors(state[part]), tensors(finished[part])
            assert list(ours) == list(theirs)
            for key, value in ours.items():
                if torch.is_tensor(value):
                    torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-5, msg=key)
                else:
                    assert value == theirs[key], key

    sharded = shard("sharded")
    assert_close(sharded)
    assert (folders["sharded"] / LATEST).stat().st_size <= (tiny_run.out / LATEST).stat().st_size
    for name in ("again", "alone"):  # from step 10
        shutil.copytree(folders["sharded"], folders[name])
    os.truncate(folders["again"] / LATEST, 1000)
    assert_same_state(sharded, shard("again"))
    os.replace(folders["alone"] / PREVIOUS, folders["alone"] / LATEST)
    train(flags, "--init_from=resume", f"--out_dir={folders['alone']}")
    assert_close(read_checkpoint(folders["alone"] / LATEST))


def test_fsdp_in_bfloat16_is_close_to_one_process(torchrun, train, tiny_run, tmp_path):
    flags = [*tiny_run.flags, "--dtype=bfloat16", "--max_iters=3", "--bias", "--sample_interval=3"]
    train(flags)
    job = torchrun("train.py", *flags, "--fsdp", f"--out_dir={tmp_path / 'sharded'}")
    _, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    losses = [[r["loss"] for r in metrics(folder) if "loss" in r] for folder in (tiny_run.out, tmp_path / "sharded")]
    assert losses[0] == pytest.approx(losses[1], abs=3e-3) and len(losses[0]) == 3


def test_nan_on_one_rank_stops_all_before_the_update(torchrun, tiny_run):
    job = torchrun("tests/faulty_train.py", *tiny_run.flags, "--save_interval=1", env={"FAULT": "nan"})
    out, err = job.communicate(timeout=120)
    step = int(re.search(r"step (\d+): loss nan.*diverged, no update was made", out)[1])
    assert read_checkpoint(tiny_run.out / LATEST)["iter_num"] == step and job.returncode == 1, err
    assert (tiny_run.out / "exit_code").read_text() == "3\n"


def test_hanging_rank_is_named(torchrun, tiny_run):
    job = torchrun("tests/faulty_train.py", *tiny_run.flags, "--timeout=6", env={"FAULT": "hang"})
    out, err = job.communicate(timeout=120)
    assert job.returncode == 1 and "error: rank 1 of 2 does not respond" in err, err
    assert not (tiny_run.out / "exit_code").exists()


def test_exception_on_one_rank_after_a_signal_saves(torchrun, tiny_run):
    flags = [*tiny_run.flags, "--eval_interval=1000"]
    job = torchrun("tests/faulty_train.py", *flags, env={"FAULT": "interrupt"})
    out, err = job.communicate(timeout=120)
    assert job.returncode == 1 and "stopped at step 7; to continue" in out, err
    assert read_checkpoint(tiny_run.out / LATEST)["iter_num"] == 7
    assert (tiny_run.out / "exit_code").read_text() == "130\n"


def test_torchrun_sigterm_saves_and_writes_exit_code(torchrun, tiny_run, tmp_path):
    job = torchrun("train.py", *tiny_run.flags, "--max_iters=1000000", "--eval_interval=1000000")
    wait_for_line(job, r"^iter 3:")
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=60)
    step = int(re.search(r"stopped at step (\d+)", out)[1])
    assert read_checkpoint(tiny_run.out / LATEST)["iter_num"] == step, err
    assert (tiny_run.out / "exit_code").read_text() == "143\n"


def test_signal_interrupts_an_evaluation(train, tiny_run, monkeypatch):
    forward, evaluated = GPT.forward, []

    def signalled(self, *args, **kwargs):
        if not self.training:
            evaluated.append(len(evaluated))
            if len(evaluated) == 60:  # of 69 a time: in the first evaluation
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", signalled)
    result = train(tiny_run.flags, "--eval_iters=60", code=143)
    assert len(evaluated) == 60 and result.out.splitlines()[-1] == "stopped at step 0"  # with nothing to resume


def test_second_run_in_the_same_out_dir_is_refused(train, tiny_run):
    pytest.importorskip("fcntl")
    tiny_run.out.mkdir()
    with FolderLock(str(tiny_run.out)):
        assert "is locked by another process" in train(tiny_run.flags, code=2).err
    train(tiny_run.flags, "--max_iters=1")


@pytest.mark.parametrize("last, step", [(30, 11), (17, 6)])  # in a step; in an evaluation
def test_unreadable_data_stops_the_run_with_a_save(train, tiny_run, monkeypatch, last, step):
    real, calls = Tokens.windows, iter(range(10**6))

    def windows(self, starts, length):
        if next(calls) >= last:
            raise DataError("Input/output error")
        return real(self, starts, length)

    monkeypatch.setattr(Tokens, "windows", windows)
    result = train(tiny_run.flags, "--eval_interval=6", code=2)
    assert "Input/output error" in result.err and f"stopped at step {step}:" in result.out
    assert read_checkpoint(tiny_run.out / LATEST)["iter_num"] == step
    assert [r["iter"] for r in metrics(tiny_run.out) if "val/loss" in r] == list(range(0, step, 6))


def test_best_that_could_not_be_written_does_not_count(train, tiny_run, monkeypatch):
    def refuse_best(state, folder, name, keep_previous):
        if name == BEST and state["iter_num"] == 10:
            raise OSError(28, "No space left on device")
        save_checkpoint(state, folder, name, keep_previous)

    # losses at steps 0, 5, 10, 15, 20, of one batch of each split
    losses = (loss for loss in (5.0, 4.0, 3.0, 3.5, 3.6) for _ in ("train", "val"))
    monkeypatch.setattr("model.sum_losses", lambda model, batches: (next(losses), 1))
    monkeypatch.setattr("model.save_checkpoint", refuse_best)
    result = train(tiny_run.flags, "--eval_interval=5", "--eval_iters=1")
    assert result.out.count("ckpt_best.pt (") == 1
    best, latest = (read_checkpoint(tiny_run.out / name) for name in (BEST, LATEST))
    assert best["iter_num"] == 15 and best["best_val_loss"] == latest["best_val_loss"] == 3.5


def test_longer_run_keeps_a_best_that_it_does_not_measure_again(train, tiny_run):
    train(tiny_run.flags, "--eval_interval=10")
    losses = {r["iter"]: r["val/loss"] for r in metrics(tiny_run.out) if "val/loss" in r}
    assert losses[0] > losses[10] > losses[20]
    for name, step in ((PREVIOUS, 10), (LATEST, 20)):
        assert read_checkpoint(tiny_run.out / name)["best_val_loss"] == losses[step]
    longer = ["--init_from=resume", "--max_iters=23", "--eval_interval=11", "--decay_lr=False", "--learning_rate=1"]
    result = train(tiny_run.flags, *longer)
    assert "step 22: " in result.out and "step 20: " not in result.out
    assert read_checkpoint(tiny_run.out / BEST)["iter_num"] == 20


def test_compiled_training_gives_the_same_losses(train, tiny_run, tmp_path):
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile with")
    # 34 windows of validation text in batches of 4: the last is short
    flags = ["--n_layer=1", "--max_iters=5", "--eval_iters=100", "--dropout=0.0"]
    torch._dynamo.utils.counters.clear()
    compiled = train(tiny_run.flags, *flags, "--compile=True", f"--out_dir={tmp_path / 'compiled'}")
    assert "does not work here" not in compiled.err
    # of can_compile(), of the training step and of the evaluation: none runs uncompiled
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3
    train(tiny_run.flags, *flags, f"--out_dir={tmp_path / 'plain'}")
    for key in ("loss", "val/loss"):
        compiled, plain = ([r[key] for r in metrics(tmp_path / name) if key in r] for name in ("compiled", "plain"))
        assert compiled == pytest.approx(plain, abs=1e-4)


def test_torch_dynamo_is_imported_only_to_compile(tiny_run, start_process, tmp_path):
    (tmp_path / "tell.py").write_text("import atexit, sys; atexit.register(lambda: print(*sys.modules))")
    process = start_process("train.py", str(tmp_path / "tell.py"), *tiny_run.flags, "--muon", "--max_iters=2")
    modules = process.communicate(timeout=60)[0].splitlines()[-1].split()
    assert process.returncode == 0 and "torch.optim" in modules and "torch._dynamo" not in modules


def test_without_a_compiler_training_goes_on(tiny_run, start_process, tmp_path):
    process = start_process(
        "train.py", *tiny_run.flags, "--compile=True", "--dropout=0.0", "--max_iters=2",
        env={"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "iter 1:" in out
    assert err.count("compile=False: torch.compile does not work here") == 1 and "Traceback" not in err


def test_terminal_gets_one_progress_line_and_a_file_plain_lines(train, tiny_run, start_process):
    pty = pytest.importorskip("pty")
    main, secondary = pty.openpty()
    process = start_process("train.py", *tiny_run.flags, "--max_iters=4", stdout=secondary, env={"TERM": "xterm"})
    os.close(secondary)
    shown = b""
    try:
        while chunk := os.read(main, 4096):
            shown += chunk
    except OSError:
        pass  # the end of the terminal
    assert process.wait() == 0
    assert shown.count(b"\riter ") == 4 and b"eta" in shown
    plain = train(tiny_run.flags, "--max_iters=4").out
    assert plain.count("\niter ") == 4 and "\r" not in plain


def test_starting_imports_no_compiler(tiny_run, start_process):
    flags = [*tiny_run.flags, "--max_iters=2", "--sample_interval=2", "--muon=True"]
    for command in (["train.py", *flags], ["sample.py", f"--out_dir={tiny_run.out}", "--device=cpu"]):
        process = start_process("-X", "importtime", *command)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-2000:]
        assert "torch.nn" in err and "torch._dynamo" not in err and "sympy" not in err
