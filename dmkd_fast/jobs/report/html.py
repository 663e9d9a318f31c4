"""HTML of the report: escaped text, numbers, tables, and the frame of a page with its style."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

REFRESH_S = 5
_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#5b6470;--line:#d5dae0;
--fill:#f4f6f8;--c0:#1f5fa6;--c1:#b4540a;--c2:#2a7d4f;--c3:#8e4585;--c4:#7a6a00;--c5:#00798c;
--c6:#a33;--c7:#555;--good:#2a7d4f;--bad:#a33;--mark:31 95 166}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e4e7eb;--soft:#98a2ae;
--line:#363d46;--fill:#1d2127;--c0:#7db4f0;--c1:#eba55c;--c2:#6fcf97;--c3:#d59bd0;--c4:#d6c44a;
--c5:#56c4d6;--c6:#f08a8a;--c7:#aaa;--good:#6fcf97;--bad:#f08a8a;--mark:125 180 240}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:980px;margin:0 auto;padding:20px 16px 48px}
h1{font-size:22px;line-height:1.3;margin:0 0 2px;overflow-wrap:anywhere}
h2{font-size:16px;margin:34px 0 8px;padding-top:10px;border-top:1px solid var(--line)}
h3{font-size:14px;margin:18px 0 6px}
p{margin:6px 0;max-width:75ch}
a{color:var(--c0)}
.soft,figcaption,.caption{color:var(--soft)}
figcaption,.caption{font-size:13px;line-height:1.4;max-width:75ch;margin-top:8px}
figure{margin:8px 0}
.state{border-left:4px solid var(--c0);background:var(--fill);padding:8px 12px;margin:12px 0}
.state.finished{border-color:var(--good)}
.state.killed,.state.interrupted,.state.failed{border-color:var(--bad)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(114px,1fr));gap:12px;
margin:16px 0 4px}
.facts div{border-top:2px solid var(--line);padding-top:4px}
.facts b{display:block;font-size:21px;font-weight:600;line-height:1.2;
font-variant-numeric:tabular-nums}
.facts span{font-size:13px;color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(280px,100%),1fr));
gap:8px 16px;align-items:start}
.charts figure{min-width:0}
svg{display:block;width:100%;height:auto;max-width:400px;font-size:11px}
svg.wide{max-width:620px}
svg text{fill:var(--soft)}
svg .title{fill:var(--ink);font-weight:600}
svg .axis{stroke:var(--soft);stroke-width:1;fill:none}
svg .grid{stroke:var(--line);stroke-width:1;fill:none}
svg .level{stroke-width:1.2;stroke-dasharray:4 3;fill:none}
svg .curve{fill:none;stroke-width:1.6;stroke-linejoin:round}
svg .k0{stroke:var(--c0)}svg .k1{stroke:var(--c1)}svg .k2{stroke:var(--c2)}
svg .k3{stroke:var(--c3)}svg .k4{stroke:var(--c4)}svg .k5{stroke:var(--c5)}
svg .k6{stroke:var(--c6)}svg .k7{stroke:var(--c7)}
svg circle.k0,svg rect.k0{fill:var(--c0)}svg circle.k1,svg rect.k1{fill:var(--c1)}
svg circle.k2{fill:var(--c2)}svg circle.k3{fill:var(--c3)}svg circle.k4{fill:var(--c4)}
svg circle.k5{fill:var(--c5)}svg circle.k6{fill:var(--c6)}svg circle.k7{fill:var(--c7)}
svg rect{stroke:none!important}
svg .cell{fill:rgb(var(--mark))}
svg text.on{fill:var(--paper)}svg text.off{fill:var(--ink)}
.key{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;margin:6px 0}
.key i{display:inline-block;width:18px;height:0;border-top:3px solid;vertical-align:middle;
margin-right:6px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;margin:8px 0}
th{font-weight:600;text-align:left;border-bottom:1px solid var(--soft)}
th,td{padding:3px 14px 3px 0;vertical-align:top;overflow-wrap:break-word}
td{border-bottom:1px solid var(--line)}
th.n,td.n{text-align:right;white-space:nowrap}
td.bar{width:35%;min-width:90px;vertical-align:middle}
td.bar i{display:block;height:9px;background:var(--c0);min-width:1px}
.rows{display:grid;grid-template-columns:minmax(70px,max-content) 1fr;gap:4px 12px;
align-items:center;font-size:13px}
.rows span{overflow-wrap:anywhere}
.rows img{max-width:100%;display:block;height:auto}
img{image-rendering:auto;background:var(--fill)}
img.small{image-rendering:pixelated}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(166px,1fr));gap:14px 12px}
.tiles figure{margin:0;min-width:0}
.tiles img{width:84px;height:84px;object-fit:contain;display:block}
.tiles figcaption{font-size:12px;overflow-wrap:anywhere;margin-top:2px}
.good{color:var(--good)}.bad{color:var(--bad)}
pre{background:var(--fill);padding:10px 12px;overflow-x:auto;font:12.5px/1.45 ui-monospace,
SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre-wrap;
overflow-wrap:anywhere;margin:8px 0}
img.confusion{width:min(100%,500px);image-rendering:pixelated;border:1px solid var(--line)}
@media(max-width:600px){th,td{padding-right:10px}th.bar,td.bar{display:none}
svg.wide{font-size:13px}svg.wide .on,svg.wide .off{font-size:15px}}
@media print{body{font-size:11px}main{max-width:none;padding:0}h2{break-after:avoid}
figure,tr,.tiles figure{break-inside:avoid}a{color:inherit}
.charts{grid-template-columns:repeat(3,1fr)}.scroll{overflow:visible}
:root{color-scheme:light;--paper:#fff;--ink:#000;--soft:#444;--line:#ccc;--fill:#f4f6f8;
--c0:#1f5fa6;--c1:#b4540a;--c2:#2a7d4f;--c3:#8e4585;--c4:#7a6a00;--c5:#00798c;--c6:#a33;
--c7:#555;--good:#2a7d4f;--bad:#a33;--mark:31 95 166}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def text(value: object) -> str:
    """Escape text for HTML and for attributes in double quotes."""
    return html.escape(str(value))


def shorten(value: object, length: int) -> str:
    """Escape a text of at most `length` characters; a longer one ends in an ellipsis."""
    words = str(value)
    return text(words if len(words) <= length else words[: length - 1] + "\u2026")


def percent(value: float | None, digits: int = 2) -> str:
    """Format a fraction in [0, 1] as a percentage; a dash for None."""
    return "\u2013" if value is None else f"{100 * value:.{digits}f}\u00a0%"


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with separators, and with at most `digits` significant digits if small."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def duration(seconds: float | None) -> str:
    """Format a number of seconds, such as `41.2 s`, `5 min 07 s` or `3 h 12 min`."""
    if seconds is None:
        return "\u2013"
    if seconds < 100:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 5940:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: str = "") -> str:
    """Return a table.

    Args:
        head: Names of the columns; not escaped.
        rows: Cells of each row; not escaped.
        numbers: One letter for each column: `n` a number (aligned to the right), `b` a fraction
            in [0, 1] that is drawn as a bar, anything else text.
    """
    kinds = numbers.ljust(len(head))

    def cell(tag: str, kind: str, value: Any) -> str:
        if kind == "b":
            drawn = f'<i style="width:{100 * value:.1f}%"></i>' if tag == "td" else value
            return f'<{tag} class="bar">{drawn}</{tag}>'
        return f'<{tag} class="n">{value}</{tag}>' if kind == "n" else f"<{tag}>{value}</{tag}>"

    lines = ["".join(cell("th", k, v) for k, v in zip(kinds, head, strict=True))]
    lines += ["".join(cell("td", k, v) for k, v in zip(kinds, row, strict=True)) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>{body}</table></div>'


def figure(content: str, caption: str) -> str:
    """Return content with a caption, which is not escaped; none if it is empty."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{content}{below}</figure>"


def section(title: str, *parts: str) -> str:
    """Return a section of the page; empty if all of its parts are."""
    content = "".join(parts)
    return f"<section><h2>{text(title)}</h2>{content}</section>" if content else ""


def document(title: str, content: str, *, is_running: bool = False) -> str:
    """Return a whole page that needs no other file and no script."""
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_S}">' if is_running else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        # Only what is in the page may be loaded, whatever a class name contains.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
        "img-src data:;style-src 'unsafe-inline'\">"
        f'{refresh}<link rel="icon" href="data:,"><title>{text(title)}</title>'
        f"<style>{_STYLE}</style></head><body><main>{content}</main></body></html>\n"
    )
