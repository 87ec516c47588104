import pytest

pytest.register_assert_rewrite("memserve.testing.transport_conformance")
