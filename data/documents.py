"""
Read the documents of a corpus: Texts in memory, or Files of any format, number and size.

Both have

    parts           what is read in sequence, files for example
    pieces(part)    yields the documents of a part as Pieces
    identity        a hash that differs between corpora, computed without the network
    size(first)     bytes of the parts from `first` on
    bytes_read      of all parts, for a progress bar
    counts          {"bad rows": 3, ...} of what has been read
    check(final)    raises ValueError if too much of it is bad
"""

import codecs
import collections
import csv
import functools
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from typing import NamedTuple

HUB = "hf://"  # prefix of files on the Hugging Face Hub
PIECE = 1 << 12  # characters of a long text per piece
END_OF_TEXT = "<|endoftext|>"  # separates documents in text files


class Piece(NamedTuple):
    """A document, or one piece of a long document."""

    text: str
    ends: bool = True  # the document ends with this piece
    split: str | None = None  # train or val; None: chosen by a hash of the text


class Texts:
    """A corpus in memory: a list of Pieces. By default its identity is a hash of them."""

    parts = [None]

    def __init__(self, pieces, identity=None):
        self.list = pieces
        self.identity = identity or hashlib.sha256(repr(pieces).encode("utf-8", "replace")).hexdigest()
        self.bytes_read, self.counts = 0, collections.Counter()

    def size(self, first=0):
        return sum(len(piece.text) for piece in self.list)

    def pieces(self, part):
        self.bytes_read = self.size()
        return iter(self.list)

    def check(self, final):
        pass


class Files:
    """A corpus of files: texts, or tables with one document per row. Names ending in .gz and .zst are decompressed.

    splits: {split: [path, folder, pattern* or hf://datasets/...]}; split None: chosen by a hash of the text
    args: column, format and max_bad of OPTIONS in preparation.py
    edit: function applied to the text of each row

    Bad rows are left out, undecodable bytes replaced; both are counted. Raises OSError and ValueError.
    """

    def __init__(self, splits, args, edit=str):
        if args.format not in ("", *READERS):
            raise ValueError(f"--format={args.format} is not one of {', '.join(READERS)}")
        self.column, self.format, self.max_bad, self.edit = args.column, args.format, args.max_bad, edit
        self.bytes_read, self.counts = 0, collections.Counter()
        self.first_bad = ""  # describes the first bad row

        # list the files; those on the Hub are listed only when they are read
        self.found = []
        for split, patterns in splits.items():
            for pattern in dict.fromkeys(patterns):
                found = None
                if pattern == "-":
                    self.stdin, found = copy_stdin()
                elif not pattern.startswith(HUB):
                    found = find(pattern)
                self.found.append((split, pattern, found))
        self.identity = hashlib.sha256(json.dumps(self.found).encode()).hexdigest()

    @functools.cached_property
    def parts(self):
        """The list of (split, path, size, stamp), one per file."""
        parts = {}
        for split, pattern, found in self.found:
            for path, size, stamp in found or find(pattern):
                parts.setdefault(path, (split, path, size, stamp))
        return list(parts.values())

    def size(self, first=0):
        return sum(size for _, _, size, _ in self.parts[first:])

    def pieces(self, part):
        """Yield the Pieces of a part."""
        split, path, size, _ = self.parts[part]
        start = self.bytes_read
        codecs.register_error("count", self.count_undecodable)
        try:
            with self.open(path) as raw:
                for text, ends in self.texts(raw, path):
                    self.counts["characters"] += len(text)
                    self.bytes_read = start + raw.tell()
                    yield Piece(text, ends, split)
        except ImportError as e:
            raise ValueError(f"{path} needs a package: pip install {e.name.partition('.')[0]}") from e
        except Exception as e:  # corrupt files and the network raise many types
            raise ValueError(f"cannot read {path}: {e or type(e).__name__}") from e
        self.bytes_read = start + size

    def open(self, path):
        """Open a file on the Hub or on disk, or the copy of standard input."""
        if path.startswith(HUB):
            from huggingface_hub import HfFileSystem

            return HfFileSystem().open(path.removeprefix(HUB), "rb")
        if path == "-":
            self.stdin.seek(0)
            return open(self.stdin.fileno(), "rb", closefd=False)
        return open(path, "rb")

    def texts(self, raw, path):
        """Yield (text, whether its document ends) from an open file."""
        reader = READERS.get(self.format or extension(path), read_text)
        file = raw if reader is read_parquet else decompress(raw, path)
        if reader is read_text:
            yield from read_text(file)
            return
        for where, row in reader(file, self.column):
            self.counts["rows"] += 1
            text = row.get(self.column) if isinstance(row, dict) else None
            if not isinstance(text, str):
                self.count_bad_row(row, f"{where} of {path}")
            elif text:
                text = text.encode("utf-8", "replace").decode()  # JSON may contain half a surrogate pair
                yield self.edit(text), True

    def count_bad_row(self, row, where):
        """Count a row without text, and describe the first one."""
        problem = f"cannot parse {where} (expected one JSON object per line, or paired quotes in csv)"
        if isinstance(row, dict):
            columns = ", ".join(list(row)[:20])
            problem = f"{where} has no text in column {self.column} (columns: {columns}); use --column=NAME"
        self.first_bad = self.first_bad or problem
        self.counts["bad rows"] += 1
        self.check(final=False)

    def count_undecodable(self, error):
        """Codec error handler: as errors="replace", but counts the bytes."""
        self.counts["undecodable bytes"] += error.end - error.start
        return "\N{REPLACEMENT CHARACTER}", error.end

    def check(self, final):
        """Raise ValueError if more than max_bad is bad; unless `final`, only once there is enough to judge by."""
        limits = [("bad rows", "rows", self.first_bad), ("undecodable bytes", "characters", "is this text?")]
        for bad, of, hint in limits:
            n_bad, n = self.counts[bad], self.counts[of]
            if n_bad > self.max_bad * n and (final or n > 100_000):
                raise ValueError(f"{n_bad:,} {bad} in {n:,} {of} exceed --max_bad={self.max_bad}: {hint}")


# -----------------------------------------------------------------------------
# formats: read_text yields (text, whether its document ends), the others (where, row); row is None if unreadable


def read_text(file):
    file, rest = decode(file), ""
    while block := file.read(PIECE):
        *documents, rest = (rest + block).split(END_OF_TEXT)
        for document in documents:
            yield from passages(document, PIECE)
        # the rest may end with half an <|endoftext|>, which must not be cut
        *certain, (rest, _) = passages(rest, PIECE + len(END_OF_TEXT)) or [("", True)]
        yield from certain
    yield from passages(rest, PIECE)


def read_jsonl(file, column):
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError):
                yield f"line {number}", None


def read_csv(file, column, delimiter=",", quoting=csv.QUOTE_MINIMAL):
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(decode(file), delimiter=delimiter, quoting=quoting, strict=True)
    check_column(column, rows.fieldnames or [])
    while True:
        where = f"line {rows.line_num + 1}"
        try:
            yield where, next(rows)
        except StopIteration:
            return
        except csv.Error:
            yield where, None


def read_tsv(file, column):
    return read_csv(file, column, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_parquet(file, column):
    from pyarrow import binary
    from pyarrow.parquet import ParquetFile

    table, n = ParquetFile(file, buffer_size=1 << 20), 0
    check_column(column, table.schema_arrow.names)
    for batch in table.iter_batches(batch_size=256, columns=[column]):
        try:
            texts = batch.column(0).to_pylist()
        except UnicodeDecodeError:
            raw = batch.column(0).cast(binary()).to_pylist()
            texts = [text if text is None else text.decode("utf-8", "count") for text in raw]
        for text in texts:
            n += 1
            yield f"row {n}", {column: text}


READERS = {
    "txt": read_text, "md": read_text, "jsonl": read_jsonl, "ndjson": read_jsonl, "csv": read_csv,
    "tsv": read_tsv, "parquet": read_parquet, "json": read_jsonl,
}  # fmt: skip


def decompress(raw, path):
    """Return a buffered reader of an open file that decompresses what its name says."""
    if path.lower().endswith(".gz"):
        return gzip.open(raw)
    if path.lower().endswith(".zst"):
        import pyarrow

        raw = pyarrow.CompressedInputStream(raw, "zstd")
    return raw if hasattr(raw, "peek") else io.BufferedReader(raw)


def decode(file):
    """Return a text reader of a binary one: UTF-8, or UTF-16 or UTF-32 with a byte-order mark."""
    start, encoding = file.peek(4), "utf-8-sig"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # begins with UTF-16's mark
        encoding = "utf-32"
    return io.TextIOWrapper(file, encoding, errors="count", newline="")


def check_column(column, columns):
    if column not in columns:
        raise ValueError(f"no column {column} (columns: {', '.join(columns[:20])}); use --column=NAME")


def passages(text, longest):
    """Cut a text into passages while more than `longest` characters remain: [(passage, whether it is the last)].

    Cuts before the last character of the last blank line in PIECE characters, else of the last line break, else of the
    last space. Most tokenizers split there too, so the tokens are those of the whole text.

    Example: "x" * 4000 + "\\n\\n" + "y" * 200, 4096 -> [("x" * 4000 + "\\n", False), ("\\n" + "y" * 200, True)]
    """
    found, start = [], 0
    while len(text) - start > longest:
        cuts = [text.rfind(gap, start, start + PIECE) + len(gap) - 1 for gap in ("\n\n", "\n", " ")]
        end = next((cut for cut in cuts if cut > start), start + PIECE)
        found.append((text[start:end], False))
        start = end
    return [*found, (text[start:], True)] if text else []


# -----------------------------------------------------------------------------
# which files


def extension(path):
    """Return the ending that tells the format. Example: "a/B.JSONL.gz" -> "jsonl" """
    return re.sub(r"\.(gz|zst)$", "", path.lower()).rpartition(".")[2]


def find(pattern):
    """List (path, size, stamp) of the files that a path, folder or pattern means, sorted by path."""
    if pattern.startswith(HUB):
        from huggingface_hub import HfFileSystem

        try:
            files = HfFileSystem().glob(pattern.removeprefix(HUB), detail=True)
        except Exception as e:  # the network raises many types
            raise OSError(f"cannot list {pattern} ({e}); use --input=FILE") from e
        found = [(HUB + path, info["size"], str(info.get("blob_id"))) for path, info in sorted(files.items())]
    else:
        if os.path.isdir(pattern):
            paths = find_in_folder(pattern)
        else:
            paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        paths = [os.path.normpath(path) for path in sorted(paths) if os.path.isfile(path)]
        found = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
    if not found:
        problem = "no text files in folder" if os.path.isdir(pattern) else "no such file or folder:"
        raise FileNotFoundError(f"{problem} {pattern}")
    return found


def find_in_folder(folder):
    """Yield the text files in a folder and its subfolders, without hidden ones and .json, which is rarely text."""
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from find_in_folder(entry.path)
        elif extension(entry.name) in READERS.keys() - {"json"}:
            yield entry.path


def copy_stdin():
    """Copy standard input, to read it twice, into a temporary file: (file, the list that find() would return)."""
    file, digest = tempfile.TemporaryFile(), hashlib.sha256()
    while block := sys.stdin.buffer.read(1 << 20):
        file.write(block)
        digest.update(block)
    file.flush()
    return file, [("-", file.tell(), digest.hexdigest())]
