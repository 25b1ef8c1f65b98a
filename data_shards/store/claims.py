"""The numbered claims of a fenced lease, one object each. The claim with the highest number counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from data_shards.store.holder import Holder
from data_shards.store.store import Store, StoreKeyError


@dataclass(frozen=True)
class Claim:
    """The content of a claim object."""

    token: str
    holder: Holder
    since: str
    ttl_s: float
    renewals: int = 0
    is_over: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claims:
    """The claims of one lease, in `store` below `prefix`."""

    store: Store
    prefix: str

    def within(self, total_s: float) -> Claims:
        """The same claims, with operations limited to `total_s` together (see `Store.with_patience`)."""
        return Claims(self.store.with_patience(total_s), self.prefix)

    def numbers(self) -> list[int]:
        """The numbers of all stored claims."""
        names = (key.rpartition("/")[2].removesuffix(".json") for key in self.store.list(f"{self.prefix}/"))
        return [int(name) for name in names if name.isdigit()]

    def last(self) -> int:
        """The highest number; 0 if the lease has not been claimed yet."""
        return max(self.numbers(), default=0)

    def read(self, number: int) -> Claim | None:
        """The claim of this number; None if it is missing or invalid."""
        try:
            data = self.store.get(self._key(number))
        except StoreKeyError:
            return None
        try:
            found = json.loads(data)
            return Claim(**{**found, "holder": Holder(**found["holder"])})
        except (ValueError, TypeError, KeyError):
            return None

    def write(self, number: int, claim: Claim, *, if_absent: bool = False) -> bool:
        """Writes a claim; with `if_absent`, returns False if another process has this number."""
        return self.store.put(self._key(number), json.dumps(asdict(claim), indent=1).encode(), if_absent=if_absent)

    def remove(self, number: int) -> None:
        """Removes a claim that no longer counts."""
        self.store.delete(self._key(number))

    def age_s(self, number: int) -> float:
        """Seconds since a claim was written, by the store's clock; StoreKeyError if it is gone."""
        return self.store.age_s(self._key(number))

    def tag(self, number: int) -> str:
        """A text that changes when a claim is renewed; StoreKeyError if it is gone."""
        return f"{self._key(number)} {self.store.tag(self._key(number))}"

    def _key(self, number: int) -> str:
        return f"{self.prefix}/{number:08d}.json"
