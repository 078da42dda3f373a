"""
Prepare the works of Shakespeare (tiny Shakespeare, 1.1 MB) in the tokens of GPT-2, or of the model to be finetuned.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --tokenizer=HuggingFaceTB/SmolLM2-135M --name=shakespeare_smollm

Downloads input.txt, or takes the one that lies beside this file or data/shakespeare_char's, whatever text it is. The
last tenth of it is for validation. Expect of gpt2 301,966 tokens in train.bin and 36,059 in val.bin.
"""

import hashlib
import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", ".."))
from data.documents import Piece, Texts  # noqa: E402
from data.preparation import download, prepare_script, write_dataset  # noqa: E402

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def prepare(folder, args):
    """Make a dataset folder of the input.txt in it, or in one of the two folders of Shakespeare."""
    paths = [os.path.join(path, "input.txt") for path in (folder, os.path.join(here, "..", "shakespeare_char"), here)]
    if not any(os.path.exists(path) for path in paths):
        download(URL, paths[-1], SHA256)
    path = next(path for path in paths if os.path.exists(path))
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
    cut = int(len(text) * 0.9)
    write_dataset(folder, Texts([Piece(text[:cut], False, "train"), Piece(text[cut:], False, "val")]), args, URL)


if __name__ == "__main__":
    with prepare_script(__doc__, "tokenizer", name="shakespeare") as args:
        prepare(os.path.join(os.path.dirname(here), args.name), args)
