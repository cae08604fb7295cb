import os
import sys
from pathlib import Path

# Idle threads sleep instead of spinning: small tensors on a busy machine run several times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def pytest_configure(config):
    # torch.func's own, on its first use.
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script. is deprecated")
