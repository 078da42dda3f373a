"""
Prepare conversations to finetune a model into an assistant: files, folders, quoted patterns, or - for standard input.

    python data/chat/prepare.py conversations.jsonl --tokenizer=HuggingFaceTB/SmolLM2-135M
    python data/chat/prepare.py qa.json --tokenizer=data/pydocs_char --block_size=128 --name=qa
    python train.py config/finetune_chat.py
    python sample.py --out_dir=out-chat --chat

Each row of a jsonl, csv or parquet file, or of a json file with one list, has the messages of OpenAI, [{"role": "user",
"content": "Hi"}, {"role": "assistant", "content": "Hello!"}], the conversations of ShareGPT (from and value), or
instruction, input and output, as in Alpaca. Only the assistant's turns and the tokens that end them are trained on.

--tokenizer is the model's: its folder or Hub name, gpt2, a dataset folder, or any that data/text/prepare.py takes. Its
own chat template is used. Without one, <|im_start|> and <|im_end|> are added, and the template is

    <|im_start|>user
    Hi<|im_end|>
    <|im_start|>assistant
    Hello!<|im_end|>

Conversations are packed into windows of --block_size + 1 tokens, which train.py uses whole. Longer ones are truncated;
those without a reply are left out. --val_share=0.1 uses one in ten conversations for validation, chosen by a hash.
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", ".."))
from data.conversations import write_conversations  # noqa: E402
from data.preparation import prepare_script  # noqa: E402

if __name__ == "__main__":
    flags = ("inputs", "val", "tokenizer", "block_size", "format", "val_share", "num_samples", "max_bad")
    with prepare_script(__doc__, *flags, name="chat") as args:
        folder = os.path.join(os.path.dirname(here), args.name)
        splits = {"train": args.inputs, "val": [args.val]} if args.val else {None: args.inputs}
        write_conversations(folder, splits, args)
