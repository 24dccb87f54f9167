"""CSV and TSV files as a builder of `datasets`, so that they are streamed, and prepared as a table, like other files.
Its rows come from our own reader (csv_reader.py, which says why).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import datasets
import pyarrow as pa
from datasets.builder import Key

from text.csv_reader import csv_rows
from text.decoding import BadRow

ROWS_AT_ONCE = 1000


@dataclass
class CsvSettings(datasets.BuilderConfig):
    """Holds the settings of a `CsvBuilder`."""

    text_field: str = "text"


class CsvBuilder(datasets.ArrowBasedBuilder):
    """Makes a table of one column, the text. Raises ValueError at the first row that cannot be read."""

    BUILDER_CONFIG_CLASS = CsvSettings
    VERSION = datasets.Version("1.1.0")  # raise it when the same file would give other rows

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=datasets.Features({self.config.text_field: datasets.Value("string")}))

    def _split_generators(self, dl_manager: object) -> list[datasets.SplitGenerator]:
        by_split = self.config.data_files.items()
        return [datasets.SplitGenerator(name=name, gen_kwargs={"files": list(files)}) for name, files in by_split]

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[Key, pa.Table]]:
        field = self.config.text_field
        for i, file in enumerate(files):
            rows = csv_rows(file, field)
            n_tables = 0
            while texts := list(islice(rows, ROWS_AT_ONCE)):
                if bad := next((row for row in texts if isinstance(row, BadRow)), None):
                    raise ValueError(str(bad))
                yield Key(i, n_tables), pa.table({field: pa.array(texts, pa.string())})
                n_tables += 1
