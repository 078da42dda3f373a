"""
Prepare text of your own: files, folders (with all that is in them), patterns in quotes, - for standard input.

    python data/text/prepare.py book.txt --name=book --tokenizer=char
    python data/text/prepare.py notes/ '*.jsonl.gz' book.txt --name=mine --tokenizer=bpe:8192
    zcat logs.gz | python data/text/prepare.py - --name=logs
    python train.py config/train_shakespeare_char_cpu.py --dataset=mine

txt and md hold a document each, or several with <|endoftext|> between them; jsonl, csv, tsv and parquet a document a
row, in --column=text. .gz and .zst are unpacked. Whatever has another ending is text, unless --format says otherwise.
What cannot be read is left out and counted.

--tokenizer is gpt2 or another encoding of tiktoken, char, bpe:N (N tokens learned from this text, 512 to 32768 for most
purposes), a tokenizer.json, a SentencePiece .model, the folder of a dataset (data/mine) or of a model, or a name on the
Hugging Face Hub. char and bpe:N read all of the text twice. One passage of 4,000 characters in ten, chosen by a hash of
its text, is for validation, and one row in ten: --val_share.
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", ".."))
from data.documents import Files  # noqa: E402
from data.preparation import CORPUS, prepare_script, write_dataset  # noqa: E402

if __name__ == "__main__":
    with prepare_script(__doc__, *CORPUS, inputs=[], name="text", format="") as args:
        if not args.inputs:
            raise ValueError("say which text: python data/text/prepare.py book.txt; --help tells more")
        folder = os.path.join(os.path.dirname(here), args.name)
        write_dataset(folder, Files({None: args.inputs}, args), args, source=" ".join(args.inputs))
