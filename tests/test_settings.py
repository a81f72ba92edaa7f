import os

import pytest

from service.settings import Settings, SettingsError, load_settings, processors


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in [name for name in os.environ if name.startswith("ADRANK_")]:
        monkeypatch.delenv(name)


def test_flags_over_variables_over_defaults(monkeypatch):
    monkeypatch.setenv("ADRANK_PORT", "9000")
    monkeypatch.setenv("ADRANK_WORKERS", "3")
    settings = load_settings({"port": 9001, "host": None})
    assert (settings.port, settings.workers, settings.host) == (9001, 3, "127.0.0.1")


def test_an_unknown_variable_is_refused_with_a_hint(monkeypatch):
    monkeypatch.setenv("ADRANK_STORE_TIMEOUT", "5")
    with pytest.raises(SettingsError, match=r"^ADRANK_STORE_TIMEOUT is not a setting; did you mean ADRANK_STORE_TIMEOUT_MS"):
        load_settings()


def test_an_unknown_flag_is_refused():
    with pytest.raises(SettingsError, match="ADRANK_PROT is not a setting; did you mean ADRANK_PORT"):
        load_settings({"prot": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "0"),
        ("PORT", "many"),
        ("WORKERS", "0"),
        ("DEVICE", "tpu"),
        ("REDIS", "http://x"),
        ("REDIS", "redis://:secret@host:port/0"),
        ("REDIS", "redis://:secret/x@host:6379/0"),
        ("REDIS", "redis://"),
        ("STORE_TIMEOUT_MS", "nan"),
        ("STORE_TIMEOUT_MS", "-1"),
        ("MAX_BODY_BYTES", "1"),
        ("MAX_INFLIGHT", "0"),
        ("EXPLORE", "ucb"),
        ("EPSILON", "1.5"),
        ("TEMPERATURE", "0"),
        ("LOG_SHARE", "nan"),
        ("LOG_QUEUE", "0"),
        ("MAX_EVENTS", "10001"),
        ("MAX_EVENT_BATCHES", "0"),
        ("EVENT_AGE_SECONDS", "0"),
        ("EVENT_AHEAD_SECONDS", "-1"),
        ("EVENTS_KEPT", "0"),
        ("LOG_FORMAT", "xml"),
        ("LOG_LEVEL", "loud"),
        ("TRACE_SHARE", "1.1"),
    ],
)
def test_a_wrong_value_names_the_setting_and_no_secret(monkeypatch, name, value):
    monkeypatch.setenv(f"ADRANK_{name}", value)
    with pytest.raises(SettingsError, match=f"setting ADRANK_{name}: ") as caught:
        load_settings()
    assert "secret" not in str(caught.value)


def test_settings_are_frozen_and_keep_the_password_to_themselves():
    settings = Settings(redis="rediss://user:secret@host:6380/1?ssl_cert_reqs=none")
    assert "secret" not in repr(settings)
    assert settings.store_name == "rediss://host:6380/1"
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


def test_workers_get_the_same_settings(monkeypatch):
    settings = load_settings({"port": 9001, "redis": "memory://", "model": "din", "device": "cuda", "models": "/x"})
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert load_settings() == settings


@pytest.mark.parametrize(("text", "limit"), [("150000 100000", "quota"), ("50000 100000", "quota"), ("max 100000", ""), ("nonsense", "")])
def test_processors_follow_the_quota(tmp_path, text, limit):
    unlimited = processors(tmp_path / "absent")
    assert unlimited == (len(os.sched_getaffinity(0)), "affinity")
    (tmp_path / "cpu.max").write_text(text)
    assert processors(tmp_path) == ((1, limit) if limit and unlimited.usable > 1 else unlimited)


def test_processors_follow_an_old_quota(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("100000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert processors(tmp_path).usable == 1


def test_processors_follow_the_affinity(tmp_path):
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    try:
        assert processors(tmp_path) == (1, "affinity")
    finally:
        os.sched_setaffinity(0, mine)


def test_threads_are_divided_by_workers():
    assert Settings(workers=256).scoring_threads == 1
    assert Settings(threads=5, workers=256).scoring_threads == 5
