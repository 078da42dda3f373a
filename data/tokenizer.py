"""
What the tokens are: text to token ids and back. Every tokenizer here has

    vocab_size              ids are 0 .. vocab_size - 1
    eot                     the id that ends a document, or None
    encode(text)            array of ids; ValueError names characters that it has no token for
    prompt(text)            the same for a text to be continued: some models want a token before it
    token_bytes(id)         the bytes of one token; decode(ids) joins them to text
    description             a dict for JSON that from_description() turns back into the tokenizer
    save_pretrained(folder) write the files from which AutoTokenizer of transformers makes the same tokenizer

The description is what datasets and checkpoints store, so text is never decoded with another tokenizer.
"""

import codecs
import json
import os
import tempfile

import numpy as np


class Tokenizer:
    def prompt(self, text):
        return self.encode(text)

    def decode(self, ids):
        """Token ids to text. Bytes that are no UTF-8, as half a character at the end, become U+FFFD."""
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def decode_stream(self, ids):
        """Yield the text of each id of an iterable as it comes; a character is held back until it is complete."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.token_bytes(int(i)))
        yield decoder.decode(b"", final=True)

    def byte_lengths(self):
        """How many bytes of text each id stands for, (vocab_size,): losses per token become bits per byte with it."""
        return np.array([len(self.token_bytes(i)) for i in range(self.vocab_size)])

    def save_pretrained(self, folder):
        os.makedirs(folder, exist_ok=True)
        for name, text in self.hub_files().items():
            with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
                f.write(text)


def hub_files(tokenizer, **config):
    """{name: content} of the files that AutoTokenizer reads, for a tokenizer of the tokenizers library."""
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config, indent=2)}


class CharTokenizer(Tokenizer):
    """One id a character, in the order given. No end-of-text token."""

    eot = None

    def __init__(self, characters):
        """characters: a string or a list of one-character strings, all different. ValueError otherwise."""
        self.characters = list(characters)
        if not self.characters or any(not isinstance(c, str) or len(c) != 1 for c in self.characters):
            raise ValueError("a character tokenizer needs single characters")
        if len(set(self.characters)) != len(self.characters):
            raise ValueError("a character tokenizer's characters must all be different")
        self.vocab_size = len(self.characters)
        self.description = {"kind": "char", "characters": "".join(self.characters)}
        points = [ord(c) for c in self.characters]
        self.table = np.full(max(points) + 2, -1, dtype=np.int32)  # code point to id; the last entry is for all beyond
        self.table[points] = np.arange(self.vocab_size)

    def encode(self, text):
        points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
        ids = self.table[np.minimum(points, len(self.table) - 1)]
        if (ids < 0).any():
            lacking = sorted({text[i] for i in np.flatnonzero(ids < 0)})
            shown = " ".join(repr(c) for c in lacking[:8]) + (" ..." if len(lacking) > 8 else "")
            known = "".join(self.characters[:100]) + ("..." if self.vocab_size > 100 else "")
            raise ValueError(f"no token for {shown}; the tokenizer knows {known!r}")
        return ids

    def token_bytes(self, i):
        return (self.characters[i] if i < self.vocab_size else "\N{REPLACEMENT CHARACTER}").encode(errors="replace")

    def hub_files(self):
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(self.characters)}))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # a dot is no newline
        tokenizer.decoder = decoders.Fuse()  # without spaces between
        return hub_files(tokenizer)


class TiktokenTokenizer(Tokenizer):
    """A byte-pair encoding of the tiktoken library by its name, gpt2 for example. The library downloads the
    vocabulary once; TIKTOKEN_CACHE_DIR names the folder that it keeps it in."""

    def __init__(self, name):
        try:
            import tiktoken
        except ImportError:
            raise ValueError(f"the {name} tokenizer needs tiktoken: pip install tiktoken") from None
        if name not in tiktoken.list_encoding_names():
            raise ValueError(f"tiktoken has no encoding {name}; it has {', '.join(tiktoken.list_encoding_names())}")
        try:
            self.encoding = tiktoken.get_encoding(name)
        except Exception as e:  # requests raises its own errors, a damaged cache a ValueError
            raise ValueError(
                f"the vocabulary of {name} cannot be loaded ({type(e).__name__}): connect to the network once, "
                "or set TIKTOKEN_CACHE_DIR to a folder that has it"
            ) from None
        self.vocab_size = self.encoding.n_vocab
        self.eot = self.encoding.eot_token
        self.description = {"kind": "tiktoken", "name": name}

    def encode(self, text):
        """Ids of a text; <|endoftext|> in it is the token of that name."""
        return np.array(self.encoding.encode(text, allowed_special={"<|endoftext|>"}, disallowed_special=()))

    def token_bytes(self, i):
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:  # a model's vocabulary may be padded past the tokenizer's, and some encodings have gaps
            return "\N{REPLACEMENT CHARACTER}".encode()

    def hub_files(self):
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers.convert_slow_tokenizer import TikTokenConverter

        class Converter(TikTokenConverter):
            load_tiktoken_bpe = staticmethod(lambda ranks: ranks)  # no need for a file of them

        encoding = self.encoding
        vocab, merges = Converter().extract_vocab_merges_from_model(encoding._mergeable_ranks)
        # special tokens stand in the vocabulary itself, so that they keep their ids where those have gaps
        tokenizer = Tokenizer(models.BPE(vocab | encoding._special_tokens, merges, ignore_merges=True))
        words = pre_tokenizers.Split(Regex(encoding._pat_str), "isolated")
        raw_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, raw_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in encoding._special_tokens])
        return hub_files(tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


HUB_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class HubTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's libraries, from the texts of its files: tokenizer.json and tokenizer_config.json at
    least. ValueError where they cannot be understood."""

    def __init__(self, files):
        from tokenizers import Tokenizer

        files = {name: files[name] for name in HUB_FILES if isinstance(files.get(name), str)}  # and no other paths
        try:
            self.tokenizer = Tokenizer.from_str(files["tokenizer.json"])
            ends = json.loads(files.get("tokenizer_config.json", "{}")).get("eos_token")
            described = json.loads(files["tokenizer.json"])
        except Exception as e:  # the library raises Exception itself
            raise ValueError(f"tokenizer.json is not understood: {e}") from None
        self.files, self.description = files, {"kind": "transformers", "files": files}
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eot = self.tokenizer.token_to_id(ends["content"] if isinstance(ends, dict) else ends or "")
        self.added = {token["id"]: token["content"].encode() for token in described.get("added_tokens", [])}
        self.byte_level = "ByteLevel" in json.dumps(described.get("decoder"))

    def encode(self, text):
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def prompt(self, text):
        return np.array(self.tokenizer.encode(text).ids, dtype=np.int64)

    def decode(self, ids):
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self, i):
        token = self.tokenizer.id_to_token(i)
        if i in self.added or token is None:
            return self.added.get(i, "\N{REPLACEMENT CHARACTER}".encode())
        if self.byte_level:
            return bytes(BYTES[character] for character in token)
        if len(token) == 6 and token.startswith("<0x"):  # SentencePiece's bytes
            return bytes([int(token[3:5], 16)])
        return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def hub_files(self):
        return self.files


# Byte-level BPE writes each byte as one printable character: those that are printable as themselves, the others from
# U+0100 on (https://github.com/openai/gpt-2/blob/master/src/encoder.py)
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in PRINTABLE}
BYTES |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}


def from_name(name):
    """The tokenizer of this name: an encoding of tiktoken, or what a model of transformers has, by its folder or Hub
    name. ValueError when there is none."""
    import tiktoken

    if name in tiktoken.list_encoding_names():
        return TiktokenTokenizer(name)
    if description := from_hub(name):
        return from_description(description)
    raise ValueError(f"no tokenizer {name}: gpt2, another encoding of tiktoken, a model's folder or Hub name is wanted")


def from_hub(name):
    """The description of the tokenizer of a model of transformers, a folder or a Hub name; None if it has none.
    ValueError if it is damaged."""
    if name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        return {"kind": "tiktoken", "name": "gpt2"}
    from huggingface_hub import snapshot_download
    from transformers import AutoTokenizer

    try:
        older = ("config.json", "vocab.json", "merges.txt", "tokenizer.model")
        folder = name if os.path.isdir(name) else snapshot_download(name, allow_patterns=[*HUB_FILES, *older])
        files = read_texts(folder, HUB_FILES)
        if "tokenizer.json" not in files:
            with tempfile.TemporaryDirectory() as converted:
                AutoTokenizer.from_pretrained(folder).save_pretrained(converted)
                files = read_texts(converted, HUB_FILES)
    except Exception:  # whatever it is that the libraries lack where there is no tokenizer
        return None
    return HubTokenizer(files).description


def read_texts(folder, names):
    """{name: content} of those of the files that are there."""
    texts = {}
    for name in names:
        if os.path.exists(os.path.join(folder, name)):
            with open(os.path.join(folder, name), encoding="utf-8") as f:
                texts[name] = f.read()
    return texts


def same_tokens(a, b):
    """Whether the ids of two tokenizers, given by their descriptions, mean the same. ValueError as above."""
    if a == b:
        return True
    a, b = from_description(a), from_description(b)
    return a.vocab_size == b.vocab_size and all(a.token_bytes(i) == b.token_bytes(i) for i in range(a.vocab_size))


def from_description(description):
    """The tokenizer that a description stands for. ValueError for one that is not understood."""
    kinds = {
        "char": (CharTokenizer, "characters", str),
        "tiktoken": (TiktokenTokenizer, "name", str),
        "transformers": (HubTokenizer, "files", dict),
    }
    if isinstance(description, dict) and str(description.get("kind")) in kinds:
        tokenizer, field, kind = kinds[description["kind"]]
        if isinstance(description.get(field), kind):
            return tokenizer(description[field])
    raise ValueError(f"this describes no tokenizer known here: {str(description)[:80]}")
