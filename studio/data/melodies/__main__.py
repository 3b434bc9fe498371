"""Writes pieces of the melody world as a folder of recordings with captions, as `studio train --data` takes it.

python -m studio.data.melodies --out yaman/ --count 40 --mode Yaman
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from studio.data.melodies.folder import Pieces, write_folder
from studio.data.melodies.modes import TRADITIONS


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes NUMBER.wav and metadata.jsonl. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m studio.data.melodies", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write, new or empty")
    parser.add_argument("--count", type=int, default=40, help="how many pieces (default 40)")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each (default 8)")
    parser.add_argument("--rate", type=int, default=12_000, help="samples a second (default 12000)")
    parser.add_argument(
        "--tradition", choices=TRADITIONS, default="", help="western, raga or makam (default: all, in turn)"
    )
    parser.add_argument("--mode", default="", help="a raga, a makam, major or minor (default: all)")
    parser.add_argument("--instrument", default="", help="who plays (default: all that the tradition has)")
    parser.add_argument("--performed", action="store_true", help="makams as they are played, not as in theory")
    parser.add_argument("--stems", action="store_true", help="the line alone, without drone and drum")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pieces (default 0)")
    options = parser.parse_args(arguments)
    from studio.terminal import outcome, say

    return outcome(lambda: say(f"{write_folder(Pieces(**vars(options)))} pieces written to {options.out}"))


if __name__ == "__main__":
    sys.exit(main())
