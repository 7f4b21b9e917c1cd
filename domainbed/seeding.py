"""One integer seed from any values: the same on every machine and in every session."""

import hashlib


def seed_hash(*args: object) -> int:
    """Seed in [0, 2**31) for the given values: DomainBed's rule, on which its splits and hparams rest.

    The rule hashes the printed form of the argument tuple, so pass plain ints, strings and lists only: a numpy scalar
    prints differently from the number that it holds, and differently from one numpy to the next.
    """
    digest = hashlib.md5(str(args).encode("utf-8"), usedforsecurity=False).digest()
    return int.from_bytes(digest, "big") % 2**31
