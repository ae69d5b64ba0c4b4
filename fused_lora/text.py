"""Text to fine-tune on: text or JSON lines, cut into equal blocks of tokens; and its loss."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PYTHON_DOCS = "python-docs"  # what `--data` is by default: no file, nothing to download
NOT_COUNTED = -100  # as a label: cross_entropy's own ignore_index
_LINES = (".jsonl", ".ndjson")
_NO_TEXT = (".json", ".csv", ".tsv", ".parquet", ".arrow")  # one would train on brackets and commas


class Document(NamedTuple):
    """A text to learn, and what stands before it."""

    text: str
    prompt: str = ""  # is read, and does not count in the loss


def read_documents(data: str, tokenizer: Any) -> list[Document]:
    """The documents of ``data``: a text file (one), JSON lines (.jsonl, .ndjson) or "python-docs".

    A line of JSON has "text", "messages" for the tokenizer's chat template, or "prompt" and
    "completion", both strings or both messages; with messages "tools", if any: TRL's forms.
    "python-docs" is Python's own language reference, which lies in its standard library.

    Raises FileNotFoundError; and ValueError, with the line, for what is not of this form.
    """
    if data == PYTHON_DOCS:
        from pydoc_data.topics import topics

        return list(map(Document, topics.values()))
    path = Path(data)
    if not path.is_file():
        what = "is a folder, wanted a file" if path.is_dir() else "there is no such file"
        raise FileNotFoundError(f"data: {path}: {what}")
    if path.suffix.lower() in _NO_TEXT:
        raise ValueError(
            f"data: {path}: wanted plain text, or a .jsonl file, each line an object with {_FIELDS}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path}: is not UTF-8 text: {error}") from None
    documents = [Document(text)]
    if path.suffix.lower() in _LINES:
        lines = enumerate(text.split("\n"), start=1)  # a string may have the other separators in it
        filled = [(n, line) for n, line in lines if line.strip()]
        documents = [_document(f"data: {path}:{n}", line, tokenizer) for n, line in filled]
    if not any(document.text.strip() for document in documents):
        raise ValueError(f"data: {path}: has no text in it")
    return documents


_FIELDS = 'a string "text", a list "messages", or "prompt" and "completion"'


def _document(where: str, line: str, tokenizer: Any) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: wanted an object with {_FIELDS}")
    forms = [name for name in ("text", "messages", "prompt") if name in record]
    if len(forms) > 1:
        raise ValueError(f"{where}: has {' and '.join(forms)}, wanted one of them")
    tools = {"tools": record["tools"]} if record.get("tools") else {}
    match record:
        case {"text": str(text)}:
            document = Document(text)
        case {"prompt": str(prompt), "completion": str(text)}:
            document = Document(text, prompt)
        case {"prompt": list(asked), "completion": list(answer)}:
            start = tools | {"add_generation_prompt": True}
            prompt = _chat(where, tokenizer, "prompt", asked, **start)
            both = _chat(where, tokenizer, "completion", asked + answer, **tools)
            if not both.startswith(prompt):
                raise ValueError(
                    f'{where}: the chat template does not begin "prompt" and "completion" as it '
                    'does "prompt" alone, so that they cannot be told apart; wanted strings'
                )
            document = Document(both.removeprefix(prompt), prompt)
        case {"messages": messages}:
            document = Document(_chat(where, tokenizer, "messages", messages, **tools))
        case _:
            raise ValueError(f"{where}: wanted an object with {_FIELDS}")
    return Document(*(_unicode(where, text) for text in document))


def _chat(where: str, tokenizer: Any, name: str, messages: object, **options: Any) -> str:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f'{where}: "{name}": wanted a list of messages, {{"role": ..., ...}}')
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # jinja's, transformers' and lookups' own
        raise ValueError(f'{where}: "{name}" does not fit the chat template: {error}') from None


def _unicode(where: str, text: str) -> str:
    """The text; ValueError if it has halves of characters ("\\ud800"), which tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: is not Unicode text: {error}") from None
    return text


def token_blocks(documents: list[Document], tokenizer: Any, length: int) -> Tensor:
    """All documents one after the other, in rows of ``length`` tokens: int64 [blocks, 2, length].

    Of each row first the tokens, then their labels: the tokens again, or `NOT_COUNTED` in a prompt.
    The end-of-text token stands between documents. What does not fill a row is left out, and so are
    rows in which nothing is learnt.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    labels: list[int] = []

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    for document in documents:
        # Together, as the model will see them: some tokenizers begin every text with a space.
        both = encode(document.prompt + document.text)
        prompt = encode(document.prompt) if document.prompt else []
        pairs = zip(prompt, both, strict=False)
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        tokens += both + end
        labels += [NOT_COUNTED] * shared + both[shared:] + end
    count = len(tokens) // length * length
    rows = torch.tensor([tokens[:count], labels[:count]], dtype=torch.int64)
    rows = rows.view(2, -1, length).transpose(0, 1)
    # A row's first token is predicted from nothing.
    return rows[(rows[:, 1, 1:] != NOT_COUNTED).any(1)].contiguous()


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy in fp32, summed over the labels that count.

    Args:
        logits: ``[rows, length, vocabulary]``, at each token for the one after it.
        labels: ``[rows, length]``.
    """
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=NOT_COUNTED)
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), following.flatten(), reduction="sum"
    )


def counted(labels: Tensor) -> int:
    """Of how many tokens `next_token_loss` is the sum."""
    return int((labels[:, 1:] != NOT_COUNTED).sum())


def split_held_out(blocks: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """Training rows and ``held_out`` rows, these taken at equal distances.

    Raises ValueError unless at least one row is left to train on.
    """
    total = len(blocks)
    if total <= held_out:
        raise ValueError(
            f"data: makes {total} blocks of {blocks.shape[-1]} tokens, wanted more than the "
            f"{held_out} held out; give more text, or a smaller seq_len or held_out"
        )
    chosen = (torch.arange(held_out) * total // max(held_out, 1)) + total // (2 * max(held_out, 1))
    training = torch.ones(total, dtype=torch.bool)
    training[chosen] = False
    return blocks[training], blocks[chosen]
