"""For the site: the doctests of docstrings become blocks of code. In Markdown ``>>>`` would be a quotation."""

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^>>> .*\n(?:.+\n?)*", re.MULTILINE)
_FLAG = re.compile(r" *# doctest: .*")


class Doctests(griffe.Extension):
    """Puts a fence around each doctest."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring is not None:
            text = _FLAG.sub("", obj.docstring.value)
            obj.docstring.value = _DOCTEST.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text)
