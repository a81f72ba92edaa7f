"""What anybody is told when something fails: a plain sentence, and no path, address or word of a library. The log has the rest."""

import time

import pytest
from test_api import GOOD, check

from features.bundle import BundleError
from features.state import StoreError
from service.errors import DeviceError, ScoringError
from service.public import MODELS, STORE, Refused, of_store
from service.telemetry.series import STORE_FAULTS

pytestmark = pytest.mark.anyio
SECRET = "ONNXRuntimeError at /srv/models/din/model.onnx, 10.0.0.7:6379"


class TestAnswers:
    async def test_a_model_that_fails(self, client, caplog):
        def failing(_):
            raise ScoringError(f"the model failed: {SECRET}")

        client.app.state.service.ranker.models.loaded["din"].scorer.run = failing
        try:
            answer = await client.post("/rank", json=GOOD)
        finally:
            del client.app.state.service.ranker.models.loaded["din"].scorer.run
        check(answer, 500, "scoring_failed")
        assert answer.json()["detail"].startswith("the model failed on this request; the service's log says more")
        assert "ONNX" not in answer.text
        assert [record.detail for record in caplog.records if hasattr(record, "detail")] == [f"the model failed: {SECRET}"]

    async def test_a_store_that_fails(self, client, monkeypatch):
        async def failing(*_):
            raise StoreError("store_unreachable", SECRET)

        for asked in ("apply", "ping", "get_user"):
            monkeypatch.setattr(client.store, asked, failing)
        click = {"type": "click", "event_id": "e", "user_id": "u", "ad_id": "a1", "request_id": "r", "ts": time.time()}
        answers = [
            await client.post("/v1/events", json={"events": [click]}),
            await client.get("/readyz"),
            await client.post("/rank", json=GOOD),
        ]
        assert [answer.status_code for answer in answers] == [503, 200, 200]
        for answer in answers:
            assert "10.0.0.7" not in answer.text
        assert of_store("store_unreachable") in answers[0].text


class TestSentences:
    def test_each_fault_has_one(self):
        assert set(STORE_FAULTS) <= STORE.keys()
        for error, code in (
            (BundleError("x", "damaged"), "damaged"),
            (BundleError("x"), "unusable"),
            (BundleError("x", "new"), "unusable"),
        ):
            assert Refused.by(error).public.startswith(f"{code}: {MODELS[code]}; ")
        assert Refused.by(ScoringError("x")).code == "graph"
        assert Refused.by(DeviceError("x")).code == "device"

    def test_the_log_has_all_of_it(self):
        refused = Refused.by(BundleError(SECRET, "damaged")).beside(7)
        assert (refused.whole, SECRET in refused.public) == (f"{SECRET}; version 7 stays live", False)
        assert refused.public.endswith("; version 7 stays live")
