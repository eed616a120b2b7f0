"""What every test runs under; set before torch is imported, and inherited by the processes tests start."""

from __future__ import annotations

import os
import sys

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # results depend on it, and tests share the cores
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

settings.register_profile("multiway", deadline=None, derandomize=True)
settings.load_profile("multiway")
