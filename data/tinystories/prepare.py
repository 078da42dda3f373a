"""
Prepare TinyStories: short stories with the words that a four-year-old knows, from which GPTs of a few million
parameters learn to write (https://arxiv.org/abs/2305.07759).

    python data/tinystories/prepare.py --tokenizer=bpe:4096
    python data/tinystories/prepare.py --num_samples=50000

Streams 5 parquet files of roneneldan/TinyStories from the Hugging Face Hub (1 GB, not kept): 2,119,719 stories, and
21,990 for validation. Without --tokenizer expect 474.0 million GPT-2 tokens, and 4.77 million for validation. Small
models need a small vocabulary; bpe:4096 learns one by reading the stories once more. With --input or --num_samples, one
story in 100 is for validation instead.
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
        write_dataset(here, Files(splits, args), args)
