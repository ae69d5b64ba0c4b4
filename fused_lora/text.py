"""Text to fine-tune on: a file of text or of JSON lines, cut into equal blocks of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PYTHON_DOCS = "python-docs"  # what `--data` is by default: no file, nothing to download
_LINES = (".jsonl", ".ndjson")
_NO_TEXT = (".json", ".csv", ".tsv", ".parquet", ".arrow")  # one would train on brackets and commas


def read_documents(data: str, tokenizer: Any) -> list[str]:
    """The documents of ``data``: a text file (one), JSON lines (.jsonl, .ndjson) or "python-docs".

    A line of JSON has "text", or "messages" for the tokenizer's chat template. "python-docs" is
    Python's own language reference, which lies in its standard library.

    Raises FileNotFoundError; and ValueError, with the line, for what is not of this form.
    """
    if data == PYTHON_DOCS:
        from pydoc_data.topics import topics

        return list(topics.values())
    path = Path(data)
    if not path.is_file():
        what = "is a folder, wanted a file" if path.is_dir() else "there is no such file"
        raise FileNotFoundError(f"data: {path}: {what}")
    if path.suffix.lower() in _NO_TEXT:
        raise ValueError(
            f"data: {path}: wanted plain text, or a .jsonl file of an object a line with a string "
            '"text" or a list "messages"'
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path}: is not UTF-8 text: {error}") from None
    documents = [text]
    if path.suffix.lower() in _LINES:
        lines = enumerate(text.split("\n"), start=1)  # a string may have the other separators in it
        filled = [(n, line) for n, line in lines if line.strip()]
        documents = [_document(f"data: {path}:{n}", line, tokenizer) for n, line in filled]
    if not any(map(str.strip, documents)):
        raise ValueError(f"data: {path}: has no text in it")
    return documents


def _document(where: str, line: str, tokenizer: Any) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not JSON: {error}") from None
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return _unicode(where, record["text"])
    if isinstance(record, dict) and "messages" in record:
        try:
            text = str(tokenizer.apply_chat_template(record["messages"], tokenize=False))
        except Exception as error:  # jinja's, transformers' and lookups' own
            raise ValueError(f'{where}: "messages" do not fit the chat template: {error}') from None
        return _unicode(where, text)
    raise ValueError(f'{where}: wanted an object with a string "text" or a list "messages"')


def _unicode(where: str, text: str) -> str:
    """The text; ValueError if it has halves of characters ("\\ud800"), which tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: is not Unicode text: {error}") from None
    return text


def token_blocks(documents: list[str], tokenizer: Any, length: int) -> Tensor:
    """All documents one after the other, in rows of ``length`` tokens: int64 [blocks, length].

    The end-of-text token stands between documents; what does not fill a row is left out.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for document in documents:
        tokens += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + end
    blocks = len(tokens) // length
    return torch.tensor(tokens[: blocks * length], dtype=torch.int64).view(blocks, length)


def split_held_out(blocks: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """Training rows and ``held_out`` rows, these taken at equal distances.

    Raises ValueError unless at least one row is left to train on.
    """
    total = len(blocks)
    if total <= held_out:
        raise ValueError(
            f"data: makes {total} blocks of {blocks.shape[1]} tokens, wanted more than the "
            f"{held_out} held out; give more text, or a smaller seq_len or held_out"
        )
    chosen = (torch.arange(held_out) * total // max(held_out, 1)) + total // (2 * max(held_out, 1))
    training = torch.ones(total, dtype=torch.bool)
    training[chosen] = False
    return blocks[training], blocks[chosen]
