"""What a run shows: terminal, metrics, TensorBoard, wandb, loss curves, samples of text."""

import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, assert_same_state, metrics

from data.shards import Dataset
from model import BEST, LATEST, from_checkpoint, read_checkpoint


def test_metrics_have_everything(train, tiny_run):
    train(tiny_run.flags, "--sample_interval=10")
    rows = metrics(tiny_run.out)
    steps = [r for r in rows if "loss" in r]
    assert [r["tokens"] for r in steps] == [(i + 1) * 2 * 4 * 16 for i in range(20)]
    assert all(r.keys() >= {"iter", "lr", "grad_norm", "tokens_per_second"} for r in steps) and "mfu" in steps[-1]
    evaluations = [r for r in rows if "val/loss" in r]
    assert [r["iter"] for r in evaluations] == [0, 10, 20]
    for r in evaluations:
        assert r["val/perplexity"] == pytest.approx(math.exp(r["val/loss"]))
        assert r["train/loss"] > 0 and r["val/bits_per_byte"] > 0 and r["memory"] > 2**20
    assert rows[0] == {"iter": 0, "parameters": 2 * (12 * 16**2 + 2 * 16) + 16 + 16 * 27}  # blocks, norm, embeddings
    samples = {r["iter"]: r["sample"] for r in rows if "sample" in r}
    assert samples.keys() == {10, 20} and all(len(text) == 101 and text[0] == "\n" for text in samples.values())
    pandas = importlib.util.find_spec("pandas")
    if pandas:  # the two lines of README.md
        import pandas as pd

        table = pd.read_json(tiny_run.out / "metrics.jsonl", lines=True).groupby("iter").first()
        assert table["val/loss"].count() == 3 and table["loss"].count() == 20


@pytest.mark.parametrize("compiled", [False, True])
def test_samples_and_plots_do_not_change_training(train, tiny_run, tmp_path, compiled):
    flags = [*tiny_run.flags, f"--compile={compiled}", "--n_layer=1", "--max_iters=6", "--eval_interval=3"]
    train(flags)
    more = ["--sample_interval=1", "--sample_prompt=Call me", "--loss_plot", "--tensorboard_log"]
    out = train(flags, *more, f"--out_dir={tmp_path / 'watched'}").out
    assert_same_state(read_checkpoint(tiny_run.out / LATEST), read_checkpoint(tmp_path / "watched" / LATEST))
    assert not any("sample" in r for r in metrics(tiny_run.out)) and out.count(" sample:\nCall me") == 6
    assert (tmp_path / "watched" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_sample_equals_sample_py(train, sample, tiny_run):
    train(tiny_run.flags, "--sample_interval=20", "--sample_prompt=Call me")
    text = [r["sample"] for r in metrics(tiny_run.out) if "sample" in r][-1]
    flags = ("--start=Call me", "--num_samples=1", "--max_new_tokens=100", f"--init_from={tiny_run.out / LATEST}")
    assert sample(*flags).out == f"{text}\n---------------\n"


def test_sample_prompt_must_be_encodable(script, tiny_run):
    result = script("train.py", *tiny_run.flags, "--sample_interval=20", "--sample_prompt=日本")
    assert result.code == 2 and "--sample_prompt: no token for '日' '本'" in result.err


def test_plot_of_several_runs(script, train, tiny_run, tmp_path, monkeypatch):
    runs = [str(tmp_path / name) for name in ("a", "b")]
    for out_dir in runs:
        train(tiny_run.flags, f"--out_dir={out_dir}")
    with open(tmp_path / "b" / "metrics.jsonl", "a") as f:
        f.write('{"iter": 2')  # a line that a crash has cut off
    monkeypatch.chdir(tmp_path)
    assert script("train.py", f"--plot={','.join(runs)}").out == "wrote loss.png\n"
    from matplotlib.image import imread

    picture = imread(tmp_path / "loss.png")[..., :3].reshape(-1, 3)
    for color in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):  # a run each
        assert (abs(picture - torch.tensor(color).numpy() / 255).max(axis=1) < 0.01).sum() > 100
    (tmp_path / "run_$a_$").mkdir()
    (tmp_path / "run_$a_$" / "metrics.jsonl").write_text("\n")
    assert script("train.py", "--plot=run_$a_$").code == 0
    assert script("train.py", f"--plot={runs[0]},nowhere").out == "no metrics.jsonl in nowhere yet\nwrote loss.png\n"
    result = script("train.py", "--plot=nowhere")
    assert result.code == 2 and "no metrics.jsonl in nowhere" in result.err


def test_missing_extras_are_named(script, tiny_run, monkeypatch):
    for name in ("torch.utils.tensorboard", "wandb", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    for flag, package in (
        ("--loss_plot", "matplotlib"), ("--plot=x", "matplotlib"), ("--wandb_log", "wandb"),
        ("--tensorboard_log", "tensorboard"),
    ):  # fmt: skip
        result = script("train.py", *tiny_run.flags, flag)
        assert result.code == 2 and f"pip install {package}" in result.err, result.err


def wandb_records(folder):
    """The records in the .wandb file of an offline run: LevelDB's log format behind seven bytes, with protobufs in it
    (https://github.com/google/leveldb/blob/main/doc/log_format.md)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole, at = whole + content[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb_offline_run_is_continued_on_resume(start_process, tiny_run, tmp_path):
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_PROJECT": "mine", "WANDB_SILENT": "true"}
    for flags in (["--max_iters=10"], ["--init_from=resume"]):
        process = start_process("train.py", *tiny_run.flags, "--wandb_log", "--wandb_run_name=n", *flags, env=env)
        assert process.wait() == 0, process.communicate()
    runs, history = [], []
    for folder in sorted((tmp_path / "wandb").glob("offline-run-*")):
        for record in wandb_records(folder):
            if record.WhichOneof("record_type") == "run":
                runs.append((record.run.project, record.run.display_name, record.run.run_id))
            elif record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                history.append(items)
    assert len(set(runs)) == 1 and runs[0][:2] == ("mine", "n")
    assert read_checkpoint(tiny_run.out / LATEST)["wandb_id"] == runs[0][2]
    by_step = {}
    for row in history:
        by_step.setdefault(row["iter"], {}).update(row)
    for row in metrics(tiny_run.out):
        assert (
            by_step[row["iter"]].items() >= {k: v for k, v in row.items() if k != "memory"}.items() or row["iter"] == 10
        )
    assert sum("loss" in row for row in by_step.values()) == 20


@pytest.mark.parametrize("stop", [9, 10])  # the resumed run does not repeat the evaluation of step 9, but that of 10
def test_tensorboard_has_the_run(train, tiny_run, stop):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*tiny_run.flags, "--tensorboard_log", "--sample_interval=10"]
    train(flags, f"--max_iters={stop}")
    train(flags, "--init_from=resume", "--max_iters=20")
    events = EventAccumulator(str(tiny_run.out / "tensorboard"))
    events.Reload()
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "tokens", "val/loss", "val/bits_per_byte"):
        rows = {r["iter"]: r[name] for r in metrics(tiny_run.out) if name in r}
        assert {e.step: e.value for e in events.Scalars(name)} == pytest.approx(rows, rel=1e-5)
        assert len(events.Scalars(name)) == len(rows)  # and none twice
    (text,) = events.Tensors("sample/text_summary")[-1].tensor_proto.string_val
    assert text.decode() == [r["sample"] for r in metrics(tiny_run.out) if "sample" in r][-1]


def test_eval_iters_0_counts_every_validation_token_once(train, tiny, tiny_run):
    train(tiny_run.flags)
    result = train([], f"--init_from={tiny_run.out}", "--eval_only", "--eval_iters=0", "--device=cpu", "--batch_size=3")
    tokens = Dataset(tiny).split("val")
    model, total = from_checkpoint(read_checkpoint(tiny_run.out / BEST)).eval(), 0.0
    for start in range(0, len(tokens) - 1, 16):
        xy = torch.from_numpy(tokens.read(start, min(17, len(tokens) - start)).astype("int64"))[None]
        logits, _ = model(xy[:, :-1], xy[:, 1:])
        total += torch.nn.functional.cross_entropy(logits[0], xy[0, 1:], reduction="sum").item()
    loss = total / (len(tokens) - 1)
    shown = re.search(r"val loss ([\d.]+), perplexity [\d.]+, ([\d.]+) bits per byte, ([\d,]+) tokens", result.out)
    assert (len(tokens) - 1) % 16 and int(shown[3].replace(",", "")) == len(tokens) - 1
    assert float(shown[1]) == pytest.approx(loss, abs=1e-4)
    assert float(shown[2]) == pytest.approx(loss / math.log(2), abs=2e-4)  # a character of the text is a byte


def test_environment_sets_defaults_and_flags_override(script, train, tiny_run, monkeypatch):
    for variable, value in (("SAVE_INTERVAL", "7"), ("MIXED_PRECISION", "false"), ("WANDB_PROJECT", "mine")):
        monkeypatch.setenv(variable, value)
    shown = script("train.py", "--help").out
    for line in ("--save_interval=7 ", "[env: SAVE_INTERVAL=7]", "--dtype='float32'", "--wandb_project='mine'"):
        assert line in shown
    flags = [flag for flag in tiny_run.flags if not flag.startswith("--dtype")]
    result = train(flags, "--max_iters=8")
    assert "dtype float32 (as set)" in result.out
    assert read_checkpoint(tiny_run.out / "ckpt_prev.pt")["iter_num"] == 7
    config = read_checkpoint(tiny_run.out / LATEST)["config"]
    assert config["wandb_project"] == "mine" and config["save_interval"] == 7
    train(flags, "--save_interval=5", "--max_iters=6")
    assert read_checkpoint(tiny_run.out / "ckpt_prev.pt")["iter_num"] == 5
    for variable, message in (
        ("SAVE_INTERVAL", "SAVE_INTERVAL: save_interval must be an integer"),
        ("MIXED_PRECISION", "--dtype must be one of auto, float32, bfloat16, float16, got perhaps"),
    ):
        monkeypatch.setenv(variable, "perhaps")
        result = script("train.py", *flags)
        assert result.code == 2 and message in result.err
        monkeypatch.delenv(variable)


@pytest.mark.parametrize(
    "flags, doubt",
    [
        (["--min_lr=0.1"], "min_lr exceeds learning_rate"),
        (["--lr_decay_iters=30"], "lr_decay_iters exceeds max_iters"),
        (["--min_lr=0.001"], None),
    ],
)
def test_doubtful_settings_give_one_warning(script, tiny_run, flags, doubt):
    result = script("train.py", *tiny_run.flags, "--min_lr=0.001", *flags)
    warnings = [line for line in result.out.splitlines() if line.startswith("WARNING")]
    assert [w for w in warnings if doubt and doubt in w] == warnings and len(warnings) == bool(doubt)


def test_loss_worse_than_guessing_gives_a_warning(train, tiny_run):
    assert "worse than guessing" not in train(tiny_run.flags).out
    result = train(tiny_run.flags, "--learning_rate=20")
    assert "WARNING: this loss is worse than guessing" in result.out
    assert max(map(len, result.out.splitlines())) < 250  # the perplexity is rounded


def test_setup_is_printed(train, tiny_run):
    out = train(tiny_run.flags, "--max_iters=10").out
    for line in (
        r"device:   cpu \(.*\), dtype float32 \(as set\)",
        r"data:     .*tiny0, [\d,]+ training tokens, [\d,]+ validation tokens",
        r"model:    0.01M parameters: 2 layers, 2 heads, 16 channels",
        r"run:      10 steps of 128 tokens \(2 x 4 x 16\), 0.\d+ epochs",
    ):  # fmt: skip
        assert re.search(f"^{line}$", out, re.MULTILINE), line


def test_run_that_is_all_warmup_says_so(train, tiny_run):
    assert "epochs, all of them warmup\n" in train(tiny_run.flags, "--max_iters=3", "--warmup_iters=3").out
    assert "of them warmup" not in train(tiny_run.flags, "--max_iters=3", "--warmup_iters=2").out


TRIAL = [
    "--max_iters=60", "--n_layer=1", "--n_head=2", "--n_kv_head=0", "--n_embd=16", "--block_size=16", "--batch_size=1",
    "--gradient_accumulation_steps=1", "--eval_iters=1", "--sample_interval=0", "--wandb_log=False", "--device=cpu",
    "--compile=False",
]  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_trial_of_a_preset_prints_no_warning(train, tiny, tmp_path, path):
    if re.search(r"^init_from", path.read_text(), re.MULTILINE):
        pytest.skip("it needs weights of the Hub")
    out = train([path, f"--dataset={tiny}", f"--out_dir={tmp_path / 'out'}", *TRIAL]).out
    assert "WARNING" not in out and "run:      60 steps of 16 tokens" in out


def test_progress_lines_count_the_steps_and_the_time_left(train, tiny_run, monkeypatch):
    clock = itertools.count()  # a second per call: three per step, of which the last is the progress line's
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr("model.peak_flops", lambda device, dtype: (None, "not measured"))
    out = train(tiny_run.flags, "--max_iters=10").out + train(tiny_run.flags, "--init_from=resume").out
    lines = re.findall(r"^iter (\d+): .* (\d+) of (\d+) steps, eta (unknown|0:00:\d\d), lr", out, re.MULTILINE)
    assert [tuple(map(int, line[:3])) for line in lines] == [(i, i + 1, 10 if i < 10 else 20) for i in range(20)]
    for run in (lines[:10], lines[10:]):
        assert run[0][3] == "unknown"  # the first step compiles
        seconds = [int(line[3][-2:]) for line in run[1:]]
        assert seconds == [round((9 - k) * (3 * k - 1) / k) for k in range(1, 10)]


def test_printed_commands_work_in_a_shell(train, tiny_run, tmp_path):
    folder = tmp_path / "an out; dir"
    out_dir = f"--out_dir={folder}"
    train(tiny_run.flags, out_dir)
    finished = train(tiny_run.flags, out_dir, "--init_from=resume").out
    command = re.search(r"to train longer: (python train\.py .*)", finished)[1]
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    options = dict(shell=True, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    longer = subprocess.run(command, **options)
    assert longer.returncode == 0 and read_checkpoint(folder / LATEST)["iter_num"] == 40, longer.stderr
    command = re.search(r"^done: .*; (python sample\.py .*)", longer.stdout, re.MULTILINE)[1]
    sampled = subprocess.run(command + " --max_new_tokens=2 --device=cpu", **options)
    assert sampled.returncode == 0 and sampled.stdout.count("-----") >= 10, sampled.stderr
