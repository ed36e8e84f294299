"""Named tables that are made when first asked for: as data frames, as Arrow, and for SQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    import pyarrow as pa


class Tables(Mapping[str, pd.DataFrame]):
    """Tables by name; each is also an attribute.

    Parameters
    ----------
    names
        In the order in which they are listed.
    load
        Returns a table by its name.
    """

    def __init__(self, names: tuple[str, ...], load: Callable[[str], pa.Table]) -> None:
        self._names = names
        self._load = load
        self._arrow: dict[str, pa.Table] = {}
        self._frames: dict[str, pd.DataFrame] = {}

    def __getitem__(self, name: str) -> pd.DataFrame:
        if name not in self._frames:
            self._frames[name] = _frame(self.arrow(name))
        return self._frames[name]

    def __getattr__(self, name: str) -> pd.DataFrame:
        if name.startswith("_") or name not in self._names:
            raise AttributeError(f"There is no table {name!r}. The tables are {', '.join(self._names)}.")
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._names]

    def __repr__(self) -> str:
        return f"<Tables {', '.join(self._names)}>"

    def arrow(self, name: str) -> pa.Table:
        """Return a table as Arrow has it.

        Raises
        ------
        KeyError
            If there is no such table.
        """
        if name not in self._names:
            raise KeyError(f"There is no table {name!r}. The tables are {', '.join(self._names)}.")
        if name not in self._arrow:
            self._arrow[name] = self._load(name)
        table: pa.Table = self._arrow[name]
        return table

    def sql(self, query: str) -> pd.DataFrame:
        """Run a query of DuckDB's SQL over the tables and return its result.

        >>> tables.sql("select step, count(*) as tokens from tokens group by step order by tokens desc limit 5")
        """
        import duckdb  # noqa: PLC0415 -- takes a while to load

        # A query reads these tables and nothing else: no file, no variable of the caller's.
        connection = duckdb.connect(config={"python_enable_replacements": "false", "enable_external_access": "false"})
        try:
            for name in self._names:
                connection.register(name, self.arrow(name))
            result: pd.DataFrame = connection.sql(query).df()
            return result
        finally:
            connection.close()


def rows(frame: pd.DataFrame) -> Iterator[Any]:
    """Yield the rows as named tuples. What a column holds is not known to the type checker."""
    yield from frame.itertuples(index=False)


def _frame(table: pa.Table) -> pd.DataFrame:
    """Return a data frame whose whole numbers stay whole where some are missing: as floats, seeds would be others."""
    import pyarrow as pa  # noqa: PLC0415 -- takes a while to load

    exact = {pa.int32(): pd.Int32Dtype(), pa.int64(): pd.Int64Dtype(), pa.uint64(): pd.UInt64Dtype()}
    frame: pd.DataFrame = table.to_pandas()
    for field in table.schema:
        column = table.column(field.name)
        if field.type in exact and column.null_count:
            frame[field.name] = column.to_pandas(types_mapper=exact.get)
    return frame
