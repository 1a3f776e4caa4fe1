"""No password, key, token or signature of a URI is shown, stored or logged; all else of it is."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lpclip.config import SourceConfig, UserError
from lpclip.credentials import holds_secret, redact
from lpclip.images.fetch import fetch_all, reason
from lpclip.images.open import open_source

# Long enough not to be a part of what stays.
SECRETS = st.text(string.ascii_letters + string.digits + "+%_-~:,/", min_size=12, max_size=40)
SECRETS = SECRETS.filter(lambda text: text[-1] not in ",:")  # marks of the sentence around it
WORDS = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=8)
SCHEMES = st.sampled_from(["s3", "https", "http", "abfs", "gs", "postgresql", "fsspec+s3", "mysql+pymysql"])
NAMES = [
    *(
        "X-Amz-Signature",
        "X-Amz-Credential",
        "X-Amz-Security-Token",
        "AWSAccessKeyId",
        "Signature",
        "secret_key",
    ),
    *(
        "X-Goog-Signature",
        "X-Goog-Credential",
        "GoogleAccessId",
        "sig",
        "sas_token",
        "access_token",
        "api_key",
    ),
    *("apikey", "password", "passwd", "pwd", "client_secret", "account_key", "auth", "session_token"),
    *("jwt", "sign", "hmac", "code", "ticket", "session"),
]


@st.composite
def places(draw: st.DrawFn) -> tuple[str, str]:
    """A scheme with a host, and a path with harmless options."""
    host = draw(WORDS) + draw(st.sampled_from(["", ":8020", ".example.org", ".example.org:9000"]))
    path = "/".join(draw(st.lists(WORDS, min_size=1, max_size=3)))
    options = draw(st.lists(st.sampled_from(["region=us-east-1", "se=2030", "monkey", "page=3"]), max_size=2))
    return f"{draw(SCHEMES)}://", f"{host}/{path}?{'&'.join(['v=1', *options])}"


@given(
    places(),
    SECRETS,
    st.sampled_from(NAMES),
    st.sampled_from(["{}", "cannot read '{}': refused", "--data={} x"]),
)
def test_a_secret_in_an_option_goes_and_the_rest_stays(
    place: tuple[str, str], secret: str, name: str, sentence: str
) -> None:
    uri = "".join(place)
    text = sentence.format(f"{uri}&{name}={secret}&end=1")
    assert holds_secret(text)
    assert redact(text) == sentence.format(f"{uri}&{name}=...&end=1")
    assert not holds_secret(sentence.format(uri))
    assert redact(sentence.format(uri)) == sentence.format(uri)


@given(places(), WORDS, SECRETS.filter(lambda text: not text.isdigit()), st.sampled_from(["", "/", "/x/"]))
def test_a_password_goes_with_its_user(place: tuple[str, str], user: str, secret: str, slash: str) -> None:
    scheme, rest = place
    password = f"{secret[:6]}{slash}{secret[6:]}"
    text = f"{scheme}{user}:{password}@{rest}"
    if re.match(r"\d{1,5}/", password):
        return  # a port, and a path with an @
    assert holds_secret(text)
    assert redact(text) == f"{scheme}{rest}"


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b:c.png",
        "hdfs://namenode:8020/user@x/y",
        "file:///a:b@c",
        "photos/key=1/token=2.jpg?sig=3",
        "https://example.org/author=me?page=2&author=3#top",
    ],
)
def test_what_only_looks_like_one_stays(text: str) -> None:
    assert not holds_secret(text)
    assert redact(text) == text


def test_a_password_of_more_digits_than_a_port_is_one() -> None:
    assert redact("s3://user:0123456789/x@bucket/y") == "s3://bucket/y"
    assert not holds_secret("hdfs://namenode:65535/user@x/y")


def test_a_token_behind_a_name_on_the_hub_is_one() -> None:
    assert holds_secret("hf-hub:owner/name?token=abcdef")
    assert redact("'hf-hub:owner/name?token=abcdef' is no name") == "'hf-hub:owner/name?token=...' is no name"
    assert not holds_secret("hf-hub:owner/token")


def test_signed_links_are_read_and_their_signatures_are_in_no_id(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    links = [f"https://127.0.0.1:9/{n}.png?X-Amz-Signature=abcdef{n}&v={n}" for n in (1, 2)]
    path = tmp_path / "list.csv"
    path.write_text("\n".join(["url", "1.png", *links]))
    source = open_source(str(path), config=SourceConfig(schemes="https"))
    ids = [f"https://127.0.0.1:9/{n}.png?X-Amz-Signature=...&v={n}" for n in (1, 2)]
    assert [name for name, _ in source.reader.listed(source.units[0])] == ["1.png", *ids]
    assert all(link in source.units[0] for link in links)
    path.write_text("\n".join(["url,id", f"1.png,{links[0]}"]))
    source = open_source(str(path), config=SourceConfig(schemes="https"))
    assert [name for name, _ in source.reader.listed(source.units[0])] == ids[:1]
    again = [*links, links[0].replace("abc", "xyz")]
    path.write_text("\n".join(["url", "1.png", *again]))
    source = open_source(str(path), config=SourceConfig(schemes="https"))
    assert [name for name, _ in source.reader.listed(source.units[0])] == ["1.png", *ids, f"{ids[0]}#2"]
    path.write_text("\n".join(["url", "1.png", *links, links[0]]))
    with pytest.raises(UserError, match="duplicates of 1 id") as refused:
        open_source(str(path), config=SourceConfig(schemes="https"))
    assert "abcdef" not in str(refused.value)


def test_signed_links_are_no_ids_in_parquet(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    links = [f"https://127.0.0.1:9/{n}.png?sig=abcdef{n}&v={n}" for n in (1, 2)]
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"id": links, "path": ["1.png"] * 2}), path)
    for limit in (None, 1):
        source = open_source(str(path), config=SourceConfig(), limit=limit)
        for unit in source.units:
            listed = [name for name, _ in source.reader.listed(unit)]
            assert listed == [row.id for row in source.reader.rows(unit)]
            assert {*listed} <= {f"https://127.0.0.1:9/{n}.png?sig=...&v={n}" for n in (1, 2)}
    pq.write_table(pa.table({"id": [links[0], f"{links[0]}&sig=other"], "path": ["1.png"] * 2}), path)
    open_source(str(path), config=SourceConfig())
    pq.write_table(pa.table({"id": [links[0], links[0].replace("abc", "xyz")], "path": ["1.png"] * 2}), path)
    with pytest.raises(UserError, match="duplicates of 1 id") as refused:
        open_source(str(path), config=SourceConfig())
    assert "def1" not in str(refused.value)


def test_reasons_hold_no_secret() -> None:
    error = OSError("cannot read https://example.org/1.png?sig=abcdef: refused")
    assert reason(error) == "cannot read https://example.org/1.png?sig=...: refused"
    uri = "http://reader:abcdef@127.0.0.1:9/1.png"
    (found,) = fetch_all([uri], root="", max_bytes=10, schemes=("http",), timeout=1)
    assert isinstance(found, ValueError)
    assert "abcdef" not in str(found)
    assert str(found) == "a URI with a user name or password, which is sent to no server"
