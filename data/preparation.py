"""
From documents to a dataset: what the prepare scripts share.

    with prepare_script(__doc__, *CORPUS) as args:
        write_dataset(folder, Files({None: [args.input]}, args), args, source="where the text is from")

Documents are read one after another, encoded on all cores and written in their order; no more than some batches of them
are ever in memory. The same input gives the same files, on however many cores and after however many interruptions:
what is written, and where to read on, stands in preparing.json until all is there.

The encoders are Rust and C++ that let Python's other threads run, so threads use all cores, alike on every system.
"""

import argparse
import collections
import contextlib
import glob
import hashlib
import http.client
import itertools
import json
import os
import re
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from data.documents import PIECE, passages
from data.shards import PREPARING, Dataset, FolderLock, Tokens, read_json
from data.tokenizer import from_description, from_name

# -----------------------------------------------------------------------------
# the frame of a prepare.py

OPTIONS = {  # name: (default, help)
    "inputs": ([], "files, folders and 'patterns*' to read; - for standard input"),
    "input": ("", "file, folder or 'pattern*' to read instead of the download, in the same format or another"),
    "name": ("", "folder in data/ to write to"),
    "tokenizer": (
        "gpt2",
        "char, bpe:8192, gpt2, a tokenizer.json, a .model, a dataset's folder, a model's folder or name",
    ),
    "column": ("text", "where the text is in jsonl, csv and parquet"),
    "format": ("", "txt, jsonl, csv, tsv or parquet, for names that do not end so"),
    "val_share": (0.1, "share of the documents for validation, chosen by a hash of their text"),
    "num_samples": (0, "documents to take; 0: all"),
    "max_bad": (0.01, "share of rows or of bytes that may be unreadable; those are left out and counted"),
    "shard_tokens": (0, "tokens in a file, train_000000.bin and so on; 0: one train.bin"),
    "workers": (0, "threads; 0: one a core"),
    "force": (False, "replace what the folder holds"),
}
CORPUS = ("tokenizer", "column", "val_share", "num_samples", "max_bad", "shard_tokens", "workers")


@contextlib.contextmanager
def prepare_script(doc, *names, **defaults):
    """What a prepare.py runs in. Yields all OPTIONS; those named, those given with another default and any further ones
    given are flags of its command line, with --force and --help, which prints doc. OSError and ValueError end it with
    one line and exit code 2, the code for wrong usage, Ctrl-C with 130."""
    options = {name: default for name, (default, _) in OPTIONS.items()} | defaults
    options["tokenizer"] = os.environ.get("TOKENIZER") or options["tokenizer"]
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    for name in dict.fromkeys((*defaults, *names, "force")):
        default, text = options[name], OPTIONS.get(name, ("", ""))[1]
        text += f" ({default})" * (default not in ("", [], False)) + " [env: TOKENIZER]" * (name == "tokenizer")
        if isinstance(default, list):
            parser.add_argument(name, nargs="*", help=text)
        elif isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true", help=text)
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default, help=text, metavar="...")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files and columns may be anything

    def complain(message):
        print(f"error: {message}; --help lists what there is", file=sys.stderr)
        sys.exit(2)

    parser.error = complain
    args = argparse.Namespace(**options | vars(parser.parse_intermixed_args()))
    try:
        if not 0 < args.val_share < 1 or not 0 <= args.max_bad <= 1:
            raise ValueError("--val_share and --max_bad are shares: numbers between 0 and 1")
        if "name" in defaults and (os.path.basename(args.name) != args.name or args.name in ("", ".", "..")):
            raise ValueError(f"--name is that of a folder in data/, not {args.name!r}")
        if min(args.num_samples, args.shard_tokens, args.workers) < 0:
            raise ValueError("--num_samples, --shard_tokens and --workers must not be negative")
        yield args
    except KeyboardInterrupt:
        print("interrupted: the same command carries on", file=sys.stderr)
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


# -----------------------------------------------------------------------------
# from documents to files of tokens

BATCH = 1 << 18  # characters that a thread encodes at once
SAVE_EVERY = 3  # seconds
LEFT_OUT = ("bad rows", "undecodable bytes")


def write_dataset(folder, corpus, args, source):
    """Encode the documents of a corpus, Texts or Files, into a dataset folder.

    The files take their places when all is done; until then what was there before stands. An interrupted call is
    carried on by the next one with the same args and corpus, a finished one is not repeated. ValueError if the folder
    holds something else and args.force is not set; OSError when files cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    with FolderLock(folder):
        names = ("tokenizer", "column", "format", "val_share", "num_samples", "shard_tokens")
        recipe = {name: getattr(args, name) for name in names} | {"inputs": corpus.identity}
        if os.path.exists(args.tokenizer) and args.tokenizer != "char":  # a file or folder, whose content may change
            description = json.dumps(from_name(args.tokenizer).description)
            recipe["tokenizer"] += f" ({hashlib.sha256(description.encode()).hexdigest()[:8]})"
        state = begin(folder, recipe, args.force)
        if state is None:
            return
        if not state.get("replacing"):
            state = encode(folder, corpus, args, state)
            state["meta"] |= {"source": source, "recipe": recipe}
            write_json(os.path.join(folder, PREPARING), state | {"replacing": True})
            for what, n in state["meta"]["left_out"].items():
                print(f"left out: {n:,} {what}" + f" (the first: {corpus.first_bad})" * (what == "bad rows"))
        replace(folder, state["meta"])


def begin(folder, recipe, force):
    """The state to start from, None if the dataset is there already. ValueError if the folder holds another one."""
    unfinished, meta = (read_json(os.path.join(folder, name)) for name in (PREPARING, "meta.json"))
    if unfinished and not (unfinished.keys() >= beginning(None).keys() and isinstance(unfinished["recipe"], dict)):
        unfinished = None  # damaged
    if unfinished and not any(unfinished["tokens"].values()) and not unfinished.get("replacing"):
        unfinished = None  # nothing is lost
    there = unfinished or meta or ({} if glob.glob(os.path.join(glob.escape(folder), "*.bin")) else None)
    if there is not None and there.get("recipe") != recipe and not force:
        before = there.get("recipe") if isinstance(there.get("recipe"), dict) else {}
        changed = [k for k in recipe if before.get(k) != recipe[k]]
        changed = ["other or changed input" if k == "inputs" else f"{k}={before.get(k)!r}" for k in changed]
        kind = "an unfinished dataset" if unfinished else "a dataset"
        how = f"with {'; '.join(changed)}" if before else "in another way"
        raise ValueError(f"{folder} holds {kind} that was made {how}: --force replaces it")
    if unfinished and unfinished["recipe"] == recipe:
        print(f"carrying on after {sum(unfinished['tokens'].values()):,} tokens")
        return unfinished
    if unfinished and unfinished.get("replacing"):
        remove_others(folder, ())  # half of this and half of that
    if meta and not force:
        try:
            tokens = {split: len(Dataset(folder).split(split)) for split in ("train", "val")}
            print(f"{folder} is finished: {tokens['train']:,} + {tokens['val']:,} tokens; --force makes it again")
            return None
        except (OSError, ValueError) as e:
            print(f"making it again: {e}")
    return beginning(recipe)


def beginning(recipe):
    """The state of a dataset of which nothing is made. part and piece say where to read on, counts what the corpus had
    counted when that part began, tokens how many are written."""
    zero = {"train": 0, "val": 0}
    return dict(recipe=recipe, tokenizer=None, part=0, piece=0, counts={}, documents=zero, tokens=dict(zero))


def make_tokenizer(corpus, args):
    """The tokenizer that args name. One that is made of a text sees that of the documents for training."""

    def texts(n):
        share = 1 if n is None or args.num_samples else min(1, n / max(1, corpus.size))
        seen, start = 0, beginning(None)
        with progress(corpus, args, start, f"reading for {args.tokenizer}") as show:
            for _, _, _, piece, split in read(corpus, args, start):
                if n is None or split == "train" and fraction(piece.text, 1) < share:
                    seen += len(piece.text)
                    # a word of a million letters would take for ever to learn from
                    yield from (text for text, _ in passages(piece.text, PIECE))
                if n is not None and seen > n:  # unpacked it may be far more than the size of the files
                    break
                start["documents"][split] += piece.ends
                show()

    return from_name(args.tokenizer, texts)


def fraction(text, which):
    """A number from 0 to 1 that depends on nothing but the text; another one for each which."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
    return int.from_bytes(digest[8 * which : 8 * which + 8], "little") / 2**64


def split_of(text, val_share):
    return "val" if fraction(text, 0) < val_share else "train"


def read(corpus, args, state):
    """Yield (part, the corpus's counts when it began, how many pieces of it are read, piece, split) from where state
    says, as many documents as args say."""
    corpus.counts.update(dict.fromkeys(corpus.counts, 0) | state["counts"])
    wanted = args.num_samples - sum(state["documents"].values()) if args.num_samples else float("inf")
    first, skip = state["part"], state["piece"]
    for part in range(first, len(corpus.parts)):
        before = dict(corpus.counts)
        pieces = enumerate(corpus.pieces(part), 1) if wanted > 0 else ()
        for n, piece in pieces:
            if part == first and n <= skip:
                continue
            yield part, before, n, piece, piece.split or split_of(piece.text, args.val_share)
            corpus.check(final=False)
            wanted -= piece.ends
            if wanted <= 0:
                break
    corpus.check(final=True)


@contextlib.contextmanager
def progress(corpus, args, state, what):
    """A progress bar, by documents if their number is known, else by bytes; yields what updates it."""
    begun, already, first = time.monotonic(), sum(state["tokens"].values()), True
    unit = dict(total=args.num_samples, unit=" documents") if args.num_samples else dict(total=corpus.size, unit="B")
    often = 0.2 if sys.stderr.isatty() else 60  # seconds
    with tqdm(desc=what, unit_scale=True, mininterval=often, **unit) as bar:

        def show():
            nonlocal first
            documents, tokens = sum(state["documents"].values()), sum(state["tokens"].values()) - already
            n = documents if args.num_samples else corpus.position()
            if first and already:  # what an earlier run did says nothing of the time that is left
                bar.n = bar.initial = bar.last_print_n = n
            first = False
            speed = f"{tokens / (time.monotonic() - begun + 1e-9) / 1e6:.2f}M tokens/s"
            bar.set_postfix_str(f"{documents:,} documents, {speed}" if tokens else "", refresh=False)
            bar.update(n - bar.n)

        yield show


def encode(folder, corpus, args, state):
    """Write the tokens of a corpus's documents into .tmp files, from where state says. Returns the state at the end,
    with meta for meta.json."""
    listing = hashlib.sha256(json.dumps(corpus.parts).encode()).hexdigest()
    if state.setdefault("listing", listing) != listing:
        print("the files on the Hub have changed: beginning again")
        state = beginning(state["recipe"]) | {"listing": listing}
    state["tokenizer"] = state["tokenizer"] or make_tokenizer(corpus, args).description
    tokenizer = from_description(state["tokenizer"])
    separator = tokenizer.encode("\n") if tokenizer.eot is None else [tokenizer.eot]

    def batches():
        """(part, counts, n, batch): where to read on behind the batch, a list of (piece, split, whether it is separated
        from what follows: where a document ends, and where its next piece goes into the other split)."""
        batch, size = [], 0
        pieces = itertools.chain(read(corpus, args, state), [None])
        for (*position, piece, split), following in itertools.pairwise(pieces):
            parted = following is not None and piece.split is None and following[-1] != split
            batch.append((piece, split, piece.ends or parted))
            size += len(piece.text)
            if size >= BATCH or following is None:
                yield *position, batch
                batch, size = [], 0

    def ids_of(item):
        """{split: ids} of one of the batches."""
        ids, batch = {"train": [], "val": []}, item[-1]
        encoded = tokenizer.encode_documents([piece.text for piece, _, _ in batch])
        for (_, split, separate), part in zip(batch, encoded, strict=True):
            ids[split] += [part, separator] if separate else [part]
        return {split: np.concatenate(parts) for split, parts in ids.items() if parts}

    def save():
        files.sync()
        write_json(os.path.join(folder, PREPARING), state)
        return time.monotonic()

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with TokenFiles(folder, tokenizer, args.shard_tokens, state["tokens"]) as files:
        if not files.intact():
            print("the unfinished files are damaged: beginning again")
            state |= beginning(state["recipe"]) | {"tokenizer": state["tokenizer"]}
            files.tokens = state["tokens"]
        saved = save()
        with progress(corpus, args, state, "preparing") as show:
            for (part, counts, n, batch), ids in in_order(ids_of, batches(), args.workers or cores):
                for split in ids:
                    files.write(split, ids[split])
                for piece, split, _ in batch:
                    state["documents"][split] += piece.ends
                state.update(part=part, piece=n, counts=counts)
                if time.monotonic() - saved > SAVE_EVERY:
                    saved = save()
                show()
        if sum(files.tokens.values()) < 2:
            raise ValueError("there is no text in this input")
        if 0 in files.tokens.values():
            print("too few documents for two splits: the last tenth of their tokens is for validation")
            files.cut()
            state["documents"] = {}
        files.sync()
    state["meta"] = {
        "vocab_size": tokenizer.vocab_size,
        "dtype": files.dtype.name,
        "tokenizer": state["tokenizer"],
        "documents": state["documents"],
        "left_out": {name: n for name, n in corpus.counts.items() if name in LEFT_OUT and n},
        "files": {name: {"tokens": n, "sha256": sha256_of(files.path(name))} for name, n in files.sizes().items()},
    }
    return state


def in_order(function, items, workers):
    """Yield (item, function(item)) for each item, in their order; threads are at work on those that come next."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > 2 * workers:
                item, future = waiting.popleft()
                yield item, future.result()
        for item, future in waiting:
            yield item, future.result()


class TokenFiles:
    """The files of a dataset while they are written, with .tmp behind their names: all tokens of a split in one, or
    shard_tokens in each. tokens: {split: how many are written}."""

    def __init__(self, folder, tokenizer, shard_tokens, tokens):
        self.folder, self.tokens = folder, tokens
        self.sharded, self.longest = shard_tokens > 0, shard_tokens or 2**62
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.open = {}  # split: its last file

    def name(self, split, i):
        return f"{split}_{i:06d}.bin" if self.sharded else f"{split}.bin"

    def path(self, name):
        return os.path.join(self.folder, name + ".tmp")

    def sizes(self):
        """{name: tokens} of all files."""
        starts = {split: range(0, n, self.longest) for split, n in self.tokens.items()}
        return {
            self.name(split, i): min(self.longest, self.tokens[split] - start)
            for split in starts
            for i, start in enumerate(starts[split])
        }

    def intact(self):
        """Whether the files hold what is said to be written. What they hold behind it is cut off."""
        for name, n in self.sizes().items():
            path, size = self.path(name), n * self.dtype.itemsize
            if not os.path.exists(path) or os.path.getsize(path) < size:
                return False
            os.truncate(path, size)
        return True

    def write(self, split, ids):
        raw = np.ascontiguousarray(ids, dtype=self.dtype)
        while raw.size:
            i, offset = divmod(self.tokens[split], self.longest)
            if split not in self.open:
                self.open[split] = open(self.path(self.name(split, i)), "ab" if offset else "wb")
            part = raw[: self.longest - offset]
            self.open[split].write(part)
            self.tokens[split] += part.size
            raw = raw[part.size :]
            if offset + part.size == self.longest:
                self.sync()
                self.open.pop(split).close()

    def cut(self):
        """Make two splits, nine to one, of the tokens of one: a hash sends few documents all into the same. After a
        kill in the middle the files are either still as they were, or not intact."""
        self.close()
        for name in self.sizes():
            os.replace(self.path(name), self.path(name.replace("val", "train")))
        n = max(self.tokens.values())
        self.tokens.update(train=n, val=0)
        parts = {self.path(name): (self.dtype, 0, count) for name, count in self.sizes().items()}
        start = max(1, n * 9 // 10)
        for i in range(start, n, 1 << 20):
            self.write("val", Tokens(parts).read(i, min(1 << 20, n - i)))
        self.tokens["train"] = start
        self.sync()
        self.intact()

    def sync(self):
        for f in self.open.values():
            f.flush()
            os.fsync(f.fileno())

    def close(self):
        for f in self.open.values():
            f.close()
        self.open = {}

    def __enter__(self):
        return self

    def __exit__(self, kind, failure, trace):
        if isinstance(failure, OSError):
            failure.filename = failure.filename or self.folder  # a full disk names no file
        with contextlib.suppress(OSError) if failure else contextlib.nullcontext():
            self.close()


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def replace(folder, meta):
    """Let the files that are written take their places. Until the last is there, PREPARING says that some may not."""
    for name in meta["files"]:
        if os.path.exists(os.path.join(folder, name + ".tmp")):
            os.replace(os.path.join(folder, name + ".tmp"), os.path.join(folder, name))
    remove_others(folder, meta["files"])
    write_json(os.path.join(folder, "meta.json"), meta)
    os.remove(os.path.join(folder, PREPARING))
    for name, entry in meta["files"].items():
        print(f"{os.path.join(folder, name)}: {entry['tokens']:,} tokens")


def remove_others(folder, names):
    """Remove the files of a dataset from a folder, but for those of these names."""
    for name in os.listdir(folder):
        if re.fullmatch(r"(.*_)?(train|val)(_\d+)?\.bin(\.tmp)?|meta\.(pkl|json)", name) and name not in names:
            os.remove(os.path.join(folder, name))


def write_json(path, content):
    """Write a JSON file whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(content, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)
