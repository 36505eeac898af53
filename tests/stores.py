"""What is in a store."""

from __future__ import annotations

from segpipe.storage import Storage


def keys_of(store: Storage, prefix: str = "") -> list[str]:
    return [info.key for page in store.list(prefix) for info in page]
