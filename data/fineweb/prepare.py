"""
Prepare FineWeb, filtered web pages, in GPT-2 tokens.

    python data/fineweb/prepare.py --pretokenized --files=10       1 billion tokens, ready-made: 2 GB
    python data/fineweb/prepare.py                                 from text, with any --tokenizer
    python data/fineweb/prepare.py --num_samples=20000 --val_share=0.01

--pretokenized downloads files of kjj0/fineweb10B-gpt2 from the Hugging Face Hub, as modded-nanogpt does: one for
validation and --files=103 for training, each of 100 million tokens and 200 MB. Add --force to get more files later,
without downloading the first ones again.

Otherwise streams the 10-billion-token sample of HuggingFaceFW/fineweb, 15 parquet files (31 GB, not kept): 14.9 million
pages, one in 2,000 for validation. Expect about 10 billion tokens, 20 GB.
"""

import functools
import os
import shutil
import sys

from tqdm import tqdm

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", ".."))
from data.documents import Files  # noqa: E402
from data.preparation import CORPUS, prepare_script, sha256_of, write, write_dataset  # noqa: E402
from data.shards import HEADER_BYTES, read_header  # noqa: E402
from data.tokenizer import GPT2  # noqa: E402

HUB = "hf://datasets/HuggingFaceFW/fineweb/sample/10BT/*.parquet"
READY = "kjj0/fineweb10B-gpt2"
DOWNLOADS = os.path.join(here, ".download")


def fetch_tokens(count, state):
    """Download token files: one for validation and `count` for training. Return the content of meta.json."""
    state.save(here)
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1))]
    files = {}
    for name in tqdm(names, desc="downloading", unit=" files"):
        files[name] = fetch(name)
    return {"vocab_size": 50257, "dtype": "uint16", "tokenizer": GPT2, "files": files}


def fetch(name):
    """Download a file, unless it is there, as <name>.tmp. Return what meta.json says about it."""
    from huggingface_hub import hf_hub_download

    path = os.path.join(here, name)
    if not os.path.exists(path):
        path += ".tmp"
    if not is_whole(path):
        try:
            hf_hub_download(READY, name, repo_type="dataset", local_dir=DOWNLOADS)
        except Exception as e:  # the network raises many types
            raise OSError(f"cannot download {name} of {READY} ({e}); run the same command again to resume") from None
        os.replace(os.path.join(DOWNLOADS, name), path)
    return {"tokens": read_header(path)[2], "sha256": sha256_of(path)}


def is_whole(path):
    """Tell whether a token file exists and has the size that its header says."""
    return os.path.exists(path) and os.path.getsize(path) == HEADER_BYTES + 2 * read_header(path)[2]


if __name__ == "__main__":
    with prepare_script(__doc__, "input", *CORPUS, val_share=0.0005, pretokenized=False, files=103) as args:
        if not 1 <= args.files <= 103:
            raise ValueError(f"--files={args.files} is not between 1 and 103")
        if args.files != 103 and not args.pretokenized:
            raise ValueError("--files needs --pretokenized; use --num_samples for a part of the text")
        if not args.pretokenized:
            write_dataset(here, Files({None: [args.input or HUB]}, args), args)
        elif args.input or args.num_samples or args.shard_tokens or args.tokenizer != "gpt2":
            raise ValueError("--pretokenized has GPT-2 tokens and takes no options except --files and --force")
        else:
            recipe = {"repository": READY, "files": args.files}
            write(here, recipe, args.force, READY, functools.partial(fetch_tokens, args.files))
            shutil.rmtree(DOWNLOADS, ignore_errors=True)
