"""
How tokens lie on disk, and which of them make up a batch.

    python data/shards.py data/shakespeare          shows what a dataset holds

A dataset is a folder of files of token ids. meta.json says which, of which type, and by which tokenizer:

    {"vocab_size": 65, "dtype": "uint16", "tokenizer": {...}, "source": "...", "documents": {...},
     "files": {"train.bin": {"tokens": 1003854, "sha256": "..."}, ...}}

Without it, train.bin and val.bin are read, or all of x_train_000001.bin, x_train_000002.bin ... as one stream: raw
little-endian uint16, of the characters in meta.pkl or of GPT-2's tokens, as nanoGPT writes them, or with the header of
llm.c and modded-nanogpt: 256 int32, of which the first three are a magic number, a version and how many tokens follow
(https://github.com/karpathy/llm.c, dev/data/data_common.py).
"""

import functools
import glob
import json
import os
import pickle
import re
import signal
import sys

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from data.tokenizer import CharTokenizer, from_description  # noqa: E402

# -----------------------------------------------------------------------------
# reading


HEADER = 256 * 4  # bytes
HEADERS = {20240520: (1, "<u2", None), 20240801: (7, "<u4", 128256)}  # magic: (version, dtype, vocabulary or None)
PREPARING = "preparing.json"  # in a dataset folder while it is being made; see data/preparation.py
CHECKED = 1 << 28  # tokens: so many are looked at before they are trained on, in some tenths of a second


class Dataset:
    """A dataset folder. vocab_size and tokenizer (a description, see data/tokenizer.py) are None where not known.

    FileNotFoundError and ValueError say what is wrong with a folder and what to type.
    """

    def __init__(self, folder):
        self.folder = folder
        script = os.path.join(folder, "prepare.py")
        self.remedy = f"make it again: python {script}" if os.path.exists(script) else "make it again"
        names = [os.path.basename(path) for path in glob.glob(os.path.join(glob.escape(folder), "*.bin"))]
        unfinished = read_json(os.path.join(folder, PREPARING))
        if unfinished is not None and (not names or unfinished.get("replacing")):
            raise FileNotFoundError(f"{folder} is not finished: type the command again that prepares it")
        if not names:
            if os.path.exists(script):
                raise FileNotFoundError(f"no .bin files in {folder}; make them: python {script}")
            known = sorted(os.path.basename(os.path.dirname(p)) for p in glob.glob("data/*/prepare.py"))
            ready = f"data/ can prepare {', '.join(known)}" if known else "run this in the folder that train.py is in"
            raise FileNotFoundError(f"no dataset in {folder}; {ready}")
        meta = read_meta(folder)
        self.vocab_size, self.tokenizer = meta.get("vocab_size"), meta.get("tokenizer")
        self.dtype, self.files = np.dtype(meta.get("dtype", "uint16")).newbyteorder("<"), meta.get("files")
        # in order of length, then of the alphabet: x_train_2.bin comes before x_train_10.bin
        self.names = sorted(self.files or names, key=lambda name: (len(name), name))
        formats = {self.header(name)[0] for name in self.names} & HEADERS.keys()
        if len(formats) > 1:
            raise ValueError(f"{folder} holds tokens of two formats: keep those of one vocabulary")
        self.vocab_size = self.vocab_size or next((HEADERS[magic][2] for magic in formats), None)

    def split(self, name):
        """The tokens of 'train' or 'val' as one stream."""
        names = [file for file in self.names if re.fullmatch(rf"(.*_)?{name}(_\d+)?\.bin", file)]
        names = [f"{name}.bin"] if f"{name}.bin" in names else names
        if not names:
            raise FileNotFoundError(f"no {name}.bin in {self.folder}; {self.remedy}")
        return Tokens({os.path.join(self.folder, file): self.layout(file) for file in names})

    def header(self, name):
        """The magic number, version and number of tokens at the beginning of a file, if it has a header."""
        path = os.path.join(self.folder, name)
        if not os.path.exists(path):
            raise FileNotFoundError(f"{self.folder} has no {name} as meta.json lists it; {self.remedy}")
        return np.append(np.fromfile(path, dtype="<i4", count=3), [0, 0, 0])[:3].tolist()

    def layout(self, name):
        """Where the ids of a file are: their type, the bytes before them, and how many they are."""
        path, dtype, offset = os.path.join(self.folder, name), self.dtype, 0
        magic, version, stated = self.header(name)
        if magic in HEADERS:
            known, kind, _ = HEADERS[magic]
            if version != known:
                raise ValueError(f"{path} is of version {version} of its format, only {known} is known")
            dtype, offset = np.dtype(kind), HEADER
        else:
            stated = self.files[name]["tokens"] if self.files else None
        size = os.path.getsize(path)
        count, rest = divmod(size - offset, dtype.itemsize)
        if rest or size < offset:
            raise ValueError(f"{path} has {size} bytes, which is no whole number of {dtype.name} tokens; {self.remedy}")
        if stated is not None and stated != count:
            says = "its header" if offset else "meta.json"
            raise ValueError(f"{path} has {count:,} tokens, {says} says {stated:,}; {self.remedy}")
        if not count:
            raise ValueError(f"{path} is empty; {self.remedy}")
        start = np.fromfile(path, dtype, count=1 << 16, offset=offset)
        if dtype.itemsize == 2 and len(start) > 1000 and start[1::2].max() < 16 and start[::2].max() > 255:
            raise ValueError(f"{path} holds numbers of four bytes or more, not {dtype.name}; {self.remedy}")
        return dtype, offset, count


class FolderLock:
    """Keeps a second process from writing into a folder, where the system can: until the block, the object or the
    process ends. ValueError if there is another one."""

    def __init__(self, folder):
        self.handle = None
        try:
            import fcntl

            self.handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing into {folder}") from None
        except (ImportError, OSError):  # Windows, and file systems without locks
            pass

    def release(self, *_):
        handle, self.handle = self.handle, None
        if handle is not None:
            os.close(handle)

    def __enter__(self):
        return self

    __exit__ = __del__ = release


def read_json(path):
    """What a JSON file holds, or None if it is not there or holds no object."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        return content if isinstance(content, dict) else None
    except (OSError, ValueError, RecursionError):
        return None


def read_meta(folder):
    """meta.json of a dataset folder, or what nanoGPT's meta.pkl says in its terms, or {}. ValueError if unreadable."""
    path = os.path.join(folder, "meta.json")
    if os.path.exists(path):
        try:
            meta = read_json(path)
            valid = type(meta["vocab_size"]) is int and 0 < meta["vocab_size"] <= 2**32
            valid = valid and meta["dtype"] in ("uint16", "uint32")
            valid = valid and all(type(entry["tokens"]) is int for entry in meta.get("files", {}).values())
            if valid and isinstance(meta.get("tokenizer"), dict | None):
                return meta
        except (KeyError, TypeError, AttributeError):
            pass
        raise ValueError(f"{path} is damaged: delete it and prepare the dataset again")
    path = os.path.join(folder, "meta.pkl")
    if not os.path.exists(path):
        return {}
    try:
        with open(path, "rb") as f:
            old = PlainUnpickler(f).load()
        meta = {"vocab_size": old["vocab_size"]}
        if type(meta["vocab_size"]) is not int or not 0 < meta["vocab_size"] <= 2**32:
            raise ValueError("vocab_size is not a whole number above 0")
        if "itos" in old:
            meta["tokenizer"] = CharTokenizer([old["itos"][i] for i in range(old["vocab_size"])]).description
        return meta
    except Exception as e:  # a damaged pickle can raise anything
        raise ValueError(f"{path} is not read ({e or type(e).__name__}): prepare the dataset again") from None


class PlainUnpickler(pickle.Unpickler):
    """Reads pickles of numbers, text, lists and dicts; whatever names a class or function, and so could run code, is
    refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")


class Tokens:
    """A stream of token ids over one or many files. parts: {path: (dtype, bytes before the ids, how many ids)}."""

    def __init__(self, parts):
        self.paths, self.layouts = list(parts), list(parts.values())
        self.ends = np.cumsum([count for _, _, count in self.layouts])
        # the ids of a part, mapped into memory, not read; a process may have a thousand files open or so
        self.ids = functools.lru_cache(maxsize=256)(self.open)

    def __len__(self):
        return int(self.ends[-1])

    def open(self, i):
        dtype, offset, count = self.layouts[i]
        return np.memmap(self.paths[i], dtype=dtype, mode="r", offset=offset, shape=(count,))

    def read(self, start, count):
        """Ids start .. start + count - 1 of the stream, (count,)."""
        parts, i = [], int(np.searchsorted(self.ends, start, side="right"))
        while count > 0:
            offset = start - int(self.ends[i]) + self.layouts[i][2]
            parts.append(np.array(self.ids(i)[offset : offset + count]))  # a copy: files can be closed
            start, count, i = start + len(parts[-1]), count - len(parts[-1]), i + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def windows(self, starts, length):
        """The ids of windows that begin at starts, (B,), as int64, (B, length)."""
        return np.stack([self.read(start, length) for start in starts.tolist()]).astype(np.int64)

    def check(self, block_size, vocab_size):
        """ValueError if the stream is shorter than a window or holds ids past the vocabulary. Of long streams it looks
        at the beginning of each file, which is where another type or vocabulary shows."""
        if len(self) < block_size + 1:
            raise ValueError(
                f"{self.paths[0]} has {len(self):,} tokens, fewer than block_size + 1 = {block_size + 1:,}: "
                "use more text" + (f", or --block_size={len(self) - 1} or less" if len(self) > 1 else "")
            )
        for i, path in enumerate(self.paths):
            largest = int(self.ids(i)[: None if len(self) <= CHECKED else 1 << 20].max())
            if largest >= vocab_size:
                raise ValueError(
                    f"{path} has a token id {largest}, but the vocabulary ends at {vocab_size - 1}: "
                    "it was made with another tokenizer, or is of another type than meta.json says"
                )


# -----------------------------------------------------------------------------
# which windows: pure functions, so that a run can be resumed at any step and split over any number of processes


def train_windows(n_tokens, block_size, seed, first, count):
    """Where windows first .. first + count - 1 of the training order begin, (count,).

    In each epoch every window of block_size tokens comes once, in an order shuffled by the seed; the grid of windows
    itself is shifted from epoch to epoch. The order has no end.
    """
    per_epoch = max(1, (n_tokens - block_size) // block_size)  # all but one, which is the room to shift
    starts = []
    while count > 0:
        epoch, i = divmod(first, per_epoch)
        n = min(count, per_epoch - i)
        shift, *keys = np.random.SeedSequence((seed, epoch)).generate_state(5, np.uint64)
        shift = int(shift) % min(block_size, n_tokens - per_epoch * block_size)
        starts.append(shuffle(np.arange(i, i + n), per_epoch, keys) * block_size + shift)
        first, count = first + n, count - n
    return np.concatenate(starts)


def shuffle(i, n, keys):
    """Where a pseudorandom permutation of range(n) takes i, an array of ints. It needs no memory for the permutation.

    A Feistel network, a round a key, permutes the next power of four; whatever lands at n or beyond goes around again.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    out, outside = i.astype(np.uint64), np.ones(len(i), dtype=bool)
    while outside.any():
        left, right = out >> half, out & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio
            left, right = right, left ^ (mixed >> np.uint64(32) & mask)
        out = np.where(outside, left << half | right, out)
        outside = out >= n
    return out.astype(np.int64)


def eval_windows(n_tokens, block_size, count):
    """Where `count` windows that are spread evenly over the stream begin; all of its windows if it has fewer."""
    available = (n_tokens - 1) // block_size
    count = min(count, available)
    return np.arange(count) * available // count * block_size


# -----------------------------------------------------------------------------


def show(folder):
    """Print what a dataset folder holds."""
    data = Dataset(folder)
    splits = {name: data.split(name) for name in ("train", "val")}
    meta, description = read_json(os.path.join(folder, "meta.json")) or {}, data.tokenizer
    if not description and not data.vocab_size:
        description = {"kind": "tiktoken", "name": "gpt2"}  # as training assumes
    tokenizer = from_description(description) if description else None
    kind = description.get("name", description["kind"]) if description else "unknown"
    print(f"{folder}: tokenizer {kind}, vocabulary {data.vocab_size or tokenizer.vocab_size:,}")
    if "source" in meta:
        print(f"source: {meta['source']}")
    for name, tokens in splits.items():
        documents = meta["documents"].get(name) if isinstance(meta.get("documents"), dict) else None
        of, n = f" of {documents} documents" if documents else "", len(tokens.paths)
        print(f"{name}: {len(tokens):,} tokens{of} in {n} file{'s' * (n > 1)}")
        for path, (dtype, _, count) in zip(tokens.paths, tokens.layouts, strict=True):
            print(f"    {path}: {count:,} tokens, {dtype.name}")
    sample = splits["train"].read(0, min(len(splits["train"]), 1 << 22))
    if tokenizer:
        ends = [i for i in np.flatnonzero(sample[:2000] == tokenizer.eot) if i > 0]  # some put it before a document
        print("first document:", repr(tokenizer.decode(sample[: ends[0] if ends else 200])[:1000]))
    ids, counts = np.unique(sample, return_counts=True)
    print(f"most frequent of the first {len(sample):,} tokens:")
    for i in np.argsort(-counts, kind="stable")[:10]:
        text = repr(tokenizer.decode([ids[i]])) if tokenizer else ""
        print(f"    {ids[i]:6} {counts[i] / len(sample):6.2%} {text}")
    for tokens in splits.values():
        tokens.check(1, data.vocab_size or tokenizer.vocab_size)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end with the reader of a pipe
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
            raise ValueError("type python data/shards.py FOLDER")
        show(sys.argv[1])
    except (OSError, ValueError) as e:
        print("error:", e, file=sys.stderr)
        sys.exit(2)
