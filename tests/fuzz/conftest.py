"""Settings of Hypothesis: the same examples in every run of the tests, others in a campaign."""

import os
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, Phase, settings
from hypothesis.configuration import set_hypothesis_home_dir

_home = TemporaryDirectory(prefix="hypothesis_")  # nothing is written into the repository
set_hypothesis_home_dir(_home.name)
settings.register_profile(
    "fuzz",
    derandomize="FUZZ_FACTOR" not in os.environ,
    database=None,
    deadline=None,  # `fuzz_oracle.outcome` limits the time
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking a slow example takes minutes
)
settings.load_profile("fuzz")
