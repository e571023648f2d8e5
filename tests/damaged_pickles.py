"""Pickles of numbers, damaged at random and read: the body of a process that a signal may end."""

import json
import pickle
import random
from pathlib import Path

import numpy as np

from companion.evaluation.metrics.reference_statistics import read_statistics
from companion.pipelines.edm2.checkpoint import read_edm2_checkpoint

INSTRUCTIONS = (b"R", b"b", b"\x81", b"h\x00", b"\x94", b"(", b"N", b"\x86")


def read_damaged(path: Path, number: int, said: Path) -> None:
    """Read so many damaged pickles at `path`; how many were read and refused goes into the JSON file `said`.

    A refusal is one short line; anything else is an error, which ends the process with a status of its own.
    """
    chance = random.Random(0)
    arrays = {"mu": np.arange(4.0), "sigma": np.eye(4, dtype=np.float32)}
    whole = [pickle.dumps({"fid": arrays, "n": 3, "names": ["a", (1, 2.5, None, True)]}, p) for p in range(6)]
    outcomes = {"read": 0, "refused": 0}
    for attempt in range(number):
        path.write_bytes(damaged(chance.choice(whole), chance))
        for read in (read_statistics, read_edm2_checkpoint) if attempt % 4 == 0 else (read_statistics,):
            try:
                read(path)
                outcomes["read"] += 1
            except ValueError as error:
                if "\n" in str(error) or len(str(error)) >= 600:
                    raise
                outcomes["refused"] += 1
    said.write_text(json.dumps(outcomes))


def damaged(content: bytes, chance: random.Random) -> bytes:
    """With one to five places overwritten, cut out, or with bytes or an instruction put in."""
    held = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(held))
        match chance.randrange(4):
            case 0:
                held[at] = chance.randrange(256)
            case 1:
                del held[at : at + chance.choice((1, 2, 8))]
            case 2:
                held[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 4))))
            case _:
                held[at:at] = chance.choice(INSTRUCTIONS)
        if not held:
            break
    return bytes(held)
