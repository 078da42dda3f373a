"""Tokenizers and datasets: what is read, what is refused, and which windows make up a batch."""

import builtins
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from data.shards import DataError, Dataset, eval_windows, load_batch, read_meta, show, shuffle, train_windows
from data.tokenizer import CharTokenizer, assumed_tokenizer, for_terminal, from_description, prompt_ids

# -----------------------------------------------------------------------------
# tokenizers


def test_char_tokenizer_round_trips_through_its_description():
    text = "añ𝄞\n b\u2028\U0010fffd"
    tokenizer = CharTokenizer(sorted(set(text)))
    again = from_description(json.loads(json.dumps(tokenizer.description)))
    ids = tokenizer.encode(text).tolist()
    assert again.encode(text).tolist() == ids
    assert again.decode(ids) == "".join(again.decode_stream(ids)) == text
    assert again.byte_lengths[ids].sum() == len(text.encode())


def test_char_tokenizer_names_unknown_characters():
    with pytest.raises(ValueError, match="no token for 'x' 'é'; the tokenizer knows 'ab'"):
        CharTokenizer("ab").encode("axbé")


def check_byte_pair_encoding(tokenizer):
    text = "Hello world, 你好 🙂<|endoftext|> again"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.eot in ids.tolist()
    pieces = list(tokenizer.decode_stream(ids))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert tokenizer.decode([tokenizer.vocab_size + 9]) == "\ufffd"
    assert tokenizer.byte_lengths[ids].sum() == len(text.replace("<|endoftext|>", "").encode())
    assert from_description(tokenizer.description).encode(text).tolist() == ids.tolist()


def test_tiktoken_tokenizer_with_a_made_up_encoding(monkeypatch):
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b"he": 256, b"ll": 257}
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r"\s?\w+|\s+|.", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    check_byte_pair_encoding(from_description({"kind": "tiktoken", "name": "gpt2"}))


def test_gpt2_tokenizer():
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with the gpt2 vocabulary")
    tokenizer = from_description({"kind": "tiktoken", "name": "gpt2"})
    check_byte_pair_encoding(tokenizer)
    assert tokenizer.encode("Hello world").tolist() == [15496, 995] and tokenizer.vocab_size == 50257


def test_tiktoken_tokenizer_that_cannot_be_loaded_says_what_to_do(monkeypatch):
    import tiktoken

    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(ValueError, match="cannot load gpt2 .*TIKTOKEN_CACHE_DIR"):
        from_description({"kind": "tiktoken", "name": "gpt2"})


@pytest.mark.parametrize("description", [{"kind": "morse"}, {"kind": ["char"]}, {"kind": "char", "name": "x"}, None])
def test_unknown_descriptions_are_refused(description):
    with pytest.raises(ValueError, match="unknown tokenizer description"):
        from_description(description)


def test_gpt2s_tokenizer_is_assumed_only_if_the_size_fits():
    gpt2 = {"kind": "tiktoken", "name": "gpt2"}
    assert all(assumed_tokenizer(size) == gpt2 for size in (None, 50257, 50304))
    assert all(assumed_tokenizer(size) is None for size in (65, 32000, 100277, 128256))


def test_prompt_ids_are_those_that_the_model_knows():
    tokenizer = CharTokenizer("abc")
    assert prompt_ids(tokenizer, "cab", vocab_size=3) == [2, 0, 1]
    with pytest.raises(ValueError, match="token id 2, but the model's vocabulary ends at 1"):
        prompt_ids(tokenizer, "cab", vocab_size=2)
    with pytest.raises(ValueError, match="the prompt is empty"):
        prompt_ids(tokenizer, "", vocab_size=3)
    with pytest.raises(ValueError, match="the prompt is not UTF-8"):
        prompt_ids(tokenizer, "\udcff", vocab_size=3)


def test_text_for_a_terminal_has_no_control_characters():
    assert for_terminal("a\x1b[2J\tb\r\n\x9bc") == "a\ufffd[2J\tb\ufffd\n\ufffdc"


# -----------------------------------------------------------------------------
# streams and windows


def test_shards_are_one_stream(tmp_path):
    ids = np.random.default_rng(0).integers(0, 2**16, 1000).astype("<u2")
    for i, part in enumerate(np.split(ids, [1, 2, 400, 401])):
        part.tofile(tmp_path / f"train_{i:06}.bin")
    stream = Dataset(str(tmp_path)).split("train")
    assert len(stream) == 1000
    for start, count in ((0, 1000), (0, 1), (1, 5), (399, 3), (2, 399), (990, 10)):
        assert stream.read(start, count).tolist() == ids[start : start + count].tolist()
    assert stream.windows(np.array([0, 398]), 5).tolist() == [ids[:5].tolist(), ids[398:403].tolist()]


def test_shards_are_in_the_order_of_their_numbers(tmp_path):
    for i in (1, 2, 10):
        np.full(10, i, "<u2").tofile(tmp_path / f"x_train_{i}.bin")
    assert Dataset(str(tmp_path)).split("train").read(0, 30)[::10].tolist() == [1, 2, 10]


def test_more_shards_than_a_process_may_open(tmp_path):
    resource = pytest.importorskip("resource")
    for i in range(700):
        np.full(2, i, "<u2").tofile(tmp_path / f"train_{i:06d}.bin")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, before[1]))
    try:
        stream = Dataset(str(tmp_path)).split("train")
        stream.check(10, 700)
        assert stream.read(0, 1400).tolist() == [i // 2 for i in range(1400)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_check_names_what_does_not_fit_the_model(tiny):
    stream = Dataset(tiny).split("val")
    with pytest.raises(ValueError, match="--block_size=549 or less"):
        stream.check(1000, 99)
    with pytest.raises(ValueError, match="vocabulary ends at 9"):
        stream.check(16, 10)


def test_batch_is_inputs_and_targets_one_token_later(tiny):
    stream = Dataset(tiny).split("train")
    X, Y = load_batch(stream, np.array([5, 100]), 8, 99, "cpu")
    assert X.dtype == Y.dtype == torch.int64 and X.shape == Y.shape == (2, 8)
    assert X[1].tolist() == stream.read(100, 8).tolist() and Y[1].tolist() == stream.read(101, 8).tolist()


def test_batch_after_the_end_of_the_stream_has_no_targets(tiny):
    stream = Dataset(tiny).split("val")
    X, Y = load_batch(stream, np.array([len(stream) - 3, len(stream)]), 4, 99, "cpu")
    last = stream.read(len(stream) - 3, 3).tolist()
    assert X.tolist() == [[*last, 0], [0] * 4] and Y.tolist() == [[*last[1:], -1, -1], [-1] * 4]


def test_batch_with_an_unknown_id_is_an_error_that_names_it(tmp_path):
    for name, ids in (("train_1.bin", [1] * 30), ("train_2.bin", [1] * 25 + [70] + [1] * 4)):
        np.array(ids, "<u2").tofile(tmp_path / name)
    stream = Dataset(str(tmp_path)).split("train")
    assert load_batch(stream, np.array([0, 46]), 8, 65, "cpu")[1].max() == 1
    message = "train_2.bin has token id 70 in the window at token 50, but the vocabulary ends at 64"
    with pytest.raises(DataError, match=message):
        load_batch(stream, np.array([0, 50, 51]), 8, 65, "cpu")
    with pytest.raises(DataError, match="train_2.bin has token id 70 in the window at token 29,"):  # begins in train_1
        load_batch(stream, np.array([29]), 30, 65, "cpu")


@pytest.mark.parametrize("damage", [os.remove, lambda path: path.write_bytes(b"ab")])
def test_file_that_changes_during_a_run_is_an_error_that_names_it(tmp_path, damage):
    path = tmp_path / "train.bin"
    np.ones(100, "<u2").tofile(path)
    stream = Dataset(str(tmp_path)).split("train")
    damage(path)
    with pytest.raises(DataError, match=f"{tmp_path}: cannot read train.bin"):
        load_batch(stream, np.array([0]), 8, 65, "cpu")


def test_each_epoch_visits_every_window_once_in_another_order():
    n, T = 1000, 16
    per_epoch = (n - T) // T
    epochs = train_windows(n, T, 5, 0, 3 * per_epoch).reshape(3, per_epoch)
    for starts in epochs:
        assert sorted(np.diff(sorted(starts))) == [T] * (per_epoch - 1)
        assert starts.min() >= 0 and starts.max() + T + 1 <= n
    assert len({tuple(np.argsort(starts)) for starts in epochs}) == 3
    assert train_windows(n, T, 6, 0, per_epoch).tolist() != epochs[0].tolist()
    # a batch is a piece of that order, wherever it begins
    assert train_windows(n, T, 5, per_epoch - 3, 7).tolist() == epochs.flatten()[per_epoch - 3 :][:7].tolist()


def test_train_windows_never_change():
    # a run is resumed with the windows of the version that started it
    assert train_windows(14, 3, 0, 0, 6).tolist() == [5, 8, 2, 6, 3, 0]
    assert train_windows(10**9, 1024, 1337, 10**6, 3).tolist() == [741643143, 274791303, 716963719]


@pytest.mark.parametrize("n_tokens", [17, 18, 31, 32, 33, 48])
def test_windows_of_the_shortest_streams_stay_inside(n_tokens):
    starts = train_windows(n_tokens, 16, 0, 0, 50)
    assert starts.min() >= 0 and starts.max() + 17 <= n_tokens
    assert eval_windows(n_tokens, 16, 8).max() + 17 <= n_tokens


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1000, 4097])
def test_shuffle_is_a_permutation(n):
    keys = np.random.SeedSequence(n).generate_state(4, np.uint64)
    assert sorted(shuffle(np.arange(n), n, keys).tolist()) == list(range(n))


def test_shuffle_looks_random():
    order = shuffle(np.arange(100_000), 100_000, np.random.SeedSequence(1).generate_state(4, np.uint64))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02 and abs(np.corrcoef(order, range(100_000))[0, 1]) < 0.02
    assert np.mean(np.abs(np.diff(order)) < 100) < 0.004


def test_eval_windows_are_spread_and_do_not_overlap():
    starts = eval_windows(10_000, 16, 10)
    assert len(starts) == 10 and starts[0] == 0 and starts[-1] > 8500 and np.diff(starts).min() >= 16
    assert len(eval_windows(10_000, 16, 10**9)) == 9999 // 16


# -----------------------------------------------------------------------------
# formats


def test_meta_pkl_of_nanogpt_becomes_a_char_tokenizer(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}, "stoi": {}}))
    meta = read_meta(str(tmp_path))
    assert meta["vocab_size"] == 3 and from_description(meta["tokenizer"]).decode([2, 0]) == "ca"


def test_meta_pkl_of_words_trains_and_samples_like_nanogpts(tmp_path, script, tiny_run):
    words = ["the", "cat", "the cat", "\n"]
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 4, "itos": dict(enumerate(words)), "stoi": {}}))
    for split in ("train", "val"):
        (np.arange(400) % 4).astype("<u2").tofile(tmp_path / f"{split}.bin")
    result = script("train.py", *tiny_run.flags, f"--dataset={tmp_path}", "--max_iters=2")
    assert result.code == 0, result.err
    flags = [f"--out_dir={tiny_run.out}", "--device=cpu", "--num_samples=1", "--max_new_tokens=9"]
    result = script("sample.py", *flags, "--start=the cat\ncat")
    assert result.code == 0 and result.out.startswith("the cat\ncat"), result.err
    assert not result.out.removesuffix("\n---------------\n").replace("the", "").replace("cat", "").strip(" \n")
    tokenizer = from_description(read_meta(str(tmp_path))["tokenizer"])
    assert tokenizer.encode("the cat\nthecat").tolist() == [2, 3, 0, 1]
    result = script("sample.py", *flags, "--start=dog")
    assert result.code == 2 and "no token for 'd'" in result.err


@pytest.mark.parametrize("itos", [{0: "a"}, {0: 1, 1: 2}, ["a"], 7])
def test_meta_pkl_without_texts_still_has_a_vocabulary(tmp_path, itos):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 2, "itos": itos}))
    assert read_meta(str(tmp_path)) == {"vocab_size": 2}


@pytest.mark.parametrize("text", ['{"vocab_size": 5, "dtype": "uint16", "documents": null}', "[" * 100_000])
def test_meta_json_that_is_corrupt_is_refused(tmp_path, text):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(ValueError, match="meta.json is corrupt: delete it"):
        read_meta(tmp_path)


def test_meta_pkl_that_is_corrupt_or_hostile_is_refused(tmp_path):
    class Hostile:
        def __reduce__(self):
            return builtins.open, (str(tmp_path / "it ran"), "w")

    hostile = [pickle.dumps({"vocab_size": 3, "itos": Hostile()}), pickle.dumps(Hostile(), 0)]
    huge = b"\x80\x02I1\nr\xff\xff\xff\x7f."  # memo index 2**31 - 1
    corrupt = [b"", b"\x80\x05garbage", huge, *(pickle.dumps(meta) for meta in ({"vocab": 3}, {"vocab_size": 0}))]
    for content in hostile + corrupt:
        (tmp_path / "meta.pkl").write_bytes(content)
        with pytest.raises(ValueError, match="cannot read .*meta.pkl"):
            read_meta(str(tmp_path))
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("train.bin", b"", "0 tokens instead of 4,400"),
        ("train.bin", b"abc", "3 bytes, not a multiple of 2; prepare the dataset"),
        ("train.bin", b"ab" * 10, "10 tokens instead of 4,400"),
        ("train.bin", None, "no train.bin in"),
        ("preparing.json", b'{"meta": {"files": {}}}', "is not finished"),
        ("meta.json", b"{", "corrupt"),
        ("meta.json", b'{"vocab_size": 0, "dtype": "uint16"}', "corrupt"),
        ("meta.json", b'{"vocab_size": "many", "dtype": "uint16"}', "corrupt"),
        ("meta.json", b'{"vocab_size": 9, "dtype": "float64"}', "corrupt"),
        ("meta.json", b'{"vocab_size": 9, "dtype": "uint16", "files": {"train.bin": 3}}', "corrupt"),
    ],
)
def test_corrupt_folders_are_described(tiny, tmp_path, name, content, message):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Dataset(str(folder)).split("train")


def write_llmc(path, ids, magic=20240520, version=1, dtype="<u2", count=None):
    """Write a file with the header of llm.c."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype).tobytes())


def test_files_with_headers_and_raw_files_are_one_stream(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50257, 900)
    write_llmc(tmp_path / "fineweb_train_000001.bin", ids[:300])
    write_llmc(tmp_path / "fineweb_train_000002.bin", ids[300:301])
    ids[301:].astype("<u2").tofile(tmp_path / "fineweb_train_000010.bin")
    write_llmc(tmp_path / "fineweb_val_000000.bin", ids[::-1])
    data = Dataset(str(tmp_path))
    train, val = data.split("train"), data.split("val")
    assert train.read(0, len(train)).tolist() == ids.tolist() and val.read(0, len(val)).tolist() == ids[::-1].tolist()
    assert train.windows(np.array([298]), 5).tolist() == [ids[298:303].tolist()] and data.vocab_size is None
    val.check(100, 50257)


def test_uint32_files_of_llmc_have_llama3s_vocabulary(tmp_path, script, tiny_run, tiny):
    ids = np.arange(128000, 128256)
    for name in ("tiny_train.bin", "tiny_val.bin"):
        write_llmc(tmp_path / name, ids, magic=20240801, version=7, dtype="<u4")
    data = Dataset(str(tmp_path))
    assert data.split("train").read(0, 256).tolist() == ids.tolist() and data.vocab_size == 128256
    # they do not say which tokenizer, and GPT-2's has another size
    assert script("train.py", *tiny_run.flags, f"--dataset={tmp_path}", "--max_iters=1").code == 0
    sample = [f"--out_dir={tiny_run.out}", "--device=cpu", "--num_samples=1", "--max_new_tokens=1"]
    for flags in ([], [f"--export={tmp_path / 'export'}"]):
        result = script("sample.py", *sample, *flags)
        assert result.code == 2 and "no tokenizer for a vocabulary of 128256" in result.err
    assert script("sample.py", *sample, f"--dataset={tiny}", "--start=C").out.startswith("C")


WORDS = np.random.default_rng(0).integers(256, 50257, 4000)


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: write_llmc(path, WORDS, count=4001), "x_train_1.bin has 4,000 tokens instead of 4,001"),
        (lambda path: write_llmc(path, [], count=3), "x_train_1.bin has 0 tokens instead of 3"),
        (lambda path: path.write_bytes(np.array([20240520, 1, 0], "<i4").tobytes()), "x_train_1.bin is empty"),
        (lambda path: path.write_bytes(b""), "x_train_1.bin is empty"),
        (lambda path: path.write_bytes(b"abc"), "x_train_1.bin has 3 bytes, not a multiple of 2"),
        (lambda path: write_llmc(path, WORDS, 20240801, 7, "<u4"), "mixes GPT-2's and Llama 3's tokens"),
        (lambda path: write_llmc(path, WORDS, version=2), "x_train_1.bin has format version 2, only 1 is supported"),
        (lambda path: write_llmc(path, WORDS, dtype="<u4"), "x_train_1.bin has 8,000 tokens instead of 4,000"),
        (lambda path: WORDS.astype("<u4").tofile(path), "x_train_1.bin contains integers of 4 bytes or more"),
        (lambda path: WORDS.astype("<i8").tofile(path), "x_train_1.bin contains integers of 4 bytes or more"),
        (lambda path: WORDS.astype("<f4").tofile(path), "x_train_1.bin has token id .* the vocabulary ends at 50303"),
        (lambda path: WORDS.astype(">u2").tofile(path), "x_train_1.bin has token id .* the vocabulary ends at 50303"),
    ],
)
def test_files_of_another_kind_are_named_before_training(tmp_path, write, message):
    write(tmp_path / "x_train_1.bin")
    write_llmc(tmp_path / "x_val_0.bin", WORDS)
    with pytest.raises(ValueError, match=message):
        Dataset(str(tmp_path)).split("train").check(16, 50304)


def test_training_on_files_with_headers(tmp_path, script, tiny_run):
    for name in ("x_train_000001.bin", "x_train_000002.bin", "x_val_000000.bin"):
        write_llmc(tmp_path / name, WORDS)
    result = script("train.py", *tiny_run.flags, f"--dataset={tmp_path}", "--max_iters=2")
    assert result.code == 0, result.err


def test_show_prints_what_a_dataset_contains(tiny, tmp_path, capsys):
    show(tiny)
    out = capsys.readouterr().out
    for part in ("tokenizer: char", "source: a test", "train: 4,400 tokens, files: 1", "'Call me Ishmael", "[' ', 'e'"):
        assert part in out
    other = shutil.copytree(tiny, tmp_path / "other")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"source": "a\x1b[2J", "documents": {"train": "\x1b[2J"}}))
    show(str(other))
    assert "source: a\ufffd[2J" in (escaped := capsys.readouterr().out) and "\x1b" not in escaped
    command = [sys.executable, ROOT / "data" / "shards.py"]
    assert subprocess.run([*command, tiny], capture_output=True, text=True).stdout == out
    nowhere = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    assert nowhere.returncode == 2 and nowhere.stderr.startswith("error: no dataset in")
