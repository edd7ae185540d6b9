"""Formats text for users: escapes for the terminal, byte counts and durations."""

import re

# control characters except tab and newline, line and paragraph separators, changes of direction, lone surrogates
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, encoding: str | None = None, one_line: bool = False) -> str:
    r"""Escapes characters that control a terminal or that `encoding` lacks, with backslashes; newlines too if `one_line`.

    >>> printable("a\x1b[2Jb\ud800")
    'a\\x1b[2Jb\\ud800'
    """
    escaped = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    if one_line:
        escaped = escaped.replace("\n", "\\n")
    encoding = encoding or "utf-8"
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def is_url(spec: str) -> bool:
    """Whether a spec is a URL, such as s3://bucket/train.tar."""
    return "://" in spec


def redacted(message: str) -> str:
    """Removes user names, passwords and queries from the URLs in a message.

    >>> redacted("GET https://me:secret@server/a.tar?X-Amz-Signature=12ab: denied")
    'GET https://server/a.tar?... denied'
    """
    return re.sub(r"(?<=://)[^/\s@]*@", "", re.sub(r"(\w+://[^\s?'\"]+\?|\burl: [^\s?'\"]+\?)[^\s'\")]+", r"\1...", message))


def first_line(error: object) -> str:
    """Returns the first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def plural(count: int, noun: str) -> str:
    """Formats a count with its noun, which gets an s unless the count is 1.

    >>> plural(1, "shard"), plural(12_000, "image")
    ('1 shard', '12,000 images')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_bytes(count: float) -> str:
    """Formats a number of bytes with a decimal unit.

    >>> format_bytes(840), format_bytes(74_900), format_bytes(1.1e12)
    ('840 bytes', '74.9 kB', '1.1 TB')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"


def format_duration(seconds: float) -> str:
    """Formats a duration with a unit of its size.

    >>> format_duration(42), format_duration(5400), format_duration(400_000)
    ('42 s', '1.5 hours', '4.6 days')
    """
    for unit, size, from_seconds in (("days", 86400, 2 * 86400), ("hours", 3600, 3600), ("minutes", 60, 120)):
        if seconds >= from_seconds:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
