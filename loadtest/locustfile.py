"""Locust against a server's language models: Triton over gRPC or HTTP, or the OpenAI API.

    locust -f loadtest/locustfile.py --host localhost:8001              # gRPC, with Locust's web page
    locust -f loadtest/locustfile.py --host http://localhost:8000 \\
        --headless --users 8 --spawn-rate 8 --run-time 30s --csv out    # Triton's HTTP, without
    locust -f loadtest/locustfile.py --host http://localhost:9000/v1    # the OpenAI API
    locust -f loadtest/locustfile.py OpenAiUser                         # the same by the class's name

docs/loadtest.md says what the figures mean. Change the user by deriving from it here.
"""

from __future__ import annotations

from stillhouse.loadtest.users import LlmUser, OpenAiUser, TritonUser

__all__ = ["LlmUser", "OpenAiUser", "TritonUser"]
