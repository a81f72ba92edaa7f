"""A ranking as it was served: all that the prediction was made of, and what it came to. What training and checks start from.

Values are raw, as `encode_request` takes them, so whatever was encoded online can be encoded again. Knows nothing about streams.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any

import numpy as np

from .encode import AdTable, Encoder, Features, Feeds, Request, encode_request
from .packing import StateError, pack, unpacker
from .state import unpack_features

FORMAT = 2
WITH_TIMES, WITH_BIDS, WITH_EXPERIMENT, WITH_COUNTERS = 3, 4, 5, 6
"""The formats of rankings whose behaviours have times, of those whose ads bid, of those of an experiment or with p(conversion), and of
those with counters; older readers put aside what they do not know."""
_SHAPES = (str, float, str, int, str, dict, dict, list, list, list, list, list, list, dict, dict, list, str, dict, int, list)
_MONEY_SHAPES = (str, list, list, list)
_EXPERIMENT_SHAPES = (dict, list)
_COUNTERS_SHAPES = (dict,)
_ADDED: Mapping[int, tuple[object, ...]] = {
    1: (0,),
    FORMAT: ([],),
    WITH_TIMES: ("pctr", [], [], []),
    WITH_BIDS: ({}, []),
    WITH_EXPERIMENT: ({},),
}
"""By format what the next one has more, as it is where nobody said; the first could not say what is shown."""


@dataclass(frozen=True, slots=True)
class ServedRecord:
    """One ranking. `p_click` and `propensity` stand beside `ad_ids`, the ads of the answer, best first: position 1 is the first."""

    request_id: str
    ts: float
    """When it was ranked, in seconds since 1970."""
    model: str
    version: int
    user_id: str
    user: Features
    """Clean values, the stored and the sent ones together."""
    context: Features
    history: Sequence[str]
    """The behaviours that were encoded, oldest first."""
    ad_ids: Sequence[str]
    p_click: Sequence[float]
    propensity: Sequence[float]
    """The probability with which the policy puts this ad at this position, given the ads above it; 1 where nothing is explored."""
    positions: Sequence[int] = ()
    """Where the ads were shown, from 1, where that is not their order."""
    candidates: Sequence[str] = ()
    """All that were ranked, in the order of the request, where the policy explored; else empty."""
    ads: Mapping[str, bytes] = field(default_factory=dict)
    """The packed features (`state.pack_features`) of the ads that the catalogue had, of those shown, behaved on and in `candidates`."""
    sent: Mapping[str, Features] = field(default_factory=dict)
    """Features that came with candidates; of a record that was unpacked also what is `counted`, where none of that name came."""
    unknown: Sequence[str] = ()
    """The candidates that were ranked as unknown, though `ads` may have some of them for the history: ads that have left."""
    policy: str = "greedy"
    """`greedy`, or how it explored, such as `epsilon_greedy 0.1` or `plackett_luce 0.5`."""
    tensors: Mapping[str, bytes] = field(default_factory=dict)
    """For some rankings what the model was given, by name: the bytes of the tensors, of `ad_…` those of `ad_ids`; to compare with."""
    shown: int = 0
    """How many of `ad_ids`, from the first, the caller said that it shows; 0: it did not say. An ad that was answered and neither said
    nor reported to be shown is no impression: nobody may have seen it.
    """
    history_ts: Sequence[float] = ()
    """When the behaviours of `history` were, where the model is given their ages; the request was at `ts`."""
    objective: str = "pctr"
    """What the ads were ordered by."""
    bids: Sequence[int] = ()
    """In millionths, with their multipliers, -1 where there is none: beside `candidates`, or `ad_ids` where those are empty."""
    bid_types: Sequence[str] = ()
    """`cpm`, `cpc` or `cpa`, beside `bids`."""
    prices: Sequence[int] = ()
    """In millionths, beside `ad_ids`: what each would have had to pay for what it bids for; empty where nobody asked."""
    experiment: Mapping[str, str] = field(default_factory=dict)
    """The arm that the caller had put the user into, by experiment."""
    p_conversion: Sequence[float] = ()
    """Of an impression, beside `ad_ids`, where the head was asked for."""
    counted: Mapping[str, bytes] = field(default_factory=dict)
    """Counters by name, float64 beside `candidates`, or `ad_ids` where those are empty."""

    def feeds(self, encoder: Encoder, ad_ids: Sequence[str] | None = None) -> Feeds:
        """The tensors `(1, ...)` of the ads shown, or of those of the candidates that are named, encoded anew.

        What the encoder's schema does not know or cannot read is missing there, as it is where the service reads its store.

        Raises:
            StateError: an ad's features are damaged.
        """
        table, wanted = AdTable(encoder), self.ad_ids if ad_ids is None else ad_ids
        for ad_id, packed in self.ads.items():
            table.put([ad_id], encoder.encode_one("ad", encoder.usable("ad", unpack_features(packed))[0], ad_id))
        table.remove([ad_id for ad_id in self.unknown if ad_id in self.ads])
        sent = {row: encoder.usable("ad", self.sent[ad_id])[0] for row, ad_id in enumerate(wanted) if ad_id in self.sent}
        context, user = encoder.usable("context", self.context)[0], encoder.usable("user", self.user)[0]
        request = Request(self.user_id, {}, context, self.history, wanted, sent, user, self.history_ts, self.ts)
        return encode_request(table, request)[0]


_unpack: Callable[[bytes], list[Any]] = unpacker(list[Any], "a served ranking")
_values = attrgetter(*(entry.name for entry in fields(ServedRecord)))


def pack_served(served: ServedRecord) -> bytes:
    """A served ranking as one value of a stream."""
    values = _values(served)
    document = [WITH_COUNTERS, *values] if served.counted else [WITH_EXPERIMENT, *values[: -len(_COUNTERS_SHAPES)]]
    if document[0] == WITH_EXPERIMENT and not served.experiment and not served.p_conversion:
        document = [WITH_BIDS, *values[: len(_SHAPES) + len(_MONEY_SHAPES)]]
    if document[0] == WITH_BIDS and not served.bids and served.objective == "pctr":
        document = [WITH_TIMES, *values[: len(_SHAPES)]] if served.history_ts else [FORMAT, *values[: len(_SHAPES) - 1]]
    return pack(document)


def unpack_served(value: bytes) -> ServedRecord:
    """The served ranking in a packed value.

    Raises:
        StateError: the value is not one.
    """
    document = _unpack(value)
    for before, added in _ADDED.items():
        if document[:1] == [before]:
            document = [max(before + 1, FORMAT), *document[1:], *added]
    shapes = [*_SHAPES, *_MONEY_SHAPES, *_EXPERIMENT_SHAPES, *_COUNTERS_SHAPES]
    if document[:1] != [WITH_COUNTERS] or [*map(type, document[1:])] != shapes:
        raise StateError(f"the value is not a served ranking of format {FORMAT} to {WITH_COUNTERS}")
    served = _with_counters(ServedRecord(*document[1:]))
    bidding = len(served.candidates or served.ad_ids) if served.bids else 0
    paying = len(served.ad_ids) if served.prices else 0
    money = (len(served.bids), len(served.bid_types), len(served.prices)) == (bidding, bidding, paying)
    p_conversion = served.p_conversion or served.p_click
    if not money or not len(served.ad_ids) == len(served.p_click) == len(served.propensity) == len(p_conversion):
        raise StateError("a served ranking is damaged: its columns differ in length")
    if len(served.history_ts) not in (0, len(served.history)):
        raise StateError("a served ranking is damaged: its behaviours and their times differ in length")
    if not all(isinstance(text, str) for pair in served.experiment.items() for text in pair):
        raise StateError("a served ranking is damaged: its experiment has something else than texts")
    if not 0 <= served.shown <= len(served.ad_ids):
        raise StateError("a served ranking is damaged: it says that more ads are shown than it has")
    return served


def _with_counters(served: ServedRecord) -> ServedRecord:
    """The record with what was counted among what was sent."""
    if not served.counted:
        return served
    ad_ids = served.candidates or served.ad_ids
    columns = [column for column in served.counted.values() if type(column) is bytes and len(column) == 8 * len(ad_ids)]
    if len(columns) < len(served.counted) or not set(map(type, served.sent.values())) <= {dict}:
        raise StateError("a served ranking is damaged: its counters are not a number an ad")
    rows = zip(*(np.frombuffer(column, "<f8").tolist() for column in columns), strict=True)
    counted = {ad_id: dict(zip(served.counted, row, strict=True)) for ad_id, row in zip(ad_ids, rows, strict=True)}
    return replace(served, sent={ad_id: {**numbers, **served.sent.get(ad_id, {})} for ad_id, numbers in counted.items()})
