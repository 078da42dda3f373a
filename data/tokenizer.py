"""
Tokenizers: text to token ids and back.

A language model reads and writes integers. Its tokenizer says what they stand for: a character each (CharTokenizer),
or a sequence of bytes that is frequent in text, such as " the". Byte-pair encoding finds these by merging the most
frequent pair of neighbors into a new token, again and again. Such vocabularies are learned here (BytePairTokenizer) or
come with a library: tiktoken has OpenAI's, sentencepiece reads x.model files, and Hugging Face's tokenizers library
the tokenizer.json of most models.

from_name() makes a tokenizer from what a user types. Its description, a dict for JSON, is stored in datasets and
checkpoints, and from_description() makes the same tokenizer again: ids are never decoded with another one.
"""

import base64
import codecs
import contextlib
import functools
import itertools
import json
import math
import os
import re
import tempfile
from pathlib import Path

import numpy as np

GPT2 = {"kind": "tiktoken", "name": "gpt2"}
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # the text of an id without a token
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
HUB_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")  # the usual names, in this order
# the chat template of tokenizers that have none: <|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n ...
TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BPE_SAMPLE = 1 << 28  # characters of text that a vocabulary is learned from; more would change it little

# GPT-2's words, whose borders no token crosses (https://github.com/openai/gpt-2, src/encoder.py; ++ is only faster)
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# {character: byte}: byte-level tokenizers write printable bytes as themselves, the others as U+0100, U+0101, ...
# (GPT-2's src/encoder.py). Example: BYTES["A"] is 65, BYTES["\u0120"] is 32, the space
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTES = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}


class Tokenizer:
    """What all kinds have in common. Each of them adds:

    vocab_size          ids are 0 .. vocab_size - 1
    eot                 the id that ends a document, or None
    bos                 a list of the ids that begin a document, often empty
    special             the ids that stand for no text, such as those two
    special_tokens      whether they are recognized in documents and prompts; None (unknown): in prompts only
    description         a dict for from_description()
    encode(text)        an array of ids; special tokens in the text, such as <|endoftext|>, become their ids
    token_bytes(id)     the bytes of one token; those of U+FFFD if there is none
    hub_files()         {name: content} of the files that AutoTokenizer of transformers loads
    """

    bos, special, special_tokens = [], (), None

    def prompt(self, text):
        """Return the ids of a text to be continued."""
        return self.encode(text)

    def encode_documents(self, texts):
        """Return a list of arrays of ids. Special tokens are text, unless special_tokens is set."""
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        """Return the text of ids. Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def decode_stream(self, ids):
        """Yield the text of each id of an iterable as soon as its characters are complete."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.token_bytes(int(i)))
        yield decoder.decode(b"", final=True)

    @functools.cached_property
    def byte_lengths(self):
        """Return the bytes of text per token, (vocab_size,); special tokens have none."""
        return np.array([0 if i in self.special else len(self.token_bytes(i)) for i in range(self.vocab_size)])

    def count_bytes(self, inputs, targets):
        """Return how many bytes of text the targets stand for.

        inputs, targets: arrays of ids of one shape; each target is the token after its input, -1 is none.
        They are the bytes of the original text, so that tokenizers can be compared: the space that some add before a
        document, that is, after `eot` or `bos`, does not count.
        """
        # the last entry is for targets without a token: -1, and ids that only round up the vocabulary
        lengths = np.append(self.byte_lengths, 0)[np.minimum(targets, self.vocab_size)]
        # the first token of a document includes the space
        begins = np.isin(inputs, [i for i in (self.eot, *self.bos) if i is not None]) & (lengths > 0)
        return int(lengths.sum() - self.added_bytes * begins.sum())

    @functools.cached_property
    def added_bytes(self):
        """Return the number of bytes that encode() adds to a text: 1 for a space before it, else 0."""
        try:
            return max(0, int(self.byte_lengths[self.encode("a")].sum()) - len("a"))
        except ValueError:  # it has no token for "a"
            return 0

    def save_pretrained(self, folder):
        """Write the files for AutoTokenizer into a folder."""
        os.makedirs(folder, exist_ok=True)
        for name, content in self.hub_files().items():
            Path(folder, name).write_text(content, encoding="utf-8")


# -----------------------------------------------------------------------------
# the kinds


class CharTokenizer(Tokenizer):
    """One id per character, in the order given. There is no end-of-text token."""

    eot = None
    pattern = r"[\s\S]"  # what a token is; "." does not match a newline

    def __init__(self, characters):
        self.characters = "".join(characters)
        self.vocab_size = len(self.characters)
        self.description = {"kind": "char", "characters": self.characters}

        # the id of each code point, or -1; the last entry is for all larger ones
        code_points = [ord(c) for c in self.characters]
        self.ids = np.full(max(code_points) + 2, -1, dtype=np.int32)
        self.ids[code_points] = np.arange(self.vocab_size)

    def encode(self, text):
        code_points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
        ids = self.ids[np.minimum(code_points, len(self.ids) - 1)]
        if (ids < 0).any():
            unknown = sorted({text[i] for i in np.flatnonzero(ids < 0)})
            shown = " ".join(repr(c) for c in unknown[:8])
            raise ValueError(f"no token for {shown}; the tokenizer knows {self.characters[:100]!r}")
        return ids

    def token_bytes(self, i):
        return (self.characters[i] if i < self.vocab_size else UNKNOWN).encode(errors="replace")

    def hub_files(self):
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(self.characters)}))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(self.pattern), "isolated")
        tokenizer.decoder = decoders.Fuse()  # without spaces between the tokens
        return fast_tokenizer_files(tokenizer)


class SymbolTokenizer(CharTokenizer):
    """One id per symbol of any length, as in nanoGPT's meta.pkl. Encoding takes the longest matching symbol."""

    def __init__(self, symbols):
        self.characters, self.vocab_size = symbols, len(symbols)
        self.description = {"kind": "symbols", "symbols": symbols}
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        longest_first = sorted(filter(None, symbols), key=len, reverse=True)
        self.pattern = "|".join([*map(re.escape, longest_first), r"[\s\S]"])

    def encode(self, text):
        try:
            return np.array([self.ids[symbol] for symbol in re.findall(self.pattern, text)], dtype=np.int64)
        except KeyError as e:
            raise ValueError(f"no token for {e}; the tokenizer knows {' '.join(self.characters)[:100]!r}") from None


class TiktokenTokenizer(Tokenizer):
    """A byte-pair encoding of the tiktoken library, which downloads it once and keeps it in TIKTOKEN_CACHE_DIR."""

    def __init__(self, name):
        try:
            import tiktoken

            self.encoding = tiktoken.get_encoding(name)
        except Exception as e:  # no tiktoken, no network, a corrupt file, an unknown name
            hint = "connect to the network once, set TIKTOKEN_CACHE_DIR, or use --tokenizer=bpe:8192"
            raise ValueError(f"tiktoken cannot load {name} ({type(e).__name__}): {hint}") from None
        self.vocab_size, self.eot = self.encoding.n_vocab, self.encoding.eot_token
        self.description = {"kind": "tiktoken", "name": name}

    @property
    def special(self):
        return set(self.encoding._special_tokens.values())

    def encode(self, text, recognized=("<|endoftext|>",)):
        special = "all" if self.special_tokens else set(recognized)
        try:
            return self.encoding.encode_to_numpy(text, allowed_special=special, disallowed_special=())
        except ValueError:  # its regular expressions cannot match a million spaces
            middle = len(text) // 2
            return np.concatenate([self.encode(half, recognized) for half in (text[:middle], text[middle:])])

    def encode_documents(self, texts):
        return [self.encode(text, recognized=()) for text in texts]

    def token_bytes(self, i):
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:  # models pad their vocabulary, and some encodings skip ids
            return UNKNOWN.encode()

    def hub_files(self):
        from transformers.convert_slow_tokenizer import TikTokenConverter

        # special tokens are part of the vocabulary, so that they keep their ids
        special = self.encoding._special_tokens
        ranks = self.encoding._mergeable_ranks | {token.encode(): i for token, i in special.items()}
        converter = TikTokenConverter(pattern=self.encoding._pat_str, extra_special_tokens=special)
        converter.load_tiktoken_bpe = lambda _: ranks  # instead of from a file
        return fast_tokenizer_files(converter.converted(), bos_token="<|endoftext|>", eos_token="<|endoftext|>")


class BytePairTokenizer(TiktokenTokenizer):
    """A byte-pair encoding learned from text, and tiktoken as its encoder. ValueError if the vocabulary is corrupt.

    tokens: the tokens in the order in which they were learned, their bytes written as in BYTES. The next id is
    <|endoftext|>.
    """

    def __init__(self, tokens, pattern=WORDS):
        import tiktoken

        with as_value_error("the byte-pair vocabulary is corrupt"):
            ranks = {bytes(BYTES[c] for c in token): i for i, token in enumerate(tokens)}
            if len(ranks) < len(tokens) or not all(bytes([b]) in ranks for b in range(256)):
                raise ValueError("a token is missing or duplicate")
            special = {"<|endoftext|>": len(tokens)}
            self.encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.vocab_size, self.eot = self.encoding.n_vocab, self.encoding.eot_token
        self.description = {"kind": "bpe", "tokens": tokens, "pattern": pattern}

    @classmethod
    def train(cls, vocab_size, texts):
        """Learn at most vocab_size tokens, including <|endoftext|>, from an iterable of texts."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        if not 257 <= vocab_size <= 10**6:
            raise ValueError(f"bpe:{vocab_size}: the size must be from 257 (bytes and end of text) to 1000000")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits into GPT-2's words
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=sorted(BYTES), show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        vocab = tokenizer.get_vocab()
        if len(vocab) + 1 < vocab_size:
            print(f"bpe:{vocab_size}: learned {len(vocab) + 1:,} tokens: the text has no other frequent pairs")
        return cls(sorted(vocab, key=vocab.get))


class SentencePieceTokenizer(Tokenizer):
    """A model of the sentencepiece library. model: the content of its file in base64."""

    def __init__(self, model):
        with as_value_error("a SentencePiece model needs sentencepiece (pip install sentencepiece)"):
            import sentencepiece

        with as_value_error("not a SentencePiece model"):
            self.model = sentencepiece.SentencePieceProcessor()
            self.model.LoadFromSerializedProto(base64.b64decode(model))
        self.vocab_size = self.model.vocab_size()
        self.eot = self.model.eos_id() if self.model.eos_id() >= 0 else None
        self.special = {i for i in range(self.vocab_size) if self.model.is_control(i) or self.model.is_unknown(i)}
        self.description = {"kind": "sentencepiece", "model": model}

    def encode(self, text):
        return np.array(self.model.encode(text), dtype=np.int64)

    def decode(self, ids):
        return self.model.decode([int(i) for i in ids if i < self.vocab_size])

    def token_bytes(self, i):
        return piece_bytes(self.model.id_to_piece(i)) if i < self.vocab_size else UNKNOWN.encode()

    def hub_files(self):
        """Convert it to the tokenizers library. Texts with control tokens in them may get other ids there."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
        from tokenizers import Regex, decoders, normalizers
        from transformers.convert_slow_tokenizer import SpmConverter, generate_merges

        # the vocabulary, and for byte-pair encoding the merges, in the order of their scores
        proto = ModelProto.FromString(self.model.serialized_model_proto())
        if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
            vocab, merges = [(p.piece, p.score) for p in proto.pieces], None
        else:
            vocab = {p.piece: i for i, p in enumerate(proto.pieces)}
            merges = generate_merges(vocab, {p.piece: p.score for p in proto.pieces if p.type == p.NORMAL})
        tokenizer = SpmConverter.build_tokenizer_from_spm_proto(proto, vocab, merges)

        # how text is normalized, and restored
        rules = proto.normalizer_spec
        before, after = [], [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if rules.precompiled_charsmap:
            before += [normalizers.Precompiled(rules.precompiled_charsmap)]
        if rules.remove_extra_whitespaces:
            before += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        if rules.add_dummy_prefix:
            before += [normalizers.Prepend(SPACE)]
            after += [decoders.Strip(" ", 1, 0)]
        tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
        tokenizer.decoder = decoders.Sequence(after)
        end = {} if self.eot is None else {"eos_token": self.model.id_to_piece(self.eot)}
        return fast_tokenizer_files(tokenizer, **end)


class HubTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's libraries. files: {name: content} of those HUB_FILES that it has."""

    def __init__(self, files):
        from tokenizers import Tokenizer

        self.files = {name: files[name] for name in HUB_FILES if name in files}  # another name could be any path
        self.description = {"kind": "transformers", "files": self.files}
        with as_value_error("cannot parse tokenizer.json"):
            self.tokenizer = Tokenizer.from_str(files["tokenizer.json"])
            self.plain = Tokenizer.from_str(files["tokenizer.json"])
            eos = json.loads(files.get("tokenizer_config.json", "{}")).get("eos_token") or ""
            self.eot = self.tokenizer.token_to_id(eos["content"] if isinstance(eos, dict) else eos)
            added = self.tokenizer.get_added_tokens_decoder()
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        self.added = {i: token.content for i, token in added.items()}
        self.special = {i for i, token in added.items() if token.special} | {self.eot}
        self.byte_level = "ByteLevel" in repr(self.tokenizer.decoder)

        # plain takes special tokens as text
        self.plain.encode_special_tokens = True
        for tokenizer in (self.tokenizer, self.plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        with as_value_error("cannot use tokenizer.json"):
            self.bos = tokens_before(self.tokenizer)

    def encode(self, text):
        with as_value_error("the tokenizer cannot encode this text"):
            return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def prompt(self, text):
        if self.special_tokens is not False:
            return np.array([*self.bos, *self.encode(text)], dtype=np.int64)
        # as in text files, <|endoftext|> ends a document
        documents = text.split("<|endoftext|>") if self.eot is not None else [text]
        parts = [[*self.bos, *ids] for ids in self.encode_documents(documents)]
        return np.array(sum(([self.eot, *part] for part in parts[1:]), parts[0]), dtype=np.int64)

    def encode_documents(self, texts):
        tokenizer = self.tokenizer if self.special_tokens else self.plain
        with as_value_error("the tokenizer cannot encode this text"):
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids):
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self, i):
        token = self.tokenizer.id_to_token(i)
        if i in self.added or token is None:
            return self.added.get(i, UNKNOWN).encode()
        if self.byte_level:
            return bytes(BYTES.get(c, 0) for c in token)
        return piece_bytes(token)

    def hub_files(self):
        return self.files


class ExtendedTokenizer(Tokenizer):
    """Another tokenizer and extra tokens, whose ids come after its own. Text never becomes one of them."""

    def __init__(self, base, extra):
        self.base, self.extra, self.eot, self.bos = base, extra, base.eot, base.bos
        self.vocab_size = base.vocab_size + len(extra)
        self.special = {*base.special, *range(base.vocab_size, self.vocab_size)}
        self.encode, self.prompt, self.encode_documents = base.encode, base.prompt, base.encode_documents

    def decode(self, ids):
        # runs of extra ids and of others in turn: only the base can decode its own
        is_extra = range(self.base.vocab_size, self.vocab_size).__contains__
        runs = [(extra, list(run)) for extra, run in itertools.groupby(map(int, ids), is_extra)]
        return "".join(b"".join(map(self.token_bytes, run)).decode() if x else self.base.decode(run) for x, run in runs)

    def token_bytes(self, i):
        n = i - self.base.vocab_size
        return self.extra[n].encode() if 0 <= n < len(self.extra) else self.base.token_bytes(i)

    def hub_files(self):
        from tokenizers import AddedToken, Tokenizer

        files = self.base.hub_files()
        tokenizer = Tokenizer.from_str(files["tokenizer.json"])
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in self.extra])
        if [tokenizer.token_to_id(token) for token in self.extra] != list(range(self.base.vocab_size, self.vocab_size)):
            raise ValueError("cannot add turn tokens after the vocabulary, which skips ids; use another tokenizer")
        config = json.loads(files.get("tokenizer_config.json", "{}"))
        config = {"eos_token": self.extra[-1]} | {name: value for name, value in config.items() if value is not None}
        files |= {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config, indent=2)}
        return {"chat_template.jinja": CHATML} | files


def with_chat_template(tokenizer):
    """Return a tokenizer that has a chat template: its own, or ChatML, with new tokens if it lacks <|im_start|>."""
    if is_chat(tokenizer.description):
        return tokenizer
    description, extra = tokenizer.description, list(TURN_TOKENS)
    if isinstance(tokenizer, HubTokenizer):
        description = description | {"files": tokenizer.files | {"chat_template.jinja": CHATML}}
        extra = [] if set(extra) <= set(tokenizer.added.values()) else extra
    return from_description(description | ({"extra": extra} if extra else {}))


def is_chat(description):
    """Tell whether a tokenizer has a chat template. Example: {"kind": "char", "characters": "ab"} -> False"""
    files = (description or {}).get("files", {})
    in_config = json.loads(files.get("tokenizer_config.json") or "{}").get("chat_template")
    return bool("chat_template.jinja" in files or in_config or "extra" in (description or {}))


def tokens_before(tokenizer):
    """Return the ids that a tokenizer of the tokenizers library adds before a text, such as a beginning of text."""
    try:
        encoding = tokenizer.encode("a")
    except Exception:  # it has no token for "a"
        encoding = tokenizer.encode("")
    added = [sequence is None for sequence in encoding.sequence_ids] + [False]
    return encoding.ids[: added.index(False)]


@contextlib.contextmanager
def as_value_error(problem):
    """Turn every exception into ValueError: libraries raise many types, and Rust panics are not even Exceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as e:
        raise ValueError(f"{problem}: {str(e).strip() or type(e).__name__}") from None


def piece_bytes(piece):
    r"""Return the bytes of a SentencePiece token. Example: "<0x0A>" -> b"\n", "\u2581the" -> b" the" """
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()


def fast_tokenizer_files(tokenizer, **config):
    """Return {name: content} of the files that AutoTokenizer reads, for a tokenizer of the tokenizers library."""
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config, indent=2)}


# -----------------------------------------------------------------------------
# from a name or a description


def from_name(name, texts=None):
    """Return the tokenizer that a user names; ValueError if there is none.

        gpt2                  or another encoding of tiktoken
        char, bpe:8192        made from text: its characters, or this many tokens of byte-pair encoding
        x.model               a SentencePiece model
        x.json                a file of the tokenizers library
        x, owner/x            a model of transformers: its folder or its name on the Hub

    texts(n) yields the texts to make one from, a sample of about n characters, or for infinity all.
    """
    import tiktoken

    if name == "char":
        characters = {"\n"}  # ends documents
        for text in texts(math.inf):
            characters.update(text)
        return CharTokenizer(sorted(characters))
    if re.fullmatch(r"bpe:\d+", name):
        return BytePairTokenizer.train(int(name[4:]), texts(BPE_SAMPLE))
    if name in tiktoken.list_encoding_names():
        return TiktokenTokenizer(name)
    if os.path.isfile(name):
        return from_file(name)
    description = from_hub(name)
    if description:
        return from_description(description)
    known = f"char, bpe:8192, {', '.join(tiktoken.list_encoding_names())}"
    raise ValueError(f"no tokenizer {name}: use {known}, a tokenizer.json, a .model, a model's folder or Hub name")


def from_file(path):
    """Return the tokenizer in a SentencePiece .model, or in a tokenizer.json and the files next to it."""
    with as_value_error(path):
        if path.endswith(".model"):
            return SentencePieceTokenizer(base64.b64encode(Path(path).read_bytes()).decode())
        # a folder with this file, and those next to it that tell what kind it is
        files = read_files(os.path.dirname(path), (*HUB_FILES, "config.json"))
        files["tokenizer.json"] = Path(path).read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_text(content, encoding="utf-8")
            return from_folder(folder)


def from_hub(name):
    """Return the description of the tokenizer of a transformers folder or Hub name, or None. ValueError if corrupt."""
    if name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        return GPT2
    from huggingface_hub import snapshot_download

    try:
        older = ("config.json", "vocab.json", "merges.txt", "tokenizer.model")
        folder = name if os.path.isdir(name) else snapshot_download(name, allow_patterns=[*HUB_FILES, *older])
    except Exception:  # the library raises many types
        return None
    tokenizer = from_folder(folder)
    return tokenizer and tokenizer.description


def from_folder(folder):
    """Return the tokenizer of a transformers folder, or None. Its end of text is written to tokenizer_config.json."""
    from transformers import AutoTokenizer

    # the library finds the end-of-text token, and reads older formats; code in the folder does not run
    files, end = read_files(folder, HUB_FILES), None
    tokenizer = HubTokenizer(files) if "tokenizer.json" in files else None
    try:
        library = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        end = library.eos_token
        if tokenizer is None:
            with tempfile.TemporaryDirectory() as converted:
                library.save_pretrained(converted)
                files = read_files(converted, HUB_FILES)
            tokenizer = HubTokenizer(files)
    except Exception:  # it raises many types, also for a tokenizer.json with a class of its own
        if tokenizer is None:
            return None

    # nothing names it: guess by the usual names
    config = json.loads(files.get("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}'))
    if not end and "eos_token" not in config:
        end = next((token for token in END_TOKENS if token in tokenizer.added.values()), None)
    if "tokenizer_config.json" in files and (not end or tokenizer.tokenizer.token_to_id(end) == tokenizer.eot):
        return tokenizer
    return HubTokenizer(files | {"tokenizer_config.json": json.dumps(config | {"eos_token": end})})


def read_files(folder, names):
    """Return {name: content} of those files that a folder has."""
    paths = {name: Path(folder, name) for name in names}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.exists()}


def from_description(description):
    """Return the tokenizer of a description. Example: {"kind": "char", "characters": "ab"} -> CharTokenizer("ab")"""
    kinds = {
        "char": CharTokenizer,
        "symbols": SymbolTokenizer,
        "tiktoken": TiktokenTokenizer,
        "bpe": BytePairTokenizer,
        "sentencepiece": SentencePieceTokenizer,
        "transformers": HubTokenizer,
    }
    try:
        arguments = dict(description)
        special_tokens, extra = arguments.pop("special_tokens", None), arguments.pop("extra", None)
        tokenizer = kinds[arguments.pop("kind")](**arguments)
    except (KeyError, TypeError):
        raise ValueError(f"unknown tokenizer description: {str(description)[:80]}") from None
    tokenizer.special_tokens = special_tokens
    if extra:
        tokenizer = ExtendedTokenizer(tokenizer, extra)
    tokenizer.description = description
    return tokenizer


def assumed_tokenizer(vocab_size):
    """Return the description to assume where nothing names the tokenizer: GPT-2's, or None if vocab_size is another.

    Example: None (unknown) -> GPT2, 50257 -> GPT2, 50304 (rounded up) -> GPT2, 65 -> None
    """
    return GPT2 if vocab_size in (None, 50257, 50304) else None


def with_special_tokens(description, recognized):
    """Return a description that records whether special tokens in documents and prompts are recognized.

    It is not recorded where it makes no difference. Example: GPT2, False -> GPT2
    """
    if recognized and description["kind"] not in ("tiktoken", "bpe", "transformers"):
        raise ValueError(f"--special_tokens: a {description['kind']} tokenizer recognizes none")
    if recognized or description["kind"] == "transformers":
        return {"special_tokens": recognized} | description
    return description


def same_tokens(a, b):
    """Tell whether the ids of two descriptions stand for the same bytes.

    Example: {"kind": "char", "characters": "ab"}, {"kind": "char", "characters": "ba"} -> False
    """
    if a == b:
        return True
    a, b = from_description(a), from_description(b)
    return a.vocab_size == b.vocab_size and all(a.token_bytes(i) == b.token_bytes(i) for i in range(a.vocab_size))


def match_tokenizers(model, dataset, folder):
    """Return the description of the tokenizer to train with, from those of a model and of a dataset, or None.

    It is the dataset's if that adds a chat template, else the model's, which then recognizes special tokens as the
    dataset's does. ValueError if the same id stands for different bytes.
    """
    if not (model and dataset):
        return model or dataset
    plain = {name: value for name, value in dataset.items() if name != "extra"}
    if not same_tokens(model, dataset) and ("extra" in model or not same_tokens(model, plain)):
        raise ValueError(
            f"{folder} was prepared with another tokenizer: export the model's with sample.py "
            "--export=x, then python data/text/prepare.py ... --tokenizer=x"
        )
    if is_chat(dataset):
        return dataset
    # encode prompts as the documents were
    return model | {name: dataset[name] for name in ("special_tokens",) if name in dataset}


def prompt_ids(tokenizer, text, vocab_size):
    """Return a prompt as a list of ids, end of text if it is empty. ValueError if a model of vocab_size lacks them.

    Example: CharTokenizer("abc"), "cab", 3 -> [2, 0, 1]
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the prompt is not UTF-8 text: {text[:80]!r}") from None
    ids = tokenizer.prompt(text).tolist()
    if not ids and tokenizer.eot is None:
        raise ValueError("the prompt is empty: it needs at least one character")
    ids = ids or [tokenizer.eot]
    if max(ids) >= vocab_size:
        raise ValueError(f"the prompt has token id {max(ids)}, but the model's vocabulary ends at {vocab_size - 1}")
    return ids


def for_terminal(text):
    r"""Replace control characters, which could move the cursor or worse. Example: "a\x1b[2Jb" -> "a\ufffd[2Jb" """
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", UNKNOWN, text)
