"""The store: crops and targets of one image set on disk."""

from fkd_ssl.store.column import Column
from fkd_ssl.store.reader import Store, open_store

__all__ = ["Column", "Store", "open_store"]
