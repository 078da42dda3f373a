import math
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from model import (
    ACTIVATIONS,
    GPT,
    GPTConfig,
    Int8Linear,
    KVCache,
    RMSNorm,
    ShortAttention,
    apply_rope,
    attend_one_token,
    compile_generation,
    enable_gradient_checkpointing,
    flops_per_token,
    from_checkpoint,
    model_args,
    orthogonalize,
    pack_weights,
    peak_flops,
    quantize,
    rope_cos_sin,
    sample_next,
)

SMALL = dict(block_size=16, vocab_size=61, n_layer=2, n_head=4, n_embd=32)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=4
)
ARCHITECTURES = [
    dict(),
    dict(bias=False),
    dict(norm="rmsnorm", position="rope", mlp="swiglu", n_kv_head=1, bias=False),
    dict(norm="rmsnorm", position="rope", mlp="relu2", n_kv_head=2, qk_norm=True, tied=False, head_dim=6),
    dict(position="rope", qk_norm=True, n_hidden=40, rope_scaling=LLAMA3),
]


def small(seed=0, **settings):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SMALL, **settings})).eval()
    for p in model.parameters():  # larger weights than at initialization, so that mistakes show
        p.data += 0.3 * torch.randn_like(p) / math.sqrt(p.size(-1))
    return model


def uncached(model, idx, n, slide=1, **sampling):
    """What generate() has to equal: the whole window again for each token."""
    size = model.config.block_size
    window = idx[:, -size:]
    for _ in range(n):
        if window.size(1) > size:
            window = window[:, slide:]
        logits, _ = model(window)
        token = sample_next(logits[:, -1], **sampling)[:, None]
        window, idx = torch.cat((window, token), 1), torch.cat((idx, token), 1)
    return idx


@pytest.mark.parametrize("settings", ARCHITECTURES)
@pytest.mark.parametrize("slide", [1, 5])
@pytest.mark.parametrize("prompt", [1, 7, 20])
@torch.no_grad()
def test_cached_generation_equals_uncached(prompt, slide, settings):
    model = small(**settings)
    idx = torch.randint(61, (3, prompt))
    for sampling in (dict(temperature=0), dict(temperature=0.9, top_k=20), dict(top_p=0.8)):
        draw = [{**sampling, "generator": torch.Generator().manual_seed(7)} for _ in range(2)]
        expected = uncached(model, idx, 30, slide, **draw[0])
        assert model.generate(idx, 30, slide=slide, **draw[1]).tolist() == expected.tolist()
    assert len(set(expected[0, prompt:].tolist())) > 3  # it is no constant text that agrees


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("settings", ARCHITECTURES)
def test_cache_filled_in_chunks_equals_no_cache(settings, gradients):
    model, idx = small(**settings), torch.randint(61, (2, 12))
    with torch.set_grad_enabled(gradients):
        expected, _ = model(idx)
        for ends in ([12], [5, 12], [1, 2, 9, 11, 12]):
            caches = [KVCache(16) for _ in range(2)]
            for end in ends:
                logits = model.next_logits(idx[:, :end], caches)
            torch.testing.assert_close(logits, expected[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", ARCHITECTURES)
@torch.no_grad()
def test_model_is_causal(settings):
    model, idx = small(**settings), torch.randint(61, (1, 16))
    changed = idx.clone()
    changed[0, 10] = (idx[0, 10] + 1) % 61
    a, b = (model(x, x)[0] for x in (idx, changed))
    torch.testing.assert_close(a[:, :10], b[:, :10], atol=0, rtol=0)
    assert not torch.allclose(a[:, 10], b[:, 10])


@pytest.mark.parametrize("settings", ARCHITECTURES)
@torch.no_grad()
def test_compiled_decoding_has_static_shapes_and_equals_eager(settings, monkeypatch):
    model, idx = small(**settings), torch.randint(61, (3, 4))
    draw = lambda: dict(slide=5, generator=torch.Generator().manual_seed(7))  # noqa: E731
    expected, positions = model.generate(idx, 40, **draw()), []

    def record(step, **options):
        def recorded(token, pos, caches):
            positions.append(pos.item())
            assert token.stride() == (1,)  # another stride would be compiled again
            assert token.shape == (3,) and caches[0].visible == caches[0].k.size(2) == 16
            return step(token, pos, caches)

        return recorded

    monkeypatch.setattr(torch, "compile", record)
    compile_generation(model)
    assert model.generate(idx, 40, **draw()).tolist() == expected.tolist()
    assert positions[:12] == list(range(4, 16)) and len(positions) > 30


@torch.no_grad()
def test_compiled_models_keep_apart_and_follow_shapes(monkeypatch):
    idx, compile, traced = torch.randint(61, (3, 4)), torch.compile, []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    def compile_without_kernels(step, options, **kwargs):
        guards = {"guard_filter_fn": options["guard_filter_fn"]}
        return compile(step, backend=backend, options=guards, **kwargs)

    monkeypatch.setattr(torch, "compile", compile_without_kernels)
    models = [small(seed=0), small(seed=1)]
    # the second model is not run by the first one's code, nor a batch by another one's; nothing is compiled twice
    contexts = [idx[:1], idx, idx[:, :2], idx[:1]]
    expected = [model.generate(x, 8, top_k=1).tolist() for x in contexts for model in models]
    for model in models:
        compile_generation(model)
    assert [model.generate(x, 8, top_k=1).tolist() for x in contexts for model in models] == expected
    assert expected[0] != expected[1] and len(traced) == 4


@pytest.mark.parametrize("settings", ARCHITECTURES)
@torch.no_grad()
def test_int8_weights_give_close_logits(settings):
    model, idx = small(**settings | dict(n_embd=64, vocab_size=64)), torch.randint(61, (3, 16))
    (logits, loss), count = model(idx, idx), model.get_num_params()
    quantize(model)
    matrices = [b for b in model.buffers() if b.dtype == torch.int8]
    assert len(matrices) == 2 * 4 + 1 and sum(b.numel() for b in matrices) > 0.8 * count
    for _ in range(2):  # in float32, then in bfloat16, which has a kernel for few rows
        again, loss_again = model(idx, idx)
        assert model(idx, idx, return_logits=False)[1] == loss_again
        assert 0 < (again - logits).abs().max() < 0.05 * logits.abs().max() and abs(loss_again - loss) < 0.05
        few, _ = model(idx[:1, :4])
        torch.testing.assert_close(few[0, -1].float(), logits[0, 3], atol=0.05 * logits.abs().max().item(), rtol=0)
        model.to(torch.bfloat16)


@torch.no_grad()
def test_packed_weights_give_the_same_logits():
    models = [small(n_kv_head=2, n_embd=64).to(torch.bfloat16) for _ in range(4)]
    idx = torch.randint(61, (10, 9))
    pack_weights(models[1])
    quantize(models[2])
    pack_weights(models[3])
    quantize(models[3])  # after packing, the same as without
    packed = [type(module).__name__ for module in models[1].modules()].count("PackedLinear")
    assert packed == 2 * 4 + 1 or not torch.backends.mkldnn.is_available()
    logits, same, quantized, again = (model(idx)[0].float() for model in models)
    torch.testing.assert_close(same, logits, atol=0.02 * logits.abs().max().item(), rtol=0)
    assert torch.equal(quantized, again) and not torch.equal(quantized, logits)


def test_stream_ends_when_all_rows_are_finished():
    model, idx = small(), torch.randint(61, (4, 3))
    draw = lambda **extra: dict(generator=torch.Generator().manual_seed(3), **extra)  # noqa: E731
    free = model.generate(idx, 200, **draw())[:, 3:]
    stop = [int(free[0, 5]), int(free[1, 9])]
    stopped = model.generate(idx, 200, **draw(stop=stop))[:, 3:].tolist()
    ends = [next(i for i, token in enumerate(row) if token in stop) for row in free.tolist()]
    assert len(stopped[0]) == max(ends) + 1 < 200
    for row, unstopped, end in zip(stopped, free.tolist(), ends, strict=True):  # rows do not depend on each other
        assert row[: end + 1] == unstopped[: end + 1] and set(row[end + 1 :]) <= {stop[0]}


def test_sample_next_respects_top_k_and_top_p():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probs.log().expand(2000, 4)
    seen = lambda **settings: set(sample_next(logits, **settings).tolist())  # noqa: E731
    torch.manual_seed(0)
    assert seen() == {0, 1, 2, 3} == seen(top_k=0, top_p=0.0) == seen(top_k=9, top_p=1.0)
    assert seen(top_k=2) == {0, 1}
    tied = torch.tensor([[3.0, 3.0, 1.0, 3.0]]).expand(100, 4)
    assert len(set(sample_next(tied, top_k=2).tolist())) == 2 and sample_next(tied, top_k=1).unique().numel() == 1
    assert seen(top_p=1e-300) == {0} == seen(top_p=0.4) and seen(top_p=0.51) == {0, 1} and seen(top_p=0.85) == {0, 1, 2}
    assert seen(temperature=0) == {0} == seen(temperature=1e-300)
    share = (sample_next(logits, temperature=0.5) == 0).float().mean().item()
    assert share == pytest.approx(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025), abs=0.04)


@pytest.mark.parametrize("settings", ARCHITECTURES)
def test_adamw_groups_cover_all_parameters_and_matrices_decay(settings):
    model = small(**settings)
    groups = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    assert {p.dim() for p in groups[0]["params"]} == {2} and groups[0]["weight_decay"] == 0.1
    assert {p.dim() for p in groups[1]["params"]} == {1} and groups[1]["weight_decay"] == 0.0


@pytest.mark.parametrize("settings", ARCHITECTURES)
def test_muon_equals_torch_optim_muon(settings):
    a, b = small(**settings), small(**settings)
    ours = a.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu", muon=True, dtype=torch.bfloat16, muon_momentum=0.9)
    grouped = [p for group in ours.param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(a.parameters()))
    hidden = [p for p in b.transformer.h.parameters() if p.dim() == 2]
    assert [p.shape for p in ours.param_groups[2]["params"]] == [p.shape for p in hidden]
    rest = [p for p in b.parameters() if not any(p is q for q in hidden)]
    decay = [
        {"params": [p for p in rest if (p.dim() == 2) == matrix], "weight_decay": 0.1 * matrix} for matrix in (1, 0)
    ]
    theirs = [
        torch.optim.AdamW(decay, lr=1e-2, betas=(0.9, 0.95)),
        torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(5):
        torch.manual_seed(step)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in (ours, *theirs):
            optimizer.step()
    for p, q, start in zip(a.parameters(), b.parameters(), small(**settings).parameters(), strict=True):
        moved = (q - start).square().mean().sqrt().item()  # Newton-Schulz in bfloat16 differs with the order of sums
        torch.testing.assert_close(p, q, atol=0.1 * moved, rtol=0)


def test_orthogonalize_keeps_singular_directions():
    torch.manual_seed(0)
    for shape in ((3, 8, 20), (3, 20, 8), (1, 8, 8)):
        matrices = torch.randn(shape)
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        s = u.mT @ orthogonalize(matrices) @ vh.mT  # in the matrix's own singular directions
        diagonal = s.diagonal(dim1=1, dim2=2)
        assert 0.6 < diagonal.min() and diagonal.max() < 1.3 and (s - torch.diag_embed(diagonal)).abs().max() < 1e-4
        # gradients near the smallest number of float16, 6e-8
        tiny = orthogonalize(2**-23 * matrices, torch.float16)
        assert torch.equal(tiny, orthogonalize(matrices, torch.float16))


def test_fused_adamw_equals_plain_adamw():
    a, b = small(bias=True), small(bias=True)
    fused = a.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    assert fused.param_groups[0]["fused"]
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in b.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in b.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-2, betas=(0.9, 0.95), fused=False, foreach=False,
    )  # fmt: skip
    for step in range(5):
        torch.manual_seed(step)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        fused.step()
        plain.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", ARCHITECTURES)
def test_flops_per_token_equals_flop_counter(settings):
    model = small(**settings)
    idx = torch.randint(61, (2, 17))
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
    assert flops_per_token(model, 16) * 2 * 16 == counter.get_total_flops()


def test_peak_flops_measured_on_cpu_and_unknown_on_mps():
    flops, source = peak_flops("cpu", torch.float32)
    assert flops > 1e8 and "measured" in source
    assert peak_flops("mps", torch.float32) == (None, "peak of mps unknown")


def test_init_weights_and_initial_loss():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL))
    stds = {name: p.std().item() for name, p in model.named_parameters()}
    assert stds["transformer.wte.weight"] == pytest.approx(0.02, rel=0.1)
    assert stds["transformer.h.1.attn.c_attn.weight"] == pytest.approx(0.02, rel=0.1)
    assert stds["transformer.h.1.mlp.c_proj.weight"] == pytest.approx(0.02 / math.sqrt(4), rel=0.1)
    assert model.transformer.h[0].attn.c_attn.bias.abs().max() == 0 and model.transformer.ln_f.weight.min() == 1
    _, loss = model(torch.randint(61, (4, 16)), torch.randint(61, (4, 16)))
    assert loss.item() == pytest.approx(math.log(61), abs=0.1)


def test_gpt2_parameter_count():
    with torch.device("meta"):
        assert GPT(GPTConfig(vocab_size=50257)).get_num_params(non_embedding=False) == 124439808


@torch.no_grad()
def test_crop_block_size():
    model, idx = small(), torch.randint(61, (2, 8))
    before, _ = model(idx)
    model.crop_block_size(8)
    assert torch.equal(model(idx)[0], before) and model.transformer.wpe.weight.untyped_storage().nbytes() == 8 * 32 * 4
    with pytest.raises(ValueError, match="block_size of 8"):
        model(torch.randint(61, (2, 9)))
    with pytest.raises(ValueError, match="exceeds the model's 8"):
        model.crop_block_size(9)


def test_bfloat16_gradients_are_close_to_float32():
    grads = {}
    for enabled in (False, True):
        model = small()
        idx = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(idx[:, :-1], idx[:, 1:])[1].backward()
        grads[enabled] = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.nn.functional.cosine_similarity(grads[True], grads[False], dim=0) > 0.999


@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_short_attention_and_gradients_equal_sdpa(n_kv_head, dtype, tolerance):
    results = []
    for attend in (ShortAttention.apply, partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)):
        torch.manual_seed(0)
        inputs = [torch.randn(2, 12, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, n_kv_head, n_kv_head)]
        y = attend(*(x.to(dtype if attend is ShortAttention.apply else torch.float32) for x in inputs))
        y.backward(torch.randn(2, 12, 4, 8).transpose(1, 2).to(y.dtype))
        results.append((y, *(x.grad for x in inputs)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.float(), theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_attend_one_token_equals_sdpa_with_a_mask(n_kv_head):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, n_kv_head, 12, 8), torch.randn(2, n_kv_head, 12, 8)
    mask = torch.arange(12)[None] <= 7
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(attend_one_token(q, k, v, mask), expected, atol=1e-5, rtol=1e-5)


def test_int8_in_float16_does_not_overflow():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(64, 32, bias=False).half(), torch.zeros(1, 64).half()
    x[0, 5] = 800
    y, expected = Int8Linear(linear)(x), linear(x)
    assert y.isfinite().all() and (y - expected).abs().max() < 0.02 * expected.abs().max()


def test_attend_one_token_takes_any_memory_layout(monkeypatch):
    # CUDA's memory-efficient kernel stores (B, H, T, D) as (B, T, H, D)
    q, k, v = (torch.randn(2, n, s, 8) for n, s in ((6, 1), (2, 5), (2, 5)))
    expected = attend_one_token(q, k, v, None)
    name, swap = "scaled_dot_product_attention", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(torch.nn.functional, name, lambda *x: swap(scaled_dot_product_attention(*x)))
    assert torch.equal(attend_one_token(q, k, v, None), expected)


def test_attention_dropout_rescales_forward_and_backward():
    """y is linear in v, so the gradient of v has to be that of the very weights that made y."""
    q, k = torch.randn(2, 2, 3, 64, 8)
    v = torch.randn(2, 3, 64, 8, requires_grad=True)
    torch.manual_seed(1)
    y = ShortAttention.apply(q, k, v, 0.25)
    y.sum().backward()
    assert (v.grad * v).sum().item() == pytest.approx(y.sum().item(), rel=1e-4)
    torch.manual_seed(1)
    eye = torch.eye(64).expand(2, 3, 64, 64)
    weights = ShortAttention.apply(torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 64, 64), eye, 0.25)
    seen = weights[:, :, -1]  # of all 64 tokens, a 64th each
    assert (seen == 0).float().mean().item() == pytest.approx(0.25, abs=0.1)
    torch.testing.assert_close(seen[seen > 0], torch.full_like(seen[seen > 0], 1 / 64 / 0.75))


@pytest.mark.parametrize("settings", [dict(), dict(tied=False, vocab_size=50304)])
def test_linear_cross_entropy_equals_loss_with_logits(settings):
    """The larger vocabulary takes several pieces, and several tiles in each."""
    results = []
    for return_logits in (True, False):
        model, count = small(**settings), 1500 if settings else 64
        idx = torch.randint(61, (count // 4, 5), generator=torch.Generator().manual_seed(1))
        targets = idx[:, 1:].clone()
        targets[0] = targets[5, 2] = -1
        logits, loss = model(idx[:, :-1], targets, return_logits=return_logits)
        assert (logits is None) == (not return_logits)
        with torch.no_grad():
            assert model(idx[:, :-1], targets, return_logits=return_logits)[1] == loss
        (3 * loss).backward()
        results.append((loss, *(p.grad for p in model.parameters())))
    for with_logits, without in zip(*results, strict=True):
        torch.testing.assert_close(without, with_logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", ARCHITECTURES)
def test_gradient_checkpointing_keeps_loss_and_gradients(settings):
    grads, losses = [], []
    for checkpointing in (False, True):
        model = small(dropout=0.2, **settings).train()
        if checkpointing:
            enable_gradient_checkpointing(model)
        idx = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(1))
        torch.manual_seed(2)
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] == losses[1] and torch.equal(*grads)


def test_squared_relu_and_gradient_equal_autograd():
    results = []
    for activation in (ACTIVATIONS["relu2"], lambda x: torch.nn.functional.relu(x).square()):
        torch.manual_seed(0)
        x = torch.randn(5, 7, requires_grad=True)
        activation(x).backward(torch.randn(5, 7))
        results.append((activation(x), x.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rms_norm_and_gradients_equal_torch():
    results = []
    for kind in (RMSNorm, torch.nn.RMSNorm):
        torch.manual_seed(0)
        norm = kind(32, eps=1e-3)
        torch.nn.init.normal_(norm.weight)
        x = torch.randn(2, 5, 32, requires_grad=True)
        y = norm(x)
        y.backward(torch.randn(2, 5, 32))
        results.append((y, x.grad, norm.weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rope_depends_on_distances_only():
    model = small(position="rope", n_layer=1, block_size=64)
    idx = torch.randint(61, (1, 8))
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8)
    scores = []
    for start in (0, 5, 40):
        cos, sin = rope_cos_sin(torch.tensor([start, start + 3]), model.config)
        scores.append((apply_rope(q, cos[:1], sin[:1]) * apply_rope(k, cos[1:], sin[1:])).sum().item())
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)
    changed = idx.flip(1)[:, [7, *range(1, 7), 0]]  # and without learned positions the order still counts
    assert not torch.allclose(model(idx)[0], model(changed)[0])


def test_crop_block_size_with_rope():
    model = small(position="rope")
    model.crop_block_size(8)
    with pytest.raises(ValueError, match="block_size of 8"):
        model(torch.randint(61, (2, 9)))


@pytest.mark.parametrize("settings", ARCHITECTURES)
def test_model_args_round_trip(settings):
    config = GPTConfig(**SMALL, **settings)
    assert GPTConfig(**model_args(config)) == config
    classic = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias"}
    assert (set(model_args(config)) == classic) == (set(settings) <= {"bias"})  # what nanoGPT's GPTConfig takes
    model = small(**settings)
    again = from_checkpoint({"model": model.state_dict(), "model_args": model_args(config)}).eval()
    idx = torch.randint(61, (2, 9))
    assert torch.equal(again(idx)[0], model(idx)[0])


def test_inconsistent_config_is_refused():
    for wrong, message in (
        (dict(n_kv_head=3), "multiple of n_kv_head"),
        (dict(norm="batchnorm"), "norm must be one of layernorm, rmsnorm"),
        (dict(position="alibi"), "position must be one of learned, rope"),
        (dict(mlp="relu"), "mlp must be one of gelu, gelu_tanh, swiglu, relu2"),
        (dict(position="rope", head_dim=7), "even head_dim, got 7"),
        (dict(position="rope", rope_scaling=(8.0, 1.0, 4.0, 4)), "rope_scaling must be a dict"),
        (dict(n_head=3), "multiple of n_head"),
        (dict(n_layer=0), "n_layer must be at least 1"),
        (dict(rope_theta=0.0), "rope_theta must be at least 1"),
        (dict(n_kv_head=-1), "n_kv_head must be at least 0"),
        (dict(n_layer=10**12), "parameters: lower them"),
    ):
        with pytest.raises(ValueError, match=message):
            GPTConfig(**{**SMALL, **wrong})


def test_all_mismatched_weights_are_named():
    model = small()
    weights = dict(model.state_dict(), stray=torch.zeros(2))
    del weights["lm_head.weight"]
    with pytest.raises(ValueError, match='Missing key.*"lm_head.weight".*Unexpected key.*"stray"'):
        from_checkpoint({"model": weights, "model_args": SMALL})
