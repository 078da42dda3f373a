"""
Prepare the works of Shakespeare (tiny Shakespeare, 1.1 MB) as a character-level dataset.

    python data/shakespeare_char/prepare.py

Downloads input.txt, or takes the one that lies beside this file, whatever text it is. Expect 65 different characters,
1,003,854 tokens in train.bin and 111,540 in val.bin.
"""

import hashlib
import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", ".."))
from data.shards import DatasetWriter, download, prepare_script  # noqa: E402
from data.tokenizer import CharTokenizer  # noqa: E402

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

if __name__ == "__main__":
    with prepare_script(__doc__):
        path = os.path.join(here, "input.txt")
        if not os.path.exists(path):
            download(URL, path, SHA256)
        with open(path, "rb") as f:
            raw = f.read()
        if hashlib.sha256(raw).hexdigest() != SHA256:
            print(f"WARNING: {path} is not tiny Shakespeare; delete it to download that", file=sys.stderr)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} is not UTF-8 text ({e})") from None
        if len(text) < 2:
            raise ValueError(f"{path} is empty: delete it to download the text")
        tokenizer = CharTokenizer(sorted(set(text)))
        print(f"{len(text):,} characters, {tokenizer.vocab_size} different ones")
        with DatasetWriter(here, tokenizer, source=URL) as out:
            out.write("train", tokenizer.encode(text[: int(len(text) * 0.9)]))
            out.write("val", tokenizer.encode(text[int(len(text) * 0.9) :]))
