"""
Read the documents of a corpus: Texts in memory, or Files of any format, number and size.

Both have

    parts           what is read in sequence, files for example
    pieces(part, encode=None)   yields the documents of a part as Pieces; encode(texts) gives the tokens to preserve
    identity        a hash that differs between corpora, computed without the network
    size(first)     bytes of the parts from `first` on
    bytes_read      of all parts, for a progress bar
    counts          {"bad rows": 3, ...} of what has been read
    by_share        whether val_share chooses the splits
    check(final)    raises ValueError if too much of it is bad
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
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HUB = "hf://"  # prefix of files on the Hugging Face Hub
PIECE = 1 << 18  # characters of a long text per piece
PASSAGE = 1 << 12  # characters that the validation part of one document has at least
CONTEXT = 256  # characters around a cut that tokens may depend on
END_OF_TEXT = "<|endoftext|>"  # separates documents in text files
LONGEST_ROW = 1 << 26  # characters of a row in csv and tsv files

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
    ends: bool  # the document ends with this piece
    split: str  # train or val
    before: str = ""  # the text before it in the document, on which its tokens depend
    cut: bool = False  # the document begins in train and ends in val

    def __repr__(self):  # the identities of Texts, which old datasets contain, are hashes of it
        return f"Piece(text={self.text!r}, ends={self.ends}, split={self.split!r})"


class Texts:
    """A corpus in memory: a list of Pieces. By default its identity is a hash of them."""

    parts = [None]
    by_share = False

    def __init__(self, pieces, identity=None):
        self.list = pieces
        self.identity = identity or hashlib.sha256(repr(pieces).encode("utf-8", "replace")).hexdigest()
        self.bytes_read, self.counts = 0, collections.Counter()

    def size(self, first=0):
        return sum(len(piece.text) for piece in self.list)

    def pieces(self, part, encode=None):
        self.bytes_read = self.size()
        return iter(self.list)

    def check(self, final):
        pass


class Files:
    """A corpus of files: texts, or tables with one document per row. Files with an ending of COMPRESSED are unpacked.

    splits: {split: [path, folder, pattern* or hf://datasets/...]}; split None: chosen by args.val_share
    args: column, format, max_bad and val_share of OPTIONS in preparation.py
    edit: function applied to the text of each row

    Bad rows are left out, undecodable bytes replaced; both are counted. Raises OSError and ValueError.
    """

    def __init__(self, splits, args, edit=str):
        if args.format not in ("", *READERS):
            raise ValueError(f"--format={args.format} is not one of {', '.join(READERS)}")
        self.column, self.format, self.edit = args.column, args.format, edit
        self.max_bad, self.val_share = args.max_bad, args.val_share
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
                if os.path.isdir(pattern):
                    self.found += [(named, pattern, files) for named, files in by_name(pattern, found, split).items()]
                else:
                    self.found.append((split, pattern, found))
        self.by_share = any(split is None for split, _, _ in self.found)
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

    def pieces(self, part, encode=None):
        """Yield the Pieces of a part, cut where `encode` gives the same tokens."""
        split, path, size, _ = self.parts[part]
        start = self.bytes_read
        codecs.register_error("count", self.count_undecodable)
        reader, lengths = READERS.get(self.format or extension(path), read_text), {}
        try:
            if reader is read_text and not split:
                with self.open(path) as raw:
                    lengths = long_documents(read_text(decompress(raw, path), "replace"))
            with self.open(path) as raw:
                for piece in cut_documents(self.texts(raw, path, reader), split, self.val_share, lengths, encode):
                    self.bytes_read = start + raw.tell()
                    yield piece
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

    def texts(self, raw, path, reader):
        """Yield (text, whether its document ends) from an open file."""
        file = raw if reader is read_parquet else decompress(raw, path)
        for text, ends in read_text(file) if reader is read_text else self.rows(reader(file, self.column), path):
            self.counts["characters"] += len(text)
            self.counts["NUL bytes"] += text.count("\0")
            yield text, ends

    def rows(self, rows, path):
        """Yield (text, True) of each row with text; count the others."""
        for where, row, size in rows:
            self.counts["rows"] += 1
            self.counts["bytes of rows"] += size
            text = row if isinstance(row, str) else lookup(row, self.column)
            if not isinstance(text, str):
                self.count_bad_row(row, size, f"{where} of {path}")
            elif text:
                text = text.encode("utf-8", "replace").decode()  # JSON may contain half a surrogate pair
                yield self.edit(text), True

    def count_bad_row(self, row, size, where):
        """Count a row without text, and describe the first one."""
        expected = "a JSON object per line, or in csv paired quotes and as many fields as columns"
        problem = f"cannot parse {where} (expected {expected})"
        if isinstance(row, dict):
            columns = ", ".join(list(row)[:20])
            problem = f"{where} has no text in column {self.column} (columns: {columns}); use --column=NAME"
        self.first_bad = self.first_bad or problem
        self.counts["bad rows"] += 1
        self.counts["bytes of bad rows"] += size
        self.check(final=False)

    def count_undecodable(self, error):
        """Codec error handler: as errors="replace", but counts the bytes."""
        self.counts["undecodable bytes"] += error.end - error.start
        return "\N{REPLACEMENT CHARACTER}", error.end

    def check(self, final):
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
# formats: read_text yields (text, whether its document ends), the others (where, row, size); row None: unreadable


def read_text(file, errors="count"):
    """Yield each document in blocks of PIECE characters and a rest."""
    file, rest = decode(file, errors), ""
    while block := file.read(PIECE):
        *documents, rest = (rest + block).split(END_OF_TEXT)
        for document in documents:
            yield from blocks_of(document)
        # the rest may end with half an <|endoftext|>, which must not be cut
        while len(rest) > PIECE + len(END_OF_TEXT):
            yield rest[:PIECE], False
            rest = rest[PIECE:]
    yield from blocks_of(rest)


def blocks_of(text):
    """Return [(block, whether it is the last)]. Example: "x" * (PIECE + 1) -> [("x" * PIECE, False), ("x", True)]"""
    return [(text[i : i + PIECE], i + PIECE >= len(text)) for i in range(0, len(text), PIECE)]


def read_jsonl(file, column):
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield f"line {number}", row, len(line)


def read_json(file, column):
    """Yield the rows of one list, or those of a jsonl file."""
    if not file.peek(64).lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
        yield from read_jsonl(file, column)
        return
    file, number = decode(file), 1
    rest = file.read(PIECE).lstrip()[1:]
    while True:
        rest = rest.lstrip(" \t\r\n,")
        try:
            row, size = json.JSONDecoder().raw_decode(rest)
        except (ValueError, RecursionError):
            # the row continues in the next block, or the list ends
            if block := file.read(max(PIECE, len(rest))):
                rest += block
                continue
            if rest.strip() != "]":
                yield f"row {number}", None, len(rest)
            return
        yield f"row {number}", row, size
        rest, number = rest[size:], number + 1


def read_csv(file, column, delimiters=",;\t|"):
    """Yield rows with as many fields as the header. In tab-separated files quotes that do not pair up are text."""
    csv.field_size_limit(LONGEST_ROW)  # an unclosed quote must not fill the memory
    file, number, lines = decode(file), 1, []  # lines: of this row
    again = collections.deque([file.readline()])  # lines to read before those of the file
    delimiter = max(delimiters, key=lambda delimiter: len(next(csv.reader(again, delimiter=delimiter), [])))

    def take():
        while line := again.popleft() if again else file.readline():
            lines.append(line)
            yield line

    columns = next(csv.reader(take(), delimiter=delimiter), [])
    check_column(column, columns)
    while lines:
        number += len(lines)
        lines.clear()
        try:
            fields = next(csv.reader(take(), delimiter=delimiter, strict=True), [])
        except csv.Error:
            fields = None
        if fields is None or len(fields) not in (0, len(columns)):
            if delimiter == "\t":
                again.extendleft(reversed(lines[1:]))
                del lines[1:]
                fields = lines[0].rstrip("\r\n").split("\t")
            if fields is None or len(fields) != len(columns):
                yield f"line {number}", None, sum(map(len, lines))
                continue
        if fields:  # not an empty line
            yield f"line {number}", dict(zip(columns, fields, strict=True)), sum(map(len, lines))


def read_tsv(file, column):
    return read_csv(file, column, delimiters="\t")


def read_parquet(file, column):
    from pyarrow import binary, compute, types
    from pyarrow.parquet import ParquetFile

    table, n = ParquetFile(file, buffer_size=1 << 20), 0
    check_column(column, [leaf.path for leaf in map(table.schema.column, range(len(table.schema)))])
    for batch in table.iter_batches(batch_size=256, columns=[column]):
        array = batch.column(0)
        while types.is_struct(array.type):
            array = compute.struct_field(array, 0)
        try:
            texts = array.to_pylist()
        except UnicodeDecodeError:
            raw = array.cast(binary()).to_pylist()
            texts = [text if text is None else text.decode("utf-8", "count") for text in raw]
        for text in texts:
            n += 1
            yield f"row {n}", {column: text}, 0


READERS = {
    "txt": read_text, "md": read_text, "jsonl": read_jsonl, "ndjson": read_jsonl, "csv": read_csv,
    "tsv": read_tsv, "parquet": read_parquet, "json": read_json,
}  # fmt: skip


def decompress(raw, path):
    """Return a buffered reader of an open file that decompresses what its name says."""
    module = COMPRESSED.get(path.lower().rpartition(".")[2])
    if module == "pyarrow":
        raw = importlib.import_module(module).CompressedInputStream(raw, "zstd")
    elif module:
        return importlib.import_module(module).open(raw)
    return raw if hasattr(raw, "peek") else io.BufferedReader(raw)


def decode(file, errors="count"):
    """Return a text reader of a binary one: UTF-8, or UTF-16 or UTF-32 with a byte-order mark."""
    start, encoding = file.peek(8192), "utf-8-sig"
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # begins with UTF-16's mark
        encoding = "utf-32"
    elif start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif BINARY.match(start):
        raise ValueError(f"not a text file (begins with {start[:8]}); convert it to text, or use --format")
    return io.TextIOWrapper(file, encoding, errors=errors, newline="")


def lookup(row, column):
    """Return the value of a column. Example: {"meta": {"text": "a"}}, "meta.text" -> "a" """
    row = row if isinstance(row, dict) else {}
    for name in [column] if column in row else column.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


def check_column(column, columns):
    if column not in columns:
        raise ValueError(f"no column {column} (columns: {', '.join(columns[:20])}); use --column=NAME")


# -----------------------------------------------------------------------------
# from documents to pieces


def fraction(text, i):
    """Return the i-th of two numbers from 0 to 1 that depend only on the text. Example: "abc", 0 -> 0.1701"""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
    return int.from_bytes(digest[8 * i : 8 * i + 8], "little") / 2**64


def split_of(text, val_share):
    """Choose the split of a text. Example: "abc", 0.1 -> "train" """
    return "val" if fraction(text, 0) < val_share else "train"


def long_documents(blocks):
    """Return {number: characters} of documents with several blocks. Example: ("a", 0), ("b", 1) -> {0: 2}"""
    lengths, number, n = {}, 0, 0
    for block, ends in blocks:
        n += len(block)
        if ends:
            lengths.update({number: n} if n > len(block) else {})
            number, n = number + 1, 0
    return lengths


def cut_documents(blocks, split, val_share, lengths, encode):
    """Yield the Pieces of documents that come as (block, whether it is the last).

    The split of a document is `split`, or chosen by a hash of its first block. If the last val_share of it has at
    least PASSAGE characters, that is for validation instead, and the rest for training.
    lengths: {number: characters} of the documents that have several blocks
    """
    number = done = 0  # done: characters of this document in pieces
    rest = before = ""
    for block, ends in blocks:
        # choose the split of a new document
        if not done:
            n = lengths.get(number, len(block))
            cut = not split and n * min(val_share, 1 - val_share) >= PASSAGE
            border = round(n * (1 - val_share)) if cut else math.inf
            chosen = "train" if cut else split or split_of(block, val_share)

        # cut where validation begins, and at the end of the block
        rest += block
        while rest:
            end, context = (len(rest), "") if ends else (len(rest) - CONTEXT, "")
            at_border = border - done <= end + 4 * CONTEXT
            if at_border or not ends:
                end, context = find_cut(before + rest, len(before), len(before) + min(end, border - done), encode)
                end -= len(before)
            yield Piece(rest[:end], end == len(rest), chosen, before, cut)
            rest, before, done = rest[end:], context, done + end
            if not at_border:
                break
            border, chosen = math.inf, "val"
        if ends:
            number, done, rest, before = number + 1, 0, "", ""


def find_cut(text, start, end, encode):
    """Return (end of the left part, context), where a cut between `start` and `end` keeps the tokens.

    The tokens before the cut must not depend on what follows. What follows has its tokens in the whole text if it is
    tokenized after the context, the characters before it, which is "" if there is no such place.
    """
    words = [
        match.start() for match in re.compile(r"(?<=\w)(?!\w)").finditer(text, max(start + 1, end - 1024), end + 1)
    ]
    for cut in (*reversed(words), *range(end, max(start, end - CONTEXT), -1)):
        context = text[max(0, cut - CONTEXT) : cut]
        if encode is None:
            return cut, context
        left, both = encode([context, context + text[cut : cut + CONTEXT]])
        if len(left) < len(both) and (left == both[: len(left)]).all():
            return cut, context
    return end, ""


# -----------------------------------------------------------------------------
# which files


def extension(path):
    """Return the ending that tells the format. Example: "a/B.JSONL.gz" -> "jsonl" """
    return re.sub(rf"\.({'|'.join(COMPRESSED)})$", "", path.lower()).rpartition(".")[2]


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
        read, others = collections.Counter(), collections.Counter()
        if os.path.isdir(pattern):
            paths = list(find_in_folder(pattern, set(map(str, Path(pattern).resolve().parents)), read, others))
        else:
            paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        paths = [os.path.normpath(path) for path in sorted(paths) if os.path.isfile(path)]
        found = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
        if others:
            read, others = (", ".join(f"{n:,} {ending}" for ending, n in c.most_common(9)) for c in (read, others))
            print(f"{pattern}: reading {read or 'nothing'}; left out {others} (to read them, use '{pattern}/**/*.py')")
    if not found:
        problem = "no text files in folder" if os.path.isdir(pattern) else "no such file or folder:"
        raise FileNotFoundError(f"{problem} {pattern}")
    return found


def find_in_folder(folder, seen, read, others):
    """Yield the text files in a folder and its subfolders, without hidden ones and .json, which is rarely text.

    seen: real paths of folders not to enter, so that links cannot lead into circles
    read, others: Counters of the endings of these and other files
    """
    seen.add(os.path.realpath(folder))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if os.path.realpath(entry.path) not in seen:
                yield from find_in_folder(entry.path, seen, read, others)
            continue
        ending = os.path.splitext(entry.name)[1].lower() or entry.name
        is_text = extension(entry.name) in READERS and ending != ".json"
        (read if is_text else others)[ending] += 1
        if is_text:
            yield entry.path


def by_name(folder, found, split):
    """Return {split: files} of a folder; train, validation and test files of a Hub dataset are told by their names."""
    files = collections.defaultdict(list)
    for file in found:
        names = map(SPLIT_NAME.match, reversed(os.path.relpath(file[0], folder).split(os.sep)))
        name = next((match[1].lower() for match in names if match), "other")
        files["validation" if name in ("valid", "val", "dev") else name].append(file)
    if "train" not in files or len(files.keys() - {"other"}) == 1:
        return {split: found}
    counts = ", ".join(f"{len(paths)} {name}" for name, paths in files.items())
    print(f"{folder}: {counts} files by their names; only train and validation are read")
    return {"train": files["train"], "val": files["validation"]} if files["validation"] else {split: files["train"]}


def copy_stdin():
    """Copy standard input, to read it twice, into a temporary file: (file, the list that find() would return)."""
    file, digest = tempfile.TemporaryFile(), hashlib.sha256()
    while block := sys.stdin.buffer.read(1 << 20):
        file.write(block)
        digest.update(block)
    file.flush()
    return file, [("-", file.tell(), digest.hexdigest())]
