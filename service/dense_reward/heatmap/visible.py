"""Makes text visible: replaces every invisible, control or direction-changing character by a printable sign.

The result is safe for a terminal and for XML, but not escaped for markup. Knows nothing of tokens or pictures.
"""

import unicodedata

NEWLINE = "⏎"

_SIGNS = {"\n": NEWLINE, "\t": "⇥", "\u00a0": "⍽"}
_PLAIN_SPACES = " \u3000"
# Invisible by the Unicode property Default_Ignorable_Code_Point, or by shape (the blank braille pattern), although
# Unicode classes them as letters, marks or symbols.
_BLANKS = frozenset(
    chr(code)
    for span in (
        range(0x034F, 0x0350),
        range(0x115F, 0x1161),
        range(0x17B4, 0x17B6),
        range(0x180B, 0x1810),
        range(0x2800, 0x2801),
        range(0x3164, 0x3165),
        range(0xFE00, 0xFE10),
        range(0xFFA0, 0xFFA1),
        range(0xE0100, 0xE01F0),
    )
    for code in span
)


def visible(text: str) -> str:
    """One printable line: a line feed becomes ⏎, a tab ⇥, a no-break space ⍽, others escapes such as \\u{202E}.

    A combining mark at the start gets a dotted circle to combine with, so that it cannot change the text before it.
    """
    opens_with_mark = text != "" and _is_combining(text[0])
    return "◌" * opens_with_mark + "".join(map(_sign, text))


def visible_lines(text: str) -> tuple[str, ...]:
    """Visible text, cut after every line feed. At least one line; the last one can be empty."""
    *broken, last = text.split("\n")
    return (*(visible(line) + NEWLINE for line in broken), visible(last))


def cells(text: str) -> int:
    """Width in monospace cells: East Asian wide characters take 2, combining marks 0, all others 1."""
    return sum(map(_cells, text))


def _sign(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    return f"\\u{{{ord(character):X}}}" if _is_hidden(character) else character


def _is_hidden(character: str) -> bool:
    # C: controls, formats (zero-width, direction), surrogates, private use, unassigned. Z: separators.
    if character in _PLAIN_SPACES:
        return False
    return character in _BLANKS or unicodedata.category(character)[0] in "CZ"


def _is_combining(character: str) -> bool:
    return unicodedata.category(character)[0] == "M" and character not in _BLANKS


def _cells(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
