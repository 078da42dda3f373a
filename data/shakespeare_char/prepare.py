"""
Prepare the works of Shakespeare (tiny Shakespeare, 1.1 MB) as a character-level dataset.

    python data/shakespeare_char/prepare.py

Downloads input.txt, unless there is one in this folder or in data/shakespeare: any text will do. The last tenth of it
is for validation. Expect 65 characters, 1,003,854 tokens in train.bin and 111,540 in val.bin.
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", ".."))
from data.preparation import prepare_script  # noqa: E402
from data.shakespeare.prepare import prepare  # noqa: E402

if __name__ == "__main__":
    with prepare_script(__doc__) as args:
        args.tokenizer = "char"
        prepare(here, args)
