import pytest

pytest.register_assert_rewrite("graph_checks")
