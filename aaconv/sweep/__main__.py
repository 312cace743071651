"""One of the processes that ``aaconv sweep --jobs`` starts."""

import sys

from aaconv.sweep.running import worker

sys.exit(worker())
