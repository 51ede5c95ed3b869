"""One thread per process, also where pytest is called by itself: children forked beside the threads of OpenMP hang."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
