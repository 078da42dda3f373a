"""
Prepare the documentation that comes with Python as a character-level dataset. Nothing is downloaded.

    python data/pydocs_char/prepare.py

Reads the language reference in pydoc_data/topics.py and the docstrings of the standard library, which is parsed and
never imported: English prose about Python. Expect about 2.2 million characters, 96 distinct ones, with Python 3.11.
Other versions differ a little, but each always gives the same dataset. One document in ten is for validation, chosen by
a hash of its name.
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

ASCII = str.maketrans({"‘": "'", "’": "'", "´": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\t": "    "})
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documents(library):
    """Yield (name, text) of each topic of the language reference and of each module's docstrings, in a fixed order."""
    try:
        with open(os.path.join(library, "pydoc_data", "topics.py"), encoding="utf-8") as f:
            tree = ast.parse(f.read())
    except OSError as e:
        raise OSError(f"this Python has no documentation ({e}); use one from python.org") from None
    for name, text in sorted(ast.literal_eval(tree.body[-1].value).items()):
        yield "topics/" + name, text

    paths = []
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED]
        paths += [os.path.relpath(os.path.join(folder, name), library) for name in files if name.endswith(".py")]
    seen = set()
    for path in tqdm(sorted(path.replace(os.sep, "/") for path in paths), desc="reading docstrings", unit=" modules"):
        try:
            with open(os.path.join(library, path), "rb") as f:
                tree = ast.parse(f.read())
        except (SyntaxError, ValueError):  # templates and samples of errors
            continue
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
        new = [text for text in dict.fromkeys(texts) if text and text not in seen]
        seen.update(new)
        if new:
            yield path, "\n\n".join(new)


def to_ascii(text):
    """Reduce a text to printable ASCII and line breaks. Example: "“Naïve”\\t☃" -> '"Naive"    '"""
    text = unicodedata.normalize("NFKD", text.translate(ASCII))
    return "".join(c for c in text if " " <= c <= "~" or c == "\n")


if __name__ == "__main__":
    with prepare_script(__doc__) as args:
        args.tokenizer = "char"
        pieces = []
        for name, text in documents(sysconfig.get_paths()["stdlib"]):
            held_out = hashlib.sha256(name.encode()).digest()[0] < 26  # of 256
            pieces.append(Piece(to_ascii(text).strip() + "\n\n\n", False, "val" if held_out else "train"))
        source = f"documentation of Python {sys.version.split()[0]}"
        write_dataset(here, Texts(pieces, source, identity="documentation of Python"), args)
