"""Settings that must stand before any Hugging Face library is imported: no telemetry, a cache of our own."""

import os
import tempfile

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # the test server speaks LFS
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="gisp-hf-home-"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name in ("HF_TOKEN", "HF_ENDPOINT", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)
