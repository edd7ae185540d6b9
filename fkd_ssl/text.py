"""Text for people: what a terminal can show."""

import re

# control characters but tab and newline, line and paragraph separators, changes of direction, lone surrogates
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, encoding: str | None = None, one_line: bool = False) -> str:
    r"""`text` with backslash escapes for what would control a terminal or cannot be encoded, and for newlines of `one_line`.

    >>> printable("a\x1b[2Jb\ud800")
    'a\\x1b[2Jb\\ud800'
    """
    escaped = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    if one_line:
        escaped = escaped.replace("\n", "\\n")
    encoding = encoding or "utf-8"
    return escaped.encode(encoding, "backslashreplace").decode(encoding)
