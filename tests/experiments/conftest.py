"""Settings of the benchmarks' tests."""

from tests.world_settings import cache, one_thread  # noqa: F401  # used by being here
