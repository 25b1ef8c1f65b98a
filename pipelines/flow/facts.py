"""What a finished step says of what it made: small JSON values, and the lines in which users read them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Facts(BaseModel):
    """What every step says. A step's own facts are a model beside it that adds fields and lines.

    Fields that earlier releases did not record have defaults: their records are read as well. What a record has beyond
    the fields stays in it.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    digest: str
    """The content of what the step made."""

    def line(self) -> str:
        """One clause for a list of runs."""
        return ""

    def lines(self, finished: str) -> list[str]:
        """The lines for the end of a run; `finished` is when the step finished, as its record has it."""
        return [self.line()] if self.line() else []

    def places(self, store_uri: str) -> list[tuple[str, str]]:
        """(what, where it is stored) of what the step made."""
        return []
