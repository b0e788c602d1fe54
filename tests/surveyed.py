"""Folders and JSON lines of short texts, as a person would bring them."""

import gzip
import json
import lzma
import random
from pathlib import Path

WORDS = ["river", "stone", "cloud", "garden", "window", "music", "winter", "harbour", "silver", "thunder", "meadow"]


def text(seed: int, words: int = 60) -> str:
    draw = random.Random(seed)
    return "".join(" ".join(draw.choice(WORDS) for _ in range(6)) + ".\n" for _ in range(words // 6))


def write_folders(base: Path, **documents: int) -> Path:
    for place, (name, count) in enumerate(documents.items()):
        folder = base / name
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.txt").write_text(text(1000 * place + number), encoding="utf-8")
    return base


def entries(count: int = 30) -> list[dict[str, object]]:
    return [{"id": n, "title": f"no {n}", "body": text(n), "label": "xy"[n % 2], "lang": "en"} for n in range(count)]


def write_lines(path: Path, lines: list[dict[str, object]]) -> Path:
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    compress = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(content))
    return path
