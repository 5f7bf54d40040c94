"""What tests share: parts of a host, real runtimes and engines, and fakes where nothing real is available."""

from __future__ import annotations

import os

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
