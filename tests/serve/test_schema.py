"""Whatever fits the server's own OpenAPI description, or nearly does, gets an answer that the description names."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from .conftest import ADMIN, bearer, running

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


@pytest.mark.slow
def test_every_route_answers_as_it_is_described(made_adapters):
    with running(made_adapters) as server:
        described = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=bearer(ADMIN))
        answered = {path: set() for path in described.raw_schema["paths"]}
        for operation in (result.ok() for result in described.get_all_operations()):

            @settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy())
            def ask(case):
                response = case.call_and_validate(headers=bearer(ADMIN), checks=CHECKS, timeout=30)
                answered[case.path].add(response.status_code)

            ask()
        assert all(answered.values())
        assert answered["/v1/models"] == answered["/metrics"] == {200}
        assert answered["/v1/chat/completions"] & {400, 404}
        assert server.http.get("/readyz").status_code == 200
        assert server.text("cardio")
