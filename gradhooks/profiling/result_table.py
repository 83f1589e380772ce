"""Results that print as a table, and that a notebook shows as one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from tabulate import tabulate


class TableContent(NamedTuple):
    """A table: headers, rows of the same length, and lines of text below it."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def render(self, table_format: str) -> str:
        """Return the table without the notes: the first column aligned left, the others right."""
        alignment = ("left", *["right"] * (len(self.headers) - 1)) if self.rows else None
        return tabulate(
            self.rows, headers=self.headers, tablefmt=table_format, disable_numparse=True, colalign=alignment
        )


class ResultTable(ABC):
    """Base of the results of this package: prints as a Markdown table, and as HTML in a notebook."""

    @abstractmethod
    def table_content(self) -> TableContent:
        """Return what the table shows."""

    def __str__(self) -> str:
        content = self.table_content()
        return "\n".join([content.render("github"), *content.notes])

    def _repr_html_(self) -> str:
        content = self.table_content()
        return "\n".join([content.render("html"), *(f"<p>{escape(note)}</p>" for note in content.notes)])
