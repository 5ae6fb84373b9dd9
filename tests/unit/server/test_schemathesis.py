"""Made-up requests by the OpenAPI document: none makes the server fail, all answers are as the document says."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import checks

from unit.server.conftest import Served

CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


def test_made_up_requests(served: Served) -> None:
    """By their paths, not by `schemathesis.pytest`, which does not work with this version of pytest."""
    document = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [each.ok() for each in document.get_all_operations()]
    assert len(operations) > 15
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS, timeout=60)

        check()
