"""The facts of a finished step: small JSON values, and the lines that show them to users."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Facts(BaseModel):
    """The facts that every step records. Each kind of step adds fields and lines in a subclass.

    Fields that earlier releases did not record have defaults, so that their records can be read. Unknown fields of a
    record are kept.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    digest: str
    """Hash of what the step produced."""

    def line(self) -> str:
        """A few words for a list of runs."""
        return ""

    def lines(self, finished: str) -> list[str]:
        """The lines for the end of a run; `finished` is the time from the step's record."""
        return [self.line()] if self.line() else []

    def places(self, store_uri: str) -> list[tuple[str, str]]:
        """(name, place in the store) of everything that the step produced."""
        return []
