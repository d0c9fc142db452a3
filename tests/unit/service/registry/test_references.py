"""How `--weights` names what is on another machine, and what is refused at once."""

import pytest

from service.registry.references import (
    Reference,
    RegisteredModel,
    RunFile,
    Url,
    one_line,
    parse_reference,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("pretrained", None),
        ("models/flowers.pth", None),
        ("mlflow.pth", None),
        ("mlflow:models:/flowers/12", RegisteredModel("flowers", "12", "")),
        ("mlflow:models:/flowers@champion", RegisteredModel("flowers", "", "champion")),
        ("mlflow:models:/main.vision.flowers/1", RegisteredModel("main.vision.flowers", "1", "")),
        ("mlflow:runs:/0a1b", RunFile("0a1b", "")),
        ("mlflow:runs:/0a1b/", RunFile("0a1b", "")),
        ("mlflow:runs:/0a1b/best//w.pth", RunFile("0a1b", "best/w.pth")),
        ("https://example.org/a/w.pth", Url("https://example.org/a/w.pth")),
        ("s3://bucket/w.pth", Url("s3://bucket/w.pth")),
        ("gs://bucket/a/w.pth#x", Url("gs://bucket/a/w.pth")),
    ],
)
def test_what_is_named(text: str | None, expected: Reference | None) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("mlflow:flowers", "must be mlflow:models:/NAME@ALIAS"),
        ("mlflow:models:/flowers", "must be mlflow:models:/NAME@ALIAS"),
        ("mlflow:models:/flowers/latest", "must be mlflow:models:/NAME@ALIAS"),
        ("mlflow:models:/flowers/0", "must be mlflow:models:/NAME@ALIAS"),
        ("mlflow:models:/a/b/1", "must be mlflow:models:/NAME@ALIAS"),
        ("mlflow:runs:/0a1b/../0a1c", "must be mlflow:models:/NAME@ALIAS"),
        ("mlflow:runs:/0a1b//etc", "must be mlflow:models:/NAME@ALIAS"),
        ("http://example.org/w.pth", "must begin with https://, s3://, gs://"),
        ("file:///w.pth", "must begin with https://, s3://, gs://"),
        ("https://example.org/", "must be the URL of a file"),
        ("s3://bucket", "must be the URL of a file"),
        ("https:///w.pth", "must be the URL of a file"),
        ("https://example.org/%2e%2e", "must be the URL of a file"),
    ],
)
def test_what_names_nothing(text: str, rule: str) -> None:
    with pytest.raises(ValueError, match=f"^{rule}"):
        parse_reference(text)


def test_secrets_of_a_url_are_not_shown() -> None:
    with pytest.raises(ValueError, match=r"~/\.netrc") as refused:
        parse_reference("https://user:secret@example.org/w.pth")
    assert "secret" not in str(refused.value)
    url = parse_reference("https://example.org/w%20x.pth?Signature=secret")
    assert isinstance(url, Url)
    assert (url.name, url.shown) == ("w x.pth", "https://example.org/w%20x.pth")


def test_secrets_are_not_in_an_error_of_a_client() -> None:
    error = OSError("GET http://user:secret@host:5000/api?token=secret&x=1 failed:\n refused")
    assert one_line(error) == "GET http://host:5000/api?… failed: refused"
    assert one_line(TimeoutError()) == "TimeoutError"
