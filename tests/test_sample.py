"""sample.py: what it prints for a tiny model that knows its text by heart, and how it answers mistakes."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import TEXT

from model import LATEST, read_checkpoint, save_checkpoint

GREEDY = ["--start=Call me Ish", "--num_samples=1", "--max_new_tokens=20", "--temperature=0"]
GREEDY_TEXT = f"{TEXT[:31]}\n---------------\n"


def test_greedy_text_is_the_training_text(sample):
    assert sample(*GREEDY, "--num_samples=2").out == GREEDY_TEXT * 2


def test_seed_determines_the_text(sample):
    flags = ["--start=Call", "--max_new_tokens=40", "--temperature=2.0"]
    first, again, other = (sample(*flags, f"--seed={seed}").out for seed in (1, 1, 2))
    assert first == again != other and first.count("---------------") == 10
    assert len(set(first.split("---------------"))) > 5  # the samples of a batch differ


def test_streamed_text_equals_batched_text(sample):
    flags = ["--start=Call me", "--num_samples=1", "--max_new_tokens=100", "--temperature=1.5", "--top_p=0.9"]
    assert sample(*flags, "--stream").out == sample(*flags).out


@pytest.mark.parametrize("flags", [[], ["--stream"]])
def test_samples_cannot_control_the_terminal(sample, monkeypatch, flags):
    monkeypatch.setattr("data.tokenizer.CharTokenizer.token_bytes", lambda self, i: b"\x1b")
    into_a_file = sample(*GREEDY, "--max_new_tokens=3", *flags).out
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    on_a_terminal = sample(*GREEDY, "--max_new_tokens=3", *flags).out
    assert into_a_file.count("\x1b") >= 3 and on_a_terminal == into_a_file.replace("\x1b", "\ufffd")


def test_slide_continues_past_the_context(sample):
    assert sample(*GREEDY, "--max_new_tokens=300", "--slide=8").out.startswith(TEXT[:30])


@pytest.mark.parametrize("flags", [[], ["--stream"]])
def test_stop_ends_each_sample(sample, flags):
    text = sample(*GREEDY, "--num_samples=1", "--max_new_tokens=100").out
    for stop in ("y", text[70:77]):  # one token, and several
        out = sample(*GREEDY, "--num_samples=2", "--max_new_tokens=100", f"--stop={stop}", *flags).out
        assert out == f"{text[: text.index(stop)]}\n---------------\n" * 2


def test_newest_run_is_sampled_if_none_is_named(script, trained, tmp_path, monkeypatch):
    for name, time in (("out-older", 1), ("out-newest", 3), ("out-old", 2)):
        shutil.copytree(trained, tmp_path / name)
        for path in (tmp_path / name).glob("*.pt"):
            os.utime(path, (time, time))
    monkeypatch.chdir(tmp_path)
    flags = ["--start=Call", "--num_samples=1", "--max_new_tokens=1", "--device=cpu"]
    assert "loaded out-newest/" in script("sample.py", *flags).err
    assert "loaded out-old/" in script("sample.py", *flags, "--out_dir=out-old").err


def test_prompt_from_file_and_stdin(sample, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("Call me Ish")
    assert sample(*GREEDY, f"--start=FILE:{tmp_path / 'prompt.txt'}").out == GREEDY_TEXT
    (tmp_path / "prompt.txt").write_text("Call me Ish", encoding="utf-8-sig")
    assert sample(*GREEDY, f"--start=FILE:{tmp_path / 'prompt.txt'}").out == GREEDY_TEXT
    for typed in ("Call me Ish", "Call me Ish\n"):  # as printf and as echo write it
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert sample(*GREEDY, "--start=-").out == GREEDY_TEXT


def test_interactive_continues_after_a_wrong_prompt(trained, start_process):
    flags = [f"--out_dir={trained}", "--interactive", "--max_new_tokens=20", "--temperature=0", "--device=cpu"]
    process = start_process("sample.py", *flags, stdin=subprocess.PIPE)
    out, err = process.communicate("Call me Ish\n\né\nnever mind\n", timeout=60)
    assert process.returncode == 0 and "Traceback" not in err
    assert "the prompt is empty" in err and "no token for 'é'" in err
    assert re.search("Some years", out) and re.search("how long", out)


def test_init_from_a_checkpoint_or_its_folder(sample, trained):
    for init_from in (trained / LATEST, trained):
        assert sample(f"--init_from={init_from}", "--out_dir=nowhere", *GREEDY).out == GREEDY_TEXT


@pytest.mark.parametrize("flag", ["--dtype=bfloat16", "--int8", "--compile"])
def test_faster_weights_generate_the_same_text(sample, flag):
    if flag == "--compile" and not shutil.which("g++"):
        pytest.skip("no g++ to compile with")
    result = sample(*GREEDY, flag)
    assert result.out == GREEDY_TEXT and "does not work here" not in result.err


def test_corrupt_best_checkpoint_is_reported_and_skipped(sample, trained):
    (trained / "ckpt_best.pt").write_bytes(b"corrupt")
    try:
        result = sample(*GREEDY)
        assert "ckpt_best.pt is corrupt" in result.err and f"loaded {trained / LATEST}, step 200" in result.err
    finally:
        (trained / "ckpt_best.pt").unlink()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--start=é"], "no token for 'é'"),
        (["--start="], "the prompt is empty"),
        (["--start=FILE:nowhere.txt"], "No such file or directory: nowhere.txt"),
        (["--num_samples=0"], "--num_samples must be at least 1, got 0"),
        (["--temperature=-1.0"], "--temperature must be at least 0, got -1.0"),
        (["--top_p=1.5"], "--top_p must be at most 1, got 1.5"),
        (["--out_dir=nowhere"], "no checkpoint in nowhere"),
        (["--init_from=nowhere.pt"], "No such file or directory: nowhere.pt"),
        (["--init_from=README.md"], "README.md is corrupt or not a checkpoint"),
        (["--tempreature=1"], "did you mean temperature?"),
        (["--merge"], "--merge needs --export=folder"),
        (["--compare"], "need a LoRA adapter, but this is a whole model"),
        (["--serve", "--compile"], "--serve and --compare cannot be combined with --compile"),
        (["--compare", "--compile"], "--serve and --compare cannot be combined with --compile"),
        (["--export={trained}"], "contains another model or adapter: export to another folder"),
    ],
)
def test_wrong_input_is_one_line(sample, trained, flags, message):
    result = sample(*(flag.format(trained=trained) for flag in flags), code=2)
    errors = [line for line in result.err.splitlines() if not line.startswith(("settings:", "device:", "loaded "))]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert result.out == ""


@pytest.fixture
def changed(trained, tmp_path):
    """changed(entries) saves the trained checkpoint with other entries; returns a flag to sample from it."""

    def save(**entries):
        save_checkpoint(read_checkpoint(trained / LATEST) | entries, tmp_path)
        return f"--init_from={tmp_path}"

    return save


@pytest.mark.parametrize(
    "change, message",
    [(dict(n_embd=64), "the weights do not fit the model"), (dict(n_experts=4), "invalid model_args")],
)
def test_checkpoint_with_wrong_model_args(sample, trained, changed, change, message):
    model_args = read_checkpoint(trained / LATEST)["model_args"]
    assert message in sample(changed(model_args=model_args | change), code=2).err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_checkpoint_with_nan_or_inf_is_refused(sample, trained, changed, value):
    weights = read_checkpoint(trained / LATEST)["model"]
    weights["transformer.ln_f.weight"][0] = value
    assert "contains NaN or inf" in sample(changed(model=weights), code=2).err


def test_tokenizer_of_another_size_than_the_model(sample, trained, changed):
    characters = read_checkpoint(trained / LATEST)["tokenizer"]["characters"]
    fewer = changed(tokenizer={"kind": "char", "characters": characters[:3]})
    assert "\ufffd" in sample(fewer, f"--start={characters[0]}", "--max_new_tokens=9").out
    more = changed(tokenizer={"kind": "char", "characters": characters + "é"})
    assert f"the model's vocabulary ends at {len(characters) - 1}" in sample(more, "--start=é", code=2).err


def test_checkpoint_without_tokenizer_uses_its_dataset(sample, trained, changed, tiny):
    weights = {"_orig_mod." + name: weight for name, weight in read_checkpoint(trained / LATEST)["model"].items()}
    nanogpt = changed(model=weights, tokenizer=None, config={"dataset": tiny})
    assert sample(nanogpt, *GREEDY).out == GREEDY_TEXT
    without = changed(tokenizer=None, config={"dataset": "nowhere"})
    assert "no tokenizer for a vocabulary of" in sample(without, code=2).err
    assert sample(without, *GREEDY, f"--dataset={tiny}").out == GREEDY_TEXT


def test_ctrl_c_exits_with_130(trained, start_process):
    flags = [f"--out_dir={trained}", "--start=Call", "--device=cpu", "--stream", "--max_new_tokens=1000000"]
    process = start_process("sample.py", *flags)
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate()[1] and process.returncode == 130


def test_lack_of_memory_is_one_line(trained, start_process):
    process = start_process("sample.py", f"--out_dir={trained}", "--device=cpu", "--num_samples=1000000000000")
    err = process.communicate()[1]
    assert "error: out of memory" in err and "Traceback" not in err and process.returncode == 2


def test_closed_pipe_ends_it_quietly(trained, start_process):
    process = start_process("sample.py", f"--out_dir={trained}", "--start=Call", "--stream", "--device=cpu")
    process.stdout.read(5)
    process.stdout.close()
    assert process.stderr.read().count("Traceback") == 0 and process.wait() != 0
