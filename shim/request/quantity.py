"""Reads quantities as Kubernetes writes them: `500m`, `1.5Gi`, `2G`, `1e3`.

Source: k8s.io/apimachinery resource.Quantity.  Computes with integers only, so results are exact.  Part of the create
path.
"""

from __future__ import annotations

from shim import errors

MAX = (1 << 63) - 1
# suffix: (base, power)
_SUFFIXES = {
    "n": (10, -9),
    "u": (10, -6),
    "m": (10, -3),
    "": (10, 0),
    "k": (10, 3),
    "K": (10, 3),
    "M": (10, 6),
    "G": (10, 9),
    "T": (10, 12),
    "P": (10, 15),
    "E": (10, 18),
    "Ki": (2, 10),
    "Mi": (2, 20),
    "Gi": (2, 30),
    "Ti": (2, 40),
    "Pi": (2, 50),
    "Ei": (2, 60),
}
_MAX_DIGITS = 64  # those of the fraction included


def scaled(text: str, scale: int = 1) -> int:
    """The quantity `text` times `scale`: a whole number from 0 to 2**63 - 1, rounded up as Kubernetes does.

    Raises RequestError, which does not name the key.
    """
    number, suffix = text, ""
    for end, character in enumerate(text):
        if not (character.isdigit() or character in ".+-") and not (character in "eE" and _exponent(text[end + 1 :])):
            number, suffix = text[:end], text[end:]
            break
    if suffix not in _SUFFIXES:
        raise errors.RequestError(f"{text!r} is no quantity", "write a number with k, M, G, T, Ki, Mi, Gi or Ti")
    number, _, exponent = number.replace("E", "e").partition("e")
    whole, _, fraction = number.partition(".")
    digits = (whole[1:] if whole.startswith("+") else whole) + fraction
    if not digits.isdigit() or not text.isascii() or len(digits) > _MAX_DIGITS or len(exponent) > 4:
        if number.startswith("-"):
            raise errors.RequestError(f"{text!r} is negative")
        raise errors.RequestError(f"{text!r} is no quantity", "write a number such as 500m, 1.5, 512Mi or 2G")
    base, power = _SUFFIXES[suffix]
    value: int = int(digits) * scale * (base**power if power > 0 else 1)
    tens = (int(exponent) if exponent else 0) - len(fraction) + (power if power < 0 else 0)
    if tens >= 0:
        value *= 10**tens
    else:
        value = -(-value // 10**-tens)
    if value > MAX:
        raise errors.RequestError(f"{text!r} is too large")
    return value


def _exponent(text: str) -> bool:
    """Whether a text is the number after e or E.  E alone is a suffix."""
    return (text[1:] if text.startswith(("+", "-")) else text).isdigit()
