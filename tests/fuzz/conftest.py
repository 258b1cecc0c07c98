"""Hypothesis: some examples in the suite, always the same ones; as many as one likes by `make fuzz EXAMPLES=10000`."""

import os
from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("hypothesis") else ["test_*.py"]

if find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    examples = int(os.environ.get("MSVIT_FUZZ_EXAMPLES", "0"))
    settings.register_profile(
        "msvit",
        max_examples=examples or 25,
        derandomize=not examples,
        database=None,  # which would be a folder in the repository
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("msvit")
