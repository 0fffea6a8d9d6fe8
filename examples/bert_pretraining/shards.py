"""Prepared shards: one safetensors file per stretch of text, mapped into memory, never read whole.

A folder holds `manifest.json`, written last, `tokenizer.json`, and `shard-00000.safetensors` and so
on. A shard has, for `train` and `held_out` each, the arrays of a `TokenStore` and the first
sentences of its chunks for every sequence length it was prepared for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from errors import UserError
from files import write_atomically
from safetensors.numpy import save
from store import TokenStore, cut_chunks
from tokenizers import Tokenizer

FORMAT = 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
PARTS = ("train", "held_out")
_DTYPES = {"U16": np.uint16, "I32": np.int32, "U32": np.uint32, "I64": np.int64}


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def write_shard(
    path: Path,
    stores: Mapping[str, TokenStore],
    lengths: Sequence[int],
    vocab_size: int,
) -> None:
    """Writes a shard atomically.

    Args:
        path: Where to.
        stores: A store for each of `PARTS`.
        lengths: Sequence lengths to cut chunks for.
        vocab_size: Size of the vocabulary; up to 2^16 an id takes two bytes.
    """
    tokens = np.uint16 if vocab_size <= 2**16 else np.int32
    arrays: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {}
    for part, store in stores.items():
        arrays[f"{part}.tokens"] = store.tokens.astype(tokens)
        arrays[f"{part}.sentence_starts"] = store.sentence_starts.astype(np.uint32)
        arrays[f"{part}.document_starts"] = store.document_starts.astype(np.uint32)
        arrays[f"{part}.counts"] = store.counts.astype(np.int64)
        for length in lengths:
            arrays[f"{part}.chunks.{length}"] = cut_chunks(store, length).astype(np.uint32)
        about |= {f"{part}_tokens": len(store.tokens), f"{part}_documents": store.documents}
        about |= {f"{part}_chunks": [len(arrays[f"{part}.chunks.{n}"]) for n in lengths]}
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    about |= {"digest": digest.hexdigest()}
    write_atomically(path, save(arrays, metadata={"about": json.dumps(about)}))


def read_about(path: Path) -> dict[str, Any]:
    """What `write_shard` says of a shard: sizes, and a digest of all arrays."""
    return json.loads(_header(path)[0]["__metadata__"]["about"])


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where its arrays begin."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            # A damaged length may ask for more than there is.
            header = json.loads(file.read(min(size, 1 << 24)))
        needed = 8 + size + max(v["data_offsets"][1] for k, v in header.items() if k[:2] != "__")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(_damaged(path)) from error
    if needed != path.stat().st_size:
        raise UserError(_damaged(path))
    return header, 8 + size


def _damaged(path: Path) -> str:
    return (
        f"--shards: {path} is damaged; delete it and run prepare.py with the same options again, "
        "which makes what is missing."
    )


class ShardFile:
    """The stores of a shard in one mapping, which costs one open file.

    Travels to other processes as the name of the file.
    """

    def __init__(self, path: Path, lengths: Sequence[int]) -> None:
        self._made_with = (path, lengths)
        header, begin = _header(path)
        mapped = np.memmap(path, mode="r")
        self.arrays: dict[str, np.ndarray] = {}
        for name, about in header.items():
            if name != "__metadata__":
                first, last = about["data_offsets"]
                piece = np.asarray(mapped[begin + first : begin + last])
                self.arrays[name] = piece.view(_DTYPES[about["dtype"]])
        self._lengths = lengths

    def store(self, part: str) -> TokenStore:
        """The store of one of `PARTS`."""
        names = ("tokens", "sentence_starts", "document_starts", "counts")
        chunks = {n: self.arrays[f"{part}.chunks.{n}"] for n in self._lengths}
        return TokenStore(*(self.arrays[f"{part}.{name}"] for name in names), chunks)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardFile, self._made_with


class ShardedStores(Sequence[TokenStore]):
    """The stores of one part of all shards; travels to other processes as `ShardFile` does."""

    def __init__(self, files: Sequence[ShardFile], part: str) -> None:
        self._made_with = (files, part)
        self._stores = [file.store(part) for file in files]

    def __getitem__(self, place: int) -> TokenStore:
        return self._stores[place]

    def __len__(self) -> int:
        return len(self._stores)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardedStores, self._made_with


def open_shards(
    folder: Path, lengths: Sequence[int]
) -> tuple[ShardedStores, ShardedStores, Tokenizer, str]:
    """Opens what prepare.py has made, for examples of `lengths`.

    Returns:
        Training stores, held-out stores, the tokenizer and the fingerprint.
    """
    manifest = read_manifest(folder)
    missing = [n for n in lengths if n not in manifest["sequence_lengths"]]
    if missing:
        raise UserError(
            f"--sequence-length: the shards in {folder} were cut for "
            f"{_listed(manifest['sequence_lengths'])}, not {_listed(missing)}; prepare others with "
            f"--sequence-lengths {_listed(lengths, ' ')}."
        )
    tokenizer_file = folder / TOKENIZER
    text = tokenizer_file.read_bytes() if tokenizer_file.is_file() else b""
    if hashlib.sha256(text).hexdigest() != manifest["tokenizer"]:
        raise UserError(
            f"--shards: {tokenizer_file} is not the vocabulary that the shards were made with; "
            "restore it, or prepare the shards again with --overwrite."
        )
    paths = [folder / shard_name(number) for number in range(len(manifest["shards"]))]
    for path, about in zip(paths, manifest["shards"], strict=True):
        if not path.is_file() or read_about(path) != about:
            raise UserError(_damaged(path))
    files = [ShardFile(path, list(lengths)) for path in paths]
    train, held_out = (ShardedStores(files, part) for part in PARTS)
    return train, held_out, Tokenizer.from_str(text.decode()), manifest["fingerprint"]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"--shards: {folder} holds no finished shards (no {MANIFEST}); make them with "
            "prepare.py, or let it go on if it was stopped."
        )
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"--shards: {path} is damaged; run prepare.py again.") from error
    if manifest.get("format") != FORMAT:
        raise UserError(f"--shards: {path} was written by another version of this example.")
    return manifest


def _listed(values: Sequence[object], separator: str = ", ") -> str:
    return separator.join(map(str, values))
