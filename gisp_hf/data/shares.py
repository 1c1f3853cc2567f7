"""Names of mixtures, such as ``wikitext2:0.5,code.jsonl:0.3,chat.jsonl:0.2``, and the tokens that each part gets."""

import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

_SHARE = re.compile(r"[0-9]*\.?[0-9]+|[0-9]+/[1-9][0-9]*")
_EXAMPLE = "write name:share, as in wikitext2:0.5,code.jsonl:0.3,chat.jsonl:0.2"


def split_mixture(name: str) -> dict[str, Fraction]:
    """The parts of a mixture and their shares; a name that is no mixture is its own only part.

    A mixture has at least one comma and is not the path of a file. The share stands after the last colon of a part, so
    that ``owner/name:config:0.5`` is half of ``owner/name:config``. It is a decimal number or a fraction (``1/3``).

    Returns:
        part -> share, in the given order; the shares add up to exactly 1.

    Raises:
        ValueError: a part has no share, or one that is not in (0, 1); a part stands twice; or the sum is not 1.
    """
    if "," not in name or Path(name).is_file():
        return {name: Fraction(1)}
    shares: dict[str, Fraction] = {}
    for entry in name.split(","):
        part, colon, written = (piece.strip() for piece in entry.rpartition(":"))
        if not colon or not part:
            raise ValueError(f"part {entry.strip()!r} of the mixture {name!r} has no share: {_EXAMPLE}")
        share = Fraction(written) if _SHARE.fullmatch(written) else Fraction(0)
        if not 0 < share < 1:
            raise ValueError(
                f"the share of {part!r} must be a number between 0 and 1 or a fraction such as 1/3, got {written!r}: "
                f"{_EXAMPLE}"
            )
        if part in shares:
            raise ValueError(f"{part!r} stands twice in the mixture {name!r}: give it once, with the sum of its shares")
        shares[part] = share
    total = sum(shares.values())
    if total != 1:
        listed = " + ".join(map(str, (float(share) for share in shares.values())))
        raise ValueError(
            f"the shares of {name!r} must add up to 1, got {listed} = {float(total):g}: change them (thirds are "
            "written 1/3)"
        )
    return shares


def share_tokens(shares: Mapping[str, Fraction], *, tokens: int, unit: int) -> dict[str, int]:
    """Tokens of each part: its share of ``tokens``, in whole units.

    What rounding down leaves over goes to the parts that lost most by it (the first of equals), so that each part is
    less than one unit away from its share, and all of them together have every whole unit of ``tokens``.

    Args:
        unit: 1, or the size of a block where blocks are full.

    Raises:
        ValueError: a part would get nothing.
    """
    units = tokens // unit
    exact = {part: units * share for part, share in shares.items()}
    counts = {part: int(wanted) for part, wanted in exact.items()}
    by_loss = sorted(exact, key=lambda part: counts[part] - exact[part])  # sorting keeps the order of equals
    for part in by_loss[: units - sum(counts.values())]:
        counts[part] += 1
    for part, count in counts.items():
        if count == 0:
            least = -(-1 // shares[part]) * unit
            raise ValueError(
                f"{part!r} has {float(shares[part]):g} of tokens={tokens}, less than one block of {unit}: "
                f"raise tokens to {least}, or its share"
            )
    return {part: count * unit for part, count in counts.items()}
