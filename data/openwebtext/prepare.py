"""
Prepare OpenWebText, an open reproduction of WebText, GPT-2's training data, in GPT-2 tokens.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --num_samples=20000 --val_share=0.01      a trial: reads one of 80 files

Streams 80 parquet files of Skylion007/openwebtext from the Hugging Face Hub (24 GB, not kept): 8,013,769 documents, one
in 2,000 for validation. Expect about 9.04 billion tokens, 18 GB. nanoGPT's version has 9,035,582,198 + 4,434,897, with
other documents for validation.
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", ".."))
from data.documents import Files  # noqa: E402
from data.preparation import CORPUS, prepare_script, write_dataset  # noqa: E402

HUB = "hf://datasets/Skylion007/openwebtext/plain_text/train-*.parquet"

if __name__ == "__main__":
    with prepare_script(__doc__, "input", *CORPUS, val_share=0.0005) as args:
        write_dataset(here, Files({None: [args.input or HUB]}, args), args)
