"""The text builder of `datasets`, which here opens files as bytes and decodes them.

The original opens files as text, and for a compressed file `datasets` 5.2 loses the handling of bytes that are not
UTF-8.
"""

from collections.abc import Iterator
from io import StringIO, TextIOWrapper
from typing import Any

import pyarrow
from datasets.builder import Key
from datasets.packaged_modules.text.text import Text


class TextFiles(Text):
    """Complete files or their lines, in UTF-8; other bytes become U+FFFD, and every line end becomes \\n."""

    def _generate_tables(self, base_files: Any, files_iterables: Any) -> Iterator[tuple[Key, pyarrow.Table]]:
        for shard, files in enumerate(files_iterables):
            for file in files:
                # Streaming replaces `open` in this module by one that opens archives too.
                with TextIOWrapper(open(file, "rb"), encoding="utf-8", errors="replace") as text:  # noqa: PTH123
                    for number, rows in enumerate(self._rows(text)):
                        yield Key(shard, number), pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())})

    def _rows(self, text: TextIOWrapper) -> Iterator[list[str]]:
        if self.config.sample_by == "document":
            yield [text.read()]
            return
        while chunk := text.read(self.config.chunksize):
            yield StringIO(chunk + text.readline()).readlines()
