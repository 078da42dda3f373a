"""
Turn conversations into a dataset folder: windows of whole conversations, and a loss mask.

    with prepare_script(__doc__, "inputs", ...) as args:
        write_conversations(folder, {None: args.inputs}, args)

The tokenizer's chat template turns messages into text: its own, or the one in data/tokenizer.py. The loss covers the
assistant's turns and the tokens that end them. Each window has block_size + 1 tokens and contains as many whole
conversations as fit, then padding.
"""

import bisect
import collections
import contextlib
import functools
import json
import tempfile

import numpy as np

from data.documents import LONGEST, Files
from data.preparation import State, TokenFiles, describe, fraction, load_tokenizer, make_recipe, read, write
from data.tokenizer import as_value_error, for_terminal, with_chat_template

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
OPEN = 64  # windows that a conversation may go into; more would leave less padding

# -----------------------------------------------------------------------------
# from rows to messages


def to_messages(row):
    """Return the messages of a row as [{"role": ..., "content": ...}]; ValueError if it is not a conversation.

    Rows have OpenAI's messages, ShareGPT's conversations, or Alpaca's instruction, input and output.
    Example: {"instruction": "Add.", "input": "1 1", "output": "2"} -> a user's "Add.\\n\\n1 1", an assistant's "2"
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    turns = row.get("messages") or row.get("conversations") or row.get("conversation")
    if turns is None and "instruction" in row and "output" in row:
        parts = [to_text(part or "") for part in (row["instruction"], row.get("input"))]
        if None in parts:
            raise ValueError("instruction or input is not text")
        prompt = "\n\n".join(filter(None, parts))
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": row["output"]}]
        if row.get("system"):
            turns = [{"role": "system", "content": row["system"]}, *turns]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"no messages, conversations or instruction and output (columns: {', '.join(list(row)[:20])})")
    messages = []
    for turn in turns:
        role = turn.get("role") or turn.get("from")
        content = to_text(turn.get("content") if "content" in turn else turn.get("value"))
        if not isinstance(role, str) or content is None or turn.get("tool_calls"):
            raise ValueError("a message without role or text, or with a tool call")
        messages.append({"role": ROLES.get(role.lower(), role.lower()), "content": content})
    return messages


def to_text(content):
    """Return the text of a message's content. Example: [{"type": "text", "text": "Hi"}] -> "Hi"; an image -> None"""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    return content.encode("utf-8", "replace").decode() if isinstance(content, str) else None


class Conversations(Files):
    """A corpus of conversations. Its pieces are the messages as JSON."""

    def __init__(self, splits, args):
        super().__init__(splits, args)
        self.column = None  # all of them

    def text_of(self, row):
        text = json.dumps(to_messages(row), ensure_ascii=False)
        if len(text) > LONGEST:
            raise ValueError(f"a conversation of more than {LONGEST:,} characters")
        return text


# -----------------------------------------------------------------------------
# from messages to tokens


class ChatTemplate:
    """A tokenizer's chat template, applied by transformers. ValueError if there is none, or it refuses the messages.

    end: the text of the token that ends an assistant's turn, or "" if the template has none; end_id: its id
    marks: the special tokens of the template, which only the assistant's messages may contain
    """

    marks = ()

    def __init__(self, tokenizer):
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            self.library = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not self.library.chat_template:
            raise ValueError("the tokenizer has no chat template: finetune on data/chat, or use an instruct model")
        self.marks_turns = "{% generation" in str(self.library.chat_template).replace("{%-", "{%")
        self.added = {token.content: i for i, token in self.library.added_tokens_decoder.items() if token.special}

        # the first special token after a reply ends it
        question = [{"role": "user", "content": "a"}]
        text = self.render([*question, {"role": "assistant", "content": "zq"}])
        self.marks = [token for token in self.added if token in text]
        reply = text.rpartition("zq")[2]
        self.end = min((token for token in self.added if token in reply), key=reply.index, default="")
        self.end_id = self.added.get(self.end)

    def render(self, messages, reply=False):
        """Return messages as text; reply=True: up to where the assistant's reply begins."""
        others = "\n".join(message["content"] for message in messages if message["role"] != "assistant")
        for mark in self.marks:
            if mark in others:
                raise ValueError(f"a message contains {mark}, which is part of the chat template")
        with as_value_error("the chat template refuses the messages"):
            return self.library.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)

    def encode(self, text):
        """Return transformers' encoding of a text that the template has rendered."""
        with as_value_error("the tokenizer cannot encode the conversation"):
            return self.library(text, add_special_tokens=False, return_offsets_mapping=True)

    def prompt(self, messages, length):
        """Return the ids of messages and the beginning of a reply, at most `length`: the oldest turns are dropped."""
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = messages[len(system) :]
        starts = [0, *(i for i, turn in enumerate(turns) if i > 0 and turn["role"] == "user")]
        for start in starts:
            ids = self.encode(self.render(system + turns[start:], reply=True))["input_ids"]
            if len(ids) <= length:
                return ids
        raise ValueError(f"the message has {len(ids):,} tokens, but the context has room for {length:,}")

    def encode_conversation(self, messages):
        """Return ids (n,) and the loss mask (n,): True on the assistant's turns and their end tokens."""
        text = self.render(messages)
        if self.marks_turns:
            options = dict(tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            encoded = self.library.apply_chat_template(messages, **options)
            ids, mask = np.array(encoded["input_ids"]), np.array(encoded["assistant_masks"], dtype=bool)
        else:
            encoded = self.encode(text)
            ids, offsets = np.array(encoded["input_ids"]), np.array(encoded["offset_mapping"]).reshape(-1, 2)
            mask = np.zeros(len(ids), dtype=bool)
            for i, message in enumerate(messages):
                before = self.render(messages[:i], reply=True) if message["role"] == "assistant" and i else None
                if before and text.startswith(before):  # some templates change earlier turns
                    start, end = len(before), self.end_of_turn(text, messages, i, len(before))
                    mask |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        mask[:1] = False  # nothing predicts the first token
        return ids, mask

    def end_of_turn(self, text, messages, i, start):
        """Return where turn i, which begins at `start`, ends in a text."""
        content = messages[i]["content"].strip()
        found = text.find(content, start)
        # some templates change a reply: it ends at the first end of a turn then
        after = start if text[start:found].strip() or found < 0 else found + len(content)
        end = text.find(self.end, after)
        return end + len(self.end) if end >= 0 else after


# -----------------------------------------------------------------------------
# from tokens to windows


def pack(items, window):
    """Group items (split, ids, mask), which are not longer than a window, into windows: (split, [(ids, mask)]).

    Each item is appended to the fullest of the OPEN windows that has room.
    Example: lengths 3, 2, 1 and window 4 -> windows of 3 + 1 and 2
    """
    waiting = {"train": [], "val": []}  # sorted lists of (room, number of the first item, items)
    for number, (split, ids, mask) in enumerate(items):
        windows = waiting[split]
        i = bisect.bisect_left(windows, (len(ids),))
        room, first, packed = windows.pop(i) if i < len(windows) else (window, number, [])
        packed.append((ids, mask))
        bisect.insort(windows, (room - len(ids), first, packed))
        if len(windows) > OPEN or windows[0][0] == 0:
            yield split, windows.pop(0)[2]
    for split, windows in waiting.items():
        for _, _, packed in sorted(windows, key=lambda w: w[1]):
            yield split, packed


def encode_all(corpus, args, template):
    """Yield (split, ids, mask) of each conversation with a reply, and count those left out and truncated."""
    with contextlib.closing(read(corpus, args, State({}), "preparing")) as pieces:
        for piece, _, _ in pieces:
            split = piece.split or ("val" if fraction(piece.text, 0) < args.val_share else "train")
            try:
                ids, mask = template.encode_conversation(json.loads(piece.text))
            except ValueError as e:
                corpus.first_bad = corpus.first_bad or str(e)
                corpus.counts["conversations refused by the template or tokenizer"] += 1
                continue
            truncated = len(ids) > args.block_size + 1
            ids, mask = ids[: args.block_size + 1], mask[: args.block_size + 1]
            if not mask.any():
                problem = "too long for a reply" if truncated else "without a reply"
                corpus.counts[f"conversations {problem}"] += 1
                continue
            corpus.counts["conversations truncated"] += truncated
            yield split, ids, mask


def write_conversations(folder, splits, args):
    """Write the conversations of Conversations(splits, args) into a dataset folder, which is replaced at the end."""
    corpus = Conversations(splits, args)
    recipe = make_recipe(corpus, args) | {"block_size": args.block_size}
    write(folder, recipe, args.force, corpus.source, functools.partial(encode, folder, corpus, args))


def encode(folder, corpus, args, state):
    """Write windows and masks to .tmp files. Return the content of meta.json."""
    state.save(folder)
    tokenizer = with_chat_template(load_tokenizer(args.tokenizer, functools.partial(contents, corpus, args)))
    template, counts = ChatTemplate(tokenizer), collections.Counter()
    window, padding = args.block_size + 1, tokenizer.eot or 0
    tokens = dict.fromkeys(("train", "val", "train_mask", "val_mask"), 0)
    files = TokenFiles(folder, tokenizer.vocab_size, 0, tokens)
    for split, conversations in pack(encode_all(corpus, args, template), window):
        ids, mask = (np.concatenate(parts) for parts in zip(*conversations, strict=True))
        if ids.max() >= tokenizer.vocab_size:
            raise ValueError(f"the tokenizer gives id {ids.max()}, beyond its vocabulary of {tokenizer.vocab_size}")
        counts[split] += len(conversations)
        counts["learned"] += int(mask.sum())
        counts["padding"] += window - len(ids)
        files.write(split, np.pad(ids, (0, window - len(ids)), constant_values=padding))
        files.write(f"{split}_mask", np.pad(mask, (0, window - len(mask))))
    for split in ("train", "val"):
        if not tokens[split]:
            hint = f" (first problem: {corpus.first_bad})" if corpus.first_bad else "; is --val_share right?"
            raise ValueError(f"no conversation with a reply for {split}{hint}")

    # report what was left out, and how much is trained on
    left_out = {name: n for name, n in corpus.counts.items() if n and name.startswith(("conversations", "bad rows"))}
    for name, n in left_out.items():
        print(f"{n:,} {name}")
    if corpus.first_bad:
        print(for_terminal(f"first problem: {corpus.first_bad}"))
    total = tokens["train"] + tokens["val"]
    print(f"{counts['learned'] / total:.1%} of the tokens are trained on, {counts['padding'] / total:.1%} are padding")
    documents = {split: counts[split] for split in ("train", "val")}
    return describe(files, tokenizer, documents, left_out) | {"block_size": args.block_size}


def contents(corpus, args, size):
    """Yield texts to make a tokenizer from: about `size` characters of messages."""
    yield "system\nuser\nassistant\n"
    for piece, _, _ in read(corpus, args, State({}), f"reading for {args.tokenizer}"):
        for message in json.loads(piece.text):
            yield message["content"]
            size -= len(message["content"])
        if size < 0:
            break
