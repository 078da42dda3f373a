"""LoRA compared with peft's own models, the chain rule, and uninterrupted runs."""

import json
import os

import pytest
import torch
from conftest import assert_same_state, metrics
from peft import PeftModel
from transformers import AutoModelForCausalLM

import model as gpt
from data.shards import Dataset, eval_windows
from model import BEST, GPT, LATEST, GPTConfig, add_lora, merge_lora, read_checkpoint, save_checkpoint

MODERN = dict(norm="rmsnorm", position="rope", mlp="swiglu", n_kv_head=2, tied=False)
LORA = dict(base="x", rank=4, alpha=8, dropout=0.0, targets="c_attn,c_proj,c_fc")
ARCHITECTURES = {"gpt2": {}, "llama": MODERN, "qwen3": MODERN | dict(qk_norm=True)}


def adapted(lora=LORA, **settings):
    """A small model with an adapter that has learned something."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=61, block_size=24, bias=False, **settings))
    add_lora(model, **lora)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def ids(*shape):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_equals_unmerged_and_base_is_unchanged(name):
    model, X = adapted(**ARCHITECTURES[name]), ids(2, 24)
    frozen = {k: p.clone() for k, p in model.named_parameters() if not p.requires_grad}
    loss = model(X, X, return_logits=False)[1]
    loss.backward()
    model.configure_optimizers(0.1, 0.1, (0.9, 0.99), "cpu").step()
    assert all(torch.equal(p, frozen[k]) for k, p in model.named_parameters() if k in frozen)
    assert all(p.grad is not None for k, p in model.named_parameters() if k not in frozen)
    assert gpt.weights_to_save(model).keys() == {k for k, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        while_training, _ = model(X, X)
        before, _ = model.eval()(X, X)
        gpt.enable_lora(model, False)
        base, _ = model(X, X)
        gpt.enable_lora(model, True)
        merge_lora(model)
        after, _ = model(X, X)
    torch.testing.assert_close(while_training, before, rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() < 1e-5 and (base - before).abs().max() > 0.1
    assert all(p.requires_grad for p in model.parameters()) and "lora" not in str(model)


@pytest.mark.parametrize("way", ["float32", "bfloat16", "compiled", "recomputed"])
def test_adapter_gradients_follow_the_chain_rule(way):
    model, whole, X = adapted(), adapted(), ids(2, 24)
    merge_lora(whole)
    bfloat16 = way == "bfloat16"
    if way == "recomputed":
        gpt.enable_gradient_checkpointing(model)
    if way == "compiled":
        # traced and differentiated by the compiler, which then calls PyTorch's kernels: its own take long to build,
        # and test_compiled_training_gives_the_same_losses has them
        model.compile(backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        for m in (model, whole):
            m(X, X, return_logits=False)[1].backward()
    tolerance = 0.05 if bfloat16 else 1e-5
    for name, layer in gpt.lora_layers(model):
        grad = whole.get_submodule(name).weight.grad
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for thin, expected in ((A.grad, 2 * B.T @ grad), (B.grad, 2 * grad @ A.T)):  # alpha / rank is 2
            assert (thin - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("targets", ["c_attn,c_proj,c_fc", "attn.c_proj,c_fc"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exported_adapter_equals_peft(name, targets, tmp_path):
    model, X = adapted(LORA | dict(targets=targets), **ARCHITECTURES[name]), ids(2, 24)
    gpt.save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        tuned, _ = model.eval()(X, X)
        merge_lora(model)
        base = adapted(LORA | dict(targets=targets), **ARCHITECTURES[name])
        for _, layer in gpt.lora_layers(base):
            torch.nn.init.zeros_(layer.lora_B["default"].weight)
        merge_lora(base)
        gpt.save_pretrained(base, tmp_path / "base")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter")
        torch.testing.assert_close(theirs(X).logits, tuned, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8
    assert len({path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}) == 1  # all as readable


@pytest.fixture
def lora_run(train, tiny_run, tmp_path):
    """Flags of a run that adapts a trained one, which lies in tmp_path / "base"; the adapter goes to tiny_run.out."""
    train(tiny_run.flags, f"--out_dir={tmp_path / 'base'}")
    lora = ["--lora_rank=2", "--lora_alpha=4", "--lora_dropout=0.1", "--learning_rate=0.02", "--eval_interval=5"]
    return [*tiny_run.flags, *lora, "--sample_interval=20", f"--init_from={tmp_path / 'base'}"]


def test_resumed_adapter_equals_uninterrupted(train, sample, lora_run, tiny_run, tmp_path):
    base = {path: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    train(lora_run)
    train(lora_run, f"--out_dir={tmp_path / 'halves'}", "--max_iters=10")
    train([], "--init_from=resume", f"--out_dir={tmp_path / 'halves'}", "--max_iters=20", "--device=cpu")
    whole = read_checkpoint(tiny_run.out / LATEST)
    assert_same_state(whole, read_checkpoint(tmp_path / "halves" / LATEST))
    assert {path: path.read_bytes() for path in (tmp_path / "base").iterdir()} == base
    assert all(".lora_" in name for name in whole["model"]) and len(whole["model"]) == 2 * 2 * 4
    sizes = [p.stat().st_size for p in (tiny_run.out / LATEST, tmp_path / "base" / LATEST)]
    assert sizes[0] < 0.9 * sizes[1]  # of so small a model the adapter is much

    best = min(r["val/loss"] for r in metrics(tiny_run.out) if "val/loss" in r)
    assert best < min(r["val/loss"] for r in metrics(tmp_path / "base") if "val/loss" in r)
    result = train(["--device=cpu", "--dtype=float32"], f"--init_from={tiny_run.out}", "--eval_only")
    assert f"val loss {best:.4f}" in result.out
    result = sample(f"--out_dir={tiny_run.out}", "--start=Call", "--max_new_tokens=30", "--num_samples=1")
    assert result.out.startswith("Call")


def test_adapter_with_shorter_block_size(train, sample, lora_run, tiny_run):
    flags = ["--block_size=8", "--max_iters=4"]
    train(lora_run, *flags)
    train([], "--init_from=resume", f"--out_dir={tiny_run.out}", "--max_iters=8", "--device=cpu", "--dtype=float32")
    assert read_checkpoint(tiny_run.out / LATEST)["model_args"]["block_size"] == 8
    assert sample(f"--out_dir={tiny_run.out}", "--start=Call", "--max_new_tokens=30", "--num_samples=1").out


def test_fsdp_adapters_equal_one_process(train, start_process, lora_run, tiny_run, tmp_path):
    lora_run += ["--lora_dropout=0.0", "--dropout=0.0", "--max_iters=8"]
    train(lora_run)
    alone = read_checkpoint(tiny_run.out / LATEST)["model"]
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *lora_run)
    process = start_process(*run, "--fsdp", f"--out_dir={tmp_path / 'sharded'}")
    assert process.wait() == 0, process.communicate()
    together = read_checkpoint(tmp_path / "sharded" / LATEST)["model"]
    assert alone.keys() == together.keys()
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-3, atol=1e-5)


def test_compare_and_export(train, sample, lora_run, tiny, tiny_run, tmp_path):
    train(lora_run)
    out = sample(f"--out_dir={tiny_run.out}", "--compare", "--start=Call", "--num_samples=2", "--max_new_tokens=9").out
    tokens = Dataset(tiny).split("val")
    xy = torch.from_numpy(tokens.windows(eval_windows(len(tokens), 16, 256), 17))
    for title, folder in (("base", tmp_path / "base"), ("adapter of rank 2", tiny_run.out)):
        model = gpt.load_model(str(folder), gpt.open_checkpoint(str(folder))[0]).eval()
        loss = model(xy[:, :-1], xy[:, 1:])[1].item()
        flat = " ".join(out.split())
        assert title in flat and f"{loss:.4f}" in flat, (title, loss, out)
    assert out.count(" | Call") == 2

    flags = (f"--out_dir={tiny_run.out}", f"--export={tmp_path / 'hub'}")
    merge_lora(model)
    sample(*flags, "--merge")
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")(xy[:1, :-1]).logits
    torch.testing.assert_close(logits, model(xy[:1, :-1], xy[:1, 1:])[0], rtol=1e-4, atol=1e-5)
    assert "contains another model or adapter" in sample(*flags, code=2).err
    sample(f"--out_dir={tiny_run.out}", f"--export={tmp_path / 'adapter'}")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    for folder in (tmp_path / "adapter", tmp_path / "base", tiny_run.out):
        refused = sample(*flags, f"--export={folder}", "--merge", code=2)
        assert "contains another model or adapter" in refused.err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--init_from=scratch"], "LoRA needs pretrained weights: set --init_from"),
        (["--muon"], "Muon cannot be combined with LoRA"),
        (["--lora_targets=c_attn,lm_head"], "lora_targets must be some of c_attn, c_fc, c_proj, attn.c_attn"),
        (["--lora_rank=-1"], "--lora_rank must be at least 0, got -1"),
        (["--out_dir={base}"], "the adapter needs the checkpoint in"),
        (["--out_dir={base}", "--init_from=resume"], "base/ckpt.pt has 0"),
    ],
)
def test_wrong_input_is_one_line(script, lora_run, tmp_path, flags, message):
    result = script("train.py", *lora_run, *(flag.format(base=tmp_path / "base") for flag in flags))
    errors = [line for line in result.err.splitlines() if not line.startswith("settings:")]
    assert result.code == 2 and len(errors) == 1 and message in errors[0]


def test_adapter_needs_its_unchanged_base(script, train, lora_run, tiny_run, tmp_path):
    train(lora_run, "--max_iters=5")
    again = script("train.py", *lora_run, f"--init_from={tiny_run.out}", f"--out_dir={tmp_path / 'second'}")
    assert again.code == 2 and "is an adapter: merge it first" in again.err
    given = script("train.py", "--init_from=resume", f"--out_dir={tiny_run.out}", "--lora_rank=0", "--device=cpu")
    assert given.code == 2 and "ckpt.pt has 2" in given.err

    base = read_checkpoint(tmp_path / "base" / BEST)
    base["model"]["lm_head.weight"][0, 0] += 1
    save_checkpoint(base, tmp_path / "base", BEST)
    for flags in (["train.py", "--init_from=resume"], ["sample.py"]):
        result = script(*flags, f"--out_dir={tiny_run.out}", "--device=cpu")
        assert result.code == 2 and "changed since the adapter was trained" in result.err
    for path in (tmp_path / "base").glob("*.pt"):
        path.unlink()
    result = script("sample.py", f"--out_dir={tiny_run.out}", "--device=cpu")
    assert result.code == 2 and f"(current directory {os.getcwd()}): no checkpoint in" in result.err
