"""config/scale.py: a compute-optimal run from its number of layers."""

import dataclasses
import re

import pytest

import configurator
from data.shards import Dataset
from model import GPT, GPTConfig, flops_per_token, round_vocab_size


@pytest.fixture
def scale(tiny):
    """scale(n_layer=2, ...) returns the settings that config/scale.py assigns after the given ones."""
    defaults = {name: eval(default) for name, default, *_ in configurator.setting_lines("train.py") if name}

    def run(**given):
        given = {"dataset": tiny, "block_size": 64} | given
        return configurator.read_config("config/scale.py", {}, defaults | given, given)

    return run


def tokens_per_step(run, block_size=64):
    return run["gradient_accumulation_steps"] * run["batch_size"] * block_size


def test_run_follows_from_the_number_of_layers(scale, tiny, capsys):
    run = scale(n_layer=2)
    shape = {field.name: run[field.name] for field in dataclasses.fields(GPTConfig) if field.name in run}
    vocab_size = round_vocab_size(Dataset(tiny).vocab_size)
    model = GPT(GPTConfig(**shape, n_layer=2, block_size=64, bias=False, vocab_size=vocab_size))
    parameters = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "wte" not in name)
    step = tokens_per_step(run)
    assert step & (step - 1) == 0 and 2**-0.5 <= step / (1.6 * (10 * parameters) ** 0.5) <= 2**0.5
    assert 0 <= run["max_iters"] * step - 10 * parameters < step
    assert (run["n_embd"], run["n_head"], run["muon"], run["warmup_iters"]) == (128, 4, True, run["max_iters"] // 20)
    flops = float(re.search(r"([\d.e+]+) FLOPs", capsys.readouterr().out)[1])
    assert flops == pytest.approx(flops_per_token(model, 64) * run["max_iters"] * step, rel=0.01)


def test_expected_loss_falls_with_more_layers(scale, capsys):
    for n_layer in (2, 3, 4):
        scale(n_layer=n_layer)
    expected = re.findall(r"([\d.]+) bits per byte", capsys.readouterr().out)
    assert len(expected) == 3 and sorted(expected, reverse=True) == expected


def test_given_values_win(scale):
    given = dict(
        n_embd=96, n_head=2, norm="layernorm", position="learned", mlp="gelu", qk_norm=False, tied=True, batch_size=3,
        gradient_accumulation_steps=5, max_iters=7, muon=False, learning_rate=1.0, weight_decay=0.0, beta2=0.5,
        warmup_iters=1, lr_schedule="cosine", wsd_decay_frac=0.3, min_lr=0.1, eval_interval=3, eval_iters=2,
    )  # fmt: skip
    assert scale(n_layer=2, **given) == given
    assert scale(n_layer=2).keys() == given.keys()


def test_other_values_follow_from_given_ones(scale):
    wide, small = scale(n_layer=1, n_embd=256), scale(n_layer=1, batch_size=2)
    assert wide["n_head"] == 4 and wide["max_iters"] > scale(n_layer=1)["max_iters"]
    assert tokens_per_step(small) == tokens_per_step(scale(n_layer=1))
    assert scale(n_layer=1, max_iters=100)["warmup_iters"] == 5


@pytest.mark.parametrize("ranks", [3, 8])
def test_micro_batches_are_divided_among_the_ranks(scale, monkeypatch, ranks):
    alone = tokens_per_step(scale(n_layer=4))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    run = scale(n_layer=4)
    assert run["gradient_accumulation_steps"] % ranks == 0
    assert 0.7 < tokens_per_step(run) / alone <= 1


def test_dataset_is_optional(scale, capsys):
    # bench.py measures on random tokens, with GPT-2's vocabulary
    assert scale(n_layer=1, dataset="absent")["n_embd"] == 64
    assert "0 epochs" in capsys.readouterr().out


def test_wrong_sizes_are_left_to_train(scale):
    # which names the flag in one line
    for wrong in (dict(batch_size=0), dict(gradient_accumulation_steps=0), dict(max_iters=0)):
        assert scale(n_layer=1, **wrong).items() >= wrong.items()
