"""The recipe of recovery on the tiny model and words, to be launched on several processes."""

import sys

import pytest

from recipes import recover
from tests.tiny_domains import use_tiny_domains

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_domains(patch)
        recover.main(sys.argv[1:])
