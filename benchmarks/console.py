"""How soon the console's pages are usable: from opening one in a real browser, nothing cached, to what people read on it.

python -m benchmarks.console --url http://127.0.0.1:8000
"""

import shutil
import statistics
import time

import click
from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.table import Table

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PAGES = {
    "rank": "Take a sample",
    "live": "Models that rank",
    "models": "Measured in training",
    "quality": "by position",
    "events": "What became of events",
    "retrainings": "On the newest slice",
}
"""What is there once a page is."""


def seconds(browser: Browser, url: str, page: str) -> float:
    """From the address to the text, in a context of its own."""
    context = browser.new_context()
    tab, began = context.new_page(), time.perf_counter()
    tab.goto(f"{url}/console#{page}")
    tab.get_by_text(PAGES[page]).first.wait_for()
    took = time.perf_counter() - began
    context.close()
    return took


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="A service that runs, with a joiner and a retraining.")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
def main(url: str, rounds: int) -> None:
    """Open each page so many times, in turn."""
    if CHROMIUM is None:
        raise click.ClickException("no Chromium: apt-get install chromium")
    table = Table("page", "median, s", "from", "to")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        took = [{page: seconds(browser, url, page) for page in PAGES} for _ in range(rounds)]
        browser.close()
    for page in PAGES:
        all_ = [each[page] for each in took]
        table.add_row(page, *(f"{value:.2f}" for value in (statistics.median(all_), min(all_), max(all_))))
    Console().print(table)


if __name__ == "__main__":
    main()
