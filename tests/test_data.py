import builtins
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from data.shards import Dataset, eval_windows, show, shuffle, train_windows
from data.tokenizer import CharTokenizer, from_description


def test_char_tokenizer_round_trips_through_its_description():
    text = "añ𝄞\n b\u2028\U0010fffd"
    tokenizer = CharTokenizer(sorted(set(text)))
    again = from_description(json.loads(json.dumps(tokenizer.description)))
    assert again.decode(again.encode(text)) == text and again.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert "".join(again.decode_stream(again.encode(text))) == text
    assert again.byte_lengths()[again.encode(text)].sum() == len(text.encode())


def test_unknown_characters_are_named():
    with pytest.raises(ValueError, match="no token for 'x' 'é'; the tokenizer knows 'ab'"):
        CharTokenizer("ab").encode("axbé")


def check_bpe(tokenizer):
    text = "Hello world, 你好 🙂<|endoftext|> again"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.eot in ids.tolist()
    pieces = list(tokenizer.decode_stream(ids))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert tokenizer.decode([tokenizer.vocab_size + 9]) == "\ufffd"
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
    assert from_description(tokenizer.description).encode(text).tolist() == ids.tolist()


def test_tiktoken_tokenizer_on_a_made_up_encoding(monkeypatch):
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b"he": 256, b"ll": 257}
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r"\s?\w+|\s+|.", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    check_bpe(from_description({"kind": "tiktoken", "name": "gpt2"}))


def test_gpt2_tokenizer():
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with the gpt2 vocabulary")
    tokenizer = from_description({"kind": "tiktoken", "name": "gpt2"})
    check_bpe(tokenizer)
    assert tokenizer.encode("Hello world").tolist() == [15496, 995] and tokenizer.vocab_size == 50257


def test_a_vocabulary_that_cannot_be_loaded_is_reported(monkeypatch):
    import tiktoken

    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR"):
        from_description({"kind": "tiktoken", "name": "gpt2"})
    with pytest.raises(ValueError, match="no encoding gpt7"):
        from_description({"kind": "tiktoken", "name": "gpt7"})
    for description in ({"kind": "morse"}, {"kind": ["char"]}, {"kind": "char", "characters": 3}, None):
        with pytest.raises(ValueError, match="describes no tokenizer"):
            from_description(description)


def test_shards_are_one_stream(tmp_path):
    ids = np.random.default_rng(0).integers(0, 2**16, 1000).astype("<u2")
    for i, part in enumerate(np.split(ids, [1, 2, 400, 401])):
        part.tofile(tmp_path / f"train_{i:06}.bin")
    stream = Dataset(str(tmp_path)).split("train")
    assert len(stream) == 1000
    for start, count in ((0, 1000), (0, 1), (1, 5), (399, 3), (2, 399), (990, 10)):
        assert stream.read(start, count).tolist() == ids[start : start + count].tolist()
    assert stream.windows(np.array([0, 398]), 5).tolist() == [ids[:5].tolist(), ids[398:403].tolist()]


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


def old_folder(folder, meta):
    """A dataset folder as nanoGPT's prepare scripts leave it."""
    for split in ("train", "val"):
        np.arange(100, dtype=np.uint16).__mod__(3).tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(meta if isinstance(meta, bytes) else pickle.dumps(meta))
    return Dataset(str(folder))


def test_a_classic_folder_with_meta_pkl(tmp_path):
    data = old_folder(tmp_path, {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}, "stoi": {"a": 0, "b": 1, "c": 2}})
    assert data.vocab_size == 3 and from_description(data.tokenizer).decode([2, 0]) == "ca"


def test_a_hostile_meta_pkl_is_refused_and_does_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return builtins.open, (str(tmp_path / "it ran"), "w")

    for meta in (
        {"vocab_size": 3, "itos": Hostile()},
        pickle.dumps(Hostile(), 0),
        b"",
        b"\x80\x05garbage",
        {"vocab": 3},
    ):
        with pytest.raises(ValueError, match="meta.pkl is not read"):
            old_folder(tmp_path, meta)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("train.bin", b"", "0 tokens, meta.json says 4,400"),
        ("train.bin", b"abc", "3 bytes"),
        ("train.bin", b"ab" * 10, "meta.json says 4,400"),
        ("preparing.json", b'{"replacing": true}', "is not finished"),
        ("train.bin", None, "no train.bin as meta.json lists it"),
        ("meta.json", b"{", "damaged"),
        ("meta.json", b"[" * 100_000, "damaged"),
        ("meta.json", b'{"vocab_size": 10000000000, "dtype": "uint16"}', "damaged"),
        ("meta.json", b'{"vocab_size": "many", "dtype": "uint16"}', "damaged"),
        ("meta.json", b'{"vocab_size": 9, "dtype": "float64"}', "damaged"),
    ],
)
def test_damaged_folders_are_described(tiny, tmp_path, name, content, message):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Dataset(str(folder)).split("train")


def with_header(path, ids, magic=20240520, version=1, dtype="<u2", says=None):
    """A file as llm.c writes it."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if says is None else says
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype).tobytes())


def test_files_with_headers_are_one_stream_and_may_lie_beside_raw_ones(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50257, 900)
    with_header(tmp_path / "fineweb_train_000001.bin", ids[:300])
    with_header(tmp_path / "fineweb_train_000002.bin", ids[300:301])
    ids[301:].astype("<u2").tofile(tmp_path / "fineweb_train_000010.bin")
    with_header(tmp_path / "fineweb_val_000000.bin", ids[::-1])
    data = Dataset(str(tmp_path))
    train, val = data.split("train"), data.split("val")
    assert train.read(0, len(train)).tolist() == ids.tolist() and val.read(0, len(val)).tolist() == ids[::-1].tolist()
    assert train.windows(np.array([298]), 5).tolist() == [ids[298:303].tolist()] and data.vocab_size is None
    val.check(100, 50257)


def test_four_byte_files_of_llm_c(tmp_path):
    ids = np.arange(128000, 128256)
    for name in ("tiny_train.bin", "tiny_val.bin"):
        with_header(tmp_path / name, ids, magic=20240801, version=7, dtype="<u4")
    data = Dataset(str(tmp_path))
    assert data.split("train").read(0, 256).tolist() == ids.tolist() and data.vocab_size == 128256


def test_files_without_leading_zeros_are_in_the_order_of_their_numbers(tmp_path):
    for i in (1, 2, 10):
        np.full(10, i, "<u2").tofile(tmp_path / f"x_train_{i}.bin")
    assert Dataset(str(tmp_path)).split("train").read(0, 30)[::10].tolist() == [1, 2, 10]


WORDS = np.random.default_rng(0).integers(256, 50257, 4000)


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: with_header(path, WORDS, says=4001), "has 4,000 tokens, its header says 4,001"),
        (lambda path: with_header(path, [], says=3), "has 0 tokens, its header says 3"),
        (lambda path: path.write_bytes(np.array([20240520, 1, 0], "<i4").tobytes()), "12 bytes, which is no whole"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: with_header(path, WORDS, 20240801, 7, "<u4"), None),
        (lambda path: with_header(path, WORDS, version=2), "of version 2 of its format, only 1 is known"),
        (lambda path: with_header(path, WORDS, dtype="<u4"), "has 8,000 tokens, its header says 4,000"),
        (lambda path: WORDS.astype("<u4").tofile(path), "numbers of four bytes or more, not uint16"),
        (lambda path: WORDS.astype("<i8").tofile(path), "numbers of four bytes or more, not uint16"),
        (lambda path: WORDS.astype("<f4").tofile(path), "token id .* but the vocabulary ends at 50303"),
        (lambda path: WORDS.astype(">u2").tofile(path), "token id .* but the vocabulary ends at 50303"),
        (lambda path: path.write_bytes(b"abc"), "3 bytes, which is no whole number of uint16 tokens"),
    ],
)
def test_files_of_another_kind_are_named_before_training(tmp_path, script, tiny_run, write, message):
    write(tmp_path / "x_train_000001.bin")
    with_header(tmp_path / "x_val_000000.bin", WORDS)
    result = script("train.py", *tiny_run.flags, f"--dataset={tmp_path}")
    (error,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    expected = f"x_train_000001.bin .*{message}" if message else "holds tokens of two formats"
    assert result.code == 2 and re.search(expected, error), error


def test_more_files_than_a_process_may_open(tmp_path):
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


def test_training_on_files_with_headers(tmp_path, script, tiny_run):
    for name in ("x_train_000001.bin", "x_train_000002.bin", "x_val_000000.bin"):
        with_header(tmp_path / name, WORDS)
    result = script("train.py", *tiny_run.flags, f"--dataset={tmp_path}", "--max_iters=2")
    assert result.code == 0, result.err


def test_what_a_dataset_holds_is_shown(tiny, tmp_path, capsys, monkeypatch):
    show(tiny)
    out = capsys.readouterr().out
    for part in ("tokenizer char", "source: a test", "train: 4,400 tokens in 1 file\n", "'Call me Ishmael", "' '"):
        assert part in out
    command = [sys.executable, ROOT / "data" / "shards.py"]
    assert subprocess.run([*command, tiny], capture_output=True, text=True).stdout == out
    nowhere = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    assert nowhere.returncode == 2 and nowhere.stderr.startswith("error: no dataset in")


def test_streams_that_do_not_fit_the_model_are_described(tiny):
    stream = Dataset(tiny).split("val")
    with pytest.raises(ValueError, match="--block_size=549 or less"):
        stream.check(1000, 99)
    with pytest.raises(ValueError, match="vocabulary ends at 9"):
        stream.check(16, 10)
