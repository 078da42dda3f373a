import io
import re
import shutil
import signal
import subprocess

import pytest
from conftest import TEXT

from model import LATEST, read_checkpoint, save_checkpoint


def test_text_is_what_was_learned(sample):
    out = sample("--start=Call me Ish", "--max_new_tokens=20", "--num_samples=2", "--temperature=0").out
    assert out == f"{TEXT[:31]}\n---------------\n" * 2


def test_the_seed_decides(sample):
    a, b, c = (sample("--start=Call", "--max_new_tokens=40", f"--seed={s}", "--temperature=2.0").out for s in (1, 1, 2))
    assert a == b != c and a.count("---------------") == 10
    assert len(set(a.split("---------------"))) > 5  # the samples of a batch differ


def test_streamed_text_equals_batched_text(sample):
    flags = ["--start=Call me", "--num_samples=1", "--max_new_tokens=100", "--temperature=1.5", "--top_p=0.9"]
    assert sample(*flags, "--stream").out == sample(*flags).out


def test_slide_and_stop(sample):
    flags = ["--start=Call me Ish", "--num_samples=2", "--max_new_tokens=300", "--temperature=0"]
    assert sample(*flags, "--slide=8").out.startswith(TEXT[:30])
    for more in ([], ["--stream"]):
        out = sample(*flags, "--stop=y", *more).out
        assert out == f"{TEXT[: TEXT.index('y')]}\n---------------\n" * 2


def test_prompts_from_a_file_and_from_stdin(sample, tmp_path, monkeypatch):
    flags = ["--num_samples=1", "--max_new_tokens=20", "--temperature=0"]
    expected = sample("--start=never mind", *flags).out
    (tmp_path / "prompt.txt").write_text("never mind")
    assert sample(f"--start=FILE:{tmp_path / 'prompt.txt'}", *flags).out == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("never mind"))
    assert sample("--start=-", *flags).out == expected


def test_interactive_goes_on_after_a_wrong_prompt(trained, start_process):
    flags = [f"--out_dir={trained}", "--interactive", "--max_new_tokens=20", "--temperature=0", "--device=cpu"]
    process = start_process("sample.py", *flags, stdin=subprocess.PIPE)
    out, err = process.communicate("Call me Ish\n\né\nnever mind\n", timeout=60)
    assert process.returncode == 0 and "Traceback" not in err
    assert "the prompt is empty" in err and "no token for 'é'" in err
    assert re.search("Some years", out) and re.search("how long", out)


def test_a_path_to_a_checkpoint(sample, trained):
    flags = ["--start=Call", "--max_new_tokens=20", "--num_samples=1"]
    expected = sample(*flags).out
    assert sample(f"--init_from={trained / LATEST}", "--out_dir=nowhere", *flags).out == expected
    assert sample(f"--init_from={trained}", "--out_dir=nowhere", *flags).out == expected


def test_dtypes_8_bit_weights_and_compile(sample):
    flags = ["--start=Call me Ish", "--max_new_tokens=20", "--num_samples=1", "--temperature=0"]
    assert sample(*flags, "--dtype=bfloat16").out.startswith(TEXT[:30])
    assert sample(*flags, "--int8").out.startswith(TEXT[:30])
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile with")
    result = sample(*flags, "--compile")
    assert result.out.startswith(TEXT[:30]) and "does not work here" not in result.err


def test_a_damaged_best_falls_back_loudly(sample, trained):
    (trained / "ckpt_best.pt").write_bytes(b"damaged")
    try:
        result = sample("--start=Call", "--max_new_tokens=5")
        assert "ckpt_best.pt is damaged" in result.err and "ckpt.pt: step 200" in result.err
    finally:
        (trained / "ckpt_best.pt").unlink()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--start=é"], "no token for 'é'"),
        (["--start="], "the prompt is empty"),
        (["--start=FILE:nowhere.txt"], "No such file or directory: nowhere.txt"),
        (["--stop=two"], "stop must be one token"),
        (["--stop=é"], "no token for 'é'"),
        (["--num_samples=0"], "num_samples must be at least 1"),
        (["--temperature=-1.0"], "must not be negative"),
        (["--top_p=1.5"], "must lie in [0, 1]"),
        (["--out_dir=nowhere"], "no checkpoint in nowhere"),
        (["--init_from=nowhere.pt"], "No such file or directory: nowhere.pt"),
        (["--init_from=README.md"], "README.md is damaged or is not a checkpoint"),
        (["--tempreature=1"], "did you mean temperature?"),
    ],
)
def test_wrong_input_is_one_line(sample, flags, message):
    result = sample(*flags, code=2)
    errors = [line for line in result.err.splitlines() if not line.startswith(("settings:", "device ", "ckpt"))]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert result.out == ""


def test_a_checkpoint_that_does_not_fit_its_own_settings(sample, trained, tmp_path):
    state = read_checkpoint(trained / LATEST)
    for change, message in (
        (dict(n_embd=64), "weights do not fit the model"),
        (dict(n_experts=4), "unknown here: n_experts"),
    ):
        save_checkpoint({**state, "model_args": {**state["model_args"], **change}}, tmp_path)
        assert message in sample(f"--init_from={tmp_path}", code=2).err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_checkpoint_with_nan_or_inf_is_refused(sample, trained, tmp_path, value):
    state = read_checkpoint(trained / LATEST)
    state["model"]["transformer.ln_f.weight"][0] = value
    save_checkpoint(state, tmp_path)
    assert "contains NaN or inf" in sample(f"--init_from={tmp_path}", code=2).err


def test_a_tokenizer_of_another_size_than_the_model(sample, trained, tmp_path):
    state = read_checkpoint(trained / LATEST)
    characters = state["tokenizer"]["characters"]
    save_checkpoint({**state, "tokenizer": {"kind": "char", "characters": characters[:3]}}, tmp_path)
    assert "\ufffd" in sample(f"--init_from={tmp_path}", f"--start={characters[0]}", "--max_new_tokens=9").out
    save_checkpoint({**state, "tokenizer": {"kind": "char", "characters": characters + "é"}}, tmp_path)
    assert "past the model's vocabulary" in sample(f"--init_from={tmp_path}", "--start=é", code=2).err


@pytest.mark.parametrize("dataset", [3, None, ["x"], "nowhere"])
def test_a_checkpoint_that_names_no_dataset_says_so(sample, trained, tmp_path, dataset):
    state = read_checkpoint(trained / LATEST)
    save_checkpoint({**state, "tokenizer": None, "config": {"dataset": dataset}}, tmp_path)
    assert "nothing says which text" in sample(f"--init_from={tmp_path}", code=2).err


def test_ctrl_c_and_too_little_memory_are_no_tracebacks(trained, start_process):
    flags = [f"--out_dir={trained}", "--start=Call", "--device=cpu"]
    process = start_process("sample.py", *flags, "--stream", "--max_new_tokens=1000000")
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate()[1] and process.returncode == 130
    process = start_process("sample.py", *flags, "--num_samples=1000000000000")
    err = process.communicate()[1]
    assert "error: out of memory" in err and "Traceback" not in err and process.returncode == 2


def test_a_closed_pipe_ends_it_quietly(trained, start_process):
    process = start_process("sample.py", f"--out_dir={trained}", "--start=Call", "--stream", "--device=cpu")
    process.stdout.read(5)
    process.stdout.close()
    assert process.stderr.read().count("Traceback") == 0 and process.wait() != 0


def test_a_classic_checkpoint_takes_the_tokenizer_of_its_dataset(sample, trained, tiny, tmp_path):
    state = read_checkpoint(trained / LATEST)
    del state["tokenizer"]
    state["model"] = {"_orig_mod." + k: v for k, v in state["model"].items()}
    save_checkpoint({**state, "config": {"dataset": tiny}}, tmp_path)
    flags = ["--start=Call me Ish", "--max_new_tokens=30", "--num_samples=1", "--temperature=0"]
    assert sample(f"--init_from={tmp_path}", *flags).out.startswith(TEXT[:30])
    save_checkpoint(state, tmp_path)
    assert "nothing says which text" in sample(f"--init_from={tmp_path}", *flags, code=2).err
