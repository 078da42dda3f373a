"""From documents to datasets, against the plain way of doing it."""

import csv
import gzip
import hashlib
import io
import json
import os
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
from data.documents import Files, Piece, Texts
from data.preparation import fraction, write_dataset
from data.shards import Dataset, FolderLock
from data.tokenizer import BytePairTokenizer, CharTokenizer, from_description, from_name

DOCUMENTS = [f"{i} {word}\nÜber {TEXT * (i % 7)}" for i, word in enumerate("a bc déf\r\n 日本 🙂 six".split(" ") * 40)]


def jsonl(path, texts=DOCUMENTS):
    path.write_text("".join(json.dumps({"id": 3, "text": text}) + "\n" for text in texts))
    return str(path)


def make(folder, inputs, **changed):
    """Prepare files as data/text does: the dataset."""
    args = options(**{"tokenizer": "bpe:300", **changed})
    inputs = [str(path) for path in (inputs if isinstance(inputs, list) else [inputs])]
    write_dataset(str(folder), Files({None: inputs}, args), args, "a test")
    return Dataset(str(folder))


def text_of(data):
    """What the tokens of train and val decode to."""
    tokenizer = from_description(data.tokenizer)
    return [tokenizer.decode(tokens.read(0, len(tokens))) for tokens in (data.split("train"), data.split("val"))]


def decoded(data):
    """{split: documents}"""
    tokenizer, texts = from_description(data.tokenizer), {}
    for split in ("train", "val"):
        ids = data.split(split).read(0, len(data.split(split)))
        *parts, rest = np.split(ids, np.flatnonzero(ids == tokenizer.eot) + 1)
        assert len(rest) == 0
        texts[split] = [tokenizer.decode(part[:-1]) for part in parts]
    return texts


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_batches(monkeypatch):
    """So that little text makes many of them, and each is saved."""
    monkeypatch.setattr(preparation, "BATCH", 2000)
    monkeypatch.setattr(preparation, "SAVE_EVERY", 0)


def test_the_tokens_are_those_of_the_documents_one_by_one(tmp_path, small_batches):
    data = make(tmp_path / "x", jsonl(tmp_path / "a.jsonl"), tokenizer="bpe:400", workers=3)
    tokenizer = from_description(data.tokenizer)
    expected = {"train": [], "val": []}
    for text in DOCUMENTS:
        expected["val" if fraction(text, 0) < 0.1 else "train"] += [*tokenizer.encode(text).tolist(), tokenizer.eot]
    for split, ids in expected.items():
        assert data.split(split).read(0, len(data.split(split))).tolist() == ids
    meta = json.loads((tmp_path / "x" / "meta.json").read_text())
    assert meta["files"]["val.bin"]["tokens"] == len(expected["val"])
    assert meta["files"]["val.bin"]["sha256"] == hashlib.sha256(files(tmp_path / "x")["val.bin"]).hexdigest()
    assert sum(meta["documents"].values()) == len(DOCUMENTS) and 8 < meta["documents"]["val"] < 60


def test_the_files_do_not_depend_on_the_number_of_threads(tmp_path, small_batches):
    path = jsonl(tmp_path / "a.jsonl")
    for workers in (1, 4):
        make(tmp_path / str(workers), path, workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "4")


def test_which_documents_are_for_validation_depends_on_nothing_but_their_text(tmp_path):
    first = decoded(make(tmp_path / "a", jsonl(tmp_path / "a.jsonl")))
    more = [*reversed(DOCUMENTS), "another", "one more"]
    second = decoded(make(tmp_path / "b", jsonl(tmp_path / "b.jsonl", more)))
    assert set(first["val"]) == set(second["val"]) - {"another", "one more"} and first["val"] != second["val"]


def write_table(path, rows):
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
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").table({"id": [3] * len(rows), "text": rows})
        parquet.write_table(table, path, row_group_size=7)
    elif kind == "jsonl":
        jsonl(path, rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()[:999]) + gzip.compress(path.read_bytes()[999:]))
    if path.suffix == ".zst":
        pyarrow = pytest.importorskip("pyarrow")
        raw = path.read_bytes()
        path.write_bytes(b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (raw[:999], raw[999:])))


NAMES = "x.jsonl x.jsonl.gz x.jsonl.zst x.csv x.csv.gz x.tsv x.parquet x.txt x.txt.gz x.txt.zst".split()


@pytest.mark.parametrize("name", NAMES)
def test_formats_hold_the_same_documents(tmp_path, name):
    rows = [f'"{" ".join(text.split())}' if ".tsv" in name else text for text in DOCUMENTS[:40]]  # a line a row in tsv
    write_table(tmp_path / name, rows)
    corpus = Files({None: [str(tmp_path / name)]}, options())
    assert [piece.text for piece in corpus.pieces(0) if piece.ends] == rows
    assert corpus.position() == corpus.size == os.path.getsize(tmp_path / name)


def test_long_texts_are_cut_between_paragraphs_and_are_whole_again_as_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 300)
    text = "\n\n".join(f"{i} {TEXT * (i % 5)}" for i in range(99))
    text += "".join(map(chr, range(0x3400, 0x3900)))  # no space to cut at
    (tmp_path / "book.txt").write_text(text)
    pieces = list(Files({None: [str(tmp_path / "book.txt")]}, options()).pieces(0))
    assert "".join(piece.text for piece in pieces) == text and max(len(piece.text) for piece in pieces) <= 300
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert sum(piece.text.endswith("\n") for piece in pieces) > 60
    data = make(tmp_path / "x", tmp_path / "book.txt")
    # where the text goes on in the other split, an end of text stands instead of what is missing
    passages = [passage for split in decoded(data).values() for passage in split]
    assert "".join(sorted(passages, key=text.index)) == text and len(decoded(data)["val"]) > 5


@pytest.mark.parametrize("offset", [0, 1, 100, 4090, 4096, -9])
def test_passages_do_not_depend_on_what_is_before_them(tmp_path, offset):
    document, marker = "".join(map(chr, range(0x4E00, 0x4E00 + 9000))) + "\n\nab " * 999, documents.END_OF_TEXT
    if offset < 0:  # let the text be read to the middle of the last marker at first
        offset = (offset - 4090 - 2 * len(marker) - len(document)) % documents.PIECE
    (tmp_path / "a.txt").write_text("y" * offset + marker + document + marker + "z" * 4090 + marker)
    pieces = list(Files({None: [str(tmp_path / "a.txt")]}, options()).pieces(0))
    first = sum(piece.text.startswith("y") for piece in pieces)
    last = [i for i, piece in enumerate(pieces) if piece.text.startswith("z")]
    expected = [text for text, _ in documents.passages(document, documents.PIECE)]
    assert [piece.text for piece in pieces[first : last[0]]] == expected and len(last) == 1
    assert "|" not in "".join(piece.text for piece in pieces)


def test_passages_have_the_tokens_of_the_whole_text():
    text = "\n\n".join(f"{i} {TEXT * (i % 5)}" for i in range(199)) + " " + "word " * 3000
    tokenizer = from_name("bpe:400", lambda n: [TEXT])
    pieces = [piece for piece, _ in documents.passages(text, documents.PIECE)]
    assert np.concatenate(tokenizer.encode_documents(pieces)).tolist() == tokenizer.encode(text).tolist()
    assert len(pieces) > 10


def test_folders_and_patterns_stand_for_their_files_in_order(tmp_path):
    for name in ("b/2.txt", "b/1.md", "b/c/3.jsonl", "b/.hidden.txt", "b/meta.json", "b/image.png", "a1.log", "a2.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    patterns = [f"{tmp_path}/a*.log", f"{tmp_path}/b", f"{tmp_path}/b/2.txt"]  # the last one again
    corpus = Files({None: patterns}, options())
    texts = [piece.text for part in range(len(corpus.parts)) for piece in corpus.pieces(part)]
    assert texts == ["a1.log", "a2.log", "b/1.md", "b/2.txt", "b/c/3.jsonl"]


@pytest.mark.parametrize(
    "content, text",
    [("\ufeffbom".encode(), "bom"), ("wide ü".encode("utf-16"), "wide ü"), (b"a\xffb\xc3", "a\ufffdb\ufffd")],
)
def test_encodings(tmp_path, content, text):
    (tmp_path / "a.txt").write_bytes(content)
    corpus = Files({None: [str(tmp_path / "a.txt")]}, options())
    assert [piece.text for piece in corpus.pieces(0)] == [text]
    assert corpus.counts["undecodable bytes"] == 2 * ("\ufffd" in text)


BAD_ROWS = ['{"text": 3}', "{", "[1]", '{"other": "a"}', "[" * 100_000, b"\xff".decode("latin-1")]


def test_bad_rows_are_left_out_and_counted(tmp_path, capsys):
    good = [json.dumps({"text": text}) for text in DOCUMENTS]
    (tmp_path / "a.jsonl").write_text("\n\n".join(good[:3] + BAD_ROWS + good[3:]), encoding="latin-1")
    data = make(tmp_path / "x", tmp_path / "a.jsonl", max_bad=0.1)
    assert sorted(sum(decoded(data).values(), [])) == sorted(DOCUMENTS)
    assert f"left out: 6 bad rows (the first: line 7 of {tmp_path}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="6 bad rows in 246 rows are more than --max_bad=0.01; the first: line 7"):
        make(tmp_path / "y", tmp_path / "a.jsonl")
    assert not list((tmp_path / "y").glob("*.bin"))


def test_half_characters_of_json_do_not_stop_a_preparation(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a\\ud83d"}\n' + '{"text": "bc"}\n' + open(jsonl(tmp_path / "b")).read()
    )
    assert "a?" in sum(decoded(make(tmp_path / "x", tmp_path / "a.jsonl")).values(), [])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", bytes(range(128, 256)) * 99, "undecodable bytes in .* is this text"),
        ("a.txt", b"", "no text in this input"),
        ("a.jsonl", b'{"abstract": "x"}\n', "line 1 of .* has no text, but abstract: --column="),
        ("a.json", b'[\n{"text": "x"}\n]', "line 1 of .* is not understood"),
        ("a.csv", b"id,abstract\n1,x\n", "has no column text, but id, abstract: --column= names one"),
        ("a.csv", b"", "has no column text"),
        ("a.txt.gz", b"no gzip", "cannot be read: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(TEXT.encode() * 99)[:-30], "cannot be read: Compressed file ended"),
        ("a.txt.zst", b"no zstd", "a.txt.zst cannot be read|pip install pyarrow"),
        ("a.parquet", b"no parquet", "a.parquet cannot be read|pip install pyarrow"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "x", tmp_path / name, tokenizer="char")
    assert not list((tmp_path / "x").glob("*.bin"))


def parquet(path, **columns):
    pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").table(columns), path)
    return path


def test_columns_of_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    good = parquet(tmp_path / "a.parquet", text=pyarrow.array(DOCUMENTS).dictionary_encode())
    assert [piece.text for piece in Files({None: [str(good)]}, options()).pieces(0)] == DOCUMENTS
    lone = pyarrow.array([b"good", b"b\xffd", None]).cast(pyarrow.binary()).view(pyarrow.string())
    corpus = Files({None: [str(parquet(tmp_path / "b.parquet", text=lone))]}, options())
    assert [piece.text for piece in corpus.pieces(0)] == ["good", "b\ufffdd"]
    assert corpus.counts["bad rows"] == corpus.counts["undecodable bytes"] == 1
    with pytest.raises(ValueError, match="b.parquet cannot be read: it has no column body, but text: --column="):
        make(tmp_path / "x", tmp_path / "b.parquet", column="body", tokenizer="char")
    for column in ([1, 2], [b"a", b"b"]):
        with pytest.raises(ValueError, match="its column text holds .*, not text"):
            make(tmp_path / "x", parquet(tmp_path / "c.parquet", text=column), tokenizer="char")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_stray_quote_does_not_swallow_rows_silently(tmp_path, name):
    gap = "," if name == "a.csv" else "\t"
    rows = [f"{i}{gap}row {i}\n" for i in range(99)]
    (tmp_path / name).write_text(f"id{gap}text\n" + "".join(rows).replace("row 5\n", '"row 5\n'))
    if name == "a.csv":
        with pytest.raises(ValueError, match="1 bad rows in 6 rows"):
            make(tmp_path / "x", tmp_path / name)
    else:
        texts = sum(decoded(make(tmp_path / "x", tmp_path / name)).values(), [])
        assert len(texts) == 99 and '"row 5' in texts


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for name in ("a.parquet", "a.txt.zst"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match="pip install pyarrow"):
            make(tmp_path / "x", tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file or folder: .*/nowhere"):
        make(tmp_path / "x", tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt.gz", "a.parquet"])
def test_an_interrupted_preparation_carries_on_to_the_same_files(tmp_path, monkeypatch, small_batches, capsys, name):
    rows = [*DOCUMENTS[:60], *["\x00"] * 2] if name != "a.jsonl" else DOCUMENTS[:60]
    write_table(tmp_path / name, rows)
    if name == "a.jsonl":
        (tmp_path / name).write_text((tmp_path / name).read_text().replace("\n", "\nbad row\n", 2))
    inputs, settings = [tmp_path / name, jsonl(tmp_path / "z.jsonl", DOCUMENTS[60:])], dict(max_bad=0.5)
    make(tmp_path / "whole", inputs, shard_tokens=1000, **settings)
    write, calls = preparation.TokenFiles.write, iter(range(10**9))
    for every in (5, 7, 11):
        folder = tmp_path / str(every)
        for _ in range(200):

            def interrupted(self, *args, n=every):
                write(self, *args)
                if next(calls) % n == n - 1:
                    self.write = None  # a real kill would not close the files either
                    raise KeyboardInterrupt

            monkeypatch.setattr(preparation.TokenFiles, "write", interrupted)
            try:
                make(folder, inputs, shard_tokens=1000, workers=2, **settings)
                break
            except KeyboardInterrupt:
                with pytest.raises(FileNotFoundError, match="is not finished"):
                    Dataset(str(folder))
        assert files(folder) == files(tmp_path / "whole")
        monkeypatch.setattr(preparation.TokenFiles, "write", write)
    assert capsys.readouterr().out.count("carrying on after") > 10


def test_what_was_written_after_the_last_save_is_cut_off(tmp_path, monkeypatch, small_batches):
    """Even if nothing more is written to that file."""
    path = jsonl(tmp_path / "a.jsonl")
    make(tmp_path / "whole", path)
    monkeypatch.setattr(preparation, "sha256_of", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "x", path)
    for name in ("train.bin.tmp", "val.bin.tmp"):
        with open(tmp_path / "x" / name, "ab") as f:
            f.write(b"abcd")
    monkeypatch.undo()
    make(tmp_path / "x", path)
    assert files(tmp_path / "x") == files(tmp_path / "whole")


def test_a_preparation_killed_for_good_carries_on_to_the_same_files(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", DOCUMENTS * 30)
    make(tmp_path / "whole", path)
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; from data import preparation; "
        "preparation.SAVE_EVERY, preparation.BATCH = 0, 30_000; from test_prepare import make; make(*sys.argv[1:])"
    )
    start = lambda: subprocess.Popen([sys.executable, "-c", code, tmp_path / "killed", path], stderr=subprocess.DEVNULL)  # noqa: E731
    state = tmp_path / "killed" / "preparing.json"
    for delay in (0, 0.01, 0.02, 0.03):
        process, before = start(), state.stat().st_mtime_ns if state.exists() else 0
        while not (state.exists() and state.stat().st_mtime_ns > before):
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.wait()
    assert start().wait() == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_finished_dataset_is_left_alone_and_another_one_is_not_replaced(tmp_path, capsys):
    folder, path = tmp_path / "x", jsonl(tmp_path / "a.jsonl")
    make(folder, path)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    assert set(before) == {"train.bin", "val.bin", "meta.json"}
    make(folder, path)
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="made with tokenizer='bpe:300': --force replaces it"):
        make(folder, path, tokenizer="char")
    jsonl(tmp_path / "a.jsonl", DOCUMENTS[1:])
    with pytest.raises(ValueError, match="made with other or changed input: --force replaces it"):
        make(folder, path)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()} == before
    make(folder, path, shard_tokens=4000, force=True)
    assert {"train_000000.bin", "train_000001.bin", "val_000000.bin", "meta.json"} <= set(files(folder))
    assert "train.bin" not in files(folder) and len(decoded(Dataset(str(folder)))["train"]) > 100


def test_what_nanogpt_prepared_is_not_replaced(tmp_path):
    np.arange(99, dtype="<u2").tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="made in another way: --force"):
        make(tmp_path, jsonl(tmp_path / "a.jsonl"))
    make(tmp_path, jsonl(tmp_path / "a.jsonl"), force=True)
    assert not (tmp_path / "meta.pkl").exists()


def test_a_damaged_dataset_is_made_again(tmp_path):
    make(tmp_path / "x", jsonl(tmp_path / "a.jsonl"))
    before = files(tmp_path / "x")
    (tmp_path / "x" / "train.bin").write_bytes(b"ab")
    make(tmp_path / "x", tmp_path / "a.jsonl")
    assert files(tmp_path / "x") == before


@pytest.mark.parametrize("kill_at", range(3))
def test_files_killed_between_renames_do_not_train_and_the_next_call_finishes(tmp_path, monkeypatch, kill_at):
    path, folder = jsonl(tmp_path / "a.jsonl"), tmp_path / "x"
    make(folder, path, tokenizer="char")
    make(tmp_path / "whole", path)
    replace, calls = os.replace, iter(range(99))

    def killed(a, b):
        if str(b).endswith((".bin", "meta.json")) and next(calls) == kill_at:
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        make(folder, path, force=True)
    with pytest.raises(FileNotFoundError, match="is not finished"):
        Dataset(str(folder))
    monkeypatch.setattr(os, "replace", replace)
    make(folder, path)
    assert files(folder) == files(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_room_carries_on(tmp_path, monkeypatch, small_batches):
    path, write = jsonl(tmp_path / "a.jsonl"), preparation.TokenFiles.write
    make(tmp_path / "whole", path)
    calls = iter(range(999))

    def full(self, *args):
        if next(calls) == 9:
            raise OSError(28, "No space left on device")
        write(self, *args)

    monkeypatch.setattr(preparation.TokenFiles, "write", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'x'}'"):
        make(tmp_path / "x", path)
    make(tmp_path / "x", path)
    assert files(tmp_path / "x") == files(tmp_path / "whole")


def test_unfinished_files_that_were_damaged_are_begun_anew(tmp_path, monkeypatch, small_batches, capsys):
    path = jsonl(tmp_path / "a.jsonl")
    make(tmp_path / "whole", path)
    monkeypatch.setattr(preparation, "sha256_of", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "x", path)
    (tmp_path / "x" / "train.bin.tmp").write_bytes(b"ab")
    monkeypatch.undo()
    make(tmp_path / "x", path)
    assert "beginning again" in capsys.readouterr().out and files(tmp_path / "x") == files(tmp_path / "whole")


def test_a_kill_while_few_documents_are_cut_into_two_splits(tmp_path, monkeypatch, small_batches):
    path, write = jsonl(tmp_path / "a.jsonl"), preparation.TokenFiles.write
    for share in (1e-12, 1 - 1e-12):
        settings = dict(val_share=share, shard_tokens=1000)
        make(tmp_path / f"whole{share}", path, **settings)
        folder, cutting = tmp_path / f"x{share}", preparation.TokenFiles.cut

        def killed(self, cutting=cutting):
            cutting(self)
            raise KeyboardInterrupt

        monkeypatch.setattr(preparation.TokenFiles, "cut", killed)
        with pytest.raises(KeyboardInterrupt):
            make(folder, path, **settings)
        monkeypatch.setattr(preparation.TokenFiles, "cut", cutting)
        make(folder, path, **settings)
        assert files(folder) == files(tmp_path / f"whole{share}")
    assert preparation.TokenFiles.write is write


def test_what_was_half_replaced_does_not_train_after_another_command_failed(tmp_path, monkeypatch):
    path, folder = jsonl(tmp_path / "a.jsonl"), tmp_path / "x"
    monkeypatch.setattr(preparation, "remove_others", lambda *args: 1 / 0)  # after the first files are in their places
    with pytest.raises(ZeroDivisionError):
        make(folder, path)
    monkeypatch.undo()
    make(tmp_path / "t", path)
    (tmp_path / "b.jsonl").write_text("no row")
    with pytest.raises(ValueError, match="bad rows"):
        make(folder, tmp_path / "b.jsonl", tokenizer=str(tmp_path / "t"), force=True)
    with pytest.raises(FileNotFoundError, match="is not finished"):
        Dataset(str(folder))


def test_a_command_that_failed_at_once_does_not_block_the_right_one(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in DOCUMENTS))
    with pytest.raises(ValueError, match="--column= names another"):
        make(tmp_path / "x", tmp_path / "a.jsonl", tokenizer="char")
    assert len(decoded(make(tmp_path / "x", tmp_path / "a.jsonl", column="body"))["train"]) > 100


@pytest.mark.parametrize("state", ["{}", "[]", "{", '{"recipe": [1]}', '{"recipe": {}, "tokens": 3}'])
def test_a_damaged_state_is_begun_anew(tmp_path, state):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "preparing.json").write_text(state)
    assert len(make(tmp_path / "x", jsonl(tmp_path / "a.jsonl")).split("train")) > 1000


def test_two_processes_do_not_prepare_one_folder(tmp_path):
    pytest.importorskip("fcntl")
    (tmp_path / "x").mkdir()
    with (
        FolderLock(str(tmp_path / "x")),
        pytest.raises(ValueError, match="another process is writing into"),
    ):
        make(tmp_path / "x", jsonl(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("texts", [["one document only"], ["ab"], ["a" * 999, "b"]])
def test_the_smallest_inputs_cut(tmp_path, texts):
    data = make(tmp_path / "x", jsonl(tmp_path / "a.jsonl", texts), val_share=1e-9, tokenizer="char", shard_tokens=100)
    streams = [data.split(split) for split in ("train", "val")]
    ids = np.concatenate([stream.read(0, len(stream)) for stream in streams])
    assert "".join(text_of(data)) == "".join(text + "\n" for text in texts)
    assert len(streams[0]) == len(ids) * 9 // 10


def test_num_samples_takes_the_first_documents(tmp_path):
    data = make(tmp_path / "x", jsonl(tmp_path / "a.jsonl"), num_samples=50)
    assert sorted(sum(decoded(data).values(), [])) == sorted(DOCUMENTS[:50])


def test_num_samples_opens_no_more_files_than_it_needs(tmp_path):
    paths = [jsonl(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")]
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    assert sum(map(len, decoded(make(tmp_path / "x", paths, num_samples=240)).values())) == 240
    with pytest.raises(ValueError, match="b.parquet"):
        make(tmp_path / "y", paths, num_samples=241)


def test_other_settings_are_another_dataset(tmp_path):
    (tmp_path / "a.log").write_text('{"text": "a"}\n' * 9)
    make(tmp_path / "x", tmp_path / "a.log")
    with pytest.raises(ValueError, match="made with format='': --force"):
        make(tmp_path / "x", tmp_path / "a.log", format="jsonl")
    make(tmp_path / "t", jsonl(tmp_path / "t.jsonl"))
    make(tmp_path / "y", tmp_path / "a.log", tokenizer=str(tmp_path / "t"))
    make(tmp_path / "t", jsonl(tmp_path / "t.jsonl"), tokenizer="bpe:301", force=True)
    with pytest.raises(ValueError, match="made with tokenizer"):
        make(tmp_path / "y", tmp_path / "a.log", tokenizer=str(tmp_path / "t"))


# -----------------------------------------------------------------------------
# tokenizers by name


def test_a_vocabulary_learned_from_a_text_gives_its_bytes_back(tmp_path):
    tokenizer = from_name("bpe:500", lambda n: DOCUMENTS)
    again = from_name("bpe:500", lambda n: DOCUMENTS)
    assert tokenizer.description == again.description and tokenizer.vocab_size == 500
    for text in (*DOCUMENTS, "\x00\x7f never seen: ℵ", "<|endoftext|>", ""):
        (ids,) = tokenizer.encode_documents([text])
        assert tokenizer.decode(ids) == text and tokenizer.eot not in ids
    assert tokenizer.encode("<|endoftext|>").tolist() == [tokenizer.eot] == [499]
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 3


def test_the_vocabulary_is_the_one_that_the_tokenizers_library_learns(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=499, initial_alphabet=alphabet, show_progress=False)
    plain.train_from_iterator(DOCUMENTS, trainer)
    ours = BytePairTokenizer.train(500, DOCUMENTS)
    for text in DOCUMENTS:
        assert ours.encode(text).tolist() == plain.encode(text).ids


def test_a_learned_vocabulary_goes_to_the_hub_and_comes_back(tmp_path):
    tokenizer = from_name("bpe:400", lambda n: DOCUMENTS)
    tokenizer.save_pretrained(str(tmp_path))
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    ours = from_name(str(tmp_path / "tokenizer.json"))
    for text in DOCUMENTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist() == ours.encode(text).tolist()
    assert theirs.eos_token_id == tokenizer.eot == ours.eot
    hidden = [ids.tolist() for ids in ours.encode_documents(["a <|endoftext|>"])]
    assert hidden == [ids.tolist() for ids in tokenizer.encode_documents(["a <|endoftext|>"])]
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "alone.json")
    (tmp_path / "sub").mkdir()
    (tmp_path / "alone.json").rename(tmp_path / "sub" / "alone.json")
    assert from_name(str(tmp_path / "sub" / "alone.json")).eot == tokenizer.eot  # by the usual name of that token


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_models(tmp_path, kind):
    sentencepiece = pytest.importorskip("sentencepiece")
    settings = dict(model_type=kind, vocab_size=400 if kind == "bpe" else 330, byte_fallback=True, minloglevel=2)
    texts = iter([TEXT, *DOCUMENTS[:20]] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_prefix=str(tmp_path / "m"), hard_vocab_limit=False, **settings
    )
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
    data = make(tmp_path / "x", jsonl(tmp_path / "a.jsonl"), tokenizer=str(tmp_path / "m.model"))
    assert data.vocab_size == theirs.vocab_size() and len(decoded(data)["val"]) > 8


def test_the_tokenizer_of_another_dataset(tmp_path):
    first = make(tmp_path / "x", jsonl(tmp_path / "a.jsonl"))
    second = make(tmp_path / "y", jsonl(tmp_path / "b.jsonl", ["other text"] * 9), tokenizer=str(tmp_path / "x"))
    assert first.tokenizer == second.tokenizer


def test_texts_that_are_hard_on_the_libraries(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [" " * 1_000_000 + "x", "ab" * 200_000])
    data = make(tmp_path / "x", path, tokenizer="bpe:400")
    assert "".join(text_of(data)).replace("<|endoftext|>", "") == " " * 1_000_000 + "x" + "ab" * 200_000
    CharTokenizer("abc\n").save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="cannot spell this text"):
        make(tmp_path / "y", path, tokenizer=str(tmp_path / "tokenizer.json"))


def test_a_large_vocabulary_is_written_in_four_bytes(tmp_path):
    text = "".join(chr(i) for i in range(0x10000, 0x10000 + 70000))
    data = make(tmp_path / "x", jsonl(tmp_path / "a.jsonl", [text]), tokenizer="char")
    tokens = data.split("train")
    assert data.vocab_size == 70001 and os.path.getsize(tmp_path / "x" / "train.bin") == 4 * len(tokens)
    assert from_description(data.tokenizer).decode(tokens.read(62000, 99)) == text[62000:62099]
    tokens.check(16, data.vocab_size)


@pytest.mark.parametrize(
    "name, message",
    [
        ("bpe:12", "from 257"),
        ("bpe:many", "from 257"),
        ("no/such thing", "no tokenizer no/such thing, .* char, bpe:8192, gpt2"),
        ("README.md", "README.md holds no tokenizer"),
        ("x.model", "holds no tokenizer|pip install sentencepiece"),
        ("x/tokenizer.json", "holds no tokenizer"),
        ("list.json", "list.json holds no tokenizer"),
        ("deep.json", "deep.json holds no tokenizer"),
        ("empty.model", "holds no tokenizer|pip install sentencepiece"),
        ("bpe:99999999", "to 1000000"),
    ],
)
def test_names_of_no_tokenizer(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    contents = {"list.json": "[]", "deep.json": "[" * 99999, "empty.model": ""}
    for path in ("README.md", "x.model", "x/tokenizer.json", *contents):
        (tmp_path / path).write_text(contents.get(path, "{}"))
    with pytest.raises(ValueError, match=message):
        from_name(name, lambda n: [TEXT])
    with pytest.raises(ValueError, match="it needs one"):
        from_name("char")


def test_damaged_vocabularies_are_refused():
    good = from_name("bpe:300", lambda n: [TEXT]).description
    for bad in (dict(tokens=["a"]), dict(tokens=[*good["tokens"], "a"]), dict(tokens=[3]), dict(pattern="(")):
        with pytest.raises(ValueError, match="vocabulary is damaged"):
            from_description(good | bad)


# -----------------------------------------------------------------------------
# the scripts


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """prepare("shakespeare", "--flag=value", ...) runs a copy of a prepare script, in this process: code, out, err, and
    the folder of the copy."""
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


def errors(result):
    """What a script that failed said: one line, no traceback."""
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
    first = (result.folder / "meta.json").read_bytes()
    again = prepare("pydocs_char")
    assert again.code == 0 and "is finished" in again.out and (again.folder / "meta.json").read_bytes() == first


def test_shakespeare_takes_the_text_that_lies_there(prepare, tmp_path):
    (tmp_path / "data" / "shakespeare_char" / "input.txt").write_text(TEXT * 10)
    for name, tokens in (("shakespeare_char", len(TEXT) * 9), ("shakespeare", None)):
        result = prepare(name, *([] if tokens else ["--tokenizer=bpe:300"]))
        assert result.code == 0 and "not tiny Shakespeare" in result.err
        data = Dataset(str(result.folder))
        assert tokens in (None, len(data.split("train")))
        assert text_of(data) == [TEXT * 9, TEXT]


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


def test_shakespeare_without_network_says_what_to_do(prepare, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **options: (_ for _ in ()).throw(OSError("no route")))
    result = prepare("shakespeare_char")
    assert "cannot download (no route): fetch https://" in errors(result) and "save it as" in result.err
    assert not list(result.folder.glob("*.bin")) and not list(result.folder.glob("*.tmp"))


@pytest.mark.parametrize(
    "content, message", [(b"", "is empty"), (b"\xff\xfe\xfd", "not UTF-8"), (None, "Is a directory")]
)
def test_shakespeare_refuses_what_is_no_text(prepare, tmp_path, content, message):
    path = tmp_path / "data" / "shakespeare_char" / "input.txt"
    path.mkdir() if content is None else path.write_bytes(content)
    assert message in errors(prepare("shakespeare_char"))


def test_a_script_that_cannot_write_says_so(prepare, tmp_path):
    (tmp_path / "data" / "shakespeare_char" / "input.txt").write_text(TEXT * 10)
    (tmp_path / "data" / "shakespeare_char" / "train.bin.tmp").mkdir()
    assert "Is a directory" in errors(prepare("shakespeare_char"))


def test_text_of_ones_own(prepare, tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("".join(DOCUMENTS[:50]))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(open(jsonl(tmp_path / "r.jsonl"), "rb").read()))
    inputs = [tmp_path / "notes", f"{tmp_path}/*.jsonl.gz", tmp_path / "notes" / "a.md"]
    result = prepare("text", *inputs, "--name=mine", "--tokenizer=bpe:280")
    assert result.code == 0, result.err
    assert Dataset(str(tmp_path / "data" / "mine")).vocab_size == 280
    monkeypatch.setenv("TOKENIZER", "bpe:270")  # the flag's default
    assert prepare("text", tmp_path / "notes").code == 0
    assert Dataset(str(tmp_path / "data" / "text")).vocab_size == 270
    assert "say which text" in errors(prepare("text")) and "no such file" in errors(prepare("text", "nowhere.txt"))
    assert "--format takes" in errors(prepare("text", tmp_path / "notes", "--format=doc"))
    assert "between 0 and 1" in errors(prepare("text", tmp_path / "notes", "--val_share=3"))
    for name in ("", ".", "..", "../x", "/tmp/x"):
        assert "--name is that of a folder in data/" in errors(prepare("text", tmp_path / "notes", f"--name={name}"))
    assert "--nonsense" in errors(prepare("text", "--nonsense")) and "int" in errors(prepare("text", "--workers=x"))


def test_standard_input(prepare, tmp_path, monkeypatch):
    raw = b"".join(json.dumps({"body": text}).encode() + b"\n" for text in DOCUMENTS)
    for expected in ("tokens", "is finished"):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw)))
        result = prepare("text", "-", "--format=jsonl", "--column=body", "--tokenizer=char", "--name=in")
        assert result.code == 0 and expected in result.out
    assert set(files(tmp_path / "data" / "in")) == {"train.bin", "val.bin", "meta.json"}
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in errors(prepare("text", "-"))
    text = "".join(text_of(Dataset(str(tmp_path / "data" / "in"))))
    assert sorted(text) == sorted("".join(DOCUMENTS) + "\n" * len(DOCUMENTS))


def test_a_model_of_ones_own_text_samples_without_it_and_goes_to_the_hub(tmp_path, script, tiny_run):
    transformers = pytest.importorskip("transformers")
    make(tmp_path / "x", jsonl(tmp_path / "a.jsonl"), tokenizer="bpe:300")
    flags = [flag for flag in tiny_run.flags if not flag.startswith("--dataset")]
    result = script("train.py", *flags, f"--dataset={tmp_path / 'x'}", "--max_iters=2")
    assert result.code == 0 and "bits per byte" in result.out, result.err
    shutil.rmtree(tmp_path / "x")
    sample = script("sample.py", f"--out_dir={tiny_run.out}", "--start=Call 日本", "--num_samples=1", "--device=cpu")
    assert sample.code == 0 and sample.out.startswith("Call 日本")
    assert script("sample.py", f"--out_dir={tiny_run.out}", f"--export={tmp_path / 'hub'}", "--device=cpu").code == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    assert theirs.decode(theirs("Call 日本")["input_ids"]) == "Call 日本" and len(theirs) == 300


@pytest.mark.parametrize("name", ["openwebtext", "tinystories", "fineweb", "scientific_papers"])
def test_scripts_of_the_hub_read_local_files_of_its_format(prepare, tmp_path, name):
    pytest.importorskip("pyarrow")
    column = "abstract" if name == "scientific_papers" else "text"
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(DOCUMENTS))), column: DOCUMENTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    flags = ["--tokenizer=bpe:300", "--val_share=0.1", "--num_samples=99"]
    result = prepare(name, f"--input={tmp_path}/*.parquet", *flags)
    assert result.code == 0, result.err
    edit = (lambda text: " ".join(text.split())) if name == "scientific_papers" else str
    assert sorted(sum(decoded(Dataset(str(result.folder))).values(), [])) == sorted(map(edit, DOCUMENTS[:99]))


def test_the_hub_is_read_file_by_file_and_its_own_validation_split_is_kept(prepare, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    import huggingface_hub
    import pyarrow.parquet
    from fsspec.implementations.local import LocalFileSystem

    hub = tmp_path / "datasets" / "roneneldan" / "TinyStories" / "data"
    hub.mkdir(parents=True)
    for name, rows in (("train-00000-of-2", 9), ("train-00001-of-2", 20), ("validation-00000-of-1", 30)):
        pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS[rows : rows + 9]}), hub / f"{name}.parquet")

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
    assert "TinyStories/data/train-00000-of-2.parquet cannot be read: no route" in errors(
        prepare("tinystories", "--tokenizer=bpe:400", "--force")
    )
    monkeypatch.setattr(Hub, "glob", no_network)
    assert "cannot ask the Hugging Face Hub" in errors(prepare("openwebtext"))


def test_ready_made_tokens_of_fineweb(prepare, tmp_path, monkeypatch):
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
    assert "GPT-2's" in errors(prepare("fineweb", "--pretokenized", "--num_samples=3"))
    failed = prepare("fineweb", "--pretokenized", "--files=2")
    assert "cannot fetch fineweb_train_000002.bin" in errors(failed)
    with pytest.raises(FileNotFoundError, match="is not finished"):
        Dataset(str(failed.folder))
    assert prepare("fineweb", "--pretokenized", "--files=2").code == 0
    data = Dataset(str(failed.folder))
    assert (len(data.split("train")), len(data.split("val")), data.vocab_size) == (1000, 500, 50257)
    assert "is finished" in prepare("fineweb", "--pretokenized", "--files=2").out
    assert "made with files=2: --force" in errors(prepare("fineweb", "--pretokenized", "--files=3"))
    fetched.clear()
    assert prepare("fineweb", "--pretokenized", "--files=3", "--force").code == 0
    assert fetched == ["fineweb_train_000003.bin"]
    assert len(Dataset(str(failed.folder)).split("train")) == 1500


def test_abstracts_from_the_api_of_arxiv(prepare, monkeypatch):
    asked = []

    def answer(request, timeout):
        wanted = dict(pair.split("=") for pair in request.full_url.partition("?")[2].split("&"))
        asked.append(wanted)
        if len(asked) == 2:
            raise OSError("HTTP Error 503")
        start, count = int(wanted["start"]), int(wanted["max_results"])
        papers = [f"<entry><id>{i}</id><title>T</title><summary>{DOCUMENTS[i]}</summary></entry>" for i in range(220)]
        total = '<totalResults xmlns="http://a9.com/-/spec/opensearch/1.1/">220</totalResults>'
        feed = f'<feed xmlns="http://www.w3.org/2005/Atom">{total}{"".join(papers[start : start + count])}</feed>'
        return io.BytesIO(feed.encode())

    monkeypatch.setattr("urllib.request.urlopen", answer)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    flags = ["--source=arxiv", "--query=cat:cs.CL", "--tokenizer=bpe:300", "--val_share=0.1"]
    result = prepare("scientific_papers", *flags, "--num_samples=210")
    assert result.code == 0, result.err
    texts = sum(decoded(Dataset(str(result.folder))).values(), [])
    assert sorted(texts) == sorted(" ".join(text.split()) for text in DOCUMENTS[:210])
    assert [w["start"] for w in asked] == ["0", "200", "200"] and asked[0]["search_query"] == "cat%3Acs.CL"
    # half a line of an interruption is fetched again; all that there are is fewer than asked for
    path = result.folder / "arxiv-cat%3Acs.CL.jsonl"
    path.write_text(path.read_text()[:-40])
    assert prepare("scientific_papers", *flags, "--num_samples=999", "--force").code == 0
    assert len(path.read_text().splitlines()) == 220 and asked[3]["start"] == "209"
    assert "hub or arxiv" in errors(prepare("scientific_papers", "--source=elsewhere"))


def test_ctrl_c_in_a_script_is_quiet(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare.py"])
    with pytest.raises(SystemExit) as e, preparation.prepare_script("A script."):
        raise KeyboardInterrupt
    assert e.value.code == 130 and capsys.readouterr().err == "interrupted: the same command carries on\n"


def test_pieces_in_memory_keep_their_splits_and_have_nothing_between(tmp_path):
    pieces = [Piece("abc", False, "train"), Piece("ca", False, "val"), Piece("b", False, "train")]
    write_dataset(str(tmp_path), Texts(pieces), options(tokenizer="char"), "a test")
    assert text_of(Dataset(str(tmp_path))) == ["abcb", "ca"]
