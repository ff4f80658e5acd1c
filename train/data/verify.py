"""Check prepared token files against their sidecars, byte by byte."""

import hashlib
from pathlib import Path

from train.data.token_file import Sidecar, open_tokens, sidecar_path
from train.data.tokenizer import END_OF_TEXT
from train.utils.errors import UserError

READ_TOKENS = 1 << 22  # at once
# Fields that the sidecars of one preparation have in common.
COMMON = ("request", "source", "tokenizer_sha256", "split", "val_fraction", "seed", "num_rows")


def verify(folder: Path) -> None:
    """Check `train.bin` and `val.bin` in a folder and print what they hold, or raise a sentence for each fault."""
    faults: list[str] = []
    sidecars = {}
    for path in (folder / "train.bin", folder / "val.bin"):
        try:
            sidecars[path] = verify_file(path)
        except UserError as fault:
            faults.append(str(fault))
    if len(sidecars) == 2:
        faults += pair_faults(folder, *sidecars.values())
    if faults:
        raise UserError("\n".join(faults))
    for path, sidecar in sidecars.items():
        print(f"{path}: {sidecar.tokens:,} tokens, {sidecar.documents:,} documents, sha256 {sidecar.sha256}: complete")


def verify_file(path: Path) -> Sidecar:
    """The sidecar of a token file, once the file was found to hold what it says; a `UserError` if it does not."""
    tokens = open_tokens(path, vocab_size=2**32, check_samples=False)  # they are a part of the whole
    sidecar = tokens.sidecar
    if sidecar is None:
        raise UserError(f"{path} has no sidecar {sidecar_path(path)} to check it against")
    digest = hashlib.sha256()
    documents, greatest = 0, -1
    for start in range(0, len(tokens), READ_TOKENS):
        ids = tokens.read(start, READ_TOKENS)
        digest.update(ids.data)
        documents += int((ids == END_OF_TEXT).sum())
        greatest = max(greatest, int(ids.max()))
    again = "prepare it again with python -m train.preprocess_data --overwrite"
    if sidecar.vocabulary_size is not None and greatest >= sidecar.vocabulary_size:
        raise UserError(f"{path} holds id {greatest}, beyond its vocabulary of {sidecar.vocabulary_size}: {again}")
    for fact, found, expected in (
        ("SHA-256", digest.hexdigest(), sidecar.sha256),
        ("number of documents, counted by <|endoftext|>,", documents, sidecar.documents),
        ("greatest id", greatest, sidecar.max_token_id),
        ("SHA-256 of samples", tokens.samples_sha256, sidecar.samples_sha256 or tokens.samples_sha256),
    ):
        if found != expected:
            raise UserError(f"{path}: its {fact} is {found}, and its sidecar says {expected}: {again}")
    return sidecar


def pair_faults(folder: Path, train: Sidecar, val: Sidecar) -> list[str]:
    differing = [key for key in COMMON if getattr(train, key) != getattr(val, key)]
    if differing:
        return [f"train.bin and val.bin in {folder} are of two preparations: they differ in {', '.join(differing)}"]
    documents = (train.documents or 0) + (val.documents or 0)
    if train.rows is not None and train.rows != documents:
        return [f"{folder} holds {documents:,} documents, and {train.rows:,} rows were read"]
    return []
