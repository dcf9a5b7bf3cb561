"""The tests here need the emulator (run.sh starts them); elsewhere none is collected."""

import ctypes

if not hasattr(ctypes.CDLL(None), "cudaemu_reports"):
    collect_ignore_glob = ["test_*.py"]
