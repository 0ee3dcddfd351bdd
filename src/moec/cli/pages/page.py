"""The frame of a page, its tables and its colours."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5d6772;--line:#d5dae0;--paper:#fff}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#9aa5b1;--line:#39424c;--paper:#14181d}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:62rem;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}
p{margin:.3rem 0 .8rem;max-width:48rem}p,.note{color:var(--soft)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.6rem 0}
th,td{padding:.2rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{font-weight:600}
svg{display:block;max-width:100%;height:auto;margin:.6rem 0}svg text{fill:var(--ink);font:12px system-ui,sans-serif}
svg .soft{fill:var(--soft)}svg .grid{stroke:var(--line);fill:none}
.wide{overflow-x:auto}
"""

COLOURS = ("#2f6fde", "#d9622b", "#2a9d63", "#a34bc4", "#c9a227", "#d03a6a", "#4aa3b5", "#7d6b5d")
"""Of lines, in turn; told apart on light and dark paper."""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole document."""
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def section(title: str, text: str, *parts: str) -> str:
    """A heading, a paragraph that says what follows, and what follows."""
    return f"<h2>{escape(title)}</h2>\n<p>{escape(text)}</p>\n" + "\n".join(parts)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows under a header; the first column to the left, the others to the right."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'
