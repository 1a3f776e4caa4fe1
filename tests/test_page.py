"""A page is one file that needs nothing else, and shows any text as it is."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from lpclip.images.views import CORRUPTIONS
from lpclip.report.evaluation_figures import corruption_figure, severity_figures
from lpclip.report.page import Example, Picture, Section, render_page
from lpclip.report.style import colours
from lpclip.report.training_figures import confusion_matrix_figure

VOID = {"meta", "link", "img", "br"}
NASTY = ("<b>x</b>", "a & b", "$x$", "\"quoted\" 'name'", "</style><script>alert(1)</script>", "{{ 7 * 7 }}")


class Page(HTMLParser):
    """All elements with their attributes and texts; elements must be closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), "an attribute is there twice"
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.elements[index][2].append(data)

    def texts(self, tag: str) -> list[str]:
        return [" ".join("".join(texts).split()) for name, _, texts in self.elements if name == tag]

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]


def thumbnail(kind: str = "jpeg", size: tuple[int, int] = (32, 24)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "#cc3344").save(buffer, kind)
    return buffer.getvalue()


def full_section(text: str) -> Section:
    matrix = confusion_matrix_figure([[3, 1], [0, 2]], [text, "other"])
    example = Example(image=thumbnail(), name=text, truth=text, predictions={text: (text, 0.5)})
    return Section(
        title=text,
        text=f"{text}\n\n{text}",
        tables=[(text, [{text: text, "accuracy %": 0.5}, {text: "b", "accuracy %": None}])],
        legend=colours([text, "zero-shot"]),
        pictures=[Picture(caption=text, figure=matrix, alt=text)],
        examples=[(text, [example])],
    )


@pytest.mark.parametrize("text", NASTY)
def test_any_text_is_shown_as_it_is(text: str) -> None:
    page = Page(render_page(text, facts={text: text}, sections=[full_section(text), full_section("plain")]))
    for tag in (
        "title",
        "h1",
        "h2",
        "h3",
        "p",
        "dt",
        "dd",
        "caption",
        "th",
        "figcaption",
        "strong",
        "a",
        "li",
    ):
        assert any(text in found for found in page.texts(tag)), tag
    assert not {"b", "script"} & {name for name, _, _ in page.elements}
    assert len(page.attributes("style")) == 1
    alts = [attributes["alt"] for attributes in page.attributes("img")]
    assert alts[:2] == [text, f"{text}, {text}"]


def test_nothing_comes_from_elsewhere() -> None:
    html = render_page("Report", facts={"a": "b"}, sections=[full_section("one"), full_section("two")])
    page = Page(html)
    sources = [
        value
        for _, attributes, _ in page.elements
        for name, value in attributes.items()
        if name in ("href", "src", "srcset", "action", "data")
    ]
    assert len(sources) == 7
    assert all(value and value.startswith(("data:", "#")) for value in sources)
    assert not any(token in html for token in ("http://", "https://", "url(", "@import", "<script"))


def test_pictures_are_data_of_their_own_size() -> None:
    figure = confusion_matrix_figure(np.eye(2), ["a", "b"])
    section = Section(
        title="Pictures",
        pictures=[Picture(caption="", figure=figure, alt="matrix")],
        examples=[("Images", [Example(image=thumbnail("jpeg")), Example(image=thumbnail("png"))])],
    )
    images = Page(render_page("Report", facts={}, sections=[section])).attributes("img")
    kinds, sizes = [], []
    for attributes in images:
        head, data = str(attributes["src"]).split(",")
        picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        picture.load()
        assert head == f"data:{Image.MIME[str(picture.format)]};base64"
        kinds.append(picture.format)
        sizes.append(picture.size)
    assert kinds == ["PNG", "JPEG", "PNG"]
    assert sizes[1:] == [(32, 24), (32, 24)]
    assert sizes[0] == pytest.approx([2 * int(str(images[0][side])) for side in ("width", "height")], abs=2)


def test_tables_have_captions_scopes_and_numbers_on_the_right() -> None:
    rows = [
        {"classifier": "zero-shot", "accuracy %": 0.4712, "gain": "-", "images": 6000},
        {"classifier": "probe", "accuracy %": 1.0, "gain": "+7.1 ± 0.3 *", "NLL": 0.5},
    ]
    page = Page(
        render_page(
            "Report", facts={}, sections=[Section(title="Tables", tables=[("Clean", rows), ("None", [])])]
        )
    )
    assert page.texts("caption") == ["Clean"]
    assert page.texts("tr") == [
        "classifier accuracy % gain images NLL",
        "zero-shot 47.1 - 6,000 -",
        "probe 100.0 +7.1 ± 0.3 * - 0.500",
    ]
    heads = [(attributes["scope"], attributes.get("class")) for attributes in page.attributes("th")]
    assert heads == [("col", None), *[("col", "number")] * 4, *[("row", None)] * 2]
    assert {attributes.get("class") for attributes in page.attributes("td")} == {"number"}


def test_examples_say_in_words_what_is_right_and_wrong() -> None:
    examples = [
        Example(
            image=thumbnail(), truth="cat", predictions={"zero-shot": ("dog", 0.456), "probe": ("cat", 1.0)}
        ),
        Example(image=thumbnail(), predictions={"probe": ("cat", 0.0)}),
        Example(image=thumbnail()),
    ]
    page = Page(
        render_page("Report", facts={}, sections=[Section(title="Images", examples=[("Some", examples)])])
    )
    assert page.texts("dd") == ["✗ wrong: dog 46%", "✓ right: cat 100%", "cat 0%"]
    assert [attributes["alt"] for attributes in page.attributes("img")] == ["image, cat", "image", "image"]


def test_images_without_a_caption_have_no_empty_heading() -> None:
    sections = [Section(title="Images", examples=[("", [Example(image=thumbnail())])])]
    page = Page(render_page("Report", facts={}, sections=sections))
    assert page.texts("h3") == []
    assert len(page.attributes("img")) == 1


def test_other_images_are_refused() -> None:
    section = Section(title="Images", examples=[("Some", [Example(image=b"GIF89a...")])])
    with pytest.raises(ValueError, match="PNG or JPEG"):
        render_page("Report", facts={}, sections=[section])


def test_empty_parts_leave_nothing_behind() -> None:
    page = Page(render_page("Report", facts={}, sections=[Section(title="Empty", examples=[("None", [])])]))
    names = {name for name, _, _ in page.elements}
    assert not names & {"nav", "dl", "ul", "table", "figure", "img", "p", "h3"}
    assert (page.texts("h1"), page.texts("h2")) == (["Report"], ["Empty"])
    assert Page(render_page("Report", facts={}, sections=[])).texts("h2") == []


def test_headings_are_in_order_and_links_lead_somewhere() -> None:
    page = Page(render_page("Report", facts={}, sections=[full_section("one"), full_section("two")]))
    headings = [name for name, _, _ in page.elements if name in ("h1", "h2", "h3", "h4")]
    assert headings == ["h1", "h2", "h3", "h2", "h3"]
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert [attributes["href"] for attributes in page.attributes("a")] == ["#section-1", "#section-2"]
    assert {"section-1", "section-2"} <= set(ids)
    assert page.attributes("html") == [{"lang": "en"}]


def test_tables_of_equal_captions_are_told_apart_by_their_sections() -> None:
    """A screen reader lists the regions of a page by their names."""
    sections = [Section(title=title, tables=[("Mean", [{"a": 1}])]) for title in ("Fog", "Snow")]
    regions = Page(render_page("Report", facts={}, sections=sections)).attributes("div")
    assert [each["aria-label"] for each in regions if each.get("role") == "region"] == [
        "Fog: Mean",
        "Snow: Mean",
    ]


def test_small_pictures_have_rows_of_their_own() -> None:
    curves = {name: {"probe": {3: 0.5}} for name in ("fog", "snow")}
    small = [
        Picture(caption="", figure=figure, alt=name)
        for name, figure in severity_figures(curves, clean={}).items()
    ]
    large = Picture(caption="", figure=corruption_figure(curves), alt="overview")
    section = Section(title="Corruptions", pictures=[large, *small, large])
    page = Page(render_page("Report", facts={}, sections=[section]))
    order = [
        attributes.get("class") or name for name, attributes, _ in page.elements if name in ("figure", "div")
    ]
    assert order == ["pictures", "figure", "pictures", "small", "small", "pictures", "figure"]


def test_a_whole_evaluation_is_a_small_file() -> None:
    names = ["zero-shot", "probe", "supervised", "one more", "and another"]
    generator = np.random.default_rng(0)
    clean = {name: float(generator.uniform(0.5, 0.9)) for name in names}
    curves = {
        corruption: {
            name: {step: float(generator.uniform(0, clean[name])) for step in range(1, 6)} for name in names
        }
        for corruption in CORRUPTIONS[:15]
    }
    pictures = [
        Picture(caption="", figure=figure, alt=name)
        for name, figure in {
            "overview": corruption_figure(curves, clean=clean),
            **severity_figures(curves, clean=clean),
        }.items()
    ]
    section = Section(title="Corruptions", legend=colours(clean), pictures=pictures)
    html = render_page("Report", facts={}, sections=[section])
    assert len(html.encode()) < 500_000
    assert len(Page(html).attributes("img")) == 16
