"""`datasets`' builder for text, which reads bytes and decodes them here.

Its own opens files as text, and on the way to a remote or a compressed file `datasets` 5.2 loses what to do with
bytes that are not UTF-8, or cannot open it at all (`encoding` arrives as an option of the HTTP request).
"""

from collections.abc import Iterator
from io import StringIO, TextIOWrapper
from typing import Any

import pyarrow
from datasets.builder import Key
from datasets.packaged_modules.text.text import Text


class TextFiles(Text):
    """Whole files or their lines, in UTF-8; bytes that are none become U+FFFD, every line end becomes \\n."""

    def _generate_tables(self, base_files: Any, files_iterables: Any) -> Iterator[tuple[Key, pyarrow.Table]]:
        for shard, files in enumerate(files_iterables):
            for file in files:
                # Streaming puts another `open` into this module, which opens addresses and archives too.
                with TextIOWrapper(open(file, "rb"), encoding="utf-8", errors="replace") as text:  # noqa: PTH123
                    for number, rows in enumerate(self._rows(text)):
                        yield Key(shard, number), pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())})

    def _rows(self, text: TextIOWrapper) -> Iterator[list[str]]:
        if self.config.sample_by == "document":
            yield [text.read()]
            return
        while chunk := text.read(self.config.chunksize):
            yield StringIO(chunk + text.readline()).readlines()
