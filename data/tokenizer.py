"""
What the tokens are: text to token ids and back. Every tokenizer here has

    vocab_size              ids are 0 .. vocab_size - 1
    eot                     the id that ends a document, or None
    encode(text)            array of ids; ValueError names characters that it has no token for
    prompt(text)            the same for a text to be continued: some models want a token before it
    encode_documents(texts) a list of arrays; special tokens that a document spells out are text like any other
    token_bytes(id)         the bytes of one token; decode(ids) joins them to text
    description             a dict for JSON that from_description() turns back into the tokenizer
    save_pretrained(folder) write the files from which AutoTokenizer of transformers makes the same tokenizer

The description is what datasets and checkpoints store, so text is never decoded with another tokenizer.
"""

import base64
import codecs
import json
import os
import re
import tempfile

import numpy as np


class Tokenizer:
    def prompt(self, text):
        return self.encode(text)

    def encode_documents(self, texts):
        return [self.encode(text) for text in texts]

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


def byte_level(pattern):
    """The pre-tokenizer, for the tokenizers library, of words of a pattern in the bytes that they are written in."""
    from tokenizers import Regex, pre_tokenizers

    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


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

    def encode_documents(self, texts):
        return [self.encode_plain(text) for text in texts]

    def encode_plain(self, text):
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # a run of a million spaces is too much for its regular expressions
            middle = len(text) // 2
            return np.concatenate([self.encode_plain(text[:middle]), self.encode_plain(text[middle:])])

    def token_bytes(self, i):
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:  # a model's vocabulary may be padded past the tokenizer's, and some encodings have gaps
            return "\N{REPLACEMENT CHARACTER}".encode()

    def hub_files(self):
        from tokenizers import AddedToken, Tokenizer, decoders, models
        from transformers.convert_slow_tokenizer import TikTokenConverter

        class Converter(TikTokenConverter):
            load_tiktoken_bpe = staticmethod(lambda ranks: ranks)  # no need for a file of them

        encoding = self.encoding
        vocab, merges = Converter().extract_vocab_merges_from_model(encoding._mergeable_ranks)
        # special tokens stand in the vocabulary itself, so that they keep their ids where those have gaps
        tokenizer = Tokenizer(models.BPE(vocab | encoding._special_tokens, merges, ignore_merges=True))
        tokenizer.pre_tokenizer = byte_level(encoding._pat_str)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in encoding._special_tokens])
        return hub_files(tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


# Byte-level BPE writes each byte as one printable character: those that are printable as themselves, the others from
# U+0100 on (https://github.com/openai/gpt-2/blob/master/src/encoder.py)
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in PRINTABLE}
BYTES |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's
# GPT-2's rule for where words begin: no token crosses such a border (https://github.com/openai/gpt-2, src/encoder.py;
# each run is written possessively, which finds the same words faster)
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class BytePairTokenizer(TiktokenTokenizer):
    """Byte-pair encoding of a vocabulary of one's own. tokens: the bytes of each id, in the order in which pairs are
    merged, written in the printable characters of BYTES; <|endoftext|> follows behind them. ValueError if that is no
    vocabulary."""

    def __init__(self, tokens, pattern=WORDS):
        import tiktoken

        try:
            ranks = {bytes(BYTES[c] for c in token): i for i, token in enumerate(tokens)}
            if len(ranks) < len(tokens) or not ranks.keys() >= {bytes([b]) for b in range(256)}:
                raise ValueError("tokens are missing or come twice")
            end = {"<|endoftext|>": len(tokens)}
            self.encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=end)
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"this byte-pair vocabulary is damaged: {e}") from None
        self.vocab_size, self.eot = len(tokens) + 1, len(tokens)
        self.description = {"kind": "bpe", "tokens": tokens, "pattern": pattern}

    @classmethod
    def train(cls, vocab_size, texts):
        """Learn vocab_size tokens at most, end of text among them, from an iterable of texts."""
        from tokenizers import Tokenizer, models, trainers

        learner = Tokenizer(models.BPE())
        learner.pre_tokenizer = byte_level(WORDS)
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=sorted(BYTES), show_progress=False)
        learner.train_from_iterator(texts, trainer)
        vocab = learner.get_vocab()
        return cls(sorted(vocab, key=vocab.get))


class SentencePieceTokenizer(Tokenizer):
    """A model of the sentencepiece library. model: the bytes of its file in base64. ValueError if it is none."""

    def __init__(self, model):
        try:
            import sentencepiece
        except ImportError:
            raise ValueError("a SentencePiece model needs its library: pip install sentencepiece") from None
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(model, validate=True))
            self.vocab_size = self.model.vocab_size() if self.model.serialized_model_proto() else 0
            if not self.vocab_size:
                raise ValueError("it is empty")
        except Exception as e:  # RuntimeError of its parser, binascii.Error
            raise ValueError(f"this is no SentencePiece model: {e}") from None
        self.eot = self.model.eos_id() if self.model.eos_id() >= 0 else None
        self.description = {"kind": "sentencepiece", "model": model}

    def encode(self, text):
        return np.array(self.model.encode(text), dtype=np.int64)

    def encode_documents(self, texts):
        return [np.array(ids, dtype=np.int64) for ids in self.model.encode(texts, num_threads=1)]

    def decode(self, ids):
        return self.model.decode([int(i) for i in ids if i < self.vocab_size])

    def token_bytes(self, i):
        if i >= self.vocab_size:
            return "\N{REPLACEMENT CHARACTER}".encode()
        piece = self.model.id_to_piece(i)
        if self.model.is_byte(i):
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        return piece.replace(SPACE, " ").encode()

    def hub_files(self):
        """The same in terms of the tokenizers library. Texts that spell out a control token may come out otherwise."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers

        proto = ModelProto.FromString(self.model.serialized_model_proto())
        rules, unknown, pieces = proto.normalizer_spec, proto.trainer_spec.unk_id, [p.piece for p in proto.pieces]
        if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
            scores = [(p.piece, p.score) for p in proto.pieces]
            model = models.Unigram(scores, unk_id=unknown, byte_fallback=proto.trainer_spec.byte_fallback)
        else:
            ids, merges = {piece: i for i, piece in enumerate(pieces)}, []
            for p in sorted((p for p in proto.pieces if p.type == p.NORMAL), key=lambda p: -p.score):
                pairs = [(p.piece[:k], p.piece[k:]) for k in range(1, len(p.piece))]
                pairs = [(a, b) for a, b in pairs if a in ids and b in ids]
                merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
            fallback = dict(fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback)
            model = models.BPE(ids, merges, unk_token=pieces[unknown], **fallback)
        before = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
        before += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")] * rules.remove_extra_whitespaces
        before += [normalizers.Prepend(SPACE)] * rules.add_dummy_prefix + [normalizers.Replace(" ", SPACE)]
        after = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        after += [decoders.Strip(" ", 1, 0)] * rules.add_dummy_prefix
        tokenizer = Tokenizer(model)
        tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(before), decoders.Sequence(after)
        return hub_files(tokenizer, **({} if self.eot is None else {"eos_token": pieces[self.eot]}))


HUB_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class HubTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's libraries, from the texts of its files: tokenizer.json and tokenizer_config.json at
    least. ValueError where they cannot be understood."""

    def __init__(self, files):
        from tokenizers import Tokenizer

        files = {name: files[name] for name in HUB_FILES if isinstance(files.get(name), str)}  # and no other paths
        try:
            self.tokenizer, self.plain = (Tokenizer.from_str(files["tokenizer.json"]) for _ in range(2))
            ends = json.loads(files.get("tokenizer_config.json", "{}")).get("eos_token")
            ends = ends["content"] if isinstance(ends, dict) else ends
            described = json.loads(files["tokenizer.json"])
            self.added = {token["id"]: token["content"].encode() for token in described.get("added_tokens", [])}
            self.eot = self.tokenizer.token_to_id(ends or "")
        except Exception as e:  # the library raises Exception itself
            raise ValueError(f"tokenizer.json is not understood: {e}") from None
        self.plain.encode_special_tokens = True  # as text
        for tokenizer in (self.tokenizer, self.plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self.files, self.description = files, {"kind": "transformers", "files": files}
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.byte_level = "ByteLevel" in json.dumps(described.get("decoder"))

    def encode(self, text):
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_documents(self, texts):
        try:
            encoded = self.plain.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as e:  # the library raises Exception itself
            raise ValueError(f"the tokenizer cannot spell this text: {e}") from None
        return [np.array(e.ids, np.int64) for e in encoded]

    def prompt(self, text):
        return np.array(self.tokenizer.encode(text).ids, dtype=np.int64)

    def decode(self, ids):
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self, i):
        token = self.tokenizer.id_to_token(i)
        if i in self.added or token is None:
            return self.added.get(i, "\N{REPLACEMENT CHARACTER}".encode())
        if self.byte_level:
            return bytes(BYTES.get(character, 0) for character in token)
        if len(token) == 6 and token.startswith("<0x"):  # SentencePiece's bytes
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()

    def hub_files(self):
        return self.files


BPE_SAMPLE = 2**28  # bytes of text that a vocabulary is learned from: more changes little, and costs time and memory


def from_name(name, texts=None):
    """The tokenizer of this name:

        gpt2                  or another encoding of tiktoken
        char, bpe:8192        made from a text: its characters, or byte-pair encoding with as many tokens
        x/tokenizer.json      a file of the tokenizers library
        x.model               a SentencePiece model
        data/x                the tokenizer of that dataset
        x, owner/x            that of a model of transformers, a folder or a Hub name

    texts(n) iterates over texts to make one from, a sample of n bytes of them, or all for None. ValueError when there
    is no such tokenizer."""
    if name == "char" or name.startswith("bpe:"):
        if texts is None:
            raise ValueError(f"{name} is made from a text: it needs one")
        if name == "char":
            characters = {"\n"}  # ends documents
            for text in texts(None):
                characters.update(text)
            return CharTokenizer(sorted(characters))
        if not re.fullmatch(r"bpe:\d{3,7}", name) or not 257 <= int(name[4:]) <= 10**6:
            raise ValueError(f"{name}: bpe:N takes a number of tokens from 257, bytes and end of text, to 1000000")
        return BytePairTokenizer.train(int(name[4:]), texts(BPE_SAMPLE))
    import tiktoken

    from data.shards import read_meta

    if name in tiktoken.list_encoding_names():
        return TiktokenTokenizer(name)
    try:
        if any(os.path.isfile(os.path.join(name, meta)) for meta in ("meta.json", "meta.pkl")):
            return from_description(read_meta(name).get("tokenizer"))
        if os.path.isfile(name) and name.endswith(".model"):
            with open(name, "rb") as f:
                return SentencePieceTokenizer(base64.b64encode(f.read()).decode())
        if os.path.isfile(name):
            with open(name, encoding="utf-8") as f:
                files = read_texts(os.path.dirname(name), HUB_FILES) | {"tokenizer.json": f.read()}
            return HubTokenizer({"tokenizer_config.json": guess_config(files["tokenizer.json"]), **files})
    except Exception as e:  # files can hold anything
        raise ValueError(f"{name} holds no tokenizer ({e or type(e).__name__})") from None
    if description := from_hub(name):
        return from_description(description)
    raise ValueError(
        f"no tokenizer {name}, nor does the Hugging Face Hub give one: char, bpe:8192, "
        f"{', '.join(tiktoken.list_encoding_names())}, a tokenizer.json, a SentencePiece .model, the folder of a "
        "dataset or of a model, or a Hub name is wanted"
    )


def guess_config(tokenizer_json):
    """tokenizer_config.json for a tokenizer.json that comes without: it names the token that ends a document."""
    known = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")
    added = {token["content"] for token in json.loads(tokenizer_json).get("added_tokens", [])}
    ends = [token for token in known if token in added]
    return json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | ({"eos_token": ends[0]} if ends else {}))


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
                # by default it asks whether it may run code from there, and does
                AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(converted)
                files = read_texts(converted, HUB_FILES)
    except Exception:  # whatever it is that the libraries lack where there is no tokenizer
        return None
    return HubTokenizer(files).description


def prompt_ids(tokenizer, text, vocab_size):
    """The ids with which a model of so many tokens begins to continue a text, as a list: where that is empty, the end
    of the text before it. ValueError if there are none, or the model does not know them."""
    ids = tokenizer.prompt(text).tolist()
    if not ids and tokenizer.eot is None:
        raise ValueError("the prompt is empty: at least one character is wanted")
    ids = ids or [tokenizer.eot]
    if max(ids) >= vocab_size:
        raise ValueError(f"the prompt has tokens past the model's vocabulary of {vocab_size}")
    return ids


def for_terminal(text):
    """A text without the control characters that would move a terminal's cursor, or worse."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


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
        "char": (CharTokenizer, {"characters": str}),
        "tiktoken": (TiktokenTokenizer, {"name": str}),
        "bpe": (BytePairTokenizer, {"tokens": list, "pattern": str}),
        "sentencepiece": (SentencePieceTokenizer, {"model": str}),
        "transformers": (HubTokenizer, {"files": dict}),
    }
    if isinstance(description, dict) and str(description.get("kind")) in kinds:
        tokenizer, fields = kinds[description["kind"]]
        if all(isinstance(description.get(field), kind) for field, kind in fields.items()):
            return tokenizer(**{field: description[field] for field in fields})
    raise ValueError(f"this describes no tokenizer known here: {str(description)[:80]}")
