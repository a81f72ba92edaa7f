"""What anybody may be told of a fault: a word, and a plain sentence. The rest of it, with paths, addresses and what libraries say, is for
the log.
"""

from dataclasses import dataclass, replace

from features.bundle import BundleError
from features.state import StoreError

from .errors import DeviceError, RuntimeTooOldError, ScoringError

MODELS = {
    "missing": "there is no such version, or a file of it is missing",
    "unreadable": "a file of it cannot be read",
    "not_a_file": "what lies in a file's place is none, or far too large",
    "damaged": "a file of it is not what was published",
    "incomplete": "its manifest does not list all that a bundle needs",
    "other_contract": "it was made with another feature contract than this program has",
    "external_data": "it has weights in a file that no digest covers, or that lies outside of it",
    "goldens": "it does not score its goldens as training did, or has none",
    "no_version": "it does not say which version is live",
    "challenger": "what is announced as its challenger is none",
    "graph": "its graph cannot be loaded",
    "onnxruntime": "its graph needs a newer onnxruntime",
    "device": "the device that is to score is not available",
    "gone": "it has no live version any more, but requests that name no model are ranked with it",
    "unforeseen": "it failed to load in a way nobody foresaw",
    "unusable": "it cannot be used",
}
"""Why a version is not used."""
STORE = {
    "store_denied": "the store refuses the service's user or password, or the user lacks a permission",
    "store_unreachable": "the store cannot be reached",
    "store_timeout": "the store did not answer in time",
    "store_corrupt": "what the store has is damaged",
    "store_error": "the store refused what was asked",
    "store_emptied": "the store has no ads any more",
}
"""Why the store does not do what it is asked."""
LOG = "the service's log says more"
SCORING = f"the model failed on this request; {LOG}, under its request_id"


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a version of a model is not used: a word of `MODELS`, and all that is known. `stays` is the version that is used instead."""

    code: str
    detail: str
    needs: str = ""
    stays: int | None = None

    @classmethod
    def by(cls, error: BundleError | ScoringError) -> "Refused":
        """What an error says."""
        if isinstance(error, BundleError):
            return cls(error.code if error.code in MODELS else "unusable", str(error))
        if isinstance(error, RuntimeTooOldError):
            return cls("onnxruntime", error.detail, f", {error.needs}")
        return cls("device" if isinstance(error, DeviceError) else "graph", error.detail)

    def beside(self, version: int) -> "Refused":
        """The same, where another version goes on."""
        return replace(self, stays=version)

    @property
    def _stays(self) -> str:
        return "" if self.stays is None else f"; version {self.stays} stays live"

    @property
    def public(self) -> str:
        """For anybody."""
        return f"{self.code}: {MODELS[self.code]}{self.needs}; {LOG}{self._stays}"

    @property
    def whole(self) -> str:
        """For the log."""
        return f"{self.detail}{self._stays}"


def of_store(reason: str) -> str:
    """The sentence for a reason that a `StoreError` gives."""
    return f"{STORE.get(reason, 'the store does not do what it is asked')}; {LOG}"


def of_store_error(error: StoreError) -> dict[str, str]:
    """A store that is down, as `/readyz` tells it."""
    return {"status": "down", "reason": error.reason, "detail": of_store(error.reason)}
