"""Whether a data set has a column for every field of a schema. One that it lacks would be encoded as missing throughout, without a word."""

from collections.abc import Collection, Iterator
from pathlib import Path

from features.schema import IDENTITY, SIDES, Schema

from .prepared import DataError, Prepared, read_parquet


def check_fields(data: Prepared, schema: Schema, files: Collection[Path]) -> None:
    """Check that each of some files of a data set, with its tables of users and ads, holds every field of a schema.

    Raises:
        DataError: fields have no column; the message names all of them.
    """
    lacking = dict.fromkeys([*_blank(data, schema, files), *_absent(data, schema, files)])
    if lacking:
        what = f"no column holds {', '.join(lacking)}, which the schema {schema.name!r} has"
        raise DataError(f"{data.folder}: {what}; prepare the data with these fields, or leave them out of the model")


def _absent(data: Prepared, schema: Schema, files: Collection[Path]) -> Iterator[str]:
    tables = {side: data.table_columns(side) for side in data.looked_up}
    for path in files:
        present = data.row_columns(path)
        for side in SIDES:
            fields = [field.path for field in schema.fields if field.side == side and field.name not in IDENTITY.values()]
            inline = any(name in present for name in fields)
            yield from (name for name in fields if name not in present and (inline or name not in tables.get(side, ())))
        if schema.history_length and "history" not in present:
            yield "history"
        yield from (name for name in ("ts", "history_ts") if schema.history_ages and name not in present)
    if schema.history_length:
        known = data.table_columns("ad")
        yield from (f"{field.path} of behaviours" for field in schema.history[1:] if field.path not in known)


def _blank(data: Prepared, schema: Schema, files: Collection[Path]) -> Iterator[str]:
    """Ids that another schema than the data's has for a field, where the data has none."""
    for side in ("user", "ad"):
        name = IDENTITY[side]
        asked = schema.field(side, name) and not data.schema.field(side, name)
        if asked and all((read_parquet(path, [name])[name] == "").all() for path in files):
            yield f"{side}.{name}"
