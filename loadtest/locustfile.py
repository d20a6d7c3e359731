"""Locust against a Triton server's language models.

    locust -f loadtest/locustfile.py --host localhost:8001              # gRPC, with Locust's web page
    locust -f loadtest/locustfile.py --host http://localhost:8000 \\
        --headless --users 8 --spawn-rate 8 --run-time 30s --csv out    # HTTP, without

docs/loadtest.md says what the figures mean. Change the user by deriving from it here.
"""

from __future__ import annotations

from stillhouse.loadtest.users import TritonUser

__all__ = ["TritonUser"]
