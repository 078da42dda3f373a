"""
Prepare FineWeb, cleaned pages of the web, in GPT-2's tokens.

    python data/fineweb/prepare.py --pretokenized --files=10       ready-made tokens: 1 billion, 2 GB
    python data/fineweb/prepare.py                                 from text, with any --tokenizer
    python data/fineweb/prepare.py --num_samples=20000 --val_share=0.01

--pretokenized fetches files of kjj0/fineweb10B-gpt2 on the Hugging Face Hub, on which the records of modded-nanogpt are
trained: one for validation and --files=103 for training, of 100 million tokens and 200 MB each. To get more of them
later, add --force, which keeps those that are there. Without --pretokenized the sample of 10 billion tokens of
HuggingFaceFW/fineweb is read, 15 parquet files (31 GB, nothing of them is kept) with 14.9 million pages, one in 2,000
of them for validation: about 10 billion tokens, 20 GB.
"""

import os
import shutil
import sys

import numpy as np
from tqdm import tqdm

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", ".."))
from data.documents import Files  # noqa: E402
from data.preparation import CORPUS, begin, prepare_script, replace, sha256_of, write_dataset, write_json  # noqa: E402  # noqa: E402
from data.shards import PREPARING, FolderLock  # noqa: E402

HUB = "hf://datasets/HuggingFaceFW/fineweb/sample/10BT/*.parquet"
READY = "kjj0/fineweb10B-gpt2"


def fetch_tokens(count, force):
    """Download ready-made files of tokens: one for validation and `count` for training."""
    from huggingface_hub import hf_hub_download

    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1))]
    with FolderLock(here):
        state = begin(here, {"repository": READY, "files": count}, force)
        if state is None:
            return
        write_json(os.path.join(here, PREPARING), state)
        files, aside = {}, os.path.join(here, ".download")
        for name in tqdm(names, desc="downloading", unit=" files"):
            path = os.path.join(here, name)
            if not any(map(os.path.exists, (path, path + ".tmp"))):
                try:
                    hf_hub_download(READY, name, repo_type="dataset", local_dir=aside)
                except Exception as e:  # of the library that it uses for the network
                    raise OSError(
                        f"cannot fetch {name} of {READY} ({e}): the same command carries on from here"
                    ) from None
                os.replace(os.path.join(aside, name), path + ".tmp")
            path = path if os.path.exists(path) else path + ".tmp"
            files[name] = {"tokens": int(np.fromfile(path, "<i4", 3)[2]), "sha256": sha256_of(path)}
        tokenizer = {"kind": "tiktoken", "name": "gpt2"}
        meta = {"vocab_size": 50257, "dtype": "uint16", "tokenizer": tokenizer, "source": READY, "files": files}
        state |= {"replacing": True, "meta": meta | {"recipe": state["recipe"]}}
        write_json(os.path.join(here, PREPARING), state)
        replace(here, state["meta"])
        shutil.rmtree(aside, ignore_errors=True)


if __name__ == "__main__":
    with prepare_script(__doc__, "input", *CORPUS, val_share=0.0005, pretokenized=False, files=103) as args:
        if not 1 <= args.files <= 103:
            raise ValueError(f"--files takes a number from 1 to 103, not {args.files}")
        if args.pretokenized:
            if args.input or args.num_samples or args.shard_tokens or args.tokenizer != "gpt2":
                raise ValueError("ready-made tokens are GPT-2's: --pretokenized goes with --files and --force alone")
            fetch_tokens(args.files, args.force)
        else:
            write_dataset(here, Files({None: [args.input or HUB]}, args), args, source=args.input or HUB)
