"""A report as one HTML file that opens without a network: tables, images and data are part of it.

    section = ReportSection("POPE", ["What was asked."], [table], [(Path("fig3.svg"), "Caption")])
    html = report_page("Results", [section])

Images are inlined as data URIs and CSV files as downloads. The page has contents and neither scripts nor
fonts, and can be printed. Independent of what is reported.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from llava.eval.benchmarks import DataError
from llava.eval.tables.plots import html_page
from llava.table import Table, TableCell, TableRow

_INLINED = 4 << 20  # bytes of a CSV file; larger ones are only named
_SVG_LOADS = re.compile(rb"""(?:href|src)\s*=\s*["'](?!#|data:)|url\(\s*["']?(?!["'#]|data:)|@import""")


@dataclass(frozen=True)
class ReportSection:
    """A section: paragraphs, tables, images with captions, data files, and body parts of pages of `plots`.

    `title` is plain text, like everything but `pages`.
    """

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    preformatted: Sequence[str] = ()
    images: Sequence[tuple[Path, str]] = ()
    data: Sequence[Path] = ()
    pages: Sequence[Path] = ()  # files that `html_page` wrote

    def html(self, anchor: str) -> str:
        """Return the section as HTML. Raises DataError for a file that cannot be part of the page."""
        parts = [f'<section id="{anchor}">\n<h2>{escape(self.title)}</h2>']
        parts += [f'<p class="notes">{escape(text)}</p>' for text in self.paragraphs]
        parts += [table.html(level=3) for table in self.tables]
        parts += [f"<pre>{escape(text)}</pre>" for text in self.preformatted]
        parts += [_body(path) for path in self.pages]
        for path, caption in self.images:
            alt = escape(caption, quote=True)
            picture = f'<img src="{_image(path)}" alt="{alt}">'
            parts.append(f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>")
        links = [_download(path) for path in self.data]
        parts += [f'<p class="notes">Data: {", ".join(links)}</p>'] if links else []
        return "\n".join([*parts, "</section>"])


def report_page(
    title: str, sections: Sequence[ReportSection], credit: Mapping[str, str] | None = None
) -> str:
    """Return the page with contents and sections.

    Args:
        credit: Names of sources with their addresses, linked at the end.
    Raises:
        DataError: A file is missing, not an image, or loads something from elsewhere.
    """
    anchors = [f"section-{number}" for number in range(1, len(sections) + 1)]
    items = [
        f'<li><a href="#{anchor}">{escape(section.title)}</a></li>'
        for anchor, section in zip(anchors, sections, strict=True)
    ]
    parts = [f'<nav class="contents"><ol>{"".join(items)}</ol></nav>']
    parts += [section.html(anchor) for anchor, section in zip(anchors, sections, strict=True)]
    links = [
        f'<a class="credit" href="{escape(address, quote=True)}">{escape(name)}</a>'
        for name, address in (credit or {}).items()
    ]
    parts += [f'<p class="notes">{"; ".join(links)}</p>'] if links else []
    return html_page(title, parts)


def read_markdown(path: Path) -> ReportSection:
    """Read a file of paragraphs, pipe tables and code blocks, such as `Table.markdown` writes, as a section.

    The first heading is its title, and a heading above a table the title of that table.
    """
    title, paragraphs, tables, preformatted = "", [], [], []
    heading, block, code = "", list[str](), False
    for line in [*_read(path).decode("utf-8", errors="replace").splitlines(), ""]:
        if line.startswith("```"):
            if code:
                preformatted.append("\n".join(block))
            block, code = [], not code
        elif code or (line.strip() and not line.startswith("#")):
            block.append(line)
        elif block and block[0].startswith("|"):
            tables.append(_pipe_table(heading, block))
            heading, block = "", []
        elif block:
            paragraphs.append(_plain(" ".join(block)))
            block = []
        if not code and line.startswith("#"):
            heading = _plain(line.lstrip("#").strip())
            title = title or heading
    return ReportSection(title, paragraphs, tables, preformatted)


def _pipe_table(title: str, lines: Sequence[str]) -> Table:
    """Read a pipe table; bold cells are strong."""
    cut = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rows = [
        TableRow([TableCell(_plain(cell), strong=cell.startswith("**")) for cell in cells])
        for cells in cut[1:]
        if not all(re.fullmatch(r":?-+:?", cell) for cell in cells)
    ]
    return Table(title, [_plain(cell) for cell in cut[0]], rows)


def _plain(text: str) -> str:
    """Return a text of Markdown without bold, code marks and escapes."""
    return re.sub(r"\\([^\w\s]|_)", r"\1", re.sub(r"\*\*|(?<!\\)`", "", text))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Run the step that writes it.") from error


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _image(path: Path) -> str:
    """Return an image as a data URI; its kind is that of the content, not of the name."""
    content = _read(path)
    start = content[:1024].lstrip()
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return _uri("image/png", content)
    if content.startswith(b"\xff\xd8\xff"):
        return _uri("image/jpeg", content)
    if not start.startswith((b"<svg", b"<?xml", b"<!--")) or b"<svg" not in content:
        raise DataError(f"{path}: not a PNG, JPEG or SVG image. Draw it again.")
    if found := _SVG_LOADS.search(content):
        shown = content[found.start() : found.start() + 60].decode(errors="replace")
        raise DataError(f"{path}: loads something from elsewhere ({shown!r}). Embed it as a data: URI.")
    return _uri("image/svg+xml", content)


def _download(path: Path) -> str:
    content = _read(path)
    size = f"{max(1, len(content) // 1000)} kB"
    if len(content) > _INLINED:
        return f"{escape(path.name)} ({size}, not part of this page)"
    name = escape(path.name, quote=True)
    return f'<a download="{name}" href="{_uri("text/csv", content)}">{escape(path.name)}</a> ({size})'


def _body(path: Path) -> str:
    """Return the body of a page of `html_page`, with its headings one level lower."""
    text = _read(path).decode("utf-8", errors="replace")
    found = re.search(r"<body>(.*)</body>", text, re.DOTALL)
    if found is None:
        raise DataError(f"{path}: not a page of this package. Write it again.")
    return re.sub(r"(</?h)([1-5])\b", lambda tag: f"{tag[1]}{int(tag[2]) + 2 - (tag[2] != '1')}", found[1])
