"""
Prepare the works of Shakespeare (tiny Shakespeare, 1.1 MB) in the tokens of GPT-2, or of the model to finetune.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --tokenizer=HuggingFaceTB/SmolLM2-135M --name=shakespeare_smollm

Downloads data/shakespeare_char/input.txt, unless there is an input.txt there or in this folder: any text will do. The
last tenth of it is for validation. Expect 301,966 GPT-2 tokens in train.bin and 36,059 in val.bin.
"""

import hashlib
import http.client
import os
import sys
import urllib.request

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", ".."))
from data.documents import Piece, Texts  # noqa: E402
from data.preparation import prepare_script, write_dataset  # noqa: E402

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def prepare(folder, args):
    """Write the input.txt of a folder, or of one of the two Shakespeare folders, as a dataset into that folder."""
    paths = [os.path.join(path, "input.txt") for path in (folder, os.path.join(here, "..", "shakespeare_char"), here)]
    path = next((path for path in paths if os.path.exists(path)), None) or download(paths[1])
    with open(path, "rb") as f:
        raw = f.read()
    if hashlib.sha256(raw).hexdigest() != SHA256:
        print(f"WARNING: {path} is not tiny Shakespeare; delete it to download that", file=sys.stderr)

    # the last tenth for validation, without an end of text
    text = raw.decode("utf-8")
    n = int(len(text) * 0.9)
    write_dataset(folder, Texts([Piece(text[:n], False, "train"), Piece(text[n:], False, "val")], source=URL), args)


def download(path):
    """Download input.txt atomically, and return its path."""
    try:
        with urllib.request.urlopen(URL, timeout=30) as response:
            raw = response.read()
        if hashlib.sha256(raw).hexdigest() != SHA256:
            raise OSError(f"SHA-256 is not {SHA256}")
    except (OSError, http.client.HTTPException) as e:
        reason = e or type(e).__name__
        raise OSError(f"cannot download {URL} ({reason}); get it elsewhere and save it as {path}") from None
    with open(path + ".tmp", "wb") as f:
        f.write(raw)
    os.replace(path + ".tmp", path)
    return path


if __name__ == "__main__":
    with prepare_script(__doc__, "tokenizer", name="shakespeare") as args:
        prepare(os.path.join(os.path.dirname(here), args.name), args)
