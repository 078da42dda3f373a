"""
Prepare TinyStories, short stories in the words of a four-year-old, from which a GPT of a few million parameters learns
to write (https://arxiv.org/abs/2305.07759).

    python data/tinystories/prepare.py --tokenizer=bpe:4096
    python data/tinystories/prepare.py --num_samples=50000

Reads 5 parquet files of roneneldan/TinyStories on the Hugging Face Hub (1 GB, nothing of them is kept): 2,119,719
stories and 21,990 more for validation. The tokens are GPT-2's without --tokenizer: expect 474.0 million and 4.77
million; a small vocabulary suits a small model, and is learned in a reading of its own. With --input= or --num_samples=
one story in 100 is for validation instead.
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", ".."))
from data.documents import Files  # noqa: E402
from data.preparation import CORPUS, prepare_script, write_dataset  # noqa: E402

HUB = "hf://datasets/roneneldan/TinyStories/data/"

if __name__ == "__main__":
    with prepare_script(__doc__, "input", *CORPUS, val_share=0.01) as args:
        splits = {"train": [HUB + "train-*.parquet"], "val": [HUB + "validation-*.parquet"]}
        if args.input or args.num_samples:
            splits = {None: [args.input or HUB + "train-*.parquet"]}
        write_dataset(here, Files(splits, args), args, source=args.input or HUB)
