"""The numbered objects of a fenced lease: who claims it. The claim with the highest number counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from data_shards.store.holder import Holder
from data_shards.store.store import Store, StoreKeyError


@dataclass(frozen=True)
class Claim:
    """What a lease object says."""

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
        """The same for operations that together begin their last attempt within `total_s`."""
        return Claims(self.store.with_patience(total_s), self.prefix)

    def numbers(self) -> list[int]:
        """Of all claims that are kept."""
        names = (key.rpartition("/")[2].removesuffix(".json") for key in self.store.list(f"{self.prefix}/"))
        return [int(name) for name in names if name.isdigit()]

    def last(self) -> int:
        """The highest number; 0 where nobody has claimed the lease yet."""
        return max(self.numbers(), default=0)

    def read(self, number: int) -> Claim | None:
        """The claim of this number; None where there is none, or something that is not one."""
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
        """Writes a claim; with `if_absent`, False where another process has this number."""
        return self.store.put(self._key(number), json.dumps(asdict(claim), indent=1).encode(), if_absent=if_absent)

    def remove(self, number: int) -> None:
        """Removes a claim that no longer counts."""
        self.store.delete(self._key(number))

    def age_s(self, number: int) -> float:
        """Seconds since a claim was written, by the store's clock; StoreKeyError where it is gone."""
        return self.store.age_s(self._key(number))

    def tag(self, number: int) -> str:
        """What changes when a claim is renewed; StoreKeyError where it is gone."""
        return f"{self._key(number)} {self.store.tag(self._key(number))}"

    def _key(self, number: int) -> str:
        return f"{self.prefix}/{number:08d}.json"
