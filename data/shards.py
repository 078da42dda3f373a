"""
Datasets: how token ids are stored on disk, and which of them make up a batch.

    python data/shards.py data/shakespeare          print what a dataset contains

A dataset is a folder of .bin files: token ids and nothing else, little-endian uint16, or uint32 for large vocabularies.
All files of a split, train or val, form one stream. A training example is a window of it: block_size ids are the
inputs, and the targets are the same window shifted by one token. meta.json says what the ids mean:

    {"vocab_size": 65, "dtype": "uint16", "tokenizer": {...}, "source": "...", "documents": {...},
     "files": {"train.bin": {"tokens": 1003854, "sha256": "..."}, ...}}

Conversations have a mask next to each file, train_mask.bin: one uint8 per id, 1 where it counts in the loss. They
are packed into windows of "block_size" + 1 ids, which meta.json then has, and each of them is a training example.

Without meta.json, train.bin and val.bin are read, or all shards x_train_000001.bin, x_train_000002.bin ..., either as
nanoGPT writes them (raw uint16, with the characters in meta.pkl or GPT-2's tokens), or as llm.c and modded-nanogpt do:
after a header of 256 int32 values, which starts with a magic number, a version and the number of tokens
(https://github.com/karpathy/llm.c, dev/data/data_common.py).
"""

import bisect
import collections
import contextlib
import difflib
import functools
import glob
import itertools
import json
import os
import pickle
import re
import signal
import sys

import numpy as np

HEADER_BYTES = 256 * 4
FORMATS = {20240520: (1, "<u2", None), 20240801: (7, "<u4", 128256)}  # magic: (version, dtype, vocab_size)
PREPARING = "preparing.json"  # in a dataset folder while it is prepared, see data/preparation.py
CHECKED = 1 << 28  # tokens that check() reads in full; more would take seconds


class DataError(ValueError):
    """Tokens cannot be read or are corrupt, and the run has already started."""


# -----------------------------------------------------------------------------
# what a folder contains


class Dataset:
    """A dataset folder. vocab_size and tokenizer (a description, see data/tokenizer.py) are None if unknown.

    FileNotFoundError and ValueError say what is missing or corrupt, and what to type.
    """

    def __init__(self, folder):
        script = os.path.join(folder, "prepare.py")
        self.folder = folder
        if not os.path.exists(script):
            # a misspelled name, or text of one's own
            parent, name = os.path.split(folder)
            known = [os.path.dirname(path) for path in glob.glob("*/prepare.py", root_dir=parent)]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            script = os.path.join(parent, near[0], "prepare.py") if near else f"data/text/prepare.py FILE --name={name}"
        self.remedy = f"prepare the dataset: python {script}"

        # is there a complete dataset?
        names = glob.glob("*.bin", root_dir=folder)
        unfinished = read_json(os.path.join(folder, PREPARING))
        if unfinished is not None and (not names or unfinished.get("meta")):
            raise FileNotFoundError(f"{folder} is not finished: run the command that prepares it again")
        if not names:
            raise FileNotFoundError(f"no dataset in {folder}; {self.remedy}")

        # shards in the order of their numbers: x_train_2.bin comes before x_train_10.bin
        meta = read_meta(folder)
        self.files = meta.get("files", {})
        self.names = sorted(self.files or names, key=lambda name: (len(name), name))
        missing = [name for name in self.names if name not in names]
        if missing:
            raise FileNotFoundError(f"no {missing[0]} in {folder}; {self.remedy}")

        # the vocabulary and the type of the ids
        self.vocab_size, self.tokenizer = meta.get("vocab_size"), meta.get("tokenizer")
        self.block_size = meta.get("block_size")  # of packed conversations, else None
        self.dtype = np.dtype(meta.get("dtype", "uint16")).newbyteorder("<")
        magics = {read_header(os.path.join(folder, name))[0] for name in self.names} & FORMATS.keys()
        if len(magics) > 1:
            raise ValueError(f"{folder} mixes GPT-2's and Llama 3's tokens: keep the files of one vocabulary")
        for magic in magics:
            self.vocab_size = self.vocab_size or FORMATS[magic][2]

    def split(self, name):
        """Return the Tokens of the split "train" or "val"."""
        names = [file for file in self.names if re.fullmatch(rf"(.*_)?{name}(_\d+)?\.bin", file)]
        if f"{name}.bin" in names:
            names = [f"{name}.bin"]
        if not names:
            raise FileNotFoundError(f"no {name}.bin in {self.folder}; {self.remedy}")
        tokens = Tokens({os.path.join(self.folder, file): self.layout(file) for file in names})
        if self.block_size:  # the mask has a byte per token
            tokens.block_size = self.block_size
            tokens.mask = Tokens({os.path.join(self.folder, f"{name}_mask.bin"): (np.dtype("u1"), 0, len(tokens))})
            tokens.mask.ids(0)  # fail now if it is too short
        return tokens

    def layout(self, name):
        """Return (dtype, bytes before the ids, number of ids) of a file. Raises ValueError if it is corrupt."""
        path = os.path.join(self.folder, name)
        dtype, offset, expected = self.dtype, 0, self.files.get(name, {}).get("tokens")
        magic, version, n_tokens = read_header(path)
        if magic in FORMATS:
            known_version, dtype, _ = FORMATS[magic]
            dtype, offset, expected = np.dtype(dtype), HEADER_BYTES, n_tokens
            if version != known_version:
                raise ValueError(f"{path} has format version {version}, only {known_version} is supported")

        # the size must match
        size = os.path.getsize(path)
        count, rest = divmod(max(0, size - offset), dtype.itemsize)
        if rest:
            raise ValueError(f"{path} has {size} bytes, not a multiple of {dtype.itemsize}; {self.remedy}")
        if expected not in (None, count):
            raise ValueError(f"{path} has {count:,} tokens instead of {expected:,}; {self.remedy}")
        if count == 0:
            raise ValueError(f"{path} is empty; {self.remedy}")

        # larger integers read as uint16: every second number is nearly zero
        ids = np.fromfile(path, dtype, count=1 << 16, offset=offset)
        if dtype.itemsize == 2 and count > 1000 and ids[1::2].max() < 16 and ids[::2].max() > 255:
            raise ValueError(f"{path} contains integers of 4 bytes or more, not uint16; {self.remedy}")
        return dtype, offset, count


def read_header(path):
    """Return the first three int32 of a file: magic number, version and number of tokens, if it has a header."""
    header = np.fromfile(path, "<i4", count=3)
    return np.pad(header, (0, 3 - len(header))).tolist()


def read_meta(folder):
    """Return a dataset folder's meta.json, nanoGPT's meta.pkl in the same form, or {}. Raises ValueError if corrupt."""
    path = os.path.join(folder, "meta.json")
    if os.path.exists(path):
        meta = read_json(path)
        if not is_valid(meta):
            raise ValueError(f"{path} is corrupt: delete it and prepare the dataset again")
        return meta

    # the vocabulary of nanoGPT's character-level datasets
    path = os.path.join(folder, "meta.pkl")
    if not os.path.exists(path):
        return {}
    try:
        with open(path, "rb") as f:
            old = PlainUnpickler(f).load()
        meta = {"vocab_size": old["vocab_size"]}
        if not is_valid(meta | {"dtype": "uint16"}):
            raise ValueError("vocab_size is not a positive integer")
        # a dataset without a text for each id can still be trained on
        with contextlib.suppress(KeyError, IndexError, TypeError):
            symbols = [old["itos"][i] for i in range(old["vocab_size"])]
            text = "".join(symbols)
            is_char = all(len(s) == 1 for s in symbols) and len(set(symbols)) == len(symbols)
            kind, key, value = ("char", "characters", text) if is_char else ("symbols", "symbols", symbols)
            meta["tokenizer"] = {"kind": kind, key: value}
        return meta
    except Exception as e:  # a corrupt pickle can raise any exception
        raise ValueError(f"cannot read {path} ({e or type(e).__name__}): prepare the dataset again") from None


def is_valid(meta):
    """Tell whether the content of a meta.json has the types that are relied on.

    Example: {"vocab_size": 65, "dtype": "uint16"} -> True, {"vocab_size": 65, "dtype": "float64"} -> False
    """
    try:
        integers = [meta["vocab_size"], *(file["tokens"] for file in meta.get("files", {}).values())]
        integers += [meta.get("block_size", 1)]
        known_types = meta["dtype"] in ("uint16", "uint32") and isinstance(meta.get("tokenizer"), dict | None)
        known_types &= all(isinstance(meta.get(name, {}), dict) for name in ("documents", "recipe"))
        return known_types and all(type(n) is int for n in integers) and 0 < meta["vocab_size"] <= 2**32
    except (KeyError, TypeError, AttributeError):
        return False


class PlainUnpickler(pickle._Unpickler):  # in Python: the one in C allocates as much memory as a file asks for
    """Read pickles of numbers, text, lists and dicts. Refuse classes and functions, which could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which could run code")


def read_json(path):
    """Return the object in a JSON file, or None if it is missing or corrupt."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


class FolderLock(contextlib.AbstractContextManager):
    """Lock a folder until release() or the end of the process. ValueError if another process has locked it."""

    def __init__(self, folder):
        self.fd = None
        try:
            import fcntl

            self.fd = os.open(folder, os.O_RDONLY)
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is locked by another process") from None
        except (ImportError, OSError):  # Windows and some network file systems have no such locks
            pass

    def release(self, *_):
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    __exit__ = __del__ = release


# -----------------------------------------------------------------------------
# which tokens make up a batch: pure functions, so that a run resumes at any step and on any number of ranks


class Tokens:
    """A stream of token ids over one or more files. parts: {path: (dtype, bytes before the ids, number of ids)}.

    Packed conversations have a block_size, and a mask: Tokens that are 1 for each id that counts in the loss.
    """

    block_size = mask = None

    def __init__(self, parts):
        self.paths, self.layouts = list(parts), list(parts.values())
        self.ends = list(itertools.accumulate(count for _, _, count in self.layouts))  # of each file in the stream
        self.starts = [0, *self.ends[:-1]]
        self.ids = functools.lru_cache(maxsize=256)(self.open)  # a process can open about 1,000 files

    def __len__(self):
        return self.ends[-1]

    def open(self, i):
        """Map the ids of file i into memory, (count,). Raises DataError if it has changed since the start."""
        dtype, offset, count = self.layouts[i]
        try:
            return np.asarray(np.memmap(self.paths[i], dtype, mode="r", offset=offset, shape=(count,)))
        except (OSError, ValueError) as e:
            folder, name = os.path.split(self.paths[i])
            raise DataError(f"{folder}: cannot read {name} ({e})") from None

    def read(self, start, count):
        """Return the ids start .. start + count - 1 of the stream, (count,)."""
        end, parts = start + count, []
        for i in range(bisect.bisect_right(self.ends, start), bisect.bisect_left(self.ends, end) + 1):
            ids = self.ids(i)[max(0, start - self.starts[i]) : end - self.starts[i]]
            parts.append(np.array(ids))  # a copy, so that the file can be closed
        return np.concatenate(parts)

    def windows(self, starts, length):
        """Return the windows that begin at starts (B,) as int64 (B, length); -1 after the end of the stream."""
        windows = np.full((len(starts), length), -1, dtype=np.int64)
        for window, start in zip(windows, starts.tolist(), strict=True):
            count = min(length, len(self) - start)
            if count > 0:
                window[:count] = self.read(start, count)
        return windows

    def check(self, block_size, vocab_size):
        """Raise ValueError if the stream is shorter than a window or has ids that are not in the vocabulary.

        In long streams it checks the beginning of each file, where a wrong dtype or vocabulary already shows.
        """
        if self.block_size not in (None, block_size):
            problem = f"{self.paths[0]} is packed for block_size {self.block_size}, not {block_size}"
            raise ValueError(f"{problem}: use --block_size={self.block_size}, or prepare it with another one")
        if len(self) < block_size + 1:
            problem = f"{self.paths[0]} has {len(self):,} tokens, fewer than block_size + 1 = {block_size + 1:,}"
            raise ValueError(f"{problem}: use more text, or --block_size={len(self) - 1} or less")
        limit = 1 << 20 if len(self) > CHECKED else None
        for i, path in enumerate(self.paths):
            largest = self.ids(i)[:limit].max()
            if largest >= vocab_size:
                problem = f"{path} has token id {largest}, but the vocabulary ends at {vocab_size - 1}"
                raise ValueError(f"{problem}: it has another tokenizer or dtype")


def load_batch(tokens, starts, block_size, vocab_size, device):
    """Return inputs X and targets Y of the windows at starts, both (B, T) int64 on the device; Y is X shifted by one.

    After the end of the stream, and where the mask is 0, targets are -1, which the loss ignores. Raises DataError if a
    file cannot be read or an id is not in the vocabulary.
    """
    import torch  # here, because the prepare scripts do not need it

    ids = tokens.windows(starts, block_size + 1)
    if ids.max() >= vocab_size:
        row, column = np.argwhere(ids >= vocab_size)[0]
        path = tokens.paths[bisect.bisect_right(tokens.ends, starts[row] + column)]
        problem = f"{path} has token id {ids[row, column]} in the window at token {starts[row]:,}"
        raise DataError(f"{problem}, but the vocabulary ends at {vocab_size - 1}")

    xy = np.stack((ids[:, :-1].clip(min=0), ids[:, 1:]))  # (2, B, T)
    if tokens.mask:
        xy[1][tokens.mask.windows(starts, block_size + 1)[:, 1:] != 1] = -1
    xy = torch.from_numpy(xy)
    if torch.device(device).type == "cuda":
        xy = xy.pin_memory().to(device, non_blocking=True)  # the copy overlaps with computation
    else:
        xy = xy.to(device)
    return xy[0], xy[1]


def train_windows(n_tokens, block_size, seed, first, count, packed=False):
    """Return the starts (count,) of windows first .. first + count - 1 in the endless training order.

    Each epoch shifts the grid of windows at random, and visits each of them once in an order shuffled by the seed.
    Packed windows do not overlap, not even by one token, and are not shifted.

    Example: n_tokens=14, block_size=3, seed=0, first=0, count=6 -> [5, 8, 2, 6, 3, 0]
    """
    stride = block_size + int(packed)
    per_epoch = max(1, n_tokens // stride - int(not packed))  # one fewer than fits, to leave room for the shift
    room = 1 if packed else min(block_size, n_tokens - per_epoch * block_size)
    starts = []
    while count > 0:
        # as many as this epoch still has
        epoch, i = divmod(first, per_epoch)
        n = min(count, per_epoch - i)
        shift, *keys = np.random.SeedSequence((seed, epoch)).generate_state(5, np.uint64)
        starts.append(shuffle(np.arange(i, i + n), per_epoch, keys) * stride + int(shift) % room)
        first, count = first + n, count - n
    return np.concatenate(starts)


def shuffle(i, n, keys):
    """Return where a pseudorandom permutation of range(n) maps the integers i, an array; it is computed, not stored.

    A Feistel network permutes the next power of four: per key, the left half of the bits is XORed with a hash of the
    right half, which can be undone, and the halves change places. Results of n or more are permuted again.

    Example: i=np.arange(6), n=6, keys=np.array([1, 2, 3, 4], np.uint64) -> [2, 0, 1, 4, 5, 3]
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))  # bits
    mask = (np.uint64(1) << half) - np.uint64(1)

    # cycle until all results are in range(n)
    out, outside = i.astype(np.uint64), np.arange(len(i))
    while len(outside):
        left, right = out[outside] >> half, out[outside] & mask
        for key in keys:
            hashed = (right + key) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)  # 2**64 / golden ratio
            left, right = right, left ^ (hashed & mask)
        out[outside] = left << half | right
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


def eval_windows(n_tokens, block_size, count, packed=False):
    """Return the starts of `count` windows spread evenly over the stream; all windows if it has fewer.

    Example: n_tokens=100, block_size=10, count=4 -> [0, 20, 40, 60]
    """
    stride = block_size + int(packed)
    available = (n_tokens - block_size - 1) // stride + 1  # the last one fits, too
    count = min(count, available)
    return np.arange(count) * available // count * stride


# -----------------------------------------------------------------------------


def show(folder):
    """Print what a dataset contains: tokenizer, source, sizes, beginning and most frequent tokens. Check its ids."""
    from data.tokenizer import assumed_tokenizer, for_terminal, from_description

    data, meta = Dataset(folder), read_json(os.path.join(folder, "meta.json")) or {}
    description = data.tokenizer or assumed_tokenizer(data.vocab_size)
    tokenizer = from_description(description) if description else None
    name = description.get("name", description["kind"]) if description else "unknown"
    print(for_terminal(f"tokenizer: {name}, source: {meta.get('source', 'unknown')}"))
    for split in ("train", "val"):
        tokens, documents = data.split(split), meta.get("documents", {}).get(split) or "unknown"
        print(for_terminal(f"{split}: {len(tokens):,} tokens, files: {len(tokens.paths)}, documents: {documents}"))
        tokens.check(data.block_size or 1, data.vocab_size or tokenizer.vocab_size)
        ids = tokens.read(0, min(len(tokens), 1 << 20)).tolist()
        frequent = [i for i, _ in collections.Counter(ids).most_common(10)]
        print("    beginning:", repr(tokenizer.decode(ids[:200])) if tokenizer else ids[:20])
        print("    most frequent:", [tokenizer.decode([i]) for i in frequent] if tokenizer else frequent)


if __name__ == "__main__":
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
    sys.stdout.reconfigure(errors="backslashreplace")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when `| head` closes the pipe
    try:
        if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
            raise ValueError("usage: python data/shards.py FOLDER, such as data/mine")
        show(sys.argv[1])
    except (OSError, ValueError) as e:
        from data.tokenizer import for_terminal

        print("error:", for_terminal(str(e)), file=sys.stderr)
        sys.exit(2)
