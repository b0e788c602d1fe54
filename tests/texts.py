"""Two categories of thirty short documents each, for tests of the text part."""

import json
import random
from pathlib import Path

WORDS = (
    "river",
    "stone",
    "cloud",
    "garden",
    "window",
    "music",
    "winter",
    "harbour",
    "silver",
    "thunder",
    "meadow",
    "lantern",
    "copper",
    "island",
    "velvet",
)


def write_texts(base: Path) -> Path:
    """Write the documents as JSON lines and return the file's name below ``base``."""
    draw = random.Random(0)

    def words(count: int) -> list[str]:
        return [draw.choice(WORDS) for _ in range(count)]

    with (base / "texts.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(30):
            code = "".join(f"def {'_'.join(words(3))}({', '.join(words(2))}): return 0\n" for _ in range(8))
            prose = "".join(f"The {' and the '.join(words(5))} are here.\n" for _ in range(8))
            for category, text in (("code", code), ("prose", prose)):
                file.write(json.dumps({"text": text, "category": category}) + "\n")
    return Path("texts.jsonl")
