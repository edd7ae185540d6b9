import pytest

from fkd_ssl.text import format_bytes, format_duration, printable


def test_bytes() -> None:
    said = [format_bytes(count) for count in (0, 12, 3_456, 7_890_000, 1.5e11, 1.1e12)]
    assert said == ["0 bytes", "12 bytes", "3.5 kB", "7.9 MB", "150.0 GB", "1.1 TB"]


def test_durations() -> None:
    said = [format_duration(seconds) for seconds in (0.2, 42, 119, 120, 3599, 5400, 172_799, 400_000)]
    assert said == ["0 s", "42 s", "119 s", "2.0 minutes", "60.0 minutes", "1.5 hours", "48.0 hours", "4.6 days"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("résumé 図 👩‍👧\ttab\nline", "résumé 図 👩‍👧\ttab\nline"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\r\x7f\x9b", r"\r\x7f\x9b"),
        ("\u202eevil\u2066\u2028", r"\u202eevil\u2066\u2028"),
        ("\udc80\ud800", r"\udc80\ud800"),
    ],
)
def test_what_controls_a_terminal_is_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_a_narrow_encoding_and_one_line() -> None:
    assert printable("é 図", encoding="ascii") == r"\xe9 \u56f3"
    assert printable("a\nb", one_line=True) == r"a\nb"
