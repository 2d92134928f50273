"""Reports on runs, looked at as a browser would."""

from html.parser import HTMLParser

import pytest

from launch.report import Report, gather
from launch.report_page import page
from launch.run_dir import RunDir
from launch.standing import read_standing


class Page(HTMLParser):
    """Checks that tags nest, and notes what a browser would do."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read_report(run: RunDir) -> tuple[Report, str, Page]:
    """Return the report of a run and its page, after checks of what must be true of every report."""
    found = gather(run, read_standing(run))
    text = page(found)
    read = Page(text)
    assert read.open == ["html", "body"] or not read.open
    assert not {"script", "iframe", "link", "object"} & set(read.tags)
    assert not read.handlers
    assert all(link.startswith("data:image/") for link in read.links), "it needs something from elsewhere"
    seconds = found.account.seconds()
    assert sum(seconds.values()) == pytest.approx(found.account.wall, abs=1e-6)
    return found, text, read
