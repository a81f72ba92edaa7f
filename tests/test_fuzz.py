"""Schemathesis against our own OpenAPI document: valid or broken, no request makes the service fail or stray from what it documents."""

import asyncio

import bundles
import httpx
import pytest
import schemathesis
from conftest import running, until_ready
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from features.state import Ad, MemoryStore
from service.app import create_app
from service.settings import Settings


class Portal:
    """One running service, asked from synchronous tests on an event loop of its own."""

    def __init__(self, models) -> None:
        self._loop = asyncio.new_event_loop()
        self._store = MemoryStore()
        self._loop.run_until_complete(self._store.put_ads(Ad(ad_id, features) for ad_id, features in bundles.ADS.items()))
        self._running = running(Settings(models=models, redis="memory://"), self._store, ready=False)
        self.client = self._loop.run_until_complete(self._running.__aenter__())
        self._loop.run_until_complete(until_ready(self.client))

    def ask(self, **request) -> httpx.Response:
        return self._loop.run_until_complete(self.client.request(**request))

    def close(self) -> None:
        self._loop.run_until_complete(self._running.__aexit__(None, None, None))
        self._loop.close()


@pytest.fixture(scope="session")
def portal(repository):
    portal = Portal(repository)
    yield portal
    portal.close()


DOCUMENT = create_app(Settings(redis="memory://")).openapi()
OPERATIONS = [found.ok() for found in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()]
KEPT = settings(max_examples=30, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


# Its own pytest integration does not work with pytest 9.
@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("operation", OPERATIONS, ids=[f"{each.method} {each.path}" for each in OPERATIONS])
def test_the_service_does_what_its_document_says(operation, mode, portal):
    if mode.is_negative and not operation.body:
        return  # nothing to get wrong

    @KEPT
    @given(operation.as_strategy(generation_mode=mode))
    def check(case):
        sent = case.as_transport_kwargs(base_url="http://adrank")
        body = {"json": sent["json"]} if sent.get("json") is not None else {"content": sent.get("data")}
        headers = {name: value for name, value in sent["headers"].items() if name.lower() != "content-length"}
        answer = portal.ask(method=sent["method"], url=sent["url"], headers=headers, params=sent.get("params"), **body)
        assert answer.status_code < 500 or answer.status_code == 504, answer.text
        # Which features there are is the model's to say (/v1/schema), so a request that the document allows may be refused.
        # A deadline that passed is a 504 by design.
        excluded = [positive_data_acceptance, not_a_server_error]
        if operation.path == "/v1/events":  # events are judged one by one, so a batch of none that is valid is a 202 that says so
            excluded.append(negative_data_rejection)
        case.validate_response(answer, excluded_checks=excluded)

    check()
