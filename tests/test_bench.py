import json
from functools import partial

import pytest
import torch

from data.shards import Dataset
from model import GPT, GPTConfig

FLAGS = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=32",
    "--block_size=16",
    "--batch_size=4",
    "--device=cpu",
    "--compile=False",
]


def test_results_as_json(script, tiny, tmp_path):
    path = tmp_path / "bench.json"
    result = script("bench.py", *FLAGS, f"--dataset={tiny}", "--steps=5", "--decode_tokens=20", f"--json={path}")
    assert result.code == 0 and "random tokens" not in result.out and "measured" in result.out
    results = json.loads(path.read_text())
    for key in ("train plainGPT", "decode 1 plainGPT", "decode 10 plainGPT"):
        assert results[key]["tokens_per_second"] > 0
    assert results["models"]["plainGPT"]["cache_bytes_per_token"] == 2 * 2 * 32 * (
        2 if results["dtype"] != "float32" else 4
    )
    row = results["train plainGPT"]
    assert row["mfu"] > 0 and row["peak_memory"] > 1e7 and results["decode 1 plainGPT"]["bound"] > 0


def test_a_compiled_model(script, tiny, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    flags = [*FLAGS[:-1], f"--dataset={tiny}", "--steps=3", "--decode_tokens=0"]
    result = script("bench.py", *flags)
    assert result.code == 0 and "tokens/s" in result.out, result.err


def test_random_tokens_and_a_profile(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = script("bench.py", *FLAGS, "--dataset=nowhere", "--steps=1", "--decode_tokens=0", "--profile")
    assert result.code == 0 and "random tokens: no dataset" in result.out and "aten::" in result.out
    assert json.loads((tmp_path / "bench_log" / "trace.json").read_text())["traceEvents"]


def test_in_turns_with_another_model(script, tiny, tmp_path):
    (tmp_path / "model.py").write_text("from model import GPT, GPTConfig\n")
    path = tmp_path / "bench.json"
    flags = [f"--dataset={tiny}", "--steps=3", "--decode_tokens=20", f"--classic={tmp_path}", f"--json={path}"]
    result = script("bench.py", *FLAGS, *flags)
    assert result.code == 0 and "plainGPT / classic" in result.out
    results = json.loads(path.read_text())
    assert results["train classic"]["loss"] == pytest.approx(results["train plainGPT"]["loss"], abs=1.0)
    ours, theirs = (results[f"decode 10 {name}"]["tokens_per_second"] for name in ("plainGPT", "classic"))
    assert results["decode 10 plainGPT / classic"] == ours / theirs
    (tmp_path / "model.py").write_text("1 / 0")
    result = script("bench.py", *FLAGS, *flags)
    assert result.code == 2 and "model.py: ZeroDivisionError" in result.err


def test_two_configurations_side_by_side(script, tiny, tmp_path):
    path = tmp_path / "bench.json"
    flags = [f"--dataset={tiny}", "--steps=100", "--decode_tokens=20", "--compare=config/modern.py", f"--json={path}"]
    result = script("bench.py", *FLAGS, *flags)
    assert result.code == 0, result.err
    results = json.loads(path.read_text())
    plain, modern = (results["models"][name] for name in ("plainGPT", "modern"))
    assert (
        modern["config"]["norm"] == "rmsnorm" and modern["cache_bytes_per_token"] == plain["cache_bytes_per_token"] / 2
    )
    for name in ("plainGPT", "modern"):
        row = results[f"train {name}"]
        assert row["loss"] < row["first_loss"] - 0.5 and row["peak_memory"] > 1e7 and row["steps_per_second"] > 0
        assert results[f"decode 1 {name}"]["tokens_per_second"] > 0
    assert "KV cache" in result.out and "it/s" in result.out


def test_generation_by_a_checkpoint_with_integers_as_weights(script, tiny, tmp_path):
    path, shape = tmp_path / "bench.json", dict(block_size=24, vocab_size=64, n_layer=1, n_head=2, n_embd=64)
    model = GPT(GPTConfig(**shape, norm="rmsnorm"))
    checkpoint = {"model": model.state_dict(), "model_args": model.config.to_dict(), "config": {"dataset": tiny}}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    flags = ["--steps=0", "--decode_tokens=20", "--decode_batch=1,3", "--int8", "--device=cpu", "--compile=False"]
    result = script("bench.py", f"--init_from={tmp_path}", *flags, f"--json={path}")
    assert result.code == 0, result.err
    results = json.loads(path.read_text())
    assert results["models"]["plainGPT"]["config"] == model.config.to_dict()
    assert results["int8 decode 3 plainGPT"]["bound"] > results["decode 3 plainGPT"]["bound"]
    before, after = results["int8 perplexity plainGPT"].values()
    assert before != after and after == pytest.approx(before, rel=0.02)
    for more, message in ((["--n_layer=2"], "has 1"), (["--block_size=25"], "sees 24"), (["--plan=2"], "leave out")):
        result = script("bench.py", f"--init_from={tmp_path}", *flags, *more)
        assert result.code == 2 and message in result.err and "Traceback" not in result.err


def test_gradient_checkpointing_takes_less_memory(script, tiny, tmp_path):
    (tmp_path / "checkpointed.py").write_text("gradient_checkpointing = True")
    path = tmp_path / "bench.json"
    flags = ["--n_layer=8", "--n_embd=64", "--block_size=256", "--batch_size=16", f"--dataset={tiny}", "--steps=1"]
    flags += ["--decode_tokens=0", f"--compare={tmp_path / 'checkpointed.py'}", f"--json={path}", "--dtype=float32"]
    assert script("bench.py", *FLAGS, *flags).code == 0
    plain, checkpointed = (json.loads(path.read_text())[f"train {name}"] for name in ("plainGPT", "checkpointed"))
    assert checkpointed["peak_memory"] < plain["peak_memory"] - 5e7 and checkpointed["loss"] == plain["loss"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch_size=0"], "batch_size must be at least 1"),
        (["--n_head=5"], "multiple of n_head"),
        (["--classic=nowhere"], "classic takes the folder"),
        (["--compare=nowhere.py"], "no config file nowhere.py"),
        (["--compare=config/train_shakespeare_char_cpu.py", "--n_head=1", "--block_size=0"], "block_size must be"),
        (["--steps=0", "--profile"], "nothing to measure: give --steps=20"),
        (["--json=/dev/null/x"], "Not a directory"),
        (["--step=3"], "did you mean steps?"),
        (["--steps=0"], "nothing to measure: give --steps=20 or --decode_tokens=256"),
        (["--batch_size=1000000000000"], "too many for a step"),
        (["--decode_batch=1,x"], "decode_batch takes numbers such as 1,10, not '1,x'"),
        (["--compare=config/modern.py,a/modern.py"], "two models have the same name"),
        (["--compare=gpt3"], "no config file gpt3"),
        (["--plan=3"], "plan takes a number that divides gradient_accumulation_steps=40, not 3"),
        (["--plan=8", "--profile"], "plan measures nothing"),
        (["--profile", "--transformers"], "profile records one model alone"),
    ],
)
def test_wrong_input_is_one_line(script, flags, message):
    result = script("bench.py", *FLAGS, "--real_data=False", "--steps=1", "--decode_tokens=0", *flags)
    errors = [line for line in result.err.splitlines() if not line.startswith("settings:")]
    assert result.code == 2 and len(errors) == 1 and message in errors[0]


def test_the_plan_counts_what_training_takes(script, tiny, tmp_path):
    """Beside what autograd itself keeps of a real forward pass."""
    shape = dict(n_layer=2, n_head=2, n_embd=64, block_size=256, dropout=0.1)
    flags = [*(f"--{k}={v}" for k, v in shape.items()), f"--dataset={tiny}", "--batch_size=32", "--dtype=float32"]
    path = tmp_path / "plan.json"
    result = script("bench.py", *flags, "--device=cpu", "--plan=4", "--gradient_accumulation_steps=8", f"--json={path}")
    assert result.code == 0 and "4 processes, 2 x 32 x 256 tokens a step each" in result.out, result.err
    plan = json.loads(path.read_text())
    vocab_size = Dataset(tiny).vocab_size
    model, kept = GPT(GPTConfig(vocab_size=vocab_size, bias=False, **shape)), {}
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    idx = torch.zeros(32, 256, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(idx, idx)
    kept = sum(storage.nbytes() for storage in kept.values())
    activations = plan["activations and copies"]
    assert activations[0] == activations[1] and kept < activations[0] < 1.25 * kept
    total, blocks = (sum(p.numel() for p in m.parameters()) for m in (model, model.transformer.h))
    assert plan["gradients, float32"] == [4 * total, total]
    # all-reduce: every gradient is sent twice but for a process's own share; FSDP: in both micro-steps
    assert plan["sent a step"] == [8 * total * 3 / 4, 2 * (8 * blocks + 4 * (total - blocks) + 4 * total) * 3 / 4]
    assert plan["memory together"][1] < plan["memory together"][0]
    less = script("bench.py", *flags, "--device=cpu", "--plan=4", "--gradient_checkpointing", f"--json={path}")
    assert less.code == 0 and json.loads(path.read_text())["activations and copies"][0] < activations[0] / 1.5
