import json
from functools import partial

import pytest
import torch

from model import GPT, GPTConfig, model_args

SHAPE = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--batch_size=4"]
SYSTEM = ["--device=cpu", "--compile=False"]


@pytest.fixture
def bench(script, tmp_path):
    """bench("--flag=value", ...) runs bench.py: what it prints, and the results in the JSON file."""

    def run(*flags, code=0):
        path = tmp_path / "bench.json"
        result = script("bench.py", *SYSTEM, *flags, f"--json={path}")
        assert result.code == code, result.err
        return result, json.loads(path.read_text()) if code == 0 else None

    return run


def test_bench_writes_all_measurements(bench, tiny):
    result, results = bench(*SHAPE, f"--dataset={tiny}", "--steps=5", "--decode_tokens=20")
    assert "random tokens" not in result.out and "measured" in result.out
    for key in ("train plainGPT", "decode 1 plainGPT", "decode 10 plainGPT"):
        assert results[key]["tokens_per_second"] > 0
    bytes_per_number = 4 if results["dtype"] == "float32" else 2
    assert results["models"]["plainGPT"]["cache_bytes_per_token"] == 2 * 2 * 32 * bytes_per_number
    row = results["train plainGPT"]
    assert row["mfu"] > 0 and row["peak_memory"] > 1e7 and 0 < row["data_share"] < 1
    assert results["decode 1 plainGPT"]["bound"] > 0


def test_bench_compiles_the_training_step(script, tiny, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    flags = ["--device=cpu", f"--dataset={tiny}", "--steps=3", "--decode_tokens=0"]
    result = script("bench.py", *SHAPE, *flags)
    assert result.code == 0 and "tokens_per_second" in result.out, result.err


def test_profile_on_random_tokens(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset=nowhere", "--steps=0", "--decode_tokens=0", "--profile"]
    result = script("bench.py", *SHAPE, *SYSTEM, *flags)
    assert result.code == 0 and "random tokens: no dataset" in result.out and "aten::" in result.out
    assert json.loads((tmp_path / "bench_log" / "trace.json").read_text())["traceEvents"]


def test_nanogpt_and_transformers_in_turns(bench, tiny, tmp_path):
    (tmp_path / "model.py").write_text("from model import GPT, GPTConfig\n")
    flags = ["--steps=3", "--decode_tokens=10", f"--classic={tmp_path}", "--transformers"]
    result, results = bench(*SHAPE, f"--dataset={tiny}", *flags)
    assert results["train classic"]["loss"] == pytest.approx(results["train plainGPT"]["loss"], abs=1.0)
    assert "train transformers" not in results
    ours, theirs = (results[f"decode 10 {name}"]["tokens_per_second"] for name in ("plainGPT", "classic"))
    assert results["decode 10 plainGPT / classic"] == ours / theirs
    assert results["decode 1 transformers"]["tokens_per_second"] > 0
    # nanoGPT has no KV cache: a batch is as fast as one sequence after another
    assert results["decode 10 classic"] == results["decode 1 classic"]


def test_compare_changes_the_model_and_not_the_batches(bench, tiny, tmp_path):
    (tmp_path / "checkpointed.py").write_text("gradient_checkpointing = True\nbatch_size = 1\nblock_size = 8\n")
    shape = ["--n_layer=8", "--n_head=2", "--n_embd=64", "--block_size=256", "--batch_size=32", "--dtype=float32"]
    compare = f"--compare={tmp_path / 'checkpointed.py'},config/modern.py"
    _, results = bench(*shape, f"--dataset={tiny}", "--steps=3", "--decode_tokens=0", compare)
    plain, checkpointed, modern = (results[f"train {name}"] for name in ("plainGPT", "checkpointed", "modern"))
    assert checkpointed["loss"] == plain["loss"] and checkpointed["first_loss"] == plain["first_loss"]
    assert checkpointed["peak_memory"] < plain["peak_memory"] - 5e7
    assert modern["loss"] < modern["first_loss"] and modern["steps_per_second"] > 0
    shapes = results["models"]
    assert shapes["modern"]["config"]["norm"] == "rmsnorm" and shapes["modern"]["config"]["block_size"] == 256
    assert shapes["modern"]["cache_bytes_per_token"] == shapes["plainGPT"]["cache_bytes_per_token"] / 2


def test_generation_of_a_checkpoint_with_int8_weights(script, bench, tiny, tmp_path):
    model = GPT(GPTConfig(block_size=24, vocab_size=64, n_layer=1, n_head=2, n_embd=64, norm="rmsnorm"))
    args = model_args(model.config)
    torch.save({"model": model.state_dict(), "model_args": args, "config": {"dataset": tiny}}, tmp_path / "ckpt.pt")
    flags = [f"--init_from={tmp_path}", "--steps=0", "--decode_tokens=20", "--decode_batch=1,3", "--int8"]
    _, results = bench(*flags)
    assert results["models"]["plainGPT"]["config"] == args
    assert results["int8 decode 3 plainGPT"]["bound"] > results["decode 3 plainGPT"]["bound"]
    before, after = results["int8 perplexity plainGPT"].values()
    assert before != after and after == pytest.approx(before, rel=0.02)
    for flag, value in (("n_layer", 1), ("block_size", 24)):
        result, _ = bench(*flags, f"--{flag}={value + 1}", code=2)
        assert f"--{flag}={value + 1} was given" in result.err and f"has {value}" in result.err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch_size=0"], "--batch_size must be at least 1"),
        (["--seconds=-1"], "--seconds must be at least 0"),
        (["--position=rope", "--rope_theta=0"], "rope_theta must be at least 1"),
        (["--classic=nowhere"], "No such file or directory"),
        (["--compare=nowhere.py"], "no config file nowhere.py"),
        (["--compare=gpt3"], "no config file gpt3"),
        (["--compare=config/modern.py,a/modern.py"], "two models have the name modern"),
        (["--compare=config/modern.py", "--n_head=5"], "multiple of n_head"),  # in two worker processes
        (["--json=/dev/null/x"], "Not a directory"),
        (["--step=3"], "did you mean steps?"),
        (["--decode_batch=1,x"], "--decode_batch must be numbers such as 1,10, got 1,x"),
        (["--transformers", "--decode_tokens=17"], "set --decode_tokens=16"),
    ],
)
def test_wrong_usage_is_one_line(script, flags, message):
    result = script("bench.py", *SHAPE, *SYSTEM, "--real_data=False", "--steps=1", "--decode_tokens=0", *flags)
    errors = [line for line in result.err.splitlines() if not line.startswith("settings:")]
    assert result.code == 2 and len(errors) == 1 and message in errors[0]


def test_out_of_memory_in_a_worker_is_one_line(start_process):
    flags = ["--real_data=False", "--steps=1", "--batch_size=10000000000000", "--compare=config/modern.py"]
    process = start_process("bench.py", *SHAPE, *SYSTEM, *flags)
    _, err = process.communicate(timeout=120)
    errors = [line for line in err.splitlines() if not line.startswith("settings:")]
    assert process.returncode == 2 and len(errors) == 1 and "out of memory" in errors[0]
