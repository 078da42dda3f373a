"""
Prepare the works of Shakespeare (tiny Shakespeare, 1.1 MB) in the tokens of GPT-2, or of the model to be finetuned.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --tokenizer=HuggingFaceTB/SmolLM2-135M --name=shakespeare_smollm

Downloads input.txt, or takes the one that lies beside this file, whatever text it is, or data/shakespeare_char's.
--tokenizer is an encoding of tiktoken (gpt2), or a model's folder or name on the Hugging Face Hub; --name is the folder
in data/ to write to. Expect of gpt2 301,966 tokens in train.bin and 36,059 in val.bin.
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", ".."))
from data.shards import DatasetWriter, download, prepare_script  # noqa: E402
from data.tokenizer import from_name  # noqa: E402

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

if __name__ == "__main__":
    with prepare_script(__doc__, tokenizer="gpt2", name="shakespeare") as args:
        tokenizer = from_name(args.tokenizer)
        paths = [os.path.join(here, "input.txt"), os.path.join(here, "..", "shakespeare_char", "input.txt")]
        if not any(os.path.exists(path) for path in paths):
            download(URL, paths[0], SHA256)
        with open(next(path for path in paths if os.path.exists(path)), encoding="utf-8") as f:
            text = f.read()
        if len(text) < 2:
            raise ValueError(f"{f.name} is empty: delete it to download the text")
        with DatasetWriter(os.path.join(os.path.dirname(here), args.name), tokenizer, source=URL) as out:
            out.write("train", tokenizer.encode(text[: int(len(text) * 0.9)]))
            out.write("val", tokenizer.encode(text[int(len(text) * 0.9) :]))
