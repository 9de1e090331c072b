"""Requests that schemathesis makes of docs/openapi.json, right and wrong ones; the answers must be as described."""
from __future__ import annotations

import contextlib
import random
import time
from collections import Counter

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.fuzz import UNSUPPORTED, Findings, Siege
from tests.kit.processes import ROOT

FULL = 180  # s
ROUND = 10  # requests of a kind to an endpoint, then the next one's turn
HANG = 30  # s
HELD = "0.01"  # s; instead of what the request would have waited
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance, response_headers_conformance]
WAITS = {"/recv": "wait", "/log": "wait", "/ask": "wait", "/claim": "wait", "/message/{id}": "wait_fetched"}


class Visits:
    """What was asked and what was wrong; ids that the bus gave are asked for again."""

    def __init__(self, url):
        self.url = url
        self.statuses, self.violations, self.ids = Counter(), {}, ["0"]
        self.session = requests.Session()

    def visit(self, case):
        self.prepare(case)
        try:
            response = case.call(base_url=self.url, session=self.session, timeout=HANG)
            self.statuses[response.status_code] += 1
            if response.status_code == 200 and case.path == "/send":
                self.ids.append((response.json().get("results") or [response.json()])[0]["id"])
            if response.status_code >= 500 and response.status_code not in UNSUPPORTED:
                raise AssertionError(f"status {response.status_code}")
            case.validate_response(response, checks=CHECKS)
        except Exception as error:
            what = f"{case.method} {case.path}: {str(error)[:1500]}"
            self.violations.setdefault(what[:60], what)

    def prepare(self, case):
        """Nothing is held for long, and half of the messages that it asks for exist."""
        wait = WAITS.get(case.path)
        body = case.body if isinstance(case.body, dict) else {}
        if wait and not isinstance(case.query.get(wait), str) and not isinstance(body.get(wait), str):
            case.query = {**case.query, wait: HELD}
            if body:
                case.body = {**body, wait: 0}
        if random.random() < 0.5:
            for part in (case.path_parameters, case.query, body):
                if isinstance(part, dict) and "id" in part:
                    part["id"] = random.choice(self.ids[-20:])


def run(folder, seconds=FULL):
    schema = schemathesis.openapi.from_path(ROOT / "docs" / "openapi.json")
    began = time.monotonic()
    with Siege(folder) as siege:
        visits = Visits(siege.server.url)
        kinds = [(result.ok(), mode) for result in schema.get_all_operations() for mode in GenerationMode]
        calm = settings(max_examples=ROUND, deadline=None, database=None, phases=[Phase.generate],
                        suppress_health_check=list(HealthCheck))
        rounds, warm = 0, False
        while time.monotonic() < began + seconds:
            operation, mode = kinds[rounds % len(kinds)]
            with contextlib.suppress(Unsatisfiable):  # there is nothing that could be wrong
                seed(rounds)(calm(given(operation.as_strategy(generation_mode=mode))(visits.visit)))()
            rounds += 1
            if rounds % len(kinds) == 0:
                siege.keep(f"{rounds}")
            if not warm and time.monotonic() > began + seconds / 10:
                warm = True
                siege.begin()
        common, wrong = siege.end()
    by_status = " ".join(f"{status}:{count}" for status, count in sorted(visits.statuses.items()))
    figures = {"requests": sum(visits.statuses.values()), "by status": by_status, "rounds": rounds, "seconds": seconds}
    return Findings({**figures, **common}, [*visits.violations.values(), *wrong])
