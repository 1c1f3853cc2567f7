"""Settings that must stand before any Hugging Face library is imported: no telemetry, a cache of our own."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # the test server speaks LFS
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if "HF_HOME" not in os.environ:
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="gisp-hf-home-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name in ("HF_TOKEN", "HF_ENDPOINT", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)
