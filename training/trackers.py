"""Where a training's numbers go beside its bundle, for those who compare many: TensorBoard's event files, or a run of MLflow's server.

Both are extras. They are told once, when the training has ended and its bundle is published: what goes wrong here cannot harm it.
"""

import json
import os
import shlex
from pathlib import Path

from features.errors import AdrankError

from .report.files import PAGE
from .train import Trained

SERVER = "MLFLOW_TRACKING_URI"
USUAL = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
"""Of MLflow's client, where nothing else is set: its own 7 retries are four minutes of silence, and it prints into `--json`."""


class TrackerError(AdrankError, RuntimeError):
    """A training cannot be logged; the message says where, and why."""


def check(tracker: str) -> None:
    """See that a training could be logged, before it takes an hour.

    Raises:
        ModuleNotFoundError: the extra is not installed.
        TrackerError: MLflow's server is not named, or does not answer.
    """
    if tracker == "tensorboard":
        import torch.utils.tensorboard  # noqa: PLC0415, F401  # an extra

        return
    import mlflow  # noqa: PLC0415  # an extra

    for name, value in USUAL.items():
        os.environ.setdefault(name, value)
    if not os.environ.get(SERVER):
        raise TrackerError(f"{SERVER} is not set: it names MLflow's server, such as http://127.0.0.1:5000")
    try:
        mlflow.search_experiments(max_results=1)
    except mlflow.exceptions.MlflowException as error:
        raise TrackerError(f"MLflow at {os.environ[SERVER]} ({SERVER}) does not answer: {_first(error)}") from error


def track(tracker: str, trained: Trained, bundle: Path) -> str:
    """Log a training that became `bundle`; where that is, in a line.

    Raises:
        TrackerError: MLflow does not take it, or TensorBoard's folder cannot be written.
    """
    scalars = [
        {"train_loss": each.train_loss, "learning_rate": each.learning_rate, "valid_loss": each.valid.log_loss, "valid_auc": each.valid.auc}
        for each in trained.epochs
    ]
    for split, measures in trained.metrics.items():
        scalars[-1] |= {f"{split}/{name}": value for name, value in measures.as_dict().items() if value is not None}
    try:
        return (_tensorboard if tracker == "tensorboard" else _mlflow)(trained, scalars, bundle)
    except (TrackerError, OSError) as error:
        raise TrackerError(f"{bundle} is published, and not logged: {_first(error)}") from error


def _tensorboard(trained: Trained, scalars: list[dict[str, float]], bundle: Path) -> str:
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra

    runs = Path(f"{bundle.parent.parent}-runs")
    with SummaryWriter(str(runs / bundle.parent.name / bundle.name)) as writer:
        writer.add_text("settings", f"```\n{json.dumps(trained.settings, indent=1, default=str)}\n```")
        for step, values in enumerate(scalars, 1):
            for name, value in values.items():
                writer.add_scalar(name, value, step)
    return f"logged to {runs}: tensorboard --logdir {shlex.quote(str(runs))}"


def _mlflow(trained: Trained, scalars: list[dict[str, float]], bundle: Path) -> str:
    import mlflow  # noqa: PLC0415  # an extra

    tags = {"bundle": str(bundle), "network": trained.family}
    try:
        with mlflow.start_run(run_name=f"{bundle.parent.name} {bundle.name}", tags=tags) as run:
            mlflow.log_params(trained.settings)
            for step, values in enumerate(scalars, 1):
                mlflow.log_metrics(values, step=step)
            if (bundle / PAGE).exists():
                mlflow.log_artifact(str(bundle / PAGE))
    except mlflow.exceptions.MlflowException as error:
        raise TrackerError(f"MLflow at {os.environ[SERVER]}: {_first(error)}") from error
    return f"logged to {os.environ[SERVER]}, run {run.info.run_id}"


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0]
