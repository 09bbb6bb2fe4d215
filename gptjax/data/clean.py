"""What is taken out of a stream of documents before it is tokenised."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from gptjax.data.source import Document


def drop_duplicates(documents: Iterable[Document]) -> Iterator[Document]:
    """Keeps the first of documents with exactly the same text; takes about 100 bytes of memory for each.

    Done before the held-out split, it also keeps training text out of evaluation.
    """
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield document
