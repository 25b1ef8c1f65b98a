"""Fills the templates: one HTML file that needs no other file, no script and no network."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pipelines.provenance import version

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> bytes:
    """The page of a template in this folder."""
    return _environment().get_template(template).render(release=version(), **values).encode()


@functools.cache
def _environment() -> Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
