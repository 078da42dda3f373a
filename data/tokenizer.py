"""
What the tokens are: text to token ids and back. Every tokenizer here has

    vocab_size              ids are 0 .. vocab_size - 1
    eot                     the id that ends a document, or None
    encode(text)            array of ids; ValueError names characters that it has no token for
    token_bytes(id)         the bytes of one token; decode(ids) joins them to text
    description             a dict for JSON that from_description() turns back into the tokenizer

The description is what datasets and checkpoints store, so text is never decoded with another tokenizer.
"""

import codecs

import numpy as np


class Tokenizer:
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


def from_description(description):
    """The tokenizer that a description stands for. ValueError for one that is not understood."""
    kinds = {"char": (CharTokenizer, "characters"), "tiktoken": (TiktokenTokenizer, "name")}
    if isinstance(description, dict) and str(description.get("kind")) in kinds:
        tokenizer, field = kinds[description["kind"]]
        if isinstance(description.get(field), str):
            return tokenizer(description[field])
    raise ValueError(f"this describes no tokenizer known here: {str(description)[:80]}")
