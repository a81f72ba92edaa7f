"""What is live: `models`, `promote`, `rollback`."""

import json
from pathlib import Path
from typing import Any

import click

from .options import FOLDER, SHARE, Refusal, in_json


@click.command("models", epilog="Example: adrank models --models models")
@click.option("--models", type=FOLDER, default="models", show_default=True, help="The model repository.")
@in_json
def models_command(models: Path, as_json: bool) -> None:
    """List the models: versions, which is live, shadow or canary, when it was made, and how it did on its test split."""
    from features import listing

    found = listing.list_models(models)
    print(json.dumps(found.as_dict()) if as_json else listing.table(found))


@click.command(epilog="Example: adrank promote --models models --name din --canary 0.1")
@click.option("--models", type=FOLDER, default="models", show_default=True, help="The model repository.")
@click.option("--name", required=True, help="Name in the repository.")
@click.option("--version", type=click.IntRange(min=0), help="Default: the newest, if it is not live.")
@click.option("--shadow", type=SHARE, help="Do not go live, but score this share of the users' requests too, for metrics only.")
@click.option("--canary", type=SHARE, help="Do not go live, but rank this share of the users.")
@click.option("--stop", is_flag=True, help="End the shadow or the canary; the live version goes on.")
@click.option("--max-error-share", "error_share", type=click.FloatRange(0, 1), help="A shadow or canary is stopped above; default 0.01.")
@click.option(
    "--max-p99-ratio", "p99_ratio", type=click.FloatRange(0, min_open=True), help="Of its scoring to the live version's; default 1.5."
)
@click.option("--p-click-ratio", type=(float, float), help="Its mean p(click) to the live version's, least and most; default 0.5 2.")
@click.option("--max-seconds", type=click.FloatRange(0, 60, min_open=True), help="Of one run; then the live version ranks. Default 0.25.")
@click.option("--min-requests", type=click.IntRange(min=1), help="Of each version before it is judged; default 200.")
def promote(models: Path, name: str, version: int | None, shadow: float | None, canary: float | None, stop: bool, **bounds: Any) -> None:
    """Make a version the live one, or let it challenge the live one; running services follow."""
    from features import challenger, releases
    from features.bundle import released

    given = {bound: value for bound, value in bounds.items() if value is not None}
    modes: tuple[tuple[challenger.Mode, float | None], ...] = (("shadow", shadow), ("canary", canary))
    asked = [(mode, share) for mode, share in modes if share is not None]
    if len(asked) + stop > 1:
        raise Refusal("--shadow, --canary and --stop: choose one")
    if given and not asked:
        raise Refusal("bounds are those of a challenger: give --shadow or --canary too")
    if stop:
        releases.stop(models, name)
        print(f"no version of {name} challenges the live one any more")
    for mode, share in asked:
        chosen = version or releases.newest(models, name, released(models / name)[-1:])
        challenger.challenge(models, name, challenger.Challenger(chosen, mode, share, challenger.CanaryBounds(**given)))
        print(f"{name} {chosen} challenges the live version: {mode}, {share:.3g} of the users")
    if not asked and not stop:
        print(f"{name} {releases.promote(models, name, version)} is live")


@click.command(epilog="Example: adrank rollback --models models --name din")
@click.option("--models", type=FOLDER, default="models", show_default=True, help="The model repository.")
@click.option("--name", required=True, help="Name in the repository.")
def rollback(models: Path, name: str) -> None:
    """Make the version that was live before the live one again; running services follow."""
    from features import releases

    print(f"{name} {releases.rollback(models, name)} is live again")
