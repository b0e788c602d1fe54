"""Ways to spoil bytes, plain data and the files that moeify reads; every one is a function of a seeded generator."""

import copy
import hashlib
import json
import random
import struct
from pathlib import Path
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2.5,
    1e308,
    -1e-308,
    10**30,
    float("nan"),
    float("inf"),
    "",
    " ",
    "1",
    "nan",
    "../x",
    "/nowhere/x",
    "a/../../b",
    "memory://none/x",
    "memory:///../x*/[",
    "s3://",
    "s3://me:secret@there/x",
    "http://there/x?y#z",
    "://",
    "a\x00b",
    "\ud83d",
    "é" * 300,
    "{{}}",
    "!!python/object:os.system",
    [],
    {},
    [[]],
    [None],
    {"kind": "stop"},
    {"../x": 1},
)
"""Values that a careless reader trips over."""


def spoiled_bytes(draw: random.Random, data: bytes) -> bytes:
    """Return the bytes with one to three faults: cut short, flipped, dropped, doubled, stuffed."""
    for _ in range(draw.randint(1, 3)):
        start = draw.randint(0, max(0, len(data) - 1))
        end = min(len(data), start + draw.choice((1, 1, 2, 8, 64, 512)))
        match draw.randrange(7):
            case 0:
                data = data[:start]
            case 1:
                data = data[:start] + bytes(b ^ 1 << draw.randrange(8) for b in data[start:end]) + data[end:]
            case 2:
                data = data[:start] + data[end:]
            case 3:
                data = data[:end] + data[start:end] * draw.randint(1, 4) + data[end:]
            case 4:
                stuffing = (b"\0", b"\xff\xfe", b"\n", b"\t", b"'", b"{", b"]", b"\xed\xa0\x80", b"\x1f\x8b\x08", b"- ")
                data = data[:start] + draw.choice(stuffing) + data[start:]
            case 5:
                lines = data.split(b"\n")
                draw.shuffle(lines)
                data = b"\n".join(lines)
            case _:
                data = draw.choice((b"", data.decode("utf-8", "replace").encode("utf-16"), b"\xef\xbb\xbf" + data))
    return data


def spoiled_tree(draw: random.Random, data: Any) -> Any:
    """Return the plain data with one to three nodes replaced, dropped, renamed, doubled or nested."""
    data = copy.deepcopy(data)
    for _ in range(draw.randint(1, 3)):
        holder, key = draw.choice(list(_places(data)) or [(None, None)])
        if holder is None:
            return draw.choice(HOSTILE)
        value = holder[key]
        match draw.randrange(7):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(draw.choice(HOSTILE))
            case 3:
                del holder[key]
            case 4 if isinstance(holder, dict):
                holder[f"{key}x" if draw.random() < 0.5 else "../x"] = holder.pop(key)
            case 5 if isinstance(holder, list):
                holder.append(copy.deepcopy(value))
            case 6 if isinstance(value, int | float) and not isinstance(value, bool):
                holder[key] = draw.choice((-value, value + 1, value * 1000, value / 3, str(value)))
            case _:
                holder[key] = [value]
    return data


def _places(data: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = [data]
    while waiting:
        node = waiting.pop()
        keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            waiting.append(node[key])
    return found


def spoil_json(draw: random.Random, path: Path) -> None:
    """Spoil a JSON file, or one of JSON lines, as bytes or as data."""
    content = path.read_bytes()
    if draw.random() < 0.4:
        path.write_bytes(spoiled_bytes(draw, content))
        return
    lines = content.splitlines() if path.suffix == ".jsonl" else [content]
    place = draw.randrange(len(lines))
    lines[place] = json.dumps(spoiled_tree(draw, json.loads(lines[place]))).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")


def spoil_checkpoint(draw: random.Random, folder: Path) -> None:
    """Spoil a hashed folder, by accident (hashes tell) or on purpose (hashes are made to hold)."""
    path = draw.choice([path for path in sorted(folder.iterdir()) if path.is_file()])
    match draw.randrange(6):
        case 0:
            path.write_bytes(spoiled_bytes(draw, path.read_bytes()))
        case 1:
            path.unlink()
        case 2:
            parts = sorted(folder.glob("*.safetensors"))
            part = draw.choice(parts)
            part.write_bytes(spoiled_tensors(draw, part.read_bytes()))
            sign(folder, {})
        case 3:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            manifest["body"] = spoiled_tree(draw, manifest["body"])
            _write_signed(folder, manifest["body"])
        case _:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            manifest["body"]["facts"] = spoiled_tree(draw, manifest["body"]["facts"])
            _write_signed(folder, manifest["body"])


def spoiled_tensors(draw: random.Random, data: bytes) -> bytes:
    """Return a safetensors file with a hostile header, its lengths made to fit or not."""
    size = struct.unpack("<Q", data[:8])[0]
    header = spoiled_tree(draw, json.loads(data[8 : 8 + size]))
    text = json.dumps(header).encode()
    claimed = draw.choice((len(text), len(text), len(text), 0, 2**63, size))
    return struct.pack("<Q", claimed) + text + data[8 + size :]


def sign(folder: Path, facts: dict[str, Any]) -> None:
    """Make the manifest's hashes those of the files as they are; ``facts`` are added to its own."""
    body = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["body"]
    for name in body["files"]:
        content = (folder / name).read_bytes()
        body["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    body["facts"] |= facts
    _write_signed(folder, body)


def _write_signed(folder: Path, body: Any) -> None:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"sha256": digest, "body": body}), encoding="utf-8")
