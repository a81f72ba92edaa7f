"""What `adrank serve` refuses to start with: what no waiting would mend. All else is waited for, unready, and told on `/readyz`."""

import contextlib
import ipaddress
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from features.repository import ambiguous, model_names

from .api.tokens import Guard, TokenError
from .settings import Settings, SettingsError


def check_start(settings: Settings) -> None:
    """Refuse what cannot be served with.

    Raises:
        SettingsError: the model repository is no folder, several models are live and none is set, the device is not there, workers have
            nowhere to count together, the tokens cannot be used, or requests cannot be traced as asked.
    """
    wrongs = (
        models_wrong(settings),
        model_unset(settings),
        tokens_wrong(settings),
        metrics_wrong(settings),
        traces_wrong(settings),
        device_wrong(settings),
    )
    for wrong in wrongs:
        if wrong:
            raise SettingsError(wrong)


def models_wrong(settings: Settings) -> str | None:
    """Why the path of the model repository cannot ever hold models; one that is not there yet may still be made or mounted."""
    try:
        is_other = settings.models.exists() and not settings.models.is_dir()
    except OSError:  # not to be read now: a matter of the volume
        return None
    return f"the model repository {settings.models} is not a folder; name another with --models or ADRANK_MODELS" if is_other else None


def model_unset(settings: Settings) -> str | None:
    """Why it is not known which model is for requests that name none."""
    return None if settings.model else ambiguous(model_names(settings.models))


def tokens_wrong(settings: Settings) -> str | None:
    """Why the file of tokens cannot be used."""
    if settings.tokens is None:
        return None
    try:
        Guard(settings.tokens)
    except TokenError as error:
        return f"setting ADRANK_TOKENS: {settings.tokens}: {error}"
    return None


def tokens_loose(settings: Settings) -> str | None:
    """Who may ask for more than they should: anybody on the network, or any user of this machine who can read the tokens."""
    if settings.tokens is None:
        if not is_loopback(settings.host):
            return f"whoever reaches {settings.host} may rank, and send events, users and ads; name a file of tokens with ADRANK_TOKENS"
        return None
    with contextlib.suppress(OSError):
        if settings.tokens.stat().st_mode & 0o004:
            return f"every user of this machine can read {settings.tokens}; take the right away with chmod o-r"
    return None


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def metrics_wrong(settings: Settings) -> str | None:
    """Why several workers cannot keep their metrics where all of them see them."""
    if settings.workers == 1:
        return None
    try:
        tempfile.gettempdir()
    except OSError:
        return (
            f"{settings.workers} workers count together in files, and there is no folder to write them to: "
            "set TMPDIR to one, such as a volume in memory, or use --workers 1"
        )
    return None


def traces_wrong(settings: Settings) -> str | None:
    """Why requests cannot be traced."""
    if not settings.trace_share:
        return None
    try:
        from .telemetry.tracing import check  # noqa: PLC0415  # an extra
    except ImportError as error:
        why = f"setting ADRANK_TRACE_SHARE: {settings.trace_share:g} needs OpenTelemetry, and {error.name} is not installed"
        return f"{why}; pip install 'adrank[otel]', or set it to 0"
    try:
        check()
    except SettingsError as error:
        return str(error)
    return None


def device_wrong(settings: Settings) -> str | None:
    """Why the device cannot score. It is tried in a process of its own, which gives the device's memory back."""
    if settings.device == "cpu":
        return None
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        try:
            return process.submit(tried, settings.device).result()
        except BrokenProcessPool:
            return f"device {settings.device} is not available: the process that tried it was killed"


def tried(device: str) -> str | None:
    """What is wrong with a device, None where it starts."""
    from .errors import DeviceError  # noqa: PLC0415  # ONNX Runtime is not for the process that only hands out connections
    from .ranking.scorer import try_device  # noqa: PLC0415

    try:
        try_device(device)
    except DeviceError as error:
        return str(error)
    return None
