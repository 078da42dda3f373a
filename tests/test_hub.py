"""Import and export of weights and tokenizers, compared with transformers."""

import json
import os
import subprocess

import pytest
import safetensors.torch
import torch
import transformers
from conftest import TEXT, options
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from data.tokenizer import CharTokenizer, from_description, from_hub, from_name, same_tokens
from model import (
    GPT,
    LATEST,
    GPTConfig,
    from_hf_config,
    from_pretrained,
    get_num_params,
    hf_parts,
    open_checkpoint,
    read_checkpoint,
    save_pretrained,
    to_hf_config,
)

GPT2 = dict(n_embd=32, n_head=4, n_layer=2, vocab_size=99, n_positions=128)
LLAMA = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=99, max_position_embeddings=128,
)  # fmt: skip
STRETCHED = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
CONFIGS = {
    "gpt2": GPT2Config(**GPT2),
    "gpt2, exact gelu, another width": GPT2Config(**GPT2, activation_function="gelu", n_inner=80),
    "gpt2, untied": GPT2Config(**GPT2, tie_word_embeddings=False),
    "llama": LlamaConfig(**LLAMA),
    "llama, tied, biases": LlamaConfig(**LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama, stretched": LlamaConfig(**LLAMA, rope_parameters=STRETCHED),
    "llama, linear": LlamaConfig(**LLAMA, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
    "llama, yarn": LlamaConfig(**LLAMA, head_dim=32, rope_parameters=YARN),
    "qwen3, yarn": Qwen3Config(**LLAMA, head_dim=32, rope_parameters=dict(**YARN, beta_fast=8, attention_factor=0.9)),
    "llama, wide heads": LlamaConfig(**{**LLAMA, "num_key_value_heads": 4}, head_dim=12),
    "llama, biases of attention": LlamaConfig(**LLAMA, attention_bias=True),
    "mistral": MistralConfig(**LLAMA, sliding_window=None),
    "mistral, a window": MistralConfig(**{**LLAMA, "max_position_embeddings": 256}, sliding_window=128),
    "qwen2": Qwen2Config(**LLAMA),
    "qwen3": Qwen3Config(**LLAMA, head_dim=16),
    "qwen3, tied": Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=True),
}


def random_model(config):
    """A model of transformers whose weights, gains and biases included, are all random."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=0.5, std=0.3)
    # settings that go out as they came in; no end token, so that texts have a fixed length
    model.config.pad_token_id, model.config.initializer_range = 5, 0.03
    model.generation_config = transformers.GenerationConfig(bos_token_id=3, pad_token_id=5, repetition_penalty=1.1)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_import_and_export_keep_logits_and_text(name, tmp_path):
    theirs = random_model(CONFIGS[name])
    theirs.save_pretrained(tmp_path / "in")
    ours = from_pretrained(str(tmp_path / "in")).eval()
    idx = torch.randint(99, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, atol=1e-5, rtol=0)
    options = dict(max_new_tokens=64, do_sample=False, repetition_penalty=1.0, eos_token_id=None)
    text = theirs.generate(idx, attention_mask=torch.ones_like(idx), **options)
    assert torch.equal(ours.generate(idx, 64, temperature=0), text)

    save_pretrained(ours, str(tmp_path / "out"), eot=7)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    is_llama = name.startswith(("mistral", "qwen2"))  # Llama has what these have
    assert type(again) is (transformers.LlamaForCausalLM if is_llama else type(theirs))
    assert again.generation_config.to_dict() == theirs.generation_config.to_dict()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id") + (() if is_llama else ("initializer_range",)):
        assert getattr(again.config, key) == getattr(theirs.config, key)
    with torch.no_grad():
        assert torch.equal(again(idx).logits, theirs(idx).logits)
    same = from_pretrained(str(tmp_path / "out"))
    assert same.config == ours.config
    for key, value in ours.state_dict().items():
        assert torch.equal(same.state_dict()[key], value), key


def test_weights_of_the_base_model_alone_are_read(tmp_path):
    theirs = random_model(CONFIGS["llama, tied, biases"])
    theirs.save_pretrained(tmp_path)
    weights = {key.removeprefix("model."): value for key, value in theirs.model.state_dict().items()}
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    idx = torch.randint(99, (2, 40))
    with torch.no_grad():
        expected = theirs(idx).logits
        torch.testing.assert_close(from_pretrained(str(tmp_path))(idx, idx)[0], expected, atol=1e-5, rtol=0)


def test_adapter_folder_is_merged_into_its_base(script, tmp_path):
    peft = pytest.importorskip("peft")
    base = random_model(CONFIGS["llama"])
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    idx = torch.randint(99, (2, 40))
    assert open_checkpoint(str(tmp_path / "adapter")) == (None, None)
    with torch.no_grad():
        logits = from_pretrained(str(tmp_path / "adapter"))(idx, idx)[0]
        torch.testing.assert_close(logits, theirs(idx).logits, atol=1e-5, rtol=0)
    # an export does not replace the base
    byte_tokenizer(tmp_path / "base")
    flags = [f"--init_from={tmp_path / 'adapter'}", "--device=cpu"]
    refused = script("sample.py", *flags, f"--export={tmp_path / 'base'}")
    assert refused.code == 2 and "contains another model" in refused.err
    assert script("sample.py", *flags, f"--export={tmp_path / 'merged'}").code == 0
    # an adapter for other modules would leave the base as it was
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = {key.replace("q_proj", "other"): weight for key, weight in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(weights, path)
    with pytest.raises(OSError, match="missing adapter keys"):
        from_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(OSError, match="names no base model"):
        from_pretrained(str(tmp_path / "adapter"))


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapter_of_one_tied_matrix_unties_them(target, tmp_path):
    peft = pytest.importorskip("peft")
    random_model(CONFIGS["llama, tied, biases"]).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=[target], init_lora_weights=False)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours, idx = from_pretrained(str(tmp_path / "adapter")), torch.randint(99, (2, 40))
    save_pretrained(ours, str(tmp_path / "out"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = theirs(idx).logits
        for logits in (ours(idx, idx)[0], again(idx).logits):
            torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-5)


def test_export_has_a_row_per_token_of_the_tokenizer(tmp_path):
    ours = GPT(GPTConfig(block_size=16, vocab_size=1088, n_layer=1, n_head=2, n_embd=16)).eval()
    save_pretrained(ours, str(tmp_path), eot=1049, vocab_size=1050)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.lm_head.weight.shape == (1050, 16) and theirs.generation_config.eos_token_id == 1049
    idx = torch.randint(1050, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours(idx, idx)[0][..., :1050], atol=1e-5, rtol=0)
        again = from_pretrained(str(tmp_path))
        assert torch.equal(again(idx, idx)[0], ours(idx, idx)[0][..., :1050])
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1  # the weights as readable as the rest
    save_pretrained(ours, str(tmp_path), vocab_size=1000)  # other reasons for more rows than tokens
    assert AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.shape == (1088, 16)


@pytest.mark.parametrize("settings", [dict(), dict(bias=False), dict(bias=False, mlp="gelu_tanh")])
def test_gpt2_exports_with_and_without_biases(settings, tmp_path):
    ours = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=2, n_head=2, n_embd=16, **settings)).eval()
    save_pretrained(ours, str(tmp_path))
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    theirs.eval()
    idx = torch.randint(65, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours(idx, idx)[0], atol=1e-5, rtol=0)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["n_ctx"] == 64 and written["eos_token_id"] is None
    assert written["activation_function"] == ("gelu_new" if "mlp" in settings else "gelu")


def test_config_json_has_the_rope_fields_of_transformers_4_and_5(tmp_path):
    random_model(CONFIGS["llama, stretched"]).save_pretrained(tmp_path / "in")
    save_pretrained(from_pretrained(str(tmp_path / "in")), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5
    assert written["rope_scaling"]["rope_type"] == "llama3" and written["rope_scaling"]["factor"] == 8.0


@pytest.mark.parametrize("name, n_layer, n_embd", [("", 12, 768), ("-medium", 24, 1024), ("-large", 36, 1280)])
def test_gpt2_sizes(name, n_layer, n_embd):
    config = GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 64)
    with torch.device("meta"):
        ours, theirs = GPT(GPTConfig(**from_hf_config(config))), transformers.GPT2LMHeadModel(config)
    assert get_num_params(ours, non_embedding=False) == sum(p.numel() for p in theirs.parameters())
    parts = [part for key, weight in ours.state_dict().items() for part in hf_parts(key, weight, ours.config)]
    assert {name: part.shape for name, part in parts} == {name: w.shape for name, w in theirs.state_dict().items()}


@pytest.mark.parametrize("shards", [dict(), dict(max_shard_size="20KB")])
def test_sharded_and_bin_files_are_read(shards, tmp_path):
    theirs = random_model(CONFIGS["llama"])
    theirs.save_pretrained(tmp_path, **shards)
    expected = from_pretrained(str(tmp_path)).state_dict()
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 if shards else len(files) == 1
    for path in files:
        os.remove(path)
    if not shards:
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        (tmp_path / "model.safetensors.index.json").unlink()
        keys = list(theirs.state_dict())
        halves = {"pytorch_model-1.bin": keys[: len(keys) // 2], "pytorch_model-2.bin": keys[len(keys) // 2 :]}
        for file, part in halves.items():
            torch.save({key: theirs.state_dict()[key] for key in part}, tmp_path / file)
        index = {"metadata": {}, "weight_map": {key: file for file, part in halves.items() for key in part}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for key, value in from_pretrained(str(tmp_path)).state_dict().items():
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize(
    "config, message",
    [
        (transformers.MixtralConfig(**LLAMA), "unsupported model type mixtral"),
        (transformers.Qwen3MoeConfig(), "unsupported model type qwen3_moe"),
        (transformers.GemmaConfig(), "unsupported model type gemma"),
        (Qwen3Config(**LLAMA, use_sliding_window=True, sliding_window=8), "use_sliding_window=True"),
        (Qwen3Config(**LLAMA, attention_bias=True), "attention_bias=True"),
        (LlamaConfig(**LLAMA, hidden_act="gelu"), "hidden_act=gelu"),
        (LlamaConfig(**LLAMA, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), "dynamic"),
        (LlamaConfig(**LLAMA, rope_parameters=dict(**YARN, truncate=False)), "truncate"),
        (GPT2Config(**GPT2, activation_function="relu"), "activation_function=relu"),
        (GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    ],
)
def test_unsupported_configs_are_refused_by_name(script, config, message, tmp_path):
    config.save_pretrained(tmp_path)  # a config alone: the weights would be missing
    result = script("sample.py", f"--init_from={tmp_path}", "--device=cpu")
    assert result.code == 2 and message in result.err and "Traceback" not in result.err


def test_mismatched_weights_are_named(tmp_path):
    random_model(CONFIGS["llama"]).save_pretrained(tmp_path)
    weights = {key: value for key, value in random_model(CONFIGS["llama"]).state_dict().items()}
    del weights["model.norm.weight"]
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    weights["model.layers.0.mlp.experts"] = torch.zeros(3)
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError) as e:
        from_pretrained(str(tmp_path))
    for part in ("missing model.norm.weight", "mismatched", "up_proj.weight", "unexpected", "mlp.experts"):
        assert part in str(e.value)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", b"{", "config.json of"),
        ("config.json", b"[]", "config.json of"),
        ("model.safetensors", b"damaged", "cannot load the weights of"),
        ("tokenizer.json", b"{", "tokenizer.json"),
        ("model.safetensors", None, "cannot load the weights of"),
    ],
)
def test_corrupt_folder_gives_one_line(script, file, content, message, tmp_path):
    random_model(CONFIGS["llama"]).save_pretrained(tmp_path)
    byte_tokenizer(tmp_path)
    (tmp_path / file).write_bytes(content) if content else (tmp_path / file).unlink()
    result = script("sample.py", f"--init_from={tmp_path}", "--device=cpu")
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 2 and len(errors) == 1 and message in errors[0] and "Traceback" not in result.err


def test_pickled_code_in_a_bin_file_does_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "it ran"), "w")

    CONFIGS["llama"].save_pretrained(tmp_path)
    torch.save({"model.norm.weight": Hostile()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="cannot load the weights"):
        from_pretrained(str(tmp_path))
    assert not (tmp_path / "it ran").exists()


def test_export_without_an_architecture_is_refused():
    shape = dict(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=8)
    for settings, message in (
        (dict(norm="rmsnorm", position="rope", mlp="relu2"), "mlp=relu2"),
        (dict(position="rope"), "norm=layernorm"),
        (dict(norm="rmsnorm", position="rope", mlp="swiglu", qk_norm=True), "bias=True"),
        (dict(n_kv_head=1), "n_kv_head=1"),
    ):
        with pytest.raises(ValueError, match=message):
            to_hf_config(GPTConfig(**shape, **settings), {})


def check_round_trip(tokenizer, text, folder):
    ids = tokenizer.encode(text).tolist()
    tokenizer.save_pretrained(str(folder / "a"))
    theirs = AutoTokenizer.from_pretrained(folder / "a")
    assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
    ours = from_description(json.loads(json.dumps(from_hub(str(folder / "a")))))
    assert ours.encode(text).tolist() == ids and ours.decode(ids) == "".join(ours.decode_stream(ids)) == text
    assert ours.count_bytes([-1, *ids[:-1]], ids) == len(text.replace("<|endoftext|>", "").encode())
    assert ours.eot == tokenizer.eot
    assert same_tokens(ours.description, tokenizer.description)
    ours.save_pretrained(str(folder / "b"))  # what came from files goes back to the same files
    assert {p.name: p.read_bytes() for p in (folder / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (folder / "b").iterdir()
    }


HARD = "Hello  world,\n\n 你好 🙂\t again\u2028 ' s . <unk>\r\n"


def test_character_tokenizers_round_trip(tmp_path):
    check_round_trip(CharTokenizer(sorted(set(HARD))), HARD, tmp_path)


def test_tiktoken_tokenizers_round_trip(tmp_path, monkeypatch):
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b"he": 256, b"ll": 257, b"hell": 258}
    specials = {"<|endoftext|>": 260}  # with a gap before it
    encoding = tiktoken.Encoding("gpt2", pat_str=r"\s?\w+|\s+|.", mergeable_ranks=ranks, special_tokens=specials)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    check_round_trip(from_name("gpt2"), HARD + "hello<|endoftext|>", tmp_path)


def test_gpt2s_tokenizer_round_trips(tmp_path):
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with the gpt2 vocabulary")
    check_round_trip(from_name("gpt2"), HARD + "<|endoftext|>", tmp_path)


def test_same_tokens():
    assert same_tokens({"kind": "char", "characters": "ab"}, {"kind": "char", "characters": "ab"})
    assert not same_tokens({"kind": "char", "characters": "ab"}, {"kind": "char", "characters": "ba"})
    assert not same_tokens({"kind": "char", "characters": "ab"}, {"kind": "char", "characters": "abc"})


def test_tokenizer_files_stay_in_their_folder(tmp_path):
    CharTokenizer("ab").save_pretrained(str(tmp_path / "in"))
    description = from_hub(str(tmp_path / "in"))
    description["files"]["../escaped"] = "text"
    from_description(description).save_pretrained(str(tmp_path / "out"))
    assert not (tmp_path / "escaped").exists() and len(list((tmp_path / "out").iterdir())) == 2


def byte_tokenizer(folder):
    """Write a byte-level tokenizer as transformers has them, with a token that it puts before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize(
    "changes",
    [
        dict(normalizer=dict(type="Precompiled", precompiled_charsmap="/////wAA")),  # at loading
        dict(pre_tokenizer=dict(type="FixedLength", length=0)),  # at encoding
    ],
)
def test_tokenizer_that_panics_gives_one_line(script, tmp_path, changes):
    random_model(CONFIGS["llama"]).save_pretrained(tmp_path)
    byte_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    result = script("sample.py", f"--init_from={tmp_path}", "--device=cpu")
    assert result.code == 2 and result.err.count("error: cannot ") == 1 and "Traceback" not in result.err


def test_documents_and_prompts_have_the_same_special_tokens(tmp_path):
    from data.documents import Piece, Texts
    from data.preparation import write_dataset
    from data.shards import Dataset

    fast = byte_tokenizer(tmp_path / "in")
    texts = ["a </s> b", "c", "long " * 9]
    cut = [Piece(text, True, split) for split in ("train", "val") for text in texts[:2]]
    cut += [Piece("long " * 4, False, "train"), Piece("long " * 5, True, "train")]
    for recognized in (False, True):
        settings = options(tokenizer=str(tmp_path / "in"), special_tokens=recognized)
        write_dataset(str(tmp_path / f"{recognized}"), Texts(cut, "a test"), settings)
        data = Dataset(str(tmp_path / f"{recognized}"))
        expected = [[*fast(text, split_special_tokens=not recognized)["input_ids"], 1] for text in texts]
        train = data.split("train")
        assert train.read(0, len(train)).tolist() == sum(expected, [])
        tokenizer = from_description(data.tokenizer)
        assert [[*tokenizer.prompt(text).tolist(), 1] for text in texts] == expected
        assert tokenizer.count_bytes([1, *expected[1][:-1]], expected[1]) == 1
    # a description without the record: as before
    assert from_name(str(tmp_path / "in")).prompt("a</s>").tolist() == fast("a</s>")["input_ids"]
    with pytest.raises(ValueError, match="--special_tokens: a char tokenizer"):
        write_dataset(str(tmp_path / "x"), Texts(cut, "a test"), options(tokenizer="char", special_tokens=True))


ADDED = {"content": "<|endoftext|>", "__type": "AddedToken"}


@pytest.mark.parametrize("config", [{"model_max_length": 1024}, {"eos_token": ADDED}, None])
@pytest.mark.parametrize("model", [{"model_type": "gpt2"}, None])
def test_end_of_text_is_found_where_transformers_finds_it(tmp_path, config, model):
    from_name("bpe:300", lambda n: [TEXT]).save_pretrained(str(tmp_path))
    for name, content in (("tokenizer_config.json", config), ("config.json", model)):
        (tmp_path / name).unlink(missing_ok=True)
        if content:
            (tmp_path / name).write_text(json.dumps(content))
    theirs = AutoTokenizer.from_pretrained(tmp_path).eos_token_id or 299  # else by its usual name
    assert theirs == from_name(str(tmp_path)).eot == from_name(str(tmp_path / "tokenizer.json")).eot == 299
    from_name(str(tmp_path)).save_pretrained(str(tmp_path / "out"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 299


def test_transformers_folder_is_finetuned_and_exported(script, tiny_run, tiny, tmp_path):
    theirs = random_model(LlamaConfig(**{**LLAMA, "vocab_size": 300}))
    theirs.save_pretrained(tmp_path / "in")
    fast = byte_tokenizer(tmp_path / "in")
    from data.documents import Piece, Texts
    from data.preparation import write_dataset

    tokenizer = from_name(str(tmp_path / "in"))
    assert tokenizer.eot == 1 and tokenizer.prompt("a").tolist() == fast("a")["input_ids"]
    assert len(tokenizer.prompt("a")) == 2 and len(tokenizer.encode("a")) == 1
    pieces = [Piece(TEXT * 40, False, "train"), Piece(TEXT * 5, False, "val")]
    write_dataset(str(tmp_path / "data"), Texts(pieces, "a test"), options(tokenizer=str(tmp_path / "in")))
    flags = [flag for flag in tiny_run.flags if not flag.startswith(("--n_", "--dataset"))]
    begin = [*flags, f"--init_from={tmp_path / 'in'}", "--sample_interval=20"]
    result = script("train.py", *begin, f"--dataset={tmp_path / 'data'}", "--gradient_checkpointing")
    assert result.code == 0, result.err
    assert "bits per byte" in result.out
    refused = script("train.py", *begin, f"--dataset={tiny}", f"--out_dir={tmp_path / 'other'}")
    assert refused.code == 2 and "another tokenizer" in refused.err
    resumed = script("train.py", *flags, f"--dataset={tmp_path / 'data'}", "--init_from=resume", "--max_iters=22")
    assert resumed.code == 0 and read_checkpoint(tiny_run.out / LATEST)["iter_num"] == 22

    result = script("sample.py", f"--init_from={tiny_run.out / LATEST}", f"--export={tmp_path / 'hub'}")
    assert result.code == 0, result.err
    again, fast_again = (c.from_pretrained(tmp_path / "hub") for c in (AutoModelForCausalLM, AutoTokenizer))
    assert type(again).__name__ == "LlamaForCausalLM" and again.config.eos_token_id == theirs.config.eos_token_id
    assert again.config.max_position_embeddings == 128  # though trained on 16 tokens at a time
    assert fast_again("Call me")["input_ids"] == fast("Call me")["input_ids"]
    text = "Call me"
    x = fast_again(text, return_tensors="pt")["input_ids"]
    ids = again.generate(x, max_new_tokens=9, do_sample=False, repetition_penalty=1.0)[0]
    expected = fast_again.decode(ids[1:])  # without the BOS that the tokenizer adds
    for source in (f"--init_from={tiny_run.out / LATEST}", f"--init_from={tmp_path / 'hub'}"):
        flags = [f"--start={text}", "--temperature=0", "--num_samples=1", "--max_new_tokens=9", "--dtype=float32"]
        assert script("sample.py", source, *flags, "--device=cpu").out == f"{expected}\n---------------\n"
    # generation ends at any of the model's end tokens
    path = tmp_path / "hub" / "generation_config.json"
    end_ids = [-1, 10**30, "</s>", 299, ids[-4].item()]  # the first three cannot be ids of this model
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": end_ids}))
    end = ids.tolist().index(ids[-4], x.size(1))
    for extra in ([], ["--stream"]):
        ended = script("sample.py", source, *flags, *extra, "--device=cpu").out
        assert ended == f"{fast_again.decode(ids[1:end])}\n---------------\n"


def test_export_dtype(script, finished_char_run, tmp_path):
    for flags, expected in (([], torch.float32), (["--dtype=bfloat16"], torch.bfloat16)):
        result = script("sample.py", f"--out_dir={finished_char_run}", f"--export={tmp_path}", "--device=cpu", *flags)
        assert result.code == 0, result.err
        assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == expected


@pytest.fixture
def finished_char_run(script, tiny_run):
    assert script("train.py", *tiny_run.flags, "--max_iters=2").code == 0
    return tiny_run.out


@pytest.mark.parametrize("script_name", ["sample.py", "train.py"])
def test_code_in_a_model_folder_does_not_run(start_process, tiny_run, tmp_path, script_name):
    folder, ran = tmp_path / "evil", tmp_path / "ran"
    folder.mkdir()
    auto = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": auto}))
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    flags = tiny_run.flags if script_name == "train.py" else ["--start=-", "--device=cpu"]
    process = start_process(script_name, *flags, f"--init_from={folder}", stdin=subprocess.PIPE)
    _, err = process.communicate("y\ny\ny\n")
    assert process.returncode == 2 and err.count("error: ") == 1 and "Traceback" not in err and not ran.exists()
