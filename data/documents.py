"""
Read the documents of a corpus: Texts in memory, or Files of any format, number and size.

Both have

    parts           what is read in sequence, files for example
    pieces(part)    yields the documents of a part as Pieces
    source          where the text is from, for meta.json
    identity        a hash that differs between corpora, computed without the network
    size(first)     bytes of the parts from `first` on
    bytes_read      of all parts, for a progress bar
    counts          {"bad rows": 3, ...} of what has been read
    by_share        whether val_share chooses a split
    check(final)    raises ValueError if too many rows or bytes are unreadable
"""

import codecs
import collections
import csv
import functools
import glob
import hashlib
import importlib
import io
import json
import os
import re
import sys
import tempfile
from typing import NamedTuple

from data.tokenizer import for_terminal

HUB = "hf://"  # prefix of files on the Hugging Face Hub
LONGEST = 1 << 22  # characters of a Piece; a longer document has several
END_OF_TEXT = "<|endoftext|>"  # separates documents in text files

COMPRESSED = {"gz": "gzip", "bz2": "bz2", "xz": "lzma", "zst": "pyarrow"}  # ending: module
# the first bytes of files that are not text: PDF, RTF, compressed, Parquet, Arrow; and NUL, as in most others
BINARY = re.compile(
    rb"%PDF-|\{\\rtf|PK\x03\x04|\x1f\x8b|BZh\d|\xfd7zXZ|\x28\xb5\x2f\xfd|PAR1|ARROW1|\xff{4}|.{,8191}\0", re.DOTALL
)
# how files of a dataset on the Hub are named, such as train-00000-of-00004.parquet
SPLIT_NAME = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])", re.IGNORECASE)


class Piece(NamedTuple):
    """A document, or one piece of a long document."""

    text: str
    ends: bool = True  # the document ends with this piece
    split: str | None = None  # train or val; None: chosen by val_share


class Texts:
    """A corpus in memory: a list of Pieces. By default its identity is a hash of them."""

    parts = [None]
    by_share = False

    def __init__(self, pieces, source, identity=None):
        self.list, self.source = pieces, source
        self.identity = identity or hashlib.sha256(repr(pieces).encode("utf-8", "replace")).hexdigest()

    def size(self, first=0):
        return sum(len(piece.text) for piece in self.list)

    def pieces(self, part):
        self.bytes_read = self.size()
        return iter(self.list)

    def check(self, final):
        pass


class Files:
    """A corpus of files: texts, or tables with one document per row. Files ending in a key of COMPRESSED are unpacked.

    splits: {split: [path, folder, pattern* or hf://datasets/...]}; split None: chosen by val_share
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
        self.source = " ".join(pattern for patterns in splits.values() for pattern in patterns)

        # list the files; those on the Hub are listed only when they are read
        self.found = []
        for split, patterns in splits.items():
            for pattern in dict.fromkeys(patterns):
                found = None
                if pattern == "-":
                    self.stdin, found = copy_stdin()
                elif not pattern.startswith(HUB):
                    found = find(pattern)
                named = by_name(pattern, found, split) if os.path.isdir(pattern) else {split: found}
                self.found += [(name, pattern, files) for name, files in named.items()]
        self.by_share = any(split is None for split, _, _ in self.found)
        if args.num_samples and not self.by_share:
            raise ValueError("--num_samples needs documents of one kind; use it without --val or files of both splits")
        self.identity = hashlib.sha256(json.dumps(self.found).encode()).hexdigest()

    @functools.cached_property
    def parts(self):
        """The list of (split, path, size, stamp), one per file: its last split, if it has several."""
        parts = {}
        for split, pattern, found in self.found:
            for path, size, stamp in found or find(pattern):
                parts[path] = split, path, size, stamp
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
                    self.counts["NUL bytes"] += text.count("\0")
                    self.check()
                    self.bytes_read = start + raw.tell()
                    for i in range(0, len(text), LONGEST):
                        yield Piece(text[i : i + LONGEST], ends and i + LONGEST >= len(text), split)
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
        """Yield (text, whether a document ends with it) of an open file; "" for bad rows, which it counts."""
        reader = READERS.get(self.format or extension(path), read_text)
        file = raw if reader is read_parquet else decompress(raw, path)
        if reader in (read_json, read_jsonl) and file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError("it is UTF-16, but JSON must be UTF-8; convert it: iconv -f utf-16 -t utf-8")
        if reader is read_text:
            if self.column is None:
                raise ValueError("conversations are in jsonl, json, parquet or csv files; use --format=jsonl")
            yield from read_text(file)
            return
        for where, row, size in reader(file, self.column):
            self.counts["rows"] += 1
            self.counts["bytes of rows"] += size
            try:
                text = self.edit(self.text_of(row))
            except ValueError as e:
                self.first_bad = self.first_bad or f"{where} of {path}: {e}"
                self.counts["bad rows"] += 1
                self.counts["bytes of bad rows"] += size
                text = ""
            yield text, True

    def text_of(self, row):
        """Return the text of a row. ValueError if it has none."""
        text = row if isinstance(row, str) else lookup(row, self.column)
        if isinstance(text, str):
            return text.encode("utf-8", "replace").decode()  # JSON may contain half a surrogate pair
        if isinstance(row, dict):
            columns = ", ".join(list(row)[:20])
            raise ValueError(f"no text in column {self.column} (columns: {columns}); use --column=NAME")
        raise ValueError("malformed row: jsonl needs an object per line; csv, paired quotes and one field per column")

    def count_undecodable(self, error):
        """Codec error handler: as errors="replace", but counts the bytes."""
        self.counts["undecodable bytes"] += error.end - error.start
        return "\N{REPLACEMENT CHARACTER}", error.end

    def check(self, final=False):
        """Raise ValueError if more than max_bad is bad; unless `final`, only once there is enough to judge by."""
        limits = [
            ("bad rows", "rows", 10**5, self.first_bad),
            ("bytes of bad rows", "bytes of rows", 10**8, self.first_bad),
            ("undecodable bytes", "characters", 10**5, "is this text?"),
            ("NUL bytes", "characters", 10**5, "is this text? UTF-16 needs a byte-order mark"),
        ]
        for bad, of, enough, hint in limits:
            n_bad, n = self.counts[bad], self.counts[of]
            if n_bad > self.max_bad * n and (final or n > enough):
                raise ValueError(f"{n_bad:,} {bad} in {n:,} {of} exceed --max_bad={self.max_bad}: {hint}")


# -----------------------------------------------------------------------------
# formats: read_text yields (text, whether a document ends with it), the others (where, row, size in bytes); row is None
# if unreadable


def read_text(file):
    file, rest, ended = decode(file), "", False  # ended: whether the rest follows an <|endoftext|>
    while block := file.read(LONGEST):
        *documents, rest = (rest + block).split(END_OF_TEXT)
        yield from ((document, True) for document in documents)
        ended = ended or bool(documents)
        # the rest may end with half an <|endoftext|>, which must not be cut
        if len(rest) > LONGEST + len(END_OF_TEXT):
            yield rest[:LONGEST], False
            rest, ended = rest[LONGEST:], False
    if rest.strip() or not ended:  # a line break at the end of the file is no document
        yield rest, True


def read_jsonl(file, column):
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield f"line {number}", row, len(line)


def read_json(file, column):
    """Yield the elements of one list, or the rows of a jsonl file."""
    if not file.peek(64).lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
        yield from read_jsonl(file, column)
        return
    file = decode(file)
    for number, row in enumerate(json.load(file), 1):
        yield f"row {number}", row, 0


def read_csv(file, column, delimiters=",;\t|"):
    """Yield rows with one field per column; of others only their first line is bad, not what a quote swallows."""
    csv.field_size_limit(LONGEST)  # an unclosed quote must not fill the memory
    file, number, lines = decode(file), 1, []  # lines: of this row
    waiting = [file.readline()]  # lines to read again, the last one first
    delimiter = max(delimiters, key=waiting[0].count)

    def parse():
        """Return the fields of the next row; None if its quotes do not pair up."""
        lines.clear()
        try:
            return next(csv.reader(take(), delimiter=delimiter, strict=True), [])
        except csv.Error:
            return None

    def take():
        while line := waiting.pop() if waiting else file.readline():
            lines.append(line)
            yield line

    columns = parse() or []
    check_column(column, columns)
    while True:
        number += len(lines)
        fields = parse()
        if not lines:
            return
        if fields is None or len(fields) not in (0, len(columns)):
            # go on after the first line; in tsv files written without quoting, quotes are text
            waiting += reversed(lines[1:])
            del lines[1:]
            fields = lines[0].rstrip("\r\n").split("\t") if delimiter == "\t" else []
            if len(fields) != len(columns):
                yield f"line {number}", None, len("".join(lines).encode())
                continue
        if fields:  # not an empty line
            yield f"line {number}", dict(zip(columns, fields, strict=True)), len("".join(lines).encode())


def read_parquet(file, column):
    """Yield the rows with this column, or with all of them if it is None."""
    from pyarrow import binary, types
    from pyarrow.parquet import ParquetFile

    table, n = ParquetFile(file, buffer_size=1 << 20), 0
    check_column(column, [leaf.path for leaf in map(table.schema.column, range(len(table.schema)))])
    for batch in table.iter_batches(batch_size=256, columns=column and [column]):
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            if column is None:
                raise
            array = batch.column(0)
            while types.is_struct(array.type):
                array = array.flatten()[0]
            texts = array.cast(binary()).to_pylist()
            rows = [{column: text if text is None else text.decode("utf-8", "count")} for text in texts]
        for row in rows:
            n += 1
            yield f"row {n}", row, 0


READERS = {
    "txt": read_text, "md": read_text, "jsonl": read_jsonl, "ndjson": read_jsonl, "csv": read_csv,
    "tsv": functools.partial(read_csv, delimiters="\t"), "parquet": read_parquet, "json": read_json,
}  # fmt: skip


def decompress(raw, path):
    """Return a buffered reader of an open file that decompresses what its name says."""
    module = COMPRESSED.get(path.lower().rpartition(".")[2])
    if module == "pyarrow":
        raw = importlib.import_module(module).CompressedInputStream(raw, "zstd")
    elif module:
        return importlib.import_module(module).open(raw)
    return raw if hasattr(raw, "peek") else io.BufferedReader(raw)


def decode(file):
    """Return a text reader of a binary one: UTF-8, or UTF-16 or UTF-32 with a byte-order mark."""
    start, encoding = file.peek(8192), "utf-8-sig"
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # begins with UTF-16's mark
        encoding = "utf-32"
    elif start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif BINARY.match(start):
        raise ValueError(f"not a text file (begins with {start[:8]}); convert it to text, or use --format")
    return io.TextIOWrapper(file, encoding, errors="count", newline="")


def lookup(row, column):
    """Return the value of a column. Example: {"meta": {"text": "a"}}, "meta.text" -> "a" """
    row = row if isinstance(row, dict) else {}
    for name in [column] if column in row else column.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


def check_column(column, columns):
    if column not in (None, *columns):
        raise ValueError(f"no column {column} (columns: {', '.join(columns[:20])}); use --column=NAME")


# -----------------------------------------------------------------------------
# which files


def extension(path):
    """Return the extension that tells the format. Example: "a/B.JSONL.gz" -> "jsonl" """
    return re.sub(rf"\.({'|'.join(COMPRESSED)})$", "", path.lower()).rpartition(".")[2]


def find(pattern):
    """List (path, size, stamp) of the files that a path, folder or pattern matches, sorted by path."""
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
    """Return the text files in a folder and its subfolders, without hidden ones and .json, which is rarely text.

    Says how many files of each ending are read and left out.
    """
    found, entered = {True: [], False: []}, set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in entered:  # links can form cycles
            folders.clear()
            continue
        entered.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                is_text = extension(name) in READERS and not name.lower().endswith(".json")
                found[is_text].append(os.path.join(parent, name))
    if found[False]:
        read, left_out = count_endings(found[True]), count_endings(found[False])
        example = f"to read them, use '{folder}/**/*.py'"
        print(for_terminal(f"{folder}: reading {read or 'nothing'}; left out {left_out} ({example})"))
    return found[True]


def count_endings(paths):
    """Describe how many files have each ending. Example: ["a.py", "b.py", "x"] -> "2 .py, 1 x" """
    endings = collections.Counter(os.path.splitext(path)[1].lower() or os.path.basename(path) for path in paths)
    return ", ".join(f"{n:,} {ending}" for ending, n in endings.most_common(9))


def by_name(folder, found, split):
    """Return {split: files} of a folder; train, validation and test files of a Hub dataset are told apart by name."""
    files = collections.defaultdict(list)
    for file in found:
        names = map(SPLIT_NAME.match, reversed(os.path.relpath(file[0], folder).split(os.sep)))
        name = next((match[1].lower() for match in names if match), "other")
        files["validation" if name in ("valid", "val", "dev") else name].append(file)
    if "train" not in files or len(files.keys() - {"other"}) == 1:
        return {split: found}
    counts = ", ".join(f"{len(paths)} {name}" for name, paths in files.items())
    print(for_terminal(f"{folder}: {counts} files by their names; only train and validation are read"))
    if split:  # the folder is given for one of them
        return {split: files["train" if split == "train" else "validation"] or found}
    return {"train": files["train"], "val": files["validation"]} if files["validation"] else {split: files["train"]}


def copy_stdin():
    """Copy standard input, to read it twice, into a temporary file: (file, the list that find() would return)."""
    file, digest = tempfile.TemporaryFile(), hashlib.sha256()
    while block := sys.stdin.buffer.read(1 << 20):
        file.write(block)
        digest.update(block)
    file.flush()
    return file, [("-", file.tell(), digest.hexdigest())]
