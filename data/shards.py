"""
How tokens lie on disk, and which of them make up a batch.

A dataset is a folder: train.bin and val.bin, or train_000000.bin, train_000001.bin ... read as one stream, hold raw
little-endian token ids, uint16 or uint32. meta.json says of which type they are, how many, and by which tokenizer:

    {"vocab_size": 65, "dtype": "uint16", "tokenizer": {...}, "source": "...",
     "files": {"train.bin": {"tokens": 1003854, "sha256": "..."}, ...}}

Folders without it are read as nanoGPT writes them: uint16, with the characters in meta.pkl, or GPT-2's tokens.
"""

import argparse
import contextlib
import glob
import hashlib
import http.client
import json
import os
import pickle
import sys
import urllib.request

import numpy as np
from tqdm import tqdm

from data.tokenizer import CharTokenizer

# -----------------------------------------------------------------------------
# writing


@contextlib.contextmanager
def prepare_script(doc, **options):
    """What a prepare.py runs in: options are those of its command line, with their defaults, and --help prints doc.
    OSError and ValueError end it with one line and exit code 2, the code for wrong usage, Ctrl-C with 130."""
    try:
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
        for name, default in options.items():
            parser.add_argument(f"--{name}", default=default, help=f"default: {default}")
        yield parser.parse_args()
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as e:
        named = isinstance(e, OSError) and e.filename and e.strerror
        print("error:", f"{e.strerror}: {e.filename}" if named else " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)


def download(url, path, sha256):
    """Fetch url into path, which appears when all of it is there and its checksum is right. OSError otherwise."""
    digest, temporary = hashlib.sha256(), path + ".tmp"
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(temporary, "wb") as f:
            size = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc="downloading") as bar:
                while chunk := response.read(1 << 16):
                    f.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
        if digest.hexdigest() != sha256:
            raise OSError(f"its sha256 is not {sha256}")
        os.replace(temporary, path)
    except (OSError, http.client.HTTPException) as e:
        raise OSError(
            f"cannot download ({e or type(e).__name__}): fetch {url} elsewhere and save it as {path}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


class DatasetWriter:
    """Writes a dataset folder, whole or not at all:

        with DatasetWriter(folder, tokenizer, source="where the text is from") as out:
            out.write("train", ids)  # any number of times, for any split

    The files take their places when the block ends; until then, and for good if it raises, the old ones stand. OSError
    when they cannot be written.
    """

    def __init__(self, folder, tokenizer, source):
        self.folder, self.files = folder, {}
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.meta = {
            "vocab_size": tokenizer.vocab_size,
            "dtype": self.dtype.name,
            "tokenizer": tokenizer.description,
            "source": source,
            "files": {},
        }

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, split, ids):
        name = f"{split}.bin"
        if name not in self.files:
            self.files[name] = open(self.path(name + ".tmp"), "wb")
            self.meta["files"][name] = {"tokens": 0, "sha256": hashlib.sha256()}
        raw = np.ascontiguousarray(ids, dtype=self.dtype)
        self.files[name].write(raw)
        self.meta["files"][name]["tokens"] += raw.size
        self.meta["files"][name]["sha256"].update(raw)

    def __enter__(self):
        os.makedirs(self.folder, exist_ok=True)
        return self

    def __exit__(self, kind, failure, _):
        try:
            for f in self.files.values():
                with f:
                    f.flush()
                    os.fsync(f.fileno())
            if failure is None:
                self.finish()
        except OSError as e:
            e.filename = e.filename or self.folder  # a full disk names no file
            raise
        finally:
            for name in ("meta.json", *self.files):
                with contextlib.suppress(OSError):
                    os.remove(self.path(name + ".tmp"))

    def finish(self):
        for entry in self.meta["files"].values():
            entry["sha256"] = entry["sha256"].hexdigest()
        with open(self.path("meta.json.tmp"), "w", encoding="utf-8") as f:
            json.dump(self.meta, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        # meta.json goes first: a kill before the last rename leaves files that do not match it, and Dataset says so
        for name in ("meta.json", *self.files):
            os.replace(self.path(name + ".tmp"), self.path(name))
        for name, entry in self.meta["files"].items():
            print(f"{self.path(name)}: {entry['tokens']:,} tokens")


# -----------------------------------------------------------------------------
# reading


class Dataset:
    """A dataset folder. vocab_size and tokenizer (a description, see data/tokenizer.py) are None where not known.

    FileNotFoundError and ValueError say what is wrong with a folder and what to type.
    """

    def __init__(self, folder):
        self.folder = folder
        self.remedy = f"make it again: python {os.path.join(folder, 'prepare.py')}"
        if not glob.glob(os.path.join(glob.escape(folder), "*.bin")):
            if os.path.exists(os.path.join(folder, "prepare.py")):
                raise FileNotFoundError(f"no .bin files in {folder}; make them: python {folder}/prepare.py")
            known = sorted(os.path.basename(os.path.dirname(p)) for p in glob.glob("data/*/prepare.py"))
            ready = f"data/ can prepare {', '.join(known)}" if known else "run this in the folder that train.py is in"
            raise FileNotFoundError(f"no dataset in {folder}; {ready}")
        meta = read_meta(folder)
        self.vocab_size, self.tokenizer = meta.get("vocab_size"), meta.get("tokenizer")
        self.dtype, self.files = np.dtype(meta.get("dtype", "uint16")).newbyteorder("<"), meta.get("files")

    def split(self, name):
        """The tokens of 'train' or 'val' as one stream."""
        paths = [os.path.join(self.folder, f"{name}.bin")]
        if not os.path.exists(paths[0]):
            paths = sorted(glob.glob(os.path.join(glob.escape(self.folder), f"{name}_*.bin")))
        stated = [file for file in self.files or {} if file == f"{name}.bin" or file.startswith(f"{name}_")]
        if set(stated) - {os.path.basename(path) for path in paths}:
            raise FileNotFoundError(f"{self.folder} has no {name}.bin as meta.json lists it; {self.remedy}")
        if not paths:
            raise FileNotFoundError(f"no {name}.bin in {self.folder}; {self.remedy}")
        for path in paths:
            size, unit = os.path.getsize(path), self.dtype.itemsize
            if size == 0 or size % unit:
                raise ValueError(
                    f"{path} has {size} bytes, which is no whole number of {self.dtype.name} tokens; {self.remedy}"
                )
            stated = self.files and self.files.get(os.path.basename(path), {}).get("tokens")
            if stated is not None and stated != size // unit:
                raise ValueError(f"{path} has {size // unit:,} tokens, meta.json says {stated:,}; {self.remedy}")
        return Tokens(paths, self.dtype)


def read_meta(folder):
    """meta.json of a dataset folder, or what nanoGPT's meta.pkl says in its terms, or {}. ValueError if unreadable."""
    path = os.path.join(folder, "meta.json")
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as f:
                meta = json.load(f)
            valid = type(meta["vocab_size"]) is int and 0 < meta["vocab_size"] <= 2**32
            valid = valid and meta["dtype"] in ("uint16", "uint32")
            valid = valid and all(type(entry["tokens"]) is int for entry in meta.get("files", {}).values())
            if valid and isinstance(meta.get("tokenizer"), dict | None):
                return meta
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
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
    """A stream of token ids over one or many files, mapped into memory, not read."""

    def __init__(self, paths, dtype):
        self.paths = paths
        self.shards = [np.memmap(path, dtype=dtype, mode="r") for path in paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self):
        return int(self.ends[-1])

    def read(self, start, count):
        """Ids start .. start + count - 1 of the stream, (count,)."""
        i = int(np.searchsorted(self.ends, start, side="right"))
        offset = start - int(self.ends[i]) + len(self.shards[i])
        part = self.shards[i][offset : offset + count]
        return part if len(part) == count else np.concatenate((part, self.read(start + len(part), count - len(part))))

    def windows(self, starts, length):
        """The ids of windows that begin at starts, (B,), as int64, (B, length)."""
        return np.stack([self.read(start, length) for start in starts.tolist()]).astype(np.int64)

    def check(self, block_size, vocab_size):
        """ValueError if the stream is shorter than a window or holds ids past the vocabulary. Looks at the beginning
        of each file, which is where another type or vocabulary shows."""
        if len(self) < block_size + 1:
            raise ValueError(
                f"{self.paths[0]} has {len(self):,} tokens, fewer than block_size + 1 = {block_size + 1:,}: "
                "use more text" + (f", or --block_size={len(self) - 1} or less" if len(self) > 1 else "")
            )
        for path, shard in zip(self.paths, self.shards, strict=True):
            largest = int(shard[: 1 << 20].max())
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
