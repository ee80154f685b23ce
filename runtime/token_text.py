"""What every tokenizer does first and last: checking text and ids, and turning a library's errors into ours."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from runtime.errors import TokenizerError

_LARGEST_ID = 2**31 - 1
_LONGEST_REASON = 300


def checked_text(text: str) -> str:
    """`text`, if it is Unicode text: a string without half a surrogate pair. Raises TokenizerError otherwise."""
    if not isinstance(text, str):
        raise TokenizerError(f"The text to encode must be a string, not a {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"The text has half a surrogate pair at character {error.start}, so it is not Unicode text. It was "
            "probably decoded with the wrong options; decode it again as UTF-8."
        ) from error
    return text


def checked_ids(token_ids: Sequence[int]) -> list[int]:
    """The ids as plain integers. Raises TokenizerError for what no tokenizer can have as an id."""
    try:
        ids = [operator.index(token_id) for token_id in token_ids]
    except TypeError as error:
        raise TokenizerError(f"Token ids must be whole numbers ({error}).") from error
    wrong = next((token_id for token_id in ids if not 0 <= token_id <= _LARGEST_ID), None)
    if wrong is not None:
        raise TokenizerError(f"{wrong} is not a token id: ids count from 0 to below the size of the vocabulary.")
    return ids


@contextmanager
def library_errors(what: str, needs: str) -> Iterator[None]:
    """Raise whatever a foreign library raises inside as a TokenizerError that begins with `what`.

    needs: the requirement to install when the library is not there. Interruptions pass.
    """
    try:
        yield
    except TokenizerError:
        raise
    except ImportError as error:
        raise TokenizerError(
            f"{what}: the package {(error.name or needs).split('.')[0]} is not installed. Install it with "
            f"`pip install '{needs}'`."
        ) from error
    except BaseException as error:
        # A panic inside a Rust extension is no Exception, but as little a reason to end the program.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The library's own words in one printable line of bounded length (an assertion may hold a whole vocabulary)."""
    listed = getattr(error, "errors", None)  # pydantic's report, without the values and web addresses in its text
    if callable(listed):
        found = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in listed()[:3]]
        words = "; ".join(found)
    else:
        words = str(error)
    words = " ".join(words.split()) or type(error).__name__
    words = "".join(character if character.isprintable() else "\ufffd" for character in words)
    short = words if len(words) <= _LONGEST_REASON else words[:_LONGEST_REASON] + " (…)"
    return short if short.endswith((".", "!", "?")) else short + "."
