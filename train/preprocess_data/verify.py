"""Is a prepared folder what its sidecars say? Reads every byte."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from train.data.token_file import END_OF_TEXT, open_tokens, sidecar_path
from train.preprocess_data.preparation import PARTS
from train.preprocess_data.splits import READ_TOKENS
from train.utils.errors import UserError

PAIRED = ("request", "source", "tokenizer_sha256", "split", "val_fraction", "seed", "num_rows")


def verify(folder: Path) -> None:
    """Print what was found.

    Raises:
        UserError: a sentence for each fault.
    """
    faults: list[str] = []
    sidecars = {}
    for name in PARTS:
        path = folder / f"{name}.bin"
        try:
            sidecars[name] = verify_file(path)
        except UserError as fault:
            faults.append(str(fault))
    if len(sidecars) == len(PARTS):
        faults += [fault for fault in (unpaired(folder, sidecars["train"], sidecars["val"]),) if fault]
    if faults:
        raise UserError("\n".join(faults))
    for name, sidecar in sidecars.items():
        print(
            f"{folder / name}.bin: {sidecar['tokens']:,} tokens, {sidecar['documents']:,} documents, "
            f"sha256 {sidecar['sha256']}: whole"
        )


def verify_file(path: Path) -> dict[str, Any]:
    """The sidecar of a token file that is what it says.

    Raises:
        UserError: it is not.
    """
    tokens = open_tokens(path, vocab_size=2**32)
    sidecar = tokens.sidecar
    if sidecar is None:
        raise UserError(f"{path} has no sidecar {sidecar_path(path)}, so there is nothing to hold it against")
    digest = hashlib.sha256()
    documents, greatest = 0, -1
    for start in range(0, len(tokens), READ_TOKENS):
        ids = tokens.ids[start : start + READ_TOKENS]
        digest.update(np.ascontiguousarray(ids).data)
        documents += int((ids == END_OF_TEXT).sum())
        greatest = max(greatest, int(ids.max()))
    again = "prepare it again with python -m train.preprocess_data --overwrite"
    vocabulary_size = sidecar.get("vocabulary_size", 2**32)
    if greatest >= vocabulary_size:
        raise UserError(f"{path} holds id {greatest}, beyond its vocabulary of {vocabulary_size}: {again}")
    for what, found, said in (
        ("SHA-256", digest.hexdigest(), sidecar.get("sha256")),
        ("documents, counted by their <|endoftext|>,", documents, sidecar.get("documents")),
        ("greatest id", greatest, sidecar["max_token_id"]),
    ):
        if found != said:
            raise UserError(f"{path}: its {what} is {found}, and its sidecar says {said}: {again}")
    return sidecar


def unpaired(folder: Path, train: dict[str, Any], val: dict[str, Any]) -> str | None:
    differing = [key for key in PAIRED if train.get(key) != val.get(key)]
    if differing:
        return f"train.bin and val.bin in {folder} are of two preparations: they differ in {', '.join(differing)}"
    rows, documents = train.get("rows"), train["documents"] + val["documents"]
    if rows is not None and rows != documents:
        return f"{folder} holds {documents:,} documents, and {rows:,} rows were read"
    return None
