"""A synthetic ad world whose true p(click) is known: users with drifting interests, ads with quality, position bias.

A click is a coin with
    p(click) = sigmoid(base + interest[day, user, category of the ad] + quality[ad] + bias[slot] + bias[position])
where a user's interest is the taste of the age group and, far stronger, two favourite categories that change now and then, so that
the recent history says what the profile cannot. A click is followed by a conversion, a coin as well, with
    p(conversion given click) = sigmoid(buying + interest · want + spending[age] + offer[ad])
which comes within a week, after an exponential delay. Each ad bids for conversions. A world may go on after
its log: then categories come into fashion and go out of it, and each day some ads leave and others come.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from features.schema import parse_schema

from .datasets.history import Past
from .datasets.prepared import write_split, write_table, write_tables, writing
from .join.delay import Delay, fit_delay

CATEGORIES = ("sports", "travel", "fashion", "games", "food", "finance", "music", "cars")
AGES = ("18-24", "25-34", "35-44", "45-54", "55+")
SLOTS = ("feed", "sidebar", "story")
SLOT_BIAS = np.array([0.3, -0.6, 0.0])
POSITIONS = 8
POSITION_BIAS = -0.2 * np.arange(POSITIONS)
BASE, FAVOURITE, TASTE, QUALITY = -2.2, 2.8, 0.4, 0.5
FAVOURITES, DRIFT = 2, 0.01
"""Favourite categories of a user, and how likely one of them changes in a day."""
FASHION = 0.25
"""Deviation of the daily step of a category's fashion, after the log."""
TURNOVER = 0.06
"""Share of the ads that others replace in a day, after the log."""
NEWCOMERS = 2.0
"""How much more than the first ads' the quality of those that come later varies."""
BUYING, WANT, SPENDING, OFFER = -4.2, 0.5, np.array([-0.8, -0.4, 0.0, 0.4, 0.8]), 0.7
"""Of conversions; the last is the deviation among ads."""
DAYS, DAY = 30, 86_400
DELAY = Delay(7.0 * DAY, 1 / (2.0 * DAY))
"""Of conversions: two days in the mean, were there no end of a week."""
START = 1_767_225_600  # 2026-01-01, UTC
SPLIT_DAYS = {"train": (0, 24), "valid": (24, 27), "test": (27, 30)}
HISTORY = 20
SCHEMA = f"""
name = "world"
[history]
length = {HISTORY}
fields = ["ad_id", "category"]
[user.user_id]
kind = "category"
[user.age]
kind = "category"
[context.slot]
kind = "category"
[context.position]
kind = "category"
[ad.ad_id]
kind = "category"
[ad.category]
kind = "category"
[ad.brand]
kind = "category"
"""
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class World:
    """Users and ads by number; `interests (days, users, categories)`, `quality (ads,)`, `category (ads,)`, `age (users,)`.

    `days (ads, 2)` are the first day of each ad and the first without it; `offer (ads,)` is how likely it is bought, and `bid (ads,)` what
    it pays for that.
    """

    interests: Array
    age: Array
    category: Array
    brand: Array
    quality: Array
    days: Array
    offer: Array
    bid: Array

    def p_click(self, day: Array | int, user: Array | int, ad: Array | int, slot: Array | int, position: Array | int) -> Array:
        """True probabilities of impressions; the arrays broadcast, `position` counts from 0."""
        interest = self.interests[day, user, self.category[ad]]
        logit = BASE + interest + self.quality[ad] + SLOT_BIAS[slot] + POSITION_BIAS[position]
        p: Array = 1 / (1 + np.exp(-logit))
        return p

    def p_after_click(self, day: Array | int, user: Array | int, ad: Array | int) -> Array:
        """True probabilities that clicks are followed by a conversion within its window."""
        logit = BUYING + WANT * self.interests[day, user, self.category[ad]] + SPENDING[self.age[user]] + self.offer[ad]
        p: Array = 1 / (1 + np.exp(-logit))
        return p

    def live(self, day: int) -> Array:
        """The ads that are there on a day."""
        return np.flatnonzero((self.days[:, 0] <= day) & (day < self.days[:, 1]))

    def ads(self) -> pl.DataFrame:
        """`ads.parquet` of the world: the ads of its log."""
        return pl.DataFrame([{"ad_id": f"a{ad}"} | {f"ad.{name}": text for name, text in self.ad(ad).items()} for ad in self.live(0)])

    def ad(self, ad: int) -> dict[str, str]:
        """The features of an ad."""
        return {"category": CATEGORIES[self.category[ad]], "brand": f"brand{self.brand[ad]}"}

    def users(self) -> pl.DataFrame:
        """`users.parquet` of the world."""
        return pl.DataFrame({"user_id": [f"u{user}" for user in range(len(self.age))], "user.age": [AGES[a] for a in self.age]})


def make_world(users: int = 800, ads: int = 400, seed: int = 7, later: int = 0) -> World:
    """Draw a world that goes on for `later` days after its log; the same seed and days give the same one."""
    random = np.random.default_rng(seed)
    age = random.integers(0, len(AGES), users)
    taste = random.normal(0, TASTE, (len(AGES), len(CATEGORIES)))[age]
    loved = np.argsort(random.random((users, len(CATEGORIES))))[:, :FAVOURITES]
    days = []
    for _ in range(DAYS + later):
        loves = np.zeros(taste.shape)
        np.put_along_axis(loves, loved, FAVOURITE, axis=1)
        days.append(taste + loves)
        changed = random.random(users) < DRIFT
        loved[changed, random.integers(0, FAVOURITES)] = random.integers(0, len(CATEGORIES), changed.sum())
    coming = round(TURNOVER * ads)
    count = ads + coming * later
    category = random.integers(0, len(CATEGORIES), count)
    brand = category * 5 + random.integers(0, 5, count)
    quality = random.normal(0, QUALITY, count)
    quality[ads:] *= NEWCOMERS
    fashion = np.zeros((DAYS + later, 1, len(CATEGORIES)))
    fashion[DAYS:] = np.cumsum(random.normal(0, FASHION, (later, 1, len(CATEGORIES))), axis=0)
    here, money = _days(ads, coming, later, random), np.random.default_rng([seed, 1])  # of its own: what was drawn before stays so
    offer, bid = money.normal(0, OFFER, count), money.lognormal(2.0, 0.5, count)
    return World(np.stack(days) + fashion, age, category, brand, quality, here, offer, bid)


def _days(ads: int, coming: int, later: int, random: np.random.Generator) -> Array:
    """First and end of each ad: those of the log leave at random, as those that come after it do."""
    days = np.zeros((ads + coming * later, 2), np.int64)
    days[:, 1] = DAYS + later
    for day in range(later):
        here = np.arange(ads + coming * day)
        leaving = random.choice(here[days[here, 1] == DAYS + later], coming, replace=False)
        days[leaving, 1] = DAYS + day
        days[ads + coming * day : ads + coming * (day + 1), 0] = DAYS + day
    return days


def write_log(world: World, out: Path, impressions: int = 160_000, seed: int = 7, after: float = 0.0) -> dict[str, int]:
    """Show ads at random and write the impressions with what came of them as a prepared data set; rows by split.

    Conversions are those that came until `after` seconds after the last day. `true_click` and `true_conversion` are the probabilities.
    """
    random = np.random.default_rng(seed)
    seconds = np.sort(random.integers(0, DAYS * DAY, impressions))
    day = seconds // DAY
    user = random.integers(0, len(world.age), impressions)
    ad = random.choice(world.live(0), impressions)
    slot, position = random.integers(0, len(SLOTS), impressions), random.integers(0, POSITIONS, impressions)
    p_click = world.p_click(day, user, ad, slot, position)
    p_conversion = p_click * world.p_after_click(day, user, ad)
    click = (chance := random.random(impressions)) < p_click
    took = -np.log1p(np.random.default_rng([seed, 1]).random(impressions) * np.expm1(-DELAY.rate * DELAY.window)) / DELAY.rate
    known = DAYS * DAY + after - seconds
    came = (chance < p_conversion) & (took <= known)
    delay = fit_delay(took[came], known[came], DELAY.window)
    log = pl.DataFrame(
        {
            "label": click.astype(np.int8),
            "user_id": [f"u{u}" for u in user],
            "ad_id": [f"a{a}" for a in ad],
            "ts": seconds + START,
            "context.slot": [SLOTS[s] for s in slot],
            "context.position": [str(p + 1) for p in position],
            "conversion": came.astype(np.int8),
            "true_click": p_click,
            "true_conversion": p_conversion,
        }
    )
    past = Past(log, HISTORY)
    maturity = delay.share(pl.lit(pl.Series(known))).alias("conversion_maturity")
    frame = log.with_columns(maturity, history=past.histories(slice(None)))
    with writing(out) as folder:
        write_tables(folder, parse_schema(SCHEMA), world.ads(), world.users())
        write_table(folder, "histories", past.after())
        return {split: write_split(folder, split, [frame.filter(_between(day, *days))]) for split, days in SPLIT_DAYS.items()}


def _between(day: Array, first: int, end: int) -> pl.Series:
    return pl.Series((day >= first) & (day < end))


if __name__ == "__main__":
    write_log(make_world(), Path(sys.argv[1]))
