"""Reads the file that an offline run of Weights & Biases leaves: records in blocks, as LevelDB's log."""

import json
import struct
import time
from pathlib import Path
from typing import Any

BLOCK, HEADER, RECORD = 32_768, struct.Struct("<4sHB"), struct.Struct("<IHB")  # checksum, length, kind
FULL, LAST = 1, 4


def payloads(content: bytes) -> list[bytes]:
    """Join the pieces of every record."""
    ident, _, _ = HEADER.unpack_from(content)
    assert ident == b":W&B"
    found, pieces, offset = [], b"", HEADER.size
    while offset + RECORD.size <= len(content):
        if BLOCK - offset % BLOCK < RECORD.size:  # too short for a record: padding
            offset += BLOCK - offset % BLOCK
            continue
        _, length, kind = RECORD.unpack_from(content, offset)
        offset += RECORD.size
        pieces += content[offset : offset + length]
        offset += length
        if kind in (FULL, LAST):
            found.append(pieces)
            pieces = b""
    return found


def history(folder: Path) -> list[dict[str, Any]]:
    """Everything that the one offline run below `folder` has logged, row by row."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(300):  # another process writes it, and says so when it is done
        records = [Record.FromString(payload) for payload in payloads(path.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        time.sleep(0.1)
    return [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
