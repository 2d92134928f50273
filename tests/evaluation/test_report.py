import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from jasmine.errors import UserError
from jasmine.evaluation.report import (
    HTML_NAME,
    JSON_NAME,
    Evaluation,
    Findings,
    Measure,
    Picture,
    Table,
    check_free,
    write,
)

EVALUATION = Evaluation("/runs/a", "train_lam", 1200, "f00d", "8 clips of <data>", {"seed": 0, "num_clips": 8})
FINDINGS = Findings(
    measures=[
        Measure("psnr", "PSNR", 21.3456, "More is better & so on.", "dB", 0.21),
        Measure("frechet_mae", "Fréchet", float("nan"), "Not measured."),
    ],
    curves={"psnr": np.array([np.nan, 20.0])},
    tables=[Table("actions", "Shares.", np.array([[3, 1], [0, 0]]), ["latent 0", "latent 1"], ["left", "right"])],
    pictures=[Picture("A clip.", "image/gif", b"GIF89a")],
    notes=["A caveat."],
)


class Page(HTMLParser):
    """The page's text, what its pictures point to, and whether every tag that is opened is closed."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str):
        super().__init__()
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def output_dir(tmp_path: Path) -> epath.Path:
    write(epath.Path(tmp_path / "evaluation" / "1200"), EVALUATION, FINDINGS)
    return epath.Path(tmp_path / "evaluation" / "1200")


def test_json_is_strict_and_whole(output_dir: epath.Path):
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    record = json.loads((output_dir / JSON_NAME).read_text(), parse_constant=refuse)
    assert record["metrics"] == {"psnr": 21.3456, "frechet_mae": None}
    assert record["standard_errors"] == {"psnr": 0.21}
    assert record["curves"] == {"psnr": [None, 20.0]}
    assert record["tables"]["actions"]["counts"] == [[3, 1], [0, 0]]
    assert (record["job"], record["step"], record["options"]["num_clips"]) == ("train_lam", 1200, 8)


def test_page_stands_alone_and_says_what_it_is_of(output_dir: epath.Path):
    page = Page((output_dir / HTML_NAME).read_text())
    text = " ".join(page.words)
    assert page.open == []
    assert page.addresses == ["data:image/gif;base64,R0lGODlh"]
    assert "url(" not in text
    assert "@import" not in text
    for said in ("train_lam · step 1,200", "/runs/a", "8 clips of <data>", "--num_clips 8", "21.35 ± 0.21 dB", "–",
                 "More is better & so on.", "A caveat.", "75%"):  # fmt: skip
        assert said in text


def test_the_same_evaluation_is_replaced(output_dir: epath.Path):
    check_free(output_dir, EVALUATION)
    write(output_dir, EVALUATION, Findings([Measure("psnr", "PSNR", 1.0, "")]))
    assert json.loads((output_dir / JSON_NAME).read_text())["metrics"] == {"psnr": 1.0}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"options": {"seed": 1, "num_clips": 8}}, "seed 0, not 1"),
        ({"options": {"seed": 0, "num_clips": 8, "features": "mae"}}, "features None, not mae"),
        ({"step": 1300}, "step 1200, not 1300"),
        ({"weights": "beef"}, "weights f00d, not beef"),
    ],
)
def test_another_evaluation_is_left_alone(output_dir: epath.Path, change: dict, says: str):
    with pytest.raises(UserError, match=says):
        check_free(output_dir, dataclasses.replace(EVALUATION, **change))


@pytest.mark.parametrize("text", ["{", "[]", '{"job": "x"}'])
def test_a_file_that_is_no_evaluation_is_left_alone(output_dir: epath.Path, text: str):
    (output_dir / JSON_NAME).write_text(text)
    with pytest.raises(UserError, match="not the result of an evaluation"):
        check_free(output_dir, EVALUATION)


def test_somebody_elses_page_is_left_alone(output_dir: epath.Path):
    (output_dir / JSON_NAME).unlink()
    with pytest.raises(UserError, match=HTML_NAME):
        check_free(output_dir, EVALUATION)


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write(epath.Path(tmp_path / "file" / "sub"), EVALUATION, FINDINGS)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.12345, "", "0.1235"),
        (12.345, "", "12.35"),
        (-0.5, "dB", "-0.50 dB"),
        (-0.001, "dB", "0.00 dB"),
        (54321.0, "", "54321"),
        (float("inf"), "dB", "–"),
        (1.0, "", "1.0000"),
    ],
)
def test_numbers_have_digits_that_tell(value: float, unit: str, text: str):
    assert Measure("k", "l", value, "m", unit).text() == text
