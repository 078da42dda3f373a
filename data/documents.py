"""
What the documents of a corpus are: Texts, which are in memory, or Files of any format, size and number. Both have

    parts           what is read one after another, files for example
    pieces(part)    iterates over the documents of a part; long ones come in pieces
    identity        tells one corpus from another, without asking the network
    size            in bytes, and position(), how many of them are read
    counts          of what is good and bad in what is read, by name
    check(final)    ValueError if too much of it is bad
"""

import codecs
import contextlib
import csv
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import sys
import tempfile
import zlib
from typing import NamedTuple


class Piece(NamedTuple):
    """A document, or the next piece of one that is too long to be held as a whole."""

    text: str
    ends: bool = True  # the document ends with it
    split: str | None = None  # train or val; None: to be chosen by a hash of the text


class Texts:
    """Documents that are in memory: a list of pieces. identity tells one list from another, by default by its text."""

    parts = [None]

    def __init__(self, pieces, identity=None):
        self.list = pieces
        self.size = sum(len(piece.text) for piece in pieces)
        self.identity = identity or hashlib.sha256(repr(pieces).encode("utf-8", "replace")).hexdigest()
        self.counts = {}

    def position(self):
        return self.size

    def pieces(self, part):
        return iter(self.list)

    def check(self, final):
        pass


PIECE = 1 << 12  # characters: longer texts are cut at the last paragraph, line or word that ends before
END_OF_TEXT = "<|endoftext|>"  # separates documents in .txt files, as in those of TinyStories


class Files:
    """Documents in files: plain text, whole or with <|endoftext|> between documents, and a document a row in jsonl,
    csv, tsv and parquet; .gz and .zst are unpacked.

    splits: {"train", "val" or None, to choose by a hash: [path, folder, pattern* or hf://datasets/...]}
    args: column, format and max_bad of OPTIONS
    edit: what to do to the text of each row

    Long texts come in passages, chosen for a split one by one. Unreadable rows and bytes are left out and counted in
    counts. OSError and ValueError say what is wrong with a file.
    """

    def __init__(self, splits, args, edit=str):
        self.column, self.format, self.max_bad, self.edit = args.column, args.format, args.max_bad, edit
        if self.format not in ("", *FORMATS):
            raise ValueError(f"--format takes {', '.join(FORMATS)}, not {self.format}")
        self.stdin = None  # a copy: it may be read twice
        patterns = [(split, pattern) for split, patterns in splits.items() for pattern in dict.fromkeys(patterns)]
        self.found = []
        for split, pattern in patterns:
            found = self.keep_stdin() if pattern == "-" else None if pattern.startswith("hf://") else find(pattern)
            self.found.append((split, pattern, found))
        self.identity = hashlib.sha256(json.dumps(self.found).encode()).hexdigest()
        self.counts = {"rows": 0, "bad rows": 0, "characters": 0, "undecodable bytes": 0}
        self.first_bad = ""
        self.before, self.within = 0, int  # bytes in the parts before this one, and a function: those read of it
        self.on_error = f"counted for {id(self)}"
        codecs.register_error(self.on_error, self.undecodable)

    @functools.cached_property
    def parts(self):
        """(split, path, size, stamp) of each file."""
        parts = {}
        for split, pattern, found in self.found:
            for path, size, stamp in found or find(pattern):
                parts.setdefault(path, (split, path, size, stamp))
        return list(parts.values())

    @functools.cached_property
    def starts(self):
        """How many bytes there are before each of the parts, and in all."""
        return [0, *itertools.accumulate(size for _, _, size, _ in self.parts)]

    @property
    def size(self):
        return self.starts[-1]

    def keep_stdin(self):
        """Copy standard input into a file that is gone when the process is, in TMPDIR; what find() says of it."""
        if sys.stdin is None:
            raise ValueError("standard input is closed")
        self.stdin, digest = tempfile.TemporaryFile(), hashlib.sha256()
        while block := sys.stdin.buffer.read(1 << 20):
            self.stdin.write(block)
            digest.update(block)
        self.stdin.flush()
        return [("-", self.stdin.tell(), digest.hexdigest())]

    def undecodable(self, error):
        self.counts["undecodable bytes"] += error.end - error.start
        return "\N{REPLACEMENT CHARACTER}", error.end

    def pieces(self, part):
        """The pieces of one of the parts."""
        split, path, size, _ = self.parts[part]
        self.before = self.starts[part]
        reader = FORMATS.get(self.format or extension(path), Files.text)
        try:
            with self.open(path, packed=reader is Files.parquet) as f:
                for text, ends in reader(self, f, path):
                    self.counts["characters"] += len(text)
                    yield Piece(text, ends, split)
        except ImportError as e:
            raise ValueError(f"{path} needs a package: pip install {str(e.name).partition('.')[0]}") from None
        except Exception as e:
            if not path.startswith("hf://") and not isinstance(e, (OSError, EOFError, zlib.error, ValueError)):
                raise
            raise ValueError(f"{path} cannot be read: {e or type(e).__name__}") from None
        finally:
            self.within = lambda: size

    def position(self):
        """How many bytes of all are read."""
        return self.before + self.within()

    @contextlib.contextmanager
    def open(self, path, packed=False):
        """A binary file, unpacked if its name says so."""
        if path.startswith("hf://"):
            from huggingface_hub import HfFileSystem

            file = HfFileSystem().open(path[5:], "rb")
        elif path == "-":
            self.stdin.seek(0)
            file = os.fdopen(os.dup(self.stdin.fileno()), "rb")
        else:
            file = open(path, "rb")
        with file as raw:
            self.within = raw.tell
            if path.lower().endswith(".gz") and not packed:
                yield gzip.open(raw)
            elif path.lower().endswith(".zst") and not packed:
                import pyarrow

                yield io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
            else:
                yield raw if hasattr(raw, "peek") else io.BufferedReader(raw)

    def decode(self, f):
        start = f.peek(4)[:4]
        encoding = "utf-16" if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        encoding = "utf-32" if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE) else encoding
        return io.TextIOWrapper(f, encoding, errors=self.on_error, newline="")

    def text(self, f, path):
        f, rest = self.decode(f), ""
        while block := f.read(PIECE):
            *documents, rest = (rest + block).split(END_OF_TEXT)
            for document in documents:
                yield from ((text, not more) for text, more in passages(document, PIECE))
            # half of an <|endoftext|> may stand at its end: where it is cut must not depend on where a block ends
            for text, more in passages(rest, PIECE + len(END_OF_TEXT)):
                if more:
                    yield text, False
                else:
                    rest = text
        yield from ((text, not more) for text, more in passages(rest, PIECE))

    def jsonl(self, f, path):
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                for text, ends in self.row(row, f"line {number} of {path}"):
                    yield text.encode("utf-8", "replace").decode(), ends  # JSON can spell half a character

    def csv(self, f, path, delimiter=","):
        csv.field_size_limit(2**31 - 1)
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        rows = csv.DictReader(self.decode(f), delimiter=delimiter, quoting=quoting, strict=True)
        self.check_column(rows.fieldnames or [])
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error:
                row = None
            yield from self.row(row, f"line {rows.line_num} of {path}")

    def tsv(self, f, path):
        return self.csv(f, path, "\t")

    def parquet(self, f, path):
        from pyarrow import binary
        from pyarrow.parquet import ParquetFile

        table, seen, size = ParquetFile(f, buffer_size=1 << 20), 0, f.seek(0, 2)
        self.check_column(table.schema_arrow.names)
        kind = table.schema_arrow.field(self.column).type
        if not str(getattr(kind, "value_type", kind)).endswith(("string", "string_view")):
            raise ValueError(f"its column {self.column} holds {kind}, not text: --column= names one")
        self.within = lambda: size * seen // max(1, table.metadata.num_rows)
        for batch in table.iter_batches(batch_size=256, columns=[self.column]):
            try:
                texts = batch.column(0).to_pylist()
            except UnicodeDecodeError:
                texts = batch.column(0).cast(binary()).to_pylist()
                texts = [text if text is None else text.decode("utf-8", self.on_error) for text in texts]
            for text in texts:
                seen += 1
                yield from self.row({self.column: text}, f"row {seen} of {path}")

    def check_column(self, names):
        if self.column not in names:
            there = ", ".join(names[:20]) or "none at all"
            raise ValueError(f"it has no column {self.column}, but {there}: --column= names one")

    def row(self, row, where):
        """The text of a row, if it has one: as a document, or not at all."""
        self.counts["rows"] += 1
        text = row.get(self.column) if isinstance(row, dict) else None
        if isinstance(text, str):
            return [(self.edit(text), True)] if text else []
        self.counts["bad rows"] += 1
        if not self.first_bad:
            self.first_bad = f"{where} is not understood: jsonl has an object a line, csv quotes in pairs"
            if isinstance(row, dict):
                there = ", ".join(str(name) for name in list(row)[:20])
                lacks = f"text in its {self.column}" if self.column in row else f"{self.column}, but {there}"
                self.first_bad = f"{where} has no {lacks}: --column= names another"
        return []

    def check(self, final):
        """ValueError if more than max_bad of all is bad, of enough to tell unless it is final."""
        for bad, of in (("bad rows", "rows"), ("undecodable bytes", "characters")):
            bad_ones, all_ones = self.counts[bad], self.counts[of]
            if bad_ones > self.max_bad * all_ones and (final or all_ones > 1e5):
                raise ValueError(
                    f"{bad_ones:,} {bad} in {all_ones:,} {of} are more than --max_bad={self.max_bad}"
                    + (f"; the first: {self.first_bad}" if bad == "bad rows" else ": is this text?")
                )


FORMATS = {
    "txt": Files.text, "md": Files.text, "jsonl": Files.jsonl, "ndjson": Files.jsonl, "csv": Files.csv,
    "tsv": Files.tsv, "parquet": Files.parquet, "json": Files.jsonl,
}  # fmt: skip


def passages(text, longest):
    """Yield (passage, whether more follow) of a text: cut before the last character of the last paragraph break in the
    first PIECE characters, else of the last line break, else of the last space, as long as it is longer than longest.
    Most tokenizers split the text there anyway."""
    while len(text) > longest:
        cuts = (text.rfind(gap, 0, PIECE) + len(gap) - 1 for gap in ("\n\n", "\n", " "))
        cut = next((cut for cut in cuts if cut > 0), PIECE)
        yield text[:cut], True
        text = text[cut:]
    if text:
        yield text, False


def extension(path):
    return re.sub(r"\.(gz|zst)$", "", path.lower()).rpartition(".")[2]


def find(pattern):
    """(path, size, stamp) of the files that a path, a folder or a pattern stands for, in a fixed order. A folder stands
    for the texts in it and in its subfolders. FileNotFoundError if there are none, OSError if the Hub does not say."""
    if pattern.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        try:
            files = HfFileSystem().glob(pattern[5:], detail=True).items()
        except Exception as e:  # of the library that it uses for the network
            raise OSError(f"cannot ask the Hugging Face Hub for {pattern} ({e}): --input= takes files") from None
        found = [("hf://" + path, info["size"], str(info.get("blob_id"))) for path, info in sorted(files)]
    else:
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if os.path.isdir(pattern):
            for folder, subfolders, names in os.walk(pattern, onerror=complain):
                subfolders[:] = [name for name in subfolders if name[0] != "."]
                kinds = FORMATS.keys() - {"json"}
                paths += [os.path.join(folder, n) for n in names if n[0] != "." and extension(n) in kinds]
            paths.sort()
        paths = [os.path.normpath(path) for path in paths if os.path.isfile(path)]
        found = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
    if not found:
        what = "files of text in the folder" if os.path.isdir(pattern) else "such file or folder:"
        raise FileNotFoundError(f"no {what} {pattern}; other endings want a 'pattern*', - is standard input")
    return found


def complain(error):
    raise error
