"""
Prepare your own text: files, folders with their subfolders, quoted globs, or - for standard input.

    python data/text/prepare.py book.txt --name=book --tokenizer=char
    python data/text/prepare.py notes/ '*.jsonl.gz' book.txt --name=mine --tokenizer=bpe:8192
    python data/text/prepare.py notes/ --val=held_out.txt --name=mine
    zcat logs.gz | python data/text/prepare.py - --name=logs
    python train.py config/train_shakespeare_char_cpu.py --dataset=mine

txt and md files contain one document, or several with <|endoftext|> between them. jsonl, csv, tsv and parquet files,
and json files with one list, contain one document per row, in --column=text (a.b for nested columns). .gz, .bz2, .xz
and .zst files are decompressed. Files with other extensions are text, unless you set --format. Unreadable rows are left
out, unreadable bytes replaced, and both are counted. A folder with train-*, validation-* and test-* files, as on the
Hugging Face Hub, keeps its splits; test is left out.

--tokenizer is gpt2 or another encoding of tiktoken; char; bpe:N, which learns N tokens from this text (512 to 32768 for
most purposes); a tokenizer.json; a SentencePiece .model; a dataset folder such as data/mine; a model folder; or a name
on the Hugging Face Hub. char and bpe:N read the text twice.

--val_share=0.1 uses one in ten documents for validation, chosen by a hash of the text, and the last tenth of each
document of 41,000 characters or more (4,096 / val_share). If that leaves a split empty, the last tenth of all tokens is
for validation. --val=FILE uses a file of your own.
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", ".."))
from data.documents import Files  # noqa: E402
from data.preparation import CORPUS, prepare_script, write_dataset  # noqa: E402

if __name__ == "__main__":
    with prepare_script(__doc__, "inputs", "val", "name", "format", *CORPUS) as args:
        folder = os.path.join(os.path.dirname(here), args.name)
        splits = {"train": args.inputs, "val": [args.val]} if args.val else {None: args.inputs}
        write_dataset(folder, Files(splits, args), args)
