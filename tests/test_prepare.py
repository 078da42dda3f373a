"""Documents and dataset folders, compared with the simplest way to make them."""

import bz2
import contextlib
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, TEXT, options

from data import documents, preparation
from data.documents import Files, Piece, Texts, extension
from data.preparation import TokenFiles, border_of, fraction, split_of, write_dataset
from data.shards import Dataset, FolderLock
from data.tokenizer import CharTokenizer, from_description, from_name

DOCUMENTS = [f"{i} {word}\nÜber {TEXT * (i % 7)}" for i, word in enumerate("a bc déf\r\n 日本 🙂 six".split(" ") * 40)]


def write_jsonl(path, texts=DOCUMENTS):
    path.write_text("".join(json.dumps({"id": 3, "text": text}) + "\n" for text in texts))
    return str(path)


def write_table(path, rows):
    """Write one text per row in the format that the name says."""
    kind = path.name.split(".")[1]
    if kind == "csv":
        text = io.StringIO()
        csv.writer(text).writerows([["id", "text"], *([3, row] for row in rows)])
        path.write_text(text.getvalue(), newline="")
    elif kind == "tsv":
        path.write_text("id\ttext\n" + "".join(f"3\t{row}\n" for row in rows), newline="")
    elif kind == "txt":
        path.write_text("<|endoftext|>".join(rows), newline="")
    elif kind == "parquet":
        write_parquet(path, id=[3] * len(rows), text=rows)
    elif kind == "jsonl":
        write_jsonl(path, rows)
    # compressed in two parts
    raw = path.read_bytes()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(raw[:999]) + gzip.compress(raw[999:]))
    if path.suffix == ".zst":
        compress = pytest.importorskip("pyarrow").compress
        path.write_bytes(b"".join(compress(part, "zstd", asbytes=True) for part in (raw[:999], raw[999:])))


def write_parquet(path, **columns):
    table = pytest.importorskip("pyarrow").table(columns)
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=7)
    return path


def corpus_of(*paths, **changed):
    return Files({None: [str(path) for path in paths]}, options(**changed))


def pieces_of(corpus):
    return [piece for part in range(len(corpus.parts)) for piece in corpus.pieces(part)]


def texts_of(corpus):
    return [piece.text for piece in pieces_of(corpus)]


def make(folder, *paths, **changed):
    """Prepare files as data/text does, and return the dataset."""
    args = {"tokenizer": "bpe:300", **changed}
    write_dataset(str(folder), corpus_of(*paths, **args), options(**args))
    return Dataset(str(folder))


def streams(data):
    """Return the text of train and val."""
    tokenizer = from_description(data.tokenizer)
    return [tokenizer.decode(tokens.read(0, len(tokens))) for tokens in (data.split("train"), data.split("val"))]


def decoded(data):
    """Return {split: documents}."""
    tokenizer, texts = from_description(data.tokenizer), {}
    for split in ("train", "val"):
        ids = data.split(split).read(0, len(data.split(split)))
        *parts, rest = np.split(ids, np.flatnonzero(ids == tokenizer.eot) + 1)
        assert len(rest) == 0
        texts[split] = [tokenizer.decode(part[:-1]) for part in parts]
    return texts


def all_decoded(data):
    return sorted(sum(decoded(data).values(), []))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_batches(monkeypatch):
    """Make many batches of little text, and save each."""
    monkeypatch.setattr(preparation, "BATCH", 2000)
    monkeypatch.setattr(preparation, "SAVE_EVERY", 0)


def test_pure_functions_do_what_their_examples_say():
    assert extension("a/B.JSONL.gz") == "jsonl"
    assert documents.count_endings(["a.py", "b.py", "x"]) == "2 .py, 1 x"
    assert border_of("a bc", 0.5) == 1 and border_of("abcd", 0.5) == 2 and border_of("x" * 9999, 0.1) == 8999
    assert documents.lookup({"meta": {"text": "a"}}, "meta.text") == "a" and documents.lookup([], "text") is None
    assert round(fraction("abc", 0), 4) == 0.1701 and split_of("abc", 0.1) == "train"
    assert [split_of("x" * n, 0.1) for n in (40_960, 40_959)] == ["both", "train"]
    sizes = TokenFiles("", 300, 3, {"train": 5}).sizes()
    assert sizes == {"train_000000.bin": 3, "train_000001.bin": 2}


NAMES = "x.jsonl x.jsonl.gz x.jsonl.zst x.csv x.csv.gz x.tsv x.parquet x.txt x.txt.gz x.txt.zst".split()


@pytest.mark.parametrize("name", NAMES)
def test_formats_contain_the_same_documents(tmp_path, name):
    rows = DOCUMENTS[:40]
    if ".tsv" in name:
        rows = [f'"{" ".join(text.split())}' for text in rows]  # one line per row, quotes are text
    write_table(tmp_path / name, rows)
    corpus = corpus_of(tmp_path / name)
    assert [piece.text for piece in corpus.pieces(0) if piece.ends] == rows
    assert corpus.bytes_read == corpus.size() == os.path.getsize(tmp_path / name)


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 += r"|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module")
def book():
    """Return 400,000 characters of prose, verse, code, numbers, blank lines, and words without spaces."""
    kinds = (
        TEXT * 3,
        "\n\n\n",
        "\n \n",
        "def f(x):\n    return '%d'\n\n\n",
        "日本語。テキスト" * 9,
        "🙂 don't 1234567.89  \t ",
    )
    text = "".join(f"{kinds[i * i % 7 % 6]}{i}{TEXT[i % 99 :]}" for i in range(4000))[:400_000]
    assert len(text) == 400_000
    return text


def make_tokenizer(kind, folder, text):
    """Save a tokenizer of the kind, learned from text. Return what to type for it."""
    if kind.startswith("sentencepiece"):
        sentencepiece = pytest.importorskip("sentencepiece")
        settings = dict(model_type="bpe", vocab_size=500, byte_fallback=True, minloglevel=2, add_dummy_prefix=True)
        if kind == "sentencepiece":
            settings |= dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text[:50_000].splitlines()), model_prefix=str(folder / "m"), **settings
        )
        return str(folder / "m.model")
    if kind not in ("llama3", "qwen"):
        return kind
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Regex(LLAMA3 if kind == "llama3" else LLAMA3.replace("{1,3}", ""))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = tokenizers.pre_tokenizers.Split(words, "isolated")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=byte_level.alphabet(), special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator([text[:50_000]], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-normalized", "llama3", "qwen", "bpe:500", "char"])
@pytest.mark.parametrize("name", ["book.txt", "book.txt.xz", "book.jsonl"])
def test_long_text_has_the_tokens_of_the_whole_and_its_end_is_for_validation(tmp_path, book, kind, name):
    path = tmp_path / name
    if "jsonl" in name:
        write_jsonl(path, [book])
    else:
        path.write_bytes(lzma.compress(book.encode()) if "xz" in name else book.encode())
    data = make(tmp_path / "x", path, tokenizer=make_tokenizer(kind, tmp_path, book))
    tokenizer = from_description(data.tokenizer)
    train, val = (data.split(split).read(0, len(data.split(split))).tolist() for split in ("train", "val"))
    end = tokenizer.encode("\n")[-1] if tokenizer.eot is None else tokenizer.eot
    assert train + val == [
        *tokenizer.bos,
        *tokenizer.encode_documents([book])[0].tolist(),
        end,
    ]  # no end of text inside
    if kind != "sentencepiece-normalized":
        assert tokenizer.decode((train + val)[len(tokenizer.bos) : -1]) == book
    n_train, n_val = len(tokenizer.decode(train)), len(tokenizer.decode(val))
    assert abs(n_val / (n_train + n_val) - 0.1) < 0.01


def test_cut_documents_end_in_both_splits_if_others_follow(tmp_path):
    texts = [f"{i} " + TEXT * 400 for i in range(3)]
    tokenizer, *parts = decoded_parts(make(tmp_path / "x", write_jsonl(tmp_path / "a.jsonl", [*texts, "short"])))
    assert [len(part) for part in parts] in ([5, 4], [4, 5])  # an end of text is last
    assert [train + val for train, val in zip(*parts, strict=False)][:3] == texts
    meta = json.loads((tmp_path / "x" / "meta.json").read_text())
    assert meta["documents"]["train"] + meta["documents"]["val"] == 4


def decoded_parts(data):
    """Return the tokenizer and, per split, the texts between ends of text."""
    tokenizer, parts = from_description(data.tokenizer), []
    for split in ("train", "val"):
        ids = data.split(split).read(0, len(data.split(split)))
        parts.append(
            [
                tokenizer.decode(part[part != tokenizer.eot])
                for part in np.split(ids, np.flatnonzero(ids == tokenizer.eot))
            ]
        )
    return tokenizer, *parts


def test_long_rows_give_validation_its_share(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [TEXT * (400 + 90 * i) for i in range(30)])
    data = make(tmp_path / "x", path, tokenizer="char")
    n_train, n_val = (len(data.split(split)) for split in ("train", "val"))
    assert abs(n_val / (n_train + n_val) - 0.1) < 0.001 and "WARNING" not in capsys.readouterr().err

    # shorter ones are not cut, but a share that is far off is said
    texts = [f"{i} {TEXT * (300 if split_of(f'{i} {TEXT * 300}', 0.1) == 'val' else 1)}" for i in range(30)]
    make(tmp_path / "y", write_jsonl(tmp_path / "b.jsonl", texts), tokenizer="char")
    assert re.search(r"WARNING: \d\d.\d% of the tokens are val, not --val_share=0.1", capsys.readouterr().err)


@pytest.mark.parametrize("offset", [0, 1, 86, 100, 99, 4090])
def test_texts_longer_than_the_limit_are_read_in_pieces(tmp_path, monkeypatch, offset):
    monkeypatch.setattr(documents, "LONGEST", 100)
    marker, text = documents.END_OF_TEXT, "".join(map(chr, range(0x4E00, 0x4E00 + 250)))
    (tmp_path / "a.txt").write_text("y" * offset + marker + text + marker + "z" * 90 + marker)
    pieces = pieces_of(corpus_of(tmp_path / "a.txt"))
    texts = [piece.text for piece in pieces]
    assert sum(piece.ends for piece in pieces) == 2 + (offset > 0)
    assert "".join(texts) == "y" * offset + text + "z" * 90 and texts[-1] == "z" * 90
    assert max(map(len, texts)) <= 100 and not any("y" in part and part.strip("y") for part in texts)
    rows = write_jsonl(tmp_path / "a.jsonl", [text])
    assert texts_of(corpus_of(rows)) == [text[:100], text[100:200], text[200:]]
    other = str(shutil.copy(rows, tmp_path / "b.jsonl"))
    args = options(tokenizer="char")
    write_dataset(str(tmp_path / "x"), Files({"train": [str(rows)], "val": [other]}, args), args)
    assert streams(Dataset(str(tmp_path / "x"))) == [text + "\n"] * 2


def test_folders_and_patterns_give_their_files_in_order(tmp_path):
    names = ("b/2.txt", "b/1.md", "b/c/3.jsonl", "b/.hidden.txt", "b/meta.json", "b/image.png", "a1.log", "a2.log")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    corpus = corpus_of(tmp_path / "a*.log", tmp_path / "b", tmp_path / "b/2.txt")  # the last one again
    assert texts_of(corpus) == ["a1.log", "a2.log", "b/1.md", "b/2.txt", "b/c/3.jsonl"]


@pytest.mark.parametrize(
    "name, content, text",
    [
        ("a.txt", "\ufeffbom".encode(), "bom"),
        ("a.txt", "wide ü".encode("utf-16"), "wide ü"),
        ("a.txt", "wide ü".encode("utf-32"), "wide ü"),
        ("a.txt", b"a\xffb\xc3", "a\ufffdb\ufffd"),
        ("a.txt", b"a\xe6\x97 \xef\xbf\xbd", "a\ufffd \ufffd"),  # two bytes of three, and a valid U+FFFD
        ("a.jsonl", b'{"text": "a\\ud83d"}', "a?"),  # half a surrogate pair
    ],
)
def test_text_encodings(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    corpus = corpus_of(tmp_path / name)
    assert texts_of(corpus) == [text]
    assert corpus.counts["undecodable bytes"] == (2 if "\ufffd" in text else 0)


def test_parquet_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "a.parquet", text=pyarrow.array(DOCUMENTS).dictionary_encode())
    assert texts_of(corpus_of(tmp_path / "a.parquet")) == DOCUMENTS
    invalid = pyarrow.array([b"good", b"b\xffd", b"", None]).cast(pyarrow.binary()).view(pyarrow.string())
    corpus = corpus_of(write_parquet(tmp_path / "b.parquet", text=invalid))
    assert texts_of(corpus) == ["good", "b\ufffdd"]
    assert corpus.counts["bad rows"] == corpus.counts["undecodable bytes"] == 1

    numbers = write_parquet(tmp_path / "c.parquet", text=[1, 2])
    with pytest.raises(ValueError, match="row 1 of .*: no text in column text"):
        make(tmp_path / "x", numbers, tokenizer="char")
    with pytest.raises(ValueError, match=r"no column body \(columns: text\); use --column="):
        make(tmp_path / "x", numbers, tokenizer="char", column="body")


BAD_ROWS = ['{"text": 3}', "{", "[1]", '{"other": "a"}', "[" * 100_000, b"\xff".decode("latin-1")]


def test_bad_rows_are_left_out_and_counted(tmp_path, capsys):
    good = [json.dumps({"text": text}) for text in DOCUMENTS]
    (tmp_path / "a.jsonl").write_text("\n\n".join(good[:3] + BAD_ROWS + good[3:]), encoding="latin-1")
    data = make(tmp_path / "x", tmp_path / "a.jsonl", max_bad=0.7)  # one bad row has more bytes than all others
    assert all_decoded(data) == sorted(DOCUMENTS)
    assert f"left out: 6 bad rows (first: line 7 of {tmp_path}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="6 bad rows in 246 rows exceed --max_bad=0.01: line 7"):
        make(tmp_path / "y", tmp_path / "a.jsonl")
    assert not list((tmp_path / "y").glob("*.bin"))


def test_bad_rows_are_noticed_before_the_end(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n" * 100_010)
    with pytest.raises(ValueError, match="a.jsonl: .* exceed --max_bad=0.01: line 1 of"):
        make(tmp_path / "x", tmp_path / "a.jsonl")


def test_unpaired_quote_does_not_swallow_rows_silently(tmp_path):
    rows = "".join(f"{i},row {i}\n" for i in range(99)).replace("row 5\n", '"row 5\n')
    (tmp_path / "a.csv").write_text("id,text\n" + rows)
    (tmp_path / "a.tsv").write_text(("id,text\n" + rows).replace(",", "\t"))
    with pytest.raises(ValueError, match="1 bad rows in 99 rows exceed .*: line 7 of .*csv"):
        make(tmp_path / "x", tmp_path / "a.csv")
    assert len(texts_of(corpus_of(tmp_path / "a.tsv"))) == 99

    # an unclosed quote and a surplus field cost their own lines, not what follows
    for ending, bad in {"csv": ['"row', "row,row"], "tsv": ["row\trow"]}.items():
        rows = [f"row {i}" for i in range(10_000)]
        for i, text in zip((5000, 7000), bad, strict=False):
            rows[i] = text
        lines = [f"{i},{row}\n".replace(",", "\t" if ending == "tsv" else ",", 1) for i, row in enumerate(rows)]
        (tmp_path / f"b.{ending}").write_text("id,text\n".replace(",", lines[0][1]) + "".join(lines))
        corpus = corpus_of(tmp_path / f"b.{ending}")
        assert texts_of(corpus) == [row for row in rows if row not in bad]
        assert corpus.counts["bad rows"] == len(bad) and "line 5002 of" in corpus.first_bad

    # one bad row in 5,000, but half of the text
    (tmp_path / "c.csv").write_text("id,text\n" + "1,row\n" * 5000 + '2,"' + "row " * 5000)
    with pytest.raises(ValueError, match="bytes of bad rows in .* exceed .*: line 5002 of .*c.csv"):
        make(tmp_path / "y", tmp_path / "c.csv")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_tables_as_other_programs_write_them(tmp_path, delimiter, name):
    rows = ['He said "hi"\n\tand left; then, at last,\n\nhe | came back', '"all quoted"', 'mid "word"', "plain"] * 20
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter if name == "a.csv" else "\t", lineterminator="\n")
    writer.writerows([["id", "text", "more"], *([i, row, ""] for i, row in enumerate(rows))])
    (tmp_path / name).write_text(text.getvalue())
    corpus = corpus_of(tmp_path / name)
    assert texts_of(corpus) == rows and not corpus.counts["bad rows"]


@pytest.mark.parametrize("elements", [[{"text": text} for text in DOCUMENTS], DOCUMENTS])
@pytest.mark.parametrize("indent", [None, 1])
def test_json_lists(tmp_path, elements, indent):
    (tmp_path / "a.json").write_text(json.dumps(elements, indent=indent))
    assert texts_of(corpus_of(tmp_path / "a.json")) == DOCUMENTS


def test_nested_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"meta": {"n": 1, "text": text}, "a.b": text} for text in DOCUMENTS] + [{"meta": None, "a.b": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        for column in ("meta.text", "a.b"):
            corpus = corpus_of(path, column=column)
            assert texts_of(corpus) == DOCUMENTS and corpus.counts["bad rows"] == 1


@pytest.mark.parametrize("module", [bz2, lzma])
def test_other_compressions(tmp_path, module):
    path = tmp_path / f"a.txt.{'bz2' if module is bz2 else 'xz'}"
    path.write_bytes(module.compress(TEXT.encode()))
    assert texts_of(corpus_of(path)) == [TEXT] and extension(str(path)) == "txt"


def test_folder_says_what_it_leaves_out_and_follows_links(tmp_path, capsys):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "k.txt").write_text("linked")
    (tmp_path / "code").mkdir()
    for name in [f"{i}.py" for i in range(40)] + ["x.c", "Makefile", "README.md", "meta.json"]:
        (tmp_path / "code" / name).write_text(name)
    (tmp_path / "code" / "rows.json.gz").write_bytes(gzip.compress(b'["row"]'))
    (tmp_path / "code" / "link").symlink_to(tmp_path / "linked")
    (tmp_path / "code" / "again").symlink_to(tmp_path / "linked")
    (tmp_path / "code" / "self").symlink_to(tmp_path / "code")
    assert sorted(texts_of(corpus_of(tmp_path / "code"))) == ["README.md", "linked", "row"]
    out = capsys.readouterr().out
    assert "reading 1 .md, 1 .gz, 1 .txt; left out 40 .py, 1 Makefile, 1 .json, 1 .c" in out
    (tmp_path / "code" / "self").unlink()
    assert len(texts_of(corpus_of(f"{tmp_path}/code/**/*.py"))) == 40


def test_folder_of_a_hub_dataset_keeps_its_splits(tmp_path, capsys):
    folder = tmp_path / "hub"
    for name in ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/validation-00000", "data/test-00000"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / f"{name}.jsonl", [f"{name} {i}" for i in range(20)])
    (folder / "README.md").write_text("card")
    train, val = decoded(make(tmp_path / "x", folder)).values()
    assert (len(train), len(val)) == (40, 20) and all("/train" in text for text in train)
    assert all("/validation" in text for text in val)
    assert "1 other, 1 test, 2 train, 1 validation files by their names; only train" in capsys.readouterr().out

    # without validation files, a hash chooses from those of train; other names mean nothing
    (folder / "data" / "validation-00000.jsonl").unlink()
    assert all("/train" in text for text in all_decoded(make(tmp_path / "y", folder)))
    (folder / "data" / "test-00000.jsonl").rename(folder / "data" / "contest.jsonl")
    assert len(texts_of(corpus_of(folder))) == 61


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", bytes(range(128, 256)) * 99, "undecodable bytes in .* is this text"),
        ("a.txt", b"", "the input contains no text"),
        (
            "a.jsonl",
            b'{"abstract": "x"}\n',
            r"line 1 of .* no text in column text \(columns: abstract\); use --column=",
        ),
        ("a.json", b'[\n{"text": "x"},\n', "cannot read .*a.json: Expecting value"),
        ("a.json", b'{"data": [{"text": "x"}]}', r"line 1 of .* no text in column text \(columns: data\)"),
        ("a.csv", b"id,text\n1,hello, world\n", "line 2 of .*one field per column"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "a.jsonl: it is UTF-16, .* convert it"),
        ("a.txt", TEXT.encode("utf-16-le"), r"a.txt: not a text file \(begins with b'C"),
        ("a.txt", TEXT.encode() * 99 + bytes(200), "200 NUL bytes in .* UTF-16 needs a byte-order mark"),
        ("a.pdf", b"%PDF-1.4\n" + TEXT.encode(), "a.pdf: not a text file"),
        ("a.arrow", b"\xff\xff\xff\xff" + TEXT.encode() * 99, "a.arrow: not a text file"),
        ("a.txt", gzip.compress(TEXT.encode()), "a.txt: not a text file"),
        ("a.csv", b"id,abstract\n1,x\n", r"no column text \(columns: id, abstract\); use --column="),
        ("a.csv", b"", "no column text"),
        ("a.txt.gz", b"no gzip", "cannot read .*a.txt.gz: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(TEXT.encode() * 99)[:-30], "cannot read .*: Compressed file ended"),
        ("a.txt.zst", b"no zstd", "cannot read .*a.txt.zst|pip install pyarrow"),
        ("a.parquet", b"no parquet", "cannot read .*a.parquet|pip install pyarrow"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "x", tmp_path / name, tokenizer="char")
    assert not list((tmp_path / "x").glob("*.bin"))


def test_missing_packages_and_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for name in ("a.parquet", "a.txt.zst"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=f"{name} needs a package: pip install pyarrow"):
            make(tmp_path / "x", tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file or folder: .*/nowhere"):
        corpus_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no text files in folder .*/empty"):
        corpus_of(tmp_path / "empty")


# -----------------------------------------------------------------------------
# from documents to tokens


def test_tokens_are_those_of_the_documents_one_by_one(tmp_path, small_batches):
    data = make(tmp_path / "x", write_jsonl(tmp_path / "a.jsonl"), tokenizer="bpe:400", workers=3)
    tokenizer = from_description(data.tokenizer)
    expected = {"train": [], "val": []}
    for text in DOCUMENTS:
        expected[split_of(text, 0.1)] += [*tokenizer.encode(text).tolist(), tokenizer.eot]
    for split, ids in expected.items():
        assert data.split(split).read(0, len(data.split(split))).tolist() == ids
    meta = json.loads((tmp_path / "x" / "meta.json").read_text())
    assert meta["files"]["val.bin"]["tokens"] == len(expected["val"])
    assert meta["files"]["val.bin"]["sha256"] == hashlib.sha256(contents(tmp_path / "x")["val.bin"]).hexdigest()
    assert sum(meta["documents"].values()) == len(DOCUMENTS) and 8 < meta["documents"]["val"] < 60


def test_texts_keep_their_splits_without_separators(tmp_path):
    pieces = [Piece("abc", False, "train"), Piece("ca", False, "val"), Piece("b", False, "train")]
    write_dataset(str(tmp_path), Texts(pieces, "a test"), options(tokenizer="char"))
    assert streams(Dataset(str(tmp_path))) == ["abcb", "ca"]


@pytest.mark.parametrize("texts", [["one document only"], ["ab"], ["a" * 999, "b"]])
def test_few_documents_are_cut_in_two_splits(tmp_path, texts):
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    data = make(tmp_path / "x", path, val_share=1e-9, tokenizer="char", shard_tokens=100)
    n_train, n_val = (len(data.split(split)) for split in ("train", "val"))
    assert "".join(streams(data)) == "".join(text + "\n" for text in texts)
    assert n_train == (n_train + n_val) * 9 // 10


def test_num_samples_reads_no_more_than_it_needs(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    assert all_decoded(make(tmp_path / "x", path, num_samples=50)) == sorted(DOCUMENTS[:50])
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    assert len(all_decoded(make(tmp_path / "y", path, tmp_path / "b.parquet", num_samples=240))) == 240
    with pytest.raises(ValueError, match="b.parquet"):
        make(tmp_path / "z", path, tmp_path / "b.parquet", num_samples=241)


def test_large_vocabularies_are_written_as_uint32(tmp_path):
    text = "".join(chr(i) for i in range(0x10000, 0x10000 + 70000))
    data = make(tmp_path / "x", write_jsonl(tmp_path / "a.jsonl", [text]), tokenizer="char")
    tokens = data.split("train")
    assert data.vocab_size == 70001 and os.path.getsize(tmp_path / "x" / "train.bin") == 4 * len(tokens)
    assert from_description(data.tokenizer).decode(tokens.read(62000, 99)) == text[62000:62099]
    tokens.check(16, data.vocab_size)


def test_words_of_a_million_characters_are_tokenized(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [" " * 1_000_000 + "x", "ab" * 200_000])
    data = make(tmp_path / "x", path, tokenizer="bpe:400")
    parts = [stream.split("<|endoftext|>") for stream in streams(data)]
    assert [train + val for train, val in zip(*parts, strict=False)] == [" " * 1_000_000 + "x", "ab" * 200_000]
    CharTokenizer("abc\n").save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="the tokenizer cannot encode this text"):
        make(tmp_path / "y", path, tokenizer=str(tmp_path / "tokenizer.json"))


# -----------------------------------------------------------------------------
# interrupted and existing datasets


@contextlib.contextmanager
def failing(name):
    """Replace a function of preparation.py by one that fails, and expect the failure."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(preparation, name, lambda *args: 1 / 0)
        yield


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt.gz", "a.parquet"])
def test_interrupted_preparation_resumes_to_the_same_files(tmp_path, monkeypatch, small_batches, capsys, name):
    rows = DOCUMENTS[:60] if name == "a.jsonl" else [*DOCUMENTS[:60], *["\x00"] * 2]
    write_table(tmp_path / name, rows)
    if name == "a.jsonl":
        (tmp_path / name).write_text((tmp_path / name).read_text().replace("\n", "\nbad row\n", 50))
    paths = [tmp_path / name, write_jsonl(tmp_path / "z.jsonl", DOCUMENTS[60:])]
    settings = dict(max_bad=0.5, shard_tokens=1000, workers=2)
    make(tmp_path / "whole", *paths, **settings)

    write, calls = TokenFiles.write, iter(range(10**9))

    def write_and_fail(self, *args):
        write(self, *args)
        if next(calls) % 5 == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(TokenFiles, "write", write_and_fail)
    for _ in range(200):
        with contextlib.suppress(KeyboardInterrupt):
            make(tmp_path / "x", *paths, **settings)
            break
        with pytest.raises(FileNotFoundError, match="is not finished"):
            Dataset(str(tmp_path / "x"))
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")
    assert capsys.readouterr().out.count("resuming after") > 5


def check_resumed(folder, path, change=lambda folder: None, **settings):
    """Fail when all is written, change something, and expect that the next call makes the same files."""
    make(folder / "whole", path, **settings)
    with failing("sha256_of"):
        make(folder / "x", path, **settings)
    change(folder / "x")
    make(folder / "x", path, **settings)
    assert contents(folder / "x") == contents(folder / "whole")


def test_single_short_document_is_split(tmp_path):
    for i in range(30):  # for one in ten of them the hash says val
        text = f"{i} " * 50
        (tmp_path / "a.txt").write_text(text + "<|endoftext|>\n")
        data = make(tmp_path / str(i), tmp_path / "a.txt")
        assert "".join(streams(data)) == text + "<|endoftext|>"
        assert data.vocab_size > 257  # bytes and end of text, so it has merges


def test_folder_for_one_split(tmp_path):
    for name in ("train-0", "validation-0", "test-0"):
        (tmp_path / f"{name}.txt").write_text(name)
    for split, name in (("train", "train-0"), ("val", "validation-0")):
        assert [(piece.text, piece.split) for piece in pieces_of(Files({split: [str(tmp_path)]}, options()))] == [
            (name, split)
        ]


@pytest.mark.parametrize("num_samples", [0, 45])
def test_tokens_after_the_last_save_are_cut_off(tmp_path, small_batches, num_samples):
    def append(folder):
        for name in ("train.bin.tmp", "val.bin.tmp"):
            with open(folder / name, "ab") as f:
                f.write(b"abcd")

    path = tmp_path / "a.jsonl"
    path.write_text(open(write_jsonl(path)).read().replace("\n", "\nbad row\n"))
    check_resumed(tmp_path, path, append, max_bad=0.9, num_samples=num_samples)


def test_corrupt_unfinished_files_start_again(tmp_path, small_batches, capsys):
    path = write_jsonl(tmp_path / "a.jsonl")
    check_resumed(tmp_path, path, lambda folder: (folder / "train.bin.tmp").write_bytes(b"ab"))
    assert "corrupt: starting again" in capsys.readouterr().out


@pytest.mark.parametrize("share", [1e-12, 1 - 1e-12])
def test_kill_after_cutting_few_documents_starts_again(tmp_path, small_batches, capsys, share):
    check_resumed(tmp_path, write_jsonl(tmp_path / "a.jsonl"), val_share=share, shard_tokens=1000)
    assert "corrupt: starting again" in capsys.readouterr().out


def test_changed_files_on_the_hub_start_again(tmp_path, small_batches, capsys):
    def change_listing(folder):
        state = json.loads((folder / "preparing.json").read_text())
        (folder / "preparing.json").write_text(json.dumps(state | {"listing": "another"}))

    check_resumed(tmp_path, write_jsonl(tmp_path / "a.jsonl"), change_listing)
    assert "the files on the Hub have changed: starting again" in capsys.readouterr().out


def test_killed_preparation_resumes_to_the_same_files(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS * 30)
    make(tmp_path / "whole", path)
    code = f"""
import sys
from types import SimpleNamespace
sys.path.insert(0, {str(ROOT)!r})
from data import preparation
from data.documents import Files
preparation.SAVE_EVERY, preparation.BATCH = 0, 30_000
args = SimpleNamespace(**{vars(options(tokenizer="bpe:300"))!r})
preparation.write_dataset(sys.argv[1], Files({{None: sys.argv[2:]}}, args), args)
"""
    command = [sys.executable, "-c", code, tmp_path / "killed", path]
    state = tmp_path / "killed" / "preparing.json"
    for delay in (0, 0.01, 0.02, 0.03):
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not (state.exists() and state.stat().st_mtime_ns > before):
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.wait()
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kill_at", range(3))
def test_kill_between_renames_is_finished_by_the_next_call(tmp_path, monkeypatch, kill_at):
    path, folder = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "x"
    make(folder, path, tokenizer="char")
    make(tmp_path / "whole", path)
    replace, calls = os.replace, iter(range(99))

    def killed(a, b):
        if str(b).endswith((".bin", "meta.json")) and next(calls) == kill_at:
            raise KeyboardInterrupt
        replace(a, b)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        make(folder, path, force=True)
    with pytest.raises(FileNotFoundError, match="is not finished"):
        Dataset(str(folder))
    make(folder, path)
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize("state", ["{}", "[]", "{", '{"recipe": {}, "format": 9}'])
def test_corrupt_state_starts_again(tmp_path, state):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "preparing.json").write_text(state)
    assert len(make(tmp_path / "x", write_jsonl(tmp_path / "a.jsonl")).split("train")) > 1000


def test_complete_dataset_is_kept_and_another_one_is_not_overwritten(tmp_path, capsys):
    folder, path = tmp_path / "x", write_jsonl(tmp_path / "a.jsonl")
    make(folder, path)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    assert set(before) == {"train.bin", "val.bin", "meta.json"}
    make(folder, path)
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a dataset prepared with --tokenizer=bpe:300; use --force to overwrite"):
        make(folder, path, tokenizer="char")
    with pytest.raises(ValueError, match="prepared with --format=; use --force"):
        make(folder, path, format="jsonl")
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[1:])
    with pytest.raises(ValueError, match="prepared with other input; use --force to overwrite"):
        make(folder, path)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()} == before

    # --force does, and a corrupt dataset is prepared again
    make(folder, path, shard_tokens=4000, force=True)
    assert {"train_000000.bin", "train_000001.bin", "val_000000.bin", "meta.json"} <= set(contents(folder))
    assert "train.bin" not in contents(folder) and len(decoded(Dataset(str(folder)))["train"]) > 100
    before = contents(folder)
    (folder / "train_000001.bin").write_bytes(b"ab")
    make(folder, path, shard_tokens=4000)
    assert contents(folder) == before


def test_nanogpt_dataset_is_not_overwritten(tmp_path):
    np.arange(99, dtype="<u2").tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="contains a dataset from another program; use --force"):
        make(tmp_path, write_jsonl(tmp_path / "a.jsonl"))
    make(tmp_path, tmp_path / "a.jsonl", force=True)
    assert not (tmp_path / "meta.pkl").exists()


def test_half_overwritten_dataset_does_not_train(tmp_path):
    path, folder = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "x"
    make(tmp_path / "t", path)
    with failing("remove_others"):  # the files have been renamed
        make(folder, path)
    (tmp_path / "b.jsonl").write_text("no row")
    with pytest.raises(ValueError, match="bad rows"):
        make(folder, tmp_path / "b.jsonl", tokenizer=str(tmp_path / "t"), force=True)
    with pytest.raises(FileNotFoundError, match="is not finished"):
        Dataset(str(folder))


def test_failed_command_does_not_block_the_right_one(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in DOCUMENTS))
    with pytest.raises(ValueError, match="use --column="):
        make(tmp_path / "x", tmp_path / "a.jsonl", tokenizer="char")
    assert all_decoded(make(tmp_path / "x", tmp_path / "a.jsonl", column="body")) == sorted(DOCUMENTS)


def test_two_processes_do_not_prepare_the_same_folder(tmp_path):
    pytest.importorskip("fcntl")
    with FolderLock(str(tmp_path)), pytest.raises(ValueError, match="is locked by another process"):
        make(tmp_path, write_jsonl(tmp_path / "a.jsonl"))


# -----------------------------------------------------------------------------
# tokenizers by name


def test_tokenizer_of_another_dataset(tmp_path):
    first = make(tmp_path / "x", write_jsonl(tmp_path / "a.jsonl"))
    path = write_jsonl(tmp_path / "b.jsonl", ["other text"] * 9)
    assert make(tmp_path / "y", path, tokenizer=str(tmp_path / "x")).tokenizer == first.tokenizer
    make(tmp_path / "x", tmp_path / "a.jsonl", tokenizer="bpe:301", force=True)
    with pytest.raises(ValueError, match="prepared with --tokenizer=.*; use --force"):
        make(tmp_path / "y", path, tokenizer=str(tmp_path / "x"))


def test_bytes_of_a_text_do_not_depend_on_the_tokenizer(tmp_path):
    train_sentencepiece(tmp_path / "m", "bpe")
    documents = [" ".join(text.split()) for text in [*DOCUMENTS[:300], "<|endoftext|> is text, <s> too", "日本 é", "a"]]
    path, counts = write_jsonl(tmp_path / "a.jsonl", documents), {}
    tokenizers = ["char", "bpe:512", str(tmp_path / "m.model")] + ["gpt2"] * ("TIKTOKEN_CACHE_DIR" in os.environ)
    from_name("bpe:512", lambda n: documents).save_pretrained(str(tmp_path / "hub"))
    for name in [*tokenizers, str(tmp_path / "hub")]:
        data = make(tmp_path / f"x{len(counts)}", path, tokenizer=name)
        tokenizer = from_description(data.tokenizer)
        streams = (stream.read(0, len(stream)) for stream in map(data.split, ("train", "val")))
        counts[name] = sum(tokenizer.count_bytes([tokenizer.eot or 0, *ids[:-1]], ids) for ids in streams)
    counts["char"] -= len(documents)  # with it a newline, which is text, ends each document
    assert set(counts.values()) == {sum(len(text.encode()) for text in documents)}, counts


def test_parts_of_a_long_text_do_not_depend_on_the_tokenizer(tmp_path):
    train_sentencepiece(tmp_path / "m", "bpe")
    words = "".join(f"{i} {' '.join(text.split())} " for i, text in enumerate(DOCUMENTS)).strip()
    assert len(words) > 50_000
    path, validation = write_jsonl(tmp_path / "a.jsonl", [words]), words[border_of(words, 0.1) :]
    tokenizers = ["char", "bpe:512", str(tmp_path / "m.model")] + ["gpt2"] * ("TIKTOKEN_CACHE_DIR" in os.environ)
    for name in tokenizers:
        data = make(tmp_path / f"x {name.split(chr(47))[-1]}", path, tokenizer=name)
        tokenizer = from_description(data.tokenizer)
        train, val = (stream.read(0, len(stream)) for stream in map(data.split, ("train", "val")))
        assert tokenizer.decode(val[:-1]).lstrip() == validation.lstrip()  # without the end of text
        newline = int(name == "char")  # ends the text, and is text itself
        assert tokenizer.count_bytes([-1, *val[:-1]], val) == len(validation.encode()) + newline
        rest = words[: -len(validation)]
        assert tokenizer.count_bytes([tokenizer.eot or 0, *train[:-1]], train) == len(rest.encode())


def test_char_dataset_is_readable_by_nanogpt(tmp_path):
    data = make(tmp_path / "x", write_jsonl(tmp_path / "a.jsonl"), tokenizer="char")
    meta = pickle.loads((tmp_path / "x" / "meta.pkl").read_bytes())
    assert meta["vocab_size"] == data.vocab_size == len(meta["itos"]) == len(meta["stoi"])
    assert all(meta["stoi"][meta["itos"][i]] == i for i in range(data.vocab_size))
    train = data.split("train")
    ids = train.read(0, len(train)).tolist()
    assert "".join(meta["itos"][i] for i in ids) == from_description(data.tokenizer).decode(ids)


def test_learned_vocabulary_restores_every_text():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer, again = (from_name("bpe:500", lambda n: DOCUMENTS) for _ in range(2))
    assert tokenizer.description == again.description and tokenizer.vocab_size == 500
    for text in (*DOCUMENTS, "\x00\x7f never seen: ℵ", "<|endoftext|>", ""):
        (ids,) = tokenizer.encode_documents([text])
        assert tokenizer.decode(ids) == text and tokenizer.eot not in ids
    assert tokenizer.encode("<|endoftext|>").tolist() == [tokenizer.eot] == [499]
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 3

    # the tokenizers library learns the same
    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=499, initial_alphabet=alphabet, show_progress=False)
    plain.train_from_iterator(DOCUMENTS, trainer)
    for text in DOCUMENTS:
        assert tokenizer.encode(text).tolist() == plain.encode(text).ids


def test_learned_vocabulary_goes_to_the_hub_and_back(tmp_path):
    tokenizer = from_name("bpe:400", lambda n: DOCUMENTS)
    tokenizer.save_pretrained(str(tmp_path))
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    ours = from_name(str(tmp_path / "tokenizer.json"))
    for text in DOCUMENTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist() == ours.encode(text).tolist()
    assert theirs.eos_token_id == tokenizer.eot == ours.eot
    hidden = [ids.tolist() for ids in ours.encode_documents(["a <|endoftext|>"])]
    assert hidden == [ids.tolist() for ids in tokenizer.encode_documents(["a <|endoftext|>"])]

    # without a tokenizer_config.json the end of text is found by its usual name
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "sub" / "other.json")
    assert from_name(str(tmp_path / "sub" / "other.json")).eot == tokenizer.eot


def train_sentencepiece(prefix, kind):
    """Write a SentencePiece model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    settings = dict(model_type=kind, vocab_size=400 if kind == "bpe" else 330, byte_fallback=True, minloglevel=2)
    texts = iter([TEXT, *DOCUMENTS[:20]] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_prefix=str(prefix), hard_vocab_limit=False, **settings
    )
    return sentencepiece


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_models(tmp_path, kind):
    sentencepiece = train_sentencepiece(tmp_path / "m", kind)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    ours = from_description(json.loads(json.dumps(from_name(str(tmp_path / "m.model")).description)))
    assert ours.eot == theirs.eos_id() and ours.vocab_size == theirs.vocab_size()
    ours.save_pretrained(str(tmp_path))
    exported = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, "Never  seen 🙂 日", "\n x"):
        ids = theirs.encode(text)
        assert ours.encode(text).tolist() == ours.encode_documents([text])[0].tolist() == ids
        assert ours.decode(ids) == theirs.decode(ids) == "".join(ours.decode_stream(ids)).removeprefix(" ")
        assert exported(text, add_special_tokens=False)["input_ids"] == ids
    data = make(tmp_path / "x", write_jsonl(tmp_path / "a.jsonl"), tokenizer=str(tmp_path / "m.model"))
    assert data.vocab_size == theirs.vocab_size() and len(decoded(data)["val"]) > 8


@pytest.mark.parametrize(
    "name, message",
    [
        ("bpe:12", "from 257"),
        ("bpe:99999999", "to 1000000"),
        ("bpe:many", "no tokenizer bpe:many"),
        ("no/such thing", "no tokenizer no/such thing: use char, bpe:8192, gpt2"),
        ("README.md", "README.md: cannot parse tokenizer.json"),
        ("x/tokenizer.json", "x/tokenizer.json: cannot parse tokenizer.json"),
        ("list.json", "list.json: cannot parse"),
        ("deep.json", "deep.json: cannot parse"),
        ("x.model", "not a SentencePiece model|pip install sentencepiece"),
    ],
)
def test_unknown_tokenizers_are_named(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for path, content in {"list.json": "[]", "deep.json": "[" * 99999}.items():
        (tmp_path / path).write_text(content)
    for path in ("README.md", "x.model", "x/tokenizer.json"):
        (tmp_path / path).write_text("{}")
    with pytest.raises(ValueError, match=message):
        from_name(name, lambda n: [TEXT])


def test_corrupt_vocabularies_are_refused():
    good = from_name("bpe:300", lambda n: [TEXT]).description
    for bad in (dict(tokens=["a"]), dict(tokens=[*good["tokens"], "a"]), dict(tokens=[3]), dict(pattern="(")):
        with pytest.raises(ValueError, match="vocabulary is corrupt"):
            from_description(good | bad)


def test_model_of_ones_own_text_samples_and_exports_without_the_dataset(tmp_path, script, tiny_run):
    transformers = pytest.importorskip("transformers")
    make(tmp_path / "x", write_jsonl(tmp_path / "a.jsonl"), tokenizer="bpe:300")
    flags = [flag for flag in tiny_run.flags if not flag.startswith("--dataset")]
    result = script("train.py", *flags, f"--dataset={tmp_path / 'x'}", "--max_iters=2", "--sample_interval=2")
    assert result.code == 0 and "bits per byte" in result.out, result.err
    shutil.rmtree(tmp_path / "x")
    sample = script("sample.py", f"--out_dir={tiny_run.out}", "--start=Call 日本", "--num_samples=1", "--device=cpu")
    assert sample.code == 0 and sample.out.startswith("Call 日本")
    assert script("sample.py", f"--out_dir={tiny_run.out}", f"--export={tmp_path / 'hub'}", "--device=cpu").code == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    assert theirs.decode(theirs("Call 日本")["input_ids"]) == "Call 日本" and len(theirs) == 300


# -----------------------------------------------------------------------------
# the scripts


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """prepare("shakespeare", "--flag=value", ...) runs a copy of a prepare.py in this process.

    Returns its code, out and err, and the folder of the copy.
    """
    ignored = shutil.ignore_patterns("*.bin", "meta.json", "input.txt", "*.jsonl", "__pycache__")
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=ignored)
    monkeypatch.delenv("TOKENIZER", raising=False)
    modules = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "data"}

    def run(name, *args):
        folder = tmp_path / "data" / name
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(folder / "prepare.py"), run_name="__main__")
        except SystemExit as e:
            code = e.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, folder=folder)

    yield run
    for name in [name for name in sys.modules if name.split(".")[0] == "data"]:
        del sys.modules[name]  # the copies
    sys.modules.update(modules)


def error_of(result):
    """Return the one line with which a script failed."""
    lines = [line for line in result.err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert result.code == 2 and len(lines) == 1 and "Traceback" not in result.err
    return lines[0]


def test_pydocs_char(prepare):
    result = prepare("pydocs_char")
    assert result.code == 0, result.err
    data = Dataset(str(result.folder))
    train, val = data.split("train"), data.split("val")
    assert data.vocab_size < 110 and len(train) > 1_000_000 and 0.05 < len(val) / len(train) < 0.2
    text = from_description(data.tokenizer).decode(train.read(0, len(train)))
    assert "The expression list" in text or "Assignment statements" in text


def test_shakespeare_takes_any_input_txt(prepare, tmp_path):
    (tmp_path / "data" / "shakespeare_char" / "input.txt").write_text(TEXT * 10)
    for name, flags in (("shakespeare_char", []), ("shakespeare", ["--tokenizer=bpe:300"])):
        result = prepare(name, *flags)
        assert result.code == 0 and "not tiny Shakespeare" in result.err
        assert streams(Dataset(str(result.folder))) == [TEXT * 9, TEXT]


def test_shakespeare_has_the_known_counts(prepare, tmp_path):
    if not os.environ.get("TINYSHAKESPEARE"):
        pytest.skip("TINYSHAKESPEARE names no input.txt")
    shutil.copy(os.environ["TINYSHAKESPEARE"], tmp_path / "data" / "shakespeare_char" / "input.txt")
    data = Dataset(str(prepare("shakespeare_char").folder))
    assert (data.vocab_size, len(data.split("train")), len(data.split("val"))) == (65, 1_003_854, 111_540)
    assert data.split("train").read(0, 5).tolist() == [18, 47, 56, 57, 58]  # First
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with the gpt2 vocabulary")
    data = Dataset(str(prepare("shakespeare").folder))
    assert (data.vocab_size, len(data.split("train")), len(data.split("val"))) == (50257, 301_966, 36_059)


def test_shakespeare_is_downloaded_whole_or_not_at_all(prepare, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **options: (_ for _ in ()).throw(OSError("no route")))
    result = prepare("shakespeare_char")
    assert "cannot download https://" in error_of(result) and "(no route); get it elsewhere and save" in result.err
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **options: io.BytesIO(b"half a file"))
    assert "SHA-256" in error_of(prepare("shakespeare_char"))
    assert not [path for path in result.folder.parent.rglob("*") if path.suffix in (".bin", ".tmp", ".txt")]


@pytest.mark.parametrize(
    "content, message",
    [(b"", "contains no text"), (b"\xff\xfe\xfd", "can't decode byte 0xff"), (None, "Is a directory")],
)
def test_shakespeare_without_text_is_an_error(prepare, tmp_path, content, message):
    path = tmp_path / "data" / "shakespeare_char" / "input.txt"
    path.mkdir() if content is None else path.write_bytes(content)
    assert message in error_of(prepare("shakespeare_char"))


def test_folder_that_cannot_be_written_is_an_error(prepare, tmp_path):
    (tmp_path / "data" / "shakespeare_char" / "input.txt").write_text(TEXT * 10)
    (tmp_path / "data" / "shakespeare_char" / "train.bin.tmp").mkdir()
    assert "Is a directory" in error_of(prepare("shakespeare_char"))


def test_text_script(prepare, tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("".join(DOCUMENTS[:50]))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(open(write_jsonl(tmp_path / "r.jsonl"), "rb").read()))
    inputs = [tmp_path / "notes", f"{tmp_path}/*.jsonl.gz", tmp_path / "notes" / "a.md"]
    result = prepare("text", *inputs, "--name=mine", "--tokenizer=bpe:280")
    assert result.code == 0, result.err
    assert Dataset(str(tmp_path / "data" / "mine")).vocab_size == 280
    monkeypatch.setenv("TOKENIZER", "bpe:270")  # the flag's default
    assert prepare("text", tmp_path / "notes").code == 0
    assert Dataset(str(tmp_path / "data" / "text")).vocab_size == 270
    assert prepare("text", "--help").code == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "the following arguments are required: inputs; see --help"),
        (["README.md", "--val=README.md", "--num_samples=3"], "use it without --val"),
        (["README.md", "--val=README.md", "--tokenizer=char"], "the input for train contains no text"),
        (["nowhere.txt"], "no such file or folder: nowhere.txt"),
        (["README.md", "--format=doc"], "--format=doc is not one of txt, md"),
        (["README.md", "--val_share=3"], "--val_share=3.0 is not between 0 and 1"),
        (["README.md", "--workers=-1"], "--workers must not be negative"),
        (["README.md", "--workers=x"], "invalid int value: 'x'; see --help"),
        (["README.md", "--nonsense"], "unrecognized arguments: --nonsense; see --help"),
        *[(["README.md", f"--name={name}"], f"--name={name} is not the name") for name in ("", ".", "../x", "/tmp/x")],
    ],
)
def test_wrong_usage_is_one_line(prepare, flags, message):
    assert message in error_of(prepare("text", *flags))


def test_validation_file_of_ones_own(prepare, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text(TEXT * 500)
    (tmp_path / "notes" / "val.txt").write_text("held out")
    result = prepare("text", tmp_path / "notes", f"--val={tmp_path}/notes/val.txt", "--tokenizer=char", "--name=own")
    assert result.code == 0 and "WARNING" not in result.err
    assert streams(Dataset(str(tmp_path / "data" / "own"))) == [TEXT * 500 + "\n", "held out\n"]


def test_standard_input(prepare, tmp_path, monkeypatch):
    raw = b"".join(json.dumps({"body": text}).encode() + b"\n" for text in DOCUMENTS)
    for expected in ("tokens", "is complete"):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw)))
        result = prepare("text", "-", "--format=jsonl", "--column=body", "--tokenizer=char", "--name=in")
        assert result.code == 0 and expected in result.out
    assert set(contents(tmp_path / "data" / "in")) == {"train.bin", "val.bin", "meta.json", "meta.pkl"}
    text = "".join(streams(Dataset(str(tmp_path / "data" / "in"))))
    assert sorted(text) == sorted("".join(DOCUMENTS) + "\n" * len(DOCUMENTS))


@pytest.mark.parametrize("name", ["openwebtext", "tinystories", "fineweb", "scientific_papers"])
def test_scripts_for_the_hub_read_local_files(prepare, tmp_path, name):
    column, texts = "text", DOCUMENTS[:99]
    if name == "scientific_papers":
        column, texts = "abstract", [" ".join(text.split()) for text in texts]
    write_parquet(tmp_path / "a.parquet", **{"id": list(range(len(DOCUMENTS))), column: DOCUMENTS})
    flags = ["--tokenizer=bpe:300", "--val_share=0.1", "--num_samples=99"]
    result = prepare(name, f"--input={tmp_path}/*.parquet", *flags)
    assert result.code == 0, result.err
    assert all_decoded(Dataset(str(result.folder))) == sorted(texts)


def test_hub_is_streamed_and_its_own_validation_split_is_kept(prepare, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    import huggingface_hub
    from fsspec.implementations.local import LocalFileSystem

    hub = tmp_path / "datasets" / "roneneldan" / "TinyStories" / "data"
    hub.mkdir(parents=True)
    for name, first in (("train-00000-of-2", 9), ("train-00001-of-2", 20), ("validation-00000-of-1", 30)):
        write_parquet(hub / f"{name}.parquet", text=DOCUMENTS[first : first + 9])

    class Hub(LocalFileSystem):
        def glob(self, pattern, detail):
            found = super().glob(f"{tmp_path}/{pattern}", detail=True)
            return {path.removeprefix(f"{tmp_path}/"): info for path, info in found.items()}

        def open(self, path, mode):
            return super().open(f"{tmp_path}/{path}", mode)

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Hub)
    result = prepare("tinystories", "--tokenizer=bpe:300")
    assert result.code == 0, result.err
    expected = {"train": DOCUMENTS[9:18] + DOCUMENTS[20:29], "val": DOCUMENTS[30:39]}
    assert decoded(Dataset(str(result.folder))) == expected

    def no_network(*args, **options):
        raise RuntimeError("no route")

    monkeypatch.setattr(Hub, "open", no_network)
    error = error_of(prepare("tinystories", "--tokenizer=bpe:400", "--force"))
    assert "cannot read hf://datasets/roneneldan/TinyStories/data/train-00000-of-2.parquet: no route" in error
    monkeypatch.setattr(Hub, "glob", no_network)
    assert "cannot list hf://" in error_of(prepare("openwebtext"))


def test_pretokenized_fineweb(prepare, monkeypatch):
    import huggingface_hub

    fetched = []

    def fetch(repo, name, repo_type, local_dir):
        if len(fetched) == 2 and name == "fineweb_train_000002.bin":
            fetched.append("failed")
            raise RuntimeError("no route")
        fetched.append(name)
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, 500
        path = os.path.join(local_dir, name)
        os.makedirs(local_dir, exist_ok=True)
        with open(path, "wb") as f:
            f.write(header.tobytes() + np.arange(500, dtype="<u2").tobytes())
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert "GPT-2 tokens" in error_of(prepare("fineweb", "--pretokenized", "--num_samples=3"))
    failed = prepare("fineweb", "--pretokenized", "--files=2")
    assert "cannot download fineweb_train_000002.bin" in error_of(failed)
    with pytest.raises(FileNotFoundError, match="is not finished"):
        Dataset(str(failed.folder))
    assert prepare("fineweb", "--pretokenized", "--files=2").code == 0
    data = Dataset(str(failed.folder))
    assert (len(data.split("train")), len(data.split("val")), data.vocab_size) == (1000, 500, 50257)
    assert "is complete" in prepare("fineweb", "--pretokenized", "--files=2").out
    assert "prepared with --files=2; use --force" in error_of(prepare("fineweb", "--pretokenized", "--files=3"))
    os.truncate(failed.folder / "fineweb_train_000001.bin", 1500)
    assert prepare("fineweb", "--pretokenized", "--files=2").code == 0
    assert len(Dataset(str(failed.folder)).split("train")) == 1000
    fetched.clear()
    assert prepare("fineweb", "--pretokenized", "--files=3", "--force").code == 0
    assert fetched == ["fineweb_train_000003.bin"]
    assert len(Dataset(str(failed.folder)).split("train")) == 1500


def test_abstracts_from_the_arxiv_api(prepare, monkeypatch):
    queries = []

    def answer(request, timeout):
        query = dict(pair.split("=") for pair in request.full_url.partition("?")[2].split("&"))
        queries.append(query)
        if len(queries) == 2:
            raise OSError("HTTP Error 503")
        start, count = int(query["start"]), int(query["max_results"])
        papers = [f"<entry><id>{i}</id><title>T</title><summary>{DOCUMENTS[i]}</summary></entry>" for i in range(220)]
        total = '<totalResults xmlns="http://a9.com/-/spec/opensearch/1.1/">220</totalResults>'
        feed = f'<feed xmlns="http://www.w3.org/2005/Atom">{total}{"".join(papers[start : start + count])}</feed>'
        return io.BytesIO(feed.encode())

    monkeypatch.setattr("urllib.request.urlopen", answer)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    flags = ["--source=arxiv", "--query=cat:cs.CL", "--tokenizer=bpe:300", "--val_share=0.1"]
    result = prepare("scientific_papers", *flags, "--num_samples=210")
    assert result.code == 0, result.err
    assert all_decoded(Dataset(str(result.folder))) == sorted(" ".join(text.split()) for text in DOCUMENTS[:210])
    assert [query["start"] for query in queries] == ["0", "200", "200"]
    assert queries[0]["search_query"] == "cat%3Acs.CL"
    assert "is complete" in prepare("scientific_papers", *flags, "--num_samples=210").out

    # half a line is downloaded again, and there may be fewer papers than wanted
    path = result.folder / "arxiv-cat%3Acs.CL.jsonl"
    path.write_text(path.read_text()[:-40])
    assert prepare("scientific_papers", *flags, "--num_samples=999", "--force").code == 0
    assert len(path.read_text().splitlines()) == 220 and queries[3]["start"] == "209"
    assert "--source=elsewhere is not hub or arxiv" in error_of(prepare("scientific_papers", "--source=elsewhere"))


def test_names_in_files_cannot_control_the_terminal(prepare, tmp_path):
    (tmp_path / "a.csv").write_text("a\x1b[2Jb,c\n1,2\n")
    assert "a\ufffd[2Jb" in error_of(prepare("text", tmp_path / "a.csv", "--name=a", "--tokenizer=char"))


def test_ctrl_c_in_a_script_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare.py"])
    with pytest.raises(SystemExit) as e, preparation.prepare_script("A script."):
        raise KeyboardInterrupt
    assert e.value.code == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to resume\n"
