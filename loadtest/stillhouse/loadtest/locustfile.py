"""The locustfile of runs that stillhouse starts itself; the same as loadtest/locustfile.py of the repository."""

from __future__ import annotations

from stillhouse.loadtest.users import LlmUser, OpenAiUser, TritonUser

__all__ = ["LlmUser", "OpenAiUser", "TritonUser"]
