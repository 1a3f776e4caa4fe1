"""Class names and templates become a zero-shot head; whatever cannot be one is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lpclip.encoders.prompts import templates
from lpclip.encoders.zero_shot import zero_shot_weights
from lpclip.images.classes import ClassList, read_classes


class LetterEncoder:
    """A text's embedding is its count of each letter: an average of prompts can be checked by hand."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        self.batches.append(list(texts))
        counts = torch.tensor([[text.count(chr(97 + letter)) for letter in range(26)] for text in texts])
        return F.normalize(counts.float(), dim=1)


def test_a_row_of_the_head_is_the_normalised_mean_of_its_prompts():
    encoder = LetterEncoder()
    head = zero_shot_weights(
        encoder, ["cat", "zebra_fish"], templates=("a {}", "big {}, the {}"), batch_size=3
    )
    prompts = [["a cat", "big cat, the cat"], ["a zebra fish", "big zebra fish, the zebra fish"]]
    rows = [F.normalize(LetterEncoder().encode_text(own).mean(0), dim=0) for own in prompts]
    assert [len(batch) for batch in encoder.batches] == [3, 1]
    assert head.dtype == torch.float32
    torch.testing.assert_close(head, torch.stack(rows))


def test_the_head_can_be_trained_further():
    head = zero_shot_weights(LetterEncoder(), ["cat", "dog"], templates=("{}",)).requires_grad_()
    head.square().sum().backward()
    assert head.grad is not None


@pytest.mark.parametrize(("spec", "count"), [("default", 6), ("simple", 7), ("openai", 80)])
def test_named_templates_all_have_a_place_for_the_name(spec: str, count: int):
    found = templates(spec)
    assert len(found) == count
    assert all(template.count("{}") == 1 for template in found)


def test_templates_come_from_a_file(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("a sketch of a {}.\n\na {curly} {}\n")
    assert templates(str(path)) == ("a sketch of a {}.", "a {curly} {}")


@pytest.mark.parametrize(("content", "message"), [("\n\n", "holds no templates"), ("a photo\n", "has no {}")])
def test_a_bad_template_file_is_refused(tmp_path: Path, content: str, message: str):
    path = tmp_path / "prompts.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        templates(str(path))


def test_unknown_templates_are_refused():
    with pytest.raises(ValueError, match="use default, simple, openai or a text file"):
        templates("opnai")


def test_class_names_come_from_a_comma_list_or_a_file(tmp_path: Path):
    path = tmp_path / "names"
    path.write_text("\ufeffaquarium_fish\nsea lion \n\n", encoding="utf-8")
    assert read_classes("cat, sea lion").names == ("cat", "sea lion")
    assert read_classes(str(path)) == ClassList(names=("aquarium_fish", "sea lion"), labels=None)


def test_a_file_may_say_what_the_data_calls_each_class(tmp_path: Path):
    path = tmp_path / "classes.tsv"
    path.write_text("n02 \tdog, or puppy\nn01\tcat\n")
    assert read_classes(str(path)) == ClassList(names=("dog, or puppy", "cat"), labels=("n02", "n01"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "at least two class names are needed, got 0"),
        ("cat", "at least two class names are needed, got 1"),
        ("cat,,dog", "class name 2 of 3 is empty"),
        ("sea_lion,dog,Sea  lion", "class name 'sea lion' occurs twice"),
        ("nowhere/classes.txt", "no such file: nowhere/classes.txt"),
    ],
)
def test_lists_that_name_no_classes_are_refused(spec: str, message: str):
    with pytest.raises(ValueError, match=message):
        read_classes(spec)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tcat\ndog\n", "every line"),
        (b"a\tcat\na\tdog\n", "label 'a' occurs twice"),
        (b"cat\n\ndog\n", "class name 2 of 3 is empty"),
        (b"\xff\xfe\x00cat", "is not UTF-8 text"),
    ],
)
def test_class_files_that_cannot_be_meant_are_refused(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_classes(str(path))
