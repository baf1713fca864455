"""How long a document may be read, on any machine."""

import time
from functools import cache

import yaml

from dstrain.storage.parsing import MAX_YAML_VALUES


@cache
def longest_reading() -> float:
    """CPU-seconds: three times what PyYAML takes for as many values as a document may have."""
    start = time.process_time()
    yaml.safe_load("- 1\n" * MAX_YAML_VALUES)
    return 3 * (time.process_time() - start)
