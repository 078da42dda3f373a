"""
Prepare the documentation that comes with every Python as a character-level dataset. Nothing is downloaded.

    python data/pydocs_char/prepare.py

The text is the language reference in pydoc_data/topics.py and the docstrings of the standard library, which is parsed
and never imported: about 2 million characters of English prose about Python. Python 3.11 gives 2.2 million characters,
of 96 kinds; other versions a little more or less, each always the same. One document in ten, chosen by a hash of its
name, is for validation.
"""

import ast
import hashlib
import os
import sys
import sysconfig
import unicodedata

from tqdm import tqdm

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", ".."))
from data.documents import Piece, Texts  # noqa: E402
from data.preparation import prepare_script, write_dataset  # noqa: E402

PLAIN = str.maketrans({"‘": "'", "’": "'", "´": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\t": "    "})
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}


def documents(library):
    """Yield (name, text) of each topic of the language reference and of each module's docstrings, in a fixed order."""
    try:
        f = open(os.path.join(library, "pydoc_data", "topics.py"), encoding="utf-8")
    except OSError as e:
        raise OSError(
            f"this Python comes without its documentation ({e}): use one from python.org or a full package"
        ) from None
    with f:
        tree = ast.parse(f.read())
    for name, text in sorted(ast.literal_eval(tree.body[-1].value).items()):
        yield "topics/" + name, text
    paths = []
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = [d for d in subfolders if d not in SKIPPED]
        paths += [os.path.relpath(os.path.join(folder, f), library) for f in files if f.endswith(".py")]
    seen = set()
    for path in tqdm(sorted(p.replace(os.sep, "/") for p in paths), desc="reading docstrings", unit=" modules"):
        with open(os.path.join(library, path), "rb") as f:
            try:
                tree = ast.parse(f.read())
            except (SyntaxError, ValueError):  # a few files are templates or samples of errors
                continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        new = [text for text in dict.fromkeys(texts) if text and text not in seen]
        seen.update(new)
        if new:
            yield path, "\n\n".join(new)


def plain(text):
    """The text in printable ASCII and newlines: typographic signs and accents folded, the few other signs dropped."""
    text = unicodedata.normalize("NFKD", text.translate(PLAIN))
    return "".join(c for c in text if " " <= c <= "~" or c == "\n")


if __name__ == "__main__":
    with prepare_script(__doc__) as args:
        args.tokenizer, pieces = "char", []
        for name, text in documents(sysconfig.get_paths()["stdlib"]):
            held_out = hashlib.sha256(name.encode()).digest()[0] < 26  # of 256
            pieces.append(Piece(plain(text).strip() + "\n\n\n", False, "val" if held_out else "train"))
        source = f"documentation of Python {sys.version.split()[0]}"
        write_dataset(here, Texts(pieces, identity="documentation of Python"), args, source)
