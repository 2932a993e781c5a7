"""The checks in the order in which they run: cheap and essential first. The limits add up to more than the budget, which few reach."""

from __future__ import annotations

from tests.gpu.runner import Check

CHECKS = (
    Check("device", "tests.gpu.attention:device", 60),
    Check("attention", "tests.gpu.attention:backends", 120),
    Check("new-shapes", "tests.gpu.attention:new_shapes", 60),
    Check("packed", "tests.gpu.network:packed_equals_single", 60),
    Check("half-step", "tests.gpu.network:half_step", 60),
    Check("derivative", "tests.gpu.network:derivative", 60),
    Check("zero", "tests.gpu.engine:zero_stages", 90),
    Check("resume", "tests.gpu.training:resume", 120),
    Check("xl-step", "tests.gpu.large:xl_step", 120),
    Check("sample-4096", "tests.gpu.large:sample_4096", 60),
    Check("decode-4096", "tests.gpu.large:decode_4096", 60),
    Check("compile", "tests.gpu.compile:compiled", 120),
    Check("xl-compiled", "tests.gpu.large:xl_compiled", 150),
)
