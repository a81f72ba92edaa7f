"""How good bundles are on a data set: `evaluate`, `score`, `compare`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .options import FILE, FOLDER, PLACE, bounded, console, in_json, memory_of, needs, print_metrics, progress_bar, tell

SPLIT = click.option("--split", type=click.Choice(["train", "valid", "test"]), default="test", show_default=True)
DATA = click.option("--data", type=FOLDER, required=True, help="A prepared data set, or a log.")
BUNDLE = click.option("--bundle", type=PLACE, required=True, help="A version in the model repository.")


@click.command(epilog="Example: adrank evaluate --bundle models/din/20261122101500 --data data/ml-1m --json")
@BUNDLE
@DATA
@SPLIT
@click.option("--importance", is_flag=True, help="Say what each field is worth: how far AUC falls when its values are dealt anew.")
@in_json
@bounded
@needs("train")
def evaluate(bundle: Path, data: Path, split: str, importance: bool, as_json: bool, **flags: Any) -> None:
    """Measure a published bundle on a split, through ONNX Runtime."""
    from features.bundle import load_bundle
    from training.datasets.log import open_data
    from training.export.export import evaluate_bundle

    loaded, opened = load_bundle(bundle), replace(open_data(data), memory=memory_of(flags))
    if importance:
        _print_importance(loaded, opened, split, as_json)
        return
    with progress_bar() as progress:
        metrics = evaluate_bundle(loaded, opened, split, progress)
    tell(metrics.as_dict(), lambda: print_metrics({split: metrics}), as_json)


def _print_importance(bundle: Any, data: Any, split: str, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.table import Table

    from training.importance import importances

    with progress_bar() as progress:
        auc, rows, found = importances(bundle, data, split, progress)
    table = Table("field", "AUC falls by", "95 % interval")
    for each in found:
        table.add_row(each.field, f"{each.drop:+.5f}", f"{each.low:+.5f} to {each.high:+.5f}")
    head = f"AUC {auc:.5f} on {rows:,} rows of {split}; the fall is the mean of 5 deals of the field's values"
    told = {"auc": auc, "rows": rows, "fields": [asdict(each) for each in found]}
    tell(told, lambda: console().print(head, table, sep="\n"), as_json)


@click.command(epilog="Example: adrank score --bundle models/din/20261122101500 --data data/ml-1m --out scores.parquet")
@BUNDLE
@DATA
@SPLIT
@click.option("--out", type=FILE, required=True, help="The parquet file; one that is there is replaced.")
@needs("train")
def score(bundle: Path, data: Path, split: str, out: Path) -> None:
    """Write what a bundle gives for each row of a split, as it serves it, beside the row's ids and labels."""
    from features.bundle import load_bundle
    from training.datasets.log import open_data
    from training.scoring import score_rows, write_scores

    with progress_bar() as progress:
        scored = score_rows(load_bundle(bundle), open_data(data), split, progress)
    write_scores(scored, out)
    print(f"{out}: {len(scored):,} rows of {split}, columns {', '.join(scored.columns)}")


@click.command(
    epilog="Example: adrank compare models/din/20261122101500 models/din/20261129101500 --data data/ml-1m --segment context.slot"
)
@click.argument("first", type=PLACE)
@click.argument("second", type=PLACE)
@DATA
@SPLIT
@click.option("--segment", metavar="FIELD", help="Compare by the values of a field as well, such as context.slot.")
@in_json
@needs("train")
def compare(first: Path, second: Path, data: Path, split: str, segment: str | None, as_json: bool) -> None:
    """Measure two bundles on the same rows: the second less the first, with 95 % intervals by the bootstrap over users."""
    from features.bundle import load_bundle
    from training.datasets.log import open_data
    from training.scoring import compare_bundles

    with progress_bar() as progress:
        found = compare_bundles(load_bundle(first), load_bundle(second), open_data(data), split, segment, progress)
    parts = [{"head": part.head, "segment": part.segment, **part.found.as_dict()} for part in found]
    told = {"champion": str(first), "challenger": str(second), "split": split, "field": segment, "parts": parts}
    tell(told, lambda: _print_parts(found, [f"{path.parent.name} {path.name}" for path in (first, second)], segment), as_json)


def _print_parts(parts: Any, bundles: list[str], field: str | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    from training.retrain.report import metric_rows

    for part in (part for part in parts if part.segment is None):
        table = Table("", *map(escape, bundles), "second less first", "95 % interval", title=f"p({part.head})", title_justify="left")
        for cells in metric_rows(part.found, part.head):
            table.add_row(*cells)
        console().print(table)
    names = {"auc": "AUC", "gauc": "GAUC", "log_loss": "log loss"}
    heads = [title for name in names.values() for title in (f"{name} of both", "second less first")]
    by_segment = Table(field or "", "head", "rows", *heads, "p / labels of both")
    for part in (part for part in parts if part.segment is not None):
        both, told = (part.found.champion, part.found.challenger), list[str]()
        for name in names:
            move = part.found.differences[name]
            told += [_both(both, name), f"{move.value:+.4f} ({move.low:+.4f} to {move.high:+.4f})"]
        by_segment.add_row(escape(part.segment), part.head, f"{both[1].rows:,}", *told, _both(both, "calibration_ratio"))
    if field:
        console().print(by_segment)


def _both(measures: Any, name: str) -> str:
    return " ".join(f"{getattr(each, name):.4f}" for each in measures)
