"""Building blocks of an HTML page without external files; arguments are escaped unless `Html`."""

import base64
import html
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, "Segoe UI", sans-serif; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; color: #1f2328; background: #fff }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .8rem; padding-bottom: .25rem;
     border-bottom: 1px solid #d8dee4 }
p.lead { font-size: 1.1rem; margin: .3rem 0 }
p.note { color: #59636e; font-size: .9rem } figcaption { font-weight: 600; font-size: .95rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .7rem;
         margin: 1.2rem 0 }
.tile { border: 1px solid #d8dee4; border-radius: 8px; padding: .6rem .8rem }
.tile b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums }
.tile span { display: block; font-size: .9rem } .tile span + span { color: #59636e }
.scroll { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; font-size: .92rem }
td, th { padding: .25rem 1.2rem .25rem 0; text-align: left; vertical-align: top;
         border-bottom: 1px solid #eef1f4 }
th { font-weight: 600; color: #59636e; vertical-align: bottom }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } td.n { white-space: nowrap }
th.n { min-width: 4rem } td.w { min-width: 14rem; overflow-wrap: anywhere }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
           gap: 1rem; align-items: start }
figure { margin: 0 }
img { max-width: 100%; height: auto; display: block }
figcaption { margin-bottom: .3rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; border-radius: 8px;
      padding: .8rem; margin: .6rem 0; font-size: .9rem }
details { margin: .6rem 0 } summary { cursor: pointer; color: #0550ae }
"""


class Html(str):
    """A string of HTML, which `escape` does not escape again."""


def escape(value: Any) -> Html:
    """Returns a value as HTML text."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def page(title: str, parts: Sequence[str]) -> str:
    """Returns a complete HTML document."""
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
            f"<body>{''.join(parts)}</body></html>\n")


def section(title: str, *parts: str) -> Html:
    """Returns a heading and its content, or an empty string if there is no content."""
    content = "".join(parts)
    return Html(f"<h2>{escape(title)}</h2>{content}" if content else "")


def folded(title: str, content: str) -> Html:
    """Returns collapsed content, which a click on its title expands."""
    return Html(f"<details><summary>{escape(title)}</summary>{content}</details>")


# Numbers ------------------------------------------------------------------------------------------


def format_score(value: Any) -> str:
    """Formats a measured value for a table or a tile.

    Example:
        >>> [format_score(x) for x in (5.46729, 31.25, 198.951, 12345.6, 0.00002, 30, None)]
        ['5.467', '31.25', '199.0', '12,346', '2e-05', '30', '–']
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size and size < 0.001:
        return f"{value:.2g}"
    digits = 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0
    return f"{value:,.{digits}f}"


def format_setting(value: Any) -> str:
    """Formats a setting without rounding.

    Example:
        >>> [format_setting(x) for x in (1e-06, None, [16, 32], True, "")]
        ['1e-06', '–', '16, 32', 'yes', '–']
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None or value in ("", {}) else str(value)


def format_seconds(seconds: float) -> str:
    """Formats a duration.

    Example:
        >>> format_seconds(14.2), format_seconds(750), format_seconds(7380)
        ('14 s', '12 min 30 s', '2 h 3 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return (f"{minutes} min {rest} s" if minutes < 60
            else f"{minutes // 60} h {minutes % 60} min")


# Tables and figures -------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A number shown in large type, with its name and a note."""

    name: str
    value: Any
    note: str = ""


def tiles(found: Sequence[Tile]) -> Html:
    """Returns tiles side by side."""
    return Html("" if not found else '<div class="tiles">' + "".join(
        f'<div class="tile"><b>{escape(format_score(tile.value))}</b><span>{escape(tile.name)}'
        f"</span><span>{escape(tile.note)}</span></div>" for tile in found) + "</div>")


def key_value_table(values: Mapping[str, Any], format_value: Callable = format_score) -> Html:
    """Returns a table of two columns; numbers are right-aligned."""
    return table([], list(values.items()), format_value)


def table(
    header: Sequence[str], rows: Sequence[Sequence[Any]], format_value: Callable = format_score
) -> Html:
    """Returns a table, which scrolls horizontally if it is wider than the page; numbers are
    formatted.
    """
    if not rows:
        return Html("")
    numeric = [all(row[i] is None or _is_number(row[i]) for row in rows)
               for i in range(len(rows[0]))]
    head = "".join(f"<th{' class=n' if n else ''}>{escape(name)}</th>"
                   for name, n in zip(header, numeric))
    body = "".join("<tr>" + "".join(_cell(x, format_value) for x in row) + "</tr>" for row in rows)
    return Html(f'<div class="scroll"><table>{f"<tr>{head}</tr>" if head else ""}{body}'
                "</table></div>")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any, format_value: Callable) -> str:
    if isinstance(value, Html):
        return f"<td>{value}</td>"
    shown = format_value(value)
    kind = " class=n" if _is_number(value) else " class=w" if len(shown) > 40 else ""
    return f"<td{kind}>{escape(shown)}</td>"


def figure(png: bytes, caption: str) -> Html:
    """Returns a PNG image with its caption."""
    data = base64.b64encode(png).decode()
    return Html(f"<figure><figcaption>{escape(caption)}</figcaption>"
                f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}"></figure>')


def figures(found: Sequence[str]) -> Html:
    """Returns figures in a grid with as many columns as fit the page."""
    return Html(f'<div class="figures">{"".join(found)}</div>' if found else "")


def plot(draw: Callable[[Path], Any], caption: str) -> Html:
    """Returns a figure of the PNG that `draw` saves at its argument, a path."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plot.png"
        draw(path)
        return figure(path.read_bytes(), caption)
