"""The payload codec: what may be one, and what is told of one that fails."""

from __future__ import annotations

from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from celery_durable.exceptions import CodecError, ConfigurationError, SerializationError
from celery_durable.seal import NO_SEAL, PayloadCodec, Seal
from tests.fixtures import codecs
from tests.fixtures.codecs import Encrypted, Failing, new_key


class Odd:
    """Returns, or raises, what it was given."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def encode(self, data: bytes) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    decode = encode


def test_what_is_sealed_is_opened() -> None:
    """By the same keys."""
    codec: PayloadCodec = Encrypted(new_key())
    seal = Seal.of(codec)
    assert seal.is_set
    sealed = seal.encode(b"data", "it")
    assert b"data" not in sealed
    assert seal.decode(sealed, "it") == b"data"


def test_a_dotted_path_names_an_object() -> None:
    """As Celery's own settings have it."""
    for path in ("tests.fixtures.codecs:from_environment", "tests.fixtures.codecs.from_environment"):
        seal = Seal.of(path)
        assert codecs.from_environment.decode(seal.encode(b"data", "it")) == b"data"


def test_without_a_codec_nothing_is_sealed() -> None:
    """And what was sealed elsewhere is an error that names the setting."""
    assert not NO_SEAL.is_set
    assert NO_SEAL.encode(b"data", "it") == b"data"
    with pytest.raises(CodecError, match=r"^The value was encoded .*the setting durable_payload_codec"):
        NO_SEAL.decode(b"data", "The value")


@pytest.mark.parametrize("setting", ["no.such.module:codec", "tests.fixtures.codecs:missing", "nothing"])
def test_a_path_that_leads_nowhere(setting: str) -> None:
    """The error names the setting and the path."""
    with pytest.raises(ConfigurationError, match=f"durable_payload_codec is '{setting}', which can't be imported"):
        Seal.of(setting)


@pytest.mark.parametrize("setting", ["os:path", "tests.fixtures.codecs:Encrypted"])
def test_a_path_to_something_else(setting: str) -> None:
    """A module, or the class of a codec, is none."""
    with pytest.raises(ConfigurationError, match="must be an object with the methods encode"):
        Seal.of(setting)


def test_a_codec_that_raises() -> None:
    """Its error is the cause; a wrong key's has no text of its own."""
    codec = Failing(Encrypted(new_key()))
    codec.fails = ["encode"]
    with pytest.raises(CodecError, match=r"The value can't be encoded.*\(ConnectionError: the server") as caught:
        Seal.of(codec).encode(b"data", "The value")
    assert isinstance(caught.value, SerializationError)
    assert isinstance(caught.value.__cause__, ConnectionError)
    sealed = Encrypted(new_key()).encode(b"data")
    with pytest.raises(CodecError, match=r"The value can't be decoded.*\(InvalidToken\): does it have the same keys"):
        Seal.of(codec).decode(sealed, "The value")


@pytest.mark.parametrize("answer", ["text", None, bytearray(b"x"), 5], ids=repr)
def test_a_codec_that_returns_no_bytes(answer: Any) -> None:
    """What isn't bytes can't be stored."""
    with pytest.raises(CodecError, match=f"returned {type(answer).__name__} in place of bytes"):
        Seal.of(Odd(answer)).encode(b"data", "it")


@pytest.mark.parametrize("error", [SoftTimeLimitExceeded(), KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_what_is_not_the_codecs_passes(error: BaseException) -> None:
    """A limit of the task, and what ends the process, only meets it."""
    with pytest.raises(type(error)):
        Seal.of(Odd(error)).encode(b"data", "it")
