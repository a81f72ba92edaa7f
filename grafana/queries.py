"""PromQL as the dashboard asks it: what the variables choose, and rates, means and quantiles of it."""

JOB = 'namespace=~"$namespace", job=~"$job"'
RANKER = f'{JOB}, instance=~"$instance"'
RANKING = f'{RANKER}, route=~"/rank|/v1/rank"'
MODEL = 'namespace=~"$namespace", model=~"$model"'
JOINER = 'namespace=~"$namespace"'
RATE = "[$__rate_interval]"


def rate(metric: str, *by: str, where: str = RANKER) -> str:
    """The rate of a counter, summed by labels."""
    together = f"sum by ({', '.join(by)})" if by else "sum"
    return f"{together} (rate({metric}{{{where}}}{RATE}))"


def grown(histogram: str, where: str = RANKER) -> str:
    """What fell into each bucket."""
    return f"sum by (le) (increase({histogram}_bucket{{{where}}}{RATE}))"


def mean(histogram: str, *by: str, where: str = RANKER) -> str:
    """The mean of what was observed; nothing was: 0."""
    return f"{rate(f'{histogram}_sum', *by, where=where)} / clamp_min({rate(f'{histogram}_count', *by, where=where)}, 1e-9)"


def share(part: str, whole: str, *by: str) -> str:
    """One rate over another; 0 where there was nothing."""
    return f"{part} / on ({', '.join(by)}) group_left () clamp_min({whole}, 1e-9)"


def quantile(share: float, histogram: str, *by: str, where: str = RANKER) -> str:
    """A quantile of what was observed."""
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', *by, 'le', where=where)})"
