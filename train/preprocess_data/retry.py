"""Failures of a source: wait and try again where that may help, and explain in a sentence where it cannot."""

import sys
import time

from tqdm import tqdm

from train.preprocess_data.sources import STDLIB, Source, file_kinds
from train.utils.errors import UserError, first_line

RETRIES = 10  # in a row, without a document between them: about 9 minutes
RETRY_SECONDS = 1.0  # before the first retry; doubled for each later one
LONGEST_RETRY_SECONDS = 60.0


def wait_or_raise(source: Source, error: Exception, failures: int, opening: bool = False, row: int = 0) -> None:
    """After so many failures in a row, return when it is time to try again; a `UserError` if it would fail again."""
    if isinstance(error, UserError):
        raise error
    if source.kind is not None or not is_transient(error, opening):
        raise UserError(reading_failed(source, error)) from error
    if failures > RETRIES:
        raise UserError(
            f"{reading_failed(source, error)}; it failed {failures} times in a row, so try again later"
        ) from error
    seconds = min(RETRY_SECONDS * 2 ** (failures - 1), LONGEST_RETRY_SECONDS)
    again = f"trying again from row {row:,} in {seconds:g} s ({failures} of {RETRIES})"
    tqdm.write(f"{reason(error)}: {again}", file=sys.stderr)
    time.sleep(seconds)


def is_transient(error: BaseException | None, opening: bool) -> bool:
    """Whether a server or a connection failed, and may work again. Failing to connect at first means being offline."""
    from huggingface_hub.utils import httpx

    while error is not None:
        status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int) and status:
            return status >= 500 or status in (408, 429)
        if isinstance(error, TimeoutError | httpx.TimeoutException):
            return True
        if not opening and isinstance(error, EOFError | ConnectionError | httpx.RequestError):
            return True
        error = error.__cause__ or error.__context__
    return False


def reason(error: BaseException) -> str:
    if isinstance(error, ConnectionError) and error.__cause__ is not None:
        error = error.__cause__  # `datasets` calls every one "Server Disconnected"
    message = first_line(error)
    name = type(error).__name__
    return name if message == name else f"{name}: {message[:300]}"


def is_script_refusal(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "scripts are no longer supported" in str(error)


def reading_failed(source: Source, error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import httpx

    if source.kind is not None:
        files = " ".join(source.data_files) or "them"
        return f"cannot read --dataset {source.name} as {source.name} files ({reason(error)}): check {files}"
    where = f"--dataset {source.name}" + (f" ({source.hub_id})" if source.name != source.hub_id else "")
    where += f" at revision {source.revision}" if source.revision else ""
    if isinstance(error, DatasetNotFoundError | RepositoryNotFoundError | RevisionNotFoundError):
        return (
            f"{where} does not exist on the Hub, or this account may not read it: check the name and the revision, or "
            "log in with `hf auth login`"
        )
    if isinstance(error, ConnectionError | httpx.RequestError):
        return (
            f"cannot reach the Hub for {where}: check the network (HF_ENDPOINT, HF_HUB_OFFLINE), or prepare local "
            f"files with --dataset {file_kinds('or')}, or --dataset {STDLIB}"
        )
    if is_script_refusal(error):
        return (
            f"{where} runs code of its own, which is refused: download its text and prepare it with --dataset "
            f"{file_kinds('or')}"
        )
    return f"cannot read {where} ({reason(error)}): check --revision, --subset and --data_files"
