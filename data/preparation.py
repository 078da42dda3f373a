"""
Turn documents into a dataset folder: what the prepare scripts share.

    with prepare_script(__doc__, *CORPUS) as args:
        write_dataset(folder, Files({None: [args.input]}, args), args)

Documents are read in sequence, tokenized by threads (tokenizers are Rust and C++ code that releases the GIL) and
written in the same order. Memory use does not grow with the corpus. The same input gives the same files, for any number
of threads and interruptions: preparing.json says what has been written, until the dataset is complete.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from data.shards import PREPARING, Dataset, FolderLock, read_json, read_meta
from data.tokenizer import for_terminal, from_description, from_name, with_special_tokens

# -----------------------------------------------------------------------------
# the command line of a prepare.py

OPTIONS = {  # name: (default, help)
    "inputs": ([], "files, folders and 'patterns*' to read; -: standard input"),
    "input": ("", "file, folder or 'pattern*' to read instead of the download"),
    "val": ("", "file, folder or 'pattern*' for validation; the other input is for training"),
    "name": ("text", "folder in data/ to write to"),
    "tokenizer": ("gpt2", "char, bpe:8192, gpt2, x.json, x.model, dataset, model or Hub name [env: TOKENIZER]"),
    "special_tokens": (False, "recognize special tokens such as <|im_start|> in the documents; default: they are text"),
    "column": ("text", "column of jsonl, json, csv, tsv and parquet files that contains the text; a.b: nested"),
    "format": ("", "txt, jsonl, json, csv, tsv or parquet, whatever the files' extensions"),
    "val_share": (0.1, "fraction for validation: of the documents, by a hash of their text; of each long one, its end"),
    "num_samples": (0, "documents to read; 0: all"),
    "max_bad": (0.01, "largest share of unreadable rows, which are left out, and bytes, which are replaced"),
    "shard_tokens": (0, "tokens per file, train_000000.bin and so on; 0: a single train.bin"),
    "workers": (0, "threads; 0: one per core"),
    "block_size": (1024, "context length that conversations are packed for, in tokens"),
    "force": (False, "overwrite the dataset in the folder"),
}
CORPUS = ("tokenizer", "special_tokens", "column", "val_share", "num_samples", "max_bad", "shard_tokens", "workers")


@contextlib.contextmanager
def prepare_script(doc, *names, **defaults):
    """Run the body of a prepare.py: yield all OPTIONS, as set on the command line.

    names: options that are flags of this script, in addition to --force
    defaults: flags with another default, or of this script only
    OSError and ValueError end it with one line and exit code 2, Ctrl-C with 130.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # file names can contain anything
    try:
        yield parse_args(doc, names, defaults)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError) as e:
        print("error:", for_terminal(" ".join(str(e).split())), file=sys.stderr)
        sys.exit(2)


def parse_args(doc, names, defaults):
    """Parse the command line. Raise ValueError for wrong usage."""

    def fail(message):
        raise ValueError(f"{message}; see --help")

    # add the flags
    options = {name: default for name, (default, _) in OPTIONS.items()} | defaults
    options["tokenizer"] = os.environ.get("TOKENIZER") or options["tokenizer"]
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.error = fail
    for name in dict.fromkeys((*defaults, *names, "force")):
        default = options[name]
        _, text = OPTIONS.get(name, (None, ""))
        if isinstance(default, list):
            parser.add_argument(name, nargs="+", help=text)
        elif isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true", help=text)
        else:
            text += f" (default: {default})" if default else ""
            parser.add_argument(f"--{name}", type=type(default), default=default, help=text, metavar="...")
    args = argparse.Namespace(**options | vars(parser.parse_intermixed_args()))

    # refuse values without a meaning
    if not 0 < args.val_share < 1:
        fail(f"--val_share={args.val_share} is not between 0 and 1")
    if not 0 <= args.max_bad <= 1:
        fail(f"--max_bad={args.max_bad} is not between 0 and 1")
    if args.block_size < 1:
        fail(f"--block_size={args.block_size} is not positive")
    if min(args.num_samples, args.shard_tokens, args.workers) < 0:
        fail("--num_samples, --shard_tokens and --workers must not be negative")
    if os.path.basename(args.name) != args.name or args.name in ("", ".", ".."):
        fail(f"--name={args.name} is not the name of a folder in data/")
    return args


# -----------------------------------------------------------------------------
# dataset folders: begun, resumed, finished, overwritten


@dataclasses.dataclass
class State:
    """The state of a preparation, saved in preparing.json until the dataset is complete."""

    recipe: dict  # options and input: the same recipe gives the same files
    listing: str = ""  # hash of the list of input files, which can change on the Hub
    tokenizer: dict | None = None  # its description
    part: int = 0  # part of the corpus to resume in
    pieces: int = 0  # pieces of this part that are done
    counts: dict = dataclasses.field(default_factory=dict)  # corpus.counts when this part began
    documents: dict = dataclasses.field(default_factory=lambda: {"train": 0, "val": 0})  # number written
    tokens: dict = dataclasses.field(default_factory=lambda: {"train": 0, "val": 0})  # number written
    begins: bool = True  # a document begins with the next piece
    meta: dict | None = None  # the content of meta.json, once everything is written and only has to be renamed

    @classmethod
    def load(cls, folder):
        """Return the state saved in a folder; None if there is nothing to resume."""
        try:
            state = cls(**(read_json(os.path.join(folder, PREPARING)) or {}))
        except TypeError:  # other keys
            return None
        return state if state.meta or any(state.tokens.values()) else None

    def save(self, folder):
        write_json(os.path.join(folder, PREPARING), vars(self))


def write_dataset(folder, corpus, args):
    """Tokenize the documents of a corpus, Texts or Files, into a dataset folder."""
    write(folder, make_recipe(corpus, args), args.force, corpus.source, functools.partial(encode, folder, corpus, args))


def write(folder, recipe, force, source, encode):
    """Write a dataset folder. encode(state) writes .tmp files and returns what meta.json says about them.

    The previous dataset stays until the new one is complete. The same call resumes after an interruption.
    Raises ValueError if the folder contains another dataset and `force` is not set.
    """
    os.makedirs(folder, exist_ok=True)
    with FolderLock(folder):
        state = begin(folder, recipe, force)
        if state is None:
            return
        if state.meta is None:
            state.meta = encode(state) | {"source": source, "recipe": recipe}
        finish(folder, state)


def make_recipe(corpus, args):
    """Return all that the content of a dataset depends on."""
    names = ("tokenizer", "column", "format", "val_share", "num_samples", "shard_tokens")
    recipe = {name: getattr(args, name) for name in names} | {"inputs": corpus.identity}
    if os.path.exists(args.tokenizer) and args.tokenizer != "char":  # its content may change
        description = json.dumps(load_tokenizer(args.tokenizer).description)
        recipe["tokenizer"] += f" ({hashlib.sha256(description.encode()).hexdigest()[:8]})"
    if args.special_tokens:
        recipe["tokenizer"] += " --special_tokens"
    return recipe


def begin(folder, recipe, force):
    """Return the State to start from; None if the dataset is complete. Raise ValueError if it is another one."""
    state, meta = State.load(folder), read_json(os.path.join(folder, "meta.json")) or {}
    if state and state.recipe == recipe:
        print(f"resuming after {sum(state.tokens.values()):,} tokens")
        return state

    # overwrite another dataset only with --force
    exists = state or meta or glob.glob("*.bin", root_dir=folder)
    before = state.recipe if state else meta.get("recipe", {})
    if exists and before != recipe and not force:
        changed = [f"--{name}={value}" for name, value in before.items() if value != recipe.get(name)]
        changed = ["other input" if option.startswith("--inputs") else option for option in changed]
        how = f"prepared with {', '.join(changed)}" if changed else "from another program"
        raise ValueError(f"{folder} already contains a dataset {how}; use --force to overwrite")
    if state and state.meta:
        remove_others(folder, ())  # it is a mix of two datasets

    # do nothing if the dataset is complete and intact
    if meta and not force:
        try:
            n_train, n_val = (len(Dataset(folder).split(split)) for split in ("train", "val"))
            print(f"{folder} is complete: {n_train:,} + {n_val:,} tokens; use --force to prepare it again")
            return None
        except (OSError, ValueError) as e:
            print(for_terminal(f"preparing it again: {e}"))
    return State(recipe)


def finish(folder, state):
    """Rename the .tmp files that state.meta lists, and write meta.json. The next call finishes an interrupted one."""
    state.save(folder)
    files = state.meta["files"]
    for name in files:
        path = os.path.join(folder, os.path.basename(name))
        if os.path.exists(path + ".tmp"):
            os.replace(path + ".tmp", path)
        print(for_terminal(f"{path}: {files[name]['tokens']:,} tokens"))
    remove_others(folder, files)
    tokenizer = state.meta["tokenizer"]
    if tokenizer["kind"] == "char" and "extra" not in tokenizer:  # nanoGPT's scripts read the vocabulary from here
        characters = tokenizer["characters"]
        stoi = {c: i for i, c in enumerate(characters)}
        with open(os.path.join(folder, "meta.pkl"), "wb") as f:
            pickle.dump({"vocab_size": len(stoi), "itos": dict(enumerate(characters)), "stoi": stoi}, f)
    write_json(os.path.join(folder, "meta.json"), state.meta)
    os.remove(os.path.join(folder, PREPARING))


def remove_others(folder, names):
    """Remove the files of datasets from a folder, except those named."""
    for name in os.listdir(folder):
        if re.fullmatch(r"(.*_)?(train|val)(_\d+|_mask)?\.bin(\.tmp)?|meta\.(pkl|json)", name) and name not in names:
            os.remove(os.path.join(folder, name))


def write_json(path, content):
    """Write a JSON file atomically."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(content, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# from documents to batches of tokens

BATCH = 1 << 18  # characters that a thread tokenizes at once
LONG = 1 << 12  # a document is long if its validation part has at least this many characters


def fraction(text, i):
    """Return the i-th of two numbers from 0 to 1 that depend only on the text. Example: "abc", 0 -> 0.1701"""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
    return int.from_bytes(digest[8 * i : 8 * i + 8], "little") / 2**64


def split_of(text, val_share):
    """Choose the split of a text, "both" for a long one. Example: "abc", 0.1 -> "train" """
    if len(text) * min(val_share, 1 - val_share) >= LONG:
        return "both"
    return "val" if fraction(text, 0) < val_share else "train"


def read_after(corpus, state, limit):
    """Yield (piece, position) after `state`, until there are `limit` documents.

    position: {name: value} of the State to resume from after this piece
    """
    corpus.bytes_read, corpus.counts = 0, collections.Counter(state.counts)
    documents, done = sum(state.documents.values()), state.pieces
    for part in range(state.part, len(corpus.parts)):
        counts = dict(corpus.counts)
        for n, piece in enumerate(corpus.pieces(part), 1):
            if n > done:
                yield piece, {"part": part, "pieces": n, "counts": counts}
                documents += piece.ends
            if n >= done and documents >= limit:  # a resumed call stops here too
                return
        done = 0


def read(corpus, args, state, title):
    """Yield (piece, split, position) after `state`, as the args say, and show a progress bar."""
    unit = {"total": corpus.size(state.part), "unit": "B"}
    if args.num_samples:
        unit = {"total": args.num_samples, "initial": sum(state.documents.values()), "unit": " documents"}
    interval = 0.2 if sys.stderr.isatty() else 60  # seconds
    with tqdm(desc=title, unit_scale=True, mininterval=interval, **unit) as bar:
        for piece, position in read_after(corpus, state, args.num_samples or math.inf):
            yield piece, piece.split or split_of(piece.text, args.val_share), position
            bar.update(piece.ends if args.num_samples else corpus.bytes_read - bar.n)
    corpus.check(final=True)


def border_of(text, val_share):
    """Return where the last val_share of a text begins, before a space if one is near. Example: "a bc", 0.5 -> 1"""
    border = round(len(text) * (1 - val_share))
    space = text.rfind(" ", max(0, border - 1000), border)
    return space if space > 0 else border


def batches(pieces, state):
    """Group what read() yields into (position, [(piece, split, begins, ends)]).

    begins: whether the piece is the first of a document; ends: the splits that get an end of text after it
    """
    batch, size, begins, documents = [], 0, state.begins, collections.Counter(state.documents)
    for (piece, split, position), following in itertools.pairwise(itertools.chain(pieces, [None])):
        ends = [split] if piece.ends else []
        if split == "both":  # in train the end of text separates it from another document, if there is one
            ends = ["train", "val"] if following else ["val"]
        batch.append((piece, split, begins, ends))
        begins = bool(ends)
        documents["train" if split == "both" else split] += piece.ends
        size += len(piece.text)
        if size >= BATCH or following is None:
            yield position | {"begins": begins, "documents": dict(documents)}, batch
            batch, size = [], 0


def encode_batch(tokenizer, lengths, val_share, item):
    """Return (position, {split: ids (n,)}) of what batches() yields.

    A document in both splits is tokenized once. Its last ids are for validation: as many as the bytes of that part of
    the text have room for.
    lengths: bytes per token (vocab_size,)
    """
    position, batch = item
    end = tokenizer.encode("\n") if tokenizer.eot is None else [tokenizer.eot]
    parts = collections.defaultdict(list)
    encoded = tokenizer.encode_documents([piece.text for piece, *_ in batch])
    for (piece, split, begins, ends), ids in zip(batch, encoded, strict=True):
        ids_of = {split: ids}
        if split == "both":
            n_bytes = len(piece.text[border_of(piece.text, val_share) :].encode())
            n_val = np.searchsorted(np.cumsum(lengths[ids][::-1]), n_bytes, side="right")
            ids_of = {"train": ids[: len(ids) - n_val], "val": ids[len(ids) - n_val :]}
        for i, name in enumerate(ids_of):
            parts[name] += [tokenizer.bos if begins and i == 0 else [], ids_of[name], end if name in ends else []]
    return position, {split: np.concatenate(ids).astype(np.int64) for split, ids in parts.items()}


def in_order(function, items, workers):
    """Yield function(item) in order, while threads work on the next items."""
    with ThreadPoolExecutor(workers) as pool:
        futures = (pool.submit(function, item) for item in items)
        waiting = collections.deque(itertools.islice(futures, 2 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(itertools.islice(futures, 1))


# -----------------------------------------------------------------------------
# from batches to token files, with a tokenizer that may be learned from the text

SAVE_EVERY = 3  # seconds
BAD = {"bad rows": "left out", "bytes of bad rows": "left out", "undecodable bytes": "replaced", "NUL bytes": "kept"}
WORD = 1 << 12  # characters of the longest word to learn from; a million would take forever


def load_tokenizer(name, texts=None):
    """As from_name() of tokenizer.py, but `name` can be a dataset folder too."""
    meta = read_meta(name)
    return from_description(meta.get("tokenizer")) if meta else from_name(name, texts)


def sample_texts(corpus, args, size):
    """Yield texts to make a tokenizer from: about `size` characters for training, or for infinity all documents."""
    everything, wanted = size == math.inf, size
    share = 1 if args.num_samples else size / max(1, corpus.size())
    for piece, split, _ in read(corpus, args, State({}), f"reading for {args.tokenizer}"):
        text = piece.text
        if split == "both" and not everything:
            text, split = text[: border_of(text, args.val_share)], "train"
        if everything or split == "train" and fraction(text, 1) < share:
            size -= len(text)
            yield from (text[i : i + WORD] for i in range(0, len(text), WORD))
        if size < 0:  # compressed files have more characters than bytes
            break
    if size == wanted and not everything:  # no document is for training, but check_splits() will split their tokens
        yield from sample_texts(corpus, args, math.inf)


def encode(folder, corpus, args, state):
    """Write the tokens of all documents after `state` to .tmp files. Return the content of meta.json."""
    # start again if the files on the Hub have changed
    listing = hashlib.sha256(json.dumps(corpus.parts).encode()).hexdigest()
    if state.listing not in ("", listing):
        print("the files on the Hub have changed: starting again")
        state = State(state.recipe)
    state.listing = listing

    # load or learn the tokenizer
    if state.tokenizer is None:
        description = load_tokenizer(args.tokenizer, functools.partial(sample_texts, corpus, args)).description
        state.tokenizer = with_special_tokens(description, args.special_tokens)
    tokenizer = from_description(state.tokenizer)
    if tokenizer.eot is None and state.tokenizer["kind"] not in ("char", "symbols"):
        print(f"{args.tokenizer} has no end-of-text token: a newline ends each document")

    # write the tokens
    files = TokenFiles(folder, tokenizer.vocab_size, args.shard_tokens, state.tokens)
    if not files.recover():
        print("the unfinished files are corrupt: starting again")
        return encode(folder, corpus, args, State(state.recipe))
    write_documents(corpus, args, state, tokenizer, files)
    check_splits(corpus, args, state, files)

    left_out = {name: corpus.counts[name] for name in BAD if corpus.counts[name]}
    for name, n in left_out.items():
        hint = f" (first: {corpus.first_bad})" if name == "bad rows" and corpus.first_bad else ""
        print(for_terminal(f"{BAD[name]}: {n:,} {name}{hint}"))
    return describe(files, tokenizer, state.documents, left_out)


def describe(files, tokenizer, documents, left_out):
    """Return what meta.json says about finished TokenFiles."""
    files.sync()
    return {
        "vocab_size": tokenizer.vocab_size,
        "dtype": files.dtype.name,
        "tokenizer": tokenizer.description,
        "documents": documents,
        "left_out": left_out,
        "files": {name: {"tokens": n, "sha256": sha256_of(files.path(name))} for name, n in files.sizes().items()},
    }


def check_splits(corpus, args, state, files):
    """Split the tokens if one split has none; warn if val_share was missed. ValueError if there is no text."""
    if sum(state.tokens.values()) < 2:
        raise ValueError("the input contains no text")
    if 0 in state.tokens.values():
        if not corpus.by_share:
            raise ValueError(f"the input for {min(state.tokens, key=state.tokens.get)} contains no text")
        print("too few documents to split; using the last 10 % of the tokens for validation")
        files.split_last_tenth()
        state.documents = {}
    share = state.tokens["val"] / sum(state.tokens.values())
    if corpus.by_share and state.documents and not 0.5 < share / args.val_share < 1.5:
        reason = "documents are few or differ much in length"
        print(
            f"WARNING: {share:.1%} of the tokens are val, not --val_share={args.val_share}: {reason}", file=sys.stderr
        )


def write_documents(corpus, args, state, tokenizer, files):
    """Tokenize and write the documents after `state`; update it, and save it every SAVE_EVERY seconds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    tokenize = functools.partial(encode_batch, tokenizer, lengths, args.val_share)
    state.save(files.folder)
    saved = time.monotonic()
    with contextlib.closing(read(corpus, args, state, "preparing")) as pieces:
        for position, ids in in_order(tokenize, batches(pieces, state), args.workers or cores):
            for split in ids:
                files.write(split, ids[split])
            vars(state).update(position)
            if time.monotonic() - saved > SAVE_EVERY:
                files.sync()
                state.save(files.folder)
                saved = time.monotonic()


class TokenFiles:
    """The .tmp files of a dataset: one per split, or one per shard_tokens tokens.

    tokens: {split: number written}, kept up to date
    """

    def __init__(self, folder, vocab_size, shard_tokens, tokens):
        self.folder, self.tokens = folder, tokens
        self.sharded, self.longest = shard_tokens > 0, shard_tokens or 2**62
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")

    def name(self, split, i):
        return f"{split}_{i:06d}.bin" if self.sharded else f"{split}.bin"

    def path(self, name):
        return os.path.join(self.folder, name + ".tmp")

    def sizes(self):
        """Return {name: tokens}. Example: 5 in shards of 3 -> {"train_000000.bin": 3, "train_000001.bin": 2}"""
        sizes = {}
        for split, n in self.tokens.items():
            for i, start in enumerate(range(0, n, self.longest)):
                sizes[self.name(split, i)] = min(self.longest, n - start)
        return sizes

    def recover(self):
        """Cut off what was written after the last save. Return False if something before it is missing."""
        for name, n in self.sizes().items():
            path, size = self.path(name), n * self.dtype.itemsize
            if not os.path.exists(path) or os.path.getsize(path) < size:
                return False
            os.truncate(path, size)
        return True

    def write(self, split, ids):
        """Append ids (n,) to a split."""
        ids = np.ascontiguousarray(ids, "u1" if split.endswith("_mask") else self.dtype)
        while ids.size:
            i, offset = divmod(self.tokens[split], self.longest)
            part, ids = np.split(ids, [self.longest - offset])
            with open(self.path(self.name(split, i)), "ab" if offset else "wb") as f:
                f.write(part)
            self.tokens[split] += part.size

    def sync(self):
        """Wait until everything is on the disk."""
        for name in self.sizes():
            with open(self.path(name), "ab") as f:
                os.fsync(f.fileno())

    def split_last_tenth(self):
        """Move the last 10 % of the tokens to val, if only one split has any. After a kill, recover() may fail."""
        ids = np.concatenate([np.fromfile(self.path(name), self.dtype) for name in self.sizes()])
        start = max(1, len(ids) * 9 // 10)
        self.tokens.update(train=0, val=0)
        self.write("train", ids[:start])
        self.write("val", ids[start:])
