"""
Prepare SmolTalk, the million conversations that SmolLM2-Instruct was finetuned on (HuggingFaceTB/smoltalk on the Hub).

    python data/smoltalk/prepare.py --num_samples=20000
    python train.py config/finetune_chat.py
    python data/smoltalk/prepare.py --input='smoltalk/*.parquet' --tokenizer=gpt2
    python train.py config/finetune_chat.py --init_from=gpt2

The whole dataset takes an hour; an interrupted call starts again. See data/chat/prepare.py for your own conversations.
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", ".."))
from data.conversations import write_conversations  # noqa: E402
from data.preparation import prepare_script  # noqa: E402

HUB = "hf://datasets/HuggingFaceTB/smoltalk/data/all/train-*.parquet"

if __name__ == "__main__":
    flags = ("input", "block_size", "val_share", "num_samples", "max_bad")
    with prepare_script(__doc__, *flags, tokenizer="HuggingFaceTB/SmolLM2-135M") as args:
        write_conversations(here, {None: [args.input or HUB]}, args)
